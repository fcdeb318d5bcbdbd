"""From the proxy reward of a response to the judge's: its expected value, an interval, and a lower bound.

Owns the monotone map, the weights that aim it where a policy will be, the conformal bounds, and how they are measured
on held-out prompts. Verdicts are calibrated in `rm.calibration`; that calls what is stored from here.

Letters: B responses with a reward, K criteria, N verdicts, P prompts. Rewards lie in [0, 1]. ``prompt_B`` holds an
integer for each prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rm import conformal, metrics, monotone
from rm.forecast import optimal_beta
from rm.posterior import reward_std
from rubric_data.errors import UserError
from rubric_data.files import json_number
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.records import JudgedResponse, Rubric
from rubric_data.reward import rubric_reward

Knots = tuple[tuple[float, float], ...]  # (proxy, reward of the judge)

METHODS = ("identity", "line", "isotonic")
DOUBTS = (0.0, 0.5, 1.0, 2.0, 4.0)  # weights of the head's doubt in the width of intervals; one is chosen
PROMPTS = 10  # with rewards, that the map needs

_LEAST_KL, _MOST_KL = 1e-6, 20.0  # nats
_OWN = 0.05  # share of the proxy itself in the map: it rises where the fit is flat, so no two rewards come to tie
_FLOOR = 0.05  # added to every uncertainty scale: the model is never sure to a hair
_LEAST_WEIGHT = 1e-9  # of a response, against the greatest: below the tail the map rests on something, too
_BINS = 5
_WORTH = 0.95  # intervals have to be a twentieth narrower for doubt to have a part in them: less is noise
TAIL = 0.25  # best share of a prompt's responses, by the judge


@dataclass(frozen=True)
class Expected:
    """What the judge would say of a response.

    ``reward`` on average; its own reward lies in [``low``, ``high``] at the calibration's coverage, and above ``lower``
    at that coverage for the responses of a policy at the planned KL. ``prob_low`` and ``prob_high`` (K,) hold its
    verdicts, each at that coverage: an interval without 0 or without 1 settles the verdict.
    """

    reward: float
    low: float
    high: float
    lower: float
    prob_low: np.ndarray
    prob_high: np.ndarray

    def summary(self) -> dict[str, float]:
        """The rewards, as a line of JSON has them."""
        return {"reward": self.reward, "low": self.low, "high": self.high, "lower_bound": self.lower}


@dataclass(frozen=True)
class Doubted:
    """The quantiles where the head's doubt (`rm.posterior`) widens the units, by these weights; 0 leaves them alone."""

    verdict_weight: float
    reward_weight: float
    verdict_quantile: float
    reward_quantile: float
    lower_quantile: float


