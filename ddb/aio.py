"""The Python client for asyncio: the same names as the blocking one's, to be awaited.

    import asyncio
    from ddb import aio

    async def main():
        async with aio.connect("127.0.0.1:8050") as db:
            await db.put("city", "Oslo")
            print((await db.get("city")).value)

    asyncio.run(main())

Laws: those of client.py. Any number of tasks may share a client: their calls travel side by side over a few connections.
A task that is cancelled in the middle of a write does not learn whether it happened. What is kept alive, is so from
tasks; `close` ends them.

A client belongs to one event loop. Python has no operators to await, so here are no `db["a"]` and `"a" in db`; iterate with
`async for`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from ddb import calls, keeping, questions
from ddb.aioblocks import Attempt, Attempts, Pipeline
from ddb.aioleases import Lease, Numbers, Session
from ddb.aiolinks import Caller
from ddb.aiooperations import Operations
from ddb.aiorecipes import Barrier, Counter, DoubleBarrier, Election, Lock, Queue, Semaphore
from ddb.aiowatching import Watch
from ddb.calls import Knowledge, Listeners, Outcome, State, seconds
from ddb.client import TIMEOUT_S, addresses_of
from ddb.driving import drive_awaiting
from ddb.errors import BadRequest, DdbError
from ddb.keeping import current, is_numbered
from ddb.leases import now
from ddb.plans import Ask, Await, Plan, Rest, Wish
from ddb.questions import Question
from ddb.results import Event

T = TypeVar("T")
_log = logging.getLogger("ddb.client")


class Block(Protocol):
    """What an `async with` statement takes."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The block ends."""


class Entered(Block, Protocol):
    """What may stand in an `async with` statement."""

    async def __aenter__(self) -> Any:
        """The block begins."""


E = TypeVar("E", bound=Entered)


class Opening(Generic[E]):
    """What is made by asking first: `x = await opening`, or at once `async with opening as x`."""

    def __init__(self, work: Coroutine[Any, Any, E]) -> None:
        self._work = work
        self._made: E | None = None

    def __await__(self) -> Generator[Any, None, E]:
        return self._work.__await__()

    async def __aenter__(self) -> E:
        self._made = await self._work
        await self._made.__aenter__()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._made is not None, "a block ends after it has begun"
        await self._made.__aexit__(kind, error, trace)


class Guest(Protocol):
    """What lives as long as its client at most."""

    def close(self) -> None:
        """End it. May be called twice."""


def connect(
    servers: str | Sequence[str] | None = None,
    *,
    registry: str | None = None,
    timeout_s: float = TIMEOUT_S,
    discover: bool = True,
    unreachable_s: float | None = None,
) -> Client:
    """A client of the cluster, as `ddb.connect` makes one for programs that block: its arguments are the same.

    >>> async with connect(servers) as other:
    ...     (await other.put("city", "Oslo")).applied
    True
    """
    addresses, registry = addresses_of(servers, registry)
    patience_s = timeout_s if unreachable_s is None else unreachable_s
    return Client(addresses, registry=registry, timeout_s=timeout_s, discover=discover, unreachable_s=patience_s)


