"""The few things that a member asks of an operating system's files, as one narrow seam.

Laws: the log, the snapshot, the data directory and the registry's memory touch files only through a `Disk`, so the
simulator can put one that tears, forgets and fills up in its place (`simdisk.py`). Nothing here retries, buffers or
decides: an error is raised as the `OSError` that it was.

Theory. What has been written is durable only after `fdatasync` of its file has returned; that a *name* exists is
durable only after `fsync_dir` of its directory has. Between the two calls a crash may leave any subset of the sectors
that were written, and any subset of the names (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).
So what must be whole or not there at all is written under another name, synced, renamed, and its directory synced:
`replace_durably`. A database is SQLite's to keep whole, and has its own way to the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

DATABASE_PATIENCE_S: Final = 30.0  # for another program that holds a lock on the file
FLUSH_EVERY_S: Final = 0.03


class Disk(Protocol):
    """Files named by path, opened as small integers. Every method may raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Make `path` and what is missing above it, durably; no error when it is there."""

    def list(self, directory: Path) -> list[str]:
        """The names in `directory`, in any order."""

    def exists(self, path: Path) -> bool:
        """Whether there is a file or a directory at `path`."""

    def open(self, path: Path) -> int:
        """Open `path` for reading and writing, created empty when absent; returns a handle."""

    def open_to_read(self, path: Path) -> int:
        """Open what is at `path` for reading alone; returns a handle. Raises FileNotFoundError where nothing is."""

    def open_directory(self, path: Path) -> int:
        """Open the directory `path`; returns a handle for `fsync_dir`."""

    def lock(self, path: Path) -> int:
        """Open `path`, made when absent, and lock it for this process alone, until the handle is closed or the process
        ends; returns the handle. Raises BlockingIOError where another has it locked."""

    def database(self, path: Path, *, frozen: bool = False) -> sqlite3.Connection:
        """A connection to the SQLite database in the existing file `path`, in autocommit mode; an empty file is an empty
        database. With `frozen`, nothing is written, not even a lock file: the caller knows that nobody changes the file.
        While there is a connection, the file is not to be opened in another way and closed again: with the first descriptor
        of a file that a process closes, POSIX takes all its locks on it, and another program that looked into the
        database would then tidy the write-ahead log away under this one. Raises sqlite3.Error."""

    def still(self, path: Path) -> Still | None:
        """The bytes of the database in the file `path` as they are now, without a copy; None where they can't be had so.
        Nobody may write to it during the call. Raises sqlite3.Error, OSError."""

    def flushing(self, path: Path) -> AbstractContextManager[None]:
        """Within it, what is written to the database in the file `path` goes to the medium a little at a time, and not all at
        once when SQLite asks for it: every other fsync on that disk would have to wait behind it. Nothing is durable for it.
        Raises OSError at the end, where that failed: the system might tell nobody else."""

    def close(self, handle: int) -> None:
        """Give the handle back."""

    def size(self, handle: int) -> int:
        """The file's length in bytes."""

    def drop_cache(self, handle: int) -> None:
        """Let what is read next come from the medium, where the system can do that, and not from memory."""

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer only at the file's end."""

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        """Write `data` at `offset`; returns how many bytes went in, which may be fewer."""

    def truncate(self, handle: int, size: int) -> None:
        """Make the file `size` bytes long."""

    def fdatasync(self, handle: int) -> None:
        """Return when the file's contents and length are durable."""

    def fsync_dir(self, handle: int) -> None:
        """Return when the names in the directory are durable."""

    def rename(self, old: Path, new: Path) -> None:
        """Give `old` the name `new`, replacing what had it."""

    def remove(self, path: Path) -> None:
        """Remove the name `path`. Raises FileNotFoundError where it is not there."""


