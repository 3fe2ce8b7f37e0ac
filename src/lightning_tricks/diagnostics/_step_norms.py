"""Norms of gradients, weights and updates, of many tensors at once, and of whole tensors where ranks hold parts of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from lightning_tricks._core.shards import Runs
from lightning_tricks._core.strategies import added_up, holder_of, own_part, summed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_tricks._core.shards import Shards

__all__ = ["StepNorms", "norms"]

_PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def norms(parts: Sequence[Tensor], likes: Sequence[Tensor | Shards]) -> Tensor:
    """Return the Euclidean norm of each tensor, in float32 and on one device; all ranks must call this.

    Args:
        parts: This rank's part of each tensor.
        likes: What each is spread like; a plain tensor, if it is whole.

    Example:
        >>> weights = [torch.tensor([3.0, 4.0]), torch.ones(4)]
        >>> norms(weights, weights)
        tensor([5., 2.])
    """
    found = torch._foreach_norm([part if part.dtype in _PRECISE else part.float() for part in parts])
    together = torch.stack([norm.to(parts[0].device, torch.float32) for norm in found])
    by_layout: dict[Any, list[int]] = {}
    for index, like in enumerate(likes):
        if (layout := _layout(like)) is not None:
            by_layout.setdefault(layout, []).append(index)
    for indices in by_layout.values():
        squares = _summed(together[indices].double().square(), likes[indices[0]])
        together[indices] = squares.sqrt().float()
    return together


def _layout(like: Tensor | Shards) -> Any:
    """Return what tensors have in common whose parts are added up in one go; None if the tensor is whole."""
    if isinstance(like, Runs):
        return like.group
    holder = holder_of(like)
    return (holder.device_mesh, holder.placements) if isinstance(holder, DTensor) else None


def _summed(squares: Tensor, like: Tensor | Shards) -> Tensor:
    if isinstance(like, Runs):
        distributed.all_reduce(squares, group=like.group)
        return squares
    return summed(squares, holder_of(like))


class StepNorms:
    """Measures one step of an optimizer: `before` when gradients are ready, and `after` when the weights have moved.

    Nothing is read from the device. The weights are copied in between, the parts that a rank owns.

    Args:
        tensors: The parameters by name, those that are spread over ranks as shards.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Shards]) -> None:
        self.tensors = dict(tensors)
        self._weights: list[Tensor] = []
        self._gradient_norms = torch.zeros(0)

    def before(self, scale: float = 1.0) -> None:
        """Measure the gradients, which are multiplied by `scale` still; the last call counts, and the first one's weights."""
        parts, likes = zip(*(_gradient(tensor) for tensor in self.tensors.values()), strict=True)
        self._gradient_norms = norms(parts, likes) / scale
        self._weights = self._weights or [part.clone() for part in self._parts()]

    def after(self) -> Tensor:
        """Return the norms of gradient, weight before the step, and update, in three rows of one column for each parameter."""
        likes = list(self.tensors.values())
        weight_norms = norms(self._weights, likes)
        torch._foreach_sub_(self._weights, self._parts())
        return torch.stack([self._gradient_norms.to(weight_norms.device), weight_norms, norms(self._weights, likes)])

    def _parts(self) -> list[Tensor]:
        return [own_part(tensor).detach() for tensor in self.tensors.values()]


def _gradient(tensor: Tensor | Shards) -> tuple[Tensor, Tensor | Shards]:
    """Return this rank's part of a parameter's gradient, and what it is spread like; a missing gradient is zero."""
    gradient = holder_of(tensor).grad
    if gradient is None:
        return torch.zeros_like(own_part(tensor)), tensor
    if isinstance(gradient, DTensor):  # which may be spread otherwise than the parameter
        gradient = added_up(gradient)
        return own_part(gradient), gradient
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return gradient, tensor if isinstance(tensor, Runs) else gradient
