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

from lightning_tricks._core.checks import check_count

__all__ = ["LayerNorm2d", "RMSNorm2d"]


class LayerNorm2d(nn.LayerNorm):
    """Normalize."""

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(check_count("num_channels", num_channels), eps=eps, elementwise_affine=affine, device=device, dtype=dtype)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class RMSNorm2d(nn.RMSNorm):
    """Normalize."""

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(check_count("num_channels", num_channels), eps=eps, elementwise_affine=affine, device=device, dtype=dtype)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return rms_norm(input.movedim(1, -1), self.normalized_shape, self.weight, self.eps).movedim(-1, 1)
