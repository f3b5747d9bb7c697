"""The Python client: one method for each operation, at whichever node can serve it.

    import ddb

    with ddb.connect("127.0.0.1:8050") as db:
        db.put("city", "Oslo")
        print(db.get("city").value)

Laws:

1. A write is never sent twice unless the first attempt *surely* did nothing. An error says which of the two it was:
   `error.definite` is True where nothing happened and never will, False (`Timeout`, `OutcomeUnknown`) where it may have.
2. A read is harmless, so it is repeated until its time is up.
3. Every call ends within its `timeout_s`, and Ctrl-C ends it at once, leaving the client usable.
4. There is no thread. `close` closes every socket; what a client was told is all that it keeps.

How a request finds its server is decided in ddb/calls.py and done in ddb/caller.py; here are only the operations and
their types. A client may be shared by threads: one lock makes their calls follow one another. Threads that want to
overlap their calls take a client each.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal

from ddb import wire
from ddb.caller import Caller
from ddb.commands import prefix_end
from ddb.errors import BadRequest

Condition = Mapping[str, Any]
"""One condition of `if_`: `{"rev": 12}`, `{"key": "a", "exists": False}`, `{"key": "n", "op": "<", "value": 5}`."""

Consistency = Literal["linearizable", "stale"]
"""How fresh a read is: `linearizable` sees every write acknowledged before it was asked, `stale` is one node's own
state without a round trip among the nodes."""

TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Item:
    """A key with its value: `rev` is the revision of its last change, `created` of its creation, `version` counts
    its changes from 1."""

    key: str
    value: Any
    rev: int
    created: int
    version: int


@dataclass(frozen=True, slots=True)
class PutResult:
    """What became of a put. Where `applied` is False its condition did not hold, nothing changed, and `found`, `value`
    and `rev` show the key as it is."""

    rev: int
    applied: bool = True
    version: int | None = None
    found: bool | None = None
    value: Any = None


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """What became of a delete: `deleted` is 0 where there was nothing. `applied` and the rest as in PutResult."""

    deleted: int
    rev: int
    applied: bool = True
    found: bool | None = None
    value: Any = None


@dataclass(frozen=True, slots=True)
class IncrResult:
    """The counter's new `value`, and the revision that made it."""

    value: int
    rev: int


