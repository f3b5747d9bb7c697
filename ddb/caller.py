"""How one request finds a server that serves it.

Laws:

1. A write is never sent twice unless the first attempt *surely* did nothing.
2. A read is harmless, so it is repeated until its time is up.
3. Every call ends by its deadline, and an interrupt (Ctrl-C) in the middle of it leaves no half-read connection behind.

Theory. Any node takes any request, so a client needs one address that works; everything else is speed and patience.
Speed: a reply that was forwarded names the leader, and the next request goes there directly. Patience: when a server
does not answer, or answers that it can't serve *now* (`no_leader`, `overloaded`, …), the next one is asked; after a
round of all, the client sleeps for a random part of a pause that doubles each time (exponential backoff with full
jitter, so that clients cut off together don't come back together).

What makes law 1 possible is knowing how far a request got. If the kernel never took its last byte, the frame was
not whole and no server could act on it: nothing happened. If it did, and no reply came, nobody here can know. A server that
closed the connection while it was idle is noticed before anything is sent.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ddb import wire
from ddb.errors import BY_CODE, BadRequest, DdbError, Internal, OutcomeUnknown, Timeout, Unreachable

CONNECT_TIMEOUT_S: Final = 1.0
READ_ATTEMPT_S: Final = 1.0
BACKOFF_FIRST_S: Final = 0.01
BACKOFF_MAX_S: Final = 0.5
REPLY_BYTES_MAX: Final = 1 << 30

REPEATABLE: Final = frozenset({"ping", "status", "members", "log", "snapshot", "get", "scan", "count", "nodes"})
"""Operations that change nothing (or that may be done twice), so that an unanswered one is simply asked again."""

LOCAL: Final = frozenset({"ping", "status", "log", "snapshot", "nodes"})
"""Operations about the node that is asked: these don't follow the leader."""


