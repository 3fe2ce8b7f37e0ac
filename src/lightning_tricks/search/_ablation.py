"""Which of these tricks help this model: train with each alone and with all but each, over seeds, and compare in pairs.

A trick that helps alone may do nothing beside others, and one that does nothing alone may help them. So both are asked: what does it add to
the baseline, and what is lost when it is taken out of all together?
"""

from __future__ import annotations

import gc
import json
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
from lightning_tricks._core.lightning import Callback
from lightning_tricks.errors import ArgumentError, TrickConflictError
from lightning_tricks.search._trial import Outcome, run_trial

if TYPE_CHECKING:
    from lightning_tricks.search._configuration import Built

__all__ = ["BASELINE", "EVERYTHING", "Cell", "Study", "plan_cells"]

BASELINE, EVERYTHING = "baseline", "everything"
Design = Literal["add", "remove"]


@dataclass(frozen=True)
class Cell:
    """One row of a study.

    Attributes:
        name: ``"baseline"``, ``"+ EMA"``, ``"everything"`` or ``"everything − EMA"``.
        tricks: The tricks that take part.
        reference: The cell that it is compared with; None for those that others are compared with.
        trick: The trick that makes the difference.
    """

    name: str
    tricks: tuple[str, ...]
    reference: str | None = None
    trick: str | None = None

    @property
    def stem(self) -> str:
        """The name, as that of a file."""
        return re.sub(r"[^\w]+", "-", self.name.replace("−", "without").replace("+", "with")).strip("-").lower()


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
    if len(everything) > 1:
        cells.append(Cell(EVERYTHING, everything, BASELINE))
        if "remove" in designs:
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
        mode: Whether less or more of it is better.
        designs: Which questions are asked.
        test: Whether the test set evaluates, and not the validation set.

    Raises:
        ArgumentError: If an argument lies outside its domain, or the folder has a study with other settings.
        TrickConflictError: If tricks that are to train together cannot.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        build: Callable[[], Built],
        tricks: Mapping[str, Sequence[Callback]],
        *,
        seeds: Sequence[int],
        metric: str,
        mode: Literal["min", "max"],
        designs: Sequence[Design],
        test: bool,
    ) -> None:
        self.folder, self.build, self.tricks = Path(folder), build, _check_tricks(tricks)
        self.seeds, self.metric, self.mode, self.test = tuple(seeds), metric, check_choice("mode", mode, ("min", "max")), test
        self.designs = tuple(check_choice("designs", design, ("add", "remove")) for design in designs)
        self.cells = plan_cells(list(self.tricks), self.designs)
        for cell in self.cells:
            try:
                check_conflicts(self._callbacks(cell))
            except TrickConflictError as error:
                msg = f"The cell {cell.name!r} cannot be trained: {error} Or leave it out of the study with `designs=['add']`."
                raise TrickConflictError(msg) from error
        self._claim()

    @property
    def trials(self) -> list[tuple[Cell, int]]:
        """All trainings, seed by seed, so that those which are compared lie close together in time."""
        return [(cell, seed) for seed in self.seeds for cell in self.cells]

    def outcome(self, cell: Cell, seed: int) -> Outcome | None:
        """Return what a training came to; None if it is not done."""
        file = self._file(cell, seed)
        return Outcome(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def run(self, cell: Cell, seed: int) -> Outcome:
        """Train, and keep what it came to; whatever stops a training but an interruption is what it came to, too."""
        try:
            outcome = run_trial(self.build, self._callbacks(cell), seed=seed, metric=self.metric, test=self.test)
        except Exception as error:  # noqa: BLE001 -- reported, so that the others go on
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome = Outcome(error=f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")
        _write(self._file(cell, seed), outcome.as_dict())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return outcome

    def _callbacks(self, cell: Cell) -> list[Callback]:
        return [callback for trick in cell.tricks for callback in self.tricks[trick]]

    def _file(self, cell: Cell, seed: int) -> Path:
        return self.folder / "trials" / f"{cell.stem}-seed{seed}.json"

    def _claim(self) -> None:
        """Record the settings that outcomes depend on; a study that is there may get further seeds and tricks, and nothing else."""
        file = self.folder / "study.json"
        settings = {
            "metric": self.metric,
            "test": self.test,
            "tricks": {name: [repr(callback) for callback in callbacks] for name, callbacks in self.tricks.items()},
        }
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            pairs = {"metric": (found["metric"], self.metric), "test": (found["test"], self.test)}
            pairs |= {f"tricks[{name!r}]": (found["tricks"].get(name, own), own) for name, own in settings["tricks"].items()}
            for name, (before, now) in pairs.items():
                if before != now:
                    msg = (
                        f"`{name}` must stay what it was when the study in '{self.folder}' began, {before!r}, got {now!r}. "
                        "Take another folder."
                    )
                    raise ArgumentError(msg)
            settings["tricks"] = {**found["tricks"], **settings["tricks"]}
        _write(file, settings)


def _check_tricks(tricks: Mapping[str, Callback | Sequence[Callback]]) -> dict[str, list[Callback]]:
    lists = {name: [value] if isinstance(value, Callback) else list(value) for name, value in dict(tricks).items()}
    valid = lists and all(isinstance(name, str) and name and callbacks for name, callbacks in lists.items())
    if not valid or not all(isinstance(callback, Callback) for callbacks in lists.values() for callback in callbacks):
        msg = f"`tricks` must map names to lists of callbacks, such as {{'EMA': [lt.EMA()]}}, got {tricks!r}."
        raise ArgumentError(msg)
    return lists


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file so that it is there as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.replace(file)
