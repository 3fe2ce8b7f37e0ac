"""Replace methods on single objects, for a fit or for as long as a module lives, and put the originals back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Patches", "StandIn"]

_ABSENT = object()


class Patches:
    """Methods replaced on instances by attributes that shadow them."""

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, Callable[..., Any], Any]] = []

    def wrap(self, owner: object, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace ``owner.name`` by ``around(owner.name)``; a second call for the same method does nothing.

        The replacement carries no ``__wrapped__``, by which Lightning would take an overridden hook for the original.
        """
        if any(held is owner and key == name for held, key, *_ in self._undo):
            return
        before = vars(owner).get(name, _ABSENT)
        replacement = around(getattr(owner, name))
        setattr(owner, name, replacement)
        self._undo.append((owner, name, replacement, before))

    def undo(self) -> None:
        """Take every replacement away that is still in place, latest first."""
        while self._undo:
            owner, name, replacement, before = self._undo.pop()
            if vars(owner).get(name) is not replacement:
                continue
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class StandIn:
    """Stands in for the `forward` of a module; a subclass computes something else in ``__call__``.

    The module stays the same object of the same class with the same keys and parameters. Since this is no closure, a module that holds
    one can be pickled and copied, and a copy's stand-in belongs to the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._before = vars(module).get("forward")

    def plain(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the module computes without its stand-in."""
        if self._before is not None:
            return self._before(*arguments, **options)
        return type(self.module).forward(self.module, *arguments, **options)

    def attach(self) -> None:
        """Take the place of the module's `forward`."""
        self.module.forward = self  # type: ignore[assignment]

    def detach(self) -> None:
        """Put the module's `forward` back, unless somebody has replaced it since."""
        if vars(self.module).get("forward") is self:
            if self._before is None:
                del self.module.forward
            else:
                self.module.forward = self._before