class Client(Operations):
    """A connection to a cluster, made by `connect`. Use it in an `async with` statement, or `close` it.

    Every method takes `timeout_s`, the seconds that the whole call may take, and raises a `DdbError` as the blocking
    client does.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        registry: str | None = None,
        timeout_s: float = TIMEOUT_S,
        discover: bool = True,
        unreachable_s: float = TIMEOUT_S,
    ) -> None:
        self.timeout_s = seconds(timeout_s, "timeout_s")
        self._listeners = Listeners()
        patience_s = seconds(unreachable_s, "unreachable_s")
        self._known = Knowledge(tuple(servers), registry, discover, patience_s, on_state=self._listeners.tell)
        self._caller = Caller(self._known)
        self._guests: set[Guest] = set()

    # --------------------------------------------------------- changes

    def watch(
        self,
        key: str | None = None,
        *,
        prefix: str | None = None,
        from_rev: int | None = None,
        timeout_s: float | None = None,
    ) -> Opening[Watch]:
        """The changes of `key`, of all keys that begin with `prefix`, or of all, from now on or from revision `from_rev`
        on: an asynchronous iterator of Event that outlives any node. It stands when this has been awaited.
        Raises Compacted where no node keeps `from_rev` any more.

        >>> async with db.watch(prefix="city/") as watch:
        ...     _ = await db.put("city/no", "Oslo"), await db.delete("city/no")
        ...     [(event.kind, event.key) for event in (await anext(watch), await anext(watch))]
        [('put', 'city/no'), ('delete', 'city/no')]
        """
        return Opening(self._watch(questions.watch(key, prefix), from_rev, self._patience(timeout_s)))

    async def _watch(self, request: dict[str, Any], from_rev: int | None, patience_s: float) -> Watch:
        if self._known.learn_due:
            await self._learn()
        watch = Watch(self._known, request, from_rev, patience_s, self._learn, self.leave)
        self.enter(watch)
        return await watch.start()

    async def _learn(self) -> None:
        """Ask anybody where the nodes are."""
        self._known.learn_due = self._known.discover
        try:
            await self._caller.call({"op": "ping"}, None, calls.ASIDE_S)
        except DdbError as error:
            _log.debug("nobody tells where the nodes are: %s", error)

    # ------------------------------------------------- several at a time

    def pipeline(self, *, timeout_s: float | None = None) -> Pipeline:
        """Gathers calls, and sends them all at once when its block ends: for the price of one round trip, and in their
        order. It is no transaction: each stands for itself.

        >>> async with db.pipeline() as pipe:
        ...     for n in range(100):
        ...         _ = pipe.put(f"n/{n}", n)
        ...     last = pipe.get("n/99")
        >>> last.result.value
        99
        """
        return Pipeline(self._volley, self._patience(timeout_s))

    def transaction(self, *, timeout_s: float | None = None) -> Attempts:
        """Read, think, write; and it is as if nobody else had been there. What the block writes is kept back until it
        ends, and is then done only if nothing that it read has changed; otherwise the block is run again, after
        a pause that grows and is drawn by chance. So it is a loop, to be left by no `break` or `return`.
        Raises Conflict where `timeout_s` is over.

        >>> _ = await db.put("left", 3)
        >>> async for attempt in db.transaction():
        ...     async with attempt as tx:
        ...         tx.put("left", await tx.get("left") - 1)
        >>> (await db.get("left")).value
        2
        """
        return Attempts(self.ask, self._patience(timeout_s))

    async def transact(self, function: Callable[[Attempt], Awaitable[T]], *, timeout_s: float | None = None) -> T:
        """The same with a `function` to await, which is given the transaction and called again where it must be. Returns
        what the function did.

        >>> async def draw(tx):
        ...     left = await tx.get("left", 3) - 1
        ...     tx.put("left", left)
        ...     return left
        >>> await db.transact(draw), await db.transact(draw)
        (2, 1)
        """
        async for attempt in self.transaction(timeout_s=timeout_s):
            async with attempt as tx:
                done = await function(tx)
        return done

    def session(self, *, timeout_s: float | None = None) -> Session:
        """For the writes of an `async with` block, of this task and those it begins: each is done exactly once, however
        often it must be sent, to whichever node and leader. Raises SessionExpired, in the write, where the
        cluster has forgotten the session (unused for an hour).

        >>> async with db.session():
        ...     (await db.incr("visits")).value
        1
        """
        return Session(self, timeout_s)

    def lease(
        self, ttl_s: float, *, on_lost: Callable[[], object] | None = None, timeout_s: float | None = None
    ) -> Opening[Lease]:
        """A new lease: keys put with it vanish when nothing has kept it alive for `ttl_s` seconds. An `async with` block
        keeps it alive, from a task of its own, and revokes it in the end; `on_lost` is called, and awaited if
        it can be, where it could not for so long that the lease may be gone.

        >>> async with db.lease(10) as lease:
        ...     _ = await db.put("here", "I am", lease=lease)
        ...     (await db.get("here")).value
        'I am'
        >>> await db.get("here")
        """
        return Opening(self._lease(ttl_s, on_lost, timeout_s))

    async def _lease(self, ttl_s: float, on_lost: Callable[[], object] | None, timeout_s: float | None) -> Lease:
        asked_s = now()
        return Lease(self, await self.ask(questions.lease_grant(ttl_s), timeout_s), ttl_s, asked_s, on_lost)

    # ----------------------------------------------------------- recipes

    def lock(
        self,
        name: str,
        ttl_s: float = 10.0,
        *,
        wait_s: float | None = None,
        value: Any = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Lock:
        """A lock that one at a time holds, in the order of asking. Its `async with` block waits for it (`wait_s` at
        most, then raises NotInTime) and keeps it alive; where its holder dies it is free within `ttl_s`. `value`
        is for others to see. docs/recipes.md tells what a lock over a network can't promise, and what `token` is for.

        >>> async with db.lock("printer") as lock:
        ...     (await db.put("page", 1, if_=lock.guard)).applied
        True
        """
        return Lock(self, name, ttl_s, wait_s=wait_s, value=value, on_lost=on_lost)

    def semaphore(
        self,
        name: str,
        limit: int,
        ttl_s: float = 10.0,
        *,
        wait_s: float | None = None,
        value: Any = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Semaphore:
        """A lock that `limit` at a time hold. All who use it must give the same limit.

        >>> async with db.semaphore("licences", 2), db.semaphore("licences", 2):
        ...     await db.semaphore("licences", 2).acquire(wait_s=0)
        False
        """
        return Semaphore(self, name, limit, ttl_s, wait_s=wait_s, value=value, on_lost=on_lost)

    def election(
        self,
        name: str,
        ttl_s: float = 10.0,
        *,
        value: Any = None,
        wait_s: float | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Election:
        """An election among those who `campaign`: one at a time leads, and everybody may `observe`.

        >>> async with db.election("mayor", value="Ada") as election:
        ...     (await election.leader()).value
        'Ada'
        """
        return Election(self, name, ttl_s, value=value, wait_s=wait_s, on_lost=on_lost)

    def barrier(self, name: str, ttl_s: float | None = None) -> Barrier:
        """A barrier: while somebody holds it, the others wait. With `ttl_s` it falls when its holder dies.

        >>> async with db.barrier("release"):
        ...     await db.barrier("release").wait(wait_s=0)
        False
        >>> await db.barrier("release").wait()
        True
        """
        return Barrier(self, name, ttl_s)

    def double_barrier(self, name: str, count: int, ttl_s: float = 10.0) -> DoubleBarrier:
        """A barrier that `count` participants pass together, on the way in and on the way out.

        >>> async with db.double_barrier("round", 1):
        ...     "all are here"
        'all are here'
        """
        return DoubleBarrier(self, name, count, ttl_s)

    def queue(self, name: str) -> Queue:
        """A queue: what anybody puts, one other gets, and nobody else does.

        >>> async with db.queue("letters") as queue:
        ...     _ = await queue.put("to Ada")
        ...     await queue.get(wait_s=1)
        'to Ada'
        """
        return Queue(self, name)

    def counter(self, name: str) -> Counter:
        """A number to which any may add, each addition counted exactly once.

        >>> async with db.counter("visits") as counter:
        ...     await counter.incr(), await counter.incr(5)
        (1, 6)
        """
        return Counter(self, name)

    # ------------------------------------------------- the way of a call

    async def call(
        self, request: Mapping[str, Any], *, at: str | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Send any `request` object of docs/protocol.md, and return the reply as it came.

        Goes to the leader where that is known, or to the address `at` and nowhere else. An unknown operation
        is treated with the care due to a write. Raises a DdbError for every reply that is not ok.

        >>> (await db.call({"op": "put", "key": "city", "value": "Oslo"}))["version"]
        1
        """
        return await self.ask(Question(dict(request), dict, at), timeout_s)

    async def ask(self, question: Question[T], timeout_s: float | None = None) -> T:
        """As Operations says, numbered where it is a write in a session's block."""
        numbers = current(self) if is_numbered(question.request) else None
        return await self._ask(question, numbers, self._patience(timeout_s))

    async def _ask(self, question: Question[T], numbers: keeping.Numbers | None, timeout_s: float) -> T:
        if numbers is None:
            return question.result(await self._caller.call(question.request, question.at, timeout_s))
        assert isinstance(numbers, Numbers), "a client's sessions are of its own kind"
        async with numbers.numbered([question.request], timeout_s) as (request,):
            return question.result(await self._caller.call(request, question.at, timeout_s))

    async def _volley(self, requests: Sequence[Mapping[str, Any]], timeout_s: float) -> list[Outcome]:
        """Send what a pipeline has gathered; in a session's block, as many at a time as that admits."""
        numbers = current(self)
        if numbers is None:
            return await self._caller.volley(requests, timeout_s)
        assert isinstance(numbers, Numbers), "a client's sessions are of its own kind"
        end_s = now() + timeout_s
        outcomes: list[Outcome] = []
        while len(outcomes) < len(requests):
            left_s = max(end_s - now(), 0)
            try:
                async with numbers.numbered(requests[len(outcomes) :], left_s) as some:
                    outcomes += await self._caller.volley(some, max(end_s - now(), 0))
            except DdbError as error:  # no more of them can begin
                outcomes += [error] * (len(requests) - len(outcomes))
        return outcomes

    async def run(self, plan: Plan[T]) -> T:
        """Carry out a `plan` (plans.py): what a recipe decides, step by step.

        >>> from ddb import plans, questions
        >>> await db.run(plans.ask(questions.count()))
        0
        """
        return await drive_awaiting(plan, self._perform, DdbError)

    async def _perform(self, wish: Wish) -> Any:
        match wish:
            case Ask(question, numbers):
                return await self._ask(question, numbers, self.timeout_s)
            case Await():
                return await self._follow(wish)
            case Rest(seconds):
                await asyncio.sleep(seconds)
        return None

    async def _follow(self, wish: Await) -> Event | None:
        """The event that a plan waits for, or None where time is over."""
        async with self.watch(wish.key, prefix=wish.prefix, from_rev=wish.from_rev) as watch:
            while True:
                until_s = wish.until_s()
                event = await (anext(watch, None) if until_s is None else watch.wait(until_s - now()))
                if event is not None and wish.wanted(event):
                    return event
                if event is None and self._caller.closed:
                    raise BadRequest("This client is closed; connect again.")
                if event is None and until_s is not None and now() >= (wish.until_s() or until_s):
                    return None

    def _patience(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else seconds(timeout_s, "timeout_s")

    # ------------------------------------------------------- its own state

    @property
    def state(self) -> State:
        """How it stands to the cluster: "connected" (its last request was served), "suspended" (it looks for a node that
        serves, as before its first request), "lost" (it gave a call up, because none did in time)."""
        return self._known.state

    def on_state(self, callback: Callable[[State], object]) -> Callable[[], None]:
        """Have `callback` called with the new state whenever that changes, in the task whose call noticed. Returns a
        function that ends this.

        >>> async with connect(servers) as other:
        ...     forget = other.on_state(print)
        ...     await other.count()
        connected
        0
        """
        return self._listeners.add(callback)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses known now: those given, then those learnt."""
        return self._known.servers

    def enter(self, guest: Guest) -> None:
        """Close `guest` with the client. Raises BadRequest where that is closed."""
        if self._caller.closed:
            guest.close()
            raise BadRequest("This client is closed; connect again.")
        self._guests.add(guest)

    def leave(self, guest: Guest) -> None:
        """Forget a guest that ended by itself."""
        self._guests.discard(guest)

    async def close(self) -> None:
        """End every watch and every task of this client, and close every connection. May be called twice.

        >>> other = connect(servers)
        >>> await other.close()
        """
        guests, self._guests = self._guests, set()
        for guest in guests:
            guest.close()
        self._caller.close()
        await asyncio.sleep(0)  # for the connections to notice

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Client of {','.join(self.servers)}{' closed' if self._caller.closed else ''}>"
