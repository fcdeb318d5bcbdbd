import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rm.calibrating import run_calibrate
from rm.calibration import Calibration, Curve
from rm.config import CalibrateConfig, ScoreConfig
from rm.model import RubricRewardModel
from rm.scorer import RubricScorer, ahead, run_score
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, Rubric, Verifier
from rubric_data.reward import rubric_reward

PROMPTS = ["Name a fruit.", "Name a stone."]
RESPONSES = ["A pear.", "Granite, of course.", "No idea."]
CRITERIA = [Criterion(id=f"c{number}", text=text, weight=number + 1.0) for number, text in enumerate(
    ["Is short.", "Names a fruit.", "Ends with a full stop.", "Is polite."]
)]  # fmt: skip


@pytest.fixture(scope="module")
def scorer(tiny_backbone):
    return RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)


def _items():
    item = st.tuples(
        st.sampled_from(PROMPTS),
        st.sampled_from(RESPONSES),
        st.lists(st.sampled_from(CRITERIA), min_size=1, unique=True),
    )
    return st.lists(item, min_size=1, max_size=8)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_items(), st.sampled_from([1, 120, 200, 8192]))
def test_any_order_any_grouping_any_budget_gives_the_scores_of_one_at_a_time(scorer, items, budget):
    rubrics = [Rubric(criteria=tuple(criteria)) for *_, criteria in items]
    scorer.tokens_per_batch = budget
    together = scorer.score([item[0] for item in items], [item[1] for item in items], rubrics)
    scorer.tokens_per_batch = 8192
    for (prompt, response, _), rubric, scored in zip(items, rubrics, together, strict=True):
        alone = scorer.score([prompt], [response], [rubric])[0]
        np.testing.assert_allclose(scored.logits, alone.logits, atol=1e-4)
        assert scored.reward == pytest.approx(rubric_reward(rubric, scored.probs))
        assert scored.truncated == 0


def test_calibration_is_applied_to_probabilities_and_rewards(scorer):
    calibrated = RubricScorer(scorer.model, scorer.encoder, Calibration(Curve("platt", 0.5, 0.5, 1.0)))
    rubric = Rubric(criteria=tuple(CRITERIA))
    plain, mapped = (s.score(PROMPTS[:1], RESPONSES[:1], [rubric])[0] for s in (scorer, calibrated))
    np.testing.assert_allclose(mapped.probs, 1 / (1 + np.exp(-(0.5 * plain.logits + 1))), rtol=1e-6)
    assert mapped.reward == pytest.approx(np.average(mapped.probs, weights=[1, 2, 3, 4]))


def test_a_response_longer_than_the_window_is_scored_and_counted(scorer):
    rubric = Rubric(criteria=(CRITERIA[0],))
    short, long = scorer.score([PROMPTS[0]] * 2, ["fine", "word " * 2000], [rubric] * 2)
    assert short.truncated == 0 < long.truncated
    assert np.isfinite(long.logits).all()


@pytest.fixture
def model_folder(tiny_backbone, tmp_path):
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=512)
    model.save(tmp_path / "model")
    RubricScorer.zero_shot(tiny_backbone, max_length=512).encoder.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_score_writes_one_row_a_response_in_order(model_folder, judged, tmp_path, suffix):
    write_judged(tmp_path / "in.jsonl", judged)
    output = tmp_path / f"scores{suffix}"
    config = ScoreConfig(model=str(model_folder), data=str(tmp_path / "in.jsonl"), output=str(output))
    report = run_score(config)
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        rows = pq.read_table(output).to_pylist()
    assert report["responses"] == len(rows) == 12 and report["verdicts"] == 24
    assert [row["response_id"] for row in rows] == [record.response_id for record in judged]
    for row, record in zip(rows, judged, strict=True):
        probs = [item["probability"] for item in row["criteria"]]
        assert row["reward"] == pytest.approx(rubric_reward(record.rubric, probs))
    with pytest.raises(UserError, match="exists already"):
        run_score(config)
    with pytest.raises(UserError, match=r"unknown format '.csv'; use .jsonl or .parquet"):
        run_score(ScoreConfig(model=str(model_folder), data="builtin", output=str(tmp_path / "scores.csv")))


def test_calibrate_fits_the_validation_split_and_scorers_use_it(model_folder, judged, tmp_path):
    checked = [c.model_copy(update={"verifier": Verifier(name="has_digit")}) for c in judged[0].rubric.criteria]
    judged = [  # with a verifier on every criterion: it is the model that is calibrated
        record.model_copy(
            update={"split": "validation" if record.prompt_id == "p3" else record.split, "rubric": rubric}
        )
        for record in judged
        for rubric in [Rubric(criteria=tuple(checked))]
    ]
    write_judged(tmp_path / "in.jsonl", judged)
    config = CalibrateConfig(model=str(model_folder), data=str(tmp_path / "in.jsonl"))
    report = run_calibrate(config)
    assert report["verdicts"] == 8 and report["prompts"] == 2
    loaded = RubricScorer.from_pretrained(model_folder).calibration
    assert loaded.name == report["chosen"]["name"]
    assert loaded.reward_level is None and "needs rewards on 10 validation prompts" in report["reward_level"]["skipped"]
    with pytest.raises(UserError, match="exists already; add --overwrite true"):
        run_calibrate(config)


