"""What follows what in a model: which activation a layer's output reaches, and which layer ends a residual branch.

A copy of the model on torch's meta device, which knows shapes and no values, is run on an input of the shape that its first layer
suggests, or of a batch that is given. Every function of torch that it calls is noted with the tensors that it takes and gives, so that
activations and sums written as functions are seen as well as modules. Where the whole does not run, its parts are tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_tricks.normalization._activations import kind_of_word

__all__ = ["Flow", "Following", "examine_flow"]

_SUMS: Final = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_ENDS: Final = {"softmax", "log_softmax"}  # after which no activation is one of the layer before


@dataclass
class _Call:
    """A call of one of torch's functions."""

    name: str
    inputs: list[int]  # calls that made its tensors, in the order of arguments
    parameters: list[str]  # names of the parameters it takes
    again: Callable[[Tensor], Tensor]  # the same on another tensor
    negative_slope: Any = None


@dataclass(frozen=True)
class Following:
    """The activation that a layer's output reaches: its name, and what it computes."""

    kind: str
    function: Callable[[Tensor], Tensor]
    negative_slope: float


@dataclass
class Flow:
    """What the runs have shown.

    Attributes:
        following: For each weight that was used, by name, the activation its output reaches first; None if it reaches none.
        ends: Names of the parameters of the layers that end residual branches: of the last layer with weights, or of its norm.
        unseen: Modules of which no run succeeded.
    """

    following: dict[str, Following | None] = field(default_factory=dict)
    ends: list[tuple[str, ...]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def examine_flow(model: nn.Module, weights: set[str], *, example: Any = None) -> Flow:
    """Run a model without data, and say what follows the layers with these weights and what ends its branches.

    Args:
        model: The model, which is left alone.
        weights: Names of parameters.
        example: A tensor of the shape of the model's input; None = one is guessed.
    """
    flow = Flow()
    try:
        twin = _on_meta(model)
    except Exception:  # noqa: BLE001  # whatever a module of somebody else's raises, it tells nothing
        flow.unseen.append("")
        return flow
    _examine(twin, "", {id(p): name for name, p in twin.named_parameters()}, weights, flow, example=example)
    return flow


def _examine(module: nn.Module, name: str, names: Mapping[int, str], weights: set[str], flow: Flow, *, example: Any) -> None:
    if not any(names[id(parameter)] in weights for parameter in module.parameters()):
        return
    for inputs in _inputs(module, example):
        tape = _Tape(names, inputs)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("meta"), tape:
                module(*inputs)
        except Exception:  # noqa: BLE001, S112  # as above: it takes another input
            continue
        _read(tape.calls, weights, flow)
        return
    flow.unseen.append(name)
    for key, child in module.named_children():
        _examine(child, f"{name}.{key}".lstrip("."), names, weights, flow, example=None)


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy a model without its values, and without its Trainer."""
    memo: dict[int, Any] = {id(parameter): nn.Parameter(_like(parameter), requires_grad=False) for parameter in model.parameters()}
    memo |= {id(buffer): _like(buffer) for buffer in model.buffers()}
    for module in model.modules():
        for key in ("_trainer", "_fabric"):
            memo[id(vars(module).get(key))] = None
    return copy.deepcopy(model, memo).train()


def _like(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _inputs(module: nn.Module, example: Any) -> Iterator[tuple[Any, ...]]:
    """Yield inputs that a module may take, the likeliest first."""
    example = getattr(module, "example_input_array", None) if example is None else example
    if isinstance(example, Tensor | tuple):
        yield tree_map(_like, example if isinstance(example, tuple) else (example,))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    seen: list[tuple[type, int]] = []
    for layer in module.modules():
        for kind, sides in ((nn.Conv1d, (64, 1024)), (nn.Conv2d, (*_image(module), 224, 64, 32, 28)), (nn.Conv3d, (16, 32))):
            if isinstance(layer, kind) and (kind, layer.in_channels) not in seen:
                seen.append((kind, layer.in_channels))
                dimensions = (nn.Conv1d, nn.Conv2d, nn.Conv3d).index(kind) + 1
                yield from (
                    (torch.empty(2, layer.in_channels, *(side,) * dimensions, dtype=dtype, device="meta"),) for side in dict.fromkeys(sides)
                )
        width = getattr(layer, "in_features", None) or getattr(layer, "embed_dim", None) or getattr(layer, "num_features", None)
        if isinstance(layer, nn.Embedding):
            yield (torch.zeros(2, 4, dtype=torch.long, device="meta"),)
        elif isinstance(width, int) and (nn.Linear, width) not in seen:
            seen.append((nn.Linear, width))
            yield from ((torch.empty(*shape, dtype=dtype, device="meta"),) for shape in ((2, width), (2, 196, width), (2, 14, 14, width)))
        if len(seen) > 3:
            return


def _image(module: nn.Module) -> Sequence[int]:
    """Return the side of images that a model says it was made for, as timm's do."""
    size = getattr(getattr(module, "patch_embed", module), "img_size", None)
    size = size[0] if isinstance(size, Sequence) and size else size
    return (size,) if isinstance(size, int) else ()


class _Tape(TorchFunctionMode):
    """Notes what is called, with the calls that made its tensors."""

    def __init__(self, names: Mapping[int, str], inputs: Any) -> None:
        super().__init__()
        self.names = names
        self.calls = [_Call("input", [], [], lambda x: x)]
        for each in tree_leaves(inputs):
            if isinstance(each, Tensor):
                each._made_by = 0  # type: ignore[attr-defined]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        inputs = [each._made_by for each in tensors if hasattr(each, "_made_by")]
        result = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor) and id(each) not in self.names]
        if outputs:
            parameters = [self.names[id(each)] for each in tensors if id(each) in self.names]
            rest = args[1:] if args else ()

            def again(x: Tensor) -> Tensor:
                options = {key: value for key, value in kwargs.items() if key not in {"inplace", "input"}}
                y: Tensor = func(x, *rest, **options)
                return y

            slope = rest[0] if rest else kwargs.get("negative_slope", 0.01)
            self.calls.append(_Call(getattr(func, "__name__", ""), inputs, parameters, again, slope))
            for each in outputs:
                each._made_by = len(self.calls) - 1  # type: ignore[attr-defined]
        return result


