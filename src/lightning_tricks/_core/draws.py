"""Random numbers that follow from a key alone, in Python and on any device, without any generator's state.

Whoever has the key of a moment can draw again what was drawn at it: a resumed run, or activation checkpointing. The same function
serves Python's integers and tensors of int64, so that compiled and eager code draw the same.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Clock", "fold", "mix", "order_of_rows", "tick", "uniform", "uniforms"]

_MASK = 0xFFFFFFFF
_Int = TypeVar("_Int", int, Tensor)


def mix(value: _Int) -> _Int:
    """Hash integers of 32 bits, one to one, so that each bit of the input changes half of the output's."""
    value = value & _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def fold(*values: int) -> int:
    """Hash several integers, in their order, into one."""
    key = 0
    for value in values:
        key = mix(key ^ mix(value + 0x9E3779B9))
    return key


def uniform(key: _Int) -> _Int | float:
    """Return the number in [0, 1) that belongs to a key."""
    return mix(key + 0x85EBCA6B) / 2**32


def uniforms(key: int | Tensor, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a table of numbers in [0, 1), multiples of 2⁻²⁴, that belongs to a key; what a row holds does not depend on other rows."""
    row, column = (torch.arange(1, count + 1, device=device) for count in (rows, columns))
    bits = mix(mix(mix(row) ^ key)[:, None] + column * 0x9E3779B9)
    return (bits >> 8).to(torch.float32) / 2**24


def order_of_rows(key: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Return the permutation of rows that belongs to a key."""
    rows = torch.arange(count, device=device)
    return torch.argsort(mix(mix(rows + 1) ^ key), stable=True)


@torch.library.custom_op("lightning_tricks::tick", mutates_args=("moment",), schema="(Tensor(a!) moment) -> ()")
def tick(moment: Tensor) -> None:
    """Go on by one.

    An operator by itself, since a compiled backward pass may compute again what it needs, and would start from the later moment if it
    could look into this.
    """
    moment.copy_((moment + 1) & _MASK)


class Clock:
    """The moment from which all draws of a model follow; a tensor, since compiled code reads it without compiling anew."""

    def __init__(self, seed: int) -> None:
        self.now = torch.tensor(fold(seed))

    def set(self, *moment: int) -> None:
        """Go to a moment: a seed, a rank, a step, ..."""
        self.now.fill_(fold(*moment))

    def tick(self) -> None:
        """Go on by one."""
        tick(self.now)
