"""Lookahead: k steps forward, one step back.

A second set of slow weights follows the weights that the optimizer moves. Every k steps the slow weights go a share α of the way to
the fast ones, and the fast ones begin there again. That damps oscillations and makes training less sensitive to the learning rate, at
the price of one more copy of the weights.

Source: M. R. Zhang, J. Lucas, G. Hinton and J. Ba, "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS, 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_count
from lightning_tricks._core.lightning import override
from lightning_tricks._core.strategies import own_part
from lightning_tricks._core.weights import copy_, lerp_
from lightning_tricks.optimization._wrapping import Closure, WrapperRecipe, WrappingOptimizer

__all__ = ["Lookahead"]

_SLOW: Final = "lookahead_slow"  # in the state of a parameter
_STEPS: Final = "lookahead_steps"  # in a parameter group


class LookaheadOptimizer(WrappingOptimizer):
    """Lets slow weights follow those that the optimizer inside moves."""

    def __init__(self, inner: Optimizer, k: int, alpha: float) -> None:
        super().__init__(inner)
        self.k, self.alpha = k, alpha
        for group in self.param_groups:
            group[_STEPS] = 0

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**param_group, _STEPS: 0})

    @override
    def step(self, closure: Closure | None = None) -> Any:
        unmoved: dict[nn.Parameter, Tensor] = {}
        if closure is None:
            self._note(unmoved)
            loss = self.inner.step()
        else:
            loss = self.inner.step(partial(self._evaluate, closure, unmoved))
        for parameter, slow in unmoved.items():
            self.state[parameter][_SLOW] = slow  # only now, since optimizers take a parameter for new while its state is empty
        for group in self.param_groups:
            group[_STEPS] += 1
            if group[_STEPS] % self.k == 0:
                self._synchronize(group["params"])
        return loss

    def _evaluate(self, closure: Closure, unmoved: dict[nn.Parameter, Tensor]) -> Any:
        loss = closure()
        self._note(unmoved)
        return loss

    def _note(self, unmoved: dict[nn.Parameter, Tensor]) -> None:
        """Copy the parameters that are about to move for the first time."""
        for parameter, _ in self.gradients:
            if parameter not in unmoved and _SLOW not in self.state.get(parameter, ()):
                unmoved[parameter] = parameter.detach().clone()

    def _synchronize(self, parameters: list[nn.Parameter]) -> None:
        moved = [parameter for parameter in parameters if _SLOW in self.state.get(parameter, ())]
        fast = [own_part(parameter.detach()) for parameter in moved]
        slow = [own_part(self.state[parameter][_SLOW]) for parameter in moved]
        if moved:
            lerp_(slow, fast, self.alpha)
            copy_(fast, slow)


@dataclass(frozen=True, repr=False)
class Lookahead(WrapperRecipe):
    """Let slow weights follow the fast ones: every k steps ``φ ← φ + α(θ − φ)``, then ``θ ← φ``.

    The slow weights φ begin as the weights before the first step. Reach for it to steady an optimizer that oscillates, or whose rate is
    hard to tune.

    Args:
        recipe: The recipe whose optimizer moves the fast weights θ.
        k: Steps between two synchronizations, at least 1.
        alpha: The share α of the way that the slow weights go, in (0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain, or another Lookahead or ScheduleFree is inside.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        The slow weights are state of the optimizer: checkpoints hold them, and they are sharded where the weights are. Between two
        synchronizations, evaluation sees the fast weights; with a validation each multiple of k steps it sees the slow ones. The state of
        the optimizer inside, such as its momentum, is kept at a synchronization.

    References:
        - M. R. Zhang, J. Lucas, G. Hinton and J. Ba, "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS, 2019. k = 5 and
          α = 0.5 are its choices for ImageNet.

    Example:
        >>> from lightning_tricks import optim
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = optim.Lookahead(optim.SGD(lr=1.0), k=6, alpha=0.5).build(model)
        >>> _ = model.weight.data.zero_()
        >>> for _ in range(12):  # twelve steps of one each
        ...     optimizer.zero_grad()
        ...     (-model.weight).sum().backward()
        ...     optimizer.step()
        >>> model.weight.item()
        6.0
    """

    _: KW_ONLY
    k: int = 5
    alpha: float = 0.5

    clashes: ClassVar[Mapping[str, str]] = {
        "Lookahead": "both would keep their slow weights in one place",
        "ScheduleFree": "it would move the weights and leave their average behind",
    }

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("k", check_count("k", self.k))
        self._check("alpha", "(0, 1]")

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        return LookaheadOptimizer(inner, self.k, self.alpha)
