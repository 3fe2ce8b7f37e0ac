"""Wrapping optimizers on plain modules: their formulas, and all that others expect of an optimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from contracts.harness import assert_equal, weights
from lightning_tricks import errors, optim
from lightning_tricks.optimization._wrapping import layers_of
from reference import wrappers as reference

WRAPPERS = {
    "SAM": lambda recipe: optim.SAM(recipe, rho=0.1),
    "ASAM": lambda recipe: optim.SAM(recipe, rho=0.5, adaptive=True),
    "Lookahead": lambda recipe: optim.Lookahead(recipe, k=3),
    "ClipNorm": lambda recipe: optim.ClipNorm(recipe, max_norm=0.3),
    "ClipValue": lambda recipe: optim.ClipValue(recipe, max_value=0.01),
    "AdaptiveGradientClipping": lambda recipe: optim.AdaptiveGradientClipping(recipe, max_ratio=0.1, exclude="2"),
    "GradientCentralization": optim.GradientCentralization,
    "GradientNoise": lambda recipe: optim.GradientNoise(recipe, eta=0.1),
    "ScheduleFree": optim.ScheduleFree,
    "nested": lambda recipe: optim.ClipNorm(optim.SAM(optim.Lookahead(optim.GradientCentralization(recipe), k=2)), max_norm=1.0),
}
every = pytest.mark.parametrize(
    "wrap", [pytest.param(wrap, marks=pytest.mark.full if name == "ScheduleFree" else (), id=name) for name, wrap in WRAPPERS.items()]
)
BASES = [optim.SGD(lr=0.1, momentum=0.9), optim.AdamW(lr=0.01), optim.AdamW(lr=0.01, implementation="foreach")]


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int):
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

    def closure():
        optimizer.zero_grad()
        loss = (model(data) - data[:, :3]).square().mean()
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, first: int = 0):
    losses = []
    for step in range(first, first + steps):
        loss = optimizer.step(closure_of(model, optimizer, step))
        losses.append(loss.item())
    return losses


def descend(wrap, gradient, start, steps, *, lr=0.1, dtype=torch.float64):
    """Take steps of plain gradient descent, wrapped, on a function given by its gradient."""
    model = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        model.weight.copy_(start[0])
        model.bias.copy_(start[1])
    optimizer = wrap(optim.SGD(lr=lr)).build(model)

    def closure():
        optimizer.zero_grad()
        model.weight.grad, model.bias.grad = (g.to(dtype) for g in gradient([model.weight.detach(), model.bias.detach()]))
        return torch.tensor(0.0)

    for _ in range(steps):
        optimizer.step(closure)
    return [model.weight.detach(), model.bias.detach()]


def gradient(point):
    w, b = (each.double() for each in point)
    return [torch.sin(3 * w) + w, torch.cos(b) + 2 * b + w.sum()]


START = [torch.linspace(-1, 2, 6).reshape(2, 3).double(), torch.tensor([0.5, -0.25]).double()]


# The formulas


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_follows_its_paper(adaptive):
    got = descend(lambda recipe: optim.SAM(recipe, rho=0.3, adaptive=adaptive), gradient, START, 20)
    wanted = (reference.asam if adaptive else reference.sam)(START, gradient, lr=0.1, rho=0.3, steps=20)
    torch.testing.assert_close(got, wanted)
    plain = descend(lambda recipe: recipe, gradient, START, 20)
    assert not torch.allclose(got[0], plain[0])


@pytest.mark.parametrize(("k", "alpha", "steps"), [(5, 0.5, 23), (1, 0.8, 10), (6, 1.0, 12)])
def test_lookahead_follows_its_paper(k, alpha, steps):
    got = descend(lambda recipe: optim.Lookahead(recipe, k=k, alpha=alpha), gradient, START, steps)
    torch.testing.assert_close(got, reference.lookahead(START, gradient, lr=0.1, k=k, alpha=alpha, steps=steps))


def test_the_first_synchronization_of_lookahead_counts():
    """Of twelve steps of one each, the paper keeps six; where the first synchronization does nothing, it would be nine."""
    got = descend(lambda recipe: optim.Lookahead(recipe, k=6, alpha=0.5), lambda _: [-torch.ones(2, 3), -torch.ones(2)], START, 12, lr=1.0)
    torch.testing.assert_close(got[0], START[0] + 6)


def test_adaptive_clipping_follows_its_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3))
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [torch.randn_like(p) * 10.0 ** (i - 3) for i, p in enumerate(before)]
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g.clone()
    optim.AdaptiveGradientClipping(optim.SGD(lr=1.0), max_ratio=0.05, exclude="2").build(model).step()
    for i, (p, w, g) in enumerate(zip(model.parameters(), before, gradients, strict=True)):
        wanted = g.double() if i >= 4 else reference.adaptively_clipped(w, g, max_ratio=0.05, eps=1e-3)
        torch.testing.assert_close(w - p, wanted.float(), atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_centralization_follows_its_paper_on_matrices_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(1, 3), nn.Linear(3, 1), nn.Embedding(5, 2))
    gradients = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g.clone()
    optim.GradientCentralization(optim.SGD(lr=1.0)).build(model).step()
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        wanted = reference.centralized(g).float() if name in {"0.weight", "3.weight"} else g
        torch.testing.assert_close(p.grad, wanted)


def test_units_of_a_transposed_convolution_are_its_outputs():
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 3, bias=False))
    model[0].weight.grad = g = torch.randn(2, 4, 3, 3)
    wanted = g - g.mean(dim=(0, 2, 3), keepdim=True)
    optim.GradientCentralization(optim.SGD(lr=1.0)).build(model).step()
    torch.testing.assert_close(model[0].weight.grad, wanted)


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_clipping_the_norm_equals_torchs(order):
    model, twin = make(), make()
    optimizer, plain = optim.ClipNorm(optim.SGD(lr=0.5), max_norm=0.1, order=order).build(model), torch.optim.SGD(twin.parameters(), lr=0.5)
    for step in range(5):
        optimizer.step(closure_of(model, optimizer, step))
        closure_of(twin, plain, step)()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1, order)
        plain.step()
    assert_equal(weights(model), weights(twin))


def test_clipping_values_equals_torchs():
    model, twin = make(), make()
    optimizer, plain = optim.ClipValue(optim.SGD(lr=0.5), max_value=0.01).build(model), torch.optim.SGD(twin.parameters(), lr=0.5)
    for step in range(5):
        closure_of(model, optimizer, step)()
        optimizer.step()
        closure_of(twin, plain, step)()
        torch.nn.utils.clip_grad_value_(twin.parameters(), 0.01)
        plain.step()
    assert_equal(weights(model), weights(twin))


# Schedule-free


@pytest.mark.full
def test_schedule_free_follows_its_paper():
    def step(z, g):
        return [a - 0.1 * b for a, b in zip(z, g, strict=True)]

    x, y = reference.schedule_free(START, gradient, step, beta=0.8, steps=20)
    torch.testing.assert_close(descend(lambda recipe: optim.ScheduleFree(recipe, momentum=0.8), gradient, START, 20), y)
    model = nn.Linear(3, 2).double()
    optimizer = optim.ScheduleFree(optim.SGD(lr=0.1), momentum=0.8).build(model)
    with torch.no_grad():
        for p, w in zip(model.parameters(), START, strict=True):
            p.copy_(w)
    for _ in range(20):
        model.weight.grad, model.bias.grad = gradient([model.weight.detach(), model.bias.detach()])
        optimizer.step()
    optimizer.eval()
    torch.testing.assert_close([p.detach() for p in model.parameters()], x)


@pytest.mark.full
@pytest.mark.parametrize(
    ("recipe", "name", "options"),
    [
        (optim.SGD(lr=0.1, momentum=0.8), "SGDScheduleFree", {"lr": 0.1, "momentum": 0.8}),
        (optim.Adam(lr=0.01), "AdamWScheduleFree", {"lr": 0.01}),
        (optim.RAdam(lr=0.01), "RAdamScheduleFree", {"lr": 0.01}),
        (optim.AdamW(lr=0.01, betas=(0.8, 0.99), weight_decay=0.0), "AdamWScheduleFree", {"lr": 0.01, "betas": (0.8, 0.99)}),
    ],
    ids=repr,
)
def test_schedule_free_equals_the_package(recipe, name, options):
    import schedulefree

    model, twin = make(), make()
    optimizer, other = optim.ScheduleFree(recipe).build(model), getattr(schedulefree, name)(twin.parameters(), **options)
    other.train()
    assert train(model, optimizer, 20) == train(twin, other, 20)
    assert_equal(weights(model), weights(twin))
    optimizer.eval()
    other.eval()
    assert_equal(weights(model), weights(twin))


@pytest.mark.full
def test_decay_of_groups_reaches_the_package():
    optimizer = optim.ScheduleFree(optim.AdamW(lr=0.01, weight_decay=0.1)).build(make())
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]


class Descent(torch.optim.Optimizer):
    """An optimizer that ScheduleFree does not know."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=group["lr"])


