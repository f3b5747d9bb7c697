"""A disk in memory that forgets, tears, fills up and fails: the simulator's, and the tests'.

Laws:

* It is as unkind as POSIX allows, and no more. What was written since a file's last fdatasync survives a crash sector
  by sector or not at all, in any order; the file's length may be the old or the new one, and where it is new and the
  sectors are not, there are zeros. Each name that was made, replaced or removed since the directory's last fsync is,
  after a crash, as it was before or as it is now.
* An fdatasync that failed has thrown away what it should have saved, and the next one says that all is well: so do
  the kernels (PostgreSQL's "fsyncgate", 2018; Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
* Chance comes in as `random.Random`, and nothing depends on the order of a set: one seed, one disk.
* Once `Crash` has been raised the disk is down, and every operation raises it again: what a dead process still does in its
  `finally` blocks changes nothing.

Theory. A file is three things: what is durable, what is to be seen now, and the ranges that differ because they were
written in between. So a small write into a large file costs what it writes. Names are kept twice likewise.

A database (simbase.py) is loaded from the simulated file, and goes back into it at each commit: one changing operation,
durable at once where `PRAGMA synchronous` is FULL. SQLite is trusted to leave the commit before or the one after,
whatever happens in between. Where `synchronous` is less, a commit is just unsynced bytes.
"""

from __future__ import annotations

import errno
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, cast

from ddb.simbase import Memory, SimConnection, sqlite_error

SECTOR_BYTES: Final = 16  # small, so that short records tear too
SURVIVAL: Final = (0.0, 0.1, 0.5, 0.9, 1.0)  # how likely a sector is to outlive a crash: drawn for each file


class Crash(BaseException):
    """The machine, or the process, went down in the middle of an operation."""


