"""Averages beside the tensors they follow, and which of the two the model holds.

One `Track` follows the tensors that one optimizer moves (or the same several optimizers). It counts that optimizer's steps, so
that an average is updated when, and only when, the weights it follows have taken a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lightning_tricks._core.weights import copy_, lerp_, swap_

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from lightning_tricks._core.shards import Shards

__all__ = ["Place", "Storage", "Track"]


@dataclass(frozen=True)
class Place:
    """Where a tensor lives. It is looked up at each use, so that a tensor put there later is found.

    One that is spread over ranks is held instead, since its place may at times be taken by the whole that was gathered from it.
    """

    owner: nn.Module
    key: str
    kind: Literal["parameter", "average", "keep"]  # a parameter, or what becomes of a buffer
    shards: Shards | None = None

    @property
    def holder(self) -> Tensor:
        """The parameter or buffer itself, as the optimizer knows it."""
        tensor = self.table[self.key] if self.shards is None else self.shards.parameter
        assert tensor is not None
        return tensor

    @property
    def tensor(self) -> Tensor:
        """The part of it that this rank owns, which may be all."""
        return self.holder if self.shards is None else self.shards.own

    @property
    def version(self) -> int:
        """A number that changes when somebody writes to it."""
        return self.holder._version if self.shards is None else self.shards.version

    @property
    def table(self) -> Mapping[str, Tensor | None]:
        """Where its owner keeps tensors of this kind; the same object for as long as the owner lives."""
        return self.owner._parameters if self.kind == "parameter" else self.owner._buffers


@dataclass
class Track:
    """The averages of the tensors that one optimizer moves.

    Attributes:
        optimizers: Indices of the optimizers that move these tensors.
        storage: How averages are kept.
        steps: Steps taken so far.
        begun: Number of steps at which the average began; None before.
        epoch: Epoch of the first step after it began.
        latest: Number of steps at the latest update.
        updates: Number of updates.
        inside: Whether the model holds the averages. Then `averages` holds the training weights where the dtypes agree, and the
            untouched averages, of which the model has a rounded copy, where they do not.
        others: Further averages, which the model never holds.
    """

    derived: ClassVar[bool] = False
    """Whether `averages` follow from `others`, so that a checkpoint need not hold them."""

    optimizers: tuple[int, ...]
    storage: Storage
    steps: int = 0
    begun: int | None = None
    epoch: int = 0
    latest: int = 0
    updates: int = 0
    inside: bool = False
    places: dict[str, Place] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    others: list[dict[str, Tensor]] = field(default_factory=list)
    _raw_of_rounded: dict[str, Tensor] = field(default_factory=dict)
    _buffers: list[str] = field(default_factory=list)
    _moving: tuple[list[tuple[Shards | None, Mapping[str, Tensor | None], str]], list[list[Tensor]]] | None = None  # looked up once

    def __post_init__(self) -> None:
        self.others = [{} for _ in range(self.storage.count - 1)]

    @property
    def age(self) -> int:
        """Steps from the average's beginning to its latest update."""
        return self.latest - (self.begun or 0)

    @property
    def started(self) -> bool:
        """Whether there are averages."""
        return self.begun is not None

    @property
    def names(self) -> list[str]:
        """Names of the tensors that have averages."""
        return list(self.averages)

    def kept(self, name: str) -> list[Tensor]:
        """Return what is kept of a tensor, for another track to go on from."""
        return [table[name] for table in (self.averages, *self.others) if name in table]

    def go_on_from(self, source: Track) -> None:
        """Take over the counts of another track."""
        self.steps, self.begun, self.epoch = source.steps, source.begun, source.epoch
        self.latest, self.updates = source.latest, source.updates

    def follow(self, name: str, place: Place, kept: Sequence[Tensor | None] = ()) -> None:
        """Add a tensor. If the track has begun, its averages are those kept before, or else the tensor as it is now."""
        assert not self.inside
        self.places[name] = place
        if place.kind != "parameter":
            self._buffers.append(name)
        if self.begun is not None:
            self._store(name, kept)

    def begin(self, epoch: int) -> None:
        """Start every average as its tensor is now."""
        self.begun = self.latest = self.steps
        self.epoch = epoch
        for name in self.places:
            self._store(name)

    def update(self, *weights: float) -> None:
        """Move every average towards its tensor, those of each kind by a weight of their own."""
        assert not self.inside
        self._restart_resized()
        if self._moving is None:
            names = [name for name, place in self.places.items() if place.kind != "keep"]
            places = [(self.places[name].shards, self.places[name].table, self.places[name].key) for name in names]
            self._moving = places, [[table[name] for name in names] for table in (self.averages, *self.others)]
        places, tables = self._moving
        live = [table[key] if shards is None else shards.own for shards, table, key in places]
        for averages, weight in zip(tables, weights, strict=True):
            lerp_(averages, live, weight)  # type: ignore[arg-type]
        self.latest = self.steps
        self.updates += 1

    def put_average(self) -> None:
        """Let the model hold the averages."""
        if self.inside or self.begun is None:
            return
        self._restart_resized()
        with torch.inference_mode(mode=False):
            rounded = {name: tensor for name, tensor in self._live().items() if tensor.dtype != self.averages[name].dtype}
            self._raw_of_rounded = {name: tensor.detach().clone() for name, tensor in rounded.items()}
            copy_(list(rounded.values()), [self.averages[name] for name in rounded])
            self._exchange()
        self.inside = True

    def put_raw(self) -> None:
        """Let the model hold the training weights again."""
        if not self.inside:
            return
        with torch.inference_mode(mode=False):
            copy_([self.places[name].tensor for name in self._raw_of_rounded], list(self._raw_of_rounded.values()))
            self._exchange()
        self._raw_of_rounded = {}
        self.inside = False

    def adopt(self, raw: Mapping[str, Tensor]) -> None:
        """Take note that the model has been given the averages from elsewhere, and that these are the training weights."""
        assert not self.inside
        for name, tensor in self._live().items():
            table = self.averages if tensor.dtype == self.averages[name].dtype else self._raw_of_rounded
            table[name] = raw[name]
        self._moving = None
        self.inside = True

    def raw(self) -> dict[str, Tensor]:
        """Return the training weights, wherever they are, without a copy."""
        live = {name: tensor.detach() for name, tensor in self._live().items()}
        return {**self.averages, **self._raw_of_rounded} if self.inside else live

    def averaged(self) -> dict[str, Tensor]:
        """Return the averages, wherever they are, without a copy."""
        if not self.inside:
            return dict(self.averages)
        return {name: self.averages[name] if name in self._raw_of_rounded else tensor.detach() for name, tensor in self._live().items()}

    def versions(self) -> list[int]:
        """Return numbers that change when somebody writes to a parameter that is followed.

        Buffers are left out: evaluation may write to them, and moving a model makes new ones.
        """
        averaged = set(self.names)
        return [place.version for name, place in self.places.items() if name in averaged and place.kind == "parameter"]

    def _live(self) -> dict[str, Tensor]:
        return {name: self.places[name].tensor for name in self.names}

    def _exchange(self) -> None:
        names = [name for name in self.averages if name not in self._raw_of_rounded]
        swap_([self.places[name].tensor for name in names], [self.averages[name] for name in names])

    def _store(self, name: str, kept: Sequence[Tensor | None] = ()) -> None:
        self._moving = None
        for table, value in zip_longest((self.averages, *self.others), kept[: self.storage.count]):
            table[name] = self._stored(name, value)

    def _stored(self, name: str, value: Tensor | None = None) -> Tensor:
        """Return a value, or else a copy of the tensor as it is now, in the form that is kept."""
        dtype, device = self._form(name)
        if value is not None and (value.dtype, value.device) == (dtype, device):
            return value
        like = self.places[name].tensor
        with torch.inference_mode(mode=False), torch.no_grad():
            average = torch.empty_like(like, dtype=dtype, device=device, requires_grad=False)
            return average.copy_(like if value is None else value)

    def _form(self, name: str) -> tuple[torch.dtype, torch.device]:
        """Return the dtype and the device in which an average is kept."""
        like = self.places[name].tensor
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.storage.dtype is not None:
            dtype = self.storage.dtype.to_complex() if like.is_complex() else self.storage.dtype
        return dtype, self.storage.device or like.device

    def _restart_resized(self) -> None:
        """Begin anew where a buffer has been replaced by one of another shape."""
        for name in self._buffers:
            if any(tensor.shape != self.places[name].tensor.shape for tensor in self.kept(name)):
                self._store(name)


@dataclass(frozen=True)
class Storage:
    """How averages are kept.

    Attributes:
        device: The device; None for beside their tensor.
        dtype: The dtype; None for the tensor's own, with at least float32.
        kind: What tracks are made of.
        count: How many averages, or checkpoints at most, are kept of each tensor.
    """

    device: torch.device | None
    dtype: torch.dtype | None
    kind: type[Track] = Track
    count: int = 1
