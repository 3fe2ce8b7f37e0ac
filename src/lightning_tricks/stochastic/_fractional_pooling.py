"""Fractional max pooling: regions whose borders are drawn at random, so that maps shrink by a factor between one and two, or any other.

Source: B. Graham, "Fractional Max-Pooling", arXiv:1412.6071, 2014.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_pool3d
from typing_extensions import override

from lightning_tricks._core.checks import check_bool, check_choice, check_in_interval
from lightning_tricks._core.draws import fold, mix, order_of_rows, uniform
from lightning_tricks.errors import TrickError

__all__ = ["FractionalMaxPool2d", "FractionalMaxPool3d", "Mode", "borders", "fractional_max_pool", "pooled_size"]

Mode = Literal["random", "pseudorandom"]


def pooled_size(size: int, ratio: float) -> int:
    """Return how many regions a length is divided into: ``⌊size / ratio⌋``."""
    return math.floor(size / ratio + 1e-9)


def borders(key: Tensor, reach: int, count: int, *, mode: Mode) -> Tensor:
    """Return ``a_0 = 0 < a_1 < … < a_count = reach``, whose increments are the two whole numbers next to ``reach / count``.

    In mode ``"random"`` their order is random, in mode ``"pseudorandom"`` ``a_i = ⌈α (i + u)⌉ − ⌈α u⌉`` with ``α = reach / count``.
    """
    if mode == "random":
        increments = reach // count + (order_of_rows(key, count, key.device) < reach % count).long()
        return torch.cat([increments.new_zeros(1), increments.cumsum(0)])
    shift = 1 + torch.as_tensor(uniform(key) * reach).long()  # ⌈α u · count⌉, so that all numbers are whole
    places = (torch.arange(count + 1, device=key.device) * reach + shift + count - 1) // count
    return places - places[0]


def fractional_max_pool(x: Tensor, key: Tensor, sizes: Sequence[int], *, mode: Mode, overlapping: bool) -> Tensor:
    """Return the largest value of each region, the same regions for all samples and channels.

    Region i of an axis reaches from ``a_{i−1}`` to ``a_i`` if regions overlap, and to ``a_i − 1`` if not. An axis whose size stays is
    left as it is.
    """
    dimensions = len(sizes)
    if x.ndim == dimensions + 1:
        return fractional_max_pool(x[None], key, sizes, mode=mode, overlapping=overlapping)[0]
    positions, padded, widths = torch.zeros(1, dtype=torch.long, device=key.device), [], []
    for i, (before, after) in enumerate(zip(x.shape[2:], sizes, strict=True)):
        if not 1 <= after <= before:
            msg = f"Fractional max pooling makes maps smaller, at least 1 long, and was to make {after} of {before}: {tuple(x.shape)}."
            raise TrickError(msg)
        overlap = int(overlapping and after < before)
        reach = before - overlap
        a = borders(mix(key + i), reach, after, mode=mode)
        width = (reach + after - 1) // after + overlap
        inside = torch.minimum(a[:-1, None] + torch.arange(width, device=key.device), a[1:, None] - 1 + overlap).flatten()
        positions = (positions[:, None] * before + inside).flatten()
        padded.append(after * width)
        widths.append(width)
    positions = positions.to(x.device, non_blocking=True)
    flat, outer = x.flatten(2), x.shape[:2]
    with torch.no_grad():  # each region is filled up with its last value, so that all are as wide; gradients go to what was largest
        windows = flat.index_select(2, positions).view(*outer, *padded)
        _, largest = (max_pool2d if dimensions == 2 else max_pool3d)(windows, widths, widths, return_indices=True)
    pooled = flat.gather(2, positions[largest.flatten(2)]).view(*outer, *sizes)
    layout = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    return pooled.contiguous(memory_format=layout) if x.is_contiguous(memory_format=layout) and not x.is_contiguous() else pooled


class FractionalMaxPool2d(nn.Module):
    """Max pooling over regions whose borders are drawn at random, the same for all samples and channels: N becomes ``⌊N / α⌋``.

    Region i of an axis reaches from ``a_{i−1}`` to ``a_i`` if regions overlap, and to ``a_i − 1`` if not, where the increments of a
    are the two whole numbers next to α: ones and twos for α between 1 and 2. Reach for it in place of max pooling over 2 × 2, to pool
    more gently and more often.

    Args:
        ratio: The factor α by which each axis shrinks, above 1.
        mode: ``"random"`` puts the increments in random order; ``"pseudorandom"`` takes ``a_i = ⌈α (i + u)⌉`` with a random u, which
            distorts less.
        overlapping: Whether neighbouring regions share their border.

    Shape:
        - Input: (N, C, H, W) or (C, H, W)
        - Output: (N, C, ⌊H / α⌋, ⌊W / α⌋) or (C, ⌊H / α⌋, ⌊W / α⌋)

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickError: In a forward pass, if the input has another shape or is too small.

    Note:
        In training each forward pass draws anew. Draws follow from the buffer `draws`, a number that is drawn at construction, counts
        forward passes and is part of the checkpoint, so that a resumed run goes on with the regions that would have come. In evaluation
        regions are fixed. `apply_fractional_max_pool` with `samples` averages several passes with different regions.

    References:
        - B. Graham, "Fractional Max-Pooling", arXiv:1412.6071, 2014. Differs from it in regions that do not overlap, which reach to the
          last position here.

    Example:
        >>> FractionalMaxPool2d(1.5)(torch.zeros(1, 3, 12, 9)).shape
        torch.Size([1, 3, 8, 6])
    """

    draws: Tensor
    dimensions: ClassVar[int] = 2

    def __init__(self, ratio: float, *, mode: Mode = "random", overlapping: bool = True) -> None:
        super().__init__()
        self.ratio = check_in_interval("ratio", ratio, "(1, ∞)")
        self.mode = check_choice("mode", mode, ("random", "pseudorandom"))
        self.overlapping = check_bool("overlapping", overlapping)
        self.register_buffer("draws", torch.randint(2**32, ()))

    @override
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in {self.dimensions + 1, self.dimensions + 2}:
            msg = f"{type(self).__name__} takes {self.dimensions + 1} or {self.dimensions + 2} dimensions, got {tuple(x.shape)}."
            raise TrickError(msg)
        if self.training and not _repeats():
            self.draws.add_(1)
        key = mix(self.draws) if self.training else torch.full((), fold(0))
        sizes = [pooled_size(size, self.ratio) for size in x.shape[-self.dimensions :]]
        return fractional_max_pool(x, key, sizes, mode=self.mode, overlapping=self.overlapping)

    @override
    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, mode={self.mode!r}, overlapping={self.overlapping}"


class FractionalMaxPool3d(FractionalMaxPool2d):
    """`FractionalMaxPool2d` for three dimensions.

    Args:
        ratio: The factor α by which each axis shrinks, above 1.
        mode: ``"random"`` or ``"pseudorandom"``.
        overlapping: Whether neighbouring regions share their border.

    Shape:
        - Input: (N, C, D, H, W) or (C, D, H, W)
        - Output: (N, C, ⌊D / α⌋, ⌊H / α⌋, ⌊W / α⌋) or (C, ⌊D / α⌋, ⌊H / α⌋, ⌊W / α⌋)

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickError: In a forward pass, if the input has another shape or is too small.

    References:
        - B. Graham, "Fractional Max-Pooling", arXiv:1412.6071, 2014.

    Example:
        >>> FractionalMaxPool3d(1.5)(torch.zeros(1, 3, 12, 9, 6)).shape
        torch.Size([1, 3, 8, 6, 4])
    """

    dimensions: ClassVar[int] = 3


def _repeats() -> bool:
    """Tell whether this is a forward pass within a backward pass: activation checkpointing repeats it, and has to draw the same."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
