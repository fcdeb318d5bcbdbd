"""What pairs of criteria add to, or take from, a rubric's weighted mean: fitted on overall verdicts, by ridge.

Owns the form of these interactions, their fit and their file (`rubric-rm rubric interactions`). *Rubric Anchors*
(arXiv:2508.12790) models synergy and antagonism between criteria and prints no formula; the one here is our own:

    reward = clip(mean + sum over pairs a < b of weight_ab credit_a credit_b, 0, 1)

A criterion's credit is its verdict, of a pitfall 1 minus it. Criteria of one key, that is of one text or tag, have the
mean of their credits by absolute weight. The criteria tagged 'overall' are what is explained, and in neither part.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from rubric_data.config import InteractionsConfig
from rubric_data.errors import UserError
from rubric_data.files import json_number, refuse_existing, write_json
from rubric_data.io import load_data
from rubric_data.records import JudgedResponse, Rubric
from rubric_data.reward import veto_factor, weighted_mean_reward

OVERALL = "overall"  # tag of a criterion that asks for the response as a whole
By = Literal["text", "tag"]
Pair = tuple[str, str]  # of keys, in alphabetical order

_MOST_PAIRS = 4000  # the fit solves a dense system of them


@dataclass(frozen=True)
class Interactions:
    """Weights of pairs; a pair that is not in it has none."""

    by: By
    weights: Mapping[Pair, float]

    def bonus(self, rubric: Rubric, values_K: np.ndarray) -> float:
        """What the pairs add to the mean of one response; ``values`` (K,) in [0, 1], NaN where masked."""
        products = pair_products(rubric, values_K, self.by)
        return float(sum(self.weights.get(pair, 0.0) * product for pair, product in products.items()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `run_interactions` wrote. Raises UserError on anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            pairs = [(sorted((one["first"], one["second"])), float(one["weight"])) for one in content["pairs"]]
            weights = {(first, second): weight for (first, second), weight in pairs}
            if content["by"] not in ("text", "tag") or not all(np.isfinite(list(weights.values()))):
                raise ValueError("a value is out of range")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: holds no interactions ({error}); give a file that `rubric interactions` wrote"
            ) from None
        return cls(content["by"], weights)


def is_overall(rubric: Rubric) -> np.ndarray:
    """Which criteria ask for the response as a whole, (K,) bool."""
    return np.array([OVERALL in criterion.tags for criterion in rubric.criteria])


def pair_products(rubric: Rubric, values_K: np.ndarray, by: By) -> dict[Pair, float]:
    """Of each pair of the rubric's keys, the product of their credits; keys without a verdict are left out."""
    credits: dict[str, list[tuple[float, float]]] = {}
    for criterion, value, overall in zip(rubric.criteria, values_K, is_overall(rubric), strict=True):
        if overall or np.isnan(value):
            continue
        for key in dict.fromkeys(criterion.tags) if by == "tag" else (criterion.text,):
            credit = value if criterion.weight > 0 else 1 - value
            credits.setdefault(key, []).append((abs(criterion.weight), float(credit)))
    mean = {key: sum(w * c for w, c in found) / sum(w for w, _ in found) for key, found in credits.items()}
    return {(a, b): mean[a] * mean[b] for a, b in combinations(sorted(mean), 2)}


def ridge(products_NP: np.ndarray, residual_N: np.ndarray, penalty: float) -> np.ndarray:
    """Weights (P,) that explain ``residual`` best: (Z'Z + penalty I) w = Z'e, means taken off both.

    A constant by which overall verdicts lie below the mean is nobody's interaction, so it is left unexplained.
    """
    centred_NP = products_NP - products_NP.mean(0)
    left = centred_NP.T @ centred_NP + penalty * np.eye(products_NP.shape[1])
    return np.linalg.solve(left, centred_NP.T @ (residual_N - residual_N.mean()))


