"""Members in doubt: a disk lost what it had reported as durable, and the member knows it (see raft.py).

The paper has no such case: it takes for granted that persistent state persists. The first tests show why nothing that
such a member says may count: with Raft's plain rules each of them would lose an acknowledged write, or read a stale one.
"""

from __future__ import annotations

import pytest

from ddb.messages import (
    Append,
    AppendReply,
    Member,
    VoteRequest,
)
from tests.raft_net import Net, entry, led_by, take, terms

pytestmark = pytest.mark.parametrize("election", ["bully", "raft"])


def test_a_vote_in_doubt_elects_nobody(election: str) -> None:
    """The doubt's reason: n3 acknowledged an entry that n2 lacks, and forgot it. Its vote must not make n2 the leader."""
    net = led_by("n1", 3, election)
    net.isolate("n2", noticed=True)
    batch = net.put()
    net.settle()
    assert net["n1"].commit == batch.last
    net.crash("n3", forget=1)
    net.crash("n1")
    net.start("n3")
    net.heal()
    assert net["n3"].doubt
    assert not net.run(10.0, lambda: net.leader is not None)
    net.start("n1")
    assert net.run(10.0, lambda: net.leader == "n1")
    assert net.run(2.0, lambda: not net["n3"].doubt), "the leader's confirmation ends the doubt"
    assert terms(net["n3"])[:2] == [1, 1]


def test_in_unanimity_doubt_counts(election: str) -> None:
    """All of them lost the ends of their logs: whatever is left, the best of it leads."""
    net = led_by("n1", 3, election)
    for _ in range(3):
        net.put()
    net.settle()
    for n, id in enumerate(sorted(net.peers)):
        net.crash(id, forget=n + 1)
    net.rules.chosen.clear()  # a majority forgot: what it forgot is gone
    net.rules.votes.clear()
    net.rules.committed = 0
    net.start("n1")
    net.start("n3")
    assert not net.run(10.0, lambda: net.leader is not None), "two of three in doubt"
    net.start("n2")
    assert net.elect().id == "n1"
    assert net.run(2.0, lambda: not any(p.up.doubt for p in net.running))
    assert len({tuple(terms(p.up)) for p in net.running}) == 1


def test_an_acknowledgement_in_doubt_does_not_count(election: str) -> None:
    """n3 forgot that it voted for n2 in term 2, and n2 still collects votes there. Were n3's acknowledgement in term 1
    to count, n2 could lead without what it committed."""
    net = led_by("n1", 5, election)
    net.provoke("n2")
    requests = take(net, VoteRequest)
    net.hand(next(m for m in requests if m.dst == "n3"))
    net.settle()
    assert net["n3"].term == 2
    net.crash("n3", forget=1)
    net.isolate("n2", "n5", noticed=True)
    net.start("n3")
    assert (net["n3"].term, net["n3"].doubt) == (1, True)
    batch = net.put()
    net.run(0.3)
    assert terms(net["n3"]) == terms(net["n4"]) == [1] * net["n1"].log.last_index
    assert net["n1"].commit < batch.last, "n1, n4 and a member in doubt"
    assert net["n3"].doubt
    net.heal()
    for m in requests:
        net.hand(m)
    net.run(5.0)
    assert net.leader is not None
    assert not net["n3"].doubt


def test_an_echo_in_doubt_confirms_no_leadership(election: str) -> None:
    """n3 acknowledged a newer leader's entry and forgot it: for the old leader it must not confirm a read."""
    net = led_by("n1", 3, election)
    net.isolate("n1")
    net.elect("n2")
    net.put()
    net.settle()
    net.crash("n3", forget=4)
    net.crash("n2")
    net.heal()
    net.start("n3")
    assert (net["n3"].term, net["n3"].doubt) == (1, True), "it forgot term 2"
    net.read("n1", 1)
    net.run(0.5)
    assert net.rules.answers.get("n1", []) == []


def test_a_leader_in_doubt_does_not_count_itself(election: str) -> None:
    """n3 forgot that it voted for n2 in term 3, and leads in term 2, where n2 would not follow it."""
    net = led_by("n1", 5, election)
    net.provoke("n2")
    take(net, VoteRequest)
    net.provoke("n2")
    net.hand(next(m for m in take(net, VoteRequest) if m.dst == "n3"))
    net.crash("n2")
    net.crash("n3", forget=1)
    net.start("n3")
    net.settle(keep=lambda m: isinstance(m, Append) and m.dst == "n3")
    net.provoke("n3")
    net.settle(keep=lambda m: isinstance(m, Append))
    assert (net.leader, net["n3"].term) == ("n3", 2)
    net.crash("n5")
    batch = net.put()
    net.run(0.5)
    assert net["n3"].commit < batch.last, "n1, n4, and n3 in doubt of itself"
    assert net["n3"].doubt
    net.start("n5")
    assert net.run(5.0, lambda: not net["n3"].doubt)
    assert net.run(5.0, lambda: net["n3"].commit >= batch.last)


def test_what_was_said_before_the_doubt_is_not_believed(election: str) -> None:
    """A message of the process that ended may come after one of the process that forgot."""
    net = led_by("n1", 3, election)
    batch = net.put()
    net.crash("n2")
    for m in take(net, Append, "n3"):
        net.hand(m)
    late = take(net, AppendReply)
    net.crash("n3", forget=1)
    net.start("n3")
    for _ in range(3):  # heartbeats get through, entries do not
        net.tick("n1", net.timing.heartbeat_s)
        net.settle(keep=lambda m: isinstance(m, Append) and m.batches != ())
    for m in late:
        net.hand(m)
    assert net["n1"].commit < batch.last
    assert net["n1"].progress["n3"].match < batch.last


