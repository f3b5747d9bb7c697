"""Leases and sessions, for asyncio. The laws are those of leases.py, with a task in the place of the thread."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ddb import keeping, questions
from ddb.errors import BadRequest, DdbError
from ddb.keeping import KeptLease, KeptSession
from ddb.leases import now

if TYPE_CHECKING:
    from ddb.aio import Client

_log = logging.getLogger("ddb.client")


class Lease(KeptLease):
    """A time to live that keys can hang on. Made by `Client.lease`; `id` is what the cluster calls it."""

    def __init__(
        self, client: Client, lease: int, ttl_s: float, asked_s: float, on_lost: Callable[[], object] | None
    ) -> None:
        super().__init__(lease, ttl_s, asked_s, now)
        self._client = client
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None

    async def keepalive(self, *, timeout_s: float | None = None) -> float:
        """Give a sign of life, once. Returns the seconds for which it surely lives from now on. Raises BadRequest where
        it has ended.

        >>> lease = await db.lease(10)
        >>> 9 < await lease.keepalive() <= 10
        True
        """
        sent_s = now()
        try:
            await self._client.ask(questions.lease_keepalive(self.id), timeout_s)
        except DdbError as error:
            self._keeping.failed(error)
            raise
        self._keeping.kept(sent_s)
        return self.remaining_s

    async def revoke(self, *, timeout_s: float | None = None) -> None:
        """End it now, and delete the keys that hang on it. One that has ended already is no error.

        >>> lease = await db.lease(10)
        >>> _ = await db.put("here", 1, lease=lease)
        >>> await lease.revoke()
        >>> await db.get("here")
        """
        self.close()
        try:
            await self._client.ask(questions.lease_revoke(self.id), timeout_s)
        except BadRequest as error:
            if "lease" not in error.fields:
                raise
        finally:
            self._keeping.over()

    def keep(self) -> Lease:
        """Keep it alive from now on, from a task, until `close`, `revoke` or the end of an `async with` block.

        >>> lease = (await db.lease(10)).keep()
        >>> lease.close()
        """
        if self._task is None:
            self._client.enter(self)
            self._task = asyncio.create_task(self._keep(), name=f"ddb-lease-{self.id}")
        return self

    def close(self) -> None:
        """Keep it alive no longer, so that it runs out. May be called twice."""
        self._client.leave(self)
        if self._task is not None:
            self._task.cancel()

    async def __aenter__(self) -> Lease:
        return self.keep()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.give_back()

    async def give_back(self) -> None:
        """End it. Where nobody can be told, it runs out."""
        try:
            await self.revoke()
        except DdbError as error:
            _log.warning("what hangs on lease %d is free only when that has run out: %s", self.id, error)

    async def _keep(self) -> None:
        while not self.lost:
            await asyncio.sleep(max(min(self._keeping.due_s, self.until_s) - now(), 0))
            if self.lost:
                break
            try:
                await self.keepalive(timeout_s=self.remaining_s)
            except DdbError as error:
                _log.debug("lease %d is not kept alive: %s", self.id, error)
        self._client.leave(self)
        _log.warning("lease %d may have ended: nobody could be told in time that its holder lives", self.id)
        try:
            told = self._on_lost() if self._on_lost is not None else None
            if inspect.isawaitable(told):
                await told
        except Exception:
            _log.exception("a callback of on_lost failed")


class Numbers(keeping.Numbers):
    """A session's numbers, for any number of tasks."""

    def __init__(self, client: int) -> None:
        super().__init__(client)
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def numbered(
        self, requests: Sequence[Mapping[str, Any]], timeout_s: float
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """As many of the first `requests` as may go now, at least one, for the time of a block. Raises Overloaded where
        none may within `timeout_s`."""
        begun: list[dict[str, Any]] = []

        def begin() -> bool:
            begun.extend(self.some(requests))
            return bool(begun)

        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(begin)
        except TimeoutError:
            if not begun:
                raise keeping.crowded() from None
        try:
            yield begun
        finally:
            self.end_those(begun)
            async with self._changed:
                self._changed.notify_all()


class Session(KeptSession[Numbers]):
    """A name under which the writes of an `async with` block are done exactly once: those of this task, and of the tasks
    that it begins within. Made by `Client.session`."""

    statement = "an `async with` statement"

    def __init__(self, client: Client, timeout_s: float | None = None) -> None:
        super().__init__()
        self._client = client
        self._timeout_s = timeout_s

    async def open(self) -> Session:
        """Have the cluster name it.

        >>> session = await db.session().open()
        >>> await session.close()
        """
        if self._numbers is None:
            self._numbers = Numbers(await self._client.ask(questions.session_open(), self._timeout_s))
        return self

    async def close(self) -> None:
        """Have the cluster forget it. Where it can't be told, it forgets by itself after an hour. May be called twice."""
        numbers, self._numbers = self._numbers, None
        if numbers is None:
            return
        try:
            await self._client.ask(questions.session_close(numbers.client), self._timeout_s)
        except DdbError as error:
            _log.debug("session %d is left to run out: %s", numbers.client, error)

    async def __aenter__(self) -> Session:
        await self.open()
        keeping.enter(self._client, self.numbers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keeping.leave(self.numbers)
        await self.close()
