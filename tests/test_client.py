"""The client's promises: what it repeats, what it never repeats, where it goes, and what it tells."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ddb
from ddb import errors, wire
from ddb.client import Client, Item, next_page
from ddb.results import from_wire, to_wire
from tests.fake_server import FakeServer, failure
from tests.harness import wait


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as one:
        yield one


@pytest.fixture
def other() -> Iterator[FakeServer]:
    with FakeServer() as one:
        yield one


def client_of(*servers: FakeServer, **options: Any) -> Client:
    options = {"timeout_s": 3.0, "discover": False, **options}
    return ddb.connect([s.address for s in servers], **options)


def free_address() -> str:
    """An address on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


# What it sends and returns


def test_each_method_sends_its_request_and_returns_a_typed_result(server: FakeServer) -> None:
    replies: dict[str, dict[str, Any]] = {
        "put": {"rev": 7, "version": 2},
        "get": {"found": True, "key": "k", "value": {"a": 1}, "rev": 7, "created": 3, "version": 2},
        "delete": {"deleted": 1, "rev": 8},
        "scan": {"items": [{"key": "k", "value": 1, "rev": 7, "created": 3, "version": 2}], "more": True, "rev": 9},
        "count": {"count": 4, "rev": 9},
        "incr": {"value": 5, "rev": 10},
        "batch": {"rev": 11},
        "txn": {"succeeded": True, "results": [{"ok": True, "rev": 12}], "rev": 12},
        "ping": {"node": "n1", "time": 1.5},
        "members": {"members": [{"name": "n1", "id": "u", "address": "h:1", "role": "voter", "alive": True}]},
        "member_remove": {"rev": 13},
        "member_promote": {"rev": 14},
        "transfer": {"leader": "h:2", "name": "n2"},
        "snapshot": {"rev": 15},
        "log": {"entries": [{"index": 1}]},
    }
    server.answer = lambda request: {"ok": True, **replies[request["op"]]}
    with client_of(server) as db:
        assert db.put("k", "v").rev == 7
        assert db.get("k") == Item("k", {"a": 1}, 7, 3, 2)
        assert db.delete("k").deleted == 1
        assert [item.key for item in db.scan("k", limit=1, reverse=True)] == ["k"]
        assert db.count(start="a", end="b") == 4
        assert db.incr("n", 2).value == 5
        assert db.batch([{"op": "delete", "key": "k"}]) == 11
        assert db.txn({"key": "k", "exists": True}, [{"op": "get", "key": "k"}]).succeeded
        assert db.ping()["node"] == "n1"
        assert db.members()[0].alive is True
        assert (db.member_remove("n3"), db.member_promote("n4"), db.snapshot()) == (13, 14, 15)
        assert db.transfer("n2") == "n2"
        assert db.log(1, 5) == [{"index": 1}]
    sent = {r["op"]: {k: v for k, v in r.items() if k not in ("op", "timeout")} for r in server.requests}
    assert sent["put"] == {"key": "k", "value": "v"}
    assert sent["scan"] == {"prefix": "k", "limit": 1, "reverse": True}
    assert sent["count"] == {"start": "a", "end": "b"}
    assert sent["incr"] == {"key": "n", "by": 2}
    assert sent["txn"] == {"if": [{"key": "k", "exists": True}], "then": [{"op": "get", "key": "k"}], "else": []}
    assert sent["log"] == {"from": 1, "limit": 5}
    assert sent["transfer"] == {"to": "n2"}


def test_a_missing_key_is_none(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "found": False, "key": "k", "value": None}
    with client_of(server) as db:
        assert db.get("k") is None


def test_a_put_whose_condition_fails_shows_the_key_as_it_is(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "applied": False, "found": True, "value": {"$b64": "AQI="}, "rev": 4}
    with client_of(server) as db:
        result = db.put("k", 1, if_={"rev": 3})
    assert (result.applied, result.found, result.value, result.rev) == (False, True, b"\x01\x02", 4)
    assert server.requests[0]["if"] == {"rev": 3}


@pytest.mark.parametrize(
    "value", [b"", b"\x00\xff", [b"a", {"x": b"b"}], {"$b64": 3}, {"$b64": "AA==", "y": 1}, "s", None]
)
def test_bytes_survive_the_wire_wherever_they_stand(value: Any) -> None:
    assert from_wire(json.loads(json.dumps(to_wire(value)))) == value


def test_an_object_that_only_looks_like_bytes_stays_an_object() -> None:
    assert from_wire({"$b64": "not base64!"}) == {"$b64": "not base64!"}


