"""A judge from any causal language model: P(yes) from the first-token logits, one padded sequence per criterion."""

import hashlib
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rm.backbone import as_dtype, load_causal_lm, load_tokenizer
from rubric_data.judges import JudgeRequest
from rubric_data.records import Criterion, Verdict

_QUESTION = (
    "Prompt:\n{prompt}\n\nResponse:\n{response}\n\nCriterion: {criterion}\n\n"
    "Does the response meet the criterion? Answer with one word, Yes or No."
)
_LEVELS = (
    "Prompt:\n{prompt}\n\nResponse:\n{response}\n\nCriterion: {criterion}\nLevels:\n{levels}\n\n"
    "Which level does the response reach? Answer with its number only."
)
_MARK = "\x00"  # stands for the question while the chat template is rendered; no chat template holds it
_MIN_MASS = 1e-3  # of all answers together, below which the reply counts as unreadable


class LocalJudge:
    """Judges by the probability that the model's first word is the answer: Yes or No, or a level's number.

    A verdict is masked if the text does not fit the model's window ("too_long") or if the answers together have
    next to no probability ("unreadable").
    """

    def __init__(self, model: str = "smollm2", *, dtype: str = "auto", batch_size: int = 16) -> None:
        self.name = f"local:{model}"
        self.template = hashlib.sha256((_QUESTION + _LEVELS).encode()).hexdigest()[:16]
        self.tokenizer = load_tokenizer(model)
        self.model = load_causal_lm(model, dtype=as_dtype(dtype))
        self.batch_size = batch_size
        self._window = getattr(self.model.config, "max_position_embeddings", None) or math.inf

    def judge(self, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
        """Verdicts aligned with each request's criteria."""
        asked = [(request, criterion) for request in requests for criterion in request.criteria]
        ids = [self._question(request, criterion) for request, criterion in asked]
        verdicts: list[Verdict | None] = [None] * len(asked)
        fitting = [index for index, question in enumerate(ids) if len(question) <= self._window]
        fitting.sort(key=lambda index: len(ids[index]))  # neighbours of like length pad least
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            for index, logprobs in zip(batch, self._first_token([ids[index] for index in batch]), strict=True):
                verdicts[index] = self._verdict(asked[index][1], logprobs)
        answers = iter(
            verdict
            or Verdict(criterion_id=criterion.id, masked="too_long: exceeds the judge's window", judge=self.name)
            for verdict, (_, criterion) in zip(verdicts, asked, strict=True)
        )
        return [tuple(next(answers) for _ in request.criteria) for request in requests]

    def _question(self, request: JudgeRequest, criterion: Criterion) -> list[int]:
        levels = "\n".join(
            f"{number}. {level.label} {level.anchor}" for number, level in enumerate(criterion.levels, 1)
        )
        text = (_LEVELS if levels else _QUESTION).format(
            prompt=request.prompt, response=request.response, criterion=criterion.text, levels=levels
        )
        if self.tokenizer.chat_template is None:
            return self._data_ids(text + "\nAnswer:")
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        before, after = chat.split(_MARK)
        encode = self.tokenizer.encode
        return encode(before, add_special_tokens=False) + self._data_ids(text) + encode(after, add_special_tokens=False)

    def _data_ids(self, text: str) -> list[int]:
        """Ids of text under judgement: no special token in it counts as one."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    @torch.inference_mode()
    def _first_token(self, ids: list[list[int]]) -> torch.Tensor:
        """Log-probabilities of the first reply token, (B, vocabulary), float32."""
        width = max(map(len, ids))
        rows = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(input_ids=rows, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits
        return logits[:, -1].float().log_softmax(-1)

    def _verdict(self, criterion: Criterion, logprobs_V: torch.Tensor) -> Verdict:
        words = [str(number) for number in range(1, len(criterion.levels) + 1)] or ["No", "Yes"]
        mass = [logprobs_V[_spellings(self.tokenizer, word)].logsumexp(0).exp().item() for word in words]
        if sum(mass) < _MIN_MASS:
            return Verdict(
                criterion_id=criterion.id, masked=f"unreadable: the answers have mass {sum(mass):.1e}", judge=self.name
            )
        expected = sum(place * share for place, share in enumerate(mass)) / sum(mass)
        return Verdict(criterion_id=criterion.id, value=expected / (len(words) - 1), judge=self.name)


def _spellings(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """First tokens of the ways a model may begin to write ``word``."""
    forms = {form for base in (word, word.lower(), word.upper()) for form in (base, " " + base)}
    ids = (tokenizer.encode(form, add_special_tokens=False) for form in forms)
    return sorted({row[0] for row in ids if len(row) == 1})
