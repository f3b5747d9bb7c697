"""The snapshot file: what the database is on disk, and how it is known to be whole.

Laws:

* A file under its final name is always a whole database. It is made or received under another name, fsynced, renamed,
  and its directory fsynced.
* Nothing read from it is believed before its checksum has been compared.
* It opens with plain `sqlite3`, and says what it holds in words and JSON.

Theory. Four tables. `kv` has a row for each key (kv.py says what a row is), `ledger` a row for each record of sessions
and leases (ledger.py), `history` the changes of late, some hundred in a row (annals.py). `meta` says in a few named texts which
state this is: `applied` and `term`, the last log entry in it; `configuration`, the members as of then; `count`
of the keys and `digest` of rows and records; `history`, what is kept of it; and `crc` over these texts. SQLite commits all in one transaction, so that the
rows and the index they belong to can't part.

A file of an older format is brought to the present one when it is opened, in one transaction too (migration.py).

SQLite does not notice bit rot: of single flipped bits, most pass `integrity_check` and change what is read. So each
row carries a checksum, which reads compare (a row that is there is right), and `verify` walks all of them
and compares their sum with `digest` (no row is missing, hidden or there twice). The schema itself is compared with
what this program would have written, for a flipped bit may sit in a column's type.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import eq, lt, mul
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from ddb import annals
from ddb.annals import HISTORY, Chapter, Kept
from ddb.disk import Disk, fsync_directory, remove_if_there, touch, write_all
from ddb.errors import CorruptStore, ReadOnly, StartupError
from ddb.kv import DIGEST_MASK, Row, checksum
from ddb.ledger import record_checksum
from ddb.messages import Configuration
from ddb.wire import decode_trusted, encode

logger = logging.getLogger(__name__)

FORMAT: Final = "3"
FORMATS_READ: Final = ("1", "2", "3")
KV: Final = (
    "CREATE TABLE kv (key TEXT PRIMARY KEY, value TEXT, rev INT, created INT, version INT, crc INT) WITHOUT ROWID"
)
META: Final = "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID"
LEDGER: Final = "CREATE TABLE ledger (name TEXT PRIMARY KEY, value TEXT, crc INT) WITHOUT ROWID"
HISTORY_2: Final = (
    "CREATE TABLE history (rev INT, n INT, key TEXT, value TEXT, created INT, version INT, client INT, term INT, at INT, "
    "crc INT, PRIMARY KEY (rev, n)) WITHOUT ROWID"
)
TABLES: Final = {"1": {KV, META}, "2": {KV, META, LEDGER, HISTORY_2}, "3": {KV, META, LEDGER, HISTORY}}
SELECT_CHECKED: Final = (  # what kv.checksum is of
    "SELECT key, CAST(key || char(10) || value || char(10) || rev || ' ' || created || ' ' || version AS BLOB), crc FROM kv WHERE key > ? ORDER BY key"
)
SELECT: Final = "SELECT key, CAST(value AS BLOB), rev, created, version, crc FROM kv"
SYNCHRONOUS: Final = "FULL"  # in WAL mode, anything less would commit without fsync
HASHED_BYTES: Final = 256 << 10  # read in one go
COPIED_BYTES: Final = 1 << 20
RECORDS_AT_ONCE: Final = 500
PAUSE_EVERY_ROWS: Final = 500
FAILURES: Final = (sqlite3.Error, UnicodeDecodeError)  # the second: damage that SQLite quotes in what it says of it
PAUSE_S: Final = 0.0005  # long enough for a waiting loop thread to get the interpreter


@dataclass(frozen=True, slots=True)
class Meta:
    """Which state a snapshot is: all entries up to `applied`, which is of `term`, and nothing after it."""

    applied: int = 0
    term: int = 0
    configuration: Configuration | None = None
    digest: int = 0
    count: int = 0
    format: str = FORMAT
    kept: Kept = field(default=Kept(), compare=False)  # of history, which is this file's own: another may keep more


@dataclass(frozen=True, slots=True)
class Verified:
    """The rows up to the key `last` are right: so many, which add so much to the digest."""

    last: str = ""  # no key is empty
    count: int = 0
    digest: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """A consistent copy of a snapshot file, closed, with what the receiver needs to check it."""

    path: Path
    meta: Meta
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """A snapshot to be sent, with what the receiver needs to check it. `read(count, offset)` gives its bytes, until `close`.
    `still`: they are the database's own file, into which SQLite can move nothing until then. `sha256` is empty until somebody
    has had the time to read all of it (`hashed`)."""

    meta: Meta
    size_bytes: int
    sha256: str
    read: Callable[[int, int], bytes]
    close: Callable[[], None]
    still: bool


# ------------------------------------------------------------- connections


def connect(disk: Disk, path: Path, *, frozen: bool = False) -> sqlite3.Connection:
    """A connection to the existing database at `path`; see Disk.database. Raises sqlite3.Error."""
    connection = disk.database(path, frozen=frozen)
    try:
        connection.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def translated(error: sqlite3.Error | UnicodeDecodeError, path: Path) -> Exception:
    """The error to raise in the place of `error`, met while working with the database at `path`.

    ReadOnly for a full disk, which may pass; StartupError where the file can't be used as things are; OSError
    where the disk failed; CorruptStore where the file says what it can't say.
    """
    if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return error
    code = getattr(error, "sqlite_errorcode", None)
    kind = sqlite3.SQLITE_CORRUPT if code is None else code & 0xFF
    if kind == sqlite3.SQLITE_FULL:
        return ReadOnly(f"The disk is full, so the snapshot {path} could not be written ({error}); free some space.")
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StartupError(f"Another program uses the snapshot {path} ({error}); end it first.")
    if kind in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_AUTH):
        return not_writable(path, error)
    if kind == sqlite3.SQLITE_NOMEM:
        return MemoryError(str(error))
    if kind == sqlite3.SQLITE_IOERR and code != sqlite3.SQLITE_IOERR_SHORT_READ:
        return OSError(f"The disk failed under the snapshot {path}: {error} (SQLite error {code}).")
    return corrupt(path, str(error))


def not_writable(path: Path, reason: object) -> StartupError:
    """The error that says that the file at `path` can't be opened or made."""
    return StartupError(f"The snapshot {path} can't be opened for writing ({reason}); check its permissions.")


