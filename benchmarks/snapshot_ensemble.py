"""What a snapshot ensemble gains on handwritten digits over one model of the same training, and what a prediction of it costs.

Measure with ``python benchmarks/snapshot_ensemble.py``; seeds, epochs, members and repeats are set by options. Each run trains on 400 of
scikit-learn's digits, of which some have labels drawn at random, and is tested on the others. Costs are CPU time, interleaved.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

import lightning_tricks as lt
from ensembles import MODELS
from reporting import environment, markdown, show, write

TRAINED, WRONG = 400, 40


class Classifier(L.LightningModule):
    """Any network as a classifier, which times its predictions when asked."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.accuracy, self.calibration = MulticlassAccuracy(10, average="micro"), MulticlassCalibrationError(10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log what is reported."""
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.calibration(logits.softmax(-1), batch[1])
        self.log_dict({"accuracy": self.accuracy, "calibration error": self.calibration, "NLL": cross_entropy(logits, batch[1])})

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> float:
        """Return the CPU time of a prediction in milliseconds."""
        begin = time.process_time()
        self(batch[0])
        return 1000 * (time.process_time() - begin)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD, as the paper does."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)


def make_trainer(callbacks: list[Any], **options: Any) -> L.Trainer:
    """Return a quiet Trainer."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", callbacks=callbacks, **quiet, **options)


def gains(seeds: int, epochs: int, members: int) -> list[list[str]]:
    """Return a row for each way of training: accuracy, negative log-likelihood and calibration error, means over seeds."""
    inputs, targets = import_module("sklearn.datasets").load_digits(return_X_y=True)
    x, y = torch.tensor(inputs, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(targets)
    ways = {
        "one cosine cycle": (1, 1),
        f"{members} cycles, the last alone": (1, members),
        f"{members} cycles, together": (members, members),
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for seed in range(seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = order[:TRAINED], order[TRAINED:]
        labels = y[train].clone()
        labels[:WRONG] = torch.randint(10, (WRONG,), generator=torch.Generator().manual_seed(seed))
        for way, (kept, cycles) in ways.items():
            L.seed_everything(seed, verbose=False)
            module = Classifier(MODELS["digits CNN"][0]())
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer([lt.SnapshotEnsemble(kept, cycles=cycles, measure=False, dirpath=folder)], max_epochs=epochs)
                trainer.fit(module, DataLoader(TensorDataset(x[train], labels), batch_size=32, shuffle=True))
                found[way] += trainer.test(module, DataLoader(TensorDataset(x[test], y[test]), batch_size=500), verbose=False)
    keys = ("accuracy", "NLL", "calibration error")
    return [[way, *(f"{statistics.mean(run[key] for run in runs):.4f}" for key in keys)] for way, runs in found.items()]


def costs(names: list[str], members: int, repeats: int, warmup: int) -> list[list[str]]:
    """Return a row for each model: the time of a prediction by one model and by all members, and their ratio for each member."""
    rows = []
    for name in names:
        make, shape = MODELS[name]
        torch.manual_seed(0)
        x, y = torch.randn(32, *shape), torch.randint(10, (32,))
        module = Classifier(make())
        with tempfile.TemporaryDirectory() as folder:
            trick = lt.SnapshotEnsemble(members, measure=False, dirpath=folder)
            trainer = make_trainer([trick], max_steps=members)
            trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32))
            plain, batches = make_trainer([]), DataLoader([(x, y)], batch_size=None)
            times: dict[str, list[float]] = {"one": [], "all": []}
            for i in range(repeats + warmup):
                one, together = plain.predict(module, batches), trainer.predict(module, batches)
                if i >= warmup:
                    times["one"] += one
                    times["all"] += together
        one, together = statistics.median(times["one"]), statistics.median(times["all"])
        rows.append([name, f"{one:.2f}", f"{together:.2f}", f"{together / one / members:.2f}"])
    return rows


def main() -> None:
    """Measure, print two tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="show that it works")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "snapshot_ensemble")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = ["digits CNN"] if arguments.quick else [name for name in MODELS if name != "MLP"]
    seeds, epochs = (1, 2) if arguments.quick else (arguments.seeds, arguments.epochs)
    gain, cost = ("what is tested", "accuracy", "NLL", "calibration error"), ("model", "one, ms", "all, ms", "all / (M × one)")
    gained = gains(seeds, epochs, arguments.members)
    spent = costs(names, arguments.members, arguments.repeats, arguments.warmup)
    show("Gain", gain, gained)
    show("Cost of a prediction", cost, spent)
    command = " ".join(["python benchmarks/snapshot_ensemble.py", *sys.argv[1:]])
    circumstances = environment(command, "torch", "lightning", "lightning-tricks", device="cpu")
    note = f"Means of {seeds} seeds, {epochs} epochs on {TRAINED} digits of which {WRONG} have labels drawn at random; medians of CPU time."
    body = [markdown(gain, gained), markdown(cost, spent), note]
    write(arguments.output, "Snapshot ensembles", circumstances, {"gain": gained, "cost": spent}, body)


if __name__ == "__main__":
    main()
