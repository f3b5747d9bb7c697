"""Writes of a session: applied once, answered alike for ever, and forgotten within bounds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import sessions
from ddb.calls import Exchange, Failed, Knowledge, call
from ddb.codec import encode_batch
from ddb.commands import prepare, well_formed
from ddb.kv import DIGEST_MASK, Machine, MemoryTable, digest_of
from ddb.ledger import Ledger, record_checksum
from ddb.store import Store
from ddb.wire import decode, decode_trusted, encode
from tests.test_kv import batch_of


class Spoken:
    """A machine that is spoken to in requests; replies stay bytes where they are asked for `raw`."""

    machine: Machine

    def raw(self, op: str, **fields: Any) -> bytes:
        (reply,) = self.machine.apply_batch(batch_of(self.machine.applied + 1, {"op": op, **fields}))
        return reply

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        reply: dict[str, Any] = decode(self.raw(op, **fields))
        return reply


class Clients(Spoken):
    """One on a table in memory."""

    def __init__(self) -> None:
        self.table = MemoryTable()
        self.machine = Machine(self.table)

    def open(self) -> int:
        return int(self.ask("session_open")["client"])

    def restore(self) -> None:
        """What a snapshot does: all that is left of the machine is its table."""
        table = MemoryTable()
        for key, row in self.table.rows():
            table.put(key, row, None)
        table.digest = self.table.digest
        table.ledger = Ledger(dict(sorted(self.table.ledger.records.items(), reverse=True)))
        self.table = table
        self.machine = Machine(table, self.machine.applied)

    def expire(self, *unused: tuple[int, int]) -> dict[str, Any]:
        command = ["session_expire", [list(pair) for pair in unused]]
        return self.apply(command)

    def apply(self, command: list[Any]) -> dict[str, Any]:
        """An entry that no client can ask for."""
        batch = encode_batch(self.machine.applied + 1, 1, 0, [encode(command)])
        (reply,) = self.machine.apply_batch(batch)
        decoded: dict[str, Any] = decode(reply)
        return decoded


def whole_digest(table: MemoryTable | Store) -> int:
    """The digest of rows and records, from the beginning."""
    records = sum(record_checksum(name, value) ** 2 for name, value in table.ledger.records.items())
    return (digest_of(table.rows()) + records) & DIGEST_MASK


@pytest.fixture
def db() -> Iterator[Clients]:
    db = Clients()
    yield db
    assert whole_digest(db.table) == db.table.digest


def test_a_write_that_is_sent_twice_is_applied_once_and_answered_alike(db: Clients) -> None:
    client = db.open()
    first = db.raw("incr", key="n", client=client, seq=1)
    assert decode(first)["value"] == 1
    assert db.raw("incr", key="n", client=client, seq=1) == first
    assert db.ask("incr", key="n", client=client, seq=2)["value"] == 2
    assert db.raw("incr", key="n", client=client, seq=1) == first


def test_what_else_is_sent_under_a_used_seq_gets_the_first_reply_and_does_nothing(db: Clients) -> None:
    client = db.open()
    first = db.raw("put", key="a", value=1, client=client, seq=7)
    assert db.raw("delete", key="a", client=client, seq=7) == first
    assert db.table.row("a") is not None


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"op": "put", "key": "k", "value": [1, {"a": "é"}]}, {"version": 2}),
        ({"op": "put", "key": "k", "value": 2, "if": {"rev": 0}}, {"applied": False}),
        ({"op": "delete", "key": "k"}, {"deleted": 1}),
        ({"op": "incr", "key": "k", "by": 5}, {"value": 6}),
        ({"op": "batch", "ops": [{"op": "put", "key": "k", "value": 5}, {"op": "delete", "key": "x"}]}, {"ok": True}),
        ({"op": "txn", "then": [{"op": "incr", "key": "k"}, {"op": "get", "key": "k"}]}, {"succeeded": True}),
        ({"op": "lease_grant", "ttl": 5}, {"ttl": 5}),
    ],
)
def test_every_write_can_be_one_of_a_session(db: Clients, request_: dict[str, Any], expected: dict[str, Any]) -> None:
    db.ask("put", key="k", value=1)
    client = db.open()
    first = db.raw(**request_, client=client, seq=1)
    assert expected.items() <= decode(first).items()
    before = db.table.digest, len(db.machine.leases)
    assert db.raw(**request_, client=client, seq=1) == first
    rows = dict(db.table.rows())
    db.restore()
    assert db.raw(**request_, client=client, seq=1) == first
    assert dict(db.table.rows()) == rows and len(db.machine.leases) == before[1]


def test_a_refusal_is_remembered_like_any_reply(db: Clients) -> None:
    client = db.open()
    db.ask("put", key="k", value="text")
    first = db.raw("incr", key="k", client=client, seq=1)
    assert decode(first)["error"] == "bad_request"
    db.ask("put", key="k", value=1)
    assert db.raw("incr", key="k", client=client, seq=1) == first
    assert db.ask("incr", key="k", client=client, seq=2)["value"] == 2


def test_a_transaction_that_fails_halfway_in_a_session_has_done_nothing_and_never_will(db: Clients) -> None:
    client = db.open()
    db.ask("put", key="text", value="x")
    operations = [{"op": "put", "key": "a", "value": 1}, {"op": "incr", "key": "text"}]
    first = db.raw("txn", then=operations, client=client, seq=1)
    assert decode(first)["error"] == "bad_request" and db.table.row("a") is None
    db.ask("put", key="text", value=1)
    assert db.raw("txn", then=operations, client=client, seq=1) == first
    assert db.table.row("a") is None


def test_seqs_may_come_in_any_order_and_with_gaps(db: Clients) -> None:
    client = db.open()
    replies = {seq: db.raw("incr", key="n", client=client, seq=seq) for seq in (5, 2, 9, 1, 1000)}
    assert [decode(reply)["value"] for reply in replies.values()] == [1, 2, 3, 4, 5]
    for seq, reply in replies.items():
        assert db.raw("incr", key="n", client=client, seq=seq) == reply


def test_sessions_know_nothing_of_one_another(db: Clients) -> None:
    one, other = db.open(), db.open()
    assert db.ask("incr", key="n", client=one, seq=1)["value"] == 1
    assert db.ask("incr", key="n", client=other, seq=1)["value"] == 2


def test_an_unknown_session_is_expired_and_nothing_is_done(db: Clients) -> None:
    reply = db.ask("put", key="k", value=1, client=77, seq=1)
    assert reply["error"] == "session_expired" and db.table.row("k") is None


def test_the_replies_to_the_64_highest_seqs_are_kept_and_the_others_never_applied_again(db: Clients) -> None:
    client = db.open()
    replies = {seq: db.raw("incr", key="n", client=client, seq=seq) for seq in range(1, 101)}
    for seq in range(1, 37):
        assert db.ask("incr", key="n", client=client, seq=seq)["error"] == "session_expired"
    for seq in range(37, 101):
        assert db.raw("incr", key="n", client=client, seq=seq) == replies[seq]
    assert db.ask("incr", key="n")["value"] == 101


def test_a_client_with_64_writes_unanswered_finds_all_of_them_in_whatever_order_they_came(db: Clients) -> None:
    client = db.open()
    for seq in range(1, 33):
        db.ask("incr", key="n", client=client, seq=seq)
    late = list(range(96, 32, -1))
    replies = {seq: db.raw("incr", key="n", client=client, seq=seq) for seq in late}
    assert [decode(r)["ok"] for r in replies.values()] == [True] * 64
    assert all(db.raw("incr", key="n", client=client, seq=seq) == replies[seq] for seq in late)


def test_no_more_than_32_kib_of_replies_are_kept_but_the_last_one_always(db: Clients) -> None:
    client = db.open()
    db.ask("put", key="k", value="x" * 20_000)
    read = {"then": [{"op": "get", "key": "k"}]}
    first = db.raw("txn", **read, client=client, seq=1)
    assert len(first) > 20_000
    assert db.raw("txn", **read, client=client, seq=1) == first
    second = db.raw("txn", **read, client=client, seq=2)
    assert db.raw("txn", **read, client=client, seq=2) == second
    assert db.ask("txn", **read, client=client, seq=1)["error"] == "session_expired"
    records = db.table.ledger.records
    assert sum(map(len, records.values())) < 32 << 10


def test_a_reply_over_32_kib_is_refused_undone_and_that_is_remembered(db: Clients) -> None:
    client = db.open()
    db.ask("put", key="k", value="x" * 40_000)
    request = {"then": [{"op": "put", "key": "a", "value": 1}, {"op": "get", "key": "k"}]}
    first = db.raw("txn", **request, client=client, seq=1)
    assert decode(first)["error"] == "too_large" and db.table.row("a") is None
    db.ask("put", key="k", value=1)
    assert db.raw("txn", **request, client=client, seq=1) == first
    assert db.table.row("a") is None


def test_a_late_low_seq_is_kept_though_higher_ones_have_filled_the_session(db: Clients) -> None:
    client = db.open()
    for seq in range(100, 164):
        db.ask("incr", key="n", client=client, seq=seq)
    low = db.raw("incr", key="n", client=client, seq=5)
    assert decode(low)["value"] == 65
    assert db.raw("incr", key="n", client=client, seq=5) == low
    assert db.ask("incr", key="n", client=client, seq=100)["error"] == "session_expired"
    assert db.ask("incr", key="n", client=client, seq=6)["error"] == "session_expired"  # nobody can tell any more


def test_a_closed_session_leaves_nothing_behind(db: Clients) -> None:
    client = db.open()
    for seq in range(1, 10):
        db.ask("incr", key="n", client=client, seq=seq)
    assert db.ask("session_close", client=client)["closed"] == 1
    assert db.table.ledger.records == {}
    assert db.ask("session_close", client=client)["closed"] == 0
    assert db.ask("incr", key="n", client=client, seq=10)["error"] == "session_expired"


def test_expiry_passes_over_a_session_that_was_used_since(db: Clients) -> None:
    idle, busy = db.open(), db.open()
    seen = [(idle, idle), (busy, busy)]
    db.ask("incr", key="n", client=busy, seq=1)
    assert db.expire(*seen, (999, 5))["expired"] == 1
    assert db.ask("incr", key="n", client=idle, seq=1)["error"] == "session_expired"
    assert db.ask("incr", key="n", client=busy, seq=2)["value"] == 2


def test_a_repetition_is_use_as_well(db: Clients) -> None:
    client = db.open()
    db.ask("incr", key="n", client=client, seq=1)
    seen = dict(db.machine.sessions.last_uses())
    db.ask("incr", key="n", client=client, seq=1)
    assert db.expire((client, seen[client]))["expired"] == 0


def test_there_is_an_end_to_sessions(db: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SESSIONS_MAX", 3)
    opened = [db.open() for _ in range(3)]
    assert db.ask("session_open")["error"] == "overloaded"
    db.ask("session_close", client=opened[0])
    assert db.ask("session_open")["ok"]


def test_large_replies_of_sessions_are_given_though_the_room_for_others_is_used_up(db: Clients) -> None:
    client = db.open()
    db.ask("put", key="k", value="x" * 30_000)
    read = {"op": "txn", "then": [{"op": "get", "key": "k"}]}
    requests = [{**read, "client": client, "seq": seq} for seq in range(1, 1500)]
    replies = db.machine.apply_batch(batch_of(db.machine.applied + 1, *requests))
    assert all(reply.startswith(b'{"ok":true') for reply in replies)


@pytest.mark.parametrize(
    "command",
    [
        ["once", 1, 1, ["once", 1, 1, ["put", "k", 1]]],
        ["once", 1, 1, ["session_open"]],
        ["once", 1, 1, ["session_close", 1]],
        ["once", 0, 1, ["put", "k", 1]],
        ["once", 1, True, ["put", "k", 1]],
        ["once", 1, 1],
        ["once", 1, 1, ["noop"]],
        ["once", 1, 1, []],
        ["session_expire", [[1, 1]]],
        ["session_close", "1"],
        ["lease_expire", [1]],
        ["lease_grant", 0],
        ["lease_grant", 1.5],
        ["lease_revoke", None],
        ["put", "k", 1, {}],
        ["put", "k", 1, {"lease": 0}],
        ["put", "k", 1, {"lease": 1, "colour": 1}],
        ["txn", [], [["put", "k", 1, {"if": []}]], []],
        ["batch", [["delete", "k", {"if": []}]]],
    ],
)
def test_no_member_can_bring_into_the_log_what_no_client_may_ask(command: list[Any]) -> None:
    assert not well_formed(encode(command), command)


@pytest.mark.parametrize(
    "command",
    [
        ["once", 1, 1, ["put", "k", {"if": 1}]],
        ["once", 3, 9, ["txn", [], [["put", "k", 1, {"lease": 4}], ["put", "k", {"if": 1}]], []]],
        ["once", 1, 1, ["lease_grant", 1000]],
        ["put", "k", 1, {"lease": 4}],
        ["put", "k", 1, {"if": [{"key": "k", "op": "=", "rev": 0}], "lease": 4}],
        ["session_open"],
        ["session_close", 12],
        ["lease_grant", 1],
        ["lease_revoke", 12],
        ["batch", [["put", "k", {"if": 2}], ["put", "a", 1, {"lease": 3}]]],
    ],
)
def test_members_forward_all_that_clients_may_ask(command: list[Any]) -> None:
    assert well_formed(encode(command), command)


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "session_open"},
        {"op": "session_close", "client": 2**53},
        {"op": "lease_grant", "ttl": 31_536_000},
        {"op": "lease_grant", "ttl": 0.001},
        {"op": "lease_revoke", "lease": 1},
        {"op": "put", "key": "k", "value": {"if": []}, "lease": 2**53},
        {"op": "put", "key": "k", "value": 1, "lease": 3, "if": {"exists": False}},
        {"op": "batch", "ops": [{"op": "put", "key": "k", "value": {}, "lease": 3}, {"op": "delete", "key": "k"}]},
        {"op": "txn", "if": {"key": "k", "rev": 0}, "then": [{"op": "put", "key": "k", "value": [], "lease": 3}]},
    ],
)
@pytest.mark.parametrize("numbers", [{}, {"client": 7, "seq": 2**53}])
def test_what_a_node_takes_from_its_clients_its_leader_takes_from_it(
    request_: dict[str, Any], numbers: dict[str, int]
) -> None:
    if request_["op"].startswith("session") and numbers:
        return  # these are no writes of a session
    entry, _ = prepare({**request_, **numbers})
    command = decode_trusted(entry)
    assert well_formed(entry, command)
    assert (command[0] == "once") is bool(numbers)


WRITE = st.tuples(st.integers(0, 2), st.integers(1, 12), st.sampled_from(["incr", "put", "text", "close", "restore"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(WRITE, max_size=80), st.integers(1, 5))
def test_sessions_behave_like_a_list_of_all_that_was_ever_answered(
    writes: list[tuple[int, int, str]], kept_max: int
) -> None:
    """The model: a write under a new seq is applied; under a used one the first reply or `session_expired` comes, and
    nothing is done. The machine may be restored from its table at any time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "REPLIES_MAX", kept_max)
        db = Clients()
        clients = [db.open() for _ in range(3)]
        answered: dict[tuple[int, int], bytes] = {}
        count = 0
        for who, seq, what in writes:
            client = clients[who]
            if what == "restore":
                db.restore()
                continue
            if what == "close":
                db.ask("session_close", client=client)
                clients[who] = db.open()
                continue
            request = {"op": "incr", "key": "text" if what == "text" else "n"}
            if what == "put":
                db.ask("put", key="text", value="x")
            reply = db.raw(**request, client=client, seq=seq)
            known = answered.get((client, seq))
            if known is None and decode(reply).get("error") != "session_expired":
                answered[client, seq] = reply
                count += request["key"] == "n"
            else:
                assert reply == known or decode(reply)["error"] == "session_expired"
            assert len(db.machine.sessions._sessions[client].replies) <= kept_max
            if decode(reply).get("error") != "session_expired":
                assert db.raw(**request, client=client, seq=seq) == reply
        row = db.table.row("n")
        assert (0 if row is None else int(row[0])) == count
        assert whole_digest(db.table) == db.table.digest


def test_the_client_sends_an_open_write_again_elsewhere_under_its_number() -> None:
    """What happens on the client's way (calls.py): of three attempts, two are lost after they were sent."""
    clock = iter(range(1000))
    knowledge = Knowledge(["a:1", "b:1"], discover=False)
    request = {"op": "incr", "key": "n", "client": 3, "seq": 5}
    steps = call(knowledge, request, None, 100.0, lambda: float(next(clock)), random.Random(1))
    asked: list[tuple[str, object]] = []
    effect = next(steps)
    try:
        while True:
            if not isinstance(effect, Exchange):
                effect = steps.send(None)
                continue
            sent = decode(effect.payload)
            asked.append((effect.address, (sent["client"], sent["seq"])))
            if len(asked) < 3:
                effect = steps.throw(Failed("the connection broke", sent=True))
            else:
                effect = steps.send(b'{"ok":true,"value":1,"rev":7,"version":1}')
    except StopIteration as end:
        assert end.value["value"] == 1
    assert [numbers for _, numbers in asked] == [(3, 5)] * 3
    assert {address for address, _ in asked} == {"a:1", "b:1"}
