"""What a client decides of writes that a session numbers, of several calls at once, and of its own state."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import calls, errors
from ddb.calls import Failed, Knowledge, Outcome, Volley
from tests.test_calls import CUT, LOST, REFUSED, A, Answer, B, World, in_turn, knowing, no, ok

INCR = {"op": "incr", "key": "n", "by": 1, "client": 7, "seq": 3}
OPEN_CODES = ["timeout", "internal"]


# A numbered write is sent again over any failure, as long as there is time


@pytest.mark.parametrize("failure", [LOST, CUT, REFUSED, b"nonsense", *map(no, OPEN_CODES), no("no_leader")])
def test_a_numbered_write_is_sent_again_with_its_number_whatever_happened(failure: Answer) -> None:
    world = World(a=[failure], b=[ok(value=1, rev=9)])
    assert world.call(knowing(A, B), INCR)["value"] == 1
    sent = [json.loads(e.payload) for e in world.exchanges]
    assert len(sent) == 2 and all((s["client"], s["seq"]) == (7, 3) for s in sent)


@pytest.mark.parametrize("op", ["lease_grant", "frobnicate"])
def test_a_number_makes_only_a_write_of_data_repeatable(op: str) -> None:
    world = World(a=[no("internal")], b=[ok()])
    with pytest.raises(errors.Internal):
        world.call(knowing(A, B), {"op": op, "client": 7, "seq": 1})


@pytest.mark.parametrize("last", [no("no_leader"), no("read_only"), REFUSED, no("forbidden")])
def test_when_time_is_up_what_may_have_happened_is_told_whatever_came_later(last: Answer) -> None:
    world = World(a=[LOST, last])
    with pytest.raises(errors.OutcomeUnknown) as caught:
        world.call(knowing(A), INCR, timeout_s=3.0)
    assert caught.value.definite is False


def test_a_numbered_write_that_surely_did_nothing_says_so_when_time_is_up() -> None:
    with pytest.raises(errors.NoLeader) as caught:
        World(a=[no("no_leader")]).call(knowing(A), INCR, timeout_s=0.3)
    assert caught.value.definite


@pytest.mark.parametrize("code", ["bad_request", "too_large"])
def test_the_first_answer_of_a_numbered_write_is_believed_when_it_comes_at_last(code: str) -> None:
    world = World(a=[LOST, no(code)], b=[no("no_leader")])
    with pytest.raises(errors.BY_CODE[code]):
        world.call(knowing(A, B), INCR)


def test_a_session_that_expired_before_the_write_is_definite() -> None:
    with pytest.raises(errors.SessionExpired) as caught:
        World(a=[no("no_leader"), no("session_expired")]).call(knowing(A), INCR)
    assert caught.value.definite


def test_a_session_that_expired_while_the_write_was_on_its_way_leaves_it_open() -> None:
    with pytest.raises(errors.SessionExpired) as caught:
        World(a=[LOST, no("session_expired")]).call(knowing(A), INCR)
    assert isinstance(caught.value, errors.SessionLost) and caught.value.definite is False


ATTEMPTS = st.sampled_from(
    [REFUSED, CUT, LOST, ok(value=1), b"nonsense"]
    + [no(c) for c in ("no_leader", "overloaded", "timeout", "internal", "read_only", "session_expired", "bad_request")]
)
NOTHING = {"no_leader", "overloaded", "read_only"}


@given(outcomes=st.lists(ATTEMPTS, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=400, deadline=None)
def test_no_error_of_a_numbered_write_is_definite_after_an_attempt_that_may_have_been_done(
    outcomes: list[Answer], seed: int
) -> None:
    told: list[Answer] = []
    script = in_turn([*outcomes, REFUSED])

    def serve(request: dict[str, Any]) -> Answer:
        told.append(script(request))
        return told[-1]

    world = World(a=serve, b=serve)
    world.rng = random.Random(seed)
    began_s = world.now_s
    try:
        world.call(knowing(A, B), INCR, timeout_s=2.0)
        assert told[-1] == ok(value=1)
    except errors.BadRequest:
        assert told[-1] == no("bad_request")
    except errors.DdbError as error:
        surely = all(
            (isinstance(o, Failed) and not o.sent) or (isinstance(o, dict) and o.get("error") in NOTHING)
            for o in told
            if o != no("session_expired")
        )
        assert error.definite == surely
    assert world.now_s <= began_s + 2.0 + 1.0


# Several calls at once

PUTS = [{"op": "put", "key": "k", "value": n} for n in range(4)]
NUMBERED = [{**put, "client": 7, "seq": n + 1} for n, put in enumerate(PUTS)]


class Volleys(World):
    """A network by script for volleys: each answer is a list with one answer for each request."""

    def __init__(self, *answers: list[Answer]) -> None:
        super().__init__()
        self.answers = list(answers)
        self.sent: list[tuple[str, list[int]]] = []

    def perform(self, effect: Any) -> Any:
        if not isinstance(effect, Volley):
            return super().perform(effect)
        requests = [json.loads(payload) for payload in effect.payloads]
        self.sent.append((effect.address, [request.get("value", -1) for request in requests]))
        answers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        assert len(answers) >= len(requests)
        self.now_s += 0.001
        return [json.dumps(a).encode() if isinstance(a, dict) else a for a in answers[: len(requests)]]

    def fire(self, requests: list[dict[str, Any]], timeout_s: float = 2.0) -> list[Outcome]:
        steps = calls.volley(knowing(A, B), requests, timeout_s, lambda: self.now_s, self.rng)
        answer: Any = None
        while True:
            try:
                effect = steps.send(answer)
            except StopIteration as end:
                return list(end.value)
            answer = self.perform(effect)


def kinds(outcomes: list[Outcome]) -> list[str]:
    return [o.code if isinstance(o, errors.DdbError) else "ok" for o in outcomes]


def test_what_is_answered_is_answered_in_the_order_of_the_requests() -> None:
    world = Volleys([ok(rev=n) for n in range(4)])
    assert world.fire(PUTS) == [ok(rev=n) for n in range(4)]
    assert world.sent == [(A, [0, 1, 2, 3])]


def test_where_nothing_was_sent_all_of_it_goes_elsewhere() -> None:
    world = Volleys([REFUSED] * 4, [ok(rev=1)] * 4)
    assert kinds(world.fire(PUTS)) == ["ok"] * 4
    assert world.sent == [(A, [0, 1, 2, 3]), (B, [0, 1, 2, 3])]


def test_what_was_sent_and_not_answered_is_unknown_and_what_was_not_sent_goes_elsewhere_only_behind_nothing() -> None:
    world = Volleys([ok(rev=1), LOST, CUT, CUT], [ok(rev=2)] * 4)
    assert kinds(world.fire(PUTS)) == ["ok", "outcome_unknown", "ok", "ok"]
    assert world.sent == [(A, [0, 1, 2, 3]), (B, [2, 3])]


def test_a_refused_write_that_a_later_one_overtook_is_not_sent_again() -> None:
    world = Volleys([no("overloaded"), ok(rev=1), no("overloaded"), no("overloaded")], [ok(rev=2)] * 4)
    assert kinds(world.fire(PUTS)) == ["overloaded", "ok", "ok", "ok"]
    assert world.sent == [(A, [0, 1, 2, 3]), (B, [2, 3])]


def test_a_bad_request_among_them_harms_no_other() -> None:
    world = Volleys([ok(rev=1), no("bad_request"), no("overloaded"), no("overloaded")], [ok(rev=2)] * 4)
    assert kinds(world.fire(PUTS)) == ["ok", "bad_request", "ok", "ok"]


def test_numbered_writes_that_were_not_answered_are_all_sent_again() -> None:
    world = Volleys([ok(rev=1), LOST, LOST, CUT], [ok(rev=2)] * 4)
    assert kinds(world.fire(NUMBERED)) == ["ok"] * 4
    assert world.sent == [(A, [0, 1, 2, 3]), (B, [1, 2, 3])]


def test_when_time_is_up_each_of_them_has_its_own_error() -> None:
    world = Volleys([ok(rev=1), LOST, no("no_leader"), no("no_leader")], [no("no_leader")] * 4)
    assert kinds(world.fire(NUMBERED, 0.2)) == ["ok", "outcome_unknown", "no_leader", "no_leader"]


EACH = st.sampled_from([REFUSED, CUT, LOST, ok(rev=1), no("overloaded"), no("timeout"), no("bad_request")])


@given(rounds=st.lists(st.lists(EACH, min_size=4, max_size=4), min_size=1, max_size=6), once=st.booleans())
@settings(max_examples=300, deadline=None)
def test_in_no_world_is_a_write_of_a_volley_sent_after_it_may_have_happened(
    rounds: list[list[Answer]], once: bool
) -> None:
    world = Volleys(*rounds, [ok(rev=1)] * 4)
    outcomes = world.fire(NUMBERED if once else PUTS, 1.0)
    assert len(outcomes) == 4
    answered: dict[int, list[Answer]] = {}
    for (_, values), answers in zip(world.sent, [*rounds, *[[ok(rev=1)] * 4] * len(world.sent)], strict=False):
        for value, answer in zip(values, answers, strict=False):
            answered.setdefault(value, []).append(answer)
    for told in answered.values():
        for earlier in told[:-1]:
            nothing = (isinstance(earlier, Failed) and not earlier.sent) or earlier == no("overloaded")
            assert nothing or once


# State


def test_a_client_is_connected_suspended_or_lost_as_its_calls_go() -> None:
    told: list[str] = []
    known = Knowledge((A,), discover=False, on_state=told.append)
    assert known.state == "suspended"
    World(a=[ok(rev=1)]).call(known, {"op": "put"})
    World(a=[no("no_leader"), ok(rev=1)]).call(known, {"op": "put"})
    with pytest.raises(errors.NoLeader):
        World(a=[no("no_leader")]).call(known, {"op": "put"}, timeout_s=0.2)
    World(a=[ok(rev=1)]).call(known, {"op": "put"})
    with pytest.raises(errors.OutcomeUnknown):
        World(a=[LOST]).call(known, {"op": "put"})
    assert told == ["connected", "suspended", "connected", "suspended", "lost", "connected", "suspended"]


def test_a_question_at_one_address_says_nothing_about_the_cluster() -> None:
    known = Knowledge((A,), discover=False)
    with pytest.raises(errors.Unreachable):
        World(b=[REFUSED]).call(known, {"op": "status"}, at=B, timeout_s=0.2)
    assert known.state == "suspended"
