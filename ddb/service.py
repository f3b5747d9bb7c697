"""What a client may ask of a node: one table of operations (docs/protocol.md).

Laws: each request is judged whole before it waits for anybody, so what is wrong fails at once; a request gets
exactly one reply, by its deadline; who must ask the leader (membership, leadership) is passed on to it unless
the request says `"forward":false`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from ddb import __version__, codec, http, leasing, past, wire
from ddb.commands import WRITES, lease_of, prepare, prepare_read
from ddb.errors import (
    BadRequest,
    DdbError,
    Forbidden,
    NoLeader,
    NotLeader,
    ShuttingDown,
    Timeout,
    WrongCluster,
)
from ddb.membership import Patience, Sighting, Standing, survives
from ddb.messages import Call, CallReply, Member
from ddb.peers import Peers
from ddb.replica import Replica
from ddb.routes import node_routes
from ddb.server import Slot
from ddb.sync import Sync
from ddb.tenure import Tenure
from ddb.watchers import Watching
from ddb.world import World

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 5.0
TIMEOUT_MAX_S: Final = 3600.0
LOG_LIMIT: Final = 100
LOG_LIMIT_MAX: Final = 10_000
LOG_BYTES_MAX: Final = 4 << 20
READS: Final = ("get", "scan", "count", "history")
FOR_THE_LEADER: Final = (
    *READS, *leasing.OPS, "members", "member_remove", "member_promote", "transfer",
)  # fmt: skip
LATER: Final = ("backup", "trace")

Request = dict[str, Any]


class Node(Protocol):
    """What the service needs of its node."""

    id: str
    name: str
    address: str
    replica: Replica
    sync: Sync
    tenure: Tenure
    peers: Peers
    patience: Patience
    started_at: float
    now: Callable[[], float]
    world: World

    @property
    def cluster(self) -> str | None:
        """The id of the cluster, once there is one."""

    def adopt(self, cluster: str) -> None:
        """Become part of `cluster`, durably; only for a node without one."""

    def standings(self) -> dict[str, Standing]:
        """What the leader knows of the others."""


class _Line:
    """The order of one connection's data requests. Reads run beside reads, and writes beside writes, which the log
    orders; but a read must show the write before it, and not the one behind it: whoever pipelines expects that."""

    __slots__ = ("held", "last", "last_writes")

    def __init__(self) -> None:
        self.last: Slot | None = None  # the latest that has begun
        self.last_writes = False
        self.held: deque[tuple[bool, Request, Slot]] = deque()

    def blocks(self, writes: bool) -> bool:
        """Whether a request that `writes`, or reads, has to wait for the latest one's reply."""
        return self.last is not None and self.last_writes is not writes and self.last.out is None


