"""Carrying out what a generator wants done, by one who blocks and by one who awaits.

Laws:

1. What is done for a step is told to the generator, or thrown into it where it is a failure that the generator asked to be
   told of; whatever else goes wrong ends it.
2. However it ends, also by an interrupt or a cancelled task, the generator is closed.

Theory. What a client decides (calls.py, plans.py) touches nothing in the world, so somebody must touch it for it. That loop is the
same whatever the steps are, and for who blocks and who awaits it differs in one word. Neither needs a loop of events here, or
a socket: these are behind `perform`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


def drive(steps: Generator[S, Any, T], perform: Callable[[S], Any], told: type[Exception]) -> T:
    """Carry out `steps` with a `perform` that blocks: it does one step and returns what came of it.

    What it raises of the kind `told` is thrown into the generator. Returns what the generator returns, raises what it
    raises, and whatever else `perform` does.
    """
    try:
        step = next(steps)
        while True:
            try:
                answer = perform(step)
            except told as failure:
                step = steps.throw(failure)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        done: T = end.value
        return done
    finally:
        steps.close()


async def drive_awaiting(
    steps: Generator[S, Any, T], perform: Callable[[S], Awaitable[Any]], told: type[Exception]
) -> T:
    """The same with a `perform` that is awaited."""
    try:
        step = next(steps)
        while True:
            try:
                answer = await perform(step)
            except told as failure:
                step = steps.throw(failure)
            else:
                step = steps.send(answer)
    except StopIteration as end:
        done: T = end.value
        return done
    finally:
        steps.close()
