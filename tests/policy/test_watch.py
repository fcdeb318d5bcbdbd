"""The estimate of gold from few judged rollouts, and the test of its decline: by hand, by chance, by property."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from policy.watch import Slope, Trend, draw, estimate_gold, inclusion

NOBODY = np.full(8, np.nan)


def test_half_of_the_draw_is_uniform_and_half_goes_to_the_tail():
    proxy = np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.2, 0.1, np.nan])  # top quarter: .9 and .8
    chance = inclusion(2, proxy, NOBODY)
    assert chance == pytest.approx([0.125, 0.625] + [0.125, 0.625] + [0.125] * 4)


def test_known_doubt_has_half_of_what_the_tail_has_without():
    proxy = np.array([0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    doubt = np.array([0.0, 0.0, 0.3, 0.1, 0.0, 0.0, 0.0, 0.0])
    # 2 of 8: uniform .125; tail .25 each; doubt .5 in parts of 3 to 1
    expected = [0.375, 0.375, 0.5, 0.25] + [0.125] * 4
    assert inclusion(2, proxy, doubt) == pytest.approx(expected)
    assert inclusion(2, proxy, np.zeros(8)) == pytest.approx(inclusion(2, proxy, NOBODY))


def test_what_would_exceed_one_is_certain_and_the_others_share_what_is_left():
    proxy = np.array([0.9, 0.1, 0.1, 0.1])
    # weights 5/8 and thrice 1/8: two draws would give the first 1.25
    assert inclusion(2, proxy, NOBODY[:4]) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert inclusion(4, proxy, NOBODY[:4]).tolist() == [1] * 4
    assert inclusion(9, proxy, NOBODY[:4]).tolist() == [1] * 4


unit = st.floats(0, 1) | st.just(math.nan)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_chances_sum_to_the_size_and_the_draw_keeps_it(data, count):
    proxy, doubt = (data.draw(arrays(float, count, elements=unit)) for _ in range(2))
    size = data.draw(st.integers(1, count))
    chance = inclusion(size, proxy, doubt)
    assert chance.sum() == pytest.approx(size)
    assert (chance <= 1).all() and (chance >= size / count / 2 - 1e-12).all()
    generator = np.random.default_rng(data.draw(st.integers(0, 9)))
    chosen = draw(chance, generator)
    assert chosen.sum() == size and chosen[chance == 1].all()


def test_everybody_is_drawn_as_often_as_the_chances_say():
    chance = np.array([0.1, 0.9, 0.5, 0.5, 1.0, 0.7, 0.3])
    generator = np.random.default_rng(0)
    share = np.mean([draw(chance, generator) for _ in range(4000)], 0)
    assert share == pytest.approx(chance, abs=0.03)
    again = [draw(chance, np.random.default_rng(3)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_an_estimate_by_hand():
    proxy, gold = np.array([0.4, 0.6, 0.8, 0.6]), np.array([0.2, np.nan, np.nan, 0.6])
    found = estimate_gold(proxy, gold, np.array([0.5, 0.5, 0.5, 0.25]), np.array(["a", "b", "c", "d"]))
    # weights 2 and 4 of 6; errors -.2 and 0: the proxy's mean .6 less .2 / 3
    assert found.gold == pytest.approx(0.6 - 0.2 / 3)
    assert found.divergence == pytest.approx(0.2 / 3)
    assert (found.judged, found.degrees) == (2, 1)
    bias = -0.2 / 3
    psi = np.array([0.4 + bias + 4 / 3 * (-0.2 - bias), 0.6 + bias, 0.8 + bias, 0.6 + bias + 8 / 3 * -bias])
    squares = ((psi - psi.mean()) ** 2).sum() / 16
    assert found.variance == pytest.approx(2 * squares)
    half = 12.706 * math.sqrt(2 * (squares + 0.25**2))  # Student's t with one degree; half the range over 2 prompts
    assert found.interval == pytest.approx((found.gold - half, found.gold + half), rel=1e-4)


def test_where_all_are_judged_it_is_their_mean_whatever_the_proxy_says():
    gold, ones = np.array([0.0, 1.0, 0.5, 0.5]), np.ones(4)
    prompts = np.array([1, 1, 2, 2])
    for slope in (0.0, 0.4, 1.0):
        found = estimate_gold(np.array([0.9, 0.9, np.nan, 0.1]), gold, ones, prompts, slope)
        assert found.gold == pytest.approx(0.5)
        assert found.variance == pytest.approx(0)  # both prompts have the same mean
    assert estimate_gold(ones, gold, ones, prompts).divergence == pytest.approx(0.5)


def test_too_little_judged_gives_no_number_instead_of_a_wrong_one():
    proxy, ones, prompts = np.array([0.2, 0.4]), np.ones(2), np.array([1, 2])
    nobody = estimate_gold(proxy, np.full(2, np.nan), ones, prompts)
    assert math.isnan(nobody.gold) and nobody.judged == nobody.degrees == 0
    one = estimate_gold(proxy, np.array([0.1, np.nan]), ones, prompts)
    assert one.gold == pytest.approx(0.2) and math.isnan(one.variance) and all(map(math.isnan, one.interval))
    no_proxy = estimate_gold(np.full(2, np.nan), np.array([0.1, 0.3]), ones, prompts)
    assert no_proxy.gold == pytest.approx(0.2)


def rollouts(generator, prompts, each, binary):
    """Gold, and a proxy that is biased and noisy; the mean gold is .4."""
    prompt = np.repeat(np.arange(prompts), each)
    quality = generator.beta(2, 3, prompts)[prompt]
    gold = (generator.random(len(prompt)) < quality).astype(float) if binary else quality
    return 0.3 + 0.6 * gold + generator.normal(0, 0.15, len(prompt)), gold, prompt


@pytest.mark.parametrize(
    ("prompts", "each", "size", "binary", "failing"),
    [(16, 1, 16, True, 0), (16, 1, 6, False, 0), (64, 1, 16, True, 0), (8, 4, 16, True, 0), (64, 1, 16, True, 0.2)],
)
def test_the_interval_covers_and_the_estimate_is_unbiased(prompts, each, size, binary, failing):
    generator = np.random.default_rng(0)
    found, off = [], []
    for _ in range(300):
        proxy, gold, prompt = rollouts(generator, prompts, each, binary)
        chance = inclusion(size, proxy, generator.uniform(0.05, 0.2, len(proxy)))
        answered = draw(chance, generator) & (generator.random(len(proxy)) >= failing)
        found.append(estimate_gold(proxy, np.where(answered, gold, np.nan), chance, prompt))
        off.append(found[-1].gold - gold.mean())
    covered = [one.interval[0] <= 0.4 <= one.interval[1] for one in found]
    assert np.mean(covered) >= 0.93
    assert abs(np.mean(off)) <= 3.5 * np.std(off) / math.sqrt(len(off)) + 1e-12


def test_a_proxy_that_knows_something_makes_the_estimate_sharper_than_the_judge_alone():
    generator = np.random.default_rng(0)
    with_proxy, alone = [], []
    for _ in range(300):
        proxy, gold, prompt = rollouts(generator, 64, 1, True)
        chance = inclusion(12, np.zeros(64), np.full(64, np.nan))
        judged = np.where(draw(chance, generator), gold, np.nan)
        with_proxy.append(estimate_gold(proxy, judged, chance, prompt).gold)
        alone.append(np.nanmean(judged))
    assert np.std(with_proxy) < 0.75 * np.std(alone)


def test_the_slope_is_golds_on_the_proxy_between_none_and_all_of_it():
    slope = Slope()
    proxy, gold = np.tile([0.2, 0.6], 20), np.tile([0.3, 0.5], 20)
    slope.add(proxy[:28], gold[:28], np.ones(28))
    assert slope.value == 1.0  # too few to tell
    slope.add(proxy + 0.1, gold - 0.2, np.ones(40))  # levels differ by update and do not count
    assert slope.value == pytest.approx(0.5)
    for sign, bound in ((-1, 0.0), (9, 1.0)):
        other = Slope()
        other.add(proxy, sign * gold, np.ones(40))
        assert other.value == bound
    other = Slope()
    other.add(np.full(40, 0.5), gold, np.ones(40))
    other.add(proxy, np.full(40, np.nan), np.ones(40))
    assert other.value == 1.0


def test_a_trend_by_hand():
    trend = Trend(4, error=0.05)  # windows: 1, 2, 2 and 3 of them, so .05 / 16 for each of their limits
    many = 10**9  # degrees: Student's t is normal, and 2.7344 its upper .003125
    reach = 2.7344 * 0.1
    assert trend.best is None
    assert trend.add(1, 0.9, 0.01, many) is None
    assert trend.best.low == pytest.approx(0.9 - reach, abs=1e-4)
    assert trend.add(2, 0.9, 0.01, many) is None
    assert (trend.best.first, trend.best.last) == (1, 2)
    assert trend.best.low == pytest.approx(0.9 - reach / math.sqrt(2), abs=1e-4)
    assert trend.add(3, 0.45, 0.01, many) is None  # .45 + .273 is not below .9 - .193
    fall = trend.add(4, 0.45, 0.01, many)  # .45 + .193 is
    assert (fall.before.first, fall.before.last, fall.after.first, fall.after.last) == (1, 2, 3, 4)
    assert fall.after.high == pytest.approx(0.45 + reach / math.sqrt(2), abs=1e-4)
    assert trend.best.last == 2
    with pytest.raises(ValueError, match="planned for 4 looks"):
        trend.add(5, 0.5, 0.01, many)


def test_a_window_has_one_more_prompt_that_is_off_by_the_whole_range():
    trend = Trend(2, error=0.05)  # windows: 1 and 2, so .05 / 6 for each of their limits
    trend.add(1, 0.6, 0.0, 3)
    assert trend.best.low == pytest.approx(0.6 - 4.8567 * math.sqrt(1 / (4 * 3)), abs=1e-3)  # t with 3 degrees
    trend.add(2, 0.6, 0.0, 3)
    assert trend.best.low == pytest.approx(0.6 - 3.2875 * math.sqrt(1 / (8 * 7)), abs=1e-3)  # with 6, over 8 prompts


def test_windows_that_overlap_are_no_decline():
    trend = Trend(2)
    trend.add(1, 0.2, 1e-9, 100)
    assert trend.add(2, 0.9, 1e-9, 100) is None  # the window 1 to 2 is below 2, but not later


def looks(generator, means, *, prompts, size):
    """The alarm's look, counted from 1, if there is one."""
    trend, slope = Trend(len(means)), Slope()
    for number, mean in enumerate(means, 1):
        gold = (generator.random(prompts) < mean).astype(float)
        proxy = 0.3 + 0.6 * gold + generator.normal(0, 0.2, prompts)
        chance = inclusion(size, proxy, np.full(prompts, np.nan))
        judged = np.where(draw(chance, generator), gold, np.nan)
        found = estimate_gold(proxy, judged, chance, np.arange(prompts), slope.value)
        slope.add(proxy, judged, chance)
        if trend.add(number, found.gold, found.variance, found.degrees):
            return number
    return None


def test_many_looks_raise_few_false_alarms_even_where_rewards_rarely_differ():
    generator = np.random.default_rng(0)
    flat = [looks(generator, [0.5] * 30, prompts=16, size=8) for _ in range(15)]
    ones = [looks(generator, [0.8] * 30, prompts=16, size=16) for _ in range(15)]
    rare = [looks(generator, [0.97] * 30, prompts=16, size=16) for _ in range(15)]
    rising = [looks(generator, np.linspace(0.2, 0.9, 30), prompts=16, size=8) for _ in range(10)]
    assert sum(look is not None for look in (*flat, *ones, *rare, *rising)) <= 2


def test_a_decline_is_found_after_it_began():
    generator = np.random.default_rng(0)
    means = [0.8] * 12 + [0.2] * 12
    found = [looks(generator, means, prompts=32, size=16) for _ in range(10)]
    assert all(look is not None and 12 < look <= 20 for look in found)
