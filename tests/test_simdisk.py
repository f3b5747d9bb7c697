"""The simulated disk is as unkind as a real one may be, and no more; and a database on it is SQLite's."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddb import snapshot
from ddb.arrival import Arrival
from ddb.datadir import DataDirectory
from ddb.disk import OsDisk, fsync_directory, read_file, remove_if_there, replace_durably, write_all
from ddb.errors import CorruptStore, ReadOnly, StartupError
from ddb.kv import checksum
from ddb.registry import MemoryFile
from ddb.roster import Memory
from ddb.simdisk import Crash, SimConnection, SimDisk
from ddb.store import Store
from tests.harness import REPOSITORY

HOME = Path("/data/n1")
FILE = HOME / "file"
BASE = HOME / "state.db"
SEEDS = range(60)


made: list[SimDisk] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What a test leaves open is closed behind it."""
    yield
    while made:
        made.pop().wipe()


def home() -> SimDisk:
    disk = SimDisk()
    disk.make_directory(HOME)
    made.append(disk)
    return disk


def synced(disk: SimDisk, content: bytes, path: Path = FILE) -> int:
    """A file that holds `content`, and its name, durably; returns its handle."""
    handle = disk.open(path)
    write_all(disk, handle, content, 0)
    disk.fdatasync(handle)
    fsync_directory(disk, path.parent)
    return handle


def after_crashes(work: Callable[[SimDisk], object], path: Path = FILE) -> set[bytes | None]:
    """What the file at `path` may hold when the machine goes down after `work`; None where it is not there."""
    found: set[bytes | None] = set()
    for seed in SEEDS:
        disk = home()
        work(disk)
        disk.crash(random.Random(seed))
        found.add(disk.content(path) if disk.exists(path) else None)
    return found


# ------------------------------------------------------------- files


def test_what_was_synced_survives_every_crash() -> None:
    assert after_crashes(lambda disk: synced(disk, b"kept")) == {b"kept"}


def test_what_was_not_synced_survives_wholly_in_part_or_not_at_all() -> None:
    def work(disk: SimDisk) -> None:
        disk.pwrite(synced(disk, b"a" * 48), b"b" * 48, 0)

    found = after_crashes(work)
    assert {b"a" * 48, b"b" * 48} < found
    assert b"a" * 16 + b"b" * 16 + b"a" * 16 in found, "in any order"
    assert all(content and len(set(content[i : i + 16])) == 1 for content in found for i in (0, 16, 32))


def test_a_length_may_survive_without_its_bytes() -> None:
    found = after_crashes(lambda disk: disk.pwrite(synced(disk, b"a" * 16), b"b" * 16, 16))
    assert found == {b"a" * 16, b"a" * 16 + bytes(16), b"a" * 16 + b"b" * 16}


def test_bytes_that_were_cut_off_do_not_come_back_by_a_sync() -> None:
    disk = home()
    handle = synced(disk, b"a" * 20)
    disk.truncate(handle, 4)
    disk.pwrite(handle, b"b", 30)
    disk.fdatasync(handle)
    assert disk.names[FILE].durable == b"aaaa" + bytes(26) + b"b"


def test_a_name_that_was_not_synced_may_be_lost() -> None:
    def work(disk: SimDisk) -> None:
        handle = disk.open(FILE)
        disk.pwrite(handle, b"x", 0)
        disk.fdatasync(handle)

    assert after_crashes(work) == {None, b"x"}


def test_a_rename_without_a_sync_of_the_directory_may_be_undone() -> None:
    def work(disk: SimDisk) -> None:
        synced(disk, b"old")
        synced(disk, b"new", HOME / "beside")
        disk.rename(HOME / "beside", FILE)

    assert after_crashes(work) == {b"old", b"new"}

    def synced_work(disk: SimDisk) -> None:
        work(disk)
        fsync_directory(disk, HOME)

    assert after_crashes(synced_work) == {b"new"}


def test_a_removal_without_a_sync_of_the_directory_may_be_undone() -> None:
    def work(disk: SimDisk) -> None:
        synced(disk, b"x")
        disk.remove(FILE)

    assert after_crashes(work) == {None, b"x"}


