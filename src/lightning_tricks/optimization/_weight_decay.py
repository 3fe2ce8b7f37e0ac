"""Weight decay on whatever optimizer a module builds.

Shrinking weights a little at each step keeps them small, so that the network stays smooth and its normalized layers keep learning.
Optimizers have decay built in, each its own kind, and one value per parameter group. As a callback it needs no groups: it goes by
name and by type of layer, its strength may vary over training, and any optimizer gets any kind.

Source: I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR, 2019; A. Krogh and J. A. Hertz, "A Simple Weight
Decay Can Improve Generalization", NeurIPS, 1991.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_bool, check_choice, check_patterns
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, callbacks_of, defines, logs_now, override
from lightning_tricks._core.owners import KINDS, Kind
from lightning_tricks._core.schedule import Schedule, check_varying, follow
from lightning_tricks._core.strategies import moved_by, refuse_strategies, refuse_unreachable_parameters
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import ArgumentError, NothingMatchedError, TrickConflictError, TrickError
from lightning_tricks.optimization._decay import MODES, Mode
from lightning_tricks.optimization._decaying import Decayed, Decays, Rules

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["WeightDecay"]

_UNSUPPORTED = {
    "DeepSpeedStrategy": "the engine keeps its own copies of weights and gradients and updates them by itself; build the optimizer with "
    "`weight_decay` instead"
}
_UNSUMMED = {"FSDPStrategy": "`log_penalty=True` sums over parameters, and FSDP1 does not tell how they are shared among ranks"}


class WeightDecay(Trick):
    """Add weight decay to whatever optimizer and scheduler the module builds.

    Before each update, with the decay λ and the group's current learning rate η,

    - ``"decoupled"`` shrinks the weights, ``θ ← (1 − η·λ)·θ``, as AdamW does;
    - ``"l2"`` adds the gradient of ``λ/2·‖θ‖²``, ``g ← g + λ·θ``, as SGD's own ``weight_decay`` does;
    - ``"l1"`` adds the gradient of ``λ·‖θ‖₁``, ``g ← g + λ·sign(θ)``, which draws small weights to zero.

    Reach for it to decay by layer or by name without building parameter groups, to let the decay vary over training, or to give an
    optimizer a kind of decay that it does not have.

    Args:
        weight_decay: Decay λ, at least 0: a number, a `Schedule` over the optimizer's steps, or a mapping from globs over qualified
            names to either. In a mapping the last glob that matches wins, and parameters that none matches do not decay.
        mode: Which of the three.
        where: Glob or globs over qualified names of parameters, or of the modules that hold them; a glob matches a whole name or
            any part of it that begins after a dot.
        exclude: Globs over names that are left out.
        skip: Kinds of parameters that are left out, decided by the type of the layer that owns them: ``"matrix"``, the weights of
            linear, convolutional, recurrent, attention and bilinear layers, ``"embedding"``, ``"norm"``, everything that a
            normalization layer owns, ``"bias"``, and ``"other"``, such as class tokens and layer scales. What a module lists in a
            ``no_weight_decay`` of its own is always left out.
        existing: What to do where the optimizer decays selected parameters itself: ``"refuse"``, or ``"replace"``, which takes the
            optimizer's decay of these parameters' groups away for each step.
        log_penalty: Whether to log, beside λ, the penalty and its gradient's size relative to that of the loss, which costs some more
            passes over weights and gradients at each step that is logged.
        name: Tells several decays apart, in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no trainable parameter is selected, or a glob of a mapping selects none.
        TrickConflictError: When the fit starts, if two decays of one kind select the same parameter.
        UnsupportedStrategyError: At setup, under DeepSpeed, and under FSDP1 with `log_penalty` or ``use_orig_params=False``.
        UnsupportedOptimizerError: When the fit starts, if an optimizer decays the same parameters itself, is no
            ``torch.optim.Optimizer``, or has no learning rate, is LBFGS or one of the schedulefree package's while `mode` is
            ``"decoupled"``.
        TrickError: In training, if ``"l2"`` or ``"l1"`` meets a sparse gradient.

    Note:
        Acts after backward, unscaling and clipping, and only at steps that are really taken. A parameter without a gradient does not
        decay, as in torch's optimizers. With several optimizers, each parameter decays at the steps of its own, which also drive
        schedules. Where an optimizer's closure is evaluated several times in a step, weights shrink once, penalties are added to each
        gradient, and LBFGS also sees them in the loss.

        The checkpoint holds plain weights, and how many steps schedules have counted. Works under DDP, FSDP1, FSDP2 and tensor
        parallelism, where each rank decays the shards it owns, and with ``torch.compile``.

    References:
        - A. Krogh and J. A. Hertz, "A Simple Weight Decay Can Improve Generalization", NeurIPS, 1991.
        - I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR, 2019.

        Differs from the latter in multiplying λ by the learning rate itself, as torch does, and not by the schedule alone.

    Example:
        >>> WeightDecay({"*": 0.01, "head": 0.1}, skip=("bias", "norm", "embedding"))
        WeightDecay(weight_decay={'*': 0.01, 'head': 0.1}, skip=('bias', 'norm', 'embedding'))
    """

    def __init__(
        self,
        weight_decay: float | Schedule | Mapping[str, float | Schedule],
        *,
        mode: Mode = "decoupled",
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        skip: Kind | Sequence[Kind] = ("bias", "norm"),
        existing: Literal["refuse", "replace"] = "refuse",
        log_penalty: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.weight_decay = _check_decay(weight_decay)
        self.mode = check_choice("mode", mode, MODES)
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self.skip = _check_skip(skip)
        self.existing = check_choice("existing", existing, ("refuse", "replace"))
        self.log_penalty = check_bool("log_penalty", log_penalty)
        decays = self.weight_decay if isinstance(self.weight_decay, dict) else {"*": self.weight_decay}
        self._rules = Rules(repr(self), decays, self.where, self.exclude, self.skip)
        self._values: dict[str, Callable[[int], float]] = {}  # by glob, once the length of the fit is known
        self._selected: dict[int, Decayed] = {}  # in this fit
        self._decays: list[Decays] = []  # one for each optimizer
        self._steps: list[int] | None = None  # that they have taken, by the checkpoint

    # Before a fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_strategies(trainer, repr(self), {**_UNSUPPORTED, **(_UNSUMMED if self.log_penalty else {})})
        refuse_unreachable_parameters(trainer, repr(self))
        if stage != "fit":
            return
        self._selected, self._decays, self._steps = {}, [], None
        try:
            self._rules.select(pl_module)
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):  # which build layers later; `on_fit_start` looks again
                raise

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_up(pl_module)
        for other in callbacks_of(trainer):
            if isinstance(other, WeightDecay) and other is not self and (other.mode == "l1") == (self.mode == "l1"):
                self._check_apart(other, pl_module)
        if set().union(*map(moved_by, trainer.optimizers)).isdisjoint(self._selected):
            msg = (
                f"{self!r} acts at the steps of optimizers, and no optimizer of {type(pl_module).__name__} has any parameter that it "
                "selects. Return one from `configure_optimizers`, or remove the callback."
            )
            raise TrickError(msg)
        for optimizer in trainer.optimizers:
            self._decays_of(optimizer, 0).divide()  # which refuses early what cannot be

    def _look_up(self, module: LightningModule) -> None:
        """Find what decays; what has left the model since is held by no optimizer, or still decays."""
        self._selected.update(self._rules.select(module))

    def _check_apart(self, other: WeightDecay, module: LightningModule) -> None:
        both = [decayed.name for key, decayed in other._rules.select(module).items() if key in self._selected]
        if both:
            msg = f"{self!r} and {other!r} both decay {both[0]!r}. Keep one, or let their `where` and `exclude` tell them apart."
            raise TrickConflictError(msg)

    def _decays_of(self, optimizer: Optimizer, steps: int) -> Decays:
        return Decays(optimizer, self._rules, self.mode, self.existing, self._selected, self._values, steps)

    # During a fit

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._values.update({glob: follow(value, trainer) for glob, value in self._rules.decays.items()})
        self._attach(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer, pl_module)  # layers may have been replaced

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if [id(decays.optimizer) for decays in self._decays] != [id(optimizer) for optimizer in trainer.optimizers]:
            self._attach(trainer, pl_module)
        for decays in self._decays:
            decays.reset()

    def _attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Act on the optimizers and layers that there are now."""
        optimizers, steps = trainer.optimizers, [decays.steps for decays in self._decays] or self._steps
        if steps is None or len(steps) != len(optimizers):
            steps = [trainer.global_step // len(optimizers) for _ in optimizers]
        self._detach()
        self._look_up(module)
        self._decays = [self._decays_of(optimizer, taken) for optimizer, taken in zip(optimizers, steps, strict=True)]
        for decays in self._decays:
            decays.divide()
            decays.attach(partial(self._look_up, module), lambda: self.log_penalty and logs_now(trainer))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer) and self._decays:
            pl_module.log(f"{self.log_prefix}/decay", max(decays.strength for decays in self._decays))
        terms = [each for decays in self._decays for each in decays.take_terms()]
        if terms:
            penalty, added, gradient = (sum(column) for column in zip(*terms, strict=True))
            ratio = math.sqrt(added / gradient) if gradient else math.inf
            pl_module.log_dict({f"{self.log_prefix}/penalty": penalty, f"{self.log_prefix}/ratio": ratio})

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        for decays in self._decays:
            decays.detach()

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {"steps": [decays.steps for decays in self._decays]})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None:
            self._steps = list(entry["steps"])


def _check_decay(value: Any) -> float | Schedule | dict[str, float | Schedule]:
    """Accept a number, a schedule, or a mapping from globs to either."""
    if not isinstance(value, Mapping):
        return _check_rule("weight_decay", value)
    if not value or not all(isinstance(glob, str) and glob for glob in value):
        msg = f"`weight_decay` must map globs over qualified names to decays, such as {{'head.*': 0.1}}, got {dict(value)!r}."
        raise ArgumentError(msg)
    return {str(glob): _check_rule(f"weight_decay[{glob!r}]", each) for glob, each in value.items()}


def _check_rule(name: str, value: Any) -> float | Schedule:
    checked = check_varying(name, value, "[0, ∞)")
    return checked if isinstance(checked, Schedule) else float(checked)


def _check_skip(skip: Kind | Sequence[Kind]) -> tuple[Kind, ...]:
    if not isinstance(skip, Sequence):
        check_choice("skip", skip, KINDS)
    return tuple(check_choice("skip", kind, KINDS) for kind in ([skip] if isinstance(skip, str) else skip))
