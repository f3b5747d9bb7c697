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
(unless every single member agrees: then nobody is left whom a forgotten vote could elect), not for a commit, not for a
read. The doubt ends when the leader has committed, without this member's help, an entry that it appended after
it heard of the doubt, and the member has that entry too: so it has all that it ever acknowledged; and who might still
collect votes on the strength of a forgotten one lacks that entry, which a majority would miss in his log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ddb import codec
from ddb.config import Bounds, Timing
from ddb.election import Answer, Election, Move, View
from ddb.errors import BadRequest, NoLeader, Overloaded, invariant
from ddb.leadership import Leadership, Progress
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


NOTHING: Final = Ready()
"""What most ticks come to. Nobody puts anything into it."""


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
        first_ask: int = 0,
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
        self.digest: tuple[int, int] | None = None  # the state machine's (index, digest), sent with heartbeats
        self.may_stand = True  # False on a member that could not serve as leader, with a full disk for example
        self.remembered: frozenset[str] = frozenset()  # members named by entries that the log may have lost (node.py)
        self._configs = [(log.base_index, config)]
        self._configs += [(b.first, b.config) for b in log.batches() if b.config]
        self._emitted = self.commit  # committed entries up to here were handed out for applying
        self._durable_state = hard_state
        self._handed_out = hard_state
        self._heard_leader_at = float("-inf")
        self._connected: set[str] = set()
        self._ask = first_ask  # one that no earlier life used, whose answers may still come
        self._votes: dict[str, bool] = {}  # who granted -> whether in doubt
        self._refusals: set[str] = set()
        self._ticked_at = now
        self._leadership: Leadership | None = None  # while this member leads
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

    @property
    def members_in_force(self) -> frozenset[str]:
        """Everybody named by the committed configuration, or by one after it."""
        configs = [config for index, config in self._configs if index > self.commit]
        return frozenset(m.id for config in [self.config_at(self.commit), *configs] for m in config.members)

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
        """Whether this leads and has committed an entry of its own term: then its commit index is the cluster's."""
        return self._leadership is not None and self._leadership.has_committed

    @property
    def progress(self) -> Mapping[str, Progress]:
        """What the leader knows of the others, by id; nothing where this does not lead."""
        return self._leadership.progress if self._leadership is not None else {}

    @property
    def transfer_to(self) -> str | None:
        """To whom the leadership is being handed over."""
        return self._leadership.transfer_to if self._leadership is not None else None

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
        if self._leadership is not None:
            self._check_quorum(self._leadership, now, stalled)
        if self._leadership is not None:
            self._leadership.tick(now)
        elif now >= self.election.due_s:
            self._move(self.election.tick(now, self._view(now)), now)

    def connected(self, peer: str) -> None:
        """A connection to `peer` stands."""
        self._connected.add(peer)
        if self._leadership is not None:
            self._leadership.connected(peer)

    def disconnected(self, peer: str, now: float) -> None:
        """The connection to `peer` broke. If it led, that is suspicion enough: killed processes close their sockets."""
        self._connected.discard(peer)
        if peer == self.leader and self.role is not Role.LEADER:
            self.leader = None
            self.election.suspect(now)

    def step(self, m: RaftMessage, now: float) -> None:
        """Take in a message of another member. Raises BadRequest where it contradicts itself; then nothing has changed."""
        if type(m) is Append:
            _check_order(m)
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
        elif type(m) is AppendReply and self._leadership is not None:
            self._leadership.on_append_reply(m, now)
            self._leave_if_over()
        elif type(m) is VoteRequest:
            self._on_vote_request(m, now)
        elif type(m) is VoteReply:
            self._on_vote_reply(m, now)
        elif type(m) is ElectionReply:
            self._on_election_reply(m, now)
        elif type(m) is TimeoutNow:
            self._on_timeout_now(now)
        elif type(m) is ReadRequest and self._leadership is not None:
            self._leadership.read(m.src, m.ticket)
        elif type(m) is ReadReply:
            self._out.reads.append((m.ticket, m.index))
        elif type(m) is InstallSnapshot:
            self._hear_leader(m.src, now)
            self._out.chunks.append(m)
        elif type(m) is SnapshotRequest and self._leadership is not None:
            self._out.needs_snapshot.append(m.src)
        elif type(m) is SnapshotReply and self._leadership is not None:
            self._leadership.heard(m.src, now)
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
        if self._leadership is not None:
            self._leadership.read(self.id, ticket)
        elif self.leader is not None:
            self.send(ReadRequest(self.id, self.leader, self.term, ticket))
        else:
            return False
        return True

    def transfer(self, to: str, now: float) -> None:
        """Hand leadership to the voter `to`: bring it up to date, then tell it to stand (diss. §3.10).

        Until it leads, or a time-out has passed, nothing is proposed here. Raises BadRequest where `to` can't lead.
        """
        if self._leadership is None:
            raise NoLeader("This node does not lead (any more); ask the leader.")
        if to == self.id or to not in self.config.voters:
            raise BadRequest("Leadership can only go to another voter.")
        self._leadership.transfer(to, now)

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
            if self._leadership is not None:
                self._leadership.advance_commit()
                self._leave_if_over()

    def compact(self, index: int) -> None:
        """The snapshot covers everything up to `index`; forget the log up to there."""
        invariant(index <= self._emitted, "only what was applied is compacted")
        self.log.compact(index)
        base = self.log.base_index
        self._configs = [(base, self.config_at(base)), *((i, c) for i, c in self._configs if i > base)]

    def snapshot_sent(self, peer: str, index: int) -> None:
        """`peer` has installed our snapshot of `index`; the log takes over from there."""
        if self._leadership is not None:
            self._leadership.snapshot_sent(peer, index)

    def snapshot_failed(self, peer: str) -> None:
        """The snapshot for `peer` came to nothing; find out anew what it needs."""
        if self._leadership is not None:
            self._leadership.snapshot_failed(peer)

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
        if self._leadership is not None:
            self._hand_over_and_leave(self._leadership)
        elif self.role is Role.CANDIDATE:
            self._step_down()

    def ready(self, now: float) -> Ready:
        """What is to be done because of all inputs since the last call; NOTHING where that is nothing."""
        if self._leadership is not None:
            self._leadership.send_appends(now)
        out, owes_hard_state = self._out, self._owes_hard_state
        if not (
            out.messages or out.after_save or out.batches or self._ack or out.reads or self.commit > self._emitted
            or owes_hard_state or out.chunks or out.needs_snapshot or out.reset
        ):  # fmt: skip
            return NOTHING
        self._out = Ready()
        if self._ack is not None:
            out.after_save.append(self._ack)
            self._ack = None
        if owes_hard_state:
            out.hard_state = self._handed_out = HardState(self.term, self.vote, self.doubt)
        if self.commit > self._emitted:
            out.committed = self.log.span(self._emitted, self.commit)
            self._emitted = self.commit
        return out

    @property
    def _owes_hard_state(self) -> bool:
        """Whether term, vote and doubt are not those that were last handed out for saving."""
        handed_out = self._handed_out
        return handed_out.term != self.term or handed_out.vote != self.vote or handed_out.doubt != self.doubt

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
                    self.send(ElectionRequest(self.id, voter, self.term, *last, self.name, self._ask))
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
        for id in sorted(self._everybody - {self.id}):  # learners too, for unanimity
            last = (self.log.last_index, self.log.last_term)
            self.send(VoteRequest(self.id, id, self.term, *last, transfer), durable=True)

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
        self._leadership = None

    def append_noop(self) -> None:
        """See leadership.Member."""
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
            self.send(AppendReply(self.id, m.src, self.term, False, 0, 0), durable=True)
        elif type(m) is VoteRequest:
            self.send(VoteReply(self.id, m.src, self.term, False, self.doubt), durable=True)

    def _on_election_request(self, m: ElectionRequest, now: float) -> None:
        answer = self.election.asked(now, self._view(now), (m.last_term, m.last_index, m.name, m.src))
        self.send(ElectionReply(self.id, m.src, self.term, answer.value, m.ask))

    def _on_election_reply(self, m: ElectionReply, now: float) -> None:
        if m.ask == self._ask and self.role is not Role.LEADER and m.src in self.config.voters:
            self._move(self.election.answered(now, self._view(now), m.src, Answer(m.answer)), now)

    def _on_vote_request(self, m: VoteRequest, now: float) -> None:
        up_to_date = (m.last_term, m.last_index) >= (self.log.last_term, self.log.last_index)  # §5.4.1
        granted = up_to_date and self.vote in (None, m.src)
        if granted:
            self.vote = m.src
            self.election.voted(now, m.src)
        self.send(VoteReply(self.id, m.src, self.term, granted, self.doubt), durable=True)

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
        """Lead, if a majority of voters that remember all they acknowledged agree, or every single member."""
        self._votes[voter] = doubt
        voters = self.config.voters
        sure = sum(1 for v in voters if self._votes.get(v) is False)
        if 2 * sure > len(voters) or self._is_unanimous:
            self._lead(now)

    @property
    def _is_unanimous(self) -> bool:
        """Whether every voter has voted for this candidate, and every learner: it may have become a voter by an entry
        that was forgotten. So may somebody whom the log, as it is now, does not name at all: see `remembered`."""
        return self._votes.keys() >= self._everybody

    @property
    def _everybody(self) -> frozenset[str]:
        """Every member that this one may know of: by its log, and by what it remembers beside that."""
        return self.remembered.union([m.id for m in self.config.members])

    def _may_still_win(self) -> bool:
        """Whether so few have refused that a majority is in reach, and somebody is connected who has not answered yet."""
        voters = self.config.voters
        unanswered = self._connected.intersection(self._everybody).difference(self._votes, self._refusals)
        return bool(unanswered) and 2 * len(self._refusals.intersection(voters)) < len(voters)

    def _lead(self, now: float) -> None:
        invariant(self._durable_state.term == self.term, "a leader's term is on disk")
        self.role = Role.LEADER
        self.leader = self.id
        unanimous = self._is_unanimous
        self.doubt = self.doubt and not unanimous
        self._leadership = Leadership(self, now, unanimous)
        self.append_noop()  # an entry of its own commits what former terms left behind (§8)

    def _check_quorum(self, leadership: Leadership, now: float, stalled: bool) -> None:
        """Step down where no majority has answered within the time-out (diss. §6.2): it may lead elsewhere.

        After a stall (the process was stopped, or the machine asleep) the answers that had queued up meanwhile seem fresh, and are not.
        """
        oldest = now if stalled else now - self.timing.election_timeout_s
        if leadership.is_followed(oldest):
            self._heard_leader_at = oldest  # should it lose the lead: how old its state may be
        else:
            self._step_down()
            self.election.follow(now)

    def _leave_if_over(self) -> None:
        if self._leadership is not None and self._leadership.is_over:
            self._hand_over_and_leave(self._leadership)

    def _hand_over_and_leave(self, leadership: Leadership) -> None:
        """Tell the most advanced voter to stand, and step down: as the leader does whose own removal is committed
        (diss. §4.2.2)."""
        leadership.send_appends(float("inf"))  # the commit index, a last time
        best = leadership.most_advanced()
        if best is not None:
            self.send(TimeoutNow(self.id, best, self.term))
        self._step_down()

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
            self.send(AppendReply(self.id, m.src, self.term, True, matched, m.round, doubt=self.doubt))
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
        self.send(reply)

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
            if self._leadership is not None:
                self._leadership.follow_config(self._ticked_at)

    # --- for the leadership, see leadership.Member --------------------------------------------------------------

    def read_confirmed(self, ticket: int, index: int) -> None:
        """See leadership.Member."""
        self._out.reads.append((ticket, index))

    def snapshot_needed(self, peer: str) -> None:
        """See leadership.Member."""
        self._out.needs_snapshot.append(peer)

    # --- sending ------------------------------------------------------------------------------------------------

    @property
    def term_is_durable(self) -> bool:
        """Whether the term may be told to others."""
        return self._durable_state.term == self.term

    def send(self, message: RaftMessage, durable: bool = False) -> None:
        """Hand out `message`; with `durable`, or while the term it names is not yet on disk, after the save."""
        if durable or not self.term_is_durable:
            self._out.after_save.append(message)
        else:
            self._out.messages.append(message)


def _check_order(m: Append) -> None:
    """Raises BadRequest where no leader would send `m`: its batches must adjoin, in terms that never go back."""
    index, term = m.prev_index, m.prev_term
    for batch in m.batches:
        if batch.first != index + 1 or not term <= batch.term <= m.term:
            raise BadRequest(f"an append after {index}@{term} in term {m.term} can't hold the {batch!r}")
        index, term = batch.last, batch.term
