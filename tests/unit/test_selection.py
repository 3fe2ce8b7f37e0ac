import pytest
from torch import nn

from lightning_tricks import errors
from lightning_tricks._core.selection import matches, select_parameters


@pytest.mark.parametrize(
    ("name", "glob", "expected"),
    [
        ("model.layer1.0.weight", "layer1.?", True),
        ("model.layer1.0.weight", "layer1", True),
        ("model.layer1.0.weight", "model.layer1.0.weight", True),
        ("model.layer1.0.weight", "*.weight", True),
        ("model.layer1.0.weight", "weight", True),
        ("model.layer1.0.weight", "layer?", True),
        ("model.layer1.0.weight", "ayer1", False),
        ("model.layer1.0.weight", "layer", False),
        ("model.layer10.0.weight", "layer1", False),
        ("debias_proj.weight", "bias", False),
        ("debias_proj.weight", "*bias*", True),
        ("weight", "*.weight", False),
        ("weight", "*", True),
        ("Weight", "weight", False),
    ],
)
def test_globs(name, glob, expected):
    assert matches(name, glob) is expected
    assert matches(name, ["nothing", glob]) is expected


def test_selection_keeps_frozen_parameters_and_names_tied_ones_once():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    net["a"].bias.requires_grad_(requires_grad=False)
    assert list(select_parameters(net, "*", ["head"], trick="EMA()")) == ["a.weight", "a.bias", "b.bias"]


def net():
    return nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "head": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("make", "where", "exclude", "words"),
    [
        (nn.Module, "*", (), ["EMA() found no trainable parameter: Module has none", "`configure_model`"]),
        (
            net,
            "bakbone.*",
            (),
            ["`where='bakbone.*'` matched none of ModuleDict's 6 parameters (in Linear ×2, BatchNorm1d ×1)", "try `where='backbone'`"],
        ),
        (net, "zzz", (), ["Names look like 'backbone.0.weight', 'backbone.0.bias'"]),
        (net, "head", ["head.*"], ["`exclude=['head.*']` removed all 2 that `where='head'` matched"]),
        (lambda: net().requires_grad_(requires_grad=False), "*", (), ["all 6 that `where='*'` matched are frozen", "requires_grad=False"]),
    ],
)
def test_four_diagnoses_of_nothing(make, where, exclude, words):
    with pytest.raises(errors.NothingMatchedError) as raised:
        select_parameters(make(), where, exclude, trick="EMA()")
    assert all(word in str(raised.value) for word in words), str(raised.value)
