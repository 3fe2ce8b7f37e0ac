"""Distributions from which the first weights of a network are drawn.

With `n` the number of inputs of a unit and `m` the number of units an input reaches,

==================  =====================================================
``xavier``          standard deviation ``gain · sqrt(2 / (n + m))``
``kaiming``         ``gain / sqrt(n)``, or ``gain / sqrt(m)``
``lecun``           ``1 / sqrt(n)``
``orthogonal``      orthonormal rows or columns, times ``gain``
``truncated_normal``  a given standard deviation, nothing beyond two of the normal that was cut
==================  =====================================================

A uniform distribution of that standard deviation σ lies in ``[−√3 σ, √3 σ]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from lightning_tricks.normalization._matrices import Matrix

__all__ = ["SCHEMES", "Draw", "Scheme", "activation_gain"]

Scheme = Literal[
    "keep", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "lecun_uniform", "lecun_normal", "orthogonal",
    "truncated_normal", "lsuv",
]  # fmt: skip
SCHEMES: Final[tuple[Scheme, ...]] = (
    "keep", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "lecun_uniform", "lecun_normal", "orthogonal",
    "truncated_normal", "lsuv",
)  # fmt: skip

_CUT: Final = 0.8796256610342398  # standard deviation of a normal of one that is cut at two
_GAINS: Final = ("relu", "leaky_relu", "selu", "sigmoid", "tanh")  # which torch has by heart


@dataclass(frozen=True)
class Draw:
    """How to draw matrices.

    Attributes:
        scheme: The distribution.
        gain: Factor of the standard deviation, or of orthonormal matrices.
        mode: Which count ``kaiming`` divides by.
        std: The standard deviation of ``truncated_normal``.
    """

    scheme: Scheme
    gain: float = 1.0
    mode: Literal["fan_in", "fan_out"] = "fan_in"
    std: float = 0.02

    def deviation(self, fan_in: int, fan_out: int) -> float:
        """Return the standard deviation."""
        if self.scheme.startswith("xavier"):
            return self.gain * math.sqrt(2.0 / (fan_in + fan_out))
        if self.scheme.startswith("kaiming"):
            return self.gain / math.sqrt(fan_in if self.mode == "fan_in" else fan_out)
        return 1.0 / math.sqrt(fan_in)

    def matrix(self, matrix: Matrix, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Draw a weight."""
        pieces = [torch.empty((shape[0] // matrix.pieces, *shape[1:]), dtype=dtype, device="cpu") for _ in range(matrix.pieces)]
        for piece in pieces:
            self._fill(piece.T if matrix.transposed else piece, matrix, generator)
        return torch.cat(pieces)

    def _fill(self, piece: Tensor, matrix: Matrix, generator: torch.Generator) -> None:
        if self.scheme in {"orthogonal", "lsuv"}:
            nn.init.orthogonal_(piece, self.gain, generator=generator)
        elif self.scheme == "truncated_normal":
            # The distribution function of what is left between its two ends, inverted.
            ends = math.erf(2.0 / math.sqrt(2.0))
            piece.uniform_(-ends, ends, generator=generator).erfinv_().mul_(math.sqrt(2.0) * self.std / _CUT)
        else:
            std = self.deviation(matrix.fan_in, matrix.fan_out)
            if self.scheme.endswith("uniform"):
                piece.uniform_(-math.sqrt(3.0) * std, math.sqrt(3.0) * std, generator=generator)
            else:
                piece.normal_(0.0, std, generator=generator)


def activation_gain(kind: str | None, function: Callable[[Tensor], Tensor] | None = None, negative_slope: float = 0.01) -> float:
    """Return the factor that keeps the size of a signal through an activation.

    That is torch's where it has one, and ``1 / sqrt(E f(z)²)`` for a standard normal z otherwise, which is ReLU's √2 and GELU's 1.534.

    Example:
        >>> round(activation_gain("relu"), 4), round(activation_gain("gelu", nn.GELU()), 4), activation_gain(None)
        (1.4142, 1.5335, 1.0)
    """
    if kind in _GAINS:
        return float(nn.init.calculate_gain(kind, negative_slope if kind == "leaky_relu" else None))  # type: ignore[arg-type]
    if kind is None or function is None or kind == "hardsigmoid":
        return 1.0
    z = torch.linspace(-10.0, 10.0, 20001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(function(z.clone()).square() * density, z) ** -0.5)
