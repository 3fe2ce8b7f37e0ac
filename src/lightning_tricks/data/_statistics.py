"""Mean and variance of data, or their covariance, in one pass over batches of any sizes, and the matrix that whitens them.

Each batch is reduced in float64 around the first value seen, and merged into what has been seen by its count, so that neither a large
mean nor many batches cost digits, and features that are constant have a variance of exactly zero.

Source: T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance: Analysis and Recommendations", The
American Statistician, 1983; A. J. Bell and T. J. Sejnowski, "The 'independent components' of natural scenes are edge filters", Vision
Research, 1997, for whitening by ZCA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from lightning_tricks._core.checks import check_bool, check_choice, check_count, check_dim, check_in_interval, check_item
from lightning_tricks._core.loaders import untouched
from lightning_tricks._core.moments import Moments
from lightning_tricks.data._batches import describe, find
from lightning_tricks.errors import ArgumentError

__all__ = [
    "Collector",
    "Per",
    "StandardizationStatistics",
    "Whitening",
    "standardization_statistics",
    "tensor_in",
    "whitening_matrix",
]

Per = Literal["channel", "feature"]
Whitening = Literal["zca", "pca"]

_PIECE = 1 << 22  # values converted to float64 at once


@dataclass(frozen=True)
class StandardizationStatistics:
    """Statistics of data, in float64 on the CPU.

    Attributes:
        mean: The mean of each channel or feature.
        variance: Their variances ``Σ(x − m)²/n``.
        count: Number n of values of each.
        per: ``"channel"`` or ``"feature"``.
        dim: The dimension of channels.
        covariance: The matrix ``Σ(x − m)(x − m)ᵀ/n`` over all channels or features in a row, if it was asked for.

    Example:
        >>> StandardizationStatistics(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 0.0]), count=10).std()
        tensor([2., 1.])
    """

    mean: Tensor
    variance: Tensor
    count: int
    per: Per = "channel"
    dim: int = 1
    covariance: Tensor | None = None

    def std(self, eps: float = 0.0) -> Tensor:
        """Return ``√(v + ε)``, and 1 where that is zero: what is constant is centered and not scaled."""
        std = (self.variance + eps).sqrt()
        return torch.where(std > 0, std, 1.0)


def standardization_statistics(
    loader: Iterable[Any],
    *,
    per: Per = "channel",
    dim: int = 1,
    batches: int | None = None,
    item: int | str | None = None,
    covariance: bool = False,
) -> StandardizationStatistics:
    """Measure mean and variance of the tensors that a loader gives, over all batches.

    With the n values x of a channel or feature, ``m = Σx/n`` and ``v = Σ(x − m)²/n``, in float64 whatever the batch sizes.

    Args:
        loader: Batches. It is iterated once; its state and the random state are then as before.
        per: ``"channel"``: one mean for each index of dimension `dim`, over all others. ``"feature"``: one for each element of a sample.
        dim: The dimension of channels, not 0, which is the batch; -1 for sequences of vectors, ``(N, L, D)``. Tensors of one dimension
            are one channel.
        batches: Number of batches to use; None = all.
        item: Index or key in a batch at which the tensor sits; None = the first tensor in it.
        covariance: Whether to measure the covariance of all channels or features, too, for whitening.

    Returns:
        The statistics: ``mean``, ``variance``, ``count``, and ``covariance`` or None.

    Raises:
        ArgumentError: If an argument lies outside its domain, the loader gives nothing, or what it gives is not finite, no
            floating-point tensor, or of varying shape.

    Note:
        Where ``torch.distributed`` is initialized, all ranks must call this together, each with its own part of the data.

    References:
        - T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance: Analysis and Recommendations", The
          American Statistician, 1983.

    Example:
        >>> statistics = standardization_statistics([torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([[4.0, 5.0]])])
        >>> statistics.mean, statistics.variance, statistics.std()
        (tensor([2., 5.], dtype=torch.float64), tensor([2.6667, 0.0000], dtype=torch.float64),
         tensor([1.6330, 1.0000], dtype=torch.float64))
    """
    check_choice("per", per, ("channel", "feature"))
    collector = Collector(per, check_dim("dim", dim, "channels"), covariance=check_bool("covariance", covariance))
    item, limit = check_item(item), None if batches is None else check_count("batches", batches)
    with torch.no_grad(), untouched([loader]):
        for batch in islice(iter(loader), limit):
            collector.add(tensor_in(batch, item))
    return collector.pooled()


def whitening_matrix(covariance: Tensor, *, mode: Whitening = "zca", eps: float = 0.0) -> Tensor:
    """Return the matrix W by which centered values get the covariance 1: ``cov(Wx) = W Σ Wᵀ = 1``.

    With ``Σ = U diag(λ) Uᵀ``, ``W = diag(1/√(λ + ε)) Uᵀ`` for ``"pca"``, the components from the largest λ to the smallest, and
    ``W = U diag(1/√(λ + ε)) Uᵀ`` for ``"zca"``, of all whitening matrices the one that changes values least.

    Args:
        covariance: The covariance Σ, symmetric, of shape ``(d, d)``.
        mode: ``"zca"`` or ``"pca"``.
        eps: ε, at least 0: what is added to each variance λ, so that directions of little variance are not blown up.

    Returns:
        W in float64. Directions in which λ + ε is zero up to rounding are kept at their scale.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - A. J. Bell and T. J. Sejnowski, "The 'independent components' of natural scenes are edge filters", Vision Research, 1997.

    Example:
        >>> whitening_matrix(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    if not isinstance(covariance, Tensor) or covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        found = f"one of shape {tuple(covariance.shape)}" if isinstance(covariance, Tensor) else repr(covariance)
        msg = f"`covariance` must be a square matrix, got {found}."
        raise ArgumentError(msg)
    check_choice("mode", mode, ("zca", "pca"))
    check_in_interval("eps", eps, "[0, ∞)")
    values, vectors = torch.linalg.eigh(covariance.detach().cpu().double())
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()  # of two opposite vectors, the same on every machine
    variances = values.clamp(min=0.0) + eps
    rounding = len(values) * torch.finfo(torch.float64).eps * variances[:1]
    factors = torch.where(variances > rounding, variances, 1.0).rsqrt()
    components = factors.unsqueeze(1) * vectors.T
    matrix: Tensor = components if mode == "pca" else vectors @ components
    return matrix


def tensor_in(batch: Any, item: int | str | None) -> Tensor:
    """Return the tensor at a place of a batch.

    Raises:
        ArgumentError: If there is no tensor of floating-point numbers.
    """
    found = find(batch, item)
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    msg = (
        f"What is standardized must be a tensor of floating-point numbers, and {describe(batch, item)}. Give its index or key by `item`, "
        "and convert it before the model's step."
    )
    raise ArgumentError(msg)


class Collector:
    """Takes in tensors and gives their statistics."""

    def __init__(self, per: Per, dim: int, *, covariance: bool) -> None:
        self.per, self.dim, self.covariance = per, dim, covariance
        self.shape: torch.Size | None = None  # of the mean
        self.origin = torch.zeros(())  # which is subtracted first
        self.moments = Moments(self.origin, self.origin)  # around it
        self.batches = 0

    def add(self, values: Tensor) -> None:
        """Take in a batch."""
        self.batches += 1
        values = values.detach().cpu() if values.device.type == "mps" else values.detach()  # MPS has no float64
        values, kept, shape = self._laid_out(values.unsqueeze(1) if values.ndim == 1 else values)
        if not values.numel():
            return
        if self.shape is None:
            self._begin(shape, values.movedim(kept, -1).reshape(-1, shape.numel())[0].double())
        if shape != self.shape:
            msg = (
                f"All batches must have the same {self.per}s, and one has {tuple(shape)} where the first has {tuple(self.shape or ())}. "
                "Pass `per='channel'`, with the channels' `dim`, for samples of varying shape."
            )
            raise ArgumentError(msg)
        for piece in torch.split(values, max(1, _PIECE * len(values) // values.numel())):
            count = piece.numel() // shape.numel()
            if self.covariance:
                rows = piece.movedim(kept, -1).reshape(count, -1).double() - self.origin
                mean = rows.mean(dim=0)
                rows -= mean
                self.moments.merge(count, mean, rows.T @ rows)
            else:
                axes, column = [axis for axis in range(piece.ndim) if axis != kept], (-1, *[1] * (piece.ndim - kept - 1))
                centered = piece.double() - self.origin.view(column)
                mean = centered.mean(dim=axes)
                centered -= mean.view(column)
                self.moments.merge(count, mean, centered.square_().sum(dim=axes))  # many times as fast as `torch.var_mean` is

    def _laid_out(self, values: Tensor) -> tuple[Tensor, int, torch.Size]:
        """Return values, the dimension whose indices have statistics of their own, and the shape of the mean."""
        if self.per == "feature":
            return values.reshape(len(values), -1), 1, values.shape[1:]
        kept = self.dim + values.ndim if self.dim < 0 else self.dim
        if not 0 < kept < values.ndim:
            msg = (
                f"Dimension `dim={self.dim}` must be there, and not be the batch, in tensors of shape {tuple(values.shape)}. Give another."
            )
            raise ArgumentError(msg)
        return values, kept, values.shape[kept : kept + 1]

    def _begin(self, shape: torch.Size, origin: Tensor) -> None:
        zeros = torch.zeros_like(origin)
        self.shape, self.origin = shape, origin
        self.moments = Moments(zeros, torch.outer(zeros, zeros) if self.covariance else zeros)

    def pooled(self) -> StandardizationStatistics:
        """Return the statistics of what all ranks have taken in.

        Raises:
            ArgumentError: If that is nothing, or not finite.
        """
        moments = self.moments
        own = (self.shape, (moments.count, (self.origin + moments.mean).cpu(), moments.deviations.cpu()), self.batches)
        everyone = [own]
        if distributed.is_available() and distributed.is_initialized():
            everyone = [own] * distributed.get_world_size()
            distributed.all_gather_object(everyone, own)
        parts = [part for part in everyone if part[0] is not None]
        if not parts or any(part[0] != parts[0][0] for part in parts):
            found = f"shapes {', '.join(str(tuple(part[0] or ())) for part in parts)} on the ranks" if parts else "no batch"
            msg = (
                f"Statistics need batches that have the same {self.per}s, and there were {found}. Give a loader that can be iterated anew."
            )
            raise ArgumentError(msg)
        (shape, (count, mean, deviations), _), *others = parts
        assert shape is not None
        total = Moments(mean, deviations, count)
        for _, other, _ in others:
            total.merge(*other)
        self.batches = sum(part[2] for part in everyone)
        if not (total.mean.isfinite().all() and total.deviations.isfinite().all()):
            wrong = int((~(total.mean.isfinite())).nonzero()[0]) if not total.mean.isfinite().all() else 0
            msg = f"Statistics need finite values, and {self.per} {wrong} has the mean {total.mean[wrong].item()}. Clean the data first."
            raise ArgumentError(msg)
        covariance = total.deviations / total.count if self.covariance else None
        variance = total.deviations / total.count if covariance is None else covariance.diagonal().clone()
        return StandardizationStatistics(total.mean.view(shape), variance.view(shape), total.count, self.per, self.dim, covariance)
