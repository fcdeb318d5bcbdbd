"""Which verdicts and responses belong to which slice of the judged data, from criterion to novelty.

Owns labels and membership alone. What is said of a slice is `rm.parts` in an audit, `rm.snr_slices` in a panel.
"""

from collections.abc import Sequence

import numpy as np

from rm import metrics
from rm.sides import Table
from rubric_data.records import JudgedResponse

UNTAGGED = "(no tag)"
LENGTH_BINS = 4


def labels(records: Sequence[JudgedResponse], table: Table) -> dict[str, list[tuple[str, ...]]]:
    """By kind of slice: the names of those that each unmasked verdict belongs to, N of them; one without is in none."""
    return {
        "criterion": [(criterion.text,) for criterion in table.criteria_N],
        "tag": [tuple(sorted(set(criterion.tags))) or (UNTAGGED,) for criterion in table.criteria_N],
        "level": [(f"{levels} levels",) if levels else () for levels in scale_levels(table).tolist()],
        "length": [(words,) for words in _lengths(records, table)],
        "generator": [(records[place].generator,) for place in table.response_N],
    }


def members(labelled: Sequence[tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The verdicts of each slice, as indices; slices by name."""
    found: dict[str, list[int]] = {}
    for place, names in enumerate(labelled):
        for name in names:
            found.setdefault(name, []).append(place)
    return {name: np.array(found[name]) for name in sorted(found)}


def length_quarters(records: Sequence[JudgedResponse], table: Table) -> tuple[np.ndarray, np.ndarray]:
    """The words of each record's response, and its quarter by them among those with a verdict, both (R,).

    Shortest first in 0..3, -1 without a verdict; equal lengths share a quarter.
    """
    words_R = np.array([len(record.response.split()) for record in records])
    judged = np.unique(table.response_N)
    quarter_R = np.full(len(records), -1)
    quarter_R[judged] = metrics.equal_mass_bins(words_R[judged], LENGTH_BINS)
    return words_R, quarter_R


def scale_levels(table: Table) -> np.ndarray:
    """How many ordered levels each verdict's criterion has, (N,); 0 for none, or a verdict halfway between two."""
    ordered_N = np.array([bool(criterion.levels) for criterion in table.criteria_N], bool)
    return np.where(ordered_N & metrics.is_answer(table.gold_N, table.levels_N), table.levels_N, 0)


def _lengths(records: Sequence[JudgedResponse], table: Table) -> list[str]:
    """The fewest and most words in the quarter of each verdict's response, N of them."""
    words_R, quarter_R = length_quarters(records, table)
    inside = {quarter: words_R[quarter_R == quarter] for quarter in np.unique(quarter_R).tolist()}
    names = {quarter: f"{words.min()} to {words.max()} words" for quarter, words in inside.items()}
    return [names[quarter] for quarter in quarter_R[table.response_N].tolist()]


def seen_in(
    train: Sequence[JudgedResponse], records: Sequence[JudgedResponse], table: Table
) -> tuple[np.ndarray, np.ndarray]:
    """Whether ``train`` has each record's generator, (R,) bool, and the text of each verdict's criterion, (N,) bool."""
    generators = {record.generator for record in train}
    texts = {criterion.text for record in train for criterion in record.rubric.criteria}
    seen_R = np.array([record.generator in generators for record in records])
    return seen_R, np.array([criterion.text in texts for criterion in table.criteria_N])
