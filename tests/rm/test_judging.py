import itertools
import json

import pytest

from policy import cli
from rm import judging
from rm.judging import build_judge, run_judge
from rubric_data.config import JudgeConfig
from rubric_data.errors import UserError
from rubric_data.io import read_judged, write_judged
from rubric_data.judges import masked_verdicts
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict, Verifier
from rubric_data.split import check_leaks
from tests.rubric_data.server import Server, completion, failure


class FakeJudge:
    """Met if the response holds the criterion's text; fails in a way the test says."""

    name = "fake"
    template = "v1"

    def __init__(self):
        self.asked = []
        self.die_at = None
        self.masked = None

    def judge(self, requests):
        return [tuple(self._answer(request, criterion) for criterion in request.criteria) for request in requests]

    def _answer(self, request, criterion):
        if len(self.asked) == self.die_at:
            raise KeyboardInterrupt
        self.asked.append((request.response, criterion.id))
        if self.masked:
            return masked_verdicts([criterion], self.masked, "scripted", judge=self.name)[0]
        return Verdict(criterion_id=criterion.id, value=float(criterion.text in request.response), judge=self.name)


@pytest.fixture
def judge(monkeypatch):
    fake = FakeJudge()
    monkeypatch.setattr(judging, "build_judge", lambda config: fake)
    return fake


def responses(prompts=40, *, rubric=None, split=None):
    return [
        JudgedResponse(
            prompt_id=f"p{number}",
            prompt=f"prompt {number}",
            response_id=f"p{number}::a",
            response="hi" if number % 2 else "hi you",
            rubric=Rubric(
                criteria=(
                    Criterion(id="hi", text="hi"),
                    Criterion(id="you", text=rubric or "you", tags=(rubric or str(number),)),
                )
            ),
            split=split,
        )
        for number in range(prompts)
    ]


def data(folder, records):
    write_judged(folder / "data.jsonl", records)
    return str(folder / "data.jsonl")


def config(folder, records, **changes):
    """A run with any judge but code, which would not be asked."""
    changes = {"judge": "local"} | changes
    return JudgeConfig(output=str(folder / "run"), data=data(folder, records), **changes)


def test_a_run_writes_verdicts_splits_and_a_report(tmp_path, judge):
    report = run_judge(config(tmp_path, responses()))
    judged = read_judged(tmp_path / "run" / "judged.jsonl")
    assert [record.values() for record in judged[:2]] == [[1, 1], [1, 0]]
    check_leaks(judged)
    assert report == {
        "judge": "fake",
        "template": "v1",
        "data": str(tmp_path / "data.jsonl"),
        "splits": {"train": 28, "validation": 4, "test": 8},
        "responses": 40,
        "verdicts": 80,
        "asked": 80,
        "reused": 0,
        "masked": {},
        "mean_verdict": 0.75,  # every 'hi' and half of the 'you'
        "by_code": {"verdicts": 0, "filled": 0, "corrected": 0},
        "agreement": None,
        "spent": None,
    }
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report


def test_an_interrupted_run_resumes_and_pays_once(tmp_path, judge):
    settings = config(tmp_path, responses())
    judge.die_at = 40
    with pytest.raises(KeyboardInterrupt):
        run_judge(settings)
    with pytest.raises(UserError, match="--resume"):
        run_judge(settings)
    judge.die_at = None
    kept = 32  # verdicts of the one batch of 16 responses that was whole
    report = run_judge(JudgeConfig(**(vars(settings) | {"resume": True})))
    assert (report["asked"], report["reused"]) == (80 - kept, kept)
    again = run_judge(JudgeConfig(**(vars(settings) | {"resume": True})))
    assert (again["asked"], again["reused"], again["mean_verdict"]) == (0, 80, 0.75)


def test_a_ledger_is_shared_between_runs(tmp_path, judge):
    shared = str(tmp_path / "shared.sqlite")
    run_judge(config(tmp_path, responses(), ledger=shared, limit=10))
    second = config(tmp_path, responses(), ledger=shared)
    second.output = str(tmp_path / "second")
    report = run_judge(second)
    assert (report["asked"], report["reused"]) == (60, 20)
    assert not (tmp_path / "second" / "ledger.sqlite").exists()


