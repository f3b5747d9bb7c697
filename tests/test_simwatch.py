"""The rules that the simulated watchers are held to: each must object to what it forbids, and to nothing else."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from ddb.simrules import Violation
from ddb.simwatch import BEGINS, ONCE, PROGRESS, Truth, Watcher
from tests.test_chronicle import batch_of, both, delete, put


@pytest.fixture
def truth() -> Truth:
    """Revisions 1 to 4: a put of a, one of b, an entry that changes a and b, a deletion of a."""
    rules = SimpleNamespace(chosen={}, committed=4)
    first = 1
    for request in (put("a", 1), put("b", 2), both(put("a", 3), put("b", 4)), delete("a")):
        batch = batch_of(first, [request])
        rules.chosen[first] = (batch.last, batch.term, batch.data)
        first = batch.last + 1
    return Truth(rules)  # type: ignore[arg-type]


EVENTS: list[dict[str, Any]] = [
    {"event": "put", "key": "a", "value": 1, "rev": 1, "version": 1},
    {"event": "put", "key": "b", "value": 2, "rev": 2, "version": 1},
    {"event": "put", "key": "a", "value": 3, "rev": 3, "version": 2},
    {"event": "put", "key": "b", "value": 4, "rev": 3, "version": 2},
    {"event": "delete", "key": "a", "rev": 4},
]


def watcher(truth: Truth, prefix: str = "") -> Watcher:
    host = mock.MagicMock()
    host.name = "w1"
    one = Watcher(host, ["n1:1"], random.Random(1), truth, lambda what: None, None)
    one.prefix = prefix
    one._channel = mock.MagicMock()
    one._loop = mock.MagicMock()
    one.told = 0
    one._fresh = True
    return one


def tell(one: Watcher, *said: dict[str, Any]) -> None:
    for each in said:
        one._took(json.dumps(each).encode())


BEGUN = {"ok": True, "watch": True, "rev": 0}


def test_the_truth_is_nothing_to_object_to(truth: Truth) -> None:
    one = watcher(truth)
    tell(one, BEGUN, *EVENTS[:2], {"event": "progress", "rev": 2}, *EVENTS[2:], {"event": "progress", "rev": 4})
    assert one.told == 4
    other = watcher(truth, "b")
    tell(other, BEGUN, EVENTS[1], EVENTS[3], {"event": "progress", "rev": 4})
    assert other.told == 4


@pytest.mark.parametrize(
    "said",
    [
        [EVENTS[1]],
        [EVENTS[0], EVENTS[0]],
        [EVENTS[0], EVENTS[2]],
        [EVENTS[0], {**EVENTS[1], "value": 3}],
        [EVENTS[0], EVENTS[1], EVENTS[3]],
        [EVENTS[0], EVENTS[1], EVENTS[2], EVENTS[4]],
        [*EVENTS, EVENTS[4]],
        [*EVENTS, {**EVENTS[0], "rev": 9}],
    ],
)
def test_whatever_is_left_out_repeated_or_made_up_is_objected_to(truth: Truth, said: list[dict[str, Any]]) -> None:
    with pytest.raises(Violation) as caught:
        tell(watcher(truth), BEGUN, *said)
    assert caught.value.rule == ONCE


def test_progress_ahead_of_what_was_told_is_objected_to(truth: Truth) -> None:
    with pytest.raises(Violation) as caught:
        tell(watcher(truth), BEGUN, *EVENTS[:3], {"event": "progress", "rev": 3})
    assert caught.value.rule == PROGRESS


def test_a_watch_that_begins_before_what_was_committed_is_objected_to(truth: Truth) -> None:
    one = watcher(truth)
    one.told = -1
    one._asked_committed = 4
    with pytest.raises(Violation) as caught:
        tell(one, {"ok": True, "watch": True, "rev": 3})
    assert caught.value.rule == BEGINS


def test_within_a_revision_a_watcher_resumes_with_that_and_skips_what_it_had(truth: Truth) -> None:
    one = watcher(truth)
    tell(one, BEGUN, *EVENTS[:3])
    one._fresh = True
    one._ask()
    asked = json.loads(one._channel.send.call_args.args[0].partition(b"\n")[2])  # type: ignore[union-attr, attr-defined]
    assert asked == {"op": "watch", "prefix": "", "from": 3}
    tell(one, {"ok": True, "watch": True, "rev": 2}, EVENTS[2], EVENTS[3], EVENTS[4])
    assert one.told == 4
    with pytest.raises(Violation):
        tell(one, EVENTS[4])


def test_what_is_told_no_more_after_resumption_is_objected_to(truth: Truth) -> None:
    one = watcher(truth)
    tell(one, BEGUN, *EVENTS[:3])
    one._fresh = True
    one._ask()
    with pytest.raises(Violation) as caught:
        tell(one, {"ok": True, "watch": True, "rev": 2}, EVENTS[4])
    assert caught.value.rule == ONCE
