"""CheckpointEnsemble: which weights are members, and what resuming does to them."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn.functional import cross_entropy

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, weights
from lightning_tricks import errors
from reference.ensembles import best_candidates

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
NAN = math.nan


class Scripted(Net):
    """Logs a metric that says what it is told, epoch by epoch."""

    scores = (0.5, 0.2, 0.9, 0.2, 0.1, 0.5)

    def on_validation_epoch_end(self):
        self.log("score", self.scores[self.current_epoch])

    def on_train_epoch_end(self):
        self.log("trained", self.scores[self.current_epoch])


class Ends(Callback):
    """Keeps the weights at the end of each epoch."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.is_last_batch:
            self.weights.append(weights(pl_module))


def taken(trick, key="epoch"):
    return [member.facts[key] for member in trick._members]


def test_the_latest_are_members():
    trick, ends = lt.CheckpointEnsemble(2), Ends()
    run = fit([trick, ends], max_epochs=4)
    for member, expected in zip(trick.to_ensemble(), ends.weights[-2:], strict=True):
        assert_equal(weights(member), expected)
    assert_equal(weights(run.module), ends.weights[-1])


@pytest.mark.parametrize(("every", "steps"), [(4, [4, 8, 12]), ("2 epochs", [10]), ("40%", [6, 12]), ("1 epoch", [5, 10, 15])])
def test_candidates_come_after_each_duration(every, steps):
    trick = lt.CheckpointEnsemble(3, every=every)
    fit([trick])
    assert taken(trick, "step") == steps


def test_an_epoch_that_is_cut_short_counts():
    trick = lt.CheckpointEnsemble(3)
    fit([trick], max_epochs=-1, max_steps=7)
    assert taken(trick, "step") == [5, 7]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("scores", [(0.5, 0.2, 0.9, 0.2, 0.1, 0.5), (0.3, 0.3, 0.3, 0.3, 0.3, 0.4)])
def test_the_best_are_members(mode, scores, monkeypatch):
    monkeypatch.setattr(Scripted, "scores", scores)
    trick, ends = lt.CheckpointEnsemble(3, monitor="score", mode=mode), Ends()
    fit([trick, ends], Scripted, max_epochs=6)
    assert taken(trick) == best_candidates(scores, 3, mode)
    assert taken(trick, "score") == pytest.approx([scores[epoch] for epoch in taken(trick)])
    for member, epoch in zip(trick.to_ensemble(), taken(trick), strict=True):
        assert_equal(weights(member), ends.weights[epoch])


def test_weights_whose_metric_is_nan_are_passed_over(monkeypatch):
    monkeypatch.setattr(Scripted, "scores", (0.5, NAN, 0.9))
    trick = lt.CheckpointEnsemble(3, monitor="score")
    with pytest.warns(UserWarning, match="passes over the weights after 10 steps: 'score' is NaN"):
        fit([trick], Scripted)
    assert taken(trick) == [0, 2]


def test_a_metric_of_training_is_enough():
    trick = lt.CheckpointEnsemble(2, monitor="trained")
    fit([trick], Scripted, validate=False, max_epochs=4)
    assert taken(trick) == best_candidates(Scripted.scores[:4], 2, "min")


def test_a_metric_that_is_not_logged_is_an_error_with_those_that_are():
    with pytest.raises(errors.TrickError, match=r"`monitor='val_los'` must be a metric that the module logs.*'score', .*'val_loss'"):
        fit([lt.CheckpointEnsemble(monitor="val_los")], Scripted)


def test_the_metric_is_that_of_the_weights_and_the_ensemble_answers_after_the_fit():
    seen = {}

    class Metric(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.setdefault(trainer.callback_metrics["val_loss"].item())

    plain = fit([Metric()])
    expected, seen = seen, {}
    trick = lt.CheckpointEnsemble(2, monitor="val_loss")
    run = fit([trick, Metric()])
    assert seen == expected
    assert_equal(weights(run.module), weights(plain.module))
    batches = list(Loader(2, seed=1))
    with torch.no_grad():
        predicted = [torch.stack([member(x).softmax(-1) for member in trick.to_ensemble()]).mean(0).log() for x, _ in batches]
    mean = sum(cross_entropy(logits, y) for logits, (_, y) in zip(predicted, batches, strict=True)) / 2
    assert run.trainer.validate(run.module, Loader(2, seed=1), verbose=False)[0]["val_loss"] == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lt.CheckpointEnsemble(2, monitor="score", memory="disk"),
        lambda: lt.CheckpointEnsemble(2, every=4),
        lambda: lt.FastGeometricEnsemble(2, start=3, cycle=4),
    ],
)
def test_resumed_runs_have_the_same_members(make, tmp_path):
    whole = make()
    fit([whole, ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")], Scripted)
    assert len(whole._members) == 2
    for step in (3, 6, 11, 13):
        resumed = make()
        fit([resumed], Scripted, ckpt_path=tmp_path / f"step={step}.ckpt", seed=99)
        assert [(m.digests, dict(m.facts)) for m in resumed._members] == [(m.digests, dict(m.facts)) for m in whole._members]


def test_resuming_with_other_arguments(tmp_path):
    def resume(**arguments):
        trick = lt.CheckpointEnsemble(**arguments)
        fit([trick], Scripted, ckpt_path=tmp_path / "last.ckpt", max_epochs=5)
        return trick

    fit([lt.CheckpointEnsemble(3, monitor="score"), ModelCheckpoint(tmp_path, filename="last")], Scripted, max_epochs=4)
    assert taken(resume(members=2, monitor="score")) == best_candidates(Scripted.scores[:5], 2, "min")
    assert taken(resume(members=4, monitor="score")) == [0, 1, 3, 4]
    assert taken(resume(members=3, monitor="val_loss"))[-1] == 4  # in the place of one that was chosen by another metric
    assert taken(resume(members=2)) == [3, 4]


def test_a_checkpoint_is_evaluated_with_its_members(tmp_path):
    trick = lt.CheckpointEnsemble(2)
    run = fit([trick, ModelCheckpoint(tmp_path, filename="last")])
    expected = run.trainer.validate(run.module, Loader(2, seed=1), verbose=False)
    alone = fit([lt.CheckpointEnsemble(2)], max_epochs=0).trainer
    assert alone.validate(Net(), Loader(2, seed=1), ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected
    next(path for member in trick._members for path in member.paths).unlink()
    with pytest.raises(errors.CheckpointError, match="there is no such file"):
        alone.validate(Net(), Loader(2, seed=1), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_replaced_members_are_deleted_with_the_last_checkpoint_that_names_them(tmp_path):
    trick = lt.CheckpointEnsemble(1, dirpath=tmp_path / "members")
    fit([trick, ModelCheckpoint(tmp_path / "checkpoints", save_top_k=1)], max_epochs=4)
    names = [path.name for path in (tmp_path / "members").iterdir()]
    assert {name for member in trick._members for name in member.files} <= set(names)
    assert len(names) <= 2  # the member, and the one before it, whose checkpoint was deleted last