def test_a_file_in_a_directory_that_is_not_there_is_refused() -> None:
    with pytest.raises(FileNotFoundError):
        SimDisk().open(FILE)
    with pytest.raises(FileNotFoundError):
        home().open_to_read(FILE)
    with pytest.raises(FileNotFoundError):
        home().remove(FILE)


def test_a_directory_lists_files_and_directories_sorted() -> None:
    disk = home()
    for name in ("b", "a", "log/00000001.log"):
        disk.put(HOME / name, b"")
    assert disk.list(HOME) == ["a", "b", "log"]
    assert disk.exists(HOME / "log") and not disk.exists(HOME / "c")


def test_replacing_durably_leaves_the_old_or_the_new_at_every_crash() -> None:
    found: list[bytes] = []
    for crash_at in range(20):
        for seed in range(10):
            disk = home()
            replace_durably(disk, FILE, b"the old content, of some sectors")
            disk.changes, disk.crash_at = 0, crash_at
            with contextlib.suppress(Crash):
                replace_durably(disk, FILE, b"the new content, of some sectors")
            disk.crash(random.Random(seed))
            found.append(read_file(disk, FILE)[4:7])
    assert set(found) == {b"old", b"new"}


# ------------------------------------------------------ crash and restart


def test_a_disk_that_is_down_refuses_everything_until_it_is_up() -> None:
    disk = home()
    handle = synced(disk, b"x")
    directory = disk.open_directory(HOME)
    connection = database(disk)
    disk.crash_at = disk.changes
    with pytest.raises(Crash):
        disk.truncate(handle, 0)
    before = disk.changes
    for attempt in (
        lambda: disk.open(FILE), lambda: disk.pwrite(handle, b"y", 0), lambda: disk.pread(handle, 1, 0),
        lambda: disk.fdatasync(handle), lambda: disk.size(handle), lambda: disk.rename(FILE, BASE),
        lambda: disk.remove(FILE), lambda: remove_if_there(disk, FILE), lambda: disk.list(HOME),
        lambda: disk.exists(FILE), lambda: disk.fsync_dir(directory), lambda: disk.close(handle),
        lambda: disk.lock(FILE), lambda: disk.database(FILE), lambda: connection.execute("SELECT 1"),
        lambda: connection.executemany("INSERT INTO t VALUES (?)", [(1,)]), lambda: connection.backup(connection),
        lambda: disk.make_directory(HOME / "log"), lambda: disk.open_to_read(FILE), lambda: disk.drop_cache(handle),
    ):  # fmt: skip
        with pytest.raises(Crash):
            attempt()
    connection.close()
    assert disk.changes == before
    disk.crash(random.Random(1))
    assert disk.content(FILE) == b"x"


def test_a_hook_may_take_the_disk_down_before_a_change() -> None:
    seen: list[tuple[str, str]] = []

    def on_change(operation: str, path: Path) -> None:
        seen.append((operation, path.name))
        if operation == "rename":
            raise Crash

    disk = home()
    disk.on_change = on_change
    with pytest.raises(Crash):
        replace_durably(disk, FILE.with_suffix(".json"), b"x")
    assert seen == [
        ("open", "file.new"), ("truncate", "file.new"), ("pwrite", "file.new"),
        ("fdatasync", "file.new"), ("rename", "file.json"),
    ]  # fmt: skip
    assert disk.down


def test_a_write_cut_short_by_a_crash_may_be_there() -> None:
    def work(disk: SimDisk) -> None:
        handle = synced(disk, b"")
        disk.crash_at = disk.changes
        with pytest.raises(Crash):
            disk.pwrite(handle, b"x" * 16, 0)

    assert after_crashes(work) == {b"", bytes(16), b"x" * 16}


def test_a_process_that_restarts_sees_what_was_written_and_a_later_crash_may_still_lose_it() -> None:
    disk = home()
    handle = synced(disk, b"a" * 16)
    disk.pwrite(handle, b"b" * 16, 0)
    disk.restart(random.Random(1))
    assert disk.content(FILE) == b"b" * 16
    assert disk.names[FILE].durable == b"a" * 16
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.pwrite(handle, b"c", 0)


