"""Put every question that has no verdict yet to a judge. Owns resuming, when to give up, and what an engine is.

Knows no particular judge and no place where one works; verdicts are kept by `rubric_data.ledger`, which only this
module writes: an engine brings answers, wherever they were given. Votes are merged by `rubric_data.consensus`.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice, takewhile
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rubric_data.agreement import agreement
from rubric_data.consensus import merge_votes, merged_verdict
from rubric_data.errors import UserError
from rubric_data.judges import (
    Judge,
    JudgeRequest,
    RawVerdict,
    StreamingJudge,
    cut_up,
    is_unanswered,
    reason_kind,
    spent_by,
)
from rubric_data.ledger import Entry, Ledger, verdict_key
from rubric_data.records import Criterion, JudgedResponse, Verdict
from rubric_data.spending import Spent

MIN_VERDICTS = 20  # fewer answers say nothing about the share that is masked
WAITING = "waiting"  # kind of reason: the engine brought no reply to the question, not even a failure
_NO_REPLY = Verdict(criterion_id="any", masked=f"{WAITING}: no reply so far")


@dataclass
class LabelReport:
    """What a labelling run did, in numbers of verdicts."""

    responses: int
    verdicts: int  # on the criteria to ask, masked ones included
    asked: int  # answers the judge was asked for in this run: a verdict takes one for each vote
    reused: int  # answers in the ledger already, or to the same question as another
    masked: dict[str, int]  # by kind of reason
    waiting: int  # no verdicts yet: the engine brought no reply, not even a failure
    mean_verdict: float | None  # over the verdicts that have a value
    agreement: dict[str, Any] | None = None  # of the votes, where there are several (`rubric_data.agreement`)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """A request, which vote it asks for, and the ledger key of each of its criteria."""

    request: JudgeRequest
    vote: int
    keys: tuple[str, ...]


Only = Callable[[Criterion], bool]  # which criteria to ask
Answer = tuple[Question, tuple[Verdict, ...]]  # verdicts in the order of the request's criteria


_Keys = tuple[str, ...]  # of one question: the key of each vote


class Identity(Protocol):
    """Whose answers are wanted: a judge, by the two names that are part of every ledger key."""

    @property
    def name(self) -> str: ...

    @property
    def template(self) -> str: ...


class Engine(Identity, Protocol):
    """Whoever carries questions to a judge and brings its answers: here, on other machines, in files."""

    @property
    def spent(self) -> Spent | None:
        """What the judge has used so far; None if it costs nothing."""
        ...

    def ask(self, questions: Sequence[Question], stop: threading.Event) -> Iterator[Sequence[Answer]]:
        """Batches of answers as they are given, in any order; each may be kept before the next is asked for.

        Once ``stop`` is set no further question is put; what is under way is still brought. A question may be
        answered in parts, or not at all.
        """
        ...


class InProcess:
    """The engine that asks ``judge`` here: a streaming judge as fast as it can, another ``batch_size`` at a time."""

    def __init__(self, judge: Judge, batch_size: int = 16) -> None:
        self.name, self.template = judge.name, judge.template
        self._judge = judge
        self._batch_size = batch_size

    @property
    def spent(self) -> Spent | None:
        """What the judge has used so far; None if it does not say."""
        return spent_by(self._judge)

    def ask(self, questions: Sequence[Question], stop: threading.Event) -> Iterator[Sequence[Answer]]:
        """See `Engine`."""
        wanted = takewhile(lambda _: not stop.is_set(), questions)
        if not isinstance(self._judge, StreamingJudge):
            while batch := list(islice(wanted, self._batch_size)):
                yield answer(self._judge, batch)
            return
        taken: dict[int, Question] = {}

        def requests(most: int | None) -> Iterator[JudgeRequest]:
            for place, part in enumerate(cut(wanted, most)):
                taken[place] = part
                yield part.request

        with closing(self._judge.stream(requests(self._judge.most_criteria))) as groups:
            for group in groups:
                yield [(taken.pop(place), verdicts) for place, verdicts in group]


def cut(questions: Iterable[Question], most: int | None) -> Iterator[Question]:
    """``questions`` in parts of ``most`` criteria at most, as they are wanted; every key is in one of them."""
    for question in questions:
        keys = iter(question.keys)
        for part in cut_up(question.request, most):
            yield Question(part, question.vote, tuple(islice(keys, len(part.criteria))))


def answer(judge: Judge, questions: Sequence[Question]) -> list[Answer]:
    """``judge``'s verdicts on ``questions``."""
    return list(zip(questions, judge.judge([question.request for question in questions]), strict=True))


