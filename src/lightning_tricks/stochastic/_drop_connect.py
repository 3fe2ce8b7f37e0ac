"""DropConnect: leave single weights of layers out at random while training.

Dropout sets activations to zero; DropConnect sets weights to zero, which gives a layer many more sub-networks to train. Evaluation
uses all weights, or draws what a layer could have given with masks on from the normal distribution of the same mean and variance.

Source: L. Wan, M. Zeiler, S. Zhang, Y. LeCun and R. Fergus, "Regularization of Neural Networks using DropConnect", ICML, 2013;
S. Merity, N. S. Keskar and R. Socher, "Regularizing and Optimizing LSTM Language Models", ICLR, 2018, for recurrent weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_tricks._core.checks import check_in_interval, check_seed
from lightning_tricks._core.draws import Clock
from lightning_tricks._core.lightning import LightningModule, Trainer, override, rank_zero_info
from lightning_tricks._core.schedule import Schedule, check_varying
from lightning_tricks._core.seeding import seed_of_run
from lightning_tricks._core.surgery import stand_ins
from lightning_tricks.errors import TrickError
from lightning_tricks.stochastic._masked_layers import Masking, check_free
from lightning_tricks.stochastic._random_trick import RandomTrick
from lightning_tricks.stochastic._ticking import Tick, stop_ticking
from lightning_tricks.stochastic._weight_dropping import Averaging, Granularity, Inference, WeightDropping

__all__ = ["DropConnect", "apply_drop_connect", "remove_drop_connect"]

_FUNCTION = "apply_drop_connect"
_STAGES = ("fit", "validate", "test", "predict")


@dataclass(frozen=True)
class Connected:
    """What surgery has done.

    Attributes:
        layers: The layers whose weights are dropped, by name, each with the names of the tensors that are masked.
        left: The layers that were selected and cannot be masked as asked, each with the reason.
    """

    layers: Mapping[str, tuple[str, ...]]
    left: Mapping[str, str]


def apply_drop_connect(
    model: nn.Module,
    rate: float,
    *,
    where: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    kinds: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
    granularity: Granularity = "batch",
    inference: Inference = "mean",
    draws: int = 32,
    mask_bias: bool = False,
    seed: int = 0,
) -> Connected:
    """Let weights of a model be dropped at random while it trains; a second call replaces the first.

    Each forward pass of the model in training mode draws anew. The layers stay the same objects of the same classes with the same keys
    and parameters; the model can be pickled, copied and compiled.

    Args:
        model: The model, which is changed in place.
        rate: Probability of dropping a weight, in [0, 1).
        where: Globs over names of layers, or of what holds them.
        exclude: Globs over names that are left alone.
        kinds: Classes of layers, or their names, such as ``"Linear"``; None = all that can be masked.
        granularity: ``"batch"`` or ``"example"``; see `lightning_tricks.DropConnect`.
        inference: ``"mean"``, ``"gaussian"`` or ``"sample"``.
        draws: Number of draws of ``"gaussian"``.
        mask_bias: Whether biases are masked, too.
        seed: From which all draws follow.

    Returns:
        A report: ``layers``, what is masked of each layer, and ``left``, why others cannot be.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If no layer is found.
        TrickConflictError: If a callback of a running fit drops weights of these layers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> apply_drop_connect(model, 0.5, exclude="2", granularity="example").layers
        {'0': ('weight',)}
    """
    check_in_interval("rate", rate, "[0, 1)")
    masking = Masking(where, exclude, kinds, granularity, inference, draws, mask_bias)
    clock = Clock(check_seed(seed))
    remove_drop_connect(model)
    layers, left = masking.find(model, _FUNCTION)
    droppings = masking.attach(model, layers, rate, clock, owner=_FUNCTION)
    model.register_forward_pre_hook(Tick(clock, _FUNCTION))
    return Connected({each.name: tuple(each.numbers) for each in droppings}, left)


def remove_drop_connect(model: nn.Module) -> None:
    """Let layers compute with all their weights again, as before `apply_drop_connect`; on any other model, nothing happens.

    Layers of `lightning_tricks.nn` stay what they are.

    Raises:
        TrickConflictError: If a callback of a running fit drops weights of this model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> report = apply_drop_connect(model, 0.5)
        >>> remove_drop_connect(model)
        >>> "forward" in vars(model[0])
        False
    """
    droppings = stand_ins(model, WeightDropping)
    check_free({each.name: each.module for each in droppings}, _FUNCTION)
    _detach([*droppings, *stand_ins(model, Averaging)])
    stop_ticking(model, _FUNCTION)


def _detach(held: Sequence[WeightDropping | Averaging]) -> None:
    for each in held:
        each.detach()


class DropConnect(RandomTrick):
    """Leave single weights out at random while training: ``y = (W∘M/(1 − p))x + b``, where M is 0 with probability p, else 1.

    Reach for it where dropout of activations helps, in large linear layers, and for the recurrent weights of LSTMs and GRUs, to which
    dropout cannot be applied at each step.

    Args:
        rate: Probability p of dropping a weight, in [0, 1): a number, or a `Schedule` over optimizer steps.
        where: Glob or globs over qualified names of layers, or of what holds them; a glob matches a whole name or any part of it that
            begins after a dot.
        exclude: Globs over names that are left alone.
        kinds: Classes of layers, or their names: ``"Linear"``, ``"Conv1d"`` to ``"Conv3d"``, ``"LSTM"``, ``"GRU"``, ``"RNN"`` and their
            cells (recurrent weights), ``"MultiheadAttention"`` (all projections), ``"Embedding"`` (single numbers, not rows). None =
            all of these.
        granularity: ``"batch"`` draws one mask for the batch. ``"example"`` draws one for each element of a layer's batch dimension, as
            in the paper, at a cost in memory that does not grow with the batch.
        inference: What evaluation computes. ``"mean"``: the network with all weights. ``"gaussian"``, the paper's moment matching: the
            mean of ``a(u)`` over draws of ``u ~ N(Wx + b, p/(1 − p) · ((W∘W)(x∘x) + b∘b))``, ``b∘b`` with `mask_bias` only, where the
            output goes into a module for the activation a; elsewhere the mean of u. ``"sample"``: with masks, new ones in each
            forward pass, for predictive uncertainty.
        draws: Number of draws of ``"gaussian"``.
        mask_bias: Whether biases are masked, too, as in the paper.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no layer is found.
        TrickConflictError: At setup, if another one drops weights of the same layers.
        TrickError: At setup of an evaluation outside a fit, if `inference` needs a rate and that varies; in training, if
            ``granularity="example"`` meets a packed sequence.

    Note:
        Draws follow from the seed given to Lightning's ``seed_everything``, the rank, the epoch, the step, the batch and the parameter.
        No generator's state is used: a resumed run draws what it would have drawn, and activation checkpointing draws the same masks
        again. A parameter of two layers has one mask. The checkpoint holds plain weights and the seed. ``torch.compile`` makes one
        graph of it, once, also with a `Schedule`; it leaves recurrent layers out by itself.

    References:
        - L. Wan, M. Zeiler, S. Zhang, Y. LeCun and R. Fergus, "Regularization of Neural Networks using DropConnect", ICML, 2013.
          Differs from it in scaling by ``1/(1 − p)`` in training rather than by ``1 − p`` in evaluation.
        - S. Merity, N. S. Keskar and R. Socher, "Regularizing and Optimizing LSTM Language Models", ICLR, 2018.

    Example:
        >>> DropConnect(0.5, where="head", granularity="example", inference="gaussian")
        DropConnect(rate=0.5, where='head', granularity='example', inference='gaussian')
    """

    def __init__(
        self,
        rate: float | Schedule,
        *,
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        kinds: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
        granularity: Literal["batch", "example"] = "batch",
        inference: Literal["mean", "gaussian", "sample"] = "mean",
        draws: int = 32,
        mask_bias: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.rate = check_varying("rate", rate, "[0, 1)")
        self._masking = Masking(where, exclude, kinds, granularity, inference, draws, mask_bias)
        self.where, self.exclude, self.kinds = self._masking.where, self._masking.exclude, self._masking.kinds
        self.granularity, self.inference, self.draws, self.mask_bias = granularity, inference, draws, mask_bias
        self._droppings: list[WeightDropping] = []
        self._activations: list[Averaging] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" or self.inference == "mean":
            return
        if isinstance(self.rate, Schedule):
            msg = (
                f"{self!r} draws in evaluation, and its rate varies over a fit: outside of one it has no value. "
                "Evaluate with a callback that has a number as its rate."
            )
            raise TrickError(msg)
        self._seed = seed_of_run()
        self._begin(pl_module)

    @override
    def attach(self, module: LightningModule) -> None:
        layers, left = self._masking.find(module, repr(self))
        if self.rate == 0:
            return
        rate = 0.0 if isinstance(self.rate, Schedule) else self.rate
        self._droppings = self._masking.attach(module, layers, rate, self._clock, owner=repr(self))
        self._activations = stand_ins(module, Averaging)
        rank_zero_info(f"{self!r} drops {', '.join(layers)}." + "".join(f" Not {name}: {reason}." for name, reason in left.items()))

    @override
    def detach(self) -> None:
        _detach([*self._droppings, *self._activations])
        self._droppings, self._activations = [], []

    @override
    def set_value(self, value: float) -> None:
        for dropping in self._droppings:
            dropping.rate.set(value)
            dropping.ran = False

    @override
    def shares(self) -> Sequence[float]:
        return [share for each in self._droppings if (share := each.dropped) is not None]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self._value is not None
        self.set_value(self._value(max(0, trainer.global_step - 1)))  # for a validation that a resumed fit begins with

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready(pl_module)

    def _ready(self, module: LightningModule) -> None:
        """Look again for layers that were built after `setup`."""
        if self.inference != "mean":
            self._look_again(module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(trainer, batch_idx, dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(trainer, batch_idx, dataloader_idx)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(trainer, batch_idx, dataloader_idx)

    def _evaluate(self, trainer: Trainer, batch_idx: int, dataloader_idx: int) -> None:
        stage = str(trainer.state.fn.value) if trainer.state.fn is not None else "fit"
        step = trainer.global_step if stage == "fit" else 0
        self._clock.set(self._seed, self._rank(trainer), _STAGES.index(stage), step, dataloader_idx, batch_idx)
        for dropping in self._droppings:
            dropping.calls.zero_()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        untaken = [each.name for each in self._droppings if each.spread and not each.taken]
        if untaken:
            rank_zero_info(f"{self!r} evaluated {', '.join(untaken)} with all weights: no module for an activation takes the output.")
        super().teardown(trainer, pl_module, stage)
