"""DropConnect as its formulas say, one example after another, by masks that are written out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


def by_batch(layer: nn.Module, inputs: Sequence[Tensor], masks: Mapping[str, Tensor], rate: float) -> object:
    """Wan et al., section 3, scaled in training: the layer with ``W∘M/(1 − p)`` in the place of W."""
    tensors = dict(layer.named_parameters())
    tensors |= {name: tensors[name] * mask / (1 - rate) for name, mask in masks.items()}
    return torch.func.functional_call(layer, tensors, tuple(inputs))


def by_example(layer: nn.Module, x: Tensor, masks: Mapping[str, Tensor], rate: float) -> Tensor:
    """The same with one mask for each example, ``masks[name][i]`` that of example i."""
    rows = [by_batch(layer, (x[i : i + 1],), {name: mask[i] for name, mask in masks.items()}, rate) for i in range(len(x))]
    return torch.cat(rows)


def moments(weight: Tensor, bias: Tensor, v: Tensor, rate: float, *, mask_bias: bool) -> tuple[list[float], list[float]]:
    """Mean and variance of ``(W∘M/(1 − p))v + b`` over masks, one weight after another."""
    means, variances = [], []
    for row, offset in zip(weight.tolist(), bias.tolist(), strict=True):
        terms = [w * each for w, each in zip(row, v.tolist(), strict=True)] + ([offset] if mask_bias else [])
        means.append(sum(terms) + (0 if mask_bias else offset))
        variances.append(rate / (1 - rate) * sum(term * term for term in terms))
    return means, variances


def expectation(activation: Callable[[float], float], mean: float, variance: float, points: int = 4001) -> float:
    """``E[a(u)]`` for normal u, by the trapezoidal rule over eight standard deviations."""
    deviation, total = math.sqrt(variance), 0.0
    for i in range(points):
        z = -8 + 16 * i / (points - 1)
        total += activation(mean + deviation * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) * 16 / (points - 1)
    return total
