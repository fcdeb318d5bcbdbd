"""Split-conformal quantiles when verdicts and rewards come in prompts: only prompts are exchangeable.

Owns the finite-sample quantile; what a score is, and what the interval is of, is `rm.reward_level`.
"""

import math

import numpy as np

_ROUNDING = 1e-9  # of sums of masses


def quantile(score_N: np.ndarray, prompt_N: np.ndarray, weight_N: np.ndarray, coverage: float) -> float:
    """A bound that the score of something drawn from a new prompt keeps with probability >= ``coverage``.

    Each of the P prompts has mass 1 / (P + 1), shared by its scores in proportion to ``weight``, the chance with which
    each would be drawn. The mass that is left is the new prompt's and lies at infinity. The bound is the least
    score with mass >= coverage up to it: of one score a prompt, the ceil((P + 1) coverage)-th smallest of P; infinity
    if P < `prompts_needed`. Lee, Barber & Willett 2023 (arXiv:2306.06342), with weights inside a prompt.
    """
    prompts, place_N = np.unique(prompt_N, return_inverse=True)
    mass_N = weight_N / np.bincount(place_N, weight_N)[place_N] / (len(prompts) + 1)
    order = np.argsort(score_N, kind="stable")
    found = int(np.searchsorted(np.cumsum(mass_N[order]), coverage - _ROUNDING))
    return float(score_N[order[found]]) if found < len(order) else math.inf


def prompts_needed(coverage: float) -> int:
    """The fewest prompts with which `quantile` is finite: 9 for 90 %, 19 for 95 %."""
    return math.ceil(coverage / (1 - coverage) - _ROUNDING)
