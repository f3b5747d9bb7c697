"""What must be true of sessions and leases, after every entry that anybody applies.

Laws: as simrules.py's. What is looked at: the entries as they are applied, what each node makes of them, and
what clients were told. Time is the simulation's own, which no program sees.

Theory. A bug of exactly-once is seen by a client only when it counts wrongly; here it is seen when the second
reply differs from the first, on whatever node, asked for or not. The time of a lease can't be told from the log
at all: so the rules note when each keep-alive was asked for that was answered, and hold the lease's end against that.

**The bound.** A leader counts on its own steady clock. Where clocks run at different rates (the simulator lets them run up
to 3 % fast or slow), a ttl on the fastest takes ttl / 1.03; and a clock that is put forward by some seconds ends the lease as
much earlier. No lease may end before that. A promise about time can't be better than the clock it is made by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from zlib import crc32

from ddb import wire
from ddb.codec import decode_batch
from ddb.errors import CorruptStore
from ddb.messages import Batch, Command
from ddb.node import Node
from ddb.sessions import REPLIES_MAX
from ddb.simhost import Host
from ddb.simrules import Violation

ONCE: Final = "a write of a session is applied once (dissertation §6.3)"
SAME_REPLY: Final = "every reply to one write of a session is the first (dissertation §6.3)"
KEPT_LONG: Final = "a session keeps what a client with 64 open writes may ask for (sessions.py)"
UNUSED: Final = "a session that is used is not forgotten (dissertation §6.3)"
NOT_EARLY: Final = "a lease lives its ttl after the last keep-alive that was answered (tenure.py)"
CONFIRMED: Final = "a keep-alive is counted where a read would be answered (dissertation §6.4)"
COUNTED: Final = "a keep-alive that is answered counts with whoever leads (dissertation §6.4)"
BY_LOG: Final = "leases and sessions end by an entry of the log (leasebook.py)"
WITH_KEYS: Final = "with a lease go its keys, all in that entry, and no others (leasebook.py)"
COVERED: Final = "the digest covers all rows, sessions and leases (ledger.py)"
ENDS: Final = "a lease that nobody keeps alive ends (tenure.py)"
RATE_MAX: Final = 1.03  # of a clock, where they differ
EPSILON_S: Final = 1e-6


@dataclass(slots=True)
class _Session:
    """What the log says of a session."""

    used_at: float
    replies: dict[int, bytes] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)  # seqs whose write changed something


@dataclass(slots=True)
class _Lease:
    """What is known of a lease: since when, at the earliest, its time runs."""

    ttl_s: float
    since: float
    jumped_s: float
    keys: set[str] = field(default_factory=set)


class TenureRules:
    """The rules, over the whole history of one cluster. `now()` is the true time; `hosts` are looked at for how far their
    clocks were put forward."""

    def __init__(self, met: Callable[[str], None], now: Callable[[], float], hosts: Mapping[str, Host]) -> None:
        self.met = met
        self._now = now
        self._hosts = hosts
        self._upto = 0  # the highest index that anybody has applied
        self._said: dict[int, list[bytes]] = {}  # by a batch's first index: the replies to it
        self._sessions: dict[int, _Session] = {}
        self._leases: dict[int, _Lease] = {}
        self._ended: dict[int, tuple[float, _Lease]] = {}  # expired leases: when
        self._of: dict[str, int] = {}  # key -> lease
        self._begun: list[tuple[float, int]] = []  # since when the leader of a term counts
        self._renewed: dict[int, list[tuple[float, int, float]]] = {}
        """Lease -> when it was kept alive, by the leader of which term, and how far the clocks had been put forward then."""

    def attach(self, host: Host, node: Node) -> None:
        """Watch the program that has just begun on `host`."""
        replica, tenure = node.replica, node.tenure
        answer, begin, keep = replica._answer_writes, tenure._begin, tenure.keep_alive
        read, reading = replica._answer_read, False

        def watch_answers(batch: Batch, replies: list[bytes]) -> None:
            if batch.config is None:
                self._look(host, node, batch, replies)
            answer(batch, replies)

        def watch_begin(term: int, now: float) -> None:
            self._begun.append((self._now(), term))
            begin(term, now)

        def watch_read(*args: Any) -> int:
            nonlocal reading
            reading = True
            try:
                return read(*args)
            finally:
                reading = False

        def watch_keep(lease: int, now: float) -> int:
            if not reading:
                raise Violation(CONFIRMED, host.name, f"lease {lease} at {node!r}")
            ttl_ms = keep(lease, now)
            self._renewed.setdefault(lease, []).append((self._now(), replica.raft.term, self._jumped_s()))
            return ttl_ms

        replica._answer_writes = watch_answers  # type: ignore[method-assign]
        replica._answer_read = watch_read  # type: ignore[method-assign, assignment]
        tenure._begin = watch_begin  # type: ignore[method-assign]
        tenure.keep_alive = watch_keep  # type: ignore[method-assign]

    def look_at_digest(self, host: str, node: Node) -> None:
        """Hold the digest that `node` tells the others against what it should cover, counted here once more."""
        table = node.replica.machine.table
        if node.replica.diverged:
            return
        try:
            rows = [b"%b\n%b\n%d %d %d" % (key.encode(), *row[:4]) for key, row in table.rows()]
        except CorruptStore:
            return  # it will notice by itself
        records = [b"%b\n%b" % (name.encode(), value) for name, value in table.ledger.records.items()]
        digest = sum(crc32(text) ** 2 for text in rows + records) % 2**64
        if digest != table.digest:
            raise Violation(COVERED, host, f"{digest:016x} is told as {table.digest:016x} by {node!r}")

    # -- what clients were told

    def told(self, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
        """A client was given `reply`, which is a success, for its numbered `request`."""
        session = self._sessions.get(request["client"])
        first = None if session is None else session.replies.get(request["seq"])
        said = {name: value for name, value in reply.items() if name not in ("leader", "id")}
        if first is not None and wire.encode(said) != wire.encode(wire.decode(first)):
            raise Violation(
                SAME_REPLY, "a client", f"{dict(request)!r} is answered with {said!r}, and was with {first!r}"
            )
        if session is not None and first is None:
            raise Violation(BY_LOG, "a client", f"{dict(request)!r} is answered with {said!r}, and was never applied")

    def kept_alive(self, lease: int, asked: float) -> None:
        """A client was told that `lease`, which it asked to keep alive at `asked`, is alive."""
        self.met("lease kept alive")
        leads = max((term for at, term in self._begun if at < asked), default=0)
        renewed = self._renewed.get(lease, [])
        counted = next((jumped_s for at, term, jumped_s in renewed if at >= asked and term >= leads), None)
        if counted is None:
            what = f"lease {lease}, asked for at {asked:.6f}, when term {leads} counted: {renewed[-3:]}"
            raise Violation(COUNTED, "a client", what)
        if lease in self._ended:
            ended, known = self._ended[lease]
            self._look_at_end("a client", lease, known, max(asked, known.since), ended)
        known_now = self._leases.get(lease)
        if known_now is not None and asked > known_now.since:
            known_now.since, known_now.jumped_s = asked, counted  # a clock may have jumped before the answer came

    @property
    def leases(self) -> list[int]:
        """The leases that have not ended yet."""
        return sorted(self._leases)

    # -- what is applied

    def _look(self, host: Host, node: Node, batch: Batch, replies: list[bytes]) -> None:
        first = self._said.setdefault(batch.first, replies)
        if first != replies:
            position = next(n for n, both in enumerate(zip(first, replies, strict=True)) if both[0] != both[1])
            raise Violation(
                SAME_REPLY,
                host.name,
                f"at {batch.first + position}: {replies[position]!r}, elsewhere {first[position]!r}",
            )
        if batch.first <= self._upto:
            return
        self._upto = batch.last
        commands = batch.commands or decode_batch(batch.data).commands or []
        gone: set[str] = set()
        for rev, (command, reply) in enumerate(zip(commands, replies, strict=True), batch.first):
            self._entry(host, rev, command, reply, gone)
        for key in sorted(gone):
            if node.replica.machine.table.row(key) is not None:
                raise Violation(WITH_KEYS, host.name, f"{key!r} is there after its lease has gone, at {batch!r}")
        machine = node.replica.machine
        if set(machine.leases.ttl_ms) != set(self._leases):
            raise Violation(BY_LOG, host.name, f"leases {sorted(machine.leases.ttl_ms)}, by the log {self.leases}")

    def _entry(self, host: Host, rev: int, command: Command, reply: bytes, gone: set[str]) -> None:
        op = command[0]
        if op == "once":
            self._once(host, rev, command, reply, gone)
            return
        ok = reply.startswith(b'{"ok":true')
        if op == "session_open" and ok:
            self._sessions[rev] = _Session(self._now())
        elif op == "session_close":
            self._sessions.pop(command[1], None)
        elif op == "session_expire":
            self._expire_sessions(host, command[1], reply)
        elif op == "lease_grant" and ok:
            self._leases[rev] = _Lease(command[1] / 1000, self._now(), self._jumped_s())
        elif op == "lease_revoke" and ok:
            self._end(host, [command[1]], reply, gone)
            self.met("lease revoked")
        elif op == "lease_expire":
            self._expire(host, command[1], reply, gone)
        elif ok:
            for key, lease in _attachments(command, reply):
                gone.discard(key)
                self._attach(key, lease)

    def _once(self, host: Host, rev: int, command: Command, reply: bytes, gone: set[str]) -> None:
        _, client, seq, inner = command
        session = self._sessions.get(client)
        lost = wire.decode(reply).get("error") == "session_expired"
        if session is None:
            if not lost:
                raise Violation(ONCE, host.name, f"{command!r} at {rev} is answered with {reply!r} without a session")
            self.met("write of a forgotten session refused")
            return
        session.used_at = self._now()
        known = session.replies.get(seq)
        if lost:
            higher = sum(1 for other in session.replies if other > seq)
            if higher < REPLIES_MAX:
                raise Violation(KEPT_LONG, host.name, f"{command!r} at {rev}: {reply!r} after {higher} later ones")
            return
        if known is not None:
            self.met("write of a session repeated")
            if known != reply:
                raise Violation(ONCE, host.name, f"{command!r} at {rev}: {reply!r}, and was {known!r}")
            return
        session.replies[seq] = reply
        self._entry(host, rev, inner, reply, gone)

    def _expire_sessions(self, host: Host, unused: Iterable[tuple[int, int]], reply: bytes) -> None:
        there = {client for client, _ in unused if client in self._sessions}
        if not there or wire.decode(reply)["expired"] == 0:
            return
        self.met("session expired")
        # Which of them passed their condition shows in what is left: the rule below looks at it when they are used.
        program: Any = host.program
        left = dict(program.replica.machine.sessions.last_uses())
        for client in there - left.keys():
            session = self._sessions.pop(client)
            idle_s = self._now() - session.used_at
            least_s = program.settings.session_unused_s / RATE_MAX - self._jumped_s()
            if idle_s < least_s - EPSILON_S:
                raise Violation(UNUSED, host.name, f"session {client} expired after {idle_s:.3f} s")

    def _expire(self, host: Host, ids: Iterable[int], reply: bytes, gone: set[str]) -> None:
        there = [lease for lease in ids if lease in self._leases]
        now = self._now()
        for lease in there:
            known = self._leases[lease]
            self._look_at_end(host.name, lease, known, known.since, now)
            self._ended[lease] = (now, known)
            self.met("lease expired")
        self._end(host, there, reply, gone)

    def _look_at_end(self, host: str, lease: int, known: _Lease, since: float, ended: float) -> None:
        lived_s = ended - since
        least_s = known.ttl_s / RATE_MAX - (self._jumped_s() - known.jumped_s)
        if lived_s < least_s - EPSILON_S:
            raise Violation(
                NOT_EARLY, host, f"lease {lease} of {known.ttl_s:g} s ended {lived_s:.6f} s after {since:.6f}"
            )

    def _end(self, host: Host, ids: Iterable[int], reply: bytes, gone: set[str]) -> None:
        keys: set[str] = set()
        for lease in ids:
            keys |= self._leases.pop(lease).keys
        for key in keys:
            del self._of[key]
        gone |= keys
        deleted = wire.decode(reply)["deleted"]
        if deleted != len(keys):
            raise Violation(WITH_KEYS, host.name, f"{deleted} keys went with {sorted(ids)}, which had {sorted(keys)}")

    def _attach(self, key: str, lease: int) -> None:
        old = self._of.pop(key, 0)
        if old:
            self._leases[old].keys.discard(key)
        if lease:
            self._of[key] = lease
            self._leases[lease].keys.add(key)

    def _jumped_s(self) -> float:
        """How far the clocks were put forward so far, all in all."""
        return sum(host.jumped_s for host in self._hosts.values())


def _attachments(command: Command, reply: bytes) -> Iterable[tuple[str, int]]:
    """Which keys a write that was done attached to which lease (0: to none), in order."""
    op = command[0]
    if op == "put":
        options = command[3] if len(command) > 3 else {}
        if b'"applied":false' not in reply[:40]:
            yield command[1], options.get("lease", 0)
    elif op == "delete":
        if b'"applied":false' not in reply[:40]:
            yield command[1], 0
    elif op == "batch":
        for operation in command[1]:
            yield from _attachments(operation, b"")
    elif op == "txn":
        for operation in command[2] if wire.decode(reply)["succeeded"] else command[3]:
            yield from _attachments(operation, b"")