def corrupt(path: Path, what: str) -> CorruptStore:
    """The error that says `what` is wrong with the file at `path`."""
    sentence = " ".join(what.split())  # SQLite has its own idea of a line
    return CorruptStore(f"The snapshot {path} is damaged: {sentence}.", file=str(path))


@contextmanager
def errors(path: Path) -> Iterator[None]:
    """Within it, one of the FAILURES about `path` becomes one of `translated`'s."""
    try:
        yield
    except FAILURES as error:
        raise translated(error, path) from error


# ------------------------------------------------------------------- files


def remove_side_files(disk: Disk, path: Path) -> None:
    """Remove what SQLite may have left beside the database at `path`, which nobody has open: they belong to that very
    file, and would damage another one under its name."""
    for suffix in ("-wal", "-shm", "-journal"):
        remove_if_there(disk, Path(f"{path}{suffix}"))


def put_in_place(disk: Disk, new: Path, path: Path) -> None:
    """Give the closed and fsynced database file `new` the name `path`, durably, in the place of the one there.

    Side files of the old one go first, and durably: a crash in between must not leave them beside the new one.
    """
    remove_side_files(disk, path)
    fsync_directory(disk, path.parent)
    disk.rename(new, path)
    fsync_directory(disk, path.parent)


def create(disk: Disk, path: Path) -> None:
    """Make an empty database at `path`, whole or not at all. Raises StartupError, ReadOnly or OSError."""
    new = Path(f"{path}.new")
    remove_if_there(disk, new)
    remove_side_files(disk, new)
    touch(disk, new)
    with errors(path), closing(connect(disk, new)) as connection:
        connection.execute("BEGIN")
        connection.execute(KV)
        connection.execute(META)
        connection.execute(LEDGER)
        connection.execute(HISTORY)
        write_meta(connection, Meta())
        connection.execute("COMMIT")
    put_in_place(disk, new, path)


# -------------------------------------------------------------------- meta


def write_meta(connection: sqlite3.Connection, meta: Meta) -> None:
    """Make `meta` the state that the database says it is, inside the open transaction."""
    texts = {
        "format": FORMAT,
        "applied": str(meta.applied),
        "term": str(meta.term),
        "configuration": encode(None if meta.configuration is None else meta.configuration.to_json()).decode(),
        "count": str(meta.count),
        "digest": f"{meta.digest:016x}",
        "history": meta.kept.to_text(),
    }
    texts["crc"] = _meta_checksum(texts)
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", texts.items())