class Caller:
    """The open connections to a cluster's nodes, and what is known of where they are and who leads.

    `servers` are the addresses given; with `discover` the other members' are learnt from them, and from the `registry`
    where there is one. Where no server can be reached at all, a call goes on for `unreachable_s`. For one thread at a
    time.
    """

    def __init__(
        self, servers: Sequence[str], registry: str | None = None, discover: bool = True, unreachable_s: float = 5.0
    ) -> None:
        self.given = list(servers)
        self.learnt: list[str] = []
        self.registry = registry
        self.discover = discover
        self.unreachable_s = unreachable_s
        self.learn_due = discover
        self.leader: str | None = None  # where writes and linearizable reads go
        self.home: str | None = None  # where requests about "the node that is asked" go
        self.links: dict[str, Link] = {}

    def call(self, request: Mapping[str, Any], at: str | None, timeout_s: float) -> dict[str, Any]:
        """Send `request` to the leader where that is known, or to the address `at` and nowhere else, and go on until
        it is served or `timeout_s` is over. Returns the reply. Raises a DdbError."""
        return _Call(self, request, at, timeout_s).run()

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses known now: those given, then those learnt."""
        return tuple(dict.fromkeys([*self.given, *self.learnt]))

    def close(self) -> None:
        """Close every connection. May be called twice."""
        for address in list(self.links):
            self.drop(address)

    def link(self, address: str, deadline: float) -> Link:
        """The open connection to `address`, or a new one. Raises OSError."""
        link = self.links.get(address)
        if link is not None and link.usable():
            return link
        self.drop(address)
        link = self.links[address] = Link(address, deadline)
        return link

    def drop(self, address: str) -> None:
        """Close the connection to `address`, if there is one."""
        link = self.links.pop(address, None)
        if link is not None:
            link.close()

    def learn(self, address: str, deadline: float) -> None:
        """Ask the node at `address`, which works, who the other members are. A failure only means: another time."""
        self.learn_due = False
        status = self._ask_aside(address, {"op": "status"}, deadline)
        members = [m.get("address") for m in status.get("members") or () if isinstance(m, dict)]
        leader = status.get("leader")
        self.learnt = _addresses(members) or self.learnt
        if isinstance(leader, dict):
            self.leader = next(iter(_addresses([leader.get("address")])), None)
        for unknown in set(self.links) - set(self.servers):
            self.drop(unknown)

    def ask_registry(self, deadline: float) -> None:
        """Learn from the registry where the nodes are."""
        assert self.registry is not None
        reply = self._ask_aside(self.registry, {"op": "nodes"}, deadline)
        self.drop(self.registry)
        nodes = [n.get("address") for n in reply.get("nodes") or () if isinstance(n, dict)]
        self.learnt = _addresses(nodes) or self.learnt

    def _ask_aside(self, address: str, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """A question whose answer is welcome but not needed: an empty object where it fails."""
        patience = min(deadline, time.monotonic() + CONNECT_TIMEOUT_S)
        try:
            reply = wire.decode_trusted(self.link(address, patience).exchange(wire.encode(request), patience))
        except (OSError, DdbError):
            self.drop(address)
            return {}
        return reply if isinstance(reply, dict) else {}


class _Call:
    """One call on its way: which servers it asked, and what each said."""

    def __init__(self, caller: Caller, request: Mapping[str, Any], at: str | None, timeout_s: float) -> None:
        self.caller = caller
        self.request = dict(request)
        self.at = at
        self.began = time.monotonic()
        self.deadline = self.began + timeout_s
        op = self.request.get("op")
        self.repeatable = op in REPEATABLE
        self.local = op in LOCAL or self.request.get("read") == "stale"
        self.failures: dict[str, DdbError] = {}
        self.tried: set[str] = set()
        self.pause_s = BACKOFF_FIRST_S
        self.attempt_s = READ_ATTEMPT_S

    def run(self) -> dict[str, Any]:
        """Ask one server after another, round after round, until one serves the request or time is up."""
        caller = self.caller
        if caller.registry is not None and self.at is None and not caller.servers:
            caller.ask_registry(self.deadline)
        while True:
            address = self._next()
            if address is None:
                self._rest()
                continue
            self.tried.add(address)
            try:
                reply = self._attempt(address)
            except DdbError as error:
                if not error.retry:
                    raise
                self._note(address, error)
                continue
            self._follow(address, reply)
            return reply

    def _next(self) -> str | None:
        """The next server of this round: the one that must be, the leader, the one used last, any other."""
        if self.at is not None:
            order = [self.at]
        else:
            preferred = self.caller.home if self.local else self.caller.leader
            order = [a for a in (preferred, self.caller.home) if a is not None]
            order += self.caller.servers
        return next((a for a in order if a not in self.tried), None)

    def _rest(self) -> None:
        """A round is over, and nobody served. Sleep a while, learn what may have changed, and begin another one; raise
        what was heard where there is no time for it, or where only one server may be asked and can't be reached."""
        pause_s = random.uniform(0, self.pause_s)
        end = self.deadline
        if all(isinstance(e, Unreachable) for e in self.failures.values()):
            end = min(end, self.began + (0 if self.at is not None else self.caller.unreachable_s))
        if time.monotonic() + pause_s >= end:
            raise self._verdict()
        time.sleep(pause_s)
        self.pause_s = min(2 * self.pause_s, BACKOFF_MAX_S)
        self.attempt_s *= 2
        self.tried.clear()
        self.failures.clear()
        if self.caller.registry is not None:
            self.caller.ask_registry(self.deadline)

    def _verdict(self) -> DdbError:
        """The one error that says most: what a server answered goes before what none did."""
        for error in self.failures.values():
            if not isinstance(error, Unreachable):
                return error
        if not self.failures:
            return Unreachable(f"The registry at {self.caller.registry} names no node; is it running, and are they?")
        reasons = "; ".join(error.message for error in self.failures.values())
        return Unreachable(f"No server answered: {reasons}.")

    def _note(self, address: str, error: DdbError) -> None:
        """Remember a failure that another server may not have."""
        caller = self.caller
        self.failures[address] = error
        caller.learn_due = caller.discover
        if caller.home == address:
            caller.home = None
        hint = _addresses([error.fields.get("leader")])
        caller.leader = hint[0] if hint else None if caller.leader == address else caller.leader

    def _follow(self, address: str, reply: dict[str, Any]) -> None:
        """Learn from a success where the next request should go."""
        caller = self.caller
        if self.at is not None:
            return
        if caller.home is None or self.local:
            caller.home = address
        if not self.local:
            hint = _addresses([reply.get("leader")])
            caller.leader = hint[0] if hint else address
        if caller.learn_due:
            caller.learn(address, self.deadline)

    def _attempt(self, address: str) -> dict[str, Any]:
        """Ask the server at `address` once. Raises a DdbError whose `retry` tells whether to go on elsewhere."""
        now = time.monotonic()
        until = min(self.deadline, now + self.attempt_s) if self.repeatable else self.deadline
        # The server is given less time than the client takes, so that its verdict ("nothing happened") still arrives.
        self.request["timeout"] = max(round(0.9 * (until - now), 3), 0.001)
        payload = wire.encode(self.request)
        try:
            link = self.caller.link(address, until)
        except OSError as error:
            raise Unreachable(f"{address} can't be reached ({_reason(error)})") from None
        try:
            reply = wire.decode_trusted(link.exchange(payload, until))
        except (OSError, BadRequest) as error:
            self.caller.drop(address)
            raise self._unanswered(address, link, error) from None
        if isinstance(reply, dict) and reply.get("ok") is True:
            return reply
        raise self._refused(address, reply)

    def _unanswered(self, address: str, link: Link, error: Exception) -> DdbError:
        """What it means that a request was begun and no reply came."""
        if self.repeatable or not link.sent:
            return Unreachable(f"{address} did not answer ({_reason(error)})")
        return OutcomeUnknown(
            f"The write was sent to {address}, but no answer came ({_reason(error)}): it may or may not have happened. "
            "Read before you write again."
        )

    def _refused(self, address: str, reply: Any) -> DdbError:
        """The error that the server's reply stands for."""
        if not isinstance(reply, dict):
            return Internal(f"{address} answered something that is no reply; is it a ddb server?")
        fields = {name: value for name, value in reply.items() if name not in ("ok", "error", "message", "id")}
        message = str(reply.get("message") or f"{address} answered {reply.get('error')!r} without a reason.")
        kind = BY_CODE.get(str(reply.get("error")), Internal)
        if kind is Timeout and self.repeatable:
            return Unreachable(f"{address} could not answer in time ({message.rstrip('.')})")
        return kind(message, **fields)


