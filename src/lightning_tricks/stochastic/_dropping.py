"""The forward pass of a block, or of a branch within one, that is left out at random."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_tricks._core.draws import Clock, mix, order_of_rows, uniform
from lightning_tricks._core.surgery import StandIn
from lightning_tricks.errors import TrickError
from lightning_tricks.stochastic._blocks import ends_in_activation
from lightning_tricks.stochastic._tracing import first_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Droppable", "Dropping", "Mode", "Plan", "Rows", "Scaling", "has_further_batches", "is_ambiguous"]

Mode = Literal["sample", "batch"]
Scaling = Literal["training", "evaluation"]


class Plan(NamedTuple):
    """What all droppings of a model have in common."""

    mode: Mode
    scaling: Scaling
    clock: Clock
    owner: str


class Rows(NamedTuple):
    """Which rows of a batch are computed, and which of these survive.

    Attributes:
        chosen: The places of those computed.
        total: How many rows the batch has.
        computed: How many are computed.
        survives: For each that is computed, whether it survives; None if all do.
    """

    chosen: Tensor
    total: int
    computed: int
    survives: Tensor | None

    def gather(self, values: Any) -> Any:
        """Take these rows of each tensor that has the batch's."""
        if self.computed == self.total:
            return values
        return tree_map(_rows_of(self.chosen, self.total), values)

    def mask(self, change: Tensor, otherwise: Tensor | None = None) -> Tensor:
        """Put zeros, or another tensor's, where rows do not survive."""
        if self.survives is None:
            return change
        column = self.survives.view(-1, *[1] * (change.ndim - 1))
        return change * column if otherwise is None else torch.where(column, change, otherwise)

    def spread(self, value: Any) -> Any:
        """Put rows back where they belong, with zeros for those that were not computed."""
        if self.computed == self.total or not _is_batched(value, self.computed):
            return value
        return value.new_zeros(self.total, *value.shape[1:]).index_copy(0, self.chosen, value)


class Droppable(StandIn):
    """Draws which samples of a batch survive."""

    def __init__(self, module: nn.Module, name: str, index: int, plan: Plan) -> None:
        super().__init__(module)
        self.name, self.index, self.plan = name, index, plan
        self.keep = torch.ones((), dtype=torch.float64)
        self.largest_keep = 1.0  # of all steps
        self.rows: int | None = None  # of the latest batch
        self.share = 1.0  # of the rate of the last block
        self._switched_off: list[tuple[nn.Module, str, float]] = []

    def switch_off(self, layers: Sequence[tuple[nn.Module, str]]) -> None:
        """Let a model's own layers drop nothing, each given with the name of its rate."""
        for layer, attribute in layers:
            self._switched_off.append((layer, attribute, getattr(layer, attribute)))
            setattr(layer, attribute, 0.0)

    def switch_on(self) -> None:
        """Give them their rates back."""
        while self._switched_off:
            setattr(*self._switched_off.pop())

    def set_rate(self, rate: float) -> None:
        """Drop with this probability from now on."""
        self.keep.fill_(1.0 - rate)

    @property
    def dropped(self) -> float | None:
        """The share of the latest batch that was dropped; None if the block has not run, or on none."""
        if not self.rows:
            return None
        key, keep = self.key(int(self.plan.clock.now)), float(self.keep)
        return float(uniform(key) >= keep) if self.plan.mode == "batch" else 1.0 - _survivors(key, self.rows, keep) / self.rows

    def key(self, now: Any) -> Any:
        """Return what the draws at a moment follow from."""
        return mix(now ^ mix(self.index + 1))

    def draw(self, x: Tensor, *, dense: bool) -> tuple[Rows | None, Any]:
        """Return the rows of a batch to compute, all if `dense` and None if nothing is dropped, and the probability of surviving."""
        count = self.rows = x.shape[0]
        key: Any
        keep: Any
        alive: Any
        if count == 0:
            return None, 1.0
        if torch.compiler.is_compiling():  # shapes must not depend on what is drawn, nor on a rate that varies
            key, keep = self.key(self.plan.clock.now), self.keep.clamp(min=1 / count)
            alive = torch.floor(count * keep + uniform(key)).long()
            computed = min(count, max(1, math.ceil(count * self.largest_keep - 1e-9)))
        else:
            key, keep = self.key(int(self.plan.clock.now)), max(float(self.keep), 1 / count)
            alive = computed = _survivors(key, count, keep)
            if keep == 1.0:
                return None, keep
        if dense:
            computed = count
        chosen = order_of_rows(key, count, x.device)[:computed]
        survives = None
        if not isinstance(alive, int) or alive < computed:
            survives = torch.arange(computed, device=x.device) < alive
            if computed == count:  # rows stand in their own places
                survives = torch.zeros(count, dtype=torch.bool, device=x.device).index_copy(0, chosen, survives)
        return Rows(chosen, count, computed, survives), keep

    def input(self, values: Any) -> Tensor:
        """Return the tensor whose rows are the samples."""
        x = first_tensor(values)
        if x is None:
            msg = f"{self.plan.owner} drops blocks that take a tensor of floating-point numbers, and {self.name!r} got none. Exclude it."
            raise TrickError(msg)
        return x


