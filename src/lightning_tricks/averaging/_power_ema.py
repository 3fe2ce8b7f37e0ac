"""Averages whose memory is a fixed share of the training so far, and how such averages of some lengths give those of any other.

An exponential moving average reaches back a fixed number of steps. A power-function average reaches back a fixed share of training:
the weights after s of t steps count in proportion to ``s^γ``. From averages of a few lengths at a few steps, that of any length
follows by least squares, after training.

Source: T. Karras, M. Aittala, J. Lehtinen, J. Hellsten, T. Aila and S. Laine, "Analyzing and Improving the Training Dynamics of
Diffusion Models", CVPR, 2024, section 3 and appendix C.
"""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Real

import torch

from lightning_tricks.errors import ArgumentError

__all__ = ["check_sigma_rel", "power_ema_decay", "power_ema_gamma", "power_ema_sigma_rel", "synthesis_coefficients"]

_WIDEST = 12**-0.5  # of the equal-weight mean, γ = 0


def power_ema_decay(step: int, gamma: float, *, steps: int = 1) -> float:
    """Return the share of the old average that an update of a power-function average keeps.

    After step t it is ``β_t = (1 − 1/t)^(γ+1)``; an update after several steps keeps the product of theirs, so that the average has
    the same length however often it is updated.

    Args:
        step: Steps between the start of training and the average's latest update; 0 for the first, which keeps nothing.
        gamma: The exponent γ, at least 0.
        steps: Number of steps since the latest update, at least 1.

    Returns:
        The share, in [0, 1).

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        T. Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR, 2024, equation 2.

    Example:
        >>> power_ema_decay(0, 1.0)
        0.0
        >>> power_ema_decay(1, 1.0), power_ema_decay(1, 1.0, steps=3)
        (0.25, 0.0625)
    """
    if step < 0 or steps < 1:
        msg = f"`step` must be at least 0 and `steps` at least 1, got {step!r} and {steps!r}."
        raise ArgumentError(msg)
    share: float = (step / (step + steps)) ** (_check_gamma(gamma) + 1)
    return share


def power_ema_gamma(sigma_rel: float) -> float:
    """Return the exponent of the power-function average of a relative width.

    It is the largest root γ of ``γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻²``.

    Args:
        sigma_rel: Width σ, the standard deviation of the average's profile over training as a share of training, in (0, 1/√12).

    Returns:
        The exponent γ, above 0.

    Raises:
        ArgumentError: If `sigma_rel` lies outside its domain.

    References:
        T. Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR, 2024, section 3 and appendix C.

    Example:
        >>> round(power_ema_gamma(0.05), 4), round(power_ema_gamma(0.10), 4)
        (16.9722, 6.9372)
    """
    s = check_sigma_rel(sigma_rel) ** -2
    # With γ = y − 7/3 the polynomial is y³ − p·y + q, whose three roots are real.
    p, q = s + 1 / 3, 4 * s / 3 + 2 / 27
    return 2 * math.sqrt(p / 3) * math.cos(math.acos(-q / 2 / (p / 3) ** 1.5) / 3) - 7 / 3


def power_ema_sigma_rel(gamma: float) -> float:
    """Return the relative width of the power-function average with an exponent: ``σ = √((γ+1) / ((γ+2)²(γ+3)))``.

    Args:
        gamma: The exponent γ, at least 0.

    Returns:
        The width σ, as a share of training.

    Raises:
        ArgumentError: If `gamma` lies outside its domain.

    References:
        T. Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR, 2024, section 3.

    Example:
        >>> round(power_ema_sigma_rel(6.94), 4), round(power_ema_sigma_rel(0), 4)
        (0.1, 0.2887)
    """
    gamma = _check_gamma(gamma)
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@lru_cache(maxsize=32)
def synthesis_coefficients(steps: tuple[int, ...], gammas: tuple[float, ...], step: int, gamma: float) -> tuple[tuple[float, ...], ...]:
    """Return by how much to multiply averages so that their sum is closest to the average of another length.

    An average's profile is the density ``p_{γ,t}(s) = (γ+1)·s^γ / t^(γ+1)`` for s in [0, t]. The coefficients x minimize
    ``‖Σ x_i p_i − p‖²`` under ``Σ x_i = 1``, so that weights which do not move are reproduced exactly.

    Args:
        steps: Steps t_i at which there are averages, each of them of every length.
        gammas: Their exponents.
        step: Step of the average that is sought.
        gamma: Its exponent.

    Returns:
        The coefficients, for each step in the order of `gammas`.
    """
    profiles = [(t, g) for t in steps for g in gammas]
    scales = torch.tensor([_product(*profile, *profile) ** -0.5 for profile in profiles], dtype=torch.float64)
    products = torch.tensor([[_product(*one, *other) for other in profiles] for one in profiles], dtype=torch.float64)
    wanted = torch.tensor([_product(*profile, step, gamma) for profile in profiles], dtype=torch.float64)
    # The conditions of Lagrange, for profiles scaled to unit norm; the last unknown is the multiplier.
    size = len(profiles)
    matrix = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    matrix[:size, :size] = products * scales * scales[:, None]
    matrix[size, :size] = matrix[:size, size] = scales
    right = torch.cat([wanted * scales, torch.ones(1, dtype=torch.float64)])
    solution = torch.linalg.lstsq(matrix, right, driver="gelsd", rcond=1e-14).solution[:size] * scales
    return tuple(tuple(row) for row in solution.view(len(steps), len(gammas)).tolist())


def _product(t: int, g: float, u: int, h: float) -> float:
    """Return the inner product of two profiles, ``(g+1)(h+1)/(g+h+1) · min(t,u)^(g+h+1) / (t^(g+1) u^(h+1))``."""
    earlier, later, exponent = (t, u, h) if t <= u else (u, t, g)
    value: float = (g + 1) * (h + 1) / (g + h + 1) * (earlier / later) ** exponent / later
    return value


def check_sigma_rel(value: float) -> float:
    """Accept the relative width of a power-function average that is shorter than the equal-weight mean."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < _WIDEST:
        msg = f"`sigma_rel` must lie between 0 and 1/√12 = 0.2887, the width of the equal-weight mean, got {value!r}."
        raise ArgumentError(msg)
    return float(value)


def _check_gamma(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        msg = f"`gamma` must be a number of at least 0, got {value!r}."
        raise ArgumentError(msg)
    return float(value)
