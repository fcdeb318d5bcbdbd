"""A policy's gold reward from a few judged rollouts, and whether it has fallen. Pure arithmetic; asks nobody.

Every rollout has the proxy's reward p, a few have the judge's g. Which few is drawn, not chosen, so that the judge may
look where the proxy is most likely to be wrong and the estimate stays fair to all rollouts: a rollout that is drawn
with chance pi counts 1 / pi times (Zrnic & Candes 2024, arXiv:2403.03208). Calling the judge is `policy.watching`.

Letters: N rollouts of an update, P prompts.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

ERROR = 0.05  # of a `Trend`, over all its looks; 1 - coverage of `GoldEstimate.interval`
_UNIFORM = 0.5  # share of the draw that goes to all rollouts alike; the rest to the tail and to doubt
_TAIL = 0.25  # top share of the proxy's rewards
_ENOUGH = 30  # judged rollouts before `Slope` believes what it sees
_RANGE = 1.0  # of a reward


def inclusion(size: int, proxy_N: np.ndarray, doubt_N: np.ndarray) -> np.ndarray:
    """Chance of each rollout to be judged, (N,), in (0, 1], with sum min(size, N).

    Half of the draw is uniform, so that no chance is below size / 2N. A quarter goes to the update's top quarter by
    proxy, where a policy will be pushed, and a quarter is in proportion to ``doubt`` (standard deviations, NaN where
    not known); the tail has both where no doubt is known. What would exceed 1 is certain.
    """
    if size >= len(proxy_N):
        return np.ones(len(proxy_N))
    preferred_N = _shares(_tail(proxy_N))
    known_N = np.isfinite(doubt_N)
    if known_N.any() and doubt_N[known_N].any():
        doubt_N = np.where(known_N, doubt_N, doubt_N[known_N].mean())
        preferred_N = (preferred_N + _shares(doubt_N)) / 2
    return _capped(_UNIFORM / len(proxy_N) + (1 - _UNIFORM) * preferred_N, size)


def draw(chance_N: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Who is drawn, (N,) bool: each with its chance, as many as the chances sum to.

    Systematic sampling in random order (Madow 1949): chances laid end to end, and one point in every unit of length.
    """
    chosen_N = chance_N >= 1  # rounding could jump over a whole unit
    order = generator.permutation(np.flatnonzero(~chosen_N))
    ends = np.cumsum(chance_N[order])
    ends[-1:] = np.round(ends[-1:])
    points = np.floor(ends + generator.random())
    chosen_N[order] = np.diff(points, prepend=0) > 0
    return chosen_N


