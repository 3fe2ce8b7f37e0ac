"""Recipes: what they promise as values, and the optimizers that they build."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import FrozenInstanceError, dataclass, fields

import numpy as np
import pytest
import torch
from torch import nn

from lightning_tricks import errors, optim
from lightning_tricks.optim import *  # noqa: F403, as `repr` is evaluated
from reference import optimizers as reference

RECIPES = [
    optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    optim.Rprop(etas=(0.4, 1.3)),
    optim.Adagrad(0.1, lr_decay=0.1, weight_decay=0.1),
    optim.RMSprop(1e-3, momentum=0.9, centered=True),
    optim.Adadelta(rho=0.95, eps=1e-5),
    optim.Adam(1e-2, betas=(0.8, 0.9), amsgrad=True),
    optim.AdamW(1e-2, overrides={"2.*": {"lr": 1e-3, "betas": (0.5, 0.9)}}, layer_decay=0.5, layers=["0", "*"], decayed=("matrix", "norm")),
    optim.NAdam(weight_decay=0.1, decoupled_weight_decay=True),
    optim.RAdam(lr=1e-2, implementation="foreach"),
    optim.Adafactor(eps=(1e-30, 1e-3), d=2.0),
    optim.LBFGS(max_iter=3, line_search_fn="strong_wolfe"),
    optim.Named("torch:adamax", lr=1e-2, weight_decay=0.1, options={"betas": (0.8, 0.9)}),
]


def name_of(recipe) -> str:
    return type(recipe).__name__


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def loss_of(model: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    return (model(x) - 1).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return [parameter.detach() for parameter in model.parameters()]


# As values


@pytest.mark.parametrize(
    "recipe",
    [
        optim.SGD(np.float64(0.1)),
        optim.AdamW(np.float32(0.5), betas=(np.float64(0.9), np.float64(0.99)), layer_decay=np.float64(0.5), layers=["0", "*"]),
        optim.Adam(overrides={"2.*": {"lr": np.float64(0.5), "betas": [np.float64(0.9), 0.99]}}),
        optim.Adafactor(eps=(None, np.float64(0.1))),
        optim.LBFGS(np.float64(0.1), max_iter=np.int64(3)),
        optim.Named("torch:adamax", lr=np.float64(0.1), options={"betas": (np.float64(0.9), 0.99)}, overrides={"2": {"lr": np.float64(1)}}),
        optim.Lookahead(optim.SGD(), k=np.int64(3), alpha=np.float64(0.5)),
        optim.ScheduleFree(optim.RMSprop(), momentum=np.float64(0.5), r=np.float64(1), weight_lr_power=np.int64(1)),
        optim.SAM(optim.SGD(), rho=np.float64(0.5)),
        optim.ClipNorm(optim.SGD(), max_norm=np.float64(0.5), order=np.int64(1)),
    ],
    ids=name_of,
)
def test_numbers_of_numpy_become_plain_ones(recipe):
    assert "np." not in repr(recipe)
    model = net()
    optimizer = recipe.build(model)
    train(model, optimizer, 2)
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_is_a_value(recipe):
    assert eval(repr(recipe)) == recipe  # noqa: S307
    assert repr(type(recipe)("torch:sgd") if isinstance(recipe, optim.Named) else type(recipe)()).endswith(("()", "'torch:sgd')"))
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301
    assert copy.deepcopy(recipe) == recipe
    with pytest.raises(FrozenInstanceError):
        recipe.lr = 1.0


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_builds_an_optimizer_that_learns_and_resumes(recipe):
    model = net()
    before = loss_of(model).item()
    optimizer = recipe.build(model)
    train(model, optimizer)
    assert loss_of(model).item() < before
    other = copy.deepcopy(model)
    resumed = recipe.build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, train(model, optimizer), train(other, resumed)))


def test_what_a_recipe_was_given_cannot_be_changed_from_outside():
    overrides = {"0": {"lr": 1.0}}
    recipe = optim.SGD(overrides=overrides)
    overrides["0"]["lr"] = 2.0
    assert recipe.overrides == {"0": {"lr": 1.0}}


def test_every_recipe_is_tested_and_listed():
    public = {getattr(optim, name) for name in optim.__all__}
    recipes = {kind for kind in public if isinstance(kind, type) and issubclass(kind, optim.OptimizerRecipe)}
    assert {optim.SGD, optim.Muon} < recipes
    listed = optim.list_recipes()
    assert {kind.__name__ for kind in recipes} - listed.keys() == {"OptimizerRecipe", "GroupedRecipe", "Named"}
    assert {kind for kind in recipes if kind.source == "torch"} - {type(recipe) for recipe in RECIPES} == {optim.GroupedRecipe, optim.Muon}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.SGD(lr=-1), "`lr` must lie in [0, ∞), got -1."),
        (lambda: optim.SGD(lr="0.1"), "`lr` must lie in [0, ∞), got '0.1'."),
        (lambda: optim.SGD(lr=float("inf")), "got inf"),
        (lambda: optim.SGD(lr=float("nan")), "got nan"),
        (lambda: optim.SGD(lr=True), "got True"),
        (lambda: optim.SGD(momentum=1.5), "`momentum` must lie in [0, 1], got 1.5."),
        (lambda: optim.SGD(nesterov=True), "`nesterov=True` needs momentum > 0 and dampening = 0, got momentum=0.0"),
        (lambda: optim.SGD(momentum=0.9, nesterov=1), "`nesterov` must be one of True, False, got 1."),
        (lambda: optim.SGD(weight_decay=-0.1), "`weight_decay` must lie in [0, ∞), got -0.1."),
        (lambda: optim.Adam(betas=(0.9, 1.0)), "`betas[1]` must lie in [0, 1), got 1.0."),
        (lambda: optim.AdamW(betas=0.9), "`betas` must be two numbers, in [0, 1) and [0, 1), got 0.9."),
        (lambda: optim.AdamW(betas=(0.9, 0.99, 0.999)), "`betas` must be two numbers"),
        (lambda: optim.Adam(eps=-1e-8), "`eps` must lie in [0, ∞)"),
        (lambda: optim.Rprop(etas=(0.5, 0.9)), "`etas[1]` must lie in (1, ∞), got 0.9."),
        (lambda: optim.RMSprop(alpha=1), "`alpha` must lie in [0, 1), got 1."),
        (lambda: optim.Adafactor(beta2_decay=0.1), "`beta2_decay` must lie in (-∞, 0], got 0.1."),
        (lambda: optim.Adafactor(eps=1e-3), "`eps` must be two numbers, of which the first may be None"),
        (lambda: optim.Adafactor(eps=(None, None)), "`eps[1]` must lie in [0, ∞), got None."),
        (
            lambda: optim.AdamW(decayed=["matrices"]),
            "`decayed` must be one of 'matrix', 'embedding', 'norm', 'bias', 'other', got 'matrices'.",
        ),
        (lambda: optim.AdamW(layer_decay=1.5), "`layer_decay` must lie in (0, 1], got 1.5."),
        (lambda: optim.AdamW(layers=["a"]), "`layers` is only used with `layer_decay`, got layers=['a']"),
        (lambda: optim.AdamW(layer_decay=0.5, layers=[]), "`layers` must be a glob over qualified names"),
        (lambda: optim.AdamW(overrides=["head"]), "`overrides` must map globs to options, such as {'head.*': {'lr': 0.01}}, got ['head']."),
        (lambda: optim.AdamW(overrides={"head": 0.1}), "`overrides` must map globs to options"),
        (lambda: optim.AdamW(overrides={"": {"lr": 0.1}}), "`overrides` must be a glob over qualified names"),
        (
            lambda: optim.AdamW(overrides={"head": {"lrr": 0.1}}),
            "`overrides['head']` must set options of AdamW, got 'lrr'. Did you mean 'lr'?",
        ),
        (lambda: optim.AdamW(overrides={"head": {"lr": -1}}), "`overrides['head']`: `lr` must lie in [0, ∞), got -1."),
        (lambda: optim.AdamW(implementation="loop"), "`implementation` must be one of 'fused', 'foreach', 'for-loop', None, got 'loop'."),
        (lambda: optim.RMSprop(implementation="fused"), "`implementation` must be one of 'foreach', 'for-loop', None for this optimizer"),
        (lambda: optim.LBFGS(overrides={"head": {"lr": 1.0}}), "`overrides` must be empty: LBFGS takes one group of parameters"),
        (lambda: optim.LBFGS(max_iter=0), "`max_iter` must be a whole number of at least 1, got 0."),
        (lambda: optim.LBFGS(history_size=2.5), "`history_size` must be a whole number of at least 1, got 2.5."),
        (lambda: optim.LBFGS(line_search_fn="wolfe"), "`line_search_fn` must be one of 'strong_wolfe', None, got 'wolfe'."),
    ],
)
def test_wrong_arguments_fail_in_the_constructor(make, words):
    with pytest.raises(errors.ArgumentError) as raised:
        make()
    assert words in str(raised.value)


@pytest.mark.parametrize("kind", [type(recipe) for recipe in RECIPES if not isinstance(recipe, optim.Named)])
def test_defaults_are_those_of_torch(kind):
    built = kind().build(net())
    bare = getattr(torch.optim, kind.__name__)(net().parameters())
    ours = {key: value for key, value in built.defaults.items() if key not in {"foreach", "fused"}}
    assert ours == {key: bare.defaults[key] for key in ours}


def test_lists_become_tuples():
    recipe = optim.AdamW(betas=[0.8, 0.9], decayed=["matrix"], layer_decay=0.5, layers=["0", "*"], overrides={"0": {"betas": [0.1, 0.2]}})
    assert (recipe.betas, recipe.decayed, recipe.layers, recipe.overrides["0"]["betas"]) == (
        (0.8, 0.9),
        ("matrix",),
        ("0", "*"),
        (0.1, 0.2),
    )


# As optimizers


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize(
    ("recipe", "literal"),
    [
        (optim.SGD(0.1, momentum=0.9, weight_decay=0.1), lambda decay: reference.SGD(lr=0.1, momentum=0.9, weight_decay=decay)),
        (
            optim.AdamW(0.01, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1),
            lambda decay: reference.AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-4, weight_decay=decay),
        ),
    ],
    ids=["SGD", "AdamW"],
)
def test_steps_are_those_of_the_formula_with_decay_on_matrices_only(recipe, literal, implementation):
    model = net()
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    optimizer = type(recipe)(**{**values, "implementation": implementation}).build(model)
    literals = {name: literal(0.1 if name in {"0.weight", "2.weight"} else 0.0) for name, _ in model.named_parameters()}
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for _ in range(50):
        optimizer.zero_grad()
        loss_of(model).backward()
        expected = {name: literals[name].step(expected[name], parameter.grad.double()) for name, parameter in model.named_parameters()}
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=2e-4, atol=2e-6)


def test_a_recipe_equals_the_bare_optimizer_to_the_bit():
    ours, theirs = net(), net()
    matrices = [theirs[0].weight, theirs[2].weight]
    others = [theirs[0].bias, *theirs[1].parameters(), theirs[2].bias]
    bare = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0}], lr=1e-2, weight_decay=0.1, fused=True)
    built = optim.AdamW(1e-2, weight_decay=0.1).build(ours)
    assert all(map(torch.equal, train(ours, built, 20), train(theirs, bare, 20)))


def kernels(optimizer) -> tuple[object, object]:
    return optimizer.param_groups[0].get("fused"), optimizer.param_groups[0].get("foreach")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (optim.SGD(), (True, None)),
        (optim.Adagrad(), (True, None)),
        (optim.RMSprop(), (None, None)),
        (optim.Named("torch:adamw"), (True, None)),
        (optim.AdamW(implementation="fused"), (True, False)),
        (optim.AdamW(implementation="foreach"), (False, True)),
        (optim.AdamW(implementation="for-loop"), (False, False)),
        (optim.RAdam(implementation="for-loop"), (None, False)),
    ],
)
def test_kernels_are_fused_where_that_is_possible_and_can_be_forced(recipe, expected):
    assert kernels(recipe.build(net())) == expected


def test_kernels_are_not_fused_where_they_would_fail():
    sparse = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    optimizer = optim.SGD().build(sparse)
    assert kernels(optimizer) == (None, None)
    sparse(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert kernels(optim.SGD().build(nn.LazyLinear(2))) == (None, None)
    assert kernels(optim.AdamW().build(nn.Linear(2, 2, device="meta"))) == (None, None)
    assert kernels(optim.AdamW().build(nn.Linear(2, 2, dtype=torch.complex64))) == (None, None)
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64).requires_grad_(requires_grad=False))
    assert kernels(optim.AdamW().build(frozen)) == (True, None)


def test_an_optimizer_of_ones_own_is_a_recipe_in_three_lines():
    @dataclass(frozen=True, repr=False)
    class Adamax(optim.GroupedRecipe):
        lr: float = 2e-3
        weight_decay: float = 0.1

    assert [len(group["params"]) for group in Adamax().build(net()).param_groups] == [2, 4]
    with pytest.raises(errors.ArgumentError, match="`lr` must lie in"):
        Adamax(lr=-1)
    assert repr(Adamax(1.0, layer_decay=0.5)).endswith("Adamax(lr=1.0, layer_decay=0.5)")
