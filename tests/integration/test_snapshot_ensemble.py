"""Snapshot ensembles in whole runs: rates, members, and what evaluation sees of them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lightning_tricks as lt
from contracts.harness import KeepRandomState, Loader, Recorder, Run, StepCheckpoints, assert_equal, make_trainer, weights
from lightning_tricks import errors, functional, optim, schedules
from lightning_tricks.ensembling._cyclic_rates import CyclicRates
from lightning_tricks.ensembling._evaluating import labels_in
from lightning_tricks.ensembling._snapshot_ensemble import cycle_ends, snapshot_factor
from reference import snapshot_ensemble as reference

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:.*does not have many workers")


class Small(pl.LightningModule):
    """A classifier with BatchNorm and two groups of parameters, which notes rates and what its `forward` returns in evaluation."""

    def __init__(self, scheduler=None, way="call") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.scheduler, self.way = scheduler, way
        self.rates, self.outputs = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def evaluate(self, batch):
        output = {"call": self, "forward": self.forward, "submodule": self.net}[self.way](batch[0])
        if not self.trainer.sanity_checking:
            self.outputs.append(output.detach().clone())
        return nn.functional.cross_entropy(output, batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.evaluate(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.evaluate(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def groups(self):
        return [{"params": self.net[1].parameters(), "lr": 0.2}, {"params": [*self.net[2].parameters(), *self.net[4].parameters()]}]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.groups(), lr=0.05, momentum=0.9)
        return optimizer if self.scheduler is None else [[optimizer], [self.scheduler(optimizer)]]


def trick(folder, members=3, **options):
    return lt.SnapshotEnsemble(members, dirpath=str(folder / "members"), **options)


def member_models(callback):
    return list(callback.to_ensemble())


BATCHES = list(Loader(2, seed=1))


def fixed(*batches):
    """Hand out the same batches in the same order."""
    return DataLoader(batches, batch_size=None)


VALIDATION = fixed(*BATCHES)


def fit(callbacks, model=Small, *, seed=0, ckpt_path=None, **options):
    """Train on the suite's data, and validate on the same batches each time."""
    torch.manual_seed(seed)
    module, recorder = model(), Recorder()
    trainer = make_trainer([*callbacks, KeepRandomState(), recorder], **{"num_sanity_val_steps": 2, **options})
    torch.manual_seed(seed + 1)
    trainer.fit(module, Loader(), VALIDATION, ckpt_path=ckpt_path)
    return Run(module, trainer, list(callbacks), recorder.history[-1], torch.get_rng_state())


# The formula


@pytest.mark.parametrize(("total", "cycles"), [(10, 5), (15, 4), (7, 1), (9, 4), (3, 5), (300, 7)])
def test_rates_and_ends_are_those_of_the_paper(total, cycles):
    length = -(-total // cycles)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, length)
    for t in range(1, total + 1):
        assert 0.1 * snapshot_factor(t - 1, length) == pytest.approx(reference.rate(0.1, t, total, cycles), abs=1e-15)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.rate(0.1, t, total, cycles), abs=1e-15)
        optimizer.step()
        restarts.step()
    counts = [cycle_ends(t, length, total) for t in range(total + 1)]
    assert [t for t in range(1, total + 1) if counts[t] > counts[t - 1]] == reference.ends(total, cycles)


@pytest.mark.parametrize("cycles", [3, 4])
def test_a_run_is_that_of_a_loop_written_by_hand(tmp_path, cycles):
    run = fit([trick(tmp_path, cycles=cycles)])
    torch.manual_seed(0)
    twin = Small()
    loader = Loader()
    batches = [batch for _ in range(3) for batch in loader]
    saved = reference.train(twin.net, torch.optim.SGD(twin.groups(), lr=0.05, momentum=0.9), batches, 15, cycles)
    assert_equal(weights(run.module.net), weights(twin.net))
    members = member_models(run.trick)
    assert len(members) == 3
    for member, expected in zip(members, saved[-3:], strict=True):
        assert_equal(weights(member.net), weights(expected))
    for output, (x, _) in zip(run.module.outputs[-2:], BATCHES, strict=True):
        torch.testing.assert_close(output.softmax(-1), reference.predict(saved[-3:], x))
    expected = [[reference.rate(base, t, 15, cycles) for base in (0.2, 0.05)] for t in range(1, 16)]
    assert run.module.rates == [pytest.approx(pair, abs=1e-15) for pair in expected]


