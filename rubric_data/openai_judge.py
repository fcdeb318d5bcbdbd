"""Judges behind an OpenAI-compatible chat endpoint. Owns what is asked; `rubric_data.endpoint` calls and pays.

Three modes: `json`, all criteria in one call; `schema`, the same with the reply's form enforced by the server;
`logprobs`, one call for each criterion, answered softly by the probabilities of its first token. The prompts are
`templates/judge_*.jinja`; reading replies is `rubric_data.judges`. What is sent and how it is read is `ChatForm`,
which calls nobody, so that replies may come by other ways too (`rubric_data.batch`).
"""

import math
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal

from rubric_data import chat
from rubric_data.endpoint import CHARACTERS, NO_REPLY, Endpoint
from rubric_data.errors import UserError
from rubric_data.judges import (
    Finished,
    JudgeRequest,
    RawVerdict,
    answer_all,
    masked_verdicts,
    read_answers,
    reason_kind,
)
from rubric_data.records import Criterion, Verdict
from rubric_data.spending import Spent

Mode = Literal["json", "schema", "logprobs"]
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "json": ("judge_v2.jinja", "judge_repair_v1.jinja"),
    "schema": ("judge_v2.jinja", "judge_repair_v1.jinja"),
    "logprobs": ("judge_single_v2.jinja",),
}
_REPAIRED = frozenset({"parse_failure", "missing_answer"})
_TOP_LOGPROBS = 20  # the most that OpenAI's own endpoint tells
_LEAST_MASS = 0.5  # of the first token on answers: below, the model was about to say something else


