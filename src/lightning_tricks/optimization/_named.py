"""Any optimizer of torch, timm and pytorch-optimizer, by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, isabstract, signature
from typing import Any, Final, cast

import torch
from torch.optim import Optimizer

from lightning_tricks._core.extras import require
from lightning_tricks._core.lightning import override
from lightning_tricks.errors import ArgumentError, MissingPackageError
from lightning_tricks.optimization._recipe import GroupedRecipe, OptimizerRecipe, plain, suggest

__all__ = ["SOURCES", "Named", "list_recipes"]

_PACKAGES: Final = {
    "timm": ("timm.optim", "timm>=1.0.12", "timm"),
    "pytorch_optimizer": ("pytorch_optimizer", "pytorch-optimizer", "optimizers"),
}
_ELSEWHERE: Final = {"lr": "lr", "weight_decay": "weight_decay", "foreach": "implementation", "fused": "implementation"}
_MUON_FLAG: Final = "use_muon"  # which some optimizers of pytorch-optimizer ask of each group


def _torch_names() -> list[str]:
    kinds = {name: getattr(torch.optim, name) for name in dir(torch.optim)}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer]


def _timm_names() -> list[str]:
    listed: list[str] = _module("timm").list_optimizers()
    return listed


def _pytorch_optimizer_names() -> list[str]:
    package = _module("pytorch_optimizer")
    return [name for name in package.get_supported_optimizers() if "params" in signature(package.load_optimizer(name)).parameters]


SOURCES: Final[Mapping[str, Callable[[], list[str]]]] = {
    "torch": _torch_names,
    "timm": _timm_names,
    "pytorch_optimizer": _pytorch_optimizer_names,
}
"""What may stand before the colon, each with a function that lists what may stand after it."""


def _module(source: str) -> Any:
    module, package, extra = _PACKAGES[source]
    found = require(module, package=package, extra=extra, who=f"Named('{source}:…')")
    if source == "timm" and not hasattr(found, "get_optimizer_class"):
        msg = f"Named('timm:…') needs {package}: `pip install '{package}'`."
        raise MissingPackageError(msg)
    return found


def _installed_names() -> list[str]:
    installed = [each for each in SOURCES if each == "torch" or find_spec(_PACKAGES[each][0].partition(".")[0]) is not None]
    return [f"{source}:{name}" for source in installed for name in SOURCES[source]()]


@cache
def _resolve(name: str) -> Callable[..., Any]:
    """Return the class of that name, with what the package presets for the name."""
    source, colon, short = name.replace("-", "_").partition(":")
    if not colon or source not in SOURCES:
        alike = [each for each in _installed_names() if each.partition(":")[2].lower() == (short or source).lower()]
        hint = f" Did you mean {' or '.join(map(repr, alike))}?" if alike else ""
        msg = f"`name` must be a source and a name in it, 'torch:…', 'timm:…' or 'pytorch_optimizer:…', got {name!r}.{hint}"
        raise ArgumentError(msg)
    names = {each.lower(): each for each in SOURCES[source]()}
    if short.lower() not in names:
        hint = suggest(short.lower(), names)
        msg = f"`name` must be one of the {len(names)} optimizers that {source} builds from groups, got {name!r}. {hint}"
        raise ArgumentError(msg)
    known = names[short.lower()]
    if source == "torch":
        return cast("Callable[..., Any]", getattr(torch.optim, known))
    try:
        return _timm_optimizer(known) if source == "timm" else cast("Callable[..., Any]", _module(source).load_optimizer(known))
    except (AssertionError, ImportError) as error:
        msg = f"{name!r} needs what is not here: {error}."
        raise MissingPackageError(msg) from error


def _timm_optimizer(name: str) -> Callable[..., Any]:
    """Return the optimizer with what timm's own factory presets: the name's options, and a momentum of 0.9 where there is one."""
    package = _module("timm")
    found: Callable[..., Any] = package.get_optimizer_class(name)
    return partial(found, momentum=0.9) if package.get_optimizer_info(name).has_momentum else found


@dataclass(frozen=True, repr=False)
class Named(GroupedRecipe):
    """An optimizer of torch, timm or pytorch-optimizer by its name; `list_recipes` lists all names.

    Args:
        name: Source and name, such as ``"timm:lamb"``, ``"torch:Adamax"`` or ``"pytorch_optimizer:came"``, in any case of letters.
        lr: Learning rate, at least 0; None for the optimizer's own.
        weight_decay: Factor of decay, at least 0, under the meaning that the optimizer gives it; None for the optimizer's own.
        options: Further arguments of the optimizer's constructor, by name. Names of timm come with what timm's own factory sets for
            them, a momentum of 0.9 included.

    Every other argument is one of `GroupedRecipe`. In `overrides`, all arguments of the constructor may be set, and for the optimizers
    of pytorch-optimizer that ask for it in each group, ``use_muon``:
    ``overrides={"*": {"use_muon": False}, "blocks.*.weight": {"use_muon": True}}``.

    Raises:
        ArgumentError: If there is no such optimizer, with those of similar names, or no such option.
        MissingPackageError: If the source is not installed, or the optimizer needs a package or a device that is not here.

    Example:
        >>> Named("torch:adamax", lr=1e-3, options={"betas": (0.9, 0.99)})
        Named(name='torch:adamax', lr=0.001, options={'betas': (0.9, 0.99)})
    """

    name: str
    lr: float | None = None
    _: KW_ONLY
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @override
    def _check_options(self) -> None:
        if not isinstance(self.name, str):
            msg = f"`name` must be a text such as 'timm:lamb', got {self.name!r}."
            raise ArgumentError(msg)
        if not isinstance(self.options, Mapping):
            msg = f"`options` must map the optimizer's arguments to values, got {self.options!r}."
            raise ArgumentError(msg)
        taken = self._taken()
        for key in ("lr", "weight_decay"):
            value = getattr(self, key)
            if value is not None:
                self._check(key, "[0, ∞)")
                if key not in taken:
                    msg = f"`{key}` must be None for {self.name!r}, which has no such option, got {value!r}."
                    raise ArgumentError(msg)
        for key in self.options:
            if key not in taken or key in _ELSEWHERE:
                hint = f"Give `{_ELSEWHERE[key]}` itself." if key in _ELSEWHERE else suggest(key, taken.keys() - _ELSEWHERE.keys())
                msg = f"`options` must be arguments of {self.name!r}, got {key!r}. {hint}"
                raise ArgumentError(msg)
        given = {*self.options, *(key for key in ("lr", "weight_decay") if getattr(self, key) is not None)}
        missing = [key for key, value in taken.items() if value is Parameter.empty and key not in given]
        if missing:
            msg = f"{self.name!r} must be given {', '.join(f'`{key}`' for key in missing)}, got only {sorted(given)}."
            raise ArgumentError(msg)
        if self.layer_decay is not None and "lr" not in self.defaults:
            msg = f"`layer_decay` must be None for {self.name!r}, which has no `lr`, got {self.layer_decay!r}."
            raise ArgumentError(msg)
        self._set("options", plain(self.options))

    @override
    def _check_override(self, pattern: str, options: Mapping[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in options.items() if key in {"lr", "weight_decay"}}
        others = {key: value for key, value in options.items() if key not in own and key != _MUON_FLAG}
        try:
            other = replace(self, overrides={}, options={**self.options, **others}, **own)
        except ArgumentError as error:
            msg = f"`overrides[{pattern!r}]`: {error}"
            raise ArgumentError(msg) from error
        return {key: options[key] if key == _MUON_FLAG else other.defaults[key] for key in options}

    def _taken(self) -> dict[str, Any]:
        """Return the arguments of the constructor with their defaults, but for the parameters."""
        return {
            each.name: Parameter.empty if type(each.default).__name__ == "_RequiredParameter" else each.default
            for each in signature(_resolve(self.name)).parameters.values()
            if each.kind not in {Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL} and each.name != "params"
        }

    @property
    @override
    def defaults(self) -> dict[str, Any]:
        taken = self._taken()
        given = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {**{key: taken[key] if value is None else value for key, value in given.items() if key in taken}, **self.options}

    @property
    @override
    def optimizer(self) -> Callable[..., Optimizer]:
        return _resolve(self.name)


def list_recipes() -> dict[str, str]:
    """List every recipe and every name that `Named` takes, each with its source.

    Packages that are not installed are left out. Of those listed, some need a GPU or a further package, and say so.

    Example:
        >>> recipes = list_recipes()
        >>> recipes["AdamW"], recipes["torch:Adamax"]
        ('torch', 'torch')
    """
    public = import_module("lightning_tricks.optim")
    kinds = [getattr(public, name) for name in public.__all__]
    recipes = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, OptimizerRecipe) and not isabstract(kind)]
    listed = {kind.__name__: kind.source for kind in recipes if kind not in {GroupedRecipe, Named}}
    return listed | {name: name.partition(":")[0] for name in _installed_names()}
