"""Which of these tricks help this model: train with each alone and with all but each, over seeds, and compare in pairs.

A trick that helps alone may do nothing beside others, and one that does nothing alone may help them. So both are asked: what does it add to
the baseline, and what is lost when it is taken out of all together?
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_tricks._core.checks import check_choice
from lightning_tricks._core.conflicts import check_conflicts
from lightning_tricks._core.files import whole_file
from lightning_tricks._core.lightning import Callback, callbacks_of, is_callback
from lightning_tricks.errors import ArgumentError, TrickConflictError
from lightning_tricks.search._trial import Outcome, aside, check_metric, run_trial

if TYPE_CHECKING:
    from lightning_tricks.search._configuration import Built

__all__ = ["BASELINE", "EVERYTHING", "Cell", "Design", "Study", "plan_cells"]

BASELINE, EVERYTHING = "baseline", "everything"
Design = Literal["add", "remove"]


@dataclass(frozen=True)
class Cell:
    """One row of a study.

    Attributes:
        name: ``"baseline"``, ``"+ EMA"``, ``"everything"`` or ``"everything − EMA"``.
        tricks: The tricks that take part.
        reference: The cell that it is compared with; None for the baseline.
        trick: The trick that makes the difference; None for the baseline and for everything.
    """

    name: str
    tricks: tuple[str, ...]
    reference: str | None = None
    trick: str | None = None

    @property
    def stem(self) -> str:
        """What the cell trains, as the name of a file: cells with the same tricks share their trainings."""
        if not self.tricks:
            return BASELINE
        names = "+".join(sorted(map(slug, self.tricks)))
        return f"with-{names}" if len(names) <= 100 else f"with-{len(self.tricks)}-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def slug(name: str) -> str:
    """Return a name as part of the name of a file."""
    return re.sub(r"[^\w.]+", "-", name).strip("-").casefold()


def plan_cells(tricks: Sequence[str], designs: Sequence[Design] = ("add", "remove")) -> list[Cell]:
    """Return the cells of a study, each once: with a single trick, adding it to nothing is all there is.

    Args:
        tricks: Names of the tricks.
        designs: ``"add"`` compares the baseline with each trick alone; ``"remove"`` everything with everything but each trick.
    """
    everything = tuple(tricks)
    cells = [Cell(BASELINE, ())]
    if "add" in designs or len(everything) == 1:
        cells += [Cell(f"+ {trick}", (trick,), BASELINE, trick) for trick in everything]
    if "remove" in designs and len(everything) > 1:
        cells.append(Cell(EVERYTHING, everything, BASELINE))
        rest = {trick: tuple(other for other in everything if other != trick) for trick in everything}
        cells += [Cell(f"{EVERYTHING} − {trick}", rest[trick], EVERYTHING, trick) for trick in everything]
    return cells


class Study:
    """The trainings of an ablation, each with a file in a folder once it is done.

    Args:
        folder: Where the files go. What is there already is not trained again.
        build: Makes the module, the data and the Trainer of one training.
        tricks: Callbacks by the name of the trick.
        seeds: One training of each cell for each of them.
        metric: What is compared, as the evaluation logs it.
        designs: Which questions are asked.
        test: Whether the test set evaluates, and not the validation set.
        settings: What else the outcomes depend on, as plain data.

    Raises:
        ArgumentError: If an argument lies outside its domain, or the folder has a study with other settings.
        TrickConflictError: If tricks that are to train together cannot.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        build: Callable[[], Built],
        tricks: Mapping[str, Callback | Sequence[Callback]],
        *,
        seeds: Sequence[int],
        metric: str,
        designs: Sequence[Design],
        test: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self.build, self.tricks = Path(folder), build, _check_tricks(tricks)
        self.seeds, self.metric, self.test = tuple(seeds), metric, test
        self.cells = plan_cells(list(self.tricks), _check_designs(designs))
        self.settings = {"metric": metric, "test": test, **settings}

    @property
    def trials(self) -> list[tuple[Cell, int]]:
        """All trainings, seed by seed, so that those which are compared lie close together in time; what two cells share is there once."""
        unique: dict[str, Cell] = {}
        for cell in self.cells:
            unique.setdefault(cell.stem, cell)
        return [(cell, seed) for seed in self.seeds for cell in unique.values()]

    def prepare(self) -> None:
        """Find before the first training what would spoil it: make everything once, and evaluate one batch.

        Raises:
            ArgumentError: If the metric is not logged, or the folder has a study with other settings.
            TrickConflictError: If tricks that are to train together cannot.
        """
        self._check_settings()
        with aside():
            trainer = self.build().trainer
        if trainer.world_size > 1:
            msg = f"`trainer` must train in one process, got one of {trainer.world_size}. Pass `devices=1`."
            raise ArgumentError(msg)
        for cell in self.cells:
            try:
                check_conflicts([*callbacks_of(trainer), *copy.deepcopy(self._callbacks(cell))])
            except TrickConflictError as error:
                way = " Or ask for `designs=['add']` only, where each trick is alone." if len(cell.tricks) > 1 else ""
                msg = f"The cell '{cell.name}' cannot be trained: {error}{way}"
                raise TrickConflictError(msg) from error
        if any(not self.done(cell, seed) for cell, seed in self.trials):
            check_metric(self.build, seed=self.seeds[0], metric=self.metric, test=self.test)
        self._claim()

    def outcome(self, cell: Cell, seed: int) -> Outcome | None:
        """Return what a training came to; None if it has not come to anything yet, or its file was lost with the machine."""
        file = self._file(cell, seed)
        if not file.is_file():
            return None
        try:
            return Outcome(**json.loads(file.read_text(encoding="utf-8"))["outcome"])
        except (ValueError, KeyError, TypeError):
            return None

    def done(self, cell: Cell, seed: int) -> bool:
        """Tell whether a training need not be run again."""
        outcome = self.outcome(cell, seed)
        return outcome is not None and outcome.error is None

    def run(self, cell: Cell, seed: int) -> Outcome:
        """Train, and keep what it came to; whatever stops a training but an interruption is what it came to, too."""
        try:
            outcome = run_trial(self.build, self._callbacks(cell), seed=seed, metric=self.metric, test=self.test)
            if not math.isfinite(value := outcome.metrics[self.metric]):
                outcome = Outcome(outcome.metrics, outcome.step_time, outcome.memory, outcome.seconds, f"{self.metric} came out as {value}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- reported, so that the others go on
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome = Outcome(error=f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")
        _write(self._file(cell, seed), {"tricks": sorted(cell.tricks), "seed": seed, "outcome": outcome.as_dict()})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return outcome

    def _callbacks(self, cell: Cell) -> list[Callback]:
        return [callback for trick in cell.tricks for callback in self.tricks[trick]]

    def _file(self, cell: Cell, seed: int) -> Path:
        return self.folder / "trainings" / f"{cell.stem}-seed{seed}.json"

    @property
    def _record(self) -> Path:
        return self.folder / "study.json"

    def _described(self) -> dict[str, list[str]]:
        """Return the tricks as they print themselves, without addresses, which no two processes share."""
        return {name: [re.sub(r" at 0x[0-9a-f]+", "", repr(each)) for each in callbacks] for name, callbacks in self.tricks.items()}

    def _check_settings(self) -> None:
        """A study that is there may get further seeds, designs and tricks, and nothing else."""
        if not self._record.is_file():
            return
        try:
            found = json.loads(self._record.read_text(encoding="utf-8"))
            found = {"settings": dict(found["settings"]), "tricks": dict(found["tricks"])}
        except (ValueError, KeyError, TypeError) as error:
            msg = f"`folder` must be new, or that of an ablation, and '{self._record}' is none of one. Take another folder."
            raise ArgumentError(msg) from error
        pairs = {name: (found["settings"].get(name), value) for name, value in json.loads(json.dumps(self.settings)).items()}
        pairs |= {f"tricks[{name!r}]": (found["tricks"].get(name, own), own) for name, own in self._described().items()}
        for name, (before, now) in pairs.items():
            if before != now:
                msg = (
                    f"`{name}` must stay what it was when the study in '{self.folder}' began, {before!r:.200}, got {now!r:.200}. "
                    "Take another folder, or delete this one."
                )
                raise ArgumentError(msg)

    def _claim(self) -> None:
        """Record what the outcomes depend on."""
        before = json.loads(self._record.read_text(encoding="utf-8"))["tricks"] if self._record.is_file() else {}
        try:
            _write(self._record, {"settings": self.settings, "tricks": before | self._described()})
        except OSError as error:
            msg = f"`folder` must be one where files can be written, got '{self.folder}': {error}."
            raise ArgumentError(msg) from error


def _check_designs(designs: Sequence[Design]) -> tuple[Design, ...]:
    given: tuple[Any, ...] = tuple(designs) if isinstance(designs, Sequence) and not isinstance(designs, str) else (designs,)
    if not given:
        msg = "`designs` must have 'add', 'remove' or both, got none."
        raise ArgumentError(msg)
    return tuple(check_choice("designs", design, ("add", "remove")) for design in given)


def _check_tricks(tricks: Mapping[str, Callback | Sequence[Callback]]) -> dict[str, list[Callback]]:
    valid = isinstance(tricks, Mapping) and all(is_callback(value) or isinstance(value, Sequence) for value in tricks.values())
    lists = {name: list(value) if isinstance(value, Sequence) else [value] for name, value in tricks.items()} if valid else {}
    named = lists and all(isinstance(name, str) and slug(name) and callbacks for name, callbacks in lists.items())
    if not named or not all(is_callback(callback) for callbacks in lists.values() for callback in callbacks):
        msg = f"`tricks` must map names to lists of callbacks, such as {{'EMA': [lt.EMA()]}}, got {tricks!r}."
        raise ArgumentError(msg)
    if len({slug(name) for name in lists}) < len(lists):
        msg = f"`tricks` must have names that differ by more than case and punctuation, since files bear them, got {', '.join(lists)}."
        raise ArgumentError(msg)
    return lists


def _write(file: Path, content: Mapping[str, Any]) -> None:
    with whole_file(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
