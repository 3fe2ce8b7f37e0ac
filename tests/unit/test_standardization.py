"""Statistics, whitening and the parts of a model that standardize, without a Trainer."""

from __future__ import annotations

import copy
import pickle
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks import errors
from lightning_tricks.data import _statistics
from lightning_tricks.functional import (
    StandardizationStatistics,
    remove_standardization,
    standardization_statistics,
    standardize_inputs,
    standardize_targets,
    whitening_matrix,
)
from reference import standardization as reference


def batches_of(*shape: int, sizes=(9, 1, 5), shift: float = 3.0, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(shape[-1], shape[-1], generator=generator)
    return [(torch.randn(size, *shape, generator=generator) @ mixing + shift).to(dtype) for size in sizes]


# Statistics


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize(
    ("per", "dim", "shape"), [("channel", 1, (3,)), ("channel", 1, (2, 4, 3)), ("channel", -1, (4, 3)), ("feature", 1, (2, 3))]
)
def test_statistics_are_those_of_two_passes_whatever_the_batches(per, dim, shape, covariance):
    batches = batches_of(*shape)
    statistics = standardization_statistics(batches, per=per, dim=dim, covariance=covariance)
    mean, variance = reference.statistics(batches, per, dim)
    assert statistics.mean.shape == (shape if per == "feature" else mean.shape)
    torch.testing.assert_close(statistics.mean.flatten(), mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(statistics.variance.flatten(), variance, rtol=1e-12, atol=0)
    if covariance:
        torch.testing.assert_close(statistics.covariance, reference.covariances(batches, per, dim), rtol=1e-11, atol=1e-12)
    assert statistics.count == sum(len(batch) for batch in batches) * (1 if per == "feature" else batches[0][0].numel() // len(mean))


def test_pieces_of_large_batches_make_no_difference(monkeypatch):
    batches = batches_of(2, 3)
    expected = standardization_statistics(batches, covariance=True)
    monkeypatch.setattr(_statistics, "_PIECE", 7)
    statistics = standardization_statistics(batches, covariance=True)
    torch.testing.assert_close(statistics.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics.covariance, expected.covariance, rtol=1e-12, atol=0)


def test_a_small_deviation_around_a_large_mean_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    batches = [1e6 + torch.randn(500, 2, generator=generator, dtype=torch.float64) for _ in range(40)]
    statistics = standardization_statistics(batches)
    mean, variance = reference.statistics(batches, "channel")
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-15, atol=0)
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-10, atol=0)  # the values themselves are rounded to 1e-10


def test_what_is_constant_has_a_variance_of_exactly_zero_and_is_not_scaled():
    batches = [torch.cat([torch.full((size, 1), 0.1), torch.randn(size, 1)], dim=1) for size in (7, 3)]
    statistics = standardization_statistics(batches)
    assert statistics.variance[0] == 0
    assert statistics.std()[0] == 1
    net = nn.Identity()
    standardize_inputs(net, statistics)
    assert net(batches[0])[:, 0].abs().max() < 1e-8


def test_targets_of_one_dimension_are_one_channel():
    statistics = standardization_statistics([(torch.zeros(2, 3), torch.tensor([1.0, 3.0]))], item=1)
    assert (statistics.mean.tolist(), statistics.variance.tolist(), statistics.count) == ([2.0], [1.0], 2)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    ("batch", "item"),
    [(torch.ones(2, 1), None), ([torch.ones(2, 1), torch.zeros(2)], None), ({"ids": [3], "x": torch.ones(2, 1)}, "x"),
     (Pair(torch.zeros(2), torch.ones(2, 1)), 1), ({"x": torch.ones(2, 1)}, None)],
)  # fmt: skip
def test_inputs_are_found_in_batches_of_any_kind(batch, item):
    assert standardization_statistics([batch], item=item).mean.tolist() == [1.0]


