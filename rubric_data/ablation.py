"""What a criterion does for its rubric: rewards and rankings with it and without it, over the same responses.

Owns leaving one criterion out; counting pairs is `rubric_data.pairs`. A criterion is left out of every rubric that
asks its question, and read on the responses whose rubric does.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from rubric_data.arrays import JudgedArrays
from rubric_data.config import AblateConfig
from rubric_data.files import json_number, start_run, write_json
from rubric_data.pairs import agreement, orders, same_prompt_pairs, top_gaps
from rubric_data.programmatic import load_verdicts
from rubric_data.tables import print_table, shown

_CONSTANT = 1e-9  # a spread below this is rounding
_SHOWN = 20  # rows of the table; the file has all

Change = dict[str, float | None]  # with, without, change


def centred_correlation(first_B: np.ndarray, second_B: np.ndarray, prompt_B: np.ndarray) -> float:
    """Pearson's correlation after each prompt's mean is taken off both sides; NaN where one of them is constant."""
    sides = []
    for value_B in (first_B, second_B):
        total_P, count_P = np.bincount(prompt_B, weights=value_B), np.bincount(prompt_B)
        sides.append(value_B - (total_P / np.maximum(count_P, 1))[prompt_B])
    a, b = sides
    if not len(a) or min(np.abs(a).max(), np.abs(b).max()) < _CONSTANT:
        return np.nan
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def leave_out(
    with_B: np.ndarray,
    without_B: np.ndarray,
    value_B: np.ndarray,
    prompt_B: np.ndarray,
    references: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What rewards lose or gain without one criterion, as JSON values; null where undefined.

    ``with`` and ``without`` rewards of B responses, no NaN; ``value`` the criterion's verdicts, 1 for what the rubric
    wants, NaN where masked; ``references`` people's rankings by name, NaN where unknown. docs/data.md names the keys.
    """
    pairs = same_prompt_pairs(prompt_B)
    gaps = top_gaps(with_B, prompt_B), top_gaps(without_B, prompt_B)
    known = ~np.isnan(value_B)
    moved = orders(with_B, pairs) != orders(without_B, pairs)
    against = {}
    for name, gold_B in references.items():
        counts = agreement(gold_B, with_B, pairs), agreement(gold_B, without_B, pairs)
        if not np.isnan(counts[0].accuracy):
            against[name] = {"pairs": counts[0].agree + counts[0].disagree + counts[0].ties} | _change(
                counts[0].accuracy, counts[1].accuracy
            )
    return {
        "reward_change": json_number(_mean(np.abs(without_B - with_B))),
        "reordered": json_number(_mean(moved)),
        "top_ties": _change(*(_mean(gap == 0) for gap in gaps)),
        "discrimination": _change(*map(_mean, gaps)),
        "pair_accuracy": against,
        "redundancy": json_number(centred_correlation(value_B[known], without_B[known], prompt_B[known])),
    }


def ablate(arrays: JudgedArrays, *, progress: bool = False) -> list[dict[str, Any]]:
    """A row for each question, over the responses whose rubric asks it; what is better without it, the worst first.

    Order: gain in pair accuracy against the first reference that knows pairs, then fewer ties at the top, then more
    discrimination between the two best. Where people order some pairs, questions they say nothing about follow the
    others; what changes none of the three comes last.
    """
    rewards_B, without_BK = arrays.rewards(arrays.value_BK), arrays.rewards_without()
    references = {"preference": arrays.preference_B, "human": arrays.rewards(arrays.human_BK)}
    rows = []
    asked = list(zip(arrays.questions, arrays.places(), strict=True))
    bar = Console(stderr=True)
    for question, (row, column) in track(asked, "leaving out", console=bar, transient=True, disable=not progress):
        lost = ~np.isnan(rewards_B[row]) & np.isnan(without_BK[row, column])
        kept = ~np.isnan(without_BK[row, column]) & ~np.isnan(rewards_B[row])
        row, column = row[kept], column[kept]
        value = arrays.value_BK[row, column]
        found = leave_out(
            rewards_B[row],
            without_BK[row, column],
            1 - value if question.pitfall else value,
            arrays.prompt_B[row],
            {name: gold_B[row] for name, gold_B in references.items()},
        )
        rows.append(
            {
                "text": question.text,
                "pitfall": question.pitfall,
                "responses": len(row),
                "prompts": len(np.unique(arrays.prompt_B[row])),
                "unrewarded_without": int(lost.sum()),
                "mean_verdict": json_number(_mean(value[~np.isnan(value)])),
            }
            | found
        )
    asked_people = any(row["pair_accuracy"] for row in rows)
    return sorted(rows, key=lambda row: _badness(row, asked_people))


