"""Feature noise as its formulas say, one number after another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def additive(x: Tensor, noise: Tensor, std: float) -> Tensor:
    """``x + σ · ε``."""
    return torch.tensor([a + std * b for a, b in zip(x.flatten().tolist(), noise.flatten().tolist(), strict=True)]).view_as(x)


def multiplicative(x: Tensor, noise: Tensor, std: float) -> Tensor:
    """``x · (1 + σ · ε)``."""
    return torch.tensor([a * (1 + std * b) for a, b in zip(x.flatten().tolist(), noise.flatten().tolist(), strict=True)]).view_as(x)


def relative(x: Tensor, noise: Tensor, std: float) -> Tensor:
    """``x + σ · s · ε`` with the standard deviation s of each sample."""
    rows = []
    for row, disturbance in zip(x.flatten(1).tolist(), noise.flatten(1).tolist(), strict=True):
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in row) / len(row))
        rows.append([a + std * deviation * b for a, b in zip(row, disturbance, strict=True)])
    return torch.tensor(rows).view_as(x)
