"""Schedules as functions of the step: against their formulas, against torch, against timm."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import FrozenInstanceError, dataclass, fields
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

from lightning_tricks import errors, schedules
from lightning_tricks._core.schedule import Schedule, check_varying, follow
from reference import schedules as reference

STEPS = 60
RATE = 0.3
ALL = [
    schedules.Constant(0.5, warmup=3),
    schedules.Linear(0.8, final=0.2, stop="50%", warmup="5%"),
    schedules.Polynomial(0.8, final=0.2, power=2.0),
    schedules.Cosine(warmup="2 epochs"),
    schedules.CosineRestarts(0.8, every="20%", final=0.1, growth=2),
    schedules.Exponential(0.8, factor=0.5, every=7),
    schedules.Step(0.8, factor=0.5, every="3 epochs", warmup=2),
    schedules.Step(factor=0.5, at=["50%", 40]),
    schedules.OneCycle(2.0, rise="25%", warmup=4),
    schedules.ReduceOnPlateau("val_acc", mode="max", patience=2, warmup=5),
]
each = pytest.mark.parametrize("schedule", ALL, ids=repr)


def values(schedule: Schedule, steps: int = STEPS) -> list[float]:
    return [schedule.value(step, steps, steps_per_epoch=5) for step in range(steps)]


# Against the formulas


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        (lambda w: schedules.Constant(0.7, warmup=w), lambda s, n: reference.constant(s, 0.7)),
        (lambda w: schedules.Linear(0.9, final=0.1, warmup=w), lambda s, n: reference.linear(s, n, 0.9, 0.1)),
        (lambda w: schedules.Polynomial(0.9, final=0.1, power=3, warmup=w), lambda s, n: reference.polynomial(s, n, 0.9, 0.1, 3)),
        (lambda w: schedules.Cosine(0.9, final=0.1, warmup=w), lambda s, n: reference.cosine(s, n, 0.9, 0.1)),
        (
            lambda w: schedules.CosineRestarts(0.9, final=0.1, every=6, growth=2, warmup=w),
            lambda s, n: reference.cosine_restarts(s, 6, 2, 0.9, 0.1),
        ),
        (
            lambda w: schedules.CosineRestarts(0.9, final=0.1, every="10%", warmup=w),
            lambda s, n: reference.cosine_restarts(s, 6, 1, 0.9, 0.1),
        ),
        (lambda w: schedules.Exponential(0.9, factor=0.4, every=6, warmup=w), lambda s, n: reference.exponential(s, 6, 0.9, 0.4)),
        (lambda w: schedules.Step(0.9, factor=0.4, every="2 epochs", warmup=w), lambda s, n: reference.step(s, 10, 0.9, 0.4)),
        (
            lambda w: schedules.OneCycle(0.9, initial=0.2, final=0.1, rise=w + 20, warmup=w),
            lambda s, n: reference.one_cycle(s, 20, n, initial=0.2, peak=0.9, final=0.1),
        ),
    ],
)
def test_schedules_are_their_formulas(schedule, after, warmup):
    expected = [reference.warmed(lambda s: after(s, STEPS - warmup), t, warmup) for t in range(STEPS)]
    assert values(schedule(warmup)) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) > 1 or warmup == 0


def test_moments_count_from_the_beginning_of_the_fit_and_periods_from_the_end_of_the_warmup():
    assert values(schedules.Step(factor=0.5, at=[20, "50%"], warmup=9))[9:] == [
        reference.multi_step(t, [20, 30], 1.0, 0.5) for t in range(9, 60)
    ]
    period = values(schedules.Step(factor=0.5, every=20, warmup=9))
    assert [t for t in range(10, STEPS) if period[t] != period[t - 1]] == [29, 49]
    line = values(schedules.Linear(stop=30, warmup=9))
    assert line[9] == 1.0
    assert line[29] == pytest.approx(1 / 21)
    assert line[30] == 0.0


# Against torch


def torch_rates(make, steps: int = STEPS) -> list[float]:
    """Return the rate with which each step is taken in torch's usual loop."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE)
    scheduler, rates = make(optimizer), []
    for step in range(steps):
        if step > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR uses what torch advises against
                scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    return rates


def behind_warmup(make, warmup: int):
    """Put torch's warm-up in front of one of torch's schedulers."""

    def made(optimizer):
        first = torch_schedulers.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        return torch_schedulers.SequentialLR(optimizer, [first, make(optimizer, STEPS - warmup)], milestones=[warmup])

    return made