class Other(optim.OptimizerRecipe):
    """A recipe of an optimizer given by its class."""

    def __init__(self, kind, lr):
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "lr", lr)

    def build(self, model):
        return self.kind(model.parameters(), lr=self.lr)

    def groups(self, model):
        return []


@pytest.mark.full
def test_any_other_optimizer_becomes_schedule_free_as_the_packages_wrapper_makes_it():
    import schedulefree

    model, twin = make(), make()
    optimizer = optim.ScheduleFree(Other(Descent, 0.1)).build(model)
    other = schedulefree.ScheduleFreeWrapper(Descent(twin.parameters(), lr=0.1), momentum=0.9)
    other.train()
    assert train(model, optimizer, 20) == train(twin, other, 20)
    assert_equal(weights(model), weights(twin))
    other.eval()
    optimizer.eval()
    assert_equal(weights(model), weights(twin))


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.Adadelta])
def test_optimizers_that_make_their_state_at_the_first_step_become_schedule_free(kind):
    """The package's own wrapper fails with a KeyError for most of these."""
    model, optimizer = (model := make()), optim.ScheduleFree(Other(kind, 0.01)).build(model)
    plain_model = make()
    plain, y, x = kind(plain_model.parameters(), lr=0.01), list(make().parameters()), list(make().parameters())
    for step in range(10):
        optimizer.step(closure_of(model, optimizer, step))
        with torch.no_grad():  # literally: the gradient at y moves z
            z = [p.clone() for p in plain_model.parameters()]
            for p, each in zip(plain_model.parameters(), y, strict=True):
                p.copy_(each)
        closure_of(plain_model, plain, step)()
        with torch.no_grad():
            for p, each in zip(plain_model.parameters(), z, strict=True):
                p.copy_(each)
        plain.step()
        with torch.no_grad():
            x = [a + (b - a) / (step + 1) for a, b in zip(x, plain_model.parameters(), strict=True)]
            y = [0.9 * a + 0.1 * b for a, b in zip(x, plain_model.parameters(), strict=True)]
    torch.testing.assert_close([p.detach() for p in model.parameters()], [each.detach() for each in y])
    optimizer.eval()
    torch.testing.assert_close([p.detach() for p in model.parameters()], [each.detach() for each in x])


