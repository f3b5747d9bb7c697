"""What a client decides on a request's way to a server that serves it: all of it, and nothing else.

Laws:

1. A write is never sent twice unless the first attempt *surely* did nothing, or it carries the number that a session gave it
   (`client`, `seq`): the cluster does such a one once, and answers it again.
2. A read is harmless, so it is repeated until its time is up.
3. Every call ends by its deadline, provided that each of its steps does.
4. The same replies at the same times, and the same seed, make the same steps.

Theory. Any node takes any request, so a client needs one address that works; everything else is speed and patience.
Speed: a reply that was forwarded names the leader, and the next request goes there directly. Patience: when a server
does not answer, or answers that it can't serve *now* (`no_leader`, `overloaded`, …), the next one is asked; after a
round of all, the client sleeps for a random part of a pause that doubles each time (exponential backoff with full
jitter, so that clients cut off together don't come back together).

What makes law 1 possible is knowing how far a request got. If its last byte never left the client, the frame was not
whole and no server could act on it: nothing happened. If it did, and no reply came, nobody here can know. A server that
did reply is believed: its error says whether the write was refused before anything came of it (`DdbError.definite`).
A numbered write needs no such care while there is time. When there is none left, it does: if any attempt may have
been the one that was done, then that is what is told, whatever the later ones were answered.

Nothing here touches a socket, a clock or a source of chance. A call is a generator: it yields what it wants done in the
world (an `Effect`), and is sent what came of it. So the same decisions are driven by blocking sockets (caller.py), by
an event loop, by a simulated network or by a test's list of answers. A driver is a loop (driving.py), and `Exchange`, `Sleep`,
`Keep` say what it owes to each:

    steps = call(knowledge, {"op": "get", "key": "city"}, None, 5.0, time.monotonic, random.Random())
    reply = drive(steps, perform, Failed)  # what `perform` returns is a reply's payload after an Exchange, None after the others

The reply is the generator's value, and a DdbError comes out by itself. A driver that gives a call up (an interrupt, a cancelled
task) closes the generator, at whichever step it stands.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from ddb import wire
from ddb.errors import (
    BY_CODE,
    BadRequest,
    DdbError,
    Internal,
    OutcomeUnknown,
    SessionExpired,
    SessionLost,
    Timeout,
    TooLarge,
    Unreachable,
)

T = TypeVar("T")
_log = logging.getLogger("ddb.client")

CONNECT_TIMEOUT_S: Final = 1.0
READ_ATTEMPT_S: Final = 1.0
ASIDE_S: Final = 1.0
VOLLEY_EACH_S: Final = 0.002
BACKOFF_FIRST_S: Final = 0.01
BACKOFF_MAX_S: Final = 0.5
SERVERS_MAX_S: Final = 3600.0  # what docs/protocol.md allows of `timeout`
SECONDS_MAX: Final = 1e6  # eleven days: systems count milliseconds in 31 bits

REPEATABLE: Final = frozenset(
    {"ping", "status", "members", "log", "snapshot", "get", "scan", "count", "history", "nodes", "session_open",
     "session_close", "lease_grant", "lease_keepalive", "lease_revoke", "lease_list"}
)  # fmt: skip
"""Operations that change nothing, or that may be done twice, so that an unanswered one is simply asked again. A lease or
a session that nobody was told of runs out by itself."""

NUMBERED: Final = frozenset({"put", "delete", "incr", "txn", "batch"})
"""Operations that are done once where they carry a session's number."""

State = Literal["connected", "suspended", "lost"]
"""How a client stands to its cluster: its last request was served; it looks for a server that serves (as it does before
its first request); or it gave a call up because none did."""

