"""The chronicle against a list of everything, in memory and on disk, through checkpoints, restarts and bounds."""

from __future__ import annotations

import random
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddb import annals, commands, past, snapshot, wire
from ddb.chronicle import CHANGE_BYTES, Chronicle, Record, Retention
from ddb.codec import encode_batch
from ddb.errors import BadRequest, Compacted, CorruptStore, TooLarge
from ddb.kv import Machine, MemoryTable, Row
from ddb.messages import Batch
from ddb.store import Checkpoint, Store

KEYS = ("a", "ab", "abc", "b", "é")


def batch_of(first: int, requests: list[dict[str, Any]], term: int = 1) -> Batch:
    prepared = [commands.prepare(request) for request in requests]
    batch = encode_batch(first, term, 1000 + first, [entry for entry, _ in prepared])
    return replace(batch, commands=[command for _, command in prepared])


def put(key: str, value: Any = 1) -> dict[str, Any]:
    return {"op": "put", "key": key, "value": value}


def delete(key: str) -> dict[str, Any]:
    return {"op": "delete", "key": key}


def both(*requests: dict[str, Any]) -> dict[str, Any]:
    return {"op": "batch", "ops": list(requests)}


class Book:
    """A machine and its chronicle, with the list of all changes that there ever were beside it."""

    def __init__(self, retention: Retention | None = None) -> None:
        self.table: Any = MemoryTable()
        self.machine = Machine(self.table)
        self.chronicle = Chronicle(0, retention)
        self.all: list[Record] = []
        self.states: dict[int, dict[str, Row]] = {0: {}}
        self.machine.on_changes = self._take

    def _take(self, batch: Batch, changes: list[Any]) -> None:
        self.all += [(rev, key, row, client, batch.term, batch.at_ms) for rev, key, row, _, client in changes]
        self.chronicle.take(batch, changes)

    def apply(self, *requests: dict[str, Any], term: int = 1) -> None:
        batch = batch_of(self.machine.applied + 1, list(requests), term)
        self.machine.apply_batch(batch)
        self.states[self.machine.applied] = dict(self.table.rows())

    def ask(self, **request: Any) -> dict[str, Any]:
        applied = self.machine.applied
        reply: dict[str, Any] = wire.decode(self.chronicle.answer(self.table, past.prepare(request), applied))
        return reply

    def check(self) -> None:
        """All that is kept is told, both ways, from each revision on."""
        floor = self.chronicle.floor
        kept = [record for record in self.all if record[0] > floor]
        for after in {floor, floor + 1, (floor + self.machine.applied) // 2, self.machine.applied} - {floor - 1}:
            if after >= floor:
                assert list(self.chronicle.records(after)) == [record for record in kept if record[0] > after]
                back = [record for record in reversed(kept) if record[0] < after]
                assert list(self.chronicle.backwards(after)) == back
        some = [record for record in kept if "ab" <= record[1] < "ac"]
        assert list(self.chronicle.records(floor, "ab", "ac")) == some
        assert list(self.chronicle.backwards(self.machine.applied + 1, "ab", "ac")) == some[::-1]


class StoredBook(Book):
    """The same with a store, which is written to and opened again."""

    def __init__(self, path: Path, retention: Retention) -> None:
        super().__init__(retention)
        self.path = path
        self.retention = retention
        self._open()

    def _open(self) -> None:
        self.table = Store.open(self.path)
        self.machine = Machine(self.table, self.table.meta.applied)
        self.machine.on_changes = self._take
        self.chronicle = Chronicle(self.machine.applied, self.retention, self.table)

    def checkpoint(self, *, fails: bool = False) -> None:
        begun: Checkpoint = self.begin()
        if fails:
            self.table.abandon_checkpoint(begun)
        else:
            begun.write()
            self.table.finish_checkpoint(begun)

    def begin(self) -> Checkpoint:
        applied = self.machine.applied
        begun: Checkpoint = self.table.begin_checkpoint(applied, 1, None, self.chronicle.extract(applied))
        return begun

    def restart(self) -> None:
        """Begin again with what the last checkpoint has, and what the log has behind it."""
        lost = self.machine.applied
        self.table.close()
        self._open()
        again = [batch for first, batch in sorted(self.log.items()) if self.machine.applied < first <= lost]
        self.all = [record for record in self.all if record[0] <= self.machine.applied]
        for batch in again:
            self.machine.apply_batch(batch)

    @property
    def log(self) -> dict[int, Batch]:
        """Each batch that was applied."""
        if not hasattr(self, "_log"):
            self._log: dict[int, Batch] = {}
        return self._log

    def apply(self, *requests: dict[str, Any], term: int = 1) -> None:
        batch = batch_of(self.machine.applied + 1, list(requests), term)
        self.log[batch.first] = batch
        self.machine.apply_batch(batch)
        self.states[self.machine.applied] = dict(self.table.rows())


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annals, "CHAPTER_BYTES", 30)  # three small changes
    monkeypatch.setattr(annals, "PAUSE_S", 0)
    monkeypatch.setattr(snapshot, "SYNCHRONOUS", "OFF")


