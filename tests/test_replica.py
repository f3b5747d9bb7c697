"""A member's order of work: save, send, apply, answer. Whole replicas on virtual time (town.py)."""

from __future__ import annotations

from collections.abc import Collection
from unittest import mock

import pytest

from ddb.kv import Machine, MemoryTable
from ddb.messages import SnapshotRequest
from ddb.replica import Replica
from tests.town import Town


@pytest.fixture(params=["bully", "raft"])
def town(request: pytest.FixtureRequest) -> Town:
    return Town(election=request.param)


def followers(town: Town) -> list[str]:
    leader = town.leader()
    return [name for name in town.replicas if name != leader]


def test_a_write_at_any_member_is_done_once_and_seen_at_every_member(town: Town) -> None:
    town.leader()
    for at in town.replicas:
        reply = town.answer(town.write(at, "incr", key="n"))
        assert reply["ok"] is True
    for at in town.replicas:
        assert town.answer(town.read(at, "n"))["value"] == 3


def test_a_reply_to_a_former_life_is_nobodys(town: Town) -> None:
    """A follower that forwarded, died and forwards again must not take the late answer for the new question's."""
    leader = town.leader()
    follower = followers(town)[0]
    town.write(follower, "incr", key="n")
    town.replicas[follower].flush(town.now)  # forwarded; then it dies
    old = town.replicas[follower]
    reborn = town.replicas[follower] = Replica(
        old.raft, old.machine, town.journals[follower], old.send, town.journals[follower].data.__getitem__,
        lambda: int(town.now * 1000), first_ticket=1 << 40,
    )  # fmt: skip
    reborn.connected(leader)
    asked = town.write(follower, key="k", value=1)
    reply = town.answer(asked)
    assert "value" not in reply
    town.until(lambda: town.answer(town.read(leader, "n"))["value"] == 1)


def test_a_follower_names_the_leader_in_its_replies_and_the_leader_does_not(town: Town) -> None:
    leader = town.leader()
    follower = followers(town)[0]
    for asked in (town.write(follower, key="k", value=1), town.read(follower, "k")):
        assert town.answer(asked)["leader"] == f"{leader}:1"
    for asked in (town.write(leader, key="k", value=1), town.read(leader, "k")):
        assert "leader" not in town.answer(asked)


def test_nothing_is_answered_before_a_majority_has_it_on_disk() -> None:
    town = Town()
    leader = town.leader()
    for name in followers(town):
        town.journals[name].stuck = True
    asked = town.write(leader, key="k", value=1)
    for _ in range(300):
        town.turn()
    assert not asked.done
    town.journals[followers_of(town, leader)[0]].stuck = False
    assert town.answer(asked)["ok"] is True


def test_the_followers_disks_are_enough() -> None:
    """The leader's fsync runs beside the followers', and is one vote of the majority like any other."""
    town = Town()
    leader = town.leader()
    town.journals[leader].stuck = True
    assert town.answer(town.write(leader, key="k", value=1))["ok"] is True


def followers_of(town: Town, leader: str) -> list[str]:
    return [name for name in town.replicas if name != leader]


def test_writes_of_one_turn_share_one_batch() -> None:
    town = Town()
    leader = town.leader()
    before = town.replicas[leader].raft.log.count_after(0)
    asked = [town.write(leader, key=f"k{i}", value=i) for i in range(50)]
    revs = [town.answer(a)["rev"] for a in asked]
    assert len(set(revs)) == 50, "each write has a revision of its own"
    assert town.replicas[leader].raft.log.count_after(0) == before + 1


class Filed(MemoryTable):
    """A table whose rows are on a disk, and that notes what it was asked to look up together."""

    def __init__(self) -> None:
        super().__init__()
        self.cold = True
        self.prefetched: list[set[str]] = []

    def prefetch(self, keys: Collection[str]) -> None:
        self.prefetched.append(set(keys))


def test_a_machine_whose_rows_are_on_disk_looks_those_of_a_turn_up_together() -> None:
    town = Town()
    leader = town.leader()
    table = Filed()
    town.replicas[leader].machine.table = table
    asked = [town.write(leader, key=f"k{i}", value=i) for i in range(50)]
    assert all(town.answer(a)["ok"] for a in asked)
    assert {f"k{i}" for i in range(50)} in table.prefetched
    looked_up, table.cold = len(table.prefetched), False
    assert town.answer(town.write(leader, key="k", value=1))["ok"] is True
    assert len(table.prefetched) == looked_up, "in memory, that would be work for nothing"


def test_a_leader_whose_disk_must_keep_up_lets_writes_wait_and_reads_not() -> None:
    town = Town()
    leader = town.leader()
    town.answer(town.write(leader, key="k", value=1))
    snapshots = town.replicas[leader].snapshots = mock.Mock(**{"holds_writes.return_value": True})
    asked = [town.write(name, key="k", value=2, timeout_s=60) for name in town.replicas]
    assert town.answer(town.read(leader, "k"))["value"] == 1
    for _ in range(100):
        town.turn()
    assert not any(write.done for write in asked)
    snapshots.holds_writes.return_value = False
    assert all(town.answer(write)["ok"] for write in asked)


def test_a_write_without_a_leader_waits_for_one(town: Town) -> None:
    asked = town.write("a", key="k", value=1)
    assert town.answer(asked)["ok"] is True


