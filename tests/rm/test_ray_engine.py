"""Judging and scoring on a local cluster of two workers: one is killed, the driver is killed, budgets end."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from rm.config import ScoreConfig
from rm.judging import run_judge
from rm.model import RubricRewardModel
from rm.scorer import RubricScorer, run_score, whole_prompts
from rubric_data.config import JudgeConfig
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric
from tests.rubric_data.server import Server, completion

ROOT = Path(__file__).resolve().parents[2]
RESPONSES = 40


def responses(count=RESPONSES, prompts=10):
    rubric = Rubric(criteria=(Criterion(id="hi", text="Says hi."), Criterion(id="short", text="Is short.")))
    return [
        JudgedResponse(
            prompt_id=f"p{number % prompts}",
            prompt=f"Say hi {number % prompts}.",
            response_id=f"r{number}",
            response=f"hi {number}",
            rubric=rubric,
            split="test",
        )
        for number in range(count)
    ]


def test_parts_hold_whole_prompts_and_every_place_once():
    records = responses(10, prompts=3)  # prompts of 4, 3 and 3 responses
    assert whole_prompts(records, 2) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert whole_prompts(records, 1) == [[0, 3, 6, 9, 1, 4, 7, 2, 5, 8]]
    assert whole_prompts(records[:1], 8) == [[0]]


class Answering:
    """A server that answers 'met' to both criteria, slowly enough to be interrupted; ``at`` runs at one request."""

    def __init__(self, at=None, then=lambda: None, delay=0.05):
        self.count = 0
        lock = threading.Lock()

        def reply(body):
            with lock:
                self.count += 1
                now = self.count == at
            if now:
                then()
            time.sleep(delay)
            return completion('{"answers": [{"id": "1", "met": true}, {"id": "2", "met": true}]}')

        self.server = Server([reply])

    @property
    def asked(self):
        """How often each response was asked about."""
        texts = [body["messages"][0]["content"] for body in self.server.requests]
        return Counter(text.partition("RESPONSE: ")[2].split("\n")[0] for text in texts)


@pytest.fixture
def answering(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = []

    def start(*arguments, **options):
        made.append(Answering(*arguments, **options))
        return made[-1]

    yield start
    for each in made:
        each.server.close()


@pytest.fixture(scope="module")
def ray():
    """A cluster of two workers that the tests of this module share."""
    module = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from rm.ray_pool import cluster

    with cluster(None, 2):
        yield module


def workers():
    """The processes of busy workers of the cluster that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::_Worker.work"):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def config(folder, url, **changes):
    if not (folder / "data.jsonl").exists():
        write_judged(folder / "data.jsonl", responses())
    fixed = {"output": str(folder / "run"), "data": str(folder / "data.jsonl"), "judge": "openai", "model": "m"}
    return JudgeConfig(**(fixed | {"base_url": url, "engine": "ray", "concurrency": 2, "attempts": 1} | changes))


def ledger(folder):
    with sqlite3.connect(folder / "run" / "ledger.sqlite") as connection:
        return connection.execute("SELECT count(*), count(DISTINCT key) FROM verdicts").fetchone()


