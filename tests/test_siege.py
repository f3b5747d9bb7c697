"""A node and a registry besieged: whatever many clients do at once, they serve the next one, and lose nothing.

What one bad request gets is in test_hostile.py. Here bad input comes in bulk, systematically (every field of every
operation) or at random (each fuzz prints its seed; `DDB_FUZZ_SEED` replays it, `DDB_FUZZ_S` lets it run longer), and
good input comes in amounts that would fill any memory. After each test both servers are asked: do you still answer on
a new connection, is all there that was written before, and is there no traceback in your log?
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.alone import cpu_s, memory_bytes, memory_peak_bytes, node_alone, registry_alone, wait_leading
from tests.harness import NodeServer, RegistryServer, Server, wait
from tests.talk import Talk, frame, http, line

KEPT = {f"kept/{n}": {"n": n, "text": "é🐬" * n} for n in range(50)}
MIB = 1 << 20


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    """A node that keeps `KEPT`."""
    with node_alone(tmp_path_factory.mktemp("siege")) as server:
        ops = [{"op": "put", "key": key, "value": value} for key, value in KEPT.items()]
        assert ask(server.address, op="batch", ops=ops)["ok"]
        yield server


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry that has granted a cluster."""
    with registry_alone(tmp_path_factory.mktemp("siege")) as server:
        wait(lambda: ask(server.address, op="bootstrap", id="kept", cluster="kept")["granted"])
        yield server


@pytest.fixture(autouse=True)
def sound(node: NodeServer, registry: RegistryServer) -> Iterator[None]:
    """After each test: both servers are as they were."""
    yield
    for server in (node, registry):
        assert server.alive, server.log[-2000:]
        assert "Traceback" not in server.log and "reference" not in server.log, server.log[-3000:]
    items = ask(node.address, op="scan", prefix="kept/")["items"]
    assert {item["key"]: item["value"] for item in items} == KEPT
    assert ask(node.address, op="put", key="next", value=1)["ok"]
    assert ask(registry.address, op="nodes")["cluster"] == "kept"


def ask(address: str, timeout_s: float = 15.0, **request: Any) -> dict[str, Any]:
    """As harness.ask, with more patience: these tests keep the machine busy."""
    return harness.ask(address, timeout_s, **request)


def is_sentence(reply: dict[str, Any], *codes: str) -> None:
    """`reply` must be a failure with one of `codes`, told in one sentence or two."""
    assert reply["ok"] is False and reply["error"] in codes, reply
    message = reply["message"]
    assert 10 < len(message) < 400 and message.endswith((".", "?")) and "\n" not in message, message


# --------------------------------------------------- every field of every op

ANYTHING_BUT = {
    "key": [None, 7, 1.5, True, [], {}, ["a"], ""],
    "name": [None, 7, True, [], {}, "", "nobody", "x" * 5000],
    "to": [7, True, [], {}, "", "nobody"],
    "if": [7, "x", True, [7], [None], [[]], {"rev": "x"}, {"rev": -1}, {"rev": 1.0}, {"rev": True}, {"version": None},
           {"exists": 1}, {"exists": True, "op": "<"}, {}, {"key": "a"}, {"rev": 1, "version": 1}, {"value": 1, "op": "=="},
           {"value": 1, "op": 7}, {"value": 1, "op": []}, {"key": "", "rev": 1}, {"key": 7, "rev": 1}],
    "ops": [None, 7, "x", {}, [7], [None], [[]], [{}], [{"op": "get", "key": "a"}], [{"op": "put"}], [{"op": "put", "key": "a"}],
            [{"op": []}], [{"op": "put", "key": "a", "value": 1, "if": {"rev": 0}}], [{"op": "batch", "ops": []}]],
    "then": [None, 7, "x", {}, [7], [None], [[]], [{}], [{"op": "txn"}], [{"op": "batch", "ops": []}], [{"op": "status"}],
             [{"op": "incr", "key": "a", "by": "x"}], [{"op": "scan", "limit": 0}], [{"op": "get"}]],
    "by": [None, "1", 1.0, True, [], {}],
    "prefix": [7, True, [], {}, 1.5],
    "start": [7, True, [], {}, 1.5],
    "end": [7, True, [], {}, 1.5],
    "limit": [None, "1", 0, -1, 1.0, True, [], 10**30],
    "log_limit": [None, "1", -1, 1.0, True, [], 10**30],
    "from": [None, "1", -1, 1.0, True, [], 10**30],
    "reverse": [None, 0, 1, "true", [], {}],
    "keys_only": [None, 0, 1, "true", [], {}],
    "read": [None, 7, True, [], {}, "", "fresh", "STALE"],
    "timeout": [None, "1", 0, -1, True, [], {}, 10**10],
    "max_lag": ["1", -1, True, [], {}],
    "id": [None, 7, True, [], {}, "", "x" * 200, "a\nb"],
    "cluster": [7, True, [], {}, "", "x" * 200, "a\u0000b"],
    "address": [None, 7, True, [], {}, "", "nowhere", "host:", ":1", "host:99999", "host:0", "a b:1", "x" * 400 + ":1"],
    "word": [None, 7, True, [], {}],
    "expect": [None, "1", 0, -1, 1.5, True, [], 10**9],
}  # fmt: skip
"""What each field must not be."""

