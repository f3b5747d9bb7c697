"""A client's decisions, step by step, in a world without sockets: what it does, in which order, and what it never does."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import calls, errors
from ddb.calls import Effect, Exchange, Failed, Keep, Knowledge, Sleep, Steps
from ddb.driving import drive, drive_awaiting
from ddb.service import TIMEOUT_MAX_S
from tests.harness import REPOSITORY

A, B, C, REGISTRY = "a:1", "b:2", "c:3", "registry:9"
REFUSED = Failed("connection refused", sent=False, connected=False)
CUT = Failed("connection reset by peer", sent=False)
LOST = Failed("no answer in time", sent=True)
MOMENT_S = 0.001

Answer = dict[str, Any] | bytes | Failed
Server = Callable[[dict[str, Any]], Answer]


class Highest(random.Random):
    """Chance that always draws the most."""

    def uniform(self, a: float, b: float) -> float:
        """The upper end."""
        return b


class World:
    """A network by script, and a clock that goes on by a moment with each exchange.

    `servers` maps an address to what its server answers, in order (the last answer for ever), or to a function of
    the request. Where LOST comes back, the exchange takes all of its time.
    """

    def __init__(self, **servers: Iterable[Answer] | Server) -> None:
        self.now_s = 100.0
        self.rng: random.Random = Highest()
        self.servers: dict[str, Server] = {}
        self.effects: list[Effect] = []
        for name, answers in servers.items():
            address = {"a": A, "b": B, "c": C, "registry": REGISTRY}[name]
            self.servers[address] = answers if callable(answers) else in_turn(list(answers))

    def begin(
        self, knowledge: Knowledge, request: dict[str, Any], timeout_s: float = 5.0, at: str | None = None
    ) -> Steps:
        return calls.call(knowledge, request, at, timeout_s, lambda: self.now_s, self.rng)

    def call(
        self, knowledge: Knowledge, request: dict[str, Any], timeout_s: float = 5.0, at: str | None = None
    ) -> dict[str, Any]:
        return self.drive(self.begin(knowledge, request, timeout_s, at))

    def drive(self, steps: Steps) -> dict[str, Any]:
        answer: bytes | Failed | None = None
        while True:
            try:
                effect = steps.throw(answer) if isinstance(answer, Failed) else steps.send(answer)
            except StopIteration as end:
                return dict(end.value)
            answer = self.perform(effect)

    def perform(self, effect: Effect) -> bytes | Failed | None:
        self.effects.append(effect)
        if isinstance(effect, Sleep):
            self.now_s += effect.seconds
        if not isinstance(effect, Exchange):
            return None
        answer = self.servers[effect.address](json.loads(effect.payload))
        self.now_s = max(self.now_s, effect.deadline_s) if answer is LOST else self.now_s + MOMENT_S
        return json.dumps(answer).encode() if isinstance(answer, dict) else answer

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Who was asked what, in order."""
        return [(e.address, json.loads(e.payload)["op"]) for e in self.exchanges]

    @property
    def exchanges(self) -> list[Exchange]:
        return [e for e in self.effects if isinstance(e, Exchange)]

    @property
    def pauses(self) -> list[float]:
        return [e.seconds for e in self.effects if isinstance(e, Sleep)]


def in_turn(answers: list[Answer]) -> Server:
    return lambda request: answers.pop(0) if len(answers) > 1 else answers[0]


def ok(**fields: Any) -> dict[str, Any]:
    return {"ok": True, **fields}


def no(code: str, **fields: Any) -> dict[str, Any]:
    return {"ok": False, "error": code, "message": f"The script says {code}.", **fields}


def knowing(*addresses: str, **fields: Any) -> Knowledge:
    """What a client knows that was given these addresses and is to learn no others."""
    return Knowledge(addresses, **{"discover": False, **fields})


PUT = {"op": "put", "key": "k", "value": 1}
GET = {"op": "get", "key": "k"}
STALE = {**GET, "read": "stale"}


