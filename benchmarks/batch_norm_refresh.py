"""Compares `functional.refresh_batch_norm` with torch's `update_bn`, in what they find and in time: ``python batch_norm_refresh.py``."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_tricks.functional import refresh_batch_norm


def main() -> None:
    """Print both comparisons."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = [torch.randn(64, 1), torch.randn(64, 1), torch.randn(3, 1) + 50]
    values = torch.cat(data).double()
    print(f"population: mean {values.mean():.2f}, variance {values.var():.2f}")
    for measure in (lambda norm: update_bn(data, norm), lambda norm: refresh_batch_norm(norm, data)):
        norm = nn.BatchNorm1d(1)
        measure(norm)
        print(f"measured: mean {norm.running_mean.item():.2f}, variance {norm.running_var.item():.2f}")

    blocks = [(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, 32), (32, 64), (64, 64))]
    net, batches = nn.Sequential(*(layer for block in blocks for layer in block)), [torch.randn(32, 3, 32, 32) for _ in range(8)]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                net(batch)

    ways = {"forward": forward, "update_bn": lambda: update_bn(batches, net), "refresh": lambda: refresh_batch_norm(net, batches)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    forward()
    for _ in range(9):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print({name: f"{median / medians['forward']:.2f}" for name, median in medians.items()})


if __name__ == "__main__":
    main()
