"""Labelling through HTTP by a real server, `transformers serve` with the embedded model; killed and started again."""

import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest

from rubric_data.config import LedgerVerifyConfig
from rubric_data.io import read_judged, write_judged
from rubric_data.ledger_view import run_verify
from rubric_data.records import Criterion, JudgedResponse, Rubric
from tests.rubric_data.served import Served

RESPONSES = 200  # short ones: the server takes some tenths of a second for each
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("serve") / "log.txt")
    yield server
    server.kill()


def short_responses(path):
    rubric = Rubric(criteria=(Criterion(id="fruit", text="Names a fruit."), Criterion(id="short", text="Is short.")))
    records = [
        JudgedResponse(
            prompt_id=f"p{n}",
            prompt=f"Name fruit {n}.",
            response_id=f"r{n}",
            response=("A pear.", "A stone.")[n % 2],
            rubric=rubric,
            split="train",
        )
        for n in range(RESPONSES)
    ]
    write_judged(path, records)
    return str(path)


def judge(served, folder, *options):
    """`rubric-rm judge` as a process."""
    command = [sys.executable, "-m", "policy.cli", "judge", "--output", str(folder)]
    command += ["--model", served.model]
    endpoint = ["--base_url", f"{served.url}/v1", "--timeout", "120", "--concurrency", "2", "--max_masked", "1.0"]
    endpoint += ["--use_verifiers", "false"]  # the embedded criteria all have one, and the server is to be asked
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([*command, *endpoint, *options], env=environment, stderr=log)


def count(folder, table):
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        return connection.execute(f"SELECT count(*), count(DISTINCT key) FROM {table}").fetchone()


def written(folder):
    """Verdicts so far, 0 while the ledger is in the making."""
    try:
        return count(folder, "verdicts")[0] if (folder / "ledger.sqlite").exists() else 0
    except sqlite3.OperationalError:
        return 0


def test_every_verdict_is_in_the_ledger_once_though_the_server_dies_midway(served, tmp_path):
    folder = tmp_path / "run"
    data = short_responses(tmp_path / "data.jsonl")
    options = ("--judge", "systemone", "--data", data)
    running = judge(served, folder, *options, "--attempts", "1")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and running.poll() is None:
        if written(folder) >= RESPONSES // 2:
            break
        time.sleep(0.1)
    served.kill()
    assert running.wait(timeout=300) == 0, folder.with_suffix(".log").read_text()
    answered, failed = count(folder, "verdicts")[0], count(folder, "attempts")[0]
    assert answered and failed
    (folder / "judged.jsonl").unlink(missing_ok=True)
    served.start()
    resumed = judge(served, folder, *options, "--resume", "true")
    assert resumed.wait(timeout=600) == 0, folder.with_suffix(".log").read_text()
    report = json.loads((folder / "report.json").read_text())
    rows, different = count(folder, "verdicts")
    assert rows == different and report["masked"] == {}
    assert (report["responses"], rows) == (RESPONSES, 2 * RESPONSES)
    assert 0 < report["mean_verdict"] < 1
    verified = run_verify(LedgerVerifyConfig(str(folder / "ledger.sqlite"), data))
    assert (verified["verdicts"], verified["unanswered"]) == (rows, [])
    assert report["asked"] == rows - answered  # the first run may have added some after the count, never the other way


def test_a_small_model_that_writes_no_json_is_masked_not_guessed(served, tmp_path):
    folder = tmp_path / "run"
    running = judge(served, folder, "--judge", "openai", "--limit", "2", "--max_tokens", "40")
    assert running.wait(timeout=300) == 0, folder.with_suffix(".log").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["spent"]["total"]["calls"] >= 2 and report["spent"]["total"]["tokens_out"] > 0
    assert set(report["masked"]) <= {"parse_failure", "missing_answer"}


def test_a_server_without_log_probabilities_is_told_of(served, tmp_path):
    folder = tmp_path / "run"
    running = judge(served, folder, "--judge", "openai", "--mode", "logprobs", "--limit", "1")
    assert running.wait(timeout=300) == 0, folder.with_suffix(".log").read_text()
    (record,) = read_judged(folder / "judged.jsonl")
    said = "parse_failure: the endpoint tells no log-probabilities; use another mode"
    assert {verdict.masked for verdict in record.verdicts} == {said}
