"""Raft, claim by claim: terms, elections, replication and safety.

Each test holds the core to one sentence of the paper ("In Search of an Understandable Consensus Algorithm", Ongaro and
Ousterhout 2014), whose section its docstring names. The figures 7 and 8 are scripts (tests/scripts). Underneath,
raft_net.Rules looks at all of figure 3 after every step. What the dissertation adds is in test_raft_dissertation.py.
"""

from __future__ import annotations

import pytest

from ddb.errors import BadRequest, InvariantError
from ddb.messages import (
    Append,
    AppendReply,
    HardState,
    RaftMessage,
    Role,
    VoteReply,
    VoteRequest,
)
from tests.raft_net import Net, append, appends, entry, led_by, take, terms, with_log

pytestmark = pytest.mark.parametrize("election", ["bully", "raft"])


# --- §5.1 terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE, Role.LEADER])
def test_a_higher_term_makes_a_follower_of_anybody(election: str, role: Role) -> None:
    """§5.1: If a candidate or leader discovers that its term is out of date, it immediately reverts to follower state."""
    net = Net(3, election)
    if role is Role.CANDIDATE:
        net.provoke("n1")
    elif role is Role.LEADER:
        net.elect("n1")
    assert net["n1"].role is role
    net.hand(AppendReply("n2", "n1", 7, False, 0, 0))
    assert (net["n1"].role, net["n1"].term) == (Role.FOLLOWER, 7)


def test_a_stale_leader_is_told_the_term(election: str) -> None:
    """§5.1: If a server receives a request with a stale term number, it rejects the request."""
    net = led_by("n1", 3, election)
    net.hand(Append("n2", "n3", 0, 0, 0, 0, 0, (entry(1, 0),)))
    assert net.wire == [AppendReply("n3", "n2", 1, False, 0, 0)]
    assert terms(net["n3"]) == [1]


def test_a_stale_candidate_is_told_the_term(election: str) -> None:
    """§5.1: If a server receives a request with a stale term number, it rejects the request."""
    net = led_by("n1", 3, election)
    net.hand(VoteRequest("n2", "n3", 0, 9, 9))
    assert net.wire == [VoteReply("n3", "n2", 1, False)]


def test_terms_and_votes_survive_a_restart(election: str) -> None:
    """§5.1, figure 2: currentTerm and votedFor are persistent state."""
    net = led_by("n1", 3, election)
    net.crash("n2")
    net.start("n2")
    assert (net["n2"].term, net["n2"].vote) == (1, "n1")


# --- §5.2 leader election ----------------------------------------------------------------------------------------------


def test_servers_start_as_followers(election: str) -> None:
    """§5.2: When servers start up, they begin as followers."""
    assert [p.up.role for p in Net(3, election).running] == [Role.FOLLOWER] * 3


def test_heartbeats_keep_followers_calm(election: str) -> None:
    """§5.2: A server remains in follower state as long as it receives valid RPCs from a leader or candidate."""
    net = led_by("n2", 5, election)
    net.run(10.0)
    assert (net.leader, net.leading.term) == ("n2", 1)


def test_silence_begins_an_election(election: str) -> None:
    """§5.2: If a follower receives no communication over the election timeout, it begins an election."""
    net = led_by("n1", 3, election)
    net.isolate("n1")  # unnoticed: nothing but time tells
    assert net.run(net.timing.election_timeout_s * 0.9, lambda: net["n2"].term > 1 or net["n3"].term > 1) is False
    assert net.run(5.0, lambda: net.leader in ("n2", "n3"))


def test_a_candidate_raises_its_term_votes_for_itself_and_asks_all_others(election: str) -> None:
    """§5.2: A follower increments its current term, votes for itself and issues RequestVote RPCs in parallel."""
    net = Net(3, election)
    net.provoke("n2")
    assert (net["n2"].role, net["n2"].term, net["n2"].vote) == (Role.CANDIDATE, 1, "n2")
    assert [(m.dst, m.term) for m in net.wire if isinstance(m, VoteRequest)] == [("n1", 1), ("n3", 1)]


