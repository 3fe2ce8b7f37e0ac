"""A new last layer for a trained network.

The features that a network has learned serve other classes, too; its last layer does not. It is replaced by one of the same kind with
another number of outputs, drawn anew.

Source: J. Yosinski, J. Clune, Y. Bengio and H. Lipson, "How transferable are features in deep neural networks?", NeurIPS, 2014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_tricks._core.checks import check_count, check_patterns
from lightning_tricks._core.layers import blocks_of
from lightning_tricks._core.owners import clean_name
from lightning_tricks._core.selection import select_modules
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import replace_module
from lightning_tricks.errors import NothingMatchedError, TrickError, UnsupportedStrategyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Head", "find_head", "is_replaced", "outputs_of", "replace_head"]

_MARK: Final = "_replaced_head"
_KINDS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Head:
    """The new head of a model, and where it stands.

    Attributes:
        name: The layer's qualified name.
        layer: The layer.
        old_classes: Number of outputs that the layer before it had.
        num_classes: Number of outputs that it has.

    Example:
        >>> head = replace_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)), 3)
        >>> head.name, head.old_classes, head.num_classes
        ('2', 10, 3)
    """

    name: str
    layer: nn.Module
    old_classes: int
    num_classes: int


def replace_head(model: nn.Module, num_classes: int, *, where: str | None = None) -> Head:
    """Replace the last layer of a model by one of the same kind with another number of outputs, initialized anew.

    The head is what timm's models call their classifier, and in other models the one Linear or convolution whose outputs no other layer
    takes. The new layer has the old one's place, inputs, bias or none, kernel, stride, device, dtype and hooks, and torch's own initial
    values, also if the number of outputs stays. Numbers of classes that the modules around it keep, as timm's and transformers' do,
    follow; those that metrics and losses were made with do not.

    Reach for it before fine-tuning on other classes. `FineTuning(…, num_classes=…)` does it before a fit and records it in checkpoints.

    Args:
        model: The model, changed in place.
        num_classes: Number of outputs of the new head.
        where: Name of the head, or a glob that matches it alone; None = find it.

    Returns:
        The new head, with its name.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If there is no such layer.
        TrickError: If several layers may be meant; if the head is shared with another place of the model, is not built yet, is
            parametrized, has groups, or is of a class of its own, which nobody but the model can make anew.
        UnsupportedStrategyError: If the head is sharded already.

    References:
        J. Yosinski, J. Clune, Y. Bengio and H. Lipson, "How transferable are features in deep neural networks?", NeurIPS, 2014.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> replace_head(net, 3).layer
        Linear(in_features=8, out_features=3, bias=True)
    """
    num_classes = check_count("num_classes", num_classes)
    if where is not None:
        check_patterns("where", where, empty=False)
    name, old = find_head(model, where, who="replace_head")
    _check_replaceable(model, name, old)
    new, before = _like(old, num_classes), outputs_of(old)
    vars(new)[_MARK] = True
    replace_module(model, old, new)
    parts = name.split(".")
    for end in range(len(parts)):
        _tell(model.get_submodule(".".join(parts[:end])), before, num_classes)
    return Head(name, new, before, num_classes)


def find_head(model: nn.Module, where: str | None, *, who: str) -> tuple[str, nn.Module]:
    """Return the last layer and its name.

    Raises:
        NothingMatchedError: If there is none.
        TrickError: If several layers may be meant.
    """
    found = _said_heads(model) or _loose_ends(model) if where is None else select_modules(model, where, (), trick=who)
    if not found:
        msg = (
            f"{who} found no head in {type(model).__name__}: it has no Linear and no convolution whose outputs no other layer takes. Name "
            "the layer, or build the model's layers first."
        )
        raise NothingMatchedError(msg)
    if len(found) > 1:
        listed = ", ".join(map(repr, list(found)[:4]))
        msg = f"{who} needs one head, and {type(model).__name__} may have {len(found)}, such as {listed}. Name the one that is meant."
        raise TrickError(msg)
    ((name, layer),) = found.items()
    if not isinstance(layer, _KINDS):
        msg = f"{who} needs a Linear or a convolution as head, and {name!r} is a {type(layer).__name__}. Name a layer."
        raise TrickError(msg)
    return name, layer


def is_replaced(layer: nn.Module) -> bool:
    """Tell whether a layer is a head that `replace_head` has made."""
    return _MARK in vars(layer)


def outputs_of(layer: nn.Module) -> int:
    """Return the number of outputs of a layer."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _said_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return what the models of timm within a model call their classifiers, and layers after them that may be the head instead."""
    speakers: list[Any] = [module for module in model.modules() if callable(getattr(type(module), "get_classifier", None))]
    said = [speaker.get_classifier() for speaker in speakers]
    heads = [head for each in said for head in (each if isinstance(each, tuple | list | nn.ModuleList) else [each])]
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    found = {names[id(head)]: head for head in heads if isinstance(head, _KINDS) and id(head) in names}
    inside = {id(module) for speaker in speakers for module in speaker.modules()}
    later = {name: layer for name, layer in _untaken(model, later=True).items() if id(layer) not in inside}
    return {**found, **later} if found else {}


