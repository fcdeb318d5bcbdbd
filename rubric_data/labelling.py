"""Put every question that has no verdict yet to a judge. Owns resuming, when to give up, and what an engine is.

Knows no particular judge and no place where one works; verdicts are kept by `rubric_data.ledger`, which only this
module writes: an engine brings answers, wherever they were given. Votes are merged by `rubric_data.consensus`.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rubric_data.agreement import agreement
from rubric_data.consensus import merge_votes, merged_verdict
from rubric_data.errors import UserError
from rubric_data.judges import Judge, JudgeRequest, RawVerdict, StreamingJudge, cut_up, is_unanswered, reason_kind
from rubric_data.ledger import Entry, Ledger, verdict_key
from rubric_data.records import Criterion, JudgedResponse, Verdict

if TYPE_CHECKING:
    from rubric_data.endpoint import Spent

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
    def spent(self) -> "Spent | None":
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
    def spent(self) -> "Spent | None":
        """What the judge has used so far; None if it does not say."""
        return getattr(self._judge, "spent", None)

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
    out a vote is masked as `WAITING`. Raises UserError once more than ``max_masked`` (a share) of the answers asked for
    in this run is masked, ``MIN_VERDICTS`` at the least, and when the judge's budget is spent; what was under way by
    then is in the ledger too.
    """
    records = list(records)
    keys = [_keys(record, engine, votes, only) for record in records]
    every_key = [key for row in keys for of_votes in row.values() for key in of_votes]
    answers = ledger.get_many(every_key) if ledger else {}
    questions = _open_questions(records, keys, answers)
    run = _Run(engine.name)
    stop = threading.Event()
    with _Bar(sum(len(question.keys) for question in questions), shown=progress) as bar:
        for batch in engine.ask(questions, stop):
            fresh = _keep(batch, engine, ledger)
            answers |= fresh
            run.count(fresh.values())
            bar.advance(len(fresh), run.masked, engine.spent)
            if run.budget or run.fails(max_masked):
                stop.set()
    if run.budget:
        kept = sum(not is_unanswered(verdict) for verdict in answers.values())
        raise run.without_budget(kept, len(every_key))
    if stop.is_set():
        raise run.failed(max_masked)
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
    keys = [_keys(record, judge, votes, only) for record in records]
    every_key = (key for row in keys for of_votes in row.values() for key in of_votes)
    return _open_questions(records, keys, ledger.get_many(every_key) if ledger else {})


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


def _open_questions(
    records: Sequence[JudgedResponse], keys: Sequence[Mapping[str, _Keys]], answers: dict[str, Verdict]
) -> list[Question]:
    """What is not answered yet, the votes on a response one after the other; what several records share comes once."""
    claimed = set(answers)
    questions = []
    for record, row in zip(records, keys, strict=True):
        criteria = [criterion for criterion in record.rubric.criteria if criterion.id in row]
        for vote, keys_of_vote in enumerate(zip(*row.values(), strict=True)):
            missing = {}
            for key, criterion in zip(keys_of_vote, criteria, strict=True):
                if key not in claimed:
                    claimed.add(key)
                    missing[key] = criterion
            if missing:
                request = JudgeRequest(record.prompt, record.response, tuple(missing.values()))
                questions.append(Question(request, vote, tuple(missing)))
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


class _Run:
    """What came back so far, and whether it is reason to stop."""

    def __init__(self, judge: str) -> None:
        self._judge = judge
        self.asked = self.masked = 0
        self.budget = ""  # why no call was left, once none is
        self._latest = ""  # any other reason for masking

    def count(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            self.asked += 1
            if verdict.masked is not None:
                self.masked += 1
                if reason_kind(verdict.masked) == "budget":
                    self.budget = verdict.masked
                else:
                    self._latest = verdict.masked

    def fails(self, max_masked: float) -> bool:
        return self.asked >= MIN_VERDICTS and self.masked > max_masked * self.asked

    def without_budget(self, answered: int, wanted: int) -> UserError:
        return UserError(
            f"judge {self._judge}: {self.budget}; {answered} of {wanted} verdicts are in the "
            "ledger; raise the budget and run again with --resume true"
        )

    def failed(self, max_masked: float) -> UserError:
        return UserError(
            f"judge {self._judge}: {self.masked} of {self.asked} verdicts masked, more than max_masked {max_masked:g} "
            f"allows (latest: {self._latest[:160]}); mend the judge and resume, or raise max_masked"
        )


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
    return LabelReport(
        responses=responses,
        verdicts=len(verdicts),
        asked=asked,
        reused=reused,
        masked=dict(sorted(kinds.items())),
        mean_verdict=float(np.mean(values)) if values else None,
        agreement=between,
    )


class _Bar:
    """Progress in answers on stderr, or nothing."""

    def __init__(self, total: int, *, shown: bool) -> None:
        columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        more = TextColumn("masked {task.fields[masked]}{task.fields[spent]}")
        self._progress = Progress(*columns, more, console=Console(stderr=True), disable=not shown)
        self._task = self._progress.add_task("", total=total, masked=0, spent="")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int, masked: int, spent: "Spent | None") -> None:
        used = "" if spent is None else f"  calls {spent.calls:,}  tokens {spent.tokens_in + spent.tokens_out:,}"
        cost = f"  cost {spent.cost:.2f}" if spent is not None and spent.cost else ""
        self._progress.update(self._task, advance=count, masked=masked, spent=used + cost)
