"""`functional.insert_norm`: where layers go, of which shape, and what is left."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_tricks import errors
from lightning_tricks.functional import insert_norm


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Dropout(0.1)),
        nn.PReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.Sequential(nn.Tanh(), nn.Linear(5, 2)),
    )


class Residual(nn.Module):
    """Is no sequence, uses an activation twice, and has tokens, one that is normalized, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.act, self.shared, self.tokens = nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU(), nn.GELU()
        self.mix, self.last, self.gate = nn.Linear(8, 12), nn.SiLU(), nn.Sigmoid()

    def forward(self, x, *, scale=1.0):
        x = self.shared(self.conv(x))
        x = x + self.act(self.norm(self.again(x))) + self.shared(x)
        x = self.tokens(self.mix(x.flatten(2).transpose(1, 2)))
        return self.gate(self.last(self.mix(x.mean(1)[:, :8]))).relu() * scale


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("batch", [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]),
        ("layer", [nn.LayerNorm, nn.LayerNorm, nn.LayerNorm]),
        ("rms", [nn.RMSNorm, nn.RMSNorm, nn.RMSNorm]),
        ("group", [nn.GroupNorm, nn.GroupNorm, nn.GroupNorm]),
        ("ghost", [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]),
        ("instance", [nn.InstanceNorm2d, nn.InstanceNorm2d, None]),
    ],
)
@pytest.mark.parametrize("inputs", [None, torch.zeros(2, 3, 8, 8)], ids=["static", "pass"])
def test_sequences_get_layers_of_the_right_shape(kind, kinds, inputs):
    model = make()
    report = insert_norm(model, kind, ghost_size=2, groups=4, inputs=inputs)
    norms = [model[1], model[4], model[8][0]]
    held = [each._modules.get("norm") for each in norms]
    assert all(norm is None if kind is None else isinstance(norm, kind) for norm, kind in zip(held, kinds, strict=True))
    assert [sum(p.numel() for p in each.norm.parameters()) for each, kind in zip(norms, kinds, strict=True) if kind] == [
        size * (1 if kind == "rms" else 2) for size in ([6, 4, 5] if kind != "instance" else [6, 4])
    ]
    if kind == "instance":
        assert report.left == {"8.0": "each of its channels has a single value, which instance normalization would make zero"}
    assert model(torch.randn(4, 3, 8, 8)).shape == (4, 2)


def test_groups_are_lowered_to_a_divisor():
    model = make()
    insert_norm(model, "group", groups=4)
    assert [model[1].norm.num_groups, model[4].norm.num_groups, model[8][0].norm.num_groups] == [3, 4, 1]


@pytest.mark.parametrize("position", ["before", "after"])
def test_position_and_keys(position):
    model = make()
    keys, relu, x = list(model.state_dict()), model[1], torch.randn(4, 3, 8, 8)
    insert_norm(model, "batch", position=position, where="1")
    assert model[1] is relu
    norm = copy.deepcopy(relu.norm)
    y = model[0](x)
    torch.testing.assert_close(relu(y.clone()), norm(y).relu() if position == "before" else norm(y.relu()))
    assert [key for key in model.state_dict() if key in keys] == keys
    added = [f"1.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert sorted(set(model.state_dict()) - set(keys)) == sorted(added)
    assert set(map(id, norm.parameters())).isdisjoint(map(id, relu.norm.parameters()))


def test_a_pass_finds_places_anywhere_and_changes_nothing():
    model = Residual()
    model.norm.eval()
    modes, state, random = [m.training for m in model.modules()], copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = insert_norm(model, "layer", where="*", inputs={"x": torch.zeros(2, 3, 4, 4), "scale": 2.0})
    assert report.inserted == {"tokens": repr(model.tokens.norm), "last": repr(model.last.norm), "gate": repr(model.gate.norm)}
    assert report.left == {
        "act": "it is normalized already",
        "shared": "it is called at several places; give each one of its own",
    }
    assert model.tokens.norm.normalized_shape == (12,)
    assert [m.training for m in model.modules() if m not in {model.tokens.norm, model.last.norm, model.gate.norm}] == modes
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close({key: model.state_dict()[key] for key in state}, state)
    model(torch.randn(2, 3, 4, 4))


def test_tokens_refuse_layers_of_images():
    model = Residual()
    report = insert_norm(model, "batch", inputs=(torch.zeros(2, 3, 4, 4),))
    assert list(report.inserted) == ["last"]
    assert report.left["tokens"] == 'its channels come last; take "layer" or "rms"'


def test_sigmoids_are_left_unless_named():
    assert list(insert_norm(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Sigmoid()), "batch").inserted) == ["1"]
    assert list(insert_norm(nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()), "batch", where="*").inserted) == ["1"]


def test_an_example_input_of_the_module_serves():
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.example_input_array = Residual(), torch.zeros(2, 3, 4, 4)

        def forward(self, x):
            return self.body(x)

    assert list(insert_norm(Module(), "rms").inserted) == ["body.tokens", "body.last"]


def test_twice_is_an_error_and_not_twice_as_many():
    model = make()
    insert_norm(model, "batch")
    keys = list(model.state_dict())
    with pytest.raises(errors.NothingMatchedError, match="'1': it is normalized already"):
        insert_norm(model, "batch")
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_have_layers_of_their_own(twin_of):
    model = make().eval().to(torch.float64)
    insert_norm(model, "layer")
    assert not model[1].norm.training
    assert model[1].norm.weight.dtype == torch.float64
    twin, x = twin_of(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[1].norm.weight.zero_()
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Linear(2, 2), {}, "it has none that is a module"),
        (make(), {"where": "body"}, "`where='body'` and `exclude=()` leave none"),
        (Residual(), {}, "'act': its place in the computation is not known; pass `inputs`"),
        (nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.ReLU()), {}, "'2': its place in the computation is not known"),
        (nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.ReLU()), {}, "'2': it is normalized already"),
        (nn.Sequential(nn.ReLU()), {"inputs": torch.zeros(2, 2)}, "'0': no layer with weights is in front"),
    ],
    ids=str,
)
def test_nothing_matched_says_why(model, options, words):
    with pytest.raises(errors.NothingMatchedError) as raised:
        insert_norm(model, "batch", **options)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "spectral"}, "`kind` must be one of 'batch', 'layer', .* got 'spectral'"),
        ({"position": "around"}, "`position` must be one of 'before', 'after', got 'around'"),
        ({"groups": 0}, "`groups` must be a whole number of at least 1, got 0"),
        ({"ghost_size": 0}, "`ghost_size` must be a whole number of at least 1, got 0"),
        ({"where": ""}, "`where` must be a glob"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(errors.ArgumentError, match=words):
        insert_norm(make(), **{"kind": "batch", **options})


@pytest.mark.full
def test_compiles_whole_to_the_same_numbers():
    torch._dynamo.reset()
    model = make().eval()
    insert_norm(model, "batch")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