NODE_OPS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "put": ({"key": "siege", "value": 1}, {"key": "key", "if": "if"}),
    "get": ({"key": "siege"}, {"key": "key", "read": "read"}),
    "delete": ({"key": "siege"}, {"key": "key", "if": "if"}),
    "scan": ({"prefix": "siege"}, {"prefix": "prefix", "limit": "limit", "reverse": "reverse", "keys_only": "keys_only", "read": "read"}),
    "count": ({}, {"prefix": "prefix", "start": "start", "end": "end", "read": "read"}),
    "incr": ({"key": "siege/n"}, {"key": "key", "by": "by"}),
    "batch": ({"ops": []}, {"ops": "ops"}),
    "txn": ({"if": [], "then": [], "else": []}, {"if": "if", "then": "then", "else": "then"}),
    "log": ({}, {"from": "from", "limit": "log_limit"}),
    "ping": ({}, {}),
    "status": ({}, {}),
    "members": ({}, {}),
    "member_remove": ({"name": "n1"}, {"name": "name"}),
    "member_promote": ({"name": "n1"}, {"name": "name"}),
    "transfer": ({"to": "n1"}, {"to": "to"}),
    "snapshot": ({}, {}),
}  # fmt: skip
"""Each operation of a node: fields with which it is well-formed, and those that can be wrong, with their kind above."""

REGISTRY_OPS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "register": ({"id": "a", "name": "a", "address": "127.0.0.1:1"}, {"id": "id", "name": "id", "address": "address", "cluster": "cluster"}),
    "unregister": ({"id": "nobody"}, {"id": "word"}),
    "bootstrap": ({"id": "a", "cluster": "b"}, {"id": "id", "cluster": "id", "expect": "expect"}),
}  # fmt: skip

REQUIRED = {
    "put": ["key", "value"], "get": ["key"], "delete": ["key"], "incr": ["key"], "batch": ["ops"], "member_remove": ["name"],
    "member_promote": ["name"], "register": ["id", "name", "address"], "unregister": ["id"], "bootstrap": ["id", "cluster"],
}  # fmt: skip


@pytest.mark.parametrize("op", [*NODE_OPS, *REGISTRY_OPS])
def test_each_field_of_an_operation_is_checked(node: NodeServer, registry: RegistryServer, op: str) -> None:
    server: Server = node if op in NODE_OPS else registry
    good, fields = (NODE_OPS | REGISTRY_OPS)[op]
    kinds = {**fields, "timeout": "timeout"} if op in NODE_OPS else fields
    with Talk(server.address) as talk:
        for field in REQUIRED.get(op, []):
            is_sentence(
                talk.ask(op=op, **{name: value for name, value in good.items() if name != field}), "bad_request"
            )
        for field, kind in kinds.items():
            for wrong in ANYTHING_BUT[kind]:
                reply = talk.ask(**{"op": op, **good, field: wrong})
                if field == "if" and op == "txn" and isinstance(wrong, dict) and reply["ok"]:
                    continue  # a single condition may stand without a list
                is_sentence(reply, "bad_request", "too_large")
        if server is node:
            assert talk.ask(op="get", key="siege")["found"] is False


def test_stale_reads_check_their_lag(node: NodeServer) -> None:
    with Talk(node.address) as talk:
        for wrong in ANYTHING_BUT["max_lag"]:
            is_sentence(talk.ask(op="get", key="kept/1", read="stale", max_lag=wrong), "bad_request")


REGISTRY_PAYLOADS = [
    b"nonsense", b"[]", b"null", b"{", b" ", b'{"op":"nodes"}}', b'{"op":"\xff"}', b"[" * 30_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"op":"nodes","x":' + b"9" * 10_000 + b"}", b'{"op":"nodes","x":NaN}', b'{"op":"nodes","x":1e999}', b'{"op":"nodes","x":"\\ud800"}',
    b"{}", b'{"op":7}', b'{"op":[]}', b'{"op":"get","key":"a"}', b'{"op":"peer"}',
]  # fmt: skip