class File:
    """One file: what is durable, what is to be seen now, and the ranges written in between."""

    __slots__ = ("atomic", "durable", "maybe", "now", "path", "version", "written")

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self.path = path
        self.durable = bytearray(content)
        self.now = bytearray(content)
        self.written: list[tuple[int, int]] = []
        self.version = 0  # changes whenever `now` does
        self.atomic = False  # what was written since is a database's commit: all of it survives, or nothing
        self.maybe: tuple[bytes, bool] | None = None  # a commit that was cut short or failed: it may come to light

    def write(self, data: bytes, offset: int) -> None:
        """Put `data` at `offset`; a gap before it is zeros."""
        now = self.now
        if offset > len(now):
            now.extend(bytes(offset - len(now)))
        end = offset + len(data)
        now[offset:end] = data
        self.written.append((offset, end))
        self.version += 1

    def truncate(self, size: int) -> None:
        """Be `size` bytes long."""
        now, before = self.now, len(self.now)
        if size < before:
            del now[size:]
            self.written.append((size, before))  # should it grow again, that is not what is durable there
        else:
            now.extend(bytes(size - before))
        self.version += 1

    def sync(self) -> None:
        """Make what is to be seen durable."""
        now, durable, size = self.now, self.durable, len(self.now)
        if len(durable) > size:
            del durable[size:]
        else:
            durable.extend(bytes(size - len(durable)))
        for start, end in self.written:
            durable[start:end] = now[start:end]
        self.written.clear()
        self.atomic = False

    def commit(self, content: bytes, durable: bool) -> None:
        """Hold `content`, a database after a commit; at once durably, or in no way so."""
        self.written.append((0, max(len(content), len(self.now))))
        self.now[:] = content
        self.version += 1
        self.maybe = None
        if durable:
            self.sync()

    def fail_to_sync(self, rng: random.Random | None) -> None:
        """Lose what was written since the last fdatasync, all of it or what `rng` says; it is still to be seen."""
        if rng is not None:
            self.durable = self._survivors(rng)
        self.written.clear()

    def drop_cache(self) -> None:
        """Let what a failed fdatasync lost be seen to be lost."""
        left = self.durable[: len(self.now)].ljust(len(self.now), b"\0")
        for start, end in self.written:
            left[start:end] = self.now[start:end]
        self.now = left
        self.version += 1

    def die(self, rng: random.Random) -> None:
        """The process ended: a commit that was under way has happened, or has not."""
        if self.maybe is not None:
            content, whole = self.maybe
            self.maybe = None
            if rng.random() < 0.5:
                self.commit(content, durable=False)
                self.atomic = whole

    def crash(self, rng: random.Random) -> None:
        """Become what is left after a crash of the machine."""
        self.die(rng)
        if self.written or self.now != self.durable:
            self.durable = self._survivors(rng)
            self.now = bytearray(self.durable)
            self.written.clear()
            self.atomic = False
            self.version += 1

    def _survivors(self, rng: random.Random) -> bytearray:
        """What might be on the disk now."""
        now, durable = self.now, self.durable
        if self.atomic:
            return bytearray(rng.choice([durable, now]))
        size = rng.choice([len(durable), len(now)])
        left = durable[:size].ljust(size, b"\0")
        survival = rng.choice(SURVIVAL)
        for start, end in self.written if survival else ():
            end = min(end, size, len(now))
            for sector in range(start // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
                low, high = max(start, sector * SECTOR_BYTES), min(end, (sector + 1) * SECTOR_BYTES)
                if low < high and rng.random() < survival:
                    left[low:high] = now[low:high]
        return left


@dataclass(slots=True)
class Fault:
    """A failure to come: see SimDisk.fail."""

    operation: str
    errno: int
    pattern: str
    nth: int
    times: int | None
    calls: int = 0

    def strikes(self, operation: str, path: Path) -> bool:
        """Whether this call of `operation` on `path` is to fail."""
        if operation != self.operation or not fnmatchcase(str(path), self.pattern):
            return False
        self.calls += 1
        return self.calls >= self.nth and (self.times is None or self.calls < self.nth + self.times)


class SimStill:
    """A disk.Still: what a file held at a moment."""

    def __init__(self, disk: SimDisk, path: Path, content: bytes) -> None:
        self.size_bytes = len(content)
        self._disk = disk
        self._path = path
        self._content = content

    def read(self, count: int, offset: int) -> bytes:
        """See Still."""
        self._disk._called("pread", self._path)
        return self._content[offset : offset + count]

    def close(self) -> None:
        """See Still."""


class SimDisk:
    """A `ddb.disk.Disk` for one process, and what may happen to it.

    `room_bytes` is how much may still be allocated (None: no end of it). `crash_at` is how many changing operations are let
    through before Crash is raised from the next one; `changes` counts them. `on_change(operation, path)` is called before
    each, and may raise Crash itself. `calls` counts all operations by name; a database's commits are called "commit".
    `rng` decides how much a failed fdatasync loses (None: all). While `down`, every operation raises Crash.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self.names: dict[Path, File] = {}
        self.durable_names: dict[Path, File] = {}
        self.directories: dict[Path, None] = {}
        self.handles: dict[int, File | Path] = {}
        self.locks: dict[Path, int] = {}
        self.connections: dict[int, SimConnection] = {}
        self.calls: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.rng = rng
        self.room_bytes: int | None = None
        self.crash_at: int | None = None
        self.changes = 0
        self.on_change: Callable[[str, Path], None] | None = None
        self.down = False
        self._reading: dict[int, None] = {}  # handles that nothing may be written to
        self._spares: dict[File, Memory] = {}  # of connections that were closed
        self._next_handle = 1

    # -- what a test or a simulator does

    def crash(self, rng: random.Random) -> None:
        """The machine loses power: forget what was not durable, as `rng` decides, and be there again."""
        used_before = self._used_bytes()
        for path in sorted({*self.names, *self.durable_names}, key=str):
            now, durable = self.names.get(path), self.durable_names.get(path)
            survivor = now if now is durable else rng.choice([now, durable])
            if survivor is None:
                self._drop_spare(self.names.pop(path, None))
            else:
                self.names[path] = survivor
        self.names = {path: self.names[path] for path in sorted(self.names, key=str)}
        for path, file in self.names.items():
            file.path = path
            file.crash(rng)
        self.durable_names = dict(self.names)
        self._revive(used_before)

    def restart(self, rng: random.Random) -> None:
        """The process ends and the machine goes on (kill -9): what was written is still to be seen, and no more durable
        than it was. Locks and handles are gone. `rng` decides about a commit that was under way."""
        used_before = self._used_bytes()
        for path in sorted(self.names, key=str):
            self.names[path].die(rng)
        self._revive(used_before)

    def wipe(self) -> None:
        """Be an empty disk, and there again. The end of every disk: it closes the connections that were left open."""
        used_before = self._used_bytes()
        for table in (self.names, self.durable_names, self.directories):
            table.clear()
        self._revive(used_before)
        for file in list(self._spares):
            self._drop_spare(file)

    def fail(self, operation: str, error: int, *, path: str = "*", nth: int = 1, times: int | None = None) -> None:
        """Let `operation` raise OSError with the errno `error`: from the `nth` call from now on, for `times` calls (None:
        for ever). Only calls on paths like the shell pattern `path` count. `faults.clear()` ends it."""
        self.faults.append(Fault(operation, error, path, nth, times))

    def flip(self, path: Path, rng: random.Random) -> int | None:
        """Flip one bit of the durable content of the file at `path`; returns the offset of its byte, None where the file is
        empty. A byte that was written since the last fdatasync still looks right."""
        file = self.names[path]
        if not file.durable:
            return None
        offset, bit = rng.randrange(len(file.durable)), 1 << rng.randrange(8)
        file.durable[offset] ^= bit
        if offset < len(file.now) and not any(start <= offset < end for start, end in file.written):
            file.now[offset] ^= bit
        file.version += 1
        return offset

    def content(self, path: Path) -> bytes:
        """What the file holds now."""
        return bytes(self.names[path].now)

    def put(self, path: Path, content: bytes) -> None:
        """Make the file hold `content`, durably, in a directory that is there."""
        self.names[path] = self.durable_names[path] = File(path, content)
        self.directories.update(dict.fromkeys(path.parents))

    def copy(self) -> SimDisk:
        """A disk on which what is to be seen here is durable, and with none of the faults."""
        other = SimDisk()
        other.directories.update(self.directories)
        for path, file in self.names.items():
            other.put(path, bytes(file.now))
        return other

    # -- Disk: names

    def make_directory(self, path: Path) -> None:
        """See Disk. What is made is durable at once."""
        self._called("make_directory", path)
        if path in self.names:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        if any(parent in self.names for parent in path.parents):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))
        if path not in self.directories:
            self._changes("make_directory", path)
            self.directories.update(dict.fromkeys((path, *path.parents)))

    def list(self, directory: Path) -> list[str]:
        """See Disk. They come sorted."""
        self._called("list", directory)
        self._expect_directory(directory)
        return sorted(p.name for table in (self.names, self.directories) for p in table if p.parent == directory != p)

    def exists(self, path: Path) -> bool:
        """See Disk."""
        self._called("exists", path)
        return path in self.names or path in self.directories

    def rename(self, old: Path, new: Path) -> None:
        """See Disk."""
        self._called("rename", old)
        file = self._existing(old)
        self._expect_directory(new.parent)
        self._changes("rename", new)
        self._give_back(self.names.get(new))
        self.names[new] = self.names.pop(old)
        file.path = new

    def remove(self, path: Path) -> None:
        """See Disk."""
        self._called("remove", path)
        file = self._existing(path)
        self._changes("remove", path)
        self._give_back(file)
        del self.names[path]

    def fsync_dir(self, handle: int) -> None:
        """See Disk."""
        directory = self._directory(handle)
        self._called("fsync_dir", directory)
        self._changes("fsync_dir", directory)
        own, names, durable_names = str(directory), self.names, self.durable_names
        for path in [p for p in durable_names if p not in names and _directory(p) == own]:
            del durable_names[path]
        for path, file in names.items():
            if _directory(path) == own and durable_names.get(path) is not file:
                durable_names[path] = file

    # -- Disk: handles

    def open(self, path: Path) -> int:
        """See Disk."""
        self._called("open", path)
        file = self.names.get(path)
        if file is None:
            if path in self.directories:
                raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
            self._expect_directory(path.parent)
            self._changes("open", path)
            file = self.names[path] = File(path)
        return self._handle(file)

    def open_to_read(self, path: Path) -> int:
        """See Disk."""
        self._called("open_to_read", path)
        handle = self._handle(self._existing(path))
        self._reading[handle] = None
        return handle

    def open_directory(self, path: Path) -> int:
        """See Disk."""
        self._called("open_directory", path)
        self._expect_directory(path)
        return self._handle(path)

    def lock(self, path: Path) -> int:
        """See Disk."""
        if path in self.locks:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable", str(path))
        handle = self.locks[path] = self.open(path)
        return handle

    def close(self, handle: int) -> None:
        """See Disk."""
        if self.down:
            raise Crash
        if self.handles.pop(handle, None) is None:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self._reading.pop(handle, None)
        for path in [p for p, holder in self.locks.items() if holder == handle]:
            del self.locks[path]

    # -- Disk: contents

    def size(self, handle: int) -> int:
        """See Disk."""
        return len(self._file(handle).now)

    def drop_cache(self, handle: int) -> None:
        """See Disk."""
        file = self._file(handle)
        self._called("drop_cache", file.path)
        file.drop_cache()

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        """See Disk."""
        file = self._file(handle)
        self._called("pread", file.path)
        return bytes(file.now[offset : offset + count])

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        """See Disk. What a write that failed, or was cut short by a crash, has left is any part of it."""
        file = self._file(handle)
        if handle in self._reading:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.calls["pwrite"] += 1
        if self.room_bytes is not None:
            data = self._fitting(data, offset + len(data) - len(file.now))
        try:
            self._changes("pwrite", file.path)
        except Crash:
            file.write(data, offset)
            raise
        file.write(data, offset)
        if self.faults:
            self._strike("pwrite", file.path)
        return len(data)

    def truncate(self, handle: int, size: int) -> None:
        """See Disk."""
        file = self._file(handle)
        self._called("truncate", file.path)
        self._changes("truncate", file.path)
        if self.room_bytes is not None:
            self.room_bytes += max(0, len(file.now) - size)
        file.truncate(size)

    def fdatasync(self, handle: int) -> None:
        """See Disk. When it fails, it loses what it should have saved."""
        file = self._file(handle)
        try:
            self._called("fdatasync", file.path)
        except OSError:
            file.fail_to_sync(self.rng)
            raise
        self._changes("fdatasync", file.path)
        file.sync()

    def database(self, path: Path, *, frozen: bool = False) -> sqlite3.Connection:
        """See Disk. Connections to one file see one another's commits; of two that write at once, the second can't commit."""
        try:
            self._called("database", path)
            file = self._existing(path)
        except OSError as error:
            raise sqlite_error(sqlite3.SQLITE_CANTOPEN, "unable to open database file") from error
        self._next_handle += 1
        memory = self._spares.pop(file) if file in self._spares else Memory()
        connection = SimConnection(self, self._next_handle, file, memory, frozen)
        self.connections[self._next_handle] = connection
        return cast(sqlite3.Connection, connection)

    def still(self, path: Path) -> SimStill:
        """See Disk."""
        self._called("still", path)
        return SimStill(self, path, bytes(self._existing(path).now))

    def flushing(self, path: Path) -> AbstractContextManager[None]:
        """See Disk: here, nobody waits behind another's fsync."""
        return nullcontext()

    def commit(self, file: File, content: bytes, durable: bool) -> None:
        """A connection has committed `content`. Raises sqlite3.OperationalError where the disk refuses it."""
        try:
            self._called("commit", file.path)
            grows = len(content) - len(file.now)
            if self.room_bytes is not None and grows > self.room_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._changes("commit", file.path)
        except Crash:
            file.maybe = content, durable
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise sqlite_error(sqlite3.SQLITE_FULL, "database or disk is full") from error
            file.maybe = content, durable
            raise sqlite_error(sqlite3.SQLITE_IOERR_FSYNC, "disk I/O error") from error
        if self.room_bytes is not None:
            self.room_bytes -= grows
        file.commit(content, durable)

    def expect_up(self) -> None:
        """See simbase.Disk."""
        if self.down:
            raise Crash

    # -- within

    def _called(self, operation: str, path: Path) -> None:
        if self.down:
            raise Crash
        self.calls[operation] += 1
        if self.faults:
            self._strike(operation, path)

    def _strike(self, operation: str, path: Path) -> None:
        struck = [fault for fault in self.faults if fault.strikes(operation, path)]  # each one counts the call
        if struck:
            raise OSError(struck[0].errno, f"simulated failure of {operation}", str(path))

    def _changes(self, operation: str, path: Path) -> None:
        """Before an operation that changes something. Raises Crash where it is not to happen any more."""
        self.changes += 1
        try:
            if self.on_change is not None:
                self.on_change(operation, path)
            if self.crash_at is not None and self.changes > self.crash_at:
                raise Crash
        except Crash:
            self.down = True
            raise

    def _fitting(self, data: bytes, grows: int) -> bytes:
        """What of `data`, by which a file would grow so much, there is room for; the room is taken."""
        assert self.room_bytes is not None
        grows = max(0, grows)
        if grows > self.room_bytes:
            data = data[: len(data) - grows + self.room_bytes]
            grows = self.room_bytes
            if not data:
                raise OSError(errno.ENOSPC, "No space left on device")
        self.room_bytes -= grows
        return data

    def closed(self, handle: int, file: File, memory: Memory | None) -> None:
        """See simbase.Disk."""
        self.connections.pop(handle, None)
        if memory is not None and self.names.get(file.path) is file:
            self._drop_spare(file)
            self._spares[file] = memory
        elif memory is not None:
            memory.sqlite.close()

    def _drop_spare(self, file: File | None) -> None:
        if file is not None and (memory := self._spares.pop(file, None)) is not None:
            memory.sqlite.close()

    def _give_back(self, file: File | None) -> None:
        """Nobody finds `file` any more."""
        self._drop_spare(file)
        if self.room_bytes is not None and file is not None:
            self.room_bytes += len(file.now)

    def _used_bytes(self) -> int:
        return sum(len(file.now) for file in self.names.values())

    def _revive(self, used_before: int) -> None:
        """Be there for a new process."""
        for handle in list(self.connections):
            self.connections[handle].close()
        for table in (self.handles, self.locks, self._reading):
            table.clear()
        self.crash_at = None
        self.down = False
        if self.room_bytes is not None:
            self.room_bytes = max(0, self.room_bytes + used_before - self._used_bytes())

    def _handle(self, what: File | Path) -> int:
        self._next_handle += 1
        self.handles[self._next_handle] = what
        return self._next_handle

    def _file(self, handle: int) -> File:
        if self.down:
            raise Crash
        file = self.handles.get(handle)
        if type(file) is not File:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return file

    def _directory(self, handle: int) -> Path:
        if self.down:
            raise Crash
        path = self.handles.get(handle)
        if path is None or type(path) is File:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return cast(Path, path)

    def _existing(self, path: Path) -> File:
        file = self.names.get(path)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return file

    def _expect_directory(self, path: Path) -> None:
        if path not in self.directories:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))


def _directory(path: Path) -> str:
    """str(path.parent), which takes four times as long."""
    return str(path).rpartition("/")[0] or "/"
