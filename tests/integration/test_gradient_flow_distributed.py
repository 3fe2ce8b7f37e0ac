"""What two processes record: norms of whole tensors, the same on both, under every strategy that has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contracts.harness import launch
from contracts.sharded_worker import runs_here


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("gradient_flow")
    launch(Path(__file__).with_name("gradient_flow_worker.py"), root, processes=2)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_norms_are_those_of_whole_tensors_on_both_ranks(kind, ranks):
    if kind != "ddp" and not runs_here(kind):
        pytest.skip(f"{kind} does not run on the CPU here")
    replicated = ranks[0]["ddp"]
    assert replicated["steps"] == [1, 3, 6, 9]
    assert set(replicated["layers"]) == {"scale", "body.0", "body.1", "body.2", "neck", "head", "tied"}
    for rank in ranks:
        found = rank[kind]
        assert (found["steps"], set(found["layers"])) == (replicated["steps"], set(replicated["layers"]))
        for quantity in ("grad_norm", "weight_norm", "update_norm"):
            for layer, row in zip(found["layers"], found[quantity], strict=True):
                wanted = replicated[quantity][replicated["layers"].index(layer)]
                assert row == pytest.approx(wanted, rel=2e-3, abs=1e-5), (kind, layer, quantity)
                assert layer == "body.2" or min(row) > 0


def test_losses_are_means_over_ranks(ranks):
    curves = [rank["ddp"]["curves"] for rank in ranks]
    assert curves[0] == curves[1]
    assert len(curves[0]["gap"]) == 2
