"""Raft, claim by claim: members, snapshots, reads, transfer, and leaders that are kept or dismissed.

As test_raft_paper.py does with the paper's section 5, each test here holds the core to one sentence of what goes round
it: the paper's later sections (§) and the dissertation ("Consensus: Bridging Theory and Practice", Ongaro 2014; diss.).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from ddb.errors import BadRequest, NoLeader, Overloaded
from ddb.messages import (
    Append,
    AppendReply,
    Configuration,
    ElectionReply,
    Member,
    Message,
    Role,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from tests.raft_net import Net, append, appends, entry, led_by, take, terms, with_log

pytestmark = pytest.mark.parametrize("election", ["bully", "raft"])


# --- §6 and diss. §4: membership ---------------------------------------------------------------------------------------


def member(id: str, voter: bool = True) -> Member:
    return Member(id, id, id, voter)


def promote(net: Net, id: str) -> Configuration:
    return net.leading.config.with_member(member(id))


def test_a_configuration_is_in_force_from_where_it_stands(election: str) -> None:
    """Diss. §4.1: the new configuration takes effect on each server as soon as it is added to that server's log."""
    net = led_by("n1", 3, election, learners=["n4"])
    net.change(promote(net, "n4"))
    assert net["n1"].config.voters == ("n1", "n2", "n3", "n4")
    assert net["n2"].config.voters == ("n1", "n2", "n3")
    for m in take(net, Append, "n2"):
        net.hand(m)
    assert net["n2"].config.voters == ("n1", "n2", "n3", "n4")
    assert net["n2"].commit < net["n2"].config_index


def test_a_configuration_that_is_cut_off_is_undone(election: str) -> None:
    """Diss. §4.1: if it is removed from the log, a server falls back to the previous configuration."""
    net = led_by("n1", 3, election)
    net.isolate("n1")
    net.change(net["n1"].config.without("n3"))
    assert net["n1"].config.voters == ("n1", "n2")
    net.elect("n2")
    net.heal()
    net.run(1.0)
    assert net["n1"].config.voters == ("n1", "n2", "n3")
    assert [terms(p.up) for p in net.running] == [[1, 2]] * 3


def test_one_change_at_a_time(election: str) -> None:
    """Diss. §4.1: a change may begin once the previous one is committed."""
    net = led_by("n1", 3, election, learners=["n4", "n5"])
    net.change(promote(net, "n4"))
    with pytest.raises(Overloaded):
        net.change(promote(net, "n5"))
    net.settle()
    net.change(promote(net, "n5"))
    net.settle()
    assert net["n1"].commit == net["n1"].config_index


def test_no_change_before_an_entry_of_the_term_is_committed(election: str) -> None:
    """Ongaro on raft-dev, 10 July 2015: the mending of single-server changes."""
    net = Net(3, election, learners=["n4"])
    net.provoke("n1")
    net.settle(keep=lambda m: isinstance(m, Append))
    with pytest.raises(Overloaded):
        net.change(promote(net, "n4"))
    net.settle()
    net.change(promote(net, "n4"))


def test_only_one_voter_comes_or_goes(election: str) -> None:
    """Diss. §4.1: majorities of old and new overlap only if one server is added or removed."""
    net = led_by("n1", 3, election)
    with pytest.raises(BadRequest):
        net.change(net["n1"].config.without("n2").without("n3"))
    with pytest.raises(BadRequest):
        net.change(net["n1"].config.without("n2").with_member(member("n4")))


def test_the_last_voter_stays(election: str) -> None:
    """Diss. §4.1: a majority of nobody decides nothing."""
    net = led_by("n1", 1, election, learners=["n2"])
    with pytest.raises(BadRequest):
        net.change(net["n1"].config.without("n1"))


def test_only_a_leader_changes_the_members(election: str) -> None:
    """Diss. §4.1: changes are entries, and entries are a leader's."""
    net = led_by("n1", 3, election)
    with pytest.raises(NoLeader):
        net["n2"].change(net["n2"].config.without("n3"), 0)


