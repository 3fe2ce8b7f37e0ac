"""Branches of blocks, each dropped by itself: formulas, which branches, what is computed, scaling in evaluation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tricks import errors
from lightning_tricks.functional import apply_stochastic_depth, remove_stochastic_depth
from reference import stochastic_depth as reference


class Work(nn.Sequential):
    """The work of a branch, which notes how many rows it does."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh())
        self.seen: list[int] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.device.type != "meta":
            self.seen.append(len(x))
        x = super().forward(x)
        return x if mask is None else x * mask


class Layer(nn.Module):
    """Written as a layer of a transformer is, with places where branches end."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(width), Work(width), nn.Identity()
        self.norm2, self.mlp, self.drop_path2 = nn.LayerNorm(width), Work(width), nn.Identity()
        self.gamma = nn.Parameter(torch.full((width,), 1.5))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.gamma * self.attn(self.norm1(x), mask))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SharedPlace(Layer):
    """One place for both branches, as in Swin of torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = nn.Identity()
        del self.drop_path1, self.drop_path2

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.gamma * self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Bare(Layer):
    """No places at all, and a tuple from one of the branches, as in GPT-2 of transformers."""

    def __init__(self) -> None:
        super().__init__()
        del self.drop_path1, self.drop_path2, self.gamma
        self.attn = Attention()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)[0]
        return x + self.mlp(self.norm2(x))


class Attention(Work):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = super().forward(x, mask)
        return y, y.sum(-1)


def make(kind: type[nn.Module] = Layer, count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(count))).double()


def images(batch: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def watch(*modules: nn.Module) -> list[list[bool]]:
    """Note which rows each module gives that are not zero."""
    seen: list[list[bool]] = []
    for module in modules:
        module.register_forward_hook(lambda _, __, output: seen.append(output.flatten(1).any(1).tolist()))
    return seen


def set_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Work):
            module.seen.clear()


@pytest.mark.parametrize("kind", [Layer, SharedPlace])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_outputs_and_gradients_equal_those_of_a_masked_dense_computation(kind, batch):
    layers = make(kind)
    twin = copy.deepcopy(layers)
    report = apply_stochastic_depth(layers, 0.5)
    rates = reference.rates(0.5, 3)
    assert list(report.rates.values()) == pytest.approx(rates)
    ends = ["drop_path1", "drop_path2"] if kind is Layer else ["drop_path", "drop_path"]
    assert report.branches == dict.fromkeys("012", ends)
    seen = watch(*(layer.get_submodule(end) for layer in layers for end in dict.fromkeys(ends)))
    effective = [min(rate, 1 - 1 / batch) for rate in rates for _ in ends]  # one sample survives
    branches = [branch for layer in twin for branch in (
        lambda x, layer=layer: layer.gamma * layer.attn(layer.norm1(x)), lambda x, layer=layer: layer.mlp(layer.norm2(x)))]  # fmt: skip
    for step in range(4):
        seen.clear()
        x = images(batch, step)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        output = layers(inputs[0])
        expected = reference.branches(branches, inputs[1], effective, seen)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(out.square().sum(), [x, *model.parameters()]) for out, x, model in
                     ((output, inputs[0], layers), (expected, inputs[1], twin))]  # fmt: skip
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert all(any(alive) for alive in seen)


def test_what_is_dropped_is_not_computed_and_branches_draw_by_themselves():
    layers = make()
    apply_stochastic_depth(layers, 0.5, growth="uniform")
    seen = watch(*(place for layer in layers for place in (layer.drop_path1, layer.drop_path2)))
    layers(images())
    assert all(work.seen == [4] for work in layers.modules() if isinstance(work, Work))
    assert len(seen) == 6
    assert len({tuple(alive) for alive in seen}) > 3


def test_a_model_that_is_named_by_blocks_is_dropped_by_blocks():
    layers = make()
    report = apply_stochastic_depth(layers, 0.5, growth="uniform", where="?")
    assert report.branches == {}
    x = images()
    y = layers[0](x)
    assert sum(not torch.equal(before, after) for before, after in zip(x, y, strict=True)) == 4


@pytest.mark.parametrize(
    ("kind", "where", "rates", "computed"),
    [
        (Layer, "drop_path2", {"0.drop_path2": 0.25, "1.drop_path2": 0.5}, {"attn": 8, "mlp": 4}),
        (Layer, ["attn", "mlp"], {"0.attn": 0.25, "0.mlp": 0.25, "1.attn": 0.5, "1.mlp": 0.5}, {"attn": 4, "mlp": 4}),
        (Bare, "attn", {"0.attn": 0.25, "1.attn": 0.5}, {"attn": 4, "mlp": 8}),
    ],
)
def test_branches_are_named(kind, where, rates, computed):
    layers = make(kind, 2)
    report = apply_stochastic_depth(layers, 0.5, where=where)
    assert report.rates == rates
    plain = copy.deepcopy(layers)
    remove_stochastic_depth(plain)
    set_off(layers)
    x = images()
    y = layers[1](x)
    assert {name: layers[1].get_submodule(name).seen[0] for name in ("attn", "mlp")} == computed
    assert not torch.equal(y, plain[1](x))
    assert torch.equal(layers.eval()(x), plain.eval()(x))


