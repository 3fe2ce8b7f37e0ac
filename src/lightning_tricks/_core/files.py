"""Files: those that are there as a whole or not at all, and weights that are read from them."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks._core.tensor_files import SUFFIX, TensorFiles, finish_file, siblings
from lightning_tricks.errors import ArgumentError, CheckpointError

__all__ = ["check_paths", "read_state_dict", "whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which takes its own path once the block has ended well; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield unfinished
        finish_file(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_paths(paths: Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    """Accept paths of checkpoints, at least one."""
    one = isinstance(paths, str | bytes | os.PathLike) or not isinstance(paths, Iterable)
    given = () if one else tuple(paths)
    if not given or not all(isinstance(path, str | os.PathLike) for path in given):
        found = f"{paths!r}; put it into a list" if isinstance(paths, str | os.PathLike) else repr(paths if one else given)
        msg = f"`paths` must be paths of checkpoints, at least one, such as `sorted(Path('runs').glob('*.ckpt'))`, got {found}."
        raise ArgumentError(msg)
    return tuple(Path(path) for path in given)


def read_state_dict(path: Path) -> OrderedDict[str, Any]:
    """Return the state dict in a file, or under ``state_dict`` in it, without reading from disk what is not used yet.

    A safetensors file that one of several ranks wrote is read together with those of the others.

    Raises:
        CheckpointError: If there is no such file, or no state dict in it.
    """
    if not path.is_file():
        found = "is a folder; consolidate a sharded checkpoint into one file first" if path.is_dir() else "does not exist"
        msg = f"Weights are read from files: '{path}' {found}."
        raise CheckpointError(msg)
    if path.suffix == SUFFIX:
        return OrderedDict(TensorFiles(siblings(path)).wholes())
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        msg = (
            f"'{path}' must be a checkpoint that `torch.load(path, weights_only=True)` can read, and that failed with "
            f"{type(error).__name__}: {error}\nThe file is damaged, or holds objects of other classes than torch's: if it comes from a "
            "trusted source, load it with `weights_only=False` and save its 'state_dict' alone."
        )
        raise CheckpointError(msg) from error
    nested = content.get("state_dict") if isinstance(content, Mapping) else None
    weights = nested if isinstance(nested, Mapping) else content
    names = list(weights) if isinstance(weights, Mapping) else []
    odd = [name for name in names if not isinstance(name, str) or (isinstance(weights[name], Mapping) and "_extra_state" not in name)]
    if odd or not any(_is_number(weights[name]) for name in names):
        found = f"{odd[0]!r} in it is no tensor" if odd else f"the names {names[:5]!r}" if names else f"a {type(weights).__name__}"
        msg = (
            f"'{path}' must hold a state dict with floating-point tensors, or a Lightning checkpoint with one under 'state_dict', "
            f"got {found}. Save `model.state_dict()`."
        )
        raise CheckpointError(msg)
    state = OrderedDict(weights)
    vars(state).update(getattr(weights, "__dict__", {}))
    return state


def _is_number(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
