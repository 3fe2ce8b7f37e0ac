"""Dropout and its uncertainties as their formulas say, one value after another."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

WORD = 2**32
LAMBDA, ALPHA = 1.0507009873554805, 1.6732632423543772  # of SELU


def mixed(value: int) -> int:
    """Hash 32 bits."""
    value ^= value >> 16
    value = value * 0x7FEB352D % WORD
    value ^= value >> 15
    value = value * 0x846CA68B % WORD
    return value ^ value >> 16


def alive(key: int, rate: float, count: int) -> list[bool]:
    """Say which of `count` values survive: halves of hashed counters, as signed integers below the share that is kept."""
    first, second = mixed(key), mixed((key + 1) % WORD)
    halves = []
    for counter in range((count + 1) // 2):
        bits = counter ^ first
        bits ^= bits >> 16
        bits = bits * 0x7FEB352D % WORD
        bits ^= second
        bits ^= bits >> 15
        bits = bits * 0x846CA68B % WORD
        bits ^= bits >> 16
        halves += [bits % 2**16, bits >> 16]
    signed = [half - 2**16 if half >= 2**15 else half for half in halves]
    return [half < round((1 - rate) * 2**16) - 2**15 for half in signed[:count]]


def dropped(x: Tensor, mask: Tensor, rate: float, *, alpha: bool = False) -> Tensor:
    """Apply a mask of the shape of the input, of True where values survive, as Srivastava et al. or as Klambauer et al., section 3."""
    y, keep, low = torch.empty_like(x), 1 - rate, -LAMBDA * ALPHA
    a = (keep + low**2 * keep * (1 - keep)) ** -0.5
    b = -a * (1 - keep) * low
    for place in itertools.product(*map(range, x.shape)):
        if alpha:
            y[place] = a * (x[place] if mask[place] else low) + b
        else:
            y[place] = x[place] / keep if mask[place] else 0.0
    return y


def entropy(probabilities: Sequence[float]) -> float:
    """H(p) in nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def uncertainty(passes: Sequence[Sequence[float]]) -> tuple[list[float], list[float], float, float, float]:
    """From the probabilities of T passes for one example: mean, variance, entropy, expected entropy, mutual information."""
    count, classes = len(passes), range(len(passes[0]))
    mean = [sum(each[c] for each in passes) / count for c in classes]
    variance = [sum((each[c] - mean[c]) ** 2 for each in passes) / count for c in classes]
    expected = sum(entropy(each) for each in passes) / count
    return mean, variance, entropy(mean), expected, entropy(mean) - expected
