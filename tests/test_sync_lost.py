"""A snapshot's way between two members whose messages get lost without either of them noticing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from ddb.config import Bounds
from ddb.kv import checksum
from ddb.messages import Configuration, InstallSnapshot, Member, SnapshotReply
from ddb.raft import Ready
from ddb.simdisk import SimDisk
from ddb.store import Store
from ddb.sync import FOLLOW_PATIENCE_S, Background, Policy, Sync
from tests.test_sync import CHUNK_BYTES, HOME, Receiver

Chunk = InstallSnapshot | SnapshotReply

MEMBERS = (Member("id1", "n1", "10.0.0.1:8050", True), Member("id2", "n2", "10.0.0.2:8050", True))


class Pair:
    """A leader with a snapshot of the entry 50, and a follower that has nothing. The leader's `background` does at once what it is told."""

    def __init__(self, background: Background = Receiver.at_once) -> None:
        self.now = 0.0
        self.receiver = Receiver()
        self.receiver.replica.raft.id = "id2"
        self.receiver.replica.raft.term = 3
        self.disk = SimDisk()
        self.disk.make_directory(HOME)
        self.store = Store.open(HOME / "state.db", disk=self.disk)
        for i in range(50):
            crc = checksum(f"key{i}", b'"v"', i + 1, i + 1, 1)
            self.store.put(f"key{i}", (b'"v"', i + 1, i + 1, 1, crc), None)
            self.store.digest = (self.store.digest + crc**2) % 2**64
        begun = self.store.begin_checkpoint(50, 3, Configuration("c", "bully", MEMBERS))
        begun.write()
        self.store.finish_checkpoint(begun)
        self.replica = mock.MagicMock(diverged=False, is_leader=True)
        self.replica.machine.applied = 50
        raft = self.replica.raft
        raft.id, raft.term, raft.durable = "id1", 3, 1000
        raft.log.base_index = raft.log.let_go = 0
        raft.log.term_at.return_value = 3
        raft.config_at.return_value = Configuration("c", "bully", MEMBERS)
        raft.progress = {"id2": mock.Mock(snapshot=True, match=0)}
        bounds = Bounds(snapshot_chunk_bytes=CHUNK_BYTES)
        self.sync = Sync(
            self.replica, self.store, HOME, background, mock.Mock(), Policy(entries=100, retain_entries=0), bounds,
            disk=self.disk, leisure=Receiver.at_once,
        )  # fmt: skip

    def said(self, replica: mock.MagicMock) -> list[Chunk]:
        """What a side has sent since it was last asked."""
        messages = [call.args[0] for call in replica.send.call_args_list]
        replica.send.reset_mock()
        return messages

    def run(self, loses: random.Random, share: float) -> None:
        """Pass messages to and fro, tick by tick, until the leader knows that it is installed. A `share` of them is lost."""
        self.sync.work(Ready(needs_snapshot=["id2"]), self.now)
        while not self.replica.raft.snapshot_sent.called and self.now < 50.0:
            self.now += 0.025
            self.sync.tick(self.now)
            self.sync.work(Ready(), self.now)
            for message in self.said(self.replica):
                if loses.random() >= share:
                    self.receiver.sync.work(Ready(chunks=[message]), self.now)
                    self.receiver.replica.raft.commit = self.receiver.store.meta.applied
            for reply in self.said(self.receiver.replica):
                if loses.random() >= share:
                    self.sync.work(Ready(chunks=[reply]), self.now)

    def close(self) -> None:
        self.sync.close()
        self.store.close()
        self.receiver.close()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_snapshot_arrives_however_many_of_its_messages_get_lost(seed: int, share: float) -> None:
    pair = Pair()
    pair.run(random.Random(seed), share)
    assert pair.receiver.store.meta == pair.store.meta
    pair.replica.raft.snapshot_sent.assert_called_once_with("id2", 50)
    pair.replica.raft.snapshot_failed.assert_not_called()
    assert pair.now < 1.0 or share
    pair.close()


def test_sending_goes_on_from_a_copy_where_it_outlasts_a_checkpoint() -> None:
    pair = Pair()
    pair.sync.work(Ready(needs_snapshot=["id2"]), 0.0)
    pair.sync.work(Ready(), 0.0)
    chunks = pair.said(pair.replica)
    for applied in (51, 52):
        assert pair.disk.list(HOME) == ["state.db"], "one checkpoint may wait"
        pair.replica.machine.applied = applied
        pair.sync.checkpoint(None, 0.0)
    assert pair.disk.list(HOME) == ["outgoing.db", "state.db"]
    for chunk in chunks:
        pair.receiver.sync.work(Ready(chunks=[chunk]), 0.0)
    pair.run(random.Random(1), 0.0)
    assert pair.receiver.store.meta.applied == 50 and pair.store.meta.applied == 52
    pair.sync.tick(pair.now)
    assert pair.disk.list(HOME) == ["state.db"]
    pair.close()


