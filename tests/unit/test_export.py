"""Averaged weights out of checkpoint files."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tricks as lt
from contracts.harness import Net, assert_differ, assert_equal, fit
from lightning_tricks import errors
from lightning_tricks.functional import averaged_state_dict


def saved(folder, *tricks):
    run = fit([*tricks, ModelCheckpoint(folder, filename="last", enable_version_counter=False)], max_epochs=1)
    return run, folder / "last.ckpt"


def test_an_average_that_does_not_evaluate(tmp_path):
    run, path = saved(tmp_path, lt.EMA(0.8, evaluate=False))
    assert_equal(averaged_state_dict(path), run.trick.averaged_state_dict())
    assert_differ(averaged_state_dict(path), run.trained)


def test_an_average_that_evaluates(tmp_path):
    run, path = saved(tmp_path, lt.EMA(0.8))
    assert_equal(averaged_state_dict(path), run.trick.averaged_state_dict())


def test_one_of_several(tmp_path):
    run, path = saved(tmp_path, lt.EMA(0.5, name="fast", evaluate=False), lt.EMA(0.8))
    fast, slow = run.callbacks[:2]
    assert_equal(averaged_state_dict(path, trick="EMA(name='fast')"), fast.averaged_state_dict())
    assert_equal(averaged_state_dict(path, trick="EMA"), slow.averaged_state_dict())


def test_which_of_several_must_be_said(tmp_path):
    _, path = saved(tmp_path, lt.EMA(0.5, name="fast", evaluate=False), lt.EMA(0.8))
    with pytest.raises(errors.ArgumentError, match=r"must name one of the averages in the checkpoint, got None; there are: .*EMA"):
        averaged_state_dict(path)
    with pytest.raises(errors.ArgumentError, match=r"got 'PolyakAveraging'"):
        averaged_state_dict(path, trick="PolyakAveraging")


def test_a_checkpoint_without_averages(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(errors.ArgumentError, match="there are: none"):
        averaged_state_dict(path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(errors.ArgumentError, match="`path` must be a checkpoint file, or a folder that FSDP or DeepSpeed has written"):
        averaged_state_dict(tmp_path)


def test_what_is_read_loads_into_the_plain_model_with_tied_weights(tmp_path):
    _, path = saved(tmp_path, lt.EMA(0.8, evaluate=False))
    model = Net()
    model.load_state_dict(averaged_state_dict(path))
    assert torch.equal(model.tied.weight, model.neck.weight)


def entry(**average):
    return {"tracks": [], "average": average, "sharded": {"average": {}}, "deployed": False, "aliases": {}}


def record(version=1, **average):
    return {"version": version, "EMA": entry(**average)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2), "must be a whole checkpoint"),
        ([1], "must be a whole checkpoint"),
        ({"lightning_tricks": record(w=torch.zeros(1))}, "KeyError: 'state_dict'"),
        ({"state_dict": {}, "lightning_tricks": 3}, "found a int"),
        ({"state_dict": {"w": torch.ones(1)}, "lightning_tricks": record(9, w=torch.zeros(1))}, "found version 9"),
        ({"state_dict": {"w": torch.ones(2, 3)}, "lightning_tricks": record(w=torch.zeros(1))}, "must be a whole checkpoint"),
        ({"state_dict": {"v": torch.ones(1)}, "lightning_tricks": record(w=torch.zeros(1))}, "lacks 'w', which EMA averages"),
    ],
)
def test_damaged_and_foreign_checkpoints(content, words, tmp_path):
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(errors.CheckpointError, match=words):
        averaged_state_dict(tmp_path / "odd.ckpt")


def test_what_is_no_file_of_torch(tmp_path):
    (tmp_path / "odd.ckpt").write_bytes(b"garbage")
    with pytest.raises(errors.CheckpointError, match="must be a whole checkpoint that"):
        averaged_state_dict(tmp_path / "odd.ckpt")


def test_extra_state_of_a_layer_is_kept(tmp_path):
    state = {"w": torch.ones(1), "_extra_state": {"scale": 2}}
    torch.save({"state_dict": state, "lightning_tricks": record(w=torch.zeros(1))}, tmp_path / "extra.ckpt")
    assert averaged_state_dict(tmp_path / "extra.ckpt") == {"w": torch.zeros(1), "_extra_state": {"scale": 2}}


def many_ranks(folder, ranks):
    (folder / "checkpoint").mkdir()
    for rank in range(ranks):
        checkpoint = {
            "module": {"w": torch.zeros(0)},
            "param_shapes": [{"w": torch.Size([2 * ranks])}],
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "dp_world_size": ranks,
            "lightning_tricks": record(w=torch.tensor([2.0 * rank, 2.0 * rank + 1])),
        }
        torch.save(checkpoint, folder / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def test_parts_of_more_than_ten_ranks_are_put_together_in_order(tmp_path):
    many_ranks(tmp_path, 12)
    assert torch.equal(averaged_state_dict(tmp_path)["w"], torch.arange(24.0))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_folder_without_the_files_of_one_rank(lost, tmp_path):
    many_ranks(tmp_path, 3)
    (tmp_path / "checkpoint" / f"zero_pp_rank_{lost}_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(errors.CheckpointError, match=r"must hold the model states of all 3 ranks, and has 2 files"):
        averaged_state_dict(tmp_path)