@pytest.mark.slow
def test_a_cluster_of_our_own_listens_on_loopback_only_and_tells_nobody(ray):
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    family = psutil.Process().children(recursive=True)
    assert any(process.name() == "raylet" for process in family)
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.slow
def test_a_killed_worker_s_batch_goes_to_another_and_every_verdict_is_there_once(ray, answering, tmp_path):
    killed = []

    def kill():
        victim = workers()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)

    served = answering(at=RESPONSES // 2, then=kill)
    report = run_judge(config(tmp_path, served.server.url))
    assert killed
    assert ledger(tmp_path) == (2 * RESPONSES, 2 * RESPONSES)
    assert (report["asked"], report["masked"], report["mean_verdict"]) == (2 * RESPONSES, {}, 1.0)
    assert len(served.asked) == RESPONSES and max(served.asked.values()) == 2
    # what the dead worker had paid is counted; a call that it had counted but not sent yet may be missing
    paid = len(served.server.requests)
    assert paid > RESPONSES and 0 <= report["spent"]["total"]["calls"] - paid <= 1


@pytest.mark.slow
def test_a_budget_holds_for_all_workers_together_and_the_rest_is_asked_on_resuming(ray, answering, tmp_path):
    served = answering()
    with pytest.raises(UserError, match="max_calls 11 is spent; 22 of 80 verdicts are in the ledger"):
        run_judge(config(tmp_path, served.server.url, max_calls=11))
    assert len(served.server.requests) == 11 and ledger(tmp_path) == (22, 22)
    report = run_judge(config(tmp_path, served.server.url, resume=True, max_calls=100))
    assert (report["asked"], report["reused"]) == (58, 22)
    assert [report["spent"][name]["calls"] for name in ("this_run", "total")] == [29, 40]
    assert set(served.asked.values()) == {1}


@pytest.mark.slow
def test_masked_verdicts_of_all_workers_count_together(ray, answering, tmp_path):
    served = answering()
    served.server.close()
    with pytest.raises(UserError, match=r"verdicts masked, more than max_masked 0\.2 allows .*connection"):
        run_judge(config(tmp_path, served.server.url))


@pytest.mark.slow
def test_a_worker_without_a_key_says_so_in_one_line(ray, tmp_path, monkeypatch):
    monkeypatch.setenv("ONLY_THE_DRIVER_HAS_IT", "secret")  # set after the cluster began
    with pytest.raises(UserError, match=r"no API key; set \$ONLY_THE_DRIVER_HAS_IT") as caught:
        run_judge(config(tmp_path, None, api_key_env="ONLY_THE_DRIVER_HAS_IT"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scores_are_those_of_the_local_engine_in_the_same_order(ray, tiny_backbone, tmp_path):
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=512)
    model.save(tmp_path / "model")
    RubricScorer.zero_shot(tiny_backbone, max_length=512).encoder.tokenizer.save_pretrained(tmp_path / "model")
    write_judged(tmp_path / "data.jsonl", responses())
    rows = {}
    for engine in ("local", "ray"):
        output = tmp_path / f"{engine}.jsonl"
        fixed = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl"), "output": str(output)}
        assert run_score(ScoreConfig(**fixed, engine=engine))["responses"] == RESPONSES
        rows[engine] = [json.loads(line) for line in output.read_text().splitlines()]
    for local, remote in zip(*rows.values(), strict=True):
        assert local["response_id"] == remote["response_id"]
        probs = [[item["probability"] for item in row["criteria"]] for row in (local, remote)]
        np.testing.assert_allclose(*probs, atol=1e-5)


@pytest.mark.slow
def test_a_killed_driver_resumes_and_pays_only_for_what_was_in_flight(ray, answering, tmp_path):
    served = answering()
    settings = config(tmp_path, served.server.url)
    command = [sys.executable, "-m", "policy.cli", "judge"]
    for name in ("output", "data", "judge", "model", "base_url", "engine", "concurrency", "attempts"):
        command += [f"--{name}", str(getattr(settings, name))]
    with open(tmp_path / "log.txt", "ab") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and driver.poll() is None:
        with contextlib.suppress(sqlite3.OperationalError):  # the file comes before its tables
            if (tmp_path / "run" / "ledger.sqlite").exists() and ledger(tmp_path)[0]:
                break
        time.sleep(0.02)
    assert driver.poll() is None, (tmp_path / "log.txt").read_text()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # its workers end with it
    before, kept = len(served.server.requests), ledger(tmp_path)[0]
    report = run_judge(JudgeConfig(**(vars(settings) | {"resume": True})))
    assert ledger(tmp_path) == (2 * RESPONSES, 2 * RESPONSES)
    assert (report["asked"], report["reused"]) == (2 * RESPONSES - kept, kept)
    assert len(served.server.requests) == before + RESPONSES - kept // 2
