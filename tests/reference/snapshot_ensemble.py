"""Snapshot ensembling as section 3 of Huang et al. (2017) writes it: a run of T iterations in M cycles, as a plain loop."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.optim import Optimizer


def rate(initial: float, t: int, total: int, cycles: int) -> float:
    """Return α(t) = α₀/2 · (cos(π · mod(t − 1, ⌈T/M⌉)/⌈T/M⌉) + 1), t from 1 on."""
    length = math.ceil(total / cycles)
    return initial / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)


def ends(total: int, cycles: int) -> list[int]:
    """Return the iterations after which a model is saved: the last of each cycle, and the last of all."""
    length = math.ceil(total / cycles)
    return [t for t in range(1, total + 1) if t % length == 0 or t == total]


def train(model: nn.Module, optimizer: Optimizer, batches: Iterable[tuple[Tensor, Tensor]], total: int, cycles: int) -> list[nn.Module]:
    """Train for T iterations by cross-entropy, and return the models saved."""
    initial, saved = [group["lr"] for group in optimizer.param_groups], []
    for t, (x, y) in enumerate(batches, 1):
        for group, alpha in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate(alpha, t, total, cycles)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if t in ends(total, cycles):
            saved.append(copy.deepcopy(model).eval())
    return saved


def predict(members: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Return the mean of the members' softmax outputs."""
    with torch.no_grad():
        outputs = [member(x).softmax(-1) for member in members]
    return sum(outputs) / len(outputs)