class Still(Protocol):
    """The bytes of a database, of which none changes before `close`, whatever is committed meanwhile."""

    size_bytes: int

    def read(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer only at the end. Raises OSError."""

    def close(self) -> None:
        """Let the file change again. May be called twice."""


def write_all(disk: Disk, handle: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`, in several goes if need be. Raises OSError, after which a part may be there."""
    written = 0
    while written < len(data):
        written += disk.pwrite(handle, data[written:] if written else data, offset + written)


def read_file(disk: Disk, path: Path) -> bytes:
    """What the file at `path` holds. Raises FileNotFoundError where there is none, and OSError."""
    handle = disk.open_to_read(path)
    try:
        return disk.pread(handle, disk.size(handle), 0)
    finally:
        disk.close(handle)


def file_bytes(disk: Disk, path: Path) -> int:
    """How many bytes the file at `path` has. Raises FileNotFoundError where there is none, and OSError."""
    handle = disk.open_to_read(path)
    try:
        return disk.size(handle)
    finally:
        disk.close(handle)


def touch(disk: Disk, path: Path) -> None:
    """Make sure that there is a file at `path` that may be written. Raises OSError."""
    disk.close(disk.open(path))


def remove_if_there(disk: Disk, path: Path) -> None:
    """Remove the name `path`, if it is there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        disk.remove(path)


def fsync_directory(disk: Disk, path: Path) -> None:
    """Make the names in the directory `path` durable. Raises OSError."""
    handle = disk.open_directory(path)
    try:
        disk.fsync_dir(handle)
    finally:
        disk.close(handle)


def replace_durably(disk: Disk, path: Path, data: bytes) -> None:
    """Make `data` the whole content of the file `path`, durably: a crash leaves the old content or the new.

    It is written to a file beside it whose name ends in `.new`. Raises OSError; the content is then the old or the new.
    """
    beside = path.with_suffix(".new")
    handle = disk.open(beside)
    try:
        disk.truncate(handle, 0)  # what an interrupted call left
        write_all(disk, handle, data, 0)
        disk.fdatasync(handle)
    finally:
        disk.close(handle)
    disk.rename(beside, path)
    fsync_directory(disk, path.parent)


_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class OsDisk:
    """The operating system's own files."""

    def __init__(self) -> None:
        self._raw: dict[tuple[int, int], int] = {}  # descriptors of databases, by device and inode: see Disk.database
        weakref.finalize(self, _close_all, self._raw)  # whoever has a connection has this disk, too

    def make_directory(self, path: Path) -> None:
        """Make `path` and fsync what it was made in, at every level."""
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            handle = self.open_directory(made.parent)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def list(self, directory: Path) -> list[str]:
        """os.listdir."""
        return os.listdir(directory)

    def exists(self, path: Path) -> bool:
        """Path.exists."""
        return path.exists()

    def open(self, path: Path) -> int:
        """os.open; no child process inherits the descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def open_to_read(self, path: Path) -> int:
        """os.open."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def open_directory(self, path: Path) -> int:
        """os.open of a directory."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def lock(self, path: Path) -> int:
        """flock, which ends with the process, however that ends."""
        handle = self.open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def database(self, path: Path, *, frozen: bool = False) -> sqlite3.Connection:
        """sqlite3.connect, which must find the file."""
        mode = "mode=ro&immutable=1" if frozen else "mode=rw"
        return sqlite3.connect(
            f"file:{quote(str(path))}?{mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=DATABASE_PATIENCE_S,
        )

    def still(self, path: Path) -> OsStill | None:
        """A reader that found the write-ahead log empty reads the database file alone, and while it does, SQLite moves
        nothing from the log into that file (wal.c, WAL_READ_LOCK(0))."""
        connection = self.database(path)
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if _size_if_there(Path(f"{path}-wal")) == 0:
                return OsStill(connection, self._raw_descriptor(path))
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    @contextlib.contextmanager
    def flushing(self, path: Path) -> Iterator[None]:
        """fdatasync of the file and of its write-ahead log, again and again, in a thread of its own. While checkpoints of
        240 MB were written, the longest wait for another file's fdatasync was 67 ms, where it was 200 to 300 without."""
        flusher = _Flusher(self._raw_descriptor(path), Path(f"{path}-wal"))
        flusher.start()
        try:
            yield
        finally:
            flusher.stop()
        if flusher.error is not None:
            raise OSError(flusher.error.errno, flusher.error.strerror, str(path)) from flusher.error

    def _raw_descriptor(self, path: Path) -> int:
        """A descriptor of the database at `path`. It stays open as long as this disk is there, or until there is another file
        at `path`, for closing it would cost SQLite its locks."""
        status = os.stat(path)
        inode = status.st_dev, status.st_ino
        if inode not in self._raw:
            for other in [other for other, handle in self._raw.items() if os.fstat(handle).st_nlink == 0]:
                os.close(self._raw.pop(other))  # nobody has a connection to a file that was replaced
            self._raw[inode] = self.open_to_read(path)
        return self._raw[inode]

    def close(self, handle: int) -> None:
        """os.close."""
        os.close(handle)

    def size(self, handle: int) -> int:
        """os.fstat."""
        return os.fstat(handle).st_size

    def drop_cache(self, handle: int) -> None:
        """os.posix_fadvise, which is advice, and which macOS has not."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        """os.pread, as often as it takes."""
        data = os.pread(handle, count, offset)
        while len(data) < count:  # one read returns 2 GiB at most
            more = os.pread(handle, count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        """os.pwrite."""
        return os.pwrite(handle, data, offset)

    def truncate(self, handle: int, size: int) -> None:
        """os.ftruncate."""
        os.ftruncate(handle, size)

    def fdatasync(self, handle: int) -> None:
        """os.fdatasync; os.fsync where there is none."""
        _fdatasync(handle)

    def fsync_dir(self, handle: int) -> None:
        """os.fsync."""
        os.fsync(handle)

    def rename(self, old: Path, new: Path) -> None:
        """os.rename."""
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        """os.remove."""
        os.remove(path)


class OsStill:
    """A Still of an OsDisk: a transaction that keeps SQLite from writing into the file, and a descriptor to read it by."""

    def __init__(self, connection: sqlite3.Connection, handle: int) -> None:
        self.size_bytes = os.fstat(handle).st_size
        self._connection = connection
        self._handle = handle

    def read(self, count: int, offset: int) -> bytes:
        """See Still."""
        return os.pread(self._handle, count, offset)

    def close(self) -> None:
        """See Still."""
        self._connection.close()


class _Flusher(threading.Thread):
    """See OsDisk.flushing. `wal` may be there or not; to close it costs SQLite nothing, for its locks are elsewhere."""

    def __init__(self, database: int, wal: Path) -> None:
        super().__init__(name="flusher", daemon=True)
        self.error: OSError | None = None
        self._database = database
        self._wal = wal
        self._ended = threading.Event()

    def run(self) -> None:
        """The thread's work."""
        try:
            while not self._ended.wait(FLUSH_EVERY_S):
                with contextlib.suppress(FileNotFoundError):
                    handle = os.open(self._wal, os.O_RDWR | os.O_CLOEXEC)
                    try:
                        _fdatasync(handle)
                    finally:
                        os.close(handle)
                _fdatasync(self._database)
        except OSError as error:
            self.error = error

    def stop(self) -> None:
        """End it, and wait for that."""
        self._ended.set()
        self.join()


def _size_if_there(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _close_all(handles: dict[tuple[int, int], int]) -> None:
    for handle in handles.values():
        os.close(handle)
