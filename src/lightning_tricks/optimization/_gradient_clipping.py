"""Gradient clipping by norm and by value, inside the optimizer.

A gradient that is far larger than the others throws the weights far away. Clipping bounds it: by norm, all gradients together are made
shorter and keep their direction; by value, each element is bounded by itself.

Source: R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML, 2013, for the norm;
T. Mikolov, "Statistical Language Models Based on Neural Networks", PhD thesis, Brno University of Technology, 2012, for the value.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import Optimizer

from lightning_tricks._core.lightning import override
from lightning_tricks.optimization._gradients import total_norm
from lightning_tricks.optimization._wrapping import TransformingOptimizer, WrapperRecipe

__all__ = ["ClipNorm", "ClipValue"]


class NormClippingOptimizer(TransformingOptimizer):
    """Clips the norm of all gradients together before each step."""

    def __init__(self, inner: Optimizer, max_norm: float, order: float) -> None:
        super().__init__(inner)
        self.max_norm, self.order = max_norm, order

    @override
    def _transform(self) -> None:
        if gradients := self.gradients:
            norm = total_norm([gradient for _, gradient in gradients], self.order)
            clip_grads_with_norm_([parameter for parameter, _ in gradients], self.max_norm, norm)


class ValueClippingOptimizer(TransformingOptimizer):
    """Clips each element of the gradients before each step."""

    def __init__(self, inner: Optimizer, max_value: float) -> None:
        super().__init__(inner)
        self.max_value = max_value

    @override
    def _transform(self) -> None:
        clip_grad_value_([parameter for parameter, _ in self.gradients], self.max_value)


@dataclass(frozen=True, repr=False)
class ClipNorm(WrapperRecipe):
    """Clip the norm of all gradients together: ``g ← g · min(1, c / ‖g‖)``.

    It acts right before the step, on the gradients that Lightning has unscaled and averaged over ranks and accumulated batches, and
    also in manual optimization. Reach for it with recurrent networks and transformers, whose gradients are at times very large.

    Args:
        recipe: The recipe whose optimizer gets the clipped gradients.
        max_norm: The largest norm c that is left as it is, in (0, ∞).
        order: The order of the norm, in (0, ∞]; 2 is the Euclidean norm, ``float("inf")`` the largest magnitude.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        The norm is that of all parameters of the optimizer, as with ``torch.nn.utils.clip_grad_norm_``; on sharded parameters it is
        that of the whole tensors. Nothing is added to checkpoints. A fused optimizer inside can be clipped under fp16, too.

    References:
        - R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML, 2013.

    Example:
        >>> from lightning_tricks import optim
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = optim.ClipNorm(optim.SGD(lr=1.0), max_norm=2.0).build(model)
        >>> _ = model.weight.data.zero_()
        >>> (-10 * model.weight).sum().backward()  # a gradient of -10
        >>> optimizer.step()
        >>> round(model.weight.item(), 4)
        2.0
    """

    _: KW_ONLY
    max_norm: float = 1.0
    order: float = 2.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("max_norm", "(0, ∞)")
        if self.order != float("inf"):
            self._check("order", "(0, ∞)")

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        return NormClippingOptimizer(inner, self.max_norm, self.order)


@dataclass(frozen=True, repr=False)
class ClipValue(WrapperRecipe):
    """Clip each element of the gradients by itself: ``g_i ← max(−c, min(c, g_i))``.

    It changes the direction of the gradient, unlike `ClipNorm`. It acts right before the step, as that does.

    Args:
        recipe: The recipe whose optimizer gets the clipped gradients.
        max_value: The largest magnitude c, in (0, ∞).

    Raises:
        ArgumentError: If an argument lies outside its domain.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        Nothing is added to checkpoints, and nothing is communicated on sharded parameters.

    References:
        - T. Mikolov, "Statistical Language Models Based on Neural Networks", PhD thesis, Brno University of Technology, 2012.

    Example:
        >>> from lightning_tricks import optim
        >>> optim.ClipValue(optim.SGD(lr=0.1), max_value=0.5)
        ClipValue(SGD(lr=0.1), max_value=0.5)
    """

    _: KW_ONLY
    max_value: float = 1.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("max_value", "(0, ∞)")

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        return ValueClippingOptimizer(inner, self.max_value)
