"""Ask a model for rubrics. Owns what is asked, reading the reply, and that no reply is paid twice.

The prompts are `templates/rubric_*.jinja`; `rubric_data.endpoint` calls and pays; what becomes of a proposal is
decided by `rubric_data.generate`, `rubric_data.refine` and, for vetoes, `rm.defence`.
"""

import json
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rubric_data import chat
from rubric_data.endpoint import CHARACTERS, NO_REPLY, Endpoint, tokens_of
from rubric_data.errors import UserError
from rubric_data.judges import json_objects, reason_kind
from rubric_data.records import Criterion, Rubric, Verifier, content_hash
from rubric_data.verifiers import LIBRARY, describe_checks, prepare
from rubric_data.versions import Journal

Task = Literal["generate", "refine", "veto"]
JOURNAL = "proposals.jsonl"  # in a run folder
_TEMPLATES: dict[Task, tuple[str, ...]] = {
    "generate": ("rubric_generate_v1.jinja", "rubric_rules_v1.jinja", "judge_repair_v1.jinja"),
    "refine": ("rubric_refine_v1.jinja", "rubric_rules_v1.jinja", "judge_repair_v1.jinja"),
    "veto": ("rubric_veto_v1.jinja", "judge_repair_v1.jinja"),
}
MOST_CRITERIA, LONGEST_TEXT = 60, 1000  # of a rubric, and characters of a criterion: beyond, a model has gone astray
MIN_PROPOSALS = 20  # fewer say nothing about the share that fails


@dataclass(frozen=True)
class Request:
    """One rubric to be proposed: ``text`` is asked; ``previous`` and ``prefix`` settle the criteria's ids."""

    text: str
    previous: Rubric | None = None
    prefix: str = "c"  # of the ids of new criteria, before their number


@dataclass(frozen=True)
class Proposal:
    """What came of a request: a rubric, or why there is none, as "kind: detail".

    ``replies``: the texts that came, the second after a request for repair. ``tokens``: read and written for them.
    ``reused``: no call was made now, the replies were kept from before.
    """

    rubric: Rubric | None
    failure: str | None
    replies: tuple[str, ...] = ()
    tokens: tuple[int, int] = (0, 0)
    reused: bool = False

    @property
    def reply_hash(self) -> str | None:
        """SHA-256 of the replies, 64 hex digits; None if none came."""
        return content_hash(list(self.replies)) if self.replies else None


@dataclass(frozen=True)
class _Reply:
    """One paid reply, as the journal keeps it. ``problem``: kind and detail where it is no answer."""

    text: str
    problem: tuple[str, str] | None
    tokens: tuple[int, int]


class ProposerOptions(Protocol):
    """The options of every command that asks for rubrics."""

    model: str
    mode: Literal["json", "schema"]
    temperature: float | None
    max_tokens: int | None
    checks: bool


