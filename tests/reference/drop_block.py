"""DropBlock as the paper writes it: one position after another."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def gamma(rate: float, sizes: Sequence[int], block: int) -> float:
    """Ghiasi et al., equation 1, for maps of any dimension; a block is no larger than the map."""
    value = rate
    for size in sizes:
        side = min(block, size)
        value = value / side * size / (size - side + 1)
    return min(value, 1.0)


def mask(begins: Tensor, sizes: Sequence[int], block: int) -> Tensor:
    """Set a block of zeros at each place where one begins, for maps without samples and channels."""
    ones = torch.ones(*sizes, dtype=torch.float64)
    for place in product(*(range(size) for size in begins.shape)):
        if begins[place]:
            ones[tuple(slice(start, start + min(block, size)) for start, size in zip(place, sizes, strict=True))] = 0
    return ones


def covering(place: Sequence[int], sizes: Sequence[int], block: int) -> int:
    """Count the blocks that can cover a position."""
    count = 1
    for position, size in zip(place, sizes, strict=True):
        side = min(block, size)
        count *= sum(1 for start in range(size - side + 1) if start <= position < start + side)
    return count


def drop_block(x: Tensor, begins: Tensor, block: int) -> Tensor:
    """``x · M · count(M) / count_ones(M)``, with the counts over the whole batch."""
    sizes = x.shape[2:]
    masks = torch.stack([torch.stack([mask(channel, sizes, block) for channel in sample]) for sample in begins])
    return x * masks * masks.numel() / masks.sum()
