"""Dropout without a Trainer: formulas, which layers, surgery, copies, compiled code."""

from __future__ import annotations

import copy
import pickle
import re
import zlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, selu

from lightning_tricks import errors
from lightning_tricks.functional import apply_dropout, remove_dropout
from lightning_tricks.stochastic._dropout_rates import rates_of
from lightning_tricks.stochastic._masking import Masking
from reference import dropout as reference


def masking_of(module: nn.Module) -> Masking:
    forward = vars(module)["forward"]
    assert isinstance(forward, Masking)
    return forward


def make(kind: str | None = None, rate: float = 0.3, layer: nn.Module | None = None, **options) -> nn.Sequential:
    model = nn.Sequential(layer or nn.Identity())
    apply_dropout(model, rate, after="0", kind=kind, **options)
    return model


# The formula


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("kind", "shape", "mask"),
    [
        ("element", (3, 5, 7), (3, 5, 7)),
        ("element", (9,), (9,)),
        ("alpha", (3, 5, 7), (3, 5, 7)),
        ("channel", (3, 5, 4, 2), (3, 5, 1, 1)),
        ("channel", (3, 5), (3, 5)),
        ("channel_alpha", (3, 5, 7), (3, 5, 1)),
        ("variational", (3, 5, 7), (3, 1, 7)),
        ("variational", (3, 2, 5, 7), (3, 1, 1, 7)),
        ("variational", (3, 7), (3, 7)),
    ],
)
def test_outputs_and_gradients_are_those_of_the_formula(kind, shape, mask, rate):
    model = make(kind, rate)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = model(x)
    masking = masking_of(model[0])
    key = reference.mixed(int(masking.clock.now) ^ reference.mixed(zlib.crc32(b"0")))
    alive = torch.tensor(reference.alive(key, rate, torch.Size(mask).numel())).view(mask)
    assert masking.dropped == pytest.approx(1 - alive.double().mean().item(), abs=1e-12)
    expected = reference.dropped(x.detach(), alive.expand(shape), masking.rate, alpha="alpha" in kind)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, masking.scale * alive.expand(shape))
    assert masking.rate == pytest.approx(rate, abs=2**-17)


@pytest.mark.parametrize("kind", ["element", "channel", "variational"])
def test_the_mean_over_draws_is_the_input(kind):
    model, draws, rate = make(kind), 1500, 0.3
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    outputs = torch.stack([model(x) for _ in range(draws)])
    assert ((outputs.mean(0) - x).abs() <= 5 * x.abs() * (rate / (1 - rate) / draws) ** 0.5).all()
    shares = (outputs == 0).double().mean(0)
    assert ((shares - rate).abs() <= 5 * (rate * (1 - rate) / draws) ** 0.5).all()


def test_draws_of_neighbours_of_steps_and_of_layers_are_independent():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    apply_dropout(model, 0.5, after="Identity")
    x, count = torch.ones(200_000), 200_000
    first, second = ((model[i](x) > 0).double() - 0.5 for i in range(2))
    masking_of(model[0]).clock.tick()
    later = (model[0](x) > 0).double() - 0.5
    for one, other in (
        (first, second),
        (first, later),
        (first[1:], first[:-1]),
        (first[2:], first[:-2]),
        (first[:100_000], first[100_000:]),
    ):
        assert abs((one * other).mean()) <= 5 * 0.25 / len(one) ** 0.5
    assert abs(first.mean()) <= 5 * 0.5 / count**0.5


