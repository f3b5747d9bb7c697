"""A watch goes on whatever happens: each change once, in order, and given up only where nobody keeps it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import errors
from ddb.calls import Failed, Knowledge, Sleep
from ddb.following import SILENCE_S, Connect, Following, Learn, Receive, Told
from ddb.results import Event

A, B, C = "a:1", "b:2", "c:3"
Message = dict[str, Any]


class Log:
    """The changes of a cluster, some entries with several; what a node that has applied `upto` tells of them."""

    def __init__(self, sizes: list[int]) -> None:
        self.messages: list[Message] = [
            {"event": "put", "key": f"k{n}", "value": n, "rev": rev, "version": 1}
            for rev, size in enumerate(sizes, start=2)
            for n in range(size)
        ]
        self.last = len(sizes) + 1

    def since(self, rev: int) -> list[Message]:
        return [message for message in self.messages if message["rev"] >= rev]


class Nodes:
    """Drives a following against scripted nodes: each connection tells what `serve` gives it, and then breaks."""

    def __init__(self, serve: Any, *addresses: str, patience_s: float = 5.0, from_rev: int | None = None) -> None:
        self.serve = serve
        self.now_s = 100.0
        self.requests: list[tuple[str, Message]] = []
        self.told: list[Event | None] = []
        self.learnt = 0
        self.frozen_s = 0.0
        self.knowledge = Knowledge(addresses or (A, B, C), discover=False)
        request = {"op": "watch", "prefix": ""}
        self.following = Following(self.knowledge, request, from_rev, patience_s, lambda: self.now_s, random.Random(1))

    def run(self, events: int, steps_max: int = 20_000) -> list[Event]:
        """Follow until so many events have been told."""
        steps = self.following.run()
        messages: list[Message | Failed] = []
        answer: Any = None
        for _ in range(steps_max):
            step = steps.throw(answer) if isinstance(answer, Failed) else steps.send(answer)
            answer = None
            self.now_s += 0.001
            match step:
                case Connect(address, payload, _):
                    request = json.loads(payload)
                    self.requests.append((address, request))
                    served = self.serve(address, request)
                    messages = [served] if isinstance(served, Failed) else list(served)
                    if isinstance(served, Failed):
                        answer = served
                case Receive():
                    self.now_s += self.frozen_s
                    given = messages.pop(0) if messages else Failed("it closed the connection", sent=True)
                    answer = json.dumps(given).encode() if isinstance(given, dict) else given
                case Sleep(seconds):
                    self.now_s += seconds
                case Learn():
                    self.learnt += 1
                case Told(event):
                    self.told.append(event)
                    if len(self.events) == events:
                        return self.events
        raise AssertionError(f"only {self.events} were told")

    @property
    def events(self) -> list[Event]:
        return [event for event in self.told if event is not None]


def head(rev: int) -> Message:
    return {"ok": True, "watch": True, "rev": rev}


def progress(rev: int) -> Message:
    return {"event": "progress", "rev": rev}


def refusal(code: str, **fields: Any) -> Message:
    return {"ok": False, "error": code, "message": f"The script says {code}.", **fields}


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    seed=st.integers(0, 10_000),
    start=st.sampled_from([None, 2, 4]),
)
@settings(max_examples=400, deadline=None)
def test_each_change_is_told_once_and_in_order_wherever_the_connections_break(
    sizes: list[int], seed: int, start: int | None
) -> None:
    log, rng = Log(sizes), random.Random(seed)

    def serve(address: str, request: Message) -> list[Message] | Failed:
        if rng.random() < 0.2:
            return Failed("connection refused", sent=False, connected=False)
        if rng.random() < 0.2:
            return [refusal("overloaded")]
        since = request.get("from")
        told = [head(rng.randint(1, log.last))] if since is not None else [head(1)]
        upto = rng.randint(1, log.last)  # what this node has applied
        for message in log.since(since or 2):
            if message["rev"] <= upto:
                told.append(message)
        if rng.random() < 0.5:
            told = told[: rng.randint(0, len(told))]  # broken off
        elif upto >= (since or 0):
            told.append(progress(upto))
        if rng.random() < 0.3:
            told.append({"event": "error", "error": "shutting_down", "message": "The node is leaving."})
        return told

    wanted = log.since(start or 2)
    if wanted:
        events = Nodes(serve, from_rev=start).run(len(wanted))
        assert [(event.rev, event.key) for event in events] == [(m["rev"], m["key"]) for m in wanted]


def test_it_asks_for_no_revision_until_it_knows_one_and_then_for_what_is_behind() -> None:
    answers = [Failed("connection refused", sent=False, connected=False), [head(7)], [head(7), progress(9)], [head(9)]]
    answers.append([head(9), {"event": "delete", "key": "k", "rev": 12}])
    nodes = Nodes(lambda address, request: answers.pop(0))
    assert nodes.run(1) == [Event("delete", "k", None, 12, 0)]
    assert [request.get("from") for _, request in nodes.requests] == [None, None, 8, 10, 10]
    assert nodes.following.rev == 12


def test_the_position_is_what_has_been_told() -> None:
    nodes = Nodes(lambda a, r: [head(7), *Log([1]).messages, progress(9)], from_rev=2)
    assert nodes.following.rev == 1
    nodes.run(1)
    assert nodes.following.rev == 2


def test_a_node_that_broke_off_is_asked_last() -> None:
    log = Log([1, 1])
    nodes = Nodes(lambda a, r: [head(1), *log.messages[: len(nodes.requests)]], from_rev=2)
    nodes.run(2)
    assert len({address for address, _ in nodes.requests}) == 2 and nodes.learnt == 1


def test_a_node_may_be_silent_only_as_long_as_the_protocol_allows() -> None:
    nodes = Nodes(lambda a, r: [], A)
    steps = nodes.following.run()
    steps.send(None)
    steps.send(None)
    receiving = steps.send(json.dumps(head(3)).encode())
    assert receiving == Told(None)
    receiving = steps.send(None)
    assert isinstance(receiving, Receive) and receiving.deadline_s == nodes.now_s + SILENCE_S


# What it gives up with


def test_compacted_on_every_node_is_given_up_with_at_once_and_names_the_oldest() -> None:
    oldest = {A: 50, B: 40, C: 60}
    nodes = Nodes(lambda address, r: [refusal("compacted", oldest=oldest[address])], from_rev=3)
    with pytest.raises(errors.Compacted) as caught:
        nodes.run(1)
    assert caught.value.fields["oldest"] == 40 and len(nodes.requests) == 3


def test_compacted_on_one_node_is_no_reason_to_give_up_while_another_has_it() -> None:
    log = Log([1])
    nodes = Nodes(lambda a, r: [head(2), *log.messages] if a == C else [refusal("compacted", oldest=9)], from_rev=2)
    assert len(nodes.run(1)) == 1


def test_a_node_that_may_still_have_it_is_waited_for_but_not_for_ever() -> None:
    def serve(address: str, request: Message) -> list[Message] | Failed:
        if address == C:
            return Failed("connection refused", sent=False, connected=False)
        return [refusal("compacted", oldest=9)]

    nodes = Nodes(serve, from_rev=2)
    began_s = nodes.now_s
    with pytest.raises(errors.Compacted):
        nodes.run(1)
    assert 5.0 < nodes.now_s - began_s < 7.0


def test_a_watch_that_never_began_is_given_up_with_in_time() -> None:
    nodes = Nodes(lambda a, r: Failed("connection refused", sent=False, connected=False), patience_s=2.0)
    began_s = nodes.now_s
    with pytest.raises(errors.Unreachable, match="connection refused"):
        nodes.run(1)
    assert 2.0 < nodes.now_s - began_s < 3.0 and nodes.knowledge.state == "lost"


def test_nodes_that_are_frozen_cost_no_more_than_the_patience() -> None:
    nodes = Nodes(lambda a, r: [Failed("it is silent", sent=True)], patience_s=2.5)
    nodes.frozen_s = 1.0
    began_s = nodes.now_s
    with pytest.raises(errors.Unreachable):
        nodes.run(1)
    assert 2.5 < nodes.now_s - began_s < 4.0


def test_a_watch_that_has_begun_goes_on_for_ever() -> None:
    log = Log([1])

    def serve(address: str, request: Message) -> list[Message] | Failed:
        if len(nodes.requests) == 1:
            return [head(1)]
        if nodes.now_s < 5_000:
            return Failed("connection refused", sent=False, connected=False)
        return [head(2), *log.messages]

    nodes = Nodes(serve, patience_s=1.0)
    assert len(nodes.run(1, 1_000_000)) == 1


@pytest.mark.parametrize("code", ["bad_request", "forbidden", "unauthorized"])
def test_what_no_node_will_ever_serve_is_raised_at_once(code: str) -> None:
    nodes = Nodes(lambda a, r: [refusal(code)])
    with pytest.raises(errors.BY_CODE[code]):
        nodes.run(1)
    assert len(nodes.requests) == 1


@pytest.mark.parametrize("message", [b"nonsense", b"7", b"[]", {"ok": True}, {"event": "put", "key": "k"}, {"rev": 5}])
@pytest.mark.parametrize("before", [[], [head(1)]], ids=["at first", "later"])
def test_nonsense_from_a_node_is_another_nodes_turn(before: list[Message], message: Any) -> None:
    log = Log([1])
    nodes = Nodes(lambda a, r: [*before, message] if len(nodes.requests) == 1 else [head(1), *log.messages])
    assert len(nodes.run(1)) == 1 and len(nodes.requests) == 2


def test_an_error_that_no_other_node_mends_is_raised() -> None:
    nodes = Nodes(lambda a, r: [head(1), {"event": "error", "error": "internal", "message": "A bug."}])
    with pytest.raises(errors.Internal, match="A bug"):
        nodes.run(1)
