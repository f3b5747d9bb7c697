"""http and routes: one meaning for each request, and the table of docs/protocol.md in both directions."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import http as ddb_http
from ddb import wire
from ddb.errors import (
    BadRequest,
    DdbError,
    Forbidden,
    NoLeader,
    NotLeader,
    Overloaded,
    ReadOnly,
    TooLarge,
    WrongCluster,
)
from ddb.http import Ask, Continue, HttpCutter, HttpError, Request, Response, Route
from ddb.routes import node_routes, registry_routes
from ddb.server import Limits, Slot
from tests.serving import Echo, read_all, running, talk

DATE = "Mon, 23 Nov 2026 06:00:00 GMT"


def cut(stream: bytes, limit: int = 1000) -> tuple[list[Any], DdbError | None]:
    """What a cutter makes of `stream`."""
    cutter = HttpCutter(limit)
    return cutter.feed(stream), cutter.error


def one(stream: bytes) -> Request:
    """The one request in `stream`."""
    (request,), error = cut(stream)
    assert error is None and isinstance(request, Request)
    return request


# --- bytes to requests


def test_a_plain_request_is_understood() -> None:
    request = one(b"GET /kv/a%20b?read=stale&x=%C3%A9&y HTTP/1.1\r\nHost: here:1\r\nX-Thing:  two words \r\n\r\n")
    assert (request.method, request.path) == ("GET", "/kv/a%20b")
    assert request.query == {"read": "stale", "x": "é", "y": ""}
    assert request.headers == {"host": "here:1", "x-thing": "two words"}
    assert request.body == b"" and request.keep_alive


@pytest.mark.parametrize(
    ("head", "keep_alive"),
    [
        (b"GET / HTTP/1.1\r\nHost: x", True),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close", False),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, CLOSE", False),
        (b"GET / HTTP/1.0", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive", True),
        (b"GET / HTTP/1.9\r\nHost: x", True),
    ],
)
def test_the_connection_persists_as_the_client_says(head: bytes, keep_alive: bool) -> None:
    assert one(head + b"\r\n\r\n").keep_alive is keep_alive


def test_a_body_by_length_and_one_in_chunks_are_the_same() -> None:
    by_length = one(b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\nhello world")
    in_chunks = one(
        b"PUT /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n"
        b"6;name=value\r\nhello \r\n005\r\nworld\r\n0\r\nTrailer: thing\r\n\r\n"
    )
    assert by_length.body == in_chunks.body == b"hello world"


def test_requests_may_be_pipelined_and_parted_by_empty_lines() -> None:
    requests, error = cut(b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert [request.path for request in requests] == ["/1", "/2"] and error is None


def test_the_absolute_form_names_the_same_path() -> None:
    assert one(b"GET http://here:80/kv/a?b=c HTTP/1.1\r\nHost: here\r\n\r\n").path == "/kv/a"


def test_expecting_100_continue_is_asked_for_the_body_once() -> None:
    cutter = HttpCutter(1000)
    head = b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    assert cutter.feed(head) == [Continue()]
    (request,) = cutter.feed(b"ok")
    assert isinstance(request, Request) and request.body == b"ok"
    assert len(cutter.feed(head + b"ok")) == 1  # the body is here already: nobody waits


GOOD = (
    b"PUT /kv/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    b"GET /kv/b?x=1 HTTP/1.1\r\nHost: x\r\n\r\nPOST /rpc HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
)


@given(st.lists(st.integers(0, len(GOOD))))
def test_requests_survive_any_chunking(cuts: list[int]) -> None:
    places = sorted({0, len(GOOD), *cuts})
    cutter = HttpCutter(1000)
    requests: list[Any] = [r for a, b in itertools.pairwise(places) for r in cutter.feed(GOOD[a:b])] + cutter.finish()
    assert [(r.method, r.path, r.body) for r in requests] == [
        ("PUT", "/kv/a", b"abcde"),
        ("GET", "/kv/b", b""),
        ("POST", "/rpc", b"body"),
    ]
    assert cutter.error is None and len(cutter) == 0


@given(
    st.lists(
        st.sampled_from([b"GET ", b"/ ", b"HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n", b"\n", b"Content-Length: 1\r\n"])
        | st.sampled_from([b"Transfer-Encoding: chunked\r\n", b"1\r\n", b"x", b"0\r\n", b"POST ", b" ", b"\x00"])
        | st.binary(max_size=5)
    ),
    st.lists(st.integers(0)),
)
@settings(max_examples=300)
def test_the_verdict_on_garbage_does_not_depend_on_its_chunks(parts: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(parts)
    whole = HttpCutter(100)
    expected = whole.feed(stream) + whole.finish()
    places = sorted({0, len(stream), *(c % (len(stream) + 1) for c in cuts)})
    cutter = HttpCutter(100)
    got = [r for a, b in itertools.pairwise(places) for r in cutter.feed(stream[a:b])] + cutter.finish()
    assert [r for r in got if isinstance(r, Request)] == [r for r in expected if isinstance(r, Request)]
    assert type(cutter.error) is type(whole.error)


H = b" HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("stream", "status"),
    [
        (b"GET /\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
        (b"GET / http/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET nowhere" + H + b"\r\n", 400),
        (b"GET /#fragment" + H + b"\r\n", 400),
        (b"GET /?x=%ff" + H + b"\r\n", 400),
        (b"GET /?" + b"x=1&" * 200 + H + b"\r\n", 400),
        (b"GET /\xc3\xa9" + H + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /" + H + b"Host: y\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"BREW /pot" + H + b"\r\n", 501),
        (b"GET /" + H + b"Bad Header: x\r\n\r\n", 400),
        (b"GET /" + H + b"Name : x\r\n\r\n", 400),
        (b"GET /" + H + b": x\r\n\r\n", 400),
        (b"GET /" + H + b"no colon\r\n\r\n", 400),
        (b"GET /" + H + b"A: b\r\n folded\r\n\r\n", 400),
        (b"GET /" + H + b"A: b\x00c\r\n\r\n", 400),
        (b"GET /" + H + b"A: b\rc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\n", 400),
        (b"\nGET /" + H + b"\r\n", 400),
        (b"GET /" + H + b"A: " + b"x" * 65536, 431),
        (b"GET /" + H + b"A: x\r\n" * 101 + b"\r\n", 431),
        (b"PUT /a" + H + b"\r\n", 411),
        (b"POST /rpc" + H + b"\r\n", 411),
        (b"PUT /a" + H + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: 1, 1\r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: +1\r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: -1\r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: 0x1\r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: 1_0\r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: \r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: \xb2\r\n\r\nx", 400),
        (b"PUT /a" + H + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"PUT /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n1\nx\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 5000, 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n0\r\nno trailer\r\n\r\n", 400),
        (b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: x\r\n" * 20_000, 431),
        (b"PUT /a" + H + b"Content-Length: 1\r\nExpect: magic\r\n\r\nx", 417),
    ],
)
def test_what_may_mean_two_things_means_none(stream: bytes, status: int) -> None:
    for before in (b"", b"GET /before" + H + b"\r\n"):
        requests, error = cut(before + stream + b"GET /smuggled" + H + b"\r\n")
        assert isinstance(error, HttpError) and error.status == status
        assert [request.path for request in requests] == (["/before"] if before else [])
        assert error.message.endswith(".")


@pytest.mark.parametrize(
    "stream",
    [
        b"PUT /a" + H + b"Content-Length: 1001\r\n\r\n",
        b"PUT /a" + H + b"Content-Length: 99999999999999999\r\n\r\n",
        b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n",
        b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff0\r\n",
    ],
)
def test_a_body_over_the_limit_is_refused_before_it_is_sent(stream: bytes) -> None:
    requests, error = cut(stream)
    assert type(error) is TooLarge and not requests


def test_many_small_chunks_do_not_escape_the_limit() -> None:
    _, error = cut(b"PUT /a" + H + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1001)
    assert type(error) is TooLarge


# --- requests to answers


def ask(
    method: str,
    target: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    routes: tuple[Route, ...] | None = None,
) -> Any:
    """What the routes make of a request: an Ask, a Response, or the response to what they raise."""
    path, _, _ = target.partition("?")
    request = ddb_http.parse_head(f"{method} {target} HTTP/1.1\r\nHost: here".encode())
    names = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
    request = Request(method, target, path, request.query, {"host": "here", **names}, body)
    try:
        return ddb_http.answer(node_routes() if routes is None else routes, request)
    except DdbError as error:
        return ddb_http.refusal(error)


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("GET", "/kv/a", {"op": "get", "key": "a"}),
        ("HEAD", "/kv/a", {"op": "get", "key": "a"}),
        ("GET", "/kv/a/b//c", {"op": "get", "key": "a/b//c"}),
        ("GET", "/kv/%C3%A9%2F%25+x", {"op": "get", "key": "é/%+x"}),
        ("GET", "/kv/", {"op": "get", "key": ""}),  # the service refuses the empty key
        ("GET", "/kv/a?read=stale&max_lag=0.5", {"op": "get", "key": "a", "read": "stale", "max_lag": 0.5}),
        ("GET", "/kv/a?timeout=2&forward=false", {"op": "get", "key": "a", "timeout": 2.0, "forward": False}),
        ("DELETE", "/kv/a", {"op": "delete", "key": "a"}),
        ("GET", "/kv", {"op": "scan"}),
        ("GET", "/kv?prefix=p%2F&limit=10", {"op": "scan", "prefix": "p/", "limit": 10}),
        ("GET", "/kv?start=a&end=b&reverse=1", {"op": "scan", "start": "a", "end": "b", "reverse": True}),
        ("GET", "/kv?keys_only&read=stale", {"op": "scan", "keys_only": True, "read": "stale"}),
        ("GET", "/status", {"op": "status"}),
        ("GET", "/members", {"op": "members"}),
        ("GET", "/readyz", {"op": "ready"}),
    ],
)
def test_each_path_asks_for_its_operation(method: str, target: str, expected: dict[str, Any]) -> None:
    asked = ask(method, target)
    assert isinstance(asked, Ask) and asked.request == expected


@pytest.mark.parametrize(
    ("body", "content_type", "value"),
    [
        (b"plain \xc3\xa9", None, "plain é"),
        (b'{"a":1}', "text/plain", '{"a":1}'),
        (b'{"a":1}', "application/x-www-form-urlencoded", '{"a":1}'),
        (b'{"a":1}', "application/json", {"a": 1}),
        (b" [1] ", "Application/JSON; charset=utf-8", [1]),
        (b"null", "application/vnd.thing+json", None),
        (b"", None, ""),
    ],
)
def test_a_body_is_json_where_the_client_says_so_and_else_text(body: bytes, content_type: str, value: Any) -> None:
    headers = {"content_type": content_type} if content_type else {}
    assert ask("PUT", "/kv/a", body, headers).request == {"op": "put", "key": "a", "value": value}


@pytest.mark.parametrize(
    ("headers", "conditions"),
    [
        ({"if_match": '"12"'}, [{"rev": 12, "op": "="}]),
        ({"if_match": "*"}, [{"exists": True}]),
        ({"if_none_match": "*"}, [{"exists": False}]),
        ({"if_none_match": '"12", "13"'}, [{"rev": 12, "op": "!="}, {"rev": 13, "op": "!="}]),
        ({"if_match": '"12"', "if_none_match": '"13"'}, [{"rev": 12, "op": "="}, {"rev": 13, "op": "!="}]),
        ({"if_none_match": '"of-another-kind"'}, None),
    ],
)
def test_etags_become_the_condition_of_the_write(headers: dict[str, str], conditions: list[Any] | None) -> None:
    for method in ("PUT", "DELETE"):
        assert ask(method, "/kv/a", b"v", headers).request.get("if") == conditions


@pytest.mark.parametrize("tag", ['W/"12"', '"abc"', "12", '"1e1"', '"-1"', '"99999999999999999999999"'])
def test_an_etag_that_is_not_ours_matches_nothing(tag: str) -> None:
    assert ask("PUT", "/kv/a", b"v", {"if_match": tag}).status == 412


@pytest.mark.parametrize(
    ("method", "target", "body", "headers", "status"),
    [
        ("GET", "/nowhere", b"", {}, 404),
        ("GET", "/kvx", b"", {}, 404),
        ("POST", "/kv/a", b"", {}, 405),
        ("DELETE", "/kv", b"", {}, 405),
        ("GET", "/rpc", b"", {}, 405),
        ("GET", "/kv/%FF", b"", {}, 400),
        ("GET", "/kv?limit=ten", b"", {}, 400),
        ("GET", "/kv?limit=1_0", b"", {}, 400),
        ("GET", "/kv?limit=", b"", {}, 400),
        ("GET", "/kv?reverse=perhaps", b"", {}, 400),
        ("GET", "/kv/a?timeout=nan", b"", {}, 400),
        ("GET", "/kv/a?max_lag=inf", b"", {}, 400),
        ("PUT", "/kv/a", b"\xff", {}, 400),
        ("PUT", "/kv/a", b"{", {"content_type": "application/json"}, 400),
        ("PUT", "/kv/a", b"NaN", {"content_type": "application/json"}, 400),
        ("PUT", "/kv/a", b"v", {"if_match": '"1", "2"'}, 400),
        ("POST", "/rpc", b"[]", {}, 400),
        ("POST", "/rpc", b"", {}, 400),
        ("POST", "/rpc", b"{}", {"origin": "https://evil.example"}, 403),
        ("PUT", "/kv/a", b"v", {"origin": "null"}, 403),
    ],
)
def test_what_does_not_fit_gets_its_status_and_a_sentence(
    method: str, target: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    response = ask(method, target, body, headers)
    assert isinstance(response, Response) and response.status == status
    content = json.loads(response.body)
    assert content["ok"] is False and content["message"].endswith(".")


def test_405_says_what_is_allowed() -> None:
    assert ("Allow", "DELETE, GET, HEAD, OPTIONS, PUT") in ask("POST", "/kv/a").headers
    assert ("Allow", "OPTIONS, POST") in ask("OPTIONS", "/rpc").headers


def test_a_page_of_the_same_origin_may_write() -> None:
    assert isinstance(ask("POST", "/rpc", b'{"op":"ping"}', {"origin": "http://here"}), Ask)


def test_the_registry_has_no_keys() -> None:
    assert ask("GET", "/kv/a", routes=registry_routes()).status == 404
    assert ask("GET", "/nodes", routes=registry_routes()).request == {"op": "nodes"}


# --- answers to responses


def found(value: Any) -> bytes:
    """A reply to `get`."""
    return wire.encode({"ok": True, "found": True, "key": "a", "value": value, "rev": 12, "created": 3, "version": 4})


@pytest.mark.parametrize(
    ("value", "accept", "content_type", "body"),
    [
        ("text é", None, "text/plain; charset=utf-8", "text é".encode()),
        ("text", "application/json", "application/json", b'"text"'),
        ({"b": [1]}, None, "application/json", b'{"b":[1]}'),
        (None, None, "application/json", b"null"),
    ],
)
def test_a_value_is_shown_by_its_kind(value: Any, accept: str | None, content_type: str, body: bytes) -> None:
    response = ask("GET", "/kv/a", headers={"accept": accept} if accept else None).show(found(value))
    assert (response.status, response.content_type, response.body) == (200, content_type, body)
    assert ("ETag", '"12"') in response.headers and ("X-Ddb-Version", "4") in response.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if_none_match": '"12"'}, 304),
        ({"if_none_match": 'W/"12"'}, 304),
        ({"if_none_match": '"1", "12"'}, 304),
        ({"if_none_match": "*"}, 304),
        ({"if_none_match": '"11"'}, 200),
        ({"if_match": '"12"'}, 200),
        ({"if_match": "*"}, 200),
        ({"if_match": '"11"'}, 412),
    ],
)
def test_a_read_may_be_conditional(headers: dict[str, str], status: int) -> None:
    assert ask("GET", "/kv/a", headers=headers).show(found(1)).status == status


@pytest.mark.parametrize(
    ("method", "reply", "status"),
    [
        ("GET", b'{"ok":true,"found":false,"key":"a"}', 404),
        ("PUT", b'{"ok":true,"rev":7,"version":1}', 201),
        ("PUT", b'{"ok":true,"rev":7,"version":2}', 200),
        ("PUT", b'{"ok":true,"applied":false,"rev":7,"found":true,"value":1}', 412),
        ("DELETE", b'{"ok":true,"deleted":1,"rev":7}', 204),
        ("DELETE", b'{"ok":true,"deleted":0,"rev":7}', 404),
        ("DELETE", b'{"ok":true,"applied":false,"rev":7,"found":true,"value":1}', 412),
    ],
)
def test_a_reply_becomes_its_status(method: str, reply: bytes, status: int) -> None:
    assert ask(method, "/kv/a", b"v").show(reply).status == status


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (BadRequest("No."), 400, None),
        (Forbidden("No."), 403, None),
        (WrongCluster("No."), 409, None),
        (TooLarge("No."), 413, None),
        (NoLeader("No."), 503, ("Retry-After", "1")),
        (Overloaded("No."), 503, ("Retry-After", "1")),
        (ReadOnly("No."), 503, ("Retry-After", "1")),
        (NotLeader("No.", leader="10.0.0.1:8050"), 307, ("Location", "http://10.0.0.1:8050/kv/a?forward=false")),
        (NotLeader("No."), 503, ("Retry-After", "1")),
    ],
)
def test_a_failure_becomes_its_status(error: DdbError, status: int, header: tuple[str, str] | None) -> None:
    for method in ("GET", "PUT", "DELETE"):
        response = ask(method, "/kv/a?forward=false", b"v").show(wire.failure(error))
        assert response.status == status and response.body == wire.failure(error)
        assert response.headers == ((header,) if header else ())


def test_responses_say_what_persists_and_leave_out_bodies_where_they_must() -> None:
    def head_and_body(response: Response, request: Request | None) -> tuple[bytes, bytes]:
        head, _, body = ddb_http.render(response, request, DATE).partition(b"\r\n\r\n")
        return head, body

    get = one(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    head, body = head_and_body(Response(200, b"{}"), get)
    assert head.startswith(b"HTTP/1.1 200 OK\r\nDate: Mon, 23 Nov 2026") and body == b"{}"
    assert b"Content-Length: 2" in head and b"Connection" not in head
    head, body = head_and_body(Response(200, b"{}"), one(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert b"Content-Length: 2" in head and body == b""
    for status in (204, 304):
        head, body = head_and_body(Response(status), get)
        assert b"Content-Length" not in head and body == b""
    assert b"Connection: close" in head_and_body(Response(400, b"{}"), None)[0]
    assert (
        b"Connection: keep-alive"
        in head_and_body(Response(200), one(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"))[0]
    )


# --- over a socket


class Store(Echo):
    """A small key/value service, to try real HTTP clients on."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}
        self.other = self.serve

    def serve(self, request: dict[str, Any], slot: Slot) -> None:
        op, key = request["op"], request.get("key")
        if op == "put":
            version = 2 if key in self.values else 1
            self.values[str(key)] = request["value"]
            slot.reply(b'{"ok":true,"rev":7,"version":%d}' % version)
        elif op == "get" and key in self.values:
            slot.reply(wire.encode({"ok": True, "found": True, "value": self.values[key], "rev": 7, "version": 1}))
        elif op == "get":
            slot.reply(b'{"ok":true,"found":false}')
        elif op == "delete":
            slot.reply(b'{"ok":true,"deleted":%d}' % (self.values.pop(str(key), None) is not None))
        elif op == "ready":
            raise NoLeader("No leader is known yet; wait a moment.")