TORCH = [
    (schedules.Constant, {}, lambda o, n: torch_schedulers.ConstantLR(o, factor=1.0)),
    (schedules.Linear, {"final": 0.1}, lambda o, n: torch_schedulers.LinearLR(o, 1.0, 0.1, total_iters=n)),
    (schedules.Polynomial, {"power": 2.0}, lambda o, n: torch_schedulers.PolynomialLR(o, n, power=2.0)),
    (schedules.Cosine, {"final": 0.1}, lambda o, n: torch_schedulers.CosineAnnealingLR(o, n, eta_min=0.1 * RATE)),
    (
        schedules.CosineRestarts,
        {"every": 8, "growth": 2, "final": 0.1},
        lambda o, n: torch_schedulers.CosineAnnealingWarmRestarts(o, 8, 2, eta_min=0.1 * RATE),
    ),
    (schedules.Exponential, {"factor": 0.9, "every": 1}, lambda o, n: torch_schedulers.ExponentialLR(o, 0.9)),
    (schedules.Step, {"factor": 0.5, "every": 8}, lambda o, n: torch_schedulers.StepLR(o, 8, 0.5)),
]


@pytest.mark.parametrize(("kind", "options", "make"), TORCH, ids=[kind.__name__ for kind, *_ in TORCH])
def test_schedules_are_torchs(kind, options, make):
    expected = torch_rates(lambda optimizer: make(optimizer, STEPS))
    assert [RATE * value for value in values(kind(**options))] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("kind", "options", "make"), TORCH, ids=[kind.__name__ for kind, *_ in TORCH])
def test_schedules_behind_a_warmup_are_torchs(kind, options, make):
    expected = torch_rates(behind_warmup(make, 7))
    assert [RATE * value for value in values(kind(**options, warmup=7))] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [10, 15, 60])
def test_one_cycle_is_torchs(steps):
    """Also where the share of the rise is no whole number of steps."""
    expected = torch_rates(lambda o: torch_schedulers.OneCycleLR(o, max_lr=RATE, total_steps=steps, cycle_momentum=False), steps)
    assert [RATE * value for value in values(schedules.OneCycle(), steps)] == pytest.approx(expected, rel=1e-9)


def test_moments_are_torchs_milestones():
    expected = torch_rates(lambda o: torch_schedulers.MultiStepLR(o, [30, 45], 0.1))
    assert [RATE * value for value in values(schedules.Step(at=["50%", "75%"]))] == pytest.approx(expected, rel=1e-9)


# Against timm


@pytest.mark.full
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (schedules.Cosine(warmup=6), lambda timm, o, **w: timm.CosineLRScheduler(o, t_initial=54, **w)),
        (schedules.Polynomial(power=0.5, warmup=6), lambda timm, o, **w: timm.PolyLRScheduler(o, t_initial=54, power=0.5, **w)),
        (schedules.Step(factor=0.3, every=12, warmup=6), lambda timm, o, **w: timm.StepLRScheduler(o, decay_t=12, decay_rate=0.3, **w)),
    ],
    ids=repr,
)
def test_schedules_are_timms(schedule, make):
    from timm import scheduler as timm

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE)
    theirs = make(timm, optimizer, warmup_t=6, warmup_lr_init=RATE / 7, warmup_prefix=True, t_in_epochs=False)
    expected = []
    for step in range(STEPS):
        theirs.step_update(step)  # before the step, unlike timm's own loop, which is a step late
        expected.append(optimizer.param_groups[0]["lr"])
    assert [RATE * value for value in values(schedule)] == pytest.approx(expected, rel=1e-9)


# At the edges


@each
def test_no_step_is_taken_with_zero_and_nothing_jumps_at_the_end_of_a_warmup(schedule):
    assert all(value > 0 for value in values(schedule))
    warm = [reference.warmed(lambda _: 1.0, t, 5) for t in range(8)]
    assert warm == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1])


@each
def test_values_stay_within_bounds(schedule):
    low, high = schedule.bounds
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values(schedule)[10:])
    assert all(0 < value <= high + 1e-12 for value in values(schedule))


@pytest.mark.parametrize("schedule", [s for s in ALL if hasattr(s, "stop")], ids=repr)
def test_the_final_value_is_kept(schedule):
    assert schedule.value(10 * STEPS, STEPS, steps_per_epoch=5) == schedule.final


@pytest.mark.parametrize("steps", [1, 2, 3])
@each
def test_fits_shorter_than_their_warmup_have_values(schedule, steps):
    assert all(math.isfinite(value) for value in values(schedule, steps))


