"""raftlog against a plain list of batches: whatever is done to both, they answer alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ddb.errors import InvariantError
from ddb.messages import Batch
from ddb.raftlog import RaftLog

HELD_MAX = 60


class Model(RuleBasedStateMachine):
    """A RaftLog, the list that it should be, and the disk that it reads back from."""

    def __init__(self) -> None:
        super().__init__()
        self.disk: dict[int, bytes] = {}
        self.log = RaftLog(self.disk.__getitem__, bytes_max=HELD_MAX)
        self.base = (0, 0)
        self.list: list[Batch] = []
        self.made = 0

    # --- what the list says

    @property
    def last(self) -> tuple[int, int]:
        return (self.list[-1].last, self.list[-1].term) if self.list else self.base

    @property
    def ends(self) -> list[int]:
        return [self.base[0], *(b.last for b in self.list)]

    def holder(self, index: int) -> Batch:
        return next(b for b in self.list if b.first <= index <= b.last)

    # --- what is done to both

    @rule(count=st.integers(1, 4), later=st.sampled_from([0, 0, 0, 1, 3]), size=st.integers(20, 40))
    def append(self, count: int, later: int, size: int) -> None:
        first, term = self.last[0] + 1, self.last[1] + later
        self.made += 1  # so that no two batches ever have the same bytes
        batch = Batch(first, first + count - 1, term, b"%0*d" % (size, self.made), 0, [["noop"]] * count)
        self.disk[first] = batch.data
        self.list.append(batch)
        self.log.append(batch)

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.list) - 1))
        self.log.truncate(self.list[position].first)
        del self.list[position:]

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, self.last[0] + 1))
        gone = [b for b in self.list if b.last <= index]
        self.log.compact(index)
        if gone:
            self.base = (gone[-1].last, gone[-1].term)
            del self.list[: len(gone)]

    @rule(further=st.integers(0, 5), later=st.integers(0, 2))
    def reset(self, further: int, later: int) -> None:
        self.base = (self.last[0] + further, self.last[1] + later)
        self.list = []
        self.log.reset(*self.base)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        durable = data.draw(st.sampled_from(self.ends))
        self.log.release(durable)
        held = [b for b in self.log.batches() if b.data]
        # As much is let go as may be; and the oldest, so that what is held is a tail.
        assert sum(len(b.data) for b in held) <= HELD_MAX or held[0].last > durable
        assert all((b.commands is None) == (not b.data) for b in self.log.batches())
        assert held == self.log.batches()[len(self.log.batches()) - len(held) :]

    @rule()
    def restart(self) -> None:
        self.log = RaftLog(self.disk.__getitem__, *self.base, self.list, bytes_max=HELD_MAX)

    # --- what both say

    @invariant()
    def the_ends_are_the_same(self) -> None:
        assert (self.log.base_index, self.log.base_term) == self.base
        assert (self.log.last_index, self.log.last_term) == self.last

    @invariant()
    def every_batch_is_found_with_its_bytes(self) -> None:
        assert [(b.first, b.last, b.term) for b in self.log.batches()] == [(b.first, b.last, b.term) for b in self.list]
        for batch in self.list:
            assert self.log.bytes_of(batch.first) == batch.data
            for index in range(batch.first, batch.last + 1):
                found = self.log.batch_at(index)
                assert (found.first, found.last, found.term) == (batch.first, batch.last, batch.term)
                assert self.log.begin_at(index) == batch.first
        assert self.log.begin_at(self.last[0] + 1) == self.last[0] + 1

    @invariant()
    def every_index_has_its_term(self) -> None:
        for index in range(self.last[0] + 3):
            if index == self.base[0]:
                expected: int | None = self.base[1]
            elif self.base[0] < index <= self.last[0]:
                expected = self.holder(index).term
            else:
                expected = None
            assert self.log.term_at(index) == expected

    @invariant()
    def runs_of_a_term_begin_and_end_where_they_do(self) -> None:
        for batch in self.list:
            run = [b for b in self.list if b.term == batch.term]
            assert self.log.term_begin(batch.last) == run[0].first
        for term in {t for b in self.list for t in (b.term, b.term + 1)} | {self.base[1], 0}:
            for upto in range(self.last[0] + 2):
                ends = [b.last for b in self.list if b.term == term and b.last <= upto]
                if not ends and self.base[1] == term and self.base[0] <= upto:
                    ends = [self.base[0]]
                assert self.log.term_end(term, upto) == (ends[-1] if ends else None), (term, upto)

    @invariant()
    def what_follows_an_index_follows(self) -> None:
        for index in self.ends:
            behind = [b for b in self.list if b.first > index]
            assert self.log.count_after(index) == len(behind)
            assert [b.first for b in self.log.batches(index)] == [b.first for b in behind]
            for bytes_max in (1, 30, 1000):
                sent = self.log.after(index, bytes_max)
                assert sent == behind[: len(sent)]  # with all their bytes, wherever they come from
                assert sent or not behind
                assert sum(len(b.data) for b in sent[:-1]) < bytes_max
                assert len(sent) == len(behind) or sum(len(b.data) for b in sent) >= bytes_max
            for upto in self.ends:
                expected = [b.first for b in self.list if index < b.first <= upto]
                assert [b.first for b in self.log.span(index, upto)] == expected


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestRaftLogIsAListOfBatches = Model.TestCase


def log_of(*batches: Batch, base: tuple[int, int] = (0, 0), bytes_max: int = 1 << 20) -> RaftLog:
    return RaftLog({b.first: b.data for b in batches}.__getitem__, *base, batches, bytes_max)


A, B, C = Batch(1, 3, 1, b"aaaa"), Batch(4, 4, 2, b"bbbb"), Batch(5, 9, 2, b"cccc")


@pytest.mark.parametrize("batch", [Batch(5, 5, 2, b"x"), Batch(3, 3, 2, b"x"), Batch(6, 6, 2, b"x")])
def test_batches_adjoin(batch: Batch) -> None:
    log = log_of(A) if batch.first != 6 else log_of(A, B)
    with pytest.raises(InvariantError, match="right after"):
        log.append(batch)


def test_terms_never_go_back() -> None:
    with pytest.raises(InvariantError, match="never go back"):
        log_of(A, B).append(Batch(5, 5, 1, b"x"))
    with pytest.raises(InvariantError, match="never go back"):
        log_of(base=(9, 4)).append(Batch(10, 10, 3, b"x"))


@pytest.mark.parametrize("first", [2, 3, 6])
def test_no_batch_is_cut_in_two(first: int) -> None:
    with pytest.raises(InvariantError, match="between two batches"):
        log_of(A, B, C).truncate(first)


@pytest.mark.parametrize("index", [0, 3, 10])
def test_what_is_not_here_is_not_handed_out(index: int) -> None:
    log = log_of(B, C, base=(3, 1))
    for look in (log.batch_at, log.bytes_of, log.term_begin, log.truncate):
        with pytest.raises(InvariantError, match="in the log"):
            look(index)


def test_a_compaction_inside_a_batch_keeps_it_whole() -> None:
    log = log_of(A, B, C)
    log.compact(7)
    assert (log.base_index, log.base_term, log.batches()) == (4, 2, [C])


def test_old_bytes_are_let_go_and_read_back() -> None:
    log = log_of(A, B, C, bytes_max=4)
    log.release(9)
    assert [b.data for b in log.batches()] == [b"", b"", b"cccc"]
    assert log.let_go == 4
    assert [b.data for b in log.after(0, 100)] == [b"aaaa", b"bbbb", b"cccc"]


def test_bytes_that_are_not_yet_durable_are_kept() -> None:
    log = log_of(A, B, C, bytes_max=0)
    log.release(3)
    assert [b.data for b in log.batches()] == [b"", b"bbbb", b"cccc"]


@pytest.mark.parametrize(
    "forget", [lambda log: log.truncate(1), lambda log: log.reset(0, 0)], ids=["truncate", "reset"]
)
def test_after_a_cut_new_bytes_are_let_go_like_any_others(forget: Callable[[RaftLog], None]) -> None:
    log = log_of(A, B, C, bytes_max=4)
    log.release(9)
    forget(log)
    for batch in (A, B):
        log.append(batch)
    log.release(9)
    assert [b.data for b in log.batches()] == [b"", b"bbbb"]
