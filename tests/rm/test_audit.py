"""The golden audit is written anew by `python tests/rm/test_audit.py`; look at the difference before keeping it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.audit import audit, prediction_lines, run_audit
from rm.calibration import Calibration
from rm.config import AuditConfig
from rm.sides import Table, pair_sets
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.ledger import Entry, Ledger, verdict_key
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

GOLDEN = Path(__file__).parent.parent / "golden" / "audit.json"
TAGS = ("format", "content")


def response(prompt, number, values, *, weights=(2.0, 1.0, 1.0), generator="g"):
    """Response ``number`` to ``prompt``; ``values`` are its verdicts, None where masked."""
    rubric = Rubric(
        criteria=tuple(
            Criterion(id=f"c{i}", text=f"{prompt} asks {i}", weight=weight, tags=TAGS[i : i + 1])
            for i, weight in zip(range(len(values)), weights, strict=False)
        )
    )
    return JudgedResponse(
        prompt_id=prompt,
        prompt=f"text of {prompt}",
        response_id=f"{prompt}-{number}",
        response=f"response {number} to {prompt}",
        rubric=rubric,
        generator=generator,
        verdicts=tuple(
            Verdict(criterion_id=f"c{i}", value=v, masked="refusal" if v is None else None)
            for i, v in enumerate(values)
        ),
        split="test",
    )


def test_prompts_of_one_text_are_drawn_together_and_make_no_pairs():
    records = [response(prompt, 0, (1, 0, 1)) for prompt in "abc"]
    records[2] = records[2].model_copy(update={"prompt": records[0].prompt})
    table = Table.of(records)
    a, b, c = table.prompt_B
    counts_RP = table.resamples(40, seed=0)
    assert (counts_RP[:, a] == counts_RP[:, c]).all() and (counts_RP[:, a] + counts_RP[:, b] == 2).all()
    assert len(pair_sets(table, 0.5)[0].first_M) == 0


def golden_input():
    """Two prompts of four and three responses, rewards by the judge (.75 .75 .5 .25) and (1, .5, 0)."""
    records = [
        response("a", 0, (1, 1, 0), generator="big"),
        response("a", 1, (1, 0, 1), generator="small"),
        response("a", 2, (1, 0, 0), generator="big"),
        response("a", 3, (0, 1, 0), generator="small"),
        response("b", 0, (1, 1, None), generator="big"),
        response("b", 1, (0.5, 0.5, 0.5), generator="small"),
        response("b", 2, (0, 0, 0), generator="small"),
    ]
    model = [
        (0.9, 0.8, 0.2),
        (0.8, 0.3, 0.9),
        (0.7, 0.2, 0.1),
        (0.4, 0.6, 0.3),
        (0.9, 0.7, 0.1),
        (0.6, 0.4, 0.5),
        (0.7, 0.1, 0.2),
    ]
    constant = [np.full(3, 0.6)] * 7
    return records, {"model": [np.array(probs) for probs in model], "majority": constant}


def golden_audit():
    return audit(*golden_input(), tail=0.25, bootstrap=50, seed=7)


def same(found, expected, path="audit"):
    """Equal but for rounding in the sixth decimal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{path}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-6), path
    else:
        assert found == expected, path


def test_golden():
    same(golden_audit(), json.loads(GOLDEN.read_text(encoding="utf-8")))


