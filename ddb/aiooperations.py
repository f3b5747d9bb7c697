"""What one can ask a cluster for, as methods to await: those of operations.py, one for one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ddb import questions
from ddb.questions import Conditions, Consistency, HasId, Question
from ddb.results import (
    DeleteResult,
    HistoryPage,
    IncrResult,
    Item,
    LeaseInfo,
    MemberInfo,
    PutResult,
    ScanResult,
    TxnResult,
)

T = TypeVar("T")


class Operations:
    """The operations of a client, each a question and its answer."""

    async def ask(self, question: Question[T], timeout_s: float | None = None) -> T:
        """Ask a `question` (questions.py), and return its answer.

        >>> from ddb import questions
        >>> await db.ask(questions.count())
        0
        """
        raise NotImplementedError

    # ------------------------------------------------------------- data

    async def put(
        self,
        key: str,
        value: Any,
        *,
        if_: Conditions | None = None,
        lease: int | HasId | None = None,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Set `key` (a non-empty string of at most 4 KiB) to `value` (any JSON value, or bytes), where all
        conditions of `if_` hold. With a `lease` (or its id) the key vanishes when that ends; without one it stays,
        also where it hung on a lease before.

        >>> (await db.put("city", "Oslo")).version
        1
        >>> (await db.put("city", "Rome", if_={"value": "Bonn"})).applied
        False
        """
        return await self.ask(questions.put(key, value, if_, lease), timeout_s)

    async def get(
        self,
        key: str,
        *,
        rev: int | None = None,
        read: Consistency = "linearizable",
        max_lag_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Item | None:
        """The item under `key`, or None; as it was at revision `rev`, where that is given. A stale read fails where
        its node last heard from the leader longer than `max_lag_s` ago. Raises Compacted where the cluster does not
        remember `rev` any more.

        >>> first = (await db.put("city", "Oslo")).rev
        >>> _ = await db.put("city", "Rome")
        >>> (await db.get("city")).value, (await db.get("city", rev=first)).value, await db.get("town")
        ('Rome', 'Oslo', None)
        """
        return await self.ask(questions.get(key, read, max_lag_s, rev), timeout_s)

    async def delete(self, key: str, *, if_: Conditions | None = None, timeout_s: float | None = None) -> DeleteResult:
        """Remove `key`, where all conditions of `if_` hold.

        >>> _ = await db.put("city", "Oslo")
        >>> (await db.delete("city")).deleted, (await db.delete("city")).deleted
        (1, 0)
        """
        return await self.ask(questions.delete(key, if_), timeout_s)

    async def scan(
        self,
        prefix: str | None = None,
        *,
        start: str | None = None,
        end: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        read: Consistency = "linearizable",
        max_lag_s: float | None = None,
        timeout_s: float | None = None,
    ) -> ScanResult:
        """One page of the items whose keys begin with `prefix`, or lie from `start` up to but not including `end`, in
        the order of the keys' UTF-8 bytes; at most `limit` of them. All keys where no range is given.

        >>> await db.update({"a/1": "x", "a/2": "y", "b": "z"})
        >>> [(item.key, item.value) for item in await db.scan("a/", reverse=True)]
        [('a/2', 'y'), ('a/1', 'x')]
        """
        return await self.ask(questions.scan(prefix, start, end, limit, reverse, keys_only, read, max_lag_s), timeout_s)

    async def scan_all(
        self,
        prefix: str | None = None,
        *,
        start: str | None = None,
        end: str | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> AsyncIterator[Item]:
        """Every item of a range, page by page. Each page is consistent in itself; between pages time goes on.

        >>> await db.update({f"n/{n:04}": n for n in range(2000)})
        >>> sum([item.value async for item in db.scan_all("n/")])
        1999000
        """
        question: Question[ScanResult] | None
        question = questions.scan(prefix, start, end, reverse=reverse, keys_only=keys_only)
        while question is not None:
            page = await self.ask(question)
            for item in page:
                yield item
            question = questions.following(question, page)

    async def count(
        self,
        prefix: str | None = None,
        *,
        start: str | None = None,
        end: str | None = None,
        read: Consistency = "linearizable",
        max_lag_s: float | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """How many keys the range holds; the range as in `scan`.

        >>> await db.update({"a/1": "x", "a/2": "y", "b": "z"})
        >>> await db.count("a/"), await db.count()
        (2, 3)
        """
        return await self.ask(questions.count(prefix, start, end, read, max_lag_s), timeout_s)

    async def incr(self, key: str, by: int = 1, *, timeout_s: float | None = None) -> IncrResult:
        """Add `by` to the integer under `key` (0 where there is none). Raises BadRequest where it is no integer.

        >>> (await db.incr("visits")).value, (await db.incr("visits", 10)).value
        (1, 11)
        """
        return await self.ask(questions.incr(key, by), timeout_s)

    async def batch(self, ops: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None) -> int:
        """Do `ops`, puts and deletes like `{"op": "put", "key": "a", "value": 1}`, all or none, in one log entry.
        Returns its revision.

        >>> rev = await db.batch([{"op": "put", "key": "a", "value": 1}, {"op": "delete", "key": "b"}])
        >>> (await db.get("a")).rev == rev
        True
        """
        return await self.ask(questions.batch(ops), timeout_s)

    async def txn(
        self,
        if_: Conditions = (),
        then: Sequence[Mapping[str, Any]] = (),
        else_: Sequence[Mapping[str, Any]] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Where all conditions of `if_` hold do the operations `then`, otherwise `else_`; all or none of them.

        >>> done = await db.txn({"key": "a", "exists": False}, [{"op": "put", "key": "a", "value": 1}])
        >>> done.succeeded, done.results[0]["version"]
        (True, 1)
        """
        return await self.ask(questions.txn(if_, then, else_), timeout_s)

    async def delete_prefix(self, prefix: str, *, timeout_s: float | None = None) -> int:
        """Remove all keys that begin with `prefix`, a thousand at a time; each thousand goes in one log entry. Returns how
        many they were. `timeout_s` is for each.

        >>> await db.update({"a/1": "x", "a/2": "y", "b": "z"})
        >>> await db.delete_prefix("a/"), await db.count()
        (2, 1)
        """
        removed = 0
        while True:
            page = await self.ask(questions.scan(prefix, limit=1000, keys_only=True), timeout_s)
            if page.items:
                await self.ask(questions.delete_all([item.key for item in page]), timeout_s)
            removed += len(page.items)
            if not page.more:
                return removed

    async def history(
        self,
        *,
        key: str | None = None,
        prefix: str | None = None,
        from_rev: int | None = None,
        to_rev: int | None = None,
        limit: int | None = None,
        reverse: bool = False,
        read: Consistency = "linearizable",
        timeout_s: float | None = None,
    ) -> HistoryPage:
        """What happened to `key`, to the keys that begin with `prefix`, or to all: a page of at most `limit` changes
        (100), from revision `from_rev` to `to_rev`, both included; the newest first with `reverse`. The page's `more`
        tells to ask again from behind its last change. Raises Compacted where `from_rev` is kept no longer.

        >>> _ = await db.put("city", "Oslo"), await db.put("city", "Rome"), await db.delete("city")
        >>> [(change.kind, change.value) for change in await db.history(key="city")][-3:]
        [('put', 'Oslo'), ('put', 'Rome'), ('delete', None)]
        """
        return await self.ask(questions.history(key, prefix, from_rev, to_rev, limit, reverse, read), timeout_s)

    # ---------------------------------------------------------- a mapping

    def __aiter__(self) -> AsyncIterator[str]:
        return self.keys()

    def keys(self, prefix: str | None = None) -> AsyncIterator[str]:
        """The keys (that begin with `prefix`), page by page.

        >>> await db.update({"a": 1, "b": 2})
        >>> [key async for key in db.keys()], [key async for key in db]
        (['a', 'b'], ['a', 'b'])
        """
        return (item.key async for item in self.scan_all(prefix, keys_only=True))

    def values(self, prefix: str | None = None) -> AsyncIterator[Any]:
        """The values under these keys, page by page.

        >>> await db.update({"a": 1, "b": 2})
        >>> [value async for value in db.values()]
        [1, 2]
        """
        return (item.value async for item in self.scan_all(prefix))

    def items(self, prefix: str | None = None) -> AsyncIterator[tuple[str, Any]]:
        """The keys with their values, page by page.

        >>> await db.update({"a": 1, "b": 2})
        >>> dict([item async for item in db.items()])
        {'a': 1, 'b': 2}
        """
        return ((item.key, item.value) async for item in self.scan_all(prefix))

    async def update(
        self, mapping: Mapping[str, Any] | Iterable[tuple[str, Any]], *, timeout_s: float | None = None
    ) -> None:
        """Put all of `mapping`, in one log entry: all or nothing.

        >>> await db.update({"a": 1, "b": 2})
        >>> (await db.get("a")).value, (await db.get("b")).value
        (1, 2)
        """
        ops = [{"op": "put", "key": key, "value": value} for key, value in dict(mapping).items()]
        if ops:
            await self.batch(ops, timeout_s=timeout_s)

    async def setdefault(self, key: str, value: Any, *, timeout_s: float | None = None) -> Any:
        """The value under `key`, which is `value` from now on where there was none.

        >>> await db.setdefault("city", "Oslo"), await db.setdefault("city", "Rome")
        ('Oslo', 'Oslo')
        """
        done = await self.put(key, value, if_={"exists": False}, timeout_s=timeout_s)
        return value if done.applied else done.value

    async def pop(self, key: str, default: Any = None, *, timeout_s: float | None = None) -> Any:
        """Remove `key` and return what its value was, or `default` where there is none.

        >>> _ = await db.put("city", "Oslo")
        >>> await db.pop("city"), await db.pop("city", "none")
        ('Oslo', 'none')
        """
        done = await self.txn((), [{"op": "get", "key": key}, {"op": "delete", "key": key}], timeout_s=timeout_s)
        found = done.results[0]
        return found["value"] if found["found"] else default

    # ------------------------------------------------------------ leases

    async def leases(self, *, timeout_s: float | None = None) -> tuple[LeaseInfo, ...]:
        """All leases of the cluster.

        >>> async with await db.lease(10) as lease:
        ...     lease.id in [info.id for info in await db.leases()]
        True
        """
        return await self.ask(questions.lease_list(), timeout_s)

    async def lease_keepalive(self, lease: int, *, timeout_s: float | None = None) -> float:
        """A sign of life for the lease with this id. Returns its time to live, in seconds. Raises BadRequest where
        there is none.

        >>> await db.lease_keepalive((await db.lease(10)).id)
        10.0
        """
        return await self.ask(questions.lease_keepalive(lease), timeout_s)

    async def lease_revoke(self, lease: int, *, timeout_s: float | None = None) -> None:
        """End the lease with this id, and delete the keys that hang on it. Raises BadRequest where there is none.

        >>> await db.lease_revoke((await db.lease(10)).id)
        """
        return await self.ask(questions.lease_revoke(lease), timeout_s)

    # ---------------------------------------------------------- cluster

    async def ping(self, *, at: str | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """`node` and `time` of the server asked: the one at address `at`, or any.

        >>> (await db.ping())["node"]
        'n1'
        """
        return await self.ask(questions.ping(at), timeout_s)

    async def status(self, *, at: str | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """What the server at address `at` (or any) says of itself: docs/protocol.md lists the fields.

        >>> (await db.status())["role"]
        'leader'
        """
        return await self.ask(questions.status(at), timeout_s)

    async def members(self, *, timeout_s: float | None = None) -> tuple[MemberInfo, ...]:
        """The members of the cluster, as the leader sees them where there is one.

        >>> [(member.name, member.role) for member in await db.members()]
        [('n1', 'voter')]
        """
        return await self.ask(questions.members(), timeout_s)

    async def member_remove(self, name: str, *, timeout_s: float | None = None) -> int:
        """Remove the member called `name` (or with this id) for good. Returns the revision of the configuration.

        >>> await db.member_remove("nobody")
        Traceback (most recent call last):
        ddb.errors.BadRequest: ...
        """
        return await self.ask(questions.member_remove(name), timeout_s)

    async def member_promote(self, name: str, *, timeout_s: float | None = None) -> int:
        """Make the learner called `name` a voter. Returns the revision of the configuration.

        >>> await db.member_promote("nobody")
        Traceback (most recent call last):
        ddb.errors.BadRequest: ...
        """
        return await self.ask(questions.member_promote(name), timeout_s)

    async def transfer(self, to: str | None = None, *, timeout_s: float | None = None) -> str:
        """Hand leadership to the voter called `to`, or to the most up-to-date one. Returns the new leader's name.

        >>> await db.transfer("nobody")
        Traceback (most recent call last):
        ddb.errors.BadRequest: ...
        """
        return await self.ask(questions.transfer(to), timeout_s)

    async def snapshot(self, *, at: str | None = None, timeout_s: float | None = None) -> int:
        """Have the server at address `at` (or any) write a checkpoint. Returns the revision that is on its disk.

        >>> (await db.put("city", "Oslo")).rev <= await db.snapshot()
        True
        """
        return await self.ask(questions.snapshot(at), timeout_s)

    async def log(
        self,
        from_: int | None = None,
        limit: int | None = None,
        *,
        at: str | None = None,
        timeout_s: float | None = None,
    ) -> list[dict[str, Any]]:
        """Entries of the replicated log as the server at address `at` (or any) keeps it, from index `from_` on.

        >>> rev = (await db.put("city", "Oslo")).rev
        >>> (await db.log(rev, 1))[0]["command"]
        ['put', 'city', 'Oslo']
        """
        return await self.ask(questions.log(from_, limit, at), timeout_s)
