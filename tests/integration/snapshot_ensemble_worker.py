"""Trains snapshot ensembles under strategies: ``python snapshot_ensemble_worker.py FOLDER``, with the variables of torchrun.

Each rank writes ``FOLDER/KIND-RANK.pt``, with what it predicts, measures and keeps.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import lightning_tricks as lt
from contracts.cases import CASES
from contracts.harness import Loader, assert_equal
from contracts.sharded_worker import RANK, fit, runs_here, whole
from lightning_tricks import errors


def failure(trainer, module) -> str:
    """Return the error that an evaluation ends with."""
    try:
        trainer.validate(module, Loader(2, seed=5 + RANK), verbose=False)
    except (RuntimeError, errors.TrickError) as error:
        return str(error)
    return "none"


def fail_on_second_call(module, inputs, seen: list[int]) -> None:
    """Fail while the second member is lent."""
    seen.append(0)
    if len(seen) == 2:
        message = "in the second member"
        raise RuntimeError(message)


def main() -> None:
    """Train, predict, fail, and write down what came out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    case = next(case for case in CASES if case.trick is lt.SnapshotEnsemble)
    for kind in ("ddp", *filter(runs_here, ["fsdp2"])):
        trick = lt.SnapshotEnsemble(2, weights="average", refresh_batch_norm=2, dirpath=folder / kind)
        module, trained = fit([trick, lt.EMA(0.5, evaluate=False)], case, kind)
        trainer, seen = module.trainer, []
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        predicted = torch.cat(trainer.predict(module, Loader(2, seed=5)))
        assert_equal(whole(module), trained.weights)
        hook = module.neck.register_forward_pre_hook(lambda layer, inputs, seen=seen: fail_on_second_call(layer, inputs, seen))
        failed = [failure(trainer, module)]
        hook.remove()
        assert_equal(whole(module), trained.weights)
        trick.target, trick._answer = "neck", None  # whose weights the whole model has gathered when it is called
        failed.append(failure(trainer, module))
        assert_equal(whole(module), trained.weights)
        files = [list(member.files) for member in trick._members]
        torch.save({"predicted": predicted, "logged": logged, "failed": failed, "files": files}, folder / f"{kind}-{RANK}.pt")


if __name__ == "__main__":
    main()
