"""All averages of one model, and which weights the model holds."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from lightning_tricks._core.shards import Runs, Shards
from lightning_tricks._core.state_dicts import laid_out, replaced
from lightning_tricks._core.strategies import (
    holder_of,
    named_tensors,
    own_part,
    return_to_shards,
    stored_tensors,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from lightning_tricks.averaging._tracks import Storage, Track

__all__ = ["Averages"]

_OF_MODEL: WeakKeyDictionary[nn.Module, WeakSet[Averages]] = WeakKeyDictionary()


class Averages:
    """The tracks of one model.

    Nobody tells a callback when a user loads other weights into the model between two calls of the Trainer. Therefore the versions
    of the tensors are noted when the Trainer hands the model back (`mark`), and compared when it returns (`untouched`). Several
    callbacks may average one model; what one of them puts into it is no change to the others.
    """

    def __init__(self, module: nn.Module, storage: Storage) -> None:
        self.module, self.storage = module, storage
        self.tracks: list[Track] = []
        self._versions: list[list[int]] = []
        _OF_MODEL.setdefault(module, WeakSet()).add(self)

    @property
    def begun(self) -> bool:
        """Whether any average has begun."""
        return any(track.started for track in self.tracks)

    @property
    def inside(self) -> bool:
        """Whether the model holds averages."""
        return any(track.inside for track in self.tracks)

    @property
    def cut_in_runs(self) -> bool:
        """Whether the strategy spreads parameters as no tensor can be."""
        return any(isinstance(tensor, Runs) for tensor in named_tensors(self.module).values())

    @property
    def untouched(self) -> bool:
        """Whether nobody has written to the weights since `mark`."""
        return self._versions == [track.versions() for track in self.tracks]

    def mark(self) -> None:
        """Note the state in which the model is handed back."""
        self._versions = [track.versions() for track in self.tracks]

    def put_average(self) -> None:
        """Let the model hold the averages that have begun."""
        self._put(average=True)

    def put_raw(self) -> None:
        """Let the model hold the training weights."""
        self._put(average=False)

    def _put(self, *, average: bool) -> None:
        return_to_shards(self.module)
        undisturbed = [other for other in _OF_MODEL[self.module] if other.untouched]
        for track in self.tracks:
            if average:
                track.put_average()
            else:
                track.put_raw()
        for other in undisturbed:
            other.mark()

    def adopt(self, raw: Mapping[str, Tensor]) -> None:
        """Keep these training weights aside, for a model that came with its averages."""
        for track in self.tracks if raw else ():
            track.adopt(raw)
        self.mark()

    def averaged(self) -> dict[str, Tensor]:
        """Return this rank's parts of the averages by name, without a copy."""
        return {name: tensor for track in self.tracks for name, tensor in track.averaged().items()}

    def raw(self) -> dict[str, Tensor]:
        """Return this rank's parts of the training weights of the averages that have begun, by name and without a copy."""
        raw = {name: tensor for track in self.tracks for name, tensor in track.raw().items()}
        for other in _OF_MODEL[self.module]:
            if other is not self and other.inside:
                raw |= {name: tensor for track in other.tracks for name, tensor in track.raw().items() if name in raw}
        return raw

    @contextmanager
    def holding(self, *, average: bool) -> Iterator[None]:
        """Let the model hold the averages, or the training weights, for the length of a ``with`` block."""
        inside = self.inside
        self._put(average=average)
        try:
            yield
        finally:
            self._put(average=inside)

    def others(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's parts of what tracks keep besides, by name in groups, without a copy."""
        groups: dict[str, dict[str, Tensor]] = {}
        for track in self.tracks:
            for i, tensors in enumerate(track.others):
                groups.setdefault(f"other_{i}", {}).update(tensors)
        return groups

    def state_dict(self, *, averaged: bool) -> dict[str, Tensor]:
        """Return copies of the model's state, with averages or with training weights.

        Where parameters are spread over ranks as no state dict can be, all ranks must call this together, and rank zero gets the state.
        """
        return_to_shards(self.module)
        parts = self.averaged() if averaged else self.raw()
        if self.cut_in_runs:
            held = {id(place.holder): parts[name] for track in self.tracks for name, place in track.places.items() if name in parts}
            stored = stored_tensors(self.module)
            wholes = {name: whole(held.get(id(holder_of(tensor)), own_part(tensor)), tensor) for name, tensor in stored.items()}
            state: dict[str, Any] = dict(wholes) if torch.distributed.get_rank() == 0 else {}
        else:
            state = self.replaced(self.module.state_dict(), parts)
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def laid_out(self, parts: Mapping[str, Tensor], *, sharded: bool) -> dict[str, Tensor]:
        """Return tensors for a checkpoint; see `_core.state_dicts.laid_out`."""
        return laid_out(parts, self._live(), sharded=sharded)

    def replaced(self, state_dict: dict[str, Any], parts: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the model's state dict with other tensors; see `_core.state_dicts.replaced`."""
        return replaced(state_dict, parts, self._live(), self.module)

    def _live(self) -> dict[str, Tensor | Shards]:
        """Return the model's tensors by name, and shards for those that are spread over ranks."""
        return {name: place.shards or place.holder for track in self.tracks for name, place in track.places.items()}
