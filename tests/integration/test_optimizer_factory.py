"""Whole fits under OptimizerFactory: rates at every step, resuming, and what shares the Trainer with it."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_tricks as lt
from contracts.harness import KeepRandomState, Loader, Net, assert_equal, make_trainer, weights
from contracts.harness import fit as fit_net
from lightning_tricks import errors, optim, schedules
from lightning_tricks.optimization import _optimizer_factory
from reference import schedules as reference

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
STEPS = 15  # of the harness: three epochs of five
SGD = optim.SGD(lr=0.1, momentum=0.9)


class Rates(Callback):
    """Notes the rates with which each optimizer step is taken, as late as can be."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.all: list[list[float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.all.append([group["lr"] for group in optimizer.param_groups])


class Small(pl.LightningModule):
    """Trains in no time, and configures nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        self.metrics = iter([1.0, 0.9, 0.95, 0.9, 0.95, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            self.log("metric", 0.0)
        elif batch_idx == 0:
            self.log("metric", next(self.metrics))


class Configured(Small):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.7)


def data(batches: int = 5) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(batches, 4, generator=torch.Generator().manual_seed(0))))


def fit(factory, module=None, *, callbacks=(), train=None, val=None, ckpt_path=None, **options):
    rates, module = Rates(), Configured() if module is None else module
    trainer = make_trainer([factory, rates, *callbacks] if factory is not None else [rates, *callbacks], **options)
    trainer.fit(module, data() if train is None else train, data(2) if val is None else val, ckpt_path=ckpt_path)
    return rates.rates, trainer, module


# Rates at every step of a whole fit


def torchs(optimizer, scheduler, steps=STEPS):
    rates = []
    for step in range(steps):
        if step:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR uses what torch advises against
                scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    return rates


def one_cycle(optimizer, steps):
    return lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=5 / steps, cycle_momentum=False)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (lambda w: schedules.Constant(warmup=w), lambda o, n: lr_scheduler.ConstantLR(o, 1.0)),
        (lambda w: schedules.Linear(warmup=w), lambda o, n: lr_scheduler.LinearLR(o, 1.0, 0.0, n)),
        (lambda w: schedules.Polynomial(power=2, warmup=w), lambda o, n: lr_scheduler.PolynomialLR(o, n, 2)),
        (lambda w: schedules.Cosine(warmup=w), lr_scheduler.CosineAnnealingLR),
        (lambda w: schedules.CosineRestarts(every=4, warmup=w), lambda o, n: lr_scheduler.CosineAnnealingWarmRestarts(o, 4)),
        (lambda w: schedules.Exponential(factor=0.9, every=1, warmup=w), lambda o, n: lr_scheduler.ExponentialLR(o, 0.9)),
        (lambda w: schedules.Step(every="1 epoch", warmup=w), lambda o, n: lr_scheduler.StepLR(o, 5)),
        (lambda w: schedules.Step(at=[w + 3, w + 9], warmup=w), lambda o, n: lr_scheduler.MultiStepLR(o, [3, 9])),
        (
            lambda w: schedules.OneCycle(rise=w + 5, warmup=w),
            lambda o, n: lr_scheduler.OneCycleLR(o, 0.1, n, pct_start=5 / n, cycle_momentum=False),
        ),
    ],
)
def test_every_step_of_a_fit_has_the_rate_of_torchs_scheduler(schedule, make, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = make(optimizer, STEPS - warmup)
    if warmup:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        first = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        scheduler = lr_scheduler.SequentialLR(optimizer, [first, make(optimizer, STEPS - warmup)], [warmup])
    rates, *_ = fit(lt.OptimizerFactory(SGD, schedule=schedule(warmup)))
    assert rates == pytest.approx(torchs(optimizer, scheduler), rel=1e-9)


def test_nothing_is_late_and_no_step_has_a_rate_of_zero():
    """The recipe that timm documents for Lightning is an epoch late, and can leave the rate at zero for the whole run."""
    rates, *_ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Step(factor=0.5, every="1 epoch")))
    assert rates == [0.1] * 5 + [0.05] * 5 + [0.025] * 5
    rates, *_ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Cosine(warmup="1 epoch")))
    assert rates[:5] == pytest.approx([0.1 * k / 6 for k in range(1, 6)])
    assert rates[5] == 0.1
    assert min(rates) > 0


def test_each_group_keeps_its_own_base_rate():
    module, rates = Configured(), Rates()
    recipe = optim.SGD(lr=0.1, weight_decay=0.01, overrides={"net.2": {"lr": 0.4}})
    trainer = make_trainer([lt.OptimizerFactory(recipe, schedule=schedules.Linear()), rates])
    trainer.fit(module, data())
    assert len(rates.all[0]) == 4
    for t, step in enumerate(rates.all):
        assert step == pytest.approx([group["initial_lr"] * (1 - t / STEPS) for group in trainer.optimizers[0].param_groups])
    assert {group["initial_lr"] for group in trainer.optimizers[0].param_groups} == {0.1, 0.4}


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_counts_optimizer_steps(accumulate):
    rates, trainer, _ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear(warmup=2)), accumulate_grad_batches=accumulate)
    total = trainer.global_step
    assert total == 3 * -(-5 // accumulate)
    assert rates == pytest.approx([0.1 * reference.warmed(lambda s: 1 - s / (total - 2), t, 2) for t in range(total)])


@pytest.mark.parametrize(("scheduling", "factors"), [({0: 4, 1: 2}, [4, 2, 2]), ({1: 5}, [1, 5, 5]), ({0: 3}, [3, 3, 3])])
def test_accumulation_that_changes_between_epochs(scheduling, factors):
    """Lightning estimates the length of the fit as if no gradients were accumulated."""
    changes = GradientAccumulationScheduler(dict(scheduling))
    total = sum(-(-5 // factor) for factor in factors)
    rates, trainer, _ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear()), callbacks=[changes])
    assert trainer.global_step == total
    assert sorted(set(rates), reverse=True) == pytest.approx([0.1 * (1 - t / total) for t in range(total)])
    in_epochs = lt.OptimizerFactory(SGD, schedule=schedules.Step(factor=0.5, every="1 epoch"))
    if len(set(factors)) > 1:
        with pytest.raises(errors.TrickError, match="needs epochs of equal numbers of steps"):
            fit(in_epochs, callbacks=[changes])
    else:
        assert fit(in_epochs, callbacks=[changes])[0] == [0.1] * 2 + [0.05] * 2 + [0.025] * 2


def test_limits_on_steps_are_the_length_of_the_fit():
    rates, *_ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear()), max_steps=4, max_epochs=-1)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.ones(1, 4)] * 5)


def test_a_stream_without_length_needs_max_steps():
    def stream():
        return DataLoader(Stream(), batch_size=None, collate_fn=lambda x: [x])

    factory = lt.OptimizerFactory(SGD, schedule=schedules.Cosine())
    with pytest.raises(errors.TrickError, match="`stop='100%'` needs to know how long training is"):
        fit(factory, train=stream(), max_epochs=2)
    assert len(fit(factory, train=stream(), max_epochs=-1, max_steps=4)[0]) == 4
    assert len(fit(lt.OptimizerFactory(SGD, schedule=schedules.Cosine(stop=8)), train=stream(), max_epochs=2)[0]) == 10


def test_the_training_data_are_not_loaded_before_lightning_loads_them():
    """Loading them where optimizers are built would lose the state of a stateful loader."""
    seen = []

    class Early(Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.append(trainer.train_dataloader)

    fit(lt.OptimizerFactory(SGD, schedule=schedules.Cosine(warmup="1 epoch")), callbacks=[Early()])
    assert seen == [None]


# Reduction on a plateau


def test_plateaus_are_judged_at_each_validation_as_torch_does():
    factory = lt.OptimizerFactory(SGD, schedule=schedules.ReduceOnPlateau("metric", factor=0.5, patience=1, threshold=0.0, warmup=3))
    rates, *_ = fit(factory, max_epochs=6, val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=1)
    metrics = [1.0, 0.9, 0.95, 0.9, 0.95, 0.5, 0.6, 0.6, 0.6, 0.6]
    factors = [1.0, *reference.reduce_on_plateau(metrics, 0.5, 1, 0)]
    assert rates == pytest.approx([0.1 * min(1, (t + 1) / 4) * factors[t // 3] for t in range(30)])
    assert len(set(factors)) == 4

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.0)
    torchs_rates = [0.1]
    for metric in metrics:
        scheduler.step(metric)
        torchs_rates.append(optimizer.param_groups[0]["lr"])
    assert rates[3:] == pytest.approx([torchs_rates[t // 3] for t in range(3, 30)])


@pytest.mark.parametrize("step", [5, 10, 12, 20])
def test_plateaus_resume_exactly(step, tmp_path):
    """Lightning's own way forgets the metric of the validation after which a checkpoint was written."""
    factory = lt.OptimizerFactory(SGD, schedule=schedules.ReduceOnPlateau("metric", factor=0.5, patience=0, threshold=0.0, warmup=7))
    at_validations = ModelCheckpoint(tmp_path, save_top_k=-1, filename="after-{step}")
    at_steps = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, *_ = fit(factory, callbacks=[at_validations, at_steps], max_epochs=6)
    assert len(set(whole)) > 7
    module = Configured()
    for _ in range(step // 5):
        next(module.metrics)
    path = tmp_path / f"{'after-' if step % 5 == 0 else ''}step={step}.ckpt"
    assert fit(copy.deepcopy(factory), module, ckpt_path=path, max_epochs=6)[0] == whole[step:]


def test_the_smallest_rate_is_a_share_of_each_base_rate():
    schedule = schedules.ReduceOnPlateau("metric", factor=0.1, patience=0, threshold=0.0, final=0.3)
    rates, *_ = fit(lt.OptimizerFactory(optim.SGD(lr=1e-8), schedule=schedule), max_epochs=6)
    assert min(rates) == pytest.approx(0.3e-8)


def test_a_missing_metric_or_validation_is_an_error():
    factory = lt.OptimizerFactory(SGD, schedule=schedules.ReduceOnPlateau("val_los"))
    with pytest.raises(errors.TrickError, match=r"needs the metric 'val_los' after each validation, and the module has logged .*'metric'"):
        fit(factory)
    with pytest.raises(errors.TrickError, match="follows 'val_los' from validation to validation, and this fit has none"):
        fit(factory, limit_val_batches=0)
    with pytest.raises(errors.TrickError, match="this fit has none"):
        make_trainer([factory]).fit(Configured(), data())


# What is taken over, and given back


@pytest.fixture
def said(monkeypatch):
    """Collect what is said on rank zero."""
    messages = []
    monkeypatch.setattr(_optimizer_factory, "rank_zero_info", messages.append)
    return messages


def test_the_modules_own_configuration_is_left_aside_and_comes_back(said):
    module = Configured()
    factory = lt.OptimizerFactory(optim.AdamW(lr=0.01))
    trainer = make_trainer([factory], max_epochs=1)
    trainer.fit(module, data())
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    trainer.validate(module, data(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert said == ["OptimizerFactory(recipe=AdamW(lr=0.01)) takes over `configure_optimizers` of Configured."]
    assert not {"configure_optimizers", "lr_scheduler_step"} & vars(module).keys()
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end", "on_validation_end"])
def test_an_exception_gives_the_modules_own_configuration_back(hook):
    class Fails(Callback):
        pass

    def fail(*_):
        raise RuntimeError("now")  # noqa: EM101

    setattr(Fails, hook, fail)
    module = Configured()
    with pytest.raises(RuntimeError, match="now"):
        fit(lt.OptimizerFactory(SGD, schedule=schedules.Cosine()), module, callbacks=[Fails()])
    assert not {"configure_optimizers", "lr_scheduler_step"} & vars(module).keys()


def test_a_module_that_steps_its_scheduler_its_own_way_does_not_stop_ours():
    """Modules written for timm pass the epoch on, which would set our schedule back to the first steps again and again."""

    class ForTimm(Configured):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.current_epoch)

    rates, *_ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear()), ForTimm())
    assert rates == pytest.approx([0.1 * (1 - t / STEPS) for t in range(STEPS)])


