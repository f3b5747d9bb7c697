"""Each rule can say no: a sound cluster breaks none of them, and one that does what it must not breaks that one."""

from __future__ import annotations

import logging
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pytest

from ddb import simrules
from ddb.agenda import Agenda
from ddb.messages import (
    Append,
    AppendReply,
    Batch,
    Configuration,
    ElectionReply,
    ElectionRequest,
    HardState,
    Member,
    Message,
    ReadRequest,
    Role,
    VoteReply,
    VoteRequest,
)
from ddb.node import Node
from ddb.raft import Raft
from ddb.simhost import Host
from ddb.simrules import Violation, brief
from ddb.simtown import Town, draw_plan

WITHIN_S = 30.0


class Careless:
    """In the place of the duties (simduties.py), which would object first."""

    def __init__(self, *_: object) -> None:
        pass

    def attach(self, *_: object) -> None:
        pass

    def look(self, *_: object) -> None:
        pass


class Cluster:
    """Three nodes that are well, under the rules alone. `leader` leads, `follower` and `other` follow."""

    def __init__(self) -> None:
        self.agenda = Agenda()
        self.met = Counter[str]()
        self.notes: list[str] = []
        plan = replace(draw_plan(random.Random(1), 3, "bully"), expect=3, skew=False, segment_bytes_max=1 << 20)
        self.town = Town(self.agenda, plan, random.Random(1), self._meet, self.notes.append)
        self.settle()
        leader = self.town.leader
        assert leader is not None
        self.leader = leader
        self.follower, self.other = (name for name in self.town.nodes if name != leader)

    def _meet(self, what: str) -> None:
        self.met[what] += 1

    def until(self, condition: Callable[[], object]) -> None:
        end = self.agenda.now + WITHIN_S
        while not condition():
            assert self.agenda.step(end), "it did not happen in time"

    def settle(self) -> None:
        self.until(lambda: self.town.why_not_settled() is None)

    def host(self, name: str) -> Host:
        return self.town.hosts[name]

    def node(self, name: str) -> Node:
        node = self.town.node(name)
        assert node is not None
        return node

    def raft(self, name: str) -> Raft:
        return self.node(name).replica.raft

    def id(self, name: str) -> str:
        return self.node(name).id

    def look(self, name: str) -> None:
        self.town.rules.look(self.host(name))

    def sends(self, src: str, kind: type[Any], dst: str, **fields: Any) -> None:
        """The node `src` sends a message of this kind to the node `dst`."""
        self.node(src).replica.send(kind(self.id(src), self.id(dst), **fields))

    def hears(self, dst: str, kind: type[Any], src: str, **fields: Any) -> None:
        """The node `dst` takes in such a message of the node `src`."""
        raft = self.raft(dst)
        raft.step(kind(self.id(src), self.id(dst), **fields), self.node(dst).now())

    def applies(self, name: str, batch: Batch) -> None:
        """The node applies `batch` as if it were committed."""
        raft = self.raft(name)
        raft.commit = max(raft.commit, batch.last)
        self.node(name).replica._apply(batch)

    def restart(self, name: str) -> None:
        self.host(name).die(power=False)
        self.host(name).start()

    def write_alone(self) -> None:
        """The leader has an entry more that nobody else hears of."""
        others = [n for n in self.town.nodes if n != self.leader]
        self.town.network.block([link for n in others for link in ((n, self.leader), (self.leader, n))])
        before = self.raft(self.leader).log.last_index
        self.town.ask({"op": "put", "key": "a", "value": 1}, at=self.leader)
        self.until(lambda: self.raft(self.leader).log.last_index > before)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr("ddb.simtown.Duties", Careless)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        found = Cluster()
        yield found
        for host in found.town.hosts.values():
            host.disk.wipe()
    finally:
        logging.disable(level)


def a_batch(index: int, term: int, value: int = 1) -> Batch:
    data = b'{"first":%d,"last":%d,"term":%d,"at":1,"entries":[["put","k",%d]]}' % (index, index, term, value)
    return Batch(index, index, term, data, 1, [["put", "k", value]])


# ----------------------------------------------------- how each is broken


Breach = Callable[[Cluster], None]
BREACHES: Final[list[tuple[str, Breach]]] = []