@pytest.mark.parametrize(
    ("size", "granted", "wins"),
    [(1, 0, True), (2, 0, False), (2, 1, True), (3, 0, False), (3, 1, True), (4, 1, False), (4, 2, True),
     (5, 1, False), (5, 2, True), (5, 4, True)],
)  # fmt: skip
def test_a_majority_of_votes_makes_a_leader(election: str, size: int, granted: int, wins: bool) -> None:
    """§5.2: A candidate wins an election if it receives votes from a majority of the servers for the same term."""
    net = Net(size, election)
    net.provoke("n1")
    for voter in [f"n{i + 2}" for i in range(granted)]:
        for m in take(net, VoteRequest, voter):
            net.hand(m)
    for m in take(net, VoteReply):
        net.hand(m)
    assert (net["n1"].role is Role.LEADER) is wins


def test_a_repeated_vote_counts_once(election: str) -> None:
    """§5.2: A majority of the servers, not of the messages."""
    net = Net(5, election)
    net.provoke("n1")
    for _ in range(4):
        net.hand(VoteReply("n2", "n1", 1, True))
    assert net["n1"].role is Role.CANDIDATE


def test_a_vote_of_another_term_does_not_count(election: str) -> None:
    """§5.2: votes for the same term."""
    net = Net(3, election)
    net.provoke("n1")
    net.provoke("n1")
    net.hand(VoteReply("n2", "n1", 1, True))
    assert net["n1"].role is Role.CANDIDATE


def test_the_first_candidate_gets_the_only_vote(election: str) -> None:
    """§5.2: Each server will vote for at most one candidate in a given term, on a first-come-first-served basis."""
    net = Net(3, election)
    for candidate, granted in (("n1", True), ("n2", False), ("n1", True)):
        net.hand(VoteRequest(candidate, "n3", 1, 0, 0))
        assert net.wire.pop() == VoteReply("n3", candidate, 1, granted)


def test_a_vote_survives_a_restart(election: str) -> None:
    """§5.2, figure 2: who forgot its vote could give another in the same term."""
    net = Net(3, election)
    net.hand(VoteRequest("n1", "n3", 1, 0, 0))
    net.crash("n3")
    net.start("n3")
    net.wire.clear()
    net.hand(VoteRequest("n2", "n3", 1, 9, 1))
    assert net.wire == [VoteReply("n3", "n2", 1, False)]


def test_a_vote_is_on_disk_before_it_is_sent(election: str) -> None:
    """Figure 2: Persistent state is updated on stable storage before responding to RPCs."""
    net = Net(3, election)
    net.peers["n3"].disk.writes = False
    net.hand(VoteRequest("n1", "n3", 1, 0, 0))
    assert net.wire == []
    net.write("n3")
    assert net.wire == [VoteReply("n3", "n1", 1, True)]


def test_a_candidate_asks_for_votes_once_its_own_is_on_disk(election: str) -> None:
    """Figure 2: its own vote is persistent state, too; and it counts no sooner."""
    net = Net(1, election)
    net.peers["n1"].disk.writes = False
    net.provoke("n1")
    assert net["n1"].role is Role.CANDIDATE
    net.write("n1")
    assert net["n1"].role is Role.LEADER
    net = Net(3, election)
    net.peers["n1"].disk.writes = False
    net.provoke("n1")
    assert net.wire == []
    net.write("n1")
    assert len(take(net, VoteRequest)) == 2


def test_a_candidate_follows_the_leader_of_its_term(election: str) -> None:
    """§5.2: If the leader's term is at least as large as the candidate's, the candidate returns to follower state."""
    net = Net(3, election)
    net.provoke("n1")
    net.wire.clear()
    net.provoke("n2")
    net.settle(keep=lambda m: isinstance(m, Append))
    assert (net["n1"].role, net["n2"].role) == (Role.CANDIDATE, Role.LEADER)
    net.settle()
    assert (net["n1"].role, net["n1"].leader) == (Role.FOLLOWER, "n2")


def test_a_split_vote_ends_in_another_election(election: str) -> None:
    """§5.2: each candidate will time out and start a new election; randomised time-outs ensure that split votes are rare."""
    net = Net(4, election)
    net.provoke("n1")
    net.provoke("n2")
    for src, dst in (("n1", "n3"), ("n2", "n4")):
        for m in [m for m in net.wire if isinstance(m, VoteRequest) and (m.src, m.dst) == (src, dst)]:
            net.hand(m)
    net.wire = [m for m in net.wire if isinstance(m, VoteReply)]
    net.settle()
    assert net.leader is None
    assert net.elect().term > 1


