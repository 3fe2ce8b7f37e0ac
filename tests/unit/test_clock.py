from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_tricks import errors
from lightning_tricks._core.clock import Duration, after_each_engine_step, after_each_step

TRAINER = SimpleNamespace(
    num_training_batches=10, accumulate_grad_batches=3, estimated_stepping_batches=20, max_steps=-1, optimizers=[None], callbacks=[]
)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (7, 7),
        (np.int64(7), 7),
        ("7 steps", 7),
        ("1 step", 1),
        (" 12steps ", 12),
        ("3 epochs", 12),
        ("1 epoch", 4),
        ("80%", 16),
        ("12.5 %", 2),
    ],
)
def test_durations(value, steps):
    assert Duration.parse("start", value).steps("start", TRAINER) == steps


@pytest.mark.parametrize("value", [-1, 1.0, "80", "eighty%", "101%", "-5 steps", "1.5 epochs", "3 weeks", "", None, True, [3], "5 steps 3"])
def test_what_is_no_duration(value):
    with pytest.raises(errors.ArgumentError, match=r"`every` must be an int of optimizer steps.*'80%'"):
        Duration.parse("every", value)


def test_any_share_but_none_at_all_is_at_least_one():
    assert Duration.parse("every", "0.5%", least=1).amount == 0.5
    with pytest.raises(errors.ArgumentError, match="got '0%'"):
        Duration.parse("every", "0%", least=1)
    assert Duration.parse("start", "0%").amount == 0


def test_least():
    with pytest.raises(errors.ArgumentError, match=r"at least 1, .* got 0\."):
        Duration.parse("every", 0, least=1)


@pytest.mark.parametrize(("value", "quoted"), [("80%", "`start='80%'`"), ("2 epochs", "`start='2 epochs'`")])
def test_a_fit_of_unknown_length(value, quoted):
    endless = SimpleNamespace(**{**vars(TRAINER), "num_training_batches": float("inf"), "estimated_stepping_batches": float("inf")})
    with pytest.raises(errors.TrickError) as raised:
        Duration.parse("start", value).steps("start", endless)
    assert quoted in str(raised.value)
    assert "max_steps" in str(raised.value)


def test_max_steps_counts_the_steps_of_all_optimizers():
    two = SimpleNamespace(**{**vars(TRAINER), "max_steps": 20, "optimizers": [None, None]})
    assert Duration.parse("start", "50%").steps("start", two) == 5


def test_each_real_step_is_seen_once_also_by_wrappers_that_skip_their_bases_constructor():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
            self.inner, self.param_groups, self.defaults, self.state = inner, inner.param_groups, {}, {}

        def step(self, closure=None):
            return self.inner.step(closure)

    seen = []
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Wrapper(torch.optim.SGD([weight], lr=0.1))
    (handle,) = after_each_step(optimizer, lambda: seen.append(1))
    for _ in range(3):
        optimizer.step()
    assert len(seen) == 3
    handle.remove()
    optimizer.step()
    assert len(seen) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_a_gradient_scaler_are_none(fused):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    after_each_step(optimizer, lambda: seen.append(weight.detach().clone()))
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(seen) == 2


def test_what_has_no_step_hook_is_refused():
    with pytest.raises(errors.UnsupportedOptimizerError, match="Steps are counted by a step hook, and SimpleNamespace has none"):
        after_each_step(SimpleNamespace(step=lambda: None), print)


class Engine:
    """Steps at every other call, as if it accumulated, and skips what overflows, as DeepSpeed's engine does."""

    def __init__(self):
        self.calls = self.global_steps = self.skipped_steps = 0

    def step(self, overflows=False):
        self.calls += 1
        if self.calls % 2 == 0:
            self.global_steps += 1
            self.skipped_steps += overflows


def test_an_engine_is_counted_by_the_steps_it_really_takes():
    engine, asked, taken, others = Engine(), [], [], []
    (handle,) = after_each_engine_step(engine, lambda: taken.append(engine.calls), before=lambda: asked.append(engine.calls))
    (other,) = after_each_engine_step(engine, lambda: others.append(engine.calls), before=lambda: None)
    for overflows in (False, False, False, True, False, False):
        engine.step(overflows=overflows)
    assert (asked, taken, others) == ([0, 1, 2, 3, 4, 5], [2, 6], [2, 6])
    handle.remove()
    engine.step()
    engine.step()
    assert (taken, others) == ([2, 6], [2, 6, 8])
    other.remove()
