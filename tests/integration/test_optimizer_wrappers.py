"""Wrapping optimizers in whole runs: what the Trainer's closure, loggers, checkpoints and precision make of them."""

from __future__ import annotations

import copy
import csv
import dataclasses
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, assert_differ, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors, optim
from reference import wrappers as reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*`train_dataloader` does not have many workers"),
]
SGD = optim.SGD(lr=0.05, momentum=0.9)
RECIPES = {
    "SAM": optim.SAM(SGD, rho=0.1),
    "ASAM": optim.SAM(SGD, rho=0.5, adaptive=True),
    "Lookahead": optim.Lookahead(SGD, k=3),
    "ClipNorm": optim.ClipNorm(SGD, max_norm=0.1),
    "ClipValue": optim.ClipValue(SGD, max_value=0.01),
    "AdaptiveGradientClipping": optim.AdaptiveGradientClipping(SGD, max_ratio=0.05, exclude="head"),
    "GradientCentralization": optim.GradientCentralization(SGD),
    "GradientNoise": optim.GradientNoise(SGD, eta=0.001),
    "nested": optim.ClipNorm(optim.SAM(optim.Lookahead(optim.GradientCentralization(optim.AdamW(lr=0.01)), k=2))),
    "ScheduleFree": optim.ScheduleFree(SGD),
    "ScheduleFree-AdamW": optim.ScheduleFree(optim.AdamW(lr=0.01)),
    "SAM-ScheduleFree": optim.SAM(optim.ScheduleFree(SGD)),
}
each = pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=pytest.mark.full if "Free" in name else (), id=name) for name, recipe in RECIPES.items()]
)
SCHEDULE_FREE = pytest.mark.parametrize("recipe", [recipe for name, recipe in RECIPES.items() if "Free" in name], ids=repr)


def factory(recipe):
    return lt.OptimizerFactory(recipe)


# Every wrapper


@each
def test_changes_training_and_resumes_to_the_bit(recipe, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([factory(recipe), keep])
    plain = fit([factory(SGD)])
    assert whole.losses[0] == plain.losses[0]
    assert whole.losses != plain.losses
    for step in (4, 10):
        resumed = fit([factory(recipe)], ckpt_path=tmp_path / f"step={step}.ckpt", seed=99)
        evaluations = 2 if "SAM" in repr(recipe) else 1
        assert resumed.losses == whole.losses[step * evaluations :]
        assert_equal(resumed.trained, whole.trained)
        assert_equal(weights(resumed.module), weights(whole.module))
        assert torch.equal(resumed.random_state, whole.random_state)


@each
def test_ema_counts_steps_and_averages_weights_between_them(recipe):
    ema, recorder = lt.EMA(0.5, evaluate=False, buffers="keep"), Recorder()
    run = fit([factory(recipe), ema, recorder])
    assert [track.updates for track in ema._averages.tracks] == [15]
    average = recorder.history[0]["head.weight"].double()
    for state in recorder.history[1:]:
        average = 0.5 * average + 0.5 * state["head.weight"].double()
    torch.testing.assert_close(ema.averaged_state_dict()["head.weight"].double(), average, atol=1e-6, rtol=1e-5)
    assert len(run.losses) == (30 if "SAM" in repr(recipe) else 15)


@pytest.mark.parametrize(
    "recipe", [recipe for name, recipe in RECIPES.items() if name in {"Lookahead", "ClipNorm", "GradientCentralization"}]
)
def test_acts_once_on_accumulated_gradients(recipe):
    """A run over pairs of batches equals one that is given both batches' mean gradient by hand."""
    run = fit([factory(recipe)], model=partial(without_randomness, Net), accumulate_grad_batches=2, validate=False)
    torch.manual_seed(0)
    module = without_randomness(Net)
    torch.manual_seed(1)
    optimizer = recipe.build(module)
    loader = Loader()
    for _ in range(3):
        for i, batch in enumerate(loader):
            if i % 2 == 0:
                optimizer.zero_grad()
            (module.loss(batch) / 2).backward()
            if i % 2 == 1 or i == 4:
                optimizer.step()
    assert_equal(weights(run.module), weights(module))


def without_randomness(make):
    module = make()
    module.body[3].p = 0.0
    return module


@each
def test_under_a_gradient_scaler_it_works_or_says_why_not(recipe):
    module = Net()
    trainer = make_trainer(
        [factory(recipe)], plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))], gradient_clip_val=1.0
    )
    if "SAM" in repr(recipe):
        with pytest.raises(errors.UnsupportedOptimizerError, match="take `precision='bf16-mixed'` instead of '16-mixed'"):
            trainer.fit(module, Loader())
        return
    trainer.fit(module, Loader())
    assert trainer.global_step == 15
    assert len(module.losses) == 15


