"""Transfer what a small network has learned on some handwritten digits to others: with little and much data, similar and different.

    python examples/transfer.py                     # 5 seeds: a table, a CSV and a picture in runs/transfer
    python examples/transfer.py --seeds 1 --steps 10   # a quick look

A convolutional network is trained on the digits 0 to 6. It is then fine-tuned on the digits 7, 8 and 9, from 3 or from 80 images of each,
as they are ("similar") or turned by 90 degrees, inverted and noisy ("different"), by several strategies of `FineTuning`, one of which
`functional.transfer_plan` proposes. All are tested on the same images of the same kind, which none has seen. The images come with
scikit-learn: nothing is downloaded.
"""

import argparse
import csv
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import lightning_tricks as lt
from lightning_tricks import functional

Batch = Sequence[Tensor]  # images and labels
AMOUNTS = {"little": 3, "much": 80}  # images of each digit
KINDS = ("similar", "different")
SCRATCH, PLAN, PROBE = "from scratch", "transfer_plan", "linear, best stage"
STRATEGIES: Mapping[str, lt.FineTuning | None] = {
    SCRATCH: None,
    "head alone": lt.FineTuning({"0%": 0}, num_classes=3),
    "last 30 % of layers": lt.FineTuning({"0%": 0, "10%": "30%"}, layer_decay=0.8, num_classes=3),
    "later half of layers": lt.FineTuning({"0%": 0, "30%": "50%"}, layer_decay=0.8, num_classes=3),
    "all layers, gradually": lt.FineTuning({"0%": 0, "10%": "100%"}, layer_decay=0.8, num_classes=3),
    "all layers at once": lt.FineTuning({"0%": "*"}, num_classes=3),
}


class Block(nn.Module):
    """Convolution, normalization, ReLU.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        pool: By how much the maps shrink.
    """

    def __init__(self, inputs: int, outputs: int, pool: int = 1) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.MaxPool2d(pool)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.norm(self.conv(x))))


class Network(LightningModule):
    """Five blocks and a linear head, trained by SGD with a cosine schedule. It knows nothing of transfer.

    Args:
        lr: Learning rate.
    """

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.blocks = nn.Sequential(Block(1, 16), Block(16, 32, 2), Block(32, 32), Block(32, 64, 2), Block(64, 64))
        self.head = nn.Linear(64, 7)

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).mean((2, 3)))

    @override
    def training_step(self, batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    @override
    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def accuracy(self, data: TensorDataset) -> float:
        """Return the share of images that are told right."""
        images, labels = data.tensors
        return (self.eval()(images).argmax(1) == labels).double().mean().item()


@dataclass(frozen=True)
class Result:
    """The test accuracy of one run."""

    amount: str
    kind: str
    strategy: str
    planned: bool
    seed: int
    accuracy: float


def digits(first: int, count: int, kind: str, generator: torch.Generator) -> TensorDataset:
    """Return the images of some digits, in an order of their own for each generator.

    Args:
        first: The first of the digits.
        count: How many digits follow, it included.
        kind: ``"similar"`` for the images as they are, ``"different"`` for images that are turned, inverted and noisy.
        generator: Draws order and noise.
    """
    whole = load_digits()
    images, labels = torch.tensor(whole.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(whole.target) - first
    chosen = torch.nonzero((labels >= 0) & (labels < count)).squeeze(1)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    images, labels = images[chosen], labels[chosen]
    if kind == "different":
        images = 1 - images.rot90(1, (2, 3)) + 0.3 * torch.randn(images.shape, generator=generator)
    return TensorDataset(images, labels)


def split(data: TensorDataset, each: int, test: int = 280) -> tuple[TensorDataset, TensorDataset]:
    """Return so many images of each digit to train on, and others, always the same, to test on."""
    images, labels = data.tensors
    rest = torch.arange(test, len(labels))
    chosen = torch.cat([rest[labels[rest] == digit][:each] for digit in range(3)])
    return TensorDataset(images[chosen], labels[chosen]), TensorDataset(images[:test], labels[:test])


def train(network: Network, data: TensorDataset, steps: int, callbacks: list[Callback]) -> None:
    """Train for so many steps of at most 32 images."""
    loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=len(data) > 32)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        devices=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, loader)


