"""Which tensors are averaged, and which optimizer moves each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.parameter import is_lazy

from lightning_tricks._core.selection import matches
from lightning_tricks._core.shards import Shards
from lightning_tricks._core.strategies import moved_by, named_tensors, own_part, owner_of, plain_name, return_to_shards
from lightning_tricks._core.weights import memory
from lightning_tricks.averaging._tracks import Place, Storage, Track
from lightning_tricks.errors import TrickError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Roster", "list_places", "place_of", "some"]


def place_of(module: nn.Module, name: str, tensor: Tensor | Shards, buffers: Literal["average", "keep"]) -> Place:
    """Return where a named parameter or buffer lives."""
    owner, key = owner_of(module, name)
    kind = "parameter" if key in owner._parameters else buffers
    return Place(owner, key, kind, tensor if isinstance(tensor, Shards) else None)


class Roster:
    """The assignment of tensors to tracks.

    Each parameter goes with the optimizer that holds it, buffers and parameters that no optimizer holds with the first. A frozen
    parameter waits until it is thawed, one that is not initialized until it is.
    """

    def __init__(self, optimizers: Sequence[Optimizer], storage: Storage, *, steps: int) -> None:
        self.tracks: list[Track] = []
        self.waiting: dict[str, Place] = {}
        self._optimizers, self._storage = optimizers, storage
        self._moved: list[set[int]] = []
        self._frozen: list[Tensor] = []
        self._lazy = False
        self._steps = steps // max(1, len(optimizers))  # of each, where no track has counted them

    def enroll(self, places: Mapping[str, Place], earlier: Sequence[Track]) -> tuple[list[str], list[str]]:
        """Assign every place to a track, taking counts and averages over from earlier tracks.

        Returns:
            Names whose earlier average is no longer wanted, and names that join averages begun earlier.
        """
        self._look_up_moved()
        held = {name: track for track in earlier for name in track.places}
        for name, place in places.items():
            source = held.get(name)
            kept = source.kept(name) if source else []
            if not kept and not _ready(place):
                self.waiting[name] = place
                continue
            fits = all(tensor.shape == place.tensor.shape for tensor in kept)
            self._track_of(place, source).follow(name, place, kept if fits else ())
        self._sort_waiting()
        lost = [name for track in earlier for name in track.names if name not in places]
        joined = [name for track in self.tracks for name in track.names if earlier and name not in held]
        return lost, joined

    def admit(self) -> None:
        """Let those in that need wait no longer, before the optimizer moves them for the first time."""
        if not any(tensor.requires_grad for tensor in self._frozen) and not self._lazy:
            return
        admitted = [name for name, place in self.waiting.items() if _ready(place)]
        if admitted:
            self._look_up_moved()
        for name in admitted:
            place = self.waiting.pop(name)
            self._track_of(place, None).follow(name, place)
        self._sort_waiting()

    def _sort_waiting(self) -> None:
        """Prepare the question that is asked before each step."""
        tensors = [place.holder for place in self.waiting.values()]
        self._lazy = any(map(is_lazy, tensors))
        self._frozen = [tensor for tensor in tensors if not tensor.requires_grad]

    def _look_up_moved(self) -> None:
        self._moved = [moved_by(optimizer) for optimizer in self._optimizers]

    def _track_of(self, place: Place, source: Track | None) -> Track:
        key = tuple(i for i, moved in enumerate(self._moved) if id(place.holder) in moved) or (0,)
        for track in self.tracks:
            if track.optimizers == key:
                return track
        track = self._storage.kind(key, self._storage, steps=self._steps)
        if source is not None:
            track.go_on_from(source)
        self.tracks.append(track)
        return track


def list_places(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    where: str | Sequence[str],
    exclude: str | Sequence[str],
    buffers: Literal["average", "copy", "keep"],
) -> dict[str, Place]:
    """Return the places of the parameters and, unless they are copied, of the floating-point buffers that a state dict holds.

    A buffer with infinities, such as an attention mask, is a constant: averaging would turn it into NaNs.
    """
    return_to_shards(module)
    tensors = named_tensors(module)
    places = {name: place_of(module, name, tensors[name], "keep") for name in _once_per_memory(parameters)}
    if buffers == "copy":
        return places
    for name, buffer in ((plain_name(name), buffer) for name, buffer in module.named_buffers()):
        place = place_of(module, name, buffer, buffers)
        wanted = matches(name, where) and not matches(name, exclude)
        stored = place.key not in place.owner._non_persistent_buffers_set
        if wanted and stored and (is_lazy(buffer) or (buffer.is_floating_point() and bool(torch.isfinite(buffer).all()))):
            places[name] = place
    return places


def _once_per_memory(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of parameters without those that are another view of one before, such as a transpose.

    Raises:
        TrickError: If two parameters overlap in part, so that no exchange of both would be exact.
    """
    names: list[str] = []
    covered: dict[int, list[tuple[int, int, str]]] = {}
    for name, parameter in parameters.items():
        if is_lazy(parameter) or not own_part(parameter).numel():
            names.append(name)
            continue
        address, first, last = memory(parameter)
        overlapping = [part for part in covered.get(address, ()) if first <= part[1] and part[0] <= last]
        if not overlapping:
            names.append(name)
            covered.setdefault(address, []).append((first, last, name))
        elif overlapping[0][:2] != (first, last):
            msg = (
                "Parameters must share their memory with others wholly or not at all to be averaged, and "
                f"{overlapping[0][2]!r} and {name!r} share a part. `exclude` one of them."
            )
            raise TrickError(msg)
    return names


def some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many there are beside it."""
    return f"{names[0]!r}" if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"


def _ready(place: Place) -> bool:
    return not is_lazy(place.holder) and (place.kind != "parameter" or place.holder.requires_grad)
