"""Everything at once: nodes killed, frozen, cut off, told to leave and to hand over, while a history is written and judged.

What happens is drawn from a seed (the test's name shows it); when, is up to the machine. Set DDB_TEST_CHAOS_S to
run longer, and DDB_TEST_CHAOS_SEED to draw other lots.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable

import pytest

from tests.harness import Cluster, NodeServer
from tests.load import Load, Register
from tests.relay import Network

Clusters = Callable[..., Cluster]

SECONDS = float(os.environ.get("DDB_TEST_CHAOS_S", "8"))
SEED = int(os.environ.get("DDB_TEST_CHAOS_SEED", "1"))


class Nemesis:
    """Does harm to at most a minority of `nodes` at a time, and undoes it."""

    def __init__(self, nodes: Cluster, network: Network, seed: int) -> None:
        self.cluster = nodes
        self.network = network
        self.rng = random.Random(seed)
        self.done: list[str] = []

    def strike(self) -> None:
        """One piece of harm, for a fraction of a second, and its mending."""
        minority = (len(self.cluster.nodes) - 1) // 2
        victims = self.rng.sample(self.cluster.nodes, self.rng.randint(1, minority))
        if self.rng.random() < 0.5 and (leader := self.cluster.find_leader()) and leader not in victims:
            victims[0] = leader
        harm = self.rng.choice([self.kill, self.freeze, self.cut, self.leave, self.hand_over, self.all_at_once])
        self.done.append(f"{harm.__name__} {' '.join(v.name for v in victims)}")
        harm(victims)
        self.pause(0.5)

    def pause(self, most_s: float) -> None:
        """Let some time pass under load."""
        time.sleep(self.rng.uniform(0, most_s))

    def kill(self, victims: list[NodeServer]) -> None:
        """kill -9, and a restart a moment later."""
        for node in victims:
            node.kill()
        self.pause(1.5)
        self.cluster.start_nodes()

    def freeze(self, victims: list[NodeServer]) -> None:
        """SIGSTOP and SIGCONT."""
        for node in victims:
            node.stop_signal()
        self.pause(1.5)
        for node in victims:
            node.cont()

    def cut(self, victims: list[NodeServer]) -> None:
        """A dropped route."""
        self.network.cut(*victims)
        self.pause(2.0)
        self.network.heal()

    def leave(self, victims: list[NodeServer]) -> None:
        """SIGTERM, and a start."""
        for node in victims:
            assert node.term() == 0, node.log
        self.cluster.start_nodes()

    def hand_over(self, victims: list[NodeServer]) -> None:
        """A transfer of leadership, or the attempt."""
        with contextlib.suppress(OSError):
            self.cluster.running[0].ask(op="transfer", to=victims[0].name, timeout=1)

    def all_at_once(self, victims: list[NodeServer]) -> None:
        """A power failure."""
        for node in self.cluster.nodes:
            node.kill()
        self.cluster.start_nodes()


@pytest.mark.parametrize("election,seed", [("bully", SEED), ("raft", SEED + 1)])
def test_no_history_breaks_whatever_happens_to_a_minority(cluster: Clusters, election: str, seed: int) -> None:
    count = 3 if seed % 2 else 5
    hosts = [f"127.0.{1 + seed % 200}.{n}" for n in range(1, count + 1)]
    some = cluster(count, start=False, hosts=hosts, election=election, checkpoint_every=100, retain=20)
    with Network(some) as network:
        some.start()
        nemesis = Nemesis(some, network, seed)
        try:
            with Load(some, writers=4) as load, Register(some) as register:
                until = time.monotonic() + SECONDS
                while time.monotonic() < until:
                    nemesis.strike()
                load.wait_for(20, since_s=time.monotonic())
            some.wait_ready()
            some.wait_equal()
            load.check(some.nodes)
            assert register.acknowledged > 0
            assert len({s["digest"] for s in some.statuses().values()}) == 1
            for node in some.nodes:
                assert "Traceback" not in node.log_path.read_text(errors="replace"), node.name
        finally:
            print("what happened:", *nemesis.done, sep="\n  ")
