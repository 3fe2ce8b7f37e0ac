"""Initialization without a Trainer: distributions, gains, branches, LSUV, what is left; and when the callback leaves a model alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

import lightning_tricks as lt
from contracts.harness import Loader, Net, Recorder, ResidualNet, assert_differ, assert_equal, fit, make_trainer, weights
from lightning_tricks import errors
from lightning_tricks.functional import initialize
from lightning_tricks.normalization._activations import KINDS
from lightning_tricks.normalization._flow import examine_flow
from lightning_tricks.normalization._matrices import find_matrices
from lightning_tricks.normalization._schemes import activation_gain
from reference import initialization as reference

LAYERS = {
    "linear": lambda: nn.Linear(300, 200),
    "conv": lambda: nn.Conv2d(32, 48, 5),
    "grouped": lambda: nn.Conv2d(32, 64, 5, groups=4),
    "depthwise": lambda: nn.Conv1d(512, 512, 7, groups=512),
    "transposed": lambda: nn.ConvTranspose2d(32, 48, 5, groups=2),
    "three dimensions": lambda: nn.Conv3d(16, 16, 3),
}


# Distributions


def check_normal(values: Tensor, deviation: float) -> None:
    """Check mean, variance and fourth moment to five standard errors."""
    z, count = values.detach().double().flatten() / deviation, values.numel()
    assert abs(z.mean()) < 5 / math.sqrt(count)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)


def check_uniform(values: Tensor, bound: float) -> None:
    z, count = values.detach().double().flatten() / bound, values.numel()
    assert z.abs().max() <= 1 + 1e-6
    assert z.abs().max() > 1 - 20 / count
    assert abs(z.mean()) < 5 * math.sqrt(1 / 3 / count)
    assert abs(z.square().mean() - 1 / 3) < 5 * math.sqrt((1 / 5 - 1 / 9) / count)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", ["xavier", "kaiming", "lecun"])
def test_weights_are_drawn_from_the_distribution_of_the_paper(scheme, name):
    layer = LAYERS[name]()
    fans, gain = reference.fans(layer), 1.0 if scheme == "lecun" else 1.7
    for shape, check, number in (("normal", check_normal, reference.deviation), ("uniform", check_uniform, reference.bound)):
        report = initialize(layer, f"{scheme}_{shape}", gain=gain, seed=1)
        check(layer.weight, number(f"{scheme}_{shape}", *fans, gain))
        assert layer.bias.count_nonzero() == 0
        assert list(report.layers) == ["weight"]
    initialize(layer, "kaiming_normal", gain=1.0, mode="fan_out", seed=1)
    check_normal(layer.weight, math.sqrt(1 / fans[1]))


def test_equals_torch_to_the_standard_deviation_where_torch_counts_alike():
    layer = nn.Conv2d(32, 48, 5)
    for ours, torchs in (("xavier_uniform", nn.init.xavier_uniform_), ("kaiming_uniform", nn.init.kaiming_uniform_)):
        expected = torchs(torch.empty_like(layer.weight)).abs().max()
        initialize(layer, ours, gain=1.0 if "xavier" in ours else math.sqrt(2))
        torch.testing.assert_close(layer.weight.abs().max(), expected, rtol=1e-3, atol=0)


def test_a_truncated_normal_has_the_standard_deviation_asked_for_and_no_tails():
    layer = nn.Linear(500, 500)
    initialize(layer, "truncated_normal", std=0.05, seed=0)
    z = layer.weight.detach().double() / 0.05
    assert abs(z.mean()) < 5 / 500
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2) / 500  # a cut normal's squares vary less than a normal's
    assert 2.2 < z.abs().max() < 2 / 0.8796 + 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_orthogonal_rows_or_columns(name):
    layer = LAYERS[name]()
    initialize(layer, "orthogonal", gain=1.5)
    rows = layer.weight.detach().flatten(1)
    product = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    torch.testing.assert_close(product, 2.25 * torch.eye(len(product)), rtol=0, atol=1e-4)


def test_parts_of_attention_and_gates_are_matrices_of_their_own():
    model = nn.ModuleList([nn.MultiheadAttention(96, 4), nn.MultiheadAttention(96, 4, kdim=48), nn.LSTM(64, 128, 2, bidirectional=True)])
    initialize(model, "xavier_uniform", seed=0)
    for part in model[0].in_proj_weight.chunk(3):
        check_uniform(part, math.sqrt(6 / 192))
    check_uniform(model[1].k_proj_weight, math.sqrt(6 / 144))
    check_uniform(model[0].out_proj.weight, math.sqrt(6 / 192))
    for gate in model[2].weight_ih_l0_reverse.chunk(4):
        check_uniform(gate, math.sqrt(6 / 192))
    initialize(model, "orthogonal")
    for gate in model[2].weight_hh_l1.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(128), rtol=0, atol=1e-5)
    biases = [value for name, value in model.named_parameters() if "bias" in name]
    assert len(biases) == 12
    assert not any(value.count_nonzero() for value in biases)


def test_double_and_half_precision():
    for dtype in (torch.float64, torch.bfloat16):
        layer = nn.Linear(256, 256, dtype=dtype)
        initialize(layer, "orthogonal", seed=0)
        error = (layer.weight @ layer.weight.T - torch.eye(256, dtype=dtype)).abs().max()
        assert error < (1e-12 if dtype == torch.float64 else 0.1)


# Gains


@pytest.mark.parametrize("kind", [kind for kind, make in KINDS.items() if make is not None and kind not in {"identity", "prelu"}])
def test_gains_keep_the_second_moment_except_where_torch_has_its_own(kind):
    function = KINDS[kind]()
    gain = activation_gain(kind, function)
    torchs = {"sigmoid": 1.0, "hardsigmoid": 1.0, "tanh": 5 / 3, "selu": 3 / 4}
    if kind in torchs:
        assert gain == torchs[kind]
    else:
        moment, error = reference.gain_by_sampling(function, 200_000, seed=0)
        assert abs(gain**-2 - moment) < 5 * error


class Functional(nn.Module):
    """Calls activations as functions, one layer twice, and adds a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.gate, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.norm(self.first(x)), 0.3)
        x = x + self.third(torch.tanh(self.second(x))).mul(self.gate(x).sigmoid())
        return self.head(functional.dropout(x.relu_().view(x.shape), 0.1, self.training))


