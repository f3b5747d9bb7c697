"""Consensus: Raft by the paper (Ongaro & Ousterhout 2014) and the dissertation (Ongaro 2014, "diss.").

Laws:

* Nothing here reads a clock, a socket, a file or a global random source. Inputs are calls; the output is one
  `Ready`, whose fields stand in the order in which they must be worked off.
* What a reply promises is durable before it leaves: votes, terms and acknowledgements wait in `Ready.after_save`
  until everything handed out for saving so far is on disk. A leader's appends do not wait: its own fsync runs in parallel
  with its followers' (diss. §10.2.1), and its own acknowledgement counts like anybody's, when `saved` says so.
* Votes and acknowledgements are sets of senders, so a duplicate counts once.
* The bully's strategy (election.py) decides who asks; the term, the log and a majority decide who leads.

Theory. In each *term* at most one member is leader, because a voter votes once a term (§5.2). The leader appends
entries; one that a majority holds durably, in the leader's own term, is *committed* along with all before it
(§5.4.2), and no later leader can lack it, because voters refuse a candidate whose log is less up-to-date than
theirs (§5.4.1). Followers make their logs equal to the leader's: an append names the entry before it, and a
follower that lacks that entry says where its log departs (§5.3). Reads cost no log entry: the leader notes its
commit index, confirms that it still leads with one exchange for all the reads that wait, and whoever has applied
that index may answer (ReadIndex, diss. §6.4). Members come and go one at a time (diss. §4), learners first.

Two things go beyond the paper. *Batches* are whole (messages.py), so every index that travels ends one.
*Doubt*: a member whose disk lost the end of its log may have forgotten entries that it acknowledged and votes that it
gave, in this term or in a later one. It says so in all it answers, and counts for nothing: not for an election
(unless every single voter agrees: then nobody is left whom a forgotten vote could elect), not for a commit, not for a
read. The doubt ends when the leader has committed, without this member's help, an entry that it appended after
it heard of the doubt, and the member has that entry too: so it has all that it ever acknowledged; and who might still
collect votes on the strength of a forgotten one lacks that entry, which a majority would miss in his log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ddb import codec
from ddb.config import Bounds, Timing
from ddb.election import Answer, Election, Move, View
from ddb.errors import BadRequest, NoLeader, Overloaded, invariant
from ddb.messages import (
    NOOP,
    Append,
    AppendReply,
    Batch,
    Command,
    Configuration,
    ElectionReply,
    ElectionRequest,
    HardState,
    InstallSnapshot,
    RaftMessage,
    ReadReply,
    ReadRequest,
    Role,
    SnapshotReply,
    SnapshotRequest,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from ddb.raftlog import RaftLog


@dataclass(slots=True)
class Ready:
    """What must be done now, in this order: save, send, apply, answer.

    `reset`, `hard_state` and `batches` go to the log in this order; `messages` may leave at once, `after_save` when
    all of that, and all that was handed out before, is durable. `committed` is to be applied; `reads` are
    (ticket, index) pairs that may be answered once `index` is applied; `needs_snapshot` names members that the
    log can't help any more; `chunks` are pieces of a snapshot, and acknowledgements of such, from the current term.
    """

    reset: tuple[int, int] | None = None
    hard_state: HardState | None = None
    batches: list[Batch] = field(default_factory=list)
    messages: list[RaftMessage] = field(default_factory=list)
    after_save: list[RaftMessage] = field(default_factory=list)
    committed: list[Batch] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    needs_snapshot: list[str] = field(default_factory=list)
    chunks: list[InstallSnapshot | SnapshotReply] = field(default_factory=list)


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
    sent_at: float = float("-inf")
    doubt_at: int | None = None  # in doubt until the entry here is committed, and the member has it
    doubt_round: int = 0  # what it said before it echoed this round, it may have forgotten
    vouched: bool = False  # every voter elected the leader, so no forgotten vote can matter

    @property
    def counts(self) -> bool:
        """Whether the member's word is good: it is not in doubt."""
        return self.doubt_at is None or self.vouched