def test_scan_all_goes_on_behind_the_last_key(server: FakeServer) -> None:
    keys = ["a1", "a2", "a3"]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        rest = [k for k in keys if k >= request.get("start", "")]
        items = [{"key": k, "value": k, "rev": 1, "created": 1, "version": 1} for k in rest[:1]]
        return {"ok": True, "items": items, "more": len(rest) > 1, "rev": 9}

    server.answer = answer
    with client_of(server) as db:
        assert [item.key for item in db.scan_all("a")] == keys
    assert server.requests[1] == {"op": "scan", "start": "a1\0", "end": "b", "timeout": server.requests[1]["timeout"]}


def test_the_next_page_goes_on_from_the_last_key_in_either_direction() -> None:
    assert next_page({"op": "scan", "prefix": "ab"}, "abc") == {"op": "scan", "start": "abc\0", "end": "ac"}
    assert next_page({"prefix": "ab", "reverse": True}, "abc") == {"start": "ab", "end": "abc", "reverse": True}
    assert next_page({"prefix": "\U0010ffff"}, "\U0010ffffx") == {"start": "\U0010ffffx\0"}


# What it repeats, and what not


def test_a_write_whose_answer_is_lost_is_never_sent_again(server: FakeServer, other: FakeServer) -> None:
    server.answer = lambda request: None
    with client_of(server, other) as db, pytest.raises(errors.OutcomeUnknown) as caught:
        db.put("k", "v")
    assert caught.value.definite is False
    assert (server.ops, other.ops) == (["put"], [])


def test_an_unknown_operation_is_treated_like_a_write(server: FakeServer, other: FakeServer) -> None:
    server.answer = lambda request: None
    with client_of(server, other) as db, pytest.raises(errors.OutcomeUnknown):
        db.call({"op": "frobnicate"})
    assert other.ops == []


def test_a_write_that_a_silent_server_took_ends_in_time_with_outcome_unknown(server: FakeServer) -> None:
    server.silent = True
    began = time.monotonic()
    with client_of(server) as db, pytest.raises(errors.OutcomeUnknown):
        db.put("k", "v", timeout_s=0.2)
    assert time.monotonic() - began < 2


def test_a_read_whose_answer_is_lost_is_asked_elsewhere(server: FakeServer, other: FakeServer) -> None:
    server.answer = lambda request: None
    other.answer = lambda request: {"ok": True, "count": 3, "rev": 1}
    with client_of(server, other) as db:
        assert db.count() == 3


def test_a_read_that_no_server_answers_is_unreachable_not_unknown(server: FakeServer) -> None:
    server.answer = lambda request: failure("timeout")
    with client_of(server) as db, pytest.raises(errors.Unreachable) as caught:
        db.get("k", timeout_s=0.2)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("code", ["no_leader", "overloaded", "shutting_down"])
def test_a_definite_failure_is_retried_until_it_passes(server: FakeServer, code: str) -> None:
    server.answer = lambda request: failure(code) if len(server.requests) < 4 else {"ok": True, "rev": 9}
    with client_of(server) as db:
        assert db.put("k", "v").rev == 9
    assert server.ops == ["put"] * 4


def test_a_definite_failure_that_does_not_pass_is_raised_in_time(server: FakeServer) -> None:
    server.answer = lambda request: failure("no_leader")
    began = time.monotonic()
    with client_of(server) as db, pytest.raises(errors.NoLeader) as caught:
        db.put("k", "v", timeout_s=0.3)
    assert caught.value.definite and caught.value.message == "The fake server says no_leader."
    assert time.monotonic() - began < 2
    assert len(server.requests) > 2


@pytest.mark.parametrize("code", ["bad_request", "too_large", "read_only", "timeout", "internal", "session_expired"])
def test_other_errors_are_raised_at_once_as_their_class(server: FakeServer, code: str) -> None:
    server.answer = lambda request: failure(code)
    with client_of(server) as db, pytest.raises(errors.BY_CODE[code]):
        db.put("k", "v")
    assert server.ops == ["put"]


def test_a_connection_closed_while_idle_is_noticed_before_a_write_is_sent(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1}
    with client_of(server) as db:
        db.put("k", 1)
        link = db._callers.idle[0].links[server.address]
        server.hang_up()
        wait(lambda: not link.usable(), what="the reset arrives")
        assert db.put("k", 2).rev == 1


