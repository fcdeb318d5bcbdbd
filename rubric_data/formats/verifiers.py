"""The criteria of the verifiers package (PyPI, Prime Intellect), one prompt a row.

A criterion is what its v1 rubric judge reads: name, text, weight (not negative), choices from worst to best. A row
is what its environments read: ``prompt`` messages, ``answer``, ``info``. That a row's criteria stand in
``info["criteria"]`` is our own agreement; the package keeps them in a file beside the data.

A negative weight turns the choices round: "yes" becomes the worst answer. The ranking of responses stays, up to
clipping; the numbers do not.
"""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from rubric_data.errors import UserError
from rubric_data.formats.base import (
    REFERENCE,
    Answer,
    Example,
    Format,
    Group,
    Row,
    Told,
    Written,
    level_names,
    losses,
    make_rubric,
    number,
    parse,
    prompt_messages,
    reference_and_others,
    transcript,
    with_rubric,
)
from rubric_data.io import check_characters
from rubric_data.records import Criterion, Number

_YES = ["no", "yes"]  # the package's default choices
_PITFALL = ["yes", "no"]


class _Item(Row):
    text: str
    name: str = ""
    weight: Number = 1.0
    choices: list[str] = _YES

    @model_validator(mode="after")
    def _check(self) -> "_Item":
        if len(self.choices) < 2:
            raise ValueError(f"choices need at least two answers, got {self.choices}")
        return self


class _Info(Row):
    criteria: tuple[_Item, ...] = ()
    prompt_id: str = ""


class _Row(Row):
    prompt: Told = ""
    question: str = ""
    answer: str = ""
    info: str | dict[str, Any] = Field(default_factory=dict)


def read(row: _Row, where: str) -> Example:
    """The prompt, the rubric in ``info``, and the answer as a reference."""
    info = parse(_Info, _info(row.info, where), f"{where}: info")
    rubric, left_out = make_rubric((_criterion(item) for item in info.criteria), where)
    prompt = row.prompt if isinstance(row.prompt, str) else transcript(row.prompt)
    answers = (Answer(row.answer, REFERENCE, generator=REFERENCE),) if row.answer.strip() else ()
    return Example(prompt or row.question, rubric, info.prompt_id, answers, left_out)


def _info(info: str | dict[str, Any], where: str) -> dict[str, Any]:
    """``info`` as an object; the package takes JSON text as well."""
    if isinstance(info, dict):
        return info
    try:
        fields = json.loads(info)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: field info: must be an object, or one as JSON text; correct it")
    check_characters(fields, f"{where}: field info")
    return fields


def _criterion(item: _Item) -> dict[str, Any]:
    binary = item.choices in (_YES, _PITFALL)
    return {
        "id": item.name,
        "text": item.text,
        "weight": -item.weight if item.choices == _PITFALL else item.weight,
        "levels": () if binary else tuple({"label": choice} for choice in item.choices),
    }


def write(groups: Sequence[Group]) -> Written:
    """One row a prompt, its info as JSON text; a reference answer is the row's answer."""
    having, left_out = with_rubric(groups)
    rows = []
    for group, rubric in having:
        reference, others = reference_and_others(group.responses)
        left_out["responses"] += len(others)
        info = {"prompt_id": group.prompt.prompt_id, "criteria": [_to_item(item) for item in rubric.criteria]}
        rows.append(
            {
                "prompt": prompt_messages(group.prompt.prompt),
                "answer": reference or "",
                "info": json.dumps(info, ensure_ascii=False),
            }
        )
    return Written(rows, left_out + losses(groups, "levels"))


def _to_item(criterion: Criterion) -> dict[str, Any]:
    choices = level_names(criterion) or list(_YES)
    return {
        "name": criterion.id,
        "text": criterion.text,
        "weight": number(abs(criterion.weight)),
        "choices": choices if criterion.weight > 0 else choices[::-1],
    }


FORMAT = Format(_Row, read, write=write)
