"""Let layers compute with a function of their weight: a change of class, under which the weight stays the parameter it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_tricks._core.checks import check_choice, check_patterns
from lightning_tricks._core.selection import matches, nothing_left
from lightning_tricks._core.strategies import plain_name
from lightning_tricks.errors import NothingMatchedError

if TYPE_CHECKING:
    from torch.nn.modules.conv import _ConvNd

__all__ = ["Changed", "ConvForward", "Keep", "LinearForward", "change", "fan_in", "restore"]

Keep = Literal["weights", "function"]
_LAYERS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear


@dataclass(frozen=True)
class Changed:
    """What surgery has done.

    Attributes:
        changed: The names of the layers that now compute with a function of their weight.
        left: The layers that cannot, each with the reason.
    """

    changed: tuple[str, ...]
    left: Mapping[str, str]


class ConvForward:
    """Lets a convolution use `effective_weight`."""

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002, the name it has in torch
        """Convolve with the effective weight."""
        output: Tensor = self._conv_forward(input, self.effective_weight(), self.bias)
        return output


class LinearForward:
    """Lets a linear layer use `effective_weight`."""

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002, the name it has in torch
        """Multiply by the effective weight."""
        return linear(input, self.effective_weight(), self.bias)


def fan_in(layer: _ConvNd | nn.Linear) -> int:
    """Return how many weights make one output, by what the layer was made with: its weight may be sharded or lazy."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.in_channels // layer.groups * torch.Size(layer.kernel_size).numel()


def change(
    model: nn.Module,
    kinds: Mapping[type[nn.Module], type[nn.Module]],
    options: Mapping[str, float],
    where: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    *,
    least: int,
    trick: str,
) -> Changed:
    """Give layers another class, which computes with a function of the weight by these options.

    Args:
        model: The model, which is changed in place.
        kinds: For each class, the one that takes its place.
        options: Attributes that the layers get.
        where: Globs over names of layers; None = all convolutions.
        exclude: Globs over names of layers that are left alone.
        least: The least fan-in of a layer for which the function has a meaning.
        trick: What the trick calls itself.

    Raises:
        NothingMatchedError: If nothing is left to change, saying why.
    """
    where = None if where is None else check_patterns("where", where, empty=False)
    exclude = check_patterns("exclude", exclude, empty=True)
    named: dict[str, nn.Module] = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    model_name = type(model).__name__
    if where is None:
        located, wanted = {name: layer for name, layer in named.items() if not isinstance(layer, nn.Linear)}, "convolution"
    else:
        located, wanted = {name: layer for name, layer in named.items() if matches(name, where)}, "layer"
    selected = {name: layer for name, layer in located.items() if not matches(name, exclude)}
    left = {name: reason for name, layer in selected.items() if (reason := _hindrance(layer, kinds, least))}
    changed = tuple(name for name in selected if name not in left)
    if not changed:
        if not named or (where is None and not located):
            reason = f"{model_name} has none that is a module. Name linear layers by `where`" if named else f"{model_name} has none"
        elif not selected:
            reason = nothing_left(model, named, located, where, exclude)
        else:
            listed = "; ".join(f"{name!r}: {why}" for name, why in list(left.items())[:3])
            reason = f"all {len(left)} are left ({listed}). Select others"
        msg = f"{trick} found no {wanted} to change: {reason}."
        raise NothingMatchedError(msg)
    for name in changed:
        layer = selected[name]
        layer.__class__ = kinds.get(type(layer), type(layer))
        vars(layer).update(options)
    return Changed(changed, left)


def _hindrance(layer: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]], least: int) -> str:
    if type(layer) not in {*kinds, *kinds.values()}:
        return f"of the class {type(layer).__name__}, which computes in a way of its own"
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    return "each of its outputs has a single weight" if fan_in(layer) < least else ""


def restore(model: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]], options: Sequence[str], keep: Keep) -> None:
    """Give layers their class back, and keep their weights, or else their function by writing the effective weights into them."""
    check_choice("keep", keep, ("weights", "function"))
    plain = {changed: kind for kind, changed in kinds.items()}
    for layer in model.modules():
        if type(layer) in plain:
            if keep == "function":
                with torch.no_grad():
                    layer.weight.copy_(layer.effective_weight())  # type: ignore[operator]
            layer.__class__ = plain[type(layer)]
            for option in options:
                del vars(layer)[option]
