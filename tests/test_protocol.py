"""The data operations as docs/protocol.md promises them, over the wire, against one real node.

A contract test: it is written from that page alone, so that a client written from it by somebody else works. Each test
has keys of its own under a prefix, since all share one node.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from tests.alone import node_alone, wait_leading
from tests.harness import NodeServer
from tests.talk import Talk, frame

Ask = Callable[..., dict[str, Any]]
_prefixes = count(1)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    """One node alone, which is a complete database."""
    with node_alone(tmp_path_factory.mktemp("protocol")) as server:
        yield server


@pytest.fixture
def ask(node: NodeServer) -> Iterator[Ask]:
    """Asks the node over one connection: `ask(op="get", key="k")`."""
    with Talk(node.address) as talk:
        yield talk.ask


@pytest.fixture
def p() -> str:
    """A prefix that no other test uses."""
    return f"p{next(_prefixes)}/"


def ok(reply: dict[str, Any]) -> dict[str, Any]:
    """`reply`, which must not be a failure."""
    assert reply["ok"] is True, reply
    return reply


def failed(reply: dict[str, Any], code: str) -> str:
    """The sentence of `reply`, which must be a failure with `code`."""
    assert reply["ok"] is False and reply["error"] == code, reply
    message: str = reply["message"]
    assert message.endswith((".", "?")) and "Traceback" not in message
    return message


def keys(reply: dict[str, Any]) -> list[str]:
    """The keys of a scan's items."""
    return [item["key"] for item in ok(reply)["items"]]


# ------------------------------------------------------------- put and get


def test_what_was_put_is_got_with_its_revision_and_version(ask: Ask, p: str) -> None:
    first = ok(ask(op="put", key=p + "a", value="one"))
    second = ok(ask(op="put", key=p + "a", value="two"))
    assert (first["version"], second["version"]) == (1, 2) and second["rev"] > first["rev"]
    assert ask(op="get", key=p + "a") == {
        "ok": True, "found": True, "key": p + "a", "value": "two",
        "rev": second["rev"], "created": first["rev"], "version": 2,
    }  # fmt: skip


def test_an_absent_key_is_not_found_and_no_failure(ask: Ask, p: str) -> None:
    reply = ok(ask(op="get", key=p + "never"))
    assert reply["found"] is False and reply["key"] == p + "never"
    assert (reply["value"], reply["rev"], reply["created"], reply["version"]) == (None, 0, 0, 0)


def test_a_key_that_is_created_again_begins_anew(ask: Ask, p: str) -> None:
    born = ok(ask(op="put", key=p + "a", value=1))["rev"]
    ok(ask(op="put", key=p + "a", value=2))
    ok(ask(op="delete", key=p + "a"))
    again = ok(ask(op="put", key=p + "a", value=3))
    got = ok(ask(op="get", key=p + "a"))
    assert again["version"] == got["version"] == 1
    assert got["created"] == got["rev"] == again["rev"] > born


VALUES: list[Any] = [
    None, True, False, 0, -0.0, 1, -1, 1.5, 1e300, 5e-324, 2**63, -(2**200), 10**4299, "", "x", "zwölf 🐬 \u0000\u001f\u2028",
    [], {}, [1, [2, [3]]], {"a": {"b": [None, True, 1.25, "x"]}}, {"": 0, "ключ": 1}, "x" * 100_000, list(range(10_000)),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:20] if value != 10**4299 else "4300 digits")
def test_any_json_value_comes_back_as_it_was(ask: Ask, p: str, value: Any) -> None:
    ok(ask(op="put", key=p + "v", value=value))
    got = ok(ask(op="get", key=p + "v"))["value"]
    assert type(got) is type(value) and got == value
    if type(value) is float:
        assert math.copysign(1, got) == math.copysign(1, value)


def test_the_deepest_value_that_may_be_sent_comes_back(ask: Ask, p: str) -> None:
    deep: Any = 0
    for _ in range(127):  # and the request around it is the 128th level
        deep = [deep]
    ok(ask(op="put", key=p + "deep", value=deep))
    assert ok(ask(op="get", key=p + "deep"))["value"] == deep
    assert ok(ask(op="scan", prefix=p))["items"][0]["value"] == deep
    assert "128" in failed(ask(op="put", key=p + "deep", value=[deep]), "bad_request")


