"""What has changed lately, in order: what watches tell, and history answers.

Laws:

* All changes after `floor` are here, and nothing is told of what lies before it. `oldest` is the first revision that
  may be asked for.
* Taking in a batch costs the same however many changes it has. Nothing is encoded, copied or looked up before somebody
  asks.
* A revision is never split: who gets one change of it gets all.

Theory. The machine hands over the changes of each batch that it has applied (kv.py), and they are kept as they come: a
*page* is one batch's. The newest pages, up to a number of entries and of bytes, are in memory. A checkpoint takes up
those that the file doesn't have yet, in the very transaction that takes up their rows; so the file has all changes up to its
own index, from some floor on, and memory has those behind it. Memory may forget a page that the file has. Where it
has to forget one that the file has not, what the file has before the gap counts no more.

    file      (floor, its applied]           survives a restart, and travels with a snapshot
    memory    (base, applied]                base is never above the file's index, but for a gap

Nothing of the file is loaded at a start: whoever asks for what is older reads it from there, a little at a time.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol

from ddb.errors import BadRequest, Compacted, CorruptStore
from ddb.kv import SCAN_BYTES_MAX, Change, MemoryTable, Row, Table, answer
from ddb.messages import Batch, Command
from ddb.wire import encode_string

log = logging.getLogger(__name__)

Record = tuple[int, str, Row | None, int, int, int]
"""rev, key, the row it put (None: a deletion), the session that wrote (0: none), term, at (ms since 1970)"""

CHANGE_BYTES: Final = 300  # about what a change takes beside its key and value

_first = attrgetter("first")
_last = attrgetter("last")


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept: so many entries, as long as their changes take no more than so many bytes, about."""

    entries: int = 20_000
    bytes: int = 64 << 20


class Page(NamedTuple):
    """The changes of one batch, `first` to `last`, in order, without the rows before; `size_bytes` is about what they take."""

    first: int
    last: int
    term: int
    at_ms: int
    changes: tuple[Change, ...]
    size_bytes: int

    def records(self, after: int = 0) -> Iterator[Record]:
        """The changes behind the revision `after`."""
        begin = bisect_right(self.changes, after, key=_rev) if after >= self.first else 0
        term, at_ms = self.term, self.at_ms
        for rev, key, row, _, client in islice(self.changes, begin, None):
            yield rev, key, row, client, term, at_ms

    def backwards(self, before: int) -> Iterator[Record]:
        """The changes before the revision `before`, the last one first."""
        end = bisect_left(self.changes, before, key=_rev) if before <= self.last else len(self.changes)
        for i in range(end - 1, -1, -1):
            rev, key, row, _, client = self.changes[i]
            yield rev, key, row, client, self.term, self.at_ms


@dataclass(frozen=True, slots=True)
class Extract:
    """What a checkpoint is to take up: the changes of `pages`. It may then forget all up to `floor`, and as much more as takes
    what is left below `bytes_max`."""

    pages: list[Page]
    floor: int
    bytes_max: int


def _rev(change: Change) -> int:
    return change[0]


def _within(records: Iterator[Record], start: str, end: str | None) -> Iterator[Record]:
    """Those of `records` whose keys lie in the range."""
    if start == "" and end is None:
        return records
    return (record for record in records if start <= record[1] and (end is None or record[1] < end))


class Past(Protocol):
    """The changes that the last checkpoint has written down (store.Store)."""

    @property
    def history_floor(self) -> int:
        """It has all changes behind this revision."""

    @property
    def history_last(self) -> int:
        """It has all changes up to this revision."""

    def history(
        self, after: int, upto: int, start: str = "", end: str | None = None, reverse: bool = False
    ) -> Iterator[Record]:
        """The changes behind `after`, up to `upto`, of the keys from `start` up to `end`, in order or backwards. Raises
        CorruptStore; Compacted, where a checkpoint has just dropped some of them."""


