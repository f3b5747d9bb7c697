"""How a cluster forms, serves and changes its members: real processes on loopback."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable

import pytest

from tests.harness import Cluster, NodeServer, RegistryServer, exchange
from tests.load import Load, rows

Clusters = Callable[..., Cluster]


def one_cluster(nodes: Cluster) -> None:
    """All running nodes are in the same cluster, under the same leader, who alone leads."""
    statuses = nodes.statuses()
    assert len(statuses) == len(nodes.running)
    assert len({s["cluster"] for s in statuses.values()}) == 1, statuses
    assert len({(s["leader"] or {}).get("name") for s in statuses.values()}) == 1, statuses
    assert [s["role"] for s in statuses.values()].count("leader") == 1, statuses


# Formation


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("election", ["bully", "raft"])
def test_nodes_given_nothing_but_the_registry_form_one_cluster_within_five_seconds(
    cluster: Clusters, count: int, election: str
) -> None:
    some = cluster(count, start=False, election=election)
    assert some.registry is not None
    some.registry.start()
    for node in some.nodes:
        node.spawn()
    for node in some.nodes:
        node.wait_listening()
    began_at = time.monotonic()
    some.wait_ready(timeout_s=5.0)
    one_cluster(some)
    assert time.monotonic() - began_at < 5.0
    assert {s["election"] for s in some.statuses().values()} == {election}


def test_nodes_started_at_the_same_instant_form_one_cluster_twenty_times_in_a_row(cluster: Clusters) -> None:
    three = cluster(3, start=False)
    clusters = set()
    for _ in range(20):
        three.start()
        one_cluster(three)
        clusters.add(three.nodes[0].status()["cluster"])
        for server in three.servers:
            server.wipe()
    assert len(clusters) == 20


def test_expect_holds_the_cluster_back_until_so_many_nodes_are_there(cluster: Clusters) -> None:
    three = cluster(3, start=False, expect=3)
    assert three.registry is not None
    three.registry.start()
    first, second, third = three.nodes
    first.start()
    second.start()
    three.wait(lambda: len(three.registry.ask(op="nodes")["nodes"]) == 2, what="two nodes are registered")  # type: ignore[union-attr]
    refused = first.ask(op="put", key="k", value=1, timeout=0.5)
    assert refused["error"] == "no_leader"
    assert [node.status()["cluster"] for node in (first, second)] == [None, None]
    third.start()
    three.wait_ready()
    one_cluster(three)
    founding = three.nodes[0].ask(op="log", **{"from": 1}, limit=1)["entries"][0]["config"]
    assert sorted(m["name"] for m in founding["members"]) == ["n1", "n2", "n3"]
    assert all(m["voter"] for m in founding["members"])


def test_a_node_without_a_registry_is_a_complete_database(cluster: Clusters) -> None:
    alone = cluster(1, registry=False)
    client = alone.client()
    rev = client.put("k", {"a": [1, None]}).rev
    alone.nodes[0].restart()
    item = client.get("k")
    assert item is not None and (item.value, item.rev) == ({"a": [1, None]}, rev)
    assert alone.nodes[0].status()["role"] == "leader"


def test_a_database_of_one_node_becomes_a_cluster_with_all_its_data(cluster: Clusters) -> None:
    three = cluster(1, registry=False)
    first = three.nodes[0]
    rev = first.ask(op="put", key="k", value="from when it was alone")["rev"]
    id = first.status()["cluster"]
    first.kill()
    three.registry = first.registry = RegistryServer("registry", three.directory / "registry")
    three.registry.start()
    first.start()
    three.wait(lambda: three.registry.ask(op="nodes")["cluster"] == id, what="the registry has learnt the cluster")  # type: ignore[union-attr]
    for _ in range(2):
        three.new_node().start()
    three.wait_ready(voters=3)
    one_cluster(three)
    for node in three.nodes:
        got = node.ask(op="get", key="k")
        assert (got["value"], got["rev"]) == ("from when it was alone", rev)
    first.kill()
    assert three.leader().ask(op="put", key="k", value="without the first")["ok"]


def test_nodes_that_listen_on_every_address_are_found_where_they_say(cluster: Clusters) -> None:
    three = cluster(3, start=False, hosts=["0.0.0.0"] * 3)
    with contextlib.ExitStack() as held:
        for node in three.nodes:  # the port must be known to be advertised
            taken = held.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            node.address = f"0.0.0.0:{taken.getsockname()[1]}"
            node.flags += ["--advertise", f"127.0.0.1:{node.port}"]
    three.start()
    one_cluster(three)
    assert {m["address"] for m in three.leader().status()["members"]} == {f"127.0.0.1:{n.port}" for n in three.nodes}
    three.leader().kill()
    assert three.leader().ask(op="put", key="k", value=1)["ok"]


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_nodes_form_a_cluster_over_ipv6(cluster: Clusters) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"there is no IPv6 loopback here: {error}")
    three = cluster(3, hosts=["::1"] * 3)
    one_cluster(three)
    assert three.leader().ask(op="put", key="k", value=1)["ok"]
    assert all(m["address"].startswith("[::1]:") for m in three.leader().status()["members"])


# Where requests run


def test_any_node_takes_any_request(cluster: Clusters) -> None:
    three = cluster(3)
    leader = three.leader()
    for n, node in enumerate(three.nodes):
        put = node.ask(op="put", key=f"k{n}", value=n)
        assert put["ok"] and put.get("leader") == (None if node is leader else leader.address)
        for other in three.nodes:  # at once, at every node: that's what linearizable means
            got = other.ask(op="get", key=f"k{n}")
            assert (got["value"], got["rev"]) == (n, put["rev"]), (node, other, got)
            assert got.get("leader") == (None if other is leader else leader.address)
            assert other.ask(op="count")["count"] == n + 1
    assert leader.ask(op="put", key="k", value=1, forward=False)["ok"]
    follower = three.followers()[0]
    refused = follower.ask(op="put", key="k", value=2, forward=False)
    assert (refused["error"], refused["leader"]) == ("not_leader", leader.address)
    assert follower.ask(op="get", key="k")["value"] == 1


def test_a_stale_read_says_how_old_it_may_be(cluster: Clusters) -> None:
    three = cluster(3)
    assert three.leader().ask(op="put", key="k", value=1)["ok"]
    three.wait_equal()
    assert three.leader().ask(op="get", key="k", read="stale")["lag"] == 0
    alone = three.followers()[0]
    assert 0 <= alone.ask(op="get", key="k", read="stale", max_lag=2)["lag"] < 2
    for node in three.nodes:
        if node is not alone:
            node.kill()
    lagging = three.wait(
        lambda: (r := alone.ask(op="get", key="k", read="stale")) and r["lag"] > 0.3 and r, what="its lag grows"
    )
    assert lagging["value"] == 1
    assert alone.ask(op="get", key="k", read="stale", max_lag=0.1)["error"] == "no_leader"
    assert alone.ask(op="get", key="k", timeout=0.3)["error"] == "no_leader"


def test_status_and_members_tell_what_is(cluster: Clusters) -> None:
    three = cluster(3)
    leader = three.leader()
    three.wait_equal()
    for node in three.nodes:
        status = node.status()
        assert (status["node"], status["address"]) == (node.name, node.address)
        assert status["role"] == ("leader" if node is leader else "follower")
        assert status["leader"] == {"name": leader.name, "address": leader.address}
        assert {(m["name"], m["address"], m["role"]) for m in status["members"]} == {
            (n.name, n.address, "voter") for n in three.nodes
        }
        log = status["log"]
        assert log["first"] == 1 and log["last"] >= log["commit"] >= log["applied"] > 0
        members = node.ask(op="members")["members"]  # a follower asks the leader
        assert all(m["alive"] and m["last_heard"] < 2 and m["match"] > 0 for m in members), members
    victim = three.followers()[0]
    victim.kill()
    three.wait(lambda: not member(leader, victim.name)["alive"], what="the leader sees that it is dead")
    assert member(leader, victim.name)["last_heard"] >= 2


def member(asked: NodeServer, name: str) -> dict[str, object]:
    """The member called `name` as `asked` shows it. Raises LookupError."""
    return next(iter([m for m in asked.ask(op="members")["members"] if m["name"] == name] or {}[name]))


def voters(asked: NodeServer) -> set[str]:
    """The names of the voters, as `asked` knows them."""
    return {m["name"] for m in asked.status()["members"] if m["role"] == "voter"}


# Leadership and membership by hand


@pytest.mark.parametrize("election", ["bully", "raft"])
def test_leadership_goes_where_it_is_sent(cluster: Clusters, election: str) -> None:
    three = cluster(3, election=election)
    for target in (*three.followers(), three.leader()):
        asked = three.followers()[0]  # which passes it on
        assert asked.ask(op="transfer", to=target.name)["name"] == target.name
        assert three.leader() is target
    anybody = three.leader().ask(op="transfer")
    assert anybody["ok"] and anybody["name"] == three.leader().name
    assert three.leader().ask(op="transfer", to="nobody")["error"] == "bad_request"
    dead = three.followers()[0]
    dead.kill()
    three.wait(lambda: not member(three.leader(), dead.name)["alive"], what="the leader sees that it is dead")
    assert three.leader().ask(op="transfer", to=dead.name)["error"] == "bad_request"


@pytest.mark.parametrize("whom", ["a follower", "the leader"])
def test_a_removed_member_ends_and_is_refused_for_good(cluster: Clusters, whom: str) -> None:
    four = cluster(4)
    removed = four.leader() if whom == "the leader" else four.followers()[0]
    asked = next(node for node in four.nodes if node is not removed)
    with Load(four, nodes=[n for n in four.nodes if n is not removed]) as load:
        reply = asked.ask(op="member_remove", name=removed.name)
        assert reply["ok"] and reply["rev"] > 0
        four.wait(lambda: not removed.alive, what="the removed node ends")
        assert_one_sentence(removed, "was removed from its cluster")
        load.wait_for(10, since_s=time.monotonic())
    rest = four.wait_ready(voters=3)
    assert removed.name not in voters(rest)
    removed.spawn()  # the same data directory, the same id: refused again
    four.wait(lambda: not removed.alive, what="the removed node ends")
    assert_one_sentence(removed, "was removed from its cluster")
    assert voters(rest) == {n.name for n in four.running}
    removed.wipe()
    removed.start()  # a new member under the old name
    four.wait_ready(voters=4)
    four.wait_equal()
    load.check(four.nodes)


def assert_one_sentence(node: NodeServer, words: str) -> None:
    """The node has ended with exit code 1 and one line that holds `words`, without a traceback."""
    assert node.wait_ended() == 1, node.log
    assert "Traceback" not in node.log, node.log
    assert len([line for line in node.log.splitlines() if words in line]) == 1, node.log


def test_the_last_majority_can_not_be_removed(cluster: Clusters) -> None:
    three = cluster(3)
    leader, (living, dead) = three.leader(), three.followers()
    dead.kill()
    three.wait(lambda: not member(leader, dead.name)["alive"], what="the leader sees that it is dead")
    refused = leader.ask(op="member_remove", name=living.name)
    assert refused["error"] == "bad_request" and "majority" in refused["message"]
    assert leader.ask(op="member_remove", name=dead.name)["ok"]
    three.wait_ready(voters=2)
    assert leader.ask(op="put", key="k", value=1)["ok"]


# Members that come, go, and come back otherwise


def test_a_fourth_node_with_an_empty_directory_becomes_a_voter_by_itself_and_serves_all_data(
    cluster: Clusters,
) -> None:
    three = cluster(3, checkpoint_every=200, retain=50)
    with Load(three, writers=8) as load:
        load.wait_for(1000, timeout_s=30)
        fourth = three.new_node()
        fourth.start()
        three.wait_ready(voters=4)
    three.wait_equal()
    load.check(three.nodes)
    assert fourth.ask(op="count", prefix="load/")["count"] == len(load.acknowledged())
    assert len({s["digest"] for s in three.statuses().values()}) == 1


def test_a_long_dead_voter_gives_way_to_a_newcomer(cluster: Clusters) -> None:
    three = cluster(3, replace_after=1)
    assert three.leader().ask(op="put", key="k", value=1)["ok"]
    dead = three.followers()[0]
    dead.kill()
    three.wait(lambda: member(three.leader(), dead.name)["last_heard"] > 1, what="it has been dead for a second")  # type: ignore[operator]
    assert dead.name in voters(three.leader()), "nobody is given up while nobody stands ready"
    newcomer = three.new_node()
    newcomer.start()
    three.wait(lambda: voters(three.leader()) == {n.name for n in three.running}, what="the two have changed places")
    assert newcomer.ask(op="get", key="k")["value"] == 1
    dead.spawn()
    three.wait(lambda: not dead.alive, what="the node that was given up ends")
    assert_one_sentence(dead, "was removed from its cluster")


def test_a_cluster_outlives_all_its_first_members(cluster: Clusters) -> None:
    three = cluster(3, replace_after=1, checkpoint_every=100, retain=10)
    first = list(three.nodes)
    with Load(three) as load:
        for dead in first:
            three.wait_ready(voters=3)
            load.wait_for(100, since_s=time.monotonic())
            dead.kill()
            three.new_node().start()
            three.wait(lambda: voters(three.leader()) == {n.name for n in three.running}, what="it has taken the place")
    three.wait_ready()
    three.wait_equal()
    assert {n.name for n in three.running} == {"n4", "n5", "n6"}
    load.check(three.running)


def test_a_wiped_node_under_its_old_name_is_a_new_member(cluster: Clusters) -> None:
    three = cluster(3, replace_after=1)
    client = three.client()
    client.put("k", 1)
    wiped = three.followers()[0]
    old_id = wiped.status()["id"]
    wiped.wipe()
    wiped.start()
    new_id = wiped.status()["id"]
    assert new_id != old_id

    def swapped() -> bool:
        members = three.leader().status()["members"]
        return [(m["id"], m["role"]) for m in members if m["name"] == wiped.name] == [(new_id, "voter")]

    three.wait(swapped, what="the new member has the old one's place")
    assert wiped.ask(op="get", key="k")["value"] == 1
    # Its promises count: with it alone, the leader has a majority.
    next(node for node in three.followers() if node is not wiped).kill()
    assert client.put("k", 2).rev > 0


def test_a_node_that_returns_on_another_port_is_found_again(cluster: Clusters) -> None:
    three = cluster(3)
    moved = three.followers()[0]
    before = moved.address
    moved.kill()
    moved.address = f"{moved.host}:0"
    moved.start()
    assert moved.address != before
    three.wait(lambda: member(three.leader(), moved.name)["address"] == moved.address, what="the new address is known")
    three.wait_ready()
    assert moved.ask(op="put", key="k", value=1)["ok"]
    three.wait_equal()


def test_all_nodes_may_move_at_once(cluster: Clusters) -> None:
    three = cluster(3)
    three.client().put("k", 1)
    for node in three.nodes:
        node.kill()
        node.address = f"{node.host}:0"
    three.start_nodes()
    leader = three.wait_ready()
    assert leader.ask(op="get", key="k")["value"] == 1
    three.wait(
        lambda: {m["address"] for m in leader.status()["members"]} == {n.address for n in three.nodes},
        what="the configuration has the new addresses",
    )


def test_nodes_of_two_clusters_keep_apart(cluster: Clusters) -> None:
    ours, theirs = cluster(3), cluster(1)
    stranger = theirs.nodes[0]
    their_id = stranger.status()["cluster"]
    stranger.kill()
    stranger.registry = ours.registry  # somebody has given it the wrong one
    stranger.start()
    ours.wait(lambda: "not the registry of this node" in stranger.log, what="the stranger says why it can't register")
    assert "Traceback" not in stranger.log
    assert stranger.status()["cluster"] == their_id
    assert stranger.ask(op="put", key="k", value="theirs")["ok"], "its own cluster, of one, goes on"
    assert voters(ours.leader()) == {"n1", "n2", "n3"}
    our_id = ours.leader().status()["cluster"]
    introduction = {"op": "peer", "to": ours.nodes[0].status()["id"], "id": "x", "name": "x", "cluster": their_id}
    with socket.create_connection(("127.0.0.1", ours.nodes[0].port), timeout=2.0) as connection:
        assert exchange(connection, {**introduction, "address": "127.0.0.1:1"})["error"] == "wrong_cluster"
    assert our_id != their_id


def test_the_clusters_election_wins_over_a_nodes_own(cluster: Clusters) -> None:
    three = cluster(1, election="raft")
    for _ in range(2):
        node = three.new_node()
        node.flags = ["--election", "bully"]
        node.start()
    three.wait_ready(voters=3)
    three.wait(lambda: {s["election"] for s in three.statuses().values()} == {"raft"}, what="all elect alike")
    three.leader().kill()
    assert three.leader().ask(op="put", key="k", value=1)["ok"]
    for node in three.nodes:
        node.restart()
    three.wait_ready()
    assert {s["election"] for s in three.statuses().values()} == {"raft"}


def test_the_same_log_gives_the_same_rows_on_every_node(cluster: Clusters) -> None:
    three = cluster(3)
    client = three.client()
    client.put("a", 1)
    client.incr("a", 41)
    client.batch([{"op": "put", "key": f"b{n}", "value": n} for n in range(50)])
    client.txn({"key": "a", "value": 42}, [{"op": "delete", "key": "b7"}, {"op": "put", "key": "c", "value": "Ø\n"}])
    client.put("a", "no", if_={"key": "a", "rev": 1})
    three.wait_equal()
    first, *others = (json.dumps(rows(node), sort_keys=True) for node in three.nodes)
    assert set(others) == {first}
    assert len(json.loads(first)) == 51