def test_a_write_that_was_never_proposed_is_surely_not_done() -> None:
    town = Town()
    town.isolate("a")
    asked = town.write("a", key="k", value=1, timeout_s=0.3)
    assert town.answer(asked)["error"] == "no_leader"
    town.heal()
    town.leader()
    assert town.answer(town.read("b", "k"))["found"] is False


def test_a_stale_leader_answers_neither_a_write_nor_a_read(town: Town) -> None:
    old = town.leader()
    town.isolate(old)
    write = town.write(old, key="k", value="old", timeout_s=2.0)
    read = town.read(old, "k", timeout_s=2.0)
    new = town.leader(other_than=old)
    assert town.answer(town.write(new, key="k", value="new"))["ok"] is True
    assert town.answer(write)["error"] == "timeout"
    assert town.answer(read)["error"] == "no_leader"


def test_an_overwritten_write_is_proposed_again_and_done_once() -> None:
    """The old leader's entry loses its place to another's: it was never done, so it may be done now."""
    town = Town()
    old = town.leader()
    town.isolate(old)
    lost = town.write(old, "incr", key="n", timeout_s=60.0)
    new = town.leader(other_than=old)
    assert town.answer(town.write(new, "incr", key="n"))["value"] == 1
    town.heal()
    assert town.answer(lost)["value"] == 2
    assert town.answer(town.read(new, "n"))["value"] == 2


def test_a_forwarded_write_whose_leader_is_lost_is_of_unknown_outcome() -> None:
    town = Town()
    leader = town.leader()
    follower = followers(town)[0]
    town.isolate(leader)
    asked = town.write(follower, key="k", value=1)
    town.turn()
    town.replicas[follower].disconnected(leader, town.now)
    assert town.answer(asked)["error"] == "timeout"


def test_a_forwarded_write_whose_leader_was_replaced_is_of_unknown_outcome(town: Town) -> None:
    """The old leader is frozen, or cut off: its connection stands, and it may have done the write all the same."""
    leader = town.leader()
    follower = followers(town)[0]
    town.isolate(leader)
    asked = town.write(follower, "incr", key="n", timeout_s=60.0)
    town.leader(other_than=leader)
    assert town.answer(asked)["error"] == "timeout"
    town.heal()
    assert town.answer(town.read(follower, "n"))["found"] is False


def test_reads_are_asked_again_when_the_leader_changes(town: Town) -> None:
    old = town.leader()
    follower = followers(town)[0]
    assert town.answer(town.write(old, key="k", value=1))["ok"] is True
    town.isolate(old)
    asked = town.read(follower, "k")
    town.replicas[follower].disconnected(old, town.now)
    reply = town.answer(asked)
    assert reply["value"] == 1


def test_a_refused_forward_goes_to_the_next_leader() -> None:
    """A leader that hands over takes nothing more; the follower tries whoever leads then."""
    town = Town()
    leader = town.leader()
    target, follower = followers(town)
    town.journals[target].stuck = True  # so that the transfer takes its time
    blocker = town.write(leader, key="x", value=0)
    town.answer(blocker)
    town.replicas[leader].raft.transfer(target, town.now)
    asked = town.write(follower, key="k", value=1)
    for _ in range(20):
        town.turn()
    assert not asked.done
    town.journals[target].stuck = False
    town.until(lambda: town.replicas[target].is_leader)
    assert town.answer(asked)["ok"] is True


def test_a_member_whose_digest_differs_stops_answering_and_asks_for_a_snapshot() -> None:
    town = Town()
    leader = town.leader()
    follower = followers(town)[0]
    assert town.answer(town.write(leader, key="k", value=1))["ok"] is True
    town.until(lambda: town.replicas[follower].machine.applied == town.replicas[leader].machine.applied)
    town.replicas[follower].machine.table.digest += 1
    assert town.answer(town.write(leader, key="k", value=2))["ok"] is True
    town.until(lambda: town.replicas[follower].diverged)
    asked = town.read(follower, "k")
    assert town.answer(asked)["error"] == "no_leader"
    assert not town.replicas[follower].raft.may_stand


def test_a_leader_serves_no_data_that_it_distrusts_and_hands_over() -> None:
    town = Town()
    leader = town.leader()
    town.replicas[leader].distrust("the test says so")
    town.until(lambda: any(r.is_leader for n, r in town.replicas.items() if n != leader))
    new = town.leader(other_than=leader)
    assert town.answer(town.write(new, key="k", value=1))["ok"] is True
    replica = town.replicas[leader]
    replica.send(SnapshotRequest(leader, new, replica.raft.term))
    seen: list[str] = []
    original = town.replicas[new].raft.ready

    def ready(now: float) -> object:
        out = original(now)
        seen.extend(out.needs_snapshot)
        return out

    town.replicas[new].raft.ready = ready  # type: ignore[method-assign, assignment]
    town.until(lambda: seen)
    assert seen == [leader]


def test_a_replaced_state_takes_up_the_log_where_it_stands() -> None:
    town = Town()
    leader = town.leader()
    follower = followers(town)[0]
    for i in range(5):
        assert town.answer(town.write(leader, "incr", key="n"))["value"] == i + 1
    replica = town.replicas[follower]
    town.until(lambda: replica.machine.applied == town.replicas[leader].machine.applied)
    replica.distrust("the test says so")
    fresh = Machine(MemoryTable(), 0)
    replica.raft.reapply(0)
    replica.restored(fresh)
    town.until(lambda: fresh.applied == town.replicas[leader].machine.applied)
    assert fresh.table.digest == town.replicas[leader].machine.table.digest
    assert town.answer(town.read(follower, "n"))["value"] == 5
