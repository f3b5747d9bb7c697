"""The store against a dict, a crash, a full disk and rotten bits."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ddb import layers, migration, snapshot, store
from ddb.disk import Disk, OsDisk
from ddb.errors import CorruptStore, InvariantError, ReadOnly, StartupError
from ddb.kv import Machine, MemoryTable, Row, checksum, digest_of
from ddb.layers import UNKNOWN, Cache, KeyFilter, Layer
from ddb.messages import Configuration, Member
from ddb.snapshot import Meta, check_copy
from ddb.store import Checkpoint, Store, sorted_slices
from tests import test_kv

CONFIGURATION = Configuration("c1", members=(Member("i1", "n1", "127.0.0.1:1", True),), removed=("i0",))


def row_of(key: str, value: bytes, rev: int, old: Row | None = None) -> Row:
    created, version = (rev, 1) if old is None else (old[2], old[3] + 1)
    return (value, rev, created, version, checksum(key, value, rev, created, version))


def put(target: Store, key: str, value: bytes, rev: int) -> Row:
    old = target.row(key)
    row = row_of(key, value, rev, old)
    target.put(key, row, old)
    target.digest = (target.digest + row[4] ** 2 - (0 if old is None else old[4] ** 2)) % 2**64
    return row


def remove(target: Store, key: str) -> None:
    old = target.row(key)
    assert old is not None
    target.remove(key, old)
    target.digest = (target.digest - old[4] ** 2) % 2**64


def checkpoint(target: Store, applied: int, configuration: Configuration | None = None) -> None:
    begun = target.begin_checkpoint(applied, 1, configuration)
    begun.write()
    target.finish_checkpoint(begun)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fill(target: Store, count: int, rev: int = 1) -> dict[str, Row]:
    return {key: put(target, key, b'"%d %d"' % (rev, i), rev) for i in range(count) for key in [f"key{i:05d}"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in thousands is done in threes, so that small tests meet every seam."""
    for patch in small_step_patches():
        monkeypatch.setattr(patch[0], patch[1], patch[2])


def small_step_patches() -> list[tuple[Any, str, Any]]:
    return [
        (store, "STATEMENT_ROWS", 3),
        (store, "INSERT_MANY", f"INSERT OR REPLACE INTO kv VALUES {', '.join([store._ONE_ROW] * 3)}"),
        (store, "SORTED_KEYS_MAX", 8),
        (store, "SLICE_KEYS", 3),
        (snapshot, "PAUSE_S", 0),
        (snapshot, "SYNCHRONOUS", "OFF"),  # only power failures would show the difference
        (snapshot, "PAUSE_EVERY_ROWS", 3),
        (layers, "INSERTED_MAX", 2),
        (layers, "MOVED_MAX", 4),
        (layers, "FILTER_SLOTS_MIN", 16),
    ]


# ------------------------------------------------------------ checkpoints


def test_a_checkpoint_survives_and_later_changes_wait_for_the_log(path: Path) -> None:
    with Store.open(path) as first:
        rows = fill(first, 10)
        remove(first, "key00003")
        del rows["key00003"]
        checkpoint(first, 7, CONFIGURATION)
        put(first, "later", b"1", 8)
        digest = first.meta.digest
    with Store.open(path) as second:
        assert second.meta == Meta(7, 1, CONFIGURATION, digest, 9)
        assert dict(second.rows()) == rows
        assert second.row("later") is None
        assert (second.digest, second.key_count) == (digest_of(iter(rows.items())), 9)


def test_an_empty_store_is_a_state_too(path: Path) -> None:
    for _ in range(2):
        with Store.open(path) as empty:
            assert empty.meta == Meta()
            assert empty.row("a") is None
            assert list(empty.rows()) == []
            assert empty.count() == empty.count("a", "b") == 0
    with Store.open(path) as empty:
        checkpoint(empty, 5)
        assert empty.meta.applied == 5


def test_plain_sqlite_shows_readable_json(path: Path) -> None:
    with Store.open(path) as target:
        put(target, "città", '{"name":"Zürich","old":null}'.encode(), 12)
        checkpoint(target, 12, CONFIGURATION)
    with contextlib.closing(sqlite3.connect(path)) as plain:
        assert plain.execute("SELECT key, value, typeof(value), rev, version FROM kv").fetchall() == [
            ("città", '{"name":"Zürich","old":null}', "text", 12, 1)
        ]
        meta = dict(plain.execute("SELECT name, value FROM meta"))
    assert (meta["applied"], meta["term"], meta["count"]) == ("12", "1", "1")
    assert meta["configuration"].startswith('{"cluster":"c1",')


def test_a_checkpoint_writes_what_changed_since_it_was_begun_with_the_next(path: Path) -> None:
    with Store.open(path) as target:
        put(target, "a", b"1", 1)
        begun = target.begin_checkpoint(1, 1, None)
        put(target, "a", b"2", 2)
        put(target, "b", b"2", 2)
        begun.write()
        assert target.row("a") == row_of("a", b"2", 2, row_of("a", b"1", 1))
        target.finish_checkpoint(begun)
        assert dict(target.rows()).keys() == {"a", "b"}
    with Store.open(path) as again:
        assert dict(again.rows()) == {"a": row_of("a", b"1", 1)}


def test_there_is_one_checkpoint_at_a_time_and_it_does_not_go_back(path: Path) -> None:
    with Store.open(path) as target:
        begun = target.begin_checkpoint(5, 1, None)
        assert target.checkpointing
        with pytest.raises(InvariantError):
            target.begin_checkpoint(6, 1, None)
        begun.write()
        target.finish_checkpoint(begun)
        assert not target.checkpointing
        with pytest.raises(InvariantError):
            target.finish_checkpoint(begun)
        with pytest.raises(InvariantError):
            target.begin_checkpoint(4, 1, None)


