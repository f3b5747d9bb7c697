"""A whole cluster of `Raft` objects in one thread, under the thumb of a test.

Laws: nothing here happens by itself, and nothing by chance but through `rng`. Time moves when a test moves it, a
message arrives when a test delivers it, a disk finishes when it is let. After every step each rule that Raft proves is
checked over the whole history (class `Rules`), so a test need not look for a violation in order to find one.

A `Peer` is what the replica is in production, at its smallest: it works off each `Ready` in the order save, send, apply,
answer. Its `Disk` keeps *tickets*, one for each Ready; what is not yet written is lost in a crash, and what waits for it
(`after_save`) was then never sent. Its state machine is a chain of checksums: two are equal if all they applied is.

The wire is a list, the oldest message first, so a test may drop, repeat or reorder by editing it. `cut` is a set of
directed pairs over which nothing passes; whether the two notice is the test's choice, as it is TCP's.
"""

from __future__ import annotations

import json
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ddb import codec
from ddb.config import Bounds, Timing
from ddb.election import STRATEGIES
from ddb.errors import invariant
from ddb.messages import (
    Append,
    AppendReply,
    Batch,
    Configuration,
    HardState,
    InstallSnapshot,
    Member,
    RaftMessage,
    Role,
    SnapshotReply,
    VoteReply,
    VoteRequest,
)
from ddb.raft import Raft, Ready
from ddb.raftlog import RaftLog

