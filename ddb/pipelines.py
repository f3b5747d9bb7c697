"""Calls that are gathered, to be sent all at once.

Laws: each stands for itself, and is judged by the laws of calls.py; what came of it is known when the block has ended, and
not before; an error that nobody looks at is not passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

from ddb import questions
from ddb.calls import Outcome
from ddb.errors import BadRequest, DdbError
from ddb.questions import Conditions, HasId, Question
from ddb.results import DeleteResult, IncrResult, Item, PutResult, ScanResult, TxnResult

T = TypeVar("T")


class Later(Generic[T]):
    """What a call of a pipeline will answer."""

    def __init__(self, question: Question[T]) -> None:
        self.question = question
        self._outcome: Outcome | None = None

    @property
    def result(self) -> T:
        """The answer, as the client's method of the same name returns it. Raises what that would raise, and BadRequest
        where the pipeline has not been sent."""
        if self._outcome is None:
            raise BadRequest("This pipeline has not been sent yet; its block must end first.")
        if isinstance(self._outcome, DdbError):
            raise self._outcome
        return self.question.result(self._outcome)

    @property
    def error(self) -> DdbError | None:
        """What went wrong, if it did."""
        return self._outcome if isinstance(self._outcome, DdbError) else None

    def settle(self, outcome: Outcome) -> None:
        """Note what came of it."""
        self._outcome = outcome


class Gathering:
    """The calls of a pipeline, whoever sends them."""

    def __init__(self) -> None:
        self.calls: list[Later[Any]] = []

    def ask(self, question: Question[T]) -> Later[T]:
        """Add any question (questions.py).

        >>> from ddb import questions
        >>> with db.pipeline() as pipe:
        ...     count = pipe.ask(questions.count())
        >>> count.result
        0
        """
        call = Later(question)
        self.calls.append(call)
        return call

    def put(
        self, key: str, value: Any, *, if_: Conditions | None = None, lease: int | HasId | None = None
    ) -> Later[PutResult]:
        """As the client's `put`.

        >>> with db.pipeline() as pipe:
        ...     put = pipe.put("city", "Oslo")
        >>> put.result.version
        1
        """
        return self.ask(questions.put(key, value, if_, lease))

    def get(self, key: str) -> Later[Item | None]:
        """As the client's `get`.

        >>> with db.pipeline() as pipe:
        ...     item = pipe.get("city")
        >>> item.result is None
        True
        """
        return self.ask(questions.get(key))

    def delete(self, key: str, *, if_: Conditions | None = None) -> Later[DeleteResult]:
        """As the client's `delete`.

        >>> with db.pipeline() as pipe:
        ...     gone = pipe.delete("city")
        >>> gone.result.deleted
        0
        """
        return self.ask(questions.delete(key, if_))

    def incr(self, key: str, by: int = 1) -> Later[IncrResult]:
        """As the client's `incr`.

        >>> with db.pipeline() as pipe:
        ...     visits = [pipe.incr("visits") for _ in range(3)]
        >>> [visit.result.value for visit in visits]
        [1, 2, 3]
        """
        return self.ask(questions.incr(key, by))

    def scan(self, prefix: str | None = None, *, limit: int | None = None) -> Later[ScanResult]:
        """As the client's `scan`.

        >>> with db.pipeline() as pipe:
        ...     page = pipe.scan("a/")
        >>> page.result.more
        False
        """
        return self.ask(questions.scan(prefix, limit=limit))

    def count(self, prefix: str | None = None) -> Later[int]:
        """As the client's `count`.

        >>> with db.pipeline() as pipe:
        ...     count = pipe.count("a/")
        >>> count.result
        0
        """
        return self.ask(questions.count(prefix))

    def txn(
        self,
        if_: Conditions = (),
        then: Sequence[Mapping[str, Any]] = (),
        else_: Sequence[Mapping[str, Any]] = (),
    ) -> Later[TxnResult]:
        """As the client's `txn`.

        >>> with db.pipeline() as pipe:
        ...     done = pipe.txn({"key": "a", "exists": True})
        >>> done.result.succeeded
        False
        """
        return self.ask(questions.txn(if_, then, else_))

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Note what came of the calls, which are over then. Raises the first error among them."""
        calls, self.calls = self.calls, []
        for call, outcome in zip(calls, outcomes, strict=True):
            call.settle(outcome)
        for call in calls:
            if call.error is not None:
                raise call.error


class Pipeline(Gathering):
    """Gathers calls, and sends them when its `with` block ends; where that ends by an exception, they are forgotten.
    Made by `Client.pipeline`."""

    def __init__(
        self,
        volley: Callable[[Sequence[Mapping[str, Any]], float], Sequence[Outcome]],
        timeout_s: float,
    ) -> None:
        super().__init__()
        self._volley = volley
        self._timeout_s = timeout_s

    def send(self) -> None:
        """Send what has been gathered, now. Raises the first error that came of it; the others are with their calls.

        >>> pipe = db.pipeline()
        >>> visits = pipe.incr("visits")
        >>> pipe.send()
        >>> visits.result.value
        1
        """
        if self.calls:
            self.settle(self._volley([call.question.request for call in self.calls], self._timeout_s))

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.send()
