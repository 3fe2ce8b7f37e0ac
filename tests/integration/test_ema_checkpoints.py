"""What checkpoints hold, and what becomes of it."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_differ, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors
from reference.ema import ema

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory .* exists")


def load(path):
    return torch.load(path, weights_only=True)


def saved_at(folder, step, **options):
    """Train with EMA and save every step."""
    options = {"decay": 0.9, **options}
    recorder = Recorder()
    run = fit([lt.EMA(**options), recorder, ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    return run, recorder, folder / f"step={step}.ckpt"


@pytest.mark.parametrize("evaluate", [True, "both"])
def test_a_checkpoint_deploys_the_average(tmp_path, evaluate):
    _, recorder, path = saved_at(tmp_path, 7, evaluate=evaluate)
    expected = ema([state["head.weight"] for state in recorder.history[:8]], 0.9).float()
    torch.testing.assert_close(load(path)["state_dict"]["head.weight"], expected)
    torch.testing.assert_close(Net.load_from_checkpoint(path, weights_only=False).head.weight.detach(), expected)
    assert torch.equal(load(path)["lightning_tricks"]["EMA"]["raw"]["head.weight"], recorder.history[7]["head.weight"])


def test_tied_weights_are_averaged_once_and_deployed_under_both_names(tmp_path):
    run, _, path = saved_at(tmp_path, 7)
    state = load(path)["state_dict"]
    assert torch.equal(state["neck.weight"], state["tied.weight"])
    assert "tied.weight" not in run.trick._averages.averaged()
    assert not torch.equal(state["neck.weight"], load(path)["lightning_tricks"]["EMA"]["raw"]["neck.weight"])


def test_without_evaluation_a_checkpoint_holds_raw_weights_and_the_average_beside(tmp_path):
    _, recorder, path = saved_at(tmp_path, 7, evaluate=False)
    assert_equal(load(path)["state_dict"], recorder.history[7])
    entry = load(path)["lightning_tricks"]["EMA"]
    assert entry["raw"] == {}
    expected = ema([state["head.weight"] for state in recorder.history[:8]], 0.9).float()
    torch.testing.assert_close(entry["average"]["head.weight"], expected)


def test_a_checkpoint_of_weights_only_holds_those_that_were_evaluated(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=True, filename="best")
    run = fit([lt.EMA(0.9), keep])
    state = load(keep.best_model_path)
    assert "callbacks" not in state
    assert any(all(torch.equal(seen[name], state["state_dict"][name]) for name in seen) for seen in run.module.evaluated)
    run.trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert_equal(load(tmp_path / "after.ckpt")["state_dict"], weights(run.module))


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_epoch_end", "on_train_epoch_end", "on_train_end", "on_fit_end"])
def test_a_checkpoint_is_right_whichever_weights_the_model_holds_when_it_is_saved(tmp_path, hook):
    class Saves(Callback):
        def save(self, trainer, pl_module, *_):
            if not (tmp_path / "there.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "there.ckpt")
                trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
                self.steps = trainer.global_step

    saves = Saves()
    setattr(saves, hook, saves.save)
    recorder = Recorder()
    fit([lt.EMA(0.9), saves, recorder], num_sanity_val_steps=0)
    expected = ema([state["head.weight"] for state in recorder.history[: saves.steps + 1]], 0.9).float()
    for name in ("there.ckpt", "weights.ckpt"):
        torch.testing.assert_close(load(tmp_path / name)["state_dict"]["head.weight"], expected)
    raw = load(tmp_path / "there.ckpt")["lightning_tricks"]["EMA"]["raw"]
    assert torch.equal(raw["head.weight"], recorder.history[saves.steps]["head.weight"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_checkpoint_saved_on_an_exception_in_validation_is_not_inverted(tmp_path, error):
    class Rescue(ModelCheckpoint):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "rescue.ckpt")

    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            raise error

    for order in (1, -1):
        recorder, module = Recorder(), Fails()
        trainer = make_trainer([lt.EMA(0.9), recorder, Rescue(tmp_path / str(order))][::order])
        with pytest.raises((error, SystemExit)):
            trainer.fit(module, Loader(), Loader(2))
        expected = ema([state["head.weight"] for state in recorder.history], 0.9).float()
        torch.testing.assert_close(load(tmp_path / "rescue.ckpt")["state_dict"]["head.weight"], expected)
        raw = load(tmp_path / "rescue.ckpt")["lightning_tricks"]["EMA"]["raw"]
        assert torch.equal(raw["head.weight"], recorder.history[-1]["head.weight"])


def test_the_last_checkpoint_keeps_the_raw_weights(tmp_path):
    run = fit([lt.EMA(0.9), ModelCheckpoint(tmp_path, save_last=True)])
    checkpoint = load(tmp_path / "last.ckpt")
    assert_equal(checkpoint["state_dict"], weights(run.module))
    raw = checkpoint["lightning_tricks"]["EMA"]["raw"]
    assert all(torch.equal(raw[name], run.trained[name]) for name in raw)


@pytest.mark.parametrize("how", ["test", "validate", "predict"])
@pytest.mark.parametrize("evaluate", [True, "both"])
def test_after_the_fit_the_best_checkpoint_is_evaluated_with_its_average(tmp_path, how, evaluate):
    """On the same Trainer, and in a new process with and without the callback."""
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # the first, so that it differs from the last
    run = fit([lt.EMA(0.9, evaluate=evaluate), keep])
    expected = load(keep.best_model_path)["state_dict"]
    assert_differ(expected, weights(run.module))
    module = run.module
    trainers = [run.trainer, make_trainer([lt.EMA(0.9, evaluate=evaluate)]), make_trainer([Callback()])]
    for trainer in trainers:
        module.evaluated.clear()
        path = "best" if trainer is run.trainer else keep.best_model_path
        getattr(trainer, how)(module, Loader(2), ckpt_path=path)
        assert_equal(module.evaluated[-1], expected)
        assert_equal(weights(module), expected)
        module = Net()
    raw = load(keep.best_model_path)["lightning_tricks"]["EMA"]["raw"]
    assert torch.equal(run.trick.raw_state_dict()["head.weight"], raw["head.weight"])


def test_a_fit_after_testing_the_best_checkpoint_goes_on_from_that_checkpoint(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    recorder = Recorder()
    run = fit([lt.EMA(0.9), recorder, keep])
    run.trainer.test(run.module, Loader(2), ckpt_path="best", verbose=False)
    best = load(keep.best_model_path)
    recorder.history.clear()
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(run.module, Loader(), Loader(2))
    assert torch.equal(recorder.history[0]["head.weight"], best["lightning_tricks"]["EMA"]["raw"]["head.weight"])
    history = [state["head.weight"] for state in recorder.history]
    expected = best["state_dict"]["head.weight"].double()
    for state in history[1:]:
        expected = 0.9 * expected + 0.1 * state.double()
    torch.testing.assert_close(run.module.head.weight.detach(), expected.float())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"evaluate": True}, {"evaluate": False}),
        ({"evaluate": False}, {"evaluate": True}),
        ({"evaluate": "both"}, {"evaluate": True}),
        ({"dtype": "float64"}, {"dtype": "float64"}),
        ({"buffers": "average"}, {"buffers": "average"}),
        ({"buffers": "keep"}, {"buffers": "keep"}),
        ({"start": 10}, {"start": 10}),
        ({"start": 4, "every": 4, "warmup": 20}, {"start": 4, "every": 4, "warmup": 20}),
        ({"every": "1 epoch", "start": "1 epoch"}, {"every": "1 epoch", "start": "1 epoch"}),
        ({"half_life": "50%"}, {"half_life": "50%"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [7, 10])
def test_resuming_continues_the_average(tmp_path, before, after, step):
    decay = {} if "half_life" in before else {"decay": 0.9}
    whole = fit([lt.EMA(**decay, **before), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    resumed = fit([lt.EMA(**decay, **after)], ckpt_path=tmp_path / f"step={step}.ckpt", seed=42)
    assert_equal(resumed.trained, whole.trained)
    assert_equal(resumed.trick.averaged_state_dict(), whole.trick.averaged_state_dict())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true"])
def test_resuming_in_low_precision_keeps_the_exact_average(tmp_path, precision):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([lt.EMA(0.999), keep], precision=precision)
    resumed = fit([lt.EMA(0.999)], ckpt_path=tmp_path / "step=8.ckpt", seed=42, precision=precision)
    assert_equal(resumed.trained, whole.trained)
    one, other = (run.trick._averages.averaged() for run in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_two_averages_resume_each_its_own(tmp_path):
    def make():
        return [lt.EMA(0.5, name="fast"), lt.EMA(0.9, name="slow", evaluate=False)]

    whole = fit([*make(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    resumed = fit(make()[::-1], ckpt_path=tmp_path / "step=7.ckpt", seed=42)
    for one, other in zip(whole.callbacks, resumed.callbacks[::-1], strict=False):
        assert_equal(one.averaged_state_dict(), other.averaged_state_dict())


def test_a_checkpoint_made_without_ema_starts_an_average_from_its_weights(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_tricks.averaging._average.rank_zero_info", said.append)
    fit([Callback(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    recorder = Recorder()
    run = fit([lt.EMA(0.9, start=3), recorder], ckpt_path=tmp_path / "step=7.ckpt")
    assert "found no average of its own in the checkpoint" in said[0]
    history = [state["head.weight"] for state in recorder.history]
    assert len(history) == 9
    torch.testing.assert_close(run.module.head.weight.detach(), ema(history, 0.9).float())
    late = fit([lt.EMA(0.9, start=12), recorder], ckpt_path=tmp_path / "step=7.ckpt")
    assert late.trick._averages.tracks[0].begun == 12


def test_resuming_under_another_name_returns_to_the_raw_weights_and_says_so(tmp_path):
    _, recorder, path = saved_at(tmp_path, 7, name="old")
    again = Recorder()
    with pytest.warns(UserWarning, match=r"made with EMA\(decay=0.9, name='old'\), which this Trainer lacks.*Add the callback"):
        fit([lt.EMA(0.9, name="new"), again], ckpt_path=path)
    assert torch.equal(again.history[0]["head.weight"], recorder.history[7]["head.weight"])


def test_resuming_with_another_selection_says_what_changes(tmp_path):
    _, recorder, path = saved_at(tmp_path, 7, where=["body", "neck"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = fit([lt.EMA(0.9, where=["body", "head"])], ckpt_path=path)
    messages = " ".join(str(warning.message) for warning in said)
    assert "no longer selects 'neck.weight' and 1 more; their averages are dropped" in messages
    assert "had no average of 'head.weight' and 1 more; it starts from the present weights" in messages
    assert sorted(run.trick._averages.averaged()) == [
        "body.0.bias",
        "body.0.weight",
        "body.1.bias",
        "body.1.weight",
        "head.bias",
        "head.weight",
    ]
    assert recorder.history


def changed(entry, **changes):
    """Return a record whose entry of EMA has other parts."""
    return {**entry, "EMA": {**entry["EMA"], **changes}}


def changed_track(entry, **changes):
    return changed(entry, tracks=[{**entry["EMA"]["tracks"][0], **changes}])


def changed_raw(entry, **changes):
    return changed(entry, raw={**entry["EMA"]["raw"], **changes})


DAMAGE = {
    "not a record": lambda entry: "something else",
    "newer": lambda entry: {**entry, "version": 99},
    "not an entry": lambda entry: {**entry, "EMA": [1, 2]},
    "no raw weights": lambda entry: {**entry, "EMA": {key: value for key, value in entry["EMA"].items() if key != "raw"}},
    "half the raw weights": lambda entry: changed(entry, raw=dict(list(entry["EMA"]["raw"].items())[:2])),
    "a list of weights": lambda entry: changed(entry, raw=[1, 2]),
    "another shape": lambda entry: changed_raw(entry, **{"head.weight": torch.zeros(1)}),
    "no tensor": lambda entry: changed_raw(entry, **{"head.weight": 3}),
    "an unknown name": lambda entry: changed_raw(entry, zzz=torch.zeros(2)),
    "another model": lambda entry: changed_track(entry, names=["elsewhere.weight"]),
    "no counts": lambda entry: changed(entry, tracks=[{"names": []}]),
    "a count that is none": lambda entry: changed_track(entry, begun="x"),
    "an unknown policy": lambda entry: changed_track(entry, buffers="zz"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_foreign_entry_is_refused_whole(tmp_path, how):
    _, _, path = saved_at(tmp_path, 7)
    checkpoint = load(path)
    checkpoint["lightning_tricks"] = DAMAGE[how](checkpoint["lightning_tricks"])
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    module, trick = Net(), lt.EMA(0.9)
    with pytest.raises(errors.CheckpointError, match="Nothing of it was loaded"):
        make_trainer([trick]).fit(module, Loader(), ckpt_path=tmp_path / "damaged.ckpt")
    assert_equal(weights(module), checkpoint["state_dict"])
    assert trick._averages.tracks == []
    assert module.losses == []


def test_lightnings_own_checks_of_a_truncated_file_come_first(tmp_path):
    _, _, path = saved_at(tmp_path, 7)
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises((RuntimeError, EOFError)):
        fit([lt.EMA(0.9)], ckpt_path=tmp_path / "cut.ckpt")


def test_a_module_that_edits_its_checkpoints_sees_the_average(tmp_path):
    class Edits(Net):
        def on_save_checkpoint(self, checkpoint):
            self.saved = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
            del checkpoint["state_dict"]["frozen.weight"]

    run = fit([lt.EMA(0.9), ModelCheckpoint(tmp_path, filename="last")], Edits)
    assert_equal(run.module.saved, weights(run.module))
    assert "frozen.weight" not in load(tmp_path / "last.ckpt")["state_dict"]


def test_a_checkpoint_holds_the_trained_weights_twice_and_nothing_more(tmp_path):
    run, _, path = saved_at(tmp_path, 7)
    entry = load(path)["lightning_tricks"]["EMA"]
    assert entry["average"] == {}
    assert sum(tensor.numel() for tensor in entry["raw"].values()) == sum(p.numel() for p in run.module.parameters() if p.requires_grad)


def test_hyperparameter_search_by_the_tuner_leaves_the_average_alone():
    trick, module = lt.EMA(0.9), Net()
    trainer = make_trainer([trick], max_epochs=1, logger=False)
    before = weights(module)
    pl.tuner.Tuner(trainer).lr_find(module, Loader(20), num_training=5)
    assert_equal(weights(module), before)
    trainer.fit(module, Loader())
    assert trick._averages.tracks[0].updates == 5
