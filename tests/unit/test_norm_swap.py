"""Swapping normalization layers without a Trainer: what is understood, what it starts from, surgery, calibration."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lightning_tricks import errors
from lightning_tricks import nn as ltn
from lightning_tricks.functional import swap_norm
from lightning_tricks.normalization._norm_reading import KINDS, Norm, normalize, read_norm
from reference import norm_swap as reference

CHANNELS = 6


def trained(norm: nn.Module) -> nn.Module:
    """Give a layer the scale, shift and statistics of one that has been trained."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in norm.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + (0.5 if "bias" not in name else -0.5)
    return norm


def images(channels: int = CHANNELS, *shape: int) -> Tensor:
    return torch.randn(4, channels, *(shape or (5, 3)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(norm: nn.Module, **extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(norm=norm, **extra)).double()


SOURCES = {
    "batch": nn.BatchNorm2d(CHANNELS),
    "layer": ltn.LayerNorm2d(CHANNELS),
    "group": nn.GroupNorm(2, CHANNELS),
    "instance": nn.InstanceNorm2d(CHANNELS, affine=True),
    "rms": ltn.RMSNorm2d(CHANNELS),
    "ghost": ltn.GhostBatchNorm2d(CHANNELS, 2),
    "sync": nn.SyncBatchNorm(CHANNELS),
    "frozen": ltn.FrozenBatchNorm(CHANNELS),
    "response": ltn.FilterResponseNorm(CHANNELS),
}
TOKENS = {"layer": nn.LayerNorm(CHANNELS), "rms": nn.RMSNorm(CHANNELS)}
HAVE_STATISTICS = {"batch", "ghost", "sync", "frozen"}


# Every kind to every other


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", [*SOURCES, *(f"{kind} of tokens" for kind in TOKENS)])
def test_every_kind_becomes_every_other_or_is_refused(source: str, target: str):
    kind, tokens = source.removesuffix(" of tokens"), source.endswith("tokens")
    old = trained(copy.deepcopy(TOKENS[kind] if tokens else SOURCES[kind])).double()
    old.requires_grad_(requires_grad=False)
    model = net(old)
    if kind == target and kind not in {"group", "ghost"}:
        assert "already" in swap_norm(model, kind, target).left["norm"]
        assert model.norm is old
        return
    if target == "frozen" and kind not in HAVE_STATISTICS:
        with pytest.raises(errors.NothingMatchedError, match="it has no running statistics to be frozen; pass `calibrate`"):
            swap_norm(model, kind, target)
        return
    settings = {"groups": 3} if target == "group" else {"ghost_size": 3} if target == "ghost" else {}
    model.eval()
    report = swap_norm(model, kind, target, **settings)
    new = model.norm
    assert report.swapped == {"norm": f"{type(old).__name__} to {type(new).__name__}"}
    assert not new.training
    assert all(tensor.dtype == torch.float64 for tensor in new.state_dict().values() if tensor.is_floating_point())
    assert not any(parameter.requires_grad for name, parameter in new.named_parameters() if kind != "frozen" and name != "threshold")
    x = (images().movedim(1, -1) if tokens else images()).requires_grad_()
    for mode in (True, False):
        y = model.train(mode)(x)
        assert y.shape == x.shape
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0
    if target != "none":
        found = read_norm(new)
        assert isinstance(found, Norm)
        assert (found.kind, found.last) == (target, tokens)
        if kind != "frozen" or target in HAVE_STATISTICS:
            assert set(swap_norm(model, target, kind, groups=2 if kind == "group" else None).swapped) == {"norm"}


def test_what_cannot_be_swapped_is_refused():
    refused = (
        (nn.BatchNorm2d(1), "batch", "layer", "it has one channel, and normalizing a single value leaves nothing of it"),
        (nn.BatchNorm2d(10), "batch", "group", "its 10 channels cannot be split into groups of 4 channels"),
        (nn.BatchNorm1d(7), "batch", "group", "its 7 channels cannot be split into groups of 4 channels"),
        (nn.LayerNorm((6, 4)), "layer", "rms", "it normalizes over 2 dimensions, (6, 4), at once"),
        (nn.LazyBatchNorm2d(), "batch", "group", "it learns the number of its channels from the first batch"),
    )
    for norm, source, target, words in refused:
        model = nn.Sequential(norm)
        with pytest.raises(errors.NothingMatchedError, match=re.escape(words)):
            swap_norm(model, source, target, groups="4 channels" if target == "group" else None)
        assert model[0] is norm


# What a layer starts from


@pytest.mark.parametrize("target", ["group", "layer", "instance", "rms", "response"])
def test_scale_and_shift_equal_the_slow_reference(target: str):
    old = trained(nn.BatchNorm2d(CHANNELS)).double()
    model = net(old)
    swap_norm(model, "batch", target, **({"groups": 3} if target == "group" else {}))
    groups = {"group": [[0, 1], [2, 3], [4, 5]], "instance": [[c] for c in range(6)], "response": [[c] for c in range(6)]}
    rule = reference.started_about_zero if target in {"rms", "response"} else reference.started
    values = (each.tolist() for each in (old.running_mean, old.running_var, old.weight, old.bias))
    scales, shifts = rule(*values, eps=old.eps, groups=groups.get(target, [list(range(6))]))
    torch.testing.assert_close(model.norm.weight.detach(), torch.tensor(scales, dtype=torch.float64))
    if target != "rms":  # which has no shift
        torch.testing.assert_close(model.norm.bias.detach(), torch.tensor(shifts, dtype=torch.float64))


@pytest.mark.parametrize("target", ["group", "layer", "instance"])
def test_the_function_is_kept_on_inputs_of_the_statistics(target: str):
    old = trained(nn.BatchNorm2d(CHANNELS)).double()
    x = images(CHANNELS, 60, 60)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    x = x * old.running_var.sqrt().view(-1, 1, 1) + old.running_mean.view(-1, 1, 1)
    model = net(old).eval()
    before = model(x)
    swap_norm(model, "batch", target, **({"groups": 2} if target == "group" else {}))
    after = model(x)
    if target == "layer":  # which normalizes by the values of one position
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.85
    else:
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_freezing_is_exact_and_keeps_the_dtype(dtype: torch.dtype):
    model = nn.Sequential(trained(nn.BatchNorm2d(CHANNELS))).to(dtype)
    keys, x = list(model.state_dict()), images().to(dtype)
    expected = copy.deepcopy(model).eval()(x)
    swap_norm(model, "batch", "frozen")
    assert list(model.state_dict()) == keys
    found = model.train()(x)
    assert found.dtype == dtype  # torchvision's gives float32
    assert torch.equal(found, expected)
    assert not list(model.parameters())
    swap_norm(model, "frozen", "batch")
    assert torch.equal(model.eval()(x), expected)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]


def test_parameters_that_keep_their_values_stay_the_same_objects():
    old = trained(nn.BatchNorm2d(CHANNELS))
    model = nn.Sequential(old)
    swap_norm(model, "batch", "sync")
    assert model[0].weight is old.weight
    assert model[0].bias is old.bias
    assert torch.equal(model[0].running_var, old.running_var)
    assert model[0].momentum == old.momentum


def test_layers_without_scale_or_statistics_stay_so():
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False, eps=1e-3))
    swap_norm(model, "batch", "ghost", ghost_size=2)
    assert not model.state_dict()
    assert model[0].eps == 1e-3
    swap_norm(model, "ghost", "group", groups=2)
    assert not model.state_dict()
    assert model[0].eps == 1e-3


