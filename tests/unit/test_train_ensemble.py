"""Members trained apart: reproducible, resumable, bagged, packed; and what is refused."""

from __future__ import annotations

import json
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from torchmetrics import MeanMetric

from contracts.harness import SCRATCH, assert_differ, assert_equal
from lightning_tricks import ensembling, functional
from lightning_tricks.ensembling import _member_runs, train_ensemble
from lightning_tricks.ensembling._bagging import draw_bag
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError, UnsupportedStrategyError
from reference import bagging

SIZE = 20
ROWS = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.randint(3, (SIZE,), generator=torch.Generator().manual_seed(1))
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 2,
    "default_root_dir": SCRATCH,
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


class Net(pl.LightningModule):
    """A classifier of rows."""

    def __init__(self, lr=0.1, dropout=0.0):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]).item(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.hparams["lr"], momentum=0.9, weight_decay=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)}


class Noisy(Net):
    """Draws random numbers in every step."""

    def __init__(self):
        super().__init__(dropout=0.3)


class Odd(Net):
    """Has BatchNorm, a buffer, a tied and a frozen weight."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        )
        self.net[4].weight = self.net[3].weight
        self.net[3].bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def training_step(self, batch):  # Lightning leaves the number of the batch away, too
        self.seen.add_(1)
        return {"loss": super().training_step(batch, 0)}


class Data(pl.LightningDataModule):
    def setup(self, stage):
        self.ready = TensorDataset(ROWS, CLASSES)

    def train_dataloader(self):
        return DataLoader(self.ready, batch_size=6, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.ready, batch_size=6)


def loader(**options):
    return DataLoader(TensorDataset(ROWS, CLASSES), **{"batch_size": 6, "shuffle": True, **options})


def train(make=Net, data=None, members=2, *, trainer=None, mode="loop", **options):
    return train_ensemble(make, loader() if data is None else data, members, trainer={**QUIET, **(trainer or {})}, mode=mode, **options)


def state(found):
    return dict(found.ensemble.state_dict())


class Cut(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


class CutAt(pl.Callback):
    """Ends the run in the middle of an epoch."""

    starts: list[int] = []  # noqa: RUF012
    epoch = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.starts.append(trainer.current_epoch)
        if batch_idx == 1 and trainer.current_epoch == CutAt.epoch:
            CutAt.epoch = None
            raise Cut


def test_members_differ_and_each_follows_from_seed_and_number_alone():
    before = torch.get_rng_state(), dict(os.environ)
    first = train(Noisy, members=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert dict(os.environ) == before[1]
    torch.rand(3)
    second = train(Noisy, members=3, val_dataloaders=loader(shuffle=False))
    assert_equal(state(first), {name: value for name, value in state(second).items() if not name.startswith("members.2")})
    assert_differ(first.ensemble[0].state_dict(), first.ensemble[1].state_dict())
    assert_differ(state(first), state(train(Noisy, seed=1)))
    assert len(second.ensemble) == len(second.metrics) == 3
    assert {"loss_epoch", "val_loss"} <= second.metrics[0].keys()
    assert second.metrics[0] != second.metrics[1]
    assert not any(module.training for module in first.ensemble.modules())
    assert first.paths == ()
    assert first.out_of_bag is None
    assert all(member._trainer is None for member in first.ensemble)


def test_functions_may_take_the_members_number_and_generators_of_loaders_stay():
    generator = torch.Generator().manual_seed(5)
    made = []

    def trainer(member):
        made.append(pl.Trainer(**{**QUIET, "max_epochs": 1 + member}))
        return made[-1]

    def make(member):
        return Net(lr=0.1 * (1 + member))

    data = loader(generator=generator)
    found = train_ensemble(make, data, 2, trainer=trainer, mode="loop")
    assert [each.current_epoch for each in made] == [1, 2]
    assert [member.hparams["lr"] for member in found.ensemble] == [0.1, 0.2]
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    assert ensembling.train_ensemble is functional.train_ensemble


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_a_run_that_was_cut_goes_on_where_it_was(tmp_path, generator):
    options = {"trainer": {"max_epochs": 4, "callbacks": [CutAt()]}, "val_dataloaders": loader(shuffle=False), "members": 3}
    whole = train(Noisy, loader(generator=generator), folder=tmp_path / "whole", **options)
    trained = {path: path.stat().st_mtime_ns for path in whole.paths}
    again = train(Noisy, folder=tmp_path / "whole", **options)
    assert {path: path.stat().st_mtime_ns for path in again.paths} == trained

    weights = {}
    for epoch in (2, 0, 3):
        CutAt.epoch = epoch
        CutAt.starts.clear()
        with pytest.raises(Cut):
            train(Noisy, loader(generator=generator), folder=tmp_path / "cut", **options)
        weights |= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.safetensors")}
    assert CutAt.starts == [0, 1, 2, 3]  # the second member began anew, since it was cut in its first epoch
    CutAt.starts.clear()
    resumed = train(Noisy, loader(generator=generator), folder=tmp_path / "cut", **options)
    assert CutAt.starts == [3, 0, 1, 2, 3]
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == written for name, written in weights.items())
    assert_equal(state(whole), state(resumed))
    assert whole.metrics == resumed.metrics == again.metrics
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        ["ensemble.json", *(f"member-{i}.{kind}" for i in range(3) for kind in ("json", "safetensors"))]
    )


# Bags


def test_bags_are_those_of_the_reference_and_like_draws_with_replacement():
    from lightning_tricks._core.draws import fold

    drawn = draw_bag(7, 50)
    assert drawn.tolist() == bagging.bag(fold(7, 0xBA6), 50)
    large = draw_bag(3, 20_000)
    assert large.min() >= 0
    assert large.max() < 20_000
    counts = torch.bincount(large, minlength=20_000)
    assert abs((counts == 0).double().mean().item() - 0.3679) < 0.01
    assert abs((counts == 2).double().mean().item() - 0.1839) < 0.01


@pytest.mark.parametrize("data", [loader, Data], ids=["loader", "data module"])
def test_each_member_sees_its_bag_and_predicts_the_rest(data):
    seen = {}

    class Watching(Net):
        def training_step(self, batch, batch_idx):
            found = [(row == ROWS).all(1).nonzero().item() for row in batch[0]]
            seen.setdefault((self.trainer.current_epoch, self.number), []).extend(found)
            return super().training_step(batch, batch_idx)

    def make(member):
        module = Watching()
        module.number = member
        return module

    found = train(make, data(), 3, bootstrap=True)
    bags = [sorted(seen[0, member]) for member in range(3)]
    assert bags == [sorted(seen[1, member]) for member in range(3)]
    assert all(len(bag) == SIZE > len(set(bag)) for bag in bags)
    assert bags[0] != bags[1]
    with torch.no_grad():
        needed, counts = bagging.out_of_bag(bags, lambda member, row: found.ensemble[member](ROWS[row]), SIZE)
    assert found.out_of_bag.count.tolist() == counts
    assert 0 in counts
    for prediction, reference in zip(found.out_of_bag.predictions, needed, strict=True):
        if reference is None:
            assert prediction.isnan().all()
        else:
            torch.testing.assert_close(prediction.double(), reference, atol=1e-6, rtol=1e-6)


def test_bagged_regression_averages_and_needs_no_targets_to_predict():
    class Regressor(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

        def predict_step(self, batch, batch_idx):
            return self(batch[0]).squeeze(1)

    found = train(Regressor, members=4, bootstrap=True, combine="mean", trainer={"max_epochs": 1})
    assert found.out_of_bag.predictions.shape == (SIZE,)
    row = int((found.out_of_bag.count == 1).nonzero()[0])
    member = next(m for m in range(4) if row not in draw_bag(_member_runs.fold(0, m), SIZE))
    with torch.no_grad():
        torch.testing.assert_close(found.out_of_bag.predictions[row], found.ensemble[member](ROWS[row])[0])


def test_predictions_that_cannot_be_combined_are_refused_before_training():
    class Tuples(Net):
        def forward(self, x):
            return self.net(x), x

    class Numbers(Net):
        def predict_step(self, batch, batch_idx):
            return self(batch[0]).argmax(1)

    class Scalars(Net):
        def predict_step(self, batch, batch_idx):
            return self(batch[0]).sum()[None]

    for make, words in ((Tuples, "predicts a tuple"), (Numbers, "torch.int64"), (Scalars, "1 rows for")):
        with pytest.raises(TrickError, match=f"one floating-point tensor with a row for each example.*{words}"):
            train(make, bootstrap=True)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(ROWS, CLASSES, strict=True))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataLoader(Stream(), batch_size=4), "Stream is an iterable"),
        (loader(shuffle=False, sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)), "in the order of a WeightedRandomSampler"),
        (DataLoader(TensorDataset(ROWS, CLASSES), batch_sampler=[[0, 1], [2, 3]]), "batches are made by a list"),
        ([(ROWS, CLASSES)], "the training data are a list"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_without_numbers_cannot_be_bagged(data, words):
    with pytest.raises(ArgumentError, match=f"draws examples by their numbers, and.*{words}"):
        train(Net, data, bootstrap=True)


# Packed


@pytest.mark.parametrize(("make", "data"), [(Net, Data), (Odd, loader)], ids=["plain", "odd"])
@pytest.mark.parametrize("bootstrap", [False, True], ids=["whole", "bagged"])
def test_packed_members_end_as_those_trained_one_after_another(make, data, bootstrap):
    options = {"bootstrap": bootstrap, "members": 3, "trainer": {"max_epochs": 3}}
    loop, packed = (train(make, data(), mode=mode, **options) for mode in ("loop", "packed"))
    assert (loop.mode, packed.mode) == ("loop", "packed")
    for name, value in state(loop).items():
        torch.testing.assert_close(state(packed)[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert packed.metrics[0].keys() == loop.metrics[0].keys()
    for one, other in zip(packed.metrics, loop.metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    if bootstrap:
        torch.testing.assert_close(packed.out_of_bag.predictions, loop.out_of_bag.predictions, equal_nan=True, atol=1e-5, rtol=1e-4)
    assert packed.ensemble[0].net[3].weight.requires_grad


def test_packed_members_are_reproducible_and_go_on_where_they_were(tmp_path, monkeypatch):
    options = {"members": 3, "trainer": {"max_epochs": 4}, "mode": "packed"}
    whole = train(Noisy, folder=tmp_path / "whole", **options)
    assert_differ(whole.ensemble[0].state_dict(), whole.ensemble[1].state_dict())
    step, steps = _member_runs.PackedMembers.training_step, []

    def cut(self, batch, batch_idx):
        steps.append(self.trainer.current_epoch)
        if steps == [0] * 4 + [1] * 4 + [2] * 2:
            raise Cut
        return step(self, batch, batch_idx)

    monkeypatch.setattr(_member_runs.PackedMembers, "training_step", cut)
    with pytest.raises(Cut):
        train(Noisy, folder=tmp_path / "cut", **options)
    steps.clear()
    resumed = train(Noisy, folder=tmp_path / "cut", **{**options, "mode": "auto"})
    assert steps == [2] * 4 + [3] * 4
    assert resumed.mode == "packed"
    assert_equal(state(whole), state(resumed))


class ByHand(Net):
    """Steps two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[3])]

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


