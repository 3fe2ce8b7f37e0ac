"""A step of an optimizer that can be left out once its gradients are known, as if it had never been asked for."""

from __future__ import annotations

from functools import update_wrapper
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["GuardedStep"]


class _LeftOut(Exception):  # noqa: N818 - nothing has gone wrong
    """Ends a step from inside its closure."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss


class GuardedStep:
    """Stands in for the `step` of an optimizer, and leaves out those steps whose gradients are rejected.

    Lightning hands forward and backward pass to ``step`` as a closure, which optimizers evaluate before they move anything. A step is
    therefore left out by an exception that the closure raises and that goes no further than here. Hooks that have seen the step begin
    see it end, as one that a gradient scaler has skipped: the optimizer bears a ``found_inf`` of 1. Without a closure, as a gradient
    scaler calls ``step`` once gradients are unscaled and finite, the step is not begun.

    Args:
        optimizer: The optimizer.
        rejects: Tells, when gradients are ready, whether they are rejected. It is asked again at each further evaluation of the closure.
        taken: Is called after a step.
        left_out: Is called after a step was left out.
    """

    def __init__(self, optimizer: Optimizer, rejects: Callable[[], bool], taken: Callable[[], None], left_out: Callable[[], None]) -> None:
        self._optimizer, self._rejects, self._taken, self._left_out = optimizer, rejects, taken, left_out
        self._step, self._before = optimizer.step, vars(optimizer).get("step")
        self._begun: list[Optimizer] = []  # whose hooks have seen the step begin, the outermost first
        self._handles = []
        for layer in _layers(optimizer):
            layer._patch_step_function()  # for an optimizer that does not call its base's constructor; idempotent
            self._handles.append(layer.register_step_pre_hook(lambda begun, *_: self._begun.append(begun)))

        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self._guarded(*args, **kwargs)

        update_wrapper(step, self._step, assigned=())  # takes over the marks by which schedulers know a `step`
        del step.__wrapped__  # type: ignore[attr-defined]
        self._own = MethodType(step, optimizer)  # bound, since schedulers that come later bind what they find
        optimizer.step = self._own  # type: ignore[method-assign]

    def remove(self) -> None:
        """Guard no more."""
        while self._handles:
            self._handles.pop().remove()
        self._rejects = lambda: False  # where somebody has wrapped this in between
        self._taken = lambda: None
        if vars(self._optimizer).get("step") is self._own:
            if self._before is None:
                del self._optimizer.step
            else:
                self._optimizer.step = self._before  # type: ignore[method-assign]

    def _guarded(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        self._begun.clear()
        if closure is None:
            if not self._finds_infinity() and self._rejects():
                self._left_out()
                return None
            result = self._step(**kwargs)
        else:
            try:
                result = self._step(closure=self._followed(closure), **kwargs)
            except _LeftOut as left_out:
                self._end_hooks()
                self._left_out()
                return left_out.loss
        self._taken()
        return result

    def _finds_infinity(self) -> bool:
        """Tell whether a fused optimizer will skip the step by itself, as the gradient scaler bids it."""
        found_inf = getattr(self._optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _followed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def followed() -> Any:
            loss = closure()
            if self._rejects():
                raise _LeftOut(loss)
            return loss

        return followed

    def _end_hooks(self) -> None:
        while self._begun:
            layer: Any = self._begun.pop()
            layer.found_inf = torch.ones(())
            try:
                for hook in list(layer._optimizer_step_post_hooks.values()):
                    hook(layer, (layer,), {})
            finally:
                del layer.found_inf


def _layers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and those that it holds, from the outermost in."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _layers(value)
