from dataclasses import replace

import numpy as np
import pytest

from rm import conformal, reward_level
from rm.calibration import prompt_folds
from rm.reward_level import Intervals, RewardLevel, Rewards
from rubric_data.errors import UserError
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

RUBRIC = Rubric(criteria=(Criterion(id="a", text="A", weight=3), Criterion(id="b", text="B")))
LEVEL = RewardLevel("line", ((0.0, 0.1), (1.0, 0.5)), 2.0, 0.05, 0.9, 0.5, 0.4, 0.2)


def fit(rewards, **changes):
    folds = prompt_folds(rewards.prompt_B)
    count = len(rewards.gold_B)
    verdicts = Intervals(
        np.full(count, 0.5), np.full(count, 0.5), np.ones(count), None, rewards.prompt_B, np.ones(count, bool)
    )
    options = {"planned_kl": 2.0, "coverage": 0.9, "verdicts": verdicts, "verdict_folds": folds} | changes
    return reward_level.fit(rewards, folds, **options)


def sample(prompts, generator, each=6):
    """Rewards of which the top of each prompt is flattered: the judge stops at .6."""
    prompt = np.repeat(np.arange(prompts), each)
    proxy = np.clip(generator.normal(0.55, 0.1, prompts)[prompt] + generator.normal(0, 0.15, len(prompt)), 0, 1)
    spread = 0.05 + 0.1 * generator.random(len(prompt))
    gold = np.clip(np.minimum(proxy, 0.6) + spread * generator.normal(0, 1, len(prompt)), 0, 1)
    return Rewards(gold, proxy, spread, prompt)


# --- the tail ---


def test_tail_weights_by_the_quantile_in_the_prompt():
    proxy, prompt = np.array([0.2, 0.9, 0.3, 0.1, 0.1, 0.5]), np.array([0, 0, 1, 1, 1, 2])
    # quantiles 1/4, 3/4 | 5/6, 1/3, 1/3 | 1/2
    expected = np.exp((np.array([1 / 4, 3 / 4, 5 / 6, 1 / 3, 1 / 3, 1 / 2]) - 5 / 6) / 0.5)
    np.testing.assert_allclose(reward_level.tail_weights(proxy, prompt, 0.5), expected)
    chances = reward_level.draw_chances(proxy, prompt, 0.5)
    assert chances[1] == pytest.approx(1 / (1 + np.exp(-1))) and chances[5] == 1
    np.testing.assert_allclose(np.bincount(prompt, chances), np.ones(3))
    assert reward_level.tail_weights(proxy, prompt, 1e-9).min() > 0


def test_rewards_that_differ_by_rounding_tie():
    rubric = Rubric(criteria=tuple(Criterion(id=f"c{k}", text=f"asks {k}", weight=k / 10) for k in (1, 2, 3)))
    # .3 / .6 either way, as floats .5 and .4999999999999999
    answers = [np.array([1.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])]
    records = [record("p", number, *values, rubric=rubric) for number, values in enumerate([*answers, answers[0]])]
    own = Rewards.of(records, [*answers, np.full(3, np.nan)], np.array([0, 0, 1]))
    assert own.gold_B.tolist() == [0.5, 0.5, 0.5] and own.proxy_B[:2].tolist() == [0.5, 0.5]
    assert np.isnan(own.proxy_B[2])
    assert reward_level.draw_chances(own.proxy_B[:2], own.prompt_B[:2], 0.05).tolist() == [0.5, 0.5]


# --- scales ---


def test_spread_is_that_of_independent_verdicts():
    half = np.array([0.5, 0.5])
    assert reward_level.spread(RUBRIC, half) == pytest.approx(np.sqrt(9 / 4 + 1 / 4) / 4 + 0.05)
    assert reward_level.spread(RUBRIC, np.array([0.5, np.nan])) == pytest.approx(0.5 + 0.05)
    assert reward_level.spread(RUBRIC, np.array([1.0, 0.0])) == 0.05
    pitfall = Rubric(criteria=(RUBRIC.criteria[0], Criterion(id="p", text="P", weight=-1)))
    assert reward_level.spread(pitfall, half) == pytest.approx(np.sqrt(9 / 4 + 1 / 4) / 3 + 0.05)
    assert np.isnan(reward_level.spread(pitfall, np.array([np.nan, 0.5])))


# --- the map ---


