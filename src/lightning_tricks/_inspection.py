"""What tricks left in a checkpoint, told in words, without running any code that the file names.

A checkpoint is a pickle, and a pickle may name any function to be called. Here only what ``torch.load(weights_only=True)`` would build
is built; whatever else a file names becomes an empty stand-in, so that checkpoints with hyperparameters of one's own classes can be read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_tricks._core.checkpoint import other_entries, read_changes
from lightning_tricks._core.lightning import override
from lightning_tricks._core.state_dicts import is_beside
from lightning_tricks.ensembling._store import member_in, places_beside
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError

__all__ = ["describe_checkpoint"]


def describe_checkpoint(path: str | Path) -> str:
    """Say which tricks made a checkpoint, with which arguments, and what they keep in it.

    Args:
        path: A checkpoint: a file, or a folder that FSDP or DeepSpeed has written.

    Raises:
        ArgumentError: If `path` is neither.
        CheckpointError: If the file is damaged, or of a newer release of this package.
    """
    path = Path(path)
    file = _main_file(path)
    try:
        checkpoint, foreign = _read(file)
        if not isinstance(checkpoint, Mapping):
            checkpoint = {"state_dict": {}}
        lines = [*_header(path, checkpoint), *_weights(path, checkpoint), *_tricks(path, checkpoint), *_changes(checkpoint)]
    except TrickError:
        raise
    except Exception as error:
        msg = f"'{file}' must be a checkpoint, and reading it failed with {type(error).__name__}: {error}. The file is damaged."
        raise CheckpointError(msg) from error
    if foreign:
        lines += ["", f"Not read, since the file would have other code make it: {', '.join(sorted(foreign))}"]
    return "\n".join(lines)


def _main_file(path: Path) -> Path:
    """Return the file that has the record: of a folder, the one in which rank zero has put what is not cut into shards."""
    ranks = sorted((path / "checkpoint").glob("*_model_states.pt"))
    candidates = [path, path / "meta.pt", *ranks[:1]]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        msg = f"`path` must be a checkpoint file, or a folder that FSDP or DeepSpeed has written, got '{path}'."
        raise ArgumentError(msg)
    return file


class _Foreign:
    """Stands in for an object that is not ours to make."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    append = extend = add = __call__ = _ignore


def _read(file: Path) -> tuple[Any, set[str]]:
    """Return what a file holds, and the names of what was not made."""
    allowed = _get_allowed_globals()
    foreign: set[str] = set()

    class Unpickler(pickle.Unpickler):
        @override
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            name = f"{module_name}.{global_name}"
            if name in allowed:
                return allowed[name]
            foreign.add(name)
            return _Foreign

    if not zipfile.is_zipfile(file):  # of torch before 1.6, or none of torch's
        return torch.load(file, map_location="cpu", weights_only=True), foreign
    reader = SimpleNamespace(__name__=__name__, Unpickler=Unpickler)
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader, mmap=True), foreign


def _header(path: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    found = {"Lightning": "pytorch-lightning_version", "epoch": "epoch", "step": "global_step"}
    facts = [f"{name} {checkpoint[key]}" for name, key in found.items() if isinstance(checkpoint.get(key), str | int)]
    return [" · ".join([str(path), *facts])]


def _weights(path: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    state = checkpoint.get("state_dict", checkpoint.get("module"))  # the latter is DeepSpeed's word
    if isinstance(state, Mapping):
        return [f"weights: {_size(_tensors_in(state))}"]
    if not (path / ".metadata").is_file():
        return ["weights: none in this file"]
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = [each for key, each in stored.items() if isinstance(each, TensorStorageMetadata) and not key.startswith("optimizer_")]
    beside = sum(is_beside(key.partition(".")[2]) for key in stored)
    count = sum(each.size.numel() for each in tensors)
    return [f"weights: {len(tensors) - beside} tensors, and {beside} that tricks keep beside them, in shards; {count:,} numbers together"]


def _tricks(path: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    entries = other_entries(checkpoint, ())
    lines = [] if entries or read_changes(checkpoint) else ["", "No trick has left anything in it."]
    for key, entry in entries.items():
        trick = str(entry.get("trick", key))
        lines += ["", trick, *(f"  {line}" for line in _entry(path, entry))]
    return lines


def _entry(path: Path, entry: Mapping[str, Any]) -> list[str]:
    lines = []
    if "tracks" in entry:
        where = (
            "in the state dict, for whoever loads the weights"
            if entry.get("deployed")
            else "beside the state dict, which has the raw weights"
        )
        lines.append(f"averages: {where}")
    for key, value in entry.items():
        if key == "tracks":
            lines += [_track(track) for track in value]
        elif key == "members" and isinstance(value, list):
            lines += [f"members: {len(value)}", *(f"  {_member(path, each)}" for each in value)]
        elif isinstance(value, Mapping) and (tensors := _tensors_in(value)):
            lines.append(f"{key}: {_size(tensors)}")
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            lines += [f"{key}: {len(value)}", *(f"  {_facts(each)}" for each in value)]
        elif isinstance(value, int | float | str) and key not in {"trick", "deployed", "derived", "own_files", "ended_epoch"}:
            lines.append(f"{key}: {value}")
    return lines


def _track(track: Mapping[str, Any]) -> str:
    if track.get("begun") is None:
        return "average: not begun"
    return f"average of {len(track['names'])} tensors: begun at step {track['begun']}, {track['updates']} updates"


def _member(path: Path, record: Mapping[str, Any]) -> str:
    """Tell where a member of an ensemble is, and what is known of it."""
    folder = Path(record["folder"])
    member = member_in(record, places_beside(path, folder))
    missing = next((file for file in member.paths if not file.is_file()), None)
    others = f" and {len(member.files) - 1} more" if len(member.files) > 1 and not missing else ""
    found = "missing" if missing else f"{sum(file.stat().st_size for file in member.paths):,} bytes"
    return f"{_facts(member.facts)}: {missing or member.paths[0]}{others}, {found}"


def _facts(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if isinstance(value, int | float | str))


def _changes(checkpoint: Mapping[str, Any]) -> list[str]:
    calls = [
        f"  functional.{function}({', '.join(['model', *(f'{name}={value!r}' for name, value in arguments.items())])})"
        for function, arguments in read_changes(checkpoint)
    ]
    return ["", "Changes to the model, which `lightning_tricks.load_from_checkpoint` repeats:", *calls] if calls else []


def _tensors_in(values: Any) -> list[Tensor]:
    """Return all tensors in nested containers."""
    if isinstance(values, Tensor):
        return [values]
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _size(tensors: list[Tensor]) -> str:
    count, memory = sum(each.numel() for each in tensors), sum(each.numel() * each.element_size() for each in tensors)
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, "bytes"))
    unit, name = next((max(size, 1), name) for size, name in units if memory >= size)
    return f"{len(tensors)} tensors, {count:,} numbers, {memory / unit:,.3g} {name}"
