"""Weight standardization: each filter computes with its weights less their mean, divided by their standard deviation.

What batch normalization does to activations is done to weights, which needs no batch. With group normalization behind, it trains networks
with few samples at a time as well as batch normalization trains them with many.

Source: S. Qiao, H. Wang, C. Liu, W. Shen and A. Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks.normalization._weight_surgery import Changed, ConvForward, LinearForward, change, restore

__all__ = ["apply_weight_standardization", "remove_weight_standardization"]


class _Standardized:
    """Computes with ``(w − mean(w)) / √(var(w) + ε)``, taken over each filter."""

    def effective_weight(self: Any) -> Tensor:
        weight: Tensor = self.weight
        rows = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)[None]
        return batch_norm(rows, None, None, training=True, eps=self.standardization_eps).view(weight.shape).to(weight.dtype)


class StandardizedConv1d(_Standardized, ConvForward, nn.Conv1d):
    """A convolution of sequences by standardized weights."""


class StandardizedConv2d(_Standardized, ConvForward, nn.Conv2d):
    """A convolution of images by standardized weights."""


class StandardizedConv3d(_Standardized, ConvForward, nn.Conv3d):
    """A convolution of volumes by standardized weights."""


class StandardizedLinear(_Standardized, LinearForward, nn.Linear):
    """A linear layer of standardized weights."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
    nn.Linear: StandardizedLinear,
}


def apply_weight_standardization(
    model: nn.Module, *, where: str | Sequence[str] | None = None, exclude: str | Sequence[str] = (), eps: float = 1e-5
) -> Changed:
    """Let layers compute with standardized weights: ``ŵ = (w − mean(w)) / √(var(w) + ε)``, over each filter.

    The parameter stays ``w``, under its name; gradients reach it through the formula. Put a normalization layer behind, which brings the
    outputs back to scale. A second call replaces the first.

    Args:
        model: The model, which is changed in place.
        where: Globs over names of layers, convolutions and linear ones; None = all convolutions.
        exclude: Globs over names of layers that are left alone.
        eps: Added to the variance, above 0 (ε).

    Returns:
        A report: ``changed``, the names of the layers, and ``left``, why others cannot.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no layer is found that can.

    Note:
        The function of the model changes, and its keys do not: a checkpoint has the plain weights. Standardize the model before it is
        loaded, or write the effective weights into it first, by ``remove_weight_standardization(model, keep="function")``; then it loads
        anywhere and computes the same. Layers whose class overrides those of torch are left, and so are transposed convolutions.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
        >>> apply_weight_standardization(model).changed
        ('0',)
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    eps = check_in_interval("eps", eps, "(0, ∞)")
    return change(model, _KINDS, {"standardization_eps": eps}, where, exclude, least=2, trick="apply_weight_standardization")


def remove_weight_standardization(model: nn.Module, *, keep: Literal["weights", "function"] = "weights") -> None:
    """Let layers compute with their weights themselves, as before `apply_weight_standardization`.

    Args:
        model: The model, which is changed in place; if nothing is standardized, nothing happens.
        keep: ``"weights"`` leaves the parameters as they are, ``"function"`` writes the standardized weights into them.

    Raises:
        ArgumentError: If `keep` is none of the two.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> report = apply_weight_standardization(model, eps=1e-8)
        >>> remove_weight_standardization(model, keep="function")
        >>> type(model[0]).__name__, bool(model[0].weight.mean().abs() < 1e-6)
        ('Conv2d', True)
    """
    restore(model, _KINDS, ("standardization_eps",), keep)
