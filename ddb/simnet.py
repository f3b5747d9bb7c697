"""The simulated network: connections that are slow, break, lose and repeat, between simulated hosts.

Laws: bytes of one connection arrive in their order, or not at all, as with TCP; a connection that breaks is noticed by whom
TCP would tell, and when. Only where a fault says so are single messages of the consensus lost, repeated or
reordered: that is more than TCP allows, and Raft has to bear it (§5.1).

Theory. A *link* is a directed pair of hosts. While it is blocked, what is sent over it is held back, as TCP would
send it again and again; after `PEER_TIMEOUT_S` without an acknowledgement the connection breaks on the sender's
side, and on that side alone: the other one is told, by a reset, only if it sends something. A killed process leaves a kernel
that says goodbye for it; a host without power says nothing, and answers with a reset only when it is back.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ddb import wire
from ddb.agenda import Actor, Agenda
from ddb.errors import DdbError
from ddb.http import Route
from ddb.loop import PEER_FRAME_BYTES_MAX, PEER_TIMEOUT_S
from ddb.server import Service, Slot
from ddb.streams import Stream

LATENCY_S: Final = 0.0004
RETRANSMISSION_S: Final = 0.4  # at most, until TCP tries again on a link that was mended
OUTPUT_BYTES_MAX: Final = 1 << 20
_CHAT: Final = tuple(
    b'{"m":"%b"' % kind
    for kind in (
        b"append", b"append_reply", b"vote", b"vote_reply", b"election", b"election_reply",
        b"timeout_now", b"read", b"read_reply", b"install", b"install_reply", b"install_request",
    )
)  # fmt: skip


class Endpoint(Actor, Protocol):
    """A host, as the network sees it."""

    name: str
    down: bool  # without power, or just losing it
    dirty: list[Connection]
    listener: Listener | None
    ends: dict[int, Connection]

    def effect(self, what: str) -> None:
        """Something is about to leave this host."""

    def post(self, fn: Callable[..., None], *args: Any) -> None:
        """Have `fn(*args)` called in this host's turn."""


@dataclass(slots=True)
class Chances:
    """How likely a message of the consensus is lost, repeated, or overtaken by others."""

    loss: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0


