"""Convolutions whose standardized weights keep the variance of a signal: what normalizer-free networks are built from.

Source: A. Brock, S. De and S. L. Smith, "Characterizing signal propagation to close the performance gap in unnormalized ResNets", ICLR,
2021.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_tricks._core.checks import check_choice, check_in_interval
from lightning_tricks.errors import ArgumentError
from lightning_tricks.normalization._weight_surgery import fan_in

__all__ = ["ScaledWSConv2d"]

Activation = Literal["identity", "relu", "gelu", "silu", "elu", "selu", "mish", "tanh", "sigmoid", "softplus"]

# One over the standard deviation of the activation of a standard normal variable.
GAMMAS: Final[dict[str, float]] = {
    "identity": 1.0,
    "relu": 1.7128585505,
    "gelu": 1.7009262434,
    "silu": 1.7871872221,
    "elu": 1.2708434179,
    "selu": 1.0,
    "mish": 1.5920253811,
    "tanh": 1.5925374198,
    "sigmoid": 4.8013133721,
    "softplus": 1.9191259801,
}


class ScaledWSConv2d(nn.Conv2d):
    """A convolution by ``ŵ = γ · g · (w − mean(w)) / √(max(var(w) · fan_in, ε))``, over each filter, with a learned gain ``g``.

    Where the inputs are independent, outputs have the variance of the inputs times ``γ²``. With the γ of the activation in front, which
    undoes how much it shrinks a signal, networks train without normalization layers.

    Args:
        in_channels: As in ``nn.Conv2d``, and so are all up to `padding_mode`.
        out_channels: See there.
        kernel_size: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        bias: See there.
        padding_mode: See there.
        gamma: The activation in front, by name, or a number above 0 (γ).
        eps: The least variance that is divided by, above 0 (ε).
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, H, W)
        - Output: (N, C', H', W')

    Raises:
        ArgumentError: If `gamma` or `eps` lies outside its domain, or if filters have a single weight.

    Note:
        It has the keys of ``nn.Conv2d``, and ``gain``, of shape ``(C', 1, 1, 1)``, which starts as ones. A module can change
        `gamma` at any time; it is no part of the checkpoint.

    References:
        - A. Brock, S. De and S. L. Smith, "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
          ICLR, 2021; the gain and ε as in A. Brock, S. De, S. L. Smith and K. Simonyan, "High-Performance Large-Scale Image Recognition
          Without Normalization", ICML, 2021.

    Example:
        >>> conv = ScaledWSConv2d(16, 64, 3, gamma="relu")
        >>> round(conv.gamma, 4), list(conv.state_dict())
        (1.7129, ['weight', 'bias', 'gain'])
        >>> x = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
        >>> bool(0.8 < conv(x).std(dim=(0, 2, 3)).mean() < 1.2)
        True
    """

    def __init__(  # noqa: PLR0917, the order of nn.Conv2d
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["valid", "same"] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        gamma: float | Activation = 1.0,
        eps: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device=device, dtype=dtype
        )
        if fan_in(self) < 2:
            msg = f"ScaledWSConv2d needs at least two weights in each filter, got {fan_in(self)}. Take fewer `groups` or a larger kernel."
            raise ArgumentError(msg)
        if isinstance(gamma, str):
            gamma = GAMMAS[check_choice("gamma", gamma, tuple(GAMMAS))]
        self.gamma = float(check_in_interval("gamma", gamma, "(0, ∞)"))
        self.eps = check_in_interval("eps", eps, "(0, ∞)")
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1, device=device, dtype=dtype))

    def effective_weight(self) -> Tensor:
        """Return the weight that the convolution computes with (ŵ)."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        scale: Tensor = self.gamma * self.gain * (variance * fan_in(self)).clamp(min=self.eps).rsqrt()
        effective: Tensor = (weight - mean) * scale
        return effective.to(self.weight.dtype)

    @override
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.effective_weight(), self.bias)
        return output

    @override
    def extra_repr(self) -> str:
        as_conv: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{as_conv}, gamma={self.gamma:.4g}, eps={self.eps}"
