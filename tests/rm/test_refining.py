"""Refinement through the command line, against recorded replies: exact numbers, and nothing lost or paid twice."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from policy.cli import main
from rm.config import RefineConfig
from rm.refining import run_refine
from rubric_data.config import JudgeConfig
from rubric_data.errors import UserError
from rubric_data.io import load_prompts, read_judged, write_judged, write_prompts
from rubric_data.records import Criterion, PromptRecord, Rubric, Verifier
from rubric_data.versions import read_versions
from tests.rubric_data import recorded
from tests.rubric_data.server import completion, failure


@pytest.fixture
def settings(tmp_path):
    write_judged(tmp_path / "pool.jsonl", recorded.records())

    def make(server, **changes):
        config = RefineConfig(
            output=str(tmp_path / "run"),
            data=str(tmp_path / "pool.jsonl"),
            model="m",
            base_url=server.url,
            timeout=5.0,
            attempts=1,
            top=1.0,
            checks=True,
            judge=JudgeConfig(output="judge", max_masked=1.0),
        )
        return replace(config, **changes)

    return make


TIES = [1, 0.25, 0, 0]
GAPS = [0, (2 / 7 + 1 / 6 + 3 / 8 + 0) / 4, (0.4 + 0.2 + 0.4 + 1 / 6) / 4, (0.4 + 2 / 7 + 0.4 + 1 / 6) / 4]


def check_rows(rows):
    assert [row["ties"] for row in rows] == TIES
    assert [row["discrimination"] for row in rows] == pytest.approx(GAPS)
    assert sorted(GAPS) == GAPS
    assert [row["accepted"] for row in rows] == [0, 3, 4, 1]
    assert [row["refused"] for row in rows] == [{}, {"parse_failure": 1}, {}, {"smaller_gap": 2, "tie": 1}]


def test_three_rounds_raise_discrimination_and_lower_ties(serve, tmp_path, capsys):
    server = serve(recorded.reply)
    write_judged(tmp_path / "pool.jsonl", recorded.records())
    run = tmp_path / "run"
    options = ["--data", str(tmp_path / "pool.jsonl"), "--output", str(run), "--model", "m", "--base_url", server.url]
    options += ["--top", "1.0", "--checks", "true", "--judge.judge", "verifier"]
    assert main(["rubric", "refine", *options]) == 0
    assert "smaller_gap" in capsys.readouterr().out  # the table
    report = json.loads((run / "report.json").read_text())
    check_rows(report["rounds"])
    assert report["rounds"][0]["best"] == {"atlas": 2, "birch": 2, "cedar": 2, "dune": 2}
    assert report["spent"]["proposer"]["total"]["calls"] == len(server.requests) == 4 * 3 + 1  # one repair
    assert (run / "rounds.png").read_bytes().startswith(b"\x89PNG")

    prompts = {record.prompt_id: record.rubric for record in load_prompts(run / "prompts.jsonl")}
    tea = [(c.id, c.text, c.weight) for c in prompts["tea"].criteria]
    assert tea == [
        ("boil", "Has the water boil.", 1),
        ("r1c1", "Says for how many minutes the tea stands.", 3),
        ("r2c1", "Gives the 3 steps as a numbered list.", 1),
        ("r3c1", "Writes a number in digits.", 2),
    ]
    responses = read_judged(run / "responses.jsonl")
    assert len(responses) == 24 and all(record.rubric.id == prompts[record.prompt_id].id for record in responses)


def test_every_version_knows_its_parent_and_its_fate(serve, settings):
    run_refine(config := settings(serve(recorded.reply)))
    versions = read_versions(f"{config.output}/versions.jsonl")
    bike = [version for version in versions if version.prompt_id == "bike"]
    given, unread, taken, refused = bike
    assert (given.round, given.parents, given.accepted, given.proposer) == (0, (), True, "given")
    assert (unread.id, unread.parents, set(unread.pair)) == (None, (given.id,), {"b1", "b2"})
    assert unread.reason == (
        "parse_failure: criterion 1: must be an object with text, verifier, weight, "
        'got {"text": "Has the frame locked."}'
    )
    assert taken.parents == (given.id,) and taken.accepted and taken.id == taken.rubric.id
    assert refused.parents == (taken.id,) and not refused.accepted and refused.rubric is not None
    assert refused.reason == "smaller_gap: the pair's rewards differed by 0.667 before and by 0.5 now"


def stored(config):
    return json.loads(Path(config.output, "report.json").read_text())


def test_a_spent_budget_stops_and_resuming_pays_only_the_rest(serve, settings, capsys):
    server = serve(recorded.reply)
    config = settings(server, max_calls=7, concurrency=1)
    with pytest.raises(UserError, match=r"max_calls 7 is spent; all replies are kept.*--resume true"):
        run_refine(config)
    assert len(server.requests) == 7
    kept = stored(config)
    assert (kept["finished"], kept["rounds_left"], len(kept["rounds"])) == (False, [2, 3], 2)
    told = " ".join(capsys.readouterr().out.split())
    assert "spent on the proposer so far: 7 calls, 0 tokens read" in told and "unfinished (rounds left: 2, 3)" in told
    with pytest.raises(UserError, match="holds a run already"):
        run_refine(config)
    report = run_refine(replace(config, max_calls=None, resume=True))
    check_rows(report["rounds"])
    assert stored(config) == report and report["finished"] and "rounds_left" not in report
    assert len(server.requests) == 13
    told = " ".join(capsys.readouterr().out.split())
    assert "spent on the proposer: 6 calls, " in told and "earlier runs included: 13 calls, " in told
    spent = report["spent"]["proposer"]
    assert (spent["this_run"]["calls"], spent["total"]["calls"]) == (6, 13)
    tokens = [row["tokens_in"] for row in report["rounds"]]
    again = run_refine(replace(config, max_calls=None, resume=True))
    assert "0/0" not in capsys.readouterr().err  # no bar where nothing is asked
    assert len(server.requests) == 13 and [row["tokens_in"] for row in again["rounds"]] == tokens
    check_rows(again["rounds"])


def test_a_run_killed_in_any_round_ends_as_if_nothing_had_happened(serve, settings, monkeypatch):
    server = serve(recorded.reply)
    config = settings(server)
    from rm import refining

    real, calls = refining.run_round, []

    def dying(number, *arguments, **options):
        done = real(number, *arguments, **options)
        calls.append(number)
        if len(calls) in (1, 3):  # after the work of a round, before it is written
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(refining, "run_round", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_refine(config)
        config = replace(config, resume=True)
    report = run_refine(config)
    assert calls == [1, 1, 2, 2, 3]
    check_rows(report["rounds"])
    assert len(server.requests) == 13
    versions = read_versions(f"{config.output}/versions.jsonl")
    assert len(versions) == 16 and len({(v.prompt_id, v.round) for v in versions}) == 16


def test_a_dead_proposer_leaves_every_rubric_as_it_was(serve, settings):
    report = run_refine(config := settings(serve(failure(500)), max_failed=1.0, rounds=2))
    assert [row["refused"] for row in report["rounds"]] == [{}, {"server_error": 4}, {"server_error": 4}]
    before = {record.prompt_id: record.rubric for record in recorded.records()}
    after = load_prompts(f"{config.output}/prompts.jsonl")
    assert {record.prompt_id: record.rubric for record in after} == before


def test_too_many_failures_stop_the_run_with_advice(serve, settings, tmp_path):
    many = [
        record.model_copy(update={"prompt_id": f"{record.prompt_id}{n}", "prompt": f"{record.prompt} ({n})",
                                  "response_id": f"{record.response_id}-{n}"})
        for n in range(6)
        for record in recorded.records()
    ]  # fmt: skip
    write_judged(tmp_path / "many.jsonl", many)
    config = settings(serve(completion("no")), data=str(tmp_path / "many.jsonl"))
    with pytest.raises(UserError, match=r"of 2\d proposals failed, more than max_failed 0.5 allows"):
        run_refine(config)


def test_rubrics_to_start_from_and_more_rounds_later(serve, settings, tmp_path, capsys):
    check = Verifier(name="mention_any", args={"words": ["boil"]})
    start = Rubric(criteria=(Criterion(id="x", text="Boils water.", verifier=check),))
    tea = next(record.prompt for record in recorded.records() if record.prompt_id == "tea")
    write_prompts(tmp_path / "start.jsonl", [PromptRecord(prompt_id="tea", prompt=tea, rubric=start)])
    server = serve(completion("no"))
    config = settings(server, rubrics=str(tmp_path / "start.jsonl"), rounds=1, max_failed=1.0)
    report = run_refine(config)
    assert report["own_rubric"] == 3 and stored(config)["finished"]
    kept = {record.prompt_id: record.rubric for record in load_prompts(f"{config.output}/prompts.jsonl")}
    assert kept["tea"] == start and kept["bike"].criteria[0].id == "frame"
    more = run_refine(replace(config, rounds=4, resume=True))
    assert [(row["round"], row["ran_out"]) for row in more["rounds"]] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 4)]
    assert "fewer than two responses left to show: 4 of 4 prompts in round 4. 4 rounds want 8 different" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_reward_model_ranks(serve, settings, monkeypatch):
    """The ranker's place in the loop; its scores are `rm.scorer`'s business."""
    from rm import refining

    class Longest:
        name, masked = "reward model x", {}

        def __init__(self, path, tokens_per_batch):
            assert (path, tokens_per_batch) == ("x", 16384)

        def __call__(self, records):
            return [len(record.response) / 1000 for record in records]

    monkeypatch.setattr(refining, "ModelRanker", Longest)
    report = run_refine(settings(serve(completion("no")), ranker="model", reward_model="x", rounds=1, max_failed=1.0))
    assert report["ranker"] == "reward model x" and report["spent"]["judge"] is None
    assert math.isclose(report["rounds"][0]["ties"], 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 0}, "rounds: must be at least 1"),
        ({"top": 0.0}, "top: must be a share"),
        ({"ranker": "model"}, "reward_model: goes with --ranker model"),
        ({"reward_model": "m"}, "reward_model: goes with --ranker model"),
        ({"checks": False}, "judge.judge: verifier answers criteria with a programmatic check only"),
        ({"rubrics": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"generators": "nobody, noone"}, "no prompt has two scored responses by nobody, noone"),
    ],
)
def test_bad_settings_are_one_line(serve, settings, changes, said):
    with pytest.raises(UserError, match=said):
        run_refine(settings(serve(recorded.reply), **changes))
