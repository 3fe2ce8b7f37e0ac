"""Variances of layers' outputs on real data, and weights scaled until these are one (LSUV).

Source: D. Mishkin and J. Matas, "All you need is a good init", ICLR, 2016.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_tricks._core.batch_statistics import normalizing_by_batch
from lightning_tricks._core.lightning import isolate_rng
from lightning_tricks.errors import TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["output_variances", "scale_to_unit_variance"]


class _Seen(Exception):  # noqa: N818  # no error: it ends a forward pass that has shown enough
    """Raised within a forward pass, after the layer in question."""


class _Spread:
    """Count, mean and sum of squared deviations of values, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.deviations = 0.0, 0.0, 0.0

    def merge(self, count: float, mean: float, deviations: float) -> None:
        total = self.count + count
        if count:
            shift = mean - self.mean
            self.deviations += deviations + shift**2 * self.count * count / total
            self.mean += shift * count / total
        self.count = total

    def note(self, _: nn.Module, __: Any, output: Any) -> None:
        """Take in what a module gives, as a hook of it."""
        values = next((each for each in tree_leaves(output) if isinstance(each, Tensor)), None)
        if values is not None:
            variance, mean = torch.var_mean(values.detach().cpu().double(), correction=0)
            self.merge(values.numel(), mean.item(), variance.item() * values.numel())

    def pool(self) -> None:
        """Take in those of all ranks, in the same order on each."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            everyone: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, (self.count, self.mean, self.deviations))
            self.__init__()  # type: ignore[misc]
            for each in everyone:
                self.merge(*each)

    @property
    def variance(self) -> float | None:
        return self.deviations / self.count if self.count else None


def output_variances(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], forward: Callable[[Any], Any]
) -> dict[str, float]:
    """Return the variance of all values that each layer gives over some batches, in the order in which layers are first reached."""
    spreads = {name: _Spread() for name in layers}
    reached: dict[str, None] = {}
    with _looking(model):
        handles = [layer.register_forward_hook(spreads[name].note) for name, layer in layers.items()]
        handles += [layer.register_forward_hook(partial(_reach, reached, name)) for name, layer in layers.items()]
        try:
            for batch in batches:
                forward(batch)
        finally:
            for handle in handles:
                handle.remove()
    for spread in spreads.values():
        spread.pool()
    return {name: variance for name in reached if (variance := spreads[name].variance) is not None}


def _reach(reached: dict[str, None], name: str, *_: Any) -> None:
    reached.setdefault(name)


def scale_to_unit_variance(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, Callable[[float], None]]],
    batches: Sequence[Any],
    forward: Callable[[Any], Any],
    *,
    tolerance: float,
    most: int,
) -> dict[str, str]:
    """Scale layers, from first to last, until the variance of each one's output over all batches lies within a tolerance of one.

    Args:
        model: The model.
        layers: Modules whose output is looked at, each with what multiplies the weights that belong to it.
        batches: The batches; each is run up to a layer as often as that is measured.
        forward: What runs the model on a batch.
        tolerance: Largest ``|variance − 1|``.
        most: How often a layer is scaled at most.

    Returns:
        The layers that could not be scaled, with the reasons.

    Raises:
        TrickError: If the batches reach none of the layers.
    """
    order = output_variances(model, {name: module for name, (module, _) in layers.items()}, batches, forward)
    if not order:
        msg = (
            f"The pass over {len(batches)} batches must reach layers, and reached none of {', '.join(map(repr, list(layers)[:3]))}. "
            "Give `forward`, so that it calls the model as training does."
        )
        raise TrickError(msg)
    left = {name: "the batches do not reach it" for name in layers if name not in order}
    for name in order:
        module, multiply = layers[name]
        for attempt in range(most + 1):
            variance = _variance(model, module, batches, forward)
            if not 0.0 < variance < float("inf"):
                left[name] = f"its output has a variance of {variance:g}"
                break
            if abs(variance - 1.0) < tolerance:
                break
            if attempt == most:
                left[name] = f"its output has a variance of {variance:g} after {most} steps"
                break
            multiply(variance**-0.5)
    return left


def _variance(model: nn.Module, layer: nn.Module, batches: Sequence[Any], forward: Callable[[Any], Any]) -> float:
    spread = _Spread()

    def note(*arguments: Any) -> None:
        spread.note(*arguments)
        raise _Seen

    with _looking(model):
        handle = layer.register_forward_hook(note)
        try:
            for batch in batches:
                try:
                    forward(batch)
                except _Seen:
                    continue
        finally:
            handle.remove()
    spread.pool()
    return spread.variance or 0.0


@contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalize by its batch, as in training, while everything else evaluates and nothing changes."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), isolate_rng(), normalizing_by_batch(model, norms):
        yield
