"""Other tensors in the place of a model's in its state dict, and tensors beside it, whether whole or spread over ranks."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_tricks._core.checkpoint import check_tensors
from lightning_tricks._core.strategies import (
    as_sharded,
    cut,
    holder_of,
    is_sharded,
    load_parts,
    named_tensors,
    own_part,
    return_to_shards,
    whole,
)
from lightning_tricks._core.weights import copy_, memory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from lightning_tricks._core.shards import Shards

__all__ = ["is_beside", "laid_out", "put_beside", "read_beside", "replaced", "sharded_name", "write_parts"]

_PREFIX = "lightning_tricks/"


def laid_out(parts: Mapping[str, Tensor], likes: Mapping[str, Tensor | Shards], *, sharded: bool) -> dict[str, Tensor]:
    """Return tensors for a checkpoint: sharded as others if asked, or else whole, on the rank that writes.

    All ranks must call this together.

    Args:
        parts: This rank's parts by name.
        likes: What they are spread like, by name.
        sharded: Whether to leave them sharded.
    """
    if sharded:
        return {name: as_sharded(part, likes[name]) for name, part in parts.items()}
    wholes = {name: whole(part, likes[name]) for name, part in parts.items()}
    return {name: tensor for name, tensor in wholes.items() if tensor is not None}


def replaced(
    state_dict: dict[str, Any], parts: Mapping[str, Tensor], likes: Mapping[str, Tensor | Shards], module: nn.Module
) -> dict[str, Any]:
    """Return a model's state dict with other tensors, in the dtype that it has.

    Tensors are found by the memory that they share with the model's, whatever their names, or else, as copies, by name. All ranks
    must call this together; a state dict that is gathered on one rank is empty on the others.

    Args:
        state_dict: The state dict, which stays as it is.
        parts: This rank's parts of the tensors that take the place of the model's, by name.
        likes: The model's tensors by name, and shards for those that are spread over ranks.
        module: The model.
    """
    return_to_shards(module)
    tensors = laid_out(parts, likes, sharded=is_sharded(state_dict))
    live = {name: holder_of(like) for name, like in likes.items() if name in tensors}
    by_memory = {memory(tensor): name for name, tensor in live.items() if tensor.numel()}
    same = {id(tensor): name for name, tensor in live.items()}
    holders = {name: id(holder_of(tensor)) for name, tensor in named_tensors(module).items()}
    by_name = {name: same[holder] for name, holder in holders.items() if holder in same}
    state = copy(state_dict)  # which keeps `_metadata`
    for key, value in state_dict.items():
        name = by_memory.get(memory(value)) if isinstance(value, Tensor) and value.numel() else None
        if name is not None and value.stride() != live[name].stride():  # another view of the same memory
            offset = value.storage_offset() - live[name].storage_offset()
            state[key] = tensors[name].as_strided(value.shape, value.stride(), tensors[name].storage_offset() + offset).to(value)
        elif (name := name or by_name.get(key)) is not None:
            state[key] = tensors[name].to(value)
    return state


def put_beside(state_dict: dict[str, Any], tensors: Mapping[str, Tensor], group: str, state_key: str) -> dict[str, str]:
    """Put sharded tensors into a sharded state dict, under names that no model has.

    Returns:
        The dtype of each by name, which `read_beside` needs.
    """
    state_dict.update({sharded_name(state_key, group, name): tensor for name, tensor in tensors.items()})
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def read_beside(entry: Mapping[str, Any], group: str, module: nn.Module, path: str | Path | None, state_key: str) -> dict[str, Tensor]:
    """Return this rank's parts of the tensors of a group, from the entry or, if they are sharded, from the file.

    Args:
        entry: A trick's entry in a checkpoint, with whole tensors under ``entry[group]`` and what `put_beside` returned under
            ``entry["sharded"][group]``. Where ``entry["own_files"]`` is true, each rank has written its own parts.
        group: Which tensors.
        module: The model whose layout they have.
        path: Where the checkpoint was read from.
        state_key: Whose entry it is.

    Raises:
        CheckpointError: If a tensor does not fit the model.
    """
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


def write_parts(module: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Give a model this rank's parts of other tensors, by name."""
    own = named_tensors(module)
    copy_([own_part(own[name]) for name in parts], list(parts.values()))


def is_beside(key: str) -> bool:
    """Tell whether `put_beside` has put what a state dict holds under this key."""
    return key.startswith(_PREFIX)


def sharded_name(state_key: str, group: str, name: str) -> str:
    """Return the name under which a tensor goes into a sharded state dict."""
    return f"{_PREFIX}{state_key}/{group}/{name}"
