"""Skips blocks on two processes: ``python stochastic_depth_worker.py FOLDER``, with the variables of torchrun.

Rank zero writes ``FOLDER/KIND.pt``, the weights after training with and without the trick.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import lightning_tricks as lt
from contracts.cases import CASES
from contracts.sharded_worker import RANK, fit, runs_here


def main() -> None:
    """Train under each strategy, and write down what came out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.trick is lt.StochasticDepth)
    for kind in ("ddp", *filter(runs_here, ["fsdp2"])):
        trained = [fit(tricks, case, kind)[1].weights for tricks in ([lt.StochasticDepth(0.5, mode="batch")], [])]
        if RANK == 0:
            torch.save(trained, Path(sys.argv[1]) / f"{kind}.pt")


if __name__ == "__main__":
    main()