def label(
    records: Iterable[JudgedResponse],
    judge: Judge,
    *,
    ledger: Ledger | None = None,
    votes: int = 1,
    batch_size: int = 16,
    max_masked: float = 1.0,
    only: Only | None = None,
    progress: bool = False,
) -> tuple[list[JudgedResponse], LabelReport]:
    """`label_by` with ``judge`` asked in this process.

    A streaming judge's verdicts are in the ledger within a second of their coming; any other judge is asked
    ``batch_size`` responses at a time, and an interrupted run loses the last of these at most.
    """
    engine = InProcess(judge, batch_size)
    return label_by(records, engine, ledger=ledger, votes=votes, max_masked=max_masked, only=only, progress=progress)


def label_by(
    records: Iterable[JudgedResponse],
    engine: Engine,
    *,
    ledger: Ledger | None = None,
    votes: int = 1,
    max_masked: float = 1.0,
    only: Only | None = None,
    progress: bool = False,
) -> tuple[list[JudgedResponse], LabelReport]:
    """``records`` in their order with the judge's verdicts in the rubric's order, and a report.

    Verdicts that a record carried are replaced; human ones are kept beside the new. ``only`` chooses the criteria to
    ask: verdicts on the others stay as they are, and the report does not count them. Every question is asked ``votes``
    times, a call for each vote; `rubric_data.consensus.merge_votes` makes one verdict of the answers, masked only if
    none has a value. Every batch is in the ledger as soon as the engine brings it. A question of which the engine left
    out a vote is masked as `WAITING`. Raises UserError once more than ``max_masked`` (a share) of all answers so far,
    earlier runs' included, is masked, `MIN_VERDICTS` at the least; if at the end it is, however few they are; and when
    the judge's budget is spent. What was under way by then is in the ledger too.
    """
    records = list(records)
    keys = [_keys(record, engine, votes, only) for record in records]
    every_key = [key for row in keys for of_votes in row.values() for key in of_votes]
    answers = ledger.get_many(every_key) if ledger else {}
    questions = unanswered(_questions(records, keys), answers)
    run, whole = _Run(engine.name), _Run(engine.name)
    whole.count(verdict for verdict in answers.values() if not is_unanswered(verdict))
    stop = threading.Event()
    with _Bar(sum(len(question.keys) for question in questions), shown=progress) as bar:
        for batch in engine.ask(questions, stop):
            fresh = _keep(batch, engine, ledger)
            answers |= fresh
            for counted in (run, whole):
                counted.count(fresh.values())
            bar.show(run.asked, run.masked, engine.spent)
            if run.budget or whole.fails(max_masked):
                stop.set()
    if run.budget:
        kept = sum(not is_unanswered(verdict) for verdict in answers.values())
        raise run.without_budget(kept, len(every_key))
    complete = len(answers) == len(set(every_key))
    if stop.is_set() or (complete and whole.fails(max_masked, least=1)):
        raise whole.failed(max_masked)
    values_QV, criteria, settled = _settle(records, keys, answers)
    labelled = [_with_verdicts(record, row, settled, engine.name) for record, row in zip(records, keys, strict=True)]
    between = agreement(values_QV[:, None], criteria, [engine.name]) if votes > 1 else None
    verdicts = [settled[of_votes] for row in keys for of_votes in row.values()]
    reused = sum(key in answers for key in every_key) - run.asked
    return labelled, _report(len(records), verdicts, run.asked, reused, between)


