"""Run a model without data, to see what each of its modules is given.

The model is copied to torch's meta device, which knows shapes and no values: nothing is computed, no random number is drawn, no
statistic changes. Its input is guessed from its first layer and from the sizes of images that it names; where the whole model does not
take what was guessed, its parts are run.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

__all__ = ["BATCH", "Call", "first_tensor", "guesses", "likeness", "on_meta", "record"]

BATCH = 11  # a size that hardly anything else has
_WIDTHS = ("in_channels", "in_features", "num_features", "num_channels")
_SIDES = ("img_size", "image_size")
_DIMENSIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True)
class Call:
    """A module on the meta device, and what it was given there.

    Attributes:
        module: The module.
        arguments: Its arguments by position.
        options: Its arguments by name.
        guessed: Whether it was tried by itself, rather than seen to be called so within the model.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    guessed: bool = False

    def __call__(self) -> tuple[Any, Tensor, Any]:
        """Run the module in training mode, and return its output, the leaf that stands for its first tensor, and all that it was given.

        Raises:
            Exception: Whatever the module raises.
        """
        values = tree_map(_fresh, (self.arguments, self.options))
        leaf = first_tensor(values)
        if leaf is None:
            msg = "it was given no tensor of floating-point numbers"
            raise TypeError(msg)
        leaf.requires_grad_()
        arguments, options = tree_map(lambda value: leaf.view_as(leaf) if value is leaf else value, values)
        return _quietly(partial(self.module, *arguments, **options)), leaf, values


def record(model: nn.Module) -> dict[str, Call]:
    """Run as much of a model as takes what can be guessed, and return the first call of each module that ran, by name."""
    calls: dict[str, Call] = {}

    def visit(name: str, module: nn.Module, twin: nn.Module | None) -> None:
        trained = callable(getattr(module, "training_step", None)) and getattr(module, "example_input_array", None) is None
        if twin is None and not trained:  # a LightningModule may hold much that is no part of the model
            twin = on_meta(module)
        if twin is not None and _run(name, twin, calls):
            return
        for key, child in module.named_children():
            if any(True for _ in child.children()):
                visit(f"{name}.{key}".removeprefix("."), child, None if twin is None else twin.get_submodule(key))

    visit("", model, None)
    return calls


def on_meta(module: nn.Module) -> nn.Module | None:
    """Copy a module without its values, in training mode; None if it cannot be copied."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_empty(p), requires_grad=p.is_floating_point()) for p in module.parameters()}
    memo.update({id(buffer): _empty(buffer) for buffer in module.buffers()})
    memo.update({id(value): _empty(value) for each in module.modules() for value in vars(each).values() if isinstance(value, Tensor)})
    try:
        return copy.deepcopy(module, memo).train()
    except Exception:  # noqa: BLE001  # whatever a module of somebody else's raises, it cannot be looked at
        return None


def likeness(module: nn.Module, call: Call | None) -> Hashable:
    """Return what is equal for modules that do alike: classes and attributes of all within, shapes of weights and of what is given."""
    within = tuple(
        (name, type(each), tuple((key, _trait(value)) for key, value in sorted(vars(each).items()) if not key.startswith("_")))
        for name, each in module.named_modules()
    )
    weights = tuple((name, p.shape) for name, p in module.named_parameters())
    given = None if call is None else tuple(map(_trait, tree_leaves((call.arguments, call.options))))
    return within, weights, given


def _trait(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, float):
        return value != 0  # rates differ from layer to layer
    if isinstance(value, tuple | list):
        return tuple(map(_trait, value))
    if isinstance(value, bool | int | str | FunctionType):
        return cast("Hashable", value)
    return cast("Hashable", type(value))


def guesses(block: nn.Module, twin: nn.Module) -> Iterator[Call]:
    """Yield calls of inputs that a block may take by itself, the likeliest first."""
    widths, dimensions = [], set()
    for layer in block.modules():
        width = next((getattr(layer, name) for name in _WIDTHS if hasattr(layer, name)), None)
        width = getattr(layer, "normalized_shape", (width,))[-1]
        widths += [width] if isinstance(width, int) and width not in widths else []
        dimensions |= {count for kind, count in _DIMENSIONS.items() if isinstance(layer, kind)}
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for width in widths[:4]:
        shapes = [(width, *(side,) * count) for side in (14, 16) for count in sorted(dimensions)]  # multiples of usual windows
        shapes += [(side, side, width) for side in (14, 16)]
        shapes += [(length, width) for length in (196, 197, *(each for each in widths[:4] if each != width))]
        for shape in (*shapes, (width,)):
            yield Call(twin, (torch.empty(BATCH, *shape, dtype=dtype, device="meta"),), {}, guessed=True)


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor of floating-point numbers in a structure."""
    found = [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.is_floating_point()]
    return found[0] if found else None  # older torch does not compile `next` with a default


def _run(name: str, twin: nn.Module, calls: dict[str, Call]) -> bool:
    """Run a part of a model on the first input that it takes, and note the calls of all within."""
    for arguments, options in _inputs(twin):
        seen: dict[str, Call] = {}

        def note(key: str, seen: dict[str, Call] = seen) -> Callable[..., None]:
            def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                seen.setdefault(key, Call(module, *tree_map(_fresh, (given, named))))

            return hook

        inside = {f"{name}.{key}".strip("."): each for key, each in twin.named_modules()}
        handles = [each.register_forward_pre_hook(note(key), with_kwargs=True) for key, each in inside.items()]
        try:
            _quietly(partial(twin, *arguments, **options))
        except Exception:  # noqa: BLE001, S112  # it takes something else
            continue
        finally:
            for handle in handles:
                handle.remove()
        if seen:
            calls.update(seen)
            return True
    return False


def _inputs(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield inputs that a model may take, the likeliest first."""
    example = getattr(model, "example_input_array", None)
    if example is not None:
        size = getattr(first_tensor(example), "shape", (None,))[0]
        example = tree_map(lambda each: _empty(each, BATCH if each.shape[:1] == (size,) else None), example)
        yield ((), example) if isinstance(example, dict) else (example if isinstance(example, tuple) else (example,), {})
    for layer in model.modules():
        dtype = getattr(getattr(layer, "weight", None), "dtype", torch.get_default_dtype())
        shapes: list[tuple[int, ...]] = []
        for kind, count in _DIMENSIONS.items():
            if isinstance(layer, kind):
                shapes = [(layer.in_channels, *(side,) * count) for side in _sides(model)]
        if isinstance(layer, nn.Linear):
            shapes = [(layer.in_features,), (16, layer.in_features)]
        if isinstance(layer, nn.Embedding):
            shapes, dtype = [(16,)], torch.int64
        if shapes:
            for shape in shapes:
                yield (torch.empty(BATCH, *shape, dtype=dtype, device="meta"),), {}
            return


def _sides(model: nn.Module) -> list[int]:
    """Return sizes of images that a model may take: those that it or its layers name, and usual ones."""
    named = [getattr(module, key, None) for module in model.modules() for key in _SIDES]
    named += [getattr(model, key, {}).get("input_size") for key in ("pretrained_cfg", "default_cfg")]  # of timm
    sides = [each[-1] if isinstance(each, tuple | list) and each else each for each in named]
    return list(dict.fromkeys([*(side for side in sides if isinstance(side, int)), 224, 64, 32]))


def _quietly(run: Callable[[], Any]) -> Any:
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def _empty(tensor: Tensor, rows: int | None = None) -> Tensor:
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _fresh(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value
