"""DropConnect without a Trainer: formulas, gradients, masks, surgery, evaluation, compiled code."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import lightning_tricks as lt
from lightning_tricks import errors
from lightning_tricks.functional import apply_drop_connect, apply_feature_noise, remove_drop_connect, remove_feature_noise
from lightning_tricks.stochastic._weight_masks import Rate, kept, kept_rows, key_of, key_of_example, normal
from reference import drop_connect as reference

RATE = 0.4


def first(output):
    return output[0] if isinstance(output, tuple) else output


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


LAYERS = {
    "Linear": (lambda: nn.Linear(5, 4), lambda: double(3, 2, 5)),
    "Linear of rows": (lambda: nn.Linear(5, 4, bias=False), lambda: double(3, 5)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2, groups=2), lambda: double(3, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, padding_mode="reflect"), lambda: double(3, 2, 6, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, bias=False), lambda: double(3, 2, 3, 4, 3)),
    "LSTM": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True), lambda: double(3, 5, 4)),
    "GRU": (lambda: nn.GRU(4, 3, batch_first=True), lambda: double(3, 5, 4)),
    "GRUCell": (lambda: nn.GRUCell(4, 3), lambda: double(3, 4)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda: double(3, 5, 4)),
    "Embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), lambda: torch.randint(9, (3, 5))),
}
layers = pytest.mark.parametrize(("make", "data"), LAYERS.values(), ids=list(LAYERS))


class Net(nn.Module):
    """Calls one layer with one tensor."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        further = {nn.MultiheadAttention: (x, x), nn.GRUCell: (x[:, :3],)}.get(type(self.layer), ())
        return first(self.layer(x, *further))


def net(make):
    torch.manual_seed(0)
    return Net(make()).double()


def masks_of(model, count=None):
    """Draw the masks of the latest forward pass again."""
    dropping = model.layer.forward
    masks = {}
    for name, number in dropping.numbers.items():
        key, shape = key_of(int(dropping.clock.now), number), dropping.tensor(name).shape
        keys = [key] if count is None else [key_of_example(key, i) for i in range(count)]
        each = [kept(key, shape, dropping.rate.threshold, torch.device("cpu")) for key in keys]
        masks[f"layer.{name}"] = each[0] if count is None else torch.stack(each)
    return masks


# The formula


