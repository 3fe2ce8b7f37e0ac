"""Normalization, written down as slowly and literally as the formulas of the papers, one channel or filter at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def ghost_sizes(samples: int, ghost_size: int) -> list[int]:
    """As few ghost batches as can be, of sizes as equal as can be."""
    count = math.ceil(samples / ghost_size)
    return [samples // count + (k < samples % count) for k in range(count)]


def ghost_batch_norm(x: Tensor, sizes: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Hoffer et al. 2017, algorithm 1: each ghost batch by its own mean and variance."""
    parts = []
    for part in x.split(sizes):
        channels = []
        for c in range(x.shape[1]):
            values = part[:, c]
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
            channels.append((values - mean) / (variance + eps).sqrt() * weight[c] + bias[c])
        parts.append(torch.stack(channels, dim=1))
    return torch.cat(parts)


def ghost_statistics(x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The mean of the batch, and the unbiased variance within its ghost batches."""
    means, variances = [], []
    for c in range(x.shape[1]):
        means.append(x[:, c].mean())
        squares, free = 0.0, 0
        for part in x[:, c].split(sizes):
            squares += ((part - part.mean()) ** 2).sum()
            free += part.numel() - 1
        variances.append(squares / free)
    return torch.stack(means), torch.stack(variances)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Ba et al. 2016 over the channels of each position."""
    mean = sum(x[:, c] for c in range(x.shape[1])) / x.shape[1]
    variance = sum((x[:, c] - mean) ** 2 for c in range(x.shape[1])) / x.shape[1]
    return torch.stack([(x[:, c] - mean) / (variance + eps).sqrt() * weight[c] + bias[c] for c in range(x.shape[1])], dim=1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019 over the channels of each position."""
    square = sum(x[:, c] ** 2 for c in range(x.shape[1])) / x.shape[1]
    return torch.stack([x[:, c] / (square + eps).sqrt() * weight[c] for c in range(x.shape[1])], dim=1)


def filter_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor | float) -> Tensor:
    """Singh and Krishnan 2020, equations 1 to 4."""
    samples = []
    for sample in x:
        channels = []
        for c, values in enumerate(sample):
            nu_squared = (values**2).sum() / values.numel()
            y = gamma[c] * values / (nu_squared + eps).sqrt() + beta[c]
            channels.append((y - tau[c]).relu() + tau[c])
        samples.append(torch.stack(channels))
    return torch.stack(samples)


def l1_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Hoffer et al. 2018, the L1 norm with its constant √(π/2); ε is added to the square, as in batch normalization."""
    channels = []
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel()
        spread = math.sqrt(math.pi / 2) * (values - mean).abs().sum() / values.numel()
        channels.append((values - mean) / (spread**2 + eps).sqrt() * weight[c] + bias[c])
    return torch.stack(channels, dim=1)


def standardized(weight: Tensor, eps: float) -> Tensor:
    """Qiao et al. 2019, equations 7 and 8."""
    filters = []
    for w in weight:
        count = w.numel()
        mu = w.sum() / count
        sigma = ((w**2).sum() / count - mu**2 + eps).sqrt()
        filters.append((w - mu) / sigma)
    return torch.stack(filters)


def normalized(v: Tensor, gain: float) -> Tensor:
    """Salimans and Kingma 2016, equation 2, with one gain for all filters."""
    return torch.stack([gain / (row**2).sum().sqrt() * row for row in v])


def scaled_standardized(weight: Tensor, gain: Tensor, gamma: float) -> Tensor:
    """Brock et al. 2021, equation 1 and the gain: ``γ g (W − μ) / (σ √N)``."""
    filters = []
    for w, g in zip(weight, gain.flatten(), strict=True):
        count = w.numel()
        mu = w.sum() / count
        sigma = (((w - mu) ** 2).sum() / count).sqrt()
        filters.append(gamma * g * (w - mu) / (sigma * math.sqrt(count)))
    return torch.stack(filters)


def variance_after(activation: Callable[[Tensor], Tensor]) -> float:
    """The variance of an activation of a standard normal variable, by the trapezoidal rule."""
    z = torch.linspace(-14, 14, 280_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    mean = torch.trapezoid(density * activation(z), z)
    return torch.trapezoid(density * (activation(z) - mean) ** 2, z).item()
