"""What a normalization layer of anybody's computes, found by its structure and checked by its values.

Packages bring layers of their own: with an activation inside, for channels that come second, in classes that inherit from none of
torch's. Rather than a list of their names, there is a plain computation of each kind here. A layer is taken for the first kind whose
plain computation, on a small fixed input, gives what the layer gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["KINDS", "POSITIONS", "Kind", "Norm", "kinds_of", "normalize", "read_as", "read_norm"]

Kind = Literal["batch", "layer", "group", "instance", "rms", "ghost", "sync", "frozen", "response", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POSITIONS = "swapped_positions"
"""Attribute in which layers made by a swap keep what the type of the first layer told."""

_KINDS_OF_TORCH: dict[type, Kind] = {
    nn.SyncBatchNorm: "sync",
    _BatchNorm: "batch",
    _InstanceNorm: "instance",
    nn.GroupNorm: "group",
}
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_ANY_POSITIONS = frozenset({0, 1, 2, 3})
_EPS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Norm:
    """What a layer computes: ``(x − m)/√(v + ε) · w + b`` with statistics m and v of its kind, and what comes after it.

    Attributes:
        kind: Which values share their statistics.
        channels: Number of channels.
        last: Whether the channels are the last dimension rather than the second.
        positions: How many dimensions may follow the channels, such as {2} for images; several where the type does not tell.
        eps: ε.
        weight: Scale w, if it has one.
        bias: Shift b, if it has one.
        mean: Running mean, if it keeps one.
        variance: Running variance, if it keeps one.
        seen: Count of batches that the running statistics have followed, if it keeps one.
        threshold: Threshold from below, if it has one.
        momentum: With which running statistics follow those of batches.
        groups: Number of groups, for the kind of that name.
        after: Modules inside the layer that its output goes through, such as an activation, by name.
    """

    kind: Kind
    channels: int
    last: bool
    positions: frozenset[int]
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    seen: Tensor | None = None
    threshold: Tensor | None = None
    momentum: float | None = 0.1
    groups: int = 1
    after: dict[str, nn.Module] = field(default_factory=dict)

    def affine(self, values: Tensor) -> Tensor:
        """Scale and shift values of shape ``(N, C, *)``."""
        shape = (1, -1, *(1,) * (values.ndim - 2))
        values = values if self.weight is None else values * self.weight.view(shape)
        return values if self.bias is None else values + self.bias.view(shape)


def normalize(norm: Norm, x: Tensor) -> Tensor:
    """Normalize values of shape ``(N, C, *)`` as a layer in evaluation mode does, before its scale and shift."""
    per_channel, per_sample = tuple(i for i in range(x.ndim) if i != 1), tuple(range(2, x.ndim))
    if norm.kind in {"rms", "response"}:
        return x * (x.square().mean(1 if norm.kind == "rms" else per_sample, keepdim=True) + norm.eps).rsqrt()
    if norm.kind == "group":
        return nn.functional.group_norm(x, norm.groups, eps=norm.eps)
    if norm.mean is not None and norm.variance is not None:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return (x - norm.mean.view(shape)) * (norm.variance.view(shape) + norm.eps).rsqrt()
    dims = {"layer": (1,), "instance": per_sample}.get(norm.kind, per_channel)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * (variance + norm.eps).rsqrt()


def read_norm(module: nn.Module) -> Norm | str | None:
    """Return what a layer computes, or why that cannot be told, or None if it is no normalization."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "it learns the number of its channels from the first batch; run one before" if isinstance(module, _NORMS) else None
    weight = getattr(module, "weight", None)
    structured = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor)
    if not (isinstance(module, _NORMS) or structured):
        return None
    shape = getattr(module, "normalized_shape", None) or (None if weight is None else weight.shape)
    if shape is not None and len(shape) != 1:
        return f"it normalizes over {len(shape)} dimensions, {tuple(shape)}, at once" if isinstance(module, _NORMS) else None
    plain = type(module).__module__.startswith("torch.nn.") and not module._modules and "forward" not in vars(module)
    readings = _readings(module)
    if plain or any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in _tensors(module)):
        return next(readings)
    found = next((norm for norm in readings if _computes(module, norm)), None)
    return found or f"what {type(module).__name__} computes is none of the normalizations known here"


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _readings(module: nn.Module) -> Iterator[Norm]:
    """Yield what a layer may compute, the likeliest first."""
    second = bool(re.search(r"[123]d", _names(module))) or getattr(module, "data_format", "") == "channels_first"
    for kind in kinds_of(module):
        last_first = kind in {"layer", "rms"} and not second
        for last in (last_first, not last_first):
            yield read_as(module, kind, last=last)


