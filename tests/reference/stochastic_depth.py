"""Stochastic depth as its formulas say, one block and one sample after another, computing what is dropped too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn


def rates(last: float, blocks: int) -> list[float]:
    """Huang et al., equation 4, as probabilities of dropping: ``p_l = l/L · p_L``, l = 1..L."""
    return [block / blocks * last for block in range(1, blocks + 1)]


def forward(blocks: Sequence[nn.Module], x: Tensor, rates: Sequence[float], alive: Sequence[Sequence[bool]]) -> Tensor:
    """Apply blocks; ``alive[l][i]`` says whether sample i keeps block l, and survivors' branches are scaled by ``1/(1 − p_l)``."""
    for block, rate, survives in zip(blocks, rates, alive, strict=True):
        branches = block(x) - x
        x = torch.stack([x[i] + branches[i] / (1 - rate) * survives[i] for i in range(len(x))])
    return x


def branches(branches: Sequence[Callable[[Tensor], Tensor]], x: Tensor, rates: Sequence[float], alive: Sequence[Sequence[bool]]) -> Tensor:
    """Add branches, each to the sum of those before it; survivors' are scaled by ``1/(1 − p_l)``."""
    for branch, rate, survives in zip(branches, rates, alive, strict=True):
        change = branch(x)
        x = torch.stack([x[i] + change[i] / (1 - rate) * survives[i] for i in range(len(x))])
    return x
