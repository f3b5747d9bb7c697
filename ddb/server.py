"""The listener: three dialects on one port, and every request answered in its turn.

Laws:

* Replies leave in the order of the requests, each connection for itself.
* Everything is bounded: a message, the requests in flight and the unsent output of a connection, the number of
  connections, and what all of them hold together. What is at its bound is not read any more, or ends with a
  sentence; it never grows.
* Whatever a client sends, it gets a sentence, and the other connections get their answers.
* A client that shuts down its sending side (`printf … | nc`) still gets every reply.

Theory. The first byte of a connection chooses its dialect (docs/protocol.md), which is two things: a *cutter* that
turns the stream into messages (wire.FrameBuffer, wire.LineBuffer, http.HttpCutter), and a kind of *slot* that turns
a reply into bytes. A slot is one request's place in its connection's queue: the service keeps it and replies when
it can; finished slots at the head of the queue leave together at the turn's end, in one send. That queue is also
the measure of load: when it is full, or when the client does not take its output, the connection is simply not
read, and TCP tells the client to wait.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from selectors import EVENT_READ
from typing import Any, Final, Protocol

from ddb import http
from ddb.errors import BadFrame, DdbError, InvariantError, Overloaded, StartupError
from ddb.loop import LARGE_BYTES, PEER_FRAME_BYTES_MAX, RECV_BYTES, Connection, Fatal, Loop, log_exception
from ddb.slots import HttpSlot, LineSlot, Owner, Slot, internal
from ddb.streams import Stream
from ddb.timers import Timer
from ddb.wire import Cutter, FrameBuffer, LineBuffer, decode, encode, failure, format_address, quoter

__all__ = ["Connection", "Fatal", "Limits", "Loop", "Server", "Service", "Slot", "Timer", "raise_descriptor_limit"]

log = logging.getLogger(__name__)

DIALECTS: Final = b"This port speaks frames (LENGTH LF JSON LF), lines (one JSON object, LF) and HTTP/1.1.\n"
ACCEPTS_A_TURN: Final = 64
ACCEPT_PAUSE_S: Final = 0.25
BACKLOG: Final = 1024
SWEEP_S: Final = 10.0
DRAIN_POLL_S: Final = 0.005
DESCRIPTORS_KEPT: Final = 128  # for the log, the snapshot, and the connections that we dial
LARGE_REPLIES_BYTES_MAX: Final = 64 << 20  # of all connections together, before they are sent in the middle of a turn


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one server; docs/protocol.md names the ones that a client may meet."""

    frame_bytes_max: int = 16 << 20  # a payload, a line, an HTTP body
    peer_frame_bytes_max: int = PEER_FRAME_BYTES_MAX  # the same on a connection between nodes
    in_flight_max: int = 1024  # requests of one connection; over it, the connection is not read
    output_bytes_max: int = 16 << 20  # unsent output of one connection; over it, the connection is not read
    output_bytes_hard_max: int = 256 << 20  # over it, the connection is ended: the client does not read
    held_bytes_max: int = 256 << 20  # unfinished input and stuck output of all connections together
    connections_max: int = 16_384  # over it, the client that was silent longest makes room, if one was
    idle_message_s: float = 30.0  # an unfinished message may stand still for so long, and up to SWEEP_S more


class Service(Protocol):
    """What a server serves."""

    @property
    def routes(self) -> Sequence[http.Route]:
        """The HTTP paths that this service knows."""
        ...

    def request(self, request: dict[str, Any], slot: Slot) -> None:
        """Work on `request`, and reply to `slot` now or later. A DdbError raised here becomes the reply."""
        ...


# ------------------------------------------------------------- connections


