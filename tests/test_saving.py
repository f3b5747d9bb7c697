"""The leader's own disk goes last, and nothing relies on it before it has answered."""

from __future__ import annotations

import pytest

from ddb.saving import EAGER_S, HELD_BATCHES_MAX, HELD_BYTES_MAX, HELD_S
from tests.town import TURN_S, Town

TICKS_S = HELD_S + 2 * TURN_S


def settled(names: str = "abc", save_s: float = 0.0005) -> tuple[Town, str]:
    """A town whose leader's followers are all in step, and whose leader has nothing left to save."""
    town = Town(names, save_s)
    leader = town.leader()
    raft = town.replicas[leader].raft
    town.until(lambda: all(p.in_step and p.match == raft.log.last_index for p in raft.progress.values()))
    town.until(lambda: raft.durable == raft.log.last_index)
    later = town.now + HELD_S + EAGER_S  # whatever was slow at the start is forgotten
    town.until(lambda: town.now > later)
    return town, leader


def test_a_write_is_answered_while_the_leader_holds_its_own_copy_back() -> None:
    town, leader = settled()
    saves = town.journals[leader].tickets
    reply = town.answer(town.write(leader, key="k", value=1))
    index = reply["rev"]
    assert town.journals[leader].tickets == saves and index not in town.journals[leader].data
    assert all(index in town.journals[name].data for name in town.replicas if name != leader)


def test_what_was_held_back_is_saved_a_moment_later() -> None:
    town, leader = settled()
    index = town.answer(town.write(leader, key="k", value=1))["rev"]
    town.until(lambda: index in town.journals[leader].data, within_s=TICKS_S)
    town.until(lambda: town.replicas[leader].raft.durable == index, within_s=TICKS_S)


def test_many_batches_are_saved_at_once() -> None:
    town, leader = settled()
    saves, first = town.journals[leader].tickets, town.replicas[leader].raft.log.last_index
    for number in range(HELD_BATCHES_MAX):
        town.replicas[leader].raft.propose([b'["noop"]'], [["noop"]], number)
        town.replicas[leader].flush(town.now)
    assert town.journals[leader].tickets == saves + 1
    assert town.replicas[leader].raft.durable == first
    town.turn()
    town.turn()
    assert town.replicas[leader].raft.durable == first + HELD_BATCHES_MAX


def test_much_is_saved_at_once() -> None:
    town, leader = settled()
    saves = town.journals[leader].tickets
    town.write(leader, key="k", value="x" * HELD_BYTES_MAX)
    town.replicas[leader].flush(town.now)
    assert town.journals[leader].tickets == saves + 1


def test_what_is_held_back_does_not_count_as_durable() -> None:
    town, leader = settled()
    raft = town.replicas[leader].raft
    for follower in set(town.replicas) - {leader}:
        town.journals[follower].stuck = True
    asked = town.write(leader, key="k", value=1)
    end = town.now + HELD_S / 2
    town.until(lambda: town.now > end)
    assert raft.log.last_index > raft.durable == raft.commit and not asked.done


@pytest.mark.parametrize("names", ["a", "ab"])
def test_where_the_others_are_no_majority_the_leader_saves_at_once(names: str) -> None:
    town, leader = settled(names)
    saves = town.journals[leader].tickets
    town.write(leader, key="k", value=1)
    town.replicas[leader].flush(town.now)
    assert town.journals[leader].tickets == saves + 1


def test_when_a_connection_breaks_what_was_held_back_is_saved() -> None:
    town, leader = settled()
    saves = town.journals[leader].tickets
    town.write(leader, key="k", value=1)
    town.replicas[leader].flush(town.now)
    assert town.journals[leader].tickets == saves
    (gone, _) = set(town.replicas) - {leader}
    town.isolate(gone)
    town.replicas[leader].disconnected(gone, town.now)
    town.replicas[leader].flush(town.now)
    assert town.journals[leader].tickets == saves + 1


def test_where_a_follower_is_slow_the_leader_goes_back_to_saving_at_once() -> None:
    town, leader = settled()
    (slow, _) = set(town.replicas) - {leader}
    town.journals[slow].stuck = True
    began = town.now
    town.answer(town.write(leader, key="k", value=1))
    assert HELD_S < town.now - began < HELD_S + 6 * TURN_S  # it was held back, and then it was needed
    for number in range(10):
        began = town.now
        town.answer(town.write(leader, key="k", value=number))
        assert town.now - began < 8 * TURN_S


def test_a_leader_that_steps_down_saves_what_it_held_back() -> None:
    town, leader = settled()
    index = town.answer(town.write(leader, key="k", value=1))["rev"]
    assert index not in town.journals[leader].data
    (heir, _) = sorted(set(town.replicas) - {leader})
    town.replicas[leader].raft.transfer(heir, town.now)
    assert town.leader(other_than=leader) == heir
    town.until(lambda: town.replicas[leader].raft.leader == heir)
    assert index in town.journals[leader].data
    last = town.replicas[heir].raft.log.last_index
    town.until(lambda: town.replicas[leader].raft.durable == last)
    assert sorted(town.journals[leader].data) == sorted(town.journals[heir].data)


def test_of_five_three_others_in_step_are_enough() -> None:
    town, leader = settled("abcde")
    (gone, other, *_) = sorted(set(town.replicas) - {leader})
    town.isolate(gone)
    town.replicas[leader].disconnected(gone, town.now)
    index = town.answer(town.write(leader, key="k", value=1))["rev"]
    assert index not in town.journals[leader].data
    town.isolate(other)
    town.replicas[leader].disconnected(other, town.now)
    town.write(leader, key="k", value=2)
    town.replicas[leader].flush(town.now)
    assert index in town.journals[leader].data


def test_what_is_to_be_sent_behind_a_save_takes_with_it_what_was_held_back() -> None:
    town, leader = settled()
    replica = town.replicas[leader]
    index = town.answer(town.write(leader, key="k", value=1))["rev"]
    ready = replica.raft.ready(town.now)
    ready = type(ready)()
    sent: list[object] = []
    replica.send = sent.append  # what nobody else is to hear
    ready.after_save.append(object())  # type: ignore[arg-type]
    replica.saver.take(ready, town.now)
    assert index in town.journals[leader].data and not sent
    town.turn()
    town.turn()
    assert sent
