"""A module that answers with the combined prediction of several members while it is evaluated."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_tricks._core.surgery import Patches, StandIn, stand_ins_of
from lightning_tricks.errors import TrickError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Answer"]


class Answer(StandIn):
    """Stands in for a module's `forward`, and for calling it.

    Calls are caught outside of the module's hooks, since a strategy may have hooks there that gather weights, which must happen after
    a member's are lent.

    Args:
        module: The module.
        owner: How errors name who evaluates.

    Attributes:
        calls: How often the module has been called.
    """

    def __init__(self, module: nn.Module, owner: str) -> None:
        super().__init__(module)
        self.owner = owner
        self.calls = 0
        self._predict: Callable[[Callable[[], Tensor]], Tensor] | None = None
        self._inside = False
        self._patches = Patches()

    def begin(self, predict: Callable[[Callable[[], Tensor]], Tensor] | None) -> None:
        """Answer by a function that is given what calls the module, or, without one, as the module itself would."""
        self._predict, self.calls = predict, 0
        self.attach()
        # Not the class's `__call__`, which no instance can replace, but what that calls.
        entrance = "_call_impl" if self.module._compiled_call_impl is None else "_compiled_call_impl"
        self._patches.wrap(self.module, entrance, lambda call: partial(self._called, call))

    def end(self) -> None:
        """Let the module answer by itself; a second call does nothing."""
        self._predict = None
        self._patches.undo()
        self.detach()
        self.before = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._inside:
            return self.plain(*arguments, **options)
        return self._answer(partial(self.plain, *arguments, **options))

    def _called(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # A strategy calls methods of the module through its wrapper by putting them in the place of `forward` for a moment.
        if self._inside or self not in stand_ins_of(self.module):
            return call(*arguments, **options)
        return self._answer(partial(call, *arguments, **options))

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _answer(self, call: Callable[[], Any]) -> Any:
        self._inside = True
        try:
            self.calls += 1
            return call() if self._predict is None else self._predict(partial(self._checked, call))
        finally:
            self._inside = False

    def _checked(self, call: Callable[[], Any]) -> Tensor:
        output = call()
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            msg = (
                f"{self.owner} combines what `forward` of {type(self.module).__name__} returns, which must be one tensor of floating-point "
                f"numbers, got {found}. Name a submodule that returns such a tensor by `target`."
            )
            raise TrickError(msg)
        return output