def test_the_standard_librarys_client_is_served_over_one_connection() -> None:
    with running(Store()) as server:
        client = http.client.HTTPConnection(*server.server.address, timeout=10)
        client.connect()
        sock = client.sock

        def call(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
            client.request(method, path, body, headers)
            response = client.getresponse()
            return response.status, response.read()

        assert call("PUT", "/kv/caf%C3%A9", "crème".encode())[0] == 201
        assert call("PUT", "/kv/caf%C3%A9", b"[1,2]", **{"Content-Type": "application/json"})[0] == 200
        assert call("GET", "/kv/caf%C3%A9") == (200, b"[1,2]")
        assert call("HEAD", "/kv/caf%C3%A9") == (200, b"")
        assert call("PUT", "/kv/parts", iter([b"one", b" ", b"two"]))[0] == 201  # in chunks
        assert call("GET", "/kv/parts") == (200, b"one two")
        assert call("DELETE", "/kv/parts") == (204, b"")
        assert call("DELETE", "/kv/parts")[0] == 404
        assert call("GET", "/kv/none")[0] == 404
        assert call("GET", "/nowhere")[0] == 404
        assert call("GET", "/readyz")[0] == 503
        assert call("GET", "/healthz") == (200, b'{"ok":true}')
        status, body = call("POST", "/rpc", b'{"op":"echo","value":[null],"id":"x"}')
        assert (status, json.loads(body)) == (200, {"ok": True, "value": [None], "id": "x"})
        assert call("POST", "/rpc", b'{"op":"bug"}')[0] == 500
        assert client.sock is sock, "the connection did not persist"
        client.close()


def test_connection_close_ends_the_connection_and_drops_what_follows() -> None:
    with running(Store()) as server, server.connect() as client:
        client.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            b"PUT /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nv"
        )
        assert read_all(client).count(b"HTTP/1.1 ") == 1
        assert server.server.service.values == {}  # type: ignore[attr-defined]


def test_pipelined_requests_are_answered_in_order() -> None:
    with running(Store()) as server:
        said = talk(
            server,
            b"PUT /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nv"
            b"GET /kv/a HTTP/1.1\r\nHost: x\r\n\r\nGET /none HTTP/1.1\r\nHost: x\r\n\r\nNONSENSE\r\n\r\n",
        )
        assert [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]] == [b"201", b"200", b"404", b"400"]


def test_a_client_that_waits_for_100_gets_it_in_order() -> None:
    with running(Store()) as server, server.connect() as client:
        client.sendall(
            b"GET /kv/x HTTP/1.1\r\nHost: x\r\n\r\n"
            b"PUT /kv/a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        )
        said = b""
        while not said.endswith(b"100 Continue\r\n\r\n"):
            said += client.recv(1000)
        assert said.startswith(b"HTTP/1.1 404")
        client.sendall(b"body")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).startswith(b"HTTP/1.1 201")


def test_a_body_over_the_limit_is_413_and_the_sender_gets_to_read_that() -> None:
    with running(Store(), Limits(frame_bytes_max=1000)) as server, server.connect() as client:
        client.sendall(b"PUT /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001)
        assert read_all(client).startswith(b"HTTP/1.1 413")
