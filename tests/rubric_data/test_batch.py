"""Offline batches: golden requests, canned results in every mode, files that hold what they should not."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rubric_data import batch
from rubric_data.batch import ResultFiles, custom_id, request_line, write_requests
from rubric_data.endpoint import Limits
from rubric_data.errors import UserError
from rubric_data.judges import JudgeRequest, is_unanswered, reason_kind
from rubric_data.labelling import Question, cut, label_by, open_questions
from rubric_data.ledger import Ledger
from rubric_data.openai_judge import ChatForm
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "batch_requests.jsonl"
LEVELS = (Level(label="rude"), Level(label="plain"), Level(label="warm"))
CRITERIA = (Criterion(id="greets", text="Greets."), Criterion(id="tone", text="Tone", levels=LEVELS))
MODES = ("json", "schema", "logprobs")


def record(number, criteria=CRITERIA):
    return JudgedResponse(
        prompt_id=f"p{number}",
        prompt=f"Say hi {number}.",
        response_id=f"r{number}",
        response="hi",
        rubric=Rubric(criteria=criteria),
    )


RECORDS = [record(0), record(1)]


def good(request):
    """A completion that answers ``request``, a line of a request file: met, and the middle level of three."""
    body = request["body"]
    if not body.get("logprobs"):
        answers = {"answers": [{"id": "1", "met": True}, {"id": "2", "level": 1}]}
        choice = {"message": {"role": "assistant", "content": json.dumps(answers)}, "finish_reason": "stop"}
    else:
        levels = "Choose a level" in body["messages"][0]["content"]
        shares = {"1": 0.8, "0": 0.1, "2": 0.1} if levels else {"Yes": 0.6, "No": 0.2}
        top = [{"token": token, "logprob": math.log(share)} for token, share in shares.items()]
        choice = {
            "message": {"role": "assistant", "content": top[0]["token"]},
            "finish_reason": "length",
            "logprobs": {"content": [top[0] | {"top_logprobs": top}]},
        }
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "c", "object": "chat.completion", "model": "m-2026", "choices": [choice], "usage": usage}


def result(request, body=None, status=200):
    response = {"status_code": status, "request_id": "q", "body": good(request) if body is None else body}
    return {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}


def failed(request, status, code="x"):
    return result(request, {"error": {"message": f"scripted {status}", "type": "t", "code": code}}, status)


def expired(request):
    error = {"code": "batch_expired", "message": "This request could not be executed in time."}
    return {"id": "b", "custom_id": request["custom_id"], "response": None, "error": error}


class Batch:
    """A run in a folder: requests out, results in."""

    def __init__(self, folder, mode="json", records=RECORDS):
        self.folder, self.form, self.records = folder, ChatForm("m", mode=mode), records
        self.results = folder / "results.jsonl"

    def requests(self, ledger=None):
        paths = write_requests(
            self.folder, self.form, cut(open_questions(self.records, self.form, ledger), self.form.most_criteria)
        )
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]

    def ingest(self, lines, ledger=None, **options):
        self.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        engine = ResultFiles(self.form, [self.results], open_questions(self.records, self.form), Limits(), self.folder)
        judged, report = label_by(self.records, engine, ledger=ledger, **options)
        return judged, report, engine


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as opened:
        yield opened


# --- requests --------------------------------------------------------------------------------------------------------


def test_request_lines_are_the_golden_ones():
    lines = []
    for mode in MODES:
        form = ChatForm("m", mode=mode, max_tokens=90)
        lines += [request_line(form, call) for call in cut(open_questions([record(0)], form), form.most_criteria)]
    assert "".join(lines) == GOLDEN.read_text()


def test_a_name_is_the_hash_of_the_ledger_keys_in_their_order():
    import hashlib

    call = Question(JudgeRequest("p", "r", CRITERIA), 0, ("a", "b"))
    assert custom_id(call) == hashlib.sha256(b'["a","b"]').hexdigest()
    assert custom_id(Question(call.request, 0, ("b", "a"))) != custom_id(call)


@pytest.mark.parametrize(("most", "lines"), [({"MOST_REQUESTS": 2}, [2, 2, 1]), ({"MOST_BYTES": 1500}, [1] * 5)])
def test_large_batches_are_several_files_and_replace_earlier_ones(tmp_path, monkeypatch, most, lines):
    for name, value in most.items():
        monkeypatch.setattr(batch, name, value)
    run = Batch(tmp_path, "json", [record(number) for number in range(5)])
    (tmp_path / "requests-9.jsonl").write_text("old\n")
    requests = run.requests()
    names = ["requests.jsonl", *(f"requests-{number}.jsonl" for number in range(2, len(lines) + 1))]
    assert sorted(path.name for path in tmp_path.glob("requests*")) == sorted(names)
    assert [len((tmp_path / name).read_text().splitlines()) for name in names] == lines
    assert len({request["custom_id"] for request in requests}) == 5


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_results_in_any_order_become_the_verdicts_of_a_live_run(tmp_path, ledger, mode):
    run = Batch(tmp_path, mode)
    requests = run.requests()
    assert len(requests) == (4 if mode == "logprobs" else 2)
    judged, report, engine = run.ingest([result(request) for request in reversed(requests)], ledger)
    met = 0.75 if mode == "logprobs" else 1.0  # .6 / (.6 + .2)
    assert [r.values() for r in judged] == [[pytest.approx(met), pytest.approx(0.5)]] * 2
    assert (report.asked, report.reused, report.masked) == (4, 0, {})
    calls = len(requests)
    assert (engine.spent.calls, engine.spent.tokens_in, engine.spent.tokens_out) == (calls, 100 * calls, 10 * calls)
    assert engine.ingested.models == {"m-2026": calls}
    assert not run.requests(ledger)


def test_failures_are_masked_by_kind_and_asked_again(tmp_path, ledger):
    run = Batch(tmp_path, records=[record(number) for number in range(6)])
    first, second, third, fourth, fifth, sixth = run.requests()
    unreadable = good(fifth)
    unreadable["choices"][0]["message"]["content"] = "no idea"
    lines = [
        failed(first, 429), failed(second, 500), failed(third, 400), expired(fourth), result(fifth, unreadable),
        result(sixth),
    ]  # fmt: skip
    judged, _, engine = run.ingest(lines, ledger)
    kinds = ["rate_limit", "server_error", "rejected", "timeout", "parse_failure"]
    assert [reason_kind(r.verdicts[0].masked) for r in judged[:5]] == kinds
    assert judged[0].verdicts[0].masked == f"rate_limit: status 429: scripted 429 ({run.results}:1)"
    assert judged[5].values() == [1.0, 0.5]
    assert (engine.ingested.replies, engine.ingested.failures) == (6, 4)
    again = run.requests(ledger)
    assert [request["custom_id"] for request in again] == [r["custom_id"] for r in (first, second, third, fourth)]


def test_a_partial_result_waits_for_the_second_batch(tmp_path, ledger):
    run = Batch(tmp_path)
    first, second = run.requests()
    judged, report, _ = run.ingest([result(first)], ledger)
    assert (report.waiting, report.masked, report.asked, report.reused) == (2, {}, 2, 0)
    assert judged[1].verdicts[0].masked == "waiting: no reply so far"
    (left,) = run.requests(ledger)
    assert left == second
    # the first file is given along with the second: what it holds was read before
    judged, report, engine = run.ingest([result(first), result(second)], ledger)
    assert [r.values() for r in judged] == [[1.0, 0.5]] * 2
    assert (report.asked, report.reused) == (2, 2)
    assert (engine.ingested.before, engine.ingested.unknown) == (1, 0)


def test_a_repeated_reply_is_counted_and_the_first_answer_stands(tmp_path, ledger):
    run = Batch(tmp_path)
    first, second = run.requests()
    other = good(first)
    other["choices"][0]["message"]["content"] = '{"answers": [{"id": "1", "met": false}, {"id": "2", "level": 0}]}'
    lines = [expired(first), result(first), result(first, other), result(second), expired(second)]
    judged, report, engine = run.ingest(lines, ledger)
    assert [r.values() for r in judged] == [[1.0, 0.5]] * 2
    assert engine.ingested.repeated == 3 and report.asked == 4


def test_replies_to_other_questions_are_counted_but_a_file_of_nothing_else_is_refused(tmp_path, ledger):
    run = Batch(tmp_path)
    stranger = result(run.requests()[0]) | {"custom_id": "f" * 64}
    _, report, engine = run.ingest([stranger, result(run.requests()[0])], ledger)
    assert engine.ingested.unknown == 1 and report.asked == 2
    for other in (Batch(tmp_path, "schema"), Batch(tmp_path, records=[record(7)])):  # another mode; other data
        with pytest.raises(UserError, match="none of its 2 replies is to a question of this run"):
            other.ingest([result(request) for request in run.requests()], ledger)


def test_what_others_answered_since_is_kept_and_the_rest_taken(tmp_path, ledger):
    run = Batch(tmp_path, records=[record(0)])
    (request,) = run.requests()
    solo = Batch(tmp_path, records=[record(0, CRITERIA[:1])])
    told = good(request)
    told["choices"][0]["message"]["content"] = '{"answers": [{"id": "1", "met": false}]}'
    solo.ingest([result(solo.requests()[0], told)], ledger)
    judged, report, _ = run.ingest([result(request)], ledger)
    assert judged[0].values() == [0.0, 0.5] and (report.asked, report.reused) == (1, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"custom_id": "a", "resp', r"results.jsonl:2: the last line is not complete JSON"),
        ('{"id": "b"}\n', r"results.jsonl:2: field custom_id is missing"),
        ('{"custom_id": "a", "method": "POST", "body": {}}\n', r"results.jsonl:2: is a request, not a result"),
        ('{"custom_id": "a", "response": "ok"}\n', r"results.jsonl:2: field response: must be an object"),
        ("[]\n", r"results.jsonl:2: holds \[\], not an object"),
    ],
)
def test_a_file_with_a_broken_line_is_refused_and_nothing_kept(tmp_path, ledger, text, said):
    run = Batch(tmp_path)
    run.results.write_text(json.dumps(result(run.requests()[0])) + "\n" + text)
    engine = ResultFiles(run.form, [run.results], open_questions(RECORDS, run.form), Limits(), tmp_path)
    with pytest.raises(UserError, match=said):
        label_by(RECORDS, engine, ledger=ledger)
    assert len(open_questions(RECORDS, run.form, ledger)) == 2


def test_a_failing_batch_is_kept_whole_and_then_told_of(tmp_path, ledger):
    run = Batch(tmp_path, records=[record(number) for number in range(20)])
    requests = run.requests()
    lines = [failed(request, 500) for request in requests[:15]] + [result(request) for request in requests[15:]]
    with pytest.raises(UserError, match=r"30 of 40 verdicts masked, more than max_masked 0\.2 allows"):
        run.ingest(lines, ledger, max_masked=0.2)
    assert len(run.requests(ledger)) == 15


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
shapes = st.fixed_dictionaries(
    {},
    optional={
        "choices": json_values
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "message": json_values | st.fixed_dictionaries({"content": json_values, "refusal": json_values}),
                    "logprobs": json_values
                    | st.fixed_dictionaries(
                        {"content": st.lists(st.fixed_dictionaries({"token": json_values, "logprob": json_values}))}
                    ),
                    "finish_reason": json_values,
                },
            ),
            max_size=2,
        ),
        "usage": json_values,
        "model": json_values,
    },
)


@given(body=shapes | json_values, mode=st.sampled_from(MODES))
@example(body={"choices": "\ud800"}, mode="json")  # half a character
def test_no_body_whatever_is_more_than_masked(tmp_path_factory, body, mode):
    run = Batch(tmp_path_factory.mktemp("b"), mode, [record(0)])
    line = result(run.requests()[0]) | {"response": {"status_code": 200, "body": body}}
    with Ledger(run.folder / "l.sqlite") as ledger:
        judged, *_ = run.ingest([line], ledger)
    for verdict in judged[0].verdicts:
        assert verdict.value is None or 0 <= verdict.value <= 1
        assert verdict.value is not None or is_unanswered(verdict) or reason_kind(verdict.masked) in {
            "parse_failure", "missing_answer", "refusal", "waiting",
        }  # fmt: skip
