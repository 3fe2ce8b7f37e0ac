"""One training of a study: seeded, with its data in the seed's order, timed, and scored."""

from __future__ import annotations

import copy
import random
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_tricks._core.draws import fold
from lightning_tricks._core.lightning import Callback, LightningModule, Trainer, callbacks_of, override, seed_everything
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_tricks.search._configuration import Built

__all__ = ["Outcome", "run_trial"]

_WARM_UP = 3  # steps whose time is that of first allocations and compilations


@dataclass(frozen=True)
class Outcome:
    """What one training came to.

    Attributes:
        metrics: All metrics of the evaluation after the fit.
        step_time: Median time of a training step in seconds, its callbacks included; None for fewer than five steps.
        memory: Peak of the memory in bytes: allocated on the accelerator, or resident of the process; None where it cannot be known.
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
    """Train and evaluate once.

    Args:
        build: Makes the module, the data and the Trainer.
        callbacks: Added to the Trainer's, as copies.
        seed: From which initial weights and the order of the data follow, whatever else draws random numbers.
        metric: The metric asked for.
        test: Whether the test set evaluates, and not the validation set.

    Raises:
        ArgumentError: If the evaluation logs no such metric.
    """
    seed_everything(seed, workers=True)
    module, datamodule, trainer = build()
    meter = Meter(seed)
    callbacks_of(trainer)[:0] = [meter, *copy.deepcopy(list(callbacks))]
    begin = time.perf_counter()
    trainer.fit(module, datamodule=datamodule)
    seconds = time.perf_counter() - begin
    if trainer.interrupted:
        raise KeyboardInterrupt
    evaluate = trainer.test if test else trainer.validate
    evaluate(module, datamodule=datamodule, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if torch.as_tensor(value).numel() == 1}
    if metric not in metrics:
        step, there = "test_step" if test else "validation_step", ", ".join(metrics) or "none"
        msg = f"`metric` must be logged by {step}, got {metric!r}; logged are: {there}."
        raise ArgumentError(msg)
    return Outcome(metrics, meter.step_time, meter.memory, seconds)


class Meter(Callback):
    """Times steps, follows the memory, and sets the random numbers at the start of each epoch, so that tricks that draw change no order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.times: list[float] = []
        self.memory: int | None = None
        self._began: float | None = None

    @property
    def step_time(self) -> float | None:
        """The median time of a step."""
        return statistics.median(self.times[_WARM_UP:]) if len(self.times) > _WARM_UP + 1 else None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _reset_peak(pl_module.device)
        self._draw_anew(0)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_anew(trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = None  # what follows is no step
        self._draw_anew(trainer.current_epoch + 1)  # the loader draws its order before the next epoch's hooks

    def _draw_anew(self, epoch: int) -> None:
        seed = fold(self.seed, epoch)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 -- data sets draw from it
        random.seed(seed)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._began is not None:
            self.times.append(now - self._began)
        self._began = now

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memory = _peak(pl_module.device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (control := Path("/proc/self/clear_refs")).exists():
        try:
            control.write_text("5")
        except OSError:  # where the process may not write there, the peak is that of the whole process
            return


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
