"""Recipes under a Trainer and from YAML."""

from __future__ import annotations

from inspect import isabstract

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from contracts.harness import Loader, Net, fit, make_trainer
from lightning_tricks import optim


class Built(Net):
    """Builds its optimizer by a recipe."""

    def __init__(self, recipe: optim.OptimizerRecipe | None = None) -> None:
        super().__init__()
        self.recipe = optim.SGD(0.05, momentum=0.9) if recipe is None else recipe

    def configure_optimizers(self):
        return self.recipe.build(self)


def test_a_module_with_a_recipe_trains_as_one_with_the_optimizer():
    class Bare(Net):
        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9, fused=True)

    ours, theirs = fit(model=Built), fit(model=Bare)
    assert len(ours.losses) == 15
    assert ours.losses == theirs.losses


class Quadratic(pl.LightningModule):
    """A smooth problem without noise."""

    def __init__(self, recipe: optim.OptimizerRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.layer = nn.Linear(4, 2)
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0].flatten(1)[:, :4]) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.recipe.build(self)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_evaluates_several_times_under_lightnings_closure(search):
    module = Quadratic(optim.LBFGS(lr=0.5, max_iter=6, line_search_fn=search))
    trainer = make_trainer(max_epochs=1, overfit_batches=1)
    trainer.fit(module, Loader(1, size=16))
    assert trainer.global_step == 1
    assert len(module.losses) > 3
    assert module.losses[-1] < 0.2 * module.losses[0]
    bare = Quadratic(optim.LBFGS())
    bare.configure_optimizers = lambda: torch.optim.LBFGS(bare.parameters(), lr=0.5, max_iter=6, line_search_fn=search)
    torch.manual_seed(0)
    bare.layer.load_state_dict(nn.Linear(4, 2).state_dict())
    ours = Quadratic(optim.LBFGS(lr=0.5, max_iter=6, line_search_fn=search))
    ours.layer.load_state_dict(bare.layer.state_dict())
    for each in (ours, bare):
        make_trainer(max_epochs=2).fit(each, Loader(1, size=16))
    assert ours.losses == bare.losses


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_muon_stops_and_resumes_to_the_bit(tmp_path):
    """From a checkpoint that has the recipe among its hyperparameters."""

    class Deep(Built):
        def __init__(self):
            super().__init__(recipe=optim.Muon(lr=0.01, adamw_lr=0.01, overrides={"head": {"lr": 0.02}}))
            self.save_hyperparameters({"recipe": self.recipe})

    whole = fit([ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="half")], Deep)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["recipe"] == whole.module.recipe
    resumed = fit([ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="half")], Deep, ckpt_path=tmp_path / "half.ckpt", seed=99)
    assert len(resumed.losses) == 7
    assert resumed.losses == whole.losses[8:]


def scaled(**options):
    """A Trainer of float16 with a gradient scaler."""
    precision = MixedPrecision(precision="16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    return make_trainer(plugins=[precision], max_epochs=1, gradient_clip_val=1.0, **options)


def test_with_a_gradient_scaler_kernels_are_not_fused_so_that_lightning_clips():
    module = Built(optim.AdamW())
    scaled().fit(module, Loader())
    assert module.optimizers().param_groups[0]["fused"] is None
    forced = Built(optim.AdamW(implementation="fused"))
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        scaled().fit(forced, Loader())
    plain = Built(optim.AdamW())
    make_trainer(max_epochs=1, gradient_clip_val=1.0).fit(plain, Loader())
    assert plain.optimizers().param_groups[0]["fused"] is True


class Keeper(Callback):
    """Takes a recipe as an argument."""

    def __init__(self, recipe: optim.OptimizerRecipe) -> None:
        self.recipe = recipe


CONFIG = """
model:
  recipe:
    class_path: lightning_tricks.optim.AdamW
    init_args:
      lr: 0.002
      betas: [0.9, 0.95]
      weight_decay: 0.05
      layer_decay: 0.75
      decayed: [matrix, embedding]
      overrides:
        head.*: {lr: 0.01, weight_decay: 0}
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: test_recipes_cli.Keeper
      init_args:
        recipe:
          class_path: lightning_tricks.optim.Named
          init_args: {name: "torch:adamax", lr: 1, options: {betas: [0.8, 0.9]}}
"""


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, called by Lightning
def test_recipes_round_trip_through_the_command_line(tmp_path, monkeypatch):
    import sys

    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setitem(sys.modules, "test_recipes_cli", sys.modules[__name__])
    monkeypatch.setattr(Keeper, "__module__", "test_recipes_cli")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    options = {"run": False, "save_config_callback": None, "seed_everything_default": False}
    cli = LightningCLI(Built, args=["--config", "config.yaml"], **options)
    overrides = {"head.*": {"lr": 0.01, "weight_decay": 0}}
    adamw = optim.AdamW(0.002, betas=(0.9, 0.95), weight_decay=0.05, layer_decay=0.75, decayed=("matrix", "embedding"), overrides=overrides)
    assert cli.model.recipe == adamw
    (keeper,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Keeper))
    assert keeper.recipe == optim.Named("torch:adamax", 1.0, options={"betas": (0.8, 0.9)})
    dumped = cli.parser.dump(cli.config, skip_none=False)
    (tmp_path / "dumped.yaml").write_text(dumped)
    again = LightningCLI(Built, args=["--config", "dumped.yaml"], **options)
    assert again.model.recipe == adamw


@pytest.mark.full
def test_hydra_instantiates_recipes_with_its_own_lists_and_maps():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    options = {"betas": [0.9, 0.95], "overrides": {"head.*": {"lr": 0.01, "betas": [0.5, 0.6]}}, "decayed": ["matrix"], "layer_decay": 0.5}
    made = instantiate(OmegaConf.create({"_target_": "lightning_tricks.optim.AdamW", **options, "layers": ["a", "*"]}))
    assert made == optim.AdamW(**options, layers=["a", "*"])
    assert repr(made) == repr(optim.AdamW(**options, layers=["a", "*"]))
    made = instantiate(
        OmegaConf.create({"_target_": "lightning_tricks.optim.Named", "name": "torch:adamax", "options": {"betas": [0.8, 0.9]}})
    )
    assert repr(made) == "Named(name='torch:adamax', options={'betas': (0.8, 0.9)})"
    made = instantiate(OmegaConf.create({"_target_": "lightning_tricks.optim.Adafactor", "eps": [None, 0.01]}))
    assert repr(made) == "Adafactor(eps=(None, 0.01))"


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in optim.__all__ if getattr(getattr(optim, name), "source", None) == "torch"])
def test_every_recipe_can_be_named_on_the_command_line(name):
    from jsonargparse import ArgumentParser

    kind = getattr(optim, name)
    if isabstract(kind) or kind is optim.GroupedRecipe:
        pytest.skip("a base")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=optim.OptimizerRecipe)
    arguments = [f"--recipe=lightning_tricks.optim.{name}", *(["--recipe.name=torch:adam"] if name == "Named" else []), "--recipe.lr=0.5"]
    config = parser.parse_args(arguments)
    made = (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(config)
    assert made.recipe == (kind("torch:adam", lr=0.5) if name == "Named" else kind(lr=0.5))
