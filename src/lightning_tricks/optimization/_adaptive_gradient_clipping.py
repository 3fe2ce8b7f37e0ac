"""Adaptive gradient clipping (AGC).

A gradient step is too large if it is large beside the weights that it changes. So the gradient of each unit, that is of all weights
that lead to one output, is bounded by a share of the norm of these weights. It lets networks without normalization layers train with
large batches and rates.

Source: A. Brock, S. De, S. L. Smith and K. Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_patterns
from lightning_tricks._core.lightning import override
from lightning_tricks._core.selection import select_parameters
from lightning_tricks.optimization._gradients import dimensions_of_units
from lightning_tricks.optimization._wrapping import TransformingOptimizer, WrapperRecipe

__all__ = ["AdaptiveGradientClipping"]


class AdaptiveClippingOptimizer(TransformingOptimizer):
    """Clips the gradient of each unit by the norm of its weights before each step."""

    def __init__(self, inner: Optimizer, units: list[tuple[nn.Parameter, tuple[int, ...] | None]], max_ratio: float, eps: float) -> None:
        super().__init__(inner)
        self.units, self.max_ratio, self.eps = units, max_ratio, eps

    @override
    def _transform(self) -> None:
        for parameter, dimensions in self.units:
            if (gradient := parameter.grad) is not None:
                largest = self.max_ratio * _unit_norms(parameter, dimensions).clamp(min=self.eps)
                gradient.mul_((largest / _unit_norms(gradient, dimensions).clamp(min=1e-6)).clamp(max=1.0))


def _unit_norms(tensor: Tensor, dimensions: tuple[int, ...] | None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dimensions, keepdim=dimensions is not None)
    return norms


def _is_vector(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) <= 1


@dataclass(frozen=True, repr=False)
class AdaptiveGradientClipping(WrapperRecipe):
    """Clip the gradient of each unit relative to its weights: ``G_i ← G_i · min(1, λ · max(‖W_i‖, ε) / ‖G_i‖)``.

    ``W_i`` are the weights that lead to output i, a row of a linear layer or a filter of a convolution; of biases and gains, the whole
    vector. Reach for it in networks without normalization layers.

    Args:
        recipe: The recipe whose optimizer gets the clipped gradients.
        max_ratio: The largest ratio λ of the norms that is left as it is, in (0, ∞). The paper takes 0.01 for batches of 4096, and
            larger values for smaller batches.
        eps: The smallest norm ε that weights are taken to have, in (0, ∞), so that those at zero can move.
        where: Glob or globs over qualified names of parameters, or of the modules that hold them.
        exclude: Globs over names that are left out. The paper leaves the last linear layer out: give its name here.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: From `build`, if `where` and `exclude` leave no trainable parameter.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS, or a parameter is lazy and has no shape yet.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        On sharded parameters, norms are those of whole units. Nothing is added to checkpoints.

    References:
        - A. Brock, S. De, S. L. Smith and K. Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", ICML,
          2021. Vectors are clipped as a whole, as in the authors' code.

    Example:
        >>> from lightning_tricks import optim
        >>> optim.AdaptiveGradientClipping(optim.SGD(lr=0.1, momentum=0.9), exclude="head")
        AdaptiveGradientClipping(SGD(lr=0.1, momentum=0.9), exclude='head')
    """

    _: KW_ONLY
    max_ratio: float = 0.01
    eps: float = 1e-3
    where: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("max_ratio", "(0, ∞)")
        self._check("eps", "(0, ∞)")
        object.__setattr__(self, "where", check_patterns("where", self.where, empty=False))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude, empty=True))

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        selected = select_parameters(model, self.where, self.exclude, trick=repr(self))
        units = [(p, None if _is_vector(p) else dimensions) for p, dimensions in dimensions_of_units(model, selected.values())]
        return AdaptiveClippingOptimizer(inner, units, self.max_ratio, self.eps)
