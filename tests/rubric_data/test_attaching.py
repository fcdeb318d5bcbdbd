"""From responses without rubrics to verdicts, as a user types it: generate, refine or attach, judge."""

import json

import pytest

from policy.cli import main
from rubric_data.io import load_prompts, read_judged, write_judged, write_prompts
from rubric_data.records import Criterion, JudgedResponse, PromptRecord, Rubric, Verdict
from tests.rubric_data import recorded
from tests.rubric_data.server import completion


@pytest.fixture
def bare(tmp_path):
    """The recorded responses without rubrics, and one to a prompt that no rubric can be had for."""
    rows = [record.model_dump(exclude={"rubric", "verdicts"}) for record in recorded.records()]
    rows.append({"prompt_id": "lost", "prompt": "?", "response_id": "l1", "response": "!"})
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def proposer(body):
    """A first rubric for each prompt, but the one that asks nothing; then the recorded refinements."""
    if "two responses" in (asked := body["messages"][0]["content"]):
        return recorded.reply(body)
    for subject in recorded.SUBJECTS:
        if json.dumps(subject["prompt"]) in asked:
            wanted = [{key: c[key] for key in ("text", "weight", "verifier") if key in c} for c in subject["criteria"]]
            return completion(json.dumps({"criteria": wanted}))
    return completion("I cannot say.")


def test_responses_without_rubrics_reach_their_verdicts(serve, tmp_path, bare, capsys):
    server = serve(proposer)
    asking = ["--model", "m", "--base_url", server.url, "--checks", "true"]
    rubrics, refined, judged = (str(tmp_path / name) for name in ("rubrics", "refined", "judged"))
    assert main(["judge", "--data", str(bare), "--output", judged]) == 2
    assert "field rubric: is missing; add it, or take the rubrics of a file of prompts by" in capsys.readouterr().err
    assert main(["rubric", "generate", "--data", str(bare), "--output", rubrics, *asking]) == 0
    started = ["--data", str(bare), "--rubrics", f"{rubrics}/prompts.jsonl"]
    refining = [*asking, "--judge.judge", "verifier", "--top", "1.0", "--rounds", "1", "--judge.max_masked", "1.0"]
    assert main(["rubric", "refine", *started, "--output", refined, *refining]) == 0
    assert "prompts left out, as they have no rubric to start from: 1\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "refined" / "report.json").read_text())
    assert (report["own_rubric"], report["without_rubric"], report["rounds"][1]["accepted"]) == (0, 1, 3)
    assert load_prompts(f"{refined}/prompts.jsonl")[-1].rubric is None
    assert main(["judge", "--data", f"{refined}/responses.jsonl", "--output", judged]) == 0
    assert all(record.verdicts for record in read_judged(f"{judged}/judged.jsonl"))

    output = tmp_path / "with.parquet"  # without refinement
    assert main(["rubric", "attach", *started, "--output", str(output)]) == 0
    assert "prompts: given 4, own_rubric 0, without_rubric 1" in (said := capsys.readouterr().out)
    assert "left_out: responses without a rubric 1" in said
    first = {record.prompt_id: record.rubric for record in load_prompts(f"{rubrics}/prompts.jsonl")}
    assert [record.rubric for record in read_judged(output)] == [first[one.prompt_id] for one in recorded.records()]


def test_own_rubrics_stay_and_verdicts_on_another_go(tmp_path, capsys):
    old, new = (Rubric(criteria=(Criterion(id="c", text=text),)) for text in ("Old.", "New."))
    verdict = Verdict(criterion_id="c", value=1.0)
    responses = [
        JudgedResponse(prompt_id=p, prompt=p, response_id=p, response=p, rubric=rubric, verdicts=(verdict,))
        for p, rubric in (("own", old), ("other", old), ("same", new))
    ]
    write_judged(tmp_path / "r.jsonl", responses)
    given = [PromptRecord(prompt_id=p, prompt=p, rubric=new) for p in ("other", "same", "nobody's")]
    write_prompts(tmp_path / "p.jsonl", given)
    command = ["rubric", "attach", "--data", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main([*command, "--rubrics", str(tmp_path / "p.jsonl")]) == 0
    found = read_judged(tmp_path / "out.jsonl")
    assert [(one.rubric, one.verdicts) for one in found] == [(old, (verdict,)), (new, ()), (new, (verdict,))]

    write_prompts(tmp_path / "q.jsonl", [PromptRecord(prompt_id="own", prompt="Else.", rubric=new)])
    capsys.readouterr()
    assert main([*command, "--rubrics", str(tmp_path / "q.jsonl"), "--overwrite", "true"]) == 2
    assert "prompt 'own' has another text in" in capsys.readouterr().err
