"""Virtual time keeps its order, forgets the dead, and stops where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddb.agenda import Agenda


class Somebody:
    """An actor that does at once what happens to it, and writes it down."""

    def __init__(self) -> None:
        self.life = 0
        self.done: list[tuple[Any, ...]] = []

    def happens(self, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.done.append(args)
        fn(*args)


def drained(agenda: Agenda, until: float = 1e9) -> int:
    count = 0
    while agenda.step(until):
        count += 1
    return count


def test_what_is_due_at_the_same_time_happens_in_the_order_in_which_it_was_put() -> None:
    agenda, done = Agenda(), list[int]()
    for number in range(100):
        agenda.at(1.0, None, done.append, number)
        agenda.after(1.0, None, done.append, 1000 + number)
    drained(agenda)
    assert done == [n for number in range(100) for n in (number, 1000 + number)]


def test_what_is_due_earlier_happens_earlier_whenever_it_was_put() -> None:
    agenda, done = Agenda(), list[float]()
    for when in (3.0, 1.0, 2.0):
        agenda.at(when, None, done.append, when)
    agenda.at(0.5, None, lambda: agenda.after(1.0, None, done.append, 1.5))
    drained(agenda)
    assert done == [1.0, 1.5, 2.0, 3.0]


def test_what_an_event_puts_down_for_now_happens_after_what_was_already_due_now() -> None:
    agenda, done = Agenda(), list[str]()
    agenda.at(1.0, None, lambda: agenda.after(0.0, None, done.append, "new"))
    agenda.at(1.0, None, done.append, "old")
    drained(agenda)
    assert done == ["old", "new"]


def test_time_jumps_from_event_to_event_and_each_is_one_step() -> None:
    agenda, seen = Agenda(), list[float]()
    for when in (0.25, 7.5):
        agenda.at(when, None, lambda: seen.append(agenda.now))
    assert agenda.step(10.0) and agenda.now == 0.25
    assert agenda.step(10.0) and agenda.now == 7.5
    assert seen == [0.25, 7.5] and agenda.steps == 2


def test_until_excludes_what_is_due_then_and_time_ends_there() -> None:
    agenda, done = Agenda(), list[str]()
    agenda.at(2.0, None, done.append, "then")
    assert not agenda.step(2.0)
    assert (agenda.now, agenda.steps, done) == (2.0, 0, [])
    assert agenda.step(2.1)
    assert (agenda.now, done) == (2.0, ["then"])


def test_time_never_goes_back_to_an_earlier_until() -> None:
    agenda = Agenda()
    assert not agenda.step(5.0)
    assert not agenda.step(1.0)
    assert agenda.now == 5.0


def test_an_event_happens_as_its_actors_own_doing() -> None:
    agenda, somebody, done = Agenda(), Somebody(), list[str]()
    agenda.at(1.0, somebody, done.append, "x")
    drained(agenda)
    assert somebody.done == [("x",)] and done == ["x"]


def test_nothing_happens_that_was_put_down_in_an_earlier_life() -> None:
    agenda, somebody, done = Agenda(), Somebody(), list[str]()
    agenda.at(1.0, somebody, done.append, "of the first life")
    somebody.life += 1
    agenda.at(1.0, somebody, done.append, "of the second")
    agenda.after(2.0, somebody, done.append, "of the second, and late")
    agenda.at(1.5, None, lambda: setattr(somebody, "life", 2))
    assert drained(agenda) == 2
    assert done == ["of the second"]


def test_events_of_the_dead_take_no_time_and_no_step() -> None:
    agenda, somebody = Agenda(), Somebody()
    agenda.at(1.0, somebody, lambda: None)
    somebody.life += 1
    agenda.at(3.0, None, lambda: None)
    assert not agenda.step(2.0)
    assert (agenda.now, agenda.steps) == (2.0, 0)
    assert agenda.step(4.0)
    assert (agenda.now, agenda.steps) == (3.0, 1)


def test_an_event_that_raises_has_had_its_turn() -> None:
    agenda, done = Agenda(), list[str]()

    def fails() -> None:
        raise ZeroDivisionError

    agenda.at(1.0, None, fails)
    agenda.at(1.0, None, done.append, "next")
    try:
        agenda.step(2.0)
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("the error did not come out")
    assert agenda.steps == 1
    assert agenda.step(2.0) and done == ["next"]
