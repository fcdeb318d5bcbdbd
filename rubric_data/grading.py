"""Criteria that were judged on a scale their file does not name, given it as levels (`rubric-rm data levels`).

What levels mean is `rubric_data.records`; what a model makes of them, `rm.levels`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rubric_data.config import DataLevelsConfig
from rubric_data.errors import UserError
from rubric_data.files import refuse_existing
from rubric_data.io import read_judged, write_judged
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric

_MOST = 11  # levels that are looked for: 0 to 10
_ROUNDING = 1e-3  # of values: .33 counts as a third of three decimals


def find_levels(value_N: Sequence[float]) -> int | None:
    """The fewest levels, three to eleven, evenly spread over [0, 1] that all values lie on; None if there are none.

    None, too, without a value between 0 and 1: yes and no need no levels.
    """
    values = np.array(value_N, float)
    if not ((values > 0) & (values < 1)).any():
        return None
    return next((count for count in range(3, _MOST + 1) if (_off(values, count) <= _ROUNDING).all()), None)


def _off(value_N: np.ndarray, levels: int) -> np.ndarray:
    return np.abs(np.round(value_N * (levels - 1)) / (levels - 1) - value_N)


def give_levels(
    records: Sequence[JudgedResponse], labels: Sequence[str]
) -> tuple[list[JudgedResponse], dict[str, int]]:
    """The records with levels of those ``labels``, worst first, on every criterion with a verdict between 0 and 1.

    Criteria are the same if their text is. Those that have levels, or a verifier, stay as they are. Also returns how
    many different criteria got levels, how many verdicts they have, and how many of these lie between two levels.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        for criterion, value in zip(record.rubric.criteria, record.values(), strict=True):
            if not criterion.levels and criterion.verifier is None and not math.isnan(value):
                values.setdefault(criterion.text, []).append(value)
    graded = {text: np.array(own) for text, own in values.items() if any(0 < value < 1 for value in own)}
    levels = tuple(Level(label=label) for label in labels)
    rubrics: dict[str, Rubric] = {}

    def with_levels(criterion: Criterion) -> Criterion:
        bare = not criterion.levels and criterion.verifier is None
        return criterion.model_copy(update={"levels": levels}) if bare and criterion.text in graded else criterion

    found = []
    for record in records:
        if record.rubric.id not in rubrics:
            rubrics[record.rubric.id] = Rubric(criteria=tuple(map(with_levels, record.rubric.criteria)))
        found.append(record.model_copy(update={"rubric": rubrics[record.rubric.id]}))
    return found, {
        "criteria": len(graded),
        "verdicts": sum(map(len, graded.values())),
        "between_levels": sum(int((_off(own, len(labels)) > _ROUNDING).sum()) for own in graded.values()),
    }


def run_levels(config: DataLevelsConfig) -> dict[str, Any]:
    """Write ``config.data`` with levels to ``config.output``; returns the scale and what `give_levels` counts.

    Raises UserError on bad input, if the output exists, if nothing was judged between 0 and 1, or on no even scale.
    """
    output = Path(config.output)
    refuse_existing(output, config.overwrite)
    records = read_judged(config.data)
    labels = config.labels
    if labels is None:
        judged = [value for record in records for value in record.values() if not math.isnan(value)]
        count = find_levels(judged)
        if count is None:
            raise UserError(
                f"{config.data}: verdicts lie on no scale of 3 to {_MOST} even levels with one between 0 and 1; "
                "name the levels with --labels"
            )
        labels = [f"{level / (count - 1):.2g}" for level in range(count)]
    if len(labels) < 3:
        raise UserError(f"labels: needs three levels or more, got {len(labels)}; yes and no need none")
    graded, counts = give_levels(records, labels)
    if not counts["criteria"]:
        raise UserError(
            f"{config.data}: no criterion without levels has a verdict between 0 and 1; use the file as it is"
        )
    write_judged(output, graded)
    return {"levels": "; ".join(labels), **counts}
