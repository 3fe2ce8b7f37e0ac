"""Synthesizes one average under every strategy: ``python post_hoc_strategies_worker.py FOLDER``, with the variables of torchrun.

Rank zero writes ``FOLDER/KIND.pt``, with what the callback and the files give.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.distributed.tensor import DTensor

import lightning_tricks as lt
from contracts.cases import CASES
from contracts.sharded_worker import KINDS, RANK, fit, runs_here


def main() -> None:
    """Train, synthesize, and write down what came out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    case = next(case for case in CASES if case.trick is lt.PostHocEMA)
    for kind in ("ddp", *filter(runs_here, KINDS)):
        trick = lt.PostHocEMA(snapshot_every=3, dirpath=folder / kind)
        fit([trick], case, kind)
        synthesized = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in trick.synthesize(0.08).items()}
        if RANK == 0:
            read = lt.functional.synthesize_ema(trick.snapshots[10], 0.08)
            torch.save([synthesized, read], folder / f"{kind}.pt")


if __name__ == "__main__":
    main()
