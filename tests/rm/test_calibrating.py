import json

import numpy as np
import pytest
from scipy.special import expit

from policy import cli
from rm import conformal
from rm.calibrating import _best, fit, plot, summary_table
from rm.calibration import Calibration, prompt_folds
from rm.model import RubricRewardModel
from rm.reward_level import Intervals, verdict_scale
from rm.scorer import RubricScorer
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

RUBRIC = Rubric(
    criteria=tuple(Criterion(id=f"c{k}", text=f"asks {k}", tags=("even" if k % 2 else "odd",)) for k in range(4))
)


def validation(prompts, responses=4, seed=0):
    """Records of the validation split, and logits that are twice too sure; every ninth verdict is masked."""
    generator = np.random.default_rng(seed)
    records, logits = [], []
    for number in range(prompts * responses):
        z = generator.normal(0.3, 1.2, len(RUBRIC.criteria))
        met = (generator.random(len(z)) < expit(z)).astype(float)
        verdicts = tuple(
            Verdict(criterion_id=c.id, masked="refusal")
            if generator.random() < 1 / 9
            else Verdict(criterion_id=c.id, value=v)
            for c, v in zip(RUBRIC.criteria, met, strict=True)
        )
        records.append(
            JudgedResponse(
                prompt_id=f"p{number // responses}",
                prompt=f"prompt {number // responses}",
                response_id=f"r{number}",
                response=f"response {number}",
                rubric=RUBRIC,
                verdicts=verdicts,
                split="validation",
            )
        )
        logits.append(2 * z)
    return records, logits


def test_both_levels_are_fitted_and_reported(tmp_path):
    fitted = fit(*validation(40), planned_kl=1.5, coverage=0.8)
    level, report = fitted.calibration.reward_level, fitted.report
    assert (level.planned_kl, level.coverage) == (1.5, 0.8)
    assert report["after"]["brier"] < report["before"]["brier"]
    error = report["reward_level"]["error"]
    assert error["all"].keys() == {"raw", "proxy", "calibrated"}
    assert error["all"]["calibrated"] < error["all"]["raw"]
    assert [row["responses"] for row in error["by_quantile"]] == [32] * 5
    assert summary_table(report).row_count == 5 + 2  # methods, and the best prior count of either grouping
    plot(tmp_path / "both.png", fitted)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_fit_shows_of_a_prompt_knows_nothing_of_its_verdicts():
    records, logits = validation(40)
    verdicts = [v if v.masked else v.model_copy(update={"value": 1 - v.value}) for v in records[0].verdicts]
    turned = records[0].model_copy(update={"verdicts": tuple(verdicts)})
    before, after = (fit([first, *records[1:]], logits, planned_kl=2.0, coverage=0.8) for first in (records[0], turned))
    assert before.report["chosen"] == after.report["chosen"] and before.report["chosen"]["name"] != "identity"
    own = sum((~np.isnan(record.values())).sum() for record in records[:4])
    assert (before.gold_N[:own] != after.gold_N[:own]).any()
    np.testing.assert_array_equal(before.after_N[:own], after.after_N[:own])
    np.testing.assert_array_equal(before.rewards.proxy_B[:4], after.rewards.proxy_B[:4])
    assert (before.after_N[own:] != after.after_N[own:]).any()


def test_verdict_intervals_are_of_the_errors_on_held_out_prompts():
    records, logits = validation(40)
    fitted = fit(records, logits, planned_kl=2.0, coverage=0.8)
    known = [~np.isnan(record.values()) for record in records]
    whose_N = np.repeat(np.arange(len(records)), [int(own.sum()) for own in known])
    prompt_N, scale_N = whose_N // 4, verdict_scale(fitted.after_N)
    error_N = fitted.gold_N - fitted.after_N
    # every criterion has weight 1: a response's reward is the mean of its verdicts
    mean_B = np.round(np.bincount(whose_N, fitted.gold_N) / np.bincount(whose_N), 9).reshape(40, 4)
    tail_N = (mean_B >= np.sort(mean_B)[:, [-2]]).ravel()[whose_N]  # two of four, and what ties with the second
    want = conformal.quantile(np.abs(error_N) / scale_N, prompt_N, np.ones(len(error_N)), 0.8)
    assert fitted.calibration.reward_level.verdict_quantile == want
    held_out = Intervals(fitted.after_N, error_N, scale_N, None, prompt_N, tail_N)
    assert fitted.report["reward_level"]["intervals"]["verdict"] == held_out.choose(prompt_folds(prompt_N), 0.8)[1]
    np.testing.assert_allclose(
        fitted.rewards.proxy_B, np.bincount(whose_N, fitted.after_N) / np.bincount(whose_N), atol=1e-9
    )


