"""The mean of the latest checkpoints, where it differs from other averages."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_differ, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors
from reference.latest_weight_averaging import lawa

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def trainable(state):
    return {name: value for name, value in state.items() if "running" not in name}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"window": 5, "every": 5}),
        ({"window": 2}, {"window": 2, "every": 5}),
        ({"window": 1}, {"window": 1, "every": 5}),
        ({"window": 4, "every": 1}, {"window": 4, "every": 1}),
        ({"window": 4, "every": 3}, {"window": 4, "every": 3}),
        ({"window": 3, "every": 2, "start": 5}, {"window": 3, "every": 2, "start": 5}),
        ({"window": 3, "every": "20%", "start": "1 epoch"}, {"window": 3, "every": 3, "start": 5}),
        ({"start": "1 epoch"}, {"window": 5, "every": 5, "start": 5}),
    ],
    ids=str,
)
def test_the_average_is_the_mean_of_the_latest_checkpoints(arguments, expected):
    recorder = Recorder()
    run = fit([lt.LatestWeightAveraging(**arguments), recorder])
    for name in ("head.weight", "body.0.bias"):
        wanted = lawa([state[name] for state in recorder.history], **expected).float()
        torch.testing.assert_close(weights(run.module)[name], wanted)
    assert_equal(run.trick.raw_state_dict(), recorder.history[-1])


def test_validation_at_the_end_of_an_epoch_sees_its_checkpoint():
    recorder = Recorder()
    run = fit([lt.LatestWeightAveraging(window=2), recorder])
    history = [state["head.weight"] for state in recorder.history]
    for epoch, seen in enumerate(run.module.evaluated, 1):
        wanted = lawa(history[: 5 * epoch + 1], window=2, every=5).float()
        torch.testing.assert_close(seen["head.weight"], wanted)


def test_raw_weights_are_used_until_the_first_checkpoint(tmp_path):
    recorder = Recorder()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trick = lt.LatestWeightAveraging(evaluate="both")
    run = fit([trick, recorder, saved], max_steps=4, val_check_interval=2)
    assert_equal(trainable(run.module.evaluated[0]), trainable(recorder.history[2]))
    assert len(run.module.evaluated) == 2  # not twice each: there is no average yet
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert_equal(checkpoint["state_dict"], recorder.history[2])
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        plain = fit([Recorder()], ckpt_path=tmp_path / "step=2.ckpt", max_epochs=1)
    assert len(plain.losses) == 3


def test_early_stopping_keeps_the_average_and_the_last_epoch_counts():
    recorder = Recorder()
    stop = EarlyStopping("val_loss", patience=2, min_delta=100.0)
    run = fit([lt.LatestWeightAveraging(window=2), recorder, stop], max_epochs=9)
    history = [state["head.weight"] for state in recorder.history]
    assert len(history) == 16
    torch.testing.assert_close(run.module.head.weight.detach(), lawa(history, window=2, every=5).float())


def test_an_epoch_that_is_cut_short_ends_with_a_checkpoint():
    recorder = Recorder()
    run = fit([lt.LatestWeightAveraging(window=2), recorder], max_steps=8)
    history = [state["head.weight"].double() for state in recorder.history]
    torch.testing.assert_close(run.module.head.weight.detach(), ((history[5] + history[8]) / 2).float())


@pytest.mark.parametrize("thawed", [1, 2])
def test_what_is_thawed_later_counts_as_it_was_while_frozen(thawed, tmp_path):
    class Thaws(Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.head.requires_grad_(requires_grad=self.current_epoch == thawed)  # and is frozen again

        def configure_optimizers(self):
            return torch.optim.SGD([*self.neck.parameters(), *self.head.parameters()], lr=0.05)

    recorder = Recorder()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = fit([lt.LatestWeightAveraging(window=3, every=2), recorder, saved], Thaws)
    for name in ("head.weight", "neck.weight"):
        wanted = lawa([state[name] for state in recorder.history], window=3, every=2).float()
        torch.testing.assert_close(weights(run.module)[name], wanted)
    assert_differ(recorder.history[5 * thawed], recorder.history[-1])
    for step in (8, 12):
        resumed = fit([lt.LatestWeightAveraging(window=3, every=2)], Thaws, ckpt_path=tmp_path / f"step={step}.ckpt", seed=7)
        assert_equal(weights(resumed.module), weights(run.module))


@pytest.mark.parametrize(
    ("buffers", "expected"), [("copy", None), ("average", {"window": 2, "every": 5}), ("keep", {"window": 1, "every": 5})]
)
def test_buffers(buffers, expected):
    recorder = Recorder()
    run = fit([lt.LatestWeightAveraging(window=2, buffers=buffers), recorder])
    history = [state["body.1.running_mean"] for state in recorder.history]
    wanted = history[-1] if expected is None else lawa(history[: 6 if buffers == "keep" else None], **expected).float()
    torch.testing.assert_close(run.module.body[1].running_mean, wanted)
    assert run.module.body[1].num_batches_tracked == 15


def test_a_buffer_of_another_shape_begins_anew():
    class Grows(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen = torch.full((1 + self.current_epoch,), float(self.trainer.global_step))

        def load_state_dict(self, state_dict, **options):
            self.seen = torch.zeros_like(state_dict["seen"])
            return super().load_state_dict(state_dict, **options)

    run = fit([lt.LatestWeightAveraging(window=4, every=2, buffers="average")], Grows)
    # The buffer's checkpoint at step 10 is of the epoch before; it has its last shape since step 11.
    assert torch.equal(run.module.seen, torch.full((3,), (11 + 11 + 11 + 13) / 4))


def test_the_window_is_all_that_is_kept():
    class Counts(Callback):
        def __init__(self):
            self.kept = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            track = trainer.callbacks[0]._averages.tracks[0]
            self.kept.append(len(track.others) + bool(track.averages))

    counts = Counts()
    fit([lt.LatestWeightAveraging(window=3, every=1), counts])
    assert counts.kept == [1, 2, *[3] * 13]


def test_no_drift_after_large_weights():
    """A running sum would keep the rounding of what has left the window."""

    class Jumps(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                pl_module.head.weight.data.mul_(1e8)
            if trainer.global_step == 4:
                pl_module.head.weight.data.mul_(1e-8)

    recorder = Recorder()
    run = fit([lt.LatestWeightAveraging(window=3, every=1), Jumps(), recorder])
    history = [state["head.weight"] for state in recorder.history]
    assert max(value.abs().max() for value in history) > 1e6
    torch.testing.assert_close(run.module.head.weight.detach(), lawa(history, window=3, every=1).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", [1, 3, 9, 15])
def test_a_resumed_run_goes_on_with_the_window(tmp_path, step):
    trick = {"window": 4, "every": 2, "evaluate": "both"}
    whole = fit([lt.LatestWeightAveraging(**trick), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    resumed = fit([lt.LatestWeightAveraging(**trick)], ckpt_path=tmp_path / f"step={step}.ckpt", seed=5)
    assert_equal(weights(resumed.module), weights(whole.module))
    assert_equal(resumed.trick.raw_state_dict(), whole.trick.raw_state_dict())


def test_checkpoints_have_the_dtype_of_the_weights_and_their_mean_does_not(tmp_path):
    recorder = Recorder()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([lt.LatestWeightAveraging(3, every=2), saved, recorder], precision="bf16-true")
    assert {tensor.dtype for tensor in whole.trick._averages.tracks[0].others[0].values()} == {torch.bfloat16}
    average = whole.trick._averages.averaged()["head.weight"]
    torch.testing.assert_close(average, lawa([state["head.weight"] for state in recorder.history], window=3, every=2).float())
    resumed = fit([lt.LatestWeightAveraging(3, every=2)], ckpt_path=tmp_path / "step=9.ckpt", seed=5, precision="bf16-true")
    assert_equal(weights(resumed.module), weights(whole.module))
    assert torch.equal(resumed.trick._averages.averaged()["head.weight"], average)


@pytest.mark.parametrize("window", [1, 2, 6])
def test_resuming_with_another_window(tmp_path, window):
    recorder = Recorder()
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit([lt.LatestWeightAveraging(3, every=2), recorder, saved])
    resumed = fit([lt.LatestWeightAveraging(window, every=2)], ckpt_path=tmp_path / "step=9.ckpt")
    checkpoints = [4, 6, 8, 10, 12, 14][-window:]
    wanted = torch.stack([recorder.history[step]["head.weight"].double() for step in checkpoints]).mean(0)
    torch.testing.assert_close(resumed.module.head.weight.detach(), wanted.float())


def test_a_damaged_window_is_refused(tmp_path):
    fit([lt.LatestWeightAveraging(3, every=2), ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["lightning_tricks"]["LatestWeightAveraging"]["other_1"]["head.weight"]
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(errors.CheckpointError, match="incomplete or damaged"):
        fit([lt.LatestWeightAveraging(3, every=2)], ckpt_path=tmp_path / "damaged.ckpt")


def test_a_test_of_a_checkpoint_and_a_second_fit_go_on_from_the_window(tmp_path):
    recorder, saved = Recorder(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([lt.LatestWeightAveraging(2), recorder, saved])
    module, trick = Net(), lt.LatestWeightAveraging(2)
    trainer = make_trainer([trick])
    trainer.test(module, Loader(2, seed=1), ckpt_path=tmp_path / "step=10.ckpt", verbose=False)
    history = [state["head.weight"] for state in recorder.history]
    torch.testing.assert_close(module.evaluated[0]["head.weight"], lawa(history[:11], window=2, every=5).float())
    assert_equal(trainable(trick.raw_state_dict()), trainable(recorder.history[10]))
    assert len(trick._averages.tracks[0].others) == 2
    assert whole.trick._averages.tracks[0].inside


def test_on_another_device_and_in_float64():
    trick = lt.LatestWeightAveraging(3, every=1, device="cpu", dtype=torch.float64)
    recorder = Recorder()
    fit([trick, recorder])
    wanted = lawa([state["head.weight"] for state in recorder.history], window=3, every=1)
    torch.testing.assert_close(trick._averages.averaged()["head.weight"], wanted)
    assert trick.arguments["dtype"] == "float64"
    assert trick.arguments["device"] == "cpu"


def test_without_the_callback_training_goes_on_from_the_raw_weights(tmp_path):
    whole = fit([lt.LatestWeightAveraging(2, every=1), ModelCheckpoint(tmp_path, every_n_train_steps=7, filename="{step}", save_top_k=-1)])
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.warns(UserWarning, match="its average is dropped"),
    ):
        resumed = fit([lt.EMA(0.5, name="other")], ckpt_path=tmp_path / "step=7.ckpt")
    assert_equal(resumed.trained, whole.trained)
