"""Arguments of tricks as what loggers can hold: plain values in nested mappings."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_tricks._core.trick import Trick

__all__ = ["plain", "settings_of"]

_LONGEST = 300
_EXACT: Mapping[type, Callable[[Any], Any]] = {  # what enumerations and NumPy's numbers are, too, which files would spell out as objects
    NoneType: lambda _: None,
    bool: bool,
    int: int,
    float: lambda value: float(value) if math.isfinite(value) else repr(float(value)),
    str: str.__str__,
}


def settings_of(tricks: Iterable[Trick]) -> dict[str, Any]:
    """Return each trick's arguments under the name by which it logs, defaults included.

    Example:
        >>> from lightning_tricks import LabelSmoothing
        >>> settings_of([LabelSmoothing(0.2)])
        {'label_smoothing': {'smoothing': 0.2, 'target': 1, 'name': None}}
    """
    return {trick.log_prefix: {name: plain(value) for name, value in trick.arguments.items()} for trick in tricks}


def plain(value: Any) -> Any:
    """Return a value in numbers, texts, lists and mappings.

    Recipes, schedules and other dataclasses become mappings, so that runs can be told apart by what is in them. Functions and classes
    become their names, and whatever else its `repr`, of which a few hundred characters are kept.

    Example:
        >>> from lightning_tricks import schedules
        >>> plain([0.1, math.inf, schedules.Constant(0.5), math.sqrt])
        [0.1, 'inf', {'class': 'Constant', 'warmup': 0, 'level': 0.5}, 'math.sqrt']
    """
    for kind, exactly in _EXACT.items():
        if isinstance(value, kind):
            return exactly(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, **{each.name: plain(getattr(value, each.name)) for each in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    name = getattr(value, "__qualname__", None)
    text = f"{value.__module__}.{name}" if name else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # which differs from run to run
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
