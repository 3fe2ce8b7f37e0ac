"""Train a small network on handwritten digits, with and without an exponential moving average (EMA) of its weights.

    python examples/digits.py                                             # two runs, a table, and a picture in runs/digits
    python examples/digits.py --half-life "3 epochs"                      # an average that reaches farther back
    python examples/digits.py fit --config examples/configs/digits.yaml   # the run with EMA, through LightningCLI

The images come with scikit-learn and W&B stays offline, so that neither a download nor an account is needed. The learning rate is
constant and rather high, so that the raw weights keep moving about; with other seeds the average gains more or less than here.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import wandb
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from typing_extensions import override

import lightning_tricks as lt

Batch = Sequence[Tensor]  # images and labels
Metrics = dict[str, float]


class DigitsData(LightningDataModule):
    """The 1,797 digits of scikit-learn, 8 by 8 pixels each: 397 to train on, 600 to validate, 800 to test, the same in every run.

    Args:
        batch_size: Images per training step.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        dataset = TensorDataset(torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target))
        self.train_set, self.val_set, self.test_set = random_split(dataset, [397, 600, 800], torch.Generator().manual_seed(0))

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val_set, batch_size=len(self.val_set))

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.test_set, batch_size=len(self.test_set))

    predict_dataloader = test_dataloader