def test_a_learners_acknowledgement_never_counts(election: str) -> None:
    """Diss. §4.2.1: non-voting members are not counted towards majorities."""
    net = led_by("n1", 3, election, learners=["n4", "n5"])
    net.isolate("n1", "n4", "n5")
    batch = net.put()
    assert not net.run(0.5, lambda: net["n1"].commit >= batch.last)
    assert terms(net["n4"]) == terms(net["n5"]) == [1, 1]


def test_a_learner_never_stands(election: str) -> None:
    """Diss. §4.2.1: non-voting members don't start elections."""
    net = led_by("n1", 1, election, learners=["n2"])
    net.crash("n1")
    assert not net.run(10.0, lambda: net["n2"].role is not Role.FOLLOWER)
    net.hand(TimeoutNow("n1", "n2", 1))
    assert net["n2"].role_shown is Role.LEARNER


def test_a_learner_votes_when_it_is_asked(election: str) -> None:
    """Diss. §4.2.2: a server grants votes without consulting its configuration: the candidate may know more of it."""
    net = led_by("n1", 1, election, learners=["n2"])
    net.change(promote(net, "n2"))
    net.crash("n1")
    net.wire.clear()  # n2 has not even heard that it votes
    net.start("n1")
    assert net["n2"].config.voters == ("n1",)
    net.elect()
    net.run(0.2)
    assert (net.leader, net["n2"].config.voters) == ("n1", ("n1", "n2"))


def test_a_new_member_catches_up_and_is_promoted(election: str) -> None:
    """Diss. §4.2.1: a server is first replicated to, and then made a voter."""
    net = led_by("n1", 3, election)
    for _ in range(20):
        net.put()
        net.settle()
    net.change(net["n1"].config.with_member(member("n4", voter=False)))
    net.join("n4")
    net.run(1.0)
    net.change(promote(net, "n4"))
    net.run(1.0)
    net.crash("n2")
    batch = net.put()
    net.run(1.0)
    assert net["n1"].commit == net["n4"].commit == batch.last


def test_a_leader_that_removes_itself_does_not_count_itself_and_then_goes(election: str) -> None:
    """Diss. §4.2.2: it manages a cluster that it is not part of until the entry commits, then steps down."""
    net = led_by("n1", 3, election)
    net.isolate("n1", "n2")
    batch = net.change(net["n1"].config.without("n1"))
    net.settle()
    assert net["n1"].commit < batch.last, "n2 alone is no majority of n2 and n3"
    net.heal()
    net.run(1.0)
    assert net.leader in ("n2", "n3")
    assert net["n1"].role is Role.FOLLOWER
    assert net.leading.term == 2


def test_a_removed_voter_stands_while_its_log_is_needed(election: str) -> None:
    """Diss. §4.2.2: a server that is not part of its own latest configuration should still start elections, since it
    might be needed until that configuration is committed."""
    net = led_by("n1", 2, election)
    net.isolate("n1")
    net.change(net["n1"].config.without("n1"))
    net.crash("n1")
    net.start("n1")
    net.heal()
    assert net.run(10.0, lambda: net.leader == "n2"), "n2 can't win against the longer log of n1"
    assert net["n2"].config.voters == ("n2",)


def test_a_removed_member_disturbs_nobody(election: str) -> None:
    """Diss. §4.2.3: who hears a leader neither follows the term of a candidate nor votes for it."""
    net = led_by("n1", 4, election)
    net.isolate("n4")
    net.change(net["n1"].config.without("n4"))
    net.run(1.0)
    net.heal()
    for _ in range(5):
        net.provoke("n4", transfer=False)
        net.run(0.3)
    assert net["n4"].term > 1
    assert (net.leading.id, net["n1"].term) == ("n1", 1) or net["n1"].role is Role.LEADER
    assert [net[id].leader for id in ("n1", "n2", "n3")] == ["n1"] * 3


# --- §7 snapshots (the consensus' side) ----------------------------------------------------------------------------------


