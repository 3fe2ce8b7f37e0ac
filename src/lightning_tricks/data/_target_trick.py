"""The abstract base of callbacks that change what a training step takes for its targets, and the step that reveals them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from torchmetrics import Metric

from lightning_tricks._core.lightning import LightningModule, Trainer, override
from lightning_tricks.data._batches import BatchTrick, describe, find, replaced
from lightning_tricks.data._mixed_tensors import Marks, MixedTensor, seen
from lightning_tricks.errors import ArgumentError, TrickError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

    from torch.utils.hooks import RemovableHandle

__all__ = ["TargetTrick", "check_places"]

Places = int | str | Sequence[int | str]


def check_places(name: str, value: Places) -> Places:
    """Accept an index or a key, or several."""
    places = [value] if isinstance(value, int | str) else [*value] if isinstance(value, Sequence) else []
    if not places or any(isinstance(place, bool) or not isinstance(place, int | str) for place in places):
        msg = f"`{name}` must be an index or a key in a batch, or a list of these, got {value!r}."
        raise ArgumentError(msg)
    return value if isinstance(value, int | str) else tuple(places)


class TargetTrick(BatchTrick):
    """Lets targets of a batch stand for something else in the loss of its training step."""

    does: str  # to targets, for errors

    def __init__(self, target: Places, name: str | None) -> None:
        super().__init__(name)
        self.target = check_places("target", target)
        self._handles: list[RemovableHandle] = []
        self._step: _Step | None = None

    @property
    def places(self) -> Sequence[int | str]:
        """Where the targets are in a batch."""
        return (self.target,) if isinstance(self.target, int | str) else self.target

    def _targets(self, batch: Any) -> list[Tensor]:
        """Return the targets in a batch.

        Raises:
            TrickError: If there is no tensor at one of the places.
        """
        found = [find(batch, place) for place in self.places]
        for place, each in zip(self.places, found, strict=True):
            if not isinstance(each, Tensor) or not each.ndim:
                what = describe(batch, place).replace("item=", "target=")
                msg = f"{self!r} {self.does} a tensor of targets, one for each sample, and {what}. Give its index or key by `target`."
                raise TrickError(msg)
        return found

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self.is_neutral:
            step = vars(pl_module).get("training_step")
            self._step = step if isinstance(step, _Step) else _Step(pl_module)
            self._step.tricks.append(self)

    @override
    def _change(self, trainer: Trainer, batch: Any) -> Any:
        batch = super()._change(trainer, batch)
        assert self._step is not None
        self._step.note({place: find(batch, place) for place in self.places})
        return batch

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = [] if self.is_neutral else [part for part in pl_module.modules() if isinstance(part, Metric)]
        self._handles += [metric.register_forward_pre_hook(_reveal, with_kwargs=True) for metric in metrics]

    @override
    def _undo(self) -> None:
        super()._undo()
        while self._handles:
            self._handles.pop().remove()
        if self._step is not None:
            self._step.leave(self)
        self._step = None


def _reveal(_metric: Metric, arguments: Any, options: Any) -> Any:
    """Give a metric the labels that are seen, since it keeps what it is given."""
    return tree_map_only(MixedTensor, seen, (arguments, options))


class _Step:
    """Stands in for a module's `training_step`: its targets stand for others while it runs, and its loss is a plain one afterwards."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.before: Any = vars(module).get("training_step")
        self.own: Callable[..., Any] = module.training_step
        self.tricks: list[TargetTrick] = []
        self.marked: dict[int | str, MixedTensor] = {}  # targets of the batch, by their places in it
        vars(module)["training_step"] = self

    # What Lightning looks at

    @property
    def __signature__(self) -> Signature:
        return signature(self.own)

    @property
    def __code__(self) -> CodeType:
        return type(self).__call__.__code__

    def leave(self, trick: TargetTrick) -> None:
        """Put the module's own step back, once no trick needs this one."""
        self.tricks.remove(trick)
        if self.tricks or vars(self.module).get("training_step") is not self:
            return
        if self.before is None:
            del vars(self.module)["training_step"]
        else:
            vars(self.module)["training_step"] = self.before

    def note(self, targets: Mapping[int | str, Any]) -> None:
        """Remember what stands for targets in the batch that comes."""
        for place, target in targets.items():
            self.marked.pop(place, None)
            if isinstance(target, MixedTensor):
                self.marked[place] = target

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        at_work = list({id(each.marks): each.marks for each in self.marked.values()}.values())
        if at_work:
            given = arguments[0] if arguments else options["batch"]
            for place, target in self.marked.items():
                if not hasattr(find(given, place), "marks"):  # as DeepSpeed hands over copies, which have lost them
                    given = replaced(given, place, target)
            arguments, options = ((given, *arguments[1:]), options) if arguments else (arguments, {**options, "batch": given})
        for marks in at_work:
            marks.alive, marks.reached, marks.smoothed = True, False, False
        try:
            output = self.own(*arguments, **options)
        finally:
            for marks in at_work:
                marks.alive = False
        if at_work:
            self._check(output, at_work)
        return tree_map(lambda leaf: seen(leaf) if isinstance(leaf, MixedTensor) else leaf, output)

    def _check(self, output: Any, at_work: Sequence[Marks]) -> None:
        """Check that the loss depends on what the targets stand for."""
        automatic = self.module.automatic_optimization
        loss = output.get("loss") if isinstance(output, Mapping) else output
        reached = any(marks.reached for marks in at_work) or (isinstance(loss, MixedTensor) and loss.branches[0].requires_grad)
        if automatic and loss is None:
            return
        if reached:
            self._check_smoothing()
            return
        tricks = " and ".join(trick for marks in at_work for trick in marks.tricks)
        places = ", ".join(f"`batch[{place!r}]`" for place in dict.fromkeys(place for trick in self.tricks for place in trick.places))
        loss_of = "`training_step` returns" if automatic else "`training_step` goes backward from"
        msg = (
            f"{tricks} changes targets, and the loss that {loss_of} in {type(self.module).__name__} does not depend on {places} "
            "through functions of torch, so that it would be that of plain targets. Compute it so, outside of `torch.no_grad`, and "
            "without detours through numbers, NumPy, TorchScript or tensors changed in place, or say by `target` where its targets are."
        )
        raise TrickError(msg)

    def _check_smoothing(self) -> None:
        """Check that labels that are to be smoothed have come to a function that smooths them."""
        missed = [place for place, each in self.marked.items() if each.smoothing and not each.marks.smoothed]
        if missed:
            tricks = " and ".join(repr(trick) for trick in self.tricks if not {*trick.places}.isdisjoint(missed))
            msg = (
                f"{tricks} smooths labels in `cross_entropy`, `nll_loss` and `one_hot`, and `training_step` of "
                f"{type(self.module).__name__} hands those at {', '.join(f'`batch[{place!r}]`' for place in missed)} to none of these. "
                "Use one of them, or smooth there and remove the callback."
            )
            raise TrickError(msg)
