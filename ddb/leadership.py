"""What a leader knows and does, for as long as it leads: a room of raft.py, whose laws hold here too.

Laws: a member's word counts only while it is not in doubt; commit moves only over entries of the leader's own term
(§5.4.2); at most one confirmation of the leadership is under way, and it serves all reads that came before it began.

Theory. For each other member the leader keeps a `Progress`. It *probes*, one message at a time, until the logs are known to
meet; then it *pipelines*, several appends in flight, and sends the next as soon as there is something to send. A
rejected append tells where the logs part, so that one exchange skips a whole term (§5.3). An empty append is the heartbeat,
carries the commit index, and asks, by its `round`, whether the leader is still followed.

All of it is gone when the member steps down: the next leader finds out for itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ddb.config import Bounds, Timing
from ddb.errors import BadRequest
from ddb.messages import (
    Append,
    AppendReply,
    Batch,
    Configuration,
    RaftMessage,
    ReadReply,
    TimeoutNow,
)
from ddb.raftlog import RaftLog


@dataclass(slots=True)
class Progress:
    """What the leader knows of one other member.

    `match`: known equal and durable up to here. `next`: what to send next. A member is *probed*, one message at
    a time, until the logs are known to meet; then appends are pipelined, `in_flight` holding the last index
    of each that is not acknowledged; `snapshot` while only a snapshot can help. Times are the leader's clock.
    """

    next: int
    match: int = 0
    probing: bool = True
    probe_sent: bool = False
    snapshot: bool = False
    in_flight: deque[int] = field(default_factory=deque)
    round: int = 0  # highest confirmation round that this member echoed
    round_sent: int = 0
    commit_sent: int = 0
    heard_at: float = 0.0
    spoken: bool = False  # has answered this leader; until then `heard_at` is only the benefit of the doubt
    sent_at: float = float("-inf")
    doubt_at: int | None = None  # in doubt until the entry here is committed, and the member has it
    doubt_round: int = 0  # what it said before it echoed this round, it may have forgotten
    vouched: bool = False  # every member elected the leader, so no forgotten vote can matter

    @property
    def counts(self) -> bool:
        """Whether the member's word is good: it is not in doubt."""
        return self.doubt_at is None or self.vouched


class Member(Protocol):
    """What a leadership needs of the member that leads (raft.Raft)."""

    id: str
    term: int
    log: RaftLog
    commit: int
    durable: int
    doubt: bool
    digest: tuple[int, int] | None
    timing: Timing
    bounds: Bounds

    @property
    def config(self) -> Configuration:
        """The newest configuration in the log."""

    @property
    def config_index(self) -> int:
        """Where it stands."""

    def send(self, message: RaftMessage) -> None:
        """Hand out a message."""

    def append_noop(self) -> None:
        """Append an entry that does nothing."""

    def read_confirmed(self, ticket: int, index: int) -> None:
        """Reads of this member's own under `ticket` may be answered from `index` on."""

    def snapshot_needed(self, peer: str) -> None:
        """Nothing in the log helps `peer` any more."""