def test_a_follower_behind_the_log_gets_a_snapshot(election: str) -> None:
    """§7: the leader must send snapshots when it has already discarded the next log entry a follower needs."""
    net = led_by("n1", 3, election)
    net.crash("n3")
    for _ in range(10):
        net.put()
        net.settle()
    net.run(0.2)
    net.peers["n1"].checkpoint()
    assert net["n1"].log.base_index == 11
    net.start("n3")
    net.run(2.0)
    batch = net.put()
    net.run(1.0)
    assert net.peers["n3"].applied == batch.last
    assert net["n3"].log.base_index == 11
    assert net.peers["n3"].digest == net.peers["n1"].digest


def test_a_follower_that_meets_the_compacted_log_at_its_base_needs_no_snapshot(election: str) -> None:
    """§7: the index and term of the last entry that a snapshot replaces support the consistency check of the next."""
    net = Net(3, election, start=False)
    for id, log in (("n1", [1] * 4 + [3]), ("n2", [1] * 4 + [3]), ("n3", [1] * 4 + [2] * 3)):
        with_log(net, id, log)
        net.start(id)
    net.crash("n3")
    net.elect("n1")
    net.run(0.2)
    net.peers["n1"].checkpoint(keep=2)
    assert net["n1"].log.base_index == 4
    net.start("n3")
    net.run(1.0)
    assert terms(net["n3"]) == [1] * 4 + [3, 4]
    assert net["n3"].log.base_index == 0


def test_a_snapshot_keeps_the_log_that_fits_behind_it(election: str) -> None:
    """§7: if the snapshot describes a prefix of the log, entries following it are still valid and must be retained."""
    net = led_by("n1", 3, election)
    append(net, "n1", "n2", (1, 1), entry(2, 1), entry(3, 1), entry(4, 1))
    net["n2"].restore(3, 1, net.first_config)
    assert (net["n2"].log.base_index, net["n2"].log.last_index, net["n2"].commit) == (3, 4, 3)
    assert net["n2"].ready(net.now).reset is None


def test_a_snapshot_discards_a_log_that_does_not_fit(election: str) -> None:
    """§7: otherwise the follower discards its entire log."""
    net = led_by("n1", 3, election)
    append(net, "n1", "n2", (1, 1), entry(2, 1), entry(3, 1), entry(4, 1))
    net["n2"].restore(3, 2, net.first_config)
    assert (net["n2"].log.base_index, net["n2"].log.base_term, net["n2"].log.last_index) == (3, 2, 3)
    assert net["n2"].ready(net.now).reset == (3, 2)


def test_a_snapshot_brings_the_configuration(election: str) -> None:
    """§7: the snapshot includes the latest configuration as of its last included index."""
    net = led_by("n1", 3, election)
    config = net.first_config.without("n3")
    net["n2"].restore(9, 1, config)
    assert (net["n2"].config, net["n2"].config_index) == (config, 9)


def test_an_append_below_the_snapshot_is_known_to_match(election: str) -> None:
    """§7: what the snapshot covers is committed, so it can't differ."""
    net = led_by("n1", 3, election)
    for _ in range(3):
        net.put()
    net.run(0.2)
    net.peers["n2"].checkpoint()
    assert net["n2"].log.base_index == 4
    append(net, "n1", "n2", (1, 1), *net["n1"].log.batches(1), entry(5, 1))
    assert [(m.ok, m.match) for m in take(net, AppendReply)] == [(True, 5)]
    assert (net["n2"].log.base_index, net["n2"].log.last_index) == (4, 5)


# --- §8 and diss. §6.4: linearizable reads -----------------------------------------------------------------------------


def answers(net: Net, id: str) -> list[tuple[int, int]]:
    """The reads that `id` may answer now: (ticket, index)."""
    return [*net[id].ready(net.now).reads]


