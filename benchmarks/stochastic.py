"""Time of a training step with a rate of 0.4 in every block, beside what could ideally be saved and what others save.

The ideal computes a share of ``1 − p`` of the blocks that can be dropped and all of the rest, whose time is measured with these blocks
passing their input through. Of ResNet-50, four of sixteen blocks change the shape and cannot be dropped.

A round runs everything once, in an order shuffled with a fixed seed, and ratios are taken to the plain step, and to the ideal, of the same
round, so that whatever else the machine does hits all alike. Times are CPU time of the process with one thread, and on CUDA the time
between two events. Times of ``mode="batch"`` depend on what the rounds' draws have dropped.

Run ``python benchmarks/stochastic.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import copy
import random
import shlex
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

import lightning_tricks as lt
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

RATE = 0.4
GOAL = 1.05
MODELS = ("vit_small_patch16_224", "resnet50")
HEADER = ("what", "ms", "× plain", "× ideal")
OURS = 'StochasticDepth, "sample"'


class Passing:
    """Stands in for a block that computes nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


def variants(name: str, device: str) -> dict[str, nn.Module]:
    """Return copies of a timm model that drop in different ways."""
    create = import_module("timm").create_model
    plain = create(name).to(device)
    models: dict[str, nn.Module] = {"plain": plain, "plain, measured again": copy.deepcopy(plain)}
    models["timm DropPath"] = create(name, drop_path_rate=RATE).to(device)
    for module in models["timm DropPath"].modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = RATE
    for what, where in (("", None), (", whole blocks", ["blocks.*", "layer*.?"])):
        models[OURS + what] = copy.deepcopy(plain)
        lt.functional.apply_stochastic_depth(models[OURS + what], RATE, where=where, growth="uniform")
    models['StochasticDepth, "batch"'] = copy.deepcopy(plain)
    report = lt.functional.apply_stochastic_depth(models['StochasticDepth, "batch"'], RATE, mode="batch", growth="uniform")
    models["no such block"] = copy.deepcopy(plain)
    for block in report.rates:
        models["no such block"].get_submodule(block).forward = Passing()
    if not report.branches and not any("drop_path" in key for key, _ in plain.named_modules()):
        del models[OURS + ", whole blocks"]  # which is the same
    return models


def step(model: nn.Module, images: Tensor) -> float:
    """Return the time of one forward and backward pass, in milliseconds."""
    model.zero_grad()
    if images.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        model(images).square().mean().backward()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.process_time()
    model(images).square().mean().backward()
    return 1e3 * (time.process_time() - begin)


def measure(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the times of all rounds that count, by what was measured."""
    torch.manual_seed(0)
    models = variants(name, args.device)
    images = torch.randn(args.batch_size, 3, args.side, args.side, device=args.device)
    times: dict[str, list[float]] = {what: [] for what in models}
    order, shuffler = list(models), random.Random(0)  # noqa: S311, no secret
    for _ in range(args.warmup + args.repeats):
        shuffler.shuffle(order)
        for what in order:
            times[what].append(step(models[what], images))
    times = {what: each[args.warmup :] for what, each in times.items()}
    times["ideal"] = [RATE * none + (1 - RATE) * full for none, full in zip(times["no such block"], times["plain"], strict=True)]
    return times


def rows(times: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    """Return what the table shows: medians over rounds."""

    def ratio(each: Sequence[float], base: str) -> str:
        return f"{median(one / other for one, other in zip(each, times[base], strict=True)):.3f}"

    return [(what, f"{median(each):.0f}", ratio(each, "plain"), ratio(each, "ideal")) for what, each in times.items()]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help=f"names in timm; default: {' '.join(MODELS)}")
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 9")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them; default: 1")
    parser.add_argument("--batch-size", type=int, help="images; default: 10, of which 6 survive")
    parser.add_argument("--side", type=int, help="pixels of an image's side; default: 224")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="few rounds of small models, unless told otherwise")
    args = parser.parse_args()
    args.models = args.models or (["test_vit", "resnet18"] if args.quick else list(MODELS))
    args.repeats = args.repeats or (3 if args.quick else 9)
    args.side = args.side or (160 if args.quick else 224)
    args.batch_size = args.batch_size or (2 if args.quick else 10)
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(1)
    options = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("repeats", "warmup", "batch_size", "side", "device")]
    command = shlex.join(["python", "benchmarks/stochastic.py", "--models", *args.models, *options])
    circumstances = environment(command, "torch", "timm", device=args.device)
    print("\n".join(f"{key}: {value}" for key, value in circumstances.items()), flush=True)
    data: dict[str, dict[str, list[float]]] = {}
    body: list[str] = []
    for name in args.models:
        data[name] = measure(name, args)
        table = rows(data[name])
        show(f"{name}, batch of {args.batch_size}, rate {RATE} in every block", HEADER, table)
        found = float(next(row for row in table if row[0] == OURS)[-1])
        verdict = f"{name}: {OURS} takes {found:.3f} × the ideal: {'within' if found <= GOAL else 'NOT within'} {GOAL} ×"
        print(verdict)
        body += [f"## {name}", markdown(HEADER, table), verdict]
    if args.output is not None:
        write(args.output, f"Stochastic depth, at a rate of {RATE} in every block", circumstances, {"times": data}, body)


if __name__ == "__main__":
    main()
