"""NormSwap in a fit: checkpoints before and after, calibration, models that are built late, sharded and copied ones."""

from __future__ import annotations

import copy
import re
from itertools import permutations
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, launch, make_trainer, weights
from lightning_tricks import errors
from lightning_tricks.normalization._norm_reading import read_norm

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def swap(**changes) -> lt.NormSwap:
    return lt.NormSwap(**{"source": "batch", "target": "group", "groups": 2, **changes})


class Late(Net):
    """Builds its layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.body = self.body, None

    def configure_model(self):
        if self.body is None:
            self.body = self.layers
            del self.layers


def test_a_fit_trains_the_new_layers():
    run = fit([swap()])
    norm = run.module.body[1]
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 2
    assert run.trainer.optimizers[0].state[norm.weight]
    assert not torch.equal(norm.weight, torch.ones(4))
    assert run.trainer.optimizers[0].param_groups[0]["params"][2] is norm.weight


def test_load_from_checkpoint_makes_the_swap_anew(tmp_path):
    callbacks = [swap(), lt.NormSwap("group", "layer", name="second"), ModelCheckpoint(tmp_path, filename="last")]
    run = fit(callbacks)
    plain = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert [change["function"] for change in plain["lightning_tricks"]["changes"]] == ["swap_norm", "swap_norm"]
    loaded = lt.load_from_checkpoint(Net, tmp_path / "last.ckpt", lr=0.5, map_location="cpu")
    assert type(loaded) is Net
    assert loaded.hparams["lr"] == 0.5
    assert [type(module) for module in loaded.modules()] == [type(module) for module in run.module.modules()]
    assert_equal(weights(loaded), weights(run.module))
    make_trainer(callbacks[:2]).fit(loaded, Loader())  # whose layers both swaps have made already
    assert type(loaded.body[1]) is lt.nn.LayerNorm2d
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"body.1.running_mean\""):
        Net.load_from_checkpoint(tmp_path / "last.ckpt")


def test_files_of_weights_only_record_the_swap(tmp_path):
    run = fit([swap(), ModelCheckpoint(tmp_path, filename="last", save_weights_only=True)])
    loaded = lt.load_from_checkpoint(Net, tmp_path / "last.ckpt")
    assert_equal(weights(loaded), weights(run.module))


@pytest.mark.parametrize("order", [1, -1])
def test_files_of_weights_only_record_all_changes_also_after_the_fit(order, tmp_path):
    tricks = [swap(), lt.InputStandardization(), lt.ActivationSwap("relu", "gelu"), lt.ActivationSwap("gelu", "prelu", name="second")]
    if order < 0:
        tricks = [*tricks[2:], *tricks[1::-1]]
    run = fit([*tricks, ModelCheckpoint(tmp_path, filename="within", save_weights_only=True)])
    run.trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    x = torch.randn(2, 1, 8, 8)
    for file in ("within.ckpt", "after.ckpt"):
        loaded = lt.load_from_checkpoint(Net, tmp_path / file)
        assert torch.equal(loaded.eval()(x), run.module.eval()(x))


def test_a_checkpoint_without_changes_loads_as_ever(tmp_path):
    run = fit([ModelCheckpoint(tmp_path, filename="last")])
    assert_equal(weights(lt.load_from_checkpoint(Net, tmp_path / "last.ckpt")), weights(run.module))


def test_load_from_checkpoint_refuses_what_it_cannot_do(tmp_path):
    run = fit([swap(), ModelCheckpoint(tmp_path, filename="last")])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["lightning_tricks"]["changes"][0]["function"] = "fold_everything"
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    with pytest.raises(errors.CheckpointError, match=r"by `functional\.fold_everything`, which this release does not have\. Upgrade"):
        lt.load_from_checkpoint(Net, tmp_path / "newer.ckpt")
    with pytest.raises(errors.ArgumentError, match="`model_class` must be a class of LightningModules"):
        lt.load_from_checkpoint(run.module, tmp_path / "last.ckpt")

    class Other(LightningModule):
        def __init__(self, **_: object) -> None:
            super().__init__()

    with pytest.raises(errors.NothingMatchedError, match="has no normalization layers") as caught:
        lt.load_from_checkpoint(Other, tmp_path / "last.ckpt")
    assert caught.value.__notes__ == ["The checkpoint records this change. Load it with the class that was trained, not Other."]


def test_models_built_late_are_swapped_and_loaded(tmp_path):
    run = fit([swap(), ModelCheckpoint(tmp_path, filename="last")], Late)
    assert isinstance(run.module.body[1], nn.GroupNorm)
    loaded = lt.load_from_checkpoint(Late, tmp_path / "last.ckpt")
    assert_equal(weights(loaded), weights(run.module))


def test_a_checkpoint_saved_before_the_swap_says_so(tmp_path):
    fit([ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    words = "must be of a model with the swap of NormSwap(source='batch', target='group', groups=2), and was saved without it."
    with pytest.raises(errors.CheckpointError, match=re.escape(words)):
        fit([swap()], ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(errors.CheckpointError, match=re.escape(words)):
        make_trainer([swap()]).test(Net(), Loader(2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    module = Net.load_from_checkpoint(tmp_path / "last.ckpt")  # what the error advises
    make_trainer([swap()]).fit(module, Loader())
    assert isinstance(module.body[1], nn.GroupNorm)


def test_evaluating_from_a_checkpoint_swaps_first(tmp_path):
    run = fit([swap(), ModelCheckpoint(tmp_path, filename="last")])
    module = Net()
    make_trainer([swap()]).test(module, Loader(2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert_equal(weights(module), weights(run.module))


def test_a_loaded_model_trains_on_with_the_callback(tmp_path):
    fit([swap(), ModelCheckpoint(tmp_path, filename="last")])
    module = lt.load_from_checkpoint(Net, tmp_path / "last.ckpt")
    norm = module.body[1]
    make_trainer([swap(), ModelCheckpoint(tmp_path / "again", filename="last")]).fit(module, Loader())
    assert module.body[1] is norm
    assert_equal(weights(lt.load_from_checkpoint(Net, tmp_path / "again" / "last.ckpt")), weights(module))


# Calibration


class Outputs(lt.NormSwap):
    """Notes the scale with which training starts."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.started = weights(pl_module)


