"""GradientFlow in whole fits: what it records, when, and that it only watches."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_tricks as lt
from contracts.harness import Loader, Net, StepCheckpoints, fit, make_trainer
from lightning_tricks import errors
from lightning_tricks.diagnostics import _heat_map
from reference import diagnostics as reference

QUIET = {"heat_map": False, "vanishing": 0.0, "exploding": 1e9}
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Steps(Callback):
    """Notes weights before and after each step, and the gradients that the optimizer gets, by their names."""

    def __init__(self):
        self.before, self.after, self.gradients = [], [], []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.note(pl_module))
        self.latest = self.copy(pl_module)

    def copy(self, module):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def note(self, module):
        self.before.append(self.latest)
        self.latest = self.copy(module)
        self.after.append(self.latest)
        self.gradients.append({name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None})


def expected(steps: Steps, step: int, layer: str) -> tuple[float, float, float, float]:
    """Return norms of gradient, weight and update of a layer, and the ratio of the last two."""
    names = [name for name in steps.before[step] if name.rpartition(".")[0] == layer]
    before, after, gradients = steps.before[step], steps.after[step], steps.gradients[step]
    gradient = reference.norm([gradients[name] for name in names])
    weight, update = (reference.norm(tensors) for tensors in ([before[n] for n in names], [after[n] - before[n] for n in names]))
    return gradient, weight, update, update / weight


def assert_records(flow, steps: Steps, recorded: list[int], layers=("body.0", "body.1", "neck", "head", "tied")) -> None:
    assert flow.steps == recorded
    for layer in layers:
        for column, step in enumerate(recorded):
            row = [flow.table(quantity)[flow.layers.index(layer), column].item() for quantity in
                   ("grad_norm", "weight_norm", "update_norm", "update_ratio")]  # fmt: skip
            names = [name for name, _ in Net().named_parameters() if name.rpartition(".")[0] == layer]
            assert names
            assert row == pytest.approx(expected(steps, step - 1, layer), rel=2e-3, abs=1e-6), (layer, step)


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({}, [1, 4, 8, 12]),
        ({"accumulate_grad_batches": 2}, [1, 4, 8]),
        ({"gradient_clip_val": 0.1}, [1, 4, 8, 12]),
        ({"precision": "bf16-mixed"}, [1, 4, 8, 12]),
    ],
    ids=str,
)
def test_records_norms_of_the_steps_that_are_taken(options, recorded):
    steps = Steps()
    run = fit([lt.GradientFlow(every=4, **QUIET), steps], **options)
    assert run.trick.layers == ["body.0", "body.1", "body.2", "neck", "head", "tied"]
    assert_records(run.trick, steps, recorded)
    if "gradient_clip_val" in options:
        totals = run.trick.table("grad_norm").nan_to_num().norm(dim=0)
        torch.testing.assert_close(totals, torch.full((4,), 0.1), rtol=1e-4, atol=0)


class Overflows(Net):
    """Its loss overflows in the batches that it is told, so that a gradient scaler skips their steps."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if len(self.losses) in {1, 5} else loss


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused):
    class Scaled(Overflows):
        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, fused=fused)

    plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    run = fit([lt.GradientFlow(every=4, **QUIET)], Scaled, plugins=plugin)
    assert run.trick.steps == [1, 4, 8, 12]  # 13 of 15 were taken
    assert run.trick._taken == [13]
    totals = run.trick.table("grad_norm").nan_to_num().norm(dim=0)
    assert (totals < 30).all()  # unscaled


