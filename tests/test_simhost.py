"""A simulated host turns as the loop does, dies between any two effects, and has clocks of its own."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ddb import wire
from ddb.agenda import Agenda
from ddb.disk import write_all
from ddb.errors import InvariantError, ReadOnly
from ddb.log import Log
from ddb.loop import Fatal
from ddb.messages import Batch
from ddb.server import Limits, Slot
from ddb.simdisk import Crash
from ddb.simhost import BUSY_S, EFFECTS_CUT_SHORT, PORT, WALL_MS, Host, SimWorld, SimWriter
from ddb.simnet import Connection, Network

HOME = Path("/data")


class Program:
    """A program that writes down what happens to it."""

    def __init__(self, world: SimWorld) -> None:
        self.world = world
        self.routes = ()
        self.done: list[Any] = []
        self.closed = 0
        self.on_close: Callable[[], None] = lambda: None
        self.listener = world.listen(self, "", PORT, Limits())

    def request(self, request: dict[str, Any], slot: Slot) -> None:
        self.done.append(request["n"])

    def close(self) -> None:
        self.closed += 1
        self.on_close()
        self.world.loop.close()


class Stand:
    """Two hosts; `host` is the one that matters."""

    def __init__(self) -> None:
        self.agenda = Agenda()
        network = Network(self.agenda, random.Random(1), lambda kind: None)
        self.exits: list[tuple[str, str | None]] = []
        self.turns = 0
        self.hosts = [Host(name, self.agenda, network, random.Random(2)) for name in "ab"]
        self.host = self.hosts[0]
        for host in self.hosts:
            host.boot = Program
            host.on_exit = lambda host, why: self.exits.append((host.name, why))
            host.start()
        self.host.on_turn_done = self._turned
        self.host.disk.make_directory(HOME)

    def _turned(self, host: Host) -> None:
        self.turns += 1

    @property
    def program(self) -> Program:
        program = self.host.program
        assert isinstance(program, Program)
        return program

    @property
    def done(self) -> list[Any]:
        return self.program.done

    def do(self, fn: Callable[..., object], *args: Any) -> None:
        """Have the program do that now, as an event."""

        def event() -> None:
            fn(*args)

        self.host.happens(event, ())

    def wait(self, seconds: float = 0.01) -> None:
        end = self.agenda.now + seconds
        while self.agenda.step(end):
            pass

    def connected(self) -> Connection:
        """A connection that the host has with the other one."""
        found: list[Connection] = []

        def dial() -> None:
            found.append(
                self.program.world.sim_loop.connect(
                    ("b", PORT), on_open=lambda: None, on_close=lambda: None, on_payload=lambda payload: None
                )
            )

        self.do(dial)
        self.wait()
        return found[0]

    def asked(self) -> list[int]:
        """What has arrived at the other host."""
        program = self.hosts[1].program
        assert isinstance(program, Program)
        return program.done


@pytest.fixture
def stand() -> Stand:
    return Stand()


def frame(number: int) -> bytes:
    return wire.frame(b'{"op":"x","n":%d}' % number)


# -------------------------------------------------------------------- a turn


def test_a_turn_is_the_event_then_what_was_posted_then_on_turn_then_one_flush(stand: Stand) -> None:
    connection, done = stand.connected(), stand.done
    stand.program.world.loop.on_turn.append(lambda: done.append(("turn", len(connection._out))))

    def posted() -> None:
        done.append("posted")
        connection.send(frame(2))

    def event() -> None:
        done.append("event")
        stand.host.post(posted)
        connection.send(frame(1))

    stand.do(event)
    assert done == ["event", "posted", ("turn", 2)]
    assert connection.output_bytes == 0  # both have left
    stand.wait()
    assert stand.asked() == [1, 2]


def test_what_on_turn_posts_and_sends_is_not_forgotten(stand: Stand) -> None:
    connection = stand.connected()
    rounds = iter(range(3))

    def on_turn() -> None:
        for number in rounds:
            connection.send(frame(number))
            stand.host.post(lambda: None)
            break

    stand.program.world.loop.on_turn.append(on_turn)
    stand.do(lambda: None)
    stand.wait()
    assert stand.asked() == [0, 1, 2]


def test_what_is_posted_from_outside_a_turn_makes_one(stand: Stand) -> None:
    stand.host.post(stand.done.append, "x")
    assert stand.done == []
    stand.wait()
    assert stand.done == ["x"] and stand.turns == 1


def test_a_busy_host_does_several_things_in_one_turn_in_their_order(stand: Stand) -> None:
    stand.host.busy = 1.0
    for number in range(5):
        stand.agenda.after(0.0, stand.host, stand.done.append, number)
    stand.program.world.loop.on_turn.append(lambda: stand.done.append("turn"))
    stand.wait(BUSY_S)
    assert stand.done == [0, 1, 2, 3, 4, "turn"] and stand.turns == 1
    stand.wait(1.0)
    assert stand.turns == 1


def test_what_waits_for_a_busy_host_dies_with_its_program(stand: Stand) -> None:
    stand.host.busy = 1.0
    dead = stand.program
    stand.do(dead.done.append, "never")
    stand.host.die(power=False)
    stand.host.busy = 0.0
    stand.host.start()
    stand.wait(1.0)
    assert dead.done == [] == stand.done


def test_a_paused_host_does_all_that_came_in_one_turn_when_it_goes_on(stand: Stand) -> None:
    stand.host.pause()
    stand.program.world.loop.call_later(0.1, lambda: stand.done.append("alarm"))
    ticks = list[float]()
    stand.program.world.loop.every(0.01, lambda: ticks.append(stand.agenda.now))
    stand.do(stand.done.append, 1)
    stand.host.post(stand.done.append, 2)
    stand.wait(1.0)
    assert (stand.done, ticks, stand.turns) == ([], [], 0)
    stand.host.resume()
    stand.agenda.step(2.0)
    assert stand.done == [1, "alarm", 2] and len(ticks) == 1  # one tick, not a hundred
    assert stand.turns == 1


def test_stopped_while_busy_it_stays_stopped(stand: Stand) -> None:
    stand.host.busy = 1.0
    stand.do(stand.done.append, "x")
    stand.host.pause()
    stand.wait(1.0)
    assert stand.done == []
    stand.host.resume()
    stand.wait()
    assert stand.done == ["x"]


# -------------------------------------------------------- dying at an effect


def working(stand: Stand, did: list[str]) -> Callable[[], None]:
    """Some work of eight effects, with a `finally` that would have two more."""
    connection, disk = stand.connected(), stand.host.disk

    def work() -> None:
        handle = disk.open(HOME / "file")  # 1
        did.append("open")
        try:
            write_all(disk, handle, b"x" * 100, 0)  # 2
            did.append("write")
            disk.fdatasync(handle)  # 3
            did.append("fdatasync")
            disk.rename(HOME / "file", HOME / "other")  # 4
            did.append("rename")
            disk.fsync_dir(disk.open_directory(HOME))  # 5
            did.append("fsync_dir")
            connection.send(frame(1))
            stand.host.flush()  # 6
            did.append("send")
            connection.send(frame(2))  # 7, at the end of the turn
        finally:
            disk.truncate(handle, 0)  # 8 in order, but before what is sent
            did.append("finally")
            connection.send(frame(3))

    return work


EFFECTS = ["open", "write", "fdatasync", "rename", "fsync_dir", "send", "finally"]


@pytest.mark.parametrize("effects", range(9))
def test_a_program_dies_before_the_effect_that_is_one_too_many(stand: Stand, effects: int) -> None:
    did = list[str]()
    work = working(stand, did)
    stand.host.crash_in = effects
    stand.do(work)
    assert did == EFFECTS[:effects]
    if effects < 8:
        assert stand.exits == [("a", None)] and stand.host.down
    else:
        assert stand.exits == [] and stand.host.crash_in == 0
    stand.wait()
    assert stand.asked() == ([] if effects < 6 else [1] if effects < 8 else [1, 2, 3])


@pytest.mark.parametrize(("kind", "did"), [("send", 5), ("fdatasync", 2), ("pwrite", 1), ("truncate", 6)])
def test_only_effects_of_the_kind_asked_for_count(stand: Stand, kind: str, did: int) -> None:
    found = list[str]()
    work = working(stand, found)
    stand.host.crash_in, stand.host.crash_only = 0, kind
    stand.do(work)
    assert found == EFFECTS[:did]


def test_after_a_crash_nothing_the_program_does_has_an_effect(stand: Stand) -> None:
    connection, disk = stand.connected(), stand.host.disk
    handle = disk.open(HOME / "file")
    write_all(disk, handle, b"before", 0)
    disk.fdatasync(handle)
    stand.do(lambda: stand.program.world.background().run(lambda: disk.remove(HOME / "file"), lambda *_: None))
    stand.program.world.loop.call_later(0.001, lambda: connection.send(frame(1)))
    stand.host.crash_in = 0
    stand.do(lambda: disk.truncate(handle, 0))
    connection.send(frame(2))
    for attempt in (
        lambda: disk.truncate(handle, 0),
        lambda: disk.remove(HOME / "file"),
        lambda: stand.host.effect("send"),
        stand.host.flush,
    ):
        with pytest.raises(Crash):
            attempt()
    connection.close()
    assert disk.content(HOME / "file") == b"before"
    stand.host.die(power=False)
    stand.wait(1.0)
    assert stand.asked() == [] and disk.content(HOME / "file") == b"before"


def test_a_crash_in_the_middle_of_a_flush_lets_the_first_go_and_not_the_second(stand: Stand) -> None:
    first, second = stand.connected(), stand.connected()
    stand.host.crash_in, stand.host.crash_only = 1, "send"

    def both() -> None:
        first.send(frame(1))
        second.send(frame(2))

    stand.do(both)
    stand.host.die(power=True)
    stand.wait(1.0)
    assert stand.asked() == [1]


def test_a_crash_while_starting_is_a_crash(stand: Stand) -> None:
    stand.host.die(power=False)

    def boot(world: SimWorld) -> Program:
        world.disk.open(HOME / "lock")
        raise AssertionError("it went on")

    stand.host.boot = boot
    stand.host.crash_in = 0
    stand.host.start()
    assert stand.exits == [("a", None)] and stand.host.program is None


def test_a_new_life_begins_without_what_the_old_one_was_to_die_of(stand: Stand) -> None:
    stand.host.crash_in = 3
    stand.host.pause()
    stand.host.die(power=True)
    stand.host.start()
    did = list[str]()
    stand.do(working(stand, did))
    assert did == EFFECTS and stand.exits == []


def test_alarms_of_a_dead_program_never_ring(stand: Stand) -> None:
    dead = stand.program
    dead.world.loop.call_later(0.1, lambda: dead.done.append("later"))
    dead.world.loop.every(0.1, lambda: dead.done.append("every"))
    stand.host.die(power=False)
    stand.host.start()
    stand.wait(1.0)
    assert dead.done == [] and dead.closed == 0


def test_power_loss_forgets_what_was_not_synced_and_a_kill_does_not(stand: Stand) -> None:
    outcomes = set[tuple[bool, bytes]]()
    for seed in range(40):
        for power in (False, True):
            stand = Stand()
            handle = stand.host.disk.open(HOME / "file")
            stand.host.disk.fsync_dir(stand.host.disk.open_directory(HOME))
            write_all(stand.host.disk, handle, b"new", 0)
            stand.host.rng = random.Random(seed)
            stand.host.die(power)
            outcomes.add((power, stand.host.disk.content(HOME / "file")))
    assert (False, b"new") in outcomes and (True, b"") in outcomes and (False, b"") not in outcomes


# ------------------------------------------------------- threads cut short


def begun(stand: Stand, seed: int) -> SimWriter:
    """A log's writer that has something to write when `stand` is killed."""
    log = Log.open(HOME / "log", disk=stand.host.disk)
    writer = stand.program.world.writer(log, lambda ticket: None, lambda error: None, lambda room: None)
    data = b'{"first":1,"last":1,"term":1,"at":1,"entries":[["noop"]]}'
    stand.do(lambda: writer.save(None, [Batch(1, 1, 1, data, 1, [])]))
    stand.host.rng.seed(seed)
    return writer


