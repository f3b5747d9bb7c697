"""Recipes decide rightly however their steps are mixed: many plans at once, on a small model of a cluster."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import errors, plans
from ddb.keeping import WINDOW, Keeping, Numbers, current, enter, leave
from ddb.plans import Ask, Await, Patience, Plan, Rest, Wish
from ddb.results import Event, Item


@dataclass
class Row:
    value: Any
    rev: int
    created: int
    version: int
    lease: int | None


@dataclass
class Model:
    """A cluster in a dictionary: the few operations that recipes use, and the changes that they made."""

    rows: dict[str, Row] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    changes: list[Event] = field(default_factory=list)
    rev: int = 100
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)

    def grant(self) -> int:
        self.rev += 1
        self.leases.add(self.rev)
        return self.rev

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        seq = request.get("seq")
        if seq is not None and seq in self.replies:
            return self.replies[seq]
        reply = self._do(request)
        if seq is not None:
            self.replies[seq] = reply
        return {"ok": True, **reply}

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        key = request.get("key", "")
        row = self.rows.get(key)
        match request["op"]:
            case "put":
                if request.get("if", {}).get("exists", row is not None) != (row is not None):
                    return {
                        "applied": False,
                        "rev": row.rev if row else 0,
                        "found": row is not None,
                        "value": row and row.value,
                    }
                lease = request.get("lease")
                if lease is not None and lease not in self.leases:
                    raise errors.BadRequest("no such lease", lease=lease)
                self.rev += 1
                version = row.version + 1 if row else 1
                self.rows[key] = Row(request["value"], self.rev, row.created if row else self.rev, version, lease)
                self.changes.append(Event("put", key, request["value"], self.rev, version))
                return {"rev": self.rev, "version": version}
            case "delete":
                if row is None or not all(self._holds(c, key) for c in request.get("if", [])):
                    return {"deleted": 0, "rev": self.rev}
                self._delete([key])
                return {"deleted": 1, "rev": self.rev}
            case "incr":
                self.rev += 1
                value = (row.value if row else 0) + request["by"]
                self.rows[key] = Row(value, self.rev, self.rev, 1, None)
                return {"value": value, "rev": self.rev}
            case "get":
                found = {n: getattr(row, n) for n in ITEM} if row else {}
                return {"found": row is not None, "key": key, **found}
            case "txn":
                holds = all(self._holds(c, "") for c in request["if"])
                if holds:
                    self._delete([op["key"] for op in request["then"]])
                return {"succeeded": holds, "results": [], "rev": self.rev}
            case "lease_revoke":
                self.end(request["lease"])
                return {}
            case "scan":
                keys = sorted(k for k in self.rows if k.startswith(request["prefix"]))[: request["limit"]]
                items = [{"key": k, **{n: getattr(self.rows[k], n) for n in ITEM}} for k in keys]
                return {"items": items, "more": False, "rev": self.rev}
        raise AssertionError(request)

    def _holds(self, condition: dict[str, Any], key: str) -> bool:
        row = self.rows.get(condition.get("key", key))
        found = {"exists": row is not None, "rev": row.rev if row else 0, "value": row.value if row else None}
        return all(found[name] == wanted for name, wanted in condition.items() if name not in ("key", "op"))

    def _delete(self, keys: list[str]) -> None:
        self.rev += 1
        for key in keys:
            del self.rows[key]
            self.changes.append(Event("delete", key, None, self.rev, 0))

    def end(self, lease: int) -> None:
        """Revoke or expire a lease."""
        self.leases.discard(lease)
        hanging = [key for key, row in self.rows.items() if row.lease == lease]
        if hanging:
            self._delete(hanging)


ITEM = ("value", "rev", "created", "version")


class Runner:
    """One plan on its way, one wish at a time."""

    def __init__(self, model: Model, plan: Plan[Any], numbers: Numbers | None = None) -> None:
        self.model = model
        self.plan = plan
        self.numbers = numbers
        self.result: Any = None
        self.over = False
        self.wishes: list[Wish] = []
        self.cursor = 0
        self.request: dict[str, Any] = {}
        self._go(lambda: next(plan))

    def _go(self, step: Callable[[], Wish]) -> None:
        try:
            self.wishes.append(step())
            self.cursor = 0
            if isinstance(self.wish, Ask):
                numbers = self.wish.numbers
                asked = self.wish.question.request
                self.request = numbers.begin(asked) if numbers is not None else asked
        except StopIteration as end:
            self.result, self.over = end.value, True
        except errors.DdbError as error:
            self.result, self.over = error, True

    @property
    def wish(self) -> Wish:
        return self.wishes[-1]

    def turn(self, rng: random.Random, trouble: float = 0.0) -> bool:
        """Do what it wants, if that can be done now. Returns whether it could."""
        wish = self.wish
        if isinstance(wish, Rest):
            self._go(lambda: self.plan.send(None))
        elif isinstance(wish, Ask):
            self._ask(wish, rng, trouble)
        else:
            return self._wait(wish)
        return True

    def _ask(self, wish: Ask, rng: random.Random, trouble: float) -> None:
        unknown = rng.random() < trouble and wish.numbers is None and wish.question.request["op"] != "scan"
        if unknown and rng.random() < 0.5:
            self._go(lambda: self.plan.throw(errors.OutcomeUnknown("lost on its way")))
            return
        try:
            reply = self.model.ask(self.request)
            if wish.numbers is not None:
                wish.numbers.end(self.request)
        except errors.DdbError as error:
            refused = error
            self._go(lambda: self.plan.throw(refused))
            return
        if unknown:
            self._go(lambda: self.plan.throw(errors.OutcomeUnknown("the answer was lost")))
        else:
            self._go(lambda: self.plan.send(wish.question.read(reply)))

    def _wait(self, wish: Await) -> bool:
        while self.cursor < len(self.model.changes):
            event = self.model.changes[self.cursor]
            self.cursor += 1
            mine = event.key == wish.key if wish.key is not None else event.key.startswith(wish.prefix or "")
            if mine and event.rev >= wish.from_rev and wish.wanted(event):
                self._go(functools.partial(self.plan.send, event))
                return True
        return False


def turn_all(
    runners: list[Runner], rng: random.Random, trouble: float = 0.0, done: Callable[[], None] = lambda: None
) -> None:
    """Turn the runners in an order of chance until none can go on."""
    while True:
        going = [runner for runner in runners if not runner.over]
        rng.shuffle(going)
        if not any(runner.turn(rng, trouble) for runner in going):
            return
        done()


@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), limit=st.integers(1, 3), trouble=st.sampled_from([0, 0.3]))
@settings(max_examples=200, deadline=None)
def test_no_more_than_the_limit_hold_at_a_time_and_all_get_their_turn_in_the_order_of_asking(
    seed: int, count: int, limit: int, trouble: float
) -> None:
    rng, model = random.Random(seed), Model()
    prefix = plans.prefix_of("semaphore", "s")
    leases = [model.grant() for _ in range(count)]
    patience = Patience(lambda: 0.0)
    runners = {lease: Runner(model, plans.enter(prefix, limit, lease, "me", patience)) for lease in leases}
    tokens: list[int] = []
    inside: list[int] = []
    while len(tokens) < count:
        turn_all(list(runners.values()), rng, trouble)
        entered = [
            lease for lease, r in runners.items() if r.over and isinstance(r.result, Item) and lease not in inside
        ]
        tokens += sorted(runners[lease].result.created for lease in entered)
        inside += entered
        holding = [lease for lease in inside if lease in model.leases]
        assert len(holding) <= limit and (entered or holding), "somebody can always go on"
        model.end(rng.choice(holding))
    assert tokens == sorted(tokens)


@given(seed=st.integers(0, 10_000), count=st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_who_waits_for_a_lock_goes_on_when_others_die_in_the_line_and_wakes_for_nobody_else(
    seed: int, count: int
) -> None:
    rng, model = random.Random(seed), Model()
    prefix = plans.prefix_of("lock", "l")
    runners: dict[int, Runner] = {}
    for _ in range(count):  # one after the other, so that the order is known
        lease = model.grant()
        runners[lease] = Runner(model, plans.enter(prefix, 1, lease, "me", Patience(lambda: 0.0)))
        turn_all([runners[lease]], rng)
    waiting = list(runners)[1:]
    for before, lease in zip(list(runners), waiting):
        wish = runners[lease].wish
        assert isinstance(wish, Await) and wish.key == plans.key_of(prefix, before) and wish.prefix is None
    rng.shuffle(order := list(runners))
    left = list(runners)
    for lease in order:
        asked = {one: len(runners[one].wishes) for one in left}
        behind = left[left.index(lease) + 1 :][:1]
        model.end(lease)
        left.remove(lease)
        turn_all([runners[one] for one in left], rng)
        woken = [one for one in left if len(runners[one].wishes) > asked[one] or (runners[one].over and one in behind)]
        assert set(woken) <= set(behind), "only the next one wakes up"
        assert not left or isinstance(runners[left[0]].result, Item), "the first in line holds it"
        assert all(not runners[one].over for one in left[1:])


def test_who_waits_too_long_is_told_so_and_who_lost_its_lease_too() -> None:
    model, rng, now = Model(), random.Random(1), [0.0]
    prefix = plans.prefix_of("lock", "l")
    holder, late, dead = model.grant(), model.grant(), model.grant()
    turn_all([Runner(model, plans.enter(prefix, 1, holder, "me", Patience(lambda: 0.0)))], rng)
    runners = [Runner(model, plans.enter(prefix, 1, late, "late", Patience(lambda: now[0], 5.0)))]
    runners.append(Runner(model, plans.enter(prefix, 1, dead, "dead", Patience(lambda: now[0], None, lambda: 5.0))))
    turn_all(runners, rng)
    now[0] = 6.0
    for runner in runners:
        assert isinstance(runner.wish, Await) and runner.wish.until_s() == 5.0
        runner._go(lambda plan=runner.plan: plan.send(None))
    turn_all(runners, rng)
    assert runners[0].result is None and isinstance(runners[1].result, errors.LockLost)


def test_who_waits_looks_again_from_time_to_time_for_its_node_may_be_cut_off() -> None:
    model, rng, now = Model(), random.Random(1), [0.0]
    prefix = plans.prefix_of("lock", "l")
    holder = model.grant()
    turn_all([Runner(model, plans.enter(prefix, 1, holder, "me", Patience(lambda: now[0])))], rng)
    waiting = Runner(model, plans.enter(prefix, 1, model.grant(), "late", Patience(lambda: now[0])))
    turn_all([waiting], rng)
    assert isinstance(waiting.wish, Await) and waiting.wish.until_s() == plans.LOOK_AGAIN_S
    model.end(holder)
    now[0] = plans.LOOK_AGAIN_S
    waiting._go(lambda: waiting.plan.send(None))  # its watch has not told
    turn_all([waiting], rng)
    assert isinstance(waiting.result, Item)


def test_a_lease_that_ran_out_before_its_key_was_made_is_a_lock_lost() -> None:
    model = Model()
    runner = Runner(model, plans.enter(plans.prefix_of("lock", "l"), 1, 7, "me", Patience(lambda: 0.0)))
    turn_all([runner], random.Random(1))
    assert isinstance(runner.result, errors.LockLost)


def test_lines_of_other_names_do_not_count() -> None:
    model, rng = Model(), random.Random(1)
    for name in ("a/b", "a/0000000000000001", "a%2Fb", "a%"):
        turn_all(
            [Runner(model, plans.enter(plans.prefix_of("lock", name), 1, model.grant(), "", Patience(lambda: 0.0)))],
            rng,
        )
    assert len(model.rows) == 4
    runner = Runner(model, plans.enter(plans.prefix_of("lock", "a"), 1, model.grant(), "", Patience(lambda: 0.0)))
    turn_all([runner], rng)
    assert isinstance(runner.result, Item)


@given(seed=st.integers(0, 10_000), rounds=st.integers(1, 3), count=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_double_barrier_lets_all_in_together_and_out_together_round_after_round(
    seed: int, rounds: int, count: int
) -> None:
    rng, model = random.Random(seed), Model()
    prefix = plans.prefix_of("double", "d")
    inside, most = 0, 0
    entered: list[int] = []

    def participant() -> Generator[Wish, Any, None]:
        nonlocal inside, most
        for number in range(rounds):
            lease = model.grant()
            met = yield from plans.meet(prefix, count, lease, Patience(lambda: 0.0))
            assert met is not None and len(met) >= count
            entered.append(number)
            inside += 1
            most = max(most, inside)
            assert entered.count(number) <= count and entered.count(number - 1) in (0, count)
            yield Rest(1)
            inside -= 1
            assert (yield from plans.part(prefix, met, lease, Patience(lambda: 0.0)))

    runners = [Runner(model, participant()) for _ in range(count)]
    turn_all(runners, rng)
    assert all(runner.over and runner.result is None for runner in runners)
    assert sorted(entered) == sorted(list(range(rounds)) * count)


@given(seed=st.integers(0, 10_000), items=st.integers(1, 12), consumers=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_each_item_of_a_queue_is_taken_by_one_and_in_order_by_a_lone_consumer(
    seed: int, items: int, consumers: int
) -> None:
    rng, model = random.Random(seed), Model()
    patience = Patience(lambda: 0.0)
    taken: list[Any] = []

    def consumer(numbers: Numbers) -> Generator[Wish, Any, None]:
        while True:
            item = yield from plans.take("q", numbers, patience)
            assert item is not None
            taken.append(item.value)

    def producer(numbers: Numbers) -> Generator[Wish, Any, None]:
        for n in range(items):
            yield from plans.append("q", n, numbers)

    model_replies: list[Numbers] = [Apart(n) for n in range(consumers + 1)]
    runners = [Runner(model, consumer(numbers)) for numbers in model_replies[1:]]
    turn_all([*runners, Runner(model, producer(model_replies[0]))], rng)
    assert sorted(taken) == list(range(items))
    if consumers == 1:
        assert taken == list(range(items))


@given(seed=st.integers(0, 10_000), items=st.integers(1, 8), workers=st.integers(1, 4), deaths=st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_each_item_of_a_queue_is_finished_once_however_often_workers_die(
    seed: int, items: int, workers: int, deaths: int
) -> None:
    rng, model = random.Random(seed), Model()
    patience = Patience(lambda: 0.0)
    finished: list[Any] = []
    working: dict[str, int] = {}
    tokens: dict[str, int] = {}

    def worker(numbers: Numbers) -> Generator[Wish, Any, None]:
        while True:
            lease = model.grant()
            working[str(numbers.client)] = lease
            claimed = yield from plans.claim("q", lease, patience)
            assert claimed is not None
            item, token = claimed
            assert token > tokens.get(item.key, 0), "tokens grow from worker to worker"
            tokens[item.key] = token
            yield Rest(1)
            try:
                yield from plans.finish("q", item, lease, numbers)
                finished.append(item.value)
            except errors.LockLost:
                assert lease not in model.leases
            model.end(lease)

    def producer(numbers: Numbers) -> Generator[Wish, Any, None]:
        for n in range(items):
            yield from plans.append("q", n, numbers)

    runners = [Runner(model, producer(Apart(0)))]
    runners += [Runner(model, worker(Apart(n + 1))) for n in range(workers + deaths)]
    left = list(runners)
    for victim in range(deaths):
        for _ in range(rng.randint(0, 30)):
            going = [runner for runner in left if not runner.over]
            rng.choice(going).turn(rng)
        left.remove(runners[1 + victim])
        model.end(working[str(victim + 1)])
    turn_all(left, rng)
    assert sorted(finished) == list(range(items))


def queue_of_one(model: Model, value: Any) -> None:
    model.ask({"op": "put", "key": plans.key_of(plans.items_of("q"), 1), "value": value})


def test_a_worker_whose_claim_ran_out_can_not_finish_what_another_works_on() -> None:
    model, rng, patience = Model(), random.Random(1), Patience(lambda: 0.0)
    queue_of_one(model, "letter")
    ada, bob = model.grant(), model.grant()
    first = Runner(model, plans.claim("q", ada, patience))
    turn_all([first], rng)
    model.end(ada)
    second = Runner(model, plans.claim("q", bob, patience))
    turn_all([second], rng)
    (item, token), (again, later) = first.result, second.result
    assert item == again and token < later
    late, good = (
        Runner(model, plans.finish("q", item, ada, Apart(1))),
        Runner(model, plans.finish("q", item, bob, Apart(2))),
    )
    turn_all([late], rng)
    assert isinstance(late.result, errors.LockLost)
    turn_all([good], rng)
    assert good.result is None and not model.rows


def test_an_item_that_took_anothers_place_meanwhile_is_not_taken_for_it() -> None:
    model, rng = Model(), random.Random(1)
    queue_of_one(model, "old")
    runner = Runner(model, plans.take("q", Apart(1), Patience(lambda: 0.0)))
    while not (isinstance(runner.wish, Ask) and runner.wish.question.request["op"] == "delete"):
        runner.turn(rng)
    model.rows.clear()
    queue_of_one(model, "new")
    turn_all([runner], rng)
    assert runner.result.value == "new" and not model.rows


class Apart(Numbers):
    """Numbers of sessions that the model, which knows of one session only, does not mix up."""

    def begin(self, request: Any) -> dict[str, Any]:
        numbered = super().begin(request)
        return {**numbered, "seq": numbered["seq"] * 100 + self.client}

    def end(self, numbered: Any) -> None:
        super().end({"seq": numbered["seq"] // 100})


def test_who_leads_follows_from_the_changes() -> None:
    prefix = plans.prefix_of("election", "e")
    ada, bob = plans.key_of(prefix, 1), plans.key_of(prefix, 2)
    roll = plans.Roll(prefix, [Item(ada, "Ada", 10, 10, 1)])
    roll.take(Event("put", bob, "Bob", 11, 1))
    roll.take(Event("put", prefix + "x/" + "0" * 16, "Eve", 5, 1))
    roll.take(Event("put", ada, "Ada!", 12, 2))
    assert roll.leader == plans.Leader("Ada!", 10)
    roll.take(Event("delete", ada, None, 13, 0))
    assert roll.leader == plans.Leader("Bob", 11)
    roll.take(Event("delete", bob, None, 14, 0))
    assert roll.leader is None


# What is kept


def test_a_lease_is_lost_when_it_may_have_ended_and_stays_lost() -> None:
    now = [0.0]
    keeping = Keeping(9.0, 0.0, lambda: now[0])
    assert (keeping.due_s, keeping.until_s, keeping.lost) == (3.0, 9.0, False)
    now[0] = 4.0
    keeping.kept(3.0)
    assert (keeping.due_s, keeping.until_s, keeping.remaining_s) == (6.0, 12.0, 8.0)
    keeping.kept(1.0)
    assert keeping.until_s == 12.0, "an answer that was overtaken takes nothing back"
    now[0] = 12.0
    assert keeping.lost and keeping.remaining_s == 0
    keeping.kept(12.0)
    assert keeping.lost


def test_a_lease_that_the_cluster_does_not_know_is_lost_and_any_other_failure_is_tried_again_soon() -> None:
    keeping = Keeping(10.0, 0.0, lambda: 4.0)
    keeping.failed(errors.Unreachable("nobody"))
    assert not keeping.lost and keeping.due_s == 4.5
    keeping.failed(errors.BadRequest("this client is closed"))
    assert not keeping.lost
    keeping.failed(errors.BadRequest("no such lease", lease=7))
    assert keeping.lost


def test_no_write_of_a_session_runs_further_ahead_than_the_cluster_remembers() -> None:
    numbers = Numbers(7)
    put = {"op": "put", "key": "k", "value": 1}
    first = numbers.begin(put)
    others = []
    while numbers.admits(put):
        others.append(numbers.begin(put))
    assert len(others) == WINDOW - 1 and [r["seq"] for r in others] == list(range(2, WINDOW + 1))
    for other in others:
        numbers.end(other)
    assert not numbers.admits(put), "the first one is still unanswered"
    numbers.end(first)
    assert numbers.admits(put)


@pytest.mark.parametrize("large", [{"op": "txn"}, {"op": "put", "key": "k", "value": 1, "if": {"rev": 1}}])
def test_a_write_whose_reply_may_be_large_goes_alone(large: dict[str, Any]) -> None:
    numbers = Numbers(7)
    put = {"op": "put", "key": "k", "value": 1}
    one = numbers.begin(put)
    assert numbers.admits(put) and not numbers.admits(large)
    numbers.end(one)
    alone = numbers.begin(large)
    assert not numbers.admits(put) and not numbers.admits(large)
    numbers.end(alone)
    assert [r.get("seq") for r in numbers.some([{"op": "get"}, put, {"op": "get"}, large, put])] == [None, 3, None]


def test_blocks_of_sessions_nest_and_are_of_one_client() -> None:
    mine, yours = object(), object()
    outer, inner = Numbers(1), Numbers(2)
    enter(mine, outer)
    enter(yours, inner)
    assert current(mine) is outer and current(yours) is inner and current(object()) is None
    leave(outer)
    assert current(mine) is None and current(yours) is inner
    leave(inner)
    assert current(yours) is None
