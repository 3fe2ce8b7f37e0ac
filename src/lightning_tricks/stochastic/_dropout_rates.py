"""Where a model keeps rates of dropout: in layers of torch's, and as numbers that modules hand to functions."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_tricks._core.strategies import plain_name
from lightning_tricks.stochastic._masking import Kind

__all__ = ["Rate", "rates_of"]

_KINDS: dict[type[nn.Module], Kind] = {
    nn.Dropout: "element",
    nn.Dropout1d: "channel",
    nn.Dropout2d: "channel",
    nn.Dropout3d: "channel",
    nn.AlphaDropout: "alpha",
    nn.FeatureAlphaDropout: "channel_alpha",
}
_NAMED = re.compile(
    r"(\w+_)?dropout(_p|_prob|_probability|_rate)?|((attn|attention|embed|ffn|head|hidden|mlp|pos|proj|resid)_)?drop(_p|_rate)?"
)
_IN_LAYERS = {"p", "rate", "drop_prob"}  # of classes called dropout


@dataclass(frozen=True)
class Rate:
    """A place where a model keeps a rate of dropout.

    Attributes:
        module: Who keeps it.
        attribute: As what.
        kind: What a layer of torch's draws, where one can stand in for it; None where something else reads the number.
        readers: The modules whose mode decides whether anything is dropped.
    """

    module: nn.Module
    attribute: str
    kind: Kind | None
    readers: tuple[nn.Module, ...]

    @property
    def value(self) -> float:
        """The rate as it is now."""
        return float(getattr(self.module, self.attribute))

    def set(self, rate: float) -> None:
        """Let the module drop at this rate."""
        setattr(self.module, self.attribute, rate)


def rates_of(model: nn.Module) -> dict[str, Rate]:
    """Find the rates of a model, by the name of the layer or of the attribute.

    These are found: layers of torch's dropout family and of classes derived from it; and numbers called after dropout, such as
    ``dropout``, ``attention_dropout``, ``attn_drop`` or ``drop_rate``, in modules with a method that reads both the number and
    ``training``, such as `nn.MultiheadAttention`, an `nn.LSTM` of several layers, and whoever calls `F.dropout` by itself. A layer
    whose rate another module reads, as fused attention does, counts as a number.
    """
    found = {}
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, name))
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            readers = [parent for parent, own in parents.get(id(module), ()) if any({own, "p"} <= names for names in _reads_of(parent))]
            kind = next((kind for layer, kind in _KINDS.items() if type(module).forward is layer.forward), None)
            found[plain_name(name, compiled=False)] = Rate(module, "p", None if readers else kind, (module, *readers))
        else:
            path = plain_name(name, compiled=False)
            found.update({f"{path}.{each}".strip("."): Rate(module, each, None, (module,)) for each in _numbers(module)})
    return found


def _numbers(module: nn.Module) -> list[str]:
    reads = _reads_of(module)
    if not reads or (isinstance(module, nn.RNNBase) and module.num_layers == 1):  # which has no place for its dropout
        return []
    layer = type(module).__name__.endswith("Dropout")
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= 1
        and any(
            name in names and (_NAMED.fullmatch(name) or (layer and name in _IN_LAYERS) or (name == "p" and "dropout" in names))
            for names in reads
        )
    ]


def _reads_of(module: nn.Module) -> tuple[frozenset[str], ...]:
    """Return the names that a module's methods use, for each method that reads ``training``."""
    kind: Any = type(module)
    return _reads_of_class(kind)


@cache
def _reads_of_class(kind: type[nn.Module]) -> tuple[frozenset[str], ...]:
    methods = (
        inspect.unwrap(getattr(each, "__func__", each))
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name, each in vars(base).items()
        if callable(each) and name not in {"__init__", "reset_classifier"}
    )
    names = (frozenset(method.__code__.co_names) for method in methods if hasattr(method, "__code__"))
    return tuple(each for each in names if "training" in each)
