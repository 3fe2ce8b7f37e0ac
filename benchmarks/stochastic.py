"""Time of a training step of ViT-S/16 with a rate of 0.4 in every block, beside timm's DropPath and what could ideally be saved.

The ideal computes a share of ``1 − p`` of the blocks and all of the rest, whose time is measured with no block at all. A round runs
everything once, and ratios are taken to the plain step of the same round. Times are CPU time of the process with one thread.

Run ``python benchmarks/stochastic.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

import lightning_tricks as lt
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from torch import Tensor

RATE = 0.4
HEADER = ("what", "ms", "× plain")


def step(model: nn.Module, images: Tensor) -> float:
    """Return the CPU time of one forward and backward pass, in milliseconds."""
    model.zero_grad()
    begin = time.process_time()
    model(images).square().mean().backward()
    return 1e3 * (time.process_time() - begin)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, rounds, batch = ("vit_tiny_patch16_224", 1, 5) if quick else ("vit_small_patch16_224", 3, 5)
    create = import_module("timm").create_model
    plain = create(name)
    models = {"plain": plain, "timm DropPath": create(name, drop_path_rate=RATE)}
    for block in models["timm DropPath"].blocks:
        block.drop_path1 = block.drop_path2 = type(models["timm DropPath"].blocks[-1].drop_path1)(RATE)
    for mode in ("sample", "batch"):
        models[f'StochasticDepth, "{mode}"'] = copy.deepcopy(plain)
        lt.functional.apply_stochastic_depth(models[f'StochasticDepth, "{mode}"'], RATE, mode=mode, growth="uniform")
    models["no block"] = copy.deepcopy(plain)
    models["no block"].blocks = nn.Identity()
    images = torch.randn(batch, 3, 224, 224)
    times: dict[str, list[float]] = {what: [] for what in models}
    for _ in range(rounds + 1):
        for what, model in models.items():
            times[what].append(step(model, images))
    times = {what: each[1:] for what, each in times.items()}
    times["ideal"] = [RATE * none + (1 - RATE) * full for none, full in zip(times["no block"], times["plain"], strict=True)]
    rows = [
        [what, f"{median(each):.0f}", f"{median(one / full for one, full in zip(each, times['plain'], strict=True)):.2f}"]
        for what, each in times.items()
    ]
    show(f"{name}, batch of {batch}, rate {RATE} in every block", HEADER, rows)
    if not quick:
        command = shlex.join(["python", "benchmarks/stochastic.py"])
        path = Path(__file__).with_name("results") / "stochastic"
        write(path, "Stochastic depth", environment(command, "torch", "timm", device="cpu"), {"times": times}, [markdown(HEADER, rows)])


if __name__ == "__main__":
    main()
