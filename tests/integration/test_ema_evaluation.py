"""Which weights evaluation sees, and which the model holds afterwards."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors
from reference.ema import ema


def parameters(state):
    return {name: value for name, value in state.items() if "running" not in name and "num_batches" not in name}


def test_every_validation_of_a_fit_sees_the_average_and_returns_the_training_weights():
    """Also in the module's own epoch-end hooks, which Lightning calls after those of callbacks."""

    class Watches(Net):
        def on_validation_epoch_end(self):
            self.evaluated.append(weights(self))

    recorder = Recorder()
    run = fit([lt.EMA(0.9), recorder], Watches, num_sanity_val_steps=0)
    history = [state["head.weight"] for state in recorder.history]
    assert len(run.module.evaluated) == 6
    for epoch in range(3):
        expected = ema(history[: 5 * (epoch + 1) + 1], 0.9).float()
        for seen in run.module.evaluated[2 * epoch : 2 * epoch + 2]:
            torch.testing.assert_close(seen["head.weight"], expected)


def test_training_is_the_same_with_and_without():
    plain, with_average = fit([Recorder()]), fit([lt.EMA(0.9)])
    assert plain.losses == with_average.losses
    assert_equal(plain.trained, with_average.trained)


@pytest.mark.parametrize("evaluate", ["validate", "test", "predict"])
def test_after_the_fit_everything_sees_the_average(evaluate):
    run = fit([lt.EMA(0.9)])
    expected = run.trick.averaged_state_dict()
    run.module.evaluated.clear()
    getattr(run.trainer, evaluate)(run.module, Loader(2))
    assert_equal(run.module.evaluated[0], expected)
    assert_equal(weights(run.module), expected)
    assert_equal(parameters(run.trick.raw_state_dict()), parameters(run.trained))


@pytest.mark.parametrize("evaluate", ["validate", "test", "predict"])
def test_after_an_interrupted_fit_evaluation_sees_the_average_and_the_model_keeps_the_raw_weights(evaluate):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                raise RuntimeError

    trick, recorder, module = lt.EMA(0.9), Recorder(), Net()
    trainer = make_trainer([trick, recorder, Stop()])
    with pytest.raises(RuntimeError):
        trainer.fit(module, Loader())
    assert_equal(weights(module), recorder.history[-1])
    expected = trick.averaged_state_dict()
    getattr(trainer, evaluate)(module, Loader(2))
    assert_equal(module.evaluated[-1], expected)
    assert_equal(weights(module), recorder.history[-1])


def test_evaluation_on_its_own_that_fails_returns_the_raw_weights():
    class Fails(Net):
        def test_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                raise RuntimeError

    module = Fails()
    trainer = make_trainer([lt.EMA(0.9), Stop()])
    with pytest.raises(RuntimeError):
        trainer.fit(module, Loader())
    before = weights(module)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.test(module, Loader(2), verbose=False)
    assert_equal(weights(module), before)


@pytest.mark.parametrize("arguments", [{"start": 100}, {"start": "9 epochs"}], ids=str)
def test_a_start_never_reached_means_raw_weights_everywhere(arguments, tmp_path):
    recorder = Recorder()
    run = fit([lt.EMA(0.9, **arguments), recorder, ModelCheckpoint(tmp_path, filename="last")])
    assert_equal(weights(run.module), run.trained)
    assert_equal(run.module.evaluated[-1], run.trained)
    assert_equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], run.trained)
    assert_equal(run.trick.raw_state_dict(), run.trained)
    assert_equal(run.trick.averaged_state_dict(), run.trained)


def test_before_its_start_the_average_is_nowhere():
    run = fit([lt.EMA(0.9, start=8), Recorder()])
    history = run.trainer.callbacks[-1].history
    assert_equal(parameters(run.module.evaluated[0]), parameters(history[5]))
    assert not torch.equal(run.module.evaluated[1]["head.weight"], history[10]["head.weight"])


def test_evaluate_false_leaves_the_model_to_itself():
    run = fit([lt.EMA(0.9, evaluate=False)])
    assert_equal(weights(run.module), run.trained)
    averaged = run.trick.averaged_state_dict()
    assert not torch.equal(averaged["head.weight"], run.trained["head.weight"])
    with lt.functional.using_weights(run.module, averaged):
        assert_equal(weights(run.module), averaged)