def test_modules_can_be_copied_and_pickled_during_a_fit():
    class Keeps(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]  # noqa: S301

    class Picklable(Configured):
        def __init__(self):
            super().__init__()
            del self.metrics

    keeps, module = Keeps(), _register(Picklable)()
    make_trainer([lt.OptimizerFactory(SGD, schedule=schedules.Cosine()), keeps], max_epochs=1).fit(module, data())
    for each in keeps.copies:
        assert_equal(weights(each), weights(module))


def _register(kind):
    """Let a local class be pickled."""
    kind.__qualname__ = kind.__name__
    globals()[kind.__name__] = kind
    return kind


def test_parameters_built_in_configure_model_are_trained():
    class Late(Configured):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.late(batch[0]).square().mean()

    _, trainer, module = fit(lt.OptimizerFactory(SGD, schedule=schedules.Cosine()), Late())
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}


def test_a_second_fit_goes_on_where_the_schedule_stands():
    factory, module, rates = lt.OptimizerFactory(SGD, schedule=schedules.Linear()), Configured(), Rates()
    trainer = make_trainer([factory, rates], max_epochs=1)
    trainer.fit(module, data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    assert rates.rates == pytest.approx([0.1 * (1 - t / 5) for t in range(5)] + [0.1 * (1 - t / 15) for t in range(5, 15)])


def test_another_fit_of_another_trainer_begins_anew():
    factory = lt.OptimizerFactory(SGD, schedule=schedules.Linear())
    assert fit(factory)[0] == fit(factory)[0]


def test_two_are_refused_whatever_their_names():
    one, other = lt.OptimizerFactory(SGD), lt.OptimizerFactory(optim.AdamW(), name="other")
    with pytest.raises(errors.TrickConflictError) as raised:
        fit(one, callbacks=[other])
    assert str(raised.value) == f"{one!r} and {other!r} both take over `configure_optimizers`. Keep one."


def test_lightning_refuses_a_module_that_configures_nothing():
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="No `configure_optimizers"):
        fit(lt.OptimizerFactory(SGD), Small())


