"""`functional.fold_batch_norm`: what is folded, what is not and why, and that outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_tricks import errors
from lightning_tricks.functional import fold_batch_norm


def settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Give BatchNorm layers statistics, scales and shifts as after training."""
    torch.manual_seed(0)
    for norm in model.modules():
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            if norm.weight is not None:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model.to(dtype).eval()


class Standing(nn.BatchNorm2d):
    """Is not known to compute what its base does."""


class Branching(nn.Module):
    """Cannot be traced as a whole, since it decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


class Several(nn.Module):
    """Uses the output of its layers in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.used_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.twice_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.read, self.read_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.first = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.after = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.used(x)
        x = self.used_norm(y) + y
        x = self.twice_norm(self.twice(x)) + self.twice(x)
        x = self.read_norm(self.read(x)) + self.read.weight.sum()
        return self.after(self.relu(x)) + self.after(x)


class Changing(nn.Module):
    """Keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.net(x)


LAYERS = [
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 7)),
    (nn.Conv2d(4, 6, 3, bias=False, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4, affine=False), (1, 2, 3, 3, 3)),
    (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6, eps=0.1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), (2, 4, 3, 3)),
    (nn.ConvTranspose3d(2, 2, 2), nn.BatchNorm3d(2), (1, 2, 2, 2, 2)),
    (nn.Linear(3, 5), nn.BatchNorm1d(5), (4, 3)),
    (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 5, 5)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_outputs_stay_and_the_norm_goes(layer, norm, shape):
    net = settled(nn.Sequential(copy.deepcopy(layer), nn.Identity(), nn.Dropout(0.5), copy.deepcopy(norm), nn.ReLU()))
    x = torch.randn(*shape, dtype=torch.float64)
    expected = net(x)
    report = fold_batch_norm(net)
    assert dict(report.folded) == {"3": "0"}
    assert report.left == report.untraced == {}
    assert type(net[3]) is nn.Identity
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_low_precision_is_rounded_once():
    net = settled(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), torch.bfloat16)
    exact = copy.deepcopy(net).double()
    fold_batch_norm(net)
    fold_batch_norm(exact)
    assert torch.equal(net[0].weight, exact[0].weight.bfloat16())
    assert torch.equal(net[0].bias, exact[0].bias.bfloat16())


def test_a_copy_leaves_the_model_alone():
    net = settled(nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5)))
    before = copy.deepcopy(net.state_dict())
    report = fold_batch_norm(net, inplace=False)
    assert report.model is not net
    assert list(report.model.state_dict()) == ["0.weight", "0.bias"]
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_is_not_alone_is_left_with_the_reason():
    net = settled(Several())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = net(x)
    assert dict(fold_batch_norm(net).left) == {
        "used_norm": "the output of 'used' before it is used elsewhere, too",
        "twice_norm": "'twice' is called 2 times",
        "read_norm": "tensors of 'read' are used elsewhere, too",
        "first": "it follows the model's input",
        "after": "it is called 2 times",
    }
    assert torch.equal(net(x), expected)


def tie(net: nn.Sequential) -> None:
    net.append(nn.Conv2d(3, 3, 1))
    net[2].weight = net[0].weight


def share(net: nn.Sequential) -> None:
    net.add_module("again", net[0])


def parametrize(net: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(net[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tie, "'0' or one of its tensors is shared with another place"),
        (share, "'0' or one of its tensors is shared with another place"),
        (lambda net: net[0].register_forward_hook(lambda *_: None), "'0' has hooks, a replaced `forward` or a parametrization"),
        (lambda net: setattr(net[1], "forward", net[1].forward), "'1' has hooks, a replaced `forward` or a parametrization"),
        (lambda net: net.__setitem__(1, Standing(3)), "a Standing may compute more than its base"),
        (lambda net: net.__setitem__(1, nn.BatchNorm2d(3, track_running_stats=False)), "it keeps no running statistics"),
        (lambda net: net.__setitem__(0, nn.PReLU(3)), "it follows '0', a PReLU"),
    ],
)
def test_what_may_compute_something_else_is_left(change, reason):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    change(net)
    net = settled(net)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = net(x)
    report = fold_batch_norm(net)
    assert dict(report.left) == {"1": reason}
    assert torch.equal(net(x), expected)


def test_parametrized_layers_are_left():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    parametrize(net)
    assert "ParametrizedConv2d" in fold_batch_norm(settled(net)).left["1"]


def test_modules_that_cannot_be_traced_are_opened():
    net = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Branching(), nn.BatchNorm2d(3)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = net(x)
    report = fold_batch_norm(net)
    assert dict(report.folded) == {"1": "0", "2.inner.1": "2.inner.0"}
    assert dict(report.left) == {"2.norm": "no module that could be traced calls it", "3": "it follows '2', a Branching"}
    assert list(report.untraced) == ["2"]
    torch.testing.assert_close(net(x), expected)


def test_tracing_leaves_nothing_in_the_model():
    net = settled(Changing())
    report = fold_batch_norm(net)
    assert net.seen == []
    assert dict(report.folded) == {"net.1": "net.0"}


def test_selection_and_refusals():
    net = settled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert dict(fold_batch_norm(net, where="1", inplace=False).folded) == {"1": "0"}
    assert dict(fold_batch_norm(net, exclude="1", inplace=False).folded) == {"3": "2"}
    with pytest.raises(errors.NothingMatchedError, match=r"`where='head'` and `exclude=\(\)` left none of 2 \('1', '3'\)"):
        fold_batch_norm(net, where="head")
    with pytest.raises(errors.NothingMatchedError, match="found no BatchNorm in Linear: there is none"):
        fold_batch_norm(nn.Linear(2, 2))
    net[3].train()
    with pytest.raises(errors.ArgumentError, match=r"its '3' is in training mode. Call `model.eval\(\)`"):
        fold_batch_norm(net)
    with pytest.raises(errors.ArgumentError, match="the model is in training mode"):
        fold_batch_norm(net.train())


# timm's models, each with the number of BatchNorm layers that no layer precedes
TIMM = {
    "resnet18": 0,
    "mobilenetv3_small_050": 0,
    "tf_efficientnet_lite0": 0,
    "regnety_002": 0,
    "repvgg_a0": 17,
    "resnetv2_50": 17,
    "densenet121": 62,
    "hrnet_w18_small": 0,
    "dla34": 0,
}


@pytest.mark.full
@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm_keep_their_outputs(name):
    import timm

    net = settled(timm.create_model(name, num_classes=5))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        report = fold_batch_norm(net)
        torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    remaining = [name for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(remaining) == len(report.left) == TIMM[name]
    assert report.folded
    assert report.untraced == {}
