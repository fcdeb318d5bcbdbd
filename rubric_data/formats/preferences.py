"""Preference pairs as TRL reads them: prompt, chosen, rejected; texts or messages, the prompt explicit or implicit.

A pair says nothing about another, so every row is a prompt of its own even where texts repeat. All share one
rubric, the criterion `OVERALL`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, takewhile
from typing import Literal

from rubric_data.formats.base import (
    Answer,
    Example,
    Format,
    Group,
    Row,
    SkipRow,
    Told,
    Written,
    assistant_message,
    prompt_messages,
    transcript,
)
from rubric_data.pairs import REWARD_DECIMALS
from rubric_data.records import Criterion, JudgedResponse, Rubric
from rubric_data.reward import rubric_reward

OVERALL = Rubric(criteria=(Criterion(id="overall", text="The response answers the prompt well overall."),))

Scored = tuple[float, JudgedResponse]
_TIE = 1e-9  # scores closer than this tie


class _Row(Row):
    chosen: Told
    rejected: Told
    prompt: Told = ""


def read(row: _Row, where: str) -> Example:
    """The prompt, and both responses: the chosen with preference 1, the rejected with 0."""
    prompt, chosen, rejected = _split(row)
    if chosen == rejected:
        raise SkipRow("row whose chosen and rejected responses are the same")
    answers = (Answer(chosen, "chosen", preference=1.0), Answer(rejected, "rejected", preference=0.0))
    return Example(prompt, OVERALL, answers=answers)


def _split(row: _Row) -> tuple[str, str, str]:
    """Prompt, chosen and rejected response as texts. What both responses begin with is the prompt, if none is given."""
    given = row.prompt if isinstance(row.prompt, str) else transcript(row.prompt)
    if isinstance(row.chosen, str) or isinstance(row.rejected, str):
        chosen, rejected = (told if isinstance(told, str) else transcript(told) for told in (row.chosen, row.rejected))
        cut = 0 if given else _common_text(chosen, rejected)
        return given or chosen[:cut], chosen[cut:], rejected[cut:]
    pairs = zip(row.chosen, row.rejected, strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if given:  # some files repeat it at the beginning of both dialogues
        shared = len(list(takewhile(lambda message: message.role != "assistant", row.chosen[:shared])))
    ends = (transcript(row.chosen[shared:]), transcript(row.rejected[shared:]))
    return given or transcript(row.chosen[:shared]), *ends


def _common_text(one: str, other: str) -> int:
    """The length of what both texts begin with, up to the last white space, so that no word is cut."""
    length = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
    while length and not one[length - 1].isspace():
        length -= 1
    return len(one[:length].rstrip())


def write(
    groups: Sequence[Group],
    *,
    pairs: Literal["best-worst", "all"] = "best-worst",
    by: Literal["reward", "preference"] = "reward",
) -> Written:
    """Pairs of messages with the scores that order them: of each prompt the best response and the worst, or all pairs.

    ``by`` is the reward of the verdicts under the rubric, or the people's preference. Responses without a score and
    pairs of equal score or text are left out.
    """
    rows, left_out = [], Counter[str]()
    for group in groups:
        scored = _scored(group.responses, by)
        found, without = pair_up(scored, pairs)
        rows += [pair_row(group.prompt.prompt, better, worse) for better, worse in found]
        left_out += _unscored(group.responses, by)
        left_out.update(without)
    return Written(rows, left_out + _rubric_losses(groups))


def pair_up(
    scored: Sequence[Scored], pairs: Literal["best-worst", "all"], margin: float = 0.0
) -> tuple[list[tuple[Scored, Scored]], Counter[str]]:
    """Pairs (better, worse) of one prompt's scored responses, and how much was left out for which reason.

    Of equal responses the first is the better one. Scores that tie, or are less than ``margin`` apart, and equal texts
    make no pair.
    """
    ranked = sorted(scored, key=lambda one: -one[0])  # stable
    ends = [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
    found, left_out = [], Counter[str]()
    for better, worse in combinations(ranked, 2) if pairs == "all" else ends:
        if math.isclose(better[0], worse[0], abs_tol=_TIE):
            left_out["pairs that tie"] += 1
        elif better[0] - worse[0] < margin - _TIE:
            left_out["pairs closer than the margin"] += 1
        elif better[1].response == worse[1].response:
            left_out["pairs of the same text"] += 1
        else:
            found.append((better, worse))
    left_out["responses between the best and the worst"] += len(ranked) - 2 if ends and pairs == "best-worst" else 0
    left_out["prompts with fewer than two scored responses"] += not ends
    return found, left_out


def pair_row(prompt: str, better: Scored, worse: Scored) -> dict[str, object]:
    """A pair as TRL reads it: messages, and the scores beside them."""
    return {
        "prompt": prompt_messages(prompt),
        "chosen": assistant_message(better[1].response),
        "rejected": assistant_message(worse[1].response),
        "score_chosen": better[0],
        "score_rejected": worse[0],
    }


def _scored(responses: Sequence[JudgedResponse], by: str) -> list[Scored]:
    """The responses that have a score, with it; rewards rounded, so that those equal but for rounding tie."""
    if by == "preference":
        return [(response.preference, response) for response in responses if response.preference is not None]
    scored = [
        (round(rubric_reward(response.rubric, response.values()), REWARD_DECIMALS), response) for response in responses
    ]
    return [pair for pair in scored if not math.isnan(pair[0])]


def _unscored(responses: Sequence[JudgedResponse], by: str) -> Counter[str]:
    """How many responses have no score, by what they lack."""
    if by == "preference":
        return Counter({"responses without a preference": sum(one.preference is None for one in responses)})
    judged = [one for one in responses if one.verdicts]
    masked = sum(math.isnan(rubric_reward(one.rubric, one.values())) for one in judged)
    return Counter(
        {"responses not judged": len(responses) - len(judged), "responses whose verdicts are masked": masked}
    )


def _rubric_losses(groups: Sequence[Group]) -> Counter[str]:
    """Rubrics that say more than which response is better."""
    lost = sum(group.prompt.rubric not in (None, OVERALL) for group in groups)
    return Counter({"rubrics": lost} if lost else {})


FORMAT = Format(_Row, read, write=write)
