"""Which parameters decay by how much, and what is done before each update of an optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_tricks._core.checks import check_in_interval
from lightning_tricks._core.owners import Kind, Owned, owned_parameters
from lightning_tricks._core.schedule import Schedule
from lightning_tricks._core.selection import matches, select_parameters
from lightning_tricks._core.strategies import return_to_shards
from lightning_tricks._core.updates import BeforeUpdate, updating
from lightning_tricks.errors import NothingMatchedError, UnsupportedOptimizerError
from lightning_tricks.optimization._decay import Mode, Terms, add_gradient_, measure, penalty_of, shrink_

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

__all__ = ["Decayed", "Decays", "Rules"]


class Decayed(NamedTuple):
    """A parameter that decays, its first name, and the glob whose rule it follows."""

    parameter: nn.Parameter
    name: str
    glob: str


@dataclass(frozen=True)
class Rules:
    """What decays, by name and by the layers that own it.

    Attributes:
        trick: What the trick calls itself.
        decays: The decay by glob; the last glob that matches wins.
        where: Globs over names.
        exclude: Globs over names that are left out.
        skip: Kinds that are left out.
    """

    trick: str
    decays: Mapping[str, float | Schedule]
    where: str | Sequence[str]
    exclude: str | Sequence[str]
    skip: Sequence[Kind]

    def select(self, module: nn.Module) -> dict[int, Decayed]:
        """Return what decays by identity, frozen parameters included.

        Raises:
            NothingMatchedError: If no trainable parameter does, or one of several globs matches none.
        """
        return_to_shards(module)
        named = [each for each in owned_parameters(module) if _matches(each, self.where) and not _matches(each, self.exclude)]
        decaying = [each for each in named if each.kind not in self.skip and not each.exempt]
        if not any(each.parameter.requires_grad for each in decaying):
            select_parameters(module, self.where, self.exclude, trick=self.trick)  # which raises if names alone leave none
            kinds = ", ".join(f"{kind} ×{count}" for kind, count in Counter(each.kind for each in named).most_common())
            msg = (
                f"{self.trick} found no trainable parameter to decay: those that `where` and `exclude` leave ({kinds}) are frozen, exempt "
                f"by `no_weight_decay`, or left out by `skip={self.skip!r}`. Select others, or skip less."
            )
            raise NothingMatchedError(msg)
        for glob in self.decays:
            if not any(_matches(each, glob) for each in decaying):
                msg = (
                    f"{self.trick}: `weight_decay[{glob!r}]` matched none of the {len(decaying)} parameters that decay. Their names look "
                    f"like {', '.join(repr(each.names[0]) for each in decaying[:3])}."
                )
                raise NothingMatchedError(msg)
        latest_first = list(self.decays)[::-1]
        ruled = ((each, next((glob for glob in latest_first if _matches(each, glob)), None)) for each in decaying)
        return {id(each.parameter): Decayed(each.parameter, each.names[0], glob) for each, glob in ruled if glob is not None}


def _matches(owned: Owned, patterns: str | Sequence[str]) -> bool:
    return any(matches(name, patterns) for name in owned.names)


@dataclass
class Decays:
    """Decays what one optimizer is about to update.

    Attributes:
        optimizer: The optimizer.
        rules: What decays.
        mode: What is done.
        existing: What to do with a decay of the optimizer's own.
        selected: What the rules select, by identity; others may add to it.
        values: The decay by glob, as a function of the steps taken.
        steps: Number of steps taken.
    """

    optimizer: Optimizer
    rules: Rules
    mode: Mode
    existing: Literal["refuse", "replace"]
    selected: Mapping[int, Decayed]
    values: Mapping[str, Callable[[int], float]]
    steps: int = 0
    _terms: list[Terms] = field(default_factory=list)  # measured and not yet taken
    _shares: list[tuple[dict[str, Any], str, list[Tensor]]] = field(default_factory=list)  # parameters by group and glob
    _sizes: list[int] = field(default_factory=list)  # of the groups that were divided
    _lent: list[tuple[dict[str, Any], Any]] = field(default_factory=list)  # groups without their own decay, during a step
    _hooks: list[BeforeUpdate | RemovableHandle] = field(default_factory=list)

    def divide(self) -> None:
        """Divide the optimizer's parameters by group and rule.

        Raises:
            UnsupportedOptimizerError: If the optimizer decays some of them itself, or cannot be decayed so.
        """
        optimizer = updating(self.optimizer)
        self._shares, self._sizes = [], _sizes(optimizer)
        for group in optimizer.param_groups:
            by_glob: dict[str, list[Tensor]] = {}
            for parameter in group["params"]:
                decayed = self.selected.get(id(parameter))
                # A decay that is 0 throughout leaves the optimizer's own alone, unless it is to replace it.
                if decayed and (self.existing == "replace" or self.rules.decays[decayed.glob] != 0):
                    by_glob.setdefault(decayed.glob, []).append(parameter)
            if by_glob:
                self._check(optimizer, group, self.selected[id(next(iter(by_glob.values()))[0])].name)
            self._shares += [(group, glob, parameters) for glob, parameters in by_glob.items()]

    def _check(self, optimizer: Optimizer, group: Mapping[str, Any], name: str) -> None:
        kind, own, lr = type(optimizer).__name__, group.get("weight_decay"), group.get("lr")
        if own and self.existing == "refuse":
            msg = (
                f"{self.rules.trick} must be alone in decaying a parameter, and {kind} decays {name!r} itself by `weight_decay={own!r}`. "
                "Build it with `weight_decay=0`, or pass `existing='replace'`."
            )
            raise UnsupportedOptimizerError(msg)
        why = None
        if isinstance(optimizer, LBFGS):
            why = "evaluates the loss again from where its gradient was taken"
        elif "train_mode" in group:  # of the schedulefree package: parameters hold y, and z is what decays
            why = "moves another point than the one that parameters hold, and decays that by a `weight_decay` of its own"
        elif not isinstance(lr, float | int | Tensor):
            why = f"has `lr={lr!r}`"
        if self.mode == "decoupled" and why is not None:
            msg = f"{self.rules.trick} shrinks weights by the learning rate before an update, and {kind} {why}. Use mode='l2'."
            raise UnsupportedOptimizerError(msg)

    def attach(self, look_up: Callable[[], None], measures: Callable[[], bool]) -> None:
        """Act before each update from now on.

        Args:
            look_up: Adds to what is selected, when the optimizer has got further parameters.
            measures: Tells whether to measure terms at this step.
        """
        optimizer = updating(self.optimizer)

        def follow_groups() -> None:
            if self._sizes != _sizes(optimizer):  # others may add parameters, or divide groups for the length of a step
                look_up()
                self.divide()

        def lend(*_: Any) -> None:
            follow_groups()
            self._lend()

        if self.existing == "replace":
            self._hooks.append(optimizer.register_step_pre_hook(lend))
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._give_back()))

        def act(evaluation: int, scale: float) -> float | None:
            if evaluation == 0:
                self.steps += 1
                follow_groups()
            elif self.mode == "decoupled":
                return None
            return self._decay(optimizer, scale, measuring=evaluation == 0 and measures())

        self._hooks.append(BeforeUpdate(optimizer, act))

    def _decay(self, optimizer: Optimizer, scale: float, *, measuring: bool) -> float | None:
        """Decay what is about to be updated; return the penalty for an optimizer that compares losses."""
        penalty = 0.0 if isinstance(optimizer, LBFGS) else None
        for group, glob, parameters in self._shares:
            value = check_in_interval(f"weight_decay[{glob!r}]", self.values[glob](self.steps - 1), "[0, ∞)")
            ready = [parameter for parameter in parameters if parameter.grad is not None]
            if measuring:
                self._terms.append(measure(ready, value, self.mode, scale))
            if not value:
                continue
            if self.mode == "decoupled":
                shrink_(ready, 1 - group["lr"] * value)
                continue
            sign = -1 if group.get("maximize") else 1  # such an optimizer turns gradients around
            if penalty is not None:
                penalty += sign * penalty_of(ready, value, self.mode)
            add_gradient_(ready, sign * scale * value, self.mode)
        return penalty

    @property
    def strength(self) -> float:
        """The largest decay of the latest step."""
        return max(value(max(0, self.steps - 1)) for value in self.values.values())

    def take_terms(self) -> list[Terms]:
        """Return what has been measured since the last call."""
        taken, self._terms = self._terms, []
        return taken

    def reset(self) -> None:
        """Forget a step that an exception has ended."""
        self._give_back()
        for hook in self._hooks:
            if isinstance(hook, BeforeUpdate):
                hook.reset()

    def detach(self) -> None:
        """Act no more."""
        self._give_back()
        while self._hooks:
            self._hooks.pop().remove()

    def _lend(self) -> None:
        """Take the optimizer's own decay away for the length of a step."""
        for group, *_ in self._shares:
            if group.get("weight_decay"):
                self._lent.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0

    def _give_back(self) -> None:
        while self._lent:
            group, weight_decay = self._lent.pop()
            group["weight_decay"] = weight_decay


def _sizes(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]
