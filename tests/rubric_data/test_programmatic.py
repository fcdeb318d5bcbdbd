import pytest

from rubric_data.builtin import load_builtin
from rubric_data.errors import UserError
from rubric_data.judges import JudgeRequest, masked_verdicts
from rubric_data.labelling import label
from rubric_data.ledger import Ledger, verdict_key
from rubric_data.programmatic import CodeFirst, answer_by_code, is_for_judge
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict, Verifier
from rubric_data.verifiers import VerifierJudge

TONE = Criterion(id="tone", text="Is friendly.", weight=2)
DIGIT = Criterion(id="digit", text="Has a digit.", verifier=Verifier(name="has_digit"))
ASKS = Criterion(id="asks", text="Asks nothing.", weight=1, verifier=Verifier(name="no_question"))


def response(name="r", text="Take 3.", criteria=(TONE, DIGIT, ASKS), verdicts=()):
    rubric = Rubric(criteria=criteria)
    return JudgedResponse(
        prompt_id="p", prompt="p", response_id=name, response=text, rubric=rubric, verdicts=tuple(verdicts)
    )


class Model:
    """Says 0.25 to everything, and remembers what it was asked."""

    name, template = "model", "v1"

    def __init__(self):
        self.asked = []

    def judge(self, requests):
        self.asked += [(request.response, [c.id for c in request.criteria]) for request in requests]
        return [
            tuple(Verdict(criterion_id=c.id, value=0.25, judge=self.name) for c in request.criteria)
            for request in requests
        ]


def test_code_fills_and_corrects_and_leaves_the_rest():
    records = [
        response("none"),
        response(
            "some",
            "No number?",
            verdicts=[
                Verdict(criterion_id="tone", value=0.75, judge="big"),
                Verdict(criterion_id="digit", value=1.0, judge="big", human=0.0),
                *masked_verdicts([ASKS], "timeout", "60 s", judge="big"),
            ],
        ),
    ]
    answered, report = answer_by_code(records)
    assert answered[0].values()[1:] == [1.0, 1.0] and len(answered[0].verdicts) == 2
    assert answered[1].values() == [0.75, 0.0, 0.0]
    assert [verdict.judge for verdict in answered[1].verdicts] == ["big", "verifier", "verifier"]
    assert answered[1].verdicts[1].human == 0.0
    assert (report.verdicts, report.filled, report.corrected) == (4, 3, 1)
    again, report = answer_by_code(answered)
    assert again == answered and (report.filled, report.corrected) == (0, 0)


def test_the_ledger_holds_code_under_its_own_name(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        answer_by_code([response()], ledger=ledger)
        key = verdict_key("p", "Take 3.", DIGIT, VerifierJudge.name, VerifierJudge.template, 0)
        assert ledger.get(key).value == 1.0
        _, report = label([response()], VerifierJudge(), ledger=ledger)
        assert (report.asked, report.reused) == (1, 2)  # what has no verifier


def test_one_judge_in_front_of_another_asks_it_what_code_cannot_answer():
    model = Model()
    judge = CodeFirst(model)
    requests = [
        JudgeRequest("p", "Take 3.", (DIGIT, TONE, ASKS)),
        JudgeRequest("p", "Take it?", (ASKS, DIGIT)),
        JudgeRequest("p", "Hm", (TONE,)),
    ]
    verdicts = judge.judge(requests)
    assert [[(v.criterion_id, v.value, v.judge) for v in row] for row in verdicts] == [
        [("digit", 1.0, "verifier"), ("tone", 0.25, "model"), ("asks", 1.0, "verifier")],
        [("asks", 0.0, "verifier"), ("digit", 0.0, "verifier")],
        [("tone", 0.25, "model")],
    ]
    assert model.asked == [("Take 3.", ["tone"]), ("Hm", ["tone"])]
    assert "verifier" in judge.name and "model" in judge.name and judge.template.endswith("v1")
    assert judge.judge([requests[1]]) == verdicts[1:2]  # nothing left to ask, so nobody is
    guard = ASKS.model_copy(update={"veto": True})
    (row,) = CodeFirst(model, "vetoes").judge([JudgeRequest("p", "Take 3.", (DIGIT, guard))])
    assert [(v.criterion_id, v.value, v.judge) for v in row] == [("digit", 0.25, "model"), ("asks", 1.0, "verifier")]


def test_chosen_criteria_only_are_asked_and_counted():
    model = Model()
    before = Verdict(criterion_id="digit", value=0.5, judge="old")
    labelled, report = label([response(verdicts=[before])], model, only=is_for_judge)
    assert model.asked == [("Take 3.", ["tone"])]
    assert [(v.criterion_id, v.value) for v in labelled[0].verdicts] == [("tone", 0.25), ("digit", 0.5)]
    assert (report.verdicts, report.asked, report.mean_verdict) == (1, 1, 0.25)


def test_a_broken_verifier_is_found_before_any_work_with_its_place(tmp_path):
    broken = Criterion(id="many", text="Many.", verifier=Verifier(name="words", args={"minimum": 3}))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(UserError, match="response 'b', criterion 'many': verifier 'words': argument 'minimum'"):
            answer_by_code([response("a"), response("b", criteria=(TONE, broken))], ledger=ledger)
        key = verdict_key("p", "Take 3.", DIGIT, VerifierJudge.name, VerifierJudge.template, 0)
        assert ledger.get(key) is None


def test_every_embedded_criterion_is_programmatic():
    assert not any(map(is_for_judge, (c for record in load_builtin() for c in record.rubric.criteria)))