# Law 1: a write is never sent twice unless the first attempt surely did nothing


def test_a_write_that_got_no_answer_is_not_sent_again() -> None:
    world = World(a=[LOST], b=[ok(rev=1)])
    with pytest.raises(errors.OutcomeUnknown, match="may or may not have happened") as caught:
        world.call(knowing(A, B), PUT)
    assert caught.value.definite is False
    assert world.asked == [(A, "put")] and world.pauses == []


@pytest.mark.parametrize("failure", [REFUSED, CUT])
def test_a_write_that_surely_did_nothing_is_sent_to_the_next_server_at_once(failure: Failed) -> None:
    world = World(a=[failure], b=[ok(rev=1)])
    assert world.call(knowing(A, B), PUT)["rev"] == 1
    assert world.asked == [(A, "put"), (B, "put")] and world.pauses == []


@pytest.mark.parametrize("code", ["timeout", "internal", "read_only", "bad_request", "too_large", "a_new_one"])
def test_a_write_that_was_answered_with_anything_but_try_again_is_over(code: str) -> None:
    world = World(a=[no(code)], b=[ok(rev=1)])
    with pytest.raises(errors.BY_CODE.get(code, errors.Internal)):
        world.call(knowing(A, B), PUT)
    assert world.asked == [(A, "put")]


@pytest.mark.parametrize("answer", [b"220 mail ESMTP", b"[1]", b"", b"\xff"])
def test_a_write_that_was_answered_with_nonsense_is_not_sent_again(answer: bytes) -> None:
    world = World(a=[answer], b=[ok(rev=1)])
    with pytest.raises(errors.DdbError) as caught:
        world.call(knowing(A, B), PUT)
    assert caught.value.definite is False
    assert world.asked == [(A, "put")]


@pytest.mark.parametrize("unknown", ["frobnicate", ["get"], None])
def test_an_operation_that_it_does_not_know_is_treated_like_a_write(unknown: Any) -> None:
    world = World(a=[LOST], b=[ok()])
    with pytest.raises(errors.OutcomeUnknown):
        world.call(knowing(A, B), {"op": unknown})
    assert world.asked == [(A, unknown)]


OUTCOMES = st.sampled_from(
    [REFUSED, CUT, LOST, ok(), ok(leader=B), b"nonsense"]
    + [no(code, leader=C) for code in ("no_leader", "not_leader", "overloaded", "shutting_down", "timeout", "internal")]
)
SURELY_NOTHING = {"no_leader", "not_leader", "overloaded", "shutting_down"}


@given(outcomes=st.lists(OUTCOMES, max_size=30), seed=st.integers(0, 99), data=st.booleans())
@settings(max_examples=300, deadline=None)
def test_in_no_world_is_a_write_sent_after_it_may_have_happened(outcomes: list[Answer], seed: int, data: bool) -> None:
    script = in_turn([*outcomes, LOST])
    told: list[Answer] = []

    def serve(request: dict[str, Any]) -> Answer:
        if request["op"] != "put":
            return ok(nodes=[{"address": A}, {"address": C}], members=[{"address": B}], leader={"address": C})
        told.append(script(request))
        return told[-1]

    world = World(a=serve, b=serve, c=serve, registry=serve)
    world.rng = random.Random(seed)
    knowledge = Knowledge([] if data else [A, B], REGISTRY if data else None)
    began_s = world.now_s
    try:
        world.call(knowledge, PUT, timeout_s=2.0)
    except errors.DdbError:
        pass
    for outcome in told[:-1]:
        refused = isinstance(outcome, dict) and outcome.get("error") in SURELY_NOTHING
        assert refused or (isinstance(outcome, Failed) and not outcome.sent)
    assert world.now_s <= began_s + 2.0 + MOMENT_S


# Law 2: a read is repeated until its time is up


@pytest.mark.parametrize("answer", [REFUSED, CUT, LOST, no("timeout"), no("no_leader"), b"nonsense"])
def test_a_read_goes_on_to_the_next_server(answer: Answer) -> None:
    world = World(a=[answer], b=[ok(found=False)])
    assert world.call(knowing(A, B), GET) == ok(found=False)
    assert world.asked == [(A, "get"), (B, "get")]