@dataclass(frozen=True, repr=False)
class Rateless(optim.OptimizerRecipe):
    """An optimizer whose steps have no learning rate, as those of Polyak's rule have none."""

    def build(self, model):
        class Unit(torch.optim.Optimizer):
            def step(self, closure):
                loss = closure()
                with torch.no_grad():
                    for parameter in self.param_groups[0]["params"]:
                        parameter.sub_(parameter.grad.sign(), alpha=0.01)
                return loss

        return Unit([parameter for parameter in model.parameters() if parameter.requires_grad], {})

    def groups(self, model):
        return []


def test_an_optimizer_may_have_no_learning_rate_but_then_it_has_no_schedule(tmp_path):
    run = fit_net([lt.OptimizerFactory(Rateless())], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert "optimizer_factory/lr" not in run.trainer.logged_metrics
    assert run.trainer.global_step == STEPS
    with pytest.raises(errors.UnsupportedOptimizerError, match=r"`schedule` must be None for Rateless\(\).*got Cosine\(\)"):
        fit_net([lt.OptimizerFactory(Rateless(), schedule=schedules.Cosine())])


def test_flat_parameters_are_refused():
    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        kwargs = {"use_orig_params": False}  # noqa: RUF012

    with pytest.raises(errors.UnsupportedStrategyError, match="Pass `use_orig_params=True`"):
        fit(lt.OptimizerFactory(SGD), strategy=FSDPStrategy("cpu"))


# Attached to a module


def test_attached_recipes_train_modules_that_configure_nothing():
    module = Small()
    assert optim.SGD(lr=0.1).attach(module, schedule=schedules.Linear()) is module
    rates, trainer, _ = fit(None, module)
    assert rates == pytest.approx([0.1 * (1 - t / STEPS) for t in range(STEPS)])
    torch.manual_seed(0)
    attached = fit(None, SGD.attach(copy_of(Small)))[2]
    torch.manual_seed(0)
    listed = fit(lt.OptimizerFactory(SGD), copy_of(Configured))[2]
    assert_equal(weights(attached), weights(listed))
    trainer.validate(module, data(), verbose=False)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data())
    assert sum(isinstance(callback, lt.OptimizerFactory) for callback in trainer.callbacks) == 1


