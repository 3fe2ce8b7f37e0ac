"""One wording for one kind of bad argument. Every check returns the value it accepted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor

from lightning_tricks.errors import ArgumentError

__all__ = [
    "check_bool",
    "check_choice",
    "check_count",
    "check_device",
    "check_dim",
    "check_in_interval",
    "check_in_unit_interval",
    "check_item",
    "check_name",
    "check_pair",
    "check_path",
    "check_patterns",
    "check_precise_dtype",
    "check_seed",
    "check_tensors",
]

_T = TypeVar("_T")


def check_in_unit_interval(name: str, value: float) -> float:
    """Accept a number in [0, 1]."""
    return float(check_in_interval(name, value, "[0, 1]"))


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """Accept a whole number of at least 1, or of at least another one."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        msg = f"`{name}` must be a whole number of at least {least}, got {value!r}."
        raise ArgumentError(msg)
    return int(value)


def check_dim(name: str, value: int, what: str) -> int:
    """Accept a dimension other than that of the batch."""
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        msg = f"`{name}` must be the dimension of {what}, such as 1 or -1, and not 0, which is the batch, got {value!r}."
        raise ArgumentError(msg)
    return value


def check_item(value: int | str | None, none: str = "for the first tensor") -> int | str | None:
    """Accept an index, a key, or None for what the words after it say."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        msg = f"`item` must be an index or a key in a batch, or None {none}, got {value!r}."
        raise ArgumentError(msg)
    return value


def check_seed(value: int) -> int:
    """Accept what draws can follow from: a whole number of at least 0."""
    return check_count("seed", value, least=0)


def check_in_interval(name: str, value: float, interval: str) -> float:
    """Accept a number in an interval written as in print: ``"[0, 1)"``, ``"(0, ∞)"``; infinity itself lies in none.

    Returns:
        The number as a plain one: a checkpoint with one of NumPy's does not load under ``weights_only=True``.
    """
    low, high = _bounds(interval)
    real = isinstance(value, Real) and not isinstance(value, bool)
    above = real and (low <= value if interval[0] == "[" else low < value)
    if not above or not (value <= high if interval[-1] == "]" else value < high):
        msg = f"`{name}` must lie in {interval}, got {value!r}."
        raise ArgumentError(msg)
    return int(value) if isinstance(value, Integral) else float(value)


@cache  # since some numbers are checked at each step
def _bounds(interval: str) -> tuple[float, float]:
    low, high = (float(bound.strip().replace("∞", "inf")) for bound in interval[1:-1].split(","))
    return low, high


def check_pair(name: str, value: Sequence[float], intervals: tuple[str, str]) -> tuple[float, float]:
    """Accept two numbers, each in its interval; a list, as YAML has it, becomes a tuple."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        msg = f"`{name}` must be two numbers, in {intervals[0]} and {intervals[1]}, got {value!r}."
        raise ArgumentError(msg)
    first, second = (
        check_in_interval(f"{name}[{i}]", each, interval) for i, (each, interval) in enumerate(zip(value, intervals, strict=True))
    )
    return first, second


def check_bool(name: str, value: bool) -> bool:
    """Accept True or False, and no number in their place."""
    return check_choice(name, value, (True, False))


def check_choice(name: str, value: _T, choices: Sequence[_T]) -> _T:
    """Accept one of the choices; a bool is not taken for a number, nor a number for a bool."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}."
        raise ArgumentError(msg)
    return value


def check_patterns(name: str, value: str | Sequence[str], *, empty: bool) -> str | tuple[str, ...]:
    """Accept a glob or a sequence of globs; only `empty` allows there to be none."""
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if any(not isinstance(pattern, str) or not pattern for pattern in patterns) or not (patterns or empty):
        msg = f"`{name}` must be a glob over qualified names such as 'backbone.*', or a list of globs, got {value!r}."
        raise ArgumentError(msg)
    return str(value) if isinstance(value, str) else tuple(map(str, value))


def check_tensors(name: str, values: Iterable[Tensor]) -> list[Tensor]:
    """Accept floating-point or complex tensors, from any iterable but a tensor."""
    tensors = [] if isinstance(values, Tensor) or not isinstance(values, Iterable) else list(values)
    wrong = [value for value in tensors if not (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()))]
    if wrong or isinstance(values, Tensor) or not isinstance(values, Iterable):
        found = f"a {type(values).__name__}" if not wrong else getattr(wrong[0], "dtype", f"a {type(wrong[0]).__name__} in it")
        msg = f"`{name}` must be an iterable of floating-point tensors, such as `model.parameters()`, got {found}."
        raise ArgumentError(msg)
    return tensors


def check_name(value: str | None) -> str | None:
    """Accept what can stand in a log key."""
    if value is not None and not (isinstance(value, str) and value.isidentifier()):
        msg = f"`name` must be a word of letters, digits and underscores (it becomes part of the log keys), got {value!r}."
        raise ArgumentError(msg)
    return value


def check_path(name: str, value: str | os.PathLike[str] | None) -> str | None:
    """Accept a path of the file system, and None for one of our own."""
    if value is not None and not (isinstance(value, str | os.PathLike) and str(value) and "://" not in str(value)):
        msg = f"`{name}` must be a path of the file system, or None for one in the Trainer's `default_root_dir`, got {value!r}."
        raise ArgumentError(msg)
    return None if value is None else os.fspath(value)


def check_device(value: str | torch.device | None) -> torch.device | None:
    """Accept whatever names a device of torch, and None for the model's own."""
    if value is None:
        return None
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type == "meta":  # which holds no values
        msg = f"`device` must name a device such as 'cpu' or 'cuda:0', or be None for the model's own, got {value!r}."
        raise ArgumentError(msg)
    return device


def check_precise_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """Accept float32 or float64, as dtype or by name: small updates vanish by rounding in an average of lower precision."""
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in {torch.float32, torch.float64}):
        msg = (
            "`dtype` must be 'float32' or 'float64', or None for the model's own with at least float32 "
            f"(an average of lower precision stops moving), got {value!r}."
        )
        raise ArgumentError(msg)
    return dtype
