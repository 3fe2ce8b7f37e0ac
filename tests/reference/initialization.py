"""Schemes of initialization as their papers write them, one number after another, and the gains of activations by Monte Carlo."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn


def fans(layer: nn.Module) -> tuple[int, int]:
    """Count, connection by connection, the inputs of one unit and the units that one input reaches."""
    if not hasattr(layer, "kernel_size"):
        return layer.in_features, layer.out_features
    inputs = outputs = 0
    for channel_in in range(layer.in_channels):
        for channel_out in range(layer.out_channels):
            same_group = channel_in * layer.groups // layer.in_channels == channel_out * layer.groups // layer.out_channels
            for _ in range(math.prod(layer.kernel_size)):
                inputs += same_group and channel_out == 0
                outputs += same_group and channel_in == 0
    return inputs, outputs


def deviation(scheme: str, fan_in: int, fan_out: int, gain: float = 1.0) -> float:
    """Return the standard deviation of weights."""
    if scheme == "xavier_normal":  # Glorot and Bengio, equation 12
        return gain * math.sqrt(2 / (fan_in + fan_out))
    if scheme == "xavier_uniform":  # Glorot and Bengio, equation 16: within ±sqrt(6)/sqrt(n_j + n_{j+1}); a uniform's variance is (2b)²/12
        return math.sqrt((2 * gain * math.sqrt(6) / math.sqrt(fan_in + fan_out)) ** 2 / 12)
    if scheme == "kaiming_normal":  # He et al., equation 10: ½ n Var[w] = 1 with ReLU, whose gain² is 2
        return math.sqrt(gain**2 / fan_in)
    if scheme == "kaiming_uniform":
        return math.sqrt((2 * gain * math.sqrt(3 / fan_in)) ** 2 / 12)
    return math.sqrt(1 / fan_in)  # LeCun et al., equation 16


def bound(scheme: str, fan_in: int, fan_out: int, gain: float = 1.0) -> float:
    """Return the largest weight that a uniform distribution allows."""
    return math.sqrt(3) * deviation(scheme, fan_in, fan_out, gain)


def gain_by_sampling(activation: Callable[[Tensor], Tensor], draws: int, seed: int) -> tuple[float, float]:
    """Return ``E[f(z)²]`` over normal draws, and its standard error."""
    values = activation(torch.randn(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).square()
    return values.mean().item(), values.std().item() / math.sqrt(draws)


def lsuv(weights: Sequence[Tensor], activation: Callable[[Tensor], Tensor], x: Tensor, tolerance: float, most: int) -> list[Tensor]:
    """Mishkin and Matas, algorithm 1, on a network of matrices, from weights that are orthonormal already."""
    weights = [weight.clone() for weight in weights]
    for layer in range(len(weights)):
        for _ in range(most):
            blob = x
            for before in weights[:layer]:
                blob = activation(blob @ before.T)
            blob = blob @ weights[layer].T
            variance = blob.var(correction=0)
            if abs(variance - 1.0) < tolerance:
                break
            weights[layer] = weights[layer] / variance.sqrt()
    return weights


def selu(x: float) -> float:
    """Klambauer et al., equation 2 and 14."""
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return scale * (x if x > 0 else alpha * math.exp(x) - alpha)
