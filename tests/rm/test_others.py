"""Other predictors beside the model: what is read of them, and what is said of the two."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from rm.audit import audit, prediction_lines, run_audit
from rm.calibration import Calibration
from rm.config import AuditConfig
from rm.others import named
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

NOTHING = {"value": None, "low": None, "high": None}


def judged_response(prompt, number, values):
    criteria = tuple(Criterion(id=f"c{i}", text=f"{prompt} asks {i}") for i in range(len(values)))
    return JudgedResponse(
        prompt_id=prompt,
        prompt=prompt,
        response_id=f"{prompt}-{number}",
        response=f"response {number}",
        rubric=Rubric(criteria=criteria),
        verdicts=tuple(Verdict(criterion_id=f"c{i}", value=value) for i, value in enumerate(values)),
        split="test",
    )


# rewards by the judge: 1, .5, 0 and 1, 0
RECORDS = [
    *(judged_response("a", i, values) for i, values in enumerate([(1, 1), (1, 0), (0, 0)])),
    *(judged_response("b", i, values) for i, values in enumerate([(1, 1), (0, 0)])),
]
MODEL = [np.array(probs) for probs in [(0.9, 0.8), (0.7, 0.4), (0.1, 0.2), (0.6, 0.6), (0.4, 0.2)]]
PLAIN = [np.array(probs) for probs in [(0.9, 0.7), (0.2, 0.4), (0.3, 0.2), (0.6, 0.6), (0.4, 0.9)]]
SCALAR = np.array([-3.0, 250.0, -9.5, 0.001, -0.001])  # a: places 2, 3, 1 of 3; b: right

beside = partial(audit, RECORDS, {"model": MODEL, "plain": PLAIN, "bt": SCALAR}, others=("plain", "bt"), bootstrap=50)


def test_rewards_alone_are_ranked_and_nothing_else():
    found = beside()["predictors"]["bt"]
    assert found["criterion"] == dict.fromkeys(found["criterion"], NOTHING) | {
        "reliability": [],
        "reliability_by_width": [],
    }
    assert found["reward"]["bias"] == NOTHING
    assert {row["proxy"]["value"] for row in found["reward"]["by_quantile"]} == {None}
    # of a's pairs it has first and second wrong, the others right; b's is right
    assert found["reward"]["pair_accuracy"]["half"]["value"] == 0.75
    # ranks 2 3 1 against 3 2 1: rho 1/2, tau 1/3; 1 in b
    assert found["reward"]["spearman"]["value"] == 0.75
    assert found["reward"]["kendall"]["value"] == pytest.approx((1 / 3 + 1) / 2, abs=1e-6)
    # its first of a has .5 less than the best
    assert found["reward"]["regret"]["2"]["value"] == pytest.approx(0.5 / 3 / 2, abs=1e-6)


def test_rewards_on_another_scale_are_the_same_predictor():
    moved = audit(RECORDS, {"model": MODEL, "bt": np.exp(SCALAR / 100) * 1e6}, bootstrap=50)
    assert moved["predictors"]["bt"] == beside()["predictors"]["bt"]


def test_differences_are_of_the_same_resamples():
    found = beside()
    minus, ours, theirs = found["model_minus"]["bt"], *(found["predictors"][name] for name in ("model", "bt"))
    assert minus["auroc"] == NOTHING
    assert minus["pair_accuracy"]["value"] == 0.25
    assert minus["regret"]["2"]["value"] == -theirs["reward"]["regret"]["2"]["value"]
    # the model is right on every pair of every resample, so its lead mirrors what the other lacks
    assert ours["reward"]["pair_accuracy"]["half"]["low"] == 1
    lacks = theirs["reward"]["pair_accuracy"]["half"]
    assert (minus["pair_accuracy"]["low"], minus["pair_accuracy"]["high"]) == (1 - lacks["high"], 1 - lacks["low"])


def test_where_two_that_answer_are_furthest_apart():
    rows = beside()["others"]["plain"]["disagreements"]
    assert [(row["response_id"], row["criterion_id"]) for row in rows] == [
        ("b-1", "c1"),  # .2 and .9
        ("a-1", "c0"),  # .7 and .2
        ("a-2", "c0"),  # .1 and .3
        ("a-0", "c1"),  # .8 and .7; they agree on b-0
    ]
    assert [rows[0][key] for key in ("judged", "predicted", "other")] == [0, 0.2, 0.9]


def test_where_the_model_and_rewards_alone_are_furthest_apart():
    found = beside()["others"]["bt"]
    assert not found["answers"]
    first, second = found["disagreements"]  # of a the last is in the last place by both, and b's order is the same
    assert {first["response_id"], second["response_id"]} == {"a-0", "a-1"}
    row = next(row for row in (first, second) if row["response_id"] == "a-1")
    assert (row["judged"], row["predicted"], row["other"]) == (0.5, 0.55, 250)
    assert row["places"] == {"judged": 0.5, "predicted": 0.5, "other": pytest.approx(5 / 6, abs=1e-6)}


def test_predictions_that_only_rank_stand_apart_in_the_lines():
    line = json.loads(prediction_lines(RECORDS, {"model": MODEL, "bt": SCALAR}).splitlines()[3])
    assert (line["response_id"], line["predicted"], line["rewards"]) == ("a-1", {"model": 0.4}, {"bt": 250.0})


def test_predictions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'bt' is missing among 'model'"):
        audit(RECORDS, {"model": MODEL}, others=("bt",))
    with pytest.raises(ValueError, match="'model' must answer criteria"):
        audit(RECORDS, {"model": SCALAR})
    for wrong in (SCALAR[:4], SCALAR * math.nan, SCALAR[:, None]):
        with pytest.raises(ValueError, match="predictions 'bt'"):
            audit(RECORDS, {"model": MODEL, "bt": wrong})


@pytest.mark.parametrize(
    ("given", "fault"),
    [("runs/a", "not NAME=PATH"), ("=runs/a", "not NAME=PATH"), ("length=runs/a", "'length' is taken")],
)
def test_names_are_checked(given, fault):
    with pytest.raises(UserError, match=fault):
        named([given], {"length"})
    with pytest.raises(UserError, match="'a' is taken"):
        named(["a=x", "a=y"], set())
    assert {name: str(path) for name, path in named(["a b = x=1", "c=y"], set()).items()} == {"a b": "x=1", "c": "y"}


class Half:
    """A scorer that says one half of everything, or a quarter in folder `other`."""

    model = SimpleNamespace(base="backbone", max_length=512)
    calibration = Calibration()

    def __init__(self, prob):
        self.prob = prob

    @classmethod
    def from_pretrained(cls, path, **options):
        if str(path) not in ("model", "other"):
            raise UserError(f"{path}: is no reward model")
        return cls(0.5 if str(path) == "model" else 0.25)

    def score_records(self, records, *, progress=False):
        sizes = [len(record.rubric.criteria) for record in records]
        return [SimpleNamespace(probs=np.full(k, self.prob), logits=np.zeros(k), truncated=0) for k in sizes]


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr("rm.scorer.RubricScorer", Half)
    write_judged(tmp_path / "judged.jsonl", RECORDS)

    def start(*others):
        settled = {"data": str(tmp_path / "judged.jsonl"), "output": str(tmp_path / "run"), "zero_shot": False}
        return run_audit(AuditConfig(model="model", others=list(others), bootstrap=20, **settled))

    return start


def reward_lines(path, rewards):
    rows = [
        {"prompt_id": r.prompt_id, "response_id": r.response_id, "reward": reward, "criteria": None}
        for r, reward in zip(RECORDS, rewards, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_model_and_a_file_stand_beside_the_model(run, tmp_path, capsys):
    reward_lines(tmp_path / "bt.jsonl", SCALAR.tolist())
    result = run("other one=other", f"bt={tmp_path / 'bt.jsonl'}")
    assert list(result["predictors"]) == ["model", "model (raw)", "other one", "bt"]
    assert result["facts"]["others"] == {"other one": "other", "bt": str(tmp_path / "bt.jsonl")}
    # five verdicts are met, five are not
    brier = result["predictors"]["other one"]["criterion"]["brier"]["value"]
    assert brier == pytest.approx((0.75**2 + 0.25**2) / 2, abs=1e-6)
    assert "Side by side with other one" in (tmp_path / "run" / "audit.html").read_text(encoding="utf-8")
    assert "Beside bt, " in capsys.readouterr().out


def test_bad_others_leave_no_run(run, tmp_path):
    reward_lines(tmp_path / "bt.jsonl", [1, 2, math.nan, 4, 5])
    (tmp_path / "bt.csv").write_text("reward\n1\n")
    for given, fault in (
        (f"bt={tmp_path / 'bt.jsonl'}", "neither criteria nor a finite reward"),
        (f"bt={tmp_path / 'bt.csv'}", "no file of scores"),
        (f"bt={tmp_path / 'nothing.jsonl'}", "cannot be read as scores"),
        ("bt=elsewhere", "is no reward model"),
        ("model=other", "is taken"),
    ):
        with pytest.raises(UserError, match=fault):
            run(given)
    assert not (tmp_path / "run").exists()
