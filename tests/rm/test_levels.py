import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from policy import cli
from rm.calibration import Calibration, Candidate, Curve, Verdicts, choose
from rm.levels import CELLS, Steps, cells, levels_of, thresholds
from rm.loss import distillation_loss, expected_levels, predicted_rewards, verdict_loss
from rm.model import RubricRewardModel
from rm.scorer import RubricScorer
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict
from rubric_data.reward import weighted_mean_reward

LEVELS = st.lists(st.integers(2, 7), min_size=1, max_size=6)
FIVE = tuple(Level(label=name) for name in ("fails", "partial", "mixed", "minor issues", "fully met"))
NO = Level(label="no"), Level(label="yes")


# --- the arithmetic ---


def test_thresholds_by_hand():
    assert thresholds(np.zeros(CELLS), 2).tolist() == [0.0]
    assert thresholds(np.zeros(CELLS), 3).tolist() == [-1.0, 1.0]  # 4 (v - 1/2) at v = 1/4 and 3/4
    assert thresholds(np.zeros(CELLS), 5).tolist() == [-1.5, -0.5, 0.5, 1.5]
    steep = np.log([1, 1, 1, 1, 1, 1, 3, 3])  # three times as steep above v = 3/4: 5/8 ... 7/8 is half there
    np.testing.assert_allclose(thresholds(steep, 5), [-1.5, -0.5, 0.5, 2.5])
    np.testing.assert_allclose(thresholds(steep, 3), [-1, 1])


@given(st.lists(st.floats(-3, 3), min_size=CELLS, max_size=CELLS), st.integers(2, 30))
def test_thresholds_rise_whatever_was_learnt_and_two_levels_have_none(spacing, levels):
    found = thresholds(np.array(spacing), levels)
    assert len(found) == levels - 1 and (np.diff(found) > 0).all()
    assert not cells(2).any()


def test_a_value_between_two_levels_is_of_those_two():
    steps = Steps.of([5, 2, 3])
    assert steps.verdict_M.tolist() == [0, 0, 0, 0, 1, 2, 2] and steps.step_M.tolist() == [1, 2, 3, 4, 1, 1, 2]
    # .75 is level 3 of 0..4; .8 is 3.2, so level 4 has a fifth; nothing is known of NaN
    assert steps.targets(np.array([0.75, 0.3, 1.0])).tolist() == [1, 1, 1, 0, 0.3, 1, 1]
    np.testing.assert_allclose(steps.targets(np.array([0.8, 1.0, 0.25]))[[2, 3, 5, 6]], [1, 0.2, 0.5, 0])
    assert np.isnan(steps.targets(np.array([np.nan, 0.0, 0.0]))).tolist() == [True] * 4 + [False] * 3


@given(LEVELS, st.randoms(use_true_random=False))
def test_the_expected_level_is_the_value_the_targets_were_made_of(levels, random):
    steps, value = Steps.of(levels), np.array([random.random() for _ in levels])
    np.testing.assert_allclose(steps.expected(steps.targets(value)), value, atol=1e-12)
    again = Steps.of_rows(np.array(levels)[steps.verdict_M])
    for one, other in zip(vars(steps).values(), vars(again).values(), strict=True):
        np.testing.assert_array_equal(one, other)


@given(LEVELS, st.lists(st.floats(-30, 30), min_size=6, max_size=6), st.lists(st.floats(-2, 2), min_size=8, max_size=8))
def test_probabilities_of_levels_are_probabilities(levels, latent, spacing):
    steps = Steps.of(levels)
    logits = np.array(latent)[steps.verdict_M] - np.concatenate([thresholds(np.array(spacing), one) for one in levels])
    reached = expit(logits)
    expected = steps.expected(reached)
    np.testing.assert_allclose(expit(steps.logits(logits)), expected, rtol=1e-9)
    for own, count, mean in zip(steps.split(reached), levels, expected, strict=True):
        assert len(own) == count and (own >= 0).all() and own.sum() == pytest.approx(1)
        assert 0 <= mean <= 1 and own @ np.arange(count) / (count - 1) == pytest.approx(mean, abs=1e-9)