def test_numbers_a_reader_can_check():
    found = golden_audit()
    assert [found[key] for key in ("prompts", "responses", "verdicts", "masked", "undecided")] == [2, 7, 20, 1, 3]
    assert found["mean_reward"]["value"] == pytest.approx((0.75 + 0.75 + 0.5 + 0.25 + 1 + 0.5 + 0) / 7, abs=1e-6)
    # 6 pairs of prompt a, of which the judge ties on one, and 3 of b
    assert found["pairs"]["all"]["count"] == 9
    assert found["pairs"]["all"]["judge_ties"]["value"] == pytest.approx(1 / 9, abs=1e-6)
    # tails of two: a's best two tie, b's do not
    assert found["pairs"]["tail"] == {"count": 2, "judge_ties": found["pairs"]["tail"]["judge_ties"]}
    assert found["pairs"]["tail"]["judge_ties"]["value"] == 0.5
    model, majority = found["predictors"]["model"], found["predictors"]["majority"]
    # of 17 decided verdicts one is on the wrong side of .5: the first of b-2
    assert model["criterion"]["accuracy"]["value"] == pytest.approx(16 / 17, abs=1e-6)
    # met .9 .8 .8 .9 .7 .6 .9 .7, unmet .2 .3 .2 .1 .4 .3 .7 .1 .2: of 72, .7 beats .6 and ties with .7 twice
    assert model["criterion"]["auroc"]["value"] == pytest.approx(70 / 72, abs=1e-6)
    # rewards of a: .7 .7 .425 .425; of b, its masked criterion out of both: .8333, .525, .425
    # ordered pairs of a: 0-2 0-3 1-2 1-3 right, 2-3 tied; of b all right
    assert model["reward"]["pair_accuracy"]["half"]["value"] == pytest.approx(7.5 / 8, abs=1e-6)
    assert model["reward"]["pair_accuracy"]["prediction_ties"]["value"] == pytest.approx(1 / 8, abs=1e-6)
    assert model["reward"]["tail_pair_accuracy"]["half"]["value"] == 1
    assert majority["reward"]["pair_accuracy"]["excluded"]["value"] is None  # it ties on every pair
    assert majority["reward"]["spearman"]["value"] == 0
    assert found["model_minus"]["majority"]["tail_pair_accuracy"]["value"] == 0.5
    # met 8 times by the judge, 9 by the model, together on 16 of 17
    by_chance = (8 * 9 + 9 * 8) / 17**2
    assert model["criterion"]["kappa"]["value"] == pytest.approx((16 / 17 - by_chance) / (1 - by_chance), abs=1e-6)
    # the top half: two of a, two of b, as in the tail of a quarter
    assert found["pairs"]["50%"] == found["pairs"]["tail"]
    assert model["reward"]["top_pair_accuracy"]["50%"] == model["reward"]["tail_pair_accuracy"]
    # a's two best are tied on by both; by chance two of four, and one of b's three
    assert model["reward"]["precision"]["1"]["value"] == 1
    assert found["selection"]["precision"]["1"]["by_chance"]["value"] == pytest.approx(5 / 12, abs=1e-6)
    assert found["selection"]["regret"]["4"]["prompts"] == 1
    # of the six pairs of a, one loses half of .25; b loses nothing
    assert model["reward"]["regret"]["2"]["value"] == pytest.approx(0.125 / 6 / 2, abs=1e-6)
    assert majority["reward"]["regret"]["2"] == found["selection"]["regret"]["2"]["by_chance"]
    # of a's worse half, 2 and 3, neither is among the best two by the model; of b's three, b-2 is none of the best two
    assert model["reward"]["exploitation"]["50%"]["value"] == 0
    assert found["selection"]["exploitation"]["50%"]["by_chance"]["value"] == pytest.approx(5 / 12, abs=1e-6)
    assert found["by_generator"]["small"]["responses"] == 4
    # small's bias: .7 - .75, .425 - .25, .525 - .5, .425 - 0
    assert found["by_generator"]["small"]["bias"]["value"] == pytest.approx(
        (-0.05 + 0.175 + 0.025 + 0.425) / 4, abs=1e-6
    )
    assert {tag: row["verdicts"] for tag, row in found["by_tag"].items()} == {"(no tag)": 6, "content": 7, "format": 7}
    worst = found["disagreements"][0]
    assert (worst["response_id"], worst["criterion_id"], worst["judged"], worst["predicted"]) == ("b-2", "c0", 0, 0.7)


def test_rewards_that_differ_by_rounding_tie():
    # .1 + .2 and .3 differ in the last bit; neither judge nor prediction may rank by it
    weights = (0.1, 0.2, 0.3)
    records = [response("a", 0, (1, 1, 0), weights=weights), response("a", 1, (0, 0, 1), weights=weights)]
    found = audit(records, {"model": [np.array([1, 1, 0.0]), np.array([0, 0, 1.0])]}, bootstrap=5)
    assert found["pairs"]["all"]["judge_ties"]["value"] == 1


def test_a_masked_verdict_is_left_out_of_everything():
    records, predictions = golden_input()
    altered = [probs.copy() for probs in predictions["model"]]
    altered[4][2] = 0.99  # what is predicted where the judge gave no answer
    assert audit(records, {"model": altered}, bootstrap=5) == audit(
        records, {"model": predictions["model"]}, bootstrap=5
    )


def test_a_response_without_reward_is_counted_and_left_out():
    records, predictions = golden_input()
    blank = response("b", 3, (None, None, None))
    found = audit([*records, blank], {name: [*probs, np.full(3, 0.9)] for name, probs in predictions.items()})
    assert (found["unrewarded"], found["responses"], found["masked"]) == (1, 8, 4)
    before = audit(records, predictions)
    for part in (
        "pairs",
        "predictors",
        "model_minus",
        "ceiling",
        "by_criterion",
        "by_tag",
        "by_length",
        "disagreements",
    ):
        assert found[part] == before[part]


