"""`functional.refresh_batch_norm` by itself."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_tricks import errors
from lightning_tricks.functional import refresh_batch_norm
from reference.batch_norm import batch_normalized, population


def close(norm, inputs):
    mean, variance = population(inputs)
    torch.testing.assert_close(norm.running_mean, mean.to(norm.running_mean.dtype))
    torch.testing.assert_close(norm.running_var, variance.to(norm.running_var.dtype))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [module.training for module in model.modules()]


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), ()),
        (nn.BatchNorm1d(3), (5,)),
        (nn.BatchNorm2d(3), (4, 2)),
        (nn.BatchNorm3d(3), (2, 3, 2)),
        (nn.SyncBatchNorm(3), (4, 2)),  # on one process; between processes it runs on accelerators only
    ],
    ids=str,
)
def test_statistics_are_those_of_all_values_whatever_the_batch_sizes(norm, shape):
    batches = [torch.randn(size, 3, *shape) * scale + scale for size, scale in ((64, 1.0), (64, 5.0), (3, 20.0))]
    assert refresh_batch_norm(norm, batches) == 3
    close(norm, batches)
    assert norm.num_batches_tracked == 0


def test_values_far_from_zero_keep_their_variance():
    generator = torch.Generator().manual_seed(0)
    batches = [1000 + 0.01 * torch.randn(size, 2, 4, 4, generator=generator, dtype=torch.float64) for size in (32, 32, 7)]
    norm = nn.BatchNorm2d(2).double()
    refresh_batch_norm(norm, batches)
    mean, variance = population(batches)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-9, atol=0)
    assert 0.9e-4 < norm.running_var[0] < 1.1e-4


def test_pieces_of_large_batches_make_no_difference(monkeypatch):
    from lightning_tricks._core import batch_statistics

    batches = [torch.randn(9, 2, 6) + 3, torch.randn(4, 2, 6)]
    norm = nn.BatchNorm1d(2)
    monkeypatch.setattr(batch_statistics, "_PIECE", 30)
    refresh_batch_norm(norm, batches)
    close(norm, batches)


def test_a_layer_behind_another_gets_inputs_normalized_by_their_batch():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    batches = [torch.randn(size, 3) * size for size in (8, 5)]
    refresh_batch_norm(model, batches)
    close(model[0], batches)
    behind = [batch_normalized(batch, model[0].weight, model[0].bias, model[0].eps) for batch in batches]
    mean, variance = population(behind)
    torch.testing.assert_close(model[1][1].running_mean, mean.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model[1][1].running_var, variance.float(), atol=1e-6, rtol=1e-5)


def test_a_layer_used_twice_pools_both_uses():
    norm = nn.BatchNorm1d(2)
    batches = [torch.randn(8, 2), torch.randn(5, 2)]
    refresh_batch_norm(norm, batches, forward=lambda batch: (norm(batch), norm(batch * 3 + 1)))
    close(norm, [*batches, *(batch * 3 + 1 for batch in batches)])


def test_a_subclass_that_writes_its_statistics_in_any_case_gets_the_measured_ones():
    class Stubborn(nn.BatchNorm1d):
        def forward(self, input):  # noqa: A002
            self.running_mean.fill_(7)
            return super().forward(input)

    norm = Stubborn(2)
    batches = [torch.randn(8, 2)]
    refresh_batch_norm(norm, batches, forward=lambda batch: norm(input=batch))
    close(norm, batches)


def test_frozen_and_excluded_layers_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    model[1].eval()
    model[2].running_mean.fill_(5)
    before, modes = state_of(model)
    refresh_batch_norm(model, [torch.randn(8, 2) + 3], exclude="2")
    after, modes_after = state_of(model)
    assert modes == modes_after
    assert sorted(name for name in before if not torch.equal(before[name], after[name])) == ["0.running_mean", "0.running_var"]


def test_a_model_in_evaluation_mode_has_no_frozen_layers():
    norm = nn.Sequential(nn.BatchNorm1d(2)).eval()
    refresh_batch_norm(norm, [torch.full((2, 2), 3.0)])
    assert norm[0].running_mean.tolist() == [3, 3]
    assert not norm[0].training


def test_all_frozen_is_an_error():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].eval()
    with pytest.raises(errors.NothingMatchedError, match="all 1 are kept in evaluation mode"):
        refresh_batch_norm(model, [torch.randn(4, 2)])


def test_layers_that_the_pass_does_not_reach_are_left_alone():
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    model[1].running_mean.fill_(5)
    refresh_batch_norm(model, [torch.ones(4, 2)], forward=model[0])
    assert model[0].running_mean.tolist() == [1, 1]
    assert model[1].running_mean.tolist() == [5, 5]
    with pytest.raises(errors.TrickError, match="reached none of '0', '1'"):
        refresh_batch_norm(model, [torch.ones(4, 2)], forward=lambda batch: batch)


class Counting:
    """A loader that remembers where it stands."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < 3:
            self.position += 1
            yield torch.rand(4, 2) + random.random()  # noqa: S311


