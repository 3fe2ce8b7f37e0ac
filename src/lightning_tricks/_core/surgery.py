"""Change a model: replace methods on single objects and modules wherever they are held, at the right moment, and put the originals back."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch.distributed.tensor import DTensor

from lightning_tricks._core.lightning import defines
from lightning_tricks.errors import NothingMatchedError, TrickError, UnsupportedStrategyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from lightning_tricks._core.lightning import LightningModule

__all__ = ["Patches", "StandIn", "replace_module", "stand_ins", "stand_ins_of", "when_built", "without_stand_ins"]

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip

_ABSENT = object()
_S = TypeVar("_S", bound="StandIn")


class Patches:
    """Methods replaced on instances by attributes that shadow them."""

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, Callable[..., Any], Any]] = []
        self._others: list[Callable[[], None]] = []

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

    def also(self, undo: Callable[[], None]) -> None:
        """Call this, too, when all is undone."""
        self._others.append(undo)

    def undo(self) -> None:
        """Take every replacement away that is still in place, latest first."""
        while self._others:
            self._others.pop()()
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

    inherent: ClassVar[bool] = False  # whether it is what the module itself computes, and goes when another takes the module's place

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before: Any = None  # what stood in for it already

    def plain(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the module computes without its stand-in."""
        if self.before is not None:
            return self.before(*arguments, **options)
        return type(self.module).forward(self.module, *arguments, **options)

    def attach(self) -> None:
        """Take the place of the module's `forward`, around whatever else stands in for it."""
        before = vars(self.module).get("forward")
        if before is not self:
            self.before = before
            self.module.forward = self  # type: ignore[assignment]

    def detach(self) -> None:
        """Put the module's `forward` back, unless somebody has replaced it since; a stand-in that came later stays."""
        held = vars(self.module).get("forward")
        if held is self and self.before is None:
            del self.module.forward
        elif held is self:
            self.module.forward = self.before
        for later in stand_ins_of(self.module):
            if later.before is self:
                later.before = self.before


def stand_ins(model: nn.Module, kind: type[_S]) -> list[_S]:
    """Return the stand-ins of a kind within a model, those behind others included."""
    return [each for module in model.modules() for each in stand_ins_of(module) if isinstance(each, kind)]


def stand_ins_of(module: nn.Module) -> Iterator[StandIn]:
    """Yield what stands in for a module's `forward`, the latest first."""
    forward = vars(module).get("forward")
    while isinstance(forward, StandIn):
        yield forward
        forward = forward.before


@contextmanager
def without_stand_ins(model: nn.Module) -> Iterator[None]:
    """Let modules compute as they do by themselves, inherent stand-ins included, inside a `with` block."""
    held = [(module, outermost) for module in model.modules() if isinstance(outermost := vars(module).get("forward"), StandIn)]
    for module, outermost in held:
        plain: Any = outermost
        while isinstance(plain, StandIn) and not plain.inherent:
            plain = plain.before
        if plain is None:
            del module.forward
        else:
            module.forward = plain
    try:
        yield
    finally:
        for module, outermost in held:
            module.forward = outermost  # type: ignore[assignment]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever a model holds it, with its mode, stand-ins and hooks, whose handles stay valid.

    Raises:
        TrickError: If the model does not hold it, or is it.
    """
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    if not places:
        msg = f"A module can be replaced only within a model that holds it, and {type(model).__name__} does not hold {type(old).__name__}."
        raise TrickError(msg)
    new.train(old.training)
    for kind in _HOOKS:
        hooks = vars(old)[kind]
        hooks.update(vars(new)[kind])
        setattr(new, kind, hooks)
        setattr(old, kind, type(hooks)())
    for each in reversed([each for each in stand_ins_of(old) if not each.inherent]):
        each.detach()
        each.module, each.before = new, None
        each.attach()
    for parent, name in places:
        parent._modules[name] = new


def when_built(
    module: LightningModule, operate: Callable[[LightningModule], None], *, trick: str, function: str, creates: bool = True
) -> Patches:
    """Change a model in `Callback.setup`, or as soon as it has built its layers, before its optimizers and wrappers hold its parameters.

    Where nothing that matches is there yet, and the module has hooks that build layers, the change waits for the end of
    `configure_model`.

    Args:
        module: The model.
        operate: Changes it; raises NothingMatchedError if there is nothing to change.
        trick: How errors name who changes it.
        function: The function that does the same, for users who shard in `configure_model`.
        creates: Whether parameters are created, which must not happen to a model that is sharded.

    Returns:
        What is to be undone at the end of the fit.

    Raises:
        NothingMatchedError: If there is nothing to change, and nothing is built later.
        UnsupportedStrategyError: From `configure_model`, if that has sharded the layers already.
    """
    patches = Patches()
    try:
        operate(module)
    except NothingMatchedError:
        if not defines(module, "setup", "configure_model"):
            raise
    else:
        return patches
    waiting = [operate]

    def around(configure_model: Callable[[], None]) -> Callable[[], None]:
        def configured() -> None:
            configure_model()
            if not waiting:
                return
            if creates and any(isinstance(parameter, DTensor) for parameter in module.parameters()):
                msg = (
                    f"{trick} creates parameters, which must be there before a model is sharded, and `configure_model` of "
                    f"{type(module).__name__} builds and shards its layers at once. Call `functional.{function}` in between."
                )
                raise UnsupportedStrategyError(msg)
            waiting.pop()(module)

        return configured

    patches.wrap(module, "configure_model", around)
    return patches
