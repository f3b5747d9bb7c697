"""Long ways between the nodes, through a relay in user space (relay.py): neither rights nor tools are needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faulting import cases, judged
from tests.harness import Cluster
from tests.relay import Network

Clusters = Callable[..., Cluster]

HOSTS = [f"127.0.9.{n}" for n in range(1, 4)]


@pytest.mark.parametrize("election", cases("bully", "raft", brief=1))
@pytest.mark.parametrize("most_s", cases(0.05, 0.2, brief=1))  # there and back in less than an election takes (§5.6)
def test_a_cluster_whose_messages_are_late_is_slow_and_nothing_worse(
    cluster: Clusters, tmp_path: Path, election: str, most_s: float
) -> None:
    three = cluster(3, start=False, hosts=HOSTS, election=election, checkpoint_every=500, retain=50)
    with Network(three) as network:
        three.start()
        with judged(three, tmp_path) as load:
            network.slow(most_s / 10, most_s)
            load.wait_for(20, since_s=time.monotonic())
            leader = three.leader()
            leader.kill()
            load.wait_for(20, since_s=time.monotonic())
            leader.start()
            load.wait_for(20, since_s=time.monotonic())
            network.heal()