def test_a_commit_is_fsynced(path: Path) -> None:
    with Store.open(path), contextlib.closing(snapshot.connect(OsDisk(), path)) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_values_and_keys_of_every_size_and_kind_come_back(path: Path) -> None:
    values = [b'""', b"0", b'"%b"' % (b"x" * 5000), b'"%b"' % (b"y" * 3_000_000), '"\U0001f600\u2028"'.encode()]
    keys = ["k", "k\0", "k\0\0", "\n", "x" * 4096, "\U0001f600", "\ud7ff", "\ue000", "\uffff"]
    with Store.open(path) as target:
        for i, key in enumerate(keys):
            put(target, key, values[i % len(values)], 2**62 + i)
        expected = dict(target.rows())
        checkpoint(target, 1)
    with Store.open(path) as again:
        assert dict(again.rows()) == expected
        assert {key: again.row(key) for key in keys} == expected
        assert [key for key, _ in again.rows()] == sorted(keys, key=lambda key: key.encode())


def test_reads_are_right_while_a_worker_writes(path: Path) -> None:
    with Store.open(path, cache_bytes_max=0) as target:
        for rev in range(1, 6):
            rows = fill(target, 3000, rev)
            begun = target.begin_checkpoint(rev, 1, None)
            worker = threading.Thread(target=begun.write)
            worker.start()
            checks = 0
            while worker.is_alive() or not checks:
                for key in random.sample(sorted(rows), 100):
                    assert target.row(key) == rows[key]
                assert target.count("key00100", "key00200") == 100
                assert [key for key, _ in target.rows("key02990")] == [f"key{i:05d}" for i in range(2990, 3000)]
                checks += 1
            worker.join()
            target.finish_checkpoint(begun)
            assert target.row("key00007") == rows["key00007"]


def test_data_may_be_larger_than_the_cache(path: Path) -> None:
    with Store.open(path, cache_bytes_max=100_000) as target:
        rows: dict[str, Row] = {}
        for rev in range(1, 11):
            rows |= {
                key: put(target, key, b'"%b"' % (b"x" * 200), rev) for key in [f"k{rev:02d}{i:03d}" for i in range(100)]
            }
            checkpoint(target, rev)
            assert target._cache.bytes <= 100_000
        for _ in range(3):
            assert all(target.row(key) == row for key, row in rows.items())
            assert target._cache.bytes <= 100_000


def test_another_program_that_looks_into_the_file_takes_nothing_from_under_the_store(path: Path) -> None:
    look = f"import sqlite3; sqlite3.connect({str(path)!r}).execute('SELECT count(*) FROM kv').fetchone()"
    with Store.open(path) as target:
        fill(target, 10)
        checkpoint(target, 1)
        subprocess.run([sys.executable, "-c", look], check=True)
        assert path.with_name(path.name + "-wal").exists(), "the last one to close a database removes its log"
        assert path.with_name(path.name + "-shm").exists()


def test_the_wal_does_not_grow_from_checkpoint_to_checkpoint(path: Path) -> None:
    with Store.open(path) as target:
        for rev in range(1, 4):
            fill(target, 2000, rev)
            checkpoint(target, rev)
            assert Path(f"{path}-wal").stat().st_size == 0


# ---------------------------------------------------------------- a model


class StoreModel(RuleBasedStateMachine):
    """A store beside a dict that always knows better, through checkpoints, failures and restarts."""

    keys = st.sampled_from([f"{a}{b}" for a in "abé" for b in ("", "x", "\0", "\U0010ffff")] + ["c", "d", "e"])

    @initialize(cache=st.sampled_from([0, 1500, 10**6]), small_file=st.booleans())
    def start(self, cache: int, small_file: bool) -> None:
        self.stack = contextlib.ExitStack()
        self.path = Path(self.stack.enter_context(small_steps_taken())) / "store.db"
        self.options = {"cache_bytes_max": cache, "verified_at_open_bytes_max": 10**6 if small_file else 0}
        self.store = Store.open(self.path, **self.options)
        self.now: dict[str, Row] = {}
        self.durable: tuple[int, dict[str, Row]] = (0, {})
        self.writing: tuple[Checkpoint, int, dict[str, Row], bool] | None = None
        self.rev = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.stack.close()

    @rule(key=keys, size=st.integers(0, 300))
    def put(self, key: str, size: int) -> None:
        self.rev += 1
        assert self.store.row(key) == self.now.get(key)
        self.now[key] = put(self.store, key, b'"%b"' % (b"x" * size), self.rev)

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.rev += 1
        if key in self.now:
            remove(self.store, key)
            del self.now[key]

    @precondition(lambda self: self.writing is None)
    @rule()
    def begin(self) -> None:
        begun = self.store.begin_checkpoint(self.rev, 1, None)
        self.writing = (begun, self.rev, dict(self.now), False)

    @precondition(lambda self: self.writing is not None and not self.writing[3])
    @rule()
    def write(self) -> None:
        assert self.writing is not None
        begun, rev, rows, _ = self.writing
        begun.write()
        self.durable = (rev, rows)
        self.writing = (begun, rev, rows, True)

    @precondition(lambda self: self.writing is not None and self.writing[3])
    @rule(after_failure=st.booleans())
    def finish(self, after_failure: bool) -> None:
        assert self.writing is not None
        done = self.store.abandon_checkpoint if after_failure else self.store.finish_checkpoint
        done(self.writing[0])
        assert self.store.meta.applied == self.writing[1]
        self.writing = None

    @precondition(lambda self: self.writing is not None and not self.writing[3])
    @rule()
    def abandon(self) -> None:
        assert self.writing is not None
        self.store.abandon_checkpoint(self.writing[0])
        self.writing = None

    @rule(some=st.sets(keys))
    def prefetch(self, some: set[str]) -> None:
        self.store.prefetch(some)
        assert {key: self.store.row(key) for key in some} == {key: self.now.get(key) for key in some}

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.writing = None
        self.rev, rows = self.durable
        self.now = dict(rows)
        self.store = Store.open(self.path, **self.options)

    @rule()
    def verify(self) -> None:
        assert self.store.verify().applied == self.durable[0]
        assert self.store.verified

    @precondition(lambda self: self.writing is None)
    @rule()
    def install_own_copy(self) -> None:
        copied = snapshot.copy(self.store.disk, self.store.path, self.path.with_name("copy.db"))
        found = KeyFilter(0)
        meta = check_copy(OsDisk(), copied.path, found.add)
        assert meta == copied.meta == self.store.meta
        self.store.install(copied.path, found)
        assert self.store.verified
        self.rev, rows = self.durable
        self.now = dict(rows)

    @rule(start=keys | st.just(""), end=keys | st.none(), reverse=st.booleans())
    def scan(self, start: str, end: str | None, reverse: bool) -> None:
        inside = [(key, row) for key, row in self.now.items() if start <= key and (end is None or key < end)]
        assert list(self.store.rows(start, end, reverse)) == sorted(inside, reverse=reverse)
        assert self.store.count(start, end) == len(inside)

    @invariant()
    def the_sums_are_right(self) -> None:
        if hasattr(self, "store"):
            assert self.store.key_count == len(self.now)
            assert self.store.digest == digest_of(iter(self.now.items()))
            assert (self.store.changed_bytes == 0) <= (self.now == self.durable[1] or self.writing is not None)


