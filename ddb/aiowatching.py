"""A watch, for asyncio: the connection under following.py.

Laws: one task at a time takes events, any may close; a task that is cancelled while it waits loses nothing; no wait
outlasts the time it was given.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

from ddb import wire
from ddb.calls import Failed, Knowledge, Sleep, seconds
from ddb.errors import DdbError
from ddb.following import Connect, Following, Learn, Receive, Step, Told
from ddb.links import REPLY_BYTES_MAX, reason_of
from ddb.results import Event


class Watch:
    """An asynchronous iterator of the changes that are asked for, without end, until it is closed. Made by
    `Client.watch`; `learn` asks where the nodes are, `gone` is told when it is closed."""

    def __init__(
        self,
        knowledge: Knowledge,
        request: dict[str, Any],
        from_rev: int | None,
        patience_s: float,
        learn: Callable[[], Awaitable[object]],
        gone: Callable[[Watch], object],
    ) -> None:
        self._following = Following(knowledge, request, from_rev, patience_s, time.monotonic, random.Random())
        self._steps = self._following.run()
        self._step: Step | None = None
        self._learn = learn
        self._gone = gone
        self._link: _Link | None = None
        self._closed = asyncio.Event()
        self._wake_s: float | None = None

    async def start(self) -> Watch:
        """Go on until the watch stands. Raises a DdbError where no node serves it."""
        try:
            await self._advance()
        except BaseException:
            self.close()
            raise
        return self

    @property
    def rev(self) -> int:
        """The revision up to which all changes have been told: what happened later is still to come."""
        return self._following.rev or 0

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._closed.is_set():
            event = await self._advance()
            if event is not None:
                return event
        raise StopAsyncIteration

    async def wait(self, timeout_s: float) -> Event | None:
        """The next change, or None where there is none within `timeout_s`, or the watch is closed.

        >>> async with await db.watch("city") as watch:
        ...     await watch.wait(0.01)
        """
        try:
            async with asyncio.timeout(seconds(timeout_s, "timeout_s")):
                return await anext(self, None)
        except TimeoutError:
            return None

    def close(self) -> None:
        """End the watch, and whoever waits for it. May be called twice.

        >>> watch = await db.watch("city")
        >>> watch.close()
        >>> [event async for event in watch]
        []
        """
        if not self._closed.is_set():
            self._closed.set()
            self._gone(self)
            self._drop()

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ the driver

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    async def _advance(self) -> Event | None:
        """Go on to the next thing told. What a cancellation interrupts goes on the next time."""
        if inspect.getgeneratorstate(self._steps) == inspect.GEN_CLOSED:  # by an interrupt
            self._steps, self._step = self._following.run(), None
        try:
            if self._step is None:
                self._step = next(self._steps)
            while not isinstance(self._step, Told):
                try:
                    answer = await self._perform(self._step)
                except Failed as failure:
                    if self._closed.is_set():
                        return None
                    self._step = self._steps.throw(failure)
                else:
                    self._step = self._steps.send(answer)
                if self._closed.is_set():
                    self._drop()
                    return None
        except DdbError:
            self.close()
            raise
        event = self._step.event
        self._step = None
        return event

    async def _perform(self, step: Step) -> bytes | None:
        match step:
            case Connect():
                self._drop()
                self._link = await _open(step)
            case Receive():
                if self._link is None:
                    raise Failed("it was closed", sent=True)
                return await self._link.receive(step.deadline_s)
            case Sleep(seconds):
                self._wake_s = self._wake_s or time.monotonic() + seconds  # of a pause that goes on, it is the first
                await self._pause(self._wake_s)
                self._wake_s = None
            case Learn():
                await self._learn()
        return None

    async def _pause(self, until_s: float) -> None:
        try:
            async with asyncio.timeout(max(until_s - time.monotonic(), 0)):
                await self._closed.wait()
        except TimeoutError:
            return


async def _open(step: Connect) -> _Link:
    """A connection on which the request was sent. Raises Failed."""
    try:
        async with asyncio.timeout(max(step.deadline_s - time.monotonic(), 0.001)):
            reader, writer = await asyncio.open_connection(*wire.parse_address(step.address))
    except (OSError, UnicodeError) as error:
        raise Failed(reason_of(error), sent=False, connected=False) from None
    writer.write(wire.frame(step.payload))
    return _Link(reader, writer)


class _Link:
    """One connection, and the frames that came on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._cutter = wire.FrameBuffer(REPLY_BYTES_MAX)
        self._payloads: deque[bytes] = deque()

    async def receive(self, deadline_s: float) -> bytes:
        """The next payload. Raises Failed."""
        while not self._payloads:
            try:
                async with asyncio.timeout(max(deadline_s - time.monotonic(), 0)):
                    data = await self._reader.read(1 << 18)
            except TimeoutError:
                raise Failed("it is silent", sent=True) from None
            except OSError as error:
                raise Failed(reason_of(error), sent=True) from None
            if not data:
                raise Failed("it closed the connection", sent=True)
            self._payloads.extend(self._cutter.feed(data))
            if self._cutter.error is not None:
                raise Failed("it does not speak ddb's protocol", sent=True)
        return self._payloads.popleft()

    def close(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()
