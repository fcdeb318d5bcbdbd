import numpy as np

from rubric_data.records import Criterion, Rubric, Verifier
from rubric_data.vetoes import WEIGHT, Limits, Veto, extended, refusals

RUBRIC = Rubric(criteria=(Criterion(id="a", text="A."),))
LIMITS = Limits(min_recall=0.5, max_false_alarm=0.1)
# four exploiting and four good, the first two of either on the half that is chosen on
EXPLOITING, GOOD, CHOSEN = (np.array([c == "1" for c in text]) for text in ("11110000", "00001111", "11001100"))


def veto(text, check=None):
    return Veto(text, check and Verifier(name=check), "template", 0)


def test_a_veto_has_the_same_id_in_every_rubric_and_is_added_once():
    one = Veto("No quotes.", Verifier(name="no_quote", args={"words": 5}), "template", 0)
    grown = extended(RUBRIC, [one])
    added = grown.criteria[-1]
    assert (added.id, added.weight, added.veto, added.verifier.args["texts"]) == (one.id, WEIGHT, True, ["A."])
    other = Rubric(criteria=(Criterion(id="b", text="B."),))
    assert extended(other, [one]).criteria[-1].id == one.id != veto("No quotes.").id
    assert extended(grown, [one]) is grown and extended(RUBRIC, []) is RUBRIC


def decided(*columns, vetoes=None):
    values = np.array([[np.nan if c == "-" else float(c) for c in column] for column in columns]).T
    vetoes = vetoes or [veto(str(place)) for place in range(len(columns))]
    found = refusals(vetoes, values, EXPLOITING, GOOD, CHOSEN, LIMITS)
    return [reason and reason.partition(":")[0] for reason in found]


def test_a_veto_must_catch_and_spare_on_both_halves():
    assert decided("00001111") == [None]
    assert decided("00111111") == ["low_recall"]  # nothing on the half judged on
    assert decided("01011111") == [None]  # half of either is enough
    assert decided("00000111") == decided("00001110") == ["false_alarm"]
    assert decided("--------") == ["unanswered"]
    assert refusals([], np.empty((8, 0)), EXPLOITING, GOOD, CHOSEN, LIMITS) == []


def test_further_vetoes_must_catch_more():
    assert decided("00001111", "01011111") == [None, "redundant"]
    assert decided("01011111", "10101111") == [None, None]
    assert decided("01011111", "00001111") == ["redundant", None]  # the one that catches more comes first
    phrases = [veto("x", "no_phrase"), veto("y", "no_flattery")]
    assert decided("00001111", "01011111", vetoes=phrases) == [None, None]  # phrases come last


def test_no_good_response_means_no_veto():
    found = refusals([veto("x")], np.zeros((8, 1)), EXPLOITING, np.zeros(8, bool), CHOSEN, LIMITS)
    assert found[0].startswith("false_alarm: hits nan")
