"""The rule of LossSpikeGuard, and that a step which it leaves out leaves nothing behind."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import lightning_tricks as lt
from contracts.harness import StepCheckpoints, assert_equal, make_trainer, weights
from lightning_tricks import errors, optim
from lightning_tricks._core.clock import after_each_step
from lightning_tricks.optimization._guarding import GuardedStep
from lightning_tricks.optimization._loss_spike_guard import gradient_norm
from lightning_tricks.optimization._spikes import SpikeWindow
from reference import loss_spike_guard as reference

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]


class Regression(pl.LightningModule):
    """Has BatchNorm, whose statistics a bad batch spoils."""

    def __init__(self, make=lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1)):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.make = make

    def training_step(self, batch, batch_idx):
        return (self.net(batch) * batch.abs().max()).square().mean()

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.9), "interval": "step"}}


class States(Callback):
    """Keeps weights, statistics and the optimizer's state after each batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append({**weights(pl_module), **tensors_of(trainer.optimizers[0])})


def tensors_of(optimizer):
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value.clone() for index, each in state.items() for name, value in each.items() if isinstance(value, Tensor)}


def spoiled(*places, by=1e4):
    """Return the batches with some multiplied."""
    return [batch * by if place in places else batch for place, batch in enumerate(BATCHES)]


def fit(batches, *callbacks, module=None, **options):
    states, module = States(), Regression() if module is None else module
    trainer = make_trainer([*callbacks, states], max_epochs=1, **options)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer, module, states.states


# The rule


@pytest.mark.parametrize("window", [2, 8, 40])
def test_the_window_decides_as_the_rule_says(window):
    draw = random.Random(window)  # noqa: S311, no secret
    values = [draw.lognormvariate(0, 1) * draw.choice([1, 1, 1, 20]) - draw.choice([0, 3]) for _ in range(300)]
    values[40], values[50], values[60] = math.nan, math.inf, -math.inf
    watched, accepted, spikes = SpikeWindow(["loss"], window, 3.0), [], 0
    for value in values:
        spike = bool(watched.outliers({"loss": value}))
        assert spike == reference.is_spike(value, accepted, 3.0, window)
        spikes += spike
        if not spike:
            accepted.append(value)
            watched.accept({"loss": value})
    assert 10 < spikes < 250


def test_constant_values_leave_room_and_zeros_say_nothing():
    watched = SpikeWindow(["loss", "grad_norm"], 3, 10.0)
    for value in (1.0, 0.0, 1.0, 0.0, 1.0):
        assert watched.outliers({"loss": value, "grad_norm": 0.0}) == []
        watched.accept({"loss": value, "grad_norm": 0.0})
    assert watched.outliers({"loss": 1.09, "grad_norm": 1e9}) == []  # all its gradients have been zero
    assert watched.outliers({"loss": 1.11, "grad_norm": math.nan}) == ["loss", "grad_norm"]


def test_the_norm_is_that_of_all_gradients_in_any_precision():
    parameters = [nn.Parameter(torch.zeros(100, dtype=torch.float16)), nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad = torch.full((100,), 6e4, dtype=torch.float16)  # whose norm float16 does not hold
    parameters[1].grad = torch.sparse_coo_tensor(
        [[1, 1]], torch.full((2, 2), 1e5), (5, 2), check_invariants=True
    )  # entries of one row add up
    expected = math.sqrt(100 * 6e4**2 + 2 * 2e5**2)
    assert gradient_norm(torch.optim.SGD(parameters, lr=0.1)).item() == pytest.approx(expected, rel=1e-3)


# What a step that is left out leaves behind


@pytest.mark.parametrize(
    ("watch", "by", "options"),
    [
        ("grad_norm", 1e4, {}),
        ("loss", 1e4, {}),
        (["loss", "grad_norm"], math.nan, {}),
        ("grad_norm", 1e4, {"gradient_clip_val": 0.01}),  # to which all gradients are clipped
    ],
)
def test_nothing_of_a_bad_batch_stays(watch, by, options):
    guard = lt.LossSpikeGuard(window=3, watch=watch)
    trainer, module, states = fit(spoiled(5, 6, by=by), guard, **options)
    assert guard.skipped == 2
    assert_equal(states[4], states[5])
    assert_equal(states[4], states[6])
    assert trainer.global_step == 12  # Lightning counts on
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**12)
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 10
    assert not torch.equal(states[6]["net.0.weight"], states[7]["net.0.weight"])
    assert all(torch.isfinite(value).all() for value in weights(module).values())