# --------------------------------------------------------------- in memory


def test_what_happened_is_told_in_order_with_its_term_and_time() -> None:
    book = Book()
    book.apply(put("a", 1), put("b", [2]))
    book.apply(both(put("a", 3), delete("b"), delete("nothing")), term=4)
    reply = book.ask(op="history")
    assert reply["changes"] == [
        {"event": "put", "key": "a", "value": 1, "rev": 1, "version": 1, "created": 1, "term": 1, "at": 1001},
        {"event": "put", "key": "b", "value": [2], "rev": 2, "version": 1, "created": 2, "term": 1, "at": 1001},
        {"event": "put", "key": "a", "value": 3, "rev": 3, "version": 2, "created": 1, "term": 4, "at": 1003},
        {"event": "delete", "key": "b", "rev": 3, "term": 4, "at": 1003},
    ]
    assert (reply["more"], reply["oldest"], reply["rev"]) == (False, 1, 3)
    assert book.ask(op="history", reverse=True)["changes"] == reply["changes"][::-1]
    assert [c["rev"] for c in book.ask(op="history", key="a")["changes"]] == [1, 3]
    assert [c["rev"] for c in book.ask(op="history", key="b", to=2)["changes"]] == [2]
    assert [c["rev"] for c in book.ask(op="history", prefix="", **{"from": 3})["changes"]] == [3, 3]
    assert book.ask(op="history", **{"from": 99})["changes"] == []


def test_a_page_of_history_never_splits_a_revision() -> None:
    book = Book()
    book.apply(put("a"))
    book.apply(both(*[put(f"k{i}") for i in range(5)]))
    book.apply(put("z"))
    first = book.ask(op="history", limit=2)
    assert ([c["rev"] for c in first["changes"]], first["more"]) == ([1, 2, 2, 2, 2, 2], True)
    rest = book.ask(op="history", limit=2, **{"from": 3})
    assert ([c["rev"] for c in rest["changes"]], rest["more"]) == ([3], False)
    back = book.ask(op="history", limit=1, reverse=True)
    assert ([c["rev"] for c in back["changes"]], back["more"]) == ([3], True)


def test_a_page_of_history_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddb.chronicle.SCAN_BYTES_MAX", 1000)
    book = Book()
    for _ in range(5):
        book.apply(put("a", "v" * 600))
    reply = book.ask(op="history")
    assert (len(reply["changes"]), reply["more"]) == (2, True)


def test_history_from_before_what_is_kept_is_compacted() -> None:
    book = Book(Retention(entries=2))
    for i in range(5):
        book.apply(put("a", i))
    with pytest.raises(Compacted) as caught:
        book.ask(op="history", **{"from": 3})
    assert caught.value.fields == {"oldest": 4}
    reply = book.ask(op="history")
    assert ([c["value"] for c in reply["changes"]], reply["oldest"]) == ([3, 4], 4)


