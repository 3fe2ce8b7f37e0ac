"""Tracking report: what the tricks of a run were, what they found and what they made, in the loggers that the run has.

A curve of a loss does not say how it came about. Beside it belong the arguments of every trick, the best value where the best counts and
not the last, the members of an ensemble, the pictures that tricks draw, and, if wanted, the weights themselves under names by which
they are found again.

Source: L. Biewald, "Experiment Tracking with Weights and Biases", software, wandb.com, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Literal

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_bool, check_choice
from lightning_tricks._core.clock import Duration, FitLength
from lightning_tricks._core.exhibits import GOALS, Goal, WeightFiles
from lightning_tricks._core.lightning import (
    LightningModule,
    Trainer,
    callbacks_of,
    is_averaging_callback,
    logged_hyperparameters,
    override,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_tricks._core.schedule import Schedule
from lightning_tricks._core.trick import Trick
from lightning_tricks.diagnostics._checkpoint_files import checkpoint_files
from lightning_tricks.diagnostics._curves import draw_curves
from lightning_tricks.diagnostics._settings import settings_of
from lightning_tricks.diagnostics._trackers import Tracker, tracker_of
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["TrackingReport"]

_POINTS: Final = 500  # of a schedule's curve


class TrackingReport(Trick):
    """Tell the loggers of a run which tricks it has with which arguments, what they found, and where the weights are.

    Reach for it where runs are compared in W&B, TensorBoard or a folder of CSV files. Without a logger it does nothing, and training is
    as without it, to the bit.

    Args:
        goals: Metrics, by the names under which the module logs them, each with the value that stands for the run: ``"min"``, ``"max"``,
            ``"mean"``, ``"first"`` or ``"last"``. What callbacks monitor, such as ModelCheckpoint, and what tricks log is known without it.
        figures: Whether to draw what tricks can draw, for which matplotlib is needed.
        artifacts: Weights that W&B gets when the fit ends: ``"none"``; ``"best"`` = the best and the latest checkpoint; ``"all"`` = every
            checkpoint that is kept, and every member of ensembles.
        name: Tells several of them apart, in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        Before each fit, validation, test and prediction, every logger gets the hyperparameter ``lightning_tricks``: this package's
        version, and all arguments of each trick under the name by which it logs, recipes and schedules in parts. When the fit ends, also
        by an exception, W&B gets tables, pictures, facts in the run's summary, and artifacts; TensorBoard gets texts and images; a
        logger with a folder, such as CSVLogger, gets files in its ``tracking_report``. Where the step is taken, nothing is done.

        Artifacts of checkpoints are called as Lightning's WandbLogger calls them, ``model-<run>``, and are left to the logger if it
        has ``log_model``. Their aliases are ``best``, ``latest``, and ``averaged`` or ``raw``, for what the state dict holds. Those of
        members are ``<trick>-members-<run>`` with aliases ``member-0``, ``member-1``, ….

        An error of a logger is warned of once, and the run goes on. Rank zero alone reports. The checkpoint holds the W&B run's id; a fit
        that goes on in another run notes it there as ``resumed_from``.

    References:
        - L. Biewald, "Experiment Tracking with Weights and Biases", software, wandb.com, 2020.

    Example:
        >>> TrackingReport(goals={"val_acc": "max"}, artifacts="best")
        TrackingReport(goals={'val_acc': 'max'}, artifacts='best')
    """

    def __init__(
        self,
        *,
        goals: Mapping[str, Goal] | None = None,
        figures: bool = True,
        artifacts: Literal["none", "best", "all"] = "none",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.goals = None if goals is None else _check_goals(goals)
        self.figures = check_bool("figures", figures)
        self.artifacts: Literal["none", "best", "all"] = check_choice("artifacts", artifacts, ("none", "best", "all"))
        self._trackers: list[Tracker] = []
        self._curves: dict[str, Callable[[Path], None]] = {}
        self._origin: list[str] = []
        self._sent: set[tuple[object, ...]] = set()
        self._fitting = False

    # Before a run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._origin, self._fitting = [], False
        self._trackers = [tracker_of(logger, self.log_prefix) for logger in trainer.loggers] if trainer.is_global_zero else []
        settings = {"version": version("lightning-tricks"), **settings_of(_tricks(trainer))}
        # Together with what Lightning hands over later, since TensorBoard shows what comes first alone.
        values = {**logged_hyperparameters(trainer), "lightning_tricks": settings}
        self._to_each(methodcaller("settings", values))
        if stage == "fit":
            for metric, goal in self._find_goals(trainer).items():
                self._to_each(methodcaller("goal", metric, goal))

    def _find_goals(self, trainer: Trainer) -> dict[str, Goal]:
        """Return what stands for the run of tricks' metrics, and of those that somebody follows, also where they are logged once more."""
        monitored: dict[str, Goal] = {}
        for callback in callbacks_of(trainer):
            monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
            if isinstance(monitor, str) and (mode == "min" or mode == "max"):  # noqa: PLR1714 -- which tells the type
                monitored[monitor] = mode
        followed, found = monitored | (self.goals or {}), dict[str, Goal]()
        for trick in _tricks(trainer):
            exhibits = trick._exhibits()
            found |= {f"{trick.log_prefix}/{key}": goal for key, goal in exhibits.goals.items()}
            found |= {f"{aside}/{key}": goal for aside in exhibits.asides for key, goal in followed.items()}
        return found | followed

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fitting = True
        self._curves = {
            f"{trick.log_prefix}/planned_{argument}": _curve(value, argument, trainer)
            for trick in _tricks(trainer)
            for argument, value in trick.arguments.items()
            if isinstance(value, Schedule) and value.metric is None
        }
        if self._origin:
            self._to_each(methodcaller("origin", self._origin))
        numbers = {f"{self.log_prefix}/tricks": float(len(_tricks(trainer)))}
        self._to_each(methodcaller("numbers", numbers, trainer.global_step))

    # After a fit

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        if not (self._fitting and self._trackers):
            return
        self._fitting = False
        step, facts, figures = trainer.global_step, dict[str, Any](), dict(self._curves)
        for trick in _tricks(trainer):
            exhibits, prefix = trick._exhibits(), trick.log_prefix
            facts |= {f"{prefix}/{key}": value for key, value in exhibits.facts.items()}
            figures |= {f"{prefix}/{key}": draw for key, draw in exhibits.figures.items()}
            for key, table in exhibits.tables.items():
                self._to_each(methodcaller("table", f"{prefix}/{key}", table, step))
            for files in exhibits.members if self.artifacts == "all" else ():
                self._to_each(partial(self._send, f"{prefix}-members", files, [files.alias]))
        self._to_each(methodcaller("facts", facts, step))
        if self.figures:
            self._show(figures, step)
        takers = [tracker for tracker in self._trackers if tracker.takes_checkpoints]
        if takers and self.artifacts != "none":
            for files, aliases in checkpoint_files(trainer.checkpoint_callbacks, self.artifacts, self.state_key):
                self._to_each(partial(self._send, "model", files, aliases), takers)

    def _show(self, figures: Mapping[str, Callable[[Path], None]], step: int) -> None:
        """Let each figure be drawn once, for all loggers."""
        if figures and find_spec("matplotlib") is None:
            rank_zero_info(f"{self!r} leaves out the pictures of {', '.join(figures)}: matplotlib, which draws them, is not installed.")
            return
        with TemporaryDirectory() as folder:
            for index, (key, draw) in enumerate(figures.items()):
                self._to_each(methodcaller("figure", key, draw, Path(folder, f"{index}.png"), step))

    def _send(self, kind: str, files: WeightFiles, aliases: Sequence[str], tracker: Tracker) -> None:
        """Send files of weights, unless this callback has sent them as they are to the same run."""
        written = [(path, path.stat().st_mtime_ns) for path in files.paths]
        sending = (tracker.run, kind, *written, *aliases)
        if sending not in self._sent:
            tracker.weights(kind, files, aliases)
            self._sent.add(sending)

    def _to_each(self, act: Callable[[Tracker], None], trackers: Sequence[Tracker] | None = None) -> None:
        """Do something for each logger; what one of them raises is no reason to stop a run."""
        for tracker in self._trackers if trackers is None else trackers:
            try:
                act(tracker)
            except Exception as error:  # noqa: BLE001 -- whatever a logger raises
                if not tracker.warned:
                    tracker.warned = True
                    found = f"{type(error).__name__}: {error}"
                    rank_zero_warn(f"{self!r} goes on without what {type(tracker.logger).__name__} did not take: {found}")

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        runs = [tracker.run for tracker in self._trackers if tracker.run is not None]
        write_entry(checkpoint, self.state_key, repr(self), {"weights": _weights(trainer), "runs": runs})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None:
            self._origin = list(entry["runs"])


