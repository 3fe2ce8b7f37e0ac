"""Draw the first weights of a network anew, by the scheme of choice.

How large the first weights are decides whether signals and gradients keep their size from layer to layer. Each scheme keeps it under
its own assumption about what lies between two layers; LSUV measures instead of assuming.

Sources: X. Glorot and Y. Bengio, "Understanding the Difficulty of Training Deep Feedforward Neural Networks", AISTATS, 2010; K. He,
X. Zhang, S. Ren and J. Sun, "Delving Deep into Rectifiers", ICCV, 2015; Y. LeCun, L. Bottou, G. Orr and K.-R. Müller, "Efficient
BackProp", 1998; A. Saxe, J. McClelland and S. Ganguli, "Exact Solutions to the Nonlinear Dynamics of Learning in Deep Linear Neural
Networks", ICLR, 2014; P. Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, 2017, for branches that begin at zero;
D. Mishkin and J. Matas, "All you need is a good init", ICLR, 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_tricks._core.checkpoint import write_entry
from lightning_tricks._core.checks import check_choice, check_count, check_patterns, check_seed
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, logs_now, override, rank_zero_info
from lightning_tricks._core.loaders import move_batch, training_pass
from lightning_tricks._core.preparing import prepare
from lightning_tricks._core.seeding import seed_of_run
from lightning_tricks._core.strategies import refuse_strategies
from lightning_tricks._core.surgery import Patches, when_built
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import TrickError
from lightning_tricks.normalization._initializing import (
    InitializedModel,
    Options,
    call_with,
    choose,
    first_of,
    run_initialization,
    sign_of_training,
)
from lightning_tricks.normalization._matrices import find_matrices
from lightning_tricks.normalization._schemes import Scheme

__all__ = ["Initialization", "initialize"]

_FUNCTION = "initialize"
_SHARDED = "it measures the outputs of layers as training starts, when weights are spread over ranks; call `functional.initialize` before"
_NO_MEASURING = dict.fromkeys(("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"), _SHARDED)


def initialize(
    model: nn.Module,
    scheme: Scheme,
    *,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    gain: float | None = None,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    std: float = 0.02,
    bias: Literal["zero", "keep"] = "zero",
    residual: Literal["keep", "zero"] = "keep",
    seed: int | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[Any], Any] | None = None,
    tolerance: float = 0.01,
) -> InitializedModel:
    """Draw the weights of linear, convolutional, attention and recurrent layers anew.

    With n inputs of a unit and m units that an input reaches, weights of standard deviation σ are

    - ``"xavier_normal"``, ``"xavier_uniform"``: ``σ = gain · sqrt(2 / (n + m))``;
    - ``"kaiming_normal"``, ``"kaiming_uniform"``: ``σ = gain / sqrt(n)``, the gain that of the activation which the layer's output
      reaches before another layer;
    - ``"lecun_normal"``, ``"lecun_uniform"``: ``σ = 1 / sqrt(n)``;
    - ``"orthogonal"``: orthonormal, times the gain;
    - ``"truncated_normal"``: ``σ = std`` after cutting, embeddings included;
    - ``"lsuv"``: orthonormal, then scaled from the first layer to the last until the variance of each one's output over `batches` is one;
    - ``"keep"``: as they are.

    Args:
        model: The model, which is changed in place.
        scheme: One of these.
        where: Glob or globs over names of layers or weights; None = all.
        exclude: Globs over names that are left alone.
        gain: Factor; None = that of the activation for Kaiming, 1 otherwise.
        mode: Whether Kaiming divides by n (``"fan_in"``, which keeps signals) or m (``"fan_out"``, which keeps gradients).
        std: Standard deviation of ``"truncated_normal"``.
        bias: ``"zero"`` sets the biases of these layers to zero, ``"keep"`` leaves them.
        residual: ``"zero"`` sets the last layer of each residual branch to zero, or the norm after it, so that blocks begin as identities.
        seed: What the draws follow from, at least 0, together with the place of a layer among all; None = torch's random state.
        batches: Batches of any structure, of which a few are enough; needed by LSUV, and for variances in the report of any scheme.
        forward: What to do with a batch; None = call the model with it, or with its first element if it is a tuple or a list.
        tolerance: Largest ``|variance − 1|`` that LSUV leaves.

    Returns:
        A report: ``layers`` by name with gain, activation and the variances of outputs before and after, ``zeroed``, and ``left`` with
        the reasons. It prints as a table.

    Raises:
        ArgumentError: If an argument lies outside its domain, or LSUV has no batches.
        NothingMatchedError: If no layer, or no residual branch, is left to initialize.
        TrickError: If the batches reach no layer.

    Note:
        Activations and branches are found by running a copy of the model without data, on torch's meta device, on an input of the shape
        that `batches`, `example_input_array` or the first layer suggests. Where it does not run, its parts are tried, and then the order
        in which modules were registered. Frozen layers, and weights that are an embedding's, too, are left, and norms keep their values.
        Where ``torch.distributed`` is initialized, all ranks must call this together if batches are given, each with its own.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
        >>> print(initialize(model, "kaiming_normal", seed=0))
        0: gain 1.414 (relu)
        2: gain 1
        >>> report = initialize(model, "lsuv", seed=0, batches=[torch.linspace(-1, 1, 256).view(4, 64)])
        >>> {name: round(layer.after, 4) for name, layer in report.layers.items()}
        {'0': 1.0, '2': 1.0}
    """
    options = Options(scheme, where, exclude, gain, mode, std, bias, residual, tolerance)
    number = int(torch.randint(2**31, (), device="cpu").item()) if seed is None else check_seed(seed)
    return run_initialization(model, options, number, batches, forward or partial(call_with, model), trick=_FUNCTION)


# Models that a fit has begun to train, with the state keys of the tricks that initialized them.
_BEGUN: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class Initialization(Trick):
    """Draw the weights of a model anew before a fit from scratch: ``W ~ (0, σ²)``, σ by a scheme that keeps signals at their size.

    With n inputs of a unit and m units that an input reaches, σ is ``gain · sqrt(2 / (n + m))`` for Xavier, ``gain / sqrt(n)`` for
    Kaiming, whose gain is that of the activation that follows, and ``1 / sqrt(n)`` for LeCun. Reach for it where a deep network does
    not begin to learn, or to give blocks a beginning as identities with ``residual="zero"``.

    Args:
        scheme: ``"xavier_normal"``, ``"kaiming_normal"``, ``"lecun_normal"``, the same with ``_uniform``, ``"orthogonal"``,
            ``"truncated_normal"``, ``"lsuv"``, or ``"keep"`` for weights as they are.
        where: Glob or globs over names of layers or weights, such as those of a new head; None = all layers of a new model.
        exclude: Globs over names that are left alone.
        gain: Factor; None = that of the activation for Kaiming, 1 otherwise.
        mode: Whether Kaiming divides by n (``"fan_in"``, which keeps signals) or m (``"fan_out"``, which keeps gradients).
        std: Standard deviation of ``"truncated_normal"``.
        bias: ``"zero"`` sets the biases of these layers to zero, ``"keep"`` leaves them.
        residual: ``"zero"`` sets the last layer of each residual branch to zero, or the norm after it.
        seed: What the draws follow from, at least 0; None = the seed given to Lightning's ``seed_everything``, or 0.
        batches: Number of training batches of each rank from which LSUV measures.
        tolerance: Largest ``|variance − 1|`` that LSUV leaves.
        pretrained: ``"refuse"`` raises where a model without `where` shows that it has been trained; ``"overwrite"`` draws all the same,
            at the start of each fit that is not resumed.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if no layer, or no residual branch, is left to initialize.
        TrickError: As training starts, if the model has been trained, and neither `where` nor `pretrained` says that this is meant.
        UnsupportedStrategyError: At setup, with ``"lsuv"`` under strategies that shard.

    Note:
        A resumed fit goes on with the weights that it loads. A model stays as it is that a fit with this trick has begun to train. That
        another was trained shows in its norms: scales, shifts and running statistics are the same for all channels until training moves
        them. A trained model without norms cannot be told from a new one; name its new layers by `where`.

        Draws follow from `seed` and the place of a layer, on the CPU, so that they are the same on all ranks and devices. Training
        draws the random numbers that it would have drawn. It happens before the model is sharded; LSUV runs as training starts, with
        variances over the batches of all ranks. The report is kept in ``report``.

    References:
        - X. Glorot and Y. Bengio, "Understanding the Difficulty of Training Deep Feedforward Neural Networks", AISTATS, 2010.
        - K. He, X. Zhang, S. Ren and J. Sun, "Delving Deep into Rectifiers", ICCV, 2015.
        - D. Mishkin and J. Matas, "All You Need Is a Good Init", ICLR, 2016. Differs from it in letting BatchNorm normalize by its batch.

    Example:
        >>> Initialization("kaiming_normal", residual="zero")
        Initialization(scheme='kaiming_normal', residual='zero')
    """

    def __init__(
        self,
        scheme: Scheme,
        *,
        where: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        gain: float | None = None,
        mode: Literal["fan_in", "fan_out"] = "fan_in",
        std: float = 0.02,
        bias: Literal["zero", "keep"] = "zero",
        residual: Literal["keep", "zero"] = "keep",
        seed: int | None = None,
        batches: int = 1,
        tolerance: float = 0.01,
        pretrained: Literal["refuse", "overwrite"] = "refuse",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.options = Options(scheme, where, exclude, gain, mode, std, bias, residual, tolerance)
        self.scheme: Scheme = scheme
        self.where = None if where is None else check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self.gain, self.mode, self.std, self.bias, self.residual, self.tolerance = gain, mode, std, bias, residual, tolerance
        self.seed = None if seed is None else check_seed(seed)
        self.batches = check_count("batches", batches)
        self.pretrained = check_choice("pretrained", pretrained, ("refuse", "overwrite"))
        self.report: InitializedModel | None = None
        self._refusal: str | None = None
        self._patches: list[Patches] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._undo()
        self._refusal = None
        if stage != "fit" or (self.scheme == "keep" and self.residual == "keep"):
            return
        if self.state_key in _BEGUN.get(pl_module, ()) and self.pretrained == "refuse":
            rank_zero_info(f"{self!r} leaves {type(pl_module).__name__} as an earlier fit has trained it.")
            return
        patches = Patches()
        if self.scheme == "lsuv":
            refuse_strategies(trainer, repr(self), _NO_MEASURING)
            patches.also(prepare(trainer, partial(self._measure, trainer, pl_module), turn=3))  # the layers as they will start
        # After every callback's `setup`, so that what others swap is there, whatever the order of the list.
        patches.wrap(pl_module, "setup", lambda own: partial(self._after_setup, pl_module, own))
        self._patches.append(patches)

    def _after_setup(self, module: LightningModule, setup: Callable[[str], None], stage: str) -> None:
        setup(stage)
        self._patches.append(when_built(module, self._operate, trick=repr(self), function=_FUNCTION, creates=False))

    def _operate(self, module: LightningModule) -> None:
        sign = sign_of_training(module)
        if sign and self.where is None and self.pretrained == "refuse":
            self._refusal = (
                f"{self!r} draws all weights anew, and {type(module).__name__} has been trained: {sign}. Name its new layers by `where`, "
                "or pass `pretrained='overwrite'`."
            )
        elif self.scheme == "lsuv":
            choose(module, find_matrices(module), self.options, repr(self))  # an early word where there is nothing to do
        else:
            self._initialize(module, None, partial(call_with, module))

    def _initialize(self, module: LightningModule, batches: Iterable[Any] | None, forward: Callable[[Any], Any]) -> None:
        seed = seed_of_run() if self.seed is None else self.seed
        self.report = run_initialization(module, self.options, seed, batches, forward, trick=repr(self))
        _BEGUN.setdefault(module, set()).add(self.state_key)
        rank_zero_info(f"{self!r} initialized {type(module).__name__}:\n{self.report}")

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        """Run LSUV on training batches, before anybody else sees training start."""

        def forward(batch: Any) -> None:
            batch = move_batch(trainer, module, batch)
            with trainer.precision_plugin.forward_context():
                module(first_of(batch))

        if trainer.ckpt_path is None and self._refusal is None:
            with training_pass(trainer, self.batches) as batches:
                self._initialize(module, batches, forward)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:  # which is not known before; what was drawn has been loaded over
            self.report = None
        elif self._refusal is not None:
            raise TrickError(self._refusal)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer) and self.report is not None:
            pl_module.log(f"{self.log_prefix}/layers", float(len(self.report.layers) + len(self.report.zeroed)))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    def _undo(self) -> None:
        while self._patches:
            self._patches.pop().undo()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {})
