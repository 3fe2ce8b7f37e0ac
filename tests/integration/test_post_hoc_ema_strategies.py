"""The average that PostHocEMA synthesizes is the same under every strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contracts.harness import launch
from contracts.sharded_worker import KINDS, runs_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("post_hoc_strategies")
    launch(Path(__file__).with_name("post_hoc_strategies_worker.py"), folder, processes=2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_synthesis_equals_that_under_ddp(kind, folder):
    if not runs_here(kind):
        pytest.skip(f"{kind} does not run on the CPU here")
    expected, _ = torch.load(folder / "ddp.pt", weights_only=True)
    for state in torch.load(folder / f"{kind}.pt", weights_only=True):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            if "running" not in name:  # which differ between ranks
                torch.testing.assert_close(state[name], value, msg=name)
