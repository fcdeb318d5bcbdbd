"""What is sent and read, on connections that are kept, closed, cut, led elsewhere and proxied."""

import json
import ssl
import threading

import httpx2
import openai
import pytest

from rubric_data.endpoint import Endpoint, Limits
from rubric_data.wire import Wire
from tests.rubric_data.server import Server, completion, cut, failure
from tests.rubric_data.server import Wire as Played


def post(wire, url, body=b"{}"):
    return wire.fetch(httpx2.Request("POST", f"{url}/chat/completions", content=body))


@pytest.fixture
def wire_to():
    wires = []

    def make(server):
        wires.append(Wire(server.url, 5.0, ssl.create_default_context()))
        return wires[-1]

    yield make
    for wire in wires:
        wire.close()


def connections(server):
    """How many connections were accepted, by a count that the server keeps from here on."""
    seen, accept = [], server._server.get_request
    server._server.get_request = lambda: seen.append(1) or accept()
    return seen


def hang_up(handler):
    """A whole reply; then the server closes the connection without having said so."""
    raw = json.dumps(completion("ok")[2]).encode()
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(raw)))
    handler.send_header("X-Region", "Zürich")  # as Latin-1, which headers are by tradition
    handler.end_headers()
    handler.wfile.write(raw)


def chunked(handler):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"4\r\n[1, \r\n2\r\n2]\r\n0\r\n\r\n")


def test_a_connection_that_the_server_closed_is_opened_anew(serve, wire_to):
    server = serve(Played(hang_up))
    seen = connections(server)
    wire = wire_to(server)
    for _ in range(3):
        assert b"ok" in post(wire, server.url)
    assert len(seen) == 3 == len(server.requests)


def test_a_connection_is_kept_from_call_to_call(serve, wire_to, monkeypatch):
    server = serve(Played(chunked), completion("ok"), failure(400), completion("ok"))
    monkeypatch.setattr(server._server.RequestHandlerClass, "protocol_version", "HTTP/1.1")
    seen = connections(server)
    wire = wire_to(server)
    assert post(wire, server.url) == b"[1, 2]"
    assert b"ok" in post(wire, server.url)
    with pytest.raises(openai.APIStatusError, match="Error code: 400 - scripted 400") as caught:
        post(wire, server.url)
    assert caught.value.status_code == 400
    assert b"ok" in post(wire, server.url)
    assert len(seen) == 1


def test_what_is_left_of_a_cut_reply_is_no_part_of_the_next(serve, wire_to):
    server = serve(cut(completion("one")), completion("two"))
    wire = wire_to(server)
    with pytest.raises(openai.APIConnectionError):
        post(wire, server.url)
    assert b"two" in post(wire, server.url)


def test_a_redirect_is_followed_to_another_server(serve, wire_to):
    there = serve(completion("there"))
    here = serve((307, {"Location": f"{there.url}/elsewhere"}, {}))
    assert b"there" in post(wire_to(here), here.url, b'{"a": 1}')
    assert there.requests == [{"a": 1}]


def test_credentials_in_the_address_and_headers_arrive(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-1")
    server = serve(completion("ok"))
    Endpoint(server.url, api_key_env="MY_KEY").chat({"model": "é"}, threading.Event())
    assert (server.keys, server.requests) == (["Bearer sk-1"], [{"model": "é"}])
    Endpoint(server.url.replace("//", "//user:pass@")).chat({}, threading.Event())
    assert server.keys[1] == "Basic dXNlcjpwYXNz"


def test_a_proxy_of_the_environment_is_asked(monkeypatch):
    proxy = Server([completion("ok")])
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert Endpoint("http://nowhere.invalid/v1").chat({}, threading.Event())["choices"]
    proxy.close()


def test_all_threads_call_at_once_and_no_more_than_asked_for(serve):
    lock, full = threading.Lock(), threading.Event()
    now, most = 0, 0

    def slow(body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 8:
                full.set()
        full.wait(10)
        with lock:
            now -= 1
        return completion("ok")

    endpoint = Endpoint(serve(slow).url, limits=Limits(concurrency=8))
    groups = endpoint.stream(lambda number, stop: endpoint.chat({}, stop), range(40))
    assert sum(map(len, groups)) == 40 and full.is_set() and most == 8