def test_the_last_of_two_equal_names_counts(node: NodeServer, p: str) -> None:
    with Talk(node.address) as talk:
        talk.send(frame(b'{"op":"put","key":"%bwrong","key":"%ba","value":1,"value":2}' % (p.encode(), p.encode())))
        ok(talk.reply())
        assert talk.ask(op="get", key=p + "a")["value"] == 2
        assert talk.ask(op="count", prefix=p)["count"] == 1


@pytest.mark.parametrize(
    "key", ["a", "a/b c", "ключ", "🐬", "\u0000", "\n", '"\\', "x" * 4096, "é" * 2048, "🐬" * 1024]
)
def test_any_string_of_up_to_4096_bytes_is_a_key(ask: Ask, key: str) -> None:
    ok(ask(op="put", key=key, value=key))
    got = ok(ask(op="get", key=key))
    assert got["key"] == got["value"] == key
    assert ok(ask(op="delete", key=key))["deleted"] == 1


@pytest.mark.parametrize("key", ["x" * 4097, "é" * 2049, "🐬" * 1025, "x" * 100_000])
def test_a_key_over_4096_bytes_is_too_large(ask: Ask, key: str) -> None:
    for request in ({"op": "put", "value": 1}, {"op": "get"}, {"op": "delete"}, {"op": "incr"}):
        assert "4096" in failed(ask(**request, key=key), "too_large")


def test_unknown_fields_are_ignored(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "a", value=1, colour="red", ttl=None))
    assert ok(ask(op="get", key=p + "a", verbose=True))["value"] == 1


# ------------------------------------------------------------------ delete


def test_delete_says_whether_there_was_something(ask: Ask, p: str) -> None:
    put = ok(ask(op="put", key=p + "a", value=1))
    deleted = ok(ask(op="delete", key=p + "a"))
    assert deleted["deleted"] == 1 and deleted["rev"] > put["rev"]
    assert ok(ask(op="delete", key=p + "a"))["deleted"] == 0
    assert ok(ask(op="get", key=p + "a"))["found"] is False


# -------------------------------------------------------------- conditions


def holds(ask: Ask, key: str, condition: Any) -> bool:
    """Whether `condition` holds for `key`, by an operation that changes nothing either way."""
    return bool(ok(ask(op="txn", **{"if": [{"key": key, **condition}], "then": [], "else": []}))["succeeded"])


def test_a_put_whose_condition_holds_says_applied(ask: Ask, p: str) -> None:
    reply = ok(ask(op="put", key=p + "a", value=1, **{"if": {"exists": False}}))
    assert reply["applied"] is True and reply["version"] == 1
    reply = ok(ask(op="put", key=p + "a", value=2, **{"if": [{"rev": reply["rev"]}, {"version": 1}, {"value": 1}]}))
    assert reply["applied"] is True and ask(op="get", key=p + "a")["value"] == 2


def test_a_put_whose_condition_fails_changes_nothing_and_shows_what_is_there(ask: Ask, p: str) -> None:
    rev = ok(ask(op="put", key=p + "a", value={"n": 1}))["rev"]
    reply = ok(ask(op="put", key=p + "a", value=2, **{"if": [{"exists": True}, {"rev": rev + 1}]}))
    assert reply == {"ok": True, "applied": False, "found": True, "value": {"n": 1}, "rev": rev}
    assert ok(ask(op="get", key=p + "a")) | {"key": ""} == {
        "ok": True, "found": True, "key": "", "value": {"n": 1}, "rev": rev, "created": rev, "version": 1,
    }  # fmt: skip
    reply = ok(ask(op="put", key=p + "none", value=2, **{"if": {"exists": True}}))
    assert (reply["applied"], reply["found"], reply["rev"]) == (False, False, 0)


def test_a_delete_keeps_to_its_condition(ask: Ask, p: str) -> None:
    rev = ok(ask(op="put", key=p + "a", value=1))["rev"]
    reply = ok(ask(op="delete", key=p + "a", **{"if": {"rev": rev - 1}}))
    assert (reply["applied"], reply["found"], reply["value"], reply["rev"]) == (False, True, 1, rev)
    reply = ok(ask(op="delete", key=p + "a", **{"if": {"rev": rev}}))
    assert (reply["applied"], reply["deleted"]) == (True, 1)


