"""Stochastic depth without a Trainer: formulas, gradients, which blocks, surgery."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_tricks import errors
from lightning_tricks._core.draws import Clock, fold, mix, order_of_rows, uniform
from lightning_tricks.functional import apply_feature_noise, apply_stochastic_depth, remove_feature_noise, remove_stochastic_depth
from reference import stochastic_depth as reference


class Block(nn.Module):
    def __init__(self, width: int = 6, *, activation: bool = False) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
        self.activation = activation
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            self.seen.append(len(x))
        x = x + self.branch(x)
        return torch.relu(x) if self.activation else x


class Several(Block):
    """Takes a mask beside its input, and returns weights beside its output."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert table is None or table.shape == (3, 6)
        branch = self.branch(x)
        mask = torch.ones_like(x[:, :1]) if mask is None else mask
        return x + mask * branch, branch


class Pair(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x)[0] if isinstance(self[0], Several) else self[0](x))


def make(count: int = 3, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**options) for _ in range(count))).double()


def survivors(x: Tensor, y: Tensor) -> list[bool]:
    return [not torch.equal(before, after) for before, after in zip(x, y, strict=True)]


# The formula


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("growth", ["linear", "uniform"])
def test_outputs_and_gradients_equal_those_of_a_masked_dense_computation(growth, batch):
    blocks = make()
    twin = copy.deepcopy(blocks)
    report = apply_stochastic_depth(blocks, 0.5, growth=growth)
    rates = reference.rates(0.5, 3) if growth == "linear" else [0.5] * 3
    assert list(report.rates.values()) == pytest.approx(rates)
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(survivors(inputs[0], output)))
    for step in range(5):
        seen.clear()
        x = torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        output = blocks(inputs[0])
        effective = [min(rate, 1 - 1 / batch) for rate in rates]  # one sample survives
        expected = reference.forward(twin, inputs[1], effective, seen)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(out.square().sum(), [x, *model.parameters()]) for out, x, model in
                     ((output, inputs[0], blocks), (expected, inputs[1], twin))]  # fmt: skip
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert all(any(alive) for alive in seen)


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_the_mean_over_draws_is_the_plain_output(mode):
    block = make(1)
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = block(x).detach()
    apply_stochastic_depth(block, 0.3, mode=mode)
    draws = 4000
    outputs = torch.stack([block(x).detach() for _ in range(draws)])
    deviation = (plain - x).abs() * (0.3 / 0.7) ** 0.5 / draws**0.5
    assert ((outputs.mean(0) - plain).abs() <= 5 * deviation).all()
    assert outputs.std() > 0


def test_what_is_dropped_is_not_computed():
    blocks = make(2)
    apply_stochastic_depth(blocks, 0.5, growth="uniform")
    for block in blocks:
        block.seen.clear()
    blocks(torch.randn(8, 6, dtype=torch.float64))
    assert [block.seen for block in blocks] == [[4], [4]]
    apply_stochastic_depth(blocks, 0.5, growth="uniform", mode="batch")
    for block in blocks:
        block.seen.clear()
    for _ in range(100):
        blocks(torch.randn(8, 6, dtype=torch.float64))
    assert all(set(block.seen) == {8} and 25 < len(block.seen) < 75 for block in blocks)


def test_rounding_is_right_on_average_and_one_sample_survives():
    block = make(1)
    apply_stochastic_depth(block, 0.9)
    block[0].seen.clear()
    for _ in range(2000):
        block(torch.randn(15, 6, dtype=torch.float64))
    seen = torch.tensor(block[0].seen, dtype=torch.float64)
    assert set(block[0].seen) == {1, 2}
    assert abs(seen.mean() - 1.5) < 5 * 0.5 / 2000**0.5


def test_blocks_that_end_in_an_activation_stay_in_its_range_and_are_not_scaled():
    blocks = make(4, activation=True)
    twin = copy.deepcopy(blocks)
    apply_stochastic_depth(blocks, 0.5, growth="uniform")
    x = torch.rand(8, 6, dtype=torch.float64)
    for block, plain in zip(blocks, twin, strict=True):
        y = block(x)
        expected = plain(x)
        alive = survivors(x, y)
        assert sum(alive) == 4
        assert torch.equal(y[alive], expected[alive])
        assert y.min() >= 0
        x = y


def test_evaluation_is_the_plain_network():
    blocks = make()
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = blocks(x)
    apply_stochastic_depth(blocks, 0.5)
    assert torch.equal(blocks.eval()(x), plain)
    assert not torch.equal(blocks.train()(x), plain)


def test_a_skipped_block_has_gradients_of_zero():
    blocks = make(1)
    apply_stochastic_depth(blocks, 0.9, mode="batch")
    x = torch.randn(4, 6, dtype=torch.float64)
    while not torch.equal(y := blocks(x), x):
        pass
    y.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in blocks.parameters())


# Arguments and results of several tensors


def test_rows_of_every_tensor_with_the_batch_are_gathered():
    torch.manual_seed(0)
    model = Pair(Several(), Block())
    apply_stochastic_depth(model, 0.5, growth="uniform", where="0")
    x, mask, table = torch.randn(8, 6), torch.arange(8.0)[:, None] + 1, torch.zeros(3, 6)
    y, branch = model[0](x, mask=mask, table=table)
    alive = survivors(x, y)
    assert sum(alive) == 4
    torch.testing.assert_close(y[alive], (x + 2 * mask * model[0].branch(x))[alive])
    assert [bool(row.any()) for row in branch] == alive


