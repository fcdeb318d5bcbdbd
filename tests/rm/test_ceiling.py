"""The judge against its own votes and against people, by hand, with the model beside it."""

import numpy as np
import pytest

from rm.audit import audit
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

RUBRIC = Rubric(criteria=(Criterion(id="a", text="Is a.", weight=3), Criterion(id="b", text="Is b.")))
MODEL = [np.array([0.9, 0.2]), np.array([0.6, 0.8]), np.array([0.3, 0.4])]


def judged(number, values, human=(None, None)):
    verdicts = zip("ab", values, human, strict=True)
    return JudgedResponse(
        prompt_id=f"p{number // 2}",
        prompt=f"prompt {number // 2}",
        response_id=f"r{number}",
        response=f"response {number}",
        rubric=RUBRIC,
        verdicts=tuple(
            Verdict(criterion_id=id_, value=v, human=h, masked="refusal" if v is None else None)
            for id_, v, h in verdicts
        ),
    )


def ceiling(records, votes=None):
    return audit(records, {"model": MODEL[: len(records)]}, votes=votes, bootstrap=20)["ceiling"]


def test_a_vote_of_the_judge_and_the_model_against_its_other_votes():
    records = [judged(0, (1, 0.5)), judged(1, (0, 1)), judged(2, (1, None))]
    votes = [
        np.array([[1, 1, 1], [np.nan, 1, 0]]),  # masked at first: its first vote is the second
        np.array([[1, 0, 0], [1, np.nan, np.nan]]),  # one vote alone has nothing to agree with
        np.array([[1, 1, np.nan], [np.nan, np.nan, np.nan]]),
    ]
    found = ceiling(records, votes)["self"]
    assert (found["questions"], found["prompts"], found["votes"]) == (4, 2, 10)
    # pairs of votes: 3 of 3 equal, 0 of 1, 1 of 3, 1 of 1
    assert found["self_consistency"]["value"] == pytest.approx(5 / 8)
    # first votes 1 1 1 1 against the others' 1 0 0 1; the model's .9 .2 .6 .3
    assert found["judge"]["accuracy"]["value"] == 0.5
    assert found["judge"]["brier"]["value"] == 0.5
    assert found["model"]["accuracy"]["value"] == 0.5
    assert found["model"]["auroc"]["value"] == 3 / 4
    assert found["model"]["brier"]["value"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.49) / 4)


def test_judge_and_model_against_people():
    records = [judged(0, (1, 0), human=(1, None)), judged(1, (1, 1), human=(0, 1)), judged(2, (0, None), human=(1, 1))]
    found = ceiling(records)["human"]
    # masked by the judge: nobody is asked
    assert (found["questions"], found["responses"]) == (4, 3)
    # people 1 0 1 1, judge 1 1 1 0, model .9 .6 .8 .3
    assert found["judge"]["accuracy"]["value"] == 0.5
    assert found["model"]["accuracy"]["value"] == 0.5
    assert found["model"]["auroc"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    # rewards of the first prompt from what people answered: people 1 and .25, the judge 1 and 1, the model .9 and .65
    assert found["judge"]["pair_accuracy"]["value"] == 0.5
    assert found["model"]["pair_accuracy"]["value"] == 1


def test_nothing_to_compare_is_left_out():
    records = [judged(0, (1, 0)), judged(1, (0, 1))]
    assert ceiling(records) == {}
    assert ceiling(records, [np.array([[1.0], [0.0]])] * 2) == {}
    assert ceiling(records, [np.empty((2, 0))] * 2) == {}