class Raft:
    """One member's part in the consensus.

    `id` and `name` are the member's own; `log` is what its disk remembers; `applied` the index up to which the snapshot goes
    and `config` the configuration there; `election` the strategy; times (`now`) are seconds of one steady clock.
    """

    def __init__(
        self,
        id: str,
        name: str,
        log: RaftLog,
        hard_state: HardState,
        config: Configuration,
        election: Election,
        now: float,
        applied: int = 0,
        timing: Timing | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self.id = id
        self.name = name
        self.log = log
        self.term = hard_state.term
        self.vote = hard_state.vote
        self.doubt = hard_state.doubt
        self.election = election
        self.timing = timing or Timing()
        self.bounds = bounds or Bounds()
        self.role = Role.FOLLOWER
        self.leader: str | None = None
        self.commit = max(applied, log.base_index)
        self.durable = log.last_index
        self.progress: dict[str, Progress] = {}
        self.digest: tuple[int, int] | None = None  # the state machine's (index, digest), sent with heartbeats
        self.transfer_to: str | None = None
        self.may_stand = True  # False on a member that could not serve as leader, with a full disk for example
        self._configs = [(log.base_index, config)]
        self._configs += [(b.first, b.config) for b in log.batches() if b.config]
        self._emitted = self.commit  # committed entries up to here were handed out for applying
        self._durable_state = hard_state
        self._handed_out = hard_state
        self._heard_leader_at = float("-inf")
        self._connected: set[str] = set()
        self._ask = 0
        self._votes: dict[str, bool] = {}  # who granted -> whether in doubt
        self._refusals: set[str] = set()
        self._transferred = False
        self._term_begin = 0  # the leader's no-op: from here on entries are of its own term
        self._ticked_at = now
        self._transfer_deadline = 0.0
        self._spread_commit = False
        self._round = 0
        self._reads_waiting: list[tuple[str, int]] = []
        self._reads_active: list[tuple[str, int]] = []
        self._read_round = 0
        self._read_index = 0
        self._out = Ready()
        self._ack: AppendReply | None = None
        election.follow(now)
        if self.config.voters == (id,):
            election.suspect(now)  # nobody else could be leader

    def __repr__(self) -> str:
        return f"{self.name}@{self.term} {self.role_shown.value} last={self.log.last_index}@{self.log.last_term} commit={self.commit}"

    # --- what others may ask ------------------------------------------------------------------------------------

    @property
    def config(self) -> Configuration:
        """The newest configuration in the log, committed or not (diss. §4.1)."""
        return self._configs[-1][1]

    @property
    def config_index(self) -> int:
        """Where the newest configuration stands."""
        return self._configs[-1][0]

    def config_at(self, index: int) -> Configuration:
        """The configuration in force at `index`, for a snapshot there."""
        return next(config for at, config in reversed(self._configs) if at <= index)

    @property
    def role_shown(self) -> Role:
        """The role, a follower that is no voter being a learner."""
        if self.role is Role.FOLLOWER and self.id not in self.config.voters:
            return Role.LEARNER
        return self.role

    @property
    def accepts(self) -> bool:
        """Whether a write may be proposed now: leader, not handing over, and not too much on its way."""
        if self.role is not Role.LEADER or self.transfer_to is not None:
            return False
        return self.log.count_after(self.commit) < self.bounds.batches_in_flight_max

    @property
    def has_committed_in_term(self) -> bool:
        """Whether the leader has committed an entry of its own term: then its commit index is the cluster's."""
        return self.role is Role.LEADER and self.commit >= self._term_begin

    def hears_leader(self, now: float) -> bool:
        """Whether a leader spoke within the time-out; a leader hears itself."""
        if self.role is Role.LEADER:
            return True
        return self.leader is not None and now - self._heard_leader_at < self.timing.election_timeout_s

    def lag_s(self, now: float) -> float:
        """Seconds since the leader was last heard."""
        return 0.0 if self.role is Role.LEADER else now - self._heard_leader_at

    # --- inputs -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let time pass. To be called every `tick_s` or so."""
        stalled = now - self._ticked_at >= self.timing.election_timeout_s
        self._ticked_at = now
        if self.role is Role.LEADER:
            self._check_quorum(now, stalled)
            self._clear_doubts()
            self._spread_commit = True
            if self.transfer_to and now >= self._transfer_deadline:
                self.transfer_to = None
        if self.role is not Role.LEADER:
            self._move(self.election.tick(now, self._view(now)), now)

    def connected(self, peer: str) -> None:
        """A connection to `peer` stands."""
        self._connected.add(peer)
        if progress := self.progress.get(peer):
            progress.sent_at = float("-inf")
            progress.vouched = False
            if progress.doubt_at is not None:
                self._doubt(progress)  # it may have started again, and have forgotten again
            elif not progress.snapshot:  # what was under way on the old connection is lost: find out anew
                self._probe(progress, progress.match + 1 if progress.match else progress.next)

    def disconnected(self, peer: str, now: float) -> None:
        """The connection to `peer` broke. If it led, that is suspicion enough: killed processes close their sockets."""
        self._connected.discard(peer)
        if peer == self.leader and self.role is not Role.LEADER:
            self.leader = None
            self.election.suspect(now)

    def step(self, m: RaftMessage, now: float) -> None:
        """Take in a message of another member."""
        if type(m) is ElectionRequest:
            self._on_election_request(m, now)
            return
        if m.term > self.term:
            # Diss. §4.2.3: who hears a leader takes no notice of candidates, or a removed member could disturb.
            if type(m) is VoteRequest and not m.transfer and self.hears_leader(now):
                return
            self._follow_term(m.term, now)
        elif m.term < self.term and type(m) is not ElectionReply:  # that one is known by its number
            self._reject_stale(m)
            return
        if type(m) is Append:
            self._on_append(m, now)
        elif type(m) is AppendReply:
            self._on_append_reply(m, now)
        elif type(m) is VoteRequest:
            self._on_vote_request(m, now)
        elif type(m) is VoteReply:
            self._on_vote_reply(m, now)
        elif type(m) is ElectionReply:
            self._on_election_reply(m, now)
        elif type(m) is TimeoutNow:
            self._on_timeout_now(now)
        elif type(m) is ReadRequest:
            self._on_read_request(m)
        elif type(m) is ReadReply:
            self._out.reads.append((m.ticket, m.index))
        elif type(m) is InstallSnapshot:
            self._hear_leader(m.src, now)
            self._out.chunks.append(m)
        elif type(m) is SnapshotRequest and self.role is Role.LEADER:
            self._out.needs_snapshot.append(m.src)
        elif type(m) is SnapshotReply and self.role is Role.LEADER:
            self._heard(m.src, now)
            self._out.chunks.append(m)

    def propose(self, entries: list[bytes], commands: list[Command], at_ms: int) -> Batch:
        """Append `entries` (encoded; `commands` the same, decoded) as one batch. Returns it: its (first, term) identify it.

        To be called only while `accepts`.
        """
        invariant(self.role is Role.LEADER and self.transfer_to is None, "only a leader proposes")
        batch = codec.encode_batch(self.log.last_index + 1, self.term, at_ms, entries, commands)
        self._append(batch)
        return batch

    def change(self, config: Configuration, at_ms: int) -> Batch:
        """Append `config` as the new configuration. Returns its batch.

        Raises NoLeader where this is no leader (or one that hands over) and Overloaded while another change is under way, or
        before the leader has committed an entry of its term (the mending of diss. §4.1, raft-dev 2015).
        Raises BadRequest where more than one voter would come or go, or no voter be left.
        """
        if self.role is not Role.LEADER or self.transfer_to is not None:
            raise NoLeader("This node does not lead (any more); ask the leader.")
        if not self.has_committed_in_term or self.config_index > self.commit:
            raise Overloaded("Another change of membership is under way; try again in a moment.")
        old, new = set(self.config.voters), set(config.voters)
        if len(old ^ new) > 1:
            raise BadRequest("Only one voter may be added or removed at a time.")
        if not new:
            raise BadRequest("The last voter can't be removed: nobody would be left to decide anything.")
        batch = codec.encode_config(self.log.last_index + 1, self.term, at_ms, config)
        self._append(batch)
        return batch

    def read(self, ticket: int) -> bool:
        """Ask for a read index; `Ready.reads` will answer with `ticket`. False where no leader is known: ask again later."""
        if self.role is Role.LEADER:
            self._reads_waiting.append((self.id, ticket))
        elif self.leader is not None:
            self._send(ReadRequest(self.id, self.leader, self.term, ticket))
        else:
            return False
        return True

    def transfer(self, to: str, now: float) -> None:
        """Hand leadership to the voter `to`: bring it up to date, then tell it to stand (diss. §3.10).

        Until it leads, or a time-out has passed, nothing is proposed here. Raises BadRequest where `to` can't lead.
        """
        if self.role is not Role.LEADER:
            raise NoLeader("This node does not lead (any more); ask the leader.")
        if to == self.id or to not in self.config.voters:
            raise BadRequest("Leadership can only go to another voter.")
        self.transfer_to = to
        self._transfer_deadline = now + self.timing.election_timeout_s
        self._transferred = False
        self._try_transfer()

    def saved(self, index: int, term: int, hard_state: HardState | None, now: float) -> None:
        """Everything handed out up to the entry (`index`, `term`), and `hard_state`, is durable."""
        if hard_state is not None:
            self._durable_state = hard_state
            # The own vote counts like any other: once it is on disk.
            if self.role is Role.CANDIDATE and hard_state.term == self.term and hard_state.vote == self.id:
                self._count_vote(self.id, hard_state.doubt, now)
        if index > self.durable and self.log.term_at(index) == term:
            self.durable = index
            self.log.release(min(index, self._emitted))
            if self.role is Role.LEADER:
                self._advance_commit()

    def compact(self, index: int) -> None:
        """The snapshot covers everything up to `index`; forget the log up to there."""
        invariant(index <= self._emitted, "only what was applied is compacted")
        self.log.compact(index)
        base = self.log.base_index
        self._configs = [(base, self.config_at(base)), *((i, c) for i, c in self._configs if i > base)]

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
            self._probe(progress, max(progress.match, self.log.base_index) + 1)

    def restore(self, index: int, term: int, config: Configuration) -> None:
        """A snapshot of (`index`, `term`) with `config` has replaced the state. Keep the log behind it only if it fits (§7)."""
        invariant(index > self.commit, "a snapshot never takes the state back")
        if self.log.term_at(index) == term:
            self.log.compact(index)
            self.durable = max(self.durable, index)
        else:
            invariant(
                self.role is not Role.LEADER, "a leader's log holds all that is committed (§5.4, Leader Completeness)"
            )
            self.log.reset(index, term)
            self._out.reset = (index, term)
            self._out.batches.clear()
            self.durable = index
        self.commit = self._emitted = index
        self._configs = [(index, config), *((b.first, b.config) for b in self.log.batches(index) if b.config)]

    def found(self, config: Configuration, at_ms: int) -> None:
        """Begin a cluster: `config` becomes the log's first entry. Only for a member that has neither log nor term."""
        invariant(self.log.last_index == 0 and self.term == 0, "a cluster begins with an empty log")
        self.term = 1
        self._append(codec.encode_config(1, 1, at_ms, config))
        self.election.suspect(float("-inf"))

    def reapply(self, index: int) -> None:
        """The state was replaced by that of `index`, which is committed and in the log: hand out again what follows."""
        invariant(self.log.base_index <= index <= self.commit, "the log reaches back to the state that is there")
        self._emitted = index

    def resign(self) -> None:
        """Lead no more, nor stand, though nobody else does yet: this member can't serve. The most advanced voter is told to
        stand."""
        if self.role is Role.LEADER:
            self._hand_over_and_leave()
        elif self.role is Role.CANDIDATE:
            self._step_down()

    def ready(self, now: float) -> Ready:
        """What is to be done because of all inputs since the last call."""
        if self.role is Role.LEADER:
            self._start_read_round()
            self._send_appends(now)
        out = self._out
        self._out = Ready()
        if self._ack is not None:
            out.after_save.append(self._ack)
            self._ack = None
        state = HardState(self.term, self.vote, self.doubt)
        if state != self._handed_out:
            out.hard_state = self._handed_out = state
        if self.commit > self._emitted:
            out.committed = self.log.span(self._emitted, self.commit)
            self._emitted = self.commit
        return out

    # --- terms and elections ------------------------------------------------------------------------------------

    def _view(self, now: float) -> View:
        rank = (self.log.last_term, self.log.last_index, self.name, self.id)
        return View(
            self.id, rank, self.config.voters, frozenset(self._connected), self.hears_leader(now), self._is_eligible
        )  # fmt: skip

    @property
    def _is_eligible(self) -> bool:
        """Whether this member may lead: a voter, or one whose removal is not known to be committed. Its log may be
        needed to commit that (diss. §4.2.2)."""
        removing = self.config_index > self.commit and len(self._configs) > 1 and self.id in self._configs[-2][1].voters
        return self.may_stand and (removing or self.id in self.config.voters)

    def _move(self, move: Move | None, now: float) -> None:
        if not self._is_eligible:
            return
        if move is Move.ASK:
            self._ask += 1
            for voter in self.config.voters:
                if voter != self.id:
                    last = (self.log.last_term, self.log.last_index)
                    self._send(ElectionRequest(self.id, voter, self.term, *last, self.name, self._ask))
        elif move is Move.STAND:
            self._stand(now, transfer=False)

    def _stand(self, now: float, transfer: bool) -> None:
        """Become a candidate in the next term (§5.2). The requests leave when the own vote is durable."""
        invariant(self._is_eligible, "only a voter stands")
        self.term += 1
        self.vote = self.id
        self.role = Role.CANDIDATE
        self.leader = None
        self._votes = {}
        self._refusals = set()
        for voter in self.config.voters:
            if voter != self.id:
                last = (self.log.last_index, self.log.last_term)
                self._send(VoteRequest(self.id, voter, self.term, *last, transfer), durable=True)

    def _follow_term(self, term: int, now: float) -> None:
        """A higher term was seen: follow, whoever leads it (§5.1)."""
        was_leader = self.role is Role.LEADER
        self.term = term
        self.vote = None
        self._ack = None  # it may speak of entries that were never handed out for saving
        self._step_down()
        if was_leader:
            self.election.follow(now)

    def _step_down(self) -> None:
        self.role = Role.FOLLOWER
        self.leader = None
        self.progress.clear()
        self.transfer_to = None
        self._reads_waiting.clear()
        self._reads_active.clear()

    def _append_noop(self) -> None:
        self._append(codec.encode_batch(self.log.last_index + 1, self.term, 0, [b'["noop"]'], [NOOP]))

    def _hear_leader(self, leader: str, now: float) -> None:
        """A message that only the leader of the current term sends has come."""
        invariant(self.role is not Role.LEADER, "one leader a term (§5.2, Election Safety)")
        self.role = Role.FOLLOWER
        self.leader = leader
        self._heard_leader_at = now
        self.election.follow(now)

    def _reject_stale(self, m: RaftMessage) -> None:
        """A message of an older term: tell its sender ours, so that it steps down (§5.1)."""
        if type(m) is Append or type(m) is InstallSnapshot:
            self._send(AppendReply(self.id, m.src, self.term, False, 0, 0), durable=True)
        elif type(m) is VoteRequest:
            self._send(VoteReply(self.id, m.src, self.term, False, self.doubt), durable=True)

    def _on_election_request(self, m: ElectionRequest, now: float) -> None:
        answer = self.election.asked(now, self._view(now), (m.last_term, m.last_index, m.name, m.src))
        self._send(ElectionReply(self.id, m.src, self.term, answer.value, m.ask))

    def _on_election_reply(self, m: ElectionReply, now: float) -> None:
        if m.ask == self._ask and self.role is not Role.LEADER and m.src in self.config.voters:
            self._move(self.election.answered(now, self._view(now), m.src, Answer(m.answer)), now)

    def _on_vote_request(self, m: VoteRequest, now: float) -> None:
        up_to_date = (m.last_term, m.last_index) >= (self.log.last_term, self.log.last_index)  # §5.4.1
        granted = up_to_date and self.vote in (None, m.src)
        if granted:
            self.vote = m.src
            self.election.voted(now, m.src)
        self._send(VoteReply(self.id, m.src, self.term, granted, self.doubt), durable=True)

    def _on_vote_reply(self, m: VoteReply, now: float) -> None:
        if self.role is not Role.CANDIDATE:
            return
        if m.granted:
            self._count_vote(m.src, m.doubt, now)
        else:
            self._refusals.add(m.src)
        if self.role is Role.CANDIDATE and not self._may_still_win():
            self.election.lost(now)

    def _count_vote(self, voter: str, doubt: bool, now: float) -> None:
        """Lead, if a majority of voters that remember all they acknowledged agree, or every single voter."""
        self._votes[voter] = doubt
        voters = self.config.voters
        sure = sum(1 for v in voters if self._votes.get(v) is False)
        if 2 * sure > len(voters) or all(v in self._votes for v in voters):
            self._lead(now)

    def _may_still_win(self) -> bool:
        """Whether so few have refused that a majority is in reach, and somebody is connected who has not answered yet."""
        voters = self.config.voters
        unanswered = self._connected.intersection(voters).difference(self._votes, self._refusals)
        return bool(unanswered) and 2 * len(self._refusals.intersection(voters)) < len(voters)

    def _lead(self, now: float) -> None:
        invariant(self._durable_state.term == self.term, "a leader's term is on disk")
        self.role = Role.LEADER
        self.leader = self.id
        self.transfer_to = None
        self._leader_since = now
        self._round = self._read_round = 0
        self.progress = {}
        self._follow_config(now)
        if all(v in self._votes for v in self.config.voters):
            self.doubt = False
            for progress in self.progress.values():
                progress.vouched = True
        self._term_begin = self.log.last_index + 1
        self._append_noop()  # an entry of its own commits what former terms left behind (§8)

    def _check_quorum(self, now: float, stalled: bool) -> None:
        """Step down where no majority has answered within the time-out (diss. §6.2): it may lead elsewhere.

        After a stall (the process was stopped, or the machine asleep) the answers that had queued up meanwhile seem fresh, and are not.
        """
        oldest = now if stalled else now - self.timing.election_timeout_s
        if self._is_majority(lambda progress: progress.heard_at > oldest):
            self._heard_leader_at = oldest  # should it lose the lead: how old its state may be
        else:
            self._step_down()
            self.election.follow(now)

    def _is_majority(self, agrees: Callable[[Progress], bool]) -> bool:
        """Whether a majority of the voters agrees, the leader itself included, and those in doubt left out."""
        voters = self.config.voters
        agreed = 0
        for voter in voters:
            if voter == self.id:
                agreed += not self.doubt
            else:
                progress = self.progress[voter]
                agreed += progress.counts and agrees(progress)
        return 2 * agreed > len(voters)

    def _on_timeout_now(self, now: float) -> None:
        if self.role is Role.FOLLOWER and self._is_eligible:
            self._stand(now, transfer=True)
            self.election.voted(now, self.id)

    # --- the follower's half of replication ---------------------------------------------------------------------

    def _on_append(self, m: Append, now: float) -> None:
        self._hear_leader(m.src, now)
        log = self.log
        if m.prev_index > log.base_index and log.term_at(m.prev_index) != m.prev_term:
            self._reject(m)
            return
        if m.confirmed and m.prev_index <= self.durable:
            self.doubt = False
        matched = m.prev_index
        for batch in m.batches:
            matched = batch.last
            if batch.last <= log.base_index or log.term_at(batch.first) == batch.term:
                continue  # here already; a delayed append must not cut what came after it (§5.3)
            if batch.first <= log.last_index:
                self._truncate(batch.first)
            self._append(batch)
        if min(m.commit, matched) > self.commit:
            self.commit = min(m.commit, matched)
        self._acknowledge(m, matched)

    def _acknowledge(self, m: Append, matched: int) -> None:
        """Tell the leader what matches: at once as far as it is durable, the rest when it will be."""
        if not m.batches:
            matched = min(matched, self.durable)  # for the rest, an acknowledgement waits already
            self._send(AppendReply(self.id, m.src, self.term, True, matched, m.round, doubt=self.doubt))
            return
        if self._ack is not None:  # one acknowledgement for all appends of this turn
            matched = max(matched, self._ack.match)
        self._ack = AppendReply(self.id, m.src, self.term, True, matched, m.round, doubt=self.doubt)

    def _reject(self, m: Append) -> None:
        """Say where the logs part, so that the leader skips a whole term at a time (§5.3)."""
        log = self.log
        if m.prev_index > log.last_index:
            hint_index, hint_term = log.last_index + 1, 0
        else:
            hint_term = log.term_at(m.prev_index) or 0
            hint_index = log.term_begin(m.prev_index)
        reply = AppendReply(
            self.id, m.src, self.term, False, 0, m.round, m.prev_index, hint_index, hint_term, self.doubt
        )  # fmt: skip
        self._send(reply)

    def _truncate(self, first: int) -> None:
        invariant(first > self.commit, "a committed entry is never removed (§5.4, State Machine Safety)")
        self.log.truncate(first)
        self.durable = min(self.durable, self.log.last_index)
        self._out.batches = [b for b in self._out.batches if b.first < first]
        self._configs = [(i, c) for i, c in self._configs if i < first]

    def _append(self, batch: Batch) -> None:
        self.log.append(batch)
        self._out.batches.append(batch)
        if batch.config is not None:
            self._configs.append((batch.first, batch.config))
            if self.role is Role.LEADER:
                self._follow_config(self._ticked_at)

    # --- the leader's half --------------------------------------------------------------------------------------

    def _follow_config(self, now: float) -> None:
        """Keep a Progress for every other member of the configuration, and for nobody else."""
        members = {m.id for m in self.config.members} - {self.id}
        for gone in self.progress.keys() - members:
            del self.progress[gone]
        for new in sorted(members - self.progress.keys()):
            self.progress[new] = Progress(self.log.last_index + 1, heard_at=now)

    def _send_appends(self, now: float) -> None:
        for peer in sorted(self.progress):
            progress = self.progress[peer]
            sent = False
            while not progress.snapshot and progress.next <= self.log.last_index and self._may_send(progress):
                if not self._send_batches(peer, progress):
                    break
                sent = True
            due = now - progress.sent_at >= self.timing.heartbeat_s
            behind = self._spread_commit and progress.commit_sent < self.commit
            if not sent and (due or behind or progress.round_sent < self._round):
                self._send_heartbeat(peer, progress)
                sent = True
            if sent:
                progress.sent_at = now
        self._spread_commit = False

    def _may_send(self, progress: Progress) -> bool:
        if progress.probing:
            return not progress.probe_sent
        return len(progress.in_flight) < self.bounds.appends_in_flight_max

    def _send_batches(self, peer: str, progress: Progress) -> bool:
        """Send the batches from `progress.next` on; False where they are gone and a snapshot is needed."""
        prev = progress.next - 1
        prev_term = self.log.term_at(prev)
        if prev_term is None:
            progress.snapshot = True
            self._out.needs_snapshot.append(peer)
            return False
        batches = tuple(self.log.after(prev, self.bounds.append_bytes_max))
        self._send(self._append_message(peer, progress, prev, prev_term, batches))
        if progress.probing:
            progress.probe_sent = True
        else:
            progress.next = batches[-1].last + 1
            progress.in_flight.append(batches[-1].last)
        return True

    def _send_heartbeat(self, peer: str, progress: Progress) -> None:
        """An empty append. While a snapshot is on its way it claims nothing about the log."""
        prev = 0 if progress.snapshot else progress.next - 1
        prev_term = self.log.term_at(prev)
        if prev_term is None:
            prev, prev_term = 0, 0
        self._send(self._append_message(peer, progress, prev, prev_term, ()))

    def _append_message(
        self, peer: str, progress: Progress, prev: int, prev_term: int, batches: tuple[Batch, ...]
    ) -> Append:
        progress.round_sent = self._round
        progress.commit_sent = self.commit
        confirmed = progress.doubt_at is not None and self._is_confirmed(progress, progress.doubt_at)
        digest = None if batches else self.digest
        return Append(
            self.id, peer, self.term, prev, prev_term, self.commit, self._round, batches, digest, confirmed
        )  # fmt: skip

    def _heard(self, peer: str, now: float) -> Progress | None:
        progress = self.progress.get(peer)
        if progress is not None:
            progress.heard_at = now
        return progress

    def _on_append_reply(self, m: AppendReply, now: float) -> None:
        progress = self._heard(m.src, now) if self.role is Role.LEADER else None
        if progress is None:
            return
        if not self._heed_doubt(m, progress):
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
            self._advance_commit()
        if progress.probing and not progress.snapshot and m.match >= progress.next - 1:
            progress.probing = False
            progress.next = max(progress.next, m.match + 1)
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
            self._advance_commit()
        return True

    def _doubt(self, progress: Progress) -> None:
        """Believe nothing that the member has said so far, and ask it anew where its log ends."""
        self._round += 1
        progress.doubt_at = self.log.last_index + 1
        progress.doubt_round = self._round
        progress.match = 0
        if not progress.snapshot:
            self._probe(progress, progress.next)

    def _is_confirmed(self, progress: Progress, doubt_at: int) -> bool:
        return progress.match >= doubt_at and (self.commit >= doubt_at or progress.vouched)

    def _clear_doubts(self) -> None:
        """See that there is an entry by which members in doubt can be confirmed."""
        waiting = any(p.doubt_at is not None and p.doubt_at > self.log.last_index for p in self.progress.values())
        if waiting and self.transfer_to is None:
            self._append_noop()

    def _backtrack(self, m: AppendReply, progress: Progress) -> None:
        """The logs part before `m.rejected`: go back to where they may meet, a term at a time (§5.3)."""
        if progress.snapshot or m.rejected <= progress.match or m.rejected >= progress.next:
            return  # an answer to something long settled
        upto = min(m.rejected, self.log.last_index) - 1
        shared = self.log.term_end(m.hint_term, upto) if m.hint_term else None
        following = shared + 1 if shared is not None else min(m.hint_index, m.rejected)
        following = max(following, progress.match + 1)
        if self.log.base_index < following - 1 < self.log.last_index:
            following = self.log.batch_at(following).first  # batches are sent whole
        self._probe(progress, following)

    def _probe(self, progress: Progress, following: int) -> None:
        progress.probing = True
        progress.probe_sent = False
        progress.in_flight.clear()
        progress.next = following

    def _advance_commit(self) -> None:
        """Commit what a majority holds durably, if it is of this term (§5.4.2, figure 8)."""
        voters = self.config.voters
        matches = sorted(self._match(v) for v in voters)
        index = matches[(len(voters) - 1) // 2]
        if index <= self.commit or index < self._term_begin:
            return
        self.commit = index
        self.doubt = False  # committed without its own help, see above
        if self.id not in voters and self.config_index <= index:
            self._hand_over_and_leave()

    def _match(self, voter: str) -> int:
        """Up to where `voter` counts for a commit."""
        if voter == self.id:
            return 0 if self.doubt else self.durable
        progress = self.progress[voter]
        return progress.match if progress.counts else 0

    def _hand_over_and_leave(self) -> None:
        """Tell the most advanced voter to stand, and step down: as the leader does whose own removal is committed
        (diss. §4.2.2)."""
        self._send_appends(float("inf"))  # the commit index, a last time
        others = [v for v in self.config.voters if v != self.id]
        if others:
            best = max(others, key=lambda v: self.progress[v].match)
            self._send(TimeoutNow(self.id, best, self.term))
        self._step_down()

    def _try_transfer(self) -> None:
        if self.transfer_to is None or self._transferred:
            return
        progress = self.progress[self.transfer_to]
        if progress.match == self.log.last_index:
            self._transferred = True
            self._send(TimeoutNow(self.id, self.transfer_to, self.term))

    # --- reads --------------------------------------------------------------------------------------------------

    def _on_read_request(self, m: ReadRequest) -> None:
        if self.role is Role.LEADER and len(self._reads_waiting) < self.bounds.reads_waiting_max:
            self._reads_waiting.append((m.src, m.ticket))

    def _start_read_round(self) -> None:
        """Confirm the leadership once for all reads that wait. One round is under way at a time: who comes
        meanwhile shares the next one."""
        if not self._reads_waiting or self._reads_active or not self.has_committed_in_term:
            return
        self._round += 1
        self._read_round = self._round
        self._read_index = self.commit
        self._reads_active, self._reads_waiting = self._reads_waiting, []
        self._confirm_reads()

    def _confirm_reads(self) -> None:
        if not self._reads_active:
            return
        if not self._is_majority(lambda progress: progress.round >= self._read_round):
            return
        for src, ticket in self._reads_active:
            if src == self.id:
                self._out.reads.append((ticket, self._read_index))
                continue
            progress = self.progress.get(src)
            if progress is not None and progress.commit_sent < self._read_index:
                self._send_heartbeat(src, progress)  # so that it need not wait for the next one to apply that far
            self._send(ReadReply(self.id, src, self.term, ticket, self._read_index))
        self._reads_active = []

    # --- sending ------------------------------------------------------------------------------------------------

    def _send(self, message: RaftMessage, durable: bool = False) -> None:
        """Hand out `message`; with `durable`, or while the term it names is not yet on disk, after the save."""
        if durable or self._durable_state.term != self.term:
            self._out.after_save.append(message)
        else:
            self._out.messages.append(message)
