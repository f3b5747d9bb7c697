"""Disks that fail, stall, fill up and rot under real processes, while clients' histories are judged.

What fails is the call itself: a library loaded before the C library stands between the process and the kernel
(shim/faults.c), SQLite's calls included. It needs a C compiler; a small file system needs root. Where these are not to be
had, the tests say so and are skipped.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faulting import LONG, SEED, FailingDisk, cases, judged, shim
from tests.harness import Cluster, NodeServer
from tests.load import flood, rows
from tests.test_disk_full import Small, read_only, small

__all__ = ["shim", "small"]

Clusters = Callable[..., Cluster]
Failing = tuple[Cluster, dict[str, FailingDisk]]


@pytest.fixture(scope="module")
def started(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failing]:
    """A cluster whose disks can be told to fail, and these disks by the nodes' names, for one test after the other."""
    some = Cluster(tmp_path_factory.mktemp("failing"), 3, checkpoint_every=2000, retain=1000)
    disks = {node.name: FailingDisk(node, shim) for node in some.nodes}
    with some:
        yield some, disks


@pytest.fixture
def failing(started: Failing) -> Failing:
    """The same, with nothing broken, whatever the test before has left."""
    some, disks = started
    for disk in disks.values():
        disk.mend()
    some.start_nodes()
    some.wait_ready()
    return some, disks


def ended(node: NodeServer, *words: str) -> None:
    """The node ends with exit code 1 and without a traceback, and all of `words` are in the last thing that it says."""
    assert node.wait_ended() == 1, node.log
    said = [line for line in node.log.splitlines() if " CRITICAL " in line or " ERROR " in line]
    assert all(word in said[-1] for word in words), node.log
    assert "Traceback" not in node.log, node.log


@pytest.mark.parametrize(
    "role,call", cases(("leader", "sync"), ("follower", "write"), ("leader", "write"), ("follower", "sync"), brief=2)
)
def test_a_node_whose_log_fails_ends_and_takes_nothing_with_it(
    failing: Failing, tmp_path: Path, role: str, call: str
) -> None:
    three, disks = failing
    with judged(three, tmp_path) as load:
        node = three.leader() if role == "leader" else three.followers()[0]
        disks[node.name].order(f"{call} /log/ errno {errno.EIO}")
        ended(node, "log can't be written any more", "Input/output error")
        load.wait_for(20, since_s=time.monotonic())
        disks[node.name].mend()
        node.start()


def test_when_every_disk_fails_at_once_nothing_acknowledged_is_lost(failing: Failing, tmp_path: Path) -> None:
    three, disks = failing
    with judged(three, tmp_path):
        for disk in disks.values():
            disk.order(f"sync /log/ errno {errno.EIO}")
        three.wait(lambda: len(three.running) <= 1, what="a majority ends")
        for node in three.nodes:
            if node.alive:
                node.kill()  # it waits for the others with nothing to write, and can't find out
            else:
                ended(node, "log can't be written any more")
        for disk in disks.values():
            disk.mend()
        three.start_nodes()


@pytest.mark.parametrize("call", cases("sync", "write", brief=1))
def test_a_node_whose_snapshot_fails_ends_and_takes_nothing_with_it(
    failing: Failing, tmp_path: Path, call: str
) -> None:
    three, disks = failing
    with judged(three, tmp_path) as load:
        node = three.leader()
        disks[node.name].order(f"{call} state.db errno {errno.EIO}")
        with contextlib.suppress(OSError):
            node.ask(op="snapshot")
        ended(node, "state.db")
        load.wait_for(20, since_s=time.monotonic())
        disks[node.name].mend()
        node.start()


def test_a_leader_that_can_not_read_its_log_leaves_the_lead_to_one_that_can(failing: Failing, tmp_path: Path) -> None:
    three, disks = failing
    down = three.followers()[0]
    down.kill()
    flood(three.leader(), 500)
    for node in three.running:  # so that what the one that was down needs is on disk only
        node.restart()
    leader = three.leader()
    with judged(three, tmp_path):
        disks[leader.name].order(f"read /log/ errno {errno.EIO}")
        down.start()
        ended(leader, "Input/output error")
        disks[leader.name].mend()
        leader.start()


@pytest.mark.parametrize("role", cases("leader", "follower", brief=1))
def test_one_disk_that_takes_a_second_for_each_fsync_holds_up_nobody(
    failing: Failing, tmp_path: Path, role: str
) -> None:
    three, disks = failing
    with judged(three, tmp_path) as load:
        node = three.leader() if role == "leader" else three.followers()[0]
        disks[node.name].order("sync /log/ delay_ms 1000")
        began_s = time.monotonic()
        time.sleep(2.0)
        assert len(load.acknowledged(began_s)) > 50, "four writers that wait for such a disk get some ten writes done"
        disks[node.name].mend()


def test_a_majority_of_slow_disks_makes_writes_slow_and_nothing_worse(failing: Failing, tmp_path: Path) -> None:
    three, disks = failing
    with judged(three, tmp_path) as load:
        for disk in list(disks.values())[:2]:
            disk.order("sync /log/ delay_ms 200")
        load.wait_for(20, since_s=time.monotonic())
        for disk in disks.values():
            disk.mend()


def test_disks_that_fill_up_one_after_the_other_lose_nothing(small: Small, tmp_path: Path) -> None:
    three, disks = small(3)
    with judged(three, tmp_path) as load:
        for node in cases(three.leader(), *three.followers(), brief=2):
            disks[node.name].fill()
            three.wait(lambda node=node: read_only(node), what="the node notices")
            load.wait_for(20, since_s=time.monotonic())
            node.kill()  # what it has on disk is what counts
            disks[node.name].free()
            node.start()
            three.wait_ready()


def segments(node: NodeServer) -> list[Path]:
    """The files of the node's log, the oldest first."""
    return sorted((node.directory / "log").glob("*.log"))


def rot(path: Path, lot: random.Random) -> int:
    """Turn over one bit of what is written in `path`; returns at which byte."""
    data = path.read_bytes()
    at = lot.randrange(len(data.rstrip(b"\n")))
    with path.open("rb+") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1 << lot.randrange(8)]))
    return at


def serves(node: NodeServer) -> bool:
    """Start the node and read all that it has. Where it ends over that, see that it says what is damaged."""
    node.spawn()
    try:
        node.wait_listening()
        node.ask(5.0, op="get", key="k", timeout=4)
        rows(node)
        return True
    except (OSError, AssertionError):
        ended(node, "damaged")
        return False


@pytest.mark.parametrize("what", ["log", "snapshot"])
def test_a_bit_that_rotted_while_a_node_was_down_is_never_served(cluster: Clusters, tmp_path: Path, what: str) -> None:
    three = cluster(3, checkpoint_every=200, retain=100)
    lot = random.Random(SEED)
    with judged(three, tmp_path) as load:
        for _ in range(30 if LONG else 2):
            node = lot.choice(three.nodes)
            load.wait_for(50, since_s=time.monotonic())
            node.kill()
            path = segments(node)[-1] if what == "log" else node.directory / "state.db"
            print(f"{node.name}: {path.name}, byte {rot(path, lot)}")
            if not serves(node):
                node.flags.append("--repair")
                node.start()
                node.flags.remove("--repair")
            three.wait_ready()
            three.wait(lambda node=node: len(rows(node)) > 0, what="it serves again")
