"""The client's promises hold while nodes and holders are killed: real processes, three nodes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import ddb
from ddb import aio, errors
from ddb.results import Event
from tests.harness import Cluster, environment, wait
from tests.proving import State, size

INCREMENTS = size(2_000, 100_000)
KILLS = size(3, 20)
CLIENTS = size(4, 16)
EVENTS = size(800, 10_000)


@contextlib.contextmanager
def leaders_killed(cluster: Cluster, times: int, done: Callable[[], float]) -> Iterator[None]:
    """Kill the leader, and start it again, `times` times, spread evenly over the work within (`done`: from 0 to 1)."""
    failures: list[BaseException] = []

    def harm() -> None:
        try:
            for number in range(times):
                wait(lambda part=(number + 0.5) / times: done() >= part, 120, f"kill {number + 1}'s turn")
                leader = cluster.leader()
                leader.kill()
                leader.start()
                cluster.wait_ready(30)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=harm)
    thread.start()
    yield
    thread.join()
    assert not failures, failures


def assert_counted(cluster: Cluster, acknowledged: list[int]) -> None:
    """Each answer was another number, and together they are what the counter says."""
    assert sorted(acknowledged) == list(range(1, INCREMENTS + 1))
    with ddb.connect(cluster.addresses, timeout_s=30) as db:
        assert db["n"] == len(acknowledged)


@pytest.mark.proof
def test_every_acknowledged_incr_is_counted_once_through_leader_kills(
    cluster: Callable[..., Cluster], record_property: State
) -> None:
    three = cluster(3)
    acknowledged: list[int] = []

    def count(share: int) -> None:
        with ddb.connect(three.addresses, timeout_s=30) as db, db.session():
            for _ in range(share):
                acknowledged.append(db.incr("n").value)

    with leaders_killed(three, KILLS, lambda: len(acknowledged) / INCREMENTS), ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(count, [INCREMENTS // CLIENTS] * CLIENTS))
    assert_counted(three, acknowledged)
    record_property("acknowledged", len(acknowledged))
    record_property("kills", KILLS)


@pytest.mark.proof
def test_every_acknowledged_incr_of_tasks_is_counted_once_through_leader_kills(
    cluster: Callable[..., Cluster], record_property: State
) -> None:
    three = cluster(3)
    acknowledged: list[int] = []
    tasks = 2 * CLIENTS

    async def count(db: aio.Client, share: int) -> None:
        for _ in range(share):
            acknowledged.append((await db.incr("n")).value)

    async def work() -> None:
        async with aio.connect(three.addresses, timeout_s=30) as db, db.session():
            await asyncio.gather(*(count(db, INCREMENTS // tasks) for _ in range(tasks)))

    with leaders_killed(three, KILLS, lambda: len(acknowledged) / INCREMENTS):
        asyncio.run(work())
    assert_counted(three, acknowledged)
    record_property("acknowledged", len(acknowledged))
    record_property("kills", KILLS)


@pytest.mark.proof
def test_a_pipeline_in_a_session_is_done_once_through_leader_kills(
    cluster: Callable[..., Cluster], record_property: State
) -> None:
    three = cluster(3)
    values: list[int] = []
    with (
        leaders_killed(three, KILLS, lambda: len(values) / INCREMENTS),
        ddb.connect(three.addresses, timeout_s=30) as db,
        db.session(),
    ):
        for _ in range(INCREMENTS // 50):
            with db.pipeline() as pipe:
                calls = [pipe.incr("n") for _ in range(50)]
            values += [call.result.value for call in calls]
    assert values == list(range(1, INCREMENTS + 1))
    assert_counted(three, values)
    record_property("acknowledged", len(values))
    record_property("kills", KILLS)


def test_transactions_lose_no_money_while_leaders_are_killed(cluster: Callable[..., Cluster]) -> None:
    three = cluster(3)
    accounts = [f"account/{n}" for n in range(4)]
    moved: list[int] = []

    def move(seed: int) -> None:
        rng = random.Random(seed)
        with ddb.connect(three.addresses, timeout_s=30) as db, db.session():
            for _ in range(75):
                source, target = rng.sample(accounts, 2)
                for attempt in db.transaction(timeout_s=60):
                    with attempt as tx:
                        tx[source], tx[target] = tx[source] - 1, tx[target] + 1
                moved.append(1)

    with ddb.connect(three.addresses, timeout_s=30) as db:
        db.update(dict.fromkeys(accounts, 100))
        before = sum(db.history(key=key).changes[-1].version for key in accounts)
        with leaders_killed(three, 2, lambda: len(moved) / 300), ThreadPoolExecutor(4) as pool:
            list(pool.map(move, range(4)))
        assert sum(db[key] for key in accounts) == 400
        versions = [item.version for key in accounts if (item := db.get(key)) is not None]
        assert sum(versions) - before == 2 * 300, "each transfer was done once"


# Watches


def assert_each_once(events: list[Event], written: dict[int, tuple[str, Any]]) -> None:
    assert [event.rev for event in events] == sorted(written), "each change once, in order"
    assert [(event.key, event.value) for event in events] == [written[rev] for rev in sorted(written)]


@pytest.mark.proof
@pytest.mark.parametrize("position", [None, 1], ids=["any node", "one node"])
def test_a_watch_tells_each_change_once_and_in_order_through_kills(
    cluster: Callable[..., Cluster], position: int | None, record_property: State
) -> None:
    kills = size(4, 50)
    three = cluster(3)
    servers = three.addresses if position is None else three.nodes[position].address
    written: dict[int, tuple[str, Any]] = {}
    events: list[Event] = []
    with (
        ddb.connect(servers, timeout_s=30, discover=position is None) as watcher,
        ddb.connect(three.addresses, timeout_s=30) as db,
        watcher.watch(prefix="w/") as watch,
    ):
        thread = threading.Thread(target=lambda: events.extend(watch))
        thread.start()
        with leaders_killed(three, kills, lambda: len(written) / EVENTS), db.session():
            for n in range(EVENTS):
                key = f"w/{n % 7}"
                written[db.put(key, n).rev] = (key, n)
                db.put("other", n)
        wait(lambda: len(events) >= len(written), 30, "all is told")
        watch.close()
        thread.join(10)
        assert not thread.is_alive()
    assert_each_once(events, written)
    record_property("events", len(events))
    record_property("kills", kills)


def test_a_watch_for_asyncio_tells_each_change_once_through_kills(cluster: Callable[..., Cluster]) -> None:
    three = cluster(3)
    written: dict[int, tuple[str, Any]] = {}

    async def follow(db: aio.Client) -> list[Event]:
        events: list[Event] = []
        async with db.watch(prefix="w/") as watch:
            task = asyncio.create_task(write(db))
            while not task.done() or len(events) < len(written):
                event = await watch.wait(0.2)
                events += [event] if event is not None else []
            await task
        return events

    async def write(db: aio.Client) -> None:
        async with db.session():
            for n in range(400):
                written[(await db.put(f"w/{n % 7}", n)).rev] = (f"w/{n % 7}", n)

    async def work() -> list[Event]:
        async with aio.connect(three.addresses, timeout_s=30) as db:
            return await follow(db)

    with leaders_killed(three, 2, lambda: len(written) / 400):
        events = asyncio.run(work())
    assert_each_once(events, written)


# Holders that die

HOLDER = """
import sys, time, ddb
db = ddb.connect(sys.argv[1], timeout_s=30)
lock = db.lock("resource", ttl_s=1.0)
lock.acquire()
print("held", lock.token, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def program(source: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program of its own, killed in the end."""
    command = [sys.executable, "-c", source, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_lock_passes_on_when_its_holder_is_killed_and_not_before_its_ttl(cluster: Callable[..., Cluster]) -> None:
    three = cluster(3)
    with program(HOLDER, three.addresses) as holder, ddb.connect(three.addresses, timeout_s=30) as db:
        _, token = said(holder).split()
        lock = db.lock("resource", ttl_s=5.0)
        assert not lock.acquire(wait_s=1.5), "it is kept alive"
        holder.kill()
        killed_s = time.monotonic()
        assert lock.acquire(wait_s=30)
        assert lock.token > int(token)
        assert time.monotonic() - killed_s < 1.0 + 1.0 + 3, "the ttl, a second, and a busy machine's patience"
        lock.release()


def test_a_frozen_holder_knows_that_it_lost_its_lock_and_what_it_guards_stays_as_it_is(
    cluster: Callable[..., Cluster],
) -> None:
    source = HOLDER.replace(
        "time.sleep(600)",
        "sys.stdin.readline()\nprint(lock.lost, db.put('page', 'stale', if_=lock.guard).applied, flush=True)",
    )
    three = cluster(3)
    with ddb.connect(three.addresses, timeout_s=30) as db:
        command = [sys.executable, "-c", source, three.addresses]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment(), **pipes) as holder:
            try:
                said(holder)
                holder.send_signal(signal.SIGSTOP)
                with db.lock("resource", ttl_s=5.0, wait_s=30) as lock:
                    assert db.put("page", "fresh", if_=lock.guard).applied
                    holder.send_signal(signal.SIGCONT)
                    assert holder.stdin is not None
                    print(file=holder.stdin, flush=True)
                    assert said(holder) == "True False"
                    assert db["page"] == "fresh"
            finally:
                holder.kill()


def test_one_at_a_time_holds_a_lock_and_tokens_grow_through_leader_kills(cluster: Callable[..., Cluster]) -> None:
    three = cluster(3)
    inside: list[str] = []
    tokens: list[int] = []

    def contend(name: str) -> None:
        with ddb.connect(three.addresses, timeout_s=30) as db:
            for _ in range(10):
                with db.lock("resource", ttl_s=20.0) as lock:
                    inside.append(name)
                    assert inside == [name]
                    tokens.append(lock.token)
                    inside.remove(name)

    with leaders_killed(three, 2, lambda: len(tokens) / 50), ThreadPoolExecutor(5) as pool:
        list(pool.map(contend, "abcde"))
    assert tokens == sorted(set(tokens)) and len(tokens) == 50


def test_an_election_passes_on_when_its_leader_is_killed(cluster: Callable[..., Cluster]) -> None:
    source = """
import sys, time, ddb
db = ddb.connect(sys.argv[1], timeout_s=30)
election = db.election("mayor", ttl_s=1.0, value=sys.argv[2])
election.campaign()
print("leads", flush=True)
time.sleep(600)
"""
    three = cluster(3)
    with ddb.connect(three.addresses, timeout_s=30) as db, program(source, three.addresses, "Ada") as ada:
        assert said(ada) == "leads"
        seen: list[str | None] = []

        def look() -> None:
            for leader in db.election("mayor").observe():
                seen.append(leader.value if leader is not None else None)
                if seen[-1] == "Bob":
                    return

        thread = threading.Thread(target=look)
        thread.start()
        with program(source, three.addresses, "Bob") as bob:
            wait(lambda: seen == ["Ada"] and db.count("ddb/election/mayor/") == 2)
            ada.kill()
            assert said(bob) == "leads"
            thread.join(20)
    assert seen in (["Ada", "Bob"], ["Ada", None, "Bob"])


def test_each_item_of_a_queue_is_taken_by_one_while_consumers_and_leaders_are_killed(
    cluster: Callable[..., Cluster],
) -> None:
    """A killed consumer may take one item along: the one that it had been given and had not yet told of."""
    source = """
import sys, ddb
with ddb.connect(sys.argv[1], timeout_s=30) as db, db.queue("work") as queue:
    while True:
        print(queue.get(), flush=True)
"""
    three = cluster(3)
    items = 300
    taken: list[int] = []

    def listen(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        taken.extend(int(line) for line in process.stdout if line.strip())

    with contextlib.ExitStack() as stack:
        db = stack.enter_context(ddb.connect(three.addresses, timeout_s=30))
        queue = stack.enter_context(db.queue("work"))
        consumers = [stack.enter_context(program(source, three.addresses)) for _ in range(5)]
        threads = [threading.Thread(target=listen, args=(consumer,)) for consumer in consumers]
        for thread in threads:
            thread.start()
        with leaders_killed(three, 1, lambda: len(taken) / items):
            for n in range(items):
                queue.put(n)
                if n in (100, 200):
                    wait(lambda: len(taken) > 20, 60)
                    consumers.pop().kill()
            wait(lambda: queue.size() == 0, 60, "the queue is empty")
            wait(lambda: len(taken) >= items - 2, 30, "all are told of")
        for consumer in consumers:
            consumer.kill()
        for thread in threads:
            thread.join(10)
    assert len(taken) == len(set(taken)), "nothing was taken twice"
    assert set(taken) <= set(range(items)) and len(taken) >= items - 2


def test_tasks_share_locks_and_queues_through_leader_kills(cluster: Callable[..., Cluster]) -> None:
    three = cluster(3)
    inside: list[int] = []
    tokens: list[int] = []
    finished: list[int] = []

    async def contend(db: aio.Client, me: int) -> None:
        for _ in range(5):
            async with db.lock("resource", ttl_s=20) as lock:
                inside.append(me)
                await asyncio.sleep(0)
                assert inside == [me]
                tokens.append(lock.token)
                inside.remove(me)

    async def work(db: aio.Client) -> None:
        async with db.queue("work") as queue:
            while True:
                with contextlib.suppress(ZeroDivisionError):
                    async with queue.take(ttl_s=20) as task:
                        value = task.value
                        if value % 10 == 3 and random.random() < 0.5:
                            1 / 0  # given back, for somebody else
                    finished.append(value)

    async def run() -> None:
        async with aio.connect(three.addresses, timeout_s=30) as db, db.queue("work") as queue:
            workers = [asyncio.create_task(work(db)) for _ in range(3)]
            contenders = [asyncio.create_task(contend(db, n)) for n in range(5)]
            for n in range(40):
                await queue.put(n)
            await asyncio.gather(*contenders)
            while len(finished) < 40:
                await asyncio.sleep(0.02)
                for worker in workers:
                    assert not worker.done(), worker.exception()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            assert await queue.size() == 0

    with leaders_killed(three, 2, lambda: (len(tokens) + len(finished)) / 65):
        asyncio.run(asyncio.wait_for(run(), 120))
    assert tokens == sorted(set(tokens)) and len(tokens) == 25
    assert sorted(finished) == list(range(40))


def test_an_interrupt_ends_a_wait_for_a_lock_and_leaves_nothing(cluster: Callable[..., Cluster]) -> None:
    one = cluster(1, registry=False)
    before = set(threading.enumerate())
    with ddb.connect(one.addresses) as db, db.lock("resource"):
        interrupt = threading.Thread(
            target=lambda: (wait(lambda: db.count("ddb/lock/") == 2), os.kill(os.getpid(), signal.SIGINT))
        )
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            db.lock("resource").acquire()
        interrupt.join()
        assert db.count("ddb/lock/") == 1
    assert set(threading.enumerate()) <= before


def test_a_client_tells_how_it_stands_to_its_cluster(cluster: Callable[..., Cluster]) -> None:
    one = cluster(1, registry=False)
    states: list[str] = []
    with ddb.connect(one.addresses) as db:
        db.on_state(states.append)
        assert db.state == "suspended"
        db.count()
        one.nodes[0].kill()
        with pytest.raises(errors.Unreachable):
            db.count(timeout_s=0.3)
        assert db.state == "lost"
        one.nodes[0].start()
        wait(lambda: db.count() == 0)
    assert states[0] == "connected" and states[-1] == "connected"
    assert [a for a, b in itertools.pairwise(states) if a == b] == []
    assert {"suspended", "lost"} <= set(states)
