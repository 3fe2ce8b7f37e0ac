"""Odd models, odd orders of events, and features of Lightning that get in the way of averages."""

from __future__ import annotations

from dataclasses import asdict

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricTracker, MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors
from reference.ema import ema

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory .* exists")


class Steady(Net):
    """Has no schedule, so that a second fit goes on like the first."""

    def configure_optimizers(self):
        return super().configure_optimizers()["optimizer"]


def updates(trick):
    return [track.updates for track in trick._averages.tracks]


# Several uses of one Trainer


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
def test_a_second_fit_continues_whatever_comes_first(sanity, buffers):
    trick, module = lt.EMA(0.9, buffers=buffers), Steady()
    trainer = make_trainer([trick], max_epochs=1, num_sanity_val_steps=sanity)
    trainer.fit(module, Loader(), Loader(2))
    module._apply(lambda tensor: tensor.clone())  # as moving to a device and back does
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Loader(), Loader(2))
    assert updates(trick) == [10]


@pytest.mark.parametrize("order", [1, -1])
def test_what_one_average_puts_into_the_model_is_no_change_to_another(order):
    own, slow, module, recorder = lt.EMA(0.9), lt.EMA(0.99, evaluate=False, name="slow"), Steady(), Recorder()
    trainer = make_trainer([*[own, slow][::order], recorder], max_epochs=1)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, Loader(), Loader(2))
        trainer.test(module, Loader(2), verbose=False)
        for trick in (own, slow):
            assert updates(trick) == [5 * epochs]
            assert torch.equal(trick.raw_state_dict()["head.weight"], recorder.history[-1]["head.weight"])
        assert torch.equal(module.head.weight, own.averaged_state_dict()["head.weight"])


def test_epochs_are_counted_anew_in_each_fit():
    trick = lt.EMA(0.5, every="1 epoch")
    for _ in range(3):
        fit([trick], max_epochs=1)
        assert updates(trick) == [1]
    module = Steady()
    for count in (1, 2, 3):
        make_trainer([trick], max_epochs=1).fit(module, Loader())
        assert updates(trick) == [count]


def test_resuming_a_run_that_had_finished_ends_with_the_average(tmp_path):
    run = fit([lt.EMA(0.9), ModelCheckpoint(tmp_path, filename="last")])
    again = fit([lt.EMA(0.9)], ckpt_path=tmp_path / "last.ckpt", seed=9)
    assert again.losses == []
    assert_equal(weights(again.module), weights(run.module))


def test_evaluating_another_model_in_between_leaves_the_average_alone():
    trick, module, other = lt.EMA(0.9, evaluate="both"), Steady(), Net()
    trainer = make_trainer([trick], max_epochs=1)
    trainer.fit(module, Loader(), Loader(2))
    raw, before = trick.raw_state_dict(), weights(other)
    trainer.test(other, Loader(2), verbose=False)
    trainer.validate(other, Loader(2), verbose=False)
    assert_equal(other.evaluated[0], before)
    assert len(other.evaluated) == 2
    assert_equal(trick.raw_state_dict(), raw)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Loader(), Loader(2))
    assert updates(trick) == [10]


def test_a_trainer_that_goes_on_without_the_callback_is_left_alone(tmp_path):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    trick = lt.EMA(0.9)
    trainer = make_trainer([trick, ModelCheckpoint(tmp_path, save_weights_only=True, filename="{step}")])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Fails(), Loader())
    trainer.callbacks.remove(trick)
    module = Net()
    trainer.fit(module, Loader())
    assert_equal(torch.load(tmp_path / "step=15.ckpt", weights_only=True)["state_dict"], weights(module))


def test_without_evaluation_the_raw_weights_of_a_checkpoint_are_evaluated(tmp_path):
    recorder = Recorder()
    fit([lt.EMA(0.9), recorder, ModelCheckpoint(tmp_path, filename="last")])
    module = Net()
    make_trainer([lt.EMA(0.9, evaluate=False)]).test(module, Loader(2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(module.evaluated[0]["head.weight"], recorder.history[-1]["head.weight"])


# Models


class Mirrored(Net):
    """A layer whose weight is the transpose of another's, in the same memory."""

    def __init__(self):
        super().__init__()
        self.there, self.back = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.back.weight.data = self.there.weight.data.t()

    def forward(self, x):
        return self.head(self.back(torch.tanh(self.there(torch.tanh(self.neck(self.body(x)))))))


def test_parameters_that_share_memory_are_averaged_once(tmp_path):
    plain, recorder = fit([Recorder()], Mirrored), Recorder()
    run = fit([lt.EMA(0.9), recorder, ModelCheckpoint(tmp_path, filename="last")], Mirrored)
    assert run.losses == plain.losses
    expected = ema([state["there.weight"] for state in recorder.history], 0.9).float()
    for state in (weights(run.module), torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]):
        torch.testing.assert_close(state["there.weight"], expected)
        torch.testing.assert_close(state["back.weight"], expected.t())
    assert torch.equal(run.trick.raw_state_dict()["back.weight"], recorder.history[-1]["back.weight"])


def test_parameters_that_share_a_part_of_their_memory_are_refused():
    class Overlapping(Net):
        def __init__(self):
            super().__init__()
            memory = torch.randn(12)
            self.one, self.two = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])

    with pytest.raises(errors.TrickError, match=r"'one' and 'two' share a part\. `exclude` one of them"):
        fit([lt.EMA(0.9)], Overlapping)


