"""Situations in which Lightning's own averaging callbacks are tested, for ours."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_differ, assert_equal, fit, make_trainer, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Checkpoint directory .* exists",
    "ignore:.*multi-threaded, use of fork",
    "ignore:.*does not define `validation_step`",
)

TRICKS = [
    lambda: lt.EMA(0.8),
    lambda: lt.EMA(0.8, every=5, start=10, buffers="average"),
    lambda: lt.EMA(0.8, start="3 epochs"),
    lambda: lt.PolyakAveraging(start="2 epochs", every="1 epoch"),
]


class Crashes(pl.LightningModule):
    """Fails in a given epoch; with BatchNorm, and a schedule that steps once an epoch."""

    def __init__(self, epoch: int | None = None) -> None:
        super().__init__()
        self.epoch = epoch
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        if self.current_epoch == self.epoch and batch_idx == 1:
            raise RuntimeError("crash")  # noqa: EM101
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        first, *rest = self.net.parameters()
        optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.2}])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        yield from ((x,) for x in self.x)


def train(module, *callbacks, stream, ckpt_path=None):
    x = torch.randn(28, 8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(Stream(x) if stream else TensorDataset(x), batch_size=4)
    make_trainer(callbacks, max_epochs=6, accumulate_grad_batches=2).fit(module, data, ckpt_path=ckpt_path)


@pytest.mark.parametrize("epoch", [1, 3, 5])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("make", TRICKS)
def test_a_run_that_crashed_ends_like_one_that_did_not(make, stream, epoch, tmp_path):
    whole, crashed, again, kept = Crashes(), Crashes(epoch), Crashes(), make()
    for module in (crashed, again):
        module.load_state_dict(whole.state_dict())
    train(whole, kept, stream=stream)
    with pytest.raises(RuntimeError, match="crash"):
        train(crashed, make(), ModelCheckpoint(tmp_path, filename="last"), stream=stream)
    resumed = make()
    train(again, resumed, stream=stream, ckpt_path=tmp_path / "last.ckpt")
    assert_equal(resumed.raw_state_dict(), kept.raw_state_dict())
    assert_equal(weights(again), weights(whole))
    assert_differ(weights(whole), kept.raw_state_dict())


@pytest.mark.parametrize("make", TRICKS)
def test_learning_rates_and_schedules_stay_the_users(make):
    module = Crashes()
    train(module, make(), stream=False)
    assert [group["lr"] for group in module.trainer.optimizers[0].param_groups] == [0.1 / 2**6, 0.2 / 2**6]


class Same(Net):
    """Draws nothing at random, so that processes with the same data train as one does."""

    def __init__(self):
        super().__init__()
        self.body[3].p = 0.0


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_processes_that_the_trainer_starts_hand_back_the_average(strategy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recorder = Recorder()
    alone = fit([lt.EMA(0.8), recorder], Same, max_epochs=1, validate=False)
    torch.manual_seed(0)
    module, trick = Same(), lt.EMA(0.8)
    make_trainer([trick], devices=2, strategy=strategy, max_epochs=1, use_distributed_sampler=False).fit(module, Loader())
    for name, value in weights(alone.module).items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)
    assert_differ(weights(module), recorder.history[-1])


@pytest.mark.parametrize("make", TRICKS)
def test_a_run_of_one_batch(make):
    recorder = Recorder()
    run = fit([make(), recorder], fast_dev_run=True)
    if isinstance(run.trick, lt.EMA) and run.trick.start == 0:
        assert_differ(weights(run.module), recorder.history[-1])
    else:
        assert_equal(weights(run.module), recorder.history[-1])
    assert_equal(run.trick.raw_state_dict(), recorder.history[-1])
