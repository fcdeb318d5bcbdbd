import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from rm import forecast, metrics
from rm.forecast import (
    best_of_n,
    best_of_n_kl,
    optimal_beta,
    optimal_kl,
    reweight,
    turning_kl,
    win_rate,
    win_rate_reversed,
)

# --- theory ---

WRONG = {"top 10 %": (0.9, 1), "top 25 %": (0.75, 1), "top 50 %": (0.5, 1), "worst 90 %": (0, 0.9)}
# by temperature: KL, then the win rate of a correct reward, and of one wrong about each of these
TABLE = {
    0.2: (0.6501, 0.8068, 0.8035, 0.7703, 0.6317, 0.4926),
    0.1: (1.3031, 0.9000, 0.8897, 0.8131, 0.5953, 0.6425),
    0.05: (1.9957, 0.9500, 0.9229, 0.7976, 0.5500, 0.8417),
    0.02: (2.9120, 0.9800, 0.9191, 0.7700, 0.5200, 0.9742),
}


def reverse(low, high):
    return lambda u: np.where((u >= low) & (u <= high), low + high - u, u)


@pytest.mark.parametrize("beta", TABLE)
def test_theory_gives_the_published_values(beta):
    kl, correct, *wrong = TABLE[beta]
    assert optimal_kl(beta) == pytest.approx(kl, abs=1e-4)
    assert win_rate_reversed(beta) == pytest.approx(correct, abs=1e-4)
    assert win_rate(beta, lambda u: u) == pytest.approx(correct, abs=1e-4)
    for (low, high), expected in zip(WRONG.values(), wrong, strict=True):
        assert win_rate_reversed(beta, low, high) == pytest.approx(expected, abs=1e-4)
        assert win_rate(beta, reverse(low, high)) == pytest.approx(expected, abs=1e-4)


@given(st.floats(0.01, 50), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_closed_forms_agree_with_quadrature(beta, one, other):
    low, high = sorted((one, other))
    assert win_rate_reversed(beta, low, high) == pytest.approx(win_rate(beta, reverse(low, high)), abs=5e-5)
    log_z = math.log(beta) + math.log(-math.expm1(-1 / beta))  # of exp((u - 1) / beta)

    def integrand(u):
        log_density = (u - 1) / beta - log_z
        return math.exp(log_density) * log_density

    assert optimal_kl(beta) == pytest.approx(quad(integrand, 0, 1, epsabs=1e-12)[0], abs=1e-9)


@given(st.floats(-20, math.log(600)))
def test_the_temperature_for_a_kl_spends_it(log_kl):
    kl = math.exp(log_kl)
    assert optimal_kl(optimal_beta(kl)) == pytest.approx(kl, rel=1e-6)


def test_theory_has_its_limits():
    assert win_rate_reversed(1e9) == pytest.approx(0.5)  # hardly any step from the base
    assert optimal_kl(1e9) == pytest.approx(0)
    assert win_rate_reversed(1e-9) == pytest.approx(1)
    assert win_rate_reversed(1e-9, 0.9, 1) == pytest.approx(0.9)  # what the proxy takes for the best
    # the series of high temperatures joins the closed form
    assert optimal_kl(100.0001) == pytest.approx(optimal_kl(99.9999), rel=1e-5)
    for beta in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta: must be finite and above 0"):
            optimal_kl(beta)
    for kl in (0, -1, math.nan, 701):
        with pytest.raises(ValueError, match=r"kl: must lie in \(0, 700\]"):
            optimal_beta(kl)
    with pytest.raises(ValueError, match="0 <= low <= high <= 1, got"):
        win_rate_reversed(0.1, 0.9, 0.5)


# --- samples, reweighted ---


def test_reweighting_two_samples():
    # at beta 1 the weights are 1 : 2, at inf equal
    found = reweight(np.array([1, 0]), np.array([0, math.log(2)]), np.array([np.inf, 1.0]))
    assert found["gold"] == pytest.approx([1 / 2, 1 / 3])
    assert found["proxy"] == pytest.approx([math.log(2) / 2, 2 * math.log(2) / 3])
    assert found["win_rate"] == pytest.approx([1 / 2, (1 * 3 / 4 + 2 * 1 / 4) / 3])
    assert found["kl"] == pytest.approx([0, math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3])
    assert found["effective_samples"] == pytest.approx([2, 1 / (1 / 9 + 4 / 9)])


def test_the_lowest_temperatures_leave_the_best_by_proxy():
    found = reweight(np.array([0.1, 0.8, 0.2]), np.array([0.3, 1.0, 1.0]), np.array([1e-6]))
    assert found["gold"] == pytest.approx([0.5]) and found["effective_samples"] == pytest.approx([2])
    assert found["kl"] == pytest.approx([math.log(3 / 2)])
    assert found["win_rate"] == pytest.approx([(5 / 6 + 3 / 6) / 2])


def test_many_samples_show_what_theory_says():
    """Evenly spread proxies, wrong about the top quarter: reweighting gives win rate and KL of Theorem 1."""
    proxy = (np.arange(4000) + 0.5) / 4000
    betas = np.array([0.5, 0.2, 0.1, 0.05])
    found = reweight(reverse(0.75, 1)(proxy), proxy, betas)
    assert found["win_rate"] == pytest.approx([win_rate_reversed(beta, 0.75, 1) for beta in betas], abs=2e-3)
    assert found["kl"] == pytest.approx([optimal_kl(beta) for beta in betas], abs=2e-3)


# --- best of n ---


def test_best_of_three_samples():
    found = best_of_n(np.array([0, 1, 0.5]), np.array([0.1, 0.5, 0.9]), np.array([1, 2, 3]))
    # pairs: first and second -> 1, first and third -> .5, second and third -> .5
    assert found["gold"] == pytest.approx([0.5, 2 / 3, 0.5])
    assert found["proxy"] == pytest.approx([0.5, (0.5 + 0.9 + 0.9) / 3, 0.9])
    assert found["best_gold"] == pytest.approx([0.5, (1 + 0.5 + 1) / 3, 1])
    assert found["regret"] == pytest.approx([0, 1 / 6, 0.5])
    assert found["kl"] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])  # no ties