@each
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_runs_in_other_precisions(recipe, precision):
    run = fit([factory(recipe)], precision=precision)
    assert all(torch.isfinite(value).all() for value in weights(run.module).values())
    assert_differ({"w": run.trained["head.weight"]}, {"w": Net().to(run.trained["head.weight"].dtype).state_dict()["head.weight"]})


@each
@pytest.mark.full
def test_compiles_to_the_same_numbers_without_recompiling(recipe):
    torch._dynamo.reset()
    frames = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            frames.append(torch._dynamo.utils.counters["frames"]["total"])

    def make():
        module = without_randomness(Net)
        module.compile(backend="aot_eager")
        return module

    eager, compiled = fit([factory(recipe)], partial(without_randomness, Net)), fit([factory(recipe), Count()], make)
    for name, value in weights(compiled.module).items():
        torch.testing.assert_close(value, weights(eager.module)[name])
    assert 0 < frames[0] == frames[-1]


@each
def test_manual_optimization_gives_the_same_numbers_or_asks_for_a_closure(recipe):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    if "SAM" in repr(recipe):
        with pytest.raises(errors.UnsupportedOptimizerError, match=r"In manual optimization, call `optimizer.step\(closure\)`"):
            fit([factory(recipe)], Manual)
    else:
        assert_equal(fit([factory(recipe)], Manual).trained, fit([factory(recipe)]).trained)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_hide_the_parameters_are_refused_when_the_optimizer_is_built(strategy):
    class FSDPStrategy:
        """Stands for Lightning's, by its name."""

    module = Net()
    module._trainer = type(
        "Trainer", (), {"strategy": type("DeepSpeedStrategy", (), {})() if strategy == "deepspeed" else FSDPStrategy()}
    )()
    with pytest.raises(errors.UnsupportedStrategyError, match=r"SAM\(SGD\(.*cannot work under"):
        RECIPES["SAM"].build(module)