def breaks(rule: str) -> Callable[[Breach], Breach]:
    """The function breaks `rule`."""

    def remember(breach: Breach) -> Breach:
        BREACHES.append((rule, breach))
        return breach

    return remember


@breaks(simrules.ONE_LEADER)
def two_lead_in_one_term(c: Cluster) -> None:
    c.raft(c.follower).role = Role.LEADER
    c.look(c.follower)


@breaks(simrules.ONE_LEADER)
def who_does_not_lead_sends_entries(c: Cluster) -> None:
    term = c.raft(c.follower).term
    c.sends(c.follower, Append, c.other, term=term, prev_index=0, prev_term=0, commit=0, round=1, batches=())


@breaks(simrules.ONE_VOTE)
def two_votes_in_a_term(c: Cluster) -> None:
    for candidate in (c.leader, c.other):
        c.sends(c.follower, VoteReply, candidate, term=1, granted=True, doubt=False)


@breaks(simrules.ONE_VOTE)
def two_votes_in_a_term_with_a_crash_in_between(c: Cluster) -> None:
    c.sends(c.follower, VoteReply, c.leader, term=1, granted=True, doubt=False)
    c.restart(c.follower)
    c.sends(c.follower, VoteReply, c.other, term=1, granted=True, doubt=False)


@breaks(simrules.ONE_VOTE)
def a_vote_for_another_and_one_for_itself(c: Cluster) -> None:
    c.sends(c.follower, VoteReply, c.leader, term=1, granted=True, doubt=False)
    c.sends(c.follower, VoteRequest, c.other, term=1, last_index=9, last_term=9, transfer=True)


@breaks(simrules.VOTE_ON_DISK)
def a_vote_that_the_disk_does_not_know(c: Cluster) -> None:
    state = c.node(c.follower).journal.hard_state
    assert state.vote != c.id(c.other)
    c.sends(c.follower, VoteReply, c.other, term=state.term, granted=True, doubt=False)


@breaks(simrules.VOTE_ON_DISK)
def a_candidacy_that_the_disk_does_not_know(c: Cluster) -> None:
    term = c.node(c.follower).journal.hard_state.term
    c.sends(c.follower, VoteRequest, c.other, term=term, last_index=9, last_term=9, transfer=True)


@breaks(simrules.TERM_ON_DISK)
def a_term_that_the_disk_does_not_know(c: Cluster) -> None:
    term = c.node(c.follower).journal.hard_state.term + 1
    c.sends(c.follower, AppendReply, c.leader, term=term, ok=False, match=0, round=1)


@breaks(simrules.ACK_ON_DISK)
def an_acknowledgement_of_what_is_not_on_disk(c: Cluster) -> None:
    raft = c.raft(c.follower)
    last = raft.log.last_index
    c.sends(c.follower, AppendReply, c.leader, term=raft.term, ok=True, match=last, round=1)
    c.sends(c.follower, AppendReply, c.leader, term=raft.term, ok=True, match=last + 1, round=1)


@breaks(simrules.TERM_BACK)
def a_term_goes_back(c: Cluster) -> None:
    c.raft(c.follower).term -= 1
    c.look(c.follower)


@breaks(simrules.TERM_BACK)
def a_disk_forgets_a_term_that_was_told(c: Cluster) -> None:
    disk = c.host(c.follower).disk
    before, term = disk.copy(), c.raft(c.follower).term
    c.host(c.leader).die(power=False)
    c.until(lambda: c.town.leader is not None and min(node.replica.raft.term for node in c.town.running) > term)
    c.host(c.follower).die(power=False)
    disk.wipe()
    for path in before.names:
        disk.put(path, before.content(path))
    c.host(c.follower).start()


@breaks(simrules.COMMIT_BACK)
def a_commit_index_goes_back(c: Cluster) -> None:
    c.raft(c.follower).commit -= 1
    c.look(c.follower)


@breaks(simrules.APPLIED_BACK)
def what_is_not_committed_is_applied(c: Cluster) -> None:
    raft = c.raft(c.follower)
    c.node(c.follower).replica._apply(a_batch(raft.commit + 1, raft.term))


