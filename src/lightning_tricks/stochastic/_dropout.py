"""Dropout: zero a random share of activations while training, at a rate that may vary.

Sets the rates of the dropout that a model has, or inserts dropout behind modules, for each value, for channels, for sequences with one
mask, and for self-normalizing networks. With dropout left on, several passes at prediction are a sample of a Bayesian posterior.

Sources: N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks
from Overfitting", JMLR, 2014; J. Tompson, R. Goroshin, A. Jain, Y. LeCun and C. Bregler, "Efficient Object Localization Using
Convolutional Networks", CVPR, 2015, for channels; Y. Gal and Z. Ghahramani, "A Theoretically Grounded Application of Dropout in
Recurrent Neural Networks", NeurIPS, 2016, for sequences; G. Klambauer, T. Unterthiner, A. Mayr and S. Hochreiter, "Self-Normalizing
Neural Networks", NeurIPS, 2017, for alpha; P. Morerio, J. Cavazza, R. Volpi, R. Vidal and V. Murino, "Curriculum Dropout", ICCV, 2017,
and S. J. Rennie, V. Goel and S. Thomas, "Annealed Dropout Training of Deep Networks", SLT, 2014, for rates that vary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_choice, check_count, check_in_interval, check_patterns, check_seed
from lightning_tricks._core.draws import Clock, fold
from lightning_tricks._core.lightning import LightningModule, Trainer, callbacks_of, override, rank_zero_info, rank_zero_warn, trainer_of
from lightning_tricks._core.schedule import Schedule, check_varying
from lightning_tricks._core.seeding import seed_of_run
from lightning_tricks.errors import TrickConflictError, TrickError
from lightning_tricks.stochastic._dropout_surgery import Applied, Plan, Surgery, find_after, find_rates, is_compiled
from lightning_tricks.stochastic._masking import KINDS, Kind
from lightning_tricks.stochastic._mc_dropout import MeanOfPasses
from lightning_tricks.stochastic._random_trick import RandomTrick
from lightning_tricks.stochastic._ticking import stop_ticking

__all__ = ["Dropout", "apply_dropout", "remove_dropout"]

_FUNCTION = "apply_dropout"


@dataclass(frozen=True)
class DropoutRates:
    """What surgery has done.

    Attributes:
        rates: The rate of each layer, number and module that was changed, by name.
        before: The rates that layers and numbers of the model had, by name.
        left: What was selected and stays as it is, by name, each with the reason.
    """

    rates: Mapping[str, float]
    before: Mapping[str, float]
    left: Mapping[str, str]


def apply_dropout(
    model: nn.Module,
    rate: float,
    *,
    where: str | Sequence[str] | None = None,
    after: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    kind: Kind | None = None,
    seed: int = 0,
) -> DropoutRates:
    """Set the rates of a model's dropout, or insert dropout behind some of its modules; a second call replaces the first.

    What a model has of dropout is found as follows: layers of torch's family (`nn.Dropout`, `nn.Dropout1d` to `3d`, `nn.AlphaDropout`,
    `nn.FeatureAlphaDropout`) and of classes derived from them; and numbers with the names that libraries give to rates of dropout
    (``dropout``, ``attention_dropout``, ``dropout_p``, ``attn_drop``, ``drop_rate`` and the like), kept by modules with a method that
    reads the number and ``training``: `nn.MultiheadAttention`, `nn.LSTM` and `nn.GRU` of several layers, attention of transformers,
    modules that call `F.dropout` themselves. Rates that stand in configurations only are not found. `DropPath` is stochastic depth.

    Args:
        model: The model, which is changed in place; its keys stay, and it can be pickled and copied.
        rate: Probability of dropping, in [0, 1).
        where: Globs over names of what has dropout, or of what holds it; None = all. With `after`, over names of modules.
        after: Globs over names of modules, or names of their classes, behind which dropout is inserted: of what lies within each other,
            the outermost. None = none is inserted.
        exclude: Globs over names that are left alone.
        kind: What is dropped, as in the callback.
        seed: What the draws of inserted layers follow from, at least 0; each forward pass of the model in training mode draws anew.

    Returns:
        A report: ``rates`` by name, ``before``, the rates that the model had, and ``left``, what cannot be changed.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If nothing is selected.
        TrickConflictError: If a callback of a running fit drops at the same layers.
        TrickError: With ``kind="variational"``, if layers disagree on where the sequence is.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1))
        >>> apply_dropout(model, 0.3).before
        {'2': 0.1}
        >>> apply_dropout(model, 0.2, after="GELU").rates
        {'1': 0.2}
        >>> remove_dropout(model)
        >>> model[2].p
        0.1
    """
    check_in_interval("rate", rate, "[0, 1)")
    where, after, exclude, kind = _check(where, after, exclude, kind)
    clock = Clock(check_seed(seed))
    plan = _find(model, where, after, exclude, kind, varying=False, trick=_FUNCTION)
    remove_dropout(model)
    before = {name: number.value for name, number in plan.numbers.items()}
    before |= {name: float(getattr(module, "p", 0.0)) for name, (module, _) in plan.layers.items() if plan.replaces}
    if not _is_neutral(rate, plan):
        surgery = Surgery(model, plan, clock=clock, owner=_FUNCTION)
        surgery.set_rate(rate)
        model.register_forward_pre_hook(Applied(surgery, clock, _FUNCTION))
    return DropoutRates(dict.fromkeys([*plan.numbers, *plan.layers], rate), before, plan.left)


def remove_dropout(model: nn.Module) -> None:
    """Put a model's dropout back as it was before `apply_dropout`; on any other model, nothing happens.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.1))
        >>> report = apply_dropout(model, 0.5)
        >>> remove_dropout(model)
        >>> model[0].p
        0.1
    """
    for applied in stop_ticking(model, _FUNCTION):
        assert isinstance(applied, Applied)
        applied.surgery.undo()


_Where = str | tuple[str, ...]


def _check(where: Any, after: Any, exclude: Any, kind: Any) -> tuple[_Where | None, _Where | None, _Where, Kind | None]:
    where, after = (
        None if value is None else check_patterns(name, value, empty=False) for name, value in (("where", where), ("after", after))
    )
    return where, after, check_patterns("exclude", exclude, empty=True), check_choice("kind", kind, (None, *KINDS))


def _find(
    model: nn.Module, where: _Where | None, after: _Where | None, exclude: _Where, kind: Kind | None, *, varying: bool, trick: str
) -> Plan:
    if after is None:
        return find_rates(model, where, exclude, kind, varying=varying, trick=trick)
    return find_after(model, after, where, exclude, kind or "element", trick=trick)


def _is_neutral(rate: float | Schedule, plan: Plan) -> bool:
    return rate == 0 and not plan.replaces and not plan.numbers


class Dropout(RandomTrick):
    """Drop activations at random while training: ``y = x · b / (1 − p)``, where ``b`` is 1 with probability ``1 − p``, else 0.

    Sets the rates of the dropout that a model has, or with `after` inserts dropout behind modules, without new keys. Evaluation uses
    the plain network, whose output is the expectation of each layer's. Reach for it to tune or schedule regularization from outside of
    the model.

    Args:
        rate: Probability p of dropping, in [0, 1): a number, or a `Schedule` over optimizer steps, such as one that grows from zero
            (curriculum dropout) or falls to zero (annealed dropout).
        where: Globs over names of layers of dropout and of rates, or of modules that hold them, as listed at
            `functional.apply_dropout`; None = all. With `after`, globs over names of the modules.
        after: Globs over names of modules, or names of their classes, behind whose output dropout is inserted; each must match. None =
            none is inserted.
        exclude: Globs over names that are left alone.
        kind: What is dropped: ``"element"``, each value by itself; ``"channel"``, along dimensions 0 and 1 of the input, sharing a mask
            along the others; ``"variational"``, sharing a mask over the sequence, along all dimensions but the batch and the last;
            ``"alpha"``, which sets values to the ``−λα`` of SELU and keeps mean 0 and variance 1; ``"channel_alpha"``, the same for
            channels. None = as a layer does by itself, and ``"element"`` where inserted.
        samples: Number T of passes with dropout on of which `trainer.predict`, `test` and `validate` take the mean of what the module's
            `forward` gives; None = the plain network. Validation during a fit uses the plain network.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if nothing is selected.
        TrickConflictError: At setup, if another callback sets the same rates or drops at the same modules, or asks for `samples`, too.
        TrickError: At setup, if numbers are to vary in a compiled model; in training, if a module's output has no tensor of floats.

    Note:
        Layers of the model that keep their kind and a constant rate draw by themselves from torch's generator: such a run resumes as
        exactly as the plain run. Inserted layers, and those stood in for because their rate or kind changes, draw from the seed
        given to Lightning's ``seed_everything``, the rank, the epoch, the step, the batch and the layer's name, so that a resumed run
        draws what it would have drawn, and no generator's state is used. A module that is called several times in a batch uses the
        same mask each time, as Gal & Ghahramani ask for recurrent cells. Their probabilities are rounded to 1/65536.

        Inserted layers compile to one graph whatever the rate. Numbers that modules hand to functions, such as the dropout of
        `nn.MultiheadAttention`, would compile anew at each value, so that a `Schedule` for them in a compiled model is refused.

        The checkpoint holds plain weights, the seed and the latest rate, with which `samples` are drawn if `rate` is a `Schedule`.

    References:
        - N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks
          from Overfitting", JMLR, 2014. Differs from it in scaling in training rather than at test time.
        - Y. Gal and Z. Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NeurIPS, 2016.
          Differs from it in masking what layers give, and not the recurrent connections within a layer of torch's.
        - G. Klambauer, T. Unterthiner, A. Mayr and S. Hochreiter, "Self-Normalizing Neural Networks", NeurIPS, 2017.
        - P. Morerio, J. Cavazza, R. Volpi, R. Vidal and V. Murino, "Curriculum Dropout", ICCV, 2017.

    Example:
        >>> Dropout(0.1, after="GELU", kind="channel")
        Dropout(rate=0.1, after='GELU', kind='channel')
    """

    def __init__(
        self,
        rate: float | Schedule,
        *,
        where: str | Sequence[str] | None = None,
        after: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        kind: Kind | None = None,
        samples: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.rate = check_varying("rate", rate, "[0, 1)")
        self.where, self.after, self.exclude, self.kind = _check(where, after, exclude, kind)
        self.samples = None if samples is None else check_count("samples", samples)
        self._places: dict[tuple[int, bool], str] = {}
        self._surgery: Surgery | None = None
        self._passes: MeanOfPasses | None = None
        self._latest: float | None = None if isinstance(self.rate, Schedule) else self.rate

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for other in self._others(trainer):
            if other.samples is not None and self.samples is not None:
                msg = f"{other!r} and {self!r} both take the mean of samples, of the same passes. Pass `samples=None` to one."
                raise TrickConflictError(msg)
        super().setup(trainer, pl_module, stage)

    def _others(self, trainer: Trainer | None) -> list[Dropout]:
        return [each for each in (callbacks_of(trainer) if trainer else ()) if isinstance(each, Dropout) and each is not self]

    @override
    def attach(self, module: LightningModule) -> None:
        varying = isinstance(self.rate, Schedule)
        plan = _find(module, self.where, self.after, self.exclude, self.kind, varying=varying, trick=repr(self))
        for other in self._others(trainer_of(module)):
            for place in plan.places.keys() & other._places.keys():
                msg = f"{other!r} and {self!r} both drop at {plan.places[place]!r}. Keep one, or `exclude` it from one."
                raise TrickConflictError(msg)
        if varying and plan.numbers and is_compiled(module):
            msg = (
                f"{self!r} changes {', '.join(map(repr, plan.numbers))}, rates that are handed to functions, and compiled code would be "
                "compiled anew at each value. Give a constant rate, or `exclude` them."
            )
            raise TrickError(msg)
        self._places = plan.places
        if _is_neutral(self.rate, plan):
            return
        self._surgery = Surgery(module, plan, clock=self._clock, owner=repr(self))
        if self._latest is not None:
            self._surgery.set_rate(self._latest)
        left = "".join(f" Not {name}: {reason}." for name, reason in plan.left.items())
        rank_zero_info(f"{self!r} drops at {', '.join([*plan.numbers, *plan.layers])}.{left}")

    @override
    def detach(self) -> None:
        if self._passes is not None:
            self._passes.detach()
        if self._surgery is not None:
            self._surgery.undo()
        self._places, self._surgery, self._passes = {}, None, None

    @override
    def set_value(self, value: float) -> None:
        self._latest = value
        if self._surgery is not None:
            self._surgery.set_rate(value)

    @override
    def shares(self) -> Sequence[float]:
        maskings = self._surgery.maskings if self._surgery is not None else ()
        return [share for each in maskings if (share := each.dropped) is not None]

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        idle = [each.name for each in (self._surgery.maskings if self._surgery is not None else ()) if not each.ran]
        if idle and trainer.current_epoch == 0:
            rank_zero_warn(f"{self!r} drops at {', '.join(idle)}, and no training batch of the first epoch went through.")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {"seed": self._seed, "rate": self._latest})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        entry = read_entry(checkpoint, self.state_key)
        if isinstance(self.rate, Schedule) and entry is not None:
            self._latest = entry["rate"]

    # Several passes at prediction

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, module: LightningModule) -> None:
        if all(each.samples is None for each in (self, *self._others(trainer))):
            return
        if self._latest is None:
            msg = f"{self!r} draws samples at the rate that training has reached, and has seen none. Fit first, or give `ckpt_path`."
            raise TrickError(msg)
        self._undo()
        self._do(module)
        if self.samples is not None:
            seed = fold(seed_of_run(), self._rank(trainer))
            self._passes = MeanOfPasses(module, self.samples, seed=seed, owner=repr(self))
            self._passes.attach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._passes is not None and not self._passes.calls:
            rank_zero_warn(
                f"{self!r} replaces what `forward` of {type(pl_module).__name__} gives, and nothing called it. Call it in the steps."
            )
        super().teardown(trainer, pl_module, stage)
