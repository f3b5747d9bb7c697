"""What the store holds in memory, above the snapshot file.

Laws: a newer layer hides an older one; a removed key is a row of None, which hides as well; nothing grows without bound
that a checkpoint or a budget doesn't cut.

Theory. Each of three small structures answers one question quickly:

* `Layer`: what has changed since the last checkpoint began? A dict; order is made only when a scan asks for it,
  from what has been added since the last scan asked, so writes don't pay for it.
* `Cache`: which rows were written or read lately? Generations of dicts, newest first. A hit in an older one moves
  the row to the newest; the oldest is dropped whole. That is nearly LRU, and costs a dict look-up, not a
  linked list. A finished checkpoint's layer becomes a generation as it is.
* `KeyFilter`: can this key be on disk at all? Without it, each new key would pay a look-up in the file (8 µs) to
  learn that it is new.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final
from zlib import crc32

from ddb.kv import Row

ROW_OVERHEAD_BYTES: Final = 350  # of a row in a dict, beside its key's and its value's bytes (CPython, 64 bits)
INSERTED_MAX: Final = 64  # more new keys than this are sorted in, not inserted one by one
MOVED_MAX: Final = 10_000  # rows that one call may move between dicts: about a millisecond
GENERATIONS_MAX: Final = 4
FILTER_SLOTS_MIN: Final = 1 << 16
FILTER_SLOTS_MAX: Final = 1 << 26
SLOTS_PER_KEY: Final = 16

UNKNOWN: Final[Any] = object()
"""What a look-up answers that knows nothing of the key; None means that the key is known to be absent."""

Rows = dict[str, Row | None]


def row_bytes(key: str, row: Row | None) -> int:
    """About how much memory `key` and `row` take, in bytes."""
    return len(key) + ROW_OVERHEAD_BYTES + (0 if row is None else len(row[0]))


class Layer:
    """The keys changed since some moment, with what they are now.

    `born` holds those that did not exist at that moment, so that keys can be counted without asking below.
    Keys are only ever added.
    """

    __slots__ = ("_order", "born", "bytes", "rows")

    def __init__(self) -> None:
        self.rows: Rows = {}
        self.born: set[str] = set()
        self.bytes = 0
        self._order: list[str] = []

    def put(self, key: str, row: Row | None, old: Row | None) -> None:
        """Set `key` to `row` (None: removed), where it was `old` just now."""
        if key in self.rows:
            self.bytes += (0 if row is None else len(row[0])) - (0 if old is None else len(old[0]))
        else:
            self.bytes += row_bytes(key, row)
            if old is None:
                self.born.add(key)
        self.rows[key] = row

    def under(self, newer: Layer) -> Layer:
        """A new layer that says what `newer` on top of this one says."""
        both = Layer()
        both.rows = {**self.rows, **newer.rows}
        both.born = self.born | {key for key in newer.born if key not in self.rows}
        both.bytes = sum(row_bytes(key, row) for key, row in both.rows.items())
        return both

    def ordered(self, start: str, end: str | None, reverse: bool) -> Iterator[tuple[str, Row | None]]:
        """The keys from `start` up to `end` (None: to the last) and their rows, in order or backwards."""
        first, last = self._bounds(start, end)
        indexes = range(last - 1, first - 1, -1) if reverse else range(first, last)
        order, rows = self._order, self.rows
        return ((order[i], rows[order[i]]) for i in indexes)

    def growth(self, start: str, end: str | None) -> int:
        """How many more keys the range has with this layer than without it."""
        first, last = self._bounds(start, end)
        rows, born = self.rows, self.born
        return sum((rows[key] is not None) - (key not in born) for key in islice(self._order, first, last))

    def _bounds(self, start: str, end: str | None) -> tuple[int, int]:
        order, rows = self._order, self.rows
        missing = len(rows) - len(order)
        if missing:
            # A dict keeps the order of insertion, and this one loses no key: the last ones are those not yet sorted.
            new = islice(reversed(rows), missing)
            if missing <= INSERTED_MAX:
                for key in new:
                    insort(order, key)
            else:
                order.extend(new)
                order.sort()
        return bisect_left(order, start), len(order) if end is None else bisect_left(order, end)


def merged(
    upper: Iterator[tuple[str, Row | None]], lower: Iterator[tuple[str, Row | None]], reverse: bool
) -> Iterator[tuple[str, Row | None]]:
    """Two ordered streams as one; where both have a key, `upper` is right."""
    above, below = next(upper, None), next(lower, None)
    while above is not None and below is not None:
        if above[0] == below[0]:
            yield above
            above, below = next(upper, None), next(lower, None)
        elif (above[0] < below[0]) is not reverse:
            yield above
            above = next(upper, None)
        else:
            yield below
            below = next(lower, None)
    if above is not None:
        yield above
        yield from upper
    if below is not None:
        yield below
        yield from lower


class Cache:
    """Rows that are on disk, too, in at most about `bytes_max` bytes of memory."""

    __slots__ = ("_generations", "_let_go", "_share", "_sizes", "bytes_max")

    def __init__(self, bytes_max: int, let_go: Callable[[Rows], None]) -> None:
        """`let_go` is handed each generation that is dropped: to free the rows is work, when they are many."""
        self.bytes_max = bytes_max
        self._let_go = let_go
        self._share = bytes_max // GENERATIONS_MAX
        self._generations: list[Rows] = [{}]  # the newest first
        self._sizes: list[int] = [0]

    @property
    def bytes(self) -> int:
        """How much memory the rows take, about."""
        return sum(self._sizes)

    def get(self, key: str) -> Any:
        """The row, None where the key is known to be absent, UNKNOWN where nothing is known."""
        generations = self._generations
        row = generations[0].get(key, UNKNOWN)
        if row is UNKNOWN:
            for generation in generations[1:]:
                row = generation.get(key, UNKNOWN)
                if row is not UNKNOWN:
                    self.add(key, row)
                    break
        return row

    def add(self, key: str, row: Row | None) -> None:
        """Remember `row`, the newest that is known of `key`."""
        self._generations[0][key] = row
        self._sizes[0] += row_bytes(key, row)
        if self._sizes[0] > self._share:
            self._begin({}, 0)

    def absorb(self, layer: Layer) -> None:
        """Take over all rows of `layer`, which is newer than anything here."""
        if layer.bytes > self.bytes_max - self._share:
            # Too much to keep, and what is kept of the same keys is old now.
            for generation in [*self._generations, layer.rows]:
                self._let_go(generation)
            self._generations, self._sizes = [{}], [0]
        elif len(layer.rows) > MOVED_MAX:
            self._begin(layer.rows, layer.bytes)
        else:
            self._generations[0].update(layer.rows)
            self._sizes[0] += layer.bytes
            if self._sizes[0] > self._share:
                self._begin({}, 0)

    def _begin(self, rows: Rows, size: int) -> None:
        """Make `rows` the newest generation, and leave it room to grow by a share."""
        self._generations.insert(0, rows)
        self._sizes.insert(0, size)
        while len(self._sizes) > 1 and (
            len(self._sizes) > GENERATIONS_MAX or sum(self._sizes) > self.bytes_max - self._share
        ):
            self._let_go(self._generations.pop())
            self._sizes.pop()


class KeyFilter:
    """A set of keys that may say yes wrongly, rarely, and never says no wrongly.

    One byte for each slot, so that `add` may run in one thread while another asks. The same keys make the same `tables` in every
    process.
    """

    __slots__ = ("_count", "tables")

    def __init__(self, expected: int) -> None:
        """An empty set, made for about `expected` keys; it grows."""
        self.tables: list[bytearray] = []
        self._count = 0
        self._grow(expected)

    @classmethod
    def of(cls, tables: list[bytearray]) -> KeyFilter:
        """The set that has these `tables`, from another process; at least one."""
        found = cls(0)
        found.tables, found._count = tables, tables[-1].count(1)
        return found

    def add(self, keys: Sequence[str]) -> None:
        """Add all `keys`."""
        table = self.tables[-1]
        mask = len(table) - 1
        for key in keys:
            table[crc32(key.encode()) & mask] = 1
        self._count += len(keys)
        if self._count * SLOTS_PER_KEY > len(table) and len(table) < FILTER_SLOTS_MAX:
            self._grow(self._count * 4)

    def may_hold(self, key: str) -> bool:
        """False where `key` was surely never added."""
        hashed = crc32(key.encode())
        for table in self.tables:  # noqa: SIM110 (a generator would double the cost)
            if table[hashed & (len(table) - 1)]:
                return True
        return False

    def _grow(self, expected: int) -> None:
        size = FILTER_SLOTS_MIN
        while size < min(expected * SLOTS_PER_KEY, FILTER_SLOTS_MAX):
            size *= 2
        self.tables.append(bytearray(size))
        self._count = 0
