"""A simulated host: its clock, its disk, and the one program that runs on it, which can be killed at any effect.

Laws: a program sees its `SimWorld` and nothing else. Whatever it does to the outside (a change of its disk, something
sent) is an *effect*; between any two effects, and nowhere else, does it make a difference where a crash falls, so
crashes are counted in effects. A dead program has no effects: neither its `finally:` blocks nor what it had put down for later.

Theory. A program's threads take turns here, but where what they do matters, they are as far apart as real ones: what a thread
has done, the loop learns a moment later, and may do other things before; a program that is killed has come some of
the way with what its threads were at. And a loop that is busy finds several things to do in its next turn.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from ddb.agenda import Agenda
from ddb.disk import Disk
from ddb.errors import DdbError, InvariantError
from ddb.inspection import Here
from ddb.log import Log, LogWriter
from ddb.loop import Fatal
from ddb.reactor import Reactor
from ddb.server import Limits, Service
from ddb.simdisk import Crash, SimDisk
from ddb.simnet import Connection, Listener, Network

log = logging.getLogger(__name__)

PORT: Final = 8050
WALL_MS: Final = 1_700_000_000_000  # the time of day when a simulation begins
FSYNC_S: Final = 0.001
BACKGROUND_S: Final = 0.005
SLOW_S: Final = 0.1  # of those after the first, so that writes go on while a checkpoint is written
BUSY_S: Final = 0.002  # at most, while what comes waits for a turn of its own
SWITCH_S: Final = 0.00005  # from one thread to another
EFFECTS_CUT_SHORT: Final = 6  # so far, at most, may a thread have come with its work when it is killed


class Program(Protocol):
    """What runs on a host."""

    def close(self) -> None:
        """End it as a process does that ends by itself. May be called twice."""


class Thread(Protocol):
    """What else than its loop there is of a program."""

    def cut_short(self) -> None:
        """The program is killed: do what was under way, until its next effect raises Crash."""


class Host:
    """One machine. `boot(world)` starts its program. `on_turn_done(host)` is called after each turn of the program,
    `on_exit(host, why)` when it has ended by itself, or (with why None) after `crash_in` effects."""

    def __init__(self, name: str, agenda: Agenda, network: Network, rng: random.Random) -> None:
        self.name = name
        self.agenda = agenda
        self.network = network
        self.rng = rng
        self.disk = SimDisk(rng)
        self.disk.on_change = self.effect
        self.life = 0
        self.down = False
        self.rate = 1.0  # of its steady clock
        self.ahead_s = 0.0  # of its steady clock
        self.jumped_s = 0.0  # how far that was ever put forward, all in all
        self.wall_ahead_ms = 0
        self.fsync_s = FSYNC_S
        self.dirty: list[Connection] = []
        self.ends: dict[int, Connection] = {}
        self.listener: Listener | None = None
        self.crash_in: int | None = None  # effects that are let through
        self.crash_only: str | None = None  # only effects of this kind count
        self.program: Program | None = None
        self.boot: Callable[[SimWorld], Program] | None = None
        self.on_turn_done: Callable[[Host], None] = lambda host: None
        self.on_exit: Callable[[Host, str | None], None] = lambda host, why: None
        self.paused = False
        self.busy = 0.0  # how likely it is that what comes has to wait, and shares a turn with what comes meanwhile
        self.threads: list[Thread] = []
        self._ghosts: list[Connection] = []
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._in_turn = False
        self._loop: SimLoop | None = None
        network.hosts[name] = self

    def __repr__(self) -> str:
        return f"{self.name}: {self.program!r}" if self.program is not None else f"{self.name} is down"

    def now(self) -> float:
        """Its steady clock."""
        return self.ahead_s + self.rate * self.agenda.now

    # -- a life

    def start(self) -> None:
        """Start the program."""
        self.down = False
        ghosts, self._ghosts = self._ghosts, []
        self.network.power_returned(self, ghosts)
        self.happens(self._boot, ())

    def _boot(self) -> None:
        world = SimWorld(self)
        self._loop = world.sim_loop
        if self.boot is not None:
            self.program = self.boot(world)

    def happens(self, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
        """See agenda.Actor: a turn of the loop, or a part of one that comes later."""
        if self.paused or self._waiting:
            self._waiting.append((fn, args))
        elif self.busy and self.rng.random() < self.busy:
            self._waiting.append((fn, args))
            self.agenda.after(self.rng.random() * BUSY_S, None, self._catch_up, self.life)
        else:
            self._turn(fn, args)

    def _catch_up(self, life: int) -> None:
        """Do all that has waited, in one turn."""
        if life == self.life and not self.paused and self._waiting:
            waiting, self._waiting = self._waiting, []
            self._turn(_one_by_one, (waiting,))

    def _turn(self, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
        """As loop.Loop does: what comes, what was posted, `on_turn`, then one send for each connection."""
        self._in_turn = True
        try:
            fn(*args)
            posted, on_turn = self._posted, self._loop.on_turn if self._loop is not None else ()
            while True:
                if posted:
                    for _ in range(len(posted)):
                        fn, args = posted.popleft()
                        fn(*args)
                for fn in on_turn:
                    fn()
                if self.dirty:
                    self.flush()
                if not posted:
                    break
        except Crash:
            self.on_exit(self, None)
            return
        except InvariantError:
            raise
        except (Fatal, DdbError, OSError) as error:
            self._end(str(error))
            return
        finally:
            self._in_turn = False
        if self._loop is not None and self._loop.stopped:
            self._end("it has left")
        elif self.program is not None:
            self.on_turn_done(self)

    def flush(self) -> None:
        """Send what the connections have to say."""
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for connection in dirty:
                connection.flush()

    def effect(self, what: str, path: object = None) -> None:
        """The program is about to do something to the outside. Raises Crash where it dies before it can."""
        if self.down:
            raise Crash
        if self.crash_in is not None and (self.crash_only is None or self.crash_only == what):
            if self.crash_in <= 0:
                self.down = True
                raise Crash
            self.crash_in -= 1

    def post(self, fn: Callable[..., None], *args: Any) -> None:
        """Have `fn(*args)` called, soon and in the order of posting."""
        self._posted.append((fn, args))
        if not self._in_turn:
            self.agenda.after(0.0, self, _nothing)

    def pause(self) -> None:
        """Stop the program as SIGSTOP does: connections stay, and bytes wait."""
        self.paused = True

    def resume(self) -> None:
        """Let it go on."""
        self.paused = False
        self.agenda.after(0.0, None, self._catch_up, self.life)

    def die(self, power: bool) -> None:
        """End the program at once. With `power` its host goes down, too: the disk forgets, and nobody says goodbye."""
        if not self.down:
            for thread in self.threads:
                effects = self.rng.randrange(EFFECTS_CUT_SHORT + 1)
                if effects:  # the last of which is not done, or not wholly
                    self.crash_in, self.crash_only = effects - 1, None
                    thread.cut_short()
        self.down = power
        if power:
            self._ghosts += self.ends.values()
        self._forget(power)
        if power:
            self.disk.crash(self.rng)
        else:
            self.disk.restart(self.rng)

    def _end(self, why: str) -> None:
        """The program ends by itself."""
        program = self.program
        try:
            if program is not None:
                program.close()
            self.flush()
        except Crash:
            self.on_exit(self, None)
            return
        except (DdbError, OSError):
            pass
        self._forget(power=False)
        self.disk.restart(self.rng)
        self.on_exit(self, why)

    def _forget(self, power: bool) -> None:
        for end in list(self.ends.values()):
            end.forsake(power)
        if power:
            self.network.power_lost(self)
        self.life += 1
        self.program = None
        self._loop = None
        self.listener = None
        self.crash_in = self.crash_only = None
        self.paused = False
        self.ends.clear()
        self.dirty.clear()
        self.threads.clear()
        self._posted.clear()
        self._waiting.clear()


def _nothing() -> None:
    pass


def _one_by_one(events: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    for fn, args in events:
        fn(*args)


class SimAlarm:
    """A call in the future of one host. A reactor.Alarm."""

    __slots__ = ("_fn", "_host", "_interval_s")

    def __init__(self, host: Host, fn: Callable[[], None], interval_s: float | None) -> None:
        self._host = host
        self._fn: Callable[[], None] | None = fn
        self._interval_s = interval_s

    def cancel(self) -> None:
        """See Alarm."""
        self._fn = None

    def fire(self) -> None:
        """It is due."""
        if self._fn is not None:
            if self._interval_s is not None:
                host = self._host
                host.agenda.after(self._interval_s / host.rate, host, self.fire)
            self._fn()


class SimLoop:
    """The loop of one life of a program. A reactor.Reactor."""

    def __init__(self, host: Host) -> None:
        self.on_turn: list[Callable[[], None]] = []
        self.now = host.now
        self.post = host.post
        self.flush = host.flush
        self.stopped = False
        self._host = host

    def call_later(self, delay_s: float, fn: Callable[[], None]) -> SimAlarm:
        """See Reactor."""
        alarm = SimAlarm(self._host, fn, None)
        self._host.agenda.after(delay_s / self._host.rate, self._host, alarm.fire)
        return alarm

    def every(self, interval_s: float, fn: Callable[[], None]) -> SimAlarm:
        """See Reactor. Not all programs on all hosts look at the same moment."""
        alarm = SimAlarm(self._host, fn, interval_s)
        self._host.agenda.after(self._host.rng.random() * interval_s / self._host.rate, self._host, alarm.fire)
        return alarm

    def connect(
        self,
        address: tuple[str, int],
        *,
        on_open: Callable[[], None],
        on_close: Callable[[], None],
        on_payload: Callable[[bytes], None],
        bind_host: str | None = None,
        timeout_s: float = 3.0,
    ) -> Connection:
        """See Reactor."""
        connection = Connection(self._host.network, self._host, dialled=True)
        connection.on_close = on_close
        connection.on_payload = on_payload
        self._host.network.dial(connection, address, on_open, timeout_s)
        return connection

    def stop(self) -> None:
        """See Reactor."""
        self.stopped = True

    def run(self) -> None:
        """Nobody calls this: the agenda turns all loops."""
        raise NotImplementedError

    def close(self) -> None:
        """See Reactor."""
        for end in list(self._host.ends.values()):
            end.end("closed here")


class SimWriter(LogWriter):
    """The log's writer, its thread being an event `fsync_s` later."""

    def __init__(
        self,
        host: Host,
        log: Log,
        on_saved: Callable[[int], None],
        on_failure: Callable[[BaseException], None],
        on_space: Callable[[bool], None],
    ) -> None:
        self._host = host
        self._busy = False
        host.threads.append(self)
        super().__init__(log, self._tell, on_saved, on_failure, on_space)

    def _tell(self, fn: Callable[..., None], *args: Any) -> None:
        self._host.agenda.after(SWITCH_S, self._host, fn, *args)

    def start(self) -> None:
        """See LogWriter: there is no thread."""

    @property
    def is_quick(self) -> bool:
        """See LogWriter. Either way has its own crashes: so every other save takes it."""
        return self._tickets % 2 == 0

    def save(self, *args: Any, **options: Any) -> int:
        """See LogWriter."""
        ticket = super().save(*args, **options)
        if not self._busy and not self._queue.empty():
            self._begin()
        return ticket

    def _begin(self) -> None:
        self._busy = True
        host = self._host
        host.agenda.after(host.fsync_s * (0.2 + host.rng.random()), host, self._work)

    def _work(self) -> None:
        if not self._stopping.is_set():
            taken, _ = self.take()
            if not self.failed:  # in place, that is: nothing is written any more
                self._try(taken)

    def _try(self, taken: int) -> None:
        host = self._host
        if self._stopping.is_set():
            return
        try:
            if not self.sync():
                host.agenda.after(self._room_retry_s / host.rate, host, self._try, taken)
                return
        except (DdbError, OSError) as error:
            self.fail(error)
            return
        self.report(taken)
        self._busy = False
        if not self._queue.empty():
            self._begin()

    def close(self, timeout_s: float = 5.0) -> None:
        """See LogWriter."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._finish()
            self._log.close()

    def _finish(self) -> None:
        """Make what was saved durable, if that can be."""
        if not self.failed and not self._queue.empty():
            self.take()
        if not self.failed and not self._full:
            try:
                self.sync()
            except (DdbError, OSError) as error:
                self.fail(error)

    def cut_short(self) -> None:
        """See Thread."""
        with contextlib.suppress(Crash):
            self._finish()


class SimBackground:
    """Whatever takes long, one thing after the other, `pace_s` or so each. A world.Background."""

    def __init__(self, host: Host, pace_s: float = BACKGROUND_S) -> None:
        self._host = host
        self._pace_s = pace_s
        host.threads.append(self)
        self._queue: deque[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = deque()
        self._busy = False
        self._closed = False

    def run(self, work: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """See Background."""
        self._queue.append((work, done))
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        self._busy = True
        host = self._host
        host.agenda.after((self._pace_s + host.fsync_s) * (0.2 + host.rng.random()), host, self._work)

    def _work(self) -> None:
        if self._closed:
            return
        work, done = self._queue.popleft()
        result, failure = self._do(work)
        self._host.agenda.after(SWITCH_S, self._host, done, result, failure)
        self._busy = False
        if self._queue:
            self._begin()

    def _do(self, work: Callable[[], Any]) -> tuple[Any, Exception | None]:
        try:
            return work(), None
        except InvariantError:
            raise
        except Exception as error:
            return None, error

    def close(self) -> None:
        """See Background: what it was given it still does, but nobody is told."""
        if not self._closed:
            self._closed = True
            while self._queue:
                self._do(self._queue.popleft()[0])

    def cut_short(self) -> None:
        """See Thread."""
        if self._queue and not self._closed:
            with contextlib.suppress(Crash):
                self._do(self._queue[0][0])


class SimWorld:
    """A world.World: what a program sees of its host in one life."""

    def __init__(self, host: Host) -> None:
        self.sim_loop = SimLoop(host)
        self.loop: Reactor = self.sim_loop
        self.disk: Disk = host.disk
        self.rng = random.Random(host.rng.getrandbits(64))
        self._host = host
        self._backgrounds = 0

    def wall_ms(self) -> int:
        """See World."""
        return WALL_MS + self._host.wall_ahead_ms + int(self._host.now() * 1000)

    def new_id(self) -> str:
        """See World: words that are easy to tell apart in a trace."""
        host = self._host
        return f"{host.name}.{host.life}.{host.rng.getrandbits(16):04x}"

    def listen(self, service: Service, host: str, port: int, limits: Limits) -> Listener:
        """See World."""
        return Listener(self._host, service, (self._host.name, PORT))

    def writer(
        self,
        log: Log,
        on_saved: Callable[[int], None],
        on_failure: Callable[[BaseException], None],
        on_space: Callable[[bool], None],
    ) -> SimWriter:
        """See World."""
        return SimWriter(self._host, log, on_saved, on_failure, on_space)

    def background(self) -> SimBackground:
        """See World."""
        self._backgrounds += 1
        return SimBackground(self._host, BACKGROUND_S if self._backgrounds == 1 else SLOW_S)

    def inspect(self, path: Path, size_bytes: int) -> Here:
        """See World: whoever is in the background does it."""
        return Here(self.disk, path, size_bytes)
