"""Standardizes on two processes: ``python standardization_worker.py FOLDER``, with the variables of torchrun.

Writes ``FOLDER/RANK.json``: the statistics that each rank ends with, and those that resumed runs with other data end with.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import lightning_tricks as lt
from contracts.cases import CASES
from contracts.harness import Loader, StepCheckpoints, make_trainer
from contracts.sharded_worker import RANK, make_strategy, model_of, runs_here


def fit(kind: str, shift: float, *, sharded: bool = False, folder: Path | None = None, ckpt_path: Path | None = None):
    """Train, and return what standardizes."""
    torch.manual_seed(0)
    case = next(case for case in CASES if case.trick is lt.InputStandardization)
    module = model_of(case, kind)
    keep = [] if folder is None else [StepCheckpoints(folder, 3)]
    strategy = make_strategy(kind, sharded=sharded)
    trainer = make_trainer([lt.InputStandardization(), *keep], devices=2, strategy=strategy, use_distributed_sampler=False, max_epochs=1)
    trainer.fit(module, Loader(size=4 + 3 * RANK, seed=RANK, rank=shift * RANK), ckpt_path=ckpt_path)
    return module.input_standardization


def main() -> None:
    """Train under each strategy, resume with other data, and write down what came out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    for kind in ("ddp", *filter(runs_here, ["fsdp2"])):
        seen: dict[str, list] = {"resumed": []}
        for sharded in (False,) if kind == "ddp" else (False, True):
            folder = root / f"{kind}-{sharded}"
            part = fit(kind, 5, sharded=sharded, folder=folder)
            seen |= {"mean": part.mean.tolist(), "variance": part.std.square().tolist()}
            seen["resumed"].append(fit(kind, 50, sharded=sharded, ckpt_path=folder / "step=3.ckpt").mean.tolist())
        results[kind] = seen
    (root / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
