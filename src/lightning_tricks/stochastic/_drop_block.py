"""DropBlock: drop contiguous blocks of feature maps while training.

Neighbours in a feature map say much the same, so that dropout of single positions takes little away. Dropping whole blocks of
neighbours does: the network has to look elsewhere.

Source: G. Ghiasi, T.-Y. Lin and Q. V. Le, "DropBlock: A regularization method for convolutional networks", NeurIPS, 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_tricks._core.checks import check_choice, check_count, check_in_interval, check_patterns, check_seed
from lightning_tricks._core.draws import Clock
from lightning_tricks._core.generators import bernoulli
from lightning_tricks._core.lightning import LightningModule, override
from lightning_tricks._core.schedule import Schedule, check_varying
from lightning_tricks._core.selection import select_modules
from lightning_tricks.errors import TrickError
from lightning_tricks.stochastic._drawing import Changed, Drawing, DrawingTrick, apply_drawings, remove_drawings

__all__ = ["DropBlock", "apply_drop_block", "remove_drop_block"]

Per = Literal["channel", "sample"]

_FUNCTION = "apply_drop_block"


def seed_rate(rate: Tensor, sizes: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """Return the probability γ with which a block begins at a place, so that about `rate` of all positions are dropped.

    ``γ = rate / Π b_i · Π f_i / Π (f_i − b_i + 1)``, with the map's sizes f and the block's b.
    """
    share = 1.0
    for size, block in zip(sizes, blocks, strict=True):
        share *= size / (block * (size - block + 1))
    return (rate * share).clamp(max=1.0)


def grow(begins: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return which positions the blocks cover that begin at these places: the max pooling of the paper, by doubling widths."""
    for dimension, block in enumerate(reversed(blocks)):
        width, skipped = 1, [0, 0] * dimension
        while width < block:
            step = min(width, block - width)
            begins = pad(begins, [*skipped, 0, step]) | pad(begins, [*skipped, step, 0])
            width += step
    return begins


def drop_block(x: Tensor, key: Tensor, rate: Tensor, block_size: int, *, per: Per) -> tuple[Tensor, Tensor]:
    """Return a feature map without some blocks, scaled by all positions over those that are left, and the share that was dropped."""
    sizes = x.shape[2:]
    blocks = [min(block_size, size) for size in sizes]
    places = [size - block + 1 for size, block in zip(sizes, blocks, strict=True)]
    channels = x.shape[1] if per == "channel" else 1
    begins = bernoulli(key, seed_rate(rate, sizes, blocks), [x.shape[0], channels, *places], x.device)
    mask = (~grow(begins, blocks)).to(torch.float32)
    kept = mask.mean()
    return x * (mask / kept.clamp(min=0.5 / mask.numel())).to(x.dtype), 1.0 - kept


def apply_drop_block(
    model: nn.Module,
    rate: float,
    *,
    block_size: int = 7,
    where: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    per: Per = "channel",
    seed: int = 0,
) -> Changed:
    """Let blocks of feature maps be dropped while a model trains; a second call replaces the first.

    Each forward pass of the model in training mode draws anew. The model can be pickled and copied, and its keys stay.

    Args:
        model: The model, which is changed in place.
        rate: Share of positions that are dropped, in [0, 1).
        block_size: Length of a block's side, at least 1.
        where: Globs over names of modules whose outputs are feature maps.
        exclude: Globs over names of modules that are left alone.
        per: ``"channel"`` or ``"sample"``, as in the callback.
        seed: What the draws follow from, at least 0; give each process its own.

    Returns:
        A report: ``names``, the modules whose outputs lose blocks.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no module is found.
        TrickConflictError: If a callback of a running fit drops blocks of this model's feature maps.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> apply_drop_block(model, 0.1, block_size=3, where="1").names
        ('1',)
    """
    check_in_interval("rate", rate, "[0, 1)")
    check_count("block_size", block_size)
    check_patterns("where", where, empty=False)
    check_patterns("exclude", exclude, empty=True)
    check_choice("per", per, ("channel", "sample"))
    clock = Clock(check_seed(seed))
    selected = select_modules(model, where, exclude, trick=_FUNCTION)
    remove_drop_block(model)
    blocks = [_Blocks(module, name, block_size, per, clock=clock, owner=_FUNCTION) for name, module in selected.items()]
    return apply_drawings(model, blocks, clock, strength=rate)