def test_a_condition_may_look_at_another_key(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "lock", value="mine"))
    condition = {"key": p + "lock", "value": "mine"}
    assert ok(ask(op="put", key=p + "a", value=1, **{"if": condition}))["applied"] is True
    assert ok(ask(op="put", key=p + "a", value=2, **{"if": condition | {"op": "!="}}))["applied"] is False


def test_an_empty_list_of_conditions_holds(ask: Ask, p: str) -> None:
    assert ok(ask(op="put", key=p + "a", value=1, **{"if": []}))["applied"] is True


def test_an_absent_key_has_revision_and_version_0_and_no_value(ask: Ask, p: str) -> None:
    assert holds(ask, p + "a", {"rev": 0}) and holds(ask, p + "a", {"version": 0})
    assert holds(ask, p + "a", {"exists": False}) and not holds(ask, p + "a", {"exists": True})
    assert not holds(ask, p + "a", {"value": None}) and holds(ask, p + "a", {"value": None, "op": "!="})
    assert not holds(ask, p + "a", {"rev": 0, "op": ">"}) and holds(ask, p + "a", {"rev": 1, "op": "<"})


def test_revisions_and_versions_compare_as_numbers(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "a", value=1))
    rev = ok(ask(op="put", key=p + "a", value=1))["rev"]
    for subject, at in (("rev", rev), ("version", 2)):
        expected = {("=", 0): True, ("!=", 0): False, ("<", 1): True, (">", -1): True, ("<", 0): False, (">", 0): False}
        for (op, beside), outcome in expected.items():
            assert holds(ask, p + "a", {subject: at + beside, "op": op}) is outcome, (subject, op, beside)


EQUAL = [
    (1, 1.0), (0, -0.0), (10**20, 1e20), (True, True), (None, None), ("é", "\u00e9"), ([1, 2.0], [1.0, 2]),
    ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}), ({}, {}), ([], []),
]  # fmt: skip
UNEQUAL = [
    (1, True), (0, False), (0, None), ("", None), ("1", 1), ([1, 2], [2, 1]), ([], {}), ({"a": None}, {}), ({"a": 1}, {"a": 2}),
    (2**53 + 1, float(2**53)), ("e\u0301", "\u00e9"), ([True], [1]), ({"a": [0]}, {"a": [False]}), ("a", "A"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "other"), EQUAL, ids=repr)
def test_values_are_equal_as_json_says(ask: Ask, p: str, value: Any, other: Any) -> None:
    for held, wanted in ((value, other), (other, value)):
        ok(ask(op="put", key=p + "a", value=held))
        assert holds(ask, p + "a", {"value": wanted}) and not holds(ask, p + "a", {"value": wanted, "op": "!="})


@pytest.mark.parametrize(("value", "other"), UNEQUAL, ids=repr)
def test_values_are_different_as_json_says(ask: Ask, p: str, value: Any, other: Any) -> None:
    for held, wanted in ((value, other), (other, value)):
        ok(ask(op="put", key=p + "a", value=held))
        assert not holds(ask, p + "a", {"value": wanted}) and holds(ask, p + "a", {"value": wanted, "op": "!="})


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1, 2),
        (-1.5, 0),
        (1, 1.5),
        (2**53, 2**53 + 1),
        (1e300, 10**400),
        ("a", "b"),
        ("Z", "a"),
        ("", "a"),
        ("z", "é"),
        ("\ufffd", "🐬"),
    ],
)
def test_numbers_and_strings_have_an_order(ask: Ask, p: str, low: Any, high: Any) -> None:
    ok(ask(op="put", key=p + "a", value=low))
    assert holds(ask, p + "a", {"value": high, "op": "<"}) and not holds(ask, p + "a", {"value": high, "op": ">"})
    assert not holds(ask, p + "a", {"value": low, "op": "<"}) and not holds(ask, p + "a", {"value": low, "op": ">"})
    ok(ask(op="put", key=p + "a", value=high))
    assert holds(ask, p + "a", {"value": low, "op": ">"}) and not holds(ask, p + "a", {"value": low, "op": "<"})


