"""A snapshot's file as it arrives: how its bytes get onto the disk, and how much of it is known to be right.

Laws:

* The bytes are written in order, each once. What doesn't come next is left alone.
* What `finish` has passed is durable and whole, its SHA-256 is the one that was promised, and each row has been verified
  (inspection.py).
* A failed fdatasync is not tried again: the file is of no use then, for nobody knows what of it is on the disk.

Theory. All this is for a worker thread, which writes and hashes a chunk while the loop decodes the next one: neither
needs the interpreter. What has come is made durable every few dozen megabytes, while the rest is still on its way;
kept for the end, the disk would have to take all of it while everybody waits. So it is with the rows: every few megabytes,
whoever inspects them is told that there is more.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Final

from ddb.disk import Disk, remove_if_there, write_all
from ddb.inspection import Here, Inspect, Inspection
from ddb.layers import KeyFilter
from ddb.snapshot import Meta, corrupt

SYNC_EVERY_BYTES: Final = 32 << 20
LOOK_EVERY_BYTES: Final = 4 << 20


class Arrival:
    """The file `path` of `size_bytes`, made anew with the first bytes that come. Its rows are verified by what `inspect` begins: by
    default, whoever has them written. `written` says how many bytes are there; `sha256` may be empty at first, and set before `finish`."""

    def __init__(
        self, disk: Disk, path: Path, size_bytes: int, sha256: str = "", inspect: Inspect | None = None
    ) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.sha256 = sha256
        self.written = 0
        self._disk = disk
        self._hash = hashlib.sha256()
        self._handle: int | None = None
        self._synced = 0
        self._looked = 0
        self._inspect = inspect or partial(Here, disk)
        self._inspection: Inspection | None = None

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
            if self.written - self._looked >= LOOK_EVERY_BYTES:
                self._look(self._handle)
        return self.written

    def finish(self) -> tuple[Meta, KeyFilter]:
        """All has come: make it durable, compare its hash, and verify what is left. Returns which state it is, and its keys.
        Raises CorruptStore, StartupError or OSError."""
        if self._handle is not None:
            self._sync(self._handle)
        self._close()
        found = self._hash.hexdigest()
        if found != self.sha256:
            raise corrupt(self.path, f"its SHA-256 is {found}, not {self.sha256}")
        return self._inspected().finish()

    def drop(self) -> None:
        """Remove the file, wherever it has not got another name. May be called twice. Raises OSError."""
        self._close()
        if self._inspection is not None:
            self._inspection.close()
        remove_if_there(self._disk, self.path)

    def _sync(self, handle: int) -> None:
        try:
            self._disk.fdatasync(handle)
        except OSError as error:
            raise corrupt(self.path, f"the disk failed to keep it ({error})") from error
        self._synced = self.written

    def _look(self, handle: int) -> None:
        if not self._looked:
            self._disk.truncate(handle, self.size_bytes)  # SQLite reads no file that is shorter than it says
        self._looked = self.written
        self._inspected().look()

    def _inspected(self) -> Inspection:
        if self._inspection is None:
            self._inspection = self._inspect(self.path, self.size_bytes)
        return self._inspection

    def _close(self) -> None:
        if self._handle is not None:
            self._disk.close(self._handle)
            self._handle = None
