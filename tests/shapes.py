"""The shapes in which a network breaks, each aimed at the leader: which directions go, and who should go on.

Laws: a shape is pure, and says for a cluster with `leader` and its `others` which ways are cut, and which nodes are
`well`: a majority that can still elect a leader and take writes. Where nobody can, `well` is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations

from tests.harness import NodeServer
from tests.netns import Way

Nodes = list[NodeServer]


@dataclass(frozen=True, slots=True)
class Cut:
    """The directions that are broken, and the nodes that should go on without them."""

    ways: list[Way]
    well: Nodes


Shape = Callable[[NodeServer, Nodes], Cut]


def _from(sources: Iterable[NodeServer], to: Iterable[NodeServer]) -> list[Way]:
    to = list(to)
    return [Way(src, dst) for src in sources for dst in to if src is not dst]


def _apart(some: Nodes, rest: Nodes) -> list[Way]:
    return _from(some, rest) + _from(rest, some)


def leader_alone(leader: NodeServer, others: Nodes) -> Cut:
    """Nothing passes between the leader and the others."""
    return Cut(_apart([leader], others), others)


def leader_unheard(leader: NodeServer, others: Nodes) -> Cut:
    """The leader hears, and can't be heard."""
    return Cut(_from([leader], others), others)


def leader_deaf(leader: NodeServer, others: Nodes) -> Cut:
    """The leader is heard, and hears nothing."""
    return Cut(_from(others, [leader]), others)


def follower_alone(leader: NodeServer, others: Nodes) -> Cut:
    """Nothing passes between a follower and the rest."""
    return Cut(_apart(others[:1], [leader, *others[1:]]), [leader, *others[1:]])


def follower_unheard(leader: NodeServer, others: Nodes) -> Cut:
    """A follower hears, and can't be heard."""
    return Cut(_from(others[:1], [leader, *others[1:]]), [leader, *others[1:]])


def follower_deaf(leader: NodeServer, others: Nodes) -> Cut:
    """A follower is heard, and hears nothing: it may ask for an election again and again."""
    return Cut(_from([leader, *others[1:]], others[:1]), [leader, *others[1:]])


def link_lost(leader: NodeServer, others: Nodes) -> Cut:
    """The leader and one follower don't reach each other; both reach everybody else."""
    return Cut(_apart([leader], others[:1]), [leader, *others[1:]])


def leader_in_minority(leader: NodeServer, others: Nodes) -> Cut:
    """The leader is on the side of the minority."""
    side = [leader, *others[: (len(others) - 1) // 2]]
    rest = [node for node in others if node not in side]
    return Cut(_apart(side, rest), rest)


def leader_in_majority(leader: NodeServer, others: Nodes) -> Cut:
    """The leader is on the side of the majority."""
    half = len(others) // 2
    return Cut(_apart([leader, *others[:half]], others[half:]), [leader, *others[:half]])


def bridge(leader: NodeServer, others: Nodes) -> Cut:
    """Two halves, and one node that reaches both; the leader is in one of the halves."""
    half = len(others) // 2
    left, middle, right = [leader, *others[: half - 1]], others[half - 1], others[half:]
    return Cut(_apart(left, right), [*left, middle])


def ring(leader: NodeServer, others: Nodes) -> Cut:
    """Each node reaches its two neighbours only."""
    circle = [leader, *others]
    size = len(circle)
    near = {(i, j) for i in range(size) for j in (i, (i + 1) % size, (i - 1) % size)}
    ways = [Way(a, b) for (i, a), (j, b) in permutations(enumerate(circle), 2) if (i, j) not in near]
    return Cut(ways, [circle[-1], leader, circle[1]])


def one_way_chain(leader: NodeServer, others: Nodes) -> Cut:
    """Each node is heard only by those after it: nobody can get an answer, so nobody can lead for long."""
    return Cut([Way(b, a) for i, a in enumerate([leader, *others]) for b in [leader, *others][i + 1 :]], [])


def nobody(leader: NodeServer, others: Nodes) -> Cut:
    """Nothing passes between any two."""
    return Cut(_from([leader, *others], [leader, *others]), [])


SHAPES: list[Shape] = [
    leader_alone,
    leader_unheard,
    leader_deaf,
    follower_alone,
    follower_unheard,
    follower_deaf,
    link_lost,
    leader_in_minority,
    leader_in_majority,
    bridge,
    ring,
    one_way_chain,
    nobody,
]
