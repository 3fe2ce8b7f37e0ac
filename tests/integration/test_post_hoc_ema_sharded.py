"""Averages of any length of a model that is sharded over four processes, by FSDP2 and tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contracts.harness import assert_equal, launch
from lightning_tricks import functional
from reference.power_ema import power_ema

pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch runs FSDP2 on accelerators only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("post_hoc")
    launch(Path(__file__).with_name("post_hoc_worker.py"), root, processes=4)
    return root


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


def test_all_ranks_make_the_average_that_is_computed_online(results):
    history = results[0]["history"]
    for name in ("net.1.weight", "net.3.bias", "scale"):
        wanted = power_ema([state[name] for state in history], 0.08).float()
        torch.testing.assert_close(results[0]["made"][name], wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(results[0]["made"]["shift"], torch.full((3,), 0.5))
    assert torch.equal(results[0]["made"]["seen"], torch.full((2,), 15.0))
    for result in results:
        assert_equal(result["made"], results[0]["made"])
        assert_equal(result["loaded"], results[0]["made"])


def test_a_resumed_run_makes_the_same_average(results):
    for result in results:
        assert_equal(result["resumed"], results[0]["made"])
        assert result["names"] == ["step=2", "step=4", "step=6", *(f"step={step}-v1" for step in (8, 10, 12, 14, 15))]


def test_one_process_reads_what_four_have_written(folder, results):
    assert_equal(results[3]["alone"], results[0]["made"])
    assert_equal(functional.synthesize_ema(folder / "snapshots" / "step=15", 0.08), results[0]["made"])
    snapshot = folder / "snapshots" / "step=15"
    assert sorted(path.name for path in snapshot.iterdir()) == [f"part_{rank}_of_4.pt" for rank in range(4)]
    parts = [torch.load(path)["entries"]["net.1.weight"]["values"][0] for path in sorted(snapshot.iterdir())]
    assert sum(part.numel() for part in parts) == 640
