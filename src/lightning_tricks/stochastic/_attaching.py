"""Put stand-ins for blocks and branches into a model, and take them out again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightning_tricks._core.surgery import StandIn, stand_ins
from lightning_tricks.errors import TrickConflictError
from lightning_tricks.stochastic._branches import Branch, Ending, Guard, stand_in
from lightning_tricks.stochastic._dropping import Droppable, Dropping

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from lightning_tricks.stochastic._dropping import Plan
    from lightning_tricks.stochastic._finding import Found

__all__ = ["Growth", "attach", "check_free", "detach", "droppables", "held_by", "set_rates", "shares"]

Growth = Literal["linear", "uniform"]

_OWN_RATES = {"DropPath": "drop_prob", "StochasticDepth": "p"}  # by the ends of their classes' names


def attach(model: nn.Module, found: Mapping[str, Found], plan: Plan, *, least: float, growth: Growth) -> list[StandIn]:
    """Let blocks be dropped, at least at this rate; where a model brings layers that do so on the same branch, those are switched off.

    Returns:
        What stands in for modules, in the order in which it can be taken away.
    """
    check_free(model, plan.owner)
    share = shares(found, growth)
    together: dict[str, list[tuple[str, Found]]] = {}  # by the block in which they are
    for name, each in found.items():
        together.setdefault(each.name, []).append((name, each))
    stand_ins: list[StandIn] = []
    index = 0  # of the draws
    for block_name, parts in together.items():
        block = parts[0][1].block
        pairs = list(dict.fromkeys(pair for _, each in parts for pair in each.pairs))
        new: list[StandIn]
        if pairs:
            new = stand_in(block, block_name, pairs, index, plan)
        else:
            dropping = Dropping(block, block_name, index, plan)
            dropping.activated = parts[0][1].shape.activated
            dropping.attach()
            new = [dropping]
        whole = parts[0][0] == block_name  # rather than branches that are named
        for droppable in droppables(new):
            index += 1
            droppable.share = share[parts[0][0]]
            droppable.switch_off(_own_layers(block if whole or not isinstance(droppable, Branch) else droppable.ending.module))
        stand_ins = [*reversed(new), *stand_ins]
    set_rates(stand_ins, least)
    for droppable in droppables(stand_ins):
        droppable.largest_keep = float(droppable.keep)
    return stand_ins


def shares(found: Mapping[str, Found], growth: Growth) -> dict[str, float]:
    """Return the share of the last block's rate that each part has, which is the same for all branches of a block."""
    blocks = list(dict.fromkeys(each.name for each in found.values()))
    return {name: (blocks.index(each.name) + 1) / len(blocks) if growth == "linear" else 1.0 for name, each in found.items()}


def detach(stand_ins: Iterable[StandIn]) -> None:
    """Take stand-ins away, and give a model's own layers that drop their rates back."""
    for each in stand_ins:
        each.detach()
        if isinstance(each, Droppable):
            each.switch_on()


def set_rates(stand_ins: Iterable[StandIn], rate: float) -> None:
    """Let the last block be dropped with this probability."""
    for each in droppables(stand_ins):
        each.set_rate(rate * each.share)


def droppables(stand_ins: Iterable[StandIn]) -> list[Droppable]:
    """Return those that draw."""
    return [each for each in stand_ins if isinstance(each, Droppable)]


def held_by(model: nn.Module) -> list[StandIn]:
    """Return what stands in for modules of a model, in an order in which it can be taken away."""
    return [each for each in stand_ins(model, StandIn) if isinstance(each, Droppable | Ending | Guard)]


def check_free(model: nn.Module, owner: str) -> None:
    """Refuse a model whose blocks somebody else drops.

    Raises:
        TrickConflictError: Naming both.
    """
    for held in droppables(held_by(model)):
        if held.plan.owner != owner:
            msg = f"{held.plan.owner} and {owner} both drop blocks of {type(model).__name__}, such as {held.name!r}. Keep one."
            raise TrickConflictError(msg)


def _own_layers(module: nn.Module) -> Sequence[tuple[nn.Module, str]]:
    """Return a model's own layers that drop branches, each with the name of its rate."""
    layers = []
    for layer in module.modules():
        attribute = next((each for end, each in _OWN_RATES.items() if type(layer).__name__.endswith(end)), None)
        if attribute is not None and getattr(layer, attribute, None):
            layers.append((layer, attribute))
    return layers
