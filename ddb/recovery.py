"""How a log is read again after whatever happened, and what is done about damage.

Laws:

1. What was acknowledged is never dropped in silence. Either the log is whole; or its very end may have lost something,
   and the member is *in doubt*; or it is refused, and nothing is changed.
2. Doubt is durable before the bytes that raised it are gone, so no crash in between can hide it.
3. Whatever recovery does can be interrupted at any point and done again.
4. What it reads is durable. A killed process leaves names and bytes that only the system's memory holds, and an fsync that
   failed leaves bytes that look saved and never will be. So names and contents are synced first, and then read past the cache.

Theory. Reading stops at the first byte that does not continue the log: the *damage*. Line feeds up to the end of a
file are reserve and mean nothing; zero bytes are never written, so they are damage. What matters is the evidence
behind it. A group is written only after the group before it is durable, and a segment is named only after its header
and all before it are. So, if a valid record behind the damage belongs to a group that *begins* behind it, or to a
later segment, then the damaged bytes were once durable and perhaps acknowledged to a leader: CorruptLog. If not, the
damaged group is the last one. It was torn by a crash, most likely, and never acknowledged; but a disk that loses its
last sectors looks the same. So the tail is cut and the hard state says `doubt`: this member's vote and
acknowledgements may be forgotten ones, and count for nothing until a leader has confirmed its log. (Alagappan et al.,
"Protocol-Aware Recovery for Consensus-Based Storage", FAST 2018, shows what goes wrong without the distinction.)

`repair=True` treats damage with evidence as a tail: it cuts there too, keeps what it cuts in side files named
`*.damaged`, and carries the newest term and vote found in them over. What the cut entries said must then come from
the leader.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddb.errors import invariant
from ddb.messages import Batch, HardState
from ddb.record import FILL, Cut, Header, Line, Record, Reset, decode, encode, encode_group, lines, search
from ddb.segment import Directory, Segment, corrupt, create

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovered:
    """What the log says.

    `base` and `last` are (index, term): of the entry before the first batch, and of the last entry.
    """

    hard_state: HardState = field(default_factory=HardState)
    base: tuple[int, int] = (0, 0)
    last: tuple[int, int] = (0, 0)
    batches: list[Batch] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    tail_cut: bool = False


@dataclass(frozen=True, slots=True)
class _Damage:
    segment: int  # the number in the file's name
    offset: int
    reason: str
    proven: bool = False  # the bytes check out, but don't fit what precedes them: no crash does that


def recover(directory: Directory, repair: bool) -> Recovered:
    """Open the log in `directory`, made when there is none.

    Returns it with at least one segment open for appending. Raises CorruptLog for damage before valid records unless
    `repair`, and OSError.
    """
    numbers = _tidy(directory)
    directory.sync()
    log = Recovered()
    if not numbers:
        log.segments.append(create(directory, Header(1, log.hard_state, log.base)))
        return log
    damage = _read(directory, numbers, log)
    if damage is None:
        for segment in log.segments:
            segment.finish(directory.disk)
        return log
    evidence = list(_behind(directory, numbers, damage))
    where = directory.file(damage.segment)
    if damage.proven or any(later for later, _ in evidence):
        if not repair:
            _close(directory, log.segments)
            raise corrupt(where, damage.offset, damage.reason)
        _set_aside(directory, where, damage.offset)
    _log.warning("%s, byte %d: %s; the log is cut there", where, damage.offset, damage.reason)
    log.hard_state = replace(_newest(log.hard_state, (line for _, line in evidence)), doubt=True)
    log.tail_cut = True
    _cut(directory, numbers, damage, log, repair)
    return log


def _tidy(directory: Directory) -> list[int]:
    """Remove what an interrupted `create` left; returns the numbers of the segments, ascending."""
    numbers = []
    for name in directory.disk.list(directory.path):
        if name.endswith(".log.new"):
            directory.disk.remove(directory.path / name)
        stem, dot, extension = name.partition(".")
        if stem.isascii() and stem.isdigit() and dot + extension == ".log":
            numbers.append(int(stem))
    return sorted(numbers)


def _read(directory: Directory, numbers: list[int], log: Recovered) -> _Damage | None:
    """Read the segments into `log`, up to the first damage, whose own segment is the last of `log.segments`."""
    for expected, number in enumerate(numbers, numbers[0]):
        if number != expected:
            return _Damage(expected, 0, "the file is missing")
        path = directory.file(number)
        handle = directory.disk.open(path)
        directory.disk.fdatasync(handle)
        directory.disk.drop_cache(handle)
        buffer = directory.disk.pread(handle, directory.disk.size(handle), 0)
        segment = Segment(number, path, handle, 0, len(buffer))
        log.segments.append(segment)
        for line in lines(buffer):
            try:
                _apply(log, segment, line, decode(line.payload))
            except ValueError as error:
                return _Damage(number, line.start, str(error), proven=True)
            segment.end = line.end
        if segment.end == 0:
            return _Damage(number, 0, "its header is not valid")
        if buffer.count(FILL, segment.end) != len(buffer) - segment.end:
            return _Damage(number, segment.end, "no valid record begins here")
    return None


def _apply(log: Recovered, segment: Segment, line: Line, record: Record) -> None:
    """Take one record into `log`. Raises ValueError where it doesn't follow from what precedes it."""
    _expect((line.start == 0) == isinstance(record, Header), "a header begins a segment, and nothing else does")
    match record:
        case Batch(first, last, term):
            _expect(first == log.last[0] + 1 and last >= first, f"batch {first}..{last} after entry {log.last[0]}")
            _expect(term >= log.last[1], f"batch of term {term} after term {log.last[1]}")
            segment.places[first] = (last, term, line.start, line.end - line.start)
            log.batches.append(record)
            log.last = (last, term)
        case HardState():
            log.hard_state = record
        case Header():
            _expect(record.segment == segment.number, f"this is segment {record.segment} under another's name")
            if len(log.segments) == 1:
                log.hard_state, log.base, log.last = record.hard_state, record.after, record.after
            _expect(
                (record.hard_state, record.after) == (log.hard_state, log.last),
                f"it follows {record.after}, the segment before ends with {log.last}",
            )
        case Cut(index, term):
            log.last = cut_after(log.segments, log.base, index)
            while log.batches and log.batches[-1].first > index:
                log.batches.pop()
            if index < log.base[0]:  # the segment that held `index` has been dropped
                log.base = log.last = (index, term)
            _expect(log.last == (index, term), f"a cut after {(index, term)} in a log that then ends with {log.last}")
        case Reset(index, term):
            forget(log.segments)
            log.batches.clear()
            log.base = log.last = (index, term)


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def cut_after(segments: list[Segment], base: tuple[int, int], index: int) -> tuple[int, int]:
    """Forget the places of all batches that begin after `index`; returns the (index, term) that then comes last."""
    for segment in reversed(segments):
        while segment.places:
            first = next(reversed(segment.places))
            if first <= index:
                last, term, _, _ = segment.places[first]
                return last, term
            del segment.places[first]
    return base


