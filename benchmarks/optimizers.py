"""What a step of an optimizer costs when a recipe built it, beside the bare optimizer of torch built by hand.

A family compares its methods with its first one, the base. All methods of a family step the same parameters with the same gradients and
one state, so that none is luckier than another with its place in memory. A round runs each method once, in an order shuffled with a fixed
seed, and ratios are taken to the base of the same round, so that whatever else the machine does hits all alike; the base measured again
shows how much noise remains.

Times are CPU time of the process with one thread, elapsed time with several, and on CUDA the time on the device between two events.
By hand means what a careful user writes: two groups, those of the recipe, with fused kernels asked for.

Run ``python benchmarks/optimizers.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import gc
import random
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

from averaging import build_model, milliseconds
from lightning_tricks import optim
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    Step = Callable[[], object]

MODELS = ("resnet50", "vit_base_patch16_224")
HEADER = ("family", "method", "ms", "× base", "quartiles", "groups")
AGAIN = "base, measured again"


@dataclass(frozen=True)
class Row:
    """What one method costs on one model.

    Attributes:
        model: The model's name in timm.
        family: What is compared.
        method: The method.
        ms: Median time of a step, in milliseconds.
        quartiles: Of the ratio to the base of the same round; the middle one is the median.
        groups: Groups of parameters.
    """

    model: str
    family: str
    method: str
    ms: float
    quartiles: tuple[float, float, float]
    groups: int

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        low, middle, high = (f"{quartile:.3f}" for quartile in self.quartiles)
        return (self.family, self.method, f"{self.ms:.2f}", middle, f"{low}–{high}", str(self.groups))


# The methods: each is given a model and returns its optimizer.


def by_hand(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Two groups: matrices and kernels decay, vectors do not."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        decay = [parameter for parameter in model.parameters() if parameter.ndim in {2, 4}]
        rest = [parameter for parameter in model.parameters() if parameter.ndim not in {2, 4}]
        return kind([{"params": decay}, {"params": rest, "weight_decay": 0.0}], **options)

    return build


def as_torch_has_it(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """All parameters in one group, and the kernels that torch chooses."""
    return lambda model: kind(model.parameters(), **options)


SGD = {"lr": 1e-6, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
ADAMW = {"lr": 1e-6, "weight_decay": 0.05}
FAMILIES: Mapping[str, Mapping[str, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "SGD": {
        "by hand, fused": by_hand(torch.optim.SGD, **SGD, fused=True),
        AGAIN: by_hand(torch.optim.SGD, **SGD, fused=True),
        "recipe": optim.SGD(**SGD).build,
        "torch's defaults": as_torch_has_it(torch.optim.SGD, **SGD),
    },
    "AdamW": {
        "by hand, fused": by_hand(torch.optim.AdamW, **ADAMW, fused=True),
        AGAIN: by_hand(torch.optim.AdamW, **ADAMW, fused=True),
        "recipe": optim.AdamW(**ADAMW).build,
        "recipe, layer_decay=0.75": optim.AdamW(**ADAMW, layer_decay=0.75).build,
        "torch's defaults": as_torch_has_it(torch.optim.AdamW, **ADAMW),
    },
    "AdamW, for-loop": {
        "by hand": by_hand(torch.optim.AdamW, **ADAMW, foreach=False),
        AGAIN: by_hand(torch.optim.AdamW, **ADAMW, foreach=False),
        "recipe": optim.AdamW(**ADAMW, implementation="for-loop").build,
    },
}
"""What is compared; the first method of each family is its base."""
GOALS: Mapping[tuple[str, str], float] = {(family, "recipe"): 1.02 for family in FAMILIES}
"""The most that a method of a family may take, in times its base."""


# Measuring


def compare(name: str, family: str, model: nn.Module, args: argparse.Namespace) -> list[Row]:
    """Measure the methods of one family on one model."""
    built = {method: build(model) for method, build in FAMILIES[family].items()}
    steps: dict[str, Step] = {method: optimizer.step for method, optimizer in built.items()}
    next(iter(steps.values()))()
    for optimizer in built.values():
        optimizer.state = next(iter(built.values())).state
    for step in [*steps.values()] * args.warmup:
        step()
    times: dict[str, list[float]] = {method: [] for method in steps}
    order, shuffler = list(steps), random.Random(0)  # noqa: S311, no secret
    base = order[0]
    for _ in range(args.repeats):
        shuffler.shuffle(order)
        for method in order:
            times[method].append(milliseconds(steps[method], args.device))
    rows = []
    for method, measured in times.items():
        low, middle, high = quantiles((t / b for t, b in zip(measured, times[base], strict=True)), n=4)
        rows.append(Row(name, family, method, median(measured), (low, middle, high), len(built[method].param_groups)))
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Say of each goal whether it is reached."""
    found = []
    for row in rows:
        goal = GOALS.get((row.family, row.method))
        if goal is not None:
            reached = "within" if row.quartiles[1] <= goal else "NOT within"
            found.append(f"{row.model}, {row.family}: {row.method} takes {row.quartiles[1]:.3f} × the base: {reached} {goal:.2f} ×")
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help=f"names in timm; default: {' '.join(MODELS)}")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="default: all")
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 50")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="few rounds of the first model, unless told otherwise")
    args = parser.parse_args()
    args.models = args.models or list(MODELS[: 1 if args.quick else None])
    args.repeats = args.repeats or (7 if args.quick else 50)
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(args.threads)
    options = [f"--{key}={getattr(args, key)}" for key in ("repeats", "warmup", "threads", "device", "dtype")]
    command = shlex.join(["python", "benchmarks/optimizers.py", "--models", *args.models, "--families", *args.families, *options])
    circumstances = environment(command, "torch", "timm", "lightning-tricks", device=args.device)
    print("\n".join(f"{key}: {value}" for key, value in circumstances.items()), flush=True)
    rows: list[Row] = []
    for name in args.models:
        model = build_model(name, args)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        found = [row for family in args.families for row in compare(name, family, model, args)]
        show(name, HEADER, [row.cells() for row in found])
        rows += found
        del model
        gc.collect()  # one model at a time
    lines = verdicts(rows)
    print("\n".join(lines))
    if args.output is not None:
        table = markdown(("model", *HEADER), [(row.model, *row.cells()) for row in rows])
        data = {"rows": [asdict(row) for row in rows], "summary": lines}
        write(args.output, "Cost of optimizer steps", circumstances, data, [table, *lines])


if __name__ == "__main__":
    main()