def test_kaiming_takes_the_activation_that_a_layers_output_reaches():
    report = initialize(Functional(), "kaiming_normal", seed=0)
    assert {name: (layer.activation, round(layer.gain, 4)) for name, layer in report.layers.items()} == {
        "first": ("leaky_relu", round(math.sqrt(2 / 1.09), 4)),
        "second": ("tanh", round(5 / 3, 4)),
        "third": ("relu", round(math.sqrt(2), 4)),  # through the product and the sum
        "gate": ("sigmoid", 1.0),
        "head": (None, 1.0),
    }


def test_the_flow_is_found_without_data_values_random_numbers_or_traces():
    model = Functional()
    state, before = torch.get_rng_state(), weights(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    flow = examine_flow(model, set(find_matrices(model)))
    assert flow.following["first.weight"].kind == "leaky_relu"
    assert flow.ends == [("third.weight", "third.bias")]
    assert flow.unseen == []
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(weights(model), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


class Odd(nn.Module):
    """Cannot be run on a guess; its parts can, or cannot either."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.alone = nn.Linear(8, 8)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, where: dict[str, int]) -> Tensor:
        return self.act(self.alone(self.part(x[where["here"]])))


def test_parts_of_a_model_that_cannot_be_run_are_examined_and_the_report_names_gains():
    report = initialize(Odd(), "kaiming_normal")
    assert [layer.activation for layer in report.layers.values()] == ["gelu", None, None]
    assert str(report).splitlines()[0] == "part.0: gain 1.534 (gelu)"


def test_where_nothing_runs_the_order_of_registration_decides():
    class Alone(Odd):
        def __init__(self) -> None:
            super().__init__()
            self.alone = Raises(8, 8)

    class Raises(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    report = initialize(Alone(), "kaiming_normal")
    assert [layer.activation for layer in report.layers.values()] == ["gelu", None, "silu"]


# Residual branches


class Block(nn.Module):
    """As ResNet's: convolutions with norms, a shortcut with a layer of its own, an activation after the sum."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return functional.relu(self.shortcut(x) + y)


def test_branches_begin_at_zero_by_their_norm_or_their_last_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Block(4, 4), Block(4, 6))
    report = initialize(model, "kaiming_normal", residual="zero", seed=0)
    assert report.zeroed == ["1.bn2.weight", "1.bn2.bias", "2.bn2.weight", "2.bn2.bias"]
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model[1](x), x.relu())
    assert torch.equal(model[2](x), model[2].shortcut(x).relu())
    transformer = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True))
    report = initialize(transformer, "keep", residual="zero")
    assert report.zeroed == [f"0.{name}.{key}" for name in ("self_attn.out_proj", "linear2") for key in ("weight", "bias")]
    assert report.layers == {}
    x = torch.randn(3, 8)
    torch.testing.assert_close(transformer(x), x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 8), nn.Embedding(4, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.words(x) + self.places(torch.arange(x.shape[1])))


