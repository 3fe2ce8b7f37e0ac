"""Activations swapped without a Trainer: which, how, and what is left."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional

import lightning_tricks as lt
from contracts.harness import Loader, Net, fit, make_trainer
from lightning_tricks import errors
from lightning_tricks._core.checkpoint import read_changes
from lightning_tricks.functional import swap_activation
from lightning_tricks.normalization._activations import KINDS, as_text, kind_of, kind_of_function, kind_of_word, maker_of

MODULES = [kind for kind, make in KINDS.items() if make is not None]


class Swish(nn.Module):
    """As other packages write it."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Holds(nn.Module):
    """Holds functions in attributes and calls one by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.act = functional.relu
        self.approximate = partial(functional.gelu, approximate="tanh")
        self.act_ = torch.relu_
        self.custom = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.custom(self.approximate(self.act(self.layer(x)))) + functional.silu(x)


# Names


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_is_known_as_text_class_and_module(kind):
    module = maker_of("target", kind)()
    assert kind_of(module) == kind
    assert maker_of("target", as_text("target", module))().extra_repr() == module.extra_repr()
    assert as_text("target", kind) == kind
    model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), module)
    other = "tanh" if kind != "tanh" else "relu"
    assert list(swap_activation(model, kind, other).swapped) == ["2"]
    assert list(swap_activation(model, other, kind).swapped) == ["2"]
    assert kind_of(model[2]) == kind


def test_words_of_other_packages_are_known_and_those_of_layers_are_not():
    words = {"Swish": "silu", "SwishMe": "silu", "HardSwishMe": "hardswish", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
             "QuickGELUActivation": "quick_gelu", "SiLUActivation": "silu", "LinearActivation": "identity", "hard_sigmoid": "hardsigmoid",
             "Linear": None, "Conv2d": None, "Activation": None, "SomeReLU": None}  # fmt: skip
    assert {word: kind_of_word(word) for word in words} == words


def test_a_class_that_computes_something_of_its_own_is_not_taken_for_its_base():
    class Squared(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    class Renamed(nn.ReLU):
        pass

    class Tanh(nn.Module):  # with a slope that is learned
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(1))

    assert [kind_of(each) for each in (Squared(), Renamed(), Tanh(), nn.ReLU6(), nn.Sequential(nn.ReLU()))] == [
        None, "relu", None, "relu6", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rleu", "gelu"), "`source` must be one of 'relu', 'relu6',"),
        (([], "gelu"), "or several of these, got []"),
        ((3, "gelu"), "got 3"),
        (("relu", "gleu"), "or the path of a module's class, got 'gleu'"),
        (("relu", "torch.nn.Nothing"), "got 'torch.nn.Nothing'"),
        (("relu", "quick_gelu"), "`target` must be an activation that torch has as a module, got 'quick_gelu'"),
        (("relu", "leaky_relu(0.2)"), "with settings by name, such as 'leaky_relu(negative_slope=0.2)', got 'leaky_relu(0.2)'"),
        (("relu", "leaky_relu(slope=0.2)"), "`target` must have settings that its class takes, got 'leaky_relu(slope=0.2)'"),
        (("relu", "elu(alpha=__import__('os'))"), "got \"elu(alpha=__import__('os'))\""),
        (("relu", functional.gelu), "`target` must be the name of an activation, such as 'gelu', or a module or its class"),
    ],
)
def test_wrong_arguments_say_what_is_known(arguments, words):
    with pytest.raises(errors.ArgumentError) as raised:
        swap_activation(nn.Sequential(nn.ReLU()), *arguments)
    assert words in str(raised.value)


# Swapping


@pytest.mark.parametrize("source", ["relu", nn.ReLU, "torch.nn.ReLU", ["tanh", nn.ReLU]])
@pytest.mark.parametrize("target", ["leaky_relu(negative_slope=0.2)", nn.LeakyReLU(0.2), "torch.nn.LeakyReLU(negative_slope=0.2)"])
def test_a_model_computes_what_it_would_have_been_written_to_compute(source, target):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    twin = nn.Sequential(model[0], nn.LeakyReLU(0.2), nn.Sequential(model[2][0], nn.LeakyReLU(0.2)))
    keys = list(model.state_dict())
    report = swap_activation(model, source, target)
    x = torch.randn(2, 1, 5, 5)
    assert torch.equal(model(x), twin(x))
    assert report.swapped == dict.fromkeys(("1", "2.1"), "ReLU() → LeakyReLU(negative_slope=0.2)")
    assert report.left == {}
    assert list(model.state_dict()) == keys


def test_where_and_exclude_choose_by_any_name_of_a_shared_module():
    shared = nn.ReLU()
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.ReLU(), shared), "c": nn.Sequential(nn.ReLU())})
    report = swap_activation(model, "relu", "silu", where=["b.1", "c"], exclude="c.0")
    assert list(report.swapped) == ["a.0"]
    assert model["a"][0] is model["b"][1]
    assert isinstance(model["a"][0], nn.SiLU)
    assert isinstance(model["b"][0], nn.ReLU)
    with pytest.raises(errors.NothingMatchedError, match=r"`where='d'` matched none of ModuleDict's 3. Their names look like 'a.0', 'b.0'"):
        swap_activation(model, "relu", "silu", where="d")
    with pytest.raises(errors.NothingMatchedError, match=r"`exclude='\*'` removed all 3"):
        swap_activation(model, "relu", "silu", exclude="*")
    with pytest.raises(errors.NothingMatchedError, match=r"ModuleDict has 'relu', 'silu'. Name one that is there as `source`"):
        swap_activation(model, "tanh", "gelu")


def test_swapping_twice_swaps_once_and_the_same_changes_nothing():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.TransformerEncoderLayer(2, 1, 2))
    with pytest.raises(errors.NothingMatchedError, match="Sequential has 'leaky_relu', 'relu'"):
        swap_activation(model, "silu", "relu")  # which is there, but not in the place of another
    swap_activation(model, "relu", "gelu")
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301
    first = list(model)
    assert swap_activation(model, "relu", "gelu").swapped == {}
    report = swap_activation(model, "gelu", "gelu")
    assert report.left == {"0": "it is GELU(approximate='none') already", "2.activation": "it is gelu already"}
    assert all(one is other for one, other in zip(model, first, strict=True))
    assert list(swap_activation(model, "leaky_relu", "leaky_relu").swapped) == ["1"]  # torch's slope in the place of another


def test_mode_hooks_and_place_are_kept():
    seen = []
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64), nn.ReLU()).eval()
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    swap_activation(model, "relu", "prelu")
    assert not model[1].training
    assert model[1].weight.dtype == torch.float64
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight"]
    model(torch.ones(1, 2, dtype=torch.float64))
    handle.remove()
    model(torch.ones(1, 2, dtype=torch.float64))
    assert seen == [1]


def test_copies_and_pickles_compute_the_same():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0))
    swap_activation(model, "relu", "leaky_relu(negative_slope=0.3)")
    x = torch.randn(3, 2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(twin(x), model(x))


# In place


@pytest.mark.parametrize("kind", [kind for kind in MODULES if hasattr(maker_of("target", kind)(), "inplace")])
@pytest.mark.parametrize("in_place", [True, False])
def test_works_in_place_where_the_source_did_with_the_right_gradients(kind, in_place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=in_place), nn.Linear(4, 4), nn.ReLU(inplace=in_place)).double()
    target = maker_of("target", kind)()
    target.inplace = True  # which does not ask for more than the source did
    swap_activation(model, "relu", target)
    assert (model[1].inplace, model[3].inplace) == (in_place, in_place)
    assert torch.autograd.gradcheck(model, (torch.randn(3, 4, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("target", [nn.LeakyReLU(-0.1), nn.ELU(-1.0), nn.CELU(-1.0)])
def test_never_in_place_where_backward_would_need_what_was_overwritten(target):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).double()
    swap_activation(model, "relu", target)
    assert model[1].inplace is False
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()


def test_a_swish_of_another_package_in_place_stays_in_place():
    model = nn.Sequential(nn.Linear(4, 4), Swish(inplace=True), Swish())
    swap_activation(model, "silu", "mish")
    assert [repr(each) for each in model[1:]] == ["Mish(inplace=True)", "Mish()"]


# Functions


def test_functions_in_attributes_are_replaced_where_that_is_sound():
    model = Holds()
    report = swap_activation(model, ["relu", "gelu"], "leaky_relu(negative_slope=0.2)")
    assert kind_of_function(model.act) == kind_of_function(model.approximate) == "leaky_relu"
    assert report.swapped == {
        "act": "relu → LeakyReLU(negative_slope=0.2)",
        "approximate": "gelu(approximate='tanh') → LeakyReLU(negative_slope=0.2)",
    }
    x = torch.randn(2, 3)
    expected = functional.leaky_relu(functional.leaky_relu(model.layer(x), 0.2), 0.2) + functional.silu(x)
    torch.testing.assert_close(model(x), expected)


def test_the_function_within_an_activation_is_not_another_one():
    class GELUActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = functional.gelu

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    assert list(swap_activation(nn.Sequential(GELUActivation()), "gelu", "relu").swapped) == ["0"]


def test_what_code_calls_by_itself_and_what_works_in_place_is_reported():
    model = nn.Sequential(Holds(), nn.SiLU())
    report = swap_activation(model, ["silu", "relu"], "gelu")
    assert report.left == {
        "0": "code of Holds calls silu by itself",
        "0.act_": "it changes its argument in place, and its result may not be used",
    }
    assert model[0].act_ is torch.relu_
    assert list(report.swapped) == ["0.act", "1"]
    with pytest.raises(errors.NothingMatchedError, match="has none as modules; code of Calls calls relu by itself"):
        swap_activation(Calls(), "relu", "gelu")


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x)


@pytest.mark.parametrize("given", [functional.relu, functional.gelu, nn.ReLU(), "relu"])
@pytest.mark.parametrize("target", ["relu", "gelu", "gelu_tanh", "silu", "prelu", "identity"])
def test_the_fast_path_of_torchs_transformer_computes_the_new_activation(given, target):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation=given, batch_first=True)
    swap_activation(layer, ["relu", "gelu"], target)
    x = torch.randn(2, 3, 4)
    trained = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)
    expected = copy.deepcopy(layer).train()
    expected.activation = maker_of("target", target)()
    torch.testing.assert_close(trained, expected(x))


def test_a_parametric_target_makes_a_function_a_module():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    swap_activation(model, "relu", "prelu(num_parameters=8)")
    assert model.activation.weight.shape == (8,)
    assert "activation.weight" in model.state_dict()
    with torch.no_grad():
        model.activation.weight.fill_(1.0)
    model(torch.randn(2, 4)).sum().backward()
    assert model.activation.weight.grad is not None


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_parameters_are_not_added_to_a_sharded_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(errors.UnsupportedStrategyError, match="swap_activation would add parameters to a model that is sharded"):
        swap_activation(model, "relu", "prelu")
    swap_activation(model, "relu", "gelu")
    assert isinstance(model[1], nn.GELU)


# The callback


def test_a_model_that_is_swapped_already_is_left_and_evaluation_alone_swaps_too():
    run = fit([lt.ActivationSwap("relu", "gelu")], max_epochs=1)
    gelu = run.module.body[2]
    make_trainer([lt.ActivationSwap("relu", "gelu")]).fit(run.module, Loader())
    assert run.module.body[2] is gelu
    fresh = Net()
    make_trainer([lt.ActivationSwap("relu", "gelu")]).validate(fresh, Loader(2), verbose=False)
    assert isinstance(fresh.body[2], nn.GELU)


def test_layers_that_are_built_later_are_swapped_and_new_parameters_train():
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = None

        def configure_model(self) -> None:
            if self.body is None:
                self.body = Net().body

    run = fit([lt.ActivationSwap("relu", "prelu")], Late, max_epochs=1)
    assert isinstance(run.module.body[2], nn.PReLU)
    assert run.module.body[2].weight.item() != 0.25


def test_the_checkpoint_records_what_repeats_the_swap(tmp_path):
    run = fit([lt.ActivationSwap(["relu", nn.GELU], nn.PReLU, where=["body.*"])], max_epochs=1)
    path = tmp_path / "swapped.ckpt"
    run.trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    again = Net()
    for function, arguments in read_changes(checkpoint):
        getattr(lt.functional, function)(again, **arguments)
    again.load_state_dict(checkpoint["state_dict"])
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(x), run.module.eval()(x))


def test_a_module_of_an_own_class_says_that_its_settings_cannot_be_read_off():
    with pytest.raises(errors.ArgumentError, match=r"`target` must say its settings where its class is no class of torch's, got Swish"):
        lt.ActivationSwap("relu", Swish())


def test_a_checkpoint_imports_no_module_by_itself(tmp_path):
    net = Net()
    change = {"function": "swap_activation", "arguments": {"source": "relu", "target": "antigravity.Module(1)"}}
    record = {"version": 1, "changes": [change]}
    torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": "2.5.0", "lightning_tricks": record}, tmp_path / "odd.ckpt")
    with pytest.raises(errors.CheckpointError, match=r"Import 'antigravity' if you trust it"):
        lt.load_from_checkpoint(Net, tmp_path / "odd.ckpt")
    assert "antigravity" not in sys.modules
