"""The rows of the state machine: changed ones in memory, all of them in a SQLite file that checkpoints bring up to date.

Laws:

* A write touches memory only. What is on disk is always the state at one log index, whole: that of the last
  checkpoint. The log holds what came after.
* A crash at any point leaves the previous checkpoint or the new one.
* No row is served from the file before its checksum has been compared.

Theory. Reads look through layers, the newest first:

    changed    since the last checkpoint began        a Layer, written to by the machine
    flushing   what the checkpoint under way writes    a Layer, no longer changed
    cache      lately written or read                  bounded; the file says the same
    file       everything as of the last checkpoint    a filter in memory spares most look-ups of new keys

A checkpoint takes three steps. `begin_checkpoint`, on the loop thread, turns `changed` into `flushing`, which takes
no time whatever the size. `Checkpoint.write`, on a worker thread, writes these rows and the index they belong to
in one transaction. `finish_checkpoint`, on the loop thread again, gives the rows to the cache. When `write` has
failed, `abandon_checkpoint` keeps `flushing` readable, and the next checkpoint includes it. So a checkpoint costs
what has changed, and a start costs the log since the last one.

The worker and the loop thread share one interpreter, in which only one of them runs at a time. So the worker
hands SQLite 500 rows with one statement, during which it doesn't hold the interpreter (a statement for each row
would fight for it 500 times), and sorts the keys in slices, pausing in between. Sorted keys let SQLite fill one page after another
instead of seeking each.

What is sent to another member is the file itself: a reader keeps it as it is meanwhile, and checkpoints wait in SQLite's
write-ahead log, where they are as durable and as readable, and are moved with the first one after it.

Threads: everything belongs to the loop thread, but for `Checkpoint.write`, `source` and `verify`, which open
their own connection, and of which one runs at a time.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from bisect import bisect_right
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from ddb import annals, snapshot
from ddb.chronicle import Extract, Record
from ddb.disk import Disk, OsDisk, file_bytes, touch
from ddb.errors import Compacted, ReadOnly, StartupError, invariant
from ddb.kv import Row
from ddb.layers import UNKNOWN, Cache, KeyFilter, Layer, Rows, merged
from ddb.ledger import Ledger, Records
from ddb.messages import Configuration
from ddb.migration import migrate
from ddb.snapshot import Meta, Source, corrupt, errors, translated

logger = logging.getLogger(__name__)

POINT: Final = "SELECT CAST(value AS BLOB), rev, created, version, crc FROM kv WHERE key = ?"
MANY: Final = "SELECT key, CAST(value AS BLOB), rev, created, version, crc FROM kv WHERE key IN"
PREFETCHED_AT_ONCE: Final = 512
ROW_FIELDS: Final = 6
STATEMENT_ROWS: Final = 500  # 3,000 variables; SQLite allows 32,766
STATEMENT_BYTES_MAX: Final = 4 << 20  # SQLite copies what is bound to a statement
SORTED_KEYS_MAX: Final = 2000  # sorted in one go, about: a millisecond without giving up the interpreter
SLICE_KEYS: Final = 1000  # handled without a pause: some 0.3 ms
OVERSAMPLING: Final = 8
WRITER_CACHE_KIB: Final = 16 << 10
READER_CACHE_KIB: Final = 8 << 10  # the inner pages of some two million rows; with 2 MiB, a look-up took twice the time
HELD_PAUSE_S: Final = 0.05

_ONE_ROW = "(?, CAST(? AS TEXT), ?, ?, ?, ?)"
INSERT_ONE: Final = f"INSERT OR REPLACE INTO kv VALUES {_ONE_ROW}"
INSERT_MANY: Final = f"INSERT OR REPLACE INTO kv VALUES {', '.join([_ONE_ROW] * STATEMENT_ROWS)}"
DELETE_ONE: Final = "DELETE FROM kv WHERE key = ?"


class Store:
    """A kv.Table kept in the file `path`. Made by `Store.open`; `close()` may be called twice.

    `meta` is the last checkpoint that is durable. `key_count` is how many keys there are now, `ledger` what is remembered
    beside them, and `digest` the digest of both, which the machine keeps up to date. `disk` is where the file is.
    """

    def __init__(self, path: Path, disk: Disk, cache_bytes_max: int) -> None:
        self.path = path
        self.disk = disk
        self.meta = Meta()
        self.digest = 0
        self.key_count = 0
        self.cold = False
        self._on_disk = False  # whether the file has any row
        self._filter: KeyFilter | None = None
        self._cache_bytes_max = cache_bytes_max
        self._working = threading.Lock()
        self._verifying = False
        self._ending = False
        self.held = False  # by a source that is sent: the file must not change
        self.waiting_checkpoints = 0  # in the write-ahead log because of that
        self._checkpoint: Checkpoint | None = None
        self._flushing: Layer | None = None
        self._reader: sqlite3.Connection | None = None
        self._load()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        disk: Disk | None = None,
        cache_bytes_max: int = 256 << 20,
        verified_at_open_bytes_max: int = 32 << 20,
    ) -> Store:
        """Open the store in the file `path`, or make an empty one where there is no file.

        A file of at most `verified_at_open_bytes_max` bytes (some 0.15 s) is verified before this returns. A larger
        one should be, by `verify` on a worker thread: until then, a row that rotted away looks like a key that isn't there.
        `cache_bytes_max` bounds the memory for rows that are on disk, too.

        Raises CorruptStore for a damaged file; StartupError where it can't be opened, or belongs to a later version;
        ReadOnly or OSError from the disk.
        """
        path, disk = Path(path), disk or OsDisk()
        try:
            if not disk.exists(path):
                snapshot.create(disk, path)
            touch(disk, path)  # SQLite would open a write-protected file, and fail at the first checkpoint
            size_bytes = file_bytes(disk, path)  # asked later, it would cost SQLite its lock: see Disk.database
        except OSError as error:
            raise snapshot.not_writable(path, error) from error
        store = cls(path, disk, cache_bytes_max)
        try:
            if size_bytes <= verified_at_open_bytes_max:
                store._verify(gently=False)
        except BaseException:
            store.close()
            raise
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"store applied={self.meta.applied} keys={self.key_count} changed={len(self._changed.rows)}"

    def close(self) -> None:
        """Close the file. What has changed since the last checkpoint is not written: the log has it."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # ------------------------------------------------------------ kv.Table

    def row(self, key: str) -> Row | None:
        """The row under `key`, or None. Raises CorruptStore."""
        row = self.recent.get(key, UNKNOWN)
        if row is UNKNOWN:
            if self._flushing is not None:
                row = self._flushing.rows.get(key, UNKNOWN)
            if row is UNKNOWN:
                row = self._cache.get(key)
                if row is UNKNOWN:
                    return self._row_on_disk(key)
        return row  # type: ignore[no-any-return]

    def prefetch(self, keys: Collection[str]) -> None:
        """Have the rows of `keys` in memory, as far as they are on disk alone. Raises CorruptStore."""
        on_disk = [key for key in keys if self._known(key) is UNKNOWN and self._may_be_on_disk(key)]
        on_disk.sort()
        self.cold = bool(on_disk)
        for first in range(0, len(on_disk), PREFETCHED_AT_ONCE):
            some = on_disk[first : first + PREFETCHED_AT_ONCE]
            with errors(self.path):
                found = self._connection.execute(*_select_many(some)).fetchall()
            rows = {key: self._sound(key, tuple(fields)) for key, *fields in found}
            for key in some:
                self._cache.add(key, rows.get(key))  # None: it is not there

    def put(self, key: str, row: Row, old: Row | None) -> None:
        """Store `row` under `key`, in the place of `old`, which is what `row(key)` returned just now."""
        if old is None:
            self.key_count += 1
        self._changed.put(key, row, old)

    def remove(self, key: str, old: Row) -> None:
        """Remove `key`; `old` is what `row(key)` returned just now."""
        self.key_count -= 1
        self._changed.put(key, None, old)

    def grown(self, by_bytes: int) -> None:
        """Values that were replaced in `recent` are longer by so many bytes than those before, together."""
        self._changed.bytes += by_bytes

    def rows(self, start: str = "", end: str | None = None, reverse: bool = False) -> Iterator[tuple[str, Row]]:
        """The keys from `start` up to and without `end` (None: to the last) with their rows, in order or backwards.

        To be used up, or dropped, before the next change: it reads the file row by row as it is asked to. Raises
        CorruptStore on the way.
        """
        stream: Iterator[tuple[str, Row | None]] = iter(())
        if self._on_disk:
            stream = snapshot.select_rows(self._connection, self.path, start, end, reverse)
        for layer in (self._flushing, self._changed):
            if layer is not None and layer.rows:
                stream = merged(layer.ordered(start, end, reverse), stream, reverse)
        return ((key, row) for key, row in stream if row is not None)

    def count(self, start: str = "", end: str | None = None) -> int:
        """How many keys `rows(start, end)` has. At once for all keys; for a part, SQLite counts 1 M rows in some 0.1 s."""
        if start == "" and end is None:
            return self.key_count
        applied, count = self._count_on_disk(start, end)
        if self._flushing is not None and applied == self.meta.applied:
            count += self._flushing.growth(start, end)  # not yet in the file
        return count + self._changed.growth(start, end)

    # ------------------------------------------------------ chronicle.Past

    @property
    def history_floor(self) -> int:
        """The file has all changes behind this revision."""
        return self.meta.kept.floor

    @property
    def history_last(self) -> int:
        """The file has all changes up to this revision."""
        return self.meta.applied

    def history(
        self, after: int, upto: int, start: str = "", end: str | None = None, reverse: bool = False
    ) -> Iterator[Record]:
        """See chronicle.Past. What is read in one go is at most a chapter."""
        low, high = after, upto
        while (chapter := self._chapter(after, low, high, reverse)) is not None:
            records = chapter.records(start, end)
            for record in reversed(list(records)) if reverse else records:
                if after < record[0] <= upto:
                    yield record
            low, high = (low, chapter.first - 1) if reverse else (chapter.last, high)

    def _chapter(self, after: int, low: int, high: int, reverse: bool) -> annals.Chapter | None:
        """The chapter to go on with, if the file still has all behind `after`: a worker may have dropped the oldest."""
        connection = self._connection
        with errors(self.path):
            connection.execute("BEGIN")
            try:
                floor = snapshot.read_meta(connection, self.path).kept.floor
                if after < floor:
                    raise Compacted(f"What was before revision {floor + 1} is not kept any more.", oldest=floor + 1)
                return snapshot.select_chapter(connection, self.path, low, high, reverse=reverse)
            finally:
                connection.execute("ROLLBACK")

    # --------------------------------------------------------- checkpoints

    @property
    def changed_bytes(self) -> int:
        """About how much memory the rows take that no checkpoint has taken up: the measure of when to begin one."""
        waiting = self._flushing.bytes if self._flushing is not None and self._checkpoint is None else 0
        return self._changed.bytes + waiting

    @property
    def checkpointing(self) -> bool:
        """Whether a checkpoint has begun and is neither finished nor abandoned."""
        return self._checkpoint is not None

    def begin_checkpoint(
        self, applied: int, term: int, configuration: Configuration | None, extract: Extract | None = None
    ) -> Checkpoint:
        """Take all changes so far as the state after the entry `applied`, which is of `term`, when `configuration` held.

        `extract` is what is to be kept of history (nothing when left out). Quick; the returned checkpoint is then to be written by a worker thread.
        """
        invariant(self._checkpoint is None, "one checkpoint at a time")
        invariant(applied >= self.meta.applied, "a checkpoint doesn't go back")
        layer = self._changed if self._flushing is None else self._flushing.under(self._changed)
        self._flushing = layer
        self._renew_changed()
        meta = Meta(applied, term, configuration, self.digest, self.key_count)
        self._on_disk = self._on_disk or bool(layer.rows)
        self._checkpoint = Checkpoint(
            self, meta, layer, self.ledger.take_changes(), extract or Extract([], applied, 0)
        )  # fmt: skip
        return self._checkpoint

    def finish_checkpoint(self, checkpoint: Checkpoint) -> None:
        """`checkpoint.write()` has returned: from now on the file answers for its rows."""
        invariant(checkpoint is self._checkpoint and self._flushing is not None, "the checkpoint under way is finished")
        self.meta = checkpoint.meta
        layer, self._flushing, self._checkpoint = self._flushing, None, None
        if layer is not None:
            self._cache.absorb(layer)

    def abandon_checkpoint(self, checkpoint: Checkpoint) -> None:
        """`checkpoint.write()` has raised: its rows stay in memory, and the next checkpoint includes them.

        Where the failure came after the commit, the checkpoint counts as finished.
        """
        invariant(checkpoint is self._checkpoint, "the checkpoint under way is abandoned")
        with errors(self.path):
            meta = snapshot.read_meta(self._connection, self.path)
        if meta == checkpoint.meta:
            checkpoint.meta = meta  # it also says what was kept of history
            self.finish_checkpoint(checkpoint)
        else:
            self._checkpoint = None
            self.ledger.give_back(checkpoint.records)

    # ----------------------------------------------------- the whole file

    def source(self, path: Path) -> Source:
        """The last checkpoint, to be sent; for a worker thread. Until the source is closed, checkpoints stay in the
        write-ahead log where it is `still`. Otherwise it is a copy at `path`. Raises ReadOnly, CorruptStore or OSError."""
        with self.working():
            found = snapshot.source(self.disk, self.path, path)
        if not found.still:
            return found
        self.waiting_checkpoints = 0
        self.held = True

        def close() -> None:
            self.held = False
            found.close()

        return replace(found, close=close)

    def install(self, received: str | Path, keys: KeyFilter | None = None) -> None:
        """Put the file `received`, which `Arrival.finish` has passed, in the place of this one, and forget all rows.
        `keys` are those that it found; without them, the file is to be verified again.

        No worker may be at work on this store. A crash at any point leaves the old file or the new one. Afterwards the
        state is that of the new `meta`. Raises CorruptStore, StartupError or OSError; the store is then closed.
        """
        invariant(self._checkpoint is None, "no checkpoint is under way when a snapshot is installed")
        free = not self._verifying and self._working.acquire(blocking=False)
        invariant(free, "no worker has the file open when a snapshot is installed")
        try:
            with errors(self.path):
                (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise StartupError(f"Another program reads the snapshot {self.path}; end it first.")
            self.close()
            snapshot.put_in_place(self.disk, Path(received), self.path)
            self._load()
            self._filter = self._filter if keys is None else keys
        finally:
            self._working.release()

    def verify(self) -> Meta:
        """Read the whole file and compare every checksum; for a worker thread, on which it pauses often, and as long as the file is
        being sent and no checkpoint waits.

        Returns the state that was verified. Raises CorruptStore, naming the first bad key.
        """
        self._verifying = True  # beside which the file may be sent: neither changes it
        try:
            return self._verify(gently=True)
        finally:
            self._verifying = False

    @property
    def verified(self) -> bool:
        """Whether the file has been read whole, and was right, since it was opened."""
        return self._filter is not None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within it, a worker thread has the file open."""
        with self._working:
            yield

    def end_work(self) -> None:
        """Have whoever writes a checkpoint, or verifies the file, give that up at the next few rows: the process is about to
        end, and what it writes is in the log."""
        self._ending = True

    def go_on(self) -> None:
        """Called by a worker every few rows. Raises ReadOnly after `end_work`."""
        if self._ending:
            raise ReadOnly(f"The node ends, so its work on the snapshot {self.path} is given up.")

    def note_on_disk(self, keys: list[str]) -> None:
        """The worker is about to write `keys` to the file."""
        if self._filter is not None:
            self._filter.add(keys)

    # ------------------------------------------------------------- within

    @property
    def _connection(self) -> sqlite3.Connection:
        invariant(self._reader is not None, "a closed store is not used")
        assert self._reader is not None
        return self._reader

    def _load(self) -> None:
        """Open the file and forget everything else."""
        self._flushing = None
        self._renew_changed()
        self._cache = Cache(self._cache_bytes_max, _let_go)
        with errors(self.path):
            self._reader = snapshot.connect(self.disk, self.path)
            try:
                snapshot.check_schema(self._reader, self.path)
                self._reader.execute("PRAGMA journal_mode=WAL")
                self._reader.execute(f"PRAGMA cache_size=-{READER_CACHE_KIB}")
                migrate(self._reader, self.path)
                self.meta = snapshot.read_meta(self._reader, self.path)
                self.ledger = Ledger(dict(snapshot.select_records(self._reader, self.path)))
                (some,) = self._reader.execute("SELECT EXISTS (SELECT 1 FROM kv)").fetchone()
            except BaseException:
                self.close()
                raise
        if bool(some) is not bool(self.meta.count):
            self.close()
            raise corrupt(self.path, f"it should hold {self.meta.count} keys")
        self.digest, self.key_count = self.meta.digest, self.meta.count
        self._on_disk = bool(some)
        self._filter = None if some else KeyFilter(0)

    def _renew_changed(self) -> None:
        self._changed = Layer()
        self.recent: Rows = self._changed.rows

    def _known(self, key: str) -> Any:
        """What memory says of `key`; see `row`, which does the same without a call more."""
        row = self.recent.get(key, UNKNOWN)
        if row is UNKNOWN and self._flushing is not None:
            row = self._flushing.rows.get(key, UNKNOWN)
        return self._cache.get(key) if row is UNKNOWN else row

    def _may_be_on_disk(self, key: str) -> bool:
        return self._on_disk and (self._filter is None or self._filter.may_hold(key))

    def _row_on_disk(self, key: str) -> Row | None:
        if not self._may_be_on_disk(key):
            return None
        try:
            fields = self._connection.execute(POINT, (key,)).fetchone()
        except snapshot.FAILURES as error:
            raise translated(error, self.path) from error
        self.cold = True
        if fields is None:
            return None
        row = self._sound(key, fields)
        self._cache.add(key, row)
        return row

    def _sound(self, key: str, fields: tuple[Any, ...]) -> Row:
        """`fields` as a row, where they are what was written under `key`. Raises CorruptStore."""
        if not snapshot.sound(key, fields):
            raise corrupt(self.path, f"the row of {key!r} is not what was written")
        return fields

    def _count_on_disk(self, start: str, end: str | None) -> tuple[int, int]:
        """The index that the file is at, and how many keys of the range it has then."""
        sql = "SELECT count(*) FROM kv WHERE key >= ?" + ("" if end is None else " AND key < ?")
        connection = self._connection
        with errors(self.path):
            connection.execute("BEGIN")
            try:
                applied = snapshot.read_meta(connection, self.path).applied
                (count,) = connection.execute(sql, (start,) if end is None else (start, end)).fetchone()
            finally:
                connection.execute("ROLLBACK")
        return applied, count

    def _verify(self, *, gently: bool) -> Meta:
        with errors(self.path), closing(snapshot.connect(self.disk, self.path)) as connection:
            meta = snapshot.read_meta(connection, self.path)
            found = KeyFilter(meta.count)
            for keys in snapshot.verify(connection, self.path, gently=gently):
                found.add(keys)
                self.go_on()
                while (
                    gently and self.held and not self.checkpointing
                ):  # a member waits for what is sent, nobody for this
                    time.sleep(HELD_PAUSE_S)
                    self.go_on()
        self._filter = found
        return meta


class Checkpoint:
    """One checkpoint under way: the rows of `layer`, the ledger's `records`, and an `extract` of the chronicle, to be
    written as the state `meta`."""

    def __init__(self, store: Store, meta: Meta, layer: Layer, records: Records, extract: Extract) -> None:
        self.meta = meta
        self._extract = extract
        self.records = records
        self._store = store
        self._layer = layer

    def __repr__(self) -> str:
        return f"checkpoint applied={self.meta.applied} rows={len(self._layer.rows)}"

    def write(self) -> None:
        """Write the rows and the state in one transaction, durably; for a worker thread.

        Raises ReadOnly for a full disk: the checkpoint is then to be abandoned, and another may succeed later. Raises
        CorruptStore or OSError where the file can't be used any more.
        """
        started = time.monotonic()
        store = self._store
        with (
            store.working(), errors(store.path), store.disk.flushing(store.path),
            closing(snapshot.connect(store.disk, store.path)) as connection,
        ):  # fmt: skip
            connection.execute(f"PRAGMA cache_size=-{WRITER_CACHE_KIB}")
            self._commit(connection)
            if store.held:
                store.waiting_checkpoints += 1
            else:
                self._empty_wal(connection)
        logger.info("%r written in %.3f s", self, time.monotonic() - started)

    def _commit(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            for keys in sorted_slices(self._layer.rows):
                self._write_rows(connection, keys)
            snapshot.write_records(connection, self.records)
            self.meta = replace(self.meta, kept=annals.write(connection, self._extract))
            snapshot.write_meta(connection, self.meta)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _write_rows(self, connection: sqlite3.Connection, keys: list[str]) -> None:
        rows = self._layer.rows
        present = [key for key in keys if rows[key] is not None]
        self._store.note_on_disk(present)
        for first in range(0, len(present), STATEMENT_ROWS):
            self._store.go_on()
            some = present[first : first + STATEMENT_ROWS]
            fields: list[Any] = []
            for key in some:
                fields.append(key)
                fields += rows[key] or ()
            if len(some) == STATEMENT_ROWS and sum(map(len, fields[1::ROW_FIELDS])) <= STATEMENT_BYTES_MAX:
                connection.execute(INSERT_MANY, fields)
            else:
                connection.executemany(INSERT_ONE, zip(*[iter(fields)] * ROW_FIELDS))
        if len(present) != len(keys):
            connection.executemany(DELETE_ONE, [(key,) for key in keys if rows[key] is None])

    def _empty_wal(self, connection: sqlite3.Connection) -> None:
        """Move what was committed from the write-ahead log into the database, where it is durable, too.

        A full disk is no failure here: the commit is durable in the write-ahead log, and the next checkpoint tries again.
        """
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            logger.warning("The disk is full: %s-wal stays until some space is free.", self._store.path)


def _select_many(keys: list[str]) -> tuple[str, list[str]]:
    """A statement for the rows of `keys`, and its variables: as many as the next power of two, for sqlite3 keeps compiled
    statements by their texts, and to compile one costs as much as to look up five keys."""
    count = 1
    while count < len(keys):
        count *= 2
    return f"{MANY} ({','.join('?' * count)})", keys + keys[-1:] * (count - len(keys))


def sorted_slices(rows: Rows) -> Iterator[list[str]]:
    """The keys of `rows`, sorted, in lists of a few thousand; never long without giving up the interpreter.

    A sample of the keys, sorted, says where to cut; each key goes into its slice, and each slice is sorted alone.
    """
    rest = iter(rows)
    chunks: list[list[str]] = []
    while chunk := list(islice(rest, SLICE_KEYS)):
        chunks.append(chunk)
        _pause(chunk)
    sample = sorted(key for chunk in chunks for key in chunk[:: SORTED_KEYS_MAX // OVERSAMPLING])
    pivots = sample[OVERSAMPLING - 1 :: OVERSAMPLING]
    slices: list[list[str]] = [[] for _ in range(len(pivots) + 1)]
    for chunk in chunks:
        for key in chunk:
            slices[bisect_right(pivots, key)].append(key)
        _pause(chunk)
    for some in slices:
        some.sort()
        yield some


def _pause(keys: list[str]) -> None:
    if len(keys) == SLICE_KEYS:
        time.sleep(snapshot.PAUSE_S)


def _let_go(rows: Rows) -> None:
    """Free `rows` a few at a time: to free a dict of a million takes the interpreter for 0.1 s."""
    if len(rows) > SLICE_KEYS:
        threading.Thread(target=_free, args=(rows,), name="ddb-free", daemon=True).start()


def _free(rows: Rows) -> None:
    while rows:
        for _ in range(min(len(rows), SLICE_KEYS)):
            rows.popitem()
        time.sleep(snapshot.PAUSE_S)