def read_meta(connection: sqlite3.Connection, path: Path) -> Meta:
    """The state that the database at `path` says it is. Raises CorruptStore, or StartupError for a later format."""
    texts: dict[str, Any] = dict(connection.execute("SELECT name, value FROM meta"))
    if texts.pop("crc", None) != _meta_checksum(texts):
        raise corrupt(path, "the checksum of its table meta is wrong")
    if texts.get("format") not in FORMATS_READ:
        raise StartupError(
            f"The snapshot {path} has format {texts.get('format')}, this version reads {', '.join(FORMATS_READ[:-1])} and {FORMAT}."
        )
    configuration = decode_trusted(texts["configuration"].encode())
    return Meta(
        int(texts["applied"]),
        int(texts["term"]),
        None if configuration is None else Configuration.from_json(configuration),
        int(texts["digest"], 16),
        int(texts["count"]),
        texts["format"],
        Kept.from_text(texts["history"]) if "history" in texts else Kept(int(texts["applied"])),
    )


def _meta_checksum(texts: dict[str, Any]) -> str:
    said = "".join([f"{name} {texts[name]}\n" for name in sorted(texts, key=str)])
    return f"{crc32(said.encode()):08x}"


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raise CorruptStore where the database isn't made of exactly the tables of its format, in UTF-8."""
    schema = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    (encoding,) = connection.execute("PRAGMA encoding").fetchone()
    if META not in schema or schema != TABLES[read_meta(connection, path).format] or encoding != "UTF-8":
        raise corrupt(path, "its tables are not those of a ddb snapshot")


# -------------------------------------------------------------------- rows


def sound(key: Any, row: tuple[Any, ...]) -> bool:
    """Whether `row`, read from a file under `key`, is what was once written there."""
    try:
        return bool(checksum(key, *row[:4]) == row[4])
    except (AttributeError, TypeError, ValueError):
        return False  # not even of the right types


def select_rows(
    connection: sqlite3.Connection, path: Path, start: str = "", end: str | None = None, reverse: bool = False
) -> Iterator[tuple[str, Row]]:
    """The rows of a range in order, or backwards, each one checked. Raises CorruptStore at the first that is wrong."""
    where = " WHERE key >= ?" + ("" if end is None else " AND key < ?")
    order = " ORDER BY key DESC" if reverse else " ORDER BY key"
    last: str | None = None
    with errors(path):
        cursor = connection.execute(SELECT + where + order, (start,) if end is None else (start, end))
        for key, *fields in cursor:
            row: Row = tuple(fields)
            if not sound(key, row) or (last is not None and (last >= key) is not reverse):
                raise corrupt(path, f"the row of {key!r} is not what was written")
            last = key
            yield key, row