def forget(segments: list[Segment]) -> None:
    """Forget the places of all batches."""
    for segment in segments:
        segment.places.clear()


def _behind(directory: Directory, numbers: list[int], damage: _Damage) -> Iterator[tuple[bool, Line]]:
    """All that checks out behind the damage, each with whether it proves that the damaged bytes were durable."""
    for number in numbers:
        if number < damage.segment:
            continue
        start = damage.offset if number == damage.segment else 0
        buffer = _contents(directory, number)
        for line in search(buffer, start):
            yield number > damage.segment or line.group > damage.offset, line


def _contents(directory: Directory, number: int) -> bytes:
    disk = directory.disk
    handle = disk.open(directory.file(number))
    try:
        return disk.pread(handle, disk.size(handle), 0)
    finally:
        disk.close(handle)


def _newest(state: HardState, evidence: Iterator[Line]) -> HardState:
    """The newest term, and the vote in it, among `state` and the records of `evidence`."""
    for line in evidence:
        try:
            record = decode(line.payload)
        except ValueError:
            continue
        if isinstance(record, Header):
            record = record.hard_state
        elif isinstance(record, Batch):
            record = HardState(record.term)
        if isinstance(record, HardState):
            state = max(state, record, key=lambda s: (s.term, s.vote is not None))
    return state


def _set_aside(directory: Directory, path: Path, offset: int) -> None:
    """Copy what lies from `offset` of `path` on into a side file, durably."""
    disk = directory.disk
    if path.name not in disk.list(directory.path):
        return  # it is the file that is missing
    buffer = _contents(directory, int(path.stem))
    handle = disk.open(_free_name(directory, path))
    try:
        written = 0
        while written < len(buffer) - offset:
            written += disk.pwrite(handle, buffer[offset + written :], written)
        disk.fdatasync(handle)
    finally:
        disk.close(handle)
    directory.sync()


def _free_name(directory: Directory, path: Path) -> Path:
    taken = set(directory.disk.list(directory.path))
    candidates = (f"{path.name}{'' if n == 0 else f'.{n}'}.damaged" for n in range(len(taken) + 1))
    return path.with_name(next(name for name in candidates if name not in taken))


def _cut(directory: Directory, numbers: list[int], damage: _Damage, log: Recovered, keep: bool) -> None:
    """Make `log.hard_state`, with its doubt, the last record before the damage, and take away what follows.

    The order is the law: the record first, over the damage itself; then the later segments; then the rest of the
    damaged file. Interrupted anywhere, the next start finds damage again, and doubts again.
    """
    disk = directory.disk
    if log.segments[-1].end == 0:
        disk.close(log.segments.pop().handle)
    first_gone = damage.segment + 1
    if log.segments:
        target = log.segments[-1]
        if target.number < damage.segment:
            first_gone = damage.segment
        line = encode_group([encode(log.hard_state)], target.end)[0]
        written = disk.pwrite(target.handle, line, target.end)
        if written < len(line):
            raise OSError(f"no room in {target.path} to note that its tail was damaged")
        disk.fdatasync(target.handle)
        target.end += len(line)
    else:
        log.segments.append(target := create(directory, Header(damage.segment, log.hard_state, log.base)))
    for path in [directory.file(n) for n in numbers if n >= first_gone]:
        if keep:
            disk.rename(path, _free_name(directory, path))
        else:
            disk.remove(path)
    directory.sync()
    disk.truncate(target.handle, target.end)
    disk.fdatasync(target.handle)
    target.reserved = target.end
    invariant(log.hard_state.doubt, "a log that was cut is in doubt")


def _close(directory: Directory, segments: list[Segment]) -> None:
    for segment in segments:
        directory.disk.close(segment.handle)
