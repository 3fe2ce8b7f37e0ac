"""Means and squared deviations that are merged without the difference of large squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments"]


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of values seen; with a matrix of deviations, of their products, too.

    Source: T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance: Analysis and Recommendations",
    The American Statistician, 1983.
    """

    mean: Tensor
    deviations: Tensor
    count: int = 0

    def merge(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        """Take in the moments of other values: ``S ← S + S' + (m' − m)²·n·n'/(n + n')``."""
        total = self.count + count
        if count:
            shift = mean - self.mean
            square = torch.outer(shift, shift) if deviations.ndim > mean.ndim else shift.square()
            self.deviations = self.deviations + deviations + square * (self.count * count / total)
            self.mean = self.mean + shift * (count / total)
        self.count = total
