"""A process killed at random steps and started again ends where one that was never killed ends."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contracts.cases import CASES
from contracts.harness import assert_equal

WORKER = Path(__file__).with_name("kill_worker.py")


def start(folder: Path, trick: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, WORKER, folder, trick], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


@pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])
def test_killed_runs_end_where_an_uninterrupted_one_ends(case, tmp_path):
    trick, whole, killed = case.trick.__name__, tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    uninterrupted = start(whole, trick)
    # A run that goes on from the end of an epoch, as after step 5, and is stopped again does not resume exactly without any trick either.
    first = random.choice([2, 7])  # noqa: S311
    steps, reached = (first, random.randrange(first + 1, 14)), []  # noqa: S311
    for step in steps:
        process = start(killed, trick)
        for line in process.stdout:
            reached.append(int(line))
            if reached[-1] >= step:
                break
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        process.stdout.close()
        process.stderr.close()
    finish(start(killed, trick))
    finish(uninterrupted)
    assert max(reached) < 15, f"kills at {steps} came too late"
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed)]
    for part in ("trained", "final"):
        assert_equal(ends[0][part], ends[1][part])