class ChatForm:
    """What ``model`` is asked and how its replies are read.

    ``place`` is where the model is (`rubric_data.endpoint.place_of`). ``temperature`` None leaves it to the server
    (some models take no other), ``max_tokens`` None the length of a reply. Raises UserError on an unknown mode, or on
    a limit below 1.
    """

    def __init__(
        self,
        model: str,
        *,
        place: str = "",
        mode: Mode = "json",
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
    ) -> None:
        if mode not in _TEMPLATES:
            raise UserError(f"openai judge: unknown mode {mode!r}; use {', '.join(_TEMPLATES)}")
        self._settings = chat.model_settings(model, temperature, max_tokens)
        self.template = template_hash(mode)
        options = {"mode": (mode, "json"), "temperature": (temperature, 0)}
        self.name = "openai:" + chat.identity(model, place, options)
        self.mode = mode

    @property
    def most_criteria(self) -> int | None:
        """How many criteria one call can answer; None for any number."""
        return 1 if self.mode == "logprobs" else None

    def body(self, part: JudgeRequest) -> dict[str, Any]:
        """The chat completion request that asks ``part``, which has at most `most_criteria`."""
        if self.mode == "logprobs":
            prompt = render_single(part, part.criteria[0])
            more: dict[str, Any] = {"max_completion_tokens": 1, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        else:
            prompt = render_prompt(part)
            more = {"response_format": reply_schema(part.criteria)} if self.mode == "schema" else {}
        return {**self._settings, "messages": [{"role": "user", "content": prompt}], **more}

    def read(self, completion: Mapping[str, Any], part: JudgeRequest) -> tuple[Verdict, ...]:
        """The verdicts on ``part`` in a chat completion, masked where it holds none."""
        if self.mode == "logprobs":
            return (self._read_first_token(completion, part.criteria[0]),)
        return self.read_text(*chat.reply_text(completion), part)

    def read_text(self, reply: str, problem: tuple[str, str] | None, part: JudgeRequest) -> tuple[Verdict, ...]:
        """The verdicts on ``part`` in what `rubric_data.chat.reply_text` found; not for mode `logprobs`."""
        if problem:
            return masked_verdicts(part.criteria, *problem, judge=self.name, raw=reply)
        return read_answers(reply, part.criteria, judge=self.name)

    def _read_first_token(self, completion: Mapping[str, Any], criterion: Criterion) -> Verdict:
        told = first_logprobs(completion)
        if not told:
            detail, raw = "the endpoint tells no log-probabilities; use another mode", chat.as_text(completion)
            return masked_verdicts([criterion], "parse_failure", detail, judge=self.name, raw=raw)[0]
        value, raw = soft_answer(told, len(criterion.levels)), chat.as_text(told)
        if value is None:
            detail = f"the first token is no answer, most likely {max(told, key=told.__getitem__)!r}"
            return masked_verdicts([criterion], "parse_failure", detail, judge=self.name, raw=raw)[0]
        return RawVerdict(criterion_id=criterion.id, value=value, judge=self.name, raw=raw)


class OpenAIJudge:
    """Asks a model behind ``endpoint``, as a `ChatForm` with the same options says.

    In `json` and `schema` a reply that cannot be read is asked for once more.
    """

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        *,
        mode: Mode = "json",
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.form = ChatForm(model, place=endpoint.place, mode=mode, temperature=temperature, max_tokens=max_tokens)
        self.name, self.template = self.form.name, self.form.template

    @property
    def spent(self) -> Spent:
        """What the calls have used so far."""
        return self.endpoint.spent

    def judge(self, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
        """Verdicts aligned with each request's criteria; what fails after all tries is masked.

        Raises UserError if the endpoint refuses the key or does not know the model.
        """
        return answer_all(self, requests)

    @property
    def most_criteria(self) -> int | None:
        """How many criteria one call can answer; None for any number."""
        return self.form.most_criteria

    def stream(self, requests: Iterable[JudgeRequest]) -> Generator[Finished, None, None]:
        """Verdicts as they come; see `rubric_data.judges.StreamingJudge`."""
        return self.endpoint.stream(self._ask, requests)

    def _ask(self, part: JudgeRequest, stop: threading.Event) -> tuple[Verdict, ...]:
        body = self.form.body(part)
        try:
            completion = self._send(body, stop)
        except NO_REPLY as error:
            return masked_verdicts(part.criteria, *self.endpoint.failure(error), judge=self.name)
        if self.form.mode == "logprobs":
            return self.form.read(completion, part)
        reply, problem = chat.reply_text(completion)
        verdicts = self.form.read_text(reply, problem, part)
        doubtful = [v.masked for v in verdicts if v.masked is not None and reason_kind(v.masked) in _REPAIRED]
        if problem or not doubtful:
            return verdicts
        body["messages"] += [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": chat.render("judge_repair_v1.jinja", problem=doubtful[0])},
        ]
        try:
            again, problem = chat.reply_text(self._send(body, stop))
        except NO_REPLY:
            return verdicts  # the first reply is what there is
        raw = f"{reply}\n--- asked again ---\n{again}"
        return tuple(
            first if first.value is not None else RawVerdict(**(later.model_dump() | {"raw": raw}))
            for first, later in zip(verdicts, self.form.read_text(again, problem, part), strict=True)
        )

    def _send(self, body: Mapping[str, Any], stop: threading.Event) -> dict[str, Any]:
        likely = sum(len(message["content"]) for message in body["messages"]) // CHARACTERS
        return self.endpoint.chat(body, stop, likely_tokens=likely)


def first_logprobs(completion: Mapping[str, Any]) -> dict[str, float]:
    """Log-probabilities of a completion's first token, by token; empty where it tells none."""
    logprobs = chat.first_choice(completion).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    first = content[0] if isinstance(content, list) and content else None
    if not isinstance(first, Mapping):
        return {}
    told = first.get("top_logprobs")
    pairs = [
        (top.get("token"), top.get("logprob"))
        for top in (told if isinstance(told, list) and told else [first])
        if isinstance(top, Mapping)
    ]
    return {
        token: float(logprob)
        for token, logprob in pairs
        # a logarithm of a probability, give or take a rounding; NaN is none
        if isinstance(token, str) and isinstance(logprob, int | float) and -1e9 <= logprob <= 1e-3
    }


def soft_answer(logprobs: Mapping[str, float], levels: int) -> float | None:
    """P(yes) / (P(yes) + P(no)) of a first token, or with levels the expected level over the best one; in [0, 1].

    ``logprobs``: natural logarithms by token; case and white space around a token do not count. None if answers
    have less than half of the probability.
    """
    values = {str(level): level / (levels - 1) for level in range(levels)} if levels else {"yes": 1.0, "no": 0.0}
    mass: dict[float, float] = {}
    for token, logprob in logprobs.items():
        value = values.get(token.strip().lower())
        if value is not None:
            mass[value] = mass.get(value, 0.0) + math.exp(logprob)
    total = sum(mass.values())
    if not total >= _LEAST_MASS:  # NaN included
        return None
    return min(sum(value * share for value, share in mass.items()) / total, 1.0)


def reply_schema(criteria: Sequence[Criterion]) -> dict[str, Any]:
    """The JSON schema of a reply to ``criteria``, as ``response_format`` takes it: one entry for each, by number."""

    def entry(number: int, criterion: Criterion) -> dict[str, Any]:
        levels = list(range(len(criterion.levels)))
        answer = {"level": {"type": "integer", "enum": levels}} if levels else {"met": {"type": "boolean"}}
        properties = {"id": {"type": "string", "enum": [str(number)]}, **answer}
        return chat.closed_object(properties)

    entries = [entry(number, criterion) for number, criterion in enumerate(criteria, start=1)]
    answers = {
        "type": "array",
        "items": {"anyOf": entries} if len(entries) > 1 else entries[0],
        "minItems": len(entries),
        "maxItems": len(entries),
    }
    return chat.response_format("answers", chat.closed_object({"answers": answers}))


def render_prompt(request: JudgeRequest) -> str:
    """The prompt for one response and all its criteria; data is quoted, never run as a template."""
    return chat.render("judge_v2.jinja", prompt=request.prompt, response=request.response, criteria=request.criteria)


def render_single(request: JudgeRequest, criterion: Criterion) -> str:
    """The prompt for one response and one criterion."""
    return chat.render("judge_single_v2.jinja", prompt=request.prompt, response=request.response, criterion=criterion)


def template_hash(mode: Mode = "json") -> str:
    """SHA-256 of the template files that ``mode`` uses, 64 hex digits."""
    return chat.template_hash(_TEMPLATES[mode])
