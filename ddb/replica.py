"""One member: consensus, election, state machine and storage, in the one right order: **save, send, apply, answer**.

Laws:

* Nothing here reads a clock, a socket, a file or a thread. Time comes in with each call, messages go out through `send`,
  and the disk is a `Journal` that calls back. So the code that serves is the code that is simulated.
* A client is answered from the committed log alone: a write when the entry at its (term, index) has been
  applied, a read when a confirmed index has been. An entry that another leader's overwrote was never done, so it is
  proposed again; what may have been done and can't be known is a `Timeout`, never a success and never "not done".
* Work is done per turn and per batch. `write` and `read` only queue; `flush`, once a turn, turns the queues into
  one batch, one message to each follower, one save, one confirmation of leadership.

Theory. Writes and reads of clients come in on any member. A queue holds them until the member knows what to do
with them: the leader proposes writes as long as few batches are on their way (while these are, the next one
grows: that is group commit), a follower forwards them, and without a leader they wait for one until their time
is up. Reads take a ticket from Raft (ReadIndex) and are answered here, from this member's own state, when it has
caught up with the ticket's index.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ddb import backlog, codec, kv, wire
from ddb.commands import well_formed
from ddb.config import Bounds
from ddb.errors import BadRequest, Compacted, CorruptStore, DdbError, NoLeader, Overloaded, ReadOnly, Timeout
from ddb.messages import (
    Append,
    Batch,
    Call,
    CallReply,
    Command,
    Configuration,
    Forward,
    ForwardReply,
    HardState,
    Message,
    RaftMessage,
    Role,
)
from ddb.raft import NOTHING, Raft, Ready

log = logging.getLogger(__name__)

EXPIRE_EVERY_S = 0.05
DIGESTS_KEPT = 4096
READS_BYTES_UNCHECKED = 1 << 20  # replies this small in sum are given without a look at who has room for them


class Waiter(Protocol):
    """Somebody who waits for a reply. `deadline` is in seconds of the replica's clock."""

    deadline: float

    @property
    def done(self) -> bool:
        """Whether it has its reply."""

    def reply(self, body: bytes) -> None:
        """Hand over the reply, an encoded JSON object. A second one is ignored."""

    def fail(self, error: DdbError) -> None:
        """Hand over a failure instead."""


class Reader(Waiter, Protocol):
    """Somebody who waits for what a read finds."""

    @property
    def has_room(self) -> bool:
        """Whether a reply of any size may be given now."""


class Journal(Protocol):
    """The log's writer. It reports each ticket back, in order, to `Replica.saved`; what it saved in place, at once.

    `saved` is the highest ticket that is durable.
    """

    saved: int

    def save(
        self,
        hard_state: HardState | None,
        batches: Sequence[Batch] = (),
        reset: tuple[int, int] | None = None,
        *,
        in_place: bool = False,
    ) -> int:
        """Make these durable: soon, or `in_place`, before this returns, where that can be. Returns the ticket."""


class Snapshots(Protocol):
    """The snapshot's side of a member (snapshots.py)."""

    def applied(self, batch: Batch) -> None:
        """`batch` was applied."""

    def work(self, ready: Ready, now: float) -> None:
        """See to `ready.needs_snapshot` and `ready.chunks`."""

    def holds_writes(self, now: float) -> bool:
        """Whether the leader should propose nothing just now, so that the disk can keep up."""


Write = tuple[bytes, Command, Waiter]
Read = tuple[Command, Reader]


@dataclass(slots=True)
class _Saving:
    """What becomes true, and may be sent, when the journal reports `ticket`."""

    ticket: int
    index: int
    term: int
    hard_state: HardState | None
    messages: list[RaftMessage]


class _ForwardedPart:
    """One of the writes that a follower forwarded; the last to be answered sends the reply for all."""

    __slots__ = ("deadline", "done", "group", "position")

    def __init__(self, group: _ForwardedGroup, position: int, deadline: float) -> None:
        self.group = group
        self.position = position
        self.deadline = deadline
        self.done = False

    def reply(self, body: bytes) -> None:
        if not self.done:
            self.done = True
            self.group.take(self.position, body)

    def fail(self, error: DdbError) -> None:
        self.reply(wire.failure(error))


