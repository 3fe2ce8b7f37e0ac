"""What swapping activations does: find them, as modules and as functions, replace them, and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lightning_tricks._core.checks import check_patterns
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import replace_module
from lightning_tricks.errors import ArgumentError, NothingMatchedError, UnsupportedStrategyError
from lightning_tricks.normalization._activations import KINDS, Maker, as_function, class_at, kind_of, kind_of_function, kind_of_word

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Source", "SwappedActivations", "run_swap"]

_MARK = "_activations_swapped_in"  # an attribute that marks a module, or names the attributes of one, so that a second swap knows


@dataclass(frozen=True)
class SwappedActivations:
    """What surgery has done.

    Attributes:
        swapped: Names of modules, and of attributes that hold functions, each with what was there and what is there now.
        left: Those that are activations of the source and were left, each with the reason.
    """

    swapped: Mapping[str, str]
    left: Mapping[str, str]


class Source:
    """What is to be replaced."""

    def __init__(self, source: Any) -> None:
        several = source if isinstance(source, Sequence) and not isinstance(source, str) else (source,)
        self.kinds: set[str] = set()
        self.classes: list[type[nn.Module]] = []
        for each in several:
            kind = kind_of_word(each) if isinstance(each, str) and "." not in each else None
            if kind is not None:
                self.kinds |= {kind} | ({"gelu_tanh"} if kind == "gelu" else set())
            elif isinstance(each, type) and issubclass(each, nn.Module):
                self.classes.append(each)
            elif isinstance(each, str):
                self.classes.append(class_at("source", each))
            else:
                several = ()
        if not several:
            known = ", ".join(map(repr, KINDS))
            msg = f"`source` must be one of {known}, a class of modules or its path, or several of these, got {source!r}."
            raise ArgumentError(msg)

    def has(self, module: nn.Module) -> bool:
        """Tell whether a module is to be replaced."""
        return kind_of(module) in self.kinds or isinstance(module, tuple(self.classes))


def run_swap(model: nn.Module, source: Source, make: Maker, where: Any, exclude: Any, *, trick: str) -> SwappedActivations:
    """Do what `swap_activation` says, on behalf of whom errors should name."""
    where = None if where is None else check_patterns("where", where, empty=False)
    exclude = check_patterns("exclude", exclude, empty=True)
    like = make()
    if any(True for _ in like.parameters()) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        msg = f"{trick} would add parameters to a model that is sharded. Call `functional.swap_activation` before it is."
        raise UnsupportedStrategyError(msg)
    places = _places(model, source, like)
    located = {name for name, place in places.items() if where is None or any(matches(alias, where) for alias in place.aliases)}
    chosen = [name for name in places if name in located and not any(matches(alias, exclude) for alias in places[name].aliases)]
    left = dict(_calls(model, source.kinds))
    if not chosen:
        msg = f"{trick} found no activation: {_diagnosis(model, list(places), located, (where, exclude), left)}"
        raise NothingMatchedError(msg)
    swapped = {}
    for name in chosen:
        place = places[name]
        old = place.value
        reason = _swap_function(place, make, model) if place.key else _swap_module(old, _made_for(old, make(), model), model)
        if not reason:
            swapped[name] = f"{_title(old)} → {like!r}" if place.key else f"{old!r} → {model.get_submodule(place.path)!r}"
        elif place.replaced:
            left[name] = reason
    return SwappedActivations(swapped, left)


@dataclass(frozen=True)
class _Place:
    """Where a model has an activation: a module under all its names, or a function in an attribute of a module."""

    value: Any
    path: str  # of the module, as the model itself calls it
    aliases: Sequence[str]
    replaced: bool  # whether it is of the source, and not what an earlier swap has put there
    owner: nn.Module | None = None
    key: str = ""


def _places(model: nn.Module, source: Source, like: nn.Module) -> dict[str, _Place]:
    """Return what is of the source, and what an earlier swap for the same target has put there, by name."""
    found: dict[str, _Place] = {}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    function = as_function(like)
    for path, module in model.named_modules():
        replaced, marks = source.has(module), vars(module).get(_MARK, ())
        if path and (replaced or ("" in marks and _says(module) == _says(like))):
            aliases = [plain_name(each) for each in paths[id(module)]]
            found[aliases[0]] = _Place(module, path, aliases, replaced)
        for key, value in vars(module).items() if kind_of(module) is None else ():
            replaced = kind_of_function(value) in source.kinds
            if not key.startswith("_") and (replaced or (key in marks and _title(value) == _title(function))):
                name = plain_name(f"{path}.{key}".lstrip("."))
                found[name] = _Place(value, path, [name], replaced, module, key)
    return found


def _swap_module(old: nn.Module, new: nn.Module, model: nn.Module) -> str | None:
    """Put a module in the place of another; return why not."""
    if _says(old) == _says(new):
        return f"it is {old!r} already"
    replace_module(model, old, new)
    vars(new)[_MARK] = ("",)
    for parent in model.modules():
        if new in parent._modules.values():
            _tell(parent, new)
    return None


def _made_for(old: nn.Module | None, new: nn.Module, model: nn.Module) -> nn.Module:
    """Let a module work in place as the one before it, and put its parameters where the model has its own."""
    if hasattr(new, "inplace"):
        slopes = [getattr(new, name, 0.0) for name in ("negative_slope", "alpha")]
        # Backward passes of slopes below zero need the input, which would be overwritten.
        in_place = bool(getattr(old, "inplace", False)) and min(slopes) >= 0
        vars(new)["inplace"] = in_place
    neighbour = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return new if neighbour is None else new.to(device=neighbour.device, dtype=neighbour.dtype)


def _says(module: nn.Module) -> tuple[type, str]:
    """Return what a module computes, whether in place or not."""
    return type(module), ", ".join(part for part in module.extra_repr().split(", ") if "inplace" not in part)


def _swap_function(place: _Place, make: Maker, model: nn.Module) -> str | None:
    """Put a function in the place of another, or a module where it has parameters; return why not."""
    assert place.owner is not None
    new = _made_for(None, make(), model)
    function = as_function(new)
    if _title(place.value) == _title(function):
        return f"it is {_title(place.value)} already"
    if _title(place.value).endswith("_"):
        return "it changes its argument in place, and its result may not be used"
    setattr(place.owner, place.key, new if function is None else function)
    marked = place.owner if function is not None else new
    vars(marked)[_MARK] = (*vars(marked).get(_MARK, ()), place.key if function is not None else "")
    _tell(place.owner, new)
    return None


def _tell(owner: nn.Module, new: nn.Module) -> None:
    """Tell torch's transformer layers, whose fast path in evaluation knows two activations by number."""
    if hasattr(owner, "activation_relu_or_gelu"):
        vars(owner)["activation_relu_or_gelu"] = {"relu": 1, "gelu": 2}.get(str(kind_of(new)), 0)


