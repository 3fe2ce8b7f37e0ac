"""Transforms of images as their definitions say: one image, one pixel, one random number after another."""

from __future__ import annotations

import colorsys
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

Place = tuple[float, float]  # x and y in pixels from the upper left corner
Size = tuple[int, int]  # height and width


def flip(direction: str, size: Size) -> Callable[[Place], Place]:
    """Return where a place in the mirror image comes from."""
    height, width = size
    return (lambda at: (width - at[0], at[1])) if direction == "horizontal" else (lambda at: (at[0], height - at[1]))


def crop(padding: int, size: Size, after: Size, u: Sequence[float]) -> Callable[[Place], Place]:
    """Return where a place in the piece comes from: pad, choose one of the corners that leave room, cut."""
    top, left = (int(u[i] * (size[i] + 2 * padding - after[i] + 1)) - padding for i in range(2))
    return lambda at: (at[0] + left, at[1] + top)


def rotation(degrees: float, size: Size, u: Sequence[float]) -> Callable[[Place], Place]:
    """Return where a place in the image comes from that was turned counter-clockwise about its middle; y points down."""
    angle = math.radians((2 * u[0] - 1) * degrees)
    middle_x, middle_y = size[1] / 2, size[0] / 2

    def source(at: Place) -> Place:
        x, y = at[0] - middle_x, at[1] - middle_y
        return middle_x + x * math.cos(angle) - y * math.sin(angle), middle_y + x * math.sin(angle) + y * math.cos(angle)

    return source


def box(size: Size, scale: Sequence[float], ratio: Sequence[float], u: Sequence[float]) -> Size | None:
    """Return height and width of the first of ten boxes that fits."""
    height, width = size
    for i in range(10):
        area = height * width * (scale[0] + u[i] * (scale[1] - scale[0]))
        shape = math.exp(math.log(ratio[0]) + u[10 + i] * (math.log(ratio[1]) - math.log(ratio[0])))
        h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < h <= height and 0 < w <= width:
            return h, w
    return None


def resized_crop(size: Size, scale: Sequence[float], ratio: Sequence[float], after: Size, u: Sequence[float]) -> Callable[[Place], Place]:
    """Return where a place in the resized piece comes from; the middle of the image, cut to an admitted shape, if no box fits."""
    found = box(size, scale, ratio, u)
    if found is not None:
        h, w = found
        top, left = int(u[20] * (size[0] - h + 1)), int(u[21] * (size[1] - w + 1))
    else:
        h, w = size
        if w / h < ratio[0]:
            h = round(w / ratio[0])
        elif w / h > ratio[1]:
            w = round(h * ratio[1])
        top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return lambda at: (left + at[0] * w / after[1], top + at[1] * h / after[0])


def pixel(image: Tensor, x: int, y: int, border: str) -> Tensor:
    """Return a pixel, or what stands for it outside."""
    _, height, width = image.shape
    if border == "zeros" and not (0 <= x < width and 0 <= y < height):
        return torch.zeros(len(image), dtype=image.dtype)
    if border == "mirror":
        x, y = (min(at % (2 * side), 2 * side - 1 - at % (2 * side)) for at, side in ((x, width), (y, height)))
    return image[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]


def moved(image: Tensor, sources: Sequence[Callable[[Place], Place]], after: Size, border: str) -> Tensor:
    """Return the image after several moves, the first of which acted first, interpolated once between the middles of four pixels."""
    result = torch.zeros(len(image), *after, dtype=image.dtype)
    for row in range(after[0]):
        for column in range(after[1]):
            at = (column + 0.5, row + 0.5)
            for source in reversed(sources):
                at = source(at)
            x, y = at[0] - 0.5, at[1] - 0.5
            left, top = math.floor(x), math.floor(y)
            for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
                weight = (1 - abs(x - left - dx)) * (1 - abs(y - top - dy))
                result[:, row, column] += weight * pixel(image, left + dx, top + dy, border)
    return result


def jitter(image: Tensor, strengths: Sequence[float], u: Sequence[float]) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image, pixel by pixel."""
    factors = [max(0.0, 1 - s) + each * (1 + s - max(0.0, 1 - s)) for s, each in zip(strengths[:3], u[:3], strict=True)]
    pixels = [tuple(values) for values in image.flatten(1).T.tolist()]

    def grey(colour: Sequence[float]) -> float:
        return colour[0] if len(colour) == 1 else 0.2989 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]

    def limited(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(min(max(value, 0.0), 1.0) for value in values)

    pixels = [limited([factors[0] * value for value in each]) for each in pixels]
    mean = sum(map(grey, pixels)) / len(pixels)
    pixels = [limited([factors[1] * value + (1 - factors[1]) * mean for value in each]) for each in pixels]
    if len(image) == 3:
        pixels = [limited([factors[2] * value + (1 - factors[2]) * grey(each) for value in each]) for each in pixels]
        turned = []
        for each in pixels:
            hue, saturation, value = colorsys.rgb_to_hsv(*each)
            turned.append(colorsys.hsv_to_rgb((hue + (2 * u[3] - 1) * strengths[3]) % 1, saturation, value))
        pixels = turned
    return torch.tensor(pixels, dtype=image.dtype).T.view_as(image)


def filled(image: Tensor, corner: tuple[int, int], size: Size, value: float) -> Tensor:
    """Put a value in a box, as far as it lies inside."""
    (top, left), (height, width) = corner, size
    result = image.clone()
    for y in range(max(top, 0), min(top + height, image.shape[1])):
        for x in range(max(left, 0), min(left + width, image.shape[2])):
            result[:, y, x] = value
    return result
