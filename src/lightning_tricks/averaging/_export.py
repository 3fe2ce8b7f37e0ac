"""Averaged weights out of checkpoint files, for whoever deploys them without a Trainer."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_tricks._core.checkpoint import other_entries, read_entry
from lightning_tricks._core.state_dicts import is_beside, sharded_name
from lightning_tricks._core.weights import memory
from lightning_tricks.averaging._window import mean_of
from lightning_tricks.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["averaged_state_dict"]


def averaged_state_dict(path: str | Path, *, trick: str | None = None) -> dict[str, Tensor]:
    """Read the averaged weights out of a checkpoint, as a state dict that the plain model loads.

    Where an average evaluates, ``checkpoint["state_dict"]`` holds it already. This reads averages also where that holds the raw weights:
    with ``evaluate=False``, with several averages, and in DeepSpeed's folders, for which DeepSpeed itself is not needed.

    Args:
        path: A checkpoint: a file, or a folder that FSDP or DeepSpeed has written.
        trick: Whose average, as the key in ``checkpoint["lightning_tricks"]``, such as ``"EMA"`` or ``"EMA(name='slow')"``; None = the
            only one.

    Returns:
        The model's whole state on the CPU, in the dtypes of the model.

    Raises:
        ArgumentError: If `path` is neither, or `trick` does not name exactly one average.
        CheckpointError: If the files are damaged, of a newer release, or lack some of the model's weights.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/last.ckpt"
        >>> entry = {"tracks": [], "average": {"bias": torch.tensor([0.5])}, "sharded": {"average": {}}}
        >>> torch.save({"state_dict": {"bias": torch.tensor([1.0])}, "lightning_tricks": {"version": 1, "EMA": entry}}, path)
        >>> averaged_state_dict(path)
        {'bias': tensor([0.5000])}
    """
    path = Path(path)
    try:
        return _averaged(path, trick)
    except (ArgumentError, CheckpointError):
        raise
    except (Exception, CheckpointException) as error:  # the latter is no `Exception`
        msg = (
            f"'{path}' must be a whole checkpoint that `torch.load(…, weights_only=True)` can read, and that failed with "
            f"{type(error).__name__}: {error}. Copy all of its files, or take another checkpoint."
        )
        raise CheckpointError(msg) from error


def _averaged(path: Path, trick: str | None) -> dict[str, Tensor]:
    ranks = sorted((path / "checkpoint").glob("*_model_states.pt"), key=_rank)
    if ranks:
        checkpoints = [_read(file) for file in ranks]
        _check_complete(path, ranks, checkpoints[0]["dp_world_size"])
        return _from_ranks(checkpoints, _choose(checkpoints[0], trick))
    if (path / "meta.pt").is_file():
        checkpoint = {**_read(path / "meta.pt"), "state_dict": _read_shards(path)}
    elif path.is_file():
        checkpoint = _read(path)
    else:
        msg = f"`path` must be a checkpoint file, or a folder that FSDP or DeepSpeed has written, got '{path}'."
        raise ArgumentError(msg)
    return _from_whole(checkpoint, _choose(checkpoint, trick))


def _rank(file: Path) -> int:
    """Return the rank that wrote one of DeepSpeed's files; before ZeRO-3, rank zero writes for all."""
    found = re.match(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0


def _check_complete(folder: Path, files: list[Path], ranks: int) -> None:
    if files[0].name.startswith("zero_pp_rank_") and [_rank(file) for file in files] != list(range(ranks)):
        msg = f"'{folder}' must hold the model states of all {ranks} ranks, and has {len(files)} files of them. Copy all of its files."
        raise CheckpointError(msg)


def _read(file: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return checkpoint


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Put the model's tensors in a sharded checkpoint together."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = {key: each for key, each in stored.items() if isinstance(each, TensorStorageMetadata) and not key.startswith("optimizer_")}
    tensors = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # as it should be
        load(tensors, checkpoint_id=folder)
    return {key.partition(".")[2]: tensor for key, tensor in tensors.items()}  # without the name of the whole


def _choose(checkpoint: dict[str, Any], trick: str | None) -> str:
    read_entry(checkpoint, "")  # which refuses records that are not ours to read
    found = [key for key, entry in other_entries(checkpoint, ()).items() if "tracks" in entry]
    chosen = [key for key in found if trick in {None, key}]
    if len(chosen) != 1:
        there = ", ".join(map(repr, found)) or "none"
        msg = f"`trick` must name one of the averages in the checkpoint, got {trick!r}; there are: {there}."
        raise ArgumentError(msg)
    return chosen[0]


def _averages(entry: Mapping[str, Any], stored: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """Return the averages, or their parts, that an entry or the state dict beside it holds; those that follow from others are computed."""
    groups = {
        group: {**entry[group], **{name: stored[sharded_name(key, group, name)] for name in names}}
        for group, names in entry["sharded"].items()
    }
    if not entry.get("derived", False):
        return groups["average"]
    checkpoints = [groups[group] for group in groups if group.startswith("other_")]  # oldest first
    return mean_of(checkpoints, lambda name: (torch.promote_types(checkpoints[0][name].dtype, torch.float32), torch.device("cpu")))


def _from_whole(checkpoint: dict[str, Any], key: str) -> dict[str, Tensor]:
    entry, stored = checkpoint["lightning_tricks"][key], checkpoint["state_dict"]
    state = {name: tensor for name, tensor in stored.items() if not is_beside(name)}
    averages = _averages(entry, stored, key)
    covered = {memory(state[name]): name for name in averages if name in state and state[name].numel()}
    lost = [name for name in averages if name not in state and not entry["deployed"]]
    if lost:
        msg = (
            f"The state dict must have the names of the averages to be replaced by them, and lacks {lost[0]!r}, which {key} averages. "
            "Take the average from `checkpoint['lightning_tricks']`, and name it as the state dict does."
        )
        raise CheckpointError(msg)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # a layer's extra state may be none
    for name, tensor in tensors.items():
        source = name if name in averages else covered.get(memory(tensor)) if tensor.numel() else None  # tied ones have one average
        if source is not None:
            state[name] = averages[source].view(tensor.shape).to(tensor.dtype)
    return state


def _from_ranks(checkpoints: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    first = checkpoints[0]
    entry, state = first["lightning_tricks"][key], dict(first["module"])
    shapes = {name: shape for group in first["param_shapes"] or () for name, shape in group.items()} | (first["frozen_param_shapes"] or {})
    averages = [_averages(each["lightning_tricks"][key], {}, key) for each in checkpoints]
    for name in {**shapes, **entry["aliases"]}:
        source = entry["aliases"].get(name, name)
        if source in averages[0]:
            parts = [each[source] for each in averages]
        else:  # frozen, or left out
            parts = [(each["frozen_param_fragments"] or {}).get(source, each["module"][source]) for each in checkpoints]
        whole = torch.cat([part.reshape(-1) for part in parts])
        if whole.numel() < shapes[source].numel():
            msg = (
                f"The folder must hold all weights to be read without DeepSpeed, and lacks {name!r}, which {key} does not average, or not "
                "yet. Consolidate the raw weights with DeepSpeed's `zero_to_fp32.py`."
            )
            raise CheckpointError(msg)
        state[name] = whole[: shapes[source].numel()].view(shapes[source]).to(first["module"][source].dtype)
    return state