class _ForwardedGroup:
    """The writes of one Forward, answered together."""

    __slots__ = ("missing", "replica", "replies", "request")

    def __init__(self, replica: Replica, request: Forward) -> None:
        self.replica = replica
        self.request = request
        self.replies = [b""] * len(request.entries)
        self.missing = len(request.entries)

    def take(self, position: int, body: bytes) -> None:
        self.replies[position] = body
        self.missing -= 1
        if not self.missing:
            m = self.request
            self.replica.send(ForwardReply(m.dst, m.src, m.ticket, tuple(self.replies)))


class Replica:
    """One member of the cluster, but for its sockets, clocks and disks.

    `first_ticket` should be one that no earlier life of this member used: the leader may still answer what that one
    asked, and another's reply would be taken for this one's.

    `read_batch(first)` returns a batch's bytes from the log on disk. `wall_ms()` is the time that a leader stamps
    into entries.
    """

    def __init__(
        self,
        raft: Raft,
        machine: kv.Machine,
        journal: Journal,
        send: Callable[[Message], None],
        read_batch: Callable[[int], bytes],
        wall_ms: Callable[[], int],
        bounds: Bounds | None = None,
        first_ticket: int = 0,
    ) -> None:
        self.raft = raft
        self.machine = machine
        self.send = send
        self.bounds = bounds or Bounds()
        self.snapshots: Snapshots | None = None
        # What was sent leaves now: before the journal's thread wakes up, and competes for the interpreter with each
        # system call that sends. The followers' disks are the longer way. A lone put takes a fifth less time for it.
        self.push: Callable[[], None] = lambda: None
        # Called before a configuration goes to the log: so it is remembered longer than the log may be.
        self.remember: Callable[[Configuration], None] = lambda config: None
        # How a read is answered: from the table, and where a chronicle is kept, from that (chronicle.py).
        self.look_up: Callable[[kv.Table, Command, int], bytes] = kv.answer
        self.diverged = False  # the state here is known to be wrong: nothing is answered from it
        self.read_only = False  # the disk here is full: see `full`
        self._journal = journal
        self._read_batch = read_batch
        self._wall_ms = wall_ms
        self._saving: deque[_Saving] = deque()
        self._writes: deque[Write] = deque()
        self._writes_bytes = 0  # of the entries in that queue
        self._proposed: deque[tuple[int, int, list[Write]]] = deque()  # (first, term, its writes), in log order
        self._forwarded: dict[int, tuple[str, list[Write]]] = {}  # by ticket: to whom, and what
        self._reads: list[Read] = []
        self._reads_asked: dict[int, tuple[float, list[Read]]] = {}  # by ticket: when, and which
        self._reads_applying: deque[tuple[int, list[Read]]] = deque()
        self._deferred_due = False  # a tick has passed: often enough to look for room
        self._reads_deferred: list[Read] = []  # could be answered, but the reader has much to take already
        self._changes: list[tuple[int, int, Waiter]] = []  # (index, term) of configurations somebody waits for
        self._tickets = first_ticket
        self._reachable: set[str] = set()
        self._leading = (raft.term, raft.leader)
        self._led_since = 0.0
        self._leader_shown: tuple[int, str | None, int] | None = None
        self._leader_field = b""
        self._expire_at = 0.0
        self._digests: dict[int, int] = {}
        self._digest_expected: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"{self.raft!r} applied={self.machine.applied}"

    # --- what clients want --------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this member leads, as far as it knows."""
        return self.raft.role is Role.LEADER

    def reaches(self, peer: str) -> bool:
        """Whether a connection to `peer` stands."""
        return peer in self._reachable

    def write(self, entry: bytes, command: Command, waiter: Waiter) -> None:
        """Have `entry` (which encodes `command`) committed, and `waiter` told the outcome."""
        if self._is_full:
            waiter.fail(Overloaded("Too many writes are waiting on this node; try again in a moment."))
            return
        self._writes.append((entry, command, waiter))
        self._writes_bytes += len(entry)

    def read(self, command: Command, waiter: Reader) -> None:
        """Answer `command` from a state that has all writes acknowledged before now."""
        if len(self._reads) >= self.bounds.reads_waiting_max:
            waiter.fail(Overloaded("Too many reads are waiting on this node; try again in a moment."))
            return
        self._reads.append((command, waiter))

    def read_stale(self, command: Command, waiter: Waiter, now: float) -> None:
        """Answer `command` from this member's own state as it is, and say how old that may be."""
        lag_s = self.raft.lag_s(now)
        lag = b'"lag":null' if lag_s == float("inf") else b'"lag":%.3f' % lag_s
        self._answer_read(command, waiter, lag)

    def change(self, config: Configuration, waiter: Waiter) -> None:
        """Make `config` the configuration; `waiter` is told when it is committed. Raises what Raft.change raises."""
        batch = self.raft.change(config, self._wall_ms())
        self._changes.append((batch.first, batch.term, waiter))

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not (
            self._writes or self._proposed or self._forwarded or self._reads or self._reads_asked
            or self._reads_applying or self._reads_deferred or self._changes
        )  # fmt: skip

    # --- what happens to a member -------------------------------------------------------------------------------

    def step(self, m: Message, now: float) -> None:
        """Take in a message of another member."""
        if isinstance(m, Forward):
            self._on_forward(m, now)
        elif isinstance(m, ForwardReply):
            self._on_forward_reply(m)
        elif not isinstance(m, Call) and not isinstance(m, CallReply):  # those are the node's
            self.raft.step(m, now)
            if type(m) is Append and m.digest is not None:
                self._digest_expected = m.digest
                self._compare_digest()

    def tick(self, now: float) -> None:
        """Let time pass."""
        self.raft.tick(now)
        self._deferred_due = True
        if self.raft.role is Role.LEADER and not self.diverged:
            self.raft.digest = (self.machine.applied, self.machine.table.digest)
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_EVERY_S
            self._expire(now)

    def connected(self, peer: str) -> None:
        """A connection to `peer` stands."""
        self._reachable.add(peer)
        self.raft.connected(peer)

    def disconnected(self, peer: str, now: float) -> None:
        """The connection to `peer` broke. What was forwarded to it may have been done, or not."""
        self._reachable.discard(peer)
        self.raft.disconnected(peer, now)
        for ticket in [t for t, (leader, _) in self._forwarded.items() if leader == peer]:
            for _, _, waiter in self._forwarded.pop(ticket)[1]:
                waiter.fail(Timeout("The leader was lost while it worked on the write; it may have been done or not."))

    def saved(self, ticket: int, now: float) -> None:
        """The journal reports that all saves up to `ticket` are durable."""
        while self._saving and self._saving[0].ticket <= ticket:
            saving = self._saving.popleft()
            self.raft.saved(saving.index, saving.term, saving.hard_state, now)
            for message in saving.messages:
                self.send(message)

    def full(self, full: bool) -> None:
        """The disk here has no room any more (or has some again): this member leads only while nobody else can, for the
        reads, and then refuses what is new. What it has proposed already may yet be done."""
        self.read_only = full
        self.raft.may_stand = not full and not self.diverged

    def restored(self, machine: kv.Machine) -> None:
        """A snapshot has replaced the state. Whoever waits for an entry that it covers can't be told its outcome."""
        self.machine = machine
        self.diverged = False
        self.raft.may_stand = not self.read_only
        self._digests.clear()
        while self._proposed and self._proposed[0][0] <= machine.applied:
            for _, _, waiter in self._proposed.popleft()[2]:
                waiter.fail(
                    Timeout("This node was replaced by a snapshot meanwhile; the write may have been done or not.")
                )
        self._answer_reads()

    def flush(self, now: float) -> None:
        """Do all the work that has come up since the last call, in the right order."""
        raft = self.raft
        if (raft.term, raft.leader, raft.config_index) != self._leader_shown:
            self._notice_leader(now)
        if self._writes:
            self._route_writes(now)
        if self._reads:
            self._ask_for_reads(now)
        ready = raft.ready(now)
        if ready is not NOTHING:
            self._work_off(ready, now)
        if self._reads_applying or (self._reads_deferred and self._deferred_due):
            self._answer_reads()
        if self.snapshots is not None:
            self.snapshots.work(ready, now)

    def _work_off(self, ready: Ready, now: float) -> None:
        """Save, send, apply; who may be answered is noted."""
        for message in ready.messages:
            self.send(message)
        if ready.batches and ready.messages:
            self.push()
        self._save(ready, now)
        if not (self.machine.table.cold or backlog.is_long(ready.committed)):
            for batch in ready.committed:
                self._apply(batch)
        else:
            for batches in backlog.groups(ready.committed, self._read_batch):
                self.machine.table.prefetch(backlog.keys(batches))
                for batch in batches:
                    self._apply(batch)
        for ticket, index in ready.reads:
            if asked := self._reads_asked.pop(ticket, None):
                self._reads_applying.append((index, asked[1]))

    # --- writes -------------------------------------------------------------------------------------------------

    def _notice_leader(self, now: float) -> None:
        """When the leader changes, whatever was asked of the old one has to be asked again."""
        raft = self.raft
        self._leader_shown = (raft.term, raft.leader, raft.config_index)
        leader = raft.config.member(raft.leader) if raft.leader else None
        self._leader_field = b'"leader":%b' % wire.encode_string(leader.address) if leader else b""
        if (raft.term, raft.leader) == self._leading:
            return
        self._leading = (raft.term, raft.leader)
        self._led_since = now
        for _, reads in self._reads_asked.values():
            self._reads.extend(reads)
        self._reads_asked.clear()

    def _route_writes(self, now: float) -> None:
        if self.is_leader:
            if self.read_only and self.raft.transfer_to is None:
                self._refuse_writes()
            if self.snapshots is not None and self.snapshots.holds_writes(now):
                return
            while self._writes and self.raft.accepts:
                self._propose()
        elif self.raft.leader in self._reachable:  # or it would be lost on the way, and nobody could tell
            self._forward(self.raft.leader)

    def _refuse_writes(self) -> None:
        while self._writes:
            _, _, waiter = self._writes.popleft()
            waiter.fail(
                ReadOnly(
                    "The leader's disk is full, so nothing can be written; free some space there. Reads still work."
                )
            )
        self._writes_bytes = 0

    def _propose(self) -> None:
        """Make one batch of what waits."""
        writes = self._take_writes()
        entries = [write[0] for write in writes]
        batch = self.raft.propose(entries, [write[1] for write in writes], self._wall_ms())
        self._proposed.append((batch.first, batch.term, writes))

    def _forward(self, leader: str) -> None:
        while self._writes:
            writes = self._take_writes()
            self._tickets += 1
            self._forwarded[self._tickets] = (leader, writes)
            self.send(Forward(self.raft.id, leader, self._tickets, tuple([write[0] for write in writes])))

    @property
    def _is_full(self) -> bool:
        bounds = self.bounds
        return len(self._writes) >= bounds.writes_waiting_max or self._writes_bytes >= bounds.writes_waiting_bytes_max

    def _queue_again(self, writes: list[Write]) -> None:
        """Put `writes`, which were not done, back where they were taken from."""
        self._writes.extendleft(reversed(writes))
        self._writes_bytes += sum(len(write[0]) for write in writes)

    def _take_writes(self) -> list[Write]:
        """The next writes of the queue that fit in one batch; at least one."""
        queue, bounds = self._writes, self.bounds
        taken: list[Write] = []
        size = 0
        while queue and len(taken) < bounds.batch_entries_max:
            size += len(queue[0][0])
            if taken and size > bounds.append_bytes_max:
                break
            taken.append(queue.popleft())
            self._writes_bytes -= len(taken[-1][0])
        return taken

    def _on_forward(self, m: Forward, now: float) -> None:
        if not self.is_leader or self.raft.transfer_to is not None or self._is_full:
            self.send(ForwardReply(m.dst, m.src, m.ticket, ()))
            return
        group = _ForwardedGroup(self, m)
        deadline = now + 60.0  # the follower that asked keeps its clients' own
        commands = m.commands or [wire.decode_trusted(entry) for entry in m.entries]
        for position, (entry, command) in enumerate(zip(m.entries, commands, strict=True)):
            part = _ForwardedPart(group, position, deadline)
            if well_formed(entry, command):
                self._writes.append((entry, command, part))
                self._writes_bytes += len(entry)
            else:
                log.error("%r: %s forwards a write that can't be applied: %.200r", self, m.src, entry)
                part.fail(BadRequest("The leader does not know this kind of write; is it of another version?"))

    def _on_forward_reply(self, m: ForwardReply) -> None:
        leader, writes = self._forwarded.get(m.ticket, (None, []))
        if leader != m.src:
            return  # nobody waits for this any more
        if m.replies and len(m.replies) != len(writes):
            raise BadRequest("a peer answered other writes than those that it was sent")
        del self._forwarded[m.ticket]
        if not m.replies:
            self._queue_again(writes)  # refused: nothing was done, so try the leader of the moment
            if self.raft.leader == m.src:
                self.raft.leader = None  # until it, or its successor, speaks again
            return
        for (_, _, waiter), body in zip(writes, m.replies, strict=True):
            waiter.reply(wire.splice(body, self._leader_field) if self._leader_field else body)

    # --- save, apply, answer ------------------------------------------------------------------------------------

    def _save(self, ready: Ready, now: float) -> None:
        if ready.hard_state or ready.batches or ready.reset:
            # A follower has nothing better to do than to save: to hand the batches to the writer's thread, and to be woken
            # by it, would take longer than a good disk's fdatasync. A leader takes in requests meanwhile.
            in_place = not self.is_leader
            for batch in ready.batches:
                if batch.config is not None:
                    self.remember(batch.config)
            ticket = self._journal.save(ready.hard_state, ready.batches, ready.reset, in_place=in_place)
            last = ready.batches[-1] if ready.batches else None
            index, term = (last.last, last.term) if last else (0, 0)
            self._saving.append(_Saving(ticket, index, term, ready.hard_state, ready.after_save))
            if self._journal.saved >= ticket:
                self.saved(ticket, now)
                self.push()  # the leader waits for the acknowledgement, and nobody for what is applied next
        elif self._saving:
            self._saving[-1].messages.extend(ready.after_save)
        else:
            for message in ready.after_save:
                self.send(message)

    def _apply(self, batch: Batch) -> None:
        if self.diverged:
            return
        if not batch.commands and batch.config is None:  # from the disk, or applied once already
            batch = replace(batch, commands=codec.decode_batch(batch.data or self._read_batch(batch.first)).commands)
        try:
            replies = self.machine.apply_batch(batch)
        except CorruptStore as error:
            self.distrust(error.message)
            return
        self._answer_writes(batch, replies)
        if batch.config is not None:
            self._answer_changes(batch)
        if batch.commands:
            batch.commands.clear()  # the bytes remain; a second copy of everything need not
        self._digests[batch.last] = self.machine.table.digest
        if len(self._digests) > DIGESTS_KEPT:
            del self._digests[next(iter(self._digests))]
        if self.snapshots is not None:
            self.snapshots.applied(batch)

    def _answer_writes(self, batch: Batch, replies: list[bytes]) -> None:
        proposed = self._proposed
        while proposed and proposed[0][0] <= batch.last:
            first, term, writes = proposed.popleft()
            if first == batch.first and term == batch.term:
                for write, body in zip(writes, replies, strict=True):
                    write[2].reply(body)
            else:  # another leader's entry stands there: these were never done, and never will be
                self._queue_again(writes)

    def _answer_changes(self, batch: Batch) -> None:
        waiting = [change for change in self._changes if change[0] <= batch.first]
        self._changes = [change for change in self._changes if change[0] > batch.first]
        for index, term, waiter in waiting:
            if (index, term) == (batch.first, batch.term):
                waiter.reply(b'{"ok":true,"rev":%d}' % index)
            else:
                waiter.fail(NoLeader("The leader changed first, and the change was not made; try again."))

    # --- reads --------------------------------------------------------------------------------------------------

    def _ask_for_reads(self, now: float) -> None:
        self._tickets += 1
        if self.raft.read(self._tickets):
            self._reads_asked[self._tickets] = (now, self._reads)
            self._reads = []

    def _answer_reads(self) -> None:
        applying = self._reads_applying
        field = b"" if self.is_leader else self._leader_field
        answered = self._answer_deferred(field) if self._reads_deferred and self._deferred_due else 0
        for _ in range(len(applying)):
            index, reads = applying.popleft()
            if index > self.machine.applied:
                applying.append((index, reads))
                continue
            for read in reads:
                if answered > READS_BYTES_UNCHECKED and (read[1].done or not read[1].has_room):
                    self._reads_deferred.append(read)
                else:
                    answered += self._answer_read(*read, field)

    def _answer_deferred(self, field: bytes) -> int:
        """Answer the reads that were deferred, where there is room now; a later state serves them as well. Returns
        how many bytes that took."""
        self._deferred_due = False
        deferred, self._reads_deferred = self._reads_deferred, []
        answered = 0
        for read in deferred:
            if read[1].done:  # or its connection is gone
                continue
            if read[1].has_room:
                answered += self._answer_read(*read, field)
            else:
                self._reads_deferred.append(read)
        return answered

    def _answer_read(self, command: Command, waiter: Waiter, field: bytes) -> int:
        """Answer one read from the state as it is, and return how many bytes that took."""
        if self.diverged:
            waiter.fail(NoLeader("This node's data is being replaced by the leader's; ask another node."))
            return 0
        try:
            body = self.look_up(self.machine.table, command, self.machine.applied)
        except CorruptStore as error:
            self.distrust(error.message)
            return self._answer_read(command, waiter, field)
        except (BadRequest, Compacted) as error:
            waiter.fail(error)
            return 0
        waiter.reply(wire.splice(body, field) if field else body)
        return len(body)

    # --- digests, and time running out --------------------------------------------------------------------------

    def _compare_digest(self) -> None:
        """Hold the leader's digest against the one here at the same index."""
        if self._digest_expected is None:
            return
        index, digest = self._digest_expected
        own = self._digests.get(index)
        if own is None or own == digest or self.is_leader or self.diverged:
            return
        self.distrust(f"at revision {index} its digest is {own:016x}, the leader's {digest:016x}")

    def distrust(self, why: str) -> None:
        """The state here is wrong, though the log is right: answer nothing from it, and lead nobody, until the leader's
        snapshot has replaced it (sync.py). Raises CorruptStore where there is nobody to get it from."""
        if not self.diverged:
            log.error("%r: the data here can't be trusted (%s); the leader's snapshot is to replace it", self, why)
            if self.raft.config.voters in ((), (self.raft.id,)):
                raise CorruptStore(f"The data of this only member can't be trusted ({why}); restore a backup.")
            self.diverged = True
            self.raft.may_stand = False
            self.raft.resign()

    def _expire(self, now: float) -> None:
        """Answer those whose time is up, and ask again where a message was lost."""
        if self.idle:
            return
        self._expire_queue(now)
        for _, _, writes in self._proposed:
            self._expire_writes(writes, now)
        self._expire_forwarded(now)
        self._changes = [change for change in self._changes if not self._expired(change[2], now)]
        patience = self._patience_s
        for ticket, (asked_at, reads) in list(self._reads_asked.items()):
            if now - asked_at > patience:
                del self._reads_asked[ticket]
                self._reads.extend(reads)
        self._reads = [read for read in self._reads if not self._read_expired(read, now)]
        for _, reads in self._reads_applying:
            reads[:] = [read for read in reads if not self._read_expired(read, now)]
        for _, waiter in self._reads_deferred:
            if waiter.deadline <= now:
                waiter.fail(
                    Overloaded("The replies before this one were not taken in time; read them, then ask again.")
                )

    def _expire_queue(self, now: float) -> None:
        """Writes that were never proposed were surely not done."""
        if not any(waiter.deadline <= now for _, _, waiter in self._writes):
            return
        for _ in range(len(self._writes)):
            write = self._writes.popleft()
            if write[2].deadline > now:
                self._writes.append(write)
            else:
                self._writes_bytes -= len(write[0])
                write[2].fail(self._why_not())

    def _expire_forwarded(self, now: float) -> None:
        """A leader that hands over still answers, soon. One that is frozen or cut off keeps its connection, and would
        keep the clients waiting for as long as they can."""
        leader = self.raft.leader
        settled = leader is not None and now - self._led_since > self._patience_s
        for ticket, (asked, writes) in list(self._forwarded.items()):
            if settled and asked != leader:
                for _, _, waiter in writes:
                    waiter.fail(
                        Timeout("The leader was replaced while it worked on the write; it may have been done or not.")
                    )
            if self._expire_writes(writes, now):
                del self._forwarded[ticket]

    @property
    def _patience_s(self) -> float:
        """How long an answer may take from a leader that is well, but for what waits on a disk."""
        return 3 * self.raft.timing.heartbeat_s

    def _why_not(self) -> DdbError:
        if self.raft.leader is None:
            return NoLeader("No leader is known here now, so nothing was done; try again, or ask another node.")
        return Overloaded("The write waited too long for its turn and was not done; try again later.")

    def _expire_writes(self, writes: list[Write], now: float) -> bool:
        """Answer those of `writes` whose time is up; whether nobody waits any more."""
        waiting = False
        for _, _, waiter in writes:
            if not self._expired(waiter, now):
                waiting = True
        return not waiting

    def _expired(self, waiter: Waiter, now: float) -> bool:
        if not waiter.done and waiter.deadline <= now:
            waiter.fail(Timeout("No majority has answered in time; the write may have been done, or may still be."))
        return waiter.done

    def _read_expired(self, read: Read, now: float) -> bool:
        waiter = read[1]
        if not waiter.done and waiter.deadline <= now:
            waiter.fail(NoLeader("No leader could be confirmed in time; try again, ask another node, or read stale."))
        return waiter.done
