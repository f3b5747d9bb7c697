"""What must be true of a cluster after every step, each rule with its source.

Laws: a rule looks, and changes nothing. It judges by what it has written down itself from one step to the next, and
believes no bookkeeping of the code it judges where it can look at what that has done: sent, saved, applied, answered.

Theory. Raft's paper proves five properties (figure 3); its safety hangs on what is durable before something is said
(figure 2). A history of replies shows that something went wrong only when a client happens to see it; these rules
see it in the step in which it happens, and name it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Final

from ddb.kv import Machine
from ddb.messages import (
    Append,
    AppendReply,
    Batch,
    Configuration,
    ElectionReply,
    ElectionRequest,
    InstallSnapshot,
    Message,
    ReadRequest,
    Role,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from ddb.node import Node
from ddb.raft import Ready
from ddb.simhost import Host

DIGESTS_KEPT: Final = 20_000

ONE_LEADER: Final = "one leader a term (Election Safety, Raft §5.2)"
ONE_VOTE: Final = "one vote a term, across crashes (Raft §5.2)"
VOTE_ON_DISK: Final = "a vote is on disk before it is told (Raft figure 2)"
TERM_ON_DISK: Final = "a term is on disk before it is told (Raft figure 2)"
ACK_ON_DISK: Final = "what is acknowledged is on disk (Raft figure 2)"
TERM_BACK: Final = "terms never go back, across crashes (Raft §5.1)"
COMMIT_BACK: Final = "the commit index never goes back (Raft figure 2)"
APPLIED_BACK: Final = "what is applied never goes back, and is committed (Raft figure 2)"
APPEND_ONLY: Final = "a leader only appends to its log (Leader Append-Only, Raft §5.3)"
LOG_MATCHING: Final = "one index and term, one entry and one past (Log Matching, Raft §5.3)"
COMPLETENESS: Final = "a leader has all that is committed (Leader Completeness, Raft §5.4)"
MACHINE_SAFETY: Final = "one entry at each index is applied (State Machine Safety, Raft §5.4.3)"
MAJORITY: Final = "what is committed is on the disks of a majority of the voters (Raft §5.3)"
OWN_TERM: Final = "only entries of the leader's own term are committed by counting (Raft §5.4.2)"
DIGEST: Final = "equal indices have equal digests (Raft §2)"
READ_INDEX: Final = "a read sees all that was committed when it was asked (dissertation §6.4)"
ONE_CHANGE: Final = "one change of membership at a time, after an entry of the leader's own term (dissertation §4.1)"
OVERLAP: Final = "majorities of adjacent configurations overlap (dissertation §4.1)"
RANK: Final = "nobody stands against a higher rank that lives (Garcia-Molina 1982)"
ELECTED: Final = "a leader has the votes of a majority, or of every single member (Raft §5.2)"
ONE_CLUSTER: Final = "one registry founds one cluster"
MEMBER_LEADS: Final = "only voters lead (dissertation §4.2.1)"
LAWFUL: Final = "the code's own invariants hold"


class Violation(AssertionError):
    """A rule was broken. `rule` is its name, with the source; `host` where it was seen; `what` the evidence."""

    def __init__(self, rule: str, host: str, what: str) -> None:
        super().__init__(rule, host, what)  # as they are, so that it can be pickled, and come from another process
        self.rule = rule
        self.host = host
        self.what = what

    def __str__(self) -> str:
        return f"{self.rule}\n    seen on {self.host}: {self.what}"


def brief(m: Message) -> str:
    """`m` in one line for the trace: what it says, without what goes without saying."""
    said = []
    for part in fields(m):
        value = getattr(m, part.name)
        if part.name in ("src", "dst", "sha256", "digest") or value in (None, False, 0, ()):
            continue
        if isinstance(value, bytes):
            value = f"{len(value)} bytes"
        elif isinstance(value, tuple):
            value = " ".join(v.decode() if isinstance(v, bytes) else repr(v) for v in value)
        said.append(f"{part.name}={value}")
    return f"{type(m).__name__}({', '.join(said)})"


@dataclass(slots=True)
class _Seen:
    """What a program looked like at its last step, and what it was told."""

    host: str
    node: Node
    term: int
    commit: int
    applied: int
    role: Role
    config_index: int = -1
    last: int = 0  # of a leader's log
    ask: int = -1  # the latest ElectionRequest
    ask_term: int = 0
    alive: set[str] = field(default_factory=set)  # who answered it from above
    stalled: set[str] = field(default_factory=set)  # who did so earlier, and then did not win
    votes: dict[str, bool] = field(default_factory=dict)  # granted in this term -> in doubt
    reads: dict[int, int] = field(default_factory=dict)  # ticket -> what was committed when it was asked


class Rules:
    """The rules, over the whole history of one cluster. `met(what)` is told of the rare things seen on the way,
    `note(text)` of every message."""

    def __init__(self, met: Callable[[str], None], note: Callable[[str], None] | None = None) -> None:
        self.met = met
        self._note = note
        self.committed = 0  # the highest index that anybody ever knew to be committed
        self.chosen: dict[int, tuple[int, int, bytes]] = {}  # first -> last, term, data of what was applied there
        self._chosen_in: dict[int, int] = {}  # first -> a term by which that was known; later leaders have it
        self.digests: OrderedDict[int, int] = OrderedDict()  # index -> digest of the state there
        self._leaders: dict[int, str] = {}  # term -> leader
        self._votes: dict[tuple[str, int], str] = {}  # (voter, term) -> candidate, where given without doubt
        self._terms: Counter[str] = Counter()  # id -> the highest term it has told anybody
        self.batches: dict[tuple[int, int], tuple[bytes, int]] = {}  # (first, term) -> data, the term before it
        self.holders: dict[tuple[int, int], set[str]] = {}  # (last, term) -> whose disks held it last
        self._cluster: str | None = None
        self._change = (0, Configuration(""))  # the latest that anybody has applied, and where it stands
        self.seen: dict[str, _Seen] = {}  # by host

    # -- a life begins

    def attach(self, host: Host, node: Node) -> None:
        """Watch the program that has just begun on `host`."""
        replica, raft, journal = node.replica, node.replica.raft, node.journal
        seen = _Seen(host.name, node, raft.term, raft.commit, replica.machine.applied, raft.role)
        self.seen[host.name] = seen
        if not raft.doubt:
            if raft.term < self._terms[node.id]:
                self._fail(TERM_BACK, seen, f"{self._terms[node.id]} was told: {raft}")
        else:
            self.met("in doubt")
        if journal.tail_cut:
            self.met("torn tail cut")
        if not raft.doubt:  # what its disk has lost, a leader may still count, until it hears of the doubt
            for holders in self.holders.values():
                holders.discard(node.id)
        for batch in raft.log.batches():
            self._hold(node.id, batch)
        self._digest(seen, replica.machine.applied, replica.machine.table.digest)
        self._wrap(seen, node)

    def _wrap(self, seen: _Seen, node: Node) -> None:
        """Stand in the way of everything that goes in and out of the core."""
        replica, raft, writer = node.replica, node.replica.raft, node.writer
        send, step, read, work_off = replica.send, raft.step, raft.read, replica._work_off
        holds_writes = node.sync.holds_writes
        save, restored, report, apply = writer.save, replica.restored, replica.saved, replica._apply
        waiting: list[tuple[int, list[Batch]]] = []

        def watch_send(message: Message) -> None:
            self._sending(seen, message)
            send(message)

        def watch_step(message: Any, now: float) -> None:
            self._receiving(seen, message)
            step(message, now)

        def watch_read(ticket: int) -> bool:
            seen.reads[ticket] = self.committed
            return read(ticket)

        def watch_work(ready: Ready, now: float) -> None:
            for ticket, index in ready.reads:
                asked_at = seen.reads.pop(ticket, 0)
                if index < asked_at:
                    self._fail(READ_INDEX, seen, f"index {index}, but {asked_at} was committed")
            work_off(ready, now)

        def watch_save(*args: Any, **options: Any) -> int:
            batches = args[1] if len(args) > 1 else options.get("batches", ())
            self._saving(seen, batches)
            ticket = save(*args, **options)
            if batches:
                waiting.append((ticket, list(batches)))
            self._durable(seen, waiting, writer.saved)
            return ticket

        def watch_saved(ticket: int, now: float) -> None:
            self._durable(seen, waiting, ticket)
            report(ticket, now)

        def watch_apply(batch: Batch) -> None:
            before = replica.machine.applied
            apply(batch)
            if replica.machine.applied != before:
                self._applied(seen, batch, replica.machine)

        def watch_restored(machine: Machine) -> None:
            restored(machine)
            self._digest(seen, machine.applied, machine.table.digest)
            seen.applied = machine.applied
            self.met("snapshot installed")

        def watch_holding(now: float) -> bool:
            held = holds_writes(now)
            if held:
                self.met("writes held for a checkpoint")
            return held

        replica.send = watch_send
        replica.saved = watch_saved  # type: ignore[method-assign]
        replica.restored = watch_restored  # type: ignore[method-assign]
        raft.step = watch_step  # type: ignore[method-assign, assignment]
        raft.read = watch_read  # type: ignore[method-assign]
        writer.save = watch_save  # type: ignore[method-assign]
        replica._apply = watch_apply  # type: ignore[method-assign]
        replica._work_off = watch_work  # type: ignore[method-assign]
        node.sync.holds_writes = watch_holding  # type: ignore[method-assign]

    def _fail(self, rule: str, seen: _Seen, what: str) -> None:
        raise Violation(rule, seen.host, what)

    # -- what goes out

    def _sending(self, seen: _Seen, m: Any) -> None:
        if self._note is not None:
            self._note(f"{seen.host} > {m.dst.partition('.')[0]}  {brief(m)}")
        node, kind = seen.node, type(m)
        if kind is Append or kind is InstallSnapshot:
            self._tell_term(seen, m)
            if self._leaders.get(m.term) != m.src and node.replica.raft.role is not Role.LEADER:
                self._fail(ONE_LEADER, seen, f"{m!r}: {self._leaders}")
        elif kind is ElectionRequest:
            if m.ask != seen.ask:
                seen.stalled |= seen.alive
                seen.ask, seen.ask_term, seen.alive = m.ask, m.term, set()
        elif kind is ElectionReply:
            if m.answer == "yield":
                seen.stalled.add(m.dst)  # should that one not win, it was waited for in vain
        elif hasattr(m, "term"):
            self._tell_term(seen, m)
            self._promising(seen, m)

    def _tell_term(self, seen: _Seen, m: Any) -> None:
        if m.term:
            id, state = seen.node.id, seen.node.journal.hard_state
            if m.term > state.term:
                self._fail(TERM_ON_DISK, seen, f"{m!r}, and the disk has {state}")
            if m.term > self._terms[id]:
                self._terms[id] = m.term

    def _promising(self, seen: _Seen, m: Any) -> None:
        """What a message of the rarer kinds, or an acknowledgement, gives away."""
        node, kind = seen.node, type(m)
        if kind is AppendReply:
            if m.ok and m.match:
                held = max(node.journal.last[0], node.replica.machine.table.meta.applied)  # type: ignore[attr-defined]
                if held < m.match:
                    self._fail(ACK_ON_DISK, seen, f"{m!r}, and the disk has {held}")
        elif kind is VoteReply:
            if m.granted:
                self._vote(seen, m.term, m.dst, m.doubt)
                seen.stalled.add(m.dst)  # it is given time to win, once
        elif kind is VoteRequest:
            self._vote(seen, m.term, node.id, node.replica.raft.doubt)
            if not m.transfer and node.replica.raft.election.name == "bully":
                against = seen.alive - seen.stalled
                if against:
                    self._fail(RANK, seen, f"{m!r} against {sorted(against)}")
        elif kind is TimeoutNow:
            self.met("leadership handed over")

    def _vote(self, seen: _Seen, term: int, candidate: str, doubt: bool) -> None:
        node = seen.node
        state = node.journal.hard_state
        kept = state.term > term or (state.term, state.vote) == (term, candidate)
        if not kept:
            self._fail(VOTE_ON_DISK, seen, f"a vote for {candidate} in {term}, and the disk has {state}")
        if not doubt:
            known = self._votes.setdefault((node.id, term), candidate)
            if known != candidate:
                self._fail(ONE_VOTE, seen, f"a vote for {candidate} in {term}, after one for {known}")

    # -- what comes in

    def _receiving(self, seen: _Seen, m: Any) -> None:
        if self._note is not None:
            self._note(f"{seen.host} < {m.src.partition('.')[0]}  {brief(m)}")
        raft = seen.node.replica.raft
        kind = type(m)
        if kind is Append:
            if m.term >= raft.term:
                seen.ask = -1  # who hears a leader waits for no answer any more: what comes late stops nobody
                if seen.alive or seen.stalled:
                    seen.alive, seen.stalled = set(), set()
            if m.term < raft.term:
                self.met("stale leader refused")
            elif m.batches and m.batches[0].first <= raft.log.last_index:
                self._look_for_conflict(raft.log.term_at, m)
        elif kind is ElectionReply:
            has_stood = raft.role is not Role.FOLLOWER and raft.term > seen.ask_term
            if m.answer == "alive" and m.ask == seen.ask and not has_stood:
                seen.alive.add(m.src)
                self.met("stood aside for a higher rank")
        elif kind is VoteReply and m.granted and m.term == raft.term:
            if seen.term != m.term:
                seen.votes = {}
            seen.votes[m.src] = m.doubt
        elif kind is VoteRequest and raft.hears_leader(seen.node.now()) and m.term > raft.term:
            self.met("candidate ignored while a leader is heard")
        elif kind is InstallSnapshot and m.index <= raft.commit:
            self.met("stale snapshot refused")
        elif kind is ReadRequest and raft.role is not Role.LEADER:
            self.met("read asked of no leader")

    def _look_for_conflict(self, term_at: Callable[[int], int | None], m: Append) -> None:
        for batch in m.batches:
            have = term_at(batch.first)
            if have is not None and have != batch.term:
                self.met("conflicting suffix cut")
                return
        self.met("append of what was there")

    # -- what is saved and applied

    def _saving(self, seen: _Seen, batches: Any) -> None:
        log = seen.node.replica.raft.log
        if batches and batches[0].first <= seen.node.journal.last[0]:  # a suffix is cut: it is held here no more
            for (last, _), holders in self.holders.items():
                if last >= batches[0].first:
                    holders.discard(seen.node.id)
        for batch in batches:
            before = log.term_at(batch.first - 1)
            if before is None or log.term_at(batch.last) != batch.term:
                continue
            known = self.batches.setdefault((batch.first, batch.term), (batch.data, before))
            if known != (batch.data, before):
                self._fail(LOG_MATCHING, seen, f"{batch!r} after {before}: {known}")

    def _durable(self, seen: _Seen, waiting: list[tuple[int, list[Batch]]], ticket: int) -> None:
        while waiting and waiting[0][0] <= ticket:
            for batch in waiting.pop(0)[1]:
                if self._note is not None:
                    self._note(f"{seen.host} has saved {batch!r}")
                if seen.node.journal.last[0] >= batch.last:
                    self._hold(seen.node.id, batch)

    def _hold(self, id: str, batch: Batch) -> None:
        self.holders.setdefault((batch.last, batch.term), set()).add(id)

    def _applied(self, seen: _Seen, batch: Batch, machine: Machine) -> None:
        data = batch.data or seen.node.journal.read(batch.first)
        known = self.chosen.setdefault(batch.first, (batch.last, batch.term, data))
        if known != (batch.last, batch.term, data):
            self._fail(MACHINE_SAFETY, seen, f"{batch!r} {data!r}: {known}")
        self._chosen_in.setdefault(batch.first, seen.node.replica.raft.term)
        commit = seen.node.replica.raft.commit
        if not (seen.applied < batch.last <= commit):
            self._fail(APPLIED_BACK, seen, f"{batch!r} after {seen.applied}/{commit}")
        seen.applied = batch.last
        if batch.config is not None and batch.first > self._change[0]:
            self._look_at_change(seen, self._change[1], batch.config)
            self._change = (batch.first, batch.config)
        if self._note is not None:
            self._note(f"{seen.host} applies {batch!r}")
        self._digest(seen, batch.last, machine.table.digest)

    def _digest(self, seen: _Seen, index: int, digest: int) -> None:
        known = self.digests.setdefault(index, digest)
        if known != digest:
            self._fail(DIGEST, seen, f"at {index} it is {digest:016x}, elsewhere {known:016x}")
        if len(self.digests) > DIGESTS_KEPT:
            self.digests.popitem(last=False)

    # -- after each step

    def look(self, host: Host) -> None:
        """Whatever can be seen from outside after a step of the program on `host`."""
        seen = self.seen[host.name]
        raft = seen.node.replica.raft
        if raft.term != seen.term:
            if raft.term < seen.term:
                self._fail(TERM_BACK, seen, f"{seen.term} before: {raft}")
            seen.term = raft.term
            if raft.role is not Role.CANDIDATE:
                seen.votes = {}
        if raft.commit != seen.commit:
            if raft.commit < seen.commit:
                self._fail(COMMIT_BACK, seen, f"{seen.commit} before: {raft}")
            seen.commit = raft.commit
            if raft.role is Role.LEADER and raft.commit > self.committed:
                self._look_at_commit(seen)
            self.committed = max(self.committed, raft.commit)
        if raft.config_index != seen.config_index:
            self._look_at_config(seen)
        if raft.role is not seen.role:
            before, seen.role = seen.role, raft.role
            if self._note is not None:
                self._note(f"{seen.host} is {raft.role.value} in term {raft.term}")
            if raft.role is Role.LEADER:
                self._look_at_leader(seen)
            elif before is Role.LEADER and raft.term == seen.term:
                self.met("leader stepped down by itself")
        if raft.role is Role.LEADER:
            if raft.log.last_index < seen.last:
                self._fail(APPEND_ONLY, seen, f"{seen.last} before: {raft}")
            seen.last = raft.log.last_index
        if seen.node.cluster is not None and self._cluster is None:
            self._cluster = seen.node.cluster
        if seen.node.cluster not in (None, self._cluster):
            self._fail(ONE_CLUSTER, seen, f"{seen.node.cluster}")

    def _look_at_leader(self, seen: _Seen) -> None:
        raft = seen.node.replica.raft
        seen.last = raft.log.last_index
        known = self._leaders.setdefault(raft.term, raft.id)
        if known != raft.id:
            self._fail(ONE_LEADER, seen, f"{raft} after {known}")
        for first, (_, term, _) in self.chosen.items():
            there = (
                self._chosen_in[first] >= raft.term or first <= raft.log.base_index or raft.log.term_at(first) == term
            )
            if not there:
                self._fail(COMPLETENESS, seen, f"{raft} lacks {first}@{term}")
        voters = raft.config_at(raft.log.last_index).voters
        sure = sum(1 for v in voters if v == raft.id or seen.votes.get(v) is False)
        everybody = all(m.id == raft.id or m.id in seen.votes for m in raft.config.members)
        if not (2 * sure > len(voters) or everybody):
            self._fail(ELECTED, seen, f"{raft} of {voters} by {seen.votes}")
        eligible = {id for _, config in raft._configs[-2:] for id in config.voters}
        if raft.id not in eligible:
            self._fail(MEMBER_LEADS, seen, f"{raft} leads {raft.config}")
        if everybody and 2 * sure <= len(voters):
            self.met("elected unanimously out of doubt")
        if any(b.term < raft.term for b in raft.log.batches(raft.commit)[:-1]):
            self.met("elected with uncommitted entries of older terms")

    def _look_at_commit(self, seen: _Seen) -> None:
        raft = seen.node.replica.raft
        if raft.commit <= raft.log.base_index:
            return
        last = raft.log.batch_at(raft.commit)
        if last.term != raft.term:
            self._fail(OWN_TERM, seen, f"{raft} commits {last!r}")
        held = self.holders.get((last.last, last.term), set())
        # A change may have been appended in the very turn in which its predecessor was committed.
        in_force = (raft.config.voters, raft.config_at(raft.commit).voters)
        if not any(2 * len(held.intersection(voters)) > len(voters) for voters in in_force):
            self._fail(MAJORITY, seen, f"{raft}: {last!r} is held by {sorted(held)} of {in_force[0]}")

    def _look_at_config(self, seen: _Seen) -> None:
        raft = seen.node.replica.raft
        seen.config_index = raft.config_index
        if raft.role is Role.LEADER and raft.config_index > raft.commit:
            pending = [config for index, config in raft._configs if index > self.committed]
            own = raft.log.term_at(raft.config_index) == raft.term
            is_first = raft.config_index == 1  # which founds the cluster
            if len(pending) > 1 or (own and not is_first and raft.log.term_at(raft.commit) != raft.term):
                self._fail(ONE_CHANGE, seen, f"{raft}: {pending}")
        # The first stands for all before the log, or before the snapshot, whichever is later: so nothing need follow it.
        for (_, old), (_, new) in zip(raft._configs[1:], raft._configs[2:]):
            self._look_at_change(seen, old, new)
        if len(raft._configs) > 1:
            self._notice_change(raft._configs[-2][1], raft._configs[-1][1])

    def _look_at_change(self, seen: _Seen, old: Configuration, new: Configuration) -> None:
        if old.voters and len(set(old.voters) ^ set(new.voters)) > 1:
            self._fail(OVERLAP, seen, f"{old} to {new}")

    def _notice_change(self, old: Configuration, new: Configuration) -> None:
        before, after = set(old.voters), set(new.voters)
        if after - before and before:
            self.met("learner promoted")
        if before - after:
            self.met("voter removed")
