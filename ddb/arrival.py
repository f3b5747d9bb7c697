"""A snapshot's file as it arrives: how its bytes get onto the disk.

Laws:

* The bytes are written in order, each once. What doesn't come next is left alone.
* What `finish` has passed is durable, and its SHA-256 is the one that was promised.
* A failed fdatasync is not tried again: the file is of no use then, for nobody knows what of it is on the disk.

Theory. All this is for a worker thread, which writes and hashes a chunk while the loop decodes the next one: neither
needs the interpreter. What has come is made durable every few dozen megabytes, while the rest is still on its way;
kept for the end, the disk would have to take all of it while everybody waits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from ddb.disk import Disk, remove_if_there, write_all
from ddb.snapshot import corrupt

SYNC_EVERY_BYTES: Final = 32 << 20


class Arrival:
    """The file `path`, made anew with the first bytes that come. `written` says how many are there."""

    def __init__(self, disk: Disk, path: Path, sha256: str) -> None:
        self.path = path
        self.written = 0
        self._disk = disk
        self._sha256 = sha256
        self._hash = hashlib.sha256()
        self._handle: int | None = None
        self._synced = 0

    def take(self, data: bytes, offset: int) -> int:
        """Write `data`, where it belongs at `offset` and that is what comes next. Returns how many bytes are there.

        Raises OSError where it can't be written, and `data` may be given again; CorruptStore where the disk failed to keep
        what was written before.
        """
        if offset == self.written:
            if self._handle is None:
                self._handle = self._disk.open(self.path)
                self._disk.truncate(self._handle, 0)
            write_all(self._disk, self._handle, data, offset)
            self._hash.update(data)
            self.written += len(data)
            if self.written - self._synced >= SYNC_EVERY_BYTES:
                self._sync(self._handle)
        return self.written

    def finish(self) -> None:
        """All has come: make it durable, and compare its hash. Raises CorruptStore."""
        if self._handle is not None:
            self._sync(self._handle)
        self._close()
        found = self._hash.hexdigest()
        if found != self._sha256:
            raise corrupt(self.path, f"its SHA-256 is {found}, not {self._sha256}")

    def drop(self) -> None:
        """Remove the file, wherever it has not got another name. May be called twice. Raises OSError."""
        self._close()
        remove_if_there(self._disk, self.path)

    def _sync(self, handle: int) -> None:
        try:
            self._disk.fdatasync(handle)
        except OSError as error:
            raise corrupt(self.path, f"the disk failed to keep it ({error})") from error
        self._synced = self.written

    def _close(self) -> None:
        if self._handle is not None:
            self._disk.close(self._handle)
            self._handle = None