@pytest.mark.parametrize(
    ("value", "other"), [("1", 2), (True, 2), (None, 0), ([1], [2]), ({"a": 1}, {"a": 2}), (False, True)]
)
def test_between_other_values_there_is_no_order(ask: Ask, p: str, value: Any, other: Any) -> None:
    for held, wanted in ((value, other), (other, value)):
        ok(ask(op="put", key=p + "a", value=held))
        assert not holds(ask, p + "a", {"value": wanted, "op": "<"}) and not holds(
            ask, p + "a", {"value": wanted, "op": ">"}
        )


# ----------------------------------------------------------- scan and count


@pytest.fixture
def ten(ask: Ask, p: str) -> str:
    """Ten keys p/0 … p/9 with their digit as the value; the prefix."""
    ok(ask(op="batch", ops=[{"op": "put", "key": f"{p}{n}", "value": n} for n in range(10)]))
    return p


def test_a_scan_shows_items_like_gets(ask: Ask, ten: str) -> None:
    reply = ok(ask(op="scan", prefix=ten))
    got = [ask(op="get", key=f"{ten}{n}") for n in range(10)]
    assert reply["items"] == [
        {name: value for name, value in one.items() if name not in ("ok", "found")} for one in got
    ]
    assert reply["more"] is False and reply["rev"] >= got[0]["rev"]


def test_start_is_in_a_range_and_end_is_not(ask: Ask, ten: str) -> None:
    assert keys(ask(op="scan", start=ten + "3", end=ten + "6")) == [ten + "3", ten + "4", ten + "5"]
    assert keys(ask(op="scan", start=ten + "6", end=ten + "3")) == []
    assert keys(ask(op="scan", start=ten + "8", end=ten + "8")) == []
    assert keys(ask(op="scan", start=ten + "8", limit=2)) == [ten + "8", ten + "9"]
    assert keys(ask(op="scan", start=ten + "35", end=ten + "5")) == [ten + "4"]


def test_a_limit_cuts_a_scan_and_says_so(ask: Ask, ten: str) -> None:
    reply = ok(ask(op="scan", prefix=ten, limit=3))
    assert keys(reply) == [ten + "0", ten + "1", ten + "2"] and reply["more"] is True
    assert ok(ask(op="scan", prefix=ten, limit=10))["more"] is False
    for limit in (0, -1, 10_001, 1.0, "3", True, None, []):
        failed(ask(op="scan", prefix=ten, limit=limit), "bad_request")


def test_reverse_scans_from_the_end(ask: Ask, ten: str) -> None:
    reply = ok(ask(op="scan", prefix=ten, reverse=True, limit=2))
    assert keys(reply) == [ten + "9", ten + "8"] and reply["more"] is True
    assert keys(ask(op="scan", start=ten + "1", end=ten + "3", reverse=True)) == [ten + "2", ten + "1"]


def test_keys_only_leaves_the_values_out(ask: Ask, ten: str) -> None:
    item = ok(ask(op="scan", prefix=ten, keys_only=True, limit=1))["items"][0]
    assert "value" not in item and item["key"] == ten + "0" and item["version"] == 1 and item["created"] == item["rev"]


def test_a_scan_can_be_walked_in_pages(ask: Ask, ten: str) -> None:
    seen: list[str] = []
    start, more = ten, True
    while more:
        reply = ok(ask(op="scan", start=start, end=ten + "~", limit=3))
        seen += keys(reply)
        start, more = seen[-1] + "\u0000", reply["more"]
    assert seen == [f"{ten}{n}" for n in range(10)]


def test_keys_are_ordered_by_their_utf8_bytes(ask: Ask, p: str) -> None:
    names = [
        "",
        "0",
        "A",
        "Z",
        "a",
        "aa",
        "b",
        "~",
        "é",
        "ключ",
        "\ud7ff",
        "\ue000",
        "\uffff",
        "\U00010000",
        "🐬",
        "\U0010ffff",
        "a\u0000",
        "a/",
    ]
    ok(ask(op="batch", ops=[{"op": "put", "key": p + name, "value": 0} for name in names if p + name]))
    expected = sorted((p + name for name in names), key=str.encode)
    assert keys(ask(op="scan", prefix=p)) == expected
    assert keys(ask(op="scan", prefix=p, reverse=True)) == expected[::-1]


