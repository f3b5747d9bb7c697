"""Simulated clients that hold sessions and leases: who repeats writes, and who promises to be alive.

Laws: as simclients.py's. A write of a session is one operation however often it is sent, so the history says that it was
done once at most, and the checker holds the cluster to that. Keys that hang on leases go by themselves, so they are
no part of that history; what is true of them is judged by simtenure.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, Final

from ddb.calls import Knowledge
from ddb.errors import DdbError, OutcomeUnknown, SessionExpired, Timeout
from ddb.history import DEFINITE, Operation
from ddb.simclients import Caller, Client, Request
from ddb.simhost import Host, SimLoop
from ddb.simtenure import TenureRules

TTLS_S: Final = (0.3, 0.7, 1.5, 4.0)
TRIES_MAX: Final = 8  # of one write, each as long as the production client's patience
READS: Final = frozenset({"get", "scan", "count"})


class SessionClient(Client):
    """A client that numbers its writes, sends them until it knows what came of them, and some again after that."""

    def __init__(
        self,
        host: Host,
        addresses: list[str],
        keys: list[str],
        rng: random.Random,
        pace_s: float,
        record: Callable[[Operation], None],
        rules: TenureRules,
    ) -> None:
        super().__init__(host, addresses, keys, rng, pace_s, record)
        self._retries = False  # what is open is sent again as it is, below
        self._stays = False
        self._rules = rules
        self._session = 0
        self._seq = 0
        self._echo = Caller(host, Knowledge(list(addresses), discover=False), rng)
        self._echoing = False

    def _next(self) -> None:
        if self.stopped:
            return
        if self._session:
            super()._next()
        else:
            self._caller.call({"op": "session_open"}, None, self._patience_s, self._opened)

    def _opened(self, reply: Request | DdbError) -> None:
        if not isinstance(reply, DdbError):
            self._session, self._seq = reply["client"], 0
        self._loop.call_later(self._pace_s * self._rng.random(), self._next)

    def _ask(self, request: Request) -> None:
        if request["op"] in READS:
            super()._ask(request)
            return
        self._seq += 1
        numbered = {**request, "client": self._session, "seq": self._seq}
        operation = self.pending = Operation(self.name, numbered, self._host.agenda.now)
        self._send(operation, 0)
        if self._rng.random() < 0.2:
            self._repeat(numbered)  # at the same time, elsewhere

    def _send(self, operation: Operation, tries: int) -> None:
        at = self._rng.choice(self._addresses) if self._rng.random() < 0.5 else None
        self._caller.call(
            operation.request, at, self._patience_s, lambda reply: self._heard(operation, tries + 1, reply)
        )

    def _heard(self, operation: Operation, tries: int, reply: Request | DdbError) -> None:
        """Until something is known for certain, the same is sent again, under the same number, to whomever."""
        if (
            isinstance(reply, DdbError)
            and not isinstance(reply, SessionExpired)
            and tries < (2 if self.stopped else TRIES_MAX)
        ):
            known = reply.code in ("bad_request", "too_large")  # what the data refuse is an answer
            if not known:
                self._loop.call_later(self._rng.random() * self._pace_s, lambda: self._send(operation, tries))
                return
        if isinstance(reply, SessionExpired):
            self._session = 0
        if isinstance(reply, DdbError):
            surely = reply.code in DEFINITE and reply.code in ("bad_request", "too_large")
            self._ended(operation, reply if surely else OutcomeUnknown("It may have been done by an earlier try."))
            return
        self._rules.told(operation.request, reply)
        if self._rng.random() < 0.3:
            self._repeat(operation.request)
        self._ended(operation, reply)

    def _repeat(self, request: Mapping[str, Any]) -> None:
        """Send what may be known already once more, to any node."""
        if not self._echoing and not self.stopped:
            self._echoing = True
            self._echo.call(request, self._rng.choice(self._addresses), 1.0, lambda reply: self._echoed(request, reply))

    def _echoed(self, request: Mapping[str, Any], reply: Request | DdbError) -> None:
        self._echoing = False
        if not isinstance(reply, DdbError):
            self._rules.told(request, reply)


class Holder:
    """A client that holds a lease with a few keys, keeps it alive for a while, and then revokes it or falls silent."""

    def __init__(self, host: Host, addresses: list[str], rng: random.Random, rules: TenureRules) -> None:
        self.name = host.name
        self.stopped = False
        self._host = host
        self._addresses = addresses
        self._rng = rng
        self._rules = rules
        self._stays = rng.random() < 0.5  # asks the node that served it last, and nobody else while it answers
        self._served_by: str | None = None
        self._caller = Caller(host, Knowledge(list(addresses), discover=rng.random() < 0.5), rng)
        self._loop = SimLoop(host)
        self._lease = 0
        self._ttl_s = 0.0
        self._left = 0  # keep-alives, before it falls silent
        self._count = 0
        self._loop.call_later(rng.random(), self._grant)

    def stop(self) -> None:
        """Ask nothing more: what it holds is to run out."""
        self.stopped = True

    def _call(self, request: Request, done: Callable[[Request | DdbError, float], None]) -> None:
        asked = self._host.agenda.now
        at = self._served_by if self._stays else None
        if at is None and self._rng.random() < 0.6:
            at = self._rng.choice(self._addresses)

        def answered(reply: Request | DdbError) -> None:
            self._served_by = None if isinstance(reply, DdbError) else at
            if not self.stopped:
                done(reply, asked)

        self._caller.call(request, at, 1.0, answered)

    def _soon(self, fn: Callable[[], None], within_s: float = 0.3) -> None:
        self._loop.call_later(self._rng.random() * within_s, fn)

    def _grant(self) -> None:
        if not self.stopped:
            self._ttl_s = self._rng.choice(TTLS_S)
            self._left = self._rng.randrange(12)
            self._call({"op": "lease_grant", "ttl": self._ttl_s}, self._granted)

    def _granted(self, reply: Request | DdbError, asked: float) -> None:
        if isinstance(reply, DdbError):
            self._soon(self._grant)
        else:
            self._lease = reply["lease"]
            self._call(self._hanging(), lambda reply, asked: self._soon(self._keep))

    def _hanging(self) -> Request:
        """Something that hangs keys on the lease, or takes one off it again."""
        self._count += 1
        rng, lease = self._rng, self._lease
        keys = rng.sample([f"~{self.name}.{n}" for n in range(4)], 2)
        value = f"v{self._count}"
        puts: list[Request] = [{"op": "put", "key": key, "value": value, "lease": lease} for key in keys]
        draw = rng.random()
        if draw < 0.2:
            return puts[0]
        if draw < 0.4:
            return {**puts[0], "if": {"version": rng.randrange(2)}}
        if draw < 0.55:
            return {"op": "batch", "ops": [*puts, {"op": "put", "key": f"~{self.name}.free", "value": value}]}
        if draw < 0.75:
            return {"op": "txn", "if": [{"key": keys[0], "exists": False}], "then": puts, "else": puts[1:]}
        if draw < 0.9:  # the last of which the data refuse, so that none of it is done
            return {"op": "txn", "then": [*puts, {"op": "delete", "key": keys[1]}, {"op": "incr", "key": keys[0]}]}
        return {"op": "put", "key": keys[0], "value": value}

    def _keep(self) -> None:
        if self.stopped:
            return
        if self._left <= 0:
            if self._rng.random() < 0.3:
                self._call({"op": "lease_revoke", "lease": self._lease}, lambda reply, asked: self._soon(self._grant))
            else:
                self._soon(self._grant, 2 * self._ttl_s)
            return
        self._left -= 1
        self._call({"op": "lease_keepalive", "lease": self._lease}, self._kept)

    def _kept(self, reply: Request | DdbError, asked: float) -> None:
        if not isinstance(reply, DdbError):
            self._rules.kept_alive(self._lease, asked)
        elif not isinstance(reply, Timeout) and reply.fields.get("lease") == self._lease:
            self._soon(self._grant)
            return
        if self._rng.random() < 0.2:
            self._call(self._hanging(), lambda reply, asked: self._soon(self._keep))
        else:
            self._loop.call_later(self._ttl_s * self._rng.choice([0.2, 0.4, 0.8]), self._keep)
