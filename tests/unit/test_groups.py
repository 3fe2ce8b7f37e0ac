"""Parameter groups: what decays, who overrides, which layer, each parameter once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, weight_norm

from lightning_tricks import errors, optim
from lightning_tricks._core.layers import given_layers, inferred_layers
from lightning_tricks._core.owners import clean_name, kind_of, owned_parameters
from lightning_tricks.optimization._groups import check_complete
from reference.optimizers import layer_rates


class DebiasProj(nn.Linear):
    """Merely sounds like a bias."""


class LayerScaleRMSNorm(nn.Module):
    """A norm that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4, 1))

    def forward(self, x):
        return x + self.gamma.T * self.fc(self.attn(self.norm(x), x, x)[0])


class Vit(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.logit_mlp = nn.Linear(4, 4)
        self.embed = nn.Conv2d(1, 4, 2)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"logit_mlp", "blocks.1.fc.weight", "not_there"}


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def kinds(model: nn.Module) -> dict[str, str]:
    return {owned.names[0]: owned.kind for owned in owned_parameters(model)}


def decays(model: nn.Module, **arguments) -> dict[str, float]:
    groups = optim.AdamW(weight_decay=0.1, **arguments).groups(model)
    return {name: group.options["weight_decay"] for group in groups for name in group.names}


def rates(model: nn.Module, recipe) -> dict[str, float]:
    return {name: group.options["lr"] for group in recipe.groups(model) for name in group.names}


@pytest.mark.parametrize(
    ("make", "matrices"),
    [
        (lambda: nn.Linear(2, 2), {"weight"}),
        (lambda: DebiasProj(2, 2), {"weight"}),
        (lambda: nn.LazyLinear(2), {"weight"}),
        (lambda: nn.Conv1d(2, 2, 3), {"weight"}),
        (lambda: nn.ConvTranspose3d(2, 2, 3), {"weight"}),
        (lambda: nn.LazyConv2d(2, 3), {"weight"}),
        (lambda: nn.Bilinear(2, 2, 2), {"weight"}),
        (lambda: nn.GRUCell(2, 3), {"weight_ih", "weight_hh"}),
        (
            lambda: nn.LSTM(2, 3, proj_size=2, bidirectional=True),
            {f"weight_{k}_l0{r}" for k in ("ih", "hh", "hr") for r in ("", "_reverse")},
        ),
        (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_weight", "out_proj.weight"}),
        (lambda: nn.MultiheadAttention(4, 2, kdim=3), {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}),
        (lambda: nn.Embedding(4, 2), set()),
        (lambda: nn.PReLU(4), set()),
        (lambda: nn.GroupNorm(2, 4), set()),
        (LayerScaleRMSNorm, set()),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), {"parametrizations.weight.original1"}),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 2, 3)), {"parametrizations.weight.original"}),
    ],
)
def test_matrices_are_what_layers_own_as_weights(make, matrices):
    assert {name for name, kind in kinds(make()).items() if kind == "matrix"} == matrices


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_direction_of_the_old_weight_norm_is_the_matrix_and_its_magnitude_is_not():
    assert kinds(weight_norm(nn.Linear(3, 2))) == {"bias": "bias", "weight_g": "other", "weight_v": "matrix"}


def test_the_linear_layer_of_gpt2_is_known_by_its_name():
    module = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})()
    assert (kind_of(module, "weight"), kind_of(module, "bias")) == ("matrix", "bias")
    assert kind_of(type("Conv1D", (nn.Module,), {"__module__": "mine"})(), "weight") == "other"


def test_kinds_of_all_else():
    assert set(kinds(nn.BatchNorm1d(2)).values()) == {"norm"}
    assert kinds(LayerScaleRMSNorm()) == {"weight": "norm"}
    assert kinds(nn.EmbeddingBag(3, 2)) == {"weight": "embedding"}
    assert {kind for name, kind in kinds(nn.MultiheadAttention(4, 2, add_bias_kv=True)).items() if "bias" in name} == {"bias"}
    assert {kind for name, kind in kinds(Vit()).items() if name in {"cls_token", "blocks.0.gamma"}} == {"other"}