class Network:
    """All links. `on_fault(kind)` is told what chance has done to a message or a connection."""

    def __init__(self, agenda: Agenda, rng: random.Random, on_fault: Callable[[str], None]) -> None:
        self.agenda = agenda
        self.hosts: dict[str, Endpoint] = {}
        self.chances = Chances()
        self.slow: dict[tuple[str, str], float] = {}  # link -> seconds more
        self._blocked: Counter[tuple[str, str]] = Counter()
        self._rng = rng
        self._on_fault = on_fault
        self._numbers = 0
        self._orphans: list[Connection] = []  # over, but for what a blocked link holds back

    # -- faults

    def block(self, links: Sequence[tuple[str, str]]) -> None:
        """Let nothing through over `links`, until `unblock` of the same."""
        self._blocked.update(links)

    def unblock(self, links: Sequence[tuple[str, str]]) -> None:
        """Undo one `block`; what was held back arrives a little later."""
        self._blocked.subtract(links)
        self._blocked += Counter()
        for src, dst in links:
            if (src, dst) not in self._blocked:
                self._orphans = [end for end in self._orphans if end.held]
                for end in [*self.hosts[src].ends.values(), *self.hosts[dst].ends.values(), *self._orphans]:
                    if end.waiting_since is not None and {end.host.name, end.far.host.name} == {src, dst}:
                        self._send_again(end)

    def passes(self, src: str, dst: str) -> bool:
        """Whether the link lets anything through now."""
        return (src, dst) not in self._blocked

    def reset(self, src: str, dst: str) -> int:
        """Break every connection that `src` has dialled to `dst`; returns how many."""
        found = [end for end in self.hosts[src].ends.values() if end.far.host.name == dst and end.dialled]
        for end in found:
            end.far.host.post(end.far.end, "Connection reset by peer")
            end.host.post(end.end, "Connection reset by peer")
        return len(found)

    def orphan(self, end: Connection) -> None:
        """Its program has gone; the kernel goes on trying to send what is left."""
        if end.held:
            self._orphans.append(end)

    def power_lost(self, host: Endpoint) -> None:
        """What the kernel of `host` still had to send is lost with it."""
        for end in self._orphans:
            if end.host is host:
                end.lost = True
                end.held.clear()

    # -- connections

    def number(self) -> int:
        """The next connection's."""
        self._numbers += 1
        return self._numbers

    def latency_s(self, src: str, dst: str) -> float:
        """How long something takes over the link now."""
        return LATENCY_S * (0.5 + self._rng.random()) + (self.slow.get((src, dst), 0.0) if self.slow else 0.0)

    def dial(self, near: Connection, address: tuple[str, int], on_open: Callable[[], None], timeout_s: float) -> None:
        """Connect `near` with whoever listens at `address`."""
        name = address[0]
        target = self.hosts.get(name)
        src = near.host.name
        if target is None or target.down or not (self.passes(src, name) and self.passes(name, src)):
            self.agenda.after(timeout_s, near.host, near.end, "no answer in time")
            return
        delay_s = self.latency_s(src, name) + self.latency_s(name, src)
        if target.listener is None:
            self.agenda.after(delay_s, near.host, near.end, "Connection refused")
            return
        far = target.listener.open(self)
        near.far, far.far = far, near
        near.host.ends[near.number] = near
        target.ends[far.number] = far
        self.agenda.after(delay_s, near.host, near.opened, on_open)

    def transmit(self, end: Connection, pieces: list[bytes], fin: bool) -> None:
        """Send `pieces`, and with `fin` the connection's end, to the other side."""
        if end.lost:
            return
        src, far = end.host.name, end.far
        dst = far.host.name
        if self._blocked:
            if (src, dst) in self._blocked:
                end.held.append((pieces, fin))
                self._expect_answer(end)
                return
            if (dst, src) in self._blocked:
                self._expect_answer(end)
        if far.lost:
            if far.host.down:
                end.held.append((pieces, fin))
                self._expect_answer(end)
            else:
                self.agenda.after(2 * LATENCY_S, end.host, end.end, "Connection reset by peer")
            return
        if end.held:
            end.held.append((pieces, fin))  # behind what TCP has yet to send again
            return
        self._carry(end, pieces, fin, self.latency_s(src, dst))

    def _carry(self, end: Connection, pieces: list[bytes], fin: bool, delay_s: float) -> None:
        due = end.due = max(self.agenda.now + delay_s, end.due)
        if self.chances.loss or self.chances.repeat or self.chances.reorder:
            pieces = self._by_chance(end, pieces)
        if pieces:
            self.agenda.at(due, end.far.host, end.far.arrive, pieces)
        if fin:
            self.agenda.at(due, end.far.host, end.far.end, "closed by the other side")

    def _by_chance(self, end: Connection, pieces: list[bytes]) -> list[bytes]:
        """What is left of `pieces` when consensus messages get lost, come twice, or are late: never before what was sent
        earlier, which may be their sender's introduction."""
        kept: list[bytes] = []
        chances, rng = self.chances, self._rng
        for piece in pieces:
            if not piece[piece.find(b"\n") + 1 :].startswith(_CHAT):
                kept.append(piece)
                continue
            if rng.random() < chances.loss:
                self._on_fault("message lost")
                continue
            if rng.random() < chances.repeat:
                self._on_fault("message repeated")
                self.agenda.at(end.due + rng.random() * 0.2, end.far.host, end.far.arrive, [piece])
            if rng.random() < chances.reorder:
                self._on_fault("message overtaken")
                self.agenda.at(end.due + rng.random() * 0.1, end.far.host, end.far.arrive, [piece])
            else:
                kept.append(piece)
        return kept

    def _send_again(self, end: Connection) -> None:
        """A link is mended: TCP notices at its next attempt."""
        self.agenda.after(self._rng.random() * RETRANSMISSION_S, None, self._release, end)

    def _release(self, end: Connection) -> None:
        src, far = end.host.name, end.far
        dst = far.host.name
        if not self.passes(src, dst) or (far.lost and far.host.down):
            return
        held, end.held = end.held, []
        if far.lost:
            end.host.post(end.end, "Connection reset by peer")
            return
        if self.passes(dst, src):
            end.waiting_since = None
        for pieces, fin in held:
            self._carry(end, pieces, fin, LATENCY_S)

    def _expect_answer(self, end: Connection) -> None:
        if end.waiting_since is None:
            end.waiting_since = self.agenda.now
            self.agenda.after(PEER_TIMEOUT_S, None, self._give_up, end, end.waiting_since)

    def _give_up(self, end: Connection, since: float) -> None:
        """An acknowledgement is overdue, unless one has come since."""
        if end.waiting_since == since:
            end.waiting_since = None
            end.held.clear()
            end.lost = True
            if not end.reason:
                self._on_fault("connection timed out")
                end.host.post(end.end, "Connection timed out")

    def failed(self, error: Exception) -> None:
        """A connection's handler has raised `error`, which ends the connection."""
        self._on_fault(f"a handler failed: {type(error).__name__}")

    def power_returned(self, host: Endpoint, ghosts: Sequence[Connection]) -> None:
        """`host` is back, and knows nothing of the connections it had: who still sends on them is told so."""
        for ghost in ghosts:
            if ghost.far.held:
                self._send_again(ghost.far)


