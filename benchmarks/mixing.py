"""What MixUp, CutMix and LabelSmoothing cost per step, and what they are worth with little data.

Steps are those of a small residual network under a Trainer. A round times them once with each trick, and ratios are taken to the plain
steps of the same round: CPU time of the process with one thread. The worth is measured on scikit-learn's handwritten digits: accuracy,
negative log-likelihood and calibration on the other digits after training on few of them, over several seeds.

Run ``python benchmarks/mixing.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import calibration_error

import lightning_tricks as lt
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable

TIMED: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "plain, measured again": list,
    "MixUp": lambda: [lt.MixUp(0.2)],
    'MixUp, `per="sample"`': lambda: [lt.MixUp(0.2, per="sample")],
    "CutMix": lambda: [lt.CutMix()],
    'CutMix, `per="sample"`': lambda: [lt.CutMix(per="sample")],
    "LabelSmoothing": lambda: [lt.LabelSmoothing()],
    "MixUp, CutMix and LabelSmoothing": lambda: [lt.MixUp(0.2), lt.CutMix(), lt.LabelSmoothing()],
}
TRAINED: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "MixUp, α = 0.2": lambda: [lt.MixUp(0.2)],
    "MixUp, α = 1": lambda: [lt.MixUp(1.0)],
    "CutMix, α = 1, half of the batches": lambda: [lt.CutMix(probability=0.5)],
    "LabelSmoothing, ε = 0.1": lambda: [lt.LabelSmoothing()],
}


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Classifier(L.LightningModule):
    """A residual network in miniature, as users would write it."""

    def __init__(self, inputs: int, channels: int, blocks: int, epochs: int) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
        self.net = nn.Sequential(stem, *(Block(channels) for _ in range(blocks)), head)
        self.epochs = epochs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the cross-entropy."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        """Anneal AdamW."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def fit(module: Classifier, x: Tensor, y: Tensor, callbacks: list[Any], batch_size: int) -> None:
    """Train."""
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)
    L.Trainer(accelerator="cpu", max_epochs=module.epochs, callbacks=callbacks, **options).fit(module, loader)


def seconds(callbacks: list[Any], steps: int, size: int) -> float:
    """Return the CPU time of a fit."""
    torch.manual_seed(0)
    module = Classifier(3, 32, 4, 1)
    x, y = torch.randn(32 * steps, 3, size, size), torch.randint(10, (32 * steps,))
    begin = time.process_time()
    fit(module, x, y, callbacks, 32)
    return time.process_time() - begin


def worth(callbacks: list[Any], seed: int, *, samples: int, epochs: int) -> list[float]:
    """Return accuracy, negative log-likelihood and expected calibration error on what was not trained on."""
    digits = import_module("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    module = Classifier(1, 24, 2, epochs)
    fit(module, x[order[:samples]], y[order[:samples]], callbacks, 32)
    x, y = x[order[samples:]], y[order[samples:]]
    with torch.no_grad():
        scores = module.eval().net(x)
    error = calibration_error(scores.softmax(1), y, task="multiclass", num_classes=10, n_bins=15)
    return [100 * (scores.argmax(1) == y).double().mean().item(), F.cross_entropy(scores, y).item(), 100 * error.item()]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 7")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them; default: 1")
    parser.add_argument("--seeds", type=int, help="runs on digits; default: 5")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="a few steps, unless told otherwise")
    args = parser.parse_args()
    rounds, steps, size = (1, 2, 8) if args.quick else (7, 8, 24)
    rounds, seeds = args.repeats or rounds, args.seeds or (1 if args.quick else 5)
    samples, epochs = (64, 1) if args.quick else (200, 30)
    output = args.output or (None if args.quick else Path(__file__).with_name("results") / "mixing")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    times: dict[str, list[float]] = {what: [] for what in TIMED}
    for number in range(args.warmup + rounds):
        for what, make in TIMED.items():
            taken = 1e3 * seconds(make(), steps, size) / steps
            if number >= args.warmup:
                times[what].append(taken)
    header = ("what", "ms a step", "× plain")
    rows = [
        [what, f"{median(each):.1f}", f"{median(one / other for one, other in zip(each, times['plain'], strict=True)):.3f}"]
        for what, each in times.items()
    ]
    show("Steps", header, rows)

    found = {what: [worth(make(), seed, samples=samples, epochs=epochs) for seed in range(seeds)] for what, make in TRAINED.items()}
    names = ("what", "accuracy, %", "± between seeds", "negative log-likelihood", "calibration error, %")
    values = []
    for what, runs in found.items():
        accuracy, likelihood, calibration = zip(*runs, strict=True)
        spread = stdev(accuracy) if seeds > 1 else 0.0
        values.append([what, f"{mean(accuracy):.2f}", f"{spread:.2f}", f"{mean(likelihood):.3f}", f"{mean(calibration):.2f}"])
    show(f"Digits, {samples} to train on", names, values)
    if output is not None:
        command = shlex.join(["python", "benchmarks/mixing.py", *sys.argv[1:]])
        body = [
            f"Medians of {rounds} rounds of {steps} steps, batches of 32 images of {size}×{size}.",
            markdown(header, rows),
            f"Digits, {samples} to train on for {epochs} epochs, means over {seeds} seeds.",
            markdown(names, values),
        ]
        circumstances = environment(command, "torch", "lightning", "scikit-learn", device="cpu")
        write(output, "Mixing and smoothing", circumstances, {"times": times, "digits": found}, body)


if __name__ == "__main__":
    main()