@breaks(simrules.APPEND_ONLY)
def a_leader_cuts_its_log(c: Cluster) -> None:
    c.write_alone()
    c.look(c.leader)
    log = c.raft(c.leader).log
    log.truncate(log.last_index)
    c.look(c.leader)


@breaks(simrules.LOG_MATCHING)
def two_entries_have_one_index_and_term(c: Cluster) -> None:
    log = c.raft(c.follower).log
    last = log.batches()[-1]
    c.node(c.follower).writer.save(None, [a_batch(last.first, last.term)])


@breaks(simrules.LOG_MATCHING)
def one_entry_has_two_pasts(c: Cluster) -> None:
    raft = c.raft(c.follower)
    index = raft.log.last_index + 1
    batch = a_batch(index, raft.term)
    raft.log.append(batch)
    c.node(c.follower).writer.save(None, [batch])
    other = c.raft(c.other)
    other.log.truncate(index - 1)
    other.log.append(a_batch(index - 1, raft.term - 1))
    other.log.append(batch)
    c.node(c.other).writer.save(None, [batch])


@breaks(simrules.COMPLETENESS)
def a_leader_lacks_what_is_committed(c: Cluster) -> None:
    raft = c.raft(c.follower)
    raft.log.truncate(raft.log.last_index)
    raft.role, raft.term = Role.LEADER, raft.term + 1
    c.look(c.follower)


@breaks(simrules.MACHINE_SAFETY)
def two_apply_different_entries(c: Cluster) -> None:
    index, term = c.raft(c.follower).commit + 1, c.raft(c.follower).term
    c.applies(c.follower, a_batch(index, term, 1))
    c.applies(c.other, a_batch(index, term, 2))


@breaks(simrules.MAJORITY)
def a_leader_commits_what_it_has_alone(c: Cluster) -> None:
    c.write_alone()
    raft = c.raft(c.leader)
    raft.commit = raft.log.last_index
    c.look(c.leader)


@breaks(simrules.MAJORITY)
def a_leader_commits_with_the_help_of_who_has_not_saved_it(c: Cluster) -> None:
    c.write_alone()
    raft, follower = c.raft(c.leader), c.raft(c.follower)
    last = raft.log.batches()[-1]
    c.until(lambda: c.node(c.leader).journal.last[0] >= last.last)
    follower.log.append(last)  # in memory
    raft.commit = raft.log.last_index
    c.look(c.leader)


@breaks(simrules.OWN_TERM)
def a_leader_commits_another_terms_entry_by_counting(c: Cluster) -> None:
    c.write_alone()
    raft = c.raft(c.leader)
    raft.term += 1
    raft.commit = raft.log.last_index
    c.look(c.leader)


@breaks(simrules.DIGEST)
def two_have_different_digests(c: Cluster) -> None:
    batch = a_batch(c.raft(c.follower).commit + 1, c.raft(c.follower).term)
    c.applies(c.follower, batch)
    table: Any = c.node(c.other).replica.machine.table
    table.digest ^= 1
    c.applies(c.other, replace(batch, commands=[["put", "k", 1]]))


@breaks(simrules.DIGEST)
def a_snapshot_brings_another_digest(c: Cluster) -> None:
    machine = c.node(c.other).replica.machine
    table: Any = machine.table
    table.digest ^= 1
    c.node(c.other).replica.restored(machine)


@breaks(simrules.READ_INDEX)
def a_read_is_let_through_to_the_past(c: Cluster) -> None:
    raft = c.raft(c.leader)
    raft.read(4711)
    raft._out.reads.append((4711, raft.commit - 1))
    c.node(c.leader).replica.flush(c.node(c.leader).now())


def _changes(c: Cluster, *configs: Configuration) -> None:
    """The leader appends changes of membership that nobody else hears of."""
    c.write_alone()
    raft = c.raft(c.leader)
    for config in configs:
        first = raft.log.last_index + 1
        raft.log.append(Batch(first, first, raft.term, b"{}", 1, [], config))
        raft._configs.append((first, config))
    c.look(c.leader)


def _learner(name: str) -> Member:
    return Member(name, name, f"{name}:1", False)


@breaks(simrules.ONE_CHANGE)
def two_changes_are_under_way(c: Cluster) -> None:
    config = c.raft(c.leader).config
    more = config.with_member(_learner("x"))
    _changes(c, more, more.with_member(_learner("y")))


