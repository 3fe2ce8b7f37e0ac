"""What `WeightDecay` adds to an optimizer's step, beside the least that its arithmetic could cost.

The floor of "decoupled" is one contiguous ``mul_`` over as many elements as decay, that of "l2" and "l1" one contiguous ``add_`` of the
weights to the gradients; "l1" has to make the signs before. Memory in pieces of many sizes is slower than one piece, as one foreach call
shows. Ours is all that the callback does at a step: it looks for new parameters,
sorts out those without a gradient, asks the schedule, and decays. A round runs everything once, in an order shuffled with a fixed seed,
and ratios are taken to the floor of the same round; the floor measured again shows how much noise remains. Times are CPU time of the
process with one thread.

Run ``python benchmarks/weight_decay.py``; ``--quick`` shows that it works; ``--digits`` measures what decay is worth instead, on
scikit-learn's handwritten digits with labels of which some are wrong.
"""

from __future__ import annotations

import argparse
import logging
import random
import shlex
import time
import warnings
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

import lightning as L  # noqa: N812
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from lightning_tricks._core.updates import BeforeUpdate
from lightning_tricks.optimization._decay import MODES, Mode
from lightning_tricks.optimization._decaying import Decays
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Act = Callable[[], object]

LAMBDA, LR = 1e-6, 1e-3  # small, since the same weights decay over and over
MODELS = ("resnet50", "vit_base_patch16_224")
GOAL = 1.15
GRID: tuple[tuple[Mode, float], ...] = (
    *(("decoupled", decay) for decay in (0.0, 0.3, 1.0, 3.0)),
    *(("l2", decay) for decay in (0.001, 0.003, 0.01)),
    *(("l1", decay) for decay in (0.0001, 0.0003, 0.001)),
)
HEADER = ("what", "ms", "× floor", "quartiles")


@dataclass(frozen=True)
class Row:
    """What one way of decaying costs on one model.

    Attributes:
        model: The model's name in timm.
        mode: The mode.
        what: The way.
        ms: Median time, in milliseconds.
        quartiles: Of the ratio to the floor of the same round; the middle one is the median.
    """

    model: str
    mode: Mode
    what: str
    ms: float
    quartiles: tuple[float, float, float]

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        low, middle, high = (f"{quartile:.3f}" for quartile in self.quartiles)
        return (f"{self.mode}, {self.what}", f"{self.ms:.2f}", middle, f"{low}–{high}")


