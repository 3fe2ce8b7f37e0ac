"""Leaving out the steps of an optimizer whose loss or gradient is an outlier.

A single bad batch, or a bad moment of the optimizer, makes a gradient that is far larger than the others. Clipping bounds how far the
weights go then, and lets them go the wrong way; it can do nothing about values that are not finite. Leaving such a step out costs one
batch, and leaves weights and optimizer as they were.

Source: A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", JMLR, 2023, section 5.1, skips the batches around a spike
after restarting from a checkpoint; F. R. Hampel, "The Influence Curve and its Role in Robust Estimation", JASA, 1974, for the median
absolute deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import LBFGS, Optimizer

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_choice, check_count, check_in_interval
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, callbacks_of, logs_now, override, rank_zero_info
from lightning_tricks._core.strategies import own_part, refuse_strategies
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import ArgumentError, TrickConflictError, TrickError, UnsupportedOptimizerError
from lightning_tricks.optimization._gradients import total_norm
from lightning_tricks.optimization._guarding import GuardedStep
from lightning_tricks.optimization._spikes import QUANTITIES, Quantity, SpikeWindow

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LossSpikeGuard"]

_UNSUPPORTED = {
    "FSDPStrategy": "FSDP1 keeps gradients in flat tensors, of which each rank has pieces; FSDP2 (ModelParallelStrategy) works",
    "DeepSpeedStrategy": "the engine keeps its own copies of weights and gradients and updates them by itself",
}
_PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Return the Euclidean norm of all gradients of an optimizer, of whole tensors on every rank; 0 if there are none.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norm(torch.optim.SGD([weight], lr=0.1))
        tensor(5.)
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    precise = [value if value.dtype in _PRECISE else value.float() for value in values]  # the norm might overflow in float16
    return total_norm(precise).float() if precise else torch.zeros((), device=parameters[0].device)


class _Statistics:
    """A copy of the running statistics of a model's normalization layers."""

    def __init__(self, model: nn.Module) -> None:
        layers = (module for module in model.modules() if isinstance(module, _NormBase))
        self._live = [own_part(buffer) for layer in layers for buffer in layer.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    def keep(self) -> None:
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def bring_back(self) -> None:
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


class _Guard:
    """What the guard knows of one optimizer, and its hold on it."""

    def __init__(self, optimizer: Optimizer, window: SpikeWindow) -> None:
        self.optimizer, self.window = optimizer, window
        self.norm: Tensor | None = None  # of gradients that are not clipped yet
        self.first: dict[str, float] = {}  # values of the first evaluation in a step
        self.in_a_row = 0
        self.step: GuardedStep | None = None


class LossSpikeGuard(Trick):
    """Leave out the steps of an optimizer whose loss or gradient norm is an outlier among those of the latest steps.

    With the median m of the values x of the latest accepted steps, and their median absolute deviation MAD from it, a step is left out if

    ``x > m + k · max(1.4826 · MAD, 0.01 · |m|)``, or if x is not finite.

    Small values are never outliers. Reach for it in long runs that a bad batch now and then, or a value that is not finite, would spoil.

    Args:
        threshold: The threshold k, in (0, ∞): in standard deviations, if values were normal. They are not: where a network fits nearly
            all of its data, single samples have gradients dozens of deviations above the median, and the default lets them pass. Less
            suits runs whose values vary little. The last term stands for the deviation where values do not vary.
        window: How many accepted steps values are held against, at least 2. Until there are as many, or 20, only values that are
            not finite are outliers.
        watch: ``"grad_norm"``, the norm of the gradients of all parameters of the optimizer, before clipping; ``"loss"``, the loss that
            is differentiated, of all accumulated batches and ranks; or both, of which one is enough.
        patience: After how many steps left out in a row training ends with an error, at least 1.
        name: Names it in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickConflictError: At setup, if there are two of them.
        TrickError: At setup, if the loss is watched in manual optimization. In training, if `patience` is exhausted.
        UnsupportedStrategyError: At setup, under DeepSpeed and FSDP1.
        UnsupportedOptimizerError: When the fit starts, if an optimizer is LBFGS or no ``torch.optim.Optimizer``.

    Note:
        A step that is left out moves no weights, and nothing of the optimizer: no momentum, no decay, no wrapper's count. The running
        statistics of BatchNorm and InstanceNorm return to what they were before its batches. Whatever counts steps by the optimizer,
        such as averages, does not count it, as with steps that a gradient scaler skips. Lightning does: ``trainer.global_step``,
        ``max_steps`` and the Trainer's learning-rate schedules go on, and so does the data.

        With several optimizers each has its own window. All ranks decide alike, by values averaged over them. Where an optimizer
        evaluates its closure several times in a step, as `optim.SAM` does, each evaluation can reject the step, and the values of the
        first enter the window. A step that an fp16 scaler skips is none, and neither judged nor counted here.

        Each step reads values from the device once, and communicates them once if there are several ranks. The checkpoint holds the
        windows and counts, so that runs resume exactly.

    References:
        - A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", JMLR, 2023. Differs from the paper, which goes back to an
          earlier checkpoint by hand and leaves out some hundreds of batches: no weights go back here.
        - F. R. Hampel, "The Influence Curve and its Role in Robust Estimation", JASA, 1974. The median absolute deviation.

    Example:
        >>> LossSpikeGuard(8.0, watch=["loss", "grad_norm"], patience=5)
        LossSpikeGuard(threshold=8.0, watch=('loss', 'grad_norm'), patience=5)
    """

    def __init__(
        self,
        threshold: float = 100.0,
        *,
        window: int = 100,
        watch: Quantity | Sequence[Quantity] = "grad_norm",
        patience: int = 10,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.threshold = float(check_in_interval("threshold", threshold, "(0, ∞)"))
        self.window = check_count("window", window, least=2)
        self.watch = _check_watch(watch)
        self.patience = check_count("patience", patience)
        self._quantities: tuple[Quantity, ...] = self.watch if isinstance(self.watch, tuple) else (self.watch,)
        self._guards: list[_Guard] = []
        self._forget()

    def _forget(self) -> None:
        self._skipped = 0
        self._restored: list[dict[str, Any]] = []  # of each optimizer, by the checkpoint
        self._loss: Tensor | None = None  # of the batches of this step
        self._statistics: _Statistics | None = None

    @property
    def skipped(self) -> int:
        """How many steps have been left out in this fit, and in the runs that it resumes."""
        return self._skipped

    # Before a fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for other in callbacks_of(trainer):
            if isinstance(other, LossSpikeGuard) and other is not self:
                msg = f"{self!r} and {other!r} would judge the same steps. Keep one, which can watch loss and gradient norm both."
                raise TrickConflictError(msg)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_strategies(trainer, repr(self), _UNSUPPORTED)
        if "loss" in self._quantities and not pl_module.automatic_optimization:
            msg = (
                f"{self!r} watches the loss of each step, and {type(pl_module).__name__} optimizes manually, where nothing tells which "
                "loss belongs to which step. Pass `watch='grad_norm'`."
            )
            raise TrickError(msg)
        self._detach()
        self._guards = []
        self._forget()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)
        self._statistics = _Statistics(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._statistics = _Statistics(pl_module)  # layers may have been replaced

    def _attach(self, trainer: Trainer) -> None:
        """Guard the optimizers that there are now."""
        states = [_state_of(guard) for guard in self._guards] or self._restored
        self._detach()
        self._guards = [_Guard(optimizer, SpikeWindow(self._quantities, self.window, self.threshold)) for optimizer in trainer.optimizers]
        for index, guard in enumerate(self._guards):
            if len(states) == len(self._guards):
                guard.window.load_state_dict(states[index]["values"])
                guard.in_a_row = states[index]["in_a_row"]
            if not isinstance(guard.optimizer, Optimizer) or isinstance(guard.optimizer, LBFGS):
                msg = (
                    f"{self!r} leaves out steps before they move anything, and {type(guard.optimizer).__name__} "
                    f"{'moves weights between its evaluations' if isinstance(guard.optimizer, Optimizer) else 'is no torch optimizer'}. "
                    "Use another optimizer, or remove the callback."
                )
                raise UnsupportedOptimizerError(msg)
            guard.step = GuardedStep(
                guard.optimizer, partial(self._rejects, trainer, guard), partial(self._accept, guard), partial(self._skip, guard)
            )

    def _detach(self) -> None:
        for guard in self._guards:
            if guard.step is not None:
                guard.step.remove()
                guard.step = None

    # During a fit

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if [id(guard.optimizer) for guard in self._guards] != [id(optimizer) for optimizer in trainer.optimizers]:
            self._attach(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0:  # a step begins, as Lightning clears gradients now
            self._loss = None
            if self._statistics is not None:
                self._statistics.keep()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if "loss" not in self._quantities:
            return
        loss = loss.detach().float()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        self._loss = loss if self._loss is None else self._loss + loss

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for guard in self._guards:
            if guard.optimizer is optimizer and "grad_norm" in self._quantities:
                guard.norm = gradient_norm(optimizer)

    def _rejects(self, trainer: Trainer, guard: _Guard) -> bool:
        values = self._values(trainer, guard)
        guard.first = guard.first or values
        outliers = guard.window.outliers(values)
        if not outliers:
            return False
        found = " and ".join(f"{name} {values[name]:.4g} where {guard.window.limits[name]:.4g} is the limit" for name in outliers)
        guard.in_a_row += 1
        if guard.in_a_row >= self.patience:
            msg = (
                f"{self!r} has left out {guard.in_a_row} steps in a row, more than which `patience` does not allow: the latest had "
                f"{found}. Lower the learning rate or look for what is wrong with the data; if training goes as it should, pass a higher "
                "`threshold`."
            )
            raise TrickError(msg)
        rank_zero_info(f"{self!r} leaves a step out: {found}.")
        return True

    def _values(self, trainer: Trainer, guard: _Guard) -> dict[str, float]:
        """Return what is watched, averaged over ranks, which must all call this."""
        found: dict[Quantity, Tensor] = {}
        if "loss" in self._quantities:
            found["loss"] = torch.zeros(()) if self._loss is None else self._loss
        if "grad_norm" in self._quantities:
            norm = gradient_norm(guard.optimizer) if guard.norm is None else guard.norm
            scale = getattr(guard.optimizer, "grad_scale", None)  # by which a fused optimizer will divide in its kernel
            found["grad_norm"] = norm if scale is None else norm / scale
        self._loss = guard.norm = None
        together = torch.stack([found[name].to(trainer.strategy.root_device) for name in self._quantities])
        averaged: Any = trainer.strategy.reduce(together, reduce_op="mean")
        return dict(zip(self._quantities, averaged.tolist(), strict=True))

    def _accept(self, guard: _Guard) -> None:
        guard.window.accept(guard.first)
        guard.first, guard.in_a_row = {}, 0

    def _skip(self, guard: _Guard) -> None:
        guard.first = {}
        self._skipped += 1
        if self._statistics is not None:
            self._statistics.bring_back()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer):
            pl_module.log_dict({f"{self.log_prefix}/{key}": value for key, value in self._logged().items()})

    def _logged(self) -> dict[str, float]:
        logged = {"skipped": float(self._skipped)}
        for index, guard in enumerate(self._guards):
            suffix = f"_{index}" if len(self._guards) > 1 else ""
            logged |= {f"{name}{suffix}": value for name, value in guard.window.latest.items()}
            logged |= {f"{name}_limit{suffix}": limit for name, limit in guard.window.limits.items() if isfinite(limit)}
        return logged

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = [_state_of(guard) for guard in self._guards]
        write_entry(checkpoint, self.state_key, repr(self), {"skipped": self._skipped, "optimizers": states})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None:
            self._skipped, self._restored = entry["skipped"], list(entry["optimizers"])


def _state_of(guard: _Guard) -> Mapping[str, Any]:
    return {"values": guard.window.state_dict(), "in_a_row": guard.in_a_row}


def _check_watch(watch: Quantity | Sequence[Quantity]) -> Quantity | tuple[Quantity, ...]:
    if isinstance(watch, str) or not isinstance(watch, Sequence):
        return check_choice("watch", watch, QUANTITIES)
    if not watch:
        msg = f"`watch` must name at least one of {', '.join(map(repr, QUANTITIES))}, got {watch!r}."
        raise ArgumentError(msg)
    return tuple(check_choice("watch", cast("Quantity", quantity), QUANTITIES) for quantity in watch)
