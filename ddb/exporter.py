"""`ddb export`: a range of keys as lines of JSON (dump.py), to a file or to standard output.

Laws:

1. No more than a page is in memory at a time.
2. A file appears under its name when it is whole and on disk, and not before. Until then it is FILE.part, and the same command
   goes on with it where it was killed.
3. What it can't promise it says: where the changes made meanwhile are not kept any more by any node, each key is as it was at
   some moment between two revisions, and both are named.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from ddb import changes, dump
from ddb.client import Client, next_page
from ddb.commands import prefix_end
from ddb.console import OK, UsageError, complain
from ddb.errors import BadRequest, Compacted
from ddb.progress import Progress

PAGE_ITEMS: Final = 2000
CHANGES_PAGE: Final = 1000  # asked for at once
PATIENCE_S: Final = 30.0  # for one page, through elections and restarts

Range = dict[str, str]


@dataclass(frozen=True, slots=True)
class Begun:
    """An export that was begun: the revision of its first page, the sums of what is there, and the last key."""

    from_rev: int
    sums: dump.Sums
    last_key: str | None


def export(client: Client, args: argparse.Namespace) -> int:
    """Run `ddb export`."""
    if args.prefix is not None and (args.start is not None or args.end is not None):
        raise UsageError("Give --prefix, or --start and --end, not both.")
    named = {"prefix": args.prefix, "start": args.start, "end": args.end}
    range_ = {name: value for name, value in named.items() if value is not None}
    with Progress(sys.stderr) as progress:
        work = Exporter(client, range_, max(args.timeout, PATIENCE_S), progress.show)
        said = work.to_stream(sys.stdout.buffer) if args.file == "-" else _to_file(work, args)
    if not args.quiet:
        complain(said)
    return OK


def _to_file(work: Exporter, args: argparse.Namespace) -> str:
    """Write FILE by way of FILE.part (law 2)."""
    target = Path(args.file)
    if target.is_dir():
        raise UsageError(f"{target} is a directory; name a file.")
    if target.exists() and not args.force:
        raise UsageError(f"{target} is there already; choose another name, or say --force.")
    part = target.with_name(f"{target.name}.part")
    with part.open("a+b") as out:
        _claim(out, part)
        begun = None if args.restart else work.begun(out)
        if begun is None:
            out.truncate(0)
        else:
            complain(f"Going on with {part} behind {begun.sums.keys:,} keys.")
        said = work.to_stream(out, begun)
        out.flush()
        os.fsync(out.fileno())
    part.replace(target)
    _sync_directory(target.parent)
    return said


def _claim(file: BinaryIO, path: Path) -> None:
    """Make sure that nobody else writes this file; the claim ends with the process, however that ends. Raises UsageError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"Another export is writing {path} now.") from None


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Exporter:
    """One export: of `range_` (`prefix`, or `start` and `end`), asked for page by page, each for at most `patience_s`."""

    def __init__(self, client: Client, range_: Range, patience_s: float, show: Callable[[str], None]) -> None:
        self._client = client
        self._range = range_
        self._patience_s = patience_s
        self._show = show
        self._cluster = str(client.status().get("cluster"))

    def to_stream(self, out: BinaryIO, begun: Begun | None = None) -> str:
        """Write all lines, or those behind what was `begun`. Returns what there is to say of it. Raises DdbError, OSError."""
        from_rev = None if begun is None else begun.from_rev
        sums = dump.Sums() if begun is None else begun.sums
        rev = from_rev or 0
        began_s, before = time.monotonic(), sums.keys
        for page in self._pages(None if begun is None else begun.last_key):
            if from_rev is None:
                from_rev = int(page["rev"])
                self._write(out, sums, [dump.head(self._cluster, from_rev, self._range)], about_keys=False)
            rev = int(page["rev"])
            self._write(out, sums, [dump.put(item["key"], item["value"]) for item in page["items"]])
            rate = (sums.keys - before) / max(time.monotonic() - began_s, 1e-9)
            self._show(f"{sums.keys:,} keys, {sums.size_bytes >> 20:,} MiB, {rate:,.0f} keys/s")
        assert from_rev is not None, "a scan has a page"
        consistent = self._changes(out, sums, from_rev, rev)
        self._write(out, sums, [dump.end(sums, rev, consistent)], about_keys=False)
        out.flush()
        return self._said(sums, from_rev, rev, consistent)

    def _said(self, sums: dump.Sums, from_rev: int, rev: int, consistent: bool) -> str:
        counted = f"{sums.keys:,} keys" + (f" and {sums.changes:,} changes made meanwhile" if sums.changes else "")
        if consistent:
            return f"{counted}, as of revision {rev}; sha256 {sums.pages.hexdigest()}."
        return (
            f"{counted}; but the changes made meanwhile are not kept any more, so this is no state of one moment: "
            f"each key is as it was at some revision from {from_rev} to {rev}."
        )

    def _write(self, out: BinaryIO, sums: dump.Sums, lines: list[bytes], about_keys: bool = True) -> None:
        sums.add(lines, about_keys)
        out.write(b"".join(lines))

    def _pages(self, after: str | None) -> Iterator[dict[str, Any]]:
        request: dict[str, Any] = {"op": "scan", **self._range, "limit": PAGE_ITEMS}
        if after is not None:
            request = next_page(request, after)
        while True:
            page = self._client.call(request, timeout_s=self._patience_s)
            yield page
            if not page["more"] or not page["items"]:
                return
            request = next_page(request, page["items"][-1]["key"])

    # ------------------------------------------------------------- changes

    def _changes(self, out: BinaryIO, sums: dump.Sums, from_rev: int, to_rev: int) -> bool:
        """Write what has changed behind `from_rev`, up to `to_rev`. Returns whether that could be told."""
        if to_rev == from_rev:
            return True
        try:
            for lines in self._changed_pages(from_rev + 1, to_rev):
                if lines and not sums.in_changes:
                    self._write(out, sums, [dump.turn(to_rev)], about_keys=False)
                    sums.in_changes = True
                self._write(out, sums, lines)
                self._show(f"{sums.keys:,} keys, {sums.changes:,} changes made meanwhile")
        except (Compacted, BadRequest):  # BadRequest: a node that has no history
            return False
        return True

    def _changed_pages(self, first: int, to_rev: int) -> Iterator[list[bytes]]:
        low = self._range.get("prefix", self._range.get("start", ""))
        prefix = self._range.get("prefix")
        high = prefix_end(prefix) if prefix is not None else self._range.get("end")
        pages = changes.pages(
            self._client, first, to_rev, prefix=prefix, limit=CHANGES_PAGE, timeout_s=self._patience_s
        )
        for page in pages:
            yield [
                dump.put(c["key"], c["value"]) if c["event"] == "put" else dump.deleted(c["key"])
                for c in page["changes"]
                if c["key"] >= low and (high is None or c["key"] < high)
            ]

    # ----------------------------------------------------------- going on

    def begun(self, file: BinaryIO) -> Begun | None:
        """What the open `file` holds of an export of this range of this cluster; it is cut to the last whole line of its
        pages. None where it holds nothing of use."""
        file.seek(0)
        line = file.readline(dump.LINE_BYTES_MAX)
        try:
            said = dump.read(line)
        except BadRequest:
            return None
        ours = (said.get(dump.MARK), said.get("cluster"), said.get("range")) == ("export", self._cluster, self._range)
        if not ours or not isinstance(said.get("from"), int):
            return None
        sums = dump.Sums()
        sums.add([line], about_keys=False)
        last_key = None
        for line in iter(lambda: file.readline(dump.LINE_BYTES_MAX), b""):
            if not line.endswith(b"\n"):
                break
            if not line.startswith(b'{"key":'):  # the changes begin, or the end: these are written anew
                break
            sums.add([line])
            last = line
        else:
            line = b""
        if sums.keys:
            last_key = dump.read(last)["key"]
        file.truncate(sums.size_bytes)
        file.seek(0, os.SEEK_END)
        return Begun(said["from"], sums, last_key)
