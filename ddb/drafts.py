"""What a transaction that thinks has read and will write, and when it is tried again.

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

import logging
import random
from collections.abc import Callable
from typing import Any, ClassVar, Final

from ddb import questions
from ddb.errors import BadRequest, Conflict
from ddb.questions import HasId, Question
from ddb.results import Item, TxnResult

_log = logging.getLogger("ddb.client")

PAUSE_FIRST_S: Final = 0.002
PAUSE_MAX_S: Final = 0.25
MISSING: Final = object()
"""Stands for the value of a key that is not there."""


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
        return True, default if value is MISSING else value

    def read(self, key: str, item: Item | None, default: Any) -> Any:
        """Note what was read."""
        self.reads[key] = item.rev if item is not None else 0
        self._values[key] = item.value if item is not None else MISSING
        return item.value if item is not None else default

    def put(self, key: str, value: Any, lease: int | HasId | None) -> None:
        """Note a put."""
        self.writes[key] = questions.put(key, value, None, lease).request
        self._values[key] = value

    def delete(self, key: str) -> None:
        """Note a delete."""
        self.writes[key] = questions.delete(key).request
        self._values[key] = MISSING

    def commit(self) -> Question[TxnResult] | None:
        """The commit, where there is anything to commit or to be sure of."""
        if not self.reads and not self.writes:
            return None
        conditions = [{"key": key, "rev": rev} for key, rev in self.reads.items()]
        return questions.txn(conditions, list(self.writes.values()))


class Trial:
    """One attempt at a transaction, and what came of it. `statement` is what it is to be used in."""

    statement: ClassVar[str] = "a `with` statement"

    def __init__(self) -> None:
        self.committed: TxnResult | None = None
        self._draft = Draft()

    def succeeded(self) -> bool:
        """Whether it was committed, rather than overtaken. Raises BadRequest where it was not used as it should be."""
        if self.committed is None:
            raise BadRequest(f"Use each attempt at a transaction in {self.statement}, to its end.")
        return self.committed.succeeded

    def left(self) -> None:
        """The program has left the loop, by a `break` or a `return`: say so where that means that nothing was done."""
        if self.committed is not None and not self.committed.succeeded:
            _log.warning("a transaction was left after an attempt that was overtaken: it did nothing")


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
