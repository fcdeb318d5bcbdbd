"""Pairs of excellent responses: both in their prompt's tail by the judge, and told apart by it.

Great against excellent is where a reward has to be right (Chasing the Tail, arXiv:2509.21500). Every generator's
responses count: a stronger model's exemplars fill a tail that the policy's own samples leave thin. Pure numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rm import metrics
from rm.sides import number_texts
from rubric_data.pairs import REWARD_DECIMALS, Pairs, orders, same_prompt_pairs
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward


@dataclass(frozen=True)
class Mined:
    """M pairs as places among the B responses they were mined from, and what was left out.

    ``pairs``: the first of each has the higher reward. Every prompt is one of the ``prompts``: it has a pair
    (``with_pairs``), fewer than two rewarded responses (``alone``), a tail of one reward (``tied``), or only pairs
    that are closer than the margin or of one text (``too_close``). ``across`` pairs are of two generators.
    """

    pairs: Pairs
    prompts: int
    with_pairs: int
    alone: int
    tied: int
    too_close: int
    across: int
    mean_margin: float

    @property
    def responses(self) -> set[int]:
        """Places of the responses that stand in a pair."""
        return {*self.pairs.first_M.tolist(), *self.pairs.second_M.tolist()}


def mine(records: Sequence[JudgedResponse], *, tail: float, min_margin: float = 0.0) -> Mined:
    """All pairs of responses to one prompt that are both in its top ``tail``, by `rm.metrics.in_tail`.

    A pair needs different texts, and rewards of the judge that differ by ``min_margin`` or more, and at all. Responses
    without a reward are in no tail.
    """
    reward_B = np.array([rubric_reward(record.rubric, record.values()) for record in records], float)
    place_B = np.flatnonzero(~np.isnan(reward_B))
    reward = np.round(reward_B[place_B], REWARD_DECIMALS)
    prompt_B = number_texts([record.prompt for record in records])
    prompt = prompt_B[place_B]
    tail_B = metrics.in_tail(reward, prompt, tail)
    pairs = same_prompt_pairs(prompt).within(np.where(tail_B, 0, -1))
    order = orders(reward, pairs)
    gap = np.round(np.abs(reward[pairs.first_M] - reward[pairs.second_M]), REWARD_DECIMALS)
    text = number_texts([record.response for record in records])[place_B]
    kept = (order != 0) & (gap >= min_margin) & (text[pairs.first_M] != text[pairs.second_M])
    better = np.where(order > 0, pairs.first_M, pairs.second_M)[kept]
    worse = np.where(order > 0, pairs.second_M, pairs.first_M)[kept]
    several, differ, with_pairs = (
        len(np.unique(prompt[some])) for some in (pairs.first_M, pairs.first_M[order != 0], better)
    )
    prompts = len(np.unique(prompt_B))
    writer = number_texts([record.generator for record in records])[place_B]
    return Mined(
        Pairs(place_B[better], place_B[worse]),
        prompts=prompts,
        with_pairs=with_pairs,
        alone=prompts - several,
        tied=several - differ,
        too_close=differ - with_pairs,
        across=int((writer[better] != writer[worse]).sum()),
        mean_margin=float(gap[kept].mean()) if kept.any() else np.nan,
    )
