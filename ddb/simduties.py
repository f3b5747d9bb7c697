"""What a member owes to the others at each step, though nothing need be lost yet when it fails to do so.

Laws: as simrules.py's.

Theory. The rules of simrules.py are about the cluster: a leader too many, an entry that differs. A bug breaks them only
after a chain of accidents. The duties here are each member's own, and are broken in the step in which the chain begins: to
count as durable what is on the disk, to be in doubt where it is not, to let nobody stand beside a leader that is
heard. So a bug that is one crash and one lost message away from harm is seen without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ddb.kv import Machine
from ddb.messages import (
    Append,
    AppendReply,
    Configuration,
    ElectionReply,
    ElectionRequest,
    Message,
    ReadReply,
    ReadRequest,
    Role,
    SnapshotReply,
    TimeoutNow,
    VoteRequest,
)
from ddb.node import Node
from ddb.raft import Raft, Ready
from ddb.simhost import Host
from ddb.simrules import Rules, Violation

NOT_BESIDE: Final = "who hears a leader lets nobody stand, and follows no candidate (dissertation §4.2.3, §9.6)"
ASKED_FIRST: Final = "a term is raised by who could win: a majority has let it stand (dissertation §9.6)"
FOLLOWED: Final = "a leader that no majority answers steps down (dissertation §6.2)"
ACK_EQUAL: Final = "what is acknowledged is on disk, and is the leader's (Raft §5.3)"
ACK_KEPT: Final = "what is acknowledged to a leader stays while it leads (Raft §5.3)"
KEPT: Final = "what was durable is there after a crash, or the member is in doubt (Raft figure 2)"
DURABLE: Final = "what counts as durable is on this disk (Raft figure 2)"
CONFIG_AS_OF: Final = "a snapshot has the configuration as of its last entry (Raft §7)"
FITS: Final = "the log that stays behind a snapshot fits it (Raft §7)"
NOT_BACK: Final = "a snapshot never takes a right state back (Raft §7)"
GONE: Final = "who was removed is a member no more"
HANDED_TO: Final = "leadership is handed to a voter that has the whole log (dissertation §3.10)"
HANDED_WHOLE: Final = "who hands over takes no more writes (dissertation §3.10)"
TAKES_TERM: Final = "a higher term is taken over, and an older one counts for nothing (Raft §5.1)"
FOLLOWS: Final = "who hears the leader of its term follows it (Raft §5.2)"
ONLY_CONFLICT: Final = "only a conflict cuts the log (Raft §5.3)"
NAMED: Final = "a follower acknowledges and commits what the leader has named, and no more (Raft §5.3)"
UP_TO_DATE: Final = "a vote goes to a log that is at least as up-to-date (Raft §5.4.1)"
CONFIRMED: Final = "a read is confirmed by a majority that followed the leader after it was asked (dissertation §6.4)"
CONFIG_IN_LOG: Final = "the configuration in force is the newest in the log (dissertation §4.1)"
REMOVED: Final = "a leader whose removal is committed steps down (dissertation §4.2.2)"
NOOP_FIRST: Final = "the members change after an entry of the leader's own term is committed (raft-dev, 2015)"
NO_MORE: Final = "a snapshot knows no more than the log on the same disk (sync.py)"
DOUBTED: Final = "who is in doubt commits nothing (raft.py)"
DOUBT_ENDS: Final = "a doubt ends when all is there that was committed when it began (raft.py)"
FOLLOWED_LENIENCE_S: Final = 1.0  # beside two time-outs


@dataclass(slots=True)
class _Seen:
    """What a program looked like at its last step, and what it was told."""

    host: str
    node: Node
    term: int
    role: Role
    durable: int
    doubt: bool
    doubt_since: int  # what was committed when the doubt began
    config_index: int = -1
    ask: int = -1
    answers: set[str] = field(default_factory=set)  # who answered the latest ElectionRequest, and knew of no leader
    asked_beside: dict[tuple[str, int], list[bool]] = field(default_factory=dict)
    """ElectionRequests not yet answered, by (member, ask): whether a leader was heard when each came."""
    told_term: int = 0  # the highest that it was told of
    told_to_stand: bool = False
    heard: dict[str, float] = field(default_factory=dict)  # member -> when it last answered this leader
    round: int = 0  # the highest that this leader has sent
    echoed: dict[str, int] = field(default_factory=dict)  # member -> the highest round that it answered
    asked: dict[tuple[str, int], int] = field(default_factory=dict)  # reads: (member, ticket) -> `round` at that time
    acked: int = 0  # what it acknowledged in this term
    named: int = 0  # how far a leader's appends went that fitted, in the term `named_in`
    named_in: int = 0
    end: tuple[int, int] = (0, 0)  # of its log
    transferring: int | None = None  # where a leader's log ended when it began to hand over
    commit: int = 0
    unanimous: bool = False  # whether only unanimity can have elected it


class Duties:
    """Each member's duties. `rules` knows what is committed, and on whose disks."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._seen: dict[str, _Seen] = {}  # by host
        self._ends: dict[str, tuple[int, int]] = {}  # id -> (index, term) where its durable log ended
        self._cutting: dict[str, bool] = {}  # id -> whether a save is under way that may cut that off
        self._sure: dict[tuple[str, int], int] = {}  # (id, term) -> acknowledged without doubt
        self._configs: list[tuple[int, Configuration]] = []  # as they were applied

    def attach(self, host: Host, node: Node) -> None:
        """Watch the program that has just begun on `host`, after the rules do."""
        replica, raft = node.replica, node.replica.raft
        seen = _Seen(host.name, node, raft.term, raft.role, raft.durable, raft.doubt, self._rules.committed)
        self._seen[host.name] = seen
        index, term = self._ends.get(node.id, (0, 0))
        there = raft.log.term_at(index) == term or raft.log.base_index >= index
        if not (there or raft.doubt or self._cutting.get(node.id)):
            self._fail(KEPT, seen, f"{index}@{term} was durable: {raft}")
        self._ends[node.id] = (raft.log.last_index, raft.log.last_term)
        self._cutting[node.id] = False
        self._look_at_base(seen, replica.machine.applied)
        self._wrap(seen, node)

    def _fail(self, duty: str, seen: _Seen, what: str) -> None:
        raise Violation(duty, seen.host, what)

    def _wrap(self, seen: _Seen, node: Node) -> None:
        replica, raft, writer = node.replica, node.replica.raft, node.writer
        send, step, tick, read, work_off = replica.send, raft.step, raft.tick, raft.read, replica._work_off
        save, report, restored, apply = writer.save, replica.saved, replica.restored, replica._apply

        def watch_send(message: Message) -> None:
            self._sending(seen, message)
            send(message)

        def watch_step(message: Any, now: float) -> None:
            self._receiving(seen, message, now)
            kind, term, vote = type(message), raft.term, raft.vote
            if kind is Append:
                self._step_append(seen, message, step, now)
            elif kind is VoteRequest:
                beside = not message.transfer and message.term > term and raft.hears_leader(now)
                step(message, now)
                if beside and raft.term != term:
                    self._fail(NOT_BESIDE, seen, f"{message!r}: {raft}")
                self._look_at_vote(seen, message, term, vote)
                return
            elif kind is AppendReply and message.term < term:
                before = replace(raft.progress[message.src]) if message.src in raft.progress else None
                step(message, now)
                if before is not None and before != raft.progress.get(message.src):
                    self._fail(TAKES_TERM, seen, f"{message!r} is of an older term: {raft}")
            else:
                step(message, now)
            if raft.term < message.term and kind is not ElectionRequest:
                self._fail(TAKES_TERM, seen, f"{message!r}: {raft}")

        def watch_read(ticket: int) -> bool:
            if raft.role is Role.LEADER:
                seen.asked[raft.id, ticket] = seen.round
            return read(ticket)

        def watch_work(ready: Ready, now: float) -> None:
            for ticket, _ in ready.reads:
                self._look_at_read(seen, raft.id, ticket)
            work_off(ready, now)

        def watch_tick(now: float) -> None:
            tick(now)
            if raft.role is Role.LEADER:
                self._look_at_quorum(seen, now)

        def watch_save(*args: Any, **options: Any) -> int:
            batches = args[1] if len(args) > 1 else options.get("batches", ())
            reset = args[2] if len(args) > 2 else options.get("reset")
            if reset or (batches and batches[0].first <= self._ends[node.id][0]):
                self._cutting[node.id] = True
            ticket = save(*args, **options)
            self._note_end(seen, ticket if writer.saved >= ticket else None)
            return ticket

        def watch_saved(ticket: int, now: float) -> None:
            self._note_end(seen, ticket)
            report(ticket, now)

        def watch_restored(machine: Machine) -> None:
            was, mending = replica.machine.applied, replica.diverged
            restored(machine)
            if machine.applied < was and not mending:
                self._fail(NOT_BACK, seen, f"{machine} after {was}")
            self._look_at_base(seen, machine.applied)
            self._look_behind(seen)

        def watch_apply(batch: Any) -> None:
            apply(batch)
            if batch.config is not None and (not self._configs or self._configs[-1][0] < batch.first):
                self._configs.append((batch.first, batch.config))

        replica.send = watch_send
        replica.saved = watch_saved  # type: ignore[method-assign]
        replica.restored = watch_restored  # type: ignore[method-assign]
        replica._apply = watch_apply  # type: ignore[method-assign]
        replica._work_off = watch_work  # type: ignore[method-assign]
        raft.step = watch_step  # type: ignore[method-assign, assignment]
        raft.tick = watch_tick  # type: ignore[method-assign]
        raft.read = watch_read  # type: ignore[method-assign]
        writer.save = watch_save  # type: ignore[method-assign]

    def _note_end(self, seen: _Seen, ticket: int | None) -> None:
        """All up to `ticket` is durable."""
        node = seen.node
        if ticket is not None and ticket >= node.writer._tickets:
            self._ends[node.id] = node.journal.last
            self._cutting[node.id] = False
        elif not self._cutting[node.id]:
            self._ends[node.id] = node.journal.last

    # -- what goes out and comes in

    def _sending(self, seen: _Seen, m: Message) -> None:
        kind, raft = type(m), seen.node.replica.raft
        if kind is AppendReply:
            if m.ok and m.match:  # type: ignore[union-attr]
                self._acknowledging(seen, m)  # type: ignore[arg-type]
        elif kind is ElectionRequest:
            if m.ask != seen.ask:  # type: ignore[union-attr]
                seen.ask = m.ask  # type: ignore[union-attr]
                seen.answers = set()
        elif kind is ElectionReply:
            # (It may have waited for the disk: what counts is what was heard when the question came.)
            waiting = seen.asked_beside.pop((m.dst, m.ask), [False])  # type: ignore[union-attr]
            if waiting[0] and m.answer == "yield":  # type: ignore[union-attr]
                self._fail(NOT_BESIDE, seen, f"{m!r}: {raft}")
            if waiting[1:]:
                seen.asked_beside[m.dst, m.ask] = waiting[1:]  # type: ignore[union-attr]
        elif kind is Append:
            if m.term == raft.term and m.round > seen.round:  # type: ignore[union-attr]
                seen.round = m.round  # type: ignore[union-attr]
        elif kind is ReadReply:
            self._look_at_read(seen, m.dst, m.ticket)  # type: ignore[union-attr]
        elif kind is TimeoutNow and raft.transfer_to == m.dst:
            target = self._raft_of(m.dst)
            if m.dst not in raft.config.voters:
                self._fail(HANDED_TO, seen, f"{m!r}: {raft}, {raft.config.voters}")
            elif target is None or target.doubt or target.term != m.term:  # type: ignore[union-attr]
                pass  # it has started anew meanwhile, and may have lost what it had
            elif target.durable < raft.log.last_index:
                self._fail(HANDED_TO, seen, f"{m!r}: {raft}, {target}")

    def _raft_of(self, id: str) -> Raft | None:
        return next((seen.node.replica.raft for seen in self._seen.values() if seen.node.id == id), None)

    def _holds(self, id: str, index: int, term: int) -> bool:
        return id in self._rules.holders.get((index, term), ())

    def _acknowledging(self, seen: _Seen, m: AppendReply) -> None:
        raft = seen.node.replica.raft
        if not m.doubt:
            # Also what waited for the disk while the term went by. Whoever was voted for since has these entries too.
            self._sure[raft.id, m.term] = max(self._sure.get((raft.id, m.term), 0), m.match)
        if m.term != raft.term:
            return
        seen.acked = max(seen.acked, m.match)
        if m.match > seen.named:
            self._fail(NAMED, seen, f"{m!r}, and the leader has named {seen.named}")
        term = raft.log.term_at(m.match)
        if term is None:
            return
        leader = self._raft_of(m.dst)
        if leader is not None and leader.role is Role.LEADER and leader.term == m.term:
            theirs = leader.log.term_at(m.match)
            if theirs not in (None, term):
                self._fail(ACK_EQUAL, seen, f"{m!r} is of term {term}, the leader's of {theirs}")
        if m.match > raft.log.base_index and not self._holds(raft.id, m.match, term):
            self._fail(ACK_EQUAL, seen, f"{m!r} of term {term} is not on disk")

    def _step_append(self, seen: _Seen, m: Append, step: Callable[[Any, float], None], now: float) -> None:
        """Let the core take in an append, and look at what it makes of it."""
        raft = seen.node.replica.raft
        log, commit, durable = raft.log, raft.commit, raft.durable
        last, batches = log.last_index, m.batches
        stale = m.term < raft.term
        fits = not stale and (m.prev_index <= log.base_index or log.term_at(m.prev_index) == m.prev_term)
        conflicts = bool(batches) and any(log.term_at(b.first) not in (None, b.term) for b in batches)
        step(m, now)
        if not stale:
            if m.term != seen.named_in:
                seen.named, seen.named_in = 0, m.term
            if raft.role is not Role.FOLLOWER or raft.leader != m.src:
                self._fail(FOLLOWS, seen, f"{m!r}: {raft}")
        if fits:
            seen.named = max(seen.named, batches[-1].last if batches else m.prev_index)
        if (log.last_index < last or raft.durable < durable) and not (conflicts and fits):
            self._fail(ONLY_CONFLICT, seen, f"{m!r}: {raft}, where {last} was the last")
        if raft.commit > commit and raft.commit > (seen.named if fits else 0):
            self._fail(NAMED, seen, f"{m!r}: {raft}, where {commit} was committed")

    def _look_at_vote(self, seen: _Seen, m: VoteRequest, term: int, vote: str | None) -> None:
        raft = seen.node.replica.raft
        voted = raft.vote == m.src and (raft.term, raft.vote) != (term, vote)
        if voted and (m.last_term, m.last_index) < (raft.log.last_term, raft.log.last_index):
            self._fail(UP_TO_DATE, seen, f"{m!r}: {raft}")

    def _receiving(self, seen: _Seen, m: Any, now: float) -> None:
        kind = type(m)
        if kind is ElectionRequest:
            beside = seen.node.replica.raft.hears_leader(now)
            seen.asked_beside.setdefault((m.src, m.ask), []).append(beside)
            return
        if m.term > seen.told_term:
            seen.told_term = m.term
        if kind is AppendReply or kind is SnapshotReply:
            seen.heard[m.src] = now
            if kind is AppendReply and m.term == seen.node.replica.raft.term and (seen.unanimous or not m.doubt):
                seen.echoed[m.src] = max(seen.echoed.get(m.src, 0), m.round)
        elif kind is ElectionReply:
            if m.ask == seen.ask and m.answer != "leader":
                seen.answers.add(m.src)
        elif kind is ReadRequest:
            seen.asked.setdefault((m.src, m.ticket), seen.round)  # it may come twice
        elif kind is TimeoutNow:
            seen.told_to_stand = True

    # -- after each step

    def look(self, host: Host) -> None:
        """Whatever can be seen from outside after a step of the program on `host`; before the rules look."""
        seen = self._seen[host.name]
        raft = seen.node.replica.raft
        if raft.term != seen.term:
            self._look_at_term(seen)
        if raft.role is not seen.role:
            seen.role = raft.role
            seen.heard.clear()
            seen.echoed.clear()
            seen.asked.clear()
            seen.round = 0
            seen.transferring = None
            seen.unanimous = False
            if raft.role is Role.LEADER:
                rules = self._rules.seen[host.name]
                seen.unanimous = all(m.id == raft.id or m.id in rules.votes for m in raft.config.members)
        end = (raft.log.last_index, raft.log.last_term)
        if raft.durable != seen.durable or end != seen.end:
            self._look_at_durable(seen)
        if raft.config_index != seen.config_index or end[1] != seen.end[1]:
            self._look_at_config(seen)
        seen.end = end
        if raft.log.last_index < seen.acked and raft.role is not Role.LEADER:
            self._fail(ACK_KEPT, seen, f"{raft}, and {seen.acked} was acknowledged")
        if raft.role is Role.LEADER:
            self._look_at_leader(seen)
        self._look_at_checkpoint(seen)
        if raft.doubt is not seen.doubt:
            if raft.doubt:
                seen.doubt_since = self._rules.committed
            elif raft.role is not Role.LEADER and raft.log.last_index < seen.doubt_since:
                self._fail(DOUBT_ENDS, seen, f"{raft}, and {seen.doubt_since} was committed")
            seen.doubt = raft.doubt
        seen.commit = raft.commit

    def _look_at_term(self, seen: _Seen) -> None:
        raft = seen.node.replica.raft
        if raft.term > max(seen.told_term, 1) and not seen.told_to_stand:
            voters = raft.config.voters
            agreed = len((seen.answers | {raft.id}).intersection(voters))
            if raft.vote != raft.id or 2 * agreed <= len(voters):
                self._fail(ASKED_FIRST, seen, f"{raft} of {voters}, let stand by {sorted(seen.answers)}")
        seen.term = raft.term
        seen.acked = 0
        seen.told_to_stand = False

    def _look_at_read(self, seen: _Seen, src: str, ticket: int) -> None:
        raft = seen.node.replica.raft
        asked_at = seen.asked.pop((src, ticket), None)
        if asked_at is None or raft.role is not Role.LEADER:
            return
        followed = {raft.id, *(id for id, round_ in seen.echoed.items() if round_ > asked_at)}
        # A change may have been appended since, in the same turn.
        in_force = [config.voters for _, config in raft._configs[-2:]]
        if not any(2 * len(followed.intersection(voters)) > len(voters) for voters in in_force):
            self._fail(CONFIRMED, seen, f"{raft} of {in_force}: asked in round {asked_at}, echoed {seen.echoed}")

    def _look_at_quorum(self, seen: _Seen, now: float) -> None:
        raft = seen.node.replica.raft
        oldest = now - 2 * raft.timing.election_timeout_s - FOLLOWED_LENIENCE_S
        voters = raft.config.voters
        alive = sum(1 for v in voters if v == raft.id or seen.heard.setdefault(v, now) >= oldest)
        if 2 * alive <= len(voters):
            self._fail(FOLLOWED, seen, f"{raft} of {voters} at {now:.3f}, heard {seen.heard}")

    def _look_at_durable(self, seen: _Seen) -> None:
        raft = seen.node.replica.raft
        seen.durable = raft.durable
        if raft.durable > raft.log.base_index:
            term = raft.log.term_at(raft.durable)
            if term is None or not self._holds(raft.id, raft.durable, term):
                self._fail(DURABLE, seen, f"{raft}: {raft.durable}@{term} is not on disk")

    def _look_at_config(self, seen: _Seen) -> None:
        raft, at = seen.node.replica.raft, seen.node.replica.raft.config_index
        if gone := {m.id for m in raft.config.members}.intersection(raft.config.removed):
            self._fail(GONE, seen, f"{raft}: {sorted(gone)}")
        if at > raft.log.base_index and (at > raft.log.last_index or raft.log.batch_at(at).config != raft.config):
            self._fail(CONFIG_IN_LOG, seen, f"{raft} at {at}: {raft.config}")
        changes = raft.role is Role.LEADER and at != seen.config_index and raft.log.term_at(at) == raft.term
        if changes and raft.log.term_at(raft.commit) != raft.term:
            self._fail(NOOP_FIRST, seen, f"{raft} at {at}: {raft.config}")
        seen.config_index = at

    def _look_at_leader(self, seen: _Seen) -> None:
        raft = seen.node.replica.raft
        if raft.id not in raft.config.voters and raft.config_index <= raft.commit:
            self._fail(REMOVED, seen, f"{raft}: {raft.config}")
        if raft.transfer_to is None:
            seen.transferring = None
        elif seen.transferring is None:
            seen.transferring = raft.log.last_index
        elif raft.log.last_index != seen.transferring:
            self._fail(HANDED_WHOLE, seen, f"{raft}, which ended at {seen.transferring}")
        if raft.commit <= seen.commit or seen.unanimous or raft.commit <= raft.log.base_index:
            return
        # A change may have been appended in the very turn in which its predecessor was committed.
        if not any(self._are_sure(seen, config.voters) for config in (raft.config, raft.config_at(raft.commit))):
            self._fail(DOUBTED, seen, f"{raft} of {raft.config.voters}")

    # -- snapshots

    def _look_at_checkpoint(self, seen: _Seen) -> None:
        node = seen.node
        store: Any = node.replica.machine.table
        if node.sync.writing:
            applied, end = store._checkpoint.meta.applied, node.journal.last[0]
            if applied > end:
                self._fail(NO_MORE, seen, f"{applied} is in it, and the log on disk ends at {end}: {node.replica.raft}")

    def _are_sure(self, seen: _Seen, voters: tuple[str, ...]) -> bool:
        """Whether a majority of `voters` has acknowledged what is committed, and was not in doubt.

        Several acknowledgements may come in one step: the leader's own doubt ends with the first that make the others a
        majority for something newly committed, and for what the next ones bring its word is good.
        """
        raft = seen.node.replica.raft
        acknowledged = sorted(self._sure.get((v, raft.term), 0) for v in voters if v != raft.id)
        others = sum(index >= raft.commit for index in acknowledged)
        beside = len(voters) // 2 + 1  # so many others are a majority
        doubt_ended = len(acknowledged) >= beside and acknowledged[-beside] > seen.commit
        own = raft.id in voters and (not seen.doubt or doubt_ended)
        return 2 * (others + own) > len(voters)

    def _look_at_base(self, seen: _Seen, applied: int) -> None:
        raft = seen.node.replica.raft
        known = next((c for at, c in reversed(self._configs) if at <= applied), None)
        if known is not None and applied and raft.config_at(applied) != known:
            self._fail(CONFIG_AS_OF, seen, f"as of {applied}: {raft.config_at(applied)}, and it was {known}")

    def _look_behind(self, seen: _Seen) -> None:
        log = seen.node.replica.raft.log
        before = log.base_term
        for batch in log.batches():
            known = self._rules.batches.get((batch.first, batch.term))
            if known is not None and known[1] != before:
                self._fail(FITS, seen, f"{batch!r} after one of term {before}, elsewhere of {known[1]}")
            before = batch.term
