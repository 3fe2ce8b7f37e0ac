"""Does it help? Baseline and trick at an equal budget, over paired seeds, on real images in small networks.

Each comparison trains every way once for each seed: on the same images, from the same initial weights, with the same order of batches;
only the further members of a deep ensemble begin with weights and orders of their own. Settings were chosen beforehand, many of them the
papers' or defaults; the test set is used for nothing but the test. A row of ``results/accuracy/<comparison>.csv`` is one evaluation on
it: what was trained (``arm``), at which setting (``at``: schedule of the rate, number of members, size of batches, or factor of the decay),
the seed, the error in percent, the negative log-likelihood in nats per image, and the CPU time of the training in seconds. A seed that is
there already is not trained again.

Run ``python benchmarks/accuracy.py --data-dir DIR``, where ``benchmarks/data.py`` says what DIR has to hold; ``--only NAME`` runs one
comparison, and ``--tables`` draws the plots and writes the tables into the pages of the documentation from the files alone.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import accuracy_report as report
import lightning_tricks as lt
from data import MissingDataError, load_images
from lightning_tricks import optim
from reporting import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SGD = optim.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
MEMBERS = 5


class Block(nn.Module):
    """A residual block that normalizes first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


def residual(shape: Sequence[int], stride: int = 4, blocks: int = 1) -> nn.Sequential:
    """Return a residual network of two stages, 16 and 32 channels wide, which sees images of 28×28 as 7×7 patches."""
    stem = nn.Conv2d(shape[0], 16, stride + 1, stride, padding=1, bias=False)
    down = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1, bias=False))
    head = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(stem, *(Block(16) for _ in range(blocks)), down, *(Block(32) for _ in range(blocks)), head)


