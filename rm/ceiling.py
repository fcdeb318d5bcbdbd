"""How far the judge agrees with its own further votes, and with people: the ceiling of a model that imitates it.

Beside each number of the judge stands the model's, on the same questions against the same answers. The statistics are
`rm.metrics`; where votes are found is `rubric_data.ledger_view`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rm import metrics
from rm.parts import Statistics, settle_over
from rm.sides import Predicted, Table
from rubric_data.agreement import mean_answer
from rubric_data.pairs import REWARD_DECIMALS, same_prompt_pairs
from rubric_data.records import JudgedResponse
from rubric_data.reward import weighted_mean_reward

_MEASURES = ("accuracy", "auroc", "concordance", "kappa", "brier")


def human_answers(records: Sequence[JudgedResponse]) -> np.ndarray:
    """People's answers to every criterion of every record, one after the other; NaN where nobody was asked."""
    found: list[float] = []
    for record in records:
        by_id = {verdict.criterion_id: verdict.human for verdict in record.verdicts}
        answers = (by_id.get(criterion.id) for criterion in record.rubric.criteria)
        found += [np.nan if answer is None else answer for answer in answers]
    return np.array(found, float)


def ceiling(
    table: Table, model: Predicted, human_N: np.ndarray, votes_NV: np.ndarray | None, counts_RP: np.ndarray
) -> dict[str, dict[str, Any]]:
    """The parts "self" and "human" of ``ceiling`` in audit.json; each is absent where there is nothing to compare.

    ``votes_NV`` are the judge's votes on each question and ``human_N`` people's answers, NaN where there is none.
    """
    found = {}
    if votes_NV is not None and (_votes(votes_NV) > 1).any():
        found["self"] = _with_itself(table, model, votes_NV, counts_RP)
    if not np.isnan(human_N).all():
        found["human"] = _with_people(table, model, human_N, counts_RP)
    return found


def _votes(votes_NV: np.ndarray) -> np.ndarray:
    return (~np.isnan(votes_NV)).sum(1)


def _with_itself(table: Table, model: Predicted, votes_NV: np.ndarray, counts_RP: np.ndarray) -> dict[str, Any]:
    """The judge's first vote, and the model, against the mean of the judge's other votes."""
    asked_N = np.flatnonzero(_votes(votes_NV) > 1)
    votes = votes_NV[asked_N]
    first = np.arange(len(votes)), (~np.isnan(votes)).argmax(1)
    others = votes.copy()
    others[first] = np.nan
    one, other = (votes[:, side] for side in np.triu_indices(votes.shape[1], k=1))
    both = ~np.isnan(one) & ~np.isnan(other)
    prompt_M = np.repeat(table.prompt_N[asked_N], both.sum(1))

    def pairs_of_votes(prompt_N: np.ndarray, prompts: int) -> Statistics:
        return {"self_consistency": metrics.mean((one == other)[both], prompt_N, prompts)}

    answers = {"judge": votes[first], "model": model.prob_N[asked_N]}
    return (
        {"votes": int(_votes(votes).sum())}
        | settle_over(prompt_M, pairs_of_votes, counts_RP)
        | _against(mean_answer(others), answers, table, asked_N, counts_RP)
    )


def _with_people(table: Table, model: Predicted, human_N: np.ndarray, counts_RP: np.ndarray) -> dict[str, Any]:
    """The judge, and the model, against people: their answers, and the order of the rewards these make."""
    asked_N = np.flatnonzero(~np.isnan(human_N))
    answers = {"judge": table.gold_N[asked_N], "model": model.prob_N[asked_N]}
    found = _against(human_N[asked_N], answers, table, asked_N, counts_RP)
    response_B, first_B, member_N = np.unique(table.response_N[asked_N], return_index=True, return_inverse=True)
    gold_B = _rewards(table, asked_N, human_N[asked_N], member_N)
    rewarded = ~np.isnan(gold_B)
    prompt_B = table.prompt_N[asked_N][first_B][rewarded]
    pairs = same_prompt_pairs(prompt_B)
    for name, answer_N in answers.items():
        proxy_B = _rewards(table, asked_N, answer_N, member_N)[rewarded]

        def ordered(prompt: np.ndarray, prompts: int, proxy_B: np.ndarray = proxy_B) -> Statistics:
            return {"pair_accuracy": metrics.pair_accuracy(gold_B[rewarded], proxy_B, prompt, prompts, pairs, "half")}

        found[name] |= settle_over(prompt_B, ordered, counts_RP)
    return found | {"responses": len(response_B)}


def _against(
    target_N: np.ndarray, answers: dict[str, np.ndarray], table: Table, asked_N: np.ndarray, counts_RP: np.ndarray
) -> dict[str, Any]:
    """How far each of ``answers`` agrees with ``target`` on the questions ``asked``."""
    prompt_N = table.prompt_N[asked_N]
    found: dict[str, Any] = {"questions": len(asked_N), "prompts": len(np.unique(prompt_N))}
    for name, answer_N in answers.items():

        def agreement(prompt: np.ndarray, prompts: int, answer_N: np.ndarray = answer_N) -> Statistics:
            every = metrics.verdict_statistics(target_N, answer_N, prompt, prompts, table.levels_N[asked_N])
            return {key: every[key] for key in _MEASURES}

        found[name] = settle_over(prompt_N, agreement, counts_RP)
    return found


def _rewards(table: Table, asked_N: np.ndarray, answer_N: np.ndarray, member_N: np.ndarray) -> np.ndarray:
    """The reward of each response from ``answer_N`` alone, (B,); NaN where it has none. ``member_N`` is in 0..B-1."""
    criteria = [table.criteria_N[place] for place in asked_N]
    rewards = []
    for places in np.split(np.argsort(member_N, kind="stable"), np.cumsum(np.bincount(member_N))[:-1]):
        asked = [criteria[place] for place in places]
        weights, vetoes = [criterion.weight for criterion in asked], [criterion.veto for criterion in asked]
        rewards.append(float(weighted_mean_reward(answer_N[places], weights, vetoes)))
    return np.round(rewards, REWARD_DECIMALS)
