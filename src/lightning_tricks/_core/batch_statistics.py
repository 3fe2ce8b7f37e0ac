"""Mean and variance of what reaches BatchNorm layers, measured in a pass over data that leaves the model as it was."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from lightning_tricks._core.lightning import LightningModule, Trainer, rank_zero_info
from lightning_tricks._core.loaders import evaluate_batch, training_pass
from lightning_tricks._core.moments import Moments as _Moments
from lightning_tricks._core.strategies import return_to_shards
from lightning_tricks.errors import ArgumentError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "Moments",
    "call_model",
    "measure_in_training",
    "measure_statistics",
    "normalizing_by_batch",
    "pool_moments",
    "write_statistics",
]

_PIECE = 1 << 22  # values converted to float64 at once
_PATIENCE = 30.0  # seconds between reports of progress


class Moments(_Moments):
    """Count, mean and sum of squared deviations of values seen, per channel, in float64."""

    @classmethod
    def of(cls, channels: int, device: torch.device) -> Moments:
        """Return those of nothing."""
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        mean, deviations = torch.zeros(2, channels, dtype=torch.float64, device=device)
        return cls(mean, deviations)

    def add(self, values: Tensor) -> None:
        """Take in values of shape ``(N, C, *)``."""
        values = values.detach()
        for piece in torch.split(values, max(1, _PIECE * len(values) // max(1, values.numel()))):
            count = piece.numel() // piece.shape[1]
            dims = [dim for dim in range(piece.ndim) if dim != 1]
            variance, mean = torch.var_mean(piece.to(self.mean.device).double(), dim=dims, correction=0)
            self.merge(count, mean, variance * count)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance, which is what running variances estimate."""
        return self.deviations / (self.count - 1)


def measure_statistics(
    model: nn.Module, norms: Mapping[str, _BatchNorm], batches: Iterator[Any], forward: Callable[[Any], Any]
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Return mean and variance of the inputs of each layer that was reached, and the number of batches. The model is as before."""
    moments, used, reported = {name: _of_nothing(norm) for name, norm in norms.items()}, 0, time.monotonic()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _recording(model, norms, moments):  # compiled code has no hooks
            for batch in batches:
                forward(batch)
                used += 1
                if time.monotonic() - reported > _PATIENCE:
                    reported = time.monotonic()
                    rank_zero_info(f"BatchNorm statistics: {used} batches measured.")
    finally:
        return_to_shards(model)
    used = pool_moments(list(moments.values()), used)
    if not used:
        msg = "BatchNorm statistics need at least one batch, and the loader gave none. Give a loader that can be iterated anew."
        raise ArgumentError(msg)
    reached = {name: (each.mean, each.variance) for name, each in moments.items() if each.count > 1}
    if not reached:
        msg = (
            f"The pass over {used} batches must reach BatchNorm layers, and reached none of {', '.join(map(repr, list(norms)[:3]))}. "
            "Define `predict_step`, or give `forward`, so that it calls the layers as evaluation does."
        )
        raise TrickError(msg)
    return reached, used


def measure_in_training(
    trainer: Trainer, module: LightningModule, norms: Mapping[str, _BatchNorm], batches: int | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Do what `measure_statistics` does, over this many training batches of each rank, or all of an epoch."""
    index = count()
    with training_pass(trainer, batches) as given:
        return measure_statistics(module, norms, given, lambda batch: evaluate_batch(trainer, module, batch, next(index)))


def write_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Let a layer evaluate with this mean and variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def _of_nothing(norm: _BatchNorm) -> Moments:
    assert norm.running_mean is not None
    return Moments.of(norm.num_features, norm.running_mean.device)


@contextmanager
def _recording(model: nn.Module, norms: Mapping[str, _BatchNorm], moments: Mapping[str, Moments]) -> Iterator[None]:
    """Let these layers normalize by their batch and note their inputs, while everything else evaluates."""

    def note(name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values: Tensor = args[0] if args else kwargs["input"]
        if values.numel() <= values.shape[1] and not isinstance(norm, nn.SyncBatchNorm):
            msg = (
                f"Each batch must have more than one value per channel to be normalized by, and {name!r} got the shape "
                f"{tuple(values.shape)}. Use larger batches, or `drop_last=True`."
            )
            raise ArgumentError(msg)
        moments[name].add(values)

    handles = [norm.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, norm in norms.items()]
    try:
        with normalizing_by_batch(model, norms.values()):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def normalizing_by_batch(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let these layers normalize by their batch, while everything else evaluates; the model is as before afterwards."""
    norms = list(norms)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    kept = [buffer.clone() for buffer in buffers]
    tracking = [(norm, norm.track_running_stats) for norm in norms]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, tracks in tracking:
            norm.track_running_stats = tracks
        for buffer, value in zip(buffers, kept, strict=True):  # which a subclass may have written to all the same
            buffer.copy_(value)


def pool_moments(moments: list[Moments], used: int) -> int:
    """Merge the moments of all ranks, in the same order on each, and return the number of batches of all."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return used
    own = [torch.cat([each.mean.new_tensor([used, each.count]), each.mean, each.deviations]) for each in moments]
    sizes, flat = [len(part) for part in own], torch.cat(own)
    everyone = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, flat)
    for each in moments:
        each.mean, each.deviations, each.count = torch.zeros_like(each.mean), torch.zeros_like(each.deviations), 0
    for rank in everyone:
        for each, part in zip(moments, torch.split(rank, sizes), strict=True):
            mean, deviations = part[2:].chunk(2)
            each.merge(int(part[1].item()), mean, deviations)
    return int(sum(rank[0].item() for rank in everyone))


def call_model(model: nn.Module, batch: Any) -> None:
    """Call a model with a batch, or with its first element if it is a tuple or a list, on the model's device."""
    values = batch[0] if isinstance(batch, tuple | list) else batch
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    model(values.to(device) if isinstance(values, Tensor) else values)
