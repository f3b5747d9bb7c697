"""Watchers against a brute-force filter of everything that happened, whatever their connections take, and when."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import streams, watchers, wire
from ddb.chronicle import Chronicle, Retention
from ddb.errors import BadRequest, Compacted, DdbError, NoLeader, ShuttingDown
from ddb.kv import Machine, MemoryTable
from ddb.streams import FRAMES, LINES, SSE, Dress, Event, Stream
from ddb.watchers import PROGRESS_S, Watching
from ddb.watches import Watches
from tests.test_chronicle import KEYS, batch_of, both, delete, put, requests

# --------------------------------------------------------------- the index

NAMES = ["", "a", "ab", "abc", "b", "é", "é€", "a\0"]


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from(NAMES)), max_size=12),
    st.lists(st.integers(0, 11), max_size=6),
    st.lists(st.text(alphabet="abcé€\0", max_size=5), min_size=1, max_size=8),
)
def test_the_index_finds_whom_a_search_through_all_would(
    added: list[tuple[bool, str]], removed: list[int], keys: list[str]
) -> None:
    index: Watches[int] = Watches()
    there = dict(enumerate(added))
    for number, (prefix, name) in there.items():
        index.add(number, name, prefix=prefix)
    for number in removed:
        if number in there:
            prefix, name = there.pop(number)
            index.remove(number, name, prefix=prefix)
    for key in [*keys, *NAMES]:
        wanted = [n for n, (prefix, name) in there.items() if (key.startswith(name) if prefix else key == name)]
        assert sorted(index.find(key)) == wanted
    assert bool(index) is bool(there)


def test_an_index_that_was_emptied_holds_nothing() -> None:
    index: Watches[int] = Watches()
    for i in range(100):
        index.add(i, "k" * i, prefix=bool(i % 2))
    for i in range(100):
        index.remove(i, "k" * i, prefix=bool(i % 2))
    assert not index and not index._keys and not index._prefixes and not index._lengths and not index._counts


# ------------------------------------------------------------------- dress


def test_an_event_is_dressed_once_for_each_dialect() -> None:
    made: list[bool] = []

    def show(event: Event, last: bool) -> bytes:
        made.append(last)
        return event.body

    event, dress = Event(b"put", b"{}", 5), Dress("test", show)
    assert event.dressed(dress, True) is event.dressed(dress, True)
    event.dressed(dress, False)
    assert made == [True, False]


def test_only_the_last_event_of_a_revision_carries_its_id() -> None:
    events = [Event(b"put", b'{"n":%d}' % n, rev) for n, rev in enumerate((3, 3, 4))]
    carrier = Carrier()
    Stream(carrier, SSE).send(events)
    assert b"".join(carrier.sent) == (
        b'event: put\ndata: {"n":0}\n\nevent: put\nid: 3\ndata: {"n":1}\n\nevent: put\nid: 4\ndata: {"n":2}\n\n'
    )


def test_an_event_in_each_dialect() -> None:
    event = Event(b"error", b'{"event":"error"}', None)
    assert event.dressed(FRAMES, True) == b'17\n{"event":"error"}\n'
    assert event.dressed(LINES, True) == b'{"event":"error"}\n'
    assert event.dressed(SSE, True) == b'event: error\ndata: {"event":"error"}\n\n'


# ---------------------------------------------------------------- watchers


class Carrier:
    """A connection that takes output only when the test drains it."""

    def __init__(self) -> None:
        self.sock: object | None = object()
        self.slots: list[Any] = []
        self.sent: list[bytes] = []
        self.waiting: list[int] = []
        self.closing = False
        self.stream: Stream | None = None
        self.on_close: Callable[[], None] | None = None
        self.most_bytes = 0

    @property
    def output_bytes(self) -> int:
        return sum(self.waiting)

    def send(self, data: bytes) -> None:
        assert not self.closing, "nothing is sent behind the end"
        self.sent.append(data)
        self.waiting.append(len(data))
        self.most_bytes = max(self.most_bytes, self.output_bytes)

    def mark_dirty(self) -> None:
        pass

    def close_when_flushed(self) -> None:
        self.closing = True

    def drain(self, pieces: int | None = None) -> None:
        """The client takes some pieces of the output (None: all, until nothing more comes)."""
        while True:
            del self.waiting[: len(self.waiting) if pieces is None else pieces]
            if self.stream is None or self.sock is None or not self.stream.is_ready:
                return
            self.stream.told_of_room()
            if pieces is not None:
                return

    def events(self) -> list[dict[str, Any]]:
        """All that was sent, as JSON."""
        cutter = wire.FrameBuffer(1 << 30)
        return [json.loads(payload) for payload in cutter.feed(b"".join(self.sent))]


class FakeSlot:
    """A request's place, whose reply opens a stream or fails."""

    def __init__(self) -> None:
        self.connection = Carrier()
        self.deadline = 5.0
        self.error: DdbError | None = None
        self.first: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or self.first is not None

    def open(self, body: bytes, rev: int) -> Stream:
        self.first = json.loads(body)
        assert self.first is not None and self.first["rev"] == rev
        self.connection.stream = Stream(self.connection, FRAMES)
        return self.connection.stream

    def fail(self, error: DdbError) -> None:
        self.error = error


