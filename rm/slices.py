"""An audit in parts: agreement by criterion, tag, level, length, generator, and by what stood in the train split.

Owns which verdicts and responses belong to a part, and what is said of each; the statistics are `rm.metrics`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rm import metrics
from rubric_data.files import json_number
from rubric_data.records import Criterion, JudgedResponse

UNTAGGED = "(no tag)"
LENGTH_BINS = 4

Statistics = dict[str, metrics.Statistic]


@dataclass(frozen=True)
class Sides:
    """Judge and model on the same questions: N unmasked verdicts, and B responses with a reward.

    ``response_N`` and ``response_B`` index the records; ``criteria_N`` are what was asked, ``levels_N`` how many
    answers each has.
    """

    gold_N: np.ndarray
    prob_N: np.ndarray
    prompt_N: np.ndarray
    levels_N: np.ndarray
    response_N: np.ndarray
    criteria_N: Sequence[Criterion]
    gold_B: np.ndarray
    proxy_B: np.ndarray
    prompt_B: np.ndarray
    response_B: np.ndarray


def slices(
    records: Sequence[JudgedResponse], train: Sequence[JudgedResponse], sides: Sides, counts_RP: np.ndarray
) -> dict[str, Any]:
    """Every part of the audit by its key in audit.json; ``train`` are the records the model was trained on."""
    parts = _Parts(sides, counts_RP)
    return {
        "by_criterion": _by_criterion(parts),
        "by_tag": _by_tag(parts),
        "by_level": _by_level(parts),
        "by_length": _by_length(records, parts),
        "by_generator": _by_generator(records, parts),
        "by_novelty": _by_novelty(records, train, parts),
    }


def prompts_by_text(records: Sequence[JudgedResponse]) -> tuple[int, np.ndarray]:
    """The number of different prompts, and each record's, (R,) in 0..P-1.

    Numbered by text, so that neither the order of records nor ids decide which prompts a resample draws.
    """
    ids = sorted({(record.prompt, record.prompt_id) for record in records})
    number = {prompt: index for index, prompt in enumerate(ids)}
    return len(ids), np.array([number[record.prompt, record.prompt_id] for record in records], int)


def answers_of(criterion: Criterion) -> int:
    """How many answers ``criterion`` has: its levels, or no and yes."""
    return len(criterion.levels) or 2


def as_dict(estimate: metrics.Estimate) -> dict[str, float | None]:
    """An estimate as audit.json has it."""
    return {key: json_number(value) for key, value in asdict(estimate).items()}


def settle_over(
    prompt_N: np.ndarray, make: Callable[[np.ndarray, int], Statistics], counts_RP: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """The estimates of what ``make(prompt_N, prompts)`` returns, over the prompts that are there alone.

    The others add nothing, and many parts have few prompts. One prompt does not tell how prompts differ: fewer than two
    give no interval.
    """
    there, number_N = np.unique(prompt_N, return_inverse=True)
    counts = counts_RP[:, there] if len(there) > 1 else np.empty((0, len(there)))
    return {name: as_dict(metrics.estimate(found, counts)) for name, found in make(number_N, len(there)).items()}


@dataclass(frozen=True)
class _Parts:
    """Says the same things of whatever verdicts and responses a mask (or indices) picks."""

    sides: Sides
    counts_RP: np.ndarray

    def verdicts(self, chosen_N: np.ndarray) -> dict[str, Any]:
        one = self.sides
        gold, prob, prompt = one.gold_N[chosen_N], one.prob_N[chosen_N], one.prompt_N[chosen_N]

        def make(prompt_N: np.ndarray, prompts: int) -> Statistics:
            means: Statistics = {
                "mean_verdict": metrics.mean(gold, prompt_N, prompts),
                "mean_predicted": metrics.mean(prob, prompt_N, prompts),
            }
            return means | metrics.verdict_statistics(gold, prob, prompt_N, prompts, one.levels_N[chosen_N])

        sizes = {"verdicts": len(gold), "prompts": len(np.unique(prompt))}
        return sizes | settle_over(prompt, make, self.counts_RP)

    def responses(self, chosen_R: np.ndarray) -> dict[str, Any]:
        """What is said of the verdicts and of the rewards of the records that the mask ``chosen_R`` picks."""
        one = self.sides
        chosen_N, chosen_B = chosen_R[one.response_N], chosen_R[one.response_B]
        gold, proxy = one.gold_B[chosen_B], one.proxy_B[chosen_B]

        def make(prompt_B: np.ndarray, prompts: int) -> Statistics:
            return {
                "mean_reward": metrics.mean(gold, prompt_B, prompts),
                "bias": metrics.mean(proxy - gold, prompt_B, prompts),
            }

        rewards = settle_over(one.prompt_B[chosen_B], make, self.counts_RP)
        return {"responses": int(chosen_R.sum())} | self.verdicts(chosen_N) | rewards


def _by_criterion(parts: _Parts) -> list[dict[str, Any]]:
    """Agreement on each criterion, by its text; the one with most verdicts first."""
    places: dict[str, list[int]] = {}
    for place, criterion in enumerate(parts.sides.criteria_N):
        places.setdefault(criterion.text, []).append(place)
    rows = [{"criterion": text} | parts.verdicts(np.array(found)) for text, found in places.items()]
    return sorted(rows, key=lambda row: (-row["verdicts"], row["criterion"]))


def _by_tag(parts: _Parts) -> dict[str, dict[str, Any]]:
    """Agreement on each tag; a criterion with several tags counts under each."""
    tags_N = [set(criterion.tags) or {UNTAGGED} for criterion in parts.sides.criteria_N]
    every = sorted(set().union(*tags_N))
    return {tag: parts.verdicts(np.array([tag in tags for tags in tags_N])) for tag in every}


def _by_level(parts: _Parts) -> list[dict[str, Any]]:
    """Agreement on the criteria with ordered levels, by the number of these, and at each level as the judge gave it.

    A verdict halfway between two levels is at neither.
    """
    one = parts.sides
    ordered_N = np.array([bool(criterion.levels) for criterion in one.criteria_N])
    ordered_N &= metrics.is_answer(one.gold_N, one.levels_N)
    found = []
    for levels in np.unique(one.levels_N[ordered_N]).tolist():
        scale_N = ordered_N & (one.levels_N == levels)
        steps = [_step(parts, scale_N, level, levels) for level in range(levels)]
        found.append({"levels": levels} | parts.verdicts(scale_N) | {"steps": steps})
    return found


def _step(parts: _Parts, scale_N: np.ndarray, level: int, levels: int) -> dict[str, Any]:
    """The verdicts on one level, and how well the prediction parts it and those above from those below."""
    one = parts.sides
    judged, prob, prompt = np.round(one.gold_N[scale_N] * (levels - 1)), one.prob_N[scale_N], one.prompt_N[scale_N]
    here = judged == level

    def on_it(prompt_N: np.ndarray, prompts: int) -> Statistics:
        return {
            "mean_predicted": metrics.mean(prob[here], prompt_N, prompts),
            "same_level": metrics.mean(np.abs(prob[here] * (levels - 1) - level) < 0.5, prompt_N, prompts),
        }

    def parted(prompt_N: np.ndarray, prompts: int) -> Statistics:
        return {"auroc_from": metrics.auroc((judged >= level).astype(float), prob, prompt_N, prompts)}

    row: dict[str, Any] = {"level": level, "value": json_number(level / (levels - 1)), "verdicts": int(here.sum())}
    row |= settle_over(prompt[here], on_it, parts.counts_RP)
    return row | settle_over(prompt, parted, parts.counts_RP)


def _by_length(records: Sequence[JudgedResponse], parts: _Parts) -> list[dict[str, Any]]:
    """Agreement on the responses in quarters by number of words, shortest first; equal lengths share a quarter."""
    words = np.array([len(record.response.split()) for record in records])
    judged = np.unique(parts.sides.response_N)
    quarter = np.full(len(records), -1)
    quarter[judged] = metrics.equal_mass_bins(words[judged], LENGTH_BINS)
    return [
        {"low": int(words[quarter == index].min()), "high": int(words[quarter == index].max())}
        | parts.responses(quarter == index)
        for index in np.unique(quarter[judged])
    ]


def _by_generator(records: Sequence[JudgedResponse], parts: _Parts) -> dict[str, dict[str, Any]]:
    """Agreement on the responses of each generator, with how much more reward the model gives it than the judge."""
    writer = np.array([record.generator for record in records])
    judged = sorted(set(writer[parts.sides.response_N].tolist()))
    return {name: parts.responses(writer == name) for name in judged}


def _by_novelty(
    records: Sequence[JudgedResponse], train: Sequence[JudgedResponse], parts: _Parts
) -> dict[str, dict[str, Any]]:
    """Agreement by whether the generator, and the text of the criterion, occurs in ``train``; {} without that.

    A side without verdicts is absent.
    """
    if not train:
        return {}
    generators = {record.generator for record in train}
    texts = {criterion.text for record in train for criterion in record.rubric.criteria}
    written = np.array([record.generator in generators for record in records])
    asked_N = np.array([criterion.text in texts for criterion in parts.sides.criteria_N])
    found: dict[str, dict[str, Any]] = {"generator": {}, "criterion": {}}
    for name, is_seen in (("seen", True), ("unseen", False)):
        if (written[parts.sides.response_N] == is_seen).any():
            found["generator"][name] = parts.responses(written == is_seen)
        if (asked_N == is_seen).any():
            found["criterion"][name] = parts.verdicts(asked_N == is_seen)
    return found
