"""What recipes refuse before anything is asked: names that name nothing, and numbers that count nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import ddb
from ddb import aio, console, errors, plans
from ddb.client import Client
from ddb.commands import KEY_BYTES_MAX

NOBODY = "127.0.0.1:1"
MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "lock": lambda db, name: db.lock(name),
    "semaphore": lambda db, name: db.semaphore(name, 2),
    "election": lambda db, name: db.election(name),
    "barrier": lambda db, name: db.barrier(name),
    "double barrier": lambda db, name: db.double_barrier(name, 2),
    "queue": lambda db, name: db.queue(name),
    "counter": lambda db, name: db.counter(name),
}


@pytest.fixture(params=[ddb.connect, aio.connect], ids=["blocking", "asyncio"])
def db(request: pytest.FixtureRequest) -> Any:
    """A client that has asked nobody anything, so that there is nothing to close."""
    return request.param(NOBODY)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("name", "kinds", "said"),
    [
        ("", errors.BadRequest, "must not be empty"),
        (None, errors.BadRequest, "must be a string, not of type NoneType"),
        (b"name", errors.BadRequest, "must be a string, not of type bytes"),
        ("a\ud800", errors.BadRequest, "holds an unpaired surrogate"),
        ("x" * KEY_BYTES_MAX, errors.TooLarge, "is .* bytes too long"),
        ("ø" * (KEY_BYTES_MAX // 2), errors.TooLarge, "is .* bytes too long"),
        ("/" * (KEY_BYTES_MAX // 3), errors.TooLarge, "is .* bytes too long"),
    ],
)
def test_a_name_that_can_be_nobodys_is_refused_at_once(
    db: Any, kind: str, name: Any, kinds: type[Exception], said: str
) -> None:
    with pytest.raises(kinds, match=f"^The {kind}'s name {said}") as refused:
        MAKERS[kind](db, name)
    assert str(refused.value).count(".") == 1 and str(refused.value).endswith((".", ")."))


@pytest.mark.parametrize("filler", ["x", "ø", "%", "\0"])
def test_the_longest_name_there_can_be_and_any_character_make_a_recipe_that_works(client: Client, filler: str) -> None:
    fits = plans.PREFIX_BYTES_MAX - len("ddb/semaphore//")
    name = filler * (fits // len(plans.prefix_of("lock", filler)[len("ddb/lock/") : -1].encode()))
    with client.lock(name) as lock, client.semaphore(name, 1), client.election(name), client.barrier(name):
        assert client.put("guarded", 1, if_=lock.guard).applied
    with client.queue(name) as queue, client.counter(name) as counter, client.double_barrier(name, 1):
        queue.put("first")
        with queue.take(wait_s=1) as task:
            assert task.value == "first"
        assert counter.incr() == 1


def test_what_did_not_come_in_time_is_no_unknown_outcome() -> None:
    every = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.DdbError)]
    assert errors.NotInTime("").exit_code == console.CONDITION_NOT_MET
    assert {error for error in every if error.exit_code == 6} == {
        error
        for error in every
        if not error.definite and error is not errors.Internal  # that is a bug: 1
    }