def write_records(connection: sqlite3.Connection, records: dict[str, bytes | None]) -> None:
    """Write these records of the ledger (None: remove them), inside the open transaction."""
    names = iter(records)
    while some := list(islice(names, RECORDS_AT_ONCE)):  # one statement each: see store.py on the interpreter
        there: list[Any] = []
        gone: list[str] = []
        for name in some:
            value = records[name]
            if value is None:
                gone.append(name)
            else:
                there += (name, value, record_checksum(name, value))
        if there:
            rows = ", ".join(["(?, CAST(? AS TEXT), ?)"] * (len(there) // 3))
            connection.execute(f"INSERT OR REPLACE INTO ledger VALUES {rows}", there)
        if gone:
            connection.execute(f"DELETE FROM ledger WHERE name IN ({', '.join('?' * len(gone))})", gone)
        if len(some) == RECORDS_AT_ONCE:
            time.sleep(PAUSE_S)


def select_records(connection: sqlite3.Connection, path: Path) -> Iterator[tuple[str, bytes]]:
    """The records of the ledger in the order of their names, each one checked. Raises CorruptStore."""
    last = ""
    with errors(path):
        for name, value, crc in connection.execute("SELECT name, CAST(value AS BLOB), crc FROM ledger ORDER BY name"):
            if type(name) is not str or type(value) is not bytes or record_checksum(name, value) != crc or name <= last:
                raise corrupt(path, f"the record {name!r} is not what was written")
            last = name
            yield name, value


def select_chapter(
    connection: sqlite3.Connection, path: Path, after: int, upto: int, *, reverse: bool = False
) -> Chapter | None:
    """A row of the table `history` (annals.chapter), checked. Raises CorruptStore where it is wrong."""
    with errors(path):
        found = annals.chapter(connection, after, upto, reverse=reverse)
    if found is not None and not found.sound:
        raise corrupt(path, f"what it tells of the revisions {found.first} to {found.last} is not what was written")
    return found


def _verify_history(connection: sqlite3.Connection, path: Path, meta: Meta, *, gently: bool) -> None:
    count = total = 0
    last = -1
    while (chapter := select_chapter(connection, path, last, 1 << 62)) is not None:
        if not last < chapter.first <= chapter.last or not meta.kept.floor < chapter.last <= meta.applied:
            raise corrupt(path, f"revision {chapter.first} has no place in its history")
        last = chapter.last
        count += chapter.change_count
        total += chapter.crc
        if gently:
            time.sleep(PAUSE_S)
    if (count, total) != (meta.kept.count, meta.kept.sum):
        raise corrupt(path, f"its history holds {count} sound changes, but not the {meta.kept.count} that were written")


def verify(
    connection: sqlite3.Connection, path: Path, *, gently: bool = False, known: Callable[[], Verified] = Verified
) -> Iterator[tuple[str, ...]]:
    """Walk the whole database and yield its keys, some at a time, once they are known to be right; at the end, that
    nothing is missing. What is `known` of the rows, when all else has been looked at, is not walked again.

    With `gently`, it pauses often, so that other threads get the interpreter. Raises CorruptStore.
    """
    with errors(path):
        connection.execute("BEGIN")
        try:
            check_schema(connection, path)
            meta = read_meta(connection, path)
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise corrupt(path, str(verdict))
            records = 0
            if meta.format != "1":
                for name, value in select_records(connection, path):
                    records += record_checksum(name, value) ** 2
            if meta.format == FORMAT:
                _verify_history(connection, path, meta, gently=gently)
            before = known()
            digest, count = before.digest + records, before.count
            for keys, some in _verified_rows(connection, path, before.last):
                digest += some
                count += len(keys)
                yield keys
                if gently:
                    time.sleep(PAUSE_S)
            if (digest & DIGEST_MASK, count) != (meta.digest, meta.count):
                raise corrupt(path, f"{count} rows are sound, but they are not the {meta.count} that were written")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def verify_early(disk: Disk, path: Path, known: Verified, take: Callable[[tuple[str, ...]], object]) -> Verified:
    """Of a file that is still arriving, whose rest is zeros, verify the rows behind those `known` as far as that goes now.
    `take` is given their keys. Returns what is known then.

    A row that is right stays so. One that is not may be in a page that has yet to come: that is no damage, but the end.
    """
    last, count, digest = known.last, known.count, known.digest
    try:
        with closing(connect(disk, path, frozen=True)) as connection:  # anew: the last one remembers zeros
            for keys, some in _verified_rows(connection, path, last):
                take(keys)
                last, count, digest = keys[-1], count + len(keys), digest + some
    except (CorruptStore, *FAILURES) as error:
        logger.debug("%s is right up to %r so far: %s", path, last, error)
    return Verified(last, count, digest)


def _verified_rows(connection: sqlite3.Connection, path: Path, last: str = "") -> Iterator[tuple[tuple[str, ...], int]]:
    """All keys behind `last` in order, a few hundred at a time, each one's row checked, and what these rows add to the digest.

    SQLite puts together what a checksum is of, and the rest is done for many rows by one call: 1.5 µs a row, where
    `select_rows` takes 2.5.
    """
    cursor = iter(connection.execute(SELECT_CHECKED, (last,)))
    while rows := list(islice(cursor, PAUSE_EVERY_ROWS)):
        keys, said, crcs = zip(*rows, strict=True)
        try:
            sound = all(map(eq, map(crc32, said), crcs)) and last < keys[0] and all(map(lt, keys, keys[1:]))
        except TypeError:  # a row is not even of the right types
            sound = False
        if not sound:
            wrong = [key for key, what, crc in rows if type(what) is not bytes or crc32(what) != crc]
            raise corrupt(path, f"the row of {(wrong or keys)[0]!r} is not what was written")
        last = keys[-1]
        yield keys, sum(map(mul, crcs, crcs))


# ------------------------------------------------------------------ copies


def copy(disk: Disk, source: Path, path: Path) -> Copy:
    """Make `path` a consistent copy of the database `source`, while that one is in use; for a worker thread.

    What is copied is the state that was committed last. The copy is one file, closed, and not fsynced: it is made to be read
    and removed again. Raises ReadOnly, CorruptStore or OSError, and then leaves no file.
    """
    remove_if_there(disk, path)
    remove_side_files(disk, path)
    try:
        touch(disk, path)
        with errors(path), closing(connect(disk, source)) as reader, closing(connect(disk, path)) as writer:
            writer.execute("PRAGMA synchronous=OFF")
            reader.backup(writer)
            writer.execute("PRAGMA journal_mode=DELETE")
            meta = read_meta(writer, path)
        remove_side_files(disk, path)
        return Copy(path, meta, *_size_and_hash(disk, path))
    except BaseException:
        remove_if_there(disk, path)
        remove_side_files(disk, path)
        raise


def source(disk: Disk, database: Path, path: Path) -> Source:
    """The database as it was committed last, to be sent: its own file where it can be kept still, not `hashed` yet, or else a copy of it at
    `path`; for a worker thread. Nobody may write to it during the call. Raises ReadOnly, CorruptStore or OSError."""
    with errors(database):
        still = disk.still(database)
        if still is None:
            return _copied_source(disk, copy(disk, database, path))
        try:
            with closing(connect(disk, database)) as connection:
                meta = read_meta(connection, database)
        except BaseException:
            still.close()
            raise
        return Source(meta, still.size_bytes, "", still.read, still.close, True)


def hashed(source: Source) -> str:
    """The SHA-256 of what `source` reads; for a worker thread. Raises OSError."""
    return _hash(source.read, source.size_bytes)


def spared(disk: Disk, still: Source, path: Path) -> Source:
    """The same bytes as `still`, which may then be closed, in a file at `path`; for a worker thread. Raises OSError, and then
    leaves no file."""
    try:
        handle = disk.open(path)
        try:
            disk.truncate(handle, 0)
            for offset in range(0, still.size_bytes, COPIED_BYTES):
                write_all(disk, handle, still.read(COPIED_BYTES, offset), offset)
        finally:
            disk.close(handle)
    except BaseException:
        remove_if_there(disk, path)
        raise
    return _copied_source(disk, Copy(path, still.meta, still.size_bytes, still.sha256))


def _copied_source(disk: Disk, copied: Copy) -> Source:
    handle = disk.open_to_read(copied.path)

    def close() -> None:
        disk.close(handle)
        remove_if_there(disk, copied.path)

    read = partial(disk.pread, handle)
    return Source(copied.meta, copied.size_bytes, copied.sha256, read, close, False)


def check_copy(
    disk: Disk,
    path: Path,
    take: Callable[[tuple[str, ...]], object] | None = None,
    known: Callable[[], Verified] = Verified,
) -> Meta:
    """Make sure that the file at `path`, received from elsewhere, is a whole and right database; for a worker thread. `take`,
    where there is one, is given its keys, some at a time, but for those of the rows that are `known` to be right. Returns which state it is. Raises CorruptStore, StartupError or OSError."""
    with errors(path), closing(connect(disk, path, frozen=True)) as connection:
        for keys in verify(connection, path, known=known):  # not gently: who needs it serves nobody meanwhile
            if take is not None:
                take(keys)
        return read_meta(connection, path)


def _size_and_hash(disk: Disk, path: Path) -> tuple[int, str]:
    """The file's bytes, and their SHA-256."""
    handle = disk.open_to_read(path)
    try:
        size_bytes = disk.size(handle)
        return size_bytes, _hash(partial(disk.pread, handle), size_bytes)
    finally:
        disk.close(handle)


def _hash(read: Callable[[int, int], bytes], size_bytes: int) -> str:
    sha256 = hashlib.sha256()
    for offset in range(0, size_bytes, HASHED_BYTES):
        sha256.update(read(HASHED_BYTES, offset))
    return sha256.hexdigest()