cells = st.tuples(st.sampled_from([0.0, 0.5, 1.0, 0.7, None]), st.sampled_from([0.0, 0.2, 0.5, 0.51, 0.9, 1.0]))
tables = st.lists(st.lists(st.tuples(cells, cells), min_size=1, max_size=5), min_size=1, max_size=4).filter(
    lambda prompts: any(value is not None for rows in prompts for row in rows for value, _ in row)
)


@given(tables, st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_order_of_records_and_names_of_prompts_change_nothing(table, random):
    records = [
        response(f"p{p}", r, [value for value, _ in row], weights=(1.0, 3.0), generator=f"g{r % 2}")
        for p, rows in enumerate(table)
        for r, row in enumerate(rows)
    ]
    probs = [np.array([prob for _, prob in row]) for rows in table for row in rows]
    order = list(range(len(records)))
    random.shuffle(order)
    names = random.sample(range(100), len(table))
    renamed = [
        records[place].model_copy(update={"prompt_id": f"q{names[int(records[place].prompt_id[1:])]}"})
        for place in order
    ]
    found = audit(renamed, {"model": [probs[place] for place in order]}, bootstrap=20)
    expected = audit(records, {"model": probs}, bootstrap=20)
    for report in (found, expected):
        for row in report["disagreements"]:
            del row["prompt_id"]
    same(found, expected)
    json.dumps(found, allow_nan=False)


def test_reward_bins_pair_responses_of_one_bin_alone():
    records = [response("a", i, (value,), weights=(1.0,)) for i, value in enumerate([0.0, 0.1, 0.9, 1.0])]
    # right across the bins, wrong within each
    model = [np.array([p]) for p in (0.2, 0.1, 0.9, 0.8)]
    found = audit(records, {"model": model}, bootstrap=5)["predictors"]["model"]["reward"]
    assert found["pair_accuracy"]["half"]["value"] == pytest.approx(4 / 6, abs=1e-6)
    # midranks 1 to 4 less a half, of 4 by 5 bins: bins 0, 1, 3, 4, one response each
    assert [(row["responses"], row["gold"]["value"], row["proxy"]["value"]) for row in found["by_quantile"]] == [
        (1, 0.0, 0.2),
        (1, 0.1, 0.1),
        (1, 0.9, 0.9),
        (1, 1.0, 0.8),
    ]
    twice = [*records, *(response("a", 4 + i, record.values(), weights=(1.0,)) for i, record in enumerate(records))]
    again = audit(twice, {"model": [*model, *([np.array([0.5])] * 4)]}, bootstrap=5)["predictors"]["model"]["reward"]
    assert [row["pairs"] for row in again["by_quantile"]] == [0, 0, 0, 0]  # the pair of each bin ties


def test_bad_predictions_and_missing_verdicts_are_refused():
    records, predictions = golden_input()
    good = predictions["model"]
    with pytest.raises(ValueError, match="'model' is missing"):
        audit(records, {"majority": good})
    with pytest.raises(ValueError, match="6 for 7 responses"):
        audit(records, {"model": good[:6]})
    with pytest.raises(ValueError, match="'a-0' needs one number per criterion"):
        audit(records, {"model": [good[0][:2], *good[1:]]})
    for wrong in (1.2, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"'a-0' has a number outside \[0, 1\]"):
            audit(records, {"model": [np.array([0.5, 0.5, wrong]), *good[1:]]})
    unjudged = [record.model_copy(update={"verdicts": ()}) for record in records]
    with pytest.raises(UserError, match="none of the responses has a verdict"):
        audit(unjudged, predictions)


def test_prediction_lines():
    records, predictions = golden_input()
    lines = [json.loads(line) for line in prediction_lines(records, predictions).splitlines()]
    assert len(lines) == 21
    assert lines[14] == {
        "prompt_id": "b",
        "response_id": "b-0",
        "criterion_id": "c2",
        "gold": None,
        "predicted": {"model": 0.1, "majority": 0.6},
    }


# --- the run ---


class FakeScorer:
    """Answers logit 2 where the response contains the criterion's word, else -2; raw and calibrated differ."""

    model = SimpleNamespace(base="backbone", max_length=512)
    calibration = Calibration()

    @classmethod
    def from_pretrained(cls, path, **options):
        assert options["use_verifiers"] is False  # an audit is of the model
        if path != "model":
            raise UserError(f"{path}: is no reward model")
        return cls()

    @classmethod
    def zero_shot(cls, name, **options):
        assert (name, options["max_length"], options["use_verifiers"]) == ("backbone", 512, False)
        return cls()

    def score_records(self, records, *, progress=False):
        logits = [
            np.array([2.0 if c.text.split()[-1] in r.response else -2.0 for c in r.rubric.criteria]) for r in records
        ]
        return [SimpleNamespace(probs=0.5 + z / 8, logits=z, reward=0.5, truncated=3) for z in logits]


@pytest.fixture
def run(monkeypatch, tmp_path, judged):
    """Run the audit on the shared records with the fake scorer; keyword arguments change its config."""
    monkeypatch.setattr("rm.scorer.RubricScorer", FakeScorer)
    write_judged(tmp_path / "judged.jsonl", judged)

    def start(**changes):
        defaults = {"model": "model", "output": str(tmp_path / "run"), "data": str(tmp_path / "judged.jsonl")}
        return run_audit(AuditConfig(**{**defaults, "bootstrap": 20, **changes}))

    return start


def test_run_writes_report_predictions_and_page(run, tmp_path, capsys):
    result = run()
    folder = tmp_path / "run"
    assert json.loads((folder / "audit.json").read_text(encoding="utf-8")) == result
    assert len((folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert (folder / "audit.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    names = ["model", "model (raw)", "zero-shot", "majority", "tag mean", "length", "lexical overlap"]
    assert list(result["predictors"]) == names
    assert list(result["model_minus"]) == names[1:]
    assert result["facts"] == {
        "model": "model",
        "data": str(tmp_path / "judged.jsonl"),
        "split": "test",
        "judges": ["test"],
        "truncated_responses": 2,
        "rubrics_seen_in_training": 0,
        "rubrics": 1,
        "others": {},
    }
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and str(folder / "audit.html") in printed


def test_raw_is_the_sigmoid_of_the_logits_and_model_the_calibrated_one(run, tmp_path):
    run(zero_shot=False)
    line = json.loads((tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert "zero-shot" not in line["predicted"]
    # criterion "names fruit number 5", response "Fruit 5 is a pear."
    assert line["predicted"]["model"] == pytest.approx(0.75)
    assert line["predicted"]["model (raw)"] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)


def test_run_without_train_split_leaves_the_fitted_baselines_out(run, tmp_path, judged):
    write_judged(tmp_path / "held_out.jsonl", [record for record in judged if record.split == "test"])
    result = run(data=str(tmp_path / "held_out.jsonl"))
    assert list(result["predictors"]) == ["model", "model (raw)", "zero-shot"]


def test_run_finds_the_votes_of_the_judge_beside_the_data(run, tmp_path, judged):
    held_out = [record for record in judged if record.split == "test"]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for vote, value in enumerate((1.0, 0.0)):
            ledger.put_many(
                Entry(
                    verdict_key(record.prompt, record.response, criterion, "test", "t", vote),
                    "test",
                    "t",
                    vote,
                    Verdict(criterion_id=criterion.id, value=value, judge="test"),
                )
                for record in held_out
                for criterion in record.rubric.criteria
            )
    result = run()
    assert result["ceiling"]["self"]["questions"] == 4
    assert result["ceiling"]["self"]["self_consistency"]["value"] == 0
    with pytest.raises(UserError, match="no such file"):
        run(output=str(tmp_path / "again"), ledger=str(tmp_path / "nowhere.sqlite"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail": 0.0}, r"tail: must lie in \(0, 1\], got 0.0"),
        ({"tail": 25}, r"tail: must lie in \(0, 1\], got 25"),
        ({"bootstrap": 0}, "bootstrap: must be at least 1, got 0"),
        ({"model": "elsewhere"}, "elsewhere: is no reward model"),
    ],
)
def test_bad_input_leaves_no_run_folder(run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(**changes)
    assert not (tmp_path / "run").exists()


def test_run_refuses_a_used_folder(run):
    run()
    with pytest.raises(UserError, match="holds a run already"):
        run()


def test_run_refuses_leaking_data(run, tmp_path, judged):
    leaked = [*judged, judged[0].model_copy(update={"split": "test", "response_id": "again"})]
    write_judged(tmp_path / "leak.jsonl", leaked)
    with pytest.raises(UserError, match="stands in train and in test"):
        run(data=str(tmp_path / "leak.jsonl"))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_audit(), indent=1) + "\n", encoding="utf-8")
