"""A snapshot's file as it arrives, in pieces: what is known of it when, and what is refused at the end."""

from __future__ import annotations

import hashlib
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ddb import arrival
from ddb.arrival import Arrival
from ddb.disk import Disk, OsDisk
from ddb.errors import CorruptStore
from ddb.kv import checksum
from ddb.simdisk import SimDisk
from ddb.snapshot import Meta
from ddb.store import Store

ROWS = 3000


def database(disk: Disk, path: Path, keys: list[str], value_bytes: int = 100) -> Meta:
    """A snapshot at `path` in which `keys` have been put in this order, with values longer than a page among them."""
    with Store.open(path, disk=disk) as store:
        for first in range(0, len(keys), 500):
            for rev, key in enumerate(keys[first : first + 500], first + 1):
                value = b'"%b"' % (b"x" * (9000 if rev % 97 == 0 else value_bytes))
                row = (value, rev, rev, 1, checksum(key, value, rev, rev, 1))
                store.put(key, row, None)
                store.digest = (store.digest + row[4] ** 2) % 2**64
            checkpoint = store.begin_checkpoint(first + 500, 1, None)
            checkpoint.write()
            store.finish_checkpoint(checkpoint)
        return store.meta


def deliver(target: Arrival, content: bytes, chunk_bytes: int) -> list[int]:
    """Have all of `content` arrive. Returns how many rows were known to be right after each chunk."""
    known = []
    for offset in range(0, len(content), chunk_bytes):
        target.take(content[offset : offset + chunk_bytes], offset)
        known.append(target._inspected().known.count)  # type: ignore[attr-defined]
    return known


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "LOOK_EVERY_BYTES", 1)
    monkeypatch.setattr(arrival, "SYNC_EVERY_BYTES", 100_000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("chunk_bytes", [3000, 16384])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.usefixtures("eager")
def test_rows_are_verified_while_they_arrive_and_all_are_in_the_end(
    tmp_path: Path, in_order: bool, chunk_bytes: int, simulated: bool
) -> None:
    disk: Disk = SimDisk() if simulated else OsDisk()
    disk.make_directory(tmp_path)
    keys = [f"key{i:05d}" for i in range(ROWS)]
    if not in_order:
        random.Random(1).shuffle(keys)
    meta = database(disk, tmp_path / "state.db", keys)
    handle = disk.open_to_read(tmp_path / "state.db")
    content = disk.pread(handle, disk.size(handle), 0)
    target = Arrival(disk, tmp_path / "incoming.db", len(content), sha256(content))
    known = deliver(target, content, chunk_bytes)
    assert known == sorted(known) and known[-1] < ROWS + 1
    if in_order and not simulated:  # the simulated disk answers a question wholly, or not at all
        assert known[len(known) // 2] > ROWS // 4, "they are known nearly as soon as they have come"
    found, filter = target.finish()
    assert found == meta
    assert all(map(filter.may_hold, keys)) and sum(filter.may_hold(f"other{i}") for i in range(1000)) < 200
    target.drop()
    assert "incoming.db" not in disk.list(tmp_path)


@pytest.mark.usefixtures("eager")
def test_a_byte_that_changed_behind_what_was_verified_is_found(tmp_path: Path) -> None:
    disk = OsDisk()
    database(disk, tmp_path / "state.db", [f"key{i:05d}" for i in range(ROWS)])
    content = (tmp_path / "state.db").read_bytes()
    for at in (20_000, len(content) // 2, len(content) - 1000):
        damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        target = Arrival(disk, tmp_path / "incoming.db", len(content), sha256(content))
        deliver(target, damaged, 16384)
        with pytest.raises(CorruptStore, match="SHA-256"):
            target.finish()
        target.drop()


@pytest.mark.parametrize(
    "change", ["DELETE FROM kv WHERE key = 'key00100'", "UPDATE kv SET value = '1' WHERE rev = 2000"]
)
@pytest.mark.usefixtures("eager")
def test_a_file_that_was_wrong_when_it_was_sent_is_refused(tmp_path: Path, change: str) -> None:
    database(OsDisk(), tmp_path / "state.db", [f"key{i:05d}" for i in range(ROWS)])
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as connection:
        connection.execute(change)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = (tmp_path / "state.db").read_bytes()
    target = Arrival(OsDisk(), tmp_path / "incoming.db", len(content), sha256(content))
    deliver(target, content, 16384)
    with pytest.raises(CorruptStore, match=r"sound|not what was written"):
        target.finish()
