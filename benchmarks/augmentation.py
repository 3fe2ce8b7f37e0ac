"""Time of random transforms of a batch of images, by `augment` and by torchvision's transforms v2.

torchvision's are called for each image, as they are in a data set, whose images are stacked afterwards; and once for the batch, in which
case all its images get the same draws. A round runs everything once, and ratios are taken within a round. Times are CPU time of the
process with one thread; loader and Trainer are left out.

Run ``python benchmarks/augmentation.py``; ``--quick`` shows that it works. Needs torchvision.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.transforms import v2

from lightning_tricks import transforms
from lightning_tricks.functional import augment
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HEADER = ("what", "augment, ms", "v2 image by image, ms", "v2 on the batch, ms", "image by image ÷ augment", "on the batch ÷ augment")


def recipes(side: int) -> dict[str, tuple[list[transforms.Transform], list[Callable[[Tensor], Tensor]]]]:
    """Return transforms of ours and of torchvision that do the same, by what they do."""
    pad = side // 8
    crop = [transforms.Crop(pad), transforms.Flip()], [v2.RandomCrop(side, padding=pad), v2.RandomHorizontalFlip()]
    colours = (
        [transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)],
        [v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)],
    )
    resized = [transforms.ResizedCrop(), transforms.Flip()], [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()]
    turned = (
        [transforms.Rotation(15), transforms.ResizedCrop(), transforms.Flip()],
        [v2.RandomRotation(15, v2.InterpolationMode.BILINEAR), *resized[1]],
    )
    erased = [transforms.Erasing()], [v2.RandomErasing()]
    return {
        "crop, flip": crop,
        "crop, flip, erasing": (crop[0] + erased[0], crop[1] + erased[1]),
        "crop, flip, colours": (crop[0] + colours[0], crop[1] + colours[1]),
        "crop, flip, hue": (crop[0] + [transforms.ColorJitter(hue=0.1)], crop[1] + [v2.ColorJitter(hue=0.1)]),
        "resized crop, flip": resized,
        "rotation, resized crop, flip": turned,
        "crop, flip, noise": (crop[0] + [transforms.Noise(0.1)], crop[1] + [v2.GaussianNoise(sigma=0.1, clip=False)]),
    }


def clocked(function: Callable[[], Tensor]) -> float:
    """Return the CPU time of one call in milliseconds."""
    begin = time.process_time()
    function()
    return 1e3 * (time.process_time() - begin)


def measure(images: Tensor, ours: Sequence[transforms.Transform], theirs: Sequence[object], rounds: int, warmup: int) -> list[list[float]]:
    """Return the times of each round: augment, torchvision image by image, torchvision on the batch."""
    composed = v2.Compose(theirs)
    runs = (
        lambda seed: augment(images, ours, seed=seed),
        lambda _: torch.stack([composed(image) for image in images]),
        lambda _: composed(images),
    )
    return [[clocked(lambda run=run, seed=seed: run(seed)) for run in runs] for seed in range(warmup + rounds)][warmup:]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 15")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them; default: 2")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="one round of few images, unless told otherwise")
    args = parser.parse_args()
    rounds = args.repeats or (1 if args.quick else 15)
    output = args.output or (None if args.quick else Path(__file__).with_name("results") / "augmentation")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = [(4, 3, 32, 32)] if args.quick else [(256, 3, 32, 32), (32, 3, 224, 224)]
    body, times = [f"Medians of {rounds} rounds."], {}
    for shape in shapes:
        for dtype in (torch.uint8, torch.float32):
            title = f"{'×'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
            images = torch.randint(256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape)
            times[title] = {}
            rows = []
            for what, (ours, theirs) in recipes(shape[-1]).items():
                if what.endswith("noise") and dtype == torch.uint8:
                    continue  # torchvision's takes floating-point numbers only
                found = times[title][what] = measure(images, ours, theirs, rounds, args.warmup)
                each = [f"{median(column):.1f}" for column in zip(*found, strict=True)]
                ratios = [f"{median(row[i] / row[0] for row in found):.2f}" for i in (1, 2)]
                rows.append([what, *each, *ratios])
            show(title, HEADER, rows)
            body += [f"## {title}", markdown(HEADER, rows)]
    if output is not None:
        command = shlex.join(["python", "benchmarks/augmentation.py", *sys.argv[1:]])
        circumstances = environment(command, "torch", "torchvision", device="cpu")
        write(output, "Augmentation of batches", circumstances, {"times": times}, body)


if __name__ == "__main__":
    main()
