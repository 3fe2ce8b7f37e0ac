"""Copies of modules that compute with weights of their own, also where the original is compiled."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from lightning_tricks._core.surgery import stand_ins_of

__all__ = ["copy_module"]

_M = TypeVar("_M", bound=nn.Module)


def copy_module(module: _M) -> _M:
    """Return a deep copy; what ``torch.compile`` has put in the place of methods is left behind.

    Compiled methods are functions, which Python does not copy: those in a plain deep copy compute with the original's weights.
    """
    twin = copy.deepcopy(module)
    for part in twin.modules():
        part._compiled_call_impl = None
        for stand_in in stand_ins_of(part):
            if _is_compiled(stand_in.before, type(part), "forward"):
                stand_in.before = None
        for name in [name for name, value in vars(part).items() if _is_compiled(value, type(part), name)]:
            delattr(part, name)
        if getattr(part, "_compiler_ctx", None) is not None:  # by which Lightning would put the original's methods back
            part._compiler_ctx = None  # type: ignore[assignment]
    return twin


def _is_compiled(value: Any, kind: type, name: str) -> bool:
    """Tell whether something is a compiled version of a method that a class has under this name."""
    original = getattr(value, "_torchdynamo_orig_callable", None)
    return original is not None and getattr(original, "__func__", original) is getattr(kind, name, None)