class NodeService:
    """The operations of `node`."""

    def __init__(self, node: Node) -> None:
        self.leaving = False
        self._node = node
        self._routes = node_routes()
        self._calls: dict[int, tuple[str, Slot]] = {}  # passed on to the leader: to whom, and for whom
        self._tickets = node.world.rng.getrandbits(48)  # as the replica's: no earlier life used these
        self._waiting: list[_Line] = []  # of the connections where something waits for its turn
        self._transfers: list[tuple[str, Slot]] = []  # who led, and who waits for another to lead
        self._watching: Watching | None = None
        self._ops: dict[str, Callable[[Request, Slot], None]] = {
            **dict.fromkeys(WRITES, self._write),
            **dict.fromkeys(READS, self._read),
            "watch": self._watch,
            "ping": self._ping,
            "status": self._status,
            "ready": self._ready,
            **dict.fromkeys(leasing.OPS, self._lease_read),
            "members": self._members,
            "member_remove": lambda request, slot: self._at_leader(request, slot, self._remove),
            "member_promote": lambda request, slot: self._at_leader(request, slot, self._promote),
            "transfer": lambda request, slot: self._at_leader(request, slot, self._transfer),
            "snapshot": lambda request, slot: self._node.sync.checkpoint(slot, self._node.now()),
            "log": self._log,
            "peer": self._peer,
            **dict.fromkeys(LATER, self._later),
        }

    @property
    def routes(self) -> Sequence[http.Route]:
        """See server.Service."""
        return self._routes

    def request(self, request: Request, slot: Slot) -> None:
        """See server.Service."""
        op = request.get("op")
        handle = self._ops.get(op) if type(op) is str else None
        if handle is None:
            raise _unknown(op)
        if self.leaving:
            raise ShuttingDown("This node is leaving; ask another.")
        timeout_s = request.get("timeout", TIMEOUT_S)
        if timeout_s.__class__ not in (int, float) or not 0 < timeout_s <= TIMEOUT_MAX_S:
            raise BadRequest(f"`timeout` is a number of seconds above 0 and up to {TIMEOUT_MAX_S:g}.")
        slot.deadline = self._node.now() + timeout_s
        handle(request, slot)

    def tick(self, now: float) -> None:
        """Answer those who wait for a change of leadership, or whose time is up."""
        self.watching.tick(now)
        if not self._calls and not self._transfers:
            return
        for ticket, (_, slot) in list(self._calls.items()):
            if slot.deadline <= now:
                del self._calls[ticket]
                slot.fail(Timeout("The leader has not answered in time; a change may have been made or not."))
        still: list[tuple[str, Slot]] = []
        for old, slot in self._transfers:
            leader = self._leader()
            if leader is not None and leader.id != old:
                slot.reply(self._new_leader(leader))
            elif slot.deadline <= now or (leader is not None and self._node.replica.raft.transfer_to is None):
                slot.fail(NoLeader("The leadership did not move in time; look at `status`, and try again."))
            else:
                still.append((old, slot))
        self._transfers = still

    @property
    def watching(self) -> Watching:
        """The watchers of this node."""
        if self._watching is None:  # the node opens its replica behind its service
            self._watching = Watching(self._node.replica, self._node.sync.chronicle, self._node.now)
        return self._watching

    def disconnected(self, peer: str) -> None:
        """Whatever was passed on to `peer` gets no reply any more."""
        for ticket in [ticket for ticket, (leader, _) in self._calls.items() if leader == peer]:
            self._calls.pop(ticket)[1].fail(
                Timeout("The leader was lost meanwhile; the change may have been made or not.")
            )

    # --- data ---------------------------------------------------------------------------------------------------

    def _write(self, request: Request, slot: Slot) -> None:
        line = self._in_line(True, request, slot)
        if line is not None:
            self._write_now(line, request, slot)

    def _write_now(self, line: _Line, request: Request, slot: Slot) -> None:
        node = self._node
        entry, command = prepare(request, slot.quote)
        if "forward" in request:
            self._check_forward(request)
        line.last, line.last_writes = slot, True
        node.replica.write(entry, command, slot)

    def flushed(self) -> bool:
        """The turn's work is done: begin what waited for it. Returns whether there was anything."""
        if not self._waiting:
            return False
        waiting, self._waiting = self._waiting, []
        begun = False
        for line in waiting:
            while line.held and not line.blocks(line.held[0][0]):
                writes, request, slot = line.held.popleft()
                begun = True
                try:
                    if writes:
                        self._write_now(line, request, slot)
                    elif request["op"] in leasing.OPS:
                        self._lease_read_now(line, request, slot)
                    else:
                        self._read_now(line, request, slot)
                except DdbError as error:
                    slot.fail(error)
            if line.held:
                self._waiting.append(line)
        return begun

    @property
    def _must_ask_leader(self) -> bool:
        """Whether this node falls behind: what can't be saved here isn't sent here."""
        replica = self._node.replica
        return replica.read_only and self._leader() is not None and not replica.is_leader

    def _lease_read(self, request: Request, slot: Slot) -> None:
        line = self._in_line(False, request, slot)
        if line is not None:
            self._lease_read_now(line, request, slot)

    def _lease_read_now(self, line: _Line, request: Request, slot: Slot) -> None:
        line.last, line.last_writes = slot, False
        node = self._node
        if request["op"] == "lease_keepalive":
            lease_of(request)  # what is wrong is refused here
            self._at_leader(request, slot, lambda request, slot: leasing.keep_alive(node, request, slot))
        elif self._must_ask_leader:
            self._call(request, slot)
        else:
            leasing.list_leases(node, request, slot)

    def _in_line(self, writes: bool, request: Request, slot: Slot) -> _Line | None:
        """The line of the slot's connection, or None where the request has to wait in it."""
        if isinstance(slot, _CallSlot):
            return _Line()  # the member that passed it on keeps the order
        line: _Line | None = slot.connection.state
        if line is None:
            line = slot.connection.state = _Line()
        if line.held or line.blocks(writes):
            if not line.held:
                self._waiting.append(line)
            line.held.append((writes, request, slot))
            return None
        return line

    def _watch(self, request: Request, slot: Slot) -> None:
        """What stands behind it on its connection is not looked at: if it succeeds, the connection is the watch's."""
        slot.connection.await_reply(slot)
        self._read(request, slot)

    def _read(self, request: Request, slot: Slot) -> None:
        line = self._in_line(False, request, slot)
        if line is not None:
            self._read_now(line, request, slot)

    def _read_now(self, line: _Line, request: Request, slot: Slot) -> None:
        op = request["op"]
        if op == "watch":
            line.last, line.last_writes = slot, False
            self.watching.watch(request, slot)
            return
        of_the_past = op == "history" or (op == "get" and "rev" in request)
        command = past.prepare(request) if of_the_past else prepare_read(request)
        line.last, line.last_writes = slot, False
        mode = request.get("read", "linearizable")
        if mode == "linearizable":
            if self._must_ask_leader:
                self._call(request, slot)
            else:
                self._node.replica.read(command, slot)
        elif mode == "stale":
            now = self._node.now()
            max_lag_s = request.get("max_lag")
            if max_lag_s is not None:
                if max_lag_s.__class__ not in (int, float) or max_lag_s < 0:
                    raise BadRequest("`max_lag` is a number of seconds.")
                if self._node.replica.raft.lag_s(now) > max_lag_s:
                    raise NoLeader(f"This node has not heard from a leader for more than {max_lag_s} s; ask another.")
            self._node.replica.read_stale(command, slot, now)
        else:
            raise BadRequest('`read` is "linearizable" or "stale".')

    def _ready(self, request: Request, slot: Slot) -> None:
        """Whether linearizable reads can be served here: served is one that looks at nothing."""
        slot.deadline = min(slot.deadline, self._node.now() + 1.0)
        self._node.replica.read(["count", {"start": "", "end": ""}], slot)

    def _log(self, request: Request, slot: Slot) -> None:
        raft = self._node.replica.raft
        limit = _whole(request, "limit", LOG_LIMIT, LOG_LIMIT_MAX)
        first = raft.log.base_index + 1
        start = _whole(request, "from", max(first, raft.log.last_index - limit + 1), 1 << 62)
        entries: list[Request] = []
        size = 0
        for summary in raft.log.batches(start - 1 if start <= first else raft.log.begin_at(start) - 1):
            data = summary.data or raft.log.bytes_of(summary.first)
            size += len(data)
            if len(entries) >= limit or (entries and size > LOG_BYTES_MAX):
                break
            batch = codec.decode_batch(data)
            common = {"term": batch.term, "at": batch.at_ms}
            if batch.config is not None:
                entries.append({"index": batch.first, **common, "config": batch.config.to_json()})
            for index, command in enumerate(batch.commands or [], batch.first):
                if index >= start and len(entries) < limit:
                    entries.append({"index": index, **common, "command": command})
        reply = {"ok": True, "entries": entries, "first": first, "last": raft.log.last_index, "commit": raft.commit}
        slot.reply(wire.encode(reply))

    def _later(self, request: Request, slot: Slot) -> None:
        raise BadRequest(f"{request['op']!r} is not available in this version of ddb.")

    # --- the cluster --------------------------------------------------------------------------------------------

    def _ping(self, request: Request, slot: Slot) -> None:
        slot.reply(wire.encode({"ok": True, "node": self._node.name, "time": self._node.world.wall_ms() / 1000}))

    def _status(self, request: Request, slot: Slot) -> None:
        node, raft = self._node, self._node.replica.raft
        leader = self._leader()
        now = self._node.now()
        table: Any = node.replica.machine.table
        lag_s = raft.lag_s(now)
        status = {
            "ok": True,
            "node": node.name,
            "id": node.id,
            "cluster": node.cluster,
            "address": node.address,
            "role": raft.role_shown.value,
            "term": raft.term,
            "leader": {"name": leader.name, "address": leader.address} if leader else None,
            "election": raft.election.name,
            "log": {
                "first": raft.log.base_index + 1,
                "last": raft.log.last_index,
                "commit": raft.commit,
                "applied": node.replica.machine.applied,
                "persisted": raft.durable,
            },
            "snapshot": {"rev": table.meta.applied},
            "history": {"oldest": node.sync.chronicle.oldest},
            "watchers": self.watching.count,
            "members": [_shown(m) for m in raft.config.members],
            "lag": None if lag_s == float("inf") else round(lag_s, 3),
            "uptime": round(now - node.started_at, 3),
            "version": __version__,
            "keys": table.key_count,
            "sessions": len(node.replica.machine.sessions),
            "leases": len(node.replica.machine.leases),
            "digest": f"{table.digest:016x}",
            "read_only": node.replica.read_only,
        }
        slot.reply(wire.encode(status))

    def _members(self, request: Request, slot: Slot) -> None:
        """The leader knows more; without one, the bare list is better than nothing."""
        raft = self._node.replica.raft
        if not self._node.replica.is_leader and self._leader() is not None and request.get("forward") is not False:
            self._call(request, slot)
            return
        standings = self._node.standings() if self._node.replica.is_leader else {}
        members: list[Request] = []
        for member in raft.config.members:
            entry = {**_shown(member), "alive": None, "match": None, "last_heard": None}
            if member.id == self._node.id:
                entry.update(alive=True, match=raft.durable, last_heard=0.0)
            elif member.id in standings:
                silent_s = standings[member.id].silent_s
                alive = silent_s < self._node.patience.dead_after_s
                entry.update(alive=alive, match=raft.progress[member.id].match, last_heard=round(silent_s, 3))
            members.append(entry)
        slot.reply(wire.encode({"ok": True, "members": members, "rev": raft.config_index}))

    def _remove(self, request: Request, slot: Slot) -> None:
        node, raft = self._node, self._node.replica.raft
        member = self._named(request, "name")
        config = raft.config.without(member.id)
        if not config.voters:
            raise BadRequest(f"{member.name!r} is the last voter; a cluster can't be without any.")
        if not survives(config, node.id, node.standings(), node.patience):
            raise BadRequest(
                f"Without {member.name!r} no majority of the voters would be alive; first bring others up."
            )
        node.replica.change(config, slot)

    def _promote(self, request: Request, slot: Slot) -> None:
        node, raft = self._node, self._node.replica.raft
        member = self._named(request, "name")
        if member.voter:
            slot.reply(b'{"ok":true,"rev":%d}' % raft.config_index)
            return
        standing = node.standings().get(member.id)
        if standing is None or not standing.caught_up:
            raise BadRequest(f"{member.name!r} has not caught up with the log yet; wait until it has.")
        config = raft.config.with_member(Member(member.id, member.name, member.address, voter=True))
        if not survives(config, node.id, node.standings(), node.patience):
            raise BadRequest(f"With {member.name!r} as a voter no majority would be alive; first bring others up.")
        node.replica.change(config, slot)

    def _transfer(self, request: Request, slot: Slot) -> None:
        node, raft = self._node, self._node.replica.raft
        if request.get("to") is not None:
            member = self._named(request, "to")
            if member.id == node.id:
                slot.reply(self._new_leader(member))
                return
        else:
            best = self.best_successor()
            if best is None:
                raise BadRequest("There is no other voter that could lead.")
            member = best
        standing = node.standings().get(member.id)
        if member.voter and (standing is None or standing.silent_s >= node.patience.dead_after_s):
            raise BadRequest(f"{member.name!r} does not answer, so it can't lead.")
        raft.transfer(member.id, self._node.now())
        self._transfers.append((node.id, slot))

    def best_successor(self) -> Member | None:
        """The living voter whose log is closest to the leader's."""
        raft = self._node.replica.raft
        standings = self._node.standings()
        alive = [
            m for m in raft.config.members
            if m.voter and m.id in standings and standings[m.id].silent_s < self._node.patience.dead_after_s
        ]  # fmt: skip
        return max(alive, key=lambda m: (raft.progress[m.id].match, m.name), default=None)

    def _peer(self, request: Request, slot: Slot) -> None:
        """Another node introduces itself (peers.py); from now on the connection is its."""
        node = self._node
        if type(slot) is not Slot:
            raise BadRequest("Nodes speak to one another in frames.")
        for field in ("id", "name", "address", "to"):
            if type(request.get(field)) is not str:
                raise BadRequest(f"A node introduces itself with the string {field!r}.")
        cluster = request.get("cluster")
        if cluster is not None and type(cluster) is not str:
            raise BadRequest("A node introduces itself with its `cluster`, null while it has none.")
        connection = slot.connection
        try:
            if request["to"] != node.id:
                raise BadRequest(f"This is node {node.name!r} with the id {node.id}, not the one you look for.")
            if None not in (node.cluster, cluster) and node.cluster != cluster:
                raise WrongCluster(f"Node {node.name!r} belongs to cluster {node.cluster}, not {cluster}.")
            raft = node.replica.raft
            if request["id"] in raft.config_at(raft.commit).removed:
                raise Forbidden("The node was removed from the cluster.")
            wire.parse_address(request["address"])
        except DdbError as error:
            slot.fail(error)
            connection.close_when_flushed()
            return
        if node.cluster is None and cluster is not None:
            node.adopt(cluster)
        node.peers.accept(connection, Sighting(request["id"], request["name"], request["address"]))

    def _named(self, request: Request, field: str) -> Member:
        """The member that `request[field]` names, by name or id."""
        name = request.get(field)
        if type(name) is not str or not name:
            raise BadRequest(f"`{field}` is the name or the id of a member.")
        members = self._node.replica.raft.config.members
        found = [m for m in members if m.id == name] or [m for m in members if m.name == name]
        if not found:
            known = ", ".join(sorted(m.name for m in members))
            raise BadRequest(f"No member is called {name[:60]!r}; the members are {known}.")
        if len(found) > 1:
            raise BadRequest(f"Several members are called {name[:60]!r}; give the id of one.")
        return found[0]

    # --- passing on ---------------------------------------------------------------------------------------------

    def _leader(self) -> Member | None:
        raft = self._node.replica.raft
        return raft.config.member(raft.leader) if raft.leader is not None else None

    def _new_leader(self, leader: Member) -> bytes:
        return wire.encode({"ok": True, "leader": leader.address, "name": leader.name})

    def _check_forward(self, request: Request) -> None:
        if request.get("forward") is False and not self._node.replica.is_leader:
            leader = self._leader()
            if leader is None:
                raise NoLeader("This node knows no leader now; try again.")
            raise NotLeader(f"The leader is {leader.name!r}; ask it.", leader=leader.address)

    def _at_leader(self, request: Request, slot: Slot, handle: Callable[[Request, Slot], None]) -> None:
        self._check_forward(request)
        if self._node.replica.is_leader:
            handle(request, slot)
        else:
            self._call(request, slot)

    def _call(self, request: Request, slot: Slot) -> None:
        leader = self._leader()
        if leader is None:
            raise NoLeader("This node knows no leader now; try again.")
        self._tickets += 1
        self._calls[self._tickets] = (leader.id, slot)
        request = {name: value for name, value in request.items() if name != "id"}
        self._node.peers.send(Call(self._node.id, leader.id, self._tickets, request))

    def on_call(self, m: Call) -> None:
        """A follower passes on a client's request."""
        slot = _CallSlot(self._node.peers, m)
        try:
            if m.request.get("op") not in FOR_THE_LEADER:
                raise BadRequest("This is nothing that members ask of each other.")
            self.request({**m.request, "forward": False}, slot)  # type: ignore[arg-type]
        except DdbError as error:
            slot.fail(error)

    def on_call_reply(self, m: CallReply) -> None:
        """The leader answers a request that was passed on to it."""
        call = self._calls.pop(m.ticket, None)
        if call is not None:
            leader = self._leader()
            extra = {"leader": leader.address} if leader is not None else {}
            call[1].reply(wire.encode({**extra, **m.reply} if m.reply.get("ok") else m.reply))


class _CallSlot:
    """The place of a request that another member passed on."""

    def __init__(self, peers: Peers, call: Call) -> None:
        self.deadline = 0.0
        self.done = False
        self.has_room = True  # the member that passed it on has it
        self._peers = peers
        self._call = call

    def reply(self, body: bytes) -> None:
        if not self.done:
            self.done = True
            m = self._call
            self._peers.send(CallReply(m.dst, m.src, m.ticket, wire.decode_trusted(body)))

    def fail(self, error: DdbError) -> None:
        self.reply(wire.failure(error))


def _unknown(op: Any) -> BadRequest:
    if type(op) is not str:
        return BadRequest('The request needs an `op`, a string like "get".')
    return BadRequest(f"There is no operation {op[:60]!r}; docs/protocol.md lists them.")


def _shown(member: Member) -> Request:
    role = "voter" if member.voter else "learner"
    return {"name": member.name, "id": member.id, "address": member.address, "role": role}


def _whole(request: Request, field: str, default: int, most: int) -> int:
    value = request.get(field, default)
    if type(value) is not int or not 0 <= value <= most:
        raise BadRequest(f"`{field}` is a whole number up to {most}.")
    return value
