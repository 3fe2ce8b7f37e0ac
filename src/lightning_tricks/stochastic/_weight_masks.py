"""Masks over weights, drawn from a key by hashing, and products with weights that each example masks in its own way.

The number of 32 bits of an element follows from a number of its row and one of its column by two multiplications, which cost little
beside a matrix product, and needs no generator: the same key gives the same mask on every device, in compiled code, and once more
in activation checkpointing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tricks._core.draws import mix
from lightning_tricks._core.shards import TensorShards

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Rate", "kept", "kept_rows", "key_of", "key_of_example", "keys_of_examples", "masked", "normal", "product_by_example"]

_EXAMPLES = 0x2545F491
_AT_ONCE = 2**22  # elements of masks, which fit into the caches of few processors, and cost little memory beside them


class Rate:
    """The probability of dropping, as tensors: compiled code reads them without compiling anew when the rate changes."""

    def __init__(self, rate: float) -> None:
        self.threshold = torch.zeros((), dtype=torch.int64)
        self.scale = torch.ones((), dtype=torch.float64)  # 1/(1 − p)
        self.now = torch.full((), -1.0, dtype=torch.float64)
        self.set(rate)

    def set(self, rate: float) -> None:
        """Drop with this probability from now on, to 2⁻³²."""
        if float(self.now) == rate:  # so that what is kept for a backward pass is not touched
            return
        self.now.fill_(rate)
        self.scale.fill_(1.0 / (1.0 - rate))
        self.threshold.fill_(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def key_of(moment: Any, number: int) -> Any:
    """Return the key of a parameter's mask at a moment."""
    return mix(moment ^ mix(number + 1))


def key_of_example(key: Any, example: Any) -> Any:
    """Return the key of the mask of an example of a batch, from that of the batch."""
    return mix(mix(example + _EXAMPLES) ^ key)


def keys_of_examples(key: Any, count: int, device: torch.device) -> Tensor:
    """Return the keys of the masks of all examples of a batch."""
    keys: Tensor = key_of_example(key, torch.arange(count, device=device))
    return keys


def _lanes(positions: Tensor, key: Any) -> Tensor:
    """Return the numbers of rows, at positions from 0 on, and of columns, at those below."""
    lanes: Tensor = mix((positions * 0x9E3779B1) ^ key) - 2**31
    return lanes.to(torch.int32)


def _blend(rows: Tensor, columns: Tensor) -> Tensor:
    """Hash pairs of numbers of 32 bits into one each, the upper bits best."""
    bits: Tensor = (rows ^ columns).mul_(0x7FEB352D)
    return bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)


def _bits(key: Any, rows: int, columns: int, device: torch.device) -> Tensor:
    lanes = _lanes(torch.arange(-columns, rows, device=device), key)
    return _blend(lanes[..., columns:, None], lanes[..., None, :columns])


def kept(key: Any, shape: Sequence[int], threshold: Tensor, device: torch.device) -> Tensor:
    """Return which elements survive; a column of n keys gives n masks, one after another."""
    bits = _bits(key, shape[0], math.prod(shape[1:]), device)
    return (bits >= threshold).view(*bits.shape[:-2], *shape)


def kept_rows(key: Any, rows: Tensor, columns: int, threshold: Tensor) -> Tensor:
    """Return the rows of a mask that are asked for."""
    lanes = _lanes(torch.arange(-columns, 0, device=rows.device), key)
    return _blend(_lanes(rows, key)[..., None], lanes[..., None, :]) >= threshold


def masked(tensor: Tensor, key: Any, rate: Rate) -> Tensor:
    """Return ``W∘M/(1 − p)``."""
    mask = kept(key, tensor.shape, rate.threshold, tensor.device)
    if isinstance(tensor, DTensor):  # of which tensor parallelism gives each rank a part
        shards = TensorShards(tensor)
        mask = shards.as_sharded(shards.cut(mask))
    return (tensor * rate.scale) * mask


def normal(key: Any, like: Tensor) -> Tensor:
    """Return standard normal numbers in the shape of a tensor, by the inverse of their distribution."""
    columns = like.shape[-1]
    bits = _bits(key, math.prod(like.shape[:-1]), columns, like.device) >> 8
    return (torch.erfinv((bits.to(torch.float32) + 0.5) / 2**23) * math.sqrt(2)).view(like.shape).to(like.dtype)


# A product per example