class Dropping(Droppable):
    """Computes ``x + (h(x) − x)/(1 − p)`` for the samples that survive, and x for the others, while the block trains.

    With scaling in evaluation, survivors give ``h(x)``, and a block that is evaluated ``x + (h(x) − x)·(1 − p)``.
    """

    activated: bool | None = None  # whether an activation comes last

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.module.training:
            return self._evaluated(arguments, options)
        if self.plan.mode == "batch":
            return self._by_batch(arguments, options)
        if self.activated is None:  # which the graph of autograd will tell
            return self._outside_of_compiled_code(arguments, options)
        return self._by_sample(arguments, options)

    def _evaluated(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        result = self.plain(*arguments, **options)
        if self.plan.scaling == "training":
            return result
        x, keep = self.input((arguments, options)), self.keep
        outputs, structure = tree_flatten(result)
        place, output = self._first(outputs, x)
        outputs[place] = (x + (output - x) * keep).to(output.dtype)
        return tree_unflatten(outputs, structure)

    # By sample

    def _by_sample(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        x = self.input((arguments, options))
        rows, keep = self.draw(x, dense=is_ambiguous((arguments, options), x))
        if rows is None:
            return self.plain(*arguments, **options)
        given = tree_leaves((arguments, options))
        arguments, options = rows.gather((arguments, options))
        inner = x if rows.computed == rows.total else x.index_select(0, rows.chosen)
        outputs, structure = tree_flatten(self.plain(*arguments, **options))
        place, output = self._first(outputs, inner)
        whole = x.to(output.dtype)
        passed = list(zip(tree_leaves((arguments, options)), given, strict=True))  # what may come out as it went in
        outputs = [([old for new, old in passed if new is each] or [rows.spread(each)])[0] for each in outputs]
        if self.activated or self.plan.scaling == "evaluation":
            output = rows.mask(output, inner.to(output.dtype))
            outputs[place] = output if rows.computed == rows.total else whole.index_copy(0, rows.chosen, output)
        else:
            change = rows.mask((output - inner) / keep).to(output.dtype)
            outputs[place] = whole + change if rows.computed == rows.total else whole.index_add(0, rows.chosen, change)
        return tree_unflatten(outputs, structure)

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _outside_of_compiled_code(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return self._by_sample(arguments, options)

    def _first(self, outputs: list[Any], x: Tensor) -> tuple[int, Tensor]:
        places = [i for i, each in enumerate(outputs) if isinstance(each, Tensor)]
        place = places[0] if places else None
        output = None if place is None else outputs[place]
        if place is None or output is None or output.shape != x.shape:
            found = "no tensor" if output is None else f"a tensor of {tuple(output.shape)} from one of {tuple(x.shape)}"
            msg = f"{self.plan.owner} drops blocks whose output has their input's shape, and {self.name!r} made {found}. Exclude it."
            raise TrickError(msg)
        if self.activated is None and output.grad_fn is not None:
            self.activated = bool(ends_in_activation(output))
        return place, output

    # By batch

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _by_batch(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        x, keep = self.input((arguments, options)), float(self.keep)
        self.rows = x.shape[0]
        if keep == 1.0:
            return self.plain(*arguments, **options)
        if uniform(self.key(int(self.plan.clock.now))) >= keep:
            return _Skip.apply(x, *(p for p in self.module.parameters() if p.requires_grad))
        result = self.plain(*arguments, **options)
        _, output = self._first([result], x)
        return output if self.activated or self.plan.scaling == "evaluation" else (x + (output - x) / keep).to(output.dtype)


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


def has_further_batches(values: Any, x: Tensor) -> bool:
    """Tell whether tensors other than x may have the batch first."""
    return any(_is_batched(each, x.shape[0]) and each is not x for each in tree_leaves(values))


def _is_batched(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.ndim > 0 and value.shape[0] == count


def is_ambiguous(values: Any, x: Tensor) -> bool:
    """Tell whether a further tensor may have the batch first or something else of the same size, such as the sequence."""
    return x.shape[0] in x.shape[1:] and has_further_batches(values, x)


def _rows_of(chosen: Tensor, count: int) -> Callable[[Any], Any]:
    return lambda value: value.index_select(0, chosen) if _is_batched(value, count) else value