def test_memory_is_bounded_by_bytes() -> None:
    book = Book(Retention(entries=1000, bytes=20 * (CHANGE_BYTES + 1100)))
    for _ in range(200):
        book.apply(put("a", "v" * 1000))
        assert book.chronicle._bytes <= book.chronicle.retention.bytes
    assert 180 <= book.chronicle.floor < 200


def test_a_batch_larger_than_the_bound_is_kept_alone() -> None:
    book = Book(Retention(entries=1000, bytes=100))
    book.apply(put("a", "v" * 5000))
    book.apply(put("b", "v" * 5000))
    assert [record[1] for record in book.chronicle.records(book.chronicle.floor)] == ["b"]


def test_with_nothing_retained_nothing_is_told() -> None:
    book = Book(Retention(entries=0))
    pages: list[Any] = []
    book.chronicle.on_page = pages.append
    book.apply(put("a"))
    assert book.chronicle.floor == 1 and len(pages) == 1, "who is live gets it all the same"


def state_of(book: Book, key: str, rev: int) -> dict[str, Any]:
    states = [state for index, state in sorted(book.states.items()) if index <= rev]
    row = states[-1].get(key)
    found = row is not None
    value, changed, created, version = (None, 0, 0, 0) if row is None else (wire.decode_value(row[0]), *row[1:4])
    shown = {"found": found, "key": key, "value": value, "rev": changed, "created": created, "version": version}
    return {"ok": True, **shown}


def test_a_key_is_told_as_it_was_at_a_revision() -> None:
    book = Book()
    for request in (put("a", 1), put("b", 2), put("a", 3), delete("a"), put("a", 4)):
        book.apply(request)
    for rev in range(6):
        for key in ("a", "b", "c"):
            assert book.ask(op="get", key=key, rev=rev) == state_of(book, key, rev), (key, rev)
    with pytest.raises(BadRequest, match="the last one is 5"):
        book.ask(op="get", key="a", rev=6)


def test_what_was_before_the_kept_part_is_told_only_where_it_is_known() -> None:
    book = Book(Retention(entries=3))
    for request in (put("a", 1), put("old", 2), put("x", 3), put("a", 4), put("new", 5), delete("x")):
        book.apply(request)
    assert book.chronicle.floor == 3
    assert book.ask(op="get", key="old", rev=2)["value"] == 2, "it is the same to this day"
    assert book.ask(op="get", key="old", rev=5)["value"] == 2
    assert book.ask(op="get", key="new", rev=3)["found"] is False, "it was created later"
    assert book.ask(op="get", key="never", rev=4)["found"] is False
    for key, known_from in (("a", 4), ("x", 6)):
        with pytest.raises(Compacted) as caught:
            book.ask(op="get", key=key, rev=3)
        assert caught.value.fields == {"oldest": known_from}
        book.ask(op="get", key=key, rev=known_from)
    with pytest.raises(Compacted):
        book.ask(op="get", key="never", rev=2)


requests = st.one_of(
    st.builds(put, st.sampled_from(KEYS), st.integers(0, 9)),
    st.builds(delete, st.sampled_from(KEYS)),
    st.lists(
        st.one_of(st.builds(put, st.sampled_from(KEYS)), st.builds(delete, st.sampled_from(KEYS))), max_size=4
    ).map(lambda some: both(*some)),
)


@given(st.lists(st.lists(requests, min_size=1, max_size=3), max_size=12), st.integers(0, 8))
@settings(deadline=None)
def test_the_chronicle_in_memory_is_the_list_of_all_changes(batches: list[list[dict[str, Any]]], entries: int) -> None:
    book = Book(Retention(entries))
    for batch in batches:
        book.apply(*batch)
        book.check()
        kept = {record[0] for record in book.all if record[0] > book.machine.applied - entries}
        assert kept <= {record[0] for record in book.chronicle.records(book.chronicle.floor)}


