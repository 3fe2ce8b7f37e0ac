"""Forty of timm's models, with activations swapped and weights drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tricks.functional import initialize, swap_activation
from lightning_tricks.normalization._activations import kind_of
from lightning_tricks.normalization._initializing import sign_of_training

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")]

SMALL = {"img_size": 64}
MODELS: dict[str, dict[str, object]] = {
    **dict.fromkeys(
        ("resnet10t", "resnet18", "resnetv2_18", "seresnet18", "ecaresnet26t", "res2net50_48w_2s", "regnetx_002", "regnety_002",
         "densenet121", "vgg11_bn", "mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_lite0", "mnasnet_small", "lcnet_035",
         "ghostnet_050", "tf_efficientnetv2_b0", "hardcorenas_a", "convnext_atto", "convnextv2_atto", "cspresnet50", "dla34", "repvgg_a0",
         "edgenext_xx_small", "mobileone_s0", "poolformerv2_s12", "nf_regnet_b0", "fbnetc_100", "xception41p", "mobilevit_xxs"),
        {},
    ),
    **dict.fromkeys(
        ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
         "beit_base_patch16_224", "eva02_tiny_patch14_224", "resmlp_12_224", "gmlp_ti16_224"),
        SMALL,
    ),
}  # fmt: skip


def make(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **MODELS[name])


def runs(model: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    model.train()(x).square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_surgery_leaves_a_model_that_trains(name):
    model = make(name)
    keys = list(model.state_dict())
    assert sign_of_training(model) is None
    kinds = {kind_of(module) for module in model.modules()} - {None, "identity", "sigmoid", "hardsigmoid"}
    target = "mish" if "elu" in kinds else "elu"
    swapped = swap_activation(model, sorted(kinds), target).swapped
    assert swapped
    assert {kind_of(module) for module in model.modules()} <= {None, "identity", "sigmoid", "hardsigmoid", target}
    assert list(model.state_dict()) == keys
    report = initialize(model, "kaiming_normal", seed=0)
    assert {layer.activation for layer in report.layers.values()} >= {target}
    runs(model)
    assert list(model.state_dict()) == keys
