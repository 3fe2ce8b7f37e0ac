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
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_tricks._core.checks import check_count

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _Parts(NamedTuple):
    """How N samples in order make up K ghost batches, of equal sizes or sizes that differ by one.

    Attributes:
        of: The ghost batch of each sample, of shape ``(N,)``.
        members: The samples of each ghost batch, of shape ``(K, most)``; the smaller ones repeat a sample.
        shares: The share of each member in its ghost batch, of shape ``(K, most, 1)``; of repetitions, zero.
        sizes: The number of samples in each ghost batch, of shape ``(K, 1)``.
    """

    of: Tensor
    members: Tensor
    shares: Tensor
    sizes: Tensor

    @classmethod
    def make(cls, samples: int, count: int, like: Tensor) -> _Parts:
        """Let sample i belong to ghost batch ``⌊i·K/N⌋``."""
        of = torch.arange(samples, device=like.device) * count // samples
        starts = (torch.arange(count + 1, device=like.device) * samples + count - 1) // count
        members = starts[:-1, None] + torch.arange((samples + count - 1) // count, device=like.device)
        sizes = starts.diff()[:, None].to(like.dtype)
        shares = (members < starts[1:, None]) / sizes
        return cls(of, members.clamp(max=samples - 1), shares[..., None], sizes)

    def pool(self, values: Tensor) -> Tensor:
        """Average values of shape ``(N, C)`` over each ghost batch, to ``(K, C)``."""
        return (values[self.members] * self.shares).sum(1)


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, parts: _Parts, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize ``(N, C, L)`` by the mean and variance of each ghost batch, and return both too, of shape ``(K, C)``."""
    values = x.to(weight.dtype)
    mean = parts.pool(values.mean(2))
    centred = values - mean[parts.of, :, None]
    variance = parts.pool(centred.square().mean(2))
    scale = (variance + eps).rsqrt() * weight
    return (centred * scale[parts.of, :, None] + bias[:, None]).to(x.dtype), mean, variance


class _Normalize(torch.autograd.Function):
    """The same as `_normalize`, in fewer passes over memory.

    The moments of each sample's channels are taken first, and those of a ghost batch follow from them. Where a sample's channels lie in
    rows, each row is a channel to the kernels of plain batch normalization: those compute the moments, apply what was pooled, and
    compute the sums that the gradients need.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, parts: _Parts, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        samples, channels, length = x.shape
        if not _lies_in_rows(x):
            values = x.to(weight.dtype)
            mean = parts.pool(values.mean(2))
            out = values - mean[parts.of, :, None]
            variance = parts.pool(out.square().mean(2))
            scale = (variance + eps).rsqrt() * weight
            return out.mul_(scale[parts.of, :, None]).add_(bias[:, None]).to(x.dtype), mean, variance
        rows = x.view(1, samples * channels, length)
        precise, as_well = weight.new_zeros(2, samples * channels)  # in whose precision moments are returned
        moments = torch.batch_norm_update_stats(rows, precise, as_well, 0.0)
        means, variances = (moment.view(samples, channels) for moment in moments)
        mean = parts.pool(means)
        variance = parts.pool(variances + (means - mean[parts.of]).square())
        of_rows = mean[parts.of].view(-1), variance[parts.of].view(-1)
        return batch_norm(rows, *of_rows, weight.repeat(samples), bias.repeat(samples), False, 0.0, eps).view_as(x), mean, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, ctx.parts, ctx.eps = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(x, weight, bias, mean, variance)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance = ctx.saved_tensors
        parts, eps, dy = ctx.parts, ctx.eps, gradients[0]
        if torch.is_grad_enabled():  # somebody will differentiate again
            y, _, _ = _normalize(x, weight, bias, parts, eps)
            return *torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True), None, None
        samples, channels, length = x.shape
        inverse = (variance + eps).rsqrt()
        scale = (inverse * weight)[parts.of, :, None]
        if _lies_in_rows(x):
            applied = [each.reshape(-1) for each in (weight.repeat(samples), mean[parts.of], variance[parts.of])]
            rows = [each.reshape(1, samples * channels, length).contiguous() for each in (dy, x)]
            dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(*rows, *applied, None, None, False, eps, [True] * 3)
            dx, d_weight, d_bias = dx.view_as(x), d_weight.view(samples, channels), d_bias.view(samples, channels)
            by_x = -scale * (parts.pool(d_weight) / length * inverse)[parts.of, :, None]
            constant = -scale * (parts.pool(d_bias) / length)[parts.of, :, None] - by_x * mean[parts.of, :, None]
            dx.addcmul_(x, by_x.to(x.dtype)).add_(constant)
        else:
            dy = dy.to(weight.dtype)
            dx = x.to(weight.dtype) - mean[parts.of, :, None]
            dx.mul_(inverse[parts.of, :, None])
            d_weight, d_bias = (dy * dx).sum(2), dy.sum(2)
            dx.mul_(-(parts.pool(d_weight) / length)[parts.of, :, None]).sub_((parts.pool(d_bias) / length)[parts.of, :, None])
            dx = dx.add_(dy).mul_(scale).to(x.dtype)
        return dx, d_weight.sum(0), d_bias.sum(0), None, None


def _lies_in_rows(x: Tensor) -> bool:
    return x.is_contiguous() and x.shape[2] > 1


class _GhostBatchNorm(_BatchNorm):
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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.ghost_size = check_count("ghost_size", ghost_size)

    @override
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        count = self._count(input) if self.training or self.running_mean is None else 1
        if count == 1:
            return super().forward(input)
        x = input.flatten(2) if input.ndim > 2 else input.unsqueeze(2)
        like = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
        weight = like.new_ones(x.shape[1]) if self.weight is None else self.weight.to(like.dtype)
        bias = like.new_zeros(x.shape[1]) if self.bias is None else self.bias.to(like.dtype)
        normalize = _normalize if torch.compiler.is_compiling() else _Normalize.apply
        parts = _Parts.make(len(x), count, like)
        y, mean, variance = normalize(x, weight, bias, parts, self.eps)
        if self.training and self.track_running_stats:
            self._track(parts, mean.detach(), variance.detach(), x.shape[2])
        return y.view_as(input)

    def _count(self, x: Tensor) -> int:
        """Return the number of ghost batches, such that each has at least two values per channel."""
        most = len(x) if x[0, 0].numel() > 1 else len(x) // 2
        return max(1, min(-(-len(x) // self.ghost_size), most))

    @torch.no_grad()
    def _track(self, parts: _Parts, mean: Tensor, variance: Tensor, length: int) -> None:
        """Move the statistics once per batch: towards its mean, and the variance within its ghost batches without bias."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        values = parts.sizes * length
        mean = (mean * values).sum(0) / values.sum()
        variance = (variance * values).sum(0) / (values - 1).sum()
        share: Tensor | float = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.copy_(torch.lerp(self.running_mean.to(mean.dtype), mean, share))
        self.running_var.copy_(torch.lerp(self.running_var.to(mean.dtype), variance, share))

    @override
    def extra_repr(self) -> str:
        features, _, rest = super().extra_repr().partition(", ")  # type: ignore[no-untyped-call]
        return f"{features}, ghost_size={self.ghost_size}, {rest}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Normalize."""


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """Normalize."""


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """Normalize."""
