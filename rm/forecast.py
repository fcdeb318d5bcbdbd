"""What a policy trained on the reward model is expected to earn from the judge, before any is trained.

Three views of how far a policy may leave its base before it exploits the proxy: theory, where the proxy is known by
its quantile alone; samples of the base, reweighted as the optimal policy would; and best-of-n. Pure numpy and scipy:
knows no records and no files. `section` is what `rm.audit` puts into audit.json.

Gold is the judge's reward, proxy the reward model's; KL is of the policy from its base, in nats a response. Letters:
B responses, P prompts, N responses of one prompt, T temperatures, S sizes of best-of-n, K levels of the proxy,
R resamples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax, xlogy
from scipy.stats import rankdata

from rm.metrics import LEVEL, Ratio, Statistic, best_of_n_weights
from rubric_data.files import JSON_DECIMALS, json_number
from rubric_data.pairs import REWARD_DECIMALS

_DECADE = (1.0, 0.8, 0.63, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16, 0.13)
# of a sweep: the base itself, then from 1 to 0.001, which spans what rewards in [0, 1] can ask for
BETAS_T = np.array([np.inf, *(beta * 10.0**-power for power in range(3) for beta in _DECADE), 0.001])

# Where the proxies of N responses are spread evenly, two are effective at beta = 1/N, where the policy has the KL of
# best-of-N: about as far as N responses can tell.
MIN_EFFECTIVE = 2.0
MIN_PROMPTS = 10  # of fewer, resamples say little about other prompts
_MAX_SIZES = 32  # rows of best-of-n
_MAX_KL = 700.0  # beyond, exp(KL) leaves the range of floats
_POINTS = 100_000  # of the quadrature
_SMALL = 1e-2  # 1 / beta below which series replace the closed forms, which would cancel

Outcome = Literal["turns", "rises", "unclear"]
Settle = Callable[[Statistic], dict[str, float | None]]
Samples = list[tuple[np.ndarray, np.ndarray]]  # of each prompt: gold and proxy of its responses


# --- theory: the proxy's quantile, and what it is truly worth --------------------------------------------------------
#
# Of a base response the proxy's quantile u is uniform in [0, 1]. The policy of the highest E[u] - beta KL has the
# density exp(u / beta) / Z. Win rate: the chance to beat an independent base response, which is the policy's mean of
# the true quantile. Zhang et al. 2025 (arXiv:2509.21500), Proposition 1 and Theorem 1.


def optimal_kl(beta: float) -> float:
    """KL of the optimal policy at temperature ``beta``: a / (e^a - 1) - 1 + ln(a / (1 - e^-a)) with a = 1 / beta.

    It does not depend on what the proxy's quantiles are truly worth. Raises ValueError unless beta > 0.
    """
    a = _inverse(beta)
    if a < _SMALL:
        return a**2 / 24 - a**4 / 960
    return a * math.exp(-a) / -math.expm1(-a) - 1 + math.log(a / -math.expm1(-a))


def optimal_beta(kl: float) -> float:
    """The temperature at which the optimal policy spends ``kl`` nats: the inverse of `optimal_kl`.

    Raises ValueError unless 0 < kl <= 700.
    """
    if not 0 < kl <= _MAX_KL:
        raise ValueError(f"kl: must lie in (0, {_MAX_KL:g}] nats, got {kl}")
    # ln a - 1 <= KL <= a^2 / 24 encloses the root, with a margin for rounding
    low, high = 0.5 * math.log(24 * kl) - 0.1, kl + 1.1
    return math.exp(-brentq(lambda log_a: optimal_kl(math.exp(-log_a)) - kl, low, high, xtol=1e-12))


def win_rate(beta: float, truth: Callable[[np.ndarray], np.ndarray]) -> float:
    """Win rate of the optimal policy where proxy quantile u is truly worth the quantile ``truth(u)``, by quadrature.

    ``truth`` maps arrays in [0, 1] to the same and keeps the uniform distribution. The error is at most its total
    variation by 1e5. Raises ValueError unless beta > 0.
    """
    share = (np.arange(_POINTS) + 0.5) / _POINTS  # of the policy's mass that lies below u
    u = 1 + np.log1p((1 - share) * math.expm1(-_inverse(beta))) * beta
    return float(np.mean(truth(np.clip(u, 0, 1))))


def win_rate_reversed(beta: float, low: float = 1.0, high: float = 1.0) -> float:
    """Win rate of the optimal policy if the proxy reverses the order between its quantiles ``low`` and ``high``.

    In closed form; outside the proxy is right, so the default is a correct one, 1 / (1 - e^-a) - 1 / a with
    a = 1 / beta. (1 - c, 1) is wrong about the top share c, (0, c) about the bottom. Raises ValueError unless beta > 0
    and 0 <= low <= high <= 1.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low, high: must satisfy 0 <= low <= high <= 1, got {low}, {high}")
    a, width = _inverse(beta), high - low
    if not width:
        return _tilted_mean(a)
    # an exponential tilt of a part is that of the whole, at a temperature of its own
    mass = math.exp(a * (high - 1)) * math.expm1(-a * width) / math.expm1(-a)
    return _tilted_mean(a) + mass * width * (1 - 2 * _tilted_mean(a * width))


