"""From verdicts to a reward: the arithmetic of one rubric. Pure numpy; the same for judge and reward model."""

import numpy as np
from numpy.typing import ArrayLike

from rubric_data.records import Rubric


def weighted_mean_reward(values_BK: ArrayLike, weights_BK: ArrayLike, veto_BK: ArrayLike | None = None) -> np.ndarray:
    """Reward of each response: weighted mean of its verdicts, scaled by its vetoes.

    B responses, K criteria. ``values`` in [0, 1], NaN where masked (or padding); ``weights`` finite,
    negative for pitfalls. With positive weights this is Eq. 1 of *Chasing the Tail* (arXiv:2509.21500);
    pitfalls follow HealthBench: sum(w v) / sum(w > 0), clipped to [0, 1]. Each veto criterion multiplies
    the reward by its verdict. Masked criteria leave numerator and denominator.

    Returns (B,) float64 in [0, 1]; NaN where no positively weighted verdict is left.
    Raises ValueError if K = 0.
    """
    values, weights = np.broadcast_arrays(np.asarray(values_BK, float), np.asarray(weights_BK, float))
    if values.shape[-1] == 0:
        raise ValueError("weighted_mean_reward: the rubric has no criteria")
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    total = np.where(known & (weights > 0), weights, 0.0).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        reward = np.clip((filled * weights).sum(-1) / total, 0.0, 1.0)
    if veto_BK is not None:
        reward = reward * veto_factor(values, veto_BK)
    return np.where(total > 0, reward, np.nan)


def veto_factor(values_BK: ArrayLike, veto_BK: ArrayLike, threshold: float | None = None) -> np.ndarray:
    """What vetoes leave of each reward, (B,) in [0, 1]: the product of the verdicts on veto criteria.

    ``threshold`` makes them hard: 0 if one of these verdicts lies below it, else 1. A masked one vetoes nothing.
    """
    values = np.asarray(values_BK, float)
    left = values if threshold is None else (values >= threshold).astype(float)
    return np.where(np.asarray(veto_BK, bool) & ~np.isnan(values), left, 1.0).prod(-1)


def rubric_reward(rubric: Rubric, values_K: ArrayLike) -> float:
    """Reward of one response under ``rubric``; ``values`` (K,) in its criteria's order, NaN where masked."""
    weights = [criterion.weight for criterion in rubric.criteria]
    veto = [criterion.veto for criterion in rubric.criteria]
    return float(weighted_mean_reward(values_K, weights, veto))
