"""What only a leader does about time: it counts how long leases and unused sessions have left, and ends them.

Laws:

* Nothing ends here. What is due is proposed, and ends when that entry is committed. A leader that is none any more
  can propose what it likes: no majority will follow it. So a member that was stopped, or cut off, revokes nothing.
* What was proposed is never proposed again elsewhere: the next leader counts for itself.
* A lease lives for its ttl after the last keep-alive was asked for that was answered, and longer where the leader
  changed: a new leader gives every lease its full ttl again, from the moment it has applied its own no-op.
* Only the leader's steady clock counts, never the time of day.

Theory. When does the time of a lease begin to run? A grant's: when the leader has applied it, not when it was proposed,
for that may have taken long. A keep-alive's: when the leader has been confirmed by a majority after it was asked
(ReadIndex, diss. §6.4). Suppose a leader answers a keep-alive and a newer one already counts: the majority that confirmed
the old one voted for the new one later. So the new one began to count after the keep-alive had been asked, and
from then on gives the full ttl. Hence the client's rule: count from when you asked.

Once the end of a lease is proposed, a keep-alive is told that the lease is gone; else it could be answered, and the
lease end all the same.

After a pause (the process was stopped, or the machine asleep) the leader first hears who waits in its sockets: they may
have asked in time.

Sessions are simpler: one that no entry of the log has used for an hour of this leader's time is proposed to be forgotten,
on the condition that none uses it before that entry is applied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Final

from ddb.leasebook import KEYS_MAX, unknown_lease
from ddb.messages import Command
from ddb.replica import Replica
from ddb.wire import encode

log = logging.getLogger(__name__)

SESSION_UNUSED_S: Final = 3600.0
SESSIONS_EVERY_S: Final = 10.0  # how often unused ones are looked for
EXPIRED_AT_ONCE_MAX: Final = 1000  # leases or sessions in one entry
LATE_S: Final = 0.25  # a tick that comes so late followed a pause
LOOK_AGAIN_S: Final = 1.0
IDLE_MAX: Final = 1000  # deadlines of leases that are gone, beyond as many as are there
GRACE_S: Final = 0.25  # for what waits in the sockets after one, and for the confirmation that it takes
HELD_AGAIN_S: Final = 1.0  # a process that is always late must end leases all the same


class Tenure:
    """The deadlines that one member keeps while it leads. `wall_ms()` is what entries are stamped with; a session that is
    unused for `session_unused_s` is forgotten."""

    def __init__(
        self, replica: Replica, wall_ms: Callable[[], int], session_unused_s: float = SESSION_UNUSED_S
    ) -> None:
        self._replica = replica
        self._session_unused_s = session_unused_s
        self._wall_ms = wall_ms
        self._term = 0  # that is led, and counted in; 0: none
        self._begins_at: tuple[int, int] | None = None  # in which term, once which index is applied
        self._ticked_at = float("inf")
        self._held_at = float("-inf")  # when it began to wait for what is in the sockets
        self._deadlines: dict[int, float] = {}  # by lease
        self._due: list[tuple[float, int]] = []  # a heap of (no later than its deadline, lease)
        self._ending: set[int] = set()  # leases whose end is proposed
        self._used: dict[int, tuple[int, float]] = {}  # by session: its last revision, and when that was noticed
        self._sessions_at = 0.0

    def __repr__(self) -> str:
        return f"tenure term={self._term} leases={len(self._deadlines)} ending={len(self._ending)}"

    def tick(self, now: float) -> None:
        """Let time pass."""
        if now - self._ticked_at > LATE_S and now - self._held_at > HELD_AGAIN_S:
            self._held_at = now
        self._ticked_at = now
        if not self.leads(now):
            return
        self._note_granted(now)
        if now < self._held_at + GRACE_S or not self._may_propose:
            return
        if self._due and self._due[0][0] <= now:
            self._expire_leases(now)
        if now >= self._sessions_at:
            self._sessions_at = now + min(SESSIONS_EVERY_S, self._session_unused_s / 10)
            self._expire_sessions(now)

    def leads(self, now: float) -> bool:
        """Whether this member leads and counts: it has applied an entry of its own term."""
        raft, machine = self._replica.raft, self._replica.machine
        if not raft.has_committed_in_term or self._replica.diverged:
            if self._term:
                self._end()
            machine.leases.granted.clear()
            self._begins_at = None
            return False
        if self._term != raft.term:
            if self._begins_at is None or self._begins_at[0] != raft.term:
                self._begins_at = raft.term, raft.commit
            if machine.applied < self._begins_at[1]:
                return False
            self._begin(raft.term, now)
        return True

    def keep_alive(self, lease: int, now: float) -> int:
        """Give `lease` its full time again, from `now`. Returns its ttl in milliseconds.

        To be called at a leader, of which a majority has confirmed that it led after the client asked. Raises BadRequest
        where the lease is gone, or as good as gone.
        """
        self._note_granted(now)
        if lease not in self._deadlines or lease in self._ending:
            raise unknown_lease(lease)
        ttl_ms = self._replica.machine.leases.ttl_ms.get(lease)
        if ttl_ms is None:
            raise unknown_lease(lease)
        self._deadlines[lease] = now + ttl_ms / 1000
        return ttl_ms

    def remaining_s(self, lease: int, now: float) -> float | None:
        """How many seconds `lease` has left, 0 where its end is proposed; None where this member doesn't count them."""
        if not self.leads(now):
            return None
        self._note_granted(now)
        deadline = self._deadlines.get(lease)
        return None if deadline is None else max(0.0, deadline - now)

    # --- within -------------------------------------------------------------------------------------------------

    def _begin(self, term: int, now: float) -> None:
        self._end()
        self._term = term
        leases = self._replica.machine.leases
        self._deadlines = {lease: now + ttl_ms / 1000 for lease, ttl_ms in leases.ttl_ms.items()}
        self._due = [(deadline, lease) for lease, deadline in self._deadlines.items()]
        heapify(self._due)
        leases.granted.clear()
        self._sessions_at = now

    def _end(self) -> None:
        self._term = 0
        self._deadlines.clear()
        self._due.clear()
        self._ending.clear()
        self._used.clear()

    @property
    def _may_propose(self) -> bool:
        return self._replica.raft.transfer_to is None and not self._replica.read_only

    def _note_granted(self, now: float) -> None:
        """Begin to count what was granted since the last call."""
        leases = self._replica.machine.leases
        for lease in sorted(leases.granted):
            deadline = self._deadlines[lease] = now + leases.ttl_ms[lease] / 1000
            heappush(self._due, (deadline, lease))
        leases.granted.clear()
        if len(self._due) > 2 * len(leases) + IDLE_MAX:  # revoked long before their time
            self._deadlines = {lease: due for lease, due in self._deadlines.items() if lease in leases.ttl_ms}
            self._ending &= leases.ttl_ms.keys()
            self._due = [(due, lease) for lease, due in self._deadlines.items()]
            heapify(self._due)

    def _expire_leases(self, now: float) -> None:
        leases = self._replica.machine.leases
        ending: list[int] = []
        keys = 0
        while self._due and self._due[0][0] <= now and len(ending) < EXPIRED_AT_ONCE_MAX and keys < KEYS_MAX:
            _, lease = heappop(self._due)
            if lease not in leases.ttl_ms:
                self._deadlines.pop(lease, None)
                self._ending.discard(lease)
            elif self._deadlines[lease] > now:
                heappush(self._due, (self._deadlines[lease], lease))  # it was kept alive meanwhile
            else:
                heappush(self._due, (now + LOOK_AGAIN_S, lease))  # when it should be gone, to be forgotten here as well
                if lease not in self._ending:
                    ending.append(lease)
                    keys += leases.key_count(lease)
        if ending:
            self._ending.update(ending)
            log.info("%r: the leases %s run out", self._replica, ", ".join(map(str, ending[:10])))
            self._propose(["lease_expire", sorted(ending)])

    def _expire_sessions(self, now: float) -> None:
        sessions = self._replica.machine.sessions
        used: dict[int, tuple[int, float]] = {}
        for client, rev in sessions.last_uses():
            known = self._used.get(client)
            used[client] = known if known is not None and known[0] == rev else (rev, now)
        self._used = used
        unused = ((client, rev) for client, (rev, since) in used.items() if now - since >= self._session_unused_s)
        ending = sorted(islice(unused, EXPIRED_AT_ONCE_MAX))
        if ending:
            log.info("%r: %d sessions were not used for long", self._replica, len(ending))
            self._propose(["session_expire", [[client, rev] for client, rev in ending]])

    def _propose(self, command: Command) -> None:
        """Past the queue of the clients' writes: what stands there is proposed again where it was not done, by whoever
        leads then; and this must not be."""
        self._replica.raft.propose([encode(command)], [command], self._wall_ms())
