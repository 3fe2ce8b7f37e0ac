"""Learning rates that differ within a parameter group, for whatever optimizer and scheduler there is."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_tricks._core.updates import updating
from lightning_tricks.errors import UnsupportedOptimizerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

__all__ = ["DividedGroups", "united"]

Group = dict[str, Any]


class DividedGroups:
    """Divides an optimizer's groups by factors of the learning rate for the length of each step.

    Between steps the optimizer has the groups that it was built with: schedulers of any kind set their rates, checkpoints hold them, and
    the state of each parameter stays where it is. Within a step, and for all hooks around it, each group is divided into one for each
    factor, with ``lr`` multiplied by it.

    Args:
        optimizer: The optimizer; of those wrapped around one another, the innermost is divided.
        factors: Factors by the identities of parameters; all others have 1.
        trick: What the trick calls itself.

    Raises:
        UnsupportedOptimizerError: If the optimizer has no step hooks, no learning rate, or takes no several groups.
    """

    def __init__(self, optimizer: Optimizer, factors: Mapping[int, float], trick: str) -> None:
        self._optimizer, self._factors, self._trick = updating(optimizer), factors, trick
        self._depth = 0  # of steps within steps: a subclass's that calls its base's
        self._whole: list[Group] = []
        self._parts: dict[tuple[int, float], Group] = {}  # the same in every step, since others may hold them
        self._lent: list[tuple[Group, dict[float, Group], Group]] = []
        kind, groups = type(self._optimizer).__name__, self._optimizer.param_groups
        if isinstance(self._optimizer, LBFGS):
            msg = f"{trick} gives layers learning rates of their own, and {kind} has one for all. Use another optimizer, or leave them out."
            raise UnsupportedOptimizerError(msg)
        for group in groups:
            if not isinstance(group.get("lr"), float | int | Tensor):
                msg = f"{trick} multiplies learning rates, and {kind} has `lr={group.get('lr')!r}`. Give it one, or leave the factors out."
                raise UnsupportedOptimizerError(msg)
        self._optimizer._patch_step_function()
        before = self._optimizer.register_step_pre_hook(self._divide)
        hooks: Any = self._optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(before.id, last=False)  # all others see the groups as they are in the step
        self._handles = [before, self._optimizer.register_step_post_hook(lambda *_: self._unite())]

    def remove(self) -> None:
        """Divide no more."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def restore(self) -> None:
        """Put the groups back after a step that an exception has ended."""
        if self._whole:
            self._optimizer.param_groups = self._whole
            for group, parts, lent in self._lent:
                if any(part is group for part in parts.values()):
                    group["lr"] = lent["lr"]
        self._depth, self._whole, self._lent = 0, [], []

    @contextmanager
    def united(self) -> Iterator[None]:
        """Show the groups as they were built, within a step, to one who sets their rates; the parts follow."""
        if not self._whole:
            yield
            return
        divided, self._optimizer.param_groups = self._optimizer.param_groups, self._whole
        for group, _, lent in self._lent:
            group["lr"] = lent["lr"]
        try:
            yield
        finally:
            self._optimizer.param_groups = divided
            for group, parts, lent in self._lent:
                lent["lr"] = group["lr"]
                for factor, part in parts.items():
                    part["lr"] = lent["lr"] * factor

    def _divide(self, *_: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        hooks: Any = self._optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._handles[1].id)
        self._whole = self._optimizer.param_groups
        divided: list[Group] = []
        for group in self._whole:
            members: dict[float, list[Tensor]] = {}
            for parameter in group["params"]:
                members.setdefault(self._factors.get(id(parameter), 1.0), []).append(parameter)
            lent = dict(group)
            # A group of one factor is left undivided, with its rate multiplied.
            parts = {factor: self._part(group, factor) if len(members) > 1 else group for factor in members}
            for factor, part in parts.items():
                part.update({**lent, "params": members[factor], "lr": lent["lr"] * factor})
            self._lent.append((group, parts, lent))
            divided += parts.values()
        self._optimizer.param_groups = divided

    def _part(self, group: Group, factor: float) -> Group:
        return self._parts.setdefault((id(group), factor), {})

    def _unite(self) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        lent = self._lent
        after = [[{k: v for k, v in part.items() if k not in {"params", "lr"}} for part in parts.values()] for _, parts, _ in lent]
        rates = [part["lr"] for _, parts, before in lent for factor, part in parts.items() if not _same(part["lr"], before["lr"] * factor)]
        self.restore()
        for (group, _, before), parts_after in zip(lent, after, strict=True):
            for name in sorted({name for part in parts_after for name in part}):
                values = [part.get(name) for part in parts_after]
                if any(not _same(value, values[0]) for value in values[1:]):
                    self._refuse(name)
                if not _same(values[0], before.get(name)):
                    group[name] = values[0]
        if rates:
            self._refuse("lr")

    def _refuse(self, name: str) -> None:
        kind = type(self._optimizer).__name__
        msg = (
            f"{self._trick} gives layers learning rates of their own, and {kind} sets `{name}` of each group at each step, which would "
            "then differ within a group. Leave the factors out, or give layers groups of their own in `configure_optimizers`."
        )
        raise UnsupportedOptimizerError(msg)


def united(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Let an optimizer show its groups as they were built, also within a step for which they are divided."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        divided = getattr(hook, "__self__", None)
        if isinstance(divided, DividedGroups):
            return divided.united()
    return nullcontext()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and bool((one == other).all()))
    return bool(one == other)
