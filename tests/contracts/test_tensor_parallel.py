"""The promises under FSDP2 and tensor parallelism at once, on four processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from contracts.cases import CASES
from contracts.harness import launch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("tensor_parallel")
    launch(Path(__file__).with_name("tensor_parallel_worker.py"), root, processes=4)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch runs FSDP2 on accelerators only")
@pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])
def test_on_four_processes(case, results):
    if "tensor parallel" in case.skips:
        pytest.skip(case.skips["tensor parallel"])
    for rank in range(4):
        seen = results[rank][case.trick.__name__]
        assert len(seen) == 5
        assert all(seen.values()), f"rank {rank}: {seen}"
