"""The three dialects against a real node, as docs/protocol.md shows them: raw bytes, `nc` and `curl`.

What goes wrong in them is in test_hostile.py and test_siege.py; here everybody behaves, each in their own way.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.alone import node_alone, registry_alone
from tests.harness import NodeServer, RegistryServer
from tests.talk import Response, Talk, frame, http, line

DIALECTS = b"This port speaks frames (LENGTH LF JSON LF), lines (one JSON object, LF) and HTTP/1.1.\n"
_prefixes = count(1)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    with node_alone(tmp_path_factory.mktemp("dialects")) as server:
        yield server
        assert server.alive and "Traceback" not in server.log


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with registry_alone(tmp_path_factory.mktemp("dialects")) as server:
        yield server
        assert server.alive and "Traceback" not in server.log


@pytest.fixture
def talk(node: NodeServer) -> Iterator[Talk]:
    with Talk(node.address) as talk:
        yield talk


@pytest.fixture
def p() -> str:
    """A prefix of keys that no other test uses."""
    return f"p{next(_prefixes)}-"


def put(node: NodeServer, key: str, value: Any) -> int:
    """Store `value`, and return its revision."""
    with Talk(node.address) as talk:
        rev: int = talk.ask(op="put", key=key, value=value)["rev"]
        return rev


def get(node: NodeServer, key: str) -> Any:
    """The value under `key`; None where there is none."""
    with Talk(node.address) as talk:
        return talk.ask(op="get", key=key)["value"]


# ------------------------------------------------------------- the examples


def test_the_examples_of_the_page_are_true_byte_for_byte(node: NodeServer) -> None:
    rev = put(node, "city", "Oslo")
    oslo = b'{"ok":true,"found":true,"key":"city","value":"Oslo","rev":%d,"created":%d,"version":1}' % (rev, rev)
    lost = b'{"ok":false,"error":"bad_frame","message":"After the 24 bytes of payload a line feed must follow; count in bytes."}'
    need = b'{"ok":false,"error":"bad_request","message":"`key` must be a string, not null or nothing."}'
    examples = {
        b"hello\n": DIALECTS,
        b"get city\n": DIALECTS,
        b'25\n{"op":"get","key":"city"}\n': b"%d\n%b\n" % (len(oslo), oslo),
        b'24\n{"op":"get","key":"city"}\n': b"%d\n%b\n" % (len(lost), lost),
        b'{"op":"get","key":"city"}\n': oslo + b"\n",
        b'{"op":"get"}\n': need + b"\n",
    }
    for said, heard in examples.items():
        with Talk(node.address) as talk:
            assert talk.send(said).finish().rest() == heard, said
    with Talk(node.address) as talk:
        talk.send(b'{"op":"put","key":"city","value":"Rome","if":{"value":"Oslo"}}\n')
        assert talk.line() == b'{"ok":true,"applied":true,"rev":%d,"version":2}' % (rev + 1)
        talk.send(b'{"op":"put","key":"city","value":"Bonn","if":{"value":"Oslo"}}\n')
        assert talk.line() == b'{"ok":true,"applied":false,"found":true,"value":"Rome","rev":%d}' % (rev + 1)


@pytest.mark.parametrize(
    "first",
    [b"0\n\n", b"+5\nhello\n", b"-5\nhello\n", b" 25\n", b"\n", b"\x00", b"\x16\x03\x01\x02", b"[]\n", b'"', b"\xff"],
)
def test_what_is_none_of_the_dialects_is_told_of_all_three(
    node: NodeServer, registry: RegistryServer, first: bytes
) -> None:
    for server in (node, registry):
        with Talk(server.address) as talk:
            assert talk.send(first).rest() == DIALECTS


# ------------------------------------------------------------------- frames


def test_frames_may_arrive_in_any_pieces(node: NodeServer, p: str) -> None:
    stream = (
        frame({"op": "put", "key": p, "value": "é🐬"})
        + frame({"op": "get", "key": p, "read": "stale"})
        + frame({"op": "ping"})
    )
    for cut in range(1, len(stream), 7):
        with Talk(node.address) as talk:
            talk.send(stream[:cut], stream[cut:])
            assert [talk.reply()["ok"] for _ in range(3)] == [True] * 3
    with Talk(node.address) as talk:
        talk.send(*(stream[i : i + 1] for i in range(len(stream))))
        assert [talk.reply()["ok"] for _ in range(3)] == [True] * 3


def test_a_payload_may_hold_line_feeds_and_blanks(talk: Talk) -> None:
    assert json.loads(talk.send(frame(b'\n { "op" :\r\n\t"ping" }\n\n')).frame())["ok"]


def test_replies_are_compact_and_not_escaped(talk: Talk, p: str) -> None:
    talk.ask(op="put", key=p + "é", value={"a": [1, "🐬 é\u2028"]})
    reply = talk.send(frame({"op": "get", "key": p + "é"})).frame()
    assert b'"key":"%b\xc3\xa9","value":{"a":[1,"\xf0\x9f\x90\xac \xc3\xa9\xe2\x80\xa8"]},' % p.encode() in reply


@pytest.mark.parametrize("size", [0, 1, 65_000, 65_536, 1_000_000, 15_000_000])
def test_values_of_any_size_come_back(node: NodeServer, talk: Talk, p: str, size: int) -> None:
    value = ("0123456789abcdef" * (size // 16 + 1))[:size]
    assert talk.ask(op="put", key=p, value=value)["ok"]
    assert talk.ask(op="get", key=p)["value"] == value
    assert talk.ask(op="delete", key=p)["deleted"] == 1


def test_a_dialect_is_for_the_life_of_the_connection(node: NodeServer) -> None:
    with Talk(node.address) as talk:
        assert talk.ask(op="ping")["ok"]
        assert talk.send(line({"op": "ping"})).reply()["error"] == "bad_frame"
        assert talk.rest() == b""
    with Talk(node.address) as talk:
        assert json.loads(talk.send(line({"op": "ping"})).line())["ok"]
        assert json.loads(talk.send(b"14\n").line())["error"] == "bad_request"
        assert json.loads(talk.send(line({"op": "ping"})).line())["ok"]


# -------------------------------------------------------------------- lines


def test_lines_may_end_with_crlf_and_empty_ones_are_ignored(talk: Talk) -> None:
    talk.send(b'{"op":"ping","id":1}\r\n\r\n\n\n{"op":"ping","id":2}\n', b'\n{"op":"pi', b'ng","id":3}\r', b"\n")
    assert [json.loads(talk.line())["id"] for _ in range(3)] == [1, 2, 3]


def test_a_bad_line_does_not_end_the_conversation(talk: Talk) -> None:
    talk.send(b'{"op":"get"\n{"op":"ping"}\nhello\n{"op":"ping"}\n')
    assert [json.loads(talk.line())["ok"] for _ in range(4)] == [False, True, False, True]


def test_a_last_line_without_its_line_feed_is_answered(talk: Talk) -> None:
    replies = talk.send(b'{"op":"ping","id":1}\n{"op":"ping","id":2}').finish().rest().splitlines()
    assert [json.loads(reply)["id"] for reply in replies] == [1, 2]


def test_a_reply_is_one_line_whatever_the_value_holds(talk: Talk, p: str) -> None:
    for value in ("a\nb\r\nc", {"a\n": ["\u0000"]}, "\u2028"):
        talk.send(line({"op": "put", "key": p, "value": value}))
        assert json.loads(talk.line())["ok"]
        assert json.loads(talk.send(line({"op": "get", "key": p})).line())["value"] == value


# ----------------------------------------------------------- ends of streams


@pytest.mark.parametrize("count_", [1, 2, 1000, 5000])
def test_who_stops_sending_still_gets_every_reply(node: NodeServer, p: str, count_: int) -> None:
    requests = [{"op": "incr", "key": p} for _ in range(count_)]
    with Talk(node.address) as talk:
        talk.send(b"".join(map(frame, requests))).finish()
        assert [talk.reply()["value"] for _ in requests] == list(range(1, count_ + 1))
        assert talk.rest() == b""
    with Talk(node.address) as talk:
        replies = talk.send(b"".join(map(line, requests))).finish().rest().splitlines()
        assert [json.loads(reply)["value"] for reply in replies] == list(range(count_ + 1, 2 * count_ + 1))


def test_half_a_frame_at_the_end_is_told_after_the_replies(talk: Talk) -> None:
    talk.send(frame({"op": "ping"}), b'25\n{"op":').finish()
    assert talk.reply()["ok"] and talk.reply()["error"] == "bad_frame" and talk.rest() == b""


def run(*command: str, said: bytes = b"") -> bytes:
    """What `command` prints when it is fed `said`. Skips the test where there is no such program."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed here")
    return subprocess.run(command, input=said, capture_output=True, timeout=20, check=True).stdout


