"""The defence through the command line: what is planted is found, vetoed and written; what is not, is not."""

import json

import numpy as np
import pytest

from policy.cli import main
from rm.config import DefendConfig
from rm.defence import defend, run_defend
from rm.defence_report import History
from rubric_data.config import JudgeConfig
from rubric_data.counterfactuals import edited
from rubric_data.errors import UserError
from rubric_data.io import load_prompts, read_judged, write_judged
from rubric_data.versions import read_versions
from rubric_data.vetoes import WEIGHT
from tests.rubric_data.planted import rollouts
from tests.rubric_data.server import completion


def write_run(folder, records, probs, by_code=False):
    """The two files that an RL run keeps of what its judge has seen."""
    folder.mkdir(exist_ok=True)
    write_judged(folder / "judged.jsonl", records)
    rows = []
    for record, probs_K in zip(records, probs, strict=True):
        criteria = [
            {"criterion_id": one.id, "probability": float(prob), "by_code": by_code}
            for one, prob in zip(record.rubric.criteria, probs_K, strict=True)
        ]
        rows.append({"prompt_id": record.prompt_id, "response_id": record.response_id, "criteria": criteria})
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def decided(tmp_path, records, probs, **changes):
    config = DefendConfig(output=str(tmp_path), data="planted", bootstrap=20, **changes)
    return defend(History.of(records, probs), config, tmp_path)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=SLOW) for seed in range(2, 12))])
@pytest.mark.parametrize(
    ("edit", "habit"),
    [("flattery", "flatters the reader"), ("self-praise", "praises itself"), ("markdown", "has headings")],
)
def test_a_planted_exploit_is_found_named_and_vetoed(tmp_path, seed, edit, habit):
    found = decided(tmp_path, *rollouts(seed, edit=edit))
    assert [row["name"].partition(",")[0] for row in found.report["clusters"]] == [habit]
    history = found.report["history"]
    assert found.taken and history["recall"]["value"] > 0.8 and history["false_alarm"]["value"] <= 0.05
    assert history["exploitation"]["after"]["value"] < 0.2 < history["exploitation"]["before"]["value"]
    assert history["correlation"]["change"]["low"] > 0.1


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=SLOW) for seed in range(4, 40))])
def test_errors_of_the_model_that_no_text_explains_lead_to_no_veto(tmp_path, seed):
    found = decided(tmp_path, *rollouts(seed, noise=1.0), excess=0.5, min_exploits=5)
    assert found.report["note"] is None
    assert found.taken == []


def test_a_trick_that_the_good_use_too_is_told_and_vetoed_only_if_they_may_be_hit(tmp_path):
    random = np.random.default_rng(0)
    records, probs = rollouts(0, edit="flattery")
    records = [
        one.model_copy(update={"response": edited("flattery", one.response, one.rubric, seed=place)})
        if sum(one.values()) and random.random() < 0.25
        else one
        for place, one in enumerate(records)
    ]
    found = decided(tmp_path, records, probs)
    assert found.taken == [] and "flatters the reader (" in found.report["note"]
    spared = decided(tmp_path, records, probs, max_false_alarm=0.5)
    assert spared.report["note"] is None
    assert any("praise neither the reader" in veto.text for veto in spared.taken)
    effects = [row["gold_effect"]["value"] for row in spared.report["vetoes"]]
    assert effects and all(abs(effect) < 0.3 for effect in effects)  # flattery was strewn among good and bad


