"""What a lock, a barrier or a worker has in its hands: the same for programs that block and for asyncio.

Laws: a token is known from the moment that it is held until it is given back; whether it may be lost is asked of the
lease's own clock each time, so that nobody who was frozen is told an old truth.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ddb import plans
from ddb.errors import BadRequest, LockLost, NotInTime
from ddb.plans import Leader, Plan
from ddb.results import Item


class Leased(Protocol):
    """What a lease tells of itself."""

    @property
    def id(self) -> int:
        """What the cluster calls it."""

    @property
    def lost(self) -> bool:
        """Whether it may have ended."""


L = TypeVar("L", bound=Leased)


class Holding(Generic[L]):
    """Something that `limit` at a time hold, whether it is held here, and by which lease."""

    kind: ClassVar[str] = "semaphore"

    def __init__(self, name: str, limit: int, ttl_s: float, value: Any) -> None:
        self.name = name
        self.limit = _at_least_one(limit, "limit", "how many may hold it at a time")
        self.ttl_s = ttl_s
        self.value = value
        self.prefix = plans.prefix_of(self.kind, name)
        self._lease: L | None = None
        self._token: int | None = None

    @property
    def held(self) -> bool:
        """Whether it is held here, surely, now."""
        return self._token is not None and not self.lost

    @property
    def lost(self) -> bool:
        """Whether it was got, and may have gone to somebody else since."""
        return self._token is not None and self._lease is not None and self._lease.lost

    @property
    def token(self) -> int:
        """The fencing token: a revision, greater than that of every holder before. Raises BadRequest where it was not
        got."""
        if self._token is None:
            raise BadRequest(f"The {self.kind} {self.name!r} is not held.")
        return self._token

    @property
    def lease(self) -> L:
        """The lease on which it hangs. Raises BadRequest where it was not got."""
        if self._lease is None:
            raise BadRequest(f"The {self.kind} {self.name!r} is not held.")
        return self._lease

    @property
    def key(self) -> str:
        """The key that stands for its being held here."""
        return plans.key_of(self.prefix, self.lease.id)

    @property
    def guard(self) -> dict[str, Any]:
        """A condition for `if_`: what is written with it is written only while this is held, whatever its holder
        believes."""
        return {"key": self.key, "exists": True}

    def check(self) -> None:
        """Raise LockLost where it may be lost.

        >>> with db.lock("printer") as lock:
        ...     lock.check()
        """
        if self.lost:
            raise LockLost(f"The {self.kind} {self.name!r} may be held by somebody else by now.")

    def _let_go(self) -> L | None:
        """Hold it no longer; returns the lease to end."""
        lease, self._lease, self._token = self._lease, None, None
        return lease

    def _free(self) -> None:
        """Raise BadRequest where it is held here already."""
        if self._lease is not None:
            raise BadRequest(f"This object holds the {self.kind} {self.name!r} already; make another one to wait.")

    def _not_in_time(self, wait_s: float | None) -> NotInTime:
        return NotInTime(f"The {self.kind} {self.name!r} did not become free within {wait_s} s.")

    def _lost_within(self) -> LockLost:
        return LockLost(f"The {self.kind} {self.name!r} was lost within its block: what that did may have collided.")

    def _holders(self) -> Plan[list[Leader]]:
        line, _ = yield from plans.standing(self.prefix)
        return [Leader(item.value, item.created) for item in line[: self.limit]]

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.name!r} {self._token if self.held else 'lost' if self.lost else 'not held'}>"
        )


class Raised(Generic[L]):
    """A barrier, whether it is held here, and by which key and lease."""

    def __init__(self, name: str, ttl_s: float | None) -> None:
        self.name = name
        self.ttl_s = ttl_s
        self.prefix = plans.prefix_of("barrier", name)
        self._lease: L | None = None
        self._key: str | None = None
        self._token: int | None = None

    @property
    def token(self) -> int:
        """The revision since which it is held here. Raises BadRequest where it is not."""
        if self._token is None:
            raise BadRequest(f"The barrier {self.name!r} is not held here.")
        return self._token


class Met(Generic[L]):
    """A barrier for `count` participants, with which lease it was entered here, and whom one met."""

    def __init__(self, name: str, count: int, ttl_s: float) -> None:
        self.name = name
        self.count = _at_least_one(count, "count", "how many enter and leave together")
        self.ttl_s = ttl_s
        self.prefix = plans.prefix_of("double", name)
        self._lease: L | None = None
        self._met: set[str] = set()

    def _free(self) -> None:
        """Raise BadRequest where it is entered here already."""
        if self._lease is not None:
            raise BadRequest(
                f"This object has entered the barrier {self.name!r} already; make another one to enter again."
            )

    def _let_go(self) -> L:
        """It is left; returns the lease to end. Raises BadRequest where it was not entered."""
        lease, self._lease = self._lease, None
        if lease is None:
            raise BadRequest(f"The barrier {self.name!r} was not entered.")
        return lease


def _at_least_one(number: int, name: str, meaning: str) -> int:
    if not isinstance(number, int) or number < 1:
        raise BadRequest(f"`{name}` must be a whole number, at least 1: {meaning}.")
    return number


class Shared:
    """What all who know its `name` share, under the session of the block around them or one of their own."""

    kind: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.name = name
        self.prefix = plans.prefix_of(self.kind, name)


class Claimed(Generic[L]):
    """An item of the queue `name` that is worked on here, for a block. `statement` is what begins one."""

    statement: ClassVar[str] = "a `with` statement"

    def __init__(self, name: str, wait_s: float | None, ttl_s: float) -> None:
        self._name = name
        self._wait_s = wait_s
        self._ttl_s = ttl_s
        self._lease: L | None = None
        self._item: Item | None = None
        self._token = 0

    @property
    def value(self) -> Any:
        """What was put. Raises BadRequest outside of the block."""
        return self._claimed[0].value

    @property
    def token(self) -> int:
        """The fencing token: a revision, greater than that of everybody who worked on this item before."""
        return self._token if self._claimed else 0

    @property
    def lost(self) -> bool:
        """Whether somebody else may work on it by now."""
        return self._claimed[1].lost

    @property
    def guard(self) -> dict[str, Any]:
        """A condition for `if_`: what is written with it is written only while the item is claimed here."""
        item, lease = self._claimed
        return {"key": plans.claim_of(self._name, item), "value": lease.id}

    @property
    def _claimed(self) -> tuple[Item, L]:
        if self._item is None or self._lease is None:
            raise BadRequest(f"Take an item in {self.statement}, and use it within.")
        return self._item, self._lease

    def _let_go(self) -> tuple[Item, L]:
        """Work on it no longer; returns it, and the lease to end."""
        claimed = self._claimed
        self._item = self._lease = None
        return claimed

    def _nothing_free(self) -> NotInTime:
        return NotInTime(f"The queue {self._name!r} had nothing free for {self._wait_s} s.")