def nc(server: NodeServer, said: bytes) -> bytes:
    """What `nc` prints, which shuts down its sending side at the end of its input."""
    if shutil.which("nc") and b"-N" not in subprocess.run(["nc", "-h"], capture_output=True).stderr:
        pytest.skip("this nc can't shut down its sending side (-N)")
    return run("nc", "-N", server.host, str(server.port), said=said)


def test_nc_speaks_lines_and_frames(node: NodeServer, p: str) -> None:
    said = line({"op": "put", "key": p, "value": [1]}) + line({"op": "count", "prefix": p, "read": "stale"})
    first, second = nc(node, said).splitlines()
    assert json.loads(first)["version"] == 1 and json.loads(second)["ok"]
    size, reply = nc(node, frame({"op": "get", "key": p})).splitlines()
    assert int(size) == len(reply) and json.loads(reply)["value"] == [1]
    assert nc(node, b"hello\n") == DIALECTS


# --------------------------------------------------------------------- HTTP


def ask(talk: Talk, method: str, target: str, body: bytes = b"", **headers: str) -> Response:
    """One HTTP request, and its response."""
    return talk.send(http(method, target, body, **headers)).response(method)


def test_put_get_and_delete_a_key(talk: Talk, p: str) -> None:
    created = ask(talk, "PUT", f"/kv/{p}", b"Lima")
    assert created.status == 201 and created.headers["etag"] == f'"{created.json["rev"]}"'
    got = ask(talk, "GET", f"/kv/{p}")
    assert (got.status, got.body, got.headers["etag"]) == (200, b"Lima", created.headers["etag"])
    assert got.headers["content-type"].startswith("text/plain")
    assert ask(talk, "PUT", f"/kv/{p}", b"Cusco").status == 200
    assert ask(talk, "DELETE", f"/kv/{p}").status == 204
    for method in ("GET", "DELETE", "HEAD"):
        assert ask(talk, method, f"/kv/{p}").status == 404


