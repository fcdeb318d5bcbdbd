"""Retries, rates and budgets, against a scripted server on loopback and a clock of our own."""

import gzip
import threading
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rubric_data.endpoint import (
    GATHER,
    Account,
    Bucket,
    BudgetSpent,
    Endpoint,
    Limits,
    read_reply,
    retry_after,
    tokens_of,
)
from rubric_data.errors import UserError
from rubric_data.spending import Spent
from rubric_data.wire import MOST_BYTES, BrokenReply
from tests.rubric_data.server import BROKEN, completion, dripped, failure

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def with_usage(read, written):
    status, headers, payload = completion("ok")
    return (
        status,
        headers,
        payload | {"usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": 0}},
    )


def chat(endpoint):
    return endpoint.chat(BODY, threading.Event())


def test_what_was_used_is_counted_failures_included(serve):
    limits = Limits(price_in=2.0, price_out=10.0)
    endpoint = Endpoint(serve(failure(500), with_usage(100, 30), completion("ok")).url, limits=limits)
    chat(endpoint), chat(endpoint)
    # 100 * 2 / 1e6 + 30 * 10 / 1e6
    assert endpoint.spent == Spent(
        calls=3,
        retries=1,
        failed={"server_error": 1},
        tokens_in=100,
        tokens_out=30,
        unmetered=1,
        cost=pytest.approx(0.0005),
    )


@pytest.mark.parametrize(
    ("budget", "calls"),
    [
        ({"max_calls": 2}, 2),
        ({"max_total_tokens": 250}, 2),  # 130 tokens a call: the second is begun at 130, the third would be at 260
        ({"max_cost": 0.0006, "price_in": 2.0, "price_out": 10.0}, 2),
    ],
)
def test_a_budget_ends_calls_before_they_are_sent(serve, budget, calls):
    server = serve(with_usage(100, 30))
    endpoint = Endpoint(server.url, limits=Limits(**budget))
    for _ in range(calls):
        chat(endpoint)
    with pytest.raises(BudgetSpent, match=f"{next(iter(budget))} .* is spent") as caught:
        chat(endpoint)
    assert endpoint.failure(caught.value)[0] == "budget"
    assert len(server.requests) == calls == endpoint.spent.calls


def test_endpoints_on_one_account_share_its_budget(serve):
    server = serve(with_usage(100, 30))
    limits = Limits(max_total_tokens=250)
    account = Account(limits)
    first, second = (Endpoint(server.url, limits=limits, account=account) for _ in range(2))
    chat(first), chat(second)  # 130, 260
    with pytest.raises(BudgetSpent, match="max_total_tokens 250 is spent"):
        chat(first)
    assert first.spent == second.spent == Spent(calls=2, tokens_in=200, tokens_out=60)


def test_retries_count_against_the_budget(serve):
    server = serve(failure(500))
    with pytest.raises(BudgetSpent):
        chat(Endpoint(server.url, limits=Limits(max_calls=2, attempts=5)))
    assert len(server.requests) == 2


def test_a_rate_spreads_calls_out(serve):
    endpoint = Endpoint(serve(completion("ok")).url, limits=Limits(requests_per_minute=300, concurrency=8))
    endpoint.account._requests.take(300)  # the minute's worth that may be held
    start = time.monotonic()
    list(endpoint.stream(lambda _, stop: endpoint.chat(BODY, stop), range(4)))
    assert 0.8 <= time.monotonic() - start < 3  # four calls, one each 0.2 s


def test_tokens_are_taken_by_guess_and_put_right_by_usage(serve):
    endpoint = Endpoint(serve(with_usage(100, 30)).url, limits=Limits(tokens_per_minute=10_000))
    endpoint.account._tokens = Bucket(10_000, clock=lambda: 0.0)
    endpoint.chat(BODY, threading.Event(), likely_tokens=50)
    assert endpoint.account._tokens._level == 10_000 - 130


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 50)), max_size=30))
def test_no_stretch_of_time_gets_more_than_its_rate_and_one_fill(steps):
    now = 0.0
    bucket = Bucket(60, clock=lambda: now)  # one a second
    granted = []  # (when, amount)
    for pause, amount in steps:
        now += pause
        granted.append((now + bucket.take(amount), amount))
    for first, (begin, _) in enumerate(granted):
        for end, _ in granted[first:]:
            inside = [amount for when, amount in granted if begin - 1e-6 <= when <= end + 1e-6]
            assert sum(inside) <= 60 + (end - begin) + max(inside) + 1e-3  # the last may begin its debt at the end


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (None, None),
        ({}, None),
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"input_tokens": 3, "output_tokens": 0}, (3, 0)),
        ({"prompt_tokens": None, "completion_tokens": 4}, (0, 4)),
        ({"prompt_tokens": -3, "completion_tokens": "4"}, None),
        ({"prompt_tokens": 10**400, "completion_tokens": 1e999}, None),
        ("many", None),
    ],
)
def test_usage_in_its_forms(usage, tokens):
    assert tokens_of({"usage": usage}) == tokens


