"""Dropout in whole runs: rates over time, what comes back, compiled modules, several passes at prediction."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn.functional import dropout

import lightning_tricks as lt
from contracts.harness import Loader, Net, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors, schedules

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
RISING = schedules.Linear(0.0, final=0.6, stop=10)


class Attentive(Net):
    """The same with a rate that is handed to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_rate = 0.3

    def forward(self, x):
        return super().forward(dropout(x, self.drop_rate, self.training))


class Rates(Callback):
    """Notes the model's own rates in each batch, and what the trick has logged."""

    def __init__(self) -> None:
        self.own, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.own.append((pl_module.body[3].p, getattr(pl_module, "drop_rate", None)))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("dropout/")})


def test_rates_of_the_model_are_set_for_the_fit_and_come_back():
    rates = Rates()
    run = fit([lt.Dropout(0.4), rates], Attentive)
    assert set(rates.own) == {(0.4, 0.4)}
    assert (run.module.body[3].p, run.module.drop_rate) == (0.2, 0.3)
    assert "forward" not in vars(run.module.body[3])


def test_rates_that_are_those_of_the_model_change_nothing():
    plain, run = fit([Rates()]), fit([lt.Dropout(0.2)])
    assert run.losses == plain.losses
    assert_equal(weights(run.module), weights(plain.module))
    assert torch.equal(run.random_state, plain.random_state)


def test_a_rate_follows_its_schedule_step_by_step():
    rates = Rates()
    run = fit([lt.Dropout(RISING), rates], Attentive)
    expected = [RISING.value(step) for step in range(15)]
    assert [number for _, number in rates.own] == pytest.approx(expected)
    assert {own for own, _ in rates.own} == {0.2}  # another stands in for the layer
    assert (run.module.body[3].p, run.module.drop_rate) == (0.2, 0.3)


def test_logs_the_rate_and_the_share_that_was_dropped(tmp_path):
    rates, logger = Rates(), pl.loggers.CSVLogger(tmp_path)
    fit([lt.Dropout(RISING, after="Flatten"), rates], logger=logger, log_every_n_steps=1)
    assert [each["dropout/rate"] for each in rates.logged] == pytest.approx([RISING.value(step) for step in range(15)])
    for each in rates.logged:
        rate = each["dropout/rate"]
        assert abs(each["dropout/dropped"] - rate) <= 5 * (rate * (1 - rate) / (4 * 144)) ** 0.5 + 1e-4


@pytest.mark.parametrize(
    "trick", [lt.Dropout(RISING), lt.Dropout(RISING, after="Flatten", kind="channel"), lt.Dropout(0.4, kind="element")]
)
def test_resuming_equals_never_stopping_whatever_the_random_state(trick, tmp_path):
    def run(*callbacks, seed, **options):
        torch.manual_seed(0)
        module = Net()
        module.body[3].p = 0.0
        torch.manual_seed(seed)
        make_trainer(callbacks).fit(module, Loader(), **options)
        return module

    whole = run(trick, ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}"), seed=1)
    resumed = run(type(trick)(**trick.arguments), seed=99, ckpt_path=tmp_path / "step=8.ckpt")
    assert resumed.losses == whole.losses[8:]
    assert_equal(weights(resumed), weights(whole))


def test_what_the_model_has_is_back_after_an_exception():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            raise RuntimeError("stop")  # noqa: EM101

    for trick in (lt.Dropout(0.4), lt.Dropout(RISING), lt.Dropout(0.4, after="ReLU")):
        module = Attentive()
        with pytest.raises(RuntimeError, match="stop"):
            make_trainer([trick, Fails()]).fit(module, Loader())
        assert (module.body[3].p, module.drop_rate) == (0.2, 0.3)
        assert not any("forward" in vars(part) for part in module.modules())


@pytest.mark.full
def test_a_rate_that_varies_compiles_once_to_the_same_numbers():
    torch._dynamo.reset()
    frames = []

    class Count(Callback):
        def on_train_batch_end(self, *_):
            frames.append(torch._dynamo.utils.counters["frames"]["total"])

    def make():
        module = Net()
        module.compile(backend="aot_eager")
        return module

    eager, compiled = fit([lt.Dropout(RISING)], validate=False), fit([lt.Dropout(RISING), Count()], make, validate=False)
    for name, value in weights(compiled.module).items():
        torch.testing.assert_close(value, weights(eager.module)[name])
    assert len(frames) == 15
    assert 0 < frames[0] == frames[-1]


def test_numbers_that_vary_are_refused_in_compiled_models():
    module = Attentive()
    module.compile(backend="eager")
    with pytest.raises(errors.TrickError, match="changes 'drop_rate', rates that are handed to functions"):
        make_trainer([lt.Dropout(RISING)]).fit(module, Loader())
    assert module.losses == []


def test_two_callbacks_share_a_model_but_no_layer():
    first = lt.Dropout(0.5, after="ReLU", name="inserted")
    run = fit([first, lt.Dropout(0.3, name="own")])
    assert len(run.losses) == 15
    with pytest.raises(errors.TrickConflictError, match=r"both drop at 'body'\. Keep one"):
        fit([lt.Dropout(0.2, after="body"), lt.Dropout(0.4, after="body", name="other")])
    with pytest.raises(errors.TrickConflictError, match=r"both drop at 'body.3'\. Keep one, or `exclude` it"):
        fit([lt.Dropout(0.3, name="own"), lt.Dropout(RISING)])