def test_text_stays_text_and_json_stays_json(node: NodeServer, talk: Talk, p: str) -> None:
    for body, headers, value in (
        (b'{"a":1}', {}, '{"a":1}'),
        (b'{"a":1}', {"content_type": "application/x-www-form-urlencoded"}, '{"a":1}'),
        (b' {"a" : 1.0}', {"content_type": "application/json"}, {"a": 1.0}),
        (b"null", {"content_type": "Application/JSON; charset=utf-8"}, None),
        (b'"text"', {"content_type": "application/json"}, "text"),
        ("é🐬".encode(), {"content_type": "text/plain"}, "é🐬"),
        (b"", {}, ""),
    ):
        assert ask(talk, "PUT", f"/kv/{p}", body, **headers).status in (200, 201)
        assert get(node, p) == value
        shown = ask(talk, "GET", f"/kv/{p}")
        if isinstance(value, str):
            assert shown.body == value.encode() and shown.headers["content-type"].startswith("text/plain")
        else:
            assert shown.json == value and shown.headers["content-type"] == "application/json"
        assert ask(talk, "GET", f"/kv/{p}", accept="application/json").json == value


@pytest.mark.parametrize("body", [b"{", b"", b"NaN", b"\xff", b"1 2", b"9" * 5000, b"[" * 200 + b"]" * 200])
def test_a_body_that_is_no_json_is_400(node: NodeServer, talk: Talk, p: str, body: bytes) -> None:
    response = ask(talk, "PUT", f"/kv/{p}", body, content_type="application/json")
    assert response.status == 400 and response.json["error"] == "bad_request"
    assert get(node, p) is None
    assert ask(talk, "GET", "/healthz").status == 200  # on the same connection


def test_a_body_of_text_must_be_utf8(talk: Talk, p: str) -> None:
    assert ask(talk, "PUT", f"/kv/{p}", b"\xff\xfe").status == 400


KEYS = [
    "a",
    "a/b/c",
    "/",
    "//",
    "a b",
    "a+b",
    "a%b",
    "%2F",
    "a?b=c",
    "a#b",
    "ключ",
    "🐬",
    "a&b;c",
    ".",
    "..",
    "a/../b",
    "\u0000",
    "\n\r",
    '"',
    "x" * 4096,
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:20])
def test_any_key_can_stand_in_a_path(node: NodeServer, talk: Talk, key: str) -> None:
    for encoded in (quote(key, safe=""), "".join(f"%{byte:02x}" for byte in key.encode())):
        assert ask(talk, "PUT", f"/kv/{encoded}", key.encode()).status in (200, 201)
        assert get(node, key) == key
        assert ask(talk, "GET", f"/kv/{encoded}").body == key.encode()
        assert ask(talk, "DELETE", f"/kv/{encoded}").status == 204


