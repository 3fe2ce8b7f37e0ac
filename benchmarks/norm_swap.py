"""Accuracy that a trained network keeps when its BatchNorm is swapped, on scikit-learn's handwritten digits.

A small residual network is trained with BatchNorm. Its layers are then swapped for those of other kinds, without further training: with
scale and shift carried over as they are, with those that running statistics suggest, which is what a swap does by itself, and calibrated
over a few training batches.

Run ``python benchmarks/norm_swap.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import copy
import shlex
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_tricks.functional import swap_norm
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = {
    "frozen": ("frozen", None),
    'group, "8 channels"': ("group", "8 channels"),
    "group, 32 groups": ("group", None),
    "layer": ("layer", None),
    "rms": ("rms", None),
    "instance": ("instance", None),
    "response": ("response", None),
    "none": ("none", None),
}
HEADER = ("target", "carried over", "swapped", "calibrated")


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def make() -> nn.Sequential:
    """Make the network."""
    down = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(stem, Block(32), down, Block(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train with one cycle of AdamW."""
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        if step % (len(x) // 64) == 0:
            rows = torch.randperm(len(x))
        batch = rows[(step * 64) % (len(x) // 64 * 64) :][:64]
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers, in percent."""
    return 100.0 * (model.eval()(x).argmax(1) == y).double().mean().item()


def carried(model: nn.Module, target: str, groups: str | None) -> nn.Module:
    """Swap, and put the scales and shifts back that the layers had."""
    swapped = copy.deepcopy(model)
    swap_norm(swapped, "batch", target, groups=groups)
    old = model.state_dict()
    with torch.no_grad():
        for name, parameter in swapped.named_parameters():
            if name in old:
                parameter.copy_(old[name])
    return swapped


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    digits = import_module("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    kept: dict[str, list[list[float]]] = {"batch, as trained": [], **{what: [] for what in TARGETS}}
    for seed in range(1 if quick else 3):
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        fit, test = order[:1297], order[1297:]
        model = make()
        train(model, x[fit], y[fit], 1 if quick else 15)
        model.eval()
        kept["batch, as trained"].append([accuracy(model, x[test], y[test])] * 3)
        for what, (target, groups) in TARGETS.items():
            calibrated, swapped = copy.deepcopy(model), copy.deepcopy(model)
            swap_norm(swapped, "batch", target, groups=groups)
            swap_norm(calibrated, "batch", target, groups=groups, calibrate=x[fit][:256].split(64))
            kept[what].append([accuracy(each, x[test], y[test]) for each in (carried(model, target, groups), swapped, calibrated)])
    rows = [[target, *(f"{mean(run[i] for run in runs):.1f}" for i in range(3))] for target, runs in kept.items()]
    show("Test accuracy in percent after a swap of BatchNorm, without further training", HEADER, rows)
    if not quick:
        command = shlex.join(["python", "benchmarks/norm_swap.py"])
        path = Path(__file__).with_name("results") / "norm_swap"
        write(path, "Norm swap", environment(command, "torch", "scikit-learn", device="cpu"), {"accuracy": kept}, [markdown(HEADER, rows)])


if __name__ == "__main__":
    main()
