import sqlite3

import pytest

from rubric_data.errors import UserError
from rubric_data.judges import JudgeRequest, RawVerdict
from rubric_data.labelling import MIN_VERDICTS, label, label_by, open_questions
from rubric_data.ledger import Ledger
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict


def response(name, *criteria, prompt="p", text=None, verdicts=()):
    return JudgedResponse(
        prompt_id=prompt,
        prompt=prompt,
        response_id=name,
        response=text or f"text of {name}",
        rubric=Rubric(
            criteria=criteria or (Criterion(id="long", text="Is long."), Criterion(id="hi", text="Says hi."))
        ),
        verdicts=verdicts,
    )


class FakeJudge:
    """Answers by a function of (response, criterion); remembers what it was asked."""

    template = "v1"

    def __init__(self, answer=lambda response, criterion: 1.0, name="fake"):
        self.name = name
        self.batches: list[list[JudgeRequest]] = []
        self.answer = answer

    def judge(self, requests):
        self.batches.append(list(requests))
        return [
            tuple(self._verdict(request.response, criterion) for criterion in request.criteria) for request in requests
        ]

    def _verdict(self, text, criterion):
        found = self.answer(text, criterion)
        if isinstance(found, str):
            return RawVerdict(criterion_id=criterion.id, masked=found, judge=self.name, raw="raw")
        return RawVerdict(criterion_id=criterion.id, value=found, judge=self.name, raw="raw")

    @property
    def asked(self):
        return [
            (request.response, criterion.id)
            for batch in self.batches
            for request in batch
            for criterion in request.criteria
        ]


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "l.sqlite") as opened:
        yield opened


def test_verdicts_are_filled_in_and_counted():
    def answer(text, criterion):
        if criterion.id == "long":
            return 0.25 if text.endswith("a") else "refusal: no"
        return 1.0

    judge = FakeJudge(answer)
    records, report = label([response("a"), response("b")], judge, batch_size=1)
    assert [record.response_id for record in records] == ["a", "b"]
    assert records[0].verdicts == (
        Verdict(criterion_id="long", value=0.25, judge="fake"),
        Verdict(criterion_id="hi", value=1.0, judge="fake"),
    )
    assert records[1].verdicts[0] == Verdict(criterion_id="long", masked="refusal: no", judge="fake")
    assert type(records[0].verdicts[0]) is Verdict
    assert len(judge.batches) == 2
    assert report.to_dict() == {
        "responses": 2,
        "verdicts": 4,
        "asked": 4,
        "reused": 0,
        "masked": {"refusal": 1},
        "waiting": 0,
        "mean_verdict": 0.75,  # (.25 + 1 + 1) / 3
        "agreement": None,
    }


def test_only_what_the_ledger_lacks_is_asked(ledger):
    first = FakeJudge()
    label([response("a", Criterion(id="hi", text="Says hi."))], first, ledger=ledger)
    second = FakeJudge(lambda text, criterion: 0.0)
    heavier = Criterion(id="greets", text="Says hi.", weight=5)
    records, report = label([response("a", heavier, Criterion(id="new", text="New."))], second, ledger=ledger)
    assert second.asked == [("text of a", "new")]
    # the old answer stands under the criterion's new id
    assert [(verdict.criterion_id, verdict.value) for verdict in records[0].verdicts] == [("greets", 1.0), ("new", 0.0)]
    assert (report.asked, report.reused) == (1, 1)


@pytest.mark.parametrize("change", ["judge", "template"])
def test_another_judge_or_template_is_asked_anew(ledger, change):
    label([response("a")], FakeJudge(), ledger=ledger)
    judge = FakeJudge(lambda text, criterion: 0.5, name="other" if change == "judge" else "fake")
    judge.template = "v2" if change == "template" else "v1"
    records, report = label([response("a")], judge, ledger=ledger)
    assert report.asked == 2 and records[0].values() == [0.5, 0.5]


def test_the_same_question_is_asked_once_without_any_ledger():
    judge = FakeJudge()
    records, report = label([response("a", text="same"), response("b", text="same")], judge)
    assert judge.asked == [("same", "long"), ("same", "hi")]
    assert records[1].values() == [1.0, 1.0]
    assert (report.asked, report.reused) == (2, 2)


