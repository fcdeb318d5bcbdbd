"""From P(met) of a rubric's criteria to one reward: weights, diminishing returns, interactions, vetoes, shaping.

Owns that arithmetic; the weighted mean is `rubric_data.reward`, pairs are `rubric_data.interactions`, and what needs
a memory of the run or the model's doubt is put together in `policy.step_rewards`. When to use which: docs/rewards.md.

Stages follow each other: weights, credit within each criterion, weighted mean, interactions, vetoes, shaping of the
top. Each is off by default; what is left then is `rubric_reward`, to the last bit.

K criteria of one rubric; ``probs`` (K,) is P(met) in [0, 1], NaN where not answered. Rewards lie in [0, 1].
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from policy.config import AggregationConfig
from rubric_data.errors import UserError
from rubric_data.interactions import OVERALL, Interactions, is_overall
from rubric_data.records import Rubric
from rubric_data.reward import veto_factor, weighted_mean_reward

RAR_WEIGHTS = {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": 0.9}  # arXiv:2507.17746, section 4.4

_LEAST_KEPT = 3  # criteria that dropout leaves, as in arXiv:2608.11669
_LEAST_HEADROOM = 0.01  # a criterion that is always met is still paid a little, or nothing would keep it met


@dataclass(frozen=True)
class Aggregate:
    """Rubric and P(met) to a reward, as ``config`` has it; NaN where nothing with a positive weight is known."""

    config: AggregationConfig
    interactions: Interactions | None = None

    def __call__(self, rubric: Rubric, probs_K: np.ndarray, saturation_K: np.ndarray | None = None) -> float:
        """``saturation``: what the policy has reached of each criterion, for `headroom_weights`; None weighs as ever.

        Raises UserError on a rubric that lacks the tags which the config goes by.
        """
        config, probs_K = self.config, np.asarray(probs_K, float)
        weights_K = category_weights(rubric) if config.weights == "categories" else _weights(rubric)
        if saturation_K is not None:
            weights_K = headroom_weights(weights_K, saturation_K, config.headroom)
        asked_K = np.where(self._asked(rubric), probs_K, np.nan)
        reward = weighted_mean_reward(saturate(asked_K, weights_K, config.saturation), weights_K)
        if self.interactions is not None:
            reward = np.clip(reward + self.interactions.bonus(rubric, asked_K), 0.0, 1.0)
        if config.veto != "off":
            veto_K = [criterion.veto for criterion in rubric.criteria]
            reward = reward * veto_factor(probs_K, veto_K, config.veto_threshold if config.veto == "hard" else None)
        return float(reward if config.top_share is None else shape_top(reward, config.top_from, config.top_share))

    def _asked(self, rubric: Rubric) -> np.ndarray:
        """Which criteria the mean is of."""
        if self.config.implicit:
            overall_K = is_overall(rubric) & (_weights(rubric) > 0)
            if not overall_K.any():
                raise UserError(
                    f"rubric of {rubric.criteria[0].id!r}: has no criterion of positive weight with the tag "
                    f"{OVERALL!r}; tag the one that asks for the whole response, or set implicit to false"
                )
            return overall_K
        return ~is_overall(rubric) if self.interactions is not None else np.ones(len(rubric.criteria), bool)


def build_aggregate(config: AggregationConfig) -> Aggregate:
    """The aggregate that ``config`` describes. Raises UserError on bad values, or interactions that cannot be read."""
    check_aggregation(config)
    return Aggregate(config, None if config.interactions is None else Interactions.load(config.interactions))


def check_aggregation(config: AggregationConfig) -> None:
    """Raise UserError on values out of range, or that contradict each other."""
    ranges: dict[str, tuple[float | None, Callable[[float], bool], str]] = {
        "saturation": (config.saturation, lambda x: 0 <= x <= 100, "between 0 and 100"),
        "headroom": (config.headroom, lambda x: 0 <= x < math.inf, "0 or more"),
        "veto_threshold": (config.veto_threshold, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "top_share": (config.top_share, lambda x: 0 < x < 1, "between 0 and 1"),
        "top_from": (config.top_from, lambda x: 0 < x < 1, "between 0 and 1"),
        "pessimism": (config.pessimism, lambda x: 0 <= x < math.inf, "0 or more"),
        "dropout": (config.dropout, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    }
    for name, (value, holds, wanted) in ranges.items():
        if value is not None and not holds(value):
            raise UserError(f"aggregation.{name}: must be {wanted}, got {value}; correct it")
    mean = {
        "weights": config.weights != "rubric",
        "saturation": config.saturation > 0,
        "headroom": config.headroom > 0,
    }
    alone = {**mean, "interactions": config.interactions is not None, "dropout": config.dropout > 0}
    for name, others, why in (
        ("implicit", alone if config.implicit else {}, "pays the overall criterion alone"),
        ("interactions", mean if config.interactions else {}, "were fitted beside the rubric's own weighted mean"),
    ):
        if other := next((other for other, on in others.items() if on), None):
            raise UserError(f"aggregation.{other}: {name} {why}, so it has no meaning there; leave out one of the two")


def check_rubrics(aggregate: Aggregate, rubrics: Iterable[Rubric]) -> None:
    """Raise UserError at a rubric that the aggregate cannot be had of."""
    for rubric in rubrics:
        aggregate(rubric, np.ones(len(rubric.criteria)))


# --- the stages ------------------------------------------------------------------------------------------------------


def category_weights(rubric: Rubric) -> np.ndarray:
    """Weights by category, (K,), as RaR-Explicit sets them (arXiv:2507.17746, section 4.4): `RAR_WEIGHTS`.

    The sign is the criterion's own: a pitfall that is worded as what to avoid ("Avoids jargon") counts for the
    response when met, as in the paper; one worded as the fault has a negative weight and counts against it. A veto with
    none of these tags keeps its own. Raises UserError at another criterion with none of them, or with two.
    """
    weights = []
    for criterion in rubric.criteria:
        found = [RAR_WEIGHTS[tag.lower()] for tag in criterion.tags if tag.lower() in RAR_WEIGHTS]
        if criterion.veto and not found:
            found = [criterion.weight]
        if len(found) != 1:
            raise UserError(
                f"criterion {criterion.id!r}: needs one of the tags {', '.join(RAR_WEIGHTS)}, has "
                f"{len(found) or 'none'}; tag it, or set weights to rubric"
            )
        weights.append(math.copysign(found[0], criterion.weight))
    return np.array(weights)


def headroom_weights(weights_K: np.ndarray, saturation_K: np.ndarray, gamma: float) -> np.ndarray:
    """w (1 - s)^gamma: what is reached already weighs less, (K,). Eq. of SA-MRPO (arXiv:2608.16072).

    ``saturation`` s in [0, 1] is the policy's mean credit on each criterion: P(met), of a pitfall 1 - P(met). There the
    weights multiply advantages; here they go into a mean. So that pitfalls keep their share of it, positive and
    negative weights are scaled back to their sums, each for themselves, and 1 - s is no less than .01: both our own.
    """
    scaled_K = weights_K * np.maximum(1 - saturation_K, _LEAST_HEADROOM) ** gamma
    for side_K in (weights_K > 0, weights_K < 0):
        if side_K.any():
            scaled_K[side_K] *= weights_K[side_K].sum() / scaled_K[side_K].sum()
    return scaled_K


def saturate(probs_K: np.ndarray, weights_K: np.ndarray, rate: float) -> np.ndarray:
    """P(met) with diminishing returns, (K,) in [0, 1]: (1 - e^(-rate c)) / (1 - e^(-rate)) of the credit c.

    The credit is p, of a pitfall 1 - p. Saturation is named by *Rubric Anchors* (arXiv:2508.12790), without a formula;
    the exponential is our own. ``rate`` 0 changes nothing.
    """
    if rate == 0:
        return probs_K
    credit_K = np.where(weights_K > 0, probs_K, 1 - probs_K)
    saturated_K = np.expm1(-rate * credit_K) / math.expm1(-rate)
    return np.where(weights_K > 0, saturated_K, 1 - saturated_K)


def shape_top(reward: np.ndarray | float, start: float, share: float) -> np.ndarray:
    """``reward`` with [start, 1] stretched (or shrunk) to the top ``share`` of the scale, in two straight lines.

    Rises strictly from 0 to 1, so no two responses change places; ``share`` > 1 - ``start`` sets the best further
    apart. *Rubric Anchors* (arXiv:2508.12790) amplifies differences among high scores; the lines are our own.
    """
    reward = np.asarray(reward, float)
    below, above = reward / start * (1 - share), 1 - share + (reward - start) / (1 - start) * share
    return np.where(reward <= start, below, above)


# --- what needs more than probabilities ------------------------------------------------------------------------------


def pessimistic(reward: float, std: float, weight: float) -> float:
    """``reward`` less ``weight`` standard deviations, and no less than 0; NaN stays NaN."""
    return float(np.maximum(reward - weight * std, 0.0))


def kept_criteria(rubric: Rubric, *, seed: int, group: str, step: int, share: float) -> np.ndarray:
    """Which criteria count for all responses to a prompt in an update, (K,) bool: all but a random ``share`` of them.

    Rubric dropout (arXiv:2608.11669): a policy that never meets the same rubric twice cannot lean on one criterion.
    The draw is by (seed, group, step) alone, so every process makes the same one. At least three criteria stay, as
    there; vetoes always do, and so does one that is worth something: our own.
    """
    count = len(rubric.criteria)
    kept_K, positive_K = np.ones(count, bool), _weights(rubric) > 0
    dropped = min(math.floor(share * count + 0.5), count - _LEAST_KEPT)
    digest = hashlib.sha256(f"{seed}\n{step}\n{group}".encode()).digest()
    for place in np.random.default_rng(int.from_bytes(digest[:8])).permutation(count):
        if count - kept_K.sum() >= dropped:
            break
        last = positive_K[place] and (kept_K & positive_K).sum() == 1
        kept_K[place] = rubric.criteria[place].veto or last
    return kept_K


def _weights(rubric: Rubric) -> np.ndarray:
    return np.array([criterion.weight for criterion in rubric.criteria])
