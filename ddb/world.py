"""The world around a node: its clocks, chance, disk, network and threads, in one hand.

Laws: a node takes from outside only what is here, so the simulator, which puts a world of its own in this one's
place (simworld.py), runs the very node that serves.
"""

from __future__ import annotations

import gc
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ddb import inspection
from ddb.disk import Disk, OsDisk
from ddb.inspection import Inspection
from ddb.log import Log, LogWriter
from ddb.loop import Loop
from ddb.reactor import Reactor
from ddb.scheduling import Turns, step_back
from ddb.server import Limits, Server, Service

Done = Callable[[Any, Exception | None], None]


class Listener(Protocol):
    """Where clients and members come in. `address` is the (host, port) it listens on."""

    address: tuple[str, int]

    def stop_accepting(self) -> None:
        """Take no new connections; serve those that are there."""

    def close(self) -> None:
        """End all of it. May be called twice."""


class Background(Protocol):
    """Somebody who does what takes long, one thing after the other."""

    def run(self, work: Callable[[], Any], done: Done) -> None:
        """Do `work`, then have `done(result, error)` called on the loop."""

    def close(self) -> None:
        """Take no more."""


class World(Protocol):
    """What there is of the world for one node, from its start to its end."""

    loop: Reactor
    disk: Disk
    rng: random.Random

    def wall_ms(self) -> int:
        """The time of day, in milliseconds since 1970."""

    def new_id(self) -> str:
        """A word that nobody else has."""

    def listen(self, service: Service, host: str, port: int, limits: Limits) -> Listener:
        """Serve `service` there. Raises StartupError."""

    def writer(
        self,
        log: Log,
        on_saved: Callable[[int], None],
        on_failure: Callable[[BaseException], None],
        on_space: Callable[[bool], None],
    ) -> LogWriter:
        """Whoever fsyncs `log`; see LogWriter."""

    def background(self) -> Background:
        """Somebody for what takes long, who lets the loop go first."""

    def inspect(self, path: Path, size_bytes: int) -> Inspection:
        """Somebody to verify the snapshot of so many bytes that is arriving at `path`."""


class OsWorld:
    """The real one: sockets, threads, the operating system's clocks and files."""

    def __init__(self) -> None:
        self._loop = Loop()
        self.loop: Reactor = self._loop
        self.disk: Disk = OsDisk()
        self.rng = random.Random()
        self._turns = Turns()

    def wall_ms(self) -> int:
        """See World."""
        return max(time.time_ns() // 1_000_000, 0)  # a clock from before 1970 is no reason to write what can't be read

    def new_id(self) -> str:
        """See World."""
        return str(uuid.uuid4())

    def listen(self, service: Service, host: str, port: int, limits: Limits) -> Server:
        """See World."""
        return Server(self._loop, service, host, port, limits)

    def writer(
        self,
        log: Log,
        on_saved: Callable[[int], None],
        on_failure: Callable[[BaseException], None],
        on_space: Callable[[bool], None],
    ) -> LogWriter:
        """See World."""
        writer = LogWriter(log, self.loop.post, on_saved, on_failure, on_space)
        self._turns.add(writer.native_id)
        return writer

    def background(self) -> Worker:
        """See World."""
        return Worker(self.loop.post, self._turns)

    def inspect(self, path: Path, size_bytes: int) -> Inspection:
        """See World."""
        return inspection.begin(self.disk, path, size_bytes)


class Worker:
    """One thread for what takes long: `run(work, done)` has `done(result, error)` posted when `work()` has ended. It gives way
    to those whose `turns` they are."""

    def __init__(self, post: Callable[..., None], turns: Turns) -> None:
        self._post = post
        self._turns = turns
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], Any], done: Done) -> None:
        """See Background."""
        self._turns.may_interrupt()
        self._queue.put((work, done))

    def close(self, timeout_s: float = 30.0) -> None:
        """See Background: the thread ends after what it is at."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _done(self, done: Done, result: Any, error: Exception | None) -> None:
        self._turns.are_whole()
        done(result, error)

    def _work(self) -> None:
        step_back()
        while (item := self._queue.get()) is not None:
            work, done = item
            try:
                result = work()
            except Exception as error:
                self._post(self._done, done, None, error)
            else:
                self._post(self._done, done, result, None)


def settle_collector() -> None:
    """Spare the garbage collector what start-up has made: it stays, so it need not be looked at again.

    How often it looks at the rest is left as it is. Thresholds of 3,000 to 20,000 young objects save 3 % of a busy node's time,
    and cost pauses of 35 to 55 ms, where the longest was 9.
    """
    gc.collect()
    gc.freeze()
