"""Draw what each transform of `BatchAugmentation` does to eight digits: ``python examples/augmentation.py``.

Writes the picture of the method card, or to the path given by ``--output``. Needs scikit-learn and matplotlib:
``python -m pip install -e ".[examples]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_tricks import transforms
from lightning_tricks.functional import augment

ROWS = {
    "as loaded": [],
    "Crop(4)": [transforms.Crop(4)],
    "Flip(probability=1)": [transforms.Flip(probability=1)],
    "ResizedCrop((0.3, 1))": [transforms.ResizedCrop((0.3, 1))],
    "Rotation(30)": [transforms.Rotation(30)],
    'Rotation(30, border="mirror")': [transforms.Rotation(30, border="mirror")],
    "ColorJitter(brightness=0.5,\ncontrast=0.5)": [transforms.ColorJitter(brightness=0.5, contrast=0.5)],
    "ColorJitter(saturation=0.9,\nhue=0.5)": [transforms.ColorJitter(saturation=0.9, hue=0.5)],
    "Noise(0.1)": [transforms.Noise(0.1)],
    "Cutout(12, fill=0.5)": [transforms.Cutout(12, fill=0.5)],
    "Erasing(probability=1)": [transforms.Erasing(probability=1)],
    "Rotation(20),\nResizedCrop((0.5, 1)), Flip(),\nColorJitter(hue=0.1), Erasing()": [
        transforms.Rotation(20),
        transforms.ResizedCrop((0.5, 1)),
        transforms.Flip(),
        transforms.ColorJitter(hue=0.1),
        transforms.Erasing(),
    ],
}


def coloured_digits(count: int) -> Tensor:
    """Return digits of 32 × 32 pixels, each in its own colour on dark grey."""
    digits = torch.tensor(load_digits().images[:count], dtype=torch.float32)[:, None] / 16
    hues = torch.arange(count) / count
    colours = torch.stack([(2 - 6 * ((hues + third) % 1 - 0.5).abs()).clamp(0, 1) for third in (0.5, 0.17, 0.83)], dim=1)
    return 0.15 + (0.3 + 0.55 * colours)[:, :, None, None] * interpolate(digits, size=(32, 32))


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/images/augmentation.png")
    images = coloured_digits(8)
    figure, axes = plt.subplots(len(ROWS), len(images), figsize=(9, 11.5))
    for row, (name, several) in zip(axes, ROWS.items(), strict=True):
        for axis, image in zip(row, augment(images, several, seed=1).clamp(0, 1), strict=True):
            axis.imshow(image.permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(parser.parse_args().output, dpi=60)


if __name__ == "__main__":
    main()
