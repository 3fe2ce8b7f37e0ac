"""Learning rates that follow the optimizer steps, whatever schedulers the module has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_tricks._core.clock import after_each_step
from lightning_tricks._core.divided_groups import united
from lightning_tricks.errors import UnsupportedOptimizerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

__all__ = ["CyclicRates"]


class CyclicRates:
    """Multiplies each parameter group's base rate by a function of the steps that the first optimizer has really taken.

    Rates are written before each step, in hooks of the optimizers, so that it does not matter what has written them since; and after
    it, for those who look at them in between.

    Attributes:
        steps: Steps taken by the first optimizer.
        bases: Base rates of each optimizer's groups.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.bases: list[list[float]] = []
        self._optimizers: list[Optimizer] = []
        self._factor: Callable[[int], float | None] | None = None
        self._handles: list[RemovableHandle] = []

    def attach(
        self,
        optimizers: Sequence[Optimizer],
        factor: Callable[[int], float | None] | None,
        *,
        highest: float | None = None,
        found: bool = False,
    ) -> None:
        """Count steps and write rates from here on; without a factor, count only.

        Args:
            optimizers: The optimizers, of which the first is counted.
            factor: What the base rates are multiplied by for the step after that many others; None = they are left alone.
            highest: What the highest base rate becomes; the others keep their ratio to it. None = they stay.
            found: Whether somebody has searched for the rates that groups have now, rather than for those that they were built with.

        Raises:
            UnsupportedOptimizerError: If there is a factor and no rate to multiply, or an optimizer has no step hooks.
        """
        self.detach()
        self._optimizers, self._factor = list(optimizers), factor
        if factor is not None and len(self.bases) != len(optimizers):  # they are those of a checkpoint otherwise
            read = _present_rate if found else _base_rate
            self.bases = [[read(group) for group in optimizer.param_groups] for optimizer in optimizers]
            top = max((rate for rates in self.bases for rate in rates), default=0.0)
            if top <= 0:
                kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
                msg = f"A cyclic learning rate needs base rates above 0, and no parameter group of {kinds} has one. Set `lr`."
                raise UnsupportedOptimizerError(msg)
            if highest is not None:
                self.bases = [[rate * highest / top for rate in rates] for rates in self.bases]
        self._handles += after_each_step(self._optimizers[0], self._count, before=self.write)
        for optimizer in self._optimizers[1:]:
            self._handles += after_each_step(optimizer, self.write, before=self.write)
        self.write()

    def detach(self) -> None:
        """Count no more, and leave the rates as they are."""
        while self._handles:
            self._handles.pop().remove()
        self._optimizers = []

    def follows(self, optimizers: Sequence[Optimizer]) -> bool:
        """Tell whether these are the optimizers that were attached to."""
        return len(optimizers) == len(self._optimizers) and all(a is b for a, b in zip(optimizers, self._optimizers, strict=True))

    def write(self) -> None:
        """Set the rates with which the next step is taken."""
        factor = None if self._factor is None else self._factor(self.steps)
        if factor is None:
            return
        for optimizer, bases in zip(self._optimizers, self.bases, strict=True):
            with united(optimizer):
                bases += [_base_rate(group) for group in optimizer.param_groups[len(bases) :]]  # groups that joined, as thawed layers do
                for group, base in zip(optimizer.param_groups, bases, strict=True):
                    if isinstance(group.get("lr"), Tensor):
                        group["lr"].fill_(base * factor)
                    elif "lr" in group:
                        group["lr"] = base * factor

    @property
    def rate(self) -> float:
        """The highest rate of the first optimizer."""
        return max((float(group["lr"]) for group in self._optimizers[0].param_groups if "lr" in group), default=0.0)

    def pack(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold."""
        return {"steps": self.steps, "bases": [list(rates) for rates in self.bases]}

    def unpack(self, entry: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self.steps, self.bases = int(entry["steps"]), [list(rates) for rates in entry["bases"]]

    def _count(self) -> None:
        self.steps += 1
        self.write()


def _base_rate(group: Mapping[str, Any]) -> float:
    """Return the rate that a group was built with; a scheduler of torch keeps it, and may have set another since."""
    return float(group["initial_lr"]) if "initial_lr" in group else _present_rate(group)


def _present_rate(group: Mapping[str, Any]) -> float:
    return float(group.get("lr", 0.0))
