"""Compare what four ways of training handwritten digits know about their own errors, and about digits they have never seen.

    python examples/uncertainty.py                       # eight trainings, a table, a CSV file and a picture in runs/uncertainty
    python examples/uncertainty.py --members 10          # larger ensembles
    python examples/uncertainty.py --wandb               # the same, tracked by W&B, offline unless WANDB_MODE says otherwise

One small network learns the digits 0 to 7: once as it is; once with dropout, which stays on while it predicts (Monte Carlo dropout);
once with a cyclic learning rate, at the ends of whose cycles the weights are kept (snapshot ensemble); and several times from different
first weights (deep ensemble). All are tested on digits they have not seen, on the same digits rotated and with noise, and on eights and
nines, of which they know nothing and should say so. The images come with scikit-learn; nothing is downloaded.
"""

import argparse
import csv
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc, binary_roc
from typing_extensions import override

import lightning_tricks as lt

Batch = Sequence[Tensor]  # images and labels
Predict = Callable[[Tensor], Tensor]  # from images to probabilities
Sets = dict[str, tuple[Tensor, Tensor]]  # images and labels to test on
Row = dict[str, Any]  # of the table
MEASURES = ("accuracy", "nll", "brier", "calibration_error", "auroc")
HEADER = ("set", "training", *MEASURES)
KNOWN = 8  # the digits 0 to 7
COLORS = {"single": "#000000", "MC dropout": "#E69F00", "snapshot": "#009E73", "deep": "#0072B2"}


class Net(LightningModule):
    """A small convolutional network, trained by SGD at a learning rate that falls to zero along a cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, KNOWN)),
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), "interval": "step"}]


def load() -> tuple[DataLoader[Batch], Sets]:
    """Return 400 digits from 0 to 7 to train on, and what to test on: the others, as they are and changed, and the eights and nines."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    draw = torch.Generator().manual_seed(0)
    known = (labels < KNOWN).nonzero().squeeze(1)
    known = known[torch.randperm(len(known), generator=draw)]
    train, test = known[:400], known[400:]
    noisy = images[test] + 0.3 * torch.randn(images[test].shape, generator=draw)
    sets = {
        "test digits": (images[test], labels[test]),
        "rotated by 30°": (rotate(images[test], 30), labels[test]),
        "noise, σ = 0.3": (noisy.clamp(0, 1), labels[test]),
        "unknown digits": (images[labels >= KNOWN], labels[labels >= KNOWN]),
    }
    return DataLoader(TensorDataset(images[train], labels[train]), batch_size=16, shuffle=True, drop_last=True), sets


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Turn images about their centre."""
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    matrix = torch.stack([angle.cos(), -angle.sin(), torch.zeros(()), angle.sin(), angle.cos(), torch.zeros(())]).view(1, 2, 3)
    grid = affine_grid(matrix.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def train(data: DataLoader[Batch], settings: dict[str, Any], seed: int, *callbacks: Callback, dropout: float = 0.0) -> Net:
    """Train one network."""
    seed_everything(seed, verbose=False)
    net = Net()
    if dropout:
        lt.functional.apply_dropout(net, dropout, after="ReLU", seed=seed)
    Trainer(**settings, callbacks=list(callbacks)).fit(net, data)
    return net.eval()


def train_all(data: DataLoader[Batch], options: argparse.Namespace) -> dict[str, tuple[Sequence[nn.Module], Predict]]:
    """Train in the four ways; return the networks of each, and how they predict together."""
    settings = {"max_epochs": options.epochs, "accelerator": "cpu", "devices": 1, "default_root_dir": options.output, "logger": False}
    settings |= {f"enable_{part}": False for part in ("checkpointing", "model_summary", "progress_bar")}
    seed, snapshot = options.seed, lt.SnapshotEnsemble(options.members)
    single = train(data, settings, seed)
    dropping = train(data, settings, seed, dropout=0.25)
    train(data, settings, seed, snapshot)
    cyclic, deep = snapshot.to_ensemble(), lt.functional.train_ensemble(Net, data, options.members, trainer=settings, seed=seed).ensemble
    return {
        "single": ([single], lambda images: single(images).softmax(1)),
        "MC dropout": ([dropping], lambda images: lt.functional.mc_dropout(dropping, images, samples=20, seed=seed).mean),
        "snapshot": (list(cyclic), lambda images: cyclic(images).softmax(1)),
        "deep": (list(deep), lambda images: deep(images).softmax(1)),
    }


def measure(probabilities: Tensor, labels: Tensor, usual: Tensor) -> dict[str, float]:
    """Return how good predictions are, and how well their entropy tells the images from the usual ones, of which there are predictions."""
    found = {}
    if labels.max() < KNOWN:
        measures = lt.metrics.EnsembleMeasures(output="probabilities")
        measures.update(probabilities[None], labels)
        scores = measures.compute()
        found["accuracy"] = (probabilities.argmax(1) == labels).float().mean().item()
        found |= {name: scores[name].item() for name in ("nll", "brier", "calibration_error")}
    if probabilities is not usual:
        found["auroc"] = binary_auroc(*entropies(probabilities, usual)).item()
    return found


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table, the best of each set in bold."""
    table = Table("Tested on", "Training", title="Errors and uncertainty", box=SIMPLE_HEAD)
    for name in ("Accuracy", "NLL", "Brier", "ECE", "AUROC"):
        table.add_column(name, justify="right")
    for name, group in itertools.groupby(rows, key=lambda row: row["set"]):
        methods = list(group)
        for i, row in enumerate(methods):
            cells = []
            for key in MEASURES:
                values = [other[key] for other in methods if key in other]
                best = values and row[key] == (max if key in {"accuracy", "auroc"} else min)(values)
                text = "" if not values else f"{row[key]:.1%}" if key == "accuracy" else f"{row[key]:.3f}"
                cells.append(f"[bold]{text}[/bold]" if best else text)
            table.add_row("" if i else name, row["training"], *cells, end_section=i == len(methods) - 1)
    console.print("", table)
    console.print("ECE: expected calibration error. AUROC: how well the entropy tells the images from the test digits.\n", soft_wrap=True)


