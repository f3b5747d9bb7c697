"""Bad input of every kind against real processes: one clear sentence each, and the next client is served."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import REPOSITORY, NodeServer, RegistryServer, environment, wait
from tests.talk import Talk, frame, line
from tests.talk import http as request_http


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    """One node alone, to be mistreated by many tests."""
    server = NodeServer("n1", tmp_path_factory.mktemp("hostile") / "n1")
    try:
        server.start()
        wait(lambda: server.status()["role"] == "leader", what="the node leads itself")
        yield server
        assert server.alive and "Traceback" not in server.log
    finally:
        server.kill()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[NodeServer]:
    """A node for one test alone."""
    server = NodeServer("victim", tmp_path / "victim")
    try:
        server.start()
        wait(lambda: server.status()["role"] == "leader", what="the node leads itself")
        yield server
    finally:
        server.kill()


def still_serves(server: NodeServer) -> None:
    """A new client can write and read."""
    with Talk(server.address) as talk:
        assert talk.ask(op="put", key="still", value="here")["ok"]
        assert talk.ask(op="get", key="still")["value"] == "here"


def sentence(reply: dict[str, Any], code: str) -> None:
    """`reply` must be a failure with `code` that tells a person something."""
    assert reply["ok"] is False and reply["error"] == code, reply
    message = reply["message"]
    assert len(message) < 400 and (message[:1].isupper() or message[:1] in "`'-") and message.endswith((".", "?")), (
        message
    )
    assert "Traceback" not in message and "\n" not in message


def resident_bytes(server: NodeServer) -> int:
    """How much memory the process holds now."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS")) * 1024


# --- frames and payloads


@pytest.mark.parametrize(
    ("stream", "code"),
    [
        (b'24\n{"op":"get","key":"city"}\n', "bad_frame"),
        (b'26\n{"op":"get","key":"city"}\n', "bad_frame"),
        (b'+25\n{"op":"get","key":"city"}\n', "bad_frame"),
        (b'-25\n{"op":"get","key":"city"}\n', "bad_frame"),
        (b'025\n{"op":"get","key":"city"}\n', "bad_frame"),
        (b'25 \n{"op":"get","key":"city"}\n', "bad_frame"),
        (b'25\r\n{"op":"get","key":"city"}\n', "bad_frame"),
        (b'0x19\n{"op":"get","key":"city"}\n', "bad_frame"),
        (b"9" * 5000, "bad_frame"),
        (b"25\n", "bad_frame"),
        (b"1073741824\n", "too_large"),
        (b"16777217\n", "too_large"),
    ],
)
def test_a_bad_frame_gets_a_sentence_and_the_next_connection_is_served(
    node: NodeServer, stream: bytes, code: str
) -> None:
    with Talk(node.address) as talk:
        talk.send(frame({"op": "ping"}) + stream).finish()  # a good one first: it also makes the dialect frames
        assert talk.reply()["ok"]
        sentence(talk.reply(), code)
        assert talk.rest() == b""
    still_serves(node)


