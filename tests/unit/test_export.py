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
