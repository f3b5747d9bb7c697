"""A reply that goes on: what a connection becomes when its request is answered by event after event.

Laws: a stream never holds more output than its bound and what it is given at once; who has more to say waits until it is
asked for. An event is encoded once, and dressed once for each dialect that somebody reads it in; the bytes are shared by all
who get it.

Theory. A slot that is *opened* instead of replied to makes its connection a stream (slots.py). It begins when all replies
before it have left. From then on the connection serves it alone: what the client still sends is not looked at, and a client
that shuts down its sending side goes on reading (`echo … | nc`). One that has gone looks the same at
first; it is noticed when what is sent comes back, at the second sign of life at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

STREAM_BYTES_MAX: Final = 1 << 20  # of output that waits; over it, nothing is added
JOINED_BYTES_MAX: Final = 1 << 14  # small events that go together are copied once, rather than handed on one by one


@dataclass(frozen=True, slots=True)
class Dress:
    """How an event looks in a dialect. `show(event, last)` makes it; `last` says that it is the last one of its revision."""

    name: str
    show: Callable[[Event, bool], bytes]


class Event:
    """One event: its JSON in `body`, the `kind` that it says, and the revision `rev` that it is of, or None."""

    __slots__ = ("_dressed", "body", "kind", "rev")

    def __init__(self, kind: bytes, body: bytes, rev: int | None) -> None:
        self.kind = kind
        self.body = body
        self.rev = rev
        self._dressed: dict[tuple[str, bool], bytes] = {}

    def dressed(self, dress: Dress, last: bool) -> bytes:
        """The event as `dress` shows it, made once."""
        out = self._dressed.get((dress.name, last))
        if out is None:
            out = self._dressed[dress.name, last] = dress.show(self, last)
        return out


def as_frame(event: Event, last: bool) -> bytes:
    """As a frame."""
    return b"%d\n%b\n" % (len(event.body), event.body)


def as_line(event: Event, last: bool) -> bytes:
    """As a line."""
    return event.body + b"\n"


def as_sse(event: Event, last: bool) -> bytes:
    """As a server-sent event (HTML Living Standard §9.2). Who resumes behind an `id` has had all events of that revision, so
    only the last of them carries it."""
    id = b"id: %d\n" % event.rev if last and event.rev is not None else b""
    return b"event: %b\n%bdata: %b\n\n" % (event.kind, id, event.body)


FRAMES: Final = Dress("frames", as_frame)
LINES: Final = Dress("lines", as_line)
SSE: Final = Dress("server-sent events", as_sse)


class Carrier(Protocol):
    """A connection, as its stream sees it."""

    sock: Any
    slots: Any
    output_bytes: int

    def send(self, data: bytes) -> None:
        """Send `data` at the end of this turn."""

    def mark_dirty(self) -> None:
        """Have it flushed at the end of this turn."""

    def close_when_flushed(self) -> None:
        """End it once all has been sent."""


class Stream:
    """One connection's events. `on_room` is called, once for each `want_room`, when there is room."""

    __slots__ = ("_connection", "_dress", "on_room", "wants_room")

    def __init__(self, connection: Carrier, dress: Dress) -> None:
        self.on_room: Callable[[], None] = lambda: None
        self.wants_room = False
        self._connection = connection
        self._dress = dress

    @property
    def has_room(self) -> bool:
        """Whether something may be sent now: everything before it has left, and little waits."""
        connection = self._connection
        return not connection.slots and connection.output_bytes <= STREAM_BYTES_MAX

    @property
    def is_ready(self) -> bool:
        """Whether `on_room` is due: asked for, and possible, with some way to go before it has to be asked for again."""
        connection = self._connection
        return self.wants_room and not connection.slots and connection.output_bytes <= STREAM_BYTES_MAX // 2

    def want_room(self) -> None:
        """Have `on_room` called when there is room; in the next turn at the soonest, so that others get theirs."""
        self.wants_room = True
        self._connection.mark_dirty()

    def told_of_room(self) -> None:
        """There is room. The connection has this called, not from within its own work."""
        if self.wants_room and self._connection.sock is not None:
            self.wants_room = False
            self.on_room()

    def send(self, events: Sequence[Event]) -> None:
        """Send `events`, in order, of which none is of a revision that goes on behind them."""
        dress, connection = self._dress, self._connection
        following = len(events)
        pieces = []
        for number, event in enumerate(events, 1):
            last = number == following or events[number].rev != event.rev
            pieces.append(event.dressed(dress, last))
        if len(pieces) > 1 and sum(map(len, pieces)) <= JOINED_BYTES_MAX:
            connection.send(b"".join(pieces))
            return
        for piece in pieces:
            connection.send(piece)

    def close(self) -> None:
        """End it, once all that was sent has left."""
        self._connection.close_when_flushed()
