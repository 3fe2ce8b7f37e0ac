"""Random transforms that move pixels: each says where the pixels of its output come from.

Sources: A. Krizhevsky, I. Sutskever and G. E. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS, 2012, for
mirror images and crops; C. Szegedy et al., "Going Deeper with Convolutions", CVPR, 2015, for resized crops.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_tricks._core.checks import check_choice, check_count
from lightning_tricks.data._sampling import Border, Size
from lightning_tricks.data._transform import Transform
from lightning_tricks.errors import ArgumentError, TrickError

__all__ = ["Crop", "Flip", "Geometric", "ResizedCrop", "Rotation", "boxes"]

_BORDERS = ("zeros", "edge", "mirror")
_TRIES = 10  # for a box that fits, as in the reference implementation of resized crops


@dataclass(frozen=True, repr=False)
class Geometric(Transform):
    """A transform that moves pixels: the base of those that are merged with their neighbours.

    Coordinates are in pixels from the upper left corner: the middle of the first pixel is at ½.
    """

    exact: ClassVar[bool] = False
    """Whether it only mirrors, and shifts by whole pixels."""

    @abstractmethod
    def maps(self, numbers: Tensor, chosen: Tensor, size: Size) -> Tensor:
        """Return, for each image, the matrix that takes ``(x, y, 1)`` in the output to where it comes from in the input.

        Args:
            numbers: ``(N, draws)``, in [0, 1).
            chosen: ``(N,)``, which images are changed at random.
            size: Height and width of the input.
        """

    def size_after(self, size: Size) -> Size:
        """Return height and width of the output."""
        return size

    def look_outside(self) -> Border | None:
        """Return what stands for pixels outside of the image, or None if there are never any to be had."""
        return None


@dataclass(frozen=True, repr=False)
class Flip(Geometric):
    """Mirror images: left becomes right, or top bottom.

    Args:
        direction: ``"horizontal"`` or ``"vertical"``.
        probability: Of an image being changed, in [0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> augment(torch.tensor([[[[1.0, 2.0, 3.0]]]]), Flip(probability=1))
        tensor([[[[3., 2., 1.]]]])
    """

    exact: ClassVar[bool] = True

    direction: Literal["horizontal", "vertical"] = "horizontal"
    _: KW_ONLY
    probability: float = 0.5

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("direction", self.direction, ("horizontal", "vertical"))

    @override
    def maps(self, numbers: Tensor, chosen: Tensor, size: Size) -> Tensor:
        turned = chosen.to(torch.float32)
        if self.direction == "horizontal":
            return _matrices(chosen, xx=1 - 2 * turned, x=turned * size[1])
        return _matrices(chosen, yy=1 - 2 * turned, y=turned * size[0])


@dataclass(frozen=True, repr=False)
class Crop(Geometric):
    """Cut a piece out of each image, at a random place, after padding it on all sides.

    Args:
        padding: Number of pixels on each side, at least 0.
        size: Height and width of the piece, or one number for both; None = as the image without padding.
        border: What is padded with: ``"zeros"``; ``"edge"``, the nearest pixel; ``"mirror"``, the image mirrored at its edges.
        probability: Of a random place, in [0, 1]; the piece comes from the middle otherwise.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickError: In use, if images are smaller than the piece.

    References:
        - A. Krizhevsky, I. Sutskever and G. E. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS, 2012.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> augment(torch.rand(8, 3, 36, 36), Crop(size=32)).shape
        torch.Size([8, 3, 32, 32])
    """

    exact: ClassVar[bool] = True
    draws: ClassVar[int] = 2

    padding: int = 0
    size: int | Sequence[int] | None = None
    border: Border = "zeros"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("padding", check_count("padding", self.padding, least=0))
        self._set("size", _check_size(self.size))
        check_choice("border", self.border, _BORDERS)

    @property
    @override
    def is_neutral(self) -> bool:
        return self.size is None and (self.padding == 0 or self.probability == 0)

    @override
    def size_after(self, size: Size) -> Size:
        return _pair(self.size) or size

    @override
    def look_outside(self) -> Border | None:
        return self.border if self.padding else None

    @override
    def maps(self, numbers: Tensor, chosen: Tensor, size: Size) -> Tensor:
        places = []
        for i, (before, after) in enumerate(zip(size, self.size_after(size), strict=True)):
            spare = before + 2 * self.padding - after
            if spare < 0:
                msg = f"{self!r} cuts {after} pixels, and images of {size[0]} × {size[1]} have {before + 2 * self.padding} with padding."
                raise TrickError(msg)
            drawn = (numbers[:, i] * (spare + 1)).floor()
            places.append(torch.where(chosen, drawn, spare // 2) - self.padding)
        return _matrices(chosen, y=places[0], x=places[1])


@dataclass(frozen=True, repr=False)
class ResizedCrop(Geometric):
    """Cut a piece of random area, shape and place out of each image, and resize it to the size of the image.

    The area is ``a·HW`` with a uniform in `scale`, the width over the height log-uniform in `ratio`. Of ten such boxes the first that
    lies within the image is taken, or else the largest in the middle with an admitted shape.

    Args:
        scale: Least and greatest share of the image's area, in (0, 1].
        ratio: Least and greatest width over height, above 0.
        size: Height and width of the output, or one number for both; None = as the input.
        probability: Of a random piece, in [0, 1]; the whole image is resized otherwise.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        Pixels are interpolated linearly between their neighbours, at the edge of a piece those in the image rather than, as in
        torchvision, those in the piece alone. Nothing is smoothed beforehand: a `size` far below that of the pieces would let fine
        patterns alias.

    References:
        - C. Szegedy et al., "Going Deeper with Convolutions", CVPR, 2015.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> augment(torch.rand(8, 3, 48, 64), ResizedCrop(scale=(0.2, 1), size=32)).shape
        torch.Size([8, 3, 32, 32])
    """

    draws: ClassVar[int] = 2 * _TRIES + 2

    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    size: int | Sequence[int] | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("scale", "(0, 1]")
        self._check_range("ratio", "(0, ∞)")
        self._set("size", _check_size(self.size))

    @property
    @override
    def is_neutral(self) -> bool:
        return self.size is None and self.probability == 0

    @override
    def size_after(self, size: Size) -> Size:
        return _pair(self.size) or size

    @override
    def maps(self, numbers: Tensor, chosen: Tensor, size: Size) -> Tensor:
        height, width = boxes(numbers, size, self.scale, self.ratio)
        middle = _largest(size, self.ratio)
        fits = height > 0
        free = [(numbers[:, 2 * _TRIES + i] * (size[i] - each + 1)).floor() for i, each in enumerate((height, width))]
        top, left = (torch.where(fits, free[i], (size[i] - middle[i]) // 2) for i in range(2))
        height, width = torch.where(fits, height, middle[0]), torch.where(fits, width, middle[1])
        top, left = top * chosen, left * chosen
        height, width = torch.where(chosen, height, size[0]), torch.where(chosen, width, size[1])
        after = self.size_after(size)
        return _matrices(chosen, yy=height / after[0], y=top, xx=width / after[1], x=left)


@dataclass(frozen=True, repr=False)
class Rotation(Geometric):
    """Turn each image about its middle, by an angle uniform in ``[−degrees, degrees]``; positive ones are counter-clockwise.

    Args:
        degrees: The greatest angle, in [0, 180].
        border: What comes in from outside: ``"zeros"``; ``"edge"``, the nearest pixel; ``"mirror"``, the image mirrored at its edges.
        probability: Of an image being changed, in [0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> augment(torch.ones(1, 1, 3, 3), Rotation(45, border="edge"))
        tensor([[[[1., 1., 1.],
                  [1., 1., 1.],
                  [1., 1., 1.]]]])
    """

    draws: ClassVar[int] = 1

    degrees: float = 10.0
    border: Border = "zeros"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("degrees", "[0, 180]")
        check_choice("border", self.border, _BORDERS)

    @property
    @override
    def is_neutral(self) -> bool:
        return self.probability == 0 or self.degrees == 0

    @override
    def look_outside(self) -> Border | None:
        return self.border

    @override
    def maps(self, numbers: Tensor, chosen: Tensor, size: Size) -> Tensor:
        angle = torch.where(chosen, (2 * numbers[:, 0] - 1) * math.radians(self.degrees), 0.0)
        cos, sin = angle.cos(), angle.sin()
        y, x = size[0] / 2, size[1] / 2
        return _matrices(chosen, xx=cos, xy=-sin, x=x - cos * x + sin * y, yx=sin, yy=cos, y=y - sin * x - cos * y)


def boxes(numbers: Tensor, size: Size, scale: Sequence[float], ratio: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return height and width of the first box of each row that lies within an image; zero where none does."""
    area = (scale[0] + numbers[:, :_TRIES] * (scale[1] - scale[0])) * (size[0] * size[1])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = (low + numbers[:, _TRIES : 2 * _TRIES] * (high - low)).exp()
    height, width = (area / shape).sqrt().round(), (area * shape).sqrt().round()
    fits = (height > 0) & (height <= size[0]) & (width > 0) & (width <= size[1])
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    return tuple(torch.where(fits, each, 0).gather(1, first).squeeze(1) for each in (height, width))  # type: ignore[return-value]


def _largest(size: Size, ratio: Sequence[float]) -> Size:
    """Return height and width of the largest box of an admitted shape."""
    shape = min(max(size[1] / size[0], ratio[0]), ratio[1])
    return min(size[0], round(size[1] / shape)), min(size[1], round(size[0] * shape))


def _check_size(value: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2:
        msg = f"`size` must be a height and a width, or one number for both, got {value!r}."
        raise ArgumentError(msg)
    height, width = (check_count("size", side) for side in sides)
    return (height, width) if isinstance(value, Sequence) else height


def _pair(size: int | Sequence[int] | None) -> Size | None:
    return None if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])


def _matrices(
    like: Tensor,
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """Return a matrix for each image: ``x' = xx·x + xy·y + x``, and the like for y."""
    zeros = torch.zeros(len(like), device=like.device)
    return torch.stack([zeros + each for each in (xx, xy, x, yx, yy, y, 0.0, 0.0, 1.0)], dim=1).view(-1, 3, 3)