Record = HardState | Batch | tuple[int, int]
"""What a disk holds: a term and a vote, a batch, or (index, term) of a snapshot after which the log begins anew."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state machine at `index`."""

    index: int = 0
    term: int = 0
    config: Configuration = Configuration("test")
    digest: int = 0

    def to_bytes(self) -> bytes:
        return json.dumps([self.index, self.term, self.config.to_json(), self.digest]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        index, term, config, digest = json.loads(data)
        return cls(index, term, Configuration.from_json(config), digest)


@dataclass(slots=True)
class Ticket:
    """What one Ready handed out for saving, and what waits for it."""

    records: list[Record]
    after_save: list[RaftMessage]

    @property
    def saved(self) -> tuple[int, int, HardState | None]:
        """What to tell `Raft.saved`."""
        batches = [r for r in self.records if isinstance(r, Batch)]
        states = [r for r in self.records if isinstance(r, HardState)]
        index, term = (batches[-1].last, batches[-1].term) if batches else (0, 0)
        return index, term, states[-1] if states else None


@dataclass(slots=True)
class Disk:
    """An append-only log and a snapshot. `writes`: whether tickets are done at once."""

    snapshot: Snapshot
    records: list[Record] = field(default_factory=list)
    queue: deque[Ticket] = field(default_factory=deque)
    writes: bool = True
    pruned: int = 0  # so many records stand for what was dropped before them, and are never lost

    def recover(self) -> tuple[RaftLog, HardState]:
        """The log and the hard state that the durable records amount to."""
        base, state, batches = (0, 0), HardState(), list[Batch]()
        for record in self.records:
            if isinstance(record, HardState):
                state = record
            elif isinstance(record, Batch):
                while batches and batches[-1].first >= record.first:
                    batches.pop()
                batches.append(record)
            else:
                base, batches = record, []
        by_first = {b.first: b.data for b in batches}
        log = RaftLog(by_first.__getitem__, *base, batches)
        if log.term_at(self.snapshot.index) != self.snapshot.term:  # the snapshot knows more than the log
            log.reset(self.snapshot.index, self.snapshot.term)
        return log, state

    def forget(self, count: int) -> None:
        """Lose the last `count` durable records, as a lying disk does; what is left knows that it is in doubt."""
        count = min(count, len(self.records) - self.pruned)
        if count > 0:
            del self.records[-count:]
            _, state = self.recover()
            self.records.append(replace(state, doubt=True))

    def prune(self, upto: int) -> None:
        """Drop what lies wholly below `upto`, as the log drops segments."""
        log, state = self.recover()
        log.compact(upto)
        self.records = [state, (log.base_index, log.base_term), *log.batches()]
        self.pruned = 2


class Peer:
    """One member: a Raft core, a disk and a state machine. `raft` is None while it is down."""

    def __repr__(self) -> str:
        return f"{self.raft!r} applied={self.applied}" if self.raft else f"{self.id} down"

    def __init__(self, net: Net, id: str, name: str, config: Configuration) -> None:
        self.net = net
        self.id = id
        self.name = name
        self.disk = Disk(Snapshot(config=config))
        self.raft: Raft | None = None
        self.applied = 0
        self.digest = 0
        self.answered: list[tuple[int, int]] = []  # reads: (ticket, index) once applied so far
        self._reads: list[tuple[int, int]] = []
        self.diverged = False  # the state is known to be wrong, and waits for the leader's
        self.sending: dict[str, float] = {}  # snapshots under way: to whom, since when

    @property
    def up(self) -> Raft:
        """The core of a peer that runs."""
        assert self.raft is not None, f"{self.id} is down"
        return self.raft

    def start(self) -> None:
        """Begin from what the disk holds."""
        log, state = self.disk.recover()
        snapshot = self.disk.snapshot
        if log.base_index == snapshot.index and snapshot.index:
            self.disk.records = [state, (log.base_index, log.base_term), *log.batches()]
        net = self.net
        strategy = STRATEGIES[net.election](net.timing.election_timeout_s, random.Random(net.rng.random()))
        self.applied, self.digest = snapshot.index, snapshot.digest
        self._reads, self.answered = [], []
        self.diverged = False
        self.raft = Raft(
            self.id, self.name, log, state, snapshot.config, strategy, net.now,
            applied=snapshot.index, timing=net.timing, bounds=net.bounds,
        )  # fmt: skip
        net.rules.started(self)

    def crash(self, torn: int = 0) -> None:
        """Stop at once. Of what was being written `torn` records happen to be on disk."""
        unfinished = [r for ticket in self.disk.queue for r in ticket.records][:torn]
        self.disk.records += unfinished
        self.net.rules.durable(self, unfinished)
        self.disk.queue.clear()
        self.raft = None

    def work(self) -> None:
        """Work off a Ready: save, send, apply, answer."""
        raft = self.up
        ready = raft.ready(self.net.now)
        self.net.rules.handed_out(self, ready)
        self._save(ready)
        self.net.post(ready.messages)
        for batch in ready.committed:
            if not self.diverged:
                self._apply(batch)
        self._reads += ready.reads
        for chunk in ready.chunks:
            self._on_chunk(chunk)
        for peer in ready.needs_snapshot:
            self._send_snapshot(peer)
        self.answered += [(t, i) for t, i in self._reads if i <= self.applied]
        self._reads = [(t, i) for t, i in self._reads if i > self.applied]

    def write(self) -> bool:
        """Finish the oldest ticket. Returns whether there was one."""
        if not self.disk.queue:
            return False
        ticket = self.disk.queue.popleft()
        self.disk.records += ticket.records
        self.net.rules.durable(self, ticket.records)
        self.up.saved(*ticket.saved, self.net.now)
        self.net.post(ticket.after_save)
        return True

    def checkpoint(self, keep: int = 0) -> None:
        """Snapshot the state, and drop the log below it but for a tail of `keep` entries."""
        raft = self.up
        term = raft.log.term_at(self.applied)
        if term is None or self.diverged or raft.durable < self.applied or self.applied <= self.disk.snapshot.index:
            return
        self.disk.snapshot = Snapshot(self.applied, term, raft.config_at(self.applied), self.digest)
        if self.applied > keep:
            raft.compact(self.applied - keep)
            self.disk.prune(self.applied - keep)

    def distrust(self) -> None:
        """The state here proves wrong: apply nothing more, until the leader's snapshot has replaced it."""
        self.diverged = True
        self.digest = -1
        self.up.may_stand = False
        self.up.resign()

    def give_up_snapshots(self) -> None:
        """A snapshot that has not arrived within a time-out was lost on the way."""
        for peer, since in list(self.sending.items()):
            if self.net.now - since > self.net.timing.election_timeout_s:
                del self.sending[peer]
                self.up.snapshot_failed(peer)

    def _save(self, ready: Ready) -> None:
        records: list[Record] = [ready.hard_state] if ready.hard_state else []
        records += [ready.reset] if ready.reset else []
        records += ready.batches
        if records or (ready.after_save and self.disk.queue):
            self.disk.queue.append(Ticket(records, ready.after_save))
        else:
            self.net.post(ready.after_save)

    def _apply(self, batch: Batch) -> None:
        invariant(batch.first == self.applied + 1, "batches are applied in order, none left out, none twice")
        self.digest = zlib.crc32(batch.data, self.digest)
        self.applied = batch.last
        self.net.rules.applied(self, batch)

    def _send_snapshot(self, peer: str) -> None:
        self.checkpoint(keep=self.applied)
        raft, snapshot = self.up, self.disk.snapshot
        data = snapshot.to_bytes()
        self.sending[peer] = self.net.now
        self.net.post([InstallSnapshot(
            self.id, peer, raft.term, snapshot.index, snapshot.term, 0, len(data), "", data
        )])  # fmt: skip

    def _on_chunk(self, chunk: InstallSnapshot | SnapshotReply) -> None:
        raft = self.up
        if isinstance(chunk, SnapshotReply):
            if chunk.installed:
                raft.snapshot_sent(chunk.src, chunk.index)
            return
        snapshot = Snapshot.from_bytes(chunk.data)
        behind = snapshot.index > raft.commit
        if behind or (self.diverged and snapshot.index >= raft.log.base_index):
            self.disk.snapshot = snapshot
            self.diverged, raft.may_stand = False, True
            if behind:
                raft.restore(snapshot.index, snapshot.term, snapshot.config)
            else:
                raft.reapply(snapshot.index)
            self.applied, self.digest = snapshot.index, snapshot.digest
            self.net.rules.restored(self, snapshot)
            self.work()
        self.net.post([SnapshotReply(self.id, chunk.src, chunk.term, chunk.index, chunk.size, True)])


class Net:
    """The cluster. `Net(3)` has peers n1, n2, n3, all voters and all connected; or give their names.

    `election`: the strategy's name. `seed`: of every chance taken. `start=False` leaves the peers down, so that their
    disks can be prepared.
    """

    def __init__(
        self,
        members: int | str | Iterable[str] = 3,
        election: str = "raft",
        seed: int = 0,
        learners: str | Iterable[str] = (),
        timing: Timing | None = None,
        bounds: Bounds | None = None,
        start: bool = True,
    ) -> None:
        voters = [f"n{i + 1}" for i in range(members)] if isinstance(members, int) else list(members)
        self.rng = random.Random(seed)
        self.election = election
        self.timing = timing or Timing()
        self.bounds = bounds or Bounds()
        self.now = 0.0
        self.wire: list[RaftMessage] = []
        self.cut: set[tuple[str, str]] = set()
        self.dropped = 0
        self.rules = Rules(self)
        self.on_deliver: Callable[[RaftMessage], None] | None = None
        self.peers: dict[str, Peer] = {}
        ids = [(id, True) for id in voters] + [(id, False) for id in learners]
        self.first_config = Configuration("test", election, tuple(Member(id, id, id, v) for id, v in sorted(ids)))
        for id, _ in ids:
            self.peers[id] = Peer(self, id, id, self.first_config)
        self.links: set[frozenset[str]] = set()
        if start:
            for id in self.peers:
                self.start(id)

    # --- looking ------------------------------------------------------------------------------------------------

    def __getitem__(self, id: str) -> Raft:
        return self.peers[id].up

    @property
    def running(self) -> list[Peer]:
        """The peers that are up, sorted."""
        return [p for _, p in sorted(self.peers.items()) if p.raft is not None]

    @property
    def leader(self) -> str | None:
        """The leader of the highest term, if any."""
        leaders = [p.up for p in self.running if p.up.role is Role.LEADER]
        return max(leaders, key=lambda r: r.term).id if leaders else None

    @property
    def leading(self) -> Raft:
        """The leader's core."""
        assert self.leader is not None, "nobody leads"
        return self[self.leader]

    # --- one step at a time -------------------------------------------------------------------------------------

    def start(self, id: str) -> None:
        """Start a peer that is down, and connect it to whoever is up and not cut off."""
        self.peers[id].start()
        for other in self.running:
            if other.id != id:
                self._link(id, other.id)
        self.look_after(id)

    def join(self, id: str) -> None:
        """Start a peer that no configuration knows yet."""
        self.peers[id] = Peer(self, id, id, Configuration("test", self.election))
        self.start(id)

    def crash(self, id: str, torn: int = 0, forget: int = 0, noticed: bool = True) -> None:
        """Kill a peer. `forget`: so many records that were durable are gone, and it will know that it is in doubt."""
        self.peers[id].crash(torn)
        self.peers[id].disk.forget(forget)
        self.wire = [m for m in self.wire if m.dst != id]
        for other in self.running:
            self._unlink(id, other.id, noticed)

    def tick(self, id: str | None = None, seconds: float = 0.0) -> None:
        """Let `seconds` pass, and tell `id` (or everybody) of it."""
        self.now += seconds
        for peer in [self.peers[id]] if id else self.running:
            peer.up.tick(self.now)
            peer.give_up_snapshots()
            self.look_after(peer.id)

    def deliver(self, position: int = 0, repeat: bool = False) -> bool:
        """Deliver the message at `position` of the wire; with `repeat` it stays there too. False where none is."""
        if not self.wire:
            return False
        message = self.wire[position] if repeat else self.wire.pop(position)
        return self.hand(message)

    def hand(self, message: RaftMessage) -> bool:
        """Deliver `message`, wherever it comes from."""
        peer = self.peers.get(message.dst)
        if peer is None or peer.raft is None or (message.src, message.dst) in self.cut:
            self.dropped += 1
            return True
        if self.on_deliver:
            self.on_deliver(message)
        peer.raft.step(message, self.now)
        self.look_after(peer.id)
        return True

    def write(self, id: str) -> bool:
        """Let the disk of `id` finish its oldest ticket. Returns whether there was one."""
        did = self.peers[id].write()
        if did:
            self.look_after(id)
        return did

    def post(self, messages: Iterable[RaftMessage]) -> None:
        """Put `messages` on the wire."""
        for message in messages:
            self.rules.sent(message)
            self.wire.append(message)

    # --- many steps ---------------------------------------------------------------------------------------------

    def settle(self, keep: Callable[[RaftMessage], bool] | None = None) -> None:
        """Deliver everything, and what comes of it, without time passing. `keep` names messages to leave on the wire."""
        for _ in range(20_000):
            position = next((i for i, m in enumerate(self.wire) if not keep or not keep(m)), None)
            if position is None:
                return
            self.deliver(position)
        raise AssertionError(f"the cluster doesn't come to rest: {self.wire[:5]}")

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass tick by tick, delivering everything. Returns whether `until` came true (then it stops)."""
        for _ in range(max(1, round(seconds / self.timing.tick_s))):
            if until and until():
                return True
            self.tick(seconds=self.timing.tick_s)
            self.settle()
        return bool(until and until())

    def elect(self, id: str | None = None, within: float = 20.0) -> Raft:
        """Wait for a leader; or make `id` the leader, by having it told to stand. Returns its core."""
        if id is None:
            assert self.run(within, lambda: self.leader is not None and self.leading.has_committed_in_term), (
                self.running
            )
            return self.leading
        raft = self[id]
        self.provoke(id)
        self.settle()
        assert raft.role is Role.LEADER, f"{id} was not elected"
        return raft

    def provoke(self, id: str, transfer: bool = True) -> None:
        """Make `id` a candidate at once, without asking anybody, if it may be one. Nothing is delivered."""
        if self[id]._is_eligible:
            self[id]._stand(self.now, transfer)
            self.look_after(id)

    def put(self, value: object = "v", count: int = 1, id: str | None = None) -> Batch:
        """Propose a batch of `count` writes at the leader (or at `id`). Nothing is delivered."""
        raft = self[id] if id else self.leading
        commands = [["put", "k", value]] * count
        batch = raft.propose([json.dumps(c, separators=(",", ":")).encode() for c in commands], commands, 0)
        self.look_after(raft.id)
        return batch

    def change(self, config: Configuration) -> Batch:
        """Propose `config` at the leader."""
        batch = self.leading.change(config, 0)
        self.look_after(self.leading.id)
        return batch

    def read(self, id: str, ticket: int) -> bool:
        """Ask `id` for a linearizable read; the answer must not be older than what anybody has committed by now."""
        asked = self[id].read(ticket)
        if asked:
            self.rules.reading(id, ticket)
            self.look_after(id)
        return asked

    def isolate(self, *ids: str, noticed: bool = False) -> None:
        """Cut `ids` off from the rest (not from each other)."""
        for a in self.peers:
            for b in self.peers:
                if (a in ids) != (b in ids):
                    self.cut.add((a, b))
        if noticed:
            for a in ids:
                for b in self.peers.keys() - set(ids):
                    self._unlink(a, b, True)

    def heal(self) -> None:
        """Mend every cut, and connect everybody who is up."""
        self.cut.clear()
        for a in self.running:
            for b in self.running:
                if a.id < b.id:
                    self._link(a.id, b.id)

    def disconnect(self, a: str, b: str) -> None:
        """Break the connection between two; what was on it is lost. Whoever is up connects again at once."""
        self.wire = [m for m in self.wire if {m.src, m.dst} != {a, b}]
        self._unlink(a, b, noticed=True)
        self._link(a, b)

    def _link(self, a: str, b: str) -> None:
        if (a, b) in self.cut or (b, a) in self.cut:
            return
        self.links.add(frozenset((a, b)))
        for x, y in ((a, b), (b, a)):
            self[x].connected(y)
            self.look_after(x)

    def _unlink(self, a: str, b: str, noticed: bool) -> None:
        if frozenset((a, b)) not in self.links:
            return
        self.links.discard(frozenset((a, b)))
        for x, y in ((a, b), (b, a)):
            raft = self.peers[x].raft
            if noticed and raft is not None:
                raft.disconnected(y, self.now)
                if y in raft.progress:
                    raft.snapshot_failed(y)
                self.look_after(x)

    def look_after(self, id: str) -> None:
        """Work off what `id` has to do, let its disk finish if it `writes`, and check the rules."""
        peer = self.peers[id]
        peer.work()
        while peer.disk.writes and peer.write():
            peer.work()
        self.rules.look(peer)


class Rules:
    """What Raft promises (figure 3 of the paper, and more), checked over the whole history of a Net."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.leaders: dict[int, str] = {}  # term -> leader
        self.batches: dict[tuple[int, int], tuple[bytes, int]] = {}  # (first, term) -> data, term before
        self.holders: dict[tuple[int, int], set[str]] = {}  # (last, term) -> whose disks ever held it
        self.chosen: dict[int, tuple[Batch, int]] = {}  # first -> the committed batch, digest after it
        self.digests: dict[int, int] = {0: 0}  # last -> digest
        self.votes: dict[tuple[str, int], str] = {}  # (voter, term) -> candidate, where sent without doubt
        self.committed = 0  # the highest index that anybody ever knew to be committed
        self.reads: dict[tuple[str, int], int] = {}  # (peer, ticket) -> what was committed when it was asked
        self.answers: dict[str, list[tuple[int, int]]] = {}  # peer -> its reads that were answered: (ticket, index)
        self._seen: dict[str, tuple[int, int]] = {}  # id -> (commit, term) at the last look
        self._led: set[tuple[str, int]] = set()

    def started(self, peer: Peer) -> None:
        self._seen[peer.id] = (peer.up.commit, peer.up.term)
        self._led = {(id, term) for id, term in self._led if id != peer.id}

    def handed_out(self, peer: Peer, ready: Ready) -> None:
        """Log Matching (§5.3): one (index, term), one batch, and before it the same."""
        log = peer.up.log
        for batch in ready.batches:
            if log.term_at(batch.first - 1) is None or log.term_at(batch.last) != batch.term:
                continue
            known = self.batches.setdefault((batch.first, batch.term), (batch.data, log.term_at(batch.first - 1) or 0))
            invariant(known == (batch.data, log.term_at(batch.first - 1) or 0), "Log Matching (§5.3)")

    def durable(self, peer: Peer, records: list[Record]) -> None:
        for record in records:
            if isinstance(record, Batch):
                self.holders.setdefault((record.last, record.term), set()).add(peer.id)

    def restored(self, peer: Peer, snapshot: Snapshot) -> None:
        invariant(self.digests[snapshot.index] == snapshot.digest, "a snapshot is the state at its index")

    def applied(self, peer: Peer, batch: Batch) -> None:
        """State Machine Safety (§5.4.3)."""
        chosen = self.chosen.setdefault(batch.first, (batch, peer.digest))
        self.digests.setdefault(batch.last, peer.digest)
        invariant(
            chosen[0] == batch and chosen[1] == peer.digest,
            f"State Machine Safety (§5.4.3): {peer.id} applies {batch} where {chosen[0]} was applied",
        )

    def sent(self, m: RaftMessage) -> None:
        """Votes and acknowledgements are on disk before they leave (figure 2); one vote a term (§5.2)."""
        disk = self.net.peers[m.src].disk
        if isinstance(m, VoteReply) and m.granted:
            self._vote(m.src, m.term, m.dst, m.doubt)
            _, state = disk.recover()
            on_disk = state.term > m.term or (state.term == m.term and state.vote == m.dst)
            invariant(on_disk, f"a vote is on disk before it is sent: {m}, {state}")
        elif isinstance(m, VoteRequest):
            self._vote(m.src, m.term, m.src, self.net[m.src].doubt)
        elif isinstance(m, AppendReply) and m.ok and m.match:
            log, _ = disk.recover()
            invariant(max(log.last_index, disk.snapshot.index) >= m.match, f"what is acknowledged is on disk: {m}")

    def _vote(self, voter: str, term: int, candidate: str, doubt: bool) -> None:
        if not doubt:
            invariant(
                self.votes.setdefault((voter, term), candidate) == candidate,
                f"{voter} votes once in term {term} (§5.2)",
            )

    def reading(self, id: str, ticket: int) -> None:
        self.reads[id, ticket] = self.committed

    def look(self, peer: Peer) -> None:
        """Whatever can be seen from outside after a step of `peer`."""
        raft = peer.up
        commit, term = self._seen[peer.id]
        invariant(raft.commit >= commit, "the commit index never goes back")
        invariant(raft.term >= term, "the term never goes back")
        self._seen[peer.id] = (raft.commit, raft.term)
        if raft.role is Role.LEADER:
            self._look_at_leader(peer, raft)
        self.committed = max(self.committed, raft.commit)
        self.answers.setdefault(peer.id, []).extend(peer.answered)
        for ticket, index in peer.answered:
            invariant(
                index >= self.reads.get((peer.id, ticket), 0),
                f"a read sees all that was committed when it was asked (diss. §6.4): {peer.id} #{ticket}",
            )
        peer.answered.clear()

    def _look_at_leader(self, peer: Peer, raft: Raft) -> None:
        """Election Safety (§5.2), Leader Completeness (§5.4.3), and a majority behind what is committed (§5.3)."""
        if (raft.id, raft.term) not in self._led:
            self._led.add((raft.id, raft.term))
            invariant(
                self.leaders.setdefault(raft.term, raft.id) == raft.id, f"Election Safety (§5.2): term {raft.term}"
            )
            for first, (batch, _) in self.chosen.items():
                invariant(
                    first <= raft.log.base_index or raft.log.term_at(first) == batch.term,
                    f"Leader Completeness (§5.4): {raft} lacks {batch}",
                )
        if raft.commit > self.committed and raft.commit > raft.log.base_index:
            last = raft.log.batch_at(raft.commit)
            held = self.holders.get((last.last, last.term), set())
            voters = raft.config.voters
            invariant(
                last.term == raft.term, "only an entry of the leader's own term is committed by counting (§5.4.2)"
            )
            invariant(
                2 * len(held.intersection(voters)) > len(voters),
                f"what is committed is on the disks of a majority of the voters: {last} on {sorted(held)}",
            )


# --- preparing a disk ----------------------------------------------------------------------------------------------------


def entry(index: int, term: int, count: int = 1) -> Batch:
    """The batch of `count` writes that the leader of `term` would have made at `index`."""
    commands = [["put", "k", f"{index}@{term}"]] * count
    texts = [json.dumps(c, separators=(",", ":")).encode() for c in commands]
    return codec.encode_batch(index, term, 0, texts, commands)


def with_log(net: Net, id: str, terms: Iterable[int], term: int | None = None, vote: str | None = None) -> None:
    """Give `id`, which is down, a log whose entries have these `terms`, and the hard state (`term`, `vote`)."""
    batches = [entry(i, t) for i, t in enumerate(terms, 1)]
    term = term if term is not None else (batches[-1].term if batches else 0)
    disk = net.peers[id].disk
    disk.records = [HardState(term, vote), *batches]
    before = 0
    for batch in batches:
        net.rules.batches.setdefault((batch.first, batch.term), (batch.data, before))
        net.rules.holders.setdefault((batch.last, batch.term), set()).add(id)
        before = batch.term


def terms(raft: Raft) -> list[int]:
    """The term of every entry in the log of `raft`, from its base on."""
    return [b.term for b in raft.log.batches() for _ in range(b.first, b.last + 1)]


def appends(net: Net, dst: str | None = None) -> list[Append]:
    """The appends on the wire (to `dst`)."""
    return [m for m in net.wire if isinstance(m, Append) and dst in (None, m.dst)]


# --- what many tests begin with ------------------------------------------------------------------------------------------


def led_by(id: str, size: int, election: str, learners: Iterable[str] = ()) -> Net:
    """A cluster in which `id` leads in term 1, everybody has its no-op, and knows that it is committed."""
    net = Net(size, election, learners=learners)
    net.elect(id)
    net.run(0.2)
    return net


def append(net: Net, src: str, dst: str, prev: tuple[int, int], *batches: Batch) -> None:
    """Deliver an Append to `dst` that `src` could have sent in its term."""
    net.hand(Append(src, dst, net[src].term, *prev, 0, 0, batches))


Kind = TypeVar("Kind", bound=RaftMessage)


def take(net: Net, kind: type[Kind], dst: str | None = None) -> list[Kind]:
    """Take the messages of one kind (to `dst`) off the wire."""
    taken = [m for m in net.wire if isinstance(m, kind) and dst in (None, m.dst)]
    net.wire = [m for m in net.wire if m not in taken]
    return taken
