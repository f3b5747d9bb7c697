"""Every operation as a question: the request object, and how its reply is read.

Laws: a field is sent only where it says something; what an operation looks like on the wire is written here and nowhere
else, so that the blocking client, the asyncio client, pipelines and recipes can't differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from ddb.commands import prefix_end
from ddb.errors import BadFrame, BadRequest
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
    change,
    from_wire,
    item,
    lease_info,
    to_wire,
)

T = TypeVar("T")

Condition = Mapping[str, Any]
"""One condition of `if_`: `{"rev": 12}`, `{"key": "a", "exists": False}`, `{"key": "n", "op": "<", "value": 5}`."""

Conditions = Condition | Sequence[Condition]

Consistency = Literal["linearizable", "stale"]
"""How fresh a read is: `linearizable` sees every write acknowledged before it was asked, `stale` is one node's own
state without a round trip among the nodes."""


class HasId(Protocol):
    """What has the id of a lease."""

    @property
    def id(self) -> int:
        """The lease's id."""


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """A `request` of docs/protocol.md, how to `read` the reply, and the one address to ask `at`, if not any."""

    request: dict[str, Any]
    read: Callable[[dict[str, Any]], T]
    at: str | None = None

    def result(self, reply: dict[str, Any]) -> T:
        """What `reply`, a success, says. Raises BadFrame where it does not say what the protocol promises."""
        try:
            return self.read(reply)
        except (KeyError, TypeError, ValueError) as error:
            op = self.request.get("op")
            raise BadFrame(
                f"The server's answer to {op!r} is not one of ddb's ({type(error).__name__}: {error}); which program is it?"
            ) from error


# -------------------------------------------------------------------- data


def put(key: str, value: Any, if_: Conditions | None = None, lease: int | HasId | None = None) -> Question[PutResult]:
    """Set a key."""
    request = {"op": "put", "key": key, "value": to_wire(value), **_conditions(if_)}
    if lease is not None:
        request["lease"] = lease if isinstance(lease, int) else getattr(lease, "id", lease)
    return Question(request, _put_result)


def get(
    key: str, read: Consistency = "linearizable", max_lag_s: float | None = None, rev: int | None = None
) -> Question[Item | None]:
    """Read a key."""
    request = {"op": "get", "key": key, **_reading(read, max_lag_s), **_given(rev=rev)}
    return Question(request, lambda reply: item(reply) if reply["found"] else None)


def delete(key: str, if_: Conditions | None = None) -> Question[DeleteResult]:
    """Remove a key."""
    return Question({"op": "delete", "key": key, **_conditions(if_)}, _delete_result)


def incr(key: str, by: int = 1) -> Question[IncrResult]:
    """Add to an integer."""
    return Question({"op": "incr", "key": key, "by": by}, lambda reply: IncrResult(reply["value"], reply["rev"]))


def scan(
    prefix: str | None = None,
    start: str | None = None,
    end: str | None = None,
    limit: int | None = None,
    reverse: bool = False,
    keys_only: bool = False,
    read: Consistency = "linearizable",
    max_lag_s: float | None = None,
) -> Question[ScanResult]:
    """One page of a range."""
    request = {"op": "scan", **_given(prefix=prefix, start=start, end=end), **_reading(read, max_lag_s)}
    request.update(_given(limit=limit, reverse=reverse or None, keys_only=keys_only or None))
    return Question(request, _scan_result)


def following(question: Question[ScanResult], page: ScanResult) -> Question[ScanResult] | None:
    """The scan of what lies behind a `page`, or None where it was the last one."""
    if not page.more or not page.items:
        return None
    return Question(next_page(question.request, page.items[-1].key), question.read)


def next_page(request: Mapping[str, Any], last_key: str) -> dict[str, Any]:
    """The scan `request` for what lies behind `last_key`, the last one of its page."""
    rest = {name: value for name, value in request.items() if name != "prefix"}
    if "prefix" in request:
        rest.update(_given(start=request["prefix"], end=prefix_end(request["prefix"])))
    rest.update({"end": last_key} if request.get("reverse") else {"start": last_key + "\0"})
    return rest


def count(
    prefix: str | None = None,
    start: str | None = None,
    end: str | None = None,
    read: Consistency = "linearizable",
    max_lag_s: float | None = None,
) -> Question[int]:
    """How many keys a range holds."""
    request = {"op": "count", **_given(prefix=prefix, start=start, end=end), **_reading(read, max_lag_s)}
    return Question(request, lambda reply: int(reply["count"]))


def batch(ops: Sequence[Mapping[str, Any]]) -> Question[int]:
    """Puts and deletes, all or none."""
    return Question({"op": "batch", "ops": to_wire(list(ops))}, _rev)


def delete_all(keys: Sequence[str]) -> Question[int]:
    """Remove keys, all at once."""
    return batch([{"op": "delete", "key": key} for key in keys])


def watch(key: str | None, prefix: str | None) -> dict[str, Any]:
    """The request of a watch, without the revision to begin at. Raises BadRequest where it asks for two things."""
    if key is not None and prefix is not None:
        raise BadRequest("Watch a key or a prefix, not both.")
    return {"op": "watch", **_given(key=key, prefix=prefix if key is not None or prefix is not None else "")}


def txn(
    if_: Conditions, then: Sequence[Mapping[str, Any]], else_: Sequence[Mapping[str, Any]] = ()
) -> Question[TxnResult]:
    """Conditions, and what to do where they hold and where not."""
    conditions = [if_] if isinstance(if_, Mapping) else _listed(if_)
    request = to_wire({"op": "txn", "if": conditions, "then": list(then), "else": list(else_)})
    return Question(request, _txn_result)


