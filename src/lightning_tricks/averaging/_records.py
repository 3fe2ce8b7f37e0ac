"""What a checkpoint keeps of averages, beyond the state dict that holds those one would deploy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_tricks._core.checkpoint import check_tensors, other_entries
from lightning_tricks._core.strategies import cut, holder_of, is_sharded, load_parts, named_tensors, return_to_shards
from lightning_tricks.averaging._averages import Averages
from lightning_tricks.averaging._roster import place_of
from lightning_tricks.averaging._tracks import Storage, Track
from lightning_tricks.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["pack", "sharded_name", "unpack", "unpack_absent"]

_COUNTS = ("steps", "begun", "epoch", "latest", "updates")


def pack(averages: Averages, checkpoint: dict[str, Any], state_key: str, *, deployed: bool, own_files: bool = False) -> dict[str, Any]:
    """Return what resuming needs besides the state dict. All ranks must call this together.

    Args:
        averages: The averages.
        checkpoint: The checkpoint. If it is sharded, tensors go into its state dict, under names that no model has.
        state_key: Whose averages they are.
        deployed: Whether the state dict holds the averages.
        own_files: Whether each rank writes what it has, as DeepSpeed's do. Then this is its parts.

    Returns:
        The counts of each track; the training weights if they are not in the state dict; and the averages that are not there, or
        are there in lower precision only.
    """
    state_dict = checkpoint["state_dict"]
    sharded = is_sharded(state_dict)
    lay_out = dict if own_files else partial(averages.laid_out, sharded=sharded)
    averaged = averages.averaged()
    if own_files and averages.inside:  # the model is about to take the training weights back, and its tensors are theirs
        averaged = {name: part.clone() for name, part in averaged.items()}
    places = {name: place for track in averages.tracks for name, place in track.places.items()}
    held = {
        name
        for name, average in averaged.items()
        if deployed and average.dtype == places[name].tensor.dtype and (places[name].shards is not None or name in state_dict)
    }
    tensors = {
        "raw": lay_out(averages.raw() if deployed else {}),
        "average": lay_out({name: part for name, part in averaged.items() if name not in held}),
    }
    dtypes: dict[str, dict[str, str]] = {"raw": {}, "average": {}}  # of the tensors in the state dict
    for group, members in tensors.items() if sharded else ():
        state_dict.update({sharded_name(state_key, group, name): tensor for name, tensor in members.items()})
        dtypes[group] = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in members.items()}
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
        **({"raw": {}, "average": {}} if sharded else tensors),
        "sharded": dtypes,
        "deployed": deployed,
        "own_files": own_files,
        "aliases": _aliases(averages) if own_files else {},
    }


def _aliases(averages: Averages) -> dict[str, str]:
    """Return the other names of tied parameters, each with the one under which its average is kept."""
    followed = {id(place.holder): name for track in averages.tracks for name, place in track.places.items()}
    names = {name: followed.get(id(holder_of(tensor)), name) for name, tensor in named_tensors(averages.module).items()}
    return {alias: name for alias, name in names.items() if alias != name}


def unpack(
    entry: Mapping[str, Any], checkpoint: Mapping[str, Any], averages: Averages, path: str | Path | None, state_key: str
) -> dict[str, Tensor]:
    """Read back what `pack` wrote into empty averages of a model that holds the checkpoint's state dict. Nothing else is changed.

    Args:
        entry: What `pack` returned.
        checkpoint: The checkpoint.
        averages: Where the tracks go.
        path: Where the checkpoint was read from.
        state_key: Whose averages they are.

    Returns:
        This rank's parts of the training weights, where the state dict holds averages.

    Raises:
        CheckpointError: If anything is missing or does not fit the model; then `averages` are empty.
    """
    return_to_shards(averages.module)
    try:
        _check_counts(entry)
        own = named_tensors(averages.module)
        raw, average = (_read(entry, group, averages.module, path, state_key) for group in ("raw", "average"))
        tracks = [
            Track(tuple(record["optimizers"]), averages.storage, **{count: record[count] for count in _COUNTS})
            for record in entry["tracks"]
        ]
        for track, record in zip(tracks, entry["tracks"], strict=True):
            for name in record["names"] if track.begun is not None else ():
                if name not in average:
                    # The model has it, unless it was not loaded there.
                    _ = raw[name], checkpoint.get("state_dict", raw)[name]
                track.follow(name, place_of(averages.module, name, own[name], record["buffers"]), average.get(name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        msg = (
            f"The checkpoint's entry for {state_key} is incomplete or damaged ({type(error).__name__}: {error}). Nothing of it was loaded. "
            "Resume from another checkpoint, or give the callback another `name` to start a new average."
        )
        raise CheckpointError(msg) from error
    averages.tracks = tracks
    return raw


def unpack_absent(
    checkpoint: Mapping[str, Any], module: nn.Module, present: Collection[str], path: str | Path | None
) -> dict[str, dict[str, Tensor]]:
    """Read the training weights that callbacks which are not there had replaced by averages in the state dict.

    Returns:
        This rank's parts of the weights, by what each callback calls itself.

    Raises:
        CheckpointError: If anything is missing or does not fit the model.
    """
    storage = Storage(None, None)
    return {
        str(entry.get("trick", state_key)): unpack(entry, checkpoint, Averages(module, storage), path, state_key)
        for state_key, entry in other_entries(checkpoint, present).items()
        if entry.get("deployed")
    }


def _read(entry: Mapping[str, Any], group: str, module: nn.Module, path: str | Path | None, state_key: str) -> dict[str, Tensor]:
    """Return this rank's parts of the tensors of a group, from the entry or, if they are sharded, from the file."""
    own = named_tensors(module)
    stored, dtypes = dict(entry[group]), entry["sharded"][group]
    own_files = entry.get("own_files", False)
    check_tensors(module, stored, state_key, parts=own_files)
    if own_files:
        return stored
    likes = {sharded_name(state_key, group, name): own[name] for name in dtypes}
    wanted = {sharded_name(state_key, group, name): getattr(torch, dtype) for name, dtype in dtypes.items()}
    parts = load_parts(str(path), likes, wanted) if likes else {}
    return {
        **{name: cut(tensor, own[name]) for name, tensor in stored.items()},
        **{name: parts[sharded_name(state_key, group, name)] for name in dtypes},
    }


def _check_counts(entry: Mapping[str, Any]) -> None:
    counts = [("ended_epoch", entry["ended_epoch"]), *((key, record[key]) for record in entry["tracks"] for key in _COUNTS)]
    for key, count in counts:
        if type(count) is not int and not (key == "begun" and count is None):
            msg = f"{key} is {count!r}"
            raise ValueError(msg)
    if any(record["buffers"] not in {"average", "keep"} for record in entry["tracks"]):
        msg = "an unknown treatment of buffers"
        raise ValueError(msg)


def sharded_name(state_key: str, group: str, name: str) -> str:
    """Return the name under which a tensor goes into a sharded state dict."""
    return f"lightning_tricks/{state_key}/{group}/{name}"