@given(st.lists(st.lists(requests, min_size=1, max_size=1), min_size=1, max_size=15), st.integers(0, 12))
@settings(deadline=None)
def test_a_get_at_a_revision_is_the_state_of_then_or_compacted(
    batches: list[list[dict[str, Any]]], entries: int
) -> None:
    book = Book(Retention(entries))
    for batch in batches:
        book.apply(*batch)
    for rev in range(book.machine.applied + 1):
        for key in KEYS:
            try:
                assert book.ask(op="get", key=key, rev=rev) == state_of(book, key, rev)
            except Compacted:
                assert book.chronicle.floor > 0


# ----------------------------------------------------------------- on disk


steps = st.one_of(
    st.lists(requests, min_size=1, max_size=3), st.sampled_from(["checkpoint", "checkpoint", "fails", "restart"])
)


@given(st.lists(steps, max_size=25), st.integers(0, 10))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_chronicle_on_disk_and_in_memory_is_the_list_of_all_changes(
    tmp_path_factory: pytest.TempPathFactory, small_pages: None, script: list[Any], entries: int
) -> None:
    book = StoredBook(tmp_path_factory.mktemp("book") / "store.db", Retention(entries))
    try:
        for step in script:
            if step == "checkpoint":
                book.checkpoint()
            elif step == "fails":
                book.checkpoint(fails=True)
            elif step == "restart":
                before = book.chronicle.floor if book.table.history_floor == book.chronicle.floor else None
                book.restart()
                assert before is None or book.chronicle.floor <= max(before, book.machine.applied - entries)
            else:
                book.apply(*step)
            book.check()
            assert book.chronicle.floor <= max(0, book.machine.applied - min(entries, 1)) or entries == 0
        book.checkpoint()
        book.table.verify()
    finally:
        book.table.close()


@pytest.fixture
def stored(tmp_path: Path, small_pages: None) -> Iterator[StoredBook]:
    book = StoredBook(tmp_path / "store.db", Retention(entries=10))
    yield book
    book.table.close()


def test_at_least_the_last_entries_are_kept_through_checkpoints_and_restarts(stored: StoredBook) -> None:
    chance = random.Random(5)
    for i in range(200):
        stored.apply(put(chance.choice(KEYS), i))
        if chance.random() < 0.1:
            stored.checkpoint()
        if chance.random() < 0.05:
            stored.restart()
        assert stored.chronicle.floor <= max(0, stored.machine.applied - 10)
        stored.check()
    stored.checkpoint()
    assert 10 <= stored.table.meta.kept.count <= 12 and stored.chronicle.floor == 190


def test_a_revision_is_never_split_between_file_and_memory(stored: StoredBook) -> None:
    stored.apply(both(put("a", 1), put("b", 2), delete("a"), put("ab", 3), put("ac", 4), delete("ab")))
    stored.checkpoint()
    stored.check()
    stored.apply(both(put("a", 3), delete("a"), put("a", 4)))
    stored.restart()
    stored.check()
    assert [(c["event"], c["rev"]) for c in stored.ask(op="history", key="a")["changes"]] == [
        ("put", 1), ("delete", 1), ("put", 2), ("delete", 2), ("put", 2),
    ]  # fmt: skip


def test_what_the_file_keeps_is_bounded_by_bytes(tmp_path: Path) -> None:
    book = StoredBook(tmp_path / "store.db", Retention(entries=1000, bytes=10_000))
    for _ in range(10):
        for _ in range(5):
            book.apply(put("a", "v" * 800))
        book.checkpoint()
        assert book.table.meta.kept.count <= 12
        assert book.chronicle.floor < book.machine.applied
        book.check()
    book.table.close()
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        (size,) = connection.execute("SELECT sum(length(CAST(changes AS BLOB))) FROM history").fetchone()
    assert 7_000 < size <= 10_000


def test_a_gap_makes_the_file_count_no_more(stored: StoredBook) -> None:
    stored.apply(put("a"))
    stored.checkpoint()
    for _ in range(30):
        stored.apply(put("b"))
    assert stored.chronicle.floor == 21, "memory has forgotten what the file never had"
    stored.check()
    stored.checkpoint()
    stored.check()
    assert stored.table.meta.kept.floor == 21
    stored.restart()
    stored.check()
    assert stored.chronicle.floor == 21


