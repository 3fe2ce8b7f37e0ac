"""The audit: the rule by owner and the inferred layers over every family of timm's models, from their shapes alone."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from lightning_tricks import optim
from lightning_tricks._core.layers import inferred_layers
from lightning_tricks._core.owners import owned_parameters

pytestmark = pytest.mark.full

CURATED = {"swin_transformer_v2": 48, "twins": 4, "xcit": 1}
"""Matrices that the lists of a family's model exempt, and that the rule alone would decay."""

SPARED = (
    "*height_rel",
    "*width_rel",
    "*.temperature",
    "*.alpha",
    "*gamma*",
    "*.gain",
    "*.w_g",
    "pos_embed?",
    "*.rel_pos_?",
)
"""Names of all that timm's rule decays and ours does not: scales, gains, temperatures and positions of two and more dimensions."""


@pytest.fixture(scope="module")
def models():
    """One model of each family, without memory."""
    import timm
    from timm.models import list_models, list_modules

    made = {}
    with torch.device("meta"):
        for family in sorted(list_modules()):
            made[family] = timm.create_model(list_models(module=family)[0])
    return made


def timm_decays(name: str, parameter: nn.Parameter, listed) -> bool:
    """Timm's own rule, by rank and by the model's list."""
    return parameter.ndim > 1 and not name.endswith(".bias") and not any(fnmatch(name, pattern) for pattern in listed)


def listed_by(model) -> set[str]:
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def test_the_audit_sees_about_a_hundred_families(models):
    assert len(models) > 90
    assert sum(len(list(model.parameters())) for model in models.values()) > 25_000


def test_nothing_decays_that_timm_spares(models):
    for family, model in models.items():
        listed = listed_by(model)
        for owned in owned_parameters(model):
            if owned.kind == "matrix" and not owned.exempt:
                assert timm_decays(owned.names[0], owned.parameter, listed), f"{family}: {owned.names[0]}"


def test_the_rule_finds_almost_every_curated_exemption_by_itself(models):
    missed = Counter()
    for family, model in models.items():
        listed = listed_by(model)
        missed[family] = sum(
            owned.kind == "matrix" and any(fnmatch(owned.names[0], pattern) for pattern in listed) for owned in owned_parameters(model)
        )
    assert {family: count for family, count in missed.items() if count} == CURATED


def test_what_timm_decays_and_we_spare_are_scales_gains_temperatures_and_positions(models):
    spared = 0
    for family, model in models.items():
        listed = listed_by(model)
        for owned in owned_parameters(model):
            if (owned.kind != "matrix" or owned.exempt) and timm_decays(owned.names[0], owned.parameter, listed):
                spared += 1
                assert any(fnmatch(owned.names[0], pattern) for pattern in SPARED), f"{family}: {owned.names[0]}"
    assert 250 < spared < 350


def test_groups_hold_every_parameter_once_and_are_few(models):
    for family, model in models.items():
        groups = optim.AdamW(weight_decay=0.05).groups(model)
        names = [name for group in groups for name in group.names]
        assert len(groups) <= 2, family
        assert sorted(names) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad), family


def test_groups_are_the_same_inside_another_module_and_compiled(models):
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    for family, model in models.items():
        plain = optim.AdamW(weight_decay=0.05).groups(model)
        held = optim.AdamW(weight_decay=0.05).groups(Holder(torch.compile(model)))
        assert [(group.options, group.parameters) for group in held] == [(group.options, group.parameters) for group in plain], family


def test_layers_are_those_that_models_say(models):
    from timm.models import group_parameters

    said = 0
    for family, model in models.items():
        if hasattr(model, "group_matcher"):
            said += 1
            layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
            owned = owned_parameters(model)
            assert inferred_layers(model, owned, "test") == [layers[each.names[0]] for each in owned], family
    assert said > 90


@pytest.mark.parametrize(
    "family", ["beit", "convnext", "eva", "hiera", "resnet", "swin_transformer", "swin_transformer_v2", "vision_transformer_sam"]
)
def test_blocks_alone_give_the_same_layers(models, family, monkeypatch):
    """As for models that say nothing of themselves."""
    model = models[family]
    owned = owned_parameters(model)
    said = inferred_layers(model, owned, "test")
    monkeypatch.delattr(type(model), "group_matcher")
    found = inferred_layers(model, owned, "test")
    assert max(found) == max(said)
    same = sum(ours == theirs for ours, theirs in zip(found, said, strict=True))
    assert same >= 0.98 * len(said)  # timm counts some norms before the head, and some stems, to their neighbours


def test_layer_decay_survives_a_lightning_module_and_reaches_every_scheduler(models):
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    recipe = optim.AdamW(1e-3, weight_decay=0.05, layer_decay=0.75)
    groups = recipe.groups(Holder(models["beit"]))
    assert len(groups) == 28
    assert len({group.options["lr"] for group in groups}) == 14
    assert max(group.options["lr"] for group in groups) == 1e-3
    assert min(group.options["lr"] for group in groups) == pytest.approx(1e-3 * 0.75**13)


def test_what_stands_around_a_model_is_before_its_first_layer_or_after_its_last(models):
    class Finetuned(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))
            self.backbone = model
            self.head = nn.Linear(4, 2)

    model = Finetuned(models["beit"])
    owned = owned_parameters(model)
    layers = dict(zip((each.names[0] for each in owned), inferred_layers(model, owned, "test"), strict=True))
    assert (layers["shift"], layers["backbone.patch_embed.proj.weight"], layers["backbone.head.weight"], layers["head.weight"]) == (
        0,
        0,
        13,
        14,
    )
    two = nn.ModuleDict({"a": models["beit"], "b": models["resnet"]})
    with pytest.raises(ValueError, match=r"several models, 'a.', 'b.', whose layers have no common order. Give `layers`"):
        inferred_layers(two, owned_parameters(two), "test")