def _title(function: Any) -> str:
    settings = getattr(function, "keywords", {})
    name = getattr(getattr(function, "func", function), "__name__", repr(function))
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})" if settings else name


def _calls(model: nn.Module, kinds: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the modules whose own code calls an activation as a function, which no surgery reaches, by the names in that code."""
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            continue
        own = [each for each in type(module).__mro__ if each.__module__.split(".")[0] not in {"torch", "lightning", "pytorch_lightning"}]
        codes = (code.__code__ for each in own for code in vars(each).values() if isinstance(code, FunctionType))
        used = {word for code in codes if code.co_name != "__init__" for word in code.co_names}
        called = sorted(word for word in used if hasattr(functional, word) and kind_of_word(word) in kinds and not hasattr(module, word))
        if called:
            yield plain_name(name), f"code of {type(module).__name__} calls {', '.join(called)} by itself"


def _diagnosis(model: nn.Module, found: list[str], located: Any, patterns: tuple[Any, Any], left: Mapping[str, str]) -> str:
    where, exclude = patterns
    if not found:
        kinds = sorted({kind for module in model.modules() if (kind := kind_of(module)) is not None} - {"identity"})
        there = f"has {', '.join(map(repr, kinds))}" if kinds else "has none as modules"
        calls = "".join(f"; {reason}" for reason in list(left.values())[:2])
        return f"{type(model).__name__} {there}{calls}. Name one that is there as `source`."
    if located:
        return f"`exclude={exclude!r}` removed all {len(located)} that can be replaced. Exclude less."
    names = ", ".join(map(repr, found[:3]))
    return f"`where={where!r}` matched none of {type(model).__name__}'s {len(found)}. Their names look like {names}."
