"""The Python client: one method for each operation, at whichever node can serve it.

    import ddb

    with ddb.connect("127.0.0.1:8050") as db:
        db.put("city", "Oslo")
        print(db.get("city").value)

Laws:

1. A write is never sent twice unless the first attempt *surely* did nothing. An error says which of the two it was:
   `error.definite` is True where nothing happened and never will, False (`Timeout`, `OutcomeUnknown`) where it may have.
   Within `with db.session():` a write is done exactly once: it is sent again over any failure until its time is up.
2. A read is harmless, so it is repeated until its time is up.
3. Every call ends within its `timeout_s`, and Ctrl-C ends it at once, leaving the client usable.
4. There is no thread, but for one to each lease that is kept alive, which ends with it. `close` ends these and closes
   every socket.

What an operation says is in questions.py, how it finds its server is decided in calls.py, both without I/O and shared
with the asyncio client (aio.py); blocking sockets carry it in caller.py. A client may be shared by threads: each call
under way has connections of its own, and those that are idle are used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from ddb import keeping, questions, wire
from ddb.attempts import Attempt, Attempts
from ddb.caller import Callers
from ddb.calls import Outcome, State, seconds
from ddb.driving import drive
from ddb.errors import BadRequest, DdbError
from ddb.keeping import current, is_numbered
from ddb.leases import Lease, Numbers, Session, now
from ddb.operations import Operations
from ddb.pipelines import Pipeline
from ddb.plans import Ask, Await, Plan, Rest, Wish
from ddb.questions import Condition, Conditions, Consistency, Question, next_page
from ddb.recipes import Barrier, Counter, DoubleBarrier, Election, Lock, Queue, Semaphore
from ddb.results import (
    Change,
    DeleteResult,
    Event,
    HistoryPage,
    IncrResult,
    Item,
    LeaseInfo,
    MemberInfo,
    PutResult,
    ScanResult,
    TxnResult,
)
from ddb.watching import Watch

__all__ = [
    "TIMEOUT_S", "Change", "Client", "Condition", "Conditions", "Consistency", "DeleteResult", "Event", "HistoryPage",
    "IncrResult", "Item", "LeaseInfo", "MemberInfo", "PutResult", "ScanResult", "State", "TxnResult", "connect",
    "next_page",
]  # fmt: skip

T = TypeVar("T")

TIMEOUT_S: Final = 5.0


def connect(
    servers: str | Sequence[str] | None = None,
    *,
    registry: str | None = None,
    timeout_s: float = TIMEOUT_S,
    discover: bool = True,
    unreachable_s: float | None = None,
) -> Client:
    """A client of the cluster whose nodes are at `servers` ("HOST:PORT,HOST:PORT" or a list of these), or that the
    `registry` at "HOST:PORT" knows. One reachable server is enough: the others are learnt from it, unless
    `discover` is False.

    `timeout_s` is how long a call may take that does not say itself, `unreachable_s` how long it goes on where no
    server can be reached at all (as long when not given). Nothing is sent before the first call. Raises
    BadRequest where an address is no address, or none is given.

    >>> with connect(servers) as other:
    ...     other.put("city", "Oslo").applied
    True
    """
    addresses, registry = addresses_of(servers, registry)
    patience_s = timeout_s if unreachable_s is None else unreachable_s
    return Client(addresses, registry=registry, timeout_s=timeout_s, discover=discover, unreachable_s=patience_s)


def addresses_of(servers: str | Sequence[str] | None, registry: str | None) -> tuple[list[str], str | None]:
    """The arguments of `connect` in their one form. Raises BadRequest where they name nobody."""
    listed = servers.split(",") if isinstance(servers, str) else list(servers or ())
    addresses = [
        wire.format_address(*wire.parse_address(text)) for text in listed if not isinstance(text, str) or text.strip()
    ]
    if registry is not None:
        registry = wire.format_address(*wire.parse_address(registry))
    if not addresses and registry is None:
        raise BadRequest("No server is named; give HOST:PORT of a node, or registry=HOST:PORT.")
    return addresses, registry


class Client(Operations):
    """A connection to a cluster, made by `connect`. Use it in a `with` statement, or `close` it.

    Every method takes `timeout_s`, the seconds that the whole call may take, and raises a `DdbError`: `NoLeader`,
    `Unreachable` and the like when time ran out and nothing happened; `Timeout` or `OutcomeUnknown` when a write may
    have happened; `BadRequest`, `TooLarge`, … as docs/protocol.md says. It is a mapping, too: `db["a"] = 1`,
    `"a" in db`, `del db["a"]`, `for key in db`, `len(db)`.
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
        self._callers = Callers(servers, registry, discover, seconds(unreachable_s, "unreachable_s"))

    # --------------------------------------------------------- changes

    def watch(
        self,
        key: str | None = None,
        *,
        prefix: str | None = None,
        from_rev: int | None = None,
        timeout_s: float | None = None,
    ) -> Watch:
        """The changes of `key`, of all keys that begin with `prefix`, or of all, from now on or from revision `from_rev`
        on: an iterator of Event that outlives any node. It stands when this returns, within `timeout_s`; from
        then on it looks for another node as long as it must. Close it, or use it in a `with` statement. Raises
        Compacted where no node keeps `from_rev` any more.

        >>> with db.watch(prefix="city/") as watch:
        ...     _ = db.put("city/no", "Oslo"), db.delete("city/no")
        ...     [(event.kind, event.key) for event in (next(watch), next(watch))]
        [('put', 'city/no'), ('delete', 'city/no')]
        """
        return self._callers.watch(questions.watch(key, prefix), from_rev, self._patience(timeout_s))

    # ------------------------------------------------- several at a time

    def pipeline(self, *, timeout_s: float | None = None) -> Pipeline:
        """Gathers calls, and sends them all at once when its block ends: for the price of one round trip, and in their
        order. It is no transaction: each stands for itself.

        >>> with db.pipeline() as pipe:
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
        a pause that grows and is drawn by chance. So it is a loop. Raises Conflict where `timeout_s` is over.

        >>> db.update({"mine": 10, "yours": 0})
        >>> for attempt in db.transaction():
        ...     with attempt as tx:
        ...         tx["mine"], tx["yours"] = tx["mine"] - 3, tx["yours"] + 3
        >>> dict(db.items())
        {'mine': 7, 'yours': 3}
        """
        return Attempts(self.ask, self._patience(timeout_s))

    def transact(self, function: Callable[[Attempt], T], *, timeout_s: float | None = None) -> T:
        """The same with a `function`, which is given the transaction and called again where it must be. Returns
        what the function did.

        >>> def draw(tx):
        ...     tx["left"] = tx.get("left", 3) - 1
        ...     return tx["left"]
        >>> db.transact(draw), db.transact(draw)
        (2, 1)
        """
        for attempt in self.transaction(timeout_s=timeout_s):
            with attempt as tx:
                done = function(tx)
        return done

    def session(self, *, timeout_s: float | None = None) -> Session:
        """For the writes of a `with` block, of this thread: each is done exactly once, however often it must be sent,
        to whichever node and leader. Raises SessionExpired, in the write, where the cluster has forgotten the session
        (unused for an hour).

        >>> with db.session():
        ...     db.incr("visits").value
        1
        """
        return Session(self, timeout_s)

    def lease(
        self, ttl_s: float, *, on_lost: Callable[[], object] | None = None, timeout_s: float | None = None
    ) -> Lease:
        """A new lease: keys put with it vanish when nothing has kept it alive for `ttl_s` seconds. A `with` block
        keeps it alive, from a thread of its own, and revokes it in the end; `on_lost` is called (in that thread)
        where it could not for so long that the lease may be gone.

        >>> with db.lease(10) as lease:
        ...     _ = db.put("here", "I am", lease=lease)
        ...     "here" in db
        True
        >>> "here" in db
        False
        """
        asked_s = now()
        granted = self.ask(questions.lease_grant(ttl_s), timeout_s)
        return Lease(self._callers, granted, ttl_s, asked_s, on_lost, self.timeout_s)

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
        """A lock that one at a time holds, in the order of asking. Its `with` block waits for it (`wait_s` at
        most, then raises NotInTime) and keeps it alive; where its holder dies it is free within `ttl_s`. `value`
        is for others to see. docs/recipes.md tells what a lock over a network can't promise, and what `token` is for.

        >>> with db.lock("printer") as lock:
        ...     db.put("page", 1, if_=lock.guard).applied
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

        >>> with db.semaphore("licences", 2), db.semaphore("licences", 2):
        ...     db.semaphore("licences", 2).acquire(wait_s=0)
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

        >>> with db.election("mayor", value="Ada") as election:
        ...     election.leader().value
        'Ada'
        """
        return Election(self, name, ttl_s, value=value, wait_s=wait_s, on_lost=on_lost)

    def barrier(self, name: str, ttl_s: float | None = None) -> Barrier:
        """A barrier: while somebody holds it, the others wait. With `ttl_s` it falls when its holder dies.

        >>> with db.barrier("release"):
        ...     db.barrier("release").wait(wait_s=0)
        False
        >>> db.barrier("release").wait()
        True
        """
        return Barrier(self, name, ttl_s)

    def double_barrier(self, name: str, count: int, ttl_s: float = 10.0) -> DoubleBarrier:
        """A barrier that `count` participants pass together, on the way in and on the way out.

        >>> with db.double_barrier("round", 1):
        ...     "all are here"
        'all are here'
        """
        return DoubleBarrier(self, name, count, ttl_s)

    def queue(self, name: str) -> Queue:
        """A queue: what anybody puts, one other gets, and nobody else does.

        >>> with db.queue("letters") as queue:
        ...     _ = queue.put("to Ada")
        ...     queue.get(wait_s=1)
        'to Ada'
        """
        return Queue(self, name)

    def counter(self, name: str) -> Counter:
        """A number to which any may add, each addition counted exactly once.

        >>> with db.counter("visits") as counter:
        ...     counter.incr(), counter.incr(5)
        (1, 6)
        """
        return Counter(self, name)

    # ------------------------------------------------- the way of a call

    def call(
        self, request: Mapping[str, Any], *, at: str | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Send any `request` object of docs/protocol.md, and return the reply as it came.

        Goes to the leader where that is known, or to the address `at` and nowhere else. An unknown operation
        is treated with the care due to a write. Raises a DdbError for every reply that is not ok.

        >>> db.call({"op": "put", "key": "city", "value": "Oslo"})["version"]
        1
        """
        return self.ask(Question(dict(request), dict, at), timeout_s)

    def ask(self, question: Question[T], timeout_s: float | None = None) -> T:
        """As Operations says, numbered where it is a write in a session's block."""
        numbers = current(self) if is_numbered(question.request) else None
        return self._ask(question, numbers, self._patience(timeout_s))

    def _ask(self, question: Question[T], numbers: keeping.Numbers | None, timeout_s: float) -> T:
        if numbers is None:
            return question.result(self._callers.call(question.request, question.at, timeout_s))
        assert isinstance(numbers, Numbers), "a client's sessions are of its own kind"
        with numbers.numbered([question.request], timeout_s) as (request,):
            return question.result(self._callers.call(request, question.at, timeout_s))

    def _volley(self, requests: Sequence[Mapping[str, Any]], timeout_s: float) -> list[Outcome]:
        """Send what a pipeline has gathered; in a session's block, as many at a time as that admits."""
        numbers = current(self)
        if numbers is None:
            return self._callers.volley(requests, timeout_s)
        assert isinstance(numbers, Numbers), "a client's sessions are of its own kind"
        end_s = now() + timeout_s
        outcomes: list[Outcome] = []
        while len(outcomes) < len(requests):
            left_s = max(end_s - now(), 0)
            try:
                with numbers.numbered(requests[len(outcomes) :], left_s) as some:
                    outcomes += self._callers.volley(some, max(end_s - now(), 0))
            except DdbError as error:  # no more of them can begin
                outcomes += [error] * (len(requests) - len(outcomes))
        return outcomes

    def run(self, plan: Plan[T]) -> T:
        """Carry out a `plan` (plans.py): what a recipe decides, step by step.

        >>> from ddb import plans, questions
        >>> db.run(plans.ask(questions.count()))
        0
        """
        return drive(plan, self._perform, DdbError)

    def _perform(self, wish: Wish) -> Any:
        match wish:
            case Ask(question, numbers):
                return self._ask(question, numbers, self.timeout_s)
            case Await():
                return self._follow(wish)
            case Rest(seconds):
                time.sleep(seconds)
        return None

    def _follow(self, wish: Await) -> Event | None:
        """The event that a plan waits for, or None where time is over."""
        with self.watch(wish.key, prefix=wish.prefix, from_rev=wish.from_rev) as watch:
            while True:
                until_s = wish.until_s()
                event = next(watch, None) if until_s is None else watch.wait(until_s - now())
                if event is not None and wish.wanted(event):
                    return event
                if event is None and self._callers.closed:
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
        return self._callers.known.state

    def on_state(self, callback: Callable[[State], object]) -> Callable[[], None]:
        """Have `callback` called with the new state whenever that changes, in the thread whose call noticed. Returns a
        function that ends this.

        >>> with connect(servers) as other:
        ...     forget = other.on_state(print)
        ...     other.count()
        connected
        0
        """
        return self._callers.listeners.add(callback)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses known now: those given, then those learnt."""
        return self._callers.known.servers

    def close(self) -> None:
        """End every watch and every thread of this client, and close every connection. May be called twice.

        >>> other = connect(servers)
        >>> other.close()
        """
        self._callers.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {','.join(self.servers)}{' closed' if self._callers.closed else ''}>"
