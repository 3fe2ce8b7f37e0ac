"""Recipes: what an optimizer shall be, said before there is a model.

A recipe is a frozen dataclass. It can be printed, compared, pickled and written in YAML, and it builds an optimizer for any model,
with the parameter groups that the model needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ClassVar, Final, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_choice, check_in_interval, check_pair, check_patterns
from lightning_tricks._core.lightning import LightningModule, override
from lightning_tricks._core.owners import KINDS, Kind
from lightning_tricks._core.schedule import Schedule
from lightning_tricks.errors import ArgumentError
from lightning_tricks.optimization._groups import ParameterGroup, check_complete, group_parameters
from lightning_tricks.optimization._implementation import IMPLEMENTATIONS, implementation_options, implementations_of

__all__ = ["GroupedRecipe", "OptimizerRecipe"]

_Module = TypeVar("_Module", bound=LightningModule)


@dataclass(frozen=True, repr=False)
class OptimizerRecipe(ABC):
    """What an optimizer shall be: the base of all recipes.

    A subclass is a frozen dataclass whose fields are its arguments. It is printed as its constructor call, pickles, and can be
    configured by LightningCLI.

    Example:
        >>> from lightning_tricks.optim import AdamW
        >>> isinstance(AdamW(), OptimizerRecipe)
        True
    """

    source: ClassVar[str] = "lightning_tricks"
    """The package that the optimizer comes from."""

    def __init_subclass__(cls) -> None:
        """Let checkpoints that keep a recipe among a module's hyperparameters load under ``weights_only=True``."""
        super().__init_subclass__()
        torch.serialization.add_safe_globals([cls])

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizer:
        """Build the optimizer of a model's trainable parameters.

        Args:
            model: Any module. Under a Trainer, pass the LightningModule itself, through which the precision is known.
        """

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

    def _set(self, name: str, value: Any) -> None:
        """Set a field while the recipe is made."""
        object.__setattr__(self, name, value)

    def _check(self, name: str, interval: str) -> None:
        """Check that a field is a number in an interval, and keep it as a plain one."""
        self._set(name, check_in_interval(name, getattr(self, name), interval))

    @override
    def __repr__(self) -> str:
        inherited = {each.name for base in type(self).__mro__[1:] if is_dataclass(base) for each in fields(base)}
        ordered = sorted(fields(self), key=lambda each: each.name in inherited)  # a recipe's own come first
        given = (f"{each.name}={getattr(self, each.name)!r}" for each in ordered if getattr(self, each.name) != _default(each))
        return f"{type(self).__name__}({', '.join(given)})"


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


