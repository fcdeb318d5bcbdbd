"""Rubrics for responses that have none, or others: those of a file of prompts (`rubric-rm rubric attach`).

Owns which rubric a response gets. Where the rubrics come from is `rubric_data.generate` and `rubric_data.refine`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rubric_data.config import AttachConfig
from rubric_data.errors import UserError
from rubric_data.files import refuse_existing
from rubric_data.io import load_data, load_prompts, load_responses, prompts_of, write_judged
from rubric_data.records import JudgedResponse, PromptRecord, Response, Rubric


@dataclass(frozen=True)
class Attached:
    """Responses with rubrics, and their prompts: ``prompts`` in order, ``without`` those among them without a rubric.

    ``own``: how many prompts keep the rubric their responses came with. ``left_out``: how many responses have none.
    """

    prompts: list[PromptRecord]
    records: list[JudgedResponse]
    own: int
    without: int
    left_out: int


def with_rubrics(records: Iterable[Response], rubrics: Mapping[str, Rubric]) -> list[JudgedResponse]:
    """``records`` under the rubric that ``rubrics`` has for their prompt, or else their own; without one, left out.

    Verdicts on another rubric are dropped.
    """
    found = []
    for record in records:
        rubric = rubrics.get(record.prompt_id, record.rubric)
        same = rubric is not None and record.rubric is not None and rubric.id == record.rubric.id
        if same and isinstance(record, JudgedResponse):
            found.append(record)
        elif rubric is not None:
            change = {"rubric": rubric, "verdicts": record.verdicts if same else ()}
            found.append(JudgedResponse(**dict(record) | change))
    return found


def attach_rubrics(data: str, rubrics: str | None, *, limit: int | None = None) -> Attached:
    """The responses of ``data`` to its first ``limit`` prompts, under the rubrics of the file ``rubrics``.

    Prompts are matched by their id; None means that all responses have rubrics. Raises UserError on bad files, if a
    prompt has different texts in them, and if ``rubrics`` has a rubric for none of the prompts.
    """
    responses = load_data(data) if rubrics is None else load_responses(data)
    prompts = prompts_of(data, responses)[:limit]
    wanted = {record.prompt_id: record for record in prompts}
    given = {} if rubrics is None else _given(rubrics, data, wanted)
    chosen = [record for record in responses if record.prompt_id in wanted]
    records = with_rubrics(chosen, given)
    prompts = [record.model_copy(update={"rubric": given.get(record.prompt_id, record.rubric)}) for record in prompts]
    without = sum(record.rubric is None for record in prompts)
    return Attached(prompts, records, len(prompts) - len(given) - without, without, len(chosen) - len(records))


def _given(rubrics: str, data: str, wanted: Mapping[str, PromptRecord]) -> dict[str, Rubric]:
    given: dict[str, Rubric] = {}
    for record in load_prompts(rubrics):
        if record.prompt_id not in wanted or record.rubric is None:
            continue
        if record.prompt != wanted[record.prompt_id].prompt:
            raise UserError(f"{rubrics}: prompt {record.prompt_id!r} has another text in {data}; rename one")
        given[record.prompt_id] = record.rubric
    if not given:
        raise UserError(f"{rubrics}: has no rubric for any prompt of {data}; give another file")
    return given


def run_attach(config: AttachConfig) -> dict[str, Any]:
    """Write the responses of ``config.data`` under the rubrics of ``config.rubrics``; returns counts.

    Raises UserError on bad input, or if the output exists.
    """
    output = Path(config.output)
    refuse_existing(output, config.overwrite)
    attached = attach_rubrics(config.data, config.rubrics)
    write_judged(output, attached.records)
    given = len(attached.prompts) - attached.own - attached.without
    return {
        "prompts": {"given": given, "own_rubric": attached.own, "without_rubric": attached.without},
        "responses": len(attached.records),
        "verdicts": sum(len(record.verdicts) for record in attached.records),
        "left_out": {"responses without a rubric": attached.left_out} if attached.left_out else {},
    }
