"""A process killed at random steps and started again ends where one that was never killed ends."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from contracts.cases import CASES
from contracts.harness import Worker, assert_equal

WORKER = Path(__file__).with_name("kill_worker.py")


@pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])
def test_killed_runs_end_where_an_uninterrupted_one_ends(case, tmp_path):
    trick, whole, killed = case.trick.__name__, tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    uninterrupted = Worker(WORKER, whole, trick)
    # A run that goes on from the end of an epoch, as after step 5, and is stopped again does not resume exactly without any trick either.
    first = random.choice([2, 7])  # noqa: S311
    steps, reached = (first, random.randrange(first + 1, 14)), []  # noqa: S311
    for step in steps:
        worker = Worker(WORKER, killed, trick)
        reached.append(worker.wait_for(step))
        worker.kill()
    Worker(WORKER, killed, trick).finish()
    uninterrupted.finish()
    assert max(reached) < 15, f"kills at {steps} came too late"
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed)]
    for part in ("trained", "final"):
        assert_equal(ends[0][part], ends[1][part])
