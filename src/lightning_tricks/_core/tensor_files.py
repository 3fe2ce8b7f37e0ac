"""Tensors in safetensors files, which hold no code: one file, or one for each rank with the parts that it owns.

A file is written in a folder of its own and moved when it is complete and on the disk, so that none is ever found half-written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_tricks._core.shards import Shards
from lightning_tricks._core.strategies import cut, holder_of, plain_name, region_of, return_to_shards, stored_tensors
from lightning_tricks.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

__all__ = ["SUFFIX", "TensorFiles", "digest_of", "finish_file", "likes_of", "siblings", "sweep_unfinished", "write_unfinished"]

SUFFIX = ".safetensors"
_UNFINISHED = ".unfinished"
_RECORD = "lightning_tricks"
_VERSION = 1
_DAY = 24 * 60 * 60.0


def likes_of(module: nn.Module) -> dict[str, Tensor | Shards]:
    """Return what a state dict of the module holds, shards where spread over ranks, by names that no wrapper nor compiling changes."""
    return_to_shards(module)
    return {plain_name(name, compiled=False): tensor for name, tensor in stored_tensors(module).items()}


def write_unfinished(folder: Path, parts: Mapping[str, Tensor], likes: Mapping[str, Tensor | Shards]) -> tuple[Path, str]:
    """Write this rank's parts of tensors to a new file, to which `finish_file` gives its name.

    Tensors under several names are written once, and a part that another rank writes is left out.

    Args:
        folder: Where to; it is made if it is not there.
        parts: This rank's parts by name.
        likes: What they are spread like, by name.

    Returns:
        The file, and the SHA-256 digest of its content.

    Raises:
        OSError: If that fails; no file is left then.
    """
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    pieces: dict[str, list[Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        like = likes[name]
        source = first.setdefault(id(holder_of(like)), name)
        if source != name:
            tied[name] = source
            continue
        region = region_of(like)
        if region is None:
            continue
        if isinstance(like, Shards):
            pieces[name] = [list(like.shape), *region]
        stored = torch.view_as_real(part.detach().resolve_conj()) if part.is_complex() else part.detach()
        tensors[name] = stored.to("cpu", copy=True, memory_format=torch.contiguous_format)
    record = {"version": _VERSION, "tied": tied, "pieces": pieces, "complex": [name for name in tensors if parts[name].is_complex()]}
    path = folder / f"{socket.gethostname()}~{os.getpid()}~{uuid4().hex}{_UNFINISHED}" / "tensors"
    try:
        path.parent.mkdir(parents=True)
        save_file(tensors, path, metadata={_RECORD: json.dumps(record)})
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return path, digest_of(path)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        msg = f"Weights could not be written to '{folder}': {error}"
        raise OSError(msg) from error


def finish_file(unfinished: Path, path: Path) -> None:
    """Give a complete file its name."""
    unfinished.replace(path)
    if unfinished.parent != path.parent:
        unfinished.parent.rmdir()
    if os.name == "posix":  # where the name, too, must reach the disk by itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep_unfinished(folder: Path) -> None:
    """Delete what processes that were killed while they wrote have left; what others are writing now stays."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        host, _, rest = path.name.partition("~")
        process = rest.partition("~")[0]
        with suppress(FileNotFoundError):
            local = host == socket.gethostname() and process.isdecimal()
            if not _alive(int(process)) if local else time.time() - path.stat().st_mtime > _DAY:
                shutil.rmtree(path)


def _alive(process: int) -> bool:
    """Tell whether another process of this machine is there; of its own, one has nothing unfinished when it sweeps."""
    if process == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def digest_of(path: Path) -> str:
    """Return the SHA-256 digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def siblings(path: Path) -> list[Path]:
    """Return the files of all ranks, of which one is given; a file that is no rank's is the only one."""
    found = re.fullmatch(rf"(?P<stem>.*)-rank\d+of(?P<ranks>\d+){re.escape(SUFFIX)}", path.name)
    if found is None:
        return [path]
    ranks = int(found["ranks"])
    return [path.with_name(f"{found['stem']}-rank{rank}of{ranks}{SUFFIX}") for rank in range(ranks)]


