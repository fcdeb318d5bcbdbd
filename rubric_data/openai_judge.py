"""A judge behind any OpenAI-compatible chat endpoint. Owns the calls, their retries and what a failure means.

The prompt is `templates/judge_v1.jinja`; reading the reply is `rubric_data.judges.read_answers`.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, partial
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import jinja2
import openai
import tenacity

from rubric_data.errors import UserError
from rubric_data.judges import JudgeRequest, masked_verdicts, read_answers
from rubric_data.records import Verdict

TEMPLATE_NAME = "judge_v1.jinja"
MAX_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_SETUP_ERRORS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


def render_prompt(request: JudgeRequest) -> str:
    """The judge's prompt for one response and all its criteria; data is quoted, never run as a template."""
    return _template()[0].render(prompt=request.prompt, response=request.response, criteria=request.criteria)


def template_hash() -> str:
    """SHA-256 of the template file, 64 hex digits."""
    return _template()[1]


@cache
def _template() -> tuple[jinja2.Template, str]:
    source = files("rubric_data").joinpath("templates", TEMPLATE_NAME).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["data"] = _as_data
    return environment.from_string(source), hashlib.sha256(source.encode()).hexdigest()


def _as_data(value: str) -> str:
    # "<" is escaped as well: servers turn "<|im_end|>" and the like into control tokens wherever they stand
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


class OpenAIJudge:
    """Asks an OpenAI-compatible endpoint; all criteria of a response go into one call.

    ``base_url`` None means OpenAI's own. ``api_key_env`` names the environment variable with the key, which
    only OpenAI's own endpoint insists on. ``timeout`` in seconds for one try, ``attempts`` tries for one
    call, ``concurrency`` calls in flight. ``temperature`` None leaves it to the endpoint (some models take
    no other), ``max_tokens`` None the length of a reply. Raises UserError on a bad argument or a missing key.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        attempts: int = 4,
        concurrency: int = 8,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
    ) -> None:
        positive = {"timeout": timeout, "attempts": attempts, "concurrency": concurrency, "max_tokens": max_tokens}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise UserError(f"openai judge: {name} must be positive, got {value}; raise it")
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise UserError(f"openai judge: base_url must start with http:// or https://, got {base_url!r}; correct it")
        key = os.environ.get(api_key_env)
        if not key and base_url is None:
            raise UserError(f"openai judge: no API key; set ${api_key_env}, or name your own endpoint by base_url")
        self.name = _judge_name(model, base_url, temperature)
        self.template = template_hash()
        self._model = model
        self._timeout = timeout
        self._attempts = attempts
        self._concurrency = concurrency
        options = {"temperature": temperature, "max_completion_tokens": max_tokens}
        self._options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self._key_hint = f"check ${api_key_env}, the model's name and base_url"
        self._client = openai.OpenAI(
            api_key=key or "none",
            base_url=base_url or "https://api.openai.com/v1",  # else the SDK would take one from the environment
            timeout=timeout,
            max_retries=0,
        )

    def judge(self, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
        """Verdicts aligned with each request's criteria; what fails after all tries is masked.

        Raises UserError if the endpoint refuses the key or does not know the model.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(max_workers=self._concurrency, thread_name_prefix="judge")
        try:
            calls = [pool.submit(self._judge_one, request, stop) for request in requests]
            return [call.result() for call in calls]
        finally:  # on an interrupt: start no further call, then end every wait between tries
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()

    def _judge_one(self, request: JudgeRequest, stop: threading.Event) -> tuple[Verdict, ...]:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=_wait,
            sleep=partial(_sleep, stop),
            reraise=True,
        )
        try:
            completion = retrying(self._call, render_prompt(request))
        except _SETUP_ERRORS as error:
            raise UserError(f"judge {self.name}: {_one_line(error)}; {self._key_hint}") from None
        except (openai.OpenAIError, ValueError) as error:
            kind, detail = _failure(error, self._timeout)
            return masked_verdicts(request.criteria, kind, detail, judge=self.name)
        return self._read(completion, request)

    def _call(self, prompt: str) -> Any:
        messages: Any = [{"role": "user", "content": prompt}]
        return self._client.chat.completions.create(model=self._model, messages=messages, **self._options)

    def _read(self, completion: Any, request: JudgeRequest) -> tuple[Verdict, ...]:
        choices = getattr(completion, "choices", None)
        if not choices or choices[0].message is None:
            detail = "the endpoint's reply is not a chat completion"
            return masked_verdicts(request.criteria, "parse_failure", detail, judge=self.name, raw=str(completion))
        message, finish = choices[0].message, choices[0].finish_reason
        reply = message.content or ""
        if message.refusal or finish == "content_filter":
            detail = message.refusal or "stopped by the endpoint's content filter"
            return masked_verdicts(request.criteria, "refusal", detail[:200], judge=self.name, raw=reply)
        if finish == "length":
            detail = "the reply was cut off at the endpoint's token limit"
            return masked_verdicts(request.criteria, "parse_failure", detail, judge=self.name, raw=reply)
        return read_answers(reply, request.criteria, judge=self.name)


def _judge_name(model: str, base_url: str | None, temperature: float | None) -> str:
    """Identity of the judge; the endpoint belongs to it, as 'default' may be any model, but its password does not."""
    name = f"openai:{model}"
    if base_url is not None:
        parts = urlsplit(base_url)
        name += f"@{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return name if temperature == 0 else f"{name}?temperature={temperature}"


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)  # time-outs included


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that a response asks to wait (Retry-After in seconds or as an HTTP date); None if it does not say."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(said)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds())


_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=MAX_WAIT)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = retry_after(error.response.headers, datetime.now(UTC)) if isinstance(error, openai.APIStatusError) else None
    return min(_backoff(state) if asked is None else asked, MAX_WAIT)


def _sleep(stop: threading.Event, seconds: float) -> None:
    if stop.wait(seconds):
        raise CancelledError


def _failure(error: Exception, timeout: float) -> tuple[str, str]:
    """Kind of reason and detail of a call that brought no reply."""
    if isinstance(error, openai.APITimeoutError):
        return "timeout", f"no reply within {timeout:g} s"
    if isinstance(error, openai.APIConnectionError):
        return "connection", f"no connection ({_one_line(error.__cause__ or error)})"
    if isinstance(error, openai.RateLimitError):
        return "rate_limit", _one_line(error)
    if isinstance(error, openai.APIStatusError):
        return "server_error" if error.status_code >= 500 else "rejected", _one_line(error)
    return "server_error", f"the reply is not JSON ({_one_line(error)})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
