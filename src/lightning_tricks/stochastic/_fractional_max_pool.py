"""Fractional max pooling in place of max pooling: regions with random borders, another set in each step.

Max pooling over fixed windows always sees a picture through the same raster. With borders drawn at random, each step sees it slightly
stretched here and squeezed there, and passes with several rasters can be averaged in evaluation.

Source: B. Graham, "Fractional Max-Pooling", arXiv:1412.6071, 2014.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_tricks._core.checks import check_bool, check_choice, check_count, check_in_interval, check_patterns, check_seed
from lightning_tricks._core.draws import Clock
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, logs_now, override, rank_zero_info
from lightning_tricks._core.selection import matches, nothing_left
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import stand_ins
from lightning_tricks.errors import NothingMatchedError, TrickError
from lightning_tricks.stochastic._drawing import Changed, Drawing, DrawingTrick, apply_drawings, remove_drawings
from lightning_tricks.stochastic._fractional_pooling import FractionalMaxPool2d, Mode
from lightning_tricks.stochastic._fractional_stand_ins import Averaged, Plan, Pooling, Watch, check_fit, each_axis, watch

if TYPE_CHECKING:
    from lightning_tricks._core.schedule import Schedule

__all__ = ["FractionalMaxPool", "apply_fractional_max_pool", "remove_fractional_max_pool"]

_FUNCTION = "apply_fractional_max_pool"
_KINDS = (nn.MaxPool2d, nn.MaxPool3d, FractionalMaxPool2d)


def apply_fractional_max_pool(
    model: nn.Module,
    ratio: float | None = None,
    *,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    mode: Mode = "random",
    overlapping: bool = True,
    samples: int = 1,
    example: Any = None,
    seed: int = 0,
) -> Changed:
    """Let max pooling layers of a model pool over random regions; a second call replaces the first.

    Each forward pass of the model in training mode draws anew, and in evaluation regions are fixed. The model can be pickled and
    copied, and its keys stay.

    Args:
        model: The model, which is changed in place.
        ratio: The factor by which maps shrink, above 1; None = sizes stay as they are.
        where: Globs over names of max pooling layers, or of modules that hold them; None = all.
        exclude: Globs over names of modules that are left alone.
        mode: ``"random"`` or ``"pseudorandom"``, as in the callback.
        overlapping: Whether neighbouring regions share their border.
        samples: Number of passes with different regions whose outputs are averaged in evaluation, at least 1.
        example: An input of the model, or a tuple of several, with whose shape it is checked that all layers still fit; None = no check.
        seed: What the draws follow from, at least 0; give each process its own.

    Returns:
        A report: ``names``, the layers that pool over random regions, and ``left``, why others do not.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no max pooling layer is found.
        TrickConflictError: If a callback of a running fit acts on this model's pooling.
        TrickError: If a layer does not fit any more; the model is as before.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
        >>> apply_fractional_max_pool(model, example=torch.zeros(1, 1, 8, 8)).names
        ('1',)
    """
    ratio, where, exclude = _check(ratio, where, exclude, mode, overlapping=overlapping, samples=samples)
    clock, passes = Clock(check_seed(seed)), Clock(0)
    selected, left = _find(model, where, exclude, trick=_FUNCTION)
    remove_fractional_max_pool(model)
    plan = Plan(ratio, mode, overlapping)
    pools = [Pooling(each, name, plan, passes, clock=clock, owner=_FUNCTION) for name, each in selected.items()]
    report = apply_drawings(model, pools, clock, strength=1.0)
    if example is not None:
        try:
            check_fit(model, example)
        except BaseException:
            remove_fractional_max_pool(model)
            raise
    if samples > 1:
        Averaged(model, samples, passes).attach()
    return Changed(report.names, left)


def remove_fractional_max_pool(model: nn.Module) -> None:
    """Let layers pool over their own regions, as before `apply_fractional_max_pool`; on any other model, nothing happens.

    Raises:
        TrickConflictError: If a callback of a running fit acts on this model's pooling.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
        >>> report = apply_fractional_max_pool(model)
        >>> remove_fractional_max_pool(model)
        >>> "forward" in vars(model[1])
        False
    """
    remove_drawings(model, Pooling, function=_FUNCTION)
    for averaged in stand_ins(model, Averaged):
        averaged.detach()


def _check(
    ratio: float | None,
    where: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    mode: Mode,
    *,
    overlapping: bool,
    samples: int,
) -> tuple[float | None, str | Sequence[str] | None, str | Sequence[str]]:
    ratio = None if ratio is None else check_in_interval("ratio", ratio, "(1, ∞)")
    check_choice("mode", mode, ("random", "pseudorandom"))
    check_bool("overlapping", overlapping)
    check_count("samples", samples)
    where = None if where is None else check_patterns("where", where, empty=False)
    return ratio, where, check_patterns("exclude", exclude, empty=True)


def _find(
    model: nn.Module, where: str | Sequence[str] | None, exclude: str | Sequence[str], *, trick: str
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the max pooling layers that are selected, and why some of them cannot be changed, both by name."""
    pools: dict[str, nn.Module] = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, _KINDS)}
    located = {name: module for name, module in pools.items() if where is None or matches(name, where)}
    selected = {name: module for name, module in located.items() if not matches(name, exclude)}
    left = {name: reason for name, module in selected.items() if (reason := _why_not(module))}
    found = {name: module for name, module in selected.items() if name not in left}
    if found:
        return found, left
    if not pools:
        reason = f"{type(model).__name__} has no layer `nn.MaxPool2d` or `nn.MaxPool3d`"
    elif not selected:
        reason = nothing_left(model, pools, located, where, exclude)
    else:
        reason = "; ".join(f"{name!r} {why}" for name, why in left.items())
    msg = f"{trick} found no max pooling layer to change: {reason}."
    raise NothingMatchedError(msg)