LOCAL: Final = frozenset({"ping", "status", "log", "snapshot", "nodes"})
"""Operations about the node that is asked: these don't follow the leader."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Send `payload` as one frame to the server at `address`, and answer with the payload of its reply.

    It ends by `deadline_s`, a moment on the call's clock, and no more than CONNECT_TIMEOUT_S of it goes to connecting. A
    driver that can't do it throws `Failed`, and closes the connection first: a reply that comes late must never be
    taken for the next request's. An open connection to the same address may be used again, unless an earlier exchange
    on it is unfinished or the server has closed it; or for several exchanges at once, by a driver that counts: replies
    come in the order of the requests.
    """

    address: str
    payload: bytes
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Go on after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Keep:
    """Only these addresses matter from now on: close idle connections to all others."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Volley:
    """Send all `payloads` to the server at `address`, each as one frame, one behind the other on one connection, and
    answer with a list: for each the payload of its reply, or the `Failed` that says how far it got. What Exchange says
    of time and of connections holds here, too."""

    address: str
    payloads: tuple[bytes, ...]
    deadline_s: float


Effect = Exchange | Sleep | Keep
Steps = Generator[Effect, bytes | None, dict[str, Any]]
"""A call on its way. Its value is the reply; what it raises is a DdbError."""

Outcome = dict[str, Any] | DdbError
"""What came of one request among several: its reply, or the error."""

Salvo = Generator[Effect | Volley, Any, list[Outcome]]
"""Several requests on their way at once."""


class Failed(Exception):
    """An exchange that brought no reply; a driver throws it into the call, which decides what that means.

    `reason`: why, in a few words in lower case, as in "connection refused". `sent`: whether the request's last byte was
    given away, so that the server may have acted on it. Where in doubt, it was. `connected`: whether there was
    a connection at all.
    """

    def __init__(self, reason: str, *, sent: bool, connected: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent
        self.connected = connected


def seconds(given: float, name: str) -> float:
    """The number of seconds that was `given` as `name`, at most SECONDS_MAX. Raises BadRequest where it is no number, as
    NaN: no moment is ever past that."""
    if not isinstance(given, int | float):
        raise BadRequest(f"`{name}` must be a number of seconds, not of type {type(given).__name__}.")
    if given != given:
        raise BadRequest(f"`{name}` must be a number of seconds, not NaN.")
    return given if given < SECONDS_MAX else SECONDS_MAX


class Listeners:
    """Who wants to be told how a client stands to its cluster."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[State], object]] = []

    def add(self, callback: Callable[[State], object]) -> Callable[[], None]:
        """Tell `callback` from now on. Returns a function that ends this."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback) if callback in self._callbacks else None

    def tell(self, state: State) -> None:
        """Tell all. What they do wrong does no harm to the call that noticed."""
        for callback in list(self._callbacks):
            try:
                callback(state)
            except Exception:
                _log.exception("a callback of on_state failed")


@dataclass(slots=True)
class Knowledge:
    """What a client knows of where a cluster's nodes are, and who leads. Calls change it; those that overlap may share it.

    `given` are the addresses to begin with; with `discover` the other members' are learnt from them, and from the
    `registry` where there is one. Where no server can be reached at all, a call goes on for `unreachable_s`. Addresses
    are HOST:PORT as `wire.format_address` writes them.
    """

    given: Sequence[str]
    registry: str | None = None
    discover: bool = True
    unreachable_s: float = 5.0
    learnt: Sequence[str] = ()
    leader: str | None = None  # where writes and linearizable reads go
    home: str | None = None  # where requests about "the node that is asked" go
    learn_due: bool = field(init=False)  # whether the next server that serves is asked who the others are
    state: State = "suspended"
    on_state: Callable[[State], object] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.learn_due = self.discover

    def turn(self, state: State) -> None:
        """Note how the client stands to its cluster, and tell where that has changed."""
        if state != self.state:
            self.state = state
            if self.on_state is not None:
                self.on_state(state)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses known now: those given, then those learnt."""
        return tuple(dict.fromkeys([*self.given, *self.learnt]))

    @property
    def kept(self) -> Keep:
        """The addresses to which an open connection is still of use."""
        named = [address for address in (self.leader, self.home) if address is not None]
        return Keep(tuple(dict.fromkeys([*self.servers, *named])))


def call(
    knowledge: Knowledge,
    request: Mapping[str, Any],
    at: str | None,
    timeout_s: float,
    now: Callable[[], float],
    rng: random.Random,
) -> Steps:
    """Begin a call: `request` (an object of docs/protocol.md) goes to the leader where that is known, or to the address
    `at` and nowhere else, until it is served or `timeout_s` is over.

    The time runs from now on, by the clock `now` (seconds that never go back); `rng` draws the pauses. An
    unknown operation is treated with the care due to a write. Returns the steps to drive. They raise a DdbError: what a
    server answered, `OutcomeUnknown` where a write may have happened, `Unreachable` where surely nothing did.
    """
    return _Call(knowledge, request, at, timeout_s, now, rng).run()


def volley(
    knowledge: Knowledge,
    requests: Sequence[Mapping[str, Any]],
    timeout_s: float,
    now: Callable[[], float],
    rng: random.Random,
) -> Salvo:
    """Begin several calls at once: `requests` travel one behind the other to one server, and take effect in this order.

    Each is judged as a `call` is, by the same laws. One that surely did nothing is sent again if nothing behind it has
    been done: otherwise it would come after what it was meant to come before. The value is what came of each.
    """
    return _Salvo(knowledge, requests, timeout_s, now, rng).run()


