"""Which normalization layers of a model become what, decided before anything is changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_tricks._core.checks import check_choice, check_count, check_patterns
from lightning_tricks._core.selection import matches, nothing_left
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import replace_module
from lightning_tricks.errors import ArgumentError, NothingMatchedError, UnsupportedStrategyError
from lightning_tricks.normalization._norm_building import Groups, build_norm, obstacle
from lightning_tricks.normalization._norm_calibration import Pair
from lightning_tricks.normalization._norm_positions import locate
from lightning_tricks.normalization._norm_reading import KINDS, Kind, Norm, kinds_of, read_norm

__all__ = ["Settings", "Swapped", "carry_out"]

_MARK = "swaps"  # on layers made by swaps: from which kind to which, one after the other


@dataclass(frozen=True)
class Swapped:
    """What surgery has done.

    Attributes:
        swapped: The layers that were swapped, by name, each with its class before and after.
        left: The layers of the source's kind that were not, each with the reason.
        notices: What else to know of layers that were swapped, by name.
    """

    swapped: Mapping[str, str]
    left: Mapping[str, str]
    notices: Mapping[str, str]


@dataclass(frozen=True)
class Settings:
    """Checked arguments that a checkpoint keeps."""

    source: Kind
    target: Kind
    where: str | Sequence[str] | None
    exclude: str | Sequence[str]
    groups: int | str | None
    ghost_size: int | None

    @classmethod
    def of(cls, source: Any, target: Any, *, where: Any, exclude: Any, groups: Any, ghost_size: Any) -> Settings:
        """Check arguments."""
        check_choice("source", source, KINDS[:-1])
        check_choice("target", target, KINDS)
        for name, value, kind in (("groups", groups, "group"), ("ghost_size", ghost_size, "ghost")):
            if value is not None and target != kind:
                msg = f"`{name}` is for `target='{kind}'`, got {name}={value!r} with target={target!r}. Leave it out."
                raise ArgumentError(msg)
        _groups(groups)
        return cls(
            source,
            target,
            None if where is None else check_patterns("where", where, empty=False),
            check_patterns("exclude", exclude, empty=True),
            groups,
            None if ghost_size is None else check_count("ghost_size", ghost_size),
        )

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain containers."""
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {name: value for name, value in lists.items() if value is not None and value != []}


def _groups(value: int | str | None) -> Groups:
    if value is None:
        return Groups()
    sized = re.fullmatch(r"([1-9]\d*) channels", value) if isinstance(value, str) else None
    if sized:
        return Groups(size=int(sized[1]))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"`groups` must be a number of groups of at least 1, or the size of each as a text such as '16 channels', got {value!r}."
        raise ArgumentError(msg)
    return Groups(count=value)


