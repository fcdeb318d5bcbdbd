"""Agreement of a prediction with its judge: the arithmetic, and intervals clustered by prompt.

Every number is a `Statistic`: a function of how often each prompt is counted. Counting each once gives
the value; counting each as often as a resample drew it gives the cluster bootstrap. What a statistic
needs is summed per prompt once, so that a thousand resamples are one matrix product.

Owns no records and no files; `rm.audit` puts these together.

Letters: N verdicts, B responses, P prompts, M pairs, R resamples, Q bins. ``prompt_N`` and ``prompt_B``
hold integers in 0..P-1. Gold is the judge's, in [0, 1] and never NaN here: masked verdicts are left out
(and counted) by the caller.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np
from scipy import stats

from rubric_data.files import json_number
from rubric_data.pairs import Pairs, orders

THRESHOLD = 0.5  # above: met; below: not met; exactly there: undecided
LEVEL = 0.95  # of every interval
RELIABILITY_BINS = 10
_CLIP = 1e-6  # probabilities are kept this far from 0 and 1 in the log-loss

TieRule = Literal["half", "wrong", "excluded"]
TIE_RULES: tuple[TieRule, ...] = ("half", "wrong", "excluded")


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where undefined."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """As JSON has it: rounded, null where undefined."""
        return {key: json_number(number) for key, number in asdict(self).items()}


class Statistic(Protocol):
    """A number as a function of how often each prompt is counted."""

    def at(self, counts_RP: np.ndarray) -> np.ndarray:
        """The statistic under each row of prompt counts, (R,); NaN where it is undefined."""


@dataclass(frozen=True)
class Ratio:
    """A mean over things that belong to prompts: sum of values over sum of their number."""

    total_P: np.ndarray
    count_P: np.ndarray

    def at(self, counts_RP: np.ndarray) -> np.ndarray:
        return _divide(counts_RP @ self.total_P, counts_RP @ self.count_P)


@dataclass(frozen=True)
class Concordance:
    """Half of 1 plus the normalised Gini coefficient, from gaps between the verdicts of prompts.

    ``ordered_PP[p, q]``: over every (verdict of p, verdict of q) the gap between them, negative where the lower one is
    scored higher, 0 where both are scored the same; ``apart_PP`` the same under perfect scores.
    """

    ordered_PP: np.ndarray
    apart_PP: np.ndarray

    def at(self, counts_RP: np.ndarray) -> np.ndarray:
        ordered, apart = (((counts_RP @ gaps) * counts_RP).sum(-1) for gaps in (self.ordered_PP, self.apart_PP))
        return (1 + _divide(ordered, apart)) / 2


@dataclass(frozen=True)
class CalibrationError:
    """Expected calibration error over fixed bins: sum over bins of |sum of (predicted - judged)| / N."""

    gap_PQ: np.ndarray
    count_P: np.ndarray

    def at(self, counts_RP: np.ndarray) -> np.ndarray:
        return _divide(np.abs(counts_RP @ self.gap_PQ).sum(-1), counts_RP @ self.count_P)


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa with quadratic weights (1968).

    ``sums_P6``: of each prompt the number of answers, the sums of both sides' answers, of their squares, and of the
    squared differences.
    """

    sums_P6: np.ndarray

    def at(self, counts_RP: np.ndarray) -> np.ndarray:
        count, first, second, first_squared, second_squared, gap = (counts_RP @ self.sums_P6).T
        by_chance = count * (first_squared + second_squared) - 2 * first * second
        by_chance[by_chance < 1e-9 * count**2] = 0  # one and the same answer throughout, but for rounding
        return 1 - _divide(count * gap, by_chance)


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation over all items together.

    ``sums_P6``: of each prompt the number of items, the sums of both sides, of their squares, and of their products.
    """

    sums_P6: np.ndarray

    def at(self, counts_RP: np.ndarray) -> np.ndarray:
        count, first, second, first_squared, second_squared, product = (counts_RP @ self.sums_P6).T
        spread = np.maximum(count * first_squared - first**2, 0) * np.maximum(count * second_squared - second**2, 0)
        spread[spread < 1e-18 * count**4] = 0  # one side is constant, but for rounding
        return _divide(count * product - first * second, np.sqrt(spread))


def resample_counts(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn when P prompts are drawn with replacement, (R, P) float64."""
    uniform = np.full(prompts, 1 / prompts)
    return np.random.default_rng(seed).multinomial(prompts, uniform, size=resamples).astype(float)


