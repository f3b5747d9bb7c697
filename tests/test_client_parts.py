"""The client's watches, leases and asyncio connections, against a server that does on demand what others do in bad moments."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ddb
from ddb import aio, errors, wire
from ddb.client import Client
from ddb.links import ready
from ddb.results import Event
from tests.fake_server import FakeServer, failure
from tests.harness import wait

HEAD = {"ok": True, "watch": True, "rev": 7}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as one:
        yield one


def client_of(*servers: FakeServer, **options: Any) -> Client:
    return ddb.connect([s.address for s in servers], **{"timeout_s": 3.0, "discover": False, **options})


def aio_of(*servers: FakeServer, **options: Any) -> aio.Client:
    return aio.connect([s.address for s in servers], **{"timeout_s": 3.0, "discover": False, **options})


def frames(*messages: dict[str, Any]) -> bytes:
    return b"".join(wire.frame(json.dumps(message).encode()) for message in messages)


def put(rev: int, value: Any = None) -> dict[str, Any]:
    return {"event": "put", "key": "k", "value": value, "rev": rev, "version": 1}


def stream(*messages: dict[str, Any]) -> Callable[[dict[str, Any]], bytes]:
    return lambda request: frames(HEAD, *messages) if request["op"] == "watch" else frames({"ok": True})


# Watches


def test_a_watch_stands_when_it_is_returned_and_tells_what_it_is_told(server: FakeServer) -> None:
    server.answer = stream(put(8, {"$b64": "AQI="}), {"event": "delete", "key": "k", "rev": 9})
    with client_of(server) as db, db.watch("k") as watch:
        assert watch.rev == 7
        assert [next(watch), next(watch)] == [Event("put", "k", b"\x01\x02", 8, 1), Event("delete", "k", None, 9, 0)]
    assert {k: v for k, v in server.requests[0].items() if k != "timeout"} == {"op": "watch", "key": "k"}


def test_a_watch_goes_on_behind_what_it_told_when_its_node_dies() -> None:
    with FakeServer() as one, FakeServer() as other:
        for each in (one, other):
            each.answer = lambda request: frames(HEAD, *([put(8)] if "from" not in request else [put(8), put(9)]))
        with client_of(one, other) as db, db.watch("k") as watch:
            assert next(watch).rev == 8
            first, second = (one, other) if one.requests else (other, one)
            first.close()
            assert next(watch).rev == 9
            assert second.requests[-1]["from"] == 8


def test_a_wait_for_a_change_ends_in_time_and_misses_nothing(server: FakeServer) -> None:
    server.answer = stream()
    with client_of(server) as db, db.watch("k") as watch:
        began_s = time.monotonic()
        assert watch.wait(0.05) is None and 0.04 < time.monotonic() - began_s < 2
        whole = frames(put(8))
        for part in (whole[:5], whole[5:]):
            assert watch.wait(0.01) is None
            server._connections[0].sendall(part)
        assert watch.wait(5) == Event("put", "k", None, 8, 1)


def test_a_watch_may_be_closed_from_another_thread_while_it_waits(server: FakeServer) -> None:
    server.answer = stream()
    with client_of(server) as db:
        watch = db.watch("k")
        seen: list[Event] = []
        thread = threading.Thread(target=lambda: seen.extend(watch))
        thread.start()
        wait(lambda: watch._busy.locked())
        watch.close()
        thread.join(5)
        assert not thread.is_alive() and seen == []
        assert watch._bell.fileno() == watch._button.fileno() == -1 and watch._link is None
        watch.close()


def test_closing_the_client_ends_its_watches(server: FakeServer) -> None:
    server.answer = stream()
    db = client_of(server)
    watch, idle = db.watch("k"), db.watch("other")
    thread = threading.Thread(target=lambda: list(watch))
    thread.start()
    wait(lambda: watch._busy.locked())
    db.close()
    thread.join(5)
    assert not thread.is_alive() and list(idle) == [] and idle.wait(1) is None
    with pytest.raises(errors.BadRequest, match="closed"):
        db.watch("k")


def test_ctrl_c_ends_a_wait_for_a_change_and_the_watch_goes_on_afterwards(server: FakeServer) -> None:
    server.answer = stream()
    with client_of(server) as db, db.watch("k") as watch:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(watch)
        server._connections[0].sendall(frames(put(8)))
        assert next(watch).rev == 8


def test_a_refused_watch_says_why_and_leaves_nothing_open(server: FakeServer) -> None:
    server.answer = lambda request: failure("compacted", oldest=40)
    with client_of(server) as db, pytest.raises(errors.Compacted) as caught:
        db.watch("k", from_rev=3)
    assert caught.value.fields["oldest"] == 40 and not db._callers._guests
    with pytest.raises(errors.BadRequest, match="not both"):
        client_of(server).watch("k", prefix="k")


def test_a_watch_that_no_node_serves_is_unreachable_in_time(server: FakeServer) -> None:
    server.close()
    began_s = time.monotonic()
    with client_of(server) as db, pytest.raises(errors.Unreachable):
        db.watch("k", timeout_s=0.2)
    assert time.monotonic() - began_s < 3


# Leases


class Leases:
    """A server of leases that answers signs of life as long as it is `willing`."""

    def __init__(self, server: FakeServer) -> None:
        self.willing = True
        self.known = True
        self.server = server
        server.answer = self.answer

    def answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if request["op"] == "lease_grant":
            return {"ok": True, "lease": 5, "ttl": request["ttl"]}
        if not self.known:
            return failure("bad_request", lease=5)
        if request["op"] == "lease_keepalive":
            return {"ok": True, "ttl": 1} if self.willing else failure("no_leader")
        return {"ok": True}

    @property
    def beats(self) -> int:
        return self.server.ops.count("lease_keepalive")


def test_a_lease_is_kept_alive_by_one_thread_that_ends_with_its_block(server: FakeServer) -> None:
    leases = Leases(server)
    before = set(threading.enumerate()) | set(server._threads)
    with client_of(server) as db, db.lease(0.3) as lease:
        own = [t for t in threading.enumerate() if t.name == "ddb-lease-5"]
        assert len(own) == 1
        wait(lambda: leases.beats >= 6)
        assert not lease.lost
    assert server.ops[-1] == "lease_revoke" and lease.lost and not own[0].is_alive()
    assert {t for t in threading.enumerate() if t.name.startswith("ddb")} <= before


def test_a_lease_that_can_not_be_kept_alive_is_lost_and_tells_once(server: FakeServer) -> None:
    leases = Leases(server)
    told: list[float] = []
    with client_of(server) as db, db.lease(0.4, on_lost=lambda: told.append(time.monotonic())) as lease:
        leases.willing = False
        until_s = time.monotonic() + 0.5
        wait(lambda: lease.lost)
        wait(lambda: told)
        assert told[0] < until_s + 2 and lease.remaining_s == 0
        leases.willing = True
        assert lease.lost, "once lost, always lost"
    assert len(told) == 1


def test_a_lease_that_the_cluster_has_ended_is_lost_at_the_next_sign_of_life(server: FakeServer) -> None:
    leases = Leases(server)
    with client_of(server) as db, db.lease(0.6) as lease:
        leases.known = False
        wait(lambda: lease.lost)
        with pytest.raises(errors.BadRequest):
            lease.keepalive()


def test_closing_the_client_ends_the_thread_even_while_it_waits_for_an_answer(server: FakeServer) -> None:
    Leases(server)
    db = client_of(server, timeout_s=30)
    lease = db.lease(30)
    server.silent = True
    lease._keeping.due_s = 0
    lease.keep()
    wait(lambda: "lease_keepalive" in server.ops)
    began_s = time.monotonic()
    db.close()
    assert time.monotonic() - began_s < 5
    assert lease._thread is not None and not lease._thread.is_alive()


def test_a_callback_that_fails_harms_nobody(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    leases = Leases(server)
    with client_of(server) as db, db.lease(0.2, on_lost=lambda: 1 / 0) as lease:
        db.on_state(lambda state: 1 / 0)
        leases.willing = False
        wait(lambda: "a callback of on_lost failed" in caplog.text and lease.lost)
        server.answer = lambda request: {"ok": True, "count": 3, "rev": 1}
        db._callers.known.turn("lost")
        assert db.count() == 3
    assert "a callback of on_state failed" in caplog.text


# Sessions


def test_writes_of_a_block_are_numbered_and_others_are_not(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1, "client": 9, "value": 1, "found": False, "count": 0}
    with client_of(server) as db, client_of(server) as stranger:
        db.incr("n")
        with db.session() as session:
            assert session.id == 9
            db.put("k", 1)
            stranger.put("k", 2)
            db.get("k")
            thread = threading.Thread(target=lambda: db.put("k", 3))
            thread.start()
            thread.join()
            db.delete("k")
        db.put("k", 4)
    sent = [(r["op"], r.get("value", r.get("by")), r.get("client"), r.get("seq")) for r in server.requests]
    assert sent == [
        ("incr", 1, None, None), ("session_open", None, None, None), ("put", 1, 9, 1), ("put", 2, None, None),
        ("get", None, None, None), ("put", 3, None, None), ("delete", None, 9, 2), ("session_close", None, 9, None),
        ("put", 4, None, None),
    ]  # fmt: skip


def test_a_write_of_a_session_is_repeated_with_its_number_until_it_is_answered(server: FakeServer) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any] | None:
        if request["op"] != "incr":
            return {"ok": True, "client": 9}
        return {"ok": True, "value": 1, "rev": 1} if server.ops.count("incr") > 3 else None

    server.answer = answer
    with client_of(server) as db, db.session():
        assert db.incr("n").value == 1
    assert [r["seq"] for r in server.requests if r["op"] == "incr"] == [1, 1, 1, 1]


def test_a_pipeline_sends_everything_before_it_reads_and_more_than_fits_into_any_buffer(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "found": False, "key": "k", "pad": "x" * 100_000}
    with client_of(server, timeout_s=30) as db:
        with db.pipeline() as pipe:
            calls = [pipe.put("k", "y" * 100_000) if n % 2 else pipe.get("k") for n in range(300)]
        server.answer = lambda request: {"ok": True, "rev": 1, "found": False}
        assert all(call.error is None for call in calls) and len(server.ops) == 300


def test_a_pipeline_raises_the_first_error_and_keeps_the_others_with_their_calls(server: FakeServer) -> None:
    server.answer = lambda r: failure("bad_request") if r["key"] == "bad" else {"ok": True, "rev": 1, "value": 1}
    with client_of(server) as db:
        with pytest.raises(errors.BadRequest), db.pipeline() as pipe:
            good, bad = pipe.incr("good"), pipe.incr("bad")
            with pytest.raises(errors.BadRequest, match="not been sent"):
                good.result
        assert good.result.value == 1 and isinstance(bad.error, errors.BadRequest)
        with pytest.raises(ZeroDivisionError), db.pipeline() as pipe:
            pipe.incr("never")
            1 / 0
    assert len(server.requests) == 2


def test_a_transaction_that_is_left_after_it_was_overtaken_is_not_passed_over_in_silence(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = lambda r: {"ok": True, "found": False, "key": "k", "succeeded": False, "results": [], "rev": 1}
    with client_of(server) as db:
        for attempt in db.transaction():
            with attempt as tx:
                tx["k"] = tx.get("k", 0) + 1
            break
    assert "it did nothing" in caplog.text and server.ops == ["get", "txn"]


def test_a_transaction_that_is_overtaken_again_and_again_ends_in_time_and_did_nothing(server: FakeServer) -> None:
    server.answer = lambda r: {"ok": True, "found": False, "key": "k", "succeeded": False, "results": [], "rev": 1}
    with client_of(server) as db, pytest.raises(errors.Conflict) as caught:
        db.transact(lambda tx: tx.put("k", tx.get("k")), timeout_s=0.2)
    assert caught.value.definite and server.ops.count("txn") > 3
    assert server.requests[1]["if"] == [{"key": "k", "rev": 0}]


# asyncio


def test_many_tasks_share_few_connections_and_each_gets_its_own_answer(server: FakeServer) -> None:
    server.answer = lambda r: {
        "ok": True,
        "found": True,
        "key": r["key"],
        "value": r["key"],
        "rev": 1,
        "created": 1,
        "version": 1,
    }

    async def work() -> None:
        async with aio_of(server, timeout_s=30) as db:
            items = await asyncio.gather(*(db.get(f"k{n}") for n in range(500)))
        assert [item.value for item in items if item is not None] == [f"k{n}" for n in range(500)]

    asyncio.run(work())
    assert len(server._connections) <= 8


def test_a_cancelled_task_disturbs_no_other_on_its_connection(server: FakeServer) -> None:
    gate = threading.Event()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        gate.wait(10)
        return {"ok": True, "rev": request["value"]}

    server.answer = answer

    async def work() -> list[int]:
        async with aio_of(server, timeout_s=30) as db:
            tasks = [asyncio.create_task(db.put("k", n)) for n in range(40)]
            while len(server.requests) < 8:
                await asyncio.sleep(0.01)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.sleep(0)
            gate.set()
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in done[::2])
        return [one.rev for one in done[1::2] if not isinstance(one, BaseException)]

    assert asyncio.run(work()) == list(range(1, 40, 2))


def test_a_write_that_was_sent_and_not_answered_is_unknown_and_its_late_answer_is_nobodys(server: FakeServer) -> None:
    server.silent = True

    async def work() -> None:
        async with aio_of(server) as db:
            with pytest.raises(errors.OutcomeUnknown):
                await db.put("k", 1, timeout_s=0.1)
            server.silent = False
            server.answer = lambda request: {"ok": True, "rev": 2}
            assert (await db.put("k", 2)).rev == 2

    asyncio.run(work())


def test_a_request_too_large_for_the_kernel_to_take_whole_surely_did_nothing_for_asyncio_too() -> None:
    async def work() -> errors.DdbError:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with aio.connect(f"127.0.0.1:{listener.getsockname()[1]}") as db:
                with pytest.raises(errors.Unreachable) as caught:
                    await db.put("k", "x" * (32 << 20), timeout_s=0.3)
                return caught.value

    assert asyncio.run(work()).definite


def test_a_connection_closed_while_idle_is_noticed_before_a_task_writes(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1}

    async def work() -> None:
        async with aio_of(server) as db:
            await db.put("k", 1)
            (link,) = db._caller.links[server.address]
            assert link._transport is not None
            server.hang_up()
            assert ready([link._transport.get_extra_info("socket")], [], 5)[0], "it arrived, unseen by the loop"
            assert (await db.put("k", 2)).rev == 1

    asyncio.run(work())


def test_an_asyncio_watch_may_be_cancelled_and_goes_on(server: FakeServer) -> None:
    server.answer = stream()

    async def work() -> None:
        async with aio_of(server) as db, db.watch("k") as watch:
            assert await watch.wait(0.05) is None
            task = asyncio.create_task(anext(watch))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server._connections[-1].sendall(frames(put(8), put(9)))
            assert [(await anext(watch)).rev, (await anext(watch)).rev] == [8, 9]
            closing = asyncio.create_task(watch.__anext__())
            await asyncio.sleep(0.01)
            watch.close()
            with pytest.raises(StopAsyncIteration):
                await closing

    asyncio.run(work())


def test_an_asyncio_lease_is_kept_alive_by_a_task_and_tells_when_it_is_lost(server: FakeServer) -> None:
    leases = Leases(server)
    told: list[str] = []

    async def lost() -> None:
        told.append("lost")

    async def work() -> None:
        async with aio_of(server) as db:
            async with db.lease(0.3, on_lost=lost) as lease:
                while leases.beats < 4:
                    await asyncio.sleep(0.01)
                assert not lease.lost and told == []
                leases.willing = False
                while not told:
                    await asyncio.sleep(0.01)
                assert lease.lost
            assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("ddb")]

    asyncio.run(asyncio.wait_for(work(), 20))
