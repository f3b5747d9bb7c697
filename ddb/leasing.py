"""What a client may ask about leases that no log entry answers: to keep one alive, and which there are.

Laws: both are answered only after a majority has confirmed who leads. A keep-alive is answered by the leader alone, which
counts the time (tenure.py); the list by any node, from its own state, with the time left only where it leads.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, Final, Protocol

from ddb import wire
from ddb.commands import lease_of
from ddb.errors import BadRequest, DdbError, NoLeader
from ddb.leasebook import ttl_json, unknown_lease
from ddb.replica import Reader, Replica
from ddb.tenure import Tenure

Request = dict[str, Any]

OPS: Final = ("lease_keepalive", "lease_list")
LIST_LIMIT: Final = 1000
LIST_LIMIT_MAX: Final = 10_000

NOTHING_TO_READ: Final[list[Any]] = ["count", {"start": "", "end": ""}]  # a read that looks at nothing


class Node(Protocol):
    """What is needed of the node."""

    replica: Replica
    tenure: Tenure
    now: Callable[[], float]


class _Confirmed:
    """A read's place whose answer is made by `then`, once the read is confirmed and this node is up to date."""

    def __init__(self, slot: Reader, then: Callable[[], bytes]) -> None:
        self._slot = slot
        self._then = then
        self.deadline = slot.deadline

    @property
    def done(self) -> bool:
        return self._slot.done

    @property
    def has_room(self) -> bool:
        return self._slot.has_room

    def reply(self, _: bytes) -> None:
        try:
            body = self._then()
        except DdbError as error:
            self._slot.fail(error)
        else:
            self._slot.reply(body)

    def fail(self, error: DdbError) -> None:
        self._slot.fail(error)


def keep_alive(node: Node, request: Request, slot: Reader) -> None:
    """The op `lease_keepalive`, at the leader. Raises BadRequest."""
    lease = lease_of(request)

    def then() -> bytes:
        now = node.now()
        if not node.tenure.leads(now):
            raise NoLeader("The leader has changed meanwhile; ask again.")
        return b'{"ok":true,"lease":%d,"ttl":%b}' % (lease, ttl_json(node.tenure.keep_alive(lease, now)))

    node.replica.read(NOTHING_TO_READ, _Confirmed(slot, then))


def list_leases(node: Node, request: Request, slot: Reader) -> None:
    """The op `lease_list`, at any node: one lease with its keys, or a page of them. Raises BadRequest."""
    if request.get("lease") is not None:
        lease = lease_of(request)
        node.replica.read(NOTHING_TO_READ, _Confirmed(slot, lambda: _one(node, lease)))
        return
    limit, start = request.get("limit", LIST_LIMIT), request.get("from", 0)
    if type(limit) is not int or not 1 <= limit <= LIST_LIMIT_MAX:
        raise BadRequest(f"`limit` must be a whole number from 1 to {LIST_LIMIT_MAX}.")
    if type(start) is not int or start < 0:
        raise BadRequest("`from` must be the number of a lease: the list begins with the first that is not below it.")
    node.replica.read(NOTHING_TO_READ, _Confirmed(slot, lambda: _page(node, start, limit)))


def _page(node: Node, start: int, limit: int) -> bytes:
    later = (lease for lease in node.replica.machine.leases.ttl_ms if lease >= start)
    items = [_item(node, lease) for lease in islice(later, limit)]
    return _reply(node, {"leases": items, "more": next(later, None) is not None})


def _one(node: Node, lease: int) -> bytes:
    leases = node.replica.machine.leases
    if lease not in leases.ttl_ms:
        raise unknown_lease(lease)
    return _reply(node, {"leases": [{**_item(node, lease), "attached": leases.keys(lease)}], "more": False})


def _item(node: Node, lease: int) -> dict[str, Any]:
    leases = node.replica.machine.leases
    ttl_ms = leases.ttl_ms[lease]
    ttl = ttl_ms // 1000 if ttl_ms % 1000 == 0 else ttl_ms / 1000
    item: dict[str, Any] = {"lease": lease, "ttl": ttl, "keys": leases.key_count(lease)}
    remaining_s = node.tenure.remaining_s(lease, node.now())
    if remaining_s is not None:
        item["remaining"] = round(remaining_s, 3)
    return item


def _reply(node: Node, fields: dict[str, Any]) -> bytes:
    raft = node.replica.raft
    body = {"ok": True, **fields, "rev": node.replica.machine.applied}
    leader = raft.config.member(raft.leader) if raft.leader is not None else None
    if leader is not None and not node.replica.is_leader:
        body["leader"] = leader.address
    return wire.encode(body)
