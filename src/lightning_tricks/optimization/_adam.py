"""Adam and its relatives.

Source: D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR, 2015; I. Loshchilov and F. Hutter, "Decoupled
Weight Decay Regularization", ICLR, 2019.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from lightning_tricks._core.checks import check_bool, check_in_interval
from lightning_tricks._core.lightning import override
from lightning_tricks.errors import ArgumentError
from lightning_tricks.optimization._recipe import GroupedRecipe

__all__ = ["Adam", "AdamW"]


def _check_betas(betas: tuple[float, float]) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        msg = f"`betas` must be two numbers in [0, 1), got {betas!r}."
        raise ArgumentError(msg)
    for beta in betas:
        check_in_interval("betas", beta, "[0, 1)")


@dataclass(frozen=True, repr=False)
class Adam(GroupedRecipe):
    """Adam: ``m ← β₁m + (1 − β₁)g``, ``v ← β₂v + (1 − β₂)g²``, ``w ← w − η m̂ / (√v̂ + ε)``.

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

    @override
    def __post_init__(self) -> None:
        _check_betas(self.betas)
        check_bool("amsgrad", self.amsgrad)
        object.__setattr__(self, "betas", tuple(self.betas))
        super().__post_init__()


@dataclass(frozen=True, repr=False)
class AdamW(GroupedRecipe):
    """Adam with decoupled weight decay: ``w ← w(1 − ηλ)`` before Adam's step.

    Example:
        >>> AdamW(lr=1e-3, weight_decay=0.05)
        AdamW(weight_decay=0.05)
    """

    lr: float = 1e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    amsgrad: bool = False

    @override
    def __post_init__(self) -> None:
        _check_betas(self.betas)
        check_bool("amsgrad", self.amsgrad)
        object.__setattr__(self, "betas", tuple(self.betas))
        super().__post_init__()
