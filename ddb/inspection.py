"""Whether the rows of a snapshot that is arriving are right: looked at while it comes, by this process or by one of its own.

Laws:

* What `finish` returns has been verified: each row and record, the history, and the digest of all of them.
* The process of its own is believed when it ends well. Whatever else becomes of it, this one looks at all rows, and says what is
  wrong with them.
* It ends when this one does, however that ends.

Theory. The rows lie in the file nearly in the order of their keys, where they have been written in that order. So every
few megabytes those behind the last one known are read, up to the first whose page has not come; at the end, few are
left. Where keys came in at random, the first row stands anywhere, and all are read at the end.

To verify a row takes 1.5 µs of an interpreter, of which a process has one at a time: beside the loop that decodes what arrives,
2.4, and a newcomer with a million rows was busy with that for half of its time. So the rows of a large snapshot are verified by a
second process (`Aside`). It is told on its standard input that more has come (`.`) or all (`!`), and reads the file by itself. When it
is through, or at the first row that is not right, it says what it knows on its standard output: a line of JSON, and the tables of its
filter. Meanwhile this one has SQLite look at the pages; then it goes on where the other has ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final, Protocol, cast

from ddb.disk import Disk, OsDisk
from ddb.layers import KeyFilter
from ddb.scheduling import step_back
from ddb.snapshot import Meta, Verified, check_copy, verify_early

log = logging.getLogger(__name__)

ASIDE_MIN_BYTES: Final = 32 << 20  # of a file that is worth a process, which takes 0.1 s to begin
ROW_BYTES: Final = 300  # of the file, about, for the first guess at how many keys there are
MORE: Final = b"."
ALL: Final = b"!"
_RUN: Final = "import sys; sys.path.insert(0, sys.argv[1]); from ddb.inspection import main; main(*sys.argv[2:])"


class Inspection(Protocol):
    """Who verifies one file that is arriving, whose bytes are all there in the end; used by one thread."""

    def look(self) -> None:
        """More of the file is there; its rest is zeros."""

    def finish(self) -> tuple[Meta, KeyFilter]:
        """All of it is there. Returns which state it is, and its keys. Raises CorruptStore, StartupError or OSError."""

    def close(self) -> None:
        """It is not needed any more. May be called twice."""


Inspect = Callable[[Path, int], Inspection]
"""Begins to inspect the file at a path, of so many bytes."""


class Here:
    """The inspection of the file `path` of `size_bytes` by the thread that calls."""

    def __init__(self, disk: Disk, path: Path, size_bytes: int) -> None:
        self._disk = disk
        self._path = path
        self.keys = KeyFilter(size_bytes // ROW_BYTES)
        self.known = Verified()

    def look(self) -> None:
        """See Inspection."""
        self.known = verify_early(self._disk, self._path, self.known, self.keys.add)

    def finish(self) -> tuple[Meta, KeyFilter]:
        """See Inspection."""
        return check_copy(self._disk, self._path, self.keys.add, lambda: self.known), self.keys

    def close(self) -> None:
        """See Inspection."""


class Aside:
    """The inspection of the rows by a process of its own, and of the rest by the thread that calls. Raises OSError where there
    can't be such a process."""

    def __init__(self, disk: Disk, path: Path, size_bytes: int) -> None:
        self._disk = disk
        self._path = path
        self._keys = KeyFilter(size_bytes // ROW_BYTES)
        package = str(Path(__file__).resolve().parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _RUN, package, str(path.resolve()), str(size_bytes)],
            bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._answer = self._process.stdin, io.BufferedReader(cast(io.RawIOBase, self._process.stdout))
        log.info("process %d verifies the rows of %s while that arrives", self._process.pid, path)

    def look(self) -> None:
        """See Inspection."""
        self._order(MORE)

    def finish(self) -> tuple[Meta, KeyFilter]:
        """See Inspection."""
        self._order(ALL)
        meta = check_copy(self._disk, self._path, lambda keys: self._keys.add(keys), self._verdict)
        self.close()
        return meta, self._keys

    def close(self) -> None:
        """See Inspection."""
        self._process.kill()
        self._orders.close()
        self._answer.close()
        self._process.wait()

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, so it will not answer either
            self._orders.write(order)

    def _verdict(self) -> Verified:
        """What the process knows in the end, when it has ended well; its filter is then this one's."""
        line = self._answer.readline()
        said = json.loads(line) if line.endswith(b"\n") else {}
        tables = [bytearray(size) for size in said.pop("tables", ())]
        if not tables or any(self._answer.readinto(table) < len(table) for table in tables) or self._process.wait():
            log.warning("process %d ended too early; this one verifies %s", self._process.pid, self._path)
            return Verified()
        self._keys = KeyFilter.of(tables)
        return Verified(**said)


def begin(disk: Disk, path: Path, size_bytes: int) -> Inspection:
    """Begin to inspect a real file: aside where it is large, if that can be."""
    if size_bytes >= ASIDE_MIN_BYTES and sys.executable:
        try:
            return Aside(disk, path, size_bytes)
        except OSError as error:
            log.warning("no process can be started to verify %s (%s), so this one does", path, error)
    return Here(disk, path, size_bytes)


def main(path: str, size_bytes: str) -> None:
    """What the process of its own does."""
    step_back()
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    here = Here(OsDisk(), Path(path), int(size_bytes))
    all_is_there = False
    while not all_is_there:
        all_is_there = ALL in orders.get()
        here.look()
    with open(1, "wb") as answer:
        said = {**asdict(here.known), "tables": [*map(len, here.keys.tables)]}
        answer.write(json.dumps(said).encode() + b"\n")
        for table in here.keys.tables:
            answer.write(table)


def _listen(orders: queue.SimpleQueue[bytes]) -> None:
    """Take orders, several at once where they have gathered; end with who gives them."""
    while order := os.read(0, 4096):
        orders.put(order)
    os._exit(1)
