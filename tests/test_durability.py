"""What was acknowledged survives kills, torn and rotten files, compaction and full disks: real processes on loopback."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import Cluster, NodeServer
from tests.load import Load, flood, rows

Clusters = Callable[..., Cluster]


def kill_all(nodes: Cluster) -> None:
    """kill -9 of every node at once."""
    for node in nodes.nodes:
        node._signal(signal.SIGKILL)
    for node in nodes.nodes:
        node.kill()


def test_after_kill_9_of_every_node_each_has_every_acknowledged_write_ten_times_in_a_row(cluster: Clusters) -> None:
    three = cluster(3, checkpoint_every=300, retain=50)
    loads = []
    for n in range(10):
        with Load(three, writers=6, prefix=f"round{n}") as load:
            load.wait_for(150)
            kill_all(three)
        three.start_nodes()
        three.wait_ready()
        three.wait_equal()
        loads.append(load)
        for each in loads:
            each.check(three.nodes)
    assert len({s["digest"] for s in three.statuses().values()}) == 1


def test_a_follower_that_was_down_for_ten_thousand_writes_catches_up(cluster: Clusters) -> None:
    three = cluster(3)
    down = three.followers()[0]
    down.kill()
    revs = flood(three.leader(), 10_000)
    down.start()
    three.wait_equal()
    assert {key: item["rev"] for key, item in rows(down).items()} == revs
    assert "installed the snapshot" not in down.log
    assert three.wait_ready().status()["digest"] == down.status()["digest"]


def test_a_log_of_large_entries_keeps_no_more_of_them_than_of_small_ones(cluster: Clusters) -> None:
    """However many entries it may keep: each start would have to read all of them."""
    one = cluster(1)
    node = one.leader()
    for n in range(100):
        assert node.ask(10.0, op="put", key=f"large{n % 5}", value="x" * (1 << 20))["ok"]
        assert n % 40 or node.ask(60.0, op="snapshot", timeout=60)["ok"]
    assert node.ask(60.0, op="snapshot", timeout=60)["ok"]
    kept = sum(path.stat().st_size for path in (node.directory / "log").iterdir())
    assert 60 << 20 < kept < 90 << 20
    node.kill()
    node.start()
    assert one.wait_ready().ask(op="count")["count"] == 5


def test_a_follower_that_was_down_past_the_logs_compaction_catches_up_by_snapshot(cluster: Clusters) -> None:
    three = cluster(3, checkpoint_every=2000, retain=100)
    before = flood(three.leader(), 500, "before/")
    three.wait_equal()
    down = three.followers()[0]
    down.kill()
    revs = flood(three.leader(), 5_000)
    leader = three.leader()
    assert leader.ask(op="snapshot", timeout=10)["rev"] >= 5_500
    three.wait(lambda: leader.status()["log"]["first"] > 5_000, what="the log is compacted")
    with Load(three, nodes=[n for n in three.nodes if n is not down]) as load:
        down.start()
        three.wait(lambda: "installed the snapshot" in down.log, what="the snapshot has arrived")
        load.wait_for(50, since_s=time.monotonic())
    three.wait_equal()
    load.check(three.nodes)
    found = {key: item["rev"] for key, item in rows(down).items() if not key.startswith("load/")}
    assert found == {**before, **revs}
    assert len({s["digest"] for s in three.statuses().values()}) == 1
    # What it received is durable here, too.
    down.restart()
    three.wait_equal()
    assert {**before, **revs}.items() <= {key: item["rev"] for key, item in rows(down).items()}.items()


def test_a_snapshot_whose_receiver_or_sender_dies_on_the_way_is_sent_anew(cluster: Clusters) -> None:
    three = cluster(3, checkpoint_every=10, retain=1)
    for n in range(24):
        assert three.leader().ask(10.0, op="put", key=f"big{n}", value=f"{n:04d}" * (1 << 18))["ok"]
    for victim in ("receiver", "sender"):
        newcomer = three.new_node()
        newcomer.start()
        leader = three.leader()
        three.wait(lambda node=newcomer: "receiving the snapshot" in node.log, what="the snapshot is on its way")
        if victim == "receiver":
            newcomer.restart()
        else:
            leader.kill()
        three.wait(lambda node=newcomer: "installed the snapshot" in node.log, timeout_s=20, what="it has arrived")
        if not leader.alive:
            leader.start()
        three.wait_ready(voters=len(three.nodes))
        three.wait_equal()
        assert newcomer.ask(op="count", prefix="big")["count"] == 24
        assert not list(newcomer.directory.glob("incoming*"))
    assert len({s["digest"] for s in three.statuses().values()}) == 1


# Files that are torn or rotten


def segments(node: NodeServer) -> list[Path]:
    """The node's log files, the oldest first."""
    return sorted((node.directory / "log").glob("*.log"))