class WithClosure(Net):
    """Optimizes by itself, with a closure."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.log("loss", loss.detach(), on_step=False, on_epoch=True)
            self.manual_backward(loss)
            self.losses.append(loss.item())
            return loss

        optimizer.step(closure)


def test_sam_takes_the_closure_of_manual_optimization():
    recipe = optim.SAM(SGD, rho=0.1)
    run, automatic = fit([factory(recipe)], WithClosure), fit([factory(recipe)])
    assert run.losses == automatic.losses
    assert_equal(run.trained, automatic.trained)
    assert run.trainer.callback_metrics["loss"] == pytest.approx(sum(run.losses[20::2]) / 5)


@each
@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, called by Lightning
def test_is_configured_from_yaml_and_back(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    from lightning.pytorch.cli import LightningCLI

    callback = {"class_path": "lightning_tricks.OptimizerFactory", "init_args": {"recipe": as_yaml(recipe)}}
    trainer = {"callbacks": [callback], "logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    options = {"run": False, "save_config_callback": None, "seed_everything_default": False}
    cli = LightningCLI(Net, args={"trainer": trainer}, **options)
    (tmp_path / "config.yaml").write_text(cli.parser.dump(cli.config))
    again = LightningCLI(Net, args=["--config", str(tmp_path / "config.yaml")], **options)
    for each_cli in (cli, again):
        made = next(callback for callback in each_cli.trainer.callbacks if isinstance(callback, lt.OptimizerFactory))
        assert made.recipe == recipe


def as_yaml(recipe):
    """Write a recipe as LightningCLI reads it."""
    values = {each.name: getattr(recipe, each.name) for each in dataclasses.fields(recipe)}
    init = {name: as_yaml(value) if isinstance(value, optim.OptimizerRecipe) else value for name, value in values.items()}
    return {"class_path": f"lightning_tricks.optim.{type(recipe).__name__}", "init_args": init}


# SAM


class Logging(Net):
    """Logs everything that a second evaluation could count twice."""

    def __init__(self):
        super().__init__()
        self.mean, self.batches = MeanMetric(), 0
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        self.log("step", loss, on_step=True, on_epoch=True)
        self.log("total", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        return {"loss": loss, "first": self.losses[-1]}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append((outputs["loss"].item(), outputs["first"], self.mean._update_count))

    def configure_optimizers(self):
        return optim.SAM(SGD, rho=0.5).build(self)


class OfAPart(Logging):
    def configure_optimizers(self):
        return optim.ClipNorm(optim.SAM(SGD, rho=0.5), max_norm=100.0).build(self.body)


@pytest.mark.parametrize("make", [Logging, OfAPart])
def test_each_batch_is_logged_and_counted_once(make, tmp_path):
    logger = CSVLogger(tmp_path)
    run = fit([Callback()], make, logger=logger, log_every_n_steps=1, max_epochs=2, validate=False)
    first = run.losses[::2]
    assert len(run.losses) == 20
    assert all(a != b for a, b in zip(first, run.losses[1::2], strict=True))
    with Path(logger.experiment.metrics_file_path).open() as file:
        assert [float(row["step_step"]) for row in csv.DictReader(file) if row["step_step"]] == pytest.approx(first)
    metrics = run.trainer.callback_metrics
    assert metrics["total"] == 5
    assert metrics["step_epoch"] == pytest.approx(sum(first[5:]) / 5)
    assert metrics["metric"] == pytest.approx(sum(first[5:]) / 5)
    assert [loss for loss, *_ in run.module.seen] == first
    assert [value for _, value, _ in run.module.seen] == first
    assert [count for *_, count in run.module.seen] == [1, 2, 3, 4, 5] * 2
    progress = run.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
    assert progress.zero_grad.total.completed == progress.step.total.completed == run.trainer.global_step == 10
    assert run.module.body[1].num_batches_tracked == 10


def test_with_rho_zero_it_is_nothing(tmp_path):
    run, plain = fit([factory(optim.SAM(SGD, rho=0.0))], Logging), fit([factory(SGD)], Logging)
    assert run.losses[::2] == run.losses[1::2] == plain.losses
    assert_equal(weights(run.module), weights(plain.module))
    assert torch.equal(run.random_state, plain.random_state)
    assert run.trainer.callback_metrics == plain.trainer.callback_metrics


def test_it_climbs_with_the_gradient_of_the_present_batch():
    """With one call of the closure per batch, as in Lightning's own way, it would climb with that of the batch before."""

    class Small(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def training_step(self, batch, batch_idx):
            return loss_of(self.layer.weight, self.layer.bias, batch)

    def loss_of(weight, bias, batch):
        return (torch.sin(batch @ weight.T + bias)).square().mean()

    batches = list(torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0)).double())
    remaining = iter([batch for batch in batches for _ in range(2)])

    def gradient(point):
        weight, bias = (each.clone().requires_grad_() for each in point)
        loss_of(weight, bias, next(remaining)).backward()
        return [weight.grad, bias.grad]

    torch.manual_seed(0)
    module = Small()
    start = [module.layer.weight.detach().clone(), module.layer.bias.detach().clone()]
    module = optim.SAM(optim.SGD(lr=0.1), rho=0.5).attach(module)
    make_trainer(max_epochs=1).fit(module, DataLoader(batches, batch_size=None))
    wanted = reference.sam(start, gradient, lr=0.1, rho=0.5, steps=6)
    torch.testing.assert_close([module.layer.weight.detach(), module.layer.bias.detach()], wanted)


