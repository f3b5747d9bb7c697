"""The blocking sockets on which a client's calls travel.

Laws:

1. It is told truthfully how far a request got: `sent` from the moment that the kernel has taken its last byte.
2. An interrupt (Ctrl-C) in the middle of a call leaves no half-read connection in use.
3. No step outlasts the deadline that it was given.

Theory. What a call does next is decided in calls.py, without I/O; here each of its steps is done, one after another, in
the caller's own thread. A connection carries one request at a time and is silent in between, so a server that closed it
while it was idle is noticed before anything is sent: a write that meets a restarted server is then not a write of
unknown outcome.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ddb import calls, wire
from ddb.calls import CONNECT_TIMEOUT_S, Effect, Exchange, Failed, Keep, Knowledge, Sleep, Steps

REPLY_BYTES_MAX: Final = 1 << 30


class Caller:
    """The open connections to a cluster's nodes, and what is `known` of where they are and who leads.

    The arguments are those of calls.Knowledge. For one thread at a time.
    """

    def __init__(
        self, servers: Sequence[str], registry: str | None = None, discover: bool = True, unreachable_s: float = 5.0
    ) -> None:
        self.known = Knowledge(tuple(servers), registry, discover, unreachable_s)
        self.links: dict[str, Link] = {}
        self._rng = random.Random()

    def call(self, request: Mapping[str, Any], at: str | None, timeout_s: float) -> dict[str, Any]:
        """Send `request` to the leader where that is known, or to the address `at` and nowhere else, and go on until
        it is served or `timeout_s` is over. Returns the reply. Raises a DdbError."""
        return self._drive(calls.call(self.known, request, at, timeout_s, time.monotonic, self._rng))

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses known now: those given, then those learnt."""
        return self.known.servers

    def close(self) -> None:
        """Close every connection. May be called twice."""
        for address in list(self.links):
            self.drop(address)

    def link(self, address: str, deadline_s: float) -> Link:
        """The open connection to `address`, or a new one. Raises OSError."""
        link = self.links.get(address)
        if link is not None and link.usable():
            return link
        self.drop(address)
        link = self.links[address] = Link(address, deadline_s)
        return link

    def drop(self, address: str) -> None:
        """Close the connection to `address`, if there is one."""
        link = self.links.pop(address, None)
        if link is not None:
            link.close()

    def _drive(self, steps: Steps) -> dict[str, Any]:
        """Do what a call wants done until it has its reply."""
        try:
            effect = next(steps)
            while True:
                try:
                    answer = self._perform(effect)
                except Failed as failure:
                    effect = steps.throw(failure)
                else:
                    effect = steps.send(answer)
        except StopIteration as end:
            reply: dict[str, Any] = end.value
            return reply
        finally:
            steps.close()

    def _perform(self, effect: Effect) -> bytes | None:
        match effect:
            case Exchange():
                return self._exchange(effect)
            case Sleep(seconds):
                time.sleep(seconds)
            case Keep(addresses):
                for unknown in [address for address in self.links if address not in addresses]:
                    self.drop(unknown)
        return None

    def _exchange(self, effect: Exchange) -> bytes:
        """The reply to one request. Raises Failed."""
        try:
            link = self.link(effect.address, effect.deadline_s)
        except OSError as error:
            raise Failed(_reason(error), sent=False, connected=False) from None
        try:
            return link.exchange(effect.payload, effect.deadline_s)
        except OSError as error:
            self.drop(effect.address)
            raise Failed(_reason(error), sent=link.sent) from None


class Link:
    """One blocking connection in the frames dialect, with one request under way at a time."""

    def __init__(self, address: str, deadline_s: float) -> None:
        self.sent = False  # whether the kernel took the whole of the last request
        self._idle = True
        self._cutter = wire.FrameBuffer(REPLY_BYTES_MAX)
        patience_s = max(min(CONNECT_TIMEOUT_S, deadline_s - time.monotonic()), 0.001)
        try:
            self._socket = socket.create_connection(wire.parse_address(address), timeout=patience_s)
        except UnicodeError:  # from the idna codec
            raise OSError("no host has such a name") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll is not None:
            self._poll.register(self._socket, select.POLLIN)

    def usable(self) -> bool:
        """Whether a request may be sent: no earlier one waits for its reply (Ctrl-C came in between), and the connection
        is silent, as it must be between two requests. It is not once the server closed it."""
        if not self._idle:
            return False
        if self._poll is not None:
            return not self._poll.poll(0)
        return not select.select([self._socket], [], [], 0)[0]

    def exchange(self, payload: bytes, deadline_s: float) -> bytes:
        """Send `payload` as a frame and return the reply's payload. Raises OSError; `sent` then says how far it got."""
        self.sent = self._idle = False
        unsent = memoryview(wire.frame(payload))
        while unsent:
            self._arm(deadline_s)
            unsent = unsent[self._socket.send(unsent) :]
        self.sent = True
        while True:
            self._arm(deadline_s)
            data = self._socket.recv(1 << 18)
            if not data:
                raise ConnectionResetError("it closed the connection")
            payloads = self._cutter.feed(data)
            if self._cutter.error is not None:
                raise ConnectionAbortedError("it does not speak ddb's protocol")
            if payloads:
                self._idle = len(payloads) == 1 and not self._cutter  # nobody asked for more
                return payloads[0]

    def _arm(self, deadline_s: float) -> None:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("time ran out")
        self._socket.settimeout(remaining_s)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _reason(error: OSError) -> str:
    """Why, in a few words without the number of the error."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror or str(error) or type(error).__name__).lower()
