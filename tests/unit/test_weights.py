import pytest
import torch
from torch import nn

from lightning_tricks import errors, functional
from lightning_tricks._core.weights import copy_, swap_


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    return net


def test_using_weights_puts_them_in_and_takes_them_out():
    net, other = model(), {"0.weight": torch.eye(3), "1.running_mean": torch.ones(3)}
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with functional.using_weights(net, other):
        assert torch.equal(net[2].weight, torch.eye(3))
        assert torch.equal(net[1].running_mean, torch.ones(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(other["0.weight"], torch.eye(3))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_using_weights_takes_them_out_after_an_exception(error):
    net = model()
    before = net[0].weight.detach().clone()
    with pytest.raises(error), functional.using_weights(net, {"0.weight": torch.eye(3)}):
        raise error
    assert torch.equal(net[0].weight, before)


def test_using_a_whole_state_dict_with_tied_weights():
    net, state = model(), {name: tensor + 1 for name, tensor in model().state_dict().items()}
    with functional.using_weights(net, state):
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_using_the_models_own_weights_changes_nothing():
    net = model()
    before = net[0].weight.detach().clone()
    with functional.using_weights(net, net.state_dict()):
        assert torch.equal(net[0].weight, before)
    assert torch.equal(net[0].weight, before)


def test_using_weights_that_are_the_models_own_under_other_names():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = net[0].weight.detach().clone(), net[1].weight.detach().clone()
    with functional.using_weights(net, {"0.weight": net[1].weight, "1.weight": net[0].weight}):
        assert torch.equal(net[0].weight, second)
        assert torch.equal(net[1].weight, first)
    assert torch.equal(net[0].weight, first)


def test_using_a_state_dict_with_more_than_tensors_of_the_model():
    from torchmetrics import MeanMetric

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    net = nn.ModuleDict({"layer": Extra(2, 2), "metric": MeanMetric()})
    net["metric"].persistent(mode=True)
    state = {name: value + 1 if isinstance(value, torch.Tensor) else value for name, value in net.state_dict().items()}
    with functional.using_weights(net, state):
        assert torch.equal(net["layer"].weight, state["layer.weight"])


@pytest.mark.parametrize("weights", [None, [1], {"0.weight": 3.0}])
def test_what_are_no_weights(weights):
    with pytest.raises(errors.ArgumentError, match="`weights` must map names to tensors"), functional.using_weights(model(), weights):
        pass


def test_using_weights_converts_dtype():
    net = model().to(torch.bfloat16)
    with functional.using_weights(net, {"0.weight": torch.full((3, 3), 0.1)}):
        assert net[0].weight.dtype == torch.bfloat16
        assert net[0].weight[0, 0].item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"0.weight": torch.eye(3), "9.weight": torch.eye(3)}, "got '9.weight'"),
        ({"0.weight": torch.ones(1, 3)}, "must have the shape (3, 3)"),
    ],
)
def test_wrong_weights_leave_the_model_alone(weights, words):
    net = model()
    before = net[0].weight.detach().clone()
    with pytest.raises(errors.ArgumentError) as raised, functional.using_weights(net, weights):
        pass
    assert words in str(raised.value)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 900_000), (1, 2, 1_100_000), (2_500_000,), (1, 1, 1_300_000)])
def test_swap_exchanges_contents(shape):
    a, b = torch.randn(shape), torch.randn(shape)
    old_a, old_b = a.clone(), b.clone()
    swap_([a], [b])
    assert torch.equal(a, old_b)
    assert torch.equal(b, old_a)


def test_swap_needs_no_copy_of_a_large_tensor():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "clone" in str(func):
                sizes.append(result.numel())
            return result

    a, b = torch.randn(8, 1_000_000), torch.randn(8, 1_000_000)
    with Sizes():
        swap_([a], [b])
    assert sizes
    assert max(sizes) <= a.numel() // 4


def test_empty_lists():
    copy_([], [])
    swap_([], [])
    assert functional.ema_update_([], [], 0.5) is None
