"""Muon: who trains what, and the steps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_tricks import errors, optim
from reference import optimizers as reference

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(self.norm(torch.tanh(self.conv(self.stem(x)))).mean((2, 3)))))


def algorithms(model: nn.Module, recipe) -> dict[str, str]:
    return {name: group.options["algorithm"] for group in recipe.groups(model) for name in group.names}


def by_muon(model: nn.Module, **arguments) -> set[str]:
    return {name for name, algorithm in algorithms(model, optim.Muon(**arguments)).items() if algorithm == "muon"}


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.linspace(-1, 1, 2 * 49).reshape(2, 1, 7, 7)).square().sum().backward()


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw():
    assert by_muon(Net()) == {"conv.weight", "fc.weight"}
    assert by_muon(Net(), exclude="fc") == {"conv.weight"}
    frozen = Net()
    frozen.fc.requires_grad_(requires_grad=False)
    assert algorithms(frozen, optim.Muon()).keys() == {name for name, p in frozen.named_parameters() if p.requires_grad}


def test_the_input_is_at_the_embeddings_and_the_output_where_the_model_says():
    text = nn.ModuleDict({"embed": nn.Embedding(5, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    assert by_muon(text) == {"a.weight", "b.weight"}
    text["head"].weight = text["embed"].weight
    assert by_muon(text) == {"a.weight", "b.weight"}

    class Declared(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(4, 2)
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def get_classifier(self):
            return self.a, self.classifier

    assert by_muon(nn.Sequential(Declared())) == {"0.b.weight", "0.c.weight"}


@needs_muon
def test_matrices_step_as_in_torch_to_the_bit_and_the_rest_as_adamw():
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    built = optim.Muon(lr=0.1, exclude="conv", adamw_lr=0.01, adamw_weight_decay=0.2).build(ours)
    muon = torch.optim.Muon([theirs.fc.weight], lr=0.1)
    matrices = [theirs.stem.weight, theirs.conv.weight, theirs.head.weight]
    others = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0}], lr=0.01, weight_decay=0.2, betas=(0.9, 0.95), fused=True
    )
    for _ in range(10):
        backward(ours)
        backward(theirs)
        for optimizer in (built, muon, adamw):
            optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@needs_muon
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_kernels_of_convolutions_step_as_matrices_with_a_row_for_each_output(memory_format, nesterov):
    torch.manual_seed(0)
    model = Net().to(memory_format=memory_format)
    optimizer = optim.Muon(lr=0.1, weight_decay=0.2, momentum=0.8, nesterov=nesterov).build(model)
    literals = {name: reference.Muon(lr=0.1, momentum=0.8, weight_decay=0.2, nesterov=nesterov) for name in ("conv.weight", "fc.weight")}
    begin = {name: model.get_parameter(name).detach().double() for name in literals}
    expected = begin
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        expected = {name: literals[name].step(w, model.get_parameter(name).grad.double()) for name, w in expected.items()}
        optimizer.step()
    for name, w in expected.items():  # torch iterates in bfloat16, which has three digits
        assert (model.get_parameter(name).detach().double() - w).norm() < 0.02 * (w - begin[name]).norm()
    assert model.conv.weight.is_contiguous(memory_format=memory_format)


@needs_muon
def test_it_is_one_optimizer_for_closures_schedulers_hooks_and_checkpoints():
    model = Net()
    recipe = optim.Muon(overrides={"head": {"lr": 0.5}, "fc": {"ns_steps": 3}})
    optimizer = recipe.build(model)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(True))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def closure():
        backward(model)
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7
    scheduler.step()
    assert hooked == [True]
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.00015, 0.25}
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)  # cycles the momentum of either algorithm
    other = copy.deepcopy(model)
    resumed = recipe.build(other)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))  # noqa: S301
    for each, its in ((model, optimizer), (other, resumed)):
        backward(each)
        its.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    pickle.loads(pickle.dumps(optimizer)).step()  # noqa: S301


@needs_muon
def test_kernels_of_adamw_can_be_forced():
    assert optim.Muon().build(Net()).param_groups[0]["fused"] is True
    group = optim.Muon(implementation="for-loop").build(Net()).param_groups[0]
    assert (group["fused"], group["foreach"]) == (False, False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.Muon(momentum=1.0), "`momentum` must lie in [0, 1), got 1.0."),
        (lambda: optim.Muon(ns_steps=100), "`ns_steps` must lie in [1, 99], got 100."),
        (lambda: optim.Muon(ns_steps=2.5), "`ns_steps` must be a whole number of at least 1, got 2.5."),
        (lambda: optim.Muon(adjust_lr_fn="none"), "`adjust_lr_fn` must be one of 'original', 'match_rms_adamw', got 'none'."),
        (lambda: optim.Muon(adamw_lr=-1), "`adamw_lr` must lie in [0, ∞), got -1."),
        (lambda: optim.Muon(exclude=3), "`exclude` must be a glob over qualified names"),
        (lambda: optim.Muon(overrides={"a": {"adamw_lr": 1.0}}), "`overrides['a']` must set options of Muon, got 'adamw_lr'."),
    ],
)
def test_wrong_arguments_fail_in_the_constructor(make, words):
    with pytest.raises(errors.ArgumentError) as raised:
        make()
    assert words in str(raised.value)


def test_a_recipe_of_muon_is_a_value():
    recipe = optim.Muon(0.1, exclude=["aux", "head.*"], adamw_lr=1e-3)
    assert repr(recipe) == "Muon(lr=0.1, adamw_lr=0.001, exclude=('aux', 'head.*'))"
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301


def test_what_cannot_work_is_refused(monkeypatch):
    with pytest.raises(errors.NothingMatchedError, match="no trainable hidden matrix in Sequential between the layers at input and output"):
        optim.Muon().build(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(
        errors.NothingMatchedError, match=r"Muon: 'hed' in `exclude` matched none of the 10 parameters. Did you mean 'head'?"
    ):
        optim.Muon(exclude="hed").build(Net())
    odd = Net()
    odd.fc.weight = nn.Parameter(odd.fc.weight.to(torch.complex64))
    with pytest.raises(errors.UnsupportedOptimizerError, match=r"orthogonalizes real matrices, and 'fc.weight' is complex"):
        optim.Muon().build(odd)
    flat = Net()
    flat.fc.weight.data = torch.empty(0)
    with pytest.raises(errors.UnsupportedOptimizerError, match=r"Muon needs whole matrices, and 'fc.weight' was flattened or emptied"):
        optim.Muon().build(flat)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(errors.MissingPackageError, match=r"Muon needs torch 2\.9 or newer, found torch"):
        optim.Muon().build(Net())
