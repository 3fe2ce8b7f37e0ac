"""Wrappers of optimizers, written down as slowly and literally as their papers, in float64 and around plain gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Gradient = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def sam(weights: Sequence[Tensor], gradient: Gradient, *, lr: float, rho: float, steps: int) -> list[Tensor]:
    """Foret et al. 2021, algorithm 1: ε = ρ g/‖g‖ over all weights together, then descend along the gradient at w + ε."""
    weights = [w.double() for w in weights]
    for _ in range(steps):
        g = gradient(weights)
        length = sum(float((each * each).sum()) for each in g) ** 0.5
        there = [w + rho * each / length for w, each in zip(weights, g, strict=True)]
        weights = [w - lr * each for w, each in zip(weights, gradient(there), strict=True)]
    return weights


def asam(weights: Sequence[Tensor], gradient: Gradient, *, lr: float, rho: float, steps: int, eta: float = 0.01) -> list[Tensor]:
    """Kwon et al. 2021, equation 6: ε = ρ T²g/‖Tg‖ with T = diag(|w|) + ηI."""
    weights = [w.double() for w in weights]
    for _ in range(steps):
        g = gradient(weights)
        t = [w.abs() + eta for w in weights]
        length = sum(float(((a * b) ** 2).sum()) for a, b in zip(t, g, strict=True)) ** 0.5
        there = [w + rho * a * a * b / length for w, a, b in zip(weights, t, g, strict=True)]
        weights = [w - lr * each for w, each in zip(weights, gradient(there), strict=True)]
    return weights


def lookahead(weights: Sequence[Tensor], gradient: Gradient, *, lr: float, k: int, alpha: float, steps: int) -> list[Tensor]:
    """Zhang et al. 2019, algorithm 1: k steps of the fast weights from the slow ones, then φ ← φ + α(θ − φ)."""
    slow = [w.double() for w in weights]
    fast = slow
    for step in range(1, steps + 1):
        fast = [w - lr * g for w, g in zip(fast, gradient(fast), strict=True)]
        if step % k == 0:
            slow = [s + alpha * (f - s) for s, f in zip(slow, fast, strict=True)]
            fast = slow
    return fast


def adaptively_clipped(weight: Tensor, gradient: Tensor, *, max_ratio: float, eps: float) -> Tensor:
    """Brock et al. 2021, equation 3, unit by unit; rows of matrices, filters of convolutions, vectors as a whole."""
    if weight.ndim <= 1:
        return _clipped_unit(weight.double(), gradient.double(), max_ratio, eps)
    return torch.stack([_clipped_unit(w.double(), g.double(), max_ratio, eps) for w, g in zip(weight, gradient, strict=True)])


def _clipped_unit(w: Tensor, g: Tensor, max_ratio: float, eps: float) -> Tensor:
    size, length = max(float((w * w).sum()) ** 0.5, eps), float((g * g).sum()) ** 0.5
    return g * (max_ratio * size / length) if length / size > max_ratio else g


def centralized(gradient: Tensor) -> Tensor:
    """Yong et al. 2020, equation 1: the mean of each row or filter taken off."""
    return torch.stack([row.double() - row.double().sum() / row.numel() for row in gradient])


def schedule_free(
    weights: Sequence[Tensor],
    gradient: Gradient,
    step: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    *,
    beta: float,
    steps: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Defazio et al. 2024, equations 3 to 5, at a constant rate: return x and y."""
    x = z = [w.double() for w in weights]
    for t in range(1, steps + 1):
        y = [(1 - beta) * b + beta * a for a, b in zip(x, z, strict=True)]
        z = step(z, gradient(y))
        x = [(1 - 1 / t) * a + b / t for a, b in zip(x, z, strict=True)]
    return x, [(1 - beta) * b + beta * a for a, b in zip(x, z, strict=True)]
