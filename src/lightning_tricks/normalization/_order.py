"""In which order a model calls its modules, as far as `torch.fx` can trace it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from torch import fx, nn

from lightning_tricks._core.lightning import trainer_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Call", "Order", "copy_of", "find_order"]


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        module: Name of the module whose output it takes; None if it takes something else.
        source: What it takes, in words.
        users: How many operations use what it takes.
    """

    module: str | None
    source: str
    users: int


@dataclass
class Order:
    """What a model calls.

    Attributes:
        calls: The calls of each module by name.
        read: Names of tensors that are used past the modules that hold them.
        untraced: Modules that could not be traced, each with the reason.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    untraced: dict[str, str] = field(default_factory=dict)


def copy_of(model: nn.Module, *, share: bool = False) -> nn.Module:
    """Copy a model, without its Trainer and, to `share` them, without its tensors."""
    kept = [trainer_of(model), *(chain(model.parameters(), model.buffers()) if share else ())]
    return deepcopy(model, {id(each): each for each in kept})


def find_order(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Order:
    """Find what a model calls, in its order.

    Where a module cannot be traced, those in it are traced one by one, and it is taken as a whole in the trace of what holds it.
    Tracing runs the model's code, and so a copy's.

    Args:
        model: The model.
        is_leaf: Which modules to take as a whole, besides torch's own.
    """
    order = Order()
    boxes: dict[nn.Module, str] = {}
    for name, graph in _traces("", copy_of(model, share=True), is_leaf, boxes, order.untraced):
        for node in graph.nodes:
            target = _inside(name, str(node.target))
            if node.op == "call_module":
                order.calls.setdefault(target, []).append(_call(name, node))
            elif node.op == "get_attr":
                order.read.add(target)
    return order


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool], boxes: dict[nn.Module, str]) -> None:
        super().__init__()
        self.is_leaf, self.boxes = is_leaf, boxes

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.boxes or self.is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _traces(
    name: str, module: nn.Module, is_leaf: Callable[[nn.Module], bool], boxes: dict[nn.Module, str], untraced: dict[str, str]
) -> list[tuple[str, fx.Graph]]:
    """Return traces that cover a module together, by names; put what cannot be traced into boxes."""
    known = len(boxes)
    graph = _trace(module, is_leaf, boxes)
    if isinstance(graph, fx.Graph):
        return [(name, graph)]
    pieces = []
    for key, child in module.named_children():
        if not _Tracer(is_leaf, boxes).is_leaf_module(child, key) or isinstance(child, nn.ModuleList | nn.ModuleDict):
            pieces += _traces(_inside(name, key), child, is_leaf, boxes, untraced)
    again = _trace(module, is_leaf, boxes) if len(boxes) > known else graph
    if isinstance(again, fx.Graph):
        return [(name, again), *(piece for piece in pieces if any(piece[0].startswith(f"{box}.") for box in boxes.values()))]
    boxes[module] = name
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        untraced[name] = again
    return pieces


def _trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool], boxes: dict[nn.Module, str]) -> fx.Graph | str:
    if "forward" in vars(module):  # which torch.fx would not see
        return "its `forward` is replaced"
    try:
        return _Tracer(is_leaf, boxes).trace(module)
    except Exception as error:  # noqa: BLE001  # whatever the model's code does with what stands for a tensor
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _call(name: str, node: fx.Node) -> Call:
    sources = node.all_input_nodes
    if len(sources) != 1:
        return Call(None, f"{len(sources)} tensors", 0)
    source, users = sources[0], len(sources[0].users)
    if source.op == "call_module":
        return Call(_inside(name, str(source.target)), "", users)
    if source.op == "placeholder":
        return Call(None, f"the input of {name!r}" if name else "the model's input", users)
    return Call(None, f"`{getattr(source.target, '__name__', source.target)}`", users)


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}".lstrip(".")
