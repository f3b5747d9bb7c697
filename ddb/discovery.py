"""A node's side of the registry: saying where it is, learning where the others are, and the one first cluster.

Laws: the registry only says where nodes are (registry.py). While it can't be reached, everything that is known stays
known, and the cluster goes on; the node knocks again five times a second, so that a registry that was restarted, or wiped,
hears from its nodes before it would believe itself new.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from ddb import wire
from ddb.errors import DdbError
from ddb.membership import Sighting
from ddb.reactor import Channel, Reactor

log = logging.getLogger(__name__)

KNOCK_S: Final = 0.2
REGISTER_EVERY_S_MAX: Final = 60.0
STRANGE: Final = "it does not answer like one"
ANSWER_S: Final = 2.0  # a registry that is silent for longer is dialled anew


class Discovery:
    """One node's conversation with the registry at `address` (host, port).

    `introduce()` gives the fields of `register`; `on_nodes(sightings, cluster)` is called with each answer.
    """

    def __init__(
        self,
        loop: Reactor,
        address: tuple[str, int],
        introduce: Callable[[], dict[str, Any]],
        on_nodes: Callable[[dict[str, Sighting], str | None], None],
    ) -> None:
        self._loop = loop
        self._address = address
        self._shown = wire.format_address(*address)
        self._introduce = introduce
        self._on_nodes = on_nodes
        self._waiting: list[Callable[[dict[str, Any]], None]] = []  # for replies, in the order of the requests
        self._connection: Channel | None = None
        self._open = False
        self._timer: Any = None
        self._complaint: str | None = ""  # what was last complained of; None while all is well
        self._closed = False
        self._dial()

    @property
    def connected(self) -> bool:
        """Whether the registry has answered, and is still there."""
        return self._complaint is None

    def ask(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Send `request`; `answer` gets the reply, unless the connection breaks first."""
        if self._open and self._connection is not None:
            self._waiting.append(answer)
            self._connection.send(wire.frame(wire.encode(request)))

    def register(self) -> None:
        """Say again where this node is; to be called, too, when that has changed."""
        self.ask({"op": "register", **self._introduce()}, self._registered)
        if self._open:
            self._again(ANSWER_S, self._give_up)

    def _give_up(self) -> None:
        if self._connection is not None:
            self._connection.end(f"no answer within {ANSWER_S:g} s")

    def close(self) -> None:
        """End the conversation; the registry is told that the node leaves. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None:
            if self._open:
                self._connection.send(wire.frame(wire.encode({"op": "unregister", "id": self._introduce()["id"]})))
            self._connection.close_when_flushed()

    def _dial(self) -> None:
        if self._closed:
            return
        self._connection = connection = self._loop.connect(
            self._address,
            bind_host=None,
            on_open=lambda: self._on_open(connection),
            on_close=lambda: self._on_close(connection),
            on_payload=self._on_payload,
            timeout_s=1.0,
        )

    def _on_open(self, connection: Channel) -> None:
        if not self._closed:
            self._open = True
            self.register()

    def _on_close(self, connection: Channel) -> None:
        self._open = False
        self._waiting.clear()
        if self._closed:
            return
        if connection.garbled:
            self._wrong(STRANGE)
        else:
            self._complain(
                "unreachable", f"the registry at {self._shown} can't be reached ({connection.reason}); trying on"
            )
        self._again(KNOCK_S, self._dial)

    def _again(self, delay_s: float, what: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, what)

    def _on_payload(self, payload: bytes) -> None:
        try:
            reply = wire.decode(payload)
        except DdbError:
            self._wrong(STRANGE)
            return
        if self._waiting:
            self._waiting.pop(0)(reply)

    def _registered(self, reply: dict[str, Any]) -> None:
        if reply.get("ok") is not True:
            self._wrong(str(reply.get("message", STRANGE)))
            return
        try:
            sightings = {
                str(n["id"]): Sighting(str(n["id"]), str(n["name"]), str(n["address"])) for n in reply["nodes"]
            }
            for sighting in sightings.values():
                wire.parse_address(sighting.address)
            cluster, ttl_s = reply["cluster"], float(reply["ttl"])
            if not (cluster is None or type(cluster) is str) or not ttl_s > 0:
                raise ValueError("a cluster's id, and seconds")
        except (KeyError, TypeError, ValueError, DdbError):
            self._wrong(STRANGE)
            return
        if self._complaint is not None:
            self._complaint = None
            log.info("registered at the registry %s", self._shown)
        if not self._closed:
            self._again(min(max(ttl_s / 3, KNOCK_S), REGISTER_EVERY_S_MAX), self.register)
            self._on_nodes(sightings, cluster)

    def _wrong(self, why: str) -> None:
        """What answers there is no registry, or not ours."""
        self._complain(why, f"{self._shown} is not the registry of this node: {why}")
        self._again(1.0, self.register)

    def _complain(self, what: str, message: str) -> None:
        """Say `message`, unless `what` was said last."""
        if what != self._complaint:
            self._complaint = what
            log.warning("%s", message)
