"""Weight normalization: each filter computes with its weights divided by their norm, times a gain.

The length of the weights no longer matters to the output: as it grows, steps of the optimizer turn their direction less, so that rates
that are too large correct themselves.

Sources: T. Salimans and D. P. Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
NeurIPS, 2016; T. Karras, M. Aittala, J. Lehtinen, J. Hellsten, T. Aila and S. Laine, "Analyzing and Improving the Training Dynamics of
Diffusion Models", CVPR, 2024, for gains that are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks.normalization._weight_surgery import Changed, ConvForward, LinearForward, change, restore

__all__ = ["apply_weight_normalization", "remove_weight_normalization"]


class _Normalized:
    """Computes with ``g · v / ‖v‖``, taken over each filter."""

    def effective_weight(self: Any) -> Tensor:
        weight: Tensor = self.weight
        rows = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
        scaled: Tensor = self.normalization_gain * normalize(rows)
        return scaled.view(weight.shape).to(weight.dtype)


class NormalizedConv1d(_Normalized, ConvForward, nn.Conv1d):
    """A convolution of sequences by normalized weights."""


class NormalizedConv2d(_Normalized, ConvForward, nn.Conv2d):
    """A convolution of images by normalized weights."""


class NormalizedConv3d(_Normalized, ConvForward, nn.Conv3d):
    """A convolution of volumes by normalized weights."""


class NormalizedLinear(_Normalized, LinearForward, nn.Linear):
    """A linear layer of normalized weights."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: NormalizedConv1d,
    nn.Conv2d: NormalizedConv2d,
    nn.Conv3d: NormalizedConv3d,
    nn.Linear: NormalizedLinear,
}


def apply_weight_normalization(
    model: nn.Module, gain: float = 1.0, *, where: str | Sequence[str] | None = None, exclude: str | Sequence[str] = ()
) -> Changed:
    """Let layers compute with normalized weights: ``w = g · v / ‖v‖``, over each filter.

    The parameter stays ``v``, under its name; gradients reach it through the formula, at right angles to it. A gain of 1 keeps the scale
    of inputs that are independent, and ``√2`` keeps it behind a ReLU. A second call replaces the first.

    Args:
        model: The model, which is changed in place.
        gain: The norm of each filter, above 0 (g).
        where: Globs over names of layers, convolutions and linear ones; None = all convolutions.
        exclude: Globs over names of layers that are left alone.

    Returns:
        A report: ``changed``, the names of the layers, and ``left``, why others cannot.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no layer is found that can.

    Note:
        The function of the model changes, and its keys do not: a checkpoint has ``v``. Normalize the model before it is loaded, or
        write the effective weights into it first, by ``remove_weight_normalization(model, keep="function")``; then it loads anywhere
        and computes the same. Layers whose class overrides those of torch are left, and so are transposed convolutions.

    References:
        - T. Salimans and D. P. Kingma, "Weight Normalization", NeurIPS, 2016. Differs from it in a gain that is one number and fixed:
          one learned for each filter is a second parameter, with a key of its own. Leave it to a normalization layer behind, to
          `ScaledWSConv2d`, or to ``torch.nn.utils.parametrizations.weight_norm``, which renames keys.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> apply_weight_normalization(model, 2**0.5).changed
        ('0', '2')
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    gain = check_in_interval("gain", gain, "(0, ∞)")
    return change(model, _KINDS, {"normalization_gain": gain}, where, exclude, least=1, trick="apply_weight_normalization")


def remove_weight_normalization(model: nn.Module, *, keep: Literal["weights", "function"] = "weights") -> None:
    """Let layers compute with their weights themselves, as before `apply_weight_normalization`.

    Args:
        model: The model, which is changed in place; if nothing is normalized, nothing happens.
        keep: ``"weights"`` leaves the parameters as they are, ``"function"`` writes the normalized weights into them.

    Raises:
        ArgumentError: If `keep` is none of the two.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> report = apply_weight_normalization(model, 3.0, where="0")
        >>> remove_weight_normalization(model, keep="function")
        >>> type(model[0]).__name__, [round(norm, 4) for norm in model[0].weight.norm(dim=1).tolist()]
        ('Linear', [3.0, 3.0])
    """
    restore(model, _KINDS, ("normalization_gain",), keep)