@contextlib.contextmanager
def small_steps_taken() -> Iterator[str]:
    """As `small_steps`, for what hypothesis repeats; with a directory of its own."""
    with contextlib.ExitStack() as stack:
        for target, name, value in small_step_patches():
            stack.enter_context(mock.patch.object(target, name, value))
        yield stack.enter_context(tempfile.TemporaryDirectory(prefix="ddb-test-"))


TestStoreIsADict = StoreModel.TestCase
TestStoreIsADict.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def change_some(target: Store, rows: dict[str, Row], chance: random.Random, rev: int) -> None:
    """Put, change and remove some keys of the alphabet, in `target` and in `rows`."""
    for key in chance.sample("abcdefghijklmnop", 6):
        if key in rows and chance.random() < 0.5:
            remove(target, key)
            del rows[key]
        else:
            rows[key] = put(target, key, b"%d" % rev, rev)


@pytest.mark.parametrize("seed", range(25))
def test_scans_and_counts_see_every_layer_in_order(path: Path, seed: int, small_steps: None) -> None:
    chance = random.Random(seed)
    rows: dict[str, Row] = {}
    with Store.open(path) as target:

        def check() -> None:
            for start, end in [("", None), ("d", "m"), ("f", None), ("", "k"), ("m", "d")]:
                inside = sorted((key, row) for key, row in rows.items() if start <= key and (end is None or key < end))
                assert list(target.rows(start, end)) == inside
                assert list(target.rows(start, end, reverse=True)) == inside[::-1]
                assert target.count(start, end) == len(inside)

        for rev in range(1, 30, 4):
            change_some(target, rows, chance, rev)
            check()
            begun = target.begin_checkpoint(rev, 1, None)
            change_some(target, rows, chance, rev + 1)
            check()
            if chance.random() < 0.4:
                target.abandon_checkpoint(begun)
                change_some(target, rows, chance, rev + 2)
                check()
                begun = target.begin_checkpoint(rev + 2, 1, None)
                check()
            begun.write()
            check()
            target.finish_checkpoint(begun)
            check()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(test_kv.REQUESTS, max_size=40), st.integers(1, 5))
def test_the_machine_answers_alike_on_a_store_and_in_memory(requests: list[dict[str, Any]], size: int) -> None:
    with small_steps_taken() as directory, Store.open(Path(directory) / "store.db", cache_bytes_max=2000) as target:
        on_disk, in_memory = Machine(target), Machine(MemoryTable())
        begun: Checkpoint | None = None
        for step, some in enumerate(test_kv.cut(requests, size)):
            batch = test_kv.batch_of(in_memory.applied + 1, *some)
            assert on_disk.apply_batch(batch) == in_memory.apply_batch(batch)
            assert target.digest == in_memory.table.digest
            if step % 3 == 0:
                begun = target.begin_checkpoint(on_disk.applied, 1, None)
            elif step % 3 == 1 and begun is not None:
                begun.write()
            elif begun is not None:
                target.finish_checkpoint(begun)
                begun = None
        assert list(target.rows()) == list(in_memory.table.rows())


# ----------------------------------------------------------------- crashes

CRASHER = """
import sys
from ddb.kv import checksum
from ddb.store import Store
target = Store.open(sys.argv[1])
rev = target.meta.applied
while True:
    rev += 1
    for i in range(3000):
        key = f"key{i:05d}"
        if i % 7 == rev % 7:
            old = target.row(key)
            if old is not None:
                target.remove(key, old)
                target.digest = (target.digest - old[4] ** 2) % 2**64
            continue
        old = target.row(key)
        created, version = (rev, 1) if old is None else (old[2], old[3] + 1)
        row = (b"%d" % rev, rev, created, version, checksum(key, b"%d" % rev, rev, created, version))
        target.put(key, row, old)
        target.digest = (target.digest + row[4] ** 2 - (0 if old is None else old[4] ** 2)) % 2**64
    begun = target.begin_checkpoint(rev, 1, None)
    print("begun", rev, flush=True)
    begun.write()
    target.finish_checkpoint(begun)
    print("done", rev, flush=True)
"""