@dataclass
class Plan:
    """Which layers become what."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notices: dict[str, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)  # swapped by an earlier call

    @property
    def report(self) -> Swapped:
        """What the user is told."""
        swapped = {name: f"{type(pair.old).__name__} to {type(pair.new).__name__}" for name, pair in self.pairs.items()}
        return Swapped(swapped, self.left, self.notices)


def carry_out(model: nn.Module, settings: Settings, *, trick: str, measured: bool) -> Plan:
    """Swap layers of a model, and return which; `measured` ones will be calibrated.

    Raises:
        NothingMatchedError: If there is none that can be swapped, and none was before.
        UnsupportedStrategyError: If the model is sharded or wrapped.
    """
    plan = _plan(model, settings, trick=trick, measured=measured)
    for pair in plan.pairs.values():
        setattr(pair.new, _MARK, (*getattr(pair.old, _MARK, ()), (settings.source, settings.target)))
        replace_module(model, pair.old, pair.new)
    return plan


def _plan(model: nn.Module, settings: Settings, *, trick: str, measured: bool) -> Plan:
    """Decide, without a change to the model, which layers become what."""
    modules = {plain_name(name): module for name, module in model.named_modules() if name}
    chosen = {name for name in modules if settings.where is None or matches(name, settings.where)}
    chosen -= {name for name in chosen if matches(name, settings.exclude)}
    readings = {name: (module, norm) for name, module in modules.items() if (norm := read_norm(module)) is not None}
    own, plan = {}, Plan()
    for name in (name for name in readings if name in chosen):
        module, norm = readings[name]
        if isinstance(norm, Norm) and norm.kind == settings.source:
            own[name] = module, norm
        elif isinstance(norm, str) and settings.source in kinds_of(module):
            plan.left[name] = norm
    swap = settings.source, settings.target
    plan.before += [name for name in chosen - own.keys() if swap in getattr(modules[name], _MARK, ())]
    if own:
        _refuse_wrapped(model, [module for module, _ in own.values()], trick)
    located = locate(model, dict(own.values()))
    for name, (module, _) in own.items():
        _decide(plan, name, module, located[module], settings, measured=measured)
    if not plan.pairs and not plan.before and not (own and settings.source == settings.target):
        raise NothingMatchedError(_diagnose(model, readings, plan.left, settings, trick))
    return plan


def _decide(plan: Plan, name: str, module: nn.Module, norm: Norm, settings: Settings, *, measured: bool) -> None:
    groups, ghost_size = _groups(settings.groups), settings.ghost_size or 32
    reason = obstacle(norm, settings.target, groups, measured=measured)
    if reason is not None:
        plan.left[name] = reason
        return
    if settings.source == settings.target and settings.target not in {"group", "ghost"}:
        plan.left[name] = f"it is of the kind {settings.target!r} already"
        return
    new = build_norm(norm, settings.target, groups, ghost_size)
    sizes = ("num_groups", "ghost_size")
    if settings.source == settings.target and [getattr(new, size, 0) for size in sizes] == [getattr(module, size, 0) for size in sizes]:
        plan.left[name] = f"it is of the kind {settings.target!r} already"
        plan.before += [name] if hasattr(module, _MARK) else []
        return
    plan.pairs[name] = Pair(module, norm, new, settings.target)
    if isinstance(new, nn.GroupNorm) and groups.size is None and new.num_groups != groups.count:
        which = "groups" if norm.channels % groups.count else "groups of more than one value"
        plan.notices[name] = f"{new.num_groups} groups: {norm.channels} channels cannot be split into {groups.count} {which}"


def _refuse_wrapped(model: nn.Module, modules: Sequence[nn.Module], trick: str) -> None:
    sharded = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for module in modules for p in module.parameters())
    wrappers = (DistributedDataParallel, FullyShardedDataParallel)
    if sharded or any(isinstance(module, wrappers) for module in model.modules()):
        msg = (
            f"{trick} makes parameters, which must be there before {type(model).__name__} is sharded or wrapped, and it is already. "
            "Call `functional.swap_norm` before that, in `configure_model` ahead of `fully_shard`."
        )
        raise UnsupportedStrategyError(msg)


def _diagnose(
    model: nn.Module, readings: Mapping[str, tuple[nn.Module, Norm | str]], left: Mapping[str, str], settings: Settings, trick: str
) -> str:
    """Say why there is nothing to swap."""
    kind, where = type(model).__name__, settings.where
    kinds = {name: norm.kind for name, (_, norm) in readings.items() if isinstance(norm, Norm)}
    same = [name for name, each in kinds.items() if each == settings.source]
    located = [name for name in same if where is None or matches(name, where)]
    if left:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in list(left.items())[:3])
        reason = f"none of {len(left)} can be of the kind {settings.target!r} ({listed})"
    elif not kinds:
        reason = f"{kind} has no normalization layers inside it"
    elif not same:
        first = {each: name for name, each in reversed(kinds.items())}
        listed = ", ".join(f"{each!r} ×{number} such as {first[each]!r}" for each, number in Counter(kinds.values()).items())
        reason = f"{kind} has none. It has {listed}"
    else:
        reason = nothing_left(model, same, located, where, settings.exclude)
    return f"{trick} found no layer of the kind {settings.source!r} to swap: {reason}."
