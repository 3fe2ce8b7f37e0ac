"""BatchNormFreeze in whole runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors, optim

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Watch(Callback):
    """Notes, after each batch, the state of the BatchNorm and whether it normalizes by the batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.modes: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append(weights(pl_module.body[1]))
        self.modes.append(pl_module.body[1].training)

    def changes(self, *names: str) -> list[bool]:
        """Tell for each step whether one of these has changed."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [any(not torch.equal(one[name], other[name]) for name in names) for one, other in pairs]


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Restless(Net):
    """Calls `train` where users do."""

    def on_train_epoch_start(self):
        self.train()

    def training_step(self, batch, batch_idx):
        self.train()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("start", "begin"), [(4, 4), ("1 epoch", 5), ("80%", 12), (0, 0)])
@pytest.mark.parametrize("affine", [False, True])
def test_statistics_stay_from_the_moment_on_and_the_rest_trains(start, begin, affine):
    watch = Watch()
    run = fit([lt.BatchNormFreeze(start, affine=affine), watch], Restless)
    assert watch.modes == [True] * begin + [False] * (15 - begin)
    first = max(begin, 1)
    assert watch.changes(*STATISTICS) == [True] * (first - 1) + [False] * (15 - first)
    assert watch.changes("weight", "bias") == ([True] * (first - 1) + [False] * (15 - first) if affine else [True] * 14)
    assert run.module.body[1].training
    assert "train" not in vars(run.module.body[1])
    assert not torch.equal(run.module.head.weight, fit(model=Restless, max_epochs=1).module.head.weight)


def test_layers_normalize_by_running_statistics():
    class Compare(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            norm, x = pl_module.body[1], pl_module.body[0](batch[0])
            expected = (x - norm.running_mean.view(1, -1, 1, 1)) / (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()
            expected = expected * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
            torch.testing.assert_close(norm(x), expected)
            self.compared = True

    compare = Compare()
    fit([lt.BatchNormFreeze(0), compare], max_epochs=1)
    assert compare.compared


OPTIMIZERS = [
    optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.1, decayed=("matrix", "norm", "bias")),
    optim.AdamW(lr=0.01, weight_decay=0.1, decayed=("matrix", "norm", "bias")),
    optim.SAM(optim.SGD(lr=0.1, momentum=0.9), rho=0.1),
]


@pytest.mark.parametrize("recipe", OPTIMIZERS, ids=lambda recipe: type(recipe).__name__)
def test_no_optimizer_moves_fixed_scale_and_shift_neither_by_decay_nor_by_momentum(recipe):
    watch = Watch()
    fit([lt.BatchNormFreeze(4, affine=True), lt.OptimizerFactory(recipe), watch])
    assert watch.changes("weight", "bias") == [True] * 3 + [False] * 11


def test_gradients_of_what_is_fixed_do_not_count_when_gradients_are_clipped():
    """As if scale and shift had no gradients from the start."""

    class Detached(Net):
        def __init__(self):
            super().__init__()
            self.body[1].requires_grad_(requires_grad=False)

    clipped = {"gradient_clip_val": 1e-2, "max_epochs": 1}
    fixed = fit([lt.BatchNormFreeze(0, affine=True)], **clipped)
    plain = fit([lt.BatchNormFreeze(0)], Detached, **clipped)
    assert_equal(weights(fixed.module), weights(plain.module))


class Manual(Net):
    """Steps by itself, past Lightning's hooks."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()


def test_manual_steps_leave_scale_and_shift_as_they_are():
    watch = Watch()
    fit([lt.BatchNormFreeze(0, affine=True), watch], Manual, max_epochs=1)
    assert watch.changes("weight", "bias") == [False] * 4


@pytest.mark.parametrize("step", [2, 4, 9])
def test_resumes_in_every_phase(step, tmp_path):
    trick = {"start": 4, "affine": True}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([lt.BatchNormFreeze(**trick), lt.EMA(0.8, buffers="average"), keep])
    again = fit([lt.BatchNormFreeze(**trick), lt.EMA(0.8, buffers="average")], ckpt_path=tmp_path / f"step={step}.ckpt", seed=9)
    assert_equal(weights(again.module), weights(whole.module))


def test_what_did_not_train_before_does_not_train_afterwards():
    class Frozen(Net):
        def on_train_epoch_start(self):
            self.body[1].eval()

    run = fit([lt.BatchNormFreeze(4)], Frozen)
    assert not run.module.body[1].training


def test_an_exception_gives_everything_back():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("batch")  # noqa: EM101

    module = Net()
    with pytest.raises(KeyError):
        make_trainer([lt.BatchNormFreeze(1), Fails()]).fit(module, Loader())
    assert module.body[1].training
    module.eval()
    assert not module.body[1].training


def test_a_model_can_be_copied_and_pickled_while_layers_are_fixed():
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            body = pl_module.body
            self.copies = [copy.deepcopy(body), pickle.loads(pickle.dumps(body))]  # noqa: S301
            assert not any(each.train()[1].training for each in self.copies)
            assert not body[1].training

    copies = Copies()
    fit([lt.BatchNormFreeze(0), copies], max_epochs=1)
    assert len(copies.copies) == 2


def test_a_refresh_of_the_same_layers_is_refused():
    with pytest.raises(errors.TrickConflictError, match=r"keeps the statistics of all layers that BatchNormRefresh\(\) would measure"):
        fit([lt.BatchNormRefresh(), lt.BatchNormFreeze(3)])
