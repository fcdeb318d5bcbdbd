"""Criteria with ordered levels: one latent score, cut at rising thresholds. Owns that arithmetic; pure numpy.

A criterion of L levels asks L - 1 *steps*, "is it level j or better?" for j = 1 .. L - 1, and
P(level >= j) = sigmoid(s - theta_j). A yes/no criterion is one of two levels, whose only threshold is 0. The threshold
of step j lies where the value does that is halfway between the levels' own, v = (j - 1/2) / (L - 1), on one rising
scale for all criteria: theta(v) is the integral of the learned slope from 1/2 to v. So any number of levels has its
thresholds, also one never trained on. Source: proportional odds (McCullagh 1980).

Letters: N verdicts, M steps of all of them in their order, C cells of the scale.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from scipy.special import log_expit, logsumexp

from rubric_data.records import Criterion

CELLS = 8  # of equal width: the four steps of five levels lie in the middles of pairs of them
SLOPE = 4.0  # of the untrained scale; that of logit(v) in the middle


def levels_of(criteria: Iterable[Criterion]) -> list[int]:
    """How many levels each criterion has; 2 for yes and no."""
    return [len(criterion.levels) or 2 for criterion in criteria]


@lru_cache(256)
def cells(levels: int) -> np.ndarray:
    """How much of each cell lies between 1/2 and the place of each step, negative below 1/2, (levels - 1, C) float32.

    Times the cells' slopes these are the thresholds. Zero for two levels. Not to be written to.
    """
    edges = np.linspace(0, 1, CELLS + 1)
    places = (np.arange(1, levels) - 0.5) / (levels - 1)
    return (np.clip(places[:, None], edges[:-1], edges[1:]) - np.clip(0.5, edges[:-1], edges[1:])).astype(np.float32)


def thresholds(spacing_C: np.ndarray, levels: int) -> np.ndarray:
    """Rising thresholds of a criterion with so many levels, (levels - 1,); ``spacing`` is ln(slope / `SLOPE`)."""
    return cells(levels) @ (SLOPE * np.exp(np.asarray(spacing_C, float)))


@dataclass(frozen=True)
class Steps:
    """The steps of N verdicts, those of one beside each other: whose each is (0-based), its j, and its L - 1; (M,)."""

    verdict_M: np.ndarray
    step_M: np.ndarray
    last_M: np.ndarray

    @classmethod
    def of(cls, levels_N: Sequence[int]) -> Self:
        """For verdicts on criteria with so many levels each."""
        last_N = np.asarray(levels_N, int) - 1
        verdict_M = np.repeat(np.arange(len(last_N)), last_N)
        step_M = np.arange(len(verdict_M)) - (np.cumsum(last_N) - last_N)[verdict_M] + 1
        return cls(verdict_M, step_M, last_N[verdict_M])

    @classmethod
    def of_rows(cls, levels_M: Sequence[int]) -> Self:
        """The same where the number of levels is told once for every step."""
        last_M = np.asarray(levels_M, int) - 1
        each = np.arange(len(last_M))
        first = np.diff(last_M, prepend=0) != 0  # of a run of verdicts with equally many levels
        start_M = np.maximum.accumulate(np.where(first, each, 0))
        step_M = (each - start_M) % last_M + 1
        return cls(np.cumsum(step_M == 1) - 1, step_M, last_M)

    @property
    def graded(self) -> bool:
        """Whether a verdict has more than two levels."""
        return bool((self.last_M > 1).any())

    def targets(self, value_N: np.ndarray) -> np.ndarray:
        """P(level >= j) that has ``value`` in [0, 1] for its expected level, (M,); NaN where the value is.

        A value between two levels is of those two alone, the nearer the likelier.
        """
        return np.clip(np.asarray(value_N, float)[self.verdict_M] * self.last_M - (self.step_M - 1), 0, 1)

    def expected(self, prob_M: np.ndarray) -> np.ndarray:
        """Expected level of each verdict over the best one, (N,): the mean of its steps. In [0, 1]; NaN stays NaN."""
        verdicts = int(self.verdict_M[-1]) + 1 if len(self.verdict_M) else 0
        return np.bincount(self.verdict_M, prob_M / self.last_M, verdicts)

    def falling(self, value_M: np.ndarray) -> np.ndarray:
        """``value`` without a rise from a step to a higher one of the same verdict: the least so far, (M,)."""
        value_M = np.array(value_M, float)
        for step in range(2, self.last_M.max(initial=1) + 1):
            places = np.flatnonzero(self.step_M == step)
            value_M[places] = np.minimum(value_M[places], value_M[places - 1])
        return value_M

    def split(self, prob_M: np.ndarray) -> tuple[np.ndarray, ...]:
        """Probability of every level, worst first, N of (L,), from P(level >= j), which falls with j."""
        starts = np.flatnonzero(self.step_M == 1)[1:]
        return tuple(-np.diff(own, prepend=1.0, append=0.0) for own in np.split(prob_M, starts))

    def logits(self, logits_M: np.ndarray) -> np.ndarray:
        """The logit of each verdict's expected level, (N,); a single step's own."""
        found = np.empty(int(self.verdict_M[-1]) + 1 if len(self.verdict_M) else 0)
        alone = self.last_M == 1
        found[self.verdict_M[alone]] = logits_M[alone]
        for verdict in np.unique(self.verdict_M[~alone]):
            own = logits_M[self.verdict_M == verdict]
            found[verdict] = logsumexp(log_expit(own)) - logsumexp(log_expit(-own))
        return found
