"""What a parameter is, decided by the module that owns it.

Weight decay belongs on the matrices of a network: the weights of linear, convolutional, recurrent, attention and bilinear layers
(He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019). Rules that guess these from a
tensor's rank or from words in its name decay two-dimensional layer scales and class tokens, and lose a model's own exemptions as soon
as the model sits inside another module. The rule here asks the module that owns the parameter. It gives the same answer inside a
LightningModule, under ``torch.compile`` and where a strategy has flattened or emptied the tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.parametrize import ParametrizationList

from lightning_tricks._core.strategies import plain_name

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KINDS", "Kind", "Owned", "clean_name", "kind_of", "owned_parameters", "walk_parameters"]

Kind: TypeAlias = Literal["matrix", "embedding", "norm", "bias", "other"]
KINDS: Final = ("matrix", "embedding", "norm", "bias", "other")

_MATRIX_OWNERS: Final = (nn.Linear, _ConvNd, nn.RNNBase, RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
_FOREIGN_MATRIX_OWNERS: Final = frozenset({"transformers.pytorch_utils.Conv1D"})  # GPT-2's linear layer, which is no nn.Linear
_EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)
# The weights themselves, also when weight_norm (`_v`), spectral_norm or pruning (`_orig`) keep them under another name.
_MATRIX: Final = re.compile(r"(weight(_(ih|hh|hr)(_l\d+(_reverse)?)?)?|(in|q|k|v)_proj_weight)(_v|_orig)?")
_BIAS: Final = re.compile(r"(.+_)?bias(_.+)?")


@dataclass(frozen=True)
class Owned:
    """A parameter and what its owners say of it.

    Attributes:
        parameter: The parameter.
        names: Its qualified names without those of wrappers; a tied parameter has several.
        kind: What it is to its owner. A tied parameter is a matrix only if it is one to all its owners.
        exempt: Whether a module's own `no_weight_decay` names it.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    kind: Kind
    exempt: bool


def owned_parameters(model: nn.Module) -> list[Owned]:
    """Return every parameter of a model once, frozen ones included, with what its owners say of it.

    The answer depends on the types and names of modules alone, never on the shape of a tensor, so that lazy, flattened, emptied and
    sharded parameters are judged as the plain ones would be.

    Example:
        >>> [(owned.names, owned.kind) for owned in owned_parameters(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))]
        [(('0.weight',), 'matrix'), (('0.bias',), 'bias'), (('1.weight',), 'norm'), (('1.bias',), 'norm')]
    """
    exempt = _exemptions(model)
    found: dict[int, tuple[nn.Parameter, dict[str, Kind]]] = {}
    for name, parameter, kind in walk_parameters(model):
        found.setdefault(id(parameter), (parameter, {}))[1][name] = kind
    return [
        Owned(
            parameter,
            tuple(kinds),
            next((kind for kind in kinds.values() if kind != "matrix"), "matrix"),
            any(_named_by(name, exempt) for name in kinds),
        )
        for parameter, kinds in found.values()
    ]


def walk_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Kind]]:
    """Yield every parameter under every name it has, without those of wrappers, with what it is to the owner that calls it so."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{local}" if path else local
                if isinstance(module, ParametrizationList):
                    # `layer.parametrizations.weight.original` is the weight of `layer`.
                    holder, _, tensor = path.rpartition(".")
                    owner = modules[holder.rpartition(".")[0]]
                    # Of weight_norm's two parts, the first is the magnitude.
                    magnitude = type(module[0]).__name__ == "_WeightNorm" and local == "original0"
                    yield clean_name(name), parameter, "other" if magnitude else kind_of(owner, tensor)
                else:
                    yield clean_name(name), parameter, kind_of(module, local)


def kind_of(owner: nn.Module, name: str) -> Kind:
    """Return what a parameter is to the module that owns it under this name.

    Example:
        >>> kind_of(nn.Conv2d(3, 8, 3), "weight"), kind_of(nn.LSTM(2, 2), "bias_hh_l0"), kind_of(nn.BatchNorm2d(8), "bias")
        ('matrix', 'bias', 'norm')
    """
    ancestry = type(owner).__mro__
    if isinstance(owner, _MATRIX_OWNERS) or any(f"{kind.__module__}.{kind.__qualname__}" in _FOREIGN_MATRIX_OWNERS for kind in ancestry):
        if _MATRIX.fullmatch(name):
            return "matrix"
    elif isinstance(owner, _EMBEDDINGS):
        return "embedding"
    elif any("norm" in kind.__name__.lower() for kind in ancestry):
        return "norm"
    return "bias" if _BIAS.fullmatch(name) else "other"


def clean_name(name: str) -> str:
    """Remove from a qualified name the names of wrappers: of ``torch.compile``, FSDP and activation checkpointing."""
    return plain_name(name, compiled=False)


def _exemptions(model: nn.Module) -> set[str]:
    """Return the names that modules exempt by a method `no_weight_decay`, wherever in the model these modules sit."""
    found: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        listed = getattr(module, "no_weight_decay", None)
        names = listed() if callable(listed) else listed
        if isinstance(names, str):
            names = [names]
        elif isinstance(names, bool):
            names = ["*"] if names else []
        prefix = clean_name(f"{path}.") if path else ""
        found |= {prefix + clean_name(name) for name in names or ()}
    return found


def _named_by(name: str, exempt: set[str]) -> bool:
    """Tell whether a list names a parameter, a module that holds it, or either by a glob."""
    parts = name.split(".")
    spans = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return not spans.isdisjoint(exempt) or any(fnmatchcase(name, pattern) for pattern in exempt if "*" in pattern)
