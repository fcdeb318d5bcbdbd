"""The judge in the reward model's place, criterion by criterion: where an answer is too wide and the budget has room.

Owns the asking, the budget and the record of what was asked; which answers are worth it is `rm.routing`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rm.routing import choose, values, widths
from rm.scorer import Asked, RubricScorer, Scored
from rubric_data.judges import Judge
from rubric_data.labelling import label
from rubric_data.ledger import Ledger, verdict_key
from rubric_data.records import Criterion, JudgedResponse, Rubric

_PAID = "SELECT (SELECT count(*) FROM verdicts) + (SELECT count(*) FROM attempts)"


class FallbackScorer:
    """Scores as ``scorer``, with the judge's verdicts in the place of some of the model's answers (`Scored.asked`).

    Of the answers that are as wide as ``width`` or wider (`rm.routing.widths`), the most valuable are the judge's:
    ``worth`` tells by how much the reward may move with each, from rubric, probabilities and widths.
    ``budget``: verdicts that it is asked for in all, those that fail included. It is spread evenly over the
    ``responses`` that will be scored in the run; what earlier ones left is for later ones. Without ``responses`` the
    first call may spend it all. A question that is asked of several responses at once, which are then the same text, is
    one. A verdict that the judge cannot give leaves the model's answer.
    """

    def __init__(
        self,
        scorer: RubricScorer,
        judge: Judge,
        *,
        width: float,
        budget: int,
        responses: int | None = None,
        worth: Callable[[Rubric, np.ndarray, np.ndarray], np.ndarray] = values,
    ) -> None:
        self._scorer, self._judge = scorer, judge
        self._width, self._budget, self._responses = width, budget, responses
        self._worth = worth
        self._ledger: Path | None = None
        self._seen = self._asked = self._paid = 0

    def check(self, rubrics: Iterable[Rubric]) -> None:
        """As `RubricScorer.check`."""
        self._scorer.check(rubrics)

    def go_on(self, ledger: Path, *, seen: int = 0, asked: int = 0) -> None:
        """Keep verdicts in this ``ledger`` and ask nothing that it answers.

        ``seen`` responses were scored and ``asked`` verdicts asked for before. Where the ledger holds more, the run was
        killed later: the same questions cost nothing again, and different ones no more than the budget has left.
        """
        self._ledger, self._seen, self._asked = ledger, seen, asked
        with Ledger(ledger) as opened:
            self._paid = next(opened.select(_PAID))[0]

    def score(self, prompts: Sequence[str], responses: Sequence[str], rubrics: Sequence[Rubric]) -> list[Scored]:
        """As `RubricScorer.score`. Raises UserError as the judge does, if nothing can be judged at all."""
        found = self._scorer.score(prompts, responses, rubrics)
        self._seen += len(found)
        questions = self._questions(prompts, responses, rubrics, found)
        with nullcontext() if self._ledger is None else Ledger(self._ledger) as ledger:
            told = self._ask(self._affordable(questions, ledger), prompts, responses, ledger)
        return [self._filled(row, one, rubrics[row], told) for row, one in enumerate(found)]

    def _questions(
        self, prompts: Sequence[str], responses: Sequence[str], rubrics: Sequence[Rubric], found: Sequence[Scored]
    ) -> "list[_Question]":
        """The different questions that are worth asking, the most valuable first."""
        by_key: dict[str, _Question] = {}
        for row, (rubric, scored) in enumerate(zip(rubrics, found, strict=True)):
            width_K = widths(scored)
            columns = (rubric.criteria, self._worth(rubric, scored.probs, width_K), width_K, scored.probs)
            for place, (criterion, value, width, prob) in enumerate(zip(*columns, strict=True)):
                if not value > 0:
                    continue
                key = self._key(prompts[row], responses[row], criterion)
                one = by_key.setdefault(key, _Question(key, criterion, width, prob))
                one.value += value  # of all that its answer settles
                one.places.append((row, place))
        questions = list(by_key.values())
        numbers = ([getattr(one, name) for one in questions] for name in ("value", "width", "prob"))
        order = choose(*map(np.array, numbers), budget=len(questions), least=self._width)
        return [questions[place] for place in order]

    def _affordable(self, questions: "Sequence[_Question]", ledger: Ledger | None) -> "list[_Question]":
        """Those that the budget has for the responses so far."""
        planned = self._budget
        if self._responses is not None:
            planned = self._budget * min(self._seen, self._responses) // self._responses
        chosen = questions[: max(planned - self._asked, 0)]
        known = ledger.get_many(one.key for one in chosen) if ledger else {}
        left = self._budget - self._paid
        affordable = []
        for one in chosen:
            if one.key in known or left > 0:
                affordable.append(one)
                left -= one.key not in known
        return affordable

    def _ask(
        self, chosen: "Sequence[_Question]", prompts: Sequence[str], responses: Sequence[str], ledger: Ledger | None
    ) -> "dict[_Place, _Told]":
        """What is known of each place that the chosen questions settle."""
        if not chosen:
            return {}
        by_row: dict[int, list[_Question]] = {}
        for one in chosen:
            by_row.setdefault(one.places[0][0], []).append(one)
        records = [
            _record(row, prompts[row], responses[row], [one.criterion for one in own]) for row, own in by_row.items()
        ]
        judged, report = label(records, self._judge, ledger=ledger)
        self._asked += len(chosen)
        self._paid += report.asked
        return {
            place: _Told(verdict.value, was_asked=place == one.places[0])
            for record, own in zip(judged, by_row.values(), strict=True)
            for verdict, one in zip(record.verdicts, own, strict=True)
            for place in one.places
        }

    def _filled(self, row: int, scored: Scored, rubric: Rubric, told: "dict[_Place, _Told]") -> Scored:
        """``scored``, which stands in ``row``, with what was told of it."""
        own = [told.get((row, place), _Told(None, was_asked=False)) for place in range(len(rubric.criteria))]
        value_K = np.array([math.nan if one.value is None else one.value for one in own])
        questions = sum(one.was_asked for one in own)
        judged_K = ~np.isnan(value_K)
        if not questions and not judged_K.any():
            return scored
        failed = sum(one.was_asked and one.value is None for one in own)
        return replace(
            self._scorer.corrected(rubric, scored, value_K), asked=Asked(judged_K, questions, failed, model=scored)
        )

    def _key(self, prompt: str, response: str, criterion: Criterion) -> str:
        return verdict_key(prompt, response, criterion, self._judge.name, self._judge.template, vote=0)


_Place = tuple[int, int]  # row and criterion


@dataclass
class _Question:
    """One question, what it is worth, and all places that its answer settles, the one that it is asked for first."""

    key: str
    criterion: Criterion
    width: float
    prob: float
    value: float = 0.0
    places: list[_Place] = field(default_factory=list)


@dataclass(frozen=True)
class _Told:
    """The judge's verdict at a place, None if it gave none, and whether it was asked for there."""

    value: float | None
    was_asked: bool


def _record(row: int, prompt: str, response: str, criteria: Sequence[Criterion]) -> JudgedResponse:
    """What is asked about a response, as `label` wants it: weights play no part, but one must be positive."""
    rubric = Rubric(criteria=tuple(one.model_copy(update={"weight": 1.0}) for one in criteria))
    return JudgedResponse(prompt_id="", prompt=prompt, response_id=str(row), response=response, rubric=rubric)
