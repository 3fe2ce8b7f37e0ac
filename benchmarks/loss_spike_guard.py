"""What LossSpikeGuard is worth where batches are bad now and then, and what it costs.

Worth: a network of two hidden layers learns scikit-learn's digits, 1297 of them, while from the second epoch on 2 % of the batches, other
ones for each seed, are multiplied by 1000 or are not finite; without the guard, with it, and with the Trainer's clipping by norm in its
place. The table shows the accuracy on the other 500, how many batches were bad, and how many steps the guard left out. Cost: the CPU time
of a step's judgement, beside that of a step of a fit, with one thread.

Run ``python benchmarks/loss_spike_guard.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import shlex
import time
import warnings
from importlib import import_module
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import lightning_tricks as lt
from gradient_flow import MODELS, Classifier, Timer
from reporting import environment, markdown, show, write

GOAL = 0.01
SHARE, SIZE, CLIP = 0.02, 32, 1.0
DAMAGES = {"none": 1.0, "×1000": 1000.0, "NaN": float("nan")}
WORTH = ("bad batches", "without, %", "clipped, %", "guarded, %", "bad ones per run", "left out per run")
COST = ("model", "step, ms", "guarding it, ms", "share of a step")


class Digits(pl.LightningModule):
    """Learns digits by SGD with momentum."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(128, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer_with(callbacks: list[Callback], **options: Any) -> pl.Trainer:
    """Make a quiet Trainer on the CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(callbacks=callbacks, max_epochs=1, accelerator="cpu", devices=1, **quiet, **options)


def learn(damage: float, seed: int, epochs: int, callbacks: list[Callback], **options: Any) -> tuple[float, int]:
    """Return the accuracy in percent after training on batches of which some are damaged, and how many were."""
    images, classes = (torch.as_tensor(each) for each in import_module("sklearn.datasets").load_digits(return_X_y=True))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draw)
    x, y = images[order].float() / 16, classes[order]
    held, training = slice(0, 500), torch.arange(500, len(x))
    batches, bad = [], 0
    for epoch in range(epochs):
        for rows in training[torch.randperm(len(training), generator=draw)].split(SIZE):
            spoiled = torch.rand((), generator=draw).item() < SHARE and epoch > 0 and damage != 1.0
            batches.append((x[rows] * damage if spoiled else x[rows], y[rows]))
            bad += spoiled
    torch.manual_seed(seed)
    module = Digits()
    trainer_with(callbacks, **options).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    with torch.no_grad():
        right = module.eval().net(x[held]).argmax(1) == y[held]
    return 100 * right.float().mean().item(), bad


def worth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each seed and kind of damage came to."""
    found = []
    for name, damage in DAMAGES.items():
        for seed in range(args.seeds):
            guard = lt.LossSpikeGuard()
            plain, bad = learn(damage, seed, args.epochs, [])
            clipped, _ = learn(damage, seed, args.epochs, [], gradient_clip_val=CLIP)
            guarded, _ = learn(damage, seed, args.epochs, [guard])
            found.append({"damage": name, "without": plain, "clipped": clipped, "guarded": guarded, "bad": bad, "left out": guard.skipped})
    return found


class Price(Callback):
    """Takes the time of steps on the last gradients of a fit, with the guard and without."""

    def __init__(self, guard: lt.LossSpikeGuard, steps: int, calls: int) -> None:
        self.guard, self.steps, self.calls, self.seconds = guard, steps, calls, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare, after the last batch."""
        if batch_idx < self.steps:
            return
        optimizer = trainer.optimizers[0]

        def guarded() -> None:
            self.guard.on_train_batch_start(trainer, pl_module, batch, 0)
            optimizer.step(closure=lambda: self.guard.on_before_optimizer_step(trainer, pl_module, optimizer))

        def plain() -> None:
            type(optimizer).step(optimizer, closure=lambda: None)

        differences = []
        for _ in range(self.calls):
            begin = time.process_time()
            plain()
            middle = time.process_time()
            guarded()
            differences.append((time.process_time() - middle) - (middle - begin))
        self.seconds = median(differences)


def cost(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return milliseconds of a plain step, and of what the guard adds to one."""
    make, size = MODELS[name]
    times: dict[str, list[float]] = {"step": [], "guard": []}
    for _ in range(args.warmup + args.repeats):
        torch.manual_seed(0)
        data = [(torch.randn(size, 3, 32, 32), torch.randint(10, (size,)))] * (args.steps + 1)
        timer, guard = Timer(), lt.LossSpikeGuard(1e9)
        price = Price(guard, args.steps, args.calls)
        for callbacks in ([timer], [guard, price]):
            trainer_with(callbacks).fit(Classifier(make()), torch.utils.data.DataLoader(data, batch_size=None))
        times["step"].append(1e3 * timer.seconds / args.steps)
        times["guard"].append(1e3 * price.seconds)
    return {kind: each[args.warmup :] for kind, each in times.items()}


def worth_row(name: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return a row of means over seeds."""
    each = {key: mean(run[key] for run in runs) for key in ("without", "clipped", "guarded", "bad", "left out")}
    return (name, *(f"{each[key]:.1f}" for key in each))


def cost_row(name: str, times: dict[str, list[float]]) -> tuple[str, ...]:
    """Return a row of medians over rounds."""
    step, guard = median(times["step"]), median(times["guard"])
    return (name, f"{step:.2f}", f"{guard:.3f}", f"{guard / step:.2%}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="whose cost is measured; default: all")
    parser.add_argument("--seeds", type=int, help="trainings of each kind; default: 3")
    parser.add_argument("--epochs", type=int, help="epochs of each training; default: 20")
    parser.add_argument("--repeats", type=int, help="rounds of the cost that count; default: 3")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them; default: 1")
    parser.add_argument("--steps", type=int, help="steps of a fit; default: 10")
    parser.add_argument("--calls", type=int, help="judgements that are timed in a round; default: 30")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="little of the small model, unless told otherwise")
    args = parser.parse_args()
    args.models = args.models or (["mlp"] if args.quick else list(MODELS))
    for name, default, quick in (("seeds", 3, 1), ("epochs", 20, 1), ("repeats", 3, 2), ("steps", 10, 2), ("calls", 30, 3)):
        setattr(args, name, getattr(args, name) or (quick if args.quick else default))
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options = [f"--{key}={getattr(args, key)}" for key in ("seeds", "epochs", "repeats", "warmup", "steps", "calls")]
    command = shlex.join(["python", "benchmarks/loss_spike_guard.py", "--models", *args.models, *options])
    circumstances = environment(command, "torch", "lightning", "scikit-learn", device="cpu")
    runs, times = worth(args), {name: cost(name, args) for name in args.models}
    worths = [worth_row(name, [run for run in runs if run["damage"] == name]) for name in DAMAGES]
    costs = [cost_row(name, each) for name, each in times.items()]
    title = "LossSpikeGuard(), at its defaults"
    show(f"{title}: accuracy on digits, mean of {args.seeds} seeds", WORTH, worths)
    show(f"{title}: cost", COST, costs)
    verdicts = [
        f"{name}: {share} of a step: {'within' if float(share[:-1]) <= 100 * GOAL else 'NOT within'} {GOAL:.0%}"
        for name, *_, share in costs
    ]
    print("\n".join(verdicts))
    if args.output is not None:
        tables = [f"Accuracy on digits, mean of {args.seeds} seeds", markdown(WORTH, worths), "Cost", markdown(COST, costs), *verdicts]
        write(args.output, title, circumstances, {"runs": runs, "times": times}, tables)


if __name__ == "__main__":
    main()
