"""A snapshot's way onto a member's disk, whatever the disk says meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ddb import snapshot
from ddb.codec import encode_batch
from ddb.disk import read_file
from ddb.kv import Machine, checksum
from ddb.messages import Configuration, InstallSnapshot, SnapshotReply
from ddb.messages import Member as Voter
from ddb.raft import Ready
from ddb.simdisk import SimDisk
from ddb.snapshot import Copy
from ddb.store import Store
from ddb.sync import HOLD_PERIOD_S, Background, Policy, Sync

HOME = Path("/data/n2")
CHUNK_BYTES = 3000


def leaders_copy() -> tuple[Copy, bytes]:
    """A leader's snapshot of the entry 50, and the file's bytes."""
    disk = SimDisk()
    disk.make_directory(HOME)
    with Store.open(HOME / "state.db", disk=disk) as store:
        for i in range(50):
            row = (b'"v"', i + 1, i + 1, 1, checksum(f"key{i}", b'"v"', i + 1, i + 1, 1))
            store.put(f"key{i}", row, None)
            store.digest = (store.digest + row[4] ** 2) % 2**64
        begun = store.begin_checkpoint(50, 3, Configuration("c", "bully", (Voter("id1", "n1", "10.0.0.1:8050", True),)))
        begun.write()
        store.finish_checkpoint(begun)
        copied = snapshot.copy(store.disk, store.path, HOME / "outgoing.db")
    return copied, read_file(disk, copied.path)


class Receiver:
    """A member that has nothing yet, and gets a snapshot."""

    def __init__(self) -> None:
        self.disk = SimDisk()
        self.disk.make_directory(HOME)
        self.store = Store.open(HOME / "state.db", disk=self.disk)
        self.replica = mock.MagicMock(diverged=False)
        log = self.replica.raft.log
        self.replica.raft.commit = self.replica.machine.applied = log.base_index = log.let_go = 0
        self.sync = Sync(self.replica, self.store, HOME, self.at_once, mock.Mock(), disk=self.disk)

    @staticmethod
    def at_once(work: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        try:
            result = work()
        except Exception as error:
            done(None, error)
        else:
            done(result, None)

    def offer(self, copied: Copy, content: bytes, offset: int) -> list[tuple[int, bool]]:
        """Deliver the chunk at `offset`; returns the acknowledgements: up to where, and whether it is installed."""
        self.replica.send.reset_mock()
        data = content[offset : offset + CHUNK_BYTES]
        size, sha256 = copied.size_bytes, copied.sha256
        chunk = InstallSnapshot("id1", "id2", 3, copied.meta.applied, copied.meta.term, offset, size, sha256, data)
        self.sync.work(Ready(chunks=[chunk]), 0.0)
        replies: list[SnapshotReply] = [call.args[0] for call in self.replica.send.call_args_list]
        return [(reply.offset, reply.installed) for reply in replies]

    def offer_all(self, copied: Copy, content: bytes) -> list[tuple[int, bool]]:
        answers: list[tuple[int, bool]] = []
        for offset in range(0, len(content), CHUNK_BYTES):
            answers = self.offer(copied, content, offset)
        return answers

    def close(self) -> None:
        self.sync.close()
        self.store.close()


@pytest.fixture
def receiver() -> Any:
    one = Receiver()
    yield one
    one.close()


def test_a_snapshot_is_installed_once_all_of_it_has_come(receiver: Receiver) -> None:
    copied, content = leaders_copy()
    assert receiver.offer(copied, content, 0) == [(CHUNK_BYTES, False)]
    assert receiver.offer(copied, content, 0) == [(CHUNK_BYTES, False)], "a chunk that comes twice does no harm"
    assert receiver.offer(copied, content, 2 * CHUNK_BYTES) == [(CHUNK_BYTES, False)], "nor one that comes too early"
    assert receiver.offer_all(copied, content)[-1] == (copied.size_bytes, True)
    assert (receiver.store.meta, receiver.store.count()) == (copied.meta, 50)
    receiver.close()
    assert receiver.disk.list(HOME) == ["state.db"] and not receiver.disk.handles
    receiver.disk.crash(random.Random(1))
    with Store.open(HOME / "state.db", disk=receiver.disk) as after:
        assert after.meta == copied.meta


def test_a_chunk_that_finds_no_room_is_taken_when_there_is_some(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    copied, content = leaders_copy()
    receiver.offer(copied, content, 0)
    receiver.disk.room_bytes = 100  # a part of the chunk goes in
    assert receiver.offer(copied, content, CHUNK_BYTES) == []
    assert receiver.offer(copied, content, CHUNK_BYTES) == []
    assert "no room for the leader's snapshot" in caplog.text
    receiver.disk.room_bytes = None
    assert receiver.offer_all(copied, content)[-1] == (copied.size_bytes, True)
    assert receiver.store.meta == copied.meta


def test_a_snapshot_that_arrived_damaged_replaces_nothing(receiver: Receiver) -> None:
    copied, content = leaders_copy()
    damaged = content[:5000] + b"?" + content[5001:]
    assert receiver.offer_all(copied, damaged)[-1] == (copied.size_bytes, False)
    assert receiver.store.meta.applied == 0 and receiver.disk.list(HOME) == ["state.db"]
    assert receiver.offer_all(copied, content)[-1] == (copied.size_bytes, True)


def test_what_the_disk_failed_to_keep_replaces_nothing_and_is_sent_anew(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddb.arrival.SYNC_EVERY_BYTES", 2 * CHUNK_BYTES)
    copied, content = leaders_copy()
    assert receiver.offer(copied, content, 0) == [(CHUNK_BYTES, False)]
    with mock.patch.object(receiver.disk, "fdatasync", side_effect=OSError(28, "No space left on device")):
        assert receiver.offer(copied, content, CHUNK_BYTES) == []
    assert "of no use" in caplog.text and receiver.disk.list(HOME) == ["state.db"]
    assert receiver.offer(copied, content, 2 * CHUNK_BYTES) == [(0, False)], "it has to begin anew"
    assert receiver.offer_all(copied, content)[-1] == (copied.size_bytes, True)


def test_chunks_that_wait_behind_one_that_found_no_room_are_sent_again(receiver: Receiver) -> None:
    copied, content = leaders_copy()
    waiting: list[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = []
    with mock.patch.object(receiver.sync, "_background", lambda work, done: waiting.append((work, done))):
        for offset in range(0, 3 * CHUNK_BYTES, CHUNK_BYTES):
            assert receiver.offer(copied, content, offset) == [], "a chunk is acknowledged when it is written"
    receiver.disk.room_bytes = 100
    receiver.at_once(*waiting[0])
    receiver.disk.room_bytes = None
    for work, done in waiting[1:]:
        receiver.at_once(work, done)
    assert receiver.offer_all(copied, content)[-1] == (copied.size_bytes, True)


def test_what_an_earlier_process_left_of_a_snapshot_is_removed(receiver: Receiver) -> None:
    for name in ("incoming.db", "outgoing.db"):
        receiver.disk.put(HOME / name, b"half of it")
    Sync(receiver.replica, receiver.store, HOME, receiver.at_once, mock.Mock(), disk=receiver.disk).close()
    assert receiver.disk.list(HOME) == ["state.db"]


class Member:
    """A member that applies batches, and writes checkpoints of them at once, or at its `leisure`."""

    def __init__(self, disk: SimDisk, leisure: Background = Receiver.at_once, policy: Policy | None = None) -> None:
        self.store = Store.open(HOME / "state.db", disk=disk)
        self.machine = Machine(self.store, self.store.meta.applied)
        self.replica = mock.MagicMock(diverged=False, machine=self.machine)
        self.replica.raft.durable = 1 << 62
        self.replica.raft.log.base_index = 1 << 62  # there is no log to compact
        self.replica.raft.log.let_go = 0
        self.replica.raft.log.term_at = lambda index: 3
        config = Configuration("c", "bully", (Voter("id1", "n1", "10.0.0.1:8050", True),))
        self.replica.raft.config_at = lambda index: config
        self.sync = Sync(
            self.replica, self.store, HOME, Receiver.at_once, mock.Mock(), policy, disk=disk, leisure=leisure
        )  # fmt: skip

    def put(self, count: int, key: str = "k") -> None:
        for _ in range(count):
            first = self.machine.applied + 1
            batch = encode_batch(first, 3, 0, [b'["put","k",%d]' % first])
            self.machine.apply_batch(replace(batch, commands=[["put", key.format(first), b"%d" % first]]))

    def close(self) -> None:
        self.sync.close()
        self.store.close()


def test_a_checkpoint_takes_history_along_and_a_snapshot_brings_it(receiver: Receiver) -> None:
    disk = SimDisk()
    disk.make_directory(HOME)
    leader = Member(disk)
    leader.put(30)
    leader.sync.checkpoint(None, 0.0)
    leader.put(5)
    assert leader.store.meta.kept.count == 30
    told = list(leader.sync.chronicle.records(0))
    copied = snapshot.copy(leader.store.disk, leader.store.path, HOME / "outgoing.db")
    content = read_file(disk, copied.path)
    leader.close()
    again = Member(disk)
    assert again.sync.chronicle.oldest == 1
    assert list(again.sync.chronicle.records(0)) == told[:30]
    again.close()
    heard: list[bool] = []
    receiver.sync.chronicle.on_reset = lambda: heard.append(receiver.replica.restored.called)
    assert receiver.offer_all(copied, content)[-1] == (copied.size_bytes, True)
    assert heard == [False], "its watchers are told first"
    assert receiver.sync.chronicle.base == 30
    assert list(receiver.sync.chronicle.records(0)) == told[:30]
    (machine,) = receiver.replica.restored.call_args.args
    batch = encode_batch(31, 3, 0, [b'["put","k",31]'])
    machine.apply_batch(replace(batch, commands=[["put", "k", b"31"]]))
    assert [record[0] for record in receiver.sync.chronicle.records(29)] == [30, 31]


def test_writes_slow_down_and_then_wait_for_a_checkpoint_that_does_not_keep_up_with_them() -> None:
    disk = SimDisk()
    disk.make_directory(HOME)
    waiting: list[Any] = []
    leader = Member(disk, lambda work, done: waiting.append((work, done)), Policy(bytes=40_000))

    def share_held() -> float:
        times = [1000 + HOLD_PERIOD_S * i / 100 for i in range(100)]
        return sum(leader.sync.holds_writes(now) for now in times) / len(times)

    leader.put(300, "key{:05d}")
    assert leader.store.changed_bytes > 80_000 and share_held() == 0, "a checkpoint is due, and none is under way"
    leader.sync.tick(0.0)
    leader.sync.checkpoint(None, 0.0)
    assert leader.store.checkpointing and share_held() == 0
    held = []
    for _ in range(25):
        leader.put(10, "key{:05d}")
        held.append(share_held())
        assert (held[-1] > 0) is (leader.store.changed_bytes > 40_000)
    assert held == sorted(held) and len(set(held)) > 8 and held[-1] == 1.0, "slower and slower"
    work, done = waiting.pop()
    Receiver.at_once(work, done)
    assert not leader.store.checkpointing and share_held() == 0
    leader.close()


def test_writes_to_the_same_keys_are_not_slowed_down_for_they_gather_no_memory() -> None:
    disk = SimDisk()
    disk.make_directory(HOME)
    leader = Member(disk, lambda work, done: None, Policy(bytes=40_000))
    leader.put(1)
    leader.sync.checkpoint(None, 0.0)
    leader.put(2000)
    assert leader.store.checkpointing and not leader.sync.holds_writes(1000.0)
    leader.close()