def test_a_server_that_does_not_answer_gets_longer_from_round_to_round() -> None:
    world = World(a=[LOST, LOST, LOST, ok(found=False)])
    began_s = world.now_s
    world.call(knowing(A, unreachable_s=60), GET, timeout_s=60)
    spans = [e.deadline_s for e in world.exchanges]
    assert spans[0] == began_s + calls.READ_ATTEMPT_S
    given_s = [1, 2, 4, 8]
    assert [json.loads(e.payload)["timeout"] for e in world.exchanges] == [0.9 * s for s in given_s]


def test_a_read_that_nobody_answers_in_time_is_unreachable_and_names_each_reason() -> None:
    world = World(a=[REFUSED], b=[no("timeout")])
    with pytest.raises(errors.Unreachable) as caught:
        world.call(knowing(A, B), GET)
    assert caught.value.message == (
        "No server answered: a:1 can't be reached (connection refused); "
        "b:2 could not answer in time (The script says timeout)."
    )


def test_only_what_the_last_round_heard_is_told() -> None:
    world = World(a=[no("not_leader", leader=C), REFUSED], c=[CUT])
    with pytest.raises(errors.Unreachable) as caught:
        world.call(knowing(A, unreachable_s=0.1), PUT)
    assert caught.value.message == "No server answered: a:1 can't be reached (connection refused)."


def test_what_a_server_said_goes_before_what_none_said() -> None:
    world = World(a=[REFUSED], b=[no("no_leader")], c=[CUT])
    with pytest.raises(errors.NoLeader, match="The script says no_leader"):
        world.call(knowing(A, B, C), PUT)


# Law 3: it ends by its deadline; and patience


@pytest.mark.parametrize("code", ["no_leader", "overloaded", "shutting_down"])
def test_a_refusal_that_passes_is_waited_for(code: str) -> None:
    world = World(a=[no(code), no(code), no(code), ok(rev=4)])
    assert world.call(knowing(A), PUT)["rev"] == 4
    assert len(world.pauses) == 3


def test_the_pauses_double_up_to_a_limit_and_the_last_one_ends_before_the_deadline() -> None:
    world = World(a=[no("no_leader")])
    began_s = world.now_s
    with pytest.raises(errors.NoLeader):
        world.call(knowing(A), PUT, timeout_s=3.0)
    doubling = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
    assert world.pauses[:6] == doubling and set(world.pauses[6:]) == {calls.BACKOFF_MAX_S}
    assert began_s + 3.0 - calls.BACKOFF_MAX_S - MOMENT_S < world.now_s < began_s + 3.0


def test_each_pause_is_drawn_from_all_that_is_below_its_bound() -> None:
    drawn: list[list[float]] = []
    for seed in range(200):
        world = World(a=[no("no_leader")] * 4 + [ok(rev=1)])
        world.rng = random.Random(seed)
        world.call(knowing(A), PUT)
        drawn.append(world.pauses)
    for bound_s, pauses in zip([0.01, 0.02, 0.04, 0.08], zip(*drawn, strict=True), strict=True):
        assert 0 <= min(pauses) < 0.1 * bound_s and 0.9 * bound_s < max(pauses) <= bound_s


def test_the_time_runs_from_the_call_not_from_its_first_step() -> None:
    world = World(a=[ok(rev=1)])
    began_s = world.now_s
    steps = world.begin(knowing(A), PUT, timeout_s=2.0)
    world.now_s += 1.5
    effect = next(steps)
    assert isinstance(effect, Exchange) and effect.deadline_s == began_s + 2.0
    assert json.loads(effect.payload)["timeout"] == 0.45