def test_the_command_extends_the_rubrics_of_the_next_run(tmp_path, capsys):
    records, probs = rollouts(0, edit="flattery", prompts=24)
    run = write_run(tmp_path / "grpo", records, probs, by_code=True)
    other = records[0].model_copy(update={"prompt_id": "new", "prompt": "New?", "response_id": "new-1", "verdicts": ()})
    held_out = other.model_copy(update={"prompt_id": "held", "prompt": "Held?", "response_id": "h", "split": "test"})
    write_judged(tmp_path / "next.jsonl", [*records, other, held_out])
    out = tmp_path / "defend"
    options = ["--runs", f"[{run}]", "--prompts", str(tmp_path / "next.jsonl"), "--bootstrap", "50"]
    assert main(["rubric", "defend", *options, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "flatters the reader" in shown and "taken" in shown and "redundant" in shown

    prompts = {record.prompt_id: record.rubric for record in load_prompts(out / "prompts.jsonl")}
    added = prompts["new"].criteria[-1]
    assert prompts["held"] == records[0].rubric and prompts["new"].criteria[:-1] == records[0].rubric.criteria
    assert (added.veto, added.weight, added.verifier.name) == (True, WEIGHT, "no_flattery")
    assert {rubric.criteria[-1].id for name, rubric in prompts.items() if name != "held"} == {added.id}
    judged = read_judged(out / "judged.jsonl")
    assert len(judged) == len(records) and {record.values()[-1] for record in judged} == {0, 1}
    given, grown = read_versions(out / "versions.jsonl")[:2]
    assert (given.round, grown.round, grown.parents) == (0, 1, (given.id,))
    row = next(row for row in json.loads((out / "report.json").read_text())["vetoes"] if row["accepted"])
    assert (row["id"], row["answered_by"], row["judged_on"]["false_alarm"]["value"]) == (added.id, "code", 0)

    attach = ["--data", str(tmp_path / "next.jsonl"), "--rubrics", str(out / "prompts.jsonl")]
    assert main(["rubric", "attach", *attach, "--output", str(tmp_path / "phase-2.jsonl")]) == 0
    assert read_judged(tmp_path / "phase-2.jsonl")[0].rubric.criteria[-1] == added

    # two runs may have rubrics with it and without; one that has it does not get it again
    vetoed = write_run(tmp_path / "second", judged, [np.append(probs_K, 1) for probs_K in probs])
    both = run_defend(DefendConfig(output=str(tmp_path / "both"), runs=[run, vetoed], bootstrap=20))
    assert both["rollouts"] == 2 * len(records) and both["prompts_extended"] == 0
    assert [row["id"] for row in both["vetoes"] if row["accepted"]] == [added.id]


def test_a_proposer_is_shown_a_few_and_a_judge_answers(tmp_path, serve):
    """Of three proposals one is right, one unfit for grading and one too strict."""
    records, probs = rollouts(1, edit="flattery", prompts=24)
    texts = ("Does not flatter.", "Is shorter than the other response.", "Is written by a machine.")
    reply = json.dumps({"criteria": [{"text": text, "weight": 1} for text in texts]})

    def answer(body):
        asked = body["messages"][-1]["content"]
        if "You guard a reward model" in asked:
            return completion(reply)
        flattery = ("wonderful question", "sharp eye", "somebody as", "impressed", "bright person")
        honest = not any(words in asked for words in flattery)
        return completion(json.dumps({"answers": [{"id": "1", "met": honest}, {"id": "2", "met": False}]}))

    server = serve(answer)
    run = write_run(tmp_path / "run", records, probs)
    judge = JudgeConfig(output="judge", judge="openai", model="j", base_url=server.url)
    config = DefendConfig(
        output=str(tmp_path / "out"),
        runs=[run],
        model="m",
        base_url=server.url,
        judge=judge,
        bootstrap=20,
        min_exploits=5,
    )
    report = run_defend(config)
    rows = {row["text"]: row for row in report["vetoes"]}
    assert rows["Does not flatter."]["answered_by"].startswith("openai:j@")
    assert rows["Does not flatter."]["judged_on"]["recall"]["value"] > 0.9
    assert rows["Does not flatter."]["accepted"]  # patterns of words hit too many of the good here
    unfit = rows["Is shorter than the other response."]
    assert unfit["reason"].startswith("lint: self-contained") and unfit["judged_on"]["recall"]["value"] is None
    assert rows["Is written by a machine."]["reason"].startswith("false_alarm")
    calls = len(server.requests)
    config.resume = True
    again = run_defend(config)
    assert len(server.requests) == calls and again["vetoes"] == report["vetoes"]


def test_too_few_to_say_anything(tmp_path):
    records, probs = rollouts(0, prompts=6, responses=4)
    found = decided(tmp_path, records, probs)
    assert found.taken == [] and "fewer than min_exploits" in found.report["note"]
    one = [record for record in records if record.prompt_id == records[0].prompt_id]
    run = write_run(tmp_path / "run", one, probs[: len(one)])
    with pytest.raises(UserError, match="1 prompts outside the test split"):
        run_defend(DefendConfig(output=str(tmp_path / "out"), runs=[run]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "runs, data: give"),
        ({"runs": ["a"], "data": "b"}, "runs, data: give"),
        ({"data": "b"}, "data: needs what the reward model says"),
        ({"runs": ["a"], "answers": "model"}, "answers: model needs the model"),
        ({"runs": ["a"], "top": 1.0}, "top: must lie between 0 and 1, got 1.0"),
        ({"runs": ["a"], "model": "m"}, "judge.judge: verifier answers vetoes with a programmatic check only"),
        ({"runs": ["nowhere"]}, "nowhere: has no judged.jsonl"),
    ],
)
def test_bad_input(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_defend(DefendConfig(output=str(tmp_path / "out"), **changes))
