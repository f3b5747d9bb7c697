"""What older versions of this program have left: a snapshot file of an older format becomes one of the present.

Laws:

* Wholly or, after a crash, not at all.
* What cannot be known to be right is not taken over.

Theory. Format 1 had neither ledger nor history, so the tables are made. Format 2 had a row of `history` for each change, each with a
checksum that went on where that of the row in `kv` ended: they are read, held against these, and become chapters (annals.py).
Where one of them is damaged, history begins anew: nothing that was acknowledged is lost with it.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from ddb import annals, snapshot
from ddb.annals import HISTORY, Kept
from ddb.chronicle import Extract, Page
from ddb.kv import Change, checksum
from ddb.snapshot import FORMAT, LEDGER, Meta, read_meta

log = logging.getLogger(__name__)

CHANGES: Final = (
    "SELECT term, at, rev, n, key, CAST(value AS BLOB), created, version, client, crc FROM history ORDER BY rev, n"
)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring a database of an older format to the present one. Raises CorruptStore, StartupError or sqlite3.Error."""
    meta = read_meta(connection, path)
    if meta.format == FORMAT:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if meta.format == "1":
            connection.execute(LEDGER)
            connection.execute(HISTORY)
            kept = meta.kept
        else:
            kept = _history_of_format_2(connection, path, meta)
        snapshot.write_meta(connection, replace(meta, kept=kept))
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    log.info("%s is of format %s now; it was of %s", path, FORMAT, meta.format)


def _history_of_format_2(connection: sqlite3.Connection, path: Path, meta: Meta) -> Kept:
    """Have chapters in the place of rows. Returns what is kept of them."""
    pages, found = [], Kept(meta.kept.floor)
    try:
        rows = connection.execute(CHANGES).fetchall()
        pages = list(_pages(rows))
        found = Kept(meta.kept.floor, len(rows), sum([row[-1] for row in rows]))
    except (sqlite3.Error, AttributeError, TypeError, ValueError) as error:
        log.debug("%s: %r", path, error)
    connection.execute("DROP TABLE history")
    connection.execute(HISTORY)
    if found != meta.kept:
        log.warning("What %s holds of history is damaged, so it begins anew behind revision %d.", path, meta.applied)
        return Kept(meta.applied)
    return annals.write(connection, Extract(pages, meta.kept.floor, sum([page.size_bytes for page in pages])))


def _pages(rows: list[tuple[Any, ...]]) -> Iterator[Page]:
    """The changes that `rows` tell, those of one term and time together. Raises ValueError where one is not what was written."""
    for (term, at_ms), some in groupby(rows, key=lambda row: row[:2]):
        changes: list[Change] = []
        size = 0
        for _, _, rev, n, key, value, created, version, client, crc in some:
            row_crc = 0 if value is None else checksum(key, value, rev, created, version)
            if crc32(b"\n%d %d %b\n%d %d %d" % (rev, n, key.encode(), client, term, at_ms), row_crc) != crc:
                raise ValueError(f"the change {n} of revision {rev} is not what was written")
            row = None if value is None else (value, rev, created, version, row_crc)
            changes.append((rev, key, row, None, client))
            size += 200 + len(key) * 6 + len(value or b"")  # no less than a line about it takes
        yield Page(changes[0][0], changes[-1][0], term, at_ms, tuple(changes), size)
