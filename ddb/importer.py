"""`ddb import`: lines of JSON (dump.py) into the database, from a file or from standard input.

Laws:

1. Afterwards every key is as its last line says, whatever was killed or cut off meanwhile, on either side.
2. Where it is stopped, the same command goes on behind the last line that is known to be in the database, and says so.
3. Bounded memory: a few batches of lines, however long the input.
4. What can't be taken is named by its line, and what stands before it is in the database.

Theory. Many lines are one batch, one entry of the log; several batches are under way at once, each over a connection of
its own, so they may arrive in any order. That is only allowed where the order makes no difference: no two batches
under way have a key in common. A line whose key is under way waits until everything is answered.

A batch whose answer is lost is sent again, under the same number of the same session, so that its first copy, if it
turns up late, does nothing: it might undo what a later line says. For the same reason the session of a run that was
killed is closed before another one goes on.

How far it got is kept beside the input, in FILE.import: the length of what is done, and its checksum, so that another
file under the same name is noticed; and the session.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from ddb import dump
from ddb.client import Client, connect
from ddb.console import ERROR, OK, UsageError, complain
from ddb.errors import BadRequest, DdbError, SessionExpired, TooLarge
from ddb.progress import Progress

BATCH_OPS: Final = 500
BATCH_BYTES: Final = 512 << 10
UNDER_WAY_MAX: Final = 4
SAVED_EVERY_S: Final = 0.5
SLICE_S: Final = 5.0  # for one call
PATIENCE_S: Final = 60.0  # for one batch, through elections and restarts


class BadInput(DdbError):
    """A line that can't be taken."""