@breaks(simrules.ONE_CHANGE)
def a_change_before_an_entry_of_the_leaders_own_term(c: Cluster) -> None:
    raft = c.raft(c.leader)
    raft.term += 1
    _changes(c, raft.config.with_member(_learner("x")))


@breaks(simrules.OVERLAP)
def a_change_of_two_voters_at_once(c: Cluster) -> None:
    raft = c.raft(c.leader)
    _changes(c, raft.config.without(c.id(c.follower)).without(c.id(c.other)))


@breaks(simrules.OVERLAP)
def a_change_of_two_voters_is_applied(c: Cluster) -> None:
    raft = c.raft(c.follower)
    first = raft.commit + 1
    config = raft.config.without(c.id(c.leader)).without(c.id(c.other))
    c.applies(c.follower, Batch(first, first, raft.term, b"{}", 1, [], config))


@breaks(simrules.RANK)
def who_was_told_of_a_higher_rank_stands(c: Cluster) -> None:
    c.sends(c.follower, ElectionRequest, c.other, term=1, last_term=1, last_index=1, name="f", ask=7)
    c.hears(c.follower, ElectionReply, c.other, term=1, answer="alive", ask=7)
    c.sends(c.follower, VoteRequest, c.other, term=1, last_index=9, last_term=9, transfer=False)


def _candidate(c: Cluster, *voters: str, doubt: bool = False) -> Raft:
    """The follower stands in the next term, and these give it their votes."""
    raft = c.raft(c.follower)
    raft.role, raft.term, raft.vote = Role.CANDIDATE, raft.term + 1, raft.id
    raft._durable_state = HardState(raft.term, raft.id)
    c.look(c.follower)
    for voter in voters:
        c.hears(c.follower, VoteReply, voter, term=raft.term, granted=True, doubt=doubt)
    return raft


@breaks(simrules.ELECTED)
def a_leader_without_votes(c: Cluster) -> None:
    _candidate(c).role = Role.LEADER
    c.look(c.follower)


@breaks(simrules.ELECTED)
def a_leader_by_votes_in_doubt(c: Cluster) -> None:
    _candidate(c, c.other, doubt=True).role = Role.LEADER
    c.look(c.follower)


@breaks(simrules.ELECTED)
def a_leader_by_votes_of_an_older_term(c: Cluster) -> None:
    raft = _candidate(c, c.other)
    raft.role = Role.CANDIDATE
    raft.term += 1
    c.hears(c.follower, VoteReply, c.other, term=raft.term - 1, granted=True, doubt=False)
    raft.role = Role.LEADER
    c.look(c.follower)


@breaks(simrules.MEMBER_LEADS)
def a_learner_leads(c: Cluster) -> None:
    raft = _candidate(c, c.other, c.leader)
    raft.role = Role.LEADER
    raft._configs = [(raft.config_index, raft.config.with_member(replace(_learner("x"), id=raft.id)))]
    c.look(c.follower)


@breaks(simrules.ONE_CLUSTER)
def two_clusters_are_founded(c: Cluster) -> None:
    data = c.node(c.follower).data
    data.identity = replace(data.identity, cluster="another")
    c.look(c.follower)


# ------------------------------------------------------------------- tests


@pytest.mark.parametrize(("rule", "breach"), BREACHES, ids=[breach.__name__ for _, breach in BREACHES])
def test_a_breach_is_found_in_the_step_in_which_it_happens_and_named(
    cluster: Cluster, rule: str, breach: Breach
) -> None:
    with pytest.raises(Violation) as found:
        breach(cluster)
    assert found.value.rule == rule, str(found.value)
    assert found.value.host in cluster.town.nodes and found.value.what


def test_every_rule_is_broken_here() -> None:
    rules = {value for name, value in vars(simrules).items() if name.isupper() and isinstance(value, str)}
    assert rules - {rule for rule, _ in BREACHES} == {simrules.LAWFUL}  # that one is the code's own


def test_a_violation_can_come_from_another_process() -> None:
    violation = Violation(simrules.DIGEST, "n1", "why")
    copy = pickle.loads(pickle.dumps(violation))
    assert (copy.rule, copy.host, copy.what, str(copy)) == (simrules.DIGEST, "n1", "why", str(violation))
    assert str(copy) == f"{simrules.DIGEST}\n    seen on n1: why"