def _why_not(module: nn.Module) -> str:
    if isinstance(module, FractionalMaxPool2d):
        return ""
    assert isinstance(module, nn.MaxPool2d | nn.MaxPool3d)
    if type(module).forward not in {nn.MaxPool2d.forward, nn.MaxPool3d.forward}:
        return f"is a {type(module).__name__}, which pools in its own way"
    if module.return_indices:
        return "returns indices beside its output"
    if max(each_axis(module, module.stride)) == 1:
        return "does not make maps smaller"
    return ""


def _is_compiled(model: nn.Module) -> bool:
    return getattr(model, "_compiler_ctx", None) is not None or any(module._compiled_call_impl is not None for module in model.modules())


class FractionalMaxPool(DrawingTrick):
    """Pool over regions whose borders are drawn at random, in place of max pooling over fixed windows.

    The borders ``a_0 < a_1 < … < a_n`` of an axis have increments that are the two whole numbers next to ``α = N_in / N_out``, ones and
    twos for α between 1 and 2. Region i reaches from ``a_{i−1}`` to ``a_i`` if regions overlap, and to ``a_i − 1`` if not. All samples
    and channels of a batch share the regions. In evaluation regions are fixed. Reach for it in networks for small pictures.

    Args:
        ratio: The factor α by which maps shrink, above 1: N becomes ``⌊N / α⌋``. Layers behind must fit; where one does not, the error
            names it. None = each layer's output keeps its size, so that everything fits.
        where: Glob or globs over qualified names of max pooling layers, or of modules that hold them. None = all.
        exclude: Globs over names of modules that are left alone.
        mode: ``"random"`` puts the increments in random order; ``"pseudorandom"`` takes ``a_i = ⌈α (i + u)⌉`` with a random u, which
            distorts less.
        overlapping: Whether neighbouring regions share their border. A map that shrinks by a whole number has only one division without.
        samples: Number of passes with different regions whose outputs are averaged in validation, test and prediction: the outputs of
            the module's `forward`, which the steps must call.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no max pooling layer is found.
        TrickConflictError: At setup, if one of the layers pools over random regions already.
        TrickError: If a layer does not fit what it gets, or the module's `forward` is not called in an evaluation with `samples`.

    Note:
        It acts on ``nn.MaxPool2d``, ``nn.MaxPool3d``, and on our own ``nn.FractionalMaxPool2d`` and ``3d``, in fits, validations, tests
        and predictions. Afterwards the model pools as before; `apply_fractional_max_pool` lets it pool over fractional regions without
        a Trainer, for deployment.

        Draws follow from the seed given to Lightning's ``seed_everything``, the rank, the epoch, the step, the batch and the layer's
        name. The state of torch's generator stays as it is, and a resumed run draws what it would have drawn. The checkpoint holds
        plain weights and the seed. ``torch.compile`` compiles it into one graph, once.

    References:
        - B. Graham, "Fractional Max-Pooling", arXiv:1412.6071, 2014. Differs from it in sizes that stay by default, in ratios from 2
          on, and in regions that do not overlap, which reach to the last position here.

    Example:
        >>> FractionalMaxPool(1.4, where="features", mode="pseudorandom")
        FractionalMaxPool(ratio=1.4, where='features', mode='pseudorandom')
    """

    def __init__(
        self,
        ratio: float | None = None,
        *,
        where: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        mode: Literal["random", "pseudorandom"] = "random",
        overlapping: bool = True,
        samples: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.ratio, self.where, self.exclude = _check(ratio, where, exclude, mode, overlapping=overlapping, samples=samples)
        self.mode, self.overlapping, self.samples = mode, overlapping, samples
        self._passes = Clock(0)
        self._pools: list[Pooling] = []
        self._watches: list[Watch] = []
        self._averaged: Averaged | None = None
        self._fresh = True  # whether no batch was trained on

    @property
    @override
    def _strength(self) -> float | Schedule:
        return 1.0  # regions are drawn in each step

    @override
    def make(self, module: LightningModule) -> tuple[Sequence[Drawing], Mapping[str, str]]:
        selected, left = _find(module, self.where, self.exclude, trick=repr(self))
        plan, owner = Plan(self.ratio, self.mode, self.overlapping), repr(self)
        self._pools = [Pooling(each, name, plan, self._passes, clock=self._clock, owner=owner) for name, each in selected.items()]
        return self._pools, left

    @override
    def attach(self, module: LightningModule) -> None:
        super().attach(module)
        self._fresh = True
        if self.samples > 1:
            self._averaged = Averaged(module, self.samples, self._passes)
            self._averaged.attach()
        if self.ratio is not None and not _is_compiled(module):
            self._watches = watch(module)

    @override
    def detach(self) -> None:
        self._unwatch()
        if self._averaged is not None:
            self._averaged.detach()
        self._averaged = None
        super().detach()

    def _unwatch(self) -> None:
        for each in self._watches:
            each.detach()
        self._watches = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            self._begin(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        pools = [pool for pool in self._pools if pool.sizes is not None]
        if self._fresh:
            self._unwatch()
            self._fresh = False
            if fixed := ", ".join(pool.name for pool in pools if not pool.varies):
                rank_zero_info(f"{self!r} has only one way to divide the maps of {fixed}. Pass `overlapping=True` or a `ratio` for more.")
        if logs_now(trainer) and pools:
            ratios = [pool.sizes[0][0] / pool.sizes[1][0] for pool in pools if pool.sizes is not None]
            pl_module.log(f"{self.log_prefix}/ratio", sum(ratios) / len(ratios))

    def _check_averaged(self) -> None:
        if self._averaged is not None and not self._averaged.ran:
            msg = f"{self!r} averages outputs of the module's `forward`, which was not called. Call `self(x)` in the steps of evaluation."
            raise TrickError(msg)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_again(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_again(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_again(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_averaged()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_averaged()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_averaged()
