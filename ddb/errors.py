"""What can go wrong, as one tree.

Every failure that a person or a program may meet is a `DdbError`. Three things are fixed by its class:

* `code`: the word in the reply's `"error"` field (docs/protocol.md), which programs test;
* `definite`: True where a write that got this error surely did not happen and never will; False where it
  may have. A retry is safe only after a definite failure, or under a session;
* `exit_code`: what the command line ends with.

The message is a sentence that says what to do about it. It is shown to people as it stands.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DdbError(Exception):
    """Any failure that ddb reports. `fields` go into the reply beside `error` and `message`."""

    code: ClassVar[str] = "internal"
    definite: ClassVar[bool] = True
    retry: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


class BadFrame(DdbError):
    """Bytes that are not the framing; the connection is closed after the reply."""

    code = "bad_frame"


class BadRequest(DdbError):
    """Not JSON, not an object, an unknown op, or a field that is missing or of the wrong type."""

    code = "bad_request"


class TooLarge(DdbError):
    """A key, a value, a request or a transaction over its limit."""

    code = "too_large"


class NoLeader(DdbError):
    """The node knows no leader now; nothing was proposed."""

    code = "no_leader"
    retry = True
    exit_code = 5


class NotLeader(DdbError):
    """The request needs the leader and asked not to be forwarded; `leader` is the leader's address."""

    code = "not_leader"
    retry = True
    exit_code = 5


class Timeout(DdbError):
    """Not decided in time: a write may have happened, or may still happen."""

    code = "timeout"
    definite = False
    exit_code = 6


class Overloaded(DdbError):
    """A queue is full; the request was shed before it was proposed."""

    code = "overloaded"
    retry = True


class ReadOnly(DdbError):
    """The disk is full or failing; reads still work."""

    code = "read_only"


class Compacted(DdbError):
    """A revision that the log keeps no longer; `oldest` is the first one kept."""

    code = "compacted"


class SessionExpired(DdbError):
    """The session was forgotten, so exactly-once can't be kept."""

    code = "session_expired"


class WrongCluster(DdbError):
    """A peer of another cluster."""

    code = "wrong_cluster"


class Unauthorized(DdbError):
    """No valid credentials."""

    code = "unauthorized"


class Forbidden(DdbError):
    """Not allowed for this key or operation."""

    code = "forbidden"


class ShuttingDown(DdbError):
    """The node is leaving; ask another."""

    code = "shutting_down"
    retry = True
    exit_code = 5


class Internal(DdbError):
    """A bug; the message repeats the reference under which it was logged."""

    code = "internal"
    definite = False


class Unreachable(DdbError):
    """The client could not connect to any server, so nothing was sent."""

    code = "unreachable"
    retry = True
    exit_code = 5


class OutcomeUnknown(Timeout):
    """The client's connection broke, or its time ran out, after a write was sent: it may have happened."""

    code = "outcome_unknown"


class SessionLost(SessionExpired):
    """The session was forgotten while a write of it was on its way: that write may have happened."""

    definite = False
    exit_code = 6


class Conflict(DdbError):
    """A transaction that others overtook again and again until its time was up. It did nothing."""

    code = "conflict"


class NotInTime(DdbError, TimeoutError):
    """What was waited for did not come in time: a lock, an item of a queue, a barrier's fall."""

    code = "not_in_time"
    exit_code = 4


class LockLost(DdbError):
    """A lock, or what else hangs on a lease, may have gone to somebody else while its holder believed to have it."""

    code = "lock_lost"


class StartupError(DdbError):
    """A server can't start: a busy port, a data directory in use, settings that don't fit."""

    code = "startup"


class CorruptLog(StartupError):
    """The log is damaged before valid records; `file` and `offset` say where."""

    code = "corrupt_log"


class CorruptStore(StartupError):
    """The snapshot file answers something that its checksums refute."""

    code = "corrupt_store"


class InvariantError(AssertionError):
    """A rule that must hold does not: a bug, or memory gone bad. The process ends rather than go on."""


BY_CODE: dict[str, type[DdbError]] = {
    cls.code: cls
    for cls in (
        BadFrame, BadRequest, TooLarge, NoLeader, NotLeader, Timeout, Overloaded, ReadOnly, Compacted,
        SessionExpired, WrongCluster, Unauthorized, Forbidden, ShuttingDown, Internal,
    )
}  # fmt: skip


def invariant(condition: object, rule: str) -> None:
    """Demand that `condition` holds, also under `python -O`. Raises InvariantError naming the `rule`."""
    if not condition:
        raise InvariantError(rule)
