"""Self-normalizing networks: activations that push signals towards mean zero and variance one, layer by layer, without any norm.

Source: G. Klambauer, T. Unterthiner, A. Mayr and S. Hochreiter, "Self-Normalizing Neural Networks", NeurIPS, 2017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import nn

from lightning_tricks._core.checks import check_patterns, check_seed
from lightning_tricks._core.lightning import rank_zero_info
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import replace_module
from lightning_tricks.normalization._activation_swap import swap_activation
from lightning_tricks.normalization._activations import KINDS, kind_of
from lightning_tricks.normalization._initializing import InitializedLayer, Options, call_with, run_initialization

__all__ = ["SelfNormalized", "make_self_normalizing"]

_FUNCTION = "make_self_normalizing"
_SATURATING: Final = ("sigmoid", "hardsigmoid", "tanh", "hardtanh", "softsign")  # which serve as gates and outputs
_HIDDEN: Final = tuple(kind for kind in KINDS if kind not in {*_SATURATING, "identity"})
_DROPOUTS: Final = {
    nn.Dropout: nn.AlphaDropout,
    nn.Dropout1d: nn.FeatureAlphaDropout,
    nn.Dropout2d: nn.FeatureAlphaDropout,
    nn.Dropout3d: nn.FeatureAlphaDropout,
}


@dataclass(frozen=True)
class SelfNormalized:
    """What was done to a model.

    Attributes:
        swapped: The activations that became SELU, by name, each with what was there and what is there now.
        dropouts: The dropout layers that became alpha dropout, each with its rate.
        layers: The layers that were drawn anew.
        left: What was left, each with the reason: norms, saturating activations, layers.
    """

    swapped: Mapping[str, str]
    dropouts: Mapping[str, float]
    layers: Mapping[str, InitializedLayer]
    left: Mapping[str, str]


def make_self_normalizing(
    model: nn.Module,
    *,
    source: str | type[nn.Module] | Sequence[str | type[nn.Module]] = _HIDDEN,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    seed: int | None = None,
) -> SelfNormalized:
    """Turn a network into a self-normalizing one: SELU, LeCun-normal weights and alpha dropout.

    With ``selu(x) = λ x`` for x > 0 and ``λ α (exp(x) − 1)`` otherwise, λ = 1.0507, α = 1.6733, and weights of mean zero and
    variance ``1 / n``, n the inputs of a unit, mean zero and variance one are a stable fixed point from layer to layer. Alpha dropout
    keeps both. Reach for it in deep fully connected networks without norms and without skip connections.

    Args:
        model: The model, which is changed in place.
        source: Activations that become SELU, as in `swap_activation`; the default is all but those that saturate on both sides, which
            serve as gates and outputs.
        where: Glob or globs over names of modules; None = everywhere.
        exclude: Globs over names that are left alone.
        seed: What the weights follow from, at least 0; None = torch's random state.

    Returns:
        A report: ``swapped``, ``dropouts``, ``layers``, and ``left`` with the reasons.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no activation or no layer is left to change.

    Note:
        Norm layers are left, with a notice: the theory does without them. Channel dropout becomes ``nn.FeatureAlphaDropout``. Dropout
        that code calls as a function, as attention does, is out of reach. Keys stay.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
        >>> report = make_self_normalizing(model, seed=0)
        >>> model[1], model[2], list(report.layers)
        (SELU(), AlphaDropout(p=0.1, inplace=False), ['0', '3'])
    """
    where = None if where is None else check_patterns("where", where, empty=False)
    exclude = check_patterns("exclude", exclude, empty=True)
    number = int(torch.randint(2**31, (), device="cpu").item()) if seed is None else check_seed(seed)
    swapped = swap_activation(model, source, "selu", where=where, exclude=exclude)
    options = Options("lecun_normal", where, exclude)
    drawn = run_initialization(model, options, number, None, partial(call_with, model), trick=_FUNCTION)
    dropouts, left = {}, {**swapped.left, **drawn.left}
    for name, module in [(plain_name(name), module) for name, module in model.named_modules()]:
        chosen = bool(name) and (where is None or matches(name, where)) and not matches(name, exclude)
        if chosen and type(module) in _DROPOUTS:
            assert isinstance(module, nn.modules.dropout._DropoutNd)
            replace_module(model, module, _DROPOUTS[type(module)](module.p, module.inplace))
            dropouts[name] = module.p
        elif chosen and kind_of(module) in _SATURATING:
            left[name] = f"{type(module).__name__} saturates on both sides, as gates and outputs do; name it as `source` to replace it"
        elif chosen and any("norm" in kind.__name__.lower() for kind in type(module).__mro__):
            left[name] = f"it is a norm ({type(module).__name__}), which self-normalizing networks do without"
    norms = [name for name, reason in left.items() if reason.startswith("it is a norm")]
    if norms:
        rank_zero_info(f"{_FUNCTION} leaves the norms {', '.join(norms)}, which self-normalizing networks do without.")
    return SelfNormalized(swapped.swapped, dropouts, drawn.layers, left)