@pytest.mark.parametrize("payload", REGISTRY_PAYLOADS, ids=lambda payload: payload[:30].decode("latin-1"))
def test_the_registry_answers_bad_payloads_in_each_dialect(registry: RegistryServer, payload: bytes) -> None:
    with Talk(registry.address) as talk:
        is_sentence(talk.send(frame(payload)).reply(), "bad_request")
        assert talk.ask(op="ping")["ok"]
    if payload[:1] == b"{":
        with Talk(registry.address) as talk:
            is_sentence(json.loads(talk.send(line(payload)).line()), "bad_request")
    with Talk(registry.address) as talk:
        response = talk.send(http("POST", "/rpc", payload)).response()
        assert response.status == 400
        is_sentence(response.json, "bad_request")


@pytest.mark.parametrize(
    ("stream", "code"),
    [
        (b"25 \n", "bad_frame"),
        (b"7\n{}", "bad_frame"),
        (b"9" * 30, "bad_frame"),
        (b"1073741824\n", "too_large"),
        (b"%d\n" % ((16 << 20) + 1), "too_large"),
    ],
)
def test_the_registry_answers_bad_frames(registry: RegistryServer, stream: bytes, code: str) -> None:
    with Talk(registry.address) as talk:
        talk.send(frame({"op": "ping"}) + stream).finish()
        assert talk.reply()["ok"]
        is_sentence(talk.reply(), code)
        assert talk.rest() == b""


# ------------------------------------------------------------ HTTP, smuggled

SMUGGLED = b"PUT /kv/smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n1"


def smuggling(head: bytes, body: bytes = b"") -> bytes:
    """A request with two readings, one of which has another request in its body."""
    return head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body + SMUGGLED


SMUGGLINGS = {
    "length and chunked": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: 4\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "two lengths": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: 0\nContent-Length: 77"),
    "equal lengths": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: 0\nContent-Length: 0"),
    "list of lengths": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: 0, 0"),
    "signed length": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: +0"),
    "negative length": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: -1"),
    "hexadecimal length": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: 0x0"),
    "fractional length": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: 0.0"),
    "length of letters": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: none"),
    "empty length": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length:"),
    "arabic length": smuggling("POST /rpc HTTP/1.1\nHost: x\nContent-Length: ٠".encode()),
    "very long length": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: " + b"9" * 400),
    "no length": smuggling(b"POST /rpc HTTP/1.1\nHost: x"),
    "two codings": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "identity too": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nTransfer-Encoding: chunked, identity", b"0\r\n\r\n"),
    "unknown coding": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nTransfer-Encoding: xchunked", b"0\r\n\r\n"),
    "gzip": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nTransfer-Encoding: gzip, chunked", b"0\r\n\r\n"),
    "chunked in 1.0": smuggling(b"POST /rpc HTTP/1.0\nHost: x\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "blank before colon": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length : 0"),
    "folded": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nX: y\n Content-Length: 77\nContent-Length: 0"),
    "folded first": smuggling(b"POST /rpc HTTP/1.1\n Host: x\nContent-Length: 0"),
    "bare LF": b"POST /rpc HTTP/1.1\nHost: x\nContent-Length: 0\n\n" + SMUGGLED,
    "bare LF inside": b"POST /rpc HTTP/1.1\r\nHost: x\r\nX: y\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "bare CR": b"POST /rpc HTTP/1.1\r\nHost: x\r\nX: y\rContent-Length: 77\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "NUL": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nX: a\x00b\nContent-Length: 0"),
    "no header name": smuggling(b"POST /rpc HTTP/1.1\nHost: x\n: y\nContent-Length: 0"),
    "no colon": smuggling(b"POST /rpc HTTP/1.1\nHost: x\nContent-Length\nContent-Length: 0"),
    "two hosts": smuggling(b"GET /healthz HTTP/1.1\nHost: x\nHost: y"),
    "no host": smuggling(b"GET /healthz HTTP/1.1\nX: y"),
    "HTTP/0.9": b"GET /healthz\r\n\r\n" + SMUGGLED,
    "HTTP/2": smuggling(b"PRI * HTTP/2.0", b"SM\r\n\r\n"),
    "HTTP/1.10": smuggling(b"GET /healthz HTTP/1.10\nHost: x"),
    "http/1.1": smuggling(b"GET /healthz http/1.1\nHost: x"),
    "blanks in the target": smuggling(b"GET /health z HTTP/1.1\nHost: x"),
    "two blanks": smuggling(b"GET  /healthz HTTP/1.1\nHost: x"),
    "tab": smuggling(b"GET\t/healthz HTTP/1.1\nHost: x"),
    "a fragment": smuggling(b"GET /healthz#x HTTP/1.1\nHost: x"),
    "not in the target": smuggling("GET /kv/é HTTP/1.1\nHost: x".encode()),
    "no slash": smuggling(b"GET healthz HTTP/1.1\nHost: x"),
    "101 headers": smuggling(b"GET /healthz HTTP/1.1\nHost: x" + b"\nX: y" * 100),
    "a long header": smuggling(b"GET /healthz HTTP/1.1\nHost: x\nX: " + b"y" * 70_000),
    "a long name": smuggling(b"GET /healthz HTTP/1.1\nHost: x\n" + b"y" * 70_000 + b": z"),
    "a long target": smuggling(b"GET /" + b"y" * 70_000 + b" HTTP/1.1\nHost: x"),
    "a long method": smuggling(b"G" * 70_000 + b" / HTTP/1.1\nHost: x"),
}  # fmt: skip

