"""What one can ask a cluster for, as methods that block: data, a mapping, the cluster itself.

Laws: one method for each operation; it says what it does, and nothing about how it gets there: that is the client's
(client.py). The asyncio client has the same methods (aio.py), and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    def ask(self, question: Question[T], timeout_s: float | None = None) -> T:
        """Ask a `question` (questions.py), and return its answer.

        >>> from ddb import questions
        >>> db.ask(questions.count())
        0
        """
        raise NotImplementedError

    # ------------------------------------------------------------- data

    def put(
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

        >>> db.put("city", "Oslo").version
        1
        >>> db.put("city", "Rome", if_={"value": "Bonn"}).applied
        False
        """
        return self.ask(questions.put(key, value, if_, lease), timeout_s)

    def get(
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

        >>> first = db.put("city", "Oslo").rev
        >>> _ = db.put("city", "Rome")
        >>> db.get("city").value, db.get("city", rev=first).value, db.get("town")
        ('Rome', 'Oslo', None)
        """
        return self.ask(questions.get(key, read, max_lag_s, rev), timeout_s)

    def delete(self, key: str, *, if_: Conditions | None = None, timeout_s: float | None = None) -> DeleteResult:
        """Remove `key`, where all conditions of `if_` hold.

        >>> _ = db.put("city", "Oslo")
        >>> db.delete("city").deleted, db.delete("city").deleted
        (1, 0)
        """
        return self.ask(questions.delete(key, if_), timeout_s)

    def scan(
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

        >>> db.update({"a/1": "x", "a/2": "y", "b": "z"})
        >>> [(item.key, item.value) for item in db.scan("a/", reverse=True)]
        [('a/2', 'y'), ('a/1', 'x')]
        """
        return self.ask(questions.scan(prefix, start, end, limit, reverse, keys_only, read, max_lag_s), timeout_s)

    def scan_all(
        self,
        prefix: str | None = None,
        *,
        start: str | None = None,
        end: str | None = None,
        reverse: bool = False,
        keys_only: bool = False,
    ) -> Iterator[Item]:
        """Every item of a range, page by page. Each page is consistent in itself; between pages time goes on.

        >>> db.update({f"n/{n:04}": n for n in range(2000)})
        >>> sum(item.value for item in db.scan_all("n/"))
        1999000
        """
        question: Question[ScanResult] | None
        question = questions.scan(prefix, start, end, reverse=reverse, keys_only=keys_only)
        while question is not None:
            page = self.ask(question)
            yield from page
            question = questions.following(question, page)

    def count(
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

        >>> db.update({"a/1": "x", "a/2": "y", "b": "z"})
        >>> db.count("a/"), db.count()
        (2, 3)
        """
        return self.ask(questions.count(prefix, start, end, read, max_lag_s), timeout_s)

    def incr(self, key: str, by: int = 1, *, timeout_s: float | None = None) -> IncrResult:
        """Add `by` to the integer under `key` (0 where there is none). Raises BadRequest where it is no integer.

        >>> db.incr("visits").value, db.incr("visits", 10).value
        (1, 11)
        """
        return self.ask(questions.incr(key, by), timeout_s)

    def batch(self, ops: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None) -> int:
        """Do `ops`, puts and deletes like `{"op": "put", "key": "a", "value": 1}`, all or none, in one log entry.
        Returns its revision.

        >>> rev = db.batch([{"op": "put", "key": "a", "value": 1}, {"op": "delete", "key": "b"}])
        >>> db.get("a").rev == rev
        True
        """
        return self.ask(questions.batch(ops), timeout_s)

    def txn(
        self,
        if_: Conditions = (),
        then: Sequence[Mapping[str, Any]] = (),
        else_: Sequence[Mapping[str, Any]] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Where all conditions of `if_` hold do the operations `then`, otherwise `else_`; all or none of them.

        >>> done = db.txn({"key": "a", "exists": False}, [{"op": "put", "key": "a", "value": 1}])
        >>> done.succeeded, done.results[0]["version"]
        (True, 1)
        """
        return self.ask(questions.txn(if_, then, else_), timeout_s)

    def delete_prefix(self, prefix: str, *, timeout_s: float | None = None) -> int:
        """Remove all keys that begin with `prefix`, a thousand at a time; each thousand goes in one log entry. Returns how
        many they were. `timeout_s` is for each.

        >>> db.update({"a/1": "x", "a/2": "y", "b": "z"})
        >>> db.delete_prefix("a/"), db.count()
        (2, 1)
        """
        removed = 0
        while True:
            page = self.ask(questions.scan(prefix, limit=1000, keys_only=True), timeout_s)
            if page.items:
                self.ask(questions.delete_all([item.key for item in page]), timeout_s)
            removed += len(page.items)
            if not page.more:
                return removed

    def history(
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

        >>> _ = db.put("city", "Oslo"), db.put("city", "Rome"), db.delete("city")
        >>> [(change.kind, change.value) for change in db.history(key="city")][-3:]
        [('put', 'Oslo'), ('put', 'Rome'), ('delete', None)]
        """
        return self.ask(questions.history(key, prefix, from_rev, to_rev, limit, reverse, read), timeout_s)

    # ---------------------------------------------------------- a mapping

    def __getitem__(self, key: str) -> Any:
        item = self.get(key)
        if item is None:
            raise KeyError(key)
        return item.value

    def __setitem__(self, key: str, value: Any) -> None:
        self.put(key, value)

    def __delitem__(self, key: str) -> None:
        if not self.delete(key).deleted:
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return True  # a client is one, however empty the database; and a question that costs nothing

    def keys(self, prefix: str | None = None) -> Iterator[str]:
        """The keys (that begin with `prefix`), page by page.

        >>> db.update({"a": 1, "b": 2})
        >>> list(db.keys()), list(db)
        (['a', 'b'], ['a', 'b'])
        """
        return (item.key for item in self.scan_all(prefix, keys_only=True))

    def values(self, prefix: str | None = None) -> Iterator[Any]:
        """The values under these keys, page by page.

        >>> db.update({"a": 1, "b": 2})
        >>> list(db.values())
        [1, 2]
        """
        return (item.value for item in self.scan_all(prefix))

    def items(self, prefix: str | None = None) -> Iterator[tuple[str, Any]]:
        """The keys with their values, page by page.

        >>> db.update({"a": 1, "b": 2})
        >>> dict(db.items())
        {'a': 1, 'b': 2}
        """
        return ((item.key, item.value) for item in self.scan_all(prefix))

    def update(self, mapping: Mapping[str, Any] | Iterable[tuple[str, Any]], *, timeout_s: float | None = None) -> None:
        """Put all of `mapping`, in one log entry: all or nothing.

        >>> db.update({"a": 1, "b": 2})
        >>> db["a"], db["b"]
        (1, 2)
        """
        ops = [{"op": "put", "key": key, "value": value} for key, value in dict(mapping).items()]
        if ops:
            self.batch(ops, timeout_s=timeout_s)

    def setdefault(self, key: str, value: Any, *, timeout_s: float | None = None) -> Any:
        """The value under `key`, which is `value` from now on where there was none.

        >>> db.setdefault("city", "Oslo"), db.setdefault("city", "Rome")
        ('Oslo', 'Oslo')
        """
        done = self.put(key, value, if_={"exists": False}, timeout_s=timeout_s)
        return value if done.applied else done.value

    def pop(self, key: str, default: Any = None, *, timeout_s: float | None = None) -> Any:
        """Remove `key` and return what its value was, or `default` where there is none.

        >>> db["city"] = "Oslo"
        >>> db.pop("city"), db.pop("city", "none")
        ('Oslo', 'none')
        """
        found = self.txn((), [{"op": "get", "key": key}, {"op": "delete", "key": key}], timeout_s=timeout_s).results[0]
        return found["value"] if found["found"] else default

    # ------------------------------------------------------------ leases

    def leases(self, *, timeout_s: float | None = None) -> tuple[LeaseInfo, ...]:
        """All leases of the cluster.

        >>> with db.lease(10) as lease:
        ...     lease.id in [info.id for info in db.leases()]
        True
        """
        return self.ask(questions.lease_list(), timeout_s)

    def lease_keepalive(self, lease: int, *, timeout_s: float | None = None) -> float:
        """A sign of life for the lease with this id. Returns its time to live, in seconds. Raises BadRequest where
        there is none.

        >>> db.lease_keepalive(db.lease(10).id)
        10.0
        """
        return self.ask(questions.lease_keepalive(lease), timeout_s)

    def lease_revoke(self, lease: int, *, timeout_s: float | None = None) -> None:
        """End the lease with this id, and delete the keys that hang on it. Raises BadRequest where there is none.

        >>> db.lease_revoke(db.lease(10).id)
        """
        return self.ask(questions.lease_revoke(lease), timeout_s)

    # ---------------------------------------------------------- cluster

    def ping(self, *, at: str | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """`node` and `time` of the server asked: the one at address `at`, or any.

        >>> db.ping()["node"]
        'n1'
        """
        return self.ask(questions.ping(at), timeout_s)

    def status(self, *, at: str | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """What the server at address `at` (or any) says of itself: docs/protocol.md lists the fields.

        >>> db.status()["role"]
        'leader'
        """
        return self.ask(questions.status(at), timeout_s)

    def members(self, *, timeout_s: float | None = None) -> tuple[MemberInfo, ...]:
        """The members of the cluster, as the leader sees them where there is one.

        >>> [(member.name, member.role) for member in db.members()]
        [('n1', 'voter')]
        """
        return self.ask(questions.members(), timeout_s)

    def member_remove(self, name: str, *, timeout_s: float | None = None) -> int:
        """Remove the member called `name` (or with this id) for good. Returns the revision of the configuration.

        >>> db.member_remove("nobody")
        Traceback (most recent call last):
        ddb.errors.BadRequest: ...
        """
        return self.ask(questions.member_remove(name), timeout_s)

    def member_promote(self, name: str, *, timeout_s: float | None = None) -> int:
        """Make the learner called `name` a voter. Returns the revision of the configuration.

        >>> db.member_promote("nobody")
        Traceback (most recent call last):
        ddb.errors.BadRequest: ...
        """
        return self.ask(questions.member_promote(name), timeout_s)

    def transfer(self, to: str | None = None, *, timeout_s: float | None = None) -> str:
        """Hand leadership to the voter called `to`, or to the most up-to-date one. Returns the new leader's name.

        >>> db.transfer("nobody")
        Traceback (most recent call last):
        ddb.errors.BadRequest: ...
        """
        return self.ask(questions.transfer(to), timeout_s)

    def snapshot(self, *, at: str | None = None, timeout_s: float | None = None) -> int:
        """Have the server at address `at` (or any) write a checkpoint. Returns the revision that is on its disk.

        >>> db.put("city", "Oslo").rev <= db.snapshot()
        True
        """
        return self.ask(questions.snapshot(at), timeout_s)

    def log(
        self,
        from_: int | None = None,
        limit: int | None = None,
        *,
        at: str | None = None,
        timeout_s: float | None = None,
    ) -> list[dict[str, Any]]:
        """Entries of the replicated log as the server at address `at` (or any) keeps it, from index `from_` on.

        >>> rev = db.put("city", "Oslo").rev
        >>> db.log(rev, 1)[0]["command"]
        ['put', 'city', 'Oslo']
        """
        return self.ask(questions.log(from_, limit, at), timeout_s)
