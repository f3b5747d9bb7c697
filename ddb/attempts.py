"""Transactions that think: read, decide, write, and again where others came in between.

Laws:

1. What is committed is as if it had happened in one moment: every key that was read, found or not, is unchanged then.
2. A transaction sees its own writes; nobody else sees them before it is committed.
3. It ends: with success, or with the program's own exception, or with Conflict when its time is up.

Theory. Nothing is locked (optimistic concurrency control). Each key read is remembered with its revision, 0 where there
was none, and the commit is one `txn` on the condition that all of them still stand at these. It is tried again at
once after the first conflict, and then after a pause that doubles, of which a random part is slept, so that those who
collided don't meet again. A range can't be read this way: a key that somebody adds to it would go unnoticed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

from ddb import questions
from ddb.errors import BadRequest, Conflict
from ddb.questions import HasId, Question
from ddb.results import Item, TxnResult

T = TypeVar("T")

PAUSE_FIRST_S: Final = 0.002
PAUSE_MAX_S: Final = 0.25
_DELETED: Final = object()


class Draft:
    """What a transaction has read and will write."""

    def __init__(self) -> None:
        self.reads: dict[str, int] = {}
        self.writes: dict[str, dict[str, Any]] = {}
        self._values: dict[str, Any] = {}

    def own(self, key: str, default: Any) -> tuple[bool, Any]:
        """Whether the transaction knows what `key` is by now, and that."""
        if key not in self._values:
            return False, None
        value = self._values[key]
        return True, default if value is _DELETED else value

    def read(self, key: str, item: Item | None, default: Any) -> Any:
        """Note what was read."""
        self.reads[key] = item.rev if item is not None else 0
        self._values[key] = item.value if item is not None else _DELETED
        return item.value if item is not None else default

    def put(self, key: str, value: Any, lease: int | HasId | None) -> None:
        """Note a put."""
        self.writes[key] = questions.put(key, value, None, lease).request
        self._values[key] = value

    def delete(self, key: str) -> None:
        """Note a delete."""
        self.writes[key] = questions.delete(key).request
        self._values[key] = _DELETED

    def commit(self) -> Question[TxnResult] | None:
        """The commit, where there is anything to commit or to be sure of."""
        if not self.reads and not self.writes:
            return None
        conditions = [{"key": key, "rev": rev} for key, rev in self.reads.items()]
        return questions.txn(conditions, list(self.writes.values()))


class Retrying:
    """When a transaction is tried again."""

    def __init__(self, timeout_s: float, now: Callable[[], float], rng: random.Random) -> None:
        self._now = now
        self._rng = rng
        self._deadline_s = now() + timeout_s
        self._pause_s = 0.0

    def pause_s(self) -> float:
        """How long to wait before the next attempt. Raises Conflict where there is no time for it."""
        pause_s = self._rng.uniform(0, self._pause_s)
        if self._now() + pause_s >= self._deadline_s:
            raise Conflict("Others changed what this transaction read, each time that it was tried; it did nothing.")
        self._pause_s = min(max(2 * self._pause_s, PAUSE_FIRST_S), PAUSE_MAX_S)
        return pause_s


class Asks(Protocol):
    """Answers questions."""

    def __call__(self, question: Question[T]) -> T:
        """The answer to `question`."""


class Attempt:
    """One attempt at a transaction: a `with` block whose reads are remembered, and whose writes are kept back until it
    ends. Of an attempt that was overtaken nothing is done."""

    def __init__(self, ask: Asks) -> None:
        self.committed: TxnResult | None = None
        self._ask = ask
        self._draft = Draft()

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
        value = self.get(key, _DELETED)
        if value is _DELETED:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self.put(key, value)

    def __delitem__(self, key: str) -> None:
        self[key]
        self.delete(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key, _DELETED) is not _DELETED

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
            yield attempt
            if attempt.committed is None:
                raise BadRequest("Use each attempt at a transaction in a `with` statement, to its end.")
            if attempt.committed.succeeded:
                return
            time.sleep(retrying.pause_s())
