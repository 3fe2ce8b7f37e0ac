"""The forward passes of fractional max pooling: of a layer, of a model that averages several, and of layers that may not fit any more."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lightning_tricks._core.draws import Clock
from lightning_tricks._core.strategies import plain_name
from lightning_tricks._core.surgery import StandIn, stand_ins
from lightning_tricks.errors import TrickError
from lightning_tricks.stochastic._drawing import Drawing
from lightning_tricks.stochastic._fractional_pooling import FractionalMaxPool2d, Mode, fractional_max_pool, pooled_size

__all__ = ["Averaged", "Plan", "Pooling", "Watch", "check_fit", "each_axis", "watch"]


_WINDOW = ("kernel_size", "stride", "padding", "dilation")


def each_axis(module: nn.Module, value: int | Sequence[int]) -> Sequence[int]:
    """Return an argument of a pooling layer for each axis."""
    return (value,) * _dimensions(module) if isinstance(value, int) else value


def _dimensions(module: nn.Module) -> int:
    return module.dimensions if isinstance(module, FractionalMaxPool2d) else 3 if isinstance(module, nn.MaxPool3d) else 2


class _Windows:
    """The fixed windows of a max pooling layer, or those that give as many regions as a fractional one."""

    def __init__(self, module: nn.Module) -> None:
        self.dimensions = _dimensions(module)
        self.ratio = module.ratio if isinstance(module, FractionalMaxPool2d) else None
        self.ceil_mode = bool(getattr(module, "ceil_mode", False))
        arguments = [] if self.ratio else [each_axis(module, getattr(module, name)) for name in _WINDOW]
        self.axes = list(zip(*arguments, strict=True))

    def sizes(self, before: Sequence[int]) -> list[int]:
        """Return the sizes of the output."""
        if self.ratio is not None:
            return [pooled_size(size, self.ratio) for size in before]
        pooled = []
        for size, (kernel, stride, padding, dilation) in zip(before, self.axes, strict=True):
            span = size + 2 * padding - dilation * (kernel - 1) - 1
            count = (span + (stride - 1 if self.ceil_mode else 0)) // stride + 1
            outside = self.ceil_mode and (count - 1) * stride >= size + padding  # a window must begin within the map
            pooled.append(count - 1 if outside else count)
        return pooled


@dataclass(frozen=True)
class Plan:
    """How regions are made; the ratio is None where sizes stay."""

    ratio: float | None
    mode: Mode
    overlapping: bool


class Pooling(Drawing):
    """Pools over regions that are drawn anew in training, and that belong to the number of the pass in evaluation."""

    def __init__(self, module: nn.Module, name: str, plan: Plan, passes: Clock, *, clock: Clock, owner: str) -> None:
        super().__init__(module, name, clock=clock, owner=owner)
        self.plan, self.passes, self.windows = plan, passes, _Windows(module)
        self.sizes: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None  # before, after, after plain pooling

    def __call__(self, x: Tensor) -> Tensor:
        self.ran = True
        ratio, before = self.plan.ratio, list(x.shape[-self.windows.dimensions :])
        plain = self.windows.sizes(before)
        after = plain if ratio is None else [pooled_size(size, ratio) for size in before]
        self.sizes = before, after, plain
        key = self.key(self.clock if self.module.training else self.passes)
        return fractional_max_pool(x, key, after, mode=self.plan.mode, overlapping=self.plan.overlapping)

    @property
    def varies(self) -> bool:
        """Whether there is more than one way to divide the latest map."""
        assert self.sizes is not None
        return any((before - (self.plan.overlapping and after < before)) % after for before, after, _ in zip(*self.sizes, strict=True))


class Averaged(StandIn):
    """Evaluates a model several times, with other regions in each pass, and returns the mean of the outputs."""

    def __init__(self, model: nn.Module, samples: int, passes: Clock) -> None:
        super().__init__(model)
        self.samples, self.passes, self.ran = samples, passes, False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.module.training:
            return self.plain(*arguments, **options)
        self.ran = True
        outputs = []
        for number in range(self.samples):
            self.passes.set(number)
            leaves, structure = tree_flatten(self.plain(*arguments, **options))
            outputs.append(leaves)
        self.passes.set(0)
        return tree_unflatten([_mean(leaves) for leaves in zip(*outputs, strict=True)], structure)


def _mean(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    return torch.stack(list(leaves)).mean(0) if isinstance(first, Tensor) and first.is_floating_point() else first


class Watch(StandIn):
    """Names the module that fails since pooling has changed sizes."""

    def __init__(self, module: nn.Module, name: str, pools: Sequence[Pooling]) -> None:
        super().__init__(module)
        self.name, self.pools = name, pools

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plain(*arguments, **options)
        try:
            return self.plain(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            changed = next((pool for pool in self.pools if pool.sizes is not None and pool.sizes[1] != pool.sizes[2]), None)
            if changed is None or isinstance(error, TrickError):
                raise
            assert changed.sizes is not None
            after, plain = ("×".join(map(str, sizes)) for sizes in changed.sizes[1:])
            reason = str(error).rstrip(".")
            got = ", ".join(str(tuple(each.shape)) for each in arguments if isinstance(each, Tensor))
            msg = (
                f"{changed.owner} made {changed.name!r} return maps of {after} in place of {plain}, and {self.name!r}, a "
                f"{type(self.module).__name__}, does not fit what it gets, {got}: {reason}. Build it for that size, pool over whole maps "
                "before it, or pass `ratio=None`, which keeps sizes."
            )
            raise TrickError(msg) from error


def watch(model: nn.Module) -> list[Watch]:
    """Watch all modules that can be watched."""
    pools = stand_ins(model, Pooling)
    named = ((plain_name(name) or type(model).__name__, module) for name, module in model.named_modules())
    watches = [Watch(module, name, pools) for name, module in named if not isinstance(module, torch.jit.ScriptModule)]
    for each in watches:
        each.attach()
    return watches


def check_fit(model: nn.Module, example: Any) -> None:
    """Run a copy of a model without data on inputs of these shapes."""
    twin = copy.deepcopy(model).to("meta").eval()
    watch(twin)
    inputs = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        twin(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs))
