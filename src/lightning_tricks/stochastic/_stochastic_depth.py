"""Stochastic depth: leave residual blocks out at random while training.

A residual network is an ensemble of shallower ones. Training a random one of them at each step shortens the path of the gradient,
regularizes, and costs less, since what is left out is not computed. Evaluation uses the whole network.

Source: G. Huang, Y. Sun, Z. Liu, D. Sedra and K. Q. Weinberger, "Deep Networks with Stochastic Depth", ECCV, 2016.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_choice, check_in_interval, check_patterns, check_seed
from lightning_tricks._core.draws import Clock
from lightning_tricks._core.lightning import LightningModule, Trainer, override, rank_zero_info
from lightning_tricks._core.schedule import Schedule, check_varying
from lightning_tricks._core.strategies import refuse_strategies
from lightning_tricks._core.surgery import without_stand_ins
from lightning_tricks.stochastic._attaching import Growth, attach, check_free, detach, droppables, held_by, set_rates, shares
from lightning_tricks.stochastic._dropping import Mode, Plan, Scaling
from lightning_tricks.stochastic._finding import Found, Where, find
from lightning_tricks.stochastic._random_trick import RandomTrick
from lightning_tricks.stochastic._ticking import Tick, stop_ticking

if TYPE_CHECKING:
    from lightning_tricks._core.surgery import StandIn

__all__ = ["StochasticDepth", "apply_stochastic_depth", "remove_stochastic_depth"]

_FUNCTION = "apply_stochastic_depth"
_UNREACHED = "it gathers weights by block, and waits for gradients of those of a block that is skipped; pass `mode='sample'`"
_NO_SKIPPING = {"FSDPStrategy": _UNREACHED, "DeepSpeedStrategy": _UNREACHED}


@dataclass(frozen=True)
class Dropped:
    """What surgery has done.

    Attributes:
        rates: The probability with which each block is dropped, by name, from first to last.
        left: The blocks that cannot be dropped, each with the reason.
        branches: The branches that are dropped each by itself, by the name of their block: the modules they end in.
    """

    rates: Mapping[str, float]
    left: Mapping[str, str]
    branches: Mapping[str, Sequence[str]]


def apply_stochastic_depth(
    model: nn.Module,
    rate: float,
    *,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    mode: Mode = "sample",
    growth: Growth = "linear",
    scaling: Scaling = "training",
    seed: int = 0,
) -> Dropped:
    """Let blocks of a model be left out at random while it trains; a second call replaces the first.

    Each forward pass of the model in training mode draws anew. The model can be pickled and copied, and its keys stay.

    Args:
        model: The model, which is changed in place.
        rate: Probability of dropping the last block, in [0, 1).
        where: Globs over names of blocks or modules in branches, as in the callback; None = residual blocks are found.
        exclude: Globs over names of blocks that are left alone.
        mode: ``"sample"`` or ``"batch"``, as in the callback.
        growth: ``"linear"`` or ``"uniform"``, as in the callback.
        scaling: ``"training"`` or ``"evaluation"``, as in the callback.
        seed: What the draws follow from, at least 0; give each process its own, or with ``"batch"`` the same.

    Returns:
        A report: ``rates``, the probability of each block by name, ``left``, why others cannot be dropped, and ``branches``, the ends
        of branches that are dropped each by itself.

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
    check_choice("scaling", scaling, ("training", "evaluation"))
    clock = Clock(check_seed(seed))
    found, left = _find(model, where, exclude, mode, trick=_FUNCTION)
    remove_stochastic_depth(model)
    attach(model, found, Plan(mode, scaling, clock, _FUNCTION), least=rate, growth=growth)
    model.register_forward_pre_hook(Tick(clock, _FUNCTION))
    rates = {name: round(rate * share, 12) for name, share in shares(found, growth).items()}
    return Dropped(rates, left, {name: [last for _, last in each.pairs] for name, each in found.items() if each.pairs})


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
    check_free(model, _FUNCTION)
    detach(held_by(model))
    stop_ticking(model, _FUNCTION)


def _check_where(where: Where | None) -> Where | None:
    return None if where is None else check_patterns("where", where, empty=False)


def _find(model: nn.Module, where: Where | None, exclude: Where, mode: Mode, *, trick: str) -> tuple[dict[str, Found], dict[str, str]]:
    with without_stand_ins(model):
        return find(model, where, exclude, mode, trick=trick)


