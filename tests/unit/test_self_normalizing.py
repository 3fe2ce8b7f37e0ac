"""Self-normalizing networks: mean zero and variance one through many layers, and what is changed and left."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightning_tricks import errors
from lightning_tricks.functional import make_self_normalizing
from reference import initialization as reference


def deep(layers: int, width: int, rate: float = 0.0) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU(), nn.Dropout(rate))))


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_activations_keep_mean_zero_and_variance_one_through_forty_layers(rate):
    torch.manual_seed(0)
    model = deep(40, 256, rate)
    x = 1.2 * torch.randn(512, 256) + 0.1  # which is drawn to the fixed point
    torch.manual_seed(0)
    before = model(x).var()
    make_self_normalizing(model, seed=0)
    moments = []
    for layer in model:
        layer.register_forward_hook(lambda module, _, output: moments.append((output.mean(), output.var())))
    model(x)
    after = [moments[i] for i in range(2, len(moments), 3)]
    assert len(after) == 40
    assert before < 0.01
    assert all(abs(mean) < 0.1 for mean, _ in after)
    assert all(0.9 < variance < 1.4 for _, variance in after)
    assert all(abs(variance - 1) < 0.1 for _, variance in after[10:])


def test_the_activation_is_the_papers():
    model = nn.Sequential(nn.Linear(1, 1), nn.GELU())
    make_self_normalizing(model)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = torch.tensor([reference.selu(each) for each in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(model[1](x), expected, rtol=1e-7, atol=1e-7)


def test_everything_is_reported_and_keys_stay(caplog):
    shared = nn.Dropout(0.3)
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.2), shared),
            "gate": nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()),
            "head": nn.Sequential(nn.SiLU(), shared, nn.Linear(8, 2)),
        }
    )
    model.eval()
    keys = list(model.state_dict())
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        report = make_self_normalizing(model, seed=0)
    assert report.swapped == {"body.2": "ReLU(inplace=True) → SELU(inplace=True)", "head.0": "SiLU() → SELU()"}
    assert report.dropouts == {"body.3": 0.2, "body.4": 0.3}
    assert list(report.layers) == ["body.0", "gate.0", "head.2"]
    assert report.left == {
        "body.1": "it is a norm (BatchNorm2d), which self-normalizing networks do without",
        "gate.1": "Sigmoid saturates on both sides, as gates and outputs do; name it as `source` to replace it",
    }
    assert "leaves the norms body.1" in caplog.text
    assert isinstance(model["body"][3], nn.FeatureAlphaDropout)
    assert model["body"][4] is model["head"][1]
    assert isinstance(model["body"][4], nn.AlphaDropout)
    assert model["body"][4].p == 0.3
    assert list(model.state_dict()) == keys
    assert not any(module.training for module in model.modules())


def test_sources_names_and_seeds_choose():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "b": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.1))})
    before = model["b"][0].weight.clone()
    report = make_self_normalizing(model, source="tanh", exclude="b", seed=4)
    assert list(report.swapped) == ["a.1"]
    assert report.dropouts == {}
    assert torch.equal(model["b"][0].weight, before)
    first = model["a"][0].weight.clone()
    make_self_normalizing(model, source="tanh", exclude="b", seed=4)
    assert torch.equal(model["a"][0].weight, first)
    with pytest.raises(errors.NothingMatchedError, match=r"`where='nowhere'` matched none of ModuleDict's 1"):
        make_self_normalizing(model, source="relu", where="nowhere")
    with pytest.raises(errors.ArgumentError, match="`seed` must be a whole number of at least 0, got -2"):
        make_self_normalizing(model, seed=-2)
