"""When EMA updates, and to what."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, fit, make_trainer, weights
from lightning_tricks import errors
from reference.ema import ema

NAMES = ["neck.weight", "head.bias", "body.0.weight"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"decay": 0.9}, {"beta": 0.9}),
        ({"decay": 0.0}, {"beta": 0.0}),
        ({"decay": 1.0}, {"beta": 1.0}),
        ({"half_life": 4}, {"beta": 0.5**0.25}),
        ({"half_life": "1 epoch"}, {"beta": 0.5**0.2}),
        ({"half_life": "20%"}, {"beta": 0.5 ** (1 / 3)}),
        ({"decay": 0.9, "start": 4}, {"beta": 0.9, "start": 4}),
        ({"decay": 0.9, "start": "2 epochs"}, {"beta": 0.9, "start": 10}),
        ({"decay": 0.9, "start": "40%"}, {"beta": 0.9, "start": 6}),
        ({"decay": 0.9, "every": 4}, {"beta": 0.9, "every": 4}),
        ({"decay": 0.9, "every": 4, "start": 3}, {"beta": 0.9, "every": 4, "start": 3}),
        ({"decay": 0.9, "every": "1 epoch"}, {"beta": 0.9, "every": 5}),
        ({"decay": 0.9, "every": "2 epochs", "start": "1 epoch"}, {"beta": 0.9, "every": 10, "start": 5}),
        ({"decay": 0.9, "every": "20%"}, {"beta": 0.9, "every": 3}),
        ({"decay": 0.99, "warmup": 8}, {"beta": 0.99, "warmup": 8}),
        ({"decay": 0.99, "warmup": 12, "every": 5, "start": 2}, {"beta": 0.99, "warmup": 12, "every": 5, "start": 2}),
        ({"decay": 0.5, "warmup": "100%"}, {"beta": 0.5, "warmup": 15}),
    ],
    ids=str,
)
def test_the_average_is_that_of_the_formula(arguments, expected):
    recorder = Recorder()
    run = fit([lt.EMA(**arguments), recorder])
    beta = expected.pop("beta")
    averaged, raw = run.trick.averaged_state_dict(), run.trick.raw_state_dict()
    for name in NAMES:
        history = [state[name] for state in recorder.history]
        torch.testing.assert_close(averaged[name], ema(history, beta, **expected).float())
        assert torch.equal(raw[name], history[-1])
        assert torch.equal(run.module.state_dict()[name], averaged[name])


def test_accumulated_gradients_and_the_shorter_last_step_of_an_epoch():
    recorder = Recorder()
    run = fit([lt.EMA(0.9), recorder], accumulate_grad_batches=2)
    history = [recorder.history[0][NAMES[0]]]
    for state in recorder.history[1:]:
        if not torch.equal(state[NAMES[0]], history[-1]):
            history.append(state[NAMES[0]])
    assert len(history) == 1 + 3 * 3
    torch.testing.assert_close(run.trick.averaged_state_dict()[NAMES[0]], ema(history, 0.9).float())


class Adversaries(pl.LightningModule):
    """Two optimizers, one of which steps twice in each batch, the other in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.often, self.seldom, self.shared = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.stepped: dict[str, list[torch.Tensor]] = {"often": [], "seldom": [], "shared": []}

    def on_train_start(self):
        for name, states in self.stepped.items():
            states.append(getattr(self, name).weight.detach().clone())

    def training_step(self, batch, batch_idx):
        often, seldom = self.optimizers()
        for optimizer, names in ((often, ("often", "shared")), (often, ("often", "shared")), (seldom, ("seldom", "shared"))):
            if optimizer is seldom and batch_idx % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward((self.seldom(self.shared(self.often(batch[0]))) ** 2).mean())
            optimizer.step()
            for name in names:
                self.stepped[name].append(getattr(self, name).weight.detach().clone())

    def configure_optimizers(self):
        return [
            torch.optim.SGD([*self.often.parameters(), *self.shared.parameters()], lr=0.1),
            torch.optim.SGD([*self.seldom.parameters(), *self.shared.parameters()], lr=0.1),
        ]