@pytest.mark.parametrize("ending", ["close", "restart", "crash"])
def test_a_lock_ends_with_its_process(ending: str) -> None:
    disk = home()
    handle = disk.lock(HOME / "lock")
    with pytest.raises(BlockingIOError):
        disk.lock(HOME / "lock")
    if ending == "close":
        disk.close(handle)
    else:
        getattr(disk, ending)(random.Random(1))
    disk.lock(HOME / "lock")


def test_a_wiped_disk_is_empty() -> None:
    disk = home()
    disk.room_bytes = 100
    synced(disk, b"x" * 60)
    disk.wipe()
    assert not disk.exists(FILE) and not disk.exists(HOME)
    assert disk.room_bytes == 100


# -------------------------------------------------------------- failures


def test_a_failed_fdatasync_loses_what_the_next_one_calls_durable() -> None:
    disk = home()
    handle = synced(disk, b"a" * 16)
    disk.fail("fdatasync", errno.EIO, times=1)
    disk.pwrite(handle, b"b" * 32, 0)
    with pytest.raises(OSError, match="fdatasync"):
        disk.fdatasync(handle)
    disk.fdatasync(handle)
    assert disk.content(FILE) == b"b" * 32, "it is still to be seen"
    disk.restart(random.Random(1))
    assert disk.content(FILE) == b"b" * 32, "also by the next process"
    disk.crash(random.Random(1))
    assert disk.content(FILE) == b"a" * 16 + bytes(16), "but it is not on the disk"


def test_a_failed_fdatasync_may_lose_a_part() -> None:
    found = set()
    for seed in SEEDS:
        disk = SimDisk(random.Random(seed))
        disk.put(FILE, b"a" * 48)
        handle = disk.open(FILE)
        disk.pwrite(handle, b"b" * 48, 0)
        disk.fail("fdatasync", errno.EIO)
        with pytest.raises(OSError):
            disk.fdatasync(handle)
        found.add(bytes(disk.names[FILE].durable))
    assert {b"a" * 48, b"b" * 48} < found


def test_reading_past_the_cache_shows_what_a_failed_fdatasync_lost_and_keeps_what_is_still_to_be_written() -> None:
    disk = home()
    handle = synced(disk, b"a" * 16)
    disk.fail("fdatasync", errno.EIO, times=1)
    disk.pwrite(handle, b"b" * 16, 8)
    with pytest.raises(OSError):
        disk.fdatasync(handle)
    disk.pwrite(handle, b"c" * 4, 12)
    disk.drop_cache(handle)
    assert disk.content(FILE) == b"a" * 12 + b"c" * 4 + bytes(8)


def test_only_the_call_that_is_meant_fails() -> None:
    disk = home()
    one, other = synced(disk, b"", HOME / "1.log"), synced(disk, b"", HOME / "identity.json")
    disk.fail("fdatasync", errno.EIO, path="*.log", nth=3, times=2)
    failed = []
    for i in range(1, 7):
        disk.fdatasync(other)
        try:
            disk.fdatasync(one)
        except OSError as error:
            failed.append((i, error.errno, error.filename))
    assert failed == [(3, errno.EIO, str(HOME / "1.log")), (4, errno.EIO, str(HOME / "1.log"))]


def test_a_full_disk_takes_what_fits_and_gets_back_what_is_freed() -> None:
    disk = home()
    disk.room_bytes = 10
    handle = disk.open(FILE)
    assert disk.pwrite(handle, b"x" * 8, 0) == 8
    assert disk.pwrite(handle, b"y" * 8, 4) == 6
    with pytest.raises(OSError, match="No space left"):
        disk.pwrite(handle, b"z", 10)
    assert disk.pwrite(handle, b"z" * 10, 0) == 10, "what was written before can be written over"
    disk.truncate(handle, 6)
    assert disk.room_bytes == 4
    disk.remove(FILE)
    assert disk.room_bytes == 10


def test_one_flipped_bit_is_one_and_outlives_a_crash() -> None:
    disk = home()
    synced(disk, b"some content")
    offset = disk.flip(FILE, random.Random(3))
    assert offset is not None
    damaged = disk.content(FILE)
    assert [i for i in range(12) if damaged[i] != b"some content"[i]] == [offset]
    assert (damaged[offset] ^ b"some content"[offset]).bit_count() == 1
    disk.crash(random.Random(3))
    assert disk.content(FILE) == damaged
    synced(disk, b"", HOME / "empty")
    assert disk.flip(HOME / "empty", random.Random(3)) is None


