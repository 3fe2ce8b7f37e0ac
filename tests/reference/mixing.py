"""Mixup, CutMix and label smoothing, sample by sample and pixel by pixel, as their papers write them."""

from __future__ import annotations

import math


def mixed_up(x: list, shares: list[float], partners: list[int]) -> list:
    """Zhang et al. 2018, equation (1): x = λ x_i + (1 − λ) x_j, for each i with its j."""
    rows = []
    for i, j in enumerate(partners):
        rows.append([shares[i] * own + (1 - shares[i]) * other for own, other in zip(x[i], x[j], strict=True)])
    return rows


def box_of(height: int, width: int, share: float, row: int, column: int) -> tuple[int, int, int, int]:
    """Yun et al. 2019, equation (2): r_w = W √(1 − λ), r_h = H √(1 − λ) around a center, within the image."""
    tall, wide = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
    rows = [r for r in range(height) if row - tall // 2 <= r < row + (tall + 1) // 2]
    columns = [c for c in range(width) if column - wide // 2 <= c < column + (wide + 1) // 2]
    if not rows or not columns:
        return 0, 0, 0, 0
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def cut_mixed(images: list, boxes: list[tuple[int, int, int, int]], partners: list[int]) -> tuple[list, list[float]]:
    """Yun et al. 2019, equation (1): x = M ⊙ x_A + (1 − M) ⊙ x_B; and the share of pixels with M = 1."""
    mixed, shares = [], []
    for i, j in enumerate(partners):
        top, bottom, left, right = boxes[i]
        own, image = 0, []
        for r, line in enumerate(images[i]):
            image.append([])
            for c, pixel in enumerate(line):
                inside = top <= r < bottom and left <= c < right
                own += not inside
                image[-1].append(images[j][r][c] if inside else pixel)
        mixed.append(image)
        shares.append(own / (len(images[i]) * len(images[i][0])))
    return mixed, shares


def smoothed(label: int, classes: int, smoothing: float) -> list[float]:
    """Szegedy et al. 2016, section 7: q(k) = (1 − ε) δ(k, y) + ε/K."""
    return [(1 - smoothing) * (k == label) + smoothing / classes for k in range(classes)]


def cross_entropy(scores: list[list[float]], targets: list[list[float]], weights: list[float] | None = None) -> float:
    """Return − Σ_i Σ_k w_k q_ik log p_ik / Σ_i Σ_k w_k t_ik, where targets are pairs of q and t: smoothed, and as they were before."""
    total, norm = 0.0, 0.0
    for row, (smooth, hard) in zip(scores, targets, strict=True):
        log_sum = math.log(sum(math.exp(score) for score in row))
        for k, score in enumerate(row):
            weight = 1.0 if weights is None else weights[k]
            total -= weight * smooth[k] * (score - log_sum)
            norm += weight * hard[k]
    return total / norm
