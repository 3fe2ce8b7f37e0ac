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

from lightning_tricks._core.checks import check_count, check_in_interval

__all__ = ["FilterResponseNorm"]


class FilterResponseNorm(nn.Module):
    """Normalize each channel of a sample by its mean square, and rectify: ``y = max(γ · x / √(ν² + ε) + β, τ)``, ``ν² = mean(x²)``.

    The mean is taken over all positions. It stands in the place of a normalization layer and of the ReLU behind.

    Args:
        num_features: The number of channels C, at least 1.
        eps: Added to the mean square, above 0 (ε).
        learnable_eps: Whether the absolute value of a learned number, 1e-4 at first, is added to `eps`. It matters where few positions
            are left: with one, ``x / √(x² + ε)`` is a sign function that ε smooths.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, ...)
        - Output: (N, C, ...)

    Raises:
        ArgumentError: If `num_features` or `eps` lies outside its domain.

    Note:
        Its keys are ``weight`` (γ), ``bias`` (β), ``threshold`` (τ), and ``learned_eps``. The statistics are taken in float32 at least.

    References:
        - S. Singh and S. Krishnan, "Filter Response Normalization Layer", CVPR, 2020. One learned ε serves all channels.

    Example:
        >>> norm = FilterResponseNorm(1)
        >>> [round(value, 4) for value in norm(torch.tensor([[[3.0, -4.0, 5.0]]])).flatten().tolist()]
        [0.7348, 0.0, 1.2247]
    """

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
        self.eps = check_in_interval("eps", eps, "(0, ∞)")
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
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        shape = (-1, *(1,) * (input.ndim - 2))
        weight, bias, threshold = (each.to(values.dtype).view(shape) for each in (self.weight, self.bias, self.threshold))
        squares = values.square()
        if input.ndim > 2:
            squares = squares.mean(tuple(range(2, input.ndim)), keepdim=True)
        eps = self.eps if self.learned_eps is None else self.eps + self.learned_eps.abs()
        scaled = torch.addcmul(bias, values, (squares + eps).rsqrt() * weight)
        return torch.maximum(scaled, threshold).to(input.dtype)

    @override
    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, learnable_eps={self.learned_eps is not None}"