def test_a_bit_flipped_under_unsynced_bytes_is_not_seen_yet() -> None:
    disk = home()
    disk.pwrite(synced(disk, b"aaaa"), b"bbbb", 0)
    assert disk.flip(FILE, random.Random(3)) is not None
    assert disk.content(FILE) == b"bbbb" and disk.names[FILE].durable != b"aaaa"


# ------------------------------------------------------------- databases


def database(disk: SimDisk, path: Path = BASE) -> SimConnection:
    """A connection to a database with a table, whose file's name is durable."""
    if not disk.exists(path):
        disk.put(path, b"")
        with contextlib.closing(disk.database(path)) as connection:
            connection.execute("CREATE TABLE t (a)")
    connection = disk.database(path)
    assert isinstance(connection, SimConnection)
    return connection


def rows(disk: SimDisk, path: Path = BASE) -> list[int]:
    with contextlib.closing(disk.database(path)) as connection:
        return [a for (a,) in connection.execute("SELECT a FROM t ORDER BY a")]


def test_what_was_committed_survives_and_what_was_not_does_not() -> None:
    for seed in SEEDS:
        disk = home()
        connection = database(disk)
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (2)")
        connection.executemany("INSERT INTO t VALUES (?)", [(3,), (4,)])
        if seed % 2:
            connection.execute("COMMIT")
        disk.crash(random.Random(seed))
        assert rows(disk) == ([1, 2, 3, 4] if seed % 2 else [1])


def test_the_same_question_is_answered_anew_once_the_content_has_changed() -> None:
    disk = home()
    connection, question = database(disk), "SELECT count(*) FROM t"
    with contextlib.closing(database(disk)) as other:
        for count in range(5):
            assert connection.execute(question).fetchone() == other.execute(question).fetchone() == (count,)
            assert connection.execute(question).fetchone() == (count,), "asked again of the same content"
            other.execute("INSERT INTO t VALUES (?)", (count,))


def test_a_transaction_sees_what_it_has_written_and_nobody_else_does() -> None:
    disk = home()
    connection, question = database(disk), "SELECT count(*) FROM t"
    connection.execute("BEGIN")
    assert connection.execute(question).fetchone() == (0,)
    connection.execute("INSERT INTO t VALUES (1)")
    assert connection.execute(question).fetchone() == (1,)
    connection.executemany("INSERT INTO t VALUES (?)", [(2,), (3,)])
    assert connection.execute(question).fetchone() == (3,) and rows(disk) == []
    connection.execute("ROLLBACK")
    assert connection.execute(question).fetchone() == (0,)


def test_what_a_connection_set_or_began_is_not_the_next_ones() -> None:
    disk = home()
    with contextlib.closing(database(disk)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.ProgrammingError):
        connection.execute("SELECT 1")
    assert rows(disk) == []
    with contextlib.closing(disk.database(BASE, frozen=True)) as frozen, pytest.raises(sqlite3.OperationalError):
        frozen.execute("INSERT INTO t VALUES (1)")
    with contextlib.closing(database(disk)) as connection:
        connection.execute("INSERT INTO t VALUES (2)")
    disk.crash(random.Random(1))
    assert rows(disk) == [2], "it was durable at once"


def test_what_rots_under_a_database_is_seen_though_its_memory_was_kept() -> None:
    disk = home()
    with contextlib.closing(database(disk)) as connection:
        connection.execute("INSERT INTO t VALUES (7)")
    assert rows(disk) == [7]
    disk.names[BASE].drop_cache()
    assert rows(disk) == [7], "nothing was lost"
    disk.names[BASE].write(bytes(len(disk.content(BASE))), 0)
    with pytest.raises(sqlite3.DatabaseError):
        rows(disk)


