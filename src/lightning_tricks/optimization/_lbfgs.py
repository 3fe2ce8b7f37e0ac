"""Limited-memory BFGS: steps along an estimate of Newton's direction, from the latest differences of gradients.

Source: D. C. Liu and J. Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", Mathematical Programming, 1989.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_choice, check_count
from lightning_tricks._core.lightning import override
from lightning_tricks.errors import ArgumentError
from lightning_tricks.optimization._groups import ParameterGroup, check_complete, group_parameters
from lightning_tricks.optimization._recipe import OptimizerRecipe

__all__ = ["LBFGS"]


@dataclass(frozen=True, repr=False)
class LBFGS(OptimizerRecipe):
    """Limited-memory BFGS, for smooth problems whose gradient has no noise: full batches, no dropout.

    Each step evaluates the loss and its gradient several times. Under Lightning's automatic optimization each evaluation is a call of
    `training_step` on the same batch. With gradient accumulation, each evaluation sees the last batch only, on top of the gradients
    of the others at the old weights: use one batch.

    Args:
        lr: Length of steps, at least 0; 1 is Newton's.
        max_iter: Most iterations in a step, at least 1.
        max_eval: Most evaluations in a step, at least 1; None for ``max_iter · 5 // 4``.
        tolerance_grad: Stop when no entry of the gradient is larger; at least 0.
        tolerance_change: Stop when weights or loss change less; at least 0.
        history_size: Differences that are kept, at least 1; each is two copies of the model.
        line_search_fn: ``"strong_wolfe"`` searches the length of each step; None takes `lr`.
        overrides: Must be empty: the method has one group of parameters.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - D. C. Liu and J. Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", Mathematical Programming, 1989.

    Example:
        >>> LBFGS(max_iter=10, line_search_fn="strong_wolfe")
        LBFGS(max_iter=10, line_search_fn='strong_wolfe')
    """

    lr: float = 1.0
    _: KW_ONLY
    max_iter: int = 20
    max_eval: int | None = None
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9
    history_size: int = 100
    line_search_fn: Literal["strong_wolfe"] | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    source: ClassVar[str] = "torch"

    def __post_init__(self) -> None:
        for name in ("lr", "tolerance_grad", "tolerance_change"):
            self._check(name, "[0, ∞)")
        for name in ("max_iter", "max_eval", "history_size"):
            if name != "max_eval" or self.max_eval is not None:
                self._set(name, check_count(name, getattr(self, name)))
        check_choice("line_search_fn", self.line_search_fn, ("strong_wolfe", None))
        if self.overrides:
            msg = f"`overrides` must be empty: LBFGS takes one group of parameters, got {self.overrides!r}. Use another optimizer."
            raise ArgumentError(msg)

    @override
    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "overrides"}
        return group_parameters(model, lambda _: options, who="LBFGS")

    @override
    def build(self, model: nn.Module) -> Optimizer:
        (group,) = self.groups(model)
        optimizer = torch.optim.LBFGS(group.parameters, **group.options)
        check_complete(optimizer, model)
        return optimizer
