"""What a checkpoint keeps of averages, beyond the state dict that holds those one would deploy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.checkpoint import other_entries
from lightning_tricks._core.state_dicts import put_beside, read_beside
from lightning_tricks._core.strategies import holder_of, is_sharded, named_tensors, return_to_shards
from lightning_tricks.averaging._averages import Averages
from lightning_tricks.averaging._roster import place_of
from lightning_tricks.averaging._tracks import Storage
from lightning_tricks.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["pack", "unpack", "unpack_absent"]

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
        The counts of each track; the training weights if they are not in the state dict; the averages that are not there, or are
        there in lower precision only, and do not follow from others; and those others.
    """
    state_dict = checkpoint["state_dict"]
    sharded = is_sharded(state_dict)
    lay_out = dict if own_files else partial(averages.laid_out, sharded=sharded)
    averaged = {} if averages.storage.kind.derived else averages.averaged()
    if own_files and averages.inside:  # the model is about to take the training weights back, and its tensors are theirs
        averaged = {name: part.clone() for name, part in averaged.items()}
    places = {name: place for track in averages.tracks for name, place in track.places.items()}
    held = {
        name
        for name, average in averaged.items()
        if deployed and average.dtype == places[name].tensor.dtype and (places[name].shards is not None or name in state_dict)
    }
    parts = {
        "raw": averages.raw() if deployed else {},
        "average": {name: part for name, part in averaged.items() if name not in held},
        **averages.others(),
    }
    tensors = {group: lay_out(members) for group, members in parts.items()}
    dtypes: dict[str, dict[str, str]] = {group: {} for group in tensors}  # of the tensors in the state dict
    for group, members in tensors.items() if sharded else ():
        dtypes[group] = put_beside(state_dict, members, group, state_key)
    return {
        "tracks": [
            {
                "optimizers": list(track.optimizers),
                **{count: getattr(track, count) for count in _COUNTS},
                "names": list(track.places),
                "others": len(track.others),
                "buffers": next((place.kind for place in track.places.values() if place.kind != "parameter"), "keep"),
            }
            for track in averages.tracks
        ],
        **({group: {} for group in tensors} if sharded else tensors),
        "sharded": dtypes,
        "derived": averages.storage.kind.derived,
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
        groups = {group: read_beside(entry, group, averages.module, path, state_key) for group in entry["sharded"]}
        raw, average, kind = groups["raw"], groups["average"], averages.storage.kind
        tracks = [
            kind(tuple(record["optimizers"]), averages.storage, **{count: record[count] for count in _COUNTS}) for record in entry["tracks"]
        ]
        for track, record in zip(tracks, entry["tracks"], strict=True):
            for name in record["names"] if track.begun is not None else ():
                if name not in average and not entry["derived"]:
                    # The model has it, unless it was not loaded there.
                    _ = raw[name], checkpoint.get("state_dict", raw)[name]
                first = () if entry["derived"] else (average.get(name),)
                others = (groups[f"other_{i}"][name] for i in range(record["others"]))
                track.follow(name, place_of(averages.module, name, own[name], record["buffers"]), [*first, *others])
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


def _check_counts(entry: Mapping[str, Any]) -> None:
    counts = [("ended_epoch", entry["ended_epoch"]), *((key, record[key]) for record in entry["tracks"] for key in (*_COUNTS, "others"))]
    for key, count in counts:
        if type(count) is not int and not (key == "begun" and count is None):
            msg = f"{key} is {count!r}"
            raise ValueError(msg)
    if any(record["buffers"] not in {"average", "keep"} for record in entry["tracks"]):
        msg = "an unknown treatment of buffers"
        raise ValueError(msg)
