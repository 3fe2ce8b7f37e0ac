"""Batch normalization by mean absolute deviations, or another power of them, in place of variances.

The mean absolute deviation, times the constant by which it is smaller in a normal distribution, needs no squares: it does not overflow
in low precision, and outliers weigh less.

Source: E. Hoffer, R. Banner, I. Golan and D. Soudry, "Norm matters: efficient and accurate normalization schemes in deep networks",
NeurIPS, 2018.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_tricks._core.checks import check_in_interval

__all__ = ["LpBatchNorm1d", "LpBatchNorm2d", "LpBatchNorm3d"]


class _LpBatchNorm(_BatchNorm):
    """What the layers of all dimensions share."""

    def __init__(
        self,
        num_features: int,
        p: float = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.p = check_in_interval("p", p, "[1, ∞)")

    @override
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        count = input.numel() // input.shape[1]
        if not (self.training or self.running_mean is None) or count == 1:  # of one value, plain BatchNorm says what is wrong
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        dims, shape = (0, *range(2, input.ndim)), (1, -1, *(1,) * (input.ndim - 2))
        mean = values.mean(dims)
        centred = values - mean.view(shape)
        variance = self._variance(centred, dims)
        if self.training and self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt()
        scale = (scale if self.weight is None else scale * self.weight).view(shape)
        out = centred * scale if self.bias is None else torch.addcmul(self.bias.to(values.dtype).view(shape), centred, scale)
        return out.to(input.dtype)

    def _variance(self, centred: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Return ``(C_p · (mean |x − m|^p)^(1/p))²``, which in a normal distribution is the variance."""
        deviations = centred.abs() if self.p == 1 else centred.square() if self.p == 2 else centred.abs().pow(self.p)
        power = deviations.mean(dims)
        if self.p > 2:  # whose root has no derivative at zero
            power = power.clamp(min=torch.finfo(power.dtype).tiny)
        return _constant(self.p) ** 2 * power.pow(2 / self.p)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: Tensor | float = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.copy_(torch.lerp(self.running_mean.to(mean.dtype), mean, share))
        self.running_var.copy_(torch.lerp(self.running_var.to(mean.dtype), variance, share))

    @override
    def extra_repr(self) -> str:
        features, _, rest = super().extra_repr().partition(", ")  # type: ignore[no-untyped-call]
        return f"{features}, p={self.p}, {rest}"


def _constant(p: float) -> float:
    """Return ``C_p = (√π / (2^(p/2) Γ((p+1)/2)))^(1/p)``, by which the p-th deviation of a normal distribution makes its standard one."""
    return math.pow(math.sqrt(math.pi) / (math.pow(2, p / 2) * math.gamma((p + 1) / 2)), 1 / p)


class LpBatchNorm1d(_LpBatchNorm, nn.BatchNorm1d):
    """Normalize."""


class LpBatchNorm2d(_LpBatchNorm, nn.BatchNorm2d):
    """Normalize."""


class LpBatchNorm3d(_LpBatchNorm, nn.BatchNorm3d):
    """Normalize."""
