"""Resumes on three processes what two have written: ``python resharded_worker.py FOLDER``, with the variables of torchrun.

``FOLDER`` is where the checks on two processes kept their checkpoints. Writes ``FOLDER/resharded-RANK.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from contracts.cases import CASES
from contracts.harness import Loader, make_trainer
from contracts.sharded_worker import RANK, make_strategy, model_of, runs_here


class Resumed(Callback):
    """Keeps what the trick has when training starts, and stops there."""

    def on_train_start(self, trainer, pl_module):
        trick = trainer.callbacks[0]
        self.states = [
            {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
            for state in (trick.averaged_state_dict(), trick.raw_state_dict())
        ]
        trainer.should_stop = True


def main() -> None:
    """Compare what was resumed with the whole tensors of a full checkpoint."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, results = Path(sys.argv[1]), {}
    for case in CASES:
        trick = case.make()
        for kind in filter(runs_here, ("fsdp1", "fsdp2")) if trick.follows_weights else ():
            folders = [root / f"{case.trick.__name__}-{kind}" / layout for layout in ("full", "sharded")]
            full = torch.load(folders[0] / "step=7.ckpt", weights_only=True)
            resumed = Resumed()
            torch.manual_seed(0)
            trainer = make_trainer(
                [case.make(), resumed], devices=3, strategy=make_strategy(kind, sharded=True), use_distributed_sampler=False
            )
            trainer.fit(model_of(case, kind), Loader(seed=RANK), ckpt_path=folders[1] / "step=7.ckpt")
            averaged, raw = resumed.states
            entry = full["lightning_tricks"][trick.state_key]
            wanted = {"average": ({**full["state_dict"], **entry["average"]}, averaged), "raw": (entry["raw"], raw)}
            for what, (expected, found) in wanted.items():
                seen = kind == "fsdp1" and RANK > 0  # whose whole tensors rank zero alone gets
                equal = [torch.equal(value, found[name]) for name, value in expected.items() if "running" not in name and not seen]
                results[f"{case.trick.__name__}-{kind}-{what}"] = all(equal) and (seen or len(equal) > 5)
    (root / f"resharded-{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
