"""Filter response normalization: divide each channel of a sample by the root of its mean square, and rectify above a learned threshold.

There is no dependence on other samples, and nothing to track for evaluation. Since no mean is taken off, the rectifier's threshold is
learned.

Source: S. Singh and S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural
Networks", CVPR, 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_tricks._core.checks import check_count

__all__ = ["FilterResponseNorm"]


class FilterResponseNorm(nn.Module):
    """Normalize."""

    learned_eps: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        learnable_eps: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = check_count("num_features", num_features)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.threshold = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_parameter("learned_eps", nn.Parameter(torch.empty((), device=device, dtype=dtype)) if learnable_eps else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to one, shift and threshold to zero, and what is added to `eps` to 1e-4."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.threshold)
        if self.learned_eps is not None:
            nn.init.constant_(self.learned_eps, 1e-4)

    @override
    def forward(self, input: Tensor) -> Tensor:
        shape = (-1, *(1,) * (input.ndim - 2))
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        squares = values.square()
        if input.ndim > 2:
            squares = squares.mean(tuple(range(2, input.ndim)), keepdim=True)
        eps = self.eps if self.learned_eps is None else self.eps + self.learned_eps.abs()
        scale = (squares + eps).rsqrt() * self.weight.view(shape)
        return torch.maximum(torch.addcmul(self.bias.view(shape), values, scale), self.threshold.view(shape)).to(input.dtype)

    @override
    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, learnable_eps={self.learned_eps is not None}"
