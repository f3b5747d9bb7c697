"""The log: what is synced is there, what is read is verified, what fails is said."""

from __future__ import annotations

import errno
import os
import re
import threading
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddb.codec import decode_batch, encode_batch, encode_config
from ddb.errors import Compacted, CorruptLog, InvariantError, ReadOnly, StartupError
from ddb.log import SLOW_SYNCS, Log, LogWriter, OsDisk
from ddb.messages import Batch, Configuration, HardState, Member
from ddb.record import Cut, Header, Reset, decode, encode, encode_group, line_at, lines, search
from ddb.simdisk import SimDisk

SIMULATED = Path("/data/log")
FIRST = SIMULATED / "00000001.log"


def batch(first: int, last: int, term: int = 1, value: str = "v") -> Batch:
    return encode_batch(
        first, term, 1690000000000, [b'["put","k%d","%s"]' % (i, value.encode()) for i in range(first, last + 1)]
    )


def contents(log: Log) -> list[bytes]:
    return [log.read(b.first) for b in log.batches]


def synced(log: Log, *batches: Batch, hard_state: HardState | None = None) -> None:
    log.write(hard_state, batches)
    log.sync()


# -- records


@given(st.binary(min_size=1).map(lambda b: b"{" + b.replace(b"\n", b"")), st.integers(0, 1 << 34))
def test_a_record_is_read_as_it_was_written_and_only_whole(payload: bytes, start: int) -> None:
    (text,) = encode_group([payload], start)
    line = line_at(text, 0)
    assert line is not None
    assert (line.payload, line.group, line.end) == (payload, start, len(text))
    assert all(line_at(text[:end], 0) is None for end in range(len(text)))


@given(st.data())
def test_no_change_of_one_byte_goes_unnoticed(data: st.DataObject) -> None:
    (text,) = encode_group([batch(1, 3).data], 120)
    offset, byte = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 255))
    changed = text[:offset] + bytes([byte]) + text[offset + 1 :]
    assert changed == text or line_at(changed, 0) is None


@pytest.mark.parametrize(
    "record",
    [
        HardState(), HardState(7, "né", True), Cut(9, 2), Reset(1 << 40, 3), Header(3, HardState(7, "x"), (5, 1)),
    ],
)  # fmt: skip
def test_a_record_means_what_it_said(record: Any) -> None:
    assert decode(encode(record)) == record


@pytest.mark.parametrize(
    "payload", [b"{}", b'{"term":1}', b'{"cut":1}', b'{"reset":{}}', b'{"ddb":2}', b'{"ddb":1}', b"{x"]
)
def test_an_object_that_is_no_record_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError):
        decode(payload)


def test_a_record_of_a_group_that_ended_before_does_not_continue_the_log() -> None:
    first = encode_group([b'{"a":1}'], 0)[0]
    second = encode_group([b'{"a":2}'], len(first))[0]
    stale = encode_group([b'{"a":3}'], 0)[0]
    assert len(list(lines(first + second))) == 2
    assert len(list(lines(first + stale))) == 2, "it may well be the first group's own"
    assert len(list(lines(first + second + stale))) == 2


def test_search_finds_records_behind_any_garbage() -> None:
    text = b"".join(encode_group([b'{"a":1}', b'{"a":2}'], 12))
    for garbage in (b"", b"7", b"77 8 ", b"\0\0", b"\n\n", b'{"a"', b"9 9 12345678 {", text[:-1]):
        assert [line.payload for line in search(garbage + text, 0)][-2:] == [b'{"a":1}', b'{"a":2}']


# -- writing and reading again


