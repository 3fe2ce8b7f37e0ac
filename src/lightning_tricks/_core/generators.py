"""Tensors of random numbers that follow from a key alone, by a generator of the device that is seeded with the key.

These are operators of torch, so that compiled code calls them as they are: one graph, no matter what the key and the strength are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["bernoulli", "normal"]


def _generator(key: Tensor, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(key))


@torch.library.custom_op(
    "lightning_tricks::normal",
    mutates_args=(),
    schema="(Tensor key, Tensor std, SymInt[] shape, ScalarType dtype, Device device) -> Tensor",
)
def normal(key: Tensor, std: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers of a normal distribution around zero; key and deviation are tensors without dimensions, on the CPU."""
    values = torch.empty(shape, dtype=dtype, device=device)
    return values if values.is_meta else values.normal_(0.0, float(std), generator=_generator(key, device))


@torch.library.custom_op(
    "lightning_tricks::bernoulli", mutates_args=(), schema="(Tensor key, Tensor rate, SymInt[] shape, Device device) -> Tensor"
)
def bernoulli(key: Tensor, rate: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return what is true with this probability; key and probability are tensors without dimensions, on the CPU."""
    values = torch.empty(shape, dtype=torch.bool, device=device)
    return values if values.is_meta else values.bernoulli_(float(rate), generator=_generator(key, device))


@normal.register_fake
def _(_key: Tensor, _std: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@bernoulli.register_fake
def _(_key: Tensor, _rate: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=device)
