"""What a judge is, and how a judge LLM's reply becomes verdicts. Calls no model and stores nothing.

Reasons for masking are written "kind: detail". The kinds in `UNANSWERED` mean that no answer came at all.
"""

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rubric_data.records import Criterion, Verdict
from rubric_data.spending import Spent

# The judge never spoke, so a later run asks again; every other kind is the judge's answer and is kept.
UNANSWERED = frozenset({"timeout", "connection", "rate_limit", "server_error", "rejected", "budget"})


@dataclass(frozen=True)
class JudgeRequest:
    """One response and the criteria to answer on it."""

    prompt: str
    response: str
    criteria: tuple[Criterion, ...]


class Judge(Protocol):
    """Whoever answers criteria.

    ``name`` identifies the judge, model included; ``template`` the version of its prompt or of its checks.
    Both are part of a verdict's key in the ledger, so they change whenever the answers may.
    """

    name: str
    template: str

    def judge(self, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
        """One tuple of verdicts for each request, in the order of its criteria.

        A single answer that fails or cannot be read is masked with its reason. Raises UserError only if
        nothing can be judged at all (no key, no such model).
        """
        ...


Finished = list[tuple[int, tuple[Verdict, ...]]]  # places of requests, each with its verdicts


@runtime_checkable
class StreamingJudge(Judge, Protocol):
    """A judge that hands over what it has as it comes, so that a slow call holds up no other.

    A request may hold ``most_criteria`` at most, None for any number.
    """

    @property
    def most_criteria(self) -> int | None: ...

    def stream(self, requests: Iterable[JudgeRequest]) -> Generator[Finished, None, None]:
        """Every request once, in the order of finishing, a few at a time. Raises as `judge`, after what finished."""
        ...


@runtime_checkable
class PaidJudge(Judge, Protocol):
    """A judge whose calls cost something, and who says what they have used so far."""

    @property
    def spent(self) -> Spent: ...


def spent_by(judge: Judge | None) -> Spent | None:
    """What ``judge`` has used so far; None if nobody is paid for it."""
    return judge.spent if isinstance(judge, PaidJudge) else None


def cut_up(request: JudgeRequest, most: int | None) -> list[JudgeRequest]:
    """``request`` as requests of ``most`` criteria at most, in their order."""
    step = most or len(request.criteria) or 1
    parts = [request.criteria[first : first + step] for first in range(0, len(request.criteria), step)]
    return [JudgeRequest(request.prompt, request.response, part) for part in parts]


def answer_all(judge: StreamingJudge, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
    """What `Judge.judge` promises, by ``judge.stream``."""
    parts = [cut_up(request, judge.most_criteria) for request in requests]
    with closing(judge.stream([part for row in parts for part in row])) as groups:
        found = dict(pair for group in groups for pair in group)
    answers = iter(found[place] for place in range(len(found)))
    return [tuple(verdict for _ in row for verdict in next(answers)) for row in parts]


class RawVerdict(Verdict):
    """A verdict with the reply that it was read from, for the ledger's audit trail."""

    raw: str = ""


def reason_kind(masked: str) -> str:
    """The kind in a reason for masking: 'timeout' of 'timeout: no reply within 60 s'."""
    return masked.partition(":")[0].strip()


def is_unanswered(verdict: Verdict) -> bool:
    """Whether no answer arrived, as against an answer that could not be used."""
    return verdict.masked is not None and reason_kind(verdict.masked) in UNANSWERED


def masked_verdicts(
    criteria: Sequence[Criterion], kind: str, detail: str, *, judge: str, raw: str = ""
) -> tuple[Verdict, ...]:
    """A masked verdict on every criterion, for one and the same reason."""
    reason = f"{kind}: {' '.join(detail.split())}"
    return tuple(RawVerdict(criterion_id=criterion.id, masked=reason, judge=judge, raw=raw) for criterion in criteria)


def read_answers(reply: str, criteria: Sequence[Criterion], *, judge: str) -> tuple[Verdict, ...]:
    """Verdicts from a reply that holds ``{"answers": [{"id": "1", "met": true}, {"id": "2", "level": 0}]}``.

    Ids count the criteria from 1. ``met`` answers a yes/no criterion; ``level``, an index from 0 (worst),
    one with levels. Text around the object is allowed. Nothing is guessed: an answer that is absent, given
    twice or of the wrong type is masked, and so is everything if there is no such object or more than one.
    """
    objects = [found for found in json_objects(reply) if isinstance(found.get("answers"), list)]
    if len(objects) != 1:
        detail = (
            "the reply holds no JSON object with answers" if not objects else "the reply holds several answer lists"
        )
        return masked_verdicts(criteria, "parse_failure", detail, judge=judge, raw=reply)
    answers: dict[str, list[dict[str, Any]]] = {}
    for answer in objects[0]["answers"]:
        if isinstance(answer, dict):
            answers.setdefault(str(answer.get("id")).strip(), []).append(answer)
    return tuple(
        _read_answer(answers.get(str(number), []), criterion, judge, reply)
        for number, criterion in enumerate(criteria, start=1)
    )


def _read_answer(answers: list[dict[str, Any]], criterion: Criterion, judge: str, raw: str) -> Verdict:
    if len(answers) != 1:
        kind, detail = (
            ("parse_failure", "answered more than once") if answers else ("missing_answer", "not in the reply")
        )
        return masked_verdicts([criterion], kind, detail, judge=judge, raw=raw)[0]
    value = _value(answers[0], len(criterion.levels))
    if value is None:
        wanted = f"'level' from 0 to {len(criterion.levels) - 1}" if criterion.levels else "'met' true or false"
        detail = f"needs {wanted}, got {str(answers[0])[:80]}"
        return masked_verdicts([criterion], "parse_failure", detail, judge=judge, raw=raw)[0]
    return RawVerdict(criterion_id=criterion.id, value=value, judge=judge, raw=raw)


def _value(answer: dict[str, Any], levels: int) -> float | None:
    if not levels:
        met = answer.get("met")
        return float(met) if isinstance(met, bool) else None
    level = answer.get("level")
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < levels:
        return None
    return level / (levels - 1)


def json_objects(text: str) -> list[dict[str, Any]]:
    """Every complete JSON object in ``text`` that is not inside another."""
    decoder = json.JSONDecoder(object_pairs_hook=no_repeats)
    objects: list[dict[str, Any]] = []
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
            objects.append(found)
        except ValueError:
            end = start + 1
        except RecursionError:
            return []  # no answer nests that deep, and every further start would run into it again
        start = text.find("{", end)
    return objects


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``object_pairs_hook``: a key that is given twice says nothing, so its value is None."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found[key] = None
            seen.add(key)
    return found
