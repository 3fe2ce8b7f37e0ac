"""Dropout as a stand-in for a layer's forward pass, with masks that follow from keys."""

from __future__ import annotations

import zlib
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_tricks._core.draws import Clock, mix
from lightning_tricks._core.surgery import StandIn
from lightning_tricks.errors import TrickError

__all__ = ["KINDS", "Kind", "Masking", "survivors"]

Kind = Literal["element", "channel", "variational", "alpha", "channel_alpha"]
KINDS = ("element", "channel", "variational", "alpha", "channel_alpha")

_Int = TypeVar("_Int", int, Tensor)
_STEPS = 2**16  # in which a probability is counted: two masks' worth of random bits from one hash of 32
_ALPHA = -1.7580993408473766  # −λα of SELU, to which it tends for large negative inputs
_UNBATCHED: dict[type[nn.Module], int] = {nn.Dropout1d: 2, nn.Dropout3d: 4}  # dimensions of an input without a batch


def survivors(key: Any, least: Tensor, count: int, device: torch.device) -> Tensor:
    """Return which of `count` values survive: those whose 16 random bits, as a signed integer, are at most `least`.

    Number i has the upper or lower half of the hash of ⌊i/2⌋ under the key, in arithmetic of 32 bits that wraps around.
    """
    first, second = _signed(mix(key)), _signed(mix(key + 1))
    bits = torch.arange((count + 1) // 2, dtype=torch.int32, device=device)
    bits ^= first
    bits ^= (bits >> 16) & 0xFFFF  # a shift that brings in zeros
    bits *= 0x7FEB352D
    bits ^= second
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed(0x846CA68B)
    bits ^= (bits >> 16) & 0xFFFF
    return bits.view(torch.int16)[:count] <= least


def _signed(value: _Int) -> _Int:
    """Take 32 bits for a signed integer."""
    return (value ^ 0x80000000) - 0x80000000


class Masking(StandIn):
    """Drops a share of what a layer gives, or of what a dropout layer takes, while the layer trains.

    Survivors become ``x · scale + shift``, and the others ``fill``: without alpha, ``x/(1 − p)`` and 0.
    """

    def __init__(self, module: nn.Module, name: str, kind: Kind, *, clock: Clock, owner: str, sequence_first: bool, replaces: bool) -> None:
        super().__init__(module)
        self.name, self.kind, self.clock, self.owner = name, kind, clock, owner
        self.sequence_first, self.replaces = sequence_first, replaces
        self.unbatched = _UNBATCHED.get(type(module), 0) if replaces else 0
        self.sampling = False  # also where the layer is evaluated
        self.least = torch.zeros((), dtype=torch.int32)
        self.scale, self.shift, self.fill = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self.rate = 0.0
        self.ran = False
        self.drawn: tuple[int, torch.device] | None = None  # for the latest batch: how many values, and where
        self._salt = mix(zlib.crc32(name.encode()))
        self.set_rate(0.0)

    def set_rate(self, rate: float) -> None:
        """Drop with this probability from now on, rounded to a multiple of 1/65536."""
        keep = max(1, round((1.0 - rate) * _STEPS))
        share, scale, fill, shift = keep / _STEPS, _STEPS / keep, 0.0, 0.0
        if "alpha" in self.kind:  # keeps mean 0 and variance 1
            scale = (share + _ALPHA**2 * share * (1.0 - share)) ** -0.5
            shift = -scale * _ALPHA * (1.0 - share)
            fill = scale * _ALPHA + shift
        self.rate = 1.0 - share
        self.least.fill_(keep - _STEPS // 2 - 1)
        for number, value in ((self.scale, scale), (self.shift, shift), (self.fill, fill)):
            number.fill_(value)

    @property
    def dropped(self) -> float | None:
        """The share of the latest batch that was dropped; None if the layer has not run."""
        if self.drawn is None:
            return None
        return 1.0 - float(survivors(self._key(int(self.clock.now)), self.least, *self.drawn).double().mean())

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not (self.module.training or self.sampling):
            return self.plain(*arguments, **options)
        if self.replaces:
            return self._drop(_input(*arguments, **options))
        outputs, structure = tree_flatten(self.plain(*arguments, **options))
        place = next((i for i, each in enumerate(outputs) if isinstance(each, Tensor) and each.is_floating_point()), None)
        if place is None:
            msg = f"{self.owner} drops part of a tensor of floating-point numbers, and {self.name!r} gives none. Exclude it."
            raise TrickError(msg)
        outputs[place] = self._drop(outputs[place])
        return tree_unflatten(outputs, structure)

    def _key(self, now: Any) -> Any:
        return mix(now ^ self._salt)

    def _drop(self, x: Tensor) -> Tensor:
        if x.is_meta:  # where a block is looked at, and has no values
            return x
        shape = self._shape(x)
        count = shape.numel()
        self.ran, self.drawn = True, (count, x.device)
        now: Any = self.clock.now if torch.compiler.is_compiling() else int(self.clock.now)
        alive = survivors(self._key(now), self.least, count, x.device).view(shape)
        if "alpha" in self.kind:
            return torch.where(alive, x * self.scale + self.shift, self.fill.to(x.dtype))
        if shape != x.shape:  # few factors for many values
            return x * (alive * self.scale).to(x.dtype)
        return torch.where(alive, x * self.scale, 0.0)

    def _shape(self, x: Tensor) -> torch.Size:
        """Return the shape of the mask, with ones where it is the same for all."""
        sizes = list(x.shape)
        if "channel" in self.kind:
            first = 1 if x.ndim == self.unbatched else 2
            sizes[first:] = [1] * len(sizes[first:])
        elif self.kind == "variational" and x.ndim > 2:
            shared = range(1) if self.sequence_first else range(1, x.ndim - 1)
            sizes = [1 if dimension in shared else size for dimension, size in enumerate(sizes)]
        return torch.Size(sizes)


def _input(input: Tensor) -> Tensor:  # noqa: A002  # the name of the layers' own argument
    return input