def test_what_is_synced_is_there_again_and_what_is_not_is_not(tmp_path: Path) -> None:
    with Log.open(tmp_path / "log") as log:
        synced(log, batch(1, 2), batch(3, 3), hard_state=HardState(1, "n1"))
        log.write(HardState(2), [batch(4, 4)])
    with Log.open(tmp_path / "log") as log:
        assert (log.hard_state, log.base, log.last, log.tail_cut) == (HardState(1, "n1"), (0, 0), (3, 1), False)
        assert [(b.first, b.last, b.term, b.at_ms) for b in log.batches] == [
            (1, 2, 1, 1690000000000),
            (3, 3, 1, 1690000000000),
        ]
        assert contents(log) == [batch(1, 2).data, batch(3, 3).data]


def test_a_new_log_is_empty_and_durable_before_it_is_written() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk)
    assert (log.hard_state, log.base, log.last, log.batches) == (HardState(), (0, 0), (0, 0), [])
    assert disk.durable_names[FIRST].durable == disk.content(FIRST)


def test_a_batch_comes_back_byte_for_byte(tmp_path: Path) -> None:
    odd = [
        Batch(1, 1, 1, '{"first":1,"last":1,"term":1,"at":0,"entries":[["put","ключ","\\n \u2028 é 1 0 {"]]}'.encode())
    ]
    with Log.open(tmp_path / "log") as log:
        synced(log, *odd)
        assert log.read(1) == odd[0].data
    with Log.open(tmp_path / "log") as log:
        assert log.read(1) == odd[0].data
        assert [decode_batch(data).commands for data in contents(log)] == [[["put", "ключ", "\n \u2028 é 1 0 {"]]]


def test_a_configuration_is_there_at_once_after_reopening(tmp_path: Path) -> None:
    config = Configuration("c", "bully", (Member("1", "n1", "127.0.0.1:1", True),), ("0",))
    with Log.open(tmp_path / "log") as log:
        synced(log, encode_config(1, 1, 7, config), batch(2, 2))
    with Log.open(tmp_path / "log") as log:
        assert [b.config for b in log.batches] == [config, None]


def test_the_file_is_lines_of_text_with_lengths_and_checksums_that_anybody_can_verify(tmp_path: Path) -> None:
    with Log.open(tmp_path / "log") as log:
        synced(log, batch(1, 2), batch(3, 3, value="å"), hard_state=HardState(1, "n1"))
    text = (tmp_path / "log" / "00000001.log").read_bytes()
    for line in text.removesuffix(b"\n").split(b"\n"):
        match = re.fullmatch(rb"(\d+) ((\d+) )([0-9a-f]{8}) (\{.*\})", line)
        assert match is not None
        assert int(match[1]) == len(match[5])
        assert zlib.crc32(match[2] + match[5]) == int(match[4], 16)


def test_a_batch_below_the_last_index_takes_the_place_of_the_suffix() -> None:
    for same_group in (False, True):
        disk = SimDisk()
        log = Log.open(SIMULATED, disk=disk)
        log.write(None, [batch(1, 2), batch(3, 4), batch(5, 6)])
        if not same_group:
            log.sync()
        before = disk.content(FIRST)
        synced(log, batch(3, 3, term=2), batch(4, 7, term=2))
        assert log.last == (7, 2)
        assert disk.content(FIRST).startswith(before.rstrip(b"\n")), "nothing is edited"
        for _ in range(2):
            assert [log.read(i) for i in (1, 3, 4)] == [batch(1, 2).data, batch(3, 3, 2).data, batch(4, 7, 2).data]
            with pytest.raises(Compacted):
                log.read(5)
            log.close()
            log = Log.open(SIMULATED, disk=disk)
            assert contents(log) == [batch(1, 2).data, batch(3, 3, 2).data, batch(4, 7, 2).data]


def test_a_batch_may_take_the_place_of_the_whole_log() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk, segment_bytes_max=200)
    for i in range(1, 9):
        synced(log, batch(i, i))
    synced(log, batch(1, 1, term=2))
    assert (log.base, log.last) == ((0, 0), (1, 2))
    log.close()
    log = Log.open(SIMULATED, disk=disk)
    assert (log.base, log.last, contents(log)) == ((0, 0), (1, 2), [batch(1, 1, 2).data])