@pytest.mark.parametrize(
    ("batches", "arguments", "words"),
    [
        ([], {}, "there were no batch. Give a loader that can be iterated anew"),
        ([torch.tensor([[1.0], [float("nan")]])], {}, "Statistics need finite values, and channel 0 has the mean nan"),
        ([torch.ones(2, 3), torch.ones(2, 4)], {}, "All batches must have the same channels, and one has (4,) where the first has (3,)"),
        ([torch.ones(2, 3, dtype=torch.uint8)], {}, "`item=None` is a tensor of torch.uint8 in a Tensor. Give its index or key"),
        ([{"x": torch.ones(2, 3)}], {"item": 1}, "`item=1` is a NoneType in a dict with keys 'x'"),
        ([[torch.ones(2, 3)]], {"item": 1}, "`item=1` is a NoneType in a list of 1"),
        ([torch.ones(2, 3)], {"dim": -2}, "Dimension `dim=-2` must be there, and not be the batch, in tensors of shape (2, 3)"),
        ([torch.ones(2, 3)], {"per": "pixel"}, "`per` must be one of 'channel', 'feature', got 'pixel'"),
        ([torch.ones(2, 3)], {"batches": 0}, "`batches` must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(batches, arguments, words):
    with pytest.raises(errors.ArgumentError) as raised:
        standardization_statistics(batches, **arguments)
    assert words in str(raised.value)


def test_the_loader_and_the_random_state_are_as_before():
    data = TensorDataset(torch.arange(12.0).view(12, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), loader.generator.get_state()
    assert standardization_statistics(loader, batches=2).count == 8
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.equal(before[2], loader.generator.get_state())


# Whitening


@pytest.mark.parametrize("mode", ["zca", "pca"])
def test_whitened_values_have_the_covariance_one(mode):
    batches = batches_of(5, sizes=(200,))
    statistics = standardization_statistics(batches, covariance=True)
    matrix = whitening_matrix(statistics.covariance, mode=mode)
    torch.testing.assert_close(matrix @ statistics.covariance @ matrix.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    net = nn.Identity()
    standardize_inputs(net, statistics, whitening=mode)
    whitened = [net(batch.double()) for batch in batches]
    torch.testing.assert_close(reference.covariances(whitened, "channel"), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
    if mode == "zca":  # the only symmetric one
        torch.testing.assert_close(matrix, matrix.T)
    else:
        assert (matrix @ statistics.covariance).square().sum(dim=1).diff().max() < 0  # from the largest variance to the smallest


def test_directions_without_variance_are_not_blown_up():
    x = torch.randn(50, 3, dtype=torch.float64) @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    covariance = standardization_statistics([x], covariance=True).covariance
    matrix = whitening_matrix(covariance)
    assert matrix.abs().max() < 10
    assert torch.linalg.matrix_rank(matrix @ covariance @ matrix.T) == 2
    assert whitening_matrix(torch.zeros(2, 2), mode="pca").tolist() == [[0.0, 1.0], [1.0, 0.0]] or torch.equal(
        whitening_matrix(torch.zeros(2, 2)), torch.eye(2, dtype=torch.float64)
    )


def test_eps_is_added_to_variances():
    assert whitening_matrix(torch.diag(torch.tensor([3.0, 0.0])), eps=1.0).diagonal().tolist() == pytest.approx([0.5, 1.0])
    statistics = StandardizationStatistics(torch.zeros(2), torch.tensor([3.0, 0.0]), 5)
    assert statistics.std(1.0).tolist() == [2.0, 1.0]
    with pytest.raises(errors.ArgumentError, match="must be a square matrix, got one of shape"):
        whitening_matrix(torch.zeros(2, 3))


# In a model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, ids: Tensor, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": self.net(x) * scale, "seen": x}


@pytest.mark.parametrize("argument", [None, 1, "x"])
@pytest.mark.parametrize("named", [False, True])
def test_the_argument_is_standardized_however_it_is_given(argument, named):
    batches = batches_of(3)
    model, ids = Model(), torch.arange(5)
    standardize_inputs(model, standardization_statistics(batches), argument=argument)
    seen = torch.cat([(model(ids, x=x, scale=2.0) if named else model(ids, x))["seen"] for x in batches])
    assert seen.mean(dim=0).abs().max() < 1e-6
    torch.testing.assert_close(seen.var(dim=0, correction=0), torch.ones(3))


def test_outputs_are_brought_back_where_they_are():
    model, statistics = Model(), standardization_statistics(batches_of(2))
    x = torch.randn(4, 3)
    plain = model(torch.arange(4), x)
    standardize_targets(model, statistics, output="y")
    result = model(torch.arange(4), x)
    torch.testing.assert_close(result["y"], plain["y"] * statistics.std().float() + statistics.mean.float())
    assert torch.equal(result["seen"], plain["seen"])
    remove_standardization(model)
    standardize_targets(model, statistics)
    with pytest.raises(errors.TrickError, match="`output=None` must be a tensor in what `forward` returns, and is a dict"):
        model(torch.arange(4), x)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3)])
@pytest.mark.parametrize("whitening", [None, "zca", "pca"])
@pytest.mark.parametrize("per", ["channel", "feature"])
def test_statistics_of_standardized_values(per, whitening, shape):
    batches = batches_of(*shape, sizes=(60,), shift=1e4, dtype=torch.float32)
    net = nn.Identity()
    standardize_inputs(net, standardization_statistics(batches, per=per, covariance=True), whitening=whitening)
    values = [net(batch) for batch in batches]
    mean, variance = reference.statistics(values, per)
    assert mean.abs().max() < 1e-4
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-3, atol=0)
    assert values[0].shape == batches[0].shape
    assert values[0].dtype == torch.float32


def test_single_precision_keeps_all_digits_of_a_large_mean():
    x = (1e6 + torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).float()
    net = nn.Identity()
    standardize_inputs(net, standardization_statistics([x]))
    expected = (x.double() - x.double().mean()) / x.double().std(correction=0)
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-6, atol=1e-6)  # the mean rounded to float32 is 0.03 off
    standardize_targets(back := nn.Identity(), standardization_statistics([x]))
    torch.testing.assert_close(back(net(x)), x, rtol=1e-7, atol=0)


def test_casting_the_model_leaves_statistics_in_single_precision():
    net = nn.Sequential(nn.Linear(3, 2))
    standardize_inputs(net, standardization_statistics(batches_of(3)))
    kept = net.input_standardization.mean.clone()
    for cast in (net.half(), net.bfloat16()):
        assert cast.input_standardization.mean.dtype == torch.float32
        assert torch.equal(cast.input_standardization.mean, kept)
    assert net(torch.randn(2, 3).bfloat16()).dtype == torch.bfloat16
    assert net.double().input_standardization.mean.dtype == torch.float64


def test_a_tensor_of_other_channels_is_refused():
    net = nn.Identity()
    standardize_inputs(net, standardization_statistics(batches_of(3)))
    with pytest.raises(
        errors.TrickError, match=r"Statistics of shape \(3,\), per channel with `dim=1`, do not fit a tensor of shape \(2, 4\)"
    ):
        net(torch.zeros(2, 4))
    assert net(torch.zeros(2, 3, 5)).shape == (2, 3, 5)


def test_models_with_standardization_are_copied_pickled_and_loaded():
    statistics = standardization_statistics(batches_of(3))
    net, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    plain = net(x)
    standardize_inputs(net, statistics)
    expected = net(x)
    assert not torch.equal(expected, plain)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), expected)
    twin.input_standardization.mean.zero_()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(net(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)  # noqa: S301
    other = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(net.state_dict())
    standardize_inputs(other, vars(standardization_statistics(batches_of(3, shift=7.0))))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), expected)
    remove_standardization(net)
    assert torch.equal(net(x), plain)
    assert "forward" not in vars(net)
    assert list(net.state_dict()) == ["0.weight", "0.bias"]


