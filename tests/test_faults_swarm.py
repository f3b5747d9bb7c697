"""Everything at once: networks, processes, disks and clocks fail in a random order that a seed draws.

Which kinds of fault there are is drawn first (a swarm: with fewer kinds, each goes deeper), then one after the other, some
before the last one is mended. At most a minority is impaired at a time, so that a majority always can, and must, go on;
now and then everything stops at once. A failure prints the seed and what happened; DDB_TEST_FAULTS_SEED=N draws the same
lots again, though when they strike is up to the machine.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faulting import LONG, SEED, Clock, FailingDisk, judged, shim
from tests.harness import Cluster, NodeServer
from tests.netns import Break, Firewall, Namespace, Unavailable, Way

__all__ = ["shim"]

SECONDS = 60.0 if LONG else 6.0
RUNS = [(SEED + n, (3, 5)[n % 2], ("bully", "raft")[n // 2 % 2]) for n in range(12 if LONG else 1)]
HOSTS = [f"127.0.8.{n}" for n in range(1, 6)]
EIO_RULES = [f"{call} {part} errno {errno.EIO}" for call in ("sync", "write") for part in ("/log/", "state.db")]


@pytest.fixture
def firewall() -> Iterator[Firewall]:
    """The firewall of a namespace that this thread is in, and all that the test starts."""
    try:
        with Namespace() as found:
            yield found
    except Unavailable as reason:
        pytest.skip(str(reason))


class Swarm:
    """Draws faults and does them to `some`; `mend` undoes all that is left of them."""

    def __init__(self, some: Cluster, firewall: Firewall, library: Path, seed: int) -> None:
        self.some = some
        self.firewall = firewall
        self.lot = random.Random(seed)
        self.disks = {node.name: FailingDisk(node, library) for node in some.nodes}
        self.clocks = {node.name: Clock(node) for node in some.nodes}
        kinds = [
            self.kill,
            self.freeze,
            self.cut,
            self.leave,
            self.fail_disk,
            self.slow_disk,
            self.skew,
            self.power_off,
        ]
        self.kinds = self.lot.sample(kinds, self.lot.randint(3, len(kinds)))
        self.done: list[str] = [f"seed {seed}, kinds: {' '.join(kind.__name__ for kind in self.kinds)}"]

    def strike(self) -> None:
        """One fault, for a moment, and then, mostly, its mending."""
        victims = self.lot.sample(self.some.nodes, self.lot.randint(1, (len(self.some.nodes) - 1) // 2))
        if self.lot.random() < 0.5 and (leader := self.some.find_leader()) and leader not in victims:
            victims[0] = leader
        kind: Callable[[list[NodeServer]], str | None] = self.lot.choice(self.kinds)
        told = kind(victims) or ""
        self.done.append(f"{kind.__name__} {' '.join(node.name for node in victims)} {told}".rstrip())
        time.sleep(self.lot.uniform(0.0, 1.5))
        self.mend()
        time.sleep(self.lot.uniform(0.0, 0.7))

    def mend(self) -> None:
        """Undo everything."""
        self.firewall.heal()
        for node in self.some.nodes:
            self.disks[node.name].mend()
            node.cont()
        for node in self.some.nodes:
            if not node.alive:
                assert "Traceback" not in node.log, node.log
        self.some.start_nodes()

    def all_serve(self) -> bool:
        """Start whoever has ended, perhaps only now, of an error that is long mended; whether all answer."""
        self.mend()
        return len(self.some.statuses()) == len(self.some.nodes)

    def kill(self, victims: list[NodeServer]) -> None:
        """kill -9."""
        for node in victims:
            node.kill()

    def freeze(self, victims: list[NodeServer]) -> None:
        """SIGSTOP."""
        for node in victims:
            node.stop_signal()

    def leave(self, victims: list[NodeServer]) -> None:
        """SIGTERM."""
        for node in victims:
            node.ask_to_leave()
        for node in victims:
            # One that has only just started may not have set up its handler yet.
            assert node.wait_ended() == 0, node.log

    def power_off(self, victims: list[NodeServer]) -> None:
        """kill -9 of all, whoever the victims are."""
        for node in self.some.nodes:
            node.kill()

    def cut(self, victims: list[NodeServer]) -> str:
        """Some or all ways between the victims and the rest are broken, in some way."""
        rest = [node for node in self.some.nodes if node not in victims]
        ways = [Way(a, b) for node in victims for other in rest for a, b in ((node, other), (other, node))]
        how = self.lot.choice(list(Break))
        some_ways = self.lot.sample(ways, self.lot.randint(1, len(ways)))
        self.firewall.cut(self.lot.choice([ways, some_ways]), how)
        return how.value

    def fail_disk(self, victims: list[NodeServer]) -> str:
        """Writes or fsyncs fail, of the log or of the snapshot: the node may end."""
        rule = self.lot.choice(EIO_RULES)
        for node in victims:
            self.disks[node.name].order(rule)
        return rule

    def slow_disk(self, victims: list[NodeServer]) -> str:
        """Each fsync takes long."""
        rule = f"sync / delay_ms {self.lot.choice([50, 300, 2000])}"
        for node in victims:
            self.disks[node.name].order(rule)
        return rule

    def skew(self, victims: list[NodeServer]) -> str:
        """The victims' clocks are wrong until they are told otherwise by the next such fault."""
        off_s, rate = self.lot.uniform(-1e5, 1e5), self.lot.choice([0.5, 1.0, 2.0])
        for node in victims:
            self.clocks[node.name].order(off_s, rate)
        return f"by {off_s:.0f} s, rate {rate}"


@pytest.mark.parametrize("seed,count,election", RUNS)
def test_no_history_breaks_whatever_fails_together(
    firewall: Firewall, shim: Path, tmp_path: Path, seed: int, count: int, election: str
) -> None:
    some = Cluster(tmp_path, count, hosts=HOSTS[:count], election=election, checkpoint_every=100, retain=20)
    swarm = Swarm(some, firewall, shim, seed)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: print("what happened:", *swarm.done, sep="\n  "))
        stack.enter_context(some)
        with judged(some, tmp_path, seed):
            until_s = time.monotonic() + SECONDS
            while time.monotonic() < until_s:
                swarm.strike()
            some.wait(swarm.all_serve, what="every node serves again")
