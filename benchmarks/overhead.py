"""What every trick costs: time of a training step, peak memory and time of imports, each as a ratio to Lightning alone.

The list of callbacks, and that of wrappers of optimizers, is the package's own; ``ARGUMENTS`` says how they are made where defaults are not
enough. A fit has ``--warmup`` steps, then ``--steps`` that are timed, a last one, and a validation. Each round runs, for each trick, one
fit without it and one with it, next to each other and in random order, so that whatever else the machine does hits both alike. A ratio is
that of the medians over rounds, its quartiles are those of the rounds' ratios; the first row, which compares no trick with none, shows
what of that is noise. ``added`` is the difference of a step, ``once`` that of all outside the timed steps: setup, a pass over the data,
what is evaluated or stored at the end.

Times are CPU time of the process with one thread, and beside it the time that passed; on CUDA the latter counts, until the device is done.
Memory is the most that tensors held at once from before the model was made to the end of the fit, as torch's allocators count it, CUDA's,
or through the profiler the CPU's. Tensors take the same in each round, so that one tells it; what Python, the file system and kernels' own
buffers take is not in it. Imports are timed by ``python -X importtime``: the package in fresh processes, in turns with ``lightning``; and
what a fit with a trick imports after one without it.

``--whole-run`` compares whole fits instead, of ResNet-18 on 128 images of 32 by 32 pixels per step: with OptimizerFactory, WeightDecay
and EMA, with the same optimizer, decay and schedule written by hand, and with these again.

Run ``python benchmarks/overhead.py``; ``--quick`` shows that it works, and times no imports.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_tricks as lt
from averaging import memory
from fits import Clock, Module, Scheduled, loaders, network, trainer_with
from gradient_flow import resnet18
from lightning_tricks import optim, schedules, transforms
from lightning_tricks._core.trick import Trick
from lightning_tricks.optimization._wrapping import WrapperRecipe
from reporting import environment, markdown, show, write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Times = dict[str, list[float]]

GOAL = 1.01
NONE = "no trick, measured again"
WIDTHS = {"small": [16, 16, 32, 64], "resnet18": [64, 64, 64, 128, 128, 256, 256, 512, 512]}
SGD = optim.SGD(lr=0.01, momentum=0.9)
ARGUMENTS: dict[type, dict[str, Any]] = {
    lt.ActivationSwap: {"source": "relu", "target": "gelu"},
    lt.BatchAugmentation: {"transforms": [transforms.Crop(padding=4), transforms.Flip()]},
    lt.BatchNormFreeze: {"start": 0},
    lt.CheckpointEnsemble: {"members": 1},
    lt.DropBlock: {"rate": 0.1, "block_size": 3, "where": "net.layers.1"},
    lt.DropConnect: {"rate": 0.1},
    lt.Dropout: {"rate": 0.1, "after": "net.stem"},
    lt.FastGeometricEnsemble: {"members": 1},
    lt.FeatureNoise: {"std": 0.1, "where": "net.stem"},
    lt.FineTuning: {"stages": {"0%": "net.head"}},
    lt.GradientFlow: {"every": 10},
    lt.Initialization: {"scheme": "kaiming_normal"},
    lt.LatestWeightAveraging: {"every": 2},
    lt.LinearProbe: {"stages": "net.layers.*"},
    lt.NormSwap: {"source": "batch", "target": "group"},
    lt.OptimizerFactory: {"recipe": SGD, "schedule": schedules.Cosine()},
    lt.PolyakAveraging: {"start": 0},
    lt.PostHocEMA: {"snapshot_every": "100%"},
    lt.SnapshotEnsemble: {"members": 1},
    lt.StochasticDepth: {"rate": 0.2},
    lt.WeightDecay: {"weight_decay": 5e-4},
}
CONTINUOUS = {"TargetStandardization"}  # whose targets are numbers rather than classes
KINDS, AROUND = ("cpu", "elapsed"), "around"
PLAIN, AGAIN, OURS = "plain", "plain, measured again", "OptimizerFactory, WeightDecay, EMA"
HEADER = ("trick", "CPU, ×", "quartiles", "elapsed, ×", "quartiles", "added, ms", "once, ms", "memory, ×")
WHOLE_HEADER = ("run", "CPU, s", "CPU, ×", "quartiles", "elapsed, s", "elapsed, ×", "quartiles")


def public_tricks() -> dict[str, Callable[[], list[Callback]]]:
    """Return what makes no trick, each public callback, and each wrapper of optimizers around SGD, by name."""
    callbacks = [each for each in map(vars(lt).get, lt.__all__) if isinstance(each, type) and issubclass(each, Trick)]
    wrappers = [each for each in map(vars(optim).get, optim.__all__) if isinstance(each, type) and issubclass(each, WrapperRecipe)]
    return {
        NONE: list,
        **{each.__name__: lambda each=each: [each(**ARGUMENTS.get(each, {}))] for each in callbacks},
        **{each.__name__: lambda each=each: [lt.OptimizerFactory(each(SGD))] for each in wrappers},
    }


TRICKS = public_tricks()


# Measuring


def prepare(name: str, args: argparse.Namespace, *, acting: bool) -> tuple[Callable[[], None], Clock]:
    """Return a fit that trains what suits a trick, with it or without it, and what will know the times."""
    torch.manual_seed(0)
    images, targets, loss = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,)), nn.functional.cross_entropy
    if name in CONTINUOUS:
        targets, loss = torch.randn(args.batch_size, 10), nn.functional.mse_loss
    clock = Clock(args.warmup, args.steps)

    def run() -> None:
        torch.manual_seed(0)
        module, data = Module(network(WIDTHS[args.model]), loss), loaders(images, targets, args.warmup + args.steps + 1)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_with([*(TRICKS[name]() if acting else []), clock], folder, args.device)
            clock.read()
            trainer.fit(module, *data)
            clock.read()

    gc.collect()  # what the last fit has left
    return run, clock


def times_of(name: str, args: argparse.Namespace, *, acting: bool) -> tuple[float, float, float]:
    """Return milliseconds of a step, those of the processor and those that passed, and of all around the steps."""
    run, clock = prepare(name, args, acting=acting)
    run()
    begin, first, last, end = clock.times
    outside = [first[i] - begin[i] + end[i] - last[i] for i in range(2)]
    cpu, elapsed = (1e3 * (last[i] - first[i]) / args.steps for i in range(2))
    return cpu, elapsed, 1e3 * outside[args.device == "cuda"]


def interleaved(names: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Times]]:
    """Return what each round took, by trick, with it and without it."""
    kinds = (*KINDS, AROUND)
    found = {name: {which: {kind: [] for kind in kinds} for which in ("without", "with")} for name in names}
    shuffler = random.Random(0)  # noqa: S311, no secret
    for turn in range(args.rounds + 1):
        for name in names:
            for which in shuffler.sample(("without", "with"), 2):
                times = times_of(name, args, acting=which == "with")
                if turn > 0:  # the first round warms up
                    for kind, each in zip(kinds, times, strict=True):
                        found[name][which][kind].append(each)
    return found


def peaks(name: str, args: argparse.Namespace) -> dict[str, int]:
    """Return the most bytes that tensors held at once in a fit, without a trick and with it."""
    return {which: memory(prepare(name, args, acting=which == "with")[0], args.device)[2] for which in ("without", "with")}


# Imports


def timed_imports(code: str) -> list[tuple[float, float, str]]:
    """Return milliseconds of each import in a fresh process, alone and with what it imports in turn, and its name."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return read_imports(done.stderr)


