"""Normalization layers built from what others compute, so that a network starts from the function that it has.

Running statistics m and v of a layer's inputs tell what another kind of layer will do to them on average. A kind that pools over
channels, ``M`` and ``V``, gives ``(x − M)/√(V + ε)``; to give what the old layer gave it needs the scale and the shift

    w' = w √(V + ε) / √(v + ε),    b' = b + w (M − m) / √(v + ε).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks._core.surgery import StandIn
from lightning_tricks.normalization._channel_norm import LayerNorm2d, RMSNorm2d
from lightning_tricks.normalization._filter_response_norm import FilterResponseNorm
from lightning_tricks.normalization._frozen_batch_norm import FrozenBatchNorm
from lightning_tricks.normalization._ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from lightning_tricks.normalization._norm_adapters import (
    BatchNormAny,
    BatchNormTokens,
    FilterResponseNormTokens,
    FrozenBatchNormTokens,
    GhostBatchNormAny,
    GhostBatchNormTokens,
    GroupNormTokens,
    InstanceNormAny,
    InstanceNormTokens,
    RMSNormTokens,
    SyncBatchNormTokens,
)
from lightning_tricks.normalization._norm_reading import POSITIONS, Kind, Norm

__all__ = ["PER_CHANNEL", "Groups", "build_norm", "obstacle"]

PER_CHANNEL = ("batch", "sync", "ghost", "frozen", "instance")
_NEEDS_POSITIONS = ("instance", "response")


@dataclass(frozen=True)
class Groups:
    """How channels are grouped: into at most `count` groups, or by `size` channels."""

    count: int = 32
    size: int | None = None

    def number(self, channels: int, *, least: int) -> int | None:
        """Return the number of groups of equal size, of at least so many channels; None if there is none."""
        if self.size is not None:
            return channels // self.size if channels % self.size == 0 and self.size >= least else None
        divisors = (number for number in range(min(self.count, channels), 0, -1) if channels % number == 0)
        return next((number for number in divisors if channels // number >= least), None)


class _Followed(StandIn):
    """Lets a layer's output go through modules inside it, such as an activation."""

    inherent = True

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(module)
        self.names = names

    def __call__(self, x: Tensor) -> Any:
        y = self.plain(x)
        for name in self.names:
            y = getattr(self.module, name)(y)
        return y


_BY_POSITIONS: dict[str, dict[int, type[nn.Module]]] = {
    "batch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d, -1: BatchNormAny},
    "ghost": {1: GhostBatchNorm1d, 2: GhostBatchNorm2d, 3: GhostBatchNorm3d, -1: GhostBatchNormAny},
    "instance": {1: InstanceNormAny, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d, -1: InstanceNormAny},
}
_SECOND: dict[str, type[nn.Module]] = {
    "sync": nn.SyncBatchNorm,
    "frozen": FrozenBatchNorm,
    "group": nn.GroupNorm,
    "layer": LayerNorm2d,
    "rms": RMSNorm2d,
    "response": FilterResponseNorm,
}
_LAST: dict[str, type[nn.Module]] = {
    "batch": BatchNormTokens,
    "sync": SyncBatchNormTokens,
    "ghost": GhostBatchNormTokens,
    "frozen": FrozenBatchNormTokens,
    "group": GroupNormTokens,
    "instance": InstanceNormTokens,
    "layer": nn.LayerNorm,
    "rms": RMSNormTokens,
    "response": FilterResponseNormTokens,
}


def _class_of(norm: Norm, target: Kind) -> type[nn.Module]:
    if norm.last:
        return _LAST[target]
    if target in _BY_POSITIONS:
        counts = {max(1, count) for count in norm.positions}
        return _BY_POSITIONS[target][counts.pop() if len(counts) == 1 else -1]
    return _SECOND[target]


def least_size(norm: Norm) -> int:
    """Return how many channels a group needs at least, so that it never normalizes a single value, which gives zero."""
    return 2 if norm.last or 0 in norm.positions else 1


def obstacle(norm: Norm, target: Kind, groups: Groups, *, measured: bool) -> str | None:
    """Return why a layer cannot be of another kind, or None if it can; `measured` ones get statistics from data."""
    if target == "none":
        return None
    if target == "frozen" and norm.mean is None and not measured:
        return "it has no running statistics to be frozen; pass `calibrate`, which measures them"
    if target in {"layer", "rms"} and norm.channels == 1:
        return "it has one channel, and normalizing a single value leaves nothing of it"
    if target in _NEEDS_POSITIONS and norm.positions == {0}:
        return "its inputs have no positions to normalize over"
    if target == "group" and groups.number(norm.channels, least=least_size(norm)) is None:
        asked = f"groups of {groups.size} channels" if groups.size is not None else "groups of more than one value"
        return f"its {norm.channels} channels cannot be split into {asked}"
    return None