# Traps of others


def test_layer_norm_of_images_normalizes_channels_also_where_the_width_equals_them():
    model = net(trained(nn.BatchNorm2d(CHANNELS)))
    x = images(CHANNELS, 4, CHANNELS)  # nn.LayerNorm(6) would take it, and normalize the width
    swap_norm(model, "batch", "layer")
    with torch.no_grad():
        model.norm.weight.fill_(1)
        model.norm.bias.zero_()
    torch.testing.assert_close(model(x).mean(1), torch.zeros_like(x[:, 0]))
    assert not torch.allclose(model(x), nn.functional.group_norm(x, 1, eps=model.norm.eps))  # which pools positions, too


def test_no_group_has_a_single_value():
    model = net(trained(nn.BatchNorm1d(8)))
    report = swap_norm(model, "batch", "group", groups=8)
    assert report.notices == {"norm": "4 groups: 8 channels cannot be split into 8 groups of more than one value"}
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert model(x).std(0).min() > 0  # eight groups would give the shift and nothing else


def test_an_example_tells_how_many_positions_there_are():
    class Model(nn.Module):
        def __init__(self, example: Tensor) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.example_input_array = example

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    for example, number in ((torch.randn(5, 8), 4), (torch.randn(5, 8, 3), 8)):
        model = Model(example)
        swap_norm(model, "batch", "group", groups=8)
        assert model.norm.num_groups == number
    model = Model(torch.randn(5, 8))
    assert model.norm.num_batches_tracked == 0
    with pytest.raises(errors.NothingMatchedError, match="its inputs have no positions to normalize over"):
        swap_norm(model, "batch", "instance")