def test_who_reads_while_a_checkpoint_drops_the_oldest_is_told(stored: StoredBook) -> None:
    for i in range(10):
        stored.apply(put("a", i))
    stored.checkpoint()
    for i in range(10):
        stored.apply(put("b", i))
    begun = stored.begin()
    records = stored.chronicle.records(0)
    assert next(records)[0] == 1
    begun.write()  # a worker has; the loop does not know yet
    assert [next(records)[0] for _ in range(2)] == [2, 3], "one chapter was read in one go"
    with pytest.raises(Compacted) as caught:
        next(records)
    assert caught.value.fields == {"oldest": 11}
    stored.table.finish_checkpoint(begun)
    stored.check()


def test_a_copy_carries_the_history(stored: StoredBook, tmp_path: Path) -> None:
    for i in range(5):
        stored.apply(put("a", i))
    stored.checkpoint()
    copied = snapshot.copy(stored.table.disk, stored.table.path, tmp_path / "copy.db")
    assert snapshot.check_copy(stored.table.disk, copied.path).kept.count == 5
    with Store.open(tmp_path / "other.db") as other:
        chronicle = Chronicle(0, Retention(), other)
        other.install(copied.path)
        chronicle.reset(other.meta.applied, other)
        assert chronicle.oldest == 1
        assert list(chronicle.records(0)) == stored.all


def test_a_file_of_the_first_format_has_no_history(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with Store.open(path) as target:
        target.finish_checkpoint(_written(target.begin_checkpoint(7, 1, None)))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE history")
        connection.execute("DROP TABLE ledger")
        connection.execute("DELETE FROM meta WHERE name = 'history'")
        texts = dict(connection.execute("SELECT name, value FROM meta WHERE name != 'crc'"))
        texts["format"] = "1"
        texts["crc"] = snapshot._meta_checksum(texts)
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", texts.items())
        connection.commit()
    with Store.open(path) as target:
        assert Chronicle(7, Retention(), target).oldest == 8
        assert target.meta.format == "1" or target.meta.kept.floor == 7
        target.verify()


def _written(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.write()
    return checkpoint


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        (
            "UPDATE history SET changes = replace(changes, 'a', 'b') WHERE last = 3",
            "revisions 1 to 3 is not what was written",
        ),
        ("UPDATE history SET changes = NULL WHERE last = 3", "revisions 1 to 3 is not what was written"),
        ("UPDATE history SET changes = '' WHERE last = 3", "revisions 1 to 3 is not what was written"),
        ("UPDATE history SET first = 0 WHERE last = 3", "revisions 0 to 3 is not what was written"),
        ("UPDATE history SET first = 1.5 WHERE last = 3", "revisions 1.5 to 3 is not what was written"),
        ("UPDATE history SET last = 2 WHERE last = 3", "revisions 1 to 2 is not what was written"),
        ("UPDATE history SET change_count = 9 WHERE last = 3", "revisions 1 to 3 is not what was written"),
        ("UPDATE history SET size_bytes = 'x' WHERE last = 3", "revisions 1 to 3 is not what was written"),
        ("DELETE FROM history WHERE last = 3", "holds 2 sound changes, but not the 5"),
        ("DELETE FROM history", "holds 0 sound changes, but not the 5"),
    ],
)
def test_a_damaged_history_is_refused(stored: StoredBook, statement: str, part: str) -> None:
    for i in range(5):
        stored.apply(put("a", i))
    stored.checkpoint()
    stored.table.close()
    with closing(sqlite3.connect(stored.path)) as connection:
        connection.execute(statement)
        connection.commit()
    with pytest.raises(CorruptStore) as caught:
        Store.open(stored.path)
    assert part in caught.value.message
    stored.path.unlink()
    stored._open()