class Link:
    """One blocking connection in the frames dialect, with one request under way at a time."""

    def __init__(self, address: str, deadline: float) -> None:
        self.sent = False  # whether the kernel took the whole of the last request
        self._idle = True
        self._cutter = wire.FrameBuffer(REPLY_BYTES_MAX)
        patience = max(min(CONNECT_TIMEOUT_S, deadline - time.monotonic()), 0.001)
        try:
            self._socket = socket.create_connection(wire.parse_address(address), timeout=patience)
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

    def exchange(self, payload: bytes, deadline: float) -> bytes:
        """Send `payload` as a frame and return the reply's payload. Raises OSError; `sent` then says how far it got."""
        self.sent = self._idle = False
        unsent = memoryview(wire.frame(payload))
        while unsent:
            self._arm(deadline)
            unsent = unsent[self._socket.send(unsent) :]
        self.sent = True
        while True:
            self._arm(deadline)
            data = self._socket.recv(1 << 18)
            if not data:
                raise ConnectionResetError("it closed the connection")
            payloads = self._cutter.feed(data)
            if self._cutter.error is not None:
                raise ConnectionAbortedError("it does not speak ddb's protocol")
            if payloads:
                self._idle = True
                return payloads[0]

    def _arm(self, deadline: float) -> None:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("time ran out")
        self._socket.settimeout(remaining_s)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _addresses(texts: Sequence[Any]) -> list[str]:
    """Those of `texts` that are addresses, each written in the one way."""
    found = []
    for text in texts:
        if isinstance(text, str):
            try:
                found.append(wire.format_address(*wire.parse_address(text)))
            except BadRequest:
                continue
    return found


def _reason(error: Exception) -> str:
    """Why, in a few words without the number of the error."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError):
        return (error.strerror or str(error) or type(error).__name__).lower()
    return str(error)