@pytest.mark.full
@pytest.mark.parametrize(
    "recipe", [optim.SGD(lr=0.1), optim.AdamW(lr=0.01), Other(torch.optim.RMSprop, 0.01)], ids=["SGD", "AdamW", "RMSprop"]
)
def test_evaluating_in_between_changes_nothing(recipe):
    """The package comes back from the average by arithmetic, which rounds."""
    model, twin = make(), make()
    optimizer, other = (optim.ScheduleFree(recipe).build(each) for each in (model, twin))
    for step in range(10):
        train(model, optimizer, 1, step)
        train(twin, other, 1, step)
        other.eval()
        other.eval()
        assert not torch.equal(twin[0].weight, model[0].weight) or step == 0
        with pytest.raises(errors.TrickError, match=r"Call `optimizer.train\(\)` first"):
            other.step()
        other.train()
        assert_equal(weights(model), weights(twin))


# What everybody expects of an optimizer


@every
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_shares_groups_state_and_defaults_with_the_optimizer_inside(wrap, base):
    model = make()
    optimizer = wrap(base).build(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, 3)
    for layer in layers_of(optimizer):
        assert layer.param_groups is optimizer.param_groups
        assert layer.state is optimizer.state
        assert layer.defaults is optimizer.defaults
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    rate = optimizer.param_groups[0]["lr"]
    train(model, optimizer, 1)
    scheduler.step()
    assert [layer.param_groups[0]["lr"] for layer in layers_of(optimizer)] == [rate / 2] * len(list(layers_of(optimizer)))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@every
