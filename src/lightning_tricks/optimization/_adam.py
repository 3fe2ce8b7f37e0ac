"""Adam and its relatives: steps scaled by running means of the gradient and of its square.

Source: D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR, 2015; I. Loshchilov and F. Hutter, "Decoupled
Weight Decay Regularization", ICLR, 2019; T. Dozat, "Incorporating Nesterov Momentum into Adam", ICLR Workshop, 2016; L. Liu et al.,
"On the Variance of the Adaptive Learning Rate and Beyond", ICLR, 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Final

from lightning_tricks.optimization._recipe import GroupedRecipe

__all__ = ["Adam", "AdamW", "NAdam", "RAdam"]

_BETAS: Final = ("[0, 1)", "[0, 1)")


@dataclass(frozen=True, repr=False)
class Adam(GroupedRecipe):
    """Adam: ``m ← β₁m + (1 − β₁)g``, ``v ← β₂v + (1 − β₂)g²``, ``w ← w − η·m̂ / (√v̂ + ε)`` with ``m̂ = m/(1 − β₁ᵗ)``, ``v̂ = v/(1 − β₂ᵗ)``.

    Its weight decay adds λw to the gradient, where the step's scaling undoes much of it; `AdamW` decays the weights themselves.

    Args:
        lr: Learning rate η, at least 0.
        betas: Shares β₁ and β₂ of the old means that are kept, each in [0, 1).
        eps: Term ε in the denominator, at least 0.
        weight_decay: Factor λ, at least 0, of the weights in the gradient.
        amsgrad: Use the largest v̂ seen so far.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR, 2015.
        - S. J. Reddi, S. Kale and S. Kumar, "On the Convergence of Adam and Beyond", ICLR, 2018, for `amsgrad`.

    Example:
        >>> Adam(lr=3e-4)
        Adam(lr=0.0003)
    """

    lr: float = 1e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"betas": _BETAS}


@dataclass(frozen=True, repr=False)
class AdamW(GroupedRecipe):
    """Adam with decoupled weight decay: ``w ← w(1 − ηλ)`` before each step of `Adam`.

    The standard for transformers, for fine-tuning, and wherever there is no better recipe.

    Args:
        lr: Learning rate η, at least 0.
        betas: Shares β₁ and β₂ of the old means that are kept, each in [0, 1).
        eps: Term ε in the denominator, at least 0.
        weight_decay: Factor λ, at least 0; a step with rate η takes the share ηλ off the weights.
        amsgrad: Use the largest v̂ seen so far.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR, 2019.

        Differs from the paper in that the decay is scaled by the learning rate and not by its schedule alone, as in
        `torch.optim.AdamW`.

    Example:
        >>> recipe = AdamW(lr=1e-3, weight_decay=0.05, overrides={"head.*": {"lr": 1e-2}})
        >>> recipe
        AdamW(weight_decay=0.05, overrides={'head.*': {'lr': 0.01}})
    """

    lr: float = 1e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    amsgrad: bool = False

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"betas": _BETAS}


@dataclass(frozen=True, repr=False)
class NAdam(GroupedRecipe):
    """Adam with Nesterov momentum: the step looks one step of the running mean ahead.

    Args:
        lr: Learning rate η, at least 0.
        betas: Shares β₁ and β₂ of the old means that are kept, each in [0, 1).
        eps: Term ε in the denominator, at least 0.
        weight_decay: Factor λ, at least 0.
        momentum_decay: Decay ψ of the momentum, at least 0: ``μₜ = β₁(1 − 0.96^(tψ) / 2)``.
        decoupled_weight_decay: Decay the weights themselves, as in `AdamW`, rather than by the gradient.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - T. Dozat, "Incorporating Nesterov Momentum into Adam", ICLR Workshop, 2016.

    Example:
        >>> NAdam(weight_decay=0.05, decoupled_weight_decay=True)
        NAdam(weight_decay=0.05, decoupled_weight_decay=True)
    """

    lr: float = 2e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"betas": _BETAS}


@dataclass(frozen=True, repr=False)
class RAdam(GroupedRecipe):
    """Rectified Adam: steps of plain momentum until enough gradients were seen to scale by their squares; a built-in warm-up.

    Args:
        lr: Learning rate η, at least 0.
        betas: Shares β₁ and β₂ of the old means that are kept, each in [0, 1).
        eps: Term ε in the denominator, at least 0.
        weight_decay: Factor λ, at least 0.
        decoupled_weight_decay: Decay the weights themselves, as in `AdamW`, rather than by the gradient.

    Every other argument is one of `GroupedRecipe`.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - L. Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR, 2020.

    Example:
        >>> RAdam(lr=1e-4)
        RAdam(lr=0.0001)
    """

    lr: float = 1e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"betas": _BETAS}
