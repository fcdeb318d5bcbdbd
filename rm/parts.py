"""An audit in parts: agreement by criterion, tag, level, length, generator, and by what stood in the train split.

Owns what is said of a part; what belongs to it is `rm.slices`, the statistics are `rm.metrics`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rm import metrics, slices
from rm.sides import Predicted, Table
from rubric_data.files import json_number
from rubric_data.records import JudgedResponse

Statistics = dict[str, metrics.Statistic]


def parts(
    records: Sequence[JudgedResponse],
    train: Sequence[JudgedResponse],
    table: Table,
    model: Predicted,
    counts_RP: np.ndarray,
) -> dict[str, Any]:
    """Every part of the audit by its key in audit.json; ``train`` are the records the model was trained on."""
    asked = {kind: slices.members(labelled) for kind, labelled in slices.labels(records, table).items()}
    part = _Part(table, model, counts_RP)
    writer_R = np.array([record.generator for record in records])
    return {
        "by_criterion": _by_criterion(asked["criterion"], part),
        "by_tag": {name: part.verdicts(at_N) for name, at_N in asked["tag"].items()},
        "by_level": _by_level(part),
        "by_length": _by_length(records, part),
        "by_generator": {name: part.responses(writer_R == name) for name in asked["generator"]},
        "by_novelty": _by_novelty(records, train, part),
    }


def settle_over(
    prompt_N: np.ndarray, make: Callable[[np.ndarray, int], Statistics], counts_RP: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """The estimates of what ``make(prompt_N, prompts)`` returns, over the prompts that are there alone.

    The others add nothing, and many parts have few prompts. One prompt does not tell how prompts differ: fewer than two
    give no interval.
    """
    there, number_N = np.unique(prompt_N, return_inverse=True)
    counts = counts_RP[:, there] if len(there) > 1 else np.empty((0, len(there)))
    return {name: metrics.estimate(found, counts).as_dict() for name, found in make(number_N, len(there)).items()}


@dataclass(frozen=True)
class _Part:
    """Says the same things of whatever verdicts and responses a mask (or indices) picks."""

    table: Table
    model: Predicted
    counts_RP: np.ndarray

    def verdicts(self, chosen_N: np.ndarray) -> dict[str, Any]:
        table = self.table
        gold, prob, prompt = table.gold_N[chosen_N], self.model.prob_N[chosen_N], table.prompt_N[chosen_N]

        def make(prompt_N: np.ndarray, prompts: int) -> Statistics:
            means: Statistics = {
                "mean_verdict": metrics.mean(gold, prompt_N, prompts),
                "mean_predicted": metrics.mean(prob, prompt_N, prompts),
            }
            return means | metrics.verdict_statistics(gold, prob, prompt_N, prompts, table.levels_N[chosen_N])

        sizes = {"verdicts": len(gold), "prompts": len(np.unique(prompt))}
        return sizes | settle_over(prompt, make, self.counts_RP)

    def responses(self, chosen_R: np.ndarray) -> dict[str, Any]:
        """What is said of the verdicts and of the rewards of the records that the mask ``chosen_R`` picks."""
        table, chosen_B = self.table, chosen_R[self.table.rewarded_B]
        gold, proxy = table.reward_B[chosen_B], self.model.reward_B[chosen_B]

        def make(prompt_B: np.ndarray, prompts: int) -> Statistics:
            return {
                "mean_reward": metrics.mean(gold, prompt_B, prompts),
                "bias": metrics.mean(proxy - gold, prompt_B, prompts),
            }

        rewards = settle_over(table.prompt_B[chosen_B], make, self.counts_RP)
        return {"responses": int(chosen_R.sum())} | self.verdicts(chosen_R[table.response_N]) | rewards


def _by_criterion(asked: Mapping[str, np.ndarray], part: _Part) -> list[dict[str, Any]]:
    """Agreement on each criterion, by its text; the one with most verdicts first."""
    rows = [{"criterion": text} | part.verdicts(at_N) for text, at_N in asked.items()]
    return sorted(rows, key=lambda row: (-row["verdicts"], row["criterion"]))


def _by_level(part: _Part) -> list[dict[str, Any]]:
    """Agreement on the criteria with ordered levels, by the number of these, and at each level as the judge gave it.

    A verdict halfway between two levels is at neither.
    """
    table = part.table
    levels_N = slices.scale_levels(table)
    found = []
    for levels in np.unique(levels_N[levels_N > 0]).tolist():
        scale_N = levels_N == levels
        steps = [_step(part, scale_N, level, levels) for level in range(levels)]
        found.append({"levels": levels} | part.verdicts(scale_N) | {"steps": steps})
    return found


def _step(part: _Part, scale_N: np.ndarray, level: int, levels: int) -> dict[str, Any]:
    """The verdicts on one level, and how well the prediction parts it and those above from those below."""
    table = part.table
    judged = np.round(table.gold_N[scale_N] * (levels - 1))
    prob, prompt = part.model.prob_N[scale_N], table.prompt_N[scale_N]
    here = judged == level

    def on_it(prompt_N: np.ndarray, prompts: int) -> Statistics:
        return {
            "mean_predicted": metrics.mean(prob[here], prompt_N, prompts),
            "same_level": metrics.mean(np.abs(prob[here] * (levels - 1) - level) < 0.5, prompt_N, prompts),
        }

    def parted(prompt_N: np.ndarray, prompts: int) -> Statistics:
        return {"auroc_from": metrics.auroc((judged >= level).astype(float), prob, prompt_N, prompts)}

    row: dict[str, Any] = {"level": level, "value": json_number(level / (levels - 1)), "verdicts": int(here.sum())}
    row |= settle_over(prompt[here], on_it, part.counts_RP)
    return row | settle_over(prompt, parted, part.counts_RP)


def _by_length(records: Sequence[JudgedResponse], part: _Part) -> list[dict[str, Any]]:
    """Agreement on the responses in quarters by number of words, shortest first."""
    words_R, quarter_R = slices.length_quarters(records, part.table)
    found = []
    for chosen_R in (quarter_R == quarter for quarter in np.unique(quarter_R) if quarter >= 0):
        words = words_R[chosen_R]
        found.append({"low": int(words.min()), "high": int(words.max())} | part.responses(chosen_R))
    return found


def _by_novelty(
    records: Sequence[JudgedResponse], train: Sequence[JudgedResponse], part: _Part
) -> dict[str, dict[str, Any]]:
    """Agreement by whether the generator, and the text of the criterion, occurs in ``train``; {} without that.

    A side without verdicts is absent.
    """
    if not train:
        return {}
    seen_R, seen_N = slices.seen_in(train, records, part.table)
    found: dict[str, dict[str, Any]] = {"generator": {}, "criterion": {}}
    for name, is_seen in (("seen", True), ("unseen", False)):
        if (seen_R[part.table.response_N] == is_seen).any():
            found["generator"][name] = part.responses(seen_R == is_seen)
        if (seen_N == is_seen).any():
            found["criterion"][name] = part.verdicts(seen_N == is_seen)
    return found