def kinds_of(module: nn.Module) -> list[Kind]:
    """Return of which kinds a normalization layer may be by its structure, the likeliest first."""
    names = _names(module)
    kind = next((kind for base, kind in _KINDS_OF_TORCH.items() if isinstance(module, base)), None)
    if kind is not None:
        return ["ghost" if "GhostBatchNorm" in names else kind]
    if getattr(module, "running_mean", None) is not None:
        return ["batch" if isinstance(module.weight, nn.Parameter) else "frozen"]
    if "response" in names.lower():
        return ["response"]
    root = isinstance(module, nn.RMSNorm) or "rms" in names.lower()
    return ["rms", "layer"] if root else ["layer", "rms"]


def _names(module: nn.Module) -> str:
    return " ".join(kind.__name__ for kind in type(module).__mro__)


def read_as(module: nn.Module, kind: Kind, *, last: bool) -> Norm:
    """Return what a layer computes if it is of this kind."""
    own: Any = module
    weight, bias = getattr(own, "weight", None), getattr(own, "bias", None)
    shape = getattr(own, "normalized_shape", None) or (weight.shape if weight is not None else (0,))
    channels = int(getattr(own, "num_features", None) or getattr(own, "num_channels", None) or shape[-1])
    eps = next((getattr(own, name) for name in _EPS if getattr(own, name, None) is not None), None)
    if eps is None:  # of RMSNorm
        eps = torch.finfo(weight.dtype if weight is not None else torch.get_default_dtype()).eps
    learned = getattr(own, "learned_eps", None)  # of filter response normalization
    eps = eps if learned is None or learned.is_meta else eps + abs(float(learned))
    return Norm(
        kind=kind,
        channels=channels,
        last=last,
        positions=_positions(module),
        eps=float(eps),
        weight=weight,
        bias=bias,
        mean=getattr(own, "running_mean", None),
        variance=getattr(own, "running_var", None),
        seen=getattr(own, "num_batches_tracked", None),
        threshold=getattr(own, "threshold", getattr(own, "tau", None)) if kind == "response" else None,
        momentum=getattr(own, "momentum", 0.1),
        groups=int(getattr(own, "num_groups", 1)),
        after=dict(module.named_children()),
    )


def _positions(module: nn.Module) -> frozenset[int]:
    if (known := getattr(module, POSITIONS, None)) is not None:
        return frozenset(known)
    if isinstance(module, nn.BatchNorm1d):
        return frozenset({0, 1})
    found = re.search(r"([123])d", _names(module))
    return frozenset({int(found[1])}) if found else _ANY_POSITIONS


@torch.no_grad()
def _computes(module: nn.Module, norm: Norm) -> bool:
    """Tell whether a layer gives what a reading of it gives, on a small input that needs no random numbers."""
    like = next(iter(_tensors(module)), torch.empty(0))
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    sides = [side for side in (3, 5, 7) if side != norm.channels]
    modes = [(each, each.training) for each in module.modules()]
    try:
        for each, _ in modes:
            each.training = False
        for count in sorted(norm.positions - {0}, key=lambda count: (count != 2, count)) or [1]:
            shape = (2, norm.channels, *(sides * 2)[:count])
            values = torch.arange(1, 1 + torch.Size(shape).numel(), device=like.device, dtype=torch.float32).view(shape)
            x = (2.0 * torch.sin(values * values) + 0.7).to(dtype)
            expected = norm.affine(normalize(norm, x))
            expected = expected if norm.threshold is None else torch.maximum(expected, norm.threshold.view(1, -1, *(1,) * count))
            expected = expected.movedim(1, -1) if norm.last else expected
            for inner in norm.after.values():
                expected = inner(expected)
            try:
                found = module.forward(x.movedim(1, -1).contiguous() if norm.last else x.clone())
            except Exception:  # noqa: BLE001, S112  # whatever somebody else's layer raises, it does not take this input
                continue
            close = 2e-2 if dtype in {torch.bfloat16, torch.float16} else 1e-4
            return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=close, atol=close)
        return False
    finally:
        for each, mode in modes:
            each.training = mode
