"""Standardization of inputs and targets in whole runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, launch, make_trainer, weights
from contracts.sharded_worker import runs_here
from lightning_tricks import errors
from lightning_tricks._core.checkpoint import read_changes
from reference import standardization as reference

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Regression(pl.LightningModule):
    """Learns targets far from zero, from features far from zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)
        self.inputs: list[Tensor] = []
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {"training": [], "validation": []}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        output = self(batch["x"])
        self.seen[stage].append((batch["y"].clone(), output.detach().clone()))
        return nn.functional.mse_loss(output, batch["y"])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch, "training")
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch, "validation"))

    def predict_step(self, batch, batch_idx):
        return self(batch["x"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 64, *, fails: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 3, generator=generator) * torch.tensor([1.0, 50.0, 0.0]) + torch.tensor([1e4, 0.0, 7.0])
        noise = torch.randn(count, 2, generator=generator)
        self.y = torch.stack([self.x[:, 0] - 1e4, self.x[:, 1]], dim=1) @ torch.tensor([[40.0, 0.0], [0.0, 1e-3]]) + noise * 0.01
        self.y += torch.tensor([250.0, 5.0])
        self.fails, self.reads = fails, []  # attributes of a data set are put back after a pass, and what they hold is not

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert not self.fails, "read before training"
        self.reads.append(index)
        return {"x": self.x[index], "y": self.y[index]}


def loader(data: Rows | None = None, **options) -> DataLoader:
    return DataLoader(data or Rows(), batch_size=16, **options)


def both(**options) -> list[Callback]:
    return [lt.InputStandardization(**options), lt.TargetStandardization(item="y", **options)]


# Inputs


def test_inputs_are_standardized_by_the_training_set_in_every_stage(tmp_path):
    module, data = Regression(), Rows()
    module.net.register_forward_pre_hook(lambda _, inputs: module.inputs.append(inputs[0].detach()))
    validation = loader(Rows(16))
    trainer = make_trainer([lt.InputStandardization()], max_epochs=2)
    trainer.fit(module, loader(data, shuffle=True), validation)
    mean, variance = reference.statistics([data.x], "channel")
    std = variance.sqrt()
    std[2] = 1.0  # constant
    expected = (data.x.double() - mean) / std
    trained = torch.cat(module.inputs[-5:-1])  # of the last epoch, before its validation
    torch.testing.assert_close(trained.double().sort(dim=0).values, expected.sort(dim=0).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.inputs[-1].double(), (validation.dataset.x.double() - mean) / std, rtol=1e-5, atol=1e-5)
    module.inputs.clear()
    trainer.predict(module, validation)
    torch.testing.assert_close(module.inputs[-1].double(), (validation.dataset.x.double() - mean) / std, rtol=1e-5, atol=1e-5)


def test_validation_data_are_never_read_for_statistics():
    module, validation = Regression(), Rows(fails=True)
    with pytest.raises(AssertionError, match="read before training"):
        make_trainer(both(), max_epochs=1).fit(module, loader(), loader(validation))
    assert len(module.seen["training"]) == 4  # all of training, with statistics, came before
    mean, _ = reference.statistics([Rows().x], "channel")
    torch.testing.assert_close(module.input_standardization.mean, mean.float())


class NoisyRows(Rows):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "noise": torch.randn(2)}


def test_training_draws_and_reads_as_without_the_pass():
    def train(callbacks):
        torch.manual_seed(0)
        module = Regression()
        noise = []
        module.on_train_batch_start = lambda batch, batch_idx: noise.append(batch["noise"].clone())
        torch.manual_seed(1)
        make_trainer(callbacks, max_epochs=2).fit(module, loader(NoisyRows(), shuffle=True))
        return torch.cat(noise), torch.cat([y for y, _ in module.seen["training"]]), torch.get_rng_state()

    for one, other in zip(train([]), train([lt.InputStandardization()]), strict=True):
        assert torch.equal(one, other)


