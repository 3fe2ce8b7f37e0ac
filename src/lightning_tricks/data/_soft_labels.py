"""What mixed and smoothed labels come to in a loss: probabilities of classes, and the cross-entropy with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import Signature, signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # as torch's own documentation calls it

__all__ = ["CLASS_LOSSES", "arguments_of", "class_loss", "soft_rows", "weighed"]

CLASS_LOSSES: tuple[Callable[..., Any], ...] = (F.cross_entropy, F.nll_loss)


@cache
def _signature(func: Callable[..., Any]) -> Signature:
    return signature(func)


def arguments_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def weighed(branches: Sequence[Tensor], share: float | Tensor | None) -> Tensor:
    """Return ``λ a + (1 − λ) b``, or what there is alone."""
    if len(branches) == 1:
        return branches[0]
    assert share is not None
    return branches[0] * share + branches[1] * (1 - share)


def soft_rows(rows: Sequence[Tensor], share: float | Tensor | None, *, smoothing: float, dim: int) -> Tensor:
    """Mix encodings of classes, and let the classes along a dimension share what is taken from them."""
    soft = weighed([row.to(torch.get_default_dtype()) for row in rows], share)
    return torch.lerp(soft, soft.mean(dim, keepdim=True).expand_as(soft), smoothing) if smoothing else soft


def class_loss(
    func: Callable[..., Any],
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    share: float | Tensor | None,
    *,
    smoothing: float,
    weights: Sequence[Tensor | None],
    options: Mapping[str, Any],
) -> list[Tensor]:
    """Compute the cross-entropy with mixed and smoothed probabilities of classes.

    A mean is one over the weights of classes, which are mixed, too: of ignored labels, the weight is zero.

    Args:
        func: One of `CLASS_LOSSES`.
        scores: Its input, for each of the labels.
        labels: Indices of classes, one or two for each element.
        share: λ of the first, of all elements or of each.
        smoothing: ε, which `nll_loss` has no argument for.
        weights: Those of classes, for each of the labels.
        options: The loss's further arguments.

    Returns:
        The loss, or those of each of two labels where they are not yet summed up, which may be weighed with shares of the batch later.
    """
    options = dict(options)
    reduction, ignored = options.pop("reduction"), options["ignore_index"]
    if len(labels) == 1 and func is F.cross_entropy:
        return [func(scores[0], labels[0], weight=weights[0], reduction=reduction, **options)]
    losses, totals = [], []
    for given, classes, weight in zip(scores, labels, weights, strict=True):
        known = classes != ignored
        each = func(given, classes, weight=weight, reduction="none", **options)
        if smoothing and func is F.nll_loss:
            each = torch.lerp(each, _uniform_loss(given, weight).where(known, 0.0), smoothing)
        losses.append(each)
        totals.append(known.to(each.dtype) if weight is None else weight[classes.where(known, 0)] * known)
    if reduction == "none" and not isinstance(share, Tensor):
        return losses
    loss = weighed(losses, share)
    if reduction == "mean":
        return [loss.sum() / weighed(totals, share).sum()]
    return [loss.sum() if reduction == "sum" else loss]


def _uniform_loss(scores: Tensor, weight: Tensor | None) -> Tensor:
    """Return the negative mean over classes of log-probabilities."""
    dim = 0 if scores.ndim == 1 else 1
    if weight is not None:
        scores = scores * weight.view(-1, *[1] * (scores.ndim - dim - 1))
    return -scores.mean(dim)
