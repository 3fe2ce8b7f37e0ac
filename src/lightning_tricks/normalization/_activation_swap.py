"""Swap the activations of a network, whoever made it.

An activation is a choice that papers make once and code spreads over a hundred places. Swapping it in a model that exists keeps all
else as it is: weights, keys, shared modules, hooks, and computation in place where that is safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lightning_tricks._core.checkpoint import write_change, write_entry
from lightning_tricks._core.checks import check_patterns
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, logs_now, override, rank_zero_info
from lightning_tricks._core.selection import matches
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import Patches, replace_module, when_built
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import ArgumentError, NothingMatchedError, UnsupportedStrategyError
from lightning_tricks.normalization._activations import (
    KINDS,
    Maker,
    as_function,
    as_text,
    class_at,
    kind_of,
    kind_of_function,
    kind_of_word,
    maker_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ActivationSwap", "SwappedActivations", "swap_activation"]

Source = str | type[nn.Module] | Sequence[str | type[nn.Module]]
Target = str | type[nn.Module] | nn.Module

_FUNCTION = "swap_activation"


@dataclass(frozen=True)
class SwappedActivations:
    """What surgery has done.

    Attributes:
        swapped: Names of modules, and of attributes that hold functions, each with what was there and what is there now.
        left: Those that are activations of the source and were left, each with the reason.

    Example:
        >>> swap_activation(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "relu", "gelu").swapped
        {'1': "ReLU() → GELU(approximate='none')"}
    """

    swapped: Mapping[str, str]
    left: Mapping[str, str]


def swap_activation(
    model: nn.Module,
    source: str | type[nn.Module] | Sequence[str | type[nn.Module]],
    target: str | type[nn.Module] | nn.Module,
    *,
    where: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> SwappedActivations:
    """Put other activations in the place of a model's own.

    Modules are replaced wherever they are held, so that shared ones stay shared. Attributes that hold a function, such as
    ``torch.nn.functional.relu`` in ``nn.TransformerEncoderLayer``, get the target's function. An activation works in place if the one
    before it did and it can.

    Args:
        model: The model, which is changed in place.
        source: What is replaced: a name (``"relu"``), the path of a class, a class, or several of these. Names also find modules of
            other packages, by the names of their classes; ``"gelu"`` finds the tanh approximation, too.
        target: What comes in its place: a name, ``"leaky_relu(negative_slope=0.2)"`` with settings, a class, or a module, of which
            each place gets a copy.
        where: Glob or globs over qualified names of modules or attributes; None = everywhere.
        exclude: Globs over names that are left alone.

    Returns:
        A report: ``swapped``, and ``left`` with the reasons, among them code that calls an activation by itself.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If the model has neither source nor target, or `where` and `exclude` leave none.
        UnsupportedStrategyError: If the target has parameters and the model is sharded already.

    Note:
        What is of the target already is left as it is, so that a second call does nothing more. A target with parameters, ``"prelu"``,
        adds them to the model's keys; all others keep the keys.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.TransformerEncoderLayer(2, 1, 2))
        >>> report = swap_activation(model, "relu", "silu")
        >>> model[1], model[2].activation.__name__
        (SiLU(inplace=True), 'silu')
    """
    return _swap(model, _Source(source), maker_of("target", target), where, exclude, trick=_FUNCTION)


class _Source:
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
        return kind_of(module) in self.kinds or isinstance(module, tuple(self.classes))


def _swap(model: nn.Module, source: _Source, make: Maker, where: Any, exclude: Any, *, trick: str) -> SwappedActivations:
    where = None if where is None else check_patterns("where", where, empty=False)
    exclude = check_patterns("exclude", exclude, empty=True)
    like = make()
    if any(True for _ in like.parameters()) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        msg = f"{trick} would add parameters to a model that is sharded. Call `functional.{_FUNCTION}` before it is."
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
    replaced: bool  # whether it is of the source, and not of the target alone
    owner: nn.Module | None = None
    key: str = ""


def _places(model: nn.Module, source: _Source, like: nn.Module) -> dict[str, _Place]:
    """Return what is of the source, and what is of the target already, by name."""
    found: dict[str, _Place] = {}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    function = as_function(like)
    for path, module in model.named_modules():
        replaced = source.has(module)
        if path and (replaced or _says(module) == _says(like)):
            aliases = [plain_name(each) for each in paths[id(module)]]
            found[aliases[0]] = _Place(module, path, aliases, replaced)
        for key, value in vars(module).items():
            replaced = kind_of_function(value) in source.kinds
            if not key.startswith("_") and (replaced or (kind_of_function(value) and _title(value) == _title(function))):
                name = plain_name(f"{path}.{key}".lstrip("."))
                found[name] = _Place(value, path, [name], replaced, module, key)
    return found


def _swap_module(old: nn.Module, new: nn.Module, model: nn.Module) -> str | None:
    """Put a module in the place of another; return why not."""
    if _says(old) == _says(new):
        return f"it is {old!r} already"
    replace_module(model, old, new)
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


class ActivationSwap(Trick):
    """Swap activations of a model for others: ``σ(x)`` becomes ``σ'(x)`` wherever the model has it.

    Reach for it to try an activation in a model that you did not write: a smooth one in a network of ReLUs, a cheap one in a network of
    GELUs. A trained network needs some training afterwards.

    Args:
        source: What is replaced: a name (``"relu"``), the path of a class, a class, or several of these. Names also find modules of
            other packages, by the names of their classes; ``"gelu"`` finds the tanh approximation, too.
        target: What comes in its place: a name, ``"leaky_relu(negative_slope=0.2)"`` with settings, the path of a class, a class, or
            one of torch's modules. Equal to `source`, it changes nothing.
        where: Glob or globs over qualified names of modules, or of attributes that hold functions; None = everywhere.
        exclude: Globs over names that are left alone.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if the model has neither source nor target, or `where` and `exclude` leave none.
        UnsupportedStrategyError: At setup, if the target has parameters and `configure_model` shards the layers as it builds them.

    Note:
        The swap happens before weights are loaded and optimizers configured, in every use of the Trainer, and lasts. A model that has
        been swapped already is left as it is. Keys stay, unless the target is ``"prelu"``, whose slopes are new keys. The checkpoint
        records the swap, since the weights belong to the new activation; `functional.swap_activation` repeats it on a new model.

        An activation works in place if the one before it did and it can. Code that calls an activation by itself is out of reach; the
        report that is logged at the start names it.

    Example:
        >>> ActivationSwap("relu", nn.LeakyReLU(0.2), exclude="head")
        ActivationSwap(source='relu', target='leaky_relu(negative_slope=0.2)', exclude='head')
    """

    def __init__(
        self,
        source: str | type[nn.Module] | Sequence[str | type[nn.Module]],
        target: str | type[nn.Module] | nn.Module,
        *,
        where: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._source = _Source(source)
        several = isinstance(source, Sequence) and not isinstance(source, str)
        self.source = [as_text("source", each) for each in source] if several else as_text("source", source)  # type: ignore[union-attr]
        self._make = maker_of("target", target)
        self.target = as_text("target", target)
        self.where = None if where is None else check_patterns("where", where, empty=False)
        self.exclude = check_patterns("exclude", exclude, empty=True)
        self._patches = Patches()
        self._count = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._patches.undo()
        creates = any(True for _ in self._make().parameters())
        self._patches = when_built(pl_module, self._operate, trick=repr(self), function=_FUNCTION, creates=creates)

    def _operate(self, module: nn.Module) -> None:
        report = _swap(module, self._source, self._make, self.where, self.exclude, trick=repr(self))
        self._count = len(report.swapped)
        text = "; ".join(f"{name}: {what}" for name, what in report.swapped.items()) or "nothing"
        rank_zero_info(f"{self!r} swapped {text}." + "".join(f" Not {name}: {reason}." for name, reason in report.left.items()))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if logs_now(trainer):
            pl_module.log(f"{self.log_prefix}/swapped", float(self._count))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._patches.undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patches.undo()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {})
        arguments = {"source": self.source, "target": self.target, "where": self.where, "exclude": self.exclude}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
        write_change(checkpoint, _FUNCTION, plain)