def test_nobody_leads_without_a_majority(election: str) -> None:
    """§5.2: The majority rule ensures that at most one candidate can win; without one, nobody does."""
    net = Net(4, election)
    net.crash("n1")
    net.crash("n2")
    assert not net.run(10.0, lambda: net.leader is not None)


# --- §5.3 log replication ----------------------------------------------------------------------------------------------


def test_an_entry_is_committed_when_a_majority_has_it(election: str) -> None:
    """§5.3: A log entry is committed once the leader that created it has replicated it on a majority of the servers."""
    net = led_by("n1", 5, election)
    batch = net.put()
    for n, follower in enumerate(("n2", "n3")):
        assert net["n1"].commit < batch.last, f"{n} followers are no majority of five"
        for m in take(net, Append, follower):
            net.hand(m)
        for m in take(net, AppendReply):
            net.hand(m)
    assert net["n1"].commit == batch.last
    assert net.peers["n1"].applied == batch.last


def test_followers_apply_what_they_learn_to_be_committed(election: str) -> None:
    """§5.3: Once a follower learns that a log entry is committed, it applies the entry to its state machine."""
    net = led_by("n1", 3, election)
    batch = net.put()
    net.settle()
    assert net.peers["n2"].applied < batch.last
    net.run(0.2)
    assert [p.applied for p in net.running] == [batch.last] * 3


def test_a_leader_serves_though_a_minority_is_slow_or_dead(election: str) -> None:
    """§5.3: A slow follower must not slow the rest; the leader retries indefinitely."""
    net = led_by("n1", 5, election)
    net.crash("n4")
    net.isolate("n5")
    batch = net.put()
    net.settle()
    assert net["n1"].commit == batch.last
    net.heal()
    net.start("n4")
    net.run(2.0)
    assert [p.applied for p in net.running] == [batch.last] * 5


def test_a_lost_append_is_sent_again(election: str) -> None:
    """§5.3: If packets are lost, the leader retries AppendEntries RPCs indefinitely."""
    net = led_by("n1", 3, election)
    net.put()
    net.wire.clear()
    net.run(1.0)
    assert [terms(p.up) for p in net.running] == [[1, 1]] * 3


def test_a_follower_lacking_the_entry_before_refuses(election: str) -> None:
    """§5.3: If the follower does not find an entry in its log with the same index and term, it refuses the new entries."""
    net = led_by("n1", 3, election)
    append(net, "n1", "n2", (5, 1), entry(6, 1))
    assert net.wire == [AppendReply("n2", "n1", 1, False, 0, 0, 5, 2, 0)]
    assert terms(net["n2"]) == [1]


def test_an_acknowledgement_is_sent_when_the_entry_is_on_disk(election: str) -> None:
    """Figure 2: log[] is persistent state, updated before responding."""
    net = led_by("n1", 3, election)
    net.peers["n2"].disk.writes = False
    net.put()
    for m in take(net, Append, "n2"):
        net.hand(m)
    assert take(net, AppendReply) == []
    net.write("n2")
    assert [m.match for m in take(net, AppendReply)] == [2]


def test_a_leader_counts_itself_when_its_own_disk_has_the_entry(election: str) -> None:
    """Diss. §10.2.1: The leader may write to its disk in parallel with replicating; it counts itself only after."""
    net = led_by("n1", 3, election)
    net.peers["n1"].disk.writes = False
    batch = net.put()
    net.crash("n3")
    net.settle()
    assert terms(net["n2"]) == [1, 1], "it was replicated before it was on the leader's disk"
    assert net["n1"].commit < batch.last
    net.write("n1")
    assert net["n1"].commit == batch.last


def test_an_entry_may_be_committed_before_the_leaders_own_disk_has_it(election: str) -> None:
    """Diss. §10.2.1: The leader may even commit an entry before it has been written to its own disk."""
    net = led_by("n1", 3, election)
    net.peers["n1"].disk.writes = False
    batch = net.put()
    net.settle()
    assert net["n1"].commit == batch.last


