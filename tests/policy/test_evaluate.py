"""The comparison of two policies, with numbers to check by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.evaluate import (
    PolicyEvaluation,
    evaluate_policy,
    gold_reward,
    gold_verdicts,
    mean_estimate,
    paired_difference,
)
from policy.prompts import RubricPrompt
from rm.backbone import load_causal_lm, load_tokenizer
from rm.sampling import Completion
from rm.scorer import Scored
from rubric_data.records import Criterion, Rubric, Verdict

RUBRIC = Rubric(criteria=(Criterion(id="a", text="a", weight=3.0), Criterion(id="b", text="b", weight=1.0)))
PROMPTS = [RubricPrompt(f"p{number}", f"Say {number}.", RUBRIC) for number in range(3)]


class LengthScorer:
    """Reward = share of 100 letters."""

    def score(self, prompts, responses, rubrics):
        shares = [min(len(text), 100) / 100 for text in responses]
        return [Scored(np.full(2, share), np.zeros(2), math.nan, 0) for share in shares]  # what is paid plays no part


class FixedJudge:
    """Meets a; masks b."""

    name, template = "fixed", "1"

    def judge(self, requests):
        return [(Verdict(criterion_id="a", value=1.0), Verdict(criterion_id="b", masked="no: none")) for _ in requests]


def test_the_same_gain_on_every_prompt_has_an_interval_of_no_width():
    gain = paired_difference(np.array([0.1, 0.5, 0.2]), np.array([0.35, 0.75, 0.45]))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.25, 0.25, 0.25))


def test_prompts_are_what_is_resampled():
    # two prompts, gains 0 and 1: a resample has mean 0, 1/2 or 1 with chance 1/4, 1/2, 1/4
    gain = paired_difference(np.array([0.5, 0.0]), np.array([0.5, 1.0]), bootstrap=4000)
    assert (gain.value, gain.low, gain.high) == (0.5, 0.0, 1.0)


def test_a_prompt_masked_on_either_side_is_left_out():
    gain = paired_difference(np.array([0.2, math.nan, 0.4]), np.array([0.3, 0.9, math.nan]))
    assert gain.value == pytest.approx(0.1)
    assert math.isnan(paired_difference(np.array([math.nan]), np.array([0.5])).value)


def test_unequal_sets_of_prompts_are_refused():
    with pytest.raises(ValueError, match="2 prompts before and 3 after"):
        paired_difference(np.zeros(2), np.zeros(3))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 5))
def test_the_interval_stays_within_the_gains_and_reversing_the_pair_mirrors_it(values, seed):
    before, after = np.zeros(len(values)), np.array(values)
    gain = paired_difference(before, after, bootstrap=200, seed=seed)
    loss = paired_difference(after, before, bootstrap=200, seed=seed)
    assert min(values) - 1e-9 <= gain.low <= gain.high <= max(values) + 1e-9
    assert gain.value == pytest.approx(np.mean(values))
    assert (loss.value, loss.low, loss.high) == pytest.approx((-gain.value, -gain.high, -gain.low))
    assert mean_estimate(after, bootstrap=200, seed=seed) == gain


def test_gold_is_the_rubrics_reward_of_the_verdicts():
    class Judge(FixedJudge):
        def judge(self, requests):
            return [(Verdict(criterion_id="a", value=1.0), Verdict(criterion_id="b", value=0.0)) for _ in requests]

    def gold(judge):
        [verdicts] = gold_verdicts(judge, PROMPTS[:1], ["x"])
        return gold_reward(RUBRIC, verdicts)

    assert gold(Judge()) == 0.75  # (3 * 1 + 1 * 0) / 4
    assert gold(FixedJudge()) == 1.0  # the masked one does not count


def test_prompt_means_leave_masked_responses_out():
    found = PolicyEvaluation(
        prompts=PROMPTS[:2],
        completions=[[Completion("a", True), Completion("b", False)], [Completion("c", False)] * 2],
        gold_PS=np.array([[0.2, math.nan], [math.nan, math.nan]]),
        proxy_PS=np.array([[0.2, 0.4], [1.0, 0.0]]),
        tokens_PS=np.array([[1, 2], [3, 6]]),
    )
    assert found.gold_P[0] == 0.2
    assert math.isnan(found.gold_P[1])
    assert found.proxy_P == pytest.approx([0.3, 0.5])
    assert found.finished_share == 0.25
    assert found.mean_tokens == 3.0


def test_one_policy_against_itself_gains_nothing(tiny_backbone):
    model, tokenizer = load_causal_lm(tiny_backbone), load_tokenizer(tiny_backbone)
    options = dict(judge=FixedJudge(), scorer=LengthScorer(), samples=2, max_new_tokens=6, temperature=1.0, seed=3)
    one = evaluate_policy(model, tokenizer, PROMPTS, **options)
    two = evaluate_policy(model, tokenizer, PROMPTS, **options)
    assert one.proxy_PS.shape == one.gold_PS.shape == one.tokens_PS.shape == (3, 2)
    assert one.completions == two.completions
    for row, texts in zip(one.proxy_PS, one.completions, strict=True):
        assert row == pytest.approx([min(len(text.text), 100) / 100 for text in texts])
    gain = paired_difference(one.proxy_P, two.proxy_P)
    assert (gain.value, gain.low, gain.high) == (0.0, 0.0, 0.0)
