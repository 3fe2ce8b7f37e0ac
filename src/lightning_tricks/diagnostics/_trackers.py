"""What each kind of logger can hold of a run, behind the same few words.

Nothing of W&B is imported unless there is a logger of it.
"""

from __future__ import annotations

import csv
import json
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lightning_tricks._core.lightning import is_wandb_logger, override
from lightning_tricks.diagnostics._pictures import show_picture

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_tricks._core.exhibits import Goal, Table, WeightFiles

__all__ = ["Tracker", "tracker_of"]

_STEP: Final = "trainer/global_step"  # where Lightning puts the step in W&B
_SUMMARIES: Final[Mapping[Goal, str]] = {goal: f"{goal},last" for goal in ("min", "max", "mean", "first")} | {"last": "last"}


class Tracker:
    """Any logger: it holds hyperparameters and numbers.

    Args:
        logger: The logger.
        folder: What a folder for files is called, if it has one.
    """

    def __init__(self, logger: Any, folder: str) -> None:
        self.logger, self.folder = logger, folder
        self.warned = False  # of its first error

    @property
    def run(self) -> str | None:
        """The run by which others can find it again."""
        return None

    @property
    def takes_checkpoints(self) -> bool:
        """Whether checkpoints are to be handed to it."""
        return False

    def settings(self, values: Mapping[str, Any]) -> None:
        """Take hyperparameters."""
        self.logger.log_hyperparams(dict(values))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Take metrics."""
        self.logger.log_metrics(dict(values), step=step)

    def goal(self, metric: str, goal: Goal) -> None:
        """Let this value of a metric stand for the run."""

    def origin(self, runs: Sequence[str]) -> None:
        """Take the runs of which this one is a continuation, if it is another."""

    def facts(self, values: Mapping[str, Any], step: int) -> None:
        """Take what was found."""

    def table(self, key: str, table: Table, step: int) -> None:
        """Take a table."""

    def figure(self, key: str, draw: Callable[[Path], None], path: Path, step: int) -> None:
        """Take a figure; it is drawn now, unless another logger has taken it before."""
        if not path.exists():
            draw(path)
        self.picture(key, path, step)

    def picture(self, key: str, path: Path, step: int) -> None:
        """Take a PNG, which is there for the length of the call."""

    def weights(self, kind: str, files: WeightFiles, aliases: Sequence[str]) -> None:
        """Take files of weights as a version of what there is of a kind."""


class WandbTracker(Tracker):
    """A run of W&B."""

    @property
    @override
    def run(self) -> str | None:
        return str(self.logger.experiment.id)

    @property
    @override
    def takes_checkpoints(self) -> bool:
        return not getattr(self.logger, "_log_model", False)  # or it sends them itself

    @override
    def goal(self, metric: str, goal: Goal) -> None:
        key = self._key(metric).replace(".", "\\.")  # a bare dot would lead into a mapping
        self.logger.experiment.define_metric(key, step_metric=_STEP, step_sync=True, summary=_SUMMARIES[goal])

    @override
    def origin(self, runs: Sequence[str]) -> None:
        if self.run not in runs:
            self.logger.experiment.config.update({"resumed_from": list(runs)}, allow_val_change=True)

    @override
    def facts(self, values: Mapping[str, Any], step: int) -> None:
        self.logger.experiment.summary.update({self._key(name): value for name, value in values.items()})

    @override
    def table(self, key: str, table: Table, step: int) -> None:
        self.logger.log_table(key, columns=list(table.columns), data=[list(row) for row in table.rows], step=step)

    @override
    def picture(self, key: str, path: Path, step: int) -> None:
        show_picture(self.logger, key, path, step)

    @override
    def weights(self, kind: str, files: WeightFiles, aliases: Sequence[str]) -> None:
        own = getattr(self.logger, "_checkpoint_name", None) if kind == "model" else None
        artifact = import_module("wandb").Artifact(own or f"{kind}-{self.run}", type="model", metadata=dict(files.facts))
        policy = {"policy": getattr(self.logger, "add_file_policy", "mutable")}
        for path in files.paths:
            if path.is_dir():
                artifact.add_dir(str(path), **policy)
            else:  # one checkpoint bears the name by which Lightning's logger, too, calls it
                artifact.add_file(str(path), name="model.ckpt" if kind == "model" else path.name, **policy)
        self.logger.experiment.log_artifact(artifact, aliases=list(aliases))

    def _key(self, name: str) -> str:
        """Return what Lightning's logger makes of a metric's name."""
        prefix = getattr(self.logger, "_prefix", "")
        return f"{prefix}-{name}" if prefix else name


class TensorBoardTracker(Tracker):
    """Event files of TensorBoard."""

    @override
    def facts(self, values: Mapping[str, Any], step: int) -> None:
        for key, value in values.items():
            self.logger.experiment.add_text(key, str(value), step)

    @override
    def table(self, key: str, table: Table, step: int) -> None:
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        text = "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows)
        self.logger.experiment.add_text(key, text, step)

    @override
    def picture(self, key: str, path: Path, step: int) -> None:
        show_picture(self.logger, key, path, step)


class FolderTracker(Tracker):
    """A logger with a folder for files, such as Lightning's for CSV."""

    @property
    def _home(self) -> Path:
        return Path(self.logger.log_dir, self.folder)

    @override
    def facts(self, values: Mapping[str, Any], step: int) -> None:
        if values:
            path = self._home / "facts.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(values), indent=1) + "\n")

    @override
    def table(self, key: str, table: Table, step: int) -> None:
        path = self._home / f"{key}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([table.columns, *table.rows])

    @override
    def picture(self, key: str, path: Path, step: int) -> None:
        target = self._home / f"{key}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def tracker_of(logger: Any, folder: str) -> Tracker:
    """Return what hands things to a logger."""
    if is_wandb_logger(logger):
        return WandbTracker(logger, folder)
    if hasattr(getattr(logger, "experiment", None), "add_text"):
        return TensorBoardTracker(logger, folder)
    at_hand = isinstance(logger.log_dir, str | os.PathLike) and "://" not in str(logger.log_dir)
    return (FolderTracker if at_hand else Tracker)(logger, folder)