def test_a_kill_during_a_checkpoint_leaves_one_whole_checkpoint(path: Path) -> None:
    chance = random.Random(4)
    between = 0
    for lines, delay_s in [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0)] + [(3, chance.uniform(0, 0.04)) for _ in range(8)]:
        with subprocess.Popen(
            [sys.executable, "-c", CRASHER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        ) as child:
            assert child.stdout is not None
            said: list[str] = []
            try:
                for _ in range(lines):
                    said.append(child.stdout.readline())
                time.sleep(delay_s)  # the moment of the kill is the thing tried out
            finally:
                child.send_signal(signal.SIGKILL)
            said += child.stdout.readlines()
        done = max((int(line.split()[1]) for line in said if line.startswith("done")), default=0)
        begun = max(int(line.split()[1]) for line in said if line.startswith("begun"))
        with Store.open(path) as after:
            rev = after.meta.applied
            assert rev in {done, begun} if done else rev in {begun - 1, begun}
            between += rev != begun
            rows = dict(after.rows())
            expected = {f"key{i:05d}" for i in range(3000) if i % 7 != rev % 7} if rev else set()
            assert set(rows) == expected
            assert all(row[0] == b"%d" % rev for row in rows.values())
            assert after.count() == len(rows)
    assert 0 < between < 12, "some kills came before the commit, and some after it"


class Crash(Exception):
    pass


class CrashingDisk(OsDisk):
    """From `point` on, no name is changed or made durable any more."""

    point: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def fsync_dir(self, handle: int) -> None:
        self._note("fsync")
        super().fsync_dir(handle)

    def rename(self, old: Path, new: Path) -> None:
        self._note("rename")
        super().rename(old, new)

    def _note(self, name: str) -> None:
        if self.point is not None:
            self.calls.append(name)
            if len(self.calls) > self.point:
                raise Crash


@pytest.mark.parametrize("point", range(3))
def test_a_crash_during_an_install_leaves_the_old_file_or_the_new(path: Path, tmp_path: Path, point: int) -> None:
    with Store.open(tmp_path / "other.db") as other:
        fill(other, 50, 9)
        checkpoint(other, 9)
        copied = snapshot.copy(other.disk, other.path, tmp_path / "copied.db")
    disk = CrashingDisk()
    target = Store.open(path, disk=disk)
    fill(target, 10)
    checkpoint(target, 5)
    disk.point = point
    with pytest.raises(Crash):
        target.install(copied.path)
    target.close()
    with Store.open(path) as after:
        assert disk.calls == ["fsync", "rename", "fsync"][: point + 1]
        assert (after.meta.applied, after.count()) == ((9, 50) if point == 2 else (5, 10))


def test_what_a_crash_left_of_an_unfinished_or_removed_store_does_no_harm(path: Path) -> None:
    Path(f"{path}.new").write_bytes(b"half a database")
    Path(f"{path}-wal").write_bytes(b"of a file that is gone")
    with Store.open(path) as target:
        fill(target, 5)
        checkpoint(target, 5)
    with Store.open(path) as again:
        assert again.count() == 5
    assert sorted(file.name for file in path.parent.iterdir()) == ["store.db"]


# --------------------------------------------------------------- full disk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Call it with True, and a new connection finds no room for one page more; with False, it does again."""
    real = snapshot.connect
    full = False

    def connect(disk: Disk, path: Path, *, frozen: bool = False) -> sqlite3.Connection:
        connection = real(disk, path, frozen=frozen)
        if full:
            connection.execute("PRAGMA max_page_count=1")
        return connection

    def switch(on: bool) -> None:
        nonlocal full
        full = on

    monkeypatch.setattr(snapshot, "connect", connect)
    return switch


def test_a_full_disk_fails_a_checkpoint_and_loses_nothing(path: Path, full_disk: Callable[[bool], None]) -> None:
    with Store.open(path) as target:
        rows = fill(target, 3)
        checkpoint(target, 1)
        rows |= fill(target, 2000, 2)
        full_disk(True)
        for rev in (2, 3):
            begun = target.begin_checkpoint(rev, 1, None)
            with pytest.raises(ReadOnly, match="free some space"):
                begun.write()
            target.abandon_checkpoint(begun)
            assert target.meta.applied == 1
            assert dict(target.rows()) == rows
            assert target.changed_bytes > 2000
            rows["key00001"] = put(target, "key00001", b'"%d"' % rev, rev)
            remove(target, f"key0000{rev}")
            del rows[f"key0000{rev}"]
            assert target.count("key00000", "key00010") == 10 - rev + 1
        full_disk(False)
        checkpoint(target, 4)
        assert dict(target.rows()) == rows
    with Store.open(path) as again:
        assert (again.meta.applied, dict(again.rows())) == (4, rows)


def test_a_full_disk_after_the_commit_is_no_failure(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def execute(self, sql: str) -> None:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    with Store.open(path) as target:
        begun = target.begin_checkpoint(1, 1, None)
        begun._empty_wal(Full())  # type: ignore[arg-type]
        assert "disk is full" in caplog.text


def test_a_failure_after_the_commit_counts_as_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Checkpoint, connection: sqlite3.Connection) -> None:
        raise OSError("the disk failed")

    monkeypatch.setattr(Checkpoint, "_empty_wal", fail)
    with Store.open(path) as target:
        rows = fill(target, 10)
        begun = target.begin_checkpoint(1, 1, None)
        with pytest.raises(OSError, match="the disk failed"):
            begun.write()
        target.abandon_checkpoint(begun)
        assert target.meta.applied == 1
        assert target.count("key", "kez") == 10
        assert dict(target.rows()) == rows


# --------------------------------------------------------------------- rot


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Row]]:
    """A database file of three levels, with overflow pages and free pages, and what it holds."""
    path = tmp_path_factory.mktemp("healthy") / "store.db"
    chance = random.Random(7)
    with Store.open(path) as target:
        for i in range(600):
            size = chance.choice((3, 100, 300, 300, 300, 6000 if i % 50 == 0 else 30))
            put(target, f"key{i * 7919 % 10007:05d}", b'"%b"' % (b"v" * size), i + 1)
        checkpoint(target, 600, CONFIGURATION)
        for key in [key for key, _ in target.rows("key04000", "key06000")]:
            remove(target, key)
        checkpoint(target, 601, CONFIGURATION)
        rows = dict(target.rows())
    return path.read_bytes(), rows


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def positions(data: bytes, chance: random.Random, count: int) -> list[int]:
    """Bits all over the file, and more of them in the headers of pages, where most of the harm is done."""
    anywhere = [chance.randrange(len(data) * 8) for _ in range(count)]
    pages = len(data) // 4096
    headers = [chance.randrange(pages) * 4096 * 8 + chance.randrange(16 * 8) for _ in range(count // 3)]
    return [*anywhere, *headers, *[chance.randrange(100 * 8) for _ in range(count // 6)]]


def test_no_flipped_bit_is_served_by_a_store_that_was_verified(
    path: Path, healthy: tuple[bytes, dict[str, Row]]
) -> None:
    data, rows = healthy
    chance = random.Random(11)
    refused = 0
    for position in positions(data, chance, 300):
        remove_files(path)
        path.write_bytes(flipped(data, position))
        try:
            target = Store.open(path)
        except StartupError:
            refused += 1
            continue
        with target:
            assert target.meta.applied == 601 and target.meta.configuration == CONFIGURATION, position
            assert dict(target.rows()) == rows, position
            for key in rows:
                assert target.row(key) == rows[key], position
            assert target.row("key05000") is None
    assert refused > 200  # the rest hit free space


def test_no_damaged_row_is_prefetched(path: Path) -> None:
    with Store.open(path) as target:
        rows = fill(target, 10)
        checkpoint(target, 5)
    tamper(path, "UPDATE kv SET value = '\"other\"' WHERE key = 'key00007'")
    with Store.open(path, verified_at_open_bytes_max=0) as target:
        target.prefetch(["key00001", "key00002"])
        with pytest.raises(CorruptStore, match="key00007"):
            target.prefetch(rows)


def test_work_is_given_up_where_the_process_ends_and_the_last_checkpoint_stays(path: Path) -> None:
    with Store.open(path) as target:
        fill(target, 10)
        checkpoint(target, 5)
        fill(target, 2000, rev=6)
        begun = target.begin_checkpoint(2000, 1, None)
        target.end_work()
        for work in (begun.write, target.verify):
            with pytest.raises(ReadOnly, match="The node ends"):
                work()
        target.abandon_checkpoint(begun)
        assert target.meta.applied == 5
    with Store.open(path) as target:
        assert target.meta.applied == 5 and target.verify().count == target.key_count == 10


def test_a_store_is_cold_while_what_is_asked_for_has_to_be_read_from_the_file(path: Path) -> None:
    with Store.open(path) as target:
        rows = fill(target, 700)
        checkpoint(target, 5)
        assert all(target.row(key) == row for key, row in rows.items()) and not target.cold, "all of it is in memory"
    with Store.open(path) as target:
        some = sorted(rows)
        assert target.row(some[0]) == rows[some[0]] and target.cold
        for count in (2, 3, 4, 63, 600):  # one statement, with room to spare, or two
            target.prefetch(some[:count])
            assert target.cold
        statements: list[str] = []
        target._connection.set_trace_callback(statements.append)
        assert {key: target.row(key) for key in some[:600]} == {key: rows[key] for key in some[:600]}
        target.prefetch(some[:600])
        assert not target.cold and not statements
        target.prefetch(rows)
        assert target.cold and {key: target.row(key) for key in some} == rows


def test_what_has_changed_is_not_prefetched_from_the_file(path: Path) -> None:
    with Store.open(path) as target:
        before = fill(target, 10)
        checkpoint(target, 5)
    with Store.open(path) as target:
        after = fill(target, 5, rev=6)
        begun = target.begin_checkpoint(10, 1, None)
        target.prefetch([*before, "none"])
        begun.write()
        target.finish_checkpoint(begun)
        assert {key: target.row(key) for key in before} == {**before, **after}
        assert target.row("none") is None


def test_a_damaged_schema_is_refused_also_where_sqlite_quotes_what_is_no_utf_8(
    path: Path, healthy: tuple[bytes, dict[str, Row]]
) -> None:
    data, _ = healthy
    start = data.index(b"CREATE TABLE")
    for position in range(start, data.index(b"WITHOUT ROWID", start)):
        remove_files(path)
        path.write_bytes(data[:position] + b"\xd4" + data[position + 1 :])
        with pytest.raises(CorruptStore):
            Store.open(path)


def test_no_flipped_bit_is_served_before_a_store_was_verified(
    path: Path, healthy: tuple[bytes, dict[str, Row]]
) -> None:
    """A row that is answered is right. One that can't be found is noticed at the latest by `verify`."""
    data, rows = healthy
    chance = random.Random(13)
    noticed_late = 0
    for position in positions(data, chance, 200):
        remove_files(path)
        path.write_bytes(flipped(data, position))
        missed = False
        try:
            with Store.open(path, verified_at_open_bytes_max=0) as target:
                for key in rows:
                    row = target.row(key)
                    assert row is None or row == rows[key], position
                    missed = missed or row is None
                scanned = dict(target.rows())
                assert scanned.items() <= rows.items(), position
                missed = missed or scanned != rows or target.count("key") != len(rows)
                target.verify()
        except StartupError:
            noticed_late += missed
            continue
        assert not missed, position
    assert noticed_late > 0  # so `verify` is needed, and this test would see its absence


def remove_files(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def tamper(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("UPDATE kv SET value = '\"other\"' WHERE key = 'key00002'", "'key00002' is not what was written"),
        ("UPDATE kv SET rev = 99 WHERE key = 'key00002'", "'key00002' is not what was written"),
        ("UPDATE kv SET value = NULL WHERE key = 'key00002'", "'key00002' is not what was written"),
        ("UPDATE kv SET crc = 'x' WHERE key = 'key00002'", "'key00002' is not what was written"),
        ("UPDATE kv SET key = 'key00002x' WHERE key = 'key00002'", "'key00002x' is not what was written"),
        ("DELETE FROM kv WHERE key = 'key00002'", "9 rows are sound, but they are not the 10"),
        ("DELETE FROM kv", "should hold 10 keys"),
        ("UPDATE meta SET value = '6' WHERE name = 'applied'", "checksum of its table meta"),
        ("DELETE FROM meta WHERE name = 'digest'", "checksum of its table meta"),
        ("CREATE INDEX i ON kv (rev)", "its tables are not those"),
        ("CREATE TRIGGER t AFTER INSERT ON kv BEGIN DELETE FROM kv; END", "its tables are not those"),
        ("DROP TABLE meta", "its tables are not those"),
    ],
)
def test_a_changed_file_is_refused(path: Path, statement: str, part: str) -> None:
    with Store.open(path) as target:
        fill(target, 10)
        checkpoint(target, 5)
    tamper(path, statement)
    with pytest.raises(CorruptStore) as caught:
        Store.open(path)
    assert part in caught.value.message
    assert str(path) in caught.value.message and caught.value.fields["file"] == str(path)


def test_rows_out_of_order_are_refused(path: Path) -> None:
    """Each of them is sound, and none is missing, yet a look-up would go astray."""
    with Store.open(path) as target:
        for key in ("B", "a"):
            put(target, key, b"1", 1)
        checkpoint(target, 1)
    tamper(
        path,
        snapshot.KV.replace("kv", "other").replace("key TEXT", "key TEXT COLLATE NOCASE"),
        "INSERT INTO other SELECT * FROM kv",
        "DROP TABLE kv",
        "ALTER TABLE other RENAME TO kv",
        "PRAGMA writable_schema=ON",
        f"UPDATE sqlite_master SET sql = '{snapshot.KV}' WHERE name = 'kv'",
    )
    with pytest.raises(CorruptStore):
        Store.open(path)
    with Store.open(path, verified_at_open_bytes_max=0) as target, pytest.raises(CorruptStore, match="'B'"):
        list(target.rows())


def test_a_free_list_that_holds_a_used_page_is_refused(path: Path, healthy: tuple[bytes, dict[str, Row]]) -> None:
    """Every row still reads right, but the next write would overwrite some (SQLite file format §1.5)."""
    data = bytearray(healthy[0])
    data[32:36] = (2).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(CorruptStore, match=r"[Ff]reelist"):
        Store.open(path)


def test_a_bad_row_is_found_by_the_read_that_wants_it(path: Path) -> None:
    with Store.open(path) as target:
        fill(target, 10)
        checkpoint(target, 5)
    tamper(path, "UPDATE kv SET value = '7' WHERE key = 'key00004'")
    with Store.open(path, verified_at_open_bytes_max=0) as target:
        assert target.row("key00003") is not None
        for read in (lambda: target.row("key00004"), lambda: list(target.rows()), target.verify):
            with pytest.raises(CorruptStore, match="key00004"):
                read()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"SQLite format 3\0", b"SQLite format 3\0" + b"\0" * 5000, b"hello" * 2000]
)
def test_a_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptStore):
        Store.open(path)
    assert path.read_bytes() == content


def test_a_truncated_file_is_refused(path: Path, healthy: tuple[bytes, dict[str, Row]]) -> None:
    data, _ = healthy
    for size in range(4096, len(data), 16 * 4096 + 512):
        remove_files(path)
        path.write_bytes(data[:size])
        with pytest.raises(CorruptStore):
            Store.open(path)


def test_a_file_of_a_later_version_is_refused_kindly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "TABLES", {"9": snapshot.TABLES[snapshot.FORMAT]})
    monkeypatch.setattr(snapshot, "FORMAT", "9")
    monkeypatch.setattr(migration, "FORMAT", "9")
    monkeypatch.setattr(snapshot, "FORMATS_READ", ("9",))
    Store.open(path).close()
    monkeypatch.undo()
    with pytest.raises(StartupError, match="format 9, this version reads 1, 2 and 3"):
        Store.open(path)


def test_a_place_that_can_not_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "missing" / "store.db", tmp_path / "file" / "store.db", tmp_path / "directory"):
        with pytest.raises(StartupError, match="can't be opened for writing"):
            Store.open(path)


