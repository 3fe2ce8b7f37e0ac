"""The forward pass of a block that is left out at random."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_tricks._core.surgery import StandIn
from lightning_tricks.errors import TrickError
from lightning_tricks.stochastic._blocks import ends_in_activation
from lightning_tricks.stochastic._draws import Clock, mix, order_of_rows, uniform

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Dropping", "Mode"]

Mode = Literal["sample", "batch"]


class Dropping(StandIn):
    """Computes ``x + (h(x) − x)/(1 − p)`` for the samples that survive, and x for the others, while the block trains."""

    def __init__(self, block: nn.Module, name: str, index: int, *, mode: Mode, clock: Clock, owner: str) -> None:
        super().__init__(block)
        self.name, self.index, self.mode, self.clock, self.owner = name, index, mode, clock, owner
        self.activated: bool | None = None  # whether an activation comes last
        self.keep = torch.ones((), dtype=torch.float64)
        self.largest_keep = 1.0  # of all steps
        self.rows: int | None = None  # of the latest batch
        self.switched_off: list[tuple[nn.Module, str, float]] = []  # the block's own layers that drop, and their rates

    def set_rate(self, rate: float) -> None:
        """Drop with this probability from now on."""
        self.keep.fill_(1.0 - rate)

    @property
    def dropped(self) -> float | None:
        """The share of the latest batch that was dropped; None if the block has not run."""
        if self.rows is None:
            return None
        key, keep = self._key(int(self.clock.now)), float(self.keep)
        return float(uniform(key) >= keep) if self.mode == "batch" else 1.0 - _survivors(key, self.rows, keep) / self.rows

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.module.training:
            return self.plain(*arguments, **options)
        if self.mode == "batch":
            return self._by_batch(arguments, options)
        if self.activated is None:  # which the graph of autograd will tell
            return self._outside_of_compiled_code(arguments, options)
        return self._by_sample(arguments, options)

    def _key(self, now: Any) -> Any:
        return mix(now ^ mix(self.index + 1))

    # By sample

    def _by_sample(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        x = _first_tensor((arguments, options))
        count = self.rows = x.shape[0]
        key: Any
        keep: Any
        alive: Any
        if torch.compiler.is_compiling():  # shapes must not depend on what is drawn, nor on a rate that varies
            key, keep = self._key(self.clock.now), self.keep.clamp(min=1 / count)
            alive = torch.floor(count * keep + uniform(key)).long()
            computed = min(count, max(1, math.ceil(count * self.largest_keep - 1e-9)))
        else:
            key, keep = self._key(int(self.clock.now)), max(float(self.keep), 1 / count)
            alive = computed = _survivors(key, count, keep)
            if keep == 1.0:
                return self.plain(*arguments, **options)
        if _is_ambiguous((arguments, options), x):
            computed = count
        chosen = order_of_rows(key, count, x.device)[:computed]
        if computed < count:
            arguments, options = tree_map(_rows_of(chosen, count), (arguments, options))
            inner = x.index_select(0, chosen)
        else:
            inner = x
        survives = None
        if not isinstance(alive, int) or alive < computed:
            places = torch.arange(computed, device=x.device)
            survives = places < alive
            if computed == count:  # rows stand in their own places
                survives = torch.zeros(count, dtype=torch.bool, device=x.device).index_copy(0, chosen, survives)
        outputs, structure = tree_flatten(self.plain(*arguments, **options))
        tensors = [i for i, each in enumerate(outputs) if isinstance(each, Tensor)]
        output = self._checked(outputs[tensors[0]] if tensors else None, inner)
        whole = x.to(output.dtype)
        outputs = [_spread(each, chosen, computed, count) for each in outputs]
        place = tensors[0]
        if self.activated:
            rows = output if survives is None else torch.where(_column(survives, output), output, inner.to(output.dtype))
            outputs[place] = rows if computed == count else whole.index_copy(0, chosen, rows)
        else:
            change = (output - inner) / keep
            change = (change if survives is None else change * _column(survives, change)).to(output.dtype)
            outputs[place] = whole + change if computed == count else whole.index_add(0, chosen, change)
        return tree_unflatten(outputs, structure)

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _outside_of_compiled_code(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return self._by_sample(arguments, options)

    def _checked(self, output: Any, x: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.shape != x.shape:
            found = f"a tensor of {tuple(output.shape)} from one of {tuple(x.shape)}" if isinstance(output, Tensor) else "no tensor"
            msg = f"{self.owner} drops blocks whose output has their input's shape, and {self.name!r} made {found}. Exclude it."
            raise TrickError(msg)
        if self.activated is None and output.grad_fn is not None:
            self.activated = bool(ends_in_activation(output))
        return output

    # By batch

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _by_batch(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        x, keep = _first_tensor((arguments, options)), float(self.keep)
        self.rows = x.shape[0]
        if keep == 1.0:
            return self.plain(*arguments, **options)
        if uniform(self._key(int(self.clock.now))) >= keep:
            return _Skip.apply(x, *(p for p in self.module.parameters() if p.requires_grad))
        result = self.plain(*arguments, **options)
        output = self._checked(result, x)
        return output if self.activated else (x + (output - x) / keep).to(output.dtype)


class _Skip(torch.autograd.Function):
    """Returns its input; the parameters that were not needed get gradients of zero, as they do under DDP."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _survivors(key: int, count: int, keep: float) -> int:
    """Return how many of `count` samples survive: ``count·keep``, rounded up or down at random so that it is so on average."""
    return min(count, math.floor(count * max(keep, 1 / count) + uniform(key)))


def _first_tensor(values: Any) -> Tensor:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    msg = "StochasticDepth drops blocks that take a tensor of floating-point numbers, and one got none. Exclude it."
    raise TrickError(msg)


def _is_batched(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.ndim > 0 and value.shape[0] == count


def _is_ambiguous(values: Any, x: Tensor) -> bool:
    """Tell whether a further tensor may have the batch first or something else of the same size, such as the sequence."""
    count = x.shape[0]
    return count in x.shape[1:] and any(_is_batched(each, count) and each is not x for each in tree_leaves(values))


def _rows_of(chosen: Tensor, count: int) -> Callable[[Any], Any]:
    return lambda value: value.index_select(0, chosen) if _is_batched(value, count) else value


def _spread(value: Any, chosen: Tensor, computed: int, count: int) -> Any:
    """Put rows of a further output back where they belong, with zeros for the samples that were not computed."""
    if computed == count or not _is_batched(value, computed):
        return value
    return value.new_zeros(count, *value.shape[1:]).index_copy(0, chosen, value)


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))
