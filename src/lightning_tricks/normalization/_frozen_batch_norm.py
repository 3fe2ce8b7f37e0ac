"""BatchNorm whose statistics, scale and shift are fixed.

Where batches are too small for statistics of their own, as in detection and in fine-tuning, BatchNorm is used as a fixed affine map.

Source: K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition", CVPR, 2016, which fixes it in detection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_tricks._core.lightning import override

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(nn.Module):
    """BatchNorm with everything fixed: ``y = (x − m) / √(v + ε) · w + b``, in training as in evaluation.

    All tensors are buffers, under the keys of ``nn.BatchNorm2d``, so that states of the two load into each other. The output is what
    BatchNorm gives in evaluation mode, to the bit, and has the dtype of the input.

    Args:
        num_features: Number of channels C.
        eps: ε, added to the variance.

    Shape:
        - Input: ``(N, C, *)``
        - Output: the same

    Example:
        >>> norm = FrozenBatchNorm(2)
        >>> norm.running_mean += torch.tensor([1.0, 2.0])
        >>> norm(torch.tensor([[1.0, 1.0]])).round(decimals=3)
        tensor([[ 0., -1.]])
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)

    @override
    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