def test_instance_norm_never_takes_a_batch_of_features_for_one_sample():
    model = nn.Sequential(nn.BatchNorm1d(8))
    swap_norm(model, "batch", "instance")
    assert model(torch.randn(5, 8, 3)).shape == (5, 8, 3)
    with pytest.raises(errors.TrickError, match=re.escape("got the shape (8, 8). Exclude this layer.")):
        model(torch.randn(8, 8))


def test_dimensions_that_the_type_does_not_tell_are_taken_as_they_come():
    model = nn.Sequential(nn.GroupNorm(2, 4))
    swap_norm(model, "group", "batch")
    for shape in ((3, 4), (3, 4, 5), (3, 4, 5, 5), (3, 4, 2, 5, 5)):
        x = torch.randn(shape)
        expected = nn.functional.batch_norm(x, None, None, training=True)
        torch.testing.assert_close(model.train()(x), expected)
    for norm in (nn.BatchNorm1d(4), nn.BatchNorm3d(4)):
        model = nn.Sequential(norm)
        assert list(swap_norm(model, "batch", "ghost", ghost_size=2).swapped) == ["0"]
        assert isinstance(model[0], type(norm))


def test_numbers_of_groups_are_lowered_to_divisors_and_sizes_are_not():
    model = nn.Sequential(nn.BatchNorm2d(48), nn.BatchNorm2d(64), nn.BatchNorm2d(7))
    report = swap_norm(model, "batch", "group")
    assert [norm.num_groups for norm in model] == [24, 32, 7]
    assert list(report.notices) == ["0", "2"]
    assert report.notices["0"] == "24 groups: 48 channels cannot be split into 32 groups"
    model = nn.Sequential(nn.BatchNorm2d(48), nn.BatchNorm2d(60))
    report = swap_norm(model, "batch", "group", groups="16 channels")
    assert model[0].num_groups == 3
    assert report.left == {"1": "its 60 channels cannot be split into groups of 16 channels"}
    assert swap_norm(model, "group", "group", groups=2).swapped == {"0": "GroupNorm to GroupNorm"}
    assert model[0].num_groups == 2


# Layers of other packages, by what they compute


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Strange(nn.BatchNorm2d):
    """Computes something else than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class LlamaRMSNorm(nn.Module):
    """As that of transformers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(channels)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x)


class T5LayerNorm(LlamaRMSNorm):
    """As that of transformers, which is no layer norm."""


class ConvNextLayerNorm(nn.LayerNorm):
    """As that of transformers."""

    def __init__(self, channels: int, data_format: str) -> None:
        super().__init__(channels)
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if self.data_format == "channels_first" else super().forward(x)