def copy_of(kind):
    torch.manual_seed(1)
    return kind()


def test_attached_plateaus_are_judged_too():
    module = SGD.attach(Small(), schedule=schedules.ReduceOnPlateau("metric", factor=0.5, patience=0, threshold=0.0))
    rates, *_ = fit(None, module, max_epochs=4)
    assert rates == pytest.approx([0.1] * 10 + [0.1] * 5 + [0.05] * 5)


def test_attaching_twice_is_refused():
    module = SGD.attach(Small())
    with pytest.raises(errors.TrickConflictError, match="has got a `configure_optimizers` of its own already"):
        optim.AdamW().attach(module)
    with pytest.raises(errors.TrickConflictError, match="both configure its optimizer"):
        fit(lt.OptimizerFactory(SGD), module)
    del module.configure_optimizers, module.configure_callbacks
    optim.AdamW().attach(module)
    assert isinstance(fit(None, module)[1].optimizers[0], torch.optim.AdamW)


def test_attached_modules_are_copied_and_keep_their_own_callbacks():
    monitor = LearningRateMonitor()

    class Brings(Small):
        def configure_callbacks(self):
            return monitor

    module = SGD.attach(Brings(), schedule=schedules.Cosine())
    del module.metrics
    twin = copy.deepcopy(module)
    _, trainer, _ = fit(None, twin, limit_val_batches=0, logger=DummyLogger())
    assert monitor in trainer.callbacks
    assert_differ_in_parameters(twin, module)