class Node:
    """A machine with watchers, and what its replica would say."""

    def __init__(self, retention: Retention | None = None) -> None:
        self.table = MemoryTable()
        self.machine = Machine(self.table)
        self.chronicle = Chronicle(0, retention)
        self.machine.on_changes = self._take
        self.replica = SimpleNamespace(machine=self.machine, diverged=False, read=self._read)
        self.now = 0.0
        self.reads: list[Any] = []
        self.all: list[dict[str, Any]] = []
        self.watching = Watching(self.replica, self.chronicle, lambda: self.now)  # type: ignore[arg-type]

    def _take(self, batch: Any, changes: list[Any]) -> None:
        for rev, key, row, _, _ in changes:
            if row is None:
                self.all.append({"event": "delete", "key": key, "rev": rev})
            else:
                value = json.loads(row[0])
                self.all.append({"event": "put", "key": key, "value": value, "rev": rev, "version": row[3]})
        self.chronicle.take(batch, changes)

    def _read(self, command: Any, waiter: Any) -> None:
        self.reads.append(waiter)

    def confirm(self) -> None:
        reads, self.reads = self.reads, []
        for waiter in reads:
            waiter.reply(b'{"ok":true,"count":0,"rev":0}')

    def apply(self, *requests: dict[str, Any]) -> None:
        self.machine.apply_batch(batch_of(self.machine.applied + 1, list(requests)))

    def watch(self, **request: Any) -> FakeSlot:
        slot = FakeSlot()
        try:
            self.watching.watch({"op": "watch", **request}, slot)  # type: ignore[arg-type]
        except DdbError as error:
            slot.fail(error)
        return slot

    def wanted(self, after: int, key: str | None = None, prefix: str | None = None) -> list[dict[str, Any]]:
        return [
            event for event in self.all
            if event["rev"] > after
            and (event["key"] == key if prefix is None else event["key"].startswith(prefix))
        ]  # fmt: skip


def changes(slot: FakeSlot) -> list[dict[str, Any]]:
    return [event for event in slot.connection.events() if event["event"] in ("put", "delete")]


def test_a_watch_without_from_begins_where_the_confirmation_finds_the_node() -> None:
    node = Node()
    node.apply(put("a", 1))
    slot = node.watch(key="a")
    assert not slot.done
    node.apply(put("a", 2))
    node.confirm()
    assert slot.first == {"ok": True, "watch": True, "rev": 2}
    node.apply(put("a", 3))
    node.watching.turn()
    slot.connection.drain()
    assert [event["value"] for event in changes(slot)] == [3]


def test_a_watch_from_a_revision_begins_at_once_and_includes_it() -> None:
    node = Node()
    for i in range(5):
        node.apply(put("a", i))
    slot = node.watch(key="a", **{"from": 3})
    assert slot.first == {"ok": True, "watch": True, "rev": 2}
    slot.connection.drain()
    assert [event["rev"] for event in changes(slot)] == [3, 4, 5]