@pytest.mark.parametrize("last", ["a", "\u007f", "\ud7ff", "\uffff", "\U0010ffff", "\U0010ffff\U0010ffff"])
def test_a_prefix_takes_all_that_begins_with_it_and_nothing_else(ask: Ask, p: str, last: str) -> None:
    prefix = p + last
    inside = [prefix, prefix + "\u0000", prefix + "x", prefix + "\U0010ffff"]
    for key in [*inside, p, p + "!", p[:-1] + "0"]:
        ok(ask(op="put", key=key, value=0))
    assert sorted(keys(ask(op="scan", prefix=prefix))) == sorted(inside)
    assert ok(ask(op="count", prefix=prefix))["count"] == 4


def test_count_counts_what_scan_lists(ask: Ask, ten: str) -> None:
    assert ok(ask(op="count", prefix=ten))["count"] == 10
    assert ok(ask(op="count", start=ten + "3", end=ten + "6"))["count"] == 3
    assert ok(ask(op="count", prefix=ten + "x"))["count"] == 0
    everything = ok(ask(op="count"))
    assert everything["count"] == ok(ask(op="count", prefix=""))["count"] >= 10 and everything["rev"] > 0


def test_prefix_and_start_exclude_each_other(ask: Ask, ten: str) -> None:
    for op in ("scan", "count"):
        failed(ask(op=op, prefix=ten, start=ten), "bad_request")
        failed(ask(op=op, prefix=ten, end=ten), "bad_request")


# -------------------------------------------------------------------- incr


def test_incr_counts_from_0(ask: Ask, p: str) -> None:
    assert [ok(ask(op="incr", key=p + "n"))["value"] for _ in range(3)] == [1, 2, 3]
    reply = ok(ask(op="incr", key=p + "n", by=-5))
    assert (reply["value"], reply["version"]) == (-2, 4)
    assert ok(ask(op="incr", key=p + "n", by=0))["value"] == -2
    assert ok(ask(op="get", key=p + "n"))["value"] == -2


def test_incr_knows_no_overflow(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "n", value=2**64 - 1))
    assert ok(ask(op="incr", key=p + "n", by=2**64))["value"] == 2**65 - 1
    ok(ask(op="put", key=p + "n", value=10**4300 - 1))
    failed(ask(op="incr", key=p + "n"), "bad_request")
    assert ok(ask(op="get", key=p + "n"))["value"] == 10**4300 - 1


@pytest.mark.parametrize("value", ["1", 1.0, 1.5, None, True, [1], {}])
def test_only_integers_can_be_incremented(ask: Ask, p: str, value: Any) -> None:
    put = ok(ask(op="put", key=p + "n", value=value))
    failed(ask(op="incr", key=p + "n"), "bad_request")
    got = ok(ask(op="get", key=p + "n"))
    assert got["value"] == value and got["rev"] == put["rev"]


def test_the_step_of_incr_is_a_whole_number(ask: Ask, p: str) -> None:
    for by in (1.0, "1", None, True, [], {}):
        failed(ask(op="incr", key=p + "n", by=by), "bad_request")
    assert ok(ask(op="get", key=p + "n"))["found"] is False


# ------------------------------------------------------------ batch and txn


def test_a_batch_is_one_entry(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "old", value=1))
    reply = ok(
        ask(
            op="batch",
            ops=[
                {"op": "put", "key": p + "a", "value": 1},
                {"op": "delete", "key": p + "old"},
                {"op": "put", "key": p + "b", "value": 2},
            ],
        )
    )
    items = ok(ask(op="scan", prefix=p))["items"]
    assert [(item["key"], item["rev"]) for item in items] == [(p + "a", reply["rev"]), (p + "b", reply["rev"])]


def test_a_batch_with_one_bad_operation_does_nothing(ask: Ask, p: str) -> None:
    good = {"op": "put", "key": p + "a", "value": 1}
    for bad in (
        {"op": "put", "key": "", "value": 1},
        {"op": "put", "key": p},
        {"op": "incr", "key": p},
        {"op": "get", "key": p},
        {},
        7,
        None,
    ):
        failed(ask(op="batch", ops=[good, bad]), "bad_request")
    failed(ask(op="batch", ops=[good, {"op": "put", "key": "x" * 5000, "value": 1}]), "too_large")
    assert ok(ask(op="count", prefix=p))["count"] == 0


