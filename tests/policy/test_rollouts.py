"""The judged rollouts of a run on disk: what is written, read back by everybody else, and cut where a run goes on."""

import json

from policy.prompts import RubricPrompt, rubric_prompts
from policy.rollouts import JUDGED, SCORES, JudgedRollouts, as_record, update_of
from rm.scores import read_scores
from rubric_data.io import read_judged
from rubric_data.judges import masked_verdicts
from rubric_data.records import Criterion, Rubric, Verdict
from tests.policy.fruit import rollout

RUBRIC = Rubric(criteria=(Criterion(id="tone", text="is friendly"), Criterion(id="short", text="is short")))
PROMPT = RubricPrompt("p", "Say “it”.", RUBRIC, "train", "fruit", "CC0")
YES = tuple(Verdict(criterion_id=one.id, value=1.0, judge="exact") for one in RUBRIC.criteria)
FAILED = masked_verdicts(RUBRIC.criteria, "timeout", "no reply", judge="exact")


def test_both_files_are_read_back_as_judged_responses_and_their_scores(tmp_path):
    kept = JudgedRollouts(tmp_path)
    kept.add(1, [rollout(PROMPT, "A.", 0.25), rollout(PROMPT, "B\nb", 0.75)], [YES, FAILED])
    kept.add(3, [rollout(PROMPT, "A.", 0.5)], [YES])
    records = read_judged(tmp_path / JUDGED)
    assert [(one.response_id, one.response) for one in records] == [
        ("update-1-1", "A."),
        ("update-1-2", "B\nb"),
        ("update-3-1", "A."),
    ]
    assert [one.values()[0] for one in records][::2] == [1.0, 1.0]
    assert [verdict.masked for verdict in records[1].verdicts] == ["timeout: no reply"] * 2
    assert rubric_prompts(records) == [PROMPT]  # split, source and licence included
    assert [probs.tolist() for probs in read_scores(tmp_path / SCORES, records)] == [[0.25] * 2, [0.75] * 2, [0.5] * 2]


def test_a_run_that_goes_on_loses_what_was_judged_after_its_checkpoint(tmp_path):
    kept = JudgedRollouts(tmp_path)
    for step in (1, 2, 10):
        kept.add(step, [rollout(PROMPT, "A.", 0.5)], [YES])
    with (tmp_path / JUDGED).open("a") as file:
        file.write('{"prompt_id": "p", "resp')  # killed while writing
    JudgedRollouts(tmp_path, done=2)
    assert [update_of(one.response_id) for one in read_judged(tmp_path / JUDGED)] == [1, 2]
    scores = [json.loads(line) for line in (tmp_path / SCORES).read_text().splitlines()]
    assert [row["response_id"] for row in scores] == ["update-1-1", "update-2-1"]
    JudgedRollouts(tmp_path)
    assert (tmp_path / JUDGED).read_text() == (tmp_path / SCORES).read_text() == ""


def test_a_record_has_its_prompts_origin():
    record = as_record(rollout(PROMPT, "A.", 0.5), YES, "update-1-1")
    assert (record.split, record.source, record.licence, record.generator) == ("train", "fruit", "CC0", "policy")
