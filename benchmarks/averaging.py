"""What one update of an exponential moving average costs, beside what others offer and the least it could cost.

The floor is one contiguous ``lerp_`` over as many elements as the model has trainable parameters. Every method averages the same
timm model. A round runs each method once, in an order shuffled with a fixed seed, and ratios are taken to the floor of the same
round, so that whatever else the machine does hits all alike; the floor measured again shows how much noise remains.

Times are CPU time of the process with one thread, elapsed time with several (waiting threads would count), and on CUDA the time
on the device between two events. Lightning, timm and ema-pytorch average buffers too, as is their default. With ``--dtype bfloat16``
ours keeps float32 averages: 10 bytes per element, where the floor and the others move 6.

Run ``python benchmarks/averaging.py``; ``--quick`` shows that it works; ``--training-step`` measures the share of a whole step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shlex
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_tricks.averaging._roster import place_of
from lightning_tricks.averaging._tracks import Storage, Track
from lightning_tricks.functional import ema_decay, ema_update_
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Update = Callable[[], object]

DECAY = 0.999
MODELS = ("resnet50", "vit_base_patch16_224", "convnext_tiny")
GOALS = (1.10, 1.15)
HEADER = ("method", "ms", "× floor", "quartiles", "kept, × model", "peak MiB")


@dataclass(frozen=True)
class Row:
    """What one method costs on one model.

    Attributes:
        model: The model's name in timm.
        method: The method.
        ms: Median time of an update, in milliseconds.
        quartiles: Of the ratio to the floor of the same round; the middle one is the median.
        kept: Memory held between updates, in sizes of the model's trainable parameters; the floor holds weights of its own.
        peak_mib: Memory that an update takes for a moment, in MiB.
    """

    model: str
    method: str
    ms: float
    quartiles: tuple[float, float, float]
    kept: float
    peak_mib: float

    def cells(self) -> tuple[str, ...]:
        """Return what the table shows."""
        low, middle, high = (f"{quartile:.3f}" for quartile in self.quartiles)
        return (self.method, f"{self.ms:.2f}", middle, f"{low}–{high}", f"{self.kept:.2f}", f"{self.peak_mib:.1f}")


# The methods: each is given a model and returns its update.


def floor(model: nn.Module) -> Update:
    """One lerp_ over all elements."""
    current = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    average = current.clone()
    return lambda: average.lerp_(current, 1 - DECAY)


def ours(model: nn.Module) -> Update:
    """What the EMA callback does after an optimizer's step."""
    track = Track((0,), Storage(device=None, dtype=None))
    for name, parameter in model.named_parameters():
        track.follow(name, place_of(model, name, parameter, "keep"))
    track.begin(epoch=0)

    def update() -> None:
        track.steps += 1
        track.update(1 - ema_decay(track.age, DECAY, steps=track.steps - track.latest))

    return update


def ours_functional(model: nn.Module) -> Update:
    """The plain function on lists made once."""
    current = [p.detach() for p in model.parameters()]
    average = [p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in current]
    return lambda: ema_update_(average, current, DECAY)


def timm_ema(model: nn.Module) -> Update:
    """Timm's ModelEmaV3, foreach by default."""
    average = import_module("timm.utils").ModelEmaV3(model, decay=DECAY)
    return lambda: average.update(model)


def ema_pytorch(model: nn.Module) -> Update:
    """The EMA of ema-pytorch at each step, foreach by request."""
    kind = import_module("ema_pytorch").EMA
    update: Update = kind(model, beta=DECAY, update_after_step=0, update_every=1, use_foreach=True, include_online_model=False).update
    return update


def torch_averaged(model: nn.Module, **functions: Any) -> Update:
    """Torch's AveragedModel."""
    average = AveragedModel(model, **functions)
    return lambda: average.update_parameters(model)


def lightning_ema(model: nn.Module) -> Update:
    """Lightning's EMAWeightAveraging, by its own hooks."""
    module = import_module("lightning.pytorch").LightningModule()
    module.model = model
    module.to(next(model.parameters()).device)  # tells it its device
    callback = import_module("lightning.pytorch.callbacks").EMAWeightAveraging(decay=DECAY)
    trainer = SimpleNamespace(global_step=0)
    callback.setup(trainer, module, "fit")

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return update


