"""Other weights in a module for a while, without touching its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_tricks._core.shards import Shards
from lightning_tricks._core.strategies import holder_of, own_part, return_to_shards
from lightning_tricks._core.weights import copy_

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Lending"]

_T = TypeVar("_T")


class Lending(Generic[_T]):
    """Lets a module hold the weights of one member after another, and then its own again.

    A tensor that has its memory to itself is pointed at the member's, so that its own are not even read. Where others lie in the same
    memory, or a strategy holds shards by other names, values are copied in, and the own ones are kept until they return. Neither
    makes compiled code compile again.

    Args:
        module: The module.
        likes: Its tensors by name, and shards for those that are spread over ranks.
        parts_of: Returns a member's tensors, or this rank's parts of them, by name.
        keep: Whether to keep them as the module takes them, on its device, and to ask for those of each member once.
    """

    def __init__(
        self,
        module: nn.Module,
        likes: Mapping[str, Tensor | Shards],
        parts_of: Callable[[_T], Mapping[str, Tensor]],
        *,
        keep: bool = False,
    ) -> None:
        self._module, self._parts_of, self._keep = module, parts_of, keep
        self._ready: dict[_T, dict[str, Tensor]] = {}
        self._likes = {id(holder_of(like)): (name, like) for name, like in reversed([*likes.items()])}
        self._pointed = {name: like for name, like in self._likes.values() if isinstance(like, Tensor) and _alone(like)}
        self._written = {name: like for name, like in self._likes.values() if name not in self._pointed}
        self._own: dict[str, Tensor] = {}  # empty while the module holds its own

    def hold(self, member: _T | None) -> None:
        """Let the module hold a member's weights, or its own again with None."""
        if member is None and not self._own:
            return
        return_to_shards(self._module)  # which a forward pass without gradients leaves gathered
        with torch.inference_mode(mode=False), torch.no_grad():
            if member is None:
                self._give_back()
                return
            if not self._own:
                pointed = {name: tensor.data for name, tensor in self._pointed.items()}
                self._own = {**pointed, **{name: own_part(like).clone() for name, like in self._written.items()}}
            parts = self._ready.get(member) or self._laid_out(self._parts_of(member))
            if self._keep:
                self._ready[member] = parts
            for name, tensor in self._pointed.items():  # of buffers a copy, since evaluating may write to them
                tensor.data = parts[name] if isinstance(tensor, nn.Parameter) else parts[name].clone()
            copy_([own_part(like) for like in self._written.values()], [parts[name] for name in self._written])

    def _laid_out(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a member's tensors as the module has its own, so that the same kernels run."""
        return {name: _alike(parts[name], own) for name, own in self._own.items()}

    def _give_back(self) -> None:
        for name, tensor in self._pointed.items():
            tensor.data = self._own[name]
        copy_([own_part(like) for like in self._written.values()], [self._own[name] for name in self._written])
        self._own = {}


def _alone(tensor: Tensor) -> bool:
    """Tell whether a plain tensor is all that lies in its memory."""
    return type(tensor) in {Tensor, nn.Parameter} and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _alike(part: Tensor, own: Tensor) -> Tensor:
    same = part.dtype is own.dtype and part.device == own.device and part.stride() == own.stride()
    return part if same else torch.empty_like(own).copy_(part)
