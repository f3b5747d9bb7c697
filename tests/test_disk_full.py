"""A disk without room: real nodes, each in a small file system of its own, which a filler file takes up and gives back.

Mounting needs root; where it isn't allowed, these tests say so and are skipped. (tests/test_log_crash.py and
tests/test_log.py fill a simulated disk at every single write.)
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Cluster, NodeServer
from tests.load import Load, Register, rows

DISK_BYTES = 8 << 20


class Disk:
    """A tmpfs at the path of a node's data directory. `fill` leaves no byte; `free` gives the room back."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system can't be mounted here: {error}")
        self.path = path

    def fill(self) -> None:
        """Take up all the room there is."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Give the room back."""
        (self.path / "filler").unlink()

    def close(self) -> None:
        """Take the file system away, with all that is in it."""
        subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True)


Small = Callable[[int], tuple[Cluster, dict[str, Disk]]]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    """Makes a started cluster of so many nodes, and the disks by the nodes' names."""
    disks: dict[str, Disk] = {}
    clusters: list[Cluster] = []

    def make(count: int) -> tuple[Cluster, dict[str, Disk]]:
        if os.geteuid() != 0:
            pytest.skip("a small file system can't be mounted here: that needs root")
        one = Cluster(tmp_path, count, registry=count > 1)
        clusters.append(one)
        for node in one.nodes:
            disks[node.name] = Disk(node.directory)
        return one.start(), disks

    yield make
    for one in clusters:
        one.print_logs()
        one.close()
    for disk in disks.values():
        disk.close()


def read_only(node: NodeServer) -> bool:
    """Whether the node says that its disk is full."""
    return bool(node.status()["read_only"])


def test_a_cluster_goes_on_while_a_followers_disk_is_full(small: Small) -> None:
    three, disks = small(3)
    full = three.followers()[0]
    with Load(three) as load, Register(three) as register:
        disks[full.name].fill()
        three.wait(lambda: read_only(full), what="the node notices")
        load.wait_for(50, since_s=time.monotonic())
        reads = register.reads[full.name]
        three.wait(lambda: register.reads[full.name] > reads + 5, what="reads at the full node go on")
        disks[full.name].free()
        three.wait(lambda: not read_only(full), what="the node notices that there is room again")
    three.wait_equal()
    load.check(three.nodes)


def test_the_leadership_leaves_a_full_disk_and_nothing_acknowledged_is_lost(small: Small) -> None:
    three, disks = small(3)
    with Load(three) as load, Register(three):
        full = three.wait_ready()
        disks[full.name].fill()
        filled_at = time.monotonic()
        three.wait(lambda: three.leader() is not full, what="another node leads")
        load.wait_for(50, since_s=time.monotonic())
        assert load.longest_gap_s(filled_at, time.monotonic()) < 3.0
        full.kill()  # what it has on disk is what counts
        disks[full.name].free()
        full.start()
        three.wait_ready()
    three.wait_equal()
    load.check(three.nodes)


@pytest.mark.parametrize("count", [1, 3])
def test_with_every_disk_full_reads_go_on_and_writes_are_refused_until_there_is_room(small: Small, count: int) -> None:
    some, disks = small(count)
    leader = some.leader()
    assert leader.ask(op="put", key="k", value="before")["ok"]
    some.wait_equal()
    for disk in disks.values():
        disk.fill()
    # Space that the log had reserved takes a few more. The one that finds out waits in the dark; then it is known.
    said = []
    while not said or said[-1].get("error") != "read_only":
        said.append(leader.ask(3.0, op="put", key=f"w{len(said)}", value="x" * 20_000, timeout=1))
        assert said[-1]["ok"] or (said[-1]["error"] in ("timeout", "read_only") and len(said) < 100), said[-1]
    assert "free" in said[-1]["message"]
    for node in some.nodes:
        assert node.ask(3.0, op="get", key="k", timeout=2)["value"] == "before"
    for disk in disks.values():
        disk.free()
    some.wait(lambda: some.nodes[0].ask(3.0, op="put", key="k", value="after", timeout=2)["ok"], what="writes go on")
    some.wait_ready()
    some.wait_equal()
    for node in some.nodes:
        assert node.ask(op="get", key="k")["value"] == "after"
        found = rows(node, "w")
        assert all(f"w{n}" in found for n, reply in enumerate(said) if reply["ok"])
        assert not any(f"w{n}" in found for n, reply in enumerate(said) if reply.get("error") == "read_only")
    for node in some.nodes:
        node.restart()
    some.wait_ready()
    assert some.nodes[0].ask(op="get", key="k")["value"] == "after"
