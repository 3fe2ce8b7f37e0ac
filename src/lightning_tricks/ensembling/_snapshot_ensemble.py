"""Snapshot ensembles: the members come from one run, each from the end of a cycle of the learning rate.

A learning rate that falls to zero lets the weights settle in a minimum; raised again at once, it drives them out, to another one nearby.
The minima at the ends of such cycles make different mistakes, so that their mean prediction is better than that of the last, at the cost
of one training.

Source: G. Huang, Y. Li, G. Pleiss, Z. Liu, J. E. Hopcroft and K. Q. Weinberger, "Snapshot Ensembles: Train 1, Get M for Free", ICLR, 2017.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_tricks._core.checks import check_choice, check_count, check_in_interval
from lightning_tricks._core.clock import Duration, FitLength
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, override, rank_zero_info, rank_zero_warn
from lightning_tricks.ensembling._counting import CountingEnsemble
from lightning_tricks.ensembling._cyclic_rates import CyclicRates
from lightning_tricks.errors import ArgumentError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_tricks.ensembling._combining import Combine, Output

__all__ = ["SnapshotEnsemble", "cycle_ends", "snapshot_factor"]


def snapshot_factor(step: int, length: int) -> float:
    """Return what share of the base rate the step after `step` others is taken with: ``1/2 · (cos(π · mod(step, L)/L) + 1)``."""
    return (math.cos(math.pi * (step % length) / length) + 1) / 2


def cycle_ends(step: int, length: int, steps: int) -> int:
    """Return how many cycles of `length` have ended after `step` of `steps` steps; the end of the run ends one, too."""
    return step // length + (step >= steps and steps % length > 0)


class SnapshotEnsemble(CountingEnsemble):
    """Train one model with a cyclic learning rate, keep the weights at the end of each cycle, and evaluate them as one ensemble.

    Step t of T is taken, in each parameter group of base rate ``α₀``, with
    ``α(t) = α₀/2 · (cos(π · mod(t − 1, ⌈T/M⌉)/⌈T/M⌉) + 1)`` for M cycles.

    Reach for it when an ensemble would help, as on small data sets or where probabilities matter, and several trainings cost too much.

    Args:
        members: How many members are kept, the latest.
        cycles: Number M of cycles in the fit; None = as many as `members`.
        restart_lr: The rate ``α₀`` at which cycles begin in the group of the highest base rate; other groups keep their ratio to it.
            None = each group's own.
        schedule: ``"cosine"`` takes the learning rate over from any scheduler of the module. None leaves it alone, for modules with
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
        measure: Whether to log `metrics.EnsembleMeasures` in validation and test: disagreement, diversity, entropy, mutual information
            and, with labels, negative log-likelihood, Brier score and calibration error; for regression variance and error.
        item: Index or key of the labels in a batch; None = the second of a tuple or list, or ``"labels"``, ``"label"``, ``"targets"``,
            ``"target"`` or ``"y"`` of a dict, if that fits the predictions.
        memory: ``"cpu"`` keeps members in main memory, too; ``"disk"`` reads them for each prediction.
        dirpath: Folder for members; None = ``snapshot_ensemble`` (with a `name`, ``snapshot_ensemble_<name>``) beside Lightning's
            ``checkpoints``. All ranks must reach it.
        name: Tells several callbacks apart, in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if `target` names no module, or there is no BatchNorm to refresh.
        TrickConflictError: At setup, if another callback also replaces what evaluation uses or sets learning rates, or several average.
        TrickError: At setup, with ``weights="average"`` and no callback that averages; when training starts, if the fit's length is
            unknown; in an evaluation, if `target` is never called, or returns anything but a tensor.
        UnsupportedStrategyError: At setup, under FSDP1 and DeepSpeed.
        UnsupportedOptimizerError: When training starts, if no parameter group has a learning rate.
        CheckpointError: On loading a checkpoint, if a member's file is missing, altered, or of another model.

    Note:
        Members answer from the end of the first cycle on; before, and where there are none, the model is evaluated as it is. The
        current weights do not count, since in the middle of a cycle they are worse than at its end. The module always holds the
        weights of training, and so does ``checkpoint["state_dict"]``; the checkpoint names the members' files with their digests.
        `to_ensemble` makes one module of them.

        Steps are optimizer steps that are really taken; with several optimizers those of the first count, and all follow the cycle.
        The optimizer's state is never reset. A fit that is stopped early loses its last cycle. Each evaluation costs as many forward
        passes as there are members.

        Works on a single device, under DDP, under FSDP2, where each rank writes and lends its own shards, and with ``torch.compile``.

    References:
        G. Huang, Y. Li, G. Pleiss, Z. Liu, J. E. Hopcroft and K. Q. Weinberger, "Snapshot Ensembles: Train 1, Get M for Free", ICLR, 2017.

    Example:
        >>> SnapshotEnsemble(4, cycles=6, restart_lr=0.2)
        SnapshotEnsemble(members=4, cycles=6, restart_lr=0.2)
    """

    def __init__(
        self,
        members: int = 5,
        *,
        cycles: int | None = None,
        restart_lr: float | None = None,
        schedule: Literal["cosine"] | None = "cosine",
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
        self.cycles = None if cycles is None else check_count("cycles", cycles)
        if self.cycles is not None and self.cycles < self.members:
            msg = f"`cycles` must be at least `members`, each of which takes one, got cycles={cycles!r} and members={members!r}."
            raise ArgumentError(msg)
        self.restart_lr = None if restart_lr is None else check_in_interval("restart_lr", restart_lr, "(0, ∞)")
        self.schedule = check_choice("schedule", schedule, ("cosine", None))
        if self.schedule is None and self.restart_lr is not None:
            msg = f"`restart_lr` must be None where `schedule=None` leaves the learning rate alone, got {restart_lr!r}."
            raise ArgumentError(msg)
        self._rates = CyclicRates()
        self._steps = self._length = 1  # of the fit and of a cycle, once resolved
        self._ended = 0  # cycles, after the latest batch
        self._rate = 0.0  # with which the latest batch was trained
        self._silent: list[Any] = []  # the module's schedulers

    @property
    @override
    def sets_rates(self) -> bool:
        return self.schedule is not None

    @override
    def _quantities(self) -> dict[str, float]:
        return {**super()._quantities(), "lr": self._rate}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.schedule is not None:
            self._silent = []
            self._patches.wrap(pl_module, "lr_scheduler_step", lambda step: partial(self._step_scheduler, step))

    def _step_scheduler(self, step: Callable[..., None], scheduler: Any, metric: Any) -> None:
        if not any(scheduler is each for each in self._silent):  # one that searches for a rate before the fit is not the module's
            step(scheduler, metric)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._silent = [config.scheduler for config in trainer.lr_scheduler_configs]
        if self.schedule is not None and self._silent:
            kinds = ", ".join(type(scheduler).__name__ for scheduler in self._silent)
            rank_zero_info(f"{self!r} takes the learning rates over from {kinds} of {type(pl_module).__name__}.")

    @override
    def _resolve(self, trainer: Trainer) -> None:
        steps, cycles = FitLength.of(trainer, [Duration(100, "%")]).steps, self.cycles or self.members
        if math.isinf(steps):
            msg = (
                f"{self!r} divides the fit into cycles, and this fit has no known length. Set `max_steps` or `limit_train_batches` of the "
                "Trainer."
            )
            raise TrickError(msg)
        self._steps = max(1, int(steps))
        self._length = math.ceil(self._steps / cycles)
        self._ended = cycle_ends(self._rates.steps, self._length, self._steps)
        possible = cycle_ends(self._steps, self._length, self._steps)
        if possible < cycles:
            rank_zero_warn(
                f"{self!r} makes {possible} cycles of {self._length} steps rather than {cycles}: the fit has {self._steps} steps. "
                "Train longer, or choose a number of cycles by which they can be divided."
            )

    @override
    def _factor(self) -> Callable[[int], float] | None:
        return None if self.schedule is None else partial(snapshot_factor, length=self._length)

    @override
    def _highest(self) -> float | None:
        return self.restart_lr

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._rate = self._rates.rate

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        skipped = self._skipped(trainer, self._steps)
        taken = self._rates.steps + skipped * (2 * skipped < self._length)  # a last cycle that lacks a few steps is one
        ended = cycle_ends(taken, self._length, self._steps)
        if ended > self._ended:
            self._ended = ended
            self._collect(trainer, pl_module, {"step": self._rates.steps, "cycle": ended})
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        position = self._rates.steps % self._length
        if self._rates.steps < self._steps and position and self._ended < cycle_ends(self._steps, self._length, self._steps):
            rank_zero_warn(
                f"{self!r} was stopped after {self._rates.steps} of {self._steps} steps, {position} steps into a cycle of {self._length}, "
                f"which gives no member: the ensemble has {len(self._members)}."
            )
