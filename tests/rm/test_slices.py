"""Parts of an audit, by hand: what belongs to each, and what is said of it."""

import numpy as np
import pytest

from rm.audit import audit
from rm.sides import Table
from rm.slices import labels, members
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict

NOTHING = {"value": None, "low": None, "high": None}


def answered(prompt, text, *values, criteria=None, generator="g"):
    """A response of the words ``text`` to ``prompt``, with its verdicts."""
    criteria = criteria or tuple(Criterion(id=f"c{i}", text=f"criterion {i}") for i in range(len(values)))
    return JudgedResponse(
        prompt_id=prompt,
        prompt=prompt,
        response_id=f"{prompt} {text}",
        response=text,
        rubric=Rubric(criteria=criteria),
        generator=generator,
        verdicts=tuple(Verdict(criterion_id=c.id, value=v) for c, v in zip(criteria, values, strict=True)),
    )


def audited(records, *probs, **options):
    return audit(records, {"model": [np.array(p, float) for p in probs]}, bootstrap=20, **options)


def test_criteria_stand_apart_by_their_text_most_verdicts_first():
    asked = tuple(Criterion(id=id_, text=text) for id_, text in (("x", "rare"), ("y", "often")))
    renamed = (Criterion(id="z", text="often"),)
    records = [
        answered("p", "one", 1, 1, criteria=asked),
        answered("p", "two", 0, 0, criteria=asked),
        answered("q", "three", 1, criteria=renamed),
    ]
    often, rare = audited(records, [0.9, 0.4], [0.2, 0.6], [0.7])["by_criterion"]
    assert (often["criterion"], often["verdicts"], often["prompts"]) == ("often", 3, 2)
    # met .4 .7 against unmet .6: one of two; right side: .7 alone
    assert often["auroc"]["value"] == 0.5 and often["accuracy"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert often["accuracy"]["low"] is not None
    # one prompt: a value, and no interval
    assert rare["accuracy"] == {"value": 1.0, "low": None, "high": None}


def test_levels_as_the_judge_gave_them():
    levels = tuple(Level(label=name) for name in ("poor", "fair", "good"))
    graded = (Criterion(id="c", text="Is clear.", levels=levels),)
    plain = (Criterion(id="c", text="Is short."),)
    records = [answered("p", f"r{i}", v, criteria=graded) for i, v in enumerate((0, 0.5, 1, 1, 0.75))]
    records.append(answered("p", "r5", 1, criteria=plain))
    (scale,) = audited(records, [0.1], [0.6], [0.6], [0.9], [0.2], [0.9])["by_level"]
    # .75 is halfway between fair and good, and at neither; yes/no criteria are no scale
    assert (scale["levels"], scale["verdicts"]) == (3, 4)
    # nearest levels 0 ½ ½ 1 against 0 ½ 1 1: 1 - (.25 / 4) / (.5625 + .375 - 2 * .625 * .5)
    assert scale["kappa"]["value"] == pytest.approx(0.8)
    poor, fair, good = scale["steps"]
    assert [(step["level"], step["value"], step["verdicts"]) for step in scale["steps"]] == [
        (0, 0, 1),
        (1, 0.5, 1),
        (2, 1, 2),
    ]
    assert good["mean_predicted"]["value"] == 0.75 and good["same_level"]["value"] == 0.5
    assert poor["auroc_from"] == NOTHING and fair["auroc_from"]["value"] == 1
    # .6 and .9 against .1 and .6: 1, ½, 1, 1
    assert good["auroc_from"]["value"] == 3.5 / 4


def test_length_in_quarters_of_the_responses():
    records = [answered("p", " ".join(["w"] * words), met) for words, met in ((1, 1), (2, 0), (3, 1), (4, 0))]
    records.append(records[0].model_copy(update={"response_id": "r", "response": "w " * 9, "verdicts": ()}))
    rows = audited(records, [0.9], [0.9], [0.9], [0.3], [0.5])["by_length"]
    assert [(row["low"], row["high"], row["responses"]) for row in rows] == [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 4, 1)]
    assert [row["bias"]["value"] for row in rows] == pytest.approx([-0.1, 0.9, -0.1, 0.3])
    assert [row["accuracy"]["value"] for row in rows] == [1, 0, 1, 1]


def test_labels_of_levels_and_lengths_are_the_parts_of_an_audit():
    of_three = Criterion(id="a", text="Is clear.", levels=tuple(Level(label=name) for name in "abc"))
    plain = Criterion(id="b", text="Is short.")
    texts, values = ("w", "w w", "w w", "w w w w w"), ((0, 1), (0.25, 0), (0.5, 0), (1, 1))
    records = [answered("p", text, *each, criteria=(of_three, plain)) for text, each in zip(texts, values, strict=True)]
    table = Table.of(records)
    level, length = (members(labels(records, table)[kind]) for kind in ("level", "length"))
    # verdicts 0 2 4 6 are on the scale, and .25 is halfway between two of its levels
    assert {name: at_N.tolist() for name, at_N in level.items()} == {"3 levels": [0, 4, 6]}
    assert {name: at_N.tolist() for name, at_N in length.items()} == {
        "1 to 1 words": [0, 1],
        "2 to 2 words": [2, 3, 4, 5],
        "5 to 5 words": [6, 7],
    }
    found = audited(records, *[[0.5, 0.5]] * 4)
    assert [row["verdicts"] for row in found["by_level"]] == [len(at_N) for at_N in level.values()]
    assert [row["verdicts"] for row in found["by_length"]] == [len(at_N) for at_N in length.values()]


def test_novelty_is_told_by_the_train_split():
    known, new = (Criterion(id="k", text="known"),), (Criterion(id="n", text="new"),)
    records = [
        answered("p", "one", 1, criteria=known, generator="old"),
        answered("q", "two", 1, criteria=new, generator="young"),
        answered("q", "three", 0, criteria=new, generator="young"),
    ]
    train = [answered("t", "four", 1, criteria=known, generator="old")]
    probs = [0.9], [0.2], [0.1]
    found = audited(records, *probs, train=train)["by_novelty"]
    assert found["criterion"]["seen"]["accuracy"]["value"] == 1
    assert found["criterion"]["unseen"]["accuracy"]["value"] == 0.5
    assert found["generator"]["unseen"]["responses"] == 2
    # biases -.8 and .1
    assert found["generator"]["unseen"]["bias"]["value"] == pytest.approx(-0.35)
    assert audited(records, *probs)["by_novelty"] == {}
    assert "unseen" not in audited(records[:1], probs[0], train=train)["by_novelty"]["generator"]