class Adversaries(pl.LightningModule):
    """Two optimizers by hand, one of which steps twice as often."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(64, 4), nn.Linear(4, 3)
        self.losses = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            loss = nn.functional.cross_entropy(self.two(torch.tanh(self.one(batch[0].flatten(1)))), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return [torch.optim.SGD(self.one.parameters(), lr=0.1), torch.optim.AdamW(self.two.parameters(), lr=0.1)]


def test_each_of_several_optimizers_counts_its_own_steps():
    flow = fit([lt.GradientFlow(every=2, **QUIET)], Adversaries).trick
    assert flow._taken == [15, 6]
    one, two = (~flow.table("grad_norm")[flow.layers.index(layer)].isnan() for layer in ("one", "two"))
    assert [step for step, there in zip(flow.steps, one, strict=True) if there] == [1, 2, 4, 6, 8, 10, 12, 14]
    assert two.sum() == 4  # its steps 1, 2, 4 and 6


def test_wrappers_and_closures_evaluated_several_times_are_measured_by_their_whole_step():
    recipe = lt.optim.SAM(lt.optim.Lookahead(lt.optim.SGD(lr=0.1), k=2), rho=0.1)
    steps = Steps()
    run = fit([lt.GradientFlow(every=5, **QUIET), lt.OptimizerFactory(recipe), steps])
    assert_records(run.trick, steps, [1, 5, 10, 15])

    clipped = fit([lt.GradientFlow(every=5, **QUIET), lt.OptimizerFactory(lt.optim.ClipNorm(lt.optim.SGD(lr=0.1), max_norm=0.1))]).trick
    torch.testing.assert_close(clipped.table("grad_norm").nan_to_num().norm(dim=0), torch.full((4,), 0.1), rtol=1e-4, atol=0)

    class Newton(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    again = fit([lt.GradientFlow(every=5, **QUIET)], Newton)
    assert again.trick.steps == [1, 5, 10, 15]


def test_layers_that_others_freeze_are_recorded_when_they_train_whoever_comes_first():
    tables = []
    for front in (True, False):
        flow, tuning = lt.GradientFlow(every=1, where=["body", "neck"], heat_map=False), lt.FineTuning({"0%": "head", "4 steps": "neck"})
        fit([flow, tuning] if front else [tuning, flow], max_epochs=2)
        assert flow.steps == [5, 6, 7, 8, 9, 10]  # before, nothing that is selected trains
        tables.append([flow.table(quantity) for quantity in ("grad_norm", "mean")])
        assert flow.layers == ["body.0", "body.1", "body.2", "neck"]
    for one, other in zip(*tables, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert tables[0][0].isnan().all(dim=1).tolist() == [True, True, True, False]
    assert not tables[0][1].isnan().any()


def test_a_parametrized_layer_is_one_layer_with_its_own_output():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.utils.parametrizations.weight_norm(self.head)

    flow = lt.GradientFlow(every=1, where="head", heat_map=False)
    run = fit([flow], Normed, max_epochs=1)
    assert flow.layers == ["head"]
    assert flow.table("mean").shape == (1, 5)
    assert not flow.table("mean").isnan().any()
    assert not run.module.head._forward_hooks


def test_hooks_are_there_for_recorded_steps_alone():
    seen = []

    class Look(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            seen.append(any(module._forward_hooks for module in pl_module.modules()))

    run = fit([lt.GradientFlow(every=5, **QUIET), Look()], validate=False)
    assert [index + 1 for index, hooked in enumerate(seen) if hooked] == [1, 5, 10, 15]
    assert not any(module._forward_hooks for module in run.module.modules())


def test_history_of_a_resumed_run_is_that_of_one_that_never_stopped(tmp_path):
    whole = fit([lt.GradientFlow(every=3, **QUIET), StepCheckpoints(tmp_path, 7)]).trick
    resumed = fit([lt.GradientFlow(every=3, **QUIET)], ckpt_path=tmp_path / "step=7.ckpt", seed=9).trick
    assert resumed.steps == whole.steps == [1, 3, 6, 9, 12, 15]
    for quantity in ("grad_norm", "update_ratio", "mean", "dead"):
        torch.testing.assert_close(resumed.table(quantity), whole.table(quantity), rtol=0, atol=0, equal_nan=True)


def test_what_is_logged_is_a_summary_or_every_layer(tmp_path):
    keys = {}
    for report in ("summary", "layers"):
        logger = CSVLogger(tmp_path, name=report)
        fit([lt.GradientFlow(every=5, report=report, **QUIET)], logger=logger, log_every_n_steps=5, max_epochs=1)
        with Path(logger.experiment.metrics_file_path).open() as file:
            rows = [row for row in csv.DictReader(file) if any(row[key] for key in row if "gradient_flow" in key)]
        assert [row["step"] for row in rows] == ["4"]  # of steps 1 and 5 the latter, when the Trainer logs
        keys[report] = {key.removeprefix("gradient_flow/") for key in rows[0] if "gradient_flow" in key}
    three = {f"{quantity}_{which}" for quantity in ("grad_norm", "update_ratio") for which in ("min", "median", "max")}
    assert keys["summary"] == {"grad_norm", "dead_max", *three}
    assert {"body.0/grad_norm", "neck/update_ratio", "body.2/dead", "head/std"} < keys["layers"]


class Broken(Net):
    """Makes a value that is no number in one of its layers, in its third batch."""

    def __init__(self, layer):
        super().__init__()
        self.get_submodule(layer).register_forward_hook(lambda module, args, output: output * self.factor)
        self.factor = 1.0

    def training_step(self, batch, batch_idx):
        self.factor = math.nan if batch_idx == 2 else 1.0
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("layer", ["body.1", "neck"])
def test_the_layer_that_makes_the_first_nan_is_named(layer):
    with pytest.warns(UserWarning, match="GradientFlow") as warned:
        fit([lt.GradientFlow(every=1, **QUIET)], lambda: Broken(layer), max_epochs=1, validate=False)
    texts = [str(warning.message) for warning in warned if "GradientFlow" in str(warning.message)]
    assert any(f"at step 3: the first layer in the forward pass whose output is not finite is '{layer}'" in text for text in texts)
    assert any("at step 3: the first layer in the backward pass whose gradient is not finite is 'head'" in text for text in texts)
    assert any("at step 4: weights of 'body.0' were not finite before this step" in text for text in texts)


def test_dead_rectifiers_are_warned_of_once():
    class Dead(Net):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.body[1].bias.fill_(-50)

    with pytest.warns(UserWarning, match=r"more than 50% of units are dead .* in 'body.2' \(100%\)") as warned:
        fit([lt.GradientFlow(every=2, **QUIET)], Dead)
    assert len([each for each in warned if "are dead" in str(each.message)]) == 1


class Pictures(CSVLogger):
    def log_image(self, key, images):
        self.pictures = key, images


@pytest.mark.full
@pytest.mark.parametrize("fails", [False, True])
def test_the_heat_map_is_written_when_the_fit_ends_in_whatever_way(fails, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if fails and trainer.global_step == 7:
                raise RuntimeError

    flow, logger = lt.GradientFlow(every=3, heat_map="update_ratio", name="slow"), Pictures(tmp_path)
    try:
        make_trainer([flow, Fails()], logger=logger).fit(Net(), Loader())
    except RuntimeError:
        assert fails
    path = tmp_path / "lightning_logs" / "version_0" / "gradient_flow_slow.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert logger.pictures == ("gradient_flow_slow/update_ratio_heat_map", [str(path)])
    assert flow.steps == ([1, 3, 6] if fails else [1, 3, 6, 9, 12, 15])


@pytest.mark.full
def test_a_quantity_that_no_layer_has_is_not_drawn_and_one_without_a_logarithm_is(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("lightning_tricks.diagnostics._gradient_flow.rank_zero_info", told.append)
    fit([lt.GradientFlow(heat_map="saturated")], default_root_dir=tmp_path, max_epochs=1)
    assert told == ["GradientFlow(heat_map='saturated') has nothing to draw: no layer has a 'saturated'."]
    assert not list(tmp_path.rglob("*.png"))
    _heat_map.draw_heat_map(torch.tensor([[0.0, math.inf]]), ["layer"], [1, 2], "grad_norm", tmp_path / "zeros.png")
    assert (tmp_path / "zeros.png").read_bytes().startswith(b"\x89PNG")


class Deep(Net):
    """Has twelve layers of sigmoids behind its features, through which no gradient comes."""

    def __init__(self):
        super().__init__()
        layers = [layer for _ in range(12) for layer in (nn.Linear(3, 3), nn.Sigmoid())]
        self.head = nn.Sequential(nn.Linear(8, 3), *layers, nn.Linear(3, 3))


def test_gradients_that_vanish_in_a_deep_network_of_sigmoids_are_warned_of():
    with pytest.warns(UserWarning, match=r"at step 2: gradients vanish in 'body.0', .* more layers: root mean square below 1e-05 of that"):
        flow = fit([lt.GradientFlow(every=2, heat_map=False)], Deep).trick
    strengths = flow.table("grad_norm")[[flow.layers.index(f"head.{index}") for index in (1, 11, 23, 25)], 1]
    assert (strengths.diff() > 0).all()


def test_a_missing_matplotlib_is_named_before_training(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name="matplotlib")

    monkeypatch.setattr("lightning_tricks._core.extras.import_module", missing)
    assert _heat_map.require.__module__ == "lightning_tricks._core.extras"
    module = Net()
    with pytest.raises(errors.MissingPackageError, match=r"`heat_map=False` leaves out\. It needs matplotlib, which is not installed"):
        make_trainer([lt.GradientFlow()]).fit(module, Loader())
    assert module.losses == []


@pytest.mark.full
def test_compiled_modules_are_measured_but_for_their_activations():
    torch._dynamo.reset()

    def make():
        module = Net()
        module.body.compile(backend="aot_eager")
        return module

    flow = fit([lt.GradientFlow(every=4, **QUIET)], make).trick
    assert flow.steps == [1, 4, 8, 12]
    measured = {layer for layer, row in zip(flow.layers, flow.table("std"), strict=True) if not row.isnan().any()}
    assert measured == {"neck", "head", "tied"}
    assert not flow.table("grad_norm")[flow.layers.index("body.0")].isnan().any()
    torch._dynamo.reset()


def test_deepspeed_is_refused_with_the_reason():
    trick = lt.GradientFlow(heat_map=False)
    strategy = type("DeepSpeedStrategy", (), {})()
    with pytest.raises(errors.UnsupportedStrategyError, match="cannot work under DeepSpeedStrategy: the engine keeps its own copies"):
        trick.setup(SimpleNamespace(strategy=strategy, callbacks=[trick]), Net(), "fit")