@pytest.mark.parametrize("power", [False, True])
def test_a_killed_writer_has_saved_all_a_part_or_nothing(power: bool) -> None:
    found = set[tuple[int, bool]]()
    for seed in range(60):
        stand = Stand()
        begun(stand, seed)
        stand.host.die(power)
        stand.host.start()
        log = Log.open(HOME / "log", disk=stand.host.disk)
        found.add((log.last[0], log.tail_cut))
        log.close()
    assert {(0, False), (1, False)} <= found
    assert ((0, True) in found) is power  # a torn tail takes a power loss


def test_a_killed_worker_has_come_some_of_the_way(stand: Stand) -> None:
    found = set[tuple[str, ...]]()
    for seed in range(60):
        stand = Stand()
        disk = stand.host.disk

        def work(disk: Any = disk) -> None:
            for name in ("1", "2", "3"):
                disk.close(disk.open(HOME / name))

        stand.program.world.background().run(work, lambda *_: None)
        stand.host.rng.seed(seed)
        stand.host.die(power=False)
        found.add(tuple(disk.list(HOME)))
    assert {(), ("1",), ("1", "2"), ("1", "2", "3")} == found
    assert EFFECTS_CUT_SHORT > 3


def test_what_a_writer_has_saved_is_seen_before_it_is_told(stand: Stand) -> None:
    """As with a thread: the loop may do other things between the two."""
    told = list[int]()
    log = Log.open(HOME / "log", disk=stand.host.disk)
    writer = stand.program.world.writer(log, told.append, lambda error: None, lambda room: None)
    stand.do(lambda: writer.save(None, [Batch(1, 1, 1, b'{"first":1}', 1, [])]))
    while not writer.saved:
        assert stand.agenda.step(1.0)
    assert told == []
    stand.wait()
    assert told == [1]