@pytest.mark.parametrize("mask_bias", [False, True])
@pytest.mark.parametrize("granularity", ["batch", "example"])
@layers
def test_outputs_and_gradients_equal_those_of_a_masked_dense_computation(make, data, granularity, mask_bias):
    model = net(make)
    twin = copy.deepcopy(model)
    report = apply_drop_connect(model, RATE, granularity=granularity, mask_bias=mask_bias)
    assert list(report.layers) == ["layer"]
    for _ in range(2):
        x = data()
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        output = model(inputs[0])
        if granularity == "batch":
            expected = reference.by_batch(twin, (inputs[1],), masks_of(model), RATE)
        else:
            expected = reference.by_example(twin, inputs[1], masks_of(model, len(x)), RATE)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        ends = [
            [y.square().sum(), *each.parameters(), *([v] if v.requires_grad else [])]
            for y, each, v in ((output, model, inputs[0]), (expected, twin, inputs[1]))
        ]
        for one, other in zip(*(torch.autograd.grad(y, rest) for y, *rest in ends), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("granularity", ["batch", "example"])
def test_the_mean_over_draws_is_the_plain_output(granularity):
    model, x = net(lambda: nn.Linear(5, 4)), double(2, 5)
    plain = model(x).detach()
    apply_drop_connect(model, RATE, granularity=granularity, mask_bias=True)
    draws = 4000
    outputs = torch.stack([model(x).detach() for _ in range(draws)])
    parts = [reference.moments(model.layer.weight, model.layer.bias, v, RATE, mask_bias=True) for v in x]
    means, variances = (torch.tensor(each, dtype=torch.float64) for each in zip(*parts, strict=True))
    torch.testing.assert_close(means, plain)
    assert ((outputs.mean(0) - plain).abs() <= 5 * (variances / draws).sqrt()).all()
    assert (outputs.var(0) / variances - 1).abs().max() < 0.2
    correlation = torch.corrcoef(outputs[:, :, 0].T)[0, 1].abs()
    alike = torch.corrcoef(net(lambda: nn.Linear(5, 4))(x)).abs()[0, 1]
    assert alike > 0.01
    if granularity == "example":
        assert correlation < 5 / draws**0.5  # examples are masked independently of each other


def test_unbatched_inputs_are_one_example():
    for layer, shape in ((nn.Linear(5, 4), (5,)), (nn.Conv1d(2, 3, 2), (2, 6)), (nn.LSTM(4, 3), (5, 4)), (nn.Embedding(9, 4), (5,))):
        x = torch.arange(5) if isinstance(layer, nn.Embedding) else torch.randn(*shape)
        plain = first(layer(x))
        apply_drop_connect(layer, RATE, granularity="example")
        assert first(layer(x)).shape == plain.shape
        assert not torch.equal(first(layer(x)), plain)


def test_attention_by_example_takes_its_masks_and_weights_by_example():
    attention = nn.MultiheadAttention(4, 2).double()
    x, heads = double(5, 3, 4), double(6, 5, 5)
    padding = torch.tensor([[False] * 4 + [i > 0] for i in range(3)])
    for options in ({}, {"attn_mask": heads}, {"key_padding_mask": padding}, {"average_attn_weights": False}):
        output, weights = attention(x, x, x, **options)
        apply_drop_connect(attention, 0.0, granularity="example")
        for one, other in zip(attention(x, x, x, **options), (output, weights), strict=True):
            torch.testing.assert_close(one, other)
        assert attention(x, x, x, need_weights=False)[1] is None
        remove_drop_connect(attention)


def test_states_of_recurrent_layers_go_along_by_example():
    for layer in (nn.LSTM(4, 3, num_layers=2), nn.GRU(4, 3)):
        x, state = torch.randn(5, 2, 4), torch.randn(len(layer._flat_weights) // 4, 2, 3)
        hx = (state, state.flip(0)) if isinstance(layer, nn.LSTM) else state
        expected = layer(x, hx)
        apply_drop_connect(layer, 0.0, granularity="example")
        torch.testing.assert_close(layer(x, hx), expected)


def test_packed_sequences_are_masked_by_batch_and_refused_by_example():
    model = nn.LSTM(4, 3)
    packed = pack_padded_sequence(torch.randn(5, 2, 4), [5, 3])
    plain = model(packed)[0].data
    apply_drop_connect(model, RATE)
    assert not torch.equal(model(packed)[0].data, plain)
    apply_drop_connect(model, RATE, granularity="example")
    with pytest.raises(errors.TrickError, match=r"needs a padded tensor. Pad it, or pass `granularity='batch'`"):
        model(packed)


def test_masks_of_examples_are_not_kept():
    """The paper's masks for a batch of 64 would be 64 times the weight."""
    model = nn.Linear(64, 64, bias=False)
    apply_drop_connect(model, RATE, granularity="example")
    sizes = []
    x = torch.randn(64, 2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
        model(x)
    assert 0 < sum(sizes) < x.numel() + 2 * model.weight.numel()


# Masks


def test_masks_are_even_and_their_elements_independent():
    rate, device, count = Rate(0.3), torch.device("cpu"), 4000
    masks = kept(torch.arange(count)[:, None], (3, 4), rate.threshold, device).double().view(count, 12)
    assert ((masks.mean(0) - 0.7).abs() < 5 * (0.21 / count) ** 0.5).all()
    correlations = torch.corrcoef(masks.T) - torch.eye(12)
    assert correlations.abs().max() < 5 / count**0.5
    products = (masks[:, 0] - 0.7) * (masks[:, 1] - 0.7) * (masks[:, 4] - 0.7) * (masks[:, 5] - 0.7)  # corners of a rectangle
    assert products.mean().abs() < 5 * 0.21**2 / count**0.5
    large = kept(5, (1000, 999), rate.threshold, device).double()
    assert (large.mean() - 0.7).abs() < 5 * (0.21 / large.numel()) ** 0.5
    for axis in (0, 1):
        assert ((large.mean(axis) - 0.7).abs() < 5 * (0.21 / large.shape[axis]) ** 0.5).all()


def test_numbers_and_tensors_give_the_same_masks_and_rows_are_those_of_the_whole():
    rate, device = Rate(0.5), torch.device("cpu")
    whole = kept(7, (20, 6), rate.threshold, device)
    assert torch.equal(kept(torch.tensor(7), (20, 6), rate.threshold, device), whole)
    rows = torch.tensor([[3, 19], [3, 0]])
    assert torch.equal(kept_rows(7, rows, 6, rate.threshold), whole[rows])
    assert not torch.equal(kept(8, (20, 6), rate.threshold, device), whole)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.25, 1 - 2**-20])
def test_rates_hold_also_near_their_bounds(rate):
    mask = kept(3, (2000, 1000), Rate(rate).threshold, torch.device("cpu"))
    assert abs((~mask).double().mean() - rate) <= 5 * (rate / mask.numel()) ** 0.5


def test_normal_numbers_are_normal():
    z = normal(11, torch.empty(400, 500, dtype=torch.float64))
    count = z.numel()
    assert torch.isfinite(z).all()
    assert abs(z.mean()) < 5 / count**0.5
    assert abs(z.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((z > 2).double().mean() - 0.02275) < 5 * (0.02275 / count) ** 0.5


def test_a_parameter_of_two_layers_has_one_mask():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "neck": nn.Linear(4, 7, bias=False), "other": nn.Linear(4, 7, bias=False)})
    model["neck"].weight = model["embedding"].weight
    apply_drop_connect(model, 0.5)
    matrix, rows = model["neck"](torch.eye(4)).T, model["embedding"](torch.arange(7))
    torch.testing.assert_close(matrix, rows)
    assert 0 < (matrix == 0).sum() < 28
    assert not torch.equal(matrix == 0, model["other"](torch.eye(4)).T == 0)


