"""The watchers of a node: each change told once, in order, and only while it is taken.

Laws:

* A watcher is told every change it wants behind its first revision, in the order of the log, none twice and none left out;
  or it is told that this can't go on, and its connection ends. There is nothing in between.
* A watcher holds a place in the chronicle, not a queue. What it has not taken is kept for nobody.
* A progress event is never ahead of the events before it.

Theory. A watcher is *live* while it has been told all that was applied. At the end of each turn, the pages that came in it
are handed round: each change is looked up in the index (watches.py) and encoded if somebody wants it, once for all. Who has
no room for more stops being live, and remembers up to which revision it was told everything. When there is room again, it is
read to from the chronicle, a little in each turn, until it has caught up, and is live again. One that asks for the past
begins so. It stays in the index meanwhile, for what it falls behind by is counted: over `BEHIND_BYTES_MAX`, or where
the chronicle has moved on without it, it is dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ddb import wire
from ddb.chronicle import Chronicle, Page, event
from ddb.errors import Compacted, DdbError, NoLeader, Overloaded, ShuttingDown
from ddb.past import Wanted, prepare_watch
from ddb.replica import Replica
from ddb.slots import Slot
from ddb.streams import STREAM_BYTES_MAX, Event, Stream
from ddb.watches import Watches

log = logging.getLogger(__name__)

BEHIND_BYTES_MAX: Final = 8 << 20
RECORDS_A_TURN: Final = 2000  # of the chronicle, looked at for one watcher
PROGRESS_S: Final = 3.4  # between two signs of life: with what ROUND_TICKS take, below the 5 s that are promised
ROUND_TICKS: Final = 50  # after which each watcher whose turn it is has had it, so that they don't all come at once
NOTHING: Final = ["count", {"start": "", "end": ""}]  # a read that only waits for its turn


class Watcher:
    """One of them. `seen`: all it wants up to that revision, it has been told, or does not want."""

    __slots__ = ("behind_bytes", "due_s", "gone", "live", "seen", "stream", "wanted")

    def __init__(self, stream: Stream, wanted: Wanted, seen: int) -> None:
        self.stream = stream
        self.wanted = wanted
        self.seen = seen
        self.live = False
        self.gone = False
        self.behind_bytes = 0  # of events that came while it was not live, less what it was told since
        self.due_s = 0.0  # when it is to hear something

    def __repr__(self) -> str:
        kind = "prefix" if self.wanted.is_prefix else "key"
        return f"watcher of {kind} {self.wanted.name!r} at {self.seen}"


class Watching:
    """All watchers of one node. `now` is its steady clock."""

    def __init__(self, replica: Replica, chronicle: Chronicle, now: Callable[[], float]) -> None:
        self._replica = replica
        self._chronicle = chronicle
        self._now = now
        self._watches: Watches[Watcher] = Watches()
        self._round: deque[Watcher] = deque()  # by due_s
        self._pages: list[Page] = []  # applied, and not handed round yet
        self._leaving = False
        chronicle.on_reset = self._on_reset

    def __repr__(self) -> str:
        return f"{len(self._round)} watchers"

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(not watcher.gone for watcher in self._round)

    # --- beginning and ending -----------------------------------------------------------------------------------

    def watch(self, request: dict[str, Any], slot: Slot) -> None:
        """Begin a watch. Raises what is wrong with it; what can't be known yet is told to `slot`."""
        wanted = prepare_watch(request)
        if wanted.first is None:
            self._replica.read(NOTHING, _Confirmed(slot, lambda: self._begin(wanted, slot)))
        else:
            self._begin(wanted, slot)

    def _begin(self, wanted: Wanted, slot: Slot) -> None:
        """From here on: everything acknowledged before is behind us, everything else before us."""
        if self._leaving:
            raise ShuttingDown("This node is leaving; watch at another.")
        if self._replica.diverged:
            raise NoLeader("This node's data is being replaced by the leader's; watch at another.")
        seen = self._applied if wanted.first is None else max(wanted.first, 1) - 1
        if seen < self._chronicle.floor:
            raise self._chronicle.compacted()
        if slot.done or slot.connection.sock is None:
            return
        watcher = Watcher(slot.open(b'{"ok":true,"watch":true,"rev":%d}' % seen, seen), wanted, seen)
        stream = watcher.stream
        stream.on_room = lambda: self._catch_up(watcher)
        slot.connection.on_close = lambda: self._forget(watcher)
        self._watches.add(watcher, wanted.name, prefix=wanted.is_prefix)
        watcher.due_s = self._now() + PROGRESS_S
        self._round.append(watcher)
        self._chronicle.on_page = self._pages.append
        stream.want_room()

    def _forget(self, watcher: Watcher) -> None:
        if not watcher.gone:
            watcher.gone = True
            self._watches.remove(watcher, watcher.wanted.name, prefix=watcher.wanted.is_prefix)
            if not self._watches:
                self._chronicle.on_page = None
                self._pages.clear()

    def _drop(self, watcher: Watcher, error: DdbError) -> None:
        """End a watch that can't go on."""
        log.info("%r is dropped: %s", watcher, error.message)
        said = {"event": "error", "error": error.code, "message": error.message, **error.fields}
        watcher.stream.send([Event(b"error", wire.encode(said), None)])
        watcher.stream.close()
        self._forget(watcher)

    def leave(self) -> None:
        """The node is leaving: what was applied is still told, then all watches end."""
        self._leaving = True
        self.turn()
        for watcher in self._round:
            if not watcher.gone:
                self._drop(watcher, ShuttingDown("This node is leaving; go on watching at another."))
        self._round.clear()

    # --- telling ------------------------------------------------------------------------------------------------

    @property
    def _applied(self) -> int:
        return self._replica.machine.applied

    def turn(self) -> None:
        """Hand round what was applied since the last call."""
        if self._pages:
            pages = self._pages[:]
            self._pages.clear()
            for page in pages:
                self._hand_round(page)

    def _hand_round(self, page: Page) -> None:
        find = self._watches.find
        found: dict[Watcher, list[Event]] = {}
        for rev, key, row, _, _ in page.changes:
            watchers = find(key)
            if watchers:
                one = Event(b"delete" if row is None else b"put", event(key, row, rev), rev)
                for watcher in watchers:
                    if watcher.seen < rev:
                        found.setdefault(watcher, []).append(one)
        for watcher, events in found.items():
            if watcher.live and watcher.stream.has_room:
                watcher.stream.send(events)
            else:
                self._fall_behind(watcher, page.first - 1, sum([len(one.body) for one in events]))

    def _fall_behind(self, watcher: Watcher, told: int, size_bytes: int) -> None:
        """`watcher`, which was told everything up to `told`, has no room for `size_bytes` more."""
        if watcher.live:
            watcher.live = False
            watcher.seen = max(watcher.seen, told)
            watcher.stream.want_room()
        watcher.behind_bytes += size_bytes
        if watcher.behind_bytes > BEHIND_BYTES_MAX:
            self._drop(watcher, _too_slow())

    def _catch_up(self, watcher: Watcher) -> None:
        """There is room: read to `watcher` from the chronicle, whole revisions only."""
        if watcher.gone or watcher.live:
            return
        chronicle, wants = self._chronicle, watcher.wanted.includes
        if watcher.seen < chronicle.floor:
            self._drop(watcher, _too_slow() if watcher.behind_bytes else chronicle.compacted())
            return
        events: list[Event] = []
        looked_at = size = 0
        seen = watcher.seen
        try:
            for rev, key, row, *_ in chronicle.records(watcher.seen):
                if rev != seen and (looked_at >= RECORDS_A_TURN or size >= STREAM_BYTES_MAX):
                    watcher.stream.want_room()
                    break
                seen = rev
                looked_at += 1
                if wants(key):
                    events.append(Event(b"delete" if row is None else b"put", event(key, row, rev), rev))
                    size += len(events[-1].body)
            else:
                seen = max(seen, self._applied)
                watcher.live = True
        except Compacted as error:
            self._drop(watcher, error)
            return
        watcher.stream.send(events)
        watcher.seen = seen
        watcher.behind_bytes = 0 if watcher.live else max(0, watcher.behind_bytes - size)

    def _on_reset(self) -> None:
        """The state is about to be replaced by a later one, and the chronicle with it."""
        self.turn()
        for watcher in self._round:
            if watcher.live and not watcher.gone:
                watcher.live = False
                watcher.seen = max(watcher.seen, self._applied)
                watcher.stream.want_room()

    # --- time ---------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Give a sign of life to those whose turn it is."""
        if not self._round:
            return
        self.turn()  # nobody is told of progress before the events that it is about
        for _ in range(1 + len(self._round) // ROUND_TICKS):
            if not self._round or self._round[0].due_s > now:
                return
            watcher = self._round.popleft()
            if watcher.gone:
                continue
            watcher.due_s = now + PROGRESS_S
            self._round.append(watcher)
            if watcher.live and watcher.stream.has_room:
                rev = max(watcher.seen, self._applied)
                watcher.stream.send([Event(b"progress", b'{"event":"progress","rev":%d}' % rev, rev)])


def _too_slow() -> Overloaded:
    return Overloaded("The events were not taken fast enough; go on from the last revision that came.")


class _Confirmed:
    """Waits, in a slot's place, for the confirmation that this node has seen all that was acknowledged before."""

    def __init__(self, slot: Slot, then: Callable[[], None]) -> None:
        self.deadline = slot.deadline
        self._slot = slot
        self._then = then

    @property
    def done(self) -> bool:
        """See replica.Waiter."""
        return self._slot.done

    @property
    def has_room(self) -> bool:
        """See replica.Reader."""
        return True

    def reply(self, body: bytes) -> None:
        """See replica.Waiter."""
        try:
            self._then()
        except DdbError as error:
            self._slot.fail(error)

    def fail(self, error: DdbError) -> None:
        """See replica.Waiter."""
        self._slot.fail(error)