def build_norm(norm: Norm, target: Kind, groups: Groups, ghost_size: int) -> nn.Module:
    """Build a layer of another kind that starts from what a layer computes, where it lies."""
    after = dict(norm.after)
    if norm.threshold is not None and target != "response":
        after["act"] = nn.Threshold(0.0, 0.0)  # a ReLU whose output may be overwritten, as residual networks do
    if target == "none":
        return nn.Sequential(OrderedDict(after)) if after else nn.Identity()
    new = _make(norm, target, groups, ghost_size)
    tensors = [tensor for tensor in (norm.weight, norm.bias, norm.mean) if tensor is not None]
    if tensors:
        new.to(device=tensors[0].device, dtype=tensors[0].dtype)
    _carry(norm, new, target)
    setattr(new, POSITIONS, tuple(sorted(norm.positions)))
    for name, inner in after.items():
        new.add_module(name, inner)
    if after:
        _Followed(new, tuple(after)).attach()
    return new


def _make(norm: Norm, target: Kind, groups: Groups, ghost_size: int) -> nn.Module:
    kind: Any = _class_of(norm, target)
    count, eps, affine = norm.channels, norm.eps, norm.weight is not None
    tracks = norm.mean is not None or norm.kind not in PER_CHANNEL[:3]
    if target in {"batch", "sync"}:
        made = kind(count, eps, norm.momentum, affine, tracks)
    elif target == "ghost":
        made = kind(count, ghost_size, eps=eps, momentum=norm.momentum, affine=affine, track_running_stats=tracks)
    elif target == "group":
        made = kind(groups.number(count, least=least_size(norm)), count, eps, affine)
    elif target == "instance":
        made = kind(count, eps, affine=affine)
    elif target in {"frozen", "response"}:
        made = kind(count, eps=eps)
    elif norm.last and target == "layer":
        made = kind(count, eps, affine, norm.bias is not None or norm.kind == "rms")
    elif norm.last:
        made = kind(count, eps, affine)
    else:
        made = kind(count, eps=eps, affine=affine)
    module: nn.Module = made
    return module


@torch.no_grad()
def _carry(norm: Norm, new: nn.Module, target: Kind) -> None:
    """Let a new layer have the scale, the shift and the statistics with which it gives what the old one gave."""
    for key, value in (("running_mean", norm.mean), ("running_var", norm.variance), ("num_batches_tracked", norm.seen)):
        if value is not None and isinstance(getattr(new, key, None), Tensor):
            setattr(new, key, value.detach().clone())
    weight, bias = _started(norm, new, target)
    for key, old, value in (("weight", norm.weight, weight), ("bias", norm.bias, bias)):
        own = getattr(new, key, None)
        if not isinstance(own, Tensor):
            continue
        if isinstance(own, nn.Parameter) and isinstance(old, nn.Parameter) and value is old:
            setattr(new, key, old)  # the very parameter, so that it stays tied to whatever shares it
            continue
        if value is not None:
            own.copy_(value)
        first = next((each for each in (old, norm.weight, norm.bias) if isinstance(each, nn.Parameter)), None)
        own.requires_grad_(isinstance(own, nn.Parameter) and (first is None or first.requires_grad))


def _started(norm: Norm, new: nn.Module, target: Kind) -> tuple[Tensor | None, Tensor | None]:
    if norm.mean is None or norm.variance is None or target in PER_CHANNEL:
        return norm.weight, norm.bias
    mean, variance = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (norm.mean, norm.variance))
    centre, spread = _pooled(mean, variance, new, target)
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.to(mean)
    slope = weight * (variance + norm.eps).rsqrt()
    shift = slope * (centre - mean)
    return slope * (spread + norm.eps).sqrt(), shift if norm.bias is None else norm.bias.to(mean) + shift


def _pooled(mean: Tensor, variance: Tensor, new: nn.Module, target: Kind) -> tuple[Tensor, Tensor]:
    """Return the centre and the spread that a layer of another kind finds in inputs of these statistics, per channel."""
    squares = variance + mean.square()
    if target == "response":
        return torch.zeros_like(mean), squares
    if target == "rms":
        return torch.zeros_like(mean), squares.mean().expand_as(mean)
    groups = new.num_groups if isinstance(new, nn.GroupNorm) else 1
    size = len(mean) // groups
    centre = mean.view(groups, size).mean(1, keepdim=True)
    spread = squares.view(groups, size).mean(1, keepdim=True) - centre.square()
    return centre.expand(groups, size).reshape(-1), spread.clamp_min(0).expand(groups, size).reshape(-1)
