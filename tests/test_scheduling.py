"""Which threads give way to which, as far as this system takes advice."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest

from ddb import scheduling
from ddb.scheduling import Turns
from ddb.world import Worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no policies of their own here")


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a thread of its own: the policy of that thread is its own, too."""
    found = SimpleQueue[Any]()
    thread = threading.Thread(target=lambda: found.put(work()))
    thread.start()
    thread.join()
    return found.get(timeout=1)


def policy() -> int:
    return os.sched_getscheduler(0)


def test_a_thread_and_those_that_it_starts_do_not_interrupt() -> None:
    def work() -> list[int]:
        before = policy()
        scheduling.keep_turns_whole()
        return [before, policy(), in_a_thread(policy)]

    assert in_a_thread(work) == [os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_BATCH]


def test_threads_interrupt_for_a_while_and_then_no_more() -> None:
    def work() -> list[list[int]]:
        other_ended = threading.Event()
        scheduling.keep_turns_whole()
        turns, other = Turns(), threading.Thread(target=other_ended.wait)
        other.start()
        assert other.native_id
        turns.add(other.native_id)
        seen = []
        for change in (lambda: None, turns.may_interrupt, turns.may_interrupt, turns.are_whole, turns.are_whole):
            change()
            seen.append([policy(), os.sched_getscheduler(other.native_id)])
        other_ended.set()
        other.join()
        turns.may_interrupt()  # a thread that has ended is no failure
        turns.are_whole()
        seen.append([policy()])
        return seen

    batch, interrupting = [os.SCHED_BATCH] * 2, [os.SCHED_OTHER] * 2
    assert in_a_thread(work) == [batch, interrupting, interrupting, interrupting, batch, [os.SCHED_BATCH]]


def test_threads_that_nobody_asked_keep_their_policy() -> None:
    def work() -> int:
        turns = Turns()
        turns.may_interrupt()
        turns.are_whole()
        return policy()

    assert in_a_thread(work) == os.SCHED_OTHER


def test_a_worker_is_nice_and_may_be_interrupted_while_it_or_another_is_at_work() -> None:
    def work() -> list[int]:
        scheduling.keep_turns_whole()
        posted, turns = SimpleQueue[Any](), Turns()
        workers = [Worker(lambda *call: posted.put(call), turns) for _ in range(2)]
        seen = [policy()]
        for worker in workers:
            for _ in range(2):
                worker.run(
                    lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), lambda n, _: seen.append(n)
                )
        for _ in range(4):
            seen.append(policy())
            call, *arguments = posted.get(timeout=5)
            call(*arguments)
        seen.append(policy())
        for worker in workers:
            worker.close()
        return seen

    batch, other, nice = os.SCHED_BATCH, os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0) + scheduling.NICE
    assert in_a_thread(work) == [batch, *[other, nice] * 4, batch]


def test_where_a_system_has_none_of_it_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getscheduler")
    monkeypatch.setattr(sys, "platform", "darwin")
    scheduling.keep_turns_whole()
    scheduling.step_back()
    Turns().may_interrupt()
    monkeypatch.undo()
    assert policy() == os.SCHED_OTHER
