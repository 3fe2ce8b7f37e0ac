"""Arithmetic on lists of tensors, in place, in the fewest passes over memory, and without a second copy of a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_tricks._core.lightning import wrapped
from lightning_tricks._core.shards import Shards, find_shards
from lightning_tricks._core.strategies import cut, holder_of, own_part, plain_name, return_to_shards
from lightning_tricks.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["PIECE", "copy_", "lerp_", "memory", "pieces", "swap_", "using_weights"]

PIECE = 1 << 20  # elements handled at once where a temporary copy is needed


def lerp_(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """Move each target towards its source: ``target ← target + weight · (source − target)``.

    Pairs that agree in dtype and device go in one foreach call; in others, the source is converted piece by piece.
    """
    if all(_alike(t, s) for t, s in zip(targets, sources, strict=True)):
        alike, unlike = (targets, sources), []
    else:
        pairs = list(zip(targets, sources, strict=True))
        alike = ([t for t, s in pairs if _alike(t, s)], [s for t, s in pairs if _alike(t, s)])
        unlike = [(t, s) for t, s in pairs if not _alike(t, s)]
    with torch.no_grad():
        if alike[0]:
            torch._foreach_lerp_(*alike, weight)
        for target, source in unlike:
            for t, s in pieces(target, source):
                t.lerp_(s.to(t.device, t.dtype), weight)


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Write each source into its target, converting dtype and device."""
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(list(targets), list(sources))


def swap_(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Exchange the contents of tensors of equal shape and dtype, through a temporary copy of one small piece at a time."""
    with torch.no_grad():
        for a, b in zip(left, right, strict=True):
            for x, y in pieces(a, b):
                kept = x.clone()
                x.copy_(y)
                y.copy_(kept)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.get_device() == b.get_device()


def pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two tensors of one shape along their first dimension into views of about `PIECE` elements."""
    if a.numel() <= PIECE:
        yield a, b
        return
    if a.shape[0] == 1:
        yield from pieces(a[0], b[0])
        return
    rows = max(1, PIECE * a.shape[0] // a.numel())
    for x, y in zip(torch.split(a, rows), torch.split(b, rows), strict=True):
        yield from pieces(x, y) if rows == 1 else [(x, y)]


def memory(tensor: Tensor) -> tuple[int, int, int]:
    """Return what part of what memory a tensor covers: its address, and where in it the first and the last element lie, in bytes."""
    tensor = own_part(tensor)
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), first * tensor.element_size(), last * tensor.element_size()


@contextmanager
def using_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other weights into a model for the length of a ``with`` block.

    The model's own weights return at the end, also after an exception. The tensors in `weights` are read only. Meanwhile one more
    copy of the tensors named exists.

    Args:
        model: Any module; it is changed in place.
        weights: Tensors by qualified name, such as a state dict or ``EMA.averaged_state_dict()``; a part of the model will do. Where
            the model is spread over ranks, tensors may be spread alike or be whole on each rank, and all must enter and leave together.

    Raises:
        ArgumentError: If a name is not in the model, or a shape differs; the model is then as it was.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with using_weights(model, {"bias": torch.tensor([7.0])}):
        ...     model(torch.zeros(2)).item()
        7.0
    """
    return_to_shards(model)
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    shards = find_shards(wrapped(model))
    named = {known: shards.get(id(tensor), tensor) for name, tensor in tensors for known in (plain_name(name), name)}
    stored = model.state_dict(keep_vars=True)  # some of what it holds is no tensor of the model
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for name, value in weights.items() if name in named):
        msg = f"`weights` must map names to tensors, got {type(weights).__name__}."
        raise ArgumentError(msg)
    unknown = [name for name in weights if name not in named and name not in stored]
    if unknown:
        msg = f"`weights` must name parameters or buffers of {type(model).__name__}, got {unknown[0]!r} ({len(unknown)} unknown names)."
        raise ArgumentError(msg)
    own = {name: named[name] for name in weights if name in named}
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            msg = f"`weights[{name!r}]` must have the shape {tuple(tensor.shape)} of the model, got {tuple(weights[name].shape)}."
            raise ArgumentError(msg)
    parts = {name: own_part(tensor) for name, tensor in own.items()}
    targets = list({id(holder_of(tensor)): parts[name] for name, tensor in own.items()}.values())
    kept = [part.detach().clone() for part in targets]
    used = {part.untyped_storage().data_ptr() for part in targets}
    given = [_part(weights[name], tensor) for name, tensor in own.items()]
    given = [part.clone() if part.untyped_storage().data_ptr() in used else part for part in given]
    try:
        copy_(list(parts.values()), given)
        yield
    finally:
        return_to_shards(model)
        copy_(targets, kept)


def _part(value: Tensor, like: Tensor | Shards) -> Tensor:
    """Return what belongs into this rank's part of a tensor, of a whole one or of one that is spread alike."""
    return own_part(value) if isinstance(value, DTensor) else cut(value, like)