def test_a_limited_run_keeps_the_splits_of_the_whole(tmp_path, judge):
    run_judge(config(tmp_path, responses()))
    whole = {record.prompt_id: record.split for record in read_judged(tmp_path / "run" / "judged.jsonl")}
    limited = config(tmp_path, responses(), limit=7)
    limited.output = str(tmp_path / "limited")
    assert run_judge(limited)["responses"] == 7
    judged = read_judged(tmp_path / "limited" / "judged.jsonl")
    assert [record.split for record in judged] == [whole[record.prompt_id] for record in judged]


def test_given_splits_are_kept(tmp_path, judge):
    assert run_judge(config(tmp_path, responses(split="test")))["splits"] == {"test": 40}


def test_one_rubric_for_all_is_judged_without_splits_and_says_so(tmp_path, judge, caplog):
    report = run_judge(config(tmp_path, responses(rubric="you")))
    assert report["splits"] == {"none": 40} and report["mean_verdict"] == 0.75
    assert "no splits are given; before training, let 'rubric-rm data split --shared_rubrics true'" in caplog.text


def test_a_trial_on_two_prompts_says_nothing_of_splits(tmp_path, judge, caplog):
    assert run_judge(config(tmp_path, responses(2)))["splits"] == {"none": 2}
    assert not caplog.text


def test_splits_on_some_responses_only_are_refused(tmp_path, judge):
    mixed = [*responses(2, split="train"), *responses(5)[2:]]
    with pytest.raises(UserError, match="2 of 5 records carry a split"):
        run_judge(config(tmp_path, mixed))