def test_a_further_tensor_of_the_batch_reaches_the_branch():
    mask = torch.arange(8.0, dtype=torch.float64)[:, None] + 1
    for kind, where in ((Layer, None), (Layer, "attn"), (Bare, "attn")):
        layers = make(kind, 1)
        apply_stochastic_depth(layers, 0.5, growth="uniform", where=where, exclude=())
        layer, x = layers[0], images()
        branch = []
        layer.norm2.register_forward_pre_hook(lambda _, given, branch=branch: branch.append(given[0]))
        layer(x, mask)
        change = branch[0] - x
        alive = change.any(1)
        assert alive.sum() == 4
        work = nn.Sequential.forward(layer.attn, layer.norm1(x)) * mask * getattr(layer, "gamma", 1)
        torch.testing.assert_close(change[alive], 2 * work[alive])


def test_branches_begin_where_the_rows_of_survivors_suffice():
    class Parallel(Layer):
        def forward(self, x, mask=None):
            y = self.norm1(x)
            return x + self.drop_path1(self.attn(y)) + self.drop_path2(self.mlp(y))

    class Entangled(Layer):
        def forward(self, x, mask=None):
            y = self.attn(self.norm1(x))
            return x + self.drop_path1(y) + self.drop_path2(self.mlp(self.norm2(y)))

    layers = make(Parallel)
    assert len(apply_stochastic_depth(layers, 0.5, growth="uniform").branches) == 3
    set_off(layers)
    layers(images())
    assert all(work.seen == [4] for work in layers.modules() if isinstance(work, Work))
    report = apply_stochastic_depth(make(Entangled), 0.5)
    assert list(report.rates) == ["0", "1", "2"]
    assert report.branches == {}
    with pytest.raises(errors.NothingMatchedError, match="needs the surviving samples alone; name the block"):
        apply_stochastic_depth(make(Entangled), 0.5, where="drop_path1")


def test_by_batch_branches_are_not_dropped_and_blocks_are():
    assert apply_stochastic_depth(make(), 0.5, mode="batch").branches == {}
    with pytest.raises(errors.NothingMatchedError, match="dropped by sample; pass `mode='sample'`, or name the block"):
        apply_stochastic_depth(make(), 0.5, mode="batch", where="drop_path?")


def test_own_layers_that_drop_are_switched_off_on_the_same_branch_alone():
    class DropPath(nn.Identity):
        drop_prob = 0.3

    layers = make(count=1)
    layers[0].drop_path1, layers[0].drop_path2 = DropPath(), DropPath()
    apply_stochastic_depth(layers, 0.5, where="drop_path2")
    assert [layers[0].drop_path1.drop_prob, layers[0].drop_path2.drop_prob] == [0.3, 0.0]
    apply_stochastic_depth(layers, 0.5)
    assert [layers[0].drop_path1.drop_prob, layers[0].drop_path2.drop_prob] == [0.0, 0.0]
    remove_stochastic_depth(layers)
    assert [layers[0].drop_path1.drop_prob, layers[0].drop_path2.drop_prob] == [0.3, 0.3]


def test_removing_restores_and_copies_drop_by_themselves():
    for kind, where in ((Layer, None), (Bare, "attn")):
        layers = make(kind)
        before = [list(vars(module)) for module in layers.modules()]
        apply_stochastic_depth(layers, 0.5, where=where)
        twins = [copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))]  # noqa: S301
        x = images()
        expected = layers(x)
        for twin in twins:
            assert torch.equal(twin(x), expected)
            remove_stochastic_depth(twin)
            assert [list(vars(module)) for module in twin.modules()] == before
        apply_stochastic_depth(layers, 0.5, where=where)
        assert torch.equal(layers(x), expected)