def test_a_sum_of_embeddings_is_no_branch():
    report = initialize(Tokens(), "keep", residual="zero")
    assert [name for name in report.zeroed if "weight" in name] == ["block.self_attn.out_proj.weight", "block.linear2.weight"]


def test_zero_needs_a_branch_that_where_and_exclude_leave():
    with pytest.raises(errors.NothingMatchedError, match="found no residual branch to begin at zero in Sequential"):
        initialize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "keep", residual="zero")
    model = nn.Sequential(Block(4, 4), Block(4, 4))
    assert initialize(model, "keep", residual="zero", exclude="0").zeroed == ["1.bn2.weight", "1.bn2.bias"]
    assert model[0].bn2.weight.all()
    model[1].bn2.weight.requires_grad_(requires_grad=False)
    with pytest.raises(errors.NothingMatchedError):
        initialize(model, "keep", residual="zero", where="1.bn2.weight")


# What is left, and where draws come from


def test_frozen_tied_embedded_hooked_and_lazy_weights_are_left_with_reasons():
    model = nn.Module()
    model.frozen = nn.Linear(4, 4).requires_grad_(requires_grad=False)
    model.embedding, model.head = nn.Embedding(5, 4), nn.Linear(4, 5)
    model.head.weight = model.embedding.weight
    model.lazy = nn.LazyLinear(3)
    model.meta = nn.Linear(4, 4, device="meta")
    model.free = nn.Linear(4, 4)
    before = weights(model.embedding)
    report = initialize(model, "xavier_normal")
    assert list(report.layers) == ["free"]
    assert report.left == {
        "frozen": "it is frozen",
        "embedding": "it is an embedding",
        "lazy": "its shape is not known before the first batch",
        "meta": "it has no values yet, on the meta device",
    }
    assert_equal(weights(model.embedding), before)
    assert list(initialize(model, "truncated_normal").layers) == ["embedding", "free"]
    with pytest.raises(errors.NothingMatchedError, match=r"all 1 are left \('frozen': it is frozen\). Select others"):
        initialize(model, "xavier_normal", where="frozen")
    with pytest.raises(errors.NothingMatchedError, match=r"`where='haed'` matched none of Module's 5. Their names look like 'frozen'"):
        initialize(model, "xavier_normal", where="haed")
    with pytest.raises(errors.NothingMatchedError, match=r"`exclude='\*'` removed all 5"):
        initialize(model, "xavier_normal", exclude="*")
    with pytest.raises(errors.NothingMatchedError, match="ReLU has none"):
        initialize(nn.ReLU(), "xavier_normal")


def test_parametrized_weights_are_what_is_drawn():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(100, 100))
    keys = list(layer.state_dict())
    initialize(layer, "lecun_normal", seed=3)
    plain = nn.Linear(100, 100)
    initialize(plain, "lecun_normal", seed=3)
    torch.testing.assert_close(layer.weight, plain.weight)
    assert list(layer.state_dict()) == keys