def test_a_table_as_long_as_the_batch_is_not_taken_for_it():
    class Table(Block):
        def forward(self, x, table):
            return x + table * self.branch(x)

    model = nn.ModuleList([Table()])
    apply_stochastic_depth(model, 0.5, where="0")
    x, table = torch.randn(4, 4, 6), torch.arange(4.0)[:, None] + 1
    y = model[0](x, table)
    alive = survivors(x, y)
    assert sum(alive) == 2
    torch.testing.assert_close(y[alive], (x + 2 * table * model[0].branch(x))[alive])


def test_a_block_that_changes_the_shape_is_refused_where_that_shows():
    class Late(Block):
        def forward(self, x):
            return x if x.device.type == "meta" else x[:, :2]

    model = nn.Sequential(Late())
    apply_stochastic_depth(model, 0.5, where="0")
    with pytest.raises(errors.TrickError, match=r"'0' made a tensor of \(2, 2\) from one of \(2, 6\)\. Exclude it"):
        model(torch.randn(4, 6))


def test_layers_that_take_the_sequence_first_are_left():
    def layers(**options):
        return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, **options))

    with pytest.raises(errors.NothingMatchedError, match="its second dimension is the batch; pass `batch_first=True`"):
        apply_stochastic_depth(layers(), 0.5)
    assert apply_stochastic_depth(layers(batch_first=True), 0.5).rates == {"0": 0.5}


# Surgery


def test_keys_identity_classes_and_random_state_stay():
    model = make()
    parameters, classes, keys = list(model.parameters()), [type(m) for m in model.modules()], list(model.state_dict())
    state = torch.get_rng_state()
    apply_stochastic_depth(model, 0.5)
    model(torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys


def test_twice_is_once_and_removing_restores():
    model = make()
    before = [dict(vars(m)) for m in model.modules()]
    x = torch.randn(8, 6, dtype=torch.float64)
    apply_stochastic_depth(model, 0.5)
    once = model(x)
    apply_stochastic_depth(model, 0.5)
    assert torch.equal(model(x), once)
    assert len(model._forward_pre_hooks) == 1
    remove_stochastic_depth(model)
    assert [vars(m).keys() for m in model.modules()] == [each.keys() for each in before]
    assert not model._forward_pre_hooks
    remove_stochastic_depth(model)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_drop_by_themselves(twin_of):
    model = make()
    apply_stochastic_depth(model, 0.5)
    twin = twin_of(model)
    x = torch.randn(8, 6, dtype=torch.float64)
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not torch.equal(model(x), twin(x))
    assert all(block.forward.module is block for block in twin)
    remove_stochastic_depth(twin)
    assert "forward" in vars(model[0])


def test_a_models_own_layers_that_drop_are_switched_off_and_back():
    class DropPath(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_prob = 0.9

        def forward(self, x):
            return x * (torch.rand_like(x[..., :1]) >= self.drop_prob) if self.drop_prob and self.training else x

    model = make(2)
    for block in model:
        block.branch.append(DropPath())
    apply_stochastic_depth(model, 0.25, exclude="0")
    assert [block.branch[3].drop_prob for block in model] == [0.9, 0.0]
    remove_stochastic_depth(model)
    assert [block.branch[3].drop_prob for block in model] == [0.9, 0.9]


def test_blocks_that_cannot_be_dropped_are_reported():
    class Wider(Block):
        def forward(self, x):
            return torch.cat([x, self.branch(x)], dim=-1)

    model = nn.Sequential(Block(), Wider(), Block(12))
    report = apply_stochastic_depth(model, 0.5, where=["0", "1", "2"])
    assert report.rates == {"0": 0.25, "2": 0.5}
    assert report.left == {"1": "it changes the shape (6 to 12)"}


# Draws


def test_draws_follow_from_the_moment_alone():
    clock = Clock(3)
    clock.set(1, 2, 3)
    first = int(clock.now)
    clock.tick()
    assert int(clock.now) == first + 1
    clock.set(1, 2, 3)
    assert int(clock.now) == first == fold(1, 2, 3) != fold(1, 3, 2)


def test_tensors_and_integers_are_hashed_alike_and_evenly():
    keys = torch.arange(20_000)
    assert mix(keys).tolist() == [mix(key) for key in range(20_000)]
    assert len(set(mix(keys).tolist())) == 20_000
    draws = uniform(mix(keys))
    assert abs(draws.mean() - 0.5) < 5 / (12 * 20_000) ** 0.5
    places = torch.stack([order_of_rows(mix(key), 4, torch.device("cpu")) for key in range(4000)])
    shares = torch.stack([(places == row).double().mean(0) for row in range(4)])
    assert ((shares - 0.25).abs() < 5 * (0.25 * 0.75 / 4000) ** 0.5).all()


# Compiled


class Quiet(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_compiles_whole_to_the_same_numbers_and_once_whatever_the_rate():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(Quiet(), Quiet(), Quiet()).double()
    apply_stochastic_depth(model, 0.25, growth="uniform")  # the least rate
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for rate in (0.25, 0.4, 0.5, 0.6):
        for block in (*model, *twin):
            block.forward.set_rate(rate)
        x = torch.randn(8, 6, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_empty_batch_passes_and_a_part_that_was_changed_by_itself_comes_back_with_the_whole():
    model = nn.Sequential(nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, batch_first=True, norm_first=True) for _ in range(2))))
    apply_stochastic_depth(model[0], 0.5)
    apply_stochastic_depth(model, 0.5, where="0.?")
    assert model(torch.ones(0, 3, 8)).shape == (0, 3, 8)
    remove_stochastic_depth(model)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_blocks_are_found_under_what_stands_in_for_them():
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, batch_first=True) for _ in range(2)))
    apply_feature_noise(model, 0.1, where="?", kind="multiplicative")
    for _ in range(2):
        assert list(apply_stochastic_depth(model, 0.5).rates) == ["0", "1"]
    remove_feature_noise(model)
    remove_stochastic_depth(model)
    assert all("forward" not in vars(module) for module in model.modules())
