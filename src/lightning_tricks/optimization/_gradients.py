"""Norms and parts of gradients, whether tensors are whole or sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["dimensions_of_units", "total_norm"]


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors as one vector; for sharded ones that of the whole tensors, on every rank.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])
        tensor(5.)
    """
    by_mesh: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        by_mesh.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    norms = [get_total_norm(members, order) for members in by_mesh.values()]
    wholes = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return wholes[0] if len(wholes) == 1 else torch.linalg.vector_norm(torch.stack(wholes), order)


def dimensions_of_units(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """Return for each parameter the dimensions of one unit, that is of all weights that lead to one output.

    These are all dimensions but the first, and in transposed convolutions all but the second.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ConvTranspose2d(8, 3, 5))
        >>> [dimensions for _, dimensions in dimensions_of_units(model, model.parameters())]
        [(1, 2, 3), (), (0, 2, 3), ()]
    """
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, _ConvTransposeNd)}
    return [(p, tuple(d for d in range(p.ndim) if d != int(id(p) in transposed))) for p in parameters]