def test_every_forward_pass_draws_anew_and_no_generator_is_touched():
    model, x = net(lambda: nn.Linear(5, 4)), double(2, 5)
    apply_drop_connect(model, RATE, seed=3)
    state = torch.get_rng_state()
    once = [model(x) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(once[0], once[1])
    apply_drop_connect(model, RATE, seed=3)
    assert all(torch.equal(model(x), each) for each in once)
    apply_drop_connect(model, RATE, seed=4)
    assert not torch.equal(model(x), once[0])


@pytest.mark.parametrize("granularity", ["batch", "example"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_masks_again(granularity, reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))).double()
    saving = nn.Sequential(Checkpointed(*copy.deepcopy(plain[0])))
    gradients = []
    for model in (plain, saving):
        apply_drop_connect(model, RATE, granularity=granularity)
        x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5).requires_grad_()
        model(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("granularity", ["batch", "example"])
@layers
def test_runs_under_autocast(make, data, granularity):
    model, x = net(make).float(), data()
    x = x.float() if x.is_floating_point() else x
    apply_drop_connect(model, RATE, granularity=granularity)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    model.layer.forward.clock.now -= 1
    torch.testing.assert_close(output.float(), model(x), rtol=0.1, atol=0.1)
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


# Surgery


@layers
def test_keys_identity_classes_and_the_plain_output_stay(make, data):
    model, x = net(make), data()
    parameters, classes, keys = list(model.parameters()), [type(m) for m in model.modules()], list(model.state_dict())
    before, plain = [vars(m).keys() for m in model.modules()], model(x)
    apply_drop_connect(model, RATE)
    masked = model(x)
    assert not torch.equal(masked, plain)
    assert torch.equal(model.eval()(x), plain)
    assert not torch.equal(model.train()(x), plain)  # training, evaluation, training
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    remove_drop_connect(model)
    assert [vars(m).keys() for m in model.modules()] == before
    assert torch.equal(model(x), plain)
    remove_drop_connect(model)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
@layers
def test_copies_made_after_a_forward_pass_compute_with_their_own_weights(make, data, twin_of):
    model, x = net(make), data()
    apply_drop_connect(model, RATE, inference="sample")
    model(x).sum().backward()
    twin = twin_of(model)
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not torch.equal(model(x), twin(x))
    remove_drop_connect(twin)
    assert "forward" in vars(model.layer)
    assert not twin.layer._forward_pre_hooks


def test_layers_are_chosen_by_name_and_kind():
    model = nn.ModuleDict({
        "body": nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 1)]),
        "attention": nn.MultiheadAttention(4, 2, kdim=3),
        "rnn": nn.LSTM(4, 4, proj_size=2),
    })  # fmt: skip
    assert list(apply_drop_connect(model, 0.1).layers) == ["body.0", "body.1", "attention", "rnn"]
    assert apply_drop_connect(model, 0.1, where="attention").layers["attention"] == (
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight",
    )  # fmt: skip
    assert apply_drop_connect(model, 0.1, kinds=nn.LSTM, mask_bias=True).layers == {"rnn": ("weight_hh_l0", "bias_hh_l0")}
    assert list(apply_drop_connect(model, 0.1, kinds=["torch.nn.Linear", "Conv1d"], exclude="body.0").layers) == ["body.1"]
    for arguments, words in (
        ({"kinds": "Bilinear"}, "`kinds` must name classes of layers among Linear, Conv1d"),
        ({"kinds": "GRU"}, "`kinds=('GRU',)` matched none of ModuleDict's 4 layers (Linear ×1, Conv1d ×1, "),
        ({"where": "attention.out_proj"}, "matched none"),
        ({"where": "rnn", "inference": "gaussian"}, "'rnn': its output is no single product with its weight"),
    ):
        with pytest.raises(errors.TrickError) as raised:
            apply_drop_connect(model, 0.1, **arguments)
        assert words in str(raised.value)
    with pytest.raises(errors.NothingMatchedError, match="ReLU has none of Linear"):
        apply_drop_connect(nn.ReLU(), 0.1)


