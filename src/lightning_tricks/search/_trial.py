"""One training of a study: seeded, with its data in the seed's order, timed, and scored."""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import random
import signal
import statistics
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_tricks._core.draws import fold
from lightning_tricks._core.lightning import (
    Callback,
    LightningModule,
    Trainer,
    callbacks_of,
    override,
    seed_process,
)
from lightning_tricks._core.seeding import unseeded
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_tricks.search._configuration import Built

__all__ = ["Outcome", "aside", "check_metric", "quieted", "run_trial"]

_WARM_UP = 3  # steps whose time is that of first allocations and compilations


@dataclass(frozen=True)
class Outcome:
    """What one training came to.

    Attributes:
        metrics: All metrics of the evaluation after the fit.
        step_time: Median time of a training step in seconds, its callbacks included; None for fewer than five steps.
        memory: Bytes that the training took at its peak beyond what was taken before it: allocated on the accelerator, or resident in the
            process; None where it cannot be known.
        seconds: Time of the fit.
        error: What stopped it; None = nothing.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    step_time: float | None = None
    memory: int | None = None
    seconds: float = 0.0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for a file."""
        return asdict(self)


def run_trial(build: Callable[[], Built], callbacks: Sequence[Callback], *, seed: int, metric: str, test: bool) -> Outcome:
    """Train and evaluate once; random numbers and signals of the caller are afterwards as they were.

    Two trainings with one seed share the order of the data, the weights that their modules are made with, and the random numbers at the
    start of each batch, whatever their callbacks draw. Weights that a callback adds or draws anew are its own.

    Args:
        build: Makes the module, the data and the Trainer.
        callbacks: Added to the Trainer's, as copies.
        seed: From which initial weights and the order of the data follow, whatever else draws random numbers.
        metric: The metric asked for.
        test: Whether the test set evaluates, and not the validation set.

    Raises:
        ArgumentError: If the evaluation logs no such metric.
        KeyboardInterrupt: If the training or the evaluation was interrupted.
        SystemExit: If the module, the data or a callback exits.
    """
    with aside():
        seed_process(seed)
        meter = Meter(seed)
        module, datamodule, trainer = build()
        callbacks_of(trainer).extend([*copy.deepcopy(list(callbacks)), meter])  # the meter at last: it draws anew after all others
        begin = time.perf_counter()
        try:
            trainer.fit(module, datamodule=datamodule)
            seconds = time.perf_counter() - begin
            if trainer.interrupted:
                raise KeyboardInterrupt
            return Outcome(_evaluate(module, datamodule, trainer, metric, test=test), meter.step_time, meter.memory, seconds)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt) or trainer.received_sigterm:  # then Lightning exits
                raise KeyboardInterrupt from None
            raise


def check_metric(build: Callable[[], Built], *, seed: int, metric: str, test: bool) -> None:
    """Evaluate one batch before anything is trained, to see that the metric is logged.

    Raises:
        ArgumentError: If it is not.
    """
    with aside():
        seed_process(seed)
        module, datamodule, trainer = build()
        trainer.limit_val_batches = trainer.limit_test_batches = 1
        trainer.loggers = []
        _evaluate(module, datamodule, trainer, metric, test=test)


def _evaluate(module: LightningModule, datamodule: Any, trainer: Trainer, metric: str, *, test: bool) -> dict[str, float]:
    evaluate = trainer.test if test else trainer.validate
    evaluate(module, datamodule=datamodule, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if torch.as_tensor(value).numel() == 1}
    if metric not in metrics:
        step, there = "test_step" if test else "validation_step", ", ".join(metrics) or "none"
        msg = f"`metric` must be logged by {step}, got {metric!r}; logged are: {there}."
        raise ArgumentError(msg)
    return metrics


@contextmanager
def aside() -> Iterator[None]:
    """Leave random numbers, signals, the environment and the loudness of Lightning as they were."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        with unseeded(), quieted("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
            yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)  # which Lightning ignores once it was interrupted


@contextmanager
def quieted(*names: str, level: int = logging.WARNING) -> Iterator[None]:
    """Let loggers tell nothing below a level."""
    before = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in before:
        logger.setLevel(max(logger.level, level))
    try:
        yield
    finally:
        for logger, own in before.items():
            logger.setLevel(own)


class Meter(Callback):
    """Times steps, follows the memory, and sets the random numbers wherever data is about to be drawn.

    With that, tricks that draw from the global generators change neither the order of the data nor what is drawn for later batches. It
    must be the last callback.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.times: list[float] = []
        self.memory: int | None = None
        self._began: float | None = None
        self._before: int | None = None

    @property
    def step_time(self) -> float | None:
        """The median time of a step."""
        return statistics.median(self.times[_WARM_UP:]) if len(self.times) > _WARM_UP + 1 else None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._before = _reset_peak(trainer.strategy.root_device)
            self._draw_anew(0)  # modules may make layers in `configure_model`

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_anew(1)  # the loader is made next, and its workers begin

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_anew(2, trainer.current_epoch)  # the order of the epoch is drawn next

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._began is not None:
            self.times.append(now - self._began)
        self._began = now
        self._draw_anew(3, trainer.current_epoch, batch_idx)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._draw_anew(4, trainer.current_epoch, batch_idx)  # the next batch is made, which may augment it

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = None  # what follows is no step
        self._draw_anew(6, trainer.global_step)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_anew(6, trainer.global_step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_anew(5, trainer.global_step)  # training goes on

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peak = _peak(trainer.strategy.root_device)
        self.memory = None if peak is None or self._before is None else peak - self._before

    def _draw_anew(self, *moment: int) -> None:
        seed = fold(self.seed, *moment)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 -- data sets draw from it
        random.seed(seed)


def _reset_peak(device: torch.device) -> int | None:
    """Let the peak begin at what is taken now, and return that."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    control = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        control.write_text("5")
    except (AttributeError, OSError, TypeError):  # another C library or system, or one where the process may not write there
        return None
    return _resident("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(what: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), None)
