"""Predictions of several members put together, and how far they differ, one number at a time."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def softmax(logits: Sequence[float]) -> list[float]:
    """Return exp(z_c) / Σ_k exp(z_k)."""
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each entry over the members."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def mean_probabilities(logits: Sequence[Sequence[float]]) -> list[float]:
    """Return p = 1/M Σ_m softmax(z_m), for one sample."""
    return mean_of([softmax(member) for member in logits])


def votes(logits: Sequence[Sequence[float]]) -> list[float]:
    """Return (v_c + p_c)/(M + 1), where v_c counts the members whose largest logit is that of class c."""
    counted = Counter(max(range(len(member)), key=member.__getitem__) for member in logits)
    return [(counted[c] + p) / (len(logits) + 1) for c, p in enumerate(mean_probabilities(logits))]


def entropy(probabilities: Sequence[float]) -> float:
    """Return −Σ_c p_c ln p_c, in which classes without probability count nothing."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def uncertainty(logits: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the entropy of the mean, the mean of the entropies, and their difference."""
    total = entropy(mean_probabilities(logits))
    aleatoric = sum(entropy(softmax(member)) for member in logits) / len(logits)
    return total, aleatoric, total - aleatoric


def disagreement(logits: Sequence[Sequence[float]]) -> float:
    """Return the share of pairs of members whose largest logits are those of different classes."""
    chosen = [max(range(len(member)), key=member.__getitem__) for member in logits]
    pairs = [(one, other) for i, one in enumerate(chosen) for other in chosen[:i]]
    return sum(one != other for one, other in pairs) / len(pairs) if pairs else 0.0


def diversity(logits: Sequence[Sequence[float]]) -> float:
    """Return 1/M Σ_m Σ_c (p_mc − p_c)²."""
    mean = mean_probabilities(logits)
    return sum(sum((q - p) ** 2 for q, p in zip(softmax(member), mean, strict=True)) for member in logits) / len(logits)


def brier_score(probabilities: Sequence[float], target: int) -> float:
    """Return Σ_c (p_c − 1[c = target])²."""
    return sum((p - (c == target)) ** 2 for c, p in enumerate(probabilities))


def calibration_error(samples: Sequence[Sequence[float]], targets: Sequence[int], bins: int) -> float:
    """Return Σ_b n_b/N |accuracy_b − confidence_b| over bins of equal width."""
    filled: dict[int, list[tuple[float, bool]]] = {}
    for probabilities, target in zip(samples, targets, strict=True):
        confidence = max(probabilities)
        filled.setdefault(min(math.floor(confidence * bins), bins - 1), []).append((confidence, probabilities.index(confidence) == target))
    gaps = [abs(sum(hit for _, hit in found) - sum(confidence for confidence, _ in found)) for found in filled.values()]
    return sum(gaps) / len(samples)


def geometric_rate(i: int, c: int, high: float, low: float) -> float:
    """Return α(i) of iteration i = 1, 2, … as Garipov et al. (2018) write it."""
    t = ((i - 1) % c + 1) / c
    if 0 < t <= 1 / 2:
        return (1 - 2 * t) * high + 2 * t * low
    return (2 - 2 * t) * low + (2 * t - 1) * high


def geometric_members(steps: int, c: int) -> list[int]:
    """Return the iterations after which t(i) = 1/2."""
    return [i for i in range(1, steps + 1) if i % c == c // 2]


def best_candidates(scores: Sequence[float], k: int, mode: str) -> list[int]:
    """Return which of the candidates seen one after another are the k best at the end; a later one must be better to take a place."""
    kept: list[int] = []
    for candidate, score in enumerate(scores):
        kept += [] if math.isnan(score) else [candidate]
        if len(kept) > k:
            worst = max if mode == "min" else min
            limit = worst(scores[i] for i in kept)
            kept.remove(candidate if score == limit else next(i for i in kept if scores[i] == limit))
    return kept
