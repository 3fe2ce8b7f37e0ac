"""Recipes: what an optimizer shall be, said before there is a model.

A recipe is a frozen dataclass. It can be printed, compared, pickled and written in YAML, and it builds an optimizer for any model,
with the parameter groups that the model needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Final, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_choice, check_in_interval
from lightning_tricks._core.lightning import LightningModule, override
from lightning_tricks._core.schedule import Schedule
from lightning_tricks.errors import ArgumentError
from lightning_tricks.optimization._groups import KINDS, Kind, ParameterGroup, group_parameters
from lightning_tricks.optimization._implementation import IMPLEMENTATIONS, implementation_options

__all__ = ["GroupedRecipe", "OptimizerRecipe"]


@dataclass(frozen=True, repr=False)
class OptimizerRecipe(ABC):
    """What an optimizer shall be: the base of all recipes.

    A subclass is a frozen dataclass whose fields are its arguments. It is printed as its constructor call, pickles, and can be
    configured by LightningCLI.
    """

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """Build the optimizer of a model's trainable parameters."""

    @abstractmethod
    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        """Return the parameter groups that `build` would make."""

    def attach(self, module: _Module, *, schedule: Schedule | None = None) -> _Module:
        """Let a LightningModule train with this recipe under any Trainer, without a callback in the Trainer's list.

        Lightning refuses a module that has no `configure_optimizers` before it asks any callback. This gives it one, and lets it
        bring the `OptimizerFactory` along that does the rest. A `configure_optimizers` that its class has is left aside.

        Args:
            module: The module, changed in place.
            schedule: What multiplies the base learning rates; None = they stay as they are.

        Returns:
            The module.

        Raises:
            ArgumentError: If `schedule` is no schedule.
            TrickConflictError: If something has been attached before. When a fit begins, if the Trainer has an `OptimizerFactory`, too.
        """
        from lightning_tricks.optimization._optimizer_factory import attach  # noqa: PLC0415  # which imports this file

        return attach(module, self, schedule)

    @override
    def __repr__(self) -> str:
        ordered = sorted(fields(self), key=lambda each: each.kw_only is True)  # what may stand first by position comes first
        given = (f"{each.name}={getattr(self, each.name)!r}" for each in ordered if getattr(self, each.name) != _default(each))
        return f"{type(self).__name__}({', '.join(given)})"


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


_Module = TypeVar("_Module", bound=LightningModule)
_OURS: Final = frozenset({"decayed", "overrides", "implementation"})  # fields that are no options of the optimizer


@dataclass(frozen=True, repr=False, kw_only=True)
class GroupedRecipe(OptimizerRecipe):
    """The base of recipes that build one optimizer of torch from parameter groups.

    Every field that is not one of this class is an option of the optimizer, under the name that torch gives it.
    """

    decayed: Sequence[Kind] = ("matrix",)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    implementation: Literal["fused", "foreach", "for-loop"] | None = None

    domains: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, interval in {"lr": "[0, ∞)", "weight_decay": "[0, ∞)", "eps": "[0, ∞)", **self.domains}.items():
            if name in self.options:
                check_in_interval(name, self.options[name], interval)
        self._normalize()
        for pattern, options in self.overrides.items():
            self._check_override(pattern, options)

    def _normalize(self) -> None:
        """Accept lists where YAML has no tuples, and keep copies that nobody else can change."""
        kinds = (self.decayed,) if isinstance(self.decayed, str) else tuple(self.decayed)
        for kind in kinds:
            check_choice("decayed", kind, KINDS)
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        if not isinstance(self.overrides, Mapping) or not all(isinstance(options, Mapping) for options in self.overrides.values()):
            msg = f"`overrides` must map globs to options, such as {{'head.*': {{'lr': 0.01}}}}, got {self.overrides!r}."
            raise ArgumentError(msg)
        overrides = {pattern: {key: _hashable(value) for key, value in each.items()} for pattern, each in self.overrides.items()}
        object.__setattr__(self, "decayed", kinds)
        object.__setattr__(self, "overrides", deepcopy(overrides))

    def _check_override(self, pattern: str, options: Mapping[str, Any]) -> None:
        for key in options:
            if key not in self.options:
                close = get_close_matches(key, self.options, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(map(repr, self.options))}."
                msg = f"`overrides[{pattern!r}]` must set options of {type(self).__name__}, got {key!r}: {hint}"
                raise ArgumentError(msg)
        try:
            replace(self, overrides={}, **options)
        except ArgumentError as error:
            msg = f"`overrides[{pattern!r}]`: {error}"
            raise ArgumentError(msg) from error

    @property
    def options(self) -> dict[str, Any]:
        """The optimizer's options, as given."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _OURS}

    @property
    def optimizer(self) -> type[Optimizer]:
        """The class of the optimizer."""
        kind: type[Optimizer] = getattr(torch.optim, type(self).__name__)
        return kind

    @override
    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        return group_parameters(model, self.options, decayed=self.decayed, overrides=self.overrides, who=repr(self))

    @override
    def build(self, model: nn.Module) -> Optimizer:
        options = {**self.options, **implementation_options(self.optimizer, model, self.implementation)}
        return self.optimizer([group.as_dict() for group in self.groups(model)], **options)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