def test_the_best_of_a_prompt_are_those_that_tie_but_for_rounding():
    rubric = Rubric(criteria=tuple(Criterion(id=f"c{k}", text=f"asks {k}", weight=k / 10) for k in (1, 2, 3)))

    def record(prompt, *values):
        verdicts = tuple(
            Verdict(criterion_id=c.id, value=v, masked="refusal" if v is None else None)
            for c, v in zip(rubric.criteria, values, strict=True)
        )
        return JudgedResponse(
            prompt_id=prompt, prompt=prompt, response_id="r", response="x", rubric=rubric, verdicts=verdicts
        )

    # of p two: the first, and .3 / .6 either way, as floats .5 and .4999999999999999
    p = [("p", 1, 1, 1), ("p", 1, 1, 0), ("p", 0, 0, 1), ("p", 0, 1, 0), ("p", None, None, None)]
    assert _best([record(*one) for one in [*p, ("q", 1, 0, 0)]]).tolist() == [True, True, True, False, False, True]


def test_too_few_prompts_for_rewards_still_calibrate_verdicts(tmp_path):
    fitted = fit(*validation(6), planned_kl=2.0, coverage=0.9)
    assert fitted.calibration.reward_level is None
    assert fitted.report["reward_level"]["skipped"].startswith(
        "needs rewards on 10 validation prompts for a coverage of 0.9"
    )
    plot(tmp_path / "verdicts.png", fitted)
    assert (tmp_path / "verdicts.png").exists()


@pytest.fixture
def model_folder(tiny_backbone, tmp_path):
    RubricRewardModel.from_language_model(tiny_backbone, max_length=512).save(tmp_path / "model")
    RubricScorer.zero_shot(tiny_backbone, max_length=512).encoder.tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_calibrate_score_and_audit_from_the_command_line(model_folder, tmp_path, capsys):
    records, _ = validation(24)
    held_out = [r.model_copy(update={"split": "test"}) for r in records[48:]]
    write_judged(tmp_path / "in.jsonl", [*records[:48], *held_out])
    data = ["--model", model_folder, "--data", str(tmp_path / "in.jsonl")]
    assert cli.main(["calibrate", *data, "--planned_kl", "1"]) == 0
    stored = json.loads((tmp_path / "model" / "calibration.json").read_text())
    assert stored["reward_level"]["planned_kl"] == 1 and (tmp_path / "model" / "calibration.png").exists()
    assert f"chosen: {stored['report']['chosen']['name']}" in capsys.readouterr().out
    assert cli.main(["calibrate", *data]) == 2 and "--overwrite true" in capsys.readouterr().err

    for reward in ("proxy", "calibrated", "lower_bound"):
        assert cli.main(["score", *data, "--output", str(tmp_path / f"{reward}.jsonl"), "--reward", reward]) == 0
    plain, mapped, lower = (
        [json.loads(line) for line in (tmp_path / f"{reward}.jsonl").read_text().splitlines()]
        for reward in ("proxy", "calibrated", "lower_bound")
    )
    assert [row["expected"] for row in plain] == [row["expected"] for row in lower]
    assert [row["reward"] for row in mapped] == [row["expected"]["reward"] for row in plain]
    assert [row["reward"] for row in lower] == [row["expected"]["lower_bound"] for row in plain]
    assert (
        np.argsort([row["reward"] for row in plain]).tolist() == np.argsort([row["reward"] for row in mapped]).tolist()
    )
    assert all(one["low"] <= one["probability"] <= one["high"] for row in plain for one in row["criteria"])

    audited = ["audit", *data, "--output", str(tmp_path / "audit"), "--zero_shot", "false", "--bootstrap", "20"]
    assert cli.main(audited) == 0
    level = json.loads((tmp_path / "audit" / "audit.json").read_text())["reward_level"]
    assert level["target"] == 0.9 and 0 <= level["coverage"]["reward"]["all"]["value"] <= 1
    assert "coverage of the lower bound" in (tmp_path / "audit" / "audit.html").read_text()


def test_rewards_that_were_not_calibrated_for_are_refused(model_folder):
    for reward in ("calibrated", "lower_bound"):
        with pytest.raises(UserError, match=f"reward '{reward}': the model was not calibrated for it; run `calibrate`"):
            RubricScorer.from_pretrained(model_folder, reward=reward, calibration=Calibration())
