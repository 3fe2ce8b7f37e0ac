"""The abstract base of callbacks that mix the samples of a batch, and their targets."""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_tricks._core.checks import check_choice, check_in_interval, check_item
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.draws import fold, order_of_rows, uniform
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, callbacks_of, logs_now, override
from lightning_tricks.data._batches import describe, find, replaced
from lightning_tricks.data._mixed_tensors import Marks, mixed
from lightning_tricks.data._soft_labels import weighed
from lightning_tricks.data._target_trick import Places, TargetTrick
from lightning_tricks.errors import ArgumentError, TrickError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MixingTrick", "Per", "column", "mix_targets"]

Per = Literal["batch", "sample"]


def column(share: float | Tensor, like: Tensor) -> float | Tensor:
    """Lay shares of samples out along the first dimension of a tensor, in its own dtype if it has a fraction."""
    if not isinstance(share, Tensor):
        return share
    dtype = like.dtype if like.is_floating_point() else share.dtype
    return share.to(like.device, dtype).view(-1, *[1] * (like.ndim - 1))


def mix_targets(targets: Tensor, share: float | Tensor, partners: Tensor, marks: Marks) -> Tensor:
    """Let targets stand for their own and their partner's; what is seen of each pair is what has the larger share.

    Args:
        targets: Classes, which are mixed where a loss takes them, or numbers, which are mixed as they are.
        share: λ of each target's own, of the batch or of each sample.
        partners: The row that each is mixed with.
        marks: What is shared by the targets of this batch.
    """
    others = targets[partners]
    if isinstance(share, Tensor):
        own = column(share, targets)
        assert isinstance(own, Tensor)
        first, second = torch.where(own >= 0.5, targets, others), torch.where(own >= 0.5, others, targets)
        larger: float | Tensor = torch.where(own >= 0.5, own, 1 - own)
    else:
        first, second = (targets, others) if share >= 0.5 else (others, targets)
        larger = max(share, 1 - share)
    if targets.is_floating_point():
        return mixed([weighed([first, second], larger)], 1.0, marks, visible=first)
    if isinstance(larger, Tensor):
        larger = larger.expand(targets.shape)
    return mixed([first, second], larger, marks, classes=True)


class MixingTrick(TargetTrick):
    """Mixes each sample with another one of its batch."""

    turn = 10
    does = "mixes"

    def __init__(
        self,
        alpha: float,
        *,
        per: Per,
        probability: float,
        start: int | str,
        stop: int | str | None,
        item: int | str | None,
        target: Places,
        name: str | None,
    ) -> None:
        super().__init__(target, name)
        self.alpha = check_in_interval("alpha", alpha, "[0, ∞)")
        self.per = check_choice("per", per, ("batch", "sample"))
        self.probability = check_in_interval("probability", probability, "[0, 1]")
        self._begin = Duration.parse("start", start)
        self._end = None if stop is None else Duration.parse("stop", stop)
        self.start, self.stop = plain_duration(start), None if stop is None else plain_duration(stop)
        if self._end is not None and self._end.unit == self._begin.unit and self._end.amount <= self._begin.amount:
            raise ArgumentError(self._never())
        self.item = check_item(item)
        self._span: tuple[int, float] | None = None  # in optimizer steps
        self._share = 1.0

    @abstractmethod
    def mix(self, images: Tensor, shares: Sequence[float], partners: Tensor, draws: random.Random) -> tuple[Tensor, Sequence[float], Any]:
        """Mix images by shares, of the batch or of each; return them, the shares that came out, and what `_mix_map` needs to know."""

    def _mix_map(self, targets: Tensor, images: Tensor, partners: Tensor, how: Any) -> Tensor | None:
        """Mix targets that are maps of the images, if that is done as the images are mixed."""
        return None

    @property
    @override
    def is_neutral(self) -> bool:
        return self.alpha == 0 or self.probability == 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._span = None

    @override
    def change(self, trainer: Trainer, batch: Any, key: int) -> Any:
        self._share = 1.0
        images, targets = self._images(batch), self._targets(batch)
        for place, each in zip(self.places, targets, strict=True):
            if len(each) != len(images):
                msg = f"{self!r} mixes samples, and there are {len(images)} inputs and {len(each)} targets at {place!r}. Give one for each."
                raise TrickError(msg)
        if len(images) < 2 or not self._is_chosen(trainer):
            return batch
        draws, partners = random.Random(key), order_of_rows(key, len(images), images.device)  # noqa: S311  # no secret
        drawn = [draws.betavariate(self.alpha, self.alpha) for _ in range(1 if self.per == "batch" else len(images))]
        changed, shares, how = self.mix(images, drawn, partners, draws)
        self._share = sum(shares) / len(shares)
        share = shares[0] if self.per == "batch" else torch.tensor(shares, device=images.device)
        batch, marks = replaced(batch, self.item, changed), Marks(repr(self))
        for place, each in zip(self.places, targets, strict=True):
            cut = self._mix_map(each, images, partners, how)
            batch = replaced(batch, place, mix_targets(each, share, partners, marks) if cut is None else cut)
        return batch

    def _images(self, batch: Any) -> Tensor:
        images = find(batch, self.item)
        if not isinstance(images, Tensor) or not images.ndim:
            msg = f"{self!r} mixes a tensor of inputs, and {describe(batch, self.item)}. Give its index or key by `item`."
            raise TrickError(msg)
        return images

    def _is_active(self, trainer: Trainer) -> bool:
        """Tell whether training stands between `start` and `stop`."""
        if self._span is None:
            stop = float("inf") if self._end is None else self._end.steps("stop", trainer)
            self._span = self._begin.steps("start", trainer), stop
            if self._span[0] >= stop:
                raise ArgumentError(self._never())
        return self._span[0] <= trainer.global_step // max(1, len(trainer.optimizers)) < self._span[1]

    def _never(self) -> str:
        return f"`stop` must come after `start`, got start={self.start!r} and stop={self.stop!r}."

    def _is_chosen(self, trainer: Trainer) -> bool:
        """Draw which of all mixing callbacks acts on the batch: each with its probability, scaled down if these exceed one together."""
        mixing = [each for each in callbacks_of(trainer) if isinstance(each, MixingTrick) and not each.is_neutral]
        together = sorted((each for each in mixing if each._is_active(trainer)), key=lambda each: each.state_key)
        if self not in together:
            return False
        point = float(uniform(fold(together[0]._key(trainer), 1))) * max(1.0, sum(each.probability for each in together))
        before = sum(each.probability for each in together[: together.index(self)])
        return before <= point < before + self.probability

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer) and not self.is_neutral:
            pl_module.log(f"{self.log_prefix}/share", self._share)
