"""What a block of a model does to its input: whether its output has the same shape, and whether the input is added to it.

The graph that autograd records, in a run without data, tells whether the input reaches the output through sums alone, as it does in a
residual block, and whether an activation comes last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_tricks._core.surgery import StandIn
from lightning_tricks.stochastic._tracing import BATCH, Call, first_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Shape", "ends_in_activation", "examine", "is_added", "is_all_of", "takes_batch_second"]

_SUMS = ("Add",)
_VIEWS = ("View", "UnsafeView", "Reshape", "Permute", "Transpose", "T", "Clone", "Slice", "Alias", "Squeeze", "Unsqueeze", "ToCopy",
          "Unbind", "Select")  # fmt: skip
_NORMS = ("NativeLayerNorm", "FusedRmsNorm", "RmsNorm")
_ACTIVATIONS = ("Relu", "LeakyRelu", "Prelu", "Elu", "Celu", "Selu", "Gelu", "Silu", "Mish", "Hardtanh", "Hardswish", "Hardsigmoid",
                "Sigmoid", "Tanh", "Softplus", "Softmax", "LogSoftmax", "LogSigmoid", "Threshold", "Clamp")  # fmt: skip
_BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm")
_LEAVES = ("AccumulateGrad",)


@dataclass(frozen=True)
class Shape:
    """What a run without data has shown of a block.

    Attributes:
        kept: Whether the output has the input's shape; None if no input was found that the block takes.
        residual: Whether the input reaches the output through sums.
        activated: Whether an activation comes last; None if unknown.
        reason: Why the block cannot be left out, if it cannot.
        bare: Whether the output is one tensor, and no tuple of several.
        call: What it was run on.
    """

    kept: bool | None
    residual: bool
    activated: bool | None
    reason: str = ""
    bare: bool = True
    call: Call | None = None


def examine(calls: Iterable[Call]) -> Shape:
    """Run a block without data, on each of these inputs until one shows that it can be left out."""
    found = Shape(None, residual=False, activated=None, reason="no input was found that it takes")
    for call in calls:
        try:
            output, leaf, given = call()
        except Exception:  # noqa: BLE001, S112  # the block takes another shape
            continue
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor):
            continue
        bare = first is output
        if not call.guessed and len(leaf) != BATCH and any(isinstance(each, Tensor) and each is not leaf for each in tree_leaves(given)):
            found = replace(found, reason="its first tensor has another size than the batch, unlike others that it is given")
        elif not bare and _streams(tree_leaves(given), tree_leaves(output)) > 1:
            found = Shape(kept=False, residual=False, activated=None, reason="it carries more than one tensor on", bare=bare, call=call)
        elif first.shape != leaf.shape:
            if found.kept is None:
                found = Shape(kept=False, residual=False, activated=None, reason=_change(leaf.shape, first.shape), bare=bare, call=call)
        elif _reaches(first, leaf):
            return Shape(kept=True, residual=True, activated=ends_in_activation(first), bare=bare, call=call)
        else:
            normed = _reaches(first, leaf, through=_BATCH_NORMS)
            reason = "its input is normalized before it is added" if normed else "its input is not added to its output"
            found = Shape(kept=True, residual=False, activated=ends_in_activation(first), reason=reason, bare=bare, call=call)
    return found


def _streams(given: list[Any], returned: list[Any]) -> int:
    """Count the tensors that have the batch, and of whose shape there is one that comes out, not as it came in."""
    shapes = [(each.shape, each.dtype) for each in returned if isinstance(each, Tensor) and not any(each is one for one in given)]
    tensors = [each for each in given if isinstance(each, Tensor) and each.is_floating_point() and each.shape[:1] == (BATCH,)]
    return sum((each.shape, each.dtype) in shapes for each in tensors)


def _change(before: torch.Size, after: torch.Size) -> str:
    text = " to ".join("×".join(map(str, shape[1:])) for shape in (before, after))
    return f"it changes the shape ({text})"


def _is_one_of(node: Any, names: tuple[str, ...]) -> bool:
    return str(node.name()).rpartition("::")[2].rstrip("0123456789").removesuffix("Backward") in names


def ends_in_activation(output: Tensor) -> bool | None:
    """Tell by the graph whether an activation comes last; None where there is no graph."""
    node = output.grad_fn
    while node is not None and _is_one_of(node, _VIEWS):
        node = node.next_functions[0][0]
    return None if node is None else _is_one_of(node, _ACTIVATIONS) or "Relu" in str(node.name())


def _reaches(output: Tensor, leaf: Tensor, *, through: tuple[str, ...] = ()) -> bool:
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
        elif _is_one_of(node, (*_SUMS, *_VIEWS, *_NORMS, *_ACTIVATIONS, *through)):
            summed |= _is_one_of(node, _SUMS)
            waiting += [(following, summed) for following, _ in node.next_functions]
    return False


def _nodes(root: Any, *, without: Any = None) -> Iterator[Any]:
    """Yield all nodes of a graph, except for what only one of its nodes leads to."""
    waiting, seen = [root], {None, without}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def is_all_of(call: Call, parts: Mapping[nn.Module, bool]) -> bool:
    """Tell whether a block computes nothing but sums, products, norms and activations, once parts of it compute nothing.

    Args:
        call: The block.
        parts: Modules within it; what is True returns its input then, the others zeros in its place.
    """
    stubs = [_Stub(part, passes=passes) for part, passes in parts.items()]
    for stub in stubs:
        stub.attach()
    try:
        output, *_ = call()
    except Exception:  # noqa: BLE001  # the block needs what a part makes of its input
        return False
    finally:
        for stub in stubs:
            stub.detach()
    allowed = (*_SUMS, "Mul", *_VIEWS, *_NORMS, *_ACTIVATIONS, *_LEAVES)
    return all(_is_one_of(node, allowed) for root in _roots(output) for node in _nodes(root))


class _Stub(StandIn):
    """Returns, as the first tensor, the first that it is given, or zeros; what else a module returns comes from nothing."""

    def __init__(self, module: nn.Module, *, passes: bool) -> None:
        super().__init__(module)
        self.passes = passes

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        leaves, structure = tree_flatten(self.plain(*arguments, **options))
        leaves = [each.detach() if isinstance(each, Tensor) else each for each in leaves]
        place = next(i for i, each in enumerate(leaves) if isinstance(each, Tensor))
        x = first_tensor((arguments, options))
        leaves[place] = x if self.passes else torch.zeros_like(leaves[place])
        return tree_unflatten(leaves, structure)


def is_added(scope: Call, part: nn.Module) -> bool:
    """Tell whether the output of a part is added to what the part's input was made from, in the run of a module that contains it."""
    marks: list[tuple[Any, Any]] = []

    def mark(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        places = [i for i, each in enumerate(leaves) if isinstance(each, Tensor) and each.grad_fn is not None]
        inputs = [each for each in tree_flatten((given, named))[0] if isinstance(each, Tensor) and each.grad_fn is not None]
        if not places or not inputs:
            return output
        leaves[places[0]] = leaves[places[0]].view_as(leaves[places[0]])
        marks.append((inputs[0].grad_fn, leaves[places[0]].grad_fn))
        return tree_unflatten(leaves, structure)

    handle = part.register_forward_hook(mark, with_kwargs=True)
    try:
        output, *_ = scope()
    except Exception:  # noqa: BLE001  # nothing is known then
        return False
    finally:
        handle.remove()
    return bool(marks) and any(_is_term(root, *marks[0]) for root in _roots(output))


def _roots(output: Any) -> list[Any]:
    return [each.grad_fn for each in tree_leaves(output) if isinstance(each, Tensor) and each.grad_fn is not None]


def _is_term(root: Any, source: Any, end: Any) -> bool:
    """Tell whether views alone lead from `end` to a sum, and its other terms come from what leads to `source`, too."""
    stream = {node for node in _nodes(source) if not isinstance(getattr(node, "variable", None), nn.Parameter)}
    consumers: dict[Any, list[Any]] = {}
    for node in _nodes(root):
        for following, _ in node.next_functions:
            consumers.setdefault(following, []).append(node)
    while len(following := consumers.get(end, [])) == 1:
        node = following[0]
        if _is_one_of(node, _SUMS):
            others = [each for each, _ in node.next_functions if each is not None and each is not end]
            return any(other in stream or not stream.isdisjoint(_nodes(other, without=end)) for other in others)
        if not _is_one_of(node, (*_VIEWS, "Mul")):
            return False
        end = node
    return False


def takes_batch_second(block: nn.Module) -> bool:
    """Tell whether a layer of torch's own in a block takes the sequence first and the batch second."""
    return any(getattr(layer, "batch_first", True) is False for layer in block.modules())