def test_only_matrices_decay_and_exemptions_of_the_model_hold():
    decayed = {name for name, decay in decays(Vit()).items() if decay}
    blocks = {f"blocks.{i}.{name}" for i in range(3) for name in ("attn.in_proj_weight", "attn.out_proj.weight", "fc.weight")}
    assert decayed == {"embed.weight", "head.weight", *blocks} - {"blocks.1.fc.weight"}


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda model: model, ""),
        (Holder, "model."),
        (torch.compile, ""),
        (lambda model: Holder(torch.compile(model)), "model."),
        (lambda model: torch.compile(Holder(model)), "model."),
        (lambda model: Holder(checkpoint_wrapper(model)), "model."),
    ],
    ids=["plain", "held", "compiled", "held compiled", "compiled holder", "checkpointed"],
)
@pytest.mark.parametrize("arguments", [{}, {"layer_decay": 0.5}], ids=["one rate", "layer decay"])
def test_groups_are_the_same_wherever_the_model_sits(wrap, prefix, arguments):
    recipe = optim.AdamW(weight_decay=0.1, **arguments)
    plain = [(group.options, tuple(prefix + name for name in group.names)) for group in recipe.groups(Vit())]
    assert [(group.options, group.names) for group in recipe.groups(wrap(Vit()))] == plain


def test_compiled_blocks_are_blocks():
    model = Vit()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    assert rates(model, optim.AdamW(layer_decay=0.5)) == rates(Vit(), optim.AdamW(layer_decay=0.5))


def test_names_of_wrappers_are_removed_and_names_like_them_are_not():
    assert clean_name("_orig_mod.a._fsdp_wrapped_module._checkpoint_wrapped_module.weight") == "a.weight"
    assert clean_name("my_orig_mod.weight") == "my_orig_mod.weight"


@pytest.mark.parametrize("exempt", [{"fc"}, {"fc.weight"}, {"*.weight"}, ["fc.weight"], "fc.weight", True])
def test_an_exemption_is_a_name_a_holder_or_a_glob_in_a_method_or_an_attribute(exempt):
    inner = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    inner.no_weight_decay = lambda: exempt
    assert not any(decays(nn.ModuleDict({"a": inner})).values())
    inner.no_weight_decay = exempt
    assert not any(decays(nn.ModuleDict({"a": inner})).values())
    assert any(decays(nn.ModuleDict({"a": inner, "fc": nn.Linear(2, 2)})).values())


@pytest.mark.parametrize("nothing", [None, (), False, ""])
def test_an_exemption_of_nothing_exempts_nothing(nothing):
    model = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    model.no_weight_decay = nothing
    assert decays(model) == {"fc.weight": 0.1, "fc.bias": 0.0}


def test_one_exempt_name_is_not_taken_for_its_letters():
    model = nn.ModuleDict({"f": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})
    model.no_weight_decay = "fc.weight"
    assert bool(decays(model)["f.weight"])
    assert not decays(model)["fc.weight"]


def test_other_kinds_decay_when_asked_for():
    model = nn.ModuleDict({"e": nn.Embedding(3, 2), "n": nn.LayerNorm(2), "l": nn.Linear(2, 2)})
    assert {name for name, decay in decays(model, decayed=("matrix", "embedding")).items() if decay} == {"e.weight", "l.weight"}
    assert {name for name, decay in decays(model, decayed="norm").items() if decay} == {"n.weight", "n.bias"}
    assert all(decays(Vit(), decayed=("matrix", "embedding", "norm", "bias", "other")).values()) is False  # exemptions hold


def test_without_decay_there_is_one_group_and_equal_groups_are_one():
    assert len(optim.AdamW(weight_decay=0).build(Vit()).param_groups) == 1
    assert len(optim.Rprop().build(Vit()).param_groups) == 1
    assert len(optim.AdamW().build(Vit()).param_groups) == 2
    assert len(optim.AdamW(overrides={"head": {"lr": 1e-3}, "embed": {"weight_decay": 0.01}}).groups(nn.Sequential(Vit()))) == 2
    same = optim.AdamW(overrides={"head.weight": {"lr": 0.1}, "embed.weight": {"lr": 0.1, "betas": [0.9, 0.999]}})
    assert ("embed.weight", "head.weight") in [group.names for group in same.groups(Vit())]


