"""Stochastic depth: leave residual blocks out at random while training.

A residual network is an ensemble of shallower ones. Training a random one of them at each step shortens the path of the gradient,
regularizes, and costs less, since what is left out is not computed. Evaluation uses the whole network.

Source: G. Huang, Y. Sun, Z. Liu, D. Sedra and K. Q. Weinberger, "Deep Networks with Stochastic Depth", ECCV, 2016.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_tricks._core.checks import check_choice, check_count, check_in_interval, check_patterns
from lightning_tricks._core.lightning import LightningModule, Trainer, override, rank_zero_info
from lightning_tricks._core.schedule import Schedule, check_varying
from lightning_tricks._core.selection import matches, select_modules
from lightning_tricks._core.strategies import plain_name, refuse_strategies
from lightning_tricks.errors import NothingMatchedError, TrickConflictError
from lightning_tricks.stochastic._blocks import Shape, examine, takes_batch_second
from lightning_tricks.stochastic._draws import Clock
from lightning_tricks.stochastic._dropping import Dropping, Mode
from lightning_tricks.stochastic._random_trick import RandomTrick

__all__ = ["StochasticDepth", "apply_stochastic_depth", "remove_stochastic_depth"]

Growth = Literal["linear", "uniform"]
Where = str | Sequence[str]

_FUNCTION = "apply_stochastic_depth"
_OWN_RATES = {"DropPath": "drop_prob", "StochasticDepth": "p"}  # by the ends of their classes' names
_UNREACHED = "it gathers weights by block, and waits for gradients of those of a block that is skipped; pass `mode='sample'`"
_NO_SKIPPING = {"FSDPStrategy": _UNREACHED, "DeepSpeedStrategy": _UNREACHED}


@dataclass(frozen=True)
class Dropped:
    """What surgery has done.

    Attributes:
        rates: The probability with which each block is dropped, by name, from first to last.
        left: The blocks that cannot be dropped, each with the reason.
    """

    rates: Mapping[str, float]
    left: Mapping[str, str]


def apply_stochastic_depth(
    model: nn.Module,
    rate: float,
    *,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    mode: Mode = "sample",
    growth: Growth = "linear",
    seed: int = 0,
) -> Dropped:
    """Let blocks of a model be left out at random while it trains; a second call replaces the first.

    Each forward pass of the model in training mode draws anew. The model can be pickled and copied, and its keys stay.

    Args:
        model: The model, which is changed in place.
        rate: Probability of dropping the last block, in [0, 1).
        where: Globs over names of blocks; None = residual blocks are found.
        exclude: Globs over names of blocks that are left alone.
        mode: ``"sample"`` or ``"batch"``, as in the callback.
        growth: ``"linear"`` or ``"uniform"``, as in the callback.
        seed: What the draws follow from, at least 0; give each process its own, or with ``"batch"`` the same.

    Returns:
        A report: ``rates``, the probability of each block by name, and ``left``, why others cannot be dropped.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no block is found that can be dropped.
        TrickConflictError: If a callback of a running fit drops blocks of this model.

    Example:
        >>> blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, norm_first=True, batch_first=True) for _ in range(4)))
        >>> apply_stochastic_depth(blocks, 0.2).rates
        {'0': 0.05, '1': 0.1, '2': 0.15, '3': 0.2}
    """
    check_in_interval("rate", rate, "[0, 1)")
    where, exclude = _check_where(where), check_patterns("exclude", exclude, empty=True)
    check_choice("mode", mode, ("sample", "batch"))
    check_choice("growth", growth, ("linear", "uniform"))
    clock = Clock(check_count("seed", seed + 1) - 1)
    blocks, left = _find(model, where, exclude, mode, trick=_FUNCTION)
    remove_stochastic_depth(model)
    droppings = _attach(model, blocks, mode, clock, owner=_FUNCTION, least=rate, growth=growth)
    model.register_forward_pre_hook(_Tick(clock))
    return Dropped({each.name: round(1.0 - float(each.keep), 12) for each in droppings}, left)


def remove_stochastic_depth(model: nn.Module) -> None:
    """Let all blocks be computed again, as before `apply_stochastic_depth`; on any other model, nothing happens.

    Raises:
        TrickConflictError: If a callback of a running fit drops blocks of this model.

    Example:
        >>> blocks = nn.Sequential(nn.TransformerEncoderLayer(8, 2, batch_first=True))
        >>> report = apply_stochastic_depth(blocks, 0.2)
        >>> remove_stochastic_depth(blocks)
        >>> "forward" in vars(blocks[0])
        False
    """
    _check_free(model, _FUNCTION)
    _detach(_droppings_of(model))
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Tick):
            del model._forward_pre_hooks[key]


class _Tick:
    """A hook that lets each forward pass in training mode draw anew."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, model: nn.Module, _: Any) -> None:
        if model.training:
            self.clock.tick()


