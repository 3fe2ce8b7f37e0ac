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
    first = random.choice([2, 7])  # noqa: S311
    for step in (first, random.randrange(first + 1, 14)):  # noqa: S311
        worker = Worker(WORKER, killed, trick)
        worker.wait_for(step)
        worker.kill()
        lose_the_latest(killed)
    Worker(WORKER, killed, trick).finish()
    uninterrupted.finish()
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed)]
    for part in ("trained", "final"):
        assert_equal(ends[0][part], ends[1][part])


def lose_the_latest(folder: Path) -> None:
    """Delete the latest checkpoints, if a kill that came late has left one of the last steps or of the end of an epoch.

    A run that goes on from the end of an epoch and is stopped again does not resume exactly without any trick either.
    """
    for path in sorted(folder.glob("step=*.ckpt"), key=lambda path: -int(path.stem.partition("=")[2])):
        step = int(path.stem.partition("=")[2])
        if step < 14 and step % 5:
            return
        path.unlink()
