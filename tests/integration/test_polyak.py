"""The mean of iterates, where it differs from EMA."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_tricks as lt
from contracts.harness import Net, Recorder, assert_equal, fit, weights
from lightning_tricks import errors
from reference.polyak import polyak


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"start": 11}),
        ({"start": 0}, {}),
        ({"start": 4, "every": 3}, {"start": 4, "every": 3}),
        ({"start": "1 epoch", "every": "1 epoch"}, {"start": 5, "every": 5}),
        ({"start": 0, "stop": 9}, {"stop": 9}),
        ({"start": 0, "stop": "2 epochs"}, {"stop": 10}),
        ({"start": "20%", "stop": "60%", "every": 2}, {"start": 3, "stop": 9, "every": 2}),
        ({"start": 0, "stop": "1 epoch", "every": "1 epoch"}, {"every": 5, "stop": 5}),
        ({"start": 5, "every": "2 epochs"}, {"start": 5, "every": 10}),  # which is the end of an epoch
        ({"start": "2 epochs", "every": "1 epoch"}, {"start": 10, "every": 5}),
    ],
    ids=str,
)
def test_the_average_is_the_mean(arguments, expected):
    recorder = Recorder()
    run = fit([lt.PolyakAveraging(**arguments), recorder])
    for name in ("head.weight", "body.0.bias"):
        wanted = polyak([state[name] for state in recorder.history], **expected).float()
        torch.testing.assert_close(weights(run.module)[name], wanted)


def test_the_mean_over_ends_of_epochs_counts_the_last_one_and_survives_early_stopping():
    recorder = Recorder()
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    run = fit([lt.PolyakAveraging(start=0, every="1 epoch"), recorder, stop], max_epochs=9)
    history = [state["head.weight"] for state in recorder.history]
    assert len(history) < 20
    torch.testing.assert_close(run.module.head.weight.detach(), polyak(history, every=5).float())


def test_what_is_thawed_later_counts_as_it_was_while_frozen():
    class Thaws(Net):
        def on_train_epoch_start(self):
            self.head.requires_grad_(requires_grad=self.current_epoch > 0)

        def configure_optimizers(self):
            return torch.optim.SGD([*self.neck.parameters(), *self.head.parameters()], lr=0.05)

    recorder = Recorder()
    run = fit([lt.PolyakAveraging(start=0), recorder], Thaws)
    history = [state["head.weight"] for state in recorder.history]
    torch.testing.assert_close(run.module.head.weight.detach(), polyak(history).float())


def test_many_updates_stay_exact_in_float64():
    recorder = Recorder()
    run = fit([lt.PolyakAveraging(start=0, dtype="float64"), recorder], max_epochs=20)
    expected = polyak([state["head.weight"] for state in recorder.history])
    torch.testing.assert_close(run.trick._averages.averaged()["head.weight"], expected)


@pytest.mark.parametrize("step", [8, 13])
def test_resuming_before_and_after_the_start(tmp_path, step):
    whole = fit([lt.PolyakAveraging(start=10), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    with pytest.warns(UserWarning, match="Be aware that"):
        resumed = fit([lt.PolyakAveraging(start=10)], ckpt_path=tmp_path / f"step={step}.ckpt", seed=5)
    assert_equal(weights(resumed.module), weights(whole.module))


@pytest.mark.parametrize(("start", "stop"), [(5, 5), ("50%", "20%"), ("3 epochs", "2 epochs")])
def test_stop_comes_after_start(start, stop):
    with pytest.raises(errors.ArgumentError, match=f"`stop` must come after `start`, got start={start!r} and stop={stop!r}"):
        lt.PolyakAveraging(start=start, stop=stop)
