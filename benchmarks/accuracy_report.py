"""Tables and plots of `accuracy.py`, made from its CSV files alone, and put into the pages of the documentation."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from reporting import markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RESULTS", "TABLES", "Table", "paired", "publish", "read", "render"]

RESULTS: Final = Path(__file__).with_name("results") / "accuracy"
DOCS: Final = Path(__file__).parents[1] / "docs"
MARKERS: Final = "osD^v"
COLORS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito, for all kinds of colour vision
GRAY: Final = "#808080"  # legible on white and on black


class Line(NamedTuple):
    """A line of a table: its label, the rows of the file it stands for, and those it is compared with."""

    label: str
    arm: str
    at: str = ""
    against: tuple[str, str] | None = None


@dataclass(frozen=True)
class Table:
    """A table of a page, and the plot of the same name; `sizes` names the axis if the plot shows curves over ``at``."""

    page: str
    comparison: str
    title: str
    lines: tuple[Line, ...]
    seconds: bool = False
    sizes: str = ""
    curves: tuple[tuple[str, str], ...] = ()

    @property
    def image(self) -> Path:
        """The file of the plot."""
        return DOCS / "images" / f"accuracy_{Path(self.page).stem}.png"


def _rates(*arms: tuple[str, str]) -> tuple[Line, ...]:
    lines = []
    for rate, words in (("constant", "constant rate"), ("cosine", "rate to zero")):
        lines.append(Line(f"{words}, last weights", "last weights", rate))
        lines += [Line(f"{words}, {label}", arm, rate, ("last weights", rate)) for label, arm in arms]
    return tuple(lines)


def _choices(*arms: tuple[str, str]) -> tuple[Line, ...]:
    return (Line("without", "none"), *(Line(label, arm, "", ("none", "")) for label, arm in arms))


ONE: Final = ("one model", "1")
GEOMETRIC: Final = Line("`FastGeometricEnsemble(5)`", "FastGeometricEnsemble", "5", ONE)
TOGETHER: Final = (
    Line("5 checkpoints of that training", "checkpoints", "5", ONE),
    Line("5 trainings, each a fifth as long", "trainings, budget of one", "5", ONE),
    Line("5 trainings, each as long: 5 × the budget", "trainings, budget of each", "5", ONE),
)
CURVES: Final = (
    ("trainings, budget of each", "trainings, each as long"),
    ("SnapshotEnsemble", "SnapshotEnsemble"),
    ("FastGeometricEnsemble", "FastGeometricEnsemble"),
    ("checkpoints", "checkpoints, no cycles"),
    ("trainings, budget of one", "trainings in one budget"),
)
FASHION: Final = "Fashion-MNIST, 2,000 images"
MEMBERS: Final = "members"
TABLES: Final = (
    Table("tricks/ema.md", "averaging", FASHION, _rates(('`EMA(half_life="1 epoch")`', "EMA"))),
    Table(
        "tricks/polyak_averaging.md",
        "averaging",
        FASHION,
        _rates(("`PolyakAveraging()`", "PolyakAveraging"), ('`PolyakAveraging(start="50%", every="1 epoch")`', "SWA")),
    ),
    Table("tricks/latest_weight_averaging.md", "averaging", FASHION, _rates(("`LatestWeightAveraging()`", "LatestWeightAveraging"))),
    Table("tricks/post_hoc_ema.md", "averaging", FASHION, _rates(("`PostHocEMA()`", "PostHocEMA"))),
    Table(
        "tricks/snapshot_ensemble.md",
        "ensembles",
        FASHION,
        (
            Line("one model", *ONE),
            *(Line(f"`SnapshotEnsemble(5)`, the latest {size}", "SnapshotEnsemble", str(size), ONE) for size in range(1, 6)),
            *TOGETHER,
        ),
        sizes=MEMBERS,
        curves=CURVES,
    ),
    Table(
        "tricks/fast_geometric_ensemble.md",
        "ensembles",
        FASHION,
        (
            Line("one model", *ONE),
            Line("its latest member alone", "FastGeometricEnsemble", "1", ONE),
            GEOMETRIC,
            Line("`SnapshotEnsemble(5)`", "SnapshotEnsemble", "5", ONE),
            *TOGETHER,
        ),
        sizes=MEMBERS,
        curves=CURVES,
    ),
    Table("tricks/stochastic_depth.md", "stochastic_depth", FASHION, _choices(("`StochasticDepth(0.5)`", "StochasticDepth")), seconds=True),
    Table(
        "tricks/drop_connect.md",
        "drop_connect",
        FASHION,
        _choices(
            ("`Dropout(0.5)`", "Dropout"),
            ('`DropConnect(0.5)`, `inference="mean"`', "DropConnect, mean"),
            ('`DropConnect(0.5)`, `inference="gaussian"`', "DropConnect, gaussian"),
        ),
    ),
    Table("tricks/dropout.md", "drop_connect", FASHION, _choices(("`Dropout(0.5)`", "Dropout"))),
    Table(
        "tricks/norm_swap.md",
        "norm_swap",
        "digits, 512 images",
        tuple(
            Line(f"batches of {size}, {kind}", kind, size, None if kind == "batch" else ("batch", size))
            for size in ("2", "8", "32")
            for kind in ("batch", "group", "ghost")
            if kind != "ghost" or size == "32"
        ),
        sizes="images in a batch",
        curves=(("batch", "batch"), ("group", "group, 8 channels each"), ("ghost", "ghost, 16 images each")),
    ),
    Table(
        "tricks/weight_decay.md",
        "weight_decay",
        FASHION,
        (
            Line("none", "none"),
            *(
                Line(f'`mode="{mode}"`, {at}{words}', mode + arm, at, ("none", ""))
                for mode, small, large in (("decoupled", "0.05", "0.5"), ("l2", "0.0001", "0.001"))
                for arm, at, words in (("", small, ""), ("", large, ""), (", everything", large, ", `skip=()`"))
            ),
        ),
    ),
    Table("tricks/mix_up.md", "regularization", FASHION, _choices(("`MixUp(0.2)`", "MixUp"))),
    Table("tricks/cut_mix.md", "regularization", FASHION, _choices(("`CutMix(probability=0.5)`", "CutMix"))),
    Table("tricks/label_smoothing.md", "regularization", FASHION, _choices(("`LabelSmoothing(0.1)`", "LabelSmoothing"))),
    Table(
        "guides/optimizer_wrappers.md",
        "regularization",
        FASHION,
        _choices(("SAM, half the epochs", "SAM, half the epochs"), ("SAM, as many epochs", "SAM")),
        seconds=True,
    ),
)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the mean of paired differences, and half the width of its 95 % interval by Student's t."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    if len(differences) < 2:
        return mean(differences), math.nan
    quantile = import_module("scipy.stats").t.ppf(0.975, len(differences) - 1)
    return mean(differences), float(quantile) * stdev(differences) / math.sqrt(len(differences))


def render(table: Table, rows: Sequence[dict[str, str]]) -> str:
    """Return a table in Markdown: means and standard deviations over seeds, and paired differences with their 95 % intervals."""
    body = []
    for line in table.lines:
        error, nll = (_column(rows, line.arm, line.at, key) for key in ("error", "nll"))
        change = ""
        if line.against is not None:
            difference, half = paired(error, _column(rows, *line.against, "error"))
            interval = "" if math.isnan(half) else f" ({_signed(difference - half)} to {_signed(difference + half)})"
            change = _signed(difference) + interval
        spread = stdev(error) if len(error) > 1 else 0.0
        cells = [line.label, f"{mean(error):.2f} ± {spread:.2f}", change, f"{mean(nll):.3f}"]
        body.append(cells + ([f"{mean(_column(rows, line.arm, line.at, 'seconds')):.1f}"] if table.seconds else []))
    header = [table.title, "error, %", "difference, points", "NLL", *(["CPU time, s"] if table.seconds else [])]
    return re.sub(r"^\| -.*", f"| ---{' | ---:' * (len(header) - 1)} |", markdown(header, body), flags=re.MULTILINE)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _column(rows: Sequence[dict[str, str]], arm: str, at: str, key: str) -> list[float]:
    """Return the values of an arm in the order of seeds."""
    seeds = sorted({int(row["seed"]) for row in rows})
    found = sorted((int(row["seed"]), float(row[key])) for row in rows if (row["arm"], row["at"]) == (arm, at))
    if not found or [seed for seed, _ in found] != seeds:
        msg = (
            f"The file must have one row of {arm!r} at {at!r} for each of its seeds {seeds}, got seeds {[seed for seed, _ in found]}: "
            "delete the seeds that are not whole, and measure them with `benchmarks/accuracy.py`."
        )
        raise LookupError(msg)
    return [value for _, value in found]


def publish() -> None:
    """Draw every plot, and put every table in place of the one with the same title in its page."""
    for table in TABLES:
        rows = read(RESULTS / f"{table.comparison}.csv")
        page = DOCS / table.page
        text = page.read_text()
        found = re.findall(rf"^\| {re.escape(table.title)} \|(?:.|\n)*?(?=\n\n)", text, flags=re.MULTILINE)
        if len(found) != 1:
            msg = f"{table.page} must hold one table whose header begins with {table.title!r}, got {len(found)}."
            raise LookupError(msg)
        page.write_text(text.replace(found[0], render(table, rows)))
        draw(table, rows)


def draw(table: Table, rows: Sequence[dict[str, str]]) -> None:
    """Draw a table: curves over sizes, or a line of dots for each way, one dot a seed."""
    plots = import_module("matplotlib.pyplot")
    height = 3.2 if table.sizes else 0.9 + 0.34 * len(table.lines)
    figure, axes = plots.subplots(figsize=(6.4, height), layout="constrained")
    (_draw_curves if table.sizes else _draw_dots)(axes, table, rows)
    axes.tick_params(colors=GRAY)
    for part in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
        part.set_color(GRAY)
    for side in axes.spines.values():
        side.set_color(GRAY)
        side.set_visible(side.spine_type in ("left", "bottom"))
    axes.grid(visible=True, axis="both" if table.sizes else "x", color=GRAY, alpha=0.25)
    table.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(table.image, dpi=120, transparent=True, metadata={"Software": None})
    plots.close(figure)


def _draw_curves(axes: Any, table: Table, rows: Sequence[dict[str, str]]) -> None:
    for (arm, label), color, marker in zip(table.curves, COLORS, MARKERS, strict=False):
        sizes = sorted({int(row["at"]) for row in rows if row["arm"] == arm})
        values = [_column(rows, arm, str(size), "error") for size in sizes]
        middle = [mean(each) for each in values]
        spread = [stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0 for each in values]
        axes.errorbar(sizes, middle, spread, color=color, marker=marker, markersize=4, capsize=2, label=label)
    if table.sizes == MEMBERS:
        axes.set_xticks(range(1, 6))
    else:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(table.sizes)
    axes.set_ylabel("test error ± standard error, %")
    axes.legend(frameon=False, labelcolor=GRAY, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_dots(axes: Any, table: Table, rows: Sequence[dict[str, str]]) -> None:
    for place, line in enumerate(table.lines):
        values = _column(rows, line.arm, line.at, "error")
        color = GRAY if line.against is None else COLORS[0]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5)
        axes.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(table.lines)), [line.label.replace("`", "") for line in table.lines], fontsize=8)
    axes.invert_yaxis()
    axes.figure.supxlabel("test error, %; a dot is a seed, a bar the mean", color=GRAY, fontsize=9)