@pytest.mark.parametrize("arguments", [{}, {"every": 2}, {"start": 3}, {"every": 3, "start": 1}], ids=str)
def test_with_several_optimizers_each_parameter_follows_its_own(arguments):
    """Including an even `every`, at which a count over all optimizers would never come to rest on the same one."""
    torch.manual_seed(0)
    module, trick = Adversaries(), lt.EMA(0.8, **arguments)
    make_trainer([trick], max_epochs=2).fit(module, DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4))
    assert {name: len(states) for name, states in module.stepped.items()} == {"often": 21, "seldom": 7, "shared": 27}
    for name, states in module.stepped.items():
        expected = ema(states, 0.8, **arguments).float()
        torch.testing.assert_close(trick.averaged_state_dict()[f"{name}.weight"], expected, msg=name)


def test_percentages_of_a_fit_with_several_optimizers():
    module, trick = Adversaries(), lt.EMA(0.8, start="50%")
    make_trainer([trick], max_epochs=2).fit(module, DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4))
    begun = {track.optimizers: track.begun for track in trick._averages.tracks}
    assert begun == {(0,): 5, (1,): 5, (0, 1): 5}


def test_steps_that_the_gradient_scaler_skips_are_no_steps():
    recorder, trick = Recorder(), lt.EMA(0.9)

    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 else loss

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    run = fit([trick, recorder], Overflows, plugins=[plugin])
    assert run.trainer.global_step == 15
    assert [track.steps for track in trick._averages.tracks] == [12]
    history = [state["head.bias"] for i, state in enumerate(recorder.history) if i == 0 or (i - 1) % 5 != 2]
    torch.testing.assert_close(trick.averaged_state_dict()["head.bias"], ema(history, 0.9).float())