@pytest.mark.parametrize("wrong", [batch(4, 4), batch(2, 2), batch(3, 3, term=1)], ids=["gap", "inside", "older term"])
def test_a_batch_that_does_not_adjoin_is_a_bug(wrong: Batch) -> None:
    log = Log.open(SIMULATED, disk=SimDisk())
    synced(log, batch(1, 2, term=2))
    with pytest.raises(InvariantError):
        log.write(None, [wrong])


def test_data_with_a_line_feed_is_a_bug() -> None:
    log = Log.open(SIMULATED, disk=SimDisk())
    with pytest.raises(InvariantError):
        log.write(None, [Batch(1, 1, 1, b'{\n"first":1}')])


def test_a_reset_voids_everything_before() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk, segment_bytes_max=300)
    for i in range(1, 9):
        synced(log, batch(i, i))
    log.write(HardState(4), [batch(101, 102, 4)], (100, 3))
    log.sync()
    assert (log.base, log.last) == ((100, 3), (102, 4))
    with pytest.raises(Compacted) as gone:
        log.read(8)
    assert gone.value.fields == {"oldest": 101}
    assert log.drop_below(100) == (100, 3)
    assert len([p for p in disk.names if p.suffix == ".log"]) == 1
    log.close()
    log = Log.open(SIMULATED, disk=disk)
    assert (log.hard_state, log.base, log.last, contents(log)) == (
        HardState(4),
        (100, 3),
        (102, 4),
        [batch(101, 102, 4).data],
    )


def test_a_batch_that_has_changed_on_disk_is_not_handed_out(tmp_path: Path) -> None:
    with Log.open(tmp_path / "log") as log:
        synced(log, batch(1, 1))
        path = tmp_path / "log" / "00000001.log"
        text = path.read_bytes()
        with open(path, "r+b") as file:
            file.write(text.replace(b'"k1"', b'"k2"'))
        offset = text.index(b"\n") + 1
        with pytest.raises(CorruptLog, match=re.escape(f"{path}, byte {offset}: ")):
            log.read(1)


def test_the_log_can_be_closed_twice(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log")
    log.close()
    log.close()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with Log.open(tmp_path / "log"):
        pass
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0), "no descriptor leaks"


def test_a_directory_that_can_not_be_used_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="can't be used"):
        Log.open(tmp_path / "file")
    disk = SimDisk()
    disk.fail("open", errno.EACCES)
    with pytest.raises(StartupError, match="/data/log can't be used"):
        Log.open(SIMULATED, disk=disk)


# -- segments


def test_a_segment_that_is_full_is_followed_by_another_that_carries_the_state_on(tmp_path: Path) -> None:
    with Log.open(tmp_path / "log", segment_bytes_max=1000) as log:
        synced(log, hard_state=HardState(1, "n1"))
        for i in range(1, 41):
            synced(log, batch(i, i))
    files = sorted((tmp_path / "log").iterdir())
    assert [f.name for f in files] == [f"{n:08d}.log" for n in range(1, len(files) + 1)] and len(files) > 3
    for number, file in enumerate(files[1:], 2):
        header = decode(next(lines(file.read_bytes())).payload)
        assert isinstance(header, Header)
        assert (header.segment, header.hard_state) == (number, HardState(1, "n1"))
        assert file.stat().st_size <= 1000
    with Log.open(tmp_path / "log") as log:
        assert contents(log) == [batch(i, i).data for i in range(1, 41)]


def test_a_group_larger_than_a_segment_goes_down_whole(tmp_path: Path) -> None:
    big = batch(2, 2, value="x" * 5000)
    with Log.open(tmp_path / "log", segment_bytes_max=1000) as log:
        synced(log, batch(1, 1))
        synced(log, big)
        synced(log, batch(3, 3))
    with Log.open(tmp_path / "log") as log:
        assert contents(log) == [batch(1, 1).data, big.data, batch(3, 3).data]


