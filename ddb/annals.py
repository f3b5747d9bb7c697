"""The changes of the last entries in the snapshot file: what a checkpoint takes up of the chronicle.

Laws: see snapshot.py, whose transactions and checksums these are. Here is no policy about errors: what SQLite raises goes
through, and whether a row is sound is for the caller to ask.

Theory. One table, a row for each change: `rev` and `n`, its place among the changes of that revision; the key; what the row of
`kv` was then (a deletion has no value, and zeros); and who did it when: the session, the term, and the leader's time in
milliseconds. `crc` goes on where a row's own checksum ends, so a value need not be summed up again to be written. What
`meta` says about the table (`Kept`) tells whether a change is missing.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final
from zlib import crc32

from ddb.chronicle import Extract, Page, Record

HISTORY: Final = (
    "CREATE TABLE history (rev INT, n INT, key TEXT, value TEXT, created INT, version INT, client INT, term INT, at INT, "
    "crc INT, PRIMARY KEY (rev, n)) WITHOUT ROWID"
)
COLUMNS: Final = "rev, n, key, CAST(value AS BLOB), created, version, client, term, at, crc"
SIZE: Final = "length(CAST(key AS BLOB)) + coalesce(length(CAST(value AS BLOB)), 0) + 100"
_ONE: Final = "(?, ?, ?, CAST(? AS TEXT), ?, ?, ?, ?, ?, ?)"
_INSERT: Final = "INSERT OR REPLACE INTO history VALUES "
ROWS_A_STATEMENT: Final = 200
INSERT_MANY: Final = _INSERT + ", ".join([_ONE] * ROWS_A_STATEMENT)
INSERT_ONE: Final = _INSERT + _ONE
STATEMENT_BYTES_MAX: Final = 4 << 20
PAUSE_S: Final = 0.0005  # long enough for a waiting loop thread to get the interpreter

Fields = tuple[Any, ...]
"""A row of the table: COLUMNS."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the file has of history: all changes behind `floor`, `count` of them, whose checksums add up to `sum`."""

    floor: int = 0
    count: int = 0
    sum: int = 0

    def to_text(self) -> str:
        """As the table `meta` says it."""
        return f"{self.count} changes after {self.floor}, {self.sum}"

    @classmethod
    def from_text(cls, text: str) -> Kept:
        """Undo `to_text`. Raises ValueError."""
        count, _, _, floor, total = text.replace(",", "").split(" ")
        return cls(int(floor), int(count), int(total))


def checksum(rev: int, n: int, key: str, crc: int, client: int, term: int, at_ms: int) -> int:
    """The checksum of a change whose row has the checksum `crc` (a deletion: 0)."""
    return crc32(b"\n%d %d %b\n%d %d %d" % (rev, n, key.encode(), client, term, at_ms), crc)


def sound(fields: Fields) -> bool:
    """Whether a row of the table is what was once written there."""
    rev, n, key, value, created, version, client, term, at_ms, crc = fields
    try:
        row_crc = 0 if value is None else crc32(b"%b\n%b\n%d %d %d" % (key.encode(), value, rev, created, version))
        return bool(checksum(rev, n, key, row_crc, client, term, at_ms) == crc)
    except (AttributeError, TypeError, ValueError):
        return False  # not even of the right types


def record(fields: Fields) -> Record:
    """The change that a sound row of the table tells."""
    rev, _, key, value, created, version, client, term, at_ms, _ = fields
    if value is None:
        return rev, key, None, client, term, at_ms
    crc = crc32(b"%b\n%b\n%d %d %d" % (key.encode(), value, rev, created, version))
    return rev, key, (value, rev, created, version, crc), client, term, at_ms


def select(
    connection: sqlite3.Connection,
    after: tuple[int, int],
    upto: tuple[int, int],
    start: str,
    end: str | None,
    reverse: bool,
) -> Iterator[Fields]:
    """The rows behind the place `after` and before the place `upto` (a rev, and an n) of the keys from `start` up to and
    without `end`, in order or backwards. Raises sqlite3.Error."""
    where = "(rev, n) > (?, ?) AND (rev, n) < (?, ?)"
    values: list[Any] = [*after, *upto]
    if start:
        where += " AND key >= ?"
        values.append(start)
    if end is not None:
        where += " AND key < ?"
        values.append(end)
    order = "rev DESC, n DESC" if reverse else "rev, n"
    return connection.execute(f"SELECT {COLUMNS} FROM history WHERE {where} ORDER BY {order}", values)


def write(connection: sqlite3.Connection, extract: Extract) -> Kept:
    """Take up `extract` inside the open transaction, and drop what is not to be kept any more. Raises sqlite3.Error."""
    connection.execute("DELETE FROM history WHERE rev <= ?", (extract.floor,))
    rows = _rows(extract.pages, extract.floor)
    while some := list(islice(rows, ROWS_A_STATEMENT)):
        size = sum([len(row[3]) for row in some if row[3] is not None])
        if len(some) == ROWS_A_STATEMENT and size <= STATEMENT_BYTES_MAX:
            connection.execute(INSERT_MANY, [field for row in some for field in row])
        else:
            connection.executemany(INSERT_ONE, some)
        if len(some) == ROWS_A_STATEMENT:
            time.sleep(PAUSE_S)
    floor = extract.floor
    totals = f"SELECT count(*), coalesce(sum(crc), 0), coalesce(sum({SIZE}), 0) FROM history"
    count, total, size = connection.execute(totals).fetchone()
    if size > extract.bytes_max:
        (floor,) = connection.execute(
            f"SELECT max(rev) FROM (SELECT rev, sum({SIZE}) OVER (ORDER BY rev DESC) AS size FROM history) WHERE size > ?",
            (extract.bytes_max,),
        ).fetchone()
        connection.execute("DELETE FROM history WHERE rev <= ?", (floor,))
        count, total, _ = connection.execute(totals).fetchone()
    return Kept(floor, count, total)


def _rows(pages: Sequence[Page], floor: int) -> Iterator[Fields]:
    """The rows of the table that say what `pages` do, of what is behind `floor`."""
    for page in pages:
        last = n = 0
        for rev, key, row, client, term, at_ms in page.records(floor):
            n = n + 1 if rev == last else 0
            last = rev
            value, created, version, crc = (None, 0, 0, 0) if row is None else (row[0], row[2], row[3], row[4])
            summed = checksum(rev, n, key, crc, client, term, at_ms)
            yield rev, n, key, value, created, version, client, term, at_ms, summed
