"""What one group of texts has more often than another, within strata: odds ratios, exact tests, many at a time.

Pure arithmetic on counts. A stratum is a prompt, so that what only tells prompts apart tells nothing here.

Letters: S strata, F traits, B texts. In a stratum of n texts, g of the group and m with the trait, a of them both.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import sparse, stats

_Z = stats.norm.ppf(0.975)  # intervals of 95 %
_PROMISING = 0.2  # by the normal approximation; above it a test need not be exact to be told insignificant
_BLOCK = 256  # traits at a time, which bounds the memory of S x F counts


@dataclass(frozen=True)
class Contrast:
    """Of each of F traits, all (F,): odds of the trait in the group over those in the others, and how sure that is.

    ``odds`` is Mantel and Haenszel's common odds ratio with its 95 % interval, ``p_value`` one-sided: the chance of as
    many of the group with the trait, or more, if within each stratum anybody could have been of the group.
    """

    odds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray


def strata_of(prompt_B: np.ndarray) -> np.ndarray:
    """The stratum of each text, (B,) in 0..S-1: its prompt, and for all prompts of a single text one together.

    A text alone can be compared with no other to its prompt; compared with each other, loners still are independent.
    """
    if not len(prompt_B):
        return np.zeros(0, int)
    _, number_B, size_P = np.unique(prompt_B, return_inverse=True, return_counts=True)
    return np.unique(np.where(size_P[number_B] == 1, -1, number_B), return_inverse=True)[1]


def contrast(trait_BF: sparse.csr_matrix, group_B: np.ndarray, stratum_B: np.ndarray) -> Contrast:
    """How much more often the texts in the group (True) have each trait than the others (False)."""
    strata = int(stratum_B.max()) + 1 if len(stratum_B) else 0
    member_SB = sparse.csr_matrix((np.ones(len(stratum_B)), (stratum_B, np.arange(len(stratum_B)))))
    total_S = np.bincount(stratum_B, minlength=strata)
    grouped_S = np.bincount(stratum_B, weights=group_B.astype(float), minlength=strata).astype(int)
    mixed_S = (grouped_S > 0) & (grouped_S < total_S)
    n_S, g_S = total_S[mixed_S], grouped_S[mixed_S]
    every_SB = member_SB[mixed_S] if strata else member_SB
    group_SB = every_SB.multiply(group_B.astype(float)[None, :]).tocsr()
    parts = []
    for start in range(0, trait_BF.shape[1], _BLOCK):
        block = trait_BF[:, start : start + _BLOCK].astype(float)
        m_SF, a_SF = ((side @ block).toarray().round().astype(int) for side in (every_SB, group_SB))
        parts.append(np.stack([*_odds(a_SF, m_SF, n_S, g_S), _p_values(a_SF, m_SF, n_S, g_S)]))
    return Contrast(*(np.concatenate(parts, axis=1) if parts else np.empty((4, 0))))


def false_discovery(p_values: np.ndarray) -> np.ndarray:
    """The least false discovery rate at which each test is called, by Benjamini and Hochberg (1995)."""
    return stats.false_discovery_control(p_values) if len(p_values) else np.empty(0)


def _odds(a_SF: np.ndarray, m_SF: np.ndarray, n_S: np.ndarray, g_S: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mantel-Haenszel odds ratios with the interval of Robins, Breslow & Greenland (1986).

    One more stratum, of half a text in each of its four cells, keeps them finite, and draws them a little towards 1.
    """
    cells = (a_SF, g_S[:, None] - a_SF, m_SF - a_SF, (n_S - g_S)[:, None] - m_SF + a_SF)
    half = np.full((1, a_SF.shape[1]), 0.5)
    a, b, c, d = (np.concatenate([cell, half]) for cell in cells)
    n = np.append(n_S, 2)[:, None]
    for_it, against = a * d / n, b * c / n
    same, other = (a + d) / n, (b + c) / n
    r, s = for_it.sum(0), against.sum(0)
    variance = (
        (same * for_it).sum(0) / (2 * r**2)
        + (same * against + other * for_it).sum(0) / (2 * r * s)
        + (other * against).sum(0) / (2 * s**2)
    )
    log, width = np.log(r / s), _Z * np.sqrt(variance)
    return np.exp(log), np.exp(log - width), np.exp(log + width)


def _p_values(a_SF: np.ndarray, m_SF: np.ndarray, n_S: np.ndarray, g_S: np.ndarray) -> np.ndarray:
    """One-sided p of each trait, (F,): of the sum of hypergeometric counts, exact where it may be small."""
    n, g = n_S[:, None], g_S[:, None]
    expected = (g * m_SF / n).sum(0) if len(n_S) else np.zeros(a_SF.shape[1])
    variance = (g * (n - g) * m_SF * (n - m_SF) / (n**2 * np.maximum(n - 1, 1))).sum(0)
    observed = a_SF.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rough = stats.norm.sf((observed - 0.5 - expected) / np.sqrt(variance))
    found = np.where(variance > 0, rough, 1.0)
    for place in np.flatnonzero((found < _PROMISING) & (variance > 0)):
        found[place] = _exact(
            Counter(zip(n_S.tolist(), g_S.tolist(), m_SF[:, place].tolist(), strict=True)), observed[place]
        )
    return found


def _exact(margins: Counter[tuple[int, int, int]], observed: int) -> float:
    """P(sum >= observed) of independent hypergeometric counts, one for each (n, g, m), as often as it is there."""
    law = np.ones(1)
    for margin, times in margins.items():
        if margin[2]:
            law = np.convolve(law, _power(margin, times))
    return float(min(law[observed:].sum(), 1.0))


@lru_cache(maxsize=4096)
def _power(margin: tuple[int, int, int], times: int) -> np.ndarray:
    """The law of the sum of ``times`` counts with this margin, from 0 on."""
    if times == 1:
        n, g, m = margin
        return stats.hypergeom.pmf(np.arange(min(g, m) + 1), n, g, m)
    half = _power(margin, times // 2)
    whole = np.convolve(half, half)
    return np.convolve(whole, _power(margin, 1)) if times % 2 else whole
