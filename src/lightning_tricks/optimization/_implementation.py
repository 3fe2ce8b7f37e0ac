"""Which kernels an optimizer runs: one for all parameters, one for each operation, or one for each parameter and operation."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["IMPLEMENTATIONS", "implementation_options"]

IMPLEMENTATIONS: Final = ("fused", "foreach", "for-loop", None)
_FUSED_DEVICES: Final = {"cpu", "cuda"}


def implementation_options(optimizer: type[Optimizer], model: nn.Module, implementation: str | None) -> dict[str, bool]:
    """Return the constructor's arguments that select the kernels; none leave the choice to torch."""
    offered = signature(optimizer).parameters.keys() & {"fused", "foreach"}
    if implementation is None:
        return {"fused": True} if "fused" in offered and _can_fuse(model) else {}
    return {name: name == implementation for name in offered}


def _can_fuse(model: nn.Module) -> bool:
    """Tell whether the fused kernels take all parameters of a model: plain floating-point tensors with dense gradients."""
    if any(getattr(module, "sparse", False) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)):
        return False
    parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return all(p.is_floating_point() and p.device.type in _FUSED_DEVICES and not isinstance(p, DTensor) for p in parameters)
