"""Locks, semaphores, elections, barriers, queues and counters, for programs that block.

Laws: what is decided, is decided in plans.py; a `with` block takes and gives back; what hangs on a lease is kept alive
from a thread that ends with the block, and tells when it may be lost; every token is a revision, and grows.

docs/recipes.md says what these can promise, and what no lock over a network can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ddb import keeping, plans, questions
from ddb.errors import Compacted, LockLost, NotInTime, SessionExpired
from ddb.holding import Claimed, Holding, Met, Raised, Shared
from ddb.leases import Lease, Numbers, Session, now, whoami
from ddb.plans import Leader, Patience, Plan, Roll
from ddb.results import Item

if TYPE_CHECKING:
    from ddb.client import Client


class Semaphore(Holding[Lease]):
    """Something that `limit` at a time hold, in the order of their asking. Made by `Client.semaphore`."""

    def __init__(
        self,
        client: Client,
        name: str,
        limit: int,
        ttl_s: float = 10.0,
        *,
        wait_s: float | None = None,
        value: Any = None,
        on_lost: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(name, limit, ttl_s, value)
        self._client = client
        self._wait_s = wait_s
        self._on_lost = on_lost

    def acquire(self, wait_s: float | None = None) -> bool:
        """Wait until it is held here, `wait_s` seconds at most (None: for ever; 0: only if it is free). Returns whether
        it is.

        >>> lock = db.lock("printer")
        >>> lock.acquire(wait_s=1), db.lock("printer").acquire(wait_s=0)
        (True, False)
        >>> lock.release()
        """
        self._free()
        deadline_s = plans.deadline_s(now, wait_s)
        while self._lease is None:
            try:
                return self._enter(deadline_s)
            except LockLost:  # while waiting: begin anew, at the end of the line
                if deadline_s is not None and now() >= deadline_s:
                    return False
        return True

    def _enter(self, deadline_s: float | None) -> bool:
        lease = self._client.lease(self.ttl_s, on_lost=self._lost)
        patience = Patience(now, deadline_s, lambda: lease.until_s)
        value = whoami() if self.value is None else self.value
        item = None
        try:
            lease.keep()
            item = self._client.run(plans.enter(self.prefix, self.limit, lease.id, value, patience))
            if item is not None:
                self._lease, self._token = lease, item.created
        finally:
            if item is None:
                lease.give_back()
        return item is not None

    def release(self) -> None:
        """Give it back, at once: the next one may have it. Where the cluster can't be told, it is free when its lease has
        run out.

        >>> lock = db.lock("printer")
        >>> lock.acquire()
        True
        >>> lock.release()
        """
        lease = self._let_go()
        if lease is not None:
            lease.give_back()

    def holders(self) -> list[Leader]:
        """Who holds it now, as the cluster sees it, the first one first: their values and tokens.

        >>> with db.lock("printer", value="Ada") as lock:
        ...     [holder.value for holder in lock.holders()]
        ['Ada']
        """
        return self._client.run(self._holders())

    def __enter__(self) -> Semaphore:
        self._take()
        return self

    def _take(self) -> None:
        try:
            got = self.acquire(self._wait_s)
        except KeyboardInterrupt:  # which may come when it was got already, and there will be no block
            self.release()
            raise
        if not got:
            raise self._not_in_time(self._wait_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = self.lost
        self.release()
        if lost and kind is None:
            raise self._lost_within()

    def _lost(self) -> object:
        """The lease may have ended. While it only waited, that is nobody's business: it begins anew."""
        return self._on_lost() if self._token is not None and self._on_lost is not None else None