def history(
    key: str | None = None,
    prefix: str | None = None,
    from_rev: int | None = None,
    to_rev: int | None = None,
    limit: int | None = None,
    reverse: bool = False,
    read: Consistency = "linearizable",
) -> Question[HistoryPage]:
    """Past changes of a key, of a prefix, or all."""
    request = {"op": "history", **_given(key=key, prefix=prefix, to=to_rev, limit=limit, reverse=reverse or None)}
    request.update({**_given(**{"from": from_rev}), **_reading(read, None)})
    return Question(request, _history_page)


# ----------------------------------------------------- sessions and leases


def session_open() -> Question[int]:
    """A name under which writes are done exactly once."""
    return Question({"op": "session_open"}, lambda reply: int(reply["client"]))


def session_close(client: int) -> Question[None]:
    """Forget that name."""
    return Question({"op": "session_close", "client": client}, lambda reply: None)


def lease_grant(ttl_s: float) -> Question[int]:
    """A lease that lives for `ttl_s` from each sign of life on."""
    return Question({"op": "lease_grant", "ttl": ttl_s}, lambda reply: int(reply["lease"]))


def lease_keepalive(lease: int) -> Question[float]:
    """A sign of life; its answer is the time to live, in seconds."""
    return Question({"op": "lease_keepalive", "lease": lease}, lambda reply: float(reply["ttl"]))


def lease_revoke(lease: int) -> Question[None]:
    """End a lease, and delete what hangs on it."""
    return Question({"op": "lease_revoke", "lease": lease}, lambda reply: None)


def lease_list() -> Question[tuple[LeaseInfo, ...]]:
    """All leases."""
    return Question({"op": "lease_list"}, lambda reply: tuple(map(lease_info, reply["leases"])))


# ----------------------------------------------------------------- cluster


def ping(at: str | None = None) -> Question[dict[str, Any]]:
    """Is anybody there?"""
    return Question({"op": "ping"}, dict, at)


def status(at: str | None = None) -> Question[dict[str, Any]]:
    """What a node says of itself."""
    return Question({"op": "status"}, dict, at)


def members() -> Question[tuple[MemberInfo, ...]]:
    """Who belongs to the cluster."""
    return Question({"op": "members"}, lambda reply: tuple(map(_member, reply["members"])))


def member_remove(name: str) -> Question[int]:
    """Remove a member for good."""
    return Question({"op": "member_remove", "name": name}, _rev)


def member_promote(name: str) -> Question[int]:
    """Make a learner a voter."""
    return Question({"op": "member_promote", "name": name}, _rev)


def transfer(to: str | None = None) -> Question[str]:
    """Hand leadership over."""
    return Question({"op": "transfer", **_given(to=to)}, lambda reply: str(reply["name"]))


def snapshot(at: str | None = None) -> Question[int]:
    """Write a checkpoint."""
    return Question({"op": "snapshot"}, _rev, at)


def log(from_: int | None = None, limit: int | None = None, at: str | None = None) -> Question[list[dict[str, Any]]]:
    """Entries of a node's log."""
    request = {"op": "log", **_given(**{"from": from_, "limit": limit})}
    return Question(request, lambda reply: list(reply["entries"]), at)


# ------------------------------------------------------- fields and replies


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _conditions(if_: Conditions | None) -> dict[str, Any]:
    if if_ is None:
        return {}
    return {"if": to_wire(if_ if isinstance(if_, Mapping) else _listed(if_))}


def _listed(conditions: Sequence[Condition]) -> list[Condition]:
    """Several conditions. Raises BadRequest for what else can be gone through, or not: "" is none, and asks for none."""
    if isinstance(conditions, str | bytes) or not isinstance(conditions, Iterable):
        raise BadRequest(f'A condition is an object like {{"rev": 12}}, not of type {type(conditions).__name__}.')
    return list(conditions)


def _reading(read: Consistency, max_lag_s: float | None) -> dict[str, Any]:
    fields: dict[str, Any] = {} if read == "linearizable" else {"read": read}
    return {**fields, **_given(max_lag=max_lag_s)}


def _rev(reply: dict[str, Any]) -> int:
    return int(reply["rev"])


def _put_result(reply: dict[str, Any]) -> PutResult:
    current = (reply.get("found"), from_wire(reply.get("value")))
    return PutResult(reply["rev"], reply.get("applied", True), reply.get("version"), *current)


def _delete_result(reply: dict[str, Any]) -> DeleteResult:
    current = (reply.get("found"), from_wire(reply.get("value")))
    return DeleteResult(reply.get("deleted", 0), reply["rev"], reply.get("applied", True), *current)


def _scan_result(reply: dict[str, Any]) -> ScanResult:
    return ScanResult(tuple(map(item, reply["items"])), reply["more"], reply["rev"])


def _txn_result(reply: dict[str, Any]) -> TxnResult:
    return TxnResult(reply["succeeded"], tuple(from_wire(reply["results"])), reply["rev"])


def _history_page(reply: dict[str, Any]) -> HistoryPage:
    return HistoryPage(tuple(map(change, reply["changes"])), reply["more"], reply["oldest"], reply["rev"])


def _member(m: Mapping[str, Any]) -> MemberInfo:
    return MemberInfo(m["name"], m["id"], m["address"], m["role"], m.get("alive"), m.get("match"), m.get("last_heard"))