class Connection:
    """One side of a connection: a reactor.Channel. Made by `Host.connect`, or by a listener."""

    __slots__ = (
        "_on_payload", "_out", "closed", "cutter", "dialled", "due", "established", "far", "held", "host", "lost", "network",
        "number", "on_close", "output_bytes", "reason", "sock", "waiting_since",
    )  # fmt: skip

    def __init__(self, network: Network, host: Endpoint, dialled: bool) -> None:
        self.network = network
        self.host = host
        self.number = network.number()
        self.dialled = dialled
        self.established = not dialled
        self.far: Connection = self
        self.cutter = wire.FrameBuffer(PEER_FRAME_BYTES_MAX)
        self.on_close: Callable[[], None] | None = None
        self.output_bytes = 0
        self.reason = ""
        self.sock: object | None = network  # None after the end, as a slot sees it
        self.closed = False  # asked to close, or over
        self.lost = False  # this side has lost its power, or has given up: it sends no more, and knows nothing of it
        self.held: list[tuple[list[bytes], bool]] = []
        self.waiting_since: float | None = None  # for an acknowledgement
        self.due = 0.0  # when the last of what was sent arrives
        self._out: list[bytes] = []
        self._on_payload: Callable[[bytes], None] | None = None

    def __repr__(self) -> str:
        return f"connection of {self.host.name} with {self.far.host.name}"

    @property
    def garbled(self) -> bool:
        """See Channel."""
        return self.cutter.error is not None

    @property
    def on_payload(self) -> Callable[[bytes], None] | None:
        """See Channel."""
        return self._on_payload

    @on_payload.setter
    def on_payload(self, handler: Callable[[bytes], None] | None) -> None:
        self._on_payload = handler

    def opened(self, on_open: Callable[[], None]) -> None:
        """The other side has answered."""
        self.established = True
        if self.closed:
            self.end("closed here")
            return
        if self._out:
            self.host.dirty.append(self)
        on_open()

    def send(self, data: bytes) -> None:
        """See Channel."""
        if not self.closed:
            if not self._out:
                self.host.dirty.append(self)
            self._out.append(data)
            self.output_bytes += len(data)

    def flush(self) -> None:
        """Hand what waits to the network. The host calls this at the end of its turn."""
        if not self.established or (not self._out and not self.closed) or self.reason:
            return
        self.host.effect("send")
        out, self._out = self._out, []
        self.output_bytes = 0
        self.network.transmit(self, out, self.closed)
        if self.closed:
            self._over("closed here")

    def arrive(self, pieces: list[bytes]) -> None:
        """Bytes have come."""
        if self.closed:
            return
        for piece in pieces:
            for payload in self.cutter.feed(piece):
                if self.sock is None:
                    return
                try:
                    self.take(payload)
                except (DdbError, OSError) as error:
                    self.network.failed(error)
                    self.end("failed here")
            if self.cutter.error is not None:
                self.end("sent something that is no frame")

    def take(self, payload: bytes) -> None:
        """A frame's payload has come."""
        if self._on_payload is not None:
            self._on_payload(payload)

    def close(self) -> None:
        """See Channel."""
        self.end("closed here")

    def close_when_flushed(self) -> None:
        """See Channel."""
        if not self.closed:
            self.closed = True
            if not self._out:
                self.host.dirty.append(self)

    def end(self, reason: str) -> None:
        """See Channel."""
        if not self.reason:
            if self.far is not self and not self.lost and not self.host.down:
                self.network.transmit(self, [], True)
            self._over(reason)

    def forsake(self, power: bool) -> None:
        """Its program is dead, or with `power` its whole host: nobody is here any more, and nobody is called."""
        self.on_close = None
        if power:
            self.lost = True
            self.held.clear()
        self.end("lost")

    def _over(self, reason: str) -> None:
        self.reason = reason
        self.closed = True
        self.sock = None
        self.output_bytes = 0
        self._out.clear()
        self._on_payload = None
        self.host.ends.pop(self.number, None)
        self.network.orphan(self)
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            self.host.post(on_close)