def test_calibration_happens_once_before_training_and_leaves_the_loader(tmp_path):
    torch.manual_seed(0)
    expected = Net()
    loader = Loader()
    batches = [next(iter(Loader(5))) for _ in range(1)]
    lt.functional.swap_norm(expected, "batch", "group", groups=2, calibrate=batches)
    trick = Outputs("batch", "group", groups=2, calibrate=1)
    torch.manual_seed(0)
    module = Net()
    plain = Net()
    plain.load_state_dict(module.state_dict())
    trainer = make_trainer([trick, ModelCheckpoint(tmp_path, filename="last")], num_sanity_val_steps=2)
    trainer.fit(module, loader, Loader(2, seed=1))
    assert_equal(trick.started, weights(expected))
    assert len(module.losses) == 15
    resumed = Outputs("batch", "group", groups=2, calibrate=1)
    other = Net()
    make_trainer([resumed], max_epochs=4).fit(other, Loader(), ckpt_path=tmp_path / "last.ckpt")
    assert_equal(resumed.started, weights(module))  # which is not fitted again


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_calibration_follows_the_model_to_its_precision(precision: str):
    trick = Outputs("batch", "layer", calibrate=3)
    torch.manual_seed(0)
    plain, module = Net(), Net()
    module.load_state_dict(plain.state_dict())
    make_trainer([trick], precision=precision, max_epochs=1).fit(module, Loader())
    lt.functional.swap_norm(plain, "batch", "layer", calibrate=[batch for _, batch in zip(range(3), Loader(), strict=False)])
    close = 0.03 if "bf16" in precision else 1e-4
    torch.testing.assert_close(trick.started["body.1.weight"].float(), plain.body[1].weight.detach(), rtol=close, atol=close)
    assert not torch.allclose(trick.started["body.1.weight"].float(), torch.ones(4), atol=close)


@pytest.mark.full
def test_a_trained_network_keeps_its_accuracy():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    layers = [each for c in (1, 16) for each in (nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for rows in torch.stack([torch.randperm(1200)[:64] for _ in range(100)]):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()

    def accuracy(swapped: nn.Module) -> float:
        return (swapped.eval()(x[1200:]).argmax(1) == y[1200:]).double().mean().item()

    calibrated, naive = copy.deepcopy(model.eval()), copy.deepcopy(model)
    lt.functional.swap_norm(calibrated, "batch", "group", groups=4, calibrate=x[:256].split(64))
    lt.functional.swap_norm(naive, "batch", "group", groups=4)
    for name, parameter in naive.named_parameters():
        parameter.data.copy_(model.state_dict()[name])
    assert accuracy(model) > 0.9
    assert accuracy(calibrated) > accuracy(model) - 0.03
    assert accuracy(naive) < accuracy(calibrated) - 0.03


def test_an_average_starts_from_calibrated_weights():
    for order in (1, -1):
        swapped, ema = Outputs("batch", "layer", calibrate=2), lt.EMA(decay=1.0)
        run = fit([swapped, ema][::order])
        averaged = ema.averaged_state_dict()
        assert torch.equal(averaged["body.1.weight"], swapped.started["body.1.weight"])
        assert not torch.equal(averaged["body.1.weight"], run.trained["body.1.weight"])


def test_two_processes_calibrate_over_the_data_of_both(tmp_path):
    launch(Path(__file__).with_name("norm_swap_worker.py"), tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first["started"], second["started"])
    assert_equal(first["ended"], second["ended"])
    torch.manual_seed(0)
    expected = Net()
    batches = [batch for rank in range(2) for batch, _ in zip(Loader(seed=rank, rank=3 * rank), range(2), strict=False)]
    lt.functional.swap_norm(expected, "batch", "group", groups=2, calibrate=batches)
    for name, value in weights(expected).items():
        torch.testing.assert_close(first["started"][name], value)


def test_calibration_under_a_strategy_that_shards_is_refused():
    class FSDPStrategy:
        """Bears the name by which strategies are told."""

    trainer = make_trainer([])
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(errors.UnsupportedStrategyError, match="calibration writes whole parameters; swap and calibrate with"):
        swap(calibrate=2).setup(trainer, Net(), "fit")


def test_reports_are_logged(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    fit([swap()], logger=logger, log_every_n_steps=1)
    assert "norm_swap/swapped" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_copies_of_a_swapped_module_train():
    run = fit([swap()])
    twin = copy.deepcopy(run.module)
    assert read_norm(twin.body[1]).kind == "group"
    before = weights(twin)
    make_trainer([swap()], max_epochs=1).fit(twin, Loader())
    assert not torch.equal(weights(twin)["body.1.weight"], before["body.1.weight"])
    assert_equal(weights(run.module), before)


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
def test_what_is_measured_before_training_does_not_depend_on_the_order_of_callbacks(order):
    def tricks():
        return [lt.InputStandardization(), swap(calibrate=2), lt.Initialization("lsuv", seed=1)]

    one, other = tricks(), tricks()
    first, second = fit(one, max_epochs=1), fit([other[i] for i in order], max_epochs=1)
    assert_equal(weights(second.module), weights(first.module))
    assert "on_run_start" not in vars(second.trainer.fit_loop)  # where a second fit would measure again