def test_a_line_with_its_bounds_by_hand():
    # .95 (.1 + .4 r) + .05 r
    np.testing.assert_allclose(LEVEL.reward(np.array([0.0, 0.5, 1.0])), [0.095, 0.31, 0.525])
    low, high, lower = LEVEL.bounds(np.array([0.5]), np.array([0.25]))
    assert (low[0], high[0], lower[0]) == pytest.approx((0.21, 0.41, 0.26))


def test_the_identity_changes_nothing():
    identity = RewardLevel("identity", reward_level.fit_map("identity", *np.ones((3, 2))), 2.0, 0.05, 0.9, 1, 1, 1)
    np.testing.assert_allclose(identity.reward(np.linspace(0, 1, 11)), np.linspace(0, 1, 11), atol=1e-12)


def test_what_code_knows_has_no_interval():
    found = LEVEL.expected(RUBRIC, np.array([1.0, 0.5]), np.array([True, False]))
    assert (found.prob_low[0], found.prob_high[0]) == (1, 1)
    assert (found.prob_low[1], found.prob_high[1]) == pytest.approx((0.225, 0.775))  # .5 * (.5 + .05)
    assert found.lower < found.reward < found.high < 1
    known = LEVEL.expected(RUBRIC, np.array([1.0, 0.0]), np.array([True, True]))
    assert known.summary() == {"reward": 0.75, "low": 0.75, "high": 0.75, "lower_bound": 0.75}