class TensorFiles:
    """The tensors in one file, or in those of several ranks, read when they are asked for.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._files = [_open(path) for path in paths]
        self._records = [_record(file, path) for file, path in zip(self._files, paths, strict=True)]
        self._keys = [set(file.keys()) for file in self._files]
        self.tied: dict[str, str] = {name: source for record in self._records for name, source in record["tied"].items()}
        self.names = list(dict.fromkeys([*sorted(set().union(*self._keys)), *self.tied]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        name = self.tied.get(name, name)
        for file, record, keys in zip(self._files, self._records, self._keys, strict=True):
            if name in keys:
                shape = record["pieces"][name][0] if name in record["pieces"] else file.get_slice(name).get_shape()
                return tuple(shape[:-1] if name in record["complex"] and name not in record["pieces"] else shape)
        raise KeyError(name)

    def part(self, name: str, like: Tensor | Shards, rank: int) -> Tensor:
        """Return a rank's part of a tensor that is spread as another: as it lies in a file where one has it, or cut from the whole."""
        name = self.tied.get(name, name)
        if not isinstance(like, Shards):
            return self.whole(name)
        wanted = cut(torch.empty(like.shape, device="meta"), like)
        region = [list(wanted.shape), list(wanted.stride()), int(wanted.storage_offset())]
        for i in sorted(range(len(self._files)), key=lambda i: i != rank):
            if name in self._keys[i] and self._records[i]["pieces"].get(name, [None])[1:] == region:
                return self._read(i, name)
        return cut(self.whole(name), like).contiguous()

    def whole(self, name: str) -> Tensor:
        """Return a whole tensor."""
        name = self.tied.get(name, name)
        holders = [i for i, keys in enumerate(self._keys) if name in keys]
        if name not in self._records[holders[0]]["pieces"]:
            return self._read(holders[0], name)
        shape = self._records[holders[0]]["pieces"][name][0]
        whole, covered = None, {}
        for i in holders:
            part, (_, *region) = self._read(i, name), self._records[i]["pieces"][name]
            whole = part.new_empty(shape) if whole is None else whole
            whole.as_strided(*region).copy_(part)
            covered[json.dumps(region)] = part.numel()
        if whole is None or sum(covered.values()) != math.prod(shape):
            raise _damaged(self.paths[holders[0]], f"{sum(covered.values())} of {math.prod(shape)} elements of {name!r} are there")
        return whole

    def wholes(self) -> dict[str, Tensor]:
        """Return all tensors, tied ones under each of their names."""
        tensors = {name: self.whole(name) for name in self.names if name not in self.tied}
        return {name: tensors[self.tied.get(name, name)] for name in self.names}

    def _read(self, file: int, name: str) -> Tensor:
        tensor: Tensor = self._files[file].get_tensor(name)
        return torch.view_as_complex(tensor) if name in self._records[file]["complex"] else tensor


def _open(path: Path) -> Any:
    if not path.is_file():
        msg = f"The file of weights '{path}' does not exist. Restore it, with those of all ranks where there are several."
        raise CheckpointError(msg)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _record(file: Any, path: Path) -> dict[str, Any]:
    """Return what we have noted in a file; nothing if somebody else wrote it."""
    text = (file.metadata() or {}).get(_RECORD)
    if text is None:
        return {"tied": {}, "pieces": {}, "complex": []}
    record: dict[str, Any] = json.loads(text)
    if record["version"] != _VERSION:
        found = record["version"]
        msg = f"'{path}' must have version {_VERSION}, found {found!r}. Upgrade lightning-tricks if a newer release wrote the file."
        raise CheckpointError(msg)
    return record


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"The file of weights '{path}' is damaged: {reason}. Restore it from a copy.")
