"""Swaps over forty models of timm, there and back, each trained a step, evaluated, saved and loaded."""

from __future__ import annotations

import pytest
import torch

from lightning_tricks.functional import swap_norm
from lightning_tricks.normalization._norm_reading import Norm, read_norm

pytestmark = pytest.mark.full

# Names, and sides of the images where 32 are too few.
MODELS = {
    "resnet18": 32, "resnet26d": 32, "resnext26ts": 32, "regnetx_002": 32, "regnety_002": 32, "densenet121": 32, "mobilenetv2_050": 32,
    "mobilenetv3_small_050": 32, "efficientnet_b0": 32, "mnasnet_050": 32, "ghostnet_050": 32, "fbnetc_100": 32, "lcnet_050": 32,
    "tinynet_e": 32, "dla34": 32, "hrnet_w18_small": 32, "ese_vovnet19b_dw": 32, "repvgg_a0": 32, "skresnet18": 32, "resnest14d": 32,
    "gernet_s": 32, "hgnetv2_b0": 32, "starnet_s1": 32, "repvit_m0_9": 32, "levit_128s": 224, "visformer_tiny": 64, "shvit_s1": 64,
    "inception_next_atto": 32, "resnetv2_50x1_bit": 32, "mobilevit_xxs": 64, "mobilevitv2_050": 64, "xcit_nano_12_p16_224": 32,
    "poolformerv2_s12": 32, "convnext_atto": 32, "convnextv2_atto": 32, "edgenext_xx_small": 64, "vit_tiny_patch16_224": 32,
    "swin_tiny_patch4_window7_224": 56, "cait_xxs24_224": 32, "pit_ti_224": 64, "mixer_s32_224": 64, "mambaout_femto": 32,
    "test_efficientnet_ln": 32, "test_efficientnet_gn": 32, "test_vit4": 32,
}  # fmt: skip
THERE = {"batch": "group", "layer": "rms", "group": "layer", "rms": "layer"}


def kinds_of(model: torch.nn.Module) -> list[str]:
    return [norm.kind for module in model.modules() if isinstance(norm := read_norm(module), Norm)]


def make(name: str, side: int) -> torch.nn.Module:
    from timm import create_model

    try:
        return create_model(name, num_classes=4, img_size=side)
    except TypeError:  # of models for images of any size
        return create_model(name, num_classes=4)


@pytest.mark.parametrize(("name", "side"), MODELS.items(), ids=MODELS)
def test_there_and_back(name: str, side: int, tmp_path):
    torch.manual_seed(0)
    model, images = make(name, side), torch.randn(2, 3, side, side)
    before = kinds_of(model)
    source = max(set(before), key=before.count)
    target = THERE[source]
    assert sum(kind == source for kind in before) > 3
    for one, other in ((source, target), (target, source)):
        present = kinds_of(model).count(one)
        assert len(swap_norm(model, one, other).swapped) == present
        assert one not in kinds_of(model)
        model.train()(images).square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert gradients
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        expected = model.eval()(images)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        twin = make(name, side).eval()
        for one, other in ((source, target), (target, source)):
            swap_norm(twin, one, other)
        twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        assert torch.equal(twin(images), expected)


def test_layers_of_packages_are_told_by_what_they_compute():
    from timm import layers
    from timm.layers.norm_act import FrozenBatchNormAct2d, LayerNormAct2d
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    expected = (
        (layers.BatchNormAct2d(8), "batch", False),
        (layers.GroupNormAct(8, 2), "group", False),
        (layers.GroupNorm1(8), "group", False),
        (layers.LayerNorm2d(8), "layer", False),
        (LayerNormAct2d(8), "layer", False),
        (layers.LayerNorm(8), "layer", True),
        (layers.RmsNorm(8), "rms", True),
        (layers.RmsNorm2d(8), "rms", False),
        (layers.FilterResponseNormTlu2d(8), "response", False),
        (layers.FilterResponseNormAct2d(8), "response", False),
        (FrozenBatchNormAct2d(8), "frozen", False),
        (FrozenBatchNorm2d(8), "frozen", False),
        (LayerNorm2d(8), "layer", False),
    )
    for norm, kind, last in expected:
        found = read_norm(norm)
        assert isinstance(found, Norm), type(norm).__name__
        assert (found.kind, found.last) == (kind, last), type(norm).__name__
    images = torch.randn(2, 8, 4, 4)
    for norm, target in (
        (layers.GroupNormAct(8, 2), "layer"),
        (layers.FilterResponseNormTlu2d(8), "batch"),
        (FrozenBatchNormAct2d(8), "group"),
    ):
        model = torch.nn.Sequential(norm)
        assert model(images).min() >= 0
        swap_norm(model, read_norm(norm).kind, target)
        assert model(images).min() >= 0  # the activation is still there
