import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from rm.calibration import (
    METHODS,
    VERSION,
    Adjustment,
    Calibration,
    Candidate,
    Curve,
    Verdicts,
    agreement,
    choose,
    fit_curve,
    fit_groups,
    held_out,
    prompt_folds,
)
from rm.metrics import auroc, value
from rm.reward_level import RewardLevel
from rubric_data.errors import UserError
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

LEVEL = RewardLevel("line", ((0.0, 0.1), (1.0, 0.8)), 2.0, 0.05, 0.9, 1.5, 1.2, 0.8)


def sample(scale, shift, *, prompts=60, each=50, seed=0, tags=("a",)):
    """Verdicts drawn from sigmoid(scale * logit + shift), which may be lists: one for each tag, in turn."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, prompts * each)
    own = np.arange(len(logits)) % len(tags)
    scale, shift = np.broadcast_to(scale, len(tags))[own], np.broadcast_to(shift, len(tags))[own]
    gold = (generator.random(len(logits)) < expit(scale * logits + shift)).astype(float)
    criteria = [Criterion(id="c", text=f"asks {tags[place]}", tags=(tags[place],)) for place in own]
    return Verdicts(logits, gold, np.ones(len(gold)), np.repeat(np.arange(prompts), each), criteria)


def fitted(method, verdicts):
    return fit_curve(method, verdicts.logits_N, verdicts.gold_N)


# --- the curve ---


def test_fit_finds_the_map_the_verdicts_were_drawn_from():
    platt = fitted("platt", sample(0.5, -1.0))
    assert (platt.a, platt.b, platt.shift) == (platt.a, platt.a, pytest.approx(-1.0, abs=0.15))
    assert platt.a == pytest.approx(0.5, abs=0.08)
    temperature = fitted("temperature", sample(2.0, 0.0))
    assert (temperature.a, temperature.shift) == (pytest.approx(2.0, abs=0.2), 0.0)


def test_beta_calibration_bends_where_platt_cannot():
    logits = np.tile(np.linspace(-4, 4, 400), 20)
    truth = Curve("beta", 0.4, 1.6, -0.5)  # ln s counts little, so what is unlikely stays possible
    found = fit_curve("beta", logits, expit(truth.logits(logits)))
    assert (found.a, found.b) == (pytest.approx(0.4, abs=0.01), pytest.approx(1.6, abs=0.02))
    assert found.shift == pytest.approx(-0.5, abs=0.02)


def test_the_curve_by_hand():
    z = np.array([np.log(3), -np.log(3)])  # s = 3/4 and 1/4
    np.testing.assert_allclose(Curve("beta", 2.0, 1.0).logits(z), [np.log(9 / 4), np.log(1 / 12)])
    np.testing.assert_allclose(Curve("platt", 0.5, 0.5, 1.0).logits(z), 0.5 * z + 1)
    knots = ((-1.0, 0.2), (1.0, 0.6))
    expected = 0.95 * np.array([0.2, 0.4, 0.6]) + 0.05 * expit([-2, 0, 2])  # flat outside, but for a twentieth
    np.testing.assert_allclose(expit(Curve("isotonic", knots=knots).logits(np.array([-2.0, 0.0, 2.0]))), expected)


def test_soft_verdicts_count_as_the_number_they_are():
    logits = np.tile(np.linspace(-3, 3, 200), 20)
    platt = fit_curve("platt", logits, expit(0.7 * logits + 0.4))
    assert (platt.a, platt.shift) == (pytest.approx(0.7, abs=0.01), pytest.approx(0.4, abs=0.01))


@pytest.mark.parametrize("method", METHODS)
def test_a_verdict_of_count_three_weighs_as_three(method):
    logits, gold = np.array([-1.0, 0.0, 0.5, 2.0]), np.array([0.0, 1.0, 0.25, 1.0])
    weighed = fit_curve(method, logits, gold, np.array([1.0, 3.0, 1.0, 1.0]))
    repeated = fit_curve(method, logits[[0, 1, 1, 1, 2, 3]], gold[[0, 1, 1, 1, 2, 3]])
    np.testing.assert_allclose(weighed.logits(logits), repeated.logits(logits), atol=1e-3)


def test_separable_verdicts_give_a_finite_map_that_keeps_the_order():
    logits = np.array([-2.0, -1.0, 1.0, 2.0])
    for method in METHODS:
        probs = expit(fit_curve(method, logits, np.array([0.0, 0.0, 1.0, 1.0])).logits(logits))
        assert (np.diff(probs) > 0).all() and probs[0] > 0 and probs[-1] < 1


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="unknown method 'plat'; choose one of identity, temperature"):
        fit_curve("plat", np.zeros(2), np.zeros(2))


# --- groups ---


def group(gold, logits=None, prompts=2):
    gold = np.array(gold, float)
    criteria = [Criterion(id="c", text="asks", tags=("t",))] * len(gold)
    logits = np.zeros(len(gold)) if logits is None else logits
    return Verdicts(logits, gold, np.ones(len(gold)), np.arange(len(gold)) % prompts, criteria)


def test_a_group_lies_between_its_verdicts_and_the_curve_by_the_prior_count():
    few = group([1, 1, 1, 0])  # .75 where the curve says .5
    for prior, expected in ((4.0, 5 / 8), (12.0, 9 / 16)):
        one = fit_groups(Curve(), few, "tag", prior)["t"]
        assert expit(one.shift) == pytest.approx(expected, abs=1e-3)
        assert (one.verdicts, one.prompts) == (4, 2)


def test_no_data_is_the_pooled_map_and_much_data_the_group_s_own():
    calibration = Candidate("platt", "tag", 30.0).fit(sample([0.5, 2.0], [-1.0, 1.0], each=200, tags=("a", "b")))
    logits = np.linspace(-3, 3, 7)
    np.testing.assert_allclose(calibration.by_key(logits, ["new"] * 7), expit(calibration.curve.logits(logits)))
    np.testing.assert_allclose(logit(calibration.by_key(logits, ["a"] * 7)), 0.5 * logits - 1, atol=0.15)
    np.testing.assert_allclose(logit(calibration.by_key(logits, ["b"] * 7)), 2 * logits + 1, atol=0.3)
    pulled = fit_groups(Curve(), group([1, 1, 1, 0], np.array([-1.0, 0.0, 1.0, 2.0])), "tag", 1e6)["t"]
    assert (pulled.scale, pulled.shift) == (pytest.approx(1, abs=1e-3), pytest.approx(0, abs=1e-3))


def test_one_prompt_makes_no_group():
    assert fit_groups(Curve(), group([1, 1, 1], prompts=1), "tag", 10.0) == {}
    assert fit_groups(Curve(), group([1, 1, 1]), "none", 10.0) == {}


def test_a_criterion_is_grouped_by_all_its_tags_or_its_text():
    calibration = Calibration(group_by="tag", groups={"long + style": Adjustment(1.0, 2.0)})
    criteria = [
        Criterion(id="a", text="x", tags=("style", "long")),
        Criterion(id="b", text="x", tags=("style",)),
        Criterion(id="c", text="x"),
    ]
    np.testing.assert_allclose(calibration(np.zeros(3), criteria), [expit(2), 0.5, 0.5])
    by_text = Calibration(group_by="text", groups={"x": Adjustment(1.0, 2.0)})
    np.testing.assert_allclose(by_text(np.array([0.0, np.nan]), criteria[:2]), [expit(2), np.nan])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(METHODS), st.sampled_from(["none", "tag", "text"]), st.booleans())
def test_no_map_reverses_or_ties_two_answers_to_a_criterion(seed, method, group_by, upside_down):
    verdicts = sample(-1.0 if upside_down else 1.0, 0.5, prompts=4, each=6, seed=seed, tags=("a", "b"))
    calibration = Candidate(method, group_by, 10.0).fit(verdicts)
    for criterion in verdicts.criteria[:2]:
        own = np.array([c == criterion for c in verdicts.criteria])
        logits, gold = verdicts.logits_N[own], verdicts.gold_N[own]
        probs = calibration(logits, [criterion] * own.sum())
        order = np.argsort(logits)
        assert ((probs > 0) & (probs < 1)).all() and (np.diff(probs[order]) > 0).all()
        sides = np.zeros(own.sum(), int), 1
        np.testing.assert_equal(value(auroc(gold, probs, *sides)), value(auroc(gold, logits, *sides)))


# --- choosing ---


def test_choose_takes_the_way_that_predicts_held_out_prompts_best():
    chosen, probs, report = choose(sample(0.4, 1.5, each=30))
    rows = {row["name"]: row for row in report["held_out"] if row["group_by"] == "none"}
    assert list(rows) == list(METHODS)
    assert rows["platt"]["brier"] < rows["temperature"]["brier"] < rows["identity"]["brier"]
    assert report["after"]["ece"] < 0.05 < report["before"]["ece"]
    assert report["after"]["brier"] == min(row["brier"] for row in report["held_out"])
    assert report["chosen"]["name"] == chosen.name and len(probs) == 1800
    assert report["before"] == {key: rows["identity"][key] for key in ("brier", "log_loss", "ece")}


def test_choose_groups_where_groups_differ():
    chosen, _, report = choose(sample([0.5, 2.0, 1.0], [-2.0, 2.0, 0.0], each=18, tags=("a", "b", "c")))
    assert chosen.group_by == "tag"  # before text, which says the same here
    assert chosen.groups.keys() == {"a", "b", "c"} and chosen.groups["b"].shift > chosen.groups["a"].shift + 2
    assert len(report["held_out"]) == len(METHODS) + 6


def test_no_prompt_is_on_both_sides_of_a_fold():
    verdicts = sample(1.0, 0.0, prompts=7, each=3)
    folds = prompt_folds(verdicts.prompt_N)
    assert len(folds) == 5
    assert all(not set(verdicts.prompt_N[train]) & set(verdicts.prompt_N[test]) for train, test in folds)
    seen = []

    def fit(part):
        seen.append(set(part.prompt_N))
        return Calibration()

    np.testing.assert_allclose(held_out(fit, verdicts, folds), expit(verdicts.logits_N))
    assert [len(prompts) for prompts in seen] == [7 - len(set(verdicts.prompt_N[test])) for _, test in folds]


def test_one_prompt_is_not_enough():
    with pytest.raises(UserError, match="at least 2 validation prompts, got 1"):
        choose(sample(1.0, 0.0, prompts=1))


@pytest.mark.parametrize("gold", [0.0, 0.5, 1.0])
def test_verdicts_that_are_all_the_same_still_give_a_map(gold):
    verdicts = sample(1.0, 0.0, prompts=3, each=4)
    chosen, probs, _ = choose(
        Verdicts(verdicts.logits_N, np.full(12, gold), np.ones(12), verdicts.prompt_N, verdicts.criteria)
    )
    assert np.isfinite(probs).all() and np.isfinite(chosen(np.array([-50.0, 50.0]), verdicts.criteria[:2])).all()


def test_agreement_weighs_verdicts_by_their_counts():
    two = Verdicts(np.zeros(2), np.array([1.0, 0.0]), np.array([1.5, 0.5]), np.arange(2), [])
    found = agreement(two, np.array([0.8, 0.4]))
    assert found["brier"] == pytest.approx((3 * 0.04 + 0.16) / 4)
    assert found["log_loss"] == pytest.approx(-(3 * np.log(0.8) + np.log(0.6)) / 4)
    assert found["ece"] == pytest.approx((3 * 0.2 + 0.4) / 4)


def test_verdicts_leave_masked_ones_out_and_number_prompts_by_text():
    rubric = Rubric(criteria=(Criterion(id="a", text="A"), Criterion(id="b", text="B")))

    def record(prompt_id, *verdicts):
        return JudgedResponse(
            prompt_id=prompt_id, prompt="same", response_id="r", response="x", rubric=rubric, verdicts=verdicts
        )

    first = record("p", Verdict(criterion_id="b", value=0.25, count=3.0), Verdict(criterion_id="a", masked="refusal"))
    second = record("q", Verdict(criterion_id="a", value=1.0))
    found = Verdicts.of([first, second], [np.array([1.0, 2.0]), np.array([3.0, 4.0])])
    assert found.logits_N.tolist() == [2, 3] and found.gold_N.tolist() == [0.25, 1]
    assert found.weight_N.tolist() == [1.5, 0.5] and found.prompt_N.tolist() == [0, 0]
    assert [criterion.id for criterion in found.criteria] == ["b", "a"]
    with pytest.raises(UserError, match="none of the validation responses has a verdict"):
        Verdicts.of([record("p")], [np.zeros(2)])


# --- the file ---


def test_maps_are_stored_beside_the_weights_and_missing_means_identity(tmp_path):
    assert Calibration.load(tmp_path) == Calibration()
    stored = Calibration(
        Curve("isotonic", 0.5, 0.5, -0.25, ((-1.0, 0.1), (1 / 3, 0.9))), "tag", {"é": Adjustment(2.0, 0.1, 5, 2)}, LEVEL
    )
    stored.save(tmp_path, {"verdicts": 3})
    assert Calibration.load(tmp_path) == stored
    assert json.loads((tmp_path / "calibration.json").read_text())["report"] == {"verdicts": 3}


def test_files_of_before_are_read(tmp_path):
    old = {"method": "platt", "scale": 0.5, "shift": -0.25, "report": {}}
    (tmp_path / "calibration.json").write_text(json.dumps(old))
    loaded = Calibration.load(tmp_path)
    assert loaded.name == "platt"
    np.testing.assert_allclose(loaded(np.array([0.5, 2.5]), [Criterion(id="c", text="t")] * 2), [0.5, expit(1)])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps({"version": VERSION + 1}), f"version {VERSION + 1}"),
        (json.dumps({"version": VERSION, "curve": {"slope": 1}, "reward_level": None}), "knots"),
        ("[]", "string indices|list indices"),
        ("{", "Expecting property name"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_a_remedy(tmp_path, text, why):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(UserError, match=rf"calibration.json: is no calibration .*({why}).*--overwrite true"):
        Calibration.load(tmp_path)
