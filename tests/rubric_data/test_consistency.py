import json
import math

import pytest

from policy import cli
from rubric_data.arrays import JudgedArrays
from rubric_data.consistency import contradicted_prompts, find, remove, without
from rubric_data.io import read_judged, write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric

GOOD = Criterion(id="good", text="Is good.", weight=2)
LONG = Criterion(id="long", text="Is long.")
RUDE = Criterion(id="rude", text="Is rude.", weight=-1)
RULE = {"significance": 0.05, "min_agreement": 0.3, "min_pairs": 10}


def pair(number, better, worse, *, preferences=(1.0, 0.0), criteria=(GOOD, LONG, RUDE)):
    """A prompt with two responses, their verdicts (None masks) and preferences."""
    return [
        JudgedResponse(
            prompt_id=f"p{number}",
            prompt=f"prompt {number}",
            response_id=f"p{number}-{name}",
            response=name,
            rubric=Rubric(criteria=criteria),
            preference=preference,
            verdicts=[
                {"criterion_id": c.id, "masked": "timeout: 60 s"} if v is None else {"criterion_id": c.id, "value": v}
                for c, v in zip(criteria, values, strict=True)
            ],
        )
        for name, values, preference in zip("ab", (better, worse), preferences, strict=True)
    ]


@pytest.fixture
def records():
    """GOOD is right and LONG wrong on six prompts, RUDE (a pitfall) right on one; three more decide nothing."""
    decided = [pair(n, (1, 0, 0), (0, 1, 1 if n == 0 else 0)) for n in range(6)]
    people_tie = pair(6, (1, 0, 1), (0, 1, 0), preferences=(3.0, 3.0))
    masked = pair(7, (None, 1, 0), (1, 1, 0))
    nobody_asked = pair(8, (1, 0, 1), (0, 1, 0), preferences=(None, None))
    return [record for rows in (*decided, people_tie, masked, nobody_asked) for record in rows]


def test_agreement_by_hand(records):
    found = {one.question.text: one for one in find(JudgedArrays.of(records), **RULE)}
    assert list(found) == ["Is long.", "Is good.", "Is rude."]  # p 1/64, then 1 twice, by name
    long, good, rude = found.values()
    assert (long.counts.agree, long.counts.disagree, long.counts.ties, long.counts.gold_ties) == (0, 6, 1, 1)
    assert long.p_value == pytest.approx(1 / 64) and long.contradicts
    assert (good.counts.agree, good.counts.disagree, good.responses) == (6, 0, 15)
    assert not good.contradicts and good.p_value == 1
    assert (rude.counts.agree, rude.counts.disagree, rude.counts.ties) == (1, 0, 6)  # met by the worse one
    assert not rude.contradicts


def test_a_few_pairs_prove_nothing_but_a_share_of_many_does():
    few = [record for n in range(4) for record in pair(n, (0, 1, 0), (1, 1, 0))]
    assert not any(one.contradicts for one in find(JudgedArrays.of(few), **RULE))  # 0 of 4: p 1/16
    rule = RULE | {"significance": 0.0, "min_pairs": 4}
    assert [one.question.text for one in find(JudgedArrays.of(few), **rule) if one.contradicts] == ["Is good."]
    nothing = find(JudgedArrays.of(few[:1]), **RULE)
    assert all(one.p_value == 1 and math.isnan(one.counts.share) and not one.contradicts for one in nothing)


def test_the_last_positive_criterion_stays():
    rubric = Rubric(criteria=(GOOD, LONG, RUDE))
    good, long, rude = (one.question for one in find(JudgedArrays.of(pair(0, (1, 0, 0), (0, 1, 0))), **RULE))
    assert {one.text for one in (good, long, rude)} == {"Is good.", "Is long.", "Is rude."}
    asked = {one.text: one for one in (good, long, rude)}
    assert without(rubric, {}) is rubric
    assert [c.id for c in without(rubric, {asked["Is long."]: 0.1}).criteria] == ["good", "rude"]
    both = {asked["Is long."]: 0.2, asked["Is good."]: 0.1}
    assert [c.id for c in without(rubric, both).criteria] == ["long", "rude"]  # of the two it agrees better
    assert [c.id for c in without(rubric, both | {asked["Is rude."]: 0.0}).criteria] == ["long"]


def test_removal_takes_verdicts_along_and_prompts_are_told_worst_first(records):
    arrays = JudgedArrays.of(records)
    question = find(arrays, **RULE)[0].question
    left = remove(records, {question: 0.0})
    assert [v.criterion_id for v in left[0].verdicts] == ["good", "rude"] and left[0].values() == [1, 0]
    # weights 2, 1, -1: the better earns 2/3, the worse 1/3 (0 where rude), so rewards are right; turned round, wrong
    assert contradicted_prompts(arrays) == []
    turned = [r.model_copy(update={"preference": r.preference and -r.preference}) for r in records]
    found = contradicted_prompts(JudgedArrays.of(turned))
    assert [(row["prompt_id"], row["agree"], row["disagree"]) for row in found[:2]] == [("p0", 0, 1), ("p1", 0, 1)]
    assert len(found) == 6  # where a verdict is masked, both earn all there is to earn, a tie


def test_the_command_reports_and_mends(records, tmp_path, capsys):
    write_judged(tmp_path / "in.jsonl", records)
    run = tmp_path / "run"
    arguments = ["rubric", "consistency", "--data", str(tmp_path / "in.jsonl"), "--output", str(run)]
    assert cli.main([*arguments, "--remove", "true"]) == 0
    out = capsys.readouterr().out
    assert "1 of 3 criteria contradict people's preferences" in out and "Is long." in out
    report = json.loads((run / "consistency.json").read_text())
    assert report["criteria"] == {
        "different": 3, "without_pairs": 0, "contradicting": 1, "kept_as_last_positive": 0,
    }  # fmt: skip
    assert (report["responses"], report["with_preference"], report["prompts"]) == (18, 16, 9)
    assert (report["compared_prompts"], report["without_preferences"]) == (7, 2)  # p6 ties, p8 has none
    assert "on 0 of 7 prompts; 2 more have no two judged responses of different preference" in " ".join(out.split())
    assert report["rubrics"]["before"]["gold_ties"] == 1
    left = read_judged(run / "judged.jsonl")
    assert all([c.id for c in record.rubric.criteria] == ["good", "rude"] for record in left)

    assert cli.main([*arguments[:-1], str(tmp_path / "looked")]) == 0
    assert not (tmp_path / "looked" / "judged.jsonl").exists()


def test_bad_input_is_one_line_and_leaves_no_folder(judged, tmp_path, capsys):
    write_judged(tmp_path / "in.jsonl", judged)
    arguments = ["rubric", "consistency", "--data", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "run")]
    for option, message in (
        ([], "no two judged responses to one prompt have different preferences; set the records' 'preference'"),
        (["--significance", "0.6"], "significance: must lie in [0, 0.5], got 0.6; correct it"),
        (["--min_pairs", "0"], "min_pairs: must be at least 1, got 0; raise it"),
    ):
        assert cli.main([*arguments, *option]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
