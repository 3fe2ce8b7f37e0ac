"""Training on images into which a rectangle of another one is pasted, with labels by area.

Unlike cutout, no pixel is lost, and unlike mixup, every patch is one of a real image. A network can no longer rely on the most telling
part of an object, since that may be gone.

Source: S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe and Y. Yoo, "CutMix: Regularization Strategy to Train Strong Classifiers with
Localizable Features", ICCV, 2019. arXiv:1905.04899.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tricks._core.checks import check_count, check_in_interval
from lightning_tricks._core.lightning import override
from lightning_tricks.data._mixing import MixingTrick, Per
from lightning_tricks.data._target_trick import Places
from lightning_tricks.errors import ArgumentError, TrickError

__all__ = ["CutMix", "cut_mix", "cut_mix_box"]

Box = tuple[int, int, int, int]


def cut_mix_box(height: int, width: int, share: float, center: tuple[int, int]) -> tuple[Box, float]:
    """Return a rectangle of an image's shape and of ``1 − λ`` of its area, and the share of the area that is left outside.

    Args:
        height: Height of the image in pixels.
        width: Its width.
        share: λ in [0, 1].
        center: Row and column of the rectangle's center; what lies beyond the image's border is cut off.

    Returns:
        The rectangle, as top, bottom, left and right, of which bottom and right lie outside; and the share, which is larger than λ if
        something was cut off.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    Example:
        >>> cut_mix_box(8, 8, 0.75, (0, 4))
        ((0, 2, 2, 6), 0.875)
    """
    ratio = math.sqrt(1 - check_in_interval("share", share, "[0, 1]"))
    bounds: list[int] = []
    for name, size, middle in (("height", height, center[0]), ("width", width, center[1])):
        side = int(check_count(name, size) * ratio)
        bounds += [min(max(bound, 0), size) for bound in (middle - side // 2, middle + (side + 1) // 2)]
    top, bottom, left, right = bounds
    return (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (height * width)


def cut_mix(images: Tensor, boxes: Box | Sequence[Box], partners: Tensor) -> Tensor:
    """Paste into each image a rectangle of another one, at the same place.

    Args:
        images: Images, or maps of their size.
        boxes: A rectangle for all images, as `cut_mix_box` returns it, or one for each.
        partners: The row that each gets its rectangle from.

    Returns:
        The mixed images.

    Shape:
        - Input: (N, ..., H, W)
        - Partners: (N)
        - Output: (N, ..., H, W)

    Example:
        >>> cut_mix(torch.tensor([[[1, 1, 1]], [[2, 2, 2]]]), (0, 1, 0, 2), torch.tensor([1, 0]))
        tensor([[[2, 2, 1]],
        <BLANKLINE>
                [[1, 1, 2]]])
    """
    if images.ndim < 3:
        msg = f"`images` must have a batch, rows and columns, got a tensor of shape {tuple(images.shape)}."
        raise ArgumentError(msg)
    borders = torch.tensor(boxes)
    if borders.ndim == 1:
        top, bottom, left, right = borders.tolist()
        changed = images.clone()
        changed[..., top:bottom, left:right] = images[..., top:bottom, left:right][partners]
        return changed
    above, below, before, after = borders.to(images.device).view(-1, 4, *[1] * (images.ndim - 1)).unbind(1)
    row, column = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    row = row.unsqueeze(-1)
    inside = (row >= above) & (row < below) & (column >= before) & (column < after)
    return torch.where(inside, images[partners], images)


class CutMix(MixingTrick):
    """Paste into each training image a rectangle of another one, whatever loss the module computes from their targets.

    The rectangle has the image's shape, the area ``1 − λ`` with λ ~ Beta(α, α), and a center anywhere in the image. The loss is
    ``λ l(ŷ, y_i) + (1 − λ) l(ŷ, y_σ(i))`` with a permutation σ of the batch's samples, and λ as the area that is left of the image.

    Reach for it in long training of image classifiers that overfit, and for segmentation, where maps are cut as the images are.

    Args:
        alpha: α, at least 0: 1 in Yun et al., which is a uniform λ; at 0, nothing is mixed.
        per: Whether one rectangle is drawn for the batch, or one for each sample.
        probability: As in `MixUp`: 1 in Yun et al. for ImageNet, 0.5 for CIFAR. Of several callbacks that mix, one at most acts on a
            batch; where their probabilities exceed one together, they are scaled down to that.
        start: When mixing begins: a number of optimizer steps, or a duration such as ``"5 epochs"`` or ``"10%"``.
        stop: When it ends, so that the last part of training sees plain images; None = never.
        item: Index or key in a training batch at which the images sit, as `training_step` gets it; None = the first tensor in it.
        target: The same for their targets, or a list of these. Those of the images' height and width are maps, and are cut.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        TrickError: In training, if there are no such tensors in a batch, if maps have another size than images, if the loss does not
            depend on the targets, or if it does in a way that cannot be mixed.

    Note:
        Targets other than maps are mixed as in `MixUp`, and metrics see those with the larger share.

        What is drawn follows from seed, rank, epoch, step and batch: resuming is exact, and no generator's state is touched.

    References:
        - S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe and Y. Yoo, "CutMix: Regularization Strategy to Train Strong Classifiers with
          Localizable Features", ICCV, 2019. The code of its authors, too, takes λ from the rectangle as it is cut off at the border.

    Example:
        >>> CutMix(probability=0.5, per="sample")
        CutMix(per='sample', probability=0.5)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        per: Per = "batch",
        probability: float = 1.0,
        start: int | str = 0,
        stop: int | str | None = None,
        item: int | str | None = None,
        target: Places = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(alpha, per=per, probability=probability, start=start, stop=stop, item=item, target=target, name=name)

    @override
    def mix(self, images: Tensor, shares: Sequence[float], partners: Tensor, draws: random.Random) -> tuple[Tensor, Sequence[float], Any]:
        if images.ndim < 3:
            msg = f"{self!r} cuts images, and the inputs are a tensor of shape {tuple(images.shape)}. Give those by `item`."
            raise TrickError(msg)
        height, width = images.shape[-2:]
        drawn = [cut_mix_box(height, width, share, (draws.randrange(height), draws.randrange(width))) for share in shares]
        boxes = drawn[0][0] if self.per == "batch" else [box for box, _ in drawn]
        return cut_mix(images, boxes, partners), [share for _, share in drawn], boxes

    @override
    def _mix_map(self, targets: Tensor, images: Tensor, partners: Tensor, how: Any) -> Tensor | None:
        if targets.ndim < 3:
            return None
        if targets.shape[-2:] != images.shape[-2:]:
            msg = (
                f"{self!r} cuts maps as it cuts images, and images are of {tuple(images.shape[-2:])} and targets of "
                f"{tuple(targets.shape[-2:])} pixels. Bring them to one size in the data set."
            )
            raise TrickError(msg)
        return cut_mix(targets, how, partners)