def open_questions(
    records: Sequence[JudgedResponse],
    judge: Identity,
    ledger: Ledger | None = None,
    *,
    votes: int = 1,
    only: Only | None = None,
) -> list[Question]:
    """What ``ledger`` does not answer, a question for each response and vote; all there is to ask, without a ledger."""
    questions = _questions(records, [_keys(record, judge, votes, only) for record in records])
    return unanswered(questions, ledger.get_many(keys_of(questions))) if ledger else questions


def keys_of(questions: Iterable[Question]) -> Iterator[str]:
    """The ledger keys of ``questions``."""
    return (key for question in questions for key in question.keys)


def _keys(record: JudgedResponse, judge: Identity, votes: int, only: Only | None) -> dict[str, _Keys]:
    """The ledger keys of each criterion to ask, by its id, in the rubric's order."""
    return {
        criterion.id: tuple(
            verdict_key(record.prompt, record.response, criterion, judge.name, judge.template, vote)
            for vote in range(votes)
        )
        for criterion in record.rubric.criteria
        if only is None or only(criterion)
    }


def unanswered(questions: Iterable[Question], answers: Container[str]) -> list[Question]:
    """What of ``questions`` has no key among ``answers``."""
    found = []
    for question in questions:
        left = [place for place, key in enumerate(question.keys) if key not in answers]
        if left:
            criteria = tuple(question.request.criteria[place] for place in left)
            keys = tuple(question.keys[place] for place in left)
            found.append(Question(replace(question.request, criteria=criteria), question.vote, keys))
    return found


def _questions(records: Sequence[JudgedResponse], keys: Sequence[Mapping[str, _Keys]]) -> list[Question]:
    """All there is to ask, the votes on a response one after the other; what several records share comes once."""
    claimed: set[str] = set()
    questions = []
    for record, row in zip(records, keys, strict=True):
        criteria = [criterion for criterion in record.rubric.criteria if criterion.id in row]
        for vote, keys_of_vote in enumerate(zip(*row.values(), strict=True)):
            fresh = {}
            for key, criterion in zip(keys_of_vote, criteria, strict=True):
                if key not in claimed:
                    claimed.add(key)
                    fresh[key] = criterion
            if fresh:
                request = JudgeRequest(record.prompt, record.response, tuple(fresh.values()))
                questions.append(Question(request, vote, tuple(fresh)))
    return questions


def _keep(batch: Sequence[Answer], judge: Identity, ledger: Ledger | None) -> dict[str, Verdict]:
    """The verdicts of one batch by key, as the ledger now holds them."""
    given: dict[str, Verdict] = {}
    entries: list[Entry] = []
    for question, verdicts in batch:
        ids = [criterion.id for criterion in question.request.criteria]
        if [verdict.criterion_id for verdict in verdicts] != ids:
            raise RuntimeError(f"judge {judge.name!r} must answer the criteria {ids} in order, got {verdicts}")
        for key, verdict in zip(question.keys, verdicts, strict=True):
            given[key] = verdict
            if _is_left(verdict):
                continue
            raw = verdict.raw if isinstance(verdict, RawVerdict) else ""
            entries.append(Entry(key, judge.name, judge.template, question.vote, verdict, raw))
    if ledger is None:
        return given
    ledger.put_many(entries)
    return given | ledger.get_many(given)  # another writer may have been first, and the first verdict counts


def _settle(
    records: Sequence[JudgedResponse], keys: Sequence[Mapping[str, _Keys]], answers: dict[str, Verdict]
) -> tuple[np.ndarray, list[str], dict[_Keys, Verdict]]:
    """The votes on each question (Q, V), NaN where masked; its criterion's text; and the verdict they make."""
    texts = {
        row[criterion.id]: criterion.text
        for record, row in zip(records, keys, strict=True)
        for criterion in record.rubric.criteria
        if criterion.id in row
    }
    given = [[answers.get(key, _NO_REPLY) for key in of_votes] for of_votes in texts]
    values = [[math.nan if one.value is None else one.value for one in votes] for votes in given]
    values_QV = np.array(values, float).reshape(len(given), -1 if given else 1)
    targets = merge_votes(values_QV)
    settled = {
        of_votes: _NO_REPLY if _NO_REPLY in votes else merged_verdict(value, count, votes)
        for of_votes, votes, value, count in zip(texts, given, targets.values, targets.counts, strict=True)
    }
    return values_QV, list(texts.values()), settled