@pytest.mark.filterwarnings("error")
def test_works_with_schedulers_that_cycle_momentum(wrap):
    model = make()
    optimizer = wrap(optim.SGD(lr=0.1, momentum=0.9)).build(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
    for step in range(5):
        train(model, optimizer, 1, step)
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] != 0.9


@every
def test_step_hooks_fire_once_for_each_step(wrap):
    model = make()
    optimizer = wrap(optim.SGD(lr=0.1, momentum=0.9)).build(model)
    calls = []
    optimizer.register_step_pre_hook(lambda stepped, *_: calls.append(("before", stepped)))
    optimizer.register_step_post_hook(lambda stepped, *_: calls.append(("after", stepped)))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, 2)
    assert calls == [("before", optimizer), ("after", optimizer)] * 2


@every
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_goes_on_from_a_state_dict(wrap, base, tmp_path):
    model = make()
    optimizer = wrap(base).build(model)
    train(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 4, 4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make(seed=1)
    resumed = wrap(base).build(again)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, 4, 4)
    assert_equal(weights(again), weights(model))


@every
def test_copies_and_pickles_go_on_like_the_original(wrap):
    model = make()
    optimizer = wrap(optim.AdamW(lr=0.01)).build(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which replaces `step`
    train(model, optimizer, 4)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]  # noqa: S301
    train(model, optimizer, 4, 4)
    for again, resumed in copies:
        assert resumed.param_groups[0]["params"][0] is next(
            p for p in again.parameters() if p.shape == resumed.param_groups[0]["params"][0].shape
        )
        train(again, resumed, 4, 4)
        assert_equal(weights(again), weights(model))


@every
def test_state_dict_hooks_belong_to_the_wrapper(wrap):
    optimizer, seen = wrap(optim.SGD(lr=0.1)).build(make()), []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state.pop("more")))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before saving", 1, "after loading"]


@every
def test_state_is_empty_before_the_first_step(wrap):
    """By this, torch's distributed checkpoints know that the state must be made before it can be loaded."""
    assert not wrap(optim.AdamW(lr=0.01)).build(make()).state


@every
def test_parameters_can_join_later(wrap):
    model, late = make(), nn.Parameter(torch.ones(3))
    optimizer = wrap(optim.SGD(lr=0.1, momentum=0.9)).build(model)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": [late]})

    def closure():
        loss = closure_of(model, optimizer, 7)()
        late.sum().backward()
        return loss

    for _ in range(7):
        optimizer.step(closure)
    assert (late < 1).all()


@every
def test_parameters_without_a_gradient_stay_and_start_when_they_get_one(wrap):
    model = make()
    optimizer = wrap(optim.AdamW(lr=0.01)).build(model)
    before, body = weights(model), model[0].weight

    def closure():
        optimizer.zero_grad()
        loss = model[2](torch.ones(2, 8)).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert torch.equal(body, before["0.weight"])
    train(model, optimizer, 4)
    assert not torch.equal(body, before["0.weight"])


@every
def test_repr_evaluates_back_and_the_recipe_pickles(wrap):
    recipe = wrap(optim.SGD(lr=0.1))
    assert eval(repr(recipe), vars(optim)) == recipe  # noqa: S307
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301
    assert [group.names for group in recipe.groups(make())] == [group.names for group in optim.SGD(lr=0.1).groups(make())]