# -------------------------------------------------------------------- clocks


def test_clocks_have_their_rate_and_their_jumps(stand: Stand) -> None:
    world = stand.program.world
    stand.wait(10.0)
    assert (world.loop.now(), world.wall_ms()) == (10.0, WALL_MS + 10_000)
    stand.host.ahead_s += 2.5
    stand.host.wall_ahead_ms -= 3_600_000
    assert (world.loop.now(), world.wall_ms()) == (12.5, WALL_MS + 12_500 - 3_600_000)
    stand.host.rate = 1.5
    stand.wait(10.0)
    assert world.loop.now() == 20.0 * 1.5 + 2.5


def test_alarms_go_by_the_hosts_own_clock(stand: Stand) -> None:
    loop, rung = stand.program.world.loop, list[float]()
    for host, rate in zip(stand.hosts, (2.0, 0.5), strict=True):
        host.rate = rate
        program = host.program
        assert isinstance(program, Program)
        program.world.loop.call_later(1.0, lambda: rung.append(stand.agenda.now))
    stand.wait(5.0)
    assert rung == [0.5, 2.0]
    every = list[float]()
    loop.every(1.0, lambda: every.append(stand.agenda.now))
    stand.wait(5.0)
    assert len(every) == 10
    assert {round(b - a, 9) for a, b in pairwise(every)} == {0.5}