PAYLOADS = [
    b"nonsense",
    b"[]",
    b'"get"',
    b"null",
    b"{",
    b'{"op":"get","key":"k"}}',
    b'{"op":"get","key":"\xff"}',
    b'{"op":"put","key":"k","value":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b"[" * 1_000_000,
    b'{"op":"put","key":"k","value":' + b"9" * 10_000 + b"}",
    b'{"op":"put","key":"k","value":NaN}',
    b'{"op":"put","key":"k","value":-Infinity}',
    b'{"op":"put","key":"k","value":1e999}',
    b'{"op":"put","key":"k","value":"\\ud800"}',
    b'{"op":"put","key":"\\udfff","value":1}',
    b"{}",
    b'{"op":null}',
    b'{"op":["get"]}',
    b'{"op":{}}',
    b'{"op":"GET"}',
    b'{"op":"drop_everything"}',
    b'{"op":"' + b"x" * 100_000 + b'"}',
    b'{"op":"get"}',
    b'{"op":"get","key":null}',
    b'{"op":"get","key":""}',
    b'{"op":"put","key":"k"}',
    b'{"op":"put","value":1}',
    b'{"op":"put","key":1,"value":1}',
    b'{"op":"put","key":"k","value":1,"if":7}',
    b'{"op":"put","key":"k","value":1,"if":{"rev":"one"}}',
    b'{"op":"put","key":"k","value":1,"if":{"op":"<>","value":1}}',
    b'{"op":"get","key":"k","read":"fresh"}',
    b'{"op":"get","key":"k","timeout":"soon"}',
    b'{"op":"get","key":"k","timeout":0}',
    b'{"op":"scan","limit":-1}',
    b'{"op":"scan","prefix":7}',
    b'{"op":"incr","key":"k","by":0.5}',
    b'{"op":"batch"}',
    b'{"op":"batch","ops":[{"op":"get","key":"k"}]}',
    b'{"op":"txn","then":"all"}',
    b'{"op":"txn","then":[[]]}',
    b'{"op":"member_remove"}',
    b'{"op":"member_remove","name":"nobody"}',
    b'{"op":"transfer","to":"nobody"}',
    b'{"op":"log","from":"the start"}',
    b'{"op":"peer"}',
    b'{"op":"watch","key":7}',
    b'{"op":"watch","key":"k","prefix":"p"}',
    b'{"op":"watch","key":"k","from":-1}',
    b'{"op":"history","limit":0}',
    b'{"op":"get","key":"k","rev":"one"}',
    b'{"op":"lease_grant"}',
    b'{"op":"lease_grant","ttl":-1}',
    b'{"op":"lease_revoke","lease":"l"}',
    b'{"op":"put","key":"k","value":1,"lease":"l"}',
    b'{"op":"put","key":"k","value":1,"client":1}',
    b'{"op":"session_close"}',
    b'{"op":"backup"}',
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload[:40].decode("latin-1"))
def test_a_bad_payload_gets_a_sentence_in_each_dialect_and_the_connection_goes_on(
    node: NodeServer, payload: bytes
) -> None:
    with Talk(node.address) as talk:
        sentence(talk.send(frame(payload)).reply(), "bad_request")
        if b'"peer"' not in payload:  # a node that introduces itself wrongly is hung up on
            assert talk.ask(op="ping")["ok"]
    if payload.startswith(b"{"):
        with Talk(node.address) as talk:
            sentence(json.loads(talk.send(line(payload)).line()), "bad_request")
    with Talk(node.address) as talk:
        response = talk.send(request_http("POST", "/rpc", payload)).response()
        assert response.status == 400
        sentence(response.json, "bad_request")
    still_serves(node)


def test_keys_and_values_over_their_limit_are_too_large(node: NodeServer) -> None:
    with Talk(node.address) as talk:
        sentence(talk.ask(op="put", key="k" * 4097, value=1), "too_large")
        sentence(talk.ask(op="get", key="é" * 2049), "too_large")
        assert talk.ask(op="put", key="é" * 2048, value=1)["ok"]
    with Talk(node.address) as talk:
        talk.send(frame({"op": "put", "key": "k", "value": "x" * (16 << 20)}))
        sentence(talk.reply(), "too_large")
    still_serves(node)