CHUNKS = {
    "no size": b"\r\nx\r\n",
    "not hexadecimal": b"1g\r\n",
    "0x": b"0x1\r\nx\r\n",
    "signed": b"+1\r\nx\r\n",
    "negative": b"-1\r\nx\r\n",
    "blank before": b" 1\r\nx\r\n",
    "bare LF": b"1\nx\n",
    "bare CR": b"1\rx\r",
    "too short": b"1\r\nxy\r\n0\r\n\r\n",
    "too long": b"3\r\nx\r\n0\r\n\r\n",
    "no end": b"1\r\nx0\r\n\r\n",
    "17 digits": b"00000000000000001\r\nx\r\n",
    "a gigabyte": b"40000000\r\nx",
    "all but infinite": b"ffffffffffffffff\r\nx",
    "a long extension": b"1;" + b"x" * 5000 + b"\r\nx\r\n",
    "an endless extension": b"1;" + b"x" * 70_000,
    "NUL in an extension": b"1;\x00\r\nx\r\n",
    "a bad trailer": b"0\r\nno colon\r\n\r\n",
    "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "many trailers": b"0\r\n" + b"A: b\r\n" * 20_000,
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLINGS)
def test_what_can_be_read_in_two_ways_is_refused(node: NodeServer, registry: RegistryServer, name: str) -> None:
    for server in (node, registry):
        with Talk(server.address) as talk:
            response = talk.send(SMUGGLINGS[name]).response()
            assert response.status in (400, 411, 413, 431, 501, 505), response
            assert response.headers["connection"] == "close"
            is_sentence(response.json, "bad_request", "too_large")
            assert talk.rest() == b""
    assert ask(node.address, op="get", key="smuggled")["found"] is False


@pytest.mark.parametrize("name", CHUNKS)
def test_bad_chunks_are_refused(node: NodeServer, name: str) -> None:
    head = b"PUT /kv/smuggled HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Talk(node.address) as talk:
        response = talk.send(head, CHUNKS[name] + SMUGGLED).response()
        assert response.status in (400, 413, 431) and response.headers["connection"] == "close"
        is_sentence(response.json, "bad_request", "too_large")
        assert talk.rest() == b""
    assert ask(node.address, op="get", key="smuggled")["found"] is False


def test_a_chunked_body_may_not_grow_over_the_limit(node: NodeServer) -> None:
    with Talk(node.address) as talk:
        talk.send(b"PUT /kv/smuggled HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # it need not be read to its end
            for _ in range(20):
                talk.send(b"100000\r\n" + b"x" * MIB + b"\r\n")
        assert talk.response().status == 413
    assert ask(node.address, op="get", key="smuggled")["found"] is False


# ------------------------------------------------------- crowds of connections


def test_a_thousand_half_messages_neither_fill_the_memory_nor_stop_the_others(node: NodeServer) -> None:
    before = memory_bytes(node)
    halves = (
        b"16000000\n",
        b'{"op":"put","key":"half","value":"',
        b"PUT /kv/half HTTP/1.1\r\nHost: x\r\nContent-Length: 16000000\r\n\r\n",
    )
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(Talk(node.address)) for _ in range(1000)]
        for talk, half in zip(crowd, halves * 334):
            talk.socket.setblocking(False)
            talk.socket.send(half)
        slowest_s = 0.0
        with Talk(node.address) as other:
            for _ in range(6):  # 600 MB in all
                for talk in crowd:
                    with contextlib.suppress(OSError):
                        talk.socket.send(b"x" * 100_000)
                began = time.monotonic()
                assert other.ask(op="get", key="kept/7")["value"] == KEPT["kept/7"]
                slowest_s = max(slowest_s, time.monotonic() - began)
            assert slowest_s < 5
            assert memory_bytes(node) - before < 400 * MIB  # 256 MiB is the bound; some is on its way out
    assert ask(node.address, op="get", key="half")["found"] is False


