"""`ddb mirror`: a prefix of one cluster, copied to another and kept up to date there.

Laws:

1. From the moment that it follows, the copy is always the source as it was at some revision, and that revision is told:
   all changes of a revision come at once. (But for a revision of more changes than one transaction takes.)
2. Where it is stopped or killed, the next run goes on from where it was. How far it got stands in the copy itself, under
   `ddb.mirror/…`, and is written in the same transaction as what it tells of: neither is ever ahead of the other.
3. Two mirrors of the same never mix: who finds that another one has written begins to doubt itself, and ends.
4. Where the source keeps the changes no longer from where it was, it copies everything again, and says so.

Theory. First the *copy*: pages of the source's keys, each at a revision of its own; what the target has in between and
the source has not, is deleted. Then the changes behind the first page's revision, in order, make it right (dump.py tells
why). From there on it *follows*: a watch rings when something has changed, and history tells what, whole revisions at a
time. While the first copy is made, the target is not the source at any revision.

Each step is a transaction under the condition that the note is still the one that was written or read last. A step whose
answer is lost is looked up: the note says whether it was done.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ddb import changes, wire
from ddb.client import Client, connect, next_page
from ddb.commands import prefix_end
from ddb.console import OK, UsageError, complain
from ddb.errors import Compacted, DdbError
from ddb.progress import Progress
from ddb.watching import Watch

NOTES: Final = "ddb.mirror/"
PAGE_ITEMS: Final = 500
STEP_OPS: Final = 2000
STEP_BYTES: Final = 4 << 20
PATIENCE_S: Final = 10.0  # for one call
PAUSE_MAX_S: Final = 5.0
NOTED_EVERY_S: Final = 60.0  # where nothing changes that is mirrored, but the rest goes on

Op = dict[str, Any]


class Overtaken(DdbError):
    """Another mirror of the same has written."""


class Late(DdbError):
    """A step of this one, given up before, was done after all."""

    retry = True


@dataclass(frozen=True, slots=True)
class Note:
    """How far a mirror got: behind the key `after` in the copy that began at revision `rev`, or, where that is None, up to
    `rev` with the changes."""

    rev: int
    after: str | None


def mirror(client: Client, args: argparse.Namespace) -> int:
    """Run `ddb mirror`."""
    try:
        target = connect(args.target, timeout_s=PATIENCE_S)
    except DdbError as error:
        raise UsageError(error.message) from None
    source = connect(args.server, timeout_s=PATIENCE_S)
    with source, target, Progress(sys.stderr) as progress:

        def say(sentence: str) -> None:
            if not args.quiet:
                progress.clear()
                complain(sentence)

        work = Mirror(source, target, args.prefix or "", args.into, say, progress.show)
        work.run(once=args.once, anew=args.restart)
    return OK


class Mirror:
    """The keys of `source` that begin with `prefix`, kept in `target` with `into` in front of them."""

    def __init__(
        self,
        source: Client,
        target: Client,
        prefix: str,
        into: str,
        say: Callable[[str], None],
        show: Callable[[str], None],
    ) -> None:
        self._source = source
        self._target = target
        self._prefix = prefix
        self._into = into
        self._say = say
        self._show = show
        self._changes = 0
        self._noted_s = time.monotonic()
        ours, theirs = (str(client.status().get("cluster")) for client in (source, target))
        if ours == theirs and (into + prefix).startswith(prefix):
            raise UsageError(
                "Source and target are the same cluster, so the copy would be copied; give another --into."
            )
        self._of = {"source": ours, "prefix": prefix, "into": into}
        self._key = NOTES + hashlib.sha256(wire.encode(self._of)).hexdigest()[:16]
        self._me = secrets.token_hex(8)
        self._rev = 0  # of the note
        self._last: dict[str, Any] = {}  # what it says of how far it got

    def run(self, once: bool = False, anew: bool = False) -> None:
        """Copy, and follow: for ever, or `once` until it is up to date; `anew` copies again what was copied before.

        Raises a DdbError where it can't begin; after that, it waits for whatever doesn't answer.
        """
        note = self._read()
        note, began, known, pause_s = None if anew else note, False, True, 0.1
        while True:
            try:
                if not known:
                    note, known = self._read(), True
                if note is None or note.after is not None:
                    note = self._copy(note)
                began = True
                note = self._catch_up(note)
                if once:
                    self._say(f"Up to date with revision {note.rev}: {self._changes:,} keys written or deleted.")
                    return
                pause_s = 0.1
                self._follow(note)
            except Compacted as error:
                self._say(f"The source keeps no changes from revision {note.rev if note else 0} on: {error.message}")
                self._say("So everything is copied again.")
                note = None
            except DdbError as error:
                if not began or not (error.retry or not error.definite):
                    raise
                self._say(f"Waiting: {error.message}")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
                known = False

    # ---------------------------------------------------------------- copy

    def _copy(self, note: Note | None) -> Note:
        """Make the target's keys those of the source, page by page, from behind `note` on. Returns the note of a copy that
        is complete but for the changes made meanwhile."""
        self._say(
            f"Copying {repr(self._prefix) if self._prefix else 'everything'}"
            + (f", from behind {note.after!r}." if note else ".")
        )
        request: dict[str, Any] = {"op": "scan", "prefix": self._prefix, "limit": PAGE_ITEMS}
        begin = self._prefix if note is None or note.after is None else note.after + "\0"
        if note is not None and note.after is not None:
            request = next_page(request, note.after)
        rev, count = None if note is None else note.rev, 0
        while True:
            page = self._source.call(request)
            rev = int(page["rev"]) if rev is None else rev
            items = page["items"]
            last = items[-1]["key"] if page["more"] and items else None
            end = prefix_end(self._prefix) if last is None else last + "\0"
            note = Note(rev, last)
            self._write(self._differences(items, begin, end), note)
            count += len(items)
            self._show(f"{count:,} keys compared, {self._changes:,} written or deleted")
            if last is None:
                return note
            begin, request = last + "\0", next_page(request, last)

    def _differences(self, items: list[dict[str, Any]], begin: str, end: str | None) -> Iterator[Op]:
        """What makes the target's keys between `begin` and `end` those of `items`."""
        wanted = {self._into + item["key"]: item["value"] for item in items}
        low = self._into + begin
        high = self._into + end if end is not None else prefix_end(self._into)
        request: dict[str, Any] = {"op": "scan", "limit": PAGE_ITEMS, **({"start": low} if low else {})}
        request.update({} if high is None else {"end": high})
        while True:
            page = self._target.call(request)
            for item in page["items"]:
                key = item["key"]
                if key in wanted:
                    if wire.encode([wanted[key]]) == wire.encode([item["value"]]):
                        del wanted[key]
                elif not key.startswith(NOTES):
                    yield {"op": "delete", "key": key}
            if not page["more"] or not page["items"]:
                break
            request = next_page(request, page["items"][-1]["key"])
        for key, value in wanted.items():
            if not key.startswith(NOTES):
                yield {"op": "put", "key": key, "value": value}

    # -------------------------------------------------------------- follow

    def _catch_up(self, note: Note) -> Note:
        """Repeat the changes behind `note` until there are no more."""
        for page in changes.pages(self._source, note.rev + 1, prefix=self._prefix):
            if not page["changes"] and page["rev"] == note.rev:
                return note
            for ops, rev in self._revisions(page["changes"]):
                note = Note(rev, None)
                self._write(ops, note)
            reached = note.rev if page["more"] else max(page["rev"], note.rev)
            if time.monotonic() - self._noted_s > NOTED_EVERY_S:
                self._write([], Note(reached, None))
            note = Note(reached, None)
            self._show(f"at revision {note.rev}, {self._changes:,} keys written or deleted")
        return note

    def _revisions(self, changed: list[dict[str, Any]]) -> Iterator[tuple[list[Op], int]]:
        """What repeats these changes at the target, in pieces that hold whole revisions, each with its last one; no more
        of them than one transaction takes, unless a single revision is more."""
        piece: list[Op] = []
        size = rev = 0
        for this, group in itertools.groupby(changed, lambda change: int(change["rev"])):
            ops = list(self._ops(group))
            more = sum(map(_size, ops))
            if piece and (len(piece) + len(ops) > STEP_OPS or size + more > STEP_BYTES):
                yield piece, rev
                piece, size = [], 0
            piece += ops
            size, rev = size + more, this
        if piece:
            yield piece, rev

    def _ops(self, changed: Iterable[dict[str, Any]]) -> Iterator[Op]:
        """What repeats these changes at the target."""
        for change in changed:
            key = self._into + change["key"]
            if key.startswith(NOTES):
                continue
            if change["event"] == "put":
                yield {"op": "put", "key": key, "value": change["value"]}
            else:
                yield {"op": "delete", "key": key}

    def _follow(self, note: Note) -> None:
        """Repeat the changes as they come. Ends only by a DdbError."""
        self._say(f"Following from revision {note.rev}.")
        with self._source.watch(prefix=self._prefix, from_rev=note.rev + 1) as watch:
            while True:
                self._ring(watch)
                note = self._catch_up(note)

    def _ring(self, watch: Watch) -> None:
        """Wait until something has changed, or for a while, and take all the watch has to tell: history tells it again."""
        if watch.wait(NOTED_EVERY_S) is not None:
            while watch.wait(0.0) is not None:
                pass

    # --------------------------------------------------------------- the note

    def _read(self) -> Note | None:
        """The note that the target holds."""
        item = self._target.get(self._key)
        self._rev = 0 if item is None else item.rev
        self._last = {}
        if item is None or not isinstance(item.value, dict):
            return None
        rev, after = item.value.get("rev"), item.value.get("after")
        if not isinstance(rev, int) or not (after is None or isinstance(after, str)):
            return None
        self._last = {"rev": rev, "after": after}
        return Note(rev, after)

    def _write(self, ops: Iterable[Op], note: Note) -> None:
        """Do `ops` at the target, and write the `note` in the same transaction as the last of them. Raises Overtaken."""
        steps = _steps(ops)
        step = next(steps, [])
        for following in steps:  # more than one transaction takes: the note stays the one before until the last
            self._step(step, {})
            step = following
        self._step(step, {"rev": note.rev, "after": note.after})
        self._noted_s = time.monotonic()

    def _step(self, ops: list[Op], fields: dict[str, Any]) -> None:
        """One transaction: `ops`, and the note with these `fields` changed, where it is still the one known here."""
        mark = secrets.token_hex(8)
        value = {**self._of, **self._last, **fields, "by": self._me, "mark": mark}
        then = [*ops, {"op": "put", "key": self._key, "value": value}]
        request = {"op": "txn", "if": [{"key": self._key, "rev": self._rev}], "then": then, "else": []}
        while True:
            try:
                reply = self._target.call(request)
                if reply["succeeded"]:
                    self._rev = int(reply["rev"])
                    break
                answered = True
            except DdbError as error:
                if error.definite:
                    raise
                answered = False
            item = self._target.get(self._key)
            there = item.value if item is not None and isinstance(item.value, dict) else {}
            if item is not None and there.get("mark") == mark:  # an earlier attempt did it
                self._rev = item.rev
                break
            if answered:
                if there.get("by") == self._me:
                    raise Late("A step arrived late.")
                raise Overtaken("Another mirror of the same keys is at work there, so this one ends.")
        self._last = {**self._last, **fields}
        self._changes += len(ops)


def _steps(ops: Iterable[Op]) -> Iterator[list[Op]]:
    """`ops` in as few pieces as one transaction takes, in order."""
    step: list[Op] = []
    size = 0
    for op in ops:
        op_bytes = _size(op)
        if step and (len(step) >= STEP_OPS or size + op_bytes > STEP_BYTES):
            yield step
            step, size = [], 0
        step.append(op)
        size += op_bytes
    if step:
        yield step


def _size(op: Op) -> int:
    """About how many bytes `op` takes."""
    return len(op["key"]) + (len(wire.encode(op["value"])) if "value" in op else 0)