def test_a_state_dict_with_other_names_is_deployed_too(tmp_path):
    class Renames(Net):
        def state_dict(self, *args, **kwargs):
            return {f"net.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state, **kwargs):
            return super().load_state_dict({name[4:]: value for name, value in state.items()}, **kwargs)

    run = fit([lt.EMA(0.9), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")], Renames)
    assert_equal(torch.load(tmp_path / "step=15.ckpt", weights_only=True)["state_dict"], run.module.state_dict())
    assert not torch.equal(run.trick.raw_state_dict()["net.head.weight"], run.trick.averaged_state_dict()["net.head.weight"])
    resumed = fit([lt.EMA(0.9)], Renames, ckpt_path=tmp_path / "step=7.ckpt", seed=9)
    assert_equal(weights(resumed.module), weights(run.module))


def test_extra_state_stays_what_it_is():
    class Extra(Net):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    trick = lt.EMA(0.9)
    make_trainer([trick]).fit(Extra(), Loader())
    assert trick.raw_state_dict()["_extra_state"] == {"version": 3}


class Parametrized(Steady):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.head)
        self.lstm = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.many = nn.ParameterList([nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(()))])
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.complex = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x):
        y = self.lstm(self.neck(self.body(x)))[0] * self.many[0] * self.many[1]
        y = self.attention(y, y, y)[0] * self.complex.abs()
        return self.head(y) + self.empty.sum()


@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}], ids=str)
def test_parametrizations_recurrent_layers_attention_lists_and_complex_weights(options):
    plain, recorder = fit([Recorder()], Parametrized), Recorder()
    run = fit([lt.EMA(0.9, **options), recorder], Parametrized)
    assert run.losses == plain.losses
    for name in ("head.parametrizations.weight.original1", "lstm.weight_hh_l0", "attention.in_proj_weight", "many.1"):
        torch.testing.assert_close(weights(run.module)[name], ema([state[name] for state in recorder.history], 0.9).float())
    expected = ema([torch.view_as_real(state["complex"]) for state in recorder.history], 0.9).float()
    torch.testing.assert_close(torch.view_as_real(run.module.complex.detach()), expected)


# Changes during the fit


def test_optimizers_made_anew_are_followed():
    class Anew(Steady):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    recorder, trick = Recorder(), lt.EMA(0.9)
    fit([trick, recorder], Anew)
    torch.testing.assert_close(trick.averaged_state_dict()["head.bias"], ema([s["head.bias"] for s in recorder.history], 0.9).float())


@pytest.mark.parametrize("shape", [(8, 3), (8, 5)])
def test_a_layer_replaced_between_epochs_begins_a_new_average(shape):
    class Replaces(Steady):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.head = nn.Linear(*shape)
                self.trainer.optimizers[0].add_param_group({"params": list(self.head.parameters())})

    recorder, trick = Recorder(), lt.EMA(0.9)
    run = fit([trick, recorder], Replaces, validate=False)
    history = [state["head.weight"] for state in recorder.history[6:]]
    assert history[0].shape == run.module.head.weight.shape
    assert torch.isfinite(run.module.head.weight).all()
    low, high = torch.stack(history).amin(0), torch.stack(history).amax(0)
    assert not torch.equal(run.module.head.weight, history[-1])
    assert ((run.module.head.weight >= low - 0.2) & (run.module.head.weight <= high + 0.2)).all()


def test_backbone_finetuning(recwarn):
    class Tunes(Steady):
        @property
        def backbone(self):
            return self.neck

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.05)

    recorder, trick = Recorder(), lt.EMA(0.9)
    fit([BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01), trick, recorder], Tunes)
    history = [state["neck.bias"] for state in recorder.history]
    assert torch.equal(history[0], history[5])
    assert not torch.equal(history[5], history[15])
    torch.testing.assert_close(trick.averaged_state_dict()["neck.bias"], ema(history, 0.9, start=5).float())


def test_pruning_is_refused():
    with pytest.raises(
        errors.TrickConflictError, match=r"Lightning's ModelPruning replaces parameters .* and EMA\(decay=0.9\) follows them"
    ):
        fit([lt.EMA(0.9), ModelPruning("l1_unstructured", amount=0.3)], Steady)