def test_a_commit_is_one_change_and_reading_none() -> None:
    disk = home()
    connection = database(disk)
    before = disk.changes
    for sql in ("SELECT * FROM t", "PRAGMA journal_mode=WAL", "BEGIN", "INSERT INTO t VALUES (1)", "ROLLBACK", "BEGIN",
                "COMMIT", "DELETE FROM t WHERE a = 7", "BEGIN IMMEDIATE", "INSERT INTO t VALUES (2)"):  # fmt: skip
        connection.execute(sql)
        assert disk.changes == before
    connection.execute("COMMIT")
    assert (disk.changes, disk.calls["commit"]) == (before + 1, 2)


@pytest.mark.parametrize("ending", ["crash", "restart"])
def test_a_commit_under_way_in_a_crash_has_happened_or_has_not(ending: str) -> None:
    found = []
    for seed in SEEDS:
        disk = home()
        connection = database(disk)
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(1000)])
        disk.crash_at = disk.changes
        with pytest.raises(Crash):
            connection.execute("COMMIT")
        getattr(disk, ending)(random.Random(seed))
        found.append(len(rows(disk)))
    assert set(found) == {0, 1000}


def test_a_commit_that_came_to_light_after_a_restart_may_still_be_lost_whole() -> None:
    found = []
    for seed in range(200):
        disk = home()
        connection = database(disk)
        disk.crash_at = disk.changes
        with pytest.raises(Crash):
            connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(1000)])
        rng = random.Random(seed)
        disk.restart(rng)
        seen = len(rows(disk))
        disk.crash(rng)
        found.append((seen, len(rows(disk))))
    assert set(found) == {(0, 0), (1000, 0), (1000, 1000)}


def test_without_synchronous_a_crash_may_leave_any_mixture() -> None:
    found = set()
    for seed in SEEDS:
        disk = home()
        connection = database(disk)
        connection.execute("PRAGMA synchronous=OFF")
        connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(1000)])
        whole = disk.content(BASE)
        disk.crash(random.Random(seed))
        found.add("all" if disk.content(BASE) == whole else "some")
    assert found == {"all", "some"}


def test_connections_see_one_anothers_commits() -> None:
    disk = home()
    one, other = database(disk), database(disk)
    one.execute("INSERT INTO t VALUES (1)")
    assert other.execute("SELECT a FROM t").fetchall() == [(1,)]
    other.execute("BEGIN")
    reading = other.execute("SELECT a FROM t")
    one.execute("INSERT INTO t VALUES (2)")
    assert reading.fetchone() == (1,) and reading.fetchone() is None
    assert other.execute("SELECT count(*) FROM t").fetchone() == (1,), "a transaction sees one state"
    other.execute("COMMIT")
    assert other.execute("SELECT count(*) FROM t").fetchone() == (2,)


def test_of_two_writers_at_once_the_second_is_refused() -> None:
    disk = home()
    one, other = database(disk), database(disk)
    for connection in (one, other):
        connection.execute("BEGIN")
    one.execute("INSERT INTO t VALUES (1)")
    other.execute("INSERT INTO t VALUES (2)")
    one.execute("COMMIT")
    with pytest.raises(sqlite3.OperationalError, match="locked") as refused:
        other.execute("COMMIT")
    assert refused.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
    assert [a for (a,) in other.execute("SELECT a FROM t")] == [1]


def test_a_database_that_does_not_fit_is_refused_as_by_sqlite() -> None:
    disk = home()
    connection = database(disk)
    disk.room_bytes = 5000
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO t VALUES (?)", [("x" * 100,) for _ in range(100)])
    with pytest.raises(sqlite3.OperationalError, match="full") as refused:
        connection.execute("COMMIT")
    assert refused.value.sqlite_errorcode == sqlite3.SQLITE_FULL
    assert not connection.in_transaction and rows(disk) == []
    assert disk.room_bytes == 5000
    connection.execute("INSERT INTO t VALUES (1)")
    assert rows(disk) == [1]


def test_a_commit_that_failed_may_come_to_light_with_the_next_process() -> None:
    found = []
    for seed in SEEDS:
        disk = home()
        connection = database(disk)
        disk.fail("commit", errno.EIO, path="*.db")
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error") as failed:
            connection.execute("INSERT INTO t VALUES (1)")
        assert failed.value.sqlite_errorcode == sqlite3.SQLITE_IOERR_FSYNC
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)
        disk.restart(random.Random(seed))
        found.append(rows(disk))
    assert [] in found and [1] in found