def _inverse(beta: float) -> float:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: must be finite and above 0, got {beta}")
    return 1 / beta


def _tilted_mean(a: float) -> float:
    """Mean of u in [0, 1] under the density proportional to exp(a u)."""
    if a < _SMALL:
        return 0.5 + a / 12 - a**3 / 720
    return 1 / -math.expm1(-a) - 1 / a


# --- one prompt's samples of the base --------------------------------------------------------------------------------


def reweight(gold_N: np.ndarray, proxy_N: np.ndarray, betas_T: np.ndarray) -> dict[str, np.ndarray]:
    """What the optimal policy is expected to earn, from N samples of its base weighted by exp(proxy / beta), each (T,).

    ``gold``, ``proxy``: expected rewards. ``win_rate`` against one of the samples by gold, ties and the same sample
    half. ``kl`` of the weights from equal ones, at most ln N. ``effective_samples``: 1 / sum of squared weights.
    Temperature inf is the base itself.
    """
    samples = len(proxy_N)
    weight_TN = softmax(proxy_N / betas_T[:, None], axis=1)
    return {
        "gold": weight_TN @ gold_N,
        "proxy": weight_TN @ proxy_N,
        "win_rate": weight_TN @ ((rankdata(gold_N) - 0.5) / samples),
        "kl": np.maximum(xlogy(weight_TN, samples * weight_TN).sum(1), 0),
        "effective_samples": 1 / (weight_TN**2).sum(1),
    }


def best_of_n_kl(sizes_S: np.ndarray, mass_K: np.ndarray, atom_K: np.ndarray | bool = True) -> np.ndarray:
    """KL of best-of-n from a base whose proxy has K levels, the lowest first, of mass ``mass`` each, (S,).

    Members of an atom tie and share the choice evenly: of F, the mass up to a level, it gets q = F^n - F_below^n, and
    counts q ln(q / mass). With atoms alone, the default, this is exact for any discrete base. A level that is no atom
    is a stretch without ties, on which best-of-n has the density n F^(n-1); all of them together give
    ``ln n - (n - 1) / n``, which is otherwise an upper bound (Beirami et al. 2024, arXiv:2401.01879). ``mass`` may
    be counts. Raises ValueError unless all masses are above 0.
    """
    if not (np.asarray(mass_K) > 0).all():
        raise ValueError(f"mass: must be above 0 at every level, got {mass_K}")
    upto_K = np.cumsum(mass_K) / np.sum(mass_K)
    below_K = np.concatenate([[0.0], upto_K[:-1]])
    n = sizes_S[:, None]

    def smooth(mass: np.ndarray) -> np.ndarray:
        """Integral of n x^(n-1) ln(n x^(n-1)) from 0 to ``mass``."""
        return mass**n * np.log(n) + (n - 1) / n * (xlogy(mass**n, mass**n) - mass**n)

    chosen_SK = upto_K**n - below_K**n
    tied = xlogy(chosen_SK, chosen_SK / (upto_K - below_K))
    return np.maximum(np.where(atom_K, tied, smooth(upto_K) - smooth(below_K)).sum(1), 0)