@dataclass(frozen=True)
class GoldEstimate:
    """Mean gold reward of a policy, and how far the proxy is above it; NaN where too little was judged.

    ``judged``: rollouts with a gold reward. ``degrees`` of freedom of both variances: judged prompts less one.
    """

    gold: float = math.nan
    variance: float = math.nan
    divergence: float = math.nan
    divergence_variance: float = math.nan
    judged: int = 0
    degrees: int = 0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mean gold reward, by Student's t.

        One more prompt that is off by half the range is added, as no difference among a few says little.
        """
        if not self.degrees:
            return math.nan, math.nan
        variance = self.variance + _slack(self.degrees + 1, _RANGE / 2)
        reach = -stdtrit(self.degrees, ERROR / 2) * math.sqrt(variance)
        return self.gold - reach, self.gold + reach


def estimate_gold(
    proxy_N: np.ndarray, gold_N: np.ndarray, chance_N: np.ndarray, prompt_N: np.ndarray, slope: float = 1.0
) -> GoldEstimate:
    """The policy's mean gold reward by prediction-powered inference (arXiv:2301.09633, 2311.01453), Hajek's form.

    ``gold`` NaN where it was not drawn or the judge failed, ``chance`` as drawn, ``prompt`` labels, ``slope`` lambda:
    mean of lambda p over all rollouts, plus the mean of g - lambda p over the judged ones, each weighted 1 / chance.
    A failed call leaves its weight to the others: unbiased if failing has nothing to do with g - lambda p. A missing
    proxy is taken for the mean of the others.

    The variance is over both draws, of rollouts from the policy and of the judged from them, with prompts as clusters:
    P/(P-1) times the sum over prompts of squared sums of (psi - mean psi) / N. psi is lambda p + b, for the judged with
    weight (g - lambda p - b) on top; b is the weighted mean of g - lambda p. P counts judged prompts.
    """
    judged_N = ~np.isnan(gold_N)
    prompts = len(np.unique(prompt_N[judged_N]))
    if not prompts:
        return GoldEstimate()
    proxy_N = _filled(proxy_N)
    weight_N = np.where(judged_N, 1 / chance_N, 0.0)
    weight_N *= len(weight_N) / weight_N.sum()
    error_N = np.where(judged_N, gold_N - slope * proxy_N, 0.0)
    bias = float(np.mean(weight_N * error_N))
    psi_N = slope * proxy_N + bias + weight_N * (error_N - bias)
    return GoldEstimate(
        float(psi_N.mean()),
        _clustered_variance(psi_N, prompt_N, prompts),
        float(np.mean(proxy_N - psi_N)),
        _clustered_variance(proxy_N - psi_N, prompt_N, prompts),
        int(judged_N.sum()),
        prompts - 1,
    )


class Slope:
    """The lambda of `estimate_gold` that would have served best so far: gold's slope on the proxy, within updates.

    Between 0, a proxy that says nothing, and 1, which it also is before 30 rollouts were judged. Learnt from earlier
    updates only, so that it cannot bias the one that it is used on. ``sums`` are all it knows, and make another one.
    """

    def __init__(self, judged: int = 0, together: float = 0.0, spread: float = 0.0) -> None:
        self._judged, self._together, self._spread = judged, together, spread

    @property
    def sums(self) -> tuple[int, float, float]:
        return self._judged, self._together, self._spread

    @property
    def value(self) -> float:
        if self._judged < _ENOUGH or self._spread <= 0:
            return 1.0
        return min(max(self._together / self._spread, 0.0), 1.0)

    def add(self, proxy_N: np.ndarray, gold_N: np.ndarray, chance_N: np.ndarray) -> None:
        """Learn from an update; arguments as of `estimate_gold`."""
        judged_N = ~np.isnan(gold_N)
        if not judged_N.any():
            return
        proxy, gold, weight = _filled(proxy_N)[judged_N], gold_N[judged_N], 1 / chance_N[judged_N]
        off = proxy - np.average(proxy, weights=weight)
        self._judged += len(gold)
        self._together += float(weight @ (off * gold))
        self._spread += float(weight @ off**2)


@dataclass(frozen=True)
class Window:
    """Mean over the looks from update ``first`` to ``last``, with limits that hold for all windows of a run at once."""

    first: int
    last: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Fall:
    """Two windows, the earlier one wholly above the later one."""

    before: Window
    after: Window


class Trend:
    """Whether a mean that is looked at again and again was ever higher than it is now.

    At every look there are windows of its last 1, 2, 4, 8, ... looks, each with Student's limits. The error of the
    whole run is shared equally by all limits of all ``looks`` planned (Bonferroni's way of spending alpha), so all of
    them hold together with probability >= 1 - ``error``, whatever the mean does meanwhile. If one window then lies
    wholly below an earlier one, the mean has fallen; repeated looks raise no more false alarms. The rule of Podkopaev &
    Ramdas 2022 (arXiv:2110.06177), with the best stretch of the run itself in the place of the source.

    Fewer looks than planned waste error, more raise ValueError. The limits are as good as Student's t is for a mean
    over the prompts of a window; one more prompt that is off by the whole range is added to each window, since far out
    in its tails, where the shared error is, t trusts prompts that happen to agree too much.
    """

    def __init__(self, looks: int, error: float = ERROR) -> None:
        self._planned = looks
        self._level = error / (2 * sum(len(_lengths(look)) for look in range(1, looks + 1)))
        self._looks: list[tuple[int, float, float, int]] = []  # update, mean, variance, degrees
        self._best: list[Window] = []  # by look: of all windows up to it, the one with the highest lower limit

    @property
    def best(self) -> Window | None:
        """The window with the highest lower limit, the later of equals; None before the first look."""
        return self._best[-1] if self._best else None

    def add(self, update: int, mean: float, variance: float, degrees: int) -> Fall | None:
        """Look once more; the windows with the widest gap between them, if the mean has fallen."""
        if len(self._looks) == self._planned:
            raise ValueError(f"Trend: planned for {self._planned} looks, got one more")
        self._looks.append((update, mean, variance, degrees))
        ending = [self._window(length) for length in _lengths(len(self._looks))]
        falls = [Fall(self._best[-length], window) for length, window in ending if length < len(self._looks)]
        highest = max((window for _, window in ending), key=lambda window: window.low)
        self._best.append(highest if self.best is None or highest.low >= self.best.low else self.best)
        widest = max(falls, key=_gap, default=None)
        return widest if widest is not None and _gap(widest) > 0 else None

    def _window(self, length: int) -> tuple[int, Window]:
        looks = self._looks[-length:]
        updates, means, variances, degrees = zip(*looks, strict=True)
        each = [one + _slack(own + 1, _RANGE) for one, own in zip(variances, degrees, strict=True)]
        freedom = sum(each) ** 2 / sum(one**2 / own for one, own in zip(each, degrees, strict=True))  # Satterthwaite's
        variance = sum(variances) / length**2 + _slack(sum(degrees) + length, _RANGE)
        mean, reach = sum(means) / length, -float(stdtrit(freedom, self._level)) * math.sqrt(variance)
        return length, Window(updates[0], updates[-1], mean, mean - reach, mean + reach)


def _gap(fall: Fall) -> float:
    return fall.before.low - fall.after.high


def _lengths(looks: int) -> list[int]:
    """1, 2, 4, ... up to ``looks``."""
    return [2**power for power in range(looks.bit_length())]


def _tail(proxy_N: np.ndarray) -> np.ndarray:
    """1 for the top quarter, those that tie with its last included; NaN is in nobody's tail."""
    known = proxy_N[~np.isnan(proxy_N)]
    return (proxy_N >= np.quantile(known, 1 - _TAIL)).astype(float) if len(known) else np.ones(len(proxy_N))


def _shares(weight_N: np.ndarray) -> np.ndarray:
    return weight_N / weight_N.sum()


def _capped(weight_N: np.ndarray, size: int) -> np.ndarray:
    """Chances in proportion to positive weights that sum to ``size`` < N, the heaviest certain where more than 1."""
    order = np.argsort(-weight_N, kind="stable")
    heaviest = weight_N[order]
    left = np.cumsum(heaviest[::-1])[::-1]
    chance = (size - np.arange(len(order))) * heaviest / left  # of each, if all heavier ones are certain
    certain = int(np.argmax(chance <= 1))
    chance_N = np.ones(len(order))
    chance_N[order[certain:]] = (size - certain) * heaviest[certain:] / left[certain]
    return chance_N


def _filled(proxy_N: np.ndarray) -> np.ndarray:
    """NaN replaced by the mean of the others, by 0 if there are none."""
    known_N = ~np.isnan(proxy_N)
    return np.where(known_N, proxy_N, proxy_N[known_N].mean() if known_N.any() else 0.0)


def _clustered_variance(effect_N: np.ndarray, prompt_N: np.ndarray, judged: int) -> float:
    """Of the mean effect, see `estimate_gold`; NaN for fewer than two judged prompts."""
    if judged < 2:
        return math.nan
    _, place_N = np.unique(prompt_N, return_inverse=True)
    off_P = np.bincount(place_N, effect_N - effect_N.mean()) / len(effect_N)
    return float(off_P @ off_P * judged / (judged - 1))


def _slack(prompts: int, off: float) -> float:
    """What one more of ``prompts``, ``off`` from the others' mean, adds to the variance of the mean."""
    return off**2 / (prompts * (prompts - 1))
