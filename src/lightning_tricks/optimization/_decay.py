"""Weight decay as arithmetic on parameters and gradients, between the backward pass and the optimizer's update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_tricks._core.checks import check_choice, check_in_interval, check_tensors
from lightning_tricks._core.strategies import added_up, own_part, summed
from lightning_tricks._core.weights import PIECE, pieces
from lightning_tricks.errors import ArgumentError, TrickError

__all__ = ["MODES", "Mode", "Terms", "add_gradient_", "decay_weights_", "measure", "penalty_of", "shrink_"]

Mode: TypeAlias = Literal["decoupled", "l2", "l1"]
MODES: Final = ("decoupled", "l2", "l1")


def decay_weights_(
    parameters: Iterable[Tensor],
    weight_decay: float,
    *,
    mode: Mode = "decoupled",
    lr: float | None = None,
) -> None:
    """Decay parameters in place, after ``backward`` and before the optimizer's ``step``.

    With the decay λ and the learning rate η, ``"decoupled"`` shrinks the weights, ``θ ← (1 − η·λ)·θ``; ``"l2"`` adds the gradient of
    ``λ/2·‖θ‖²``, ``g ← g + λ·θ``; and ``"l1"`` that of ``λ·‖θ‖₁``, ``g ← g + λ·sign(θ)``. A parameter without a gradient is left
    alone, as optimizers leave it.

    Args:
        parameters: The parameters θ; of each, the weights or the gradient ``θ.grad`` are changed.
        weight_decay: The decay λ, at least 0.
        mode: What is done.
        lr: The learning rate η with which the optimizer is about to step; needed for ``"decoupled"`` only.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickError: If a gradient that is to be added to is sparse.

    Note:
        The arithmetic is that of torch's own optimizers: ``"decoupled"`` before ``Adam`` equals ``AdamW``, and ``"l2"`` before
        ``SGD`` equals ``SGD(weight_decay=…)``, to the bit where torch's kernels are not fused.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
        >>> theta.grad = torch.zeros(3)
        >>> decay_weights_([theta], 0.5, mode="l1")
        >>> theta.grad
        tensor([ 0.5000, -0.5000,  0.0000])
        >>> decay_weights_([theta], 0.5, lr=0.1)
        >>> theta.data
        tensor([ 0.9500, -1.9000,  0.0000])
    """
    ready = [parameter for parameter in check_tensors("parameters", parameters) if parameter.grad is not None]
    check_in_interval("weight_decay", weight_decay, "[0, ∞)")
    if check_choice("mode", mode, MODES) == "decoupled" and lr is None:
        msg = "`lr` must be the optimizer's learning rate with `mode='decoupled'`, got None."
        raise ArgumentError(msg)
    with torch.no_grad():
        if lr is not None and mode == "decoupled":
            shrink_(ready, 1 - check_in_interval("lr", lr, "[0, ∞)") * weight_decay)
        else:
            add_gradient_(ready, weight_decay, mode)


def shrink_(parameters: Sequence[Tensor], share: float | Tensor) -> None:
    """Keep a share of each weight: ``θ ← share·θ``."""
    for (weights,) in _alike((_real(own_part(parameter)),) for parameter in parameters):
        if isinstance(share, Tensor) and share.device != weights[0].device:
            share = share.item()
        if weights[0].device.type == "cpu" and weights[0].element_size() < 4:  # where foreach rounds the share to the weights' dtype
            for weight in weights:
                weight.mul_(share)
        else:
            torch._foreach_mul_(weights, share)


def add_gradient_(parameters: Sequence[Tensor], factor: float, mode: Mode) -> None:
    """Add the gradient of a penalty: ``g ← g + factor·θ``, and with ``"l1"`` ``g ← g + factor·sign(θ)``.

    Raises:
        TrickError: If a gradient is sparse.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            msg = (
                f"`mode={mode!r}` adds to every element of a gradient, and that of a parameter of shape {tuple(parameter.shape)} is "
                "sparse. Use mode='decoupled', `exclude` the parameter, or give its layer `sparse=False`."
            )
            raise TrickError(msg)
        if getattr(gradient, "placements", None) != getattr(parameter, "placements", None):  # as tensor parallelism may leave it
            parameter.grad = gradient.add(parameter if mode == "l2" else parameter.sgn(), alpha=factor)
        else:
            pairs.append((own_part(gradient), own_part(parameter)))
    if mode == "l1":
        pairs = [piece for pair in pairs for piece in pieces(*pair)]
        on_cpu = all(gradient.device.type == "cpu" for gradient, _ in pairs)
        for gradients, weights in _alike(pairs, at_once=PIECE // 4 if on_cpu else 16 * PIECE):  # in cache, or in few launches
            signs = [weight.sgn() for weight in weights] if weights[0].is_complex() else torch._foreach_sign(weights)
            torch._foreach_add_(gradients, signs, alpha=factor)
    else:
        for gradients, weights in _alike((_real(gradient), _real(weight)) for gradient, weight in pairs):
            torch._foreach_add_(gradients, weights, alpha=factor)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _alike(rows: Iterable[tuple[Tensor, ...]], *, at_once: int | None = None) -> Iterator[tuple[list[Tensor], ...]]:
    """Sort rows into lists that agree in dtype and device, each for one foreach call; with `at_once`, of about so many elements."""
    lists: dict[Any, list[tuple[Tensor, ...]]] = {}
    sizes: dict[Any, int] = {}
    for row in rows:
        key = tuple(part for tensor in row for part in (tensor.dtype, tensor.device))
        lists.setdefault(key, []).append(row)
        sizes[key] = sizes.get(key, 0) + row[0].numel()
        if at_once is not None and sizes[key] >= at_once:
            sizes.pop(key)
            yield tuple(map(list, zip(*lists.pop(key), strict=True)))
    for found in lists.values():
        yield tuple(map(list, zip(*found, strict=True)))


class Terms(NamedTuple):
    """Sums over parameters that tell how strong a decay is beside the loss.

    Attributes:
        penalty: ``λ/2·‖θ‖²``, or ``λ·‖θ‖₁``.
        added: The squared norm of its gradient.
        gradient: The squared norm of the loss's gradient.
    """

    penalty: float
    added: float
    gradient: float


def measure(parameters: Sequence[Tensor], weight_decay: float, mode: Mode, scale: float) -> Terms:
    """Return the terms of parameters whose gradients are multiplied by a scale; all ranks that own parts must call this."""
    penalty = penalty_of(parameters, weight_decay, mode)
    added = weight_decay**2 * _total(parameters, 0) if mode == "l1" else 2 * weight_decay * penalty
    return Terms(penalty, added, _total([parameter.grad for parameter in parameters if parameter.grad is not None], 2) / scale**2)


def penalty_of(parameters: Sequence[Tensor], weight_decay: float, mode: Mode) -> float:
    """Return the penalty whose gradient is added."""
    return weight_decay * (_total(parameters, 1) if mode == "l1" else _total(parameters, 2) / 2)


def _total(tensors: Sequence[Tensor], power: int) -> float:
    """Return the sum over all elements of their size to some power, where ``0⁰ = 0``; all ranks that own parts must call this."""
    sums: dict[Any, tuple[Tensor, Tensor]] = {}
    for tensor in map(added_up, tensors):
        part = own_part(tensor)
        part = part.coalesce().values() if part.is_sparse else part
        norm = torch.linalg.vector_norm(
            part.abs() if part.is_complex() else part, power, dtype=torch.promote_types(part.real.dtype, torch.float32)
        )
        layout = (part.device, getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None))
        before = sums[layout][0] if layout in sums else 0.0
        sums[layout] = before + norm ** max(1, power), tensor
    return sum(summed(value, like).item() for value, like in sums.values())