def test_a_watch_from_a_revision_to_come_tells_nothing_before_it() -> None:
    node = Node()
    slot = node.watch(prefix="", **{"from": 4})
    slot.connection.drain()
    node.watching.tick(node.now + PROGRESS_S)
    for i in range(5):
        node.apply(put("a", i))
    node.watching.turn()
    assert [(event["event"], event["rev"]) for event in slot.connection.events()] == [
        ("progress", 3), ("put", 4), ("put", 5),
    ]  # fmt: skip


def test_what_is_gone_is_compacted_with_the_oldest() -> None:
    node = Node(Retention(entries=2))
    for i in range(5):
        node.apply(put("a", i))
    slot = node.watch(key="a", **{"from": 3})
    assert isinstance(slot.error, Compacted) and slot.error.fields == {"oldest": 4}
    assert node.watch(key="a", **{"from": 4}).first is not None


def test_a_watch_is_refused_while_the_data_is_being_replaced_and_while_the_node_leaves() -> None:
    node = Node()
    node.replica.diverged = True
    assert isinstance(node.watch(key="a", **{"from": 1}).error, NoLeader)
    node.replica.diverged = False
    node.watching.leave()
    assert isinstance(node.watch(key="a", **{"from": 1}).error, ShuttingDown)
    assert isinstance(node.watch(**{"from": 1}).error, BadRequest)


def test_a_connection_that_is_gone_before_the_confirmation_is_no_watcher() -> None:
    node = Node()
    slot = node.watch(key="a")
    slot.connection.sock = None
    node.confirm()
    assert slot.first is None and repr(node.watching) == "0 watchers"


def test_nothing_is_sent_before_the_replies_that_come_first() -> None:
    node = Node()
    slot = node.watch(key="a", **{"from": 1})
    slot.connection.slots.append("an earlier request")
    for i in range(3):
        node.apply(put("a", i))
        node.watching.turn()
        node.now += PROGRESS_S
        node.watching.tick(node.now)
    slot.connection.drain()
    assert not slot.connection.sent
    slot.connection.slots.clear()
    slot.connection.drain()
    assert [event["value"] for event in changes(slot)] == [0, 1, 2]


def test_changes_of_one_revision_come_together_and_in_order() -> None:
    node = Node()
    slot = node.watch(prefix="", **{"from": 1})
    node.apply(both(put("a", 1), put("b", 2), delete("a"), put("a", 3)))
    node.watching.turn()
    slot.connection.drain()
    assert changes(slot) == node.wanted(0, prefix="") and len(changes(slot)) == 4


def test_progress_comes_in_time_to_all_and_never_before_the_events() -> None:
    node = Node()
    slots = [node.watch(key=f"k{i % 3}", **{"from": 1}) for i in range(1000)]
    for slot in slots:
        slot.connection.drain()
    last = [0.0] * len(slots)
    told = [0] * len(slots)
    for tick in range(800):
        node.now += 0.025
        if tick % 7 == 0:
            node.apply(put("other", tick), put("k0", tick))
        node.watching.tick(node.now)
        for i, slot in enumerate(slots):
            connection = slot.connection
            connection.waiting.clear()
            sent, connection.sent = connection.sent, []
            for piece in sent:
                event = json.loads(piece.partition(b"\n")[2])
                assert event["rev"] >= told[i]
                told[i], last[i] = event["rev"], node.now
                if event["event"] == "progress":
                    assert event["rev"] <= node.machine.applied
            assert node.now - last[i] < 5.0
    at_once = sum(1 for at in last if at == node.now)
    assert at_once < 500, "they don't come all at once"


def test_a_slow_watcher_is_dropped_with_a_sentence_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_BYTES_MAX", 1000)
    monkeypatch.setattr(watchers, "STREAM_BYTES_MAX", 1000)
    monkeypatch.setattr(watchers, "BEHIND_BYTES_MAX", 5000)
    node = Node()
    slow, quick = (node.watch(prefix="", **{"from": 1}) for _ in range(2))
    for i in range(200):
        node.apply(put("a", "v" * 50))
        node.watching.turn()
        quick.connection.drain()
        if i < 3:
            slow.connection.drain()
    assert changes(quick) == node.all
    assert slow.connection.closing
    events = slow.connection.events()
    assert events[-1]["event"] == "error" and events[-1]["error"] == "overloaded"
    assert changes(slow) == node.all[: len(events) - 1] and 3 < len(events) < 60, "what it was told is right"
    assert slow.connection.most_bytes < 1500
    assert repr(node.watching) == "2 watchers"
    node.now += PROGRESS_S
    node.watching.tick(node.now)
    node.watching.tick(node.now)
    assert repr(node.watching) == "1 watchers"