def test_a_second_fit_goes_on_where_the_first_ended():
    whole = fit([lt.EMA(0.9)], max_epochs=3)

    class NoSchedule(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    torch.manual_seed(0)
    module, trick, recorder, loader = NoSchedule(), lt.EMA(0.9), Recorder(), Loader()
    trainer = make_trainer([trick, recorder], max_epochs=1)
    trainer.fit(module, loader, Loader(2))
    trainer.test(module, Loader(2), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader, Loader(2))
    history = [state["head.weight"] for i, state in enumerate(recorder.history) if i != 6]
    assert torch.equal(recorder.history[5]["head.weight"], recorder.history[6]["head.weight"])
    assert len(history) == 16
    torch.testing.assert_close(module.head.weight.detach(), ema(history, 0.9).float())
    assert len(whole.losses) == 15


def test_weights_loaded_by_the_user_between_two_uses_are_left_alone(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_tricks.averaging._average.rank_zero_info", said.append)
    run = fit([lt.EMA(0.9)])
    other = {name: value + 1 for name, value in weights(run.module).items()}
    run.module.load_state_dict(other)
    run.module.evaluated.clear()
    run.trainer.test(run.module, Loader(2), verbose=False)
    assert "have been changed since the Trainer returned the model: it is evaluated as it is" in said[0]
    assert_equal(run.module.evaluated[0], other)
    assert_equal(weights(run.module), other)
    run.module.load_state_dict(other)
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(run.module, Loader())
    assert run.trick._averages.tracks[0].updates == 5


def test_another_model_starts_a_new_average():
    trick = lt.EMA(0.9)
    fit([trick])
    first = trick._averages.module
    second = fit([trick])
    assert trick._averages.module is second.module
    assert first is not second.module
    assert trick._averages.tracks[0].updates == 15


def test_asking_before_there_is_a_model():
    with pytest.raises(errors.TrickError, match="has seen no model yet"):
        lt.EMA().raw_state_dict()


def test_evaluation_alone_needs_no_fit():
    module = Net()
    before = weights(module)
    make_trainer([lt.EMA()]).test(module, Loader(2), verbose=False)
    assert_equal(module.evaluated[0], before)


# Buffers


class Buffers(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def training_step(self, batch, batch_idx):
        self.scale = self.scale + 1  # a new tensor each time
        self.seen += 1
        self.flag[0] = True
        self.cache = torch.zeros(int(self.seen))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("policy", ["copy", "average", "keep"])
def test_buffers(policy):
    recorder = Recorder()
    run = fit([lt.EMA(0.9, buffers=policy), recorder], Buffers)
    final = weights(run.module)
    for name in ("scale", "body.1.running_mean", "body.1.running_var"):
        history = [state[name] for state in recorder.history]
        expected = {"copy": history[-1], "average": ema(history, 0.9).float(), "keep": history[0]}[policy]
        torch.testing.assert_close(final[name], expected)
    assert final["seen"] == 15
    assert final["body.1.num_batches_tracked"] == 15
    assert final["flag"].tolist() == [True, False]
    assert torch.equal(final["mask"], Buffers().mask)
    assert len(run.module.cache) == 15
    assert_equal(parameters(run.trick.raw_state_dict()), parameters(run.trained))


def test_a_buffer_that_grows_is_averaged_from_then_on():
    class Grows(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(1))

        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                self.table = torch.full((3,), 2.0)
            return super().training_step(batch, batch_idx)

    run = fit([lt.EMA(0.9, buffers="average")], Grows)
    torch.testing.assert_close(run.module.table, torch.full((3,), 2.0))


# Precision


def test_low_precision_weights_have_a_float32_average_that_evaluation_does_not_round():
    validated, unvalidated = fit([lt.EMA(0.999)], precision="bf16-true"), fit([lt.EMA(0.999)], precision="bf16-true", validate=False)
    one, other = (run.trick._averages.averaged() for run in (validated, unvalidated))
    assert {average.dtype for average in one.values()} == {torch.float32}
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert validated.module.head.weight.dtype == torch.bfloat16
    assert torch.equal(validated.module.head.weight, one["head.weight"].bfloat16())
    assert_equal(parameters(validated.trick.raw_state_dict()), parameters(validated.trained))


def test_dtype_and_device_are_settable():
    run = fit([lt.EMA(0.9, dtype="float64", device="cpu")])
    assert {average.dtype for average in run.trick._averages.averaged().values()} == {torch.float64}
    assert run.module.head.weight.dtype == torch.float32
    assert lt.EMA(dtype=torch.float64, device=torch.device("cpu")).arguments == lt.EMA(dtype="float64", device="cpu").arguments


# Both


class Measures(pl.LightningModule):
    """Has metrics of every kind: functional, logged objects, collections, and one that accumulates over training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.by_hand = MeanMetric()
        self.training_loss = MeanMetric()
        self.collection = MetricCollection({"f1": MulticlassF1Score(3), "acc": MulticlassAccuracy(3, average="micro")})
        self.passes = 0

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.training_loss.update(loss)
        self.log("train_loss", self.training_loss, on_epoch=True, on_step=False)
        self.log("random", torch.rand(()))
        return loss

    def validation_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.accuracy(out, batch[1])
        self.collection.update(out, batch[1])
        self.by_hand.update(out.mean())
        self.log("val_loss", nn.functional.cross_entropy(out, batch[1]), prog_bar=True, on_step=True, on_epoch=True)
        self.log("val_accuracy", self.accuracy)
        torch.rand(3)

    def on_validation_epoch_end(self):
        self.passes += 1
        self.log("by_hand", self.by_hand.compute())
        self.log_dict(self.collection.compute())
        self.by_hand.reset()
        self.collection.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Rows(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "at": step})


def measure(trick, **options):
    logger = Rows()
    torch.manual_seed(0)
    module = Measures()
    trainer = make_trainer([trick], logger=logger, val_check_interval=2, **options)
    loader = Loader(2, seed=1)
    trainer.fit(module, Loader(6), DataLoader(TensorDataset(loader.x, loader.y), batch_size=4))
    rows = {}
    for row in logger.rows:
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
    return rows, trainer, module


def test_both_logs_the_metrics_of_both_and_disturbs_nothing():
    both, trainer, module = measure(lt.EMA(0.9, evaluate="both"))
    average, _, _ = measure(lt.EMA(0.9))
    raw, _, _ = measure(lt.EMA(0.9, evaluate=False))
    names = ["val_loss_epoch", "val_accuracy", "by_hand", "f1", "acc"]
    assert len(both["val_accuracy"]) == 9
    for name in names:
        assert both[name] == average[name], name
        assert both[f"raw/{name}"] == raw[name], name
        assert f"raw/{name}" not in trainer.callback_metrics
        assert name in trainer.callback_metrics
    assert both["val_loss_epoch"] != both["raw/val_loss_epoch"]
    assert both["train_loss"] == average["train_loss"]
    assert module.passes == 18
    assert trainer.logged_metrics["raw/val_accuracy"] == both["raw/val_accuracy"][-1]


def test_both_is_out_of_sight_of_checkpointing_and_early_stopping(tmp_path):
    seen = []

    class Watches(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["val_loss"].item())

    keep, stop = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1), EarlyStopping("val_loss", patience=100)
    run = fit([lt.EMA(0.9, evaluate="both"), Watches(), keep, stop], num_sanity_val_steps=0)
    reference = fit([lt.EMA(0.9)])
    assert len(seen) == 3
    assert len(keep.best_k_models) == 3
    assert keep.best_model_score == min(torch.tensor(seen))
    assert len(run.module.evaluated) == 6
    assert_equal(run.module.evaluated[-1], reference.module.evaluated[-1])
    assert_equal(parameters(run.module.evaluated[-2]), parameters(run.trained))
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="raw/val_loss"):
        fit([lt.EMA(0.9, evaluate="both"), ModelCheckpoint(tmp_path / "x", monitor="raw/val_loss")])


def test_both_trains_the_same():
    one, both = fit([lt.EMA(0.9)]), fit([lt.EMA(0.9, evaluate="both")])
    assert one.losses == both.losses
    assert torch.equal(one.random_state, both.random_state)
    assert_equal(weights(one.module), weights(both.module))


def test_both_in_a_validation_after_the_fit():
    logger = Rows()
    run = fit([lt.EMA(0.9, evaluate="both")], logger=logger)
    run.module.evaluated.clear()
    before = weights(run.module)
    metrics = run.trainer.validate(run.module, Loader(2, seed=1), verbose=False)
    assert list(metrics[0]) == ["val_loss"]
    assert len(run.module.evaluated) == 2
    assert_equal(parameters(run.module.evaluated[0]), parameters(run.trained))
    assert_equal(run.module.evaluated[1], before)
    assert_equal(weights(run.module), before)
    assert any("raw/val_loss" in row for row in logger.rows)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_both_survives_an_exception_in_either_pass(error, failing_pass):
    class Fails(Net):
        passes = 0

        def on_validation_epoch_end(self):
            self.passes += 1
            if self.passes == failing_pass:
                raise error

    recorder, module = Recorder(), Fails()
    trainer = make_trainer([lt.EMA(0.9, evaluate="both"), recorder])
    callbacks = list(trainer.callbacks)
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, Loader(), Loader(2))
    assert_equal(weights(module), recorder.history[-1])
    assert trainer.callbacks == callbacks
    assert "log_metrics" not in vars(trainer._logger_connector)


def test_both_with_several_loaders_and_a_progress_bar(capsys):
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", self.loss(batch))

    logger, module = Rows(), Two()
    trainer = make_trainer([lt.EMA(0.9, evaluate="both")], logger=logger, enable_progress_bar=True)
    trainer.fit(module, Loader(), [Loader(2), Loader(3)])
    last = next(row for row in reversed(logger.rows) if "val_loss/dataloader_idx_0" in row)
    raw = next(row for row in reversed(logger.rows) if "raw/val_loss/dataloader_idx_0" in row)
    assert {"raw/val_loss/dataloader_idx_0", "raw/val_loss/dataloader_idx_1"} <= raw.keys()
    assert last["val_loss/dataloader_idx_1"] != raw["raw/val_loss/dataloader_idx_1"]
    capsys.readouterr()


# Conflicts


def test_two_averages_at_once():
    recorder = Recorder()
    fast, slow = lt.EMA(0.5, name="fast"), lt.EMA(0.9, name="slow", evaluate=False)
    run = fit([fast, slow, recorder])
    history = [state["head.weight"] for state in recorder.history]
    torch.testing.assert_close(fast.averaged_state_dict()["head.weight"], ema(history, 0.5).float())
    torch.testing.assert_close(slow.averaged_state_dict()["head.weight"], ema(history, 0.9).float())
    assert_equal(weights(run.module), fast.averaged_state_dict())


@pytest.mark.parametrize("evaluate", [True, "both"])
def test_two_owners_of_evaluation_are_refused(evaluate):
    module = Net()
    with pytest.raises(errors.TrickConflictError) as raised:
        make_trainer([lt.EMA(0.5, name="fast"), lt.EMA(0.9, name="slow", evaluate=evaluate)]).fit(module, Loader())
    assert "EMA(decay=0.5, name='fast')" in str(raised.value)
    assert "pass `evaluate=False` to one" in str(raised.value)
    assert isinstance(raised.value, pl.utilities.exceptions.MisconfigurationException)
    assert module.losses == []


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
@pytest.mark.parametrize("order", [1, -1])
def test_lightnings_own_averaging_is_refused(name, order):
    kind = getattr(pl.callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")
    other = kind(swa_lrs=0.1) if name == "StochasticWeightAveraging" else kind()
    with pytest.raises(errors.TrickConflictError, match=rf"EMA\(decay=0.999\) and Lightning's {name} both replace the weights"):
        make_trainer([lt.EMA(), other][::order]).fit(Net(), Loader())


def test_lightnings_own_averaging_beside_one_that_does_not_evaluate():
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    recorder, trick = Recorder(), lt.EMA(0.9, evaluate=False)
    fit([trick, recorder, pl.callbacks.EMAWeightAveraging(decay=0.5)])
    history = [state["head.weight"] for state in recorder.history]
    torch.testing.assert_close(trick.averaged_state_dict()["head.weight"], ema(history, 0.9).float())