def test_slashes_need_no_encoding(node: NodeServer, talk: Talk, p: str) -> None:
    ask(talk, "PUT", f"/kv/{p}/a//b/", b"1")
    assert get(node, f"{p}/a//b/") == "1"


def test_if_none_match_star_creates_and_nothing_else(node: NodeServer, talk: Talk, p: str) -> None:
    assert ask(talk, "PUT", f"/kv/{p}", b"1", if_none_match="*").status == 201
    assert ask(talk, "PUT", f"/kv/{p}", b"2", if_none_match="*").status == 412
    assert get(node, p) == "1"


def test_if_match_guards_against_a_lost_update(node: NodeServer, talk: Talk, p: str) -> None:
    first = ask(talk, "PUT", f"/kv/{p}", b"1").headers["etag"]
    second = ask(talk, "PUT", f"/kv/{p}", b"2", if_match=first)
    assert second.status == 200 and second.headers["etag"] != first
    for etag in (first, f"W/{second.headers['etag']}", '"x"', '"0"', '"99999999999999999999999"', "", "7"):
        assert ask(talk, "PUT", f"/kv/{p}", b"3", if_match=etag).status in (400, 412), etag
        assert ask(talk, "DELETE", f"/kv/{p}", if_match=etag).status in (400, 412), etag
    assert get(node, p) == "2"
    assert ask(talk, "PUT", f"/kv/{p}", b"4", if_match="*").status == 200
    assert ask(talk, "PUT", f"/kv/{p}none", b"4", if_match="*").status == 412
    assert get(node, p + "none") is None
    assert ask(talk, "DELETE", f"/kv/{p}", if_match=ask(talk, "GET", f"/kv/{p}").headers["etag"]).status == 204


def test_what_the_client_has_is_not_sent_again(talk: Talk, p: str) -> None:
    etag = ask(talk, "PUT", f"/kv/{p}", b"1").headers["etag"]
    for tags in (etag, f"W/{etag}", f'"1", {etag}', "*"):
        response = ask(talk, "GET", f"/kv/{p}", if_none_match=tags)
        assert (response.status, response.body, response.headers["etag"]) == (304, b"", etag)
    changed = ask(talk, "PUT", f"/kv/{p}", b"2").headers["etag"]
    assert ask(talk, "GET", f"/kv/{p}", if_none_match=etag).body == b"2"
    assert ask(talk, "GET", f"/kv/{p}", if_match=etag).status == 412
    assert ask(talk, "GET", f"/kv/{p}", if_match=changed).status == 200


def test_head_says_what_get_would_and_sends_no_body(talk: Talk, p: str) -> None:
    ask(talk, "PUT", f"/kv/{p}", b"12345")
    for target in (f"/kv/{p}", "/healthz", "/readyz", f"/kv?prefix={p}", f"/kv/{p}none"):
        got, head = ask(talk, "GET", target), ask(talk, "HEAD", target)
        assert head.status == got.status and head.headers["content-length"] == got.headers["content-length"]
        assert head.headers.get("etag") == got.headers.get("etag")


def test_scan_by_query(node: NodeServer, talk: Talk, p: str) -> None:
    for n in range(5):
        put(node, f"{p}{n} é", n)
    items = ask(talk, "GET", f"/kv?prefix={p}&limit=2").json
    assert [item["value"] for item in items["items"]] == [0, 1] and items["more"] is True
    assert [i["value"] for i in ask(talk, "GET", f"/kv?prefix={p}&reverse=true&limit=2").json["items"]] == [4, 3]
    assert [i["value"] for i in ask(talk, "GET", f"/kv?start={p}1&end={p}3&read=stale").json["items"]] == [1, 2]
    assert "value" not in ask(talk, "GET", f"/kv?prefix={p}&keys_only=1").json["items"][0]
    assert ask(talk, "GET", f"/kv?prefix={p}1+%C3%A9").json["items"][0]["key"] == f"{p}1 é"
    for bad in (
        "limit=0",
        "limit=x",
        "limit=1e3",
        "limit=1_0",
        "limit=",
        "reverse=perhaps",
        "prefix=a&start=b",
        "timeout=0",
        "timeout=nan",
        "read=fresh",
        "prefix=%ff",
    ):
        response = ask(talk, "GET", f"/kv?{bad}")
        assert (response.status, response.json["ok"]) == (400, False), bad