@dataclass(slots=True)
class Batch:
    """Lines that are written together: what they ask for, their keys, the first line's number, and where the input
    stands behind the last."""

    first: int = 0
    ops: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    bytes: int = 0
    behind: Place | None = None

    @property
    def full(self) -> bool:
        """Whether it should go."""
        return len(self.ops) >= BATCH_OPS


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the input: behind so many `bytes`, whose checksum is `crc`, and so many `lines`."""

    bytes: int = 0
    lines: int = 0
    crc: int = 0


def import_(client: Client, args: argparse.Namespace) -> int:
    """Run `ddb import`."""
    state = args.state or (None if args.file == "-" else Path(f"{args.file}.import"))
    patience_s = max(args.timeout, PATIENCE_S)
    cluster = str(client.status().get("cluster"))
    note = Note(state, cluster, args.into or "")
    with contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if args.file == "-" else stack.enter_context(open(args.file, "rb"))
        progress = stack.enter_context(Progress(sys.stderr))
        begun = None if args.restart else note.read()
        source = Source(stream, args.file)
        if begun is not None:
            if not source.skip(begun):
                raise UsageError(f"{args.file} is not what was being imported here; to begin anew, say --restart.")
            complain(f"Going on behind line {begun.lines:,}, where it was stopped.")
        writer = stack.enter_context(Writer(client, args.server, patience_s))
        note.take_over(writer)
        work = Importer(source, writer, note, args.into or "", progress.show)
        work.run()
    note.forget()
    if not args.quiet:
        complain(work.said())
    if source.lacks:
        complain(source.lacks)
    return ERROR if source.lacks else OK


class Note:
    """How far it got, in the file at `path`; nothing is kept where that is None."""

    def __init__(self, path: Path | None, cluster: str, into: str) -> None:
        self._path = path
        self._of = {"cluster": cluster, "into": into}
        self._before: int | None = None  # the session of the run that was stopped
        self._session: int | None = None
        self._due_s = 0.0

    def read(self) -> Place | None:
        """The place where an import into this cluster was stopped. Raises OSError."""
        if self._path is None or not self._path.exists():
            return None
        try:
            kept = json.loads(self._path.read_bytes())
            if {name: kept[name] for name in self._of} != self._of:
                return None
            self._before = kept.get("session")
            return Place(int(kept["bytes"]), int(kept["lines"]), int(kept["crc"]))
        except (ValueError, KeyError, TypeError):
            return None

    def take_over(self, writer: Writer) -> None:
        """See that nothing of the run before is done any more, and note the session of `writer`. Raises a DdbError."""
        if isinstance(self._before, int):
            writer.end_session(self._before)
        self._session = writer.session

    def keep(self, place: Place, now: bool = False) -> None:
        """Keep `place`, unless the last one was kept a moment ago."""
        if self._path is None or (not now and time.monotonic() < self._due_s):
            return
        self._due_s = time.monotonic() + SAVED_EVERY_S
        beside = self._path.with_name(f"{self._path.name}.new")
        try:
            beside.write_text(json.dumps({**self._of, **asdict(place), "session": self._session}), encoding="utf-8")
            os.replace(beside, self._path)
        except OSError as error:
            complain(f"How far it got can't be kept in {self._path} ({error.strerror}); name a place with --state.")
            self._path = None

    def forget(self) -> None:
        """All is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Source:
    """The lines of `stream`, called `name` where something is wrong with one."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self.name = "standard input" if name == "-" else name
        self.place = Place()
        self.lacks = ""  # what the export says is missing from it
        self._head = False
        self._ended = False
        self._joined = False

    def skip(self, place: Place) -> bool:
        """Pass over what lies before `place`. Returns whether it is what lay there before."""
        crc, left = 0, place.bytes
        beginning = b""
        while left:
            data = self._stream.read(min(left, 1 << 20))
            if not data:
                return False
            beginning = beginning or data[:64]
            crc = zlib.crc32(data, crc)
            left -= len(data)
        self._head = beginning.startswith(b'{"ddb":"export"')
        self.place = place
        return crc == place.crc

    def lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """What each line says, and how long it is; `place` is behind it. Raises BadInput."""
        for line in iter(lambda: self._stream.readline(dump.LINE_BYTES_MAX + 1), b""):
            before = self.place
            behind = Place(before.bytes + len(line), before.lines + 1, zlib.crc32(line, before.crc))
            if line.strip():
                try:
                    said = dump.read(line)
                except BadRequest as error:
                    raise BadInput(f"{self.name}:{behind.lines}: the line {error.message}.") from None
                if "key" not in said:
                    self._look(said, before)
                self.place = behind
                yield said, len(line)
            self.place = behind
        if self._head and not self._ended:
            self.lacks = f"{self.name} is not whole: its end is missing, so it was cut off while it was written."

    def _look(self, said: dict[str, Any], before: Place) -> None:
        """Take in a line of the export about itself."""
        if said[dump.MARK] == "export":
            self._head, self._ended = True, False
            self._joined = before.bytes > 0  # `cat one two`: their checksums begin anew
        elif said[dump.MARK] == "end":
            self._ended = True
            if said.get("crc32") != before.crc and not self._joined:
                self.lacks = f"{self.name} has been changed since it was written: its checksum is another one."


class Writer:
    """Writes batches over a few connections at once, under the numbers of one session.

    `servers` are the addresses that `client` was made with; a batch is tried for `patience_s`.
    """

    def __init__(self, client: Client, servers: str, patience_s: float) -> None:
        self._client = client
        self._servers = servers
        self._patience_s = patience_s
        self.session = self._open()
        self._numbers = itertools.count(1)
        self._pool = ThreadPoolExecutor(UNDER_WAY_MAX, "import")
        self._idle: queue.SimpleQueue[Client] = queue.SimpleQueue()
        self._stopping = False
        for _ in range(UNDER_WAY_MAX):
            self._idle.put(connect(servers, timeout_s=SLICE_S, unreachable_s=SLICE_S))

    def _open(self) -> int:
        session: int = self._client.call({"op": "session_open"}, timeout_s=self._patience_s)["client"]
        return session

    def begin(self, ops: list[dict[str, Any]]) -> Future[None]:
        """Write `ops` in one entry."""
        return self._pool.submit(self._write, ops, next(self._numbers))

    def _write(self, ops: list[dict[str, Any]], number: int) -> None:
        client = self._idle.get()
        try:
            request = {"op": "batch", "ops": ops} if len(ops) > 1 else ops[0]  # a value may be as large as a request
            self._insist(client, request, number)
        finally:
            self._idle.put(client)

    def _insist(self, client: Client, request: dict[str, Any], number: int) -> None:
        """Send a request until it is done, in short calls, so that an interrupt need not wait for a long one."""
        deadline_s = time.monotonic() + self._patience_s
        session, doubt = self.session, False
        while True:
            try:
                client.call({**request, "client": session, "seq": number})
                return
            except SessionExpired as error:
                if doubt or not error.definite:
                    raise
                session, number = self._renewed(session), next(self._numbers)  # the input was silent for an hour
            except DdbError as error:
                if not (error.retry or not error.definite) or self._stopping or time.monotonic() > deadline_s:
                    raise
                doubt = doubt or not error.definite

    def _renewed(self, expired: int) -> int:
        if self.session == expired:
            self.session = self._open()
        return self.session

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.hurry()
        self._pool.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()
        with contextlib.suppress(DdbError):
            self.end_session(self.session, 1.0)

    def end_session(self, session: int, timeout_s: float | None = None) -> None:
        """Close a session: what was sent under it and is not done yet, never will be. Raises a DdbError."""
        self._client.call({"op": "session_close", "client": session}, timeout_s=timeout_s)

    def hurry(self) -> None:
        """What is under way is not tried any longer than the call that it is in."""
        self._stopping = True


class Importer:
    """One import: from `source` by way of `writer`, with `into` in front of each key."""

    def __init__(self, source: Source, writer: Writer, note: Note, into: str, show: Callable[[str], None]) -> None:
        self._source = source
        self._writer = writer
        self._note = note
        self._into = into
        self._show = show
        self._under_way: deque[tuple[Batch, Future[None]]] = deque()
        self._keys: set[str] = set()  # of all batches under way
        self._batch = Batch()
        self._done = source.place
        self._ops = 0
        self._began_s = time.monotonic()

    def run(self) -> None:
        """Import all there is. Raises DdbError and OSError; what is done then is kept in the note."""
        try:
            try:
                for said, size in self._source.lines():
                    self._take(said, size)
            except BadInput:
                self._finish()
                raise
            self._finish()
        except BaseException:
            self._writer.hurry()
            raise
        finally:
            with contextlib.suppress(DdbError):  # the first one is told
                self._drain()
            self._note.keep(self._done, now=True)

    def _finish(self) -> None:
        self._send()
        self._drain()
        self._done = self._source.place if not self._batch.ops else self._done

    def said(self) -> str:
        """What there is to say of it."""
        took_s = time.monotonic() - self._began_s
        return f"{self._ops:,} keys written in {took_s:.1f} s."

    def _take(self, said: dict[str, Any], size: int) -> None:
        """Put a line into the batch, and send that when it is full."""
        if "key" in said:
            if self._batch.ops and self._batch.bytes + size > BATCH_BYTES:
                self._send()
            key = self._into + said["key"]
            if key in self._keys:
                self._drain()
            gone = "value" not in said
            batch = self._batch
            batch.ops.append(
                {"op": "delete", "key": key} if gone else {"op": "put", "key": key, "value": said["value"]}
            )
            batch.keys.add(key)
            batch.bytes += size
            batch.first = batch.first or self._source.place.lines
        self._batch.behind = self._source.place
        if self._batch.full:
            self._send()

    def _send(self) -> None:
        """Send the batch, when there is room for it."""
        batch, self._batch = self._batch, Batch()
        if not batch.ops:
            return
        while len(self._under_way) >= UNDER_WAY_MAX:
            self._settle()
        self._keys |= batch.keys
        self._under_way.append((batch, self._writer.begin(batch.ops)))
        while self._under_way and self._under_way[0][1].done():
            self._settle()

    def _drain(self) -> None:
        """Wait until all that is under way is answered."""
        while self._under_way:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest batch. Raises what it met with."""
        batch, future = self._under_way[0]
        assert batch.behind is not None
        try:
            future.result()
        except (BadRequest, TooLarge) as error:
            raise BadInput(f"{self._source.name}:{batch.first}-{batch.behind.lines}: {error.message}") from None
        self._under_way.popleft()
        self._keys -= batch.keys
        self._done = batch.behind
        self._ops += len(batch.ops)
        self._note.keep(self._done)
        rate = self._ops / max(time.monotonic() - self._began_s, 1e-9)
        self._show(f"{self._done.lines:,} lines, {self._done.bytes >> 20:,} MiB, {rate:,.0f} keys/s")