@pytest.mark.parametrize("late", [True, False])
def test_manual_optimization_with_bare_optimizers_and_late_thawing(late):
    class Manual(Steady):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.head.requires_grad_(requires_grad=not late)

        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1:
                self.head.requires_grad_(requires_grad=True)
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    recorder, trick = Recorder(), lt.EMA(0.9)
    fit([trick, recorder], Manual)
    history = [state["head.weight"] for state in recorder.history]
    torch.testing.assert_close(trick.averaged_state_dict()["head.weight"], ema(history, 0.9, start=5 if late else 0).float())


# Both


class Tracks(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.tracker = MetricTracker(MulticlassAccuracy(3))
        self.best = MinMaxMetric(MeanMetric())
        self.seen = []

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_validation_epoch_start(self):
        self.tracker.increment()

    def validation_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.tracker.update(out, batch[1])
        self.best.update(nn.functional.cross_entropy(out, batch[1]))
        self.log("val_loss", nn.functional.cross_entropy(out, batch[1]))

    def on_validation_epoch_end(self):
        self.seen.append((self.tracker.n_steps, self.best.compute()["min"].item()))
        assert self.trainer.checkpoint_callback is not None
        self.best._base_metric.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def track(tmp_path, evaluate):
    torch.manual_seed(0)
    module, data = Tracks(), Loader(4, seed=1)
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    options = {"limit_val_batches": 2, "num_sanity_val_steps": 0}
    keep = ModelCheckpoint(tmp_path / str(evaluate), monitor="val_loss")
    make_trainer([lt.EMA(0.9, evaluate=evaluate), keep], **options).fit(module, Loader(), loader)
    return module, keep


def test_both_leaves_no_trace_in_wrapped_metrics_nor_in_the_loaders_random_numbers(tmp_path):
    one, keep_one = track(tmp_path, evaluate=True)
    both, keep_both = track(tmp_path, evaluate="both")
    assert one.tracker.n_steps == both.tracker.n_steps == 3
    assert both.seen[1::2] == one.seen
    assert keep_one.best_model_score == keep_both.best_model_score


def test_both_keeps_the_workers_of_the_loader():
    import os

    class Pids(TensorDataset):
        def __getitem__(self, index):
            return (*super().__getitem__(index), torch.tensor(os.getpid()))

    class Asks(Net):
        pids: set[int] = set()  # noqa: RUF012

        def validation_step(self, batch, batch_idx):
            self.pids.add(int(batch[2][0]))

    data = Loader(2)
    loader = DataLoader(Pids(data.x, data.y), batch_size=4, num_workers=1, persistent_workers=True)
    make_trainer([lt.EMA(0.9, evaluate="both")], max_epochs=2).fit(Asks(), Loader(), loader)
    assert len(Asks.pids) == 1


def test_both_shows_raw_metrics_on_the_progress_bar_under_their_prefix():
    shown = []

    class Shows(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch), prog_bar=True)

        def on_train_epoch_end(self):
            shown.append({name: float(value) for name, value in self.trainer.progress_bar_metrics.items()})

    run = fit([lt.EMA(0.9, evaluate="both")], Shows)
    assert shown[-1]["val_loss"] == run.trainer.callback_metrics["val_loss"].item()
    assert shown[-1]["raw/val_loss"] != shown[-1]["val_loss"]


def test_a_buffer_written_in_evaluation():
    class Writes(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("latest", torch.zeros(8))

        def test_step(self, batch, batch_idx):
            self.latest = batch[0].mean((0, 1, 2))

    run = fit([lt.EMA(0.9, buffers="average")], Writes)
    run.trainer.test(run.module, Loader(2), verbose=False)
    assert run.module.latest.any()


# Values


def test_arguments_of_other_libraries_types_print_as_pythons():
    trick = lt.EMA(np.float32(0.5), start=np.int64(3), every=np.int32(2), where=np.array(["head", "body"]).tolist())
    assert repr(trick) == "EMA(decay=0.5, start=3, every=2, where=('head', 'body'))"
    for wrong in ({"dtype": np.array([1, 2])}, {"device": "meta"}, {"device": 3.5}, {"dtype": "nn"}):
        with pytest.raises(errors.ArgumentError):
            lt.EMA(**wrong)


def test_a_subclass_with_arguments_of_its_own():
    class Tagged(lt.EMA):
        def __init__(self, *args, tag="x", **kwargs):
            super().__init__(*args, **kwargs)
            self.tag = tag

    run = fit([Tagged(0.9, tag="y")])
    assert repr(run.trick) == "Tagged(decay=0.9, tag='y')"
    assert updates(run.trick) == [15]


def test_counts_of_a_track_are_what_a_checkpoint_keeps():
    run = fit([lt.EMA(0.9, start=2, every=3)])
    counts = asdict(run.trick._averages.tracks[0], dict_factory=lambda items: {k: v for k, v in items if isinstance(v, int)})
    assert {key: counts[key] for key in ("steps", "begun", "latest", "updates")} == {"steps": 15, "begun": 2, "latest": 14, "updates": 4}