def test_a_drip_holds_up_nobody(node: NodeServer, registry: RegistryServer) -> None:
    drips = [b"16000000\n" + b"x" * 40, b'{"op":"ping"' + b" " * 40, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40]
    for server in (node, registry):
        with contextlib.ExitStack() as stack:
            crowd = [(stack.enter_context(Talk(server.address)), drips[n % 3]) for n in range(60)]
            other = stack.enter_context(Talk(server.address))
            for position in range(40):
                for talk, drip in crowd:
                    with contextlib.suppress(OSError):  # the registry takes no 16 MB
                        talk.send(drip[position : position + 1])
                assert other.ask(op="ping")["ok"]


def test_connections_that_are_reset_take_nobody_along(node: NodeServer, registry: RegistryServer) -> None:
    large = frame({"op": "put", "key": "reset", "value": "x" * 100_000})
    streams = [b"", b"1", b"100\n", large[:50_000], large, frame({"op": "scan"}) * 200, line({"op": "scan"}) * 200,
               http("GET", "/kv?prefix=kept") * 100, b"GET / HT", http("PUT", "/kv/reset", b"x" * 100)[:-50]]  # fmt: skip
    for server in (node, registry):
        with Talk(server.address) as witness:
            for round_ in range(30):
                for stream in streams:
                    talk = Talk(server.address)
                    talk.send(stream)
                    if round_ % 3 == 0:
                        talk.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    elif round_ % 3 == 1:
                        talk.finish()
                    talk.socket.close()
                assert witness.ask(op="ping")["ok"]


def test_a_flood_of_pipelined_requests_is_answered_whole_and_in_order(node: NodeServer) -> None:
    number = 30_000
    requests = b"".join(frame({"op": "get", "key": f"kept/{n % 50}", "id": n}) for n in range(number))
    with Talk(node.address) as flood, Talk(node.address) as other:
        sender = threading.Thread(target=flood.send, args=(requests,))
        sender.start()
        slowest_s = 0.0
        for n in range(number):
            reply = flood.reply()
            assert reply["id"] == n and reply["value"]["n"] == n % 50
            if n % 3000 == 0:
                began = time.monotonic()
                assert other.ask(op="ping")["ok"]
                slowest_s = max(slowest_s, time.monotonic() - began)
        sender.join()
        assert slowest_s < 3


# ------------------------------------------------------------- large replies


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    """A node of its own, whose peak of memory nothing else has raised, with a value of 1 MiB."""
    with node_alone(tmp_path_factory.mktemp("large")) as server:
        assert ask(server.address, op="put", key="large", value="x" * MIB)["ok"]
        yield server
        assert server.alive and "Traceback" not in server.log


def test_who_reads_gets_all_of_many_large_replies(large: NodeServer) -> None:
    with Talk(large.address) as talk:
        talk.send(b"".join(frame({"op": "get", "key": "large", "id": n}) for n in range(300)))
        for n in range(300):
            reply = talk.reply()
            assert reply["ok"] and reply["id"] == n and len(reply["value"]) == MIB
    assert memory_peak_bytes(large) < 150 * MIB