def test_best_of_four_samples_with_a_tie():
    proxy = np.array([0, 0.5, 0.5, 1])
    # pairs: the tied two share their own and the ones with the first
    assert metrics.best_of_n_weights(proxy, np.array([1, 2, 3, 4])) == pytest.approx(
        np.array([[3, 3, 3, 3], [0, 3, 3, 6], [0, 1.5, 1.5, 9], [0, 0, 0, 12]]) / 12
    )
    found = best_of_n(np.array([1, 0, 0.4, 0.2]), proxy, np.array([2]))
    assert found["gold"] == pytest.approx([(0 + 0.4 + 0.2 + 0.2 + 0.2 + 0.2) / 6])


few = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.floats(0, 1)), min_size=1, max_size=6)


@given(few)
@settings(max_examples=40, deadline=None)
def test_best_of_n_is_the_mean_over_all_subsets(rows):
    proxy, gold = (np.array(column) for column in zip(*rows, strict=True))
    sizes = np.arange(1, len(rows) + 1)
    found = best_of_n(gold, proxy, sizes)
    for place, size in enumerate(sizes):
        chosen = []
        for subset in itertools.combinations(range(len(rows)), size):
            best = [i for i in subset if proxy[i] == max(proxy[list(subset)])]
            chosen.append((np.mean(gold[best]), max(gold[list(subset)])))
        by_proxy, by_gold = np.mean(chosen, axis=0)
        assert found["gold"][place] == pytest.approx(by_proxy, abs=1e-12)
        assert found["regret"][place] == pytest.approx(by_gold - by_proxy, abs=1e-12)


def test_kl_of_best_of_n_with_ties():
    sizes = np.array([1, 2, 8])
    bound = [0, math.log(2) - 1 / 2, math.log(8) - 7 / 8]
    # two levels of half each: of two draws both are low in 1/4
    assert best_of_n_kl(sizes[:2], np.array([0.5, 0.5])) == pytest.approx(
        [0, math.log(0.5) / 4 + 3 * math.log(1.5) / 4]
    )
    assert best_of_n_kl(sizes, np.array([7])) == pytest.approx([0, 0, 0])  # all tie: nothing to choose
    assert best_of_n_kl(sizes, np.array([3, 1, 2]), False) == pytest.approx(bound)
    # half of the samples tie at the bottom, the other two are told apart: 1/4 ln 1/2, and 2x ln 2x from 1/2 to 1
    upper = (math.log(2) - 1 / 2) - (math.log(1) / 4 - 1 / 8)
    assert best_of_n_kl(sizes[1:2], np.array([2, 1, 1]), np.array([True, False, False])) == pytest.approx(
        [math.log(0.5) / 4 + upper]
    )
    with pytest.raises(ValueError, match="mass: must be above 0"):
        best_of_n_kl(sizes, np.array([1, 0]))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_kl_of_best_of_n_is_exact_for_a_discrete_base(counts, size, data):
    """Against all sequences of draws; and neither ties nor their absence take it past its bounds."""
    mass = np.array(counts) / sum(counts)
    chosen = np.zeros(len(mass))
    for draws in itertools.product(range(len(mass)), repeat=size):
        chosen[max(draws)] += np.prod(mass[list(draws)])
    expected = sum(q * math.log(q / p) for q, p in zip(chosen, mass, strict=True))
    exact = best_of_n_kl(np.array([size]), np.array(counts))[0]
    assert exact == pytest.approx(expected, abs=1e-9)
    atoms = np.array(data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts))))
    some = best_of_n_kl(np.array([size]), np.array(counts), atoms)[0]
    assert exact - 1e-12 <= some <= math.log(size) - (size - 1) / size + 1e-12


