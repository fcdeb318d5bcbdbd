import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.special import expit

from policy import cli
from rm import posterior, reward_level
from rm.calibrating import Head, fit
from rm.calibration import Calibration, Curve, prompt_folds
from rm.levels import Steps
from rm.model import RubricRewardModel
from rm.posterior import Posterior, doubt, gram, laplace, prior_precision, reward_std
from rm.reward_level import Doubted, Intervals, RewardLevel
from rm.scorer import RubricScorer
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict, Verifier

RUBRIC = Rubric(criteria=(Criterion(id="a", text="A", weight=3), Criterion(id="b", text="B")))


def test_two_weights_by_hand():
    # two verdicts at p = 1/2: H = (4 + 4) / 4 + 1 = 3 in the first direction, 1 in the second
    features = np.array([[2.0, 0.0], [2.0, 0.0]])
    steps = Steps.of([2, 2])
    weight = posterior.curvature(np.zeros(2), steps)
    assert weight.tolist() == [0.25, 0.25]
    found = laplace(gram(features, weight), 1.0)
    directions = found.directions(np.array([[3.0, 0.0], [0.0, 2.0], [3.0, 2.0]]))
    np.testing.assert_allclose(directions @ directions.T, [[3, 0, 3], [0, 4, 4], [3, 4, 7]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 20), st.floats(1e-3, 1e3))
def test_covariances_are_those_of_the_inverted_precision(seed, width, count, precision):
    generator = np.random.default_rng(seed)
    features, weight = generator.normal(size=(count, width)), generator.random(count)
    dense = np.linalg.inv(
        sum(w * np.outer(x, x) for w, x in zip(weight, features, strict=True)) + precision * np.eye(width)
    )
    asked = generator.normal(size=(4, width))
    directions = laplace(gram(features, weight), precision).directions(asked)
    np.testing.assert_allclose(directions @ directions.T, asked @ dense @ asked.T, rtol=1e-7, atol=1e-9)


def test_curvature_is_the_second_derivative_of_the_loss_and_a_graded_verdict_s_the_mean():
    logits = np.array([0.3, np.log(3), -np.log(3), 800.0])
    found = posterior.curvature(logits, Steps.of([2, 3, 2]))
    np.testing.assert_allclose(found, [expit(0.3) * expit(-0.3), 3 / 16, 0], atol=1e-12)


def test_the_prior_is_as_wide_as_the_head_s_weights():
    found, determined = prior_precision(1e9 * np.eye(4), np.full(4, 10.0))
    assert found == pytest.approx(0.01) and determined == pytest.approx(4)  # 4 ln x - 400 x is greatest at 1/100
    _, determined = prior_precision(np.diag([1e9, 1e9, 0, 0]), np.full(4, 10.0))
    assert determined == pytest.approx(2, abs=1e-3)


# --- one response ---


def test_the_reward_s_doubt_knows_that_criteria_err_together():
    calibrate = Calibration(Curve("platt", 1.0, 1.0, 0.0))
    steps, logits, probs = Steps.of([2, 2]), np.zeros(2), np.full(2, 0.5)

    def told(*directions):
        return doubt(lambda z: calibrate(z, RUBRIC.criteria), RUBRIC, logits, probs, np.array(directions), steps)

    swing = (expit(0.8) - expit(-0.8)) / 2
    together, apart = told([0.8, 0.0], [0.8, 0.0]), told([0.8, 0.0], [0.0, 0.8])
    opposite, known = told([0.8, 0.0], [-0.8, 0.0]), told([0.8, 0.0], [0.0, 0.0])
    assert together.std.tolist() == [0.8, 0.8]
    np.testing.assert_allclose(together.covariance, np.full((2, 2), swing**2))
    # weights 3/4 and 1/4
    assert together.reward == pytest.approx(swing) and opposite.reward == pytest.approx(swing / 2)
    assert apart.reward == pytest.approx(swing * np.sqrt(10) / 4) and known.reward == pytest.approx(0.75 * swing)


def test_the_reward_s_doubt_is_that_of_sampled_heads():
    generator = np.random.default_rng(0)
    five = tuple(Level(label=str(number)) for number in range(5))
    veto = Criterion(id="v", text="V", veto=True)
    rubric = Rubric(criteria=(*RUBRIC.criteria, Criterion(id="g", text="G", weight=-1, levels=five), veto))
    steps = Steps.of([2, 2, 5, 2])
    logits = np.array([1.0, 0.5, 1, 0.5, -0.5, -1, 1.5])
    calibration = Calibration(Curve("platt", 0.7, 0.7, 0.2))
    directions = 0.05 * generator.normal(size=(4, 3))
    probs = steps.expected(calibration(logits, rubric.criteria))
    found = doubt(lambda z: calibration(z, rubric.criteria), rubric, logits, probs, directions, steps)
    heads = generator.normal(size=(3, 20_000))
    weights, vetoes = [c.weight for c in rubric.criteria], [c.veto for c in rubric.criteria]
    moved = logits + (directions @ heads).T[:, steps.verdict_M]
    sampled = np.array([steps.expected(calibration(row, rubric.criteria)) for row in moved[:4000]])
    from rubric_data.reward import weighted_mean_reward

    assert found.reward == pytest.approx(weighted_mean_reward(sampled, weights, vetoes).std(), rel=0.05)
    np.testing.assert_allclose(found.covariance, np.cov(sampled.T), rtol=0.15, atol=2e-6)
    assert reward_std(rubric, np.array([np.nan, np.nan, 0.5, np.nan]), found.covariance) != found.reward  # no reward