def compare(seeds: int, steps: int) -> list[Result]:
    """Fine-tune by every strategy in every cell of the table, from a network that each seed trains anew."""
    results = []
    for seed in range(seeds):
        seed_everything(seed, verbose=False)
        trained = Network()
        train(trained, digits(0, 7, "similar", torch.Generator().manual_seed(seed)), 4 * steps, [])
        for kind in KINDS:
            data = digits(7, 3, kind, torch.Generator().manual_seed(seed))
            for amount, each in AMOUNTS.items():
                train_set, test_set = split(data, each)
                plan = functional.transfer_plan(len(train_set), kind, much=200, num_classes=3)
                for strategy, tuning in STRATEGIES.items():
                    seed_everything(seed, verbose=False)
                    network = Network() if tuning is None else deepcopy(trained)
                    train(network, train_set, steps, [] if tuning is None else [deepcopy(tuning)])
                    planned = tuning is not None and repr(tuning) == repr(plan)
                    results.append(Result(amount, kind, strategy, planned, seed, network.accuracy(test_set)))
                loaders = [DataLoader(each, batch_size=500) for each in (train_set, test_set)]
                report = functional.linear_probe(trained, *loaders, stages="blocks.?", l2=0.01)
                results.append(Result(amount, kind, PROBE, planned=False, seed=seed, accuracy=max(report.accuracies.values())))
    return results


def cell(results: Sequence[Result], amount: str, kind: str, strategy: str) -> list[Result]:
    """Return the runs of one strategy in one cell of the table."""
    return [each for each in results if (each.amount, each.kind, each.strategy) == (amount, kind, strategy)]


def tabulate(results: Sequence[Result]) -> Table:
    """Return mean and standard deviation over seeds of each strategy in each cell; the plan's is marked."""
    table = Table("Strategy", title="Test accuracy in %, mean ± standard deviation over seeds; * = functional.transfer_plan")
    cells = [(amount, kind) for amount in AMOUNTS for kind in KINDS]
    for amount, kind in cells:
        table.add_column(f"{amount}, {kind}", justify="right")
    for strategy in (*STRATEGIES, PROBE):
        row = []
        for amount, kind in cells:
            runs = cell(results, amount, kind, strategy)
            values = [100 * run.accuracy for run in runs]
            spread = stdev(values) if len(values) > 1 else 0.0
            row.append(f"{mean(values):.1f} ± {spread:.1f}{'*' if runs[0].planned else ' '}")
        table.add_row(strategy, *row)
    return table


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the strategies' accuracies in the four cells of the table, with a dot for each seed."""
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    strategies = list(STRATEGIES)
    for row, (amount, each) in enumerate(AMOUNTS.items()):
        for column, kind in enumerate(KINDS):
            axes = panels[row, column]
            for i, strategy in enumerate(strategies):
                runs = cell(results, amount, kind, strategy)
                values = [100 * run.accuracy for run in runs]
                axes.barh(i, mean(values), height=0.62, color="#0072B2" if runs[0].planned else "#C9D6DF")
                axes.plot(values, [i] * len(values), ".", color="#333333", markersize=4)
                axes.text(102, i, f"{mean(values):.1f}", va="center", fontweight="bold" if runs[0].planned else "normal")
            axes.set_title(f"{amount} data ({3 * each} images), {kind}", loc="left", fontweight="bold")
            axes.set_xlim(0, 101)
            axes.xaxis.set_major_formatter("{x:.0f} %")
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            axes.grid(axis="x", color="#E5E5E5")
            axes.set_axisbelow(True)
    panels[0, 0].set_yticks(range(len(strategies)), strategies)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("test accuracy on new digits (blue: the strategy of transfer_plan; dots: seeds)", fontsize="medium")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Compare the strategies, and write the table, the CSV and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="networks to start from (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each fine-tuning (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"), help="folder for the results (default: %(default)s)")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 1:
        parser.error("arguments --seeds and --steps must be at least 1")
    torch.set_num_threads(1)  # on images this small, threads wait for each other longer than they compute
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
    for name in ("lightning.pytorch", "pytorch_lightning"):  # where each Trainer says which devices it found
        logging.getLogger(name).setLevel(logging.WARNING)
    began = time.perf_counter()
    results = compare(options.seeds, options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "transfer.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(vars(results[0]))
        writer.writerows(vars(result).values() for result in results)
    plot(results, options.output / "transfer.png")
    console = Console(width=120)
    console.print(tabulate(results))
    console.print(f"{len(results)} results in {time.perf_counter() - began:.0f} s: {options.output}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
