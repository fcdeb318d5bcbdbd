import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rubric_data.records import Criterion, Rubric
from rubric_data.reward import rubric_reward, weighted_mean_reward

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "weights", "veto", "want"),
    [
        ([1, 0, NAN], [3, 1, 1], None, 0.75),  # the masked third counts nowhere
        ([1, 0, 0], [3, 1, 1], None, 0.6),
        ([1, 1, 1], [2, 2, -1], None, 0.75),  # (2 + 2 - 1) / 4
        ([0, 0, 1], [2, 2, -1], None, 0.0),  # clipped
        ([1, 0.5], [1, 1], [False, True], 0.375),  # 0.75, half vetoed
        ([1, NAN], [1, 1], [False, True], 1.0),  # an unknown veto vetoes nothing
        ([NAN, 1], [1, -1], None, NAN),  # only a pitfall is known
    ],
)
def test_rewards_by_hand(values, weights, veto, want):
    assert weighted_mean_reward([values], weights, veto)[0] == pytest.approx(want, nan_ok=True)


@given(
    st.lists(
        st.tuples(st.none() | st.floats(0, 1), st.floats(-5, 5).filter(lambda w: abs(w) > 1e-3), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_a_reward_lies_in_the_unit_interval_and_forgets_the_order(items):
    values, weights, veto = (np.array(column, float) for column in zip(*items, strict=True))
    reward = weighted_mean_reward([values], weights, veto)[0]
    assert math.isnan(reward) or 0 <= reward <= 1
    shuffled = weighted_mean_reward([values[::-1]], weights[::-1], veto[::-1])[0]
    assert shuffled == pytest.approx(reward, nan_ok=True)


def test_rubric_reward_takes_weights_and_vetoes_from_the_rubric():
    rubric = Rubric(
        criteria=(
            Criterion(id="a", text="a", weight=3.0),
            Criterion(id="b", text="b", veto=True),
            Criterion(id="c", text="c", weight=-2.0),
        )
    )
    assert rubric_reward(rubric, [1, 0.5, 0.5]) == pytest.approx((3 + 0.5 - 1) / 4 * 0.5)


def test_an_empty_rubric_has_no_reward():
    with pytest.raises(ValueError, match="the rubric has no criteria"):
        weighted_mean_reward(np.zeros((2, 0)), np.zeros(0))
