"""What the simulator puts in the place of the loop, the log's writer and the worker keeps the contract of the real ones.

Each test runs against both. The real ones have threads and sockets, so a test waits for conditions and not for moments.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import pytest

from ddb import wire
from ddb.agenda import Agenda
from ddb.errors import BadRequest
from ddb.log import Log, LogWriter
from ddb.loop import Loop
from ddb.messages import Batch, HardState
from ddb.reactor import Channel, Reactor
from ddb.scheduling import Turns
from ddb.server import Limits, Server, Slot
from ddb.simdisk import SimDisk
from ddb.simhost import PORT, Host, SimWorld
from ddb.simnet import Network
from ddb.world import Background, Worker

PATIENCE_S = 10.0
HOME = Path("/log")


# ------------------------------------------------------ the log's writer


def batch(index: int) -> Batch:
    data = b'{"first":%d,"last":%d,"term":1,"at":1,"entries":[["noop"]]}' % (index, index)
    return Batch(index, index, 1, data, 1, [])


class Bench(Protocol):
    """A disk with a log, somebody who writes it, somebody for the background, and what they say to the loop."""

    disk: SimDisk
    news: list[tuple[str, Any]]

    def writer(self, log: Log) -> LogWriter: ...
    def background(self) -> Background: ...
    def until(self, condition: Callable[[], object]) -> None: ...
    def rest(self) -> None:
        """Let everything happen that will happen by itself."""


class Threads:
    """The real ones. What they post is called by `until`."""

    def __init__(self) -> None:
        self.disk = SimDisk(random.Random(1))
        self.news: list[tuple[str, Any]] = []
        self._posted: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()

    def _post(self, fn: Callable[..., None], *args: Any) -> None:
        self._posted.put((fn, args))

    def writer(self, log: Log) -> LogWriter:
        return LogWriter(log, self._post, *hearing(self.news), room_retry_s=0.005)

    def background(self) -> Background:
        return Worker(self._post, Turns())

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"it did not happen in time: {self.news}"
            try:
                fn, args = self._posted.get(timeout=0.01)
            except Empty:
                continue
            fn(*args)

    def rest(self) -> None:
        while True:
            try:
                fn, args = self._posted.get(timeout=0.05)
            except Empty:
                return
            fn(*args)


class Simulated:
    """The simulator's, on a host of their own."""

    def __init__(self) -> None:
        self._agenda = Agenda()
        network = Network(self._agenda, random.Random(1), lambda kind: None)
        self._host = Host("a", self._agenda, network, random.Random(1))
        self._worlds: list[SimWorld] = []
        self._host.boot = self._boot
        self._host.start()
        self.disk = self._host.disk
        self.news: list[tuple[str, Any]] = []

    def _boot(self, world: SimWorld) -> Any:
        self._worlds.append(world)
        return None

    def writer(self, log: Log) -> LogWriter:
        return self._worlds[-1].writer(log, *hearing(self.news))

    def background(self) -> Background:
        return self._worlds[-1].background()

    def until(self, condition: Callable[[], object]) -> None:
        end = self._agenda.now + PATIENCE_S
        while not condition():
            assert self._agenda.step(end), f"it did not happen in time: {self.news}"

    def rest(self) -> None:
        end = self._agenda.now + PATIENCE_S
        while self._agenda.step(end):
            pass


def hearing(news: list[tuple[str, Any]]) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    return (
        lambda ticket: news.append(("saved", ticket)),
        lambda error: news.append(("failure", error)),
        lambda room: news.append(("space", room)),
    )


