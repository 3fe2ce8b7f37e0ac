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
    """

    def __init__(self, module: nn.Module, likes: Mapping[str, Tensor | Shards], parts_of: Callable[[_T], Mapping[str, Tensor]]) -> None:
        self._module, self._parts_of = module, parts_of
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
            parts = self._parts_of(member)
            if not self._own:
                pointed = {name: tensor.data for name, tensor in self._pointed.items()}
                self._own = {**pointed, **{name: own_part(like).clone() for name, like in self._written.items()}}
            for name, tensor in self._pointed.items():
                tensor.data = _alike(parts[name], self._own[name], shared=isinstance(tensor, nn.Parameter))
            copy_([own_part(like) for like in self._written.values()], [parts[name] for name in self._written])

    def _give_back(self) -> None:
        for name, tensor in self._pointed.items():
            tensor.data = self._own[name]
        copy_([own_part(like) for like in self._written.values()], [self._own[name] for name in self._written])
        self._own = {}


def _alone(tensor: Tensor) -> bool:
    """Tell whether a plain tensor is all that lies in its memory."""
    return type(tensor) in {Tensor, nn.Parameter} and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _alike(part: Tensor, own: Tensor, *, shared: bool) -> Tensor:
    """Return a tensor laid out as the module's own, so that the same kernels run; a copy, unless the module only reads it."""
    same = part.dtype is own.dtype and part.device == own.device and part.stride() == own.stride()
    return part if same and shared else torch.empty_like(own).copy_(part)