METHODS: dict[str, Callable[[nn.Module], Update]] = {
    "floor: one lerp_": floor,
    "floor, measured again": floor,
    "ours: EMA": ours,
    "ours: ema_update_": ours_functional,
    "timm ModelEmaV3": timm_ema,
    "ema-pytorch EMA": ema_pytorch,
    "torch AveragedModel, multi": lambda model: torch_averaged(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "torch AveragedModel, avg_fn": lambda model: torch_averaged(model, avg_fn=get_ema_avg_fn(DECAY)),
    "Lightning EMAWeightAveraging": lightning_ema,
}
FLOOR, _, OURS = list(METHODS)[:3]
NEEDS = {timm_ema: "timm>=1.0.9", ema_pytorch: "ema-pytorch>=0.7", lightning_ema: "lightning>=2.6,!=2.6.2,!=2.6.3"}


# Measuring


def milliseconds(run: Update, device: str) -> float:
    """Return a call's time on the CPU, or on the device with the host ahead, so that only what makes the device wait adds to it."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        before = clock()
        run()
        return (clock() - before) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def memory(run: Callable[[], Any], device: str) -> tuple[Any, int, int]:
    """Return a call's result, the bytes it leaves allocated, and the most it held at once."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return result, held, peak


def build_model(name: str, args: argparse.Namespace) -> nn.Module:
    """Return a timm model with random weights."""
    try:
        timm = import_module("timm")
    except ImportError as error:
        msg = f"The models come from timm: pip install '{NEEDS[timm_ema]}'"
        raise SystemExit(msg) from error
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model.to(args.device, getattr(torch, args.dtype))


def compare(name: str, args: argparse.Namespace) -> list[Row]:
    """Measure every method on one model."""
    model = build_model(name, args)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    updates: dict[str, Update] = {}
    kept: dict[str, int] = {}
    for method, build in METHODS.items():
        try:
            updates[method], kept[method], _ = memory(lambda build=build: build(model), args.device)
        except (ImportError, AttributeError) as error:
            if build not in NEEDS:
                raise
            print(f"Without '{method}' ({error}). To include it: pip install '{NEEDS[build]}'")
    for update in [*updates.values()] * args.warmup:
        update()
    peaks = {method: memory(update, args.device)[2] for method, update in updates.items()}
    times: dict[str, list[float]] = {method: [] for method in updates}
    order, shuffler = list(updates), random.Random(0)  # noqa: S311, no secret
    for _ in range(args.repeats):
        shuffler.shuffle(order)
        for method in order:
            times[method].append(milliseconds(updates[method], args.device))
    rows = []
    for method, measured in times.items():
        low, middle, high = quantiles((t / f for t, f in zip(measured, times[FLOOR], strict=True)), n=4)
        rows.append(Row(name, method, median(measured), (low, middle, high), kept[method] / size, peaks[method] / 2**20))
    return rows


def verdict(rows: Sequence[Row]) -> str:
    """Say whether ours reaches the goals on one model."""
    row = next(row for row in rows if row.method == OURS)
    reached = ", ".join(f"{'within' if row.quartiles[1] <= goal else 'NOT within'} {goal:.2f} ×" for goal in GOALS)
    return f"{row.model}: ours takes {row.quartiles[1]:.3f} × the floor: {reached}"


def training_step(name: str, args: argparse.Namespace) -> str:
    """Measure what the update adds to a training step under bfloat16 autocast, from spells of steps with it and without."""
    model = build_model(name, args)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device, dtype=getattr(torch, args.dtype))
    labels = torch.randint(1000, (args.batch_size,), device=args.device)
    update = ours(model)

    def steps(*, averaging: bool) -> None:
        for _ in range(args.steps):
            with torch.autocast(args.device, torch.bfloat16):
                loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if averaging:
                update()

    added = []
    for turn in range(args.warmup + args.repeats):
        took = {on: milliseconds(lambda on=on: steps(averaging=on), args.device) for on in (turn % 2 > 0, turn % 2 < 1)}
        added.append(100 * (took[True] / took[False] - 1))
    low, middle, high = quantiles(added[args.warmup :], n=4)
    return f"{name}: ours adds {middle:.2f} % to a training step of {args.batch_size} images (quartiles {low:.2f} to {high:.2f} %)"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help=f"names in timm; default: {' '.join(MODELS)}")
    parser.add_argument("--repeats", type=int, help="rounds that count; default: 50")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="few rounds of the first model, unless told otherwise")
    parser.add_argument("--training-step", action="store_true", help="measure what an update adds to a training step instead")
    parser.add_argument("--steps", type=int, default=10, help="training steps per measurement; default: 10")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step; default: 128")
    args = parser.parse_args()
    args.models = args.models or list(MODELS[: 1 if args.quick else None])
    args.repeats = args.repeats or (7 if args.quick else 50)
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would note each start and stop
    torch.set_num_threads(args.threads)
    keys = ["repeats", "warmup", "threads", "device", "dtype", *(["steps", "batch_size"] if args.training_step else [])]
    options = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in keys] + ["--training-step"] * args.training_step
    command = shlex.join(["python", "benchmarks/averaging.py", "--models", *args.models, *options])
    circumstances = environment(command, "torch", "lightning", "timm", "ema-pytorch", "lightning-tricks", device=args.device)
    print("\n".join(f"{key}: {value}" for key, value in circumstances.items()), flush=True)
    rows: list[Row] = []
    lines: list[str] = []
    for name in args.models:
        if args.training_step:
            lines.append(training_step(name, args))
        else:
            found = compare(name, args)
            show(name, HEADER, [row.cells() for row in found])
            lines.append(verdict(found))
            rows += found
        gc.collect()  # one model at a time
    print("\n".join(lines))
    if args.output is not None:
        table = [markdown(("model", *HEADER), [(row.model, *row.cells()) for row in rows])] if rows else []
        data = {"rows": [asdict(row) for row in rows], "summary": lines}
        write(args.output, "Cost of averaging weights", circumstances, data, [*table, *lines])


if __name__ == "__main__":
    main()