def test_alpha_keeps_mean_and_variance_of_what_selu_gives():
    x = selu(torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert abs(x.mean()) < 0.01
    for kind, rate in (("alpha", 0.1), ("alpha", 0.5), ("channel_alpha", 0.3)):
        y = make(kind, rate)(x.view(-1, 100))
        assert abs(y.mean()) < 0.02
        assert abs(y.var() - 1) < 0.03
    assert abs(make("element", 0.5)(x).var() - 1) > 0.5


def test_a_mask_of_a_sequence_stays_over_time():
    for first, layer in ((False, nn.LSTM(6, 4, batch_first=True)), (True, nn.LSTM(6, 4))):
        model = nn.Sequential(nn.Embedding(10, 6), layer)
        apply_dropout(model, 0.5, after=["Embedding", "LSTM"], kind="variational")
        words = torch.arange(20).view(5, 4) % 10
        outputs = [model[0](words), model[1](torch.randn(5, 4, 6))[0]]
        for output in outputs:
            zero = (output if first else output.transpose(0, 1)) == 0  # time first
            assert (zero == zero[0]).all()
            assert 0 < zero.double().mean() < 1
            assert (zero[0] != zero[0, 0]).any()
        state = model[1](torch.randn(5, 4, 6))[1][0]
        assert not (state == 0).any()  # only what is handed on is dropped


def test_layers_that_disagree_on_the_sequence_are_refused():
    model = nn.ModuleDict({"a": nn.GRU(2, 2), "b": nn.GRU(2, 2, batch_first=True), "c": nn.Embedding(2, 2)})
    assert apply_dropout(model, 0.5, after="GRU", kind="variational").rates == {"a": 0.5, "b": 0.5}
    with pytest.raises(errors.TrickError, match="disagree on where that is: 1 have batch_first=True, 1 have batch_first=False"):
        apply_dropout(model, 0.5, after="c", kind="variational")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_keep_their_dtype_and_wrong_ones_are_no_longer_seen(dtype):
    x = torch.full((1000,), float("nan"), dtype=dtype)
    y = make()(x)
    assert y.dtype is dtype
    assert (y == 0).any()
    assert torch.equal(make(rate=0.5)(torch.ones(1000, dtype=dtype)).unique(), torch.tensor([0, 2], dtype=dtype))


def test_evaluation_is_the_plain_network_and_no_generator_is_used():
    model = make()
    x, state = torch.randn(4, 6), torch.get_rng_state()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_recomputation_draws_the_same():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    apply_dropout(model, 0.5, after="Tanh")
    x = torch.randn(4, 6, dtype=torch.float64)
    passes = (model[2](model[1](model[0](x))), checkpoint(lambda x: model[2](model[1](model[0](x))), x, use_reentrant=False))
    gradients = [torch.autograd.grad(output.square().sum(), list(model.parameters())) for output in passes]
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


# Which layers


class Functional(nn.Module):
    """Calls the function, at a rate of its own."""

    def __init__(self):
        super().__init__()
        self.dropout_rate = 0.25
        self.drop_path_rate = 0.5  # which is stochastic depth
        self.hidden_dropout = 0.5  # which nobody reads
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = dropout(x, self.dropout_rate, self.training) + (self.drop_path_rate if self.training else 0.0)
        return self.attention(x, x, x)[0]


class Fused(nn.Module):
    """Hands the rate of its layer to a fused function."""

    def __init__(self):
        super().__init__()
        self.attn_drop = nn.Dropout(0.3)
        self.proj_drop = nn.Dropout2d(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(x)


class StableDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.15

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.drop_prob) if self.training and self.drop_prob > 0 else x


class DropPath(StableDropout):
    pass


class Quieter(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def zoo() -> nn.ModuleDict:
    layers = {
        "functional": Functional(),
        "fused": Fused(),
        "lstm": nn.LSTM(8, 8, num_layers=2, dropout=0.2),
        "single": nn.GRU(8, 8),
        "stable": StableDropout(),
        "path": DropPath(),
        "alpha": nn.AlphaDropout(0.05),
        "feature": nn.FeatureAlphaDropout(0.05),
        "quieter": Quieter(0.35),
        "layer": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1),
    }
    return nn.ModuleDict(layers)


RATES = {
    "functional.dropout_rate": 0.25,
    "functional.attention.dropout": 0.1,
    "fused.attn_drop": 0.3,
    "fused.proj_drop": 0.4,
    "lstm.dropout": 0.2,
    "stable.drop_prob": 0.15,
    "alpha": 0.05,
    "feature": 0.05,
    "quieter": 0.35,
    "layer.self_attn.dropout": 0.1,
    "layer.dropout": 0.1,
    "layer.dropout1": 0.1,
    "layer.dropout2": 0.1,
}


def test_rates_are_found_set_and_put_back():
    model = zoo()
    report = apply_dropout(model, 0.6)
    assert report.before == RATES
    assert report.rates == dict.fromkeys(RATES, 0.6)
    assert [rate.value for rate in rates_of(model).values()] == [0.6] * len(RATES)
    assert model["path"].drop_prob == 0.15
    assert apply_dropout(model, 0.5, where="layer", exclude=["dropout?"]).before == {"layer.self_attn.dropout": 0.1, "layer.dropout": 0.1}
    remove_dropout(model)
    assert {name: rate.value for name, rate in rates_of(model).items()} == RATES
    assert not model._forward_pre_hooks


def test_numbers_that_are_set_act():
    model, x = Functional(), torch.randn(2, 5, 8)
    apply_dropout(model, 0.0)
    assert torch.equal(model(x), model(x))
    apply_dropout(model, 0.9, where="dropout_rate")
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout, (4, 6, 5)),
        (nn.Dropout1d, (4, 6, 5)),
        (nn.Dropout1d, (6, 5)),
        (nn.Dropout2d, (4, 6, 5, 3)),
        (nn.Dropout3d, (4, 6, 5, 3, 2)),
        (nn.Dropout3d, (6, 5, 3, 2)),
        (nn.AlphaDropout, (4, 6, 5)),
        (nn.FeatureAlphaDropout, (4, 6, 5)),
    ],
)
def test_what_stands_in_for_a_layer_drops_as_the_layer_does(layer, shape):
    from lightning_tricks._core.draws import Clock
    from lightning_tricks.stochastic._dropout_surgery import Surgery, find_rates

    model, x = nn.Sequential(layer(0.5)), torch.ones(shape, dtype=torch.float64)
    own = model(x)
    clock = Clock(0)
    surgery = Surgery(model, find_rates(model, None, (), None, varying=True, trick=""), clock=clock, owner="")
    surgery.set_rate(0.5)
    y = model[0](input=x)
    assert torch.allclose(y.unique(), own.unique())
    assert own.shape == y.shape
    spread = [[len(row.unique()) for row in each.flatten(0, -2).reshape(-1, shape[-1])] for each in (own, y)]
    assert (max(spread[0]) == 1) == (max(spread[1]) == 1)
    surgery.undo()
    assert "forward" not in vars(model[0])


