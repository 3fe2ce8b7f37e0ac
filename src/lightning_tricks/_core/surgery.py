"""Replace methods on single objects, and put the originals back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Patches"]

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
