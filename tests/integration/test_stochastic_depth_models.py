"""Stochastic depth in models of other packages: forty of timm, and small ones of transformers, without data or weights from elsewhere."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from lightning_tricks.functional import apply_stochastic_depth, remove_stochastic_depth

pytestmark = pytest.mark.full

SMALL = {"img_size": 64}
SHALLOW = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4}

# By timm's names: arguments, the side of images, and whether the branches of blocks are dropped each by itself.
TIMM = {
    "vit_tiny_patch16_224": (SHALLOW, 64, True),
    "deit3_small_patch16_224": (SHALLOW, 64, True),
    "beit_base_patch16_224": (SHALLOW, 64, True),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 4}, 56, True),
    "cait_xxs24_224": (SHALLOW, 64, True),
    "xcit_nano_12_p16_224": (SHALLOW, 64, True),
    "convit_tiny": (SHALLOW | {"local_up_to_layer": 1}, 64, True),
    "mixer_s32_224": (SMALL, 64, True),
    "resmlp_12_224": (SMALL, 64, True),
    "gmlp_ti16_224": (SMALL, 64, True),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24}, 56, True),
    "swinv2_tiny_window8_256": ({"img_size": 64, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24}, 64, True),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1)}, 64, True),
    "poolformer_s12": ({}, 64, True),
    "twins_pcpvt_small": ({"img_size": 64, "depths": (1, 1, 1, 1)}, 64, True),
    "focalnet_tiny_srf": ({}, 64, True),
    "pit_ti_224": (SMALL, 64, True),
    "hiera_tiny_224": ({"stages": (1, 1, 2, 1), "img_size": 64}, 64, True),
    "mvitv2_tiny": (SMALL, 64, True),
    "davit_tiny": ({"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4)}, 64, False),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, 64, True),
    "convnextv2_atto": ({"depths": (1, 1, 1, 1)}, 64, True),
    "inception_next_atto": ({"depths": (1, 1, 1, 1)}, 64, True),
    "edgenext_xx_small": ({"depths": (1, 1, 1, 1)}, 64, True),
    "mambaout_femto": ({"depths": (1, 1, 1, 1)}, 64, True),
    "starnet_s1": ({}, 64, True),
    "resnet18": ({}, 64, False),
    "resnet50": ({"layers": (2, 2, 1, 1)}, 64, False),
    "seresnet50": ({"layers": (2, 2, 1, 1)}, 64, False),
    "res2net50_26w_4s": ({"layers": (2, 2, 1, 1)}, 64, False),
    "regnetx_002": ({}, 64, True),
    "efficientnet_b0": ({}, 64, True),
    "mobilenetv2_100": ({}, 64, True),
    "mobilenetv3_small_100": ({}, 64, True),
    "cspresnet50": ({}, 32, True),
    "dla34": ({}, 64, False),
    "convmixer_768_32": ({}, 28, False),
    "nest_tiny": (SMALL, 64, True),
    "levit_128s": (SMALL, 64, True),
    "fastvit_t8": ({"layers": (2, 1, 1, 1)}, 64, False),
    "mobilevit_xxs": ({}, 64, True),
    "visformer_tiny": (SMALL, 64, True),
}

NO_RESIDUAL = {
    "densenet121": "it changes the shape",  # concatenates
    "repvgg_a0": "its input is normalized before it is added",
    "dpn48b": "it changes the shape",  # concatenates beside the sum
}


def check(model: nn.Module, run, *, separate: bool | None = None) -> None:
    """Forward and backward in training, and the plain output in evaluation."""
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        plain = run(model)
    report = apply_stochastic_depth(model, 0.5, growth="uniform")
    assert separate is None or bool(report.branches) == separate, report
    with torch.no_grad():
        assert torch.equal(run(model), plain)
    model.train()
    run(model).float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    draws = [each for each in map(share_dropped, model.modules()) if each is not None]
    assert draws
    assert all(share == 0.5 for share in draws)
    remove_stochastic_depth(model)
    assert all("forward" not in vars(module) for module in model.modules())


def share_dropped(module: nn.Module) -> float | None:
    held = vars(module).get("forward")
    while held is not None and not hasattr(held, "dropped"):
        held = getattr(held, "before", None)
    return None if held is None else held.dropped


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    options, side, separate = TIMM[name]
    images = torch.randn(4, 3, side, side)
    check(importlib.import_module("timm").create_model(name, num_classes=5, **options), lambda model: model(images), separate=separate)


@pytest.mark.parametrize("name", NO_RESIDUAL)
def test_timm_without_residual_blocks_of_one_shape(name):
    with pytest.raises(Exception, match=f"found no residual block.*{NO_RESIDUAL[name]}"):
        apply_stochastic_depth(importlib.import_module("timm").create_model(name), 0.5)


def small(name: str, **options: object) -> nn.Module:
    transformers = importlib.import_module("transformers")
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))


TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
TRANSFORMERS = {
    "Bert": TEXT,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32},
    "ViT": IMAGE,
    "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "CLIP": {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    model = small(name, **TRANSFORMERS[name])
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    tokens, images = torch.arange(20).view(4, 5), torch.randn(4, 3, 32, 32)
    masked = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 1, 1]] * 3 + [[1, 1, 1, 0, 0]])}
    given = {"Bert": masked, "GPT2": masked, "CLIP": masked | {"pixel_values": images}}.get(name, {"pixel_values": images})

    def run(model: nn.Module) -> torch.Tensor:
        output = model(**given)
        return output.logits_per_image + output.logits_per_text.T if name == "CLIP" else output.last_hidden_state

    check(model, run)