def test_lbfgs_steps_once_however_often_it_evaluates():
    class WithLBFGS(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    recorder, trick = Recorder(), lt.EMA(0.9)
    fit([trick, recorder], WithLBFGS, max_epochs=1)
    assert [track.steps for track in trick._averages.tracks] == [5]
    torch.testing.assert_close(trick.averaged_state_dict()["head.bias"], ema([s["head.bias"] for s in recorder.history], 0.9).float())


class Endless(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(7):
            yield torch.randn(1, 8, 8, generator=generator), torch.randint(0, 3, (), generator=generator)


def test_epochs_of_unknown_length():
    recorder, trick = Recorder(), lt.EMA(0.9, every="1 epoch", start="1 epoch")
    module = Net()
    make_trainer([trick, recorder]).fit(module, DataLoader(Endless(), batch_size=2))
    steps = len(recorder.history) // 3
    assert steps == 4
    history = [state["head.bias"] for state in recorder.history]
    torch.testing.assert_close(trick.averaged_state_dict()["head.bias"], ema(history, 0.9, start=4, every=4).float())


@pytest.mark.parametrize("arguments", [{"start": "80%"}, {"half_life": "2 epochs"}, {"warmup": "10%"}, {"every": "5%"}], ids=str)
def test_lengths_that_cannot_be_known_are_refused_before_training(arguments):
    class Unbounded(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(1, 8, 8), torch.tensor(0)

    module = Net()
    with pytest.raises(errors.TrickError, match=r"has no known length.*`max_steps`"):
        make_trainer([lt.EMA(**arguments)], max_epochs=-1).fit(module, DataLoader(Unbounded(), batch_size=2))
    assert module.losses == []


def test_a_limit_on_steps_in_the_middle_of_an_epoch_keeps_the_average():
    recorder = Recorder()
    run = fit([lt.EMA(0.9, every="1 epoch"), recorder], max_steps=8, max_epochs=-1)
    history = [state["head.bias"] for state in recorder.history]
    expected = 0.9**5 * history[0].double() + (1 - 0.9**5) * history[5].double()
    expected = 0.9**3 * expected + (1 - 0.9**3) * history[8].double()
    torch.testing.assert_close(run.trick.averaged_state_dict()["head.bias"], expected.float())


def test_early_stopping_keeps_the_average():
    recorder = Recorder()
    run = fit([lt.EMA(0.9), recorder, EarlyStopping("val_loss", patience=1, min_delta=100.0)], max_epochs=10)
    assert run.trainer.current_epoch < 5
    history = [state["head.bias"] for state in recorder.history]
    torch.testing.assert_close(run.module.head.bias.detach(), ema(history, 0.9).float())


def test_a_module_without_optimizers_is_refused():
    class Untrained(Net):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="configure_optimizers"),
        pytest.raises(errors.TrickError, match="no optimizer of Untrained has any parameter that it selects"),
    ):
        make_trainer([lt.EMA()]).fit(Untrained(), Loader())


class Thaw(Callback):
    """Thaws a frozen layer when the second epoch begins, as finetuning callbacks do."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.frozen.requires_grad_(requires_grad=True)
            trainer.optimizers[0].add_param_group({"params": list(pl_module.frozen.parameters())})


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_thawed_later_joins_when_it_is_first_trained(order):
    recorder, trick = Recorder(), lt.EMA(0.9)

    class NoSchedule(Net):
        def configure_optimizers(self):
            return super().configure_optimizers()["optimizer"]

    fit([*[trick, Thaw()][::order], recorder], NoSchedule)
    history = [state["frozen.weight"] for state in recorder.history]
    assert torch.equal(history[0], history[5])
    assert not torch.equal(history[5], history[6])
    torch.testing.assert_close(trick.averaged_state_dict()["frozen.weight"], ema(history, 0.9, start=5).float())
    torch.testing.assert_close(trick.averaged_state_dict()["head.bias"], ema([s["head.bias"] for s in recorder.history], 0.9).float())


def test_frozen_weights_are_shared_and_nothing_but_trained_weights_is_copied():
    trick = lt.EMA(0.9)
    run = fit([trick])
    stored = sum(average.numel() for track in trick._averages.tracks for average in track.averages.values())
    assert stored == sum(p.numel() for p in run.module.parameters() if p.requires_grad)
    assert "frozen.weight" not in trick._averages.averaged()


@pytest.mark.parametrize("build", ["lazy", "setup", "configure_model"])
def test_layers_built_late(build):
    class Late(pl.LightningModule):
        def __init__(self):
            super().__init__()
            if build == "lazy":
                self.net = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3))

        def make(self):
            if build != "lazy" and not hasattr(self, "net"):
                self.net = nn.Sequential(nn.Linear(64, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

        def setup(self, stage):
            if build == "setup":
                self.make()

        def configure_model(self):
            if build == "configure_model":
                self.make()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class AfterSteps(Callback):
        def __init__(self):
            self.history = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if not self.history:
                self.history.append(pl_module.net[0].weight.detach().clone())

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.history.append(pl_module.net[0].weight.detach().clone())

    torch.manual_seed(0)
    seen, trick = AfterSteps(), lt.EMA(0.9, buffers="average")
    make_trainer([trick, seen]).fit(Late(), Loader())
    torch.testing.assert_close(trick.averaged_state_dict()["net.0.weight"], ema(seen.history, 0.9).float())


def test_where_and_exclude_leave_the_rest_raw():
    recorder, trick = Recorder(), lt.EMA(0.5, where=["body", "head"], exclude="*.bias")
    run = fit([trick, recorder])
    assert sorted(trick._averages.averaged()) == ["body.0.weight", "body.1.weight", "head.weight"]
    final = weights(run.module)
    assert torch.equal(final["head.bias"], recorder.history[-1]["head.bias"])
    assert not torch.equal(final["head.weight"], recorder.history[-1]["head.weight"])


def test_an_update_is_one_kernel_call_and_allocates_nothing():
    from torch.utils._python_dispatch import TorchDispatchMode

    run = fit([lt.EMA(0.9, evaluate=False)], max_epochs=1)
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Calls():
        run.trick._averages.tracks[0].update(0.1)
    assert calls == ["aten._foreach_lerp_.Scalar"]


def test_logs_decay_and_updates():
    class Keep(pl.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append(dict(metrics))

    logger = Keep()
    fit([lt.EMA(0.999, warmup=100, name="slow")], logger=logger, log_every_n_steps=1)
    rows = [row for row in logger.rows if "ema_slow/decay" in row]
    assert [round(row["ema_slow/decay"], 4) for row in rows[:3]] == [0.1, 0.1818, 0.25]
    assert [row["ema_slow/updates"] for row in rows] == list(range(1, 16))