def test_draws_follow_from_the_seed_and_the_place_of_a_layer_alone():
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    one, other, part = make(), make(), make()
    state = torch.get_rng_state()
    initialize(one, "orthogonal", seed=5)
    initialize(part, "orthogonal", seed=5, where="1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    initialize(other, "orthogonal", seed=5)
    assert_equal(weights(one), weights(other))
    assert torch.equal(one[1].weight, part[1].weight)
    assert not torch.equal(one[0].weight, part[0].weight)
    assert not torch.equal(one[0].weight, one[1].weight)
    for model in (one, other):
        torch.manual_seed(7)
        initialize(model, "lecun_uniform")
    assert_equal(weights(one), weights(other))
    initialize(other, "lecun_uniform")
    assert_differ(weights(one), weights(other))


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_sharded_weights_are_the_parts_of_the_whole_ones():
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    sharded = copy.deepcopy(plain)
    for layer in (sharded[0], sharded[2]):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
    for model in (plain, sharded):
        initialize(model, "kaiming_normal", seed=0)
    assert isinstance(sharded[0].weight, DTensor)
    assert torch.equal(sharded[0].weight.full_tensor(), plain[0].weight)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheme": "he"}, "`scheme` must be one of 'keep', 'xavier_uniform',"),
        ({"scheme": "orthogonal", "gain": 0}, "`gain` must lie in (0, ∞), got 0."),
        ({"scheme": "kaiming_normal", "mode": "in"}, "`mode` must be one of 'fan_in', 'fan_out', got 'in'"),
        ({"scheme": "truncated_normal", "std": -1}, "`std` must lie in (0, ∞), got -1."),
        ({"scheme": "orthogonal", "seed": -1}, "`seed` must be a whole number of at least 0, got -1."),
        ({"scheme": "lsuv"}, "initialize with 'lsuv' needs batches, from which variances are measured, and got none"),
        ({"scheme": "lsuv", "batches": []}, "got none"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(errors.ArgumentError) as raised:
        initialize(nn.Linear(2, 2), **arguments)
    assert words in str(raised.value)


# LSUV


def test_lsuv_equals_the_algorithm_of_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(5) for part in (nn.Linear(20, 20), nn.Tanh()))).double()
    x = 3 * torch.randn(64, 20, dtype=torch.float64)
    initialize(model, "orthogonal", seed=1)
    expected = reference.lsuv([layer.weight.detach() for layer in model[::2]], torch.tanh, x, 1e-6, 10)
    report = initialize(model, "lsuv", seed=1, batches=[x[:40], x[40:]], tolerance=1e-6)
    for layer, weight in zip(model[::2], expected, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-12)
    assert all(abs(layer.after - 1) < 1e-6 for layer in report.layers.values())


