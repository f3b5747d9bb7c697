"""A leader that dies, freezes or leaves, and what its cluster makes of it: real processes on loopback."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest

from tests.harness import Cluster
from tests.load import Load, Register

Clusters = Callable[..., Cluster]

ROUNDS = 10


@pytest.mark.parametrize("election", ["bully", "raft"])
def test_after_kill_9_of_the_leader_the_next_write_succeeds_within_half_a_second(
    cluster: Clusters, election: str
) -> None:
    three = cluster(3, election=election)
    gaps_s = []
    with Load(three) as load, Register(three) as register:
        for _ in range(ROUNDS):
            leader = three.wait_ready()
            killed_at = time.monotonic()
            leader.kill()
            gaps_s.append(load.wait_for(1, since_s=killed_at).ended_s - killed_at)
            leader.start()
    three.wait_ready()
    three.wait_equal()
    load.check(three.nodes)
    assert min(register.reads.values()) > 0
    assert statistics.median(gaps_s) < 0.5, gaps_s


def test_a_frozen_leader_is_replaced_within_two_seconds_and_steps_down_when_it_goes_on(cluster: Clusters) -> None:
    three = cluster(3)
    gaps_s = []
    with Load(three, writers=6) as load, Register(three) as register:
        for _ in range(3):
            leader = three.wait_ready()
            term = leader.status()["term"]
            frozen_at = time.monotonic()
            leader.stop_signal()
            gaps_s.append(load.wait_for(1, since_s=frozen_at).ended_s - frozen_at)
            three.wait(lambda old=leader: (three.find_leader() or old) is not old, what="another leader")
            leader.cont()
            # Whatever had queued up at the old leader is answered now: the register's readers hold it to the truth.
            three.wait(lambda old=leader, before=term: old.status()["term"] > before, what="it follows the new term")
    three.wait_ready()
    three.wait_equal()
    load.check(three.nodes)
    assert min(register.reads.values()) > 0
    assert max(gaps_s) < 2.0, gaps_s


def test_sigterm_of_the_leader_fails_no_request_that_is_retried_once(cluster: Clusters) -> None:
    three = cluster(3)
    gaps_s = []
    with Load(three) as load, Register(three):
        for _ in range(5):
            leader = three.wait_ready()
            load.wait_for(20, since_s=time.monotonic())
            told_at = time.monotonic()
            assert leader.term() == 0, leader.log
            load.wait_for(20, since_s=time.monotonic())
            gaps_s.append(load.longest_gap_s(told_at, time.monotonic()))
            leader.start()
    three.wait_ready()
    three.wait_equal()
    load.check(three.nodes)
    assert not [w for w in load.writes if w.unknown]
    assert [w for w in load.writes if w.tries > 2 and w.rev] == []
    assert statistics.median(gaps_s) < 0.1, gaps_s
