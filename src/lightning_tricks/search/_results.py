"""What an ablation came to: a row for each cell, as text, as a frame and as files."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_tricks._core.extras import require
from lightning_tricks.search._comparison import Difference, compare_pairs, holm
from lightning_tricks.search._study import BASELINE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_tricks.search._study import Cell, Study
    from lightning_tricks.search._trial import Outcome

__all__ = ["Ablation", "Row", "show", "signed", "summarize"]

Verdict = Literal["helps", "hurts", "unclear"]
_COLUMNS = ("cell", "{metric}", "difference", "95 % interval", "p (Holm)", "the trick", "time per step", "memory")


@dataclass(frozen=True)
class Row:
    """One cell of an ablation.

    Attributes:
        cell: ``"baseline"``, ``"+ EMA"``, ``"everything"`` or ``"everything − EMA"``.
        trick: The trick by which it differs from its reference; None for the baseline and for everything.
        reference: The cell that it is compared with; None for the baseline.
        seeds: The seeds whose training is done.
        values: The metric, seed by seed.
        mean: Their mean; NaN for none.
        std: Their standard deviation, with n − 1; NaN for fewer than two.
        difference: The mean difference to the reference over pairs of one seed, with its 95 % interval and its p-value.
        p_holm: The p-value, corrected for the number of tricks in the same design.
        verdict: Whether the trick helps or hurts, or, with a corrected p-value of 0.05 or more, neither is clear; None without a
            p-value.
        step_time: Median time of a step in seconds, median over seeds; None where no training had enough steps.
        added_time: The ratio of step times to the reference's, median over pairs, less one.
        memory: Bytes at the peak, median over seeds.
        added_memory: The difference to the reference's, median over pairs.
        failures: What stopped a training, by seed.
    """

    cell: str
    trick: str | None
    reference: str | None
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float
    difference: Difference | None
    p_holm: float
    verdict: Verdict | None
    step_time: float | None
    added_time: float | None
    memory: float | None
    added_memory: float | None
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def removes(self) -> bool:
        """Whether the cell lacks its trick, and its reference has it."""
        return self.trick is not None and self.reference != BASELINE


@dataclass(frozen=True)
class Ablation:
    """What an ablation came to.

    ``str`` gives the table. The folder has it as ``ablation.csv``, as a forest plot in ``ablation.png``, and in ``ablation.html``, one
    file with nothing outside it.

    Attributes:
        rows: One for each cell.
        metric: What is compared.
        mode: Whether less or more of it is better.
        seeds: The seeds asked for.
        folder: Where the files are.
        done: How many trainings are done.
        total: How many were asked for.
        interrupted: Whether Ctrl-C ended the study before all were done; calling again goes on there.

    Example:
        >>> from lightning_tricks.search import Ablation
        >>> study = Ablation(rows=(), metric="val_loss", mode="min", seeds=(0, 1), folder="runs/ablation", done=5, total=6)
        >>> study.done, study.failures
        (5, {})
    """

    rows: tuple[Row, ...]
    metric: str
    mode: Literal["min", "max"]
    seeds: tuple[int, ...]
    folder: str
    done: int
    total: int
    interrupted: bool = False

    @property
    def failures(self) -> dict[str, str]:
        """What stopped a training, by cell and seed; calling again tries these once more."""
        return {f"{row.cell}, seed {seed}": error for row in self.rows for seed, error in row.failures.items()}

    @property
    def decimals(self) -> int:
        """How many decimals the metric is worth: two digits of its standard deviation over seeds."""
        spreads = [row.std for row in self.rows if row.std > 0] or [abs(row.mean) / 100 for row in self.rows if abs(row.mean) > 0]
        return min(max(1 - math.floor(math.log10(statistics.median(spreads))), 0), 8) if spreads else 4

    def cells(self, row: Row) -> tuple[str, ...]:
        """Return a row of the table as texts."""
        digits, difference = self.decimals, row.difference
        spread = "" if math.isnan(row.std) else f" ± {row.std:.{digits}f}"
        known = difference is not None and not math.isnan(difference.low)
        return (
            row.cell,
            "—" if math.isnan(row.mean) else f"{row.mean:.{digits}f}{spread}",
            "—" if difference is None or math.isnan(difference.mean) else signed(difference.mean, digits),
            f"{signed(difference.low, digits)} to {signed(difference.high, digits)}" if difference is not None and known else "—",
            "—" if math.isnan(row.p_holm) else "< 0.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}",
            row.verdict or "—",
            "—" if row.added_time is None else f"{signed(100 * row.added_time, 0)} %",
            "—" if row.added_memory is None else f"{signed(row.added_memory / 2**20, 1)} MiB",
        )

    @property
    def header(self) -> tuple[str, ...]:
        """The heads of the table's columns."""
        return tuple(name.format(metric=self.metric) for name in _COLUMNS)

    @property
    def notes(self) -> list[str]:
        """What must be known to read the table."""
        better = "less" if self.mode == "min" else "more"
        notes = [
            (
                f"{self.metric}: mean ± standard deviation over {len(self.seeds)} {'seed' if len(self.seeds) == 1 else 'seeds'}, {better} "
                "is better. Differences are to the baseline, or to everything, in pairs of one seed."
            )
        ]
        if self.done < self.total:
            notes.append(f"{self.done} of {self.total} trainings are done. The same call goes on with the others.")
        return notes + [f"Failed: {name}: {error}" for name, error in self.failures.items()]

    def __str__(self) -> str:
        table = [self.header, *map(self.cells, self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(self.header))]
        lines = [
            "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
            for line in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *self.notes])

    def to_frame(self) -> Any:
        """Return a pandas DataFrame with a line for each cell, numbers as they are."""
        pandas = require("pandas", package="pandas", extra="search", who="A table of an ablation")
        return pandas.DataFrame([_record(row) for row in self.rows])

    def save(self) -> None:
        """Write the table, the plot and the report into the folder."""
        from lightning_tricks.search._forest import draw_forest  # noqa: PLC0415 -- drawn and written only here
        from lightning_tricks.search._html import report  # noqa: PLC0415

        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_frame().to_csv(folder / "ablation.csv", index=False)
        draw_forest(self, folder / "ablation.png")
        (folder / "ablation.html").write_text(report(self), encoding="utf-8")