@dataclass(frozen=True, repr=False, kw_only=True)
class GroupedRecipe(OptimizerRecipe):
    """The base of recipes that build one optimizer of torch from parameter groups.

    Every field that a subclass adds is an option of the optimizer, under the name that torch gives it. Weight decay acts on the weights
    that linear, convolutional, recurrent, attention and bilinear layers own, and on nothing else; what a module's own method
    `no_weight_decay` names is left out. Groups with equal options are one group.

    Args:
        decayed: What decays, by what a parameter is to the module that owns it: ``"matrix"``, the weights named above;
            ``"embedding"``; ``"norm"``, weights and biases of normalization layers; ``"bias"``; ``"other"``, all else, such as
            class tokens, position embeddings and layer scales.
        overrides: Globs over qualified names, each with options for the parameters it matches, such as
            ``{"head.*": {"lr": 1e-2}}``. They have the last word, also over `decayed`, `no_weight_decay` and `layer_decay`. Where
            several globs match, the last one that sets an option wins.
        layer_decay: Factor in (0, 1] from each layer to the one before it: the learning rate of layer i of 0 … L is
            ``lr · layer_decay^(L − i)``. None for one rate.
        layers: Globs over qualified names, one for each layer, from the input to the output. None infers them: each block of the
            model is a layer, what comes before the first is one, and so is what comes after the last. Layers without trainable
            parameters do not count.
        implementation: The kernels: ``"fused"``, one for the whole step; ``"foreach"``, one for each operation; ``"for-loop"``, one
            for each parameter and operation. None fuses where that is possible: on CPU and CUDA, for floating-point
            parameters with dense gradients, but not with the gradient scaler of Lightning's ``16-mixed``, where Lightning refuses to clip
            the gradients of fused optimizers. Elsewhere None leaves the choice to torch.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: When building, if a glob matches no parameter, or no parameter is trainable.

    References:
        - T. He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR, 2019, for decay on the
          weights of layers only.
        - K. Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", ICLR, 2020, and H. Bao et
          al., "BEiT: BERT Pre-Training of Image Transformers", ICLR, 2022, for layer-wise decay of the learning rate.

    Example:
        An optimizer that is not among the recipes becomes one in three lines.

        >>> @dataclass(frozen=True, repr=False)
        ... class Adamax(GroupedRecipe):
        ...     lr: float = 2e-3
        >>> Adamax(lr=1e-3).build(nn.Linear(2, 1)).param_groups[0]["lr"]
        0.001
    """

    decayed: Sequence[Kind] = ("matrix",)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layer_decay: float | None = None
    layers: Sequence[str] | None = None
    implementation: Literal["fused", "foreach", "for-loop"] | None = None

    source: ClassVar[str] = "torch"
    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {}
    """The interval of each number among the options, where it is not ``[0, ∞)``; two for a pair."""

    def __post_init__(self) -> None:
        kinds = tuple(self.decayed) if isinstance(self.decayed, Sequence) and not isinstance(self.decayed, str) else (self.decayed,)
        for kind in kinds:
            check_choice("decayed", kind, KINDS)
        self._set("decayed", kinds)
        if self.layer_decay is not None:
            self._set("layer_decay", check_in_interval("layer_decay", self.layer_decay, "(0, 1]"))
        if self.layers is not None:
            if self.layer_decay is None:
                msg = f"`layers` is only used with `layer_decay`, got layers={self.layers!r} and layer_decay=None."
                raise ArgumentError(msg)
            patterns = check_patterns("layers", self.layers, empty=False)
            self._set("layers", (patterns,) if isinstance(patterns, str) else patterns)
        self._check_options()
        self._check_overrides()
        check_choice("implementation", self.implementation, IMPLEMENTATIONS)
        offered = implementations_of(self.optimizer)
        if self.implementation not in offered:
            msg = f"`implementation` must be one of {', '.join(map(repr, offered))} for this optimizer, got {self.implementation!r}."
            raise ArgumentError(msg)

    def _check_options(self) -> None:
        """Check the optimizer's own options."""
        for name, value in self.defaults.items():
            kind = type(type(self).__dataclass_fields__[name].default)
            domain = self.domains.get(name, "[0, ∞)")
            if kind is bool:
                check_choice(name, value, (True, False))
            elif isinstance(domain, tuple):
                self._set(name, check_pair(name, value, domain))
            elif kind in {int, float}:
                self._set(name, check_in_interval(name, value, domain))

    def _check_overrides(self) -> None:
        if not isinstance(self.overrides, Mapping) or not all(isinstance(options, Mapping) for options in self.overrides.values()):
            msg = f"`overrides` must map globs to options, such as {{'head.*': {{'lr': 0.01}}}}, got {self.overrides!r}."
            raise ArgumentError(msg)
        check_patterns("overrides", tuple(self.overrides), empty=True)
        self._set("overrides", {str(pattern): self._check_override(str(pattern), options) for pattern, options in self.overrides.items()})

    def _check_override(self, pattern: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options as a recipe of their own would hold them."""
        for key in options:
            if key not in self.defaults:
                msg = f"`overrides[{pattern!r}]` must set options of {type(self).__name__}, got {key!r}. {suggest(key, self.defaults)}"
                raise ArgumentError(msg)
        try:
            other = replace(self, overrides={}, **options)
        except ArgumentError as error:
            msg = f"`overrides[{pattern!r}]`: {error}"
            raise ArgumentError(msg) from error
        return {key: other.defaults[key] for key in options}

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's options for parameters that no override matches."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _COMMON}

    @property
    def optimizer(self) -> Callable[..., Optimizer]:
        """What makes the optimizer: the class of torch with the recipe's name."""
        kind: type[Optimizer] = getattr(torch.optim, type(self).__name__)
        return kind

    @override
    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        defaults = self.defaults
        return group_parameters(
            model,
            lambda _: defaults,
            decayed=self.decayed,
            overrides=self.overrides,
            layer_decay=self.layer_decay,
            layers=self.layers,
            who=type(self).__name__,
        )

    @override
    def build(self, model: nn.Module) -> Optimizer:
        groups = [group.as_dict() for group in self.groups(model)]
        kernels = implementation_options(self.optimizer, model, self.implementation)
        optimizer = self.optimizer(groups, **{**self.defaults, **kernels})
        check_complete(optimizer, model)
        return optimizer


_COMMON: Final = frozenset(each.name for each in fields(GroupedRecipe))


def plain(value: Any) -> Any:
    """Return containers of any kind, those of Hydra included, as dicts and tuples of one's own, and numbers of NumPy as plain ones."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(plain, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def suggest(word: str, known: Iterable[str]) -> str:
    """Say what a misspelt word may have meant, or else what there is."""
    listed = sorted(known)
    close = get_close_matches(word, listed, n=3)
    some = ", ".join(map(repr, listed[:12])) + (", …" if len(listed) > 12 else "")
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"There are {some}."
