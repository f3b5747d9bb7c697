"""The generator speaks each database's protocol as its specification says, and tells successes from failures."""

from __future__ import annotations

import json
import socket
import struct
import threading
from typing import Any

import pytest

from bench import dialect, grpc, jute
from bench.plan import Plan

PLAN = Plan(("",), value_bytes=40, keys=100)
STALE = Plan(("",), value_bytes=40, keys=100, read="stale")


def etcd(plan: Plan = PLAN) -> Any:
    return grpc.Connection(plan)


def zookeeper(plan: Plan = PLAN) -> Any:
    return jute.Connection(plan)


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """HTTP/2 frames: kind, flags, stream, payload."""
    found = []
    while data:
        size, kind, flags = int.from_bytes(data[:3], "big"), data[3], data[4]
        found.append((kind, flags, int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
        assert len(data) >= 9 + size
        data = data[9 + size :]
    return found


def fields(message: bytes) -> list[tuple[int, Any]]:
    """Protobuf's fields, one level deep."""

    def varint() -> int:
        nonlocal message
        value = shift = 0
        while True:
            byte, message = message[0], message[1:]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    found: list[tuple[int, Any]] = []
    while message:
        tag = varint()
        if tag & 7 == 0:
            found.append((tag >> 3, varint()))
        else:
            assert tag & 7 == 2
            size = varint()
            found.append((tag >> 3, message[:size]))
            message = message[size:]
    return found


def message(request: bytes) -> list[tuple[int, Any]]:
    """The protobuf message in a call."""
    data = frames(request)[-1][3]
    assert data[0] == 0 and int.from_bytes(data[1:5], "big") == len(data) - 5
    return fields(data[5:])


def records(data: bytes) -> list[tuple[int, int, bytes]]:
    """Jute requests: xid, type, body."""
    found = []
    while data:
        size, xid, kind = struct.unpack_from(">iii", data)
        found.append((xid, kind, data[12 : 4 + size]))
        assert len(data) >= 4 + size
        data = data[4 + size :]
    return found


def buffers(body: bytes, count: int) -> tuple[list[bytes], bytes]:
    """So many strings of a jute record, and what is behind them."""
    found = []
    for _ in range(count):
        size = int.from_bytes(body[:4], "big")
        found.append(body[4 : 4 + size])
        body = body[4 + size :]
    return found, body


# --- etcd


def test_an_etcd_put_is_one_call_with_key_and_value() -> None:
    connection = etcd()
    (kind, flags, stream, block), (data_kind, data_flags, data_stream, _) = frames(connection.put(42))
    assert (kind, flags, data_kind, data_flags) == (grpc.HEADERS, 4, grpc.DATA, 1) and stream == data_stream == 1
    assert b"/etcdserverpb.KV/Put" in block and b"application/grpc" in block and block.startswith(b"\x83\x86")
    assert message(connection.put(7)) == [(1, b"k0000007"), (2, dialect.value(PLAN))]


def test_each_call_has_a_stream_of_its_own() -> None:
    connection = etcd()
    assert [frames(connection.get(1))[0][2] for _ in range(3)] == [1, 3, 5]


@pytest.mark.parametrize(("plan", "wanted"), [(PLAN, []), (STALE, [(7, 1)])])
def test_only_a_stale_etcd_read_is_serializable(plan: Plan, wanted: list[Any]) -> None:
    assert message(etcd(plan).get(3)) == [(1, b"k0000003"), *wanted]


def test_an_etcd_fill_puts_every_key_in_one_transaction() -> None:
    connection = etcd()
    puts = [fields(fields(operation)[0][1]) for number, operation in message(connection.fill(20, 5)) if number == 2]
    assert puts == [[(1, b"k%07d" % n), (2, dialect.value(PLAN))] for n in range(20, 25)]


def test_a_fill_fits_in_one_frame() -> None:
    connection = etcd(Plan(("",), value_bytes=1000))
    assert all(
        len(payload) <= grpc.FRAME_BYTES_MAX for *_, payload in frames(connection.fill(0, connection.fill_keys_max))
    )
    with pytest.raises(ValueError, match="16384"):
        etcd(Plan(("",), value_bytes=20_000))


def reply(stream: int, ok: bool = True) -> bytes:
    head = grpc.frame(grpc.HEADERS, 4, stream, b"\x88") + grpc.frame(grpc.DATA, 0, stream, b"\0" * 9) if ok else b""
    return head + grpc.frame(grpc.HEADERS, 5, stream, b"trailers")


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_etcd_replies_in_pieces_are_put_together(step: int) -> None:
    connection, data, rest, found = etcd(), reply(1) + reply(3, ok=False) + reply(5), b"", []
    for start in range(0, len(data), step):
        some, rest = connection.outcomes(rest + data[start : start + step])
        found += some
    assert found == ["", "grpc_error", ""] and rest == b""


def test_a_ping_is_acknowledged_with_the_next_request() -> None:
    connection = etcd()
    ping = grpc.frame(grpc.PING, 0, 0, b"12345678")
    settings = grpc.frame(grpc.SETTINGS, 0, 0, b"")
    assert connection.outcomes(settings + ping + grpc.frame(grpc.PING, 1, 0, b"87654321")) == ([], b"")
    sent = frames(connection.put(1))
    assert sent[:2] == [(grpc.SETTINGS, 1, 0, b""), (grpc.PING, 1, 0, b"12345678")] and len(sent) == 4
    assert len(frames(connection.put(1))) == 2


def test_a_reset_stream_is_a_failure_and_goaway_ends_the_connection() -> None:
    connection = etcd()
    connection.put(1)
    assert connection.outcomes(grpc.frame(grpc.RST_STREAM, 0, 1, b"\0\0\0\1")) == (["stream_reset"], b"")
    with pytest.raises(ConnectionError):
        connection.outcomes(grpc.frame(grpc.GOAWAY, 0, 0, b"\0" * 8))


def test_a_stream_that_is_reset_after_its_answer_was_answered_once() -> None:
    connection = etcd()
    connection.put(1)
    answer = grpc.frame(grpc.DATA, 0, 1, b"\0" * 5) + grpc.frame(grpc.HEADERS, grpc.END_STREAM, 1, b"")
    assert connection.outcomes(answer + grpc.frame(grpc.RST_STREAM, 0, 1, b"\0" * 4)) == ([""], b"")


# --- ZooKeeper


def test_a_zookeeper_put_sets_the_data_of_a_node() -> None:
    [(xid, kind, body)] = records(zookeeper().put(42))
    assert xid > 0 and kind == jute.SET
    assert buffers(body, 2) == ([b"/k0000042", dialect.value(PLAN)], struct.pack(">i", -1))


def test_a_zookeeper_fill_creates_a_node_that_anybody_may_use() -> None:
    [(_, kind, body)] = records(zookeeper().fill(9, 1))
    (path, data), rest = buffers(body, 2)
    assert (kind, path, data) == (jute.CREATE, b"/k0000009", dialect.value(PLAN))
    assert struct.unpack_from(">ii", rest) == (1, 31)
    assert buffers(rest[8:], 2) == ([b"world", b"anyone"], struct.pack(">i", 0))


def test_a_linearizable_zookeeper_read_is_a_sync_and_a_read_and_counts_once() -> None:
    connection = zookeeper()
    (sync_xid, sync, _), (xid, get, body) = records(connection.get(5))
    assert (sync, get) == (jute.SYNC, jute.GET) and buffers(body, 1) == ([b"/k0000005"], b"\0")
    replies = [struct.pack(">iiqi", 16, each, 1, 0) for each in (sync_xid, xid)]
    assert connection.outcomes(b"".join(replies)) == ([""], b"")


def test_a_stale_zookeeper_read_is_a_read_alone() -> None:
    assert [kind for _, kind, _ in records(zookeeper(STALE).get(5))] == [jute.GET]


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_zookeeper_replies_in_pieces_are_put_together(step: int) -> None:
    replies = [struct.pack(">iiqi", 20, 2, 1, 0) + b"data", struct.pack(">iiqi", 16, 2, 1, -101)]
    connection, data, rest, found = zookeeper(STALE), b"".join(replies), b"", []
    for start in range(0, len(data), step):
        some, rest = connection.outcomes(rest + data[start : start + step])
        found += some
    assert found == ["", "zookeeper_-101"] and rest == b""


def test_a_zookeeper_session_is_opened_before_the_first_request() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        greeting = threading.Thread(target=zookeeper().greet, args=(ours,))
        greeting.start()
        asked = jute.read(theirs)
        assert struct.unpack_from(">iqiq", asked) == (0, 0, jute.SESSION_MS, 0)
        theirs.sendall(jute.text(b"welcome"))
        greeting.join(5)
        assert not greeting.is_alive()


def test_a_zookeeper_that_is_not_ready_is_a_failed_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(OSError):
            zookeeper().greet(ours)


# --- ddb


def test_a_ddb_fill_is_one_batch() -> None:
    connection = dialect.new(PLAN)
    length, _, rest = connection.fill(20, 5).partition(b"\n")
    assert int(length) == len(rest) - 1
    request = json.loads(rest)
    assert [part["key"] for part in request["ops"]] == [f"k{n:07d}" for n in range(20, 25)]
    assert {part["value"] for part in request["ops"]} == {dialect.value(PLAN).decode()}


def test_large_values_are_filled_a_few_at_a_time() -> None:
    assert dialect.fill_keys(PLAN) == dialect.FILL_KEYS
    assert dialect.fill_keys(Plan(("",), value_bytes=1 << 20)) == 1
