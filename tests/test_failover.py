"""A leader that dies, freezes or leaves, and what its cluster makes of it: real processes on loopback."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from tests.harness import Cluster, NodeServer
from tests.load import Load, Register
from tests.relay import Network

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
    with Load(three, writers=6, stays=True) as load, Register(three) as register:
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


def test_a_leader_cut_off_from_the_rest_answers_neither_a_write_nor_a_linearizable_read(cluster: Clusters) -> None:
    three = cluster(3, start=False, hosts=["127.0.0.11", "127.0.0.12", "127.0.0.13"])
    with Network(three) as network:
        three.start()
        old = three.leader()
        others = three.followers()
        assert old.ask(op="put", key="k", value="before")["ok"]
        network.cut(old)
        late = [in_background(old, 6.0, op=op, key="k", value="lost?", timeout=5) for op in ("put", "get")]
        new = three.wait(lambda: next((n for n in others if n.role() == "leader"), None), what="another leader")
        assert new.ask(op="put", key="k", value="after")["ok"]
        # The old one knows no better yet, or has just found out; either way it must not answer from what it has.
        for request in ({"op": "put", "key": "k", "value": "wrong"}, {"op": "get", "key": "k"}):
            reply = old.ask(**request, timeout=0.5)
            assert reply["error"] in ("no_leader", "timeout"), reply
        stale = old.ask(op="get", key="k", read="stale")
        assert stale["value"] == "before" and stale["lag"] > 0
        assert new.ask(op="get", key="k")["value"] == "after"
        network.heal()
        three.wait(lambda: old.role() == "follower", what="the old leader follows")
        written, read = (reply.result() for reply in late)
        assert read.get("value") != "before", (
            "a read that waited through the cut missed what was acknowledged meanwhile"
        )
        final = {node.ask(op="get", key="k")["value"] for node in three.nodes}
        assert final == {"lost?"} if written.get("ok") else final in ({"after"}, {"lost?"})
        three.wait_ready()


@pytest.mark.parametrize("election", ["bully", "raft"])
def test_no_history_breaks_while_one_node_after_the_other_is_cut_off(cluster: Clusters, election: str) -> None:
    hosts = [f"127.0.0.{n}" for n in range(21, 26)]
    five = cluster(5, start=False, hosts=hosts, election=election)
    with Network(five) as network:
        five.start()
        with Load(five, writers=5) as load, Register(five) as register:
            for count in (1, 2, 1, 2):
                leader = five.leader()
                apart = [leader, *[n for n in five.nodes if n is not leader][: count - 1]]
                network.cut(*apart)
                rest = [n for n in five.nodes if n not in apart]
                five.wait(lambda rest=rest: any(n.role() == "leader" for n in rest), what="a leader of the majority")
                load.wait_for(10, since_s=time.monotonic())
                network.heal()
        five.wait_ready()
        five.wait_equal()
        load.check(five.nodes)
        assert min(register.reads.values()) > 0
        assert len({s["digest"] for s in five.statuses().values()}) == 1


def in_background(node: NodeServer, timeout_s: float, **request: object) -> Future[dict[str, object]]:
    """The reply of `node` to `request`, when it comes."""
    future: Future[dict[str, object]] = Future()

    def run() -> None:
        try:
            future.set_result(node.ask(timeout_s, **request))
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_on_equal_logs_the_highest_living_name_wins_after_the_leaders_death(cluster: Clusters) -> None:
    four = cluster(4)
    for _ in range(3):
        leader = four.wait_ready(voters=4)
        four.wait_equal()
        leader.kill()
        highest = max(four.running, key=lambda node: node.name)
        assert four.leader() is highest
        leader.start()


def test_a_node_that_returns_with_an_older_log_and_the_highest_name_neither_wins_nor_blocks(cluster: Clusters) -> None:
    three = cluster(3)
    client = three.client()
    returning = three.node("n3")
    returning.kill()
    for n in range(20):
        client.put(f"k{n}", n)
    leader = three.leader()
    # It comes back in the very moment of an election, behind everybody.
    term = leader.status()["term"]
    leader.kill()
    killed_at = time.monotonic()
    returning.start()
    new = three.leader()
    assert new is not returning and new is not leader, repr(new)
    assert time.monotonic() - killed_at < 3.0
    assert client.put("after", 1).rev > 0
    leader.start()
    assert three.wait_ready().status()["term"] - term <= 5
    assert returning.ask(op="count")["count"] == 21


@pytest.mark.parametrize("wiped", [False, True])
def test_without_its_registry_a_cluster_reads_writes_and_fails_over(cluster: Clusters, wiped: bool) -> None:
    three = cluster(3)
    client = three.client()
    client.put("before", 1)
    id = three.nodes[0].status()["cluster"]
    assert three.registry is not None
    if wiped:
        three.registry.wipe()
    else:
        three.registry.kill()
    three.leader().kill()
    client.put("during", 2)
    assert [client.get(key).value for key in ("before", "during")] == [1, 2]  # type: ignore[union-attr]
    for node in three.nodes:
        if not node.alive:
            node.start()
    three.wait_ready()
    three.registry.start()
    # A node without a cluster comes at the same time: it must not be granted one of its own.
    newcomer = three.new_node()
    newcomer.start()

    def listed() -> bool:
        reply = three.registry.ask(op="nodes")  # type: ignore[union-attr]
        return reply["cluster"] == id and {n["name"] for n in reply["nodes"]} == {"n1", "n2", "n3", "n4"}

    three.wait(listed, what="all nodes are in the registry")
    three.wait_ready(voters=4)
    assert {s["cluster"] for s in three.statuses().values()} == {id}
    assert newcomer.ask(op="get", key="during")["value"] == 2


@pytest.mark.parametrize("election", ["bully", "raft"])
def test_a_transfer_under_load_loses_nothing_and_takes_a_moment(cluster: Clusters, election: str) -> None:
    three = cluster(3, election=election)
    gaps_s = []
    with Load(three) as load, Register(three):
        for _ in range(5):
            target = three.followers()[0]
            began_at = time.monotonic()
            reply = three.leader().ask(op="transfer", to=target.name)
            assert (reply["name"], reply["leader"]) == (target.name, target.address)
            load.wait_for(10, since_s=time.monotonic())
            gaps_s.append(load.longest_gap_s(began_at, time.monotonic()))
            assert three.leader() is target
    three.wait_equal()
    load.check(three.nodes)
    assert [w for w in load.writes if w.unknown] == []
    assert statistics.median(gaps_s) < 0.2, gaps_s
