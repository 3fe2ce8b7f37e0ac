"""Several models as one."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn

from lightning_tricks.ensembling._combining import combine_predictions, decompose_uncertainty
from lightning_tricks.ensembling._ensemble import Ensemble
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError
from reference import ensembles as reference

LOGITS = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def rows(column):
    """Return the logits of all members for one sample."""
    return LOGITS[:, column].tolist()


# Combining


def test_probabilities_votes_and_logits_equal_their_formulas():
    probabilities = combine_predictions(LOGITS).softmax(-1)
    votes = combine_predictions(LOGITS, combine="vote").softmax(-1)
    for i in range(7):
        torch.testing.assert_close(probabilities[i], torch.tensor(reference.mean_probabilities(rows(i)), dtype=torch.float64))
        torch.testing.assert_close(votes[i], torch.tensor(reference.votes(rows(i)), dtype=torch.float64))
    torch.testing.assert_close(combine_predictions(LOGITS, combine="logits"), LOGITS.mean(0))


def test_combined_logits_are_normalized_so_that_cross_entropy_is_the_ensembles():
    targets = torch.arange(7) % 4
    loss = nn.functional.cross_entropy(combine_predictions(LOGITS), targets)
    expected = [-math.log(reference.mean_probabilities(rows(i))[targets[i]]) for i in range(7)]
    assert loss.item() == pytest.approx(sum(expected) / 7)


@pytest.mark.parametrize("combine", ["probabilities", "vote"])
def test_probabilities_are_combined_as_they_are(combine):
    given = LOGITS.softmax(-1)
    found = combine_predictions(given, combine=combine, output="probabilities")
    torch.testing.assert_close(found, combine_predictions(LOGITS, combine=combine).softmax(-1))
    assert found.sum(-1).allclose(torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("combine", ["probabilities", "vote"])
def test_classes_of_a_map_stand_second(combine):
    maps = LOGITS.reshape(5, 7, 4, 1, 1).expand(5, 7, 4, 2, 3)
    found = combine_predictions(maps, combine=combine, class_dim=1)
    expected = combine_predictions(LOGITS, combine=combine)
    torch.testing.assert_close(found, expected.reshape(7, 4, 1, 1).expand(7, 4, 2, 3))
    assert decompose_uncertainty(maps, class_dim=1).total.shape == (7, 2, 3)


@pytest.mark.parametrize("combine", ["probabilities", "vote"])
@pytest.mark.parametrize("output", ["logits", "probabilities"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 1, 2)])
def test_one_logit_is_that_of_a_sigmoid(combine, output, shape):
    ones = LOGITS[..., 0].reshape(5, 7, *[1] * (len(shape) - 2)).expand(shape)
    pairs = torch.stack([torch.zeros_like(LOGITS[..., 0]), LOGITS[..., 0]], -1)
    expected = combine_predictions(pairs, combine=combine).softmax(-1)[:, 1]
    given = ones if output == "logits" else ones.sigmoid()
    found = combine_predictions(given, combine=combine, output=output, class_dim=1 if len(shape) == 4 else -1)
    found = found.sigmoid() if output == "logits" else found
    assert found.shape == shape[1:]
    torch.testing.assert_close(found, expected.reshape(7, *[1] * (len(shape) - 2)).expand(shape[1:]))


def test_the_mean_probability_decides_between_equal_votes():
    tied = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]])
    assert combine_predictions(tied, combine="vote", output="probabilities").argmax(-1).item() == 1
    outvoted = torch.tensor([[[0.51, 0.49]], [[0.51, 0.49]], [[0.0, 1.0]]])
    assert combine_predictions(outvoted, combine="vote", output="probabilities").argmax(-1).item() == 0
    assert combine_predictions(outvoted, output="probabilities").argmax(-1).item() == 1


def test_extreme_logits_stay_finite():
    extreme = torch.tensor([[[200.0, -200.0]], [[199.0, -300.0]]])
    assert combine_predictions(extreme).isfinite().all()
    assert combine_predictions(extreme[..., :1]).item() == pytest.approx(199 - math.log((1 + math.exp(-1)) / 2), abs=1e-3)
    sure = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert combine_predictions(sure, output="probabilities").tolist() == [[1.0, 0.0]]
    assert decompose_uncertainty(sure, output="probabilities").total.item() == 0.0


def test_half_precision_comes_back_and_is_combined_in_single():
    half = LOGITS.bfloat16()
    found = combine_predictions(half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, combine_predictions(half.float()).bfloat16())


# Uncertainty


@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_uncertainty_equals_its_formula(output):
    found = decompose_uncertainty(LOGITS if output == "logits" else LOGITS.softmax(-1), output=output)
    for i in range(7):
        for part, expected in zip((found.total, found.aleatoric, found.epistemic), reference.uncertainty(rows(i)), strict=True):
            assert part[i].item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_uncertainty_of_one_logit_is_that_of_two(shape):
    pairs = torch.stack([torch.zeros_like(LOGITS[..., 0]), LOGITS[..., 0]], -1)
    found, expected = decompose_uncertainty(LOGITS[..., 0].reshape(shape)), decompose_uncertainty(pairs)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.epistemic, expected.epistemic)


def test_uncertainty_in_regression_is_the_spread():
    found = decompose_uncertainty(LOGITS, combine="mean")
    torch.testing.assert_close(found.total, LOGITS.var(0, unbiased=False))
    assert torch.equal(found.total, found.epistemic)
    assert not found.aleatoric.any()


# The module


class Member(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))
        self.net[1].running_mean.normal_()

    def forward(self, x, scale=1.0):
        return scale * self.net(x)


def members(count=4, **options):
    torch.manual_seed(0)
    return [Member(**options) for _ in range(count)]


@pytest.fixture
def x():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def test_mapping_equals_the_loop(x):
    mapped, loop = Ensemble(members(), mode="vmap").eval(), Ensemble(members(), mode="loop").eval()
    with torch.no_grad():
        torch.testing.assert_close(mapped.member_predictions(x, scale=2.0), loop.member_predictions(x, scale=2.0))
        torch.testing.assert_close(mapped(x), loop(x))
        assert mapped._stack is not None
        torch.testing.assert_close(loop.member_predictions(x), torch.stack([member.eval()(x) for member in members()]))


def test_auto_takes_either_and_keeps_to_it(x):
    ensemble = Ensemble(members()).eval()
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x), Ensemble(members(), mode="loop").eval()(x))
    assert ensemble._faster in {"vmap", "loop"}


@pytest.mark.parametrize("slower", ["loop", "vmap"])
def test_auto_takes_the_faster(x, slower, monkeypatch):
    import time

    slow = getattr(Ensemble, f"_{'map' if slower == 'vmap' else 'loop'}")
    monkeypatch.setattr(Ensemble, slow.__name__, lambda *given: (time.sleep(0.05), slow(*given))[1])
    ensemble = Ensemble(members()).eval()
    with torch.inference_mode():
        ensemble(x)
    assert ensemble._faster == {"loop": "vmap", "vmap": "loop"}[slower]


def test_stacked_weights_follow_the_members_and_take_no_memory_of_their_own(x):
    ensemble = Ensemble(members(), mode="vmap").eval()
    with torch.no_grad():
        before = ensemble(x)
        parameter = ensemble[2].net[0].weight
        assert parameter.data_ptr() == ensemble._stack["net.0.weight"][2].data_ptr()
        optimizer = torch.optim.SGD(ensemble.parameters(), lr=1.0)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert not torch.equal(ensemble(x), before)
        ensemble.load_state_dict(Ensemble(members()).state_dict())
        torch.testing.assert_close(ensemble(x), before)
        ensemble.double()
        torch.testing.assert_close(ensemble(x.double()), before.double())
        assert ensemble._stack["net.0.weight"].dtype == torch.float64


def test_members_train_one_after_another(x):
    ensemble = Ensemble(members(), mode="vmap")
    ensemble(x).sum().backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())
    ensemble.eval()(x).sum().backward()
    assert ensemble._stack is None


def test_different_architectures_run_in_the_loop(x):
    mixed = [*members(2), *members(1, width=5)]
    ensemble = Ensemble(mixed).eval()
    with torch.no_grad():
        assert ensemble(x).shape == (8, 3)
    assert ensemble._faster == "loop"
    with pytest.raises(ArgumentError, match="member 2 is built differently from member 0"):
        Ensemble(mixed, mode="vmap")


def test_what_differs_in_more_than_weights_is_not_mapped(x):
    class Scaled(Member):
        factor = 1.0

        def forward(self, x):
            return self.factor * self.net(x)

    torch.manual_seed(0)
    scaled = [Scaled() for _ in range(3)]
    scaled[2].factor = 3.0
    with torch.no_grad():
        ensemble = Ensemble(scaled).eval()
        torch.testing.assert_close(ensemble.member_predictions(x)[2], scaled[2](x))
        assert ensemble._faster == "loop"
        with pytest.raises(TrickError, match="they differ in more than their weights"):
            Ensemble(scaled, mode="vmap").eval()(x)


def test_members_that_share_weights_or_have_hooks_are_not_mapped(x):
    first, second = members(2)
    second.net[0].weight = first.net[0].weight
    with pytest.raises(ArgumentError, match=r"members 0 and 1 share 'net.0.weight'"):
        Ensemble([first, second], mode="vmap")
    hooked = members(2)
    hooked[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    ensemble = Ensemble(hooked).eval()
    with torch.no_grad():
        torch.testing.assert_close(ensemble.member_predictions(x)[1], 2 * members(2)[1].eval()(x))


def test_indexing_slicing_and_length():
    ensemble = Ensemble(members(), combine="vote").eval()
    assert len(ensemble) == 4
    assert ensemble[1] is list(ensemble)[1]
    part = ensemble[1:3]
    assert isinstance(part, Ensemble)
    assert part.combine == "vote"
    assert not part.training
    assert part[0] is ensemble[1]


def test_soup_has_the_mean_weights():
    ensemble = Ensemble(members())
    soup = ensemble.to_soup()
    for name, value in soup.state_dict().items():
        states = torch.stack([member.state_dict()[name] for member in ensemble])
        torch.testing.assert_close(value, states.mean(0) if value.is_floating_point() else states[0])
    assert not torch.equal(soup.net[0].weight, ensemble[0].net[0].weight)
    with pytest.raises(ArgumentError, match="A soup must have members of one architecture"):
        Ensemble([*members(1), *members(1, width=5)]).to_soup()


def test_copies_and_pickles_predict_alike(x):
    ensemble = Ensemble(members(), mode="vmap").eval()
    with torch.no_grad():
        expected = ensemble(x)
        for twin in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):  # noqa: S301
            torch.testing.assert_close(twin(x), expected)
            assert twin[0].net[0].weight.data_ptr() != ensemble[0].net[0].weight.data_ptr()


def test_one_file_holds_all_members(x, tmp_path):
    ensemble = Ensemble(members()).eval()
    torch.save(ensemble.state_dict(), tmp_path / "ensemble.pt")
    again = Ensemble([Member() for _ in range(4)]).eval()
    again.load_state_dict(torch.load(tmp_path / "ensemble.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(again(x), ensemble(x))


def test_members_that_were_mapped_over_are_saved_as_ones_that_were_not(x, tmp_path):
    ensemble = Ensemble([nn.Linear(4, 3) for _ in range(3)], mode="vmap").eval()
    with torch.no_grad():
        expected = ensemble(x)
        for _ in range(2):
            save_model(ensemble, tmp_path / "model.safetensors")
            save_file(ensemble.state_dict(), tmp_path / "file.safetensors")
            torch.save(ensemble[0].state_dict(), tmp_path / "member.pt")
            assert all(value.untyped_storage().nbytes() == value.nbytes for value in ensemble.state_dict().values())
            assert torch.equal(ensemble(x), expected)
        twin = Ensemble([nn.Linear(4, 3) for _ in range(3)], mode="vmap").eval()
        twin(x)  # maps, too
        load_model(twin, tmp_path / "model.safetensors")
        assert torch.equal(twin(x), expected)


def test_members_that_predict_different_shapes_are_refused(x):
    with pytest.raises(TrickError, match=r"must return tensors of one shape, and theirs are \[\(\d, 2\), \(\d, 3\)\]"):
        Ensemble([nn.Linear(4, 3), nn.Linear(4, 2)])(x)


def test_from_checkpoints_reads_lightnings_and_plain_ones(x, tmp_path):
    first, second, third = members(3)
    torch.save(first.state_dict(), tmp_path / "0.pt")
    torch.save({"state_dict": second.state_dict(), "epoch": 3}, tmp_path / "1.ckpt")
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in third.state_dict().items()} | {"loss.weight": torch.ones(3)}},
        tmp_path / "2.ckpt",
    )
    ensemble = Ensemble.from_checkpoints(sorted(tmp_path.iterdir()), Member, combine="logits")
    assert not ensemble.training
    assert ensemble.combine == "logits"
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x), Ensemble([first, second, third], combine="logits").eval()(x))
    with pytest.raises(CheckpointError, match=r"must fit Linear: missing are \['bias', 'weight'\] \(2\), and unknown \['net.0.bias'"):
        Ensemble.from_checkpoints([tmp_path / "0.pt"], lambda: nn.Linear(4, 3))
    with pytest.raises(CheckpointError, match=r"must fit Member\. Let `make_module` make the model that was saved"):
        Ensemble.from_checkpoints([tmp_path / "0.pt"], lambda: Member(width=5))
    with pytest.raises(CheckpointError, match="does not exist"):
        Ensemble.from_checkpoints([tmp_path / "3.pt"], Member)


@pytest.mark.full
def test_exports_and_compiles(x):
    ensemble = Ensemble(members()).eval()
    with torch.no_grad():
        expected = ensemble(x)
        exported = torch.export.export(ensemble, (x,))
        torch.testing.assert_close(exported.module()(x), expected)
        torch.testing.assert_close(torch.compile(ensemble, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"members": []}, "`members` must be modules, at least one, got []."),
        ({"members": nn.ModuleList}, "`members` must be modules"),
        ({"members": [nn.Linear(1, 1), 3]}, "`members` must be modules"),
        ({"combine": "median"}, "`combine` must be one of 'probabilities', 'logits', 'vote', 'mean', got 'median'."),
        ({"output": "scores"}, "`output` must be one of 'logits', 'probabilities', got 'scores'."),
        ({"combine": "logits", "output": "probabilities"}, "`combine='logits'` must have members that return logits"),
        ({"mode": "map"}, "`mode` must be one of 'auto', 'vmap', 'loop', got 'map'."),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ArgumentError) as raised:
        Ensemble(**{"members": [nn.Linear(1, 1)], **arguments})
    assert words in str(raised.value)


def test_members_that_return_no_tensor_are_refused(x):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TrickError, match="must return one tensor each, and one returned a tuple"):
        Ensemble([Pair(), Pair()]).eval()(x)
