"""The prompts a policy answers, each with its rubric, and their encoding. Knows no model and no reward."""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rm.sampling import render_chat
from rubric_data.records import JudgedResponse, Rubric


@dataclass(frozen=True)
class RubricPrompt:
    """A prompt and the rubric its responses are rewarded by."""

    prompt_id: str
    prompt: str
    rubric: Rubric


def rubric_prompts(records: Iterable[JudgedResponse]) -> list[RubricPrompt]:
    """Each different (prompt, rubric) of ``records`` once, in order of first appearance."""
    found: dict[tuple[str, str], RubricPrompt] = {}
    for record in records:
        key = (record.prompt, record.rubric.id)
        found.setdefault(key, RubricPrompt(record.prompt_id, record.prompt, record.rubric))
    return list(found.values())


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of ``prompt`` as a user's turn, up to where the answer starts."""
    return list(tokenizer(render_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"])
