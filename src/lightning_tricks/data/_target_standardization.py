"""Targets of mean zero and variance one in training, and predictions in the original units.

A network whose last layer starts near zero learns targets of mean 250 and deviation 40 by first driving a bias there, and a loss of
40² is no scale for learning rates and weight decay that were found at 1. Here training sees standardized targets, and whatever the
model predicts outside of training comes back in the units of the data.

Source: Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, "Efficient BackProp", in: Neural Networks: Tricks of the Trade, Springer, 1998,
section 4.5, for the scale of targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from lightning_tricks._core.checks import check_bool, check_in_interval, check_name
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, override
from lightning_tricks.data._batches import after_transfer, with_item
from lightning_tricks.data._standardizer import OutputStandardizer, attach, submodule
from lightning_tricks.data._standardizing import StandardizingTrick, child_name
from lightning_tricks.data._statistics import Per, StandardizationStatistics, tensor_in
from lightning_tricks.errors import ArgumentError, TrickError

__all__ = ["TargetStandardization", "standardize_targets"]


def standardize_targets(
    model: nn.Module,
    statistics: StandardizationStatistics | Mapping[str, Any],
    *,
    eps: float = 0.0,
    center: bool = True,
    scale: bool = True,
    output: int | str | None = None,
    module: str = "",
    name: str | None = None,
) -> None:
    """Let a model that predicts standardized targets return them in original units, by statistics that become buffers of it.

    The model gets a child ``target_standardization``, and so further keys, and its `forward` ends with ``ŷ ← ŷ·s + m``.

    Args:
        model: The model, which is changed in place.
        statistics: Of the targets: what `standardization_statistics` returns, or its attributes as a mapping.
        eps: As in `TargetStandardization`.
        center: As in `TargetStandardization`.
        scale: As in `TargetStandardization`.
        output: As in `TargetStandardization`.
        module: As in `TargetStandardization`.
        name: A further part of the child's name, for models with several outputs.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If there is no module of that name.
        TrickConflictError: If the model brings back this output already, with other settings.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import standardization_statistics
        >>> net = nn.Identity()
        >>> standardize_targets(net, standardization_statistics([torch.tensor([200.0, 300.0])]))
        >>> net(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([200., 250., 350.])
    """
    values = statistics if isinstance(statistics, StandardizationStatistics) else StandardizationStatistics(**statistics)
    settings = {
        "per": values.per,
        "dim": values.dim,
        "eps": check_in_interval("eps", eps, "[0, ∞)"),
        "center": check_bool("center", center),
        "scale": check_bool("scale", scale),
        "output": _check_output(output),
    }
    owner = submodule(model, module, trick="standardize_targets")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    attach(owner, child_name("target", check_name(name)), OutputStandardizer(settings)).set_statistics(values, device=device)


def _check_output(value: int | str | None) -> int | str | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        msg = f"`output` must be an index or a key in what `forward` returns, or None for all of it, got {value!r}."
        raise ArgumentError(msg)
    return value


class TargetStandardization(StandardizingTrick):
    """Let training see standardized targets, and bring predictions back to the original units, inside the model.

    With mean m and standard deviation s of each target over the training set, `training_step` gets ``(y − m)/s`` in its batch and plain
    outputs ŷ of `forward`, so that its loss is that of standardized values; everywhere else `forward` returns ``ŷ·s + m``. Targets that
    are constant have s = 1.

    Reach for it in regression, wherever targets are not of the order of one, or several of them differ in scale.

    Args:
        per: ``"channel"``: one mean and variance for each index of dimension `dim`, which for targets of shape ``(N, T)`` is one for
            each of the T targets. ``"feature"``: one for each element of a sample.
        batches: Number of training batches of each rank to measure, or ``"all"`` for one epoch.
        dim: The dimension of the T targets, not 0.
        eps: ε, at least 0, in squared units of the targets: what is added to variances.
        center: Whether the mean is taken away.
        scale: Whether values are divided by the standard deviation. Without both, nothing is done.
        item: Index or key in a training batch at which the targets sit, as `training_step` gets it.
        output: Index or key of the predictions in what `forward` returns; None = it returns them alone.
        module: Name of the module whose `forward` returns the predictions; ``""`` = the LightningModule.
        name: Names the trick in logs and checkpoints, and its keys in the model.

    Raises:
        ArgumentError: If an argument lies outside its domain; when training starts, if there is no batch, or what sits in it is not
            finite or no floating-point tensor.
        NothingMatchedError: At setup, if there is no module of that name.
        TrickConflictError: At setup, if the same predictions are brought back already.
        TrickError: If predictions have other channels, or the first `training_step` calls `forward` of the module nowhere.

    Note:
        What `training_step` logs is in standardized units: a mean squared error of 1 there is one of s² in validation. What
        `validation_step`, `test_step` and `predict_step` see and log is in original units. Other callbacks see the standardized batch.

        Statistics are measured as those of `InputStandardization` are, in the same pass over the training set if both are there, and
        kept as theirs, under ``target_standardization``. The exported model predicts in original units.

    References:
        - Y. LeCun, L. Bottou, G. B. Orr and K.-R. Müller, "Efficient BackProp", in: Neural Networks: Tricks of the Trade, Springer, 1998.

    Example:
        >>> TargetStandardization(item="price")
        TargetStandardization(item='price')
    """

    kind = OutputStandardizer
    function = "standardize_targets"
    what = "target"
    _part: OutputStandardizer | None

    def __init__(
        self,
        *,
        per: Per = "channel",
        batches: int | Literal["all"] = "all",
        dim: int = 1,
        eps: float = 0.0,
        center: bool = True,
        scale: bool = True,
        item: int | str = 1,
        output: int | str | None = None,
        module: str = "",
        name: str | None = None,
    ) -> None:
        super().__init__(per=per, batches=batches, dim=dim, eps=eps, center=center, scale=scale, item=item, module=module, name=name)
        self.output = _check_output(output)
        self._standardized = False  # whether a batch of this fit had its targets standardized

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("per", "dim", "eps", "center", "scale", "output")}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._standardized = False
            self._patches.also(after_transfer(trainer, self._with_standardized, turn=5))  # before targets are mixed

    def _with_standardized(self, batch: Any) -> Any:
        if self._part is None or self._part.statistics is None:
            return batch
        self._standardized = True
        values = self._part.standardize(tensor_in(batch, self.item))
        return with_item(batch, self.item, values)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._be_in_step(True)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        self._be_in_step(False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._be_in_step(False)  # another callback may have ended the epoch between the start of a batch and its step

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._be_in_step(False)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._be_in_step(False)

    def _be_in_step(self, value: bool) -> None:
        if self._part is not None:
            self._part.in_step = value

    @override
    def _check(self, module: LightningModule) -> None:
        super()._check(module)
        if not self._standardized:
            msg = (
                f"{self!r} standardizes the targets of batches that Lightning moves, and `training_step(dataloader_iter)` moves its own. "
                "Let it take `batch`."
            )
            raise TrickError(msg)