def records(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a log file that are records, with their offsets."""
    at, found = 0, []
    for line in path.read_bytes().splitlines(keepends=True):
        if line != b"\n":
            found.append((at, line))
        at += len(line)
    return found


def in_doubt(node: NodeServer) -> bool:
    """What the newest term record on the node's disk says."""
    said = [match for path in segments(node) for match in re.findall(rb'"doubt":(true|false)', path.read_bytes())]
    return bool(said[-1] == b"true")


@pytest.mark.parametrize("kept", [1, 9, 60, -1])
def test_a_torn_last_record_is_recovered_and_the_members_doubt_is_cleared(cluster: Clusters, kept: int) -> None:
    three = cluster(3)
    revs = flood(three.leader(), 200)
    three.wait_equal()
    torn = three.followers()[0]
    torn.kill()
    path = segments(torn)[-1]
    offset, line = records(path)[-1]
    with path.open("rb+") as file:
        file.truncate(offset + (kept if kept > 0 else len(line) - 1))
    torn.start()
    said = re.compile(r"byte \d+: no valid record begins here; the log is cut there")
    three.wait(lambda: said.search(torn.log), what="it says what it has cut")
    three.wait_equal()
    three.wait(lambda: not in_doubt(torn), what="the leader has confirmed its log")
    assert {key: item["rev"] for key, item in rows(torn).items()} == revs
    # Its word counts again: with it alone the leader has a majority.
    next(node for node in three.followers() if node is not torn).kill()
    assert three.leader().ask(op="put", key="k", value=1)["ok"]


def test_a_power_failure_that_tears_every_nodes_log_ends_in_one_cluster(cluster: Clusters) -> None:
    three = cluster(3)
    revs = flood(three.leader(), 200)
    three.wait_equal()
    kill_all(three)
    for node in three.nodes:  # the beginning of a group that no disk had taken whole
        path = segments(node)[-1]
        offset, line = records(path)[-1]
        with path.open("rb+") as file:
            file.seek(offset + len(line))
            file.write(line[: len(line) // 2])
            file.truncate()
    three.start_nodes()
    three.wait_ready()
    three.wait_equal()
    for node in three.nodes:
        assert {key: item["rev"] for key, item in rows(node).items()} == revs
        three.wait(lambda node=node: not in_doubt(node), what=f"{node.name} is in doubt no more")
    assert three.leader().ask(op="put", key="k", value=1)["ok"]


def refused(node: NodeServer, *words: str) -> None:
    """The node does not start: exit code 1, one sentence with all of `words`, no traceback."""
    node.spawn()
    assert node.wait_ended() == 1, node.log
    assert "Traceback" not in node.log, node.log
    errors = [line for line in node.log.splitlines() if " ERROR " in line or " CRITICAL " in line]
    assert len(errors) == 1 and all(word in errors[0] for word in words), node.log


def repair(nodes: Cluster, node: NodeServer) -> None:
    """Start `node` once with --repair, and see that everything is there again."""
    expected = rows(nodes.leader())
    node.flags.append("--repair")
    node.start()
    node.flags.remove("--repair")
    nodes.wait_ready()
    nodes.wait_equal()
    assert rows(node) == expected
    node.restart()
    nodes.wait_ready()
    nodes.wait_equal()
    assert rows(node) == expected
    assert len({s["digest"] for s in nodes.statuses().values()}) == 1


def flip(path: Path, offset: int) -> None:
    """Turn one bit over."""
    with path.open("rb+") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("compacted", [False, True])
def test_a_flipped_byte_in_the_log_is_refused_until_it_is_repaired_from_the_leader(
    cluster: Clusters, compacted: bool
) -> None:
    flags = {"checkpoint_every": 500, "retain": 50} if compacted else {}
    three = cluster(3, **flags)
    for n in range(8):  # several groups
        flood(three.leader(), 200, f"flood{n}/")
    three.wait_equal()
    rotten = three.followers()[0]
    rotten.kill()
    path = segments(rotten)[-1]
    lines = records(path)
    offset, line = lines[len(lines) // 2]
    flip(path, offset + len(line) // 2)
    if compacted:
        flood(three.leader(), 1000, "later/")
    refused(rotten, str(path), f"byte {offset}", "--repair")
    repair(three, rotten)
    assert list((rotten.directory / "log").glob("*.damaged")), "what was cut is kept beside"


@pytest.mark.parametrize("how", ["rotten", "cut", "garbage"])
def test_a_damaged_snapshot_is_refused_until_it_is_repaired_from_the_leader(cluster: Clusters, how: str) -> None:
    three = cluster(3, checkpoint_every=500, retain=50)
    for n in range(5):
        flood(three.leader(), 500, f"flood{n}/")
    rotten = three.followers()[0]
    three.wait(lambda: rotten.status()["log"]["first"] > 500, what="its log is compacted")
    three.wait_equal()
    rotten.kill()
    path = rotten.directory / "state.db"
    if how == "rotten":
        found = [match.start() for match in re.finditer(rb'flood0/000007"v{64}', path.read_bytes())]
        assert found, "the row is in the file, perhaps also where a page has outlived its use"
        for at in found:
            flip(path, at + 40)
    elif how == "cut":
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size // 2)
    else:
        path.write_bytes(b"\x00garbage" * 1000)
    refused(rotten, str(path), "--repair")
    repair(three, rotten)


def test_a_missing_log_is_refused_for_the_node_can_not_know_what_it_promised(cluster: Clusters) -> None:
    three = cluster(3, replace_after=1)
    revs = flood(three.leader(), 200)
    lost = three.followers()[0]
    lost.kill()
    shutil.rmtree(lost.directory / "log")
    refused(lost, "log", "missing", str(lost.directory))
    lost.wipe()  # as it says
    lost.start()
    three.wait_equal()
    assert {key: item["rev"] for key, item in rows(lost).items()} == revs


def test_a_missing_snapshot_is_made_anew_from_the_log_or_refused_where_that_begins_too_late(cluster: Clusters) -> None:
    three = cluster(3, checkpoint_every=30, retain=1)
    revs = flood(three.leader(), 100)
    lost = three.followers()[0]
    three.wait(lambda: lost.status()["snapshot"]["rev"] > 60, what="it has a snapshot")
    lost.kill()
    (lost.directory / "state.db").unlink()
    lost.start()
    three.wait_equal()
    assert {key: item["rev"] for key, item in rows(lost).items()} == revs
    for n in range(24):  # more than a segment of the log holds
        three.leader().ask(10.0, op="put", key=f"big{n}", value="b" * (1 << 20))
    three.wait_equal()
    assert lost.ask(10.0, op="snapshot")["ok"] is True
    three.wait(lambda: segments(lost)[0].name != "00000001.log", what="the first segment is dropped")
    lost.kill()
    (lost.directory / "state.db").unlink()
    refused(lost, str(lost.directory / "state.db"), "--repair")
    repair(three, lost)
