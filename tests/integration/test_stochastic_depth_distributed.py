"""All ranks skip the same blocks, and none waits for gradients of what was skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contracts.harness import assert_differ, launch
from contracts.sharded_worker import runs_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stochastic_depth")
    launch(Path(__file__).with_name("stochastic_depth_worker.py"), folder, processes=2)
    return folder


def test_blocks_are_skipped_under_ddp_without_a_search_for_unused_parameters(folder):
    skipping, plain = torch.load(folder / "ddp.pt", weights_only=True)
    assert_differ(skipping, plain)


@pytest.mark.skipif(not runs_here("fsdp2"), reason="this torch runs FSDP2 on accelerators only")
def test_sharded_runs_skip_the_same_blocks(folder):
    (replicated, _), (sharded, _) = (torch.load(folder / f"{kind}.pt", weights_only=True) for kind in ("ddp", "fsdp2"))
    for name, value in replicated.items():
        torch.testing.assert_close(sharded[name], value, msg=name)
