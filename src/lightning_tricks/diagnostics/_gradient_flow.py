"""Gradient flow: what passes through a network, forward and back, and how far each step moves the weights.

A network that does not learn shows why in a few numbers per layer. Gradients that shrink from layer to layer do not reach the first
ones; updates that are tiny beside the weights, or larger than them, mean a wrong learning rate; rectifiers that are zero for every
sample have no gradient at all.

Source: X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS, 2010; R. Pascanu,
T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML, 2013.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from torch import Tensor, nn

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_bool, check_choice, check_in_interval, check_patterns
from lightning_tricks._core.clock import Duration, after_each_step, plain_duration
from lightning_tricks._core.exhibits import Exhibits
from lightning_tricks._core.lightning import (
    STEP_OUTPUT,
    LightningModule,
    Trainer,
    defines,
    logs_now,
    override,
    rank_zero_info,
    rank_zero_warn,
    wrapped,
)
from lightning_tricks._core.selection import matches, select_parameters
from lightning_tricks._core.shards import find_shards
from lightning_tricks._core.strategies import moved_by, plain_name, refuse_flat_parameters, refuse_strategies
from lightning_tricks._core.trick import Trick
from lightning_tricks._core.updates import BeforeUpdate, updating
from lightning_tricks.diagnostics._activations import ACTIVATIONS, ActivationProbe
from lightning_tricks.diagnostics._flow_history import QUANTITIES, FlowHistory, Quantity
from lightning_tricks.diagnostics._flow_record import layer_of, layers_of, rows_of, shown, sizes_of, summary_of
from lightning_tricks.diagnostics._flow_verdict import FlowJudge, Limits
from lightning_tricks.diagnostics._heat_map import draw_heat_map, need_matplotlib
from lightning_tricks.diagnostics._pictures import show_picture
from lightning_tricks.diagnostics._step_norms import StepNorms
from lightning_tricks.errors import NothingMatchedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from lightning_tricks._core.shards import Shards

__all__ = ["GradientFlow"]

_SHOWN: Final[tuple[Quantity, ...]] = ("grad_norm", "update_ratio")
_UNSUPPORTED = {"DeepSpeedStrategy": "the engine keeps its own copies of weights and gradients and updates them by itself"}


class GradientFlow(Trick):
    """Record norms of gradients, weights and updates and statistics of activations per layer, warn, and draw a heat map.

    At recorded steps, for each layer that owns trainable parameters θ with the gradient g and the update Δθ of the whole step:
    ``‖g‖``, ``‖θ‖``, ``‖Δθ‖`` and ``‖Δθ‖/‖θ‖``; and of its output, and that of ReLU, ReLU6, Sigmoid and Tanh modules, mean, standard
    deviation, share of dead units and share of saturated values. Reach for it when a network does not learn, or diverges. A ratio
    ``‖Δθ‖/‖θ‖`` of about 1e-3 is a common rule of thumb for a learning rate that fits.

    Training is as without it, to the bit.

    Args:
        every: Time between two records: optimizer steps, or a text such as ``"1 epoch"``. Steps number 1, `every`, 2·`every`, ... are
            recorded. All other steps cost some counting in Python.
        where: Glob or globs over qualified names of layers or parameters.
        exclude: Globs over names that are left out.
        activations: Whether to measure outputs, by hooks that are there in recorded steps alone.
        report: What is logged: ``"summary"``, smallest, median and largest of layers, or ``"layers"``, every quantity of every layer.
        heat_map: The quantity that is drawn over layers and steps when the fit ends, in whatever way; False = no picture, and no need of
            matplotlib.
        vanishing: Warn of layers whose gradient has a root mean square below this share of the largest layer's, in two records in a
            row, in [0, 1].
        exploding: Warn when the norm of the whole gradient exceeds this multiple of the median of all earlier records, of which there
            must be three, in [1, ∞).
        dead: Warn of layers with a larger share of dead units than this, in [0, 1].
        saturated: Warn of layers with a larger share of saturated values than this, in [0, 1].
        name: Tells several of them apart, in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        MissingPackageError: At setup, if a heat map is wanted and matplotlib is not installed.
        NothingMatchedError: At setup, if no trainable parameter is selected.
        UnsupportedStrategyError: At setup, under DeepSpeed, and under FSDP1 with ``use_orig_params=False``.
        UnsupportedOptimizerError: When the fit starts, if an optimizer is no ``torch.optim.Optimizer``.

    Note:
        Gradients are those that the optimizer uses: accumulated, reduced over ranks, unscaled, clipped, and as wrappers of `optim`
        have changed them. A step that the gradient scaler skips is none. Each optimizer's steps are counted by themselves, and
        records bear the number of the first one's. Each thing is warned of once a fit. Values that are not finite are warned of when
        a recorded step meets them, with the first layer in the forward and in the backward pass; ``every=1`` finds the step at which
        they begin.

        Under DDP, activations and warnings are those of rank zero. Under FSDP2, tensor parallelism and FSDP1, norms are those of whole
        tensors. Compiled modules run no hooks: norms are measured, their activations are not. Activations that are functions, such as
        ``torch.relu``, are seen as part of no module. Steps in which nothing that is selected trains, since another callback freezes it,
        are not recorded. The checkpoint holds all records as one tensor. Recorded steps need memory for a copy of the weights.

    References:
        - X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS, 2010. Layers'
          gradients, activations and saturation over training.
        - R. Pascanu, T. Mikolov and Y. Bengio, "On the difficulty of training recurrent neural networks", ICML, 2013. Vanishing and
          exploding gradients.
        - L. Lu, Y. Shin, Y. Su and G. E. Karniadakis, "Dying ReLU and Initialization: Theory and Numerical Examples", Communications in
          Computational Physics, 2020. Dead units.

        The papers define these things, and give no numbers from which on they do harm: the limits are ours.

    Example:
        >>> GradientFlow(every="1 epoch", exclude="head", heat_map="update_ratio")
        GradientFlow(every='1 epoch', exclude='head', heat_map='update_ratio')
    """

    def __init__(
        self,
        *,
        every: int | str = 100,
        where: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        activations: bool = True,
        report: Literal["summary", "layers"] = "summary",
        heat_map: Quantity | Literal[False] = "grad_norm",
        vanishing: float = 1e-5,
        exploding: float = 100.0,
        dead: float = 0.5,
        saturated: float = 0.5,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._duration = Duration.parse("every", every, least=1)
        self.every = plain_duration(every)
        self.where = check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self.activations = check_bool("activations", activations)
        self.report = check_choice("report", report, ("summary", "layers"))
        self.heat_map = check_choice("heat_map", heat_map, (*QUANTITIES, False))
        self.vanishing = check_in_interval("vanishing", vanishing, "[0, 1]")
        self.exploding = check_in_interval("exploding", exploding, "[1, ∞)")
        self.dead = check_in_interval("dead", dead, "[0, 1]")
        self.saturated = check_in_interval("saturated", saturated, "[0, 1]")
        self._interval, self._folder = 1, Path()
        self._optimizers: list[Optimizer] = []
        self._hooks: list[BeforeUpdate | RemovableHandle] = []
        self._trained: set[str] = set()  # names of what has required gradients when the fit began
        self._forget()

    def _forget(self) -> None:
        self._history = FlowHistory()
        self._judge = FlowJudge(Limits(self.vanishing, self.exploding, self.dead, self.saturated))
        self._taken: list[int] = []
        self._norms: dict[int, StepNorms] = {}
        self._measured: list[tuple[StepNorms, Tensor]] = []
        self._probe: ActivationProbe | None = None
        self._unlogged: dict[str, float] = {}

    # What was recorded

    @property
    def layers(self) -> list[str]:
        """The layers and activations that were recorded, in the order of definition."""
        return list(self._history.layers)

    @property
    def steps(self) -> list[int]:
        """The steps that were recorded; the first step has the number 1."""
        return list(self._history.steps)

    def table(self, quantity: Quantity) -> Tensor:
        """Return a quantity of all `layers`, in rows, at all `steps`, in columns; NaN where there is nothing to measure."""
        return self._history.table(check_choice("quantity", quantity, QUANTITIES))

    # Before a fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_strategies(trainer, repr(self), _UNSUPPORTED)
        refuse_flat_parameters(trainer, repr(self))
        if self.heat_map:
            need_matplotlib(f"{self!r} draws a heat map, which `heat_map=False` leaves out. It")
        self._detach()
        self._forget()
        try:
            self._select(pl_module)
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):
                raise

    def _select(self, module: nn.Module) -> dict[str, nn.Parameter]:
        selected = select_parameters(module, self.where, self.exclude, trick=type(self).__name__)
        return {name: parameter for name, parameter in selected.items() if parameter.requires_grad}

    def _training(self, module: nn.Module, trained: Collection[str] = ()) -> dict[str, nn.Parameter]:
        """Return what is selected and trains now, which may be nothing while others freeze it, and what has been known to train."""
        named = ((plain_name(name), parameter) for name, parameter in module.named_parameters())
        training = {name: parameter for name, parameter in named if parameter.requires_grad or name in trained}
        return {name: each for name, each in training.items() if matches(name, self.where) and not matches(name, self.exclude)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = set(self._select(pl_module))
        self._interval = max(1, self._duration.steps("every", trainer))
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._attach(trainer, pl_module)

    def _attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Be told of the steps of the optimizers that there are now."""
        self._detach()
        self._optimizers = list(trainer.optimizers)
        if len(self._taken) != len(self._optimizers):
            self._taken = [trainer.global_step // len(self._optimizers) for _ in self._optimizers]
        for index, optimizer in enumerate(self._optimizers):
            self._hooks.append(BeforeUpdate(updating(optimizer), partial(self._before, module, index)))
            self._hooks += after_each_step(optimizer, partial(self._after, index))

    def _detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._stop_watching()
        self._norms.clear()

    # During a step

    def _due(self, index: int) -> bool:
        """Tell whether an optimizer's next step is to be recorded."""
        step = self._taken[index] + 1
        return step == 1 or step % self._interval == 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if [id(each) for each in self._optimizers] != [id(each) for each in trainer.optimizers]:
            self._attach(trainer, pl_module)
        if self.activations and any(map(self._due, range(len(self._optimizers)))):
            self._probe = ActivationProbe(self._watched(pl_module))
            self._probe.attach()

    def _watched(self, module: LightningModule) -> dict[str, nn.Module]:
        """Return the modules whose outputs are measured: those that own parameters, and activations."""
        owners = {layer_of(name) for name in self._training(module, self._trained)}  # the same whoever freezes them before or after
        watched = {}
        for name, child in module.named_modules():
            plain = plain_name(name)
            chosen = isinstance(child, ACTIVATIONS) and matches(plain, self.where) and not matches(plain, self.exclude)
            if shown(plain) in owners or chosen:
                watched[shown(plain)] = child
        return watched

    def _before(self, module: LightningModule, index: int, evaluation: int, scale: float) -> None:
        if not self._due(index):
            return
        if evaluation == 0:
            moved, shards = moved_by(self._optimizers[index]), find_shards(wrapped(module))
            tensors: dict[str, Tensor | Shards] = {
                name: shards.get(id(each), each) for name, each in self._training(module).items() if id(each) in moved
            }
            self._norms[index] = StepNorms(tensors)
        if self._norms[index].tensors:
            self._norms[index].before(scale)

    def _after(self, index: int) -> None:
        self._taken[index] += 1
        norms = self._norms.pop(index, None)
        if norms is not None and norms.tensors:
            self._measured.append((norms, norms.after()))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        found = self._stop_watching()
        if self._measured:
            self._record(pl_module, found)
        if self._unlogged and logs_now(trainer):
            pl_module.log_dict({f"{self.log_prefix}/{key}": value for key, value in self._unlogged.items()})
            self._unlogged = {}

    def _stop_watching(self) -> dict[str, Tensor]:
        probe, self._probe = self._probe, None
        return {} if probe is None else probe.detach()

    def _record(self, module: LightningModule, found: Mapping[str, Tensor]) -> None:
        measured, self._measured = self._measured, []
        places = {shown(name): place for place, (name, _) in enumerate(module.named_modules())}
        rows, step = rows_of(measured, found, places), self._taken[0]
        self._history.add(step, rows)
        self._unlogged = layers_of(rows) if self.report == "layers" else summary_of(rows)
        for text in self._judge.judge(rows, sizes_of(norms for norms, _ in measured), list(found)):
            rank_zero_warn(f"{self!r}, at step {step}: {text}.")

    # After a fit

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _end(self, trainer: Trainer) -> None:
        self._detach()
        if not self.heat_map or not self._history.steps or not trainer.is_global_zero:
            return
        path, table = self._folder / f"{self.log_prefix}.png", self.table(self.heat_map)
        if table.isnan().all():
            rank_zero_info(f"{self!r} has nothing to draw: no layer has a {self.heat_map!r}.")
            return
        draw_heat_map(table, self.layers, self.steps, self.heat_map, path)
        for logger in trainer.loggers:
            show_picture(logger, f"{self.log_prefix}/{self.heat_map}_heat_map", path, trainer.global_step)

    @override
    def _exhibits(self) -> Exhibits:
        tables = {quantity: self.table(quantity) for quantity in _SHOWN if quantity != self.heat_map}  # which is shown without being asked
        figures: dict[str, Callable[[Path], None]] = {
            f"{quantity}_heat_map": partial(draw_heat_map, table, self.layers, self.steps, quantity)
            for quantity, table in tables.items()
            if not table.isnan().all()
        }
        return Exhibits(goals={"grad_norm": "max", "dead_max": "max", "saturated_max": "max"}, figures=figures)

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(
            checkpoint,
            self.state_key,
            repr(self),
            {"taken": list(self._taken), "unlogged": dict(self._unlogged), **self._history.state_dict()},
        )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None:
            self._taken = list(entry["taken"])
            self._unlogged = dict(entry["unlogged"])
            self._history.load_state_dict(entry)
            self._judge.totals = self._history.table("grad_norm").nan_to_num(posinf=0.0).norm(dim=0).tolist()