class ClientConnection(Owner):
    """An accepted connection, until and unless a node takes it over by setting `on_payload`."""

    __slots__ = (
        "_awaited", "_detour", "_finishing", "_held", "_make_slot", "_output_limit", "_unread",
        "server", "slots", "still",
    )  # fmt: skip

    def __init__(self, server: Server, sock: socket.socket, peer: str) -> None:
        self.server = server
        self.slots: deque[Slot] = deque()
        self.state = None
        self.stream: Stream | None = None
        self._awaited: Slot | None = None  # no other request is looked at before this one has its reply
        self.still = 0  # sweeps since anything moved
        self._unread: list[Any] = []  # messages that wait for room in `slots`; all from one recv
        self._detour = False  # the loop over messages must stop and look up
        self._finishing = False  # no more requests are taken; when the slots are empty, it is over
        self._held = 0  # this connection's part of server.held_bytes
        self._make_slot: type[Slot] = Slot
        self._output_limit = server.limits.output_bytes_max
        super().__init__(server.loop, sock, peer, server.limits.frame_bytes_max)
        self.cutter: Cutter | None = None  # the first byte chooses it

    # -- input

    def receive(self, data: bytes) -> None:
        """See Connection."""
        self.still = 0
        if self._on_payload is not None:
            super().receive(data)
            return
        if self.stream is not None:
            return  # it serves that alone
        cutter = self.cutter
        if cutter is None:
            cutter = self._choose_dialect(data[0])
            if cutter is None:
                return
        self._handle(cutter.feed(data))
        if cutter.error is not None:
            self._refuse_when_read()
        elif self._held or len(cutter):
            self._account()

    def receive_end(self) -> None:
        """See Connection. The requests that came are still answered, and a stream goes on."""
        if self.stream is not None:
            return
        if self._on_payload is not None or self.cutter is None:
            self.end("closed by the other side")
            return
        self._handle(self.cutter.finish())
        self._refuse_when_read()
        self.finish()

    def _choose_dialect(self, first: int) -> Cutter | None:
        limit = self.server.limits.frame_bytes_max
        if 0x31 <= first <= 0x39:
            self.cutter = FrameBuffer(limit)
        elif first == 0x7B:
            self.cutter = LineBuffer(limit)
            self._make_slot = LineSlot
        elif 0x41 <= first <= 0x5A:
            self.cutter = http.HttpCutter(limit)
            self._make_slot = HttpSlot
        else:
            self.send(DIALECTS)
            self.close_when_flushed()
        return self.cutter

    def _handle(self, messages: list[Any]) -> None:
        """Give each message a slot and let the service have it, as far as the limits allow."""
        slots = self.slots
        room = self.server.limits.in_flight_max - len(slots)
        later: list[Any] = []
        if len(messages) > room:
            messages, later = messages[:room], messages[room:]
        request = self.server.service.request
        make_slot = self._make_slot
        rest = iter(messages)
        for message in rest:
            slot = make_slot(self)
            slots.append(slot)
            try:
                if type(slot) is HttpSlot:
                    content = slot.translate(message)
                else:
                    content = decode(message)
                    slot.quote = quoter(message)
                if content is not None:
                    if "id" in content:
                        slot.id = encode(content["id"])
                    request(content, slot)
            except DdbError as error:
                slot.fail(error)
            except (InvariantError, Fatal):
                raise
            except Exception:
                slot.fail(internal())
            if self._detour:
                later = [*rest, *later]
                break
        if self._detour or len(slots) >= self.server.limits.in_flight_max:
            self._look_up(later)

    def _look_up(self, later: list[Any]) -> None:
        """Something but plain requests and replies has happened; `later` holds the messages not handled yet."""
        self._detour = False
        if self.sock is None or self._finishing:
            return
        if self._on_payload is not None:
            self._become_peer(later)
            return
        self._unread = later
        self._paused = True
        self.watch()
        self.mark_dirty()

    def taken_over(self) -> None:
        """See Connection: a node's hello is being handled."""
        self._detour = True

    def _become_peer(self, payloads: list[bytes]) -> None:
        """From here on payloads are the node's own, and may be longer."""
        cutter = self.cutter
        if not isinstance(cutter, FrameBuffer):
            self.end("nodes speak to one another in frames")
            return
        cutter.raise_limit(self.server.limits.peer_frame_bytes_max)
        for payload in [*payloads, *cutter.feed(b"")]:
            if self._on_payload is not None:
                self._on_payload(payload)

    def _resume(self) -> None:
        """There is room again: handle what waits, then read on. Posted, but what fails is this connection's own."""
        if self._has_room() and self._paused and not self._finishing and self.sock is not None:
            self._paused = False
            unread, self._unread = self._unread, []
            if self.stream is not None:
                self.cutter = None
                self.watch()
                return
            try:
                self._handle(unread)
            except (InvariantError, Fatal):
                raise
            except Exception:
                log_exception("%s is ended after a failure in its handler", self)
                self.on_broken()
            self._refuse_when_read()
            self.watch()

    def _has_room(self) -> bool:
        return (
            not self._awaits
            and len(self.slots) <= self.server.limits.in_flight_max // 2
            and self.output_bytes <= self.server.limits.output_bytes_max // 2
        )

    @property
    def _awaits(self) -> bool:
        return self._awaited is not None and self._awaited.out is None

    def await_reply(self, slot: Slot) -> None:
        """See Owner."""
        self._awaited = slot
        self._detour = True

    @property
    def takes_more(self) -> bool:
        """See Owner."""
        return self.output_bytes <= self.server.limits.output_bytes_max

    @property
    def routes(self) -> Sequence[http.Route]:
        """See Owner."""
        return self.server.service.routes

    def date(self) -> str:
        """See Owner."""
        return self.server.date()

    # -- output

    def slot_done(self, out_bytes: int) -> None:
        """A slot of this connection has its reply, of `out_bytes`."""
        if self.sock is None:
            return
        self.output_bytes += out_bytes
        if not self._dirty:
            self._dirty = True
            self.loop.dirty.append(self)
        if self.output_bytes > self._output_limit:
            self._detour = True
            if self.output_bytes > self.server.limits.output_bytes_hard_max:
                self.end("does not read its replies")
        if out_bytes > LARGE_BYTES:
            self.server.large_reply(out_bytes)

    def send(self, data: bytes) -> None:
        """See Connection. Finished replies go first."""
        self._collect()
        super().send(data)

    def flush(self) -> None:
        """See Connection."""
        self._collect()
        if self._finishing and not self.slots and self.stream is None:
            self._closing = True
        waiting = self.output_bytes
        super().flush()
        if self.output_bytes < waiting or not waiting:
            self.still = 0
        if self._paused and not self._finishing and self._has_room():
            self.loop.post(self._resume)
        if self.stream is not None and self.stream.is_ready:
            self.loop.post(self.stream.told_of_room)
        if self._blocked or self._held:
            self._account()

    def _collect(self) -> None:
        """Move the finished replies at the head of the queue to the output."""
        slots = self.slots
        while slots:
            out = slots[0].out
            if out is None:
                return
            slots.popleft()
            if isinstance(out, bytes):
                self._out.append(out)
            else:
                self._out += out

    # -- the bounds, and the end

    def _account(self) -> None:
        """Keep the server's sum of what connections hold; who makes it overflow, and holds much, is ended."""
        if self._on_payload is not None or self.sock is None:
            return
        server = self.server
        held = (0 if self.cutter is None else len(self.cutter)) + (self.output_bytes if self._blocked else 0)
        server.held_bytes += held - self._held
        self._held = held
        overflowing = server.held_bytes > server.limits.held_bytes_max
        if overflowing and not server.end_the_deaf() and held > RECV_BYTES and not self._finishing:
            self._refuse(Overloaded("Too much unfinished input waits here; send it again later."))

    @property
    def unread_bytes(self) -> int:
        """How much the client leaves unread: what the kernel does not take."""
        return self.output_bytes if self._blocked and self._on_payload is None else 0

    @property
    def silence(self) -> int:
        """For how many sweeps a client has been silent that is owed nothing; 0 for a node's connection."""
        return 0 if self.slots or self.stream is not None or self._on_payload is not None else self.still

    def sweep(self, patience: int) -> None:
        """End what has stood still in the middle of something for `patience` sweeps."""
        self.still += 1
        if self.still <= patience:
            return
        if self._closing or self.unread_bytes:
            self.end("does not read its replies")
        elif self.cutter is not None and len(self.cutter) and not self._paused and self._on_payload is None:
            self._refuse(BadFrame("The rest of the message did not come in time."))

    def _refuse_when_read(self) -> None:
        """What can't be cut is told of after the messages before it, some of which may have to wait."""
        if self.cutter is not None and self.cutter.error is not None and not self._unread and not self._awaits:
            self._refuse(self.cutter.error)

    def _refuse(self, error: DdbError) -> None:
        """Nothing more can be understood: answer `error` after what is in flight, and close."""
        if self._on_payload is not None:
            self.end(f"sent something that is no frame: {error.message}")
        elif not self._finishing and self.stream is None and self.sock is not None:
            slot = self._make_slot(self)
            self.slots.append(slot)
            slot.fail(error)
            self.finish()

    def finish(self) -> None:
        """Take no more requests, and end the connection when the last one is answered."""
        self._finishing = self._detour = self._paused = True
        self.watch()
        self.mark_dirty()

    def end(self, reason: str) -> None:
        """See Connection."""
        if not self.reason:
            self.server.forget(self, self._held)
            self._held = 0
            self._detour = True
            for slot in self.slots:
                slot.out = slot.out or b""  # nobody is there to answer, so let nobody prepare an answer
            self.slots.clear()
            self._unread = []
        super().end(reason)