def test_who_takes_the_past_as_fast_as_it_grows_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_BYTES_MAX", 1000)
    monkeypatch.setattr(watchers, "STREAM_BYTES_MAX", 1000)
    monkeypatch.setattr(watchers, "BEHIND_BYTES_MAX", 3000)
    node = Node()
    for _ in range(300):
        node.apply(put("a", "v" * 50))
    slot = node.watch(prefix="", **{"from": 1})
    for _ in range(500):
        node.apply(put("a", "v" * 50))
        node.watching.turn()
        slot.connection.drain(2)
    assert not slot.connection.closing
    slot.connection.drain()
    assert changes(slot) == node.all


def test_what_comes_while_there_is_no_room_is_told_when_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_BYTES_MAX", 200)
    monkeypatch.setattr(watchers, "STREAM_BYTES_MAX", 200)
    node = Node()
    slot = node.watch(key="a", **{"from": 1})
    slot.connection.drain()
    for _ in range(3):
        for i in range(20):
            node.apply(put("a", i))
            node.watching.turn()
        assert slot.connection.most_bytes < 300
        slot.connection.drain()
        node.apply(put("a", "live again"))
        node.watching.turn()
        slot.connection.drain()
    assert changes(slot) == node.all


def test_what_was_read_from_the_chronicle_is_not_handed_round_again() -> None:
    node = Node()
    slot = node.watch(key="a", **{"from": 1})
    node.apply(put("a", 1))
    slot.connection.drain()
    node.watching.turn()
    assert changes(slot) == node.all and len(node.all) == 1


def test_progress_waits_for_what_was_applied_in_this_turn() -> None:
    node = Node()
    slot = node.watch(key="a", **{"from": 1})
    slot.connection.drain()
    node.apply(put("a", 1))
    node.watching.tick(PROGRESS_S)
    assert [event["event"] for event in slot.connection.events()] == ["put", "progress"]


def test_a_turn_never_ends_within_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "RECORDS_A_TURN", 2)
    node = Node()
    for i in range(3):
        node.apply(put("a", i), both(*[put(f"k{j}", i) for j in range(5)]))
    slot = node.watch(prefix="", **{"from": 1})
    for _ in range(20):
        slot.connection.drain(1)
    assert changes(slot) == node.all and len(node.all) == 18


def test_a_watcher_that_the_chronicle_left_behind_is_dropped() -> None:
    node = Node(Retention(entries=5))
    slot = node.watch(key="a", **{"from": 1})
    for i in range(20):
        node.apply(put("a", i))
    node.watching.turn()
    slot.connection.drain()
    assert [event["event"] for event in slot.connection.events()] == ["error"]
    assert slot.connection.closing


def test_leaving_tells_what_was_applied_and_says_goodbye() -> None:
    node = Node()
    slot = node.watch(key="a", **{"from": 1})
    slot.connection.drain()
    node.apply(put("a", 1))
    node.watching.leave()
    assert [event["event"] for event in slot.connection.events()] == ["put", "error"]
    assert slot.connection.events()[-1]["error"] == "shutting_down" and slot.connection.closing


def test_who_is_gone_is_forgotten_and_the_chronicle_is_left_alone() -> None:
    node = Node()
    slots = [node.watch(prefix="a", **{"from": 1}) for _ in range(3)]
    for slot in slots:
        assert slot.connection.on_close is not None
        slot.connection.on_close()
    assert node.chronicle.on_page is None
    node.apply(put("a"))
    node.watching.turn()
    assert not any(slot.connection.sent for slot in slots)


