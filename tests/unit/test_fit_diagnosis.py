"""Verdicts on curves of losses, and FitDiagnosis in whole fits."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_tricks as lt
from contracts.harness import Loader, Net, StepCheckpoints, fit, make_trainer
from lightning_tricks import errors
from lightning_tricks.functional import diagnose_fit

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
FALLING = [2.0, 1.6, 1.3, 1.0, 0.8, 0.6]
FLAT = [2.0, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("train", "val", "options", "kind", "words"),
    [
        (FALLING[:5], FALLING[:5], {}, "unclear", "5 records of both losses, and 6 are needed"),
        (FALLING[:2], FALLING[:2], {"patience": 1}, "underfitting", "both still fall"),
        (
            FALLING,
            [2.0, 1.5, 1.2, 1.3, 1.5, 1.8],
            {},
            "overfitting",
            "validation loss was lowest (1.2) at record 3 of 6 and is at 1.533 by now",
        ),
        (FALLING, [2.1, 1.7, 1.4, 1.1, 0.9, 0.7], {}, "underfitting", "both still fall"),
        (
            FALLING,
            [2.1, 1.2, 1.2, 1.2, 1.2, 1.2],
            {"patience": 2},
            "overfitting",
            "training loss (0.7) still falls, and validation loss (1.2)",
        ),
        ([2.0, 2.5, 3.0, 3.5, 4.0, 5.0], FALLING, {}, "diverged", "training loss is 4.167"),
        ([2.0, 1.0, 1.0, 1.0, 1.0, float("nan")], FALLING, {}, "diverged", "training loss is nan"),
        ([2.0, 1.9, 1.9, 1.9, 1.9, 1.9], [2.0] * 6, {"tolerance": 0.02}, "underfitting", "more than half of the first loss 2 is left"),
        (FLAT, FLAT, {}, "fitted", "training loss stands still at 0.5; the gap is 0"),
        (FLAT, [loss + 0.1 for loss in FLAT], {"goal": 0.1}, "underfitting", "the goal 0.1 is farther away"),
        (FLAT, [loss + 0.1 for loss in FLAT], {"goal": 0.45}, "overfitting", "more than what is left to the goal 0.45"),
        (FLAT, FLAT, {"goal": 0.5}, "fitted", "the goal 0.5 is reached"),
    ],
)
def test_each_rule_gives_its_verdict(train, val, options, kind, words):
    verdict = diagnose_fit(train, val, **options)
    assert verdict.kind == kind
    assert words in verdict.reason
    assert str(verdict) == f"{kind}: {verdict.reason}. {verdict.advice}."


def test_noise_within_the_tolerance_does_not_count():
    noisy = [1.0, 0.501, 0.5, 0.502, 0.503, 0.502, 0.504, 0.503]
    assert diagnose_fit(FLAT, noisy).kind == "fitted"
    assert diagnose_fit(FALLING, [2.1, 1.2, 1.2, 1.21, 1.21, 1.21], tolerance=0.001).kind == "overfitting"


def test_curves_of_different_lengths_are_refused():
    with pytest.raises(errors.ArgumentError, match="`train` and `val` must be losses at the same moments, got 2 and 1 of them"):
        diagnose_fit([1.0, 2.0], [1.0])


class Logs(Net):
    """Logs its training loss over epochs."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_both_ways_to_the_training_loss_agree_with_the_losses_of_the_batches(options, tmp_path):
    logger = CSVLogger(tmp_path)
    named = lt.FitDiagnosis(train="train_loss", name="named")
    run = fit([lt.FitDiagnosis(), named], Logs, logger=logger, **options)
    means = [sum(run.losses[5 * epoch : 5 * epoch + 5]) / 5 for epoch in range(3)]
    for curves in (run.trick.curves, named.curves):
        assert curves["train_loss"] == pytest.approx(means, rel=1e-5)
        assert curves["step"] == ([3.0, 6.0, 9.0] if options else [5.0, 10.0, 15.0])
        assert curves["gap"] == pytest.approx([v - t for v, t in zip(curves["val_loss"], curves["train_loss"], strict=True)])
    assert curves["val_loss"][-1] == pytest.approx(run.trainer.callback_metrics["val_loss"].item())
    logged = [row["fit_diagnosis/gap"] for row in logger.experiment.metrics if "fit_diagnosis/gap" in row]
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "fit_diagnosis/gap" in header
    assert "fit_diagnosis_named/train_loss" in header
    assert logged == []  # everything was written


