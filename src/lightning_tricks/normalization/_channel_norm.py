"""Layer norms over the channels of images: each position of ``(N, C, *)`` is normalized by the values of its C channels.

Convolutional networks with the normalization of transformers use them, first ConvNeXt. They compute the same as ``nn.LayerNorm`` and
``nn.RMSNorm`` on tensors whose channels come last, which in the memory format ``channels_last`` is how the values lie.

Sources: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016; B. Zhang and R. Sennrich, "Root Mean Square Layer
Normalization", NeurIPS, 2019; Z. Liu et al., "A ConvNet for the 2020s", CVPR, 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm
from typing_extensions import override

from lightning_tricks._core.checks import check_count, check_in_interval

__all__ = ["LayerNorm2d", "RMSNorm2d"]


class LayerNorm2d(nn.LayerNorm):
    """Normalize each position by its channels: ``y = (x − mean(x)) / √(var(x) + ε) · γ + β``.

    It equals ``nn.LayerNorm`` with the channels last, and not ``nn.GroupNorm(1, C)``, which takes all positions together.

    Args:
        num_channels: C, at least 1.
        eps: Added to the variance, above 0 (ε).
        affine: Whether there are a scale γ and a shift β for each channel.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, ...)
        - Output: (N, C, ...)

    Raises:
        ArgumentError: If `num_channels` or `eps` lies outside its domain.

    Note:
        Its keys are ``weight`` and ``bias``. The output lies in memory with the channels last, as the input had better do: after
        ``model.to(memory_format=torch.channels_last)`` nothing is copied.

    References:
        - J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016.
        - Z. Liu, H. Mao, C.-Y. Wu, C. Feichtenhofer, T. Darrell and S. Xie, "A ConvNet for the 2020s", CVPR, 2022.

    Example:
        >>> norm = LayerNorm2d(3)
        >>> [round(value, 4) for value in norm(torch.tensor([[[[1.0]], [[2.0]], [[6.0]]]])).flatten().tolist()]
        [-0.9258, -0.4629, 1.3887]
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("num_channels", num_channels)
        super().__init__(num_channels, eps=check_in_interval("eps", eps, "(0, ∞)"), elementwise_affine=affine, device=device, dtype=dtype)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)

    @override
    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, affine={self.elementwise_affine}"


class RMSNorm2d(nn.RMSNorm):
    """Normalize each position by the root mean square of its channels: ``y = x / √(mean(x²) + ε) · γ``.

    It equals ``nn.RMSNorm`` with the channels last.

    Args:
        num_channels: C, at least 1.
        eps: Added to the mean square, above 0 (ε).
        affine: Whether there is a scale γ for each channel.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, ...)
        - Output: (N, C, ...)

    Raises:
        ArgumentError: If `num_channels` or `eps` lies outside its domain.

    Note:
        Its key is ``weight``. The output lies in memory with the channels last, as the input had better do: after
        ``model.to(memory_format=torch.channels_last)`` nothing is copied.

    References:
        - B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS, 2019.

    Example:
        >>> norm = RMSNorm2d(2)
        >>> [round(value, 4) for value in norm(torch.tensor([[[[3.0]], [[4.0]]]])).flatten().tolist()]
        [0.8485, 1.1314]
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("num_channels", num_channels)
        super().__init__(num_channels, eps=check_in_interval("eps", eps, "(0, ∞)"), elementwise_affine=affine, device=device, dtype=dtype)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return rms_norm(input.movedim(1, -1), self.normalized_shape, self.weight, self.eps).movedim(-1, 1)

    @override
    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, affine={self.elementwise_affine}"
