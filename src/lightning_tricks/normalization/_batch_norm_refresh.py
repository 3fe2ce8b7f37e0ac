"""Statistics of BatchNorm, measured anew for the weights that are evaluated.

BatchNorm evaluates with running averages of what its inputs were under earlier weights. For weights that training has never run
with, such as an average of weights, those are statistics of another network. One pass over the training set measures the right
ones.

Source: P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov and A. G. Wilson, "Averaging Weights Leads to Wider Optima and Better
Generalization", UAI, 2018, for measuring them for averaged weights; Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm",
arXiv:2105.07576, 2021, for measuring them at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tricks._core.batch_norms import select_batch_norms
from lightning_tricks._core.batch_statistics import call_model, measure_in_training, measure_statistics, write_statistics
from lightning_tricks._core.checkpoint import check_tensors, read_entry, write_entry
from lightning_tricks._core.checks import check_choice, check_patterns
from lightning_tricks._core.held_statistics import are_statistics_held
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, defines, override
from lightning_tricks._core.loaders import untouched
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import Patches
from lightning_tricks._core.swapping import settle_weights
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import ArgumentError, NothingMatchedError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BatchNormRefresh", "refresh_batch_norm"]


def refresh_batch_norm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Callable[[Any], Any] | None = None,
    where: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> int:
    """Measure the running mean and variance of BatchNorm layers anew, over all batches of a loader.

    In one pass in which these layers normalize by their batch and everything else is in evaluation mode, the inputs of each layer
    are pooled: with n values per channel, ``m = Σx/n`` and ``v = Σ(x − m)²/(n − 1)``, in float64 and whatever the batch sizes.

    Args:
        model: Any module; the running statistics of its layers are changed in place. A layer in evaluation mode within a model in
            training mode is frozen, and left as it is; so is a layer that the pass does not reach.
        loader: Batches of any structure. It is iterated once; its state and the random state are then as before.
        batches: Number of batches to use; None = all.
        forward: What to do with a batch; None = call the model with it, or with its first element if it is a tuple or a list,
            which is first moved to the model's device if it is a tensor.
        where: Glob or globs over qualified names of the layers; a glob matches a whole name or any part that begins after a dot.
        exclude: Globs over names that are left out, and normalize by the statistics they have.

    Returns:
        The number of batches used, of all ranks together.

    Raises:
        ArgumentError: If an argument lies outside its domain, the loader is empty, or a batch has one value per channel.
        NothingMatchedError: If no BatchNorm with running statistics is left to measure.
        TrickError: If the pass reaches none of the layers.

    Note:
        Where ``torch.distributed`` is initialized, all ranks must call this together, each with its own part of the data; they end
        with the same statistics. After an exception the model is as it was. ``num_batches_tracked`` is never changed.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> refresh_batch_norm(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0], [8.0]])])
        2
        >>> norm.running_mean, norm.running_var
        (tensor([4.]), tensor([10.]))
    """
    if batches is not None:
        _check_batches(batches, "None")
    patterns = check_patterns("where", where, empty=False), check_patterns("exclude", exclude, empty=True)
    norms = select_batch_norms(model, *patterns, trick="refresh_batch_norm")
    if model.training:
        norms = _thawed(norms, {name for name, norm in norms.items() if not norm.training}, trick="refresh_batch_norm")
    with untouched([loader]):
        statistics, used = measure_statistics(model, norms, islice(iter(loader), batches), forward or partial(call_model, model))
    for name, values in statistics.items():
        write_statistics(norms[name], *values)
    return used


def _check_batches(batches: Any, otherwise: str) -> None:
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        msg = f"`batches` must be a positive number of batches, or {otherwise} for all, got {batches!r}."
        raise ArgumentError(msg)


def _thawed(norms: dict[str, _BatchNorm], frozen: Iterable[str], *, trick: str) -> dict[str, _BatchNorm]:
    """Return the layers that are not frozen."""
    thawed = {name: norm for name, norm in norms.items() if name not in set(frozen)}
    if not thawed:
        msg = f"{trick} found no BatchNorm to measure: all {len(norms)} are kept in evaluation mode. Thaw some, or remove the refresh."
        raise NothingMatchedError(msg)
    return thawed


class BatchNormRefresh(Trick):
    """Measure BatchNorm's running statistics over the training set, for the weights that are evaluated.

    For each layer ``m = Σx/n`` and ``v = Σ(x − m)²/(n − 1)`` over the n values per channel that reach it in one pass over the training
    set, pooled over batches and ranks. In the pass, BatchNorm normalizes by its batch and all other layers are in evaluation mode.

    Reach for it beside an average of weights, whose statistics no training step has seen, or where running averages lag behind the
    weights, as at high learning rates or after few steps.

    Args:
        batches: Number of training batches of each rank to use, or ``"all"`` for one epoch.
        on: ``"end"`` measures once, at the end of the fit. ``"validation"`` does so before each validation of a fit, too, and
            training goes on with the statistics that it had.
        where: Glob or globs over qualified names of the layers; a glob matches a whole name or any part that begins after a dot.
        exclude: Globs over names that are left out.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain; in the pass, if there is no batch, or one with one value per channel.
        NothingMatchedError: At setup, if no BatchNorm with running statistics is selected; in the pass, if all are frozen.
        TrickConflictError: At setup, if another callback also replaces BatchNorm's statistics, or is one of Lightning's averages.
        TrickError: In the pass, if it reaches none of the layers.

    Note:
        A batch goes through the module's own transfer hooks and then through `predict_step`, if the module defines it, or else
        through `forward`, with the first element of a tuple or list and with any other batch as it is.

        Layers that are in evaluation mode while the model trains are frozen and left alone. The random state, the loaders and
        `num_batches_tracked` are as before. With an EMA in the list, the statistics are those of the average, in any order.

        After the fit the module holds the measured statistics, and so do checkpoints saved then, and those saved after a validation
        that measured; beside them these keep the ones that training had, so that resuming is exact. Works under DDP, FSDP and
        DeepSpeed, where all ranks end with the same statistics, and with ``torch.compile``, whose code is not used in the pass.

    References:
        - P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov and A. G. Wilson, "Averaging Weights Leads to Wider Optima and Better
          Generalization", UAI, 2018.
        - Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, 2021.

        Differs from both, and from ``torch.optim.swa_utils.update_bn``, in pooling values rather than averaging the statistics of batches.

    Example:
        >>> BatchNormRefresh(batches=200, on="validation")
        BatchNormRefresh(batches=200, on='validation')
    """

    def __init__(
        self,
        batches: int | Literal["all"] = "all",
        *,
        on: Literal["end", "validation"] = "end",
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if batches != "all":
            _check_batches(batches, "'all'")
        self.batches: int | Literal["all"] = batches
        self.on = check_choice("on", on, ("end", "validation"))
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self._patches = Patches()
        self._module: LightningModule | None = None  # of the latest fit
        self._followed: dict[str, _BatchNorm] = {}
        self._frozen: set[str] = set()  # of these, those that do not train
        self._kept = False
        self._raw: dict[str, Tensor] = {}  # statistics of training, while the module holds measured ones
        self._measured: dict[str, Tensor] = {}  # the latest
        self._step = -1  # at which they were
        self._finished = False

    @property
    @override
    def replaces_statistics(self) -> bool:
        return True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        try:
            norms = self._select(pl_module)
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):  # which build layers later; the pass looks again
                raise
            norms = {}
        if self._module is pl_module and self._untouched():
            self._give_back()
        self._module, self._raw, self._measured, self._step, self._finished = pl_module, {}, {}, -1, False
        self._frozen = {name for name, norm in norms.items() if pl_module.training and not norm.training}
        self._kept = False  # whether another callback holds the statistics of all layers where they are
        self._patches.wrap(trainer.fit_loop, "run", lambda run: partial(self._run, trainer, pl_module, run))

    def _select(self, module: nn.Module) -> dict[str, _BatchNorm]:
        return select_batch_norms(module, self.where, self.exclude, trick=repr(self))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._followed = self._select(pl_module)  # layers may have been replaced

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        self._frozen = {name for name, norm in self._followed.items() if not norm.training}
        self._kept = bool(self._followed) and all(map(are_statistics_held, self._followed.values()))

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every callback that lends weights has done so in `on_validation_start`.
        if self.on == "validation" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._refresh(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not self._finished:
            self._give_back()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module)

    def _run(self, trainer: Trainer, module: LightningModule, run: Callable[[], None]) -> None:
        run()
        self._finish(trainer, module)  # where nothing was left to train, Lightning leaves `on_train_end` out

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._finished and trainer.train_dataloader is not None:
            settle_weights(trainer, module)
            self._refresh(trainer, module)
            self._finished = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and self._module is pl_module:
            self._give_back()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()

    # Measuring

    def _refresh(self, trainer: Trainer, module: LightningModule) -> None:
        if self._kept:
            return
        norms = _thawed(self._select(module), self._frozen, trick=repr(self))
        statistics, used = measure_in_training(trainer, module, norms, None if self.batches == "all" else self.batches)
        raw = _statistics(module, statistics)
        for name, values in statistics.items():
            write_statistics(norms[name], *values)
        self._raw, self._measured, self._step = self._raw or raw, _statistics(module, statistics), trainer.global_step
        shifts = torch.cat(
            [(mean - raw[_key(name)].to(mean)) / (variance + norms[name].eps).sqrt() for name, (mean, variance) in statistics.items()]
        )
        quantities = {f"{self.log_prefix}/batches": float(used), f"{self.log_prefix}/mean_shift": shifts.square().mean().sqrt().item()}
        for logger in trainer.loggers:
            logger.log_metrics(quantities, step=trainer.global_step)

    def _give_back(self) -> None:
        """Let the module hold the statistics of training again."""
        if self._raw and self._module is not None:
            _copy_into(self._module, self._raw)
        self._raw = {}

    def _untouched(self) -> bool:
        """Tell whether the module still holds what was measured, and nobody has loaded other weights."""
        buffers = _buffers(self._module) if self._module is not None else {}
        return all(name in buffers and torch.equal(buffers[name].cpu(), value.cpu()) for name, value in self._measured.items())

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        raw, state = dict(self._raw), checkpoint["state_dict"]
        if self._module is not pl_module:
            raw = {}
        elif not raw and trainer.state.fn == "fit" and self._step == trainer.global_step:  # the validation of these weights is over
            raw = {name: value.detach().clone() for name, value in _buffers(pl_module).items() if name in self._measured}
            checkpoint["state_dict"] = copy(state)  # which keeps `_metadata`
            checkpoint["state_dict"].update({name: value for name, value in self._measured.items() if name in state})
        write_entry(checkpoint, self.state_key, repr(self), {"raw": raw})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        raw = {} if entry is None else entry.get("raw", {})
        if trainer.state.fn == "fit" and raw:
            check_tensors(pl_module, raw, self.state_key)
            _copy_into(pl_module, raw)


def _key(name: str, kind: str = "running_mean") -> str:
    return f"{name}.{kind}" if name else kind


def _statistics(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy the statistics of layers, by the names that a state dict has for them."""
    keys = [_key(name, kind) for name in names for kind in ("running_mean", "running_var")]
    buffers = _buffers(module)
    return {key: buffers[key].detach().clone() for key in keys}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): buffer for name, buffer in module.named_buffers()}


def _copy_into(module: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    buffers = _buffers(module)
    with torch.no_grad():
        for name, value in statistics.items():
            buffers[name].copy_(value)
