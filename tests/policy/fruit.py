"""Prompts about fruit, each with one response, for runs of the RL commands on a tiny model; rollouts by hand."""

import json

import numpy as np

from policy.adapter import Rollout
from rm.scorer import RubricScorer, Scored
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verifier

# enough criteria for dropout to leave some out
SIX = Rubric(
    criteria=(
        Criterion(id="commas", text="has no comma", verifier=Verifier(name="ifeval:punctuation:no_comma")),
        *(Criterion(id=f"c{number}", text=f"names fruit {number}") for number in range(5)),
    )
)
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


def small_run(backbone, data, **more):
    """Options of an RL run of three updates of eight rollouts, of ``backbone`` as policy and, untrained, as reward."""
    return {
        "reward_model": backbone,
        "policy": backbone,
        "data": data,
        "steps": 3,
        "batch_size": 8,
        "micro_batch_size": 4,
        "response_length": 6,
        "learning_rate": 1e-2,
        "lora_rank": 2,
        "gold_sample": 4,
        **more,
    }


def words(options):
    """``options`` as a command line has them."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def reward_untrained(monkeypatch, backbone):
    """Have any reward model that is loaded be ``backbone``, untrained."""
    untrained = RubricScorer.zero_shot(backbone, dtype="float32", max_length=512)
    monkeypatch.setattr(RubricScorer, "from_pretrained", lambda *_, **__: untrained)


def read_lines(path):
    """The objects on the lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