@pytest.mark.parametrize(("lags", "applied", "sent"), [(True, 60, 50), (True, 90, 90), (False, 60, 60)])
def test_a_new_checkpoint_is_made_for_who_lags_only_where_much_would_be_behind_the_last(
    lags: bool, applied: int, sent: int
) -> None:
    pair = Pair()
    pair.replica.raft.progress["id2"].snapshot = lags
    pair.replica.machine.applied = applied
    pair.run(random.Random(1), 0.0)
    assert pair.receiver.store.meta.applied == sent
    pair.close()


def test_the_log_is_kept_for_a_while_for_who_catches_up_behind_a_snapshot() -> None:
    pair = Pair()
    pair.run(random.Random(1), 0.0)
    raft = pair.replica.raft
    for applied, match, kept_from in ((150, 50, 50), (250, 120, 120), (350, 350, 350), (450, 350, 450)):
        pair.replica.machine.applied, raft.progress["id2"].match = applied, match
        pair.sync.checkpoint(None, pair.now)
        raft.compact.assert_called_with(kept_from)
    pair.close()
    pair = Pair()
    pair.run(random.Random(1), 0.0)
    pair.replica.machine.applied = 150
    pair.sync.tick(pair.now + FOLLOW_PATIENCE_S)
    pair.replica.raft.compact.assert_called_with(150)
    pair.close()


@pytest.fixture
def receives() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.close()


class Later:
    """A background that does its work when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def run(self, work: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        self.waiting.append((work, done))

    def go(self) -> None:
        Receiver.at_once(*self.waiting.pop(0))


def sending() -> tuple[Pair, Later]:
    """A leader that has begun to send: all chunks but the last one, for its worker has still to hash the file."""
    later = Later()
    pair = Pair(later.run)
    pair.sync.work(Ready(needs_snapshot=["id2"]), 0.0)
    later.go()
    return pair, later


def test_all_but_the_last_chunk_are_sent_before_the_hash_is_known() -> None:
    pair, later = sending()
    pair.run(random.Random(1), 0.3)
    received = pair.receiver.sync._receiving
    assert received is not None and not received.complete
    size = received.file.size_bytes
    assert size - CHUNK_BYTES <= received.file.written < size and received.file.sha256 == ""
    pair.now = 0.0
    later.go()
    pair.run(random.Random(2), 0.3)
    assert pair.receiver.store.meta == pair.store.meta
    pair.replica.raft.snapshot_failed.assert_not_called()
    pair.close()
    assert not pair.disk.handles and pair.disk.list(HOME) == ["state.db"]


def test_who_waits_for_the_hash_of_a_very_large_file_is_not_given_up() -> None:
    pair, later = sending()
    pair.run(random.Random(1), 0.0)
    for now in (100.0, 200.0):
        pair.sync.tick(now)
    later.go()
    pair.sync.tick(200.1)
    pair.replica.raft.snapshot_failed.assert_not_called()
    pair.now = 0.0
    pair.run(random.Random(1), 0.0)
    assert pair.receiver.store.meta == pair.store.meta
    pair.close()


def test_a_file_that_is_dropped_while_it_is_hashed_is_closed_then() -> None:
    pair, later = sending()
    pair.sync.work(Ready(), 0.0)
    assert pair.said(pair.replica) and pair.store.held
    pair.sync.disconnected("id2")
    pair.replica.raft.snapshot_failed.assert_called_once_with("id2")
    assert pair.store.held, "the worker reads it"
    later.go()
    assert not pair.store.held and not later.waiting
    pair.run(random.Random(1), 0.0)
    later.go()
    later.go()
    pair.now = 0.0
    pair.run(random.Random(1), 0.0)
    assert pair.receiver.store.meta == pair.store.meta, "and it can be sent again"
    pair.close()


def test_a_file_that_can_not_be_read_is_not_sent_any_further(caplog: pytest.LogCaptureFixture) -> None:
    pair, later = sending()
    pair.sync.work(Ready(), 0.0)
    _, done = later.waiting.pop()
    done(None, OSError("the disk failed"))
    pair.replica.raft.snapshot_failed.assert_called_once_with("id2")
    assert "could not be read: the disk failed" in caplog.text
    assert not pair.store.held and pair.sync._copy is None
    pair.close()


def test_a_chunk_of_another_file_begins_anew(receives: Receiver) -> None:
    chunk = InstallSnapshot("id1", "id2", 3, 50, 3, 0, 9000, "", b"x" * CHUNK_BYTES)
    receives.sync.work(Ready(chunks=[chunk]), 0.0)
    first = receives.sync._receiving
    for same in (replace(chunk, offset=CHUNK_BYTES, sha256="a"), replace(chunk, offset=2 * CHUNK_BYTES - 1)):
        receives.sync.work(Ready(chunks=[same]), 0.0)
        assert receives.sync._receiving is first and first is not None and first.file.sha256 == "a"
    for other in (replace(chunk, sha256="b"), replace(chunk, size=9001), replace(chunk, index=51)):
        before = receives.sync._receiving
        receives.sync.work(Ready(chunks=[other]), 0.0)
        assert receives.sync._receiving is not before
