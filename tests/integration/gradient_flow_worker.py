"""Records gradient flow and fit diagnosis on two processes: ``python gradient_flow_worker.py FOLDER``, with the variables of torchrun.

Writes ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_tricks as lt
from contracts.cases import Case
from contracts.harness import Net
from contracts.sharded_worker import fit, runs_here

RANK = int(os.environ.get("RANK", "0"))
CASE = Case(lt.GradientFlow, acting={}, neutral={}, wrong=(), model=Net)
QUANTITIES = ("grad_norm", "weight_norm", "update_norm")


def main() -> None:
    """Train under each strategy, and write down what was recorded."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = {}
    for kind in [kind for kind in ("ddp", "fsdp1", "fsdp2") if kind == "ddp" or runs_here(kind)]:
        flow, diagnosis = lt.GradientFlow(every=3, heat_map=False), lt.FitDiagnosis()
        fit([flow, diagnosis], CASE, kind)
        results[kind] = {quantity: flow.table(quantity).nan_to_num(-1.0).tolist() for quantity in QUANTITIES}
        results[kind] |= {"layers": flow.layers, "steps": flow.steps, "curves": diagnosis.curves}
    (Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