# --- over prompts ---


def test_gold_turns_where_it_is_highest():
    gold = np.array([[0.5, 0.7, 0.6, 0.4], [0.5, 0.5, 0.7, 0.8]])
    kl = np.array([[0, 0.2, 0.6, 1], [0, 0.4, 0.8, 1.2]])
    # together .5 .6 .65 .6; the first alone turns at .2, the second rises to the end
    assert turning_kl(gold, kl, np.array([[1, 1], [2, 0], [0, 2], [0, 0]])) == pytest.approx(
        [0.7, 0.2, np.inf, np.nan], nan_ok=True
    )
    plateau = np.array([[0.5, 0.6, 0.6 - 1e-12]])
    assert turning_kl(plateau, np.array([[0, 1, 2]]), np.ones((1, 1))) == [np.inf]


def sections(prompts, samples, truth, noise=0.0, seed=0):
    """The section of prompts whose gold is ``truth`` of evenly drawn proxies, and 200 resamples."""
    draw = np.random.default_rng(seed)
    proxy = draw.random((prompts, samples))
    gold = truth(proxy) + noise * draw.standard_normal(proxy.shape)
    counts = metrics.resample_counts(prompts, 200, 0)

    def settle(statistic):
        found = metrics.estimate(statistic, counts)
        return {"value": found.value, "low": found.low, "high": found.high}

    prompt = np.repeat(np.arange(prompts), samples)
    return forecast.section(gold.ravel(), proxy.ravel(), prompt, counts, settle)


def test_a_proxy_wrong_at_the_top_turns_and_a_right_one_does_not():
    wrong = sections(60, 16, reverse(0.6, 1))
    turn = wrong["turn"]
    assert turn["outcome"] == "turns" and turn["share"] == 1
    assert turn["kl"]["low"] <= turn["kl"]["value"] <= turn["kl"]["high"] < turn["reach"]
    highest = max((row for row in wrong["rows"] if row["reliable"]), key=lambda row: row["gold"]["value"])
    assert turn["kl"]["value"] == pytest.approx(highest["kl"]["value"], abs=1e-6)
    # theory, for as many samples as one likes: the win rate is highest where its derivative is 0
    betas = np.geomspace(0.05, 2, 400)
    expected = optimal_kl(betas[np.argmax([win_rate_reversed(beta, 0.6, 1) for beta in betas])])
    assert turn["kl"]["low"] - 0.1 < expected < turn["kl"]["high"] + 0.1
    assert wrong["rows"][0]["beta"] is None and wrong["rows"][0]["win_rate"]["value"] == pytest.approx(0.5)
    assert wrong["best_of_n"]["rows"][-1]["n"] == 16

    right = sections(60, 16, lambda u: u)["turn"]
    assert right["outcome"] == "rises" and right["kl"] == {"value": None, "low": None, "high": None}
    # sixteen even samples reach about as far as best of sixteen
    assert right["reach"] == pytest.approx(math.log(16) - 15 / 16, abs=0.25)


