"""Who stands for leader, and when: the bully's election and Raft's own, behind one interface.

Law: nothing here makes a leader. A strategy only decides when its member asks the others ("may I stand?",
which changes no term and no vote, so it is Raft's PreVote, dissertation §9.6), what it answers when asked, and
when it stands. A leader is made by Raft's vote alone (raft.py).

**Bully** (García-Molina 1982, as ddb 2.1.0 had it): every member has a *rank*; who hears no leader asks all
the others; whoever outranks the asker answers `alive` and holds an election of its own; who gets no `alive`
takes over. Three things make it safe and keep it from blocking:

* the rank is (last log term, last log index, name): the order in which Raft's voters judge candidates, with the
  name as the last word. A returning highest name with an old log neither wins nor is waited for;
* the winner must still win a majority's votes;
* who was beaten waits for the victor only so long, and defers to it no more; who stood and did not win stands aside
  for a round and lets the lower ones go ahead. So a highest rank that can be pinged but can't win (one-way links)
  blocks nobody. The waits are drawn by lot, or those who waited for the same one would wake, stand and fail together.

**Raft** (§5.2, §9.3): whoever's randomised time-out ends first asks, and stands when a majority agrees.

Both are told of the time and given their chance (`rng`), so a seed replays them.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

Rank = tuple[int, int, str, str]
"""(last log term, last log index, name, id): the bully's order. Its first two are Raft's "up-to-date" (§5.4.1)."""


class Move(enum.Enum):
    """What a strategy wants its member to do now."""

    ASK = "ask"  # send every other voter an ElectionRequest with a new `ask` number
    STAND = "stand"  # become a candidate in the next term


class Answer(enum.Enum):
    """What a member says to "may I stand?"."""

    LEADER = "leader"
    ALIVE = "alive"
    YIELD = "yield"


@dataclass(frozen=True, slots=True)
class View:
    """What a strategy may know of its member and of the others.

    `reachable`: the voters to whom a connection stands. `hears_leader`: a leader spoke within the time-out.
    `may_stand`: this member may lead; learners, strangers and whoever can't serve just answer.
    """

    id: str
    rank: Rank
    voters: tuple[str, ...]
    reachable: frozenset[str]
    hears_leader: bool
    may_stand: bool = True

    def is_quorum(self, ids: set[str]) -> bool:
        """Whether the voters among `ids` are a majority."""
        return 2 * len(ids.intersection(self.voters)) > len(self.voters)


class Election(Protocol):
    """A strategy. Times are seconds of one steady clock; each method may be called at any moment."""

    @property
    def name(self) -> str:
        """What `--election` calls it."""

    @property
    def due_s(self) -> float:
        """Before this moment, `tick` has nothing to say."""

    def follow(self, now: float) -> None:
        """A leader was heard, or voted for itself here: stay calm for a full time-out."""

    def suspect(self, now: float) -> None:
        """The connection to the leader broke: don't wait for the time-out."""

    def tick(self, now: float, view: View) -> Move | None:
        """Time has passed."""

    def asked(self, now: float, view: View, rank: Rank) -> Answer:
        """Another member of `rank` asks whether it may stand."""

    def answered(self, now: float, view: View, src: str, answer: Answer) -> Move | None:
        """`src` answered our latest question."""

    def voted(self, now: float, candidate: str) -> None:
        """This member gave its vote to `candidate`: give it time to win."""

    def lost(self, now: float) -> None:
        """This member's candidacy failed."""


class _Phase(enum.Enum):
    CALM = "calm"  # following, or waiting to ask
    ASKING = "asking"  # answers are coming in
    WAITING = "waiting"  # for another's victory
    STANDING = "standing"  # for Raft's vote
    ASIDE = "aside"  # lost: the others go first for one round


