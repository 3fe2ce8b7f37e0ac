"""Time of one forward and backward pass of each normalization layer, beside the nearest that torch or timm offers.

A round runs every layer once, in an order shuffled with a fixed seed, and ratios are taken to the nearest layer in the same round, so that
whatever else the machine does hits all alike. Times are CPU time of the process with one thread. ``--network`` measures a training step of
a ResNet-18 with ghost batches in place of all batches instead.

Run ``python benchmarks/normalization.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import copy
import random
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn

from lightning_tricks.nn import (
    FilterResponseNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    LayerNorm2d,
    LpBatchNorm2d,
    RMSNorm2d,
    ScaledWSConv2d,
)
from reporting import environment, markdown, show, write

HEADER = ("layer", "input", "memory", "ms", "× nearest", "quartiles", "nearest")
Make = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Row:
    """What one layer costs.

    Attributes:
        layer: Its constructor call.
        shape: Of the input.
        memory: ``"contiguous"`` or ``"channels last"``.
        ms: Median time of a forward and backward pass, in milliseconds.
        quartiles: Of the ratio to the nearest layer in the same round; the middle one is the median.
        nearest: What that is.
    """

    layer: str
    shape: tuple[int, ...]
    memory: str
    ms: float
    quartiles: tuple[float, float, float]
    nearest: str

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        low, middle, high = (f"{quartile:.2f}" for quartile in self.quartiles)
        return (self.layer, "×".join(map(str, self.shape)), self.memory, f"{self.ms:.2f}", middle, f"{low}–{high}", self.nearest)


def norm_relu(channels: int) -> nn.Module:
    """What a filter response normalization stands in for."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def timm_layer_norm(channels: int) -> nn.Module:
    """Timm's layer norm over channels."""
    layer: nn.Module = import_module("timm.layers").LayerNorm2d(channels)
    return layer


def timm_rms_norm(channels: int) -> nn.Module:
    """Timm's root-mean-square norm over channels."""
    layer: nn.Module = import_module("timm.layers").RmsNorm2d(channels)
    return layer


def conv(channels: int) -> nn.Module:
    """A plain convolution."""
    return nn.Conv2d(channels, channels, 3, padding=1)


IMAGES = ((64, 64, 32, 32), (64, 256, 8, 8))
# What is compared with what, on which shapes: the nearest layer, how it is called, and ours.
GROUPS: list[tuple[tuple[tuple[int, ...], ...], str, Make, dict[str, Make]]] = [
    (
        (*IMAGES, (60, 64, 32, 32), (32, 64, 56, 56)),
        "BatchNorm2d",
        nn.BatchNorm2d,
        {
            "BatchNorm2d, measured again": nn.BatchNorm2d,
            "GhostBatchNorm2d(C, 16)": partial(GhostBatchNorm2d, ghost_size=16),
            "GhostBatchNorm2d(C, 8)": partial(GhostBatchNorm2d, ghost_size=8),
            "LpBatchNorm2d(C)": LpBatchNorm2d,
        },
    ),
    (((64, 128, 100), (256, 512)), "BatchNorm1d", nn.BatchNorm1d, {"GhostBatchNorm1d(C, 16)": partial(GhostBatchNorm1d, ghost_size=16)}),
    (((16, 32, 8, 16, 16),), "BatchNorm3d", nn.BatchNorm3d, {"GhostBatchNorm3d(C, 4)": partial(GhostBatchNorm3d, ghost_size=4)}),
    (IMAGES, "timm LayerNorm2d", timm_layer_norm, {"LayerNorm2d(C)": LayerNorm2d}),
    (IMAGES, "timm RmsNorm2d", timm_rms_norm, {"RMSNorm2d(C)": RMSNorm2d}),
    (IMAGES, "BatchNorm2d, ReLU", norm_relu, {"FilterResponseNorm(C)": FilterResponseNorm}),
    (((16, 64, 16, 16),), "Conv2d", conv, {"ScaledWSConv2d(C, C, 3)": lambda channels: ScaledWSConv2d(channels, channels, 3, padding=1)}),
]


def milliseconds(model: nn.Module, x: torch.Tensor, cotangent: torch.Tensor | None) -> float:
    """Return the CPU time of a forward and backward pass."""
    x.grad = None
    model.zero_grad()
    before = time.process_time()
    y = model(x)
    y.backward(torch.ones_like(y) if cotangent is None else cotangent)
    return (time.process_time() - before) * 1e3


def compare(
    models: dict[str, nn.Module], shape: tuple[int, ...], memory: str, args: argparse.Namespace, *, images: bool = False
) -> list[Row]:
    """Measure models against the first of them."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    if memory == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    cotangent = None if images else torch.randn_like(x)
    x.requires_grad_(not images)
    times: dict[str, list[float]] = {name: [] for name in models}
    order, shuffler = list(models), random.Random(0)  # noqa: S311, no secret
    for turn in range(args.warmup + args.repeats):
        shuffler.shuffle(order)
        for name in order:
            took = milliseconds(models[name], x, cotangent)
            if turn >= args.warmup:
                times[name].append(took)
    nearest, *others = models
    rows = []
    for name in others:
        low, middle, high = quantiles((own / base for own, base in zip(times[name], times[nearest], strict=True)), n=4)
        rows.append(Row(name, shape, memory, median(times[name]), (low, middle, high), nearest))
    return rows


def layers(args: argparse.Namespace) -> list[Row]:
    """Measure layers by themselves."""
    rows = []
    for shapes, nearest, make, ours in GROUPS:
        for shape in shapes[: 1 if args.quick else None]:
            small = (8, 8, *shape[2:]) if args.quick else shape
            for memory in ("contiguous", "channels last")[: 2 if len(shape) == 4 else 1]:
                models = {nearest: make(small[1]), **{name: each(small[1]) for name, each in ours.items()}}
                rows += compare(models, small, memory, args)
    return rows


def network(args: argparse.Namespace) -> list[Row]:
    """Measure forward and backward passes of a ResNet-18 of timm."""
    plain = import_module("timm").create_model("resnet18", num_classes=10)
    ghost = copy.deepcopy(plain)
    for parent in list(ghost.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, GhostBatchNorm2d(child.num_features, 16))
    models = {"ResNet-18": plain, "ResNet-18 of GhostBatchNorm2d(C, 16)": ghost}
    shape = (20, 3, 32, 32) if args.quick else (64, 3, 64, 64)
    rows = []
    for memory in ("contiguous", "channels last"):
        for model in models.values():
            model.to(memory_format=torch.channels_last if memory == "channels last" else torch.contiguous_format)
        rows += compare(models, shape, memory, args, images=True)
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 40, or 15 of a network")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them; default: 3")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--network", action="store_true", help="measure a whole network instead")
    parser.add_argument("--quick", action="store_true", help="few rounds on small inputs, unless told otherwise")
    args = parser.parse_args()
    args.repeats = args.repeats or (5 if args.quick else 15 if args.network else 40)
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(1)
    options = [f"--repeats={args.repeats}", f"--warmup={args.warmup}"] + ["--network"] * args.network
    command = shlex.join(["python", "benchmarks/normalization.py", *options])
    circumstances = environment(command, "torch", "timm", "lightning-tricks", device="cpu")
    rows = network(args) if args.network else layers(args)
    show("Forward and backward pass", HEADER, [row.cells() for row in rows])
    if args.output is not None:
        table = markdown(HEADER, [row.cells() for row in rows])
        write(args.output, "Cost of normalization layers", circumstances, {"rows": [asdict(row) for row in rows]}, [table])


if __name__ == "__main__":
    main()