@pytest.mark.parametrize("read", ["linearizable", "stale"])
def test_who_does_not_read_fills_no_memory(large: NodeServer, read: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            deaf = stack.enter_context(Talk(large.address))
            deaf.send(frame({"op": "get", "key": "large", "read": read}) * 1000)
        for _ in range(20):
            assert ask(large.address, op="ping")["ok"]
        assert memory_bytes(large) < 500 * MIB
    assert ask(large.address, op="get", key="large")["found"]
    assert memory_peak_bytes(large) < 500 * MIB


def test_small_writes_with_large_replies_cannot_fill_a_node_that_applies_them(large: NodeServer) -> None:
    """Each of these answers with 1 MiB, in one batch that every node must apply, at each start again."""
    refused = {"op": "put", "key": "large", "value": 0, "if": {"rev": 0}}
    reading = {"op": "txn", "then": [{"op": "incr", "key": "n"}, {"op": "get", "key": "large"}]}
    outcomes = []
    with Talk(large.address) as talk:
        sender = threading.Thread(target=talk.send, args=(b"".join(map(frame, [refused, reading] * 250)),))
        sender.start()
        for _ in range(500):
            reply = talk.reply()
            outcomes.append(reply["ok"])
            if not reply["ok"]:
                is_sentence(reply, "overloaded")
        sender.join()
    assert outcomes[0] and False in outcomes
    counted = ask(large.address, op="get", key="n")["value"]
    assert counted == sum(outcomes[1::2])  # what was refused was not done
    assert memory_peak_bytes(large) < 500 * MIB
    large.restart()
    wait_leading(large)
    assert ask(large.address, op="get", key="n")["value"] == counted
    assert memory_peak_bytes(large) < 300 * MIB


def test_writes_that_come_faster_than_the_disk_takes_them_fill_no_memory(large: NodeServer) -> None:
    value = "x" * (4 * MIB)

    def write(number: int) -> None:
        with Talk(large.address, 60) as talk:
            stream = frame({"op": "put", "key": f"fast/{number}", "value": value})
            sender = threading.Thread(target=lambda: [talk.send(stream) for _ in range(12)])
            sender.start()
            for _ in range(12):
                reply = talk.reply()
                if not reply["ok"]:
                    is_sentence(reply, "overloaded", "timeout")
            sender.join()

    writers = [threading.Thread(target=write, args=(n,)) for n in range(10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert memory_peak_bytes(large) < 900 * MIB
    assert ask(large.address, op="put", key="fast/0", value=1)["ok"]


# --------------------------------------------------------------- descriptors


@contextlib.contextmanager
def descriptors(most: int) -> Iterator[None]:
    """What this process starts meanwhile may open `most` files and connections, and can't raise that."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class PoorNode(NodeServer):
    """A node that may open 64 files and connections."""

    def spawn(self) -> None:
        """See Server."""
        with descriptors(64):
            super().spawn()
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (64, 64))


@pytest.fixture
def poor(tmp_path: Path) -> Iterator[PoorNode]:
    node = PoorNode("poor", tmp_path / "poor")
    try:
        node.start()
        wait_leading(node)
        yield node
        assert node.alive and "Traceback" not in node.log
    finally:
        node.kill()


def busy(server: Server, seconds: float = 0.4) -> float:
    """Which part of the next `seconds` the process of `server` computes."""
    before_s = cpu_s(server)
    time.sleep(seconds)
    return (cpu_s(server) - before_s) / seconds


def test_clients_can_not_take_the_descriptors_that_the_disk_needs(poor: PoorNode) -> None:
    with Talk(poor.address) as early, contextlib.ExitStack() as stack:
        assert early.ask(op="put", key="early", value=1)["ok"]
        crowd = [stack.enter_context(Talk(poor.address)) for _ in range(100)]
        is_sentence(json.loads(crowd[-1].line()), "overloaded")
        for n in range(10):  # over the size of a segment of the log, so another has to be opened
            assert early.ask(op="put", key=f"early/{n}", value="x" * (8 * MIB))["ok"]
        assert early.ask(op="snapshot", timeout=20)["ok"]
    with Talk(poor.address) as late:
        assert wait(lambda: late.ask(op="get", key="early"))["value"] == 1


def test_without_any_descriptor_left_the_node_waits_and_does_not_spin(poor: PoorNode) -> None:
    with Talk(poor.address) as early, contextlib.ExitStack() as stack:
        assert early.ask(op="put", key="early", value=1)["ok"]
        in_use = len(list(Path(f"/proc/{poor.pid}/fd").iterdir()))
        resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (in_use, 64))
        crowd = [stack.enter_context(Talk(poor.address)) for _ in range(30)]  # the kernel accepts them for the node
        wait(lambda: "raise `ulimit -n`" in poor.log, what="the node says what is wrong")
        assert early.ask(op="get", key="early")["value"] == 1
        wait(lambda: busy(poor) < 0.4, what="the node does not spin")
        resource.prlimit(poor.pid, resource.RLIMIT_NOFILE, (64, 64))
        with Talk(poor.address) as late:
            assert late.ask(op="get", key="early")["value"] == 1
        assert len(crowd) == 30


# --------------------------------------------------------------------- peers


def introduction(node: NodeServer) -> dict[str, Any]:
    """What a stranger says that wants to be taken for a member."""
    status = node.status()
    return {
        "op": "peer",
        "version": 1,
        "to": status["id"],
        "cluster": status["cluster"],
        "id": "stranger",
        "name": "s",
        "address": "127.0.0.1:1",
    }


def forward(entry: bytes) -> bytes:
    """The frame with which a member would forward a write, encoded as `entry`."""
    return frame(b'{"m":"forward","ticket":1,"sizes":[%d],"entries":[%b]}' % (len(entry), entry))


POISON = [
    b'["put"]', b'["put","a"]', b'["put","",1]', b'["put",7,1]', b'["put","a",1,{}]', b'["put","a",1,{"if":7}]', b'["put","\\ud800",1]',
    b'["put","a","\\udfff"]', b'["put","' + b"x" * 5000 + b'",1]', b'["put","a",1,{"if":[{"rev":1}]}]', b'["delete"]', b'["delete","a",7]',
    b'["incr","a"]', b'["incr","a",1.5]', b'["incr","a",null]', b'["batch"]', b'["batch",7]', b'["batch",[["incr","a",1]]]',
    b'["batch",[["batch",[]]]]', b'["txn"]', b'["txn",[],[]]', b'["txn",[],[["txn",[],[],[]]],[]]', b'["txn",[],[["scan",{}]],[]]',
    b'["txn",[7],[],[]]', b'["noop"]', b'["get","a"]', b'["scan",{}]', b'["nonsense"]', b"[]", b"[[]]", b"{}", b"7", b"null", b'"put"',
    b'["put","a",\n1]', b'["put","a",' + b"[" * 500 + b"]" * 500 + b"]", b'["put","a",' + b"9" * 5000 + b"]", b'["put","a",1e999]',
]  # fmt: skip


MISCUT = [
    b'{"m":"forward","ticket":1,"sizes":[18,14],"entries":[["put","fuzz/f",1],["incr","n",-1]]}',
    b'{"m":"forward","ticket":1,"sizes":[5,26],"entries":[["put","fuzz/f",1],["incr","n",-1]]}',
    b'{"m":"forward","ticket":1,"sizes":[6,11],"entries":[["put","fuzz/f",1]]}',
]
"""Forwards whose sizes cut the text of their entries elsewhere than between two."""


def test_no_forwarded_write_poisons_the_log(node: NodeServer) -> None:
    hello = frame(introduction(node))
    for forwarded in [*map(forward, POISON), *map(frame, MISCUT)]:
        with Talk(node.address) as talk:
            talk.send(hello + forwarded)
            assert ask(node.address, op="put", key="after", value=1)["ok"]
    node.restart()
    wait_leading(node)


@pytest.mark.parametrize(
    "dialect", [line, lambda request: http("POST", "/rpc", json.dumps(request).encode())], ids=["lines", "HTTP"]
)
def test_nodes_speak_frames_to_one_another(node: NodeServer, dialect: Any) -> None:
    with Talk(node.address) as talk:
        talk.send(dialect(introduction(node))).finish()
        assert b"bad_request" in talk.rest()


# ---------------------------------------------------------------------- fuzz

SEED = int(os.environ.get("DDB_FUZZ_SEED") or random.SystemRandom().randrange(10**9))
FUZZ_S = float(os.environ.get("DDB_FUZZ_S") or 1.5)
SPLICES = [b"\x00", b"\xff", b"\n", b"\r\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"-1", b"0", b"9" * 25, b"1e999", b"NaN", b"null",
           b"\\ud800", b"\\u0000", b" ", b"\t", b"\xc3\xa9", b"\xed\xa0\x80", b"%", b"%00", b";", b"Content-Length: 7\r\n", b"0\r\n\r\n"]  # fmt: skip


def mutated(chance: random.Random, stream: bytes) -> bytes:
    """`stream` with a few accidents."""
    data = bytearray(stream)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice([0, 1, 1, 2, 5, 40]))
        match chance.randrange(6):
            case 0:
                data[start:end] = b""
            case 1:
                data[start:start] = chance.choice(SPLICES)
            case 2:
                data[start:end] = chance.randbytes(end - start)
            case 3:
                data[start:start] = data[start:end] * chance.randint(1, 30)
            case 4 if start < len(data):
                data[start] ^= 1 << chance.randrange(8)
            case _:
                del data[start:]
    return bytes(data)


def requests(chance: random.Random) -> bytes:
    """A few valid requests in one dialect, none of which touches what is kept."""
    key = chance.choice(["fuzz/a", "fuzz/é", "fuzz/🐬"])
    contents = [
        {"op": "put", "key": key, "value": {"a": [1, 2.5, None, "é"]}, "id": chance.randrange(99)},
        {"op": "put", "key": key, "value": 1, "if": [{"rev": 3}, {"value": "x", "op": "<"}]},
        {"op": "get", "key": key, "read": "stale", "max_lag": 3.5, "timeout": 1},
        {"op": "scan", "prefix": "fuzz/", "limit": 3, "reverse": True},
        {"op": "incr", "key": "fuzz/n", "by": -1},
        {"op": "txn", "if": [{"key": key, "exists": True}], "then": [{"op": "delete", "key": key}], "else": [{"op": "count", "start": "a"}]},
        {"op": "batch", "ops": [{"op": "put", "key": key, "value": 1}, {"op": "delete", "key": key}]},
        {"op": "log", "from": 3, "limit": 2},
        {"op": "status"},
        {"op": "nodes"},
        {"op": "register", "id": "fuzz", "name": "fuzz", "address": "127.0.0.1:1", "cluster": "kept"},
        {"op": "bootstrap", "id": "fuzz", "cluster": "fuzz", "expect": 2},
    ]  # fmt: skip
    chosen = chance.choices(contents, k=chance.randint(1, 4))
    match chance.randrange(4):
        case 0:
            return b"".join(map(line, chosen))
        case 1:
            return b"".join(
                chance.choice([
                    http("POST", "/rpc", json.dumps(content).encode()),
                    http("PUT", "/kv/fuzz%2Fa", b'{"a":1}', content_type="application/json", if_match='"7"'),
                    http("GET", "/kv?prefix=fuzz&limit=3"),
                    b"PUT /kv/fuzz%2Fb HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
                ])
                for content in chosen
            )  # fmt: skip
    return b"".join(map(frame, chosen))


def peer_messages(chance: random.Random) -> bytes:
    """What a member might say, none of it with consequences for a leader."""
    messages = [
        b'{"m":"append","term":0,"prev":[0,0],"commit":0,"round":1,"sizes":[],"batches":[]}',
        b'{"m":"append_reply","term":0,"ok":true,"match":1,"round":1,"rejected":0,"hint_index":0,"hint_term":0,"doubt":false}',
        b'{"m":"vote","term":0,"last_index":1,"last_term":1,"transfer":false}',
        b'{"m":"election","term":0,"last_term":1,"last_index":1,"name":"s","ask":1}',
        b'{"m":"election_reply","term":0,"answer":"yield","ask":1}',
        b'{"m":"read","term":0,"ticket":1}',
        b'{"m":"call","ticket":1,"request":{"op":"members"}}',
        b'{"m":"forward","ticket":1,"sizes":[18,15],"entries":[["put","fuzz/f",1],["incr","n",-1]]}',
        b'{"m":"forwarded","ticket":1,"sizes":[11],"replies":[{"ok":true}]}',
        b'{"m":"install","term":0,"index":9,"index_term":1,"offset":0,"size":3,"sha256":"x","data":"YWJj"}',
    ]  # fmt: skip
    message = mutated(chance, chance.choice(messages))
    return frame(b"{}" if _is_lie(message) else message)


def _is_lie(message: bytes) -> bool:
    """Whether `message` is well-formed and of a later term: Raft believes its members, and these can depose a leader."""
    try:
        return json.loads(message)["term"] != 0
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def hail(server: Server, chance: random.Random, make: Any) -> int:
    """Send what `make` makes to `server` for a while, a connection each; returns how many there were."""
    deadline, number = time.monotonic() + FUZZ_S, 0
    while time.monotonic() < deadline:
        number += 1
        with Talk(server.address, 5) as talk, contextlib.suppress(ConnectionError):
            heard = talk.send(make()).finish().rest()
            assert b"Traceback" not in heard and b'"internal"' not in heard, heard
    return number


@pytest.mark.parametrize("kind", ["noise", "accidents"])
def test_fuzz_of_clients(node: NodeServer, registry: RegistryServer, kind: str) -> None:
    print(f"DDB_FUZZ_SEED={SEED}")
    for server in (node, registry):
        chance = random.Random(f"{SEED} {kind} {server.name}")

        def make(chance: random.Random = chance) -> bytes:
            if kind == "noise":
                return chance.choice([b"", b"1", b"{", b"G", b"9\n", b"GET /"]) + chance.randbytes(
                    chance.randint(1, 2000)
                )
            return mutated(chance, requests(chance))

        assert hail(server, chance, make) > 50


def test_fuzz_of_peers(node: NodeServer) -> None:
    print(f"DDB_FUZZ_SEED={SEED}")
    chance = random.Random(f"{SEED} peers")
    hello = frame(introduction(node))

    def make() -> bytes:
        return hello + b"".join(peer_messages(chance) for _ in range(chance.randint(1, 3)))

    assert hail(node, chance, make) > 50
    assert node.status()["role"] == "leader"


def test_after_all_of_this_a_restart_finds_everything(node: NodeServer, registry: RegistryServer) -> None:
    assert node.term() == 0
    node.start()
    wait_leading(node)
    registry.restart()