def assert_differ_in_parameters(one, other):
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_wrong_schedules_are_not_attached():
    module = Small()
    with pytest.raises(errors.ArgumentError, match="`schedule` must be a schedule"):
        SGD.attach(module, schedule=0.5)
    assert not {"configure_optimizers", "configure_callbacks"} & vars(module).keys()


# Manual optimization


class Manual(Small):
    def __init__(self, *, steps: bool = True) -> None:
        super().__init__()
        self.automatic_optimization, self.steps = False, steps
        self.rates: list[float] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.7)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        if self.steps:
            self.lr_schedulers().step()


def test_manual_optimization_steps_the_schedule_itself():
    module = fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear()), Manual())[2]
    assert module.rates == pytest.approx([0.1 * (1 - t / STEPS) for t in range(STEPS)])


def test_a_schedule_that_manual_optimization_never_steps_is_told():
    with pytest.warns(UserWarning, match="stood still: under manual optimization, Manual must step it"):
        fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear()), Manual(steps=False))


# Resuming


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    fit(lt.OptimizerFactory(SGD), callbacks=[ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    with pytest.raises(errors.CheckpointError, match=r"AdamW, and holds that of SGD. Resume with OptimizerFactory\(recipe=SGD\("):
        fit(lt.OptimizerFactory(optim.AdamW()), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("before", [None, schedules.Cosine(), schedules.ReduceOnPlateau("metric")], ids=str)
def test_another_schedule_goes_on_at_the_step_of_the_checkpoint(before, tmp_path):
    fit(lt.OptimizerFactory(SGD, schedule=before), callbacks=[ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    rates, *_ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear()), ckpt_path=tmp_path / "last.ckpt")
    assert rates == pytest.approx([0.1 * (1 - t / STEPS) for t in range(5, STEPS)])


def test_a_longer_fit_stretches_the_schedule(tmp_path):
    factory = lt.OptimizerFactory(SGD, schedule=schedules.Linear())
    fit(factory, callbacks=[ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    rates, *_ = fit(factory, ckpt_path=tmp_path / "last.ckpt", max_epochs=4)
    assert rates == pytest.approx([0.1 * (1 - t / 20) for t in range(5, 20)])


def test_a_checkpoint_made_without_it_gives_weights_and_progress(tmp_path, said):
    class Momentum(Small):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.3)
            return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.StepLR(optimizer, 1)}

    fit(None, Momentum(), callbacks=[ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    rates, trainer, _ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Linear()), ckpt_path=tmp_path / "last.ckpt")
    assert rates == pytest.approx([0.1 * (1 - t / STEPS) for t in range(5, STEPS)])
    assert trainer.optimizers[0].param_groups[0]["momentum"] == 0.9
    assert "made without OptimizerFactory" in said[-1]


# With others


def test_learning_rate_monitor_sees_the_rates(tmp_path):
    logger = CSVLogger(tmp_path)
    rates, *_ = fit(
        lt.OptimizerFactory(SGD, schedule=schedules.Cosine(warmup=3)),
        callbacks=[LearningRateMonitor()],
        logger=logger,
        log_every_n_steps=1,
    )
    rows = [line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()]
    table = {name: [float(row[i]) for row in rows[1:] if row[i]] for i, name in enumerate(rows[0])}
    assert table["lr-SGD"] == pytest.approx(rates)
    assert table["optimizer_factory/lr"] == pytest.approx(rates)


def test_ema_averages_what_the_recipe_trains():
    ema = lt.EMA(0.8)
    factory = lt.OptimizerFactory(SGD, schedule=schedules.Cosine(warmup=3))
    listed = [fit_net(callbacks) for callbacks in ([factory, ema], [copy.deepcopy(ema), copy.deepcopy(factory)])]
    assert_equal(weights(listed[0].module), weights(listed[1].module))
    assert_equal(ema.raw_state_dict(), fit_net([copy.deepcopy(factory)]).trained)
    assert ema._averages.tracks[0].updates == STEPS


@pytest.mark.skipif(pl.__version__.startswith("2.5."), reason="this Lightning restores the optimizer after the search, found rate and all")
def test_a_rate_that_was_found_is_the_base_rate(tmp_path):
    class Found(Configured):
        def __init__(self):
            super().__init__()
            self.lr = 0.7
            self.metrics = iter([1.0] * 100)

    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    rates, _, module = fit(
        lt.OptimizerFactory(SGD, schedule=schedules.Linear(warmup=2)), Found(), callbacks=[finder], default_root_dir=tmp_path
    )
    assert module.lr not in {0.7, 0.1}
    assert rates[-STEPS:] == pytest.approx([module.lr * reference.warmed(lambda s: 1 - s / 13, t, 2) for t in range(STEPS)])


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_lightnings_swa_may_replace_the_schedule():
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    rates, *_ = fit(lt.OptimizerFactory(SGD, schedule=schedules.Cosine()), callbacks=[swa])
    assert len(rates) == STEPS
    assert rates[0] == 0.1
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("recipe", [SGD, optim.AdamW(lr=0.01, weight_decay=0.1), optim.Adam(lr=0.01)], ids=repr)
def test_training_is_that_of_the_same_optimizer_built_by_hand(recipe):
    class ByHand(Net):
        def configure_optimizers(self):
            return recipe.build(self)

    assert_equal(fit_net([lt.OptimizerFactory(recipe)]).trained, fit_net([Callback()], ByHand).trained)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_killed_epoch_resumes_with_accumulation(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        module, rates = Net(), Rates()
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        factory = lt.OptimizerFactory(SGD, schedule=schedules.OneCycle())
        trainer = make_trainer([factory, KeepRandomState(), rates, keep], accumulate_grad_batches=2)
        trainer.fit(module, Loader(), Loader(2), **options)
        return weights(module), rates.rates

    final, rates = run()
    again, later = run(ckpt_path=tmp_path / "step=4.ckpt")
    assert_equal(final, again)
    assert later == rates[-len(later) :]
    assert len(set(rates)) == 9


@pytest.mark.full
def test_the_hydra_configuration_makes_the_callbacks():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    path = Path(__file__).parents[2] / "examples/configs/hydra_optimizer_factory.yaml"
    factory, ema = instantiate(OmegaConf.load(path).callbacks)
    assert factory.schedule == schedules.Step(factor=0.1, at=["50%", "75%"], warmup="5%")
    assert factory.recipe == optim.AdamW(lr=1e-3, weight_decay=0.05)
    assert len(fit(factory, callbacks=[ema])[0]) == STEPS
