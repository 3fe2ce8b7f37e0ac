"""The optimizer and its learning-rate schedule from the callback list.

Which optimizer trains a module is a choice of the experiment rather than of the module. The callback builds it from a recipe and lets
its learning rates follow a schedule, one value for each optimizer step. The module's own `configure_optimizers` is left aside for the
length of a fit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.lightning import (
    STEP_OUTPUT,
    LightningModule,
    Trainer,
    callbacks_of,
    is_rate_finder,
    logs_now,
    override,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_tricks._core.schedule import Schedule, follow
from lightning_tricks._core.strategies import refuse_flat_parameters
from lightning_tricks._core.surgery import Patches
from lightning_tricks.errors import (
    ArgumentError,
    CheckpointError,
    TrickConflictError,
    TrickError,
    UnsupportedOptimizerError,
)
from lightning_tricks.optimization._point_switch import PointSwitch
from lightning_tricks.optimization._recipe import OptimizerRecipe
from lightning_tricks.optimization._schedule_free import is_schedule_free
from lightning_tricks.optimization._wrapping import layers_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from lightning_tricks._core.schedulers import StepScheduler

__all__ = ["OptimizerFactory", "attach"]

_Module = TypeVar("_Module", bound=LightningModule)


class OptimizerFactory(PointSwitch):
    """Build the optimizer from a recipe and schedule its learning rates, in place of the module's `configure_optimizers`.

    Step t is taken with ``η_t = v_t · η`` in each parameter group, where η is the group's base rate, ``v_t`` the schedule's value and t
    the number of optimizer steps taken before.

    Reach for it to compare optimizers and schedules without touching the module, or to get its groups right: weight decay on
    matrices alone, rates per layer, one value of the schedule per optimizer step.

    Args:
        recipe: What optimizer to build, such as ``optim.AdamW(lr=1e-3, weight_decay=0.05)``.
        schedule: What multiplies the base rates, such as ``schedules.Cosine(warmup="5%")``; None = they stay as they are.
        name: Changes the log keys (``optimizer_factory_slow/lr``) and the entry in checkpoints. Two of these callbacks cannot share a
            Trainer, whatever their names.

    Raises:
        ArgumentError: If `recipe` is no recipe, or `schedule` no schedule.
        TrickConflictError: At setup, if another callback also takes over `configure_optimizers`, or, with a schedule, also sets learning
            rates, or, with a schedule-free recipe, also replaces the weights used for evaluation.
        UnsupportedStrategyError: At setup, under FSDP1 with ``use_orig_params=False``, which hides the parameters that groups are
            made of.
        NothingMatchedError: When the optimizer is built, if the module has no trainable parameter, or a glob of the recipe matches none.
        TrickError: When training starts, if the schedule needs the length of a fit that has none, or follows a metric and there is no
            validation; after a validation, if the metric is missing.
        UnsupportedOptimizerError: When the optimizer is built, if there is a schedule and the optimizer has no learning rate.
        CheckpointError: On resuming, if the checkpoint holds the state of another optimizer.

    Note:
        With a recipe that is schedule-free, validation, test, predict and ``checkpoint["state_dict"]`` see the average of the weights, and
        training goes on from where it was, to the bit; `ScheduleFree` says more. The callback then replaces the weights used for
        evaluation, which only one can do.

        The optimizer is built after the strategy has wrapped the module, on the parameters that there are then. The schedule begins
        when training starts, at the Trainer's `global_step`, so a second fit and a resumed one go on where the last ended; its
        lengths are those of the present fit. On resuming, the optimizer's hyperparameters are those of the checkpoint, as everywhere
        in torch. From a checkpoint that was made without this callback, weights and progress are taken over, and the optimizer starts
        anew.

        Under manual optimization, the module steps the schedule itself, once per optimizer step, by ``self.lr_schedulers().step()``.

        Works on a single device, under DDP, FSDP1, FSDP2, DeepSpeed, and with ``torch.compile``.

    References:
        - I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR, 2019, for schedules as multipliers.
        - P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, for warm-up by optimizer steps.

    Example:
        >>> from lightning_tricks import optim, schedules
        >>> OptimizerFactory(optim.SGD(lr=0.1, momentum=0.9), schedule=schedules.Cosine(warmup="5%"))
        OptimizerFactory(recipe=SGD(lr=0.1, momentum=0.9), schedule=Cosine(warmup='5%'))
    """

    def __init__(self, recipe: OptimizerRecipe, *, schedule: Schedule | None = None, name: str | None = None) -> None:
        super().__init__(name)
        if not isinstance(recipe, OptimizerRecipe):
            msg = f"`recipe` must be an optimizer recipe, such as `optim.AdamW(lr=1e-3)`, got {recipe!r}."
            raise ArgumentError(msg)
        if schedule is not None and not isinstance(schedule, Schedule):
            msg = f"`schedule` must be a schedule, such as `schedules.Cosine()`, or None for constant rates, got {schedule!r}."
            raise ArgumentError(msg)
        self.recipe, self.schedule = recipe, schedule
        self._patches = Patches()
        self._module: LightningModule | None = None  # trained last
        self._optimizer: Optimizer | None = None
        self._scheduler: StepScheduler | None = None
        self._entry: dict[str, Any] | None = None  # of the checkpoint that this fit resumes from
        self._begun = 0  # where the schedule stood when training started
        self._rate: float | None = None  # with which the latest batch was trained

    @property
    @override
    def configures_optimizers(self) -> bool:
        return True

    @property
    @override
    def sets_rates(self) -> bool:
        return self.schedule is not None

    @property
    @override
    def evaluation_owner(self) -> bool:
        return is_schedule_free(self.recipe)

    # Before a fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_flat_parameters(trainer, repr(self))
        if self._module is not pl_module:
            rank_zero_info(f"{self!r} takes over `configure_optimizers` of {type(pl_module).__name__}.")
        self._module, self._optimizer, self._scheduler, self._entry = pl_module, None, None, None
        self._patches.wrap(pl_module, "configure_optimizers", lambda _: partial(self._configure, pl_module))
        self._patches.wrap(pl_module, "lr_scheduler_step", lambda step: partial(self._step_schedule, step))

    def _configure(self, module: LightningModule) -> dict[str, Any]:
        self._optimizer = self.recipe.build(module)
        self._check_optimizer()
        if self.schedule is None:
            return {"optimizer": self._optimizer}
        if not self._rates(self._optimizer):
            msg = f"`schedule` must be None for {self.recipe!r}, whose optimizer has no learning rate, got {self.schedule!r}."
            raise UnsupportedOptimizerError(msg)
        self._scheduler = self.schedule._scheduler(self._optimizer)
        scheduler: dict[str, Any] = {"scheduler": self._scheduler, "interval": "step"}
        if module.automatic_optimization:
            scheduler["reduce_on_plateau"] = False  # by Lightning, that is: `on_validation_end` does it
        return {"optimizer": self._optimizer, "lr_scheduler": scheduler}

    def _step_schedule(self, step: Callable[[Any, Any], None], scheduler: Any, metric: Any) -> None:
        """Step our scheduler as it needs to be, whatever the module does with its own."""
        if self._scheduler is not None and scheduler is self._scheduler:
            scheduler.step()
        else:
            step(scheduler, metric)

    # During a fit

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._scheduler is None or self.schedule is None:
            return
        if self._metric is not None and not _validates(trainer):
            msg = f"{self!r} follows {self._metric!r} from validation to validation, and this fit has none. Give it a validation loader."
            raise TrickError(msg)
        searched = any(is_rate_finder(callback) for callback in callbacks_of(trainer))
        if searched and self._scheduler.get_last_lr() != [group["lr"] for group in self._scheduler.optimizer.param_groups]:
            self._scheduler.adopt_rates()
            rank_zero_info(f"{self!r} takes the learning rate that was found for the base rate of every parameter group.")
        self._begun = trainer.global_step if pl_module.automatic_optimization else self._scheduler.position
        self._scheduler.begin(follow(self.schedule, trainer), self._begun)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._optimizer is not None:
            self._rate = max(self._rates(self._optimizer), default=None)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if self._rate is not None and logs_now(trainer):
            pl_module.log(f"{self.log_prefix}/lr", self._rate)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not pl_module.automatic_optimization:
            return
        if self._scheduler is not None and self._metric is not None:
            self._scheduler.step(self._measured(trainer, self._metric))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._scheduler is not None and not pl_module.automatic_optimization and self._scheduler.position == self._begun:
            rank_zero_warn(
                f"The schedule of {self!r} stood still: under manual optimization, {type(pl_module).__name__} must step it after each "
                "optimizer step, by `self.lr_schedulers().step()`."
            )

    @staticmethod
    def _rates(optimizer: Optimizer) -> list[float]:
        """Return the learning rates of the parameter groups that have one."""
        return [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]

    @property
    def _metric(self) -> str | None:
        return None if self.schedule is None else self.schedule.metric

    def _measured(self, trainer: Trainer, metric: str) -> Any:
        """Return a metric's latest value, the same on every rank."""
        value = trainer.callback_metrics.get(metric)
        if value is None:
            found = ", ".join(map(repr, trainer.callback_metrics)) or "none"
            msg = f"{self!r} needs the metric {metric!r} after each validation, and the module has logged {found}. Log it, or name another."
            raise TrickError(msg)
        return trainer.strategy.reduce(torch.as_tensor(value, device=trainer.strategy.root_device), reduce_op="mean")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._patches.undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._patches.undo()

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._module is pl_module and self._optimizer is not None:
            kinds = {"optimizer": _kind_of(self._optimizer), "schedule": type(self.schedule).__name__}
            write_entry(checkpoint, self.state_key, repr(self), {**kinds, **self._pack_points(trainer, pl_module, checkpoint)})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self._entry = read_entry(checkpoint, self.state_key)
        self._check_optimizer()
        if self._entry is not None:
            self._unpack_points(trainer, pl_module, self._entry)
        if self._entry is None and trainer.strategy.lightning_restore_optimizer:
            checkpoint["optimizer_states"] = []
            rank_zero_info(f"The checkpoint was made without {self!r}: weights and progress are taken over, the optimizer starts anew.")
        if self._entry is None or self._entry.get("schedule") != type(self.schedule).__name__:
            checkpoint["lr_schedulers"] = []  # `on_train_start` goes to where the schedule stands

    def _check_optimizer(self) -> None:
        """Refuse an optimizer's state for another kind of optimizer, once both are known."""
        if self._entry is None or self._optimizer is None:
            return
        built, saved = _kind_of(self._optimizer), self._entry.get("optimizer")
        if built != saved:
            msg = (
                f"The checkpoint must hold the state of the optimizer that {self!r} builds, {built}, and holds that of {saved}. "
                f"Resume with {self._entry.get('trick')}, or load the weights alone by `load_from_checkpoint`."
            )
            raise CheckpointError(msg)


