"""Durations, and the moments at which an optimizer has really stepped."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tricks._core.lightning import scheduled_accumulation
from lightning_tricks.errors import ArgumentError, TrickError, UnsupportedOptimizerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning_tricks._core.lightning import Trainer

__all__ = ["Duration", "FitLength", "after_each_engine_step", "after_each_step", "plain_duration"]

_FORM = re.compile(r"(?P<amount>\d+)\s*(?P<unit>steps?|epochs?)|(?P<percent>\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Duration:
    """A length of training: optimizer steps, epochs, or a share of the whole fit."""

    amount: float
    unit: Literal["steps", "epochs", "%"]

    @classmethod
    def parse(cls, name: str, value: int | str, *, least: int = 0) -> Duration:
        """Read an argument: an `int` of steps, or a text such as ``"500 steps"``, ``"3 epochs"``, ``"80%"``.

        Args:
            name: The argument's name, for the error.
            value: What the user wrote.
            least: The smallest amount that makes sense for this argument.

        Raises:
            ArgumentError: If the value is of another form, below `least`, or a share above 100 %.
        """
        duration = None
        if isinstance(value, Integral) and not isinstance(value, bool):
            duration = cls(int(value), "steps")
        elif isinstance(value, str) and (found := _FORM.fullmatch(value.strip())):
            if found["percent"]:
                duration = cls(float(found["percent"]), "%")
            else:
                duration = cls(int(found["amount"]), "steps" if found["unit"].startswith("step") else "epochs")
        if duration is None or not duration._reaches(least):
            msg = (
                f"`{name}` must be an int of optimizer steps, or a text such as '500 steps', '3 epochs' or '80%' "
                f"(at least {least}, at most 100%), got {value!r}."
            )
            raise ArgumentError(msg)
        return duration

    def _reaches(self, least: int) -> bool:
        """Tell whether this is no share above the whole, and at least so many steps or epochs; any share is, but none at all."""
        if self.unit == "%":
            return self.amount <= 100 and (self.amount > 0 or least == 0)
        return self.amount >= least

    def steps(self, name: str, trainer: Trainer) -> int:
        """Convert to optimizer steps once the Trainer knows its data, that is from `on_train_start` on.

        Raises:
            TrickError: If the fit's length is needed and unknown, as with an iterable data set of no length.
        """
        return math.floor(self.of(name, FitLength.of(trainer, [self])) + 1e-9)

    def of(self, name: str, length: FitLength) -> float:
        """Convert to optimizer steps of a fit, fractions included.

        Raises:
            TrickError: If the fit's length is needed and unknown.
        """
        whole = {"steps": 1.0, "epochs": length.steps_per_epoch, "%": length.steps / 100}[self.unit]
        if math.isinf(whole):
            text = f"{self.amount:g}{'' if self.unit == '%' else ' '}{self.unit}"
            msg = (
                f"`{name}='{text}'` needs to know how long training is, and this fit has no known length. "
                "Give a number of steps, or set `max_steps` or `limit_train_batches` of the Trainer."
            )
            raise TrickError(msg)
        return self.amount * length.steps / 100 if self.unit == "%" else self.amount * whole


@dataclass(frozen=True)
class FitLength:
    """The optimizer steps of a fit and of one of its epochs; infinite where unknown."""

    steps: float = math.inf
    steps_per_epoch: float = math.inf

    @classmethod
    def of(cls, trainer: Trainer, durations: Iterable[Duration]) -> FitLength:
        """Ask the Trainer for as much as some durations need, from `on_train_start` on.

        Asked earlier, Lightning would load the training data, and a loader's saved state would not be restored.
        """
        units = {duration.unit for duration in durations}
        if units <= {"steps"}:
            return cls()
        steps = _steps_of_fit(trainer)  # which makes the number of batches known, too
        return cls(steps, _steps_per_epoch(trainer) if "epochs" in units else math.inf)


def _steps_per_epoch(trainer: Trainer) -> float:
    batches = float(trainer.num_training_batches)
    scheduled = set(scheduled_accumulation(trainer).values())
    if len(scheduled) > 1:
        msg = (
            "A duration in epochs needs epochs of equal numbers of steps, and Lightning's GradientAccumulationScheduler changes them. "
            "Give a number of steps, or a share of the fit such as '10%'."
        )
        raise TrickError(msg)
    return batches if math.isinf(batches) else math.ceil(batches / (*scheduled, trainer.accumulate_grad_batches)[0])


def _steps_of_fit(trainer: Trainer) -> float:
    """Steps of one optimizer over the whole fit; `max_steps` counts those of all optimizers together."""
    total, scheduled = float(trainer.estimated_stepping_batches), scheduled_accumulation(trainer)
    if total < 0:  # what Lightning says of data without a length
        return math.inf
    if scheduled and trainer.max_epochs not in {None, -1} and math.isfinite(trainer.num_training_batches):
        # Lightning counts every epoch as the one that it is asked in.
        factors = [scheduled[max(begin for begin in scheduled if begin <= epoch)] for epoch in range(trainer.max_epochs or 0)]
        total = float(sum(math.ceil(trainer.num_training_batches / factor) for factor in factors))
        total = total if trainer.max_steps == -1 else min(total, trainer.max_steps)
    return total / max(1, len(trainer.optimizers)) if total == trainer.max_steps else total


def plain_duration(value: int | str) -> int | str:
    """Return an accepted duration as Python's own type, for a `repr` that evaluates back."""
    return str(value) if isinstance(value, str) else int(value)


