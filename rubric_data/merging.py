"""Several judges' files of one set of responses as one file of soft targets (`rubric-rm data merge`).

Owns matching the files by content and the run folder; the arithmetic is `rubric_data.consensus` and
`rubric_data.agreement`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console

from rubric_data.agreement import agreement, agreement_table
from rubric_data.config import MergeConfig
from rubric_data.consensus import (
    LEAST_JUDGES,
    DawidSkene,
    Targets,
    merge_dawid_skene,
    merge_mean,
    merged_verdict,
)
from rubric_data.errors import UserError
from rubric_data.files import start_run, write_json
from rubric_data.io import read_judged, write_judged
from rubric_data.judges import reason_kind
from rubric_data.ledger import verdict_key
from rubric_data.records import Criterion, JudgedResponse, Verdict
from rubric_data.verifiers import VerifierJudge


@dataclass(frozen=True)
class _Judged:
    """What one judge made of the responses: its verdicts by `_question`, and where in the file each stands."""

    path: str
    judge: str
    verdicts: dict[str, Verdict]
    places: dict[str, str]


def run_merge(config: MergeConfig) -> dict[str, Any]:
    """Merge the files of ``config.data``; write judged.jsonl and report.json into ``config.output``.

    Responses, rubrics and splits are the first file's, and so are the verdicts that code gave, which no judge is asked
    for; a human verdict is the first that a file has. Prints how far
    the judges agree and returns the report. Raises UserError on bad input: fewer than two judges, or three for
    dawid-skene; files that are not about the same questions; two files of one judge, or two judges in one file.
    """
    _check(config)
    records = read_judged(config.data[0])
    panel = [_judged(path, records if index == 0 else read_judged(path)) for index, path in enumerate(config.data)]
    _check_panel(panel)
    criteria = {_question(record, criterion): criterion for record in records for criterion, _ in _asked(record)}
    folder = start_run(config.output, asdict(config))  # last of what bad input can stop

    given = [[judged.verdicts[question] for judged in panel] for question in criteria]
    answers_QJ = np.array([[np.nan if one.value is None else one.value for one in row] for row in given])
    counts_QJ = np.array([[one.count for one in row] for row in given])
    targets, models = _targets(config.method, answers_QJ, counts_QJ, list(criteria.values()))
    names = [judged.judge for judged in panel]
    name = f"{config.method}({', '.join(names)})"
    settled = {
        question: merged_verdict(value, count, row, judge=name, human=next(_humans(row), None))
        for question, row, value, count in zip(criteria, given, targets.values, targets.counts, strict=True)
    }
    merged = [_with_verdicts(record, settled) for record in records]
    between = agreement(
        answers_QJ[..., None],
        [criterion.text for criterion in criteria.values()],
        names,
        min_alpha=config.min_alpha,
        min_questions=config.min_questions,
    )
    report = {
        "method": config.method,
        "data": config.data,
        "responses": len(records),
        **_counts(settled),
        "judges": {one.judge: _judge_report(index, answers_QJ, models) for index, one in enumerate(panel)},
        "agreement": between,
    }
    write_judged(folder / "judged.jsonl", merged)
    write_json(folder / "report.json", report)
    Console().print(agreement_table(between))
    return report


def _check(config: MergeConfig) -> None:
    least = LEAST_JUDGES if config.method == "dawid-skene" else 2
    if len(config.data) < least:
        got = len(config.data)
        raise UserError(f"data: {config.method} needs {least} files or more, one a judge, got {got}; add others")
    if not -1 <= config.min_alpha <= 1:
        raise UserError(f"min_alpha: must lie in [-1, 1], got {config.min_alpha}; correct it")
    if config.min_questions < 1:
        raise UserError(f"min_questions: must be at least 1, got {config.min_questions}; raise it")


def _question(record: JudgedResponse, criterion: Criterion) -> str:
    """What is asked, whoever is asked it and under whichever ids."""
    return verdict_key(record.prompt, record.response, criterion, judge="", template="", vote=0)


def _judged(path: str, records: Sequence[JudgedResponse]) -> _Judged:
    names = sorted({one.judge for record in records for _, one in _asked(record) if one is not None and one.judge})
    if len(names) > 1:
        raise UserError(f"{path}: holds verdicts of {len(names)} judges ({', '.join(names)}); give one file a judge")
    if not any(verdict.value is not None for record in records for verdict in record.verdicts):
        raise UserError(f"{path}: holds no verdicts; run 'rubric-rm judge --data {path}' first")
    judge = names[0] if names else path
    verdicts: dict[str, Verdict] = {}
    places = {}
    for record in records:
        for criterion, given in _asked(record):
            question = _question(record, criterion)
            verdict = given or Verdict(criterion_id=criterion.id, masked=f"unjudged: no verdict by {judge}")
            if question not in verdicts or verdicts[question].value is None:  # two responses may have one text
                verdicts[question] = verdict
                places[question] = f"response {record.response_id!r}, criterion {criterion.id!r}"
    return _Judged(path, judge, verdicts, places)


def _check_panel(panel: Sequence[_Judged]) -> None:
    """Every judge once, and all asked the same."""
    first, *others = panel
    seen: dict[str, str] = {}
    for judged in panel:
        if judged.judge in seen:
            raise UserError(
                f"{judged.path}: is by {judged.judge}, as {seen[judged.judge]} is; give one file a judge, and ask a "
                "judge several times with rubric-rm judge --votes"
            )
        seen[judged.judge] = judged.path
    for other in others:
        for one, another in ((first, other), (other, first)):
            if missing := [question for question in one.verdicts if question not in another.verdicts]:
                raise UserError(
                    f"{another.path}: lacks {len(missing)} of the {len(one.verdicts)} questions of {one.path}, the "
                    f"first being {one.places[missing[0]]}; let every judge answer the same prompts, responses and "
                    "criteria"
                )


def _targets(
    method: str, answers_QJ: np.ndarray, counts_QJ: np.ndarray, criteria: Sequence[Criterion]
) -> tuple[Targets, dict[int, DawidSkene]]:
    if method == "mean":
        return merge_mean(answers_QJ, counts_QJ), {}
    return merge_dawid_skene(answers_QJ, counts_QJ, [max(2, len(criterion.levels)) for criterion in criteria])


def _humans(row: Sequence[Verdict]) -> Iterator[float]:
    return (verdict.human for verdict in row if verdict.human is not None)


def _asked(record: JudgedResponse) -> Iterator[tuple[Criterion, Verdict | None]]:
    """The criteria that a judge was to answer, not code (`rubric_data.programmatic`), each with its verdict."""
    by_id = {verdict.criterion_id: verdict for verdict in record.verdicts}
    for criterion in record.rubric.criteria:
        verdict = by_id.get(criterion.id)
        if criterion.verifier is None or verdict is None or verdict.judge != VerifierJudge.name:
            yield criterion, verdict


def _with_verdicts(record: JudgedResponse, settled: Mapping[str, Verdict]) -> JudgedResponse:
    own = {verdict.criterion_id: verdict for verdict in record.verdicts}
    fresh = {
        criterion.id: settled[_question(record, criterion)].model_copy(update={"criterion_id": criterion.id})
        for criterion, _ in _asked(record)
    }
    given = own | fresh
    verdicts = tuple(given[criterion.id] for criterion in record.rubric.criteria)
    return record.model_copy(update={"verdicts": verdicts})


def _counts(settled: Mapping[str, Verdict]) -> dict[str, Any]:
    known = [verdict for verdict in settled.values() if verdict.value is not None]
    kinds = Counter(reason_kind(verdict.masked) for verdict in settled.values() if verdict.masked is not None)
    return {
        "questions": len(settled),
        "masked": dict(sorted(kinds.items())),
        "mean_verdict": float(np.mean([verdict.value for verdict in known])),
        "mean_count": float(np.mean([verdict.count for verdict in known])),
    }


def _judge_report(index: int, answers_QJ: np.ndarray, models: Mapping[int, DawidSkene]) -> dict[str, Any]:
    """How often a judge answered, its mean; and of each number of classes, how often the model thinks it right."""
    answers_Q = answers_QJ[:, index]
    accuracy = {str(classes): float(model.accuracy[index]) for classes, model in models.items()}
    return {
        "answered": int((~np.isnan(answers_Q)).sum()),
        "mean": float(np.nanmean(answers_Q)),
        **({"accuracy": accuracy} if accuracy else {}),
    }