class ServedConnection(Connection):
    """A connection that was accepted: its frames are requests, until a node takes it over."""

    __slots__ = ("service", "slots", "state", "stream")

    def __init__(self, network: Network, host: Endpoint, service: Service) -> None:
        super().__init__(network, host, dialled=False)
        self.service = service
        self.slots: deque[Slot] = deque()
        self.state: Any = None
        self.stream: Stream | None = None

    def take(self, payload: bytes) -> None:
        """See Connection."""
        if self._on_payload is not None:
            self._on_payload(payload)
            return
        if self.stream is not None:
            return  # it serves that alone
        slot = Slot(self)  # type: ignore[arg-type]
        self.slots.append(slot)
        try:
            self.service.request(wire.decode(payload), slot)
        except DdbError as error:
            slot.fail(error)

    @property
    def takes_more(self) -> bool:
        """See slots.Owner."""
        return self.output_bytes <= OUTPUT_BYTES_MAX

    @property
    def routes(self) -> Sequence[Route]:
        """See slots.Owner."""
        return self.service.routes

    def slot_done(self, out_bytes: int) -> None:
        """See slots.Owner."""
        if self.sock is not None:
            self.output_bytes += out_bytes
            self.host.dirty.append(self)

    def send(self, data: bytes) -> None:
        """See Connection. Finished replies go first."""
        self._collect()
        super().send(data)

    def flush(self) -> None:
        """See Connection: replies leave in the order of the requests."""
        self._collect()
        super().flush()
        if self.stream is not None and self.stream.is_ready:
            self.host.post(self.stream.told_of_room)

    def mark_dirty(self) -> None:
        """See streams.Carrier."""
        self.host.dirty.append(self)

    def await_reply(self, slot: Slot) -> None:
        """See slots.Owner. Simulated clients ask nothing behind it."""

    def _collect(self) -> None:
        """Move the finished replies at the head of the queue to the output."""
        slots = self.slots
        while slots and slots[0].out is not None:
            out = slots.popleft().out
            if out is not None:
                self._out.append(out if isinstance(out, bytes) else b"".join(out))

    def _over(self, reason: str) -> None:
        for slot in self.slots:
            slot.out = slot.out or b""  # nobody is there to answer
        self.slots.clear()
        super()._over(reason)


class Listener:
    """The port of a host. A reactor.Listener."""

    def __init__(self, host: Endpoint, service: Service, address: tuple[str, int]) -> None:
        self.address = address
        self._host = host
        self._service = service
        host.listener = self

    def open(self, network: Network) -> ServedConnection:
        """A connection with whoever has dialled."""
        return ServedConnection(network, self._host, self._service)

    def stop_accepting(self) -> None:
        """See world.Listener."""
        if self._host.listener is self:
            self._host.listener = None

    def close(self) -> None:
        """See world.Listener."""
        self.stop_accepting()
