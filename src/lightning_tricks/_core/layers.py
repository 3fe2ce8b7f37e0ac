"""The layers of a model, from its input to its output, for rates that differ from layer to layer."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

from torch import nn

from lightning_tricks._core.extras import require
from lightning_tricks._core.owners import clean_name
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import unwrapped
from lightning_tricks.errors import NothingMatchedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_tricks._core.owners import Owned

__all__ = ["blocks_of", "given_layers", "inferred_layers"]

_CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def given_layers(parameters: Sequence[Owned], layers: Sequence[str], who: str) -> list[int]:
    """Return the layer of each parameter: the first glob that matches one of its names.

    Raises:
        NothingMatchedError: If a glob matches nothing, or a parameter is in no layer.
    """
    found = [next((i for i, glob in enumerate(layers) if any(matches(name, glob) for name in owned.names)), None) for owned in parameters]
    lost = [owned.names[0] for owned, layer in zip(parameters, found, strict=True) if layer is None]
    if lost:
        msg = f"{who}: `layers` must cover every trainable parameter; {lost[0]!r} is in none of them ({len(lost)} parameters are not)."
        raise NothingMatchedError(msg)
    return [layer for layer in found if layer is not None]


def inferred_layers(
    model: nn.Module,
    parameters: Sequence[Owned],
    who: str,
    *,
    least: int = 2,
    asking: str = "`layer_decay`",
    advice: str = "Give `layers`, globs from the input to the output.",
) -> list[int]:
    """Return the layer of each parameter, from what the model says of itself or else from its structure.

    Models of timm say which of their parameters make a layer (`group_matcher`); what stands before such a model belongs to its first
    layer, and what stands after it is one layer more. In other models, each block is a layer. Parameters between two blocks belong to
    the later one, as the downsampling in front of a stage does; those before the first block are a layer of their own, and so are
    those after the last. In a model without blocks, each module that owns parameters is a layer. Errors say which argument is `asking`
    for layers, and give `advice`.

    Raises:
        NothingMatchedError: If there are fewer than the `least` layers, or if several models in this one say what their layers are.
    """
    names = [owned.names[0] for owned in parameters]
    said = _said_layers(model, names, who, asking, advice)
    ranks = _block_layers(model, names) if said is None else said
    used = sorted(set(ranks))
    if len(used) < least:
        msg = f"{who}: {asking} found only one layer in {type(model).__name__}. {advice}"
        raise NothingMatchedError(msg)
    return [used.index(rank) for rank in ranks]


def _said_layers(model: nn.Module, names: Sequence[str], who: str, asking: str, advice: str) -> list[int] | None:
    """Return what a model of timm in the model says of its layers; None if there is no such model."""
    speakers = {
        clean_name(f"{path}.") if path else "": module
        for path, module in model.named_modules()
        if callable(getattr(type(module), "group_matcher", None))
        and any(name.startswith(clean_name(f"{path}.") if path else "") for name in names)
    }
    outer = {path: each for path, each in speakers.items() if not any(path.startswith(other) for other in speakers if other != path)}
    if not outer:
        return None
    if len(outer) > 1:
        msg = f"{who}: {asking} found several models, {', '.join(map(repr, outer))}, whose layers have no common order. {advice}"
        raise NothingMatchedError(msg)
    ((prefix, speaker),) = outer.items()
    own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    renamed = SimpleNamespace(named_parameters=own.items)  # as the model would name them were nothing wrapped
    group: Any = require("timm.models", package="timm", extra="timm", who=who).group_parameters
    layers: dict[str, int] = group(renamed, cast("Any", speaker).group_matcher(coarse=False), reverse=True)
    begin, end = min(map(names.index, own.values())), 1 + max(layers.values())
    return [layers[name.removeprefix(prefix)] if name.startswith(prefix) else 0 if i < begin else end for i, name in enumerate(names)]


def _block_layers(model: nn.Module, names: Sequence[str]) -> list[int]:
    homes = [name.rpartition(".")[0] for name in names]
    blocks = blocks_of(model) or list(dict.fromkeys(homes))
    inside = [next((block for block in blocks if f"{home}.".startswith(f"{block}.")), None) for home in homes]
    order = {block: 1 + i for i, block in enumerate(dict.fromkeys(block for block in inside if block is not None))}
    first = min((i for i, block in enumerate(inside) if block is not None), default=0)
    ranks, following = [], 1 + len(order)
    for i in reversed(range(len(names))):  # what stands between two blocks goes with the one that follows
        block = inside[i]
        following = following if block is None else order[block]
        ranks.append(0 if i < first else following)
    return ranks[::-1]


def blocks_of(model: nn.Module) -> list[str]:
    """Return the names of the blocks: composite elements of containers, of a class that recurs there.

    Where such elements contain others, the outer one is a stage if most of its parameters lie in those; else it is the block.
    """
    modules = {path: unwrapped(module, compiled=False) for path, module in model.named_modules()}
    elements = {
        path: module
        for path, module in modules.items()
        if path
        and isinstance(modules[path.rpartition(".")[0]], _CONTAINERS)
        and not isinstance(module, _CONTAINERS)
        and any(True for child in module.children() for _ in child.parameters())
    }
    kinds = Counter(type(module) for module in elements.values())
    elements = {path: module for path, module in elements.items() if kinds[type(module)] > 1}
    blocks: list[str] = []
    for path, module in elements.items():  # outer ones come first
        if any(path.startswith(f"{block}.") for block in blocks):
            continue
        inner = {id(p) for name, other in elements.items() if name.startswith(f"{path}.") for p in other.parameters()}
        if 2 * len(inner) <= sum(1 for _ in module.parameters()):
            blocks.append(path)
    return [clean_name(block) for block in blocks]