@pytest.mark.parametrize("surplus", [b'11\n{"ok":true}\n', b'30\n{"ok":true,"rev":99'])
def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_ones(server: FakeServer, surplus: bytes) -> None:
    server.answer = lambda request: wire.frame(b'{"ok":true,"rev":1}') + surplus
    with client_of(server) as db:
        assert db.put("k", 1).rev == 1
        server.answer = lambda request: {"ok": True, "rev": 2}
        assert db.put("k", 2).rev == 2


def test_a_write_is_sent_when_another_server_can_not_be_reached(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1}
    with ddb.connect([free_address(), server.address], discover=False) as db:
        assert db.put("k", 1).rev == 1


def test_nobody_there_is_unreachable_and_definite() -> None:
    address = free_address()
    with ddb.connect(address) as db, pytest.raises(errors.Unreachable) as caught:
        db.put("k", 1, timeout_s=0.2)
    assert caught.value.definite and address in caught.value.message


def test_when_nobody_can_be_reached_it_goes_on_no_longer_than_asked_to() -> None:
    began = time.monotonic()
    with ddb.connect(free_address(), unreachable_s=0.05, timeout_s=30) as db, pytest.raises(errors.Unreachable):
        db.put("k", 1)
    assert time.monotonic() - began < 10


def test_a_host_name_that_can_not_be_one_is_unreachable() -> None:
    with ddb.connect(f"{'a' * 70}.example:80") as db, pytest.raises(errors.Unreachable):
        db.put("k", 1, timeout_s=0.2)


def test_a_server_of_another_kind_is_named(server: FakeServer) -> None:
    server.answer = lambda request: b"220 mail.example ESMTP\r\n"
    with client_of(server) as db, pytest.raises(errors.Unreachable, match="does not speak ddb's protocol"):
        db.get("k", timeout_s=1.0)


@pytest.mark.parametrize("reply", [{}, {"found": True}, {"count": "many"}, {"items": 1}])
def test_an_answer_that_says_nothing_of_what_was_asked_is_an_error_with_a_sentence(
    server: FakeServer, reply: dict[str, Any]
) -> None:
    server.answer = lambda request: {"ok": True, **reply}
    with client_of(server) as db:
        calls: list[Callable[[], object]] = [lambda: db.put("k", 1), lambda: db.incr("k"), db.count, db.scan]
        for call in calls:
            with pytest.raises(errors.BadFrame, match="is not one of ddb's"):
                call()
        with db.pipeline() as pipe:
            put = pipe.put("k", 1)
        with pytest.raises(errors.BadFrame, match="answer to 'put'"):
            _ = put.result