def test_a_read_costs_one_exchange_and_no_entry(election: str) -> None:
    """Diss. §6.4: the leader issues a new round of heartbeats and waits for a majority's acknowledgements."""
    net = led_by("n1", 3, election)
    before = net["n1"].log.last_index
    seen: list[tuple[int, int]] = []
    net.peers["n1"].answered = seen
    net["n1"].read(7)
    net.peers["n1"].work()
    assert len(appends(net)) == 2
    assert net.peers["n1"].answered == []
    for m in take(net, Append, "n2") + take(net, AppendReply):
        net.hand(m)
    for m in take(net, AppendReply):
        net["n1"].step(m, net.now)
    assert answers(net, "n1") == [(7, 1)]
    assert net["n1"].log.last_index == before


def test_many_reads_share_one_exchange(election: str) -> None:
    """Diss. §6.4: to amortise the cost, any number of read-only queries share one round."""
    net = led_by("n1", 3, election)
    for ticket in range(100):
        net["n1"].read(ticket)
    net.peers["n1"].work()
    assert len(appends(net)) == 2


def test_a_read_asked_later_waits_for_a_later_exchange(election: str) -> None:
    """Diss. §6.4: the acknowledgements must be of heartbeats issued after the query came in."""
    net = led_by("n1", 3, election)
    net["n1"].read(1)
    net.peers["n1"].work()
    echoes: list[Message] = []
    for m in take(net, Append):
        net.hand(m)
    echoes = take(net, AppendReply)
    net["n1"].read(2)
    for m in echoes:
        net["n1"].step(m, net.now)
    assert answers(net, "n1") == [(1, 1)]


def test_a_leader_cut_off_answers_no_read(election: str) -> None:
    """Diss. §6.4: without the exchange, a leader that was replaced would return stale data."""
    net = led_by("n1", 3, election)
    net.isolate("n1")
    assert net.read("n1", 1)
    net.settle()
    net.elect("n2")
    net.put()
    net.settle()
    assert net.rules.answers.get("n1", []) == []
    net.heal()
    net.run(1.0)
    assert net.rules.answers.get("n1", []) == [], "who asked a leader that stepped down must ask again"


def test_a_new_leader_answers_no_read_before_its_first_commit(election: str) -> None:
    """Diss. §6.4: it has all committed entries, but may not know which those are, until its no-op commits."""
    net = Net(3, election)
    net.provoke("n1")
    net.settle(keep=lambda m: isinstance(m, Append))
    assert net["n1"].role is Role.LEADER
    net["n1"].read(1)
    net.peers["n1"].work()
    for m in take(net, Append):
        net.hand(replace(m, batches=()))  # heartbeats arrive, entries do not
    for m in take(net, AppendReply):
        net["n1"].step(m, net.now)
    assert answers(net, "n1") == []
    net.run(1.0)
    assert (1, 1) in [(t, i) for p in net.running for t, i in net.rules.answers.get(p.id, [])]


def test_a_follower_reads_at_the_leaders_index(election: str) -> None:
    """Diss. §6.4: a follower asks the leader for its read index and waits until it has applied that far."""
    net = led_by("n1", 3, election)
    batch = net.put()
    net.settle()
    assert net["n2"].commit < batch.last
    net.read("n2", 5)
    net.settle()
    assert (5, batch.last) in net.rules.answers["n2"]
    assert net.peers["n2"].applied == batch.last


def test_nobody_reads_without_a_leader(election: str) -> None:
    """Diss. §6.4: no leader, no read index."""
    net = Net(3, election)
    assert not net["n1"].read(1)


def test_echoes_of_a_former_leadership_confirm_nothing(election: str) -> None:
    """Diss. §6.4: the acknowledgements are of this term's heartbeats."""
    net = led_by("n1", 3, election)
    net["n1"].read(1)
    net.peers["n1"].work()
    for m in take(net, Append):
        net.hand(m)
    late = take(net, AppendReply)
    net.elect("n2")
    net.elect("n1")
    net["n1"].read(2)
    net.peers["n1"].work()
    net.wire.clear()
    for m in late:
        net["n1"].step(m, net.now)
    assert answers(net, "n1") == []