def test_a_failing_judge_stops_the_run_and_can_be_resumed(tmp_path, judge):
    settings = config(tmp_path, responses())
    judge.masked = "timeout"
    with pytest.raises(UserError, match="32 of 32 verdicts masked"):
        run_judge(settings)
    judge.masked = None
    report = run_judge(JudgeConfig(**(vars(settings) | {"resume": True})))
    assert report["asked"] == 80 and report["masked"] == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": 0}, "limit: must be at least 1"),
        ({"max_masked": 1.5}, "max_masked: must be a share"),
        ({"votes": 0}, "votes: must be at least 1, got 0; raise it"),
        ({"votes": 3}, "votes: the local judge answers a question the same way every time; leave votes at 1"),
        ({"votes": 3, "judge": "systemone", "model": "m"}, "votes: the systemone judge answers a question the"),
        ({"votes": 3, "judge": "openai", "model": "m"}, "votes: at temperature 0 every vote is the same; add --temp"),
        (
            {"votes": 3, "judge": "openai", "model": "m", "temperature": 1.0, "mode": "logprobs"},
            "votes: mode logprobs tells how likely each answer is in one call",
        ),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"judge": "oracle"}, "unknown judge 'oracle'"),
        ({"ledger": "rusn/mine.sqlite"}, "there is no folder rusn; correct the path"),
        ({"judge": "openai", "model": "m", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"judge": "systemone"}, "model: the systemone judge needs the model's name at the endpoint"),
        ({"judge": "openai", "model": "m", "max_cost": 1.0}, "max_cost needs prices"),
        (
            {"judge": "verifier", "base_url": "http://h/v1"},
            "base_url: the verifier judge does not read it; leave it out",
        ),
        (
            {"judge": "systemone", "model": "m", "base_url": "http://h/v1", "mode": "schema"},
            "mode: .* add --judge openai",
        ),
        ({"workers": 4}, "workers: the threads engine does not read it; leave it out, or add --engine ray"),
    ],
)
def test_bad_settings_leave_no_run_behind(tmp_path, changes, said, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    settings = JudgeConfig(**(vars(config(tmp_path, responses(3))) | changes))
    with pytest.raises(UserError, match=said):
        run_judge(settings)
    assert not (tmp_path / "run").exists()


def test_a_failed_run_may_be_resumed_with_other_limits_but_not_another_question(tmp_path, judge):
    settings = config(tmp_path, responses())
    judge.masked = "timeout"
    with pytest.raises(UserError, match="masked"):
        run_judge(settings)
    patient = vars(settings) | {"resume": True, "attempts": 9, "max_masked": 1.0, "max_calls": 500}
    assert run_judge(JudgeConfig(**patient))["masked"] == {"timeout": 80}
    with pytest.raises(UserError, match="cannot resume, as temperature is"):
        run_judge(JudgeConfig(**(patient | {"temperature": 0.5})))


def test_a_prompt_in_two_splits_is_refused_before_anybody_is_asked(tmp_path, judge):
    leaking = [*responses(1, split="train"), responses(1, split="test")[0].model_copy(update={"response_id": "b"})]
    with pytest.raises(UserError, match="stands in train and in test"):
        run_judge(config(tmp_path, leaking))
    assert not judge.asked and not (tmp_path / "run").exists()


def test_two_rubrics_for_one_prompt_are_told_of(tmp_path, judge, caplog):
    first, other = responses(2, split="train")
    run_judge(config(tmp_path, [first, other.model_copy(update={"prompt_id": "p0", "prompt": first.prompt})]))
    assert "1 prompt(s) have responses under different rubrics, the first is 'p0'" in caplog.text


def test_an_unknown_check_is_named_with_its_place_before_the_run(tmp_path):
    record = responses(1)[0]
    odd = Rubric(criteria=(Criterion(id="c", text="c", verifier=Verifier(name="word", args={})),))
    settings = config(tmp_path, [record.model_copy(update={"rubric": odd})])
    with pytest.raises(UserError, match="response 'p0::a', criterion 'c': verifier 'word': no such check; did you"):
        run_judge(settings)
    assert not (tmp_path / "run").exists()


def test_a_spent_budget_stops_and_the_rest_is_asked_on_resuming(tmp_path, judge):
    settings = config(tmp_path, responses())
    judge.masked = "budget"
    with pytest.raises(UserError, match="scripted; 0 of 80 verdicts are in the ledger; --resume true goes on"):
        run_judge(settings)
    judge.masked = None
    assert run_judge(JudgeConfig(**(vars(settings) | {"resume": True})))["asked"] == 80


def over_http(tmp_path, monkeypatch, url, *options):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    fixed = ["--data", data(tmp_path, responses(6)), "--output", str(tmp_path / "run"), "--judge", "openai"]
    return cli.main(["judge", *fixed, "--model", "m", "--base_url", url, "--attempts", "1", *options])


@pytest.mark.parametrize("options", [(), ("--mode", "logprobs")])
def test_a_wrong_key_or_server_leaves_nothing_in_the_way_of_the_next_try(tmp_path, monkeypatch, capsys, options):
    refusing = Server([failure(401)])
    for url, said in ((refusing.url, "scripted 401"), ("http://127.0.0.1:1/v1", "12 of 12 verdicts masked")):
        assert over_http(tmp_path, monkeypatch, url, *options) == 2
        assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()
    refusing.close()


def test_what_was_spent_adds_up_over_invocations(tmp_path, monkeypatch, capsys):
    met = [{"id": "1", "met": True}, {"id": "2", "met": False}]
    status, headers, body = completion(json.dumps({"answers": met}))
    body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
    server = Server([(status, headers, body)])
    priced = ("--price_in", "10000")
    assert over_http(tmp_path, monkeypatch, server.url, "--max_calls", "4", "--concurrency", "1", *priced) == 2
    assert "max_calls 4 is spent; 8 of 12 verdicts are in the ledger" in " ".join(capsys.readouterr().err.split())
    assert over_http(tmp_path, monkeypatch, server.url, "--resume", "true") == 0
    server.close()
    spent = json.loads((tmp_path / "run" / "report.json").read_text())["spent"]
    assert [(spent[name]["calls"], spent[name]["tokens_in"]) for name in spent] == [(2, 200), (6, 600)]
    assert [spent[name]["cost"] for name in ("this_run", "total")] == [None, None]  # 400 of 600 tokens had a price
    shown = capsys.readouterr().out
    assert "spent.this_run: calls 2, retries 0, tokens_in 200, tokens_out 20, unmetered 0\n" in shown
    assert "agreement" not in shown and "None" not in shown.partition("judge: openai")[2]


def test_votes_are_asked_over_http_merged_and_compared(tmp_path, monkeypatch, capsys):
    """On the command line, through a loopback server that says yes to 'hi' always and to 'you' every second time."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    calls = itertools.count()

    def reply(body):
        met = [{"id": "1", "met": True}, {"id": "2", "met": next(calls) % 2 == 0}]
        return completion(json.dumps({"answers": met}))

    server = Server([reply])
    try:
        output = str(tmp_path / "run")
        options = f"--judge openai --model m --base_url {server.url} --temperature 1 --votes 4 --concurrency 1".split()
        path = data(tmp_path, responses(12, rubric="you", split="test"))
        assert cli.main(["judge", "--data", path, "--output", output, *options]) == 0
    finally:
        server.close()
    assert len(server.requests) == 12 * 4
    judged = read_judged(tmp_path / "run" / "judged.jsonl")
    # 'you' is a coin: its four votes are worth more than one answer, and its target is undecided
    assert {tuple(record.values()) for record in judged} == {(1.0, 0.5)} and judged[0].counts()[1] > 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["asked"], report["agreement"]["flagged"]) == (96, 1)
    worst = report["agreement"]["criteria"][0]
    assert (worst["criterion"], worst["questions"], worst["self_consistency"]) == ("you", 12, pytest.approx(1 / 3))
    assert worst["flagged"] and worst["alpha"] < 0
    assert "1 of 2 criteria flagged" in capsys.readouterr().out


def test_openai_settings_reach_the_judge():
    judge = build_judge(JudgeConfig(output="x", judge="openai", model="m", base_url="http://h:1/v1", temperature=None))
    assert judge.name == "openai:m@h:1/v1?temperature=None"


def test_the_verifier_answers_exactly(tmp_path):
    """Real judge, hand-made responses: 'one two three' keeps to three words, the other does not."""
    rubric = Rubric(
        criteria=(
            Criterion(
                id="short",
                text="No sentence has more than three words.",
                verifier=Verifier(name="max_sentence_words", args={"max": 3}),
            ),
            Criterion(id="kind", text="Is kind."),
        )
    )
    records = [
        JudgedResponse(prompt_id="p", prompt="Count.", response_id=text, response=text, rubric=rubric, split="test")
        for text in ("one two three", "one two three four")
    ]
    report = run_judge(config(tmp_path, records, judge="verifier", max_masked=0.5))
    judged = read_judged(tmp_path / "run" / "judged.jsonl")
    assert [record.verdicts[0].value for record in judged] == [1.0, 0.0]
    assert {record.verdicts[1].masked.partition(":")[0] for record in judged} == {"no_verifier"}
    assert report["judge"] == "verifier" and report["masked"] == {"no_verifier": 2}


# --- criteria that code answers --------------------------------------------------------------------------------------


def with_verifiers(prompts=4):
    check = Criterion(id="digit", text="digit", verifier=Verifier(name="has_digit"))
    return [
        record.model_copy(
            update={
                "response": f"hi {number}" if number % 2 else "hi you",
                "rubric": Rubric(criteria=(*record.rubric.criteria, check)),
            }
        )
        for number, record in enumerate(responses(prompts, split="train"))
    ]


def test_any_judge_is_spared_what_code_can_answer(tmp_path, judge):
    shared = str(tmp_path / "shared.sqlite")
    report = run_judge(config(tmp_path, with_verifiers(), ledger=shared))
    judged = read_judged(tmp_path / "run" / "judged.jsonl")
    assert {name for _, name in judge.asked} == {"hi", "you"}
    assert [[(v.value, v.judge) for v in record.verdicts] for record in judged[:2]] == [
        [(1, "fake"), (1, "fake"), (0, "verifier")],
        [(1, "fake"), (0, "fake"), (1, "verifier")],
    ]
    assert (report["verdicts"], report["asked"], report["mean_verdict"]) == (8, 8, 0.75)
    assert report["by_code"] == {"verdicts": 4, "filled": 4, "corrected": 0}
    resumed = run_judge(JudgeConfig(**(vars(config(tmp_path, with_verifiers(), ledger=shared)) | {"resume": True})))
    assert (resumed["asked"], resumed["by_code"]["verdicts"]) == (0, 4)


def test_the_switch_leaves_everything_to_the_judge(tmp_path, judge):
    report = run_judge(config(tmp_path, with_verifiers(), use_verifiers=False))
    assert {name for _, name in judge.asked} == {"hi", "you", "digit"}
    assert report["verdicts"] == 12 and report["by_code"] is None


def test_a_broken_verifier_stops_the_run_before_anybody_is_asked(tmp_path, judge):
    broken = Criterion(id="digit", text="digit", verifier=Verifier(name="has_digits"))
    records = [r.model_copy(update={"rubric": Rubric(criteria=(broken,))}) for r in responses(2, split="train")]
    with pytest.raises(UserError, match=r"response 'p0::a', criterion 'digit': .* did you mean 'has_digit'"):
        run_judge(config(tmp_path, records))
    assert not judge.asked and not (tmp_path / "run").exists()
