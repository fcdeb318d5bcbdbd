import numpy as np
import pytest
from scipy.special import expit

from rm import monotone


def column(*values):
    return np.array(values, float)[:, None]


def test_isotonic_knots_are_the_centres_of_the_blocks():
    x, y = monotone.isotonic(np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 0, 1]), np.ones(4))
    assert (x.tolist(), y.tolist()) == ([0, 1.5, 3], [0, 0.5, 1])
    x, y = monotone.isotonic(np.array([3.0, 2, 1, 0]), np.array([1.0, 0, 1, 0]), np.array([1.0, 1, 3, 1]))
    assert (x.tolist(), y.tolist()) == ([0, 1.25, 3], [0, 0.75, 1])  # (3 * 1 + 2) / 4, and three of four are 1


def test_a_line_is_never_falling():
    assert monotone.line(np.array([0.0, 1]), np.array([1.0, 3]), np.ones(2)) == (1, 2)
    assert monotone.line(np.array([0.0, 1]), np.array([1.0, 0]), np.array([3.0, 1])) == (0.75, 0)
    assert monotone.line(np.array([2.0, 2]), np.array([1.0, 0]), np.ones(2)) == (0.5, 0)


def test_logistic_finds_slope_and_shift_and_counts_weights_as_repeats():
    x = np.linspace(-3, 3, 4000)
    (slope,), shift = monotone.logistic(x[:, None], expit(0.7 * x + 0.4), np.ones(4000))
    assert (slope, shift) == (pytest.approx(0.7, abs=0.01), pytest.approx(0.4, abs=0.01))
    once = monotone.logistic(column(-1, 1), np.array([0.2, 1.0]), np.array([3.0, 1.0]))
    thrice = monotone.logistic(column(-1, -1, -1, 1), np.array([0.2, 0.2, 0.2, 1.0]), np.ones(4))
    np.testing.assert_allclose(np.append(*once), np.append(*thrice), atol=1e-4)


def test_logistic_stays_rising_and_finite_whatever_the_data():
    wrong, _ = monotone.logistic(column(-1, 1), np.array([1.0, 0.0]), np.full(2, 1000.0))
    assert 0 < wrong[0] < 0.01
    (steep,), shift = monotone.logistic(column(-1, 1), np.array([0.0, 1.0]), np.ones(2), shift=False)
    assert 1 < steep < 20 and shift == 0
    (none,), nothing = monotone.logistic(np.empty((0, 1)), np.empty(0), np.empty(0))
    assert (none, nothing) == (1, 0)
