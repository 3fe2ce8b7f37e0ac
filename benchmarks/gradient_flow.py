"""What GradientFlow costs: fits with it and without it, in turns, and the price of one record.

A fit takes `--steps` steps; at the default, GradientFlow records the first of them and every 100th. Rounds alternate in random order, so
that whatever else the machine does hits all alike. Times are CPU time of the process with one thread, and on CUDA the time until the
device is done. The first step of each fit, which every fit needs to get started, is left out; so its record is, and all others count.

Run ``python benchmarks/gradient_flow.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import random
import shlex
import time
import warnings
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_tricks as lt
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

GOAL = 0.01
EVERY = 100
HEADER = ("model", "step, ms", "with GradientFlow, ms", "overhead", "one record, ms", "share of a step")


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        plain = before == after and stride == 1
        self.down = nn.Identity() if plain else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.down(x))


def resnet18() -> nn.Module:
    """Return ResNet-18 for images of 32 by 32 pixels."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(widths[i], widths[i + 1], 2 if widths[i] != widths[i + 1] else 1) for i in range(8)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mlp() -> nn.Module:
    """Return three hidden layers of 256."""
    hidden = [layer for _ in range(2) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), *hidden, nn.Linear(256, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"mlp": (mlp, 128), "resnet18": (resnet18, 32)}


class Classifier(pl.LightningModule):
    """Trains a network by SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Timer(Callback):
    """Takes the time from the end of the first batch to the end of training."""

    def now(self, module: pl.LightningModule) -> float:
        """Return seconds: those of the processor, or until a CUDA device is done."""
        if module.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Begin."""
        if batch_idx == 0:
            self.begin = self.now(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End."""
        self.seconds = self.now(pl_module) - self.begin


def fit(name: str, callbacks: list[Callback], steps: int, device: str) -> float:
    """Return the milliseconds of a step."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    data = [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))] * (steps + 1)
    timer = Timer()
    trainer = pl.Trainer(
        callbacks=[*callbacks, timer],
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(make()), torch.utils.data.DataLoader(data, batch_size=None))
    return 1e3 * timer.seconds / steps


def measure(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return milliseconds of a step for all rounds that count: without it, at its default, and with a record at every step."""
    kinds: dict[str, Callable[[], list[Callback]]] = {
        "plain": list,
        "default": lambda: [lt.GradientFlow(heat_map=False)],
        "every step": lambda: [lt.GradientFlow(every=1, heat_map=False)],
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    order, shuffler = list(kinds), random.Random(0)  # noqa: S311, no secret
    for _ in range(args.warmup + args.repeats):
        shuffler.shuffle(order)
        for kind in order:
            steps = max(1, args.steps // 5) if kind == "every step" else args.steps
            times[kind].append(fit(name, kinds[kind](), steps, args.device))
    return {kind: each[args.warmup :] for kind, each in times.items()}


def row(name: str, times: dict[str, list[float]]) -> tuple[str, ...]:
    """Return what the table shows: medians over rounds, and the record's price spread over its interval."""
    plain, default, each = (median(times[kind]) for kind in ("plain", "default", "every step"))
    ratio = median(one / other for one, other in zip(times["default"], times["plain"], strict=True)) - 1
    record = each - plain
    return (name, f"{plain:.2f}", f"{default:.2f}", f"{ratio:.2%}", f"{record:.2f}", f"{record / EVERY / plain:.2%}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 9")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them; default: 1")
    parser.add_argument("--steps", type=int, help=f"steps of a fit, best a multiple of {EVERY}; default: 100")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="few rounds of the small model, unless told otherwise")
    args = parser.parse_args()
    args.models = ["mlp"] if args.quick else args.models
    args.repeats = args.repeats or (2 if args.quick else 9)
    args.steps = args.steps or (10 if args.quick else 100)
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options = [f"--{key}={getattr(args, key)}" for key in ("repeats", "warmup", "steps", "device")]
    command = shlex.join(["python", "benchmarks/gradient_flow.py", "--models", *args.models, *options])
    circumstances = environment(command, "torch", "lightning", device=args.device)
    data = {name: measure(name, args) for name in args.models}
    rows = [row(name, times) for name, times in data.items()]
    title = f"GradientFlow(every={EVERY}), its default, against none"
    show(title, HEADER, rows)
    verdicts = []
    for name, *_, share in rows:
        within = "within" if float(share[:-1]) <= 100 * GOAL else "NOT within"
        verdicts.append(f"{name}: one record in {EVERY} steps takes {share} of a step: {within} {GOAL:.0%}")
    print("\n".join(verdicts))
    if args.output is not None:
        write(args.output, title, circumstances, {"times": data}, [markdown(HEADER, rows), *verdicts])


if __name__ == "__main__":
    main()
