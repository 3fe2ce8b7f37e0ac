"""Let an example run on one process or on several: what `--strategy` says, and a Trainer to go with it.

`auto` is one process. `ddp` is two that keep a whole model each. `model_parallel` is two that keep a part of each weight (FSDP2). Both
begin the second process by themselves, need no GPU, and train as one process does: each takes its share of every batch.
"""

import argparse
import csv
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

PROCESSES = {"auto": 1, "ddp": 2, "model_parallel": 2}


def command_line(doc: str | None, output: str) -> argparse.ArgumentParser:
    """Return a parser with what all these examples understand."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategy", choices=PROCESSES, default="auto", help="one process, or two in one of two ways (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for the results (default: %(default)s)")
    return parser


def positive(text: str) -> int:
    """Read a whole number of at least one from the command line."""
    number = int(text)
    if number < 1:
        message = f"must be at least 1, got {number}"
        raise argparse.ArgumentTypeError(message)
    return number


def counted(number: int, thing: str) -> str:
    """Return a number of things in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def spread(values: Sequence[float], value: str, deviation: str) -> str:
    """Return mean and standard deviation in two formats, or of a single value that alone."""
    return f"{mean(values):{value}} ± {stdev(values):{deviation}}" if len(values) > 1 else f"{values[0]:{value}}"


def make_trainer(
    options: argparse.Namespace, callbacks: Sequence[Callback], *, epochs: int, validate_every: float = 1, losses: int = 1
) -> Trainer:
    """Return a Trainer that is silent and keeps nothing but what the callbacks keep."""
    quiet()
    several = {
        # Where a step has several losses, each has weights that take no part in it.
        "ddp": DDPStrategy(process_group_backend="gloo", find_unused_parameters=losses > 1),
        "model_parallel": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    }
    return Trainer(
        accelerator="cpu",
        devices=PROCESSES[options.strategy],
        strategy=several.get(options.strategy, "auto"),
        callbacks=list(callbacks),
        max_epochs=epochs,
        check_val_every_n_epoch=max(1, int(validate_every)),
        val_check_interval=min(1.0, validate_every),
        default_root_dir=options.output,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def share(options: argparse.Namespace, batch_size: int) -> int:
    """Return how much of a batch each process takes."""
    return batch_size // PROCESSES[options.strategy]


def shard(module: LightningModule, *parts: nn.Module) -> None:
    """Spread the weights of some parts over the processes, where the strategy wants it: for `configure_model`."""
    if module.device_mesh is not None:
        for part in parts:
            if not isinstance(part, FSDPModule):  # `configure_model` is called again for every fit and every test
                fully_shard(part, mesh=module.device_mesh["data_parallel"])


@rank_zero_only
def report(title: str, rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Print results as a table, and write them to a CSV file, from the first process alone."""
    table = Table(title=title)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print("", table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    Console().print(f"Table and picture: {path.parent}", soft_wrap=True, highlight=False)


def quiet() -> None:
    """Silence what needs no attention here."""
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # data in memory, which workers would only copy
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):  # which say what devices and seeds there are
        logging.getLogger(name).setLevel(logging.WARNING)


def one_thread() -> None:
    """Let torch compute on one core, since on networks this small threads wait for each other longer than they compute."""
    torch.set_num_threads(1)
