"""Ghost batch normalization: normalize parts of a large batch, each by its own mean and variance.

The noise of small batches regularizes, and large batches lose it. Ghost batches bring it back: the batch is split into parts of the size
that worked before, and each part is normalized by itself. Evaluation uses running statistics, as BatchNorm does.

Source: E. Hoffer, I. Hubara and D. Soudry, "Train longer, generalize better: closing the generalization gap in large batch training of
neural networks", NeurIPS, 2017.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from typing_extensions import override

from lightning_tricks._core.checks import check_count
from lightning_tricks.normalization._tracking import TrackingBatchNorm

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _Split(NamedTuple):
    """N samples, in order, as K ghost batches whose sizes are equal or differ by one, the larger ones first.

    Attributes:
        larger: The number of ghost batches that have one sample more than the others.
        others: The number of the others.
        size: The number of samples of each of the others.
    """

    larger: int
    others: int
    size: int

    @classmethod
    def make(cls, samples: int, count: int) -> _Split:
        """Make so many ghost batches of so many samples."""
        larger = samples % count
        return cls(larger, count - larger, samples // count)

    def evenly(self, samples: Tensor) -> list[tuple[Tensor, int]]:
        """Return samples that make up ghost batches of one size, and the number of those."""
        if not self.larger:
            return [(samples, self.others)]
        cut = self.larger * (self.size + 1)
        return [(samples[:cut], self.larger), (samples[cut:], self.others)]

    def pool(self, values: Tensor) -> Tensor:
        """Average values of shape ``(N, C)`` over each ghost batch, to ``(K, C)``."""
        return _join([part.view(count, -1, part.shape[1]).mean(1) for part, count in self.evenly(values)])

    def spread(self, values: Tensor) -> Tensor:
        """Give each sample the values of its ghost batch, ``(K, C)`` to ``(N, C)``."""
        spread = [values[: self.larger].repeat_interleave(self.size + 1, 0)] if self.larger else []
        return _join([*spread, values[self.larger :].repeat_interleave(self.size, 0)])


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, split: _Split, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize ``(N, C, *)``, and return the mean and variance of each ghost batch too, of shape ``(K, C)``.

    Ghost batches of one size lie side by side as further channels of plain batch normalization.
    """
    rows = x.is_contiguous()
    samples = x.reshape(*x.shape[:2], -1)
    samples = samples if rows else samples.transpose(1, 2)
    parts = [_normalize_evenly(part, weight, bias, count, eps, rows=rows) for part, count in split.evenly(samples)]
    y, mean, variance = (_join(list(each)) for each in zip(*parts, strict=True))
    return (y if rows else y.transpose(1, 2)).view(x.shape), mean, variance


def _normalize_evenly(x: Tensor, weight: Tensor, bias: Tensor, count: int, eps: float, *, rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize ghost batches of one size, with samples of shape ``(C, L)`` if in rows, else ``(L, C)``."""
    samples, channels = len(x), len(weight)
    values = x[:, 0].numel() // count if rows else x[..., 0].numel() // count
    beside = x.reshape(count, samples // count if rows else values, *x.shape[1 if rows else 2 :]).transpose(0, 1)
    mean, variance = weight.new_zeros(2, count * channels)
    y = batch_norm(beside.flatten(1, 2), mean, variance, weight.repeat(count), bias.repeat(count), True, 1.0, eps)
    y = y.view(beside.shape).transpose(0, 1).reshape(x.shape)
    return y, mean.view(count, channels), variance.view(count, channels) * ((values - 1) / values)


class _NormalizeRows(torch.autograd.Function):
    """The same as `_normalize` for contiguous tensors, in place of whose copies there are two more passes over memory.

    Each row of a sample's channel is a channel to the kernels of plain batch normalization: those take its moments, from which those of
    a ghost batch follow, apply what was pooled, and take the sums that the gradients need.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, split: _Split, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        samples, channels = x.shape[:2]
        rows = x.view(1, samples * channels, -1)
        precise, as_well = weight.new_zeros(2, samples * channels)  # in whose precision moments are returned
        means, variances = (each.view(samples, channels) for each in torch.batch_norm_update_stats(rows, precise, as_well, 0.0))
        mean = split.pool(means)
        mean_of_rows = split.spread(mean)
        variance = split.pool(variances + (means - mean_of_rows).square())
        applied = mean_of_rows.view(-1), split.spread(variance).view(-1)
        y = batch_norm(rows, *applied, weight.repeat(samples), bias.repeat(samples), False, 0.0, eps)
        return y.resize_(x.shape), mean, variance  # a view could not be changed in place by an activation behind

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, ctx.split, ctx.eps = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(x, weight, bias, mean, variance)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance = ctx.saved_tensors
        split, eps, dy = ctx.split, ctx.eps, gradients[0]
        if torch.is_grad_enabled():  # somebody will differentiate again
            y, _, _ = _normalize(x, weight, bias, split, eps)
            return *torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True), None, None
        samples, channels = x.shape[:2]
        rows = x.view(1, samples * channels, -1)
        length = rows.shape[2]
        applied = weight.repeat(samples), split.spread(mean).view(-1), split.spread(variance).view(-1)
        partial, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(  # as if mean and variance were constants
            dy.reshape(rows.shape).contiguous(), rows, *applied, None, None, False, eps, [True] * 3
        )
        d_weight, d_bias = d_weight.view(samples, channels), d_bias.view(samples, channels)
        inverse = (variance + eps).rsqrt()
        by_x = -weight * inverse.square() * split.pool(d_weight) / length
        constant = -weight * inverse * split.pool(d_bias) / length - by_x * mean
        dx = partial.addcmul_(rows, split.spread(by_x).view(-1, 1).to(x.dtype)).add_(split.spread(constant).view(-1, 1))
        return dx.view_as(x), d_weight.sum(0), d_bias.sum(0), None, None


