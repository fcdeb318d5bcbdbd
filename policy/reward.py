"""The reward model as a reward function of TRL's group trainers: GRPO, RLOO, online DPO.

Owns the way from what TRL passes (prompts, completions, the dataset's columns) to rewards and metrics. The scoring is
`rm.scorer`, which reads equal prompts once, so that a group of rollouts costs one pass over a tree.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, get_args

import numpy as np
import torch.distributed
from datasets import Dataset

from policy.adapter import Scorer
from policy.prompts import RubricPrompt
from policy.tally import CriterionMeans, Tally, merged, tallied
from rm.config import RewardKind
from rm.scorer import RubricScorer, Scored
from rubric_data.errors import UserError
from rubric_data.formats.base import Message, parse, prompt_messages, transcript
from rubric_data.programmatic import coded_in_rewards
from rubric_data.records import Rubric

Aggregate = Callable[[Rubric, np.ndarray], float]  # from P(met) of the criteria, (K,), to a reward; NaN for none
Told = str | Sequence[Mapping[str, Any]]  # a prompt or a completion: text, or messages

MODEL, KIND, USE_VERIFIERS = "RUBRIC_RM_MODEL", "RUBRIC_RM_REWARD", "RUBRIC_RM_USE_VERIFIERS"
_UNSCORED = (True, "")  # rows without a reward, in a tally: no tag is empty


class RubricScoring(Scorer, Protocol):
    """What `rm.scorer.RubricScorer` offers here."""

    def check(self, rubrics: Iterable[Rubric]) -> None: ...


class RubricReward:
    """Rewards in [0, 1] for TRL's ``reward_funcs``, each under the rubric in its row's ``rubric`` column.

    A rubric is ours as JSON or as a dict; nulls count as absent. A row gets no reward (None) if its rubric is null,
    as in a dataset of several tasks, or if the scorer gives none; an empty completion is scored as any other.
    Prompts and completions are texts, or messages: a prompt of several turns is read as `data import` writes it, and of
    a completion the assistant's words.

    ``aggregate`` makes the reward of the calibrated P(met) of the criteria, (K,), those that code answered included, in
    the rubric's order; without it the reward is the scorer's own (`rm.scorer.RubricScorer`, its ``reward``).

    Metrics, through TRL's hooks: ``criteria/<tag>``, the mean P(met) of the criteria with the tag; those without a tag
    by their text, or together as ``criteria/other`` once they are many (`policy.tally`); ``rubric/unscored``, the share
    of rows without a reward. Means are over all processes. The table of completions has P(met) by criterion id.
    """

    def __init__(self, scorer: RubricScoring, *, aggregate: Aggregate | None = None) -> None:
        self.__name__ = "rubric_reward"  # what TRL calls the metrics by
        self.scorer = scorer
        self.aggregate = aggregate
        self._rubrics: dict[str, Rubric] = {}
        self._means = CriterionMeans()

    def check(self, rubrics: Iterable[str | Mapping[str, Any] | None]) -> None:
        """Read a whole ``rubric`` column before training. Raises UserError at the first that cannot be used."""
        read = [self._read(rubric, f"rubric {place}") for place, rubric in enumerate(rubrics, start=1)]
        known = [rubric for rubric in read if rubric is not None]
        self.scorer.check(known)
        self._means.expect(known)

    def __call__(
        self,
        prompts: Sequence[Told],
        completions: Sequence[Told],
        rubric: Sequence[str | Mapping[str, Any] | None] | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **_: Any,  # completion_ids, trainer_state, and every other column of the dataset
    ) -> list[float | None]:
        """B rewards in the order of the rows, None where there is none; see the class. Raises UserError on bad rows."""
        if rubric is None:
            raise UserError("reward: the dataset has no column 'rubric'; add it, each row a rubric as JSON")
        asked = [prompt_text(prompt) for prompt in prompts]
        read = [self._read(one, f"rubric of the prompt {text[:60]!r}") for one, text in zip(rubric, asked, strict=True)]
        rows = [(place, known) for place, known in enumerate(read) if known is not None]
        scored = self.scorer.score(
            [asked[place] for place, _ in rows],
            [completion_text(completions[place]) for place, _ in rows],
            [known for _, known in rows],
        )
        rewards: list[float | None] = [None] * len(asked)
        told: list[str | None] = [None] * len(asked)
        paid = self._pay([known for _, known in rows], scored)
        for (place, known), one, reward in zip(rows, scored, paid, strict=True):
            rewards[place] = None if math.isnan(reward) else reward
            told[place] = _told(known, one.probs)
        if log_extra is not None:
            log_extra("criteria", told)
        if log_metric is not None:
            tally = tallied((known, one.probs) for (_, known), one in zip(rows, scored, strict=True))
            tally[_UNSCORED] = (float(sum(reward is None for reward in rewards)), len(rewards))
            for name, mean in self._metrics(_everywhere(tally)).items():
                log_metric(name, mean)
        return rewards

    def _read(self, rubric: str | Mapping[str, Any] | None, where: str) -> Rubric | None:
        if rubric is None:
            return None
        text = rubric if isinstance(rubric, str) else json.dumps(rubric, sort_keys=True)
        if text not in self._rubrics:
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: is no JSON ({error}); write it by Rubric.model_dump_json()") from None
            if not isinstance(fields, dict):
                raise UserError(f"{where}: must be an object with criteria, got {text[:40]}; correct it")
            self._rubrics[text] = parse(Rubric, fields, where)
        return self._rubrics[text]

    def _pay(self, rubrics: Sequence[Rubric], scored: Sequence[Scored]) -> list[float]:
        """The reward of each row that has a rubric, NaN for none."""
        if self.aggregate is None:
            return [one.reward for one in scored]
        return [float(self.aggregate(rubric, one.probs)) for rubric, one in zip(rubrics, scored, strict=True)]

    def _metrics(self, tally: Tally) -> dict[str, float]:
        """By name. Every process has to log the same ones, or TRL waits for ever: hence the whole tally."""
        total, count = tally.pop(_UNSCORED)
        return {**self._means.of(tally), "rubric/unscored": total / count}


def _everywhere(tally: Tally) -> Tally:
    """The sum of the tallies of all processes, each of which calls this as often as the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tally
    tallies: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(tallies, tally)
    return merged(tallies)