def _check_where(where: Where | None) -> Where | None:
    return None if where is None else check_patterns("where", where, empty=False)


def _find(
    model: nn.Module, where: Where | None, exclude: Where, mode: Mode, *, trick: str
) -> tuple[dict[str, tuple[nn.Module, Shape]], dict[str, str]]:
    """Return the blocks that can be dropped, and why others cannot, both by name."""
    candidates = _members(model) if where is None else select_modules(model, where, exclude, trick=trick)
    held = _droppings_of(model)
    for dropping in held:
        del dropping.module.forward
    try:
        shapes = {name: examine(block) for name, block in candidates.items()}
    finally:
        for dropping in held:
            dropping.attach()
    found, left = {}, {}
    for name, block in candidates.items():
        shape = shapes[name]
        if mode == "sample" and takes_batch_second(block):
            left[name] = "its second dimension is the batch; pass `batch_first=True` to its layers"
        elif mode == "batch" and not shape.bare:
            left[name] = "it returns more than one tensor; pass `mode='sample'`"
        elif shape.residual or (where is not None and shape.kept is not False):
            found[name] = block, shape
        else:
            left[name] = shape.reason
    if where is None:
        outer = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
        found = {name: each for name, each in found.items() if name not in outer}
        kinds = {type(block) for block, _ in found.values()}
        left = {name: reason for name, reason in left.items() if type(candidates[name]) in kinds or not found}
    if not found:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in list(left.items())[:4])
        what = "no residual block among modules that repeat" if where is None else "no block to drop"
        advice = "Name blocks whose output has their input's shape by `where`" + (f" ({listed})" if listed else "")
        msg = f"{trick} found {what}, in {type(model).__name__}. {advice}."
        raise NothingMatchedError(msg)
    kept = {name: each for name, each in found.items() if not matches(name, exclude)}
    if not kept:
        msg = f"{trick} found no module: `exclude={exclude!r}` removed all {len(found)} that can be dropped. Exclude less."
        raise NothingMatchedError(msg)
    return kept, left


def _members(model: nn.Module) -> dict[str, nn.Module]:
    """Return what holds layers of its own and is a member of a sequence or a list, or has siblings of its class."""
    members = {}
    for parent_name, parent in model.named_modules():
        children = [(name, child) for name, child in parent.named_children() if any(True for _ in child.children())]
        kinds = Counter(type(child) for _, child in children)
        for name, child in children:
            listed = isinstance(parent, nn.Sequential | nn.ModuleList) or kinds[type(child)] > 1
            if listed and not isinstance(child, nn.ModuleList):
                members[plain_name(f"{parent_name}.{name}".removeprefix("."))] = child
    return members


def _droppings_of(model: nn.Module) -> list[Dropping]:
    forwards = (vars(module).get("forward") for module in model.modules())
    return [each for each in forwards if isinstance(each, Dropping)]


def _check_free(model: nn.Module, owner: str) -> None:
    for held in _droppings_of(model):
        if held.owner != owner:
            msg = f"{held.owner} and {owner} both drop blocks of {type(model).__name__}, such as {held.name!r}. Keep one."
            raise TrickConflictError(msg)


def _attach(
    model: nn.Module,
    blocks: Mapping[str, tuple[nn.Module, Shape]],
    mode: Mode,
    clock: Clock,
    *,
    owner: str,
    least: float,
    growth: Growth,
) -> list[Dropping]:
    """Let blocks be dropped, at least at this rate; where a model brings layers that do so on the same branch, those are switched off."""
    _check_free(model, owner)
    droppings = []
    for index, (name, (block, shape)) in enumerate(blocks.items()):
        dropping = Dropping(block, name, index, mode=mode, clock=clock, owner=owner)
        dropping.activated = shape.activated
        for layer in block.modules():
            attribute = next((each for end, each in _OWN_RATES.items() if type(layer).__name__.endswith(end)), None)
            if attribute is not None and getattr(layer, attribute, None):
                dropping.switched_off.append((layer, attribute, getattr(layer, attribute)))
                setattr(layer, attribute, 0.0)
        dropping.attach()
        droppings.append(dropping)
    _set_rates(droppings, least, growth)
    for dropping in droppings:
        dropping.largest_keep = float(dropping.keep)
    return droppings


def _detach(droppings: Sequence[Dropping]) -> None:
    for dropping in droppings:
        dropping.detach()
        for layer, attribute, value in dropping.switched_off:
            setattr(layer, attribute, value)


