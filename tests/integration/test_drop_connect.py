"""DropConnect with a Trainer: evaluation that draws, several callbacks, varying rates, resuming, what the log says."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_tricks as lt
from contracts.harness import Loader, Net, StepCheckpoints, assert_differ, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors, schedules

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Words(Net):
    """Has an embedding tied to its output, a recurrent layer and attention."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.embedding = nn.Embedding(5, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.output = nn.Linear(8, 5, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        words = (x.flatten(2)[:, 0, :6] * 2).long().clamp(-2, 2) + 2
        states = self.rnn(self.embedding(words))[0]
        mixed = self.attention(states, states, states)[0].mean(1)
        return super().forward(x) + self.output(mixed)[:, :3]


@pytest.mark.parametrize("granularity", ["batch", "example"])
def test_every_kind_of_layer_trains_and_resumes_exactly(granularity, tmp_path):
    def trick():
        return lt.DropConnect(schedules.Linear(0.5, final=0.1), granularity=granularity, mask_bias=True, inference="sample")

    whole = fit([trick(), StepCheckpoints(tmp_path, 5)], Words)
    resumed = fit([trick()], Words, ckpt_path=tmp_path / "step=5.ckpt", seed=9)
    assert resumed.losses == whole.losses[5:]
    assert_equal(weights(resumed.module), weights(whole.module))
    assert all("forward" not in vars(module) for module in whole.module.modules())
    assert_differ(weights(whole.module), weights(fit([lt.DropConnect(0.0)], Words).module))


@pytest.mark.parametrize("inference", ["gaussian", "sample"])
def test_evaluation_draws_without_touching_training(inference):
    mean = fit([lt.DropConnect(0.5)])
    other = fit([lt.DropConnect(0.5, inference=inference)])
    assert_equal(other.trained, mean.trained)
    assert torch.equal(other.random_state, mean.random_state)
    plain = make_trainer([]).predict(mean.module, Loader(2))
    drawn = [make_trainer([lt.DropConnect(0.5, inference=inference)]).predict(mean.module, Loader(2)) for _ in range(2)]
    again = make_trainer([]).predict(mean.module, Loader(2))
    if inference == "sample":
        assert not torch.equal(drawn[0][0], plain[0])
    for one, two, before, after in zip(*drawn, plain, again, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(before, after)


def test_sampling_draws_anew_in_each_forward_pass_of_a_prediction():
    class Several(Net):
        def predict_step(self, batch, batch_idx):
            return torch.stack([self(batch[0]) for _ in range(3)])

    torch.manual_seed(0)
    draws = make_trainer([lt.DropConnect(0.5, inference="sample")]).predict(Several(), Loader(2))[0]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_gaussian_evaluation_acts_where_a_module_is_the_activation_and_the_log_says_where_not(caplog):
    class Body(Net):
        def __init__(self, lr: float = 0.05) -> None:
            super().__init__(lr)
            self.body[1] = nn.Identity()

    torch.manual_seed(0)
    module = Body()
    plain = make_trainer([]).predict(module, Loader(2))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        drawn = make_trainer([lt.DropConnect(0.5, inference="gaussian", kinds=["Conv2d"])]).predict(module, Loader(2))
    assert not torch.equal(plain[0], drawn[0])
    assert "with all weights" not in caplog.text
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        make_trainer([lt.DropConnect(0.5, inference="gaussian")]).predict(module, Loader(2))
    assert "evaluated neck, head, tied, frozen with all weights: no module for an activation takes the output." in caplog.text


def test_a_rate_that_varies_has_no_value_outside_a_fit():
    trick = lt.DropConnect(schedules.Linear(0.1, final=0.5), inference="sample")
    with pytest.raises(errors.TrickError, match=r"its rate varies over a fit: outside of one it has no value\. Evaluate with"):
        make_trainer([trick]).validate(Net(), Loader(2), verbose=False)
    make_trainer([lt.DropConnect(schedules.Linear(0.1, final=0.5))]).validate(Net(), Loader(2), verbose=False)


def test_two_callbacks_mask_different_layers():
    one, two = lt.DropConnect(0.5, where="neck"), lt.DropConnect(0.1, exclude=["neck", "tied"], name="rest")
    assert len(fit([one, two]).losses) == 15
    two = lt.DropConnect(0.1, name="rest")
    with pytest.raises(errors.TrickConflictError, match=r"both drop weights of 'neck'\. Keep one, or let them select different layers"):
        fit([one, two])


def test_the_share_dropped_is_logged(tmp_path):
    class Metrics(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    metrics = Metrics()
    fit(
        [lt.DropConnect(schedules.Linear(0.5, final=0.1), where="neck"), metrics],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        max_epochs=1,
    )
    rates = [each["drop_connect/rate"] for each in metrics.seen]
    assert rates == pytest.approx([0.5, 0.42, 0.34, 0.26, 0.18])
    for each, rate in zip(metrics.seen, rates, strict=True):
        assert abs(each["drop_connect/dropped"] - rate) < 5 * (rate / 1152) ** 0.5


def test_layers_built_in_configure_model_are_found():
    class Late(Net):
        def __init__(self, lr: float = 0.05) -> None:
            super().__init__(lr)
            self.made = nn.ModuleDict()

        def configure_model(self):
            if not self.made:
                self.made["late"] = nn.Linear(3, 3)

        def forward(self, x):
            return self.made["late"](super().forward(x))

    for trick in (lt.DropConnect(0.5, where="late"), lt.DropConnect(0.5, where="late", inference="sample")):
        assert len(fit([trick], Late).losses) == 15
        make_trainer([trick]).validate(Late(), Loader(2), verbose=False)
    with pytest.raises(errors.NothingMatchedError):
        fit([lt.DropConnect(0.5, where="later")], Late)
