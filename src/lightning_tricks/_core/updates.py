"""The moment when gradients are ready and no weight has changed yet: after backward, unscaling and clipping, before the update."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from lightning_tricks._core.strategies import moved_by
from lightning_tricks.errors import UnsupportedOptimizerError

if TYPE_CHECKING:
    from collections.abc import Callable

    Act = Callable[[int, float], float | None]

__all__ = ["BeforeUpdate", "updating"]


def updating(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that makes the update: of optimizers wrapped around one another, the innermost.

    Wrappers such as SAM evaluate a gradient elsewhere, and return to the weights before they let the wrapped optimizer step.

    Raises:
        UnsupportedOptimizerError: If the optimizer has no step hooks.
    """
    if not isinstance(optimizer, Optimizer):
        msg = (
            f"Acting before an update needs a step hook, and {type(optimizer).__name__} has none: it is no `torch.optim.Optimizer`. "
            "Derive it from that class."
        )
        raise UnsupportedOptimizerError(msg)
    wrapped = [value for value in vars(optimizer).values() if isinstance(value, Optimizer) and moved_by(value) == moved_by(optimizer)]
    return updating(wrapped[0]) if len(wrapped) == 1 else optimizer


class BeforeUpdate:
    """A step hook that acts whenever gradients are ready for an update that is really made.

    Lightning hands forward pass, backward pass and clipping to ``step`` as a closure, which runs after all step pre-hooks. This hook
    therefore replaces the closure by one that acts afterwards. A gradient scaler calls ``step`` without a closure, and only with
    gradients that are unscaled, clipped and finite; so may a user. Then the hook itself is the moment.

    Fused optimizers skip steps and unscale gradients inside their kernel and tell by ``found_inf`` and ``grad_scale``, which are
    read from the device: one synchronization a step, with fused optimizers under fp16 alone.

    Args:
        optimizer: The optimizer.
        act: Is given how many gradients this step has asked for before, which exceeds 0 in optimizers that evaluate their closure
            several times, and the factor by which gradients are multiplied. What it returns, unless None, is added to the loss that
            the optimizer sees.
    """

    def __init__(self, optimizer: Optimizer, act: Act) -> None:
        # An optimizer that does not call its base's constructor has hooks that nobody calls; this is what unpickling does, and idempotent.
        optimizer._patch_step_function()
        self._act = torch.no_grad()(act)
        self._depth = 0  # of steps within steps: a subclass's that calls its base's
        self._handles = [optimizer.register_step_pre_hook(self._enter), optimizer.register_step_post_hook(self._leave)]

    def remove(self) -> None:
        """Act no more."""
        for handle in self._handles:
            handle.remove()

    def reset(self) -> None:
        """Forget a step that an exception has ended."""
        self._depth = 0

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._followed(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer
            return (args[0], self._followed(args[1]), *args[2:]), kwargs
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is None or not found_inf.item():
            self._act(0, 1.0 if scale is None else scale.item())
        return None

    def _leave(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)

    def _followed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluation = count()

        def followed() -> Any:
            loss = closure()
            added = self._act(next(evaluation), 1.0)
            return loss if added is None or loss is None else loss + added

        return followed