def _is_left(verdict: Verdict) -> bool:
    """Whether no call was made for want of a budget."""
    return verdict.masked is not None and reason_kind(verdict.masked) == "budget"


class _Run:
    """What came back so far, and whether it is reason to stop."""

    def __init__(self, judge: str) -> None:
        self._judge = judge
        self.asked = self.masked = 0
        self.budget = ""  # why no call was left, once none is
        self._latest = ""  # any other reason for masking

    def count(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            if _is_left(verdict):
                self.budget = verdict.masked or ""
                continue
            self.asked += 1
            if verdict.masked is not None:
                self.masked += 1
                self._latest = verdict.masked

    def fails(self, max_masked: float, least: int = MIN_VERDICTS) -> bool:
        return self.asked >= least and self.masked > max_masked * self.asked

    def without_budget(self, answered: int, wanted: int) -> UserError:
        return UserError(
            f"judge {self._judge}: {self.budget}; {answered} of {wanted} verdicts are in the "
            "ledger; --resume true goes on with the same budget once more, or with another"
        )

    def failed(self, max_masked: float) -> UserError:
        return UserError(
            f"judge {self._judge}: {self.masked} of {self.asked} verdicts masked, more than max_masked {max_masked:g} "
            f"allows (latest: {self._latest[:160]}); {self._advice()}, or raise max_masked"
        )

    def _advice(self) -> str:
        if self._latest.startswith("no_verifier"):
            return "choose another --judge for criteria without a programmatic check"
        return "mend the judge (or its base_url) and resume"


def _with_verdicts(
    record: JudgedResponse, keys: Mapping[str, _Keys], settled: Mapping[_Keys, Verdict], judge: str
) -> JudgedResponse:
    """``record`` with what was settled under ``keys``, and its own verdicts on other criteria."""
    before = {verdict.criterion_id: verdict for verdict in record.verdicts}

    def fresh(criterion: Criterion) -> Verdict:
        old = before.get(criterion.id)
        # the question may have been asked under another id
        update = {"criterion_id": criterion.id, "judge": judge, "human": old.human if old else None}
        return settled[keys[criterion.id]].model_copy(update=update)

    verdicts = tuple(
        fresh(criterion) if criterion.id in keys else before[criterion.id]
        for criterion in record.rubric.criteria
        if criterion.id in keys or criterion.id in before
    )
    return record.model_copy(update={"verdicts": verdicts})


def _report(
    responses: int, verdicts: Sequence[Verdict], asked: int, reused: int, between: dict[str, Any] | None
) -> LabelReport:
    values = [verdict.value for verdict in verdicts if verdict.value is not None]
    kinds = Counter(reason_kind(verdict.masked) for verdict in verdicts if verdict.masked is not None)
    waiting = kinds.pop(WAITING, 0)
    return LabelReport(
        responses=responses,
        verdicts=len(verdicts),
        asked=asked,
        reused=reused,
        masked=dict(sorted(kinds.items())),
        waiting=waiting,
        mean_verdict=float(np.mean(values)) if values else None,
        agreement=between,
    )


class _Bar:
    """Progress in answers on stderr; nothing where nothing is to be asked."""

    def __init__(self, total: int, *, shown: bool) -> None:
        columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        more = TextColumn("masked {task.fields[masked]}{task.fields[spent]}")
        self._progress = Progress(*columns, more, console=Console(stderr=True), disable=not (shown and total))
        self._task = self._progress.add_task("", total=total, masked=0, spent="")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, answered: int, masked: int, spent: Spent | None) -> None:
        used = "" if spent is None else f"  calls {spent.calls:,}  tokens {spent.tokens_in + spent.tokens_out:,}"
        cost = "" if spent is None or spent.cost is None else f"  cost {spent.cost:.2f}"
        self._progress.update(self._task, completed=answered, masked=masked, spent=used + cost)
