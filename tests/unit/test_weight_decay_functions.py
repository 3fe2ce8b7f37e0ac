"""Decay as arithmetic, against a literal transcription and against torch's own optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tricks import errors
from lightning_tricks._core.weights import PIECE
from lightning_tricks.functional import decay_weights_
from lightning_tricks.optimization._decay import measure
from reference import weight_decay as reference

START = [0.7, -1.3, 0.0, 2.0]
RATES = [0.1 * 0.9**t for t in range(30)]


def gradient(theta: list[float], t: int) -> list[float]:
    """Pull element i towards i/2, by another force at each step."""
    return [(1 + t % 3) * (x - i / 2) for i, x in enumerate(theta)]


def descend(make, mode: str, decay: float) -> list[list[float]]:
    theta = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer, history = make([theta]), []
    for t, eta in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = eta
        theta.grad = torch.tensor(gradient(theta.tolist(), t), dtype=torch.float64)
        decay_weights_([theta], decay, mode=mode, lr=eta)
        optimizer.step()
        history.append(theta.tolist())
    return history


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
def test_decoupled_decay_before_adam_is_the_algorithm_of_the_paper(decay):
    expected = reference.adamw(START, gradient, RATES, [decay] * 30)
    torch.testing.assert_close(torch.tensor(descend(torch.optim.Adam, "decoupled", decay)), torch.tensor(expected))


@pytest.mark.parametrize("mode", ["decoupled", "l2", "l1"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_each_mode_before_sgd_is_its_formula(mode, momentum):
    expected = reference.sgd(START, gradient, RATES, [0.3] * 30, mode=mode, momentum=momentum)
    found = descend(lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=momentum), mode, 0.3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    plain = reference.sgd(START, gradient, RATES, [0.0] * 30, mode=mode, momentum=momentum)
    assert (torch.tensor(found) - torch.tensor(plain)).abs().max() > 0.01


def parameters_of_all_sorts() -> list[nn.Parameter]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, 4),
        torch.randn(5, dtype=torch.float64),
        torch.randn(2, 3).to(torch.bfloat16),
        torch.randn(4, 2).t(),
        torch.randn(()),
        torch.randn(2, dtype=torch.complex64),
        torch.randn(0, 3),
    ]
    parameters = [nn.Parameter(tensor) for tensor in tensors]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters[0].data[0, 0] = 0.0
    return parameters


@pytest.mark.parametrize("mode", ["decoupled", "l2", "l1"])
def test_dtypes_strides_and_complex_numbers(mode):
    parameters, twins = parameters_of_all_sorts(), parameters_of_all_sorts()
    decay_weights_(parameters, 0.25, mode=mode, lr=0.5)
    for parameter, twin in zip(parameters, twins, strict=True):
        weight, added = twin.detach(), {"decoupled": 0.0, "l2": twin.detach(), "l1": twin.detach().sgn()}[mode]
        assert torch.equal(parameter.detach(), weight * (1 - 0.5 * 0.25) if mode == "decoupled" else weight)
        torch.testing.assert_close(parameter.grad, twin.grad + 0.25 * added)


@pytest.mark.parametrize("mode", ["decoupled", "l2", "l1"])
def test_large_tensors_are_handled_whole(mode):
    weight = nn.Parameter(torch.randn(3, PIECE // 2 + 7))
    weight.grad = torch.zeros_like(weight)
    before = weight.detach().clone()
    decay_weights_([weight], 0.5, mode=mode, lr=0.5)
    expected = {"decoupled": 0.75 * before, "l2": 0.5 * before, "l1": 0.5 * before.sign()}[mode]
    assert torch.equal(weight.detach() if mode == "decoupled" else weight.grad, expected)


@pytest.mark.parametrize("mode", ["decoupled", "l2", "l1"])
def test_parameters_without_a_gradient_are_left_alone(mode):
    weight = nn.Parameter(torch.ones(2))
    decay_weights_([weight], 0.5, mode=mode, lr=0.5)
    assert weight.grad is None
    assert torch.equal(weight.detach(), torch.ones(2))


def test_sparse_gradients_shrink_every_weight_and_are_refused_otherwise():
    embedding = nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1])).sum().backward()
    decay_weights_([embedding.weight], 0.5, lr=0.5)
    assert torch.equal(embedding.weight.detach(), 0.75 * before)
    for mode in ("l2", "l1"):
        with pytest.raises(errors.TrickError, match=r"of shape \(4, 2\) is sparse. Use mode='decoupled'"):
            decay_weights_([embedding.weight], 0.5, mode=mode)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weight_decay": -1.0}, r"`weight_decay` must lie in \[0, ∞\), got -1.0"),
        ({"mode": "l3"}, "`mode` must be one of 'decoupled', 'l2', 'l1', got 'l3'"),
        ({"lr": -0.1}, r"`lr` must lie in \[0, ∞\), got -0.1"),
        ({"lr": None}, "`lr` must be the optimizer's learning rate with `mode='decoupled'`, got None"),
        ({"parameters": torch.ones(2)}, "`parameters` must be an iterable of floating-point tensors"),
    ],
)
def test_wrong_arguments(arguments, words):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(errors.ArgumentError, match=words):
        decay_weights_(**{"parameters": [weight], "weight_decay": 0.1, "lr": 0.1, **arguments})
    assert torch.equal(weight.detach(), torch.ones(2))


def test_a_learning_rate_may_be_a_tensor():
    from lightning_tricks.optimization._decay import shrink_

    weights = [torch.ones(2), torch.ones(2, dtype=torch.float64)]
    shrink_(weights, 1 - torch.tensor(0.5) * 0.5)
    assert [weight.tolist() for weight in weights] == [[0.75, 0.75], [0.75, 0.75]]


def test_terms_are_those_of_autograd():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, dtype=torch.complex64)), nn.Parameter(torch.zeros(3))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    penalties = {"decoupled": lambda w: 0.1 * w.abs().square().sum(), "l1": lambda w: 0.2 * w.abs().sum()}
    penalties["l2"] = penalties["decoupled"]
    for mode, penalty in penalties.items():
        total = sum(penalty(weight) for weight in weights)
        added = sum(slope.abs().square().sum() for slope in torch.autograd.grad(total, weights))
        gradient = sum(weight.grad.abs().square().sum() for weight in weights)
        found = measure(weights, 0.2, mode, scale=8.0)
        torch.testing.assert_close(torch.tensor(found), torch.stack([total, added, gradient / 64]).detach())