class Proposer:
    """Asks a model behind ``endpoint`` for rubrics; replies are kept in ``journal`` as they come in.

    ``mode`` `schema` has the server enforce the reply's form. ``checks`` lets criteria be answered by the programmatic
    checks of this package. A reply that cannot be read is asked for once more. ``retry``: an unreadable reply in the
    journal is asked for anew. Raises UserError on a limit below 1.
    """

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        journal: Journal,
        *,
        task: Task,
        mode: Literal["json", "schema"] = "json",
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        checks: bool = False,
        retry: bool = False,
    ) -> None:
        self._settings = chat.model_settings(model, temperature, max_tokens)
        self.endpoint = endpoint
        self.template = chat.template_hash(_TEMPLATES[task])
        options = {"mode": (mode, "json"), "temperature": (temperature, 0), "checks": (checks, False)}
        self.name = chat.identity(model, endpoint.place, options)
        self.checks = describe_checks() if checks else []
        self._form = {"response_format": _reply_schema()} if mode == "schema" else {}
        self._journal = journal
        self._again = "resume with --retry true" if task == "generate" else "resume"
        self._retry = retry
        self._kept = _replies_by_key(journal)

    @classmethod
    def of(
        cls, config: ProposerOptions, endpoint: Endpoint, folder: Path, *, task: Task, retry: bool = False
    ) -> "Proposer":
        """The proposer that ``config`` describes, whose journal is in the run folder ``folder``."""
        return cls(
            config.model,
            endpoint,
            Journal(folder / JOURNAL),
            task=task,
            mode=config.mode,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            checks=config.checks,
            retry=retry,
        )

    def propose(
        self, requests: Sequence[Request], *, max_failed: float = 1.0, progress: str | None = None
    ) -> list[Proposal]:
        """A proposal for each of ``requests``, in order; equal ones are asked once. ``progress``: the bar's title.

        Raises UserError when the budget is spent; when more than ``max_failed`` (a share) of those asked for in this
        call failed, `MIN_PROPOSALS` at the least; if at the end more of all did, however few they are; and if the
        endpoint refuses the key or does not know the model.
        """
        keys = [self._key(request) for request in requests]
        different = dict(zip(keys, requests, strict=True))
        found: dict[str, Proposal] = {}
        watch = _Watch(max_failed, self.name, self._again)
        columns = (TextColumn(progress or ""), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        failed = TextColumn("failed {task.fields[failed]}")
        shown = progress is not None and bool(different)
        with Progress(*columns, failed, console=Console(stderr=True), disable=not shown) as bar:
            task = bar.add_task("", total=len(different), failed=0)

            wanted = takewhile(lambda _: watch.error is None, different.items())
            with closing(self.endpoint.stream(self._propose, wanted)) as groups:
                for key, proposal in (pair for group in groups for _, pair in group):
                    found[key] = proposal
                    watch.count(proposal)
                    bar.update(task, advance=not watch.is_left(proposal), failed=watch.failed)
        watch.finish(found.values())
        return [found[key] for key in keys]

    def _key(self, request: Request) -> str:
        # the rubric before settles the ids and checks of what is read, so it is part of the question
        previous = request.previous and request.previous.id
        longest = self._settings.get("max_completion_tokens")
        return content_hash([self.name, self.template, longest, request.text, previous])

    def _propose(self, item: tuple[str, Request], stop: threading.Event) -> tuple[str, Proposal]:
        """Go on from what the journal holds: nothing, an unreadable first reply, or all there is to know."""
        key, request = item
        kept = self._kept.get(key, ())
        if self._retry and self._is_settled(kept, request) and self._read(kept, request).failure:
            kept = ()
        fresh = False
        while not self._is_settled(kept, request):
            try:
                reply = self._reply(_messages(request, kept, self._read(kept, request).failure), stop)
            except NO_REPLY as error:
                kind, detail = self.endpoint.failure(error)
                if kept and kind != "budget":
                    break  # the first reply is what there is
                return key, replace(self._read(kept, request), rubric=None, failure=f"{kind}: {detail}")
            self._journal.append({"key": key, "first": not kept, **vars(reply)})
            kept = self._kept[key] = (*kept, reply)
            fresh = True
        return key, replace(self._read(kept, request), reused=not fresh)

    def _is_settled(self, kept: Sequence[_Reply], request: Request) -> bool:
        """Whether nothing more is to be asked: a rubric, two replies, or a first one that says why there is none."""
        return len(kept) == 2 or (bool(kept) and (kept[0].problem is not None or not self._read(kept, request).failure))

    def _reply(self, messages: list[dict[str, str]], stop: threading.Event) -> _Reply:
        likely = sum(len(message["content"]) for message in messages) // CHARACTERS
        body = {"messages": messages, **self._settings, **self._form}
        completion = self.endpoint.chat(body, stop, likely_tokens=likely)
        return _Reply(*chat.reply_text(completion), tokens_of(completion) or (0, 0))

    def _read(self, replies: Sequence[_Reply], request: Request) -> Proposal:
        """The rubric in the last reply, or what is wrong with it."""
        if not replies:
            return Proposal(None, None)
        texts = tuple(reply.text for reply in replies)
        tokens = sum(reply.tokens[0] for reply in replies), sum(reply.tokens[1] for reply in replies)
        problem = replies[-1].problem
        if problem:
            return Proposal(None, f"{problem[0]}: {' '.join(problem[1].split())}", texts, tokens)
        try:
            rubric = read_rubric(texts[-1], previous=request.previous, prefix=request.prefix, checks=bool(self.checks))
        except ValueError as error:
            return Proposal(None, f"parse_failure: {' '.join(str(error).split())[:300]}", texts, tokens)
        return Proposal(rubric, None, texts, tokens)


class _Watch:
    """Counts failures as they come in; ``error`` is why to go no further, once a run has no budget or no use."""

    def __init__(self, max_failed: float, name: str, again: str) -> None:
        self._max_failed, self._name, self._again = max_failed, name, again
        self._asked = 0
        self.failed = 0
        self.error: UserError | None = None

    @staticmethod
    def is_left(proposal: Proposal) -> bool:
        """Whether it was not asked for, for want of a budget."""
        return reason_kind(proposal.failure or "") == "budget"

    def count(self, proposal: Proposal) -> None:
        if proposal.reused or self.error:
            return  # decided in an earlier run, or was under way when this one was
        if self.is_left(proposal):
            self.error = UserError(
                f"proposer {self._name}: {proposal.failure}; all replies are kept, so raise the budget and run again "
                "with --resume true"
            )
            return
        self._asked += 1
        self.failed += proposal.failure is not None
        if self._asked >= MIN_PROPOSALS:
            self._check(self.failed, self._asked, proposal.failure)

    def finish(self, proposals: Collection[Proposal]) -> None:
        """Raise ``error``, or UserError if too many of all ``proposals`` failed, whichever run asked for them."""
        failures = [proposal.failure for proposal in proposals if proposal.failure is not None]
        if failures and not self.error:
            self._check(len(failures), len(proposals), failures[-1])
        if self.error:
            raise self.error

    def _check(self, failed: int, asked: int, latest: str | None) -> None:
        if failed > self._max_failed * asked:
            self.error = UserError(
                f"proposer {self._name}: {failed} of {asked} proposals failed, more than max_failed "
                f"{self._max_failed:g} allows (latest: {(latest or '')[:160]}); mend the proposer and {self._again}, "
                "or raise max_failed"
            )


def _replies_by_key(journal: Journal) -> dict[str, tuple[_Reply, ...]]:
    """The replies in ``journal``; a first reply begins anew, so that a retry replaces what was there."""
    found: dict[str, tuple[_Reply, ...]] = {}
    for line in journal.lines():
        problem = line["problem"] and (line["problem"][0], line["problem"][1])
        reply = _Reply(line["text"], problem, (line["tokens"][0], line["tokens"][1]))
        found[line["key"]] = (() if line["first"] else found.get(line["key"], ())) + (reply,)
    return found


def _messages(request: Request, kept: Sequence[_Reply], failure: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": request.text}]
    if kept:
        messages += [
            {"role": "assistant", "content": kept[0].text},
            {"role": "user", "content": chat.render("judge_repair_v1.jinja", problem=failure)},
        ]
    return messages


def generate_prompt(prompt: str, checks: Sequence[str] = ()) -> str:
    """The prompt for an initial rubric; ``checks`` are described to the proposer."""
    return chat.render("rubric_generate_v1.jinja", prompt=prompt, checks=checks)


def refine_prompt(prompt: str, rubric: Rubric, first: str, second: str, checks: Sequence[str] = ()) -> str:
    """The prompt for a rubric that tells two responses apart."""
    return chat.render(
        "rubric_refine_v1.jinja", prompt=prompt, rubric=rubric, first=first, second=second, checks=checks
    )


def veto_prompt(
    exploiting: Sequence[tuple[str, str]],
    good: Sequence[tuple[str, str]],
    traits: Sequence[str] = (),
    criteria: Sequence[str] = (),
    checks: Sequence[str] = (),
) -> str:
    """The prompt for vetoes against what ``exploiting`` responses do; both are pairs of prompt and response.

    ``traits`` say what was counted in them, ``criteria`` what the reward model wrongly took for met.
    """
    return chat.render(
        "rubric_veto_v1.jinja", exploiting=exploiting, good=good, traits=traits, criteria=criteria, checks=checks
    )


# --- reading a reply -------------------------------------------------------------------------------------------------


def read_rubric(reply: str, *, previous: Rubric | None = None, prefix: str = "c", checks: bool = False) -> Rubric:
    """The rubric in a reply that holds ``{"criteria": [{"text": "...", "weight": 2}, ...]}``.

    Text around the object is allowed; unknown keys, repeated criteria and anything of the wrong type are not. A
    criterion that ``previous`` has word for word keeps its id, levels, tags, veto and verifier, under its new weight.
    New ones get the ids ``prefix`` 1, 2, ... With ``checks`` a criterion may name a programmatic check, but none of
    the library's, whose arguments are regular expressions: a reply is not to be trusted with them. Raises ValueError.
    """
    objects = [found for found in json_objects(reply) if isinstance(found.get("criteria"), list)]
    if len(objects) != 1:
        raise ValueError(f"the reply holds {'several lists' if objects else 'no JSON object with a list'} of criteria")
    entries = objects[0]["criteria"]
    if not 1 <= len(entries) <= MOST_CRITERIA:
        raise ValueError(f"a rubric has 1 to {MOST_CRITERIA} criteria, the reply has {len(entries)}")
    old = previous.criteria if previous else ()
    known = {_plain(criterion.text): criterion for criterion in old}
    fresh_id = _fresh_ids(prefix, {criterion.id for criterion in old})
    criteria: list[Criterion] = []
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        text, weight = _fields(entry, number, checks)
        if (plain := _plain(text)) in seen:
            raise ValueError(f"criterion {number} repeats criterion {seen[plain]}")
        seen[plain] = number
        before = known.get(plain) or Criterion(id=fresh_id(), text=text, verifier=None)
        verifier = before.verifier
        if (named := entry.get("verifier")) is not None and named != (verifier and verifier.model_dump()):
            verifier = _verifier(named, f"criterion {number}")
        criteria.append(Criterion(**dict(before) | {"weight": weight, "verifier": verifier}))
    return Rubric(criteria=tuple(criteria))


def _fields(entry: Any, number: int, checks: bool) -> tuple[str, float]:
    """Text and weight of one entry, checked."""
    where = f"criterion {number}"
    allowed = {"text", "weight", "verifier"} if checks else {"text", "weight"}
    if not isinstance(entry, dict) or not {"text", "weight"} <= entry.keys() <= allowed:
        raise ValueError(f"{where}: must be an object with {', '.join(sorted(allowed))}, got {json.dumps(entry)[:80]}")
    text, weight = entry["text"], entry["weight"]
    if not isinstance(text, str) or not 0 < len(text.strip()) <= LONGEST_TEXT:
        raise ValueError(f"{where}: text must be a string of 1 to {LONGEST_TEXT} characters")
    if text != text.encode("utf-8", "replace").decode():
        raise ValueError(f"{where}: text holds half a surrogate pair")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"{where}: weight must be a number, got {json.dumps(weight)[:40]}")
    return text.strip(), float(weight)


def _verifier(fields: Any, where: str) -> Verifier:
    try:
        verifier = Verifier.model_validate(fields)
        json.dumps(verifier.args, allow_nan=False).encode()
        if verifier.name.startswith(LIBRARY):
            raise ValueError(f"check {verifier.name!r} is not offered")
        prepare(verifier)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return verifier


def _plain(text: str) -> str:
    return " ".join(text.split())


def _fresh_ids(prefix: str, taken: set[str]) -> Callable[[], str]:
    """A function that gives ``prefix`` 1, 2, ... and skips what is taken."""
    numbers = iter(range(1, MOST_CRITERIA + len(taken) + 1))

    def fresh() -> str:
        return next(name for number in numbers if (name := f"{prefix}{number}") not in taken)

    return fresh


def _reply_schema() -> dict[str, Any]:
    criterion = chat.closed_object({"text": {"type": "string"}, "weight": {"type": "number"}})
    return chat.response_format("rubric", chat.closed_object({"criteria": {"type": "array", "items": criterion}}))