def test_rpc_takes_any_request(talk: Talk, p: str) -> None:
    assert ask(talk, "POST", "/rpc", b'{"op":"put","key":"%b","value":[1],"id":7}' % p.encode()).json["id"] == 7
    response = ask(talk, "POST", "/rpc", b'{"op":"get","key":"%b"}' % p.encode())
    assert response.status == 200 and response.json["value"] == [1]
    for body, status in (
        (b'{"op":"nonsense"}', 400),
        (b"[]", 400),
        (b"", 400),
        (b'{"op":"get","key":"%b"}' % (b"x" * 5000), 413),
    ):
        response = ask(talk, "POST", "/rpc", body)
        assert response.status == status and response.json["ok"] is False


def test_the_server_says_how_it_is(node: NodeServer, registry: RegistryServer, talk: Talk) -> None:
    assert ask(talk, "GET", "/healthz").status == ask(talk, "GET", "/readyz").status == 200
    assert ask(talk, "GET", "/status").json["role"] == "leader"
    assert ask(talk, "GET", "/members").json["members"][0]["address"] == node.address
    with Talk(registry.address) as other:
        assert ask(other, "GET", "/nodes").json["nodes"] == []
        assert ask(other, "GET", "/healthz").status == ask(other, "GET", "/status").status == 200
        assert ask(other, "GET", "/kv/a").status == 404
        assert ask(other, "POST", "/rpc", b'{"op":"nodes"}').json["ok"] is True


def test_what_is_not_there_is_404_and_what_is_not_possible_405(talk: Talk) -> None:
    for target in ("/", "/nothing", "/KV/a", "/rpc/", "/kvx", "/healthz/x"):
        response = ask(talk, "GET", target)
        assert response.status == 404 and response.json["ok"] is False, target
    for method, target, allowed in (
        ("POST", "/kv/a", {"GET", "HEAD", "PUT", "DELETE", "OPTIONS"}),
        ("PUT", "/kv", {"GET", "HEAD", "OPTIONS"}),
        ("GET", "/rpc", {"POST", "OPTIONS"}),
        ("DELETE", "/status", {"GET", "HEAD", "OPTIONS"}),
    ):
        response = ask(talk, method, target)
        assert response.status == 405 and set(response.headers["allow"].split(", ")) == allowed
        options = ask(talk, "OPTIONS", target)
        assert options.status == 204 and options.headers["allow"] == response.headers["allow"]


