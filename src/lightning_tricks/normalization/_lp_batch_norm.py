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
from typing_extensions import override

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks.normalization._tracking import TrackingBatchNorm

__all__ = ["LpBatchNorm1d", "LpBatchNorm2d", "LpBatchNorm3d"]


class _LpBatchNorm(TrackingBatchNorm):
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
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )
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
            self._move(mean.detach(), variance.detach() * (count / (count - 1)))
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

    @override
    def extra_repr(self) -> str:
        return self._representation(f"p={self.p}")


def _constant(p: float) -> float:
    """Return ``C_p = (√π / (2^(p/2) Γ((p+1)/2)))^(1/p)``, by which the p-th deviation of a normal distribution makes its standard one."""
    return math.pow(math.sqrt(math.pi) / (math.pow(2, p / 2) * math.gamma((p + 1) / 2)), 1 / p)


class LpBatchNorm1d(_LpBatchNorm, nn.BatchNorm1d):
    """Normalize features or sequences by p-th deviations: ``y = (x − m) / √(s² + ε) · γ + β``, ``s = C_p · mean(|x − m|^p)^(1/p)``.

    In a normal distribution s is the standard deviation: ``C_1 = √(π/2)``, and ``C_2 = 1``, which is plain batch normalization.

    Args:
        num_features: The number of channels C, at least 1.
        p: The power of deviations, at least 1.
        eps: Added to the square of s, above 0 (ε).
        momentum: Share of a batch in the running statistics, in [0, 1]; None = the mean over all batches.
        affine: Whether there are a scale γ and a shift β for each channel.
        track_running_stats: Whether running statistics are kept for evaluation, which otherwise computes as training does.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C) or (N, C, L)
        - Output: as the input

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        It is a ``nn.BatchNorm1d`` with the same keys; ``running_var`` averages ``s² · n / (n − 1)``, for n values per channel. It costs
        more time than plain batch normalization, whose kernels compute variances only.

    References:
        - E. Hoffer, R. Banner, I. Golan and D. Soudry, "Norm matters", NeurIPS, 2018. Differs from it in where ε stands.

    Example:
        >>> norm = LpBatchNorm1d(1)
        >>> [round(value, 3) for value in norm(torch.tensor([[-1.0], [-1.0], [2.0]])).flatten().tolist()]
        [-0.598, -0.598, 1.197]
    """


class LpBatchNorm2d(_LpBatchNorm, nn.BatchNorm2d):
    """Normalize images by p-th deviations: ``y = (x − m) / √(s² + ε) · γ + β``, ``s = C_p · mean(|x − m|^p)^(1/p)``.

    In a normal distribution s is the standard deviation: ``C_1 = √(π/2)``, and ``C_2 = 1``, which is plain batch normalization.

    Args:
        num_features: The number of channels C, at least 1.
        p: The power of deviations, at least 1.
        eps: Added to the square of s, above 0 (ε).
        momentum: Share of a batch in the running statistics, in [0, 1]; None = the mean over all batches.
        affine: Whether there are a scale γ and a shift β for each channel.
        track_running_stats: Whether running statistics are kept for evaluation, which otherwise computes as training does.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, H, W)
        - Output: as the input

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        It is a ``nn.BatchNorm2d`` with the same keys; ``running_var`` averages ``s² · n / (n − 1)``, for n values per channel. It costs
        more time than plain batch normalization, whose kernels compute variances only.

    References:
        - E. Hoffer, R. Banner, I. Golan and D. Soudry, "Norm matters", NeurIPS, 2018. Differs from it in where ε stands.

    Example:
        >>> x = torch.randn(4, 8, 2, 2)
        >>> bool(torch.allclose(LpBatchNorm2d(8, p=2)(x), nn.BatchNorm2d(8)(x), atol=1e-5))
        True
    """


class LpBatchNorm3d(_LpBatchNorm, nn.BatchNorm3d):
    """Normalize volumes by p-th deviations: ``y = (x − m) / √(s² + ε) · γ + β``, ``s = C_p · mean(|x − m|^p)^(1/p)``.

    In a normal distribution s is the standard deviation: ``C_1 = √(π/2)``, and ``C_2 = 1``, which is plain batch normalization.

    Args:
        num_features: The number of channels C, at least 1.
        p: The power of deviations, at least 1.
        eps: Added to the square of s, above 0 (ε).
        momentum: Share of a batch in the running statistics, in [0, 1]; None = the mean over all batches.
        affine: Whether there are a scale γ and a shift β for each channel.
        track_running_stats: Whether running statistics are kept for evaluation, which otherwise computes as training does.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, D, H, W)
        - Output: as the input

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        It is a ``nn.BatchNorm3d`` with the same keys; ``running_var`` averages ``s² · n / (n − 1)``, for n values per channel. It costs
        more time than plain batch normalization, whose kernels compute variances only.

    References:
        - E. Hoffer, R. Banner, I. Golan and D. Soudry, "Norm matters", NeurIPS, 2018. Differs from it in where ε stands.

    Example:
        >>> LpBatchNorm3d(8, p=1.5)
        LpBatchNorm3d(8, p=1.5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    """
