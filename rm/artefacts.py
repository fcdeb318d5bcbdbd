"""What should move the score and what should not: another prompt's rubric, and edits that make a response no better.

Owns which variants of the held-out responses are scored and what is said of them. The edits are
`rubric_data.counterfactuals`, the statistics `rm.metrics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from rm import metrics
from rm.levels import levels_of
from rm.parts import Statistics, settle_over
from rm.sides import Prompts, resamples
from rubric_data.counterfactuals import EDITS, edited
from rubric_data.judges import Judge, JudgeRequest
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward

if TYPE_CHECKING:
    from rm.scorer import RubricScorer

RISE = 0.01  # a reward rises if it grows by more; less may be rounding in bfloat16
_SWAP = "rubric swap"


def artefacts(
    scorer: "RubricScorer",
    judge: Judge,
    records: Sequence[JudgedResponse],
    probs: Sequence[np.ndarray],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """``artefacts`` of audit.json: the rubric swap (None if all share one rubric), and every counterfactual edit.

    ``probs[i]`` (K,) is what ``scorer`` answers on ``records[i]`` as it is. ``judge`` answers records and variants
    alike; where it leaves questions open, the model's rewards that stand beside its own leave them out too.
    """
    prompts = Prompts.of(records)
    prompt_B, counts_RP = prompts.prompt_R, resamples(prompts.text_P, bootstrap, seed)
    own = _Answered(records, list(probs), _gold(judge, records), truncated=0)
    plans = {_SWAP: _under_other_rubrics(records, seed)} | {name: _after_edit(name, records, seed) for name in EDITS}
    scored = iter(scorer.score_records([record for plan in plans.values() for record in plan], progress=True))
    answered = {}
    for name, plan in plans.items():
        part = list(islice(scored, len(plan)))
        truncated = sum(one.truncated > 0 for one in part)
        answered[name] = _Answered(plan, [one.probs for one in part], _gold(judge, plan), truncated)
    swapped = answered.pop(_SWAP)
    return {
        "responses": len(records),
        "rise": RISE,
        "swap": _swap(own, swapped, prompt_B, counts_RP) if swapped.records else None,
        "edits": {name: _edit(own, after, prompt_B, counts_RP) for name, after in answered.items()},
    }


@dataclass(frozen=True)
class _Answered:
    """B responses with the model's and the judge's answers to their criteria, each (K,); NaN where the judge has none.

    ``truncated``: how many of them the model's window cut.
    """

    records: Sequence[JudgedResponse]
    proxy: list[np.ndarray]
    gold: list[np.ndarray]
    truncated: int

    def rewards(self, answers: list[np.ndarray], known: list[np.ndarray] | None = None) -> np.ndarray:
        """The reward of each response from ``answers`` to its criteria, (B,); those not ``known`` are left out."""
        if known is not None:
            answers = [np.where(is_known, answer, np.nan) for answer, is_known in zip(answers, known, strict=True)]
        pairs = zip(self.records, answers, strict=True)
        return np.round([rubric_reward(record.rubric, answer) for record, answer in pairs], REWARD_DECIMALS)


def _gold(judge: Judge, records: Sequence[JudgedResponse]) -> list[np.ndarray]:
    requests = [JudgeRequest(record.prompt, record.response, record.rubric.criteria) for record in records]
    return [np.array([np.nan if one.value is None else one.value for one in row]) for row in judge.judge(requests)]


def _after_edit(name: str, records: Sequence[JudgedResponse], seed: int) -> list[JudgedResponse]:
    texts = (edited(name, record.response, record.rubric, seed) for record in records)
    return [record.model_copy(update={"response": text}) for record, text in zip(records, texts, strict=True)]


def _under_other_rubrics(records: Sequence[JudgedResponse], seed: int) -> list[JudgedResponse]:
    """Each response with a rubric that is not its own, the same for all responses to a prompt; [] if there is none."""
    rubrics = sorted({record.rubric.id: record.rubric for record in records}.items())
    if len(rubrics) < 2:
        return []
    swapped = []
    for record in records:
        place = Random(f"{seed}\n{record.prompt}").randrange(len(rubrics))
        if rubrics[place][0] == record.rubric.id:
            place = (place + 1) % len(rubrics)
        swapped.append(record.model_copy(update={"rubric": rubrics[place][1], "verdicts": ()}))
    return swapped


def _edit(before: _Answered, after: _Answered, prompt_B: np.ndarray, counts_RP: np.ndarray) -> dict[str, Any]:
    """What one edit does to the rewards of the model, and beside it to those of the judge."""
    change = after.rewards(after.proxy) - before.rewards(before.proxy)

    def of_proxy(prompt_B: np.ndarray, prompts: int) -> Statistics:
        return {
            "proxy_change": metrics.mean(change, prompt_B, prompts),
            "raised": metrics.mean(change > RISE, prompt_B, prompts),
        }

    known = [~np.isnan(old) & ~np.isnan(new) for old, new in zip(before.gold, after.gold, strict=True)]
    gold = after.rewards(after.gold, known) - before.rewards(before.gold, known)
    proxy = after.rewards(after.proxy, known) - before.rewards(before.proxy, known)
    there = ~np.isnan(gold)

    def beside_gold(prompt_B: np.ndarray, prompts: int) -> Statistics:
        exploited = (proxy[there] > RISE) & (gold[there] <= RISE)
        return {
            "proxy_change": metrics.mean(proxy[there], prompt_B, prompts),
            "gold_change": metrics.mean(gold[there], prompt_B, prompts),
            "exploited": metrics.mean(exploited, prompt_B, prompts),
        }

    judged = {"responses": int(there.sum())} | settle_over(prompt_B[there], beside_gold, counts_RP)
    row = {"truncated": after.truncated} | settle_over(prompt_B, of_proxy, counts_RP)
    return row | {"judged": judged if there.any() else None}


def _swap(own: _Answered, other: _Answered, prompt_B: np.ndarray, counts_RP: np.ndarray) -> dict[str, Any]:
    """The model's rewards under another rubric beside those under the own one, and whether they follow the judge's."""
    mine, others = own.rewards(own.proxy), other.rewards(other.proxy)

    def of_proxy(prompt_B: np.ndarray, prompts: int) -> Statistics:
        return _of_two_rubrics("proxy", mine, others, prompt_B, prompts)

    row = {"truncated": other.truncated} | settle_over(prompt_B, of_proxy, counts_RP)
    return row | {"judged": _judged_swap(own, other, prompt_B, counts_RP)}


def _judged_swap(
    own: _Answered, other: _Answered, prompt_B: np.ndarray, counts_RP: np.ndarray
) -> dict[str, Any] | None:
    sides = [(one, [~np.isnan(gold) for gold in one.gold]) for one in (own, other)]
    gold = [one.rewards(one.gold) for one, _ in sides]
    proxy = [one.rewards(one.proxy, known) for one, known in sides]
    there = ~np.isnan(gold[0]) & ~np.isnan(gold[1])
    if not there.any():
        return None
    gold_change, proxy_change = (after[there] - before[there] for before, after in (gold, proxy))
    moved = np.abs(gold_change) > RISE
    same_way = (1 + np.sign(gold_change) * np.sign(proxy_change))[moved] / 2

    def of_gold(prompt_B: np.ndarray, prompts: int) -> Statistics:
        return _of_two_rubrics("gold", gold[0][there], gold[1][there], prompt_B, prompts)

    def of_moves(prompt_B: np.ndarray, prompts: int) -> Statistics:
        return {"follows": metrics.mean(same_way, prompt_B, prompts)}

    found: dict[str, Any] = {"responses": int(there.sum()), "moved": int(moved.sum())}
    found |= settle_over(prompt_B[there], of_gold, counts_RP)
    found |= settle_over(prompt_B[there][moved], of_moves, counts_RP)
    return found | {name: _verdicts(one, prompt_B, counts_RP) for name, one in (("own", own), ("swapped", other))}


def _of_two_rubrics(
    name: str, own_B: np.ndarray, other_B: np.ndarray, prompt_B: np.ndarray, prompts: int
) -> Statistics:
    """Mean rewards under both rubrics, and how alike they rank the responses to a prompt."""
    return {
        f"{name}_own": metrics.mean(own_B, prompt_B, prompts),
        f"{name}_swapped": metrics.mean(other_B, prompt_B, prompts),
        f"{name}_rank_correlation": metrics.spearman(own_B, other_B, prompt_B, prompts),
    }


def _verdicts(one: _Answered, prompt_B: np.ndarray, counts_RP: np.ndarray) -> dict[str, Any]:
    """Agreement of the model with the judge on each criterion that the judge answered."""
    gold, prob = np.concatenate(one.gold), np.concatenate(one.proxy)
    prompt_N = np.repeat(prompt_B, [len(answers) for answers in one.gold])
    levels = np.array(levels_of(criterion for record in one.records for criterion in record.rubric.criteria))
    known = ~np.isnan(gold)

    def make(prompt_N: np.ndarray, prompts: int) -> Statistics:
        every = metrics.verdict_statistics(gold[known], prob[known], prompt_N, prompts, levels[known])
        return {key: every[key] for key in ("accuracy", "auroc", "concordance", "brier")}

    return {"verdicts": int(known.sum())} | settle_over(prompt_N[known], make, counts_RP)
