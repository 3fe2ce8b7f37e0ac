"""Population statistics, written down as slowly and literally as their definition, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def population(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel over everything that has reached a layer: ``inputs`` of shape ``(N, C, *)``."""
    channels = inputs[0].shape[1]
    means, variances = [], []
    for channel in range(channels):
        values = torch.cat([values[:, channel].reshape(-1).double() for values in inputs])
        mean = values.sum() / len(values)
        means.append(mean)
        variances.append((values - mean).square().sum() / (len(values) - 1))
    return torch.stack(means), torch.stack(variances)


def batch_normalized(values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """BatchNorm by the statistics of the batch, of shape ``(N, C, *)``, in float64."""
    values = values.double()
    out = torch.empty_like(values)
    for channel in range(values.shape[1]):
        column = values[:, channel]
        mean = column.mean()
        variance = (column - mean).square().mean()
        out[:, channel] = (column - mean) / (variance + eps).sqrt() * weight[channel].double() + bias[channel].double()
    return out
