"""What tricks share that let single modules draw: surgery, copies, draws, compiling."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tricks import errors, functional
from lightning_tricks._core.draws import mix
from lightning_tricks._core.generators import bernoulli, normal
from lightning_tricks._core.surgery import stand_ins
from lightning_tricks.stochastic._drawing import Drawing

TRICKS = {
    "feature_noise": {"std": 0.3, "where": "1"},
    "drop_block": {"rate": 0.3, "block_size": 2, "where": "1"},
    "fractional_max_pool": {},
}
each = pytest.mark.parametrize("trick", TRICKS)


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)).double()


def apply(model: nn.Module, trick: str, **changes):
    return getattr(functional, f"apply_{trick}")(model, **{**TRICKS[trick], **changes})


def remove(model: nn.Module, trick: str) -> None:
    getattr(functional, f"remove_{trick}")(model)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@each
def test_keys_identity_classes_and_random_state_stay(trick):
    model = make()
    parameters, classes, keys = list(model.parameters()), [type(m) for m in model.modules()], list(model.state_dict())
    state = torch.get_rng_state()
    report = apply(model, trick)
    model(images()).sum().backward()
    model.eval()(images())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert report.names == ("2" if trick == "fractional_max_pool" else "1",)


@each
def test_each_pass_draws_anew_and_the_same_seed_draws_the_same(trick):
    model, twin, other = make(), make(), make()
    for each_model, seed in ((model, 0), (twin, 0), (other, 1)):
        apply(each_model, trick, seed=seed)
    outputs, twins, others = ([each_model(images()) for _ in range(8)] for each_model in (model, twin, other))
    assert all(torch.equal(one, two) for one, two in zip(outputs, twins, strict=True))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) > 1
    assert not all(torch.equal(one, two) for one, two in zip(outputs, others, strict=True))


@each
def test_twice_is_once_and_removing_restores(trick):
    model = make()
    plain = model(images())
    apply(model, trick)
    once = model(images())
    apply(model, trick)
    assert torch.equal(model(images()), once)
    assert len(model._forward_pre_hooks) == 1
    remove(model, trick)
    assert torch.equal(model(images()), plain)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model._forward_pre_hooks
    remove(model, trick)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
@each
def test_copies_draw_by_themselves(trick, twin_of):
    model = make()
    apply(model, trick)
    twin = twin_of(model)
    for _ in range(3):
        assert torch.equal(model(images()), twin(images()))
    assert all(any(held.module is module for module in twin.modules()) for held in stand_ins(twin, Drawing))
    remove(twin, trick)
    assert stand_ins(twin, Drawing) == []
    assert len(stand_ins(model, Drawing)) == 1


@each
def test_what_acts_on_one_module_can_be_removed_in_any_order(trick):
    model = make()
    plain = model(images())
    others = [name for name in TRICKS if name != "fractional_max_pool"]
    for name in others:
        apply(model, name, where="2")
    apply(model, trick, where="2")
    apply(model, "fractional_max_pool")
    for name in (trick, *(name for name in TRICKS if name != trick)):
        remove(model, name)
    assert torch.equal(model(images()), plain)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@each
def test_activation_checkpointing_draws_the_same_again(trick, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = make()
        apply(model, trick)
        clock = stand_ins(model, Drawing)[0].clock
        x = images().requires_grad_()
        clock.set(7)
        inner = nn.Sequential(*list(model)[:3])
        hidden = checkpoint(inner, x, use_reentrant=reentrant, preserve_rng_state=False) if checkpointed else inner(x)
        gradients.append(
            torch.autograd.grad(model[4](model[3](hidden)).square().sum(), x)[0] if not reentrant else backward(model, hidden, x)
        )
    assert torch.equal(*gradients)


def backward(model: nn.Module, hidden: Tensor, x: Tensor) -> Tensor:
    model[4](model[3](hidden)).square().sum().backward()
    return x.grad


@pytest.mark.full
@each
def test_compiles_whole_to_the_same_numbers_and_once_whatever_the_strength(trick):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make()
    apply(model, trick)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for strength in (0.3, 0.1, 0.2, 0.4):
        for held in (*stand_ins(model, Drawing), *stand_ins(twin, Drawing)):
            held.strength.fill_(strength)
        torch.testing.assert_close(compiled(images()), model(images()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@each
def test_wrong_arguments_of_the_functions_are_refused(trick):
    for changes in ({"exclude": [None]}, {"where": ""}, {"seed": -1}):
        with pytest.raises(errors.ArgumentError):
            apply(make(), trick, **changes)
    with pytest.raises(errors.NothingMatchedError, match=f"apply_{trick} found no"):
        apply(make(), trick, where="absent")


def test_draws_follow_from_the_key_alone_and_leave_torchs_generator():
    state = torch.get_rng_state()
    key, other, half = (torch.tensor(value) for value in (3, 4, 0.5))
    shape, device = [40, 50], torch.device("cpu")
    for draw in (lambda key: normal(key, half, shape, torch.float32, device), lambda key: bernoulli(key, half, shape, device)):
        assert torch.equal(draw(key), draw(key))
        assert not torch.equal(draw(key), draw(other))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.full
def test_draws_are_operators_that_torch_accepts():
    key, half, device = torch.tensor(3), torch.tensor(0.5), torch.device("cpu")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(normal, (key, half, [4, 5], torch.bfloat16, device), test_utils=checks)
    torch.library.opcheck(bernoulli, (key, half, [4, 5], device), test_utils=checks)


def test_draws_of_neighbouring_keys_are_those_of_their_distributions():
    draws = 2000
    keys = [mix(torch.tensor(key)) for key in range(draws)]
    device = torch.device("cpu")
    values = torch.stack([normal(key, torch.tensor(2.0), [8], torch.float64, device) for key in keys])
    assert (values.mean(0).abs() < 5 * 2 / draws**0.5).all()
    assert ((values.var(0) - 4).abs() < 5 * 4 * (2 / draws) ** 0.5).all()
    coins = torch.stack([bernoulli(key, torch.tensor(0.2), [8], device) for key in keys]).double()
    assert ((coins.mean(0) - 0.2).abs() < 5 * (0.16 / draws) ** 0.5).all()