# Who owns the rate


SCHEDULERS = {
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1),
    "warm-up": lambda optimizer: {
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10),
        "interval": "step",
    },
    "plateau": lambda optimizer: {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), "monitor": "val_loss"},
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_rates_are_taken_over_from_any_scheduler_and_said_to_be(tmp_path, kind, caplog):
    plain = fit([trick(tmp_path)])
    with caplog.at_level("INFO", "lightning.pytorch"):
        run = fit([trick(tmp_path)], lambda: Small(SCHEDULERS[kind]))
    assert run.module.rates == plain.module.rates
    assert_equal(run.trained, plain.trained)
    assert re.search(r"SnapshotEnsemble\(.*\) takes the learning rates over from \w+(LR|Plateau) of Small\.", caplog.text)


def test_restart_lr_is_the_highest_rate_and_groups_keep_their_ratio(tmp_path):
    run = fit([trick(tmp_path, restart_lr=0.4)])
    assert run.module.rates[0] == run.module.rates[5] == pytest.approx([0.4, 0.1])
    with pytest.raises(errors.UnsupportedOptimizerError, match="no parameter group of SGD has one"):
        CyclicRates().attach([torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)], lambda _: 1.0)


def test_without_a_schedule_the_modules_own_runs_on(tmp_path):
    run = fit([trick(tmp_path, schedule=None)], lambda: Small(SCHEDULERS["step"]))
    assert [rates[1] for rates in run.module.rates[::5]] == pytest.approx([0.05, 0.005, 0.0005])
    assert [member.facts["step"] for member in run.trick._members] == [5, 10, 15]


def test_a_schedule_of_the_optimizer_factory_is_a_conflict_and_the_factory_alone_is_none(tmp_path):
    recipe = optim.SGD(lr=0.1, momentum=0.9)
    with pytest.raises(errors.TrickConflictError, match=r"both set the learning rates. Keep one, or pass `schedule=None` to one\."):
        fit([trick(tmp_path), lt.OptimizerFactory(recipe, schedule=schedules.Cosine())])
    run = fit([trick(tmp_path), lt.OptimizerFactory(recipe)])
    assert [rates[0] for rates in run.module.rates[:5]] == pytest.approx([reference.rate(0.1, t, 15, 3) for t in range(1, 6)])
    fit([trick(tmp_path, schedule=None), lt.OptimizerFactory(recipe, schedule=schedules.Cosine())])


def test_a_rate_that_was_searched_for_is_the_base_rate_and_the_search_runs_its_course(tmp_path):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    optimizer.param_groups[0]["initial_lr"] = 1e-8
    rates = CyclicRates()
    rates.attach([optimizer], lambda _: 0.5, found=True)
    assert optimizer.param_groups[0]["lr"] == 0.15
    callback = trick(tmp_path)
    asked = []
    callback._silent = ["the module's"]
    callback._step_scheduler(lambda *arguments: asked.append(arguments), "the search's", None)
    callback._step_scheduler(lambda *arguments: asked.append(arguments), callback._silent[0], None)
    assert asked == [("the search's", None)]


def test_a_monitor_sees_the_rate_of_the_step(tmp_path):
    seen = []

    class Watch(LearningRateMonitor):
        def on_train_batch_start(self, trainer, *_):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

        def on_train_start(self, *_):
            pass

        on_train_epoch_start = on_train_start

    run = fit([trick(tmp_path), Watch()])
    assert seen == run.module.rates


# Steps


@pytest.mark.parametrize(("options", "ends"), [({"accumulate_grad_batches": 2}, [3, 6, 9]), ({"max_steps": 7}, [3, 6, 7])])
def test_cycles_have_steps_of_the_optimizer(tmp_path, options, ends):
    run = fit([trick(tmp_path)], **options)
    assert [member.facts["step"] for member in run.trick._members] == ends
    if "accumulate_grad_batches" not in options:  # otherwise Lightning calls `optimizer_step` for each batch
        assert len(run.module.rates) == 7