def plot(predictions: dict[str, dict[str, Tensor]], sets: Sets, rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over confidence on the changed digits, and how well the entropy finds the unknown ones."""
    figure = Figure(figsize=(10.4, 3.5), layout="constrained")
    panels = dict(zip(list(sets)[1:], figure.subplots(1, 3), strict=True))
    values = {(row["set"], row["training"]): row for row in rows}
    for name, axes in panels.items():
        calibrated = "calibration_error" in values[name, "single"]
        axes.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=0)
        for training, found in predictions.items():
            if calibrated:
                curve, score = reliability(found[name], sets[name][1]), 100 * values[name, training]["calibration_error"]
                label, marker = f"{score:4.1f} %  {training}", "o"
            else:
                curve, score = detection(found[name], next(iter(found.values()))), values[name, training]["auroc"]
                label, marker = f"{score:.3f}  {training}", None
            axes.plot(*curve, color=COLORS[training], linewidth=1.8, marker=marker, markersize=4.5, label=label)
        legend = {"title": "calibration error" if calibrated else "area under the curve", "fontsize": 9, "title_fontsize": 9}
        place = "upper left" if axes is figure.axes[0] else "lower right"  # where there are no curves
        axes.legend(**legend, loc=place, frameon=False, labelcolor="linecolor", handlelength=1.2, labelspacing=0.3)
        axes.set_title(name, loc="left", fontweight="bold")
        axes.set_xlabel("confidence" if calibrated else "test digits taken for unknown")
        axes.set_ylabel("accuracy" if calibrated else "unknown digits found")
        axes.set(aspect="equal", xlim=(0, 1.02), ylim=(0, 1.02))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MultipleLocator(0.25))
            axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].text(1, 0.08, "overconfident", color="#777777", fontsize=9, ha="right")
    figure.savefig(path, dpi=160)


def reliability(probabilities: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """Return confidence and accuracy in each tenth of confidence that holds at least 20 images."""
    confidence, chosen = probabilities.max(1)
    hits, tenth = (chosen == labels).float(), (10 * confidence).long().clamp(max=9)
    inside = [tenth == i for i in range(10) if (tenth == i).sum() >= 20]
    return [confidence[each].mean().item() for each in inside], [hits[each].mean().item() for each in inside]


def detection(probabilities: Tensor, usual: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for all thresholds of entropy, the share of usual images above, and that of others."""
    false, true, _ = binary_roc(*entropies(probabilities, usual))
    return false, true


def entropies(probabilities: Tensor, usual: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entropies of predictions, and whether they are other than the usual ones."""
    parts = [torch.special.entr(each).sum(1) for each in (usual, probabilities)]
    return torch.cat(parts), torch.cat([torch.full_like(part, i).long() for i, part in enumerate(parts)])


def track(options: argparse.Namespace, rows: Sequence[Row], picture: Path, folder: Path) -> None:
    """Hand the table, the picture and, as model artifacts, the members to W&B."""
    wandb = import_module("wandb")
    mode = os.environ.get("WANDB_MODE", "offline")
    config = {"epochs": options.epochs, "members": options.members, "seed": options.seed}
    with wandb.init(project="lightning-tricks-uncertainty", dir=options.output, mode=mode, config=config) as run:
        table = wandb.Table(columns=["set", "training", *MEASURES], data=[[row.get(key) for key in HEADER] for row in rows])
        run.log({"measures": table, "reliability": wandb.Image(str(picture))})
        for members in sorted(folder.iterdir()):
            artifact = wandb.Artifact(f"{members.name}-members", type="model", metadata=config)
            artifact.add_dir(str(members))
            run.log_artifact(artifact)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each training, 25 steps each (default: %(default)s)")
    parser.add_argument("--members", type=int, default=5, help="members of the ensembles, at least 2 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of first weights, batches and dropout (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/uncertainty"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--wandb", action="store_true", help="track results and members by W&B, offline unless WANDB_MODE is set")
    options = parser.parse_args()
    if options.members < 2 or options.epochs < options.members:
        parser.error(f"there must be 2 members or more, and an epoch for each, got {options.members} and {options.epochs} epochs")
    if options.wandb and find_spec("wandb") is None:
        parser.error("--wandb needs W&B: pip install wandb")
    return options


def main() -> None:
    """Train, measure, show and write."""
    options, console = parse(), Console()
    torch.set_num_threads(1)  # on images this small, threads wait for each other longer than they compute
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
    for name in ("lightning.pytorch", "pytorch_lightning"):  # where each Trainer says which devices it found
        logging.getLogger(name).setLevel(logging.WARNING)
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    data, sets = load()
    trained = train_all(data, options)
    with torch.inference_mode():
        predictions = {name: {key: predict(images) for key, (images, _) in sets.items()} for name, (_, predict) in trained.items()}
    rows: list[Row] = [
        {"set": key, "training": name, **measure(found[key], labels, next(iter(found.values())))}
        for key, (_, labels) in sets.items()
        for name, found in predictions.items()
    ]
    show(rows, console)
    picture, models = options.output / "uncertainty.png", options.output / "models"
    plot(predictions, sets, rows, picture)
    with (options.output / "uncertainty.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(rows)
    for name, (members, _) in trained.items():
        folder = models / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for i, member in enumerate(members):
            save_file({key: value.clone() for key, value in member.state_dict().items()}, folder / f"{i}.safetensors")
    console.print(f"Table, picture and members: {options.output}", soft_wrap=True, highlight=False)
    if options.wandb:
        track(options, rows, picture, models)


if __name__ == "__main__":
    main()