def test_a_server_is_given_less_time_than_the_client_takes() -> None:
    world = World(a=[ok(rev=1)])
    began_s = world.now_s
    world.call(knowing(A), PUT, timeout_s=2.0)
    assert world.exchanges == [Exchange(A, b'{"op":"put","key":"k","value":1,"timeout":1.8}', began_s + 2.0)]


def test_what_the_request_says_of_time_is_the_calls_to_say_and_the_callers_object_is_left_alone() -> None:
    world = World(a=[ok(rev=1)])
    request = {**PUT, "timeout": 77}
    world.call(knowing(A), request, timeout_s=1.0)
    assert json.loads(world.exchanges[0].payload)["timeout"] == 0.9 and request["timeout"] == 77


def test_without_time_nothing_is_sent() -> None:
    world = World(a=[ok(rev=1)])
    with pytest.raises(errors.Unreachable, match="Time ran out before any server was asked"):
        world.call(knowing(A), PUT, timeout_s=0)
    assert world.effects == []


def test_once_time_is_up_no_other_server_is_asked() -> None:
    world = World(a=[LOST], b=[ok(found=False)])
    with pytest.raises(errors.Unreachable, match="a:1 did not answer"):
        world.call(knowing(A, B), GET, timeout_s=0.5)
    assert world.asked == [(A, "get")]


def test_where_nobody_can_be_reached_patience_is_shorter() -> None:
    world = World(a=[REFUSED], b=[CUT])
    began_s = world.now_s
    with pytest.raises(errors.Unreachable):
        world.call(knowing(A, B, unreachable_s=0.3), PUT, timeout_s=60)
    assert world.now_s < began_s + 0.3 and len(world.exchanges) > 4


def test_where_one_answers_and_can_not_serve_patience_is_not_shorter() -> None:
    world = World(a=[REFUSED], b=[no("no_leader")])
    began_s = world.now_s
    with pytest.raises(errors.NoLeader):
        world.call(knowing(A, B, unreachable_s=0.3), PUT, timeout_s=20)
    assert world.now_s > began_s + 19


# Where it goes


def test_the_leader_that_a_reply_names_gets_the_next_request() -> None:
    world = World(a=[ok(rev=1, leader=B)], b=[ok(rev=2)])
    knowledge = knowing(A)
    world.call(knowledge, PUT)
    world.call(knowledge, GET)
    world.call(knowledge, PUT)
    assert world.asked == [(A, "put"), (B, "get"), (B, "put")]


def test_the_leader_that_a_refusal_names_is_asked_at_once() -> None:
    world = World(a=[no("not_leader", leader=C)], b=[ok(rev=1)], c=[ok(rev=2)])
    knowledge = knowing(A, B)
    assert world.call(knowledge, PUT)["rev"] == 2
    assert world.asked == [(A, "put"), (C, "put")] and world.pauses == []
    assert knowledge.leader == C


def test_two_servers_that_name_one_another_are_asked_once_a_round() -> None:
    world = World(a=[no("not_leader", leader=B), no("not_leader", leader=B), ok(rev=1)], b=[no("not_leader", leader=A)])
    world.call(knowing(A, B), PUT)
    assert world.asked == [(A, "put"), (B, "put"), (A, "put"), (B, "put"), (A, "put")]
    assert len(world.pauses) == 2


def test_a_leader_that_fails_is_forgotten() -> None:
    world = World(a=[ok(rev=1, leader=B), ok(rev=2)], b=[REFUSED])
    knowledge = knowing(A)
    world.call(knowledge, PUT)
    assert knowledge.leader == B
    assert world.call(knowledge, PUT)["rev"] == 2
    assert knowledge.leader == A and knowledge.home == A


@pytest.mark.parametrize("hint", ["nonsense", "host:99999", "", 7, None, ["a:1"], {"address": B}])
def test_a_hint_that_is_no_address_is_no_hint(hint: Any) -> None:
    world = World(a=[no("no_leader", leader=hint), ok(rev=1, leader=hint)])
    knowledge = knowing(A)
    world.call(knowledge, PUT)
    assert knowledge.leader == A


