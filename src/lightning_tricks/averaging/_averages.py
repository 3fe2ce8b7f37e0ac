"""All averages of one model, and which weights the model holds."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.strategies import as_sharded, is_sharded, own_part, return_to_shards, whole
from lightning_tricks._core.weights import copy_, named_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from lightning_tricks.averaging._tracks import Storage, Track

__all__ = ["Averages"]


class Averages:
    """The tracks of one model.

    Nobody tells a callback when a user loads other weights into the model between two calls of the Trainer. Therefore the versions
    of the tensors are noted when the Trainer hands the model back (`mark`), and compared when it returns (`untouched`).
    """

    def __init__(self, module: nn.Module, storage: Storage) -> None:
        self.module, self.storage = module, storage
        self.tracks: list[Track] = []
        self._versions: list[list[int]] = []
        self.mark()

    @property
    def begun(self) -> bool:
        """Whether any average has begun."""
        return any(track.begun is not None for track in self.tracks)

    @property
    def inside(self) -> bool:
        """Whether the model holds averages."""
        return any(track.inside for track in self.tracks)

    def put_average(self) -> None:
        """Let the model hold the averages that have begun."""
        return_to_shards(self.module)
        for track in self.tracks:
            track.put_average()

    def put_raw(self) -> None:
        """Let the model hold the training weights."""
        return_to_shards(self.module)
        for track in self.tracks:
            track.put_raw()

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
        return {name: tensor for track in self.tracks for name, tensor in track.raw().items()}

    def laid_out(self, parts: Mapping[str, Tensor], *, sharded: bool) -> dict[str, Tensor]:
        """Return tensors for a checkpoint: sharded as the model's if asked, or else whole, on the rank that writes.

        All ranks must call this together.
        """
        likes = {name: place.whole for track in self.tracks for name, place in track.places.items()}
        if sharded:
            return {name: as_sharded(part, likes[name]) for name, part in parts.items()}
        wholes = {name: whole(part, likes[name]) for name, part in parts.items()}
        return {name: tensor for name, tensor in wholes.items() if tensor is not None}

    def replaced(self, state_dict: dict[str, Any], parts: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the model's state dict with other tensors, tied ones under each of their names, in the dtype that it has.

        All ranks must call this together. A state dict that is gathered on one rank is empty on the others.
        """
        return_to_shards(self.module)
        tensors = self.laid_out(parts, sharded=is_sharded(state_dict))
        own = named_tensors(self.module)
        by_identity = {id(own[name]): tensor for name, tensor in tensors.items()}
        state = copy(state_dict)  # which keeps `_metadata`
        for name in state.keys() & own.keys():
            if id(own[name]) in by_identity:
                state[name] = by_identity[id(own[name])].to(state[name])
        return state

    def mark(self) -> None:
        """Note the state in which the model is handed back."""
        self._versions = [track.versions() for track in self.tracks]

    def untouched(self, module: nn.Module) -> bool:
        """Tell whether this is the same model, and nobody has written to its weights since `mark`."""
        return self.module is module and self._versions == [track.versions() for track in self.tracks]