@dataclass(frozen=True, slots=True)
class ScanResult:
    """One page of a scan, as the state was at `rev`. `more` tells that the range goes on behind the last item."""

    items: tuple[Item, ...]
    more: bool
    rev: int

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Whether the conditions held (`succeeded`), and the replies of the operations that ran, in order."""

    succeeded: bool
    results: tuple[dict[str, Any], ...]
    rev: int


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """A member of the cluster. The last three are known where the leader was asked: whether it answers, up to which
    index its log agrees with the leader's, and seconds since it was last heard."""

    name: str
    id: str
    address: str
    role: str
    alive: bool | None = None
    match: int | None = None
    last_heard_s: float | None = None


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
    """
    listed = servers.split(",") if isinstance(servers, str) else list(servers or ())
    addresses = [wire.format_address(*wire.parse_address(text)) for text in listed if text.strip()]
    if registry is not None:
        registry = wire.format_address(*wire.parse_address(registry))
    if not addresses and registry is None:
        raise BadRequest("No server is named; give HOST:PORT of a node, or registry=HOST:PORT.")
    patience_s = timeout_s if unreachable_s is None else unreachable_s
    return Client(addresses, registry=registry, timeout_s=timeout_s, discover=discover, unreachable_s=patience_s)


class Client:
    """A connection to a cluster, made by `connect`. Use it in a `with` statement, or `close` it.

    Every method takes `timeout_s`, the seconds that the whole call may take, and raises a `DdbError`: `NoLeader`,
    `Unreachable` and the like when time ran out and nothing happened; `Timeout` or `OutcomeUnknown` when a write may
    have happened; `BadRequest`, `TooLarge`, … as docs/protocol.md says.
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
        self.timeout_s = timeout_s
        self._caller = Caller(servers, registry, discover, unreachable_s)
        self._lock = threading.Lock()
        self._closed = False

    # ------------------------------------------------------------- data

    def put(
        self,
        key: str,
        value: Any,
        *,
        if_: Condition | Sequence[Condition] | None = None,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Set `key` (a non-empty string of at most 4 KiB) to `value` (any JSON value, or bytes), where all
        conditions of `if_` hold."""
        request = {"op": "put", "key": key, "value": _to_wire(value), **_conditions(if_)}
        reply = self.call(request, timeout_s=timeout_s)
        current = (reply.get("found"), _from_wire(reply.get("value")))
        return PutResult(reply["rev"], reply.get("applied", True), reply.get("version"), *current)

    def get(
        self,
        key: str,
        *,
        read: Consistency = "linearizable",
        max_lag_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Item | None:
        """The item under `key`, or None. A stale read fails where its node last heard from the leader longer than
        `max_lag_s` ago."""
        reply = self.call({"op": "get", "key": key, **_reading(read, max_lag_s)}, timeout_s=timeout_s)
        return _item(reply) if reply["found"] else None

    def delete(
        self, key: str, *, if_: Condition | Sequence[Condition] | None = None, timeout_s: float | None = None
    ) -> DeleteResult:
        """Remove `key`, where all conditions of `if_` hold."""
        reply = self.call({"op": "delete", "key": key, **_conditions(if_)}, timeout_s=timeout_s)
        current = (reply.get("found"), _from_wire(reply.get("value")))
        return DeleteResult(reply.get("deleted", 0), reply["rev"], reply.get("applied", True), *current)

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
        the order of the keys' UTF-8 bytes; at most `limit` of them. All keys where no range is given."""
        request = {"op": "scan", **_range(prefix, start, end), **_reading(read, max_lag_s)}
        request.update({"limit": limit} if limit is not None else {})
        request.update({"reverse": True} if reverse else {})
        request.update({"keys_only": True} if keys_only else {})
        reply = self.call(request, timeout_s=timeout_s)
        return ScanResult(tuple(map(_item, reply["items"])), reply["more"], reply["rev"])

    def scan_all(
        self, prefix: str | None = None, *, start: str | None = None, end: str | None = None
    ) -> Iterator[Item]:
        """Every item of a range, page by page. Each page is consistent in itself; between pages time goes on."""
        request: dict[str, Any] = {"op": "scan", **_range(prefix, start, end)}
        while True:
            page = self.call(request)
            yield from map(_item, page["items"])
            if not page["more"] or not page["items"]:
                return
            request = next_page(request, page["items"][-1]["key"])

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
        """How many keys the range holds; the range as in `scan`."""
        request = {"op": "count", **_range(prefix, start, end), **_reading(read, max_lag_s)}
        count: int = self.call(request, timeout_s=timeout_s)["count"]
        return count

    def incr(self, key: str, by: int = 1, *, timeout_s: float | None = None) -> IncrResult:
        """Add `by` to the integer under `key` (0 where there is none). Raises BadRequest where it is no integer."""
        reply = self.call({"op": "incr", "key": key, "by": by}, timeout_s=timeout_s)
        return IncrResult(reply["value"], reply["rev"])

    def batch(self, ops: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None) -> int:
        """Do `ops`, puts and deletes like `{"op": "put", "key": "a", "value": 1}`, all or none, in one log entry.
        Returns its revision."""
        rev: int = self.call({"op": "batch", "ops": _to_wire(list(ops))}, timeout_s=timeout_s)["rev"]
        return rev

    def txn(
        self,
        if_: Condition | Sequence[Condition] = (),
        then: Sequence[Mapping[str, Any]] = (),
        else_: Sequence[Mapping[str, Any]] = (),
        *,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Where all conditions of `if_` hold do the operations `then`, otherwise `else_`; all or none of them."""
        conditions = [if_] if isinstance(if_, Mapping) else list(if_)
        request = {"op": "txn", "if": conditions, "then": list(then), "else": list(else_)}
        reply = self.call(_to_wire(request), timeout_s=timeout_s)
        return TxnResult(reply["succeeded"], tuple(_from_wire(reply["results"])), reply["rev"])

    # ---------------------------------------------------------- cluster

    def ping(self, *, at: str | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """`node` and `time` of the server asked: the one at address `at`, or any."""
        return self.call({"op": "ping"}, at=at, timeout_s=timeout_s)

    def status(self, *, at: str | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """What the server at address `at` (or any) says of itself: docs/protocol.md lists the fields."""
        return self.call({"op": "status"}, at=at, timeout_s=timeout_s)

    def members(self, *, timeout_s: float | None = None) -> tuple[MemberInfo, ...]:
        """The members of the cluster, as the leader sees them where there is one."""
        reply = self.call({"op": "members"}, timeout_s=timeout_s)
        return tuple(
            MemberInfo(m["name"], m["id"], m["address"], m["role"], m.get("alive"), m.get("match"), m.get("last_heard"))
            for m in reply["members"]
        )

    def member_remove(self, name: str, *, timeout_s: float | None = None) -> int:
        """Remove the member called `name` (or with this id) for good. Returns the revision of the configuration."""
        rev: int = self.call({"op": "member_remove", "name": name}, timeout_s=timeout_s)["rev"]
        return rev

    def member_promote(self, name: str, *, timeout_s: float | None = None) -> int:
        """Make the learner called `name` a voter. Returns the revision of the configuration."""
        rev: int = self.call({"op": "member_promote", "name": name}, timeout_s=timeout_s)["rev"]
        return rev

    def transfer(self, to: str | None = None, *, timeout_s: float | None = None) -> str:
        """Hand leadership to the voter called `to`, or to the most up-to-date one. Returns the new leader's name."""
        reply = self.call({"op": "transfer", **({"to": to} if to is not None else {})}, timeout_s=timeout_s)
        name: str = reply["name"]
        return name

    def snapshot(self, *, at: str | None = None, timeout_s: float | None = None) -> int:
        """Have the server at address `at` (or any) write a checkpoint. Returns the revision that is on its disk."""
        rev: int = self.call({"op": "snapshot"}, at=at, timeout_s=timeout_s)["rev"]
        return rev

    def log(
        self,
        from_: int | None = None,
        limit: int | None = None,
        *,
        at: str | None = None,
        timeout_s: float | None = None,
    ) -> list[dict[str, Any]]:
        """Entries of the replicated log as the server at address `at` (or any) keeps it, from index `from_` on."""
        request: dict[str, Any] = {"op": "log"}
        request.update({"from": from_} if from_ is not None else {})
        request.update({"limit": limit} if limit is not None else {})
        entries: list[dict[str, Any]] = self.call(request, at=at, timeout_s=timeout_s)["entries"]
        return entries

    # ------------------------------------------------- the way of a call

    def call(
        self, request: Mapping[str, Any], *, at: str | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Send any `request` object of docs/protocol.md, and return the reply as it came.

        Goes to the leader where that is known, or to the address `at` and nowhere else. An unknown operation
        is treated with the care due to a write. Raises a DdbError for every reply that is not ok.
        """
        with self._lock:
            if self._closed:
                raise BadRequest("This client is closed; connect again.")
            return self._caller.call(request, at, self.timeout_s if timeout_s is None else timeout_s)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses known now: those given, then those learnt."""
        return self._caller.servers

    def close(self) -> None:
        """Close every connection. May be called twice."""
        with self._lock:
            self._closed = True
            self._caller.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {','.join(self.servers)}{' closed' if self._closed else ''}>"


# ------------------------------------------------------------------ values


def _to_wire(value: Any) -> Any:
    """`value` with every bytes in it as the object that stands for it on the wire."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$b64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {name: _to_wire(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_wire(inner) for inner in value]
    return value


def _from_wire(value: Any) -> Any:
    """The inverse of `_to_wire`. An object that only looks like bytes stays as it is."""
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(value.get("$b64"), str):
            try:
                return base64.b64decode(value["$b64"], validate=True)
            except (binascii.Error, ValueError):
                return value
        return {name: _from_wire(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_from_wire(inner) for inner in value]
    return value


def _item(reply: Mapping[str, Any]) -> Item:
    """The item in a reply to get, or in the list of a scan (which has no value where only keys were asked for)."""
    return Item(reply["key"], _from_wire(reply.get("value")), reply["rev"], reply["created"], reply["version"])


def _conditions(if_: Condition | Sequence[Condition] | None) -> dict[str, Any]:
    if if_ is None:
        return {}
    return {"if": _to_wire(if_ if isinstance(if_, Mapping) else list(if_))}


def _reading(read: Consistency, max_lag_s: float | None) -> dict[str, Any]:
    fields: dict[str, Any] = {} if read == "linearizable" else {"read": read}
    return fields if max_lag_s is None else {**fields, "max_lag": max_lag_s}


def _range(prefix: str | None, start: str | None, end: str | None) -> dict[str, Any]:
    fields = {"prefix": prefix, "start": start, "end": end}
    return {name: value for name, value in fields.items() if value is not None}


def next_page(request: Mapping[str, Any], last_key: str) -> dict[str, Any]:
    """The scan `request` for what lies behind `last_key`, the last one of its page."""
    following = {name: value for name, value in request.items() if name != "prefix"}
    if "prefix" in request:
        following.update(_range(None, request["prefix"], prefix_end(request["prefix"])))
    following.update({"end": last_key} if request.get("reverse") else {"start": last_key + "\0"})
    return following
