"""Normalization layers against slow references: values, gradients, statistics, memory formats, precision, copies, compilation."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_tricks import errors
from lightning_tricks.functional import refresh_batch_norm
from lightning_tricks.nn import (
    FilterResponseNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    LayerNorm2d,
    LpBatchNorm1d,
    LpBatchNorm2d,
    LpBatchNorm3d,
    RMSNorm2d,
    ScaledWSConv2d,
)
from reference import normalization as reference
from reference.batch_norm import batch_normalized

GHOSTS = {2: GhostBatchNorm1d, 3: GhostBatchNorm1d, 4: GhostBatchNorm2d, 5: GhostBatchNorm3d}
LPS = {2: LpBatchNorm1d, 3: LpBatchNorm1d, 4: LpBatchNorm2d, 5: LpBatchNorm3d}
LAYERS = {
    "ghost": partial(GhostBatchNorm2d, 4, 3),
    "layer": partial(LayerNorm2d, 4),
    "rms": partial(RMSNorm2d, 4),
    "response": partial(FilterResponseNorm, 4, learnable_eps=True),
    "l1": partial(LpBatchNorm2d, 4),
    "l3": partial(LpBatchNorm2d, 4, 3),
    "scaled": partial(ScaledWSConv2d, 4, 4, 3, padding=1, gamma="relu"),
}


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.double()


def random_input(*shape, last=False):
    x = torch.randn(*shape, dtype=torch.float64) * 3 + 5
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.requires_grad_()


def assert_equal_with_gradients(module, x, expected):
    y = module(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    cotangent, inputs = torch.randn_like(y), [x, *module.parameters()]
    for one, other in zip(torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


# Ghost batch normalization


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(12, 3), (13, 3), (12, 3, 5), (14, 3, 1), (13, 3, 4, 2), (7, 3, 2, 3, 2), (3, 3, 2, 2)], ids=str)
def test_each_ghost_batch_is_normalized_by_itself_whatever_the_remainder(shape, last):
    norm = randomized(GHOSTS[len(shape)](3, 4))
    x = random_input(*shape, last=last)
    sizes = reference.ghost_sizes(shape[0], 4)
    assert_equal_with_gradients(norm, x, reference.ghost_batch_norm(x, sizes, norm.weight, norm.bias, norm.eps))
    assert norm(x).stride() == x.stride()
    norm.reset_running_stats()
    norm(x)
    mean, variance = reference.ghost_statistics(x, sizes)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(("last", "length"), [(False, 2), (True, 2), (False, 1)])
def test_ghost_batches_can_be_differentiated_twice(last, length):
    norm = randomized(GhostBatchNorm1d(2, 3))
    x = random_input(7, 2, length, last=last)

    def function(x, weight, bias):
        return functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, norm.weight, norm.bias))
    assert torch.autograd.gradgradcheck(function, (x, norm.weight, norm.bias))


def test_a_batch_of_one_ghost_batch_is_plain_batch_normalization_to_the_bit():
    ghost, plain = GhostBatchNorm2d(3, 8, momentum=0.3), nn.BatchNorm2d(3, momentum=0.3)
    for size in (8, 5, 1):
        x = torch.randn(size, 3, 4, 4)
        assert torch.equal(ghost(x), plain(x))
    assert list(ghost.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(ghost.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("size", [1, 3, 8, 13])
def test_evaluation_is_that_of_plain_batch_normalization_for_any_size(size):
    ghost = GhostBatchNorm2d(3, 4)
    ghost(torch.randn(10, 3, 2, 2) + 2)
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(ghost.state_dict())
    x = torch.randn(size, 3, 2, 2)
    assert torch.equal(ghost.eval()(x), plain.eval()(x))
    assert ghost.num_batches_tracked == 1


def test_one_batch_keeps_as_much_of_the_statistics_as_plain_batch_normalization():
    norm = GhostBatchNorm1d(1, 4)
    norm.running_mean.fill_(1.0)
    norm(torch.randn(64, 1) * 1e-6)
    assert norm.running_mean.item() == pytest.approx(0.9, abs=1e-5)


def test_without_momentum_statistics_are_means_over_batches():
    norm = GhostBatchNorm1d(2, 3, momentum=None).double()
    batches = [random_input(size, 2) for size in (6, 7)]
    statistics = []
    for batch in batches:
        norm(batch)
        statistics.append(reference.ghost_statistics(batch, reference.ghost_sizes(len(batch), 3)))
    torch.testing.assert_close(norm.running_mean, torch.stack([mean for mean, _ in statistics]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([variance for _, variance in statistics]).mean(0))


def test_no_ghost_batch_is_a_single_value():
    x = torch.tensor([[1.0], [3.0], [8.0]])
    assert torch.equal(GhostBatchNorm1d(1, 2)(x), nn.BatchNorm1d(1)(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GhostBatchNorm1d(1, 2)(x[:1])


def test_without_parameters_and_statistics():
    norm = GhostBatchNorm2d(3, 4, affine=False, track_running_stats=False).double()
    x = random_input(9, 3, 2, 2)
    for mode in (True, False):
        expected = reference.ghost_batch_norm(x, [3, 3, 3], torch.ones(3), torch.zeros(3), norm.eps)
        assert_equal_with_gradients(norm.train(mode), x, expected)
    assert not norm.state_dict()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_values_far_from_zero_keep_their_variance(last):
    x = random_input(12, 2, 8, 8, last=last).detach().float() / 3 + 1000
    y = GhostBatchNorm2d(2, 4)(x)
    expected = reference.ghost_batch_norm(x.double(), [4] * 3, torch.ones(2), torch.zeros(2), 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)


def test_batch_norm_refresh_measures_ghost_layers_as_plain_ones():
    ghost, plain = nn.Sequential(GhostBatchNorm1d(2, 4)), nn.Sequential(nn.BatchNorm1d(2))
    batches = [torch.randn(10, 2) * 2 + 1 for _ in range(3)]
    for model in (ghost, plain):
        refresh_batch_norm(model, batches)
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict())
    assert ghost[0].running_mean.abs().min() > 0


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("size", [8, 9])
def test_an_activation_behind_may_work_in_place(last, size):
    norm = randomized(GhostBatchNorm2d(3, 4))
    x = random_input(size, 3, 2, 2, last=last)
    expected = reference.ghost_batch_norm(x, reference.ghost_sizes(size, 4), norm.weight, norm.bias, norm.eps).relu()
    assert_equal_with_gradients(nn.Sequential(norm, nn.ReLU(inplace=True)), x, expected)


# Other layers


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (2, 3, 2, 3, 2)], ids=str)
def test_layers_equal_their_references(shape, last):
    x = random_input(*shape, last=last)
    layer, rms = randomized(LayerNorm2d(3)), randomized(RMSNorm2d(3))
    assert_equal_with_gradients(layer, x, reference.layer_norm(x, layer.weight, layer.bias, 1e-6))
    assert_equal_with_gradients(rms, x, reference.rms_norm(x, rms.weight, 1e-6))
    response = randomized(FilterResponseNorm(3))
    assert_equal_with_gradients(response, x, reference.filter_response_norm(x, response.weight, response.bias, response.threshold, 1e-6))
    lp = randomized(LPS[len(shape)](3))
    assert_equal_with_gradients(lp, x, reference.l1_batch_norm(x, lp.weight, lp.bias, 1e-5))


def test_layer_norm_is_neither_that_of_the_width_nor_that_of_all_positions():
    x = torch.randn(2, 3, 4, 3)
    y = LayerNorm2d(3)(x)
    assert (y - nn.LayerNorm(3)(x)).abs().max() > 0.1
    assert (y - nn.GroupNorm(1, 3, eps=1e-6)(x)).abs().max() > 0.1


def test_the_learned_eps_of_filter_response_counts_by_its_absolute_value():
    norm = randomized(FilterResponseNorm(3, learnable_eps=True))
    x = random_input(4, 3, 2)
    for value in (0.3, -0.3):
        with torch.no_grad():
            norm.learned_eps.fill_(value)
        expected = reference.filter_response_norm(x, norm.weight, norm.bias, norm.threshold, 1e-6 + norm.learned_eps.abs())
        assert_equal_with_gradients(norm, x, expected)
    assert FilterResponseNorm(3, learnable_eps=True).learned_eps.item() == pytest.approx(1e-4)
    assert list(FilterResponseNorm(3).state_dict()) == ["weight", "bias", "threshold"]


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4])
def test_deviations_of_any_power_estimate_the_variance_of_normal_values(p):
    norm = LpBatchNorm1d(2, p, momentum=1.0).double()
    x = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 7.0]) + 3
    y = norm(x)
    torch.testing.assert_close(norm.running_var.sqrt(), torch.tensor([0.1, 7.0]).double(), rtol=0.03, atol=0)
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    assert (y.std(0) - 1).abs().max() < 0.03
    torch.testing.assert_close(norm.eval()(x), y, rtol=1e-3, atol=1e-3)


def test_second_deviations_are_plain_batch_normalization():
    lp, plain = LpBatchNorm2d(3, 2).double(), nn.BatchNorm2d(3).double()
    x = random_input(5, 3, 2, 2)
    for _ in range(3):
        torch.testing.assert_close(lp(x), plain(x))
    torch.testing.assert_close(lp.state_dict(), plain.state_dict())
    torch.testing.assert_close(lp(x), batch_normalized(x, torch.ones(3), torch.zeros(3), 1e-5))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_constant_channels_have_finite_gradients(p):
    x = torch.ones(4, 2, requires_grad=True)
    LpBatchNorm1d(2, p)(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_lp_without_parameters_and_statistics_and_with_single_values():
    norm = LpBatchNorm1d(2, affine=False, track_running_stats=False).double()
    x = random_input(5, 2)
    assert_equal_with_gradients(norm.eval(), x, reference.l1_batch_norm(x, torch.ones(2), torch.zeros(2), 1e-5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        LpBatchNorm1d(2)(torch.ones(1, 2))


@pytest.mark.parametrize("groups", [1, 2])
def test_scaled_convolutions_standardize_by_filter(groups):
    conv = randomized(ScaledWSConv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, groups=groups, gamma=1.5))
    x = random_input(2, 4, 9, 8)
    weight = reference.scaled_standardized(conv.weight, conv.gain, 1.5)
    expected = nn.functional.conv2d(x, weight, conv.bias, stride=2, padding=1, dilation=2, groups=groups)
    assert_equal_with_gradients(conv, x, expected)
    assert {name: value.shape for name, value in conv.state_dict().items() if name == "gain"} == {"gain": (6, 1, 1, 1)}


def test_scaled_filters_without_variance_are_zero():
    conv = ScaledWSConv2d(2, 2, 3, bias=False)
    nn.init.ones_(conv.weight)
    conv(torch.randn(1, 2, 4, 4)).sum().backward()
    assert not conv.effective_weight().any()
    assert torch.isfinite(conv.weight.grad).all()


@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "silu", "elu", "selu", "mish", "tanh", "sigmoid", "softplus"])
def test_gammas_undo_the_shrinking_of_activations(name):
    function = {"identity": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(name) or getattr(nn.functional, name)
    assert ScaledWSConv2d(2, 2, 3, gamma=name).gamma == pytest.approx(reference.variance_after(function) ** -0.5, rel=1e-6)


# All layers


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(make, dtype):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(7, 4, 8, 8).to(dtype)
    for mode in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = copy.deepcopy(layer).double()(mode.double())
        low = copy.deepcopy(layer).to(dtype)
        y = low(mode.requires_grad_())
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() < (0.08 if dtype == torch.bfloat16 else 0.01)
        y.float().square().mean().backward()
        assert all(torch.isfinite(parameter.grad).all() and parameter.grad.dtype == dtype for parameter in low.parameters())
        mode.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = copy.deepcopy(layer)(x.float())
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_print_pickle_and_copy(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(7, 4, 5, 5)
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert torch.equal(twin(x), layer(x))
        assert not set(map(id, twin.parameters())) & set(map(id, layer.parameters()))
    if not isinstance(layer, nn.Conv2d):
        again = eval(repr(layer), {type(layer).__name__: type(layer)})  # noqa: S307
        assert repr(again) == repr(layer)
        assert list(again.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_devices_and_dtypes_of_parameters(make):
    layer = make(device="meta", dtype=torch.float64)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}


@pytest.mark.full
@pytest.mark.parametrize(("names", "sizes"), [(["ghost"], [7, 6]), ([*LAYERS][1:], [7])], ids=["ghost", "others"])
def test_layers_compile_whole_to_the_same_numbers(names, sizes):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(LAYERS[name]() for name in names))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    for size in sizes:
        x = torch.randn(size, 4, 5, 5)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [model(inputs[0]), compiled(inputs[1])]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GhostBatchNorm2d(4, 0), "`ghost_size` must be a whole number of at least 1, got 0"),
        (lambda: GhostBatchNorm1d(0, 4), "`num_features` must be a whole number of at least 1, got 0"),
        (lambda: GhostBatchNorm3d(4, 4, momentum=1.5), r"`momentum` must lie in \[0, 1\], got 1.5"),
        (lambda: GhostBatchNorm3d(4, 4, eps=-1), r"`eps` must lie in \(0, ∞\), got -1"),
        (lambda: LpBatchNorm1d(4, 0.5), r"`p` must lie in \[1, ∞\), got 0.5"),
        (lambda: LpBatchNorm2d(4, math.inf), r"`p` must lie in \[1, ∞\), got inf"),
        (lambda: LayerNorm2d(True), "`num_channels` must be a whole number of at least 1, got True"),
        (lambda: RMSNorm2d(4, eps=0), r"`eps` must lie in \(0, ∞\), got 0"),
        (lambda: FilterResponseNorm("4"), "`num_features` must be a whole number of at least 1, got '4'"),
        (lambda: ScaledWSConv2d(4, 4, 3, gamma="rely"), "`gamma` must be one of 'identity', 'relu', .* got 'rely'"),
        (lambda: ScaledWSConv2d(4, 4, 3, gamma=0), r"`gamma` must lie in \(0, ∞\), got 0"),
        (lambda: ScaledWSConv2d(4, 4, 1, groups=4), "at least two weights in each filter, got 1"),
    ],
)
def test_wrong_arguments_fail_at_once(make, words):
    with pytest.raises(errors.ArgumentError, match=words):
        make()


@pytest.mark.parametrize("kind", [GhostBatchNorm2d, LpBatchNorm2d])
def test_dimensions_are_those_of_plain_batch_normalization(kind):
    with pytest.raises(ValueError, match="expected 4D input"):
        kind(3, 2)(torch.randn(4, 3, 2))
