"""Stochastic gradient descent with momentum.

Source: B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
Mathematical Physics, 1964; I. Sutskever, J. Martens, G. Dahl and G. Hinton, "On the importance of initialization and momentum in deep
learning", ICML, 2013.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from lightning_tricks._core.lightning import override
from lightning_tricks.errors import ArgumentError
from lightning_tricks.optimization._recipe import GroupedRecipe

__all__ = ["SGD"]


@dataclass(frozen=True, repr=False)
class SGD(GroupedRecipe):
    """Stochastic gradient descent: ``g ← g + λw``, ``b ← μb + (1 − τ)g``, ``w ← w − ηb``, with Nesterov ``w ← w − η(g + μb)``.

    The standard for convolutional networks trained from scratch, with momentum 0.9 and a rate of 0.1 for 256 examples per step.

    Args:
        lr: Learning rate η, at least 0.
        momentum: Factor μ, in [0, 1].
        dampening: Damping τ of the gradient in the momentum, in [0, 1].
        weight_decay: Factor λ, at least 0, of the weights in the gradient; the rate scales it.
        nesterov: Look one step of momentum ahead; needs momentum and no dampening.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
          Mathematical Physics, 1964.
        - I. Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML, 2013.

        Differs from the latter in that the rate scales the whole buffer, as in `torch.optim.SGD`.

    Example:
        >>> SGD(lr=0.1, momentum=0.9, nesterov=True)
        SGD(lr=0.1, momentum=0.9, nesterov=True)
    """

    lr: float = 1e-3
    _: KW_ONLY
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"momentum": "[0, 1]", "dampening": "[0, 1]"}

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not (self.momentum > 0 and self.dampening == 0):
            msg = f"`nesterov=True` needs momentum > 0 and dampening = 0, got momentum={self.momentum!r}, dampening={self.dampening!r}."
            raise ArgumentError(msg)