def test_a_batch_of_nothing_is_done(ask: Ask) -> None:
    assert ok(ask(op="batch", ops=[]))["rev"] > 0


def test_a_txn_runs_then_where_all_conditions_hold_and_else_where_not(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "from", value=70))
    txn = {
        "if": [{"key": p + "from", "value": 50, "op": ">"}, {"key": p + "to", "exists": False}],
        "then": [{"op": "incr", "key": p + "from", "by": -50}, {"op": "incr", "key": p + "to", "by": 50}],
        "else": [{"op": "get", "key": p + "from"}],
    }
    reply = ok(ask(op="txn", **txn))
    assert reply["succeeded"] is True and [result["value"] for result in reply["results"]] == [20, 50]
    assert {item["rev"] for item in ask(op="scan", prefix=p)["items"]} == {reply["rev"]}
    reply = ok(ask(op="txn", **txn))
    assert reply["succeeded"] is False
    assert [(result["found"], result["value"]) for result in reply["results"]] == [(True, 20)]


def test_each_operation_of_a_txn_sees_those_before_it(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "z", value=0))
    reply = ok(ask(op="txn", then=[
        {"op": "put", "key": p + "a", "value": 1},
        {"op": "get", "key": p + "a"},
        {"op": "incr", "key": p + "a"},
        {"op": "delete", "key": p + "z"},
        {"op": "delete", "key": p + "z"},
        {"op": "count", "prefix": p},
        {"op": "scan", "prefix": p},
        {"op": "get", "key": p + "z"},
    ]))  # fmt: skip
    put, get, incr, first, second, counted, scanned, gone = reply["results"]
    assert all(result["ok"] for result in reply["results"])
    assert put["rev"] == get["rev"] == incr["rev"] == reply["rev"]
    assert (get["value"], incr["value"]) == (1, 2)
    assert (first["deleted"], second["deleted"]) == (1, 0)
    assert counted["count"] == 1 and keys(scanned) == [p + "a"] and gone["found"] is False


def test_a_txn_that_fails_halfway_has_not_happened(ask: Ask, p: str) -> None:
    before = ok(ask(op="put", key=p + "text", value="x"))
    failed(
        ask(op="txn", then=[
            {"op": "put", "key": p + "new", "value": 1},
            {"op": "delete", "key": p + "text"},
            {"op": "put", "key": p + "text", "value": "y"},
            {"op": "incr", "key": p + "text"},
        ]),
        "bad_request",
    )  # fmt: skip
    items = ok(ask(op="scan", prefix=p))["items"]
    assert [(i["key"], i["value"], i["rev"], i["version"]) for i in items] == [(p + "text", "x", before["rev"], 1)]


def test_a_txn_needs_no_part(ask: Ask) -> None:
    reply = ok(ask(op="txn"))
    assert reply["succeeded"] is True and reply["results"] == []
    reply = ok(ask(op="txn", **{"if": [{"key": "never", "exists": True}]}))
    assert reply["succeeded"] is False and reply["results"] == []


# ----------------------------------------------------------- reads and time


def test_a_stale_read_says_how_old_it_may_be(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "a", value=1))
    for request in ({"op": "get", "key": p + "a"}, {"op": "scan", "prefix": p}, {"op": "count", "prefix": p}):
        reply = ok(ask(**request, read="stale", max_lag=60))
        assert reply["lag"] >= 0
        assert "lag" not in ok(ask(**request, read="linearizable"))
    assert ask(op="get", key=p + "a", read="stale")["value"] == 1
    for bad in ("fresh", "", None, 1, True, ["stale"]):
        failed(ask(op="get", key=p + "a", read=bad), "bad_request")
    for bad in (-1, "1", True, []):
        failed(ask(op="get", key=p + "a", read="stale", max_lag=bad), "bad_request")


@pytest.mark.parametrize("bad", [0, -1, 3601, 10**400, "5", None, True, [5], {}])
def test_a_timeout_is_seconds_above_0(ask: Ask, p: str, bad: Any) -> None:
    for request in ({"op": "put", "key": p, "value": 1}, {"op": "get", "key": p}, {"op": "status"}):
        failed(ask(**request, timeout=bad), "bad_request")
    assert ok(ask(op="get", key=p))["found"] is False