# ------------------------------------------------------------------ server


class Server:
    """A listener on the loop, and the connections that it accepted."""

    def __init__(self, loop: Loop, service: Service, host: str, port: int, limits: Limits | None = None) -> None:
        """Listen on `host` and `port` (0: any free one; see `address`). Raises StartupError."""
        self.loop = loop
        self.service = service
        self.limits = limits or Limits()
        self.connections: set[ClientConnection] = set()
        self._connections_max = _connections_max(self.limits.connections_max)
        self.held_bytes = 0
        self._large_bytes = 0  # of large replies since they were last sent in the middle of a turn
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._date = (0, "")
        self._listening = False
        self._closed = False
        self._crowded = False  # no connection can make room for another
        self._sock = _listener(host, port)
        self.address: tuple[str, int] = self._sock.getsockname()[:2]
        self._listen()
        self._sweeper = loop.every(SWEEP_S, self._sweep)

    def __repr__(self) -> str:
        return f"listener at {format_address(*self.address)}"

    # -- accepting

    def _listen(self) -> None:
        if not self._listening and not self._closed:
            self._listening = True
            self.loop.watch(self._sock, 0, EVENT_READ, self)

    def _pause(self) -> None:
        if self._listening:
            self._listening = False
            self.loop.watch(self._sock, EVENT_READ, 0, self)

    def on_events(self, mask: int) -> None:
        """See loop.Watched: clients wait to be accepted."""
        for _ in range(ACCEPTS_A_TURN):
            if not self._listening:
                return
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._out_of_descriptors(error)
                    return
                continue  # the client was gone before it was accepted
            self._accept(sock, format_address(*address[:2]))

    def _accept(self, sock: socket.socket, peer: str) -> None:
        try:
            if len(self.connections) < self._connections_max or self._make_room():
                self.connections.add(ClientConnection(self, sock, peer))
                return
            sock.setblocking(False)
            sock.send(
                failure(Overloaded("Too many connections are open here; try again later, or another node.")) + b"\n"
            )
        except OSError as error:
            log.info("the connection with %s could not be served: %s", peer, error)
        sock.close()

    def _make_room(self) -> bool:
        """End the client's connection that has been silent longest, if one was for a whole sweep: else a program that
        forgets its connections would lock out everybody, the other nodes included."""
        if self._crowded:
            return False
        silent = max(self.connections, key=lambda connection: connection.silence, default=None)
        if silent is None or not silent.silence:
            self._crowded = True  # until the next sweep; looking again for each client would cost too much
            return False
        silent.end("made room for another")
        return True

    def _out_of_descriptors(self, error: OSError) -> None:
        """Nothing can be accepted, and the selector would report the waiting client for ever: give the spare
        descriptor to turn that one away, and look again in a while."""
        log.warning("no connection can be accepted for now: %s; raise `ulimit -n`", error.strerror)
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        with contextlib.suppress(OSError):
            self._sock.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._pause()
        self.loop.call_later(ACCEPT_PAUSE_S, self._listen)

    def on_broken(self) -> None:
        """See loop.Watched: go on listening, it concerns one client."""

    # -- what connections need

    def date(self) -> str:
        """The time of day as HTTP writes it."""
        now_s = int(time.time())
        if self._date[0] != now_s:
            self._date = (now_s, formatdate(now_s, usegmt=True))
        return self._date[1]

    def forget(self, connection: ClientConnection, held_bytes: int) -> None:
        """`connection` is over; it held `held_bytes`."""
        self.connections.discard(connection)
        self.held_bytes -= held_bytes

    def large_reply(self, out_bytes: int) -> None:
        """A reply of `out_bytes` waits for the turn's end. When all of them are many bytes, send them now: it shows
        who reads them and who doesn't."""
        self._large_bytes += out_bytes
        if self._large_bytes > LARGE_REPLIES_BYTES_MAX:
            self._large_bytes = 0
            self.loop.flush()

    def end_the_deaf(self) -> bool:
        """Too much is held here: end the connection that leaves most of its replies unread. Whether there was one."""
        deaf = max(self.connections, key=lambda connection: connection.unread_bytes, default=None)
        if deaf is None or deaf.unread_bytes <= RECV_BYTES:
            return False
        deaf.end("does not read its replies")
        return True

    def _sweep(self) -> None:
        self._crowded = False
        patience = int(self.limits.idle_message_s / SWEEP_S)
        for connection in list(self.connections):
            connection.sweep(patience)

    # -- the end

    def stop_accepting(self) -> None:
        """Close the listener. Connections that are open go on."""
        if not self._closed:
            self._pause()
            self._closed = True
            self._sock.close()

    @property
    def idle(self) -> bool:
        """Whether every request that came has its reply, and every reply is sent."""
        return not any((c.slots or c.output_bytes) and c.on_payload is None for c in self.connections)

    def drain(self, done: Callable[[], None], timeout_s: float) -> None:
        """Stop accepting, and call `done` once the server is idle, or after `timeout_s` seconds."""
        self.stop_accepting()
        deadline_s = time.monotonic() + timeout_s

        def look() -> None:
            if self.idle or time.monotonic() >= deadline_s:
                timer.cancel()
                done()

        timer = self.loop.every(DRAIN_POLL_S, look)

    def close(self) -> None:
        """End the listener and all connections. May be called twice."""
        self.stop_accepting()
        self._sweeper.cancel()
        for connection in list(self.connections):
            connection.close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None