def test_a_delayed_append_never_cuts_acknowledged_entries(election: str) -> None:
    """§5.3, figure 2: Delete what follows only *if an existing entry conflicts*: a delayed RPC says nothing of the rest."""
    net = led_by("n1", 3, election)
    net.put()
    late = appends(net, "n2")[0]
    net.settle()
    net.put()
    net.put()
    net.settle()
    assert terms(net["n2"]) == [1, 1, 1, 1]
    net.hand(late)
    assert terms(net["n2"]) == [1, 1, 1, 1]
    assert net["n2"].durable == 4


@pytest.mark.parametrize(
    "nonsense",
    [
        Append("n1", "n2", 1, 1, 1, 1, 0, (entry(3, 1),)),
        Append("n1", "n2", 1, 1, 1, 1, 0, (entry(1, 1),)),
        Append("n1", "n2", 1, 1, 1, 1, 0, (entry(2, 1), entry(4, 1))),
        Append("n1", "n2", 5, 1, 1, 1, 0, (entry(2, 4), entry(3, 3))),
        Append("n1", "n2", 5, 1, 1, 1, 0, (entry(2, 6),)),
        AppendReply("n2", "n1", 1, True, 2, 0),
    ],
    ids=repr,
)
def test_what_contradicts_itself_is_refused_and_changes_nothing(election: str, nonsense: RaftMessage) -> None:
    """§5.3: a leader sends adjoining entries whose terms never go back; a follower acknowledges what it was sent."""
    net = led_by("n1", 3, election)
    before = repr(net[nonsense.dst])
    with pytest.raises(BadRequest):
        net[nonsense.dst].step(nonsense, net.now)
    assert repr(net[nonsense.dst]) == before
    assert net.peers[nonsense.dst].up.ready(net.now).messages == []


def test_a_repeated_append_changes_nothing(election: str) -> None:
    """§5.5: Raft RPCs are idempotent: a follower ignores entries that are already in its log."""
    net = led_by("n1", 3, election)
    net.put()
    again = appends(net, "n2")[0]
    net.settle()
    before = list(net.peers["n2"].disk.records)
    net.hand(again)
    assert net.peers["n2"].disk.records == before


def test_conflicting_entries_are_overwritten_with_the_leaders(election: str) -> None:
    """§5.3: The leader handles inconsistencies by forcing the followers' logs to duplicate its own."""
    net = Net(3, election, start=False)
    with_log(net, "n1", [1, 1, 4])
    with_log(net, "n2", [1, 1, 2, 2, 2])
    with_log(net, "n3", [1])
    for id in net.peers:
        net.start(id)
    net.elect("n1")
    assert [terms(p.up) for p in net.running] == [[1, 1, 4, 5]] * 3


def test_a_conflict_costs_one_exchange_per_term_not_per_entry(election: str) -> None:
    """§5.3: the follower can include the term of the conflicting entry and the first index it stores for that term."""
    net = Net(3, election, start=False)
    with_log(net, "n1", [1] * 3 + [5] * 30)
    with_log(net, "n2", [1] * 3 + [2] * 20 + [3] * 20)
    with_log(net, "n3", [1] * 3 + [5] * 30)
    for id in net.peers:
        net.start(id)
    net.provoke("n1")
    refusals = 0
    while net.wire:
        refusals += isinstance(net.wire[0], AppendReply) and net.wire[0].src == "n2" and not net.wire[0].ok
        net.deliver()
    assert terms(net["n2"]) == [1] * 3 + [5] * 30 + [6]
    assert refusals <= 3


def test_logs_are_compared_by_whole_batches(election: str) -> None:
    """§5.3, Log Matching: a batch is one leader's append, so what shares an entry shares its batch."""
    net = Net(3, election, start=False)
    for id in ("n1", "n3"):
        net.peers[id].disk.records = [HardState(3), entry(1, 1), entry(2, 3, count=5)]
    net.peers["n2"].disk.records = [HardState(2), entry(1, 1), entry(2, 2), entry(3, 2, count=7)]
    for id in net.peers:
        net.start(id)
    net.elect("n1")
    assert [(b.first, b.last, b.term) for b in net["n2"].log.batches()] == [(1, 1, 1), (2, 6, 3), (7, 7, 4)]