class _GhostBatchNorm(TrackingBatchNorm):
    """What the layers of all dimensions share."""

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )
        self.ghost_size = check_count("ghost_size", ghost_size)

    @override
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        count = self._count(input) if self.training or self.running_mean is None else 1
        if count == 1:
            return super().forward(input)
        precision = torch.promote_types(input.dtype, torch.float32)
        weight = torch.ones(self.num_features, dtype=precision, device=input.device) if self.weight is None else self.weight.to(precision)
        bias = torch.zeros_like(weight) if self.bias is None else self.bias.to(precision)
        length = input[0, 0].numel()
        in_rows = input.is_contiguous() and length > 1 and not torch.compiler.is_compiling()
        split = _Split.make(len(input), count)
        y: Tensor
        y, mean, variance = (_NormalizeRows.apply if in_rows else _normalize)(input, weight, bias, split, self.eps)
        if self.training and self.track_running_stats:
            self._track(split, mean, variance, length)
        return y

    def _count(self, x: Tensor) -> int:
        """Return the number of ghost batches, such that each has at least two values per channel."""
        most = len(x) if x[0, 0].numel() > 1 else len(x) // 2
        return max(1, min(-(-len(x) // self.ghost_size), most))

    @torch.no_grad()
    def _track(self, split: _Split, mean: Tensor, variance: Tensor, length: int) -> None:
        """Move the statistics once per batch: towards its mean, and the variance within its ghost batches without bias."""
        values = ((torch.arange(len(mean), device=mean.device) < split.larger) + split.size)[:, None] * length
        mean = (mean * values).sum(0) / values.sum()
        variance = (variance * values).sum(0) / (values - 1).sum()
        self._move(mean, variance)

    @override
    def extra_repr(self) -> str:
        return self._representation(f"ghost_size={self.ghost_size}")


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Normalize each ghost batch of features or sequences by its own mean and variance: ``y = (x − m_k) / √(v_k + ε) · γ + β``.

    A batch of N samples, in order, is split into ``K = ⌈N / ghost_size⌉`` ghost batches whose sizes are equal or differ by one. Evaluation
    computes as ``nn.BatchNorm1d``. Reach for it when batches grow larger than those that a network generalized well with.

    Args:
        num_features: The number of channels C, at least 1.
        ghost_size: The most samples that are normalized together, at least 1, with at least two values per channel.
        eps: Added to the variance, above 0 (ε).
        momentum: Share of a batch in the running statistics, in [0, 1]; None = the mean over all batches.
        affine: Whether there are a scale γ and a shift β for each channel.
        track_running_stats: Whether running statistics are kept for evaluation, which otherwise computes as training does.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C) or (N, C, L)
        - Output: as the input

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        It is a ``nn.BatchNorm1d`` with the same keys, and computes the same where a batch is one ghost batch. A batch moves the running
        statistics once, by `momentum`, towards its mean and the unbiased variance within its ghost batches. Under DDP each
        process splits what it has. ``SyncBatchNorm.convert_sync_batchnorm`` would replace it. Contiguous tensors take about as long as in
        plain batch normalization; with the channels last, ghost batches are copied side by side.

    References:
        - E. Hoffer, I. Hubara and D. Soudry, "Train longer, generalize better", NeurIPS, 2017. Differs from it in the running statistics,
          to which it lets each ghost batch contribute in turn.

    Example:
        >>> norm = GhostBatchNorm1d(1, 2)
        >>> [round(value, 3) for value in norm(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).flatten().tolist()]
        [-1.0, 1.0, -1.0, 1.0]
    """


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """Normalize each ghost batch of images by its own mean and variance: ``y = (x − m_k) / √(v_k + ε) · γ + β``.

    A batch of N samples, in order, is split into ``K = ⌈N / ghost_size⌉`` ghost batches whose sizes are equal or differ by one. Evaluation
    computes as ``nn.BatchNorm2d``. Reach for it when batches grow larger than those that a network generalized well with.

    Args:
        num_features: The number of channels C, at least 1.
        ghost_size: The most samples that are normalized together, at least 1, with at least two values per channel.
        eps: Added to the variance, above 0 (ε).
        momentum: Share of a batch in the running statistics, in [0, 1]; None = the mean over all batches.
        affine: Whether there are a scale γ and a shift β for each channel.
        track_running_stats: Whether running statistics are kept for evaluation, which otherwise computes as training does.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, H, W)
        - Output: as the input

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        It is a ``nn.BatchNorm2d`` with the same keys, and computes the same where a batch is one ghost batch. A batch moves the running
        statistics once, by `momentum`, towards its mean and the unbiased variance within its ghost batches. Under DDP each
        process splits what it has. ``SyncBatchNorm.convert_sync_batchnorm`` would replace it. Contiguous tensors take about as long as in
        plain batch normalization; with the channels last, ghost batches are copied side by side.

    References:
        - E. Hoffer, I. Hubara and D. Soudry, "Train longer, generalize better", NeurIPS, 2017. Differs from it in the running statistics,
          to which it lets each ghost batch contribute in turn.

    Example:
        >>> norm = GhostBatchNorm2d(8, 16)
        >>> norm(torch.randn(40, 8, 4, 4)).shape
        torch.Size([40, 8, 4, 4])
        >>> norm
        GhostBatchNorm2d(8, ghost_size=16, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    """


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """Normalize each ghost batch of volumes by its own mean and variance: ``y = (x − m_k) / √(v_k + ε) · γ + β``.

    A batch of N samples, in order, is split into ``K = ⌈N / ghost_size⌉`` ghost batches whose sizes are equal or differ by one. Evaluation
    computes as ``nn.BatchNorm3d``. Reach for it when batches grow larger than those that a network generalized well with.

    Args:
        num_features: The number of channels C, at least 1.
        ghost_size: The most samples that are normalized together, at least 1, with at least two values per channel.
        eps: Added to the variance, above 0 (ε).
        momentum: Share of a batch in the running statistics, in [0, 1]; None = the mean over all batches.
        affine: Whether there are a scale γ and a shift β for each channel.
        track_running_stats: Whether running statistics are kept for evaluation, which otherwise computes as training does.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        - Input: (N, C, D, H, W)
        - Output: as the input

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        It is a ``nn.BatchNorm3d`` with the same keys, and computes the same where a batch is one ghost batch. A batch moves the running
        statistics once, by `momentum`, towards its mean and the unbiased variance within its ghost batches. Under DDP each
        process splits what it has. ``SyncBatchNorm.convert_sync_batchnorm`` would replace it. Contiguous tensors take about as long as in
        plain batch normalization; with the channels last, ghost batches are copied side by side.

    References:
        - E. Hoffer, I. Hubara and D. Soudry, "Train longer, generalize better", NeurIPS, 2017. Differs from it in the running statistics,
          to which it lets each ghost batch contribute in turn.

    Example:
        >>> norm = GhostBatchNorm3d(8, 2)
        >>> norm(torch.randn(5, 8, 2, 4, 4)).shape
        torch.Size([5, 8, 2, 4, 4])
    """