def test_segments_wholly_below_an_index_go_and_the_active_one_stays(tmp_path: Path) -> None:
    with Log.open(tmp_path / "log", segment_bytes_max=1000) as log:
        for i in range(1, 41):
            synced(log, batch(i, i, term=i))
        assert log.drop_below(0) == (0, 0)
        index, term = log.drop_below(20)
        assert 10 < index == term <= 20
        assert log.read(index + 1) == batch(index + 1, index + 1, index + 1).data
        with pytest.raises(Compacted, match=f"begins at {index + 1}"):
            log.read(index)
        newest = log.drop_below(1000)
        assert len(list((tmp_path / "log").iterdir())) == 1
        assert log.last == (40, 40)
    with Log.open(tmp_path / "log") as log:
        assert (log.base, log.last) == (newest, (40, 40))
        assert contents(log) == [batch(i, i, i).data for i in range(newest[0] + 1, 41)]


def test_a_suffix_is_overruled_across_segments_of_which_the_first_are_dropped() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk, segment_bytes_max=300)
    for i in range(1, 13):
        synced(log, batch(i, i))
    synced(log, batch(4, 4, term=2))
    log.drop_below(3)
    expected = (log.base, log.last, log.read(4))
    assert expected == ((3, 1), (4, 2), batch(4, 4, 2).data)
    log.close()
    log = Log.open(SIMULATED, disk=disk)
    assert (log.base, log.last, log.read(4)) == expected


def test_a_reader_never_sees_another_file_while_segments_are_dropped(tmp_path: Path) -> None:
    with Log.open(tmp_path / "log", segment_bytes_max=2000) as log:
        durable, failures = [0], list[BaseException]()

        def read() -> None:
            try:
                while durable[0] < 400:
                    for i in range(max(1, durable[0] - 60), durable[0] + 1):
                        try:
                            assert log.read(i) == batch(i, i).data
                        except Compacted:
                            pass
            except BaseException as error:
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for i in range(1, 401):
            synced(log, batch(i, i))
            durable[0] = i
            if i % 20 == 0:
                log.drop_below(i - 10)
        reader.join(10)
        assert not reader.is_alive() and not failures


# -- reserve


def test_space_is_reserved_ahead_with_blank_lines_and_cut_off_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log" / "00000001.log"
    with Log.open(tmp_path / "log") as log:
        synced(log, batch(1, 1))
        text, size = path.read_bytes(), path.stat().st_size
        assert size > 64 << 10 and set(text[text.index(b"\n\n") :]) == {10}
        for i in range(2, 50):
            synced(log, batch(i, i))
        assert path.stat().st_size == size, "what follows is put into the reserve"
    assert not path.read_bytes().endswith(b"\n\n")


def test_each_reserve_is_twice_the_one_before_up_to_a_mebibyte() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk)
    sizes = []
    for i in range(1, 90):
        synced(log, batch(i, i, value="x" * 50_000))
        sizes.append(len(disk.content(FIRST)))
    grown = [b - a for a, b in pairwise(sizes) if b > a]
    reserves = [(128 << 10), (256 << 10), (512 << 10), (1 << 20), (1 << 20)]
    assert all(0 < g - reserve <= 51_000 for g, reserve in zip(grown, reserves)), "and what the group itself needs"
    assert len(grown) > len(reserves)


def test_a_log_that_was_not_closed_goes_on_where_it_ended(tmp_path: Path) -> None:
    left_open = Log.open(tmp_path / "log")
    synced(left_open, batch(1, 1))
    with Log.open(tmp_path / "log") as log:
        assert (log.last, log.tail_cut) == ((1, 1), False)
        synced(log, batch(2, 2))
    with Log.open(tmp_path / "log") as log:
        assert contents(log) == [batch(1, 1).data, batch(2, 2).data]
    left_open._unusable = "another has taken over"
    left_open.close()


# -- disks that are full or fail


