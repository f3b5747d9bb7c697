"""What goes to the journal, when, and what may be sent once it is there.

Laws:

* The journal gets everything in the order in which consensus handed it out, and what is to be sent behind a save leaves when
  that save, and each one before it, is durable.
* Nothing counts as durable here before the journal has said so.
* A leader holds its own copy of a batch back only while enough others are there to commit it without that copy.

Theory. A follower has nothing better to do than to save: to hand the batches to the writer's thread, and to be woken by it,
would take longer than a good disk's fdatasync. So it saves in place, and acknowledges.

A leader's own disk goes last. An entry is committed once a majority has it on disk, and which members these are makes no
difference: the leader need not be among them (Raft diss. §10.2.1). While enough others are in step, they decide how soon a
write is answered; so the leader lets some batches gather and writes them with one fdatasync, a moment later. That takes 15 %
of its processor time off a put with 64 clients, a third of its system calls with one, and leaves the disk to the followers where they
share it. Where the others turn out to be slow, the leader's copy is needed, and for a second nothing is held back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ddb.messages import Batch, Configuration, HardState, RaftMessage, Role
from ddb.raft import Raft, Ready

HELD_BATCHES_MAX: Final = 16
HELD_BYTES_MAX: Final = 1 << 20
HELD_S: Final = 0.02
"""The longest that a batch is held back, but for the time until somebody looks: a tick."""

EAGER_S: Final = 1.0
"""For how long nothing is held back once the others were slow."""


class Journal(Protocol):
    """The log's writer. It reports each ticket back, in order, to `Saver.saved`; what it saved in place, at once.

    `saved` is the highest ticket that is durable.
    """

    saved: int

    def save(
        self,
        hard_state: HardState | None,
        batches: Sequence[Batch] = (),
        reset: tuple[int, int] | None = None,
        *,
        in_place: bool = False,
    ) -> int:
        """Make these durable: soon, or `in_place`, before this returns, where that can be. Returns the ticket."""


@dataclass(slots=True)
class _Saving:
    """What becomes true, and may be sent, when the journal reports `ticket`."""

    ticket: int
    index: int
    term: int
    hard_state: HardState | None
    messages: list[RaftMessage]


class Saver:
    """What one member makes durable. `push` has what was sent leave now; `remember` is called before a configuration goes to
    the journal: so it is remembered longer than the log may be."""

    __slots__ = (
        "_eager_until", "_held", "_held_bytes", "_held_since", "_journal", "_raft", "_saving", "_send", "push", "remember",
    )  # fmt: skip

    def __init__(self, raft: Raft, journal: Journal, send: Callable[[RaftMessage], None]) -> None:
        self.push: Callable[[], None] = lambda: None
        self.remember: Callable[[Configuration], None] = lambda config: None
        self._raft = raft
        self._journal = journal
        self._send = send
        self._saving: deque[_Saving] = deque()
        self._held: list[Batch] = []
        self._held_bytes = 0
        self._held_since = 0.0
        self._eager_until = float("-inf")

    def __repr__(self) -> str:
        return f"saver of {self._raft!r}: {len(self._saving)} saves under way, {len(self._held)} batches held back"

    def take(self, ready: Ready, now: float) -> None:
        """Save what `ready` asks for, and see to it that its `after_save` leaves behind that."""
        if ready.batches and self._may_hold(ready, now):
            if not self._held:
                self._held_since = now
            self._held += ready.batches
            self._held_bytes += sum([len(batch.data) for batch in ready.batches])
        elif ready.hard_state or ready.batches or ready.reset or (self._held and ready.after_save):
            self._save(ready, now)
        elif self._saving:
            self._saving[-1].messages.extend(ready.after_save)
        else:
            for message in ready.after_save:
                self._send(message)

    def settle(self, now: float) -> None:
        """Save what was held back, where it has to wait no longer."""
        if self._held and not self._may_wait(now):
            self._save(Ready(), now)

    def saved(self, ticket: int, now: float) -> None:
        """The journal reports that all saves up to `ticket` are durable."""
        while self._saving and self._saving[0].ticket <= ticket:
            saving = self._saving.popleft()
            self._raft.saved(saving.index, saving.term, saving.hard_state, now)
            for message in saving.messages:
                self._send(message)

    def _save(self, ready: Ready, now: float) -> None:
        """Save what is held back and what `ready` has."""
        batches = ready.batches
        if self._held:
            # A snapshot that takes the log's place takes the place of these, too.
            batches = batches if ready.reset else [*self._held, *batches]
            self._held, self._held_bytes = [], 0
        for batch in batches:
            if batch.config is not None:
                self.remember(batch.config)
        in_place = self._raft.role is not Role.LEADER
        ticket = self._journal.save(ready.hard_state, batches, ready.reset, in_place=in_place)
        index, term = (batches[-1].last, batches[-1].term) if batches else (0, 0)
        self._saving.append(_Saving(ticket, index, term, ready.hard_state, ready.after_save))
        if self._journal.saved >= ticket:
            self.saved(ticket, now)
            self.push()  # the leader waits for the acknowledgement, and nobody for what is applied next

    def _may_hold(self, ready: Ready, now: float) -> bool:
        """Whether the batches of `ready` may wait: nothing else is to be saved, and nothing to be sent behind them."""
        if ready.hard_state or ready.reset or ready.after_save or any(batch.config for batch in ready.batches):
            return False
        return self._may_wait(now)

    def _may_wait(self, now: float) -> bool:
        """Whether the others may do without the copy here, for now."""
        held = self._held
        if now < self._eager_until or not self._raft.commits_without_own:
            return False
        if not held:
            return True
        if now - self._held_since > HELD_S:
            if held[0].last > self._raft.commit:
                self._eager_until = now + EAGER_S
            return False
        return len(held) < HELD_BATCHES_MAX and self._held_bytes < HELD_BYTES_MAX
