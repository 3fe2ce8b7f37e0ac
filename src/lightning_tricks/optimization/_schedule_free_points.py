"""Optimizers that train one point and evaluate another: the three sequences of schedule-free training."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tricks._core.lightning import override
from lightning_tricks._core.strategies import own_part
from lightning_tricks._core.weights import copy_, lerp_, swap_
from lightning_tricks.errors import TrickError
from lightning_tricks.optimization._wrapping import Closure, WrappingOptimizer

__all__ = ["GeneralOptimizer", "PackagedOptimizer", "ScheduleFreeOptimizer"]

_COUNTS: Final = {"schedule_free_steps": 0, "schedule_free_lr": 0.0, "schedule_free_sum": 0.0}  # in a parameter group


class ScheduleFreeOptimizer(WrappingOptimizer):
    """Trains the point y. `eval` lets the parameters hold the average x until `train` gives y back, to the bit.

    The schedulefree package computes y anew from x, which changes it by rounding.
    """

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self.kept: dict[nn.Parameter, Tensor] | None = None  # this rank's parts of y while the parameters hold x
        self.written: list[int] | None = None  # how often each parameter had been written to when it was given y back

    @abstractmethod
    def _beta(self, group: dict[str, Any]) -> float:
        """Return the share β of x in y."""

    @abstractmethod
    def _step(self, closure: Closure | None) -> Any:
        """Take a step from y."""

    @override
    def step(self, closure: Closure | None = None) -> Any:
        if self.kept is not None:
            msg = "Schedule-free training steps from the point y, and the parameters hold the average. Call `optimizer.train()` first."
            raise TrickError(msg)
        return self._step(closure)

    def eval(self) -> None:
        """Let the parameters hold the average x, and keep y aside."""
        if self.kept is None:
            with torch.inference_mode(mode=False):
                averages, self.kept = self.averages(), self.trained()
                copy_([own_part(p.detach()) for p in averages], list(averages.values()))

    def train(self) -> None:
        """Let the parameters hold y."""
        if self.kept is not None:
            with torch.inference_mode(mode=False):
                copy_([own_part(p.detach()) for p in self.kept], list(self.kept.values()))
            self.kept = None
        self.written = self._versions()

    @property
    def overwritten(self) -> bool:
        """Whether somebody has written to the parameters since they were last given y, by loading a checkpoint for instance."""
        return self.kept is None and self.written != self._versions()

    def _versions(self) -> list[int]:
        return [own_part(p)._version for group in self.param_groups for p in group["params"]]

    def averages(self) -> dict[nn.Parameter, Tensor]:
        """Return copies of this rank's parts of x, for the parameters that have moved."""
        if self.kept is not None:
            return {p: own_part(p.detach()).clone() for p in self._moved()}
        moved = self._moved().items()
        # After a fit, Lightning moves the optimizer's state to the CPU.
        return {p: own_part(p.detach()).lerp(own_part(self.state[p]["z"]).to(p.device), 1 - 1 / self._beta(group)) for p, group in moved}

    def trained(self) -> dict[nn.Parameter, Tensor]:
        """Return copies of this rank's parts of y, for the parameters that have moved."""
        if self.kept is not None:
            return {p: y.clone() for p, y in self.kept.items()}
        return {p: own_part(p.detach()).clone() for p in self._moved()}

    def _moved(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Return the parameters that have moved, each with its group."""
        return {p: group for group in self.param_groups for p in group["params"] if "z" in self.state.get(p, ())}


class PackagedOptimizer(ScheduleFreeOptimizer):
    """One of the schedulefree package's optimizers, which is left in training mode all the time."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        for group in self.param_groups:
            group["train_mode"] = True  # without `train`, which leaves empty states, as if there had been a step

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**param_group, "train_mode": True})

    @override
    def _beta(self, group: dict[str, Any]) -> float:
        return float(group["momentum"] if "momentum" in group else group["betas"][0])

    @override
    def _step(self, closure: Closure | None) -> Any:
        return self.inner.step(closure)


class GeneralOptimizer(ScheduleFreeOptimizer):
    """Makes any optimizer schedule-free: it moves z, and this class follows with x and y.

    It takes the steps of the package's ``ScheduleFreeWrapper``. That one writes z into the optimizer's state before the optimizer's first
    step, by which most optimizers take the state for complete, and fail.
    """

    def __init__(self, inner: Optimizer, *, momentum: float, r: float, weight_lr_power: float) -> None:
        super().__init__(inner)
        self.momentum, self.r, self.weight_lr_power = momentum, r, weight_lr_power
        for group in self.param_groups:
            group.update(_COUNTS)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**param_group, **_COUNTS})

    @override
    def _beta(self, group: dict[str, Any]) -> float:
        return self.momentum

    @override
    @torch.no_grad()
    def _step(self, closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        new = {p: p.detach().clone() for _, members in moving for p in members if "z" not in self.state.get(p, ())}
        points = [own_part(p.detach()) for _, members in moving for p in members]
        z = [own_part(new[p] if p in new else self.state[p]["z"]) for _, members in moving for p in members]
        lerp_(points, z, 1 - 1 / self.momentum)  # y becomes x
        swap_(points, z)
        self.inner.step()  # moves z
        swap_(points, z)
        for p, first in new.items():
            self.state[p]["z"] = first  # only now, since optimizers take a parameter for new while its state is empty
        for group, members in moving:
            share = self._share(group)
            points = [own_part(p.detach()) for p in members]
            z = [own_part(self.state[p]["z"]) for p in members]
            lerp_(points, z, share)
            lerp_(points, z, 1 - self.momentum)  # x becomes y
        return loss

    def _share(self, group: dict[str, Any]) -> float:
        """Return the weight of the newest z in the average x: ``k^r η_max^p``, divided by the sum of those of all steps."""
        group["schedule_free_steps"] += 1
        group["schedule_free_lr"] = max(group["schedule_free_lr"], float(group["lr"]))
        weight = group["schedule_free_steps"] ** self.r * group["schedule_free_lr"] ** self.weight_lr_power
        group["schedule_free_sum"] += weight
        return float(weight / group["schedule_free_sum"]) if group["schedule_free_sum"] else 0.0