def test_subclasses_with_a_forward_pass_of_their_own_keep_it():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = net(lambda: Scaled(5, 4, bias=False)), double(3, 5)
    twin = copy.deepcopy(model)
    apply_drop_connect(model, RATE)
    torch.testing.assert_close(model(x), reference.by_batch(twin, (x,), masks_of(model), RATE))
    with pytest.raises(errors.NothingMatchedError, match=r"'layer': it has a forward pass of its own; pass `granularity='batch'`"):
        apply_drop_connect(model, RATE, granularity="example")


def test_a_layer_whose_forward_pass_somebody_has_replaced_is_masked_by_batch_only():
    model, x = net(lambda: nn.Linear(5, 4, bias=False)), double(3, 5)
    twin, own = copy.deepcopy(model), model.layer.forward
    model.layer.forward = lambda x: 2 * own(x)
    with pytest.raises(errors.NothingMatchedError, match=r"'layer': it has a forward pass of its own; pass `granularity='batch'`"):
        apply_drop_connect(model, RATE, granularity="example")
    apply_drop_connect(model, RATE)
    torch.testing.assert_close(model(x), 2 * reference.by_batch(twin, (x,), masks_of(model), RATE))


@pytest.mark.parametrize("arguments", [{"granularity": "example"}, {"inference": "gaussian"}])
def test_noise_on_the_same_layers_acts_outside_of_masks_whatever_comes_first(arguments):
    x, changes = double(3, 5), (lambda model: apply_drop_connect(model, RATE, **arguments), noisy)
    outputs = []
    for order in (changes, changes[::-1]):
        torch.manual_seed(0)
        model = net(lambda: nn.Linear(5, 4))
        own = set(vars(model.layer))
        for change in order:
            change(model)
        outputs.append((model.train()(x), model.eval()(x)))
        remove_drop_connect(model)
        remove_feature_noise(model)
        assert set(vars(model.layer)) == own
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(4, 2), torch.ones(0, 4)), (nn.Embedding(4, 2), torch.ones(0, 3).long()), (nn.Conv1d(4, 2, 1), torch.ones(0, 4, 3))],
)
def test_an_empty_batch_by_example_gives_what_the_plain_layer_gives(layer, x):
    model = nn.Sequential(copy.deepcopy(layer))
    apply_drop_connect(model, RATE, granularity="example")
    assert model(x).shape == layer(x).shape


def noisy(model):
    apply_feature_noise(model, 0.5, where="layer")


def test_the_weights_are_back_after_an_exception():
    model = net(lambda: nn.Conv1d(4, 4, 1))
    apply_drop_connect(model, RATE)
    with pytest.raises(RuntimeError):
        model(double(3, 5, 2))
    assert isinstance(model.layer.weight, nn.Parameter)


# Evaluation


@pytest.mark.parametrize("mask_bias", [False, True])
def test_gaussian_inference_averages_the_activation_over_the_moments_of_the_paper(mask_bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = double(3, 5)
    apply_drop_connect(model, RATE, inference="gaussian", draws=4000, mask_bias=mask_bias)
    model.eval()
    hidden = model[1](model[0](x))
    draws = torch.stack([nn.functional.relu(model[0](x)) for _ in range(3)])
    assert torch.equal(draws[0], draws[1])  # what the layer itself returns is the mean
    for row, v in zip(hidden, x, strict=True):
        for value, mean, variance in zip(
            row, *reference.moments(model[0].weight, model[0].bias, v, RATE, mask_bias=mask_bias), strict=True
        ):
            expected = reference.expectation(lambda u: max(u, 0.0), mean, variance)
            assert abs(value - expected) < 5 * (variance / 4000) ** 0.5
            assert value >= 0
    assert (hidden - nn.functional.relu(model[0](x))).abs().max() > 0.05
    remove_drop_connect(model)
    assert all("forward" not in vars(module) for module in model)


def test_gaussian_inference_is_nearer_to_the_mean_over_masks_than_mean_weights_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).double()
    x = double(2, 3, 6, 6)
    mean = model(x)
    apply_drop_connect(model, 0.5, inference="gaussian", draws=500)
    exact = torch.stack([model(x) for _ in range(1000)]).mean(0)
    gaussian = model.eval()(x)
    assert (gaussian - exact).abs().mean() < 0.25 * (mean - exact).abs().mean()