def test_one_pass_serves_both_and_a_second_fit_none():
    module, data = Regression(), Rows()
    make_trainer(both(), max_epochs=1).fit(module, loader(data))
    assert len(data.reads) == 2 * 64
    make_trainer(both(), max_epochs=1).fit(module, loader(data))
    assert len(data.reads) == 3 * 64
    few = Rows()
    make_trainer(both(batches=2), max_epochs=1).fit(other := Regression(), loader(few))
    mean, _ = reference.statistics([few.x[:32]], "channel")
    torch.testing.assert_close(other.input_standardization.mean, mean.float())


def test_a_resumed_run_uses_the_statistics_of_the_first(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last")
    make_trainer([*both(), keep], max_epochs=1).fit(first := Regression(), loader())
    other = Rows()
    other.x += 100  # would give other statistics
    make_trainer(both(), max_epochs=2).fit(again := Regression(), loader(other), ckpt_path=tmp_path / "last.ckpt")
    assert len(other.reads) == 64
    for name in ("input_standardization", "target_standardization"):
        assert_equal(weights(getattr(again, name)), weights(getattr(first, name)))


@pytest.mark.parametrize("first", [0, 1])
def test_an_average_resumes_with_it_in_any_order(first, tmp_path):
    def callbacks():
        return [lt.EMA(0.8), lt.InputStandardization()][:: 1 if first else -1]

    whole = fit([*callbacks(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")])
    resumed = fit(callbacks(), ckpt_path=tmp_path / "step=8.ckpt", seed=9)
    assert_equal(weights(resumed.module), weights(whole.module))


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_record_how_keys_have_changed(weights_only, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last", save_weights_only=weights_only)
    make_trainer([lt.InputStandardization(whitening="pca", argument="x"), lt.TargetStandardization(item="y"), keep], max_epochs=1).fit(
        module := Regression(), loader()
    )
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    changes = read_changes(checkpoint)
    assert [function for function, _ in changes] == ["standardize_inputs", "standardize_targets"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"input_standardization.mean"'):
        Regression().load_state_dict(checkpoint["state_dict"])
    loaded = Regression()
    for function, arguments in changes:
        getattr(lt.functional, function)(loaded, **arguments)
    loaded.load_state_dict(checkpoint["state_dict"])
    x = Rows().x
    assert torch.equal(loaded(x), module(x))


def test_evaluating_without_statistics_warns():
    with pytest.warns(UserWarning, match=r"InputStandardization\(\) has no statistics before a fit, so that nothing is standardized"):
        make_trainer([lt.InputStandardization()]).validate(Regression(), loader(), verbose=False)


def test_a_model_that_training_reaches_past_forward_is_refused():
    class Past(Regression):
        def loss(self, batch, stage):
            return self.net(batch["x"]).square().mean()

    for trick in both():
        with pytest.raises(errors.TrickError, match="acts in `forward` of Past, and `training_step` did not call it"):
            make_trainer([trick]).fit(Past(), loader())
    make_trainer([lt.InputStandardization(module="net")], max_epochs=1).fit(past := Past(), loader())
    assert past.net.input_standardization.mean is not None


def test_modules_built_later_are_found():
    class Later(Regression):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = nn.Linear(3, 2)

    make_trainer([lt.InputStandardization(module="net")], max_epochs=1).fit(module := Later(), loader())
    assert module.net.input_standardization.std.shape == (3,)


def test_settings_other_than_those_of_the_model_are_refused():
    make_trainer([lt.InputStandardization()], max_epochs=1).fit(module := Regression(), loader())
    with pytest.raises(errors.TrickConflictError, match=r"call `functional.remove_standardization"):
        make_trainer([lt.InputStandardization(per="feature")], max_epochs=1).fit(module, loader())


# Targets


def test_training_sees_standardized_targets_and_evaluation_original_ones():
    module, data = Regression(), Rows()
    trainer = make_trainer(both(), max_epochs=30)
    trainer.fit(module, loader(data), loader(Rows(16)))
    mean, variance = reference.statistics([data.y], "channel")
    y = torch.cat([y for y, _ in module.seen["training"][-4:]]).double()
    torch.testing.assert_close(y, (data.y.double() - mean) / variance.sqrt(), rtol=1e-4, atol=1e-4)
    y, output = module.seen["validation"][-1]
    assert torch.equal(y, Rows(16).y)
    assert (output - y).abs().max() < 5.0
    train_loss, val_loss = trainer.callback_metrics["train_loss"].item(), trainer.callback_metrics["val_loss"].item()
    (predicted,) = trainer.predict(module, loader(Rows(16)))
    assert torch.equal(predicted, output)
    assert torch.equal(module.train()(Rows(16).x), predicted)  # whatever the mode, outside of a training step
    assert val_loss == pytest.approx((output - y).square().mean().item())
    y, output = module.seen["training"][-1]
    assert train_loss == pytest.approx((output - y).square().mean().item())


def test_without_it_the_same_run_learns_less():
    errors_of = []
    for callbacks in (both(), [lt.InputStandardization()]):
        module = Regression()
        trainer = make_trainer(callbacks, max_epochs=3)
        trainer.fit(module, loader(), loader(Rows(16)))
        errors_of.append(trainer.callback_metrics["val_loss"].item())
    assert errors_of[0] < errors_of[1]


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_batches_that_the_module_moves_itself_are_refused():
    class Iterating(Regression):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return self.loss(batch, "training")

    with pytest.raises(errors.TrickError, match=r"`training_step\(dataloader_iter\)` moves its own"):
        make_trainer([lt.TargetStandardization(item="y")]).fit(Iterating(), loader())


def test_targets_in_tuples_and_lists_are_replaced_and_the_data_set_stays():
    for kind in (tuple, list):
        data = TensorDataset(torch.randn(8, 1, 8, 8), torch.randn(8) + 9)

        class Pairs(Net):
            def loss(self, batch):
                assert type(batch) in {tuple, list}
                self.evaluated.append({"y": batch[1]})
                return (self(batch[0]).mean(dim=1) - batch[1]).square().mean()

        before = copy.deepcopy(data.tensors)
        batches = DataLoader(data, batch_size=8, collate_fn=lambda rows, kind=kind: kind(torch.utils.data.default_collate(rows)))
        make_trainer([lt.TargetStandardization()], max_epochs=1).fit(module := Pairs(), batches)
        torch.testing.assert_close(module.evaluated[0]["y"].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        assert torch.equal(before[1], data.tensors[1])


def test_an_exception_in_a_step_leaves_predictions_in_original_units():
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            raise KeyError("step")  # noqa: EM101

    module = Fails()
    with pytest.raises(KeyError):
        make_trainer([lt.TargetStandardization(item="y")]).fit(module, loader())
    torch.testing.assert_close(module.target_standardization.mean, Rows().y.mean(dim=0))
    assert not module.target_standardization.in_step


# Processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("standardization")
    launch(Path(__file__).with_name("standardization_worker.py"), root, processes=2)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_pool_what_they_have_and_resume_with_it(kind, results):
    if kind != "ddp" and not runs_here(kind):
        pytest.skip("this torch runs FSDP2 on accelerators only")
    batches = [x for rank in range(2) for x, _ in Loader(size=4 + 3 * rank, seed=rank, rank=5 * rank)]
    mean, variance = reference.statistics(batches, "channel")
    for rank in range(2):
        seen = results[rank][kind]
        assert seen["mean"] == pytest.approx(mean.tolist(), rel=1e-6)
        assert seen["variance"] == pytest.approx(variance.tolist(), rel=1e-6)
        assert seen["resumed"] == [seen["mean"]] * (1 if kind == "ddp" else 2)
