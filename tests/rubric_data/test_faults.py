"""A labelling run through a server that fails in every way: nothing lost, nothing paid twice, all accounted for."""

import json
import re
import sqlite3
import threading
import time
from collections import Counter
from random import Random

import pytest

from rubric_data import endpoint
from rubric_data.endpoint import Endpoint, Limits
from rubric_data.errors import UserError
from rubric_data.judges import UNANSWERED
from rubric_data.labelling import label
from rubric_data.ledger import Ledger
from rubric_data.openai_judge import OpenAIJudge
from rubric_data.records import Criterion, JudgedResponse, Rubric
from rubric_data.systemone_judge import SystemOneJudge
from tests.rubric_data.server import BROKEN, completion, cut, dripped, failure, misnumbered, reset

RESPONSES = 200
RUBRIC = Rubric(criteria=(Criterion(id="even", text="Is even."), Criterion(id="odd", text="Is odd.")))
LIMITS = Limits(timeout=6.0, attempts=3, concurrency=16)


def records():
    return [
        JudgedResponse(prompt_id="p", prompt="Count.", response_id=f"r{n}", response=f"number {n}", rubric=RUBRIC)
        for n in range(RESPONSES)
    ]


def is_unreadable(number):
    """Responses to which the judge itself never says anything of use."""
    return number % 25 == 7


def chat(number):
    met = [{"id": "1", "met": number % 2 == 0}, {"id": "2", "met": number % 2 == 1}]
    return completion("Hard to say." if is_unreadable(number) else json.dumps({"answers": met}))


def systemone(number):
    answers = {"1": {"noul": float(number % 2 == 0)}, "2": {"noul": float(number % 2 == 1)}}
    if is_unreadable(number):
        answers = {"1": {"noul": "high"}, "2": ["?"]}
    return 200, {}, {"model": "m", "answers": answers, "usage": {"input_tokens": 9, "output_tokens": 0}}


def faults(good):
    """(kind that the client should see, weight, reply)."""
    return [
        ("rate_limit", 6, failure(429)),
        ("rate_limit", 6, failure(429, {})),
        ("rate_limit", 2, failure(429, {"Retry-After": "soon"})),
        *(("server_error", 4, failure(status, {})) for status in (500, 502, 503)),
        *(("server_error", 1, (200, {}, body)) for body in BROKEN.values()),
        ("server_error", 3, (200, {"Content-Type": "text/html"}, BROKEN["a page"])),
        ("server_error", 3, misnumbered(good, -5)),
        ("connection", 3, misnumbered(good, +5)),
        ("connection", 6, cut(good)),
        ("connection", 6, reset()),
        ("timeout", 2, dripped(good)),
        ("rejected", 2, failure(400)),
    ]


class Unreliable:
    """What the server says at each try at each response. By a seed, so that the order of calls changes nothing."""

    def __init__(self, good):
        self.good = good
        self.tries, self.faults, self.paid = Counter(), Counter(), Counter()
        self._lock = threading.Lock()

    def __call__(self, body):
        number = int(re.search(r"number (\d+)", json.dumps(body)).group(1))
        with self._lock:
            self.tries[number] += 1
            random = Random(f"{number} {self.tries[number]}")
            repairing = len(body.get("messages", ())) > 1
            if repairing or random.random() < 0.5:
                self.paid[number] += 1
                return self.good(number)
            kinds, weights, replies = zip(*faults(self.good(number)), strict=True)
            place = random.choices(range(len(kinds)), weights)[0]
            self.faults[kinds[place]] += 1
            return replies[place]


@pytest.mark.parametrize(
    ("make", "good", "calls_unread"),
    [(OpenAIJudge, chat, 2), (SystemOneJudge, systemone, 1)],
    ids=["chat", "systemone"],
)
def test_nothing_is_lost_or_paid_twice_and_every_fault_is_accounted_for(
    serve, tmp_path, monkeypatch, make, good, calls_unread
):
    monkeypatch.setattr(endpoint, "_backoff", lambda state: 0.0)
    plan = Unreliable(good)
    server = serve(plan)
    unanswered = set(range(RESPONSES))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        for _ in range(20):  # runs, each resuming the one before
            seen, faults_before, tries_before = len(server.requests), plan.faults.copy(), plan.tries.copy()
            judge = make("m", Endpoint(server.url, limits=LIMITS))
            labelled, report = label(records(), judge, ledger=ledger)
            assert {n for n in range(RESPONSES) if plan.tries[n] > tries_before[n]} == unanswered
            unanswered = {n for n, record in enumerate(labelled) if failed(record)}
            spent = judge.spent
            assert spent.failed == dict(plan.faults - faults_before)
            assert spent.calls == len(server.requests) - seen
            # a failed try is followed by another, or was the last of a response that stays without an answer
            assert sum(spent.failed.values()) == spent.retries + len(unanswered)
            assert sum(report.masked.get(kind, 0) for kind in UNANSWERED) == 2 * len(unanswered)
            if not unanswered:
                break
    assert not unanswered
    assert set(plan.faults) == UNANSWERED - {"budget"}
    assert plan.paid == {n: calls_unread if is_unreadable(n) else 1 for n in range(RESPONSES)}
    for n, record in enumerate(labelled):
        if is_unreadable(n):
            assert all(verdict.masked.startswith("parse_failure: ") for verdict in record.verdicts)
        else:
            assert record.values() == [float(n % 2 == 0), float(n % 2 == 1)]
    with sqlite3.connect(tmp_path / "l.sqlite") as opened:
        assert opened.execute("SELECT count(*), count(DISTINCT key) FROM verdicts").fetchone() == (400, 400)


def failed(record):
    return any(verdict.masked and verdict.masked.partition(":")[0] in UNANSWERED for verdict in record.verdicts)


def test_calls_on_their_way_when_a_budget_is_spent_are_kept(serve, tmp_path):
    paid = Counter()

    def slow(body):
        number = int(re.search(r"number (\d+)", json.dumps(body)).group(1))
        time.sleep(0.01 * (number % 8))
        paid[number] += 1
        return systemone(number)

    server = serve(slow)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        for run in range(1, 5):
            judge = SystemOneJudge("m", Endpoint(server.url, limits=Limits(max_calls=45, concurrency=8)))
            with pytest.raises(UserError, match=f"max_calls 45 is spent; {90 * run} of 400 verdicts are in the ledger"):
                label(records(), judge, ledger=ledger)
        label(records(), judge_without_budget := SystemOneJudge("m", Endpoint(server.url)), ledger=ledger)
    assert judge_without_budget.spent.calls == 20
    assert paid == dict.fromkeys(range(RESPONSES), 1)
