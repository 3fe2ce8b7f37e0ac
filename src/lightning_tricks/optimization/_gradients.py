"""Norms and parts of gradients, whether tensors are whole or sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import get_total_norm

from lightning_tricks._core.strategies import added_up, own_part
from lightning_tricks.errors import UnsupportedOptimizerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["dimensions_of_units", "total_norm"]


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all tensors as one vector; for sharded ones that of the whole tensors, on every rank.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])
        tensor(5.)
    """
    by_layout: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, list[Tensor]] = {}
    for tensor in tensors:
        summed = added_up(tensor)
        layout = (summed.device_mesh, summed.placements) if isinstance(summed, DTensor) else None
        by_layout.setdefault(layout, []).append(own_part(summed))
    norms = [_norm_of_parts(parts, layout, order) for layout, parts in by_layout.items()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _norm_of_parts(parts: list[Tensor], layout: tuple[DeviceMesh, tuple[Placement, ...]] | None, order: float) -> Tensor:
    filled = [part for part in parts if part.numel()]
    norm = get_total_norm(filled, order) if filled else parts[0].new_zeros(())
    if layout is None:
        return norm
    mesh, placements = layout
    largest = order == float("inf")
    norm = norm.to(torch.promote_types(norm.dtype, torch.float32))
    combined = norm if largest else norm**order
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            all_reduce(combined, ReduceOp.MAX if largest else ReduceOp.SUM, mesh.get_group(dimension))
    return combined if largest else combined ** (1 / order)


def dimensions_of_units(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """Return for each parameter the dimensions of one unit, that is of all weights that lead to one output.

    These are all dimensions but the first, and in transposed convolutions all but the second.

    Raises:
        UnsupportedOptimizerError: If a parameter is lazy and has no shape yet.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ConvTranspose2d(8, 3, 5))
        >>> [dimensions for _, dimensions in dimensions_of_units(model, model.parameters())]
        [(1, 2, 3), (), (0, 2, 3), ()]
    """
    parameters = list(parameters)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    lazy = next((named[id(parameter)] for parameter in parameters if is_lazy(parameter)), None)
    if lazy is not None:
        msg = (
            f"Gradients are changed by units, which the shape of {lazy!r} tells, and it is lazy and has none yet. Run a batch through the "
            "model before, for instance in `configure_model`."
        )
        raise UnsupportedOptimizerError(msg)
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, _ConvTransposeNd)}
    return [(p, tuple(d for d in range(p.ndim) if d != int(id(p) in transposed))) for p in parameters]
