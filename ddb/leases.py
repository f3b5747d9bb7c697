"""Leases and sessions, for programs that block.

Laws: the thread that keeps a lease alive ends with its block, and with its client; it does not share a connection with
anybody, so no long call of the program makes it late; a callback of the program's runs in that thread, and what it
raises is logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from ddb import keeping, questions
from ddb.caller import Caller, Callers
from ddb.calls import seconds
from ddb.errors import BadRequest, DdbError
from ddb.keeping import KeptLease, KeptSession

if TYPE_CHECKING:
    from ddb.client import Client

_log = logging.getLogger("ddb.client")
_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def now() -> float:
    """Seconds of a clock that also goes on while the machine sleeps, where there is one."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def whoami() -> str:
    """What a holder is called where it does not say: host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Lease(KeptLease):
    """A time to live that keys can hang on. Made by `Client.lease`; `id` is what the cluster calls it."""

    def __init__(
        self,
        callers: Callers,
        lease: int,
        ttl_s: float,
        asked_s: float,
        on_lost: Callable[[], object] | None,
        timeout_s: float,
    ) -> None:
        super().__init__(lease, ttl_s, asked_s, now)
        self._callers = callers
        self._on_lost = on_lost
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._caller: Caller | None = None
        self._inherited = False

    def keepalive(self, *, timeout_s: float | None = None) -> float:
        """Give a sign of life, once. Returns the seconds for which it surely lives from now on. Raises BadRequest where
        it has ended.

        >>> lease = db.lease(10)
        >>> 9 < lease.keepalive() <= 10
        True
        """
        self._beat(self._callers.call, self._patience(timeout_s))
        return self.remaining_s

    def revoke(self, *, timeout_s: float | None = None) -> None:
        """End it now, and delete the keys that hang on it. One that has ended already is no error.

        >>> lease = db.lease(10)
        >>> _ = db.put("here", 1, lease=lease)
        >>> lease.revoke()
        >>> "here" in db
        False
        """
        self.close()
        try:
            self._callers.call(questions.lease_revoke(self.id).request, None, self._patience(timeout_s))
        except BadRequest as error:
            if "lease" not in error.fields:
                raise
        finally:
            self._keeping.over()

    def keep(self) -> Lease:
        """Keep it alive from now on, from a thread, until `close`, `revoke` or the end of a `with` block.

        >>> lease = db.lease(10).keep()
        >>> lease.close()
        """
        if self._thread is None and not self._stop.is_set():
            self._callers.enter(self)
            self._caller = Caller(self._callers.known)
            self._thread = threading.Thread(target=self._keep, name=f"ddb-lease-{self.id}", daemon=True)
            try:
                self._thread.start()
            except BaseException:  # an interrupt, whether it runs already or not: nobody will have the lease
                self._stop.set()
                raise
        return self

    def close(self) -> None:
        """Keep it alive no longer, so that it runs out. May be called twice.

        >>> lease = db.lease(10).keep()
        >>> lease.close()
        """
        self._stop.set()
        self._callers.leave(self)
        if self._caller is not None:
            self._caller.abort()
        if self._thread is not None and self._thread is not threading.current_thread():
            try:
                self._thread.join()
            except RuntimeError:
                pass  # an interrupt came while it was started: it ends as soon as it begins

    def __enter__(self) -> Lease:
        return self.keep()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """End it. Where nobody can be told, it runs out; and where it was begun by the process that this one was forked off
        from, it is left to that."""
        if self._inherited:
            return
        try:
            self.revoke()
        except DdbError as error:
            _log.warning("what hangs on lease %d is free only when that has run out: %s", self.id, error)

    def _forked(self) -> None:
        """The parent keeps it alive, and ends it."""
        self._inherited = True
        self._stop, self._thread = threading.Event(), None
        self._stop.set()
        if self._caller is not None:
            self._caller.close()
            self._caller = None

    def _patience(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else seconds(timeout_s, "timeout_s")

    def _beat(self, call: Callable[[dict[str, Any], str | None, float], Any], timeout_s: float) -> None:
        sent_s = now()
        try:
            call(questions.lease_keepalive(self.id).request, None, timeout_s)
        except DdbError as error:
            self._keeping.failed(error)
            raise
        self._keeping.kept(sent_s)

    def _keep(self) -> None:
        caller = self._caller
        assert caller is not None, "a thread is begun with a caller of its own"
        try:
            while not self._stop.wait(max(self._keeping.due_s - now(), 0)) and not self.lost:
                try:
                    self._beat(caller.call, self._keeping.remaining_s)
                except DdbError as error:
                    _log.debug("lease %d is not kept alive: %s", self.id, error)
        finally:
            caller.close()
        if not self._stop.is_set():
            self._lost()

    def _lost(self) -> None:
        _log.warning("lease %d may have ended: nobody could be told in time that its holder lives", self.id)
        if self._on_lost is not None:
            try:
                self._on_lost()
            except Exception:
                _log.exception("a callback of on_lost failed")


class Numbers(keeping.Numbers):
    """A session's numbers, for any number of threads."""

    def __init__(self, client: int) -> None:
        super().__init__(client)
        self._changed = threading.Condition()
        self._pid = os.getpid()

    @property
    def inherited(self) -> bool:
        """Whether they are another process's, that this one was forked off from: a number must not be given out twice."""
        return self._pid != os.getpid()

    @contextlib.contextmanager
    def numbered(self, requests: Sequence[Mapping[str, Any]], timeout_s: float) -> Iterator[list[dict[str, Any]]]:
        """As many of the first `requests` as may go now, at least one, for the time of a block. Raises Overloaded where
        none may within `timeout_s`."""
        if self.inherited:
            raise BadRequest(
                "This session is that of another process, which this one was forked off from; open one here."
            )
        begun: list[dict[str, Any]] = []

        def begin() -> bool:
            begun.extend(self.some(requests))
            return bool(begun)

        with self._changed:
            self._changed.wait_for(begin, timeout_s)
        if not begun:
            raise keeping.crowded()
        try:
            yield begun
        finally:
            with self._changed:
                self.end_those(begun)
                self._changed.notify_all()


class Session(KeptSession[Numbers]):
    """A name under which the writes of a `with` block are done exactly once. Made by `Client.session`.

    Of this thread: a block entered in one thread says nothing about the writes of another.
    """

    def __init__(self, client: Client, timeout_s: float | None = None) -> None:
        super().__init__()
        self._client = client
        self._timeout_s = timeout_s

    def open(self) -> Session:
        """Have the cluster name it.

        >>> session = db.session().open()
        >>> session.close()
        """
        if self._numbers is None:
            self._numbers = Numbers(self._client.ask(questions.session_open(), self._timeout_s))
        return self

    def close(self) -> None:
        """Have the cluster forget it. Where it can't be told, it forgets by itself after an hour. May be called twice.

        >>> session = db.session().open()
        >>> session.close()
        >>> session.close()
        """
        numbers, self._numbers = self._numbers, None
        if numbers is None or numbers.inherited:
            return
        try:
            self._client.ask(questions.session_close(numbers.client), self._timeout_s)
        except DdbError as error:
            _log.debug("session %d is left to run out: %s", numbers.client, error)

    def __enter__(self) -> Session:
        self.open()
        keeping.enter(self._client, self.numbers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keeping.leave(self.numbers)
        self.close()
