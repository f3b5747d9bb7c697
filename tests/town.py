"""A town of replicas in one process: the production code from replica.py down to raft.py, on virtual time.

Messages pass through codec.py as they would on the wire and arrive in order, a millisecond later, unless a link is cut. Saves take
`save_s`. Nothing here is random but the seeded elections, so a test can say what happens when.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

from ddb import codec, wire
from ddb.commands import prepare, prepare_read
from ddb.config import Timing
from ddb.election import STRATEGIES
from ddb.errors import DdbError
from ddb.kv import Machine, MemoryTable
from ddb.messages import Batch, Configuration, HardState, Member, Message
from ddb.raft import Raft
from ddb.raftlog import RaftLog
from ddb.replica import Replica

WIRE_S = 0.001
TURN_S = 0.001


class Asked:
    """Somebody who waits for a reply, and keeps it."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.body: dict[str, object] | None = None

    @property
    def done(self) -> bool:
        return self.body is not None

    def reply(self, body: bytes) -> None:
        if self.body is None:
            self.body = wire.decode(body)

    def fail(self, error: DdbError) -> None:
        self.reply(wire.failure(error))


class SlowJournal:
    """A disk that needs `save_s` for each save, one after the other."""

    def __init__(self, town: Town, save_s: float) -> None:
        self.town = town
        self.save_s = save_s
        self.stuck = False
        self.saved = 0
        self.tickets = 0
        self.queue: deque[tuple[float, int]] = deque()
        self.data: dict[int, bytes] = {}

    def save(
        self,
        hard_state: HardState | None,
        batches: Sequence[Batch] = (),
        reset: tuple[int, int] | None = None,
        *,
        in_place: bool = False,
    ) -> int:
        self.tickets += 1
        self.data.update((batch.first, batch.data) for batch in batches)
        self.queue.append((self.town.now + self.save_s, self.tickets))
        return self.tickets


class Town:
    """`names` are the voters; each is its own id."""

    def __init__(self, names: str = "abc", save_s: float = 0.0005, election: str = "bully") -> None:
        self.now = 0.0
        self.cut: set[tuple[str, str]] = set()
        self.mail: deque[tuple[float, str, str, bytes]] = deque()
        self.journals: dict[str, SlowJournal] = {}
        self.replicas: dict[str, Replica] = {}
        config = Configuration("town", election, tuple(Member(n, n, f"{n}:1", True) for n in names))
        for number, name in enumerate(names):
            journal = self.journals[name] = SlowJournal(self, save_s)
            strategy = STRATEGIES[election](Timing().election_timeout_s, random.Random(number))
            log = RaftLog(journal.data.__getitem__)
            raft = Raft(name, name, log, HardState(), config, strategy, 0.0)
            machine = Machine(MemoryTable())
            self.replicas[name] = Replica(
                raft, machine, journal, self._post, journal.data.__getitem__, lambda: int(self.now * 1000)
            )
        for name in names:
            for other in names:
                if other != name:
                    self.replicas[name].connected(other)

    def _post(self, message: Message) -> None:
        if (message.src, message.dst) not in self.cut:
            self.mail.append((self.now + WIRE_S, message.src, message.dst, codec.encode_message(message)))

    def isolate(self, name: str) -> None:
        """Cut every link of `name`, silently: no connection breaks."""
        for other in self.replicas:
            self.cut |= {(name, other), (other, name)}

    def heal(self) -> None:
        self.cut.clear()

    def turn(self) -> None:
        """One millisecond passes."""
        self.now += TURN_S
        while self.mail and self.mail[0][0] <= self.now:
            _, src, dst, payload = self.mail.popleft()
            if (src, dst) not in self.cut:
                self.replicas[dst].step(codec.decode_message(payload, src, dst), self.now)
        for name, replica in self.replicas.items():
            journal = self.journals[name]
            while journal.queue and journal.queue[0][0] <= self.now and not journal.stuck:
                replica.saved(journal.queue.popleft()[1], self.now)
            replica.tick(self.now)
            replica.flush(self.now)

    def until(self, condition: Callable[[], object], within_s: float = 10.0) -> None:
        """Let time pass until `condition` holds; an AssertionError after `within_s` virtual seconds."""
        end = self.now + within_s
        while not condition():
            assert self.now < end, f"not within {within_s} s: {list(self.replicas.values())}"
            self.turn()

    def leader(self, other_than: str = "") -> str:
        """Wait until one member leads and all that can hear it agree; return its name. `other_than` is one that doesn't count."""

        def leaders() -> list[str]:
            found = [n for n, r in self.replicas.items() if n != other_than and r.raft.has_committed_in_term]
            hears = [n for n in self.replicas if found and (found[0], n) not in self.cut]
            return found if len(found) == 1 and all(self.replicas[n].raft.leader == found[0] for n in hears) else []

        self.until(leaders)
        return leaders()[0]

    def write(self, at: str, op: str = "put", timeout_s: float = 5.0, **fields: object) -> Asked:
        """Ask the member `at` to write; the reply comes as time passes."""
        asked = Asked(self.now + timeout_s)
        self.replicas[at].write(*prepare({"op": op, **fields}), asked)
        return asked

    def read(self, at: str, key: str, timeout_s: float = 5.0) -> Asked:
        """Ask the member `at` for a linearizable read."""
        asked = Asked(self.now + timeout_s)
        self.replicas[at].read(prepare_read({"op": "get", "key": key}), asked)
        return asked

    def answer(self, asked: Asked) -> dict[str, object]:
        """Wait for the reply."""
        self.until(lambda: asked.done)
        assert asked.body is not None
        return asked.body
