"""Who is there, and who may found the cluster: the registry's decisions, without its process.

Laws:

* At most one cluster is ever founded with one memory. A grant is written down before it is told.
* The roster only says where nodes are. It elects nobody, and nothing breaks where it forgets.
* A node that is silent for the ttl is forgotten here. It stays what it is in its cluster.

Theory. What must survive is one small value, `Memory`: the cluster's id, who was granted it, and whether a node of
it has ever been seen. Everything else is told again by the nodes within a third of the ttl. Three cases decide how
`bootstrap` answers:

1. *The reply was lost.* The node granted asks again under the same id, and gets the same answer, until a node of the
   cluster has been seen. From then on nobody does: one that asks has lost its data, and its like is a new member.
2. *The memory was lost* (a wiped disk). Nodes of the cluster knock five times a second, so a roster without a
   memory first listens for a moment, `grace_s`, and learns the cluster from whoever names one.
3. *The founder was lost*, between the grant and its first word as a member. The grant does **not** move to another:
   a founder that is merely stopped would found its cluster when it goes on, beside the second one. No time-out tells
   the two apart, so a person must (`stuck` says when), by removing the memory once the founder is surely gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from ddb.errors import BadRequest, DdbError, Overloaded, WrongCluster
from ddb.wire import parse_address

NAME_CHARACTERS_MAX: Final = 128
NODES_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Memory:
    """What the registry must never forget. `seen`: a node of the cluster has registered."""

    cluster: str | None = None
    founder: str | None = None
    seen: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """One registered node; `heard_s` is when it last spoke, by the caller's steady clock."""

    id: str
    name: str
    address: str
    cluster: str | None
    heard_s: float

    def to_json(self, now_s: float) -> dict[str, Any]:
        """As `nodes` lists it; `age` is in seconds."""
        age_s = round(max(0.0, now_s - self.heard_s), 3)
        return {"id": self.id, "name": self.name, "address": self.address, "age": age_s}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to `bootstrap`. `waiting` counts the registered nodes without a cluster. `founders`, where more than
    one was expected, are the members to begin with."""

    granted: bool
    waiting: int
    founders: tuple[Node, ...] = ()


class Roster:
    """The nodes that are there. `memory` changes; the caller makes it durable before it answers.

    `memory` is None where none was found: then nothing is granted until `now_s` is `grace_s` later.
    """

    def __init__(self, memory: Memory | None, now_s: float, ttl_s: float = 3.0, grace_s: float = 0.75) -> None:
        self.memory = memory or Memory()
        self.ttl_s = ttl_s
        self._nodes: dict[str, Node] = {}
        self._listens_until_s = now_s + grace_s if memory is None else now_s

    def __repr__(self) -> str:
        return f"cluster {self.memory.cluster}, {len(self._nodes)} nodes"

    @property
    def nodes(self) -> list[Node]:
        """All registered nodes, by id."""
        return [self._nodes[id] for id in sorted(self._nodes)]

    def listening(self, now_s: float) -> bool:
        """Whether it is too early to believe that no cluster exists."""
        return now_s < self._listens_until_s

    def register(self, request: dict[str, Any], now_s: float) -> tuple[Node, bool]:
        """Take in or refresh the node that `request` describes; returns it, and whether it is new or has moved.

        Raises BadRequest for a field that does not fit, WrongCluster for a node of another cluster than the one
        known, Overloaded when the roster is full.
        """
        node = Node(
            _word(request, "id"), _word(request, "name"), _address(request), _cluster(request.get("cluster")), now_s
        )
        known = self._nodes.get(node.id)
        if known is None and len(self._nodes) >= NODES_MAX:
            raise Overloaded(f"{NODES_MAX} nodes are registered here, and no more are taken.")
        if node.cluster is not None:
            self._meet(node.cluster)
        self._nodes[node.id] = node
        return node, known is None or known.address != node.address

    def _meet(self, cluster: str) -> None:
        """A node of `cluster` has spoken."""
        if self.memory.cluster is None:
            self.memory = Memory(cluster, None, True)
        elif self.memory.cluster != cluster:
            raise WrongCluster(
                f"This registry serves the cluster {self.memory.cluster}, not {cluster}; "
                "give the node its own registry, or start it with an empty data directory to join."
            )
        elif not self.memory.seen:
            self.memory = replace(self.memory, seen=True)

    def unregister(self, id: str) -> Node | None:
        """Forget the node `id`, which leaves; returns it, or None where it is not known."""
        return self._nodes.pop(id, None)

    def expire(self, now_s: float) -> list[Node]:
        """Forget the nodes that have been silent for the ttl; returns them."""
        gone = [node for node in self.nodes if now_s - node.heard_s >= self.ttl_s]
        for node in gone:
            del self._nodes[node.id]
        return gone

    def bootstrap(self, request: dict[str, Any], now_s: float) -> Verdict:
        """Decide whether the asking node may found the cluster that it proposes. Raises BadRequest.

        With `expect` above 1 it may once that many nodes without a cluster are registered, itself among them.
        """
        id, proposed, expect = _word(request, "id"), _word(request, "cluster"), request.get("expect", 1)
        if type(expect) is not int or not 1 <= expect <= NODES_MAX:
            raise BadRequest(f"`expect` must be a whole number from 1 to {NODES_MAX}.")
        founders = tuple(node for node in self.nodes if node.cluster is None)
        refused = Verdict(False, len(founders))
        if self.memory.cluster is None:
            if self.listening(now_s):
                return refused
            if expect > 1 and (len(founders) < expect or id not in self._nodes):
                return refused
            self.memory = Memory(proposed, id)
        elif self.memory.seen or self.memory.founder != id:
            return refused
        return Verdict(True, len(founders), founders if expect > 1 else ())

    @property
    def stuck(self) -> bool:
        """Whether a founder was chosen, no node of its cluster was ever seen, and it is not here now."""
        memory = self.memory
        return memory.cluster is not None and not memory.seen and memory.founder not in self._nodes


def listed(nodes: Iterable[Node], now_s: float) -> list[dict[str, Any]]:
    """`nodes` as replies show them."""
    return [node.to_json(now_s) for node in nodes]


def _word(request: dict[str, Any], field: str) -> str:
    value = request.get(field)
    if type(value) is not str or not 1 <= len(value) <= NAME_CHARACTERS_MAX or not value.isprintable():
        raise BadRequest(f"`{field}` must be a string of 1 to {NAME_CHARACTERS_MAX} printable characters.")
    return value


def _cluster(value: Any) -> str | None:
    return None if value is None else _word({"cluster": value}, "cluster")


def _address(request: dict[str, Any]) -> str:
    address = request.get("address")
    try:
        if type(address) is not str or len(address) > 300 or parse_address(address)[1] == 0:
            raise BadRequest("no address")
    except DdbError:
        raise BadRequest("`address` must be the HOST:PORT at which the node can be reached.") from None
    return address
