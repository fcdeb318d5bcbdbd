"""The judge in the place of doubtful answers: who is asked, what is paid for, and what a failed call leaves."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.calibration import Calibration
from rm.fallback import FallbackScorer
from rm.posterior import Posterior
from rm.scorer import RubricScorer, Scored
from rubric_data.judges import masked_verdicts
from rubric_data.records import Criterion, Level, Rubric, Verdict, Verifier

NEVER = Verifier(name="ifeval:punctuation:no_comma")
RUBRIC = Rubric(
    criteria=(
        Criterion(id="heavy", text="names a pear", weight=3.0),
        Criterion(id="light", text="is short"),
        Criterion(id="code", text="has no comma", weight=9.0, verifier=NEVER),
    )
)


class Scripted:
    """Stands in for the model: .6 and .5 of what code leaves, whatever it reads."""

    def __init__(self, probs=(0.6, 0.5)):
        self.probs = probs

    def score(self, prompts, responses, rubrics):
        found = []
        for rubric in rubrics:
            left = iter(self.probs)
            probs = np.array([1.0 if one.verifier else next(left) for one in rubric.criteria])
            logits = np.array([np.nan if one.verifier else 0.0 for one in rubric.criteria])
            found.append(Scored(probs, logits, 0.5, 0))
        return found

    calibration = Calibration()
    reward = "proxy"
    corrected, _reward = RubricScorer.corrected, RubricScorer._reward


class Judge:
    """Says yes; fails on criteria that it does not ``know``."""

    name, template = "judge", "1"

    def __init__(self, fails=()):
        self.fails, self.asked = fails, []

    def judge(self, requests):
        return [tuple(self._verdict(request, one) for one in request.criteria) for request in requests]

    def _verdict(self, request, criterion):
        self.asked.append((request.prompt, request.response, criterion.id))
        if criterion.id in self.fails:
            return masked_verdicts([criterion], "timeout", "no reply", judge=self.name)[0]
        return Verdict(criterion_id=criterion.id, value=1.0, judge=self.name)


def test_the_judge_answers_what_is_worth_most_and_the_reward_follows():
    judge = Judge()
    [one] = FallbackScorer(Scripted(), judge, width=0.5, budget=1).score(["p"], ["r"], [RUBRIC])
    assert judge.asked == [("p", "r", "heavy")]
    assert one.probs.tolist() == [1.0, 0.5, 1.0]
    assert one.reward == pytest.approx((3 * 1 + 0.5 + 9) / 13)
    assert one.asked.judged.tolist() == [True, False, False] and (one.asked.questions, one.asked.failed) == (1, 0)
    assert one.by_code.tolist() == [False, False, True]
    assert one.own.probs.tolist() == [0.6, 0.5, 1.0] and one.own.reward == 0.5
    [left] = FallbackScorer(Scripted((0.99, 0.01)), judge, width=0.5, budget=9).score(["p"], ["r"], [RUBRIC])
    assert left.asked is None and left.own is left and len(judge.asked) == 1  # nothing is wide enough


def test_a_failed_call_leaves_the_models_answer_and_is_counted_and_paid():
    judge = Judge(fails={"heavy"})
    fallback = FallbackScorer(Scripted(), judge, width=0.5, budget=2)
    first, second = fallback.score(["p", "q"], ["r", "r"], [RUBRIC] * 2)
    assert first.probs.tolist() == [0.6, 0.5, 1.0] and first.reward == pytest.approx((1.8 + 0.5 + 9) / 13)
    assert not first.asked.judged.any() and (first.asked.questions, first.asked.failed) == (1, 1)
    assert (second.asked.questions, second.asked.failed) == (1, 1)
    fallback.score(["new"], ["r"], [RUBRIC])
    assert len(judge.asked) == 2  # the budget is spent


def test_equal_responses_ask_once():
    judge = Judge()
    both = FallbackScorer(Scripted(), judge, width=0.5, budget=9).score(["p", "p"], ["r", "r"], [RUBRIC] * 2)
    assert [one.asked.judged.sum() for one in both] == [2, 2]
    assert [one.asked.questions for one in both] == [2, 0] and len(judge.asked) == 2


def test_the_budget_is_spread_over_the_responses_to_come():
    judge = Judge()
    fallback = FallbackScorer(Scripted(), judge, width=0.5, budget=3, responses=4)
    spent = []
    for number in range(6):  # two more than were planned
        fallback.score([f"p{number}"], ["r"], [RUBRIC])
        spent.append(len(judge.asked))
    assert spent == [0, 1, 2, 3, 3, 3]


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(1, 30)),
    st.sets(st.sampled_from(["heavy", "light"])),
)
def test_no_run_asks_for_more_than_its_budget(calls, budget, responses, fails):
    judge = Judge(fails)
    fallback = FallbackScorer(Scripted(), judge, width=0.1, budget=budget, responses=responses)
    told = 0
    for call, size in enumerate(calls):
        texts = [f"r{row % 3}" for row in range(size)]
        found = fallback.score([f"p{call % 2}"] * size, texts, [RUBRIC] * size)
        told += sum(one.asked.questions for one in found if one.asked)
    assert told == len(judge.asked) <= budget


def test_a_killed_run_pays_for_nothing_twice_and_never_more_than_its_budget(tmp_path):
    def fallback(**done):
        judge = Judge()
        made = FallbackScorer(Scripted(), judge, width=0.5, budget=4, responses=4)
        made.go_on(tmp_path / "asked.sqlite", **done)
        return made, judge

    before, _ = fallback()
    for number in range(3):
        before.score([f"p{number}"], ["r"], [RUBRIC])
    after, judge = fallback(seen=1, asked=1)  # killed after the third, gone on from the first
    [same] = after.score(["p1"], ["r"], [RUBRIC])
    assert same.asked.questions == 1 and judge.asked == []
    for number in range(3, 9):  # other responses than before
        after.score([f"p{number}"], ["r"], [RUBRIC])
    assert judge.asked == [("p3", "r", "heavy")]  # three were paid for before


def test_a_correction_is_exact_where_the_model_is_graded_and_in_doubt(tiny_backbone):
    levels = tuple(Level(label=label) for label in ("poor", "fair", "good"))
    rubric = Rubric(criteria=(Criterion(id="a", text="is good", levels=levels), Criterion(id="b", text="is short")))
    scorer = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=256)
    width = scorer.model.head.in_features + 1
    scorer = RubricScorer(scorer.model, scorer.encoder, posterior=Posterior(0.1 * np.eye(width)))
    [found] = scorer.score(["Name a fruit."], ["A pear."], [rubric])
    half = scorer.corrected(rubric, found, np.array([0.5, np.nan]))
    assert half.probs.tolist() == [0.5, found.probs[1]]
    assert half.level_probs[0].tolist() == [0.0, 1.0, 0.0] and half.level_probs[1][1] == found.probs[1]
    assert half.doubt.std[0] == 0 and half.doubt.std[1] == found.doubt.std[1]
    assert half.doubt.reward == pytest.approx(np.sqrt(found.doubt.covariance[1, 1]) / 2)
    same = scorer.corrected(rubric, found, np.full(2, np.nan))
    for field in dataclasses.fields(Scored):
        if field.name not in ("graded", "doubt"):
            assert np.array_equal(getattr(same, field.name), getattr(found, field.name)), field.name
