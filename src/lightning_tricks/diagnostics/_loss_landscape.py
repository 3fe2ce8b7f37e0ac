"""Loss landscapes: the loss around a model's weights, along random directions that have the scale of its filters.

A network with ReLU or normalization layers computes the same if one layer's weights grow and the next one's shrink. So a step of one
size means different things to two networks, unless directions are scaled, filter by filter, to the weights that they move. Then flat
and sharp minima, of a model before and after a trick, can be compared by eye.

Source: H. Li, Z. Xu, G. Taylor, C. Studer and T. Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS, 2018.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree

from lightning_tricks._core.checks import check_choice, check_count, check_in_interval, check_seed
from lightning_tricks._core.loaders import untouched
from lightning_tricks.diagnostics._landscape_plot import draw_landscapes
from lightning_tricks.errors import ArgumentError, UnsupportedStrategyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LossLandscape", "loss_landscape", "normalize_filters"]

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class LossLandscape:
    """The loss on a slice through the weights.

    Attributes:
        losses: Mean losses, of shape (points,) along one direction α, or (points, points) along α and β.
        steps: The values of α, and of β, with 0 in the middle: the model itself.
        directions: The normalized directions, each by name of parameter.

    Example:
        >>> landscape = LossLandscape(torch.tensor([4.0, 1.0, 2.0]), torch.tensor([-1.0, 0.0, 1.0]), ())
        >>> landscape.center
        1.0
    """

    losses: Tensor
    steps: Tensor
    directions: tuple[dict[str, Tensor], ...]

    @property
    def center(self) -> float:
        """The loss of the model itself."""
        middle = len(self.steps) // 2
        return float(self.losses[(middle,) * self.losses.ndim])

    def plot(self, path: str | os.PathLike[str], *, label: str = "model", others: Mapping[str, LossLandscape] | None = None) -> Path:
        """Draw it as a PNG: a curve, or levels over a plane.

        Args:
            path: Where to write.
            label: What this model is called.
            others: Other landscapes to draw beside it, of as many directions, by what their models are called.

        Returns:
            The path.

        Raises:
            ArgumentError: If the others have not as many directions.
            MissingPackageError: If matplotlib is not installed.
        """
        shown = {label: self, **(others or {})}
        if len({landscape.losses.ndim for landscape in shown.values()}) > 1:
            msg = f"`others` must have as many directions as this one, {self.losses.ndim}. Compute all with the same `dimensions`."
            raise ArgumentError(msg)
        draw_landscapes({name: (each.steps, each.losses) for name, each in shown.items()}, Path(path))
        return Path(path)


def normalize_filters(direction: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale each filter of a direction to the norm of the weights' filter: ``d_ij ← d_ij/‖d_ij‖ · ‖θ_ij‖``.

    A filter is all that belongs to one index of the first dimension. Tensors of one dimension or none, such as biases and what
    normalization layers own, are not moved: their direction is zero.

    Example:
        >>> normalize_filters({"w": torch.tensor([[0.0, 2.0]])}, {"w": torch.tensor([[3.0, 4.0]])})
        {'w': tensor([[0., 5.]])}
    """
    normalized = {}
    for name, weight in weights.items():
        if weight.ndim <= 1:
            normalized[name] = torch.zeros_like(weight)
            continue
        others = tuple(range(1, weight.ndim))
        own, theirs = (torch.linalg.vector_norm(each, dim=others, keepdim=True) for each in (direction[name], weight))
        normalized[name] = torch.where(own > 0, direction[name] * (theirs / own.clamp(min=torch.finfo(own.dtype).tiny)), 0)
    return normalized


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of a model's logits for a batch of inputs and classes."""
    inputs, targets = batch[:2]
    return nn.functional.cross_entropy(model(inputs), targets)


