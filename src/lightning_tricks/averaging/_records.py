"""What a checkpoint keeps of averages, beyond the state dict that holds those one would deploy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_tricks._core.checkpoint import check_tensors
from lightning_tricks.averaging._roster import place_of
from lightning_tricks.averaging._tracks import Storage, Track
from lightning_tricks.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from lightning_tricks.averaging._averages import Averages

__all__ = ["pack", "unpack"]

_COUNTS = ("steps", "begun", "epoch", "latest", "updates")


def pack(averages: Averages, state_dict: Mapping[str, Tensor], *, deployed: bool) -> dict[str, Any]:
    """Return what resuming needs besides the state dict.

    Args:
        averages: The averages.
        state_dict: The checkpoint's.
        deployed: Whether the state dict holds the averages.

    Returns:
        The counts of each track; the training weights if they are not in the state dict; and the averages that are not there, or
        are there in lower precision only.
    """
    averaged = averages.averaged()
    in_state = {name for name, average in averaged.items() if deployed and name in state_dict and state_dict[name].dtype == average.dtype}
    return {
        "tracks": [
            {
                "optimizers": list(track.optimizers),
                **{count: getattr(track, count) for count in _COUNTS},
                "names": list(track.places),
                "buffers": next((place.kind for place in track.places.values() if place.kind != "parameter"), "keep"),
            }
            for track in averages.tracks
        ],
        "raw": averages.raw() if deployed else {},
        "average": {name: average for name, average in averaged.items() if name not in in_state},
        "deployed": deployed,
    }


def unpack(
    entry: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    module: nn.Module,
    state_key: str,
    storage: Storage,
) -> tuple[list[Track], dict[str, Tensor]]:
    """Read back what `pack` wrote, for a model that holds the checkpoint's state dict, and change nothing.

    Returns:
        The tracks with their averages, and the training weights where the state dict holds averages.

    Raises:
        CheckpointError: If anything is missing or does not fit the model.
    """
    try:
        raw, average = dict(entry["raw"]), dict(entry["average"])
        tracks = []
        for record in entry["tracks"]:
            track = Track(tuple(record["optimizers"]), storage, **{count: record[count] for count in _COUNTS})
            names = [] if track.begun is None else record["names"]
            tensors = {name: average[name] if name in average else state_dict[name] for name in names}
            check_tensors(module, tensors, state_key)
            check_tensors(module, {name: raw[name] for name in names if entry["deployed"]}, state_key)
            for name in names:
                track.follow(name, place_of(module, name, record["buffers"]), tensors[name])
            tracks.append(track)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        msg = (
            f"The checkpoint's entry for {state_key} is incomplete or damaged ({type(error).__name__}: {error}). Nothing of it was loaded. "
            "Resume from another checkpoint, or give the callback another `name` to start a new average."
        )
        raise CheckpointError(msg) from error
    return tracks, raw
