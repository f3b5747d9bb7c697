"""The connections between members.

Laws:

* Each member dials every other, and speaks only on the connections that it dialled; on those it accepted it only
  listens. So there is no question of who keeps which connection, and one direction can fail without the other.
* A message that can't leave now is dropped: consensus repeats what matters (raft.py).
* A connection that closes is news: its process may be dead. It is told at once, whichever of the two closed.

Theory. The dialler's first frame introduces it: who it is, whom it expects, of which cluster. The other side
listens, or answers with a failure and closes: another cluster, a removed member, a wrong address. A node that has
no cluster yet says so, and thereby asks to be taken in. What follows are the messages of codec.py, a frame each. The introduction also carries the dialler's own address, so
members that have moved find each other even where the registry is down.
"""

from __future__ import annotations

import logging
from typing import Any, Final, Protocol

from ddb import codec, wire
from ddb.errors import BadRequest, DdbError
from ddb.membership import Sighting
from ddb.messages import Append, Message
from ddb.reactor import Channel, Reactor

log = logging.getLogger(__name__)

REDIAL_S: Final = (0.02, 0.05, 0.1, 0.2)  # the last is repeated
OUTPUT_BYTES_MAX: Final = 128 << 20


class Host(Protocol):
    """What the connections need of their node."""

    def introduction(self, to: str) -> dict[str, Any]:
        """The first frame for the member `to`."""

    def received(self, message: Message) -> None:
        """A member sent `message`."""

    def connected(self, peer: str) -> None:
        """Messages to `peer` leave from now on."""

    def disconnected(self, peer: str) -> None:
        """A connection with `peer` broke."""

    def greeted(self, peer: str) -> None:
        """`peer` has introduced itself; it may be a stranger."""

    def refused(self, peer: str, code: str, message: str) -> None:
        """`peer` will not talk to us, for this reason."""


class Peers:
    """All connections of one node with the others. `bind_host`: the address that outgoing ones come from."""

    def __init__(self, loop: Reactor, host: Host, own_id: str, bind_host: str | None) -> None:
        self._loop = loop
        self._host = host
        self._own_id = own_id
        self._bind_host = bind_host
        self._links: dict[str, _Link] = {}
        self._addresses: dict[str, str] = {}
        self._inbound: dict[str, tuple[Channel, Sighting]] = {}
        self._encoded: tuple[Any, bytes] = (None, b"")
        self._closed = False

    def sighted(self, sighting: Sighting) -> None:
        """`sighting.id` is, from now on, to be found at `sighting.address`."""
        if self._addresses.get(sighting.id) != sighting.address:
            self._addresses[sighting.id] = sighting.address
            if link := self._links.get(sighting.id):
                link.move(sighting.address)

    def sighted_if_unknown(self, sighting: Sighting) -> None:
        """The same, where nothing newer is known: the log's configuration may be older than the registry's news."""
        if sighting.id not in self._addresses:
            self.sighted(sighting)

    def address(self, id: str) -> str | None:
        """Where the member `id` was last seen."""
        return self._addresses.get(id)

    def introduced(self) -> dict[str, Sighting]:
        """Those that talk to us now, by id: members, and nodes that would like to be."""
        return {id: sighting for id, (_, sighting) in self._inbound.items()}

    def keep(self, ids: set[str]) -> None:
        """Hold connections to exactly these members, as far as their addresses are known."""
        if self._closed:
            return
        for gone in sorted(self._links.keys() - ids):
            self._links.pop(gone).close()
        for new in sorted((ids & self._addresses.keys()) - self._links.keys() - {self._own_id}):
            self._links[new] = _Link(self, new, self._addresses[new])

    def send(self, message: Message) -> None:
        """Send `message` to its `dst`, or drop it where no connection stands."""
        link = self._links.get(message.dst)
        if link is None or not link.open or link.connection.output_bytes > OUTPUT_BYTES_MAX:
            return
        link.connection.send(wire.frame(self._encode(message)))

    def _encode(self, message: Message) -> bytes:
        if type(message) is not Append:
            return codec.encode_message(message)
        # Followers that stand at the same index get the same bytes: with two of them, half the encoding.
        m = message
        same = (m.term, m.prev_index, m.commit, m.round, m.batches, m.digest, m.confirmed)
        if self._encoded[0] != same:
            self._encoded = (same, codec.encode_message(m))
        return self._encoded[1]

    def accept(self, connection: Channel, sighting: Sighting) -> None:
        """Listen to the member that has introduced itself on `connection`."""
        peer = sighting.id
        self.sighted(sighting)
        old, self._inbound[peer] = self._inbound.get(peer), (connection, sighting)
        connection.on_payload = lambda payload: self._take(peer, connection, payload)
        connection.on_close = lambda: self._inbound_closed(peer, connection)
        if old is not None:
            old[0].close()
        self._host.greeted(peer)
        if link := self._links.get(peer):
            link.hurry()

    def refuse(self, id: str, error: DdbError) -> None:
        """Listen to the member `id` no more, and tell it why."""
        if found := self._inbound.get(id):
            found[0].send(wire.frame(wire.failure(error)))
            found[0].close_when_flushed()

    def _take(self, peer: str, connection: Channel, payload: bytes) -> None:
        try:
            self._host.received(codec.decode_message(payload, peer, self._own_id))
        except BadRequest as error:
            log.error("the connection from member %s is closed: %s", peer, error.message)
            connection.close()

    def _inbound_closed(self, peer: str, connection: Channel) -> None:
        if peer in self._inbound and self._inbound[peer][0] is connection:
            del self._inbound[peer]
            self._host.disconnected(peer)
            if (link := self._links.get(peer)) and link.open:
                self._host.connected(peer)

    def close(self) -> None:
        """End all connections. May be called twice."""
        self._closed = True
        for link in self._links.values():
            link.close()
        self._links.clear()
        for connection, _ in list(self._inbound.values()):
            connection.close()


