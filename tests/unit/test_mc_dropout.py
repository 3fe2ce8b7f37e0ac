"""Monte Carlo dropout: the statistics of several passes, and that nothing else changes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from lightning_tricks import errors
from lightning_tricks.functional import MCClassification, MCRegression, apply_dropout, mc_dropout
from reference import dropout as reference


class Recorded(nn.Module):
    """Keeps what it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.outputs = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.outputs.append(self.model(x).detach().clone())
        return self.outputs[-1]


def make(rate: float = 0.5) -> Recorded:
    torch.manual_seed(0)
    return Recorded(nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(rate), nn.Linear(32, 3)).double())


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_classification_has_the_statistics_of_the_passes():
    model = make()
    result = mc_dropout(model, X, samples=7)
    assert isinstance(result, MCClassification)
    assert len(model.outputs) == 7
    probabilities = torch.stack(model.outputs).softmax(-1)
    for i in range(6):
        mean, variance, entropy, expected, information = reference.uncertainty(probabilities[:, i].tolist())
        assert result.mean[i].tolist() == pytest.approx(mean, abs=1e-12)
        assert result.variance[i].tolist() == pytest.approx(variance, abs=1e-12)
        assert result.entropy[i].item() == pytest.approx(entropy, abs=1e-12)
        assert result.expected_entropy[i].item() == pytest.approx(expected, abs=1e-12)
        assert result.mutual_information[i].item() == pytest.approx(information, abs=1e-12)
    assert (result.mutual_information > 1e-3).all()


def test_regression_has_the_statistics_of_the_passes():
    model = make()
    result = mc_dropout(model, X, samples=5, task="regression")
    assert isinstance(result, MCRegression)
    passes = torch.stack(model.outputs)
    torch.testing.assert_close(result.mean, passes.mean(0))
    torch.testing.assert_close(result.variance, passes.var(0, unbiased=False))
    assert mc_dropout(model, X, samples=1, task="regression").variance.abs().max() == 0


def test_the_mean_converges_to_the_expectation():
    """In a linear model of one layer of dropout, the mean is the plain output and the variance is p/(1 − p) Σ (w x)²."""
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1, bias=False)).double().eval()
    result = mc_dropout(model, X, samples=1500, task="regression")
    variance = 0.3 / 0.7 * (X * model[1].weight.detach()).square().sum(1, keepdim=True)
    assert ((result.mean - model(X)).abs() < 5 * (variance / 1500).sqrt()).all()
    torch.testing.assert_close(result.variance, variance, rtol=0.2, atol=0.0)


def test_a_seed_decides_and_nothing_else_changes():
    model = make()
    model.model[0].eval()
    modes, state = [m.training for m in model.modules()], {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first = mc_dropout(model, X, seed=3)
    torch.rand(5)
    torch.set_rng_state(random_state)
    assert torch.equal(mc_dropout(model, X, seed=3).mean, first.mean)
    assert not torch.equal(mc_dropout(model, X, seed=4).mean, first.mean)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not first.mean.requires_grad


def test_batch_norm_is_evaluated_and_modes_come_back_after_an_error():
    model = make()
    assert mc_dropout(model, X[:1], samples=3).mean.sum() == pytest.approx(1.0)  # one sample, which BatchNorm in training refuses
    model.model.append(nn.Flatten(5))
    with pytest.raises(IndexError):
        mc_dropout(model, X)
    assert all(m.training for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_inserted_layers_and_numbers_act_although_torch_would_pass_them_by():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        for change in ({"after": "linear1"}, {"where": "dropout1"}, {"where": "self_attn"}):
            apply_dropout(layer, 0.5, **change)
            first = mc_dropout(layer, x, samples=4, task="regression")
            assert (first.variance > 0).all(), change
            assert torch.equal(mc_dropout(layer, x, samples=4, task="regression").mean, first.mean)
            apply_dropout(layer, 0.0)


@pytest.mark.full
def test_fused_attention_of_timm_acts():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3).eval()
    apply_dropout(model, 0.5, where="attn_drop")
    assert (mc_dropout(model, torch.randn(2, 3, 32, 32), samples=3).variance > 0).all()


def test_low_precision_and_classes_in_another_dimension():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Dropout2d(0.5)).bfloat16()
    result = mc_dropout(model, torch.randn(2, 1, 4, 5, dtype=torch.bfloat16), dim=1, samples=30)
    assert result.mean.dtype is torch.float32
    assert result.entropy.shape == (2, 4, 5)
    torch.testing.assert_close(result.mean.sum(1), torch.ones(2, 4, 5))


def test_impossible_classes_have_no_entropy():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return torch.cat([self.drop(x), torch.full_like(x[:, :1], -torch.inf)], 1)

    result = mc_dropout(Masked(), X)
    assert torch.isfinite(result.mutual_information).all()
    assert (result.mean[:, -1] == 0).all()


@pytest.mark.parametrize(
    ("model", "arguments", "error", "words"),
    [
        (nn.Linear(4, 3), {}, errors.NothingMatchedError, "needs dropout that acts, and Linear has none"),
        (nn.Sequential(nn.Dropout(0.0)), {}, errors.NothingMatchedError, "Sequential has rates of zero only"),
        (nn.Sequential(nn.Dropout()), {"samples": 0}, errors.ArgumentError, "`samples` must be a whole number of at least 1"),
        (nn.Sequential(nn.Dropout()), {"task": "ranking"}, errors.ArgumentError, "`task` must be one of 'classification', 'regression'"),
        (nn.Sequential(nn.Linear(4, 1), nn.Dropout()), {}, errors.TrickError, "at least two classes, got logits of shape (6, 1)"),
        (nn.Dropout(), {"dim": 2}, errors.TrickError, "`dim=2` must be a dimension of at least two classes, got logits of shape (6, 4)"),
        (nn.Dropout(), {"seed": -1}, errors.ArgumentError, "`seed` must be a whole number of at least 0, got -1."),
        (nn.Sequential(nn.Dropout(), nn.LSTM(4, 2)), {}, errors.TrickError, "got a tuple. Wrap it"),
    ],
)
def test_what_cannot_be_sampled_is_refused(model, arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        mc_dropout(model, X.float(), **arguments)
