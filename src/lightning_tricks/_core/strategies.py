"""What a strategy does to tensors: which part of each a rank owns, and how to get from parts to wholes and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_tricks.errors import UnsupportedStrategyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_tricks._core.lightning import Trainer

__all__ = [
    "added_up",
    "as_sharded",
    "is_sharded",
    "load_parts",
    "own_part",
    "part_of",
    "refuse_strategies",
    "return_to_shards",
    "summed",
    "whole",
]


def refuse_strategies(trainer: Trainer, trick: str, reasons: dict[str, str]) -> None:
    """Refuse strategies under which a trick cannot work.

    A strategy is known by the names in its ancestry, since Lightning exists under two package names.

    Args:
        trainer: The Trainer.
        trick: What the trick calls itself.
        reasons: Names of strategies, each with what stands in the way.

    Raises:
        UnsupportedStrategyError: If the Trainer's strategy is one of them.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in reasons:
            msg = f"{trick} cannot work under {kind.__name__}: {reasons[kind.__name__]}. Use another strategy, or remove the callback."
            raise UnsupportedStrategyError(msg)


def return_to_shards(module: nn.Module) -> None:
    """Let FSDP2 modules hold their shards.

    A forward pass without gradients leaves the root unsharded: then `parameters` yields whole tensors whose changes are lost, and the
    next forward pass would not see changes of the shards.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def is_sharded(state_dict: Mapping[str, Any]) -> bool:
    """Tell whether a state dict holds each rank's own parts."""
    return any(isinstance(tensor, DTensor) for tensor in state_dict.values())


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank owns: a view, which may be all of it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which each rank has a part, laid out as another; a view of the part."""
    if not isinstance(like, DTensor):
        return part
    # Without shape and stride, ranks with uneven parts would disagree about both.
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def whole(part: Tensor, like: Tensor) -> Tensor | None:
    """Gather the whole tensor from the parts of all ranks, which must all call this; the rank that writes gets it, on the CPU."""
    sharded = as_sharded(part, like)
    if not isinstance(sharded, DTensor):
        return part
    gathered = sharded.full_tensor()
    return gathered.cpu() if torch.distributed.get_rank() == 0 else None


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, laid out as another; no rank needs to wait for others."""
    if not isinstance(like, DTensor):
        return tensor
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    with torch.no_grad():
        return tensor[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]


def added_up(tensor: Tensor) -> Tensor:
    """Return a tensor of which ranks hold terms, such as a gradient under tensor parallelism, as their sum; others as they are."""
    pending = isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements)
    return tensor.full_tensor() if pending and isinstance(tensor, DTensor) else tensor


def summed(value: Tensor, like: Tensor) -> Tensor:
    """Add up what each rank has summed over its own part of a tensor; all ranks must call this."""
    if not isinstance(like, DTensor):
        return value
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements, run_check=False).full_tensor()


def load_parts(path: str, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read this rank's parts of tensors from a sharded checkpoint.

    Args:
        path: The checkpoint's folder.
        likes: Names under ``state_dict`` in the checkpoint, each with a tensor of the layout, dtype and device to read it into; its
            values are not used.

    Returns:
        The parts by name.
    """
    parts = {name: torch.empty_like(own_part(like)) for name, like in likes.items()}
    load({"state_dict": {name: as_sharded(part, likes[name]) for name, part in parts.items()}}, checkpoint_id=path)
    return parts