def perceptron(shape: Sequence[int]) -> nn.Sequential:
    """Return a network of two hidden layers."""
    pixels = math.prod(shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class Classifier(L.LightningModule):
    """Any network as a classifier."""

    def __init__(self, net: nn.Module, recipe: optim.OptimizerRecipe, *, cosine: bool) -> None:
        super().__init__()
        self.net, self.recipe, self.cosine = net, recipe, cosine

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities."""
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimizer, whose rate falls to zero in half a wave over the steps, or stays."""
        optimizer = self.recipe.build(self)
        if not self.cosine:
            return optimizer
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Row(NamedTuple):
    """One evaluation: error in percent, negative log-likelihood, and CPU time of the training in seconds."""

    arm: str
    at: str
    seed: int
    error: float
    nll: float
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """A trained module, its Trainer and the CPU time of the training in seconds."""

    module: Classifier
    trainer: L.Trainer
    seconds: float


@dataclass(frozen=True)
class Task:
    """What one seed trains on and is tested on, and for how long."""

    seed: int
    epochs: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    folder: Path

    def fit(
        self,
        callbacks: Sequence[Any] = (),
        *,
        net: Callable[[Sequence[int]], nn.Module] = residual,
        recipe: optim.OptimizerRecipe = SGD,
        cosine: bool = True,
        epochs: int | None = None,
        batch_size: int = 64,
        member: int = 0,
    ) -> Fitted:
        """Train; what draws at random begins from the seed and the number of the member alone."""
        L.seed_everything(1000 * member + self.seed, verbose=False)
        module = Classifier(net(self.train[0].shape[1:]), recipe, cosine=cosine)
        order = torch.Generator().manual_seed(1000 * member + self.seed)
        loader = DataLoader(TensorDataset(*self.train), batch_size, shuffle=True, generator=order)
        trainer = make_trainer(callbacks, max_epochs=epochs or self.epochs)
        begin = time.process_time()
        trainer.fit(module, loader)
        return Fitted(module, trainer, time.process_time() - begin)

    def probabilities(self, model: nn.Module, x: Tensor | None = None) -> Tensor:
        """Return what a model says of the images of the test, or others."""
        model.eval()
        with torch.no_grad():
            return torch.cat([model(batch).softmax(-1) for batch in (self.test[0] if x is None else x).split(500)])

    def row(self, arm: str, probabilities: Tensor, seconds: float, at: object = "") -> Row:
        """Return the evaluation of probabilities on the test set."""
        target = self.test[1]
        error = 100 * (probabilities.argmax(1) != target).double().mean().item()
        nll = F.nll_loss(probabilities.double().clamp_min(1e-12).log(), target).item()
        return Row(arm, str(at), self.seed, round(error, 4), round(nll, 6), round(seconds, 2))

    def plain(self, arm: str, callbacks: Sequence[Any] = (), at: object = "", **how: Any) -> Row:
        """Train, and evaluate the weights as they are."""
        fitted = self.fit(callbacks, **how)
        return self.row(arm, self.probabilities(fitted.module), fitted.seconds, at)


def make_trainer(callbacks: Sequence[Any], **options: Any) -> L.Trainer:
    """Return a quiet Trainer."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **options)


def averaging(task: Task) -> Iterator[Row]:
    """Compare averages of one run with its last weights, at a constant rate and at one that falls to zero."""
    for rate in ("constant", "cosine"):
        post_hoc = lt.PostHocEMA(buffers="average", dirpath=task.folder / rate)
        averages = {
            "EMA": lt.EMA(half_life="1 epoch", buffers="average", evaluate=False),
            "PolyakAveraging": lt.PolyakAveraging(buffers="average", evaluate=False),
            "SWA": lt.PolyakAveraging(start="50%", every="1 epoch", buffers="average", evaluate=False, name="swa"),
            "LatestWeightAveraging": lt.LatestWeightAveraging(buffers="average", evaluate=False),
        }
        fitted = task.fit([post_hoc, *averages.values()], cosine=rate == "cosine")
        module = fitted.module
        yield task.row("last weights", task.probabilities(module), fitted.seconds, rate)
        for arm, average in averages.items():
            module.load_state_dict(average.averaged_state_dict())
            yield task.row(arm, task.probabilities(module), fitted.seconds, rate)
        scores = {}
        for width in (0.03, 0.05, 0.075, 0.1, 0.15, 0.2):
            module.load_state_dict(post_hoc.synthesize(width))
            answers = task.probabilities(module, task.validation[0]).clamp_min(1e-12).log()
            scores[width] = F.nll_loss(answers, task.validation[1]).item()
        module.load_state_dict(post_hoc.synthesize(min(scores, key=scores.__getitem__)))
        yield task.row("PostHocEMA", task.probabilities(module), fitted.seconds, rate)


def ensembles(task: Task) -> Iterator[Row]:
    """Compare one model with ensembles of the latest members of one training, and with several trainings."""
    checkpoints = lt.SnapshotEnsemble(MEMBERS, schedule=None, evaluate=False, dirpath=task.folder / "checkpoints")
    snapshots = lt.SnapshotEnsemble(MEMBERS, evaluate=False, dirpath=task.folder / "snapshots")
    geometric = lt.FastGeometricEnsemble(MEMBERS, evaluate=False, dirpath=task.folder / "geometric")
    one = task.fit([checkpoints])
    whole = [task.probabilities(one.module)]
    yield task.row("one model", whole[0], one.seconds, 1)
    yield from _together(task, "checkpoints", [task.probabilities(each) for each in checkpoints.to_ensemble()], one.seconds)
    for arm, trick, cosine in (("SnapshotEnsemble", snapshots, False), ("FastGeometricEnsemble", geometric, True)):
        fitted = task.fit([trick], cosine=cosine)
        yield from _together(task, arm, [task.probabilities(each) for each in trick.to_ensemble()], fitted.seconds)
    short = [task.fit(epochs=max(1, task.epochs // MEMBERS), member=member) for member in range(MEMBERS)]
    answers = [task.probabilities(each.module) for each in short]
    yield from _together(task, "trainings, budget of one", answers, sum(each.seconds for each in short))
    more = [task.fit(member=member) for member in range(1, MEMBERS)]
    whole += [task.probabilities(each.module) for each in more]
    yield from _together(task, "trainings, budget of each", whole[::-1], one.seconds + sum(each.seconds for each in more))


def _together(task: Task, arm: str, answers: Sequence[Tensor], seconds: float) -> Iterator[Row]:
    for size in range(1, len(answers) + 1):
        yield task.row(arm, torch.stack(list(answers[-size:])).mean(0), seconds, size)


def stochastic_depth(task: Task) -> Iterator[Row]:
    """Compare a network of eight residual blocks with and without stochastic depth at the paper's rates."""
    for arm, callbacks in (("none", []), ("StochasticDepth", [lt.StochasticDepth(0.5)])):
        yield task.plain(arm, callbacks, net=partial(residual, blocks=4))


def drop_connect(task: Task) -> Iterator[Row]:
    """Compare nothing, dropout and DropConnect on the hidden layers of a perceptron, the latter with two ways of inference."""
    how: dict[str, Any] = {"net": perceptron, "recipe": optim.SGD(lr=0.05, momentum=0.9)}
    hidden = ("net.3", "net.5")  # the layers that take hidden units
    yield task.plain("none", **how)
    yield task.plain("Dropout", [lt.Dropout(0.5, after=("net.2", "net.4"))], **how)
    fitted = task.fit([lt.DropConnect(0.5, where=hidden, granularity="example")], **how)
    for inference in ("mean", "gaussian"):
        trick = lt.DropConnect(0.5, where=hidden, granularity="example", inference=inference)
        batches = DataLoader(TensorDataset(*task.test), 500)
        answers = torch.cat(make_trainer([trick]).predict(fitted.module, batches))  # type: ignore[arg-type]
        yield task.row(f"DropConnect, {inference}", answers, fitted.seconds)


def norm_swap(task: Task) -> Iterator[Row]:
    """Compare batch, group and ghost normalization over sizes of batches, with rates in proportion to them."""
    swaps: dict[str, Callable[[], list[Any]]] = {
        "batch": list,
        "group": lambda: [lt.NormSwap("batch", "group", groups="8 channels")],
        "ghost": lambda: [lt.NormSwap("batch", "ghost", ghost_size=16)],
    }
    for size in (2, 8, 32):
        recipe = optim.SGD(lr=0.1 * size / 64, momentum=0.9, nesterov=True, weight_decay=5e-4)
        for arm, make in swaps.items():
            if arm != "ghost" or size > 16:
                yield task.plain(arm, make(), size, net=partial(residual, stride=1), recipe=recipe, batch_size=size)


def weight_decay(task: Task) -> Iterator[Row]:
    """Compare decoupled decay with L2 under Adam, each of two strengths, and the stronger with biases and norms decayed, too."""
    yield task.plain("none", recipe=optim.Adam(lr=3e-3))
    for mode, factors in (("decoupled", (0.05, 0.5)), ("l2", (1e-4, 1e-3))):
        for factor in factors:
            yield task.plain(mode, [lt.WeightDecay(factor, mode=mode)], factor, recipe=optim.Adam(lr=3e-3))
        trick = lt.WeightDecay(factors[-1], mode=mode, skip=())
        yield task.plain(f"{mode}, everything", [trick], factors[-1], recipe=optim.Adam(lr=3e-3))


def regularization(task: Task) -> Iterator[Row]:
    """Compare tricks on data and loss, dropout and SAM; the latter also with half the epochs, which take the time of the others."""
    sam = optim.SAM(SGD, rho=0.05)
    yield task.plain("none")
    yield task.plain("MixUp", [lt.MixUp(0.2)])
    yield task.plain("CutMix", [lt.CutMix(1.0, probability=0.5)])
    yield task.plain("LabelSmoothing", [lt.LabelSmoothing(0.1)])
    yield task.plain("SAM, half the epochs", recipe=sam, epochs=max(1, task.epochs // 2))
    yield task.plain("SAM", recipe=sam)


class Comparison(NamedTuple):
    """What is compared, on which data, with how many images to train on and for how many epochs."""

    run: Callable[[Task], Iterator[Row]]
    data: str
    images: int
    epochs: int


COMPARISONS = {
    "averaging": Comparison(averaging, "fashion", 2000, 16),
    "regularization": Comparison(regularization, "fashion", 2000, 12),
    "drop_connect": Comparison(drop_connect, "fashion", 2000, 20),
    "stochastic_depth": Comparison(stochastic_depth, "fashion", 2000, 12),
    "weight_decay": Comparison(weight_decay, "fashion", 2000, 12),
    "norm_swap": Comparison(norm_swap, "digits", 512, 16),
    "ensembles": Comparison(ensembles, "fashion", 2000, 15),
}


def make_task(comparison: Comparison, seed: int, folder: Path, arguments: argparse.Namespace) -> Task:
    """Draw the images of a seed: those to train on and 500 others to validate; the test set is the same, or on digits all the others."""
    name, count = arguments.data or comparison.data, arguments.images or comparison.images
    data = load_images(name, arguments.data_dir)
    (x, y), test = data.train, (data.test[0][:5000], data.test[1][:5000])
    if name == "digits":
        x, y = torch.cat([x, test[0]]), torch.cat([y, test[1]])
    most = len(x) - 500 - (name == "digits")
    if count > most:
        msg = f"{name} has {most} images to train on, beside those to validate and to test on, got --images {count}."
        raise ValueError(msg)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, held = order[:count], order[count : count + 500]
    if name == "digits":
        test = x[order[count + 500 :]], y[order[count + 500 :]]
    return Task(seed, arguments.epochs or comparison.epochs, (x[fit], y[fit]), (x[held], y[held]), test, folder)


def measure(name: str, seed: int, arguments: argparse.Namespace) -> bool:
    """Train what a comparison needs for a seed, and add it to its file, unless it is there; tell whether it was not."""
    path: Path = arguments.output / f"{name}.csv"
    known = report.read(path)
    if any(row["seed"] == str(seed) for row in known):
        return False
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(COMPARISONS[name], seed, Path(folder), arguments)
        rows = list(COMPARISONS[name].run(task))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([*([] if known else [Row._fields]), *rows])
    print(f"{name}: seed {seed} done", flush=True)
    return True


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=COMPARISONS, action="append", help="a comparison; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: 5")
    parser.add_argument("--epochs", type=int, help="epochs of a training; default: each comparison's own")
    parser.add_argument("--images", type=int, help="images to train on; default: each comparison's own")
    parser.add_argument("--data", choices=("digits", "fashion", "cifar10"), help="default: each comparison's own")
    parser.add_argument("--data-dir", type=Path, help="folder with the data, as benchmarks/data.py describes it")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the CSV files")
    parser.add_argument(
        "--tables", action="store_true", help="train nothing; draw plots of results/accuracy, and write its tables into the documentation"
    )
    arguments = parser.parse_args()
    for name in ("seeds", "epochs", "images"):
        if (count := getattr(arguments, name)) is not None and count < 1:
            parser.error(f"--{name} must be at least 1, got {count}")
    if arguments.output == report.RESULTS and (arguments.epochs or arguments.images or arguments.data):
        parser.error(f"--epochs, --images and --data would mix other settings into {report.RESULTS}: name another folder by --output")
    return arguments


def main() -> None:
    """Measure, and write tables and plots."""
    arguments = parse()
    if arguments.tables:
        report.publish()
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names, trained = list(arguments.only or COMPARISONS), False
    for seed in range(arguments.seeds):
        for name in list(names):
            try:
                trained |= measure(name, seed, arguments)
            except MissingDataError as error:
                names.remove(name)
                print(f"{name} is skipped: {error}")
    if trained:
        changes = "".join(f" --{key} {getattr(arguments, key)}" for key in ("data", "images", "epochs") if getattr(arguments, key))
        command = f"python benchmarks/accuracy.py{changes} --data-dir DIR"
        notes = environment(command, "torch", "lightning", "scikit-learn", device="cpu")
        (arguments.output / "environment.md").write_text("".join(f"- {key}: {value}\n" for key, value in notes.items()))


if __name__ == "__main__":
    main()