def test_programs_do_not_all_look_at_the_same_moment() -> None:
    firsts = set[float]()
    stand = Stand()
    for _ in range(10):
        ticks = list[float]()
        alarm = stand.program.world.loop.every(1.0, lambda ticks=ticks: ticks.append(stand.agenda.now))  # type: ignore[misc]
        began = stand.agenda.now
        stand.wait(1.0)
        alarm.cancel()
        (first,) = ticks
        firsts.add(first - began)
    assert len(firsts) == 10 and all(0 <= first <= 1.0 for first in firsts)


# ---------------------------------------------------------------------- exit


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (Fatal("the disk has failed"), "the disk has failed"),
        (ReadOnly("there is no room"), "there is no room"),
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
    ],
)
def test_what_a_program_can_not_bear_ends_it_in_an_orderly_way(stand: Stand, error: Exception, why: str) -> None:
    connection, program = stand.connected(), stand.program

    def fail() -> None:
        connection.send(frame(1))
        raise error

    stand.do(fail)
    assert stand.exits == [("a", why)] and program.closed == 1
    assert stand.host.program is None and not stand.host.down and not stand.host.disk.locks
    stand.wait()
    assert stand.host.ends == {} == stand.hosts[1].ends


def test_an_error_from_on_turn_and_from_an_alarm_ends_the_program_too(stand: Stand) -> None:
    def fail() -> None:
        raise OSError("no")

    stand.program.world.loop.call_later(0.1, fail)
    stand.wait(1.0)
    stand.host.start()
    stand.program.world.loop.on_turn.append(fail)
    stand.do(lambda: None)
    assert stand.exits == [("a", "no")] * 2