def test_an_interrupted_run_goes_on_where_it_was(ledger):
    def interrupt(text, criterion):
        if text == "text of c":
            raise KeyboardInterrupt
        return 0.5

    records = [response(name) for name in "abcd"]
    with pytest.raises(KeyboardInterrupt):
        label(records, FakeJudge(interrupt), ledger=ledger, batch_size=1, progress=True)
    judge = FakeJudge(lambda text, criterion: 1.0)
    labelled, report = label(records, judge, ledger=ledger)
    assert judge.asked == [(f"text of {name}", criterion) for name in "cd" for criterion in ("long", "hi")]
    assert [record.values()[0] for record in labelled] == [0.5, 0.5, 1.0, 1.0]
    assert (report.asked, report.reused) == (4, 4)


def test_unusable_answers_are_kept_but_missing_ones_asked_again(ledger):
    def answer(text, criterion):
        return "parse_failure: odd" if criterion.id == "long" else "timeout: late"

    _, report = label([response("a")], FakeJudge(answer), ledger=ledger)
    assert report.masked == {"parse_failure": 1, "timeout": 1} and report.mean_verdict is None
    judge = FakeJudge()
    records, _ = label([response("a")], judge, ledger=ledger)
    assert judge.asked == [("text of a", "hi")]
    assert records[0].verdicts[0].masked == "parse_failure: odd" and records[0].verdicts[1].value == 1.0


def test_the_first_verdict_in_the_ledger_counts(ledger):
    """Another process answers while this one's judge is thinking."""

    class Overtaken(FakeJudge):
        def judge(self, requests):
            label([response("a")], FakeJudge(lambda text, criterion: 0.25), ledger=ledger)
            return super().judge(requests)

    records, _ = label([response("a")], Overtaken(), ledger=ledger)
    assert records[0].values() == [0.25, 0.25]


def test_raw_replies_reach_the_ledger(ledger):
    label([response("a")], FakeJudge(), ledger=ledger)
    stored = ledger._connection.execute("SELECT judge, template, raw FROM verdicts").fetchall()
    assert stored == [("fake", "v1", "raw")] * 2


class Streaming(FakeJudge):
    """Hands over one response at a time, the last first, and looks into the ledger in between."""

    most_criteria = None

    def __init__(self, path, *arguments):
        super().__init__(*arguments)
        self.path, self.kept = path, []

    def stream(self, requests):
        for place, request in reversed(list(enumerate(requests))):
            yield [(place, self.judge([request])[0])]
            with sqlite3.connect(self.path) as other:
                self.kept += other.execute("SELECT count(*) FROM verdicts").fetchone()


def test_what_a_streaming_judge_hands_over_is_kept_at_once(ledger):
    judge = Streaming(ledger.path, lambda text, criterion: 0.25 if text.endswith("a") else 1.0)
    records, report = label([response(name) for name in "abc"], judge, ledger=ledger, batch_size=99)
    assert judge.kept == [2, 4, 6]
    assert [record.values() for record in records] == [[0.25, 0.25], [1, 1], [1, 1]] and report.asked == 6


def test_a_streaming_judge_gets_no_more_criteria_than_it_takes(ledger):
    judge = Streaming(ledger.path, lambda text, criterion: 1.0 if criterion.id == "hi" else 0.0)
    judge.most_criteria = 1
    records, _ = label([response("a"), response("b")], judge, ledger=ledger)
    assert [len(request.criteria) for batch in judge.batches for request in batch] == [1, 1, 1, 1]
    assert records[0].values() == records[1].values() == [0, 1] and judge.kept == [1, 2, 3, 4]


def test_human_verdicts_stay_and_old_ones_go():
    old = (Verdict(criterion_id="hi", value=0.0, judge="old", human=1.0),)
    records, _ = label([response("a", verdicts=old)], FakeJudge(lambda text, criterion: 0.5))
    assert [(verdict.value, verdict.judge, verdict.human) for verdict in records[0].verdicts] == [
        (0.5, "fake", None),
        (0.5, "fake", 1.0),
    ]