def run_ablate(config: AblateConfig) -> dict[str, Any]:
    """Leave every criterion out in turn; write ablation.json and print the worst.

    Returns what ablation.json holds. Raises UserError on bad input.
    """
    arrays = JudgedArrays.of(load_verdicts(config.data))
    folder = start_run(config.output, asdict(config))
    rewards = arrays.rewards(arrays.value_BK)
    gaps, pairs = top_gaps(rewards, arrays.prompt_B), same_prompt_pairs(arrays.prompt_B)
    rows = ablate(arrays, progress=True)
    report = {
        "data": config.data,
        "responses": len(rewards),
        "unrewarded": int(np.isnan(rewards).sum()),
        "prompts": len(arrays.prompts),
        "criteria": len(rows),
        "top_ties": json_number(_mean(gaps == 0)),
        "discrimination": json_number(_mean(gaps)),
        "pair_accuracy": {
            name: json_number(agreement(gold, rewards, pairs).accuracy)
            for name, gold in (("preference", arrays.preference_B), ("human", arrays.rewards(arrays.human_BK)))
        },
        "by_criterion": rows,
    }
    write_json(folder / "ablation.json", report)
    _print(report, str(folder / "ablation.json"))
    return report


def _badness(row: Mapping[str, Any], asked_people: bool) -> tuple:
    gains = [one["change"] for one in row["pair_accuracy"].values()]
    ties, discrimination = (row[name]["change"] or 0.0 for name in ("top_ties", "discrimination"))
    worse = (-gains[0] if gains else 0.0, ties, -discrimination)
    return (not any(worse), asked_people and not gains, *worse, row["text"])


def _change(before: float, after: float) -> Change:
    return {"with": json_number(before), "without": json_number(after), "change": json_number(after - before)}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _print(report: Mapping[str, Any], path: str) -> None:
    known = {name: value for name, value in report["pair_accuracy"].items() if value is not None}

    def cells(row: Mapping[str, Any]) -> list[str]:
        gains = [shown(one["change"], signed=True) for one in row["pair_accuracy"].values()] or [shown(None)]
        return [
            row["text"],
            str(row["prompts"]),
            *(gains[:1] if known else []),
            shown(row["top_ties"]["change"], signed=True),
            shown(row["discrimination"]["change"], signed=True),
            shown(row["redundancy"], signed=True),
        ]

    rows = report["by_criterion"][:_SHOWN]
    accuracy = "".join(f"pair accuracy against {name} {shown(value)}, " for name, value in known.items())
    print_table(
        f"What changes without a criterion, on the prompts that ask it: {len(rows)} of {report['criteria']} criteria",
        ("criterion", "prompts", *(["accuracy"] if known else []), "top ties", "top gap", "redundancy"),
        [cells(row) for row in rows],
        f"in the order of {'accuracy gained, then of ' if known else ''}ties lost, then of gap gained; what changes "
        "nothing comes last\n"
        f"with all criteria, on all {report['prompts']} prompts: {accuracy}top ties {shown(report['top_ties'])}, "
        f"top gap {shown(report['discrimination'])}\n"
        f"report: {path}",
    )