def test_tied_parameters_appear_once_and_decay_only_where_all_owners_let_them():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    model["b"].weight = model["a"].weight
    assert decays(model) == {"embed.weight": 0, "a.weight": 0.1, "a.bias": 0, "b.bias": 0}
    model["a"].weight = model["embed"].weight
    assert decays(model) == {"embed.weight": 0, "a.bias": 0, "b.weight": 0.1, "b.bias": 0}
    late = nn.ModuleDict({"head": nn.Linear(2, 3), "embed": nn.Embedding(3, 2)})
    late["embed"].weight = late["head"].weight
    assert decays(late) == {"head.weight": 0, "head.bias": 0}
    recipe = optim.SGD(overrides={"a.weight": {"lr": 7.0}})  # also by a name that is not its first
    assert rates(model, recipe)["embed.weight"] == 7
    held = [p for group in recipe.build(model).param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == 4


def test_frozen_parameters_are_left_out_and_may_be_named():
    model = Vit()
    model.blocks[0].requires_grad_(requires_grad=False)
    held = decays(model, overrides={"blocks.0": {"lr": 1.0}})
    assert not any(name.startswith("blocks.0.") for name in held)
    assert set(held) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_overrides_have_the_last_word_and_later_ones_win():
    model = Vit()
    decayed = decays(
        model, overrides={"head.bias": {"weight_decay": 0.7}, "logit_mlp": {"weight_decay": 0.6}, "embed": {"weight_decay": 0}}
    )
    assert (decayed["head.bias"], decayed["logit_mlp.weight"], decayed["embed.weight"]) == (0.7, 0.6, 0)
    recipe = optim.SGD(lr=1, overrides={"*": {"lr": 2.0}, "blocks": {"lr": 3.0, "momentum": 0.5}, "blocks.1": {"lr": 4.0}})
    (group,) = (group for group in recipe.groups(model) if "blocks.1.fc.weight" in group.names)
    assert (group.options["lr"], group.options["momentum"]) == (4, 0.5)
    assert rates(model, recipe)["head.bias"] == 2
    assert rates(model, optim.SGD(lr=1, layer_decay=0.5, overrides={"embed": {"lr": 9.0}}))["embed.weight"] == 9


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            optim.SGD(overrides={"haed.*": {"lr": 1.0}}),
            "SGD: 'haed.*' in `overrides` matched none of the 36 parameters. Did you mean 'head'?",
        ),
        (optim.SGD(overrides={"zzzzz": {"lr": 1.0}}), "Names look like 'cls_token', 'logit_mlp.weight'"),
        (optim.SGD(layer_decay=0.5, layers=["embed", "bloks.*", "head"]), "'bloks.*' in `layers` matched none"),
        (
            optim.SGD(layer_decay=0.5, layers=["embed", "blocks", "head"]),
            "`layers` must cover every trainable parameter; 'cls_token' is in none",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(recipe, words):
    with pytest.raises(errors.NothingMatchedError, match=r"matched none|must cover") as raised:
        recipe.build(Vit())
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 2).requires_grad_(requires_grad=False), "AdamW found no trainable parameter in Linear: all 2 are frozen"),
        (nn.ReLU(), "AdamW found no trainable parameter in ReLU: it has none"),
    ],
)
def test_nothing_to_train_is_an_error(model, words):
    with pytest.raises(errors.NothingMatchedError, match="no trainable") as raised:
        optim.AdamW().build(model)
    assert words in str(raised.value)


def test_a_parameter_that_an_optimizer_lost_or_holds_twice_is_named():
    model = nn.Linear(2, 2)
    with pytest.raises(errors.UnsupportedOptimizerError, match="holds 'bias' 0 times"):
        check_complete(torch.optim.SGD([model.weight]), model)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.param_groups[0]["params"].append(model.weight)
    with pytest.raises(errors.UnsupportedOptimizerError, match="holds 'weight' 2 times"):
        check_complete(optimizer, model)


