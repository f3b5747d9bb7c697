"""The changes of the last entries in the snapshot file: what a checkpoint takes up of the chronicle.

Laws: see snapshot.py, whose transactions these are. Here is no policy about errors: what SQLite raises goes through, and
whether a chapter is sound is for the caller to ask.

Theory. One table, a row for each *chapter*: the changes of some revisions that follow each other, `first` to `last`, as a text of some
64 KiB. So a checkpoint hands SQLite a hundred rows in the place of 20,000, at a fifth of the processor time, and a reader that looks for
one key passes over a chapter that hasn't got it with one search through its bytes. The text has a line for each change, and one before
them wherever the term or the leader's time (in milliseconds) is another:

    @TERM AT
    REV CREATED VERSION CLIENT "KEY"	VALUE       a put: the row that it made, and the session that wrote (0: none)
    REV CLIENT "KEY"                            a deletion

Key and value are compact JSON, which holds neither a line feed nor a tab. `crc` is of all the rest of the row. What `meta` says about the
table (`Kept`) tells whether a chapter is missing.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Final, NamedTuple
from zlib import crc32

from ddb.chronicle import Extract, Page, Record
from ddb.kv import Row, checksum
from ddb.wire import encode_string

HISTORY: Final = "CREATE TABLE history (last INTEGER PRIMARY KEY, first INT, change_count INT, size_bytes INT, crc INT, changes TEXT)"
COLUMNS: Final = "last, first, change_count, size_bytes, crc, CAST(changes AS BLOB)"
INSERT: Final = "INSERT OR REPLACE INTO history VALUES (?, ?, ?, ?, ?, CAST(? AS TEXT))"
TOTALS: Final = (
    "SELECT coalesce(sum(change_count), 0), coalesce(sum(crc), 0), coalesce(sum(size_bytes), 0) FROM history"
)
FORWARDS: Final = f"SELECT {COLUMNS} FROM history WHERE last > ? AND first <= ? ORDER BY last LIMIT 1"
BACKWARDS: Final = (  # only the newest of them may end behind the revision where the reader begins
    f"SELECT {COLUMNS} FROM history WHERE last > ?1 AND first <= ?2 "
    "AND last <= coalesce((SELECT min(last) FROM history WHERE last >= ?2), ?2) ORDER BY last DESC LIMIT 1"
)
CHAPTER_BYTES: Final = 64 << 10
CHAPTERS_MIN: Final = 16  # that fit into what may be kept: the oldest of them is dropped whole
PAUSE_S: Final = 0.0005  # long enough for a waiting loop thread to get the interpreter


@dataclass(frozen=True, slots=True)
class Kept:
    """What the file has of history: all changes behind `floor`, in chapters of `count` changes whose checksums add up to `sum`."""

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


class Chapter(NamedTuple):
    """A row of the table: COLUMNS."""

    last: int
    first: int
    change_count: int
    size_bytes: int
    crc: int
    changes: bytes

    @property
    def sound(self) -> bool:
        """Whether it is what was once written there."""
        try:
            return bool(_summed(*self[:4], self.changes) == self.crc)
        except TypeError:
            return False  # not even of the right types

    def records(self, start: str = "", end: str | None = None) -> Iterator[Record]:
        """The changes of a sound chapter in order, as far as their keys lie between `start` and, without it, `end`."""
        common = encode_string("" if end is None else commonprefix([start, end]))[:-1]  # noqa: RUF071 (of letters, indeed)
        if common not in self.changes:
            return
        term = at_ms = 0
        for line in self.changes.split(b"\n"):
            if line[0] == 64:  # @
                term, at_ms = map(int, line[1:].split())
            elif common in line:
                head, put, value = line.partition(b"\t")
                numbers, quoted = head.split(b'"', 1)
                key = quoted[:-1].decode() if b"\\" not in quoted else json.loads(b'"' + quoted)
                if key < start or (end is not None and key >= end):
                    continue
                if put:
                    rev, created, version, client = map(int, numbers.split())
                    row: Row = (value, rev, created, version, checksum(key, value, rev, created, version))
                    yield rev, key, row, client, term, at_ms
                else:
                    rev, client = map(int, numbers.split())
                    yield rev, key, None, client, term, at_ms


def chapter(connection: sqlite3.Connection, after: int, upto: int, *, reverse: bool = False) -> Chapter | None:
    """The first chapter with a revision behind `after` and up to `upto`, or the last one. Raises sqlite3.Error."""
    fields = connection.execute(BACKWARDS if reverse else FORWARDS, (after, upto)).fetchone()
    return None if fields is None else Chapter(*fields)


def write(connection: sqlite3.Connection, extract: Extract) -> Kept:
    """Take up `extract` inside the open transaction, and drop what is not to be kept any more. Raises sqlite3.Error."""
    connection.execute("DELETE FROM history WHERE last <= ?", (extract.floor,))
    for some in _chapters(extract.pages, extract.floor, min(CHAPTER_BYTES, extract.bytes_max // CHAPTERS_MIN)):
        connection.execute(INSERT, some)
        time.sleep(PAUSE_S)
    floor = extract.floor
    count, total, size = connection.execute(TOTALS).fetchone()
    if size > extract.bytes_max:
        (floor,) = connection.execute(
            "SELECT max(last) FROM (SELECT last, sum(size_bytes) OVER (ORDER BY last DESC) AS size FROM history) WHERE size > ?",
            (extract.bytes_max,),
        ).fetchone()
        connection.execute("DELETE FROM history WHERE last <= ?", (floor,))
        count, total, _ = connection.execute(TOTALS).fetchone()
    return Kept(floor, count, total)


def _chapters(pages: Sequence[Page], floor: int, bytes_max: int) -> Iterator[Chapter]:
    """What `pages` tell of what is behind `floor`, in chapters that end at the first revision behind `bytes_max`."""
    lines: list[bytes] = []
    first = last = count = size = 0
    for page in pages:
        heading = b"@%d %d" % (page.term, page.at_ms)
        lines.append(heading)
        for rev, key, row, client, _, _ in page.records(floor):
            if size >= bytes_max and rev != last:
                yield _chapter(first, last, count, lines)
                lines = [heading]
                count = size = 0
            if row is None:
                line = b"%d %d %b" % (rev, client, encode_string(key))
            else:
                value, _, created, version, _ = row
                line = b"%d %d %d %d %b\t%b" % (rev, created, version, client, encode_string(key), value)
            lines.append(line)
            first = rev if count == 0 else first
            last = rev
            count += 1
            size += len(line)
    if count:
        yield _chapter(first, last, count, lines)


def _chapter(first: int, last: int, count: int, lines: list[bytes]) -> Chapter:
    changes = b"\n".join(lines)
    return Chapter(last, first, count, len(changes), _summed(last, first, count, len(changes), changes), changes)


def _summed(last: int, first: int, count: int, size: int, changes: bytes) -> int:
    """The checksum of a chapter."""
    return crc32(changes, crc32(f"{last} {first} {count} {size}\n".encode()))
