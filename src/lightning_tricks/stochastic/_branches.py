"""Branches within a block: which there are, and their forward passes.

A transformer's block adds two branches to its stream, ``x + drop(attn(norm(x)))`` and ``x + drop(mlp(norm(x)))``, and places in its code,
the layers called `drop`, show where each ends. A branch is computed for the samples that survive alone: the module that comes first in
it takes their rows, all that follows works on these, and the one that comes last puts them back, scaled, with zeros for the others. That
this is right of a block is seen by doing it, without data: the shapes fit only if nothing between the two needs the other rows, and
nothing but the last module's output leaves the branch.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_tricks._core.draws import Clock
from lightning_tricks._core.surgery import StandIn
from lightning_tricks.errors import TrickError
from lightning_tricks.stochastic._blocks import is_all_of
from lightning_tricks.stochastic._dropping import Droppable, Plan, Rows, has_further_batches, is_ambiguous
from lightning_tricks.stochastic._tracing import first_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from lightning_tricks.stochastic._tracing import Call

__all__ = ["Branch", "Ending", "Guard", "Pair", "is_place", "pair_around", "pairs_of", "pairs_to", "stand_in"]

Pair = tuple[str, str]  # the names, within a block, of the modules that come first and last in a branch

_CLASSES = ("DropPath", "StochasticDepth")  # the ends of their names
_NAMES = ("drop_path", "stochastic_depth")  # of modules that do nothing at a rate of zero, too


def is_place(name: str, module: nn.Module) -> bool:
    """Tell whether a module stands where a branch ends: it drops branches by itself, or would if it were given a rate."""
    return type(module).__name__.endswith(_CLASSES) or any(each in name.rpartition(".")[2] for each in _NAMES)


class Branch(Droppable):
    """Stands in for the module that comes first in a branch: takes the rows of the samples that survive."""

    def __init__(self, module: nn.Module, name: str, index: int, plan: Plan, ending: Ending) -> None:
        super().__init__(module, name, index, plan)
        self.ending = ending
        self.dense = False  # whether all rows must be computed

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        rows: Rows | None = None
        factor: Any = None
        if self.ending.module.training:
            values = (arguments, options)
            x = self.input(values)
            rows, keep = self.draw(x, dense=self.dense or is_ambiguous(values, x))
            if rows is not None:
                arguments, options = rows.gather(values)
                factor = 1 / keep if self.plan.scaling == "training" else None
        elif self.plan.scaling == "evaluation":
            factor = self.keep
        self.ending.begun = rows, factor
        return self.plain(*arguments, **options)


class Ending(StandIn):
    """Stands in for the module that comes last in a branch, or in several, one after another: puts the rows back."""

    strict = True  # whether each branch that ends here must have begun where it was seen to begin

    def __init__(self, module: nn.Module, name: str, owner: str) -> None:
        super().__init__(module)
        self.name, self.owner = name, owner
        self.begun: tuple[Rows | None, Any] | None = None  # by the module that comes first

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        result = self.plain(*arguments, **options)
        if self.begun is None:
            if not self.strict:
                return result
            msg = f"{self.owner} saw the branch that ends in {self.name!r} begin elsewhere when it looked for branches. Exclude it."
            raise TrickError(msg)
        (rows, factor), self.begun = self.begun, None
        if rows is None and factor is None:
            return result
        outputs, structure = tree_flatten(result)
        places = [i for i, each in enumerate(outputs) if isinstance(each, Tensor)]
        place = places[0] if places else None
        if place is None or (rows is not None and len(outputs[place]) != rows.computed):
            found = "no tensor" if place is None else f"{len(outputs[place])} rows"
            msg = f"{self.owner} drops branches that work on each sample by itself, and {self.name!r} made {found} of {rows}. Exclude it."
            raise TrickError(msg)
        if factor is not None:
            outputs[place] = (outputs[place] * factor).to(outputs[place].dtype)
        if rows is not None:
            outputs[place] = rows.mask(outputs[place])
            outputs = [rows.spread(each) for each in outputs]
        return tree_unflatten(outputs, structure)


class Guard(StandIn):
    """Stands in for a block with branches: lets them compute all rows where the block is given more by sample than its input."""

    branches: Sequence[Branch] = ()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        values = (arguments, options)
        x = first_tensor(values)
        dense = x is not None and has_further_batches(values, x)
        for branch in self.branches:
            branch.dense = dense
        return self.plain(*arguments, **options)


def stand_in(block: nn.Module, name: str, pairs: Sequence[Pair], first: int, plan: Plan) -> list[StandIn]:
    """Let branches of a block be dropped, and return what stands in for modules of it, in the order of attaching."""
    endings = {last: Ending(block.get_submodule(last), f"{name}.{last}", plan.owner) for _, last in pairs}
    branches = []
    for index, (start, last) in enumerate(pairs, first):
        branches.append(Branch(block.get_submodule(start), f"{name}.{last}", index, plan, endings[last]))
    guard = Guard(block)
    guard.branches = [branch for branch in branches if branch.module is not branch.ending.module]
    stand_ins: list[StandIn] = [*branches]
    for each in branches:
        each.attach()
    for ending in endings.values():  # around the first, where both are the same module
        ending.attach()
        stand_ins.append(ending)
    if guard.branches:
        guard.attach()
        stand_ins.append(guard)
    return stand_ins


# Finding them


def pairs_of(call: Call) -> list[Pair]:
    """Return all branches of a block that end in places for drops, if these are all that the block adds to its input; else none."""
    places = {name: module for name, module in call.module.named_modules() if name and is_place(name, module)}
    if not places or not is_all_of(call, dict.fromkeys(places.values(), False)):
        return []
    return pairs_to(call, list(places))


def pairs_to(call: Call, places: Sequence[str]) -> list[Pair]:
    """Return the branches of a block that end in these modules, in the order of their computation; none if one is not found.

    A branch begins in the earliest module from which on the rows of the samples that survive suffice.
    """
    events, count, shapes = _watch(call)
    once = {name for name, times in Counter(name for name, _ in events).items() if times == 1}
    pairs: list[Pair] = []
    begin = 0
    for i, (name, _) in enumerate(events):
        if name not in places:
            continue
        candidates = [key for key, rows in events[begin:i] if rows == count and key in once]
        start = next((key for key in candidates if _works(call, [(key, name)], shapes, strict=False)), None)
        if start is None:
            return []
        pairs.append((start, name))
        begin = i + 1
    return pairs if pairs and _works(call, pairs, shapes) else []


def pair_around(call: Call, name: str) -> Pair | None:
    """Return the branch within which a module of a block is computed, if the block has places that show it; else the module by itself."""
    for pair in pairs_of(call):
        order = [each for each, _ in _watch(call)[0]]
        if order.index(pair[0]) <= order.index(name) < order.index(pair[1]):
            return pair
    pair = (name, name)
    return pair if _works(call, [pair], _watch(call)[2]) else None


def _watch(call: Call) -> tuple[list[tuple[str, int | None]], int, list[torch.Size]]:
    """Return the modules that a block runs, each with how many rows it takes, the rows of the block's input, and the output's shapes."""
    events: list[tuple[str, int | None]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = first_tensor((given, named))
            events.append((name, len(x) if x is not None and x.ndim else None))

        return hook

    inside = [(name, module) for name, module in call.module.named_modules() if name]
    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in inside]
    try:
        output, leaf, _ = call()
    finally:
        for handle in handles:
            handle.remove()
    return events, len(leaf), _shapes(output)


def _works(call: Call, pairs: Sequence[Pair], shapes: list[torch.Size], *, strict: bool = True) -> bool:
    """Tell whether a block has outputs of the same shapes if branches compute a part of the rows.

    Other branches may end in the same module, unless `strict`.
    """
    plan = Plan("sample", "training", Clock(0), "")
    stand_ins = stand_in(call.module, "", pairs, 0, plan)
    for each in stand_ins:
        if isinstance(each, Branch):
            each.set_rate(0.3)
        elif isinstance(each, Ending):
            each.strict = strict
    try:
        return _shapes(call()[0]) == shapes
    except Exception:  # noqa: BLE001  # rows of all samples met those of the survivors
        return False
    finally:
        for each in reversed(stand_ins):
            each.detach()


def _shapes(output: Any) -> list[torch.Size]:
    return [each.shape for each in tree_leaves(output) if isinstance(each, Tensor)]