def test_lazy_flat_and_empty_parameters_are_judged_by_their_owner():
    lazy = nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    optimizer = optim.AdamW(weight_decay=0.1).build(lazy)
    lazy(torch.zeros(3, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert {name for name, decay in decays(lazy).items() if decay} == {"0.weight", "3.weight"}
    emptied = Vit()
    for parameter in emptied.parameters():
        parameter.data = torch.empty(0)
    assert decays(emptied) == decays(Vit())


def test_parameters_that_fsdp_has_joined_are_refused():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self._fsdp_wrapped_module = nn.Identity()
            self._flat_param = nn.Parameter(torch.zeros(8))

    with pytest.raises(
        errors.UnsupportedStrategyError, match=r"cannot tell the parameters in 'a\._flat_param' apart.*use_orig_params=True"
    ):
        optim.AdamW().build(nn.ModuleDict({"a": Joined()}))


# Layer decay


def test_layers_are_blocks_and_what_stands_around_them():
    model = Vit()
    everything = owned_parameters(model)
    layers = dict(zip((owned.names[0] for owned in everything), inferred_layers(model, everything, "test"), strict=True))
    assert (layers["cls_token"], layers["embed.weight"], layers["blocks.0.gamma"], layers["blocks.2.fc.bias"]) == (0, 0, 1, 3)
    assert layers["norm.weight"] == layers["head.bias"] == 4
    expected = layer_rates(0.1, 0.75, list(layers.values()))
    assert list(rates_in_order(model, optim.SGD(lr=0.1, layer_decay=0.75))) == pytest.approx(expected, rel=1e-12)


def rates_in_order(model, recipe):
    found = rates(model, recipe)
    return (found[name] for name, _ in model.named_parameters())


def test_the_downsampling_in_front_of_a_stage_goes_with_its_first_block_and_stages_are_no_blocks():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Conv2d(1, 1, 1)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    model = nn.ModuleDict({"stem": nn.Conv2d(1, 1, 1), "stages": nn.Sequential(Stage(), Stage()), "head": nn.Linear(1, 1)})
    everything = owned_parameters(model)
    layers = dict(zip((owned.names[0] for owned in everything), inferred_layers(model, everything, "test"), strict=True))
    assert [layers[f"stages.{i}.downsample.weight"] for i in range(2)] == [0, 3]
    assert [layers[f"stages.{i}.blocks.{j}.gamma"] for i in range(2) for j in range(2)] == [1, 2, 3, 4]
    assert (layers["stem.weight"], layers["head.weight"]) == (0, 5)


def test_a_model_without_blocks_has_a_layer_for_each_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
    assert [group.options["lr"] for group in optim.SGD(lr=1, layer_decay=0.5).groups(model)] == [0.25, 0.5, 1]


def test_layers_as_given_from_the_input_to_the_output():
    model = Vit()
    given = ["cls_token", "embed", "logit_mlp", "blocks.0", "blocks.?", "*"]
    everything = owned_parameters(model)
    layers = dict(zip((owned.names[0] for owned in everything), given_layers(everything, given, "test"), strict=True))
    assert (layers["embed.bias"], layers["blocks.0.gamma"], layers["blocks.1.gamma"], layers["blocks.2.gamma"], layers["head.bias"]) == (
        1,
        3,
        4,
        4,
        5,
    )
    found = rates(model, optim.SGD(lr=1, layer_decay=0.5, layers=given))
    assert (found["cls_token"], found["blocks.2.gamma"], found["head.bias"]) == (1 / 32, 0.5, 1)


def test_frozen_layers_leave_the_rates_of_the_others_as_they_were():
    model, whole = Vit(), rates(Vit(), optim.SGD(lr=1, layer_decay=0.5))
    model.blocks[0].requires_grad_(requires_grad=False)
    assert rates(model, optim.SGD(lr=1, layer_decay=0.5))["blocks.1.gamma"] == whole["blocks.1.gamma"]


def test_one_layer_is_an_error():
    with pytest.raises(errors.NothingMatchedError, match=r"`layer_decay` found only one layer in Linear. Give `layers`"):
        optim.SGD(layer_decay=0.5).build(nn.Linear(2, 2))


def test_schedulers_keep_the_ratio_of_the_rates():
    optimizer = optim.SGD(lr=1.0, layer_decay=0.5).build(Vit())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    before = [group["lr"] for group in optimizer.param_groups]
    optimizer.step()
    scheduler.step()
    assert len({round(group["lr"] / lr, 12) for group, lr in zip(optimizer.param_groups, before, strict=True)}) == 1
    assert optimizer.param_groups[0]["lr"] < before[0]


# The table


def test_the_table_shows_what_differs():
    model = Vit(depth=1)
    model.head.bias.requires_grad_(requires_grad=False)
    table = optim.describe_groups(model, optim.SGD(lr=0.1, weight_decay=0.5, overrides={"head": {"momentum": 0.9}})).splitlines()
    assert table[0].split() == ["group", "lr", "momentum", "weight_decay", "parameters", "values", "names"]
    assert [line.split()[1:6] for line in table[1:-1]] == [
        ["0.1", "0.0", "0.0", "12", "68"],
        ["0.1", "0.0", "0.5", "4", "96"],
        ["0.1", "0.9", "0.5", "1", "8"],
    ]
    assert table[1].endswith("cls_token, logit_mlp.weight, logit_mlp.bias, … 9 more")
    assert table[-1] == "3 groups of 17 parameters, 1 frozen"
    assert "momentum" not in optim.describe_groups(nn.LazyLinear(2), optim.SGD())
