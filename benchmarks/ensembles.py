"""Times predictions of an ensemble that maps over its members, and of one that chooses, against a loop over them.

Measure with ``python benchmarks/ensembles.py``; models, members and batches are set by options. CPU time, interleaved.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from lightning_tricks.nn import Ensemble
from reporting import environment, markdown, show, write


class DigitsCNN(nn.Sequential):
    """A small network for images of 8×8 pixels."""

    def __init__(self) -> None:
        first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        second = (nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        super().__init__(*first, *second, nn.Flatten(), nn.Linear(32, 10))


class Basic(nn.Module):
    """ResNet's basic block."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.short = nn.Identity() if stride == 1 and width == out else short

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch to the input, or to its projection."""
        return torch.relu(self.body(x) + self.short(x))


class ResNet18(nn.Sequential):
    """ResNet-18 as it is used for images of 32×32 pixels."""

    def __init__(self) -> None:
        blocks, width = [], 64
        for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Basic(width, out, stride), Basic(out, out, 1)]
            width = out
        stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class MLP(nn.Sequential):
    """Three layers for rows of a table."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


MODELS = {"MLP": (MLP, (64,)), "digits CNN": (DigitsCNN, (1, 8, 8)), "ResNet-18 at 32×32": (ResNet18, (3, 32, 32))}


def measure(make: type[nn.Module], x: torch.Tensor, count: int, repeats: int, warmup: int) -> tuple[dict[str, float], str]:
    """Return the median time of each way in milliseconds, and which way was chosen."""
    torch.manual_seed(0)
    members = [make().eval() for _ in range(count)]
    ways = {mode: Ensemble(copy.deepcopy(members), mode=mode).eval() for mode in ("loop", "vmap", "auto")}
    times: dict[str, list[float]] = {mode: [] for mode in ways}
    with torch.inference_mode():
        expected = torch.stack([member(x) for member in members])
        for ensemble in ways.values():
            torch.testing.assert_close(ensemble.member_predictions(x), expected, rtol=1e-3, atol=1e-4)
        for round_ in range(warmup + repeats):
            for mode in random.Random(round_).sample(list(ways), len(ways)):  # noqa: S311
                start = time.process_time()
                ways[mode](x)
                if round_ >= warmup:
                    times[mode].append(1e3 * (time.process_time() - start))
    return {mode: statistics.median(taken) for mode, taken in times.items()}, str(ways["auto"]._faster)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="leave the largest model out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ensembles")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header, rows, data = ("model", "loop, ms", "vmap ×", "auto ×", "chosen"), [], {}
    for name, (make, shape) in MODELS.items():
        if args.quick and "ResNet" in name:
            continue
        medians, chosen = measure(make, torch.randn(args.batch, *shape), args.members, args.repeats, args.warmup)
        loop = medians["loop"]
        rows.append((name, f"{loop:.2f}", f"{medians['vmap'] / loop:.2f}", f"{medians['auto'] / loop:.2f}", chosen))
        data[name] = {**medians, "chosen": chosen}
    title = f"Evaluation of {args.members} members, batches of {args.batch}, against a loop"
    show(title, header, rows)
    circumstances = environment("python benchmarks/ensembles.py", "torch", "lightning-tricks", device="cpu")
    body = [markdown(header, rows), "Medians of CPU time, interleaved, one thread."]
    write(args.output, title, circumstances, {"milliseconds": data}, body)


if __name__ == "__main__":
    main()
