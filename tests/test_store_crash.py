"""The snapshot after a loss of power at every change of the disk: one whole checkpoint, whatever was being written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ddb import snapshot
from ddb.arrival import Arrival
from ddb.errors import CorruptStore
from ddb.kv import digest_of
from ddb.simdisk import Crash, SimDisk
from ddb.store import Store
from tests.test_store import checkpoint, fill, put, remove

PATH = Path("/data/state.db")


def begun() -> tuple[SimDisk, Store]:
    """A store with a checkpoint at 1."""
    disk = SimDisk(random.Random(1))
    disk.make_directory(PATH.parent)
    one = Store.open(PATH, disk=disk)
    fill(one, 20)
    checkpoint(one, 1)
    return disk, one


def after_crashes(work: Callable[[SimDisk, Store], None]) -> list[int]:
    """Which checkpoint is there after a crash at each change of the disk that `work` makes; each is verified."""
    found: list[int] = []
    for seed in range(3):
        count = 0
        while True:
            disk, one = begun()
            disk.crash_at = disk.changes + count
            try:
                work(disk, one)
            except Crash:
                disk.crash(random.Random(seed))
            else:
                break
            again = Store.open(PATH, disk=disk)
            assert digest_of(again.rows()) == again.digest
            assert len(list(again.rows())) == again.key_count
            found.append(again.meta.applied)
            again.close()
            count += 1
    assert found, "there was something to interrupt"
    return found


def test_a_crash_at_every_change_of_a_checkpoint_leaves_the_old_one_or_the_new() -> None:
    def work(disk: SimDisk, one: Store) -> None:
        put(one, "key00001", b'"new"', 2)
        remove(one, "key00002")
        checkpoint(one, 2)

    assert set(after_crashes(work)) <= {1, 2}


def test_a_finished_checkpoint_survives_a_loss_of_power() -> None:
    disk, one = begun()
    put(one, "key00001", b'"new"', 2)
    remove(one, "key00002")
    checkpoint(one, 2)
    for seed in range(5):
        copy = disk.copy()
        copy.crash(random.Random(seed))
        again = Store.open(PATH, disk=copy)
        assert (again.meta.applied, again.row("key00002")) == (2, None)
        again.close()


def test_a_crash_at_every_change_of_an_install_leaves_the_old_state_or_the_new() -> None:
    source_disk, source = begun()
    put(source, "key00009", b'"theirs"', 5)
    checkpoint(source, 5)
    snapshot.copy(source.disk, source.path, PATH.with_name("copy.db"))
    received = source_disk.content(PATH.with_name("copy.db"))

    def work(disk: SimDisk, one: Store) -> None:
        disk.put(PATH.with_name("incoming.db"), received)
        one.install(PATH.with_name("incoming.db"))

    assert set(after_crashes(work)) <= {1, 5}


@pytest.mark.parametrize("at", range(0, 12_000, 997))
def test_a_received_copy_with_a_changed_byte_is_refused(at: int) -> None:
    disk, one = begun()
    copy = snapshot.copy(one.disk, one.path, PATH.with_name("copy.db"))
    content = bytearray(disk.content(copy.path))
    content[at % len(content)] ^= 1
    arriving = Arrival(disk, PATH.with_name("incoming.db"), len(content), copy.sha256)
    arriving.take(bytes(content), 0)
    with pytest.raises(CorruptStore):
        arriving.finish()