def _tricks(trainer: Trainer) -> list[Trick]:
    """Return the callbacks of a run that do something to it, or find something out."""
    return [each for each in callbacks_of(trainer) if isinstance(each, Trick) and not isinstance(each, TrackingReport)]


def _weights(trainer: Trainer) -> Literal["averaged", "raw"] | None:
    """Return what a checkpoint's state dict holds; None where Lightning's own averages, which do not say so, may be in it."""
    if any(trick._exhibits().weights == "averaged" for trick in _tricks(trainer) if trick.evaluation_owner):
        return "averaged"
    return None if any(is_averaging_callback(callback) for callback in callbacks_of(trainer)) else "raw"


def _curve(schedule: Schedule, label: str, trainer: Trainer) -> Callable[[Path], None]:
    """Return what draws a schedule over the whole fit."""
    value = schedule._over_fit(trainer)

    def draw(path: Path) -> None:
        length = FitLength.of(trainer, [Duration.parse("fit", "100%")]).steps
        last = int(length) if 0 < length < math.inf else max(1, trainer.global_step)
        steps = sorted({round(index * (last - 1) / (_POINTS - 1)) for index in range(_POINTS)})
        draw_curves(path, steps=steps, curves={label: [value(step) for step in steps]}, label=label, title=repr(schedule))

    return draw


def _check_goals(goals: Mapping[str, Goal]) -> dict[str, Goal]:
    if not (isinstance(goals, Mapping) and all(isinstance(name, str) and name and "*" not in name for name in goals)):
        msg = f"`goals` must map whole names of metrics to what stands for the run, such as {{'val_acc': 'max'}}, got {goals!r}."
        raise ArgumentError(msg)
    return {name: check_choice(f"goals[{name!r}]", goal, GOALS) for name, goal in goals.items()}
