"""Fast geometric ensembles: after most of a training, short cycles of the learning rate lead from one good model to the next.

Minima of the loss are connected by paths along which it stays low. A trained network therefore need not be driven far, nor long, to
reach another one that makes different mistakes: cycles of a few epochs are enough, so that an ensemble fits into the budget of one
training.

Source: T. Garipov, P. Izmailov, D. Podoprikhin, D. Vetrov and A. G. Wilson, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of
DNNs", NeurIPS, 2018.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_tricks._core.checks import check_choice, check_pair
from lightning_tricks._core.clock import Duration, FitLength, plain_duration
from lightning_tricks._core.lightning import (
    STEP_OUTPUT,
    LightningModule,
    Trainer,
    callbacks_of,
    override,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_tricks.ensembling._counting import CountingEnsemble
from lightning_tricks.ensembling._cyclic_rates import CyclicRates
from lightning_tricks.errors import ArgumentError, TrickConflictError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_tricks.ensembling._combining import Combine, Output

__all__ = ["FastGeometricEnsemble", "cycle_middles", "geometric_rate"]

_SHARES = 0.5, 0.1  # of the base rate: those with which the paper's authors train residual networks


def geometric_rate(step: int, length: int, high: float, low: float) -> float:
    """Return the rate of the step after `step` others: from `high` down to `low` over half a cycle of `length` steps, and up again."""
    t = (step % length + 1) / length
    return (1 - 2 * t) * high + 2 * t * low if t <= 0.5 else (2 - 2 * t) * low + (2 * t - 1) * high


def cycle_middles(step: int, length: int) -> int:
    """Return of how many cycles of `length` the middle has been reached after `step` steps."""
    return (step + length // 2) // length


class FastGeometricEnsemble(CountingEnsemble):
    """Train as always for most of the fit, then cycle the learning rate fast, keep the weights where it is lowest, and evaluate them.

    From `start` on, step i of cycles of c steps is taken, with ``t(i) = (mod(i − 1, c) + 1)/c``, at the rate
    ``α(i) = (1 − 2t(i))·α₁ + 2t(i)·α₂`` for ``t(i) ≤ 1/2`` and ``α(i) = (2 − 2t(i))·α₂ + (2t(i) − 1)·α₁`` above. Members are the
    weights after the steps with ``t(i) = 1/2``.

    Reach for it in place of a `SnapshotEnsemble` when there is a good schedule already, which need not be given up, or a trained model
    with the state of its optimizer, which a checkpoint gives.

    Args:
        members: How many members are kept, the latest.
        start: Duration before the cycles begin, counted from the beginning of training; the module's own schedulers rule until then. A
            run resumed from a checkpoint that was made without this callback goes on where the checkpoint ends.
        cycle: Duration c of a cycle, an even number of steps; others than an ``int`` are rounded down to one. None = so that the last
            of `members` cycles is in its middle at the end of the fit.
        lr: The rates ``(α₁, α₂)`` of the group of the highest base rate; other groups keep their ratio to it. None = a half and a tenth of
            each group's own base rate.
        schedule: ``"triangular"`` takes the learning rate over from any scheduler of the module. None leaves it alone, for modules with
            cycles of their own; members are taken at the same steps.
        combine: What `forward` returns in evaluation: ``"probabilities"`` the logarithm of the members' mean probabilities, whose
            argmax and cross-entropy are the ensemble's; ``"logits"`` the mean logits; ``"vote"`` the majority vote, in which the mean
            probability decides between equals; ``"mean"`` the mean, for regression.
        output: What `forward` returns: ``"logits"`` or ``"probabilities"``.
        class_dim: Dimension of the classes in it. If it has size 1, or there is none, the logit is that of a sigmoid.
        target: Name of the submodule that answers for all members, where the steps call that in place of the module; None = the
            module itself.
        weights: ``"current"`` makes members of the weights as they are trained; ``"average"`` of those that an averaging callback in the
            list keeps, which must not evaluate itself: ``EMA(evaluate=False)``.
        refresh_batch_norm: Number of training batches of each rank, or ``"all"``, over which BatchNorm's statistics are measured for each
            member as it is taken; None = those of training. Averaged weights need it.
        evaluate: Whether validation, test and predict use the ensemble. ``"members"`` also validates each member, and logs its metrics
            under ``member_0/``, ..., where checkpointing and early stopping do not see them.
        measure: Whether to log `metrics.EnsembleMeasures` in validation and test.
        item: Index or key of the labels in a batch; None = the second of a tuple or list, or ``"labels"``, ``"label"``, ``"targets"``,
            ``"target"`` or ``"y"`` of a dict, if that fits the predictions.
        memory: ``"cpu"`` keeps members in main memory, too; ``"disk"`` reads them for each prediction.
        dirpath: Folder for members; None = ``fast_geometric_ensemble`` (with a `name`, ``fast_geometric_ensemble_<name>``) beside
            Lightning's ``checkpoints``. All ranks must reach it.
        name: Tells several callbacks apart, in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if `target` names no module, or there is no BatchNorm to refresh.
        TrickConflictError: At setup, if another callback also replaces what evaluation uses, cycles learning rates, or several average.
        TrickError: At setup, with ``weights="average"`` and no callback that averages; when training starts, if the fit's length is
            needed and unknown; in an evaluation, if `target` is never called, or returns anything but a tensor.
        UnsupportedStrategyError: At setup, under FSDP1 and DeepSpeed.
        UnsupportedOptimizerError: When training starts, if no parameter group has a learning rate.
        CheckpointError: On loading a checkpoint, if a member's file is missing, altered, or of another model.

    Note:
        Members answer from the middle of the first cycle on; before, and where there are none, the model is evaluated as it is. The
        module always holds the weights of training, and so does ``checkpoint["state_dict"]``; the checkpoint names the members' files
        with their digests. `to_ensemble` makes one module of them.

        Cycles go on from the weights and the state of the optimizer at `start`; neither is ever reset. From then on, the module's
        schedulers are stepped no more, those of `OptimizerFactory` included. Steps are optimizer steps that are really taken; with
        several optimizers those of the first count, and all follow the cycle.

        Works on a single device, under DDP, under FSDP2, where each rank writes and lends its own shards, and with ``torch.compile``.

    References:
        T. Garipov, P. Izmailov, D. Podoprikhin, D. Vetrov and A. G. Wilson, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of
        DNNs", NeurIPS, 2018. Their code begins after 80 % of the epochs and takes, for residual networks with a base rate of 0.1, cycles
        of 2 epochs with ``α₁ = 0.05`` and ``α₂ = 0.01``. Differs from the paper in that cycles are as long as the rest of the fit allows,
        unless `cycle` says otherwise.

    Example:
        >>> FastGeometricEnsemble(6, start="80%", cycle="2 epochs", lr=(0.05, 0.01))
        FastGeometricEnsemble(members=6, start='80%', cycle='2 epochs', lr=(0.05, 0.01))
    """

    def __init__(
        self,
        members: int = 5,
        *,
        start: int | str = "75%",
        cycle: int | str | None = None,
        lr: Sequence[float] | None = None,
        schedule: Literal["triangular"] | None = "triangular",
        combine: Combine = "probabilities",
        output: Output = "logits",
        class_dim: int = -1,
        target: str | None = None,
        weights: Literal["current", "average"] = "current",
        refresh_batch_norm: int | Literal["all"] | None = None,
        evaluate: bool | Literal["members"] = True,
        measure: bool = True,
        item: int | str | None = None,
        memory: Literal["cpu", "disk"] = "cpu",
        dirpath: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            members=members,
            combine=combine,
            output=output,
            class_dim=class_dim,
            target=target,
            weights=weights,
            refresh_batch_norm=refresh_batch_norm,
            evaluate=evaluate,
            measure=measure,
            item=item,
            memory=memory,
            dirpath=dirpath,
            name=name,
        )
        self._start, self.start = Duration.parse("start", start), plain_duration(start)
        self._cycle = None if cycle is None else Duration.parse("cycle", cycle, least=1)
        self.cycle = None if cycle is None else plain_duration(cycle)
        if self._cycle is not None and self._cycle.unit == "steps" and self._cycle.amount % 2:
            msg = f"`cycle` must be an even number of steps, in whose middle a member is taken, got {cycle!r}."
            raise ArgumentError(msg)
        self.lr = None if lr is None else check_pair("lr", lr, ("(0, ∞)", "[0, ∞)"))
        if self.lr is not None and self.lr[1] > self.lr[0]:
            msg = f"`lr` must be the highest and then the lowest rate of a cycle, such as (0.05, 0.01), got {lr!r}."
            raise ArgumentError(msg)
        self.schedule = check_choice("schedule", schedule, ("triangular", None))
        if self.schedule is None and self.lr is not None:
            msg = f"`lr` must be None where `schedule=None` leaves the learning rate alone, got {lr!r}."
            raise ArgumentError(msg)
        self._rates = CyclicRates()
        self._steps = math.inf  # of the fit, once resolved
        self._begin, self._length = 0, 2  # the steps before the cycles and those of one, once resolved
        self._taken = 0  # middles of cycles, after the latest batch
        self._rate = 0.0  # with which the latest batch was trained

    @override
    def _quantities(self) -> dict[str, float]:
        return {**super()._quantities(), "lr": self._rate}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.schedule is None:
            return
        for other in callbacks_of(trainer):
            cycles = isinstance(other, FastGeometricEnsemble) and other.schedule is not None
            if other is not self and (
                cycles or (getattr(other, "sets_rates", False) and not getattr(other, "configures_optimizers", False))
            ):
                msg = f"{self!r} and {other!r} both set the learning rates. Keep one, or pass `schedule=None` to one."
                raise TrickConflictError(msg)
        if stage == "fit":
            self._patches.wrap(pl_module, "lr_scheduler_step", lambda step: partial(self._step_scheduler, step))

    def _step_scheduler(self, step: Callable[..., None], *arguments: Any) -> None:
        if self._rates.steps < self._begin:
            step(*arguments)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.schedule is not None and trainer.lr_scheduler_configs:
            kinds = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
            after = f"after {self._begin} steps"
            rank_zero_info(f"{self!r} takes the learning rates over from {kinds} of {type(pl_module).__name__} {after}.")

    @override
    def _resolve(self, trainer: Trainer) -> None:
        steps, begin = FitLength.of(trainer, [Duration(100, "%")]).steps, self._start.steps("start", trainer)
        if self._cycle is None and math.isinf(steps):
            msg = (
                f"{self!r} divides the rest of the fit into cycles, and this fit has no known length. Pass `cycle`, or set `max_steps` or "
                "`limit_train_batches` of the Trainer."
            )
            raise TrickError(msg)
        half = (steps - begin) // (2 * self.members - 1) if self._cycle is None else self._cycle.steps("cycle", trainer) // 2
        self._steps, self._begin, self._length = steps, begin, 2 * max(1, int(half))
        self._taken = self._middles()
        possible = math.inf if math.isinf(steps) else cycle_middles(max(0, int(steps) - begin), self._length)
        if possible < self.members:
            rank_zero_warn(
                f"{self!r} takes {possible} members rather than {self.members}: the fit has {steps:g} steps, of which the cycles of "
                f"{self._length} begin after {begin}. Train longer, or choose an earlier `start` or a shorter `cycle`."
            )

    def _middles(self, more: int = 0) -> int:
        return cycle_middles(max(0, self._rates.steps + more - self._begin), self._length)

    @override
    def _factor(self) -> Callable[[int], float | None] | None:
        if self.schedule is None:
            return None
        high, low = _SHARES if self.lr is None else (1.0, self.lr[1] / self.lr[0])
        begin, length = self._begin, self._length
        return lambda step: None if step < begin else geometric_rate(step - begin, length, high, low)

    @override
    def _highest(self) -> float | None:
        return None if self.lr is None else self.lr[0]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._rate = self._rates.rate

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        skipped = self._skipped(trainer, self._steps)
        taken = self._middles(skipped * (4 * skipped < self._length))  # a last descent that lacks a few steps is one
        if taken > self._taken:
            self._taken = taken
            self._collect(trainer, pl_module, {"step": self._rates.steps, "cycle": taken})
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
