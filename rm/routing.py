"""Which answers to have from the judge where it cannot give all: how wide they are, what they are worth, which to take.

Pure arithmetic; asks nobody. Asking is `rm.fallback`; what it buys is measured by `rm.frontier`.

An answer that is off by its width moves the reward by |slope| times that much, the slope being |weight| over the sum of
positive weights where there is no veto. That product is the answer's *value*. Widths go with the standard deviation of
the judge's verdict around the answer, so where verdicts err independently, the most valuable answers are those whose
replacement takes most off the expected squared error of rewards.

Letters: K criteria of a rubric, N answers of many.
"""

from typing import TYPE_CHECKING

import numpy as np

from rubric_data.records import Rubric
from rubric_data.reward import weighted_mean_reward

if TYPE_CHECKING:
    from rm.scorer import Scored


def widths(scored: "Scored") -> np.ndarray:
    """How much of [0, 1] each answer leaves open, (K,) in [0, 1]: 0 of what code answered, NaN of what nobody did.

    That of the judge's verdict's conformal interval, where the model is calibrated for one. Else two standard
    deviations of a yes/no verdict with that probability, the head's doubt (`rm.posterior`) added where it is known: 1
    at a half, .6 at .1, .2 at .01.
    """
    if scored.expected is not None:
        found_K = scored.expected.prob_high - scored.expected.prob_low
    else:
        doubt_K = 0.0 if scored.doubt is None else np.sqrt(scored.doubt.covariance.diagonal())
        found_K = np.minimum(2 * np.hypot(np.sqrt(scored.probs * (1 - scored.probs)), doubt_K), 1.0)
    return np.where(scored.by_code, 0.0, found_K)


def values(rubric: Rubric, probs_K: np.ndarray, width_K: np.ndarray) -> np.ndarray:
    """By how much the reward may move if each answer alone moves by its width, (K,) >= 0; clipping aside.

    Without a veto that is |weight| / (sum of positive weights) times the width. Vetoes scale it by the product of their
    answers; a veto's own moves the whole mean, by the product of the others'. Answers of NaN take no part and are worth
    0, as all are where no positive weight is left.
    """
    known_K = ~np.isnan(probs_K)
    weight_K = np.where(known_K, [criterion.weight for criterion in rubric.criteria], 0.0)
    veto_K = known_K & [criterion.veto for criterion in rubric.criteria]
    total = weight_K[weight_K > 0].sum()
    if total == 0:
        return np.zeros(len(probs_K))
    left_K = np.where(veto_K, probs_K, 1.0)
    mean = float(weighted_mean_reward(probs_K, weight_K))
    others_K = np.array([np.delete(left_K, place).prod() for place in range(len(left_K))])
    slope_K = np.abs(weight_K) / total * left_K.prod() + np.where(veto_K, mean * others_K, 0.0)
    return np.where(known_K, slope_K * np.nan_to_num(width_K), 0.0)


def choose(
    value_N: np.ndarray, width_N: np.ndarray, prob_N: np.ndarray, *, budget: int, least: float = 0.0
) -> np.ndarray:
    """Places of the answers to ask the judge for, the most valuable first: ``budget`` at most.

    Only answers at least as wide as ``least`` and worth anything. Of equal values the wider come first, then those with
    probabilities nearer to a half (intervals that reach both ends are all equally wide), then the earlier.
    """
    order = np.lexsort((np.abs(prob_N - 0.5), -width_N, -value_N))
    worth = (width_N[order] >= least) & (value_N[order] > 0)
    return order[worth][: max(budget, 0)]