def test_a_learner_confirms_no_leadership(election: str) -> None:
    """Diss. §6.4: a majority of the voters."""
    net = led_by("n1", 3, election, learners=["n4", "n5"])
    net.isolate("n1", "n4", "n5")
    net["n1"].read(1)
    net.peers["n1"].work()
    for m in take(net, Append):
        net.hand(m)
    for m in take(net, AppendReply):
        net["n1"].step(m, net.now)
    assert answers(net, "n1") == []


# --- diss. §3.10: leadership transfer ------------------------------------------------------------------------------------


def test_leadership_is_handed_over_at_once(election: str) -> None:
    """Diss. §3.10: the target times out at once, and wins in the next term though the others hear the old leader."""
    net = led_by("n1", 3, election)
    net["n1"].transfer("n2", net.now)
    net.peers["n1"].work()
    net.settle()
    assert (net.leader, net["n2"].term, net["n1"].role) == ("n2", 2, Role.FOLLOWER)


def test_a_transfer_brings_its_target_up_to_date_first(election: str) -> None:
    """Diss. §3.10: the prior leader fully updates the target's log before it tells it to stand."""
    net = led_by("n1", 3, election)
    net.put()
    net["n1"].transfer("n2", net.now)
    net.peers["n1"].work()
    assert not any(isinstance(m, TimeoutNow) for m in net.wire)
    net.settle()
    assert (net.leader, terms(net["n2"])) == ("n2", [1, 1, 2])


def test_a_leader_that_hands_over_takes_no_writes(election: str) -> None:
    """Diss. §3.10: the prior leader stops accepting new client requests."""
    net = led_by("n1", 3, election)
    net["n1"].transfer("n2", net.now)
    assert not net["n1"].accepts
    with pytest.raises(NoLeader):
        net.change(net["n1"].config.without("n3"))


def test_a_transfer_that_fails_is_called_off(election: str) -> None:
    """Diss. §3.10: if it does not complete after about an election time-out, the prior leader resumes."""
    net = led_by("n1", 3, election)
    net.isolate("n2")
    net["n1"].transfer("n2", net.now)
    net.run(net.timing.election_timeout_s + 0.1)
    assert (net.leader, net["n1"].accepts) == ("n1", True)


@pytest.mark.parametrize("to", ["n1", "n4", "n9"])
def test_leadership_goes_to_another_voter_only(election: str, to: str) -> None:
    """Diss. §3.10: the target must be able to lead."""
    net = led_by("n1", 3, election, learners=["n4"])
    with pytest.raises(BadRequest):
        net["n1"].transfer(to, net.now)


def test_who_cannot_serve_does_not_take_over(election: str) -> None:
    """Diss. §3.10: a member that could not lead ignores the call, and the transfer is called off."""
    net = led_by("n1", 3, election)
    net["n2"].may_stand = False
    net["n1"].transfer("n2", net.now)
    net.run(2.0)
    assert (net.leader, net["n1"].accepts) == ("n1", True)


# --- diss. §6.2 CheckQuorum, §9.6 PreVote, §4.2.3 stickiness ---------------------------------------------------------------


def test_a_leader_without_a_majority_steps_down(election: str) -> None:
    """Diss. §6.2: a leader steps down if an election time-out elapses without a successful round to a majority."""
    net = led_by("n1", 5, election)
    net.isolate("n1", "n2")
    net.run(net.timing.election_timeout_s + 3 * net.timing.heartbeat_s)
    assert net["n1"].role is not Role.LEADER


def test_a_leader_that_was_stopped_steps_down_at_its_next_tick(election: str) -> None:
    """Diss. §6.2: answers that queued up while the process was stopped are no news, however fresh they seem."""
    net = led_by("n1", 3, election)
    net.tick("n1", net.timing.heartbeat_s)
    for m in take(net, Append):
        net.hand(m)
    queued = take(net, AppendReply)
    net.now += 5.0  # n1 is stopped
    for m in queued:
        net.hand(m)
    assert net["n1"].role is Role.LEADER
    net.tick("n1")
    assert net["n1"].role is Role.FOLLOWER