def test_a_program_that_stops_its_loop_has_left_after_the_turn(stand: Stand) -> None:
    connection, program = stand.connected(), stand.program

    def leave() -> None:
        program.world.loop.stop()
        connection.send(frame(1))

    stand.do(leave)
    assert stand.exits == [("a", "it has left")] and program.closed == 1
    stand.wait()
    assert stand.asked() == [1]


def test_a_crash_while_closing_is_a_crash(stand: Stand) -> None:
    stand.program.on_close = lambda: stand.host.disk.close(stand.host.disk.open(HOME / "last"))
    stand.host.crash_in = 0
    stand.do(stand.program.world.loop.stop)
    assert stand.exits == [("a", None)] and stand.host.down
    assert not stand.host.disk.names


def test_an_error_while_closing_is_the_end_all_the_same(stand: Stand) -> None:
    def fail() -> None:
        raise OSError("it will not close")

    stand.program.on_close = fail
    connection = stand.connected()
    stand.do(stand.program.world.loop.stop)
    assert stand.exits == [("a", "it has left")] and stand.host.program is None
    stand.wait()
    assert connection.reason and stand.hosts[1].ends == {}  # a process that ends says goodbye


def test_a_broken_invariant_is_nobody_elses_to_handle(stand: Stand) -> None:
    def broken() -> None:
        raise InvariantError("two and two are four")

    with pytest.raises(InvariantError):
        stand.do(broken)


def test_a_program_that_can_not_start_has_ended(stand: Stand) -> None:
    stand.host.die(power=False)

    def boot(world: SimWorld) -> Program:
        world.disk.lock(HOME / "lock")
        raise ReadOnly("no room to start")

    stand.host.boot = boot
    stand.host.start()
    stand.host.start()  # the lock went with the program
    assert stand.exits == [("a", "no room to start")] * 2


def test_ids_are_never_the_same_twice(stand: Stand) -> None:
    world = stand.program.world
    ids = [world.new_id() for _ in range(5)]
    stand.host.die(power=False)
    stand.host.start()
    ids += [stand.program.world.new_id() for _ in range(5)]
    assert len(set(ids)) == 10
