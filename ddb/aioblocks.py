"""Pipelines and transactions, for asyncio: the blocks of pipelines.py and of drafts.py, which have the laws."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ddb import questions
from ddb.calls import Outcome
from ddb.drafts import Retrying, Trial
from ddb.pipelines import Gathering
from ddb.questions import HasId, Question
from ddb.results import TxnResult

T = TypeVar("T")


class Asks(Protocol):
    """Answers questions."""

    def __call__(self, question: Question[T]) -> Awaitable[T]:
        """The answer to `question`."""


class Pipeline(Gathering):
    """Gathers calls, and sends them when its `async with` block ends; where that ends by an exception, they are
    forgotten. Made by `Client.pipeline`."""

    def __init__(
        self,
        volley: Callable[[Sequence[Mapping[str, Any]], float], Awaitable[Sequence[Outcome]]],
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._volley = volley
        self._timeout_s = timeout_s

    async def send(self) -> None:
        """Send what has been gathered, now. Raises the first error that came of it; the others are with their calls.

        >>> pipe = db.pipeline()
        >>> visits = pipe.incr("visits")
        >>> await pipe.send()
        >>> visits.result.value
        1
        """
        if self.calls:
            self.settle(await self._volley([call.question.request for call in self.calls], self._timeout_s))

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.send()


class Attempt(Trial):
    """One attempt at a transaction: an `async with` block whose reads are remembered, and whose writes are kept back
    until it ends. Of an attempt that was overtaken nothing is done."""

    statement = "an `async with` statement"

    def __init__(self, ask: Asks) -> None:
        super().__init__()
        self._ask = ask

    async def get(self, key: str, default: Any = None) -> Any:
        """The value under `key`, or `default` where there is none.

        >>> async for attempt in db.transaction():
        ...     async with attempt as tx:
        ...         print(await tx.get("city", "nowhere"))
        nowhere
        """
        known, value = self._draft.own(key, default)
        return value if known else self._draft.read(key, await self._ask(questions.get(key)), default)

    def put(self, key: str, value: Any, *, lease: int | HasId | None = None) -> None:
        """Set `key` when the block ends.

        >>> async for attempt in db.transaction():
        ...     async with attempt as tx:
        ...         tx.put("city", "Oslo")
        >>> (await db.get("city")).value
        'Oslo'
        """
        self._draft.put(key, value, lease)

    def delete(self, key: str) -> None:
        """Remove `key`, if it is there, when the block ends.

        >>> _ = await db.put("city", "Oslo")
        >>> async for attempt in db.transaction():
        ...     async with attempt as tx:
        ...         tx.delete("city")
        >>> await db.get("city")
        """
        self._draft.delete(key)

    async def __aenter__(self) -> Attempt:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            question = self._draft.commit()
            self.committed = TxnResult(True, (), 0) if question is None else await self._ask(question)


class Attempts:
    """A loop of attempts at one transaction, until one is committed. Made by `Client.transaction`."""

    def __init__(self, ask: Asks, timeout_s: float) -> None:
        self._ask = ask
        self._timeout_s = timeout_s

    async def __aiter__(self) -> AsyncIterator[Attempt]:
        retrying = Retrying(self._timeout_s, time.monotonic, random.Random())
        while True:
            attempt = Attempt(self._ask)
            try:
                yield attempt
            except GeneratorExit:
                attempt.left()
                raise
            if attempt.succeeded():
                return
            await asyncio.sleep(retrying.pause_s())
