"""Histories: what their operations mean, and the files that keep them."""

from __future__ import annotations

import json

import pytest

from ddb.history import BadHistory, Operation, Outcome, from_lines, to_lines, validate
from tests.histories import Load, got, op, simulate

PUT = {"op": "put", "key": "a", "value": 1}


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ({"ok": True, "rev": 1}, Outcome.DONE),
        (None, Outcome.UNKNOWN),
        ({"ok": False, "error": "timeout"}, Outcome.UNKNOWN),
        ({"ok": False, "error": "internal"}, Outcome.UNKNOWN),
        ({"ok": False, "error": "of a later version"}, Outcome.UNKNOWN),
        ({"ok": False}, Outcome.UNKNOWN),
        ({"ok": False, "error": "no_leader"}, Outcome.NOT_DONE),
        ({"ok": False, "error": "unreachable"}, Outcome.NOT_DONE),
    ],
)
def test_only_a_definite_error_says_that_nothing_was_done(reply: dict[str, object] | None, outcome: Outcome) -> None:
    assert Operation("c1", PUT, 0, 1, reply).outcome is outcome


def test_a_history_comes_back_from_its_file() -> None:
    history = simulate(1, Load(200, 5, keys=3, unknown=0.2, various=True))
    history.append(op("c ü\n", 0.5, 1.5, 'put "k" "ü\\u2028"'))
    lines = list(to_lines(history))
    assert all("\n" not in line and next(iter(json.loads(line))) == "client" for line in lines)
    assert from_lines(line + "\n" for line in lines) == history
    assert from_lines(["", *lines, "\n"]) == history


GOOD_LINE = '{"client":"c1","call":1,"return":2,"request":{"op":"get","key":"a"},"reply":{"ok":true}}'


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "7",
        "{}",
        "[" * 100_000,
        GOOD_LINE.replace('"c1"', "7"),
        GOOD_LINE.replace('"call":1', '"call":"1"'),
        GOOD_LINE.replace('"call":1', '"call":NaN'),
        GOOD_LINE.replace('"call":1', '"call":true'),
        GOOD_LINE.replace('"call":1', '"call":3'),
        GOOD_LINE.replace('"call":1', '"call":-1e999'),
        GOOD_LINE.replace('"return":2', '"return":' + "9" * 400),
        GOOD_LINE.replace('"return":2', '"return":null'),
        GOOD_LINE.replace('{"op":"get","key":"a"}', "[]"),
        GOOD_LINE.replace('{"ok":true}', "[]"),
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_operation_is_named(line: str) -> None:
    with pytest.raises(BadHistory, match="Line 2 "):
        from_lines([GOOD_LINE, line])


def test_what_never_returned_needs_no_time_of_its_return() -> None:
    validate(Operation("c1", PUT, 0))
    validate(Operation("c1", PUT, 0, 1))
    with pytest.raises(BadHistory):
        validate(Operation("c1", PUT, 0, None, {"ok": True}))


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (op("c1", 0, 1, "put a 1", rev=3, version=1), "c1: put a=1 → ok (rev 3, version 1)"),
        (op("c1", 0, None, "put a 1"), "c1: put a=1 → unknown"),
        (Operation("c1", PUT, 0, 1, {"ok": False, "error": "no_leader"}), "c1: put a=1 → not done"),
        (got("c1", 0, 1, "a", None), "c1: get a → absent"),
        (got("c1", 0, 1, "a", "x", rev=4), 'c1: get a → "x" (rev 4)'),
        (op("c1", 0, 1, "incr a 2", value=7), "c1: incr a by 2 → 7"),
        (op("c1", 0, 1, "delete a", deleted=0), "c1: delete a → nothing to delete"),
        (op("c1", 0, 1, "cas a 1 2", applied=False), "c1: cas a 1→2 → not applied"),
        (
            op("c1", 0, 1, '{"op":"put","key":"a","value":1,"if":[{"rev":3},{"key":"b","exists":true,"op":"!="}]}'),
            "c1: put a=1 if rev=3 if b.exists!=true → ok",
        ),
        (
            op(
                "c1", 0, 1,
                '{"op":"txn","if":[{"key":"a","rev":1}],"then":[{"op":"get","key":"a"}],"else":[{"op":"delete","key":"b"}]}',
                succeeded=False, results=[{"ok": True, "deleted": 1}], rev=4,
            ),
            "c1: txn [get a] else [delete b] if a.rev=1 → else [deleted] (rev 4)",
        ),
        (op("c1", 0, 1, '{"op":"batch","ops":[{"op":"put","key":"a","value":1}]}'), "c1: batch [put a=1] → ok"),
        (op("c1", 0, 1, '{"op":"count","start":"a","end":"b"}', count=0), "c1: count a…b → 0"),
        (
            op("c1", 0, 1, '{"op":"scan","prefix":"k"}', items=[{"key": "k1", "value": 1}, {"key": "k2"}], more=True),
            "c1: scan k* → {k1=1, k2}…",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_an_operation_is_said_in_short(operation: Operation, text: str) -> None:
    assert str(operation) == text