def test_each_rule_names_its_source() -> None:
    elsewhere = {simrules.LAWFUL, simrules.ONE_CLUSTER}
    for rule, _ in BREACHES:
        assert rule in elsewhere or rule.endswith(")"), rule


def test_a_sound_cluster_breaks_no_rule_whatever_happens_to_it(cluster: Cluster) -> None:
    """Writes, a crash, a new leader, power lost by all: through the town's own ways."""
    town, replies = cluster.town, list[Any]()
    for number in range(3):
        town.ask({"op": "put", "key": "a", "value": number}, done=replies.append)
        cluster.until(lambda number=number: len(replies) > number)  # type: ignore[misc]
    town.kill(cluster.leader, power=False, back_in_s=2.0)
    cluster.until(lambda: town.leader not in (None, cluster.leader))
    cluster.settle()
    for name in town.nodes:
        town.kill(name, power=True, back_in_s=0.5)
    cluster.until(lambda: len(town.running) == 3)
    cluster.settle()
    town.ask({"op": "get", "key": "a"}, done=replies.append)
    cluster.until(lambda: len(replies) == 4)
    assert replies[-1]["value"] == 2
    assert town.rules.committed >= 5 and len(town.rules.chosen) >= 5


def test_a_rule_changes_nothing() -> None:
    """The trace is the same with the rules and without them."""
    traces = []
    for careless in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if careless:
                patch.setattr("ddb.simtown.Duties", Careless)
            logging.disable(logging.CRITICAL)
            try:
                cluster = Cluster()
            finally:
                logging.disable(logging.NOTSET)
            traces.append((cluster.agenda.steps, cluster.agenda.now, cluster.notes, cluster.town.running.__repr__()))
    assert traces[0] == traces[1]


def test_a_vote_repeated_or_saved_again_breaks_nothing(cluster: Cluster) -> None:
    for _ in range(2):
        cluster.sends(cluster.follower, VoteReply, cluster.leader, term=1, granted=True, doubt=False)
    cluster.sends(cluster.follower, VoteReply, cluster.other, term=1, granted=False, doubt=False)
    cluster.sends(cluster.follower, VoteReply, cluster.other, term=1, granted=True, doubt=True)  # counts for nothing
    (last,) = cluster.raft(cluster.follower).log.batches()[-1:]
    cluster.node(cluster.follower).writer.save(None, [last])


def test_what_is_rare_is_counted_when_it_is_met(cluster: Cluster) -> None:
    term = cluster.raft(cluster.follower).term
    empty: dict[str, Any] = {"prev_index": 0, "prev_term": 0, "commit": 0, "round": 1, "batches": ()}
    cluster.met.clear()
    cluster.hears(cluster.follower, Append, cluster.leader, term=term - 1, **empty)
    cluster.hears(cluster.follower, ReadRequest, cluster.other, term=term, ticket=1)
    cluster.hears(
        cluster.follower, VoteRequest, cluster.other, term=term + 1, last_index=9, last_term=9, transfer=False
    )
    assert cluster.met == {
        "stale leader refused": 1,
        "read asked of no leader": 1,
        "candidate ignored while a leader is heard": 1,
    }


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (VoteRequest("a", "b", 3, 9, 2, False), "VoteRequest(term=3, last_index=9, last_term=2)"),
        (Append("a", "b", 3, 0, 0, 1, 7, (a_batch(1, 3),)), "Append(term=3, commit=1, round=7, batches="),
        (VoteReply("a", "b", 3, True, False), "VoteReply(term=3, granted=True)"),
    ],
)
def test_a_message_is_told_in_one_line(message: Message, said: str) -> None:
    assert brief(message).startswith(said) and "\n" not in brief(message)


def test_the_trace_tells_what_is_sent_received_saved_and_applied(cluster: Cluster) -> None:
    text = "\n".join(cluster.notes)
    name = cluster.leader
    for part in (f"{name} > ", f"{name} < ", f"{name} has saved ", f"{name} applies ", f"{name} is leader in term "):
        assert part in text