def test_recomputing_draws_the_same():
    layers = make()
    apply_stochastic_depth(layers, 0.5)
    twin = copy.deepcopy(layers)
    x = images()
    layers(x).square().sum().backward()
    twin._forward_pre_hooks[next(iter(twin._forward_pre_hooks))](twin, None)  # the hook that draws anew, which no block runs
    y = x.requires_grad_()
    for layer in twin:
        y = checkpoint(layer, y, use_reentrant=False)
    y.square().sum().backward()
    for one, other in zip(layers.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_compiles_whole_to_the_same_numbers():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    class Quiet(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x + self.drop_path1(self.attn(self.norm1(x)))
            return x + self.drop_path2(self.mlp(self.norm2(x)))

    model = make(Quiet)
    apply_stochastic_depth(model, 0.4, growth="uniform")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(4):
        torch.testing.assert_close(compiled(images(seed=step)), model(images(seed=step)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# Which blocks


def test_blocks_are_given_what_the_model_gives_them():
    class Sized(Layer):
        def forward(self, x, size):
            assert isinstance(size, int)
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Linear(3, 6), nn.ModuleList([Sized(), Sized()])

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, len(x))
            return x

    report = apply_stochastic_depth(Model(), 0.5)
    assert report.rates == {"blocks.0": 0.25, "blocks.1": 0.5}


def test_inner_blocks_are_dropped_if_they_are_all_of_the_outer_one():
    class Outer(nn.Module):
        def __init__(self, *, more: bool):
            super().__init__()
            self.first, self.second = Layer(), Layer()
            self.work = Work() if more else None

        def forward(self, x):
            x = self.second(self.first(x))
            return x if self.work is None else x + self.work(x)

    report = apply_stochastic_depth(nn.Sequential(Outer(more=False), Outer(more=True)), 0.6)
    assert list(report.rates) == ["0.first", "0.second", "1"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: torch.relu(self.norm(x) + self.conv(x)), "its input is normalized before it is added"),
        (lambda self, x: self.conv(x), "its input is not added to its output"),
        (lambda self, x: torch.cat([x, self.conv(x)], 1), r"it changes the shape \(6×8×8 to 12×8×8\)"),
    ],
)
def test_says_why_blocks_cannot_be_dropped(forward, reason):
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(width), nn.Sequential(nn.Conv2d(width, 6, 1))

    Block.forward = forward
    blocks = nn.Sequential(nn.Conv2d(3, 6, 28, stride=28), Block(6))
    with pytest.raises(errors.NothingMatchedError, match=f"'1': {reason}"):
        apply_stochastic_depth(blocks, 0.5)


def test_streams_beside_the_first_are_not_dropped():
    class Two(Layer):
        def forward(self, x, y):
            return super().forward(x), y + self.mlp(x)

    class Model(nn.ModuleList):
        def forward(self, x):
            y = x = self[0](x)
            for block in list(self)[1:]:
                x, y = block(x, y)
            return x + y

    with pytest.raises(errors.NothingMatchedError, match="'1': it carries more than one tensor on"):
        apply_stochastic_depth(Model([nn.Linear(6, 6), Two(), Two()]), 0.5)


def test_a_tensor_that_comes_out_as_it_went_in_keeps_all_rows():
    class Passing(Layer):
        def forward(self, x, bias):
            return super().forward(x), bias

    model = nn.ModuleList([Passing(), Passing()]).double()
    apply_stochastic_depth(model, 0.5, growth="uniform", where=["0", "1"])
    bias = torch.arange(8.0)[:, None] + 1
    assert torch.equal(model[0](images(), bias)[1], bias)


# Scaling in evaluation


@pytest.mark.parametrize("where", [None, "?"])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_scaling_in_evaluation_is_the_expectation_of_training_without_scaling(mode, where):
    layers = make(count=1)
    plain = copy.deepcopy(layers[0])
    apply_stochastic_depth(layers, 0.3, mode=mode, scaling="evaluation", where=where)
    x = images()
    draws = 3000
    outputs = torch.stack([layers(x).detach() for _ in range(draws)])
    evaluated = layers.eval()(x)
    if mode == "sample" and where is None:
        expected = x + 0.7 * plain.gamma * plain.attn(plain.norm1(x))
        expected = expected + 0.7 * plain.mlp(plain.norm2(expected))
        torch.testing.assert_close(evaluated, expected)
        alive = (outputs != x).any(-1).double().mean()
        assert abs(alive - (1 - 0.3**2)) < 5 * 0.3 / (draws * 8) ** 0.5
    else:
        torch.testing.assert_close(evaluated, x + 0.7 * (plain(x) - x))
        deviation = (plain(x) - x).abs() * (0.3 * 0.7) ** 0.5 / draws**0.5
        assert ((outputs.mean(0) - evaluated).abs() <= 5 * deviation).all()
        assert any(torch.equal(rows[0], plain(x)[0]) for rows in outputs[:50])  # survivors are not scaled
    remove_stochastic_depth(layers)
    assert torch.equal(layers(x), plain.eval()(x))


def test_scaling_in_evaluation_stays_in_the_range_of_an_activation():
    class Block(Work):
        def forward(self, x):
            return torch.relu(x + super().forward(x))

    blocks = make(Block, 2)
    plain = copy.deepcopy(blocks)
    apply_stochastic_depth(blocks, 0.5, growth="uniform", scaling="evaluation")
    x = images().abs()
    y = blocks[0].eval()(x)
    torch.testing.assert_close(y, (x + plain[0](x)) / 2)
    assert y.min() >= 0
