"""What a policy's responses meet, criterion by criterion: mean P(met) under names that a log can hold."""

import math
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from rubric_data.records import Criterion, Rubric

Name = tuple[bool, str]  # whether it is a tag; the tag, or the text of a criterion that has none
Tally = dict[Name, tuple[float, int]]  # sum of the answers, and how many there are
Key = TypeVar("Key")

MOST_TEXTS = 20  # criteria without a tag that have a metric each; where there are more, all of them share one
PREFIX = "criteria/"
_LONGEST_NAME = 60  # characters of a criterion's text in the name of its metric


class CriterionMeans:
    """Means by tag of the criteria; of those without a tag by text, or all together where there are many texts.

    The names go by all texts that were ever met, so give those of a run at its start.
    """

    def __init__(self, rubrics: Iterable[Rubric] = ()) -> None:
        self._texts: set[str] = set()
        self.expect(rubrics)

    def expect(self, rubrics: Iterable[Rubric]) -> None:
        """Count the texts of ``rubrics`` among those that decide on the names."""
        self._texts.update(one.text for rubric in rubrics for one in rubric.criteria if not one.tags)

    def sums(self, tally: Tally) -> dict[str, tuple[float, int]]:
        """Sum and number of the answers by the metric's name, in the order of the names."""
        self._texts.update(text for is_tag, text in tally if not is_tag)
        named: dict[str, tuple[float, int]] = {}
        for (is_tag, text), (total, count) in tally.items():
            _count(named, _metric(text) if is_tag or len(self._texts) <= MOST_TEXTS else _OTHER, total, count)
        return dict(sorted(named.items()))

    def of(self, tally: Tally) -> dict[str, float]:
        """The mean answer by the metric's name."""
        return {name: total / count for name, (total, count) in self.sums(tally).items()}


def tallied(answered: Iterable[tuple[Rubric, np.ndarray]]) -> Tally:
    """The tally of responses, each a rubric and the answers to it, (K,); those that are NaN are left out."""
    tally: Tally = {}
    for rubric, probs_K in answered:
        for criterion, prob in zip(rubric.criteria, probs_K.tolist(), strict=True):
            for name in [] if math.isnan(prob) else _names(criterion):
                _count(tally, name, prob, 1)
    return tally


def merged(tallies: Iterable[Tally]) -> Tally:
    """The sum of several tallies."""
    found: Tally = {}
    for tally in tallies:
        for name, (total, count) in tally.items():
            _count(found, name, total, count)
    return found


_OTHER = f"{PREFIX}other"


def _metric(text: str) -> str:
    return f"{PREFIX}{text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + '…'}"


def _names(criterion: Criterion) -> list[Name]:
    return [(True, tag) for tag in dict.fromkeys(criterion.tags)] or [(False, criterion.text)]


def _count(sums: dict[Key, tuple[float, int]], key: Key, total: float, count: int) -> None:
    """Add to the sum and the number that ``sums`` has under ``key``."""
    before = sums.get(key, (0.0, 0))
    sums[key] = (before[0] + total, before[1] + count)