def loss_landscape(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    dimensions: Literal[1, 2] = 1,
    span: float = 1.0,
    points: int = 21,
    batches: int | None = None,
    directions: Sequence[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> LossLandscape:
    """Measure the loss around a model's weights: ``f(α, β) = L(θ + α·δ + β·η)``, with filter-normalized random δ and η.

    Reach for it to see what a trick has done to a minimum: measure both models with the same seed, and `plot` one beside the other.
    All models with the same `seed`, names and shapes share their directions up to the norms of their filters.

    Args:
        model: Any whole module on one device. It is in evaluation mode meanwhile, and afterwards as it was, to the bit.
        loader: Batches; they are moved to the model's device. It is gone through once, and each batch is evaluated at all points.
        loss: Returns the mean loss of a model on a batch; by default the cross-entropy of ``(inputs, classes)``.
        dimensions: 1 for a curve along δ, 2 for a plane.
        span: The largest α and β, in (0, ∞); 1 moves each filter by its own norm.
        points: Points on each axis, an odd number of at least 3.
        batches: How many batches; None = all.
        directions: One direction for each dimension, by name of parameter, in place of random ones, such as the `directions` of another
            model's landscape. They are normalized to this model's filters.
        seed: The seed of the random directions, which are drawn on the CPU from a generator of their own.

    Returns:
        The losses, where they were measured, and the directions.

    Raises:
        ArgumentError: If an argument lies outside its domain, directions do not fit the model, the loader is empty, or the loss is
            no number.
        UnsupportedStrategyError: If parameters are sharded.

    Note:
        Statistics of normalization layers stay those of the model, as in the authors' code. Loaders and the process's random numbers
        are as before. Batches of unequal size weigh by their number of samples. A copy of the weights and the directions are kept
        meanwhile, and ``points ** dimensions`` forward passes are made for each batch.

    References:
        - H. Li, Z. Xu, G. Taylor, C. Studer and T. Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS, 2018. As by
          default in the authors' code, biases and parameters of normalization layers are left where they are, and a filter of a
          transposed convolution is taken along the first dimension, as of any other.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> landscape = loss_landscape(model, data, dimensions=2, points=5)
        >>> landscape.losses.shape, landscape.steps.tolist()
        (torch.Size([5, 5]), [-1.0, -0.5, 0.0, 0.5, 1.0])
    """
    dimensions = check_choice("dimensions", dimensions, (1, 2))
    span = check_in_interval("span", span, "(0, ∞)")
    if check_count("points", points, least=3) % 2 == 0:
        msg = f"`points` must be odd, so that the model itself is in the middle, got {points!r}."
        raise ArgumentError(msg)
    limit = None if batches is None else check_count("batches", batches)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if any(isinstance(weight, DTensor) for weight in weights.values()):
        found = type(model).__name__
        msg = f"A loss landscape needs whole weights, and those of {found} are sharded. Load a full checkpoint into a plain model."
        raise UnsupportedStrategyError(msg)
    drawn = _random(weights, dimensions, check_seed(seed)) if directions is None else _checked(directions, weights, dimensions)
    normalized = tuple(normalize_filters(direction, weights) for direction in drawn)
    steps = torch.linspace(-span, span, points)
    steps[points // 2] = 0.0
    places = list(product(steps.tolist(), repeat=dimensions))
    device = next(iter(weights.values())).device if weights else torch.device("cpu")
    total, samples = torch.zeros(len(places)), 0
    with untouched([loader]), _borrowed(model), torch.no_grad(), _movable(weights, normalized) as move:
        for batch in islice(loader, limit):
            moved = _pytree.tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, batch)
            size, losses = _size(moved), []
            for place in places:
                move(place)
                losses.append(_checked_loss(loss(model, moved)))
            total += size * torch.stack(losses).cpu()
            samples += size
    if not samples:
        msg = "`loader` must yield at least one batch with samples, and yielded none."
        raise ArgumentError(msg)
    return LossLandscape((total / samples).view((points,) * dimensions), steps, normalized)


def _checked_loss(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        msg = f"`loss` must return the mean loss of a batch, a tensor of one number, and returned {found}. Take its mean."
        raise ArgumentError(msg)
    return value.detach().float().squeeze()


def _random(weights: Mapping[str, Tensor], dimensions: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype) for name, weight in weights.items()}
        for _ in range(dimensions)
    ]


def _checked(directions: Sequence[Mapping[str, Tensor]], weights: Mapping[str, Tensor], dimensions: int) -> list[dict[str, Tensor]]:
    shapes = {name: weight.shape for name, weight in weights.items()}
    if len(directions) != dimensions or any({n: t.shape for n, t in direction.items()} != shapes for direction in directions):
        msg = (
            f"`directions` must be {dimensions} mapping(s), as `dimensions={dimensions}` says, from the model's {len(shapes)} names of "
            f"parameters to tensors of their shapes, got {len(directions)} that differ in number, names or shapes."
        )
        raise ArgumentError(msg)
    return [{name: tensor.to(weights[name]) for name, tensor in direction.items()} for direction in directions]


def _size(batch: Any) -> int:
    """Return the number of samples of a batch: the first dimension of its first tensor."""
    return next((len(part) for part in _pytree.tree_leaves(batch) if isinstance(part, Tensor) and part.ndim), 1)


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own, with all buffers."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]  # a forward pass may put others in their places
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def _movable(weights: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]]) -> Iterator[Callable[[Sequence[float]], None]]:
    """Give what moves the weights to a place, counted from where they are now; they return there."""
    kept = {name: weight.clone() for name, weight in weights.items()}

    def move(place: Sequence[float]) -> None:
        for name, weight in weights.items():
            weight.copy_(kept[name])
            for step, direction in zip(place, directions, strict=True):
                weight.add_(direction[name], alpha=step)

    try:
        yield move
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])