def value(statistic: Statistic, prompts: int = 1) -> float:
    """The statistic with each of its ``prompts`` counted once; NaN where undefined."""
    return float(statistic.at(np.ones((1, prompts)))[0])


def estimate(statistic: Statistic, counts_RP: np.ndarray) -> Estimate:
    """The statistic with its percentile interval; resamples that leave it undefined are left out."""
    return with_interval(value(statistic, counts_RP.shape[1]), statistic.at(counts_RP))


def difference(statistic: Statistic, baseline: Statistic, counts_RP: np.ndarray) -> Estimate:
    """``statistic`` minus ``baseline``, both over the same resamples of prompts (a paired interval)."""
    prompts = counts_RP.shape[1]
    gap = value(statistic, prompts) - value(baseline, prompts)
    return with_interval(gap, statistic.at(counts_RP) - baseline.at(counts_RP))


# --- one verdict at a time -------------------------------------------------------------------------------------------


def mean(value_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> Ratio:
    """Mean of ``value``, every item counting the same whatever its prompt."""
    return Ratio(_per_prompt(value_N, prompt_N, prompts), _per_prompt(np.ones(len(value_N)), prompt_N, prompts))


def difference_within_prompts(value_B: np.ndarray, group_B: np.ndarray, prompt_B: np.ndarray, prompts: int) -> Ratio:
    """How much higher the mean of ``value`` is in the group (B,) bool than among a prompt's others.

    Prompts weigh a b / (a + b), with a in the group and b not: the least-squares estimate of one difference beside a
    level for each prompt. NaN where no prompt has both.
    """
    inside_P = _per_prompt(group_B.astype(float), prompt_B, prompts)
    outside_P = _per_prompt((~group_B).astype(float), prompt_B, prompts)
    inner_P = _per_prompt(value_B * group_B, prompt_B, prompts)
    outer_P = _per_prompt(value_B * ~group_B, prompt_B, prompts)
    size_P = np.maximum(inside_P + outside_P, 1)
    return Ratio((inner_P * outside_P - outer_P * inside_P) / size_P, inside_P * outside_P / size_P)


def accuracy(gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> Ratio:
    """Share of decided verdicts on whose side of 0.5 the prediction lies; a prediction of exactly 0.5 earns half.

    Verdicts of exactly 0.5 are undecided and left out.
    """
    decided = gold_N != THRESHOLD
    agreement = (1 + np.sign(gold_N - THRESHOLD) * np.sign(prob_N - THRESHOLD)) / 2
    return mean(agreement[decided], prompt_N[decided], prompts)


def brier(gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> Ratio:
    """Mean of (prob - gold)^2; a soft verdict counts as the number it is."""
    return mean((prob_N - gold_N) ** 2, prompt_N, prompts)


def log_loss(gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> Ratio:
    """Mean of -(g ln p + (1 - g) ln(1 - p)) in nats, p kept within [1e-6, 1 - 1e-6]."""
    p = np.clip(prob_N, _CLIP, 1 - _CLIP)
    return mean(-(gold_N * np.log(p) + (1 - gold_N) * np.log1p(-p)), prompt_N, prompts)


def auroc(gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> Concordance:
    """Chance that a met verdict is scored above an unmet one, over all prompts together; equal scores count half.

    Undecided verdicts (exactly 0.5) are left out. Undefined (NaN) unless both kinds are there.
    """
    decided = gold_N != THRESHOLD
    return concordance(gold_N[decided] > THRESHOLD, prob_N[decided], prompt_N[decided], prompts)


def concordance(gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> Concordance:
    """Chance that the higher of two verdicts is scored higher, over all prompts together; equal scores count half.

    Pairs weigh as much as their verdicts are apart. On verdicts of 0 and 1 it is the AUROC; on soft and graded ones the
    mean of the AUROCs of "is the verdict above t?" over all t in [0, 1], each by its number of pairs, where `auroc`
    asks about t = 1/2 alone. Also (1 + G) / 2 for the Gini coefficient G of the verdicts in order of score, normalised
    by that in their own order. Undefined (NaN) if all verdicts are the same.
    """
    gold_N = np.asarray(gold_N, float)
    return Concordance(*(_signed_gaps(gold_N, order_N, prompt_N, prompts) for order_N in (prob_N, gold_N)))


def _signed_gaps(gold_N: np.ndarray, order_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> np.ndarray:
    """Sum over i of p and j of q of (gold_i - gold_j) sign(order_i - order_j), (P, P)."""
    place_N = np.argsort(order_N, kind="stable")
    order_N, gold_N, prompt_N = order_N[place_N], gold_N[place_N], prompt_N[place_N]
    first_N, past_N = (np.searchsorted(order_N, order_N, side) for side in ("left", "right"))  # of the equal ones
    gaps = np.zeros((prompts, prompts))
    for q in range(prompts):
        own_N = prompt_N == q
        count = np.concatenate([[0], np.cumsum(own_N)])
        summed = np.concatenate([[0.0], np.cumsum(gold_N * own_N)])
        more = count[first_N] - (count[-1] - count[past_N])  # of q below each than above
        gaps[:, q] = _per_prompt(gold_N * more - summed[first_N] + (summed[-1] - summed[past_N]), prompt_N, prompts)
    return gaps


def nearest_answer(value_N: np.ndarray, levels_N: np.ndarray) -> np.ndarray:
    """Each value as an answer on its criterion's scale of so many levels (2: no and yes), (N,) in [0, 1].

    Halfway between two answers it stays halfway.
    """
    place_N = value_N * (levels_N - 1)
    return (np.floor(place_N + 0.5) + np.ceil(place_N - 0.5)) / 2 / (levels_N - 1)


def is_answer(value_N: np.ndarray, levels_N: np.ndarray) -> np.ndarray:
    """Whether a value has one nearest answer, and is not halfway between two, (N,) bool."""
    place_N = value_N * (levels_N - 1)
    return np.floor(place_N + 0.5) == np.ceil(place_N - 0.5)


def kappa(gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int, levels_N: np.ndarray) -> Kappa:
    """Cohen's kappa of the `nearest_answer` of both sides, with quadratic weights; on yes/no answers the plain kappa.

    Verdicts halfway between two answers are left out; a prediction there stays there. Undefined if both sides give one
    and the same answer throughout.
    """
    decided = is_answer(gold_N, levels_N)
    first, second = (nearest_answer(side, levels_N)[decided] for side in (gold_N, prob_N))
    columns = (np.ones(len(first)), first, second, first**2, second**2, (first - second) ** 2)
    return Kappa(np.column_stack([_per_prompt(column, prompt_N[decided], prompts) for column in columns]))


def equal_mass_bins(value_N: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each value, (N,) in 0..bins-1: bins hold equally many values, and equal values share a bin."""
    midrank = stats.rankdata(value_N) - 0.5  # of tied values the middle one, so that order plays no part
    return np.floor(midrank * bins / max(len(value_N), 1)).astype(int)


def equal_width_bins(prob_N: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each probability, (N,) in 0..bins-1: equal parts of [0, 1], a bound to the upper."""
    return np.minimum(np.floor(prob_N * bins), bins - 1).astype(int)


def calibration_error(
    gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int, bins: int
) -> CalibrationError:
    """Expected calibration error over equal-mass bins of the prediction; the bins stay put over resamples."""
    gap = np.zeros((prompts, bins))
    np.add.at(gap, (prompt_N, equal_mass_bins(prob_N, bins)), prob_N - gold_N)
    return CalibrationError(gap, _per_prompt(np.ones(len(gold_N)), prompt_N, prompts))


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability curve: mean prediction against mean verdict of ``count`` verdicts.

    ``low`` and ``high`` are its smallest and largest prediction.
    """

    count: int
    low: float
    high: float
    predicted: Ratio
    judged: Ratio


def reliability_curve(
    gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int, bin_N: np.ndarray
) -> list[ReliabilityBin]:
    """The reliability curve over bins of the prediction, which stay put over resamples; empty ones are left out."""
    found = []
    for members in (bin_N == index for index in np.unique(bin_N)):
        prob, prompt = prob_N[members], prompt_N[members]
        sides = mean(prob, prompt, prompts), mean(gold_N[members], prompt, prompts)
        found.append(ReliabilityBin(len(prob), float(prob.min()), float(prob.max()), *sides))
    return found


def verdict_statistics(
    gold_N: np.ndarray, prob_N: np.ndarray, prompt_N: np.ndarray, prompts: int, levels_N: np.ndarray
) -> dict[str, Statistic]:
    """What is said of any set of N verdicts, by its key in audit.json."""
    sides = gold_N, prob_N, prompt_N, prompts
    return {
        "accuracy": accuracy(*sides),
        "auroc": auroc(*sides),
        "concordance": concordance(*sides),
        "kappa": kappa(*sides, levels_N),
        "brier": brier(*sides),
        "log_loss": log_loss(*sides),
        "ece": calibration_error(*sides, bins=RELIABILITY_BINS),
    }


# --- rewards within a prompt -----------------------------------------------------------------------------------------


def spearman(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int) -> Ratio:
    """Spearman's rank correlation within each prompt, averaged over prompts.

    A prompt counts if the judge tells at least two of its responses apart. A prediction that is constant
    over such a prompt has no correlation; it is given 0, since leaving the prompt out would reward it.
    """
    return _mean_within_prompts(lambda a, b: stats.spearmanr(a, b).statistic, gold_B, proxy_B, prompt_B, prompts)


def kendall(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int) -> Ratio:
    """Kendall's tau-b within each prompt, averaged over prompts; constant prompts as in `spearman`."""
    return _mean_within_prompts(lambda a, b: stats.kendalltau(a, b).statistic, gold_B, proxy_B, prompt_B, prompts)


def correlation(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int) -> Correlation:
    """Pearson's correlation of the rewards of all responses, whatever their prompt; undefined where one is constant."""
    columns = (np.ones(len(gold_B)), gold_B, proxy_B, gold_B**2, proxy_B**2, gold_B * proxy_B)
    return Correlation(np.column_stack([_per_prompt(column, prompt_B, prompts) for column in columns]))


def tail_size(responses: int, tail: float) -> int:
    """How many of ``responses`` make the tail: ceil(tail * n), at least 2 (a tail of one has no pair)."""
    return max(2, int(np.ceil(tail * responses - 1e-9)))  # 0.07 * 100 is a little above 7


def in_tail(gold_B: np.ndarray, prompt_B: np.ndarray, tail: float) -> np.ndarray:
    """Which responses are among the best of their prompt by the judge, (B,) bool.

    The best ``tail_size`` of the prompt, and whatever ties with the last of them.
    """
    found = np.zeros(len(gold_B), bool)
    for prompt in np.unique(prompt_B):
        members = np.flatnonzero(prompt_B == prompt)
        ranked = np.sort(gold_B[members])[::-1]
        boundary = ranked[min(tail_size(len(members), tail), len(members)) - 1]
        found[members] = gold_B[members] >= boundary
    return found


def pair_accuracy(
    gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int, pairs: Pairs, ties: TieRule
) -> Ratio:
    """Share of the pairs the judge orders that the prediction orders the same way, all pairs counting the same.

    Pairs the judge ties on are left out (`judge_ties`). A pair the prediction ties on counts ``half``,
    ``wrong`` (0), or is ``excluded`` from numerator and denominator.
    """
    judged, predicted = orders(gold_B, pairs), orders(proxy_B, pairs)
    counted = (judged != 0) & ((predicted != 0) | (ties != "excluded"))
    credit = np.where(predicted == 0, 0.5 if ties == "half" else 0.0, judged == predicted)
    return mean(credit[counted], prompt_B[pairs.first_M[counted]], prompts)


def prediction_ties(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int, pairs: Pairs) -> Ratio:
    """Share of the pairs the judge orders that the prediction ties on."""
    ordered = orders(gold_B, pairs) != 0
    return mean((orders(proxy_B, pairs) == 0)[ordered], prompt_B[pairs.first_M[ordered]], prompts)


def judge_ties(gold_B: np.ndarray, prompt_B: np.ndarray, prompts: int, pairs: Pairs) -> Ratio:
    """Share of the pairs that the judge ties on."""
    return mean(orders(gold_B, pairs) == 0, prompt_B[pairs.first_M], prompts)


def quantiles(value_B: np.ndarray, prompt_B: np.ndarray) -> np.ndarray:
    """The quantile of each value among those of its prompt, (B,) in (0, 1): (rank - 1/2) / number, ties midway."""
    found = np.empty(len(value_B))
    for prompt in np.unique(prompt_B):
        members = prompt_B == prompt
        found[members] = (stats.rankdata(value_B[members]) - 0.5) / members.sum()
    return found


def among_best(value_B: np.ndarray, prompt_B: np.ndarray, k: int) -> np.ndarray:
    """Chance of each response to be among the k of its prompt with the highest value, (B,) in [0, 1].

    Responses that tie for the last places share them; of a prompt with k responses or fewer, all are.
    """
    found = np.ones(len(value_B))
    for members in (np.flatnonzero(prompt_B == prompt) for prompt in np.unique(prompt_B)):
        if len(members) > k:
            value = value_B[members]
            last = np.sort(value)[-k]
            places = k - (value > last).sum()
            found[members] = np.where(value == last, places / (value == last).sum(), value > last)
    return found


def precision_at(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int, k: int) -> Ratio:
    """Share of a prompt's k best by the prediction that are among its k best by the judge, averaged over prompts.

    The judge's k best are joined by whatever ties with the last of them; of responses the prediction ties on, any is as
    likely to be taken. A prompt counts if some of its responses are not among the judge's. A constant prediction has
    the precision of chance.
    """
    relevant = among_best(gold_B, prompt_B, k) > 0
    hits = _per_prompt(relevant * among_best(proxy_B, prompt_B, k), prompt_B, prompts) / k
    counts = _per_prompt(~relevant, prompt_B, prompts) > 0
    return Ratio(np.where(counts, hits, 0), counts.astype(float))


def exploitation(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int, top: float) -> Ratio:
    """Share of a prompt's best by the prediction that lie in the worse half by the judge, averaged over prompts.

    The best are ceil(``top`` * n) of n; of responses the prediction ties on, any is as likely to be taken. A response
    lies in the worse half if the judge ranks more of the prompt's responses above it than below, so those at the
    median do not. A prompt counts if the judge tells two of its responses apart. A constant prediction has the rate of
    chance, which is at most a half unless many tie at the bottom.
    """
    worse_B = quantiles(gold_B, prompt_B) < 0.5
    total, defined = np.zeros(prompts), np.zeros(prompts)
    for prompt in np.unique(prompt_B):
        members = prompt_B == prompt
        if worse_B[members].any():
            chosen = max(1, int(np.ceil(top * members.sum() - 1e-9)))
            defined[prompt] = 1
            total[prompt] = (
                among_best(proxy_B[members], np.zeros(members.sum(), int), chosen) @ worse_B[members] / chosen
            )
    return Ratio(total, defined)


def best_of_n_weights(proxy_N: np.ndarray, sizes_S: np.ndarray) -> np.ndarray:
    """The chance that each of N samples is the best by proxy in a random subset of n of them, (S, N).

    Equal proxies share the choice evenly. Weighting by it is the mean over all subsets, an unbiased estimate of what
    best-of-n earns. ``sizes`` are integers in 1..N.
    """
    samples = len(proxy_N)
    drawn = np.arange(sizes_S.max())

    def within(count_N: np.ndarray) -> np.ndarray:
        """The chance that all n lie among the ``count`` lowest: C(count, n) / C(N, n), without the binomials."""
        factors = np.maximum(count_N[:, None] - drawn, 0) / (samples - drawn)
        return np.cumprod(factors, axis=1)[:, sizes_S - 1].T

    below_N, upto_N = stats.rankdata(proxy_N, "min") - 1, stats.rankdata(proxy_N, "max")
    return (within(upto_N) - within(below_N)) / (upto_N - below_N)


def best_of_n_regret(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int, n: int) -> Ratio:
    """Expected gold lost by taking the best of n by the prediction and not by the judge, averaged over prompts.

    A prompt counts if it has at least n responses.
    """
    total, defined = np.zeros(prompts), np.zeros(prompts)
    for prompt in np.unique(prompt_B):
        gold, proxy = gold_B[prompt_B == prompt], proxy_B[prompt_B == prompt]
        if len(gold) >= n:
            defined[prompt] = 1
            by_gold, by_proxy = (best_of_n_weights(side, np.array([n]))[0] for side in (gold, proxy))
            total[prompt] = gold @ by_gold - gold @ by_proxy
    return Ratio(total, defined)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _per_prompt(value_N: np.ndarray, prompt_N: np.ndarray, prompts: int) -> np.ndarray:
    return np.bincount(prompt_N, weights=np.asarray(value_N, float), minlength=prompts)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def with_interval(value: float, sample_R: np.ndarray) -> Estimate:
    """``value`` with the percentile interval of its values over resamples, undefined ones (NaN) left out."""
    known = sample_R[~np.isnan(sample_R)]
    if np.isnan(value) or not len(known):
        return Estimate(value, np.nan, np.nan)
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value, float(low), float(high))


def _mean_within_prompts(
    correlation: Callable[[np.ndarray, np.ndarray], float],
    gold_B: np.ndarray,
    proxy_B: np.ndarray,
    prompt_B: np.ndarray,
    prompts: int,
) -> Ratio:
    total, defined = np.zeros(prompts), np.zeros(prompts)
    for prompt in np.unique(prompt_B):
        members = prompt_B == prompt
        gold, proxy = gold_B[members], proxy_B[members]
        if np.ptp(gold) > 0:
            defined[prompt] = 1
            total[prompt] = correlation(gold, proxy) if np.ptp(proxy) > 0 else 0.0
    return Ratio(total, defined)
