"""Standardization and whitening in two passes over the values, one number at a time, in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def columns(batches: Sequence[Tensor], per: str, dim: int = 1) -> list[list[float]]:
    """Return all values of each channel or feature."""
    found: list[list[float]] = []
    for batch in batches:
        values = batch.double()
        rows = values.flatten(1) if per == "feature" else values.movedim(dim, -1).reshape(-1, values.shape[dim])
        found = found or [[] for _ in range(rows.shape[1])]
        for row in rows.tolist():
            for column, value in zip(found, row, strict=True):
                column.append(value)
    return found


def mean(values: list[float]) -> float:
    """First pass."""
    return math.fsum(values) / len(values)


def covariance(first: list[float], second: list[float]) -> float:
    """Second pass: ``Σ(x − m)(y − m')/n``."""
    m, n = mean(first), mean(second)
    return math.fsum((x - m) * (y - n) for x, y in zip(first, second, strict=True)) / len(first)


def statistics(batches: Sequence[Tensor], per: str, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel or feature."""
    found = columns(batches, per, dim)
    pairs = [(mean(values), covariance(values, values)) for values in found]
    means, variances = zip(*pairs, strict=True)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def covariances(batches: Sequence[Tensor], per: str, dim: int = 1) -> Tensor:
    """The matrix of all of them."""
    found = columns(batches, per, dim)
    return torch.tensor([[covariance(one, other) for other in found] for one in found], dtype=torch.float64)