def test_a_timeout_may_be_a_fraction(ask: Ask, p: str) -> None:
    ok(ask(op="put", key=p + "a", value=1, timeout=2.5))
    ok(ask(op="get", key=p + "a", timeout=3600))


def test_the_node_alone_needs_no_forwarding(ask: Ask, p: str) -> None:
    reply = ok(ask(op="put", key=p + "a", value=1, forward=False))
    assert "leader" not in reply and "leader" not in ok(ask(op="get", key=p + "a"))


def test_revisions_only_grow(ask: Ask, p: str) -> None:
    revs = [ok(ask(op="put", key=p + "a", value=n))["rev"] for n in range(20)]
    revs += [
        ok(ask(op="incr", key=p + "n"))["rev"],
        ok(ask(op="delete", key=p + "a"))["rev"],
        ok(ask(op="batch", ops=[]))["rev"],
    ]
    assert revs == sorted(set(revs))
    assert ok(ask(op="count", prefix=p))["rev"] >= revs[-1]


# ------------------------------------------------------------ the envelope


@pytest.mark.parametrize(
    "id",
    [0, 7, -1.5, "x", "", None, True, [], {"a": [1, "é"]}, 10**4299],
    ids=lambda id: str(id)[:9] if id != 10**4299 else "4300 digits",
)
def test_an_id_is_echoed_in_every_kind_of_reply(ask: Ask, p: str, id: Any) -> None:
    for request in (
        {"op": "put", "key": p, "value": 1},
        {"op": "get", "key": p},
        {"op": "ping"},
        {"op": "get"},
        {"op": "nonsense"},
        {},
    ):
        reply = ask(**request, id=id)
        assert reply["id"] == id and type(reply["id"]) is type(id)
    assert "id" not in ask(op="get", key=p)


def test_replies_come_in_the_order_of_the_requests(node: NodeServer, p: str) -> None:
    requests: list[Any] = []
    for n in range(300):
        requests += [
            {"op": "put", "key": p + "k", "value": n, "id": len(requests)},
            {"op": "get", "key": p + "k", "id": len(requests) + 1, "read": "stale" if n % 3 == 0 else "linearizable"},
            {"op": "nonsense", "id": len(requests) + 2},
            {"op": "incr", "key": p + "n", "id": len(requests) + 3},
        ]
    with Talk(node.address) as talk:
        talk.send(b"".join(map(frame, requests)))
        replies = [talk.reply() for _ in requests]
    assert [reply["id"] for reply in replies] == list(range(len(requests)))
    assert [reply["value"] for reply in replies[3::4]] == list(range(1, 301))
    assert not any(reply["ok"] for reply in replies[2::4])
    # What was not acknowledged when a read was sent, the read may see or not; but no read sees less than one before it.
    seen = [-1 if reply["value"] is None else reply["value"] for n, reply in enumerate(replies[1::4]) if n % 3]
    assert seen == sorted(seen)
    with Talk(node.address) as talk:
        assert talk.ask(op="get", key=p + "k")["value"] == 299


LATER = ["watch", "backup", "trace"]


@pytest.mark.parametrize("op", LATER)
def test_what_is_reserved_says_so(ask: Ask, op: str) -> None:
    assert op in failed(ask(op=op, key="a", prefix="", ttl=5, lease=1, client="x"), "bad_request")


# ------------------------------------------------------------- the cluster


def test_ping_names_the_node(ask: Ask) -> None:
    reply = ok(ask(op="ping"))
    assert reply["node"] == "n1" and reply["time"] > 1.6e9


def test_status_tells_what_the_contract_names(ask: Ask, node: NodeServer) -> None:
    rev = ok(ask(op="put", key="status/a", value=1))["rev"]
    status = ok(ask(op="status"))
    assert status["node"] == "n1" and status["role"] == "leader" and status["election"] == "bully"
    assert status["leader"] == {"name": "n1", "address": node.address}
    assert status["term"] >= 1 and status["uptime"] >= 0 and status["keys"] >= 1
    assert isinstance(status["id"], str) and isinstance(status["cluster"], str) and isinstance(status["version"], str)
    log = status["log"]
    assert log["first"] <= rev <= log["applied"] <= log["commit"] <= log["last"] and log["persisted"] <= log["last"]
    assert [(m["name"], m["role"], m["address"]) for m in status["members"]] == [("n1", "voter", node.address)]
    assert 0 <= status["snapshot"]["rev"] <= log["applied"]


