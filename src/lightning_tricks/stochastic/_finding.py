"""Which parts of a model can be left out: those that `where` names, or else its residual blocks, each branch by itself where that shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from lightning_tricks._core.selection import matches, select_modules
from lightning_tricks._core.strategies import plain_name
from lightning_tricks.errors import NothingMatchedError
from lightning_tricks.stochastic._blocks import Shape, examine, is_added, is_all_of, takes_batch_second
from lightning_tricks.stochastic._branches import Pair, is_place, pair_around, pairs_of, pairs_to
from lightning_tricks.stochastic._tracing import Call, guesses, likeness, on_meta, record

if TYPE_CHECKING:
    from lightning_tricks.stochastic._dropping import Mode

__all__ = ["Found", "Where", "find"]

Where = str | Sequence[str]


@dataclass(frozen=True)
class Found:
    """A part of a model that can be left out.

    Attributes:
        block: The block itself, or the one in which the branches are.
        name: The name of that block.
        shape: What it does to its input.
        pairs: The branches within it; none = the block is left out as a whole.
    """

    block: nn.Module
    name: str
    shape: Shape
    pairs: tuple[Pair, ...] = ()


def find(model: nn.Module, where: Where | None, exclude: Where, mode: Mode, *, trick: str) -> tuple[dict[str, Found], dict[str, str]]:
    """Return what can be dropped, and why other parts cannot, both by name.

    Raises:
        NothingMatchedError: If nothing can be dropped.
    """
    candidates = _members(model) if where is None else select_modules(model, where, exclude, trick=trick)
    look = _Look(model, mode)
    seen = {name: look.at(name, block, named=where is not None) for name, block in candidates.items()}
    found = {name: each for name, each in seen.items() if isinstance(each, Found)}
    left = {name: each for name, each in seen.items() if isinstance(each, str)}
    if where is None:
        settled = _settle(found)
        found = {name: settled[name] for name in look.modules if name in settled}
        kinds = {type(each.block) for each in found.values()}
        left = {name: reason for name, reason in left.items() if type(candidates[name]) in kinds or not found}
    if not found:
        raise NothingMatchedError(_diagnosis(model, left, candidates, where, trick))
    kept = {name: each for name, each in found.items() if not matches(name, exclude)}
    if not kept:
        msg = f"{trick} found no module: `exclude={exclude!r}` removed all {len(found)} that can be dropped. Exclude less."
        raise NothingMatchedError(msg)
    return kept, left


class _Look:
    """Looks at modules of one model, and at one of those that are alike."""

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        self.mode = mode
        self.modules = {plain_name(name): module for name, module in model.named_modules()}
        self.calls = {plain_name(name): call for name, call in record(model).items()}
        self.shapes: dict[Hashable, Shape] = {}
        self.pairs: dict[Hashable, tuple[Pair, ...]] = {}

    def at(self, name: str, block: nn.Module, *, named: bool) -> Found | str:
        """Return what can be dropped here, or why nothing can."""
        if self.mode == "sample" and takes_batch_second(block):
            return "its second dimension is the batch; pass `batch_first=True` to its layers"
        shape = self._shape(name, block)
        if named and (is_place(name, block) or (not shape.residual and self._is_branch(name))):
            return self._branch(name, block)
        if not shape.residual and (not named or shape.kept is False):
            return shape.reason
        if self.mode == "batch" and not shape.bare:
            return "it returns more than one tensor; pass `mode='sample'`"
        if self.mode == "batch" or named or shape.call is None:
            return Found(block, name, shape)
        return Found(block, name, shape, self._pairs(shape.call))

    def _shape(self, name: str, block: nn.Module) -> Shape:
        call = self.calls.get(name)
        key = likeness(block, call)
        if key not in self.shapes:
            twin = on_meta(block) if call is None else None
            if call is not None:
                self.shapes[key] = examine([call])
            elif twin is not None:
                self.shapes[key] = examine(guesses(block, twin))
            else:
                self.shapes[key] = Shape(None, residual=False, activated=None, reason="it cannot be copied to be looked at")
        shape = self.shapes[key]
        return shape if call is None else replace(shape, call=call)

    def _pairs(self, call: Call) -> tuple[Pair, ...]:
        key = likeness(call.module, call)
        if key not in self.pairs:
            self.pairs[key] = tuple(pairs_of(call))
        return self.pairs[key]

    def _scope(self, name: str) -> tuple[str, Call] | None:
        """Return the closest module around another one whose input is known."""
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."][::-1]
        for parent in [*parents, ""]:
            call = self.calls.get(parent) or (self._shape(parent, self.modules[parent]).call if parent else None)
            if call is not None:
                return parent, call
        return None

    def _is_branch(self, name: str) -> bool:
        scope = self._scope(name)
        return scope is not None and is_added(scope[1], _inner(scope[1], name, scope[0]))

    def _branch(self, name: str, module: nn.Module) -> Found | str:
        """Return the branch that a module names."""
        if self.mode == "batch":
            return "branches of a block are dropped by sample; pass `mode='sample'`, or name the block"
        scope = self._scope(name)
        if scope is None:
            return "no input was found that the block around it takes; name the block"
        parent, call = scope
        inner = _within(name, parent)
        if is_place(name, module):
            pairs: Sequence[Pair] = pairs_to(call, [inner])
        else:
            pair = pair_around(call, inner)
            pairs = [] if pair is None else [pair]
        if not pairs:
            return "no module was found from which on the branch needs the surviving samples alone; name the block"
        return Found(self.modules[parent], parent, Shape(None, residual=False, activated=False), tuple(pairs))


def _within(name: str, parent: str) -> str:
    return name.removeprefix(f"{parent}.") if parent else name


def _members(model: nn.Module) -> dict[str, nn.Module]:
    """Return what holds layers of its own and is a member of a sequence or a list, or has siblings of its class."""
    members = {}
    for parent_name, parent in model.named_modules():
        children = [(name, child) for name, child in parent.named_children() if any(True for _ in child.children())]
        kinds = Counter(type(child) for _, child in children)
        for name, child in children:
            listed = isinstance(parent, nn.Sequential | nn.ModuleList) or kinds[type(child)] > 1
            if listed and not isinstance(child, nn.ModuleList):
                members[plain_name(f"{parent_name}.{name}".removeprefix("."))] = child
    return members


def _settle(found: dict[str, Found]) -> dict[str, Found]:
    """Of blocks within each other, keep the inner ones if they are all of the outer one, or else the outer one."""
    for name in reversed(list(found)):  # children before their parents
        inside = [other for other in found if other.startswith(f"{name}.")]
        if not inside:
            continue
        shape = found[name].shape
        if shape.call is None or not shape.bare or is_all_of(shape.call, {_inner(shape.call, other, name): True for other in inside}):
            del found[name]
        else:
            found = {other: each for other, each in found.items() if other not in inside}
    return found


def _inner(call: Call, name: str, parent: str) -> nn.Module:
    return call.module.get_submodule(_within(name, parent))


def _diagnosis(model: nn.Module, left: Mapping[str, str], candidates: Mapping[str, nn.Module], where: Where | None, trick: str) -> str:
    """Say that there is nothing to drop, and why, of the kinds of modules that hold the most."""
    sizes: Counter[type] = Counter()
    for name in left:
        sizes[type(candidates[name])] += sum(p.numel() for p in candidates[name].parameters())
    reasons: dict[tuple[type, str], str] = {}  # one module for each kind and reason
    for name in sorted(left, key=lambda name: -sizes[type(candidates[name])]):
        reasons.setdefault((type(candidates[name]), left[name].partition(" (")[0]), f"{name!r}: {left[name]}")
    listed = "; ".join(list(reasons.values())[:4])
    what = "no residual block among modules that repeat" if where is None else "no block to drop"
    advice = "Name blocks whose output has their input's shape by `where`" + (f" ({listed})" if listed else "")
    return f"{trick} found {what}, in {type(model).__name__}. {advice}."
