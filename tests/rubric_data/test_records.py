import math

import pytest
from pydantic import ValidationError

from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict


def _criterion(**changes):
    return Criterion(**{"id": "c3", "text": "Is short.", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": math.nan}, "criterion 'c3': weight must be finite and non-zero, got nan"),
        ({"weight": 0.0}, "criterion 'c3': weight must be finite and non-zero, got 0.0"),
        ({"text": " "}, "criterion 'c3': text must not be empty"),
        ({"levels": (Level(label="only"),)}, "criterion 'c3': levels need at least two tiers, got 1"),
        ({"veto": True, "weight": -1.0}, "criterion 'c3': a veto must have a positive weight, got -1.0"),
        ({"wieght": 2.0}, "wieght"),
    ],
)
def test_a_criterion_checks_itself(changes, message):
    with pytest.raises(ValidationError, match=message.replace("(", r"\(")):
        _criterion(**changes)


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ((), "needs at least one criterion, got none"),
        ((_criterion(), _criterion(text="Other.")), "criterion id 'c3' appears twice"),
        ((_criterion(weight=-1.0),), "every weight is negative"),
    ],
)
def test_a_rubric_checks_itself(criteria, message):
    with pytest.raises(ValidationError, match=message):
        Rubric(criteria=criteria)


def test_equal_rubrics_have_equal_ids_and_any_change_shows():
    assert Rubric(criteria=(_criterion(),)).id == Rubric(criteria=(_criterion(),)).id
    for changes in (
        {"weight": 2.0},
        {"text": "Is long."},
        {"veto": True},
        {"levels": (Level(label="a"), Level(label="b"))},
    ):
        assert Rubric(criteria=(_criterion(**changes),)).id != Rubric(criteria=(_criterion(),)).id


def test_a_verdict_has_a_value_or_a_reason():
    for fields in ({}, {"value": 0.5, "masked": "timeout"}, {"value": 1.5}, {"value": math.nan}):
        with pytest.raises(ValidationError, match="verdict on 'c3'"):
            Verdict(criterion_id="c3", **fields)


def test_values_follow_the_rubric_and_absent_verdicts_are_nan():
    rubric = Rubric(criteria=(_criterion(id="a"), _criterion(id="b"), _criterion(id="c")))
    record = JudgedResponse(
        prompt_id="p", prompt="p", response_id="r", response="r", rubric=rubric,
        verdicts=(Verdict(criterion_id="c", value=0.25), Verdict(criterion_id="a", masked="refusal")),
    )  # fmt: skip
    assert record.values()[2] == 0.25 and math.isnan(record.values()[0]) and math.isnan(record.values()[1])
    with pytest.raises(ValidationError, match="unknown criterion 'z'"):
        JudgedResponse(**{**record.model_dump(), "verdicts": ({"criterion_id": "z", "value": 1.0},)})
