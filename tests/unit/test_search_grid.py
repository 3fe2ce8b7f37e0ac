"""Grids of round numbers."""

from __future__ import annotations

import pytest

from lightning_tricks.errors import ArgumentError
from lightning_tricks.search import log_grid
from lightning_tricks.search._grid import linear_grid
from lightning_tricks.search._space import read_parameter
from reference.grid import log_grid as reference


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.01, [0.001, 0.003, 0.01]),
        (0.001, 0.01, [0.001, 0.002, 0.005, 0.01]),
        (0.001, 0.01, [0.001, 0.002, 0.003, 0.006, 0.01]),
        (1e-4, 1e-1, [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]),
        (1, 100, [1, 2, 5, 10, 20, 50, 100]),
        (1e-12, 1e-10, [1e-12, 3e-12, 1e-11, 3e-11, 1e-10]),
        (1e20, 1e21, [1e20, 2e20, 5e20, 1e21]),
        (0.002, 0.7, [0.002, 0.01, 0.1, 0.7]),  # ends that are no round numbers stay
        (1, 6, [1, 2, 6]),  # √6 lies at the border of 2 and 3
        (1, 3, [1, 1.4, 2.1, 3]),
        (5, 7, [5, 7]),
    ],
)
def test_grids_have_the_conventional_values(low, high, expected):
    assert log_grid(low, high, len(expected)) == expected


@pytest.mark.parametrize("mantissa", ["1", "2.5", "7"])
@pytest.mark.parametrize("reach", ["1.7", "10", "300", "1e7"])
def test_grids_are_those_of_the_slow_reference(mantissa, reach):
    for exponent in (-9, -4, 0, 5):
        low = f"{mantissa}e{exponent}"
        high = repr(float(low) * float(reach))
        for count in (2, 3, 4, 5, 6, 7) if exponent == -4 else (3, 5):
            assert log_grid(float(low), float(high), count) == [float(value) for value in reference(repr(float(low)), high, count)]


def test_decades_are_exact_literals():
    for exponent in range(-300, 300, 7):
        for count, series in ((3, "1 3 10"), (4, "1 2 5 10"), (5, "1 2 3 6 10")):
            literals = [float(f"{number}e{exponent}") for number in series.split()]
            assert log_grid(float(f"1e{exponent}"), float(f"1e{exponent + 1}"), count) == literals


def test_linear_grids_are_exact_literals():
    assert linear_grid(0.1, 0.3, 3) == [0.1, 0.2, 0.3]
    assert linear_grid(0, 0.9, 10) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1, 3), r"`low` must lie in \(0, ∞\), got 0"),
        ((1, 1, 3), "`low` must be smaller than `high`, got 1 and 1"),
        ((1, float("inf"), 3), r"`high` must lie in \(-∞, ∞\), got inf"),
        ((1, 2, 1), "`count` must be a whole number of at least 2, got 1"),
        ((1.0, 1.0000000000000004, 5), "`count` must be at most what fits"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        log_grid(*arguments)


def test_a_grid_of_one_value_has_the_middle():
    for given, value in (({"low": 0.01, "high": 1.0, "scale": "log"}, 0.1), ({"low": 0.0, "high": 1.0}, 0.5), ({"low": 1, "high": 9}, 5)):
        assert read_parameter("a", ("a",), given).grid(1, inside=False) == [value]
    assert len(read_parameter("a", ("a",), {"low": 1, "high": 2}).grid(1, inside=False)) == 1