def test_another_kind_stands_in_for_layers_and_leaves_numbers():
    model = nn.Sequential(nn.Dropout(0.5), Functional())
    report = apply_dropout(model, 0.5, kind="variational")
    assert report.rates == {"0": 0.5}
    assert report.left.keys() == {"1.dropout_rate", "1.attention.dropout"}
    zero = model[0](torch.ones(3, 5, 8)) == 0
    assert (zero == zero[:, :1]).all()
    assert zero.any()
    with pytest.raises(errors.NothingMatchedError, match=r"such as '1\.dropout_rate', cannot be of `kind='variational'`"):
        apply_dropout(model, 0.5, kind="variational", where="1")


def test_inserted_behind_names_and_classes_the_outermost_of_each():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.LSTM(2, 2))
    assert list(apply_dropout(model, 0.1, after="Sequential").rates) == ["0", "1"]
    assert list(apply_dropout(model, 0.1, after=["*.1", "RNNBase"]).rates) == ["0.1", "1.1", "2"]
    assert list(apply_dropout(model, 0.1, after=["Linear", "1"], where="0.?", exclude="0.1").rates) == ["0.0"]
    remove_dropout(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Plain has none. Name modules by `after`"),
        ({"after": "*.act"}, "`after='*.act'` matched none of Plain's 3 modules"),
        ({"after": ["Linear", "GELU"]}, "`after='GELU'` matched none of Plain's 3 modules"),
        ({"after": "Linear", "exclude": "body"}, "`exclude='body'` removed all 1"),
        ({"after": "Linear", "where": "tail"}, "`where='tail'` matched none of the 1 that `after='Linear'` did, such as 'body.0'"),
    ],
)
def test_nothing_matched(arguments, words):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    with pytest.raises(errors.NothingMatchedError, match=re.escape(words)):
        apply_dropout(Plain(), 0.1, **arguments)


