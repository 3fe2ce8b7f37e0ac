"""Which kernels an optimizer runs: one for the whole step, one for each operation, or one for each parameter and operation.

torch never fuses on its own. On the CPU its fused kernels are several times faster than the loop, and its foreach kernels slower.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_tricks._core.lightning import scales_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IMPLEMENTATIONS", "implementation_options", "implementations_of"]

IMPLEMENTATIONS: Final = ("fused", "foreach", "for-loop", None)
_FUSED_DEVICES: Final = {"SGD": {"cpu", "cuda"}, "Adam": {"cpu", "cuda"}, "AdamW": {"cpu", "cuda"}, "Adagrad": {"cpu"}}


def implementations_of(optimizer: Callable[..., Any]) -> tuple[str | None, ...]:
    """Return what may be asked of an optimizer: what its constructor takes; the loop can always be had instead."""
    taken = signature(optimizer).parameters
    return tuple(name for name in IMPLEMENTATIONS if name is None or name in taken or (name == "for-loop" and "foreach" in taken))


def implementation_options(optimizer: Callable[..., Any], model: nn.Module, implementation: str | None) -> dict[str, bool]:
    """Return the constructor's arguments that select the kernels; none of them leaves the choice to torch."""
    if implementation is None:
        return _automatic(optimizer, model)
    return {name: name == implementation for name in implementations_of(optimizer) if name in {"fused", "foreach"}}


def _automatic(optimizer: Callable[..., Any], model: nn.Module) -> dict[str, bool]:
    parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layouts = {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in parameters}
    if len(layouts) > 1 and "foreach" in implementations_of(optimizer):
        return {"foreach": False}  # one call on tensors of several meshes, or on plain tensors and sharded ones, raises
    devices = _FUSED_DEVICES.get(getattr(optimizer, "__name__", ""), set()) if "fused" in implementations_of(optimizer) else set()
    plain = layouts == {None} and all(not is_lazy(p) and p.is_floating_point() and p.device.type in devices for p in parameters)
    return {"fused": True} if plain and not _has_sparse_gradients(model) and not scales_gradients(model) else {}


def _has_sparse_gradients(model: nn.Module) -> bool:
    return any(module.sparse for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