def test_a_full_disk_keeps_the_group_and_leaves_nothing_behind() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk)
    disk.room_bytes = 10  # less than the group: the write comes back short
    before = disk.content(FIRST)
    log.write(HardState(1, "n1"), [batch(1, 2)])
    for _ in range(3):
        with pytest.raises(ReadOnly, match="no space left"):
            log.sync()
        assert disk.content(FIRST) == before
        assert (log.last, log.hard_state) == ((0, 0), HardState())
    disk.room_bytes = None
    log.write(None, [batch(3, 3)])
    log.sync()
    assert log.last == (3, 1)
    log.close()
    log = Log.open(SIMULATED, disk=disk)
    assert (log.hard_state, contents(log), log.tail_cut) == (
        HardState(1, "n1"),
        [batch(1, 2).data, batch(3, 3).data],
        False,
    )


def test_a_reserve_that_finds_no_room_is_done_without() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk)
    disk.room_bytes = 3000
    for i in range(1, 30):
        synced(log, batch(i, i))
    assert disk.room_bytes == 0
    assert log.last == (29, 1)


def test_a_segment_grows_on_where_there_is_no_room_to_begin_another() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk, segment_bytes_max=1000)
    disk.fail("pwrite", errno.ENOSPC, path="*.new")
    for i in range(1, 30):
        synced(log, batch(i, i))
    assert list(disk.names) == [FIRST]
    assert log.last == (29, 1)


@pytest.mark.parametrize("operation", ["fdatasync", "pwrite"])
def test_after_a_failed_write_or_sync_nothing_is_written_any_more(operation: str) -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk)
    synced(log, batch(1, 1))
    disk.fail(operation, errno.EIO)
    log.write(None, [batch(2, 2)])
    with pytest.raises(OSError, match=operation):
        log.sync()
    disk.faults.clear()
    calls = dict(disk.calls)
    with pytest.raises(InvariantError, match="disk failed"):
        log.sync()
    log.close()
    assert disk.calls == calls and log.last == (1, 1)


def test_a_full_disk_found_out_by_the_sync_is_a_failure() -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk)
    disk.fail("fdatasync", errno.ENOSPC)
    log.write(None, [batch(1, 1)])
    with pytest.raises(OSError, match="fdatasync"):
        log.sync()
    disk.faults.clear()
    with pytest.raises(InvariantError):
        log.sync()


@pytest.mark.parametrize("operation", ["fsync_dir", "rename"])
def test_a_segment_whose_name_may_not_be_durable_is_a_failure(operation: str) -> None:
    disk = SimDisk()
    log = Log.open(SIMULATED, disk=disk, segment_bytes_max=100)
    synced(log, batch(1, 1))
    disk.fail(operation, errno.EIO)
    log.write(None, [batch(2, 2)])
    with pytest.raises(OSError):
        log.sync()
    disk.faults.clear()
    with pytest.raises(InvariantError):
        log.sync()


# -- the writer's thread


class GatedDisk(OsDisk):
    """The real disk, whose fdatasync waits while `gate` is closed, and fails with `error` where that is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Semaphore(0)
        self.syncs = 0
        self.writes = 0
        self.error: int | None = None
        self.room = threading.Event()
        self.room.set()

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        self.writes += 1
        if not self.room.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwrite(handle, data, offset)

    def fdatasync(self, handle: int) -> None:
        self.syncs += 1
        self.waiting.release()
        assert self.gate.wait(10)
        if self.error is not None:
            raise OSError(self.error, "simulated")
        super().fdatasync(handle)


class Loop:
    """What the writer posts to: the calls, in order."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def writer(self, log: Log, **options: Any) -> LogWriter:
        return LogWriter(log, self.post, self.saved, self.failure, self.space, **options)

    def post(self, call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)

    def saved(self, ticket: int) -> None:
        self.calls.put(("saved", ticket))

    def failure(self, error: BaseException) -> None:
        self.calls.put(("failure", error))

    def space(self, there_is: bool) -> None:
        self.calls.put(("space", there_is))

    def next(self) -> tuple[str, Any]:
        return self.calls.get(timeout=10)


