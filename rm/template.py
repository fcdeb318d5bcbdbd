"""Render (prompt, response, criterion) as the model reads them. Sole owner of the wording; knows no tokenizer.

A segment has a body, which is data, and fixed text around it. The instruction stands once, at the end of the
response, and a criterion ends in a short marker: once prefixes are shared, criteria dominate the tokens.
"""

import hashlib
from typing import NamedTuple

from rubric_data.records import Criterion

YES, NO = " Yes", " No"  # what a language model would say next; their difference starts the verdict head
_PROMPT = ("Prompt:\n", "\n\nResponse:\n")
_RESPONSE = ("", "\n\nDoes the response meet the criterion? Answer Yes or No.\nCriterion:")
_CRITERION = (" ", "\nMet:")
_UNSHOWN = "(not shown)"  # what a rubric-blind model reads in the place of every criterion


class Segment(NamedTuple):
    """Fixed text before, the body, fixed text after."""

    before: str
    body: str
    after: str


def prompt_segment(prompt: str) -> Segment:
    """The root of the tree."""
    return Segment(_PROMPT[0], prompt, _PROMPT[1])


def response_segment(response: str) -> Segment:
    """A response, followed by the instruction its criteria share."""
    return Segment(_RESPONSE[0], response, _RESPONSE[1])


def criterion_segment(criterion: Criterion) -> Segment:
    """A criterion; ordered levels are named from worst to best."""
    levels = "; ".join(f"{level.label}: {level.anchor}" if level.anchor else level.label for level in criterion.levels)
    body = f"{criterion.text} Levels, worst to best: {levels}." if levels else criterion.text
    return Segment(_CRITERION[0], body, _CRITERION[1])


def unshown_segment() -> Segment:
    """The same in the place of any criterion."""
    return Segment(_CRITERION[0], _UNSHOWN, _CRITERION[1])


def template_hash(*, rubric_blind: bool = False) -> str:
    """Identity of the wording, 16 hex digits; a model refuses to read under another than it was trained with."""
    of_criteria = _UNSHOWN if rubric_blind else " Levels, worst to best: "
    wording = "\0".join((*_PROMPT, *_RESPONSE, *_CRITERION, YES, NO, of_criteria))
    return hashlib.sha256(wording.encode()).hexdigest()[:16]
