"""Sessions and leases on disk: in checkpoints, copies and installed snapshots, through failures, rot and old formats."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from ddb import snapshot
from ddb.disk import OsDisk
from ddb.errors import CorruptStore, ReadOnly
from ddb.kv import Machine
from ddb.ledger import Ledger
from ddb.snapshot import check_copy
from ddb.store import Store
from tests.test_kv import batch_of
from tests.test_sessions import Spoken, whole_digest


class Kept(Spoken):
    """A machine on a store, which can be left to its disk alone at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        self.store = Store.open(self.path)
        self.machine = Machine(self.store, self.store.meta.applied)

    def checkpoint(self) -> None:
        begun = self.store.begin_checkpoint(self.machine.applied, 1, None)
        begun.write()
        self.store.finish_checkpoint(begun)

    def reopen(self) -> None:
        self.store.close()
        self._open()

    def fill(self) -> tuple[int, int, bytes]:
        """A session with one write, and a lease with one key."""
        client, lease = self.ask("session_open")["client"], self.ask("lease_grant", ttl=60)["lease"]
        first = self.raw("incr", key="n", client=client, seq=1)
        self.ask("put", key="leased", value=1, lease=lease)
        return client, lease, first


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def db(path: Path) -> Iterator[Kept]:
    db = Kept(path)
    yield db
    assert whole_digest(db.store) == db.store.digest
    db.store.close()


def test_a_checkpoint_holds_sessions_and_leases(db: Kept) -> None:
    client, lease, first = db.fill()
    digest = db.store.digest
    db.checkpoint()
    db.reopen()
    assert db.store.digest == digest
    assert db.raw("incr", key="n", client=client, seq=1) == first
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 1


def test_what_came_after_the_checkpoint_is_not_in_it(db: Kept) -> None:
    client, lease, _ = db.fill()
    db.checkpoint()
    db.ask("incr", key="n", client=client, seq=2)
    db.ask("lease_revoke", lease=lease)
    db.ask("session_close", client=client)
    db.reopen()
    assert db.ask("incr", key="n", client=client, seq=2)["value"] == 2
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 1


def test_records_that_are_gone_leave_the_file_as_well(db: Kept, path: Path) -> None:
    client, lease, _ = db.fill()
    db.checkpoint()
    db.ask("session_close", client=client)
    db.ask("lease_revoke", lease=lease)
    db.checkpoint()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM ledger").fetchone() == (0,)


def test_a_checkpoint_that_failed_gives_its_records_to_the_next(db: Kept) -> None:
    client, lease, first = db.fill()
    begun = db.store.begin_checkpoint(db.machine.applied, 1, None)
    with mock.patch.object(snapshot, "write_meta", side_effect=ReadOnly("full")), pytest.raises(ReadOnly):
        begun.write()
    second = db.raw("incr", key="n", client=client, seq=2)
    db.store.abandon_checkpoint(begun)
    third = db.raw("incr", key="n", client=client, seq=3)
    db.checkpoint()
    db.reopen()
    for seq, reply in enumerate((first, second, third), 1):
        assert db.raw("incr", key="n", client=client, seq=seq) == reply
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 1


def test_many_records_are_written_and_removed_in_slices(db: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "RECORDS_AT_ONCE", 7)
    client, lease, _ = db.fill()
    for seq in range(2, 60):
        db.ask("put", key=f"k{seq}", value=seq, lease=lease, client=client, seq=seq)
    db.checkpoint()
    db.reopen()
    assert db.machine.leases.key_count(lease) == 59
    for seq in range(60, 90):
        db.ask("delete", key=f"k{seq - 50}", client=client, seq=seq)
    db.checkpoint()
    db.reopen()
    db.store.verify()
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 29


def test_what_an_abandoned_checkpoint_took_does_not_hide_what_came_after() -> None:
    ledger = Ledger()
    ledger.set("a", b"1")
    ledger.set("b", b"1")
    taken = ledger.take_changes()
    ledger.set("a", None)
    ledger.give_back(taken)
    assert ledger.take_changes() == {"a": None, "b": b"1"}
    assert ledger.take_changes() == {}


