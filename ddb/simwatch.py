"""Simulated watchers: who watches through any node, resumes at another, and must be told everything once.

Laws: a watcher resumes as docs/protocol.md says, and decides nothing else. What it is told is held against the true log: the
batches that were applied (simrules.py), which a state machine of the rules' own turns into changes.

Theory. A watcher has a *place*: the last revision that it was told something of, and how many changes of that. What it has
to be told next follows from its place and the truth alone, so whatever is left out, repeated, or in another order
is seen at the very message. Where a node says that what comes next is not kept any more, the watcher asks others, and begins anew
in the end, as a program has to.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from ddb import codec, wire
from ddb.kv import Change, Machine, MemoryTable
from ddb.messages import Batch
from ddb.simhost import Host, SimAlarm, SimLoop
from ddb.simnet import Connection
from ddb.simrules import Rules, Violation

SILENCE_MAX_S: Final = 6.0  # there is progress every 5 s
RETRY_S: Final = 0.3
PATIENCE: Final = 3  # refusals as compacted in a row, before a watcher gives up its place

ONCE: Final = "a watcher is told each change once, in order, and none is left out (docs/protocol.md)"
BEGINS: Final = "a watch from now on begins behind all that was committed when it was asked (docs/protocol.md)"
PROGRESS: Final = "progress is never ahead of what was told (docs/protocol.md)"


class Truth:
    """All changes that the cluster has made, in order, from what its members have applied."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.revs: list[int] = []
        self.events: list[dict[str, Any]] = []
        self._machine = Machine(MemoryTable())
        self._machine.on_changes = self._take

    @property
    def applied(self) -> int:
        """Up to which revision it is known."""
        return self._machine.applied

    def advance(self) -> None:
        """Take in what was applied since the last look."""
        chosen, machine = self.rules.chosen, self._machine
        while (known := chosen.get(machine.applied + 1)) is not None:
            batch = codec.decode_batch(known[2])
            machine.apply_batch(replace(batch, data=known[2]))

    def _take(self, batch: Batch, changes: list[Change]) -> None:
        for rev, key, row, _, _ in changes:
            self.revs.append(rev)
            if row is None:
                self.events.append({"event": "delete", "key": key, "rev": rev})
            else:
                value = wire.decode_trusted(row[0])
                self.events.append({"event": "put", "key": key, "value": value, "rev": rev, "version": row[3]})


class Watcher:
    """One of them, from its start to `stop`. `met(what)` counts; `note(text)` gets the trace, when there is one."""

    def __init__(
        self,
        host: Host,
        addresses: list[str],
        rng: random.Random,
        truth: Truth,
        met: Callable[[str], None],
        note: Callable[[str], None] | None,
    ) -> None:
        self.name = host.name
        self._host = host
        self._addresses = addresses
        self._rng = rng
        self._truth = truth
        self._met = met
        self._note = note
        self._stays = rng.random() < 0.3
        self.prefix = rng.choice(["", "", "a", "n", "b"])
        self._loop = SimLoop(host)
        self._channel: Connection | None = None
        self._alarm: SimAlarm | None = None
        self.told = -1  # all changes up to here, of what it wants; -1: it has no place yet
        self._place = 0  # the truth's next event
        self._skipped = 0  # events of `_last` that this connection has told again
        self._last = 0  # the last revision of which something was told
        self._of_last = 0  # how many of its events were
        self._asked_committed = 0
        self._fresh = True
        self._refusals = 0
        self._opened = False
        self._stopped = False
        self._loop.call_later(rng.random(), self._connect)

    def __repr__(self) -> str:
        return f"{self.name} watches {self.prefix!r} at {self.told}"

    def stop(self) -> None:
        """Watch no more."""
        self._stopped = True
        self._drop()

    # -- connections

    def _connect(self) -> None:
        if self._stopped or self._channel is not None:
            return
        rng = self._rng
        address = self._addresses[0] if self._stays else rng.choice(self._addresses)
        self._fresh = True
        self._channel = self._loop.connect(
            wire.parse_address(address), on_open=self._ask, on_close=self._again, on_payload=self._took, timeout_s=1.0
        )
        self._expect()

    def _ask(self) -> None:
        request: dict[str, Any] = {"op": "watch", "prefix": self.prefix}
        self._skipped = 0
        if self.told >= 0:
            resumes_within = self._last == self.told and self._of_last > 0
            request["from"] = self._last if resumes_within else self.told + 1
            self._skipped = self._of_last if resumes_within else 0
            self._met("watch resumed")
        self._asked_committed = self._truth.rules.committed
        assert self._channel is not None
        self._channel.send(wire.frame(wire.encode(request)))

    def _again(self) -> None:
        self._channel = None
        if self._alarm is not None:
            self._alarm.cancel()
        self._loop.call_later(self._rng.random() * RETRY_S, self._connect)

    def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if self._alarm is not None:
            self._alarm.cancel()
        if channel is not None:
            channel.on_close = None
            channel.close()

    def _expect(self) -> None:
        """A connection that is silent for longer than progress takes is dead."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_later(SILENCE_MAX_S, self._silent)

    def _silent(self) -> None:
        self._met("watch fell silent")
        self._drop()
        self._again()

    # -- what it is told

    def _took(self, payload: bytes) -> None:
        if self._stopped or self._channel is None:
            return
        self._expect()
        said = wire.decode_trusted(payload)
        if self._note is not None:
            self._note(f"{self.name} is told {payload.decode()}")
        self._truth.advance()
        if self._fresh:
            self._fresh = False
            self._begin(said)
        elif said["event"] == "progress":
            self._progress(said["rev"])
        elif said["event"] == "error":
            self._met(f"watch ended: {said['error']}")
            self._drop()
            self._again()
        else:
            self._event(said)

    def _begin(self, said: dict[str, Any]) -> None:
        if not said["ok"]:
            self._met(f"watch refused: {said['error']}")
            if said["error"] == "compacted":
                self._refusals += 1
                if self._refusals > PATIENCE:
                    self.told, self._last, self._of_last = -1, 0, 0
            self._drop()
            self._again()
            return
        self._refusals = 0
        if self.told < 0:
            if said["rev"] < self._asked_committed:
                self._fail(BEGINS, f"{said}, where {self._asked_committed} was committed before")
            self.told = said["rev"]
            self._place = bisect_left(self._truth.revs, self.told + 1)

    def _progress(self, rev: int) -> None:
        wanted = self._next()
        if wanted is not None and wanted["rev"] <= rev:
            self._fail(PROGRESS, f"{rev}, before {wanted}")
        if self._skipped and rev >= self._last:
            self._fail(ONCE, f"{self._skipped} changes of revision {self._last} are told no more")
        self.told = max(self.told, rev)

    def _event(self, said: dict[str, Any]) -> None:
        if self._skipped and said["rev"] == self._last:
            self._skipped -= 1
            return
        wanted = self._next()
        if said != wanted:
            self._fail(ONCE, f"{said}, where {wanted} is due")
        self._place += 1
        rev = said["rev"]
        self._of_last = self._of_last + 1 if rev == self._last else 1
        self._last = self.told = rev
        self._met("change told")

    def _next(self) -> dict[str, Any] | None:
        """What is to be told next, as far as anybody can know."""
        events = self._truth.events
        while self._place < len(events):
            if events[self._place]["key"].startswith(self.prefix):
                return events[self._place]
            self._place += 1
        return None

    def _fail(self, rule: str, what: str) -> None:
        raise Violation(rule, self.name, f"{self!r}: {what}")