class _Link:
    """The dialled connection to one member, dialled again whenever it breaks."""

    def __init__(self, peers: Peers, peer: str, address: str) -> None:
        self.open = False
        self._peers = peers
        self._peer = peer
        self._address = address
        self._failures = 0
        self._refusal: tuple[str, str] | None = None  # the last one, told once
        self._closed = False
        self._timer: Any = None
        self._dial()

    def _dial(self) -> None:
        self._timer = None
        if self._closed:
            return
        peers = self._peers
        self._dialled_at = peers._loop.now()
        connection = peers._loop.connect(
            wire.parse_address(self._address),
            bind_host=peers._bind_host,
            on_open=lambda: self._on_open(connection),
            on_close=lambda: self._on_close(connection),
            on_payload=lambda payload: self._on_payload(connection, payload),
            timeout_s=1.0,
        )
        self.connection = connection

    def _on_open(self, connection: Channel) -> None:
        if connection is not self.connection or self._closed:
            connection.close()
            return
        self.open = True
        connection.send(wire.frame(wire.encode(self._peers._host.introduction(self._peer))))
        self._peers._host.connected(self._peer)

    def _on_payload(self, connection: Channel, payload: bytes) -> None:
        """The other side only ever speaks here to refuse us."""
        self._failures = len(REDIAL_S)
        connection.close()
        try:
            reply = wire.decode(payload)
        except DdbError:
            return
        refusal = (str(reply.get("error")), str(reply.get("message")))
        if refusal != self._refusal:
            self._refusal = refusal
            self._peers._host.refused(self._peer, *refusal)

    def _on_close(self, connection: Channel) -> None:
        if connection is not self.connection:
            return
        was_open, self.open = self.open, False
        if self._closed:
            return
        if was_open and self._peers._loop.now() - self._dialled_at > 1.0:
            self._failures = 0
        delay_s = REDIAL_S[min(self._failures, len(REDIAL_S) - 1)]
        self._failures += 1
        self._timer = self._peers._loop.call_later(delay_s, self._dial)
        if was_open:
            self._peers._host.disconnected(self._peer)

    def hurry(self) -> None:
        """The member is there: it has just dialled us. Don't wait to dial it."""
        if not self.open and self._timer is not None:
            self._timer.cancel()
            self._dial()

    def move(self, address: str) -> None:
        """The member is to be found elsewhere."""
        self._address = address
        self.connection.close()
        self.hurry()

    def close(self) -> None:
        """Stop dialling, and close."""
        self._closed = True
        self.open = False
        if self._timer is not None:
            self._timer.cancel()
        self.connection.close()