def test_damage_met_by_a_reader_ends_what_the_file_has_to_tell_and_nothing_else(stored: StoredBook) -> None:
    for i in range(8):
        stored.apply(put("a", i))
    stored.checkpoint()
    stored.restart()
    stored.apply(put("b", "new"))
    with closing(sqlite3.connect(stored.path)) as connection:
        connection.execute("UPDATE history SET changes = replace(changes, 'a', 'b') WHERE last = 6")
        connection.commit()
    told: list[Record] = []
    with pytest.raises(Compacted) as caught:
        told.extend(stored.chronicle.records(0))
    assert caught.value.fields == {"oldest": 9}
    assert [record[0] for record in told] == [1, 2, 3], "whole chapters that are sound"
    assert [c["value"] for c in stored.ask(op="history")["changes"]] == ["new"]
    assert stored.table.row("a") is not None
    stored.checkpoint()  # the damaged part goes
    stored.restart()
    stored.check()


def test_plain_sqlite_shows_who_wrote_what(stored: StoredBook) -> None:
    stored.apply(both(put("a", {"b": 1}), delete("a")))
    stored.checkpoint()
    with closing(sqlite3.connect(stored.path)) as connection:
        rows = connection.execute("SELECT last, first, change_count, size_bytes, changes FROM history").fetchall()
    changes = '@1 1001\n1 1 1 0 "a"\t{"b":1}\n1 0 "a"'
    assert rows == [(1, 1, 2, len(changes), changes)]


@pytest.mark.parametrize("revisions", [(3, 6), (6, 7), (5, 5)], ids=["overlaps", "behind the state", "twice"])
def test_a_sound_chapter_in_a_place_that_is_not_its_own_is_refused(
    stored: StoredBook, revisions: tuple[int, int]
) -> None:
    for i in range(5):
        stored.apply(put("a", i))
    stored.checkpoint()
    stored.table.close()
    first, last = revisions
    line = b'%d 1 1 0 "a"\t0'
    forged = annals._chapter(first, last, 2, [b"@1 1001", line % first, line % last])
    with closing(sqlite3.connect(stored.path)) as connection:
        connection.execute(annals.INSERT, forged)
        connection.commit()
    with pytest.raises(CorruptStore, match=rf"revision {first} has no place|changes, but not the 5"):
        Store.open(stored.path)
    stored.path.unlink()
    stored._open()


ODD_KEYS = ["a", "a\n", "ä", "\U0001f600", '"', "\\", "a\tb", "a ", "@", " ", "\x00", "a\x00", "\x7f", "\u2028"]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_key_is_found_again_whatever_it_holds(stored: StoredBook, key: str) -> None:
    stored.retention = Retention()
    stored.restart()
    for other in ODD_KEYS:
        stored.apply(both(put(other, f'{key} "{other}"'), put("z", [other, "\n\t"])))
    stored.apply(delete(key))
    stored.checkpoint()
    stored.restart()
    stored.check()
    assert [c["event"] for c in stored.ask(op="history", key=key)["changes"]] == ["put", "delete"]
    assert [c["event"] for c in stored.ask(op="history", prefix=key, reverse=True)["changes"] if c["key"] == key] == [
        "delete", "put",
    ]  # fmt: skip


# ----------------------------------------------------------- older formats


