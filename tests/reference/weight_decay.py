"""Optimizers with weight decay, written down element by element in Python's own numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def sign(x: float) -> float:
    """Return -1, 0 or 1."""
    return float((x > 0) - (x < 0))


def adamw(
    theta: Sequence[float],
    gradient: Callable[[list[float], int], list[float]],
    rates: Sequence[float],
    decays: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> list[list[float]]:
    """Adam with decoupled decay (Loshchilov and Hutter, 2019, algorithm 2), the decay multiplied by the learning rate as in torch.

    Returns the weights after each step t, whose learning rate is ``rates[t]`` and whose decay is ``decays[t]``.
    """
    theta, history = list(theta), []
    m, v = [0.0] * len(theta), [0.0] * len(theta)
    for t, (eta, decay) in enumerate(zip(rates, decays, strict=True)):
        g = gradient(theta, t)
        for i in range(len(theta)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g[i] ** 2
            m_hat = m[i] / (1 - betas[0] ** (t + 1))
            v_hat = v[i] / (1 - betas[1] ** (t + 1))
            theta[i] = theta[i] - eta * decay * theta[i] - eta * m_hat / (math.sqrt(v_hat) + eps)
        history.append(list(theta))
    return history


def sgd(
    theta: Sequence[float],
    gradient: Callable[[list[float], int], list[float]],
    rates: Sequence[float],
    decays: Sequence[float],
    *,
    mode: str,
    momentum: float = 0.0,
) -> list[list[float]]:
    """SGD with momentum, on the loss with the penalty λ/2·‖θ‖² ("l2") or λ·‖θ‖₁ ("l1"), or with decoupled decay."""
    theta, history = list(theta), []
    b = [0.0] * len(theta)
    for t, (eta, decay) in enumerate(zip(rates, decays, strict=True)):
        g = gradient(theta, t)
        for i in range(len(theta)):
            added = {"l2": theta[i], "l1": sign(theta[i]), "decoupled": 0.0}[mode]
            b[i] = momentum * b[i] + g[i] + decay * added
            shrunk = theta[i] - eta * decay * theta[i] if mode == "decoupled" else theta[i]
            theta[i] = shrunk - eta * b[i]
        history.append(list(theta))
    return history