class Various(nn.Module):
    """Has what networks have: norms, dropout, attention, shortcuts, a layer that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.block = Block(8, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head, self.unused = nn.Linear(8, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(functional.silu(self.norm(self.stem(x))))
        return self.head(functional.dropout(self.attention(x.flatten(2).mT), 0.5, self.training).mean(1))


def test_lsuv_reaches_unit_variance_in_every_layer_and_changes_nothing_but_weights():
    torch.manual_seed(0)
    model = Various()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    batches = [(torch.randn(6, 3, 8, 8) * 5 + 2, torch.zeros(6)), [torch.randn(3, 3, 8, 8)]]
    state = torch.get_rng_state()
    report = initialize(model, "lsuv", seed=0, batches=batches)
    assert torch.equal(torch.get_rng_state(), state)
    measured = {name: layer.after for name, layer in report.layers.items() if layer.after is not None}
    assert set(report.layers) - set(measured) == {"attention.self_attn.in_proj_weight", "unused"}
    assert all(abs(variance - 1) < 0.01 for variance in measured.values()), measured
    assert report.left == {"unused": "the batches do not reach it"}
    assert_equal(dict(model.named_buffers()), buffers)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    gram = model.unused.weight @ model.unused.weight.T
    torch.testing.assert_close(gram, torch.eye(2))


def test_lsuv_says_what_it_could_not_scale():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    report = initialize(model, "lsuv", batches=[torch.zeros(3, 2)])
    assert report.left["0"] == "its output has a variance of 0"
    with pytest.raises(errors.TrickError, match=r"must reach layers, and reached none of '0', '2'\. Give `forward`"):
        initialize(model, "lsuv", batches=[torch.zeros(3, 2)], forward=lambda batch: None)
    model[2].forward = lambda x: x / 0
    with pytest.raises(RuntimeError, match="in forward"):
        initialize(model, "lsuv", batches=[torch.zeros(3, 2)], forward=raises)
    assert not any(module._forward_hooks for module in model.modules())


def raises(batch: Tensor) -> None:
    msg = "in forward"
    raise RuntimeError(msg)


def test_variances_before_and_after_show_why_kaiming():
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(30) for part in (nn.Linear(256, 256), nn.ReLU())))
    report = initialize(model, "kaiming_normal", seed=0, batches=[torch.randn(64, 256)])
    layers = list(report.layers.values())
    assert layers[-1].before < 0.01 * layers[0].before
    assert 0.1 < layers[-1].after / layers[0].after < 10


# The callback


def test_a_new_model_is_initialized_as_by_the_function_and_training_draws_as_ever(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    run, plain = (fit(callbacks, max_steps=0) for callbacks in ([lt.Initialization("orthogonal", seed=3)], []))
    torch.manual_seed(0)
    twin = Net()
    initialize(twin, "orthogonal", seed=3)
    assert_equal(weights(run.module), weights(twin))
    assert torch.equal(run.random_state, plain.random_state)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert_equal(weights(fit([lt.Initialization("orthogonal")], max_steps=0).module), weights(twin))


def test_a_trained_model_is_refused_unless_told(tmp_path):
    module = fit(max_epochs=1).module
    with pytest.raises(
        errors.TrickError, match=r"Net has been trained: 'body.1.running_mean' differs.*Name its new layers by `where`, or pass"
    ):
        make_trainer([lt.Initialization("orthogonal")]).fit(module, Loader())
    before = weights(module)
    make_trainer([lt.Initialization("orthogonal", where="head")], max_steps=0).fit(module, Loader())
    changed = [name for name, value in weights(module).items() if not torch.equal(value, before[name])]
    assert changed == ["head.weight", "head.bias"]
    make_trainer([lt.Initialization("orthogonal", pretrained="overwrite")], max_steps=0).fit(module, Loader())
    assert not torch.equal(module.neck.weight, before["neck.weight"])


def test_a_model_that_a_fit_has_begun_to_train_is_left_and_so_is_a_resumed_one(tmp_path):
    trick = lt.Initialization("orthogonal", exclude="body.1")
    module = fit([trick], max_epochs=1).module
    before = weights(module)
    for again in (trick, lt.Initialization("orthogonal", exclude="body.1")):
        make_trainer([again], max_steps=0).fit(module, Loader())
        assert_equal(weights(module), before)
    trainer = make_trainer([lt.Initialization("orthogonal")], max_epochs=1)
    torch.manual_seed(0)
    trainer.fit(fresh := Net(), Loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = lt.Initialization("orthogonal")
    stopped = weights(fresh)
    for model in (Net(), module):  # a trained one is not refused, since weights are loaded over those that it has
        make_trainer([resumed, start := Recorder()], max_epochs=2).fit(model, Loader(), ckpt_path=tmp_path / "one.ckpt")
        assert resumed.report is None
        assert_equal(start.history[0], stopped)


def test_lsuv_measures_training_batches_before_training_and_averages_begin_with_its_weights():
    trick = lt.Initialization("lsuv", batches=3, tolerance=1e-3)
    for order in (1, -1):
        average = lt.EMA(1.0, evaluate=False)
        run = fit([trick, average][::order], ResidualNet, max_epochs=1, num_sanity_val_steps=0)
        assert {name for name, layer in trick.report.layers.items() if layer.after is not None} >= {"body.0", "neck", "head"}
        assert all(abs(layer.after - 1) < 1e-3 for name, layer in trick.report.layers.items() if name != "tied")
        start = average.averaged_state_dict()
        torch.testing.assert_close(start["head.weight"] @ start["head.weight"].T, torch.eye(3) * start["head.weight"][0].square().sum())
        assert len(run.losses) == 5
        trick = lt.Initialization("lsuv", batches=3, tolerance=1e-3)


def test_layers_that_are_built_later_are_initialized():
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.body, self.neck, self.head, self.tied, self.frozen

        def configure_model(self) -> None:
            if not hasattr(self, "head"):
                twin = Net()
                for name, child in twin.named_children():
                    setattr(self, name, child)

    run = fit([lt.Initialization("orthogonal", seed=0)], Late, max_steps=0)
    torch.testing.assert_close(run.module.head.weight @ run.module.head.weight.T, torch.eye(3))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("late", [False, True])
def test_gains_are_those_of_swapped_activations_in_any_order(order, late):
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = None if late else self.body

        def configure_model(self) -> None:
            self.body = self.body or Net().body

    trick = lt.Initialization("kaiming_normal", where="body.0")
    fit([trick, lt.ActivationSwap("relu", "gelu")][::order], Late, max_steps=0)
    assert trick.report.layers["body.0"].activation == "gelu"


def test_every_matrix_of_the_model_is_found_once():
    assert list(find_matrices(Net())) == ["body.0.weight", "neck.weight", "head.weight", "frozen.weight"]
