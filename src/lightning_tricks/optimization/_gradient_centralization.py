"""Gradient centralization.

The mean is taken off the gradient of each unit, that is of all weights that lead to one output. The mean of the weights then stays
where it began, which constrains the solution and smooths the loss. It costs one pass over the gradients.

Source: H. Yong, J. Huang, X. Hua and L. Zhang, "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", ECCV,
2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import nn
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_patterns
from lightning_tricks._core.lightning import override
from lightning_tricks._core.owners import owned_parameters
from lightning_tricks._core.selection import select_parameters
from lightning_tricks.errors import NothingMatchedError
from lightning_tricks.optimization._gradients import dimensions_of_units
from lightning_tricks.optimization._wrapping import TransformingOptimizer, WrapperRecipe

__all__ = ["GradientCentralization"]


class CentralizingOptimizer(TransformingOptimizer):
    """Takes the mean off the gradient of each unit before each step."""

    def __init__(self, inner: Optimizer, units: list[tuple[nn.Parameter, tuple[int, ...]]]) -> None:
        super().__init__(inner)
        self.units = units

    @override
    def _transform(self) -> None:
        for parameter, dimensions in self.units:
            if (gradient := parameter.grad) is not None:
                gradient.sub_(gradient.mean(dim=dimensions, keepdim=True))


@dataclass(frozen=True, repr=False)
class GradientCentralization(WrapperRecipe):
    """Take the mean off the gradient of each unit: ``G_i ← G_i − mean(G_i)``.

    ``G_i`` is the gradient of the weights that lead to output i, a row of a linear layer or a filter of a convolution. Reach for it in
    convolutional networks; it has no knob and costs next to nothing.

    Args:
        recipe: The recipe whose optimizer gets the centralized gradients.
        where: Glob or globs over qualified names of parameters, or of the modules that hold them.
        exclude: Globs over names that are left out, such as ``"head"``.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: From `build`, if `where` and `exclude` leave no trainable weight matrix.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS, or a parameter is lazy and has no shape yet.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        It acts on the weights of linear, convolutional, recurrent, attention and bilinear layers, as weight decay does. An L2 penalty
        that the optimizer inside adds to the gradient keeps its mean. Nothing is added to checkpoints.

    References:
        - H. Yong, J. Huang, X. Hua and L. Zhang, "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
          ECCV, 2020. Differs from the authors' code in leaving embeddings and other tensors of several dimensions alone, of which the
          paper does not speak, and units of a single weight, whose gradient would vanish, and in acting before weight decay.

    Example:
        >>> from lightning_tricks import optim
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = optim.GradientCentralization(optim.SGD(lr=1.0)).build(model)
        >>> _ = model.weight.data.zero_()
        >>> (model.weight[0, 0] + 3 * model.weight[0, 1]).backward()
        >>> optimizer.step()
        >>> model.weight.tolist()
        [[1.0, -1.0]]
    """

    _: KW_ONLY
    where: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "where", check_patterns("where", self.where, empty=False))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude, empty=True))

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        selected = {id(parameter) for parameter in select_parameters(model, self.where, self.exclude, trick=repr(self)).values()}
        matrices = [owned.parameter for owned in owned_parameters(model) if owned.kind == "matrix" and id(owned.parameter) in selected]
        if not any(matrix.requires_grad for matrix in matrices):
            msg = (
                f"{self!r} acts on the weights of linear, convolutional, recurrent, attention and bilinear layers, and none of the "
                f"{len(selected)} parameters of {type(model).__name__} that it selects is a trainable one. Select others."
            )
            raise NothingMatchedError(msg)
        units = [(p, dimensions) for p, dimensions in dimensions_of_units(model, matrices) if any(p.shape[d] > 1 for d in dimensions)]
        return CentralizingOptimizer(inner, units)
