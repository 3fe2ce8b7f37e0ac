"""Fine-tuning in stages: a new head first, then more and more of the layers below it, at rates that fall towards the input.

A head that begins at random sends large gradients into layers that were trained well. So the head is trained alone first, as a linear
classifier on fixed features; layers thaw later, the last first, and the more general the features of a layer, the lower its rate.

Source: J. Yosinski et al., "How transferable are features in deep neural networks?", NeurIPS, 2014; J. Howard and S. Ruder, "Universal
Language Model Fine-tuning for Text Classification", ACL, 2018, for gradual thawing and discriminative rates; A. Kumar et al.,
"Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR, 2022, for the linear probe in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lightning_tricks._core.checkpoint import read_changes, read_entry, write_change, write_entry
from lightning_tricks._core.checks import check_choice, check_count, check_in_interval, check_patterns
from lightning_tricks._core.clock import Duration, plain_duration
from lightning_tricks._core.divided_groups import DividedGroups
from lightning_tricks._core.held_statistics import hold_statistics, release_statistics
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, callbacks_of, defines, logs_now, override
from lightning_tricks._core.recording import RecordingTrick
from lightning_tricks._core.strategies import (
    gathers_parameters,
    moved_by,
    plain_name,
    refuse_rewrapping,
    refuse_strategies,
    return_to_shards,
    rewrap,
)
from lightning_tricks._core.surgery import Patches, when_built
from lightning_tricks._core.trick import Trick
from lightning_tricks._core.updates import updating
from lightning_tricks.errors import ArgumentError, NothingMatchedError, TrickConflictError, TrickError
from lightning_tricks.transfer._replace_head import find_head, is_replaced, outputs_of, replace_head
from lightning_tricks.transfer._thawing import Thaw, Thawing, begin_momentum, check_factors, check_thaw, frozen_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning_tricks._core.owners import Owned

__all__ = ["FineTuning"]

_UNSUPPORTED = {
    "DeepSpeedStrategy": "the engine divides gradients and optimizer states of all parameters between ranks before it starts",
    "FSDPStrategy": "FSDP1 saves the optimizer's state of a flat parameter as a whole, and frozen parts have none; FSDP2 works",
}


class FineTuning(RecordingTrick):
    """Fine-tune a trained network in stages: some layers from the beginning, others from later moments on.

    Each stage thaws more. What has not thawed yet gets no gradient, no weight decay and no momentum, costs no backward pass where it lies
    below all that trains, and BatchNorm layers among it keep their running statistics. Learning rates may fall from layer to layer,
    ``lr_l = lr · layer_decay^(L − l)``, or differ by name.

    Reach for it whenever the weights come from another task. `functional.transfer_plan` chooses stages by how much data there is and how
    much it differs; a table in the guide shows what each choice gave.

    Args:
        stages: From which moment on what trains as well: durations such as ``"0%"``, ``"500 steps"`` or ``"2 epochs"``, each with a glob
            or globs over names of layers or parameters, with a number of last layers beside the head (0 = the head alone), or with a
            share of the layers such as ``"30%"``. One of them begins at 0.
        layer_decay: Factor of the learning rate from each layer to the one before it; None = 1. Layers are those of the recipes' argument
            of this name: blocks, and what stands before and after them.
        lr_factors: Globs over names of parameters, each with a factor of the learning rate; the last that matches wins. Multiplies with
            `layer_decay`.
        statistics: Whether BatchNorm layers and spectral normalizations that are frozen keep their statistics, ``"freeze"``, or go on
            with them, ``"train"``.
        num_classes: Outputs of a new head, which replaces the old one by `functional.replace_head` before the fit; a head of this size that
            has been made so before stays. None = the head stays.
        head: Name of the head, or a glob that matches it alone; None = find it, if it is needed.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if a stage thaws nothing that the model trains, or there is no head.
        TrickConflictError: At setup, if there is another `FineTuning`.
        TrickError: At setup, if several layers may be the head; when the fit starts, if no optimizer holds a parameter that thaws.
        UnsupportedOptimizerError: If learning rates differ and an optimizer cannot take that: LBFGS, and those that adapt a value of their
            own for each group.
        UnsupportedStrategyError: At setup, under DeepSpeed and FSDP1, under DDP with a communication hook, and with `num_classes` if the
            model shards itself as it is built.

    Note:
        All parameters belong to the optimizer from the beginning, which `configure_optimizers` therefore builds as if nothing were frozen.
        An optimizer leaves a parameter without a gradient alone, so that groups, states and schedulers never change, a checkpoint loads
        with or without the callback, and a run resumes to the bit in any stage. Factors of the learning rate are written into the groups
        for the length of each step, whatever scheduler sets the rates; between steps, groups show the rates without them.

        Parameters are frozen by ``requires_grad=False`` during training steps alone. DDP is made anew with each stage, since it reduces
        only what required gradients when it was made. FSDP2 and tensor parallelism follow by themselves.

        Dropout in frozen layers goes on. What a model has frozen by itself stays so. Gradient checkpointing of layers above frozen ones
        needs torch's ``use_reentrant=False``, since the other kind passes no gradient to weights where inputs need none.

    References:
        - J. Yosinski, J. Clune, Y. Bengio and H. Lipson, "How transferable are features in deep neural networks?", NeurIPS, 2014.
        - J. Howard and S. Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL, 2018.
        - A. Kumar, A. Raghunathan, R. Jones, T. Ma and P. Liang, "Fine-Tuning can Distort Pretrained Features and Underperform
          Out-of-Distribution", ICLR, 2022.

    Example:
        >>> FineTuning({"0%": "head", "20%": "layer4", "50%": "*"}, layer_decay=0.7)
        FineTuning(stages={'0%': 'head', '20%': 'layer4', '50%': '*'}, layer_decay=0.7)
    """

    def __init__(
        self,
        stages: Mapping[str, int | str | Sequence[str]],
        *,
        layer_decay: float | None = None,
        lr_factors: Mapping[str, float] | None = None,
        statistics: Literal["freeze", "train"] = "freeze",
        num_classes: int | None = None,
        head: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.stages = _check_stages(stages)
        self.layer_decay = None if layer_decay is None else float(check_in_interval("layer_decay", layer_decay, "(0, 1]"))
        self.lr_factors = None if lr_factors is None else check_factors(lr_factors)
        self.statistics = check_choice("statistics", statistics, ("freeze", "train"))
        self.num_classes = None if num_classes is None else check_count("num_classes", num_classes)
        if head is not None and not isinstance(check_patterns("head", head, empty=False), str):
            msg = f"`head` must be the name of one layer, or a glob that matches it, got {head!r}."
            raise ArgumentError(msg)
        self.head = head
        self._begins = [Duration.parse("stages", moment) for moment in self.stages]
        self._thawing = Thawing(repr(self), list(self.stages.values()), head, self.layer_decay, self.lr_factors or {})
        self._patches = Patches()
        self._built = Patches()
        self._fits = False
        self._divided: list[DividedGroups] = []
        self._thawed: list[tuple[int, list[Owned]]] = []  # with the step from which each stage trains
        self._all: dict[str, nn.Parameter] = {}  # that the model trains
        self._gathered = False  # whether they are, for each forward pass
        self._frozen: dict[str, nn.Parameter] = {}
        self._off: list[nn.Parameter] = []  # require no gradient for the length of this batch
        self._norms: list[nn.Module] = []

    # Before a fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.num_classes is None:
            Trick.setup(self, trainer, pl_module, stage)  # keys and shapes stay, and there is nothing to record
        else:
            super().setup(trainer, pl_module, stage)
        self._release(pl_module)
        if self.num_classes is not None:
            self._fits = stage == "fit"
            self._built = when_built(pl_module, self._replace, trick=repr(self), function="replace_head")
        if stage != "fit":
            return
        for other in callbacks_of(trainer):
            if isinstance(other, FineTuning) and other is not self:
                msg = f"{self!r} and {other!r} would each freeze what the other trains. Keep one, which can have the stages of both."
                raise TrickConflictError(msg)
        refuse_strategies(trainer, repr(self), _UNSUPPORTED)
        refuse_rewrapping(trainer, repr(self))
        self._frozen = {}
        try:
            self._thawing.resolve(pl_module)
            self._thawing.factors(pl_module)
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):  # which build layers later; the beginning looks again
                raise
        self._patches.wrap(trainer.strategy, "load_checkpoint", lambda load: partial(self._load, trainer, load))

    def _replace(self, module: LightningModule) -> None:
        assert self.num_classes is not None
        name, head = find_head(module, self.head, who=repr(self))
        new = self._fits and not is_replaced(head)  # a fit begins with a new head, an evaluation needs one of the right size
        if new or outputs_of(head) != self.num_classes:
            replace_head(module, self.num_classes, where=name)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begins = [begin.steps("stages", trainer) for begin in self._begins]
        self._thawed = list(zip(begins, self._thawing.resolve(pl_module), strict=True))
        self._all = {plain_name(name): parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        self._frozen, self._gathered = {}, gathers_parameters(pl_module)
        held = set().union(*map(moved_by, trainer.optimizers))
        for _, thawed in self._thawed:
            lost = [owned.names[0] for owned in thawed if id(owned.parameter) not in held]
            if lost:
                msg = (
                    f"{self!r} thaws {lost[0]!r} and {len(lost) - 1} more that no optimizer of {type(pl_module).__name__} holds. Give it "
                    "all parameters from the beginning; what is frozen does not move."
                )
                raise TrickError(msg)
        for optimizer in trainer.optimizers if max(begins) else ():
            begin_momentum(updating(optimizer), {id(owned.parameter) for _, thawed in self._thawed for owned in thawed})
        factors = self._thawing.factors(pl_module)
        if factors:
            self._divided = [DividedGroups(optimizer, factors, repr(self)) for optimizer in trainer.optimizers]

    # During a fit

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step // max(1, len(trainer.optimizers))
        thawed = {id(owned.parameter) for begin, stage in self._thawed if begin <= step for owned in stage}
        frozen = {name: parameter for name, parameter in self._all.items() if id(parameter) not in thawed}
        entered = frozen.keys() != self._frozen.keys()
        self._frozen = frozen
        if frozen and self._gathered:
            return_to_shards(pl_module)  # or what the latest evaluation has left gathered would not follow
        self._switch_off(frozen.values())
        if entered:
            self._enter(trainer, pl_module)

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a stage."""
        for parameter in self._frozen.values():
            parameter.grad = None  # what an earlier fit has left
        for norm in self._norms:
            release_statistics(norm, self.state_key, training=module.training)
        self._norms = frozen_norms(module, set(map(id, self._frozen.values()))) if self.statistics == "freeze" else []
        for norm in self._norms:
            hold_statistics(norm, self.state_key)
        rewrap(trainer)

    def _switch_off(self, parameters: Iterable[nn.Parameter]) -> None:
        self._off = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._off:
            parameter.requires_grad = False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        self._switch_on()
        if logs_now(trainer):
            pl_module.log(f"{self.log_prefix}/frozen", float(len(self._frozen)))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch_on()  # after a batch that was skipped

    def _switch_on(self) -> None:
        while self._off:
            self._off.pop().requires_grad = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)
        self._patches.undo()
        self._built.undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)
        self._patches.undo()
        self._built.undo()

    def _release(self, module: LightningModule) -> None:
        self._switch_on()
        for norm in self._norms:
            release_statistics(norm, self.state_key, training=module.training)
        for divided in self._divided:
            divided.remove()
        self._norms, self._divided = [], []

    # Checkpoints

    @override
    def _record(self, checkpoint: dict[str, Any]) -> None:
        change = "replace_head", {"num_classes": self.num_classes, "where": self.head}
        if self.num_classes is not None and change not in read_changes(checkpoint):
            write_change(checkpoint, *change)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {"frozen": list(self._frozen)})

    def _load(self, trainer: Trainer, load: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        """Load a checkpoint in which optimizers have no state of what was frozen; FSDP2 asks for one of all that requires gradients."""
        module = trainer.lightning_module
        file = Path(path, "meta.pt") if Path(path).is_dir() else Path(path)
        entry = None
        if trainer.strategy.restore_checkpoint_after_setup and file.is_file():  # others do not look at gradients when they load
            safe: bool | None = options.get("weights_only")
            entry = read_entry(torch.load(file, map_location="cpu", mmap=True, weights_only=safe), self.state_key)
        frozen = set((entry or {}).get("frozen", ()))
        self._switch_off([parameter for name, parameter in module.named_parameters() if plain_name(name) in frozen])
        try:
            return load(path, *arguments, **options)
        finally:
            self._switch_on()


def _check_stages(stages: Mapping[str, Thaw]) -> dict[int | str, Thaw]:
    if not isinstance(stages, Mapping) or not stages:
        msg = f"`stages` must map moments to what trains from then on, such as {{'0%': 'head', '20%': 'layer4.*'}}, got {stages!r}."
        raise ArgumentError(msg)
    begins = [Duration.parse("stages", moment) for moment in stages]
    if all(begin.amount for begin in begins):
        msg = f"`stages` must say what trains from the beginning, as in {{'0%': 'head', …}}, and the first of {list(stages)} comes later."
        raise ArgumentError(msg)
    return {plain_duration(moment): check_thaw(f"stages[{moment!r}]", each) for moment, each in stages.items()}