def ours(model: nn.Module, mode: Mode) -> tuple[Act, list[nn.Parameter]]:
    """Return what the callback does at a step, and what decays."""
    trick = lt.WeightDecay(LAMBDA, mode=mode)
    selected = trick._rules.select(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    decays = Decays(optimizer, trick._rules, mode, "refuse", selected, {"*": lambda _: LAMBDA})
    decays.divide()
    decays.attach(lambda: None, lambda: False)
    hook = decays._hooks[-1]
    assert isinstance(hook, BeforeUpdate)
    return lambda: hook._act(0, 1.0), [decayed.parameter for decayed in selected.values()]


def floor(elements: int, mode: Mode) -> Act:
    """Return one contiguous pass over as many elements."""
    weights, gradients = torch.randn(elements), torch.randn(elements)
    return (lambda: weights.mul_(1 - LR * LAMBDA)) if mode == "decoupled" else (lambda: gradients.add_(weights, alpha=LAMBDA))


def foreach(parameters: Sequence[nn.Parameter], mode: Mode) -> Act:
    """Return one call on lists made once, which is what the same memory allows."""
    weights, gradients = [p.detach() for p in parameters], [p.grad for p in parameters if p.grad is not None]
    if mode == "decoupled":
        return lambda: torch._foreach_mul_(weights, 1 - LR * LAMBDA)
    return lambda: torch._foreach_add_(gradients, weights, alpha=LAMBDA)


def compare(name: str, mode: Mode, args: argparse.Namespace) -> list[Row]:
    """Measure one mode on one model."""
    torch.manual_seed(0)
    model: nn.Module = import_module("timm").create_model(name, pretrained=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    act, parameters = ours(model, mode)
    least = floor(sum(parameter.numel() for parameter in parameters), mode)
    ways: dict[str, Act] = {"floor": least, "floor, measured again": least, "one foreach call": foreach(parameters, mode), "ours": act}
    for way in [*ways.values()] * args.warmup:
        way()
    times: dict[str, list[float]] = {what: [] for what in ways}
    order, shuffler = list(ways), random.Random(0)  # noqa: S311, no secret
    for _ in range(args.repeats):
        shuffler.shuffle(order)
        for what in order:
            before = time.process_time()
            ways[what]()
            times[what].append((time.process_time() - before) * 1e3)
    rows = []
    for what, measured in times.items():
        low, middle, high = quantiles((t / f for t, f in zip(measured, times["floor"], strict=True)), n=4)
        rows.append(Row(name, mode, what, median(measured), (low, middle, high)))
    return rows


class Digits(L.LightningModule):
    """A network with far more weights than there are digits to train on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam without any decay of its own."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def digits(seeds: int) -> None:
    """Train with several decays on 400 digits, of which 120 have labels drawn at random; print a table."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    inputs, targets = import_module("sklearn.datasets").load_digits(return_X_y=True)
    x, y = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)
    generator = torch.Generator().manual_seed(0)
    train, validation, test = torch.split(torch.randperm(len(x), generator=generator), [400, 400, len(x) - 800])
    labels = y[train].clone()
    labels[:120] = torch.randint(10, (120,), generator=generator)
    print("| mode | λ | validation | test | weights below 0.001 |\n| --- | ---: | ---: | ---: | ---: |")
    for mode, decay in GRID:
        results = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            module, quiet = Digits(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = L.Trainer(
                max_epochs=60, accelerator="cpu", callbacks=[lt.WeightDecay(decay, mode=mode)], enable_model_summary=False, **quiet
            )
            trainer.fit(module, DataLoader(TensorDataset(x[train], labels), batch_size=50, shuffle=True))
            weights = torch.cat([layer.weight.detach().flatten() for layer in module.net if isinstance(layer, nn.Linear)])
            with torch.no_grad():
                right = [(module.net(x[part]).argmax(1) == y[part]).float().mean() for part in (validation, test)]
            results.append(torch.stack([*right, (weights.abs() < 1e-3).float().mean()]) * 100)
        mean, spread = torch.stack(results).mean(0), torch.stack(results).std(0)
        cells = [f"{value:.1f} ± {deviation:.1f} %" for value, deviation in zip(mean.tolist(), spread.tolist(), strict=True)]
        print(f"| {mode if decay else 'none'} | {decay:g} | {' | '.join(cells)} |", flush=True)


def verdict(rows: Sequence[Row]) -> str:
    """Say whether ours reaches the goal."""
    row = next(row for row in rows if row.what == "ours")
    within = "within" if row.quartiles[1] <= GOAL else "NOT within"
    return f"{row.model}, {row.mode}: ours takes {row.quartiles[1]:.3f} × the floor: {within} {GOAL:.2f} ×"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help=f"names in timm; default: {' '.join(MODELS)}")
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 50")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them; default: 3")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--digits", type=int, metavar="SEEDS", help="measure what decay is worth instead, with as many seeds")
    parser.add_argument("--quick", action="store_true", help="few rounds of the first model, unless told otherwise")
    args = parser.parse_args()
    args.models = args.models or list(MODELS[: 1 if args.quick else None])
    args.repeats = args.repeats or (7 if args.quick else 50)
    torch.set_num_threads(1)
    if args.digits:
        digits(args.digits)
        return
    command = shlex.join(
        ["python", "benchmarks/weight_decay.py", "--models", *args.models, f"--repeats={args.repeats}", f"--warmup={args.warmup}"]
    )
    circumstances = environment(command, "torch", "lightning", "timm", "lightning-tricks", device="cpu")
    print("\n".join(f"{key}: {value}" for key, value in circumstances.items()), flush=True)
    rows: list[Row] = []
    lines: list[str] = []
    for name in args.models:
        found = [compare(name, mode, args) for mode in MODES]
        lines += map(verdict, found)
        rows += (flat := [row for group in found for row in group])
        show(name, HEADER, [row.cells() for row in flat])
    print("\n".join(lines))
    if args.output is not None:
        table = markdown(("model", *HEADER), [(row.model, *row.cells()) for row in rows])
        write(
            args.output, "Cost of weight decay", circumstances, {"rows": [asdict(row) for row in rows], "summary": lines}, [table, *lines]
        )


if __name__ == "__main__":
    main()
