"""One file of the log, open: where it ends, what lies where, and how a group is put at its end.

Laws: what has been made durable is never written over. A file has its name (`00000001.log`) only once its header is
durable: until then it is called `00000001.log.new`, and whatever bears such a name after a crash is litter. So a
named segment without a valid header is damaged.

Theory. Appending to a file makes fdatasync commit the file's new length and blocks too; writing into space that was
written before does not, which halves its time (docs/architecture.md). So a write that reaches the end of the written
space goes down together with a run of line feeds behind it, the *reserve*, that the following writes then overwrite.
The reserve is made durable by the same fdatasync, and cut off when the segment is finished. Where there is no room
for a reserve, there is none. (Writing beside durable bytes in the same sector is taken not to harm them, as SQLite's
"powersafe overwrite" is.)
"""

from __future__ import annotations

import contextlib
import errno
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ddb.disk import Disk
from ddb.errors import CorruptLog, ReadOnly, invariant
from ddb.record import FILL, Header, encode, encode_group, line_at

RESERVE_BYTES_MIN: Final = 64 << 10
RESERVE_BYTES_MAX: Final = 1 << 20
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Directory:
    """Where the segments are; `handle` is for making their names durable. It stays open, so that a process out of
    descriptors still can."""

    path: Path
    disk: Disk
    handle: int

    def file(self, number: int) -> Path:
        """The path of segment `number`."""
        return self.path / f"{number:08d}.log"

    def sync(self) -> None:
        """Return when the names are durable."""
        self.disk.fsync_dir(self.handle)


Place = tuple[int, int, int, int]  # a batch's last index and term, its line's offset and its line's bytes


@dataclass(slots=True, eq=False)
class Segment:
    """The open file `number`. `end` is where its last durable record ends; up to `reserved` it has been written.

    `places` says where the batches are, by their first index, ascending: a dict keeps the order of insertion, and a
    batch that goes in before others has taken their place and pushed them out.
    """

    number: int
    path: Path
    handle: int
    end: int
    reserved: int
    places: dict[int, Place] = field(default_factory=dict)

    def append(self, disk: Disk, lines: list[bytes], reserve_bytes: int) -> bool:
        """Put `lines` at the end, durably; returns whether new space was reserved.

        Raises ReadOnly where there is no room: nothing is left behind then, and the same call may be made again. Any
        other OSError leaves the file in an unknown state: it must not be written again.
        """
        data = b"".join(lines)
        reserving = self.end + len(data) > self.reserved
        self._write(disk, data, reserve_bytes if reserving else 0)
        disk.fdatasync(self.handle)
        self.end += len(data)
        return reserving

    def _write(self, disk: Disk, data: bytes, reserve_bytes: int) -> None:
        written = _pwrite_all(disk, self.handle, data + FILL * reserve_bytes if reserve_bytes else data, self.end)
        if written < len(data):  # some file systems refuse the whole where a part would fit
            written = _pwrite_all(disk, self.handle, data, self.end)
        if written < len(data):
            disk.truncate(self.handle, self.end)  # a part of a group that was never acknowledged: not a torn tail
            self.reserved = self.end
            raise ReadOnly(f"no space left on the disk of {self.path}: free some, and writing goes on by itself")
        self.reserved = max(self.reserved, self.end + written)

    def payload_at(self, disk: Disk, offset: int, line_bytes: int) -> bytes:
        """The JSON of the record at `offset`. Raises CorruptLog where it no longer checks out."""
        line = line_at(disk.pread(self.handle, line_bytes, offset), 0)
        if line is None or line.end != line_bytes:
            raise corrupt(self.path, offset, "a record that was whole before has changed")
        return line.payload

    def finish(self, disk: Disk) -> None:
        """Cut the unused reserve off."""
        if self.reserved > self.end:
            disk.truncate(self.handle, self.end)
            self.reserved = self.end


def create(directory: Directory, header: Header) -> Segment:
    """Make the segment that `header` begins, or put it in place of the file of that number; durable on return.

    Raises OSError. Where its errno is in NO_ROOM, nothing has changed.
    """
    disk, path = directory.disk, directory.file(header.segment)
    scratch = path.with_name(path.name + ".new")
    handle = disk.open(scratch)
    try:
        line = encode_group([encode(header)], 0)[0]
        disk.truncate(handle, 0)
        if _pwrite_all(disk, handle, line, 0) < len(line):
            raise OSError(errno.ENOSPC, f"no space left for {path}")
        disk.fdatasync(handle)
        disk.rename(scratch, path)
    except OSError:
        disk.close(handle)
        with contextlib.suppress(OSError):
            disk.remove(scratch)
        raise
    try:
        directory.sync()
    except OSError as error:
        disk.close(handle)
        raise UnknownState(f"the name of {path} may not be durable: {error}") from error
    _log.debug("began log segment %s after %s", path.name, header.after)
    return Segment(header.segment, path, handle, len(line), len(line))


class UnknownState(OSError):
    """An fsync failed, so what the disk holds is not known; never retried."""


def corrupt(path: Path, offset: int, reason: str) -> CorruptLog:
    """The error that says where the log is damaged, and which command mends it."""
    data_dir = path.parent.parent
    return CorruptLog(
        f"the log is damaged before records that are valid: {path}, byte {offset}: {reason}. Nothing has been changed. "
        f"To give up what follows and fetch it from the leader: python -m ddb.node --data-dir {data_dir} --repair",
        file=str(path),
        offset=offset,
    )


def _pwrite_all(disk: Disk, handle: int, data: bytes, offset: int) -> int:
    """Write `data`, in several goes if need be; returns how much of it went in before there was no room."""
    written = 0
    while written < len(data):
        try:
            count = disk.pwrite(handle, data[written:] if written else data, offset + written)
        except OSError as error:
            if error.errno in NO_ROOM:
                return written
            raise
        invariant(count > 0, "a write puts down at least a byte, or fails")
        written += count
    return written
