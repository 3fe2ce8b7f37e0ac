"""Compares ensembles: time and memory of predictions by M members, and the time their training takes.

Measure with ``python benchmarks/ensembles.py``; members, batches and rounds are set by options. A loop over the members is the measure of
predictions, Lightning's Trainer in a loop that of training. torch-uncertainty and Ensemble-Pytorch (torchensemble) take part where they are
installed. All ways get the same models and data, by turns in random order; times are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import random
import statistics
import time
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.functional import train_ensemble
from lightning_tricks.nn import Ensemble
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCHS, EXAMPLES = 3, 512
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False}
QUIET |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
MISSING = "not installed"
INCUMBENTS = {"torch-uncertainty": "torch_uncertainty", "Ensemble-Pytorch": "torchensemble"}


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


class Classifier(LightningModule):
    """Trains one network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that all ways use."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def by_turns(ways: dict[str, Callable[[], Any]], repeats: int, warmup: int) -> dict[str, float]:
    """Return the median milliseconds of processor time of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(warmup + repeats):
        for name in random.Random(round_).sample(list(ways), len(ways)):  # noqa: S311
            start = time.process_time()
            ways[name]()
            if round_ >= warmup:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak(compute: Callable[[], Any]) -> float:
    """Return by how many MiB the memory of tensors is larger at its peak than before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        compute()
    now = most = 0
    for event in sorted((e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def joint_prediction(name: str, members: list[nn.Module], make: type[nn.Module]) -> nn.Module:
    """Return an incumbent's module that has these members, and returns their mean probabilities."""
    if name == "torch-uncertainty":

        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.joint = import_module("torch_uncertainty.methods").deep_ensembles(members)

            def forward(self, x: Tensor) -> Tensor:
                return self.joint(x).unflatten(0, (len(members), -1)).softmax(-1).mean(0)  # as its routine does

        return Mean().eval()
    joint = import_module("torchensemble").VotingClassifier(estimator=make, n_estimators=len(members), cuda=False)
    joint.estimators_.extend(members)
    return joint.eval()


def evaluation(make: type[nn.Module], x: Tensor, args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Measure predictions: milliseconds, MiB above the weights, and which way was chosen."""
    torch.manual_seed(0)
    members = [make().eval() for _ in range(args.members)]
    ways: dict[str, nn.Module] = {mode: Ensemble(copy.deepcopy(members), mode=mode).eval() for mode in ("loop", "vmap", "auto")}
    ways |= {name: joint_prediction(name, copy.deepcopy(members), make) for name in args.incumbents}
    with torch.inference_mode():
        expected = torch.stack([member(x).softmax(-1) for member in members]).mean(0)
        for name, way in ways.items():
            found = way(x)
            torch.testing.assert_close(found if name in INCUMBENTS else found.softmax(-1), expected, rtol=1e-3, atol=1e-4)
        times = by_turns({name: lambda way=way: way(x) for name, way in ways.items()}, repeats, args.warmup)
        memory = {name: peak(lambda way=way: way(x)) for name, way in ways.items()}
    return {"milliseconds": times, "peak_mib": memory, "chosen": ways["auto"]._faster}


def training(make: type[nn.Module], shape: tuple[int, ...], args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Measure trainings of all members: milliseconds, and which way was chosen."""
    data = TensorDataset(torch.randn(EXAMPLES, *shape), torch.randint(10, (EXAMPLES,)))
    loader, settings = DataLoader(data, args.batch, shuffle=True, drop_last=True), {"max_epochs": EPOCHS, **QUIET}

    def apart() -> None:
        for _ in range(args.members):
            Trainer(**settings).fit(Classifier(make()), loader)

    def together(mode: str) -> str:
        return train_ensemble(lambda: Classifier(make()), loader, args.members, trainer=settings, mode=mode).mode

    def torch_uncertainty() -> None:
        joint = import_module("torch_uncertainty.methods").deep_ensembles(make(), num_estimators=args.members)
        routine = import_module("torch_uncertainty.routines").ClassificationRoutine(
            model=joint,
            num_classes=10,
            loss=nn.CrossEntropyLoss(),
            is_ensemble=True,
            format_batch_fn=import_module("torch_uncertainty.transforms").RepeatTarget(args.members),
            optim_recipe=torch.optim.SGD(joint.parameters(), lr=0.05, momentum=0.9),
        )
        import_module("torch_uncertainty").TUTrainer(**settings).fit(routine, loader)

    def ensemble_pytorch() -> None:
        joint = import_module("torchensemble").VotingClassifier(estimator=make, n_estimators=args.members, cuda=False)
        joint.set_optimizer("SGD", lr=0.05, momentum=0.9)
        with contextlib.redirect_stdout(io.StringIO()):
            joint.fit(loader, epochs=EPOCHS, save_model=False)

    ways = {"Trainer": apart, "loop": lambda: together("loop"), "packed": lambda: together("packed")}
    incumbents = {"torch-uncertainty": torch_uncertainty, "Ensemble-Pytorch": ensemble_pytorch}
    ways |= {name: incumbents[name] for name in args.incumbents}
    return {"milliseconds": by_turns(ways, repeats, min(1, args.warmup)), "chosen": together("auto")}


def times_of(found: dict[str, Any], base: str, names: list[str]) -> list[str]:
    """Return the times of ways as multiples of one of them."""
    times = found["milliseconds"]
    return [f"{times[name] / times[base]:.2f}" if name in times else MISSING for name in names]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, help="default: 8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30, help="rounds; a third of them for trainings, a sixth for the largest model")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="leave the largest model out, and take two members unless told otherwise")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ensembles")
    args = parser.parse_args()
    args.members = args.members or (2 if args.quick else 8)
    args.incumbents = [name for name, module in INCUMBENTS.items() if find_spec(module) is not None]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Lightning's advice on loaders, which stand in memory here
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = list(INCUMBENTS)
    predicting: dict[str, Any] = {}
    fitting: dict[str, Any] = {}
    for name, (make, shape) in MODELS.items():
        large = "ResNet" in name
        if not (large and args.quick):
            predicting[name] = evaluation(make, torch.randn(args.batch, *shape), args, max(1, args.repeats // 6) if large else args.repeats)
        if not large:
            fitting[name] = training(make, shape, args, max(1, args.repeats // 3))
    tables = {
        f"Evaluation of {args.members} members, batches of {args.batch}, against a loop": (
            ("model", "loop, ms", "vmap ×", "auto ×", *(f"{name} ×" for name in names), "chosen"),
            [
                (name, f"{found['milliseconds']['loop']:.2f}", *times_of(found, "loop", ["vmap", "auto", *names]), str(found["chosen"]))
                for name, found in predicting.items()
            ],
        ),
        "Memory at the peak of that evaluation, MiB above the weights": (
            ("model", "loop", "vmap", *names),
            [
                (name, *(f"{found['peak_mib'][way]:.2f}" if way in found["peak_mib"] else MISSING for way in ("loop", "vmap", *names)))
                for name, found in predicting.items()
            ],
        ),
        f"Training of {args.members} members, {EPOCHS * (EXAMPLES // args.batch)} steps each, against Lightning's Trainer in a loop": (
            ("model", "Trainer, ms", "loop ×", "packed ×", *(f"{name} ×" for name in names), "chosen"),
            [
                (name, f"{found['milliseconds']['Trainer']:.0f}", *times_of(found, "Trainer", ["loop", "packed", *names]), found["chosen"])
                for name, found in fitting.items()
            ],
        ),
    }
    body = []
    for title, (header, rows) in tables.items():
        show(title, header, rows)
        body += [f"## {title}", markdown(header, rows)]
    packages = ("torch", "lightning", "lightning-tricks", "torch-uncertainty", "torchensemble")
    command = f"python benchmarks/ensembles.py --repeats {args.repeats} --warmup {args.warmup}"
    circumstances = environment(command, *packages, device="cpu")
    body.append("Medians of CPU time, interleaved, one thread.")
    write(args.output, "Ensembles", circumstances, {"evaluation": predicting, "training": fitting}, body)


if __name__ == "__main__":
    main()
