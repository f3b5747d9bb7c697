"""Bugs that the simulator found, each held down at its cause: a seed finds them again only as long as it draws the same.

What regression_seeds.txt tells has its test in the room where the cause was; here are those that had none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ddb.messages import InstallSnapshot, SnapshotReply
from ddb.node import Node, Settings
from ddb.raft import Ready
from ddb.sim import Options, Simulation
from ddb.simtown import Town
from ddb.world import OsWorld
from tests.test_sync import Receiver, leaders_copy
from tests.test_sync_lost import Pair


@pytest.fixture
def receiver() -> Iterator[Any]:
    one = Receiver()
    yield one
    one.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    two = Pair()
    yield two
    two.close()


def test_an_acknowledgement_of_a_snapshot_tells_no_term_that_is_not_on_disk(receiver: Receiver) -> None:
    """Seeds 70, 75 and 81: it is for the core to send, behind its save."""
    copied, content = leaders_copy()
    receiver.replica.raft.term_is_durable = False
    assert receiver.offer(copied, content, 0) == []
    (held,) = [call.args[0] for call in receiver.replica.raft.send.call_args_list]
    assert type(held) is SnapshotReply
    receiver.replica.raft.term_is_durable = True
    assert receiver.offer(copied, content, held.offset) != []


def test_a_deposed_leader_sends_no_more_of_its_snapshot(pair: Pair) -> None:
    """Seed 2154: under the term that deposed it, it would pass for its leader."""
    pair.sync.work(Ready(needs_snapshot=["id2"]), 0.0)
    pair.sync.tick(0.1)
    pair.sync.work(Ready(), 0.1)
    first = pair.said(pair.replica)[0]
    assert type(first) is InstallSnapshot
    pair.replica.is_leader = False
    pair.replica.raft.term = 4
    reply = SnapshotReply("id2", "id1", 3, first.index, first.offset + len(first.data), False)
    pair.sync.work(Ready(chunks=[reply]), 0.2)
    pair.sync.tick(0.3)
    pair.sync.work(Ready(), 0.3)
    assert not any(type(message) is InstallSnapshot for message in pair.said(pair.replica))


# ------------------------------------------------- whoever is not heard of knocks


@pytest.fixture
def town() -> Town:
    """Three members, and nothing that goes wrong."""
    town = Simulation(Options(1, nodes=3, faults=())).town
    until(town, lambda: town.why_not_settled() is None)
    return town


def until(town: Town, done: Callable[[], bool], within_s: float = 60.0) -> None:
    """Let things happen until `done`."""
    end_s = town.agenda.now + within_s
    while not done():
        assert town.agenda.step(end_s), f"not within {within_s} s"


def ids(town: Town) -> dict[str, str]:
    return {name: node.id for name in town.nodes if (node := town.node(name)) is not None}


def test_a_node_that_is_no_member_yet_knocks_at_every_door_though_it_has_adopted_the_cluster(town: Town) -> None:
    """Seeds 150, 416 and 1044: whoever was about to take it in may be dead."""
    leader = town.leader
    town.join()
    until(town, lambda: (node := town.node("n4")) is not None and node.cluster is not None)
    node = town.node("n4")
    assert node is not None
    assert leader is not None
    town.kill(leader, power=False, back_in_s=40.0)
    others = {id for name, id in ids(town).items() if name not in ("n4", leader)}
    assert others <= node.peers._links.keys()
    until(town, lambda: node.replica.raft.config.member(node.id) is not None, within_s=30.0)
    assert town.node(leader) is None


def test_a_member_that_hears_nobody_knocks_at_those_it_has_never_heard_of(town: Town) -> None:
    """Seed 22254: all members that it knows may have been replaced meanwhile."""
    away = next(name for name in town.nodes if name != town.leader)
    links = [link for other in town.nodes if other != away for link in ((away, other), (other, away))]
    town.network.block([*links, ("n4", away)])  # or the new one would knock
    town.join()
    node = town.node(away)
    assert node is not None
    until(town, lambda: (new := ids(town).get("n4")) is not None and new in node.peers._links)
    assert node.replica.raft.config.member(ids(town)["n4"]) is None, "the registry alone has told of it"


# ---------------------------------------------------- how a membership begins and ends


class At(OsWorld):
    """The world at another time of day."""

    def __init__(self, wall_ms: int) -> None:
        super().__init__()
        self._wall_ms = wall_ms

    def wall_ms(self) -> int:
        return self._wall_ms


def test_a_cluster_that_is_founded_again_begins_with_the_same_bytes(tmp_path: Path) -> None:
    """Seed 801284: the founder's log lost its first entry, which the others held."""
    firsts = set()
    for wall_ms in (1_700_000_000_000, 1_700_000_009_999):
        node = Node(Settings(tmp_path, port=0), At(wall_ms))  # it is never run, so its log stays empty
        try:
            firsts.add(node.replica.raft.log.batch_at(1).data)
        finally:
            node.close()
    assert len(firsts) == 1 and b'"at":1700000000000,' in firsts.pop()


def test_a_leader_that_knows_of_its_own_removal_ends_though_nobody_can_tell_it(town: Town) -> None:
    """Seed 800921: the notice was lost with the connection."""
    name = town.leader
    assert name is not None
    node = town.node(name)
    assert node is not None
    raft = node.replica.raft
    until(town, lambda: raft.has_committed_in_term and raft.config_index <= raft.commit)
    node.replica.change(raft.config.without(node.id), Mock(done=False, deadline=float("inf")))
    until(town, lambda: raft.config_index <= raft.commit)
    others = [other for other in town.nodes if other != name]
    town.network.block([link for other in others for link in ((name, other), (other, name))])
    until(town, lambda: town.node(name) is not node, within_s=5.0)