@pytest.mark.parametrize("request_", [STALE, {"op": "ping"}, {"op": "status"}, {"op": "log"}, {"op": "snapshot"}])
def test_stale_reads_and_questions_about_a_node_stay_at_home(request_: dict[str, Any]) -> None:
    world = World(a=[ok(leader=B)], b=[ok()])
    knowledge = knowing(A, B)
    world.call(knowledge, PUT)
    world.call(knowledge, request_)
    world.call(knowledge, PUT)
    assert [address for address, _ in world.asked] == [A, A, B]
    assert (knowledge.home, knowledge.leader) == (A, B)


def test_a_home_that_fails_is_left_for_good() -> None:
    world = World(a=[ok(), CUT, ok()], b=[ok()])
    knowledge = knowing(A, B)
    world.call(knowledge, STALE)
    world.call(knowledge, STALE)
    world.call(knowledge, STALE)
    assert [address for address, _ in world.asked] == [A, A, B, B]


def test_a_home_that_fails_a_write_is_left_for_good() -> None:
    world = World(a=[ok(), CUT, ok()], b=[ok()])
    knowledge = knowing(A, B)
    world.call(knowledge, PUT)
    world.call(knowledge, PUT)
    world.call(knowledge, STALE)
    assert [address for address, _ in world.asked] == [A, A, B, B]


def test_a_leader_that_fails_a_question_of_another_kind_is_forgotten() -> None:
    world = World(a=[ok(), CUT, ok()], b=[ok()])
    knowledge = knowing(A, B)
    world.call(knowledge, PUT)
    world.call(knowledge, STALE)
    world.call(knowledge, PUT)
    assert [address for address, _ in world.asked] == [A, A, B, B]


def test_a_question_at_an_address_goes_there_and_teaches_nothing() -> None:
    world = World(a=[ok()], c=[ok(leader=B)])
    knowledge = Knowledge([A], REGISTRY)
    world.call(knowledge, {"op": "status"}, at=C)
    assert world.asked == [(C, "status")]
    assert (knowledge.home, knowledge.leader, knowledge.servers) == (None, None, (A,))


def test_a_question_at_an_address_that_can_not_be_reached_is_over_at_once() -> None:
    world = World(a=[ok()], c=[REFUSED])
    with pytest.raises(errors.Unreachable, match="c:3 can't be reached"):
        world.call(knowing(A), {"op": "status"}, at=C)
    assert world.asked == [(C, "status")] and world.pauses == []


def test_a_question_at_an_address_waits_for_that_server_alone() -> None:
    world = World(c=[no("no_leader"), no("no_leader", leader=A), ok()], a=[ok()], registry=[ok(nodes=[])])
    world.call(Knowledge([A], REGISTRY), GET, at=C)
    assert world.asked == [(C, "get")] * 3


# What it learns


def test_the_first_server_that_serves_is_asked_who_the_others_are_once() -> None:
    members = [{"address": A}, {"address": "http://b:2/"}, {"address": "nonsense"}, {"address": None}, 7]
    world = World(a=lambda r: ok(members=members, leader={"address": B}) if r["op"] == "status" else ok(), b=[ok()])
    knowledge = Knowledge([A])
    world.call(knowledge, PUT)
    world.call(knowledge, PUT)
    assert world.asked == [(A, "put"), (A, "status"), (B, "put")]
    assert knowledge.servers == (A, B) and Keep((A, B)) in world.effects


def test_after_a_failure_it_learns_again_and_lets_go_of_who_left() -> None:
    members = in_turn([ok(members=[{"address": A}, {"address": B}]), ok(members=[{"address": A}, {"address": C}])])
    world = World(a=lambda r: members(r) if r["op"] == "status" else ok(leader=B), b=[CUT])
    knowledge = Knowledge([A])
    world.call(knowledge, PUT)
    assert knowledge.servers == (A, B) and world.effects[-1] == Keep((A, B))
    world.call(knowledge, GET)
    assert world.asked[2:] == [(B, "get"), (A, "get"), (A, "status")]
    assert knowledge.servers == (A, C)


