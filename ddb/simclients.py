"""The simulated clients: what they ask, and the production retry logic that carries it to a server.

Laws: a client decides with calls.py alone, as the real one does; what it saw goes into a history, and nothing else. A
client that is not told what came of a write may ask for the same again: then that is another operation.

Theory. Few keys, so that clients meet; values that are never written twice, so that each read tells which write it saw
(checker.py). Some clients are impatient, some ask one fixed node and never look for another, some read stale.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, Final

from ddb import wire
from ddb.calls import CONNECT_TIMEOUT_S, Exchange, Failed, Keep, Knowledge, Sleep, Steps, call
from ddb.errors import DdbError, OutcomeUnknown, Timeout
from ddb.history import Operation
from ddb.simhost import Host, SimAlarm, SimLoop
from ddb.simnet import Connection

Request = dict[str, Any]
_STALE: Final = 0.15


class Caller:
    """Drives calls over simulated connections, one call at a time."""

    def __init__(self, host: Host, knowledge: Knowledge, rng: random.Random) -> None:
        self._host = host
        self._loop = SimLoop(host)
        self._knowledge = knowledge
        self._rng = rng
        self._links: dict[str, _Link] = {}
        self._steps: Steps | None = None
        self._done: Callable[[Request | DdbError], None] | None = None

    def call(
        self, request: Mapping[str, Any], at: str | None, timeout_s: float, done: Callable[[Request | DdbError], None]
    ) -> None:
        """Begin a call; `done` gets the reply, or the error."""
        self._done = done
        self._steps = call(self._knowledge, request, at, timeout_s, self._host.now, self._rng)
        self._go_on(None, None)

    def _go_on(self, answer: bytes | None, failure: Failed | None) -> None:
        """Hand the call what came of its last effect, and begin the next."""
        steps, done = self._steps, self._done
        assert steps is not None and done is not None
        while True:
            try:
                effect = steps.send(answer) if failure is None else steps.throw(failure)
            except StopIteration as end:
                done(end.value)
                return
            except DdbError as error:
                done(error)
                return
            answer = failure = None
            if isinstance(effect, Keep):
                for address in [address for address in self._links if address not in effect.addresses]:
                    self._links.pop(address).close()
            elif isinstance(effect, Sleep):
                self._loop.call_later(effect.seconds, lambda: self._go_on(None, None))
                return
            else:
                self._exchange(effect)
                return

    def _exchange(self, effect: Exchange) -> None:
        link = self._links.get(effect.address)
        if link is None or link.over:
            link = self._links[effect.address] = _Link(self._loop, effect)
        link.ask(effect, self._answered)

    def _answered(self, answer: bytes | Failed) -> None:
        if isinstance(answer, Failed):
            self._go_on(None, answer)
        else:
            self._go_on(answer, None)


class _Link:
    """One connection to a server, with one request under way at a time."""

    def __init__(self, loop: SimLoop, effect: Exchange) -> None:
        self.over = False
        self._loop = loop
        self._open = False
        self._sent = False
        self._payload: bytes | None = None
        self._answer: Callable[[bytes | Failed], None] | None = None
        self._alarm: SimAlarm | None = None
        self._channel: Connection = loop.connect(
            wire.parse_address(effect.address),
            on_open=self._opened,
            on_close=self._closed,
            on_payload=self._took,
            timeout_s=max(min(CONNECT_TIMEOUT_S, effect.deadline_s - loop.now()), 0.001),
        )

    def ask(self, effect: Exchange, answer: Callable[[bytes | Failed], None]) -> None:
        """Send the request, now or when the connection stands."""
        self._answer = answer
        self._sent = False
        self._payload = wire.frame(effect.payload)
        self._alarm = self._loop.call_later(max(effect.deadline_s - self._loop.now(), 0.0), self._late)
        if self._open:
            self._send()

    def _send(self) -> None:
        if self._payload is not None:
            self._channel.send(self._payload)
            self._payload = None
            self._sent = True

    def _opened(self) -> None:
        self._open = True
        self._send()

    def _took(self, payload: bytes) -> None:
        self._tell(payload)

    def _closed(self) -> None:
        self.over = True
        self._tell(Failed(self._channel.reason.lower(), sent=self._sent, connected=self._open))

    def _late(self) -> None:
        failure = Failed("no answer in time", sent=self._sent, connected=self._open)
        answer, self._answer = self._answer, None
        self.close()
        if answer is not None:
            answer(failure)

    def _tell(self, answer: bytes | Failed) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        then, self._answer = self._answer, None
        if then is not None:
            then(answer)

    def close(self) -> None:
        """End the connection."""
        self.over = True
        self._channel.on_close = None
        self._channel.close()


class Client:
    """One client: asks, waits for the answer, thinks, and asks again, until `stop`.

    `record` is called with each operation that has ended. `addresses` are the nodes it knows to begin with.
    """

    def __init__(
        self,
        host: Host,
        addresses: list[str],
        keys: list[str],
        rng: random.Random,
        pace_s: float,
        record: Callable[[Operation], None],
    ) -> None:
        self.name = host.name
        self.stopped = False
        self.pending: Operation | None = None
        self._host = host
        self._addresses = addresses
        self._keys = keys
        self._rng = rng
        self._pace_s = pace_s
        self._record = record
        self._count = 0
        self._retries = rng.random() < 0.5
        self._stays = rng.random() < 0.3  # asks one node and nobody else
        self._patience_s = rng.choice([0.3, 1.0, 5.0])
        first = rng.sample(addresses, len(addresses))
        self._caller = Caller(host, Knowledge(first[:2], discover=not self._stays), rng)
        self._loop = SimLoop(host)
        self._loop.call_later(rng.random() * pace_s, self._next)

    def stop(self) -> None:
        """Ask nothing more."""
        self.stopped = True

    def _next(self) -> None:
        if not self.stopped:
            self._ask(self._request())

    def _ask(self, request: Request) -> None:
        at = self._rng.choice(self._addresses) if self._stays and self._rng.random() < 0.5 else None
        operation = self.pending = Operation(self.name, request, self._host.agenda.now)
        self._caller.call(request, at, self._patience_s, lambda reply: self._ended(operation, reply))

    def _ended(self, operation: Operation, reply: Request | DdbError) -> None:
        self.pending = None
        now = self._host.agenda.now
        told = {"ok": False, "error": reply.code} if isinstance(reply, DdbError) else reply
        self._record(Operation(self.name, operation.request, operation.called, now, told))
        again = self._retries and isinstance(reply, Timeout | OutcomeUnknown) and self._rng.random() < 0.7
        pause_s = self._rng.random() * 2 * self._pace_s
        if again and not self.stopped:
            self._loop.call_later(pause_s / 4, lambda: self._ask(self._again(operation.request)))
        else:
            self._loop.call_later(pause_s, self._next)

    # -- what it asks

    def _again(self, request: Mapping[str, Any]) -> Request:
        """The same once more, but for its values: the checker must be able to tell which of the two was done."""
        again = dict(request)
        if again.get("op") == "put":
            again["value"] = self._value()
        for part in ("then", "ops"):
            if part in again:
                again[part] = [self._again(each) for each in again[part]]
        return again

    def _value(self) -> str:
        self._count += 1
        return f"{self.name}.{self._count}"

    def _request(self) -> Request:
        rng = self._rng
        key = rng.choice(self._keys)
        draw = rng.random()
        if draw < 0.38:
            return self._reading(key)
        if draw < 0.68:
            return self._writing(key)
        if draw < 0.76:
            return {"op": "incr", "key": f"n{key}"}
        if draw < 0.84:
            return {"op": "put", "key": key, "value": self._value(), "if": self._condition(key)}
        if draw < 0.92:
            other = rng.choice(self._keys)
            return {
                "op": "txn",
                "if": [self._condition(key)],
                "then": [self._writing(key), {"op": "get", "key": other}],
                "else": [{"op": "get", "key": key}],
            }
        return {"op": "batch", "ops": [self._writing(k) for k in rng.sample(self._keys, min(2, len(self._keys)))]}

    def _reading(self, key: str) -> Request:
        rng = self._rng
        draw = rng.random()
        request: Request = {"op": "get", "key": key if draw < 0.8 else f"n{key}"}
        if draw > 0.95:
            request = {"op": "scan", "prefix": key}
        if rng.random() < _STALE:
            request["read"] = "stale"
        return request

    def _writing(self, key: str) -> Request:
        if self._rng.random() < 0.15:
            return {"op": "delete", "key": key}
        return {"op": "put", "key": key, "value": self._value()}

    def _condition(self, key: str) -> Request:
        if self._rng.random() < 0.5:
            return {"key": key, "exists": self._rng.random() < 0.5}
        return {"key": key, "version": self._rng.randrange(3)}
