"""Whose statistics `BatchNormRefresh` measures, and where they are found."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors
from reference.batch_norm import population

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Sees(Net):
    """Notes what validation evaluates."""

    def __init__(self):
        super().__init__()
        self.validated = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            self.validated.append(weights(self))


def statistics(state):
    return {name: value for name, value in state.items() if "running" in name}


def expected(state, loader=None):
    """The statistics of Net's only BatchNorm for these weights, over the training set."""
    model = Net()
    model.load_state_dict(state)
    with torch.no_grad():
        inputs = [model.body[0](x) for x, _ in loader or Loader()]
    mean, variance = population(inputs)
    return {"body.1.running_mean": mean.float(), "body.1.running_var": variance.float()}


def assert_measured(state, loader=None):
    for name, value in expected(state, loader).items():
        torch.testing.assert_close(state[name], value, msg=name)


class TrainedStatistics(Callback):
    """Notes the statistics at the end and at the start of each training batch."""

    def __init__(self):
        self.ends, self.starts = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.starts.append(statistics(weights(pl_module)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ends.append(statistics(weights(pl_module)))


@pytest.mark.parametrize("on", ["end", "validation"])
@pytest.mark.parametrize("order", [1, -1])
def test_statistics_are_those_of_the_average_in_any_order(on, order):
    ema = lt.EMA(0.9)
    run = fit([ema, lt.BatchNormRefresh(on=on)][::order])
    assert_measured(weights(run.module))
    assert torch.equal(run.module.head.weight, ema.averaged_state_dict()["head.weight"])


@pytest.mark.parametrize("order", [1, -1])
def test_every_validation_finds_the_statistics_of_what_it_evaluates_and_training_those_it_had(order):
    trained = TrainedStatistics()
    run = fit([*[lt.EMA(0.9), lt.BatchNormRefresh(on="validation")][::order], trained], Sees, val_check_interval=5)
    plain = fit([lt.EMA(0.9)])
    assert run.losses == plain.losses
    assert_equal(run.trained, plain.trained)
    assert torch.equal(run.random_state, plain.random_state)
    assert len(run.module.validated) == 6
    for state in run.module.validated:
        assert_measured(state)
    for end, start in zip(trained.ends, trained.starts[1:], strict=False):
        assert_equal(end, start)


def test_validation_in_the_middle_of_an_epoch_measures_a_whole_one():
    data = TensorDataset(torch.randn(22, 1, 8, 8), torch.randint(0, 3, (22,)))
    loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module, losses = Net(), []
    for callbacks in ([], [lt.BatchNormRefresh(on="validation")]):
        loader.generator.manual_seed(0)
        torch.manual_seed(0)
        module = Net()
        make_trainer(callbacks, val_check_interval=2).fit(module, loader, Loader(2))
        losses.append(module.losses)
    assert losses[0] == losses[1]
    state = weights(module)
    assert_measured(state, DataLoader(data, 22))


def test_without_validation_or_with_nothing_left_to_train_the_end_measures_too(tmp_path):
    for callbacks in ([lt.BatchNormRefresh(), lt.EMA(0.9)], [lt.EMA(0.9), lt.BatchNormRefresh()]):
        keep = ModelCheckpoint(tmp_path / type(callbacks[0]).__name__, every_n_train_steps=15, filename="{step}")
        whole = fit([*callbacks, keep], validate=False)
        path = keep.best_model_path
        again = fit([type(callback)(**callback.arguments) for callback in callbacks], ckpt_path=path, validate=False)
        assert_measured(weights(whole.module))
        assert_equal(weights(whole.module), weights(again.module))


def test_a_checkpoint_of_the_end_holds_the_measured_statistics_and_resumes_with_those_of_training(tmp_path):
    trained = TrainedStatistics()
    run = fit([lt.BatchNormRefresh(), trained], max_epochs=2)
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert_measured(checkpoint["state_dict"])
    assert_equal(checkpoint["lightning_tricks"]["BatchNormRefresh"]["raw"], trained.ends[-1])
    fit([Callback()], max_epochs=2).trainer.save_checkpoint(tmp_path / "plain.ckpt")
    resumed, plain = fit([lt.BatchNormRefresh()], ckpt_path=tmp_path / "end.ckpt"), fit([Callback()], ckpt_path=tmp_path / "plain.ckpt")
    assert resumed.losses == plain.losses
    assert_equal(resumed.trained, plain.trained)


@pytest.mark.parametrize("order", [1, -1])
def test_the_checkpoint_of_a_validation_holds_what_was_validated(order, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    callbacks = [lt.EMA(0.9), lt.BatchNormRefresh(on="validation")][::order]
    run = fit([*callbacks, keep], Sees)
    assert len(run.module.validated) == 6
    for epoch, seen in enumerate(run.module.validated[::2]):
        assert_equal(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"], seen)
    score = run.trainer.test(run.module, Loader(2, seed=1), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)[0]["test_loss"]
    torch.testing.assert_close(torch.tensor(score), keep.best_k_models[str(tmp_path / "epoch=1.ckpt")].cpu())
    resumed = fit([type(each)(**each.arguments) for each in callbacks], ckpt_path=tmp_path / "epoch=1.ckpt", seed=5)
    assert_equal(resumed.trained, run.trained)
    assert_equal(weights(resumed.module), weights(fit([type(each)(**each.arguments) for each in callbacks]).module))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_end", "on_train_batch_end", "on_train_end"])
def test_an_exception_leaves_the_weights_and_statistics_of_training(hook, order):
    class Fails(TrainedStatistics):
        def fail(self, trainer, pl_module, *_):
            if hook == "on_train_batch_end":
                TrainedStatistics.on_train_batch_end(self, trainer, pl_module, *_)
            if trainer.global_step >= 8 and not trainer.sanity_checking:
                raise RuntimeError

    fails, module = Fails(), Net()
    setattr(fails, hook, fails.fail)
    with pytest.raises(RuntimeError):
        make_trainer([lt.EMA(0.9), lt.BatchNormRefresh(on="validation"), fails][::order]).fit(module, Loader(), Loader(2))
    assert_equal(statistics(weights(module)), fails.ends[-1])
    assert len({part.training for part in module.modules()}) == 1
    assert module.body[1].track_running_stats


@pytest.mark.parametrize("on", ["end", "validation"])
def test_a_second_fit_goes_on_with_the_statistics_of_training_unless_others_were_loaded(on):
    refresh, trained = lt.BatchNormRefresh(on=on), TrainedStatistics()
    module = Net()
    make_trainer([refresh, trained], max_epochs=1).fit(module, Loader())
    measured = statistics(weights(module))
    again = TrainedStatistics()
    make_trainer([refresh, again], max_epochs=1).fit(module, Loader())
    assert_equal(again.starts[0], trained.ends[-1])
    assert any(not torch.equal(measured[name], trained.ends[-1][name]) for name in measured)
    loaded = Net().state_dict()
    module.load_state_dict(loaded)
    third = TrainedStatistics()
    make_trainer([refresh, third], max_epochs=1).fit(module, Loader())
    assert_equal(third.starts[0], statistics(loaded))


def test_layers_frozen_during_training_are_left_alone():
    class Frozen(Net):
        def on_train_epoch_start(self):
            self.body[1].eval()
            self.more.train()

        def __init__(self):
            super().__init__()
            self.more = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.more(super().forward(x))

    run = fit([lt.BatchNormRefresh(on="validation")], Frozen)
    assert_equal(
        {k: v for k, v in weights(run.module).items() if k.startswith("body.1.running")},
        {k: v for k, v in run.trained.items() if k.startswith("body.1.running")},
    )
    assert not torch.equal(run.module.more.running_mean, run.trained["more.running_mean"])


def test_batches_of_any_structure_through_the_modules_own_hooks():
    class Odd(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.norm, self.head, self.stages = nn.BatchNorm1d(2), nn.Linear(2, 1), set()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.stages.add(self.trainer.state.stage.value)
            return {"x": batch["x"] * 2}

        def training_step(self, batch, batch_idx):
            return self.head(self.norm(batch["x"])).square().mean()

        def predict_step(self, batch, batch_idx):
            return self.head(self.norm(batch["x"]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, module = torch.randn(10, 2), Odd()
    make_trainer([lt.BatchNormRefresh()], max_epochs=1).fit(module, DataLoader([{"x": row} for row in x], 5))
    mean, variance = population([x * 2])
    torch.testing.assert_close(module.norm.running_mean, mean.float())
    torch.testing.assert_close(module.norm.running_var, variance.float())
    assert module.stages == {"train"}


def test_what_else_replaces_statistics_is_refused():
    refresh = lt.BatchNormRefresh()
    for other, words in ((lt.EMA(buffers="average"), "pass `buffers='copy'`"), (StochasticWeightAveraging(0.1), "Keep one")):
        for callbacks in ([refresh, other], [other, refresh]):
            with pytest.raises(errors.TrickConflictError, match=words):
                make_trainer(callbacks).fit(Net(), Loader())
    fit([lt.EMA(buffers="average", evaluate=False), refresh], max_epochs=1)


def test_raw_metrics_are_those_of_training_weights_and_statistics():
    run = fit([lt.EMA(0.9, evaluate="both"), lt.BatchNormRefresh(on="validation")])
    plain = fit([lt.EMA(0.9, evaluate="both")])
    assert run.trainer.logged_metrics["raw/val_loss"] == plain.trainer.logged_metrics["raw/val_loss"]
    assert run.trainer.logged_metrics["val_loss"] != plain.trainer.logged_metrics["val_loss"]
    assert run.losses == plain.losses
