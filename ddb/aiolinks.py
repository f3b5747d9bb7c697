"""The asyncio connections on which a client's calls travel: any number of calls at once, over a few connections.

Laws:

1. Replies come in the order of the requests: the n-th reply of a connection is the n-th request's, whether anybody still
   waits for it or not.
2. It is told truthfully how far a request got; where that can't be known, it was sent.
3. A connection on which one request was not answered in time takes no new ones, and is closed when nobody waits on it.

Theory. What a call does next is decided in calls.py. A task that is cancelled leaves its request under way: the
others on the connection are not disturbed, and its reply is passed over when it comes. New calls take an idle
connection, or open another one while there are fewer than LINKS_MAX, or else queue behind the fewest others.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ddb import calls, wire
from ddb.calls import CONNECT_TIMEOUT_S, Effect, Exchange, Failed, Keep, Knowledge, Outcome, Sleep, Volley
from ddb.driving import drive_awaiting
from ddb.errors import BadRequest
from ddb.links import REPLY_BYTES_MAX, ready, reason_of

LINKS_MAX: Final = 8  # to one server


class Link(asyncio.Protocol):
    """One connection in the frames dialect, with any number of requests under way."""

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[bytes]] = deque()
        self.retired = False  # takes no new requests
        self._cutter = wire.FrameBuffer(REPLY_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._offered = 0  # bytes given to the transport so far
        self._reason = "it closed the connection"

    async def open(self, address: str, deadline_s: float) -> None:
        """Connect. Raises Failed."""
        patience_s = max(min(CONNECT_TIMEOUT_S, deadline_s - time.monotonic()), 0.001)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience_s):
                await loop.create_connection(lambda: self, *wire.parse_address(address))
        except (OSError, UnicodeError) as error:
            raise Failed(reason_of(error), sent=False, connected=False) from None

    @property
    def usable(self) -> bool:
        """Whether it takes another request. An idle one is silent; it is not once the server closed it."""
        if self.retired or self._transport is None:
            return False
        if not self.waiting and ready([self._transport.get_extra_info("socket")], [], 0)[0]:
            self.close()
        return not self.retired

    def send(self, payload: bytes) -> tuple[asyncio.Future[bytes], int]:
        """Send a request; returns what its reply will be, and where it ends in all that was offered to be sent. Raises
        Failed."""
        assert self._transport is not None, "a link is opened before it is used"
        if self.retired:
            raise Failed("it closed the connection", sent=False)
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        frame = wire.frame(payload)
        self.waiting.append(reply)
        self._offered += len(frame)
        self._transport.write(frame)
        return reply, self._offered

    async def receive(self, reply: asyncio.Future[bytes], end: int, deadline_s: float) -> bytes:
        """The reply, by its deadline. Raises Failed."""
        try:
            async with asyncio.timeout(max(deadline_s - time.monotonic(), 0)):
                return await reply
        except TimeoutError:
            sent = self._is_sent(end)
            self.retire()
            if not sent:
                self.close()  # so that the rest of it never goes out
            raise Failed("no answer in time", sent=sent) from None

    def _is_sent(self, end: int) -> bool:
        """Whether the kernel took all bytes up to `end`."""
        assert self._transport is not None, "a link is opened before it is used"
        return end <= self._offered - self._transport.get_write_buffer_size()

    def retire(self) -> None:
        """Take no new requests, and close as soon as nobody waits for a reply."""
        self.retired = True
        if all(reply.done() for reply in self.waiting):
            self.close()

    def close(self) -> None:
        """Close the connection, whoever waits on it. May be called twice."""
        self.retired = True
        if self._transport is not None:
            self._transport.abort()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand out the replies that are whole (law 1)."""
        for payload in self._cutter.feed(data):
            if not self.waiting:
                self._reason = "it answered what nobody asked"
                self.close()
                return
            reply = self.waiting.popleft()
            if not reply.done():
                reply.set_result(payload)
        if self._cutter.error is not None:
            self._reason = "it does not speak ddb's protocol"
            self.close()
        elif self.retired:
            self.retire()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell all who wait."""
        self.retired = True
        reason = reason_of(error) if isinstance(error, OSError) else self._reason
        while self.waiting:
            reply = self.waiting.popleft()
            if not reply.done():
                reply.set_exception(Failed(reason, sent=True))
                reply.exception()  # read here, for who was cancelled will not


class Caller:
    """All connections of one asyncio client, and what is `known` of where the nodes are and who leads."""

    def __init__(self, known: Knowledge) -> None:
        self.known = known
        self.links: dict[str, list[Link]] = {}
        self.closed = False
        self._opening: dict[str, set[asyncio.Task[Link]]] = {}
        self._rng = random.Random()

    async def call(self, request: Mapping[str, Any], at: str | None, timeout_s: float) -> dict[str, Any]:
        """Send `request` to the leader where that is known, or to the address `at` and nowhere else, and go on until
        it is served or `timeout_s` is over. Returns the reply. Raises a DdbError."""
        steps = calls.call(self.known, request, at, timeout_s, time.monotonic, self._rng)
        return await drive_awaiting(steps, self._perform, Failed)

    async def volley(self, requests: Sequence[Mapping[str, Any]], timeout_s: float) -> list[Outcome]:
        """Send all `requests` at once; returns for each what came of it."""
        steps = calls.volley(self.known, requests, timeout_s, time.monotonic, self._rng)
        return await drive_awaiting(steps, self._perform, Failed)

    def close(self) -> None:
        """Close every connection, whoever waits on it. May be called twice."""
        self.closed = True
        for tasks in self._opening.values():
            for task in tasks:
                task.cancel()
        for links in self.links.values():
            for link in links:
                link.close()
        self.links.clear()

    async def _perform(self, effect: Effect | Volley) -> Any:
        if self.closed:
            raise BadRequest("This client is closed; connect again.")
        match effect:
            case Exchange():
                link = await self._link(effect.address, effect.deadline_s)
                return await link.receive(*link.send(effect.payload), effect.deadline_s)
            case Volley():
                return await self._volley(effect)
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Keep(addresses):
                for unknown in [address for address in self.links if address not in addresses]:
                    for link in self.links.pop(unknown):
                        link.retire()
        return None

    async def _volley(self, effect: Volley) -> list[bytes | Failed]:
        """For each request its reply, or why there is none."""
        try:
            link = await self._link(effect.address, effect.deadline_s)
        except Failed as failure:
            return [failure for _ in effect.payloads]
        answers: list[bytes | Failed] = []
        try:
            under_way = [link.send(payload) for payload in effect.payloads]
        except Failed as failure:
            return [failure for _ in effect.payloads]
        for reply, end in under_way:
            try:
                answers.append(await link.receive(reply, end, effect.deadline_s))
            except Failed as failure:
                answers.append(failure)
        return answers

    async def _link(self, address: str, deadline_s: float) -> Link:
        """A connection to `address` that takes another request. Raises Failed."""
        links = self.links[address] = [link for link in self.links.get(address, ()) if link.usable]
        opening = self._opening.setdefault(address, set())
        best = min(links, key=lambda link: len(link.waiting), default=None)
        if best is not None and (not best.waiting or len(links) + len(opening) >= LINKS_MAX):
            return best
        if best is None and len(opening) >= LINKS_MAX:
            task = self._rng.choice(list(opening))
        else:
            task = asyncio.create_task(self._open(address, deadline_s))
            opening.add(task)
            task.add_done_callback(opening.discard)
        try:
            return await asyncio.shield(task)  # for another's cancellation is not this one's
        except asyncio.CancelledError:
            if task.cancelled():
                raise BadRequest("This client is closed; connect again.") from None
            raise

    async def _open(self, address: str, deadline_s: float) -> Link:
        link = Link()
        await link.open(address, deadline_s)
        if self.closed:
            link.close()
        self.links.setdefault(address, []).append(link)
        return link
