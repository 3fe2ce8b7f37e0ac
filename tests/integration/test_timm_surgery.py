"""Forty of timm's models, with activations swapped and weights drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tricks.functional import initialize, swap_activation
from lightning_tricks.normalization._activations import kind_of
from lightning_tricks.normalization._initializing import sign_of_training

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")]

FREE = (
    "resnet10t", "resnet18", "resnetv2_18", "seresnet18", "ecaresnet26t", "resnest14d", "regnetx_002", "regnety_002",
    "ese_vovnet19b_slim_dw",
    "rexnet_100", "mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_lite0", "mnasnet_small", "lcnet_035", "ghostnet_050",
    "tf_efficientnetv2_b0", "hardcorenas_a", "convnext_atto", "convnextv2_atto", "darknet17", "dla34", "repvgg_a0",
    "edgenext_xx_small", "tinynet_e", "poolformerv2_s12", "nf_regnet_b0", "fbnetc_100", "fastvit_t8", "mobilevit_xxs",
)  # fmt: skip
SIZED = (
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "cait_xxs24_224",
    "xcit_nano_12_p16_224", "test_vit2", "eva02_tiny_patch14_224", "resmlp_12_224", "gmlp_ti16_224",
)  # fmt: skip


def make(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **({"img_size": 64} if name in SIZED else {}))


def runs(model: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    model.train()(x).square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", [*FREE, *SIZED])
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