def product_by_example(x: Tensor, weight: Tensor, key: Any, rate: Rate, geometry: Sequence[int] = ()) -> Tensor:
    """Multiply each example by a weight that is masked for it alone: ``yₙ = (W∘Mₙ)xₙ/(1 − p)``.

    Masks are drawn for a few examples at a time, and again in the backward pass: none is kept.

    Args:
        x: Examples, as a matrix each, or as what a convolution takes.
        weight: The weight of a linear layer or of a convolution.
        key: The key of the batch.
        rate: The probability of dropping.
        geometry: None for a matrix product; for a convolution over d dimensions, d strides, paddings and dilations, and the groups.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    seed = key if isinstance(key, Tensor) else torch.tensor(key)
    product: Tensor = _forward(x, weight, seed, rate.threshold, rate.scale, list(geometry))
    return product


@torch.library.custom_op(
    "lightning_tricks::product_by_example",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor key, Tensor threshold, Tensor scale, int[] geometry) -> Tensor",
)
def _forward(  # noqa: PLR0917, an operator takes arguments by their places
    x: Tensor, weight: Tensor, key: Tensor, threshold: Tensor, scale: Tensor, geometry: list[int]
) -> Tensor:
    scaled = weight * scale
    outputs = []
    for examples, mask in _chunks(x, weight, int(key), threshold):
        weights, some = scaled * mask, x[examples]
        if geometry:
            outputs.append(_convolve(some, weights, geometry))
        else:
            outputs.append(torch.bmm(some, weights.mT))
    return torch.cat(outputs) if outputs else _shape(x, weight, geometry)


@_forward.register_fake
def _shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    geometry = rest[-1]
    if not geometry:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    strides, paddings, dilations, _ = _geometry(geometry)
    lengths = [
        (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
        for length, size, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], strides, paddings, dilations, strict=True)
    ]
    return x.new_empty(x.shape[0], weight.shape[0], *lengths)


@torch.library.custom_op(
    "lightning_tricks::product_by_example_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor weight, Tensor key, Tensor threshold, Tensor scale, int[] geometry) -> (Tensor, Tensor)",
)
def _backward(  # noqa: PLR0917
    gradient: Tensor, x: Tensor, weight: Tensor, key: Tensor, threshold: Tensor, scale: Tensor, geometry: list[int]
) -> tuple[Tensor, Tensor]:
    scaled = weight * scale
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    inputs = torch.empty_like(x)
    for examples, mask in _chunks(x, weight, int(key), threshold):
        weights, some, back = scaled * mask, x[examples], gradient[examples]
        if geometry:
            inputs[examples], each = _convolve_backward(back, some, weights, geometry)
        else:
            inputs[examples], each = torch.bmm(back, weights), torch.bmm(back.mT, some)
        total += (each * mask).sum(0) if len(mask) > 1 else each[0] * mask[0]
    return inputs, (total * scale).to(weight.dtype)


@_backward.register_fake
def _(_: Tensor, x: Tensor, weight: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001, torch passes it by name
    *tensors, ctx.geometry = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(gradient, *ctx.saved_tensors, ctx.geometry), None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _chunks(x: Tensor, weight: Tensor, key: int, threshold: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few examples at a time and their masks."""
    keys = keys_of_examples(key, len(x), x.device)[:, None]
    count = max(1, _AT_ONCE // max(1, weight.numel()))
    for begin in range(0, len(x), count):
        examples = slice(begin, begin + count)
        yield examples, kept(keys[examples], weight.shape, threshold, x.device)


def _geometry(values: Sequence[int]) -> tuple[list[int], list[int], list[int], int]:
    d = len(values) // 3
    return list(values[:d]), list(values[d : 2 * d]), list(values[2 * d : 3 * d]), values[-1]


def _convolve(x: Tensor, weights: Tensor, geometry: list[int]) -> Tensor:
    """Convolve each example with its own weights, as groups of one convolution."""
    strides, paddings, dilations, groups = _geometry(geometry)
    joined = x.reshape(1, -1, *x.shape[2:]), weights.flatten(0, 1)
    none = [0] * len(strides)
    y: Tensor = torch.ops.aten.convolution(*joined, None, strides, paddings, dilations, False, none, groups * len(x))
    return y.view(*weights.shape[:2], *y.shape[2:])


def _convolve_backward(gradient: Tensor, x: Tensor, weights: Tensor, geometry: list[int]) -> tuple[Tensor, Tensor]:
    strides, paddings, dilations, groups = _geometry(geometry)
    joined = (each.reshape(1, -1, *each.shape[2:]) for each in (gradient, x))
    none = [0] * len(strides)
    inputs, each, _ = torch.ops.aten.convolution_backward(
        *joined, weights.flatten(0, 1), None, strides, paddings, dilations, False, none, groups * len(x), [True, True, False]
    )
    return inputs.view_as(x), each.view_as(weights)
