"""What docs/protocol.md says of sessions and leases, sentence by sentence, asked of a running node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import NodeServer
from tests.talk import Talk, frame, http
from tests.test_protocol import Ask, ask, failed, node, ok, p

__all__ = ["ask", "node", "p"]  # the fixtures


@pytest.fixture
def lease(ask: Ask) -> Iterator[int]:
    """A lease, revoked in the end."""
    number = ok(ask(op="lease_grant", ttl=600))["lease"]
    yield number
    ask(op="lease_revoke", lease=number)


@pytest.fixture
def client(ask: Ask) -> Iterator[int]:
    """A session, closed in the end."""
    number = ok(ask(op="session_open"))["client"]
    yield number
    ask(op="session_close", client=number)


def test_a_session_says_who_it_is_and_where_it_began(ask: Ask) -> None:
    reply = ok(ask(op="session_open", id="x"))
    assert reply["client"] == reply["rev"] and reply["id"] == "x"
    assert ok(ask(op="session_close", client=reply["client"]))["closed"] == 1
    assert ok(ask(op="session_close", client=reply["client"]))["closed"] == 0


def test_the_same_seq_gets_the_same_reply_in_every_dialect_and_with_any_id(
    ask: Ask, node: NodeServer, client: int, p: str
) -> None:
    request = {"op": "incr", "key": p + "n", "client": client, "seq": 1}
    first = ok(ask(**request))
    assert ask(**request) == first
    assert ask(**request, id=5) == {**first, "id": 5}
    with Talk(node.address) as lines:
        assert json.loads(lines.send(json.dumps(request).encode() + b"\n").line()) == first
    with Talk(node.address) as web:
        assert web.send(http("POST", "/rpc", json.dumps(request).encode())).response("POST").json == first
    assert ok(ask(op="get", key=p + "n"))["value"] == 1


def test_writes_of_a_session_may_be_pipelined_and_repeated_at_once(node: NodeServer, client: int, p: str) -> None:
    with Talk(node.address) as talk:
        for seq in [*range(1, 41), *range(1, 41)]:
            talk.send(frame({"op": "incr", "key": p, "client": client, "seq": seq}))
        replies = [talk.reply() for _ in range(80)]
    assert [reply["value"] for reply in replies[:40]] == list(range(1, 41))
    assert replies[40:] == replies[:40]


def test_a_session_that_is_not_there_is_expired_in_every_write(ask: Ask, node: NodeServer, p: str) -> None:
    numbered = {"client": 999_999_999, "seq": 1}
    for request in (
        {"op": "put", "key": p, "value": 1},
        {"op": "delete", "key": p},
        {"op": "incr", "key": p},
        {"op": "batch", "ops": []},
        {"op": "txn"},
        {"op": "lease_grant", "ttl": 1},
        {"op": "lease_revoke", "lease": 1},
    ):
        failed(ask(**request, **numbered), "session_expired")
    with Talk(node.address) as web:
        body = json.dumps({"op": "incr", "key": p, **numbered}).encode()
        assert web.send(http("POST", "/rpc", body)).response("POST").status == 409


@pytest.mark.parametrize(
    "fields",
    [{"client": 1}, {"seq": 1}, {"client": "1", "seq": 1}, {"client": 1, "seq": -1}, {"client": 1.0, "seq": 1}],
)
def test_half_a_session_or_a_wrong_one_is_refused(ask: Ask, p: str, fields: dict[str, Any]) -> None:
    for request in (
        {"op": "put", "key": p, "value": 1},
        {"op": "delete", "key": p},
        {"op": "incr", "key": p},
        {"op": "batch", "ops": []},
        {"op": "txn"},
        {"op": "lease_grant", "ttl": 1},
    ):
        failed(ask(**request, **fields), "bad_request")
    assert ok(ask(op="get", key=p))["found"] is False


def test_a_lease_says_its_number_and_its_ttl(ask: Ask) -> None:
    reply = ok(ask(op="lease_grant", ttl=2.5))
    assert reply["lease"] == reply["rev"] and reply["ttl"] == 2.5
    assert ok(ask(op="lease_keepalive", lease=reply["lease"])) == {"ok": True, "lease": reply["lease"], "ttl": 2.5}
    assert ok(ask(op="lease_revoke", lease=reply["lease"]))["deleted"] == 0


@pytest.mark.parametrize("op", ["lease_keepalive", "lease_revoke", "lease_list", "put"])
def test_a_lease_that_is_not_there_is_named_in_the_failure(ask: Ask, p: str, op: str) -> None:
    reply = ask(op=op, lease=77_777_777, key=p, value=1)
    assert "77777777" in failed(reply, "bad_request") and reply["lease"] == 77_777_777


@pytest.mark.parametrize("wrong", [0, -1, "1", 1.5, True, [], {}, 2**53 + 1])
@pytest.mark.parametrize("op", ["lease_keepalive", "lease_revoke", "lease_list", "put"])
def test_what_is_no_number_of_a_lease_is_refused(ask: Ask, p: str, op: str, wrong: object) -> None:
    assert "lease" in failed(ask(op=op, lease=wrong, key=p, value=1), "bad_request")


def test_one_lease_is_listed_with_its_keys(ask: Ask, lease: int, p: str) -> None:
    for name in "ba":
        ok(ask(op="put", key=p + name, value=1, lease=lease))
    reply = ok(ask(op="lease_list", lease=lease))
    (entry,) = reply["leases"]
    assert (entry["lease"], entry["ttl"], entry["keys"], entry["attached"]) == (lease, 600, 2, [p + "a", p + "b"])
    assert 590 < entry["remaining"] <= 600 and reply["more"] is False


def test_leases_are_listed_in_pages(ask: Ask) -> None:
    granted = [ok(ask(op="lease_grant", ttl=600))["lease"] for _ in range(5)]
    page = ok(ask(op="lease_list", **{"from": granted[1]}, limit=2))
    assert [entry["lease"] for entry in page["leases"]] == granted[1:3] and page["more"] is True
    page = ok(ask(op="lease_list", **{"from": granted[3]}, limit=2))
    assert [entry["lease"] for entry in page["leases"]] == granted[3:5] and page["more"] is False
    for number in granted:
        ok(ask(op="lease_revoke", lease=number))


@pytest.mark.parametrize("fields", [{"limit": 0}, {"limit": 10_001}, {"limit": "9"}, {"from": -1}, {"from": "a"}])
def test_a_wrong_page_is_refused(ask: Ask, fields: dict[str, Any]) -> None:
    failed(ask(op="lease_list", **fields), "bad_request")


def test_a_list_shows_the_grant_before_it_on_its_connection(node: NodeServer) -> None:
    with Talk(node.address) as talk:
        talk.send(frame({"op": "lease_grant", "ttl": 600}), frame({"op": "lease_list", "limit": 10_000}))
        granted = talk.reply()["lease"]
        assert granted in [entry["lease"] for entry in talk.reply()["leases"]]
        talk.send(frame({"op": "lease_revoke", "lease": granted}), frame({"op": "lease_keepalive", "lease": granted}))
        assert talk.reply()["ok"] is True
        assert talk.reply()["lease"] == granted


def test_status_counts_sessions_and_leases(ask: Ask, client: int, lease: int) -> None:
    before = ok(ask(op="status"))
    other = ok(ask(op="lease_grant", ttl=600))["lease"]
    after = ok(ask(op="status"))
    assert (after["leases"], after["sessions"]) == (before["leases"] + 1, before["sessions"])
    assert before["sessions"] >= 1 and before["leases"] >= 1
    ask(op="lease_revoke", lease=other)


def test_http_puts_and_deletes_take_a_session_and_a_lease(
    node: NodeServer, ask: Ask, client: int, lease: int, p: str
) -> None:
    key = p.replace("/", "")
    with Talk(node.address) as web:
        target = f"/kv/{key}?lease={lease}&client={client}&seq=1"
        first = web.send(http("PUT", target, b"here")).response("PUT")
        assert first.status == 201
        assert web.send(http("PUT", target, b"there")).response("PUT").json == first.json
        assert ok(ask(op="lease_list", lease=lease))["leases"][0]["attached"] == [key]
        assert web.send(http("DELETE", f"/kv/{key}?client={client}&seq=2")).response("DELETE").status == 204
        assert web.send(http("DELETE", f"/kv/{key}?client={client}&seq=2")).response("DELETE").status == 204
        assert web.send(http("DELETE", f"/kv/{key}")).response("DELETE").status == 404
        assert web.send(http("PUT", f"/kv/{key}?lease=x", b"here")).response("PUT").status == 400
        assert web.send(http("DELETE", f"/kv/{key}?lease={lease}")).response("DELETE").status == 400