# --- intervals ---


def doubted_sample(prompts, generator, each=6, informative=True):
    """Centres whose errors are as wide as a doubt that differs between them, or as wide everywhere."""
    count = prompts * each
    std = generator.choice([0.01, 0.3], count)
    centre = np.full(count, 0.5)
    width = std if informative else np.full(count, 0.15)
    error = np.clip(width * generator.normal(size=count), -0.5, 0.5)
    prompt = np.repeat(np.arange(prompts), each)
    return Intervals(centre, error, np.full(count, 0.1), std, prompt, np.arange(count) % 4 == 0)


def test_doubt_narrows_intervals_where_it_says_something_and_coverage_holds():
    generator = np.random.default_rng(0)
    held, weights = [], []
    for _ in range(30):
        own, new = doubted_sample(30, generator), doubted_sample(40, generator)
        weight, rows = own.choose(prompt_folds(own.prompt_N), 0.9)
        weights.append(weight)
        level = own.quantile(weight, 0.9)
        held.append(np.mean(np.abs(new.error_N) <= level * reward_level.widened(new.scale_N, weight * new.std_N)))
        by_weight = {row["doubt"]: row for row in rows}
        assert by_weight[weight]["width"] < 0.9 * by_weight[0.0]["width"]
        assert by_weight[weight]["coverage"] > 0.8 and 0 < by_weight[weight]["tail_coverage"] <= 1
    assert min(weights) > 0 and 0.89 < np.mean(held) < 0.95


def test_doubt_that_says_nothing_is_left_out():
    own = doubted_sample(60, np.random.default_rng(0), informative=False)
    assert own.choose(prompt_folds(own.prompt_N), 0.9)[0] == 0
    bare = Intervals(own.centre_N, own.error_N, own.scale_N, None, own.prompt_N, own.tail_N)
    weight, rows = bare.choose(prompt_folds(own.prompt_N), 0.9)
    assert weight == 0 and [row["doubt"] for row in rows] == [0]


def test_bounds_widen_with_doubt_and_do_without_where_none_is_told():
    level = RewardLevel(
        "line", ((0.0, 0.0), (1.0, 1.0)), 2.0, 0.05, 0.9, 1.0, 1.0, 0.5, Doubted(2.0, 1.0, 0.5, 0.8, 0.4)
    )
    probs, covariance = np.array([0.5, 0.5]), 0.01 * np.ones((2, 2))
    plain = level.expected(RUBRIC, probs, np.zeros(2, bool))
    told = level.expected(RUBRIC, probs, np.zeros(2, bool), covariance)
    # verdicts: .5 (sqrt(.25 + (2 * .1)^2) + .05) where they were .55; rewards: .8 (sqrt(10 / 64 + .01) + .05)
    np.testing.assert_allclose(told.prob_high - 0.5, 0.5 * (np.sqrt(0.29) + 0.05))
    np.testing.assert_allclose(plain.prob_low, 0.0)
    assert told.high - told.reward == pytest.approx(0.8 * (np.sqrt(10 / 64 + 0.01) + 0.05))
    assert told.reward - told.lower == pytest.approx(0.4 * (np.sqrt(10 / 64 + 0.01) + 0.05))
    assert plain.reward == told.reward and plain.reward - plain.lower == pytest.approx(0.5 * (np.sqrt(10 / 64) + 0.05))


# --- fitting ---


def judged(prompts, generator, theta, each=5):
    """Responses whose verdicts come of a logistic head, and features of which the split says less and less."""
    records, logits, features = [], [], []
    for number in range(prompts * each):
        phi = np.append(generator.normal(size=(2, 3)), np.ones((2, 1)), -1)
        met = generator.random(2) < expit(phi @ theta)
        verdicts = tuple(Verdict(criterion_id=c.id, value=float(v)) for c, v in zip(RUBRIC.criteria, met, strict=True))
        masked = Verdict(criterion_id="b", masked="refusal")
        records.append(
            JudgedResponse(
                prompt_id=f"p{number // each}", prompt=f"prompt {number // each}", response_id=f"r{number}",
                response="x", rubric=RUBRIC, verdicts=(verdicts[0], masked) if number % 7 == 0 else verdicts,
            )
        )  # fmt: skip
        logits.append(phi @ theta)
        features.append(phi)
    return records, logits, features


