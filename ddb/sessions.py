"""Sessions: writes that are applied once, however often they are sent (Raft dissertation §6.3).

Laws:

* A write is known by its session and its number there, its *seq*. Whoever sends it again, to whatever node, gets the
  first reply, byte for byte, and nothing is done.
* Where that reply is forgotten, the write is refused: nobody can tell any more whether it was done.
* A session is forgotten only by an entry of the log. No node does so by a clock of its own, or the nodes would disagree
  about what is a repetition.
* Bounded: sessions, replies a session, and bytes of these.

Theory. A client that hears nothing can't know whether its write was done. With a session it need not: it sends
the write again under the same seq until it is answered. Seqs may arrive in any order, for a client may have several
writes under way, on several connections. A session keeps the replies of its highest seqs, and of the others the
highest that is forgotten. A client with no more than REPLIES_MAX writes unanswered finds all of them kept, as
long as their replies are not large.

A session's id is the revision of the entry that opened it, so no id is ever given twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ddb.errors import Overloaded, SessionExpired, TooLarge, invariant
from ddb.ledger import Ledger
from ddb.wire import decode_trusted

SESSIONS_MAX: Final = 10_000
REPLIES_MAX: Final = 64  # that a session keeps
REPLIES_BYTES_MAX: Final = 32 << 10  # of these together, but for the last, which is always kept
REPLY_BYTES_MAX: Final = 32 << 10  # of one write in a session

_KIND: Final = "session/"


class Session:
    """What is remembered of one session. `rev` is the last revision that used it, `forgotten` the highest seq whose
    reply was dropped, `bytes` the size of the `replies` by seq."""

    __slots__ = ("bytes", "forgotten", "replies", "rev")

    def __init__(self, rev: int, forgotten: int = 0) -> None:
        self.rev = rev
        self.forgotten = forgotten
        self.replies: dict[int, bytes] = {}
        self.bytes = 0

    def __repr__(self) -> str:
        return f"session rev={self.rev} replies={len(self.replies)} forgotten={self.forgotten}"


class Sessions:
    """All sessions, kept in `ledger`."""

    __slots__ = ("_ledger", "_sessions")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._sessions: dict[int, Session] = {}
        replies: list[tuple[int, int, bytes]] = []
        for name, value in ledger.records.items():
            if name.startswith(_KIND):
                client, *seq = map(int, name[len(_KIND) :].split("/"))
                if seq:
                    replies.append((client, seq[0], value))
                else:
                    self._sessions[client] = Session(*decode_trusted(value))
        for client, number, reply in replies:
            session = self._sessions[client]
            session.replies[number] = reply
            session.bytes += len(reply)

    def __len__(self) -> int:
        return len(self._sessions)

    def last_uses(self) -> Iterable[tuple[int, int]]:
        """Each session's id, with the last revision that used it."""
        return ((client, session.rev) for client, session in self._sessions.items())

    def open(self, rev: int) -> None:
        """Begin a session, whose id is `rev`. Raises Overloaded."""
        if len(self._sessions) >= SESSIONS_MAX:
            raise Overloaded(
                f"There are {SESSIONS_MAX} sessions already; close some, or wait until unused ones expire."
            )
        self._sessions[rev] = session = Session(rev)
        self._record(rev, session)

    def close(self, client: int) -> bool:
        """Forget a session. Returns whether there was one."""
        session = self._sessions.pop(client, None)
        if session is None:
            return False
        for seq in session.replies:
            self._ledger.set(f"{_KIND}{client}/{seq}", None)
        self._ledger.set(f"{_KIND}{client}", None)
        return True

    def expire(self, unused: Iterable[tuple[int, int]]) -> int:
        """Forget those of the sessions `(id, rev)` that nothing has used after `rev`. Returns how many.

        A write that was under way when the expiry was proposed stands before it in the log, and so keeps its session.
        """
        expired = 0
        for client, rev in unused:
            session = self._sessions.get(client)
            if session is not None and session.rev <= rev:
                expired += self.close(client)
        return expired

    def recall(self, client: int, seq: int, rev: int) -> bytes | None:
        """The reply that write `seq` of session `client` got, where it is kept; None where the write is a new one.

        `rev` is where it stands in the log now. Raises SessionExpired where there is no such session, or where the
        session can't tell any more.
        """
        session = self._sessions.get(client)
        if session is None:
            raise SessionExpired(
                f"There is no session {client} (any more), so nothing was done; whether it was earlier, nobody can tell."
            )
        reply = session.replies.get(seq)
        if reply is not None:
            session.rev = rev
            self._record(client, session)
        elif seq <= session.forgotten:
            raise SessionExpired(
                f"Session {client} has forgotten its replies up to write {session.forgotten}, so nothing was done now."
            )
        return reply

    def keep(self, client: int, seq: int, rev: int, reply: bytes) -> None:
        """Remember `reply` as that of the new write `seq`, which stands at `rev` in the log."""
        session = self._sessions[client]
        invariant(seq not in session.replies and seq > session.forgotten, "a write of a session is applied once")
        while session.replies and (
            len(session.replies) >= REPLIES_MAX or session.bytes + len(reply) > REPLIES_BYTES_MAX
        ):
            lowest = min(session.replies)
            session.bytes -= len(session.replies.pop(lowest))
            session.forgotten = max(session.forgotten, lowest)
            self._ledger.set(f"{_KIND}{client}/{lowest}", None)
        session.replies[seq] = reply
        session.bytes += len(reply)
        session.rev = rev
        self._ledger.set(f"{_KIND}{client}/{seq}", reply)
        self._record(client, session)

    def _record(self, client: int, session: Session) -> None:
        self._ledger.set(f"{_KIND}{client}", b"[%d,%d]" % (session.rev, session.forgotten))


def check_reply(reply: bytes) -> None:
    """Raise TooLarge for a reply that no session keeps."""
    if len(reply) > REPLY_BYTES_MAX:
        raise TooLarge(
            f"The reply has {len(reply)} bytes, where a session keeps {REPLY_BYTES_MAX}, so nothing was done; "
            "read less in the transaction, or write without `client` and `seq`."
        )