def test_an_installed_snapshot_brings_its_sessions_and_leases_and_takes_the_old_ones(db: Kept, tmp_path: Path) -> None:
    client, lease, first = db.fill()
    db.checkpoint()
    copied = snapshot.copy(db.store.disk, db.store.path, tmp_path / "copied.db")
    assert check_copy(OsDisk(), copied.path) == copied.meta
    other = Kept(tmp_path / "other.db")
    with closing(other.store):
        others = other.ask("session_open")["client"], other.ask("session_open")["client"]
        other.ask("lease_grant", ttl=1)
        other.store.install(copied.path)
        other.machine = Machine(other.store, other.store.meta.applied)
        assert other.store.digest == db.store.digest == whole_digest(other.store)
        assert others[1] not in dict(other.machine.sessions.last_uses())
        assert other.raw("incr", key="n", client=client, seq=1) == first
        assert other.ask("lease_revoke", lease=lease)["deleted"] == 1


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE ledger SET value = '[9,9]' WHERE name LIKE 'session/%' AND value LIKE '[%'",
        "UPDATE ledger SET name = 'lease/7' WHERE name LIKE 'lease/%'",
        "UPDATE ledger SET crc = crc + 1",
        "UPDATE ledger SET crc = NULL",
        "DELETE FROM ledger WHERE name LIKE 'leased/%'",
        "DELETE FROM ledger WHERE name LIKE 'session/%/%'",
        "INSERT INTO ledger VALUES ('lease/99', '5', 0)",
        "DROP TABLE ledger",
    ],
)
def test_a_ledger_that_is_not_what_was_written_is_noticed(path: Path, harm: str) -> None:
    db = Kept(path)
    with closing(db.store):
        db.fill()
        db.checkpoint()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(harm)
    with pytest.raises(CorruptStore):
        Store.open(path).close()


def make_format_1(path: Path, keys: int = 20) -> int:
    """A snapshot as the version before wrote it. Returns its digest."""
    store = Store.open(path)
    machine = Machine(store)
    for number in range(keys):
        machine.apply_batch(batch_of(machine.applied + 1, {"op": "put", "key": f"k{number}", "value": number}))
    begun = store.begin_checkpoint(machine.applied, 3, None)
    begun.write()
    store.finish_checkpoint(begun)
    digest = store.digest
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        kept = ("applied", "configuration", "count", "digest", "term")
        texts = {name: value for name, value in connection.execute("SELECT * FROM meta") if name in kept}
        texts["format"] = "1"
        texts["crc"] = snapshot._meta_checksum(texts)
        for table in snapshot.TABLES["3"] - snapshot.TABLES["1"]:
            connection.execute(f"DROP TABLE {table.split()[2]}")
        connection.execute("DELETE FROM meta")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", texts.items())
        connection.execute("VACUUM")
    return digest


def test_a_file_of_format_1_is_brought_to_format_3_when_it_is_opened(path: Path) -> None:
    digest = make_format_1(path)
    db = Kept(path)
    assert (db.store.digest, db.store.key_count, db.machine.applied, db.store.meta.term) == (digest, 20, 20, 3)
    client, lease, first = db.fill()
    db.checkpoint()
    db.reopen()
    assert db.store.meta.format == "3"
    assert db.raw("incr", key="n", client=client, seq=1) == first
    assert db.ask("lease_revoke", lease=lease)["deleted"] == 1
    assert db.ask("put", key="k3", value=1)["version"] == 2
    db.store.close()


def test_a_migration_that_fails_leaves_the_old_file_as_it_was(path: Path) -> None:
    digest = make_format_1(path)
    with mock.patch.object(snapshot, "write_meta", side_effect=ReadOnly("full")), pytest.raises(ReadOnly):
        Store.open(path)
    with closing(sqlite3.connect(path)) as connection:
        tables = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    assert tables == snapshot.TABLES["1"]
    with closing(Store.open(path)) as store:
        assert (store.digest, store.key_count) == (digest, 20)


def test_a_copy_of_format_1_from_a_leader_of_the_version_before_is_checked_and_installed(
    path: Path, tmp_path: Path
) -> None:
    digest = make_format_1(tmp_path / "received.db")
    meta = check_copy(OsDisk(), tmp_path / "received.db")
    assert (meta.digest, meta.format) == (digest, "1")
    with closing(Store.open(path)) as store:
        store.install(tmp_path / "received.db")
        assert (store.digest, store.meta.format) == (digest, "3")
        store.verify()


def test_a_rotten_file_of_format_1_is_still_noticed(path: Path) -> None:
    make_format_1(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE kv SET value = '99' WHERE key = 'k7'")
    with pytest.raises(CorruptStore):
        Store.open(path).close()
