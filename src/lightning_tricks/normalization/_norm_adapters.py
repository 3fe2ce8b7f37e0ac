"""Normalization layers for inputs that torch's do not take: channels that come last, and any number of positions after them."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tricks._core.lightning import override
from lightning_tricks.errors import TrickError
from lightning_tricks.normalization._filter_response_norm import FilterResponseNorm
from lightning_tricks.normalization._frozen_batch_norm import FrozenBatchNorm
from lightning_tricks.normalization._ghost_batch_norm import GhostBatchNorm1d

__all__ = [
    "BatchNormAny",
    "BatchNormTokens",
    "FilterResponseNormTokens",
    "FrozenBatchNormTokens",
    "GhostBatchNormAny",
    "GhostBatchNormTokens",
    "GroupNormTokens",
    "InstanceNormAny",
    "InstanceNormTokens",
    "RMSNormTokens",
    "SyncBatchNormTokens",
]


class AnyPositions:
    """Lets a layer take any number of positions after the channels, where that of the layer before is not known."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # torch's name
        """Accept any number of positions."""


class BatchNormAny(AnyPositions, nn.BatchNorm1d):
    """BatchNorm of values of shape ``(N, C, *)``."""


class GhostBatchNormAny(AnyPositions, GhostBatchNorm1d):
    """The same over ghost batches."""


class InstanceNormAny(nn.InstanceNorm1d):
    """Instance normalization of values of shape ``(N, C, *)``; torch's takes ``(N, C)`` for a single sample and normalizes that."""

    @override
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        if input.ndim < 3:
            msg = f"Instance normalization needs positions to normalize over, and got the shape {tuple(input.shape)}. Exclude this layer."
            raise TrickError(msg)
        normalized: Tensor = self._apply_instance_norm(input)  # type: ignore[no-untyped-call]
        return normalized


class ChannelsLast(AnyPositions):
    """Lets a layer normalize values of shape ``(N, *, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = super().forward(x.movedim(-1, 1))  # type: ignore[misc]
        return normalized.movedim(1, -1)


class BatchNormTokens(ChannelsLast, nn.BatchNorm1d):
    """BatchNorm of values whose channels come last."""


class SyncBatchNormTokens(ChannelsLast, nn.SyncBatchNorm):
    """The same over all ranks."""


class GhostBatchNormTokens(ChannelsLast, GhostBatchNorm1d):
    """The same over ghost batches."""


class FrozenBatchNormTokens(ChannelsLast, FrozenBatchNorm):
    """The same with everything fixed."""


class GroupNormTokens(ChannelsLast, nn.GroupNorm):
    """Group normalization of values whose channels come last."""


class InstanceNormTokens(ChannelsLast, InstanceNormAny):
    """Instance normalization of values whose channels come last."""


class FilterResponseNormTokens(ChannelsLast, FilterResponseNorm):
    """Filter response normalization of values whose channels come last."""


class RMSNormTokens(nn.RMSNorm):
    """Root-mean-square normalization of values whose channels come last, in the precision of its scale, also under autocast."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.weight is None else x.to(self.weight.dtype)).to(x.dtype)
