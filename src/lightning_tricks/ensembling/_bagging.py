"""Members that are trained on resamples of the training set, and predict what they have not seen.

Source: L. Breiman, "Bagging Predictors", Machine Learning, 1996, and "Out-of-bag Estimation", technical report, 1996.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_tricks._core.draws import fold, mix
from lightning_tricks._core.lightning import defines
from lightning_tricks._core.loaders import move_batch
from lightning_tricks.ensembling._combining import Combine, Output, combine_predictions
from lightning_tricks.errors import ArgumentError, TrickError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_tricks._core.lightning import Trainer

__all__ = ["OutOfBag", "bagged", "combine_out_of_bag", "draw_bag", "outside", "predict_rows"]

_BAG = 0xBA6


@dataclass(frozen=True, eq=False)
class OutOfBag:
    """What the members of a bagged ensemble predict for the examples of their training set that they were not trained on.

    Attributes:
        predictions: For each example, in the order of the data set, the combined prediction of the members that have not seen it; NaN
            where all have.
        count: How many members that is, for each example.

    Example:
        >>> OutOfBag(torch.tensor([[0.3], [float("nan")]]), torch.tensor([2, 0])).predictions[0]
        tensor([0.3000])
    """

    predictions: Tensor
    count: Tensor


def draw_bag(seed: int, size: int) -> Tensor:
    """Draw as many rows as there are, with replacement: ``i_j = ⌊n h_j / 2³²⌋`` with the hash ``h_j`` of seed and position j."""
    hashes = mix(mix(torch.arange(1, size + 1)) ^ fold(seed, _BAG))
    return (hashes * size) >> 32


def outside(bag: Tensor, size: int) -> Tensor:
    """Return the rows that are not in a bag."""
    absent = torch.ones(size, dtype=torch.bool)
    absent[bag] = False
    return absent.nonzero().squeeze(1)


def bagged(loader: Any, seed: int) -> DataLoader[Any]:
    """Return a loader like another, with as many examples, drawn with replacement from its own.

    Raises:
        ArgumentError: If the loader's examples cannot be drawn by their numbers.
    """
    reason = _no_rows(loader)
    if reason:
        msg = f"`bootstrap=True` draws examples by their numbers, and {reason}. Pass bootstrap=False, or one plain DataLoader."
        raise ArgumentError(msg)
    resampled: DataLoader[Any] = copy(loader)
    # What Lightning has noted of the constructor's arguments holds the whole data set; without it, it reads the attributes.
    for name in [name for name in vars(resampled) if name.startswith("__")]:
        del vars(resampled)[name]
    rows: Sequence[int] = draw_bag(seed, len(loader.dataset)).tolist()
    vars(resampled)["dataset"] = Subset(loader.dataset, rows)
    return resampled


def _no_rows(loader: Any) -> str:
    """Tell why a loader's examples cannot be drawn by their numbers; nothing if they can."""
    if not isinstance(loader, DataLoader):
        return f"the training data are a {type(loader).__name__}"
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return f"the data set {type(loader.dataset).__name__} is an iterable without numbers"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"batches are made by a {type(loader.batch_sampler).__name__}, which may go by what the examples are"
    if not isinstance(loader.sampler, SequentialSampler | RandomSampler | DistributedSampler):
        return f"they come in the order of a {type(loader.sampler).__name__}, which may go by what the examples are"
    return ""


@torch.no_grad()
def predict_rows(trainer: Trainer, module: Any, loader: DataLoader[Any], rows: Tensor, *, batches: int | None = None) -> Tensor:
    """Predict examples of a loader's data set, by `predict_step` if the module defines it, or else by `forward`, on its Trainer's device.

    Raises:
        TrickError: If the module does not return one floating-point tensor, with a row for each example.
    """
    predictions: list[Tensor] = []
    if len(rows) == 0:
        return torch.empty(0)
    before = module.training, getattr(module, "_trainer", None), module.device
    module.to(trainer.strategy.root_device).eval()
    module.trainer = trainer
    asked = rows if batches is None else rows[: batches * (loader.batch_size or 1)]
    part = Subset(loader.dataset, asked.tolist())
    plain = DataLoader(part, batch_size=loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)
    try:
        for index, batch in enumerate(plain):
            moved = move_batch(trainer, trainer.lightning_module, batch)
            with trainer.precision_plugin.forward_context():
                first = moved[0] if isinstance(moved, tuple | list) else moved
                prediction: Any = module.predict_step(moved, index) if defines(module, "predict_step") else module(first)
            if not (isinstance(prediction, Tensor) and prediction.is_floating_point() and prediction.ndim):
                found = f"a {type(prediction).__name__}" if not isinstance(prediction, Tensor) else f"{prediction.dtype}"
                msg = _unusable(module, found)
                raise TrickError(msg)
            predictions.append(prediction.to("cpu"))
    finally:
        module.trainer = before[1]
        module.train(before[0]).to(before[2])
    joined = torch.cat(predictions)
    if len(joined) != len(asked):
        raise TrickError(_unusable(module, f"{len(joined)} rows for {len(asked)} examples"))
    return joined


def _unusable(module: nn.Module, found: str) -> str:
    return (
        "Out-of-bag predictions must be one floating-point tensor with a row for each example, and "
        f"{type(module).__name__} predicts {found}. Define a `predict_step` that returns one, or pass bootstrap=False."
    )


def combine_out_of_bag(parts: Sequence[tuple[Tensor, Tensor]], size: int, *, combine: Combine, output: Output, class_dim: int) -> OutOfBag:
    """Combine what each member predicts for its rows, given as pairs of rows and predictions, over the members that predict a row."""
    like = next((prediction for rows, prediction in parts if len(rows)), torch.empty(0))
    stacked = like.new_full((len(parts), size, *like.shape[1:]), float("nan"))
    known = torch.zeros(size, len(parts), dtype=torch.bool)
    for member, (rows, prediction) in enumerate(parts):
        if len(rows):
            stacked[member, rows] = prediction
            known[rows, member] = True
    combined = stacked.new_full(stacked.shape[1:], float("nan"))
    patterns, which = torch.unique(known, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        if pattern.any():
            chosen = which == number
            combined[chosen] = combine_predictions(stacked[pattern][:, chosen], combine=combine, output=output, class_dim=class_dim)
    return OutOfBag(combined, known.sum(1))
