"""Chasing the Tail (arXiv:2509.21500): the rubrics of JunkaiZ/Rubrics, and the scored responses its code writes.

Import only. What that code counts as "no" because its verifier skipped the criterion is masked here.
"""

from typing import Any

from pydantic import Field

from rubric_data.errors import UserError
from rubric_data.formats.base import Answer, Example, Format, Placed, Row, make_rubric
from rubric_data.records import Number, Rubric, Verdict

_LISTS = ("results", "rubrics")  # where a document keeps its rows: scored responses, or rubrics alone
_INVENTED = "Unknown criterion"  # the text that code gives to an answer on a criterion the rubric does not have


class _Item(Row):
    criterion: str
    weight: Number = 1.0
    local_id: str = ""


class _Answer(Row):
    answer: str = ""
    weight: Number = 1.0
    criterion_text: str = ""
    found: bool = True


class _Scored(Row):
    response: str
    parsed_answers: dict[str, _Answer] = Field(default_factory=dict)


class _Row(Row):
    prompt: str
    id: str | int = ""
    rubrics: tuple[_Item, ...] = ()
    criteria: tuple[_Item, ...] = ()
    rubric: tuple[_Item, ...] | str = ()
    scored_responses: tuple[_Scored, ...] = ()


def unfold(document: dict[str, Any], where: str) -> list[Placed]:
    """The rows of a document of scored responses ("results") or of rubrics ("rubrics"), each with its place."""
    name = next((name for name in _LISTS if isinstance(document.get(name), list)), None)
    if name is None:
        raise UserError(f"{where}: has no list {' or '.join(map(repr, _LISTS))}; give a list of rows")
    return [(f"{where}: {name}: row {number}", row) for number, row in enumerate(document[name], start=1)]


def read(row: _Row, where: str) -> Example:
    """The prompt, its rubric, and each scored response with the verifier's verdicts."""
    listed = row.rubrics or row.criteria or (() if isinstance(row.rubric, str) else row.rubric)
    criteria: dict[str, dict[str, Any]] = {}
    for place, item in enumerate(listed, start=1):
        criteria[item.local_id or f"c{place}"] = {"text": item.criterion, "weight": item.weight}
    invented = 0
    for scored in row.scored_responses:
        for name, answer in scored.parsed_answers.items():
            if answer.criterion_text == _INVENTED:
                invented += 1
            elif not listed and answer.criterion_text:
                criteria.setdefault(name, {"text": answer.criterion_text, "weight": answer.weight})
    rubric, left_out = make_rubric(({"id": name, **fields} for name, fields in criteria.items()), where)
    answers = tuple(
        Answer(scored.response, str(place), verdicts=_verdicts(rubric, scored) if rubric else ())
        for place, scored in enumerate(row.scored_responses, start=1)
    )
    left_out += ("verdict on a criterion the rubric does not have",) * invented
    return Example(row.prompt, rubric, str(row.id), answers, left_out)


def _verdicts(rubric: Rubric, scored: _Scored) -> tuple[Verdict, ...]:
    return tuple(_verdict(criterion.id, scored.parsed_answers.get(criterion.id)) for criterion in rubric.criteria)


def _verdict(criterion_id: str, answer: _Answer | None) -> Verdict:
    value = {"yes": 1.0, "no": 0.0}.get(answer.answer.strip().lower()) if answer and answer.found else None
    reason = "parse_failure: the verifier's reply has no yes or no here" if value is None else None
    return Verdict(criterion_id=criterion_id, value=value, masked=reason, judge="unknown")


FORMAT = Format(_Row, read, source="JunkaiZ/Rubrics", licence="MIT", unfold=unfold)