@pytest.mark.parametrize("method", reward_level.METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_every_map_rises_strictly_and_stays_in_the_unit_interval(method, seed):
    generator = np.random.default_rng(seed)
    proxy = generator.random(30)
    gold = 1 - proxy if seed == 0 else generator.integers(0, 2, 30).astype(float)
    knots = reward_level.fit_map(method, proxy, gold, generator.random(30) + 1e-9)
    mapped = reward_level.apply_knots(knots, np.linspace(0, 1, 201))
    assert (np.diff(mapped) > 0).all() and mapped.min() >= 0 and mapped.max() <= 1


def test_fit_learns_that_the_top_is_flattered():
    rewards = sample(200, np.random.default_rng(0))
    level, mapped, report = fit(rewards)
    assert level.beta == pytest.approx(0.05, rel=0.01) and report["prompts"] == 200
    assert level.reward(np.array([0.9]))[0] == pytest.approx(0.6, abs=0.06)
    weight = reward_level.tail_weights(rewards.proxy_B, rewards.prompt_B, level.beta)
    error = reward_level.errors(
        rewards.gold_B, {"proxy": rewards.proxy_B, "calibrated": mapped}, rewards.proxy_B, weight
    )
    assert error["tail_weighted"]["calibrated"] < 0.8 * error["tail_weighted"]["proxy"]
    assert [row["responses"] for row in error["by_quantile"]] == [240] * 5
    assert min(report["tail_squared_error"], key=report["tail_squared_error"].get) == level.method


def test_bounds_hold_on_new_prompts_everywhere_and_for_the_tilted_policy():
    generator = np.random.default_rng(1)
    inside, above = [], []
    for _ in range(40):
        level, _, _ = fit(sample(30, generator))
        new = sample(40, generator)
        low, high, lower = level.bounds(new.proxy_B, new.spread_B)
        inside.append(np.mean((new.gold_B >= low) & (new.gold_B <= high)))
        above.append(
            np.average(new.gold_B >= lower, weights=reward_level.draw_chances(new.proxy_B, new.prompt_B, level.beta))
        )
    assert 0.885 < np.mean(inside) < 0.95
    assert 0.885 < np.mean(above) < 0.97


@pytest.mark.parametrize(
    ("method", "knots"), [("line", ((0.0, 0.2), (1.0, 0.8))), ("isotonic", ((0.25, 0.35), (0.75, 0.65)))]
)
def test_a_map_goes_through_the_weighted_means(method, knots):
    # at .75 a gold of .8 three times the weight of .2: .65, where a plain mean is .5
    proxy, gold, weight = np.array([0.25, 0.75, 0.75]), np.array([0.35, 0.8, 0.2]), np.array([1.0, 3.0, 1.0])
    np.testing.assert_allclose(reward_level.fit_map(method, proxy, gold, weight), knots)


def flattered(prompts=10):
    """The judge's best two of three at proxy .2; the one that a policy draws at .6, worth .5, or at .8, worth .6."""
    gold, proxy = np.tile([1, 1, 0.5, 1, 1, 0.6], prompts // 2), np.tile([0.2, 0.2, 0.6, 0.2, 0.2, 0.8], prompts // 2)
    return Rewards(gold, proxy, np.full(3 * prompts, 0.1), np.repeat(np.arange(prompts), 3))


def test_the_map_and_the_lower_bound_are_those_of_what_the_policy_draws():
    level, mapped, report = fit(flattered(), coverage=0.25)
    # weights exp(-10) to 1: the line through (.6, .5) and (.8, .6), and a twentieth of the proxy
    close = {"abs": 2e-4}
    assert level.reward(np.array([0.6, 0.8])) == pytest.approx([0.505, 0.61], **close)
    np.testing.assert_allclose(mapped[2::3], np.tile([0.505, 0.61], 5), atol=2e-4)
    assert report["tail_squared_error"]["identity"] == pytest.approx((0.1**2 + 0.2**2) / 2, **close)
    # in spreads of .1 the map is .05 and .1 too high for the drawn, and far too low for the others
    assert level.lower_quantile == pytest.approx(0.05, abs=2e-3)  # the third of ten: 2.75 / 11
    assert level.reward_quantile == pytest.approx(0.1, abs=2e-3)  # the ninth of thirty: 8.25 / 33


def test_bounds_are_of_the_errors_of_maps_that_did_not_see_the_prompt():
    rewards = sample(200, np.random.default_rng(0))
    own = rewards.prompt_B == 0
    level, mapped, _ = fit(rewards)
    other, mapped_again, _ = fit(replace(rewards, gold_B=np.where(own, 1 - rewards.gold_B, rewards.gold_B)))
    assert level.method == other.method and level.knots != other.knots
    np.testing.assert_array_equal(mapped[own], mapped_again[own])
    score = np.abs(rewards.gold_B - mapped) / rewards.spread_B
    assert level.reward_quantile == conformal.quantile(score, rewards.prompt_B, np.ones(len(score)), 0.9)


def test_the_tail_of_intervals_is_the_judge_s_best():
    (row,) = fit(flattered(), coverage=0.25)[2]["intervals"]["reward"]
    assert row["tail_coverage"] == 0 < row["coverage"] <= 1 / 3


# two responses to each of four prompts, the second in the tail; errors of 1 and 1.5 scales
BY_HAND = Intervals(
    np.full(8, 0.5),
    np.array([-1, -3, 1, -3, -1, 3, 1, -3]) / 8,
    np.array([1, 2] * 4) / 8,
    None,
    np.repeat(np.arange(4), 2),
    np.array([False, True] * 4),
)


def test_held_out_intervals_by_hand():
    # fitted on two prompts with a third each: a score of 1 has a third up to it
    folds = [(np.arange(4), np.arange(4, 8)), (np.arange(4, 8), np.arange(4))]
    _, (row,) = BY_HAND.choose(folds, 0.3)
    assert row == {"doubt": 0, "width": 0.375, "coverage": 0.5, "tail_width": 0.5, "tail_coverage": 0}
    _, (row,) = BY_HAND.choose(folds, 0.4)
    assert row == {"doubt": 0, "width": 0.5625, "coverage": 1, "tail_width": 0.75, "tail_coverage": 1}


def test_the_quantile_of_a_lower_bound_is_one_sided_and_by_the_chance_to_be_drawn():
    # a prompt has a fifth. Of |error|: 1 four times, up to .4
    assert BY_HAND.quantile(0.0, 0.35) == 1 and BY_HAND.quantile(0.0, 0.45) == 1.5
    # of -error: -1.5 up to .1, -1 to .3, 1 to .5; the first response drawn once in ten: .18, .22, .26; nine times: .02,
    # .38, .74
    equally, seldom, mostly = (np.tile([first, 1 - first], 4) for first in (0.5, 0.1, 0.9))
    assert [BY_HAND.quantile(0.0, 0.35, chance) for chance in (equally, seldom, mostly)] == [1, 1.5, -1]
    assert [BY_HAND.quantile(0.0, 0.45, chance) for chance in (equally, seldom, mostly)] == [1, 1.5, 1]


def test_numbers_out_of_range_are_refused():
    assert [reward_level.prompts_needed(coverage) for coverage in (0.5, 0.9, 0.95)] == [10, 10, 19]
    for kl in (0.0, -1.0, 21.0, float("nan")):
        with pytest.raises(UserError, match="planned_kl: must lie between 1e-06 and 20 nats"):
            reward_level.check(kl, 0.9)
    for coverage in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="coverage: must lie between 0 and 1"):
            reward_level.check(2.0, coverage)


# --- measuring ---


def record(prompt, number, *values, rubric=RUBRIC):
    verdicts = tuple(
        Verdict(criterion_id=c.id, value=value, masked="refusal" if value is None else None)
        for c, value in zip(rubric.criteria, values, strict=True)
    )
    name = f"{prompt}{number}"
    return JudgedResponse(
        prompt_id=prompt, prompt=prompt, response_id=name, response=name, rubric=rubric, verdicts=verdicts
    )


def test_measure_by_hand():
    records = [
        record("p", 0, 1.0, 1.0),
        record("p", 1, 1.0, 0.0),
        record("q", 0, 0.0, None),
        record("q", 1, None, None),
    ]
    probs = [np.array([0.5, 0.5]), np.array([0.9, 0.1]), np.array([0.2, 0.7]), np.array([0.5, 0.5])]
    raw = [np.array([0.0, 0.0])] * 4
    identity = RewardLevel("identity", ((0.0, 0.0), (1.0, 1.0)), 2.0, 0.05, 0.9, 1.0, 1.0, 0.5)
    found = reward_level.measure(records, probs, raw, identity, tail=0.25, bootstrap=10, seed=0)
    # gold 1, .75, 0; proxy .5, .7, .2 (the masked criterion aside)
    value = {name: {key: one["value"] for key, one in row.items()} for name, row in found["error"].items()}
    assert value["raw"]["all"] == pytest.approx((1 + 0.75 + 0) / 3, abs=1e-6)
    assert value["proxy"]["all"] == pytest.approx((0.5 + 0.05 + 0.2) / 3, abs=1e-6)
    assert value["calibrated"] == value["proxy"]
    assert found["bias"]["proxy"]["all"]["value"] == pytest.approx((-0.5 - 0.05 + 0.2) / 3, abs=1e-6)
    # spreads .395 + .05, .237 + .05, .4 + .05: the first gold is out of reach, but above its bound
    assert found["coverage"]["reward"]["all"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["coverage"]["lower_bound"]["all"]["value"] == 1
    # verdict margins .55, .35, .45 around p: each of the five holds
    assert found["coverage"]["verdict"]["all"]["value"] == 1
    # the tilt takes p's second response, nearly alone, and q's only one
    assert found["error"]["proxy"]["tilted"]["value"] == pytest.approx((0.05 + 0.2) / 2, abs=1e-3)


def test_measure_of_both_tails_by_hand():
    records = [record("p", n, *values) for n, values in enumerate([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])]
    probs = [np.full(2, p) for p in (0.2, 0.3, 0.6, 0.7)]
    identity = RewardLevel("identity", ((0.0, 0.0), (1.0, 1.0)), 2.0, 0.05, 0.9, 1.0, 1.0, 0.5)
    found = reward_level.measure(records, probs, probs, identity, tail=0.25, bootstrap=10, seed=0)

    def told(kind, name):
        return [found[kind][name][part]["value"] for part in ("all", "tail", "proxy_tail")]

    # gold 1, .75, .25, 0: errors .8, .45 in the judge's tail of two, .35, .7 in the model's
    assert told("error", "proxy") == pytest.approx([0.575, 0.625, 0.525], abs=1e-6)
    # spreads .37, .41, .44, .41: the third gold alone is within reach, the first two alone above their bound
    assert told("coverage", "reward") == [0.25, 0, 0.5]
    assert told("coverage", "lower_bound") == [0.5, 1, 0]


def test_measure_does_not_depend_on_the_order_of_records():
    generator = np.random.default_rng(3)
    records = [record(f"p{p}", n, *generator.integers(0, 2, 2).astype(float)) for p in range(5) for n in range(4)]
    probs = [generator.random(2) for _ in records]
    first, second = (
        reward_level.measure(
            [records[k] for k in order],
            [probs[k] for k in order],
            [probs[k] for k in order],
            LEVEL,
            tail=0.25,
            bootstrap=20,
            seed=0,
        )
        for order in (range(20), generator.permutation(20))
    )
    for kind in ("error", "bias", "coverage", "width"):
        for name, row in first[kind].items():
            for key, one in row.items():
                assert one == pytest.approx(second[kind][name][key], abs=1e-6)
