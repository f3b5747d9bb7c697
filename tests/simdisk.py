"""A disk in memory that forgets, tears, fills up and fails, for the log's tests.

It is as unkind as POSIX allows. What was written since a file's last fdatasync survives a crash sector by sector or
not at all, in any order; the file's length may be the old or the new one, and where it is new and the sectors are
not, there are zeros. Each name that was made, replaced or removed since the directory's last fsync is, after a crash,
as it was before or as it is now.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path

SECTOR_BYTES = 16  # small, so that short records tear too


class Crash(BaseException):
    """The machine went down in the middle of an operation."""


class File:
    """One file: what is durable, what is to be seen now, and the ranges written in between."""

    def __init__(self, content: bytes = b"") -> None:
        self.durable = content
        self.now = bytearray(content)
        self.written: list[tuple[int, int]] = []

    def crash(self, rng: random.Random) -> None:
        """Become what is left after a crash."""
        if not self.written and bytes(self.now) == self.durable:
            return
        size = rng.choice([len(self.durable), len(self.now)])
        left = bytearray(self.durable[:size].ljust(size, b"\0"))
        survives = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        for start, end in self.written:
            for sector in range(start // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
                low, high = (
                    max(start, sector * SECTOR_BYTES),
                    min(end, (sector + 1) * SECTOR_BYTES, size, len(self.now)),
                )
                if low < high and rng.random() < survives:
                    left[low:high] = self.now[low:high]
        self.__init__(bytes(left))  # type: ignore[misc]


class SimDisk:
    """A `ddb.disk.Disk`.

    `room_bytes` is how much may still be allocated. `crash_at` is how many changing operations are let through before
    Crash is raised from the next one. `fail` maps an operation's name to the OSError that it raises. `calls` counts.
    """

    def __init__(self) -> None:
        self.names: dict[Path, File] = {}
        self.durable_names: dict[Path, File] = {}
        self.handles: dict[int, File | Path] = {}
        self.calls: dict[str, int] = {}
        self.fail: dict[str, int] = {}
        self.room_bytes: int | None = None
        self.crash_at: int | None = None
        self.changes = 0
        self._next_handle = 1

    # -- what a test does

    def crash(self, rng: random.Random) -> None:
        """Forget what was not durable, as `rng` decides, and be there again."""
        for path in set(self.names) | set(self.durable_names):
            survivor = rng.choice([self.names.get(path), self.durable_names.get(path)])
            if survivor is None:
                self.names.pop(path, None)
            else:
                self.names[path] = survivor
        for file in {id(f): f for f in self.names.values()}.values():
            file.crash(rng)
        self.durable_names = dict(self.names)
        self.handles.clear()
        self.crash_at = None

    def content(self, path: Path) -> bytes:
        """What the file holds now."""
        return bytes(self.names[path].now)

    def put(self, path: Path, content: bytes) -> None:
        """Make the file hold `content`, durably."""
        self.names[path] = self.durable_names[path] = File(content)

    def copy(self) -> SimDisk:
        """A disk with the same durable files, and none of the faults."""
        other = SimDisk()
        for path, file in self.names.items():
            other.put(path, bytes(file.now))
        return other

    # -- what the log does

    def make_directory(self, path: Path) -> None:
        self._called("make_directory")

    def list(self, directory: Path) -> list[str]:
        return [p.name for p in self.names if p.parent == directory]

    def open(self, path: Path) -> int:
        self._called("open")
        if path not in self.names:
            self._changes()
            self.names[path] = File()
        return self._handle(self.names[path])

    def open_directory(self, path: Path) -> int:
        return self._handle(path)

    def close(self, handle: int) -> None:
        del self.handles[handle]

    def size(self, handle: int) -> int:
        return len(self._file(handle).now)

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        self._called("pread")
        return bytes(self._file(handle).now[offset : offset + count])

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        file = self._file(handle)
        grows = max(0, offset + len(data) - len(file.now))
        if self.room_bytes is not None and grows > self.room_bytes:
            data = data[: len(data) - grows + self.room_bytes]
            grows = self.room_bytes
            if not data:
                raise OSError(errno.ENOSPC, "No space left on device")
        crashes = self._changes(raises=False)
        file.now[len(file.now) : offset] = bytes(max(0, offset - len(file.now)))
        file.now[offset : offset + len(data)] = data
        file.written.append((offset, offset + len(data)))
        if self.room_bytes is not None:
            self.room_bytes -= grows
        if crashes:
            raise Crash
        self._called("pwrite")
        return len(data)

    def truncate(self, handle: int, size: int) -> None:
        self._called("truncate")
        self._changes()
        file = self._file(handle)
        if self.room_bytes is not None:
            self.room_bytes += max(0, len(file.now) - size)
        del file.now[size:]
        file.now.extend(bytes(size - len(file.now)))

    def fdatasync(self, handle: int) -> None:
        self._called("fdatasync")
        self._changes()
        file = self._file(handle)
        file.durable = bytes(file.now)
        file.written.clear()

    def fsync_dir(self, handle: int) -> None:
        self._called("fsync_dir")
        self._changes()
        directory = self.handles[handle]
        for path in set(self.names) | set(self.durable_names):
            if path.parent == directory:
                if path in self.names:
                    self.durable_names[path] = self.names[path]
                else:
                    del self.durable_names[path]

    def rename(self, old: Path, new: Path) -> None:
        self._called("rename")
        self._changes()
        self.names[new] = self.names.pop(old)

    def remove(self, path: Path) -> None:
        self._called("remove")
        self._changes()
        del self.names[path]

    def _handle(self, what: File | Path) -> int:
        self._next_handle += 1
        self.handles[self._next_handle] = what
        return self._next_handle

    def _file(self, handle: int) -> File:
        file = self.handles[handle]
        assert isinstance(file, File)
        return file

    def _called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if name in self.fail:
            raise OSError(self.fail[name], f"simulated failure of {name}")

    def _changes(self, raises: bool = True) -> bool:
        self.changes += 1
        crashes = self.crash_at is not None and self.changes > self.crash_at
        if crashes and raises:
            raise Crash
        return crashes