class LayerNorm2d(nn.LayerNorm):
    """As torchvision's and timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_layers_of_other_packages_are_told_by_what_they_compute():
    expected = (
        (Activated(6), "batch", False),
        (FrozenBatchNorm2d(6), "frozen", False),
        (LlamaRMSNorm(6), "rms", True),
        (T5LayerNorm(6), "rms", True),
        (ConvNextLayerNorm(6, "channels_first"), "layer", False),
        (ConvNextLayerNorm(6, "channels_last"), "layer", True),
        (LayerNorm2d(3), "layer", False),
        (nn.SyncBatchNorm(6), "sync", False),
        (nn.Linear(6, 6), None, None),
    )
    for norm, kind, last in expected:
        found = read_norm(trained(norm))
        assert (getattr(found, "kind", None), getattr(found, "last", None)) == (kind, last), type(norm).__name__
    assert read_norm(Strange(6)) == "what Strange computes is none of the normalizations known here"
    with pytest.raises(errors.NothingMatchedError, match="what Strange computes is none"):
        swap_norm(nn.Sequential(Strange(6)), "batch", "group")


@pytest.mark.parametrize("target", ["group", "layer", "rms", "frozen", "ghost", "sync", "none"])
def test_an_activation_inside_a_layer_stays(target: str):
    model = net(trained(Activated(CHANNELS)))
    activation, keys = model.norm.act, {name for name in model.state_dict() if "act" in name}
    swap_norm(model, "batch", target)
    assert model.norm.act is activation
    assert {name for name in model.state_dict() if "act" in name} == keys
    x = images()
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        y = twin.eval()(x)
        with torch.no_grad():
            twin.norm.act.weight.fill_(1.0)  # now the activation is none
        assert not torch.equal(twin(x), y)
        assert (twin(x)[y > 0] == y[y > 0]).all()


def test_reading_computes_what_torch_does():
    x = images()
    for kind, fresh in SOURCES.items():
        norm = trained(copy.deepcopy(fresh)).double().eval()
        found = read_norm(norm)
        assert found.kind == kind
        y = found.affine(normalize(found, x))
        torch.testing.assert_close(torch.maximum(y, norm.threshold.view(-1, 1, 1)) if kind == "response" else y, norm(x))


# Surgery


class Shared(nn.Module):
    """Holds one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(3, 4, 1), self.first[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("target", ["group", "sync", "frozen"])  # torch's own conversion to "sync" splits the layer and drops its hooks
def test_a_shared_layer_stays_one_and_hooks_stay(target: str):
    model, seen = Shared(), []
    handle = model.first[1].register_forward_hook(lambda *_: seen.append(1))
    report = swap_norm(model, "batch", target, groups=2 if target == "group" else None)
    assert list(report.swapped) == ["first.1"]
    assert model.first[1] is model.second[1]
    model(torch.randn(2, 3, 4, 4))
    assert len(seen) == 2
    handle.remove()
    model(torch.randn(2, 3, 4, 4))
    assert len(seen) == 2


def test_twice_is_once():
    model = Shared()
    swap_norm(model, "batch", "group", groups=2)
    state, norm = {name: value.clone() for name, value in model.state_dict().items()}, model.first[1]
    report = swap_norm(model, "batch", "group", groups=2)
    assert (report.swapped, report.left) == ({}, {})
    assert swap_norm(model, "group", "none").swapped == {"first.1": "GroupNorm to Identity"}
    assert swap_norm(model, "batch", "group").swapped == swap_norm(model, "group", "none").swapped == {}
    model.first[1] = model.second[1] = norm
    assert model.first[1] is norm
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_globs_choose_and_leave_out():
    model = nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), "b": nn.BatchNorm2d(4)})
    assert list(swap_norm(model, "batch", "layer", where="a", exclude="a.1").swapped) == ["a.0"]
    assert list(swap_norm(model, "batch", "layer").swapped) == ["a.1", "b"]


def test_errors_say_what_there_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    for arguments, words in (
        (("group", "layer", None, ()), "Sequential has none. It has 'batch' ×1 such as '1', 'layer' ×1 such as '2'"),
        (("batch", "layer", "head", ()), "`where='head'` matched none of Sequential's 1. Their names look like '1'"),
        (("batch", "layer", "*", "*"), "`exclude='*'` removed all 1"),
    ):
        source, target, where, exclude = arguments
        with pytest.raises(errors.NothingMatchedError, match=re.escape(words)):
            swap_norm(model, source, target, where=where, exclude=exclude)
    with pytest.raises(errors.NothingMatchedError, match="Sequential has no normalization layers inside it"):
        swap_norm(nn.Sequential(nn.Linear(2, 2)), "batch", "group")


def test_a_model_that_is_sharded_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].weight.ds_id = 0  # as ZeRO-3 marks what it has spread
    with pytest.raises(errors.UnsupportedStrategyError, match=r"Call `functional\.swap_norm` before that, in `configure_model`"):
        swap_norm(model, "batch", "group")
    assert isinstance(model[0], nn.BatchNorm2d)


