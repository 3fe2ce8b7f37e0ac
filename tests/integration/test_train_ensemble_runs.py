"""Members of an ensemble in processes that are killed, and on two ranks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from contracts.harness import Worker, assert_equal, launch

WORKER = Path(__file__).with_name("train_ensemble_worker.py")


def test_a_killed_process_is_continued_with_the_member_and_the_epoch_it_was_in(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    uninterrupted, worker = Worker(WORKER, whole), Worker(WORKER, killed)
    assert worker.wait_for(random.randrange(2, 45)) < 48  # noqa: S311
    worker.kill()
    Worker(WORKER, killed).finish()
    uninterrupted.finish()
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, killed)]
    assert_equal(ends[0]["state"], ends[1]["state"])
    assert torch.equal(ends[0]["predictions"], ends[1]["predictions"])


@pytest.mark.full
def test_two_ranks_share_each_members_bag_and_end_with_the_same_members(tmp_path):
    launch(WORKER, tmp_path, processes=2)
    assert len(list((tmp_path / "members").glob("member-?.safetensors"))) == 3
