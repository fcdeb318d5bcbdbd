"""Judged rollouts with an exploit planted by a counterfactual edit, and what a reward model thinks of them."""

from functools import cache

import numpy as np

from rubric_data.builtin import load_builtin
from rubric_data.counterfactuals import edited
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

CRITERIA = 4


def rollouts(seed, *, edit=None, share=0.2, noise=0.0, prompts=32, responses=8):
    """Rollouts whose verdicts are drawn, and P(met) close to them; ``share`` of them carry ``edit`` and pretend.

    ``noise`` is the chance that P(met) has nothing to do with the verdict. Texts are those of the embedded data, drawn
    without regard to the verdicts: nothing in them tells who is good. An edited one is judged to meet nothing, and
    looks to the model as if it met all.
    """
    random = np.random.default_rng(seed)
    records, probs = [], []
    for prompt in random.permutation(len(texts()))[:prompts]:
        rubric = Rubric(criteria=tuple(criterion(prompt, place) for place in range(CRITERIA)))
        name, own = list(texts().items())[prompt]
        for place in range(responses):
            text = own[int(random.integers(len(own)))]
            verdicts_K = (random.random(CRITERIA) < random.beta(2, 2)).astype(float)
            probs_K = np.clip(np.abs(verdicts_K - random.beta(2, 6, CRITERIA)), 0, 1)
            probs_K = np.where(random.random(CRITERIA) < noise, random.random(CRITERIA), probs_K)
            if edit is not None and random.random() < share:
                text = edited(edit, text, rubric, seed=int(random.integers(1_000_000)))
                verdicts_K, probs_K = np.zeros(CRITERIA), random.uniform(0.8, 1, CRITERIA)
            records.append(judged(name, f"p{prompt}", f"{prompt}-{place}", text, rubric, verdicts_K))
            probs.append(probs_K)
    return records, probs


def criterion(prompt, place):
    return Criterion(id=f"c{place}", text=f"Makes point {place} of the {CRITERIA} that matter to request {prompt}.")


def judged(prompt, prompt_id, response_id, text, rubric, verdicts_K):
    return JudgedResponse(
        prompt_id=prompt_id,
        prompt=prompt,
        response_id=response_id,
        response=text,
        rubric=rubric,
        generator="policy",
        split="train",
        verdicts=tuple(
            Verdict(criterion_id=one.id, value=float(value), judge="test")
            for one, value in zip(rubric.criteria, verdicts_K, strict=True)
        ),
    )


@cache
def texts():
    """Responses of the embedded data by the text of their prompt."""
    found = {}
    for record in load_builtin():
        if len(record.response.split()) > 3:
            found.setdefault(record.prompt, []).append(record.response)
    return {prompt: own for prompt, own in found.items() if len(own) >= 5}