def show(ablation: Ablation) -> None:
    """Print the table: by rich in a terminal that has it, plainly elsewhere; and where the files are."""
    try:
        console = import_module("rich.console").Console() if sys.stdout.isatty() else None
    except ModuleNotFoundError:
        console = None
    if console is None:
        sys.stdout.write(f"{ablation}\n")
    else:
        table = import_module("rich.table").Table()
        for index, name in enumerate(ablation.header):
            table.add_column(name, justify="right" if index else "left", overflow="fold")
        colors = {"helps": "green", "hurts": "red"}
        for row in ablation.rows:
            table.add_row(*ablation.cells(row), style=colors.get(row.verdict or ""))
        console.print(table)
        for note in ablation.notes:
            console.print(note, markup=False, highlight=False)
    sys.stdout.write(f"Results: {ablation.folder}/ablation.html, ablation.png, ablation.csv\n")


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, as in print; what rounds to 0 has none."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else f"{'−' if value < 0 else '+'}{text}"


def summarize(study: Study, *, mode: Literal["min", "max"], interrupted: bool) -> Ablation:
    """Compare what the trainings of a study came to."""
    outcomes = {cell.name: {seed: study.outcome(cell, seed) for seed in study.seeds} for cell in study.cells}
    compared = [_row(cell, outcomes, study.metric) for cell in study.cells]
    corrected = _corrected(compared)
    rows = tuple(
        replace(row, p_holm=p_value, verdict=_verdict(row, p_value, mode)) for row, p_value in zip(compared, corrected, strict=True)
    )
    done = sum(study.done(cell, seed) for cell, seed in study.trials)
    return Ablation(rows, study.metric, mode, study.seeds, str(study.folder), done, len(study.trials), interrupted)


def _row(cell: Cell, outcomes: Mapping[str, Mapping[int, Outcome | None]], metric: str) -> Row:
    """Compare a cell with its reference; what its p-value means depends on the others."""
    own = {seed: outcome for seed, outcome in outcomes[cell.name].items() if outcome is not None}
    done = {seed: outcome for seed, outcome in own.items() if outcome.error is None}
    others = outcomes[cell.reference] if cell.reference is not None else {}
    pairs = [(outcome, other) for seed, outcome in done.items() if (other := others.get(seed)) is not None and other.error is None]
    difference = compare_pairs([a.metrics[metric] for a, _ in pairs], [b.metrics[metric] for _, b in pairs])
    values = tuple(outcome.metrics[metric] for outcome in done.values())
    return Row(
        cell=cell.name,
        trick=cell.trick,
        reference=cell.reference,
        seeds=tuple(done),
        values=values,
        mean=statistics.fmean(values) if values else math.nan,
        std=statistics.stdev(values) if len(values) > 1 else math.nan,
        difference=None if cell.reference is None else difference,
        p_holm=math.nan,
        verdict=None,
        step_time=_median([each.step_time for each in done.values() if each.step_time is not None]),
        added_time=_median([a.step_time / b.step_time - 1 for a, b in pairs if a.step_time is not None and b.step_time is not None]),
        memory=_median([each.memory for each in done.values() if each.memory is not None]),
        added_memory=_median([a.memory - b.memory for a, b in pairs if a.memory is not None and b.memory is not None]),
        failures={seed: outcome.error for seed, outcome in own.items() if outcome.error is not None},
    )


def _corrected(rows: Sequence[Row]) -> list[float]:
    """Correct p-values for the number of tricks, once where each is alone and once where each is taken out."""
    p_values = [math.nan if row.difference is None else row.difference.p_value for row in rows]
    for removes in (False, True):
        family = [index for index, row in enumerate(rows) if row.trick is not None and row.removes == removes]
        for index, p_value in zip(family, holm([p_values[index] for index in family]), strict=True):
            p_values[index] = p_value
    return p_values


def _verdict(row: Row, p_value: float, mode: Literal["min", "max"]) -> Verdict | None:
    if row.difference is None or math.isnan(p_value):
        return None
    if p_value >= 0.05:
        return "unclear"
    return "helps" if ((row.difference.mean < 0) == (mode == "min")) != row.removes else "hurts"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _record(row: Row) -> dict[str, Any]:
    difference = row.difference or Difference(math.nan, math.nan, math.nan, math.nan, 0)
    return {
        "cell": row.cell,
        "trick": row.trick,
        "reference": row.reference,
        "seeds": len(row.seeds),
        "mean": row.mean,
        "std": row.std,
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "pairs": difference.pairs,
        "p_value": difference.p_value,
        "p_holm": row.p_holm,
        "verdict": row.verdict,
        "step_time": row.step_time,
        "added_time": row.added_time,
        "memory": row.memory,
        "added_memory": row.added_memory,
        "failures": "; ".join(f"seed {seed}: {error}" for seed, error in row.failures.items()),
    }
