"""`rubric generate` end to end, against a scripted server."""

import json

import pytest

from policy.cli import main
from rubric_data.config import GenerateConfig
from rubric_data.errors import UserError
from rubric_data.generate import run_generate
from rubric_data.io import load_prompts, write_prompts
from rubric_data.records import Criterion, PromptRecord, Rubric
from rubric_data.versions import read_versions
from tests.rubric_data.server import completion, failure

OLD = Rubric(criteria=(Criterion(id="old", text="Is old."),))


def said(topic):
    texts = (f"Names {topic}.", "Asks a question.", "Has at most 40 words.")
    return completion(json.dumps({"criteria": [{"text": text, "weight": n} for n, text in enumerate(texts, start=1)]}))


def reply(body):
    """A rubric for even prompts; for odd ones, nothing that could be read."""
    number = int(body["messages"][0]["content"].partition("topic ")[2].partition(".")[0])
    return said(f"topic {number}") if number % 2 == 0 else completion("I like topics.")


@pytest.fixture
def prompts(tmp_path):
    records = [
        PromptRecord(prompt_id=f"p{n}", prompt=f"Explain topic {n}.", rubric=OLD if n == 1 else None, split="train")
        for n in range(4)
    ]
    write_prompts(tmp_path / "prompts.jsonl", records)
    return str(tmp_path / "prompts.jsonl")


def test_every_prompt_gets_a_rubric_or_its_reason(serve, prompts, tmp_path, capsys):
    server, run = serve(reply), tmp_path / "run"
    command = ["rubric", "generate", "--data", prompts, "--output", str(run), "--model", "m", "--base_url", server.url]
    assert main(command) == 0
    assert "without_rubric: 1" in capsys.readouterr().out
    records = load_prompts(run / "prompts.jsonl")
    assert [record.rubric and record.rubric.criteria[0].text for record in records] == [
        "Names topic 0.",
        "Is old.",
        "Names topic 2.",
        None,
    ]
    assert [c.id for c in records[0].rubric.criteria] == ["c1", "c2", "c3"] and records[0].split == "train"
    report = json.loads((run / "report.json").read_text())
    assert (report["prompts"], report["proposed"], report["failed"]) == (4, 2, {"parse_failure": 2})
    assert (report["kept_rubric"], report["without_rubric"]) == (1, 1)
    assert report["spent"]["total"]["calls"] == 6  # two of them for repair
    versions = read_versions(run / "versions.jsonl")
    assert [(v.prompt_id, v.accepted, v.parents) for v in versions] == [
        ("p0", True, ()),
        ("p1", False, ()),
        ("p2", True, ()),
        ("p3", False, ()),
    ]
    assert versions[0].id == records[0].rubric.id and versions[1].reason.startswith("parse_failure")
    raw = [json.loads(line) for line in (run / "proposals.jsonl").read_text().splitlines()]
    assert len(raw) == 6 and sum(line["text"] == "I like topics." for line in raw) == 4

    assert main([*command, "--resume", "true"]) == 0
    assert len(server.requests) == 6  # nothing was paid twice
    assert main([*command, "--resume", "true", "--retry", "true"]) == 0
    assert len(server.requests) == 10  # only the unreadable ones


def test_a_small_run_is_measured_at_its_end_and_what_was_paid_stays(serve, prompts, tmp_path, capsys):
    server, run = serve(completion("I like topics.")), tmp_path / "run"
    command = ["rubric", "generate", "--data", prompts, "--output", str(run), "--model", "m", "--base_url", server.url]
    for options in ((), ("--resume", "true")):  # the second asks nothing, and finds the same
        assert main([*command, *options]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "4 of 4 proposals failed, more than max_failed 0.5 allows" in told and "resume with --retry true" in told
        assert len(server.requests) == 8 and not (run / "prompts.jsonl").exists()
    assert main([*command, "--resume", "true", "--max_failed", "1"]) == 0
    spent = json.loads((run / "report.json").read_text())["spent"]
    assert (len(server.requests), spent["this_run"]["calls"], spent["total"]["calls"]) == (8, 0, 8)


@pytest.mark.parametrize("reply", [failure(401), failure(503, {"Retry-After": "0"})])
def test_a_server_that_never_replies_leaves_no_folder(serve, prompts, tmp_path, reply):
    options = {"data": prompts, "output": str(tmp_path / "run"), "model": "m", "attempts": 1}
    with pytest.raises(UserError, match=r"scripted 401|4 of 4 proposals failed"):
        run_generate(GenerateConfig(**options, base_url=serve(reply).url))
    assert not (tmp_path / "run").exists()


def test_a_spent_budget_stops_and_resuming_goes_on(serve, prompts, tmp_path):
    server = serve(said("x"))
    options = {"data": prompts, "output": str(tmp_path / "run"), "model": "m", "base_url": server.url}
    with pytest.raises(UserError, match="budget: max_calls 3 is spent; all replies are kept"):
        run_generate(GenerateConfig(**options, max_calls=3))
    assert len(server.requests) == 3
    report = run_generate(GenerateConfig(**options, resume=True))
    assert (report["proposed"], report["reused"], len(server.requests)) == (4, 3, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": 0}, "limit: must be at least 1"),
        ({"max_failed": 2.0}, "max_failed: must be a share"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"base_url": "ftp://x"}, "base_url must start with http"),
    ],
)
def test_bad_settings_leave_no_run_behind(prompts, tmp_path, changes, said):
    options = {"data": prompts, "output": str(tmp_path / "run"), "model": "m", "base_url": "http://127.0.0.1:1/v1"}
    with pytest.raises(UserError, match=said):
        run_generate(GenerateConfig(**(options | changes)))
    assert not (tmp_path / "run").exists()


def test_a_limit_takes_the_first_prompts(serve, prompts, tmp_path):
    config = GenerateConfig(
        data=prompts, output=str(tmp_path / "run"), model="m", base_url=serve(said("x")).url, limit=2
    )
    assert run_generate(config)["prompts"] == 2
    assert [record.prompt_id for record in load_prompts(tmp_path / "run" / "prompts.jsonl")] == ["p0", "p1"]
