"""Prompts about fruit, each with one response, for runs of the RL commands on a tiny model; rollouts by hand."""

import numpy as np

from policy.adapter import Rollout
from rm.scorer import Scored
from rubric_data.io import write_judged
from rubric_data.records import JudgedResponse

UNTIMED = {"seconds": 0, "reward_seconds": 0}  # in the place of what no two runs share


def rollout(prompt, text, reward, tokens=2, finished=True, paid=None):
    """What the scorer answers with ``reward`` on every criterion; paid the same unless told."""
    probs = np.full(len(prompt.rubric.criteria), reward)
    return Rollout(prompt, text, Scored(probs, probs, reward, 0), tokens, finished, reward if paid is None else paid)


def write_fruit(path, rubric, splits):
    """One record a split into ``path``, all under ``rubric``; the path as a string."""
    records = [
        JudgedResponse(
            prompt_id=f"p{number}",
            prompt=f"Name fruit number {number}.",
            response_id=f"p{number}-r",
            response="A pear.",
            rubric=rubric,
            split=split,
        )
        for number, split in enumerate(splits)
    ]
    write_judged(path, records)
    return str(path)