def test_members_lists_this_one_alive(ask: Ask, node: NodeServer) -> None:
    (member,) = ok(ask(op="members"))["members"]
    assert (member["name"], member["role"], member["address"], member["alive"]) == ("n1", "voter", node.address, True)
    assert member["match"] >= 1 and member["last_heard"] >= 0


def test_a_snapshot_says_what_it_covers(ask: Ask) -> None:
    rev = ok(ask(op="put", key="snapshot/a", value=1))["rev"]
    assert ok(ask(op="snapshot", timeout=20))["rev"] >= rev
    assert ok(ask(op="status"))["snapshot"]["rev"] >= rev


def test_the_log_shows_what_was_written(ask: Ask, p: str) -> None:
    rev = ok(ask(op="put", key=p + "a", value={"n": [1]}))["rev"]
    ok(ask(op="delete", key=p + "a"))
    entries = ok(ask(op="log", **{"from": rev, "limit": 2}))["entries"]
    assert [entry["index"] for entry in entries] == [rev, rev + 1]
    assert entries[0]["command"] == ["put", p + "a", {"n": [1]}]
    assert entries[1]["command"] == ["delete", p + "a"]
    assert len(json.dumps(ok(ask(op="log"))["entries"])) > 0
    assert ok(ask(op="log", **{"from": 2**62 - 1}))["entries"] == []
    assert ok(ask(op="log", limit=0))["entries"] == []
    for bad in (
        {"from": -1},
        {"from": "1"},
        {"from": 1.5},
        {"limit": -1},
        {"limit": "all"},
        {"limit": 10**9},
        {"from": 2**70},
    ):
        failed(ask(op="log", **bad), "bad_request")


def test_a_node_alone_keeps_its_only_member_and_leader(ask: Ask) -> None:
    failed(ask(op="member_remove", name="n1"), "bad_request")
    failed(ask(op="member_remove", name="nobody"), "bad_request")
    failed(ask(op="transfer"), "bad_request")
    failed(ask(op="transfer", to="nobody"), "bad_request")
    for bad in (None, 7, "", [], {}):
        failed(ask(op="member_remove", name=bad), "bad_request")
        failed(ask(op="member_promote", name=bad), "bad_request")
    assert ok(ask(op="status"))["role"] == "leader"


def test_all_that_was_acknowledged_is_there_after_kill_9(node: NodeServer, p: str) -> None:
    with Talk(node.address) as talk:
        for n in range(50):
            ok(talk.ask(op="put", key=f"{p}{n:02}", value=n))
        before = talk.ask(op="scan", prefix=p)
    node.restart()
    wait_leading(node)
    with Talk(node.address) as talk:
        assert talk.ask(op="scan", prefix=p)["items"] == before["items"]


# -------------------------------------------------------------- pipelining


def test_a_pipelined_read_shows_the_write_before_it_and_not_the_one_behind(node: NodeServer, p: str) -> None:
    with Talk(node.address) as talk:
        for number in range(20):
            reads = {"op": "get", "key": p + "n", **({"read": "stale"} if number % 2 else {})}
            talk.send(frame({"op": "incr", "key": p + "n"}) + frame(reads))
        talk.finish()
        values = [ok(json.loads(talk.frame()))["value"] for _ in range(40)]
    assert values == [number for n in range(1, 21) for number in (n, n)]


def test_a_bad_request_in_a_pipeline_fails_alone(node: NodeServer, p: str) -> None:
    with Talk(node.address) as talk:
        talk.send(
            frame({"op": "put", "key": p + "a", "value": 1}),
            frame({"op": "get", "key": ""}),
            frame({"op": "put", "key": p + "a"}),
            frame({"op": "get", "key": p + "a"}),
        )
        replies = [json.loads(talk.frame()) for _ in range(4)]
    assert [reply["ok"] for reply in replies] == [True, False, False, True]
    assert replies[3]["value"] == 1
