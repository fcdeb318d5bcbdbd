"""Paid calls to an OpenAI-compatible server: concurrency, retries, rate limits, budgets. Knows no prompt and no reply.

Every try is counted before it is sent, its tokens when they are known and its failure by kind, so that what a run cost
can be told to the last failed call. A reply is JSON of at most `rubric_data.wire.MOST_BYTES`, or it is no reply.

The SDK says where a call goes, under which headers, and what its failures are called. Its typed layer is left out: it
would take a millisecond of the interpreter for each call, and fit whatever comes into its own types, or fail at it in
ways of its own. `rubric_data.wire` sends and reads.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import openai
import tenacity

from rubric_data.config import EndpointConfig
from rubric_data.errors import UserError
from rubric_data.judges import no_repeats
from rubric_data.spending import Spent
from rubric_data.wire import BrokenReply, Wire

MAX_WAIT = 60.0  # seconds between two tries, whatever the server asks for
GATHER = 0.25  # seconds: what finishes within them is handed over together
_SETUP_STATUS = (401, 403, 404)  # the key is refused, or there is no such model or path
_MILLION = 1_000_000
_MOST_TOKENS = 10**9  # that one reply can have used; beyond, the server miscounts
CHARACTERS = 4  # of a token, about: for a guess at a call's size before it is sent


class BudgetSpent(Exception):
    """No further call may be made. The message says which budget is used up."""


NO_REPLY = (openai.OpenAIError, BudgetSpent)  # what `Endpoint.failure` explains

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What calls may take. Raises UserError on a number that is not positive.

    ``timeout`` seconds for one try, ``attempts`` tries for one call, ``concurrency`` calls in flight. Rates are
    per minute. Budgets hold for the lifetime of an `Endpoint`; calls in flight when one is used up are still paid.
    ``max_cost`` is in the currency of the two prices, which are per million tokens.
    """

    timeout: float = 60.0
    attempts: int = 4
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_calls: int | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise UserError(f"endpoint: {name} must be positive, got {value}; raise it")
        if self.max_cost is not None and self.price_in is None and self.price_out is None:
            raise UserError("endpoint: max_cost needs prices; set price_in and price_out, per million tokens")


# what a resumed run may change, as no reply depends on it
FREE = frozenset({"api_key_env", *(field.name for field in fields(Limits))})


class Bucket:
    """A token bucket: ``per_minute`` units flow in evenly, at most a minute's worth is held, and it starts full."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = self._level = per_minute
        self._clock = clock
        self._then = clock()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Take ``amount`` out, into debt if need be; returns the seconds after which the debt is paid."""
        with self._lock:
            now = self._clock()
            self._level = min(self._level + (now - self._then) * self._per_minute / 60, self._per_minute)
            self._then = now
            self._level -= amount
            return max(0.0, -self._level * 60 / self._per_minute)


