"""Images whose pixels come from other places: copied where maps mirror and shift by whole pixels, interpolated linearly elsewhere."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

__all__ = ["Border", "Size", "sample"]

Border = Literal["zeros", "edge", "mirror"]
Size = tuple[int, int]

_PADDING = {"zeros": "zeros", "edge": "border", "mirror": "reflection", None: "border"}


def sample(images: Tensor, maps: Tensor, size: Size, *, border: Border | None, exact: bool) -> Tensor:
    """Return images whose pixels come from where maps say.

    Coordinates are in pixels from the upper left corner: the middle of the first pixel is at ½.

    Args:
        images: ``(N, C, H, W)``; floating-point numbers, unless pixels are copied.
        maps: ``(N, 3, 3)``: what takes ``(x, y, 1)`` in the output to where it comes from in the input.
        size: Height and width of the output.
        border: What stands for pixels outside of the image; None if there are none.
        exact: Whether maps only mirror axes and shift them by whole pixels, so that pixels are copied.
    """
    if exact:
        return _copied(images, maps, size, border)
    if len(images) == 0:
        return images.new_zeros(*images.shape[:2], *size)
    grid = affine_grid(_relative(maps, images, size).to(images.dtype), [*images.shape[:2], *size], align_corners=False)
    return grid_sample(images, grid, padding_mode=_PADDING[border], align_corners=False)


def _relative(maps: Tensor, images: Tensor, size: Size) -> Tensor:
    """Return maps for coordinates that are −1 and 1 at the edges of images, with ``(N, 2, 3)``."""
    (height, width), rows = size, []
    for i, side in enumerate((images.shape[3], images.shape[2])):
        by_x, by_y, shift = maps[:, i].unbind(1)
        by_x, by_y = by_x * (width / side), by_y * (height / side)
        rows.append(torch.stack([by_x, by_y, by_x + by_y + shift * (2 / side) - 1], dim=1))
    return torch.stack(rows, dim=1)


def _copied(images: Tensor, maps: Tensor, size: Size, border: Border | None) -> Tensor:
    """Copy pixels along maps that mirror axes and shift them by whole pixels."""
    places, inside = [], []
    for i, axis in ((1, 2), (0, 3)):  # y, x
        side = images.shape[axis]
        middles = torch.arange(size[axis - 2], device=maps.device) + 0.5
        place = (maps[:, i, i, None] * middles + maps[:, i, 2, None]).floor().long()
        if border == "mirror":
            place = place % (2 * side)
            place = torch.minimum(place, 2 * side - 1 - place)
        inside.append((place >= 0) & (place < side))
        places.append(place.clamp(0, side - 1))
    y, x = places
    flat = (y[:, :, None] * images.shape[3] + x[:, None, :]).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    copied = images.flatten(2).gather(2, flat).view(*images.shape[:2], *size)
    return copied.masked_fill_(~(inside[0][:, None, :, None] & inside[1][:, None, None, :]), 0) if border == "zeros" else copied