@pytest.fixture
def disk() -> GatedDisk:
    return GatedDisk()


def closed_gate(disk: GatedDisk) -> None:
    """Let the next fdatasync wait, and forget the ones before."""
    disk.gate.clear()
    disk.syncs = 0
    while disk.waiting.acquire(blocking=False):
        pass


def test_all_that_is_saved_during_one_fdatasync_shares_the_next(tmp_path: Path, disk: GatedDisk) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk))
    closed_gate(disk)
    assert writer.save(HardState(1), [batch(1, 1)]) == 1
    assert disk.waiting.acquire(timeout=10)
    assert [writer.save(None, [batch(i, i)]) for i in range(2, 101)] == list(range(2, 101))
    assert writer.saved == 0
    disk.gate.set()
    assert [loop.next(), loop.next()] == [("saved", 1), ("saved", 100)]
    assert (disk.syncs, writer.saved) == (2, 100)
    writer.close()
    with Log.open(tmp_path / "log") as log:
        assert log.last == (100, 1)


def test_what_is_reported_saved_can_be_read_at_once(tmp_path: Path, disk: GatedDisk) -> None:
    log = Log.open(tmp_path / "log", disk=disk)
    read: SimpleQueue[bytes] = SimpleQueue()
    writer = LogWriter(log, lambda call, *a: call(*a), lambda ticket: read.put(log.read(ticket)), print, print)
    for i in range(1, 20):
        writer.save(None, [batch(i, i)])
        assert read.get(timeout=10)[:11] == b'{"first":%d' % i if i > 9 else b'{"first":%d,' % i
    writer.close()


def test_flush_waits_for_all_that_was_saved(tmp_path: Path, disk: GatedDisk) -> None:
    writer = Loop().writer(Log.open(tmp_path / "log", disk=disk))
    assert writer.flush(10)
    closed_gate(disk)
    writer.save(None, [batch(1, 1)])
    assert not writer.flush(0.01)
    disk.gate.set()
    assert writer.flush(10) and writer.saved == 1
    writer.close()
    writer.close()


def test_closing_syncs_what_was_saved(tmp_path: Path, disk: GatedDisk) -> None:
    writer = Loop().writer(Log.open(tmp_path / "log", disk=disk))
    for i in range(1, 50):
        writer.save(None, [batch(i, i)])
    writer.close()
    with Log.open(tmp_path / "log") as log:
        assert log.last == (49, 1)


def test_a_failed_fdatasync_is_reported_and_never_followed_by_a_write(tmp_path: Path, disk: GatedDisk) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk))
    closed_gate(disk)
    disk.error = errno.EIO
    writer.save(None, [batch(1, 1)])
    assert disk.waiting.acquire(timeout=10)
    writer.save(None, [batch(2, 2)])
    writes = disk.writes
    disk.gate.set()
    kind, error = loop.next()
    assert (kind, error.errno) == ("failure", errno.EIO)
    writer.save(None, [batch(3, 3)])
    assert not writer.flush(0.01)
    writer.close()
    assert (disk.writes, disk.syncs, writer.saved) == (writes, 1, 0)
    assert loop.calls.empty()


def test_a_bug_in_what_is_saved_is_reported_too(tmp_path: Path) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log"))
    writer.save(None, [batch(7, 7)])
    kind, error = loop.next()
    assert kind == "failure" and isinstance(error, InvariantError)
    writer.close()


def test_a_full_disk_is_said_once_and_writing_goes_on_when_there_is_room(tmp_path: Path, disk: GatedDisk) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk), room_retry_s=0.001)
    disk.room.clear()
    writer.save(None, [batch(1, 1)])
    assert loop.next() == ("space", False)
    writer.save(None, [batch(2, 2)])
    tries = disk.writes
    while disk.writes < tries + 10:
        threading.Event().wait(0.001)
    assert loop.calls.empty() and writer.saved == 0
    disk.room.set()
    assert [loop.next() for _ in range(3)] == [("space", True), ("saved", 1), ("saved", 2)]
    writer.close()