class Account:
    """What calls may take and have taken: budgets, rates, sums. For any number of threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._prices = (limits.price_in, limits.price_out)
        self._spent = Spent(cost=None if self._prices == (None, None) else 0.0)
        self._lock = threading.Lock()
        rates = (limits.requests_per_minute, limits.tokens_per_minute)
        self._requests, self._tokens = (None if rate is None else Bucket(rate) for rate in rates)

    def spent(self) -> Spent:
        """What was used so far."""
        with self._lock:
            return replace(self._spent, failed=dict(self._spent.failed))

    def admit(self, likely_tokens: int) -> float:
        """Count one more call; the seconds to wait before it is sent. Raises BudgetSpent if a budget does not allow it.

        ``likely_tokens``: a guess at its size, for the rate limit; `settle` corrects it.
        """
        with self._lock:
            limits, spent = self._limits, self._spent
            used = (
                ("max_calls", spent.calls, limits.max_calls),
                ("max_total_tokens", spent.tokens_in + spent.tokens_out, limits.max_total_tokens),
                ("max_cost", spent.cost or 0.0, limits.max_cost),
            )
            for name, amount, most in used:
                if most is not None and amount >= most:
                    raise BudgetSpent(f"{name} {most:g} is spent")
            spent.calls += 1
        wants = ((self._requests, 1), (self._tokens, likely_tokens))
        return max((bucket.take(amount) for bucket, amount in wants if bucket), default=0.0)

    def settle(self, tokens: tuple[int, int] | None, likely_tokens: int) -> None:
        """Count the tokens read and written of a reply; None: it told none."""
        with self._lock:
            if tokens is None:
                self._spent.unmetered += 1
                return
            self._spent.tokens_in += tokens[0]
            self._spent.tokens_out += tokens[1]
            if self._spent.cost is not None:
                priced = zip(tokens, self._prices, strict=True)
                self._spent.cost += sum(count * (price or 0.0) for count, price in priced) / _MILLION
        if self._tokens:
            self._tokens.take(sum(tokens) - likely_tokens)

    def count_retry(self) -> None:
        """Count a call as another try of the one before."""
        with self._lock:
            self._spent.retries += 1

    def count_failure(self, kind: str) -> None:
        """Count a call as one that brought no reply, for this kind of reason."""
        with self._lock:
            self._spent.failed[kind] = self._spent.failed.get(kind, 0) + 1


class Endpoint:
    """A server, and everything a caller owes it.

    ``base_url`` None means OpenAI's own, which alone insists on the key in ``$api_key_env``. ``account`` None is one
    of its own; several endpoints on one account share its budgets and rates. Raises UserError on a bad argument or a
    missing key.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        limits: Limits = Limits(),
        account: Account | None = None,
    ):
        self.place = place_of(base_url)
        key = os.environ.get(api_key_env)
        if not key and base_url is None:
            raise UserError(f"endpoint: no API key; set ${api_key_env}, or name your own endpoint by base_url")
        self.limits = limits
        self.account = account or Account(limits)
        self.key_hint = f"check ${api_key_env}, the model's name and base_url"
        self._base_url = base_url or "https://api.openai.com/v1"  # else the SDK would take one from the environment
        self._tls = httpx2.create_ssl_context()
        self._local = threading.local()
        sdk = openai.OpenAI(api_key=key or "none", base_url=self._base_url, http_client=self._wire)
        self._url = str(sdk.base_url).rstrip("/")
        self._headers = sdk.auth_headers | {
            name: value for name, value in sdk.default_headers.items() if isinstance(value, str)
        }
        self._requests: dict[str, httpx2.Request] = {}  # by path, one that others are made like

    @property
    def spent(self) -> Spent:
        """What the calls have used so far."""
        return self.account.spent()

    def stream(
        self, ask: "Callable[[Item, threading.Event], Result]", items: Iterable[Item]
    ) -> Generator[list[tuple[int, Result]], None, None]:
        """``ask(item, stop)`` for every item, `Limits.concurrency` at a time; (place, result) pairs as they finish.

        What finishes within `GATHER` seconds comes in one list. Calls go on while the caller deals with a list, as
        items are taken twice `Limits.concurrency` ahead. The first error ends it, after what finished before.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(max_workers=self.limits.concurrency, thread_name_prefix="judge")
        finished: SimpleQueue[tuple[int, Future[Result]]] = SimpleQueue()
        waiting = enumerate(items)
        begun, due, ready = 0, 0.0, list[tuple[int, Result]]()
        try:
            while True:
                for place, item in islice(waiting, 2 * self.limits.concurrency - begun):
                    pool.submit(ask, item, stop).add_done_callback(partial(_announce, finished, place))
                    begun += 1
                if ready and (not begun or time.monotonic() >= due):
                    handed, ready = ready, []
                    yield handed
                elif begun:
                    try:
                        place, call = finished.get(timeout=max(0.0, due - time.monotonic()) if ready else None)
                    except Empty:
                        continue
                    begun -= 1
                    due = due if ready else time.monotonic() + GATHER
                    ready.append((place, call.result()))
                else:
                    return
        except BaseException:  # an interrupt too: what has been paid is handed over before it goes on
            if ready:
                yield ready
            raise
        finally:  # start no further call, then end every wait between tries
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()

    def chat(self, body: Mapping[str, Any], stop: threading.Event, *, likely_tokens: int = 0) -> dict[str, Any]:
        """One chat completion, as JSON values that nobody has checked but for ``choices`` not being empty.

        ``likely_tokens``: a guess at its size, for the rate limit; usage corrects it. Raises UserError if the server
        refuses the key or does not know the model, BudgetSpent before a call that no budget allows, and one of
        `NO_REPLY` after the last try.
        """
        return self.post("/chat/completions", body, stop, holds="choices", likely_tokens=likely_tokens)

    def post(
        self, path: str, body: Mapping[str, Any], stop: threading.Event, *, holds: str, likely_tokens: int = 0
    ) -> dict[str, Any]:
        """The JSON reply to ``body`` at ``path`` below the base URL, with something in ``holds``. Raises as `chat`."""
        like = self._requests.get(path)
        if like is None:  # address and headers are the same for every call, and take long to make
            like = self._wire.build_request("POST", self._url + path, headers=self._headers)
            del like.headers["content-length"]
            self._requests[path] = like
        content = json.dumps(body, ensure_ascii=False).encode()
        request = httpx2.Request("POST", like.url, headers=like.headers, content=content, extensions=like.extensions)
        return self._call(request, holds, stop, likely_tokens)

    def failure(self, error: Exception) -> tuple[str, str]:
        """Kind of reason (see `rubric_data.judges`) and detail of a call that brought no reply."""
        if isinstance(error, BudgetSpent):
            return "budget", str(error)
        if isinstance(error, openai.APITimeoutError):
            return "timeout", f"no reply within {self.limits.timeout:g} s"
        if isinstance(error, openai.APIConnectionError):
            return "connection", f"no connection ({one_line(error.__cause__ or error)})"
        if isinstance(error, openai.APIStatusError):
            return status_kind(error.status_code), one_line(error)
        return "server_error", one_line(error)

    @property
    def _wire(self) -> Wire:
        """The calling thread's own: among the connections of all threads it takes long to find a free one."""
        if not hasattr(self._local, "wire"):
            self._local.wire = Wire(self._base_url, self.limits.timeout, self._tls)
        return self._local.wire

    def _call(self, request: httpx2.Request, holds: str, stop: threading.Event, likely_tokens: int) -> dict[str, Any]:
        def once() -> dict[str, Any]:
            if wait := self.account.admit(likely_tokens):
                _sleep(stop, wait)
            try:
                reply = read_reply(self._wire.fetch(request), holds)
            except openai.OpenAIError as error:
                self.account.count_failure(self.failure(error)[0])
                raise
            self.account.settle(tokens_of(reply), likely_tokens)
            return reply

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            stop=tenacity.stop_after_attempt(self.limits.attempts),
            wait=_wait,
            sleep=partial(_sleep, stop),
            before_sleep=lambda _: self.account.count_retry(),
            reraise=True,
        )
        try:
            return retrying(once)
        except openai.APIStatusError as error:
            if error.status_code not in _SETUP_STATUS:
                raise
            raise UserError(f"endpoint{self.place}: {one_line(error)}; {self.key_hint}") from None