def _read(calls: Sequence[_Call], weights: set[str], flow: Flow) -> None:
    users: dict[int, list[int]] = {}
    for index, call in enumerate(calls):
        for made in call.inputs:
            users.setdefault(made, []).append(index)
    layers = {index for index, call in enumerate(calls) if weights.intersection(call.parameters)}
    for index in sorted(layers):
        for name in weights.intersection(calls[index].parameters):
            flow.following.setdefault(name, _following(calls, users, layers, index))
    for call in calls:
        if call.name in _SUMS and len(set(call.inputs)) == 2:
            end = _end(calls, layers, *call.inputs[:2])
            if end and end not in flow.ends:
                flow.ends.append(end)


def _activation(call: _Call) -> str | None:
    kind = kind_of_word(call.name.rstrip("_"))
    return None if kind == "identity" else kind


def _following(calls: Sequence[_Call], users: Mapping[int, list[int]], layers: set[int], index: int) -> Following | None:
    """Return the first activation that a layer's output reaches before another layer."""
    waiting, reached, found = [index], {index}, []
    while waiting:
        for user in users.get(waiting.pop(), []):
            if user in reached:
                continue
            reached.add(user)
            if _activation(calls[user]) is not None:
                found.append(user)
            elif user not in layers and calls[user].name not in _ENDS:
                waiting.append(user)
    if not found:
        return None
    call = calls[min(found)]
    kind = _activation(call)
    assert kind is not None
    slope = 0.25 if kind == "prelu" else call.negative_slope
    return Following("leaky_relu" if kind == "prelu" else kind, call.again, slope if isinstance(slope, float | int) else 0.01)


def _end(calls: Sequence[_Call], layers: set[int], first: int, second: int) -> tuple[str, ...]:
    """Return the parameters of the layer that ends the residual branch of a sum, if it is one."""
    before = [_ancestors(calls, made) for made in (first, second)]
    common = max(before[0] & before[1], default=-1)
    sides = [sum(1 for each in ancestors if each > common and each in layers) for ancestors in before]
    if common < 0 or sides[0] == sides[1] or min(sides) > 1:
        return ()
    return _last(calls, layers, first if sides[0] > sides[1] else second, common) or ()


def _ancestors(calls: Sequence[_Call], index: int) -> set[int]:
    waiting, found = [index], {index}
    while waiting:
        new = set(calls[waiting.pop()].inputs) - found
        found |= new
        waiting += new
    return found


def _last(calls: Sequence[_Call], layers: set[int], index: int, common: int) -> tuple[str, ...] | None:
    """Return the parameters of the last norm or layer before a call; None if an activation comes after it."""
    call = calls[index]
    if index <= common or _activation(call) is not None or call.name in _ENDS:
        return None
    if index in layers or ("norm" in call.name and call.parameters):
        return tuple(call.parameters[-2:])  # of attention, those of its last layer
    return next((end for made in call.inputs if (end := _last(calls, layers, made, common))), None)