@pytest.mark.parametrize("steps", range(20, 120))
def test_shares_divide_a_fit_of_any_length(steps):
    """Ten periods never leave an eleventh, in which the rate would have gone up again."""
    periods = [t * 10 // steps for t in range(steps)]
    assert values(schedules.Step(factor=0.5, every="10%"), steps) == [0.5**period for period in periods]
    cycle = values(schedules.CosineRestarts(every="10%"), steps)
    within = [(cycle[t] < cycle[t - 1], periods[t] == periods[t - 1]) for t in range(1, steps)]
    assert all(falls == same for falls, same in within)


def test_what_needs_an_unknown_length_says_so():
    with pytest.raises(errors.TrickError, match=r"`stop='100%'` needs to know how long training is"):
        schedules.Cosine().value(3)
    with pytest.raises(errors.TrickError, match="`every='2 epochs'` needs"):
        schedules.Step(every="2 epochs").value(3, steps=10)
    assert schedules.Cosine(stop=10).value(10) == 0.0


# As values


@each
def test_schedules_print_pickle_copy_and_compare(schedule):
    for again in (eval(repr(schedule), vars(schedules)), pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):  # noqa: S301, S307
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert repr(again) == repr(schedule)
    with pytest.raises(FrozenInstanceError):
        schedule.warmup = 3


@pytest.mark.full
@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedules_are_configured_by_jsonargparse(schedule):
    from jsonargparse import ArgumentParser

    class Taking:
        def __init__(self, rate: float | Schedule = 0.1) -> None:
            self.rate = rate

    parser = ArgumentParser()
    parser.add_class_arguments(Taking, "taking")
    name = type(schedule).__name__
    given = {each.name: getattr(schedule, each.name) for each in fields(schedule)}
    config = parser.parse_object({"taking": {"rate": {"class_path": f"lightning_tricks.schedules.{name}", "init_args": given}}})
    assert parser.instantiate_classes(config).taking.rate == schedule
    assert parser.instantiate_classes(parser.parse_string(parser.dump(config))).taking.rate == schedule
    assert parser.instantiate_classes(parser.parse_object({"taking": {"rate": 0.3}})).taking.rate == 0.3


WRONG = [
    (schedules.Constant, {"level": "high"}, "`level` must lie in (-∞, ∞), got 'high'."),
    (schedules.Linear, {"final": float("nan")}, "`final` must lie in (-∞, ∞), got nan."),
    (schedules.Linear, {"initial": float("inf")}, "`initial` must lie in (-∞, ∞), got inf."),
    (schedules.Cosine, {"warmup": "soon"}, "`warmup` must be an int of optimizer steps"),
    (schedules.Cosine, {"warmup": -1}, "got -1"),
    (schedules.Cosine, {"stop": 0}, "`stop` must be an int of optimizer steps"),
    (schedules.Cosine, {"stop": 0.5}, "got 0.5"),
    (schedules.Polynomial, {"power": 0}, "`power` must lie in (0, ∞), got 0."),
    (schedules.CosineRestarts, {"every": 5, "growth": 1.5}, "`growth` must be a whole number of at least 1, got 1.5."),
    (schedules.CosineRestarts, {"every": 5, "growth": 0}, "got 0."),
    (schedules.CosineRestarts, {"every": "0 epochs"}, "`every` must be"),
    (schedules.Exponential, {"factor": 0.0}, "`factor` must lie in (0, ∞), got 0.0."),
    (schedules.Step, {}, "Exactly one of `every` and `at` must say when to step, got every=None and at=()."),
    (schedules.Step, {"every": 5, "at": [3]}, "got every=5 and at=[3]."),
    (schedules.Step, {"at": "50%"}, "`at` must be a list of moments, such as ['50%', '75%'], got '50%'."),
    (schedules.Step, {"at": [5, "half"]}, "`at[1]` must be an int of optimizer steps"),
    (schedules.OneCycle, {"rise": "130%"}, "got '130%'"),
    (schedules.ReduceOnPlateau, {"monitor": ""}, "`monitor` must be the name of a logged metric, such as 'val_loss', got ''."),
    (schedules.ReduceOnPlateau, {"monitor": "a", "mode": "less"}, "`mode` must be one of 'min', 'max', got 'less'."),
    (schedules.ReduceOnPlateau, {"monitor": "a", "factor": 1.0}, "`factor` must lie in (0, 1), got 1.0."),
    (schedules.ReduceOnPlateau, {"monitor": "a", "patience": -1}, "`patience` must be a number of validations, got -1."),
    (schedules.ReduceOnPlateau, {"monitor": "a", "cooldown": 1.5}, "`cooldown` must be a number of validations, got 1.5."),
    (schedules.ReduceOnPlateau, {"monitor": "a", "final": 2}, "`final` must lie in [0, 1], got 2."),
]


@pytest.mark.parametrize(("kind", "arguments", "words"), WRONG, ids=str)
def test_wrong_arguments_fail_in_the_constructor(kind, arguments, words):
    with pytest.raises(errors.ArgumentError) as raised:
        kind(**arguments)
    assert words in str(raised.value)


def test_arguments_after_the_first_are_keyword_only():
    for kind in (schedules.Cosine, schedules.Polynomial, schedules.Step, schedules.OneCycle, schedules.ReduceOnPlateau):
        with pytest.raises(TypeError):
            kind("a", 0.5)


@pytest.mark.parametrize("kind", [schedules.Cosine, schedules.Linear, schedules.Polynomial, schedules.OneCycle])
@pytest.mark.parametrize("warmup", [10, 40, "100%"])
def test_a_warmup_that_lasts_to_the_end_or_longer_is_a_warmup_all_the_same(kind, warmup):
    length = 40 if warmup == 40 else 10
    values = [kind(warmup=warmup).value(step, steps=10) for step in range(10)]
    assert values == pytest.approx([(step + 1) / (length + 1) for step in range(10)])
    assert kind(warmup=warmup).value(length, steps=10) < 1e-5


# Where a number may be a schedule


@pytest.mark.parametrize(
    "value", [0.0, 0.99, schedules.Linear(0.0, final=0.5), schedules.Step(0.5, every=3), schedules.Exponential(0.5)], ids=repr
)
def test_numbers_and_schedules_within_an_interval_are_accepted(value):
    assert check_varying("rate", value, "[0, 1)") is value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.0, "`rate` must lie in [0, 1), got 1.0."),
        ("0.1", "got '0.1'."),
        (schedules.Linear(0.0, final=1.5), "`rate` must lie in [0, 1), and Linear(initial=0.0, final=1.5) reaches 1.5."),
        (schedules.Exponential(0.5, factor=2.0), "reaches inf."),
        (schedules.OneCycle(0.5, final=-1.0), "reaches -1."),
        (schedules.ReduceOnPlateau("a"), "which follows a metric. Use it for learning rates alone."),
    ],
    ids=str,
)
def test_others_are_refused(value, words):
    with pytest.raises(errors.ArgumentError) as raised:
        check_varying("rate", value, "[0, 1)")
    assert words in str(raised.value)


