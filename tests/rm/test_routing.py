"""Which answers go to the judge: widths, values and the choice, by hand and as properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm.posterior import Doubt
from rm.reward_level import Expected
from rm.routing import choose, values, widths
from rm.scorer import Scored
from rubric_data.records import Criterion, Rubric
from rubric_data.reward import rubric_reward


def rubric(*weights, veto=()):
    return Rubric(
        criteria=tuple(
            Criterion(id=str(place), text=f"c{place}", weight=weight, veto=place in veto)
            for place, weight in enumerate(weights)
        )
    )


def scored(probs, logits=None, **more):
    probs = np.array(probs)
    return Scored(probs, np.zeros(len(probs)) if logits is None else np.array(logits), 0.5, 0, **more)


def test_widths_by_hand():
    # two standard deviations of a yes/no verdict: 2 * sqrt(.9 * .1) = .6; code's answer is exact
    assert widths(scored([0.5, 0.9, 0.3], [0.0, 1.0, np.nan])) == pytest.approx([1.0, 0.6, 0.0])
    doubt = Doubt(np.ones(2), np.diag([0.16, 0.0]), 0.1)
    assert widths(scored([0.1, 0.9], doubt=doubt)) == pytest.approx([1.0, 0.6])  # 2 * sqrt(.09 + .16) = 1
    expected = Expected(0.5, 0, 1, 0, np.array([0.2, 0.0]), np.array([0.9, 0.05]))
    assert widths(scored([0.5, 0.01], expected=expected)) == pytest.approx([0.7, 0.05])


def test_values_by_hand():
    # positive weights sum to 4: a pitfall moves the reward as well
    assert values(rubric(3.0, 1.0, -2.0), np.full(3, 0.5), np.array([0.4, 1.0, 0.5])) == pytest.approx(
        [0.3, 0.25, 0.25]
    )
    # what nobody answered leaves the sum of weights
    assert values(rubric(3.0, 1.0), np.array([np.nan, 0.5]), np.array([np.nan, 0.4])) == pytest.approx([0.0, 0.4])
    assert (values(rubric(3.0, -1.0), np.array([np.nan, 0.5]), np.ones(2)) == 0).all()
    # reward = (v0 + v1) / 2 * v1; at (1, .5) its slopes are .25 and .75 + .25
    assert values(rubric(1.0, 1.0, veto={1}), np.array([1.0, 0.5]), np.ones(2)) == pytest.approx([0.25, 1.0])


@given(st.lists(st.tuples(st.floats(0.2, 3), st.floats(0.05, 0.95), st.booleans()), min_size=1, max_size=6))
def test_a_value_is_the_slope_of_the_reward_times_the_width(rows):
    weights, probs, vetoes = zip(*rows, strict=True)
    asked = rubric(*weights, veto={place for place, veto in enumerate(vetoes) if veto})
    probs = np.array(probs)
    moved = [
        abs(rubric_reward(asked, probs + step) - rubric_reward(asked, probs - step)) / 2e-6
        for step in 1e-6 * np.eye(len(probs))
    ]
    assert values(asked, probs, np.full(len(probs), 0.5)) == pytest.approx(np.array(moved) / 2, abs=1e-4)


def test_the_most_valuable_come_first_within_threshold_and_budget():
    value, width, prob = np.array([0.1, 0.4, 0.4, 0.0, 0.4]), np.array([1.0, 0.8, 0.9, 1.0, 0.9]), np.full(5, 0.5)
    prob[2] = 0.6
    assert choose(value, width, prob, budget=9).tolist() == [4, 2, 1, 0]  # 3 is worth nothing
    assert choose(value, width, prob, budget=2).tolist() == [4, 2]
    assert choose(value, width, prob, budget=9, least=0.85).tolist() == [4, 2, 0]
    assert choose(value, width, prob, budget=0).tolist() == [] == choose(*np.empty((3, 0)), budget=3).tolist()


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=30),
    st.integers(-2, 40),
    st.floats(0, 1),
)
def test_no_choice_exceeds_its_budget_or_leaves_out_what_is_worth_more(rows, budget, least):
    value, width, prob = np.array(rows).reshape(-1, 3).T
    chosen = choose(value, width, prob, budget=budget, least=least)
    assert len(set(chosen.tolist())) == len(chosen) <= max(budget, 0)
    assert (width[chosen] >= least).all() and (value[chosen] > 0).all()
    left = np.setdiff1d(np.flatnonzero((width >= least) & (value > 0)), chosen)
    assert len(chosen) == min(max(budget, 0), len(chosen) + len(left))
    assert not len(chosen) or not len(left) or value[left].max() <= value[chosen].min()