def test_a_file_that_is_no_database_is_refused_as_by_sqlite(tmp_path: Path) -> None:
    for content in (b"half", b"half a database" * 500):
        (tmp_path / "base").write_bytes(content)
        disk = home()
        disk.put(BASE, content)
        codes = []
        for one in (OsDisk().database(tmp_path / "base"), disk.database(BASE)):
            with contextlib.closing(one), pytest.raises(sqlite3.DatabaseError) as refused:
                one.execute("SELECT * FROM sqlite_master")
            codes.append(refused.value.sqlite_errorcode)
        assert codes == [sqlite3.SQLITE_NOTADB] * 2


def test_a_file_that_is_not_there_is_not_made() -> None:
    with pytest.raises(sqlite3.OperationalError, match="unable to open") as refused:
        home().database(BASE)
    assert refused.value.sqlite_errorcode == sqlite3.SQLITE_CANTOPEN


def test_a_frozen_database_is_only_read() -> None:
    disk = home()
    database(disk).execute("INSERT INTO t VALUES (1)")
    with contextlib.closing(disk.database(BASE, frozen=True)) as frozen:
        assert frozen.execute("SELECT a FROM t").fetchone() == (1,)
        with pytest.raises(sqlite3.OperationalError) as refused:
            frozen.execute("DELETE FROM t")
    assert refused.value.sqlite_errorcode == sqlite3.SQLITE_READONLY
    assert rows(disk) == [1]


def test_a_backup_is_the_same_database() -> None:
    disk = home()
    with contextlib.closing(database(disk)) as source, contextlib.closing(database(disk, HOME / "copy.db")) as target:
        source.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(500)])
        target.execute("INSERT INTO t VALUES (-1)")
        source.backup(target)
        assert target.execute("SELECT count(*) FROM t").fetchone() == (500,)
    assert rows(disk, HOME / "copy.db") == list(range(500))


def test_a_dead_process_leaves_no_connection_open() -> None:
    disk = home()
    connection = database(disk)
    disk.restart(random.Random(1))
    assert not disk.connections
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


# -------------------------------------------- what a member keeps, on it


def put(store: Store, key: str, rev: int) -> None:
    old = store.row(key)
    value = b'"%d"' % rev
    row = (value, rev, rev, 1, checksum(key, value, rev, rev, 1))
    store.put(key, row, old)
    store.digest = (store.digest + row[4] ** 2 - (0 if old is None else old[4] ** 2)) % 2**64


def checkpoint(store: Store, rev: int) -> None:
    for i in range(20):
        put(store, f"key{i}", rev)
    begun = store.begin_checkpoint(rev, 1, None)
    begun.write()
    store.finish_checkpoint(begun)


def live(disk: SimDisk, durable: list[int]) -> None:
    """A store's life: some checkpoints, a copy, and the copy installed; says in `durable` what must not be lost."""
    store = Store.open(BASE, disk=disk)
    for rev in range(1, 4):
        checkpoint(store, rev)
        durable.append(rev)
    copied = snapshot.copy(store.disk, store.path, HOME / "copy.db")
    arriving = Arrival(disk, HOME / "incoming.db", copied.size_bytes, copied.sha256)
    arriving.take(disk.content(copied.path), 0)
    arriving.finish()
    checkpoint(store, 4)
    durable.append(4)
    store.install(arriving.path)
    durable.append(3)
    store.close()


def test_a_store_on_it_holds_a_whole_checkpoint_after_a_crash_at_every_change() -> None:
    disk, durable = home(), [0]
    live(disk, durable)
    found = set()
    for crash_at in range(disk.changes):
        for seed in range(6):
            disk, durable = home(), [0]
            disk.crash_at = crash_at
            with pytest.raises(Crash):
                live(disk, durable)
            disk.crash(random.Random(seed))
            with Store.open(BASE, disk=disk) as after:
                applied, last = after.meta.applied, durable[-1]
                assert applied in (last, last + 1) or (last, applied) == (4, 3), "3 is what is installed over 4"
                assert all(row[1] == applied for _, row in after.rows())
                assert after.count() == (20 if applied else 0)
                found.add(applied)
    assert found == {0, 1, 2, 3, 4}


