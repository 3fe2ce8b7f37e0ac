"""A process killed at a random step and started again ends where one that was never killed ends."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from contracts.harness import Worker, assert_differ, assert_equal

WORKER = Path(__file__).with_name("wrappers_kill_worker.py")


@pytest.mark.full
def test_a_killed_run_of_nested_wrappers_ends_where_an_uninterrupted_one_ends(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    uninterrupted, worker = Worker(WORKER, whole), Worker(WORKER, killed)
    assert worker.wait_for(random.randrange(2, 13)) < 15  # noqa: S311
    worker.kill()
    Worker(WORKER, killed).finish()
    uninterrupted.finish()
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed)]
    for point in ("trained", "final"):
        assert_equal(ends[0][point], ends[1][point])
    assert_differ(ends[0]["trained"], ends[0]["final"])
