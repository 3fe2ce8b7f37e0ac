"""One evaluation in which all members answer in a model's place, and what is measured of them meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from lightning_tricks.ensembling._combining import Combine, Output, Uncertainty, combine_predictions, decompose_uncertainty
from lightning_tricks.ensembling._measures import EnsembleMeasures
from lightning_tricks.errors import ArgumentError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_tricks._core.lightning import Trainer
    from lightning_tricks.ensembling._answering import Answer
    from lightning_tricks.ensembling._lending import Lending
    from lightning_tricks.ensembling._store import Member

__all__ = ["Combination", "Evaluation", "labels_in"]

_LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Combination:
    """How members' predictions become one; see `combine_predictions`."""

    combine: Combine
    output: Output
    class_dim: int

    def joint(self, predictions: Tensor) -> Tensor:
        """Return one prediction."""
        return combine_predictions(predictions, combine=self.combine, output=self.output, class_dim=self.class_dim)

    def uncertainty(self, predictions: Tensor) -> Uncertainty:
        """Tell how uncertain it is."""
        return decompose_uncertainty(predictions, combine=self.combine, output=self.output, class_dim=self.class_dim)

    def measures(self) -> EnsembleMeasures:
        """Make the metric that fits."""
        return EnsembleMeasures(combine=self.combine, output=self.output, class_dim=self.class_dim)


@dataclass
class Evaluation:
    """A pass of validation, test or predict.

    Attributes:
        owner: How errors name who evaluates.
        trainer: The Trainer.
        answer: Stands in for the module that answers.
        members: The members, which may be none.
        lending: Lends their weights.
        combination: How they are put together.
        measures: What their predictions are measured by, if they are.
        item: Index or key of the labels in a batch, or None to look for them.
        predictions: The latest, of each member.
    """

    owner: str
    trainer: Trainer
    answer: Answer
    members: Sequence[Member]
    lending: Lending[Member]
    combination: Combination
    measures: EnsembleMeasures | None
    item: int | str | None
    predictions: Tensor | None = None
    _shards: set[int] = field(default_factory=set)
    _labels: Tensor | None = None
    _batches: int = 0

    def begin(self) -> None:
        """Let the members answer; the module itself, if there are none."""
        self._shards = {id(parameter) for parameter in self.answer.module.parameters() if isinstance(parameter, DTensor)}
        self.answer.begin(self._predict if self.members else None)

    def end(self) -> None:
        """Let the module answer by itself, with its own weights."""
        self.answer.end()
        self.lending.hold(None)

    def see(self, batch: Any, *, labelled: bool) -> None:
        """Take note of the batch that comes next."""
        self._batches += 1
        self._labels = labels_in(batch, self.item) if labelled and self.measures is not None else None

    def values(self) -> dict[str, Tensor]:
        """Return what has been measured; all ranks must call this."""
        return {} if self.measures is None or not self.members else self.measures.compute()

    def check_called(self, target: str | None) -> None:
        """Check that the ensemble has answered at all.

        Raises:
            TrickError: If there were batches, and the module was not called.
        """
        if self._batches and not self.answer.calls:
            kind = type(self.trainer.lightning_module).__name__
            name = f"`forward` of {kind}" if target is None else f"{target!r} of {kind}"
            msg = (
                f"{self.owner} answers in the place of {name}, which this evaluation has never called, so that no ensemble was evaluated. "
                "Name the module that your steps call by `target`, or pass `evaluate=False`."
            )
            raise TrickError(msg)

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _predict(self, call: Callable[[], Tensor]) -> Tensor:
        """Combine what the members predict; what measures statistics of training in between has the module's own weights."""
        if self.trainer.training:
            return call()
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            msg = (
                f"{self.owner} lends the model weights for the length of a prediction, through which no gradient can be traced back, and "
                "gradients are enabled. Predict under `torch.no_grad()`, or pass `evaluate=False`."
            )
            raise TrickError(msg)
        predictions = []
        try:
            for member in self.members:
                self._lend(member)
                predictions.append(call())
        finally:
            self._lend(None)
        joint: Tensor = self._combine(predictions)
        return joint

    # Where a step is compiled as a whole, what surrounds the members' predictions is not.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _lend(self, member: Member | None) -> None:
        self.lending.hold(member)
        if member is not None:
            self._check_shards()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _combine(self, predictions: Sequence[Tensor]) -> Tensor:
        self.predictions = torch.stack([*predictions])
        self._measure(self.predictions)
        return self.combination.joint(self.predictions)

    def _check_shards(self) -> None:
        if self._shards - {id(parameter) for parameter in self.answer.module.parameters()}:
            msg = (
                f"What answers for {self.owner} must be the whole model, or a module that is sharded on its own: this one is called inside "
                "another that has gathered its weights already. Name that one by `target`, or call `fully_shard` on this one, too."
            )
            raise TrickError(msg)
        self._shards = set()

    def _measure(self, predictions: Tensor) -> None:
        if self.measures is None:
            return
        self.measures.to(predictions.device)
        try:
            self.measures.update(predictions, self._labels)
        except ArgumentError:
            if self._labels is None or self.item is not None:
                raise
            self.measures.update(predictions)  # what was found where labels often are is something else


def labels_in(batch: Any, item: int | str | None) -> Tensor | None:
    """Return the labels in a batch: under an index or key, or else where they often are.

    Raises:
        TrickError: If there is nothing under the index or key.
    """
    if item is not None:
        try:
            found = batch[item]
        except (LookupError, TypeError) as error:
            msg = f"`item={item!r}` must name the labels in each batch, and a {type(batch).__name__} has nothing there. Pass another one."
            raise TrickError(msg) from error
    elif isinstance(batch, tuple | list):
        found = batch[1] if len(batch) > 1 else None
    else:
        found = next((batch[key] for key in _LABELS if key in batch), None) if isinstance(batch, Mapping) else None
    return found if isinstance(found, torch.Tensor) else None
