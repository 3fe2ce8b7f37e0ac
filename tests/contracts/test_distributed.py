"""Every promise that more than one process can break, on two. All checks share one pair of processes, whose start takes longest."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contracts.cases import CASES
from contracts.harness import Loader, make_trainer, weights

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    torchrun = {"TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, root],
            env={**os.environ, **shared, **torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", NAMES)
@pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])
def test_on_two_processes(case, check, results):
    if check.startswith("fsdp2") and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch runs FSDP2 on accelerators only")
    for rank in range(2):
        outcome = results[rank][f"{case.trick.__name__}-{check}"]
        assert outcome == "passed", f"rank {rank}:\n{outcome}"