def test_a_step_that_is_skipped_is_none():
    class Fused(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    optimizer = Fused([nn.Parameter(torch.zeros(1))], {"lr": 1.0})
    rates, seen = CyclicRates(), []
    rates.attach([optimizer], lambda step: 1 / (1 + step))
    for skipped in (False, True, True, False):
        optimizer.found_inf = torch.tensor(float(skipped))  # as a gradient scaler tells fused optimizers
        optimizer.step()
        seen.append((rates.steps, optimizer.param_groups[0]["lr"]))
    assert seen == [(1, 1 / 2), (1, 1 / 2), (1, 1 / 2), (2, 1 / 3)]


class Manual(Small):
    """Steps two optimizers by itself, the second every other time, and a scheduler that would spoil everything."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.rates.append((first.param_groups[0]["lr"], second.param_groups[0]["lr"]))
        if batch_idx % 2:
            second.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        one, two = torch.optim.SGD(self.net[1].parameters(), lr=0.2), torch.optim.Adam(self.net[4].parameters(), lr=0.01)
        return [one, two], [torch.optim.lr_scheduler.ExponentialLR(one, 0.5)]


def test_the_first_of_two_optimizers_counts_and_both_follow(tmp_path):
    run = fit([trick(tmp_path)], Manual)
    assert [member.facts["step"] for member in run.trick._members] == [5, 10, 15]
    written_after = [snapshot_factor(t, 5) for t in range(1, 16)]
    assert [second for _, second in run.module.rates] == pytest.approx([0.01 * factor for factor in written_after])
    assert [first for first, _ in run.module.rates] == pytest.approx([0.2 * factor for factor in written_after])


def test_groups_that_join_have_base_rates_of_their_own():
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=torch.tensor(1.0))  # a rate that compiled optimizers read from a tensor
    rates = CyclicRates()
    rates.attach([optimizer], lambda step: 1 / (1 + step))
    optimizer.add_param_group({"params": [second], "lr": 8.0})
    optimizer.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 4.0]


# What evaluation sees


@pytest.mark.parametrize("way", ["call", "forward", "submodule"])
def test_evaluation_is_that_of_the_members_and_training_goes_on_as_without(tmp_path, way):
    target = "net" if way == "submodule" else None
    silent = fit([trick(tmp_path, evaluate=False)], lambda: Small(way=way))
    run = fit([trick(tmp_path, target=target)], lambda: Small(way=way))
    assert_equal(run.trained, silent.trained)
    assert_equal(weights(run.module), weights(silent.module))
    members = member_models(run.trick)
    for epoch in range(3):
        for (x, _), output in zip(BATCHES, run.module.outputs[2 * epoch : 2 * epoch + 2], strict=True):
            torch.testing.assert_close(output.softmax(-1), reference.predict(members[: epoch + 1], x))
    before = weights(run.module)
    tested = run.trainer.test(run.module, VALIDATION, verbose=False)[0]
    expected = torch.stack([reference.predict(members, x).log() for x, _ in BATCHES])
    losses = [nn.functional.nll_loss(logs, y) for logs, (_, y) in zip(expected, BATCHES, strict=True)]
    assert tested["test_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert_equal(weights(run.module), before)
    assert not {"forward", "_call_impl"} & vars(run.module).keys() | vars(run.module.net).keys() & {"forward", "_call_impl"}
    measured = {key.partition("/")[2]: value for key, value in tested.items() if "/" in key}
    assert measured["nll"] == pytest.approx(tested["test_loss"], rel=1e-5)
    predictions = torch.stack([torch.cat([member(x) for x, _ in BATCHES]) for member in members])
    predictions = predictions.detach()
    assert measured["disagreement"] == pytest.approx(float(functional.disagreement(predictions).mean()))
    assert measured["mutual_information"] == pytest.approx(float(functional.decompose_uncertainty(predictions).epistemic.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "combined"),
    [
        ({"combine": "logits"}, lambda outputs: outputs.mean(0)),
        ({"combine": "vote"}, lambda outputs: functional.combine_predictions(outputs, combine="vote")),
        ({"combine": "mean"}, lambda outputs: outputs.mean(0)),
        ({"memory": "disk"}, functional.combine_predictions),
    ],
)
def test_members_are_combined_as_asked_and_tell_their_uncertainty(tmp_path, options, combined):
    seen = []

    class Ask(Callback):
        def on_predict_batch_end(self, *_):
            seen.append(run.trick.uncertainty().total.clone())

    run = fit([trick(tmp_path, **options), Ask()])
    with pytest.raises(errors.TrickError, match="members have made none"):
        run.trick.uncertainty()
    predicted = run.trainer.predict(run.module, VALIDATION)
    for i, (x, _) in enumerate(BATCHES):
        with torch.no_grad():
            outputs = torch.stack([member(x) for member in member_models(run.trick)])
        torch.testing.assert_close(predicted[i], combined(outputs))
        if options.get("combine") == "mean":
            torch.testing.assert_close(seen[i], outputs.var(0, unbiased=False))
    assert len(seen) == 2


def test_members_have_their_own_metrics_when_asked(tmp_path):
    run = fit([trick(tmp_path, evaluate="members")])
    joint = fit([trick(tmp_path)])
    for i, member in enumerate(member_models(run.trick)):
        with torch.no_grad():
            loss = torch.stack([nn.functional.cross_entropy(member(x), y) for x, y in BATCHES]).mean()
        torch.testing.assert_close(run.trainer.logged_metrics[f"member_{i}/val_loss"], loss)
    assert "member_0/val_loss" not in run.trainer.callback_metrics
    assert run.trainer.callback_metrics["val_loss"] == joint.trainer.callback_metrics["val_loss"]
    assert_equal(run.trained, joint.trained)


def test_labels_are_found_where_they_often_are_or_where_said(tmp_path):
    x, y = BATCHES[0]
    for item, batch in ((None, (x, y)), (None, {"x": x, "label": y}), (2, (x, "text", y)), ("class", {"x": x, "class": y})):
        assert labels_in(batch, item) is y
    assert labels_in(x, None) is labels_in((x, "text"), None) is labels_in({"x": x}, None) is None
    with pytest.raises(errors.TrickError, match="`item='class'` must name the labels in each batch, and a dict has nothing there"):
        labels_in({"x": x}, "class")
    run = fit([trick(tmp_path)])
    run.module.evaluate = lambda batch: run.module(batch[0]).sum()
    measured = run.trainer.test(run.module, fixed((x, x)), verbose=False)[0]  # of which the second has no classes
    assert {"snapshot_ensemble/nll", "snapshot_ensemble/disagreement"} & measured.keys() == {"snapshot_ensemble/disagreement"}


def test_an_ensemble_that_never_answers_is_an_error_at_once(tmp_path):
    with pytest.raises(errors.TrickError, match=r"in the place of `forward` of Small, which this evaluation has never called.*by `target`"):
        fit([trick(tmp_path)], lambda: Small(way="submodule"))
    assert not (tmp_path / "members").exists()


def test_an_evaluation_without_members_says_so(tmp_path):
    module = Small()
    with pytest.warns(UserWarning, match="has no members of this model, which is evaluated as it is"):
        make_trainer([trick(tmp_path)]).validate(module, VALIDATION, verbose=False)
    with torch.no_grad():
        assert torch.equal(module.outputs[0], module.eval()(BATCHES[0][0]))


def test_what_cannot_be_combined_or_traced_is_refused(tmp_path):
    class Pair(Small):
        def forward(self, x):
            return self.net(x), x

        def evaluate(self, batch):
            return nn.functional.cross_entropy(self(batch[0])[0], batch[1])

    class Graded(Small):
        def evaluate(self, batch):
            with torch.enable_grad():
                return super().evaluate(batch)

    with pytest.raises(errors.TrickError, match=r"must be one tensor of floating-point numbers, got a tuple. Name a submodule"):
        fit([trick(tmp_path)], Pair)
    module = Graded()
    before = None

    class Keep(Callback):
        def on_validation_start(self, trainer, pl_module):
            nonlocal before
            before = weights(pl_module)

    with pytest.raises(errors.TrickError, match="gradients are enabled"):
        make_trainer([trick(tmp_path), Keep()], inference_mode=False).fit(module, Loader(), VALIDATION)
    assert_equal(weights(module), before)


def test_strategies_that_hide_weights_are_refused(tmp_path):
    callback = trick(tmp_path)
    for name in ("FSDPStrategy", "DeepSpeedStrategy"):
        trainer = SimpleNamespace(callbacks=[callback], strategy=type(name, (), {})())
        with pytest.raises(errors.UnsupportedStrategyError, match=rf"cannot work under {name}: it"):
            callback.setup(trainer, Small(), "fit")


# Members


def test_averaged_weights_are_taken_from_the_callback_that_averages(tmp_path):
    for average in (lt.EMA(0.5, evaluate=False), lt.PolyakAveraging(every="1 epoch", evaluate=False)):
        states = []

        class Keep(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                states.append(average.averaged_state_dict())  # noqa: B023

        run = fit([trick(tmp_path, weights="average"), average, Keep()])
        for member, state in zip(member_models(run.trick), states, strict=True):
            assert_equal(weights(member), state)
        assert_equal(run.trained, fit([trick(tmp_path)]).trained)
        assert not torch.equal(states[-1]["net.1.weight"], run.trained["net.1.weight"])


def test_averaged_weights_need_one_callback_that_leaves_evaluation_alone(tmp_path):
    with pytest.raises(errors.TrickError, match=r"no callback of this Trainer averages any. Add one.*`EMA\(evaluate=False\)`"):
        fit([trick(tmp_path, weights="average")])
    with pytest.raises(errors.TrickConflictError, match=r"both replace the weights used for evaluation\. Keep one, or"):
        fit([trick(tmp_path, weights="average"), lt.EMA()])
    with pytest.raises(errors.TrickConflictError, match=r"average some\. Keep one"):
        fit([trick(tmp_path, weights="average"), lt.EMA(evaluate=False), lt.PolyakAveraging(evaluate=False)])


def test_batch_norm_is_that_of_each_member_or_measured_anew(tmp_path):
    plain = fit([trick(tmp_path)])
    run = fit([trick(tmp_path, refresh_batch_norm="all"), lt.BatchNormRefresh(on="validation")])
    assert_equal(run.trained, plain.trained)
    assert torch.equal(run.random_state, plain.random_state)
    assert weights(run.module)["net.2.running_mean"].ne(run.trained["net.2.running_mean"]).any()  # by the other callback, at the end
    for member, other in zip(member_models(run.trick), member_models(plain.trick), strict=True):
        assert torch.equal(member.net[1].weight, other.net[1].weight)
        inputs = member.net[:2](Loader().x)
        torch.testing.assert_close(member.net[2].running_mean, inputs.mean(0))
        torch.testing.assert_close(member.net[2].running_var, inputs.var(0))
        assert not torch.allclose(other.net[2].running_mean, inputs.mean(0))
    with pytest.raises(errors.NothingMatchedError, match="no BatchNorm of any kind"):
        fit([trick(tmp_path, refresh_batch_norm=2)], Headless)


class Headless(Small):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()


def test_a_run_that_is_too_short_or_cut_short_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"makes 3 cycles of 5 steps rather than 4|makes 2 cycles of 1 steps rather than 3"):
        short = fit([trick(tmp_path)], max_steps=2)
    assert len(short.trick._members) == 2

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 10

    with pytest.warns(UserWarning, match=r"after 10 of 21 steps, 3 steps into a cycle of 7, which gives no member: the ensemble has 1\."):
        fit([trick(tmp_path), Stop()], max_steps=21, max_epochs=-1)
    with pytest.raises(errors.TrickError, match=r"this fit has no known length. Set `max_steps`"):
        make_trainer([trick(tmp_path)], max_epochs=-1).fit(Small(), Loader())


# Checkpoints


def test_a_checkpoint_has_its_members_and_the_plain_weights(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", filename="best")
    run = fit([trick(tmp_path, 2, cycles=3), best, StepCheckpoints(tmp_path, 7, 15)])
    last = weights(run.module)
    assert_equal(torch.load(tmp_path / "step=15.ckpt", weights_only=True)["state_dict"], last)
    entry = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["lightning_tricks"]["SnapshotEnsemble"]
    assert entry["steps"] == 7
    assert [member["facts"] for member in entry["members"]] == [{"step": 5, "cycle": 1}]
    other = make_trainer([trick(tmp_path, 2, cycles=3)])
    twin = Small()
    for path in (tmp_path / "step=15.ckpt", best.best_model_path):
        mine = run.trainer.test(run.module, VALIDATION, ckpt_path=path, verbose=False)
        assert mine == other.test(twin, VALIDATION, ckpt_path=path, verbose=False)
    assert best.best_model_score == pytest.approx(mine[0]["test_loss"])
    entry = torch.load(tmp_path / "step=15.ckpt", weights_only=True)["lightning_tricks"]["SnapshotEnsemble"]
    (tmp_path / "members" / entry["members"][1]["files"][0]).unlink()
    with pytest.raises(errors.CheckpointError, match=r"members.*\.safetensors"):
        make_trainer([trick(tmp_path, 2, cycles=3)]).test(Small(), VALIDATION, ckpt_path=tmp_path / "step=15.ckpt", verbose=False)


@pytest.mark.parametrize("step", [3, 12])
def test_resuming_anywhere_gives_the_same_rates_and_members(tmp_path, step):
    whole = fit([trick(tmp_path, 2, cycles=4), StepCheckpoints(tmp_path, step)])
    again = fit([trick(tmp_path, 2, cycles=4)], ckpt_path=tmp_path / f"step={step}.ckpt", seed=9)
    assert again.module.rates == whole.module.rates[step:]
    assert [member.facts for member in again.trick._members] == [member.facts for member in whole.trick._members]
    for one, other in zip(member_models(again.trick), member_models(whole.trick), strict=True):
        assert_equal(weights(one), weights(other))
    for one, other in zip(again.module.outputs[-2:], whole.module.outputs[-2:], strict=True):
        assert torch.equal(one, other)


def test_a_longer_fit_goes_on_and_a_new_one_begins_anew(tmp_path):
    run = fit([trick(tmp_path)])
    run.trainer.fit_loop.max_epochs = 6
    run.trainer.fit(run.module, Loader(seed=3), VALIDATION)
    assert [member.facts["step"] for member in run.trick._members] == [15, 20, 30]  # two cycles of 10, after three of 5
    make_trainer([run.trick]).fit(run.module, Loader(seed=4), VALIDATION)
    assert [member.facts["step"] for member in run.trick._members] == [5, 10, 15]


def test_rates_are_set_on_groups_that_are_divided_within_steps():
    seen = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    tuning = lt.FineTuning({0: "*"}, lr_factors={"net.*.weight": 0.5})
    for tricks in ([lt.SnapshotEnsemble(3), tuning], [tuning, lt.SnapshotEnsemble(3)], [lt.SnapshotEnsemble(3)]):
        fit([*tricks, Rates()])
    assert seen[:15] == seen[15:30] == seen[30:]
    assert len({tuple(rates) for rates in seen[:5]}) == 5


@pytest.mark.parametrize(
    ("ensemble", "taken"),
    [(lt.SnapshotEnsemble(3), [5, 10, 14]), (lt.FastGeometricEnsemble(3, start=0, cycle=6), [3, 9, 14])],
    ids=["snapshot", "geometric"],
)
def test_a_skipped_step_costs_no_member(ensemble, taken):
    class Scaler(Callback):
        def on_train_start(self, trainer, pl_module):
            optimizer = trainer.optimizers[0]
            optimizer.register_step_post_hook(lambda *_: setattr(optimizer, "found_inf", torch.tensor(float(trainer.global_step == 2))))

        def on_train_batch_end(self, trainer, *_):
            del trainer.optimizers[0].found_inf

    fit([Scaler(), ensemble])
    assert [member.facts["step"] for member in ensemble._members] == taken
