"""Feature noise: formulas, where it acts, and a fit with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_tricks as lt
from contracts.harness import Net, fit
from lightning_tricks import errors, schedules
from lightning_tricks._core.generators import normal
from lightning_tricks._core.surgery import stand_ins
from lightning_tricks.functional import apply_feature_noise
from lightning_tricks.stochastic._drawing import Drawing
from reference import feature_noise as reference


def identity(std: float, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Identity())
    apply_feature_noise(model, std, where="0", **options)
    return model


def epsilon(model: nn.Module, like: Tensor) -> Tensor:
    """Return the noise of the latest pass for a deviation of one."""
    (held,) = stand_ins(model, Drawing)
    return normal(held.key(held.clock), torch.tensor(1.0), like.shape, like.dtype, like.device)


@pytest.mark.parametrize("at", ["output", "input"])
@pytest.mark.parametrize(("kind", "relative"), [("additive", False), ("multiplicative", False), ("additive", True)])
def test_equals_the_formula(kind, relative, at):
    model = identity(0.7, kind=kind, relative=relative, at=at)
    x = 3 + 2 * torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    formula = reference.relative if relative else getattr(reference, kind)
    y = model(x)
    torch.testing.assert_close(y, formula(x, epsilon(model, x), 0.7).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "variance"), [("additive", lambda x: 0.25), ("multiplicative", lambda x: 0.25 * x.square())])
def test_the_mean_is_the_plain_output_and_the_variance_is_that_of_the_noise(kind, variance):
    model, draws = identity(0.5, kind=kind), 4000
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
    outputs = torch.stack([model(x) for _ in range(draws)])
    expected = variance(x) * torch.ones_like(x)
    assert ((outputs.mean(0) - x).abs() <= 5 * (expected / draws).sqrt()).all()
    assert ((outputs.var(0) - expected).abs() <= 5 * expected * (2 / draws) ** 0.5).all()


def test_multiplicative_noise_has_the_variance_of_dropout():
    rate, draws = 0.2, 4000
    model = identity((rate / (1 - rate)) ** 0.5, kind="multiplicative")
    x = torch.full((4,), 3.0, dtype=torch.float64)
    expected = 9 * rate / (1 - rate)
    found = torch.stack([model(x) for _ in range(draws)]).var(0)
    assert ((found - expected).abs() < 5 * expected * (2 / draws) ** 0.5).all()


def test_gradients_are_those_of_the_formula_and_none_flows_through_the_deviation():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    model = identity(0.5, relative=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    model = identity(0.5, kind="multiplicative")
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient, 1 + 0.5 * epsilon(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_stays(dtype):
    x = torch.randn(64, 64).to(dtype)
    for options in ({}, {"kind": "multiplicative"}, {"relative": True}):
        y = identity(0.5, **options)(x)
        assert y.dtype == dtype
        assert abs((y - x).float().std() / 0.5 - 1) < 0.1


def test_evaluation_is_the_plain_network_and_frozen_parts_stay_undisturbed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_feature_noise(model, 0.5, where=["0", "1"])
    x = torch.randn(2, 4)
    plain = model.eval()(x)
    assert torch.equal(plain, nn.functional.linear(nn.functional.linear(x, model[0].weight, model[0].bias), model[1].weight, model[1].bias))
    model.train()[0].eval()
    assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert not torch.equal(model(x), plain)


def test_modules_are_disturbed_independently_of_each_other():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    apply_feature_noise(model, 1.0, where=["0", "1"])
    x = torch.zeros(1000)
    clock = stand_ins(model, Drawing)[0].clock
    first, second = (module(x) for module in model)
    assert abs((first * second).mean()) < 5 / 1000**0.5
    clock.tick()
    assert abs((first * model[0](x)).mean()) < 5 / 1000**0.5


def test_of_several_tensors_the_first_of_floats_is_disturbed():
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    output, (h, c) = model(x)
    apply_feature_noise(model, 0.5, where="0")
    disturbed, states = model(x)
    assert not torch.equal(disturbed, output)
    assert torch.equal(states[0], h)
    assert torch.equal(states[1], c)


def test_where_there_is_nothing_to_disturb_it_says_so():
    with pytest.raises(errors.TrickError, match=r"acts on tensors of floating-point numbers, and '0' takes none\. Exclude it\."):
        identity(0.5, at="input")(torch.tensor([1, 2]))
    with pytest.raises(errors.TrickError, match=r"a sample of '0' is one number: \(3, 1\)\. Exclude it, or pass `relative=False`\."):
        identity(0.5, relative=True)(torch.randn(3, 1))


def test_noise_follows_its_schedule_in_a_fit_and_zero_leaves_the_output_as_it_is():
    class Seen(Net):
        def __init__(self):
            super().__init__()
            self.same = []

        def training_step(self, batch, batch_idx):
            plain = nn.functional.conv2d(batch[0], self.body[0].weight, self.body[0].bias)
            self.same.append(torch.equal(self.body[0](batch[0]), plain))
            return super().training_step(batch, batch_idx)

    run = fit([lt.FeatureNoise(schedules.Linear(0.3, final=0.0, stop=5), where="body.0")], Seen, max_epochs=2)
    assert run.module.same == [False] * 5 + [True] * 5


def test_two_of_them_on_one_module_are_refused_and_on_two_they_are_not():
    first, second = (lt.FeatureNoise(0.1, where=where, name=name) for where, name in (("neck", "one"), ("neck", "two")))
    with pytest.raises(errors.TrickConflictError, match=r"both act on modules of Net, such as 'neck'\. Keep one\."):
        fit([first, second], max_epochs=1)
    assert len(fit([first, lt.FeatureNoise(0.1, where="head", name="two")], max_epochs=1).losses) == 5


def test_modules_that_are_never_called_are_no_silent_nothing():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2, 2)

    with pytest.raises(errors.TrickError, match=r"none of 'idle' was in a whole epoch\. Name modules that are called\."):
        fit([lt.FeatureNoise(0.1, where="idle")], Idle, max_epochs=1)
