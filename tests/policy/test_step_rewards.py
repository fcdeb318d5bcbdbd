"""What an update pays: the scorer's own reward by default; dropout, headroom and pessimism by hand."""

import math

import numpy as np
import pytest

from policy.aggregation import kept_criteria
from policy.config import AggregationConfig
from policy.step_rewards import Saturation, StepRewards
from rm.posterior import Doubt, reward_std
from rm.scorer import Scored
from rubric_data.errors import UserError
from rubric_data.records import Criterion, Rubric
from rubric_data.reward import rubric_reward

NAN = math.nan
WEIGHTS = {"a": 3, "b": 1, "c": 1, "d": 1, "e": 2, "f": -1}
RUBRIC = Rubric(criteria=tuple(Criterion(id=name, text=f"Is {name}.", weight=w) for name, w in WEIGHTS.items()))
PAIR = Rubric(criteria=RUBRIC.criteria[1:3])  # equal weights


def scored(probs, criteria=RUBRIC, covariance=None):
    probs = np.array(probs, float)
    told = None
    if covariance is not None:
        told = Doubt(np.zeros(len(probs)), covariance, reward_std(criteria, probs, covariance))
    return Scored(probs, probs, rubric_reward(criteria, probs), 0, doubt=told)


def pay(rewards, items, rubric=RUBRIC, groups=None, step=0):
    return rewards([rubric] * len(items), items, groups or ["p"] * len(items), step)


def test_by_default_a_rollout_is_paid_the_scorers_own_reward_whatever_that_is():
    items = [Scored(np.ones(6), np.ones(6), 0.125, 0), Scored(np.ones(6), np.ones(6), NAN, 0)]
    found = pay(StepRewards(AggregationConfig()), items)
    assert found[0] == 0.125 and math.isnan(found[1])


def test_dropout_pays_the_same_criteria_in_a_group_and_others_at_the_next_step():
    generator = np.random.default_rng(0)
    items = [scored(generator.random(6)) for _ in range(4)]
    rewards = StepRewards(AggregationConfig(dropout=0.5), seed=7)
    for step in range(3):
        found = pay(rewards, items, groups=["p", "q", "p", "q"], step=step)
        for item, group, one in zip(items, "pqpq", found, strict=True):
            kept = kept_criteria(RUBRIC, seed=7, group=group, step=step, share=0.5)
            assert kept.sum() == 3
            assert one == rubric_reward(RUBRIC, np.where(kept, item.probs, NAN))
    assert len({tuple(pay(rewards, items, step=step)) for step in range(20)}) > 5


def test_pessimism_is_the_mean_less_the_posteriors_own_standard_deviation():
    covariance = np.diag([0.04, 0.01, 0, 0.09, 0.01, 0.01])
    item = scored([0.9, 0.6, 0.7, 0.5, 0.8, 0.1], covariance=covariance)
    found = pay(StepRewards(AggregationConfig(pessimism=1.5)), [item])
    assert found == [pytest.approx(item.reward - 1.5 * item.doubt.reward)]
    # by hand: slopes 1/2 and 1/2, independent: std = sqrt(.04 + .04) / 2
    pair = scored([0.5, 0.7], PAIR, np.diag([0.04, 0.04]))
    assert pay(StepRewards(AggregationConfig(pessimism=1.0)), [pair], PAIR) == [pytest.approx(0.6 - 0.08**0.5 / 2)]
    # with the top stretched, the doubt is that of the stretched reward: slope 2 above .75
    settings = AggregationConfig(pessimism=1.0, top_share=0.5)
    pair = scored([0.8, 0.9], PAIR, np.diag([0.0001, 0.0]))
    assert pay(StepRewards(settings), [pair], PAIR) == [pytest.approx(0.7 - 0.01)]
    with pytest.raises(UserError, match="no posterior to tell its doubt; run `calibrate`"):
        pay(StepRewards(settings), [scored([0.8, 0.9], PAIR)], PAIR)


def test_what_an_answer_is_worth_is_what_it_moves_of_what_is_paid():
    probs, width = np.array([0.9, 0.5, NAN, 0.5, 0.25, 0.0]), np.array([0.4, 1.0, NAN, 0.0, 0.5, 0.2])
    plain = StepRewards(AggregationConfig()).worth(RUBRIC, probs, width)
    assert plain == pytest.approx([3 / 7 * 0.4, 1 / 7, 0, 0, 2 / 7 * 0.5, 1 / 7 * 0.2])
    overall = Rubric(criteria=(*PAIR.criteria, Criterion(id="o", text="Is good overall.", tags=("overall",))))
    implicit = StepRewards(AggregationConfig(implicit=True))
    assert implicit.worth(overall, np.full(3, 0.5), np.ones(3)).tolist() == [0, 0, 1]
    # saturated: a half more of what is at nothing is worth more than of what is at a half
    saturated = StepRewards(AggregationConfig(saturation=2.0)).worth(PAIR, np.array([0.25, 0.75]), np.full(2, 0.5))
    assert saturated[0] > 0.25 > saturated[1] > 0
    reached = StepRewards(AggregationConfig(headroom=1.0))
    pay(reached, [scored([1, 0.25], PAIR), scored([0.5, 0.25], PAIR)], PAIR)  # .75 and .25: weights 1 to 3
    assert reached.worth(PAIR, np.full(2, 0.5), np.full(2, 0.4)) == pytest.approx([0.1, 0.3])


def test_headroom_is_that_of_earlier_updates():
    rewards = StepRewards(AggregationConfig(headroom=1.0))
    items = [scored([1, 0.25], PAIR), scored([0.5, 0.25], PAIR)]
    assert pay(rewards, items, PAIR) == [0.625, 0.375]  # nothing known yet: equal weights
    # reached .75 and .25: weights .25 and .75 of the sum
    assert pay(rewards, items, PAIR) == pytest.approx([0.25 + 0.75 * 0.25, 0.125 + 0.75 * 0.25])


def test_what_is_remembered_of_a_criterion():
    memory = Saturation()
    one, other = RUBRIC, Rubric(criteria=(RUBRIC.criteria[0],))
    memory.add([one, other], [scored([1, 0, NAN, 1, 1, 0.25]), scored([0], other)])
    assert memory.of(one).tolist() == [0.5, 0, 0, 1, 1, 0.75]  # of the pitfall, what was avoided
    memory.add([other], [scored([1], other)])
    assert memory.of(other) == pytest.approx([0.6])  # a fifth of the way
