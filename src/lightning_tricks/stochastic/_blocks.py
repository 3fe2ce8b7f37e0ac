"""Which blocks of a model can be left out: those whose output has their input's shape, found by running them without data.

A block is run on a copy of itself on torch's meta device, which knows shapes and no values: nothing is computed, no random number is
drawn, no statistic changes. The graph that autograd records tells whether the input reaches the output through sums alone, as it does
in a residual block, and whether an activation comes last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Shape", "ends_in_activation", "examine", "takes_batch_second"]

_SUMS = ("AddBackward",)
_VIEWS = ("View", "UnsafeView", "Reshape", "Permute", "Transpose", "Clone", "Slice", "Alias", "Squeeze", "Unsqueeze", "ToCopy", "Unbind")
_NORMS = ("NativeLayerNorm", "FusedRmsNorm", "RmsNorm")
_ACTIVATIONS = ("Relu", "LeakyRelu", "Prelu", "Elu", "Celu", "Selu", "Gelu", "Silu", "Mish", "Hardtanh", "Hardswish", "Hardsigmoid",
                "Sigmoid", "Tanh", "Softplus", "Softmax", "LogSoftmax", "LogSigmoid", "Threshold", "Clamp")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a run without data has shown of a block.

    Attributes:
        kept: Whether the output has the input's shape; None if no input was found that the block takes.
        residual: Whether the input reaches the output through sums.
        activated: Whether an activation comes last; None if unknown.
        bare: Whether the output is one tensor, and no tuple of several.
        reason: Why the block cannot be left out, if it cannot.
    """

    kept: bool | None
    residual: bool
    activated: bool | None
    reason: str = ""
    bare: bool = True


def examine(block: nn.Module) -> Shape:
    """Run a block without data on inputs of the shapes that its layers suggest."""
    try:
        twin = _on_meta(block).train()
    except Exception:  # noqa: BLE001  # whatever a module of somebody else's raises, it tells nothing about the shape
        return Shape(None, residual=False, activated=None, reason="it cannot be copied to be looked at")
    found = Shape(None, residual=False, activated=None, reason="no input was found that it takes")
    for shape in _inputs(block):
        leaf = torch.empty(shape, device="meta", dtype=_dtype(block), requires_grad=True)
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                output = twin(leaf.view_as(leaf))
        except Exception:  # noqa: BLE001, S112  # as above: the block takes another shape
            continue
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor):
            continue
        if first.shape != leaf.shape:
            found = (
                found
                if found.kept is not None
                else Shape(kept=False, residual=False, activated=None, reason=_change(leaf.shape, first.shape))
            )
        elif _reaches(first, leaf):
            return Shape(kept=True, residual=True, activated=ends_in_activation(first), bare=first is output)
        else:
            reason = "its input is not added to its output"
            found = Shape(kept=True, residual=False, activated=ends_in_activation(first), reason=reason, bare=first is output)
    return found


def _on_meta(block: nn.Module) -> nn.Module:
    """Copy a block without its values."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_empty(p), requires_grad=p.requires_grad) for p in block.parameters()}
    memo.update({id(buffer): _empty(buffer) for buffer in block.buffers()})
    return copy.deepcopy(block, memo)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _dtype(block: nn.Module) -> torch.dtype:
    return next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _inputs(block: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of inputs that a block may take, the likeliest first."""
    widths, dimensions = [], set()
    for layer in block.modules():
        width = next(
            (getattr(layer, name) for name in ("in_channels", "in_features", "num_features", "num_channels") if hasattr(layer, name)), None
        )
        width = getattr(layer, "normalized_shape", (width,))[-1]
        widths += [width] if isinstance(width, int) and width not in widths else []
        dimensions |= {i for i, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1) if isinstance(layer, kind)}
    for width in widths[:4]:
        yield from ((2, width, *(side,) * count) for side in (14, 16) for count in sorted(dimensions))  # multiples of usual windows
        yield from ((2, side, side, width) for side in (14, 16))
        yield from ((2, length, width) for length in (196, 197, *(each for each in widths[:4] if each != width)))
        yield (2, width)


def _change(before: torch.Size, after: torch.Size) -> str:
    text = " to ".join("×".join(map(str, shape[1:])) for shape in (before, after))
    return f"it changes the shape ({text})"


def _name(node: Any) -> str:
    return str(node.name()).removeprefix("struct torch::autograd::")


def _is_one_of(node: Any, names: tuple[str, ...]) -> bool:
    return _name(node).rstrip("0123456789").removesuffix("Backward") in {name.removesuffix("Backward") for name in names}


def ends_in_activation(output: Tensor) -> bool | None:
    """Tell by the graph whether an activation comes last; None where there is no graph."""
    node = output.grad_fn
    while node is not None and _is_one_of(node, _VIEWS):
        node = node.next_functions[0][0]
    return None if node is None else _is_one_of(node, _ACTIVATIONS) or "Relu" in _name(node)


def _reaches(output: Tensor, leaf: Tensor) -> bool:
    """Tell whether a path of sums leads from the input to the output, with at least one sum on it."""
    waiting, seen = [(output.grad_fn, False)], set()
    while waiting:
        node, summed = waiting.pop()
        if node is None or (node, summed) in seen:
            continue
        seen.add((node, summed))
        if getattr(node, "variable", None) is leaf:
            if summed:
                return True
        elif _is_one_of(node, (*_SUMS, *_VIEWS, *_NORMS, *_ACTIVATIONS)):
            summed |= _is_one_of(node, _SUMS)
            waiting += [(following, summed) for following, _ in node.next_functions]
    return False


def takes_batch_second(block: nn.Module) -> bool:
    """Tell whether a layer of torch's own in a block takes the sequence first and the batch second."""
    return any(getattr(layer, "batch_first", True) is False for layer in block.modules())
