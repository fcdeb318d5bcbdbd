from collections import defaultdict

import pytest

from rubric_data.builtin.drills import drills
from rubric_data.io import load_data
from rubric_data.verifiers import verify


@pytest.fixture(scope="module")
def texts():
    records = [record for record in load_data("builtin") if record.split == "validation"]
    return [(record.prompt, record.response) for record in records]


@pytest.fixture(scope="module")
def asked(texts):
    return drills(texts, 6, "seed")


def test_every_response_gets_its_drills_with_exact_verdicts(texts, asked):
    for (prompt, response), row in zip(texts, asked, strict=True):
        assert len(row) == 6
        assert [criterion.id for criterion, _ in row] == [verdict.criterion_id for _, verdict in row]
        for criterion, verdict in row:
            assert verdict.value == verify(criterion.verifier, response, prompt)
            assert criterion.weight == 1.0 and not criterion.veto


def test_a_kind_of_check_is_met_as_often_as_missed_so_that_only_reading_answers_it(asked):
    values = defaultdict(list)
    for row in asked:
        for criterion, verdict in row:
            values[criterion.tags, criterion.verifier.name].append(verdict.value)
    for (_, name), found in values.items():
        met = sum(found)
        assert abs(met - (len(found) - met)) <= 9, name  # three apart for each of up to three checks of one verifier


def test_drills_repeat_with_their_seed_and_change_with_it(texts, asked):
    assert drills(texts, 6, "seed") == asked
    assert drills(texts, 6, "other") != asked
    assert drills(texts, 0, "seed") == [[] for _ in texts]


@pytest.mark.parametrize("response", ["", "!!!", "12", "ab"])
def test_a_response_without_words_gets_fewer_or_none_but_never_fails(response):
    (row,) = drills([("Say something.", response)], 4, "seed")
    assert all(verdict.value in (0.0, 1.0) for _, verdict in row)
