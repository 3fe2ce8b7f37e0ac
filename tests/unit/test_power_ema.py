"""Power-function averages: their exponents, widths and decays, and the coefficients of a synthesis."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightning_tricks import errors, functional
from lightning_tricks.averaging._power_ema import synthesis_coefficients
from reference.power_ema import coefficients, gamma_of, width_of

WIDTHS = [0.001, 0.01, 0.05, 0.1, 0.15, 0.25, 0.2886]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_exponent_is_the_largest_root_and_gives_the_width_back(width):
    gamma = functional.power_ema_gamma(width)
    assert gamma == pytest.approx(gamma_of(width), rel=1e-9)
    assert functional.power_ema_sigma_rel(gamma) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(width):
    gamma = functional.power_ema_gamma(width)
    time = (np.arange(1_000_000) + 0.5) / 1_000_000
    weights = time**gamma / (time**gamma).sum()
    mean = (weights * time).sum()
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_width_stays_when_updates_are_rarer(width, every):
    gamma = functional.power_ema_gamma(width)
    found = width_of(every, 4000, lambda t, k: functional.power_ema_decay(t, gamma, steps=k))
    assert found == pytest.approx(width, rel=0.01)


def test_a_share_after_several_steps_is_the_product_of_theirs():
    gamma = functional.power_ema_gamma(0.07)
    shares = [functional.power_ema_decay(t, gamma) for t in range(40, 47)]
    assert functional.power_ema_decay(40, gamma, steps=7) == pytest.approx(np.prod(shares), rel=1e-12)
    assert functional.power_ema_decay(6, gamma) == pytest.approx((1 - 1 / 7) ** (gamma + 1), rel=1e-12)
    assert functional.power_ema_decay(0, gamma, steps=9) == 0


@pytest.mark.parametrize("width", [0.03, 0.07, 0.1, 0.15, 0.25])
@pytest.mark.parametrize("steps", [(100,), (50, 100), (13, 40, 60, 97, 100)])
def test_coefficients_are_those_of_a_quadrature_and_add_up_to_one(width, steps):
    gammas = tuple(map(functional.power_ema_gamma, (0.05, 0.1)))
    found = np.array(synthesis_coefficients(steps, gammas, 100, functional.power_ema_gamma(width)))
    np.testing.assert_allclose(found, coefficients(steps, (0.05, 0.1), width), atol=2e-4)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("step", "kind"), list(itertools.product([20, 60, 100], [0, 1])))
def test_the_coefficients_of_an_average_that_there_is_are_zero_but_for_it(step, kind):
    gammas = tuple(map(functional.power_ema_gamma, (0.05, 0.1)))
    steps = tuple(range(20, 101, 20))
    found = torch.tensor(synthesis_coefficients(steps, gammas, step, gammas[kind]), dtype=torch.float64)
    wanted = torch.zeros(5, 2, dtype=torch.float64)
    wanted[step // 20 - 1, kind] = 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_many_snapshots_stay_solvable():
    gammas = tuple(map(functional.power_ema_gamma, (0.05, 0.1)))
    found = np.array(synthesis_coefficients(tuple(range(1, 301)), gammas, 300, functional.power_ema_gamma(0.08)))
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert np.abs(found).sum() < 10


@pytest.mark.parametrize("width", [0, -0.1, 0.29, 1, "0.1", True, float("nan"), None])
def test_wrong_widths_are_refused(width):
    with pytest.raises(errors.ArgumentError, match=r"`sigma_rel` must lie between 0 and 1/√12 = 0\.2887"):
        functional.power_ema_gamma(width)


@pytest.mark.parametrize("gamma", [-0.5, float("inf"), float("nan"), "7", True])
def test_wrong_exponents_are_refused(gamma):
    with pytest.raises(errors.ArgumentError, match="`gamma` must be a number of at least 0"):
        functional.power_ema_sigma_rel(gamma)
    with pytest.raises(errors.ArgumentError, match="`gamma` must be a number of at least 0"):
        functional.power_ema_decay(3, gamma)


@pytest.mark.parametrize(("step", "steps"), [(-1, 1), (3, 0)])
def test_wrong_steps_are_refused(step, steps):
    with pytest.raises(errors.ArgumentError, match="`step` must be at least 0 and `steps` at least 1"):
        functional.power_ema_decay(step, 7.0, steps=steps)
