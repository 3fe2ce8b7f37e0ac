"""Runs the script of the guide to distributed training on two processes: ``python ranks_worker.py FOLDER``, with the variables of torchrun.

Writes ``FOLDER/RANK.pt``: the final weights of an uninterrupted run, of one that was stopped and resumed, and of one that was sharded.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2] / "docs/guides/code"))

import ranks


def whole(trainer) -> dict[str, torch.Tensor]:
    """Return the averaged weights that a run ends with."""
    state = trainer.callbacks[3].averaged_state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def main() -> None:
    """Run it whole, in two parts, and sharded."""
    warnings.filterwarnings("ignore")
    folder, found = Path(sys.argv[1]), {}
    found["whole"] = whole(ranks.main(folder / "whole"))
    ranks.main(folder / "parts", epochs=2)
    found["parts"] = whole(ranks.main(folder / "parts"))
    if hasattr(torch.cpu.Stream, "record_event"):  # without which FSDP2 runs on accelerators only
        found["fsdp2"] = whole(ranks.main(folder / "fsdp2", strategy="fsdp2"))
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
