"""Clocks that jump and clocks that run at different rates: real processes whose every look at a clock is falsified.

Nothing may depend on what time it is, and nothing that is promised on how fast it passes (skew/sitecustomize.py).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faulting import LONG, SEED, Clock, cases, judged
from tests.harness import Cluster

Clusters = Callable[..., Cluster]

HOUR_S = 3600.0
FAR_S = (-80 * 365 * 24 * HOUR_S, 100 * 365 * 24 * HOUR_S)  # before 1970, and well past what 32 bits hold
RATES = [0.1, 0.5, 1.0, 2.0, 10.0]


def skewed(some: Cluster) -> dict[str, Clock]:
    """The clocks of a cluster that has not started yet, by the nodes' names."""
    return {node.name: Clock(node) for node in some.nodes}


@pytest.mark.parametrize("election", cases("bully", "raft", brief=1))
def test_wall_clocks_that_jump_by_hours_and_decades_break_nothing(
    cluster: Clusters, tmp_path: Path, election: str
) -> None:
    three = cluster(3, start=False, election=election)
    clocks = skewed(three)
    clocks["n1"].order(off_s=FAR_S[0])
    three.start()
    lot = random.Random(SEED)
    gaps_s = []
    with judged(three, tmp_path) as load:
        for off_s in [HOUR_S, -HOUR_S, *FAR_S] * (5 if LONG else 1):
            clocks[lot.choice(three.nodes).name].order(-off_s)
            clocks[three.leader().name].order(off_s)
            jumped_s = time.monotonic()
            load.wait_for(50, since_s=jumped_s)
            gaps_s.append(load.longest_gap_s(jumped_s, time.monotonic()))
        for node in three.nodes:
            node.restart()  # it reads what was written then
    assert statistics.median(gaps_s) < 0.5, f"a jump is no reason for an election: {gaps_s}"


def test_an_entry_keeps_the_time_that_its_leader_gave_it(cluster: Clusters) -> None:
    three = cluster(3, start=False)
    clocks = skewed(three)
    for n, clock in enumerate(clocks.values()):
        clock.order(off_s=n * HOUR_S)
    three.start()
    three.leader().ask(op="put", key="k", value=1)
    three.wait_equal()
    told = [node.ask(op="log", **{"from": 1}, limit=100)["entries"] for node in three.nodes]
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("election", cases("bully", "raft", brief=1))
def test_clocks_that_run_at_different_rates_break_nothing(cluster: Clusters, tmp_path: Path, election: str) -> None:
    three = cluster(3, start=False, election=election)
    clocks = skewed(three)
    three.start()
    lot = random.Random(SEED)
    with judged(three, tmp_path) as load:
        for _ in range(10 if LONG else 2):
            for clock in clocks.values():
                clock.order(lot.uniform(-HOUR_S, HOUR_S), rate=lot.choice(RATES))
            load.wait_for(50, since_s=time.monotonic())
            leader = three.leader()
            leader.kill()
            load.wait_for(20, since_s=time.monotonic())
            leader.start()
            three.wait_ready()
