"""Scales and shifts of new normalization layers, fitted so that their outputs have the mean and variance of the old ones', by channel.

Layers are fitted in the order in which they run, each within the network whose earlier layers are new and fitted already. The pass over
the data is cut off behind the layer in question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks._core.batch_statistics import Moments, pool_moments
from lightning_tricks._core.surgery import replace_module
from lightning_tricks.normalization._norm_reading import Kind, Norm, normalize, read_as

__all__ = ["Pair", "calibrate_norms"]


@dataclass(frozen=True)
class Pair:
    """A layer, what it computes, and the one in its place."""

    old: nn.Module
    norm: Norm
    new: nn.Module
    kind: Kind

    @property
    def exact(self) -> bool:
        """Whether the new layer evaluates as the old one did."""
        return self.norm.mean is not None and self.kind in {"batch", "sync", "ghost", "frozen"}


class _ReachedError(Exception):
    """The layer in question has run."""


def calibrate_norms(model: nn.Module, pairs: Mapping[str, Pair], batches: Sequence[Any], forward: Callable[[Any], Any]) -> dict[str, str]:
    """Fit new layers to old ones over some batches, and return why others were not fitted, by name."""
    unfitted = {name: "it computes what the old layer did, and needs no calibration" for name, pair in pairs.items() if pair.exact}
    unfitted |= {name: "it has no scale and shift to fit" for name, pair in pairs.items() if _scale(pair.new) is None}
    fitted = {name: pair for name, pair in pairs.items() if name not in unfitted}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _evaluating(model):  # compiled code has no hooks
        goals, calls = _measure_old(model, fitted, batches, forward)
        for name in goals:
            _fit(fitted[name], goals[name], batches, forward, calls[name])
    return unfitted | {name: "the pass did not reach it" for name in fitted if name not in goals}


def _scale(new: nn.Module) -> Tensor | None:
    weight: Tensor | None = getattr(new, "weight", None)
    return weight


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _measure_old(
    model: nn.Module, pairs: Mapping[str, Pair], batches: Sequence[Any], forward: Callable[[Any], Any]
) -> tuple[dict[str, Moments], dict[str, int]]:
    """Return the moments of what the old layers give, in the order in which they run, and how often each does for a batch."""
    goals: dict[str, Moments] = {}
    calls: Counter[str] = Counter()

    def note(name: str, norm: Norm, x: Tensor) -> None:
        calls[name] += 1
        goals.setdefault(name, Moments.of(norm.channels, x.device)).add(norm.affine(normalize(norm, x)))

    norms = {}
    for name, pair in pairs.items():
        like = _scale(pair.new)
        assert like is not None
        pair.old.to(like)  # the model may have moved since the swap
        norms[name] = read_as(pair.old, pair.norm.kind, last=pair.norm.last)
        replace_module(model, pair.new, pair.old)
    handles = [_watch(pairs[name].old, norm, partial(note, name, norm)) for name, norm in norms.items()]
    try:
        for batch in batches:
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
        for pair in pairs.values():
            replace_module(model, pair.old, pair.new)
    pool_moments(list(goals.values()), len(batches))
    return goals, {name: count // len(batches) for name, count in calls.items()}


def _watch(module: nn.Module, norm: Norm, note: Callable[[Tensor], None]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        note(x.movedim(-1, 1) if norm.last else x)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _fit(pair: Pair, goal: Moments, batches: Sequence[Any], forward: Callable[[Any], Any], calls: int) -> None:
    """Fit one layer: ``w' = ± σ(y)/σ(z)``, ``b' = μ(y) − w' μ(z)``, where z is normalized and y what the old layer gave."""
    new: Any = pair.new
    reading = read_as(new, pair.kind, last=pair.norm.last)
    own_statistics = getattr(new, "running_mean", None) is not None
    found, left = Moments.of(reading.channels, goal.mean.device), [calls]

    def note(x: Tensor) -> None:
        found.add(x if own_statistics else normalize(reading, x))
        left[0] -= 1
        if left[0] == 0:
            raise _ReachedError

    handle = _watch(new, reading, note)
    try:
        for batch in batches:
            left[0] = calls
            with suppress(_ReachedError):
                forward(batch)
    finally:
        handle.remove()
    pool_moments([found], len(batches))
    mean, variance = found.mean, found.variance
    if own_statistics:
        new.running_mean.copy_(mean)
        new.running_var.copy_(variance)
        mean, variance = torch.zeros_like(mean), variance / (variance + reading.eps)
    sign = torch.where(new.weight < 0, -1.0, 1.0).to(mean)
    weight = torch.where(variance > 0, sign * (goal.variance / variance).sqrt(), new.weight.to(mean))
    new.weight.copy_(weight)
    if getattr(new, "bias", None) is not None:
        new.bias.copy_(goal.mean - weight * mean)
