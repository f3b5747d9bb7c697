"""What recipes refuse before anything is asked: names that name nothing, and numbers that count nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import ddb
from ddb import aio, console, errors, plans
from ddb.client import Client
from ddb.commands import KEY_BYTES_MAX
from tests.harness import wait

NOBODY = "127.0.0.1:1"
MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "lock": lambda db, name: db.lock(name),
    "semaphore": lambda db, name: db.semaphore(name, 2),
    "election": lambda db, name: db.election(name),
    "barrier": lambda db, name: db.barrier(name),
    "double barrier": lambda db, name: db.double_barrier(name, 2),
    "queue": lambda db, name: db.queue(name),
    "counter": lambda db, name: db.counter(name),
}


@pytest.fixture(params=[ddb.connect, aio.connect], ids=["blocking", "asyncio"])
def db(request: pytest.FixtureRequest) -> Any:
    """A client that has asked nobody anything, so that there is nothing to close."""
    return request.param(NOBODY)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("name", "kinds", "said"),
    [
        ("", errors.BadRequest, "must not be empty"),
        (None, errors.BadRequest, "must be a string, not of type NoneType"),
        (b"name", errors.BadRequest, "must be a string, not of type bytes"),
        ("a\ud800", errors.BadRequest, "holds an unpaired surrogate"),
        ("x" * KEY_BYTES_MAX, errors.TooLarge, "is .* bytes too long"),
        ("ø" * (KEY_BYTES_MAX // 2), errors.TooLarge, "is .* bytes too long"),
        ("/" * (KEY_BYTES_MAX // 3), errors.TooLarge, "is .* bytes too long"),
    ],
)
def test_a_name_that_can_be_nobodys_is_refused_at_once(
    db: Any, kind: str, name: Any, kinds: type[Exception], said: str
) -> None:
    with pytest.raises(kinds, match=f"^The {kind}'s name {said}") as refused:
        MAKERS[kind](db, name)
    assert str(refused.value).count(".") == 1 and str(refused.value).endswith((".", ")."))


@pytest.mark.parametrize("filler", ["x", "ø", "%", "\0"])
def test_the_longest_name_there_can_be_and_any_character_make_a_recipe_that_works(client: Client, filler: str) -> None:
    fits = plans.PREFIX_BYTES_MAX - len("ddb/semaphore//")
    name = filler * (fits // len(plans.prefix_of("lock", filler)[len("ddb/lock/") : -1].encode()))
    with client.lock(name) as lock, client.semaphore(name, 1), client.election(name), client.barrier(name):
        assert client.put("guarded", 1, if_=lock.guard).applied
    with client.queue(name) as queue, client.counter(name) as counter, client.double_barrier(name, 1):
        queue.put("first")
        with queue.take(wait_s=1) as task:
            assert task.value == "first"
        assert counter.incr() == 1


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", None, float("nan")])
def test_how_many_is_a_whole_number_from_one_on(db: Any, number: Any) -> None:
    for make in (db.semaphore, db.double_barrier):
        with pytest.raises(errors.BadRequest, match="must be a whole number, at least 1"):
            make("name", number)


@pytest.mark.parametrize("wait_s", ["5", b"5", [], float("nan"), 1j])
def test_who_waits_for_no_number_of_seconds_is_told_so_and_waits_for_nothing(client: Client, wait_s: Any) -> None:
    lease = client.lease(60)
    calls = [
        client.lock("l").acquire,
        client.semaphore("s", 1).acquire,
        lambda wait_s: client.election("e").campaign("me", wait_s),
        lambda wait_s: client.lock("l", wait_s=wait_s).__enter__(),
        client.barrier("b").wait,
        client.double_barrier("d", 2).enter,
        client.queue("q").get,
        lambda wait_s: client.queue("q").take(wait_s).__enter__(),
        client.watch("k").wait,
        lambda timeout_s: client.get("k", timeout_s=timeout_s),
        lambda timeout_s: lease.keepalive(timeout_s=timeout_s),
        lambda timeout_s: ddb.connect(NOBODY, timeout_s=timeout_s),
        lambda unreachable_s: aio.connect(NOBODY, unreachable_s=unreachable_s),
    ]
    for call in calls:
        with pytest.raises(errors.BadRequest, match="must be a number of seconds, not "):
            call(wait_s)
    lease.revoke()
    assert not client.count("ddb/") and not client.leases()


@pytest.mark.parametrize("wait_s", [float("inf"), 1e300, 10**400, None])
def test_who_has_for_ever_waits_as_long_as_it_takes(client: Client, wait_s: Any) -> None:
    with client.queue("q") as queue, client.barrier("b") as barrier, client.watch("k") as watch:
        taken: list[Any] = []
        waits = [lambda: taken.append(queue.get(wait_s)), lambda: taken.append(client.barrier("b").wait(wait_s))]
        threads = [threading.Thread(target=wait) for wait in waits]
        for thread in threads:
            thread.start()
        client.put("k", 1, timeout_s=wait_s)
        assert wait_s is None or watch.wait(wait_s) is not None
        queue.put("letter")
        barrier.release()
        for thread in threads:
            thread.join(10)
    assert sorted(map(str, taken)) == ["True", "letter"]


def test_what_did_not_come_in_time_is_no_unknown_outcome() -> None:
    every = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.DdbError)]
    assert errors.NotInTime("").exit_code == console.CONDITION_NOT_MET
    assert {error for error in every if error.exit_code == 6} == {
        error
        for error in every
        if not error.definite and error is not errors.Internal  # that is a bug: 1
    }


def test_a_barrier_that_could_not_be_raised_keeps_no_lease_alive(client: Client) -> None:
    class Interrupted(Client):
        def run(self, plan: Any) -> Any:
            raise KeyboardInterrupt

    with Interrupted(client.servers) as other:
        barrier = other.barrier("b", ttl_s=60)
        with pytest.raises(KeyboardInterrupt):
            barrier.hold()
        assert not client.leases()
        with pytest.raises(errors.BadRequest, match="is not held here"):
            barrier.token


def test_a_double_barrier_is_left_before_it_is_entered_again(client: Client) -> None:
    barrier = client.double_barrier("d", 1)
    assert barrier.enter()
    with pytest.raises(errors.BadRequest, match="has entered the barrier 'd' already"):
        barrier.enter()
    assert barrier.leave() and barrier.enter() and barrier.leave()
    assert not client.leases()


def test_who_leaves_a_double_barrier_after_its_lease_ran_out_is_told_that_the_others_may_be_gone(
    client: Client,
) -> None:
    barrier = client.double_barrier("d", 1)
    assert barrier.enter()
    client.lease_revoke(client.leases()[0].id)
    with pytest.raises(errors.LockLost, match="took it for dead"):
        barrier.leave()
    assert barrier.enter() and barrier.leave()


@pytest.mark.parametrize("late", [False, True], ids=["before it runs", "when it runs"])
def test_an_interrupt_in_the_midst_of_taking_something_keeps_nothing_alive(
    client: Client, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if late:
            start(thread)
        raise KeyboardInterrupt

    with client.queue("q") as queue:
        queue.put("letter")
        takes = [
            client.lock("l").__enter__,
            client.semaphore("s", 2).acquire,
            client.election("e").campaign,
            client.barrier("b", ttl_s=60).hold,
            client.double_barrier("d", 1).enter,
            queue.take(ttl_s=60).__enter__,
        ]
        for take in takes:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(threading.Thread, "start", interrupted)
                take()
            assert not client.leases(), take
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(threading.Thread, "start", interrupted)
            client.lease(0.2).__enter__()
        wait(lambda: not client.leases(), what="a lease that nobody has runs out")
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ddb-lease")]
        with queue.take(wait_s=1) as task:
            assert task.value == "letter"


def test_an_interrupt_that_comes_when_a_lock_was_just_got_gives_it_back(client: Client) -> None:
    class Interrupted(type(client.lock("l"))):  # type: ignore[misc]
        def acquire(self, wait_s: float | None = None) -> bool:
            super().acquire(wait_s)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(client, "l").__enter__()
    with client.lock("l", wait_s=0):
        assert len(client.leases()) == 1