def test_doubt_survives_a_restart(election: str) -> None:
    """Who does not know what it forgot does not know it better the next time."""
    net = led_by("n1", 3, election)
    net.crash("n3", forget=1)
    net.isolate("n3")
    net.start("n3")
    net.crash("n3")
    net.start("n3")
    assert net["n3"].doubt
    net.heal()
    assert net.run(2.0, lambda: not net["n3"].doubt)
    net.crash("n3")
    net.start("n3")
    assert not net["n3"].doubt


def test_a_lone_voter_in_doubt_leads_what_it_has_left(election: str) -> None:
    """A cluster of one is unanimous."""
    net = led_by("n1", 1, election)
    net.put()
    net.crash("n1", forget=1)
    net.rules.chosen.clear()
    net.rules.batches.clear()
    net.rules.committed = 0
    net.start("n1")
    assert net.elect().id == "n1"
    assert (net["n1"].doubt, terms(net["n1"])) == (False, [1, 2])


def in_unanimity(election: str) -> Net:
    """n1 has been elected by all three, who all are in doubt; nothing of its term has left yet."""
    net = led_by("n1", 3, election)
    net.put()
    for m in take(net, Append):
        net.hand(m)
    net.wire.clear()
    for id in sorted(net.peers):
        net.crash(id, forget=1)
    for id in sorted(net.peers):
        net.start(id)
    net.provoke("n1")
    net.settle(keep=lambda m: isinstance(m, Append))
    assert net.leader == "n1"
    assert net["n2"].doubt and net["n3"].doubt and not net["n1"].doubt
    return net


def test_who_elected_in_unanimity_counts(election: str) -> None:
    """Otherwise nothing could ever be committed, and no doubt end."""
    net = in_unanimity(election)
    net.run(0.5)
    assert (net.leader, net["n1"].term, net["n1"].has_committed_in_term) == ("n1", 2, True)
    assert not net["n2"].doubt and not net["n3"].doubt


def test_who_may_have_forgotten_again_does_not_count(election: str) -> None:
    """A new connection may be a new process. The leader steps down, and all are asked again."""
    net = in_unanimity(election)
    net.disconnect("n1", "n2")
    net.disconnect("n1", "n3")
    net.run(0.1)
    assert [terms(p.up) for p in net.running] == [[1, 2]] * 3
    assert [p.up.commit for p in net.running] == [0] * 3
    assert net.run(20.0, lambda: net.leader is not None and not any(p.up.doubt for p in net.running))
    assert net.leading.term > 2


def test_a_doubt_ends_when_what_ends_it_is_on_disk(election: str) -> None:
    """The confirmation is about entries; were they lost in a crash, the doubt would have been right."""
    net = led_by("n1", 3, election)
    raft = net["n2"]
    raft.doubt = True
    raft.step(Append("n1", "n2", 1, 1, 1, 1, 0, (entry(2, 1),)), net.now)
    raft.step(Append("n1", "n2", 1, 2, 1, 1, 0, confirmed=True), net.now)
    assert raft.doubt
    net.peers["n2"].work()
    net.peers["n2"].write()
    raft.step(Append("n1", "n2", 1, 2, 1, 1, 0, confirmed=True), net.now)
    assert not raft.doubt


def test_one_that_forgot_that_it_is_not_alone_asks_whom_it_remembers(election: str) -> None:
    """Its log lost every entry that names another, also as a learner. What it knows beside its log is not forgotten."""
    net = led_by("n1", 1, election)
    before = net["n1"].log.last_index
    net.join("n2")
    for voter in (False, True):
        net.change(net["n1"].config.with_member(Member("n2", "n2", "n2", voter)))
        net.run(0.3)
    batch = net.put()
    net.run(0.3)
    assert net["n1"].members_in_force == {"n1", "n2"}
    net.crash("n2")
    net.crash("n1", forget=batch.last - before)
    net.start("n1")
    assert [m.id for m in net["n1"].config.members] == ["n1"]
    net["n1"].remembered = frozenset({"n1", "n2"})
    assert not net.run(10.0, lambda: net.leader is not None)
    net.start("n2")
    assert net.run(10.0, lambda: net.leader == "n2")
    assert net.run(2.0, lambda: net["n1"].commit > batch.last and not net["n1"].doubt)


def test_a_lone_voter_in_doubt_asks_its_learners(election: str) -> None:
    """It may have forgotten the entry that made one of them a voter, and what the two have committed since."""
    net = led_by("n1", 1, election, learners=["n2"])
    net.change(net["n1"].config.with_member(Member("n2", "n2", "n2", True)))
    net.run(0.3)
    batch = net.put()
    net.run(0.3)
    assert net["n2"].commit == batch.last
    net.crash("n2")
    net.crash("n1", forget=2)
    net.start("n1")
    assert net["n1"].config.voters == ("n1",)
    assert not net.run(10.0, lambda: net.leader is not None)
    net.start("n2")
    assert net.run(10.0, lambda: net.leader == "n2")
    assert net.run(2.0, lambda: net["n1"].commit > batch.last and not net["n1"].doubt)
