"""Stand between TRL's PPO, which hands a reward model token ids, and a scorer, which wants text and a rubric.

Owns the way from a row of ids to (prompt, rubric, response text) and back to a tensor of rewards. The scoring
itself is `rm.scorer`; the value model is `policy.critic`.

`trl.experimental.utils.get_reward` calls ``model.<base_model_prefix>(input_ids, attention_mask, ...)``, then
``model.score(hidden_states[-1])``, and keeps the number at the last token of the response. It passes nothing but
ids, so the rubric is found by the prompt's ids.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from policy.config import AggregationConfig
from policy.prompts import RubricPrompt, encode_prompt, require_pad
from policy.step_rewards import StepRewards
from rm.scorer import Scored
from rubric_data.errors import UserError
from rubric_data.records import Rubric
from rubric_data.reward import rubric_reward


class Scorer(Protocol):
    """What `rm.scorer.RubricScorer` offers here."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rubrics: Sequence[Rubric]) -> list[Scored]: ...


@dataclass(frozen=True)
class Rollout:
    """One response of the policy as the reward model saw it.

    ``tokens`` counts the end token; ``finished``: whether the response has one. ``paid`` is what the trainer gets, NaN
    for nothing: the scorer's reward, unless the aggregation says otherwise or a judge was asked (`policy.fallback`).
    ``seconds``: its share of the time that rewarding its batch took.
    """

    prompt: RubricPrompt
    response: str
    scored: Scored
    tokens: int
    finished: bool
    paid: float
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        prompt: RubricPrompt,
        response: str,
        ids: Sequence[int],
        scored: Scored,
        paid: float,
        end_token: int | None,
        seconds: float,
    ) -> Self:
        """The rollout of ``ids``, whose text is ``response``, as ``scored``."""
        return cls(prompt, response, scored, len(ids), end_token in ids, paid, seconds)

    @property
    def reward(self) -> float:
        """The proxy: the rubric's weighted mean of the reward model's answers, in [0, 1]; NaN where it gave none."""
        return rubric_reward(self.prompt.rubric, self.scored.own.probs)

    @property
    def doubt(self) -> float:
        """Standard deviation of `reward` by the model's posterior; NaN without one."""
        own = self.scored.own
        return math.nan if own.doubt is None else own.doubt.reward


class RubricRewardAdapter(nn.Module):
    """A reward model for TRL's PPO whose reward is a scorer's, under the rubric of each row's prompt.

    ``rewards`` makes what is paid of the scorer's answers; by default the scorer's own reward. An update ends with
    `take_rollouts`.

    It has no parameters and nothing to save. A row's reward stands at every position, so whichever TRL picks is right.
    A reward that is NaN (every criterion masked) is replaced by the mean of its batch, which pushes the policy
    nowhere; `Rollout.reward` keeps the NaN, so that it can be counted. With ``mask_unfinished`` so is what a response
    without end token would be paid; `Rollout.paid` is then NaN.

    Raises UserError on a prompt with two rubrics, on a tokenizer whose pad token is its end token, on a prompt
    that holds the pad token, and if one prompt's ids start another's.
    """

    base_model_prefix = "backbone"  # the name TRL looks the backbone up by

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[RubricPrompt],
        rewards: StepRewards | None = None,
        *,
        mask_unfinished: bool = False,
    ) -> None:
        super().__init__()
        rewards = rewards or StepRewards(AggregationConfig())
        self.backbone = _ScoringBackbone(scorer, tokenizer, contexts(tokenizer, prompts), rewards, mask_unfinished)
        self.score = nn.Identity()  # the backbone's "hidden states" are the rewards already

    def go_on(self, step: int) -> None:
        """The next update is the one after ``step``."""
        self.backbone.step = step

    def take_rollouts(self) -> list[Rollout]:
        """All rows scored since the last call, in TRL's order: those of one update."""
        self.backbone.step += 1
        taken, self.backbone.rollouts = self.backbone.rollouts, []
        return taken