class DigitsNet(LightningModule):
    """A small convolutional network, trained by SGD at a constant learning rate. It knows nothing of averages.

    Args:
        lr: Learning rate.
    """

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(32, 10)),
        )

    @override
    def training_step(self, batch: Batch) -> Tensor:
        return self.measure("train", batch)

    @override
    def validation_step(self, batch: Batch) -> None:
        self.measure("val", batch)

    @override
    def test_step(self, batch: Batch) -> None:
        self.measure("test", batch)

    @override
    def predict_step(self, batch: Batch) -> Tensor:
        return self.layers(batch[0]).argmax(1)

    def measure(self, stage: str, batch: Batch) -> Tensor:
        """Log loss and accuracy of a batch, and return the loss."""
        images, labels = batch
        logits = self.layers(images)
        loss = cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": accuracy}, prog_bar=True)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class History(Callback):
    """Remember what every validation logged, for the plot."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.metrics: list[Metrics] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)
            self.metrics.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def train(name: str, options: argparse.Namespace, callbacks: list[Callback]) -> tuple[DigitsNet, Metrics]:
    """Train and test once; return the module as the fit left it, and its test metrics."""
    seed_everything(options.seed, verbose=False)  # every run starts from the same weights and sees the same batches
    logger = WandbLogger(
        name=name,
        save_dir=options.output / name,
        project="lightning-tricks-digits",
        mode=options.wandb_mode,
        settings={"silent": options.wandb_mode != "online"},
    )
    trainer = Trainer(
        max_epochs=options.epochs,
        devices=1,
        logger=logger,
        callbacks=[lt.TrackingReport(goals={"val_acc": "max", "val_loss": "min"}), *callbacks],
        log_every_n_steps=10,
        val_check_interval=0.5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module, data = DigitsNet(), DigitsData()
    trainer.fit(module, data)
    metrics = trainer.test(module, data, verbose=False)[0]
    logger.experiment.finish()  # or the next run would log into this one
    return module, dict(metrics)


def compare(options: argparse.Namespace, ema: lt.EMA) -> None:
    """Train without and with the average, tabulate the test metrics and plot those of validation."""
    console, history = Console(), History()
    console.print("\nTraining without an average", style="bold")
    _, plain = train("plain", options, [])
    console.print(f"\nTraining with {ema!r}", style="bold", soft_wrap=True)
    module, averaged = train("ema", options, [ema, history])
    # The fit left the averaged weights in the module. The trained ones equal those of the first run: the average only watches.
    module.load_state_dict(ema.raw_state_dict())
    tester = Trainer(devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    raw = tester.test(module, DigitsData(), verbose=False)[0]

    table = Table("Run", "Weights", title=f"Test on 800 digits (epochs: {options.epochs}, seed: {options.seed})")
    table.add_column("Accuracy", justify="right")
    table.add_column("Loss", justify="right")
    for run, weights, metrics in (("without EMA", "raw", plain), ("with EMA", "raw", raw), ("with EMA", "averaged", averaged)):
        table.add_row(run, weights, f"{metrics['test_acc']:.1%}", f"{metrics['test_loss']:.4f}")
    console.print("", table)
    picture = options.output / "digits.png"
    plot(history, picture)
    console.print(f"Picture: {picture}", soft_wrap=True, highlight=False)
    if options.wandb_mode == "offline":
        console.print(f"To upload the runs: wandb sync {options.output}/*/wandb/offline-run-*", soft_wrap=True, highlight=False)


def plot(history: History, path: Path) -> None:
    """Draw the validation accuracy of raw and averaged weights over the optimizer steps."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    half, means, lowest = len(history.steps) // 2, [], []
    for key, label, color, width in (("raw/val_acc", "raw weights", "#D55E00", 1.4), ("val_acc", "averaged weights", "#0072B2", 2.6)):
        values = [100 * metrics[key] for metrics in history.metrics]
        axes.plot(history.steps, values, color=color, linewidth=width, marker="o", markersize=1.8 * width, label=label)
        means.append(sum(values[half:]) / len(values[half:]))
        lowest.append(min(values[half // 2 :]))
    axes.set_title("Mean of the second half: {:.1f} % raw, {:.1f} % averaged".format(*means), loc="left", fontweight="bold", pad=12)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("validation accuracy, handwritten digits")
    axes.set_ylim(min(lowest) - 5, 101)  # the climb of the first steps would flatten the rest
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.grid(color="#E5E5E5")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="lower right", frameon=False, labelcolor="linecolor")
    figure.savefig(path, dpi=200)


def duration(text: str) -> int | str:
    """Read a bare number as one of optimizer steps."""
    return int(text) if text.isdecimal() else text


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, lt.EMA]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="epochs of 24 steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of initial weights and batches (default: %(default)s)")
    average = parser.add_mutually_exclusive_group()
    average.add_argument("--decay", type=float, help="share of the average kept at each step, such as 0.97")
    average.add_argument("--half-life", type=duration, help='the same as a duration, such as "50 steps" (default: "1 epoch")')
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--online", action="store_true", help="send the runs to W&B, which needs an account")
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    options.wandb_mode = "online" if options.online else os.environ.get("WANDB_MODE", "offline")
    if options.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {options.epochs}")
    if options.decay is None and options.half_life is None:
        options.half_life = "1 epoch"
    try:
        # BatchNorm's statistics fit the weights they were measured with, so that averaged weights want averaged statistics.
        ema = lt.EMA(options.decay, half_life=options.half_life, warmup="2 epochs", buffers="average", evaluate="both")
        seed_everything(options.seed, verbose=False)
        options.output.mkdir(parents=True, exist_ok=True)
        if options.wandb_mode == "online":
            wandb.login()
    except (ValueError, OSError, wandb.Error) as error:
        parser.error(str(error))
    return options, ema


def main() -> None:
    """Hand over to LightningCLI if the first argument is one of its subcommands, or else compare the two runs."""
    torch.set_num_threads(1)  # on images this small, threads wait for each other longer than they compute
    # The images are tensors in memory, which workers would only copy.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning calls what newer releases of torch deprecate, and passes what newer releases of W&B ignore.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
    wandb.setup(wandb.Settings(show_warnings=False))
    if sys.argv[1:2] and sys.argv[1] in {"fit", "validate", "test", "predict"}:
        LightningCLI(DigitsNet, DigitsData, save_config_kwargs={"overwrite": True})
    else:
        for name in ("lightning.pytorch", "pytorch_lightning"):  # where each Trainer says which devices it found
            logging.getLogger(name).setLevel(logging.WARNING)
        compare(*parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