def test_several_validations_in_an_epoch_are_several_records():
    curves = fit([lt.FitDiagnosis()], val_check_interval=2).trick.curves
    assert curves["step"] == [2.0, 4.0, 7.0, 9.0, 12.0, 14.0]


def test_training_loss_is_measured_anew_in_evaluation_mode_and_leaves_no_trace():
    class Watched(Logs):
        modes = ()

        def training_step(self, batch, batch_idx):
            self.modes = (*self.modes, self.training)
            return super().training_step(batch, batch_idx)

    plain = fit([lt.FitDiagnosis()], Watched)
    run = fit([lt.FitDiagnosis(batches=3)], Watched)
    assert run.module.modes == ((True,) * 5 + (False,) * 3) * 3
    own = [loss for loss, training in zip(run.losses, run.module.modes, strict=True) if training]
    assert own == plain.losses
    assert torch.equal(run.random_state, plain.random_state)
    aside = [loss for loss, training in zip(run.losses, run.module.modes, strict=True) if not training]
    assert run.trick.curves["train_loss"] == pytest.approx([sum(aside[3 * epoch :][:3]) / 3 for epoch in range(3)], rel=1e-5)
    assert run.trainer.callback_metrics["train_loss"] == plain.trainer.callback_metrics["train_loss"]
    assert run.module.training == plain.module.training
    assert "log" not in vars(run.module)


def test_the_verdict_is_told_at_the_end(monkeypatch):
    told = []
    monkeypatch.setattr("lightning_tricks.diagnostics._fit_diagnosis.rank_zero_info", told.append)
    trick = fit([lt.FitDiagnosis(patience=1)]).trick
    assert trick.diagnosis.kind in {"overfitting", "underfitting", "fitted", "diverged"}
    assert told == [f"FitDiagnosis(patience=1): {trick.diagnosis}"]


def test_curves_of_a_resumed_run_are_those_of_one_that_never_stopped(tmp_path):
    whole = fit([lt.FitDiagnosis(), StepCheckpoints(tmp_path, 8)]).trick
    resumed = fit([lt.FitDiagnosis()], ckpt_path=tmp_path / "step=8.ckpt", seed=9).trick
    assert resumed.curves["step"] == whole.curves["step"] == [5.0, 10.0, 15.0]
    for quantity in ("train_loss", "val_loss"):
        assert resumed.curves[quantity] == pytest.approx(whole.curves[quantity], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"val": "loss"}, "`val='loss'` was not logged: found 'val_loss'. Name one of these."),
        ({"train": "train"}, "`train='train'` was not logged: found 'train_loss', 'val_loss'. Name one of these."),
    ],
)
def test_a_missing_name_is_an_error_that_lists_what_was_logged(arguments, words):
    with pytest.raises(errors.NothingMatchedError, match=re.escape(words)):
        make_trainer([lt.FitDiagnosis(**arguments)]).fit(Logs(), Loader(), Loader(2))


class ByHand(Logs):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def test_manual_optimization_needs_a_name():
    with pytest.raises(
        errors.TrickError, match=r"takes the loss that `training_step` returns, and got .* without one\. Log it, and name it"
    ):
        make_trainer([lt.FitDiagnosis()]).fit(ByHand(), Loader(), Loader(2))
    with pytest.raises(errors.TrickError, match=r"under manual optimization that trains\. Leave `batches` out"):
        make_trainer([lt.FitDiagnosis(batches=2)]).fit(ByHand(), Loader(), Loader(2))
    assert len(fit([lt.FitDiagnosis(train="train_loss")], ByHand).trick.curves["gap"]) == 3
