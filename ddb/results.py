"""What a client's calls return, and how values travel.

Laws: a result is a value (frozen); bytes come back as the bytes they were, wherever in a value they stand; a field that
a server may add never breaks the reading of a reply.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["put", "delete"]


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
class Event:
    """One change that a watch tells: `kind` is "put" or "delete". A delete has no value and version 0."""

    kind: Kind
    key: str
    value: Any
    rev: int
    version: int


@dataclass(frozen=True, slots=True)
class Change:
    """One change as history tells it: beside what an Event has, when (`at_ms`, milliseconds since 1970 by the leader's
    clock), in which term, and under which session (`client`), if any."""

    kind: Kind
    key: str
    value: Any
    rev: int
    version: int
    created: int | None
    term: int
    at_ms: int
    client: int | None = None


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Changes in the order of their revisions (or against it, where asked for). `more`: there are others behind the
    last one. `oldest`: the first revision that is kept; `rev`: the state up to which this is the history."""

    changes: tuple[Change, ...]
    more: bool
    oldest: int
    rev: int

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """A lease as the cluster lists it: its id, its time to live, how many keys hang on it, and the seconds that it has
    left where the leader answered."""

    id: int
    ttl_s: float
    keys: int
    remaining_s: float | None = None


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


def to_wire(value: Any) -> Any:
    """`value` with every bytes in it as the object that stands for it on the wire."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$b64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {name: to_wire(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_wire(inner) for inner in value]
    return value


def from_wire(value: Any) -> Any:
    """The inverse of `to_wire`. An object that only looks like bytes stays as it is."""
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(value.get("$b64"), str):
            try:
                return base64.b64decode(value["$b64"], validate=True)
            except (binascii.Error, ValueError):
                return value
        return {name: from_wire(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [from_wire(inner) for inner in value]
    return value


def item(reply: Mapping[str, Any]) -> Item:
    """The item in a reply to get, or in the list of a scan (which has no value where only keys were asked for)."""
    return Item(reply["key"], from_wire(reply.get("value")), reply["rev"], reply["created"], reply["version"])


def event(message: Mapping[str, Any]) -> Event:
    """The event in a message of a watch."""
    kind: Kind = "put" if message["event"] == "put" else "delete"
    return Event(kind, message["key"], from_wire(message.get("value")), message["rev"], message.get("version", 0))


def change(record: Mapping[str, Any]) -> Change:
    """One entry of a reply to `history`."""
    told = event(record)
    return Change(
        told.kind,
        told.key,
        told.value,
        told.rev,
        told.version,
        record.get("created"),
        record["term"],
        record["at"],
        record.get("client"),
    )


def lease_info(record: Mapping[str, Any]) -> LeaseInfo:
    """One entry of a reply to `lease_list`."""
    keys = record.get("keys", 0)
    return LeaseInfo(
        record["lease"], record["ttl"], keys if isinstance(keys, int) else len(keys), record.get("remaining")
    )
