"""All averages of one model, and which weights the model holds."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from lightning_tricks._core.shards import Runs
from lightning_tricks._core.strategies import (
    as_sharded,
    holder_of,
    is_sharded,
    named_tensors,
    own_part,
    return_to_shards,
    stored_tensors,
    whole,
)
from lightning_tricks._core.weights import copy_, memory

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
        return any(track.begun is not None for track in self.tracks)

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

    def write(self, raw: Mapping[str, Tensor]) -> None:
        """Give the model these training weights, in place of averages that came with a checkpoint."""
        own = named_tensors(self.module)
        copy_([own_part(own[name]) for name in raw], list(raw.values()))

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
        """Return tensors for a checkpoint: sharded as the model's if asked, or else whole, on the rank that writes.

        All ranks must call this together.
        """
        likes = {name: place.shards or place.tensor for track in self.tracks for name, place in track.places.items()}
        if sharded:
            return {name: as_sharded(part, likes[name]) for name, part in parts.items()}
        wholes = {name: whole(part, likes[name]) for name, part in parts.items()}
        return {name: tensor for name, tensor in wholes.items() if tensor is not None}

    def replaced(self, state_dict: dict[str, Any], parts: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the model's state dict with other tensors, in the dtype that it has.

        Tensors are found by the memory that they share with the model's, whatever their names, or else, as copies, by name. All ranks
        must call this together; a state dict that is gathered on one rank is empty on the others.
        """
        return_to_shards(self.module)
        tensors = self.laid_out(parts, sharded=is_sharded(state_dict))
        live = {name: place.holder for track in self.tracks for name, place in track.places.items() if name in tensors}
        by_memory = {memory(tensor): name for name, tensor in live.items() if tensor.numel()}
        same = {id(tensor): name for name, tensor in live.items()}
        holders = {name: id(holder_of(tensor)) for name, tensor in named_tensors(self.module).items()}
        by_name = {name: same[holder] for name, holder in holders.items() if holder in same}
        state = copy(state_dict)  # which keeps `_metadata`
        for key, value in state_dict.items():
            name = by_memory.get(memory(value)) if isinstance(value, Tensor) and value.numel() else None
            if name is not None and value.stride() != live[name].stride():  # another view of the same memory
                offset = value.storage_offset() - live[name].storage_offset()
                state[key] = tensors[name].as_strided(value.shape, value.stride(), tensors[name].storage_offset() + offset).to(value)
            elif (name := name or by_name.get(key)) is not None:
                state[key] = tensors[name].to(value)
        return state