FIELDS = ["key", "value", "if", "then", "else", "ops", "by", "prefix", "start", "end", "limit", "reverse", "read"]
OPS = ["put", "get", "delete", "scan", "count", "incr", "txn", "batch", "log", "ping", "status", "members"]
OTHER_FIELDS = ["keys_only", "max_lag", "timeout", "forward", "client", "seq", "lease", "from", "name", "to"]
SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=5)
THINGS = st.recursive(
    SCALARS | st.sampled_from(["k", "stale", "rev", "<", "put", {"key": "k", "rev": 0}, {"op": "put", "key": "k"}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["op", *FIELDS]), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(OPS), st.dictionaries(st.sampled_from(FIELDS + OTHER_FIELDS), THINGS, max_size=6))
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_combination_of_fields_is_a_bug(talk_all_along: Talk, op: str, fields: dict[str, Any]) -> None:
    fields = {**fields, "timeout": 1} if type(fields.get("timeout")) in (int, float) else fields
    reply = talk_all_along.ask(**fields, op=op)
    assert reply["ok"] is True or reply["error"] in {"bad_request", "too_large", "no_leader", "not_leader", "timeout"}


@pytest.fixture(scope="module")
def talk_all_along(node: NodeServer) -> Iterator[Talk]:
    """One connection for many requests."""
    with Talk(node.address) as talk:
        yield talk


@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_bytes_harm_the_node(node: NodeServer, stream: bytes) -> None:
    with Talk(node.address) as talk, contextlib.suppress(ConnectionError):
        talk.send(stream).finish()
        assert b"Traceback" not in talk.rest()


def test_after_all_of_this_the_node_serves(node: NodeServer) -> None:
    still_serves(node)
    assert "Traceback" not in node.log


# --- HTTP


@pytest.mark.parametrize(
    ("stream", "status"),
    [
        (b"GET /kv/a HTTP/1.1\r\n\r\n", 400),
        (b"BREW /kv/a HTTP/1.1\r\nHost: x\r\n\r\n", 501),
        (b"PUT /kv/a HTTP/1.1\r\nHost: x\r\n\r\n", 411),
        (b"PUT /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n", 413),
        (b"PUT /kv/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 100_000, 431),
        (b"GET /kv/" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"PUT /kv/" + b"x" * 4097 + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nv", 413),
        (b"GET /kv/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /kv/%ff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"OK\n\n", 400),
    ],
)
def test_a_bad_http_request_gets_its_status_and_a_sentence(node: NodeServer, stream: bytes, status: int) -> None:
    with Talk(node.address) as talk:
        with contextlib.suppress(ConnectionError):
            talk.send(stream).finish()
        response = talk.response()
        assert response.status == status
        sentence(response.json, response.json["error"])
    still_serves(node)


# --- too much


def test_a_flood_of_connections_with_half_a_message_leaves_room_for_others(node: NodeServer) -> None:
    with contextlib.ExitStack() as stack:
        for stream in (b"1000\n{", b'{"op":', b"GET / HTTP/1.1\r\nHo", b""):
            for _ in range(100):
                talk = stack.enter_context(Talk(node.address))
                talk.send(stream)
        still_serves(node)
    still_serves(node)


def test_clients_that_never_read_do_not_fill_the_memory(node: NodeServer) -> None:
    with Talk(node.address) as talk:
        assert talk.ask(op="put", key="large", value="x" * (1 << 20))["ok"]
    before = resident_bytes(node)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            talk = stack.enter_context(Talk(node.address, timeout_s=0.2))
            with contextlib.suppress(TimeoutError, ConnectionError):
                for _ in range(100):
                    talk.send(frame({"op": "get", "key": "large"}) * 500)
        still_serves(node)
        assert resident_bytes(node) - before < 400 << 20
    still_serves(node)


def test_unfinished_giants_do_not_fill_the_memory(node: NodeServer) -> None:
    before = resident_bytes(node)
    refused = 0
    with contextlib.ExitStack() as stack:
        giants = [stack.enter_context(Talk(node.address)) for _ in range(24)]
        for giant in giants:
            with contextlib.suppress(ConnectionError):
                giant.send(b"16000000\n", b"x" * 15_000_000)
        still_serves(node)
        assert resident_bytes(node) - before < 500 << 20
        for giant in giants:
            giant.socket.settimeout(0.05)
            with contextlib.suppress(TimeoutError, ConnectionError, EOFError):
                sentence(giant.reply(), "overloaded")
                refused += 1
    assert refused >= 4  # 16 of them fit into 256 MiB
    still_serves(node)


# --- those who say that they are a node


def hello(server: NodeServer, **changes: Any) -> dict[str, Any]:
    """The introduction of a stranger that knows the cluster."""
    status = server.status()
    stranger = {"id": "stranger", "name": "stranger", "address": "127.0.0.1:9", "cluster": status["cluster"]}
    return {"op": "peer", "version": 1, "to": status["id"], **stranger, **changes}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"cluster": "another"}, "wrong_cluster"),
        ({"to": "somebody else"}, "bad_request"),
        ({"address": "nowhere"}, "bad_request"),
        ({"id": 7}, "bad_request"),
        ({"cluster": 7}, "bad_request"),
        ({"name": None}, "bad_request"),
    ],
)
def test_a_wrong_introduction_is_refused(node: NodeServer, change: dict[str, Any], code: str) -> None:
    with Talk(node.address) as talk:
        sentence(talk.send(frame(hello(node, **change))).reply(), code)
    still_serves(node)


MESSAGES = [
    b"",
    b"nonsense",
    b"[]",
    b"{}",
    b'{"m":7}',
    b'{"m":"nonsense"}',
    b'{"m":"append"}',
    b'{"m":"append","term":"1","prev":[0,0],"commit":0,"round":0,"sizes":[],"batches":[]}',
    b'{"m":"append","term":1,"prev":[0],"commit":0,"round":0,"sizes":[],"batches":[]}',
    b'{"m":"append","term":1,"prev":[0,0],"commit":-1,"round":0,"sizes":[],"batches":[]}',
    b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[2],"batches":[{}]}',
    b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[9],"batches":[{}]}',
    b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":7,"batches":7}',
    b'{"m":"vote"}',
    b'{"m":"vote","term":-1,"last_index":0,"last_term":0,"transfer":false}',
    b'{"m":"election"}',
    b'{"m":"install"}',
    b'{"m":"forward","ticket":1,"sizes":[1],"entries":[7]}',
    b'{"m":"call","ticket":1,"request":7}',
    b'{"m":"call_reply","ticket":1,"reply":[]}',
    b"\xff\xfe",
    b"[" * 100_000,
]


def test_malformed_messages_of_a_peer_end_its_connection_and_nothing_else(victim: NodeServer) -> None:
    introduction = frame(hello(victim))
    for message in MESSAGES:
        with Talk(victim.address) as talk, contextlib.suppress(ConnectionError):
            talk.send(introduction + frame(message) if message else introduction + b"x")
            talk.finish()
            talk.rest()
    still_serves(victim)
    assert "Traceback" not in victim.log


# --- starting