def test_a_connection_to_the_leader_is_kept_whether_or_not_it_is_a_known_member() -> None:
    world = World(a=lambda r: ok(members=[{"address": A}]) if r["op"] == "status" else ok(leader=B))
    world.call(Knowledge([A]), PUT)
    assert world.effects[-1] == Keep((A, B))


@pytest.mark.parametrize("status", [REFUSED, LOST, b"nonsense", b"[1]", no("internal"), ok(members=7), ok(members=[])])
def test_what_can_not_be_learnt_spoils_no_reply_and_no_knowledge(status: Answer) -> None:
    world = World(a=lambda r: status if r["op"] == "status" else ok(rev=1))
    knowledge = Knowledge([A], learnt=(B,))
    began_s = world.now_s
    assert world.call(knowledge, PUT, timeout_s=9) == ok(rev=1)
    assert knowledge.servers == (A, B)
    assert world.now_s <= began_s + calls.ASIDE_S + MOMENT_S


def test_one_of_the_calls_that_overlap_asks_who_the_others_are() -> None:
    world = World(a=[ok(members=[])])
    knowledge = Knowledge([A])
    first, second = world.begin(knowledge, PUT), world.begin(knowledge, PUT)
    assert [op(next(first)), op(next(second))] == ["put", "put"]
    assert op(first.send(b'{"ok":true}')) == "status"
    with pytest.raises(StopIteration):
        second.send(b'{"ok":true}')


def test_the_registry_is_asked_where_no_server_is_known() -> None:
    world = World(registry=[ok(nodes=[{"address": B}, {"address": A}])], b=[ok(rev=1)])
    knowledge = knowing(registry=REGISTRY)
    assert world.call(knowledge, PUT)["rev"] == 1
    assert world.asked == [(REGISTRY, "nodes"), (B, "put")]
    assert world.effects[1] == Keep((B, A))
    world.call(knowledge, PUT)
    assert world.asked[2:] == [(B, "put")]


def test_the_registry_is_asked_again_after_each_round_that_failed() -> None:
    world = World(registry=[ok(nodes=[{"address": B}])], a=[REFUSED], b=[REFUSED, ok(rev=1)])
    world.call(knowing(A, registry=REGISTRY), PUT)
    registry, a, b = (REGISTRY, "nodes"), (A, "put"), (B, "put")
    assert world.asked == [a, registry, a, b, registry, a, b]


@pytest.mark.parametrize(
    "nodes", [REFUSED, LOST, b"nonsense", b"[1]", no("internal"), ok(nodes=[]), ok(nodes={"a": 1})]
)
def test_a_registry_that_names_nobody_is_asked_until_time_is_up(nodes: Answer) -> None:
    world = World(registry=[nodes])
    began_s = world.now_s
    with pytest.raises(errors.Unreachable, match="The registry at registry:9 names no node"):
        world.call(knowing(registry=REGISTRY), PUT, timeout_s=4)
    assert len(world.exchanges) > 2 and world.now_s <= began_s + 4 + MOMENT_S


def test_what_the_registry_does_not_know_is_not_forgotten() -> None:
    world = World(registry=[ok(nodes=[])], a=[REFUSED, ok(rev=1)])
    assert world.call(Knowledge([], REGISTRY, discover=False, learnt=(A,)), PUT)["rev"] == 1


def test_an_answers_fields_are_the_errors_whatever_they_are_called() -> None:
    world = World(a=[no("compacted", oldest=7, self=1, kind=2, id=3)])
    with pytest.raises(errors.Compacted) as caught:
        world.call(knowing(A), PUT)
    assert caught.value.fields == {"oldest": 7, "self": 1, "kind": 2}


# How it is driven


def op(effect: Effect) -> str:
    assert isinstance(effect, Exchange)
    return str(json.loads(effect.payload)["op"])


