"""What flows through a network in one forward pass: mean and deviation of outputs, dead rectifiers, saturated sigmoids.

Source: X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS, 2010, for
statistics of activations and their saturation; L. Lu, Y. Shin, Y. Su and G. E. Karniadakis, "Dying ReLU and Initialization: Theory and
Numerical Examples", Communications in Computational Physics, 2020, for dead units.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_tricks._core.strategies import added_up, own_part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.hooks import RemovableHandle

__all__ = ["ACTIVATIONS", "ActivationProbe", "activation_statistics"]

_RECTIFIERS: Final = (nn.ReLU, nn.ReLU6)
_SQUASHING: Final = (nn.Sigmoid, nn.Tanh)
ACTIVATIONS: Final = (*_RECTIFIERS, *_SQUASHING)
_FLAT: Final = 0.1  # a slope below this share of the largest is saturated


def activation_statistics(output: Tensor, module: nn.Module, channels: int = 1) -> Tensor:
    """Return mean, standard deviation, share of dead units and share of saturated values of a module's output.

    A unit of a rectifier is dead if it is zero in all samples and positions. A value of a sigmoid or tanh is saturated where the
    slope is below a tenth of the largest: beyond 0.974 or below 0.026, or beyond ±0.949. Both are NaN for other modules.

    Args:
        output: The output, of any shape.
        module: The module that it comes from.
        channels: The dimension of units, if the output has three dimensions; with more, it is the second one, and with fewer the last.

    Example:
        >>> activation_statistics(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), nn.ReLU())
        tensor([1.0000, 1.2247, 0.5000,    nan])
    """
    values = output.detach()
    variance, mean = torch.var_mean(values if values.dtype is torch.float64 else values.float(), correction=0)
    dead = saturated = mean.new_full((), math.nan)
    if isinstance(module, _RECTIFIERS):
        dimension = (1 if values.ndim > 3 else channels if values.ndim == 3 else -1) % max(1, values.ndim)
        others = [each for each in range(values.ndim) if each != dimension]
        largest = values.amax(dim=others) if others else values  # which is zero in a dead unit, since none is negative
        dead = (largest == 0).float().mean()
    elif isinstance(module, _SQUASHING):
        slope = 1 - values.float().square() if isinstance(module, nn.Tanh) else 4 * values.float() * (1 - values.float())
        saturated = (slope < _FLAT).float().mean()
    return torch.stack([mean.float(), variance.sqrt().float(), dead, saturated])


class ActivationProbe:
    """Measures what modules return, from `attach` to `detach`; forward hooks are there in between alone.

    Compiled code does not run hooks that come after its compilation, and a hook that it was compiled with would stay. So this one
    does nothing there, and compiled modules are not measured.

    Args:
        modules: The modules by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.found: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._channels = -1

    def attach(self) -> None:
        """Measure from now on."""
        self._handles = [module.register_forward_hook(partial(self._note, name)) for name, module in self.modules.items()]

    def detach(self) -> dict[str, Tensor]:
        """Measure no more, and return the statistics by module in the order of their first calls, as means over all calls."""
        while self._handles:
            self._handles.pop().remove()
        found, self.found = self.found, {}
        return {name: calls[0] if len(calls) == 1 else torch.stack(calls).mean(dim=0) for name, calls in found.items()}

    def _note(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(module, _ConvNd | nn.Linear):
            self._channels = 1 if isinstance(module, _ConvNd) else -1
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and first.numel():
            part = own_part(added_up(first.detach()))
            self.found.setdefault(name, []).append(activation_statistics(part, module, self._channels))
