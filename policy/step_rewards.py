"""What rollouts are paid, update by update: the aggregate, and what it takes beside probabilities.

Owns the memory of what the policy has reached of each criterion, and how dropout and pessimism join the aggregate.
The formulas are `policy.aggregation`.
"""

from collections.abc import Sequence

import numpy as np

from policy.aggregation import build_aggregate, kept_criteria, pessimistic
from policy.config import AggregationConfig
from rm.posterior import slope_std
from rm.routing import values
from rm.scorer import Scored
from rubric_data.errors import UserError
from rubric_data.records import Criterion, Rubric

_RATE = 0.2  # of an update's mean in the memory: half of it is of the last three updates


class Saturation:
    """The policy's mean credit on each criterion, over recent updates: P(met), of a pitfall 1 - P(met).

    Criteria of one text are one, in whatever rubric.
    """

    def __init__(self) -> None:
        self._reached: dict[tuple[str, bool], float] = {}

    def of(self, rubric: Rubric) -> np.ndarray:
        """(K,) in [0, 1]; 0 of what was never answered."""
        return np.array([self._reached.get(_key(criterion), 0.0) for criterion in rubric.criteria])

    def add(self, rubrics: Sequence[Rubric], scored: Sequence[Scored]) -> None:
        """Remember the answers of an update."""
        credits: dict[tuple[str, bool], list[float]] = {}
        for rubric, item in zip(rubrics, scored, strict=True):
            for criterion, prob in zip(rubric.criteria, item.probs, strict=True):
                if not np.isnan(prob):
                    credits.setdefault(_key(criterion), []).append(prob if criterion.weight > 0 else 1 - prob)
        for key, found in credits.items():
            before = self._reached.get(key, float(np.mean(found)))
            self._reached[key] = before + _RATE * (float(np.mean(found)) - before)


class StepRewards:
    """Pays scored rollouts as ``config`` has it; with the defaults, exactly the scorer's own reward.

    Raises UserError on bad values, and, when called, where pessimism is asked of a model without a posterior.
    """

    def __init__(self, config: AggregationConfig, seed: int = 0) -> None:
        self.aggregate = build_aggregate(config)
        self._config, self._seed = config, seed
        self._saturation = Saturation()

    def __call__(
        self, rubrics: Sequence[Rubric], scored: Sequence[Scored], groups: Sequence[str], step: int
    ) -> list[float]:
        """The reward of each of B rollouts, in [0, 1], NaN where nothing is known.

        ``groups`` names each one's prompt, ``step`` counts updates: within both, the same criteria count. Saturation is
        that of the calls before, so no rollout has a part in its own weights.
        """
        if is_default(self._config):
            return [item.reward for item in scored]
        paid = [self._paid(*row, step) for row in zip(rubrics, scored, groups, strict=True)]
        if self._config.headroom:
            self._saturation.add(rubrics, scored)
        return paid

    def worth(self, rubric: Rubric, probs_K: np.ndarray, width_K: np.ndarray) -> np.ndarray:
        """By how much the aggregate moves as each answer alone goes through its width, (K,) >= 0; 0 of unknown ones.

        With the defaults `rm.routing.values`. Dropout and pessimism have no part in it.
        """
        if is_default(self._config):
            return values(rubric, probs_K, width_K)
        saturation_K = self._saturation.of(rubric) if self._config.headroom else None

        def moved(place: int) -> float:
            ends_2K = np.repeat(probs_K[None], 2, axis=0)
            ends_2K[:, place] = np.clip(probs_K[place] + np.array([-0.5, 0.5]) * width_K[place], 0, 1)
            low, high = (self.aggregate(rubric, row_K, saturation_K) for row_K in ends_2K)
            return abs(high - low)

        return np.nan_to_num([moved(place) for place in range(len(probs_K))])

    def _paid(self, rubric: Rubric, item: Scored, group: str, step: int) -> float:
        config, probs_K = self._config, item.probs
        if config.dropout:
            kept_K = kept_criteria(rubric, seed=self._seed, group=group, step=step, share=config.dropout)
            probs_K = np.where(kept_K, probs_K, np.nan)
        saturation_K = self._saturation.of(rubric) if config.headroom else None
        reward = self.aggregate(rubric, probs_K, saturation_K)
        if not config.pessimism:
            return reward
        if item.doubt is None:
            raise UserError(NO_POSTERIOR)

        def rewards(probs_BK: np.ndarray) -> np.ndarray:
            return np.array([self.aggregate(rubric, row_K, saturation_K) for row_K in probs_BK])

        return pessimistic(reward, slope_std(rewards, probs_K, item.doubt.covariance), config.pessimism)


NO_POSTERIOR = (
    "aggregation.pessimism: the reward model has no posterior to tell its doubt; run `calibrate` on it, or set "
    "pessimism to 0"
)


def is_default(config: AggregationConfig) -> bool:
    """Whether ``config`` leaves the weighted mean as it is."""
    return config == AggregationConfig()


def _key(criterion: Criterion) -> tuple[str, bool]:
    return criterion.text, criterion.weight > 0
