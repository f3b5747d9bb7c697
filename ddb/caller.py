"""The blocking sockets on which a client's calls travel.

Laws:

1. It is told truthfully how far a request got (links.py).
2. An interrupt (Ctrl-C) in the middle of a call leaves no half-read connection in use.
3. No step outlasts the deadline that it was given.
4. What one thread does never waits for another's call: each call under way has connections of its own.
5. A process that was forked off shares no connection with its parent: each would read replies that the other asked for.

Theory. What a call does next is decided in calls.py, without I/O; here each of its steps is done, one after another, in
the caller's own thread. A `Caller` carries one call at a time; `Callers` lends one to each call, and keeps those that
are idle for the next: a program with one thread has one connection to each node that it needs.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ddb import calls
from ddb.calls import Effect, Exchange, Failed, Keep, Knowledge, Listeners, Outcome, Sleep, Volley
from ddb.driving import drive
from ddb.errors import BadRequest, DdbError
from ddb.links import Link, reason_of
from ddb.watching import Watch

_log = logging.getLogger("ddb.client")


class Caller:
    """The open connections of one call after another. For one thread at a time, but for `abort`."""

    def __init__(self, known: Knowledge) -> None:
        self.known = known
        self.links: dict[str, Link] = {}
        self._rng = random.Random()
        self._aborted = threading.Event()

    def call(self, request: Mapping[str, Any], at: str | None, timeout_s: float) -> dict[str, Any]:
        """Send `request` to the leader where that is known, or to the address `at` and nowhere else, and go on until
        it is served or `timeout_s` is over. Returns the reply. Raises a DdbError."""
        steps = calls.call(self.known, request, at, timeout_s, time.monotonic, self._rng)
        return drive(steps, self._perform, Failed)

    def volley(self, requests: Sequence[Mapping[str, Any]], timeout_s: float) -> list[Outcome]:
        """Send all `requests` at once; returns for each what came of it."""
        steps = calls.volley(self.known, requests, timeout_s, time.monotonic, self._rng)
        return drive(steps, self._perform, Failed)

    def close(self) -> None:
        """Close every connection. May be called twice."""
        for address in list(self.links):
            self.drop(address)

    def abort(self) -> None:
        """End the call that another thread has under way, with an error, and all that would follow it."""
        self._aborted.set()
        for link in list(self.links.values()):
            link.abort()

    def link(self, address: str, deadline_s: float) -> Link:
        """The open connection to `address`, or a new one. Raises OSError."""
        link = self.links.get(address)
        if link is not None and link.usable():
            return link
        self.drop(address)
        link = self.links[address] = Link(address, deadline_s)
        if self._aborted.is_set():  # by a thread that did not see this link
            link.abort()
        return link

    def drop(self, address: str) -> None:
        """Close the connection to `address`, if there is one."""
        link = self.links.pop(address, None)
        if link is not None:
            link.close()

    def _perform(self, effect: Effect | Volley) -> Any:
        if self._aborted.is_set():
            raise BadRequest("This client is closed; connect again.")
        match effect:
            case Exchange():
                return self._exchange(effect)
            case Volley():
                return self._volley(effect)
            case Sleep(seconds):
                self._aborted.wait(seconds)
            case Keep(addresses):
                for unknown in [address for address in self.links if address not in addresses]:
                    self.drop(unknown)
        return None

    def _exchange(self, effect: Exchange) -> bytes:
        """The reply to one request. Raises Failed."""
        try:
            link = self.link(effect.address, effect.deadline_s)
        except OSError as error:
            raise Failed(reason_of(error), sent=False, connected=False) from None
        try:
            return link.exchange(effect.payload, effect.deadline_s)
        except OSError as error:
            self.drop(effect.address)
            raise Failed(reason_of(error), sent=link.sent) from None

    def _volley(self, effect: Volley) -> list[bytes | Failed]:
        """For each request its reply, or why there is none."""
        try:
            link = self.link(effect.address, effect.deadline_s)
        except OSError as error:
            return [Failed(reason_of(error), sent=False, connected=False) for _ in effect.payloads]
        answers: list[bytes] = []
        try:
            link.exchange_many(effect.payloads, effect.deadline_s, answers)
        except OSError as error:
            self.drop(effect.address)
            reason, whole = reason_of(error), link.sent_whole
            missing = range(len(answers), len(effect.payloads))
            return [*answers, *(Failed(reason, sent=position < whole) for position in missing)]
        return list(answers)


class Guest(Protocol):
    """What lives as long as its client at most."""

    def close(self) -> None:
        """End it. May be called twice."""

    def _forked(self) -> None:
        """This is a child process from now on: let go of what is the parent's, without a word to the cluster."""