def best_of_n(gold_N: np.ndarray, proxy_N: np.ndarray, sizes_S: np.ndarray) -> dict[str, np.ndarray]:
    """What the best of n by proxy is expected to earn, from N samples, each (S,).

    ``gold``, ``proxy``: its rewards; ``best_gold``: gold of the best of n by gold; ``regret``: what choosing by proxy
    loses of that. ``kl``: where a proxy met several times is an atom of the base, one met once is not.
    """
    weight_SN = best_of_n_weights(proxy_N, sizes_S)
    gold, best = weight_SN @ gold_N, best_of_n_weights(gold_N, sizes_S) @ gold_N
    _, counts_K = np.unique(proxy_N, return_counts=True)
    return {
        "gold": gold,
        "proxy": weight_SN @ proxy_N,
        "best_gold": best,
        "regret": best - gold,
        "kl": best_of_n_kl(sizes_S, counts_K, counts_K > 1),
    }


# --- over prompts ----------------------------------------------------------------------------------------------------


def turning_kl(gold_PT: np.ndarray, kl_PT: np.ndarray, counts_RP: np.ndarray) -> np.ndarray:
    """The KL at which gold, averaged over prompts, is highest before it falls, under each row of prompt counts, (R,).

    Columns go from the base to the lowest temperature. Infinite where gold is as high at the last as anywhere, NaN
    where no prompt is counted.
    """
    gold_RT, kl_RT = _means(gold_PT, counts_RP), _means(kl_PT, counts_RP)
    rows, best_R = np.arange(len(gold_RT)), gold_RT.argmax(1)
    turns = gold_RT[rows, best_R] > gold_RT[:, -1]
    return np.where(turns | np.isnan(gold_RT[:, 0]), kl_RT[rows, best_R], np.inf)


def _means(values_PT: np.ndarray, counts_RP: np.ndarray) -> np.ndarray:
    """Means over prompts under each row of counts, (R, T); rounded, so that the order of a sum makes no turn."""
    with np.errstate(invalid="ignore"):
        return np.round(counts_RP @ values_PT / counts_RP.sum(1, keepdims=True), REWARD_DECIMALS)


def section(
    gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, counts_RP: np.ndarray, settle: Settle
) -> dict[str, Any]:
    """The forecast as JSON-able values; docs/metrics.md names every key.

    ``prompt`` holds integers in 0..P-1. The responses of a prompt stand for its base policy; prompts with fewer than
    two say nothing and are left out. ``settle`` makes an estimate over ``counts`` of a statistic.
    """
    samples, used = _samples(gold_B, proxy_B, prompt_B, counts_RP.shape[1])
    sweep = _stacked([reweight(gold, proxy, BETAS_T) for gold, proxy in samples])
    effective_T = np.round(np.median(sweep.pop("effective_samples"), axis=0), REWARD_DECIMALS) if used else np.empty(0)
    reached = int((effective_T >= MIN_EFFECTIVE).sum())  # the lower the temperature, the fewer are effective
    rows = _rows(sweep, used, counts_RP.shape[1], settle)
    return {
        "prompts": len(used),
        "responses": sum(len(gold) for gold, _ in samples),
        "rows": [
            {
                "beta": None if np.isinf(beta) else json_number(beta),
                **row,
                "effective_samples": json_number(effective),
                "reliable": place < reached,
            }
            for place, (beta, row, effective) in enumerate(zip(BETAS_T, rows, effective_T, strict=False))
        ],
        "turn": _turn({key: value[:, :reached] for key, value in sweep.items()}, counts_RP[:, used]),
        "best_of_n": _best_of_n_rows(samples, used, counts_RP.shape[1], settle, _every),
    }


def best_of_n_section(
    gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int, settle: Settle
) -> dict[str, Any]:
    """The part ``best_of_n`` of `section` alone, at n = 1, 2, 4 ... and the largest.

    ``gold`` may be NaN: a prompt with such a response counts for ``proxy`` and ``kl`` only.
    """
    return _best_of_n_rows(*_samples(gold_B, proxy_B, prompt_B, prompts), prompts, settle, _doubling)


def _samples(gold_B: np.ndarray, proxy_B: np.ndarray, prompt_B: np.ndarray, prompts: int) -> tuple[Samples, list[int]]:
    """The rewards of each prompt that has two responses or more, and its number."""
    order = np.argsort(prompt_B, kind="stable")
    members = np.split(order, np.searchsorted(prompt_B[order], np.arange(1, prompts)))
    used = [prompt for prompt, rows in enumerate(members) if len(rows) > 1]
    return [(gold_B[members[prompt]], proxy_B[members[prompt]]) for prompt in used], used