class _Call:
    """One call on its way: which servers it asked, and what each said."""

    def __init__(
        self,
        knowledge: Knowledge,
        request: Mapping[str, Any],
        at: str | None,
        timeout_s: float,
        now: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.knowledge = knowledge
        self.request = dict(request)
        self.at = at
        self.now = now
        self.rng = rng
        self.began_s = now()
        self.deadline_s = self.began_s + timeout_s
        op = str(self.request.get("op"))
        self.numbered = op in NUMBERED and "client" in self.request and "seq" in self.request
        self.repeatable = op in REPEATABLE
        self.local = op in LOCAL or self.request.get("read") == "stale"
        self.failures: dict[str, DdbError] = {}
        self.doubt: DdbError | None = None  # what first left it open whether a numbered write was done
        self.tried: set[str] = set()
        self.pause_s = BACKOFF_FIRST_S
        self.attempt_s = READ_ATTEMPT_S

    def run(self) -> Steps:
        """Ask one server after another, round after round, until one serves the request or time is up."""
        if not self.knowledge.servers:
            yield from self._ask_registry()
        while True:
            address = self._next()
            if address is None:
                yield from self._rest()
                continue
            self.tried.add(address)
            try:
                reply = yield from self._attempt(address)
            except DdbError as error:
                if not self._goes_on(error):
                    raise
                self._note(address, error)
                continue
            if self.at is None:
                self.knowledge.turn("connected")
                self._follow(address, reply)
                if self.knowledge.learn_due:
                    yield from self._learn(address)
            return reply

    def _next(self) -> str | None:
        """The next server of this round: the one that must be, the leader, the one used last, any other."""
        if self.now() >= self.deadline_s:
            return None
        if self.at is not None:
            order = [self.at]
        else:
            knowledge = self.knowledge
            preferred = knowledge.home if self.local else knowledge.leader
            order = [a for a in (preferred, knowledge.home) if a is not None]
            order += knowledge.servers
        return next((a for a in order if a not in self.tried), None)

    def _rest(self) -> Generator[Effect, bytes | None, None]:
        """A round is over, and nobody served. Sleep a while, learn what may have changed, and begin another one; raise
        what was heard where there is no time for it, or where only one server may be asked and can't be reached."""
        pause_s = self.rng.uniform(0, self.pause_s)
        end_s = self.deadline_s
        if all(isinstance(e, Unreachable) for e in self.failures.values()):
            end_s = min(end_s, self.began_s + (0 if self.at is not None else self.knowledge.unreachable_s))
        gives_up = self.now() + pause_s >= end_s
        if self.at is None:
            self.knowledge.turn("lost" if gives_up else "suspended")
        if gives_up:
            raise self._verdict()
        yield Sleep(pause_s)
        self.pause_s = min(2 * self.pause_s, BACKOFF_MAX_S)
        self.attempt_s *= 2
        self.tried.clear()
        self.failures.clear()
        yield from self._ask_registry()

    def _verdict(self) -> DdbError:
        """The one error that says most: what left an outcome open goes first, then what a server answered."""
        if self.doubt is not None:
            return self.doubt
        for error in self.failures.values():
            if not isinstance(error, Unreachable):
                return error
        if self.failures:
            reasons = "; ".join(error.message for error in self.failures.values())
            return Unreachable(f"No server answered: {reasons}.")
        if self.at is None and not self.knowledge.servers:
            return Unreachable(f"The registry at {self.knowledge.registry} names no node; is it running, and are they?")
        return Unreachable("Time ran out before any server was asked; allow more of it.")

    def _goes_on(self, error: DdbError) -> bool:
        """Whether to ask elsewhere, or again, after this `error` (law 1). Raises SessionLost."""
        if not self.numbered or (self.doubt is None and error.definite):
            if isinstance(error, OutcomeUnknown) and self.at is None:
                self.knowledge.turn("suspended")
            return error.retry
        if not error.definite:
            self.doubt = self.doubt or error
            return True
        if isinstance(error, SessionExpired):
            raise SessionLost(f"{error.message} An earlier attempt at this write may have been done before that.")
        return not isinstance(error, BadRequest | TooLarge)  # what the write was answered at first, or would have been

    def _note(self, address: str, error: DdbError) -> None:
        """Remember a failure that another server may not have."""
        knowledge = self.knowledge
        self.failures[address] = error
        knowledge.learn_due = knowledge.discover
        if knowledge.home == address:
            knowledge.home = None
        hint = _addresses([error.fields.get("leader")])
        if hint:
            knowledge.leader = hint[0]
        elif knowledge.leader == address:
            knowledge.leader = None

    def _follow(self, address: str, reply: dict[str, Any]) -> None:
        """Learn from a success where the next request should go."""
        knowledge = self.knowledge
        if knowledge.home is None:
            knowledge.home = address
        if not self.local:
            hint = _addresses([reply.get("leader")])
            knowledge.leader = hint[0] if hint else address

    # ------------------------------------------------------- one server

    def _attempt(self, address: str) -> Steps:
        """Ask the server at `address` once. Raises a DdbError whose `retry` tells whether to go on elsewhere."""
        now_s = self.now()
        again = self.repeatable or self.numbered
        until_s = min(self.deadline_s, now_s + self.attempt_s) if again else self.deadline_s
        self.request["timeout"] = _servers_s(until_s - now_s)
        try:
            reply = yield from _ask(address, self.request, until_s)
        except Failed as failure:
            raise self._unanswered(address, failure) from None
        return self._served(address, reply)

    def _judged(self, address: str, answer: bytes | Failed) -> dict[str, Any]:
        """The reply in an `answer` that came with others. Raises a DdbError."""
        try:
            if isinstance(answer, Failed):
                raise answer
            return self._served(address, _decoded(answer))
        except Failed as failure:
            raise self._unanswered(address, failure) from None

    def _served(self, address: str, reply: Any) -> dict[str, Any]:
        """The `reply`, if it is one that serves. Raises a DdbError."""
        if isinstance(reply, dict) and reply.get("ok") is True:
            return reply
        raise self._refused(address, reply)

    def _unanswered(self, address: str, failure: Failed) -> DdbError:
        """What it means that no reply came (law 1)."""
        if not failure.connected:
            return Unreachable(f"{address} can't be reached ({failure.reason})")
        if self.repeatable or not failure.sent:
            return Unreachable(f"{address} did not answer ({failure.reason})")
        return OutcomeUnknown(
            f"The write was sent to {address}, but no answer came ({failure.reason}): it may or may not have happened. "
            "Read before you write again."
        )

    def _refused(self, address: str, reply: Any) -> DdbError:
        """The error that the server's reply stands for."""
        if not isinstance(reply, dict):
            return Internal(f"{address} answered something that is no reply; is it a ddb server?")
        message = str(reply.get("message") or f"{address} answered {reply.get('error')!r} without a reason.")
        kind = BY_CODE.get(str(reply.get("error")), Internal)
        if kind is Timeout and self.repeatable:
            return Unreachable(f"{address} could not answer in time ({message.rstrip('.')})")
        error = kind(message)
        error.fields = {name: value for name, value in reply.items() if name not in ("ok", "error", "message", "id")}
        return error

    # ------------------------------------------------- questions of its own

    def _learn(self, address: str) -> Generator[Effect, bytes | None, None]:
        """Ask the node at `address`, which works, who the other members are. A failure only means: another time."""
        knowledge = self.knowledge
        knowledge.learn_due = False  # so that of the calls that overlap, one asks
        try:
            status = yield from self._ask_aside(address, "status")
        except BaseException:  # the call is given up
            knowledge.learn_due = True
            raise
        knowledge.learnt = _addresses_in(status.get("members")) or knowledge.learnt
        leader = status.get("leader")
        if isinstance(leader, dict):
            knowledge.leader = next(iter(_addresses([leader.get("address")])), None)
        yield knowledge.kept

    def _ask_registry(self) -> Generator[Effect, bytes | None, None]:
        """Learn from the registry, where there is one, where the nodes are."""
        knowledge = self.knowledge
        if knowledge.registry is None or self.at is not None:
            return
        reply = yield from self._ask_aside(knowledge.registry, "nodes")
        knowledge.learnt = _addresses_in(reply.get("nodes")) or knowledge.learnt
        yield knowledge.kept

    def _ask_aside(self, address: str, op: str) -> Steps:
        """A question whose answer is welcome but not needed: an empty object where it fails."""
        try:
            reply = yield from _ask(address, {"op": op}, min(self.deadline_s, self.now() + ASIDE_S))
        except Failed:
            return {}
        return reply if isinstance(reply, dict) else {}


class _Salvo:
    """Several calls on their way together: one leads, each is judged for itself."""

    def __init__(
        self,
        knowledge: Knowledge,
        requests: Sequence[Mapping[str, Any]],
        timeout_s: float,
        now: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.lead = _Call(knowledge, {"op": "pipeline"}, None, timeout_s, now, rng)
        self.calls = [_Call(knowledge, request, None, timeout_s, now, rng) for request in requests]
        self.outcomes: list[Outcome | None] = [None] * len(self.calls)
        self.errors: dict[int, DdbError] = {}  # by position: the last of those that are to be tried again
        self.left = list(range(len(self.calls)))

    def run(self) -> Salvo:
        """Send what is left to one server after another, until nothing is left or time is up."""
        lead = self.lead
        if not lead.knowledge.servers:
            yield from lead._ask_registry()
        while self.left:
            address = lead._next()
            if address is None:
                try:
                    yield from lead._rest()
                except DdbError as error:
                    for position in self.left:
                        doubt = self.calls[position].doubt
                        self.outcomes[position] = doubt or self.errors.get(position) or error
                    break
                continue
            lead.tried.add(address)
            answers = yield self._volley(address)
            self._settle(address, answers)
            if self.left:
                lead._note(address, self.errors[self.left[0]])
            elif lead.knowledge.learn_due:
                yield from lead._learn(address)
        return [outcome for outcome in self.outcomes if outcome is not None]

    def _volley(self, address: str) -> Volley:
        now_s = self.lead.now()
        calls = [self.calls[position] for position in self.left]
        again = all(call.repeatable or call.numbered for call in calls)
        patience_s = self.lead.attempt_s + VOLLEY_EACH_S * len(calls)
        until_s = min(self.lead.deadline_s, now_s + patience_s) if again else self.lead.deadline_s
        for call in calls:
            call.request["timeout"] = _servers_s(until_s - now_s)
        return Volley(address, tuple(wire.encode(call.request) for call in calls), until_s)

    def _settle(self, address: str, answers: list[bytes | Failed]) -> None:
        """Note what came of each, and leave only those that may be sent again."""
        again = []
        for position, answer in zip(self.left, answers, strict=True):
            call = self.calls[position]
            try:
                reply = call._judged(address, answer)
                self.lead.knowledge.turn("connected")
                self.lead._follow(address, reply)
            except DdbError as error:
                if self._goes_on(position, error):
                    again.append(position)
                elif error.definite:
                    continue
            else:
                self.outcomes[position] = reply
            if position not in again:  # it took effect, or may have: nothing before it may come after it
                overtaken = [early for early in again if self.calls[early].doubt is None]
                for early in overtaken:
                    self.outcomes[early] = self.errors[early]
                    again.remove(early)
        self.left = again

    def _goes_on(self, position: int, error: DdbError) -> bool:
        try:
            goes_on = self.calls[position]._goes_on(error)
        except DdbError as worse:
            goes_on, error = False, worse
        if goes_on:
            self.errors[position] = error
        else:
            self.outcomes[position] = error
        return goes_on


def _servers_s(patience_s: float) -> float:
    """How long a server is given, where the client waits for `patience_s`: less, so that its verdict ("nothing happened")
    still arrives, and no more than it takes on."""
    return min(max(round(0.9 * patience_s, 3), 0.001), SERVERS_MAX_S)


def _ask(address: str, request: Mapping[str, Any], until_s: float) -> Generator[Effect, bytes | None, Any]:
    """The JSON value that the server at `address` replies to `request`. Raises Failed, also where it is none."""
    payload = yield Exchange(address, wire.encode(request), until_s)
    assert payload is not None, "a driver answers an exchange with bytes, or throws"
    return _decoded(payload)


def _decoded(payload: bytes) -> Any:
    """The JSON value in a reply. Raises Failed where it is none."""
    try:
        return wire.decode_trusted(payload)
    except BadRequest as error:
        raise Failed(str(error), sent=True) from None


def _addresses_in(nodes: Any) -> list[str]:
    """The addresses of a reply's `nodes` or members, whatever the server sent in their place."""
    listed = nodes if isinstance(nodes, list) else []
    return _addresses(node.get("address") for node in listed if isinstance(node, dict))


def _addresses(texts: Iterable[Any]) -> list[str]:
    """Those of `texts` that are addresses, each written in the one way."""
    found = []
    for text in texts:
        if isinstance(text, str):
            try:
                found.append(wire.format_address(*wire.parse_address(text)))
            except BadRequest:
                continue
    return found
