"""The two disks behave alike: what is tested on the simulated one holds for the real one."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from ddb.disk import (
    Disk,
    OsDisk,
    file_bytes,
    fsync_directory,
    read_file,
    remove_if_there,
    replace_durably,
    touch,
    write_all,
)
from ddb.simdisk import SimDisk


@pytest.fixture(params=[OsDisk, SimDisk])
def disk(request: pytest.FixtureRequest) -> Disk:
    one: Disk = request.param()
    return one


@pytest.fixture
def home(disk: Disk, tmp_path: Path) -> Path:
    """An empty directory on the disk."""
    home = tmp_path / "home"
    disk.make_directory(home)
    return home


@contextlib.contextmanager
def opened(disk: Disk, path: Path) -> Iterator[int]:
    handle = disk.open(path)
    try:
        yield handle
    finally:
        disk.close(handle)


def test_what_is_written_is_read(disk: Disk, home: Path) -> None:
    with opened(disk, home / "a") as handle:
        assert disk.size(handle) == 0 and disk.pread(handle, 5, 0) == b""
        assert disk.pwrite(handle, b"hello", 3) == 5
        disk.fdatasync(handle)
        disk.drop_cache(handle)
        assert disk.pread(handle, 100, 0) == b"\0\0\0hello"
        assert disk.pread(handle, 2, 4) == b"el" and disk.pread(handle, 2, 9) == b""
        disk.pwrite(handle, b"J", 3)
        disk.truncate(handle, 5)
        disk.truncate(handle, 7)
        assert (disk.size(handle), disk.pread(handle, 100, 0)) == (7, b"\0\0\0Je\0\0")
    assert (file_bytes(disk, home / "a"), read_file(disk, home / "a")) == (7, b"\0\0\0Je\0\0")


def test_names_come_and_go(disk: Disk, home: Path) -> None:
    for name in ("a", "b"):
        touch(disk, home / name)
    with opened(disk, home / "a") as handle:
        write_all(disk, handle, b"of a", 0)
        disk.rename(home / "a", home / "b")
        assert disk.pread(handle, 4, 0) == b"of a", "an open file outlives its name"
        disk.remove(home / "b")
        assert disk.pread(handle, 4, 0) == b"of a"
    disk.make_directory(home / "c" / "d")
    disk.make_directory(home / "c")
    touch(disk, home / "e")
    fsync_directory(disk, home)
    assert sorted(disk.list(home)) == ["c", "e"]
    found = [disk.exists(home / name) for name in ("a", "b", "c", "c/d", "e", "c/e")]
    assert found == [False, False, True, True, True, False]


def test_what_is_not_there_is_said_to_be_missing(disk: Disk, home: Path) -> None:
    missing = home / "missing"
    for attempt in (
        lambda: disk.remove(missing), lambda: disk.rename(missing, home / "a"), lambda: disk.open_to_read(missing),
        lambda: read_file(disk, missing), lambda: file_bytes(disk, missing), lambda: disk.list(missing),
        lambda: disk.open(missing / "a"), lambda: disk.open_directory(missing), lambda: disk.lock(missing / "lock"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match="No such file or directory"):
            attempt()
    remove_if_there(disk, missing)
    assert disk.list(home) == []


def test_a_directory_is_no_file_and_a_file_no_directory(disk: Disk, home: Path) -> None:
    touch(disk, home / "a")
    with pytest.raises(FileExistsError):
        disk.make_directory(home / "a")
    with pytest.raises(NotADirectoryError):
        disk.make_directory(home / "a" / "b")
    with pytest.raises(IsADirectoryError):
        disk.open(home)


def test_a_closed_handle_is_no_file(disk: Disk, home: Path) -> None:
    with opened(disk, home / "a") as handle:
        pass
    for attempt in (
        lambda: disk.pread(handle, 1, 0), lambda: disk.pwrite(handle, b"x", 0), lambda: disk.size(handle),
        lambda: disk.truncate(handle, 0), lambda: disk.fdatasync(handle), lambda: disk.fsync_dir(handle),
        lambda: disk.close(handle),
    ):  # fmt: skip
        with pytest.raises(OSError, match="Bad file descriptor"):
            attempt()


def test_what_was_opened_to_be_read_is_not_written(disk: Disk, home: Path) -> None:
    replace_durably(disk, home / "a", b"text")
    handle = disk.open_to_read(home / "a")
    try:
        assert disk.pread(handle, 10, 0) == b"text"
        with pytest.raises(OSError, match="Bad file descriptor"):
            disk.pwrite(handle, b"x", 0)
    finally:
        disk.close(handle)


def test_a_lock_is_for_one_and_ends_with_its_handle(disk: Disk, home: Path) -> None:
    lock = disk.lock(home / "lock")
    with pytest.raises(BlockingIOError):
        disk.lock(home / "lock")
    disk.close(disk.lock(home / "other"))
    disk.close(lock)
    disk.close(disk.lock(home / "lock"))
    assert sorted(disk.list(home)) == ["lock", "other"]


def test_replacing_takes_the_place_of_what_was_there_and_of_what_an_interrupted_call_left(
    disk: Disk, home: Path
) -> None:
    path = home / "a.json"
    for content in (b"first, and long", b"second"):
        replace_durably(disk, path, content)
        assert read_file(disk, path) == content
    with opened(disk, path.with_suffix(".new")) as handle:
        write_all(disk, handle, b"longer than what comes next", 0)
    replace_durably(disk, path, b"third")
    assert read_file(disk, path) == b"third" and disk.list(home) == ["a.json"]


def test_a_write_that_goes_in_by_parts_is_whole(home: Path, tmp_path: Path) -> None:
    class Short(OsDisk):
        def pwrite(self, handle: int, data: bytes, offset: int) -> int:
            return os.pwrite(handle, data[:3], offset)

    with opened(short := Short(), tmp_path / "a") as handle:
        write_all(short, handle, b"0123456789", 2)
        assert short.pread(handle, 20, 0) == b"\0\x000123456789"


def test_a_database_is_what_sqlite_makes_of_a_file(disk: Disk, home: Path) -> None:
    path = home / "base.db"
    with pytest.raises(sqlite3.OperationalError, match="unable to open database file") as refused:
        disk.database(path)
    assert refused.value.sqlite_errorcode == sqlite3.SQLITE_CANTOPEN
    touch(disk, path)
    with contextlib.closing(disk.database(path)) as one, contextlib.closing(disk.database(path)) as other:
        one.execute("PRAGMA journal_mode=WAL")
        one.execute("CREATE TABLE t (a PRIMARY KEY, b)")
        one.execute("BEGIN IMMEDIATE")
        one.executemany("INSERT INTO t VALUES (?, ?)", [(i, str(i)) for i in range(3)])
        assert other.execute("SELECT count(*) FROM t").fetchone() == (0,)
        one.execute("COMMIT")
        assert list(other.execute("SELECT b FROM t WHERE a > ? ORDER BY a DESC", (0,))) == [("2",), ("1",)]
        one.execute("BEGIN")
        one.execute("DELETE FROM t")
        assert one.in_transaction
        one.execute("ROLLBACK")
        assert other.execute("SELECT count(*) FROM t").fetchall() == [(3,)]
        with pytest.raises(sqlite3.IntegrityError):
            other.execute("INSERT INTO t VALUES (1, 'twice')")
        assert one.execute("PRAGMA synchronous").fetchone() == (2,)
        assert one.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    with contextlib.closing(disk.database(path, frozen=True)) as frozen:
        assert frozen.execute("SELECT a FROM t ORDER BY a").fetchall() == [(0,), (1,), (2,)]
        with pytest.raises(sqlite3.OperationalError) as refused:
            frozen.execute("DELETE FROM t")
    assert refused.value.sqlite_errorcode == sqlite3.SQLITE_READONLY


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[str]:
    """The names of the files that the real disk has synced."""
    done: SimpleQueue[str] = SimpleQueue()

    def fdatasync(handle: int) -> None:
        done.put(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr("ddb.disk._fdatasync", fdatasync)
    monkeypatch.setattr("ddb.disk.FLUSH_EVERY_S", 0.001)
    return done


def wal_database(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t (a)")
    return connection


def await_synced(syncs: SimpleQueue[str], name: str) -> None:
    while syncs.get(timeout=10) != name:
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not name its descriptors")
def test_what_is_written_to_a_database_goes_to_the_medium_a_little_at_a_time(
    tmp_path: Path, syncs: SimpleQueue[str]
) -> None:
    disk, path = OsDisk(), tmp_path / "db"
    before = threading.active_count()
    touch(disk, path)
    with disk.flushing(path):
        await_synced(syncs, "db")  # it may have no write-ahead log yet
    with contextlib.closing(wal_database(path)) as connection, disk.flushing(path):
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1)")
        for name in ("db-wal", "db", "db-wal", "db"):
            await_synced(syncs, name)
        connection.execute("COMMIT")
    assert threading.active_count() == before


def test_flushing_keeps_sqlites_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a closed descriptor of the database, POSIX would take them away, and another program could write as well."""
    monkeypatch.setattr("ddb.disk.FLUSH_EVERY_S", 0.001)
    disk, path = OsDisk(), tmp_path / "db"
    with contextlib.closing(wal_database(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(2):
            with disk.flushing(path):
                connection.execute("INSERT INTO t VALUES (1)")
        script = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None).execute('BEGIN IMMEDIATE')"
        other = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
        assert "database is locked" in other.stderr


def test_a_flush_that_failed_is_told_for_the_system_might_tell_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, path, failed = OsDisk(), tmp_path / "db", threading.Event()
    touch(disk, path)

    def fdatasync(handle: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ddb.disk._fdatasync", fdatasync)
    monkeypatch.setattr("ddb.disk.FLUSH_EVERY_S", 0.001)
    with pytest.raises(OSError, match=r"Input/output error.*db"), disk.flushing(path):
        assert failed.wait(10)
    failed.clear()
    with pytest.raises(ZeroDivisionError), disk.flushing(path):
        assert failed.wait(10)
        raise ZeroDivisionError


def test_the_simulated_disk_lets_nobody_wait_for_anothers_fsync(tmp_path: Path) -> None:
    with SimDisk().flushing(tmp_path / "db"):
        pass
