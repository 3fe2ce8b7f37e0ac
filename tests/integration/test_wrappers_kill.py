"""A process killed at a random step and started again ends where one that was never killed ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contracts.harness import assert_differ, assert_equal

WORKER = Path(__file__).with_name("wrappers_kill_worker.py")


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, WORKER, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.full
def test_a_killed_run_of_nested_wrappers_ends_where_an_uninterrupted_one_ends(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    uninterrupted, process = start(whole), start(killed)
    last = random.Random(os.getpid()).randrange(2, 13)  # noqa: S311
    for line in process.stdout:
        if int(line) >= last:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stdout.close()
    process.stderr.close()
    for each in (start(killed), uninterrupted):
        _, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors[-2000:]
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed)]
    for point in ("trained", "final"):
        assert_equal(ends[0][point], ends[1][point])
    assert_differ(ends[0]["trained"], ends[0]["final"])
