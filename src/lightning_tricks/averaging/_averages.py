"""All averages of one model, and which weights the model holds."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.weights import named_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from lightning_tricks.averaging._tracks import Track

__all__ = ["Averages"]


class Averages:
    """The tracks of one model.

    Nobody tells a callback when a user loads other weights into the model between two calls of the Trainer. Therefore the versions
    of the tensors are noted when the Trainer hands the model back (`mark`), and compared when it returns (`untouched`).
    """

    def __init__(self, module: nn.Module, tracks: Sequence[Track] = ()) -> None:
        self.module = module
        self.tracks = list(tracks)
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
        for track in self.tracks:
            track.put_average()

    def put_raw(self) -> None:
        """Let the model hold the training weights."""
        for track in self.tracks:
            track.put_raw()

    def averaged(self) -> dict[str, Tensor]:
        """Return the averages by name, without a copy."""
        return {name: tensor for track in self.tracks for name, tensor in track.averaged().items()}

    def raw(self) -> dict[str, Tensor]:
        """Return the training weights of the averages that have begun, by name and without a copy."""
        return {name: tensor for track in self.tracks for name, tensor in track.raw().items()}

    def replaced(self, state_dict: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the model's state dict with other tensors, tied ones under each of their names, in the dtype that it has."""
        own = named_tensors(self.module)
        by_identity = {id(own[name]): tensor for name, tensor in tensors.items()}
        state: dict[str, Any] = copy(state_dict)  # which keeps `_metadata`
        for name in state.keys() & own.keys():
            if id(own[name]) in by_identity:
                state[name] = by_identity[id(own[name])].to(state[name].dtype)
        return state

    def mark(self) -> None:
        """Note the state in which the model is handed back."""
        self._versions = [track.versions() for track in self.tracks]

    def untouched(self, module: nn.Module) -> bool:
        """Tell whether this is the same model, and nobody has written to its weights since `mark`."""
        return self.module is module and self._versions == [track.versions() for track in self.tracks]