def test_no_rate_matched():
    for arguments, words in (
        ({"where": "fuse"}, "`where='fuse'` matched none of ModuleDict's 13. Their names look like 'functional.dropout_rate'"),
        ({"where": "fused", "exclude": "*"}, "`exclude='*'` removed all 2 that `where='fused'` matched"),
    ):
        with pytest.raises(errors.NothingMatchedError, match=re.escape(words)):
            apply_dropout(zoo(), 0.1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": 1.0}, "`rate` must lie in [0, 1), got 1.0."),
        ({"rate": 0.1, "kind": "spatial"}, "`kind` must be one of None, 'element', 'channel', 'variational', 'alpha', 'channel_alpha'"),
        ({"rate": 0.1, "after": ""}, "`after` must be a glob over qualified names"),
        ({"rate": 0.1, "seed": -1}, "`seed` must be a whole number of at least 0, got -1."),
        ({"rate": 0.1, "seed": "1"}, "`seed` must be a whole number of at least 0, got '1'."),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(errors.ArgumentError, match=re.escape(words)):
        apply_dropout(nn.Sequential(nn.Dropout()), **arguments)


def test_an_output_without_numbers_is_refused_where_that_shows():
    model = nn.Sequential(nn.Flatten())
    apply_dropout(model, 0.5, after="Flatten")
    with pytest.raises(errors.TrickError, match=r"'0' gives none\. Exclude it"):
        model(torch.ones(2, 3, dtype=torch.long))


# Surgery


def test_keys_identity_and_classes_stay_and_a_rate_of_zero_inserts_nothing():
    model = zoo()
    parameters, classes, keys = list(model.parameters()), [type(m) for m in model.modules()], list(model.state_dict())
    apply_dropout(model, 0.5, after=["Dropout", "lstm", "GRU"])
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    apply_dropout(model, 0.0, after="lstm")
    assert not any("forward" in vars(module) for module in model.modules())


def test_twice_is_once_and_a_seed_decides():
    model, x = nn.Sequential(nn.Identity(), nn.Dropout(0.0)), torch.ones(1000)
    apply_dropout(model, 0.5, after="Identity", seed=3)
    once = model(x)
    apply_dropout(model, 0.5, after="Identity", seed=3)
    assert torch.equal(model(x), once)
    assert len(model._forward_pre_hooks) == 1
    apply_dropout(model, 0.5, after="Identity", seed=4)
    assert not torch.equal(model(x), once)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_drop_by_themselves(twin_of):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), torch.randn(50, 4)
    apply_dropout(model, 0.5, after="Linear")
    twin = twin_of(model)
    model[1].p = twin[1].p = 0.0
    assert torch.equal(model(x), twin(x))
    assert masking_of(twin[0]).module is twin[0]
    remove_dropout(twin)
    assert "forward" not in vars(twin[0])
    assert (model(x) == 0).any()
    apply_dropout(model, 0.5)
    twin = twin_of(model)
    remove_dropout(twin)
    assert [model[1].p, twin[1].p] == [0.5, 0.0]


def test_leaves_a_chain_of_stand_ins_from_any_place():
    from lightning_tricks.functional import apply_stochastic_depth, remove_stochastic_depth

    for first, second in ((remove_dropout, remove_stochastic_depth), (remove_stochastic_depth, remove_dropout)):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)).eval()
        x = torch.randn(8, 4, 8)
        plain = model(x)
        apply_dropout(model, 0.5, after="0")
        apply_stochastic_depth(model, 0.5)
        model.train()
        assert not torch.equal(model(x), plain)
        first(model)
        second(model)
        torch.testing.assert_close(model(x), plain)
        assert "forward" not in vars(model[0])


# Models of others


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 6),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1), "num_heads": (1, 1)}, 9),
        ("pvt_v2_b0", {}, 25),
        ("resnet18", {}, 1),
        ("efficientnet_b0", {}, 1),
        ("densenet121", {}, 59),
    ],
)
def test_rates_of_timm_models_are_all_found_and_act(name, options, count):
    import timm

    model = timm.create_model(name, num_classes=3, **options)
    assert len(apply_dropout(model, 0.0).before) == count
    x = torch.randn(2, 3, options.get("img_size", 64), options.get("img_size", 64))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        for rate in list(rates_of(model).values())[::7]:
            rate.set(0.5)
            assert not torch.equal(model(x), model(x))
            rate.set(0.0)


# Compiled


@pytest.mark.full
def test_compiles_whole_to_the_same_numbers_and_once_whatever_the_rate():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kinds = ("element", "channel_alpha", "variational")
    model = nn.Sequential(*(make(kind, 0.25) for kind in kinds)).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for rate in (0.25, 0.0, 0.5, 0.9):
        for each in (*model, *twin):
            masking_of(each[0]).set_rate(rate)
        x = torch.randn(3, 5, 6, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.full
def test_compiled_parts_have_the_names_and_the_draws_of_plain_ones():
    torch._dynamo.reset()
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.0))
    model = nn.ModuleDict({"part": part})
    compiled = nn.ModuleDict({"part": torch.compile(copy.deepcopy(part), backend="eager")})
    x = torch.randn(3, 4)
    for each in (model, compiled):
        assert apply_dropout(each, 0.1).rates == {"part.2": 0.1}
        assert apply_dropout(each, 0.5, after="ReLU").rates == apply_dropout(each, 0.5, after="*.1").rates == {"part.1": 0.5}
    assert torch.equal(compiled["part"](x), model["part"](x))


def test_what_was_done_to_a_part_is_replaced_and_removed_with_the_whole():
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.1), nn.ReLU()), nn.ReLU())
    apply_dropout(model[0], 0.5, kind="channel")
    apply_dropout(model, 0.3, kind="channel")
    remove_dropout(model)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    assert model[0][0].p == 0.1