def test_falling_mends_what_rises_within_a_verdict_only():
    steps = Steps.of([4, 2, 3])
    assert steps.falling([0.5, 0.7, 0.6, 0.9, 0.2, 0.3]).tolist() == [0.5, 0.5, 0.5, 0.9, 0.2, 0.2]


# --- the loss ---


def test_a_graded_verdict_costs_the_mean_of_its_steps():
    # three levels, s = 0, thresholds -ln 3 and ln 3: P = 3/4 and 1/4; the verdict is level 1: -ln 3/4, twice, over 2
    logits = torch.tensor([np.log(3.0), -np.log(3.0), 0.0])
    labels, levels = torch.tensor([0.5, 1.0]), torch.tensor([3, 2])
    want = -np.log(0.75) + np.log(2)
    assert verdict_loss(logits, labels, torch.ones(2), levels).item() == pytest.approx(want, rel=1e-6)
    masked = torch.tensor([-100.0, 1.0])
    assert verdict_loss(logits, masked, torch.ones(2), levels).item() == pytest.approx(np.log(2), rel=1e-6)
    assert expected_levels(logits, levels).tolist() == pytest.approx([0.5, 0.5])


@settings(deadline=None)
@given(LEVELS, st.integers(0, 1000))
def test_the_gradient_in_the_latent_score_is_the_error_of_the_expected_level(levels, seed):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(len(levels), generator=generator, dtype=torch.float64, requires_grad=True)
    labels, counts = torch.rand(2, len(levels), generator=generator, dtype=torch.float64)
    of = torch.tensor(levels)
    cuts = torch.tensor(np.concatenate([thresholds(np.zeros(CELLS), one) for one in levels]))
    logits = latent.repeat_interleave(of - 1) - cuts
    (gradient,) = torch.autograd.grad(verdict_loss(logits, labels, counts, of), latent)
    error = expected_levels(logits, of) - labels
    torch.testing.assert_close(gradient, counts * error.detach())


def test_two_levels_are_yes_and_no_to_the_bit(tiny_backbone):
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=256)
    with torch.no_grad():
        model.level_spacing.copy_(torch.linspace(-1, 1, CELLS))  # whatever else was learnt
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(12, generator=generator)
    labels, counts = torch.rand(2, 12, generator=generator)
    weights, veto = torch.ones(12), torch.arange(12) == 5
    response, two = torch.arange(4).repeat_interleave(3), torch.full((12,), 2)
    assert torch.equal(model.step_logits(plain, two), plain)
    rest = labels, counts, weights, veto, response, torch.tensor([[0, 1]]), torch.ones(1)
    results = []
    for levels in (None, two):
        logits = plain.clone().requires_grad_()
        loss = distillation_loss(logits, *rest, levels, pairwise_weight=0.3, verdicts=12)
        results.append((loss, torch.autograd.grad(loss, logits)[0]))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(plain, labels, counts, reduction="sum")
    assert torch.equal(verdict_loss(plain, labels, counts, two), bce)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_rewards_and_vetoes_are_of_expected_levels():
    levels = torch.tensor([5, 2, 3] * 2)
    generator = np.random.default_rng(0)
    steps = Steps.of(levels.numpy())
    logits = steps.falling(generator.normal(size=len(steps.step_M)))
    weights, veto = np.array([3.0, -1.0, 2.0]), np.array([False, False, True])
    got = predicted_rewards(
        torch.tensor(logits),
        torch.tensor(weights).repeat(2),
        torch.tensor(veto).repeat(2),
        torch.arange(2).repeat_interleave(3),
        2,
        levels,
    )
    want = weighted_mean_reward(steps.expected(expit(logits)).reshape(2, 3), weights, veto)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)
    far = torch.tensor([-30.0, -31.0], requires_grad=True)  # a veto next to nothing still says where to go
    one = torch.ones(1), torch.tensor([True]), torch.zeros(1, dtype=torch.int64), 1, torch.tensor([3])
    (gradient,) = torch.autograd.grad(predicted_rewards(far, *one).log(), far)
    np.testing.assert_allclose(gradient.sum(), 2.0, rtol=1e-5)  # of ln p^2: met alone, and as the veto