def test_an_unbounded_interval_admits_growth():
    assert check_varying("weight_decay", schedules.Exponential(1e-3, factor=1.1), "[0, ∞)").factor == 1.1
    assert check_varying("rate", schedules.Exponential(1e-3, factor=1.0), "[0, 1)").bounds == (1e-3, 1e-3)


def test_follow_resolves_durations_from_the_trainer():
    trainer = SimpleNamespace(
        num_training_batches=10, accumulate_grad_batches=2, estimated_stepping_batches=20, max_steps=-1, optimizers=[None], callbacks=[]
    )
    rate = follow(schedules.Linear(0.0, final=0.4, stop="2 epochs", warmup=1), trainer)
    assert [rate(step) for step in (1, 10, 11)] == pytest.approx([0.0, 0.4, 0.4])
    assert rate(9) == pytest.approx(0.4 * 8 / 9)
    assert follow(0.25, trainer)(7) == 0.25


def test_follow_asks_for_no_length_that_it_does_not_need():
    class Trainer:
        def __getattr__(self, name):
            raise AssertionError(name)

    assert follow(schedules.Cosine(stop=10), Trainer())(5) == pytest.approx(0.5)


@pytest.mark.parametrize("total", [float("inf"), -1])
def test_a_fit_without_length_is_an_error(total):
    """Lightning says -1 of an iterable data set of no length."""
    trainer = SimpleNamespace(
        num_training_batches=float("inf"),
        accumulate_grad_batches=1,
        estimated_stepping_batches=total,
        max_steps=-1,
        optimizers=[],
        callbacks=[],
    )
    with pytest.raises(errors.TrickError, match="this fit has no known length"):
        follow(schedules.Cosine(), trainer)


def test_users_write_their_own():
    @dataclass(frozen=True, repr=False)
    class Sawtooth(Schedule):
        levels = ("height",)
        spans = ("every",)
        height: float = 1.0
        every: int | str = "10%"

        def after_warmup(self, step, spans):
            return self.height * (step % spans["every"]) / spans["every"]

    saw = Sawtooth(2.0, every=4)
    assert [saw.value(step) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 0.0, 0.5]
    assert repr(saw) == "Sawtooth(height=2.0, every=4)"
    assert saw.bounds == (2.0, 2.0)
    with pytest.raises(errors.ArgumentError, match="`every` must be"):
        Sawtooth(every=-3)