def _loose_ends(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose outputs no other layer can take, by their numbers; if there is none, no layer that comes later.

    Layers within blocks that recur are heads only if there is none elsewhere.
    """
    blocks = tuple(f"{block}." for block in blocks_of(model))
    ends = [_untaken(model, later=later) for later in (False, True)]
    outside = [{name: layer for name, layer in each.items() if not clean_name(name).startswith(blocks)} for each in ends]
    return next((each for each in (*outside, *ends) if each), {})


def _untaken(model: nn.Module, *, later: bool) -> dict[str, nn.Module]:
    """Return the layers whose outputs no other one can take, or no one that comes `later`."""
    layers: dict[str, nn.Module] = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, _KINDS)}
    order = {id(module): i for i, module in enumerate(model.modules())}
    takers = [(order[id(module)], module, taken) for module in model.modules() for taken in _inputs_of(module)]

    def taken(layer: nn.Module) -> bool:
        return any(
            taker is not layer and (not later or position > order[id(layer)]) and _fits(layer, taker, number)
            for position, taker, number in takers
        )

    return {name: layer for name, layer in layers.items() if not taken(layer)}


def _fits(layer: nn.Module, taker: nn.Module, number: int) -> bool:
    outputs = outputs_of(layer)
    flattened = isinstance(layer, _ConvNd) and isinstance(taker, nn.Linear) and number % outputs == 0
    return number == outputs or (number > 0 and outputs > number and outputs % number == 0) or flattened


def _inputs_of(module: nn.Module) -> Iterator[int]:
    """Yield the numbers of inputs that a module takes; one that is not known yet is 0."""
    for name in ("in_features", "in_channels", "num_features", "input_size", "embed_dim", "num_channels", "in1_features", "in2_features"):
        number = getattr(module, name, None)
        if isinstance(number, int) and (name != "num_features" or isinstance(module, _NormBase)):
            yield number
    shape = getattr(module, "normalized_shape", None)
    if shape:
        yield int(shape[-1])


def _check_replaceable(model: nn.Module, name: str, old: nn.Module) -> None:
    parameters = list(old.parameters(recurse=False))
    why = None
    if any(is_lazy(parameter) for parameter in parameters):
        why = "is not built yet. Run the model once first"
    elif any(isinstance(parameter, DTensor) for parameter in parameters):
        msg = f"replace_head creates parameters, and {name!r} is sharded already. Call it before the model is sharded."
        raise UnsupportedStrategyError(msg)
    elif is_parametrized(old) or any("weight_g" in key or "weight_orig" in key for key in dict(old.named_parameters(recurse=False))):
        why = "is parametrized, which a new layer would not be. Remove the parametrization first"
    elif not any(type(old).__init__ is kind.__init__ for kind in _KINDS):
        why = f"is a {type(old).__name__}, which only the model can make anew. Replace it by a Linear yourself"
    elif getattr(old, "groups", 1) != 1:
        why = f"has {old.groups} groups. Replace it yourself"
    else:
        own = {id(parameter) for parameter in parameters}
        held = [plain_name(each) for each, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own]
        if len(held) > len(parameters):
            why = f"is shared: its parameters are {', '.join(map(repr, held))}. Untie them first"
    if why is not None:
        msg = f"replace_head needs a head that can be made anew, and {name!r} {why}."
        raise TrickError(msg)


def _like(old: Any, num_classes: int) -> nn.Module:
    factory = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        return type(old)(old.in_features, num_classes, **factory)
    options = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new: nn.Module = type(old)(old.in_channels, num_classes, **options, **factory)
    return new


def _tell(module: nn.Module, before: int, num_classes: int) -> None:
    """Let a module that keeps the number of classes know the new one."""
    for owner, name in ((module, "num_classes"), (module, "num_labels"), (getattr(module, "config", None), "num_labels")):
        if getattr(owner, name, None) == before:
            setattr(owner, name, num_classes)
