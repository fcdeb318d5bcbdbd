"""The dataset files of the autorubric package (PyPI, arXiv:2603.00077): one document with a list of items.

An item may bring a prompt and a rubric of its own, so one document holds any data; each needs a response. Criteria
with options become criteria with levels where the options' values are even steps from 0 to 1, as ours are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from rubric_data.errors import UserError
from rubric_data.formats.base import (
    REFERENCE,
    Answer,
    Example,
    Format,
    Group,
    Placed,
    Row,
    Written,
    level_names,
    losses,
    make_rubric,
    number,
    parse,
    reference_and_others,
    unique_ids,
    with_rubric,
)
from rubric_data.records import Criterion, JudgedResponse, Number, Rubric, Verdict

_JUDGE = "ground-truth"  # of verdicts that a file gives as its truth
_ROUNDED = 0.01  # how far from an even step an option's value may lie: files write .33 and .67
_ABSTAINED: dict[str, Any] = {"label": "Cannot assess", "value": 0.0, "na": True}
_SHARED = ("prompt", "rubric", "reference_submission")  # what an item takes from its document if it has none


class _Option(Row):
    label: str
    value: Number
    na: bool = False


class _Item(Row):
    requirement: str
    name: str = ""
    weight: Number = 10.0
    options: list[_Option] | None = None


class _Row(Row):
    prompt: str = ""
    rubric: list[dict[str, Any]] | dict[str, Any] = Field(default_factory=list)
    submission: str = ""
    description: str = ""
    ground_truth: list[str] | None = None
    reference_submission: str = ""


def unfold(document: dict[str, Any], where: str) -> list[Placed]:
    """A row for each item of a document, completed by what the document says for all; a row for one without items."""
    if "rubric" not in document:
        raise UserError(f"{where}: field rubric: is missing; give a file that autorubric's RubricDataset wrote")
    shared = {name: document[name] for name in _SHARED if document.get(name) is not None}
    items = document.get("items") or [{}]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: field items: must be a list of objects; correct it")
    rows = [{**shared, **{key: value for key, value in item.items() if value is not None}} for item in items]
    if not any(row.get("prompt") for row in rows):
        raise UserError(f"{where}: no item has a prompt; add 'prompt' to the document or to its items")
    return [(f"{where}: item {place}", row) for place, row in enumerate(rows, start=1)]


def read(row: _Row, where: str) -> Example:
    """The prompt, its rubric, the submission with its ground truth as verdicts, and the reference submission."""
    items = [parse(_Item, fields, where) for fields in _criteria(row.rubric, where)]
    if row.ground_truth is not None and len(row.ground_truth) != len(items):
        raise UserError(
            f"{where}: field ground_truth: has {len(row.ground_truth)} values for {len(items)} criteria; give one each"
        )
    usable = [place for place, item in enumerate(items) if item.options is None or _levels(item.options)]
    names = unique_ids([items[place].name for place in usable])
    named = dict(zip(names, usable, strict=True))
    rubric, left_out = make_rubric([{"id": name, **_criterion(items[place])} for name, place in named.items()], where)
    if isinstance(row.rubric, dict) and row.rubric.get("guidelines"):
        left_out += ("guidelines of a rubric",)
    left_out += ("criterion whose options are no even steps",) * (len(items) - len(usable))
    truth = {name: row.ground_truth[place] for name, place in named.items()} if row.ground_truth else {}
    answers = []
    if row.submission:
        verdicts = _verdicts(rubric, truth) if rubric and truth else ()
        answers.append(Answer(row.submission, "submission", row.description or "unknown", verdicts=verdicts))
    if row.reference_submission:
        answers.append(Answer(row.reference_submission, REFERENCE, generator=REFERENCE))
    return Example(row.prompt, rubric, answers=tuple(answers), left_out=left_out)


def _criteria(rubric: Any, where: str) -> list[dict[str, Any]]:
    """The criteria of a rubric written as a list, in sections, or below "rubric", "sections" or "criteria"."""
    if isinstance(rubric, Mapping):
        inner = next((rubric[name] for name in ("rubric", "sections", "criteria") if name in rubric), None)
        if inner is None:
            raise UserError(f"{where}: field rubric: has none of 'rubric', 'sections', 'criteria'; add one")
        return _criteria(inner, where)
    if not isinstance(rubric, list) or not all(isinstance(item, Mapping) for item in rubric):
        raise UserError(f"{where}: field rubric: must be a list of criteria; correct it")
    return [
        criterion
        for item in rubric
        for criterion in (_criteria(item["criteria"], where) if "criteria" in item else [dict(item)])
    ]


def _criterion(item: _Item) -> dict[str, Any]:
    levels = tuple({"label": label} for label in _levels(item.options)) if item.options is not None else ()
    return {"text": item.requirement, "weight": item.weight, "levels": levels}


def _levels(options: Sequence[_Option]) -> list[str]:
    """The labels of ``options`` from worst to best; none if their values are no even steps from 0 to 1."""
    ordered = sorted((option for option in options if not option.na), key=lambda option: option.value)
    last = len(ordered) - 1
    even = last > 0 and all(abs(option.value - place / last) <= _ROUNDED for place, option in enumerate(ordered))
    return [option.label for option in ordered] if even else []


def _verdicts(rubric: Rubric, truth: Mapping[str, str]) -> tuple[Verdict, ...]:
    verdicts = []
    for criterion in rubric.criteria:
        value = _value(criterion, truth[criterion.id].strip().lower())
        reason = f"abstained: {truth[criterion.id]}" if value is None else None
        verdicts.append(Verdict(criterion_id=criterion.id, value=value, masked=reason, judge=_JUDGE))
    return tuple(verdicts)


def _value(criterion: Criterion, answer: str) -> float | None:
    if not criterion.levels:
        return {"met": 1.0, "unmet": 0.0}.get(answer)
    labels = [level.label.strip().lower() for level in criterion.levels]
    return labels.index(answer) / (len(labels) - 1) if answer in labels else None


def write(groups: Sequence[Group]) -> Written:
    """One document; an item a response, with the prompt, the rubric and its verdicts, soft ones rounded."""
    having, left_out = with_rubric(groups)
    items = []
    for group, rubric in having:
        reference, others = reference_and_others(group.responses)
        left_out["prompts without a response"] += not others
        for response in others:
            item = {
                "submission": response.response,
                "description": response.generator,
                "ground_truth": [_truth(*pair) for pair in zip(rubric.criteria, response.values(), strict=True)]
                if response.verdicts
                else None,
                "rubric": [_to_item(criterion) for criterion in rubric.criteria],
                "prompt": group.prompt.prompt,
            }
            items.append(item | ({"reference_submission": reference} if reference else {}))
            left_out["verdicts rounded"] += _rounded(response)
    left_out += losses(groups, "levels", "verdicts")
    return Written({"name": "rubric-rm", "rubric": None, "items": items}, left_out)


def _to_item(criterion: Criterion) -> dict[str, Any]:
    item: dict[str, Any] = {
        "name": criterion.id,
        "weight": number(criterion.weight),
        "requirement": criterion.text,
    }
    if criterion.levels:
        last = len(criterion.levels) - 1
        options = [
            {"label": label, "value": place / last, "na": False} for place, label in enumerate(level_names(criterion))
        ]
        item |= {"scale_type": "ordinal", "options": [*options, _ABSTAINED]}
    return item


def _truth(criterion: Criterion, value: float) -> str:
    """A verdict in autorubric's words; ``value`` is NaN where masked."""
    if value != value:
        return _ABSTAINED["label"] if criterion.levels else "CANNOT_ASSESS"
    if criterion.levels:
        return level_names(criterion)[round(value * (len(criterion.levels) - 1))]
    return "MET" if value >= 0.5 else "UNMET"


def _rounded(response: JudgedResponse) -> int:
    """How many verdicts of a response are no exact answer."""
    pairs = zip(response.rubric.criteria, response.values(), strict=True)
    steps = (value * max(1, len(criterion.levels) - 1) for criterion, value in pairs if value == value)
    return sum(abs(step - round(step)) > 1e-9 for step in steps)


FORMAT = Format(_Row, read, unfold=unfold, write=write)