def run(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a node to its end, which must be soon."""
    command = [sys.executable, "-m", "ddb.node", *flags]
    return subprocess.run(
        command, env=environment(**variables), cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (["--nonsense"], {}),
        (["stray"], {}),
        (["--port"], {}),
        (["--port", "http"], {}),
        (["--port", "65536"], {}),
        (["-ra", "nowhere"], {}),
        (["-ra", "https://127.0.0.1:8080"], {}),
        (["--advertise", "me"], {}),
        (["--name", ""], {}),
        (["--name", "two words"], {}),
        (["--election", "lottery"], {}),
        (["--expect", "0"], {}),
        (["--max-frame", "much"], {}),
        ([], {"DDB_PORT": "http"}),
        ([], {"DDB_REGISTRY": "nowhere"}),
        ([], {"DDB_ELECTION": "lottery"}),
    ],
)
def test_a_setting_that_does_not_fit_ends_with_2_and_a_sentence(flags: list[str], variables: dict[str, str]) -> None:
    ended = run(*flags, **variables)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_a_busy_port_is_a_sentence(node: NodeServer, tmp_path: Path) -> None:
    ended = run("--port", str(node.port), "--data-dir", str(tmp_path / "data"))
    assert ended.returncode == 1 and "in use" in ended.stderr and "Traceback" not in ended.stderr
    still_serves(node)


def test_a_data_directory_in_use_is_a_sentence(node: NodeServer) -> None:
    ended = run("--port", "0", "--data-dir", str(node.directory))
    assert ended.returncode == 1 and "in use" in ended.stderr and "Traceback" not in ended.stderr
    still_serves(node)


def test_a_data_directory_that_cannot_be_one_is_a_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    ended = run("--port", "0", "--data-dir", str(blocked))
    assert ended.returncode == 1 and str(blocked) in ended.stderr and "Traceback" not in ended.stderr


def test_a_host_that_is_not_here_is_a_sentence(tmp_path: Path) -> None:
    ended = run("--port", "0", "--host", "192.0.2.1", "--data-dir", str(tmp_path / "data"))
    assert ended.returncode == 1 and "no address of this machine" in ended.stderr and "Traceback" not in ended.stderr


# --- registries that are none, or not ours


@contextlib.contextmanager
def silent_listener() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    """Something else altogether."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_without_its_registry_a_new_node_says_so_and_waits(tmp_path: Path) -> None:
    registry = RegistryServer("registry", tmp_path / "registry")
    server = NodeServer("n1", tmp_path / "n1")
    try:
        registry.start()
        registry.kill()
        server.registry = registry
        server.start()
        wait(lambda: "can't be reached" in server.log)
        with Talk(server.address) as talk:
            sentence(talk.ask(op="put", key="k", value=1, timeout=0.3), "no_leader")
            assert talk.ask(op="status")["leader"] is None
        assert "Traceback" not in server.log
        registry.start()
        wait(lambda: server.status()["role"] == "leader", what="the node founds its cluster after all")
        still_serves(server)
    finally:
        server.kill()
        registry.kill()


@pytest.mark.parametrize("kind", ["node", "web", "silent"])
def test_a_wrong_registry_is_named_and_harms_nothing(node: NodeServer, tmp_path: Path, kind: str) -> None:
    server = NodeServer("n2", tmp_path / "n2")
    with contextlib.ExitStack() as stack:
        address = node.address
        if kind == "web":
            address = stack.enter_context(web_server())
        elif kind == "silent":
            address = stack.enter_context(silent_listener())
        stack.callback(server.kill)
        server.flags = ["-ra", address]
        server.start()
        wait(lambda: address in server.log and ("registry" in server.log), what="the log names the registry")
        with Talk(server.address) as talk:
            sentence(talk.ask(op="put", key="k", value=1, timeout=0.3), "no_leader")
        assert "Traceback" not in server.log
        assert server.term() == 0
    still_serves(node)


def test_a_node_of_another_cluster_is_told_so_and_goes_on_with_its_own(tmp_path: Path) -> None:
    registry = RegistryServer("registry", tmp_path / "registry")
    ours, theirs = (NodeServer(name, tmp_path / name) for name in ("ours", "theirs"))
    try:
        theirs.start()
        wait(lambda: theirs.status()["role"] == "leader")
        theirs.kill()
        registry.start()
        ours.registry = registry
        ours.start()
        wait(lambda: ours.status()["role"] == "leader")
        theirs.registry = registry
        theirs.start()
        wait(lambda: "serves the cluster" in theirs.log)
        wait(lambda: theirs.status()["role"] == "leader")
        still_serves(theirs)
        still_serves(ours)
        assert [n["name"] for n in registry.ask(op="nodes")["nodes"]] == ["ours"]
        assert [m["name"] for m in ours.status()["members"]] == ["ours"]
    finally:
        for server in (theirs, ours, registry):
            server.kill()
