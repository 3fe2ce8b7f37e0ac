"""Sharpness-aware minimization (SAM), and its adaptive form (ASAM).

Each step goes down the gradient at the worst point nearby instead of at the weights themselves: up the gradient by a distance ρ,
evaluate the gradient there, return, and step. That leads to minima whose neighbourhood is low as a whole. It costs a second evaluation
of loss and gradient per step.

Source: P. Foret, A. Kleiner, H. Mobahi and B. Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR,
2021; J. Kwon, J. Kim, H. Park and I. K. Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
Networks", ICML, 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tricks._core.checks import check_bool
from lightning_tricks._core.lightning import override
from lightning_tricks._core.reevaluation import evaluate_twice
from lightning_tricks._core.strategies import own_part, return_to_shards
from lightning_tricks.errors import UnsupportedOptimizerError
from lightning_tricks.optimization._gradients import total_norm
from lightning_tricks.optimization._wrapping import Closure, WrapperRecipe, WrappingOptimizer

__all__ = ["SAM"]

_ETA: Final = 0.01  # ASAM's η, as in its paper


def perturbation(weights: list[Tensor], gradients: list[Tensor], rho: float, *, adaptive: bool) -> list[Tensor]:
    """Return the way to the worst point nearby: ``ρ g/‖g‖``, or with ``T = |w| + η`` adaptively ``ρ T²g/‖Tg‖``.

    Example:
        >>> perturbation([torch.zeros(2)], [torch.tensor([3.0, 4.0])], 0.5, adaptive=False)
        [tensor([0.3000, 0.4000])]
    """
    if not adaptive:
        scale = rho / (total_norm(gradients) + 1e-12)
        return [gradient * scale.to(gradient) for gradient in gradients]
    scaled = [(weight.abs() + _ETA) * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    scale = rho / (total_norm(scaled) + 1e-12)
    return [(weight.abs() + _ETA) * each * scale.to(each) for weight, each in zip(weights, scaled, strict=True)]


class SAMOptimizer(WrappingOptimizer):
    """Evaluates the closure twice and steps with the second gradient."""

    _cleared = False  # whether the closure being evaluated has cleared the gradients

    def __init__(self, inner: Optimizer, model: nn.Module, rho: float, *, adaptive: bool) -> None:
        super().__init__(inner)
        self.model, self.rho, self.adaptive = model, rho, adaptive

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        self._cleared = True
        super().zero_grad(set_to_none)

    @override
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        if closure is None:
            self._check_without_closure()
            return self.inner.step()
        self._cleared = False
        loss = evaluate_twice(closure, self.model, partial(self._ascend, self.gradients))
        self.inner.step()
        return loss

    @torch.no_grad()
    def _ascend(self, earlier: list[tuple[nn.Parameter, Tensor]]) -> Callable[[], None] | None:
        """Move the weights to the worst point nearby, and return what moves them back."""
        if not self._cleared and any(parameter.grad is gradient for parameter, gradient in earlier):
            msg = (
                "SAM evaluates each gradient twice, so the closure must clear the gradients and compute them anew, and it kept those of an "
                "earlier batch. Under Lightning that is so with `accumulate_grad_batches` > 1: take larger batches instead. In manual "
                "optimization, call `optimizer.step(closure)` with a closure that begins with `optimizer.zero_grad()`."
            )
            raise UnsupportedOptimizerError(msg)
        gradients = self.gradients
        if not gradients:
            return None
        return_to_shards(self.model)
        weights = [parameter.detach() for parameter, _ in gradients]
        steps = perturbation(weights, [gradient for _, gradient in gradients], self.rho, adaptive=self.adaptive)
        kept = [own_part(weight).clone() for weight in weights]
        for weight, step in zip(weights, steps, strict=True):
            weight.add_(step)
        return partial(self._return, weights, kept)

    @torch.no_grad()
    def _return(self, weights: list[Tensor], kept: list[Tensor]) -> None:
        return_to_shards(self.model)
        for weight, values in zip(weights, kept, strict=True):
            own_part(weight).copy_(values)

    def _check_without_closure(self) -> None:
        gradients = [gradient for _, gradient in self.gradients]
        if gradients and total_norm(gradients):  # where all gradients vanish, so does the perturbation
            msg = (
                "SAM needs a closure that evaluates loss and gradient a second time, and `step` was called without one. A gradient scaler "
                "does so: take `precision='bf16-mixed'` instead of '16-mixed'. In your own loop, call `optimizer.step(closure)`."
            )
            raise UnsupportedOptimizerError(msg)


@dataclass(frozen=True, repr=False)
class SAM(WrapperRecipe):
    """Step with the gradient at the worst point nearby: ``w ← step(w, ∇L(w + ε))`` with ``ε = ρ ∇L(w)/‖∇L(w)‖``.

    With ``adaptive=True`` (ASAM) the neighbourhood scales with the weights: ``ε = ρ T²∇L(w)/‖T∇L(w)‖`` with ``T = |w| + 0.01``. Reach for
    it when a network fits the training set well and generalizes less well, and twice the time per step can be paid.

    Args:
        recipe: The recipe whose optimizer steps.
        rho: The distance ρ, in [0, ∞). 0.05 to 0.1 are the SAM paper's choices; the ASAM paper takes 0.5 to 2.
        adaptive: Whether the neighbourhood scales with the weights.

    Raises:
        ArgumentError: If an argument lies outside its domain, or another SAM is inside.
        UnsupportedOptimizerError: From `build`, if the recipe is LBFGS. From a step, if there is no closure, as under fp16 with a
            gradient scaler and in manual optimization, or if gradients are accumulated over batches.
        UnsupportedStrategyError: From `build`, under FSDP1 and DeepSpeed.

    Note:
        Lightning's automatic optimization passes a closure, which is evaluated twice for each batch. Both evaluations draw the same
        random numbers, so that dropout draws the same masks; a run with ``rho=0`` equals one without SAM to the bit. The first evaluation
        logs, updates metrics and BatchNorm's statistics, and gives the step's outputs; of the second nothing is left but the gradient.
        What `training_step` does by other ways, such as appending to a list or calling a logger itself, it does twice. Hooks around
        backward, and clipping by the Trainer, run in both evaluations.

        Nothing is added to checkpoints. The weights return exactly, also if the second evaluation fails, from a copy of them that exists
        during a step.

        Under DDP and FSDP2, the perturbation follows the gradient averaged over all ranks and is the same on each.

    References:
        - P. Foret, A. Kleiner, H. Mobahi and B. Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
          ICLR, 2021. Differs from the paper on several devices, where each perturbs by the gradient of its own part of the batch.
        - J. Kwon, J. Kim, H. Park and I. K. Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
          Neural Networks", ICML, 2021. As in the paper's formula, all parameters are scaled; the authors' code leaves biases out.

    Example:
        >>> from lightning_tricks import optim
        >>> optim.SAM(optim.SGD(lr=0.1, momentum=0.9), rho=0.1)
        SAM(SGD(lr=0.1, momentum=0.9), rho=0.1)
    """

    _: KW_ONLY
    rho: float = 0.05
    adaptive: bool = False

    clashes: ClassVar[Mapping[str, str]] = {"SAM": "one of them would perturb the weights at which the other evaluates"}

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rho", "[0, ∞)")
        check_bool("adaptive", self.adaptive)

    @override
    def _wrap(self, inner: Optimizer, model: nn.Module) -> Optimizer:
        return SAMOptimizer(inner, model, self.rho, adaptive=self.adaptive)
