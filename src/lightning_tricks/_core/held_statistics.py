"""Normalization layers whose running statistics stay as they are while the network trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import nn

__all__ = ["are_statistics_held", "hold_statistics", "release_statistics"]


class _Held:
    """Stands in for the `train` of a layer that stays in evaluation mode for as long as somebody holds it."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.holders: set[str] = set()

    def __call__(self, mode: bool = True) -> nn.Module:  # whatever the caller wishes
        return type(self.norm).train(self.norm, mode=False)


def hold_statistics(norm: nn.Module, holder: str) -> None:
    """Keep a layer that trains in evaluation mode, on all ranks with the statistics of rank zero; others stay as they are."""
    held = vars(norm).get("train")
    if not isinstance(held, _Held):
        if not norm.training:
            return
        _share_statistics(norm)
        held = _Held(norm)
        vars(norm)["train"] = held
        norm.train()
    held.holders.add(holder)


def release_statistics(norm: nn.Module, holder: str, *, training: bool) -> None:
    """Let a layer train again unless another holds it, too; `training` is the mode of the whole network."""
    held = vars(norm).get("train")
    if isinstance(held, _Held) and holder in held.holders:
        held.holders.remove(holder)
        if not held.holders:
            del vars(norm)["train"]
            norm.train(training)  # an exception in an evaluation leaves everything in evaluation mode


def are_statistics_held(norm: nn.Module) -> bool:
    """Tell whether somebody holds a layer's statistics where they are."""
    return isinstance(vars(norm).get("train"), _Held)


def _share_statistics(norm: nn.Module) -> None:
    """Give all ranks the statistics of rank zero."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    for buffer in norm.buffers(recurse=False):
        if isinstance(buffer, Tensor) and not isinstance(buffer, DTensor):
            distributed.broadcast(buffer, 0)