def read_imports(text: str) -> list[tuple[float, float, str]]:
    """Return milliseconds of each import that ``-X importtime`` tells, alone and with what it imports in turn, and its name."""
    lines = re.findall(r"import time: +(\d+) \| +(\d+) \| +(\S+)", text)
    return [(int(alone) / 1e3, int(together) / 1e3, name) for alone, together, name in lines]


def package_imports(rounds: int) -> Times:
    """Return milliseconds that the imports of Lightning, and of this package with it, take in fresh processes, in turns."""
    found: Times = {"lightning": [], "lightning_tricks": []}
    for turn in range(rounds + 1):
        for name, times in found.items():
            together = {module: ms for _, ms, module in timed_imports(f"import {name}")}
            if turn > 0:  # the first round reads files into memory
                times.append(together[name])
    return found


def trick_imports(names: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the modules that a fit with each trick imports after one without, with milliseconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        given = (list(names), folder, args.model, args.batch_size)
        timed_imports(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import overhead; overhead.note_imports(*{given!r})")
        texts = {name: Path(folder, str(i)).read_text() for i, name in enumerate(names)}
    return {name: {module: alone for alone, _, module in read_imports(text)} for name, text in texts.items()}


def note_imports(names: Sequence[str], folder: str, model: str, batch_size: int) -> None:
    """Write what fits with tricks import, each in a process of its own that forks from this one, which has imported all before."""
    torch.set_num_threads(1)
    args = argparse.Namespace(model=model, batch_size=batch_size, warmup=1, steps=3, device="cpu")
    for i, name in enumerate(names):
        if (child := os.fork()) == 0:
            warnings.filterwarnings("ignore")
            prepare(name, args, acting=False)[0]()
            with Path(folder, str(i)).open("w") as file:
                os.dup2(file.fileno(), sys.stderr.fileno())
            prepare(name, args, acting=True)[0]()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(name + ": " + Path(folder, str(i)).read_text()[-3000:])


# Whole runs


def whole_run(*, acting: bool, args: argparse.Namespace) -> tuple[float, float]:
    """Return seconds of a fit of ResNet-18 with its validation, those of the processor and those that passed."""
    torch.manual_seed(0)
    data = loaders(torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,)), args.steps)
    options = {"rate": 0.1, "loss": nn.functional.cross_entropy}
    tricks: list[Callback] = []
    if acting:
        factory = lt.OptimizerFactory(optim.SGD(lr=0.1, momentum=0.9), schedule=schedules.Cosine())
        tricks = [factory, lt.WeightDecay(5e-4), lt.EMA(half_life="500 steps")]
    module = Module(resnet18(), **options) if acting else Scheduled(resnet18(), weight_decay=5e-4, **options)
    gc.collect()
    clock = Clock(0, 0)
    with tempfile.TemporaryDirectory() as folder:
        clock.read()
        trainer_with(tricks, folder, args.device).fit(module, *data)
        clock.read()
    return clock.times[1][0] - clock.times[0][0], clock.times[1][1] - clock.times[0][1]


