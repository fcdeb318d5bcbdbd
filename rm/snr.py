"""Signal and noise of a metric over training runs: the arithmetic, after Heineman et al. 2025 (arXiv:2508.13144).

Values come as arrays whose last axes are runs and checkpoints; axes before them (resamples of prompts) are carried
along. Owns no predictions and no files; `rm.panel` puts these together. docs/metrics.md has every formula.

Letters: X leading axes, R runs (one of each recipe), C checkpoints of a run, U units (groups of criteria),
L runs of a scaling ladder, S its scales (verdicts, parameters). An undefined number is NaN.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

_ZERO = 1e-12  # a standard deviation below is that of equal numbers, but for rounding
_LEAST_ERROR = 1e-6  # of a run in the fit of a power law, which takes logarithms
_EXPONENTS = (0.1, 0.3, 1.0)  # where the fit starts from
_EXPONENT_RANGE = (0.01, 5.0)


# --- signal, noise, decisions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignalNoise:
    """Of one metric, each of the leading shape (X,): relative dispersion, relative standard deviation, their ratio."""

    signal: np.ndarray
    noise: np.ndarray
    snr: np.ndarray


def signal_noise(value_XRC: np.ndarray) -> SignalNoise:
    """Signal and noise from the last C checkpoints of R runs.

    Signal: largest difference between two runs' means. Noise: standard deviation (divisor C - 1) over the checkpoints
    of one run, combined over runs as root mean square, so that what tells recipes apart never counts as noise. Both
    are divided by the size of the mean over all runs; the ratio does not depend on it. The ratio is NaN where the
    checkpoints of every run are equal: there is nothing to compare with.
    """
    mean_XR = value_XRC.mean(-1)
    dispersion = np.ptp(mean_XR, axis=-1)
    deviation = np.sqrt(value_XRC.var(-1, ddof=1).mean(-1))
    centre = np.abs(mean_XR.mean(-1))
    return SignalNoise(_divide(dispersion, centre), _divide(deviation, centre), _divide(dispersion, deviation))


def run_ratios(value_XRC: np.ndarray) -> np.ndarray:
    """Signal over the noise of each run alone, (X, R); NaN where the checkpoints of that run are equal.

    The ratio to the noise of all runs is the power mean of these with exponent -2: the noisiest run weighs most in it.
    """
    dispersion = np.ptp(value_XRC.mean(-1), axis=-1)
    return _divide(dispersion[..., None], value_XRC.std(-1, ddof=1))


def noise_floor(runs: int, checkpoints: int, level: float) -> float:
    """The signal-to-noise ratio that equal recipes stay below with probability ``level``.

    Means of C independent normal checkpoints scatter by noise / sqrt(C); the range of R of them over that is the
    studentised range of Tukey (1949) with R (C - 1) degrees of freedom.
    """
    return float(stats.studentized_range.ppf(level, runs, runs * (checkpoints - 1)) / np.sqrt(checkpoints))


def decision_accuracy(early_XR: np.ndarray, final_XR: np.ndarray) -> np.ndarray:
    """Share of the pairs of runs that ``final`` orders which ``early`` orders the same way, a tie counting half, (X,).

    NaN where ``final`` orders no pair, or where a value is NaN.
    """
    first, second = np.triu_indices(early_XR.shape[-1], k=1)
    early, final = (np.sign(value[..., first] - value[..., second]) for value in (early_XR, final_XR))
    credit = (1 + early * final) / 2 * np.abs(final)
    return _divide(credit.sum(-1), np.abs(final).sum(-1))


def without_one(value_XRC: np.ndarray) -> np.ndarray:
    """Means over the C checkpoints that leave one of them out, (X, R, C): what that one can be judged by."""
    count = value_XRC.shape[-1]
    return (value_XRC.sum(-1, keepdims=True) - value_XRC) / (count - 1)


def blocks(checkpoints: int, size: int) -> list[slice]:
    """The last whole blocks of ``size`` neighbours among ``checkpoints``, in order; what is left over comes first."""
    count = checkpoints // size
    start = checkpoints - count * size
    return [slice(start + place * size, start + (place + 1) * size) for place in range(count)]


# --- filtering -------------------------------------------------------------------------------------------------------


def joint_ratio(total_URC: np.ndarray, count_U: np.ndarray) -> float:
    """Signal-to-noise ratio of the mean over the items of all units, from their sums and counts."""
    return float(signal_noise(_divide(total_URC.sum(0), count_U.sum())).snr)


def choose_units(total_URC: np.ndarray, count_U: np.ndarray) -> np.ndarray:
    """Which units to keep so that the mean over their items has the best signal-to-noise ratio, (U,) bool.

    ``total`` sums of a unit's items in each run and checkpoint, ``count`` how many items those are. Units are ranked
    by their own ratio; among the best 1, 2, ..., U of them the set with the best joint ratio is kept, the largest of
    equals. The choice fits the noise it is made from: judge it on other items.
    """
    own_U = signal_noise(_divide(total_URC, count_U[:, None, None])).snr
    ranked = np.argsort(-np.nan_to_num(own_U, nan=-1.0), kind="stable")
    joint_URC = _divide(np.cumsum(total_URC[ranked], 0), np.cumsum(count_U[ranked])[:, None, None])
    joint_U = np.nan_to_num(signal_noise(joint_URC).snr, nan=-1.0)
    size = len(joint_U) - int(np.argmax(joint_U[::-1]))
    kept = np.zeros(len(ranked), bool)
    kept[ranked[:size]] = True
    return kept


# --- scaling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """error = floor + sum over scales of factor * (size / reference) ** -exponent (Hoffmann et al. 2022)."""

    floor: float
    factor_S: np.ndarray
    exponent_S: np.ndarray
    reference_S: np.ndarray

    def __call__(self, size_LS: np.ndarray) -> np.ndarray:
        """The error of runs of these sizes, (L,)."""
        return self.floor + (self.factor_S * (size_LS / self.reference_S) ** -self.exponent_S).sum(-1)


def runs_needed(scales: int) -> int:
    """How many runs a power law over so many scales must be fitted on: as many as it has numbers without a floor."""
    return 2 * scales


def fit_power_law(size_LS: np.ndarray, error_L: np.ndarray) -> PowerLaw:
    """The law of least squared log-error; factors and floor not negative, exponents in [.01, 5].

    ``error`` is better when lower and at best 0, as a loss or 1 - accuracy. The floor is 0 unless there are more runs
    than the law has numbers without it. Raises ValueError with fewer runs than `runs_needed`.
    """
    runs, scales = size_LS.shape
    if runs < runs_needed(scales):
        raise ValueError(f"power law: {scales} scales need {runs_needed(scales)} runs, got {runs}")
    reference_S = np.exp(np.log(size_LS).mean(0))
    with_floor = runs > runs_needed(scales)
    log_error = np.log(np.maximum(error_L, _LEAST_ERROR))

    def law(theta: np.ndarray) -> PowerLaw:
        floor = float(np.exp(theta[-1])) if with_floor else 0.0
        return PowerLaw(floor, np.exp(theta[:scales]), np.exp(theta[scales : 2 * scales]), reference_S)

    low = [-30.0] * scales + [np.log(_EXPONENT_RANGE[0])] * scales + [-30.0] * with_floor
    high = [5.0] * scales + [np.log(_EXPONENT_RANGE[1])] * scales + [5.0] * with_floor
    share = np.log(1 / (scales + with_floor))  # of the mean error, at the start
    start = np.full(scales, log_error.mean() + share)
    fits = [
        optimize.least_squares(
            lambda theta: np.log(law(theta)(size_LS)) - log_error,
            np.clip(np.concatenate([start, np.full(scales, np.log(exponent)), start[:with_floor]]), low, high),
            bounds=(low, high),
        )
        for exponent in _EXPONENTS
    ]
    return law(min(fits, key=lambda fit: fit.cost).x)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > _ZERO)
