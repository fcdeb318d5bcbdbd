"""The prompts a policy answers, each with its rubric, and their encoding. Knows no model and no reward."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rm.sampling import render_chat
from rubric_data.errors import UserError
from rubric_data.programmatic import is_programmatic
from rubric_data.records import Criterion, JudgedResponse, Rubric, Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RubricPrompt:
    """A prompt, the rubric its responses are rewarded by, and where both come from."""

    prompt_id: str
    prompt: str
    rubric: Rubric
    split: Split | None = None
    source: str = ""
    licence: str = ""


def rubric_prompts(records: Iterable[JudgedResponse]) -> list[RubricPrompt]:
    """Each different (prompt, rubric) of ``records`` once, in order of first appearance."""
    found: dict[tuple[str, str], RubricPrompt] = {}
    for record in records:
        origin = (record.split, record.source, record.licence)
        prompt = RubricPrompt(record.prompt_id, record.prompt, record.rubric, *origin)
        found.setdefault((record.prompt, record.rubric.id), prompt)
    return list(found.values())


def require_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless ``tokenizer`` has a pad token of its own: a finished response must not look padded."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"policy tokenizer: pad token {tokenizer.pad_token!r} must differ from the end token "
            f"{tokenizer.eos_token!r}, or a finished response looks like padding; set another pad_token and save it"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of ``prompt`` as a user's turn, up to where the answer starts."""
    return list(tokenizer(render_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def warn_if_code_answers_all(data: str, criteria: Iterable[Criterion]) -> None:
    """Warn where every criterion of ``data`` carries a verifier, and these are used: no model is then asked."""
    if all(map(is_programmatic, criteria)):
        logger.warning(
            "%s: every criterion carries a verifier, so code gives the whole reward and the model is never asked; "
            "--use_verifiers false asks it",
            data,
        )
