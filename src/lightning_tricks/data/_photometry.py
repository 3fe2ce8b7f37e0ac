"""Random transforms that change values of pixels: colours, noise, and rectangles that are taken away.

Sources: A. G. Howard, "Some Improvements on Deep Convolutional Neural Network Based Image Classification", arXiv:1312.5402, 2013, for
colours; T. DeVries and G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", arXiv:1708.04552, 2017;
Z. Zhong, L. Zheng, G. Kang, S. Li and Y. Yang, "Random Erasing Data Augmentation", AAAI, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_tricks._core.checks import check_count
from lightning_tricks._core.generators import normal
from lightning_tricks.data._geometry import boxes
from lightning_tricks.data._transform import Photometric, for_each
from lightning_tricks.errors import TrickError

__all__ = ["ColorJitter", "Cutout", "Erasing", "Noise"]


@dataclass(frozen=True, repr=False)
class ColorJitter(Photometric):
    """Change brightness, contrast, saturation and hue of each image, in this order.

    With factors f uniform in ``[max(0, 1 − s), 1 + s]`` for the strength s of each: brightness ``x ← f·x``; contrast
    ``x ← f·x + (1 − f)·m`` with the mean m of the image's grey values; saturation ``x ← f·x + (1 − f)·g`` with each pixel's grey value
    ``g = 0.2989 R + 0.587 G + 0.114 B``. Hue turns the circle of colours by a share uniform in ``[−s, s]``. After each, values are
    limited to [0, 1].

    Args:
        brightness: Strength, at least 0.
        contrast: Strength, at least 0.
        saturation: Strength, at least 0.
        hue: Strength, in [0, 0.5]: the greatest share of a full turn.
        probability: Of an image being changed, in [0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickError: In use, if images have neither one channel nor three, unless only their brightness changes.

    Note:
        Images are bytes, or numbers in [0, 1]: standardize them afterwards. Saturation and hue leave images of one channel as they are.

    References:
        - A. G. Howard, "Some Improvements on Deep Convolutional Neural Network Based Image Classification", arXiv:1312.5402, 2013. The
          formulas are those of torchvision, which draws the order as well.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> augment(torch.ones(4, 3, 1, 1), ColorJitter(brightness=0.5)).squeeze().amax(dim=1) <= 1
        tensor([True, True, True, True])
    """

    draws: ClassVar[int] = 4

    _: KW_ONLY
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name, interval in (("brightness", "[0, ∞)"), ("contrast", "[0, ∞)"), ("saturation", "[0, ∞)"), ("hue", "[0, 0.5]")):
            self._check(name, interval)

    @property
    @override
    def is_neutral(self) -> bool:
        return self.probability == 0 or self.brightness == self.contrast == self.saturation == self.hue == 0

    @override
    def change(self, images: Tensor, numbers: Tensor, chosen: Tensor, key: Tensor) -> Tensor:
        channels = images.shape[1]
        if channels not in {1, 3} and (self.contrast or self.saturation or self.hue):
            msg = f"{self!r} needs images of 1 or 3 channels, for grey values and colours, got {channels}. Change `brightness` alone."
            raise TrickError(msg)
        changed = images.clone()
        if self.brightness:
            adjust_brightness_(changed, _factors(numbers[:, 0], self.brightness))
        if self.contrast:
            adjust_contrast_(changed, _factors(numbers[:, 1], self.contrast))
        if self.saturation and channels == 3:
            adjust_saturation_(changed, _factors(numbers[:, 2], self.saturation))
        if self.hue and channels == 3:
            changed = adjust_hue(changed, (2 * numbers[:, 3] - 1) * self.hue)
        return changed if self.probability == 1 else torch.where(for_each(images, chosen), changed, images)


@dataclass(frozen=True, repr=False)
class Noise(Photometric):
    """Add Gaussian noise to every value: ``x ← x + std·ε`` with ε from the standard normal distribution.

    Args:
        std: Standard deviation, at least 0, in units of the images; for bytes, of 255.
        probability: Of an image being changed, in [0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Note:
        Values of floating-point images are not limited; bytes stay between 0 and 255.

    References:
        - C. M. Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", Neural Computation, 1995.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> print(f"{augment(torch.zeros(8, 1, 128, 128), Noise(0.5)).std():.2f}")
        0.50
    """

    std: float = 0.1

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("std", "[0, ∞)")

    @property
    @override
    def is_neutral(self) -> bool:
        return self.probability == 0 or self.std == 0

    @override
    def change(self, images: Tensor, numbers: Tensor, chosen: Tensor, key: Tensor) -> Tensor:
        std = torch.full((), self.std, dtype=torch.float64)
        noise: Tensor = normal(key, std, images.shape, images.dtype, images.device)
        return torch.addcmul(images, noise, for_each(images, chosen.to(images.dtype)))


@dataclass(frozen=True, repr=False)
class Cutout(Photometric):
    """Put one value in a square around a random pixel of each image; what of it lies outside is cut off.

    Args:
        size: Side of the square in pixels, at least 1.
        fill: The value, in units of the images; for bytes, of 255.
        probability: Of an image being changed, in [0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - T. DeVries and G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", arXiv:1708.04552, 2017,
          which puts zero, the mean of standardized images.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> augment(torch.ones(1, 1, 3, 3), Cutout(5), seed=2)
        tensor([[[[0., 0., 0.],
                  [0., 0., 0.],
                  [0., 0., 0.]]]])
    """

    draws: ClassVar[int] = 2
    on_bytes: ClassVar[bool] = True

    size: int = 16
    fill: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", check_count("size", self.size))
        self._check("fill", "(-∞, ∞)")

    @override
    def change(self, images: Tensor, numbers: Tensor, chosen: Tensor, key: Tensor) -> Tensor:
        top, left = ((numbers[:, i] * images.shape[2 + i]).floor() - self.size // 2 for i in range(2))
        return filled(images, (top, left, top + self.size, left + self.size), chosen, self.fill)


@dataclass(frozen=True, repr=False)
class Erasing(Photometric):
    """Put one value in a rectangle of random area, shape and place in each image.

    The area is ``a·HW`` with a uniform in `scale`, the width over the height log-uniform in `ratio`. Of ten such rectangles the first
    that lies within the image is taken; an image in which none does stays as it is.

    Args:
        scale: Least and greatest share of the image's area, in (0, 1].
        ratio: Least and greatest width over height, above 0.
        fill: The value, in units of the images; for bytes, of 255.
        probability: Of an image being changed, in [0, 1].

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        - Z. Zhong, L. Zheng, G. Kang, S. Li and Y. Yang, "Random Erasing Data Augmentation", AAAI, 2020. Differs from it in one value
          rather than random ones, and in a log-uniform shape, as torchvision has it.

    Example:
        >>> from lightning_tricks.functional import augment
        >>> augment(torch.ones(1, 1, 2, 2), Erasing(scale=(0.25, 0.25), ratio=(1, 1), probability=1)).sum()
        tensor(3.)
    """

    draws: ClassVar[int] = 22
    on_bytes: ClassVar[bool] = True

    scale: Sequence[float] = (0.02, 0.33)
    ratio: Sequence[float] = (0.3, 3.3)
    fill: float = 0.0
    _: KW_ONLY
    probability: float = 0.5

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("scale", "(0, 1]")
        self._check_range("ratio", "(0, ∞)")
        self._check("fill", "(-∞, ∞)")

    @override
    def change(self, images: Tensor, numbers: Tensor, chosen: Tensor, key: Tensor) -> Tensor:
        height, width = boxes(numbers, (images.shape[2], images.shape[3]), self.scale, self.ratio)
        top, left = ((numbers[:, i] * (images.shape[i] - each + 1)).floor() for i, each in ((-2, height), (-1, width)))
        return filled(images, (top, left, top + height, left + width), chosen, self.fill)


def filled(images: Tensor, box: tuple[Tensor, Tensor, Tensor, Tensor], chosen: Tensor, fill: float) -> Tensor:
    """Put a value in a box of each chosen image: top, left, bottom, right."""
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    top, left, bottom, right = (edge[:, None] for edge in box)
    rows, columns = (y >= top) & (y < bottom) & chosen[:, None], (x >= left) & (x < right)
    value = round(255 * min(max(fill, 0), 1)) if images.dtype == torch.uint8 else fill
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], value)


def adjust_brightness_(images: Tensor, factors: Tensor) -> None:
    """Multiply images by factors."""
    images.mul_(for_each(images, factors)).clamp_(0, 1)


def adjust_contrast_(images: Tensor, factors: Tensor) -> None:
    """Move values away from the mean grey value of their image, or towards it."""
    _blend_(images, _grey(images).mean(dim=(2, 3), keepdim=True), factors)


def adjust_saturation_(images: Tensor, factors: Tensor) -> None:
    """Move values away from the grey value of their pixel, or towards it."""
    _blend_(images, _grey(images), factors)


def adjust_hue(images: Tensor, shares: Tensor) -> Tensor:
    """Turn the circle of colours, on which red, green and blue are a third of a turn apart, by shares of a turn.

    A pixel's greatest and least value, v and v − c, stay. At a hue of h sixths of a turn, channel i has
    ``v − c·max(0, min(k, 4 − k, 1))`` with ``k = (n_i + h) mod 6`` and n = 5, 3, 1.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == green, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4))
    hue = torch.where(value == red, (green - blue).div_(divisor), hue).add_(6 * shares.to(images.dtype)[:, None, None])
    channels = []
    for offset in (5, 3, 1):
        place = (hue + offset).remainder_(6)
        channels.append(value - torch.minimum(place, 4 - place).clamp_(0, 1).mul_(chroma))
    return torch.stack(channels, dim=1)


def _factors(numbers: Tensor, strength: float) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + numbers * (1 + strength - low)


def _grey(images: Tensor) -> Tensor:
    """Return grey values, which may be the images themselves."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _blend_(images: Tensor, others: Tensor, factors: Tensor) -> None:
    f = for_each(images, factors)
    rest = (1 - f) * others
    images.mul_(f).add_(rest).clamp_(0, 1)