def test_connections_are_kept_and_closed_as_http_says(node: NodeServer) -> None:
    with Talk(node.address) as talk:
        for _ in range(3):
            assert "connection" not in ask(talk, "GET", "/healthz").headers
        assert ask(talk, "GET", "/healthz", connection="keep-alive, Close").headers["connection"] == "close"
        assert talk.rest() == b""
    with Talk(node.address) as talk:
        response = talk.send(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").response()
        assert response.status == 200 and response.headers["connection"] == "keep-alive"
        assert talk.send(b"GET /healthz HTTP/1.0\r\n\r\n").response().headers["connection"] == "close"
        assert talk.rest() == b""


def test_pipelined_http_requests_are_answered_in_order(node: NodeServer, p: str) -> None:
    requests, expected = [], []
    for n in range(100):
        requests += [
            http("PUT", f"/kv/{p}{n}", b"%d" % n),
            http("GET", "/nothing"),
            http("GET", f"/kv/{p}{n}?read=stale"),
            http("HEAD", "/healthz"),
        ]
        expected += [(201, "PUT"), (404, "GET"), (None, "GET"), (200, "HEAD")]
    with Talk(node.address) as talk:
        talk.send(b"".join(requests)).finish()
        for status, method in expected:
            assert talk.response(method).status in ((status,) if status else (200, 404))
        assert talk.rest() == b""
    with Talk(node.address) as talk:
        assert talk.ask(op="count", prefix=p)["count"] == 100


def test_nothing_behind_the_last_request_is_done(node: NodeServer, p: str) -> None:
    with Talk(node.address) as talk:
        talk.send(http("GET", "/healthz", connection="close") + http("PUT", f"/kv/{p}", b"1"))
        assert talk.response().status == 200 and talk.rest() == b""
    assert get(node, p) is None


def test_who_waits_for_100_continue_gets_it(talk: Talk, p: str) -> None:
    talk.send(f"PUT /kv/{p} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n".encode())
    assert talk.response().status == 100
    assert talk.send(b"abc").response().status == 201
    talk.send(f"PUT /kv/{p} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n".encode())
    assert talk.response().status == 100
    assert talk.send(b"3\r\nxyz\r\n0\r\n\r\n").response().status == 200
    assert ask(talk, "GET", f"/kv/{p}").body == b"xyz"


def test_who_would_send_too_much_is_told_instead_of_100(talk: Talk, p: str) -> None:
    talk.send(f"PUT /kv/{p} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n".encode())
    assert talk.response().status == 413 and talk.rest() == b""


def test_an_unknown_expectation_is_417(talk: Talk, p: str) -> None:
    talk.send(f"PUT /kv/{p} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: miracles\r\n\r\nabc".encode())
    assert talk.response().status == 417


def test_a_chunked_body_is_put_together(node: NodeServer, p: str) -> None:
    body = b'4\r\nWiki\r\n6;ext="a;b"\r\npedia \r\nE\r\nin \r\n\r\nchunks.\r\n000\r\nTrailer: ignored\r\n\r\n'
    request = f"PUT /kv/{p} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n".encode() + body
    for cut in range(1, len(request), 5):
        with Talk(node.address) as talk:
            talk.send(request[:cut], request[cut:] + http("GET", "/healthz"))
            assert talk.response().status in (200, 201) and talk.response().status == 200
    assert get(node, p) == "Wikipedia in \r\n\r\nchunks."


def test_blank_lines_before_a_request_are_ignored(talk: Talk) -> None:
    talk.send(http("GET", "/healthz") + b"\r\n\r\n" + http("GET", "/healthz"))
    assert talk.response().status == talk.response().status == 200


def test_a_target_may_be_absolute(talk: Talk, p: str) -> None:
    assert ask(talk, "PUT", f"http://ddb:8050/kv/{p}", b"1").status == 201
    assert ask(talk, "GET", f"/kv/{p}").body == b"1"


def test_a_page_of_another_origin_may_not_write(node: NodeServer, talk: Talk, p: str) -> None:
    assert ask(talk, "PUT", f"/kv/{p}", b"1", origin="http://evil.example").status == 403
    assert ask(talk, "POST", "/rpc", b'{"op":"put","key":"%b","value":1}' % p.encode(), origin="null").status == 403
    assert get(node, p) is None
    assert ask(talk, "PUT", f"/kv/{p}", b"1", origin="http://ddb").status == 201


def curl(node: NodeServer, path: str, *options: str, said: bytes = b"") -> bytes:
    """What `curl` prints."""
    return run("curl", "-sS", "-m", "15", *options, f"http://{node.address}{path}", said=said)


def test_curl_works_as_people_use_it(node: NodeServer, tmp_path: Path, p: str) -> None:
    assert curl(node, f"/kv/{p}", "-X", "PUT", "-d", "Lima", "-o", "/dev/null", "-w", "%{http_code}") == b"201"
    assert curl(node, f"/kv/{p}") == b"Lima"
    assert b'ETag: "' in curl(node, f"/kv/{p}", "-I")
    large = tmp_path / "large"
    large.write_bytes(b"0123456789abcdef" * 300_000)
    assert json.loads(curl(node, f"/kv/{p}", "-T", str(large)))["version"] == 2  # curl asks for 100-continue here
    assert curl(node, f"/kv/{p}") == large.read_bytes()
    assert json.loads(curl(node, f"/kv/{p}", "-T", "-", said=b"streamed"))["version"] == 3  # and sends chunks here
    assert curl(node, f"/kv/{p}") == b"streamed"
    assert curl(node, f"/kv/{p}", "--http1.0") == b"streamed"
    assert curl(node, f"/kv/{p}", "-X", "DELETE", "-w", "%{http_code}") == b"204"
    assert b'"not_found"' in curl(node, f"/kv/{p}")
    assert json.loads(curl(node, "/rpc", "-d", '{"op":"count"}'))["ok"] is True


def test_curl_reuses_its_connection(node: NodeServer) -> None:
    url = f"http://{node.address}/healthz"
    out = run(
        "curl",
        "-sS",
        "-m",
        "15",
        "-o",
        "/dev/null",
        "-w",
        "%{num_connects} ",
        url,
        "-o",
        "/dev/null",
        "-w",
        "%{num_connects} ",
        url,
    )
    assert out.split() == [b"1", b"0"]
