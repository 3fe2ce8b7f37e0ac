"""What our own batch normalizations share: the arguments of torch's, and running statistics that move once per batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tricks._core.checks import check_count, check_in_interval

__all__ = ["TrackingBatchNorm"]


class TrackingBatchNorm(_BatchNorm):
    """A batch normalization of torch's whose statistics a subclass measures in a way of its own."""

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_count("num_features", num_features)
        eps = check_in_interval("eps", eps, "(0, ∞)")
        momentum = None if momentum is None else check_in_interval("momentum", momentum, "[0, 1]")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch: by `momentum`, or to the mean over all batches."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: Tensor | float = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.copy_(torch.lerp(self.running_mean.to(mean.dtype), mean, share))
        self.running_var.copy_(torch.lerp(self.running_var.to(mean.dtype), variance, share))

    def _representation(self, own: str) -> str:
        """Return what stands in the layer's `repr`, with its own argument behind the number of channels."""
        options = f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, track_running_stats={self.track_running_stats}"
        return f"{self.num_features}, {own}, {options}"
