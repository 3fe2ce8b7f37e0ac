"""Members that two processes have collected, there and in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lightning_tricks as lt
from contracts.cases import CASES
from contracts.harness import assert_equal, launch
from contracts.sharded_worker import model_of, runs_here
from lightning_tricks.ensembling._store import MemberStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("member_store")
    launch(Path(__file__).with_name("member_store_worker.py"), folder, processes=2)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_process_reads_what_two_have_written(kind, folder):
    if kind == "fsdp2" and not runs_here(kind):
        pytest.skip(f"{kind} does not run on the CPU here")
    found, case = torch.load(folder / f"{kind}.pt", weights_only=True), next(case for case in CASES if case.trick is lt.CheckpointEnsemble)
    alone = SimpleNamespace(ckpt_path=None, world_size=1, global_rank=0, is_global_zero=True)
    module, store = model_of(case, "ddp"), MemberStore(folder / "elsewhere")
    store.restore(found["entries"], module, alone)
    lending = store.lending(module, alone)
    assert len(store.members[0].files) == (2 if kind == "fsdp2" else 1)
    for member, end in zip(store.members, found["ends"], strict=True):
        state = store.state_dict(member)
        assert_equal({name: state[name] for name in end}, end)
        lending.hold(member)
        assert_equal({name: module.state_dict()[name] for name in end}, end)
        twin = next(iter(lt.nn.Ensemble.from_checkpoints([member.paths[-1]], lambda: model_of(case, "ddp"))))
        assert_equal(twin.state_dict(), state)