def test_a_leader_that_was_stopped_neither_commits_nor_reads_in_the_past(election: str) -> None:
    """§5.4, diss. §6.4: whatever was sent before the stop, majorities overlap: the new leader has moved on."""
    net = led_by("n1", 3, election)
    net.put("old")
    old = [m for m in net.wire if isinstance(m, Append)]
    net.wire.clear()
    net.isolate("n1", noticed=True)
    net.elect("n2")
    net.put("new")
    net.settle()
    net.heal()
    for m in old:
        net.hand(m)
    net.read("n1", 1)
    net.settle()
    assert net["n1"].role is Role.FOLLOWER
    assert net.rules.answers.get("n1", []) == []
    net.run(1.0)
    assert [terms(p.up) for p in net.running] == [[1, 2, 2]] * 3


def test_a_leader_alone_never_misses_a_majority(election: str) -> None:
    """Diss. §6.2: a cluster of one has its majority at hand, whatever its clock does."""
    net = led_by("n1", 1, election)
    net.tick(seconds=60.0)
    assert net["n1"].role is Role.LEADER


def test_a_member_cut_off_does_not_raise_its_term(election: str) -> None:
    """Diss. §9.6: a candidate only increments its term if it first learns from a majority that they would vote for it."""
    net = led_by("n1", 3, election)
    net.isolate("n3", noticed=True)
    net.run(10.0)
    assert net["n3"].term == 1
    net.heal()
    net.run(1.0)
    assert (net.leader, net["n1"].term) == ("n1", 1)


def test_who_hears_a_leader_lets_nobody_stand(election: str) -> None:
    """Diss. §9.6, §4.2.3: a server that has heard from a leader within the time-out grants no (pre-)vote."""
    net = led_by("n1", 3, election)
    net["n3"].disconnected("n1", net.now)  # n3 alone suspects the leader
    net.tick("n3", net.timing.heartbeat_s)
    net.settle(keep=lambda m: isinstance(m, ElectionReply))
    assert {m.answer for m in net.wire if isinstance(m, ElectionReply)} == {"leader"}
    net.settle()
    assert (net["n3"].term, net.leader) == (1, "n1")


def test_who_hears_a_leader_ignores_candidates(election: str) -> None:
    """Diss. §4.2.3: it does not update its term or grant its vote, unless the leader itself asked for the election."""
    net = led_by("n1", 3, election)
    net.hand(VoteRequest("n3", "n2", 5, 9, 9))
    assert (net["n2"].term, net.wire) == (1, [])
    net.hand(VoteRequest("n3", "n2", 5, 9, 9, transfer=True))
    assert net.wire == [VoteReply("n2", "n3", 5, True)]


def test_a_killed_leader_is_replaced_without_waiting_for_a_time_out(election: str) -> None:
    """A broken connection is suspicion enough; votes decide all the same."""
    net = led_by("n1", 3, election)
    net.crash("n1", noticed=True)
    assert net.run(net.timing.election_timeout_s / 2, lambda: net.leader in ("n2", "n3"))


def test_an_asker_ahead_in_terms_hears_the_answers_it_gets(election: str) -> None:
    """Diss. §9.6: a pre-vote changes no term, so the answers may come from lower ones."""
    net = Net(3, election, start=False)
    with_log(net, "n3", [1, 1], term=7)
    for id in net.peers:
        net.start(id)
    net.crash("n1")
    assert net.elect().id == "n3"


def test_a_new_leader_knows_whom_it_has_not_heard_yet(election: str) -> None:
    """Beside a voter that may be dead nobody is promoted (membership.py), and at first the leader can't tell."""
    net = Net(3, election=election)
    net.crash("n3")
    net.elect("n1")
    assert net["n1"].progress["n2"].spoken
    assert not net["n1"].progress["n3"].spoken
