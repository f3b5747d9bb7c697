"""A client after a fork: parent and child go on side by side, and neither takes what is the other's."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from ddb import errors
from ddb.client import Client

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


class Child:
    """A forked process that does `work` once it is let go, and tells what came of it as JSON."""

    def __init__(self, work: Callable[[], Any]) -> None:
        told, telling = os.pipe()
        going, go = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(go)
            try:
                os.read(going, 1)
                answer = work()
            except BaseException:
                answer = traceback.format_exc()
            os.write(telling, json.dumps(answer).encode())
            os._exit(0)
        os.close(going)
        os.close(telling)
        self._told, self._go = told, go

    def let_go(self) -> None:
        os.close(self._go)

    def result(self) -> Any:
        with open(self._told, "rb") as stream:
            answer = stream.read()
        os.waitpid(self._pid, 0)
        return json.loads(answer)


def in_child(work: Callable[[], Any]) -> Any:
    child = Child(work)
    child.let_go()
    return child.result()


def test_each_process_gets_the_answers_to_its_own_questions(client: Client) -> None:
    client.update({f"k{n}": n for n in range(8)})
    for _ in range(10):
        children = [Child(lambda n=n: client[f"k{n}"]) for n in range(8)]  # type: ignore[misc]
        for child in children:
            child.let_go()
        assert client["k5"] == 5
        assert [child.result() for child in children] == list(range(8))


def test_what_is_counted_in_children_is_counted_once_each(client: Client) -> None:
    counter = client.counter("visits")
    assert counter.incr() == 1

    def work() -> int:
        for _ in range(10):
            counter.incr()
        counter.close()
        return 10

    children = [Child(work) for _ in range(4)]
    for child in children:
        child.let_go()
    assert [child.result() for child in children] == [10] * 4
    assert counter.incr() == 42


def test_a_write_of_a_child_is_not_taken_for_one_of_its_parents_session(client: Client) -> None:
    def work() -> str:
        with pytest.raises(errors.BadRequest, match="open one here"):
            client.incr("n")
        with client.session():
            return str(client.incr("n").value)

    with client.session():
        assert client.incr("n").value == 1
        assert in_child(work) == "2"
        assert client.incr("n").value == 3


def test_a_child_that_leaves_its_parents_blocks_gives_nothing_back(client: Client) -> None:
    def leave(*blocks: Any) -> bool:
        for block in blocks:
            block.__exit__(None, None, None)
        return True

    session = client.session()
    with client.lock("l") as lock, client.barrier("b", ttl_s=60), client.lease(60) as lease, session:
        client.put("there", 1, lease=lease)
        assert in_child(lambda: leave(session, lease, lock)) is True
        assert in_child(client.close) is None
        assert client.incr("n").value == 1
        assert lock.held and lease.keepalive() > 50 and client.put("guarded", 1, if_=lock.guard).applied
        assert not client.barrier("b").wait(0) and "there" in client


def test_parent_and_child_are_told_of_every_change(client: Client) -> None:
    with client.watch(prefix="seen/") as watch:
        client.put("seen/0", 0)
        assert next(watch).key == "seen/0"
        child = Child(lambda: [next(watch).key for _ in range(20)])
        child.let_go()
        keys = [f"seen/{n}" for n in range(1, 21)]
        for key in keys:
            client.put(key, 0)
        assert [next(watch).key for _ in keys] == keys
        assert child.result() == keys
