"""What a policy's responses are worth, to the judge (gold) and to the reward model (proxy). Trains nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policy.adapter import Scorer
from policy.prompts import RubricPrompt
from rm.metrics import Estimate, estimate, mean, resample_counts
from rm.sampling import Completion, sample
from rubric_data.judges import Judge, JudgeRequest
from rubric_data.records import Rubric, Verdict
from rubric_data.reward import rubric_reward


@dataclass(frozen=True)
class PolicyEvaluation:
    """P prompts, S responses each. ``gold_PS`` and ``proxy_PS`` in [0, 1], NaN where every criterion was masked."""

    prompts: list[RubricPrompt]
    completions: list[list[Completion]]
    gold_PS: np.ndarray
    proxy_PS: np.ndarray
    tokens_PS: np.ndarray

    @property
    def gold_P(self) -> np.ndarray:
        """Mean gold reward of each prompt, over the responses that have one; NaN where none has."""
        return _known_mean(self.gold_PS)

    @property
    def proxy_P(self) -> np.ndarray:
        """Mean proxy reward of each prompt, likewise."""
        return _known_mean(self.proxy_PS)

    @property
    def finished_share(self) -> float:
        """Share of responses that the policy ended itself."""
        return float(np.mean([completion.finished for row in self.completions for completion in row]))

    @property
    def mean_tokens(self) -> float:
        """Mean length of a response, in tokens of its text."""
        return float(self.tokens_PS.mean())


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[RubricPrompt],
    *,
    judge: Judge,
    scorer: Scorer,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    progress: bool = False,
) -> PolicyEvaluation:
    """Sample ``samples`` responses to each prompt and have them judged and scored.

    With the same seed two policies meet the same chance (`rm.sampling`), so their evaluations are paired.
    """
    completions = sample(
        model,
        tokenizer,
        [prompt.prompt for prompt in prompts],
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    flat = [(prompt, one.text) for prompt, row in zip(prompts, completions, strict=True) for one in row]
    asked, texts = [prompt for prompt, _ in flat], [text for _, text in flat]
    scored = scorer.score([prompt.prompt for prompt in asked], texts, [prompt.rubric for prompt in asked])
    gold = gold_verdicts(judge, asked, texts)
    shape = (len(prompts), samples)
    return PolicyEvaluation(
        prompts=list(prompts),
        completions=completions,
        gold_PS=np.reshape([gold_reward(prompt.rubric, own) for prompt, own in zip(asked, gold, strict=True)], shape),
        proxy_PS=np.reshape(
            [rubric_reward(one.rubric, own.probs) for one, own in zip(asked, scored, strict=True)], shape
        ),
        tokens_PS=np.reshape([len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts], shape),
    )


def gold_verdicts(judge: Judge, prompts: Sequence[RubricPrompt], responses: Sequence[str]) -> list[tuple[Verdict, ...]]:
    """The judge's verdicts on each response, in the order of its prompt's rubric."""
    requests = [
        JudgeRequest(prompt.prompt, response, prompt.rubric.criteria)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return [tuple(verdicts) for verdicts in judge.judge(requests)]


def gold_reward(rubric: Rubric, verdicts: Sequence[Verdict]) -> float:
    """The reward of verdicts in the rubric's order; NaN where every criterion is masked."""
    return rubric_reward(rubric, [math.nan if verdict.value is None else verdict.value for verdict in verdicts])


def mean_estimate(values_P: np.ndarray, *, bootstrap: int = 2000, seed: int = 0) -> Estimate:
    """Mean over prompts with its 95 % bootstrap interval over prompts; NaN prompts are left out."""
    known = values_P[~np.isnan(values_P)]
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan)
    return estimate(mean(known, np.arange(len(known)), len(known)), resample_counts(len(known), bootstrap, seed))


def paired_difference(before_P: np.ndarray, after_P: np.ndarray, *, bootstrap: int = 2000, seed: int = 0) -> Estimate:
    """Mean of after - before over prompts, with its 95 % bootstrap interval.

    The prompt is what is resampled: its responses, before and after, stay together. A prompt that is NaN on
    either side is left out. Raises ValueError if the two differ in length.
    """
    if before_P.shape != after_P.shape:
        raise ValueError(f"paired_difference: got {len(before_P)} prompts before and {len(after_P)} after")
    return mean_estimate(after_P - before_P, bootstrap=bootstrap, seed=seed)


def _known_mean(values_PS: np.ndarray) -> np.ndarray:
    known_PS = ~np.isnan(values_PS)
    total_P = np.where(known_PS, values_PS, 0.0).sum(1)
    return np.divide(total_P, known_PS.sum(1), out=np.full(len(values_PS), np.nan), where=known_PS.any(1))