def test_parts_of_a_model_can_be_named_and_stand_once():
    model, statistics = Model(), standardization_statistics(batches_of(3))
    standardize_inputs(model, statistics, module="net")
    assert "net.input_standardization.std" in model.state_dict()
    standardize_inputs(model, statistics, module="net")  # once more changes nothing
    assert len(vars(model.net)["forward"].parts) == 1
    with pytest.raises(errors.TrickConflictError, match="standardize the same tensor"):
        standardize_inputs(model, statistics, module="net", eps=1.0)
    with pytest.raises(errors.NothingMatchedError, match=r"`module='nte'` is none of Model's. Its children are 'net'"):
        standardize_inputs(model, statistics, module="nte")
    with pytest.raises(errors.ArgumentError, match="needs statistics with a covariance"):
        standardize_inputs(Model(), statistics, whitening="zca")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("whitening", [None, "zca"])
def test_exported_models_standardize(whitening):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval(), torch.randn(2, 3, 4, 4)
    standardize_inputs(net, standardization_statistics([x * 3 + 5], covariance=True), whitening=whitening)
    standardize_targets(net, standardization_statistics(batches_of(2)))
    expected = net(x)
    for program in (torch.export.export(net, (x,), strict=False).module(), torch.jit.trace(net, x), torch.compile(net, backend="eager")):
        torch.testing.assert_close(program(x), expected)
