"""Activations by name: as modules of torch and of other packages, and as functions.

A text names an activation and, if need be, its settings: ``"gelu"``, ``"leaky_relu(negative_slope=0.2)"``, or a class of any package by
its path, ``"torch.nn.RReLU(lower=0.1)"``. Modules of other packages are recognized by the names of their classes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from lightning_tricks.errors import ArgumentError

__all__ = ["KINDS", "Maker", "as_function", "as_text", "class_at", "kind_of", "kind_of_function", "kind_of_word", "maker_of", "settings_of"]

Maker = Callable[[], nn.Module]

KINDS: Final[dict[str, Callable[..., nn.Module] | None]] = {  # to what makes them; None where torch has no module
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU, "elu": nn.ELU, "celu": nn.CELU, "selu": nn.SELU,
    "gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "quick_gelu": None, "silu": nn.SiLU, "mish": nn.Mish,
    "hard_mish": None, "softplus": nn.Softplus, "softsign": nn.Softsign, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
    "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "hardtanh": nn.Hardtanh, "identity": nn.Identity,
}  # fmt: skip
_WORDS: Final = {kind.replace("_", ""): kind for kind in KINDS} | {
    "swish": "silu", "newgelu": "gelu_tanh", "fastgelu": "gelu_tanh", "pytorchgelutanh": "gelu_tanh", "linearactivation": "identity",
}  # fmt: skip
_FUNCTIONS: Final[dict[Any, str]] = {
    **{getattr(functional, kind): kind for kind in KINDS if hasattr(functional, kind)},
    **{getattr(torch, kind): kind for kind in ("relu", "sigmoid", "tanh", "selu", "celu", "prelu")},
    **{getattr(home, f"{kind}_"): kind for kind in KINDS for home in (torch, functional) if hasattr(home, f"{kind}_")},
}


def kind_of_word(word: str) -> str | None:
    """Return the kind that a word or the name of a class stands for.

    Example:
        >>> kind_of_word("Swish"), kind_of_word("hard_swish"), kind_of_word("NewGELUActivation"), kind_of_word("Linear")
        ('silu', 'hardswish', 'gelu_tanh', None)
    """
    plain = word.lower().replace("_", "")
    return next((_WORDS[each] for each in (plain, plain.removesuffix("activation"), plain.removesuffix("me")) if each in _WORDS), None)


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a module by the name of its class; None for one that computes something of its own, or holds others."""
    if any(True for _ in module.children()):
        return None
    for each in type(module).__mro__:
        kind = kind_of_word(each.__name__)
        if kind is not None:
            learns = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
            known = kind == "prelu" or not learns
            return ("gelu_tanh" if kind == "gelu" and getattr(module, "approximate", None) == "tanh" else kind) if known else None
        if "forward" in vars(each):  # which is what a subclass of a known one may compute differently
            return None
    return None


def kind_of_function(function: Any) -> str | None:
    """Return the kind of a function, such as ``torch.relu`` or a `partial` of ``torch.nn.functional.gelu``."""
    settings = function.keywords if isinstance(function, partial) else {}
    try:
        kind = _FUNCTIONS.get(function.func if isinstance(function, partial) else function)
    except TypeError:  # of what cannot be hashed
        return None
    return "gelu_tanh" if kind == "gelu" and settings.get("approximate") == "tanh" else kind


def call_of(text: str) -> tuple[str, dict[str, Any]]:
    """Take a text apart into a name and settings.

    Raises:
        ArgumentError: If it is of another form.

    Example:
        >>> call_of("leaky_relu(negative_slope=0.2)")
        ('leaky_relu', {'negative_slope': 0.2})
    """
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call):
            return ast.unparse(_dotted(node)), {}
        if node.args:
            raise ValueError  # noqa: TRY301
        return ast.unparse(_dotted(node.func)), {str(each.arg): ast.literal_eval(each.value) for each in node.keywords}
    except (SyntaxError, ValueError):
        msg = f"An activation must be a name with settings by name, such as 'leaky_relu(negative_slope=0.2)', got {text!r}."
        raise ArgumentError(msg) from None


def _dotted(node: ast.expr) -> ast.expr:
    inner = node
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    if isinstance(inner, ast.Name):
        return node
    raise ValueError


def maker_of(name: str, value: Any) -> Maker:
    """Return what makes new modules of an activation, given by text, class or module.

    Raises:
        ArgumentError: If it names no activation, or its class does not take the settings.
    """
    if isinstance(value, nn.Module):
        return partial(deepcopy, value)
    make: Any
    settings: dict[str, Any] = {}
    if isinstance(value, type) and issubclass(value, nn.Module):
        make = value
    else:
        if not isinstance(value, str):
            msg = f"`{name}` must be the name of an activation, such as 'gelu', or a module or its class, got {value!r}."
            raise ArgumentError(msg)
        word, settings = call_of(value)
        kind = kind_of_word(word)
        make = KINDS[kind] if kind is not None and "." not in word else class_at(name, word)
        if make is None:
            msg = f"`{name}` must be an activation that torch has as a module, got {value!r}. Give the path of a class that computes it."
            raise ArgumentError(msg)
    try:
        make(**settings)
    except (TypeError, ValueError) as error:
        msg = f"`{name}` must have settings that its class takes, got {value!r}: {error}."
        raise ArgumentError(msg) from error
    return partial(make, **settings)


def class_at(name: str, path: str) -> type[nn.Module]:
    """Import a class of modules.

    Raises:
        ArgumentError: If there is none at this path.
    """
    home, _, attribute = path.rpartition(".")
    try:
        found = getattr(import_module(home), attribute) if home else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        msg = f"`{name}` must be one of {', '.join(map(repr, KINDS))}, or the path of a module's class, got {path!r}."
        raise ArgumentError(msg)
    return found


def as_text(name: str, value: Any) -> str:
    """Return the text that stands for an activation, however it is given.

    Raises:
        ArgumentError: If it is a module whose settings cannot be read off.

    Example:
        >>> as_text("target", nn.LeakyReLU(0.2)), as_text("target", nn.GELU), as_text("target", nn.RReLU)
        ('leaky_relu(negative_slope=0.2)', 'gelu', 'torch.nn.modules.activation.RReLU')
    """
    if isinstance(value, str):
        return str(value)
    kind = type(value) if isinstance(value, nn.Module) else value
    word = next((each for each, make in KINDS.items() if make is kind), f"{kind.__module__}.{kind.__qualname__}")
    if not isinstance(value, nn.Module):
        return word
    if not kind.__module__.startswith("torch.nn."):
        msg = f"`{name}` must say its settings where its class is no class of torch's, got {value!r}. Give '{word}(…)' with them."
        raise ArgumentError(msg)
    settings = ", ".join(f"{key}={setting!r}" for key, setting in settings_of(value).items())
    return f"{word}({settings})" if settings else word


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return how one of torch's own activations was made, apart from what is so by default and from `inplace`."""
    default = type(module)()
    constants = [each for each in getattr(module, "__constants__", ()) if each != "inplace" and hasattr(default, each)]
    return {each: getattr(module, each) for each in constants if getattr(module, each) != getattr(default, each)}


def as_function(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that one of torch's own activations computes; None where there is none, or parameters are needed."""
    kind = kind_of(module)
    function: Any = next((each for each, other in _FUNCTIONS.items() if other == ("gelu" if kind == "gelu_tanh" else kind)), None)
    if function is None or kind == "prelu" or not type(module).__module__.startswith("torch.nn."):
        return None
    settings = settings_of(module)
    return partial(function, **settings) if settings else function
