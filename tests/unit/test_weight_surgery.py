"""Weight standardization and weight normalization of existing layers: formulas, keys, what is left, undoing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_tricks import errors
from lightning_tricks.functional import (
    apply_weight_normalization,
    apply_weight_standardization,
    remove_weight_normalization,
    remove_weight_standardization,
)
from reference import normalization as reference

PAIRS = [(apply_weight_standardization, remove_weight_standardization), (apply_weight_normalization, remove_weight_normalization)]
both = pytest.mark.parametrize(("apply", "remove"), PAIRS, ids=["standardization", "normalization"])


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, (3, 1), groups=2, stride=2, padding=1, padding_mode="circular", bias=False), nn.GroupNorm(2, 8)),
        nn.Flatten(),
        nn.Linear(96, 5),
    ).double()


def effective(apply, weight):
    return reference.standardized(weight, 1e-5) if apply is apply_weight_standardization else reference.normalized(weight, 1.0)


@both
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
        (nn.Conv2d(4, 6, (1, 3), stride=2), (2, 4, 5, 7)),
        (nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 4, 3)),
        (nn.Linear(4, 6, bias=False), (2, 3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_compute_with_the_formula_and_train_through_it(apply, remove, layer, shape):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    layer.reset_parameters()
    plain, weight = copy.deepcopy(layer), layer.weight
    apply(layer, where="*")
    assert layer.weight is weight
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(effective(apply, weight))
    torch.testing.assert_close(layer(x), plain(x))
    cotangent = torch.randn_like(plain.weight)
    (gradient,) = torch.autograd.grad(layer.effective_weight(), weight, cotangent)
    (expected,) = torch.autograd.grad(effective(apply, weight), weight, cotangent)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0
    cosines = nn.functional.cosine_similarity(gradient.flatten(1), weight.flatten(1))
    assert cosines.abs().max() < 1e-3  # at right angles, but for ε


@both
def test_keys_parameters_and_classes_stay_and_removing_restores(apply, remove):
    model = make()
    parameters, keys, classes = list(model.parameters()), list(model.state_dict()), [type(module) for module in model.modules()]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before, state = model(x), [vars(module).keys() for module in model.modules()]
    assert apply(model).changed == ("0", "2.0")
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    assert apply(model).changed == ("0", "2.0")
    assert torch.equal(model(x), after)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    remove(model)
    assert torch.equal(model(x), before)
    assert [type(module) for module in model.modules()] == classes
    assert [vars(module).keys() for module in model.modules()] == state
    remove(model)


@both
def test_the_function_can_be_kept_in_the_weights(apply, remove):
    model, plain = make(), make()
    apply(model, where="*")
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    function = model(x)
    remove(model, keep="function")
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), function)


@both
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_compute_alike(apply, remove, twin_of):
    model = make()
    apply(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(twin_of(model)(x), model(x))


@both
def test_low_precision_is_computed_in_float32(apply, remove):
    model = make().to(torch.bfloat16)
    apply(model)
    weight = model[0].effective_weight()
    assert weight.dtype == torch.bfloat16
    expected = effective(apply, model[0].weight.double())
    assert (weight.double() - expected).abs().max() <= expected.abs().max() / 256


def test_options_and_selection():
    model = make()
    assert apply_weight_normalization(model, 2.0, where=["2", "4"], exclude="*.1").changed == ("2.0", "4")
    assert torch.allclose(model[4].effective_weight().norm(dim=1), torch.tensor(2.0).double())
    apply_weight_normalization(model, 3.0, where="4")
    assert torch.allclose(model[4].effective_weight().norm(dim=1), torch.tensor(3.0).double())
    assert torch.allclose(model[2][0].effective_weight().flatten(1).norm(dim=1), torch.tensor(2.0).double())
    report = apply_weight_standardization(model)
    assert report.changed == ("0",)
    assert report.left == {"2.0": "of the class NormalizedConv2d, which computes in a way of its own"}


def test_what_cannot_is_left_with_the_reason():
    class Own(nn.Conv2d):
        pass

    model = nn.ModuleDict({
        "plain": nn.Conv2d(4, 4, 3, groups=4),
        "single": nn.Conv2d(4, 4, 1, groups=4),
        "own": Own(4, 4, 3),
        "transposed": nn.ConvTranspose2d(4, 4, 3),
    })  # fmt: skip
    report = apply_weight_standardization(model)
    assert report.changed == ("plain",)
    assert report.left == {
        "single": "each of its outputs has a single weight",
        "own": "of the class Own, which computes in a way of its own",
        "transposed": "of the class ConvTranspose2d, which computes in a way of its own",
    }


def test_shared_layers_stay_shared():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(shared, shared)
    assert apply_weight_normalization(model).changed == ("0",)
    assert model[0] is model[1] is shared


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.ReLU(), {}, "ReLU has none."),
        (nn.Linear(2, 2), {}, "Linear has none that is a module. Name linear layers by `where`"),
        (make(), {"where": "body"}, "`where='body'` matched none of Sequential's 3. Their names look like '0'"),
        (make(), {"exclude": ["0", "2"]}, r"`exclude=('0', '2')` removed all 2"),
        (nn.Sequential(nn.ConvTranspose1d(2, 2, 2)), {}, "all 1 are left ('0': of the class ConvTranspose1d"),
    ],
    ids=str,
)
@both
def test_nothing_matched_says_why(apply, remove, model, options, words):
    with pytest.raises(errors.NothingMatchedError) as raised:
        apply(copy.deepcopy(model), **options)
    assert words in str(raised.value)


def test_wrong_arguments():
    with pytest.raises(errors.ArgumentError, match=r"`eps` must lie in \(0, ∞\), got 0"):
        apply_weight_standardization(make(), eps=0)
    with pytest.raises(errors.ArgumentError, match=r"`gain` must lie in \(0, ∞\), got -1"):
        apply_weight_normalization(make(), -1)
    with pytest.raises(errors.ArgumentError, match="`where` must be a glob"):
        apply_weight_normalization(make(), where=[])
    with pytest.raises(errors.ArgumentError, match="`keep` must be one of 'weights', 'function', got 'both'"):
        remove_weight_standardization(make(), keep="both")


@pytest.mark.full
@both
def test_compiles_whole_to_the_same_numbers(apply, remove):
    torch._dynamo.reset()
    model = make()
    apply(model, where="*")
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
