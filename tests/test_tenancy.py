"""Sessions and leases through the death of processes: real nodes on loopback."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.alone import node_alone
from tests.harness import Cluster, NodeServer, wait
from tests.proving import State, times
from tests.talk import Talk, frame

Clusters = Callable[..., Cluster]
TTL_S = 1.5
REPEATED = times(20)
SLACK_S = 1.0  # after its ttl, a lease must be gone within this


def insist(nodes: list[NodeServer], **request: Any) -> dict[str, Any]:
    """Send the same request to one node after the other until one gives an answer that settles it."""
    replies: list[object] = []

    def settled() -> dict[str, Any] | None:
        for node in nodes:
            try:
                reply = node.ask(**request)
            except OSError as error:
                replies.append(error)
                continue
            if reply["ok"] or reply["error"] not in (
                "no_leader",
                "not_leader",
                "timeout",
                "overloaded",
                "shutting_down",
            ):
                return reply
            replies.append(reply)
        return None

    found = wait(settled, 15.0, f"an answer to {request}")
    assert found is not None
    return {name: value for name, value in found.items() if name not in ("leader", "id")}


def found(node: NodeServer, key: str) -> bool:
    return bool(node.ask(op="get", key=key)["found"])


def gone_after(node: NodeServer, key: str, since: float, timeout_s: float = 10.0) -> float:
    """Wait until `node` has `key` no more; how many seconds after `since` that was seen, and asked for, at the earliest."""
    asked_s = 0.0

    def gone() -> bool:
        nonlocal asked_s
        asked_s = time.monotonic() - since
        return not found(node, key)

    wait(gone, timeout_s, f"{key} is gone")
    return asked_s


# ---------------------------------------------------------------- sessions


def test_a_write_sent_again_to_another_node_after_the_leader_s_death_gets_its_first_reply(cluster: Clusters) -> None:
    three = cluster(3)
    leader = three.wait_ready()
    client = leader.ask(op="session_open")["client"]
    firsts = {seq: insist([leader], op="incr", key="n", client=client, seq=seq) for seq in range(1, 6)}
    assert [first["value"] for first in firsts.values()] == [1, 2, 3, 4, 5]
    leader.kill()
    others = three.running
    for seq, first in firsts.items():
        for node in others:
            assert insist([node], op="incr", key="n", client=client, seq=seq) == first
    assert insist(others, op="incr", key="n", client=client, seq=6)["value"] == 6


def test_a_write_whose_reply_the_leader_s_death_took_is_done_once_however_often_it_is_sent(cluster: Clusters) -> None:
    three = cluster(3)
    client = three.wait_ready().ask(op="session_open")["client"]
    acknowledged = 0
    for seq in range(1, 13):
        leader = three.wait_ready()
        if seq % 3 == 0:
            leader.stop_signal()  # frozen with the request in its socket
            with contextlib.suppress(OSError):
                leader.ask(0.05, op="incr", key="n", client=client, seq=seq)
            leader.kill()
        reply = insist(three.running, op="incr", key="n", client=client, seq=seq)
        assert reply["value"] == seq
        assert insist(three.running[::-1], op="incr", key="n", client=client, seq=seq) == reply
        acknowledged += 1
        three.start_nodes()
    assert insist(three.nodes, op="get", key="n")["value"] == acknowledged
    three.wait_ready()
    three.wait_equal()


def test_sessions_and_leases_survive_the_restart_of_all_nodes_with_and_without_a_snapshot(cluster: Clusters) -> None:
    three = cluster(3)
    leader = three.wait_ready()
    client = leader.ask(op="session_open")["client"]
    lease = leader.ask(op="lease_grant", ttl=600)["lease"]
    first = insist([leader], op="incr", key="n", client=client, seq=1)
    for node in three.nodes:
        assert node.ask(5.0, op="snapshot")["ok"]
    insist([leader], op="put", key="k", value=1, lease=lease)
    second = insist([leader], op="incr", key="n", client=client, seq=2)
    for node in three.nodes:
        node.kill()
    three.start_nodes()
    three.wait_ready()
    for node in three.nodes:
        assert insist([node], op="incr", key="n", client=client, seq=1) == first
        assert insist([node], op="incr", key="n", client=client, seq=2) == second
    (entry,) = insist([three.leader()], op="lease_list")["leases"]
    assert (entry["lease"], entry["ttl"], entry["keys"]) == (lease, 600, 1) and entry["remaining"] > 590
    assert insist(three.nodes, op="lease_revoke", lease=lease)["deleted"] == 1
    three.wait_equal()


def test_a_node_that_was_sent_a_snapshot_knows_the_sessions_and_leases_in_it(cluster: Clusters) -> None:
    three = cluster(3, checkpoint_every=50, retain=10)
    leader = three.wait_ready()
    client = leader.ask(op="session_open")["client"]
    lease = leader.ask(op="lease_grant", ttl=600)["lease"]
    insist([leader], op="put", key="k", value=1, lease=lease)
    first = insist([leader], op="incr", key="n", client=client, seq=1)
    lost = three.followers()[0]
    lost.kill()
    for number in range(200):
        insist([leader], op="put", key=f"fill{number}", value=number)
    assert leader.ask(5.0, op="snapshot")["ok"]
    lost.start()
    three.wait(lambda: "installed the snapshot" in lost.log, what="it installs a snapshot")
    three.wait_ready()
    three.wait_equal()
    # Now let it lead: it must remember what only the snapshot told it.
    assert insist(three.nodes, op="transfer", to=lost.name)["ok"]
    assert insist([lost], op="incr", key="n", client=client, seq=1) == first
    assert insist([lost], op="lease_keepalive", lease=lease)["ok"]
    assert insist([lost], op="lease_revoke", lease=lease)["deleted"] == 1


# ------------------------------------------------------------------ leases


@pytest.mark.proof
@pytest.mark.parametrize("repetition", REPEATED)
@pytest.mark.parametrize("asked_node", ["leader", "follower"])
def test_a_lease_ends_within_a_second_of_its_ttl_and_never_before(
    cluster: Clusters, asked_node: str, repetition: int, record_property: State
) -> None:
    three = cluster(3)
    leader = three.wait_ready()
    at = leader if asked_node == "leader" else three.followers()[0]
    lease = insist([at], op="lease_grant", ttl=TTL_S)["lease"]
    insist([at], op="put", key="k", value=1, lease=lease)
    for _ in range(3):
        asked = time.monotonic()
        assert insist([at], op="lease_keepalive", lease=lease)["ttl"] == TTL_S
        wait(lambda due=asked + 1.0: time.monotonic() >= due)
        assert found(leader, "k")
    asked = time.monotonic()
    insist([at], op="lease_keepalive", lease=lease)
    answered = time.monotonic()
    gone_s = gone_after(at, "k", asked)
    record_property("seconds from the last keep-alive to the end", round(gone_s, 3))
    assert TTL_S <= gone_s <= TTL_S + SLACK_S + (answered - asked)
    reply = insist([at], op="lease_keepalive", lease=lease)
    assert (reply["error"], reply["lease"]) == ("bad_request", lease)


@pytest.mark.proof
@pytest.mark.parametrize("repetition", REPEATED)
def test_a_lease_lives_through_the_leader_s_death_and_then_for_its_ttl(
    cluster: Clusters, repetition: int, record_property: State
) -> None:
    three = cluster(3)
    leader = three.wait_ready()
    lease = insist([leader], op="lease_grant", ttl=TTL_S)["lease"]
    insist([leader], op="put", key="k", value=1, lease=lease)
    asked = time.monotonic()
    insist([leader], op="lease_keepalive", lease=lease)
    leader.kill()
    three.wait(lambda: three.leader() is not leader)
    led = time.monotonic()
    gone_s = gone_after(three.running[0], "k", asked)
    record_property("seconds from the last keep-alive to the end", round(gone_s, 3))
    record_property("from the new leader to it", round(gone_s - (led - asked), 3))
    assert gone_s >= TTL_S
    assert gone_s <= led - asked + TTL_S + SLACK_S


@pytest.mark.proof
@pytest.mark.parametrize("repetition", REPEATED)
def test_a_leader_that_was_frozen_ends_no_lease_that_was_kept_alive_meanwhile(
    cluster: Clusters, repetition: int, record_property: State
) -> None:
    """It wakes up with every deadline long passed. What it proposes then, no majority follows."""
    three = cluster(3)
    leader = three.wait_ready()
    lease = insist([leader], op="lease_grant", ttl=TTL_S)["lease"]
    insist([leader], op="put", key="k", value=1, lease=lease)
    leader.stop_signal()
    others = [node for node in three.nodes if node is not leader]
    three.wait(lambda: three.find_leader() not in (None, leader), what="another leader")
    kept = 0.0
    frozen = time.monotonic()
    while time.monotonic() - frozen < 2 * TTL_S:
        kept = time.monotonic()
        assert insist(others, op="lease_keepalive", lease=lease)["ok"]
        wait(lambda due=kept + TTL_S / 3: time.monotonic() >= due)
    leader.cont()
    for _ in range(4):
        kept = time.monotonic()
        assert insist(others, op="lease_keepalive", lease=lease)["ok"]
        assert insist(others, op="get", key="k")["found"]
        wait(lambda due=kept + TTL_S / 3: time.monotonic() >= due)
    gone_s = gone_after(others[0], "k", kept)
    record_property("seconds from the last keep-alive to the end", round(gone_s, 3))
    assert TTL_S <= gone_s <= TTL_S + SLACK_S


@pytest.mark.proof
@pytest.mark.parametrize("repetition", REPEATED)
def test_a_short_pause_of_the_only_leader_ends_no_lease_whose_keepalive_waits_in_its_socket(
    tmp_path: Path, repetition: int
) -> None:
    with node_alone(tmp_path) as node:
        lease = node.ask(op="lease_grant", ttl=0.5)["lease"]
        node.ask(op="put", key="k", value=1, lease=lease)
        with Talk(node.address) as talk:
            assert talk.ask(op="lease_keepalive", lease=lease)["ok"]
            node.stop_signal()
            stopped = time.monotonic()
            talk.send(frame({"op": "lease_keepalive", "lease": lease}))
            wait(lambda: time.monotonic() - stopped > 1.5)
            node.cont()
            assert talk.reply()["ok"]
        assert found(node, "k")
        assert gone_after(node, "k", stopped) >= 2.0


def test_pipelined_requests_see_the_leases_before_them(tmp_path: Path) -> None:
    with node_alone(tmp_path) as node, Talk(node.address) as talk:
        for _ in range(20):
            talk.send(frame({"op": "lease_grant", "ttl": 100}))
            talk.send(frame({"op": "lease_list"}))
        for number in range(1, 21):
            assert talk.reply()["ok"]
            assert len(talk.reply()["leases"]) == number