def test_a_model_without_values_is_swapped():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), LayerNorm2d(4))
    swap_norm(model, "batch", "group", groups=2)
    assert swap_norm(model, "layer", "rms").swapped == {"2": "LayerNorm2d to RMSNorm2d"}
    assert all(parameter.is_meta for parameter in model.parameters())


# Calibration


class Deep(nn.Module):
    """Layers that see what others give, one that runs twice, and one that no pass reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4))
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), trained(Activated(4))
        self.twice, self.spare = trained(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.norm2.weight[0] *= -1

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(self.dropout(x)))
        return self.twice(x) + self.twice(x.square())


def moments(model: nn.Module, batches: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel of what a layer gives before its activation, in evaluation."""
    norm, values = model.get_submodule(name), []
    handle = norm.register_forward_pre_hook(lambda _, args: values.append((found := read_norm(norm)).affine(normalize(found, args[0]))))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    pooled = torch.cat([value.transpose(0, 1).flatten(1) for value in values], 1)
    return pooled.mean(1), pooled.var(1)


@pytest.mark.parametrize("target", ["group", "layer", "instance", "response", "frozen"])
def test_calibrated_layers_have_the_mean_and_variance_of_the_old(target: str):
    torch.manual_seed(0)
    model = Deep().double()
    if target == "frozen":
        swap_norm(model, "batch", "layer")
    source = "layer" if target == "frozen" else "batch"
    batches = [torch.randn(size, 3, 7, 7, dtype=torch.float64) for size in (8, 8, 3)]
    state = torch.get_rng_state()
    names = ("norm1", "norm2") if target == "response" else ("norm1", "norm2", "twice")  # whose threshold leaves it nothing here
    before = {name: moments(copy.deepcopy(model).eval(), batches, name) for name in names}
    settings = {"groups": 2} if target == "group" else {}
    report = swap_norm(model, source, target, calibrate=batches, **settings)
    assert report.notices == {"spare": "the pass did not reach it"}
    assert model.training
    assert model.norm1.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    for name in names:
        for each, was in zip(moments(model, batches, name), before[name], strict=True):
            torch.testing.assert_close(each, was)
    assert (model.norm2.weight[0] < 0) == (model.norm2.weight[1] > 0)


def test_calibration_leaves_what_is_exact_and_says_what_it_cannot_fit():
    model = nn.Sequential(trained(nn.BatchNorm2d(3)), nn.BatchNorm2d(3, affine=False))
    x = [torch.randn(8, 3, 5, 5)]
    expected = model.eval()(x[0])
    assert swap_norm(model, "batch", "frozen", where="0", calibrate=x).notices["0"].startswith("it computes what the old layer did")
    assert torch.equal(model(x[0]), expected)
    assert swap_norm(model, "batch", "group", groups=1, calibrate=x).notices["1"] == "it has no scale and shift to fit"


def test_calibration_needs_a_batch():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(errors.ArgumentError, match="`calibrate` must have at least one batch, and has none"):
        swap_norm(model, "batch", "group", calibrate=[])
    assert isinstance(model[0], nn.BatchNorm2d)


def test_an_exception_in_calibration_leaves_new_layers_and_modes():
    model = Deep()

    def fails(batch: Tensor) -> None:
        model(batch)
        raise RuntimeError("here")  # noqa: EM101

    with pytest.raises(RuntimeError, match="here"):
        swap_norm(model, "batch", "layer", calibrate=[torch.randn(4, 3, 7, 7)], forward=fails)
    assert isinstance(model.norm1, ltn.LayerNorm2d)
    assert all(module.training for module in model.modules())
    assert not model.norm1._forward_pre_hooks


@pytest.mark.parametrize("target", ["batch", "none"])
def test_what_stands_in_for_a_threshold_may_be_overwritten_as_residual_networks_do(target):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ltn.FilterResponseNorm(4))
    swap_norm(model, "response", target)
    out = model(torch.randn(2, 3, 5, 5))
    assert (out >= 0).all()
    out += 1
    out.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("target", ["layer", "none"])
def test_an_activation_inside_a_layer_acts_once_after_several_swaps(target):
    model = nn.Sequential(Activated(4))
    swap_norm(model, "batch", "group", groups=2)
    swap_norm(model, "group", target)
    inner = list(model[0].children())
    x, calls = images(4).float(), []
    for module in inner:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    model(x)
    assert calls == inner
