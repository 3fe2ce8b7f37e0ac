"""What tricks share that let single modules draw at random: the stand-in for a module's `forward`, its surgery, and the callback's base."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lightning_tricks._core.draws import Clock, mix
from lightning_tricks._core.lightning import LightningModule, Trainer, override, rank_zero_info
from lightning_tricks._core.surgery import StandIn, stand_ins
from lightning_tricks.errors import TrickConflictError, TrickError
from lightning_tricks.stochastic._random_trick import RandomTrick
from lightning_tricks.stochastic._ticking import Tick, stop_ticking

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Changed", "Drawing", "DrawingTrick", "apply_drawings", "remove_drawings"]


@dataclass(frozen=True)
class Changed:
    """What surgery has done.

    Attributes:
        names: The modules that draw at random, from first to last.
        left: The modules that were left alone, each with the reason.
    """

    names: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)


class Drawing(StandIn):
    """Stands in for the `forward` of a module and draws at random while the module trains.

    Its draws follow from the clock, the kind of the stand-in and the name of the module. A module that is called several times in a
    forward pass draws the same each time: so does a forward pass that activation checkpointing repeats.
    """

    def __init__(self, module: nn.Module, name: str, *, clock: Clock, owner: str) -> None:
        super().__init__(module)
        self.name, self.clock, self.owner = name, clock, owner
        self.strength = torch.zeros((), dtype=torch.float64)  # a tensor, since compiled code reads it without compiling anew
        self.dropped: Tensor | None = None  # the share of the latest batch
        self.ran = False
        self._salt = zlib.crc32(f"{type(self).__name__} {name}".encode())

    def key(self, clock: Clock) -> Tensor:
        """Return what this module's draws follow from at the clock's moment."""
        return mix(clock.now ^ self._salt)

    def is_idle(self) -> bool:
        """Tell whether nothing is to be drawn; compiled code always draws, and so does not depend on the strength."""
        return not self.module.training or (not torch.compiler.is_compiling() and float(self.strength) == 0.0)


def apply_drawings(model: nn.Module, drawings: Sequence[Drawing], clock: Clock, *, strength: float) -> Changed:
    """Let modules draw anew in each forward pass of the model in training mode, without a callback."""
    _attach(model, drawings)
    for drawing in drawings:
        drawing.strength.fill_(strength)
    model.register_forward_pre_hook(Tick(clock, drawings[0].owner))
    return Changed(tuple(drawing.name for drawing in drawings))


def remove_drawings(model: nn.Module, kind: type[Drawing], *, function: str) -> None:
    """Undo `apply_drawings` for one kind of stand-in.

    Raises:
        TrickConflictError: If stand-ins of that kind belong to a callback of a running fit.
    """
    drawings = stand_ins(model, kind)
    for drawing in drawings:
        if drawing.owner != function:
            raise TrickConflictError(_conflict(model, drawing, function))
        drawing.detach()
    stop_ticking(model, function)


def _attach(model: nn.Module, drawings: Sequence[Drawing]) -> None:
    for held in stand_ins(model, type(drawings[0])):
        if any(held.module is drawing.module for drawing in drawings):
            raise TrickConflictError(_conflict(model, held, drawings[0].owner))
    for drawing in drawings:
        drawing.attach()


def _conflict(model: nn.Module, held: Drawing, owner: str) -> str:
    return f"{held.owner} and {owner} both act on modules of {type(model).__name__}, such as {held.name!r}. Keep one."


class DrawingTrick(RandomTrick):
    """Lets single modules draw at random, by stand-ins that a subclass makes."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self._drawings: Sequence[Drawing] = ()

    @abstractmethod
    def make(self, module: LightningModule) -> tuple[Sequence[Drawing], Mapping[str, str]]:
        """Return stand-ins for the modules that are selected, and why others were left, by name.

        Raises:
            NothingMatchedError: If no module is selected.
        """

    @override
    def attach(self, module: LightningModule) -> None:
        drawings, left = self.make(module)
        if self._strength == 0:
            return
        _attach(module, drawings)
        self._drawings = drawings
        names = ", ".join(drawing.name for drawing in drawings)
        rank_zero_info(f"{self!r} acts on {names}." + "".join(f" Not on {name}: {reason}." for name, reason in left.items()))

    @override
    def detach(self) -> None:
        for drawing in self._drawings:
            drawing.detach()
        self._drawings = ()

    @override
    def set_value(self, value: float) -> None:
        for drawing in self._drawings:
            drawing.strength.fill_(value)
            drawing.dropped = None

    @override
    def shares(self) -> Sequence[float]:
        return [float(drawing.dropped) for drawing in self._drawings if drawing.dropped is not None]

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._drawings and not any(drawing.ran for drawing in self._drawings):
            names = ", ".join(repr(drawing.name) for drawing in self._drawings)
            msg = f"{self!r} acts where modules are called, and none of {names} was in a whole epoch. Name modules that are called."
            raise TrickError(msg)
