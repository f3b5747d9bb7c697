"""A watch, for programs that block: the sockets under following.py.

Laws: one thread at a time takes events, any thread may close; Ctrl-C ends a wait at once and loses nothing; no wait
outlasts the time it was given.
"""

from __future__ import annotations

import inspect
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final

from ddb import wire
from ddb.calls import Failed, Knowledge, Sleep, seconds
from ddb.errors import DdbError, NotInTime
from ddb.following import Connect, Following, Learn, Receive, Step, Told
from ddb.links import ready, reason_of
from ddb.results import Event

MESSAGE_BYTES_MAX: Final = 1 << 30


class Watch:
    """An iterator of the changes that are asked for, without end, until it is closed. Made by `Client.watch`.

    `learn` asks where the nodes are; `gone` is told when it is closed.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        request: dict[str, Any],
        from_rev: int | None,
        patience_s: float,
        learn: Callable[[], object],
        gone: Callable[[Watch], object],
    ) -> None:
        self._following = Following(knowledge, request, from_rev, patience_s, time.monotonic, random.Random())
        self._steps = self._following.run()
        self._step: Step | None = None
        self._learn = learn
        self._gone = gone
        self._link: _Link | None = None
        self._busy = threading.Lock()
        self._closed = threading.Event()
        self._bell, self._button = socket.socketpair()
        self._until_s: float | None = None  # how long the one who waits has time
        self._wake_s: float | None = None

    def start(self) -> Watch:
        """Go on until the watch stands. Raises a DdbError where no node serves it."""
        try:
            self._advance(None)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def rev(self) -> int:
        """The revision up to which all changes have been told: what happened later is still to come."""
        return self._following.rev or 0

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._closed.is_set():
            event = self._advance(None)
            if event is not None:
                return event
        raise StopIteration

    def wait(self, timeout_s: float) -> Event | None:
        """The next change, or None where there is none within `timeout_s`, or the watch is closed.

        >>> with db.watch("city") as watch:
        ...     watch.wait(0.01)
        """
        until_s = time.monotonic() + seconds(timeout_s, "timeout_s")
        while not self._closed.is_set():
            try:
                event = self._advance(until_s)
            except NotInTime:
                return None
            if event is not None:
                return event
        return None

    def close(self) -> None:
        """End the watch, and whoever waits for it, in whichever thread. May be called twice.

        >>> watch = db.watch("city")
        >>> watch.close()
        >>> list(watch)
        []
        """
        if not self._closed.is_set():
            self._closed.set()
            self._gone(self)
            try:
                self._button.send(b"!")
            except OSError:
                pass  # closed by the one who was waiting
        self._clear()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forked(self) -> None:
        """The parent goes on with the connection; here another one is opened, from where this one was."""
        self._busy = threading.Lock()
        self._steps, self._step = self._following.run(), None
        self._drop()
        self._bell.close()
        self._button.close()
        if not self._closed.is_set():
            self._bell, self._button = socket.socketpair()

    # ------------------------------------------------------------ the driver

    def _clear(self) -> None:
        """Let go of the sockets, unless somebody waits on them: who does, does it then."""
        if self._closed.is_set() and self._busy.acquire(blocking=False):
            try:
                self._steps.close()
                self._drop()
                self._bell.close()
                self._button.close()
            finally:
                self._busy.release()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _advance(self, until_s: float | None) -> Event | None:
        """Go on to the next thing told. Raises NotInTime at `until_s`; what was begun then goes on the next time."""
        try:
            with self._busy:
                self._until_s = until_s
                return self._go_on()
        except NotInTime:
            raise
        except DdbError:
            self._closed.set()
            self._gone(self)
            raise
        finally:
            self._clear()

    def _go_on(self) -> Event | None:
        if self._closed.is_set():
            return None
        if inspect.getgeneratorstate(self._steps) == inspect.GEN_CLOSED:  # ended by an interrupt
            self._steps, self._step = self._following.run(), None
        if self._step is None:
            self._step = next(self._steps)
        while not isinstance(self._step, Told):
            try:
                answer = self._perform(self._step)
            except Failed as failure:
                self._step = self._steps.throw(failure)
            except _Closed:
                return None
            else:
                self._step = self._steps.send(answer)
        event = self._step.event
        self._step = None
        return event

    def _perform(self, step: Step) -> bytes | None:
        match step:
            case Connect():
                self._drop()
                self._link = _Link(step.address, step.payload, step.deadline_s)
            case Receive():
                assert self._link is not None, "what is received was asked for"
                return self._receive(self._link, step.deadline_s)
            case Sleep(seconds):
                self._wake_s = self._wake_s or time.monotonic() + seconds  # of a pause that goes on, it is the first
                self._await(None, self._wake_s)
                self._wake_s = None
            case Learn():
                self._learn()
        return None

    def _receive(self, link: _Link, deadline_s: float) -> bytes:
        """The next payload. Raises Failed, NotInTime, _Closed."""
        while True:
            payload = link.next_payload()
            if payload is not None:
                return payload
            if not self._await(link.socket, deadline_s):
                raise Failed("it is silent", sent=True)
            link.read()

    def _await(self, sock: socket.socket | None, deadline_s: float) -> bool:
        """Wait until there is something to read, or the deadline has come (False). Raises NotInTime where the one who
        waits has no time left, _Closed where there is nothing to wait for any more."""
        end_s = deadline_s if self._until_s is None else min(deadline_s, self._until_s)
        readable = ready([self._bell, *([sock] if sock is not None else [])], [], end_s - time.monotonic())[0]
        if self._bell in readable:
            raise _Closed
        if not readable and self._until_s is not None and time.monotonic() >= self._until_s:
            raise NotInTime("Nothing has changed in this time.")
        return bool(readable)


class _Closed(Exception):
    """The watch was closed, perhaps from another thread."""


class _Link:
    """One connection, and the frames that came on it."""

    def __init__(self, address: str, payload: bytes, deadline_s: float) -> None:
        self._cutter = wire.FrameBuffer(MESSAGE_BYTES_MAX)
        self._payloads: deque[bytes] = deque()
        patience_s = max(deadline_s - time.monotonic(), 0.001)
        try:
            self.socket = socket.create_connection(wire.parse_address(address), timeout=patience_s)
        except (OSError, UnicodeError) as error:
            raise Failed(reason_of(error), sent=False, connected=False) from None
        try:
            self.socket.sendall(wire.frame(payload))
        except OSError as error:
            self.socket.close()
            raise Failed(reason_of(error), sent=False) from None

    def next_payload(self) -> bytes | None:
        """The next message that came, if one did."""
        return self._payloads.popleft() if self._payloads else None

    def read(self) -> None:
        """Take what has come. Raises Failed where the connection has ended."""
        try:
            data = self.socket.recv(1 << 18)
        except OSError as error:
            raise Failed(reason_of(error), sent=True) from None
        if not data:
            raise Failed("it closed the connection", sent=True)
        self._payloads.extend(self._cutter.feed(data))
        if self._cutter.error is not None:
            raise Failed("it does not speak ddb's protocol", sent=True)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