# --- §5.4 safety -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voter", "last_term", "last_index", "granted"),
    [([1], 1, 1, True), ([1], 2, 1, True), ([1, 1], 2, 1, True), ([1], 1, 2, True),
     ([1, 1], 1, 1, False), ([1, 2], 1, 2, False), ([1, 2], 1, 9, False), ([2], 1, 1, False)],
)  # fmt: skip
def test_votes_go_to_logs_at_least_as_up_to_date(
    election: str, voter: list[int], last_term: int, last_index: int, granted: bool
) -> None:
    """§5.4.1: the later last term is more up-to-date; with the same last term the longer log is."""
    net = Net(2, election, start=False)
    with_log(net, "n1", voter)
    net.start("n1")
    net.hand(VoteRequest("n2", "n1", 3, last_index, last_term))
    assert net.wire == [VoteReply("n1", "n2", 3, granted)]


def test_entries_of_prior_terms_are_not_committed_by_counting(election: str) -> None:
    """§5.4.2: Only log entries from the leader's current term are committed by counting replicas; the prior ones with them."""
    net = Net(3, election, start=False)
    with_log(net, "n1", [1, 2])
    with_log(net, "n2", [1, 2])
    with_log(net, "n3", [1])
    for id in net.peers:
        net.start(id)
    net.provoke("n1")
    net.settle(keep=lambda m: isinstance(m, Append) and m.batches != () and m.batches[-1].term == 3)
    assert net["n1"].role is Role.LEADER
    net.hand(AppendReply("n2", "n1", 3, True, 2, 0))
    assert net["n1"].commit == 0, "on two of three, and of an older term"
    net.settle()
    assert net["n1"].commit == 3, "an entry of its own term commits them all"


def test_a_new_leader_commits_with_an_entry_of_its_own(election: str) -> None:
    """§8: each leader commits a blank no-op entry into the log at the start of its term."""
    net = led_by("n1", 3, election)
    batch = net["n1"].log.batch_at(1)
    assert (batch.term, batch.data) == (1, b'{"first":1,"last":1,"term":1,"at":0,"entries":[["noop"]]}')


def test_a_committed_entry_is_never_removed(election: str) -> None:
    """§5.4, State Machine Safety: a message that would do so is a bug somewhere, and ends the process."""
    net = led_by("n1", 3, election)
    net.put()
    net.run(0.2)
    with pytest.raises(InvariantError, match="never removed"):
        net["n2"].step(Append("n3", "n2", 9, 1, 1, 0, 0, (entry(2, 9),)), net.now)


def test_what_was_overtaken_before_it_was_saved_is_not_acknowledged(election: str) -> None:
    """Figure 2: an acknowledgement speaks of what is on disk, though two leaders were heard in one turn."""
    net = led_by("n1", 3, election)
    raft = net["n2"]
    raft.step(Append("n1", "n2", 1, 1, 1, 1, 0, (entry(2, 1), entry(3, 1))), net.now)
    raft.step(Append("n3", "n2", 2, 1, 1, 1, 0, (entry(2, 2),)), net.now)
    ready = raft.ready(net.now)
    assert [repr(b) for b in ready.batches] == ["entries 2..2@2"]
    assert [(m.dst, m.match) for m in ready.after_save if isinstance(m, AppendReply)] == [("n3", 2)]


def test_a_save_that_was_overtaken_makes_nothing_durable(election: str) -> None:
    """Figure 2: the disk reports entries that a new leader has replaced meanwhile; the replacements are not on it yet."""
    net = led_by("n1", 3, election)
    net.peers["n2"].disk.writes = False
    append(net, "n1", "n2", (1, 1), entry(2, 1), entry(3, 1))
    net.hand(Append("n3", "n2", 2, 1, 1, 1, 0, (entry(2, 2), entry(3, 2))))
    net.write("n2")
    assert net["n2"].durable == 1
    while net.write("n2"):
        pass
    assert net["n2"].durable == 3


def test_the_core_prints_in_one_line(election: str) -> None:
    """So that logs, traces and tests say the same."""
    assert repr(led_by("n2", 3, election)["n2"]) == "n2@1 leader last=1@1 commit=1"
