"""Many committed batches at once, as after a start: they are read in groups, and what they will change is looked up together.

Law: nothing here changes what applying does; it only makes it quicker.

Theory. A row that is only in the snapshot's file costs 10 µs to look up alone, and 3.5 µs among a few thousand others in
the order of the file: SQLite then goes from page to page, and Python makes one call for hundreds. A start with 75,000
entries behind the last checkpoint, of a million keys, takes half the time for it; so does what a newcomer applies behind
its snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from ddb.codec import decode_batch
from ddb.messages import Batch, Command

BACKLOG_MIN: Final = 16  # batches; fewer are applied one by one,
BACKLOG_BYTES_MIN: Final = 512 << 10  # unless they are so large, as when a member catches up
GROUP_BYTES_MAX: Final = 4 << 20  # of batches that are in memory at once, but for one


def is_long(batches: Sequence[Batch]) -> bool:
    """Whether it pays to look up together what `batches` will change."""
    return len(batches) >= BACKLOG_MIN or sum([len(batch.data) for batch in batches]) >= BACKLOG_BYTES_MIN


def groups(batches: Sequence[Batch], read: Callable[[int], bytes]) -> Iterator[list[Batch]]:
    """The `batches`, some at a time, with the commands that they hold; `read(first)` gives the bytes of one whose are not
    in memory."""
    some: list[Batch] = []
    size = 0
    for batch in batches:
        if not batch.commands and batch.config is None:
            data = batch.data or read(batch.first)
            batch = replace(batch, commands=decode_batch(data).commands)
            size += len(data)
        some.append(batch)
        if size > GROUP_BYTES_MAX:
            yield some
            some, size = [], 0
    if some:
        yield some


def keys(batches: Sequence[Batch]) -> set[str]:
    """The keys that `batches` are about to write, as far as that is plain to see; whatever else they need is looked up
    when it is needed."""
    found: set[str] = set()
    for batch in batches:
        _collect(batch.commands or (), found)
    return found


def _collect(commands: Sequence[Command], found: set[str]) -> None:
    for command in commands:
        if command[0] in ("put", "incr", "delete"):
            found.add(command[1])
        elif command[0] == "batch":
            _collect(command[1], found)
        elif command[0] == "once":
            _collect([command[3]], found)