class Callers:
    """All connections of one client, and what is `known` of where the nodes are and who leads.

    The arguments are those of calls.Knowledge. For any number of threads.
    """

    def __init__(
        self, servers: Sequence[str], registry: str | None = None, discover: bool = True, unreachable_s: float = 5.0
    ) -> None:
        self.listeners = Listeners()
        self.known = Knowledge(tuple(servers), registry, discover, unreachable_s, on_state=self.listeners.tell)
        self.idle: list[Caller] = []
        self._lock = threading.Lock()
        self._guests: set[Guest] = set()
        self.closed = False
        _everybody.add(self)

    def call(self, request: Mapping[str, Any], at: str | None, timeout_s: float) -> dict[str, Any]:
        """As Caller.call, in whichever thread. Raises BadRequest where the client is closed."""
        caller = self._lent()
        try:
            return caller.call(request, at, timeout_s)
        finally:
            self._returned(caller)

    def volley(self, requests: Sequence[Mapping[str, Any]], timeout_s: float) -> list[Outcome]:
        """As Caller.volley, in whichever thread. Raises BadRequest where the client is closed."""
        caller = self._lent()
        try:
            return caller.volley(requests, timeout_s)
        finally:
            self._returned(caller)

    def _lent(self) -> Caller:
        """An idle caller, or a new one. (To pop from a list is one step, whatever other threads do.)"""
        if self.closed:
            raise BadRequest("This client is closed; connect again.")
        try:
            return self.idle.pop()
        except IndexError:
            return Caller(self.known)

    def _returned(self, caller: Caller) -> None:
        self.idle.append(caller)
        if self.closed:  # meanwhile: whoever comes last closes it
            self._close_idle()

    def _forked(self) -> None:
        """As Guest says. Other threads are gone, and what they had locked stays so."""
        self._lock = threading.Lock()
        self._close_idle()
        for guest in self._guests:
            guest._forked()

    def _close_idle(self) -> None:
        while self.idle:
            try:
                self.idle.pop().close()
            except IndexError:
                return  # another thread was faster

    def watch(self, request: dict[str, Any], from_rev: int | None, timeout_s: float) -> Watch:
        """A watch that stands. Raises a DdbError where none does within `timeout_s`."""
        if self.known.learn_due:
            self.learn()
        watch = Watch(self.known, request, from_rev, timeout_s, self.learn, self.leave)
        self.enter(watch)
        return watch.start()

    def learn(self) -> None:
        """Ask anybody where the nodes are."""
        self.known.learn_due = self.known.discover
        try:
            self.call({"op": "ping"}, None, calls.ASIDE_S)
        except DdbError as error:
            _log.debug("nobody tells where the nodes are: %s", error)

    def enter(self, guest: Guest) -> None:
        """Close `guest` with the client. Raises BadRequest where that is closed."""
        with self._lock:
            if not self.closed:
                self._guests.add(guest)
                return
        guest.close()
        raise BadRequest("This client is closed; connect again.")

    def leave(self, guest: Guest) -> None:
        """Forget a guest that ended by itself."""
        with self._lock:
            self._guests.discard(guest)

    def close(self) -> None:
        """End every guest and close every connection. May be called twice. A call that another thread has under way
        ends as it would have."""
        with self._lock:
            self.closed = True
            guests, self._guests = self._guests, set()
        for guest in guests:
            guest.close()
        self._close_idle()


_everybody: weakref.WeakSet[Callers] = weakref.WeakSet()


def _forked() -> None:
    for callers in list(_everybody):
        callers._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
