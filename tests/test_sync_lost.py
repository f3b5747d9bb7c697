"""A snapshot's way between two members whose messages get lost without either of them noticing."""

from __future__ import annotations

import random
from unittest import mock

import pytest

from ddb.config import Bounds
from ddb.kv import checksum
from ddb.messages import Configuration, InstallSnapshot, Member, SnapshotReply
from ddb.raft import Ready
from ddb.simdisk import SimDisk
from ddb.store import Store
from ddb.sync import FOLLOW_PATIENCE_S, Policy, Sync
from tests.test_sync import CHUNK_BYTES, HOME, Receiver

Chunk = InstallSnapshot | SnapshotReply

MEMBERS = (Member("id1", "n1", "10.0.0.1:8050", True), Member("id2", "n2", "10.0.0.2:8050", True))


class Pair:
    """A leader with a snapshot of the entry 50, and a follower that has nothing."""

    def __init__(self) -> None:
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
            self.replica, self.store, HOME, Receiver.at_once, mock.Mock(), Policy(entries=100, retain_entries=0), bounds,
            disk=self.disk,
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
