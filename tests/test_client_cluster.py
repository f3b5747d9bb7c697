"""The client and real nodes understand one another, and the client outlives any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddb import connect, errors
from ddb.client import Client, Item, next_page
from tests.harness import Cluster, ask


@pytest.fixture
def db(alone: Cluster) -> Iterator[Client]:
    with connect(alone.addresses) as client:
        yield client


def test_what_is_put_is_got_until_it_is_deleted(db: Client) -> None:
    first = db.put("a", {"x": [1, None, "ø"]})
    second = db.put("a", b"\x00\xff")
    assert (first.version, second.version) == (1, 2) and second.rev > first.rev
    assert db.get("a") == Item("a", b"\x00\xff", second.rev, first.rev, 2)
    assert db.get("a", read="stale", max_lag_s=5) == db.get("a")
    gone = db.delete("a")
    assert gone.deleted == 1 and gone.rev > second.rev
    assert db.get("a") is None and db.delete("a").deleted == 0


def test_a_condition_decides_and_shows_what_is_there(db: Client) -> None:
    rev = db.put("c", 1, if_={"exists": False}).rev
    refused = db.put("c", 2, if_=[{"rev": rev}, {"value": 5}])
    assert (refused.applied, refused.found, refused.value, refused.rev) == (False, True, 1, rev)
    assert db.put("c", 2, if_=[{"rev": rev}, {"value": 1.0}]).applied
    assert not db.delete("c", if_={"key": "other", "exists": True}).applied
    assert db.delete("c", if_={"value": 1, "op": ">"}).deleted == 1


def test_ranges_are_scanned_counted_and_paged(db: Client) -> None:
    db.batch([{"op": "put", "key": f"r/{n:04}", "value": n} for n in range(2500)])
    assert db.count("r/") == 2500 and db.count(start="r/0010", end="r/0020") == 10
    page = db.scan("r/", limit=2, reverse=True)
    assert [(i.key, i.value) for i in page] == [("r/2499", 2499), ("r/2498", 2498)] and page.more
    assert [i.value for i in db.scan("r/", keys_only=True, limit=1)] == [None]
    assert [i.value for i in db.scan_all("r/")] == list(range(2500))


def test_paging_goes_on_behind_the_longest_key_there_can_be(db: Client) -> None:
    keys = ["y" * 4096, "y" * 4095 + "z", "z"]
    db.batch([{"op": "put", "key": key, "value": 1} for key in keys])
    request: dict[str, Any] = {"op": "scan", "start": "y", "limit": 1}
    found = []
    for _ in keys:
        (item,) = db.call(request)["items"]
        found.append(item["key"])
        request = next_page(request, item["key"])
    assert found == keys


def test_counters_and_transactions(db: Client) -> None:
    assert [db.incr("n").value, db.incr("n", -5).value] == [1, -4]
    db.put("text", "x")
    with pytest.raises(errors.BadRequest, match="not an integer"):
        db.incr("text")
    done = db.txn(
        {"key": "n", "value": -4},
        then=[{"op": "put", "key": "m", "value": b"raw"}, {"op": "get", "key": "m"}],
        else_=[{"op": "get", "key": "n"}],
    )
    assert done.succeeded and done.results[1]["value"] == b"raw" and done.results[1]["rev"] == done.rev
    assert not db.txn({"key": "n", "exists": False}).succeeded


def test_questions_about_the_node_and_the_cluster(db: Client, alone: Cluster) -> None:
    address = alone.nodes[0].address
    assert db.ping()["node"] == "n1"
    assert db.status(at=address)["role"] == "leader"
    (member,) = db.members()
    assert (member.name, member.address, member.role, member.alive) == ("n1", address, "voter", True)
    rev = db.put("k", "v").rev
    assert db.log(rev, 1)[0]["command"] == ["put", "k", "v"]
    assert db.snapshot() >= rev


def test_errors_come_as_their_class(db: Client) -> None:
    with pytest.raises(errors.BadRequest):
        db.put("", 1)
    with pytest.raises(errors.TooLarge):
        db.put("k" * 5000, 1)
    with pytest.raises(errors.BadRequest):
        db.call({"op": "frobnicate"})


def test_one_address_is_enough_to_outlive_every_leader(cluster: Callable[..., Cluster]) -> None:
    """Each node is killed in turn and comes back; the client, told of the first alone, loses nothing it was promised."""
    three = cluster(3)
    kept: dict[str, int] = {}
    with connect(three.nodes[0].address, timeout_s=15) as db:
        for round_number in range(3):
            for n in range(20):
                key = f"{round_number}/{n}"
                kept[key] = db.put(key, n).rev
            leader = three.leader()
            leader.kill()
            kept[f"{round_number}/after"] = db.put(f"{round_number}/after", 1).rev
            assert {item.key: item.rev for item in db.scan_all()} == kept
            leader.start()
            three.wait_ready()
        assert set(db.servers) == {node.address for node in three.nodes}


def test_a_leader_that_leaves_costs_no_request(cluster: Callable[..., Cluster]) -> None:
    three = cluster(3)
    with connect(three.addresses, timeout_s=10) as db:
        for _ in range(10):
            db.incr("n")
        leader = three.leader()
        leader.ask_to_leave()
        value = 10
        while leader.alive or value < 200:
            value += 1
            assert db.incr("n").value == value
        assert leader.term() == 0


def test_the_registry_is_enough_to_find_the_cluster(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    two = cluster(2)
    assert two.registry is not None
    with connect(registry=two.registry.address) as db:
        db.put("k", "v")
        two.registry.kill()
        assert db.get("k") is not None
    assert len(ask(two.nodes[0].address, op="members")["members"]) == 2