def test_layers_that_nothing_goes_through_are_told():
    class Aside(Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Identity()

    with pytest.warns(UserWarning, match="drops at unused, and no training batch of the first epoch went through"):
        fit([lt.Dropout(0.5, after=["unused", "ReLU"])], Aside)


def test_layers_that_configure_model_builds_are_found():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.late = None

        def configure_model(self):
            self.late = self.late or nn.Sequential(nn.GELU())

        def forward(self, x):
            return self.late(super().forward(x))

    run = fit([lt.Dropout(0.5, after="GELU")], Late)
    assert len(run.losses) == 15
    assert "forward" not in vars(run.module.late[0])


# Several passes at prediction


class Predictor(Net):
    def forward(self, x):
        return {"logits": super().forward(x), "note": "kept"}

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0])["logits"].float(), batch[1])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])["logits"]


def predict(trick, module, **options):
    return torch.cat(make_trainer([trick]).predict(module, Loader(2), **options))


def test_predictions_are_means_of_passes_with_dropout_on():
    torch.manual_seed(0)
    module = Predictor()
    plain = predict(lt.Dropout(0.5), module)
    module.train()
    state, random_state = weights(module), torch.get_rng_state()
    few, again, many = (predict(lt.Dropout(0.5, samples=count), module) for count in (2, 2, 300))
    assert torch.equal(few, again)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_equal(weights(module), state)
    assert module.body[3].p == 0.2
    assert "forward" not in vars(module)
    module.eval()
    module.body[3].train()
    module.body[3].p = 0.5
    with torch.no_grad():
        passes = torch.stack([torch.cat([module(x)["logits"] for x, _ in Loader(2)]) for _ in range(300)])
    deviation = passes.std(0) / 300**0.5
    assert ((many - passes.mean(0)).abs() <= 5 * 2**0.5 * deviation).all()
    assert ((few - many).abs() > 5 * deviation).any()
    assert not torch.equal(few, plain)


def test_the_steps_of_a_test_see_the_mean_and_those_of_a_fit_do_not():
    torch.manual_seed(0)
    module = Predictor()
    trick = lt.Dropout(0.5, after="Flatten", samples=5)
    trainer = make_trainer([trick])
    plain = make_trainer().test(module, Loader(2), verbose=False)[0]["test_loss"]
    assert trainer.test(module, Loader(2), verbose=False)[0]["test_loss"] != plain
    assert trainer.validate(module, Loader(2), verbose=False)[0]["val_loss"] != plain
    assert make_trainer([lt.Dropout(0.5, after="Flatten")]).test(module, Loader(2), verbose=False)[0]["test_loss"] == plain
    trainer = make_trainer([trick], max_epochs=1)
    trainer.fit(module, Loader(), Loader(2))
    assert trainer.callback_metrics["val_loss"] == make_trainer().validate(module, Loader(2), verbose=False)[0]["val_loss"]


def test_a_schedule_samples_at_the_rate_that_training_has_reached(tmp_path):
    trick = lt.Dropout(RISING, after="Flatten", samples=3)
    run = fit([trick, ModelCheckpoint(tmp_path, filename="last")], Predictor)
    reached = RISING.value(14)
    expected = predict(lt.Dropout(reached, after="Flatten", samples=3), run.module)
    assert torch.equal(predict(trick, run.module), expected)
    fresh = lt.Dropout(RISING, after="Flatten", samples=3)
    with pytest.raises(errors.TrickError, match=r"has seen none\. Fit first, or give `ckpt_path`"):
        predict(fresh, run.module)
    assert torch.equal(predict(fresh, Predictor(), ckpt_path=tmp_path / "last.ckpt"), expected)


def test_all_callbacks_take_part_in_the_passes_of_one():
    torch.manual_seed(0)
    module = Predictor()
    sampler = lt.Dropout(0.5, samples=3, name="own")
    alone = predict(sampler, module)
    both = torch.cat(make_trainer([sampler, lt.Dropout(0.5, after="Flatten")]).predict(module, Loader(2)))
    assert not torch.equal(alone, both)
    assert not any("forward" in vars(part) for part in module.modules())
    with pytest.raises(errors.TrickConflictError, match="Pass `samples=None` to one"):
        make_trainer([sampler, lt.Dropout(0.5, after="Flatten", samples=2)]).predict(module, Loader(2))


def test_passes_that_cannot_be_averaged_or_never_happen_are_told():
    class Classes(Net):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    class Aside(Net):
        def predict_step(self, batch, batch_idx):
            return self.head(torch.zeros(4, 8))

    with pytest.raises(errors.TrickError, match=r"takes the mean of what `forward` of Classes gives, and torch\.int64 has none"):
        predict(lt.Dropout(0.5, samples=2), Classes())
    with pytest.warns(UserWarning, match="replaces what `forward` of Aside gives, and nothing called it"):
        predict(lt.Dropout(0.5, samples=2), Aside())
    with pytest.raises(errors.NothingMatchedError, match=r"Dropout\(rate=0\.0, samples=2\) needs dropout that acts"):
        predict(lt.Dropout(0.0, samples=2), Net())
