"""Ensembles in situations that users bring about: compiled models, files of weights alone, several tricks, several fits."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

import lightning_tricks as lt
from contracts.harness import Loader, assert_equal, make_trainer
from lightning_tricks import functional
from lightning_tricks import nn as modules
from lightning_tricks._inspection import describe_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:.*does not have many workers", "ignore:Checkpoint directory"
)


class Plain(pl.LightningModule):
    """A classifier with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trick(folder, members=3, **options):
    return lt.SnapshotEnsemble(members, dirpath=folder / "members", **options)


X = next(iter(Loader(1, size=8, seed=1)))[0]


def fixed(*batches):
    return DataLoader([(batch,) for batch in batches], batch_size=None)


# Compiled models


def compile_in_place(module):
    module.compile(backend="eager")


def compile_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")


def compile_step(module):
    """What Lightning does to each step of a module that was handed to ``torch.compile``."""
    module.forward = torch.compile(module.forward, backend="eager")
    module.predict_step = torch.compile(module.predict_step, backend="eager")


@pytest.mark.full
@pytest.mark.parametrize("compile_", [compile_in_place, compile_forward, compile_step])
def test_compiled_models_answer_by_their_members_and_copies_by_weights_of_their_own(tmp_path, compile_):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, ensemble = Plain(), trick(tmp_path, 2)
    compile_(module)
    trainer = make_trainer([ensemble], max_epochs=2)
    trainer.fit(module, Loader())
    predicted = trainer.predict(module, fixed(X))[0]
    joint, soup = ensemble.to_ensemble(), modules.Ensemble([module, Plain()]).eval().to_soup()
    with torch.no_grad():
        expected = functional.combine_predictions(torch.stack([member.net(X) for member in joint]))
        torch.testing.assert_close(predicted, expected)
        torch.testing.assert_close(joint(X), expected)
        torch.testing.assert_close(soup(X), soup.net(X))
        assert not torch.allclose(soup(X), module.eval()(X))


# Files


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "weights alone"])
def test_each_file_is_evaluated_with_the_members_of_its_time(tmp_path, alone):
    module, ensemble = Plain(), trick(tmp_path)
    trainer = make_trainer([ensemble, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=alone)])
    trainer.fit(module, Loader())
    trainer.save_checkpoint(tmp_path / "epoch=3.ckpt", weights_only=alone)
    predicted = trainer.predict(module, fixed(X))
    for epoch, members in enumerate([1, 2, 3, 3]):
        other = trick(tmp_path)
        again = make_trainer([other]).predict(Plain(), fixed(X), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        mine = trainer.predict(module, fixed(X), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert len(other._members) == len(ensemble._members) == members
        assert torch.equal(again[0], mine[0])
    assert torch.equal(mine[0], predicted[0])


def test_members_that_checkpoints_name_stay_also_beside_a_trick_that_records_changes(tmp_path):
    module, ensemble = Plain(), trick(tmp_path, 1, cycles=3)
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer([ensemble, lt.NormSwap("batch", "layer"), saves])
    trainer.fit(module, Loader())
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, Loader())
    for epoch in range(6):
        trainer.test(module, Loader(1), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert len(ensemble._members) == 1


def test_inspection_says_which_members_a_checkpoint_names_and_whether_they_are_there(tmp_path):
    ensemble = trick(tmp_path / "run", 2, cycles=3)
    trainer = make_trainer([ensemble])
    trainer.fit(Plain(), Loader())
    trainer.save_checkpoint(tmp_path / "run" / "last.ckpt")
    first, second = (member.paths[0] for member in ensemble._members)
    second.unlink()
    told = describe_checkpoint(tmp_path / "run" / "last.ckpt").splitlines()
    assert f"    step 10, cycle 2: {first}, {first.stat().st_size:,} bytes" in told
    assert f"    step 15, cycle 3: {second}, missing" in told
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert str(moved / "members" / first.name) in describe_checkpoint(moved / "last.ckpt")


# Averages


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_strategy_that_hands_weights_to_all_ranks_changes_no_average(evaluate):
    class Synchronizing(SingleDeviceStrategy):
        def setup(self, trainer):  # as DDP does before an evaluation
            super().setup(trainer)
            with torch.no_grad():
                for parameter in trainer.lightning_module.parameters():
                    parameter.copy_(parameter.clone())

    module, average = Plain(), lt.EMA(0.9, evaluate=evaluate)
    trainer = make_trainer([average], strategy=Synchronizing(torch.device("cpu")))
    trainer.fit(module, Loader())
    raw, averaged = average.raw_state_dict(), average.averaged_state_dict()
    trainer.predict(module, fixed(X))
    assert_equal(average.raw_state_dict(), raw)
    assert_equal(average.averaged_state_dict(), averaged)
    assert not torch.equal(raw["net.1.weight"], averaged["net.1.weight"])