class Norms(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Plateau(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "a"},
        }


class Hooked(Net):
    def on_train_batch_end(self, *arguments):
        pass


class Metered(Net):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()


class Replacing(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen = self.seen + 1
        return super().training_step(batch, batch_idx)


class Branching(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0.1 else 2 * loss


class Numbered(Net):
    """Computes something else for each member, which no one can see from outside."""

    number = 1

    def forward(self, x):
        return super().forward(x) * self.number


def numbered(member):
    module = Numbered()
    module.number += member
    return module


@pytest.mark.parametrize(
    ("make", "trainer", "words"),
    [
        (ByHand, {}, "ByHand optimizes by hand"),
        (Norms, {}, "LBFGS is not known to act on each number by itself"),
        (Plateau, {}, "ReduceLROnPlateau follows one member's metric"),
        (Hooked, {}, r"hooks that act on one model: \['on_train_batch_end'\]"),
        (Metered, {}, r"keeps metrics, which would add up all members: \['mean'\]"),
        (Replacing, {}, "replaces 'seen' instead of changing it in place"),
        (Branching, {}, "mapping over the members failed with"),
        (lambda member: Net(lr=1 + member), {}, "member 1 differs from member 0 in its hyperparameters"),
        (numbered, {}, "other results"),
        (Net, {"gradient_clip_val": 1.0}, "clipped by the norm of all members"),
        (Net, {"callbacks": [CutAt()]}, r"callbacks would act on all members as on one model: \['CutAt'\]"),
        (Net, {"strategy": "ddp", "devices": 2}, "on one device"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_packed_is_refused_with_the_reason(make, trainer, words, tmp_path):
    with pytest.raises(TrickError, match=f"must have members that can be trained at once, and .*{words}.*mode='loop'"):
        train(make, trainer=trainer, mode="packed", folder=tmp_path)
    assert not (tmp_path / "ensemble.json").exists()


@pytest.mark.parametrize(("times", "chosen"), [([0.02, 0.015, 0.9, 0.9], "packed"), ([0.9, 0.9, 0.02, 0.005], "loop")])
def test_auto_measures_both_ways_and_says_which_it_takes(times, chosen, monkeypatch):
    measured, run = iter(times), _member_runs.time_steps

    def time_steps(*arguments):
        assert 0 < run(*arguments) < 10
        return next(measured)

    monkeypatch.setattr(_member_runs, "time_steps", time_steps)
    said = []
    monkeypatch.setattr(_member_runs, "rank_zero_info", said.append)
    found = train(mode="auto", trainer={"max_epochs": 1})
    assert found.mode == chosen
    assert next(measured, None) is None
    assert said[0].endswith(f": a step of all 2 takes 20.00 ms packed, and {2000 * min(times[1::2]):.2f} ms one after another.")


class Unvalidated(Net):
    validation_step = pl.LightningModule.validation_step


@pytest.mark.parametrize(("make", "count"), [(Net, 1), (Unvalidated, 0)])
def test_packing_and_trials_say_no_more_than_a_single_fit(make, count, monkeypatch, caplog):
    monkeypatch.setattr(_member_runs, "_STEPS", 7)  # of the eight that there are
    with warnings.catch_warnings(record=True) as warned, caplog.at_level("INFO", "lightning.pytorch"):
        warnings.simplefilter("always")
        found = train(make, mode="auto")
    fits = 1 if found.mode == "packed" else 2
    assert len([each for each in warned if "have no `val_dataloader`" in str(each.message)]) == fits * count
    assert caplog.text.count("`Trainer.fit` stopped") == fits


def test_auto_trains_one_after_another_what_cannot_be_packed_and_says_why(monkeypatch):
    said = []
    monkeypatch.setattr(_member_runs, "rank_zero_info", said.append)
    found = train(ByHand, mode="auto", trainer={"max_epochs": 1})
    assert found.mode == "loop"
    assert said == ["train_ensemble trains one member after another: ByHand optimizes by hand."]


# Files


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "one with seed = 0, and this call has 1"),
        ({"members": 3}, "one with members = 2, and this call has 3"),
        ({"bootstrap": True}, "one with bootstrap = False, and this call has True"),
        ({"mode": "packed"}, "one with mode = 'loop', and this call has 'packed'"),
        ({"make": lambda: Net(lr=0.2)}, r"one with hyperparameters\['lr'\] = 0.1, and this call has 0.2"),
        ({"make": Odd}, "one with module = 'Net', and this call has 'Odd'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_of_another_ensemble_is_refused_with_what_differs(options, words, finished):
    with pytest.raises(ArgumentError, match=words):
        train(folder=finished, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder=folder)
    return folder


def test_a_changed_layer_is_named(finished):
    class Other(Net):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Linear(8, 5)

    Other.__qualname__ = "Net"
    with pytest.raises(ArgumentError, match=r"tensors\['net.3.weight'\] = 'float32 \[3, 8\]', and this call has 'float32 \[5, 8\]'"):
        train(Other, folder=finished)


def test_missing_and_altered_files_are_named(tmp_path):
    train(folder=tmp_path)
    path = tmp_path / "member-1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"member-1.safetensors' must hold .* has been altered"):
        train(folder=tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"member-1.safetensors' must hold .* does not exist"):
        train(folder=tmp_path)
    path.write_bytes(content)
    assert train(folder=tmp_path, mode="auto").mode == "loop"
    (tmp_path / "ensemble.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"ensemble.json' must be a record of an ensemble, and it is damaged"):
        train(folder=tmp_path)


def test_records_are_plain_json_and_weights_load_without_us(tmp_path):
    from safetensors.torch import load_file

    found = train(folder=tmp_path, bootstrap=True)
    record = json.loads((tmp_path / "member-0.json").read_text())
    assert record["metrics"] == found.metrics[0]
    assert record["digests"].keys() == {"member-0.safetensors", "member-0.out-of-bag.safetensors"}
    assert_equal(load_file(found.paths[0]), found.ensemble[0].state_dict())


# Arguments


class WithText(Net):
    def get_extra_state(self):
        return "text"

    def set_extra_state(self, value):
        pass


class Renaming(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.extra = nn.Linear(1, 1)


ONE = Net()
SHARED = nn.Linear(4, 8)
USED = pl.Trainer(**QUIET)
USED.state.fn = "fit"


def sharing():
    module = Net()
    module.net[0] = SHARED
    return module


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"members": 0}, ArgumentError, "`members` must be a whole number of at least 1, got 0"),
        ({"members": 2.5}, ArgumentError, "`members`"),
        ({"seed": -1}, ArgumentError, "`seed`"),
        ({"bootstrap": 1}, ArgumentError, "`bootstrap`"),
        ({"mode": "vmap"}, ArgumentError, "`mode` must be one of 'auto', 'loop', 'packed'"),
        ({"combine": "sum"}, ArgumentError, "`combine`"),
        ({"folder": 3}, ArgumentError, "`folder`"),
        ({"data": 3}, ArgumentError, "`datamodule` must be a LightningDataModule, or what loads"),
        ({"data": iter([(ROWS, CLASSES)])}, ArgumentError, "loads the training data anew for each member"),
        ({"data": Data(), "val_dataloaders": loader()}, ArgumentError, "`val_dataloaders` must be None"),
        ({"make": ONE}, ArgumentError, r"`make_module` must be a function that makes a new LightningModule, .*got a Net"),
        ({"make": lambda: ONE}, ArgumentError, "new LightningModule for each member, and returned the same one twice"),
        ({"make": sharing}, ArgumentError, "returned two that share 'net.0.weight'"),
        ({"make": lambda: nn.Linear(1, 1)}, ArgumentError, "must return a new LightningModule, and returned a Linear"),
        ({"make": WithText}, TrickError, "has something else in its state dict under '_extra_state'"),
        ({"trainer": {"callbacks": [Renaming()]}}, CheckpointError, "weights of member 0 must fit what `make_module` makes"),
    ],
    ids=lambda value: "",
)
def test_wrong_arguments_say_what_is_wrong(options, kind, words):
    with pytest.raises(kind, match=words):
        train(**options)


def test_wrong_trainers_say_what_is_wrong():
    for trainer, kind, words in (
        (USED, ArgumentError, r"`trainer` must be a function that makes a new Trainer, such as `lambda: Trainer\(…\)`, or a dict"),
        (lambda: USED, ArgumentError, "a new Trainer for each member, and returned one that was used before"),
        (lambda: 3, ArgumentError, "and returned a int"),
        (lambda: pl.Trainer(**QUIET, strategy="ddp", devices=2), ArgumentError, "`folder` must be a folder that all ranks reach"),
        (lambda: pl.Trainer(**QUIET, strategy=pl.strategies.ModelParallelStrategy()), UnsupportedStrategyError, "stores whole members"),
    ):
        with pytest.raises(kind, match=words):
            train_ensemble(Net, loader(), 2, trainer=trainer, mode="loop")
