"""The few things that the log asks of an operating system, as one narrow seam.

Laws: `log.py` and its rooms touch the world only through a `Disk`, so the simulator can put a disk that tears,
forgets and fills up in its place. Nothing here retries, buffers or decides: an error is raised as the `OSError` that
it was.

Theory. What has been written is durable only after `fdatasync` of its file has returned; that a *name* exists is
durable only after `fsync_dir` of its directory has. Between the two calls a crash may leave any subset of the sectors
that were written, and any subset of the names (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class Disk(Protocol):
    """Files named by path, opened as small integers. Every method may raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Make `path` and what is missing above it, durably; no error when it is there."""

    def list(self, directory: Path) -> list[str]:
        """The names in `directory`, in any order."""

    def open(self, path: Path) -> int:
        """Open `path` for reading and writing, created empty when absent; returns a handle."""

    def open_directory(self, path: Path) -> int:
        """Open the directory `path`; returns a handle for `fsync_dir`."""

    def close(self, handle: int) -> None:
        """Give the handle back."""

    def size(self, handle: int) -> int:
        """The file's length in bytes."""

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
        """Remove the name `path`."""


_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class OsDisk:
    """The operating system's own files."""

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

    def open(self, path: Path) -> int:
        """os.open; no child process inherits the descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def open_directory(self, path: Path) -> int:
        """os.open of a directory."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self, handle: int) -> None:
        """os.close."""
        os.close(handle)

    def size(self, handle: int) -> int:
        """os.fstat."""
        return os.fstat(handle).st_size

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
