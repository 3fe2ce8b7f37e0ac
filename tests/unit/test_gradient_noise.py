"""Gradient noise: its variance over steps, and where it comes from; the tests of all wrappers run over it, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tricks import errors, optim
from lightning_tricks.optimization._gradient_noise import noise_deviation
from reference import diagnostics as reference

SGD = optim.SGD(lr=1.0)


def noises(recipe, steps, model=None):
    """Return what each step adds to weights whose own gradient is zero."""
    model = nn.Linear(200, 100) if model is None else model
    optimizer, added = recipe.build(model), []
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        added.append(torch.cat([(old - new.detach()).flatten() for old, new in zip(before, model.parameters(), strict=True)]))
    return added


def test_noise_is_normal_with_the_papers_variance():
    for t, noise in enumerate(noises(optim.GradientNoise(SGD, eta=0.3, gamma=0.55), 6)):
        deviation = reference.gradient_noise_deviation(0.3, 0.55, t)
        assert noise_deviation(0.3, 0.55, t) == pytest.approx(deviation)
        assert noise.std().item() == pytest.approx(deviation, rel=0.03)
        assert abs(noise.mean().item()) < 0.03 * deviation
        assert (noise.abs() < deviation).float().mean().item() == pytest.approx(0.6827, abs=0.02)


def test_noise_follows_from_seed_step_and_place_alone():
    first = noises(optim.GradientNoise(SGD, seed=3), 2)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    model = nn.Linear(200, 100)
    again = noises(optim.GradientNoise(SGD, seed=3), 2, model)
    assert not torch.equal(state, torch.get_rng_state())  # which drew the layer
    state = torch.get_rng_state()
    other = noises(optim.GradientNoise(SGD, seed=4), 2, model)
    assert torch.equal(state, torch.get_rng_state())
    for left, right, third in zip(first, again, other, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
        assert (left - third).std() > 0.05
    assert (first[0] - first[1]).std() > 0.05
    weight, bias = first[0][:20_000], first[0][20_000:]
    assert not torch.allclose(weight[:100], bias, atol=1e-3)


def test_without_a_seed_it_is_that_of_the_process(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    torch.testing.assert_close(noises(optim.GradientNoise(SGD), 1)[0], noises(optim.GradientNoise(SGD, seed=3), 1)[0], atol=1e-6, rtol=0)


def test_a_saved_optimizer_goes_on_with_its_seed_and_step():
    model = nn.Linear(20, 10)
    optimizer = optim.GradientNoise(SGD, seed=3).build(model)
    other = optim.GradientNoise(SGD, seed=4).build(model)
    whole = noises(optim.GradientNoise(SGD, seed=3), 4, nn.Linear(20, 10))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = model.weight.detach().clone()
    other.step()
    torch.testing.assert_close((before - model.weight.detach()).flatten(), whole[2][:200], atol=1e-6, rtol=0)


def test_no_variance_is_no_noise():
    assert not noises(optim.GradientNoise(SGD, eta=0.0), 1)[0].any()


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = optim.GradientNoise(SGD).build(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(
        errors.UnsupportedOptimizerError, match=r"the gradient of a parameter of shape \(5, 2\) is sparse. Pass `sparse=False`"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.GradientNoise(SGD, eta=-1.0), "`eta` must lie in [0, ∞), got -1.0."),
        (lambda: optim.GradientNoise(SGD, gamma=-0.5), "`gamma` must lie in [0, ∞), got -0.5."),
        (lambda: optim.GradientNoise(SGD, seed=-1), "`seed` must be a whole number of at least 0, got -1."),
        (
            lambda: optim.GradientNoise(optim.ClipNorm(optim.GradientNoise(SGD))),
            "GradientNoise cannot wrap GradientNoise: both would count",
        ),
    ],
    ids=["eta", "gamma", "seed", "twice"],
)
def test_wrong_arguments_are_refused(make, words):
    with pytest.raises(errors.ArgumentError) as raised:
        make()
    assert words in str(raised.value)
