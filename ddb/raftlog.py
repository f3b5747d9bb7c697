"""What a member remembers of the replicated log: which batch holds an index, and in which term.

Laws: batches are whole and adjoin; a suffix is only ever cut at a batch's first index; what lies at or below
`base_index` is in the snapshot and gone from here.

The batches' bytes are kept while they are young, because the followers ask for the newest ones again and again;
older bytes are let go (`bytes_max`) and read back through `fetch` for a follower that lags.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace

from ddb.errors import invariant
from ddb.messages import Batch


class RaftLog:
    """The batches after (`base_index`, `base_term`), in memory.

    `fetch(first)` returns the bytes of the batch that begins at `first`, from the disk. `bytes_max` bounds the
    bytes held here; only durable batches are let go.
    """

    def __init__(
        self,
        fetch: Callable[[int], bytes],
        base_index: int = 0,
        base_term: int = 0,
        batches: Iterable[Batch] = (),
        bytes_max: int = 64 << 20,
    ) -> None:
        self.base_index = base_index
        self.base_term = base_term
        self._fetch = fetch
        self._batches: list[Batch] = []
        self._firsts: list[int] = []
        self._bytes_max = bytes_max
        self._bytes_held = 0
        self._oldest_held = 0  # position of the first batch whose bytes are held
        self.last_index = base_index
        self.last_term = base_term
        for batch in batches:
            self.append(batch)

    def append(self, batch: Batch) -> None:
        """Add `batch`, which must begin right after the last index, in no earlier term."""
        invariant(batch.first == self.last_index + 1, "a batch begins right after the log's last entry")
        invariant(batch.term >= self.last_term, "terms never go back along the log")
        self._batches.append(batch)
        self._firsts.append(batch.first)
        self._bytes_held += len(batch.data)
        self.last_index = batch.last
        self.last_term = batch.term

    def truncate(self, first: int) -> None:
        """Forget the batches from the one that begins at `first` on."""
        position = self._position(first)
        invariant(self._firsts[position] == first, "a suffix is cut between two batches")
        self._bytes_held -= sum(len(b.data) for b in self._batches[max(position, self._oldest_held) :])
        del self._batches[position:], self._firsts[position:]
        self._oldest_held = min(self._oldest_held, position)
        self._set_last()

    def compact(self, index: int) -> None:
        """Forget the batches that end at or before `index`; the last of them becomes the base."""
        position = bisect_right(self._firsts, index)
        if position and self._batches[position - 1].last > index:
            position -= 1
        if not position:
            return
        base = self._batches[position - 1]
        self._bytes_held -= sum(len(b.data) for b in self._batches[self._oldest_held : position])
        self.base_index, self.base_term = base.last, base.term
        del self._batches[:position], self._firsts[:position]
        self._oldest_held = max(0, self._oldest_held - position)

    def reset(self, index: int, term: int) -> None:
        """Forget everything: the log goes on after a snapshot of (`index`, `term`)."""
        self._batches.clear()
        self._firsts.clear()
        self._bytes_held = self._oldest_held = 0
        self.base_index, self.base_term = index, term
        self._set_last()

    def release(self, durable_index: int) -> None:
        """Let go of the oldest bytes, down to `bytes_max`, as far as they are durable."""
        while self._bytes_held > self._bytes_max and self._oldest_held < len(self._batches):
            batch = self._batches[self._oldest_held]
            if batch.last > durable_index:
                return
            self._batches[self._oldest_held] = replace(batch, data=b"", commands=None)
            self._bytes_held -= len(batch.data)
            self._oldest_held += 1

    @property
    def let_go(self) -> int:
        """The last index whose bytes were let go, because more than `bytes_max` came after it; the base where none were."""
        return self._batches[self._oldest_held - 1].last if self._oldest_held else self.base_index

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None where it is not here (any more)."""
        if index == self.last_index:
            return self.last_term
        if index == self.base_index:
            return self.base_term
        if not self.base_index < index <= self.last_index:
            return None
        return self._batches[self._position(index)].term

    def batch_at(self, index: int) -> Batch:
        """The batch that holds `index`, which must be here; its bytes may have been let go."""
        return self._batches[self._position(index)]

    def begin_at(self, index: int) -> int:
        """The first index of the batch that holds `index`; what follows the log where it is not here yet."""
        return self._batches[self._position(index)].first if index <= self.last_index else self.last_index + 1

    def bytes_of(self, first: int) -> bytes:
        """The bytes of the batch that begins at `first`, from here or from the disk."""
        return self._batches[self._position(first)].data or self._fetch(first)

    def term_begin(self, index: int) -> int:
        """The first index here of the run of entries that share the term of `index`."""
        term = self._batches[self._position(index)].term
        return self._firsts[bisect_left(self._batches, term, key=_term)]

    def term_end(self, term: int, upto: int) -> int | None:
        """The last index ≤ `upto` that ends a batch of `term`, the base included; None where there is none."""
        position = min(bisect_right(self._batches, term, key=_term), bisect_right(self._firsts, upto)) - 1
        if position >= 0 and self._batches[position].last > upto:
            position -= 1
        if position < 0:
            return self.base_index if self.base_term == term and self.base_index <= upto else None
        return self._batches[position].last if self._batches[position].term == term else None

    def span(self, after: int, upto: int) -> list[Batch]:
        """The batches that lie in `after` < index ≤ `upto`, both being ends of batches."""
        return self._batches[bisect_right(self._firsts, after) : bisect_right(self._firsts, upto)]

    def count_after(self, index: int) -> int:
        """How many batches follow `index`."""
        return len(self._batches) - bisect_right(self._firsts, index)

    def after(self, index: int, bytes_max: int) -> list[Batch]:
        """The batches that follow `index`, whole, up to about `bytes_max` bytes but at least one where there is one."""
        found: list[Batch] = []
        size = 0
        position = bisect_right(self._firsts, index)
        while position < len(self._batches) and size < bytes_max:
            batch = self._batches[position]
            if not batch.data:
                batch = replace(batch, data=self._fetch(batch.first))
            found.append(batch)
            size += len(batch.data)
            position += 1
        return found

    def batches(self, after: int = 0) -> list[Batch]:
        """All batches that begin after `after`, with whatever of their bytes is held."""
        return self._batches[bisect_right(self._firsts, after) :]

    def _position(self, index: int) -> int:
        invariant(self.base_index < index <= self.last_index, "the index is in the log")
        return bisect_right(self._firsts, index) - 1

    def _set_last(self) -> None:
        if self._batches:
            self.last_index, self.last_term = self._batches[-1].last, self._batches[-1].term
        else:
            self.last_index, self.last_term = self.base_index, self.base_term


def _term(batch: Batch) -> int:
    return batch.term