@pytest.fixture(params=[Threads, Simulated])
def bench(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.param()
    return found


@pytest.fixture
def log(bench: Bench) -> Log:
    return Log.open(HOME, disk=bench.disk)


def saved(bench: Bench, ticket: int) -> Callable[[], bool]:
    return lambda: ("saved", ticket) in bench.news


def survivors(bench: Bench) -> int:
    """The last index in the log after the machine has lost power."""
    bench.disk.crash(random.Random(3))
    log = Log.open(HOME, disk=bench.disk)
    last: int = log.last[0]
    log.close()
    return last


def after_a_crash(writer: LogWriter) -> None:
    """End the writer's thread, if it has one, though its files are gone."""
    with contextlib.suppress(OSError):
        writer.close()


def test_tickets_count_up_and_are_reported_in_order(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    assert [writer.save(None, [batch(i)]) for i in range(1, 6)] == [1, 2, 3, 4, 5]
    bench.until(saved(bench, 5))
    tickets = [ticket for _, ticket in bench.news]
    assert tickets == sorted(set(tickets)) and {kind for kind, _ in bench.news} == {"saved"}
    assert writer.saved == 5 and log.last == (5, 1)
    writer.close()


def test_what_is_reported_saved_survives_power_loss(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    writer.save(HardState(1, "a"), [batch(1)])
    bench.until(saved(bench, 1))
    assert survivors(bench) == 1
    after_a_crash(writer)


def test_an_idle_writer_saves_in_place_and_reports_nothing(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    assert writer.save(None, [batch(1)], in_place=True) == 1
    assert writer.saved == 1 and log.last == (1, 1)
    bench.rest()
    assert bench.news == []
    writer.save(None, [batch(2)])
    bench.until(saved(bench, 2))
    assert writer.save(None, [batch(3)], in_place=True) == 3 == writer.saved
    writer.close()


def test_a_busy_writer_saves_nothing_in_place(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    bench.disk.room_bytes = 0  # so it is busy for as long as that lasts
    writer.save(None, [batch(1)])
    assert writer.save(None, [batch(2)], in_place=True) == 2
    assert writer.saved == 0
    bench.disk.room_bytes = None
    bench.until(saved(bench, 2))
    assert log.last == (2, 1)
    writer.close()


def test_a_full_disk_is_told_once_and_what_was_saved_waits_for_room(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    bench.disk.room_bytes = 0
    writer.save(None, [batch(1)])
    bench.until(lambda: bench.news)
    writer.save(None, [batch(2)])
    calls = bench.disk.calls["pwrite"]
    bench.until(lambda: bench.disk.calls["pwrite"] > calls + 2)  # it tries again
    assert bench.news == [("space", False)] and writer.saved == 0
    bench.disk.room_bytes = None
    bench.until(saved(bench, 2))
    assert bench.news[:2] == [("space", False), ("space", True)]
    assert survivors(bench) == 2
    after_a_crash(writer)


def test_where_there_is_no_room_in_place_the_writer_takes_over(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    bench.disk.room_bytes = 0
    writer.save(None, [batch(1)], in_place=True)
    assert writer.saved == 0
    bench.until(lambda: bench.news == [("space", False)])
    bench.disk.room_bytes = None
    bench.until(lambda: writer.saved == 1)
    assert log.last == (1, 1)
    writer.close()


def test_a_failing_disk_is_reported_and_nothing_is_saved_any_more(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    bench.disk.fail("fdatasync", errno.EIO, times=1)
    writer.save(None, [batch(1)])
    bench.until(lambda: bench.news)
    ((kind, error),) = bench.news
    assert kind == "failure" and isinstance(error, OSError) and error.errno == errno.EIO
    writer.save(None, [batch(2)])
    bench.rest()
    assert writer.saved == 0 and len(bench.news) == 1 and log.last == (0, 0)
    writer.close()


def test_a_failure_in_place_is_reported_at_once_and_nothing_is_saved_any_more(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    bench.disk.fail("fdatasync", errno.EIO, times=1)
    writer.save(None, [batch(1)], in_place=True)
    assert [kind for kind, _ in bench.news] == ["failure"] and writer.saved == 0
    writer.save(None, [batch(2)])
    writer.save(None, [batch(3)], in_place=True)
    bench.rest()
    assert len(bench.news) == 1 and writer.saved == 0 and log.last == (0, 0)
    writer.close()


def test_closing_saves_what_waits(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    writer.save(None, [batch(1)])
    writer.save(None, [batch(2)])
    writer.close()
    writer.close()
    assert survivors(bench) == 2


def test_closing_on_a_failing_disk_raises_nothing(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    bench.disk.fail("fdatasync", errno.EIO)
    writer.save(None, [batch(1)])
    writer.close()
    assert writer.saved == 0


def test_closing_on_a_full_disk_gives_up_what_waits(bench: Bench, log: Log) -> None:
    writer = bench.writer(log)
    bench.disk.room_bytes = 0
    writer.save(None, [batch(1)])
    bench.until(lambda: bench.news)
    writer.close()
    assert writer.saved == 0 and survivors(bench) == 0


# ------------------------------------------------------------ the worker


def test_work_is_done_one_thing_after_the_other_and_reported_so(bench: Bench) -> None:
    worker, done, at_work = bench.background(), list[Any](), list[int]()

    def work(number: int) -> int:
        assert not at_work
        at_work.append(number)
        at_work.remove(number)
        return number

    for number in range(5):
        worker.run(lambda number=number: work(number), lambda result, error: done.append((result, error)))  # type: ignore[misc]
    assert done == []  # never before `run` has returned
    bench.until(lambda: len(done) == 5)
    assert done == [(number, None) for number in range(5)]
    worker.close()


def test_what_work_raises_is_reported_and_the_next_is_done(bench: Bench) -> None:
    worker, done = bench.background(), list[Any]()

    def fails() -> None:
        raise ZeroDivisionError

    worker.run(fails, lambda result, error: done.append((result, type(error))))
    worker.run(lambda: 2, lambda result, error: done.append((result, error)))
    bench.until(lambda: len(done) == 2)
    assert done == [(None, ZeroDivisionError), (2, None)]
    worker.close()


def test_who_is_told_may_ask_for_more(bench: Bench) -> None:
    worker, done = bench.background(), list[Any]()
    worker.run(lambda: 1, lambda *_: worker.run(lambda: 2, lambda result, _: done.append(result)))
    bench.until(lambda: done == [2])
    worker.close()


def test_two_workers_do_not_wait_for_each_other(bench: Bench) -> None:
    """Who writes a checkpoint at leisure must not keep a snapshot from arriving; in simulation that has to be seen, too."""
    quick, slow, done = bench.background(), bench.background(), list[str]()
    for _ in range(20):
        slow.run(lambda: None, lambda *_: done.append("slow"))
    quick.run(lambda: None, lambda *_: done.append("quick"))
    bench.until(lambda: len(done) == 21)
    assert isinstance(bench, Threads) or done.index("quick") < 15
    slow.close()
    quick.close()


def test_closing_ends_what_was_begun_and_takes_no_more(bench: Bench) -> None:
    worker, worked = bench.background(), list[int]()
    worker.run(lambda: worked.append(1), lambda *_: None)
    worker.run(lambda: worked.append(2), lambda *_: None)
    worker.close()
    worker.run(lambda: worked.append(3), lambda *_: None)
    worker.close()
    bench.rest()
    assert worked == [1, 2]


# -------------------------------------------------- loop and connections


class Service:
    """Keeps its slots; greets whom says hello as a peer."""

    def __init__(self) -> None:
        self.routes = ()
        self.slots: list[Slot] = []
        self.heard: list[bytes] = []
        self.inbound: list[Any] = []
        self.news: list[str] = []

    def request(self, request: dict[str, Any], slot: Slot) -> None:
        if request["op"] == "hello":
            connection = slot.connection
            self.inbound.append(connection)
            connection.on_payload = self.heard.append
            connection.on_close = lambda: self.news.append(connection.reason)
        elif request["op"] == "hold":
            self.slots.append(slot)
        else:
            raise BadRequest("no")

    def close(self) -> None:
        """See simhost.Program."""


class Place(Protocol):
    """A server with `service`, and a loop from which to dial it."""

    loop: Reactor
    service: Service
    address: tuple[str, int]

    def until(self, condition: Callable[[], object]) -> None: ...
    def rest(self) -> None: ...
    def deafen(self) -> None:
        """Let nobody listen any more."""

    def close(self) -> None: ...


class OnSockets:
    """Both on one real loop."""

    def __init__(self) -> None:
        self._loop = Loop()
        self.loop: Reactor = self._loop
        self.service = Service()
        self._server = Server(self._loop, self.service, "127.0.0.1", 0, Limits())
        self.address = self._server.address

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            self._loop.turn(0.02)

    def rest(self) -> None:
        for _ in range(5):
            self._loop.turn(0.02)

    def deafen(self) -> None:
        self._server.stop_accepting()

    def close(self) -> None:
        self._loop.close()


class OnAgenda:
    """Two simulated hosts. What the test does itself happens between turns, and is seen by the next."""

    def __init__(self) -> None:
        self._agenda = Agenda()
        network = Network(self._agenda, random.Random(1), lambda kind: None)
        self.service = Service()
        self._worlds: dict[str, SimWorld] = {}
        for name in "ab":
            host = Host(name, self._agenda, network, random.Random(1))
            host.boot = lambda world, name=name: self._boot(name, world)
            host.start()
        self.loop: Reactor = self._worlds["a"].loop
        self._listener = self._worlds["b"].listen(self.service, "", 0, Limits())
        self.address = ("b", PORT)

    def _boot(self, name: str, world: SimWorld) -> Any:
        self._worlds[name] = world
        return self.service

    def until(self, condition: Callable[[], object]) -> None:
        end = self._agenda.now + PATIENCE_S
        self._wake()
        while not condition():
            assert self._agenda.step(end), "it did not happen in time"

    def rest(self) -> None:
        self._wake()
        end = self._agenda.now + 0.2
        while self._agenda.step(end):
            pass

    def _wake(self) -> None:
        for world in self._worlds.values():
            world.loop.post(lambda: None)

    def deafen(self) -> None:
        self._listener.stop_accepting()

    def close(self) -> None:
        for world in self._worlds.values():
            world.loop.close()


@pytest.fixture(params=[OnSockets, OnAgenda])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    found: Place = request.param()
    yield found
    found.close()


class Caller:
    """One dialled connection."""

    def __init__(self, place: Place, timeout_s: float = 3.0) -> None:
        self.news: list[str] = []
        self.heard: list[bytes] = []
        self.channel: Channel = place.loop.connect(
            place.address,
            on_open=lambda: self.news.append("open"),
            on_close=lambda: self.news.append("close"),
            on_payload=self.heard.append,
            timeout_s=timeout_s,
        )

    def say(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.channel.send(wire.frame(payload))


def peers(place: Place) -> tuple[Caller, Any]:
    caller, before = Caller(place), len(place.service.inbound)
    caller.say(b'{"op":"hello"}')
    place.until(lambda: len(place.service.inbound) > before and caller.news)
    return caller, place.service.inbound[-1]


def test_a_call_later_happens_once_and_a_cancelled_one_never(place: Place) -> None:
    done = list[str]()
    place.loop.call_later(0.02, lambda: done.append("late"))
    never = place.loop.call_later(0.01, lambda: done.append("never"))
    place.loop.call_later(0.0, lambda: done.append("now"))
    never.cancel()
    never.cancel()
    place.until(lambda: len(done) == 2)
    place.rest()
    assert done == ["now", "late"]


def test_every_goes_on_until_it_is_cancelled_also_by_itself(place: Place) -> None:
    done = list[int]()

    def tick() -> None:
        done.append(len(done))
        if len(done) == 3:
            alarm.cancel()

    alarm = place.loop.every(0.005, tick)
    place.until(lambda: len(done) == 3)
    place.rest()
    assert done == [0, 1, 2]


def test_what_is_posted_is_called_in_order_and_what_that_posts_after_on_turn(place: Place) -> None:
    done = list[str]()
    place.loop.on_turn.append(lambda: done.append("turn"))

    def first() -> None:
        done.append("first")
        place.loop.post(done.append, "third")

    place.loop.post(first)
    place.loop.post(done.append, "second")
    place.until(lambda: "third" in done)
    del done[: done.index("first")]  # a turn may have passed before
    assert done[:4] == ["first", "second", "turn", "third"]


def test_what_was_sent_before_a_connection_stands_is_sent_when_it_does(place: Place) -> None:
    caller = Caller(place)
    caller.say(b'{"op":"hello"}', b"early")
    place.until(lambda: place.service.heard == [b"early"])
    assert caller.news == ["open"]


def test_a_refused_dial_only_closes(place: Place) -> None:
    place.deafen()
    caller = Caller(place)
    assert caller.news == []
    place.until(lambda: caller.news)
    place.rest()
    assert caller.news == ["close"] and caller.channel.reason == "Connection refused"


def test_a_channel_closed_before_it_stands_only_closes(place: Place) -> None:
    caller = Caller(place)
    caller.channel.close()
    place.until(lambda: caller.news)
    place.rest()
    assert caller.news == ["close"] and caller.channel.reason == "closed here"


def test_on_close_is_posted_once_however_often_a_channel_ends(place: Place) -> None:
    caller, _ = peers(place)
    caller.channel.end("first")
    caller.channel.end("second")
    caller.channel.close()
    caller.channel.close_when_flushed()
    assert caller.news == ["open"]  # nobody is called back in the middle of their own call
    place.until(lambda: len(caller.news) == 2)
    place.rest()
    assert caller.news == ["open", "close"] and caller.channel.reason == "first"


def test_the_other_side_is_told_of_an_end(place: Place) -> None:
    caller, _ = peers(place)
    caller.channel.close()
    place.until(lambda: place.service.news)
    assert place.service.news == ["closed by the other side"]


def test_what_waits_is_lost_by_close_and_sent_by_close_when_flushed(place: Place) -> None:
    for politely in (False, True):
        caller, inbound = peers(place)
        heard = len(place.service.heard)
        caller.say(b"last words")
        (caller.channel.close_when_flushed if politely else caller.channel.close)()
        caller.say(b"too late")
        place.until(lambda inbound=inbound: inbound.reason)  # type: ignore[misc]
        assert place.service.heard[heard:] == ([b"last words"] if politely else [])


def test_after_the_end_nothing_is_sent_heard_or_held(place: Place) -> None:
    caller, inbound = peers(place)
    inbound.send(wire.frame(b"crossing"))
    caller.channel.close()
    caller.say(b"x")
    place.rest()
    assert caller.channel.output_bytes == 0 and caller.heard == [] and caller.channel.on_payload is None
    assert place.service.heard == []


def test_frames_that_come_together_are_handed_over_one_by_one_until_the_end(place: Place) -> None:
    caller, inbound = peers(place)

    def end_at_two(payload: bytes) -> None:
        place.service.heard.append(payload)
        if payload == b"2":
            inbound.close()

    inbound.on_payload = end_at_two
    caller.say(b"1", b"2", b"3")
    place.until(lambda: place.service.news)
    place.rest()
    assert place.service.heard == [b"1", b"2"]


def test_a_handler_that_is_replaced_hears_the_rest(place: Place) -> None:
    caller, _ = peers(place)
    caller.channel.on_payload = lambda payload: caller.news.append(payload.decode())
    place.service.inbound[0].send(wire.frame(b"hi"))
    place.until(lambda: "hi" in caller.news)
    assert caller.heard == []


def test_what_is_no_frame_ends_the_connection_as_garbled(place: Place) -> None:
    caller, inbound = peers(place)
    caller.channel.send(b"no frame at all\n")
    place.until(lambda: place.service.news)
    assert inbound.garbled and place.service.news[0].startswith("sent something that is no frame")


def test_replies_leave_in_the_order_of_the_requests(place: Place) -> None:
    caller = Caller(place)
    caller.say(b'{"op":"hold"}', b'{"op":"?"}', b'{"op":"hold"}')
    place.until(lambda: len(place.service.slots) == 2)
    first, last = place.service.slots
    place.loop.post(last.reply, b'{"n":3}')
    place.rest()
    assert caller.heard == []
    place.loop.post(first.reply, b'{"n":1}')
    place.loop.post(first.reply, b'{"n":"again"}')
    place.until(lambda: len(caller.heard) == 3)
    assert [wire.decode(reply).get("n") for reply in caller.heard] == [1, None, 3]


def test_a_request_whose_client_is_gone_counts_as_answered(place: Place) -> None:
    """On sockets, a client that closes may only have finished asking: its going shows when something is sent to it."""
    caller = Caller(place)
    caller.say(b'{"op":"hold"}', b'{"op":"hold"}')
    place.until(lambda: len(place.service.slots) == 2)
    caller.channel.close()
    place.rest()
    first, second = place.service.slots
    place.loop.post(first.reply, b"{}")
    place.until(lambda: first.done)
    place.rest()
    place.loop.post(second.reply, b"{}")
    place.until(lambda: second.done)


def test_an_error_in_a_handler_ends_that_connection_and_no_other(place: Place) -> None:
    (bad, inbound), (other, _) = peers(place), peers(place)

    def broken(payload: bytes) -> None:
        raise BadRequest("not mine")

    inbound.on_payload = broken
    bad.say(b"for the broken one")
    place.until(lambda: place.service.news)
    other.say(b"still here")
    place.until(lambda: place.service.heard == [b"still here"] and bad.channel.reason)
    assert place.service.news == ["failed here"] and bad.channel.reason == "closed by the other side"