def whole_runs(args: argparse.Namespace) -> dict[str, Times]:
    """Return seconds of all rounds, by what ran."""
    found: dict[str, Times] = {name: {kind: [] for kind in KINDS} for name in (PLAIN, AGAIN, OURS)}
    order, shuffler = list(found), random.Random(0)  # noqa: S311, no secret
    whole_run(acting=True, args=args)  # warms up
    for _ in range(args.rounds):
        shuffler.shuffle(order)
        for name in order:
            for kind, seconds in zip(KINDS, whole_run(acting=name == OURS, args=args), strict=True):
                found[name][kind].append(seconds)
    return found


# Tables


def ratio(those: Sequence[float], these: Sequence[float]) -> tuple[float, str]:
    """Return the ratio of medians, and the quartiles of the rounds' ratios as text."""
    low, _, high = quantiles((a / b for a, b in zip(those, these, strict=True)), n=4, method="inclusive")
    return median(those) / median(these), f"{low:.3f}–{high:.3f}"


def row(name: str, times: Mapping[str, Times], held: Mapping[str, int], args: argparse.Namespace) -> tuple[str, ...]:
    """Return what the table shows of a trick, but for its imports."""
    ratios = [ratio(times["with"][kind], times["without"][kind]) for kind in KINDS]
    clock = KINDS[args.device == "cuda"]
    added, once = (median(a - b for a, b in zip(times["with"][kind], times["without"][kind], strict=True)) for kind in (clock, AROUND))
    cells = [cell for over, quartiles in ratios for cell in (f"{over:.3f}", quartiles)]
    return name, *cells, f"{added:.2f}", f"{once:.0f}", f"{held['with'] / held['without']:.3f}"


def heaviest(modules: Mapping[str, float]) -> str:
    """Return the milliseconds of packages that a trick imports, the slowest first, without those below one."""
    packages: dict[str, float] = {}
    for module, ms in modules.items():
        top = module.partition(".")[0]
        packages[top] = packages.get(top, 0) + ms
    return ", ".join(f"{top} {ms:.0f}" for top, ms in sorted(packages.items(), key=lambda each: -each[1]) if ms >= 1)