def contexts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[RubricPrompt]
) -> dict[tuple[int, ...], RubricPrompt]:
    """The prompts by their token ids. Raises UserError where ids would not tell the rubric (see the adapter)."""
    require_pad(tokenizer)
    known: dict[tuple[int, ...], RubricPrompt] = {}
    for prompt in prompts:
        ids = tuple(encode_prompt(tokenizer, prompt.prompt))
        if tokenizer.pad_token_id in ids:
            raise UserError(
                f"prompt {prompt.prompt_id!r}: holds the pad token {tokenizer.pad_token!r}; take it out of the text"
            )
        before = known.setdefault(ids, prompt)
        if before.rubric.id != prompt.rubric.id:
            raise UserError(
                f"prompt {prompt.prompt_id!r}: has two rubrics (the other is of {before.prompt_id!r}), and PPO passes "
                "on the prompt alone; keep one rubric for each prompt"
            )
    starts: list[tuple[int, ...]] = []  # each begins with all of the one before
    for ids in sorted(known):
        while starts and ids[: len(starts[-1])] != starts[-1]:
            starts.pop()
        # an earlier turn of the same dialogue is no harm: its response has nothing after an end token
        if starts and tokenizer.eos_token_id not in ids[len(starts[-1]) : -1]:
            raise UserError(
                f"prompt {known[ids].prompt_id!r}: its tokens begin with all of {known[starts[-1]].prompt_id!r}; "
                "use a chat template that ends the user's turn"
            )
        starts.append(ids)
    return known


class _ScoringBackbone(nn.Module):
    """What TRL takes for a transformer: ids in, rewards out as the hidden states of its last layer."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        known: dict[tuple[int, ...], RubricPrompt],
        rewards: StepRewards,
        mask_unfinished: bool,
    ) -> None:
        super().__init__()
        self._rewards, self._mask_unfinished = rewards, mask_unfinished
        self.step = 0
        self._score = scorer.score  # the method, not the scorer: a module set here would join the state_dict
        self._tokenizer = tokenizer
        self._known = known
        self._lengths = sorted({len(ids) for ids in known}, reverse=True)  # a dialogue before its beginning
        self.rollouts: list[Rollout] = []

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> BaseModelOutput:
        """ids (B, T) and mask (B, T), False on padding of either side. Returns one hidden state (B, T, 1) float32."""
        rows = [self._read(ids, mask) for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)]
        begun = time.perf_counter()
        rubrics = [prompt.rubric for prompt, _ in rows]
        texts = [self._text(ids) for _, ids in rows]
        scored = self._score([prompt.prompt for prompt, _ in rows], texts, rubrics)
        earned = self._rewards(rubrics, scored, [prompt.prompt_id for prompt, _ in rows], self.step)
        eos, paid = self._tokenizer.eos_token_id, list(earned)
        if self._mask_unfinished:
            paid = [reward if eos in ids else math.nan for (_, ids), reward in zip(rows, earned, strict=True)]
        seconds = (time.perf_counter() - begun) / len(rows)
        self.rollouts += [
            Rollout.of(prompt, text, ids, item, reward, eos, seconds)
            for (prompt, ids), text, item, reward in zip(rows, texts, scored, paid, strict=True)
        ]
        reward_B = torch.tensor(fill_missing(paid, earned), dtype=torch.float32, device=input_ids.device)
        hidden_BT1 = reward_B[:, None, None].expand(-1, input_ids.shape[1], 1)
        return BaseModelOutput(last_hidden_state=hidden_BT1, hidden_states=(hidden_BT1,))

    def _read(self, ids: list[int], mask: list[bool]) -> tuple[RubricPrompt, tuple[int, ...]]:
        """The prompt of one row, and its response's ids up to the end token or the first padding after it."""
        start = mask.index(True) if any(mask) else 0
        # a pad token the policy wrote ends the response for TRL, so it does here
        end = next((place for place in range(start, len(mask)) if not mask[place]), len(mask))
        row = tuple(ids[start:end])
        for length in self._lengths:
            prompt = self._known.get(row[:length])
            if prompt is not None:
                response = row[length:]
                eos = self._tokenizer.eos_token_id
                return prompt, response[: response.index(eos) + 1] if eos in response else response
        text = self._tokenizer.decode(list(row[:60]))
        raise UserError(
            f"reward adapter: no rubric is known for the prompt {text!r}; give the adapter every prompt that PPO "
            "trains on, encoded by policy.prompts.encode_prompt"
        )

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def fill_missing(paid: Sequence[float], earned: Sequence[float]) -> list[float]:
    """``paid`` with every NaN replaced by the mean of the others; where all are, by the mean of ``earned``.

    Raises UserError if that has none either.
    """
    given = [reward for reward in paid if not math.isnan(reward)]
    given = given or [reward for reward in earned if not math.isnan(reward)]
    if not given:
        raise UserError(
            f"reward model: gave no reward to any of {len(paid)} rollouts; check its calibration and the rubrics"
        )
    return [sum(given) / len(given) if math.isnan(reward) else reward for reward in paid]
