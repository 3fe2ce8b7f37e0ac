"""What GradientFlow is made of, on plain tensors and modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_tricks.diagnostics._activations import ActivationProbe, activation_statistics
from lightning_tricks.diagnostics._flow_history import FlowHistory
from lightning_tricks.diagnostics._flow_verdict import FlowJudge, Limits
from lightning_tricks.diagnostics._step_norms import StepNorms, norms
from reference import diagnostics as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_of_many_tensors_are_those_of_each(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in [(3, 4), (5,), (), (2, 1, 3), (0,)]]
    assert norms(tensors, tensors).tolist() == pytest.approx([reference.norm([tensor]) for tensor in tensors], rel=1e-5)


def test_low_precision_overflows_no_norm():
    assert norms([torch.full((100,), 6e4, dtype=torch.float16)], [torch.zeros(())]).item() == pytest.approx(6e5, rel=1e-2)


def test_a_step_is_measured_as_it_is_taken():
    model = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2))
    model[0](torch.randn(7, 3)).square().sum().backward()
    model[1](torch.tensor([1, 1, 3])).sum().backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: torch.zeros(()) if p.grad is None else p.grad.to_dense().clone() for name, p in model.named_parameters()}
    step = StepNorms(dict(model.named_parameters()))
    step.before()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    measured = step.after()
    for column, (name, parameter) in enumerate(model.named_parameters()):
        expected = [reference.norm([tensor]) for tensor in (gradients[name], before[name], parameter.detach() - before[name])]
        assert measured[:, column].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert measured[0, -1] == 0  # no gradient


@pytest.mark.parametrize(
    ("shape", "channels", "dimension"), [((6, 5), -1, 1), ((4, 5, 3), 1, 1), ((4, 3, 5), -1, 2), ((2, 5, 3, 3), -1, 1)]
)
def test_dead_units_are_zero_in_all_samples_and_positions(shape, channels, dimension):
    output = torch.relu(torch.randn(shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    output.select(dimension, 2).zero_()
    found = activation_statistics(output, nn.ReLU(), channels)
    assert found[2].item() == pytest.approx(reference.dead_share(output, dimension))
    assert found[2] >= 0.2
    assert found[:2].tolist() == pytest.approx(reference.mean_and_deviation(output.flatten().tolist()), rel=1e-5)
    assert math.isnan(found[3])


@pytest.mark.parametrize(
    ("module", "slope", "steepest"), [(nn.Sigmoid(), lambda s: s * (1 - s), 0.25), (nn.Tanh(), lambda t: 1 - t * t, 1.0)]
)
def test_saturation_is_a_slope_below_a_tenth_of_the_largest(module, slope, steepest):
    output = module(torch.linspace(-6, 6, 101))
    share = activation_statistics(output, module)[3].item()
    assert share == pytest.approx(reference.saturated_share(output, slope, steepest))
    assert 0.2 < share < 0.8


def test_a_probe_sees_calls_in_their_order_takes_means_over_them_and_leaves_no_hook():
    shared, last = nn.Linear(2, 2), nn.ReLU(inplace=True)
    probe = ActivationProbe({"last": last, "shared": shared})
    probe.attach()
    first = shared(torch.ones(1, 2))
    outputs = [first, shared(first.detach())]
    last(outputs[1].clone())
    found = probe.detach()
    assert list(found) == ["shared", "last"]
    assert found["shared"][0].item() == pytest.approx(sum(output.mean().item() for output in outputs) / 2, abs=1e-6)
    assert not shared._forward_hooks
    assert not last._forward_hooks
    shared(first)
    assert probe.detach() == {}


def test_history_is_completed_grows_and_goes_through_a_checkpoint():
    history = FlowHistory()
    history.add(1, {"a": {"grad_norm": 1.0, "weight_norm": 2.0, "update_norm": 0.5}})
    history.add(1, {"b": {"grad_norm": 3.0}})
    history.add(5, {"c": {"dead": 0.25}, "a": {"grad_norm": math.inf}})
    again = FlowHistory()
    again.load_state_dict(history.state_dict())
    nan = math.nan
    for each in (history, again):
        assert (each.layers, each.steps) == (["a", "b", "c"], [1, 5])
        torch.testing.assert_close(each.table("grad_norm"), torch.tensor([[1.0, math.inf], [3.0, nan], [nan, nan]]), equal_nan=True)
        torch.testing.assert_close(each.table("dead")[2], torch.tensor([nan, 0.25]), equal_nan=True)
        assert each.table("update_ratio")[0, 0] == 0.25


def test_history_keeps_a_long_run_in_sight():
    history = FlowHistory()
    for step in range(2500):
        history.add(step, {"a": {"grad_norm": float(step)}})
    assert 500 <= len(history.steps) <= 1000
    assert history.steps[0] == 0
    assert history.table("grad_norm")[0].tolist() == [float(step) for step in history.steps]


def judge(**limits):
    return FlowJudge(Limits(**{"vanishing": 1e-5, "exploding": 100.0, "dead": 0.5, "saturated": 0.5, **limits}))


def test_gradients_vanish_if_they_are_small_beside_the_largest_twice_in_a_row_and_it_is_said_once():
    judging = judge()
    sizes = {"first": 4, "last": 100}

    def rows(small):
        return {"first": {"grad_norm": small}, "last": {"grad_norm": 10.0}}

    assert judging.judge(rows(1e-6), sizes, []) == []  # once may be an initialization at zero
    assert judging.judge(rows(1.0), sizes, []) == []
    assert judging.judge(rows(1e-6), sizes, []) == []
    assert judging.judge(rows(1e-6), sizes, []) == ["gradients vanish in 'first': root mean square below 1e-05 of that in 'last'"]
    assert judging.judge(rows(1e-6), sizes, []) == []
    assert judge(vanishing=1e-7).judge(rows(1e-6), sizes, []) == []


def test_a_small_gradient_of_a_small_layer_does_not_vanish():
    judging = judge(vanishing=0.1)
    for _ in range(3):
        assert judging.judge({"bias": {"grad_norm": 1.0}, "matrix": {"grad_norm": 99.0}}, {"bias": 1, "matrix": 10_000}, []) == []


def test_gradients_explode_beyond_a_multiple_of_the_earlier_median():
    judging = judge(exploding=10.0)
    for total in (1.0, 2.0, 3.0):
        assert judging.judge({"a": {"grad_norm": total}}, {"a": 1}, []) == []
    assert judging.judge({"a": {"grad_norm": 20.0}}, {"a": 1}, []) == []
    found = judging.judge({"a": {"grad_norm": 30.0}}, {"a": 1}, [])
    assert found == ["gradients explode: their norm 30 is more than 10 times the median 2.5 so far"]


def test_dead_and_saturated_layers_are_named_with_their_shares():
    rows = {"relu": {"dead": 0.75}, "tanh": {"saturated": 0.6}, "fine": {"dead": 0.5}}
    assert judge().judge(rows, {}, []) == [
        "more than 50% of units are dead (zero for the whole batch) in 'relu' (75%)",
        "more than 50% of values are saturated in 'tanh' (60%)",
    ]


def test_the_first_layers_that_are_not_finite_are_named_in_the_order_of_calls():
    rows = {
        "head": {"grad_norm": math.nan, "weight_norm": 1.0, "mean": math.inf},
        "body": {"grad_norm": math.nan, "weight_norm": 1.0, "mean": math.inf},
        "stem": {"grad_norm": math.nan, "weight_norm": 1.0, "mean": 0.0},
    }
    forward, backward = judge().judge(rows, dict.fromkeys(rows, 1), ["stem", "body", "head"])
    assert forward == "the first layer in the forward pass whose output is not finite is 'body'"
    assert backward == "the first layer in the backward pass whose gradient is not finite is 'head'"
    rows["stem"]["weight_norm"] = math.nan
    (told,) = judge().judge(rows, dict.fromkeys(rows, 1), ["stem", "body", "head"])
    assert told.startswith("weights of 'stem' were not finite before this step")