class StochasticDepth(RandomTrick):
    """Leave blocks out at random while training: ``x + (h(x) − x) · b / (1 − p_l)``, where ``b`` is 1 with probability ``1 − p_l``, else 0.

    Block l of L, whose output ``h(x)`` has its input's shape, is dropped with probability ``p_l = l/L · p``, l = 1..L, or with the same
    p everywhere. Where a model exposes the branches of its blocks, such as attention and MLP, each is drawn by itself. What is dropped
    is not computed. Evaluation uses the plain network, whose output is the expectation of a block's output in training. Reach for it in
    residual networks that are deep or overfit.

    Args:
        rate: Probability p of dropping the last block, in [0, 1): a number, or a `Schedule` over optimizer steps.
        where: Glob or globs over qualified names of blocks, or of modules in a branch of a block; a glob matches the whole name or its
            end after a dot. None = the residual blocks among the members of ``nn.Sequential``, ``nn.ModuleList`` and stages of other
            classes are found, and dropped by branches where all of these end in places for drops, such as timm's ``drop_path1``.
        exclude: Globs over names of blocks that are left alone.
        mode: ``"sample"`` draws for each sample: the block runs on those that survive, at least one. ``"batch"`` draws once for the
            mini-batch, the same on all ranks, and skips the block altogether.
        growth: ``"linear"``, ``p_l = l/L · p``, or ``"uniform"``, ``p_l = p``.
        scaling: ``"training"`` scales the survivors by ``1/(1 − p_l)``; ``"evaluation"`` leaves them, and scales branches by ``1 − p_l``
            when the Trainer validates, tests or predicts, as the paper does.
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
        - G. Huang, Y. Sun, Z. Liu, D. Sedra and K. Q. Weinberger, "Deep Networks with Stochastic Depth", ECCV, 2016. Differs from it, by
          default, in scaling survivors in training rather than branches at test time, and in drawing for each sample and branch.

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
        scaling: Literal["training", "evaluation"] = "training",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.rate = check_varying("rate", rate, "[0, 1)")
        self.where = _check_where(where)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self.mode = check_choice("mode", mode, ("sample", "batch"))
        self.growth = check_choice("growth", growth, ("linear", "uniform"))
        self.scaling = check_choice("scaling", scaling, ("training", "evaluation"))
        self._stand_ins: list[StandIn] = []
        self._now = rate if isinstance(rate, float | int) else 0.0

    @property
    @override
    def independent(self) -> bool:
        return self.mode == "sample"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.mode == "batch":
            refuse_strategies(trainer, repr(self), _NO_SKIPPING)
        super().setup(trainer, pl_module, stage)
        if stage != "fit" and self.scaling == "evaluation":
            self._undo()
            self._do(pl_module)

    @override
    def attach(self, module: LightningModule) -> None:
        found, left = _find(module, self.where, self.exclude, self.mode, trick=repr(self))
        if self.rate == 0:
            return
        plan = Plan(self.mode, self.scaling, self._clock, repr(self))
        least = self.rate.bounds[0] if isinstance(self.rate, Schedule) else self.rate
        least = 0.0 if isinstance(self.rate, Schedule) and self.rate.warmup else least
        self._stand_ins = attach(module, found, plan, least=max(0.0, least), growth=self.growth)
        set_rates(self._stand_ins, self._now)  # until the first batch
        branches = {name: " and ".join(last for _, last in each.pairs) for name, each in found.items()}
        listed = ", ".join(f"{name} ({ends})" if ends and name == found[name].name else name for name, ends in branches.items())
        rank_zero_info(f"{self!r} drops {listed}." + "".join(f" Not {name}: {reason}." for name, reason in left.items()))

    @override
    def detach(self) -> None:
        detach(self._stand_ins)
        self._stand_ins = []

    @override
    def set_value(self, value: float) -> None:
        set_rates(self._stand_ins, value)
        for each in droppables(self._stand_ins):
            each.rows = None

    @override
    def shares(self) -> Sequence[float]:
        return [share for each in droppables(self._stand_ins) if (share := each.dropped) is not None]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {"seed": self._seed, "rate": self._now})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        entry = read_entry(checkpoint, self.state_key)
        if entry is not None and isinstance(self.rate, Schedule):
            self._now = float(entry.get("rate", self._now))  # absent where an earlier version has written it
            set_rates(self._stand_ins, self._now)