def test_before_there_are_enough_values_only_what_is_not_finite_is_left_out():
    guard = lt.LossSpikeGuard(window=11)
    _, _, states = fit([*spoiled(4)[:6], BATCHES[6] * math.inf, *BATCHES[7:]], guard)
    assert guard.skipped == 1
    assert not torch.equal(states[3]["net.0.weight"], states[4]["net.0.weight"])
    assert_equal(states[5], states[6])


def test_accumulated_batches_are_left_out_together():
    guard = lt.LossSpikeGuard(window=2, watch=["loss", "grad_norm"])
    trainer, _, states = fit(spoiled(6), guard, accumulate_grad_batches=2)
    assert guard.skipped == 1
    assert trainer.global_step == 6
    assert_equal(states[5], states[7])  # the second batch of the step was not bad
    assert not torch.equal(states[5]["net.1.running_mean"], states[6]["net.1.running_mean"])


WRAPPERS = {
    "SAM": optim.SAM(optim.SGD(lr=0.01, momentum=0.9)),
    "Lookahead": optim.ClipNorm(optim.Lookahead(optim.AdamW(lr=0.01), k=3)),
    "GradientNoise": optim.GradientNoise(optim.SGD(lr=0.01, momentum=0.9)),
    "ScheduleFree": optim.ScheduleFree(optim.RMSprop(lr=0.01)),
}


@pytest.mark.parametrize("recipe", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_and_what_counts_steps_take_no_notice(recipe):
    decay = lt.WeightDecay(0.1, mode="l2", existing="replace")
    tricks = [decay, lt.EMA(0.5, evaluate=False), lt.GradientFlow(every=1, heat_map=False), lt.OptimizerFactory(recipe)]
    guard = lt.LossSpikeGuard(window=3)
    trainer, _, states = fit(spoiled(5), guard, *tricks)
    assert guard.skipped == 1
    assert_equal(states[4], states[5])
    counts = {value for name, value in trainer.optimizers[0].param_groups[0].items() if name.endswith("_steps")}
    assert counts <= {11}
    assert [track.steps for track in tricks[1]._averages.tracks] == [11]
    assert decay._decays[0].steps == 11
    assert tricks[2].steps == list(range(1, 12))


def test_sam_is_held_back_by_its_second_gradient_too():
    class Cliff(Regression):
        evaluations = 0

        def training_step(self, batch, batch_idx):
            self.evaluations += 1
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if self.evaluations == 12 else 1.0)  # the second one of the sixth step

    guard, module = lt.LossSpikeGuard(window=3, watch=["loss", "grad_norm"]), Cliff()
    _, _, states = fit(BATCHES, guard, lt.OptimizerFactory(optim.SAM(optim.SGD(lr=0.01))), module=module)
    assert guard.skipped == 1
    assert_equal(states[4], states[5])
    assert module.evaluations == 24


class Scaled(MixedPrecision):
    """Scales gradients in full precision, as fp16 does on a GPU."""

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_keeps_what_is_not_finite_and_the_guard_the_rest(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    guard = lt.LossSpikeGuard(window=3, watch=["loss", "grad_norm"], patience=2)
    module = Regression(lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=fused))
    batches = [batch * math.nan if place in {7, 8, 9} else batch for place, batch in enumerate(spoiled(5))]
    trainer, _, states = fit(batches, guard, module=module, plugins=[Scaled("16-mixed", "cpu", scaler)])
    assert guard.skipped == 1  # and three by the scaler, which are no concern of `patience`
    assert scaler.get_scale() == 2.0**7
    assert_equal(states[4], states[5])
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 8
    plain = lt.LossSpikeGuard(window=3, watch=["loss", "grad_norm"])
    fit(spoiled(5)[:7], plain, module=Regression(lambda parameters: torch.optim.Adam(parameters, lr=0.01)))
    scaled = guard._guards[0].window.state_dict(), plain._guards[0].window.state_dict()
    assert min(scaled[0]["loss"]) > 0
    for name in ("loss", "grad_norm"):  # none is a thousand times too large
        assert scaled[0][name][0] == pytest.approx(scaled[1][name][-1], rel=0.2)