def test_accumulating_batches_is_refused():
    with pytest.raises(errors.UnsupportedOptimizerError, match="`accumulate_grad_batches` > 1"):
        fit([factory(RECIPES["SAM"])], accumulate_grad_batches=2)


def test_an_exception_in_the_second_evaluation_leaves_weights_buffers_and_results_as_they_were():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if len(self.losses) == 4:
                raise KeyboardInterrupt
            return loss

    def make():
        modules.append(Fails())
        return modules[-1]

    modules, recorder = [], Recorder()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit([factory(optim.SAM(SGD, rho=0.5)), recorder], make, validate=False)
    after = weights(modules[0])
    for name, value in recorder.history[-1].items():
        assert torch.equal(after[name], value) == ("running" not in name and "tracked" not in name)
    assert after["body.1.num_batches_tracked"] == 2


# Schedule-free


def by_hand(recipe_kind, steps, **options):
    """Train with the package's optimizer, and return what training and evaluation see after each step."""
    torch.manual_seed(0)
    module = without_randomness(Net)
    optimizer = recipe_kind([p for p in module.parameters() if p.requires_grad], **options)
    optimizer.train()
    loader, y, x = Loader(), [], []
    for _ in range(steps // 5):
        for batch in loader:
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            y.append({name: p.detach().clone() for name, p in module.named_parameters()})
            twin = copy.deepcopy(optimizer)
            twin.eval()
            x.append([p.detach() for group in twin.param_groups for p in group["params"]])
    return y, x


@pytest.mark.full
def test_training_sees_y_and_evaluation_x_as_the_package_says(tmp_path):
    from schedulefree import SGDScheduleFree

    y, x = by_hand(SGDScheduleFree, 15, lr=0.05, momentum=0.9)
    recorder = Recorder()
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    run = fit([factory(RECIPES["ScheduleFree"]), recorder, keep], partial(without_randomness, Net), max_epochs=3)
    for got, wanted in zip(recorder.history[1:], y, strict=True):
        assert_equal({name: got[name] for name in wanted}, wanted)
    for epoch in range(3):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        for state in (run.module.evaluated[epoch], saved):
            trainable = [state[name] for name, p in run.module.named_parameters() if p.requires_grad]
            for got, wanted in zip(trainable, x[5 * epoch + 4], strict=True):
                torch.testing.assert_close(got, wanted)
                assert not torch.equal(got, y[5 * epoch + 4]["head.weight"])


@pytest.mark.full
@SCHEDULE_FREE
def test_every_kind_of_evaluation_and_checkpoint_has_the_average(recipe, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    light = ModelCheckpoint(tmp_path / "light", every_n_train_steps=5, save_weights_only=True, filename="{step}", save_top_k=-1)
    run = fit([factory(recipe), keep, light])
    final = weights(run.module)
    assert_differ(final, run.trained)
    assert_equal(final, run.module.evaluated[-1])
    for path in (tmp_path / "step=15.ckpt", tmp_path / "light" / "step=15.ckpt"):
        assert_equal(torch.load(path, weights_only=True)["state_dict"], final)
    light_state = torch.load(tmp_path / "light" / "step=10.ckpt", weights_only=True)["state_dict"]
    assert_equal(light_state, torch.load(tmp_path / "step=10.ckpt", weights_only=True)["state_dict"])
    run.trainer.test(run.module, Loader(2), verbose=False)
    assert_equal(run.module.evaluated[-1], final)
    run.trainer.predict(run.module, Loader(2))
    assert_equal(run.module.evaluated[-1], final)
    run.trainer.validate(run.module, Loader(2), ckpt_path=tmp_path / "step=10.ckpt", verbose=False)
    assert_equal(run.module.evaluated[-1], light_state)
    assert_equal(weights(run.module), light_state)
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_equal(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], light_state)


@pytest.mark.full
@SCHEDULE_FREE
def test_a_checkpoint_written_after_the_fit_goes_on_from_y(recipe, tmp_path):
    run = fit([factory(recipe)], max_epochs=2)
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    recorder = Recorder()
    resumed = fit([factory(recipe), recorder], ckpt_path=tmp_path / "end.ckpt", seed=99)
    assert_equal(recorder.history[0], run.trained)
    assert resumed.trainer.global_step == 15


@pytest.mark.full
@SCHEDULE_FREE
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_validation_leaves_y_and_checkpoints_written_then_have_x(recipe, error, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.trained = weights(pl_module)

        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.evaluated = weights(pl_module)
                trainer.save_checkpoint(tmp_path / "then.ckpt")
                raise error

    fails, module = Fails(), Net()
    with pytest.raises((error, SystemExit)):
        make_trainer([factory(recipe), fails]).fit(module, Loader(), Loader(2))
    assert_equal(weights(module), fails.trained)
    assert_equal(torch.load(tmp_path / "then.ckpt", weights_only=True)["state_dict"], fails.evaluated)
    assert_differ(fails.trained, fails.evaluated)


@pytest.mark.full
@SCHEDULE_FREE
@pytest.mark.parametrize("load", ["by the Trainer", "by hand"])
def test_weights_loaded_after_an_exception_are_evaluated_as_they_are(recipe, load, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                raise RuntimeError

    module, keep = Net(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = make_trainer([factory(recipe), keep, Fails()])
    with pytest.raises(RuntimeError):
        trainer.fit(module, Loader(), Loader(2))
    trained = weights(module)
    for _ in range(2):
        trainer.test(module, Loader(2), verbose=False)
        assert_differ(module.evaluated[-1], trained)  # but the average
        assert_equal(weights(module), trained)
    path = tmp_path / "epoch=0.ckpt"
    stored = torch.load(path, weights_only=True)["state_dict"]
    if load == "by hand":
        module.load_state_dict(stored)
    for _ in range(2):
        trainer.test(module, Loader(2), ckpt_path=path if load == "by the Trainer" else None, verbose=False)
        assert_equal(module.evaluated[-1], stored)
        assert_equal(weights(module), stored)


@pytest.mark.full
def test_only_one_replaces_the_weights_used_for_evaluation():
    with pytest.raises(errors.TrickConflictError, match=r"OptimizerFactory\(recipe=ScheduleFree.*EMA.*both replace the weights"):
        fit([factory(RECIPES["ScheduleFree"]), lt.EMA()])


@pytest.mark.full
def test_nobody_would_switch_if_the_module_built_it_itself():
    class Own(Net):
        def configure_optimizers(self):
            return RECIPES["ScheduleFree"].build(self)

    with pytest.raises(errors.TrickError, match=r"Pass it to the Trainer as `callbacks=\[OptimizerFactory"):
        fit([Callback()], Own)


@pytest.mark.full
def test_attached_recipes_switch_too():
    torch.manual_seed(0)
    module = RECIPES["ScheduleFree"].attach(type("Bare", (Net,), {"configure_optimizers": pl.LightningModule.configure_optimizers})())
    recorder = Recorder()
    torch.manual_seed(1)
    make_trainer([recorder]).fit(module, Loader(), Loader(2))
    assert_equal(module.evaluated[-1], weights(module))
    assert_differ(weights(module), recorder.history[-1])


@pytest.mark.full
def test_statistics_can_be_measured_for_the_average():
    run = fit([lt.BatchNormRefresh(on="validation"), factory(RECIPES["ScheduleFree"])])
    assert_differ({"m": run.module.body[1].running_mean}, {"m": fit([factory(RECIPES["ScheduleFree"])]).module.body[1].running_mean})