def remove_drop_block(model: nn.Module) -> None:
    """Let feature maps be whole, as before `apply_drop_block`; on any other model, nothing happens.

    Raises:
        TrickConflictError: If a callback of a running fit drops blocks of this model's feature maps.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> report = apply_drop_block(model, 0.1, block_size=3, where="1")
        >>> remove_drop_block(model)
        >>> "forward" in vars(model[1])
        False
    """
    remove_drawings(model, _Blocks, function=_FUNCTION)


class _Blocks(Drawing):
    """Drops blocks of the feature map that a module returns."""

    def __init__(self, module: nn.Module, name: str, block_size: int, per: Per, *, clock: Clock, owner: str) -> None:
        super().__init__(module, name, clock=clock, owner=owner)
        self.block_size, self.per = block_size, per

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.ran = True
        x = self.plain(*arguments, **options)
        if self.is_idle():
            return x
        if not isinstance(x, Tensor) or x.ndim not in {3, 4, 5}:
            found = f"one of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            msg = (
                f"{self.owner} drops blocks of feature maps, tensors of (samples, channels) and one to three more dimensions, "
                f"and {self.name!r} returned {found}. Exclude it."
            )
            raise TrickError(msg)
        x, self.dropped = drop_block(x, self.key(self.clock), self.strength, self.block_size, per=self.per)
        return x


class DropBlock(DrawingTrick):
    """Drop contiguous blocks of feature maps while training: ``x · M · count(M) / count_ones(M)``.

    The mask M is zero on blocks of side b that begin anywhere within the map, each place with probability
    ``γ = p / b^d · Π f_i / Π (f_i − b + 1)`` for maps of d dimensions with sizes f, so that about the share p of all positions is
    dropped. Evaluation uses the plain network. Reach for it in convolutional networks that overfit, on their later stages.

    Args:
        rate: Share p of positions that are dropped, in [0, 1): a number, or a `Schedule` over optimizer steps. The paper lets it grow
            linearly from zero: ``schedules.Linear(0.0, final=0.1)``.
        block_size: Length b of a block's side, at least 1. On maps that are smaller, the block is as large as the map; 1 is dropout.
        where: Glob or globs over qualified names of the modules whose outputs lose blocks: feature maps of (samples, channels) and one
            to three more dimensions. A glob matches the whole name or its end after a dot.
        exclude: Globs over names of modules that are left alone.
        per: ``"channel"`` draws a mask for each channel of each sample, ``"sample"`` one for all channels, which costs less.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no module is found.
        TrickConflictError: At setup, if one of the modules' outputs loses blocks already.
        TrickError: In training, if a module returns no feature map, or none of them is called in a whole epoch.

    Note:
        Blocks may overlap, and are dropped together then: with γ as in the paper, somewhat less than p is dropped, and the more so, the
        larger p. The log has the share that was.

        Draws follow from the seed given to Lightning's ``seed_everything``, the rank, the epoch, the step, the batch and the module's
        name. The state of torch's generator stays as it is, and a resumed run draws what it would have drawn. A module that is called
        several times for a batch draws the same for each map of the same shape, which activation checkpointing needs. The checkpoint
        holds plain weights and the seed. ``torch.compile`` compiles it into one graph, once.

    References:
        - G. Ghiasi, T.-Y. Lin and Q. V. Le, "DropBlock: A regularization method for convolutional networks", NeurIPS, 2018. Differs
          from it in the blocks of maps that are smaller than a block.

    Example:
        >>> DropBlock(0.1, block_size=5, where=["layer3", "layer4"])
        DropBlock(rate=0.1, block_size=5, where=('layer3', 'layer4'))
    """

    def __init__(
        self,
        rate: float | Schedule,
        *,
        block_size: int = 7,
        where: str | Sequence[str],
        exclude: str | Sequence[str] = (),
        per: Literal["channel", "sample"] = "channel",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.rate = check_varying("rate", rate, "[0, 1)")
        self.block_size = check_count("block_size", block_size)
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self.per = check_choice("per", per, ("channel", "sample"))

    @override
    def make(self, module: LightningModule) -> tuple[Sequence[Drawing], Mapping[str, str]]:
        selected = select_modules(module, self.where, self.exclude, trick=repr(self))
        return [_Blocks(each, name, self.block_size, self.per, clock=self._clock, owner=repr(self)) for name, each in selected.items()], {}