def test_calibration_fits_a_posterior_on_the_verdicts_there_are():
    theta = np.array([1.0, -0.5, 0.0, 0.3])
    records, logits, features = judged(30, np.random.default_rng(1), theta)
    options = {"planned_kl": 2.0, "coverage": 0.9}
    fitted = fit(records, logits, **options, head=Head(features, theta))
    report = fitted.report["posterior"]
    assert report["weights"] == 4 and 3 < report["determined_weights"] < 4
    assert report["error_auroc"].keys() == {"logit_std", "std", "closeness_to_half"} and report["wrong"] > 0
    known = [~np.isnan(record.values()) for record in records]
    phi, z = (np.concatenate([row[own] for row, own in zip(rows, known, strict=True)]) for rows in (features, logits))
    dense = np.linalg.inv((phi.T * expit(z) * expit(-z)) @ phi + report["prior_precision"] * np.eye(4))
    directions = fitted.posterior.directions(np.eye(4))
    np.testing.assert_allclose(directions @ directions.T, dense, rtol=1e-5)
    rows = fitted.report["reward_level"]["intervals"]
    assert [row["doubt"] for row in rows["verdict"]] == list(reward_level.DOUBTS)
    assert all(0.85 < row["coverage"] <= 1 for row in rows["reward"])
    plain = fit(records, logits, **options)
    assert plain.posterior is None and "posterior" not in plain.report
    assert plain.calibration.groups == fitted.calibration.groups


@pytest.fixture
def model_folder(tiny_backbone, tmp_path):
    RubricRewardModel.from_language_model(tiny_backbone, max_length=256).save(tmp_path / "model")
    RubricScorer.zero_shot(tiny_backbone, max_length=256).encoder.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_calibrate_stores_the_posterior_and_score_tells_doubt(model_folder, tmp_path):
    generator = np.random.default_rng(0)
    records = [
        record.model_copy(update={"split": "validation", "response": f"answer {number % 7}"})
        for number, record in enumerate(judged(14, generator, np.ones(4))[0])
    ]
    write_judged(tmp_path / "in.jsonl", records)
    data = ["--model", str(model_folder), "--data", str(tmp_path / "in.jsonl")]
    plain = RubricScorer.from_pretrained(model_folder, dtype="float32").score_records(records[:2])
    assert plain[0].doubt is None and plain[0].features is None
    assert cli.main(["calibrate", *data]) == 0
    stored = load_file(model_folder / "posterior.safetensors")
    assert [tensor.shape for tensor in stored.values()] == [(33, 33)]

    scorer = RubricScorer.from_pretrained(model_folder, dtype="float32", reward="lower_bound", cache_tokens=5000)
    (one, *_), (again, *_) = scorer.score_records(records[:2]), scorer.score_records(records[:2])
    np.testing.assert_allclose(one.logits, plain[0].logits, atol=1e-5)
    assert (one.doubt.std > 0).all() and one.doubt.reward > 0
    np.testing.assert_allclose(one.doubt.std, again.doubt.std, rtol=1e-4)  # from the cache
    keeping = RubricScorer(scorer.model, scorer.encoder, keep_features=True)
    phi = keeping.score_records(records[:1])[0].features
    want = np.linalg.norm(Posterior.load(model_folder).directions(phi), axis=-1)
    np.testing.assert_allclose(one.doubt.std, want, rtol=1e-3)

    code = Criterion(id="d", text="Has a digit.", verifier=Verifier(name="has_digit"))
    mixed = Rubric(criteria=(code, *RUBRIC.criteria))
    (half,) = scorer.score(["prompt 0"], ["answer 0"], [mixed])
    assert half.doubt.std[0] == 0 and (half.doubt.covariance[0] == 0).all() and half.doubt.std[1] > 0
    (none,) = scorer.score(["prompt 0"], ["answer 0"], [Rubric(criteria=(code,))])
    assert none.doubt.reward == 0

    for reward in ("proxy", "lower_bound"):
        output = tmp_path / f"{reward}.jsonl"
        assert cli.main(["score", *data, "--output", str(output), "--reward", reward]) == 0
        row = json.loads(output.read_text().splitlines()[0])
        assert row["reward_std"] > 0 and all(one["std"] > 0 for one in row["criteria"])
        assert row["expected"]["lower_bound"] <= row["expected"]["high"]
    (model_folder / "posterior.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"posterior.safetensors: is no posterior .*run `calibrate` again"):
        RubricScorer.from_pretrained(model_folder)


def test_doubted_intervals_are_stored(tmp_path):
    level = RewardLevel(
        "line", ((0.0, 0.1), (1.0, 0.8)), 2.0, 0.05, 0.9, 1.5, 1.2, 0.8, Doubted(1.0, 0.0, 1.0, 1.1, 0.7)
    )
    Calibration(reward_level=level).save(tmp_path, {})
    assert Calibration.load(tmp_path).reward_level == level
