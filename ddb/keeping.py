"""What a client keeps at the cluster and must not lose unnoticed: leases, and sessions. Decisions only.

Laws:

1. A lease is taken for lost no later than the cluster may end it: its time runs, on this side, from the moment before
   the sign of life was *sent*; on the other side, from a moment after it came. Once taken for lost, it stays so.
2. A session's numbers are given out once each. A write that is sent again keeps its number.
3. No write of a session is so far ahead of an unanswered one that the cluster may have forgotten what it replied to that:
   it keeps the replies of the last 64, as long as they are small. So one whose reply may be large goes alone.

Theory. A client can't know that its lease still lives; it can know that the cluster can't have ended it yet. So it counts
for itself, and gives up early rather than late. The clock must go on while the machine sleeps, or is
frozen as a guest: a holder that wakes up must find its time over.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

from ddb.calls import NUMBERED
from ddb.errors import BadRequest, DdbError, Overloaded

KEEPALIVES_PER_TTL: Final = 3
TRIES_PER_TTL: Final = 20
WINDOW: Final = 64


class Keeping:
    """The keeping of one lease: when its next sign of life is due, and until when it surely lives.

    `ttl_s`: its time to live. `asked_s`: when it was asked for, by the clock `now`.
    """

    def __init__(self, ttl_s: float, asked_s: float, now: Callable[[], float]) -> None:
        self.ttl_s = ttl_s
        self.until_s = asked_s + ttl_s
        self.due_s = asked_s + ttl_s / KEEPALIVES_PER_TTL
        self._now = now
        self._gone = False

    @property
    def lost(self) -> bool:
        """Whether the lease may have ended."""
        self._gone = self._gone or self._now() >= self.until_s
        return self._gone

    @property
    def remaining_s(self) -> float:
        """For how long it surely lives."""
        return 0.0 if self.lost else self.until_s - self._now()

    def kept(self, sent_s: float) -> None:
        """A sign of life, sent at `sent_s`, was answered."""
        if not self.lost:
            self.until_s = max(self.until_s, sent_s + self.ttl_s)
            self.due_s = sent_s + self.ttl_s / KEEPALIVES_PER_TTL

    def failed(self, error: DdbError) -> None:
        """A sign of life was not answered, or it was refused because there is no such lease."""
        if isinstance(error, BadRequest) and "lease" in error.fields:
            self._gone = True
        self.due_s = self._now() + self.ttl_s / TRIES_PER_TTL

    def over(self) -> None:
        """It was given back."""
        self._gone = True


class KeptLease:
    """What the client's leases know of themselves, whichever way they are kept alive.

    `lease`: what the cluster calls it. `ttl_s`, `asked_s`, `now`: as for Keeping.
    """

    def __init__(self, lease: int, ttl_s: float, asked_s: float, now: Callable[[], float]) -> None:
        self.id = lease
        self.ttl_s = ttl_s
        self._keeping = Keeping(ttl_s, asked_s, now)

    @property
    def lost(self) -> bool:
        """Whether it may have ended: nothing has kept it alive for `ttl_s`, or the cluster says so, or it was revoked."""
        return self._keeping.lost

    @property
    def until_s(self) -> float:
        """The moment until which it surely lives, by the clock `ddb.leases.now`."""
        return self._keeping.until_s

    @property
    def remaining_s(self) -> float:
        """The seconds for which it surely lives."""
        return self._keeping.remaining_s

    def __repr__(self) -> str:
        return f"<Lease {self.id} {'lost' if self.lost else f'{self.remaining_s:.1f} s'}>"


class Numbers:
    """A session's name, the numbers of its writes, and which of them are under way (law 3)."""

    def __init__(self, client: int) -> None:
        self.client = client
        self._next = 1
        self._under_way: set[int] = set()
        self._alone = False  # the one under way has a reply that may be large

    def admits(self, request: Mapping[str, Any]) -> bool:
        """Whether the write `request` may begin now."""
        if self._alone or may_reply_much(request):
            return not self._under_way
        return self._next - min(self._under_way, default=self._next) < WINDOW

    def begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The write `request` under this session, with the next number."""
        seq = self._next
        self._next += 1
        self._under_way.add(seq)
        self._alone = may_reply_much(request)
        return {**request, "client": self.client, "seq": seq}

    def end(self, numbered: Mapping[str, Any]) -> None:
        """What came of this write is known, or will never be."""
        self._under_way.discard(numbered["seq"])
        self._alone = False

    def end_those(self, begun: Sequence[Mapping[str, Any]]) -> None:
        """The same of all writes in what `some` began."""
        for request in begun:
            if request.get("client") == self.client:
                self.end(request)

    def some(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As many of the first `requests` as may begin now: writes with numbers, reads as they are."""
        begun: list[dict[str, Any]] = []
        for request in requests:
            if not is_numbered(request):
                begun.append(dict(request))
            elif self.admits(request):
                begun.append(self.begin(request))
            else:
                break
        return begun


N = TypeVar("N", bound=Numbers)


class KeptSession(Generic[N]):
    """What the client's sessions know of themselves. `statement` is what they are to be used in."""

    statement: ClassVar[str] = "a `with` statement"

    def __init__(self) -> None:
        self._numbers: N | None = None

    @property
    def id(self) -> int:
        """What the cluster calls it; history tells it with each write."""
        return self.numbers.client

    @property
    def numbers(self) -> N:
        """The numbers of its writes. Raises BadRequest where it is not open."""
        if self._numbers is None:
            raise BadRequest(f"This session is not open; use it in {self.statement}.")
        return self._numbers


def crowded() -> Overloaded:
    """What a write of a session is told that could not begin in time."""
    return Overloaded(f"{WINDOW} writes of this session wait for their replies; open another one for more at a time.")


def is_numbered(request: Mapping[str, Any]) -> bool:
    """Whether `request` is a write that a session numbers: one that has no number from elsewhere."""
    return request.get("op") in NUMBERED and "client" not in request


def may_reply_much(request: Mapping[str, Any]) -> bool:
    """Whether the reply to a write shows values, so that it may be large."""
    return request.get("op") == "txn" or "if" in request


@dataclass(frozen=True, slots=True)
class Block:
    """A session in whose `with` block the program is: whose client's it is, and the block around it."""

    owner: object
    numbers: Numbers
    outer: Block | None


entered: contextvars.ContextVar[Block | None] = contextvars.ContextVar("ddb_session", default=None)
"""The innermost block of this thread, or of this task and those that it began."""


def current(owner: object) -> Numbers | None:
    """The session of `owner` in whose block the caller is."""
    block = entered.get()
    while block is not None and block.owner is not owner:
        block = block.outer
    return block.numbers if block is not None else None


def enter(owner: object, numbers: Numbers) -> None:
    """Begin a block of this session of `owner`'s."""
    entered.set(Block(owner, numbers, entered.get()))


def leave(numbers: Numbers) -> None:
    """End the block of `numbers`; those inside it that are not ended yet stay."""
    entered.set(_without(entered.get(), numbers))


def _without(block: Block | None, numbers: Numbers) -> Block | None:
    if block is None or block.numbers is numbers:
        return block.outer if block is not None else None
    return Block(block.owner, block.numbers, _without(block.outer, numbers))