def test_random_state_and_loader_state_are_as_before():
    model, loader = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)), Counting()
    numbers, states = random.getstate(), torch.get_rng_state()
    assert refresh_batch_norm(model, loader) == 3
    assert loader.position == 0
    assert random.getstate() == numbers
    assert torch.equal(torch.get_rng_state(), states)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_in_the_middle_of_an_epoch_goes_on_as_if_nothing_had_been(workers):
    def make():
        data = TensorDataset(torch.arange(24.0).reshape(12, 2))
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(1))
        options = {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
        return DataLoader(data, batch_size=3, sampler=sampler, generator=torch.Generator().manual_seed(2), **options)

    def epochs(loader, between=lambda: None):
        seen = []
        for _ in range(2):
            for i, (batch,) in enumerate(loader):
                seen.append(batch.clone())
                if i == 1:
                    between()
        return torch.stack(seen)

    plain, norm, loader = epochs(make()), nn.BatchNorm1d(2), make()
    assert torch.equal(epochs(loader, lambda: refresh_batch_norm(norm, loader)), plain)
    close(norm, [torch.arange(24.0).reshape(12, 2)])


def test_a_number_of_batches():
    norm = nn.BatchNorm1d(2)
    batches = [(torch.randn(4, 2), "label") for _ in range(3)]
    assert refresh_batch_norm(norm, batches, batches=2) == 2
    close(norm, [batch[0] for batch in batches[:2]])


@pytest.mark.parametrize("batches", [0, -1, True, 1.5, "all"])
def test_a_wrong_number_of_batches_is_an_error(batches):
    with pytest.raises(errors.ArgumentError, match="`batches` must be a positive number of batches, or None for all, got"):
        refresh_batch_norm(nn.BatchNorm1d(2), [torch.randn(4, 2)], batches=batches)


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([], "need at least one batch, and the loader gave none"),
        ([torch.randn(4, 2), torch.randn(1, 2)], r"more than one value per channel to be normalized by, and '1' got the shape \(1, 2\)"),
    ],
)
def test_data_that_cannot_do_are_an_error_and_change_nothing(loader, words):
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    before, modes = state_of(model)
    with pytest.raises(errors.ArgumentError, match=words):
        refresh_batch_norm(model, loader)
    after, modes_after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == modes_after


def test_an_exception_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2)))
    model[0].eval()
    before, modes = state_of(model)
    plain = deepcopy(vars(model[1])["_forward_pre_hooks"])

    def loader():
        yield torch.randn(4, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresh_batch_norm(model, loader())
    after, modes_after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == modes_after
    assert model[1].track_running_stats
    assert vars(model[1])["_forward_pre_hooks"] == plain


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Linear(2, 2), {}, "Linear has no BatchNorm of any kind"),
        (nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), {}, "all 1 of Sequential have `track_running_stats=False`"),
        (nn.Sequential(nn.BatchNorm1d(2)), {"where": "body"}, "`where='body'` matched none of Sequential's 1. Their names look like '0'"),
        (nn.Sequential(nn.BatchNorm1d(2)), {"exclude": "0"}, "`exclude='0'` removed all 1"),
    ],
    ids=str,
)
def test_nothing_matched_says_why(model, options, words):
    with pytest.raises(errors.NothingMatchedError) as raised:
        refresh_batch_norm(model, [torch.randn(4, 2)], **options)
    assert words in str(raised.value)


def test_low_precision_statistics_are_measured_in_float64():
    norm = nn.BatchNorm1d(2).to(torch.bfloat16)
    batches = [(torch.randn(400, 2) + 10).to(torch.bfloat16) for _ in range(20)]
    refresh_batch_norm(norm, batches)
    mean, variance = population(batches)
    assert torch.equal(norm.running_mean, mean.to(torch.bfloat16))
    assert torch.equal(norm.running_var, variance.to(torch.bfloat16))


@pytest.mark.full
def test_compiled_models_are_measured_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.compile(backend="eager")
    batches = [torch.randn(8, 2), torch.randn(5, 2)]
    model(batches[0])
    refresh_batch_norm(model, batches)
    close(model[1], [model[0](batch).detach() for batch in batches])
