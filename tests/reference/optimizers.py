"""Optimizers and groups as their papers write them, parameter by parameter, in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class SGD:
    """Momentum as in Sutskever et al. 2013, in torch's form, where the rate scales the whole buffer."""

    def __init__(self, *, lr: float, momentum: float, weight_decay: float) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.b: Tensor | None = None

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        g = g + self.weight_decay * w
        self.b = g if self.b is None else self.momentum * self.b + g
        return w - self.lr * self.b


class AdamW:
    """Loshchilov and Hutter 2019, with the decay scaled by the learning rate."""

    def __init__(self, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.t, self.m, self.v = 0, torch.tensor(0.0).double(), torch.tensor(0.0).double()

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        self.t += 1
        w = w - self.lr * self.weight_decay * w
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        m_hat, v_hat = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        return w - self.lr * m_hat / (v_hat.sqrt() + self.eps)


class Muon:
    """Jordan et al. 2024: momentum, five iterations of Newton and Schulz, a step. Everything beyond the rows is flattened."""

    def __init__(self, *, lr: float, momentum: float, weight_decay: float, nesterov: bool = True) -> None:
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self.m: Tensor | None = None

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        rows = g.shape[0]
        g = g.reshape(rows, -1)
        self.m = torch.zeros_like(g) if self.m is None else self.m
        self.m = self.momentum * self.m + (1 - self.momentum) * g
        x = g + self.momentum * (self.m - g) if self.nesterov else self.m
        x = x / math.sqrt(sum(float(each) ** 2 for each in x.flatten()))
        for _ in range(5):
            y = x @ x.T
            x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
        w = w - self.lr * self.weight_decay * w
        return w - self.lr * math.sqrt(max(1, rows / g.shape[1])) * x.reshape(w.shape)


def layer_rates(lr: float, decay: float, layers: Sequence[int]) -> list[float]:
    """Bao et al. 2022: the last layer has the whole rate, and each layer below it `decay` times that of the next."""
    rates = {max(layers): lr}
    for layer in range(max(layers) - 1, -1, -1):
        rates[layer] = decay * rates[layer + 1]
    return [rates[layer] for layer in layers]