def eventful() -> tuple[World, Knowledge]:
    """A world in which a call takes every kind of step."""
    puts = in_turn([no("no_leader"), REFUSED, ok(rev=1)])
    status = ok(members=[{"address": A}, {"address": B}], leader={"address": B})
    world = World(
        registry=[ok(nodes=[{"address": A}])], a=lambda r: status if r["op"] == "status" else puts(r), b=[ok(rev=2)]
    )
    return world, Knowledge([], REGISTRY)


def steps_of(world: World, knowledge: Knowledge) -> int:
    world.call(knowledge, PUT)
    return len(world.effects)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("at", range(steps_of(*eventful())))
def test_a_call_given_up_at_any_step_leaves_nothing_behind(at: int, interrupt: type[BaseException]) -> None:
    world, knowledge = eventful()
    steps = world.begin(knowledge, PUT)
    effect = next(steps)
    for _ in range(at):
        answer = world.perform(effect)
        effect = steps.throw(answer) if isinstance(answer, Failed) else steps.send(answer)
    with pytest.raises(interrupt):
        steps.throw(interrupt())
    assert steps.gi_frame is None  # type: ignore[attr-defined]  # it wants nothing any more
    world.effects.clear()
    assert world.call(knowledge, PUT)["rev"] in (1, 2)
    assert knowledge.servers == (A, B), "what was to be learnt is learnt the next time"


def test_a_server_is_given_less_time_than_the_client_takes_and_no_more_than_it_takes_on() -> None:
    for patience_s, given_s in ((10.0, 9.0), (1e-9, 0.001), (1e6, TIMEOUT_MAX_S)):
        world = World(a=[ok()])
        world.now_s = 0.0
        world.call(knowing(A), PUT, patience_s)
        assert json.loads(world.exchanges[0].payload)["timeout"] == given_s


def test_closing_a_call_that_waits_makes_no_further_step() -> None:
    world = World(a=[ok()])
    steps = world.begin(Knowledge([A]), PUT)
    next(steps)
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)


def test_a_request_that_is_no_json_is_refused_before_anything_is_sent() -> None:
    world = World(a=[ok()])
    with pytest.raises(errors.BadRequest):
        world.call(knowing(A), {"op": "put", "key": "k", "value": float("nan")})
    assert world.effects == []


def test_the_driver_in_the_documentation_drives() -> None:
    example = re.search(r"^    steps = .*\n    reply = .*$", calls.__doc__ or "", re.MULTILINE)
    assert example is not None
    world = World(a=[CUT], b=[ok(found=False, leader=A)])

    def perform(effect: Effect) -> bytes | None:
        answer = world.perform(effect)
        if isinstance(answer, Failed):
            raise answer
        return answer

    names: dict[str, Any] = {
        **vars(calls), "drive": drive, "time": time, "perform": perform, "knowledge": knowing(A, B)
    }  # fmt: skip
    world.now_s = time.monotonic()
    exec(textwrap.dedent(example[0]), names)
    assert names["reply"] == ok(found=False, leader=A)
    assert world.asked == [(A, "get"), (B, "get")]


def test_an_event_loop_drives_the_same_calls() -> None:
    world, knowledge = eventful()

    async def perform(effect: Effect) -> bytes | None:
        await asyncio.sleep(0)
        answer = world.perform(effect)
        if isinstance(answer, Failed):
            raise answer
        return answer

    async def both() -> tuple[Any, Any]:
        begun = world.begin(knowledge, PUT), world.begin(knowledge, GET)
        return await asyncio.gather(*(drive_awaiting(steps, perform, Failed) for steps in begun))

    assert all(reply["ok"] for reply in asyncio.run(both()))


# Law 4: the same seed makes the same steps

TRACE = """
import random
from tests.test_calls import PUT, eventful, no
for seed in range(20):
    world, knowledge = eventful()
    world.rng = random.Random(seed)
    world.call(knowledge, PUT)
    print(world.effects, knowledge)
"""


def test_the_same_seed_makes_the_same_steps_in_every_process() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", TRACE],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(traces) == 1 and traces.pop().count(b"Sleep(") >= 40