class Chronicle:
    """The changes of the last entries. `base` is the last index applied when it begins.

    `on_page`, when set, is given each page as it is taken in; `on_reset` is called before everything is forgotten.
    """

    __slots__ = ("_bytes", "_pages", "base", "on_page", "on_reset", "past", "retention")

    def __init__(self, base: int = 0, retention: Retention | None = None, past: Past | None = None) -> None:
        self.retention = retention or Retention()
        self.past = past
        self.base = base  # memory has all changes behind this revision
        self.on_page: Callable[[Page], object] | None = None
        self.on_reset: Callable[[], None] | None = None
        self._pages: deque[Page] = deque()
        self._bytes = 0

    def __repr__(self) -> str:
        return f"chronicle ({self.floor}, {self.base}] + {len(self._pages)} pages of {self._bytes} bytes"

    # --- taking in ----------------------------------------------------------------------------------------------

    def take(self, batch: Batch, changes: list[Change]) -> None:
        """`batch` was applied and made `changes`; see kv.Machine.on_changes.."""
        size = len(batch.data) + CHANGE_BYTES * len(changes)
        # A tuple of tuples of atoms is nothing that the garbage collector walks; lists of them cost it 28 ms for 200,000. The rows
        # before, which nobody asks for here, are let go while they are still in the processor's cache: 3 % more puts.
        kept = tuple([(rev, key, row, None, client) for rev, key, row, _, client in changes])
        page = Page(batch.first, batch.last, batch.term, batch.at_ms, kept, size)
        pages = self._pages
        pages.append(page)
        self._bytes += size
        retention = self.retention
        while pages[0].last <= batch.last - retention.entries or (self._bytes > retention.bytes and len(pages) > 1):
            old = pages.popleft()
            self._bytes -= old.size_bytes
            self.base = old.last
            if not pages:
                break
        if self.on_page is not None:
            self.on_page(page)

    def reset(self, base: int, past: Past | None = None) -> None:
        """The state was replaced by another, of `base`, whose `past` came with it: go on behind that."""
        if self.on_reset is not None:
            self.on_reset()
        self._pages.clear()
        self._bytes = 0
        self.base = base
        self.past = past

    # --- what there is ------------------------------------------------------------------------------------------

    @property
    def floor(self) -> int:
        """All changes behind this revision are here."""
        past = self.past
        if past is not None and past.history_floor < self.base <= past.history_last:
            return past.history_floor
        return self.base

    @property
    def oldest(self) -> int:
        """The first revision that is kept."""
        return self.floor + 1

    def extract(self, applied: int) -> Extract:
        """What a checkpoint of the state after `applied`, the last entry taken in, is to write of it."""
        written = self.base if self.past is None else self.past.history_last
        floor = max(self.floor, applied - self.retention.entries)
        begin = bisect_right(self._pages, max(written, floor), key=_last)
        return Extract(list(islice(self._pages, begin, None)), floor, self.retention.bytes)

    def records(self, after: int, start: str = "", end: str | None = None) -> Iterator[Record]:
        """The changes behind the revision `after` of the keys from `start` up to and without `end`, in order. To be used up, or
        dropped, before the next batch. `after` must not be below `floor`. Raises Compacted where the file is damaged."""
        if after < self.base and self.past is not None:
            yield from self._read(after, self.base, start, end, reverse=False)
        for page in islice(self._pages, bisect_right(self._pages, after, key=_last), None):
            yield from _within(page.records(after), start, end)

    def backwards(self, before: int, start: str = "", end: str | None = None) -> Iterator[Record]:
        """The same before the revision `before`, down to `floor`, the last one first."""
        for i in range(bisect_left(self._pages, before, key=_first) - 1, -1, -1):
            yield from _within(self._pages[i].backwards(before), start, end)
        floor = self.floor
        if floor < self.base and self.past is not None:
            yield from self._read(floor, min(self.base, before - 1), start, end, reverse=True)

    def _read(self, after: int, upto: int, start: str, end: str | None, *, reverse: bool) -> Iterator[Record]:
        """What the file has of them. Where it proves damaged, what it has counts no more: the rows have checksums of their own."""
        past = self.past
        assert past is not None
        try:
            yield from past.history(after, upto, start, end, reverse)
        except CorruptStore as error:
            log.error("%s What it holds of history is told no more.", error.message)
            self.past = None
            raise self.compacted() from error

    # --- answers ------------------------------------------------------------------------------------------------

    def answer(self, table: Table, command: Command, applied: int) -> bytes:
        """The reply to a command from `commands.prepare_read` or `past.prepare`: of the past where it asks for that, else of `table`, whose
        last revision is `applied`. Raises BadRequest and Compacted."""
        op = command[0]
        if op == "history":
            return self._history(command[1], applied)
        if op == "get_at":
            return self._get_at(table, command[1], command[2], applied)
        return answer(table, command, applied)

    def compacted(self) -> Compacted:
        """The failure that says from where on everything is kept."""
        oldest = self.oldest
        return Compacted(f"What was before revision {oldest} is not kept here any more; ask from there.", oldest=oldest)

    def _history(self, asked: dict[str, Any], applied: int) -> bytes:
        floor = self.floor
        first = floor + 1 if asked["from"] is None else asked["from"]
        if first <= floor:
            raise self.compacted()
        last = applied if asked["to"] is None else min(asked["to"], applied)
        start, end, limit = asked["start"], asked["end"], asked["limit"]
        found: list[bytes] = []
        size = rev = 0
        more = b"false"
        way = self.backwards(last + 1, start, end) if asked["reverse"] else self.records(first - 1, start, end)
        for record in way:
            if not first <= record[0] <= last:
                break
            if record[0] != rev:
                if len(found) >= limit or size > SCAN_BYTES_MAX:
                    more = b"true"
                    break
                rev = record[0]
            found.append(_historic(record))
            size += len(found[-1])
        return b'{"ok":true,"changes":[%b],"more":%b,"oldest":%d,"rev":%d}' % (
            b",".join(found), more, floor + 1, applied,
        )  # fmt: skip

    def _get_at(self, table: Table, key: str, rev: int, applied: int) -> bytes:
        """What `key` was at `rev`. Where nothing is known of it at or before `rev`, the first change behind tells at least
        whether that created the key."""
        if rev > applied:
            raise BadRequest(f"Revision {rev} is not here yet; the last one is {applied}.")
        now = table.row(key)
        if now is not None and now[1] <= rev:
            return shown(key, now)
        if rev < self.floor:
            raise self.compacted()
        only = (key, key + "\0")
        for record in self.backwards(rev + 1, *only):
            return shown(key, record[2])
        for record in self.records(rev, *only):
            if record[2] is not None and record[2][3] == 1:
                return shown(key, None)
            raise Compacted(
                f"The key was last written before revision {self.oldest}, where what is kept begins; "
                f"it can be told from {record[0]} on.", oldest=record[0],
            )  # fmt: skip
        return shown(key, now)


def shown(key: str, row: Row | None) -> bytes:
    """The reply to a get that has found `row`."""
    table = MemoryTable()
    if row is not None:
        table.put(key, row, None)
    return answer(table, ["get", key], 0)


def event(key: str, row: Row | None, rev: int) -> bytes:
    """A change as those are told who watch it."""
    if row is None:
        return b'{"event":"delete","key":%b,"rev":%d}' % (encode_string(key), rev)
    return b'{"event":"put","key":%b,"value":%b,"rev":%d,"version":%d}' % (encode_string(key), row[0], rev, row[3])


def _historic(record: Record) -> bytes:
    """A change with all that is known of it."""
    rev, key, row, client, term, at_ms = record
    writer = b',"client":%d' % client if client else b""
    created = b"" if row is None else b',"created":%d' % row[2]
    return b'%b%b,"term":%d,"at":%d%b}' % (event(key, row, rev)[:-1], created, term, at_ms, writer)
