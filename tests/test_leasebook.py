"""What leases are to the state machine: keys that hang on them, and go with them in one entry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import leasebook
from ddb.kv import Change
from ddb.messages import Batch
from tests.test_kv import batch_of
from tests.test_sessions import Clients, whole_digest


@pytest.fixture
def db() -> Iterator[Clients]:
    db = Clients()
    yield db
    assert whole_digest(db.table) == db.table.digest


def grant(db: Clients, ttl: float = 5) -> int:
    return int(db.ask("lease_grant", ttl=ttl)["lease"])


def keys(db: Clients) -> list[str]:
    return [key for key, _ in db.table.rows()]


@pytest.mark.parametrize(
    ("asked", "ttl_ms", "told"),
    [(5, 5000, 5), (0.001, 1, 0.001), (1.5, 1500, 1.5), (0.0015, 2, 0.002), (0.3, 300, 0.3), (31536000, 31536000000, 31536000)],
)  # fmt: skip
def test_a_lease_has_its_ttl_in_milliseconds_never_less_than_asked(
    db: Clients, asked: float, ttl_ms: int, told: float
) -> None:
    reply = db.ask("lease_grant", ttl=asked)
    assert reply["lease"] == reply["rev"] == db.machine.applied
    assert reply["ttl"] == told and db.machine.leases.ttl_ms[reply["lease"]] == ttl_ms


def test_revoking_deletes_the_attached_keys_and_no_others(db: Clients) -> None:
    lease, other = grant(db), grant(db)
    for key, of in (("b", lease), ("a", lease), ("c", other), ("d", None)):
        db.ask("put", key=key, value=1, lease=of)
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 2
    assert keys(db) == ["c", "d"]
    assert db.table.ledger.records == {f"lease/{other}": b"5000", "leased/c": b"%d" % other}


def test_keys_go_in_one_entry_as_changes_that_watchers_see_in_order(db: Clients) -> None:
    lease, other = grant(db), grant(db)
    for key in ("b", "a", "c"):
        db.ask("put", key=key, value=1, lease=other if key == "c" else lease)
    seen: list[Change] = []
    db.machine.on_changes = lambda batch, changes: seen.extend(changes)
    db.apply(["lease_expire", [lease, other]])
    rev = db.machine.applied
    assert [change[:3] for change in seen] == [(rev, "a", None), (rev, "b", None), (rev, "c", None)]
    assert all(change[3] is not None for change in seen)


def test_an_unknown_lease_is_refused_with_its_number_and_nothing_is_done(db: Clients) -> None:
    for request in (
        {"op": "put", "key": "k", "value": 1, "lease": 99},
        {"op": "put", "key": "k", "value": 1, "lease": 99, "if": {"exists": True}},
        {"op": "lease_revoke", "lease": 99},
        {"op": "txn", "then": [{"op": "put", "key": "a", "value": 1}, {"op": "put", "key": "k", "value": 1, "lease": 99}]},
    ):  # fmt: skip
        reply = db.ask(**request)
        assert (reply["error"], reply["lease"]) == ("bad_request", 99)
    assert keys(db) == []


def test_a_put_says_to_which_lease_a_key_belongs(db: Clients) -> None:
    one, other = grant(db), grant(db)
    db.ask("put", key="k", value=1, lease=one)
    db.ask("put", key="k", value=2, lease=other)
    assert db.ask("lease_revoke", lease=one)["deleted"] == 0
    assert keys(db) == ["k"]
    db.ask("put", key="k", value=3)
    assert db.ask("lease_revoke", lease=other)["deleted"] == 0
    assert keys(db) == ["k"]


@pytest.mark.parametrize("batched", [False, True])
def test_a_plain_put_detaches_also_in_a_batch_of_one_leader(db: Clients, batched: bool) -> None:
    lease = grant(db)
    requests = [{"op": "put", "key": "k", "value": 1, "lease": lease}, {"op": "put", "key": "k", "value": 2}]
    if batched:
        db.machine.apply_batch(batch_of(db.machine.applied + 1, *requests))
    else:
        for request in requests:
            db.ask(**request)
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 0
    assert keys(db) == ["k"]


def test_a_delete_detaches_and_an_incr_does_not(db: Clients) -> None:
    lease = grant(db)
    for key in ("deleted", "counted"):
        db.ask("put", key=key, value=1, lease=lease)
    db.ask("delete", key="deleted")
    db.ask("put", key="deleted", value=1)
    db.ask("incr", key="counted")
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 1
    assert keys(db) == ["deleted"]


def test_a_put_whose_condition_fails_leaves_the_key_where_it_hangs(db: Clients) -> None:
    lease, other = grant(db), grant(db)
    db.ask("put", key="k", value=1, lease=lease)
    assert db.ask("put", key="k", value=2, lease=other, **{"if": {"rev": 0}})["applied"] is False
    assert db.ask("lease_revoke", lease=other)["deleted"] == 0
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 1


def test_a_put_with_a_condition_and_a_lease_does_both(db: Clients) -> None:
    lease = grant(db)
    assert db.ask("put", key="lock", value="me", lease=lease, **{"if": {"exists": False}})["applied"] is True
    assert db.ask("put", key="lock", value="you", lease=lease, **{"if": {"exists": False}})["applied"] is False
    assert "applied" not in db.ask("put", key="other", value=1, lease=lease)
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 2


def test_a_transaction_that_fails_halfway_takes_its_attachments_back(db: Clients) -> None:
    lease, other = grant(db), grant(db)
    db.ask("put", key="a", value=1, lease=lease)
    db.ask("put", key="text", value="x")
    before = dict(db.table.ledger.records), db.table.digest
    operations = [
        {"op": "put", "key": "a", "value": 2, "lease": other},
        {"op": "put", "key": "a", "value": 3},
        {"op": "put", "key": "b", "value": 3, "lease": lease},
        {"op": "delete", "key": "b"},
        {"op": "delete", "key": "a"},
        {"op": "incr", "key": "text"},
    ]
    assert db.ask("txn", then=operations)["error"] == "bad_request"
    assert (db.table.ledger.records, db.table.digest) == before
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 1


def test_a_batch_attaches_keys(db: Clients) -> None:
    lease = grant(db)
    db.ask("batch", ops=[{"op": "put", "key": k, "value": 1, "lease": lease} for k in "abc"])
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 3


def test_what_is_gone_already_expires_without_harm(db: Clients) -> None:
    lease, other = grant(db), grant(db)
    db.ask("put", key="k", value=1, lease=other)
    db.ask("lease_revoke", lease=lease)
    assert db.apply(["lease_expire", [lease, other]])["deleted"] == 1


def test_there_is_an_end_to_leases_and_to_the_keys_of_one(db: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasebook, "LEASES_MAX", 2)
    monkeypatch.setattr(leasebook, "KEYS_MAX", 2)
    lease, _ = grant(db), grant(db)
    assert db.ask("lease_grant", ttl=1)["error"] == "overloaded"
    for key in "ab":
        db.ask("put", key=key, value=1, lease=lease)
    assert db.ask("put", key="c", value=1, lease=lease)["error"] == "too_large"
    assert db.ask("put", key="a", value=2, lease=lease)["ok"]  # it hangs there already
    assert keys(db) == ["a", "b"]


def test_keys_of_any_name_hang_on_leases(db: Clients) -> None:
    lease = grant(db)
    names = ["/", "a/b", "lease/1", "1\n2", "é", "\U0001f600", "k" * 4000]
    for name in names:
        db.ask("put", key=name, value=1, lease=lease)
    db.restore()
    assert db.machine.leases.keys(lease) == sorted(names)
    assert db.ask("lease_revoke", lease=lease)["deleted"] == len(names)


def test_leases_stand_in_the_order_of_their_numbers_also_after_a_restart(db: Clients) -> None:
    for _ in range(12):
        grant(db)
    db.restore()
    grant(db)
    assert list(db.machine.leases.ttl_ms) == list(range(1, 14))


STEP = st.tuples(
    st.sampled_from(["put", "plain", "delete", "incr", "revoke", "grant", "expire", "restore", "failing"]),
    st.integers(0, 3),
    st.sampled_from("abcd"),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_leases_behave_like_a_dict_of_sets(steps: list[tuple[str, int, str]]) -> None:
    db = Clients()
    model: dict[int, set[str]] = {}
    there: set[str] = set()
    granted: list[int] = [grant(db)]
    model[granted[0]] = set()

    def detach(key: str) -> None:
        for hanging in model.values():
            hanging.discard(key)

    for what, which, key in steps:
        lease = granted[which % len(granted)]
        if what == "grant":
            granted.append(grant(db))
            model[granted[-1]] = set()
        elif what in ("revoke", "expire"):
            gone = model.pop(lease, None)
            if what == "revoke":
                reply = db.ask("lease_revoke", lease=lease)
            else:
                reply = db.apply(["lease_expire", [lease]])
            if gone is None:
                assert reply.get("error") == "bad_request" or reply["deleted"] == 0
            else:
                assert reply["deleted"] == len(gone)
                there -= gone
        elif what == "put":
            ok = db.ask("put", key=key, value=1, lease=lease)["ok"]
            assert ok is (lease in model)
            if ok:
                detach(key)
                model[lease].add(key)
                there.add(key)
        elif what == "plain":
            db.ask("put", key=key, value=1)
            detach(key)
            there.add(key)
        elif what == "delete":
            db.ask("delete", key=key)
            detach(key)
            there.discard(key)
        elif what == "incr":
            db.ask("incr", key=key)
            there.add(key)
        elif what == "failing":
            operations = [{"op": "put", "key": key, "value": 1}, {"op": "put", "key": "d", "value": 1, "lease": 9999}]
            assert not db.ask("txn", then=operations)["ok"]
        else:
            db.restore()
        assert {lease: set(db.machine.leases.keys(lease)) for lease in db.machine.leases.ttl_ms} == model
        assert set(keys(db)) == there
        assert whole_digest(db.table) == db.table.digest


def test_two_nodes_that_remember_different_things_have_different_digests(db: Clients) -> None:
    digests = {db.table.digest}
    lease = grant(db)
    digests.add(db.table.digest)
    client = db.open()
    digests.add(db.table.digest)
    db.ask("put", key="k", value=1, lease=lease)
    with_lease = db.table.digest
    rows = sum(row[4] ** 2 for _, row in db.table.rows())
    assert with_lease != rows % 2**64
    db.ask("delete", key="gone", client=client, seq=1)  # changes no row
    digests |= {with_lease, db.table.digest}
    assert len(digests) == 5


def test_changes_of_a_session_name_it(db: Clients) -> None:
    seen: list[Change] = []

    def on_changes(batch: Batch, changes: list[Change]) -> None:
        seen.extend(changes)

    db.machine.on_changes = on_changes
    client = db.open()
    db.ask("put", key="a", value=1, client=client, seq=1)
    db.ask("put", key="a", value=1, client=client, seq=1)
    db.ask("put", key="b", value=1)
    db.ask("delete", key="a")
    assert [(change[1], change[4]) for change in seen] == [("a", client), ("b", 0), ("a", 0)]
