"""Transactions that think, for programs that block: the loop and the block of drafts.py, which has the laws."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ddb import questions
from ddb.drafts import MISSING, Retrying, Trial
from ddb.questions import HasId, Question
from ddb.results import TxnResult

T = TypeVar("T")


class Asks(Protocol):
    """Answers questions."""

    def __call__(self, question: Question[T]) -> T:
        """The answer to `question`."""


class Attempt(Trial):
    """One attempt at a transaction: a `with` block whose reads are remembered, and whose writes are kept back until it
    ends. Of an attempt that was overtaken nothing is done."""

    def __init__(self, ask: Asks) -> None:
        super().__init__()
        self._ask = ask

    def get(self, key: str, default: Any = None) -> Any:
        """The value under `key`, or `default` where there is none.

        >>> for attempt in db.transaction():
        ...     with attempt as tx:
        ...         print(tx.get("city", "nowhere"))
        nowhere
        """
        known, value = self._draft.own(key, default)
        return value if known else self._draft.read(key, self._ask(questions.get(key)), default)

    def put(self, key: str, value: Any, *, lease: int | HasId | None = None) -> None:
        """Set `key` when the block ends.

        >>> for attempt in db.transaction():
        ...     with attempt as tx:
        ...         tx.put("city", "Oslo")
        ...         tx["city"], "city" in db
        ('Oslo', False)
        """
        self._draft.put(key, value, lease)

    def delete(self, key: str) -> None:
        """Remove `key`, if it is there, when the block ends.

        >>> db["city"] = "Oslo"
        >>> for attempt in db.transaction():
        ...     with attempt as tx:
        ...         tx.delete("city")
        >>> "city" in db
        False
        """
        self._draft.delete(key)

    def __getitem__(self, key: str) -> Any:
        value = self.get(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self.put(key, value)

    def __delitem__(self, key: str) -> None:
        self[key]
        self.delete(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key, MISSING) is not MISSING

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            question = self._draft.commit()
            self.committed = TxnResult(True, (), 0) if question is None else self._ask(question)


class Attempts:
    """A loop of attempts at one transaction, until one is committed. Made by `Client.transaction`."""

    def __init__(self, ask: Asks, timeout_s: float) -> None:
        self._ask = ask
        self._timeout_s = timeout_s

    def __iter__(self) -> Iterator[Attempt]:
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
            time.sleep(retrying.pause_s())