def test_sampling_draws_masks_in_evaluation_also_past_torchs_fast_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        plain = model(x)
        apply_drop_connect(model, RATE, inference="sample", kinds="Linear")
        one, other = model(x), model(x)
        remove_drop_connect(model)
        again = model(x)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, plain)
    assert torch.equal(again, plain)


# Layers


def test_layers_stand_in_for_torchs_own():
    for name, ours in vars(lt.nn).items():
        if not name.startswith("DropConnect"):
            continue
        kind = getattr(nn, name.removeprefix("DropConnect"))
        sizes = {nn.Embedding: (9, 4), nn.MultiheadAttention: (4, 2)}.get(kind, (4, 4, 3) if "Conv" in name else (4, 4))
        torch.manual_seed(0)
        plain = kind(*sizes)
        torch.manual_seed(0)
        layer = ours(*sizes, rate=0.5)
        assert isinstance(layer, kind)
        assert list(layer.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(one, other) for one, other in zip(layer.parameters(), plain.parameters(), strict=True))
        x = torch.randint(9, (3, 5)) if kind is nn.Embedding else torch.randn(3, 4, *[6] * int(name[-2]) if "Conv" in name else ())
        x = (x, x, x) if kind is nn.MultiheadAttention else (x,)
        for granularity in ("batch", "example"):
            layer = ours(*sizes, rate=0.5, granularity=granularity)
            layer.load_state_dict(plain.state_dict())
            assert torch.equal(first(layer.eval()(*x)), first(plain(*x)))
            layer.train()
            state = torch.get_rng_state()
            masked = first(layer(*x))
            assert not torch.equal(first(layer(*x)), masked)
            torch.set_rng_state(state)
            assert torch.equal(first(pickle.loads(pickle.dumps(layer))(*x)), masked)  # noqa: S301
            layer.rate = 0.0
            torch.testing.assert_close(first(layer(*x)), first(plain(*x)))


def test_a_layer_of_its_own_averages_after_its_activation():
    layer = lt.nn.DropConnectLinear(5, 4, rate=0.5, inference="gaussian", activation=nn.ReLU(), draws=2000, mask_bias=True).eval()
    x = torch.randn(3, 5)
    mean, variance = reference.moments(layer.weight, layer.bias, x[0], 0.5, mask_bias=True)
    expected = torch.tensor([reference.expectation(lambda u: max(u, 0.0), m, v) for m, v in zip(mean, variance, strict=True)])
    assert ((layer(x)[0] - expected).abs() < 5 * (torch.tensor(variance) / 2000).sqrt()).all()
    with pytest.raises(errors.ArgumentError, match="averages after the activation, and DropConnectLinear was given none"):
        lt.nn.DropConnectLinear(5, 4, inference="gaussian")
    with pytest.raises(errors.ArgumentError, match=r"`rate` must lie in \[0, 1\), got 1"):
        layer.rate = 1


def test_layers_of_their_own_are_left_to_themselves():
    with pytest.raises(errors.NothingMatchedError):
        apply_drop_connect(nn.Sequential(lt.nn.DropConnectLinear(2, 2)), 0.5)


# Compiled


@pytest.mark.full
@pytest.mark.parametrize(("granularity", "inference"), [("batch", "sample"), ("example", "gaussian")])
def test_compiles_whole_to_the_same_numbers_and_once_whatever_the_rate(granularity, inference):
    """The last rate comes with gradients: backward passes in compiled code must not draw from a later moment."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    rest = [Net(nn.MultiheadAttention(5, 1, batch_first=True))] if granularity == "batch" else [nn.Conv1d(4, 4, 1)]
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), *rest).double()
    apply_drop_connect(model, 0.3, granularity=granularity, inference=inference, draws=2)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for rate in (0.0, 0.3, 0.6):
            for each in (model, twin):
                each.train(mode)
                each[0].forward.rate.set(rate)
            x = double(3, 4, 7)
            expected, found = model(x), compiled(x)
            torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y.sum(), list(m.parameters())) for y, m in ((expected, model), (found, twin))]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.full
def test_compiles_attention_by_example():
    torch._dynamo.reset()
    model = Net(nn.MultiheadAttention(4, 1, batch_first=True)).double()
    apply_drop_connect(model, 0.3, granularity="example")
    twin, x = copy.deepcopy(model), double(2, 3, 4)
    torch.testing.assert_close(torch.compile(twin, backend="eager", fullgraph=True)(x), model(x))