def test_closing_does_not_wait_for_room(tmp_path: Path, disk: GatedDisk) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk), room_retry_s=60)
    writer.save(None, [batch(1, 1)])
    assert loop.next() == ("saved", 1)
    disk.room.clear()
    writer.save(None, [batch(2, 2, value="x" * 100_000)])
    assert loop.next() == ("space", False)
    writer.close()
    disk.room.set()
    with Log.open(tmp_path / "log") as log:
        assert (log.last, log.tail_cut) == ((1, 1), False)


def test_a_save_in_place_is_durable_when_it_returns(tmp_path: Path, disk: GatedDisk) -> None:
    loop = Loop()
    log = Log.open(tmp_path / "log", disk=disk)
    writer = loop.writer(log)
    disk.syncs = 0
    assert [writer.save(HardState(1), [batch(i, i)], in_place=True) for i in (1, 2)] == [1, 2]
    assert (writer.saved, disk.syncs) == (2, 2)
    assert log.read(2) == batch(2, 2).data
    assert loop.calls.empty(), "nobody needs to be told what they did themselves"
    writer.save(None, [batch(3, 3)])
    assert loop.next() == ("saved", 3)
    writer.close()


def test_a_save_in_place_waits_its_turn_behind_what_the_thread_is_at(tmp_path: Path, disk: GatedDisk) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk))
    closed_gate(disk)
    writer.save(HardState(1), [batch(1, 1)])
    assert disk.waiting.acquire(timeout=10)
    writer.save(None, [batch(2, 2)], in_place=True)
    assert writer.saved == 0
    disk.gate.set()
    assert [loop.next(), loop.next()] == [("saved", 1), ("saved", 2)]
    writer.close()


def test_a_slow_disk_is_waited_for_in_the_thread_until_it_has_been_quick_for_a_while(
    tmp_path: Path, disk: GatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk))
    monkeypatch.setattr("ddb.log.QUICK_SYNC_S", 0.0)
    writer.save(HardState(1), [batch(1, 1)], in_place=True)
    assert (writer.saved, writer.is_quick) == (1, False)
    monkeypatch.setattr("ddb.log.QUICK_SYNC_S", 60.0)
    for i in range(2, 2 + SLOW_SYNCS):
        writer.save(None, [batch(i, i)], in_place=True)
        assert loop.next() == ("saved", i)
    writer.save(None, [batch(2 + SLOW_SYNCS, 2 + SLOW_SYNCS)], in_place=True)
    assert writer.saved == 2 + SLOW_SYNCS
    assert loop.calls.empty()
    writer.close()


def test_a_save_in_place_on_a_full_disk_is_left_to_the_thread(tmp_path: Path, disk: GatedDisk) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk), room_retry_s=0.001)
    disk.room.clear()
    assert writer.save(HardState(1), [batch(1, 1)], in_place=True) == 1
    assert writer.saved == 0
    assert loop.next() == ("space", False)
    disk.room.set()
    assert [loop.next(), loop.next()] == [("space", True), ("saved", 1)]
    writer.close()
    with Log.open(tmp_path / "log") as log:
        assert log.last == (1, 1)


def test_a_save_in_place_on_a_failing_disk_is_a_failure_at_once_and_the_last_that_is_tried(
    tmp_path: Path, disk: GatedDisk
) -> None:
    loop = Loop()
    writer = loop.writer(Log.open(tmp_path / "log", disk=disk))
    disk.error = errno.EIO
    writer.save(HardState(1), [batch(1, 1)], in_place=True)
    kind, error = loop.next()
    assert (kind, error.errno) == ("failure", errno.EIO)
    assert (writer.saved, writer.failed) == (0, True)
    disk.error = None
    writes = disk.writes
    writer.close()
    assert disk.writes == writes
