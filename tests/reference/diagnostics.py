"""Norms, statistics of activations and loss landscapes, one number after another."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all numbers of some tensors."""
    return math.sqrt(sum(value**2 for tensor in tensors for value in tensor.double().flatten().tolist()))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def dead_share(output: Tensor, dimension: int) -> float:
    """Return the share of units along a dimension that are zero everywhere else."""
    units = output.movedim(dimension, 0)
    return sum(all(value == 0 for value in unit.flatten().tolist()) for unit in units) / len(units)


def saturated_share(output: Tensor, slope: Callable[[float], float], steepest: float) -> float:
    """Return the share of values where the slope is below a tenth of the steepest."""
    values = output.flatten().tolist()
    return sum(slope(value) < steepest / 10 for value in values) / len(values)


def normalize_filters(direction: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Li et al., section 4: ``d_ij ← d_ij/‖d_ij‖ · ‖θ_ij‖``, one filter at a time; biases and normalization layers do not move."""
    result = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        if weight.ndim > 1:
            for i in range(len(weight)):
                result[name][i] = direction[name][i] * (norm([weight[i]]) / norm([direction[name][i]]))
    return result


def landscape(
    make: Callable[[], nn.Module], directions: Sequence[Mapping[str, Tensor]], steps: Sequence[float], loss: Callable[[nn.Module], float]
) -> Tensor:
    """Return the loss at each place, each with a model made anew; directions are taken as they are."""
    losses = []
    for place in product(steps, repeat=len(directions)):
        model = make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(parameter + sum(step * direction[name] for step, direction in zip(place, directions, strict=True)))
        losses.append(loss(model))
    return torch.tensor(losses).view((len(steps),) * len(directions))


def gradient_noise_deviation(eta: float, gamma: float, t: int) -> float:
    """Neelakantan et al., equation 1: the variance is ``η/(1 + t)^γ``."""
    variance = eta / (1 + t) ** gamma
    return math.sqrt(variance)
