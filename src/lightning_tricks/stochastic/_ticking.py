"""What lets each forward pass of a model draw anew where no callback sets the clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lightning_tricks._core.draws import Clock

__all__ = ["Tick", "stop_ticking"]


class Tick:
    """A forward pre-hook that moves a clock on in training mode."""

    def __init__(self, clock: Clock, owner: str) -> None:
        self.clock, self.owner = clock, owner

    def __call__(self, model: nn.Module, _: Any) -> None:
        if model.training:
            self.clock.tick()


def stop_ticking(model: nn.Module, owner: str) -> list[Tick]:
    """Remove an owner's hooks from a model and from its parts, each of which may have been changed by itself, and return them."""
    removed = []
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Tick) and hook.owner == owner:
                del module._forward_pre_hooks[key]
                removed.append(hook)
    return removed