def test_what_cannot_be_told_is_called_unclear():
    unrelated = sections(40, 8, lambda u: 0 * u + 0.5, noise=0.2)["turn"]
    assert unrelated["outcome"] == "unclear" and 0.025 < unrelated["share"] < 0.975
    few = sections(5, 16, reverse(0.6, 1))["turn"]
    assert few["outcome"] == "unclear" and few["kl"]["value"] is not None  # five prompts are no sample of prompts
    pairs = sections(40, 2, lambda u: u)
    assert pairs["turn"] == {
        "outcome": "unclear",
        "kl": {"value": None, "low": None, "high": None},
        "share": None,
        "reach": 0.0,
    }
    assert [row["reliable"] for row in pairs["rows"]] == [True] + [False] * (len(pairs["rows"]) - 1)
    constant = forecast.section(
        np.array([0, 1, 0.5]), np.ones(3), np.zeros(3, int), np.ones((5, 1)), lambda statistic: {"value": 0.0}
    )
    assert constant["turn"]["reach"] == 0 and all(row["reliable"] for row in constant["rows"])


def test_resamples_are_asked_about_the_peak_that_was_seen():
    gold = np.array([[0.5, 0.9, 0.6], [0.7, 0.4, 0.6]])  # together .6 .65 .6
    kl = np.array([[0, 0.5, 1.0], [0, 0.5, 1.0]])
    turn = forecast._turn({"gold": gold, "kl": kl}, np.array([[1, 1], [2, 0], [0, 2], [0, 0]]))
    assert turn["kl"] == {"value": 0.5, "low": 0.0, "high": 0.5}
    assert turn["share"] == pytest.approx(2 / 3)  # the second prompt alone falls from its start, not from that peak


def test_prompts_without_enough_responses_are_left_out():
    def settle(statistic):
        return {"value": metrics.value(statistic, 5)}

    # of prompts 0 to 4: three responses, two, three, one, none
    prompt = np.array([2, 0, 1, 0, 2, 3, 1, 0, 2])
    gold, proxy = np.linspace(0, 1, 9), np.linspace(1, 0.2, 9)
    found = forecast.section(gold, proxy, prompt, np.ones((3, 5)), settle)
    assert (found["prompts"], found["responses"]) == (3, 8)
    expected = np.mean([gold[prompt == p].mean() for p in range(3)])
    assert found["rows"][0]["gold"]["value"] == pytest.approx(expected)
    # of n = 2 for three prompts and n = 3 for two, six responses each, the longer curve
    assert found["best_of_n"]["prompts"] == 2
    assert [row["n"] for row in found["best_of_n"]["rows"]] == [1, 2, 3]
    expected = np.mean([gold[prompt == p].mean() for p in (0, 2)])
    assert found["best_of_n"]["rows"][0]["gold"]["value"] == pytest.approx(expected)

    single = forecast.section(gold[:2], proxy[:2], np.array([0, 1]), np.ones((3, 5)), settle)
    assert (single["prompts"], single["rows"], single["best_of_n"]) == (0, [], {"prompts": 0, "rows": []})


def test_long_curves_are_thinned():
    rows = sections(3, 500, lambda u: u)["best_of_n"]["rows"]
    sizes = [row["n"] for row in rows]
    assert sizes[:4] == [1, 2, 3, 4] and sizes[-1] == 500 and len(sizes) <= 32


def test_best_of_n_alone_doubles_and_does_without_gold():
    def settle(statistic):
        return {"value": metrics.value(statistic, 3)}

    # prompts 0 and 1 with five responses each, one of them unjudged; prompt 2 with one
    prompt = np.array([0] * 5 + [1] * 5 + [2])
    proxy = np.concatenate([np.linspace(0, 1, 5), np.linspace(1, 0, 5), [0.3]])
    gold = np.append(np.arange(10) / 10, 0.0)
    gold[7] = np.nan
    found = forecast.best_of_n_section(gold, proxy, prompt, 3, settle)
    assert found["prompts"] == 2 and [row["n"] for row in found["rows"]] == [1, 2, 4, 5]
    assert found["rows"][0]["proxy"]["value"] == pytest.approx(0.5)
    assert found["rows"][-1]["proxy"]["value"] == 1.0
    assert [found["rows"][place]["gold"]["value"] for place in (0, -1)] == pytest.approx([0.2, 0.4])  # prompt 0 alone
    assert found["rows"][0]["best_gold"]["value"] == pytest.approx(0.2)
    none = forecast.best_of_n_section(np.full(11, np.nan), proxy, prompt, 3, settle)
    assert np.isnan(none["rows"][0]["gold"]["value"]) and none["rows"][0]["kl"]["value"] == 0.0
    alone = forecast.best_of_n_section(gold[:1], proxy[:1], prompt[:1], 1, settle)
    assert alone == {"prompts": 0, "rows": []}