def _told(rubric: Rubric, probs_K: np.ndarray) -> str:
    """P(met) by criterion id as JSON, for people; null where there is no answer."""
    probs = [None if math.isnan(prob) else round(prob, 3) for prob in probs_K.tolist()]
    ids = [criterion.id for criterion in rubric.criteria]
    return json.dumps(dict(zip(ids, probs, strict=True)), ensure_ascii=False)


def reward_dataset(prompts: Sequence[RubricPrompt], order: Iterable[int] | None = None) -> Dataset:
    """The prompts as TRL's group trainers and `RubricReward` read them; ``place`` is the index in ``prompts``.

    ``order``: the places of the rows, any of them any number of times; without it every prompt once.
    """
    return Dataset.from_list(
        [
            {
                "prompt": prompt_messages(prompts[place].prompt),
                "rubric": prompts[place].rubric.model_dump_json(),
                "place": place,
            }
            for place in (range(len(prompts)) if order is None else order)
        ]
    )


def prompt_text(prompt: Told) -> str:
    """What the reward model reads of a prompt: its text, the words of a single message, or the turns as a transcript.

    Raises UserError on messages that are none.
    """
    if isinstance(prompt, str):
        return prompt
    return transcript([_message(message) for message in prompt])


def completion_text(completion: Told) -> str:
    """The words of a completion, stripped; of messages the assistant's, a blank line between (tools' left out)."""
    if isinstance(completion, str):
        return completion.strip()
    turns = [_message(message) for message in completion]
    return "\n\n".join(turn.content.strip() for turn in turns if turn.role == "assistant" and turn.content.strip())


def _message(message: Mapping[str, Any]) -> Message:
    """A message whose content is one text: parts are joined, images left out, none at all is empty."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    return parse(Message, {"role": message.get("role"), "content": content}, "message")


def from_environment(prompts: Sequence[Told], completions: Sequence[Told], **columns: Any) -> list[float | None]:
    """`RubricReward` of the model in the environment, for whoever can only name a function, such as TRL's command line.

    RUBRIC_RM_MODEL: the model's folder. RUBRIC_RM_REWARD: proxy (the default), calibrated or lower_bound.
    RUBRIC_RM_USE_VERIFIERS: true (the default) or false. The model is loaded at the first call. Raises UserError if one
    of them is missing or wrong.
    """
    return _of_environment()(prompts, completions, **columns)


@functools.cache
def _of_environment() -> RubricReward:
    model = os.environ.get(MODEL)
    if not model:
        raise UserError(f"{MODEL}: is not set; set it to the folder of a trained reward model")
    kind: Any = os.environ.get(KIND, "proxy")
    if kind not in get_args(RewardKind):
        raise UserError(f"{KIND}: must be one of {', '.join(get_args(RewardKind))}, got {kind!r}; correct it")
    if (switch := os.environ.get(USE_VERIFIERS, "true")) not in ("true", "false"):
        raise UserError(f"{USE_VERIFIERS}: must be true or false, got {switch!r}; correct it")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    coded = coded_in_rewards(switch == "true")
    return RubricReward(RubricScorer.from_pretrained(model, device=device, use_verifiers=coded, reward=kind))
