"""What all wrappers of optimizers share: an optimizer around another, and the recipe that builds it.

A wrapping optimizer is one to everybody who meets it: Trainer, schedulers, gradient scalers, checkpoints and step hooks. It has no
parameter groups, state and defaults of its own, but those of the optimizer inside, so that there is nothing to keep in step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_tricks._core.lightning import override, trainer_of
from lightning_tricks._core.strategies import refuse_strategies
from lightning_tricks.errors import ArgumentError, UnsupportedOptimizerError
from lightning_tricks.optimization._groups import ParameterGroup
from lightning_tricks.optimization._recipe import OptimizerRecipe

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Closure", "TransformingOptimizer", "WrapperRecipe", "WrappingOptimizer", "layers_of"]

Closure = Callable[[], Any]

_UNSUPPORTED: Final = {
    "FSDPStrategy": "FSDP1 keeps parameters in flat tensors, in which layers cannot be told apart; FSDP2 (ModelParallelStrategy) works",
    "DeepSpeedStrategy": "the engine steps on its own copies of the parameters, and calls the optimizer without a closure",
}


class WrappingOptimizer(Optimizer, ABC):
    """An optimizer around another, whose parameter groups, state and defaults it shares.

    Its step hooks are called once for each step. A gradient scaler unscales before the step and leaves out the call of a step that it
    skips, also where the optimizer inside is fused and would do both by itself. A subclass keeps what a copy of it needs in public
    attributes.

    Args:
        inner: The optimizer inside.

    Raises:
        UnsupportedOptimizerError: If the optimizer inside is LBFGS.
    """

    inner: Optimizer

    def __init__(self, inner: Optimizer) -> None:
        if any(isinstance(layer, LBFGS) for layer in layers_of(inner)):
            msg = (
                f"{type(self).__name__} cannot wrap LBFGS, which learns the curvature from how its own steps change the gradient, and "
                "takes several evaluations to one step. Use LBFGS alone, or wrap another optimizer."
            )
            raise UnsupportedOptimizerError(msg)
        self.__setstate__({"inner": inner})  # which makes everything that belongs to an optimizer but groups, state and defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer inside."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the optimizer inside."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the optimizer inside."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @override
    def state_dict(self) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.inner.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.inner.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Schedulers replace `step`.
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "step"}

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that have a gradient, with it."""
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]


class TransformingOptimizer(WrappingOptimizer):
    """Changes the gradients after backward, and after whatever Lightning does to them, right before the optimizer inside uses them."""

    @abstractmethod
    def _transform(self) -> None:
        """Change the gradients in place."""

    @override
    def step(self, closure: Closure | None = None) -> Any:
        if closure is not None:
            return self.inner.step(partial(self._evaluate, closure))
        with torch.no_grad():
            self._transform()
        return self.inner.step()

    def _evaluate(self, closure: Closure) -> Any:
        loss = closure()
        with torch.no_grad():
            self._transform()
        return loss


def layers_of(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and those inside it, from the outermost in."""
    yield optimizer
    while isinstance(optimizer, WrappingOptimizer):
        optimizer = optimizer.inner
        yield optimizer


@dataclass(frozen=True, repr=False)
class WrapperRecipe(OptimizerRecipe):
    """A recipe around another, whose parameters and groups it takes."""

    recipe: OptimizerRecipe

    clashes: ClassVar[Mapping[str, str]] = {}  # names of recipes that may not be inside, each with the reason

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, OptimizerRecipe):
            msg = f"`recipe` must be a recipe such as `optim.SGD(lr=0.1)`, got {self.recipe!r}."
            raise ArgumentError(msg)
        inside = self.recipe
        while isinstance(inside, WrapperRecipe):
            self._check_inside(inside)
            inside = inside.recipe
        self._check_inside(inside)

    def _check_inside(self, inside: OptimizerRecipe) -> None:
        name = type(inside).__name__
        if name in self.clashes:
            msg = f"{type(self).__name__} cannot wrap {name}: {self.clashes[name]}."
            raise ArgumentError(msg)

    @override
    def __repr__(self) -> str:
        options = (f"{each.name}={value!r}" for each in fields(self)[1:] if (value := getattr(self, each.name)) != each.default)
        return f"{type(self).__name__}({', '.join([repr(self.recipe), *options])})"

    @override
    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        return self.recipe.groups(model)

    @override
    def build(self, model: nn.Module) -> Optimizer:
        trainer = trainer_of(model)
        if trainer is not None:
            refuse_strategies(trainer, repr(self), _UNSUPPORTED)
        return self._wrap(self.recipe.build(model), model)

    @abstractmethod
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        """Put the optimizer of the inner recipe inside one of this recipe."""
