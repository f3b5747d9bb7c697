"""The search for an order that explains everything that the clients of some keys were told.

Laws:

* No recursion, and memory bounded by `configurations_max`.
* What is known beforehand, revisions above all, only says where to look first and where looking is in vain; it
  never decides that an order is right. That is `explains`, which plays it through.

Theory. Wing and Gong (1993) try whatever may come next, and go back when nothing may. Lowe (2017, "Testing for
linearizability") remembers the *configurations* met, which are a state and a set of operations done, so that none is
searched twice.

The search goes through the calls and returns in order of time and puts an operation in its place only when
something has to be: at a return whose operation is not done yet, everything that was called so far and is not done may
come first (Lowe's just-in-time linearization). Hence a configuration needs to know only which of the *open* operations
are done, one bit each. What keeps the search narrow loses no order, for each that it leaves out has an equal that it
keeps:

* What fits and leaves the state as it is, is done at once. That can hinder nothing.
* A *blind* write (it tells nothing, and nobody's state shows it) may always be put just before another that hides it.
  So the first is *free* from then on: it may return without having been done anywhere else.
* Nothing is put before a write that hides it, unless somebody saw it in between.
* Of unknown operations that ask for the same, the one called first is done first. And none is done but where nothing
  else will help, for all that it can do can be done later.
* An unknown write of whose value somebody told a revision did happen, there and nowhere else (moves.py).
* What has been overtaken is given up: a revision or version that somebody open was told, or a value that somebody, open
  or called later, has seen, if only one move can have written it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Final

from ddb.history import Operation, Outcome
from ddb.moves import Component, Move
from ddb.spec import State, Value

CONFIGURATIONS_MAX: Final = 500_000  # some 500 bytes each

_Path = tuple[Any, int, int] | None
"""the path before, the move, the event at which it was placed (or -1: hidden by a later one)"""


def explains(component: Component, order: Sequence[int]) -> bool:
    """Whether this `order` of moves holds all that are done, each once, respects their times, and makes each reply
    right."""
    placed = set(order)
    moves = component.moves
    if len(placed) != len(order):
        return False
    if not all(n in placed for n, move in enumerate(moves) if move.operation.outcome is Outcome.DONE):
        return False
    latest_call = float("-inf")
    states = {component.initial}
    for number in order:
        latest_call = max(latest_call, moves[number].operation.called)
        if returned_at(moves[number].operation) < latest_call:
            return False
        states = {after for state in states for after in component.successors(state, moves[number])}
        if not states:
            return False
    return True


def returned_at(operation: Operation) -> float:
    """When an operation had its reply; infinity where it had none."""
    if operation.returned is None or operation.outcome is not Outcome.DONE:
        return float("inf")
    return operation.returned


@dataclass(frozen=True, slots=True)
class _Configuration:
    """A place in the search: about to deal with the event numbered `event`, in `state`, with the open operations of
    the bits `done` done, those of `free` free to return undone, and the unknown ones of `used` done. `unseen` is the
    move done last, with the state before it, if nobody has seen it yet."""

    event: int
    state: State
    done: int
    free: int
    used: int
    path: _Path
    unseen: tuple[int, State] | None


class Search:
    """The search for an order of one component's moves; `run` it once.

    `tried` is how many configurations it took. Where `run` found no order, `exhausted` says that there is none; else
    `final` is the state after it.
    """

    def __init__(self, component: Component, configurations_max: int) -> None:
        self.component = component
        self._moves = component.moves
        self.configurations_max = configurations_max
        self.tried = 0
        self._bits: list[int] = []  # of each move: among the open (later ones use it again), or among the unknown
        self._events: list[int] = []  # a move's number: its call; its complement: its return
        self._called_at: list[int] = []  # of each move, the event
        self._open: dict[int, list[int]] = {}  # at each return, the moves open that will return
        self._unknown: list[int] = []  # by their calls
        self._alike: list[int] = []  # of each move, the number of the class of unknown moves that ask for the same
        self._last_wanted: dict[Value, int] = {}  # of a value that comes but once, the move called last that saw it
        self._lowest_after: list[tuple[float, int]] = []  # at each event, a revision and the move that was told it
        self._furthest = 0  # event at which anything was tried
        self._blamed: set[int] = set()  # the moves called after it that stood in the way of something there
        self.exhausted = False  # nothing is left to try
        self.final = component.initial  # the state after the order found
        self._lay_out()
        self._note_wants()
        self._note_floors()

    # Time

    def _lay_out(self) -> None:
        """Order the events, and give each move its bit. Where times are equal calls come first: they are concurrent."""
        times: list[tuple[float, bool, int]] = []
        for number, move in enumerate(self._moves):
            times.append((move.operation.called, False, number))
            if move.told is not None:
                times.append((returned_at(move.operation), True, number))
        times.sort()
        self._bits = [0] * len(self._moves)
        self._called_at = [0] * len(self._moves)
        self._alike = [-1] * len(self._moves)
        classes: dict[Any, int] = {}
        spare: list[int] = []
        now_open: dict[int, None] = {}
        for time, (_, is_return, number) in enumerate(times):
            if is_return:
                self._open[time] = list(now_open)
                del now_open[number]
                heappush(spare, self._bits[number].bit_length() - 1)
                self._events.append(~number)
                continue
            self._called_at[number] = time
            self._events.append(number)
            if self._moves[number].told is None:
                self._alike[number] = classes.setdefault(self._moves[number].command, len(classes))
                self._bits[number] = 1 << len(self._unknown)
                self._unknown.append(number)
            else:
                place = heappop(spare) if spare else len(now_open)
                self._bits[number] = 1 << place
                now_open[number] = None

    def _note_wants(self) -> None:
        """Note until when each value that only one move can have written must stay."""
        for number, move in enumerate(self._moves):
            self._last_wanted.update((value, number) for value in move.wants if value in self.component.once)

    def _note_floors(self) -> None:
        """Note at each event the lowest revision at which somebody called later wrote, or read all: the log can't have
        got further."""
        lowest: tuple[float, int] = (float("inf"), -1)
        for number in reversed(self._events):
            self._lowest_after.append(lowest)
            if number >= 0:
                move = self._moves[number]
                rev = move.rev if move.rev is not None else move.read_rev
                if rev is not None:
                    lowest = min(lowest, (rev, number))
        self._lowest_after.reverse()

    # The search

    def run(self) -> list[int] | None:
        """An order that explains everything, as numbers of moves; None where there is none or `tried` is at its
        limit."""
        met: dict[tuple[int, State, int, int], list[int]] = {}
        ahead: list[Iterator[_Configuration]] = [iter([_Configuration(0, self.component.initial, 0, 0, 0, None, None)])]
        while ahead:
            configuration = next(ahead[-1], None)
            if configuration is None:
                ahead.pop()
                continue
            configuration = self._advance(configuration)
            if configuration.event == len(self._events):
                self.final = configuration.state
                return self._order(configuration.path)
            key = (configuration.event, configuration.state, configuration.done, configuration.free)
            before = met.setdefault(key, [])
            if any(used & configuration.used == used for used in before):
                continue  # whoever has used less can do whatever this one can
            if configuration.event > self._furthest:
                self._furthest = configuration.event
                self._blamed.clear()
            if self.tried >= self.configurations_max:
                return None
            self.tried += 1
            before.append(configuration.used)
            ahead.append(self._branches(configuration))
        self.exhausted = True
        return None

    def _advance(self, at: _Configuration) -> _Configuration:
        """Go on to the next return whose operation is not done, or to the end."""
        moves, bits, events, successors = self._moves, self._bits, self._events, self.component.successors
        state, done, free, path = at.state, at.done, at.free, at.path
        for event in range(at.event, len(events)):
            number = events[event]
            if number >= 0:
                move = moves[number]
                if move.steady and self._may(state, move) and successors(state, move):
                    done |= bits[number]
                    path = (path, number, event)
            elif done & bits[~number]:
                done &= ~bits[~number]
            else:
                unseen = at.unseen if event == at.event else None
                return _Configuration(event, state, done, free, at.used, path, unseen)
        return _Configuration(len(events), state, done, free, at.used, path, None)

    def _branches(self, at: _Configuration) -> Iterator[_Configuration]:
        """What may be tried at a return whose operation is not done, the most promising first."""
        due = ~self._events[at.event]
        if at.free & self._bits[due] and self._last_wanted.keys().isdisjoint(self._moves[due].gives):
            path = (at.path, due, -1)
            yield _Configuration(at.event + 1, at.state, at.done, at.free & ~self._bits[due], at.used, path, None)
        waiting = [number for number in self._open[at.event] if not at.done & self._bits[number]]
        called = [n for n in self._unknown if self._called_at[n] < at.event and not at.used & self._bits[n]]
        known = waiting + [number for number in called if self._moves[number].rev is not None]
        for number in sorted(known, key=lambda number: self._promise(number, due)):
            yield from self._place(at, number, known)
        # Other unknown ones come last, and are not even looked at unless all else has failed: there may be many.
        firsts: dict[int, int] = {}
        for number in called:
            if self._moves[number].rev is None:
                firsts.setdefault(self._alike[number], number)
        for number in sorted(firsts.values(), key=lambda number: self._promise(number, due)):
            for after in self._place(at, number, known):
                if not self._goes_astray(after.state, due, known, len(called)):
                    yield after

    def _goes_astray(self, state: State, due: int, next_ones: list[int], unused: int) -> bool:
        """Whether the versions say that the unknown move, which has led to `state`, was in vain: none of the
        `next_ones` can come next; or all together can't bring about what is due."""
        if not self.component.versions or len(state[1]) != 1:
            return False
        version = self._version(state, 0)
        versions = [self._moves[number].version for number in next_ones]
        if all(wanted is not None and wanted[1] < version for wanted in versions):
            return True
        wanted = self._moves[due].version
        growth = (len(next_ones) + unused) * self.component.growth_max
        return wanted is not None and wanted[1] > version + growth

    def _promise(self, number: int, due: int) -> tuple[int, float]:
        """A sort key: what should be tried before what, when the move `due` has to be placed."""
        move, goal = self._moves[number], self._moves[due]
        if number == due:
            return 1, 0
        if move.hint is not None and goal.hint is not None:
            return (0 if move.hint < goal.hint else 4), move.hint
        if not set(goal.wants).isdisjoint(move.gives):
            return 2, number
        return 3, number

    def _place(self, at: _Configuration, number: int, waiting: list[int]) -> Iterator[_Configuration]:
        """Do a move at this point: the configurations that follow, none where it can't be or is in vain."""
        move = self._moves[number]
        if not self._may(at.state, move):
            return
        for state in self.component.successors(at.state, move):
            if move.told is None and state[1] == at.state[1]:
                continue
            if at.unseen is not None and self._hides(move, state, at.unseen):
                continue
            after = self._settle(at, number, state, waiting)
            if after is not None:
                yield after

    def _may(self, state: State, move: Move) -> bool:
        """Whether the move has a chance in `state`: what can be told at a glance."""
        if move.rev is not None and move.rev <= state[0]:
            return False
        if move.version is not None and move.version[1] != self._version(state, move.version[0]):
            return False
        return all(self._has(state, value) for value in move.wants)

    def _hides(self, move: Move, state: State, unseen: tuple[int, State]) -> bool:
        """Whether the move, which has led to `state`, makes what was done right before it vain."""
        earlier = self._moves[unseen[0]]
        if earlier.told is None:
            without = self.component.successors(unseen[1], move)
            return any(rows == state[1] and last <= state[0] for last, rows in without)
        return move.blind and earlier.command.writes <= move.command.writes

    def _settle(self, at: _Configuration, number: int, state: State, waiting: list[int]) -> _Configuration | None:
        """What follows when the move has led to `state`: done at once is who fits there; None where one who waits can
        never be done any more."""
        moves, bits, successors = self._moves, self._bits, self.component.successors
        move = moves[number]
        lowest, told = self._lowest_after[at.event]
        if state[0] > lowest:
            self._blame(at.event, told)
            return None
        done, free, used = at.done, at.free, at.used
        if move.told is None:
            used |= bits[number]
        else:
            done |= bits[number]
            free &= ~bits[number]
        path: _Path = (at.path, number, at.event)
        seen, deletes = False, self.component.deletes
        overtaken = self._overtaken(at, state, move)
        if overtaken is None:
            return None
        for other in waiting:
            if other == number:
                continue
            one = moves[other]
            if one.rev is not None and one.rev <= state[0]:
                return None
            if one.version is not None and one.version[1] < self._version(state, one.version[0]) and not deletes:
                return None
            if overtaken and not overtaken.isdisjoint(one.wants):
                return None
            if one.steady and self._may(state, one) and successors(state, one):
                done |= bits[other]
                free &= ~bits[other]
                path = (path, other, at.event)
                seen = True
            elif move.blind and one.blind and one.command.writes <= move.command.writes:
                free |= bits[other]
        unseen = (number, at.state) if not seen and (move.blind or move.told is None) else None
        return _Configuration(at.event, state, done, free, used, path, unseen)

    def _overtaken(self, at: _Configuration, state: State, move: Move) -> set[Value] | None:
        """The values that are gone for good in `state`; None where somebody who is called later has seen one of
        them."""
        gone = set()
        for position in move.command.writes:
            before, after = at.state[1][position], state[1][position]
            value = (position, None if before is None else before[0])
            if value[1] == (None if after is None else after[0]) or value not in self._last_wanted:
                continue
            if self._called_at[self._last_wanted[value]] > at.event:
                self._blame(at.event, self._last_wanted[value])
                return None
            gone.add(value)
        return gone

    def _blame(self, event: int, number: int) -> None:
        if event == self._furthest:
            self._blamed.add(number)

    def suspects(self) -> list[Operation]:
        """Whose return may be what can't be explained, once the search has come to nothing: the one due where the
        search got furthest, before whom all can be explained, and those who stood in the way there."""
        numbers = [~self._events[self._furthest], *sorted(self._blamed)]
        return [self.component.moves[number].operation for number in numbers if self._moves[number].told is not None]

    def _has(self, state: State, wanted: Value) -> bool:
        row = state[1][wanted[0]]
        return (None if row is None else row[0]) == wanted[1]

    def _version(self, state: State, position: int) -> int:
        row = state[1][position]
        return 0 if row is None else row[3] or 0

    # What came of it

    def _order(self, path: _Path) -> list[int]:
        """The moves of a path, in order. One that was hidden stands right before the last move that hides it."""
        backwards: list[tuple[int, int]] = []
        hidden: list[int] = []
        while path is not None:
            path, number, event = path
            if event < 0:
                hidden.append(number)
                continue
            backwards.append((number, event))
            for other in [h for h in hidden if self._may_hide(number, event, h)]:
                backwards.append((other, event))
                hidden.remove(other)
        return [number for number, _ in reversed(backwards)]

    def _may_hide(self, number: int, event: int, hidden: int) -> bool:
        move, other = self._moves[number], self._moves[hidden]
        return move.blind and other.command.writes <= move.command.writes and self._called_at[hidden] <= event
