"""Sample responses from a causal language model. Knows prompts and text, not rubrics or rewards.

The chance in a completion belongs to its seed, prompt and number, not to the batch it was drawn in: every row
adds its own Gumbel noise to its logits and takes the largest, which is an exact draw from the softmax. Models
compared with one seed therefore meet the same chance. What the batch still decides is rounding: a longer
neighbour means more left padding, and in bfloat16 that can turn a close call.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jinja2 import TemplateError
from rich.progress import Progress
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from rubric_data.errors import UserError
from rubric_data.formats.base import prompt_messages


@dataclass(frozen=True)
class Completion:
    """One sampled response: its text, stripped, and whether the model ended it (False: cut at the token limit)."""

    text: str
    finished: bool


def render_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """``prompt`` in the tokenizer's chat template, up to where the answer starts; a transcript as its turns.

    Raises UserError if the template does not take such turns, or there is none.
    """
    turns = prompt_messages(prompt)
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError) as error:  # ValueError: there is no template
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"prompt {prompt[:60]!r}: the model's chat template does not take its turns ({roles}): {error}; leave the "
            "prompt out, or take another model"
        ) from None


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 48,
    progress: bool = False,
) -> list[list[Completion]]:
    """``samples`` completions of every prompt, in the caller's order.

    temperature >= 0 (0 is greedy: all samples of a prompt are then equal). Prompts of like length share a
    batch, padded on the left. The model's mode and the global random state are left as they were. A prompt that
    stands in ``prompts`` twice gets different samples. Needs a chat template and a pad token that is not the
    end token. Raises ValueError on a pad token equal to the end token or a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"sample: temperature must be at least 0, got {temperature}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError("sample: the tokenizer needs a pad token other than its end token; set tokenizer.pad_token")
    encoded = tokenizer([render_chat(tokenizer, prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]
    seeds = _row_seeds(prompts, samples, seed)
    rows = sorted(((i, s) for i in range(len(prompts)) for s in range(samples)), key=lambda row: -len(encoded[row[0]]))
    found: dict[tuple[int, int], Completion] = {}
    was_training = model.training
    model.eval()
    try:
        with Progress(disable=not progress) as bar:
            task = bar.add_task("sampling", total=len(rows))
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                ids = [encoded[i] for i, _ in batch]
                noise = [seeds[row] for row in batch]
                completions = _generate(model, tokenizer, ids, noise, max_new_tokens, temperature)
                found.update(zip(batch, completions, strict=True))
                bar.advance(task, len(batch))
    finally:
        model.train(was_training)
    return [[found[i, s] for s in range(samples)] for i in range(len(prompts))]


def _row_seeds(prompts: Sequence[str], samples: int, seed: int) -> dict[tuple[int, int], int]:
    """A 63-bit seed for every (prompt index, sample index), from the prompt's text and not from its place."""
    met: Counter[str] = Counter()
    seeds = {}
    for i, prompt in enumerate(prompts):
        for s in range(samples):
            digest = hashlib.sha256(f"{seed}\x1f{met[prompt]}\x1f{s}\x1f{prompt}".encode()).digest()
            seeds[i, s] = int.from_bytes(digest[:8], "big") >> 1
        met[prompt] += 1
    return seeds


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    seeds: list[int],
    max_new_tokens: int,
    temperature: float,
) -> list[Completion]:
    """Complete one left-padded batch of token lists; one completion for each."""
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id
    tokens_BT = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    # a fresh configuration: the model's own may hold a top_k or a penalty that would bend the distribution
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad
    )
    processors = LogitsProcessorList([_gumbel(seeds, temperature)] if temperature > 0 else [])
    output = model.generate(
        input_ids=tokens_BT, attention_mask=mask_BT, generation_config=config, logits_processor=processors
    )
    return [_completion(tokenizer, row.tolist()) for row in output[:, longest:]]


def _gumbel(seeds: Sequence[int], temperature: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor after which arg-max draws from softmax(logits / temperature), row by row seeded."""
    generators = [np.random.default_rng(seed) for seed in seeds]

    def process(_: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        # numpy's exponentials: a seed means the same on every device, and torch's seeded ones are 60 times slower.
        # In float64: of 50,000 draws in float32 one is exactly 0 too often, and its token would always win.
        noise_BV = np.stack([generator.standard_exponential(logits_BV.shape[-1]) for generator in generators])
        gumbel_BV = torch.from_numpy(-np.log(noise_BV)).to(logits_BV.device, torch.float32)
        return logits_BV.float() / temperature + gumbel_BV

    return process


def _completion(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Completion:
    """Text up to the end token, if there is one."""
    finished = tokenizer.eos_token_id in tokens
    kept = tokens[: tokens.index(tokenizer.eos_token_id)] if finished else tokens
    return Completion(str(tokenizer.decode(kept, skip_special_tokens=True)).strip(), finished)