@dataclass(frozen=True)
class RewardLevel:
    """The map and the bounds of one model.

    ``knots`` (proxy, judge's reward): straight lines between them, flat outside, of which a twentieth is the proxy
    itself. ``beta`` belongs to ``planned_kl`` (`optimal_beta`). The quantiles are of errors in units of `spread` and
    `verdict_scale`, at ``coverage``; ``doubted`` are those to use where the head's doubt is known, if they are better.
    """

    method: str
    knots: Knots
    planned_kl: float
    beta: float
    coverage: float
    verdict_quantile: float
    reward_quantile: float
    lower_quantile: float
    doubted: Doubted | None = None

    def reward(self, proxy_B: np.ndarray) -> np.ndarray:
        """The judge's expected reward, (B,) in [0, 1]; rises strictly with ``proxy``."""
        return apply_knots(self.knots, proxy_B)

    def bounds(
        self, proxy_B: np.ndarray, spread_B: np.ndarray, std_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Low and high end of the interval and the lower bound, each (B,) in [0, 1]; ``std`` of the head's doubt."""
        by: RewardLevel | Doubted = self
        if self.doubted is not None and std_B is not None:
            by, spread_B = self.doubted, widened(spread_B, self.doubted.reward_weight * std_B)
        centre = self.reward(proxy_B)
        margins = -by.reward_quantile, by.reward_quantile, -by.lower_quantile
        low, high, lower = (np.clip(centre + margin * spread_B, 0, 1) for margin in margins)
        return low, high, lower

    def verdict_bounds(self, prob_N: np.ndarray, std_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Low and high end of the interval of each verdict, (N,) in [0, 1]; ``std`` of the head's doubt."""
        scale_N, quantile = verdict_scale(prob_N), self.verdict_quantile
        if self.doubted is not None and std_N is not None:
            scale_N = widened(scale_N, self.doubted.verdict_weight * std_N)
            quantile = self.doubted.verdict_quantile
        margin = quantile * scale_N
        return np.clip(prob_N - margin, 0, 1), np.clip(prob_N + margin, 0, 1)

    def expected(
        self, rubric: Rubric, probs_K: np.ndarray, exact_K: np.ndarray, covariance_KK: np.ndarray | None = None
    ) -> Expected:
        """What the judge would say where the model says ``probs``; ``exact`` marks what is known, such as by code.

        ``covariance``: of the answers by the head's doubt (`rm.posterior.Doubt`), if that is known. The map was fitted
        where the model answered everything: the more of a rubric is exact, the more cautious it is. With all of it
        exact nothing is left to expect.
        """
        proxy = rubric_reward(rubric, probs_K)
        std_K = std_B = None
        if covariance_KK is not None:
            std_K, std_B = np.sqrt(covariance_KK.diagonal()), np.array([reward_std(rubric, probs_K, covariance_KK)])
        prob_low, prob_high = (np.where(exact_K, probs_K, side) for side in self.verdict_bounds(probs_K, std_K))
        if exact_K.all():
            return Expected(proxy, proxy, proxy, proxy, prob_low, prob_high)
        low, high, lower = self.bounds(np.array([proxy]), np.array([spread(rubric, probs_K)]), std_B)
        reward = float(self.reward(np.array([proxy]))[0])
        return Expected(reward, float(low[0]), float(high[0]), float(lower[0]), prob_low, prob_high)


def apply_knots(knots: Knots, proxy_B: np.ndarray) -> np.ndarray:
    """The map through ``knots`` at ``proxy``, (B,); NaN stays NaN."""
    places, heights = np.transpose(knots)
    return (1 - _OWN) * np.clip(np.interp(proxy_B, places, heights), 0, 1) + _OWN * np.asarray(proxy_B)


# --- the tail --------------------------------------------------------------------------------------------------------


def tail_weights(proxy_B: np.ndarray, prompt_B: np.ndarray, beta: float) -> np.ndarray:
    """How much likelier a policy tilted by exp(u / beta) gives each response, (B,) in (0, 1], 1 the greatest.

    u is the response's quantile among those to its prompt, by the proxy: (rank - 1/2) / number, ties at their middle
    rank. A prompt with few responses says little of the tail, and counts little.
    """
    quantile_B = metrics.quantiles(proxy_B, prompt_B)
    return np.maximum(np.exp((quantile_B - quantile_B.max(initial=0.0)) / beta), _LEAST_WEIGHT)


def draw_chances(proxy_B: np.ndarray, prompt_B: np.ndarray, beta: float) -> np.ndarray:
    """The chance with which that policy draws each response from those to its prompt, (B,); 1 in all for a prompt."""
    quantile_B, place_B = metrics.quantiles(proxy_B, prompt_B), np.unique(prompt_B, return_inverse=True)[1]
    top_P = np.zeros(place_B.max(initial=-1) + 1)
    np.maximum.at(top_P, place_B, quantile_B)
    weight_B = np.exp((quantile_B - top_P[place_B]) / beta)
    return weight_B / np.bincount(place_B, weight_B)[place_B]


# --- uncertainty scales ----------------------------------------------------------------------------------------------


def verdict_scale(prob_N: np.ndarray) -> np.ndarray:
    """Standard deviation of a yes/no verdict with that probability, and 0.05 more."""
    return np.sqrt(prob_N * (1 - prob_N)) + _FLOOR


def spread(rubric: Rubric, probs_K: np.ndarray) -> float:
    """Standard deviation of the weighted mean if verdicts were independent, vetoes aside, and 0.05 more.

    It need not be right, only larger where errors are larger. NaN probabilities are left out; NaN if none of a
    positive weight is left.
    """
    weight_K = np.array([criterion.weight for criterion in rubric.criteria])
    known = ~np.isnan(probs_K)
    total = weight_K[known & (weight_K > 0)].sum()
    variance = (weight_K**2 * probs_K * (1 - probs_K))[known].sum()
    return math.sqrt(variance) / total + _FLOOR if total > 0 else math.nan


def widened(scale_N: np.ndarray, std_N: np.ndarray) -> np.ndarray:
    """A scale of `verdict_scale` or `spread` whose standard deviation has an independent ``std`` added."""
    return np.hypot(scale_N - _FLOOR, std_N) + _FLOOR


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewards:
    """B responses that the judge rewarded: its reward, the model's over the same questions, and the model's spread.

    ``std``: of the model's reward by the head's doubt, where that is known.
    """

    gold_B: np.ndarray
    proxy_B: np.ndarray
    spread_B: np.ndarray
    prompt_B: np.ndarray
    std_B: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        records: Sequence[JudgedResponse],
        probs: Sequence[np.ndarray],
        prompt_B: np.ndarray,
        covariances: Sequence[np.ndarray] | None = None,
    ) -> "Rewards":
        """``probs[i]`` (K,) and ``covariances[i]`` (K, K) are of ``records[i]``, to the prompt ``prompt_B[i]``.

        Rewards have `REWARD_DECIMALS`, on both sides: those closer than this tie.
        """
        asked = [np.where(np.isnan(record.values()), np.nan, own) for record, own in zip(records, probs, strict=True)]
        gold = np.round([rubric_reward(record.rubric, record.values()) for record in records], REWARD_DECIMALS)
        proxy = np.round([rubric_reward(r.rubric, own) for r, own in zip(records, asked, strict=True)], REWARD_DECIMALS)
        scale = np.array([spread(r.rubric, own) for r, own in zip(records, asked, strict=True)], float)
        known = ~np.isnan(gold)
        std_B = None
        if covariances is not None:
            rows = zip(records, asked, covariances, strict=True)
            std_B = np.array([reward_std(r.rubric, own, covariance) for r, own, covariance in rows])[known]
        return cls(gold[known], proxy[known], scale[known], prompt_B[known], std_B)


def fit_map(method: str, proxy_B: np.ndarray, gold_B: np.ndarray, weight_B: np.ndarray) -> Knots:
    """The knots of ``method`` with the least weighted squared error. Raises ValueError on an unknown method."""
    if method == "identity":
        return (0.0, 0.0), (1.0, 1.0)
    if method == "line":
        start, slope = monotone.line(proxy_B, gold_B, weight_B)
        return (0.0, start), (1.0, start + slope)
    if method == "isotonic":
        places, heights = monotone.isotonic(proxy_B, gold_B, weight_B)
        return tuple((float(x), float(y)) for x, y in zip(places, heights, strict=True))
    raise ValueError(f"reward level: unknown method {method!r}; choose one of {', '.join(METHODS)}")


def check(planned_kl: float, coverage: float) -> None:
    """Raise UserError on a KL or a coverage that is out of range."""
    if not _LEAST_KL <= planned_kl <= _MOST_KL:
        raise UserError(f"planned_kl: must lie between {_LEAST_KL:g} and {_MOST_KL:g} nats, got {planned_kl}; use 2")
    if not 0 < coverage < 1:
        raise UserError(f"coverage: must lie between 0 and 1, got {coverage}; 0.9 is common")


def prompts_needed(coverage: float) -> int:
    """The fewest prompts with rewards to fit on, for a coverage in (0, 1)."""
    return max(PROMPTS, conformal.prompts_needed(coverage))


@dataclass(frozen=True)
class Intervals:
    """What intervals are made of: N centres in [0, 1], errors (gold - centre), their scale, the head's doubt.

    ``tail`` marks what is among each prompt's best by the judge.
    """

    centre_N: np.ndarray
    error_N: np.ndarray
    scale_N: np.ndarray
    std_N: np.ndarray | None
    prompt_N: np.ndarray
    tail_N: np.ndarray

    def quantile(self, weight: float, coverage: float, chance_N: np.ndarray | None = None) -> float:
        """Of |error| over the scale, widened by ``weight`` times the doubt; with ``chance``, of -error at those."""
        miss_N = np.abs(self.error_N) if chance_N is None else -self.error_N
        chance_N = np.ones(len(miss_N)) if chance_N is None else chance_N
        return conformal.quantile(miss_N / self._scale(weight), self.prompt_N, chance_N, coverage)

    def choose(
        self, folds: Sequence[tuple[np.ndarray, np.ndarray]], coverage: float
    ) -> tuple[float, list[dict[str, float | None]]]:
        """The weight of doubt whose intervals are the narrowest on held-out prompts, and what each of `DOUBTS` gives.

        All have the same coverage by their making; it is measured on the same prompts, and among the best.
        """
        weights = DOUBTS if self.std_N is not None else DOUBTS[:1]
        rows = [self._held_out(weight, folds, coverage) for weight in weights]
        width = [row["width"] for row in rows]
        best = int(np.argmin(width))
        chosen = best if width[best] < _WORTH * width[0] else 0
        return weights[chosen], [{key: json_number(number) for key, number in row.items()} for row in rows]

    def _held_out(
        self, weight: float, folds: Sequence[tuple[np.ndarray, np.ndarray]], coverage: float
    ) -> dict[str, float]:
        scale_N = self._scale(weight)
        margin_N = np.empty(len(scale_N))
        for train, test in folds:
            score_N = np.abs(self.error_N[train]) / scale_N[train]
            level = conformal.quantile(score_N, self.prompt_N[train], np.ones(len(train)), coverage)
            margin_N[test] = level * scale_N[test]
        width_N = np.minimum(self.centre_N + margin_N, 1) - np.maximum(self.centre_N - margin_N, 0)
        held_N = np.abs(self.error_N) <= margin_N
        return {
            "doubt": weight,
            "width": float(width_N.mean()),
            "coverage": float(held_N.mean()),
            "tail_width": float(width_N[self.tail_N].mean()),
            "tail_coverage": float(held_N[self.tail_N].mean()),
        }

    def _scale(self, weight: float) -> np.ndarray:
        return self.scale_N if self.std_N is None else widened(self.scale_N, weight * self.std_N)


def fit(
    rewards: Rewards,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    planned_kl: float,
    coverage: float,
    verdicts: Intervals,
    verdict_folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[RewardLevel, np.ndarray, dict[str, Any]]:
    """The map with the least tail-weighted squared error on held-out prompts, and the bounds from its errors there.

    ``folds``: places to fit on and to judge by, prompts whole, and ``verdict_folds`` of ``verdicts``. ``rewards`` are
    best themselves of probabilities that were fitted without the prompt. Returns the level, what the map says of each
    response when fitted without its prompt, (B,), and the comparison. At least `prompts_needed` prompts.
    """
    beta = optimal_beta(planned_kl)
    weight_B = tail_weights(rewards.proxy_B, rewards.prompt_B, beta)
    tried = {}
    for method in METHODS:
        mapped_B = np.empty(len(weight_B))
        for train, test in folds:
            knots = fit_map(method, rewards.proxy_B[train], rewards.gold_B[train], weight_B[train])
            mapped_B[test] = apply_knots(knots, rewards.proxy_B[test])
        tried[method] = mapped_B
    error = {name: float(np.average((own - rewards.gold_B) ** 2, weights=weight_B)) for name, own in tried.items()}
    method = min(tried, key=error.__getitem__)
    intervals = Intervals(
        tried[method],
        rewards.gold_B - tried[method],
        rewards.spread_B,
        rewards.std_B,
        rewards.prompt_B,
        metrics.in_tail(rewards.gold_B, rewards.prompt_B, TAIL),
    )
    chance_B = draw_chances(rewards.proxy_B, rewards.prompt_B, beta)
    verdict_weight, verdict_rows = verdicts.choose(verdict_folds, coverage)
    reward_weight, reward_rows = intervals.choose(folds, coverage)

    def quantiles(verdict: float, reward: float) -> dict[str, float]:
        return {
            "verdict_quantile": verdicts.quantile(verdict, coverage),
            "reward_quantile": intervals.quantile(reward, coverage),
            "lower_quantile": intervals.quantile(reward, coverage, chance_B),
        }

    doubted = None
    if verdict_weight or reward_weight:
        doubted = Doubted(verdict_weight, reward_weight, **quantiles(verdict_weight, reward_weight))
    level = RewardLevel(
        method,
        fit_map(method, rewards.proxy_B, rewards.gold_B, weight_B),
        planned_kl,
        beta,
        coverage,
        **quantiles(0.0, 0.0),
        doubted=doubted,
    )
    low_B, high_B, _ = level.bounds(rewards.proxy_B, rewards.spread_B, rewards.std_B)
    report = {
        "method": method,
        "planned_kl": planned_kl,
        "beta": json_number(beta),
        "coverage": coverage,
        "responses": len(weight_B),
        "prompts": len(np.unique(rewards.prompt_B)),
        "effective_responses": json_number(weight_B.sum() ** 2 / (weight_B**2).sum()),
        "tail_squared_error": {name: json_number(value) for name, value in error.items()},
        "mean_width": json_number((high_B - low_B).mean()),
        "intervals": {"verdict": verdict_rows, "reward": reward_rows},
    }
    return level, tried[method], report


def errors(
    gold_B: np.ndarray, predicted: Mapping[str, np.ndarray], order_B: np.ndarray, weight_B: np.ndarray
) -> dict[str, Any]:
    """Mean absolute error of each prediction: over all, weighted to the tail, in bins of equal mass by ``order``."""
    gaps = {name: np.abs(own_B - gold_B) for name, own_B in predicted.items()}
    bin_B = metrics.equal_mass_bins(order_B, _BINS)
    return {
        "all": {name: json_number(gap.mean()) for name, gap in gaps.items()},
        "tail_weighted": {name: json_number(np.average(gap, weights=weight_B)) for name, gap in gaps.items()},
        "by_quantile": [
            {"low": json_number(order_B[chosen].min()), "high": json_number(order_B[chosen].max())}
            | {"responses": int(chosen.sum())}
            | {name: json_number(gap[chosen].mean()) for name, gap in gaps.items()}
            for chosen in (bin_B == index for index in np.unique(bin_B))
        ],
    }


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    records: Sequence[JudgedResponse],
    probs: Sequence[np.ndarray],
    raw: Sequence[np.ndarray],
    level: RewardLevel,
    *,
    tail: float,
    bootstrap: int,
    seed: int,
    covariances: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """How far rewards are from the judge's, and how often its verdicts and rewards keep their bounds.

    ``probs`` and ``raw`` are the model's calibrated and uncalibrated answers on held-out ``records``. Every number
    comes for `all` responses, for each prompt's `tail` by the judge, for its `proxy_tail` by the model, and `tilted`:
    drawn from each prompt by the tilt of the planned KL. Intervals by bootstrap over prompts. ``covariances[i]`` (K, K)
    are those of `rm.posterior.Doubt`; without them the bounds measured are those that do without.
    """
    texts = {text: place for place, text in enumerate(sorted({record.prompt for record in records}))}
    prompt_B = np.array([texts[record.prompt] for record in records], int)
    rewarded = [k for k, record in enumerate(records) if not math.isnan(rubric_reward(record.rubric, record.values()))]
    prompt_B = prompt_B[rewarded]
    records, probs = [records[k] for k in rewarded], [probs[k] for k in rewarded]
    std_N = None
    if covariances is not None:
        covariances = [covariances[k] for k in rewarded]
        std_N = np.concatenate([np.sqrt(covariance.diagonal()) for covariance in covariances])
    own = Rewards.of(records, probs, prompt_B, covariances)
    counts_RP = metrics.resample_counts(len(texts), bootstrap, seed)
    weight = {
        "all": np.ones(len(records)),
        "tail": metrics.in_tail(own.gold_B, prompt_B, tail).astype(float),
        "proxy_tail": metrics.in_tail(own.proxy_B, prompt_B, tail).astype(float),
        "tilted": draw_chances(own.proxy_B, prompt_B, level.beta),
    }

    def by_slice(value: np.ndarray, place: np.ndarray) -> dict[str, Any]:
        found = {}
        for name, weight_B in weight.items():
            share, prompt = weight_B[place], prompt_B[place]
            sums = (np.bincount(prompt, part, minlength=len(texts)) for part in (share * value, share))
            found[name] = metrics.estimate(metrics.Ratio(*sums), counts_RP).as_dict()
        return found

    each = np.arange(len(records))
    predicted = {
        "raw": Rewards.of(records, [raw[k] for k in rewarded], prompt_B).proxy_B,
        "proxy": own.proxy_B,
        "calibrated": level.reward(own.proxy_B),
    }
    low, high, lower = level.bounds(own.proxy_B, own.spread_B, own.std_B)
    gold_N = np.concatenate([record.values() for record in records])
    known = ~np.isnan(gold_N)
    place_N = np.repeat(each, [len(record.rubric.criteria) for record in records])[known]
    verdict_low, verdict_high = level.verdict_bounds(
        np.concatenate(probs)[known], None if std_N is None else std_N[known]
    )
    return {
        "planned_kl": level.planned_kl,
        "target": level.coverage,
        "error": {name: by_slice(np.abs(one - own.gold_B), each) for name, one in predicted.items()},
        "bias": {name: by_slice(one - own.gold_B, each) for name, one in predicted.items()},
        "coverage": {
            "verdict": by_slice(_within(gold_N[known], verdict_low, verdict_high), place_N),
            "reward": by_slice(_within(own.gold_B, low, high), each),
            "lower_bound": by_slice(_within(own.gold_B, lower, np.ones(len(lower))), each),
        },
        "width": {
            "verdict": by_slice(verdict_high - verdict_low, place_N),
            "reward": by_slice(high - low, each),
            "lower_bound": by_slice(predicted["calibrated"] - lower, each),
        },
    }


def _within(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """1 where ``value`` lies in [low, high], rounding aside."""
    return ((value >= low - 1e-9) & (value <= high + 1e-9)).astype(float)
