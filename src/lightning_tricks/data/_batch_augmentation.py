"""Batch augmentation: change training images at random, a whole batch at a time and on the device.

What a network learns should not depend on where in the image a thing is, which way it faces and how bright it is; images changed so are
further examples of the same thing. Changed one by one, by workers of the loader, they are often what training waits for.

Source: A. Krizhevsky, I. Sutskever and G. E. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS, 2012.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_tricks._core.checks import check_item
from lightning_tricks._core.lightning import STEP_OUTPUT, LightningModule, Trainer, callbacks_of, logs_now, override
from lightning_tricks._core.loaders import place_in_pass
from lightning_tricks.data._augmenting import Augmentation, are_images, check_transforms, transformed
from lightning_tricks.data._batches import BatchTrick, describe, find, replaced
from lightning_tricks.data._photometry import ColorJitter
from lightning_tricks.data._transform import Transform
from lightning_tricks.errors import ArgumentError, TrickConflictError

__all__ = ["BatchAugmentation"]


class BatchAugmentation(BatchTrick):
    """Change the images of each training batch at random, each by itself, once they are on the device.

    Reach for it in place of random transforms in the data set: the loader then only reads and decodes images.

    Args:
        transforms: One of `lightning_tricks.transforms`, or any callable that takes and returns batches of images, such as torchvision's
            and kornia's; or several, which act in their order.
        item: Index or key in a batch at which the images sit; None = the first tensor in it.
        name: Tells it apart in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain; in training, if there are no images of shape ``(N, C, H, W)`` in the
            batch, or their values are not in [0, 1] where colours change.
        TrickConflictError: At setup, if another one changes the same images.
        TrickError: In training, if `training_step` takes ``dataloader_iter``.

    Note:
        Evaluations, the sanity check included, see plain images. Passes over the training data that measure statistics see what training
        sees. Only images change: a mask or a box that belongs to an image does not move with it, so for such targets use transforms that
        leave pixels in their places.

        Draws follow from the seed given to Lightning's ``seed_everything``, the rank, the epoch, the step and the batch: a resumed run
        draws what it would have drawn, ranks with different data draw independently, and no generator's state changes. That holds for
        callables that draw from torch's generators, too.

        Images keep their precision and memory layout. Bytes stay bytes, as numbers in [0, 1] between transforms, until a callable
        returns numbers for them.

    References:
        - A. Krizhevsky, I. Sutskever and G. E. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS, 2012.

    Example:
        >>> from lightning_tricks import transforms
        >>> BatchAugmentation([transforms.Crop(4), transforms.Flip()])
        BatchAugmentation(transforms=(Crop(padding=4), Flip()))
    """

    turn: ClassVar[int] = 0

    def __init__(
        self,
        transforms: Sequence[Augmentation] | Augmentation,
        *,
        item: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.transforms = check_transforms(transforms)
        self.item = check_item(item)
        self._share: Tensor | None = None  # of images that the latest batch has seen changed
        self._looked = False

    @property
    @override
    def is_neutral(self) -> bool:
        return all(isinstance(each, Transform) and each.is_neutral for each in self.transforms)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._looked = False
        for other in callbacks_of(trainer):
            if isinstance(other, BatchAugmentation) and other is not self and (other.item == self.item or None in {other.item, self.item}):
                msg = f"{other!r} and {self!r} both change the images of a batch. Keep one with the transforms of both."
                raise TrickConflictError(msg)

    @override
    def change(self, trainer: Trainer, batch: Any, key: int) -> Any:
        images = find(batch, self.item)
        if not are_images(images):
            shape = f", of shape {tuple(images.shape)}" if isinstance(images, Tensor) else ""
            msg = (
                f"{self!r} changes batches of images, (N, C, H, W), of floating-point numbers or of uint8, and "
                f"{describe(batch, self.item)}{shape}. Give their index or key by `item`."
            )
            raise ArgumentError(msg)
        if not self._looked:
            self._look(images)
        changed = transformed(images, self.transforms, torch.tensor(key))
        if logs_now(trainer) and not place_in_pass():
            same = changed.shape == images.shape
            self._share = (changed != images).flatten(1).any(dim=1).float().mean() if same else torch.ones(())
        return replaced(batch, self.item, changed)

    def _look(self, images: Tensor) -> None:
        """Check, at the first batch only, that colours are numbers in [0, 1]."""
        self._looked = True
        if images.dtype == torch.uint8 or not any(isinstance(each, ColorJitter) and not each.is_neutral for each in self.transforms):
            return
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1 + 1e-3):
            msg = (
                f"{self!r} changes colours of bytes, or of numbers in [0, 1], and got numbers from {low:.3g} to {high:.3g}. Standardize "
                "images afterwards, in the model or by InputStandardization, rather than in the loader."
            )
            raise ArgumentError(msg)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        if self._share is not None:
            pl_module.log(f"{self.log_prefix}/changed", self._share)
            self._share = None
