"""Swap the normalization layers of a network for those of another kind.

How a network normalizes is part of its architecture, but seldom of its idea: batches too small for BatchNorm call for groups, several
devices for synchronized statistics, fine-tuning for frozen ones. A swap replaces layers where they are and lets the network start from
the function that it has, as far as the new kind can give it.

Sources: Y. Wu and K. He, "Group Normalization", ECCV, 2018; J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization",
arXiv:1607.06450, 2016; S. Ioffe and C. Szegedy, "Batch Normalization", ICML, 2015; and those named on the layers' own pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any

from torch import nn

from lightning_tricks._core.batch_statistics import call_model
from lightning_tricks._core.checkpoint import read_changes, write_change, write_entry
from lightning_tricks._core.checks import check_count
from lightning_tricks._core.lightning import LightningModule, Trainer, override, rank_zero_info
from lightning_tricks._core.loaders import evaluate_batch, training_pass, untouched
from lightning_tricks._core.preparing import prepare
from lightning_tricks._core.recording import RecordingTrick
from lightning_tricks._core.strategies import refuse_strategies
from lightning_tricks._core.surgery import Patches, when_built
from lightning_tricks.errors import ArgumentError, CheckpointError
from lightning_tricks.normalization._norm_calibration import Pair, calibrate_norms
from lightning_tricks.normalization._norm_plan import Settings, Swapped, carry_out
from lightning_tricks.normalization._norm_reading import Kind

__all__ = ["NormSwap", "swap_norm"]

_FUNCTION = "swap_norm"
_WHOLE = "calibration writes whole parameters; swap and calibrate with `functional.swap_norm` before the fit"
_SHARDING = dict.fromkeys(("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"), _WHOLE)


def swap_norm(
    model: nn.Module,
    source: Kind,
    target: Kind,
    *,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    groups: int | str | None = None,
    ghost_size: int | None = None,
    calibrate: Iterable[Any] | None = None,
    forward: Callable[[Any], Any] | None = None,
) -> Swapped:
    """Swap the normalization layers of one kind for those of another; layers that were swapped so before stay as they are.

    Names of the kinds and what each starts from are in the card of `NormSwap`. Scale, shift, statistics, dtype, device,
    `requires_grad`, mode, hooks and an activation inside the layer are carried over, and a layer held in several places stays one.

    Args:
        model: The model, which is changed in place.
        source: The kind of the layers to swap: ``"batch"``, ``"layer"``, ``"group"``, ``"instance"``, ``"rms"``, ``"ghost"``,
            ``"sync"``, ``"frozen"`` or ``"response"``.
        target: The kind to swap them for: one of these, or ``"none"``, which leaves them out.
        where: Globs over names of layers, or of modules that hold them; None = all.
        exclude: Globs over names that are left alone.
        groups: For ``"group"``: number of groups, lowered to a divisor of the channels where it is none, or the size of each as
            ``"16 channels"``; None = 32.
        ghost_size: For ``"ghost"``: number of samples that are normalized together; None = 32.
        calibrate: Batches over which scale and shift of the new layers are fitted, so that their outputs have the mean and variance of
            the old ones', by channel; None = not.
        forward: What to do with a batch; None = call the model with it, or with its first element if it is a tuple or a list.

    Returns:
        A report: ``swapped``, the layers by name; ``left``, why others were not; ``notices``, what else to know.

    Raises:
        ArgumentError: If an argument lies outside its domain, or `calibrate` has no batch.
        NothingMatchedError: If no layer is found that can be swapped.
        UnsupportedStrategyError: If the model's parameters are sharded or wrapped already.

    Note:
        Parameters that keep their values stay the same objects; others are new. Swap before an optimizer is made.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU())
        >>> swap_norm(model, "batch", "group").notices
        {'1': '24 groups: 48 channels cannot be split into 32 groups'}
        >>> model[1].num_groups
        24
    """
    settings = Settings.of(source, target, where=where, exclude=exclude, groups=groups, ghost_size=ghost_size)
    batches: list[Any] = []
    if calibrate is not None:
        with untouched([calibrate]):
            batches = list(calibrate)
        _check_batches(batches)
    plan = carry_out(model, settings, trick=_FUNCTION, measured=bool(batches))
    if batches:
        plan.notices |= calibrate_norms(model, plan.pairs, batches, forward or partial(call_model, model))
    return plan.report


def _check_batches(batches: Sequence[Any]) -> None:
    if not batches:
        msg = "`calibrate` must have at least one batch, and has none. Give a list of batches, or a loader that can be iterated anew."
        raise ArgumentError(msg)


class NormSwap(RecordingTrick):
    """Swap a model's normalization layers for those of another kind, before training, so that it starts from the function it has.

    With running statistics m and v of a layer's inputs, and M and V those that the new kind pools,
    ``w' = w √(V + ε)/√(v + ε)`` and ``b' = b + w (M − m)/√(v + ε)``; without them w and b are carried over. Reach for it where
    batches are too small for BatchNorm, or to freeze or to synchronize its statistics.

    Args:
        source: The kind of the layers to swap: ``"batch"``, ``"layer"``, ``"group"``, ``"instance"``, ``"rms"``, ``"ghost"``,
            ``"sync"``, ``"frozen"`` or ``"response"``.
        target: The kind to swap them for: one of these, or ``"none"``, which leaves them out.
        where: Globs over names of layers, or of modules that hold them; None = all.
        exclude: Globs over names that are left alone.
        groups: For ``"group"``: number of groups, lowered to a divisor of the channels where it is none, or the size of each as
            ``"16 channels"``; None = 32.
        ghost_size: For ``"ghost"``: number of samples that are normalized together; None = 32.
        calibrate: Number of training batches over which scale and shift of the new layers are fitted when the fit starts, so that
            their outputs have the mean and variance of the old ones', by channel; None = not. A resumed run does not fit them again.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no layer is found that can be swapped.
        UnsupportedStrategyError: At setup, with `calibrate` under strategies that shard; or if the model shards itself as it is built.
        CheckpointError: If a checkpoint was saved without the swap.

    Note:
        The swap stays after the fit. Checkpoints record it, and ``lightning_tricks.load_from_checkpoint`` makes it anew. Under
        DDP calibration pools values over ranks.

    References:
        - Y. Wu and K. He, "Group Normalization", ECCV, 2018.
        - J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", arXiv:1607.06450, 2016.
        - S. Singh and S. Krishnan, "Filter Response Normalization Layer", CVPR, 2020.

    Example:
        >>> NormSwap("batch", "group", groups="16 channels", exclude="stem")
        NormSwap(source='batch', target='group', exclude='stem', groups='16 channels')
    """

    def __init__(
        self,
        source: Kind,
        target: Kind,
        *,
        where: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        groups: int | str | None = None,
        ghost_size: int | None = None,
        calibrate: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._settings = Settings.of(source, target, where=where, exclude=exclude, groups=groups, ghost_size=ghost_size)
        self.source, self.target = source, target
        self.where, self.exclude = self._settings.where, self._settings.exclude
        self.groups, self.ghost_size = groups, ghost_size
        self.calibrate = None if calibrate is None else check_count("calibrate", calibrate)
        self._patches = Patches()
        self._built = Patches()
        self._report: Swapped | None = None
        self._recorded = False  # whether checkpoints need the swap
        self._pairs: dict[str, Pair] = {}  # to be calibrated

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.calibrate is not None and stage == "fit":
            refuse_strategies(trainer, repr(self), _SHARDING)
        self._undo()
        self._built = when_built(pl_module, self._swap, trick=repr(self), function=_FUNCTION)
        self._patches.wrap(trainer.strategy, "load_checkpoint", lambda load: partial(self._load, load))
        if stage == "fit":
            self._patches.also(prepare(trainer, partial(self._calibrate, trainer, pl_module), turn=2))  # on inputs as they will be

    def _swap(self, module: LightningModule) -> None:
        plan = carry_out(module, self._settings, trick=repr(self), measured=self.calibrate is not None)
        self._recorded = bool(plan.pairs or plan.before)
        if plan.pairs or self._report is None:
            self._report = report = plan.report
            self._pairs = plan.pairs if self.calibrate is not None else {}
            listed = "".join(f" {name}: {text}." for name, text in {**report.notices, **report.left}.items())
            rank_zero_info(f"{self!r} swapped {', '.join(report.swapped) or 'nothing'}.{listed}")

    def _calibrate(self, trainer: Trainer, module: LightningModule) -> None:
        pairs, self._pairs = self._pairs, {}
        if pairs:
            index = count()
            with training_pass(trainer, self.calibrate) as some:
                batches = list(some)
                _check_batches(batches)
                unfitted = calibrate_norms(module, pairs, batches, lambda batch: evaluate_batch(trainer, module, batch, next(index)))
            listed = "".join(f" Not {name}: {reason}." for name, reason in unfitted.items())
            rank_zero_info(f"{self!r} calibrated {len(pairs) - len(unfitted)} layers over {len(batches)} batches.{listed}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._report is not None
        quantities = {"swapped": float(len(self._report.swapped)), "left": float(len(self._report.left))}
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.log_prefix}/{name}": value for name, value in quantities.items()}, step=trainer.global_step)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def _undo(self) -> None:
        self._patches.undo()
        self._built.undo()

    # Checkpoints

    @property
    def _change(self) -> tuple[str, dict[str, Any]]:
        return _FUNCTION, self._settings.record

    @override
    def _record(self, checkpoint: dict[str, Any]) -> None:
        if self._recorded and self._change not in read_changes(checkpoint):
            write_change(checkpoint, *self._change)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {})

    def _load(self, load: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
        advice = "Load it into the model before the fit, which then swaps its layers, or remove the callback to go on without the swap."
        try:
            checkpoint = load(*arguments, **options)
        except Exception as error:
            error.add_note(f"{self!r} has swapped layers of the model. If the checkpoint was saved before the swap: {advice}")
            raise
        if self._recorded and self._change not in read_changes(checkpoint):
            msg = f"The checkpoint must be of a model with the swap of {self!r}, and was saved without it. {advice}"
            raise CheckpointError(msg)
        return checkpoint

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._pairs = {}  # what was fitted comes with the checkpoint
