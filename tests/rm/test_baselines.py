from types import SimpleNamespace

import numpy as np
import pytest

from rm import baselines
from rubric_data.errors import UserError
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict


def record(response, *criteria, number=0, split="train"):
    """A judged response; each of ``criteria`` is (text, verdict or None for masked, *tags)."""
    rubric = Rubric(
        criteria=tuple(Criterion(id=f"c{i}", text=text, tags=tags) for i, (text, _, *tags) in enumerate(criteria))
    )
    verdicts = tuple(
        Verdict(criterion_id=f"c{i}", value=value, masked="refusal" if value is None else None)
        for i, (_, value, *_) in enumerate(criteria)
    )
    return JudgedResponse(
        prompt_id=f"p{number}",
        prompt=f"prompt {number}",
        response_id=f"r{number}",
        response=response,
        rubric=rubric,
        verdicts=verdicts,
        split=split,
    )


@pytest.fixture
def train():
    return [
        record("one two", ("names a fruit", 1.0, "content"), ("is brief", 1.0, "length")),
        record("one two three four", ("names a fruit", 0.0, "content"), ("is polite", None, "tone")),
        record("five", ("names a stone", 1.0, "content", "rare")),
    ]


def test_majority_is_the_mean_of_the_verdicts_that_were_given(train):
    (found,) = baselines.majority(train, [record("x", ("new", 0.0), ("another", 0.0))])
    assert found.tolist() == [0.75, 0.75]  # 1, 1, 0, masked, 1


def test_tag_mean_goes_from_text_to_tags_to_all(train):
    asked = record(
        "x",
        ("names a fruit", None),  # seen: (1 + 0) / 2
        ("is red", None, "content", "length"),  # tags: content (1 + 0 + 1) / 3, length 1
        ("is kind", None, "tone"),  # its tag has masked verdicts only: all
        ("is new", None, "unseen", "rare"),  # of its tags one is known
    )
    (found,) = baselines.tag_mean(train, [asked])
    assert found == pytest.approx([0.5, (2 / 3 + 1) / 2, 0.75, 1.0])


def test_length_only_learns_the_direction_and_nothing_of_the_criterion():
    train = [record("word " * n, ("any", float(n > 40))) for n in range(10, 80, 5)]
    short, long = baselines.length_only(
        train, [record("word " * 12, ("a", None), ("b", None)), record("w " * 75, ("a", None))]
    )
    assert short[0] == short[1]
    assert short[0] < 0.3 < 0.7 < long[0]


def test_lexical_overlap_is_the_share_of_content_words():
    said = {"the", "pears", "fresh"}
    assert baselines._overlap("The response names fresh pears.", said) == 0.5  # response, names, fresh, pears
    assert baselines._overlap("is it not?", said) == 0.0


def test_lexical_overlap_learns_from_it():
    train = [record("pears and plums", ("mentions pears", 1.0), ("mentions nuts", 0.0)) for _ in range(6)]
    (found,) = baselines.lexical_overlap(train, [record("nuts", ("mentions nuts", None), ("mentions pears", None))])
    assert found[0] > 0.6 > 0.4 > found[1]


def test_soft_verdicts_weigh_on_both_sides_of_the_fit():
    """Eight verdicts of .75 fit like six of 1 and two of 0."""
    soft = [record("a b c", ("x", 0.75))] * 8 + [record("a", ("x", 0.25))] * 8
    hard = [record("a b c", ("x", v)) for v in [1.0] * 6 + [0.0] * 2] + [
        record("a", ("x", v)) for v in [1.0] * 2 + [0.0] * 6
    ]
    asked = [record("a b", ("x", None))]
    assert baselines.length_only(soft, asked)[0] == pytest.approx(baselines.length_only(hard, asked)[0], abs=1e-6)


def test_all_give_a_probability_for_every_criterion_and_read_no_verdict_of_what_they_predict(train):
    asked = [record("pears", ("names a fruit", 1.0, "content"), ("b", 0.0)), record("", ("c", None), number=1)]
    turned = [record("pears", ("names a fruit", 0.0, "content"), ("b", None)), record("", ("c", 1.0), number=1)]
    for name, found in baselines.fitted_baselines(train, asked).items():
        assert [len(probs) for probs in found] == [2, 1], name
        assert all(((probs >= 0) & (probs <= 1)).all() for probs in found), name
        for probs, again in zip(found, baselines.FITTED[name](train, turned), strict=True):
            assert probs.tolist() == again.tolist(), name


def test_a_train_split_of_one_class_gives_that_class(train):
    agreeable = [record("a b", ("x", 1.0)), record("a", ("y", 1.0))]
    for name, found in baselines.fitted_baselines(agreeable, [record("c", ("z", 0.0))]).items():
        assert found[0].tolist() == [1.0], name


def test_a_train_split_without_verdicts_is_refused():
    with pytest.raises(UserError, match="train split carries no verdicts"):
        baselines.fitted_baselines([record("a", ("x", None))], [record("b", ("x", 1.0))])


def test_zero_shot_is_what_the_scorer_says(train):
    probs = [np.array([0.1, 0.2]), np.array([0.3, 0.4]), np.array([0.5])]
    scorer = SimpleNamespace(score_records=lambda records, progress: [SimpleNamespace(probs=p) for p in probs])
    assert baselines.zero_shot(scorer, train) == probs