@pytest.mark.parametrize("wrap", [wrap for name, wrap in WRAPPERS.items() if name not in {"SAM", "ASAM", "nested", "ScheduleFree"}])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_gradient_scaler_skips_steps_with_infinite_gradients_and_unscales_the_others(wrap, implementation):
    """Fused optimizers would unscale and skip inside their kernel; wrapped, they leave it to the scaler."""
    model, twin = make(), make()
    optimizer, plain = (wrap(optim.SGD(lr=0.1, momentum=0.9, implementation=implementation)).build(each) for each in (model, twin))
    scaler, steps = torch.amp.GradScaler("cpu", init_scale=2.0**8), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for step in range(6):
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale((model(data) - data[:, :3]).square().mean()).backward()
        if step == 3:
            model[0].weight.grad.fill_(float("inf"))
        else:
            closure_of(twin, plain, step)()
            plain.step()
        scaler.step(optimizer)
        scaler.update()
    assert len(steps) == 5
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[name])


# SAM's closure


def test_sam_returns_the_first_loss_and_keeps_statistics_masks_and_random_state_of_one_evaluation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.5), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    optimizer, plain = optim.SAM(optim.SGD(lr=0.1), rho=0.0).build(model), optim.SGD(lr=0.1).build(twin)
    for build, module in ((optimizer, model), (plain, twin)):
        torch.manual_seed(1)
        module.losses, module.random = train(module, build, 5), torch.rand(3)
    assert model.losses == twin.losses
    assert torch.equal(model.random, twin.random)
    assert_equal(weights(model), weights(twin))  # running statistics and their count among them


def test_sam_evaluates_at_the_perturbed_point_and_returns_exactly():
    model = make().to(torch.bfloat16)
    optimizer = optim.SAM(optim.SGD(lr=0.0), rho=10.0).build(model)
    before, seen = weights(model), []

    def closure():
        seen.append(weights(model))
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4, dtype=torch.bfloat16)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) == 2
    assert not torch.equal(seen[0]["0.weight"], seen[1]["0.weight"])
    assert_equal(weights(model), before)


def test_weights_return_when_the_second_evaluation_fails():
    model = make()
    optimizer = optim.SAM(optim.SGD(lr=0.1), rho=0.1).build(model)
    before, calls = weights(model), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure_of(model, optimizer, 0)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_equal(weights(model), before)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_sam_refuses_closures_that_accumulate(by, set_to_none):
    model = make()
    optimizer = optim.SAM(optim.SGD(lr=0.1)).build(model)
    data = torch.ones(2, 4)

    def closure():
        loss = model(data).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # there was nothing to add to
    with pytest.raises(errors.UnsupportedOptimizerError, match="must clear the gradients and compute them anew"):
        optimizer.step(closure)
    if by == "optimizer" or set_to_none:
        owner = optimizer if by == "optimizer" else model
        optimizer.step(lambda: (owner.zero_grad(set_to_none=set_to_none), closure())[1])


def test_sam_refuses_steps_without_a_closure_unless_there_is_nothing_to_climb():
    model = make()
    optimizer = optim.SAM(optim.SGD(lr=0.1)).build(model)
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    closure_of(model, optimizer, 0)()
    before = weights(model)
    with pytest.raises(errors.UnsupportedOptimizerError, match="SAM needs a closure"):
        optimizer.step()
    assert_equal(weights(model), before)


# Refusals


