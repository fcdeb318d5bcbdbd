import numpy as np
import pytest

from rubric_data.records import Criterion, Rubric, Verifier
from rubric_data.traits import cluster, compare, completed, forbid, frequent_runs, says_something, traits_of
from rubric_data.verifiers import verify
from tests.rubric_data.planted import judged

RUBRIC = Rubric(
    criteria=(Criterion(id="a", text="Names the cause of every tide."), Criterion(id="v", text="V.", veto=True))
)


def records(*texts):
    return [judged(f"Prompt {i}?", f"p{i}", f"r{i}", text, RUBRIC, [1, 1]) for i, text in enumerate(texts)]


def present(found):
    columns = found.present_BF.toarray().astype(bool).T.tolist()
    return {trait.name: column for trait, column in zip(found.traits, columns, strict=True)}


def test_traits_of_texts_and_their_checks_agree():
    texts = ["What a great question! Rain falls.", "Rain falls.", "## Rain\nIt names the cause of every tide.", "Rain,"]
    texts += ["Rain falls down.", ""]
    found = traits_of(records(*texts), exploiting=2)
    columns = present(found)
    assert columns["flatters the reader"] == [True] + [False] * 5
    assert columns["quotes the rubric"] == [False, False, True, False, False, False]
    assert columns["ends unfinished"] == [False, False, False, True, False, False]
    assert columns["has headings"] == [False, False, True, False, False, False]
    assert columns["says “rain falls”"] == [True, True, False, False, True, False]  # the longest of its texts
    assert "says “falls”" not in columns and "says “great question”" not in columns  # in fewer than three
    for trait, record in ((t, r) for t in found.traits for r in records(*texts) if r.response):
        fails = verify(completed(trait.verifier, RUBRIC), record.response, record.prompt) == 0
        assert fails == columns[trait.name][int(record.response_id[1:])], trait.name


def test_runs_and_bans():
    texts = [("a", "b", "c", "d"), ("a", "b", "c"), ("b", "a"), ()]
    assert frequent_runs(texts, 2) == {
        ("a",): (0, 1, 2),
        ("b",): (0, 1, 2),
        ("c",): (0, 1),
        ("a", "b"): (0, 1),
        ("b", "c"): (0, 1),
        ("a", "b", "c"): (0, 1),
    }
    assert forbid(["a b"]) == ("Does not say “a b”.", Verifier(name="no_phrase", args={"phrases": ["a b"]}))
    text, check = forbid(["a", "b"], opening=True)
    assert (text, check.args) == (
        "Says none of “a”, “b” among its first 4 words.",
        {"phrases": ["a", "b"], "within": 4},
    )
    assert [says_something(phrase) for phrase in ("tide", "in the", "the tide")] == [False, False, True]


def test_a_check_against_quoting_is_given_the_criteria_but_no_vetoes():
    check = Verifier(name="no_quote", args={"words": 5})
    assert completed(check, RUBRIC).args == {"texts": ["Names the cause of every tide."], "words": 5}
    assert completed(Verifier(name="has_digit"), RUBRIC) == Verifier(name="has_digit")


def test_a_trait_must_be_rarer_among_all_others_and_among_the_good():
    """Six of six exploiting say both; all others say the one only if they are good, and nobody else says the other."""
    trick, both = "Golden apples fall. Silver pears fall.", "Silver pears fall."
    texts = [trick] * 6 + [both] * 6 + ["Stones."] * 12
    exploiting, good = np.arange(24) < 6, (np.arange(24) >= 6) & (np.arange(24) < 12)
    rows = {one.trait.name: one for one in compare(traits_of(records(*texts), 6), exploiting, good, np.arange(24))}
    assert rows["says “golden apples fall”"].q_value < 0.05
    assert rows["says “golden apples fall”"].p_value == pytest.approx(1 / 924)  # 12 over 6, against the good
    assert rows["says “silver pears fall”"].p_value == 1
    assert rows["says “silver pears fall”"].others == pytest.approx(6 / 18)
    assert rows["says “silver pears fall”"].good == 1


def test_clusters_are_habits_and_not_their_wordings():
    rows = [[1, 1, 0, 0, 0]] * 4 + [[1, 0, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 1]] * 5 + [[0, 0, 0, 0, 0]]
    assert cluster(np.array(rows)).tolist() == [0] * 7 + [1] * 5 + [-1]
    assert cluster(np.ones((3, 2))).tolist() == [0, 0, 0]
    assert cluster(np.zeros((2, 0))).tolist() == [-1, -1]
    assert cluster(np.zeros((0, 0))).tolist() == []
