"""One HTTP call: a request out, a reply's bytes back, within a time and up to a size. Knows no budget and no meaning.

The SDK sends by httpx2, whose own connections are h11's: pure Python, a millisecond of the interpreter for each call,
which sixty calls in flight wait for. So the connections here are the standard library's; redirects, compression,
credentials in the address and the names of errors stay httpx2's. Behind a proxy its own connections serve.
"""

import http.client
import json
import selectors
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import httpx2
import openai

MOST_BYTES = 4 * 2**20  # of a reply, unpacked; a thousand verdicts with their reasons take a tenth of it
_PIECE = 2**16  # bytes read at once
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)  # the latter knows no more than 1,024 files
_PORTS = {"http": 80, "https": 443}


class BrokenReply(openai.OpenAIError):
    """Something came with status 200, but not what was asked for: a gateway's page, half a body, far too much."""


class Wire(openai.DefaultHttpxClient):
    """Sends requests to ``url`` and reads each reply within ``seconds`` in all. For one thread."""

    def __init__(self, url: str, seconds: float, tls: ssl.SSLContext) -> None:
        direct = None if _is_proxied(url) else _Direct(seconds, tls)
        super().__init__(timeout=seconds, verify=tls, transport=direct)
        self._seconds = seconds

    def __del__(self) -> None:  # as the SDK does with a client of its own making
        self.close()

    def fetch(self, request: httpx2.Request) -> bytes:
        """The body of the reply to ``request``. Raises an error of the SDK on a status that is no success, if there is
        no connection or it ends too soon, and if the time is up; BrokenReply if the body is longer than `MOST_BYTES`.
        """
        # the library's own time-out is for each piece of a body, however many there are, and it knows no limit of size
        deadline = time.monotonic() + self._seconds
        body = bytearray()
        try:
            with closing(self.send(request, stream=True)) as response:
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) > MOST_BYTES:
                        raise BrokenReply(f"the reply is longer than {MOST_BYTES / 2**20:g} MiB")
                    if time.monotonic() > deadline:
                        raise openai.APITimeoutError(request)
        except httpx2.TimeoutException as error:
            raise openai.APITimeoutError(request) from error
        except (httpx2.RequestError, ssl.SSLError) as error:
            raise openai.APIConnectionError(request=request) from error
        if not response.is_success:
            raise _status_error(response, bytes(body))
        return bytes(body)


def _is_proxied(url: str) -> bool:
    """Whether the environment has a proxy for ``url``."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    return bool(named) and not urllib.request.proxy_bypass(parts.hostname or "")


def _status_error(response: httpx2.Response, body: bytes) -> openai.APIStatusError:
    """The error of a status that is no success, with the server's own words where it has some."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    error = told.get("error", told) if isinstance(told, dict) else None
    words = error.get("message") if isinstance(error, dict) else None
    message = f"Error code: {response.status_code}" + (f" - {words}" if isinstance(words, str) and words else "")
    return openai.APIStatusError(message, response=response, body=told)


class _Direct(httpx2.BaseTransport):
    """One connection, kept open from call to call."""

    def __init__(self, seconds: float, tls: ssl.SSLContext) -> None:
        self._seconds = seconds
        self._tls = tls
        self._origin = ("", "", 0)  # scheme, host, port
        self._connection: http.client.HTTPConnection | None = None

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """See `httpx2.BaseTransport`."""
        url = request.url
        with self.failures():
            connection = self._connected((url.scheme, url.raw_host.decode(), url.port or _PORTS[url.scheme]))
            connection.request(request.method, url.raw_path.decode(), request.read(), dict(request.headers))
            reply = connection.getresponse()
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.getheaders()]
        return httpx2.Response(reply.status, headers=headers, stream=_Body(reply, self))

    def close(self) -> None:
        """Close the connection; another call would open a new one."""
        if self._connection is not None:
            self._connection.close()

    @contextmanager
    def failures(self) -> Iterator[None]:
        """What goes wrong in the block under httpx2's names; the connection is closed then."""
        try:
            yield
        except TimeoutError as error:
            self.close()
            raise httpx2.ReadTimeout(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise httpx2.ReadError(str(error) or type(error).__name__) from error

    def _connected(self, origin: tuple[str, str, int]) -> http.client.HTTPConnection:
        """The connection to ``origin``, opened anew if it was to another or the server has closed it."""
        connection = self._connection
        if connection is None or origin != self._origin:
            self.close()
            scheme, host, port = self._origin = origin
            if scheme == "https":
                connection = http.client.HTTPSConnection(host, port, timeout=self._seconds, context=self._tls)
            else:
                connection = http.client.HTTPConnection(host, port, timeout=self._seconds)
            self._connection = connection
        elif connection.sock is not None and _is_readable(connection.sock):  # nothing was asked, so this is the end
            connection.close()
        return connection


class _Body(httpx2.SyncByteStream):
    """The body of ``reply`` as it comes in."""

    def __init__(self, reply: http.client.HTTPResponse, transport: _Direct) -> None:
        self._reply = reply
        self._transport = transport
        self._is_whole = False

    def __iter__(self) -> Iterator[bytes]:
        with self._transport.failures():
            while piece := self._reply.read1(_PIECE):
                yield piece
            if self._reply.length:
                raise http.client.IncompleteRead(b"", self._reply.length)
        self._is_whole = True

    def close(self) -> None:
        self._reply.close()
        if not self._is_whole:  # what is left of it would pass for the next reply
            self._transport.close()


def _is_readable(connection: socket.socket) -> bool:
    with _Selector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))