def test_a_request_too_large_for_the_kernel_to_take_whole_surely_did_nothing() -> None:
    """The server never reads, so the frame's end never leaves this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with ddb.connect(address) as db, pytest.raises(errors.Unreachable) as caught:
            db.put("k", "x" * (32 << 20), timeout_s=0.3)
    assert caught.value.definite


# Where it goes


def test_it_follows_the_leader_that_a_reply_names(server: FakeServer, other: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1, "leader": other.address}
    other.answer = lambda request: {"ok": True, "rev": 2}
    with client_of(server) as db:
        assert [db.put("k", 1).rev, db.put("k", 2).rev, db.put("k", 3).rev] == [1, 2, 2]


def test_it_goes_at_once_to_the_leader_that_a_refusal_names(server: FakeServer, other: FakeServer) -> None:
    server.answer = lambda request: failure("not_leader", leader=other.address)
    other.answer = lambda request: {"ok": True, "rev": 2}
    with client_of(server) as db:
        assert db.put("k", 1).rev == 2
    assert server.ops == ["put"]


def test_a_dead_leader_is_forgotten(server: FakeServer, other: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1, "leader": other.address}
    with client_of(server) as db:
        db.put("k", 1)
        other.close()
        server.answer = lambda request: {"ok": True, "rev": 3}
        assert db.put("k", 2).rev == 3


def test_stale_reads_and_questions_about_a_node_stay_with_the_first_server(
    server: FakeServer, other: FakeServer
) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1, "found": False, "leader": other.address}
    with client_of(server, other) as db:
        db.put("k", 1)
        db.get("k", read="stale", max_lag_s=0.5)
        db.ping()
    assert server.ops == ["put", "get", "ping"]
    assert server.requests[1]["read"] == "stale" and server.requests[1]["max_lag"] == 0.5


def test_a_question_at_an_address_goes_there_and_nowhere_else(server: FakeServer, other: FakeServer) -> None:
    with client_of(server) as db:
        db.status(at=other.address)
        with pytest.raises(errors.Unreachable):
            db.status(at=free_address())
    assert (server.ops, other.ops) == ([], ["status"])


def test_one_address_is_enough_to_learn_the_others(server: FakeServer, other: FakeServer) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        members = [{"address": server.address}, {"address": other.address}, {"address": "nonsense"}, 7]
        return {
            "ok": True,
            "rev": 1,
            "members": members,
            "leader": None if request["op"] == "status" else server.address,
        }

    server.answer = answer
    other.answer = lambda request: {"ok": True, "rev": 2}
    with client_of(server, discover=True) as db:
        assert db.put("k", 1).rev == 1
        assert db.servers == (server.address, other.address)
        server.close()
        assert db.put("k", 2).rev == 2


def test_the_registry_tells_where_the_nodes_are(server: FakeServer, other: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "cluster": "c", "nodes": [{"address": other.address}]}
    other.answer = lambda request: {"ok": True, "rev": 2}
    with ddb.connect(registry=f"http://{server.address}", discover=False) as db:
        assert db.put("k", 1).rev == 2
    assert (server.ops, other.ops) == (["nodes"], ["put"])


def test_a_registry_without_nodes_is_asked_until_time_is_up(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "cluster": None, "nodes": []}
    with ddb.connect(registry=server.address) as db, pytest.raises(errors.Unreachable, match="names no node"):
        db.put("k", 1, timeout_s=0.2)
    assert len(server.requests) > 1


@pytest.mark.parametrize("servers", ["", ",", "host", "host:port", "host:99999", ":80", [5], [None], [b"h:1"]])
def test_an_address_that_is_none_is_refused_before_anything_is_sent(servers: Any) -> None:
    with pytest.raises(errors.BadRequest):
        ddb.connect(servers)


# How it ends


@pytest.mark.parametrize("condition", ["", b"", "rev", 5, True, object()])
def test_a_condition_that_is_none_is_refused_rather_than_left_out(server: FakeServer, condition: Any) -> None:
    with client_of(server) as db:
        for call in (lambda: db.put("a", 1, if_=condition), lambda: db.delete("a", if_=condition)):
            with pytest.raises(errors.BadRequest, match="A condition is an object like"):
                call()
        with pytest.raises(errors.BadRequest, match="A condition is an object like"):
            db.txn(condition, [])
    assert not server.requests


@pytest.mark.parametrize("lease", [1.5, "7", b"7"])
def test_what_is_no_lease_is_sent_for_the_server_to_refuse_or_refused(server: FakeServer, lease: Any) -> None:
    server.answer = lambda request: failure("bad_request")
    with client_of(server) as db, pytest.raises(errors.BadRequest):
        db.put("a", 1, lease=lease)


def test_ctrl_c_ends_a_call_at_once_and_leaves_the_client_usable(server: FakeServer) -> None:
    server.silent = True
    with client_of(server) as db:
        interrupt = threading.Thread(
            target=lambda: (wait(lambda: server.requests), os.kill(os.getpid(), signal.SIGINT)), daemon=True
        )
        interrupt.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            db.put("k", 1, timeout_s=30)
        assert time.monotonic() - began < 10
        interrupt.join()
        server.silent = False
        server.answer = lambda request: {"ok": True, "rev": 5}
        assert db.put("k", 2).rev == 5


def test_after_close_nothing_is_left_and_nothing_is_sent(server: FakeServer) -> None:
    threads = threading.active_count()
    db = client_of(server)
    db.ping()
    links = [link for caller in db._callers.idle for link in caller.links.values()]
    assert links
    db.close()
    db.close()
    assert all(link._socket.fileno() == -1 for link in links)
    assert threading.active_count() <= threads + 1  # the fake server's, for the connection
    with pytest.raises(errors.BadRequest, match="closed"):
        db.ping()


def test_threads_may_share_a_client(server: FakeServer) -> None:
    answers: list[Any] = []

    def ask(key: str) -> None:
        for _ in range(50):
            item = db.get(key)
            answers.append(item is not None and item.key == key)

    server.answer = lambda request: {
        "ok": True, "found": True, "key": request["key"], "value": 1, "rev": 1, "created": 1, "version": 1,
    }  # fmt: skip
    with client_of(server) as db:
        threads = [threading.Thread(target=ask, args=(f"key{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 200 and all(answers)


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, ddb; print(sorted(m for m in sys.modules if m.startswith('ddb')), 'socket' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "['ddb'] False\n"