# ------------------------------------------------------- copies, installed


def test_a_copy_is_one_file_with_the_last_checkpoint(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as target:
        rows = fill(target, 500)
        checkpoint(target, 5, CONFIGURATION)
        put(target, "later", b"1", 6)
        copied = snapshot.copy(target.disk, target.path, tmp_path / "copy.db")
    assert copied.size_bytes == copied.path.stat().st_size
    assert copied.sha256 == sha256(copied.path)
    assert copied.path.read_bytes()[18:20] == b"\1\1", "it needs no write-ahead log (SQLite file format §1.3.3)"
    assert (
        check_copy(OsDisk(), copied.path)
        == copied.meta
        == Meta(5, 1, CONFIGURATION, digest_of(iter(rows.items())), 500)
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.db", "store.db"]


def test_a_copy_can_be_made_while_checkpoints_go_on(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as target:
        fill(target, 2000)
        checkpoint(target, 1)
        copies: list[snapshot.Copy] = []
        for rev in range(2, 5):
            fill(target, 2000, rev)
            begun = target.begin_checkpoint(rev, 1, None)
            threads = [
                threading.Thread(target=begun.write),
                threading.Thread(
                    target=lambda rev=rev: copies.append(
                        snapshot.copy(target.disk, target.path, tmp_path / f"copy{rev}.db")
                    )
                ),  # type: ignore[misc]
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            target.finish_checkpoint(begun)
            assert check_copy(OsDisk(), copies[-1].path).applied in (rev - 1, rev)


def test_what_is_sent_stays_as_it_was_while_checkpoints_go_on_and_then_the_log_is_emptied(
    path: Path, tmp_path: Path
) -> None:
    wal = path.with_name(path.name + "-wal")
    with Store.open(path) as target:
        fill(target, 500)
        checkpoint(target, 1)
        sent = target.source(tmp_path / "copy.db")
        assert sent.still and not (tmp_path / "copy.db").exists()
        sent = replace(sent, sha256=snapshot.hashed(sent))
        content = sent.read(sent.size_bytes, 0)
        for rev in (2, 3):
            rows = fill(target, 2000, rev)
            checkpoint(target, rev)
        assert sent.read(sent.size_bytes + 1, 0) == content == path.read_bytes()
        assert (target.waiting_checkpoints, target.meta.applied) == (2, 3)
        assert dict(target.rows()) == rows and wal.stat().st_size > 0
        spared = snapshot.spared(target.disk, sent, tmp_path / "copy.db")
        sent.close()
        checkpoint(target, 4)
        assert wal.stat().st_size == 0, "what has waited is moved with the next checkpoint"
        assert spared.read(spared.size_bytes, 0) == content
        assert check_copy(target.disk, tmp_path / "copy.db") == sent.meta == spared.meta
        assert sha256(tmp_path / "copy.db") == sent.sha256 == spared.sha256
        assert sent.meta.applied == 1
        spared.close()
        assert not (tmp_path / "copy.db").exists()


def test_what_is_sent_is_a_copy_where_the_log_can_not_be_emptied(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as target:
        fill(target, 500)
        checkpoint(target, 1)
        first = target.source(tmp_path / "one.db")
        fill(target, 500, 2)
        checkpoint(target, 2)
        with mock.patch.object(target.disk, "database", impatient(target.disk)):
            second = target.source(tmp_path / "two.db")
        assert (first.still, second.still, second.meta.applied) == (True, False, 2)
        assert check_copy(target.disk, tmp_path / "two.db") == target.meta
        assert sha256(tmp_path / "two.db") == second.sha256
        first.close()
        second.close()
        assert not (tmp_path / "two.db").exists()


def impatient(disk: Disk) -> Callable[..., sqlite3.Connection]:
    """`disk.database`, whose connections wait for no lock."""
    database = disk.database

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = database(*arguments, **options)
        connection.execute("PRAGMA busy_timeout=0")
        return connection

    return connect


def test_an_installed_copy_replaces_everything(path: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "leader.db") as leader:
        rows = fill(leader, 300, 9)
        checkpoint(leader, 9, CONFIGURATION)
        copied = snapshot.copy(leader.disk, leader.path, tmp_path / "received.db")
    with Store.open(path) as target:
        fill(target, 1000)
        checkpoint(target, 2)
        put(target, "key00001", b"1", 3)
        put(target, "stray", b"1", 3)
        assert target.row("key00999") is not None
        target.install(copied.path)
        assert target.meta == copied.meta
        assert (dict(target.rows()), target.count(), target.count("key00100", "key00200")) == (rows, 300, 100)
        assert target.row("stray") is None and target.row("key00999") is None
        assert target.digest == digest_of(iter(rows.items()))
        put(target, "next", b"1", 10)
        checkpoint(target, 10)
    with Store.open(path) as again:
        assert again.count() == 301
    assert not copied.path.exists()


def test_a_copy_that_is_not_right_is_refused(tmp_path: Path, path: Path) -> None:
    with Store.open(path) as target:
        fill(target, 300)
        checkpoint(target, 1)
        copied = snapshot.copy(target.disk, target.path, tmp_path / "copy.db")
    data = copied.path.read_bytes()
    chance = random.Random(3)
    refused = 0
    for _ in range(60):
        copied.path.write_bytes(flipped(data, chance.randrange(len(data) * 8)))
        try:
            assert check_copy(OsDisk(), copied.path) == copied.meta
        except StartupError:
            refused += 1
    assert refused > 10  # the rest hit free space
    copied.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptStore):
        check_copy(OsDisk(), copied.path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.db", "store.db"]


def test_a_copy_that_fails_leaves_no_file(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as target:
        with pytest.raises(OSError, match="missing"):
            snapshot.copy(target.disk, target.path, tmp_path / "missing" / "copy.db")
        with mock.patch.object(snapshot, "read_meta", side_effect=ReadOnly("full")), pytest.raises(ReadOnly):
            snapshot.copy(target.disk, target.path, tmp_path / "copy.db")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store.db"]


def test_no_install_while_a_worker_has_the_file_open(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as target:
        copied = snapshot.copy(target.disk, target.path, tmp_path / "copy.db")
        begun = target.begin_checkpoint(1, 1, None)
        with pytest.raises(InvariantError, match="checkpoint"):
            target.install(copied.path)
        target.abandon_checkpoint(begun)
        with target.working(), pytest.raises(InvariantError, match="worker"):
            target.install(copied.path)
        verifying = mock.patch.object(target, "_verify", side_effect=lambda **_: target.install(copied.path))
        with verifying, pytest.raises(InvariantError, match="worker"):
            target.verify()
        target.install(copied.path)


def test_a_file_can_be_sent_while_it_is_being_verified_which_then_waits(path: Path, tmp_path: Path) -> None:
    """The first who wants it may come when a node that was started just now has its million rows to look at."""
    with Store.open(path) as target:
        fill(target, 5000)
        checkpoint(target, 1)
    target = Store.open(path, verified_at_open_bytes_max=0)
    held: list[bool] = []
    sent: list[snapshot.Source] = []

    def go_on() -> None:
        """Called after some rows, and as long as it waits."""
        held.append(target.held)
        if len(held) == 2:
            sent.append(target.source(tmp_path / "copy.db"))
        elif len(held) == 5:
            assert sent[0].still and sent[0].read(sent[0].size_bytes, 0) == path.read_bytes()
            sent[0].close()
        elif len(held) == 7:
            sent.append(target.source(tmp_path / "copy.db"))
            target.begin_checkpoint(2, 1, None)

    with mock.patch.object(target, "go_on", go_on):
        target.verify()
    assert target.verified
    assert held == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 6, "with a checkpoint to come, it does not wait"
    sent[1].close()
    target.close()


def test_a_store_may_be_closed_twice_and_then_says_so(path: Path) -> None:
    target = Store.open(path)
    fill(target, 1)
    checkpoint(target, 1)
    target.close()
    target.close()
    with pytest.raises(InvariantError, match="closed"):
        list(target.rows())


# ------------------------------------------------------------------ layers


def test_a_new_key_is_looked_for_in_the_file_only_when_it_may_be_there(path: Path) -> None:
    with Store.open(path) as target:
        fill(target, 1000)
        checkpoint(target, 1)
    with Store.open(path) as target, mock.patch.object(store, "POINT", "not SQL: the file is not asked"):
        assert target.verified
        missed = sum(answers(lambda i=i: target.row(f"new{i}") is None) for i in range(1000))  # type: ignore[misc]
        assert missed > 800
        with pytest.raises(CorruptStore):
            target.row("key00001")


def answers(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except CorruptStore:
        return False


@given(st.lists(st.text(max_size=3), max_size=200))
def test_a_filter_never_denies_a_key_that_was_added(keys: list[str]) -> None:
    with mock.patch.object(layers, "FILTER_SLOTS_MIN", 16):
        filtering = KeyFilter(0)
    for first in range(0, len(keys), 7):
        filtering.add(keys[first : first + 7])
        assert all(filtering.may_hold(key) for key in keys[: first + 7])


def test_a_filter_that_grew_denies_most_keys_still() -> None:
    with mock.patch.object(layers, "FILTER_SLOTS_MIN", 4096):
        filtering = KeyFilter(0)
        for first in range(0, 20_000, 100):
            filtering.add([f"in{i}" for i in range(first, first + 100)])
    assert sum(filtering.may_hold(f"out{i}") for i in range(10_000)) < 4000


@settings(deadline=None)
@given(st.sets(st.text(max_size=5), max_size=300))
def test_slices_are_the_keys_in_order(keys: set[str]) -> None:
    with mock.patch.multiple(store, SORTED_KEYS_MAX=16, SLICE_KEYS=7), mock.patch.object(snapshot, "PAUSE_S", 0):
        slices = list(sorted_slices(dict.fromkeys(keys)))
    assert [key for some in slices for key in some] == sorted(keys)


def test_slices_are_short() -> None:
    keys = [f"{random.Random(i).random()}" for i in range(50_000)]
    with mock.patch.object(snapshot, "PAUSE_S", 0):
        assert max(map(len, sorted_slices(dict.fromkeys(keys)))) < 4 * store.SORTED_KEYS_MAX


def test_a_cache_keeps_what_is_used_and_drops_the_rest() -> None:
    cache = Cache(100_000, dict.clear)
    row = row_of("k", b"1", 1)
    for i in range(2000):
        cache.add(f"cold{i}", row)
        assert cache.get("hot") is (UNKNOWN if i == 0 else row)
        if i == 0:
            cache.add("hot", row)
        assert cache.bytes <= 100_000
    assert cache.get("cold0") is UNKNOWN
    assert cache.get("cold1999") is row


def test_a_cache_never_answers_with_an_older_row(small_steps: None) -> None:
    for size in (2, 10, 1000):
        cache = Cache(20_000, dict.clear)
        for i in range(30):
            cache.add(f"k{i}", row_of(f"k{i}", b"1", 1))
        layer = Layer()
        for i in range(size):
            layer.put(f"k{i}", None if i % 3 == 0 else row_of(f"k{i}", b"2", 2), row_of(f"k{i}", b"1", 1))
        expected = dict(layer.rows)
        cache.absorb(layer)
        for i in range(min(size, 30)):
            held = cache.get(f"k{i}")
            assert held is UNKNOWN or held == expected[f"k{i}"]
        assert cache.bytes <= 20_000


def test_the_rows_let_go_of_are_freed() -> None:
    many = {f"k{i}": None for i in range(5000)}
    store._let_go(many)
    for thread in threading.enumerate():
        if thread.name == "ddb-free":
            thread.join()
    assert not many


def test_what_sqlite_says_in_several_lines_is_one_sentence(tmp_path: Path) -> None:
    error = snapshot.corrupt(
        tmp_path / "state.db", "*** in database main ***\nPage 55: btreeInitPage() returns error code 11"
    )
    assert "\n" not in error.message and "main *** Page 55" in error.message
