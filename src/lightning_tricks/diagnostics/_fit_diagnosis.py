"""Fit diagnosis: the gap between training and validation loss over time, and its name in words.

A network that has learned its training data and not the task shows a growing gap between the two losses; one that has not even learned
its training data shows none, and high losses. Which of both it is decides what to do next.

Source: I. Goodfellow, Y. Bengio and A. Courville, "Deep Learning", MIT Press, 2016, sections 5.2 and 11.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_count, check_in_interval
from lightning_tricks._core.evaluation import untouched_metrics
from lightning_tricks._core.exhibits import Exhibits
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, override, rank_zero_info
from lightning_tricks._core.loaders import move_batch, training_pass
from lightning_tricks._core.strategies import through_wrapper
from lightning_tricks._core.surgery import Patches
from lightning_tricks._core.trick import Trick
from lightning_tricks.diagnostics._curves import draw_curves
from lightning_tricks.diagnostics._fit_verdict import FitVerdict, diagnose_fit
from lightning_tricks.errors import ArgumentError, NothingMatchedError, TrickError

if TYPE_CHECKING:
    from lightning_tricks._core.exhibits import Goal

__all__ = ["FitDiagnosis"]

_GOALS: Final[Mapping[str, Goal]] = {"train_loss": "min", "val_loss": "min"}


class FitDiagnosis(Trick):
    """Log the gap between training and validation loss after each validation, and name under- or overfitting when the fit ends.

    The gap is validation loss − training loss. What the curves are called is decided by the rules of `functional.diagnose_fit`. Training
    is as without it, to the bit.

    Args:
        train: The name under which the module logs its training loss over epochs; None = the mean of what `training_step` returned
            since the validation before.
        val: The name under which the module logs its validation loss.
        batches: Measure the training loss anew at each validation, over this many batches of training data in evaluation mode, which is
            what compares with a validation loss; None = take the loss of training, with its dropout and augmentation, and with
            the weights on the way.
        goal: The training loss that is known to be within reach; None = unknown.
        patience: Records in each of the two windows that are compared, at least 1.
        tolerance: The share below which a change of a loss does not count, in [0, ∞).
        name: Tells several of them apart, in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain, or both `train` and `batches` are given.
        NothingMatchedError: After the first validation or epoch, if nothing of that name was logged.
        TrickError: In training, if `training_step` returns no loss, or `batches` meets manual optimization.

    Note:
        Logged are ``fit_diagnosis/train_loss``, ``fit_diagnosis/val_loss`` and ``fit_diagnosis/gap``; `diagnosis` has the verdict so far.
        Means are over ranks, too. With `train`, there is one record at the end of each epoch that had a validation. With `batches`,
        the module's `training_step` is called in evaluation mode and without gradients; what it logs there goes nowhere. Where an
        average of weights is evaluated, the validation loss is that of the average and the training loss that of the weights that
        train. The checkpoint holds all records.

    References:
        - I. Goodfellow, Y. Bengio and A. Courville, "Deep Learning", MIT Press, 2016, sections 5.2 and 11.3.

    Example:
        >>> FitDiagnosis(val="val/loss", batches=20)
        FitDiagnosis(val='val/loss', batches=20)
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str = "val_loss",
        batches: int | None = None,
        goal: float | None = None,
        patience: int = 3,
        tolerance: float = 0.01,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.train = None if train is None else _check_metric("train", train)
        self.val = _check_metric("val", val)
        self.batches = None if batches is None else check_count("batches", batches)
        if self.train is not None and self.batches is not None:
            msg = f"`train` and `batches` are two ways to the training loss, got train={train!r} and batches={batches!r}. Leave one out."
            raise ArgumentError(msg)
        self.goal = None if goal is None else check_in_interval("goal", goal, "(-∞, ∞)")
        self.patience = check_count("patience", patience)
        self.tolerance = check_in_interval("tolerance", tolerance, "[0, ∞)")
        self._forget()

    def _forget(self) -> None:
        self._steps: list[int] = []
        self._train_losses: list[float] = []
        self._val_losses: list[float] = []
        self._sum: Tensor | None = None  # of training losses since the latest validation
        self._count = 0
        self._validated = False

    @property
    def diagnosis(self) -> FitVerdict:
        """The verdict on what was recorded so far."""
        return diagnose_fit(self._train_losses, self._val_losses, goal=self.goal, patience=self.patience, tolerance=self.tolerance)

    @property
    def curves(self) -> dict[str, list[float]]:
        """What was recorded: ``"step"``, ``"train_loss"``, ``"val_loss"`` and ``"gap"``."""
        gaps = [val - train for train, val in zip(self._train_losses, self._val_losses, strict=True)]
        steps = list(map(float, self._steps))
        return {"step": steps, "train_loss": list(self._train_losses), "val_loss": list(self._val_losses), "gap": gaps}

    @override
    def _exhibits(self) -> Exhibits:
        if not self._steps:
            return Exhibits(goals=_GOALS)
        verdict, curves = self.diagnosis, self.curves
        draw = partial(draw_curves, steps=curves["step"], curves={name: curves[name] for name in _GOALS}, label="loss", title=verdict.kind)
        return Exhibits(goals=_GOALS, facts={"verdict": verdict.kind, "reason": verdict.reason}, figures={"loss_curves": draw})

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()
            if self.batches is not None and not pl_module.automatic_optimization:
                msg = f"{self!r} calls `training_step` to measure a loss, and under manual optimization that trains. Leave `batches` out."
                raise TrickError(msg)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        skipped = pl_module.automatic_optimization and (not isinstance(outputs, Mapping) or outputs.get("loss") is None)
        if self.train is not None or self.batches is not None or skipped:
            return
        # Lightning has divided the loss by the number of batches of a step.
        loss = _loss_of(outputs, self).detach().float() * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.train is not None:
            self._validated = True
        elif self.batches is not None:
            self._record(trainer, self._measure(trainer, pl_module, self.batches))
        elif self._sum is not None:
            self._record(trainer, self._sum / self._count)
            self._sum, self._count = None, 0

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train is not None and self._validated:
            self._validated = False
            self._record(trainer, self._logged(trainer, "train", self.train))

    def _measure(self, trainer: Trainer, module: LightningModule, batches: int) -> Tensor:
        """Return the mean training loss over some batches, in evaluation mode; nothing else is left of the pass."""
        losses, patches = [], Patches()
        modes = [(part, part.training) for part in module.modules()]
        for method in ("log", "log_dict"):
            patches.wrap(module, method, lambda _: lambda *_, **__: None)
        step = through_wrapper(trainer, "training_step")
        try:
            module.eval()
            with torch.no_grad(), untouched_metrics(module), training_pass(trainer, batches) as given:
                for index, batch in enumerate(given):
                    with trainer.precision_plugin.forward_context():
                        losses.append(_loss_of(step(move_batch(trainer, module, batch), index), self).float())
        finally:
            patches.undo()
            for part, mode in modes:
                part.training = mode
        return torch.stack(losses).mean()

    def _logged(self, trainer: Trainer, argument: str, metric: str) -> Tensor:
        metrics: Mapping[str, Tensor] = trainer.callback_metrics
        if metric not in metrics:
            found = ", ".join(map(repr, sorted(metrics))) or "nothing"
            msg = f"{self!r} compares losses by name, and `{argument}={metric!r}` was not logged: found {found}. Name one of these."
            raise NothingMatchedError(msg)
        return metrics[metric].detach()

    def _record(self, trainer: Trainer, train_loss: Tensor) -> None:
        val_loss = self._logged(trainer, "val", self.val)
        both = torch.stack([train_loss.float().cpu(), val_loss.float().cpu()]).to(trainer.strategy.root_device)
        train, val = trainer.strategy.reduce(both, reduce_op="mean").tolist()
        self._steps.append(trainer.global_step)
        self._train_losses.append(train)
        self._val_losses.append(val)
        values = {"train_loss": train, "val_loss": val, "gap": val - train}
        trainer._logger_connector.log_metrics({f"{self.log_prefix}/{key}": value for key, value in values.items()})

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"{self!r}: {self.diagnosis}")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        waiting = {"sum": None if self._sum is None else self._sum.item(), "count": self._count, "validated": self._validated}
        entry = {"steps": list(self._steps), "train": list(self._train_losses), "val": list(self._val_losses), **waiting}
        write_entry(checkpoint, self.state_key, repr(self), entry)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None:
            self._steps, self._train_losses, self._val_losses = list(entry["steps"]), list(entry["train"]), list(entry["val"])
            self._sum = None if entry["sum"] is None else torch.tensor(entry["sum"], device=trainer.strategy.root_device)
            self._count, self._validated = entry["count"], entry["validated"]


def _check_metric(name: str, value: str) -> str:
    if not isinstance(value, str) or not value:
        msg = f"`{name}` must be the name under which the module logs a loss, such as 'val_loss', got {value!r}."
        raise ArgumentError(msg)
    return str(value)


def _loss_of(outputs: Any, trick: FitDiagnosis) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        found = type(outputs).__name__
        msg = f"{trick!r} takes the loss that `training_step` returns, and got {found} without one. Log it, and name it as `train`."
        raise TrickError(msg)
    return loss
