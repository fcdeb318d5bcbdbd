"""Aggregation of criterion probabilities: numbers by hand, and what must hold of every setting."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.aggregation import (
    Aggregate,
    build_aggregate,
    category_weights,
    headroom_weights,
    kept_criteria,
    pessimistic,
    saturate,
    shape_top,
)
from policy.config import AggregationConfig
from rubric_data.errors import UserError
from rubric_data.interactions import Interactions
from rubric_data.records import Criterion, Rubric
from rubric_data.reward import rubric_reward

NAN = math.nan


def rubric(*rows):
    """Criteria a, b, c ... from (weight, veto, *tags) or a bare weight."""
    criteria = []
    for name, row in zip("abcdefghijkl", rows, strict=False):
        weight, veto, *tags = row if isinstance(row, tuple) else (row, False)
        criteria.append(Criterion(id=name, text=f"Is {name}.", weight=weight, veto=veto, tags=tuple(tags)))
    return Rubric(criteria=tuple(criteria))


def reward(criteria, probs, **settings):
    return build_aggregate(AggregationConfig(**settings))(criteria, np.array(probs, float))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_default_is_the_weighted_mean_with_pitfalls_and_soft_vetoes():
    assert reward(rubric(3, 1, 1), [1, 0, NAN]) == 0.75
    assert reward(rubric(2, 2, -1), [1, 1, 1]) == 0.75  # (2 + 2 - 1) / 4: HealthBench
    assert reward(rubric(2, 2, -5), [1, 1, 1]) == 0.0  # clipped
    assert reward(rubric(3, (1, True)), [1, 0.5]) == 0.4375  # (3 + .5) / 4, times .5
    assert math.isnan(reward(rubric(1, -1), [NAN, 1]))


def test_categories_weigh_as_in_rar_with_the_sign_of_the_criterion():
    rows = rubric((5, False, "essential"), (5, False, "Important"), (9, False, "optional", "x"), (-8, False, "pitfall"))
    assert category_weights(rows).tolist() == [1.0, 0.7, 0.3, -0.9]
    veto = Criterion(id="v", text="Does not flatter.", weight=0.01, veto=True, tags=("veto",))
    assert category_weights(Rubric(criteria=(*rows.criteria, veto))).tolist()[-1] == 0.01
    assert reward(rows, [1, 1, 0, 1], weights="categories") == pytest.approx((1 + 0.7 - 0.9) / 2)
    avoided = rubric((5, False, "essential"), (2, False, "pitfall"))
    assert reward(avoided, [0, 1], weights="categories") == pytest.approx(0.9 / 1.9)


def test_a_hard_veto_pays_nothing_below_its_threshold_and_everything_above():
    rows = rubric(3, (1, True))
    assert reward(rows, [1, 0.5], veto="hard") == 0.875
    assert reward(rows, [1, 0.49], veto="hard") == 0.0
    assert reward(rows, [1, 0.5], veto="hard", veto_threshold=0.6) == 0.0
    assert reward(rows, [1, NAN], veto="hard") == 1.0  # what is not known vetoes nothing
    assert reward(rows, [1, 0.5], veto="off") == 0.875


def test_saturation_by_hand():
    rate = 2 * math.log(2)  # e^-rate = 1/4, so half the credit is (1 - 1/2) / (3/4) = 2/3 of the pay
    assert saturate(np.array([0, 0.5, 1, NAN]), np.ones(4), rate) == pytest.approx([0, 2 / 3, 1, NAN], nan_ok=True)
    assert saturate(np.array([0.5]), np.array([-1.0]), rate) == pytest.approx([1 / 3])
    # balanced beats one-sided: (2/3 + 2/3) / 2 against (1 + 0) / 2
    assert reward(rubric(1, 1), [0.5, 0.5], saturation=rate) == pytest.approx(2 / 3)
    assert reward(rubric(1, 1), [1, 0], saturation=rate) == pytest.approx(0.5)
    # a soft veto multiplies by the probability itself
    assert reward(rubric(1, (1, True)), [1, 0.5], saturation=rate) == pytest.approx((1 + 2 / 3) / 2 / 2)


def test_headroom_moves_weight_to_what_is_not_reached_yet():
    # w (1 - s)^2 = 1/4 and 1, scaled to the sum 2; the pitfall alone on its side keeps its weight
    weights = headroom_weights(np.array([1.0, 1.0, -1.0]), np.array([0.5, 0.0, 0.9]), 2.0)
    assert weights == pytest.approx([0.4, 1.6, -1.0])
    aggregate = build_aggregate(AggregationConfig(headroom=2.0))
    saturation = np.array([0.5, 0.0, 0.9])
    assert aggregate(rubric(1, 1, -1), np.array([1, 0, 0]), saturation) == pytest.approx(0.2)
    assert aggregate(rubric(1, 1, -1), np.array([1, 0, 0])) == 0.5  # with nothing known of the policy
    assert headroom_weights(np.array([1.0, 1.0]), np.ones(2), 3.0) == pytest.approx([1, 1])  # all mastered


def test_the_top_is_stretched_in_two_lines():
    # [.75, 1] takes the upper half: .75 -> .5, .875 -> .75
    assert shape_top(np.array([0, 0.375, 0.75, 0.875, 1]), 0.75, 0.5) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert reward(rubric(7, 1), [1, 0], top_share=0.5) == pytest.approx(0.75)
    assert reward(rubric(1, 1), [1, 0.6], top_share=0.25) == pytest.approx(0.8)  # as it was


def test_interactions_add_to_the_mean_of_the_other_criteria():
    rows = rubric(1, 1, -1, (1, False, "overall"))
    pairs = Interactions("text", {("Is a.", "Is b."): -0.2, ("Is b.", "Is c."): 0.5})
    aggregate = Aggregate(AggregationConfig(), pairs)
    # mean (1 + .5 - .5) / 2; a b = .5; b and the pitfall's credit .5: .25
    assert aggregate(rows, np.array([1, 0.5, 0.5, 0])) == pytest.approx(0.5 - 0.2 * 0.5 + 0.5 * 0.25)
    assert aggregate(rows, np.array([1, NAN, 0, 0])) == 1.0  # no pair is left; a alone is known to be worth something
    assert aggregate(rows, np.array([1, 1, 0, 0])) == 1.0  # 1 - .2 + .5, clipped


def test_implicit_pays_the_overall_criterion_alone():
    rows = rubric(3, (1, False, "overall"), -2)
    assert reward(rows, [0, 0.7, 1], implicit=True) == pytest.approx(0.7)
    assert math.isnan(reward(rows, [1, NAN, 0], implicit=True))
    assert reward(rubric((1, True), (1, False, "overall")), [0, 1], implicit=True) == 0.0
    with pytest.raises(UserError, match="rubric of 'a': has no criterion of positive weight with the tag 'overall'"):
        reward(rubric(1, (-1, False, "overall")), [1, 1], implicit=True)


def test_pessimism_takes_off_doubt():
    assert pessimistic(0.75, 0.25, 2.0) == 0.25
    assert pessimistic(0.25, 0.25, 2.0) == 0.0
    assert math.isnan(pessimistic(NAN, NAN, 1.0))


def test_what_dropout_keeps():
    rows = rubric((1, True), -1, *[1] * 8)
    drawn = {step: kept_criteria(rows, seed=0, group="p", step=step, share=0.5) for step in range(200)}
    assert all(kept.sum() == 5 and kept[0] for kept in drawn.values())  # half of ten; the veto always
    shares = np.mean(list(drawn.values()), 0)
    assert np.abs(shares[1:] - 4 / 9).max() < 0.12
    again = kept_criteria(rows, seed=0, group="p", step=3, share=0.5)
    assert (again == drawn[3]).all()
    assert len({tuple(kept_criteria(rows, seed=s, group=g, step=0, share=0.5)) for s in (0, 1) for g in "pq"}) == 4
    assert kept_criteria(rubric(1, 1, 1), seed=0, group="p", step=0, share=0.9).all()
    assert kept_criteria(rows, seed=0, group="p", step=0, share=0.0).all()
    one = rubric(1, *[-1] * 5)  # without the first nothing could be earned
    assert all(kept_criteria(one, seed=0, group="p", step=step, share=0.5)[0] for step in range(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saturation": -1.0}, r"aggregation.saturation: must be between 0 and 100, got -1"),
        ({"headroom": NAN}, r"aggregation.headroom: must be 0 or more, got nan"),
        ({"dropout": 1.0}, r"aggregation.dropout: must be at least 0 and below 1, got 1"),
        ({"top_share": 1.0}, r"aggregation.top_share: must be between 0 and 1, got 1"),
        ({"veto_threshold": 0.0}, r"aggregation.veto_threshold: must be above 0"),
        ({"implicit": True, "dropout": 0.5}, r"aggregation.dropout: implicit pays the overall criterion alone"),
        ({"interactions": "x.json", "saturation": 1.0}, r"aggregation.saturation: interactions were fitted beside"),
        ({"interactions": "x.json"}, r"x.json: holds no interactions .*; give a file that `rubric interactions` wrote"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        build_aggregate(AggregationConfig(**settings))


def test_a_criterion_without_a_category_is_named():
    with pytest.raises(UserError, match=r"criterion 'b': needs one of the tags essential, .* has none"):
        reward(rubric((1, False, "optional"), 1), [1, 1], weights="categories")


# --- what holds whatever the numbers ---------------------------------------------------------------------------------

CATEGORIES = ("essential", "important", "optional", "pitfall")
ROWS = st.tuples(
    st.floats(-5, 5).filter(lambda w: abs(w) > 1e-3), st.booleans(), st.sampled_from(CATEGORIES), st.just("overall")
)
PROB = st.none() | st.floats(0, 1)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "weights": st.sampled_from(["rubric", "categories"]),
        "saturation": st.floats(0, 20),
        "headroom": st.floats(0, 5),
        "veto": st.sampled_from(["soft", "hard", "off"]),
        "veto_threshold": st.floats(0.1, 1),
        "top_share": st.none() | st.floats(0.05, 0.95),
        "top_from": st.floats(0.05, 0.95),
    },
) | st.just({"implicit": True})


@st.composite
def cases(draw):
    """A rubric, P(met), what the policy has reached, and settings."""
    rows = draw(st.lists(st.tuples(ROWS, PROB, st.floats(0, 1)), min_size=1, max_size=6))
    criteria = [
        (weight if place else abs(weight), veto and (weight > 0 or not place), *tags)
        for place, ((weight, veto, *tags), _, _) in enumerate(rows)
    ]
    probs = np.array([NAN if prob is None else prob for _, prob, _ in rows])
    return rubric(*criteria), probs, np.array([reached for *_, reached in rows]), draw(SETTINGS)


@given(cases())
def test_a_reward_lies_in_the_unit_interval_and_forgets_the_order(case):
    criteria, probs, reached, settings = case
    aggregate = build_aggregate(AggregationConfig(**settings))
    found = aggregate(criteria, probs, reached)
    assert math.isnan(found) or 0 <= found <= 1
    turned = Rubric(criteria=criteria.criteria[::-1])
    assert aggregate(turned, probs[::-1], reached[::-1]) == pytest.approx(found, nan_ok=True)


@given(cases(), st.integers(0, 5), st.floats(0, 1))
def test_more_of_a_good_criterion_never_pays_less_nor_more_of_a_pitfall_more(case, place, raised):
    criteria, probs, reached, settings = case
    aggregate = build_aggregate(AggregationConfig(**settings))
    place %= len(probs)
    if np.isnan(probs[place]):
        return  # an answer that was not known brings its weight with it
    higher = probs.copy()
    higher[place] = max(raised, probs[place])
    before, after = aggregate(criteria, probs, reached), aggregate(criteria, higher, reached)
    sign = np.sign(criteria.criteria[place].weight)
    assert math.isnan(before) or sign * (after - before) >= -1e-9


@given(cases())
def test_a_veto_that_is_certain_forces_nothing(case):
    criteria, probs, reached, settings = case
    vetoes = np.array([criterion.veto for criterion in criteria.criteria])
    found = build_aggregate(AggregationConfig(**settings))(criteria, np.where(vetoes, 0.0, probs), reached)
    assert not vetoes.any() or settings.get("veto") == "off" or math.isnan(found) or found == 0


@given(cases())
def test_the_default_is_rubric_reward_to_the_last_bit(case):
    criteria, probs, _, _ = case
    found, wanted = build_aggregate(AggregationConfig())(criteria, probs), rubric_reward(criteria, probs)
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))


@given(cases(), st.integers(0, 9), st.floats(0, 0.99))
def test_dropout_leaves_three_criteria_every_veto_and_something_to_earn(case, step, share):
    criteria = case[0]
    kept = kept_criteria(criteria, seed=1, group="p", step=step, share=share)
    assert kept.sum() >= min(3, len(kept))
    assert all(kept[place] for place, one in enumerate(criteria.criteria) if one.veto)
    assert any(keep and one.weight > 0 for keep, one in zip(kept, criteria.criteria, strict=True))