class Leadership:
    """One member's time as the leader of one term, from `now` on.

    `unanimous`: every member elected it, so no vote that one of them forgot can matter.
    """

    def __init__(self, member: Member, now: float, unanimous: bool) -> None:
        self.progress: dict[str, Progress] = {}
        self.term_begin = member.log.last_index + 1  # the leader's no-op: from here on entries are of its own term
        self.transfer_to: str | None = None
        self._member = member
        self._transfer_deadline = 0.0
        self._transferred = False
        self._spread_commit = False
        self._round = 0
        self._reads_waiting: list[tuple[str, int]] = []
        self._reads_active: list[tuple[str, int]] = []
        self._read_round = 0
        self._read_index = 0
        self.follow_config(now)
        for progress in self.progress.values():
            progress.vouched = unanimous

    @property
    def is_over(self) -> bool:
        """Whether the leader's own removal from the voters is committed (diss. §4.2.2)."""
        member = self._member
        return member.id not in member.config.voters and member.config_index <= member.commit

    @property
    def has_committed(self) -> bool:
        """Whether an entry of the leader's own term is committed: then its commit index is the cluster's."""
        return self._member.commit >= self.term_begin

    def tick(self, now: float) -> None:
        """Let time pass."""
        self._clear_doubts()
        self._spread_commit = True
        if self.transfer_to and now >= self._transfer_deadline:
            self.transfer_to = None

    def is_followed(self, since: float) -> bool:
        """Whether a majority has answered after `since`."""
        return self._is_majority(lambda progress: progress.heard_at > since)

    def connected(self, peer: str) -> None:
        """A connection to `peer` stands anew: what was under way on the old one is lost."""
        if progress := self.progress.get(peer):
            progress.sent_at = float("-inf")
            progress.vouched = False
            if progress.doubt_at is not None:
                self._doubt(progress)  # it may have started again, and have forgotten again
            elif not progress.snapshot:
                self._probe(progress, progress.match + 1 if progress.match else progress.next)

    def transfer(self, to: str, now: float) -> None:
        """Bring the voter `to` up to date, then tell it to stand (diss. §3.10), until a time-out has passed."""
        self.transfer_to = to
        self._transfer_deadline = now + self._member.timing.election_timeout_s
        self._transferred = False
        self._try_transfer()

    def most_advanced(self) -> str | None:
        """The other voter whose log reaches farthest."""
        member = self._member
        others = [v for v in member.config.voters if v != member.id]
        return max(others, key=lambda v: self.progress[v].match, default=None)

    def snapshot_sent(self, peer: str, index: int) -> None:
        """`peer` has installed our snapshot of `index`; the log takes over from there."""
        if (progress := self.progress.get(peer)) and progress.snapshot:
            progress.snapshot = False
            progress.match = max(progress.match, index)
            self._probe(progress, index + 1)

    def snapshot_failed(self, peer: str) -> None:
        """The snapshot for `peer` came to nothing; find out anew what it needs."""
        if (progress := self.progress.get(peer)) and progress.snapshot:
            progress.snapshot = False
            self._probe(progress, max(progress.match, self._member.log.base_index) + 1)

    def _is_majority(self, agrees: Callable[[Progress], bool]) -> bool:
        """Whether a majority of the voters agrees, the leader itself included, and those in doubt left out."""
        voters = self._member.config.voters
        agreed = 0
        for voter in voters:
            if voter == self._member.id:
                agreed += not self._member.doubt
            else:
                progress = self.progress[voter]
                agreed += progress.counts and agrees(progress)
        return 2 * agreed > len(voters)

    def follow_config(self, now: float) -> None:
        """Keep a Progress for every other member of the configuration, and for nobody else."""
        members = {m.id for m in self._member.config.members} - {self._member.id}
        for gone in self.progress.keys() - members:
            del self.progress[gone]
        for new in members - self.progress.keys():
            self.progress[new] = Progress(self._member.log.last_index + 1, heard_at=now)
        self.progress = dict(sorted(self.progress.items()))  # who is sent to first is the same in every process

    def send_appends(self, now: float) -> None:
        """Send everybody what there is to send, and a heartbeat to who was sent nothing for long."""
        self._start_read_round()
        last_index = self._member.log.last_index
        for peer, progress in self.progress.items():
            sent = False
            while not progress.snapshot and progress.next <= last_index and self._may_send(progress):
                if not self._send_batches(peer, progress):
                    break
                sent = True
            due = now - progress.sent_at >= self._member.timing.heartbeat_s
            behind = self._spread_commit and progress.commit_sent < self._member.commit
            if not sent and (due or behind or progress.round_sent < self._round):
                self._send_heartbeat(peer, progress)
                sent = True
            if sent:
                progress.sent_at = now
        self._spread_commit = False

    def _may_send(self, progress: Progress) -> bool:
        if progress.probing:
            return not progress.probe_sent
        return len(progress.in_flight) < self._member.bounds.appends_in_flight_max

    def _send_batches(self, peer: str, progress: Progress) -> bool:
        """Send the batches from `progress.next` on; False where they are gone and a snapshot is needed."""
        prev = progress.next - 1
        prev_term = self._member.log.term_at(prev)
        if prev_term is None:
            self._need_snapshot(peer, progress)
            return False
        batches = tuple(self._member.log.after(prev, self._member.bounds.append_bytes_max))
        self._member.send(self._append_message(peer, progress, prev, prev_term, batches))
        if progress.probing:
            progress.probe_sent = True
        else:
            progress.next = batches[-1].last + 1
            progress.in_flight.append(batches[-1].last)
        return True

    def _send_heartbeat(self, peer: str, progress: Progress) -> None:
        """An empty append. Where only a snapshot can help, it claims nothing about the log."""
        prev = 0 if progress.snapshot else progress.next - 1
        prev_term = self._member.log.term_at(prev)
        if prev_term is None:
            prev, prev_term = 0, 0
        self._member.send(self._append_message(peer, progress, prev, prev_term, ()))

    def _need_snapshot(self, peer: str, progress: Progress) -> None:
        progress.snapshot = True
        self._member.snapshot_needed(peer)

    def _append_message(
        self, peer: str, progress: Progress, prev: int, prev_term: int, batches: tuple[Batch, ...]
    ) -> Append:
        member = self._member
        progress.round_sent = self._round
        progress.commit_sent = member.commit
        confirmed = progress.doubt_at is not None and self._is_confirmed(progress, progress.doubt_at)
        digest = None if batches else member.digest
        return Append(
            member.id, peer, member.term, prev, prev_term, member.commit, self._round, batches, digest, confirmed
        )  # fmt: skip

    def heard(self, peer: str, now: float) -> Progress | None:
        """Note that `peer` answered, and return what is known of it."""
        progress = self.progress.get(peer)
        if progress is not None:
            progress.heard_at = now
            progress.spoken = True
        return progress

    def on_append_reply(self, m: AppendReply, now: float) -> None:
        """Take in a follower's answer to an append. Raises BadRequest where it claims what this leader never had."""
        if m.match > self._member.log.last_index:
            raise BadRequest(
                f"{m.src} claims entries up to {m.match} of a log that ends at {self._member.log.last_index}"
            )
        progress = self.heard(m.src, now)
        if progress is None or not self._heed_doubt(m, progress):
            return
        if m.round > progress.round:
            progress.round = m.round
            self._confirm_reads()
        if not m.ok:
            self._backtrack(m, progress)
            return
        while progress.in_flight and progress.in_flight[0] <= m.match:
            progress.in_flight.popleft()
        if m.match > progress.match:
            progress.match = m.match
            if m.match > self._member.commit:
                self.advance_commit()
        if progress.probing and not progress.snapshot and m.match >= progress.next - 1:
            progress.probing = False
            progress.next = max(progress.next, m.match + 1)
        if not progress.snapshot and self._member.log.term_at(progress.next - 1) is None:
            # It is there, but an answer was lost, and the log has been compacted meanwhile. (Where it isn't there, no
            # snapshot would reach it.)
            self._need_snapshot(m.src, progress)
        if self.transfer_to == m.src:
            self._try_transfer()

    # --- members in doubt ---------------------------------------------------------------------------------------

    def _heed_doubt(self, m: AppendReply, progress: Progress) -> bool:
        """Note whether the sender is in doubt. Returns whether it still stands by what it says here."""
        if progress.doubt_at is None:
            if m.doubt:
                self._doubt(progress)
            return not m.doubt
        if m.round < progress.doubt_round:
            return False
        if not m.doubt:
            progress.doubt_at = None
            self.advance_commit()
        return True

    def _doubt(self, progress: Progress) -> None:
        """Believe nothing that the member has said so far, and ask it anew where its log ends."""
        self._round += 1
        progress.doubt_at = self._member.log.last_index + 1
        progress.doubt_round = self._round
        progress.match = 0
        if not progress.snapshot:
            self._probe(progress, progress.next)

    def _is_confirmed(self, progress: Progress, doubt_at: int) -> bool:
        return progress.match >= doubt_at and (self._member.commit >= doubt_at or progress.vouched)

    def _clear_doubts(self) -> None:
        """See that there is an entry by which members in doubt can be confirmed."""
        last_index = self._member.log.last_index
        waiting = any(p.doubt_at is not None and p.doubt_at > last_index for p in self.progress.values())
        if waiting and self.transfer_to is None:
            self._member.append_noop()

    def _backtrack(self, m: AppendReply, progress: Progress) -> None:
        """The logs part before `m.rejected`: go back to where they may meet, a term at a time (§5.3)."""
        if progress.snapshot or m.rejected <= progress.match or m.rejected >= progress.next:
            return  # an answer to something long settled
        log = self._member.log
        upto = min(m.rejected, log.last_index) - 1
        shared = log.term_end(m.hint_term, upto) if m.hint_term else None
        following = shared + 1 if shared is not None else min(m.hint_index, m.rejected)
        following = max(following, progress.match + 1)
        if log.base_index < following - 1 < log.last_index:
            following = log.batch_at(following).first  # batches are sent whole
        self._probe(progress, following)

    def _probe(self, progress: Progress, following: int) -> None:
        progress.probing = True
        progress.probe_sent = False
        progress.in_flight.clear()
        progress.next = following

    def advance_commit(self) -> None:
        """Commit what a majority holds durably, if it is of this term (§5.4.2, figure 8)."""
        voters = self._member.config.voters
        matches = sorted(self._match(v) for v in voters)
        index = matches[(len(voters) - 1) // 2]
        if index <= self._member.commit or index < self.term_begin:
            return
        self._member.commit = index
        self._member.doubt = False  # committed without its own help, so see raft.py

    def _match(self, voter: str) -> int:
        """Up to where `voter` counts for a commit."""
        if voter == self._member.id:
            return 0 if self._member.doubt else self._member.durable
        progress = self.progress[voter]
        return progress.match if progress.counts else 0

    def _try_transfer(self) -> None:
        if self.transfer_to is None or self._transferred:
            return
        progress = self.progress[self.transfer_to]
        if progress.match == self._member.log.last_index:
            self._transferred = True
            self._member.send(TimeoutNow(self._member.id, self.transfer_to, self._member.term))

    # --- reads --------------------------------------------------------------------------------------------------

    def read(self, src: str, ticket: int) -> None:
        """Have the reads of member `src` under `ticket` confirmed."""
        if len(self._reads_waiting) < self._member.bounds.reads_waiting_max:
            self._reads_waiting.append((src, ticket))

    def _start_read_round(self) -> None:
        """Confirm the leadership once for all reads that wait. One round is under way at a time: who comes
        meanwhile shares the next one."""
        if not self._reads_waiting or self._reads_active or not self.has_committed:
            return
        self._round += 1
        self._read_round = self._round
        self._read_index = self._member.commit
        self._reads_active, self._reads_waiting = self._reads_waiting, []
        self._confirm_reads()

    def _confirm_reads(self) -> None:
        if not self._reads_active:
            return
        if not self._is_majority(lambda progress: progress.round >= self._read_round):
            return
        for src, ticket in self._reads_active:
            if src == self._member.id:
                self._member.read_confirmed(ticket, self._read_index)
                continue
            progress = self.progress.get(src)
            if progress is not None and progress.commit_sent < self._read_index:
                self._send_heartbeat(src, progress)  # so that it need not wait for the next one to apply that far
            self._member.send(ReadReply(self._member.id, src, self._member.term, ticket, self._read_index))
        self._reads_active = []
