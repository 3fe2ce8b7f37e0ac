"""Random transforms of batches of images: what they have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_tricks._core.checks import check_in_interval, check_pair

__all__ = ["Photometric", "Transform", "as_floats", "as_given", "for_each"]


@dataclass(frozen=True, repr=False)
class Transform(ABC):
    """A random change of images, of which each image of a batch gets its own: the base of all transforms.

    A subclass is a frozen dataclass whose fields are its arguments. It is printed as its constructor call, pickles, and can be
    configured by LightningCLI.

    Args:
        probability: Of an image being changed, in [0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> from lightning_tricks import transforms
        >>> isinstance(transforms.Flip(), Transform)
        True
    """

    draws: ClassVar[int] = 0
    """How many random numbers each image needs."""

    _: KW_ONLY
    probability: float = 1.0

    def __init_subclass__(cls) -> None:
        """Let checkpoints that keep a transform among a module's hyperparameters load under ``weights_only=True``."""
        super().__init_subclass__()
        torch.serialization.add_safe_globals([cls])

    def __post_init__(self) -> None:
        self._check("probability", "[0, 1]")

    @property
    def is_neutral(self) -> bool:
        """Whether no image is changed."""
        return self.probability == 0

    def _check(self, name: str, interval: str) -> None:
        """Accept a number in an interval."""
        self._set(name, check_in_interval(name, getattr(self, name), interval))

    def _check_range(self, name: str, interval: str) -> None:
        """Accept the least and the greatest of numbers in an interval."""
        low, _ = check_pair(name, getattr(self, name), (interval, interval))
        self._set(name, check_pair(name, getattr(self, name), (interval, f"[{low}, {interval.split(', ')[1]}")))

    def _set(self, name: str, value: object) -> None:
        """Write an attribute during construction, in the plain form of what was accepted."""
        object.__setattr__(self, name, value)

    @override
    def __repr__(self) -> str:
        ordered = sorted(fields(self), key=lambda each: each.name == "probability")
        given = (each for each in ordered if each.default is MISSING or getattr(self, each.name) != each.default)
        return f"{type(self).__name__}({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in given)})"


@dataclass(frozen=True, repr=False)
class Photometric(Transform):
    """A transform that leaves pixels in their places: the base of those that change values."""

    on_bytes: ClassVar[bool] = False
    """Whether it can change bytes as they are."""

    @abstractmethod
    def change(self, images: Tensor, numbers: Tensor, chosen: Tensor, key: Tensor) -> Tensor:
        """Return new images.

        Args:
            images: ``(N, C, H, W)``; bytes divided by 255, unless it can change bytes as they are.
            numbers: ``(N, draws)``, in [0, 1).
            chosen: ``(N,)``, which images are changed.
            key: What further random numbers may follow from.
        """


def for_each(images: Tensor, values: Tensor) -> Tensor:
    """Lay out one value for each image so that it acts on all of the image's pixels."""
    return values.to(images.dtype if values.is_floating_point() else values.dtype)[:, None, None, None]


def as_floats(images: Tensor) -> Tensor:
    """Return images in at least single precision, bytes divided by 255."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    return images.to(torch.promote_types(images.dtype, torch.float32))


def as_given(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images in the precision they came in; bytes are rounded."""
    if dtype == torch.uint8 and images.dtype != torch.uint8:
        images = (images * 255).round_().clamp_(0, 255)
    return images.to(dtype)
