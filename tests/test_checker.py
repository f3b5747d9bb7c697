"""The linearizability checker: histories known to be good and bad, and random ones judged by brute force as well."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest

from ddb.checker import Verdict, check
from ddb.history import BadHistory, Operation, Outcome
from ddb.moves import components
from ddb.search import explains
from tests.histories import NOT_DONE, Load, Request, brute_force, got, op, simulate, spoil

GOOD: dict[str, list[Operation]] = {
    "nothing at all": [],
    "a write and a read of it": [op("c1", 0, 1, "put a 1"), got("c2", 2, 3, "a", 1)],
    "a read during a write, of the old value": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 6, "put a 2"),
        got("c2", 3, 4, "a", 1),
        got("c2", 5, 7, "a", 2),
    ],
    "a read at the very moment of a write's return": [op("c1", 0, 1, "put a 1"), got("c2", 1, 1, "a", None)],
    "two writes that overlap, in either order": [
        op("c1", 0, 5, "put a 1"),
        op("c2", 0, 5, "put a 2"),
        got("c3", 6, 7, "a", 1),
        got("c3", 8, 9, "a", 1),
    ],
    "a write that was seen before the first of two returned": [
        op("c1", 0, 9, "put a 1"),
        op("c2", 1, 3, "put a 2"),
        got("c3", 0.5, 8, "a", 1),
        got("c4", 4, 5, "a", 2),
        got("c4", 6, 9, "a", 2),
    ],
    "a write of unknown outcome that happened": [op("c1", 0, None, "put a 1"), got("c2", 2, 3, "a", 1)],
    "one that did not happen": [op("c1", 0, None, "put a 1"), got("c2", 2, 3, "a", None)],
    "one that happened long after": [
        op("c1", 0, None, "put a 1"),
        got("c2", 2, 3, "a", None),
        op("c2", 4, 5, "put a 2"),
        got("c2", 6, 7, "a", 2),
        got("c2", 8, 9, "a", 1),
    ],
    "an unknown incr that happened, and one that did not": [
        op("c1", 0, None, "incr n 1"),
        op("c2", 1, None, "incr n 1"),
        op("c3", 2, 3, "incr n 10", value=11),
    ],
    "a failed write that nobody saw": [
        Operation("c1", {"op": "put", "key": "a", "value": 1}, 0, 1, NOT_DONE),
        got("c2", 2, 3, "a", None),
    ],
    "a timeout that took effect": [
        Operation("c1", {"op": "put", "key": "a", "value": 1}, 0, 1, {"ok": False, "error": "timeout"}),
        got("c2", 5, 6, "a", 1),
    ],
    "a condition that held for one of two": [
        op("c1", 0, 3, '{"op":"put","key":"a","value":1,"if":{"exists":false}}', applied=True, rev=1),
        op("c2", 0, 3, '{"op":"put","key":"a","value":2,"if":{"exists":false}}', applied=False, value=1, rev=1),
    ],
    "a lock that was taken, let go and taken": [
        op("c1", 0, 1, "cas a null 1", applied=False),
        op("c1", 2, 3, "put a null"),
        op("c1", 4, 9, "cas a null 1", applied=True),
        op("c2", 5, 6, "cas a 1 2", applied=True),
        got("c3", 7, 8, "a", 2),
    ],
    "values that JSON says are equal": [
        op("c1", 0, 1, 'put a {"x":1,"y":[2]}'),
        op("c1", 2, 3, '{"op":"put","key":"a","value":2,"if":{"value":{"y":[2.0],"x":1.0}}}', applied=True),
    ],
    "a stale read that is called one": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 3, "put a 2"),
        op("c2", 4, 5, '{"op":"get","key":"a","read":"stale"}', found=True, value=1),
    ],
    "a scan and what it left out": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 3, "put b 1"),
        op("c2", 4, 5, '{"op":"scan","prefix":"","limit":1}', items=[{"key": "a", "value": 1}], more=True),
    ],
    "a revision of an unknown write between two known ones": [
        op("c1", 0, 1, "put a 1", rev=4),
        op("c2", 2, None, "put a 2"),
        got("c1", 3, 4, "a", 2, rev=6),
        op("c1", 5, 6, "put a 3", rev=7),
    ],
}

TXN_MOVE = (
    '{"op":"txn","if":[{"key":"a","value":1}],'
    '"then":[{"op":"put","key":"a","value":0},{"op":"put","key":"b","value":1}],"else":[]}'
)
BATCH = '{"op":"batch","ops":[{"op":"put","key":"a","value":1},{"op":"put","key":"b","value":1}]}'

BAD: dict[str, list[Operation]] = {
    "a stale read": [op("c1", 0, 1, "put a 1"), op("c1", 2, 3, "put a 2"), got("c2", 4, 5, "a", 1)],
    "reads that go back": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 9, "put a 2"),
        got("c2", 3, 4, "a", 2),
        got("c3", 5, 6, "a", 1),
    ],
    "a lost write": [op("c1", 0, 1, "put a 1"), got("c2", 2, 3, "a", None)],
    "a lost update": [
        op("c1", 0, 1, "put a 0"),
        op("c1", 2, 4, "cas a 0 1", applied=True),
        op("c2", 2, 4, "cas a 0 2", applied=True),
    ],
    "a lost incr": [op("c1", 0, 1, "incr n 1", value=1), op("c2", 0, 1, "incr n 1", value=1)],
    "an incr done twice": [op("c1", 0, 1, "incr n 1", value=1), op("c1", 2, 3, "incr n 1", value=3)],
    "an unknown incr done twice": [op("c1", 0, None, "incr n 1"), op("c1", 2, 3, "incr n 1", value=3)],
    "a value that nobody wrote": [op("c1", 0, 1, "put a 1"), got("c2", 2, 3, "a", 7)],
    "a dirty read of a failed write": [
        Operation("c1", {"op": "put", "key": "a", "value": 1}, 0, 3, NOT_DONE),
        got("c2", 1, 2, "a", 1),
    ],
    "a read from the future": [got("c2", 0, 1, "a", 1), op("c1", 2, 3, "put a 1")],
    "an unknown write seen before it was asked": [got("c2", 0, 1, "a", 1), op("c1", 2, None, "put a 1")],
    "an unknown write that came and went": [
        op("c1", 0, None, "put a 1"),
        got("c2", 2, 3, "a", 1),
        got("c2", 4, 5, "a", None),
    ],
    "an unknown write that came twice": [
        op("c1", 0, None, "put a 1"),
        got("c2", 2, 3, "a", 1),
        op("c2", 4, 5, "put a 2"),
        got("c2", 6, 7, "a", 1),
    ],
    "a deleted key that is still there": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 3, "delete a", deleted=1),
        got("c2", 4, 5, "a", 1),
    ],
    "a key deleted twice": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 3, "delete a", deleted=1),
        op("c2", 4, 5, "delete a", deleted=1),
    ],
    "a condition that failed for no reason": [
        op("c1", 0, 1, '{"op":"put","key":"a","value":1,"if":{"exists":false}}', applied=False)
    ],
    "a transaction half seen": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 9, TXN_MOVE, succeeded=True, results=[{"ok": True}, {"ok": True}]),
        got("c2", 3, 4, "b", 1),
        got("c2", 5, 6, "a", 1),
    ],
    "a transaction that saw half of another": [
        op("c1", 0, 5, BATCH),
        op(
            "c2", 1, 2, '{"op":"txn","then":[{"op":"get","key":"a"},{"op":"get","key":"b"}]}',
            succeeded=True, results=[{"ok": True, "found": True, "value": 1}, {"ok": True, "found": False}],
        ),
    ],
    "a transaction that took the wrong way": [
        op("c1", 0, 1, "put a 1"),
        op("c1", 2, 3, TXN_MOVE, succeeded=False, results=[]),
    ],
    "a scan of half a batch": [
        op("c1", 0, 5, BATCH),
        op("c2", 1, 2, '{"op":"scan","prefix":""}', items=[{"key": "b", "value": 1}], more=False),
    ],
    "a scan that leaves out": [
        op("c1", 0, 1, BATCH),
        op("c2", 2, 3, '{"op":"scan","prefix":""}', items=[{"key": "a", "value": 1}], more=False),
    ],
    "a count that is wrong": [op("c1", 0, 1, BATCH), op("c2", 2, 3, '{"op":"count","prefix":""}', count=1)],
    "the answer to another question": [op("c1", 0, 1, "get a", found=False, key="b")],
}  # fmt: skip

BAD_REVISIONS: dict[str, list[Operation]] = {
    "a version left out": [op("c1", 0, 1, "put a 1", version=1), op("c1", 2, 3, "put a 2", version=3)],
    "a version that came twice": [op("c1", 0, 5, "put a 1", version=1), op("c2", 0, 5, "put a 2", version=1)],
    "the revision of another write": [
        op("c1", 0, 5, "put a 1", rev=3),
        op("c2", 0, 5, "put a 2", rev=4),
        got("c3", 6, 7, "a", 2, rev=3),
    ],
    "a creation that never was": [op("c1", 0, 1, "put a 1", rev=3), got("c3", 6, 7, "a", 1, rev=3, created=2)],
    "revisions that go back": [op("c1", 0, 1, "put a 1", rev=4), op("c1", 2, 3, "put a 2", rev=3)],
    "an unknown write older than what was there": [
        op("c1", 0, 1, "put a 1", rev=4),
        op("c2", 2, None, "put a 2"),
        got("c1", 3, 4, "a", 2, rev=3),
    ],
    "an unknown write for which there is no revision": [
        op("c1", 0, 1, "put a 1", rev=4),
        op("c2", 2, None, "put a 2"),
        got("c1", 3, 4, "a", 2),
        op("c1", 5, 6, "put a 3", rev=5),
    ],
    "a condition on a revision": [
        op("c1", 0, 1, "put a 1", rev=4),
        op("c1", 2, 3, '{"op":"put","key":"a","value":2,"if":{"rev":3}}', applied=True, rev=5),
    ],
}

CONTRADICTIONS: dict[str, list[Operation]] = {
    "two writes have revision 7": [op("c1", 0, 1, "put a 1", rev=7), op("c2", 0, 1, "put b 1", rev=7)],
    "a later write has no higher revision": [op("c1", 0, 1, "put a 1", rev=7), op("c2", 2, 3, "put b 1", rev=6)],
    "a later read saw an older state": [
        op("c1", 0, 1, "put a 1", rev=7),
        op("c2", 2, 3, '{"op":"count","prefix":"b"}', count=0, rev=6),
    ],
    "at revision 7, a has two answers to its value": [
        op("c1", 0, 1, "put a 1", rev=7),
        op("c2", 2, 3, '{"op":"get","key":"a","read":"stale"}', found=True, value=2, rev=7),
    ],
}


def refuted(history: list[Operation], **options: Any) -> Verdict:
    verdict = check(history, **options)
    assert verdict.linearizable is False and not verdict.ok and verdict.counterexample is not None
    assert "Not linearizable" in str(verdict)
    return verdict


def assert_proved(verdict: Verdict, history: list[Operation]) -> None:
    """The orders of a verdict hold all that was done, and explain it, component by component."""
    assert verdict.linearizable is True
    assert str(verdict).startswith("Linearizable")
    found = components(history, True)
    assert len(found) == len(verdict.orders)
    for component, order in zip(found, verdict.orders, strict=True):
        numbers = {id(move.operation): number for number, move in enumerate(component.moves)}
        assert explains(component, [numbers[id(operation)] for operation in order])


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD.keys())
def test_a_good_history_is_explained(history: list[Operation]) -> None:
    verdict = check(history)
    assert verdict.ok
    assert_proved(verdict, history)


@pytest.mark.parametrize("history", BAD.values(), ids=BAD.keys())
def test_a_bad_history_is_refuted(history: list[Operation]) -> None:
    assert refuted(history).counterexample
    assert refuted(history, revisions=False).counterexample


@pytest.mark.parametrize("history", BAD_REVISIONS.values(), ids=BAD_REVISIONS.keys())
def test_wrong_revisions_refute_a_history_whose_values_are_right(history: list[Operation]) -> None:
    counterexample = refuted(history).counterexample
    assert counterexample is not None and counterexample.values_alone is True
    assert "The values alone could be" in str(counterexample)
    assert check(history, revisions=False).ok


@pytest.mark.parametrize("history", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_revisions_that_no_key_by_itself_refutes_are_contradictions(
    history: list[Operation], request: pytest.FixtureRequest
) -> None:
    verdict = check(history)
    assert verdict.linearizable is True and not verdict.ok
    assert [contradiction.rule for contradiction in verdict.contradictions] == [request.node.callspec.id]
    assert str(verdict).startswith("Linearizable, but for the revisions told")
    assert check(history, revisions=False).ok


@pytest.mark.parametrize("swapped", [False, True])
def test_an_order_that_breaks_the_times_or_a_reply_explains_nothing(swapped: bool) -> None:
    (component,) = components([*BAD["a stale read"][:2], got("c2", 4, 5, "a", 2)], True)
    assert explains(component, [0, 1, 2]) is True
    assert explains(component, [1, 0, 2] if swapped else [0, 2, 1]) is False
    assert explains(component, [0, 1]) is False
    assert explains(component, [0, 1, 2, 2]) is False


# ------------------------------------------------------------- the prefix


def test_the_culprit_ends_the_smallest_prefix_that_cannot_be_explained() -> None:
    history = simulate(3, Load(400, 8, keys=2, unknown=0.03))
    gets = [
        o for o in history if o.outcome is Outcome.DONE and o.request["op"] == "get" and o.reply and o.reply["found"]
    ]
    late = gets[150]
    early = next(o for o in gets if o.request["key"] == late.request["key"] and o.reply != late.reply)
    lie = replace(late, reply=early.reply)
    history = [lie if o is late else o for o in history]
    counterexample = refuted(history).counterexample
    assert counterexample is not None and counterexample.culprit is lie
    returned = late.returned or 0
    before = [o if (o.returned or 0) < returned else replace(o, reply=None) for o in history if o.called < returned]
    assert check(before).linearizable is True
    assert {id(o) for o in counterexample.explained if o.outcome is Outcome.DONE} == {
        id(o)
        for o in history
        if o.outcome is Outcome.DONE and (o.returned or 0) < returned and o.request["key"] == late.request["key"]
    }


def test_of_several_keys_the_first_to_go_wrong_is_shown() -> None:
    history = [
        op("c1", 0, 1, "put b 1"), op("c1", 0, 1, "put a 1"), op("c1", 0, 1, "put c 1"),
        got("c2", 6, 7, "a", 2), got("c3", 4, 5, "b", 2), got("c4", 6, 9, "c", 1),
    ]  # fmt: skip
    counterexample = refuted(history).counterexample
    assert counterexample is not None
    assert counterexample.keys == ("b",)
    assert counterexample.culprit is history[4]
    assert counterexample.rows == {"b": "1"} or counterexample.rows == {"b": ""}


def test_what_no_operation_connects_is_judged_apart() -> None:
    history = [op("c1", 0, 1, "put a 1"), op("c1", 2, 3, "put b 1"), op("c1", 4, 5, "put c 1")]
    assert [component.keys for component in components(history, True)] == [("a",), ("b",), ("c",)]
    history.append(op("c1", 6, 7, '{"op":"txn","if":{"key":"a","exists":true},"then":[{"op":"get","key":"c"}]}'))
    assert [component.keys for component in components(history, True)] == [("a", "c"), ("b",)]
    history.append(op("c1", 8, 9, '{"op":"count","start":"b","end":"c"}', count=1))
    assert [component.keys for component in components(history, True)] == [("a", "c"), ("b",)]
    history.append(op("c1", 8, 9, '{"op":"scan","prefix":""}', items=[], more=True))
    assert [component.keys for component in components(history, True)] == [("a", "b", "c")]


def test_where_there_is_too_much_to_try_nothing_is_claimed() -> None:
    history = simulate(1, Load(200, 10, unknown=0.1))
    verdict = check(history, configurations_max=5)
    assert verdict.linearizable is None and not verdict.ok and verdict.counterexample is None
    assert str(verdict) == f"Undecided: {verdict.judged} operations, and 5 configurations were not enough."


NONSENSE: list[Request] = [
    {},
    {"op": "watch", "key": "a"},
    {"op": "get"},
    {"op": "get", "key": 7},
    {"op": "put", "key": "a"},
    {"op": "incr", "key": "a", "by": "1"},
    {"op": "put", "key": "a", "value": 1, "if": 3},
    {"op": "put", "key": "a", "value": 1, "if": {}},
    {"op": "put", "key": "a", "value": 1, "if": {"rev": "1"}},
    {"op": "put", "key": "a", "value": 1, "if": {"rev": 1, "op": "~"}},
    {"op": "txn", "if": [{"rev": 1}]},
    {"op": "batch", "ops": [7]},
    {"op": "scan", "prefix": 7},
]


@pytest.mark.parametrize("request_", NONSENSE, ids=map(str, NONSENSE))
def test_a_request_that_makes_no_sense_is_refused(request_: Request) -> None:
    with pytest.raises(BadHistory):
        check([Operation("c1", request_, 0, 1, {"ok": True, "items": []})])


@pytest.mark.parametrize(
    "reply", [{"rev": "7"}, {"version": True}, {"results": [3]}, {"items": [{}]}, {"items": 7}, {"results": {}}]
)
def test_a_reply_that_makes_no_sense_is_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(BadHistory):
        check([op("c1", 0, 1, "put a 1", **reply)])


# ------------------------------------------------------- by the real machine

LOADS = [
    Load(8, 3, unknown=0.3),
    Load(8, 3, unknown=0.3, bare=True),
    Load(7, 4, bare=True, values=2),
    Load(7, 3, keys=2, unknown=0.2, various=True),
    Load(7, 3, keys=2, unknown=0.4, various=True, bare=True, values=2),
]


@pytest.mark.parametrize("load", LOADS, ids=map(str, LOADS))
def test_what_the_machine_answers_is_always_explained(load: Load) -> None:
    for seed in range(150):
        history = simulate(seed, replace(load, operations=20, clients=5))
        verdict = check(history)
        assert verdict.ok, (seed, verdict)
        assert_proved(verdict, history)


@pytest.mark.parametrize("load", LOADS, ids=map(str, LOADS))
def test_a_history_is_refuted_exactly_where_brute_force_finds_no_order(load: Load) -> None:
    refuted_count = 0
    for seed in range(60):
        chance = random.Random(seed)
        history = simulate(seed, replace(load, operations=chance.randint(2, load.operations)))
        for _ in range(3):
            spoilt = spoil(chance, history if chance.random() < 0.5 else spoil(chance, history))
            expected = brute_force(spoilt)
            refuted_count += not expected
            if "'version'" not in str([o.request for o in spoilt]):  # what nobody was told can't be known
                assert check(spoilt, revisions=False).linearizable is expected, (seed, spoilt)
                assert expected or check(spoilt).linearizable is False, (seed, spoilt)
    assert refuted_count > 3


def test_the_verdict_does_not_depend_on_the_order_of_the_evidence() -> None:
    for seed in range(20):
        chance = random.Random(seed)
        history = spoil(chance, simulate(seed, Load(60, 5, keys=2, unknown=0.1)))
        verdict = check(history)
        shuffled = chance.sample(history, len(history))
        assert check(shuffled).linearizable is verdict.linearizable
        if verdict.counterexample is not None:
            found = check(shuffled).counterexample
            assert found is not None and found.culprit == verdict.counterexample.culprit


LARGE = [
    Load(20_000, 10, keys=5, unknown=0.01),
    Load(20_000, 50, keys=3, unknown=0.03, late=0.2),
    Load(20_000, 50, keys=5, unknown=0.01, bare=True, deletes=False),
]


@pytest.mark.parametrize("load", LARGE, ids=map(str, LARGE))
def test_twenty_thousand_operations_are_judged_in_seconds(load: Load) -> None:
    history = simulate(1, load)
    began = time.monotonic()
    verdict = check(history)
    assert verdict.ok
    assert verdict.tried < 2 * load.operations
    assert time.monotonic() - began < 20  # less than 3 where nothing else runs


def test_a_lie_among_twenty_thousand_operations_is_found() -> None:
    history = simulate(1, Load(20_000, 10, keys=5, unknown=0.01))
    gets = [
        n for n, o in enumerate(history) if o.request == {"op": "get", "key": "k1"} and o.reply and o.reply["found"]
    ]
    at = gets[len(gets) * 9 // 10]
    history[at] = replace(history[at], reply=history[gets[len(gets) // 2]].reply)
    counterexample = refuted(history).counterexample
    assert counterexample is not None and counterexample.culprit is history[at]