@pytest.mark.parametrize(
    ("make_recipe", "words"),
    [
        (lambda: optim.SAM(optim.SGD(), rho=-1.0), "`rho` must lie in [0, ∞), got -1.0."),
        (lambda: optim.SAM(optim.SGD(), adaptive=1), "`adaptive` must be one of True, False, got 1."),
        (lambda: optim.SAM(torch.optim.SGD), "`recipe` must be a recipe such as `optim.SGD(lr=0.1)`"),
        (lambda: optim.SAM(optim.ClipNorm(optim.SAM(optim.SGD()))), "SAM cannot wrap SAM: one of them"),
        (lambda: optim.Lookahead(optim.SGD(), k=0), "`k` must be a whole number of at least 1, got 0."),
        (lambda: optim.Lookahead(optim.SGD(), k=2.5), "got 2.5"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=0.0), "`alpha` must lie in (0, 1], got 0.0."),
        (lambda: optim.Lookahead(optim.Lookahead(optim.SGD())), "Lookahead cannot wrap Lookahead"),
        (lambda: optim.Lookahead(optim.SAM(optim.ScheduleFree(optim.SGD()))), "Lookahead cannot wrap ScheduleFree"),
        (lambda: optim.ScheduleFree(optim.SAM(optim.SGD())), "ScheduleFree must be the innermost wrapper, got SAM inside it."),
        (lambda: optim.ScheduleFree(optim.SGD(), momentum=1.0), "`momentum` must lie in (0, 1), got 1.0."),
        (lambda: optim.ClipNorm(optim.SGD(), max_norm=0.0), "`max_norm` must lie in (0, ∞), got 0.0."),
        (lambda: optim.ClipNorm(optim.SGD(), order=0.0), "`order` must lie in (0, ∞), got 0.0."),
        (lambda: optim.ClipValue(optim.SGD(), max_value=-1), "`max_value` must lie in (0, ∞), got -1."),
        (lambda: optim.AdaptiveGradientClipping(optim.SGD(), max_ratio=0), "`max_ratio` must lie in (0, ∞), got 0."),
        (lambda: optim.AdaptiveGradientClipping(optim.SGD(), eps=0), "`eps` must lie in (0, ∞), got 0."),
        (lambda: optim.GradientCentralization(optim.SGD(), where=""), "`where` must be a glob"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(make_recipe, words):
    with pytest.raises(errors.ArgumentError) as raised:
        make_recipe()
    assert words in str(raised.value)


@every
def test_lbfgs_is_refused(wrap):
    with pytest.raises(errors.UnsupportedOptimizerError, match="cannot wrap LBFGS"):
        wrap(Other(torch.optim.LBFGS, 1.0)).build(make())


@pytest.mark.full
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (optim.SGD(lr=0.1, momentum=0.9, nesterov=True), "no `nesterov`"),
        (optim.Adam(lr=0.1, amsgrad=True), "no `amsgrad`"),
        (optim.Adam(lr=0.1, weight_decay=0.1), "decay weights apart from the gradient"),
    ],
    ids=lambda value: "",
)
def test_what_has_no_schedule_free_counterpart_is_refused(recipe, words):
    with pytest.raises(errors.ArgumentError, match=words):
        optim.ScheduleFree(recipe).build(make())


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(errors.MissingPackageError, match=r"lightning-tricks\[optimizers\]"):
        optim.ScheduleFree(optim.SGD(lr=0.1)).build(make())


@pytest.mark.parametrize("kind", [optim.AdaptiveGradientClipping, optim.GradientCentralization])
def test_nothing_matched_is_an_error(kind):
    with pytest.raises(errors.NothingMatchedError, match=r"`where='neck'` matched none"):
        kind(optim.SGD(lr=0.1), where="neck").build(make())


def test_centralization_without_matrices_is_an_error():
    with pytest.raises(errors.NothingMatchedError, match="none of the 2 parameters of LayerNorm"):
        optim.GradientCentralization(optim.SGD(lr=0.1)).build(nn.LayerNorm(3))


@pytest.mark.parametrize("wrapper", [optim.AdaptiveGradientClipping, optim.GradientCentralization])
def test_lazy_parameters_whose_units_nobody_knows_yet_are_refused(wrapper):
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    recipe = wrapper(optim.SGD(lr=0.1))
    with pytest.raises(errors.UnsupportedOptimizerError, match=r"the shape of '0.weight' tells, and it is lazy"):
        recipe.build(model)
    model(torch.zeros(1, 4))
    assert recipe.build(model).units