def _turn(sweep: dict[str, np.ndarray], counts_RP: np.ndarray) -> dict[str, Any]:
    """Where gold turns within reach, with its interval over resamples; ``sweep`` holds the reliable columns."""
    reach = round(float(sweep["kl"][:, -1].mean()), JSON_DECIMALS) if sweep else 0.0
    outcome: Outcome = "unclear"
    value, low, high, share = np.nan, np.nan, np.nan, np.nan
    counts_RP = counts_RP[counts_RP.any(axis=1)]
    sample = np.sort(turning_kl(sweep["gold"], sweep["kl"], counts_RP)) if reach else np.empty(0)
    if len(sample):
        prompts, outside = counts_RP.shape[1], (1 - LEVEL) / 2
        everyone = np.ones((1, prompts))
        value = float(turning_kl(sweep["gold"], sweep["kl"], everyone)[0])
        # outwards to the next resample: between a KL and none there is nothing to interpolate
        low = sample[math.floor(outside * (len(sample) - 1))]
        high = sample[math.ceil((1 - outside) * (len(sample) - 1))]
        share = float(np.isfinite(sample).mean())
        if np.isfinite(value):  # by that peak: each resample's own is above the end by noise alone too often
            gold_RT = _means(sweep["gold"], counts_RP)
            share = float((gold_RT[:, _means(sweep["gold"], everyone).argmax()] > gold_RT[:, -1]).mean())
        if prompts >= MIN_PROMPTS and np.isfinite(value) and share >= 1 - outside:
            outcome = "turns"
        elif prompts >= MIN_PROMPTS and np.isinf(value) and share <= outside:
            outcome = "rises"
    ends = {"value": value, "low": low, "high": high}
    return {
        "outcome": outcome,
        "kl": {key: json_number(end) if np.isfinite(end) else None for key, end in ends.items()},
        "share": json_number(share),
        "reach": reach,
    }


def _every(longest: int) -> np.ndarray:
    """Sizes up to ``longest``: all, or where they are many some, spaced geometrically."""
    if longest > _MAX_SIZES:
        return np.unique(np.geomspace(1, longest, _MAX_SIZES).round().astype(int))
    return np.arange(1, longest + 1)


def _doubling(longest: int) -> np.ndarray:
    """1, 2, 4 ... up to ``longest``, and that."""
    return np.unique([*(2**power for power in range(longest.bit_length())), longest]) if longest else np.arange(0)


def _best_of_n_rows(
    samples: Samples, used: Sequence[int], prompts: int, settle: Settle, sizes: Callable[[int], np.ndarray]
) -> dict[str, Any]:
    """Best-of-n over the same prompts for every n, else a curve would show who dropped out."""
    counts = np.array([len(gold) for gold, _ in samples], int)
    # up to the n, of all the prompts have, that leaves the most responses in use
    longest = max(counts.tolist(), key=lambda n: (n * int((counts >= n).sum()), n), default=0)
    sizes_S = sizes(longest)
    chosen = [place for place, count in enumerate(counts) if count >= longest]
    found = _stacked([best_of_n(*samples[place], sizes_S) for place in chosen])
    rows = _rows(found, [used[place] for place in chosen], prompts, settle)
    return {
        "prompts": len(chosen),
        "rows": [
            {"n": int(n), **row, "kl_bound": json_number(np.log(n) - (n - 1) / n)}
            for n, row in zip(sizes_S, rows, strict=False)
        ],
    }


def _stacked(found: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What was found for each prompt, by key, prompts first; empty without prompts."""
    return {key: np.stack([one[key] for one in found]) for key in found[0]} if found else {}


def _rows(found: dict[str, np.ndarray], used: Sequence[int], prompts: int, settle: Settle) -> list[dict[str, Any]]:
    """Estimates of the means over prompts, one row a column of the arrays; every prompt counts the same, NaNs none."""

    def over_prompts(value: np.ndarray) -> dict[str, float | None]:
        total_P, count_P = np.zeros(prompts), np.zeros(prompts)
        total_P[used] = np.nan_to_num(value)
        count_P[used] = ~np.isnan(value)
        return settle(Ratio(total_P, count_P))

    columns = next(iter(found.values())).shape[1] if found else 0
    return [{key: over_prompts(value[:, place]) for key, value in found.items()} for place in range(columns)]
