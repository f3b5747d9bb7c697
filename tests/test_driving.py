"""What a generator's steps are told, by the driver that blocks and by the one that awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import pytest

from ddb.driving import drive, drive_awaiting


class Told(Exception):
    """A failure that the steps below ask to be told of."""


Drive = Callable[[Generator[str, Any, Any], Callable[[str], Any]], Any]


def blocking(steps: Generator[str, Any, Any], perform: Callable[[str], Any]) -> Any:
    return drive(steps, perform, Told)


def awaiting(steps: Generator[str, Any, Any], perform: Callable[[str], Any]) -> Any:
    async def performed(step: str) -> Any:
        await asyncio.sleep(0)
        return perform(step)

    return asyncio.run(drive_awaiting(steps, performed, Told))


@pytest.fixture(params=[blocking, awaiting], ids=["blocking", "awaiting"])
def driver(request: pytest.FixtureRequest) -> Drive:
    driver: Drive = request.param
    return driver


def failing(error: BaseException) -> Callable[[str], Any]:
    def perform(step: str) -> Any:
        raise error

    return perform


def test_each_step_is_done_once_and_answered_with_what_came_of_it(driver: Drive) -> None:
    done: list[str] = []

    def perform(step: str) -> str:
        done.append(step)
        return step.upper()

    def steps() -> Generator[str, Any, list[str]]:
        return [(yield "a"), (yield "b")]

    assert driver(steps(), perform) == ["A", "B"] and done == ["a", "b"]


def test_steps_without_a_step_are_done_at_once(driver: Drive) -> None:
    def steps() -> Generator[str, Any, int]:
        return 7
        yield "never"

    assert driver(steps(), failing(AssertionError("nothing is to be done"))) == 7


def test_a_failure_that_the_steps_ask_for_is_thrown_into_them(driver: Drive) -> None:
    def steps() -> Generator[str, Any, str]:
        try:
            yield "a"
        except Told as failure:
            return f"told of {failure}"
        return "not told"

    assert driver(steps(), failing(Told("it"))) == "told of it"


def test_what_the_steps_raise_comes_out(driver: Drive) -> None:
    def steps() -> Generator[str, Any, None]:
        yield "a"
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        driver(steps(), len)


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_any_other_failure_ends_the_steps_where_they_stand_and_closes_them(driver: Drive, error: BaseException) -> None:
    closed: list[str] = []

    def steps() -> Generator[str, Any, None]:
        try:
            yield "a"
        except GeneratorExit:
            closed.append("at a")
            raise

    held = steps()  # so that it isn't the garbage collector that closes it
    with pytest.raises(type(error)):
        driver(held, failing(error))
    assert closed == ["at a"]


def test_a_cancelled_task_closes_its_steps() -> None:
    closed: list[str] = []

    def steps() -> Generator[str, Any, None]:
        try:
            yield "a"
        finally:
            closed.append("at a")

    async def main() -> None:
        under_way = asyncio.Event()

        async def perform(step: str) -> None:
            under_way.set()
            await asyncio.Event().wait()

        held = steps()
        task = asyncio.create_task(drive_awaiting(held, perform, Told))
        await under_way.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == ["at a"]

    asyncio.run(main())
