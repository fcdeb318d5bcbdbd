"""The arithmetic of signal and noise, by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm import snr


def test_signal_and_noise_by_hand():
    # means .6 and .8, so .2 apart around .7; variances .02 and 0, so a noise of sqrt(.01) = .1
    found = snr.signal_noise(np.array([[0.5, 0.7], [0.8, 0.8]]))
    assert found.signal == pytest.approx(0.2 / 0.7)
    assert found.noise == pytest.approx(0.1 / 0.7)
    assert found.snr == pytest.approx(2.0)


def test_what_tells_recipes_apart_is_no_noise():
    found = snr.signal_noise(np.array([[0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]))
    assert found.signal == pytest.approx(0.4 / 0.7) and found.noise == 0
    assert np.isnan(found.snr)  # nothing to compare with, and no division by it


def test_leading_axes_are_carried_along():
    value = np.random.default_rng(0).random((5, 3, 4))
    whole = snr.signal_noise(value)
    assert whole.snr.shape == (5,)
    assert whole.snr.tolist() == pytest.approx([float(snr.signal_noise(one).snr) for one in value])


def test_ratios_of_single_runs_by_hand():
    # means 2, 12 and 7, so 10 apart; standard deviations 1, 4 and 0
    value = np.array([[1.0, 2, 3], [8, 12, 16], [7, 7, 7]])
    assert snr.run_ratios(value).tolist() == pytest.approx([10, 2.5, math.nan], nan_ok=True)
    # both runs' noise is sqrt((1 + 16) / 2) = 2.92: the run with more of it weighs most
    assert snr.signal_noise(value[:2]).snr == pytest.approx(10 / math.sqrt(8.5))
    assert snr.run_ratios(np.stack([value, 2 * value])).shape == (2, 3)


@given(st.floats(0.1, 10), st.floats(-3, 3))
def test_the_ratio_knows_neither_unit_nor_origin(factor, shift):
    value = np.array([[0.2, 0.3, 0.25], [0.6, 0.5, 0.55], [0.4, 0.45, 0.41]])
    assert snr.signal_noise(factor * value + shift).snr == pytest.approx(float(snr.signal_noise(value).snr))


@pytest.mark.parametrize(("runs", "checkpoints", "tabled"), [(2, 6, 3.15), (3, 6, 3.67), (5, 4, 4.37)])
def test_the_floor_is_the_tabled_studentised_range_over_the_root_of_checkpoints(runs, checkpoints, tabled):
    """q at .05 with 10, 15 and 15 degrees of freedom."""
    assert snr.noise_floor(runs, checkpoints, 0.95) == pytest.approx(tabled / math.sqrt(checkpoints), abs=0.005)


def test_equal_recipes_stay_below_the_floor_as_often_as_it_says():
    value = np.random.default_rng(0).standard_normal((4000, 3, 6))
    share = (snr.signal_noise(value).snr < snr.noise_floor(3, 6, 0.95)).mean()
    assert share == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("early", "final", "expected"),
    [
        ([1, 2, 3], [1, 3, 2], 2 / 3),  # the last pair is the other way round
        ([1, 1, 3], [1, 2, 3], 2.5 / 3),  # an early tie counts half
        ([1, 2, 3], [5, 5, 6], 1.0),  # a final tie has no right order
        ([3, 2, 1], [1, 2, 3], 0.0),
        ([1, 2, 3], [4, 4, 4], math.nan),
        ([1, 2, math.nan], [1, 2, 3], math.nan),
    ],
)
def test_decision_accuracy_by_hand(early, final, expected):
    found = snr.decision_accuracy(np.array([early], float), np.array([final], float))
    assert found.tolist() == pytest.approx([expected], nan_ok=True)


def test_a_checkpoint_is_judged_by_the_others():
    assert snr.without_one(np.array([[1.0, 2.0, 6.0]])).tolist() == [[4.0, 3.5, 1.5]]


def test_blocks_are_whole_and_end_with_the_last_checkpoint():
    assert snr.blocks(7, 3) == [slice(1, 4), slice(4, 7)]
    assert snr.blocks(4, 2) == [slice(0, 2), slice(2, 4)]
    assert snr.blocks(2, 3) == []


def test_units_are_kept_while_they_help_the_joint_ratio():
    clean = [[1.0, 1.1], [2.0, 2.1]]
    noisy = [[1.0, 9.0], [9.0, 1.0]]
    flat = [[5.0, 5.0], [5.0, 5.0]]  # no ratio of its own, and adds neither signal nor noise
    total, count = np.array([noisy, clean, flat]), np.array([10.0, 10.0, 10.0])
    assert snr.choose_units(total, count).tolist() == [False, True, False]
    # a second clean unit whose noise goes the other way cancels that of the first, in part
    second = [[1.08, 1.0], [2.08, 2.0]]
    assert snr.choose_units(np.array([noisy, clean, second]), count).tolist() == [False, True, True]
    assert snr.joint_ratio(np.array([clean, second]), np.array([1.0, 1.0])) == pytest.approx(1 / (0.01 / math.sqrt(2)))


def test_a_power_law_is_found_again():
    sizes = np.array([[100.0], [200.0], [400.0], [800.0], [1600.0]])
    error = 0.1 + 0.4 * (sizes[:, 0] / 100) ** -0.5
    law = snr.fit_power_law(sizes, error)
    assert law.floor == pytest.approx(0.1, abs=1e-3) and law.exponent_S[0] == pytest.approx(0.5, abs=1e-2)
    assert law(np.array([[6400.0]]))[0] == pytest.approx(0.1 + 0.4 / 8, abs=1e-3)


def test_two_runs_fix_a_power_law_without_a_floor():
    law = snr.fit_power_law(np.array([[100.0], [400.0]]), np.array([0.4, 0.2]))
    assert law.floor == 0
    assert law(np.array([[1600.0]]))[0] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="1 scales need 2 runs, got 1"):
        snr.fit_power_law(np.array([[100.0]]), np.array([0.4]))


def test_a_power_law_over_verdicts_and_weights():
    sizes = np.array([[v, p] for v in (1e3, 4e3, 16e3) for p in (1e6, 1e7)])
    error = 0.2 * (sizes[:, 0] / 1e3) ** -0.5 + 0.1 * (sizes[:, 1] / 1e6) ** -0.3
    law = snr.fit_power_law(sizes[:-1], error[:-1])
    assert law(sizes[-1:])[0] == pytest.approx(error[-1], rel=0.02)