# --- calibration ---


def graded(prompts=80, each=12, seed=0, cuts=(-2.0, -1.0, 0.5, 1.0)):
    """Verdicts of five levels drawn with thresholds ``cuts`` where the model's are -1.5, -.5, .5, 1.5; and yes/no."""
    generator = np.random.default_rng(seed)
    count = prompts * each
    latent = generator.normal(0, 1.5, count)
    yes_no = np.arange(count) % 3 == 0
    noise = logit(generator.random(count))
    level = (latent[:, None] + noise[:, None] > np.array(cuts)).sum(-1) / 4
    gold = np.where(yes_no, latent + noise > 0, level)
    criteria = [Criterion(id="b", text="B") if no else Criterion(id="g", text="G", levels=FIVE) for no in yes_no]
    levels = levels_of(criteria)
    steps = Steps.of(levels)
    logits = latent[steps.verdict_M] - np.concatenate([thresholds(np.zeros(CELLS), one) for one in levels])
    prompt = np.repeat(np.arange(prompts), each)[steps.verdict_M]
    whose = [criteria[place] for place in steps.verdict_M]
    return Verdicts(logits, steps.targets(gold), 1 / steps.last_M, prompt, whose)


def test_every_step_of_a_scale_is_calibrated_by_itself():
    verdicts = graded()
    chosen, held_out, report = choose(verdicts)
    assert chosen.name.startswith(f"{chosen.curve.method} by step") and chosen.steps.keys() == {
        f"{step} of 4" for step in (1, 2, 3, 4)
    }
    assert report["after"]["brier"] < report["before"]["brier"] - 0.001
    assert (report["verdicts"], report["graded_verdicts"]) == (960, 640)
    for step in (1, 2, 3, 4):
        own = (verdicts.steps.last_M == 4) & (verdicts.steps.step_M == step)
        assert held_out[own].mean() == pytest.approx(verdicts.gold_N[own].mean(), abs=0.03)
    yes_no = verdicts.steps.last_M == 1
    assert held_out[yes_no].mean() == pytest.approx(verdicts.gold_N[yes_no].mean(), abs=0.04)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_calibrated_levels_stay_in_order_and_expected_ones_rise_with_the_score(seed):
    verdicts = graded(prompts=3, each=6, seed=seed, cuts=(1.0, 0.0, -1.0, 2.0))  # a judge that contradicts itself
    calibration = Candidate("platt", step_prior=10.0).fit(verdicts)
    criterion = Criterion(id="g", text="G", levels=FIVE)
    means = []
    for latent in np.linspace(-4, 4, 9):
        reached = calibration(latent - thresholds(np.zeros(CELLS), 5), [criterion])
        assert (np.diff(reached) <= 0).all() and (reached >= 0).all() and (reached <= 1).all()
        means.append(reached.mean())
    assert (np.diff(means) > 0).all()


def test_two_named_levels_calibrate_as_yes_and_no():
    verdicts = graded()
    yes_no = verdicts.take(np.flatnonzero(verdicts.steps.last_M == 1))
    named = [Criterion(id="b", text="B", levels=NO)] * len(yes_no.criteria)
    same = Verdicts(yes_no.logits_N, yes_no.gold_N, yes_no.weight_N, yes_no.prompt_N, named)
    (one, probs, report), (other, again, same_report) = choose(yes_no), choose(same)
    assert one == other and report == same_report and (probs == again).all()
    assert one.steps == {} and "step" not in one.name


def test_version_two_is_read(tmp_path):
    Calibration(Curve("platt", 0.5, 0.5, 1.0)).save(tmp_path, {})
    stored = json.loads((tmp_path / "calibration.json").read_text())
    del stored["steps"]
    (tmp_path / "calibration.json").write_text(json.dumps(stored | {"version": 2}))
    assert Calibration.load(tmp_path) == Calibration(Curve("platt", 0.5, 0.5, 1.0))