def make_format_2(book: StoredBook) -> None:
    """Have the last checkpoint's file say the same as one that a version before would have written; the book is closed."""
    records = list(book.chronicle.records(book.chronicle.floor))
    book.table.close()
    rows: list[tuple[Any, ...]] = []
    for rev, key, row, client, term, at_ms in records:
        n = 1 + rows[-1][1] if rows and rows[-1][0] == rev else 0
        value, _, created, version, crc = row or (None, 0, 0, 0, 0)
        crc = zlib.crc32(b"\n%d %d %b\n%d %d %d" % (rev, n, key.encode(), client, term, at_ms), crc)
        rows.append(
            (rev, n, key, None if value is None else value.decode(), created, version, client, term, at_ms, crc)
        )
    with closing(sqlite3.connect(book.path)) as connection:
        connection.execute("DROP TABLE history")
        connection.execute(snapshot.HISTORY_2)
        connection.executemany("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        texts = dict(connection.execute("SELECT name, value FROM meta WHERE name != 'crc'"))
        kept = annals.Kept(book.chronicle.floor, len(rows), sum(row[-1] for row in rows))
        texts.update(format="2", history=kept.to_text())
        texts["crc"] = snapshot._meta_checksum(texts)
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", texts.items())
        connection.commit()
        connection.execute("PRAGMA journal_mode=DELETE")


def fill_for_migration(book: StoredBook) -> None:
    for i in range(8):
        book.apply(put("a", i), put(ODD_KEYS[i], {"i": i}), term=1 + i // 3)
    book.apply(both(put("a", 9), delete("b"), delete("a"), put("ä", None)), term=4)
    book.checkpoint()


def test_a_file_of_format_2_keeps_its_history(stored: StoredBook) -> None:
    fill_for_migration(stored)
    make_format_2(stored)
    stored._open()
    assert stored.table.meta.format == "3"
    assert stored.chronicle.floor == 6
    assert stored.table.meta.kept.count == len([record for record in stored.all if record[0] > 6])
    stored.check()
    stored.table.verify()
    stored.restart()
    stored.apply(put("b", 1))
    stored.checkpoint()
    stored.check()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE history SET value = '9' WHERE rev = 9",
        "UPDATE history SET key = x'ff' WHERE rev = 9",
        "UPDATE history SET at = 'x' WHERE rev = 9",
        "DELETE FROM history WHERE rev = 9",
        "DELETE FROM history",
    ],
)
def test_a_damaged_history_of_format_2_begins_anew(stored: StoredBook, statement: str) -> None:
    fill_for_migration(stored)
    make_format_2(stored)
    with closing(sqlite3.connect(stored.path)) as connection:
        connection.execute(statement)
        connection.commit()
    stored._open()
    assert stored.chronicle.floor == stored.machine.applied == 17
    assert stored.ask(op="history")["changes"] == []
    stored.apply(put("b", 1))
    stored.checkpoint()
    stored.restart()
    assert [c["rev"] for c in stored.ask(op="history")["changes"]] == [18]


def test_a_copy_of_format_2_from_a_leader_of_the_version_before_is_checked_and_installed(
    stored: StoredBook, tmp_path: Path
) -> None:
    fill_for_migration(stored)
    make_format_2(stored)
    stored.path.rename(tmp_path / "received.db")
    stored._open()
    assert snapshot.check_copy(stored.table.disk, tmp_path / "received.db").format == "2"
    stored.table.install(tmp_path / "received.db")
    assert (stored.table.meta.format, stored.table.history_floor, stored.table.history_last) == ("3", 6, 17)
    assert list(stored.table.history(6, 17)) == [record for record in stored.all if record[0] > 6]


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "history", "key": "a", "prefix": "b"},
        {"op": "history", "key": 1},
        {"op": "history", "key": ""},
        {"op": "history", "limit": 0},
        {"op": "history", "limit": 1001},
        {"op": "history", "limit": True},
        {"op": "history", "reverse": 1},
        {"op": "history", "from": -1},
        {"op": "history", "to": "x"},
        {"op": "history", "from": 1 << 63},
        {"op": "get", "key": "a", "rev": -1},
        {"op": "get", "key": "a", "rev": None},
        {"op": "get", "rev": 1},
    ],
)
def test_a_wrong_question_about_the_past_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        past.prepare(request_)


@pytest.mark.parametrize(
    "request_",
    [{}, {"key": "a", "prefix": "b"}, {"key": ""}, {"key": 1}, {"prefix": []}, {"key": "a", "from": 1.5}, {"prefix": "", "from": True}],
)  # fmt: skip
def test_a_wrong_watch_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        past.prepare_watch({"op": "watch", **request_})


def test_a_key_too_long_to_exist_is_not_watched() -> None:
    with pytest.raises(TooLarge):
        past.prepare_watch({"op": "watch", "key": "k" * 5000})


def test_a_get_within_a_transaction_takes_no_revision() -> None:
    for field in ("then", "else"):
        with pytest.raises(BadRequest, match="sees what is there now"):
            commands.prepare({"op": "txn", field: [{"op": "get", "key": "a", "rev": 1}]})
