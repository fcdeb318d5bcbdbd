"""`rubric-rm judge --engine batch` from the command line: out, in, and what is left over."""

import json
import shlex

import pytest

from policy.cli import main
from rubric_data.io import read_judged, write_judged
from tests.rubric_data.server import Server, completion
from tests.rubric_data.test_batch import MODES, expired, good, record, result


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # nothing is sent, so no key is needed
    write_judged(tmp_path / "data.jsonl", [record(number) for number in range(3)])
    folder = tmp_path / "run"

    def judge(*options, mode="json"):
        fixed = ["--data", str(tmp_path / "data.jsonl"), "--output", str(folder), "--judge", "openai", "--model", "m"]
        code = main(["judge", *fixed, "--mode", mode, "--engine", "batch", *options])
        return code, capsys.readouterr()

    def read(*options, lines, **more):
        results = tmp_path / "results.jsonl"
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return judge("--resume", "true", "--batch_results", str(results), *options, **more)

    judge.folder, judge.read = folder, read
    judge.requests = lambda: [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    return judge


@pytest.mark.parametrize("mode", MODES)
def test_two_commands_and_a_batch_between_them(run, mode):
    code, told = run(mode=mode)
    assert code == 0 and f"next: send {run.folder / 'requests.jsonl'} to a batch API" in told.out
    assert "waiting: 6 of 6 verdicts, for the results of the batch" in told.out and "\nmasked:" not in told.out
    assert "judging" not in told.err  # no bar that stands still
    assert not (run.folder / "judged.jsonl").exists()
    requests = run.requests()
    assert {request["url"] for request in requests} == {"/v1/chat/completions"}
    code, told = run.read(lines=[result(request) for request in requests], mode=mode)
    assert code == 0 and "next:" not in told.out
    assert [r.values()[1] for r in read_judged(run.folder / "judged.jsonl")] == [pytest.approx(0.5)] * 3
    report = json.loads((run.folder / "report.json").read_text())
    assert (report["asked"], report["masked"], report["batch"]["requests"]) == (6, {}, 0)
    assert report["spent"]["total"]["calls"] == len(requests)
    assert not (run.folder / "requests.jsonl").exists()


def test_what_failed_is_masked_and_goes_into_the_next_batch(run):
    run()
    first, second, third = run.requests()
    code, told = run.read(lines=[result(second)])  # the others are still under way
    assert code == 0 and "next: send" in told.out and run.requests() == [first, third]
    assert "waiting: 4 of 6 verdicts" in told.out
    assert not (run.folder / "judged.jsonl").exists()
    code, told = run.read(lines=[expired(first), result(third)])
    assert code == 2 and "2 of 6 verdicts masked" in told.err and run.requests() == [first]
    assert not (run.folder / "judged.jsonl").exists()
    assert run.read("--max_masked", "0.4", lines=[expired(first)])[0] == 0
    assert [r.verdicts[0].masked is None for r in read_judged(run.folder / "judged.jsonl")] == [False, True, True]
    assert json.loads((run.folder / "report.json").read_text())["masked"] == {"timeout": 2}
    assert run.requests() == [first]
    run.read(lines=[result(first)])
    assert json.loads((run.folder / "report.json").read_text())["masked"] == {}


def test_live_and_batch_share_verdicts(run, monkeypatch):
    """The same questions to the same server: what a batch answered is not asked again live."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server([lambda body: completion(good({"body": body})["choices"][0]["message"]["content"])])
    run("--base_url", server.url)
    requests = run.requests()
    run.read("--base_url", server.url, lines=[result(request) for request in requests[:2]])
    code, _ = run("--base_url", server.url, "--resume", "true", "--engine", "threads")
    server.close()
    assert code == 0 and [body["messages"] for body in server.requests] == [requests[2]["body"]["messages"]]
    assert [r.values() for r in read_judged(run.folder / "judged.jsonl")] == [[1.0, 0.5]] * 3


def test_the_next_step_is_a_command_that_works(run):
    _, told = run()
    first, second, third = run.requests()
    command = shlex.split(told.out.partition(", and run\n")[2].splitlines()[0])
    assert command[:2] == ["rubric-rm", "judge"]
    assert main(command[1:]) == 2  # nothing is there yet
    answered = run.folder / "results" / "first.jsonl"
    answered.write_text("".join(json.dumps(result(request)) + "\n" for request in (first, second)))
    assert main(command[1:]) == 0 and run.requests() == [third]
    (run.folder / "results" / "second.jsonl").write_text(json.dumps(result(third)) + "\n")
    (run.folder / "results" / "errors.jsonl").touch()  # some servers write one, errors or not
    assert main(command[1:]) == 0
    report = json.loads((run.folder / "report.json").read_text())
    assert (report["masked"], report["batch"]["before"]) == ({}, 2)
    assert [report["spent"][name]["calls"] for name in ("this_run", "total")] == [1, 3]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "results.jsonl: no results in it; fetch the batch's output file again"),
        (
            [{"custom_id": "f" * 64, "response": None, "error": None}],
            "results.jsonl: none of its 1 replies is to a question",
        ),
    ],
)
def test_results_that_are_refused_change_nothing(run, lines, said):
    run()
    before = run.requests()
    code, told = run.read(lines=lines)
    assert code == 2 and said in told.err and told.err.rstrip().splitlines()[-1].startswith("rubric-rm: error:")
    assert run.requests() == before
    assert run.read(lines=[result(request) for request in before])[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--judge", "systemone"), "engine: batch files are for the openai judge, got systemone; set --judge openai"),
        (("--max_calls", "5"), "max_calls: a batch is paid where it is sent; leave it out, and bound the run"),
        (("--batch_results", "none.jsonl"), "none.jsonl: no such file; give the result files of the batch"),
        (
            ("--engine", "threads", "--batch_results", "x"),
            "batch_results: the threads engine does not read it; leave it out, or add --engine batch",
        ),
        (("--model", "smollm2"), "model: the openai judge needs the model's name"),
    ],
)
def test_settings_that_make_no_sense_leave_no_run(run, options, said):
    code, told = run(*options)
    assert code == 2 and said in told.err
    assert not run.folder.exists()
