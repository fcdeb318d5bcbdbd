"""Do criteria, and whole rubrics, order responses as people do? And rubrics without the criteria that do not.

Owns the comparison with preferences; counting pairs is `rubric_data.pairs`. A preference is comparable among the
responses to one prompt only, so nothing is compared across prompts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from rubric_data.arrays import JudgedArrays, Question, questions_of
from rubric_data.config import ConsistencyConfig
from rubric_data.errors import UserError
from rubric_data.files import json_number, start_run, write_json
from rubric_data.io import write_judged
from rubric_data.pairs import Agreement, agreement, orders, same_prompt_pairs
from rubric_data.programmatic import load_verdicts
from rubric_data.records import JudgedResponse, Rubric
from rubric_data.tables import print_table, shown

_SHOWN = 20  # rows of the table; the file has all


@dataclass(frozen=True)
class Finding:
    """How one question's verdicts order the pairs of responses that people tell apart.

    ``p_value``: the chance of so few agreeing pairs, or fewer, if verdicts said nothing of what people prefer.
    """

    question: Question
    responses: int  # with a preference and a verdict
    counts: Agreement
    p_value: float
    contradicts: bool


def find(arrays: JudgedArrays, *, significance: float, min_agreement: float, min_pairs: int) -> list[Finding]:
    """Every question with its agreement, the worst first.

    A pitfall's verdicts are turned round, as its being met should go with being preferred less. A question
    contradicts people if its ``p_value`` lies below ``significance``, or if it has ``min_pairs`` decided pairs or
    more and agrees on less than ``min_agreement`` of them. The test is one-sided and binomial and takes pairs for
    independent, which pairs that share a response are not quite: it errs towards reporting.
    """
    counted = []
    for question, (row, column) in zip(arrays.questions, arrays.places(), strict=True):
        value, preference = arrays.value_BK[row, column], arrays.preference_B[row]
        known = ~np.isnan(value) & ~np.isnan(preference)
        value, preference, prompt = value[known], preference[known], arrays.prompt_B[row][known]
        counts = agreement(preference, -value if question.pitfall else value, same_prompt_pairs(prompt))
        counted.append((question, int(known.sum()), counts))
    agree = np.array([counts.agree for *_, counts in counted])
    decided = agree + [counts.disagree for *_, counts in counted]
    p_values = stats.binom.cdf(agree, decided, 0.5)  # 1 where there are no pairs
    found = []
    for (question, responses, counts), pairs, p_value in zip(counted, decided, p_values.tolist(), strict=True):
        contradicts = p_value < significance or (pairs >= min_pairs and counts.share < min_agreement)
        found.append(Finding(question, responses, counts, p_value, bool(contradicts)))
    return sorted(found, key=lambda one: (one.p_value, one.question.text))


def without(rubric: Rubric, unwanted: Mapping[Question, float]) -> Rubric:
    """``rubric`` without the criteria that ask ``unwanted`` questions, which come with their agreement.

    A rubric keeps at least one criterion of positive weight: the one that agrees best, if all were unwanted.
    """
    asked = dict(zip((criterion.id for criterion in rubric.criteria), questions_of(rubric), strict=True))
    dropped = {name for name, question in asked.items() if question in unwanted}
    positive = [criterion.id for criterion in rubric.criteria if criterion.weight > 0]
    if dropped.issuperset(positive):
        dropped.remove(max(positive, key=lambda name: unwanted[asked[name]]))
    if not dropped:
        return rubric
    return Rubric(criteria=tuple(criterion for criterion in rubric.criteria if criterion.id not in dropped))


def remove(records: Sequence[JudgedResponse], unwanted: Mapping[Question, float]) -> list[JudgedResponse]:
    """``records`` with every rubric as `without` leaves it, and no verdict on what is gone."""
    rubrics: dict[str, Rubric] = {}
    left = []
    for record in records:
        if record.rubric.id not in rubrics:
            rubrics[record.rubric.id] = without(record.rubric, unwanted)
        rubric = rubrics[record.rubric.id]
        names = {criterion.id for criterion in rubric.criteria}
        verdicts = tuple(verdict for verdict in record.verdicts if verdict.criterion_id in names)
        left.append(record.model_copy(update={"rubric": rubric, "verdicts": verdicts}))
    return left


def contradicted_prompts(arrays: JudgedArrays) -> list[dict[str, Any]]:
    """Prompts whose rewards order more pairs against people than with them, the worst first."""
    pairs = same_prompt_pairs(arrays.prompt_B)
    product = orders(arrays.preference_B, pairs) * orders(arrays.rewards(arrays.value_BK), pairs)
    prompt = arrays.prompt_B[pairs.first_M]
    agree, disagree = (np.bincount(prompt[side], minlength=len(arrays.prompts)) for side in (product > 0, product < 0))
    worst = sorted(np.flatnonzero(disagree > agree), key=lambda place: (agree[place] - disagree[place], place))
    return [
        {"prompt_id": arrays.prompts[place], "agree": int(agree[place]), "disagree": int(disagree[place])}
        for place in worst
    ]


def compared_prompts(arrays: JudgedArrays) -> int:
    """How many prompts have two responses with rewards that people tell apart: only these can be contradicted."""
    pairs = same_prompt_pairs(arrays.prompt_B)
    known = ~np.isnan(orders(arrays.rewards(arrays.value_BK), pairs))
    gold = orders(arrays.preference_B, pairs)
    return len(np.unique(arrays.prompt_B[pairs.first_M[known & (np.abs(gold) > 0)]]))


def run_consistency(config: ConsistencyConfig) -> dict[str, Any]:
    """Compare criteria and rubrics with preferences; write consistency.json and, if asked to, mended responses.

    Returns what consistency.json holds, and prints the criteria that contradict people. Raises UserError on bad
    input, and if no two responses to a prompt have different preferences.
    """
    _check(config)
    records = load_verdicts(config.data)
    arrays = JudgedArrays.of(records)
    before = _rubric_agreement(arrays)
    if not before.agree + before.disagree + before.ties:
        raise UserError(
            f"{config.data}: no two judged responses to one prompt have different preferences; "
            "set the records' 'preference'"
        )
    folder = start_run(config.output, asdict(config))
    findings = find(
        arrays,
        significance=config.significance,
        min_agreement=config.min_agreement,
        min_pairs=config.min_pairs,
    )
    unwanted = {one.question: one.counts.share for one in findings if one.contradicts}
    left = remove(records, unwanted)
    after = JudgedArrays.of(left)
    contradicted, compared = contradicted_prompts(arrays), compared_prompts(arrays)
    report = {
        "data": config.data,
        "responses": len(records),
        "with_preference": int((~np.isnan(arrays.preference_B)).sum()),
        "prompts": len(arrays.prompts),
        "compared_prompts": compared,
        "without_preferences": len(arrays.prompts) - compared,
        "criteria": {
            "different": len(findings),
            "without_pairs": sum(not one.counts.agree + one.counts.disagree for one in findings),
            "contradicting": len(unwanted),
            "kept_as_last_positive": _spared(left, unwanted),
        },
        "rubrics": {
            "before": _counts(before),
            "without_contradicting": _counts(_rubric_agreement(after)),
            "contradicted_prompts": len(contradicted),
            "contradicted_prompts_without": len(contradicted_prompts(after)),
        },
        "removed": config.remove,
        "by_criterion": [_row(one) for one in findings],
        "by_prompt": contradicted,
    }
    if config.remove:
        write_judged(folder / "judged.jsonl", left)
    write_json(folder / "consistency.json", report)
    _print(report, str(folder / "consistency.json"))
    return report


def _check(config: ConsistencyConfig) -> None:
    for name in ("significance", "min_agreement"):
        if not 0 <= getattr(config, name) <= 0.5:
            raise UserError(f"{name}: must lie in [0, 0.5], got {getattr(config, name)}; correct it")
    if config.min_pairs < 1:
        raise UserError(f"min_pairs: must be at least 1, got {config.min_pairs}; raise it")


def _rubric_agreement(arrays: JudgedArrays) -> Agreement:
    rewards = arrays.rewards(arrays.value_BK)
    return agreement(arrays.preference_B, rewards, same_prompt_pairs(arrays.prompt_B))


def _spared(records: Sequence[JudgedResponse], unwanted: Collection[Question]) -> int:
    """In how many rubrics an unwanted criterion stays, as nothing positive would be left."""
    rubrics = {record.rubric.id: record.rubric for record in records}
    return sum(any(question in unwanted for question in questions_of(rubric)) for rubric in rubrics.values())


def _counts(counts: Agreement) -> dict[str, float | None]:
    """The counts with the accuracy: ties count half."""
    return asdict(counts) | {"accuracy": json_number(counts.accuracy)}


def _row(finding: Finding) -> dict[str, Any]:
    return {
        "text": finding.question.text,
        "pitfall": finding.question.pitfall,
        "responses": finding.responses,
        **asdict(finding.counts),
        "agreement": json_number(finding.counts.share),
        "p_value": json_number(finding.p_value),
        "contradicts": finding.contradicts,
    }


def _print(report: Mapping[str, Any], path: str) -> None:
    criteria, rubrics = report["criteria"], report["rubrics"]
    rows = [row for row in report["by_criterion"] if row["contradicts"]]
    print_table(
        f"{criteria['contradicting']} of {criteria['different']} criteria contradict people's preferences",
        ("criterion", "agree", "disagree", "agreement", "p"),
        [
            (row["text"], str(row["agree"]), str(row["disagree"]), shown(row["agreement"]), shown(row["p_value"]))
            for row in rows[:_SHOWN]
        ],
        f"rewards order people's pairs right: {shown(rubrics['before']['accuracy'])}, without these criteria "
        f"{shown(rubrics['without_contradicting']['accuracy'])}\n"
        f"rubrics contradict people on {rubrics['contradicted_prompts']} of {report['compared_prompts']} prompts; "
        f"{report['without_preferences']} more have no two judged responses of different preference\n"
        f"report: {path}",
    )