def _kind_of(optimizer: Optimizer) -> str:
    """Name an optimizer's class, and those of the optimizers that it wraps."""
    return " around ".join(type(layer).__name__ for layer in layers_of(optimizer))


def _validates(trainer: Any) -> bool:
    return bool(trainer.enable_validation and trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined())


def attach(module: _Module, recipe: OptimizerRecipe, schedule: Schedule | None) -> _Module:
    """Let a module bring an `OptimizerFactory` along, and have the `configure_optimizers` without which no Trainer takes it.

    Raises:
        TrickConflictError: If something has been attached before.
    """
    factory = OptimizerFactory(recipe, schedule=schedule)
    if "configure_optimizers" in vars(module):
        msg = (
            f"{type(module).__name__} has got a `configure_optimizers` of its own already, so {factory!r} cannot be attached. Keep one: "
            "attach to a new module, or `del module.configure_optimizers, module.configure_callbacks` first."
        )
        raise TrickConflictError(msg)
    # Partials of functions of this file, unlike closures, are copied and pickled with the module.
    vars(module)["configure_callbacks"] = partial(_bring, module, module.configure_callbacks, factory)
    vars(module)["configure_optimizers"] = partial(recipe.build, module)  # until the callback sets up
    return module


def _bring(module: LightningModule, configure_callbacks: Callable[[], Any], factory: OptimizerFactory) -> list[Any]:
    own = configure_callbacks()
    others = [each for each in callbacks_of(module.trainer) if isinstance(each, OptimizerFactory) and each is not factory]
    if others:
        msg = f"{others[0]!r} and {factory!r}, which is attached to {type(module).__name__}, both configure its optimizer. Keep one."
        raise TrickConflictError(msg)
    return [*(own if isinstance(own, list | tuple) else [own]), factory]
