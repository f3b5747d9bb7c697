"""The log after crashes at every point and damage at every byte: nothing acknowledged is lost in silence."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import pytest

from ddb.codec import encode_batch, encode_config
from ddb.errors import CorruptLog
from ddb.log import Log
from ddb.messages import Batch, Configuration, HardState, Member
from ddb.record import Header, encode, encode_group
from ddb.simdisk import Crash, SimDisk

DIRECTORY = Path("/data/log")
FIRST, SECOND = DIRECTORY / "00000001.log", DIRECTORY / "00000002.log"


def batch(first: int, last: int, term: int, value: str = "v") -> Batch:
    return encode_batch(
        first, term, 1690000000000, [b'["put","k%d","%s"]' % (i, value.encode()) for i in range(first, last + 1)]
    )


def contents(log: Log) -> list[bytes]:
    return [log.read(b.first) for b in log.batches]


# -- damage to one byte, and to all bytes from one on


@dataclass
class Built:
    """A closed log on a disk, and where the records of its last segment lie."""

    disk: SimDisk
    path: Path
    batches: list[Batch]
    starts: list[int] = field(default_factory=list)  # of the lines of `path`

    def __post_init__(self) -> None:
        content = self.disk.content(self.path)
        self.starts = [0] + [i + 1 for i, byte in enumerate(content) if byte == 10]
        assert self.starts.pop() == len(content)

    def record_at(self, offset: int) -> int:
        return max(i for i, start in enumerate(self.starts) if start <= offset)


def build(groups: Sequence[int], segment_bytes_max: int = 1 << 20) -> Built:
    """A log whose last groups have so many records each; one batch of two entries a record."""
    disk = SimDisk()
    log = Log.open(DIRECTORY, disk=disk, segment_bytes_max=segment_bytes_max)
    log.write(HardState(3, "n1"))
    log.sync()
    batches: list[Batch] = []
    for size in groups:
        group = [batch(2 * i + 1, 2 * i + 2, 3) for i in range(len(batches), len(batches) + size)]
        batches += group
        log.write(None, group)
        log.sync()
    log.close()
    return Built(disk, max(disk.names), batches)


def damages(content: bytes, offset: int) -> Iterator[bytes]:
    """`content` with the byte at `offset` changed, in the ways that are likely to fool a reader."""
    for byte in {content[offset] ^ 1, content[offset] ^ 0x80, content[offset] ^ 0x20, 0, 10, ord("1")} - {
        content[offset]
    }:
        yield content[:offset] + bytes([byte]) + content[offset + 1 :]


def test_a_changed_byte_in_the_last_group_is_cut_and_doubted() -> None:
    built = build([1, 1, 1, 1])
    content = built.disk.content(FIRST)
    for offset in range(built.starts[-1], len(content)):
        for damaged in damages(content, offset):
            disk = built.disk.copy()
            disk.put(FIRST, damaged)
            log = Log.open(DIRECTORY, disk=disk)
            assert log.tail_cut
            assert log.hard_state == HardState(3, "n1", doubt=True)
            assert contents(log) == [b.data for b in built.batches[:-1]]


def test_a_changed_byte_before_a_later_group_is_refused_with_file_and_offset() -> None:
    built = build([1, 1, 1, 1])
    content = built.disk.content(FIRST)
    for offset in range(built.starts[-1]):
        for damaged in damages(content, offset):
            disk = built.disk.copy()
            disk.put(FIRST, damaged)
            with pytest.raises(CorruptLog) as refused:
                Log.open(DIRECTORY, disk=disk)
            assert refused.value.fields == {"file": str(FIRST), "offset": built.starts[built.record_at(offset)]}
            assert "python -m ddb.node --data-dir /data --repair" in refused.value.message
            assert disk.content(FIRST) == damaged, "what is refused is not changed"


def test_a_changed_byte_anywhere_in_a_last_group_of_three_records_is_a_torn_write() -> None:
    built = build([1, 3])
    content = built.disk.content(FIRST)
    for offset in range(built.starts[-3], len(content)):
        for damaged in damages(content, offset):
            disk = built.disk.copy()
            disk.put(FIRST, damaged)
            log = Log.open(DIRECTORY, disk=disk)
            assert log.tail_cut and log.hard_state.doubt
            assert contents(log) == [b.data for b in built.batches[: built.record_at(offset) - 2]]


@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [1, 3]], ids=["each its own group", "one group"])
def test_a_log_cut_at_every_byte_of_its_last_three_records_is_recovered(groups: list[int]) -> None:
    built = build(groups)
    content = built.disk.content(FIRST)
    for offset in range(built.starts[-3], len(content)):
        disk = built.disk.copy()
        disk.put(FIRST, content[:offset])
        log = Log.open(DIRECTORY, disk=disk)
        assert log.tail_cut == (offset not in built.starts)
        assert contents(log) == [b.data for b in built.batches[: built.record_at(offset) - 2]]


@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [1, 3]], ids=["each its own group", "one group"])
def test_a_log_zeroed_from_every_byte_of_its_last_three_records_is_recovered_and_doubted(groups: list[int]) -> None:
    built = build(groups)
    content = built.disk.content(FIRST)
    for offset in range(built.starts[-3], len(content)):
        disk = built.disk.copy()
        disk.put(FIRST, content[:offset].ljust(len(content), b"\0"))
        log = Log.open(DIRECTORY, disk=disk)
        assert log.tail_cut and log.hard_state.doubt
        assert contents(log) == [b.data for b in built.batches[: built.record_at(offset) - 2]]


def test_blank_reserve_is_clean_and_anything_else_in_it_is_doubted() -> None:
    built = build([1, 1])
    content = built.disk.content(FIRST)
    reserves = {
        b"": False,
        b"\n": False,
        b"\n" * 5000: False,
        b"\0" * 5000: True,
        b"\n\n\0": True,
        b"\0\n": True,
        b"\nx": True,
    }
    for reserve, doubted in reserves.items():
        disk = built.disk.copy()
        disk.put(FIRST, content + reserve)
        log = Log.open(DIRECTORY, disk=disk)
        assert (log.tail_cut, log.hard_state.doubt) == (doubted, doubted), reserve
        assert contents(log) == [b.data for b in built.batches]
        log.write(None, [batch(5, 5, 3)])
        log.sync()
        log.close()
        again = Log.open(DIRECTORY, disk=disk)
        assert (again.last, again.tail_cut, again.hard_state.doubt) == ((5, 3), False, doubted)


def test_a_hole_of_reserve_inside_the_last_group_is_torn_and_before_it_is_refused() -> None:
    built = build([1, 3])
    content = built.disk.content(FIRST)
    torn = bytearray(content)
    torn[built.starts[-3] : built.starts[-2]] = b"\n" * (built.starts[-2] - built.starts[-3])
    built.disk.put(FIRST, bytes(torn))
    assert contents(Log.open(DIRECTORY, disk=built.disk.copy())) == [built.batches[0].data]
    torn[built.starts[-4] : built.starts[-3]] = b"\n" * (built.starts[-3] - built.starts[-4])
    built.disk.put(FIRST, bytes(torn))
    with pytest.raises(CorruptLog, match=f"byte {built.starts[-4]}"):
        Log.open(DIRECTORY, disk=built.disk)


def test_text_in_a_value_that_looks_like_a_later_record_is_no_evidence() -> None:
    disk = SimDisk()
    log = Log.open(DIRECTORY, disk=disk)
    end_of_record = b'"]]}'
    inner = b"{" + end_of_record  # what a forged record's JSON would be: from inside the string to the line's end
    forged = b"%d 900 %08x %b" % (len(inner), crc32(b"900 " + inner), inner)
    data = b'{"first":1,"last":1,"term":1,"at":1,"entries":[["put","k","' + forged + b"]}"
    data = data[: data.rindex(b'"]]}')] + end_of_record
    log.write(HardState(1), [Batch(1, 1, 1, data)])
    log.sync()
    log.close()
    content = disk.content(FIRST)
    assert forged[:-4] in content
    start = content.index(b'{"first"')
    disk.put(FIRST, content[:start] + b"[" + content[start + 1 :])
    assert Log.open(DIRECTORY, disk=disk).tail_cut


# -- segments


def three_segments() -> Built:
    built = build([1] * 12, segment_bytes_max=700)
    assert len(built.disk.names) >= 3
    return built


def test_damage_at_the_end_of_a_segment_that_has_a_successor_is_refused() -> None:
    built = three_segments()
    for damaged in (built.disk.content(FIRST)[:-1], built.disk.content(FIRST)[:-200], b""):
        disk = built.disk.copy()
        disk.put(FIRST, damaged)
        with pytest.raises(CorruptLog, match=str(FIRST)):
            Log.open(DIRECTORY, disk=disk)


def test_damage_far_into_a_segment_is_refused_though_its_successor_holds_only_a_header() -> None:
    built = build([1] * 3, segment_bytes_max=400)
    assert list(built.disk.names) == [FIRST, SECOND]
    header = built.disk.content(SECOND)[: built.starts[1]]
    built.disk.put(SECOND, header)
    built.disk.put(FIRST, built.disk.content(FIRST)[:-1])
    with pytest.raises(CorruptLog, match=str(FIRST)):
        Log.open(DIRECTORY, disk=built.disk)


def test_a_valid_record_that_does_not_follow_is_refused() -> None:
    for second, reason in [
        (batch(4, 5, 3), "batch 4..5 after entry 2"),
        (batch(3, 3, 2), "batch of term 2 after term 3"),
    ]:
        disk = SimDisk()
        lines: list[bytes] = []
        for payload in [encode(Header(1, HardState(), (0, 0))), batch(1, 2, 3).data, second.data]:
            lines += encode_group([payload], sum(map(len, lines)))
        disk.put(FIRST, b"".join(lines))
        with pytest.raises(CorruptLog, match=reason):
            Log.open(DIRECTORY, disk=disk)


def test_a_missing_segment_in_the_middle_is_refused() -> None:
    built = three_segments()
    del built.disk.names[SECOND]
    with pytest.raises(CorruptLog, match=r"00000002\.log, byte 0: the file is missing"):
        Log.open(DIRECTORY, disk=built.disk)


def test_a_segment_under_another_ones_name_is_refused() -> None:
    built = three_segments()
    built.disk.put(SECOND, built.disk.content(FIRST))
    with pytest.raises(CorruptLog, match=r"00000002\.log, byte 0: this is segment 1 under another's name"):
        Log.open(DIRECTORY, disk=built.disk)


def test_segments_that_do_not_follow_from_one_another_are_refused() -> None:
    built = three_segments()
    content = built.disk.content(FIRST)
    last_line = content.rindex(b"\n", 0, len(content) - 1) + 1
    built.disk.put(FIRST, content[:last_line])
    with pytest.raises(CorruptLog, match="the segment before ends with"):
        Log.open(DIRECTORY, disk=built.disk)


@pytest.mark.parametrize("left", [b"", b"\0" * 100, b"70 0 12bb7f6c {"], ids=["empty", "zeroed", "torn"])
def test_a_last_segment_without_a_valid_header_is_removed_and_doubted(left: bytes) -> None:
    built = three_segments()
    kept = [b.data for b in built.batches]
    lost = built.disk.content(built.path).count(b'"first"')
    built.disk.put(built.path, left)
    log = Log.open(DIRECTORY, disk=built.disk)
    assert log.tail_cut and log.hard_state == HardState(3, "n1", doubt=True)
    assert contents(log) == kept[:-lost]
    assert built.path not in built.disk.names


@pytest.mark.parametrize("left", [b"", b"\0" * 100], ids=["empty", "zeroed"])
def test_an_only_segment_without_a_valid_header_begins_anew_in_doubt(left: bytes) -> None:
    disk = SimDisk()
    disk.put(FIRST, left)
    log = Log.open(DIRECTORY, disk=disk)
    assert (log.tail_cut, log.hard_state, log.last) == (True, HardState(doubt=True), (0, 0))
    log.close()
    assert Log.open(DIRECTORY, disk=disk).hard_state.doubt


def test_a_file_that_never_got_its_name_is_litter() -> None:
    built = build([1])
    built.disk.put(DIRECTORY / "00000002.log.new", b"70 0 12bb")
    log = Log.open(DIRECTORY, disk=built.disk)
    assert not log.tail_cut and list(built.disk.names) == [FIRST]


def test_doubt_lasts_until_it_is_taken_back() -> None:
    built = build([1, 1])
    built.disk.put(FIRST, built.disk.content(FIRST)[:-1])
    Log.open(DIRECTORY, disk=built.disk).close()
    log = Log.open(DIRECTORY, disk=built.disk)
    assert log.hard_state == HardState(3, "n1", doubt=True) and not log.tail_cut
    log.write(HardState(4))
    log.sync()
    log.close()
    assert Log.open(DIRECTORY, disk=built.disk).hard_state == HardState(4)


# -- repair


def test_repair_keeps_what_precedes_the_damage_and_sets_the_rest_aside() -> None:
    built = build([1, 1, 1, 1])
    content = built.disk.content(FIRST)
    for offset in range(built.starts[2], built.starts[-1], 7):
        disk = built.disk.copy()
        damaged = content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :]
        disk.put(FIRST, damaged)
        log = Log.open(DIRECTORY, disk=disk, repair=True)
        cut = built.starts[built.record_at(offset)]
        assert log.tail_cut and log.hard_state == HardState(3, "n1", doubt=True)
        assert contents(log) == [b.data for b in built.batches[: built.record_at(offset) - 2]]
        assert disk.content(DIRECTORY / "00000001.log.damaged") == damaged[cut:]
        log.close()
        again = Log.open(DIRECTORY, disk=disk)
        assert again.hard_state.doubt and not again.tail_cut


def test_repair_carries_the_newest_term_and_vote_over_the_damage() -> None:
    disk = SimDisk()
    log = Log.open(DIRECTORY, disk=disk, segment_bytes_max=400)
    log.write(HardState(1, "n1"), [batch(1, 2, 1)])
    log.sync()
    before = len(disk.content(FIRST).rstrip(b"\n"))
    for term in range(2, 9):
        log.write(HardState(term, f"n{term}"), [batch(2 * term - 1, 2 * term, term)])
        log.sync()
    log.close()
    segments = len(disk.names)
    assert segments > 2
    content = bytearray(disk.content(FIRST))
    content[before - 5] ^= 1
    disk.put(FIRST, bytes(content))
    log = Log.open(DIRECTORY, disk=disk, repair=True)
    assert (log.hard_state, log.last) == (HardState(8, "n8", doubt=True), (0, 0))
    later = [f"{n:08d}.log.damaged" for n in range(2, segments + 1)]
    assert sorted(p.name for p in disk.names) == ["00000001.log", "00000001.log.damaged", *later]
    log.close()
    disk.crash(random.Random(1))
    assert Log.open(DIRECTORY, disk=disk).hard_state == HardState(8, "n8", doubt=True)


@pytest.mark.parametrize("damage", ["first header", "first batch", "second header", "second missing"])
def test_an_interrupted_repair_can_be_done_again(damage: str) -> None:
    built = three_segments()
    if damage == "second missing":
        del built.disk.names[SECOND]
    else:
        path = FIRST if damage.startswith("first") else SECOND
        content = bytearray(built.disk.content(path))
        content[10 if damage.endswith("header") else built.disk.content(path).index(b'"first"')] ^= 1
        built.disk.put(path, bytes(content))
    whole = built.disk.copy()
    expected = contents(Log.open(DIRECTORY, disk=whole, repair=True))
    for crash_at in range(whole.changes):
        for seed in range(4):
            disk = built.disk.copy()
            disk.crash_at = crash_at
            with pytest.raises(Crash):
                Log.open(DIRECTORY, disk=disk, repair=True)
            disk.crash(random.Random(seed))
            log = Log.open(DIRECTORY, disk=disk, repair=True)
            assert log.hard_state == HardState(3, "n1", doubt=True)
            assert contents(log) == expected


# -- crashes


@dataclass(frozen=True)
class State:
    """What a log says: nothing of segments."""

    hard_state: HardState = field(default_factory=HardState)
    base: tuple[int, int] = (0, 0)
    batches: tuple[Batch, ...] = ()

    @property
    def last(self) -> tuple[int, int]:
        return (self.batches[-1].last, self.batches[-1].term) if self.batches else self.base


class Writer:
    """Writes to a log what `rng` says, and keeps every state that the log went through, record by record."""

    def __init__(self, rng: random.Random, log: Log, state: State) -> None:
        self.rng, self.log = rng, log
        self.states = [state]
        self.acknowledged = 0
        self.dropped = state.base[0]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            action: Callable[[], None] = self.rng.choices(
                [self.vote, self.append, self.overrule, self.reset, self.configure], [2, 8, 3, 0.5, 1]
            )[0]
            action()
            if self.rng.random() < 0.5:
                self.log.sync()
                self.acknowledged = len(self.states) - 1
            if self.rng.random() < 0.15:
                self.drop()

    def vote(self) -> None:
        state = self.states[-1]
        hard_state = HardState(state.hard_state.term + 1, self.rng.choice([None, "n1", "n2"]), state.hard_state.doubt)
        self.log.write(hard_state)
        self.states.append(replace(state, hard_state=hard_state))

    def append(self) -> None:
        batches = []
        for _ in range(self.rng.randint(1, 3)):
            state = self.states[-1]
            batches.append(self._batch(state.last[0] + 1, state))
            self.states.append(replace(state, batches=(*state.batches, batches[-1])))
        self.log.write(None, batches)

    def overrule(self) -> None:
        self.vote()
        state = self.states[-1]
        above = [i for i, b in enumerate(state.batches) if b.first > max(self.dropped, state.base[0])]
        if not above:
            return
        position = self.rng.choice(above)
        cut = replace(state, batches=state.batches[:position])
        new = self._batch(cut.last[0] + 1, state)
        self.log.write(None, [new])
        self.states += [cut, replace(cut, batches=(*cut.batches, new))]

    def configure(self) -> None:
        state = self.states[-1]
        config = Configuration("c1", "bully", (Member("n1", "n1", "127.0.0.1:1", True),))
        new = encode_config(state.last[0] + 1, state.hard_state.term, 7, config)
        self.log.write(None, [new])
        self.states.append(replace(state, batches=(*state.batches, new)))

    def reset(self) -> None:
        state = self.states[-1]
        base = (state.last[0] + self.rng.randint(0, 5), state.hard_state.term)
        self.log.write(None, [], base)
        self.states.append(replace(state, base=base, batches=()))
        self.dropped = max(self.dropped, base[0])

    def drop(self) -> None:
        ends = [b.last for b in self.states[self.acknowledged].batches]
        if ends:
            self.dropped = max(self.dropped, self.rng.choice(ends[: len(ends) // 2 + 1]))
            self.log.drop_below(self.dropped)

    def _batch(self, first: int, state: State) -> Batch:
        return batch(first, first + self.rng.randint(0, 2), state.hard_state.term, "x" * self.rng.choice([1, 1, 90]))

    def check(self, log: Log) -> State:
        """The log is in a state that it was in since the last acknowledgement; returns that."""
        found = contents(log)
        fits = [i for i in range(self.acknowledged, len(self.states)) if self._is(self.states[i], log, found)]
        assert fits, f"{log} is in no state since the last sync: {[s.last for s in self.states[self.acknowledged :]]}"
        assert log.tail_cut <= log.hard_state.doubt
        if log.tail_cut:  # a batch behind the damage tells a newer term, and no vote; the doubt makes up for it
            votes = {(s.hard_state.term, s.hard_state.vote) for s in self.states[fits[0] :]}
            assert (log.hard_state.term, log.hard_state.vote) in votes | {(term, None) for term, _ in votes}
        else:
            assert any(self.states[i].hard_state == log.hard_state for i in fits)
        state = self.states[fits[0]]
        return State(log.hard_state, log.base, state.batches[len(state.batches) - len(found) :])

    def _is(self, state: State, log: Log, found: list[bytes]) -> bool:
        gone = len(state.batches) - len(found)
        if gone < 0 or [b.data for b in state.batches[gone:]] != found:
            return False
        before = state.batches[gone - 1] if gone else None
        base = (before.last, before.term) if before else state.base
        return log.base == base and (before is None or before.last <= self.dropped)


def crashed(seed: int, crash_at: int | None = None, steps: int = 14) -> tuple[SimDisk, Writer]:
    """A disk as a crash in the middle of writing left it, and the writer that knows what may be on it."""
    rng = random.Random(seed)
    disk = SimDisk()
    writer = Writer(rng, Log.open(DIRECTORY, disk=disk, segment_bytes_max=rng.choice([300, 600, 4000])), State())
    disk.changes = 0
    disk.crash_at = crash_at
    try:
        writer.run(steps)
    except Crash:
        pass
    disk.crash(rng)
    return disk, writer


@pytest.mark.parametrize("seed", range(24))
def test_a_crash_at_every_operation_loses_nothing_acknowledged(seed: int) -> None:
    disk, writer = crashed(seed)
    writer.check(Log.open(DIRECTORY, disk=disk))
    for crash_at in range(disk.changes):
        disk, writer = crashed(seed, crash_at)
        writer.check(Log.open(DIRECTORY, disk=disk))


@pytest.mark.parametrize("seed", range(30))
def test_a_crash_at_every_operation_of_a_recovery_hides_no_doubt(seed: int) -> None:
    disk, _ = crashed(seed, crash_at=seed % 23)
    whole = disk.copy()
    log = Log.open(DIRECTORY, disk=whole)
    for crash_at in range(whole.changes):
        for after in range(3):
            again = disk.copy()
            again.crash_at = crash_at
            with pytest.raises(Crash):
                Log.open(DIRECTORY, disk=again)
            again.crash(random.Random(after))
            recovered = Log.open(DIRECTORY, disk=again)
            assert recovered.hard_state == log.hard_state
            assert contents(recovered) == contents(log)


@pytest.mark.parametrize("seed", range(30))
def test_a_log_goes_on_after_crash_after_crash(seed: int) -> None:
    rng = random.Random(seed)
    disk = SimDisk()
    writer = Writer(rng, Log.open(DIRECTORY, disk=disk), State())
    for _ in range(12):
        log = Log.open(DIRECTORY, disk=disk, segment_bytes_max=500)
        writer = Writer(rng, log, writer.check(log))
        disk.changes, disk.crash_at = 0, rng.randint(5, 60)
        try:
            writer.run(20)
        except Crash:
            pass
        disk.crash(rng)


def test_what_a_failed_fsync_lost_is_not_taken_for_durable_by_the_next_process() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        disk = SimDisk(rng)
        log = Log.open(DIRECTORY, disk=disk)
        log.write(HardState(1, "n1"), [batch(1, 1, 1)])
        log.sync()
        disk.fail("fdatasync", errno.EIO, times=1)
        log.write(None, [batch(2, 2, 1)])
        with pytest.raises(OSError, match="fdatasync"):
            log.sync()
        disk.restart(rng)
        log = Log.open(DIRECTORY, disk=disk)
        recovered = log.last
        log.write(None, [batch(recovered[0] + 1, recovered[0] + 1, 2)])
        log.sync()
        disk.crash(rng)
        after = Log.open(DIRECTORY, disk=disk)
        assert after.last == (recovered[0] + 1, 2) and after.hard_state == log.hard_state


def test_what_a_killed_process_had_not_synced_is_durable_once_the_next_one_has_read_it() -> None:
    found = set()
    for crash_at in range(60):
        for seed in range(8):
            rng = random.Random(seed)
            disk = SimDisk()
            log = Log.open(DIRECTORY, disk=disk, segment_bytes_max=300)
            disk.changes, disk.crash_at = 0, crash_at
            try:
                for i in range(1, 12):
                    log.write(None, [batch(i, i, 1)])
                    log.sync()
            except Crash:
                pass
            disk.restart(rng)
            recovered = Log.open(DIRECTORY, disk=disk)
            if seed % 2:  # into a segment whose name the killed process had not made durable
                recovered.write(None, [batch(recovered.last[0] + 1, recovered.last[0] + 1, 1)])
                recovered.sync()
            disk.crash(rng)
            after = Log.open(DIRECTORY, disk=disk)
            assert (after.last, after.hard_state) == (recovered.last, recovered.hard_state)
            found.add(after.last[0])
    assert found == set(range(1, 13))
