"""The replicated log on disk: append-only, fsynced, readable with `less`.

Laws:

1. Nothing is reported saved before the fdatasync that covers it has returned. A failed fsync is never retried: after it
   nobody knows what the disk holds, and the process must end.
2. Strictly append-only. A suffix that a new leader overrules is cut by a later record, never edited; term and vote
   are records too.
3. A batch's bytes go to disk as they came, and come back the same or not at all: every read verifies the checksum.
4. A full disk loses nothing and acknowledges nothing: the group waits, and is written again at the same place.

Theory. The log is a row of segments, `00000001.log` and on, of records, one a line (`record.py`). Each begins with a
header that carries term, vote and the (index, term) before its first batch, so the segments before it can be dropped
once a snapshot covers them. All that was handed in since the last sync is one *group*: one write, one fdatasync
(`segment.py`). `recovery.py` reads it all again and judges damage.

`Log` is the plain thing: `write` collects, `sync` makes durable. `LogWriter` runs one in a thread of its own, and
turns what piles up during one fdatasync into the next group: group commit. The busier it is, the more entries share
one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Final

from ddb.disk import Disk, OsDisk
from ddb.errors import Compacted, CorruptLog, DdbError, ReadOnly, StartupError, invariant
from ddb.messages import Batch, HardState
from ddb.record import PREFIX_BYTES_MAX, Cut, Header, Reset, encode, encode_group
from ddb.recovery import cut_after, forget, recover
from ddb.segment import NO_ROOM, RESERVE_BYTES_MAX, RESERVE_BYTES_MIN, Directory, Segment, UnknownState, create

__all__ = ["CorruptLog", "Disk", "Log", "LogWriter", "OsDisk"]

SEGMENT_BYTES_MAX: Final = 16 << 20
ROOM_RETRY_S: Final = 0.5
QUICK_SYNC_S: Final = 0.005  # a disk that takes longer is waited for in the thread
SLOW_SYNCS: Final = 20  # so many syncs after such a one, the disk is believed to be quick again

_log = logging.getLogger(__name__)


class Log:
    """The log in one directory. Open it with `Log.open`; a context manager.

    `write`, `sync` and `close` belong to one thread. `read` and `drop_below` may be called from any other meanwhile:
    they see what is durable. `hard_state`, `base` and `last` are what was recovered, and then what is synced; `batches`
    is what was recovered, without `data` and `commands`, and is let go at the first write.
    """

    def __init__(self, directory: Directory, segment_bytes_max: int, repair: bool) -> None:
        recovered = recover(directory, repair)
        self.hard_state = recovered.hard_state
        self.base = recovered.base
        self.last = recovered.last
        self.batches = recovered.batches
        self.tail_cut = recovered.tail_cut
        self._directory = directory
        self._disk = directory.disk
        self._segments = recovered.segments
        self._segment_bytes_max = segment_bytes_max
        self._rotate_at = segment_bytes_max
        self._reserve_bytes = min(RESERVE_BYTES_MIN, segment_bytes_max // 4)
        self._index_lock = threading.Lock()  # over _segments, their places and base: held for microseconds, or one read
        self._group = _Group(self.hard_state, self.last)
        self._unusable: str | None = None

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        disk: Disk | None = None,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
        repair: bool = False,
    ) -> Log:
        """Recover the log in `directory`, or begin one there.

        A damaged tail is cut, which `tail_cut` and `hard_state.doubt` tell. A segment grows to `segment_bytes_max`,
        or one group, whichever is more. `repair` cuts damage before valid records too. Raises CorruptLog for such
        damage without it, and StartupError where the directory can't be used.
        """
        path, disk = Path(directory), disk or OsDisk()
        try:
            disk.make_directory(path)
            handle = disk.open_directory(path)
            try:
                return cls(Directory(path, disk, handle), segment_bytes_max, repair)
            except BaseException:
                disk.close(handle)
                raise
        except OSError as error:
            raise StartupError(f"the log in {path} can't be used: {error}") from error

    def __repr__(self) -> str:
        (first, _), (last, term) = self.base, self.last
        return f"log {first + 1}..{last}@{term} in {len(self._segments)} segments of {self._directory.path}"

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- writing: one thread

    def write(
        self, hard_state: HardState | None, batches: Sequence[Batch] = (), reset: tuple[int, int] | None = None
    ) -> None:
        """Take into the group that the next `sync` makes durable, in this order: `hard_state`, `reset`, `batches`.

        A batch that begins at or below the last index takes the place of the suffix from there on. `reset` (index,
        term) says that a snapshot at that index takes the place of everything before.
        """
        if self.batches:
            self.batches = []  # whoever opened the log has them by now, and memory is for the young
        group = self._group
        if hard_state is not None:
            group.add(encode(hard_state))
            group.hard_state = hard_state
        if reset is not None:
            group.add(encode(Reset(*reset)))
            group.forgets_from, group.base, group.last = 0, reset, reset
            group.places.clear()
        for batch in batches:
            self._write_batch(group, batch)

    def _write_batch(self, group: _Group, batch: Batch) -> None:
        first, last, term, data = batch.first, batch.last, batch.term, batch.data
        if first <= group.last[0]:
            group.last = self._cut(group, first - 1)
            group.add(encode(Cut(*group.last)))
        invariant(first == group.last[0] + 1, "a batch begins right after the log's last entry")
        invariant(term >= group.last[1], "terms never go back along the log")
        invariant(b"\n" not in data and data[:1] == b"{", "a batch's data is one JSON object without a line feed")
        group.places[first] = (last, term, len(group.payloads), 0)
        group.last = (last, term)
        group.add(data)

    def _cut(self, group: _Group, index: int) -> tuple[int, int]:
        """Void the batches after `index`, in the group and, when it is synced, before it; returns the new end."""
        while group.places:
            first = next(reversed(group.places))
            if first <= index:
                last, term, _, _ = group.places[first]
                break
            del group.places[first]
        else:
            last, term = self._ending_at(index) if group.base is None else group.base
            group.forgets_from = min(group.forgets_from, index + 1)
        invariant(last == index, "a suffix is cut only where a batch ends")
        return last, term

    def _ending_at(self, index: int) -> tuple[int, int]:
        """The last entry at or below `index` that ends a durable batch, or the base."""
        with self._index_lock:
            for segment in reversed(self._segments):
                firsts = list(segment.places)
                position = bisect_right(firsts, index)
                if position:
                    last, term, _, _ = segment.places[firsts[position - 1]]
                    return last, term
            return self.base

    def sync(self) -> None:
        """Make all that was written since the last sync durable: one write, one fdatasync.

        Raises ReadOnly where the disk is full: the group is kept, and the call may be made again. After any other
        error, which is an OSError, the log can't be written any more: end the process.
        """
        group = self._group
        if not group.payloads:
            return
        invariant(self._unusable is None, f"a log whose disk failed is not written again: {self._unusable}")
        try:
            active = self._segment_for(group)
            lines = encode_group(group.payloads, active.end)
            start = active.end
            if active.append(self._disk, lines, self._reserve_bytes):
                self._reserve_bytes = min(2 * self._reserve_bytes, RESERVE_BYTES_MAX)
        except OSError as error:
            self._unusable = str(error)
            raise
        self._settle(group, active, lines, start)
        self._group = _Group(self.hard_state, self.last)

    def _segment_for(self, group: _Group) -> Segment:
        """The segment that takes `group`: the active one, or a fresh one when that is full."""
        active = self._segments[-1]
        group_bytes = group.bytes + PREFIX_BYTES_MAX * len(group.payloads)
        if active.end + group_bytes <= self._rotate_at or not active.places:
            return active
        try:
            fresh = create(self._directory, Header(active.number + 1, self.hard_state, self.last))
        except OSError as error:
            if isinstance(error, UnknownState) or error.errno not in NO_ROOM:
                raise
            _log.warning("%s grows past its size, for there is no room to begin another", active.path)
            self._rotate_at = active.end + group_bytes + RESERVE_BYTES_MAX
            return active
        active.finish(self._disk)
        with self._index_lock:
            self._segments.append(fresh)
        self._rotate_at = self._segment_bytes_max
        return fresh

    def _settle(self, group: _Group, active: Segment, lines: list[bytes], start: int) -> None:
        """Let readers see the group, now that it is durable."""
        offsets = list(accumulate(map(len, lines), initial=start))
        with self._index_lock:
            if group.base is not None:
                forget(self._segments)
                self.base = group.base
            elif group.forgets_from <= self.last[0]:
                cut_after(self._segments, self.base, group.forgets_from - 1)
            for first, (last, term, i, _) in group.places.items():
                active.places[first] = (last, term, offsets[i], len(lines[i]))
            self.hard_state = group.hard_state
            self.last = group.last

    def close(self) -> None:
        """Cut the reserve off and close the files. What was written but not synced is lost. May be called twice."""
        segments, self._segments = self._segments, []
        for segment in segments:
            if self._unusable is None:
                with contextlib.suppress(OSError):  # reserve that stays does no harm
                    segment.finish(self._disk)
            self._disk.close(segment.handle)
        if segments:
            self._disk.close(self._directory.handle)
            self._unusable = self._unusable or "it is closed"

    # -- reading and dropping: any thread

    def read(self, first: int) -> bytes:
        """The `data` of the durable batch that begins at `first`.

        Raises Compacted where the log keeps none such any more, and CorruptLog where its bytes have changed on disk.
        """
        with self._index_lock:  # also over the read: a file dropped meanwhile would be another file's descriptor
            for segment in reversed(self._segments):
                place = segment.places.get(first)
                if place is not None:
                    return segment.payload_at(self._disk, place[2], place[3])
            oldest = self.base[0] + 1
        raise Compacted(f"the log keeps no batch that begins at {first}; it begins at {oldest}", oldest=oldest)

    def drop_below(self, index: int) -> tuple[int, int]:
        """Remove the segments that hold no entry past `index`; the active one always stays.

        Removing a big file takes milliseconds: call it where they don't hurt. Returns the new `base`.
        """
        dropped: list[Segment] = []
        with self._index_lock:
            while len(self._segments) > 1:
                oldest = self._segments[0]
                if oldest.places:
                    last, term, _, _ = oldest.places[next(reversed(oldest.places))]
                    if last > index:
                        break
                    self.base = (last, term)
                dropped.append(self._segments.pop(0))
            base = self.base
        for segment in dropped:
            self._disk.close(segment.handle)
            self._disk.remove(segment.path)
            self._directory.sync()  # one by one: a crash must not bring an older one back and leave a gap
        return base


class _Group:
    """What has been written and not yet synced, and what it changes once it is durable."""

    __slots__ = ("base", "bytes", "forgets_from", "hard_state", "last", "payloads", "places")

    def __init__(self, hard_state: HardState, last: tuple[int, int]) -> None:
        self.payloads: list[bytes] = []
        self.bytes = 0
        self.hard_state = hard_state
        self.last = last
        self.base: tuple[int, int] | None = None  # where a reset among it puts the base
        self.forgets_from: int = 1 << 63  # durable batches from this index on are void
        self.places: dict[int, tuple[int, int, int, int]] = {}  # last, term, position among the payloads

    def add(self, payload: bytes) -> None:
        self.payloads.append(payload)
        self.bytes += len(payload)


_Save = tuple[HardState | None, Sequence[Batch], tuple[int, int] | None]


class LogWriter:
    """Group commit: a thread that syncs what has been saved, all that waits at once.

    `save` only queues. The thread answers through `post`, which must run its arguments on the loop's thread:
    `on_saved(ticket)` when all up to that ticket is durable; `on_space(False)` when the disk turns out to be full,
    `on_space(True)` when there is room again; and `on_failure(error)` when the disk fails, after which nothing is
    written any more and the process must end.
    """

    def __init__(
        self,
        log: Log,
        post: Callable[..., None],
        on_saved: Callable[[int], None],
        on_failure: Callable[[BaseException], None],
        on_space: Callable[[bool], None],
        *,
        room_retry_s: float = ROOM_RETRY_S,
    ) -> None:
        self.saved = 0
        self.failed = False
        self._log = log
        self._post = post
        self._on_saved = on_saved
        self._on_failure = on_failure
        self._on_space = on_space
        self._room_retry_s = room_retry_s
        self._queue: SimpleQueue[_Save | threading.Event] = SimpleQueue()
        self._tickets = 0
        self._full = False
        self._slow_syncs = 0  # until so many more, the disk is not believed to be quick
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self.start()

    @property
    def native_id(self) -> int | None:
        """Its thread's, as the operating system counts them."""
        return self._thread.native_id

    def start(self) -> None:
        """Begin to work off what is queued. (The simulator's has no thread.)"""
        self._thread.start()

    def save(
        self,
        hard_state: HardState | None,
        batches: Sequence[Batch] = (),
        reset: tuple[int, int] | None = None,
        *,
        in_place: bool = False,
    ) -> int:
        """Queue what `Log.write` takes. Returns its ticket: 1, 2, 3, …

        With `in_place`, if the thread is idle and the disk has been quick lately, the caller's thread does the work
        itself: `saved` says so at once, and `on_saved` is not called. A failing disk has `on_failure` called at once;
        on a full one the thread takes over.
        """
        in_place = in_place and self.saved == self._tickets and self.is_quick
        self._tickets += 1
        if not in_place:
            self._queue.put((hard_state, batches, reset))
            return self._tickets
        # The thread has reported all that it was given, so it waits in `take`, and touches the log no more until
        # something is queued, which only this thread does.
        self._log.write(hard_state, batches, reset)
        try:
            self._sync_timed()
            self.saved = self._tickets
        except ReadOnly:
            self._queue.put((None, (), None))  # the group is the log's already: let the thread wait for room
        except OSError as error:
            self.failed = True
            self._on_failure(error)
        return self._tickets

    @property
    def is_quick(self) -> bool:
        """Whether the last syncs took so little time that the caller may wait for the next one."""
        return not self._slow_syncs

    def _sync_timed(self) -> None:
        began_s = time.monotonic()
        self._log.sync()
        if time.monotonic() - began_s > QUICK_SYNC_S:
            self._slow_syncs = SLOW_SYNCS
        elif self._slow_syncs:
            self._slow_syncs -= 1

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved before is durable; returns whether it is, after at most `timeout_s` seconds."""
        target, reached = self._tickets, threading.Event()
        self._queue.put(reached)
        if self._thread.is_alive():
            reached.wait(timeout_s)
        return self.saved >= target

    def close(self, timeout_s: float = 5.0) -> None:
        """Sync what was saved, unless the disk is full, end the thread and close the log. May be called twice."""
        self._stopping.set()
        self._queue.put(threading.Event())
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.error("the disk has not answered for %.0f s: the log is left open", timeout_s)
        else:
            self._log.close()

    def _run(self) -> None:
        try:
            while not (self._stopping.is_set() and self._queue.empty()):
                taken, reached = self.take()
                if self.failed:  # in place, on the loop's thread: nothing is written any more
                    return
                while not self.sync():
                    if self._stopping.wait(self._room_retry_s):
                        return
                self.report(taken)
                for event in reached:
                    event.set()
        except BaseException as error:  # an invariant too: whatever it is, nothing more may be acknowledged
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The disk has failed: report that, and nothing more."""
        self.failed = True
        if not isinstance(error, DdbError):
            _log.critical("the log can't be written any more: %s", error)
        self._post(self._on_failure, error)

    def report(self, taken: int) -> None:
        """So many saves more are durable."""
        if taken:
            self.saved += taken
            self._post(self._on_saved, self.saved)

    def take(self) -> tuple[int, list[threading.Event]]:
        """Wait for something to be queued, and hand all that is to the log; returns how many saves, and who waits."""
        taken, reached = 0, []
        item = self._queue.get()
        for left in range(self._queue.qsize(), -1, -1):
            if isinstance(item, threading.Event):
                reached.append(item)
            else:
                self._log.write(*item)
                taken += 1
            if left:
                item = self._queue.get()
        return taken, reached

    def sync(self) -> bool:
        """Sync the log; returns False where there is no room, and the same is to be tried again later."""
        try:
            self._sync_timed()
        except ReadOnly as error:
            if not self._full:
                self._full = True
                _log.error("%s", error)
                self._post(self._on_space, False)
            return False
        if self._full:
            self._full = False
            _log.warning("there is room on the disk again")
            self._post(self._on_space, True)
        return True