def fit_interactions(
    records: Sequence[JudgedResponse], *, by: By = "text", penalty: float = 1.0, bound: float = 0.2, least: int = 20
) -> tuple[Interactions, dict[str, Any]]:
    """Interactions of ``records``, and what is to be reported of the fit.

    Fitted on responses that are not of the validation or test split; on those the spread of what the mean leaves
    unexplained is measured with and without them. Raises UserError where there is nothing to fit.
    """
    told, vetoed = [], 0
    for record in records:
        values_K, overall_K = np.array(record.values()), is_overall(record.rubric)
        mean, overall = _mean(record.rubric, values_K, ~overall_K), _mean(record.rubric, values_K, overall_K)
        if np.isnan(mean) or np.isnan(overall):
            continue
        if not veto_factor(values_K, [criterion.veto for criterion in record.rubric.criteria], 0.5):
            vetoed += 1  # the veto explains its overall verdict
            continue
        held_out = record.split in ("validation", "test")
        told.append((pair_products(record.rubric, values_K, by), overall - mean, held_out))
    counts = Counter(pair for products, _, held_out in told if not held_out for pair in products)
    pairs = sorted(pair for pair, count in counts.items() if count >= least)
    if not pairs:
        raise UserError(
            f"interactions: no pair of criteria has {least} responses with a verdict tagged {OVERALL!r} outside of the "
            "validation and test splits; judge more, group them with --by tag, or lower --min_responses"
        )
    if len(pairs) > _MOST_PAIRS:
        raise UserError(
            f"interactions: {len(pairs)} pairs are too many to fit; group them with --by tag, or raise --min_responses"
        )
    products_NP = np.array([[products.get(pair, 0.0) for pair in pairs] for products, _, _ in told])
    residual_N, held_N = np.array([one[1] for one in told]), np.array([one[2] for one in told])
    raw_P = ridge(products_NP[~held_N], residual_N[~held_N], penalty)
    weight_P = np.clip(raw_P, -bound, bound)
    left_N = residual_N - products_NP @ weight_P
    report = {
        "responses": {"fitted": int((~held_N).sum()), "held_out": int(held_N.sum()), "vetoed": vetoed},
        "clipped": int((np.abs(raw_P) > bound).sum()),
        "unexplained": {
            name: {"mean": _spread(residual_N[side]), "with_interactions": _spread(left_N[side])}
            for name, side in (("fitted", ~held_N), ("held_out", held_N))
        },
        "pairs": [
            {"first": a, "second": b, "weight": float(weight), "responses": counts[a, b]}
            for (a, b), weight in sorted(zip(pairs, weight_P, strict=True), key=lambda one: (-abs(one[1]), one[0]))
        ],
    }
    return Interactions(by, dict(zip(pairs, map(float, weight_P), strict=True))), report


def run_interactions(config: InteractionsConfig) -> dict[str, Any]:
    """Fit interactions on ``config.data``; returns what the file then holds. Raises UserError on bad input."""
    output = Path(config.output)
    if config.ridge <= 0:
        raise UserError(f"ridge: must be positive, got {config.ridge}; two pairs that go together need a penalty")
    if config.bound <= 0:
        raise UserError(f"bound: must be positive, got {config.bound}; raise it")
    refuse_existing(output, config.overwrite)
    _, report = fit_interactions(
        load_data(config.data),
        by=config.by,
        penalty=config.ridge,
        bound=config.bound,
        least=max(config.min_responses, 1),
    )
    written = {"data": config.data, "by": config.by, "ridge": config.ridge, "bound": config.bound, **report}
    write_json(output, written)
    return written


def _mean(rubric: Rubric, values_K: np.ndarray, asked_K: np.ndarray) -> float:
    weights = [criterion.weight for criterion in rubric.criteria]
    return float(weighted_mean_reward(np.where(asked_K, values_K, np.nan), weights))


def _spread(values_N: np.ndarray) -> float | None:
    return json_number(float(values_N.std()) if len(values_N) else np.nan)
