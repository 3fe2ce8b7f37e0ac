"""Random transforms of batches of images, for `BatchAugmentation` and `functional.augment`."""

from lightning_tricks.data._geometry import Crop, Flip, ResizedCrop, Rotation
from lightning_tricks.data._photometry import ColorJitter, Cutout, Erasing, Noise
from lightning_tricks.data._transform import Transform

__all__ = ["ColorJitter", "Crop", "Cutout", "Erasing", "Flip", "Noise", "ResizedCrop", "Rotation", "Transform"]
