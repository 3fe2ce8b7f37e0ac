"""The abstract base of all callbacks."""

from __future__ import annotations

import re
from abc import ABC
from functools import partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from lightning_tricks._core.checks import check_name
from lightning_tricks._core.conflicts import check_conflicts
from lightning_tricks._core.exhibits import Exhibits
from lightning_tricks._core.lightning import Callback, LightningModule, Trainer, callbacks_of, override

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Trick"]


class Trick(Callback, ABC):
    """A callback that knows its own arguments.

    A subclass keeps each argument of its constructor in an attribute of the same name. From these follow its `repr`, which
    evaluates back, and its copies: pickling and copying give a new trick with the same arguments and no progress.
    """

    name: str | None

    def __init__(self, name: str | None) -> None:
        self.name = check_name(name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as they were given."""
        return {argument: getattr(self, argument) for argument in self._parameters()}

    @classmethod
    def _parameters(cls) -> dict[str, Parameter]:
        """Return the constructor's parameters; a subclass that passes any others on has those of its base, too."""
        own = signature(cls).parameters
        named = {name: each for name, each in own.items() if each.kind not in {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}}
        base = cls.__mro__[1]
        return {**base._parameters(), **named} if len(named) < len(own) and issubclass(base, Trick) else named

    @property
    def evaluation_owner(self) -> bool:
        """Whether this trick replaces the weights used for evaluation."""
        return False

    @property
    def follows_weights(self) -> bool:
        """Whether this trick follows parameters from step to step."""
        return False

    @property
    def replaces_statistics(self) -> bool:
        """Whether this trick replaces the statistics of normalization layers used for evaluation."""
        return False

    @property
    def configures_optimizers(self) -> bool:
        """Whether this trick takes over the module's `configure_optimizers`."""
        return False

    @property
    def sets_rates(self) -> bool:
        """Whether this trick sets the optimizers' learning rates."""
        return False

    @property
    def log_prefix(self) -> str:
        """First part of the trick's log keys: ``ema`` for EMA(), ``ema_slow`` for EMA(name='slow')."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()
        return words if self.name is None else f"{words}_{self.name}"

    def _exhibits(self) -> Exhibits:
        """Return what there is to show of this trick by now, beside its arguments and what it logs."""
        return Exhibits()

    @property
    @override
    def state_key(self) -> str:
        kind = type(self).__name__
        return kind if self.name is None else f"{kind}(name={self.name!r})"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_conflicts(callbacks_of(trainer))

    @override
    def __repr__(self) -> str:
        parameters = self._parameters()
        given = (f"{name}={value!r}" for name, value in self.arguments.items() if value != parameters[name].default)
        return f"{type(self).__name__}({', '.join(given)})"

    @override
    def __reduce__(self) -> tuple[Callable[..., Trick], tuple[()]]:
        return partial(type(self), **self.arguments), ()