def test_a_failing_judge_is_stopped_but_not_too_soon(ledger):
    judge = FakeJudge(lambda text, criterion: "timeout: no reply within 60 s")
    many = [response(f"r{number}") for number in range(100)]
    with pytest.raises(UserError) as caught:
        label(many, judge, max_masked=0.2, batch_size=1, ledger=ledger)
    assert len(judge.asked) == MIN_VERDICTS
    assert str(caught.value) == (
        "judge fake: 20 of 20 verdicts masked, more than max_masked 0.2 allows (latest: timeout: no reply within "
        "60 s); mend the judge (or its base_url) and resume, or raise max_masked"
    )


def test_a_small_run_is_measured_at_its_end_whoever_asked(ledger):
    """Nine responses of two criteria, fewer than MIN_VERDICTS: 9 of 18 answers cannot be read."""
    judge = FakeJudge(lambda text, criterion: "parse_failure: odd" if criterion.id == "long" else 1.0)
    few = [response(f"r{number}") for number in range(MIN_VERDICTS // 2 - 1)]
    for asked in (18, 0):  # nothing is asked again, and the share is what it was
        with pytest.raises(UserError, match=r"9 of 18 verdicts masked, more than max_masked 0\.4 allows"):
            label(few, judge, max_masked=0.4, ledger=ledger)
        assert len(judge.asked) == asked
        judge.batches.clear()
    _, report = label(few, judge, max_masked=0.5, ledger=ledger)
    assert (report.asked, report.masked) == (0, {"parse_failure": 9})


def test_masked_up_to_the_allowed_share_goes_on():
    judge = FakeJudge(lambda text, criterion: "refusal: x" if criterion.id == "long" else 1.0)
    records = [response(f"r{number}") for number in range(40)]
    _, report = label(records, judge, max_masked=0.5)
    assert report.masked == {"refusal": 40}


def test_a_judge_that_answers_out_of_order_is_caught():
    class Careless(FakeJudge):
        def judge(self, requests):
            return [tuple(reversed(verdicts)) for verdicts in super().judge(requests)]

    with pytest.raises(RuntimeError, match="must answer the criteria"):
        label([response("a")], Careless())


def test_progress_counts_verdicts_on_stderr(capsys):
    label([response("a"), response("b")], FakeJudge(), progress=True)
    shown = capsys.readouterr()
    assert "judging" in shown.err and "4/4" in shown.err and not shown.out
    label([response("a")], FakeJudge())
    assert not capsys.readouterr().err


class Undecided(FakeJudge):
    """Its answers to one question, one after the other; a text is a reason for masking."""

    def __init__(self, script):
        super().__init__(self._next)
        self.script = {question: list(answers) for question, answers in script.items()}

    def _next(self, text, criterion):
        return self.script[text, criterion.id].pop(0)


SCRIPT = {
    ("text of a", "long"): [1.0, 0.0, 1.0],
    ("text of a", "hi"): [1.0, "parse_failure: odd", 1.0],
    ("text of b", "long"): [0.0, 0.0, 0.0],
    ("text of b", "hi"): ["refusal: no", "parse_failure: odd", "refusal: no"],
}


def test_votes_become_one_verdict_with_its_count_and_stay_apart_in_the_ledger(ledger):
    judge = Undecided(SCRIPT)
    records, report = label([response("a"), response("b")], judge, ledger=ledger, votes=3)
    a, b = records
    assert a.values() == [pytest.approx(2 / 3), 1.0] and b.values()[0] == 0.0
    assert b.verdicts[1].masked == "refusal: no; parse_failure: odd" and b.verdicts[1].judge == "fake"
    assert 1 < a.counts()[1] < a.counts()[0] == b.counts()[0] < 3
    assert (report.verdicts, report.asked, report.reused, report.masked) == (4, 12, 0, {"refusal": 1})
    assert [(row["criterion"], row["self_consistency"]) for row in report.agreement["criteria"]] == [
        ("Is long.", pytest.approx(4 / 6)),  # one of three pairs, and three of three
        ("Says hi.", 1.0),
    ]
    stored = ledger._connection.execute("SELECT vote, count(*) FROM verdicts GROUP BY vote").fetchall()
    assert stored == [(0, 4), (1, 4), (2, 4)]


def test_the_votes_on_a_response_are_separate_requests_side_by_side():
    judge = FakeJudge()
    label([response("a"), response("b")], judge, votes=2, batch_size=3)
    assert [[request.response for request in batch] for batch in judge.batches] == [
        ["text of a", "text of a", "text of b"],
        ["text of b"],
    ]
    assert all(len(request.criteria) == 2 for batch in judge.batches for request in batch)


def test_more_votes_and_interrupted_ones_ask_only_what_is_missing(ledger):
    label([response("a")], FakeJudge(), ledger=ledger)
    judge = FakeJudge(lambda text, criterion: 0.0)
    records, report = label([response("a")], judge, ledger=ledger, votes=2)
    assert len(judge.asked) == 2 and (report.asked, report.reused) == (2, 2)
    assert records[0].values() == [0.5, 0.5]
    again, report = label([response("a"), response("twin", text="text of a")], FakeJudge(), ledger=ledger, votes=2)
    assert (report.asked, report.reused) == (0, 8) and again[1].values() == [0.5, 0.5]
    assert report.agreement["questions"] == 2  # a question that two responses share is one


def test_nothing_to_judge_is_no_error():
    assert label([], FakeJudge(), votes=3)[0] == []


class Scripted:
    """An engine that brings ``batches`` of (response, verdict of its only criterion) and heeds no stop."""

    name, template, spent = "fake", "v1", None

    def __init__(self, *batches):
        self.batches = batches
        self.stopped = []

    def ask(self, questions, stop):
        by_text = {question.request.response: question for question in questions}
        for batch in self.batches:
            answers = []
            for text, found in batch:
                given = {"masked": found} if isinstance(found, str) else {"value": found}
                answers.append((by_text[text], (Verdict(criterion_id="hi", judge="fake", **given),)))
            yield answers
            self.stopped.append(stop.is_set())


HI = Criterion(id="hi", text="Says hi.")


def test_what_is_under_way_when_the_budget_ends_is_kept(ledger):
    engine = Scripted([("a", "budget: max_calls 1 is spent")], [("b", 1.0)])
    with pytest.raises(UserError, match="max_calls 1 is spent; 1 of 3 verdicts are in the ledger; --resume true"):
        label_by([response(name, HI, text=name) for name in "abc"], engine, ledger=ledger)
    assert engine.stopped == [True, True]
    assert [q.request.response for q in open_questions([response(n, HI, text=n) for n in "abc"], engine, ledger)] == [
        "a",
        "c",
    ]


def test_a_question_that_an_engine_leaves_out_is_waiting_and_not_in_the_ledger(ledger):
    records = [response(name, HI, text=name) for name in "ab"]
    labelled, report = label_by(records, Scripted([("b", 0.5)]), ledger=ledger)
    assert [record.verdicts[0].value for record in labelled] == [None, 0.5]
    assert labelled[0].verdicts[0].masked == "waiting: no reply so far"
    assert (report.asked, report.reused, report.masked, report.waiting) == (1, 0, {}, 1)
    assert len(open_questions(records, Scripted(), ledger)) == 1


def test_a_resumed_run_is_judged_by_all_answers_not_by_those_it_asks_again(ledger):
    many = [response(f"r{number}") for number in range(100)]
    label(many, FakeJudge(), ledger=ledger)
    more = [*many, *(response(f"s{number}") for number in range(MIN_VERDICTS))]
    refusing = FakeJudge(lambda text, criterion: "rejected: content filter" if text.startswith("text of s") else 1.0)
    _, report = label(more, refusing, max_masked=0.3, ledger=ledger)
    assert report.masked == {"rejected": 2 * MIN_VERDICTS}
    with pytest.raises(UserError, match=r"more than max_masked 0\.1 allows"):
        label(more, refusing, max_masked=0.1, ledger=ledger)
