"""Time of layers with FeatureNoise, DropBlock and FractionalMaxPool, beside the plain layer and what torch and torchvision offer.

Each row is a forward and a backward pass of one layer on a feature map of a ResNet. A round runs everything once, and ratios are taken to
the plain layer of the same round. Times are CPU time of the process with one thread.

Run ``python benchmarks/noise.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from lightning_tricks import functional
from reporting import environment, markdown, show, write

HEADER = ("what", "ms", "× plain")


def run(layer: nn.Module, x: Tensor) -> float:
    """Return the CPU time of one forward and backward pass, in milliseconds."""
    x = x.detach().requires_grad_()
    begin = time.process_time()
    layer(x).sum().backward()
    return 1e3 * (time.process_time() - begin)


def changed(layer: nn.Module, name: str, *arguments: float, **options: float | str | bool) -> nn.Module:
    """Return a copy of a layer on which a trick acts."""
    model = nn.Sequential(copy.deepcopy(layer))
    getattr(functional, f"apply_{name}")(model, *arguments, where="0", **options)
    return model


def candidates() -> dict[str, dict[str, nn.Module]]:
    """Return what is compared, by table; the first of each is the plain layer."""
    convolution = nn.Conv2d(64, 64, 3, padding=1)
    noise = {
        "convolution 3×3": convolution,
        "nn.Dropout behind it": nn.Sequential(convolution, nn.Dropout(0.1)),
        "FeatureNoise, additive": changed(convolution, "feature_noise", 0.1),
        "FeatureNoise, multiplicative": changed(convolution, "feature_noise", 0.1, kind="multiplicative"),
        "FeatureNoise, relative": changed(convolution, "feature_noise", 0.1, relative=True),
    }
    blocks = {
        "convolution 3×3": convolution,
        'DropBlock, per="channel"': changed(convolution, "drop_block", 0.1),
        'DropBlock, per="sample"': changed(convolution, "drop_block", 0.1, per="sample"),
    }
    if find_spec("torchvision"):
        blocks["torchvision's DropBlock2d"] = nn.Sequential(convolution, import_module("torchvision.ops").DropBlock2d(0.1, 7))
    pool = nn.MaxPool2d(2)
    pools = {
        "nn.MaxPool2d(2)": pool,
        "nn.MaxPool2d(3, 2, 1)": nn.MaxPool2d(3, 2, 1),
        "torch's FractionalMaxPool2d": nn.FractionalMaxPool2d(2, output_ratio=0.5),
        "FractionalMaxPool": changed(pool, "fractional_max_pool"),
        "FractionalMaxPool, not overlapping, ratio 1.9": changed(pool, "fractional_max_pool", 1.9, overlapping=False),
    }
    return {"Feature noise": noise, "DropBlock, blocks of 7×7, rate 0.1": blocks, "Fractional max pooling to about half the size": pools}


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 15")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them; default: 1")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="one round of small maps, unless told otherwise")
    args = parser.parse_args()
    rounds, shape = (1, (2, 64, 14, 14)) if args.quick else (15, (8, 64, 56, 56))
    rounds = args.repeats or rounds
    output = args.output or (None if args.quick else Path(__file__).with_name("results") / "noise")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(shape)
    times: dict[str, dict[str, list[float]]] = {}
    body = [f"Feature maps of {'×'.join(map(str, shape))}, medians of {rounds} rounds."]
    for title, layers in candidates().items():
        found = times[title] = {what: [] for what in layers}
        for number in range(args.warmup + rounds):
            for what, layer in layers.items():
                milliseconds = run(layer, x)
                if number >= args.warmup:
                    found[what].append(milliseconds)
        plain = next(iter(found.values()))
        rows = [
            [what, f"{median(each):.1f}", f"{median(one / other for one, other in zip(each, plain, strict=True)):.2f}"]
            for what, each in found.items()
        ]
        show(title, HEADER, rows)
        body += [f"## {title}", markdown(HEADER, rows)]
    if output is not None:
        command = shlex.join(["python", "benchmarks/noise.py", *sys.argv[1:]])
        write(output, "Noise, blocks and regions", environment(command, "torch", "torchvision", device="cpu"), {"times": times}, body)


if __name__ == "__main__":
    main()