def test_a_large_past_is_read_a_little_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "RECORDS_A_TURN", 10)
    node = Node()
    for i in range(100):
        node.apply(put("a" if i % 50 == 0 else "b", i))
    slot = node.watch(key="a", **{"from": 1})
    turns = 0
    while slot.connection.stream is not None and slot.connection.stream.is_ready:
        slot.connection.stream.told_of_room()
        turns += 1
    assert turns == 10 and changes(slot) == node.wanted(0, key="a")


# ------------------------------------------------- everything at once, by lot

names = st.sampled_from([*KEYS, "", "abcd"])
script_steps = st.one_of(
    st.tuples(st.just("apply"), st.lists(requests, min_size=1, max_size=3)),
    st.tuples(st.just("turn")),
    st.tuples(st.just("turn")),
    st.tuples(st.just("tick"), st.floats(0.0, 4.0)),
    st.tuples(st.just("watch"), st.booleans(), names, st.none() | st.integers(0, 30)),
    st.tuples(st.just("confirm")),
    st.tuples(st.just("drain"), st.integers(0, 5), st.none() | st.integers(1, 3)),
    st.tuples(st.just("gone"), st.integers(0, 5)),
    st.tuples(st.just("reset")),
)


@given(st.lists(script_steps, max_size=40), st.integers(0, 30), st.integers(40, 400), st.integers(1, 6))
@settings(deadline=None, max_examples=300)
def test_each_watcher_is_told_each_change_once_in_order_or_that_it_ends(
    script: list[Any], entries: int, room: int, a_turn: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "STREAM_BYTES_MAX", room)
        patch.setattr(watchers, "STREAM_BYTES_MAX", room)
        patch.setattr(watchers, "BEHIND_BYTES_MAX", 4 * room)
        patch.setattr(watchers, "RECORDS_A_TURN", a_turn)
        run(script, Node(Retention(entries)))


def run(script: list[Any], node: Node) -> None:
    slots: list[tuple[FakeSlot, dict[str, str]]] = []
    for step, *parts in script:
        if step == "apply":
            node.apply(*parts[0])
        elif step == "turn":
            node.watching.turn()
        elif step == "tick":
            node.now += parts[0]
            node.watching.tick(node.now)
        elif step == "watch":
            prefix, name, first = parts
            if prefix or name:
                what = {"prefix" if prefix else "key": name}
                slots.append((node.watch(**what, **({} if first is None else {"from": first})), what))
        elif step == "confirm":
            node.confirm()
        elif step == "reset":  # a snapshot of this very state is installed, without a past
            node.chronicle.reset(node.machine.applied)
        elif slots:
            slot, _ = slots[parts[0] % len(slots)]
            if step == "drain":
                slot.connection.drain(parts[1])
            elif slot.connection.on_close is not None:
                slot.connection.sock = None
                slot.connection.on_close()
                slot.connection.on_close = None
        for slot, what in slots:
            check(node, slot, what, at_end=False)
    node.confirm()
    node.watching.turn()
    for slot, what in slots:
        slot.connection.drain()
        check(node, slot, what, at_end=True)


def check(node: Node, slot: FakeSlot, what: dict[str, str], *, at_end: bool) -> None:
    if slot.first is None:
        assert not slot.connection.sent
        return
    wanted = node.wanted(slot.first["rev"], **what)
    told = changes(slot)
    assert told == wanted[: len(told)]
    ended = slot.connection.closing or slot.connection.sock is None
    if at_end and not ended:
        assert told == wanted
    place = 0
    for event in slot.connection.events():
        if event["event"] == "progress":
            assert all(one["rev"] > event["rev"] for one in wanted[place:]), "progress ahead of the events"
        elif event["event"] != "error":
            place += 1


def test_ten_thousand_watchers_cost_a_write_that_none_watches_a_few_looks() -> None:
    index: Watches[int] = Watches()
    chance = random.Random(1)
    for i in range(10_000):
        index.add(i, f"user/{chance.randrange(10**6)}" + "/" * (i % 5), prefix=bool(i % 2))
    looks = 0

    class Counting(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal looks
            looks += 1
            return super().get(key, default)

    index._keys, index._prefixes = Counting(index._keys), Counting(index._prefixes)
    assert index.find("order/77") == []
    assert looks <= 9