# --- model, scorer, command line ---


def _rubric(levels):
    return Rubric(
        criteria=(Criterion(id="g", text="Names a pear.", levels=levels), Criterion(id="b", text="Is short."))
    )


def test_untrained_levels_leave_no_trace_in_the_folder_and_trained_ones_come_back(tiny_backbone, tmp_path):
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=256)
    model.add_lora(2, 2)
    model.save(tmp_path)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "head.safetensors").keys() == {"weight", "bias"}
    with torch.no_grad():
        model.level_spacing.copy_(torch.linspace(-1, 1, CELLS))
    model.save(tmp_path)
    torch.testing.assert_close(RubricRewardModel.from_pretrained(tmp_path).level_spacing, model.level_spacing)
    model.level_spacing.detach().zero_()
    model.load_weights(tmp_path)
    assert model.level_spacing[0] == -1


def test_the_scorer_tells_levels_and_their_expectation(tiny_backbone):
    scorer = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=256)
    one, named, plain = scorer.score(["A fruit?"] * 3, ["A pear."] * 3, [_rubric(FIVE), _rubric(NO), _rubric(())])
    latent = one.step_logits[:4] + thresholds(np.zeros(CELLS), 5)
    np.testing.assert_allclose(latent, latent[0], rtol=1e-6)
    mine, yes_no = one.level_probs
    np.testing.assert_allclose(mine.cumsum()[:-1], 1 - expit(one.step_logits[:4]))
    assert one.probs[0] == pytest.approx(mine @ [0, 0.25, 0.5, 0.75, 1]) and expit(one.logits) == pytest.approx(
        one.probs
    )
    assert yes_no.tolist() == pytest.approx([1 - one.probs[1], one.probs[1]]) and one.probs[1] == plain.probs[1]
    assert one.reward == pytest.approx(one.probs.mean()) and plain.graded is None
    assert named.graded is None and named.probs[0] == expit(named.logits[0])  # two levels: yes and no, in other words


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_train_calibrate_and_score_graded_criteria_from_the_command_line(tiny_backbone, tmp_path):
    records = []
    for number in range(24):
        for place, (text, value) in enumerate([("A pear.", 1.0), ("A stone.", 0.25), ("Perhaps.", 0.6)]):
            verdicts = Verdict(criterion_id="g", value=value), Verdict(criterion_id="b", value=1.0)
            records.append(
                JudgedResponse(
                    prompt_id=f"p{number}", prompt=f"Fruit {number}?", response_id=f"p{number}-{place}", response=text,
                    rubric=_rubric(FIVE), verdicts=verdicts, split="train" if number < 10 else "validation",
                )
            )  # fmt: skip
    data = str(tmp_path / "in.jsonl")
    write_judged(data, records)
    options = ["--dtype", "float32", "--max_length", "256", "--max_steps", "6", "--eval_steps", "3", "--lora_rank", "2"]
    run = tmp_path / "run"
    assert cli.main(["train", "--data", data, "--model", tiny_backbone, "--output", str(run), *options]) == 0
    model = RubricRewardModel.from_pretrained(run / "model")
    assert model.level_spacing.any()
    assert cli.main(["calibrate", "--data", data, "--model", str(run / "model")]) == 0
    stored = json.loads((run / "model" / "calibration.json").read_text())
    assert stored["report"]["graded_verdicts"] == 42
    assert any(row["step_prior"] for row in stored["report"]["held_out"])
    output = tmp_path / "scores.jsonl"
    assert cli.main(["score", "--data", data, "--model", str(run / "model"), "--output", str(output)]) == 0
    graded_row, yes_no = json.loads(output.read_text().splitlines()[0])["criteria"]
    assert sum(graded_row["levels"]) == pytest.approx(1) and yes_no["levels"] is None
    assert graded_row["probability"] == pytest.approx(np.dot(graded_row["levels"], [0, 0.25, 0.5, 0.75, 1]))