class _EngineSteps:
    """Stands in for the `step` of a DeepSpeed engine, and calls its hooks around the steps that are really taken."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._step = engine, engine.step
        self._hooks: dict[int, tuple[Callable[[], None], Callable[[], None]]] = OrderedDict()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        hooks, taken = list(self._hooks.values()), self._taken()
        for before, _ in hooks:
            before()
        result = self._step(*arguments, **options)
        for _, act in hooks if self._taken() > taken else ():
            act()
        return result

    def _taken(self) -> int:
        return int(self._engine.global_steps) - int(self._engine.skipped_steps)

    def register(self, before: Callable[[], None], act: Callable[[], None]) -> RemovableHandle:
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = before, act
        return handle


def after_each_engine_step(engine: Any, act: Callable[[], None], *, before: Callable[[], None]) -> list[RemovableHandle]:
    """Call `act` after each step that a DeepSpeed engine really takes, and `before` before each that it is asked for.

    The engine is asked at every batch; it steps when it has accumulated enough, unless the gradient overflows.
    """
    if not isinstance(engine.step, _EngineSteps):
        engine.step = _EngineSteps(engine)
    return [engine.step.register(before, act)]


def after_each_step(optimizer: Optimizer, act: Callable[[], None], *, before: Callable[[], None] | None = None) -> list[RemovableHandle]:
    """Call `act` after each step that the optimizer really takes, and `before` before each step that it is asked for.

    A step that a gradient scaler skips is none. Fused optimizers skip inside their kernel and tell by ``found_inf``, which is read
    from the device: one synchronization a step, with fused optimizers under fp16 alone.

    Raises:
        UnsupportedOptimizerError: If the optimizer has no step hooks.
    """
    if not isinstance(optimizer, Optimizer):
        msg = (
            f"Steps are counted by a step hook, and {type(optimizer).__name__} has none: it is no `torch.optim.Optimizer`. "
            "Derive it from that class."
        )
        raise UnsupportedOptimizerError(msg)
    # An optimizer that does not call its base's constructor has hooks that nobody calls; this is what unpickling does, and idempotent.
    optimizer._patch_step_function()

    def hook(stepped: Optimizer, *_: Any) -> None:
        found_inf = getattr(stepped, "found_inf", None)
        if found_inf is None or not found_inf.item():
            act()

    handles = [optimizer.register_step_post_hook(hook)]
    if before is not None:
        handles.append(optimizer.register_step_pre_hook(lambda *_: before()))
    return handles
