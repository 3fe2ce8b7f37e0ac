"""Fractional max pooling as the paper writes it: one region after another."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from torch import Tensor


def pseudorandom(alpha: Fraction, u: Fraction, count: int) -> list[int]:
    """``a_i = ⌈α (i + u)⌉``, moved to begin at 0."""
    return [math.ceil(alpha * (i + u)) - math.ceil(alpha * u) for i in range(count + 1)]


def regions(borders: Sequence[int], *, overlapping: bool) -> list[tuple[int, int]]:
    """Return ``[a_{i−1}, a_i]``, or ``[a_{i−1}, a_i − 1]``, each as its first and last position."""
    return [(first, last if overlapping else last - 1) for first, last in pairwise(borders)]


def pool(x: Tensor, axes: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Take the maximum over the regions of each axis, in each channel of each sample."""
    result = x.new_empty(*x.shape[:2], *(len(axis) for axis in axes))
    for place in product(*(range(size) for size in result.shape)):
        spans = [axis[i] for axis, i in zip(axes, place[2:], strict=True)]
        result[place] = torch.max(x[(*place[:2], *(slice(first, last + 1) for first, last in spans))])
    return result