class Lock(Semaphore):
    """Something that one at a time holds, in the order of asking. Made by `Client.lock`."""

    kind = "lock"

    def __init__(
        self,
        client: Client,
        name: str,
        ttl_s: float = 10.0,
        *,
        wait_s: float | None = None,
        value: Any = None,
        on_lost: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(client, name, 1, ttl_s, wait_s=wait_s, value=value, on_lost=on_lost)

    def __enter__(self) -> Lock:
        self._take()
        return self


class Election(Lock):
    """An election: who campaigns leads in the end, one at a time. Made by `Client.election`. A `with` block campaigns
    and resigns."""

    kind = "election"

    def campaign(self, value: Any = None, wait_s: float | None = None) -> bool:
        """Stand, and wait until this candidate leads. `value` is what others see. Returns whether it leads within
        `wait_s`.

        >>> election = db.election("mayor")
        >>> election.campaign("Ada")
        True
        >>> election.resign()
        """
        self.value = value if value is not None else self.value
        return self.acquire(wait_s)

    def proclaim(self, value: Any) -> None:
        """Change what others see of this leader. Raises LockLost where it leads no more.

        >>> with db.election("mayor", value="Ada") as election:
        ...     election.proclaim("Ada, for the people")
        ...     election.leader().value
        'Ada, for the people'
        """
        self._client.run(plans.proclaim(self.key, value, self.lease.id))
        self.value = value

    def resign(self) -> None:
        """Lead no longer; the next candidate does.

        >>> election = db.election("mayor")
        >>> election.campaign("Ada")
        True
        >>> election.resign()
        >>> election.leader() is None
        True
        """
        self.release()

    def leader(self) -> Leader | None:
        """Who leads now, if anybody does.

        >>> db.election("mayor").leader() is None
        True
        """
        return next(iter(self.holders()), None)

    def observe(self) -> Iterator[Leader | None]:
        """Who leads, now and whenever that changes; None while nobody does. Ends never: leave the loop.

        >>> with db.election("mayor", value="Ada"):
        ...     for leader in db.election("mayor").observe():
        ...         print(leader.value)
        ...         break
        Ada
        """
        told: list[Leader | None] = []
        while True:
            line, rev = self._client.run(plans.standing(self.prefix))
            roll = Roll(self.prefix, line)
            try:
                with self._client.watch(prefix=self.prefix, from_rev=rev + 1) as watch:
                    while True:
                        if told != [roll.leader]:
                            told = [roll.leader]
                            yield roll.leader
                        event = next(watch, None)
                        if event is None:
                            return
                        roll.take(event)
            except Compacted:
                continue  # look again

    def __enter__(self) -> Election:
        self._take()
        return self


class Barrier(Raised[Lease]):
    """While somebody holds it, the others wait. Made by `Client.barrier`."""

    def __init__(self, client: Client, name: str, ttl_s: float | None = None) -> None:
        super().__init__(name, ttl_s)
        self._client = client

    def hold(self) -> None:
        """Raise it. Others may hold it as well: it falls when all have released it.

        >>> barrier = db.barrier("release")
        >>> barrier.hold()
        >>> barrier.release()
        """
        if self._key is not None:
            return
        lease = None if self.ttl_s is None else self._client.lease(self.ttl_s)
        key = plans.key_of(self.prefix, int.from_bytes(os.urandom(8)) if lease is None else lease.id)
        put = questions.put(key, whoami(), None, lease)
        try:
            if lease is not None:
                lease.keep()
            self._token = self._client.run(plans.insist(put, lambda: True)).rev
        except BaseException:
            if lease is not None:
                lease.give_back()
            raise
        self._key, self._lease = key, lease

    def release(self) -> None:
        """Let it fall, as far as this holder is concerned."""
        key, self._key, self._token = self._key, None, None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.give_back()
        elif key is not None:
            self._client.run(plans.insist(questions.delete(key), lambda: True))

    def wait(self, wait_s: float | None = None) -> bool:
        """Wait until nobody holds it, `wait_s` seconds at most. Returns whether it fell.

        >>> db.barrier("release").wait()
        True
        """
        return self._client.run(plans.fallen(self.prefix, Patience(now, plans.deadline_s(now, wait_s))))

    def clear(self) -> None:
        """Let it fall, whoever holds it: for a holder that died, and held it without a `ttl_s`.

        >>> db.barrier("release").hold()
        >>> db.barrier("release").clear()
        >>> db.barrier("release").wait(wait_s=0)
        True
        """
        line, _ = self._client.run(plans.standing(self.prefix))
        if line:
            self._client.run(plans.insist(questions.delete_all([item.key for item in line]), lambda: True))

    def __enter__(self) -> Barrier:
        self.hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class DoubleBarrier(Met[Lease]):
    """What `count` participants enter together and leave together. Made by `Client.double_barrier`."""

    def __init__(self, client: Client, name: str, count: int, ttl_s: float = 10.0) -> None:
        super().__init__(name, count, ttl_s)
        self._client = client

    def enter(self, wait_s: float | None = None) -> bool:
        """Come, and wait until `count` are there. Returns whether they were within `wait_s`.

        >>> barrier = db.double_barrier("round", 1)
        >>> barrier.enter(), barrier.leave()
        (True, True)
        """
        self._free()
        deadline_s = plans.deadline_s(now, wait_s)
        lease = self._client.lease(self.ttl_s)
        patience = Patience(now, deadline_s, lambda: lease.until_s)
        met = None
        try:
            lease.keep()
            met = self._client.run(plans.meet(self.prefix, self.count, lease.id, patience))
        finally:
            if met is None:
                lease.give_back()
            else:
                self._lease, self._met = lease, met
        return met is not None

    def leave(self, wait_s: float | None = None) -> bool:
        """Go, and wait until all that were met have gone, or have died. Returns whether they had within `wait_s`. Raises
        LockLost where these took this one for dead meanwhile, so that they may have gone before."""
        lease = self._let_go()
        lease.close()
        patience = Patience(now, plans.deadline_s(now, wait_s))
        return self._client.run(plans.part(self.prefix, self._met, lease.id, patience))

    def __enter__(self) -> DoubleBarrier:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.leave()
        elif self._lease is not None:
            self._let_go().give_back()


class _Sessional(Shared):
    """What does its writes exactly once: under the session of the block around it, or under one of its own."""

    def __init__(self, client: Client, name: str) -> None:
        super().__init__(name)
        self.client = client
        self._session: Session | None = None

    def close(self) -> None:
        """End its own session. May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _numbers(self) -> Numbers:
        around = keeping.current(self.client)
        if isinstance(around, Numbers):
            return around
        if self._session is None or self._session.numbers.inherited:
            self._session = self.client.session().open()
        return self._session.numbers

    def _once(self, plan: Callable[[Numbers], Plan[Any]]) -> Any:
        """Carry out a plan under the session; under a new one where the cluster has forgotten its own meanwhile."""
        try:
            return self.client.run(plan(self._numbers()))
        except SessionExpired as error:
            if not error.definite or keeping.current(self.client) is not None:
                raise
        self.close()
        return self.client.run(plan(self._numbers()))


class Queue(_Sessional):
    """First in, first out, each item taken by exactly one. Made by `Client.queue`.

    Made in one thread, it may be used by others. Close it, or use it in a `with` statement.
    """

    kind = "queue"

    def put(self, value: Any) -> int:
        """Put `value` at the end, exactly once. Returns its ticket, which grows from item to item.

        >>> with db.queue("letters") as queue:
        ...     queue.put("to Ada") < queue.put("to Bob")
        True
        """
        ticket: int = self._once(lambda numbers: plans.append(self.name, value, numbers))
        return ticket

    def get(self, wait_s: float | None = None) -> Any:
        """Take the first item, waiting for one. Returns its value. Raises NotInTime where there is none within `wait_s`.

        What is taken is taken: a consumer that dies with an item in its hands takes it along.

        >>> with db.queue("letters") as queue:
        ...     _ = queue.put("to Ada")
        ...     queue.get()
        'to Ada'
        """
        patience = Patience(now, plans.deadline_s(now, wait_s))
        item = self._once(lambda numbers: plans.take(self.name, numbers, patience))
        if item is None:
            raise NotInTime(f"The queue {self.name!r} was empty for {wait_s} s.")
        return item.value

    def finish(self, item: Item, lease: int) -> None:
        """Remove an item that was claimed with a lease. Raises LockLost where the claim is gone."""
        self._once(lambda numbers: plans.finish(self.name, item, lease, numbers))

    def take(self, wait_s: float | None = None, ttl_s: float = 10.0) -> Task:
        """For a `with` block: the first item that nobody works on, waiting for one; raises NotInTime as `get` does. It is
        removed when the block ends. Where that ends by an exception, or the program dies, it is free again, at
        its old place, within `ttl_s`: so it may be begun more than once, and is finished once.

        >>> with db.queue("letters") as queue:
        ...     _ = queue.put("to Ada")
        ...     with queue.take() as task:
        ...         print(task.value)
        ...     queue.size()
        to Ada
        0
        """
        return Task(self, wait_s, ttl_s)

    def size(self) -> int:
        """How many items it holds, those that are worked on included.

        >>> db.queue("letters").size()
        0
        """
        return self.client.ask(questions.count(plans.items_of(self.name)))

    def __enter__(self) -> Queue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Task(Claimed[Lease]):
    """An item of a queue that is worked on here, for a block. Made by `Queue.take`."""

    def __init__(self, queue: Queue, wait_s: float | None, ttl_s: float) -> None:
        super().__init__(queue.name, wait_s, ttl_s)
        self._queue = queue

    def __enter__(self) -> Task:
        client, name = self._queue.client, self._queue.name
        deadline_s = plans.deadline_s(now, self._wait_s)
        lease = client.lease(self._ttl_s)
        try:
            lease.keep()
            patience = Patience(now, deadline_s, lambda: lease.until_s)
            claimed = client.run(plans.claim(name, lease.id, patience))
            self._item, self._token = claimed if claimed is not None else (None, 0)
        finally:
            if self._item is None:
                lease.give_back()
        if self._item is None:
            raise self._nothing_free()
        self._lease = lease
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        item, lease = self._let_go()
        try:
            if kind is None:
                self._queue.finish(item, lease.id)
        finally:
            lease.give_back()


class Counter(_Sessional):
    """A number to which any may add, each addition counted exactly once. Made by `Client.counter`."""

    kind = "counter"

    @property
    def key(self) -> str:
        """Where it is kept."""
        return f"{self.prefix}value"

    def get(self) -> int:
        """What it is now.

        >>> db.counter("visits").get()
        0
        """
        item = self.client.ask(questions.get(self.key))
        return item.value if item is not None else 0

    def incr(self, by: int = 1) -> int:
        """Add `by`, exactly once. Returns what that makes.

        >>> with db.counter("visits") as counter:
        ...     counter.incr(), counter.incr(-1), counter.get()
        (1, 0, 0)
        """
        done = self._once(lambda numbers: plans.ask(questions.incr(self.key, by), numbers))
        value: int = done.value
        return value

    def __enter__(self) -> Counter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
