"""Criteria that carry a verifier: answered by code, exactly, whoever answers the others.

Owns which criteria these are and how code's verdicts stand beside a judge's; the checks are
`rubric_data.verifiers`, and the reward model's side is `rm.scorer`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from rubric_data.errors import UserError
from rubric_data.io import BUILTIN, load_data
from rubric_data.judges import Judge, JudgeRequest
from rubric_data.labelling import label
from rubric_data.ledger import Ledger
from rubric_data.records import Criterion, JudgedResponse, Verdict
from rubric_data.verifiers import VerifierJudge, check_verifiers

Coded = bool | Literal["vetoes"]  # whether code answers what it can: all of it, nothing, or vetoes alone
_BATCH = 1024  # responses; a check costs less than the ledger's flush to the disk


@dataclass(frozen=True)
class CodeReport:
    """What code answered, in numbers of verdicts."""

    verdicts: int
    filled: int  # of them, where there was no verdict, or a masked one
    corrected: int  # of them, where there was another value


def is_programmatic(criterion: Criterion) -> bool:
    """Whether code can answer ``criterion``."""
    return criterion.verifier is not None


def is_for_judge(criterion: Criterion) -> bool:
    """Whether ``criterion`` needs a judge."""
    return criterion.verifier is None


def coded_in_rewards(use_verifiers: bool) -> Coded:
    """Which criteria code answers where a policy is paid: all that it can, or without ``use_verifiers`` vetoes alone.

    A veto stands for something that a reward model was fooled by, so code answers it even where the model is asked
    all else.
    """
    return True if use_verifiers else "vetoes"


def is_coded(criterion: Criterion, which: Coded) -> bool:
    """Whether code answers ``criterion``, of those that it can ``which``."""
    return is_programmatic(criterion) and (criterion.veto if which == "vetoes" else which)


def answer_by_code(
    records: Iterable[JudgedResponse], *, ledger: Ledger | None = None
) -> tuple[list[JudgedResponse], CodeReport]:
    """``records`` with code's verdict on every criterion that carries a verifier; other verdicts stay.

    The verdicts are `VerifierJudge`'s by name, in the ledger as well. Raises UserError, before any work, at the
    first verifier that is unknown or misused.
    """
    records = list(records)
    check_verifiers(records)
    answered, _ = label(records, VerifierJudge(), ledger=ledger, batch_size=_BATCH, only=is_programmatic)
    return answered, _compare(records, answered)


def load_verdicts(name: str) -> list[JudgedResponse]:
    """Responses with verdicts: a file of them, or the embedded ones, answered by code.

    Raises UserError if nothing has been judged.
    """
    records = load_data(name)
    if name == BUILTIN:
        records, _ = answer_by_code(records)
    require_verdicts(name, records)
    return records


def require_verdicts(name: str, records: Iterable[JudgedResponse]) -> None:
    """Raise UserError unless some response of the file ``name`` has been judged."""
    if not any(record.verdicts for record in records):
        raise UserError(f"{name}: holds no verdicts; run 'rubric-rm judge --data {name}' first")


class CodeFirst:
    """A judge that answers `is_coded` criteria by code, all with a verifier unless told, and hands others to ``judge``.

    Every verdict names who gave it. To label through a ledger, where it should stand under that name too, call
    `answer_by_code` and then `label` instead.
    """

    def __init__(self, judge: Judge, which: Coded = True) -> None:
        self._judge = judge
        self._coded = partial(is_coded, which=which)
        self._code = VerifierJudge()
        self.name = f"{self._code.name}+{judge.name}"
        self.template = f"{self._code.template}+{judge.template}"

    def judge(self, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
        """One tuple of verdicts for each request, in the order of its criteria. Raises UserError as both judges do."""
        by_code = self._code.judge([_part(request, self._coded) for request in requests])
        others = [_part(request, lambda criterion: not self._coded(criterion)) for request in requests]
        asked = [request for request in others if request.criteria]
        replies = iter(self._judge.judge(asked) if asked else ())
        found = []
        for request, verdicts, other in zip(requests, by_code, others, strict=True):
            left = {True: iter(verdicts), False: iter(next(replies) if other.criteria else ())}
            found.append(tuple(next(left[self._coded(criterion)]) for criterion in request.criteria))
        return found


def _part(request: JudgeRequest, chosen: Callable[[Criterion], bool]) -> JudgeRequest:
    return replace(request, criteria=tuple(filter(chosen, request.criteria)))


def _compare(before: Sequence[JudgedResponse], after: Sequence[JudgedResponse]) -> CodeReport:
    verdicts = filled = corrected = 0
    for old, new in zip(before, after, strict=True):
        for criterion, was, now in zip(new.rubric.criteria, old.values(), new.values(), strict=True):
            if is_programmatic(criterion):
                verdicts += 1
                filled += bool(np.isnan(was))
                corrected += not np.isnan(was) and was != now
    return CodeReport(verdicts, filled, corrected)