def tricks_report(args: argparse.Namespace) -> tuple[str, dict[str, Any], list[str]]:
    """Measure the tricks, and return a title, the data and the text."""
    title = f"What tricks cost: {args.model}, {args.batch_size} images of 32 × 32 pixels in a step"
    held = {name: peaks(name, args) for name in args.tricks}
    times = interleaved(args.tricks, args)
    made = {name: ", ".join(map(repr, TRICKS[name]())) for name in args.tricks}
    data: dict[str, Any] = {"made": made, "times": times, "peaks": held}
    header, rows = HEADER, [row(name, times[name], held[name], args) for name in args.tricks]
    columns, notes = [("trick", "made as"), *((name, f"`{text}`") for name, text in made.items() if text)], []
    if args.import_rounds:
        package, modules = package_imports(args.import_rounds), trick_imports(args.tricks, args)
        data |= {"imports": package, "modules": modules}
        over, quartiles = ratio(package["lightning_tricks"], package["lightning"])
        lightning, ours = (median(package[name]) for name in ("lightning", "lightning_tricks"))
        header = (*header, "imports, ×")
        rows = [(*cells, f"{(ours + sum(modules[cells[0]].values())) / lightning:.3f}") for cells in rows]
        columns = [(*columns[0], "imports besides, ms"), *((*cells, heaviest(modules[cells[0]])) for cells in columns[1:])]
        notes.append(
            f"Imports take {lightning:.0f} ms for `lightning`, and {over:.3f} × that with `lightning_tricks` (quartiles {quartiles})."
        )
    show(title, header, rows)
    print("\n".join(notes))
    return title, data, [markdown(header, rows), *notes, markdown(columns[0], columns[1:])]


def whole_report(args: argparse.Namespace) -> tuple[str, dict[str, Any], list[str]]:
    """Measure whole runs, and return a title, the data and the text."""
    found = whole_runs(args)
    title = f"Whole runs of ResNet-18: {args.steps} steps of {args.batch_size} images of 32 × 32 pixels"
    rows = []
    for name, times in found.items():
        cells = []
        for kind in KINDS:
            over, quartiles = ratio(times[kind], found[PLAIN][kind])
            cells += [f"{median(times[kind]):.2f}", f"{over:.4f}", quartiles]
        rows.append((name, *cells))
    show(title, WHOLE_HEADER, rows)
    kind = KINDS[args.device == "cuda"]
    over, noise = (ratio(found[name][kind], found[PLAIN][kind])[0] for name in (OURS, AGAIN))
    within = "within" if over <= GOAL else "NOT within"
    verdict = f"{OURS} takes {over:.4f} × the plain run, {within} {GOAL} ×; the plain run, measured again, takes {noise:.4f} ×."
    print(verdict)
    return title, {"runs": found}, [markdown(WHOLE_HEADER, rows), verdict]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole-run", action="store_true", help="compare whole runs of ResNet-18 instead")
    parser.add_argument("--tricks", nargs="+", choices=list(TRICKS), metavar="TRICK", help="names in the table; default: all")
    parser.add_argument("--model", choices=list(WIDTHS), default="small", help="of the table; default: small")
    parser.add_argument("--rounds", type=int, help="that count, at least 2; default: 7")
    parser.add_argument("--warmup", type=int, default=3, help="first steps of a fit that do not count, at least 1; default: 3")
    parser.add_argument("--steps", type=int, help="steps of a fit that count; default: 10, of whole runs 3")
    parser.add_argument("--batch-size", type=int, help="images in a step; default: 32, of whole runs 128")
    parser.add_argument("--import-rounds", type=int, help="imports of the package, at least 2, or 0 to time none at all; default: 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="where to write; gives PATH.json and PATH.md")
    parser.add_argument("--quick", action="store_true", help="little of everything, unless told otherwise")
    args = parser.parse_args()
    args.tricks = [NONE, *(name for name in args.tricks or TRICKS if name != NONE)]
    defaults = {"rounds": (7, 7, 2), "steps": (3, 10, 2), "batch_size": (128, 32, 2), "import_rounds": (0, 4, 0)}
    for name, (whole, table, quick) in defaults.items():
        given = getattr(args, name)
        setattr(args, name, given if given is not None else (quick if args.quick else whole if args.whole_run else table))
    if min(args.rounds - 1, args.warmup, args.steps, args.batch_size) < 1 or args.import_rounds < 0 or args.import_rounds == 1:
        parser.error(
            "two rounds, of imports too, a step that warms up and one that counts, of an image, are the least that can be measured"
        )
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would note each start and stop
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keys = ["rounds", "steps", "batch_size", "device"] + ([] if args.whole_run else ["model", "warmup", "import_rounds"])
    which = ["--whole-run"] if args.whole_run else [] if set(args.tricks) == set(TRICKS) else ["--tricks", *args.tricks[1:]]
    options = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in keys]
    command = shlex.join(["python", "benchmarks/overhead.py", *which, *options])
    circumstances = environment(command, "torch", "lightning", "lightning-tricks", device=args.device)
    print("\n".join(f"{key}: {value}" for key, value in circumstances.items()), flush=True)
    title, data, body = (whole_report if args.whole_run else tricks_report)(args)
    if args.output is not None:
        write(args.output, title, circumstances, data, body)


if __name__ == "__main__":
    main()
