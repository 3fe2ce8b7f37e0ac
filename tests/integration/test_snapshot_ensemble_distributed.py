"""Snapshot ensembles on two processes, replicated and sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contracts.harness import launch
from contracts.sharded_worker import runs_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot_ensemble")
    launch(Path(__file__).with_name("snapshot_ensemble_worker.py"), folder, processes=2)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_predict_alike_with_members_written_once_and_keep_their_weights(kind, folder):
    if kind == "fsdp2" and not runs_here(kind):
        pytest.skip("this torch runs FSDP2 on accelerators only")
    first, second = (torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2))
    reference = torch.load(folder / "ddp-0.pt", weights_only=True)
    torch.testing.assert_close(first["predicted"], reference["predicted"])
    assert torch.equal(first["predicted"], second["predicted"])
    assert first["logged"] == second["logged"] == pytest.approx(reference["logged"])
    assert first["files"] == second["files"]
    assert [len(files) for files in first["files"]] == [2 if kind == "fsdp2" else 1] * 2
    found = sorted(path.name for path in (folder / kind).iterdir())
    assert found == sorted(name for files in first["files"] for name in files)
    assert first["failed"][0] == "in the second member"
    assert ("must be the whole model, or a module that is sharded on its own" in first["failed"][1]) == (kind == "fsdp2")