# --- replies that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_what_is_no_reply_is_a_failed_try_and_another_follows(serve, body):
    server = serve((200, {}, body), completion("ok"))
    endpoint = Endpoint(server.url, limits=Limits(attempts=2))
    assert chat(endpoint)["choices"][0]["message"]["content"] == "ok"
    assert endpoint.spent.failed == {"server_error": 1} and len(server.requests) == 2


def test_a_reply_is_read_up_to_its_limit_and_no_further():
    most = b'{"choices": ["' + b"x" * (MOST_BYTES - 17) + b'"]}'
    assert len(most) == MOST_BYTES
    assert len(read_reply(most, "choices")["choices"][0]) == MOST_BYTES - 17


def test_a_small_reply_that_unpacks_to_a_big_one_is_not_unpacked_whole(serve):
    bomb = gzip.compress(b'{"choices": ["' + b"x" * 50_000_000 + b'"]}')
    assert len(bomb) < 100_000
    endpoint = Endpoint(serve((200, {"Content-Encoding": "gzip"}, bomb)).url, limits=Limits(attempts=1))
    with pytest.raises(BrokenReply, match="longer than 4 MiB"):
        chat(endpoint)
    packed = gzip.compress(b'{"choices": ["ok"]}')
    assert chat(Endpoint(serve((200, {"Content-Encoding": "gzip"}, packed)).url)) == {"choices": ["ok"]}


def test_a_body_that_drips_is_a_time_out_though_no_pause_is_long(serve):
    endpoint = Endpoint(serve(dripped(completion("ok"), pause=0.02)).url, limits=Limits(timeout=0.3, attempts=1))
    start = time.monotonic()
    with pytest.raises(Exception, match="timed out") as caught:
        chat(endpoint)
    assert endpoint.failure(caught.value) == ("timeout", "no reply within 0.3 s")
    assert time.monotonic() - start < 2  # the body would have taken four seconds


def test_what_utf8_cannot_hold_is_replaced_and_what_is_said_twice_is_not_said():
    raw = b'{"choices": ["\\ud800 \\ud83d\\ude00"], "id": 1, "id": 2}'
    assert read_reply(raw, "choices") == {"choices": ["? \U0001f600"], "id": None}


# --- many calls at once ----------------------------------------------------------------------------------------------


def test_a_slow_call_holds_up_no_other():
    endpoint = Endpoint("http://127.0.0.1:1/v1", limits=Limits(concurrency=2))
    others_done = threading.Event()

    def ask(number, stop):
        if number == 0:
            assert others_done.wait(10)
        return number * number

    groups = endpoint.stream(ask, range(40))
    found = dict(next(groups))
    assert 0 not in found and found
    while len(found) < 39:
        found |= next(groups)
    others_done.set()
    assert list(groups) == [[(0, 0)]]
    assert found == {number: number * number for number in range(1, 40)}


def test_few_lists_hold_many_results():
    endpoint = Endpoint("http://127.0.0.1:1/v1", limits=Limits(concurrency=4))
    start = time.monotonic()
    groups = list(endpoint.stream(lambda number, stop: time.sleep(0.01), range(100)))
    assert sum(map(len, groups)) == 100
    assert len(groups) <= (time.monotonic() - start) / GATHER + 2


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_what_finished_before_an_error_is_handed_over_first(error):
    def ask(number, stop):
        if number == 3:
            raise error("stop")
        return number

    groups = Endpoint("http://127.0.0.1:1/v1", limits=Limits(concurrency=1)).stream(ask, range(100))
    assert next(groups) == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(error):
        next(groups)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"max_calls": -1}, "max_calls must be positive"),
        ({"requests_per_minute": 0.0}, "requests_per_minute"),
        ({"max_cost": 1.0}, "max_cost needs prices; set price_in and price_out"),
    ],
)
def test_bad_limits(limits, said):
    with pytest.raises(UserError, match=said):
        Limits(**limits)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.25", 0.25),
        ("-1", 0.0),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0),
        ("Wed, 31 Dec 2025 00:00:00 GMT", 0.0),
        ("soon", None),
    ],
)
def test_retry_after_in_its_forms(said, seconds):
    headers = {} if said is None else {"retry-after": said}
    assert retry_after(headers, datetime(2026, 1, 1, tzinfo=UTC)) == seconds
