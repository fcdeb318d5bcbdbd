"""From text to trees of token ids, within the model's window. Owns tokenising and truncation.

What is data (prompt, response, criterion) is tokenised with special tokens switched off, so no text can end a
turn or pose as the template.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rm import template
from rm.layout import Branch, Tree
from rubric_data.errors import UserError
from rubric_data.records import Criterion, Level

_KNOWN_CRITERIA = 16_384  # whose ids are kept


@dataclass(frozen=True)
class Encoded:
    """A tree and what it cost to fit it: tokens cut from the prompt, and (R,) from each response."""

    tree: Tree
    prompt_cut: int
    response_cut: list[int]


class Encoder:
    """Turns (prompt, responses, criteria) into trees whose every path has at most ``max_length`` tokens.

    ``rubric_blind``: the same neutral words stand in the place of every criterion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, rubric_blind: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.rubric_blind = rubric_blind
        self._read = functools.lru_cache(_KNOWN_CRITERIA)(self._ids)  # a rubric comes back with every response
        empty = template.prompt_segment(""), template.response_segment("")
        self._least = 1 + max(sum(len(self._ids(part)) for part in segment) for segment in empty)

    def check(self, criteria: Iterable[Criterion]) -> None:
        """Raise UserError if one of ``criteria`` leaves no room for a prompt and a response."""
        for criterion in criteria:
            self._criterion(criterion)

    def encode(self, prompt: str, responses: Sequence[str], criteria: Sequence[Sequence[Criterion]]) -> Encoded:
        """One prompt, R responses, and the criteria asked of each (R lists).

        A criterion is never cut. A prompt may take half of what the longest criterion leaves and loses its
        beginning beyond that; a response loses its end. Raises UserError if a criterion leaves no room.
        """
        criteria_ids = [[self._criterion(criterion) for criterion in row] for row in criteria]
        longest = max((len(ids) for row in criteria_ids for ids in row), default=0)
        start = self._start()
        room = self.max_length - len(start) - longest
        prompt_ids, prompt_cut = self._fit(template.prompt_segment(prompt), room // 2, keep_end=True)
        branches, response_cut = [], []
        for response, row in zip(responses, criteria_ids, strict=True):
            ids, cut = self._fit(template.response_segment(response), room - len(prompt_ids), keep_end=False)
            branches.append(Branch(ids, row))
            response_cut.append(cut)
        return Encoded(Tree(start + prompt_ids, branches), prompt_cut, response_cut)

    def question(self, criterion: Criterion) -> tuple[str, tuple[Level, ...]]:
        """What tells ``criterion`` from others to a model: those that are the same here need to be asked once."""
        return "" if self.rubric_blind else criterion.text, criterion.levels

    def _criterion(self, criterion: Criterion) -> list[int]:
        segment = template.unshown_segment() if self.rubric_blind else template.criterion_segment(criterion)
        ids = self._read("".join(segment))
        if self.max_length - len(self._start()) - len(ids) < 2 * self._least:
            raise UserError(
                f"max_length: {self.max_length} tokens leave no room beside a criterion of {len(ids)} "
                f"({criterion.text[:40]!r}...); raise max_length"
            )
        return ids

    def _fit(self, segment: template.Segment, room: int, *, keep_end: bool) -> tuple[list[int], int]:
        """The segment's ids in at most ``room`` tokens, and how many of its body's tokens were cut."""
        whole = self._ids("".join(segment))
        if len(whole) <= room:
            return whole, 0
        before, body, after = map(self._ids, segment)
        space = room - len(before) - len(after)
        kept = body[-space:] if keep_end else body[:space]
        return before + kept + after, max(len(body) - len(kept), 0)

    def _start(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and getattr(self.tokenizer, "add_bos_token", False) else []

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
