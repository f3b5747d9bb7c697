"""One blocking connection to a server, in the frames dialect.

Laws:

1. It is told truthfully how far a request got: `sent` from the moment that the kernel has taken its last byte.
2. A connection on which something is unfinished (an interrupt came in between) is never used again.
3. No step outlasts the deadline that it was given.

Theory. A connection is silent between requests, so a server that closed it while it was idle is noticed before
anything is sent: a write that meets a restarted server is then not a write of unknown outcome.
"""

from __future__ import annotations

import bisect
import itertools
import math
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

from ddb import wire
from ddb.calls import CONNECT_TIMEOUT_S

REPLY_BYTES_MAX: Final = 1 << 30


class Link:
    """One blocking connection in the frames dialect, with one request under way at a time."""

    def __init__(self, address: str, deadline_s: float) -> None:
        self.sent = False  # whether the kernel took the whole of the last request
        self.sent_whole = 0  # of several: how many it took the whole of
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
            payloads = self._received()
            if payloads:
                self._idle = len(payloads) == 1 and not self._cutter  # nobody asked for more
                return payloads[0]

    def exchange_many(self, payloads: Sequence[bytes], deadline_s: float, answers: list[bytes]) -> None:
        """Send all `payloads` and append the reply to each to `answers`, in their order. Reads while it writes: a server
        whose replies nobody takes stops reading. Raises OSError; `sent_whole` tells how many went out whole."""
        self.sent = self._idle = False
        self.sent_whole = 0
        frames = [wire.frame(payload) for payload in payloads]
        ends = list(itertools.accumulate(map(len, frames)))
        unsent = memoryview(b"".join(frames))
        self._socket.settimeout(0)
        while len(answers) < len(payloads):
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError("time ran out")
            readable, writable = ready([self._socket], [self._socket] if unsent else [], remaining_s)
            if writable:
                unsent = unsent[self._socket.send(unsent) :]
                self.sent_whole = bisect.bisect_right(ends, ends[-1] - len(unsent))
            if readable:
                answers += self._received()
        self._idle = len(answers) == len(payloads) and not self._cutter
        del answers[len(payloads) :]

    def _received(self) -> list[bytes]:
        """What the next bytes complete."""
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionResetError("it closed the connection")
        payloads = self._cutter.feed(data)
        if self._cutter.error is not None:
            raise ConnectionAbortedError("it does not speak ddb's protocol")
        return payloads

    def abort(self) -> None:
        """End what another thread does on this connection."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was over by itself

    def _arm(self, deadline_s: float) -> None:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("time ran out")
        self._socket.settimeout(remaining_s)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def ready(
    readers: Sequence[socket.socket], writers: Sequence[socket.socket], patience_s: float
) -> tuple[list[socket.socket], list[socket.socket]]:
    """Those of `readers` with something to read (or to fail with), and of `writers` with room, once there is one."""
    if not hasattr(select, "poll"):
        return select.select(readers, writers, [], max(patience_s, 0))[:2]
    wanted: dict[int, int] = {}
    for one in readers:
        wanted[one.fileno()] = select.POLLIN
    for one in writers:
        wanted[one.fileno()] = wanted.get(one.fileno(), 0) | select.POLLOUT
    poll = select.poll()
    for number, events in wanted.items():
        poll.register(number, events)
    happened = dict(poll.poll(max(math.ceil(patience_s * 1000), 0)))
    readable = [one for one in readers if happened.get(one.fileno(), 0) & ~select.POLLOUT]
    return readable, [one for one in writers if happened.get(one.fileno(), 0) & select.POLLOUT]


def reason_of(error: OSError | UnicodeError) -> str:
    """Why, in a few words without the number of the error."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError):
        return (error.strerror or str(error) or type(error).__name__).lower()
    return "no host has such a name"
