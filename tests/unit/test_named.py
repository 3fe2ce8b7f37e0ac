"""Optimizers by name."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_tricks import errors, optim

ASKED = {"pytorch_optimizer:bsam": {"num_data": 8}, "pytorch_optimizer:ranger21": {"num_iterations": 10}}
FLAGGED = {"adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"}  # of pytorch-optimizer, which ask for `use_muon`
MATRICES_ONLY = {"torch:Muon", "pytorch_optimizer:spectralsphere"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().mean().backward()


@pytest.mark.full
@pytest.mark.usefixtures("process_group")  # which some distributed optimizers ask for
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum':UserWarning")
def test_every_listed_name_of_each_source_builds_or_says_what_is_missing():
    listed = optim.list_recipes()
    assert {"torch", "timm", "pytorch_optimizer"} <= set(listed.values())
    assert {"torch:AdamW", "timm:lamb", "pytorch_optimizer:came"} < listed.keys()
    built = missing = 0
    for name in listed:
        if ":" not in name:
            continue
        flags = {"*": {"use_muon": False}, "0.weight": {"use_muon": True}} if name.removeprefix("pytorch_optimizer:") in FLAGGED else {}
        try:
            recipe = optim.Named(name, lr=None if name.endswith(":alig") else 1e-3, options=ASKED.get(name, {}), overrides=flags)
        except errors.MissingPackageError as error:
            assert str(error).startswith(f"'{name}' needs what is not here: ")  # noqa: PT017, most names raise nothing
            missing += 1
            continue
        model = nn.Sequential(nn.Linear(4, 2, bias=False)) if name in MATRICES_ONLY else net()
        optimizer = recipe.build(model)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        built += 1
    assert built > 200
    assert missing < 30


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["timm:lamb", "timm:nesterov", "TIMM:Lion".lower(), "pytorch-optimizer:lamb", "torch:ASGD", "torch:adagrad"]
)
def test_it_steps_and_decays_matrices_only(name):
    model = net()
    optimizer = optim.Named(name, lr=1e-2, weight_decay=0.5).build(model)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(2, 0.5), (4, 0)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model)
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.full
def test_it_equals_the_optimizer_of_timm_to_the_bit():
    from timm.optim import Lamb

    ours, theirs = net(), net()
    matrices, others = [theirs[0].weight, theirs[2].weight], [theirs[0].bias, *theirs[1].parameters(), theirs[2].bias]
    bare = Lamb([{"params": matrices}, {"params": others, "weight_decay": 0}], lr=1e-2, weight_decay=0.5, betas=(0.8, 0.9))
    built = optim.Named("timm:lamb", lr=1e-2, weight_decay=0.5, options={"betas": [0.8, 0.9]}).build(ours)
    for _ in range(5):
        for model, optimizer in ((ours, built), (theirs, bare)):
            backward(model)
            optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.full
def test_presets_of_a_name_hold():
    (group, *_) = optim.Named("timm:nesterov", lr=0.1).build(net()).param_groups
    assert (group["nesterov"], group["momentum"]) == (True, 0.9)
    (group, *_) = optim.Named("timm:sgd", lr=0.1, options={"momentum": 0.5}).build(net()).param_groups
    assert group["momentum"] == 0.5


def test_what_is_not_given_is_the_optimizers_own():
    group = optim.Named("torch:AdamW").build(net()).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-2)
    group = optim.Named("torch:AdamW", overrides={"0": {"lr": 0.5, "betas": [0.1, 0.2]}}, layer_decay=0.5).build(net()).param_groups[0]
    assert (group["lr"], group["betas"]) == (0.5, (0.1, 0.2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: optim.Named("lamb"),
            "`name` must be a source and a name in it, 'torch:…', 'timm:…' or 'pytorch_optimizer:…', got 'lamb'.",
        ),
        (lambda: optim.Named("jax:adam"), "got 'jax:adam'"),
        (lambda: optim.Named(["torch:adam"]), "`name` must be a text such as 'timm:lamb', got ['torch:adam']."),
        (lambda: optim.Named("torch:admaw"), "optimizers that torch builds from groups, got 'torch:admaw'. Did you mean 'adamw' or"),
        (lambda: optim.Named("torch:zzz"), "There are 'adadelta', 'adafactor',"),
        (lambda: optim.Named("torch:adam", lr=-1), "`lr` must lie in [0, ∞), got -1."),
        (
            lambda: optim.Named("torch:rprop", weight_decay=0.1),
            "`weight_decay` must be None for 'torch:rprop', which has no such option, got 0.1.",
        ),
        (lambda: optim.Named("torch:adam", options=[1]), "`options` must map the optimizer's arguments to values, got [1]."),
        (
            lambda: optim.Named("torch:adam", options={"beta": 1}),
            "`options` must be arguments of 'torch:adam', got 'beta'. Did you mean 'betas'?",
        ),
        (lambda: optim.Named("torch:adam", options={"lr": 1}), "got 'lr'. Give `lr` itself."),
        (lambda: optim.Named("torch:adam", options={"fused": True}), "Give `implementation` itself."),
        (
            lambda: optim.Named("torch:adam", overrides={"0": {"beta": 1}}),
            "`overrides['0']`: `options` must be arguments of 'torch:adam', got 'beta'.",
        ),
        (lambda: optim.Named("torch:rprop", implementation="fused"), "`implementation` must be one of 'foreach', 'for-loop', None"),
    ],
)
def test_wrong_arguments_fail_in_the_constructor(make, words):
    with pytest.raises(errors.ArgumentError) as raised:
        make()
    assert words in str(raised.value)


@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.Named("lamb"), "got 'lamb'. Did you mean 'timm:lamb' or 'pytorch_optimizer:lamb'?"),
        (
            lambda: optim.Named("pytorch:adamw"),
            "got 'pytorch:adamw'. Did you mean 'torch:AdamW' or 'timm:adamw' or 'pytorch_optimizer:adamw'?",
        ),
        (lambda: optim.Named("timm:lmab"), "Did you mean 'lamb' or"),
        (lambda: optim.Named("pytorch_optimizer:caem"), "Did you mean 'came'"),
        (
            lambda: optim.Named("pytorch_optimizer:lomo"),
            "optimizers that pytorch_optimizer builds from groups, got 'pytorch_optimizer:lomo'",
        ),
        (lambda: optim.Named("pytorch_optimizer:bsam"), "'pytorch_optimizer:bsam' must be given `num_data`, got only []."),
        (lambda: optim.Named("timm:sgdp"), "'timm:sgdp' must be given `lr`, got only []."),
        (lambda: optim.Named("pytorch_optimizer:alig", lr=0.1), "`lr` must be None for 'pytorch_optimizer:alig', which has no such option"),
        (lambda: optim.Named("pytorch_optimizer:alig", layer_decay=0.5), "`layer_decay` must be None for 'pytorch_optimizer:alig'"),
    ],
)
def test_wrong_arguments_of_other_packages_fail_in_the_constructor(make, words):
    with pytest.raises(errors.ArgumentError) as raised:
        make()
    assert words in str(raised.value)


@pytest.mark.parametrize(("source", "extra"), [("timm", "timm"), ("pytorch_optimizer", "optimizers")])
def test_a_missing_package_is_named_and_left_out_of_the_list(source, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, source, None)
    monkeypatch.setitem(sys.modules, f"{source}.optim", None)
    with pytest.raises(errors.MissingPackageError, match=rf"Named\('{source}:…'\) needs .* `pip install 'lightning-tricks\[{extra}\]'`"):
        optim.Named(f"{source}:not_asked_for_before")


def test_without_other_packages_those_of_torch_are_listed(monkeypatch):
    monkeypatch.setattr("lightning_tricks.optimization._named.find_spec", lambda _: None)
    listed = optim.list_recipes()
    assert set(listed.values()) <= {"torch", "lightning_tricks"}
    assert {"Muon", "LBFGS", "torch:SGD"} < listed.keys()
    assert "Named" not in listed
