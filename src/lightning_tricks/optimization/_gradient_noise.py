"""Gradient noise: Gaussian noise on the gradient, less and less over training.

Noise lets an optimizer leave poor regions and find flatter minima early on; as its variance decays, it settles. It has helped very deep
networks that start badly, at the price of one draw for each weight in each step.

Source: A. Neelakantan, L. Vilnis, Q. V. Le, I. Sutskever, L. Kaiser, K. Kurach and J. Martens, "Adding Gradient Noise Improves Learning
for Very Deep Networks", ICLR workshop, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_seed
from lightning_tricks._core.draws import fold
from lightning_tricks._core.lightning import override
from lightning_tricks._core.seeding import seed_of_run
from lightning_tricks._core.shards import TensorShards
from lightning_tricks._core.strategies import added_up, own_part
from lightning_tricks.errors import UnsupportedOptimizerError
from lightning_tricks.optimization._wrapping import Closure, TransformingOptimizer, WrapperRecipe

__all__ = ["GradientNoise"]

_STEPS: Final = "gradient_noise_steps"  # in a parameter group
_SEED: Final = "gradient_noise_seed"  # likewise


def noise_deviation(eta: float, gamma: float, t: int) -> float:
    """Return the standard deviation of the noise at step t, the first one being 0: ``sqrt(η/(1 + t)^γ)``.

    Example:
        >>> noise_deviation(0.25, 0.55, 0), round(noise_deviation(0.25, 0.55, 999), 4)
        (0.5, 0.0748)
    """
    return math.sqrt(eta / (1 + t) ** gamma)


class NoisyOptimizer(TransformingOptimizer):
    """Adds noise to the gradients before each step.

    What is drawn follows from the seed, the step and the place of the parameter, and is the same on all ranks; where a gradient is
    spread over ranks, each cuts its part out of the whole.
    """

    def __init__(self, inner: Optimizer, eta: float, gamma: float, seed: int) -> None:
        super().__init__(inner)
        self.eta, self.gamma = eta, gamma
        for group in self.param_groups:
            group[_STEPS], group[_SEED] = 0, seed

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        like = self.param_groups[0]
        super().add_param_group({**param_group, _STEPS: like[_STEPS], _SEED: like[_SEED]})

    @override
    def step(self, closure: Closure | None = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group[_STEPS] += 1
        return loss

    @override
    def _transform(self) -> None:
        step, seed = self.param_groups[0][_STEPS], self.param_groups[0][_SEED]
        deviation = noise_deviation(self.eta, self.gamma, step)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in enumerate(parameters if deviation else ()):
            if parameter.grad is not None:
                self._add(parameter, deviation, fold(seed, step, place))

    @staticmethod
    def _add(parameter: nn.Parameter, deviation: float, key: int) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            msg = (
                f"GradientNoise adds noise to every weight, and the gradient of a parameter of shape {tuple(gradient.shape)} is sparse. "
                "Pass `sparse=False` to its embedding, or give it an optimizer of its own."
            )
            raise UnsupportedOptimizerError(msg)
        if isinstance(gradient, DTensor):
            gradient = parameter.grad = added_up(gradient)  # noise on each of several terms would be noise several times
        device = own_part(gradient).device
        generator = torch.Generator(device).manual_seed(key)
        noise = torch.randn(gradient.shape, generator=generator, device=device)
        if isinstance(gradient, DTensor):
            noise = TensorShards(gradient).cut(noise)
        own_part(gradient).add_(noise.to(gradient.dtype), alpha=deviation)


@dataclass(frozen=True, repr=False)
class GradientNoise(WrapperRecipe):
    """Add Gaussian noise to the gradient: ``g ← g + N(0, σ_t²)`` with ``σ_t² = η/(1 + t)^γ`` at step t = 0, 1, 2, ...

    It acts right before the step, on gradients that Lightning has unscaled, averaged and clipped; put `ClipNorm` inside to clip
    the noisy gradient, or around it to clip what the noise is added to. Reach for it with very deep networks that are hard to start.

    Args:
        recipe: The recipe whose optimizer gets the noisy gradients.
        eta: The variance η of the noise at the first step, in [0, ∞). The paper chooses among 0.01, 0.3 and 1.0.
        gamma: How fast the variance decays, γ, in [0, ∞); 0 = it stays.
        seed: What the noise follows from; None = the seed of ``seed_everything``, or 0.

    Raises:
        ArgumentError: If an argument lies outside its domain, or another GradientNoise is inside.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS; in training, if a gradient is sparse.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        The noise belongs to the seed, the step and the place of the parameter alone: a resumed run goes on with it, ranks add the
        same, and no other random numbers are drawn or disturbed. Steps and seed are in the optimizer's parameter groups, and so in
        checkpoints. On sharded parameters each rank draws the whole tensor, one parameter after another, and keeps its part.
        Different kinds of devices draw different noise. Where a step evaluates its closure several times, each evaluation gets the
        same noise.

    References:
        - A. Neelakantan, L. Vilnis, Q. V. Le, I. Sutskever, L. Kaiser, K. Kurach and J. Martens, "Adding Gradient Noise Improves
          Learning for Very Deep Networks", ICLR workshop, 2016. Equation 1; γ = 0.55 is theirs.

    Example:
        >>> from lightning_tricks import optim
        >>> model = nn.Linear(100, 100, bias=False)
        >>> optimizer = optim.GradientNoise(optim.SGD(lr=1.0), eta=0.04).build(model)
        >>> _ = model.weight.data.zero_()
        >>> (0 * model.weight).sum().backward()
        >>> optimizer.step()
        >>> round(model.weight.std().item(), 2)
        0.2
    """

    _: KW_ONLY
    eta: float = 0.01
    gamma: float = 0.55
    seed: int | None = None

    clashes: ClassVar[Mapping[str, str]] = {"GradientNoise": "both would count their steps in one place"}

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("eta", "[0, ∞)")
        self._check("gamma", "[0, ∞)")
        if self.seed is not None:
            self._set("seed", check_seed(self.seed))

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        seed = seed_of_run() if self.seed is None else self.seed
        return NoisyOptimizer(inner, self.eta, self.gamma, seed)
