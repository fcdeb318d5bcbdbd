"""Rubrics as Rewards (arXiv:2507.17746): ScaleAI/RaR-Medicine, ScaleAI/RaR-Science. Owns the signs of its pitfalls.

Every pitfall of that data weighs -1 or -2, but its words go two ways: some name a fault ("Does not mention the
dose": met is bad), some name what avoids one ("Avoids jargon": met is good), and the paper reads all of them the
second way. So here the words decide the sign, and a pitfall whose words do not is left out and counted.
"""

import math
import re
from collections.abc import Sequence

from rubric_data.formats.base import (
    REFERENCE,
    Answer,
    Example,
    Format,
    Group,
    Row,
    Written,
    losses,
    make_rubric,
    number,
    reference_and_others,
    with_rubric,
)
from rubric_data.records import Criterion, Number

CATEGORIES = ("essential", "important", "optional", "pitfall")  # tags here, first words of a description there

_PREFIX = re.compile(rf"\s*({'|'.join(CATEGORIES)}) criteri(?:a|on)\s*:\s*", re.IGNORECASE)
_SUBJECT = r"(?:(?:the|an?|this|any|every) (?:[\w'-]+ ){1,3}?|it |one |(?:answer|response|solution|explanation)s? )?"
_NORM = re.compile(
    rf"{_SUBJECT}(?:should|must|shall|cannot|can not|ought to|needs? to|ha(?:s|ve) to"
    r"|avoid(?:s|ing)?|refrains?|steers? clear|guards? against|takes? care|ensures?|makes? sure|do not|don't"
    r"|(?:be|is) (?:careful|cautious|crucial|essential|important|mindful|vital|wary))\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(rf"{_SUBJECT}(?:does not|doesn't|did not|didn't|never) (?:\w+ly )?([a-z]+)(.*)", re.IGNORECASE)
_FAULTS = re.compile(  # not to do these is good
    r"confus|conflat|contradict|deviat|digress|dismiss|disregard|downplay|exaggerat|fabricat|fail|ignor|invent|mis"
    r"|neglect|omit|over(?:complicat|emphas|generali|look|simplif|stat)|skip|stray|understat"
)
_CONTENTS = re.compile(  # not to do these leaves something out, unless what is left out is bad
    r"account|acknowledg|address|answer|appl|calculat|check|cite|clarif|compar|conclu|connect|consider|convert|cover"
    r"|defin|demonstrat|deriv|describ|detail|differentiat|discuss|distinguish|elaborat|emphasi|explain|explor|giv"
    r"|highlight|identif|includ|indicat|interpret|justif|link|list|mention|name|note|offer|outlin|point|present"
    r"|provid|recogni|refer|relat|report|show|specif|stat|us|verif|warn"
)
_BAD = re.compile(
    r"\s+(?:(?:an?|any|the) )?(?:contradict|erroneous|excessive|extraneous|false|harmful|inaccura|inappropriate"
    r"|incorrect|irrelevant|mislead|outdated|overly|speculat|tangential|unnecessar|unrelated|unsafe|unsupported|vague|wrong)",
    re.IGNORECASE,
)


class _Item(Row):
    title: str = ""
    description: str
    weight: Number


class _Row(Row):
    question: str
    reference_answer: str = ""
    rubric: list[_Item]


def pitfall_sign(text: str) -> int | None:
    """1 if meeting the pitfall ``text`` is good, -1 if it is bad, None if its words leave that open.

    "Does not recommend ..." is open: it depends on whether what follows should be recommended.
    """
    text = " ".join(text.replace("’", "'").split())
    if _NORM.match(text):
        return 1
    negated = _NEGATED.match(text)
    if negated is None:
        return -1  # a fault, plainly stated: "Recommends ...", "Fails to ..."
    verb, rest = negated[1].lower(), negated[2]
    if _FAULTS.match(verb):
        return 1
    if _CONTENTS.match(verb):
        return 1 if _BAD.match(rest) else -1
    return None


def read(row: _Row, where: str) -> Example:
    """The question, its rubric with the category as tag, and the reference answer."""
    criteria, left_out = [], []
    for item in row.rubric:
        prefix = _PREFIX.match(item.description)
        category = prefix[1].lower() if prefix else ""
        text = item.description[prefix.end() if prefix else 0 :].strip()
        weight = item.weight
        if category == "pitfall":
            sign = pitfall_sign(text)
            if sign is None:
                left_out.append("pitfall whose words leave its sign open")
                continue
            weight = math.copysign(weight, sign)
        criteria.append({"id": item.title, "text": text, "weight": weight, "tags": (category,) if category else ()})
    rubric, more = make_rubric(criteria, where)
    answers = (Answer(row.reference_answer, REFERENCE, generator=REFERENCE),) if row.reference_answer.strip() else ()
    if not answers:
        left_out.append("empty reference answer")
    return Example(row.question, rubric, answers=answers, left_out=(*left_out, *more))


def write(groups: Sequence[Group]) -> Written:
    """One row a prompt. A pitfall carries the sign of its words, not the negative one of the published data."""
    having, left_out = with_rubric(groups)
    rows = []
    for group, rubric in having:
        reference, others = reference_and_others(group.responses)
        left_out["responses"] += len(others)
        items = [
            {"title": criterion.id, "description": _describe(criterion), "weight": number(criterion.weight)}
            for criterion in rubric.criteria
        ]
        rows.append(
            {
                "question": group.prompt.prompt,
                "reference_answer": reference or "",
                "question_source": group.prompt.source,
                "rubric": items,
                "rubric_list": [item["description"] for item in items],
                "rubric_count": len(items),
            }
        )
    return Written(rows, left_out + losses(groups, tags=CATEGORIES))


def _describe(criterion: Criterion) -> str:
    category = next((tag for tag in criterion.tags if tag in CATEGORIES), "pitfall" if criterion.weight < 0 else "")
    return f"{category.capitalize()} Criteria: {criterion.text}" if category else criterion.text


FORMAT = Format(_Row, read, source="ScaleAI/RaR", write=write)  # its dataset cards state no licence