class Two(Regression):
    """Optimizes by hand, and each layer by itself, the second without Lightning's wrapper."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers(use_pl_optimizer=True)[0], self.optimizers(use_pl_optimizer=False)[1]
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        if batch_idx == 5:
            self.net[0].weight.grad *= 1e4
        if batch_idx == 7:
            self.net[2].weight.grad *= 1e4
        first.step()
        second.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(layer.parameters(), lr=0.01) for layer in (self.net[0], self.net[2])]


def test_several_optimizers_are_judged_each_by_itself(tmp_path):
    guard, logger = lt.LossSpikeGuard(window=3), CSVLogger(tmp_path)
    _, _, states = fit(BATCHES, guard, module=Two(), logger=logger, log_every_n_steps=1)
    assert guard.skipped == 2
    moved = [[not torch.equal(one[name], other[name]) for one, other in pairwise(states)] for name in NAMES]
    assert [each.index(False) for each in moved] == [4, 6]
    assert [each.count(False) for each in moved] == [1, 1]
    logger.save()
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    for key in ("skipped", "grad_norm_0", "grad_norm_limit_0", "grad_norm_1", "grad_norm_limit_1"):
        assert f"loss_spike_guard/{key}" in header.split(",")


NAMES = ("net.0.weight", "net.2.weight")


# Giving up, refusing, going on


def test_it_gives_up_when_patience_is_exhausted():
    guard = lt.LossSpikeGuard(window=3, patience=3)
    with pytest.raises(errors.TrickError, match=r"has left out 3 steps in a row.*grad_norm .* is the limit\. Lower the learning rate"):
        fit(spoiled(4, 6, 7, 9, 10, 11), guard)
    assert guard.skipped == 5
    assert not any("step" in vars(guarded.optimizer) and guarded.step for guarded in guard._guards)


def test_what_cannot_be_guarded_is_refused():
    with pytest.raises(errors.UnsupportedOptimizerError, match="LBFGS moves weights between its evaluations"):
        fit(BATCHES, lt.LossSpikeGuard(), module=Regression(torch.optim.LBFGS))
    with pytest.raises(errors.TrickError, match="Two optimizes manually, where nothing tells which loss"):
        fit(BATCHES, lt.LossSpikeGuard(watch="loss"), module=Two())
    with pytest.raises(errors.TrickConflictError, match=r"would judge the same steps\. Keep one"):
        fit(BATCHES, lt.LossSpikeGuard(name="a"), lt.LossSpikeGuard(name="b"))


def test_a_resumed_run_remembers_windows_counts_and_patience(tmp_path):
    batches = spoiled(3, 5, 6, 7)
    whole, resumed = lt.LossSpikeGuard(window=3), lt.LossSpikeGuard(window=3)
    _, _, states = fit(batches, whole, StepCheckpoints(tmp_path, 7))
    entry = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["lightning_tricks"]["LossSpikeGuard"]
    assert (entry["skipped"], entry["optimizers"][0]["in_a_row"], len(entry["optimizers"][0]["values"]["grad_norm"])) == (3, 2, 3)
    module = Regression()
    trainer = make_trainer([resumed], max_epochs=1, max_steps=12)
    trainer.fit(module, torch.utils.data.DataLoader(batches[7:] * 3, batch_size=None), ckpt_path=tmp_path / "step=7.ckpt")
    assert resumed.skipped == whole.skipped == 4
    assert_equal(weights(module), {name: states[-1][name] for name in weights(module)})
    impatient = lt.LossSpikeGuard(window=3, patience=3)
    with pytest.raises(errors.TrickError, match="3 steps in a row"):
        make_trainer([impatient], max_epochs=1).fit(
            Regression(), torch.utils.data.DataLoader(batches[7:] * 3, batch_size=None), ckpt_path=tmp_path / "step=7.ckpt"
        )


# The step itself, without a Trainer


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.filterwarnings("error")
def test_a_guarded_step_agrees_with_schedulers_and_hooks(early):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = StepLR(optimizer, 1, 0.5) if early else None
    before, verdicts, events = optimizer.step, [False, True, True, False], []
    guard = GuardedStep(optimizer, lambda: verdicts.pop(0), lambda: events.append("taken"), lambda: events.append("left out"))
    scheduler = scheduler or StepLR(optimizer, 1, 0.5)
    after_each_step(optimizer, lambda: events.append("counted"), before=lambda: events.append("begun"))
    optimizer.register_step_post_hook(lambda *_: events.append("ended"))

    def closure():
        weight.grad = torch.ones(2)
        return 3.0

    assert [optimizer.step(closure), optimizer.step(closure)] == [3.0, 3.0]
    optimizer.step()
    optimizer.step()
    scheduler.step()
    begun = ["begun", "counted", "ended", "taken"]
    assert events == [*begun, "begun", "ended", "left out", "left out", *begun]
    assert weight.tolist() == [-1.0, -1.0]
    assert not hasattr(optimizer, "found_inf")
    guard.remove()
    optimizer.step(closure)
    assert events[-3:] == ["begun", "counted", "ended"]
    assert not early or optimizer.step is before