def test_items_made_ahead_keep_their_order_and_their_errors():
    def items():
        yield from range(5)
        raise UserError("broken")

    found = []
    with pytest.raises(UserError, match="broken"):
        for item in ahead(items()):
            found.append(item)
    assert found == list(range(5))


# --- criteria that code answers ---

FRUIT = Criterion(id="fruit", text="Names a fruit.", weight=2)
DIGIT = Criterion(id="digit", text="Has a digit.", weight=1, verifier=Verifier(name="has_digit"))
ASKS = Criterion(id="asks", text="Asks a question.", weight=-1, verifier=Verifier(name="has_question"))


class NeverRead(torch.nn.Module):
    """Stands where the model would, and must not be called."""

    head = torch.nn.Linear(1, 1)

    def forward(self, *_):
        raise AssertionError("nothing is left to read")


def test_code_answers_exactly_and_the_model_the_rest_as_if_alone(scorer):
    mixed = Rubric(criteria=(DIGIT, FRUIT, ASKS))
    found = scorer.score(["Name it."] * 2, ["3 pears", "A pear?"], [mixed] * 2)
    alone = scorer.score(["Name it."] * 2, ["3 pears", "A pear?"], [Rubric(criteria=(FRUIT,))] * 2)
    for one, other in zip(found, alone, strict=True):
        assert one.by_code.tolist() == [True, False, True] and not other.by_code.any()
        np.testing.assert_allclose(one.probs[1], other.probs[0], atol=1e-6)
        assert np.isnan(one.logits).tolist() == [True, False, True]
    assert [one.probs[[0, 2]].tolist() for one in found] == [[1, 0], [0, 1]]
    pear = [one.probs[1] for one in found]  # (2 p + 1 digit - 1 question) / 3
    assert [one.reward for one in found] == pytest.approx([(2 * pear[0] + 1) / 3, max(2 * pear[1] - 1, 0) / 3])


def test_what_code_answers_alone_is_never_read(scorer):
    unread = RubricScorer(NeverRead(), scorer.encoder)
    (only,) = unread.score(["Name it."], ["4 or 5?"], [Rubric(criteria=(DIGIT, ASKS))])
    assert only.probs.tolist() == [1.0, 1.0] and only.reward == 0.0 and only.truncated == 0
    assert unread.score([], [], []) == []


def test_the_switch_leaves_every_criterion_to_the_model(scorer):
    plain = RubricScorer(scorer.model, scorer.encoder, use_verifiers=False)
    bare = Rubric(criteria=tuple(c.model_copy(update={"verifier": None}) for c in (DIGIT, ASKS)))
    (off,) = plain.score(["Name it."], ["3 pears"], [Rubric(criteria=(DIGIT, ASKS))])
    (model,) = scorer.score(["Name it."], ["3 pears"], [bare])
    np.testing.assert_array_equal(off.logits, model.logits)
    assert not off.by_code.any()


def test_a_veto_that_code_can_answer_may_stay_with_it(scorer):
    guarded = RubricScorer(scorer.model, scorer.encoder, use_verifiers="vetoes")
    rubric = Rubric(criteria=(FRUIT, DIGIT, ASKS.model_copy(update={"veto": True, "weight": 0.01})))
    honest, caught = guarded.score(["Name it."] * 2, ["A pear?", "3 pears."], [rubric] * 2)
    assert honest.by_code.tolist() == [False, False, True] and honest.probs[2] == 1
    assert caught.probs[2] == 0 and caught.reward == 0


def test_a_broken_verifier_is_found_before_the_model_reads(scorer):
    unread = RubricScorer(NeverRead(), scorer.encoder)
    broken = Criterion(id="many", text="Many.", verifier=Verifier(name="words", args={"least": 3}))
    with pytest.raises(UserError, match="criterion 'many': verifier 'words': argument 'least'"):
        unread.score(["a"] * 2, ["b"] * 2, [Rubric(criteria=(FRUIT,)), Rubric(criteria=(FRUIT, broken))])


def test_score_marks_what_code_answered(model_folder, judged, tmp_path):
    checked = Rubric(criteria=(judged[0].rubric.criteria[0], DIGIT))
    records = [r.model_copy(update={"rubric": checked, "verdicts": ()}) for r in judged[:2]]
    write_judged(tmp_path / "in.jsonl", records)
    options = {"model": str(model_folder), "data": str(tmp_path / "in.jsonl")}
    report = run_score(ScoreConfig(**options, output=str(tmp_path / "on.jsonl")))
    rows = [json.loads(line) for line in (tmp_path / "on.jsonl").read_text().splitlines()]
    assert [[one["by_code"] for one in row["criteria"]] for row in rows] == [[False, True]] * 2
    assert [row["criteria"][1]["probability"] for row in rows] == [1.0, 1.0]  # "Fruit 0 is a pear."
    assert (report["verdicts"], report["by_code"]) == (4, 2)
    assert run_score(ScoreConfig(**options, output=str(tmp_path / "off.jsonl"), use_verifiers=False))["by_code"] == 0
    broken = Criterion(id="many", text="Many.", verifier=Verifier(name="wordz"))
    write_judged(tmp_path / "in.jsonl", [records[0].model_copy(update={"rubric": Rubric(criteria=(broken,))})])
    with pytest.raises(UserError, match="response 'p0-r0', criterion 'many': verifier 'wordz': no such check"):
        run_score(ScoreConfig(**options, output=str(tmp_path / "never.jsonl")))
