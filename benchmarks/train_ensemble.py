"""Times training an ensemble with all members packed into one step, against training one member after another, on scikit-learn's digits.

Measure with ``python benchmarks/train_ensemble.py``; members, epochs and batches are set by options. Times are those of whole calls of
`train_ensemble`, interleaved.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.functional import TrainedEnsemble, combine_predictions, train_ensemble
from reporting import environment, markdown, show, write

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(LightningModule):
    """Trains a network on images of digits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss, and log it."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=0.003)


def make_mlp() -> Classifier:
    """Make three layers."""
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)))


def make_cnn() -> Classifier:
    """Make two convolutions with BatchNorm."""
    first = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    second = (nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return Classifier(nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))


MODELS = {"MLP": make_mlp, "CNN": make_cnn}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two members of the MLP, for one epoch of 320 images")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "train_ensemble")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, classes = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = (images.float().view(-1, 1, 8, 8) / 16)[order], classes[order]
    count = 320 if args.quick else 1437
    train, test = TensorDataset(images[:count], classes[:count]), (images[1437:], classes[1437:])
    loader = DataLoader(train, batch_size=args.batch, shuffle=True)

    def run(make: Any, members: int, mode: Any) -> tuple[TrainedEnsemble, float, float]:
        trainer = {"max_epochs": 1 if args.quick else args.epochs, "accelerator": args.accelerator, "devices": 1, **QUIET}
        start = time.process_time(), time.perf_counter()
        found = train_ensemble(make, loader, members, trainer=trainer, mode=mode)
        return found, time.process_time() - start[0], time.perf_counter() - start[1]

    header = ("model", "members", "loop, CPU s", "packed × CPU", "packed × wall", "auto took", "one member %", "ensemble %")
    rows, data = [], {}
    cases = [("MLP", 2)] if args.quick else [(name, members) for name in MODELS for members in args.members]
    for name, members in cases:
        times: dict[str, list[tuple[float, float]]] = {"loop": [], "packed": []}
        for round_ in range(args.warmup + args.repeats):
            for mode in random.Random(round_).sample(list(times), 2):  # noqa: S311
                found, *taken = run(MODELS[name], members, mode)
                if round_ >= args.warmup:
                    times[mode].append((taken[0], taken[1]))
        cpu, wall = ({mode: statistics.median(each[i] for each in taken) for mode, taken in times.items()} for i in range(2))
        chosen = run(MODELS[name], members, "auto")[0].mode
        with torch.no_grad():
            each = found.ensemble.member_predictions(test[0])
        single = (each.argmax(-1) == test[1]).float().mean().item()
        joined = (combine_predictions(each).argmax(-1) == test[1]).float().mean().item()
        numbers = f"{cpu['loop']:.2f}", f"{cpu['packed'] / cpu['loop']:.2f}", f"{wall['packed'] / wall['loop']:.2f}"
        rows.append((name, str(members), *numbers, chosen, f"{100 * single:.1f}", f"{100 * joined:.1f}"))
        data[f"{name}, {members}"] = {"cpu": cpu, "wall": wall, "auto": chosen, "single": single, "ensemble": joined}
    title = f"Training {' and '.join(map(str, args.members))} members on digits, packed against one after another"
    show(title, header, rows)
    device = "cpu" if args.accelerator == "cpu" else "cuda"
    circumstances = environment("python benchmarks/train_ensemble.py", "torch", "lightning", "lightning-tricks", device=device)
    rounds = f"Medians of {args.repeats} interleaved rounds of {args.epochs} epochs, batches of {args.batch}, one thread"
    note = f"{rounds}; whole calls; accuracy on 360 held-out images."
    write(args.output, title, circumstances, {"seconds": data}, [markdown(header, rows), note])


if __name__ == "__main__":
    main()
