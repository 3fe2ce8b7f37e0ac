"""The weights of a model that are matrices to the layers that own them: which there are, and how to write to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.parameter import is_lazy

from lightning_tricks._core.strategies import cut, own_part, plain_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lightning_tricks._core.shards import Shards

__all__ = ["Matrix", "find_matrices", "generators", "multiply", "reason_to_leave", "write", "zero"]

_GATES: Final = {"LSTM": 4, "GRU": 3, "RNN": 1}
_FOREIGN_LINEAR: Final = "transformers.pytorch_utils.Conv1D"  # GPT-2's linear layer, which keeps its matrix the other way round


@dataclass(frozen=True)
class Matrix:
    """A weight that is a matrix, or several of the same inputs, to the layer that owns it.

    Attributes:
        owner: The layer.
        key: The weight's name there.
        fan_in: Number of inputs of a unit.
        fan_out: Number of units that an input reaches.
        pieces: How many matrices it holds, one after another: those of a recurrent layer's gates, or of queries, keys and values.
        biases: Names of the biases that belong to it.
        measured: The module whose output is this layer's, if there is one.
        embedding: Whether its rows are looked up.
    """

    owner: nn.Module
    key: str
    fan_in: int
    fan_out: int
    pieces: int = 1
    biases: tuple[str, ...] = ()
    measured: nn.Module | None = None
    embedding: bool = False

    @property
    def transposed(self) -> bool:
        """Whether rows are inputs."""
        return _is_foreign_linear(self.owner)


def find_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Return all matrices by the names of their weights, tied ones once; one that is an embedding's, too, is that.

    Example:
        >>> {name: each.fan_in for name, each in find_matrices(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 2))).items()}
        {'0.weight': 18, '1.weight': 8}
    """
    outer = {id(each.out_proj): each for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    found: dict[str, Matrix] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        # Attention uses its last layer's weights and never calls it.
        for matrix in _of_layer(module, outer.get(id(module), module)):
            parameter = module._parameters.get(matrix.key)
            name = plain_name(f"{path}.{matrix.key}".lstrip("."))
            first = name if parameter is None else names.setdefault(id(parameter), name)
            if first not in found or matrix.embedding:
                found[first] = matrix
    return found


def _of_layer(module: nn.Module, measured: nn.Module) -> Iterator[Matrix]:
    """Yield a layer's own."""
    if isinstance(module, _ConvNd):
        taps, groups = math.prod(module.kernel_size), module.groups
        fans = module.in_channels // groups * taps, module.out_channels // groups * taps
        yield Matrix(module, "weight", *fans, biases=("bias",), measured=measured)
    elif isinstance(module, nn.Linear):
        yield Matrix(module, "weight", module.in_features, module.out_features, biases=("bias",), measured=measured)
    elif _is_foreign_linear(module):
        weight: Any = module.weight
        fan_in, fan_out = weight.shape
        yield Matrix(module, "weight", fan_in, fan_out, biases=("bias",), measured=measured)
    elif isinstance(module, nn.MultiheadAttention):
        yield from _of_attention(module)
    elif isinstance(module, nn.RNNBase | RNNCellBase):
        yield from _of_recurrence(module)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield Matrix(module, "weight", module.num_embeddings, module.embedding_dim, embedding=True)


def _of_attention(module: nn.MultiheadAttention) -> Iterator[Matrix]:
    width, biases = module.embed_dim, ("in_proj_bias",)
    if module._qkv_same_embed_dim:
        yield Matrix(module, "in_proj_weight", width, width, 3, biases)
    else:
        for key, fan_in in (("q", width), ("k", module.kdim or width), ("v", module.vdim or width)):
            yield Matrix(module, f"{key}_proj_weight", fan_in, width, biases=biases)


def _of_recurrence(module: nn.Module) -> Iterator[Matrix]:
    gates = next((count for kind, count in _GATES.items() if type(module).__name__.startswith(kind)), 1)
    for key, parameter in module._parameters.items():
        if key.startswith("weight") and parameter is not None:
            pieces = 1 if "_hr" in key else gates
            yield Matrix(module, key, parameter.shape[1], parameter.shape[0] // pieces, pieces, (key.replace("weight", "bias"),))


def _is_foreign_linear(module: nn.Module) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" == _FOREIGN_LINEAR for kind in type(module).__mro__)


def reason_to_leave(matrix: Matrix, *, embeddings: bool) -> str:
    """Return why a matrix is left as it is; embeddings are, unless asked for."""
    parametrized = matrix.key in getattr(matrix.owner, "parametrizations", {})
    parameter = matrix.owner._parameters.get(matrix.key)
    if parametrized:
        frozen = not any(each.requires_grad for each in matrix.owner.parametrizations[matrix.key].parameters())  # type: ignore[index, union-attr]
        return "it is frozen" if frozen else ""
    if parameter is None:
        return "its weight is computed from other parameters by a hook"
    if is_lazy(parameter):
        return "its shape is not known before the first batch"
    if parameter.is_meta:
        return "it has no values yet, on the meta device"
    if not parameter.requires_grad:
        return "it is frozen"
    return "it is an embedding" if matrix.embedding and not embeddings else ""


def generators(names: Sequence[str], seed: int) -> dict[str, torch.Generator]:
    """Return a generator for each layer, which depends on its place among all and on no other layer's draws."""
    seeds = torch.randint(2**31, (len(names),), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return {name: torch.Generator().manual_seed(each) for name, each in zip(names, seeds, strict=True)}


@torch.no_grad()
def write(matrix: Matrix, tensors: Mapping[str, Tensor | Shards], name: str, draw: Callable[[torch.Size, torch.dtype], Tensor]) -> None:
    """Draw a weight on the CPU, the same on every rank, and copy it, or the part that this rank owns, to where it belongs."""
    weight: Any = tensors.get(name)
    shape = getattr(matrix.owner, matrix.key).shape if weight is None else weight.shape
    dtype = torch.float64 if weight is not None and own_part(weight).dtype == torch.float64 else torch.float32
    value = draw(shape, dtype)
    if weight is None:
        old = getattr(matrix.owner, matrix.key)
        setattr(matrix.owner, matrix.key, value.to(old))  # through its parametrization
    else:
        own_part(weight).copy_(cut(value, weight))


@torch.no_grad()
def zero(tensors: Mapping[str, Tensor | Shards], names: Iterable[str]) -> None:
    """Set parameters to zero, those that there are."""
    for name in names:
        if name in tensors:
            own_part(tensors[name]).zero_()


@torch.no_grad()
def multiply(matrix: Matrix, factor: float) -> None:
    """Scale a weight."""
    weight = getattr(matrix.owner, matrix.key)
    if isinstance(weight, nn.Parameter):
        weight.mul_(factor)
    else:
        setattr(matrix.owner, matrix.key, weight * factor)
