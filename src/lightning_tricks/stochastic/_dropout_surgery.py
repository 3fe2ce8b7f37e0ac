"""Set a model's rates of dropout, or insert dropout into it, and put everything back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from lightning_tricks._core.selection import matches, nothing_left, select_modules
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import stand_ins_of
from lightning_tricks.errors import NothingMatchedError, TrickConflictError, TrickError
from lightning_tricks.stochastic._dropout_rates import Rate, rates_of
from lightning_tricks.stochastic._masking import Kind, Masking
from lightning_tricks.stochastic._ticking import Tick

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_tricks._core.draws import Clock

__all__ = ["Applied", "Plan", "Surgery", "find_after", "find_rates", "is_compiled"]

Where = str | tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be changed in a model.

    Attributes:
        numbers: Rates to be set, by name.
        layers: Modules to be stood in for, by name, each with the kind of dropout.
        replaces: Whether those are layers of dropout, in whose place others drop, rather than modules whose output is dropped.
        left: What stays as it is although it was selected, by name, each with the reason.
    """

    numbers: Mapping[str, Rate] = field(default_factory=dict)
    layers: Mapping[str, tuple[nn.Module, Kind]] = field(default_factory=dict)
    replaces: bool = False
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def places(self) -> dict[tuple[int, bool], str]:
        """What is changed, to be compared with what others change, and its name."""
        layers = {(id(module), self.replaces): name for name, (module, _) in self.layers.items()}
        return layers | {(id(rate.module), True): name for name, rate in self.numbers.items()}


def find_rates(model: nn.Module, where: Where | None, exclude: Where, kind: Kind | None, *, varying: bool, trick: str) -> Plan:
    """Select what a model has of dropout.

    Layers of torch's family are stood in for where another kind is wanted, or where their rate varies.

    Raises:
        NothingMatchedError: If nothing is left, saying which of four reasons holds.
    """
    everything = rates_of(model)
    located = {name: rate for name, rate in everything.items() if where is None or matches(name, where)}
    selected = {name: rate for name, rate in located.items() if not matches(name, exclude)}
    layers = {name: rate for name, rate in selected.items() if rate.kind is not None and (varying or kind is not None)}
    numbers = {name: rate for name, rate in selected.items() if name not in layers}
    if not everything:
        reason = f"{type(model).__name__} has none. Name modules by `after`, behind which it is to be inserted"
    elif not selected:
        reason = nothing_left(model, everything, located, where, exclude)
    elif kind is not None and not layers:
        reason = f"a rate that a module hands to a function, such as {next(iter(selected))!r}, cannot be of `kind={kind!r}`"
    else:
        left = dict.fromkeys(numbers if kind is not None else (), "its rate is handed to a function, which has its own kind")
        replaced = {name: (rate.module, kind or rate.kind or "element") for name, rate in layers.items()}
        return Plan(numbers if kind is None else {}, replaced, replaces=True, left=left)
    msg = f"{trick} found no dropout: {reason}."
    raise NothingMatchedError(msg)


def find_after(model: nn.Module, after: Where, where: Where | None, exclude: Where, kind: Kind, *, trick: str) -> Plan:
    """Select modules by names and by names of their classes; each glob must match.

    Raises:
        NothingMatchedError: If a glob matches nothing, or nothing is left.
    """
    found: dict[str, nn.Module] = {}
    for glob in (after,) if isinstance(after, str) else after:
        typed = {plain_name(name): module for name, module in model.named_modules() if name and _is_a(module, glob)}
        outer = {name: each for name, each in typed.items() if not any(name.startswith(f"{other}.") for other in typed)}
        found |= outer or select_modules(model, glob, (), trick=trick, argument="after")
    found = {plain_name(name, compiled=False): module for name, module in found.items()}
    located = {name: module for name, module in found.items() if where is None or matches(name, where)}
    selected = {name: (module, kind) for name, module in located.items() if not matches(name, exclude)}
    if selected:
        return Plan(layers=selected)
    if located:
        reason = f"`exclude={exclude!r}` removed all {len(located)}. Exclude less"
    else:
        reason = f"`where={where!r}` matched none of the {len(found)} that `after={after!r}` did, such as {next(iter(found))!r}"
    msg = f"{trick} found no module: {reason}."
    raise NothingMatchedError(msg)


def _is_a(module: nn.Module, name: str) -> bool:
    kinds = type(module).__mro__
    return name in {kind.__name__ for kind in kinds[: kinds.index(nn.Module)]}


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a model or a part of it is compiled, as far as modules show."""
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules())


class Surgery:
    """A plan put into effect, until it is undone."""

    def __init__(self, model: nn.Module, plan: Plan, *, clock: Clock, owner: str) -> None:
        for module, _ in plan.layers.values():
            held = next((each for each in stand_ins_of(module) if isinstance(each, Masking) and each.replaces == plan.replaces), None)
            if held is not None:
                msg = f"{held.owner} and {owner} both drop at {held.name!r}. Keep one."
                raise TrickConflictError(msg)
        first = {name: _sequence_first(model, module) for name, (module, kind) in plan.layers.items() if kind == "variational"}
        self.numbers = [(rate, rate.value) for rate in plan.numbers.values()]
        self.maskings = [
            Masking(module, name, kind, clock=clock, owner=owner, sequence_first=first.get(name, False), replaces=plan.replaces)
            for name, (module, kind) in plan.layers.items()
        ]
        for masking in self.maskings:
            masking.attach()

    def set_rate(self, rate: float) -> None:
        """Drop with this probability from now on."""
        for number, _ in self.numbers:
            number.set(rate)
        for masking in self.maskings:
            masking.set_rate(rate)
            masking.drawn = None

    def undo(self) -> None:
        """Put everything back."""
        for number, before in self.numbers:
            number.set(before)
        for masking in self.maskings:
            masking.detach()


def _sequence_first(model: nn.Module, module: nn.Module) -> bool:
    """Tell whether a module gives sequences by position first and batch second, by its layers or by the others of the model.

    Raises:
        TrickError: If they differ.
    """
    for part in (module, model):
        flags = (getattr(each, "batch_first", None) for each in part.modules())
        layouts = Counter(flag for flag in flags if isinstance(flag, bool))
        if len(layouts) == 1:
            return not next(iter(layouts))
        if layouts:
            msg = (
                f"`kind='variational'` shares a mask over the sequence, and layers of {type(part).__name__} disagree on where that is: "
                f"{layouts[True]} have batch_first=True, {layouts[False]} have batch_first=False. Give all the same."
            )
            raise TrickError(msg)
    return False


class Applied(Tick):
    """A hook that also keeps what was done to a model without a Trainer."""

    def __init__(self, surgery: Surgery, clock: Clock, owner: str) -> None:
        super().__init__(clock, owner)
        self.surgery = surgery
