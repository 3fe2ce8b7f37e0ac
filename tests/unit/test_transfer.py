"""Heads, plans and probes as functions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_tricks as lt
from lightning_tricks import errors
from lightning_tricks.functional import linear_probe, replace_head, transfer_plan
from lightning_tricks.transfer._probing import fit_classifier
from reference.transfer import logistic_gradient, ridge_gradient


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))


# The head


def test_a_new_head_has_the_place_and_the_kind_of_the_old_one():
    net, calls = mlp().double(), []
    old = net[2]
    old.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(net[0].state_dict())
    head = replace_head(net, 10)
    assert head.layer is net[2]
    assert head.layer is not old
    assert (head.name, head.old_classes, head.num_classes) == ("2", 10, 10)
    assert net[2].weight.dtype == torch.float64
    assert not torch.equal(net[2].weight, old.weight)  # drawn anew although the size stays
    assert all(torch.equal(value, state[name]) for name, value in net[0].state_dict().items())
    assert net(torch.zeros(2, 4).double()).shape == (2, 10)
    assert calls == [1]


def test_a_convolution_and_a_layer_without_bias_can_be_heads():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3, stride=2, padding=1, bias=False), nn.AdaptiveAvgPool2d(1)
    )
    head = replace_head(net, 4).layer
    assert isinstance(head, nn.Conv2d)
    assert (head.kernel_size, head.stride, head.padding, head.bias) == ((3, 3), (2, 2), (1, 1), None)
    assert net(torch.zeros(1, 3, 8, 8)).shape[1] == 4


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classes, self.boxes = nn.Linear(4, 8), nn.Linear(8, 10), nn.Linear(8, 5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight


class Odd(nn.Linear):
    def __init__(self, inputs):
        super().__init__(inputs, 10)


LAZY = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LazyLinear(10))


@pytest.mark.parametrize(
    ("model", "arguments", "kind", "words"),
    [
        (mlp(), {"num_classes": 0}, errors.ArgumentError, "`num_classes` must be a whole number of at least 1, got 0."),
        (mlp(), {"num_classes": 3, "where": "head"}, errors.NothingMatchedError, "`where='head'` matched none"),
        (mlp(), {"num_classes": 3, "where": "1"}, errors.TrickError, "'1' is a ReLU"),
        (nn.Flatten(), {"num_classes": 3}, errors.NothingMatchedError, "found no head in Flatten"),
        (TwoHeads(), {"num_classes": 3}, errors.TrickError, "may have 2, such as 'classes', 'boxes'"),
        (Tied(), {"num_classes": 3}, errors.TrickError, "is shared: its parameters are 'words.weight', 'head.weight'. Untie"),
        (LAZY, {"num_classes": 3, "where": "2"}, errors.TrickError, "'2' is not built yet. Run the model once first"),
        (nn.Sequential(Odd(4)), {"num_classes": 3}, errors.TrickError, "'0' is a Odd, which only the model can make anew"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 10))),
            {"num_classes": 3},
            errors.TrickError,
            "'0' is parametrized",
        ),
    ],
)
def test_a_head_that_is_not_clear_is_refused(model, arguments, kind, words):
    before = str(model)
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        replace_head(model, **arguments)
    assert str(model) == before


def test_the_head_of_several_can_be_named():
    net = TwoHeads()
    assert replace_head(net, 3, where="classes").layer is net.classes
    assert net.boxes.out_features == 5


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("vit_tiny_patch16_224", "head"),
        ("convnext_atto", "head.fc"),
        ("mobilenetv3_small_050", "classifier"),
        ("deit_tiny_distilled_patch16_224", None),
    ],
)
def test_timm_says_what_its_head_is(name, head):
    import timm

    # Of a few blocks, for speed.
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3} if "patch16" in name else {}
    with torch.device("meta"):
        net = timm.create_model(name, **small)
        wrapped = nn.ModuleDict({"net": net})
        if head is None:
            with pytest.raises(errors.TrickError, match=r"such as 'net.head', 'net.head_dist'"):
                replace_head(wrapped, 7)
            return
        assert replace_head(wrapped, 7).name == f"net.{head}"
    assert net.num_classes == 7
    assert net.get_classifier().out_features == 7


@pytest.mark.full
@pytest.mark.parametrize("outputs", [10, 0])
def test_a_head_behind_a_model_of_timm_is_one_of_two_if_that_has_its_own(outputs):
    import timm

    backbone = timm.create_model("test_convnext", num_classes=outputs)
    net = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(outputs or backbone.num_features, 9)})
    if not outputs:
        assert replace_head(net, 7).name == "head"
        return
    with pytest.raises(errors.TrickError, match=r"may have 2, such as 'backbone.head.fc', 'head'"):
        replace_head(net, 7)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "classes", "head"),
    [
        ("resnet18", 9, "fc"),  # as many as go three times into the first layer
        ("squeezenet1_0", 9, "classifier.1"),  # whose last block has an end of its own
        ("vit_b_16", 1000, "heads.head"),
        ("swin_v2_t", 1000, "head"),  # whose blocks have networks for the bias of positions
    ],
)
def test_torchvision_s_heads_are_found(name, classes, head):
    import torchvision

    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None, num_classes=classes)
        assert replace_head(net, 7).name == head


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "head", "more"),
    [
        ("BertForSequenceClassification", "classifier", {}),
        ("RobertaForSequenceClassification", "classifier.out_proj", {}),
        ("LlamaForSequenceClassification", "score", {"num_key_value_heads": 1}),  # keys and values are narrower than all else
        ("ViTForImageClassification", "classifier", {}),
    ],
)
def test_heads_of_transformers_are_found_and_their_configurations_follow(name, head, more):
    import transformers

    kind = getattr(transformers, name)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    net = kind(kind.config_class(**sizes, num_labels=4, **more))
    assert replace_head(net, 7).name == head
    assert (net.config.num_labels, net.num_labels) == (7, 7)


# The plan


@pytest.mark.parametrize(
    ("n", "similarity", "stages", "layer_decay"),
    [
        (999, "similar", {"0%": 0}, None),
        (999, "different", {"0%": 0, "30%": "50%"}, 0.8),
        (1000, "similar", {"0%": 0, "10%": "30%"}, 0.8),
        (1000, "different", {"0%": 0, "10%": "100%"}, 0.8),
    ],
)
def test_the_plan_has_four_cells(n, similarity, stages, layer_decay):
    plan = transfer_plan(n, similarity, num_classes=3)
    assert isinstance(plan, lt.FineTuning)
    assert (plan.stages, plan.layer_decay, plan.num_classes) == (stages, layer_decay, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, "similar"), "`n_samples` must be a whole number of at least 1, got 0."),
        ((10, "alike"), "`similarity` must be one of 'similar', 'different', got 'alike'"),
    ],
)
def test_wrong_plans_are_refused(arguments, words):
    with pytest.raises(errors.ArgumentError, match=words):
        transfer_plan(*arguments)


# The probe


@pytest.mark.parametrize(("method", "gradient"), [("logistic", logistic_gradient), ("ridge", ridge_gradient)])
def test_classifiers_are_those_whose_gradient_is_zero(method, gradient):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + 3
    y = torch.randint(0, 3, (30,), generator=generator)
    weight, bias = fit_classifier(x, y, 3, method=method, l2=0.1)
    mean, std = x.mean(0), x.std(0, unbiased=False)
    std[3] = 1.0  # a constant feature
    z = (x - mean) / std
    by_weight, by_bias = gradient(z.tolist(), y.tolist(), (weight * std).tolist(), (bias + weight @ mean).tolist(), 0.1)
    assert torch.tensor(by_weight).abs().max() < 1e-7
    assert torch.tensor(by_bias).abs().max() < 1e-7


class Tokens(nn.Module):
    """Returns maps, tokens and a tuple from its stages."""

    def __init__(self):
        super().__init__()
        self.maps, self.tokens, self.last = nn.Conv2d(1, 3, 1), nn.Linear(3, 5), nn.LSTM(5, 6, batch_first=True)
        self.norm = nn.BatchNorm2d(3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.tokens(self.norm(self.maps(x)).flatten(2).mT))


def test_one_pass_serves_all_stages_and_leaves_the_model_alone():
    torch.manual_seed(0)
    net, y = Tokens(), torch.arange(40) % 2
    x = torch.randn(40, 1, 4, 4) + 2 * y[:, None, None, None]
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    report = linear_probe(net, batches, batches, stages=["tokens", "maps", "last"])
    assert list(report.accuracies) == ["maps", "tokens", "last"]
    assert min(report.accuracies.values()) > 0.9
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in net.modules())
    pooled = x.mean((2, 3))
    alone = linear_probe(nn.Sequential(nn.Identity()), [(pooled, y)], [(pooled, y)], stages="0")
    assert alone.accuracies["0"] == report.accuracies["maps"]  # which is linear in the mean of an image


@pytest.mark.parametrize(
    ("batches", "arguments", "words"),
    [
        ([], {"stages": "maps"}, "needs batches to fit and to score classifiers on"),
        ([(torch.ones(2, 1, 4, 4), torch.ones(2))], {"stages": "maps"}, "needs the class of each sample, whole numbers"),
        ([(torch.ones(2, 1, 4, 4),)], {"stages": "maps"}, "`target=1` of a batch has a NoneType"),
        ([(torch.ones(2, 1, 4, 4), torch.tensor([0, -100]))], {"stages": "maps"}, "needs classes that count from 0, .* has -100"),
        ([(torch.ones(2, 1, 4, 4) / 0, torch.ones(2).long())], {"stages": "maps"}, "those of stage 'maps' are not for some samples"),
        ([(torch.ones(2, 1, 4, 4), torch.ones(2).long())], {"stages": "unused"}, "stage 'unused' must give features .* is not called"),
        ([(torch.ones(2, 1, 4, 4), torch.ones(2).long())], {"stages": "layer4"}, "`stages='layer4'` matched none"),
    ],
)
def test_probes_that_cannot_be_say_why(batches, arguments, words):
    net = Tokens()
    with pytest.raises(errors.TrickError, match=words):
        linear_probe(net, batches, batches, **arguments)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
