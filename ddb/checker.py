"""Whether a history is linearizable, and if not, where it stops being so.

Laws:

* "Linearizable" is never a guess: the order found is played through once more before it is said. Revisions that replies
  tell are hints where to look first, and then claims to be held to; they are never believed.
* "Not linearizable" is never a guess either: it is said when nothing is left to try. Where there is too much to try,
  the verdict is neither, and says so.

Theory. A history is linearizable if its operations can be put in one order, each somewhere between its call and its
return, in which every reply is right (Herlihy and Wing 1990). An operation of unknown outcome has no return: it may
stand anywhere after its call, or nowhere. Wing and Gong (1993) search for such an order by trying what may
come next (search.py). Linearizability is local, so each component of the keys (moves.py) is judged by itself.

A history that isn't linearizable has a smallest prefix that isn't. The operation whose return ends it is the *culprit*:
all that returned before can be explained, and with it no longer. That need not be the operation that a bug went wrong
in, but it is the first moment at which the clients could have known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ddb.errors import invariant
from ddb.history import Operation, Outcome, validate
from ddb.moves import Component, components, revisions_claimed
from ddb.revisions import Contradiction, contradictions
from ddb.search import CONFIGURATIONS_MAX, Search, explains, returned_at

ALONE_MAX: Final = 20_000  # for the question whether values alone can be explained


_Explanation = tuple[tuple[Operation, ...], Mapping[str, str | None]]
"""an order, and the values of the keys after it"""


@dataclass(frozen=True, slots=True)
class Counterexample:
    """The smallest prefix of a component's history that no order explains.

    `operations` are those called before `culprit` returned, by their calls, what had not returned then without its
    reply. `explained` is an order that explains all that returned before the culprit did, and `rows` are the values
    after it, as JSON texts (None: absent; empty: something that nobody saw).
    `values_alone` says whether the prefix is linearizable when the revisions and versions told are disregarded; None
    where that was not asked or is not known.
    """

    keys: tuple[str, ...]
    operations: tuple[Operation, ...]
    culprit: Operation
    explained: tuple[Operation, ...]
    rows: Mapping[str, str | None]
    values_alone: bool | None = None

    def __str__(self) -> str:
        keys = ", ".join(self.keys[:5]) + (", …" if len(self.keys) > 5 else "")
        shown = [f"{key} {'absent' if row is None else row or 'a value nobody saw'}" for key, row in self.rows.items()]
        text = (
            f"No order of the {len(self.operations)} operations on {keys} up to this one explains it: {self.culprit}. "
            f"What returned before can be explained, and may have left {', '.join(shown[:5]) or 'nothing'}."
        )
        return text + " (The values alone could be; revisions or versions can't.)" if self.values_alone else text


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. `linearizable` is None where the search was given up: `tried` configurations were not enough.

    `orders` are the orders found, one for each component (only where all have one). `contradictions` are revisions that
    refute themselves or the clock, whatever the order of the operations (revisions.py).
    """

    linearizable: bool | None
    judged: int
    tried: int
    orders: tuple[tuple[Operation, ...], ...] = ()
    counterexample: Counterexample | None = None
    contradictions: tuple[Contradiction, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the history is linearizable, and its revisions contradict nothing."""
        return self.linearizable is True and not self.contradictions

    def __str__(self) -> str:
        if self.linearizable is None:
            return f"Undecided: {self.judged} operations, and {self.tried} configurations were not enough."
        told = [str(self.counterexample)] if self.counterexample is not None else []
        told += map(str, self.contradictions[:3])
        head = "Linearizable" if self.linearizable else "Not linearizable"
        if self.linearizable and not self.ok:
            head += ", but for the revisions told"
        return f"{head}: {self.judged} operations. {' '.join(told)}".rstrip()


def check(
    history: Iterable[Operation], *, revisions: bool = True, configurations_max: int = CONFIGURATIONS_MAX
) -> Verdict:
    """Judge a history that began with no keys.

    What is known not to have happened, and reads that were stale or got no reply, are not judged. Without `revisions`,
    whatever was told of revisions and versions is disregarded. Raises BadHistory where an operation makes no sense.
    """
    operations = list(history)
    for operation in operations:
        validate(operation)
    found = contradictions(operations) if revisions else ()
    judged = tried = 0
    orders: list[tuple[Operation, ...]] = []
    refuted: list[_Shrinker] = []
    undecided = False
    for component in components(operations, revisions):
        search = Search(component, configurations_max)
        order = search.run()
        judged += len(component.moves)
        tried += search.tried
        if order is not None:
            orders.append(_operations(component, order))
        elif search.exhausted:
            refuted.append(_Shrinker(operations, search, revisions))
        else:
            undecided = True
    if refuted:
        worst = min((shrinker.counterexample() for shrinker in refuted), key=lambda found: returned_at(found.culprit))
        if revisions:
            limit = min(configurations_max, ALONE_MAX)
            alone = check(worst.operations, revisions=False, configurations_max=limit).linearizable
            worst = replace(worst, values_alone=alone)
        return Verdict(False, judged, tried, (), worst, found)
    return Verdict(None if undecided else True, judged, tried, () if undecided else tuple(orders), None, found)


def _operations(component: Component, order: Sequence[int]) -> tuple[Operation, ...]:
    invariant(explains(component, order), "an order that is found explains every reply")
    return tuple(component.moves[number].operation for number in order)


class _Shrinker:
    """Finds the smallest prefix of a history in which one component, known to be refuted as a whole, is refuted.

    A prefix ends with a return: what was called later is left out, and what had not returned is of unknown outcome. The
    search itself can't say which prefix it is, for it looks ahead: it may stop long before, where it sees that somebody
    will be told what is true no more.
    """

    def __init__(self, history: Sequence[Operation], search: Search, revisions: bool) -> None:
        self._history = history
        self._search = search
        self._revisions = revisions
        self._of_component = [move.operation for move in search.component.moves]
        self._returns = sorted((op for op in self._of_component if op.outcome is Outcome.DONE), key=returned_at)
        self._found: dict[int, _Explanation | None] = {}  # by rank
        self._ranks = {id(operation): rank for rank, operation in enumerate(self._returns)}

    def counterexample(self) -> Counterexample:
        """What is refuted first. The search's suspects are heard before anybody else: it is one of them, as a rule."""
        suspects = [self._ranks[id(operation)] for operation in self._search.suspects()]
        low, high = suspects[0], len(self._returns) - 1
        guesses = [guess for rank in sorted(suspects) for guess in (rank, rank - 1)]
        while low < high:
            guess = next((guess for guess in guesses if low <= guess < high), (low + high) // 2)
            if self._explained(guess) is None:
                high = guess
            else:
                low = guess + 1
        explained, rows = (self._explained(low - 1) if low else None) or ((), {})
        keys = sorted({key for part in self._parts(low) for key in part.keys})
        return Counterexample(tuple(keys), tuple(self._prefix(low)), self._returns[low], explained, rows)

    def _prefix(self, rank: int) -> list[Operation]:
        end = returned_at(self._returns[rank])
        prefix = []
        for operation in self._of_component:
            if operation.called <= end:
                known = self._ranks.get(id(operation), rank + 1) <= rank
                prefix.append(operation if known else replace(operation, returned=None, reply=None))
        return prefix

    def _parts(self, rank: int) -> list[Component]:
        end = returned_at(self._returns[rank])
        claimed = revisions_claimed(operation for operation in self._history if returned_at(operation) <= end)
        return components(self._prefix(rank), self._revisions, claimed)

    def _explained(self, rank: int) -> _Explanation | None:
        if rank not in self._found:
            self._found[rank] = self._explain(rank)
        return self._found[rank]

    def _explain(self, rank: int) -> _Explanation | None:
        """An order of the prefix that ends with the return of this rank, and the rows after it; None where it is
        refuted."""
        explained: tuple[Operation, ...] = ()
        rows: dict[str, str | None] = {}
        for part in self._parts(rank):
            search = Search(part, self._search.configurations_max)
            order = search.run()
            if order is None and search.exhausted:
                return None
            if order is not None:
                explained += _operations(part, order)
                rows.update(zip(part.keys, (row and row[0] for row in search.final[1]), strict=True))
        return explained, rows