def _announce(finished: "SimpleQueue[tuple[int, Future[Result]]]", place: int, call: "Future[Result]") -> None:
    finished.put((place, call))


def read_reply(raw: bytes, holds: str) -> dict[str, Any]:
    """A reply's JSON, strings without lone surrogates; raises BrokenReply unless its ``holds`` is not empty.

    A key that is given twice has no value.
    """
    try:
        reply = without_surrogates(json.loads(raw, object_pairs_hook=no_repeats))
        text = json.dumps(reply, ensure_ascii=False)
    except RecursionError:
        raise BrokenReply("the reply is JSON nested too deeply") from None
    except ValueError as error:
        raise BrokenReply(f"the reply is not JSON ({one_line(error)})") from None
    if not isinstance(reply, dict) or not isinstance(found := reply.get(holds), list | dict) or not found:
        raise BrokenReply(f"the reply holds no {holds} but {text[:80]}")
    return reply


def place_of(base_url: str | None) -> str:
    """Where a server is, without its password: '@host/path', '' for OpenAI's own. Raises UserError if it is no URL."""
    if base_url is None:
        return ""
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"endpoint: base_url must start with http:// or https://, got {base_url!r}; correct it")
    parts = urlsplit(base_url)
    return f"@{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def status_kind(status: int) -> str:
    """Kind of reason (see `rubric_data.judges`) of a reply with an HTTP status that is no success."""
    if status == 429:
        return "rate_limit"
    return "server_error" if status >= 500 else "rejected"


def limits_of(config: EndpointConfig) -> Limits:
    """What ``config`` allows a server's calls. Raises UserError on a bad number."""
    return Limits(**{field.name: getattr(config, field.name) for field in fields(Limits)})


def open_endpoint(config: EndpointConfig, account: Account | None = None) -> Endpoint:
    """The endpoint that ``config`` describes; its calls go on ``account``. Raises UserError as `Limits`, `Endpoint`."""
    return Endpoint(config.base_url, api_key_env=config.api_key_env, limits=limits_of(config), account=account)


def without_surrogates(value: Any) -> Any:
    """JSON values with "?" for half a surrogate pair, which JSON can spell and no file can hold."""
    text = json.dumps(value, ensure_ascii=False)
    return value if text.isascii() else json.loads(text.encode("utf-8", "replace"))


def tokens_of(reply: Mapping[str, Any]) -> tuple[int, int] | None:
    """Tokens read and written, from the ``usage`` of a reply; None if it does not tell them, or says none at all."""
    usage = reply.get("usage")
    told = usage if isinstance(usage, Mapping) else {}
    found = [told.get(name) for name in ("prompt_tokens", "input_tokens", "completion_tokens", "output_tokens")]
    counts = [count if isinstance(count, int) and 0 < count < _MOST_TOKENS else 0 for count in found]
    return (counts[0] or counts[1], counts[2] or counts[3]) if any(counts) else None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | BrokenReply)  # time-outs included


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


def one_line(error: BaseException) -> str:
    """What ``error`` says, in at most 200 characters without line breaks."""
    return " ".join(str(error).split())[:200]