class Bully:
    """The bully election. `timeout_s`: how long a silent leader is trusted."""

    name: Final = "bully"

    def __init__(self, timeout_s: float, rng: random.Random) -> None:
        self._timeout_s = timeout_s
        self._rng = rng
        self._phase = _Phase.CALM
        self._deadline = 0.0
        self._answers: dict[str, Answer] = {}
        self._awaited: set[str] = set()  # whose victory is being waited for
        self._failed: set[str] = set()  # whose was waited for in vain: their `alive` no longer stops us

    @property
    def due_s(self) -> float:
        """See Election."""
        return self._deadline

    def follow(self, now: float) -> None:
        """See Election."""
        self._failed.clear()
        # A tenth of jitter: two members whose clocks run alike should not always ask in the same instant.
        self._enter(_Phase.CALM, now + self._timeout_s * (1.0 + 0.1 * self._rng.random()))

    def suspect(self, now: float) -> None:
        """See Election."""
        if self._phase is _Phase.CALM:
            self._deadline = now

    def tick(self, now: float, view: View) -> Move | None:
        """See Election."""
        if now < self._deadline or not view.may_stand:
            return None
        if self._phase is _Phase.ASKING:
            return self._decide(now, view, time_is_up=True)
        if self._phase is _Phase.STANDING:
            self.lost(now)
            return None
        if self._phase is _Phase.WAITING:
            self._failed |= self._awaited
        self._enter(_Phase.ASKING, now + self._timeout_s / 5)
        self._answers = {view.id: Answer.YIELD}
        return self._decide(now, view, time_is_up=False) or Move.ASK

    def asked(self, now: float, view: View, rank: Rank) -> Answer:
        """See Election."""
        if view.hears_leader:
            return Answer.LEADER
        if view.may_stand and view.rank > rank and self._phase is not _Phase.ASIDE:
            if self._phase is _Phase.CALM:
                self._deadline = now  # the bully's rule: who outranks the asker holds its own election
            return Answer.ALIVE
        if self._phase in (_Phase.CALM, _Phase.ASKING) and rank[3] not in self._failed:
            self._await(now, {rank[3]})
        return Answer.YIELD

    def answered(self, now: float, view: View, src: str, answer: Answer) -> Move | None:
        """See Election."""
        if self._phase is not _Phase.ASKING:
            return None
        self._answers[src] = answer
        return self._decide(now, view, time_is_up=False)

    def voted(self, now: float, candidate: str) -> None:
        """See Election."""
        self._await(now, {candidate})

    def lost(self, now: float) -> None:
        """See Election."""
        self._enter(_Phase.ASIDE, now + self._timeout_s * (0.5 + 0.5 * self._rng.random()))

    def _decide(self, now: float, view: View, time_is_up: bool) -> Move | None:
        answers = self._answers
        if Answer.LEADER in answers.values():
            # Our link to the leader is down, not the leader. Asking again soon costs nobody anything.
            self._enter(_Phase.CALM, now + self._timeout_s / 8)
            return None
        if higher := {id for id, answer in answers.items() if answer is Answer.ALIVE} - self._failed:
            self._await(now, higher)
            return None
        everybody = view.reachable.intersection(view.voters) <= answers.keys()
        if view.is_quorum(set(answers)) and (everybody or time_is_up):
            self._enter(_Phase.STANDING, now + self._timeout_s)
            return Move.STAND
        if time_is_up:
            self._enter(_Phase.CALM, now + self._timeout_s * (0.1 + 0.2 * self._rng.random()))
        return None

    def _await(self, now: float, victors: set[str]) -> None:
        self._awaited = victors
        self._enter(_Phase.WAITING, now + self._timeout_s * (0.5 + 0.5 * self._rng.random()))

    def _enter(self, phase: _Phase, deadline: float) -> None:
        self._phase = phase
        self._deadline = deadline


class Randomised:
    """Raft's own election with PreVote. `timeout_s`: the shortest time-out; each is drawn from [1, 2) of it."""

    name: Final = "raft"

    def __init__(self, timeout_s: float, rng: random.Random) -> None:
        self._timeout_s = timeout_s
        self._rng = rng
        self._deadline = 0.0
        self._asking = False
        self._answers: dict[str, Answer] = {}

    @property
    def due_s(self) -> float:
        """See Election."""
        return self._deadline

    def follow(self, now: float) -> None:
        """See Election."""
        self._asking = False
        self._deadline = now + self._timeout_s * (1.0 + self._rng.random())

    def suspect(self, now: float) -> None:
        """See Election."""
        if not self._asking:  # drawn, too: those who lost the same leader should not all ask at once
            self._deadline = min(self._deadline, now + self._timeout_s / 10 * self._rng.random())

    def tick(self, now: float, view: View) -> Move | None:
        """See Election."""
        if now < self._deadline or not view.may_stand:
            return None
        self._asking = True
        self._deadline = now + self._timeout_s / 4 * (1.0 + self._rng.random())
        self._answers = {view.id: Answer.YIELD}
        return self._decide(now, view) or Move.ASK

    def asked(self, now: float, view: View, rank: Rank) -> Answer:
        """See Election."""
        if view.hears_leader:
            return Answer.LEADER
        return Answer.ALIVE if view.rank[:2] > rank[:2] else Answer.YIELD

    def answered(self, now: float, view: View, src: str, answer: Answer) -> Move | None:
        """See Election."""
        if not self._asking:
            return None
        self._answers[src] = answer
        return self._decide(now, view)

    def voted(self, now: float, candidate: str) -> None:
        """See Election."""
        self.follow(now)

    def lost(self, now: float) -> None:
        """See Election."""
        # Votes were split. Asking changes no term, so the next lot may be drawn from a shorter time.
        self._deadline = now + self._timeout_s / 2 * self._rng.random()

    def _decide(self, now: float, view: View) -> Move | None:
        if not view.is_quorum({id for id, answer in self._answers.items() if answer is Answer.YIELD}):
            return None
        self._asking = False
        self._deadline = now + self._timeout_s / 2 * (1.0 + self._rng.random())
        return Move.STAND


STRATEGIES: Final[dict[str, Callable[[float, random.Random], Election]]] = {"bully": Bully, "raft": Randomised}
"""By the name that `--election` and the cluster's first configuration give."""
