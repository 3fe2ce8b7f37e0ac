"""What masks over weights cost in a training step of one layer, beside the plain layer and other ways to draw them.

Each method computes the same layer, forward and backward. A round runs each once, in an order shuffled with a fixed seed, and ratios
are taken to the plain layer of the same round; the plain layer measured again shows how much noise remains. Times are CPU time of the
process with one thread, elapsed time with several.

Run ``python benchmarks/drop_connect.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import copy
import random
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import lightning_tricks as lt
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable

    Forward = Callable[[Tensor], Any]

RATE = 0.5
HEADER = ("layer", "method", "ms", "× plain", "quartiles")
GOALS = {"ours, one mask": 1.10, "ours, a mask for each example": 2.20}


@dataclass(frozen=True)
class Row:
    """What one method costs in one layer; quartiles are those of the ratio to the plain layer of the same round."""

    layer: str
    method: str
    ms: float
    quartiles: tuple[float, float, float]

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        low, middle, high = (f"{quartile:.2f}" for quartile in self.quartiles)
        return (self.layer, self.method, f"{self.ms:.1f}", middle, f"{low}–{high}")


def masked(layer: nn.Module, granularity: str) -> Forward:
    """Let a copy of a layer drop its weights."""
    twin = copy.deepcopy(layer)
    lt.functional.apply_drop_connect(twin, RATE, granularity=granularity)
    return twin


def by_dropout(layer: nn.Linear) -> Forward:
    """Draw one mask by torch's dropout."""
    return lambda x: functional.linear(x, functional.dropout(layer.weight, RATE), layer.bias)


def by_dropout_for_each(layer: nn.Linear) -> Forward:
    """Draw a mask for each example by torch's dropout, all at once."""

    def forward(x: Tensor) -> Tensor:
        weights = functional.dropout(layer.weight.expand(len(x), -1, -1), RATE)
        return torch.bmm(x, weights.mT) + layer.bias

    return forward


def methods(layer: nn.Module) -> dict[str, Forward]:
    """Return all ways to compute a layer."""
    found: dict[str, Forward] = {
        "plain": layer,
        "plain, measured again": layer,
        "ours, one mask": masked(layer, "batch"),
        "ours, a mask for each example": masked(layer, "example"),
    }
    if isinstance(layer, nn.Linear):
        found |= {"dropout of the weight": by_dropout(layer), "dropout of a weight for each example": by_dropout_for_each(layer)}
    return found


def step(forward: Forward, x: Tensor) -> float:
    """Return the time of a forward and a backward pass, in milliseconds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    x = x.detach().requires_grad_()
    begin = clock()
    output = forward(x)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    return 1e3 * (clock() - begin)


def compare(name: str, layer: nn.Module, x: Tensor, args: argparse.Namespace) -> list[Row]:
    """Measure every method on one layer."""
    ways = methods(layer)
    times: dict[str, list[float]] = {method: [] for method in ways}
    order, shuffler = list(ways), random.Random(0)  # noqa: S311, no secret
    for turn in range(args.warmup + args.repeats):
        shuffler.shuffle(order)
        for method in order:
            took = step(ways[method], x)
            if turn >= args.warmup:
                times[method].append(took)
    rows = []
    for method, measured in times.items():
        low, middle, high = quantiles((t / p for t, p in zip(measured, times["plain"], strict=True)), n=4)
        rows.append(Row(name, method, median(measured), (low, middle, high)))
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count; default: 15")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them; default: 2")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: 1")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="small layers")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    batch, width, tokens = (2, 64, 8) if args.quick else (8, 768, 197)
    goal = f"Linear {width}→{4 * width}, {batch}×{tokens} tokens"
    setups = {
        goal: (nn.Linear(width, 4 * width), torch.randn(batch, tokens, width)),
        f"Conv2d {width // 6}→{width // 6}, 3×3, {batch}×28×28": (
            nn.Conv2d(width // 6, width // 6, 3, padding=1),
            torch.randn(batch, width // 6, 28, 28),
        ),
        f"LSTM {width // 2}→{width // 2}, {batch}×{tokens} tokens": (
            nn.LSTM(width // 2, width // 2, batch_first=True),
            torch.randn(batch, tokens, width // 2),
        ),
    }
    command = shlex.join(
        ["python", "benchmarks/drop_connect.py", *(f"--{key}={getattr(args, key)}" for key in ("repeats", "warmup", "threads"))]
    )
    rows = [row for name, (layer, x) in setups.items() for row in compare(name, layer, x, args)]
    show(f"A training step of one layer, rate {RATE}", HEADER, [row.cells() for row in rows])
    lines = [
        f"{row.layer}: {row.method} takes {row.quartiles[1]:.2f} × the plain layer: "
        f"{'within' if row.quartiles[1] <= GOALS[row.method] else 'NOT within'} {GOALS[row.method]:.2f} ×"
        for row in rows
        if row.layer == goal and row.method in GOALS
    ]
    print("\n".join(lines))
    if args.output is not None:
        circumstances = environment(command, "torch", "lightning-tricks", device="cpu")
        data = {"rows": [asdict(row) for row in rows], "summary": lines}
        write(args.output, "Cost of masks over weights", circumstances, data, [markdown(HEADER, [row.cells() for row in rows]), *lines])


if __name__ == "__main__":
    main()
