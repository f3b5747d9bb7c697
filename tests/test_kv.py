"""What requests become commands, and what commands do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import commands, kv
from ddb.codec import decode_batch, encode_batch
from ddb.errors import BadRequest, InvariantError, TooLarge
from ddb.kv import Machine, MemoryTable, answer, digest_of, holds, prefix_end, prepare, prepare_read
from ddb.messages import Batch, Configuration
from ddb.wire import decode, encode, quoter


def batch_of(first: int, *requests: dict[str, Any]) -> Batch:
    prepared = [prepare(request) for request in requests]
    batch = encode_batch(first, 1, 0, [entry for entry, _ in prepared])
    return replace(batch, commands=[command for _, command in prepared])


class Database:
    """A machine on a table in memory, spoken to in requests and decoded replies."""

    def __init__(self) -> None:
        self.table = MemoryTable()
        self.machine = Machine(self.table)

    def __call__(self, op: str, key: str | None = None, **fields: Any) -> dict[str, Any]:
        request = {"op": op, **fields} if key is None else {"op": op, "key": key, **fields}
        if op in kv.READS:
            return decode(answer(self.table, prepare_read(request), self.machine.applied))
        (reply,) = self.machine.apply_batch(batch_of(self.machine.applied + 1, request))
        return decode(reply)

    def state(self) -> dict[str, kv.Row]:
        return dict(self.table.rows())


@pytest.fixture
def db() -> Database:
    return Database()


def error_of(request: dict[str, Any], kind: type[BadRequest] | type[TooLarge] = BadRequest) -> str:
    judge = prepare_read if request.get("op") in list(kv.READS) else prepare
    with pytest.raises(kind) as caught:
        judge(request)
    return caught.value.message


# ------------------------------------------------------- requests judged


@pytest.mark.parametrize(
    ("request_", "normal"),
    [
        ({"op": "put", "key": "k", "value": "v"}, ["put", "k", "v"]),
        ({"op": "put", "key": "k", "value": None}, ["put", "k", None]),
        ({"op": "put", "key": "k", "value": 1, "if": []}, ["put", "k", 1, {"if": []}]),
        (
            {"op": "put", "key": "k", "value": 1, "if": {"rev": 0}},
            ["put", "k", 1, {"if": [{"key": "k", "op": "=", "rev": 0}]}],
        ),
        ({"op": "delete", "key": "k"}, ["delete", "k"]),
        (
            {"op": "delete", "key": "k", "if": [{"key": "j", "exists": False, "op": "!="}]},
            ["delete", "k", {"if": [{"key": "j", "op": "!=", "exists": False}]}],
        ),
        ({"op": "incr", "key": "k"}, ["incr", "k", 1]),
        ({"op": "incr", "key": "k", "by": -7}, ["incr", "k", -7]),
        (
            {"op": "batch", "ops": [{"op": "put", "key": "a", "value": [1]}, {"op": "delete", "key": "b"}]},
            ["batch", [["put", "a", [1]], ["delete", "b"]]],
        ),
        (
            {"op": "txn", "if": {"key": "a", "value": 1.5, "op": "<"}, "then": [{"op": "get", "key": "a"}]},
            ["txn", [{"key": "a", "op": "<", "value": 1.5}], [["get", "a"]], []],
        ),
        ({"op": "txn"}, ["txn", [], [], []]),
        (
            {"op": "txn", "else": [{"op": "count", "prefix": "a"}]},
            ["txn", [], [], [["count", {"start": "a", "end": "b"}]]],
        ),
    ],
)
def test_a_write_becomes_its_normal_form(request_: dict[str, Any], normal: list[Any]) -> None:
    entry, _ = prepare(request_)
    assert json.loads(entry) == normal
    assert entry == encode(normal)


def test_what_a_command_does_not_need_never_enters_the_log() -> None:
    junk = {"id": 7, "timeout": 3, "forward": False, "colour": "red", "client": None, "lease": None}
    for request in (
        {"op": "put", "key": "k", "value": 1},
        {"op": "put", "key": "k", "value": 1, "if": [{"rev": 1, "junk": 1}]},
        {"op": "delete", "key": "k"},
        {"op": "incr", "key": "k"},
        {"op": "batch", "ops": [{"op": "put", "key": "a", "value": 1, "junk": 1}]},
        {"op": "txn", "then": [{"op": "scan", "junk": 1}]},
    ):
        entry, _ = prepare({**junk, **request})
        assert b"junk" not in entry
        assert b"red" not in entry and b"timeout" not in entry and b"null" not in entry.replace(b'"end":null', b"")


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        ({}, "not a write"),
        ({"op": ["put"]}, "not a write"),
        ({"op": "put", "value": 1}, "`key` must be a string"),
        ({"op": "put", "key": 1, "value": 1}, "`key` must be a string, not 1"),
        ({"op": "put", "key": "", "value": 1}, "must not be empty"),
        ({"op": "put", "key": "k"}, "needs a `value`"),
        ({"op": "put", "key": "\ud800", "value": 1}, "surrogate"),
        ({"op": "put", "key": "k", "value": "\ud800"}, "surrogate"),
        ({"op": "put", "key": "k" * 2000 + "\ud800", "value": 1}, "surrogate"),
        ({"op": "put", "key": "k", "value": 1, "client": "c", "seq": 1}, "`client` is the number"),
        ({"op": "put", "key": "k", "value": 1, "seq": 1}, "`client` is the number"),
        ({"op": "put", "key": "k", "value": 1, "client": 1}, "`seq` is a whole number"),
        ({"op": "put", "key": "k", "value": 1, "client": 1, "seq": 0}, "`seq` is a whole number"),
        ({"op": "put", "key": "k", "value": 1, "client": 1, "seq": 2**53 + 1}, "`seq` is a whole number"),
        ({"op": "put", "key": "k", "value": 1, "client": True, "seq": 1}, "`client` is the number"),
        ({"op": "delete", "key": "k", "client": 1, "seq": 1.0}, "`seq` is a whole number"),
        ({"op": "incr", "key": "k", "client": 1, "seq": "1"}, "`seq` is a whole number"),
        ({"op": "batch", "ops": [], "client": 1}, "`seq` is a whole number"),
        ({"op": "txn", "client": 0, "seq": 1}, "`client` is the number"),
        ({"op": "txn", "then": [{"op": "incr", "key": "k", "client": 1, "seq": 1}]}, "belong to the whole request"),
        ({"op": "session_open", "client": 1}, "without `client` and `seq`"),
        ({"op": "session_close"}, "`client` is the number"),
        ({"op": "session_close", "client": 1, "seq": 1}, "without `seq`"),
        ({"op": "put", "key": "k", "value": 1, "lease": 0}, "`lease` is the number"),
        ({"op": "put", "key": "k", "value": 1, "lease": "4"}, "`lease` is the number"),
        ({"op": "delete", "key": "k", "lease": 4}, "Only a put takes a `lease`"),
        ({"op": "incr", "key": "k", "lease": 4}, "Only a put takes a `lease`"),
        ({"op": "batch", "lease": 4, "ops": []}, "Only a put takes a `lease`"),
        ({"op": "txn", "then": [{"op": "put", "key": "k", "value": 1, "lease": []}]}, "`then`[0]: `lease` is"),
        ({"op": "lease_grant"}, "`ttl` is how long"),
        ({"op": "lease_grant", "ttl": 0}, "0.001 to 31536000 seconds"),
        ({"op": "lease_grant", "ttl": 0.0009}, "0.001 to 31536000 seconds"),
        ({"op": "lease_grant", "ttl": 31536001}, "0.001 to 31536000 seconds"),
        ({"op": "lease_grant", "ttl": True}, "`ttl` is how long"),
        ({"op": "lease_grant", "ttl": "5"}, "`ttl` is how long"),
        ({"op": "lease_revoke"}, "`lease` is the number"),
        ({"op": "put", "key": "k", "value": 1, "if": 3}, "A condition is an object"),
        ({"op": "put", "key": "k", "value": 1, "if": {}}, "exactly one"),
        ({"op": "put", "key": "k", "value": 1, "if": {"rev": 1, "version": 2}}, "exactly one"),
        ({"op": "put", "key": "k", "value": 1, "if": {"rev": True}}, "whole number"),
        ({"op": "put", "key": "k", "value": 1, "if": {"rev": 1.0}}, "whole number"),
        ({"op": "put", "key": "k", "value": 1, "if": {"version": -1}}, "whole number"),
        ({"op": "put", "key": "k", "value": 1, "if": {"exists": 1}}, "true or false"),
        ({"op": "put", "key": "k", "value": 1, "if": {"exists": True, "op": "<"}}, "with `=` or `!=`"),
        ({"op": "put", "key": "k", "value": 1, "if": {"rev": 1, "op": "=="}}, "`op` is =, !=, < or >"),
        ({"op": "put", "key": "k", "value": 1, "if": {"rev": 1, "op": ["="]}}, "`op` is =, !=, < or >"),
        ({"op": "put", "key": "k", "value": 1, "if": {"rev": 1, "key": None}}, "must be a string"),
        ({"op": "txn", "if": {"rev": 1}}, "condition's `key` must be a string"),
        ({"op": "txn", "if": "x"}, "A condition is an object"),
        ({"op": "incr", "key": "k", "by": True}, "whole number, not true"),
        ({"op": "incr", "key": "k", "by": 1.5}, "whole number, not 1.5"),
        ({"op": "incr", "key": "k", "by": None}, "whole number"),
        ({"op": "incr", "key": "k", "if": {"rev": 1}}, "takes no `if`"),
        ({"op": "batch"}, "needs `ops`"),
        ({"op": "batch", "ops": {}}, "must be a list"),
        ({"op": "batch", "ops": [1]}, "`ops`[0] must be an object"),
        ({"op": "batch", "ops": [{"op": "get", "key": "a"}]}, "`op` is delete or put"),
        ({"op": "batch", "ops": [{"op": "put", "key": "a", "value": 1, "if": {"rev": 1}}]}, "use the `if` of a txn"),
        ({"op": "batch", "ops": [], "if": {"rev": 1}}, "takes no `if`"),
        ({"op": "batch", "ops": [{"op": "delete", "key": "a"}, {"op": "put", "key": "a"}]}, "`ops`[1]: A put needs"),
        ({"op": "txn", "then": None}, "must be a list"),
        ({"op": "txn", "then": [{"op": "txn"}]}, "`then`[0]"),
        ({"op": "txn", "else": [{"op": "delete", "key": "a", "if": []}]}, "`else`[0]"),
        ({"op": "get"}, "`key` must be a string"),
        ({"op": "get", "key": ""}, "must not be empty"),
        ({"op": "scan", "prefix": 1}, "`prefix` must be a string"),
        ({"op": "scan", "prefix": "a", "start": "b"}, "not both"),
        ({"op": "count", "prefix": "a", "end": "b"}, "not both"),
        ({"op": "scan", "limit": 0}, "from 1 to 10000"),
        ({"op": "scan", "limit": 10_001}, "from 1 to 10000"),
        ({"op": "scan", "limit": True}, "from 1 to 10000"),
        ({"op": "scan", "reverse": 1}, "`reverse` must be true or false"),
        ({"op": "scan", "keys_only": "yes"}, "`keys_only` must be true or false"),
    ],
)
def test_a_wrong_request_is_refused_with_a_sentence(request_: dict[str, Any], part: str) -> None:
    message = error_of(request_)
    assert part in message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("character", ["k", "é", "€", "😀"])
def test_a_key_is_measured_in_bytes_of_utf_8(character: str) -> None:
    fitting = 4096 // len(character.encode())
    for request in ({"op": "put", "value": 1}, {"op": "delete"}, {"op": "get"}, {"op": "incr"}):
        judge = prepare_read if request["op"] == "get" else prepare
        judge({**request, "key": character * fitting})
        assert "4096 are allowed" in error_of({**request, "key": character * (fitting + 1)}, TooLarge)
    assert "allowed" in error_of({"op": "scan", "prefix": character * (fitting + 1)}, TooLarge)


def test_a_write_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "ENTRY_BYTES_MAX", 100)
    monkeypatch.setattr(commands, "OPERATIONS_MAX", 3)
    monkeypatch.setattr(commands, "RANGE_READS_MAX", 1)
    big = {"op": "put", "key": "k", "value": "x" * 100}
    prepare({**big, "value": "x" * 85})
    error_of(big, TooLarge)
    error_of({**big, "if": {"rev": 0}}, TooLarge)
    error_of({"op": "batch", "ops": [big]}, TooLarge)
    error_of({"op": "txn", "else": [big]}, TooLarge)
    error_of({"op": "txn", "if": [{"key": "a", "rev": 0}] * 4}, TooLarge)
    error_of({"op": "txn", "then": [{"op": "get", "key": "a"}] * 4}, TooLarge)
    error_of({"op": "txn", "then": [{"op": "count"}] * 2}, TooLarge)
    error_of({"op": "batch", "ops": [{"op": "delete", "key": "a"}] * 4}, TooLarge)


@given(st.text(max_size=4), st.text(max_size=5))
def test_a_prefix_range_holds_exactly_the_keys_with_the_prefix(prefix: str, key: str) -> None:
    end = prefix_end(prefix)
    for candidate in (key, prefix + key, prefix[:-1] + key):
        inside = candidate >= prefix and (end is None or candidate < end)
        assert inside == candidate.startswith(prefix)


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        ("a", "b"),
        ("\ud7ff", "\ue000"),
        ("a\U0010ffff", "b"),
        ("\U0010ffff", None),
        ("", None),
        ("\U0010fffe", "\U0010ffff"),
    ],
)
def test_a_prefix_ends_before_the_next_character(prefix: str, end: str | None) -> None:
    assert prefix_end(prefix) == end


# ---------------------------------------------------------- what they do


def test_a_put_key_is_got_with_its_revisions(db: Database) -> None:
    assert db("put", "city", value="Oslo") == {"ok": True, "rev": 1, "version": 1}
    assert db("put", "city", value={"name": "Bergen"}) == {"ok": True, "rev": 2, "version": 2}
    assert db("get", "city") == {
        "ok": True, "found": True, "key": "city", "value": {"name": "Bergen"}, "rev": 2, "created": 1, "version": 2,
    }  # fmt: skip


def test_a_missing_key_is_not_found(db: Database) -> None:
    assert db("get", 'no "key"') == {
        "ok": True, "found": False, "key": 'no "key"', "value": None, "rev": 0, "created": 0, "version": 0,
    }  # fmt: skip


def test_a_deleted_key_is_created_anew(db: Database) -> None:
    db("put", "a", value=1)
    assert db("delete", "a") == {"ok": True, "deleted": 1, "rev": 2}
    assert db("delete", "a") == {"ok": True, "deleted": 0, "rev": 3}
    assert not db("get", "a")["found"]
    assert db("put", "a", value=2) == {"ok": True, "rev": 4, "version": 1}
    assert db("get", "a")["created"] == 4


def test_a_put_whose_condition_fails_says_what_is_there(db: Database) -> None:
    absent = {"ok": True, "applied": False, "found": False, "rev": 0, "value": None}
    assert db("put", "a", value=1, **{"if": {"exists": True}}) == absent
    assert db("put", "a", value=1, **{"if": {"rev": 0}}) == {"ok": True, "applied": True, "rev": 2, "version": 1}
    assert db("put", "a", value=2, **{"if": {"rev": 0}}) == {
        "ok": True, "applied": False, "found": True, "rev": 2, "value": 1,
    }  # fmt: skip
    assert db("put", "a", value=2, **{"if": [{"rev": 2}, {"key": "b", "rev": 0}]})["applied"] is True
    assert db("get", "a")["value"] == 2


def test_a_delete_whose_condition_fails_says_what_is_there(db: Database) -> None:
    db("put", "a", value=1)
    assert db("delete", "a", **{"if": {"value": 2}}) == {
        "ok": True, "applied": False, "deleted": 0, "found": True, "rev": 1, "value": 1,
    }  # fmt: skip
    assert db("delete", "a", **{"if": {"value": 1}}) == {"ok": True, "applied": True, "deleted": 1, "rev": 3}


def test_an_incr_counts_from_zero(db: Database) -> None:
    assert db("incr", "n") == {"ok": True, "value": 1, "rev": 1, "version": 1}
    assert db("incr", "n", by=-5) == {"ok": True, "value": -4, "rev": 2, "version": 2}
    assert db("incr", "n", by=10**50)["value"] == 10**50 - 4


@pytest.mark.parametrize("value", ["1", 1.0, 1e2, True, None, [1], {}, "", "-"])
def test_an_incr_of_what_is_no_integer_is_refused(db: Database, value: Any) -> None:
    db("put", "n", value=value)
    before = db.state()
    reply = db("incr", "n")
    assert (reply["ok"], reply["error"]) == (False, "bad_request")
    assert "'n' is not an integer" in reply["message"]
    assert db.state() == before


def test_an_incr_past_the_longest_integer_is_refused(db: Database) -> None:
    longest = 10**4300 - 1
    assert db("incr", "n", by=longest)["value"] == longest
    assert db("incr", "n")["error"] == "bad_request"
    assert db("incr", "n", by=-1)["value"] == longest - 1
    assert db("incr", "m", by=-longest)["value"] == -longest
    assert db("incr", "m", by=-1)["error"] == "bad_request"


def test_a_batch_is_one_revision(db: Database) -> None:
    db("put", "old", value=0)
    ops = [
        {"op": "put", "key": "a", "value": 1},
        {"op": "delete", "key": "old"},
        {"op": "put", "key": "a", "value": 2},
        {"op": "delete", "key": "never"},
    ]
    assert db("batch", ops=ops) == {"ok": True, "rev": 2}
    item = db("get", "a")
    assert (item["value"], item["rev"], item["created"], item["version"]) == (2, 2, 2, 2)
    assert list(db.state()) == ["a"]


def test_a_txn_runs_then_or_else(db: Database) -> None:
    db("put", "a", value=1)
    fields = {
        "if": [{"key": "a", "value": 1}, {"key": "b", "exists": False}],
        "then": [
            {"op": "put", "key": "b", "value": 2},
            {"op": "get", "key": "b"},
            {"op": "incr", "key": "a"},
            {"op": "count"},
            {"op": "scan", "prefix": "b", "keys_only": True},
            {"op": "delete", "key": "a"},
            {"op": "get", "key": "a"},
        ],
        "else": [{"op": "get", "key": "a"}],
    }
    reply = db("txn", **fields)
    assert (reply["ok"], reply["succeeded"], reply["rev"]) == (True, True, 2)
    put, get, incr, count, scan, delete, gone = reply["results"]
    assert put == {"ok": True, "rev": 2, "version": 1}
    assert (get["value"], get["rev"]) == (2, 2)
    assert incr["value"] == 2
    assert (count["count"], count["rev"]) == (2, 2)
    assert scan["items"] == [{"key": "b", "rev": 2, "created": 2, "version": 1}]
    assert delete["deleted"] == 1
    assert gone["found"] is False
    again = db("txn", **fields)
    assert again["succeeded"] is False
    assert [result["found"] for result in again["results"]] == [False]


def test_a_key_deleted_and_put_in_one_txn_is_created_anew(db: Database) -> None:
    db("put", "a", value=1)
    db("txn", then=[{"op": "delete", "key": "a"}, {"op": "put", "key": "a", "value": 2}])
    item = db("get", "a")
    assert (item["rev"], item["created"], item["version"]) == (2, 2, 1)


def test_a_txn_that_fails_halfway_has_changed_nothing(db: Database) -> None:
    db("put", "a", value=1)
    db("put", "text", value="x")
    seen: list[kv.Change] = []
    db.machine.on_changes = lambda _, changes: seen.extend(changes)
    before, digest = db.state(), db.table.digest
    reply = db(
        "txn",
        then=[
            {"op": "put", "key": "a", "value": 2},
            {"op": "put", "key": "new", "value": 2},
            {"op": "delete", "key": "a"},
            {"op": "put", "key": "a", "value": 3},
            {"op": "incr", "key": "text"},
        ],
    )
    assert (reply["ok"], reply["error"]) == (False, "bad_request")
    assert db.state() == before
    assert db.table.digest == digest
    assert seen == []
    assert db("put", "a", value=2) == {"ok": True, "rev": 4, "version": 2}


def test_a_txn_that_reads_too_much_has_changed_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "REPLY_BYTES_MAX", 1000)
    db("put", "big", value="x" * 300)
    before = db.state()
    reply = db("txn", then=[{"op": "incr", "key": "n"}] + [{"op": "get", "key": "big"}] * 3)
    assert reply["error"] == "too_large"
    assert db.state() == before


def test_watchers_see_each_change_in_order(db: Database) -> None:
    seen: list[tuple[int, str, Any]] = []
    db("put", "before", value=0)
    db.machine.on_changes = lambda _, changes: seen.extend(
        (rev, key, None if row is None else json.loads(row[0])) for rev, key, row, *_ in changes
    )
    db("put", "a", value=1)
    db("delete", "nothing")
    db("batch", ops=[{"op": "put", "key": "b", "value": 2}, {"op": "delete", "key": "a"}])
    db("incr", "n")
    db.machine.on_changes = None
    db("put", "after", value=0)
    assert seen == [(2, "a", 1), (4, "b", 2), (4, "a", None), (5, "n", 1)]


def test_a_configuration_and_a_noop_take_an_index_and_change_nothing(db: Database) -> None:
    assert db.machine.apply_batch(Batch(1, 1, 1, b"", config=Configuration("c"))) == [b'{"ok":true,"rev":1}']
    assert db.machine.apply_batch(Batch(2, 2, 1, b"", commands=[["noop"]])) == [b'{"ok":true,"rev":2}']
    assert db("put", "a", value=1)["rev"] == 3


def test_a_batch_without_its_commands_is_decoded(db: Database) -> None:
    batch = replace(batch_of(1, {"op": "put", "key": "a", "value": [1, {"b": None}]}), commands=None)
    assert db.machine.apply_batch(batch) == [b'{"ok":true,"rev":1,"version":1}']
    assert db("get", "a")["value"] == [1, {"b": None}]


@pytest.mark.parametrize("command", [["fly", "k"], ["get", "k"], ["put2"]])
def test_a_command_of_a_later_version_stops_the_machine(db: Database, command: list[Any]) -> None:
    with pytest.raises(InvariantError, match="can't apply"):
        db.machine.apply_batch(Batch(1, 1, 1, b"", commands=[command]))


def test_batches_are_applied_in_order_only(db: Database) -> None:
    db("put", "a", value=1)
    for first in (1, 3):
        with pytest.raises(InvariantError, match="in order"):
            db.machine.apply_batch(batch_of(first, {"op": "put", "key": "a", "value": 1}))


# ------------------------------------------------------------ conditions


@pytest.mark.parametrize(
    ("held", "op", "wanted", "result"),
    [
        (1, "=", 1.0, True),
        (1, "=", True, False),
        (0, "=", False, False),
        (-0.0, "=", 0, True),
        ("1", "=", 1, False),
        (None, "=", None, True),
        (None, "=", False, False),
        ({"a": 1, "b": [2.0]}, "=", {"b": [2], "a": 1.0}, True),
        ({"a": 1}, "=", {"a": True}, False),
        ({"a": 1}, "=", {"a": 1, "b": None}, False),
        ([1, 2], "=", [2, 1], False),
        ([1, 2], "=", [1], False),
        (1, "!=", 1.0, False),
        (1, "!=", True, True),
        (2**53 + 1, "=", float(2**53), False),
        (2**53 + 1, ">", float(2**53), True),
        (10**400, ">", 1e308, True),
        (-(10**400), "<", -1e308, True),
        (2, "<", 10, True),
        ("2", "<", "10", False),
        ("a", "<", "b", True),
        ("\uffff", "<", "\U00010000", True),
        ("a", "<", 1, False),
        (1, ">", "a", False),
        (True, "<", 2, False),
        (0, "<", True, False),
        ([1], "<", [2], False),
        (None, "<", 1, False),
        (1, "<", 1, False),
        (1, ">", 1, False),
    ],
)
def test_values_compare_as_json(db: Database, held: Any, op: str, wanted: Any, result: bool) -> None:
    db("put", "a", value=held)
    assert db("put", "b", value=0, **{"if": {"key": "a", "op": op, "value": wanted}})["applied"] is result


@pytest.mark.parametrize(
    ("condition", "on_absent", "on_third_version"),
    [
        ({"exists": True}, False, True),
        ({"exists": False}, True, False),
        ({"exists": True, "op": "!="}, True, False),
        ({"exists": False, "op": "!="}, False, True),
        ({"rev": 0}, True, False),
        ({"rev": 0, "op": "!="}, False, True),
        ({"rev": 3}, False, True),
        ({"rev": 4, "op": "<"}, True, True),
        ({"rev": 2, "op": ">"}, False, True),
        ({"version": 3}, False, True),
        ({"version": 0}, True, False),
        ({"version": 2, "op": ">"}, False, True),
        ({"value": None}, False, False),
        ({"value": None, "op": "!="}, True, True),
        ({"value": 0, "op": ">"}, False, True),
        ({"value": 9, "op": "<"}, False, True),
    ],
)
def test_conditions_on_a_key_that_is_there_and_one_that_is_not(
    db: Database, condition: dict[str, Any], on_absent: bool, on_third_version: bool
) -> None:
    for value in (1, 2, 3):
        db("put", "third", value=value)
    for key, expected in (("absent", on_absent), ("third", on_third_version)):
        assert holds(db.table, {"op": "=", **condition, "key": key}) is expected


# ----------------------------------------------------------------- scans


def keys_of(reply: dict[str, Any]) -> list[str]:
    return [item["key"] for item in reply["items"]]


def test_a_scan_is_ordered_by_utf_8_bytes(db: Database) -> None:
    keys = ["\U00010000", "\uffff", "a", "B", "ab", "é", "z"]
    for key in keys:
        db("put", key, value=key)
    expected = sorted(keys, key=lambda key: key.encode())
    assert keys_of(db("scan")) == expected
    assert keys_of(db("scan", reverse=True)) == expected[::-1]


def test_a_scan_takes_its_range(db: Database) -> None:
    for key in ("a", "ab", "ac", "b", "c"):
        db("put", key, value=1)
    assert keys_of(db("scan", prefix="a")) == ["a", "ab", "ac"]
    assert keys_of(db("scan", start="ab", end="b")) == ["ab", "ac"]
    assert keys_of(db("scan", start="ac")) == ["ac", "b", "c"]
    assert keys_of(db("scan", end="ab")) == ["a"]
    assert keys_of(db("scan", start="b", end="a")) == []
    assert keys_of(db("scan", end="")) == []
    assert db("count")["count"] == 5
    assert db("count", prefix="a") == {"ok": True, "count": 3, "rev": 5}
    assert db("count", start="b", end="a")["count"] == 0


def test_a_scan_can_be_continued(db: Database) -> None:
    keys = [f"k{i:02d}" for i in range(10)]
    for key in keys:
        db("put", key, value=1)
    forth: list[str] = []
    reply = db("scan", limit=3)
    while reply["more"]:
        assert len(reply["items"]) == 3
        forth += keys_of(reply)
        reply = db("scan", limit=3, start=forth[-1] + "\0")
    assert forth + keys_of(reply) == keys
    back: list[str] = []
    reply = db("scan", limit=5, reverse=True)
    assert reply["more"] and len(reply["items"]) == 5
    back += keys_of(reply)
    reply = db("scan", limit=5, reverse=True, end=back[-1])
    assert not reply["more"]
    assert back + keys_of(reply) == keys[::-1]


def test_a_scan_stops_before_its_reply_is_huge(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "SCAN_BYTES_MAX", 1000)
    for i in range(5):
        db("put", f"k{i}", value="x" * 300)
    reply = db("scan")
    assert (keys_of(reply), reply["more"]) == (["k0", "k1"], True)
    db("put", "big", value="x" * 2000)
    reply = db("scan", end="c")
    assert (keys_of(reply), reply["more"]) == (["big"], False)
    reply = db("scan")
    assert (keys_of(reply), reply["more"]) == (["big"], True)


def test_a_scan_of_keys_only_has_no_values(db: Database) -> None:
    db("put", "a", value="secret")
    reply = db("scan", keys_only=True)
    assert reply == {
        "ok": True, "items": [{"key": "a", "rev": 1, "created": 1, "version": 1}], "more": False, "rev": 1,
    }  # fmt: skip


# ----------------------------------------------------------- determinism


def test_the_checksum_never_changes_its_definition() -> None:
    """Snapshots of one version are read by the next."""
    assert kv.checksum("city", b'"Oslo"', 12, 7, 3) == 0xCFF9B538
    assert kv.checksum("é\n", b"{}", 2**40, 1, 1) == 0x89EA15D7


KEYS = st.sampled_from(["a", "b", "c", "é", "\U0001f600", 'quote"', "line\n", "nul\0"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS | st.integers(-2, 2), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3), max_leaves=6
)  # fmt: skip
CONDITIONS = st.builds(
    lambda key, op, subject: {"key": key, "op": op, **subject},
    KEYS,
    st.sampled_from(["=", "!=", "<", ">"]),
    st.one_of(
        st.builds(lambda n: {"rev": n}, st.integers(0, 20)),
        st.builds(lambda n: {"version": n}, st.integers(0, 3)),
        st.builds(lambda v: {"value": v}, VALUES),
    ),
)
PUTS = st.builds(lambda k, v: {"op": "put", "key": k, "value": v}, KEYS, VALUES)
DELETES = st.builds(lambda k: {"op": "delete", "key": k}, KEYS)
INCRS = st.builds(lambda k, n: {"op": "incr", "key": k, "by": n}, KEYS, st.integers(-3, 3) | st.integers())
RANGE_READS = st.builds(
    lambda op, p, r: {"op": op, "prefix": p, "reverse": r}, st.sampled_from(["scan", "count"]), KEYS, st.booleans()
)
GETS = st.builds(lambda k: {"op": "get", "key": k}, KEYS)
REQUESTS = st.one_of(
    PUTS,
    PUTS,
    DELETES,
    INCRS,
    st.builds(lambda r, c: {**r, "if": c}, PUTS | DELETES, st.lists(CONDITIONS, max_size=2)),
    st.builds(lambda ops: {"op": "batch", "ops": ops}, st.lists(PUTS | DELETES, max_size=4)),
    st.builds(
        lambda c, t, e: {"op": "txn", "if": c, "then": t, "else": e},
        st.lists(CONDITIONS, max_size=2),
        st.lists(PUTS | DELETES | INCRS | RANGE_READS | GETS, max_size=5),
        st.lists(PUTS | DELETES | INCRS | RANGE_READS | GETS, max_size=5),
    ),
)


def cut(requests: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]


@settings(max_examples=300, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=25), st.integers(1, 8))
def test_leader_and_follower_answer_alike_and_keep_the_same_rows(requests: list[dict[str, Any]], size: int) -> None:
    leader, follower = Machine(MemoryTable()), Machine(MemoryTable())
    leader.on_changes = lambda batch, changes: None
    for some in cut(requests, size):
        batch = batch_of(leader.applied + 1, *some)
        replies = leader.apply_batch(batch)
        assert follower.apply_batch(decode_batch(batch.data)) == replies
        assert leader.table.digest == follower.table.digest
        for reply in replies:
            assert decode(reply)["ok"] in (True, False)
    rows = dict(leader.table.rows())
    assert rows == dict(follower.table.rows())
    assert leader.table.digest == digest_of(iter(rows.items()))
    assert leader.table.count() == len(rows)
    for key, (value, rev, created, version, crc) in rows.items():
        assert crc == kv.checksum(key, value, rev, created, version)
        assert encode(json.loads(value)) == value
        assert 1 <= created <= rev <= leader.applied and version >= 1


@given(REQUESTS)
def test_the_log_keeps_exactly_what_is_applied(request_: dict[str, Any]) -> None:
    entry, command = prepare(request_)
    assert b"\n" not in entry
    assert encode(json.loads(entry)) == entry
    assert prepare(request_, quoter(encode(request_))) == (entry, command)


@given(PUTS)
def test_the_short_way_of_a_plain_put_is_the_long_way(request_: dict[str, Any]) -> None:
    assert prepare(request_) == commands._put(request_)
