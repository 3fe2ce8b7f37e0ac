"""FastGeometricEnsemble: rates, members, and where it joins a run."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn.functional import cross_entropy

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors, optim, schedules
from reference.ensembles import geometric_members, geometric_rate


class Groups(Net):
    """Has two groups of different rates, and a schedule of its own that is stepped at each step."""

    def configure_optimizers(self):
        groups = [{"params": self.head.parameters(), "lr": 0.1}, {"params": [*self.body.parameters(), *self.neck.parameters()]}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(Callback):
    """Notes the rates of each step, and the weights after it."""

    def __init__(self) -> None:
        self.rates, self.weights = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append({name: value for name, value in weights(pl_module).items() if "tracked" not in name})


class ByHand(Callback):
    """Writes rates before each step, in a run without the trick."""

    def __init__(self, rates) -> None:
        self.rates = rates

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for group, rate in zip(optimizer.param_groups, self.rates[trainer.global_step], strict=True):
            group["lr"] = rate


def expected_rates(lr, start=5, cycle=4):
    own = [[0.1 * 0.9**step, 0.05 * 0.9**step] for step in range(start)]
    highs = (0.05, 0.025) if lr is None else (lr[0], lr[0] / 2)
    low = 0.2 if lr is None else lr[1] / lr[0]
    return own + [[geometric_rate(i, cycle, high, low * high) for high in highs] for i in range(1, 16 - start)]


@pytest.mark.parametrize("lr", [None, (0.4, 0.004)])
def test_rates_and_members_are_those_of_the_paper(lr, caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch")
    watch, expected = Watch(), expected_rates(lr)
    trick = lt.FastGeometricEnsemble(2, start=5, cycle=4, lr=lr)
    run = fit([trick, watch], Groups)
    torch.testing.assert_close(torch.tensor(watch.rates), torch.tensor(expected))
    assert "takes the learning rates over from ExponentialLR of Groups after 5 steps" in caplog.text
    by_hand = Watch()
    fit([ByHand(watch.rates), by_hand], Groups)
    assert_equal(run.trained, {**run.trained, **by_hand.weights[-1]})
    taken = [5 + i for i in geometric_members(10, 4)]
    assert [dict(member.facts) for member in trick._members] == [{"step": step, "cycle": i} for i, step in enumerate(taken, 1)][-2:]
    for step, member in zip(taken[-2:], trick.to_ensemble(), strict=True):
        assert_equal({**weights(member), **by_hand.weights[step - 1]}, weights(member))


def test_evaluation_is_that_of_the_mean_probabilities():
    trick = lt.FastGeometricEnsemble(3, start=3, cycle=4)
    run = fit([trick])
    batches = list(Loader(2, seed=1))
    with torch.no_grad():
        predicted = [torch.stack([member(x).softmax(-1) for member in trick.to_ensemble()]).mean(0).log() for x, _ in batches]
    expected = sum(cross_entropy(logits, y) for logits, (_, y) in zip(predicted, batches, strict=True)) / 2
    found = run.trainer.validate(run.module, Loader(2, seed=1), verbose=False)[0]["val_loss"]
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("members", "start", "steps"), [(3, 5, [7, 11, 15]), (1, 0, [15]), (2, "20%", [7, 15]), (2, 6, [9, 15])])
def test_without_a_cycle_the_last_member_is_taken_at_the_end(members, start, steps):
    trick = lt.FastGeometricEnsemble(members, start=start)
    fit([trick])
    assert [member.facts["step"] for member in trick._members] == steps


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_it_joins_a_run_where_a_checkpoint_ends(tmp_path):
    fit([ModelCheckpoint(tmp_path, filename="pretrained")], Groups, max_epochs=1)
    trick, watch = lt.FastGeometricEnsemble(2, start=5, cycle=4), Watch()
    fit([trick, watch], Groups, ckpt_path=tmp_path / "pretrained.ckpt")
    torch.testing.assert_close(torch.tensor(watch.rates), torch.tensor(expected_rates(None)[5:]))
    assert [member.facts["step"] for member in trick._members] == [11, 15]


def test_the_schedule_of_a_recipe_rules_until_the_start():
    for order in (1, -1):
        watch = Watch()
        tricks = [lt.FastGeometricEnsemble(2, start=5, cycle=4), lt.OptimizerFactory(optim.SGD(0.1), schedule=schedules.Cosine())]
        fit([watch, *tricks[::order]])
        expected = [0.1 * schedules.Cosine().value(step, 15) for step in range(5)] + [
            geometric_rate(i, 4, 0.05, 0.01) for i in range(1, 11)
        ]
        torch.testing.assert_close(torch.tensor(watch.rates)[:, 0], torch.tensor(expected))


def test_cycles_of_the_modules_own_are_left_alone():
    watch, trick = Watch(), lt.FastGeometricEnsemble(2, start=5, cycle=4, schedule=None)
    fit([trick, watch], Groups)
    assert watch.rates[-1] == pytest.approx([0.1 * 0.9**14, 0.05 * 0.9**14])
    assert [member.facts["step"] for member in trick._members] == [11, 15]


def test_a_fit_that_is_too_short_is_said():
    with pytest.warns(UserWarning, match=r"takes 1 members rather than 3: the fit has 15 steps, of which the cycles of 8 begin after 10"):
        fit([lt.FastGeometricEnsemble(3, start=10, cycle=8)])
    with pytest.raises(errors.TrickError, match=r"divides the rest of the fit into cycles.*no known length\. Pass `cycle`"):
        make_trainer([lt.FastGeometricEnsemble(start=1)], max_epochs=-1, max_time="00:00:00:01").fit(Net(), Loader())


def test_two_that_set_rates_are_refused():
    pairs = [
        (lt.FastGeometricEnsemble(evaluate=False, name="a"), lt.SnapshotEnsemble()),
        (lt.FastGeometricEnsemble(evaluate=False, name="a"), lt.FastGeometricEnsemble()),
    ]
    for pair in pairs:
        for callbacks in (pair, pair[::-1]):
            with pytest.raises(errors.TrickConflictError, match=r"both set the learning rates. Keep one, or pass `schedule=None` to one"):
                fit(callbacks)
