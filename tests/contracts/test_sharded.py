"""The promises under every strategy that shards, on two processes that all checks share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from contracts.cases import CASES
from contracts.harness import launch
from contracts.sharded_worker import CHECKS, KINDS, refusal, runs_here
from lightning_tricks.functional import averaged_state_dict


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def results(root):
    launch(Path(__file__).with_name("sharded_worker.py"), root, processes=2)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", [check.__name__.removeprefix("check_") for check in CHECKS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=[case.trick.__name__ for case in CASES])
def test_on_two_processes(case, kind, check, results):
    if not runs_here(kind):
        pytest.skip(f"{kind} does not run on the CPU here")
    if (reason := refusal(case, kind)) is not None:
        pytest.skip(reason)
    for rank in range(2):
        outcome = results[rank][f"{case.trick.__name__}-{kind}-{check}"]
        if outcome.startswith("skipped: "):
            pytest.skip(outcome.removeprefix("skipped: "))
        assert outcome == "passed", f"rank {rank}:\n{outcome}"


@pytest.fixture(scope="module")
def resharded(results, root):
    launch(Path(__file__).with_name("resharded_worker.py"), root, processes=3)
    return [json.loads((root / f"resharded-{rank}.json").read_text()) for rank in range(3)]


AVERAGES = [case for case in CASES if case.make().follows_weights]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("case", AVERAGES, ids=lambda case: case.trick.__name__)
def test_what_two_processes_wrote_loads_on_three(case, kind, resharded):
    if not runs_here(kind):
        pytest.skip(f"{kind} does not run on the CPU here")
    for rank in range(3):
        seen = {what: resharded[rank][f"{case.trick.__name__}-{kind}-{what}"] for what in ("average", "raw")}
        assert all(seen.values()), f"rank {rank}: {seen}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", AVERAGES, ids=lambda case: case.trick.__name__)
def test_averages_are_read_from_every_kind_of_checkpoint(case, kind, results, root):
    if not runs_here(kind):
        pytest.skip(f"{kind} does not run on the CPU here")
    expected = torch.load(root / f"{case.trick.__name__}-fsdp1" / "full" / "step=10.ckpt", weights_only=True)["state_dict"]
    for layout in ("full",) if "zero" in kind else ("full", "sharded"):
        state = averaged_state_dict(root / f"{case.trick.__name__}-{kind}" / layout / "step=10.ckpt")
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            if "running" not in name:  # of which a sharded checkpoint has those of any rank
                torch.testing.assert_close(state[name], value, msg=name)
