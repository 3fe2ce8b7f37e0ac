"""Measures the pass of `functional.standardization_statistics` against bare loading: ``python standardization.py``.

Loading is that of images of unsigned bytes that become floating-point numbers in the data set, as in a real one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_tricks.functional import standardization_statistics
from reporting import environment, show, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HEADER = ("what", "ms", "× loading")


class Images(Dataset[tuple["Tensor", int]]):
    """Random images of bytes."""

    def __init__(self, count: int, size: int) -> None:
        self.images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image in [0, 1] and a label."""
        return self.images[index].float() / 255, index % 10


def load(loader: DataLoader[Any]) -> None:
    """Read all batches."""
    for _ in loader:
        pass


def main() -> None:
    """Time every way, interleaved, and report medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and small images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "standardization")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, size = (64, 16) if arguments.quick else (4096, 32)
    loader = DataLoader(Images(count, size), batch_size=min(128, count))
    ways: dict[str, Callable[[], object]] = {
        "loading": partial(load, loader),
        'per="channel"': partial(standardization_statistics, loader),
        'per="feature"': partial(standardization_statistics, loader, per="feature"),
        "with the covariance of channels": partial(standardization_statistics, loader, covariance=True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(arguments.warmup + arguments.repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if round_ >= arguments.warmup:
                times[name].append(1e3 * (time.process_time() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = [(name, f"{median:.0f}", f"{median / medians['loading']:.2f}") for name, median in medians.items()]
    show("Statistics for standardization", HEADER, rows)
    note = f"{count} images of 3 × {size} × {size}, batches of {loader.batch_size}, no workers; medians of CPU time, one thread."
    table = ["| " + " | ".join(HEADER) + " |", "| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in rows)]
    circumstances = environment("python benchmarks/standardization.py", "torch", device="cpu")
    write(arguments.output, "Statistics for standardization", circumstances, {"ms": medians, "times": times}, [note, "\n".join(table)])


if __name__ == "__main__":
    main()