def test_a_flipped_bit_in_a_store_is_noticed_or_harmless() -> None:
    disk = home()
    with Store.open(BASE, disk=disk) as store:
        checkpoint(store, 1)
        expected = dict(store.rows())
    noticed = 0
    for seed in range(300):
        damaged = disk.copy()
        damaged.flip(BASE, random.Random(seed))
        try:
            with Store.open(BASE, disk=damaged) as store:
                assert dict(store.rows()) == expected
        except CorruptStore:
            noticed += 1
    assert 10 < noticed < 300


def test_a_full_disk_fails_a_checkpoint_on_it_and_loses_nothing() -> None:
    disk = home()
    with Store.open(BASE, disk=disk) as store:
        disk.room_bytes = 0
        for i in range(200):
            put(store, f"key{i}", 1)
        begun = store.begin_checkpoint(1, 1, None)
        with pytest.raises(ReadOnly, match="free some space"):
            begun.write()
        store.abandon_checkpoint(begun)
        disk.room_bytes = None
        checkpoint(store, 2)
        assert (store.meta.applied, store.count()) == (2, 200)


def test_an_identity_on_it_is_kept_for_life() -> None:
    disk = SimDisk()
    first = DataDirectory.open(HOME, disk=disk, new_id=lambda: "one")
    with pytest.raises(StartupError, match="in use"):
        DataDirectory.open(HOME, disk=disk)
    first.change(cluster="c")
    disk.crash(random.Random(1))
    again = DataDirectory.open(HOME, disk=disk, new_id=lambda: "another")
    assert (again.identity.id, again.identity.cluster) == ("one", "c")
    disk.crash(random.Random(2))
    disk.wipe()
    assert DataDirectory.open(HOME, disk=disk, new_id=lambda: "another").identity.id == "another"


def test_a_registrys_memory_on_it_is_kept() -> None:
    disk = SimDisk()
    file = MemoryFile(HOME, disk)
    with pytest.raises(StartupError, match="in use"):
        MemoryFile(HOME, disk)
    assert file.load() is None
    file.save(Memory("c", "id1"))
    disk.crash(random.Random(1))
    assert MemoryFile(HOME, disk).load() == Memory("c", "id1")


def test_a_registrys_memory_that_was_read_once_is_durable() -> None:
    found = set()
    for crash_at in range(8):
        disk = SimDisk()
        file = MemoryFile(HOME, disk)
        disk.changes, disk.crash_at = 0, crash_at
        with contextlib.suppress(Crash):
            file.save(Memory("c", "id1"))
        disk.restart(random.Random(1))
        seen = MemoryFile(HOME, disk).load()
        for seed in range(10):
            disk.crash(random.Random(seed))
            assert MemoryFile(HOME, disk).load() == seen
        found.add(None if seen is None else seen.cluster)
    assert found == {None, "c"}


# ---------------------------------------------------------- determinism

TRACE = """
import errno, random
from pathlib import Path
from ddb.simdisk import Crash, SimDisk
home, trace = Path("/data"), []
for seed in range(30):
    rng = random.Random(seed)
    disk = SimDisk(rng)
    disk.make_directory(home)
    disk.on_change = lambda operation, path: trace.append((operation, str(path)))
    disk.fail("fdatasync", errno.EIO, nth=rng.randint(1, 9), times=1)
    disk.crash_at = rng.randint(1, 60)
    try:
        for i in range(20):
            handle = disk.open(home / f"file{rng.randrange(6)}")
            disk.pwrite(handle, rng.randbytes(60), rng.randrange(60))
            if rng.random() < 0.5:
                try:
                    disk.fdatasync(handle)
                except OSError:
                    trace.append("failed")
            disk.rename(home / disk.list(home)[0], home / f"file{rng.randrange(9)}")
            if rng.random() < 0.3:
                disk.fsync_dir(disk.open_directory(home))
    except Crash:
        trace.append("crash")
    disk.crash(rng)
    trace.append([(name, disk.content(home / name)) for name in disk.list(home)])
    trace.append(rng.random())
print(trace)
"""


def test_one_seed_is_one_disk_whatever_the_hash_seed() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", TRACE],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(traces) == 1
    assert b"crash" in traces.pop()
