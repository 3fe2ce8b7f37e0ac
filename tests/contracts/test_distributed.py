"""Every promise that more than one process can break, on two. All checks share one pair of processes, whose start takes longest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from contracts.cases import CASES
from contracts.harness import Loader, launch, make_trainer, weights

WORKER = Path(__file__).with_name("distributed_worker.py")
NAMES = [
    line.split()[1].partition("(")[0].removeprefix("check_") for line in WORKER.read_text().splitlines() if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("ddp")
    for case in CASES:
        (root / case.trick.__name__).mkdir()
        torch.manual_seed(0)
        module = case.model()
        module.body[3].p = 0.0
        make_trainer([case.make()]).fit(module, Loader(seed=0), Loader(2, seed=5))
        torch.save(weights(module), root / case.trick.__name__ / "single.pt")
    launch(WORKER, root, processes=2)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", NAMES)
@pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])
def test_on_two_processes(case, check, results):
    for rank in range(2):
        outcome = results[rank][f"{case.trick.__name__}-{check}"]
        assert outcome == "passed", f"rank {rank}:\n{outcome}"