def raise_descriptor_limit() -> None:
    """Let this process open as many connections as the system allows it to."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on every system

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _connections_max(wanted: int) -> int:
    """As many as `wanted`, but leaving descriptors to the rest of the process: a log that can't open its next segment
    would end it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on every system

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit != resource.RLIM_INFINITY:
            return min(wanted, max(limit - DESCRIPTORS_KEPT, limit // 2))
    return wanted


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartupError with a sentence."""
    sock = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] takes IPv4 too
        sock.bind(address)
        sock.listen(BACKLOG)
        return sock
    except (OSError, UnicodeError, OverflowError) as error:
        if sock is not None:
            sock.close()
        raise StartupError(_why_not(error, format_address(host, port))) from None


def _why_not(error: Exception, address: str) -> str:
    """Why nothing can listen at `address`, and what to do."""
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"{address} is in use; stop the program that listens there, or choose another port (0: any free one)."
    if number == errno.EACCES:
        return f"Listening at {address} is not allowed; choose a port of 1024 or above."
    if number == errno.EADDRNOTAVAIL or isinstance(error, (socket.gaierror, UnicodeError)):
        return f"{address} is no address of this machine; give a host that is, like 127.0.0.1."
    return f"Nothing can listen at {address}: {getattr(error, 'strerror', None) or error}."
