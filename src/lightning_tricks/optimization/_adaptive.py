"""Optimizers that give each weight a step of its own: by the signs of its gradients, or by their squares.

Source: M. Riedmiller and H. Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", ICNN, 1993;
J. Duchi, E. Hazan and Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR, 2011;
T. Tieleman and G. Hinton, "Lecture 6.5 – RMSProp", Coursera, 2012; M. D. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012;
N. Shazeer and M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML, 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks._core.lightning import override
from lightning_tricks.errors import ArgumentError
from lightning_tricks.optimization._recipe import GroupedRecipe

__all__ = ["Adadelta", "Adafactor", "Adagrad", "RMSprop", "Rprop"]


@dataclass(frozen=True, repr=False)
class Rprop(GroupedRecipe):
    """Resilient backpropagation: each weight's step grows while its gradient keeps its sign, and shrinks when it changes.

    For gradients of the whole data set; with mini-batches the signs are noise.

    Args:
        lr: First step of each weight, at least 0.
        etas: Factors of the step, η⁻ in (0, 1) where the sign changed and η⁺ above 1 where it stayed.
        step_sizes: Least and largest step, both positive.

    Every other argument is one of `GroupedRecipe`; nothing decays.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - M. Riedmiller and H. Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", ICNN, 1993.

    Example:
        >>> Rprop(step_sizes=(1e-6, 1.0))
        Rprop(step_sizes=(1e-06, 1.0))
    """

    lr: float = 1e-2
    _: KW_ONLY
    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50.0)

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"etas": ("(0, 1)", "(1, ∞)"), "step_sizes": ("(0, ∞)", "(0, ∞)")}


@dataclass(frozen=True, repr=False)
class Adagrad(GroupedRecipe):
    """Adagrad: ``s ← s + g²``, ``w ← w − η·g / (√s + ε)``; rare features keep large steps.

    Args:
        lr: Learning rate η, at least 0.
        lr_decay: Decay γ of the rate, at least 0: step t has rate ``η / (1 + (t − 1)γ)``.
        weight_decay: Factor λ, at least 0, of the weights in the gradient.
        initial_accumulator_value: The first s, at least 0.
        eps: Term ε in the denominator, at least 0.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - J. Duchi, E. Hazan and Y. Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR, 2011.

    Example:
        >>> Adagrad(lr=0.05)
        Adagrad(lr=0.05)
    """

    lr: float = 1e-2
    _: KW_ONLY
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10


@dataclass(frozen=True, repr=False)
class RMSprop(GroupedRecipe):
    """RMSprop: ``v ← αv + (1 − α)g²``, ``w ← w − η·g / (√v + ε)``.

    Args:
        lr: Learning rate η, at least 0.
        alpha: Share α of the old mean square that is kept, in [0, 1).
        eps: Term ε in the denominator, at least 0.
        weight_decay: Factor λ, at least 0, of the weights in the gradient.
        momentum: Factor of momentum, in [0, 1].
        centered: Divide by the deviation around the mean gradient.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - T. Tieleman and G. Hinton, "Lecture 6.5 – RMSProp", Coursera, 2012.

        The variant of TensorFlow, with ε under the root, is ``Named("timm:rmsproptf")``.

    Example:
        >>> RMSprop(lr=1e-3, momentum=0.9)
        RMSprop(lr=0.001, momentum=0.9)
    """

    lr: float = 1e-2
    _: KW_ONLY
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"alpha": "[0, 1)", "momentum": "[0, 1]"}


@dataclass(frozen=True, repr=False)
class Adadelta(GroupedRecipe):
    """Adadelta: steps in the proportion of the mean square of past steps to that of past gradients.

    Args:
        lr: Factor of the steps, at least 0; 1 in the paper.
        rho: Share ρ of the old mean squares that is kept, in [0, 1].
        eps: Term ε under both roots, at least 0.
        weight_decay: Factor λ, at least 0, of the weights in the gradient.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - M. D. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701, 2012.

    Example:
        >>> Adadelta(rho=0.95)
        Adadelta(rho=0.95)
    """

    lr: float = 1.0
    _: KW_ONLY
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"rho": "[0, 1]"}


@dataclass(frozen=True, repr=False)
class Adafactor(GroupedRecipe):
    """Adafactor: of the mean squares of a matrix, only those of its rows and columns are kept.

    Args:
        lr: Largest relative step ρ, at least 0.
        beta2_decay: Exponent of the decay, at most 0: step t keeps the share ``1 − t^beta2_decay`` of the old mean squares.
        eps: ε₁, at least 0, added to squares, None for the machine's precision; and ε₂, at least 0, the least scale of weights.
        d: Threshold, at least 1, above which updates are clipped.
        weight_decay: Factor λ, at least 0; a step with rate η takes the share ηλ off the weights.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - N. Shazeer and M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML, 2018.

        Differs from the paper as `torch.optim.Adafactor` does.

    Example:
        >>> Adafactor(lr=1e-3)
        Adafactor(lr=0.001)
    """

    lr: float = 1e-2
    _: KW_ONLY
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: float = 0.0

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"beta2_decay": "(-∞, 0]", "d": "[1, ∞)"}

    @override
    def __post_init__(self) -> None:
        if isinstance(self.eps, str) or not isinstance(self.eps, Sequence) or len(self.eps) != 2:
            msg = f"`eps` must be two numbers, of which the first may be None, got {self.eps!r}."
            raise ArgumentError(msg)
        first, second = self.eps
        first = None if first is None else check_in_interval("eps[0]", first, "[0, ∞)")
        self._set("eps", (first, check_in_interval("eps[1]", second, "[0, ∞)")))
        super().__post_init__()