def _set_rates(droppings: Sequence[Dropping], rate: float, growth: Growth) -> None:
    count = len(droppings)
    for i, dropping in enumerate(droppings, 1):
        dropping.set_rate(rate if growth == "uniform" else rate * i / count)


class StochasticDepth(RandomTrick):
    """Leave blocks out at random while training: ``x + (h(x) − x) · b / (1 − p_l)``, where ``b`` is 1 with probability ``1 − p_l``, else 0.

    Block l of L, whose output ``h(x)`` has its input's shape, is dropped with probability ``p_l = l/L · p``, l = 1..L, or with the same
    p everywhere. What is dropped is not computed. Evaluation uses the plain network, whose output is the expectation of a block's
    output in training. Reach for it in residual networks that are deep or overfit.

    Args:
        rate: Probability p of dropping the last block, in [0, 1): a number, or a `Schedule` over optimizer steps.
        where: Glob or globs over qualified names of blocks; a glob matches the whole name or its end after a dot. None = the residual
            blocks among the members of ``nn.Sequential``, ``nn.ModuleList`` and stages of other classes are found.
        exclude: Globs over names of blocks that are left alone.
        mode: ``"sample"`` draws for each sample: the block runs on those that survive, at least one. ``"batch"`` draws once for the
            mini-batch, the same on all ranks, and skips the block altogether.
        growth: ``"linear"``, ``p_l = l/L · p``, or ``"uniform"``, ``p_l = p``.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no block is found that can be dropped.
        TrickConflictError: At setup, if the model's blocks are dropped already.
        UnsupportedStrategyError: At setup, with ``mode="batch"`` under FSDP1 and DeepSpeed.
        TrickError: In training, if a block changes the shape of its input.

    Note:
        Blocks that end in an activation, such as ResNet's, are not scaled, so that they do not leave its range: survivors give
        ``h(x)``. Of B samples, ``B(1 − p_l)`` survive, rounded up or down at random so that it is so on average.

        Draws follow from the seed given to Lightning's ``seed_everything``, the rank, the epoch, the step, the batch and the block. No
        generator's state is used, so that a resumed run draws what it would have drawn. Parameters of a skipped block get gradients of
        zero, on one device as under DDP. The checkpoint holds plain weights and the seed.

        ``torch.compile`` compiles ``"sample"`` into one graph, once: with a `Schedule`, it then computes as many samples as its least
        rate leaves. ``"batch"`` breaks the graph at each block.

    References:
        - G. Huang, Y. Sun, Z. Liu, D. Sedra and K. Q. Weinberger, "Deep Networks with Stochastic Depth", ECCV, 2016. Differs from it in
          scaling survivors in training rather than branches at test time, and in drawing for each sample by default.

    Example:
        >>> StochasticDepth(0.1, where="layer*.?")
        StochasticDepth(rate=0.1, where='layer*.?')
    """

    def __init__(
        self,
        rate: float | Schedule,
        *,
        where: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        mode: Literal["sample", "batch"] = "sample",
        growth: Literal["linear", "uniform"] = "linear",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.rate = check_varying("rate", rate, "[0, 1)")
        self.where = _check_where(where)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self.mode = check_choice("mode", mode, ("sample", "batch"))
        self.growth = check_choice("growth", growth, ("linear", "uniform"))
        self._droppings: list[Dropping] = []

    @property
    @override
    def independent(self) -> bool:
        return self.mode == "sample"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.mode == "batch":
            refuse_strategies(trainer, repr(self), _NO_SKIPPING)
        super().setup(trainer, pl_module, stage)

    @override
    def attach(self, module: LightningModule) -> None:
        blocks, left = _find(module, self.where, self.exclude, self.mode, trick=repr(self))
        if self.rate == 0:
            return
        least = self.rate.bounds[0] if isinstance(self.rate, Schedule) else self.rate
        least = 0.0 if isinstance(self.rate, Schedule) and self.rate.warmup else least
        self._droppings = _attach(module, blocks, self.mode, self._clock, owner=repr(self), least=max(0.0, least), growth=self.growth)
        rank_zero_info(f"{self!r} drops {', '.join(blocks)}." + "".join(f" Not {name}: {reason}." for name, reason in left.items()))

    @override
    def detach(self) -> None:
        _detach(self._droppings)
        self._droppings = []

    @override
    def set_value(self, value: float) -> None:
        _set_rates(self._droppings, value, self.growth)
        for dropping in self._droppings:
            dropping.rows = None

    @override
    def shares(self) -> Sequence[float]:
        return [share for each in self._droppings if (share := each.dropped) is not None]
